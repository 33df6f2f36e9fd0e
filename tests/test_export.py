"""GGUF files, read back by the package gguf and by llama.cpp; model cards; what tools/export.py refuses.

The tests with llama.cpp run where it is installed (`pip install llama-cpp-python` compiles it, some minutes).
"""

import json
import re
import shutil
import sys
from dataclasses import replace

import cards
import export
import gguf
import numpy as np
import pytest
import regex
import torch
from common import load_results
from conftest import ROOT, run_here, tiny_flags
from test_ladder import DECIMALS, check_blocks, is_stored
from transformers import AutoTokenizer

import v5_gpt2 as v5
import v8_lora as v8

TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")
ODD = [
    "",
    " ",
    "  two spaces,\n\n\n three lines\t\ttabs \n",
    "I'll we've don't it's they're I'd I'm 'tis 'S I'LL",
    "über Œuvre naïve résumé ångström ﬁ ß İ",
    "Война и мир, 三體, ひらがな, 한국어, עברית, العربية, ไทย, हिन्दी",
    "🙂👩‍👩‍👧‍👦🇪🇺 \u200b\u00a0\ufeff\u2028",
    "1234567890 3.14 ½ ² Ⅷ ١٢٣ x1y2",
    "<|endoftext|> <|user|> plain text\x00\x01\x7f",
    "a_b-c--d...!?&%$ (((:;))) `'\" \\n",
]
NAMES = {"attention.qkv": "attn_qkv", "attention.proj": "attn_output", "mlp.0": "ffn_up", "mlp.2": "ffn_down"}
NAMES |= {"norm1": "attn_norm", "norm2": "ffn_norm"}
NAMES = {f"blocks.{i}.{ours}": f"blk.{i}.{theirs}" for i in range(2) for ours, theirs in NAMES.items()}
NAMES |= {"token_embedding": "token_embd", "position_embedding": "position_embd", "norm": "output_norm"}


def call(monkeypatch, *args):
    """Run tools/export.py in this process."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, args)])
    export.main()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with finished runs: learned and rope of v5, one of characters, a v8."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "input.txt").write_text(TEXT[:60_000], encoding="utf-8", newline="\n")
    for name, changes in {
        "learned": dict(position="learned", tokenizer="bpe", vocab_size=400),
        "rope": dict(position="rope", tokenizer="bpe", vocab_size=400),
        "chars": dict(position="rope", tokenizer="char"),
    }.items():
        changes |= dict(n_embd=64, block_size=128, init_std=0.2, out_dir=name)
        process = run_here("v5_gpt2", *tiny_flags(v5, **changes), cwd=folder)
        assert process.returncode == 0, process.stderr
    flags = tiny_flags(v8, base="rope", out_dir="chat", n_examples=200, renamed=0.5, eval_interval=6)
    known = {"base", "out_dir", "n_examples", "renamed", "eval_interval", "batch_size", "max_steps"}
    known |= {"warmup_steps", "max_new_tokens"}
    flags = [flag for flag in flags if flag[2:].split("=")[0] in known]
    process = run_here("v8_lora", *flags, cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder


def saved(run):
    """Config, tokenizer and weights that a run has saved."""
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    return checkpoint["config"], v8.make_tokenizer(checkpoint["vocab"]), checkpoint["model"]


def contents(path):
    """What the package gguf reads in a file: {key: value}, {name of a tensor: ReaderTensor}."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


# ---------------------------------------------- the file ----------------------------------------------


@pytest.mark.parametrize("name", ["learned", "rope", "chat"])
def test_a_gguf_file_has_every_weight_and_every_key(name, runs, tmp_path, monkeypatch):
    call(monkeypatch, runs / name, tmp_path / "new" / "model.gguf")
    fields, tensors = contents(tmp_path / "new" / "model.gguf")
    config, tokenizer, weights = saved(runs / name)
    expected = {}
    for ours, weight in weights.items():
        layer, _, part = ours.rpartition(".")
        expected[f"{NAMES[layer]}.{part}"] = weight
    if name != "learned":
        expected["output.weight"] = weights["token_embedding.weight"]
    assert tensors.keys() == expected.keys()
    for theirs, weight in expected.items():
        assert tensors[theirs].tensor_type == gguf.GGMLQuantizationType.F32
        assert list(tensors[theirs].shape) == list(weight.shape)[::-1]  # GGUF counts the innermost first
        np.testing.assert_array_equal(tensors[theirs].data, weight.numpy())

    arch = "gpt2" if name == "learned" else "gptneox"
    shape = {
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 256,
        "attention.head_count": 2,
    }
    if name != "learned":
        shape |= {"rope.dimension_count": 32, "rope.freq_base": 10_000.0, "use_parallel_residual": False}
    assert config["n_embd"] == 64 and config["n_head"] == 2 and config["block_size"] == 128
    end = tokenizer.special_tokens["<|endoftext|>"]
    keys = {f"{arch}.{key}": value for key, value in shape.items()} | {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
        "general.file_type": gguf.LlamaFileType.ALL_F32,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        f"{arch}.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokenizer.names,
        "tokenizer.ggml.token_type": [1] * (end) + [3] * (len(tokenizer.names) - end),
        "tokenizer.ggml.merges": tokenizer.to_dict()["merges"],
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
    }
    if name == "chat":
        keys["tokenizer.chat_template"] = export.CHAT_TEMPLATE
    found = {key: value for key, value in fields.items() if not key.startswith("GGUF.")}
    assert found == keys
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["model.gguf", "model.md"]


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("name", ["learned", "rope"])
def test_a_gguf_file_of_fewer_bytes(name, kind, runs, tmp_path, monkeypatch):
    call(monkeypatch, runs / name, tmp_path / "exact.gguf")
    call(monkeypatch, runs / name, tmp_path / "small.gguf", "--type", kind)
    fields, tensors = contents(tmp_path / "small.gguf")
    assert fields["general.file_type"] == gguf.LlamaFileType["MOSTLY_" + kind.upper()]
    for tensor_name, exact in contents(tmp_path / "exact.gguf")[1].items():
        small = tensors[tensor_name]
        values = gguf.quants.dequantize(small.data, small.tensor_type)
        if len(exact.shape) == 1 or tensor_name == "position_embd.weight":
            assert small.tensor_type == gguf.GGMLQuantizationType.F32
            np.testing.assert_array_equal(values, exact.data)
            continue
        assert small.tensor_type == gguf.GGMLQuantizationType[kind.upper()]
        if kind == "f16":
            np.testing.assert_array_equal(values, exact.data.astype(np.float16))
            continue
        # 32 numbers share a scale, kept in 16 bits: the largest of them is 127 steps
        groups = exact.data.reshape(-1, 32)
        largest = np.abs(groups).max(axis=1, keepdims=True)
        error = np.abs(values.reshape(-1, 32) - groups)
        assert (error <= largest / 127 * 0.5 + 127 * 2**-11 * largest / 127 + 1e-7).all()
        assert small.n_bytes == exact.data.size // 32 * 34


def test_the_pre_tokenizer_is_ours():
    """llama.cpp's gpt-2 is this expression; its `\\s+` at the end stands in its code."""
    ours = v8.BPETokenizer().to_dict()["pattern"]
    theirs = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for text in [*ODD, TEXT[:50_000]]:
        assert regex.findall(theirs, text) == regex.findall(ours, text)


# ------------------------------------------- conversations -------------------------------------------


def test_the_chat_template_writes_what_v8_reads(runs, tmp_path, monkeypatch):
    call(monkeypatch, runs / "chat", tmp_path / "out")
    _, ours, _ = saved(runs / "chat")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [
        ("context", "ROMEO:\nHo!"),
        ("user", "Who says: Ho!"),
        ("assistant", "ROMEO"),
        ("user", "Again?"),
    ]
    messages = [{"role": "system" if role == "context" else role, "content": text} for role, text in turns]
    written = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert written == v8.encode_prompt(turns, ours)
    assert theirs.apply_chat_template(messages[:3], return_dict=False) == v8.encode_chat(turns[:3], ours)[0]
    call(monkeypatch, runs / "rope", tmp_path / "base")
    assert AutoTokenizer.from_pretrained(tmp_path / "base").chat_template is None


# --------------------------------------------- llama.cpp ---------------------------------------------


def llama(path):
    """A model that llama.cpp has loaded from a file; its cache is float32, its GELU a table in float16."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python compiles llama.cpp")
    settings = {"n_ctx": 0, "type_k": 0, "type_v": 0, "n_threads": 1, "n_threads_batch": 1}
    return llama_cpp.Llama(str(path), verbose=False, logits_all=True, **settings)


@pytest.mark.parametrize("name", ["learned", "rope", "chat"])
def test_llama_cpp_reads_our_tokens_and_gives_our_logits(name, runs, tmp_path, monkeypatch):
    call(monkeypatch, runs / name, tmp_path / "model.gguf")
    theirs = llama(tmp_path / "model.gguf")
    config, tokenizer, weights = saved(runs / name)
    for text in [*ODD, TEXT[:20_000]]:
        ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(text)
        assert theirs.detokenize(ids).decode() == text
    names = ("n_embd", "n_head", "n_layer", "block_size", "position")
    config = v5.Config(**{key: config[key] for key in names})
    ours = v5.LanguageModel(config, len(tokenizer.vocab)).eval()
    ours.load_state_dict(weights)
    ids = tokenizer.encode(TEXT[-500:])[: config.block_size]
    theirs.eval(ids)
    with torch.inference_mode():
        logits = ours(torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(theirs.scores[: len(ids)], logits, atol=0.01 * np.abs(logits).max())
    config = replace(config, max_new_tokens=config.block_size - 4, greedy=True)
    expected = v5.generate(ours, torch.tensor([ids[:4]]), config)[0].tolist()
    theirs.reset()
    drawn = list(ids[:4])
    for new in theirs.generate(ids[:4], temp=0.0, repeat_penalty=1.0):
        drawn.append(new)
        if len(drawn) == len(expected):
            break
    assert drawn == expected


# ------------------------------------------- what is refused -------------------------------------------


@pytest.mark.parametrize(
    "args, word",
    [
        (["nothing", "out.gguf"], "no checkpoint in nothing"),
        (["rope", "taken.gguf"], "taken.gguf is there already"),
        (["rope", "described.gguf"], "described.md is there already"),
        (["chars", "out.gguf"], "has no merges"),
        (["narrow", "out.gguf", "--type", "q8_0"], "n_embd is 48"),
        (["quantized", "out.gguf"], "quantized"),
        (["rope", "out.gguf", "--type", "q9"], "invalid choice: 'q9'"),
        (["rope", "out", "--type", "f16"], "--type is for a GGUF file"),
        (["rope"], "name a run and what to write"),
        (["rope", "taken.gguf/model.gguf"], "cannot write to"),
    ],
)
def test_what_cannot_be_written_is_refused_in_a_sentence(args, word, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rope", "chars"):
        shutil.copytree(runs / name, name)
    checkpoint = torch.load(runs / "rope" / "checkpoint.pt", weights_only=True)
    (tmp_path / "narrow").mkdir()
    torch.save(checkpoint | {"config": checkpoint["config"] | {"n_embd": 48}}, "narrow/checkpoint.pt")
    (tmp_path / "quantized").mkdir()
    codes = {"blocks.0.mlp.0.codes": torch.zeros(1)}
    torch.save(checkpoint | {"version": "v7_quantize", "model": codes}, "quantized/checkpoint.pt")
    (tmp_path / "taken.gguf").write_text("mine")
    (tmp_path / "described.md").write_text("mine")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as refused:
        call(monkeypatch, *args)
    message = str(refused.value)
    assert message.startswith("error: ") and word in message and "\n" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "taken.gguf").read_text() == (tmp_path / "described.md").read_text() == "mine"


def test_without_the_package_it_says_which(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match="pip install gguf"):
        call(monkeypatch, runs / "rope", tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


# --------------------------------------------- model cards ---------------------------------------------


@pytest.mark.parametrize("kind", cards.CARDS)
def test_cards_are_made_from_the_results(kind):
    path = ROOT / "logs" / f"card_{kind}.md"
    check_blocks(path, cards.published_blocks(load_results())[kind])
    text = path.read_text(encoding="utf-8")
    head, rest = text.removeprefix("---\n").split("\n---\n", 1)
    for line in (
        "license: mit",
        "language: en",
        "library_name: transformers",
        "pipeline_tag: text-generation",
    ):
        assert line in head.splitlines()
    assert "datasets:\n- karpathy/tiny_shakespeare" in head and "tags:\n- " in head
    sections = ["What it is", "Data", "Training", "Evaluation", "Limits", "What not to do with it"]
    assert re.findall(r"^## (.+)$", rest, flags=re.M) == sections
    prose = re.sub(r"<!-- block: .*?<!-- end -->|`[^`]+`", "", rest, flags=re.DOTALL)
    assert all(is_stored(written, load_results()) for written in re.findall(DECIMALS, prose))


@pytest.mark.parametrize(
    "name, target, kind, told",
    [
        ("rope", "out", "base", "from another run of `v5_gpt2.py`"),
        ("rope", "model.gguf", "base", "from another run of `v5_gpt2.py`"),
        ("chat", "out", "finetuned", "from another run of `v8_lora.py`"),
        ("rope", "model.gguf --type q8_0", "quantized", "from another run of `v5_gpt2.py`"),
        ("chat", "model.gguf --type f16", "finetuned", "are rounded to f16"),
    ],
)
def test_an_exported_card_has_the_figures_of_its_own_run(
    name, target, kind, told, runs, tmp_path, monkeypatch
):
    target, *flags = target.split()
    call(monkeypatch, runs / name, tmp_path / target, *flags)
    is_file = target.endswith(".gguf")
    text = (tmp_path / "model.md" if is_file else tmp_path / "out/README.md").read_text(encoding="utf-8")
    original = (ROOT / "logs" / f"card_{kind}.md").read_text(encoding="utf-8")
    assert re.search(r"^# .+$", text, flags=re.M)[0] == re.search(r"^# .+$", original, flags=re.M)[0]
    assert f"library_name: {'gguf' if is_file else 'transformers'}\n" in text
    assert ("llama-server" in text) == is_file and told in text
    assert text.startswith("---\n") and "--n_embd 64" in text and "--out_dir" not in text
    metrics = json.loads((runs / name / "metrics.json").read_text(encoding="utf-8"))
    assert f"{metrics['bits_per_char']:.4f}" in text and f"{metrics['params']:,}" in text
    assert ("Answer as ROMEO" in text) == (name == "chat")


def test_the_card_of_the_published_run_has_nothing_to_add(tmp_path):
    metrics = {"bits_per_char": load_results()["rungs"]["v6_amp_ddp"]["bits_per_char"] + 2e-7}
    assert cards.note("v6_amp_ddp", metrics) == ""
    metrics |= {"bits_per_char": 3.0, "config": {"n_layer": 7, "n_head": 8, "out_dir": "x"}}
    assert "`--n_layer 7`" in cards.note("v6_amp_ddp", metrics)
    assert "another run of `v6_amp_ddp.py`" in cards.note("v6_amp_ddp", {})


def test_a_run_that_was_stopped_has_a_card_without_figures(runs, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint.pt").write_bytes((runs / "rope/checkpoint.pt").read_bytes())
    call(monkeypatch, tmp_path / "run", tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert text.count(cards.UNKNOWN) == 2


def test_a_card_of_v9_fills_itself():
    """Of what week 10 measures: what is in metrics.json and in its `before` has a row."""
    before = {"preferred": 0.4, "kl": 0.0, "score": -1.0, "truth": -0.5, "bits_per_char": 3.1, "length": 9}
    after = {"preferred": 0.6, "kl": 2.5, "score": 1.0, "truth": 0.75, "bits_per_char": 3.2, "params": 1000}
    shown = {"steps": 3, "tokens": 4000, "seconds": 5.0, "machine": "two abaci", "torch": "2"}
    blocks = cards.blocks("aligned", {**after, **shown, "before": before}, "chat")
    assert "| preferred to the other's reply | 40.0% | 60.0% |" in blocks["evaluation"]
    assert "| KL from the model before, nats a reply | 0.00 | 2.50 |" in blocks["evaluation"]
    assert "length" not in blocks["evaluation"] and "two abaci" in blocks["training"]
