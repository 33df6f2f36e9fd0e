"""rag.py: passages, vectors against plain formulas, indices, what is kept of them, the command line."""

import json
import math
import random
import re
import shutil
import sys
import types
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from test_command_line import refused

import rag
import v8_lora as v8
import v9_rlhf as v9

VOCAB = [*"\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;!?'-", *v8.SPECIAL_TOKENS]
SPOKEN = "king lord crown night sword heart river stone bird cloud bread wine horse tower bell ship".split()


def speech(rng, n=12):
    """A speech of n words in lines of six."""
    words = [rng.choice(SPOKEN) for _ in range(n)]
    return "\n".join(" ".join(words[i : i + 6]) + "," for i in range(0, n, 6))


def play(n=40, seed=0):
    """A play of n speeches."""
    rng = random.Random(seed)
    return "\n\n".join(f"{rng.choice(['ROMEO', 'First Citizen'])}:\n{speech(rng)}" for _ in range(n)) + "\n"


def save_model(folder, rung=v8, seed=1, **changes):
    """Save a model of v8 or v9 with random weights as its rung does."""
    torch.manual_seed(seed)
    config = rung.Config(n_embd=16, n_head=2, n_layer=1, block_size=192, vocab_size=len(VOCAB))
    config = replace(config, tokenizer="char", out_dir=str(folder), **changes)
    model = rung.LanguageModel(config, len(VOCAB))
    checkpoint = {"version": rung.NAME, "step": 1, "seconds": 1.0, "tokens": 1, "history": []}
    checkpoint |= {"vocab": VOCAB, "model": model.state_dict(), "config": asdict(config)}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / "checkpoint.pt")
    return model


@pytest.fixture
def place(tmp_path):
    """A folder with a play and a model of v8."""
    (tmp_path / "play.txt").write_text(play(), encoding="utf-8", newline="\n")
    save_model(tmp_path / "model")
    return tmp_path


def run_rag(place, *flags, question="Who says: king lord"):
    """Run rag.py in a folder made by `place`."""
    flags = {"data": "play.txt", "model": "model"} | dict(flag.split("=") for flag in flags)
    return run_here("rag", question, *(f"--{name}={value}" for name, value in flags.items()), cwd=place)


def config_of(place, **changes):
    """A Config with absolute paths."""
    paths = {"data": place / "play.txt", "model": place / "model", "out_dir": place / "rag"}
    return rag.Config(**{name: str(path) for name, path in paths.items()} | changes)


# ---------------------------------------------- passages ----------------------------------------------


units = st.lists(st.text("abc de", min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(units, st.integers(12, 60))
def test_windows_hold_all_words_in_order_and_each_pair_of_neighbours_that_fits(texts, length):
    pieces = [(i, " ".join(text.split())) for i, text in enumerate(texts)]
    windows = rag.pack(pieces, length)
    assert all(len("\n".join(window)) <= length for _, window in windows)
    whole = [part for _, text in pieces for part in rag.textwrap.wrap(text, length)]
    joined, at = [], 0
    for _, window in windows:  # each begins with the last piece of the one before, or goes on after it
        start = at - 1 if 0 < at < len(whole) and len(whole[at - 1]) + 1 + len(whole[at]) <= length else at
        assert whole[start : start + len(window)] == window
        at = start + len(window)
        joined.append((start, at))
    assert joined[0][0] == 0 and joined[-1][1] == len(whole)
    for i in range(len(whole) - 1):
        if len(whole[i]) + 1 + len(whole[i + 1]) <= length:
            assert any(start <= i and i + 1 < end for start, end in joined)


def test_windows_of_a_small_text_by_hand():
    lines = [(7, "one two"), (8, "three four"), (9, "five six"), (10, "seven")]
    assert rag.pack(lines, 18) == [(7, ["one two", "three four"]), (9, ["five six", "seven"])]
    assert rag.pack(lines, 20) == [
        (7, ["one two", "three four"]),
        (8, ["three four", "five six"]),
        (9, ["five six", "seven"]),
    ]
    assert rag.pack(lines, 9) == [
        (7, ["one two"]),
        (8, ["three"]),
        (8, ["four"]),
        (9, ["five six"]),
        (10, ["seven"]),
    ]


def test_speeches_of_a_play_have_their_speaker_and_their_line():
    text = "ROMEO:\nking lord\ncrown night\n\nFirst Citizen:\nsword heart\n\nROMEO:\nriver\n"
    found = rag.split_passages(text, "play.txt", 150)
    assert [(p.name, p.text, p.place) for p in found] == [
        ("ROMEO", "king lord\ncrown night", "play.txt:2"),
        ("First Citizen", "sword heart", "play.txt:6"),
        ("ROMEO", "river", "play.txt:9"),
    ]
    assert found[1].shown == "First Citizen:\nsword heart"


def test_the_places_of_the_plays_are_the_lines_of_the_file():
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    lines, passages = text.split("\n"), rag.split_passages(text, "input.txt", 150)
    for passage in passages:
        line = int(passage.place.partition(":")[2])
        first = passage.text.split("\n")[0] if passage.name else passage.text.split()[0]
        assert first in lines[line - 1]
        assert len(passage.text) <= 150
    plain = re.sub(r"^[A-Z][A-Za-z' -]{1,30}:$", "", text, flags=re.MULTILINE)  # without the names
    kept = Counter(word for passage in passages for word in passage.shown.split())
    lost = Counter(plain.split()) - kept
    assert not lost


def test_other_texts_are_windows_of_sentences():
    text = "A bird sings. The king (old) sleeps!  Who\nknows? Nobody.\n\nA new part begins here."
    found = rag.split_passages(text, "notes/a.txt", 40)
    assert [(p.name, p.text, p.place) for p in found] == [
        ("", "A bird sings. The king (old) sleeps!", "notes/a.txt:1"),
        ("", "The king (old) sleeps! Who knows?", "notes/a.txt:1"),
        ("", "Who knows? Nobody.", "notes/a.txt:1"),
        ("", "Nobody. A new part begins here.", "notes/a.txt:2"),
    ]


# ---------------------------------------------- vectors ----------------------------------------------


def plain_scores(texts, question):
    """TF-IDF from its formula, with a dict and without hashing: cosines of a question with texts."""

    def terms(text):
        words = [word.lower() for word in re.findall(r"\w+", text)]
        return Counter(words + [f"{a} {b}" for a, b in pairwise(words)])

    found = [terms(text) for text in texts]
    n_texts = {term: sum(term in counts for counts in found) for counts in found for term in counts}
    n_texts |= {term: 0 for term in terms(question) if term not in n_texts}

    def weights(counts):
        return {t: n * math.sqrt(math.log((len(texts) + 1) / (n_texts[t] + 0.5))) for t, n in counts.items()}

    def norm(vector):
        return math.sqrt(sum(x * x for x in vector.values())) or 1.0

    asked, scores = weights(terms(question)), []
    for counts in found:
        other = weights(counts)
        product = sum(weight * other.get(term, 0.0) for term, weight in asked.items())
        scores.append(product / norm(asked) / norm(other))
    return scores


def test_tfidf_is_the_formula_where_no_two_words_share_a_number():
    rng = random.Random(3)
    texts = [speech(rng, rng.randint(2, 14)) for _ in range(60)]
    embedder = rag.HashedWords()
    embedder.n_dims = 2**18
    embedder.fit(texts)
    vectors = embedder(texts)
    for question in ("king lord", "night sword heart river", texts[7], "a word that is nowhere, king"):
        found = vectors @ embedder([question])[0]
        np.testing.assert_allclose(found, plain_scores(texts, question), atol=1e-5)


def test_hashing_to_few_numbers_is_right_on_average():
    rng = random.Random(4)
    texts = [speech(rng, 14) for _ in range(300)]
    scores = {}
    for n_dims in (512, 2**18):
        embedder = rag.HashedWords()
        embedder.n_dims = n_dims
        embedder.fit(texts)
        vectors = embedder(texts)
        scores[n_dims] = (vectors @ vectors.T)[np.triu_indices(len(texts), 1)]
    errors = scores[512] - scores[2**18]
    assert 0.005 < errors.std() < 2 / math.sqrt(512)  # of n_dims numbers each error is about 1 / sqrt(n_dims)
    assert abs(errors.mean()) < 0.01


def test_a_text_without_words_is_zero_and_vectors_have_length_one():
    embedder = rag.HashedWords()
    embedder.fit(["king lord", "night"])
    vectors = embedder(["king lord", "...", "night night"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0, 1], atol=1e-6)
    assert vectors.dtype == np.float32 and embedder([]).shape == (0, embedder.n_dims)


def test_hashes_are_those_of_every_process():
    assert rag.HashedWords.hash("king lord") == 0x9D8FED8A  # crc32 as zlib and gzip have it
    assert rag.HashedWords.grams("The king's Lord, lord") == [
        *("the", "king's", "lord", "lord"),
        *("the king's", "king's lord", "lord lord"),
    ]


def test_means_of_hidden_states_are_those_of_each_text_alone(place):
    embedder = rag.HiddenStates(rag.Reader(config_of(place)))
    texts = ["king", "night sword heart", "a bird " * 40, "lord, lord"]
    model, tokenizer = embedder.reader.model, embedder.reader.tokenizer
    for text, mean in zip(texts, embedder.means(texts), strict=True):
        ids = torch.tensor([tokenizer.encode(text)[:192]])
        with torch.no_grad():
            expected = model.hidden_states(ids)[0].mean(dim=0)
        np.testing.assert_allclose(mean, expected.numpy(), atol=1e-5)
    embedder.fit(texts)
    assert abs((embedder.means(texts) - embedder.mean).mean(axis=0)).max() < 1e-5


# ---------------------------------------------- indices ----------------------------------------------


def clusters(n=2000, seed=0):
    """Vectors of length 1 around 40 centres."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(40, 32))
    return rag.normalised(centres[rng.integers(40, size=n)] + 0.3 * rng.normal(size=(n, 32)))


@pytest.mark.parametrize("kind", rag.INDICES)
def test_an_index_finds_what_comparing_with_all_finds(kind):
    vectors = clusters()
    asked = rag.normalised(vectors[:100] + 0.05 * np.random.default_rng(1).normal(size=(100, 32)))
    expected = (asked @ vectors.T).argsort(axis=1)[:, ::-1][:, :5]
    scores, found = rag.make_index(vectors, kind).search(asked, 5)
    share = np.mean([len({*a} & {*b}) / 5 for a, b in zip(found, expected, strict=True)])
    assert share == 1 if kind == "flat" else share > 0.95
    np.testing.assert_allclose(scores[0, 0], (asked[0] @ vectors[found[0, 0]]), atol=1e-5)


@pytest.mark.parametrize("kind", rag.INDICES)
def test_an_index_of_one_vector_and_one_that_grows(kind):
    vectors = clusters(60)
    index = rag.make_index(vectors[:1], kind)
    index.add(vectors[1:])
    scores, found = index.search(vectors[50:51], 1)
    assert found[0, 0] == 50 and scores[0, 0] == pytest.approx(1, abs=1e-5)


# ---------------------------------------------- the library ----------------------------------------------


def open_library(config):
    """A Library with hashed words."""
    return rag.Library(config, rag.HashedWords()).open(rag.read_texts(config))


def folder_of(config):
    """Where its index is."""
    return next(Path(config.out_dir).iterdir())


@pytest.mark.parametrize("kind", rag.INDICES)
def test_what_is_kept_finds_the_same_and_is_not_made_anew(kind, place, monkeypatch, capsys):
    config = config_of(place, index=kind)
    first = open_library(config).search("night sword heart", 3)
    monkeypatch.setattr(rag.Library, "add", None)  # would fail
    assert open_library(config).search("night sword heart", 3) == first
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["index.faiss", "embedder.npy"])
def test_a_damaged_file_is_never_given_to_faiss_and_made_anew(name, place, monkeypatch, capsys):
    config = config_of(place)
    first = open_library(config).search("night sword heart", 3)
    path = folder_of(config) / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
    with monkeypatch.context() as patch:
        patch.setattr(rag.faiss, "deserialize_index", None)  # would fail
        assert open_library(config).search("night sword heart", 3) == first
    assert f"made anew: {name} is damaged" in capsys.readouterr().err
    assert open_library(config).search("night sword heart", 3) == first and capsys.readouterr().err == ""


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 3}', "\0"])
def test_a_damaged_list_of_passages_is_made_anew(content, place, capsys):
    config = config_of(place)
    first = open_library(config).search("night sword heart", 3)
    (folder_of(config) / "library.json").write_text(content)
    assert open_library(config).search("night sword heart", 3) == first
    assert "made anew: it is damaged" in capsys.readouterr().err


def test_a_missing_file_of_an_index(place, capsys):
    config = config_of(place)
    first = open_library(config).search("night sword heart", 3)
    (folder_of(config) / "index.faiss").unlink()
    assert open_library(config).search("night sword heart", 3) == first
    assert "made anew" in capsys.readouterr().err


def test_a_changed_text_is_noticed(place, capsys):
    config = config_of(place)
    open_library(config)
    (place / "play.txt").write_text(
        "ROMEO:\nthe ship has a bell\n\nROMEO:\nwine and bread\n", encoding="utf-8"
    )
    library = open_library(config)
    assert "play.txt has changed since or is gone" in capsys.readouterr().err
    assert [p.text for p in library.passages] == ["the ship has a bell", "wine and bread"]
    assert library.search("wine and bread", 1)[0][1].text == "wine and bread"


def test_new_files_are_added_and_the_old_vectors_stay(place, monkeypatch, capsys):
    (place / "texts" / "deep").mkdir(parents=True)
    shutil.copy(place / "play.txt", place / "texts" / "a.txt")
    config = config_of(place, data=str(place / "texts"))
    before = open_library(config)
    old = before.index.reconstruct_n(0, len(before.passages))
    (place / "texts" / "deep" / "b.txt").write_text("A whale is no fish. It breathes air.", encoding="utf-8")
    monkeypatch.setattr(rag.HashedWords, "fit", None)  # would fail
    after = open_library(config)
    np.testing.assert_array_equal(after.index.reconstruct_n(0, len(before.passages)), old)
    score, passage = after.search("a whale is no fish", 1)[0]
    assert passage.place == "deep/b.txt:1" and score > 0.4
    assert len(open_library(config).passages) == len(before.passages) + 1 and capsys.readouterr().err == ""


def test_a_file_that_is_gone_is_forgotten(place, capsys):
    (place / "texts").mkdir()
    for name in "ab":
        (place / "texts" / f"{name}.txt").write_text(f"This is file {name}.", encoding="utf-8")
    config = config_of(place, data=str(place / "texts"))
    assert len(open_library(config).passages) == 2
    (place / "texts" / "a.txt").unlink()
    assert [p.text for p in open_library(config).passages] == ["This is file b."]
    assert "a.txt has changed since or is gone" in capsys.readouterr().err


def test_indices_of_other_flags_lie_beside_each_other(place):
    for change in ({}, {"index": "hnsw"}, {"length": 60}):
        open_library(config_of(place, **change))
    assert len([*(place / "rag").iterdir()]) == 3
    assert len(open_library(config_of(place, length=60)).passages) > len(
        open_library(config_of(place)).passages
    )


def test_an_unwritable_folder_is_refused(place):
    (place / "file").write_text("x")
    refused(run_rag(place, "out_dir=file"), "cannot write the index to file", "--out_dir")


# ---------------------------------------------- answering ----------------------------------------------


def test_a_prompt_is_what_the_model_was_trained_on(place):
    reader = rag.Reader(config_of(place))
    passage = rag.Passage("king lord\ncrown night", "play.txt:1", "ROMEO")
    turns = v8.make_reading([("ROMEO", "king lord\ncrown night")], 0, random.Random(0))
    words = turns[1][1]
    assert words.startswith("Who says: ") and words.endswith("?")
    expected = v8.encode_prompt(turns[:-1], reader.tokenizer)
    assert reader.prompt(words, [passage]) == (expected, 1)
    assert reader.prompt(words[:-1], [passage]) == (expected, 1)  # the mark may be left out
    two = v8.make_reading([("ROMEO", "king lord\ncrown night")] * 2, 0, random.Random(0))
    assert reader.prompt(words, [passage] * 2) == (v8.encode_prompt(two[:-1], reader.tokenizer), 2)
    assert reader.prompt(words, []) == (v8.encode_prompt([("user", words)], reader.tokenizer), 0)


def test_passages_that_do_not_fit_are_left_out_from_the_end(place):
    reader = rag.Reader(config_of(place))
    passages = [rag.Passage(f"{word} " * 10, "p:1", "ROMEO") for word in ("king", "lord", "night", "heart")]
    ids, n = reader.prompt("Who says: king?", passages)
    assert 0 < n < 4 and len(ids) <= 192 - 32
    assert "king" in reader.tokenizer.decode(ids) and "heart" not in reader.tokenizer.decode(ids)
    with pytest.raises(SystemExit, match="the question has"):
        reader.prompt("king " * 100, passages)


@pytest.mark.parametrize("rung", [v8, v9])
def test_answers_are_the_rung_s_own(rung, place):
    model = save_model(place / rung.NAME, rung)
    reader = rag.Reader(config_of(place, model=str(place / rung.NAME)))
    prompts = [reader.prompt(question, [])[0] for question in ("Who?", "king lord", "a")]
    config = replace(model.config, greedy=True, max_new_tokens=32)
    end = reader.tokenizer.special_tokens["<|endoftext|>"]
    for prompt, answer in zip(prompts, reader.answer(prompts), strict=True):
        assert answer == rung.to_text(rung.generate(model.eval(), [prompt], config, end)[0], reader.tokenizer)


def test_no_other_code_is_imported_by_a_name_in_a_checkpoint(place):
    checkpoint = torch.load(place / "model" / "checkpoint.pt", weights_only=True)
    for version in ("v3_gpt", "antigravity", "../evil", 3):
        torch.save(checkpoint | {"version": version}, place / "model" / "checkpoint.pt")
        refused(run_rag(place), "no model that answers", "v8_lora or v9_rlhf")
    assert "antigravity" not in sys.modules


def test_rag_holds_no_model_code():
    text = (ROOT / "rag.py").read_text(encoding="utf-8")
    assert "nn.Module" not in text and "backward" not in text and "import v" not in text


# ------------------------------------------- the command line -------------------------------------------


def test_an_answer_with_its_passages(place):
    (place / "play.txt").write_text(
        "ROMEO:\nthe ship has a bell\n\nNURSE:\nwine and bread\n", encoding="utf-8"
    )
    process = run_rag(place, "show=2", question="Who says: wine and bread")
    assert process.returncode == 0, process.stderr
    assert "passages in play.txt: 2" in process.stdout
    first, second = re.findall(r"\[(-?\d\.\d\d)\] (play.txt:\d.*)", process.stdout)
    assert first[1] == "play.txt:5" and second[1] == "play.txt:2, not read" and float(first[0]) > 0.8
    assert (
        "<|context|>NURSE:\\nwine and bread<|user|>Who says: wine and bread?<|assistant|>" in process.stdout
    )
    assert "the answer: " in process.stdout
    assert run_rag(place, "show=2", question="Who says: wine and bread").stdout == process.stdout


def test_what_stands_between_speeches_is_kept():
    text = "A prologue.\n\nROMEO:\nking lord crown night\n\nA stanza.\n\nROMEO:\nbell tower bell\n\nThe end"
    found = rag.split_passages(text, "p", 150)
    assert [(p.name, p.text, p.place) for p in found] == [
        ("", "A prologue.", "p:1"),
        ("ROMEO", "king lord crown night", "p:4"),
        ("", "A stanza.", "p:6"),
        ("ROMEO", "bell tower bell", "p:9"),
        ("", "The end", "p:11"),
    ]


def test_line_ends_and_marks_of_windows(place):
    (place / "play.txt").write_bytes(
        b"\xef\xbb\xbfROMEO:\r\nwine and bread\r\nand more\r\n\r\nNURSE:\r\nbell\r\n"
    )
    library = open_library(config_of(place))
    assert [(p.name, p.text, p.place) for p in library.passages] == [
        ("ROMEO", "wine and bread\nand more", "play.txt:2"),
        ("NURSE", "bell", "play.txt:6"),
    ]


def test_files_of_one_name_in_two_folders_are_two(place):
    for folder in ("a", "b"):
        (place / "texts" / folder).mkdir(parents=True)
        (place / "texts" / folder / "x.txt").write_text(f"This is {folder} of two.", encoding="utf-8")
    library = open_library(config_of(place, data=str(place / "texts")))
    assert [p.place for p in library.passages] == ["a/x.txt:1", "b/x.txt:1"]


def test_an_index_inside_the_folder_is_not_indexed(place):
    (place / "texts").mkdir()
    (place / "texts" / "a.txt").write_text("A whale is no fish.", encoding="utf-8")
    config = config_of(place, data=str(place / "texts"), out_dir=str(place / "texts" / "index"))
    assert len(open_library(config).passages) == len(open_library(config).passages) == 1


def test_an_index_that_is_mostly_new_is_made_anew(place, capsys):
    (place / "texts").mkdir()
    config = config_of(place, data=str(place / "texts"))
    for i in range(4):
        (place / "texts" / f"{i}.txt").write_text(f"This is file {i}.", encoding="utf-8")
        library = open_library(config)
        assert len(library.passages) == i + 1
    told = capsys.readouterr().err
    assert told.count("most of it is new") == 1 and library.n_fitted == 3


def test_a_changed_embedder_does_not_meet_the_vectors_of_the_old_one(place):
    class Wider(rag.HashedWords):
        n_dims = 2048

    config = config_of(place)
    open_library(config)
    library = rag.Library(config, Wider()).open(rag.read_texts(config))
    assert library.index.d == 2048


def test_the_share_of_a_question_that_a_text_has_by_hand():
    embedder = rag.HashedWords()
    embedder.fit(["king lord", "king night", "bell tower", "ship"])
    one, two = math.log(5 / 1.5), math.log(5 / 2.5)  # the squared weights of what is in one text, in two
    whole = 2 * one + two + 2 * math.log(5 / 0.5)  # king, lord, zebra; king lord, lord zebra
    assert embedder.share("King lord zebra", "lord king") == pytest.approx(
        (one + two) / (whole - 0.0), rel=1e-5
    )
    assert embedder.share("king lord", "a King, lord") == pytest.approx(1)
    assert embedder.share("...", "king") == 0
    assert embedder.share("don\u2019t", "don't go") == pytest.approx(1)


@pytest.mark.parametrize("kind", rag.INDICES)
def test_nonsense_is_not_found_and_words_are(kind, place):
    text, rng = (ROOT / "input.txt").read_text(encoding="utf-8")[:200_000], random.Random(5)
    (place / "play.txt").write_text(text, encoding="utf-8")
    library, refused, right = open_library(config_of(place, index=kind)), 0, 0
    letters = "bcdfgaeiouxz"
    for i in range(100):
        words = ["".join(rng.choices(letters, k=7)) for _ in range(1 + i % 4)]
        refused += library.search("Who says: " + " ".join(words), 1)[0][0] < rag.HashedWords.threshold
        speech = rng.choice(library.passages).text.split()
        words = " ".join(speech[:5])
        score, passage = library.search(f"Who says: {words}", 1)[0]
        right += score > 0.999 and words in " ".join(passage.text.split())
    assert refused == 100 and right >= (100 if kind == "flat" else 85)


def test_ctrl_c_and_a_broken_training(place, monkeypatch):
    (place / "runs" / "v8_lora").mkdir(parents=True)
    (place / "runs" / "v8_lora" / "checkpoint.pt").write_bytes(b"half")
    calls = []
    monkeypatch.setattr(
        "subprocess.run", lambda command: calls.append(command) or types.SimpleNamespace(returncode=1)
    )
    refused(run_rag(place, "model=auto"), "v8_lora.py has failed")
    assert calls[0][2:] == ["--resume"]


def test_what_is_in_no_passage_is_not_answered(place):
    process = run_rag(place, question="Who says: zebras eat xylophones")
    assert process.returncode == 0 and "nothing found: the best passage scores" in process.stdout
    assert "the answer" not in process.stdout
    assert "the answer" in run_rag(place, "threshold=0", question="Who says: zebras eat xylophones").stdout


@pytest.mark.parametrize("question", ["", "  ", "?!", "\n"])
def test_an_empty_question_is_refused(question, place):
    refused(run_rag(place, question=question), "the question is empty")


BAD = {
    "data=nowhere": "there is no --data nowhere",
    "data=empty": "there is no text in --data empty",
    "data=blank.txt": "there is no text in --data blank.txt",
    "data=binary.bin": "--data binary.bin is no UTF-8 text",
    "data=zeros.bin": "--data zeros.bin is no UTF-8 text",
    "model=nowhere": "no model that answers in nowhere",
    "model=cut": "no model that answers in cut",
    "embedder=word2vec": "no --embedder word2vec",
    "embedder=sentence-transformers:": "no --embedder sentence-transformers:",
    "embedder=sentence-transformers:x": "pip install sentence-transformers",
    "index=lsh": "no --index lsh",
    "k=1000": "--k 1,000 is more than the passages in play.txt: 40",
    "data=": "there is no --data",
    "length=19": "--length 19 is impossible",
    "k=0": "--k 0 is impossible",
    "show=-1": "--show -1 is impossible",
    "threshold=2": "--threshold 2 is impossible",
    "threshold=x": "--threshold x is impossible",
    "model=zero": "no model that answers in zero",
    "k=x": "invalid int value",
    "device=abacus": "no --device abacus",
}


@pytest.mark.parametrize("flag", BAD)
def test_bad_input_is_refused_in_one_sentence(flag, place, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # not installed
    (place / "empty" / ".hidden").mkdir(parents=True)
    (place / "empty" / ".hidden" / "a.txt").write_text("king lord")
    (place / "blank.txt").write_text(" \n\n ")
    (place / "binary.bin").write_bytes(bytes(range(128, 256)) * 20)
    (place / "zeros.bin").write_bytes(b"text\0\0text")
    (place / "zero").mkdir()
    (place / "zero" / "checkpoint.pt").write_bytes(b"")
    (place / "cut").mkdir()
    raw = (place / "model" / "checkpoint.pt").read_bytes()
    (place / "cut" / "checkpoint.pt").write_bytes(raw[: len(raw) // 2])
    refused(run_rag(place, flag), BAD[flag])


def test_binary_files_in_a_folder_are_left_out_with_a_note(place):
    (place / "texts").mkdir()
    (place / "texts" / "picture.png").write_bytes(bytes(range(128, 256)))
    (place / "texts" / "a.txt").write_text("A whale is no fish.", encoding="utf-8")
    process = run_rag(place, "data=texts", "show=1", question="a whale is no fish")
    assert (
        process.returncode == 0
        and "left out, as they are no UTF-8 text: 1, picture.png first" in process.stderr
    )
    assert "a.txt:1" in process.stdout


def test_other_embedders_take_part(place, monkeypatch):
    process = run_rag(place, "embedder=lm", "threshold=-0.5")
    assert process.returncode == 0 and "the answer: " in process.stdout, process.stderr

    class Model:
        def __init__(self, name):
            assert name == "some/model"

        def get_sentence_embedding_dimension(self):
            return 3

        def encode(self, texts, show_progress_bar):
            return np.array([[len(text), text.count("k"), 1] for text in texts], np.float64)

    monkeypatch.setitem(
        sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Model)
    )
    process = run_rag(place, "embedder=sentence-transformers:some/model", "threshold=0")
    assert process.returncode == 0 and "the answer: " in process.stdout, process.stderr


def test_without_a_model_v8_is_run_first(place, monkeypatch):
    calls = []

    def train(command):
        calls.append(command)
        save_model(place / "runs" / "v8_lora")
        (place / "runs" / "v8_lora" / "metrics.json").write_text("{}")
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr("subprocess.run", train)
    process = run_rag(place, "model=auto")
    assert process.returncode == 0 and "runs v8_lora.py first" in process.stdout, process.stderr
    assert [Path(call[1]).name for call in calls] == ["v8_lora.py"]
    run_rag(place, "model=auto")
    assert len(calls) == 1
    assert json.loads(
        (folder_of(config_of(place, out_dir=str(place / "runs" / "rag"))) / "library.json").read_text()
    )
