"""v5 against transformers, its data of all kinds, and what it does to save memory."""

import gzip
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import export
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, command, run_here, tiny_config, tiny_flags
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

import bpe_tokenizer
import v5_gpt2 as v5
from bpe_tokenizer import BPETokenizer, TokenizerError

TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")
V = 300


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(TEXT[:20_000], V, v5.SPECIAL_TOKENS)


def published(kind, **sizes):
    """A model of transformers with random weights large enough that every part of it matters."""
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = dict(vocab_size=V, n_embd=48, n_head=4, n_layer=3, n_positions=32) | sizes
        config = GPT2Config(**sizes)
        model = GPT2LMHeadModel(config)
    else:
        sizes = {"vocab_size": V, "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3} | sizes
        config = GPTNeoXConfig(
            **sizes,
            intermediate_size=4 * sizes["hidden_size"],
            max_position_embeddings=32,
            hidden_act="gelu_new",
            use_parallel_residual=False,
            rope_parameters={"partial_rotary_factor": 1.0, "rope_theta": 10000.0, "rope_type": "default"},
            tie_word_embeddings=True,
        )
        model = GPTNeoXForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += (0.02 if sizes["vocab_size"] > V else 0.1) * torch.randn_like(parameter)
    return model.eval()


def write_tokenizer(tokenizer, folder, names=("vocab.json", "merges.txt")):
    ids = {name: i for i, name in enumerate(tokenizer.names)}
    (folder / names[0]).write_text(json.dumps(ids), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *tokenizer.to_dict()["merges"], ""])
    (folder / names[1]).write_text(merges, encoding="utf-8")


def load(folder, **flags):
    """Our model, as main makes it from --init_from, and its Config."""
    config = v5.new_config("train", {"init_from": str(folder)} | flags)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    model = v5.LanguageModel(config, vocab_size)
    v5.load_published(model, config)
    return model.eval(), config


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_weights_of_transformers_give_the_same_logits_and_text(kind, tmp_path):
    theirs = published(kind)
    theirs.save_pretrained(tmp_path)
    ours, config = load(tmp_path)
    assert config.position == ("learned" if kind == "gpt2" else "rope")
    idx = torch.randint(V, (3, 32))
    with torch.inference_mode():
        expected = theirs(idx).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(ours(idx), expected, atol=1e-5, rtol=1e-5)
    text = theirs.generate(
        idx[:1, :8], max_new_tokens=24, do_sample=False, eos_token_id=V + 1, pad_token_id=0
    )
    assert torch.equal(v5.generate(ours, idx[:1, :8], replace(config, max_new_tokens=24, greedy=True)), text)


def test_gpt2_of_124_million_parameters(tmp_path):
    theirs = published("gpt2", vocab_size=50257, n_embd=768, n_head=12, n_layer=12, n_positions=1024)
    theirs.save_pretrained(tmp_path)
    ours, config = load(tmp_path)
    assert sum(p.numel() for p in ours.parameters()) == 124_439_808
    for name, value in v5.PRESETS["gpt2"].items():
        if name in ("n_embd", "n_head", "n_layer", "block_size", "position"):
            assert getattr(config, name) == value
    idx = torch.randint(50257, (1, 100))
    with torch.inference_mode():
        expected = theirs(idx).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(ours(idx), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("preset", "params"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_the_published_sizes(preset, params):
    config = v5.new_config("train", {"preset": preset})
    with torch.device("meta"):
        model = v5.LanguageModel(config, config.vocab_size)
    assert sum(p.numel() for p in model.parameters()) == params


def test_flags_override_a_preset():
    config = v5.new_config("train", {"preset": "gpt2", "n_layer": 2})
    assert config.n_layer == 2 and config.n_embd == 768 and config.position == "learned"


def test_names_of_the_published_files_and_of_later_ones(tmp_path):
    """Without `transformer.`, with the masks' buffers and the tied head, pickled or not: the same model."""
    theirs = published("gpt2")
    theirs.save_pretrained(tmp_path)
    expected, _ = load(tmp_path)
    weights = {name.removeprefix("transformer."): w for name, w in theirs.state_dict().items()}
    assert "wte.weight" in weights and "lm_head.weight" in weights
    for i in range(3):
        weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool)
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file({name: w.clone() for name, w in weights.items()}, tmp_path / "model.safetensors")
    for _ in range(2):
        ours, _ = load(tmp_path)
        for name, weight in expected.state_dict().items():
            assert torch.equal(ours.state_dict()[name], weight), name
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        torch.save(weights, tmp_path / "pytorch_model.bin")


def spoiled(weights, what):
    if what == "missing":
        del weights["transformer.h.1.ln_2.bias"]
        return "blocks.1.norm2.bias"
    if what == "unknown":
        weights["transformer.h.0.gate.weight"] = torch.zeros(2)
        return "h.0.gate.weight"
    if what == "shape":
        weights["transformer.h.2.mlp.c_fc.weight"] = torch.zeros(48, 96)
        return "blocks.2.mlp.0.weight"
    weights["lm_head.weight"] = torch.zeros(V, 48)  # a head that is not the embedding
    return "lm_head.weight"


@pytest.mark.parametrize("what", ["missing", "unknown", "shape", "head"])
def test_weights_that_do_not_fit_are_named(what, tmp_path):
    published("gpt2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = spoiled(weights, what)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match=rf"^error: .*{name}"):
        load(tmp_path)


def test_models_of_another_kind_are_refused(tmp_path):
    published("gpt2").save_pretrained(tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    for change, word in (
        ({"model_type": "llama"}, "config.json"),
        ({"activation_function": "relu"}, "something else: activation_function"),
        ({"layer_norm_epsilon": 1e-3}, "something else: layer_norm_epsilon"),
        ({"scale_attn_by_inverse_layer_idx": True}, "something else: scale_attn_by_inverse_layer_idx"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(good | change))
        with pytest.raises(SystemExit, match=re.escape(word)):
            load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SystemExit, match=r"config\.json"):
        load(tmp_path)
    with pytest.raises(SystemExit, match="nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(good))
    with pytest.raises(SystemExit, match="--n_layer"):
        load(tmp_path, n_layer=7)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(SystemExit, match="do not fit"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SystemExit, match="do not fit"):
        load(tmp_path)


def test_other_kinds_of_rope_are_refused(tmp_path):
    """Also as older files of GPT-NeoX say it: one that turns a quarter of a head, one of another base."""
    published("gpt_neox").save_pretrained(tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    rope = good.pop("rope_parameters")
    old = good | {"rotary_pct": 1.0, "rotary_emb_base": 10000}
    for config in (good | {"rope_parameters": rope}, old):
        (tmp_path / "config.json").write_text(json.dumps(config))
        load(tmp_path)
    for config, word in (
        (good | {"rope_parameters": rope | {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        (good | {"rope_parameters": rope | {"rope_theta": 500000.0}}, "rope_theta"),
        (good | {"rope_parameters": rope | {"rope_type": "linear", "factor": 4.0}}, "rope_type"),
        (old | {"rotary_pct": 0.25}, "partial_rotary_factor"),
        (old | {"rotary_emb_base": 500000}, "rotary_emb_base"),
        (old | {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling"),
        (old | {"use_parallel_residual": True}, "use_parallel_residual"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(SystemExit, match=f"something else: {word}"):
            load(tmp_path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def test_pickled_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published("gpt2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"wte.weight": Evil()}))
    with pytest.raises(SystemExit, match="do not fit"):
        load(tmp_path)
    assert not (tmp_path / "was_run").exists()


def test_init_from_on_the_command_line(tmp_path, tokenizer):
    model = tmp_path / "model"
    model.mkdir()
    published("gpt2").save_pretrained(model)
    write_tokenizer(tokenizer, model, ("encoder.json", "vocab.bpe"))
    (tmp_path / "input.txt").write_text(TEXT[:6000], encoding="utf-8")

    def run(*flags):
        return run_here("v5_gpt2", "--init_from=model", *flags, cwd=tmp_path)

    sampled = run("--sample", "--greedy", "--max_new_tokens=5", "--prompt=First")
    assert sampled.returncode == 0 and sampled.stdout.startswith("First"), sampled.stderr
    evaluated = run("--evaluate", "--data=input.txt")
    assert evaluated.returncode == 0 and "val_loss" in evaluated.stdout, evaluated.stderr
    assert not (tmp_path / "runs" / "v5_gpt2").exists()
    for flags, word in (
        (["--sample", "--max_steps=3"], "--max_steps"),
        (["--sample", "--data=input.txt"], "--data"),
        (["--evaluate", "--learning_rate=3"], "--learning_rate"),
        (["--n_embd=64"], "--n_embd"),
        (["--init_std=0.5"], "--init_std"),
        (["--preset=gpt2"], "--preset"),
        (["--tokenizer=char"], "do not fit"),
    ):
        refused = run(*flags)
        assert refused.returncode and refused.stderr.startswith("error: ") and word in refused.stderr
    trained = run("--max_steps=3", "--grad_accum=1", "--block_size=16", "--max_new_tokens=5")
    assert trained.returncode == 0, trained.stderr
    saved = torch.load(tmp_path / "runs/v5_gpt2/checkpoint.pt", weights_only=True)
    assert saved["config"]["vocab_size"] == V and len(saved["model"]["position_embedding.weight"]) == 16
    assert run_here("v5_gpt2", "--sample", "--max_new_tokens=5", cwd=tmp_path).returncode == 0
    assert run_here("v5_gpt2", "--resume", "--max_steps=5", cwd=tmp_path).returncode == 0
    (model / "vocab.bpe").write_text("#version: 0.2\nq z\n", encoding="utf-8")
    assert "vocab.bpe" in run("--sample").stderr


# ---------------------------------------------- weights out ----------------------------------------------


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_export_gives_transformers_the_same_model_and_ids(position, kind, tmp_path, monkeypatch, tokenizer):
    (tmp_path / "input.txt").write_text(TEXT[:6000], encoding="utf-8")
    flags = tiny_flags(v5, position=position, tokenizer=kind, vocab_size=V, init_std=0.2)
    flags = [flag for flag in flags if kind == "bpe" or "vocab_size" not in flag]
    assert run_here("v5_gpt2", *flags, cwd=tmp_path).returncode == 0
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path / "runs/v5_gpt2"), str(tmp_path / "out")])
    export.main()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == ("GPT2LMHeadModel" if position == "learned" else "GPTNeoXForCausalLM")
    saved = torch.load(tmp_path / "runs/v5_gpt2/checkpoint.pt", weights_only=True)
    config, ours_tokenizer = v5.Config(**saved["config"]), v5.make_tokenizer(saved["vocab"])
    ours = v5.LanguageModel(config, len(ours_tokenizer.vocab)).eval()
    ours.load_state_dict(saved["model"])
    idx = torch.randint(len(ours_tokenizer.vocab), (4, config.block_size))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(idx).logits, ours(idx), atol=1e-5, rtol=1e-5)
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = TEXT[:5000]
    assert their_tokenizer.encode(text) == ours_tokenizer.encode(text)
    assert their_tokenizer.decode(ours_tokenizer.encode(text)) == text
    prompt = ours_tokenizer.encode("First")[:3]
    config = replace(config, max_new_tokens=5, greedy=True)
    quiet = dict(do_sample=False, eos_token_id=10**6, pad_token_id=0)
    greedy = theirs.generate(torch.tensor([prompt]), max_new_tokens=5, **quiet)
    assert torch.equal(greedy, v5.generate(ours, torch.tensor([prompt]), config))
    if kind == "bpe":
        assert their_tokenizer.eos_token_id == ours_tokenizer.special_tokens["<|endoftext|>"]
        back, _ = load(tmp_path / "out")  # and back again
        for name, weight in ours.state_dict().items():
            assert torch.equal(back.state_dict()[name], weight), name
        vocab = v5.new_vocab(v5.Config(tokenizer=str(tmp_path / "out")))
        assert vocab == saved["vocab"]
    with pytest.raises(SystemExit, match="not empty"):
        export.main()


def test_export_refuses_what_is_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path / "no"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="no checkpoint"):
        export.main()
    torch.save({"version": "v3_gpt", "config": {}, "vocab": "", "model": {}}, tmp_path / "checkpoint.pt")
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="v3_gpt"):
        export.main()
    assert not (tmp_path / "out").exists()


# ------------------------------------------------ memory ------------------------------------------------


def gradients(config, V=65, seed=0):
    torch.manual_seed(seed)
    model = v5.LanguageModel(config, V)
    ids = torch.randint(V, (1000,))
    torch.manual_seed(1)
    total = 0.0
    for _ in range(config.grad_accum):
        x, y = v5.get_batch(ids, config)
        loss = model.loss(x, y) / (config.grad_accum * y.numel())
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters()}


def test_accumulated_gradients_are_those_of_the_large_batch(monkeypatch, tmp_path):
    whole = gradients(tiny_config(v5, batch_size=8, dropout=0.0))
    parts = gradients(tiny_config(v5, batch_size=2, grad_accum=4, dropout=0.0))
    assert whole[0] == pytest.approx(parts[0], rel=1e-6)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(parts[1][name], gradient, rtol=1e-5, atol=1e-7)
    # and in training: what it clips is the gradient of the whole batch
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text(TEXT[:6000], encoding="utf-8")
    clip, norms = torch.nn.utils.clip_grad_norm_, {}
    for batch, accum in ((8, 1), (2, 4)):
        norms[accum] = []
        monkeypatch.setattr(
            v5.nn.utils,
            "clip_grad_norm_",
            lambda *args, n=norms[accum]: n.append(clip(*args).item()) or n[-1],
        )
        flags = tiny_flags(v5, batch_size=batch, grad_accum=accum, dropout=0.0, out_dir=f"runs/{accum}")
        monkeypatch.setattr(sys, "argv", ["v5_gpt2.py", *flags])
        v5.main()
        metrics = json.loads(Path(f"runs/{accum}/metrics.json").read_text())
        assert metrics["tokens"] == 12 * 8 * 8
    assert len(norms[1]) == 12 and norms[4] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_gradient_by_a_bit(position, dropout):
    config = tiny_config(v5, position=position, dropout=dropout, batch_size=300)  # three pieces of the loss
    plain = gradients(config)
    again = gradients(replace(config, gradient_checkpointing=True))
    assert plain[0] == again[0]
    for name, gradient in plain[1].items():
        assert torch.equal(again[1][name], gradient), name


def test_checkpointing_keeps_less(monkeypatch):
    """Bytes that autograd keeps for the backward pass, the parameters apart."""

    def kept(checkpointing):
        config = tiny_config(v5, n_layer=4, batch_size=64, gradient_checkpointing=checkpointing)
        model, seen = v5.LanguageModel(config, 65), {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(x):
            if x.untyped_storage().data_ptr() not in own:
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        x, y = v5.get_batch(torch.randint(65, (1000,)), config)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model.loss(x, y)
        loss.backward()
        return sum(seen.values())

    assert kept(True) < 0.4 * kept(False)


def test_head_and_embedding_are_one_tensor():
    model = v5.LanguageModel(tiny_config(v5), 65)
    names = [name for name, p in model.named_parameters() if 65 in p.shape]
    assert names == ["token_embedding.weight"]
    idx = torch.randint(65, (2, 8))
    x = model.hidden_states(idx)
    torch.testing.assert_close(model(idx), x @ model.token_embedding.weight.T)


def test_loss_is_that_of_the_logits():
    config = tiny_config(v5, dropout=0.0, batch_size=200)
    torch.manual_seed(0)
    model = v5.LanguageModel(config, 65)
    x, y = torch.randint(65, (2, 200, 8))
    y[3, 5:] = -100
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
    assert model.loss(x, y).item() == pytest.approx(expected.item(), rel=1e-5)


def test_peak_memory_is_in_bytes():
    code = "import torch, v5_gpt2 as v5; d = torch.device('cpu'); a = v5.peak_memory(d);"
    code += "x = torch.ones(400 * 2**20, dtype=torch.uint8); print(v5.peak_memory(d) - a)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert 350 * 2**20 < int(done.stdout) < 500 * 2**20


def test_report_counts_operations_and_characters(tmp_path):
    """As PyTorch counts them, but that attention's masked half and its recomputation are told apart."""
    (tmp_path / "input.txt").write_text(TEXT[:6000], encoding="utf-8")
    assert run_here("v5_gpt2", *tiny_flags(v5, tokenizer="bpe", vocab_size=V), cwd=tmp_path).returncode == 0
    metrics = json.loads((tmp_path / "runs/v5_gpt2/metrics.json").read_text())
    per_token = metrics["flops_per_second"] / metrics["tokens_per_second"]
    config = v5.Config(**metrics["config"])
    model = v5.LanguageModel(config, V)
    x, y = v5.get_batch(torch.randint(V, (1000,)), config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(x, y).backward()
    assert per_token == pytest.approx(counter.get_total_flops() / x.numel(), rel=1e-6)
    assert 0 < metrics["share_of_matmul"] < 1 and metrics["peak_memory"] > 10**8
    saved = torch.load(tmp_path / "runs/v5_gpt2/checkpoint.pt", weights_only=True)
    tokenizer, text = v5.make_tokenizer(saved["vocab"]), TEXT[5400:6000]
    ids = tokenizer.encode(text)
    n_chars = len(text) - len(tokenizer.decode(ids[:1]))
    expected = metrics["val_loss"] * (len(ids) - 1) / n_chars / math.log(2)
    assert metrics["bits_per_char"] == pytest.approx(expected)


# ------------------------------------------------- data -------------------------------------------------


def splits_of(config, vocab):
    return [ids.long().tolist() for ids in v5.load_splits(config, vocab)]


def small(**flags):
    return tiny_config(v5, tokenizer="bpe", vocab_size=V, **flags)


def test_shards_of_a_single_text_are_the_text(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT[:50_000], encoding="utf-8")
    train, val = splits_of(small(data="a.txt"), tokenizer.to_dict())
    assert train == tokenizer.encode(TEXT[:45_000]) and val == tokenizer.encode(TEXT[45_000:50_000])
    (folder,) = Path("runs/tokens").iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    splits_of(small(data="a.txt"), tokenizer.to_dict())
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}  # not encoded again
    other = BPETokenizer.train(TEXT[:20_000], V - 1, v5.SPECIAL_TOKENS)
    splits_of(small(data="a.txt"), other.to_dict())
    assert len(list(Path("runs/tokens").iterdir())) == 2  # another vocabulary, other files
    Path("a.txt").write_text(TEXT[100:50_100], encoding="utf-8")
    assert splits_of(small(data="a.txt"), tokenizer.to_dict())[0] == tokenizer.encode(TEXT[100:45_100])


@pytest.mark.parametrize("seed", range(20))
def test_pieces_do_not_change_the_ids(seed, tmp_path, monkeypatch, tokenizer):
    """Any cut of the reader is one that the split into words has too, whatever the text."""
    rng = random.Random(seed)
    parts = ["word", "it's", "  ", " ", "\n", "\n\n", "\t", "1", "é", "中", "\u3000", "!", "\r"]
    text = "".join(rng.choice(parts) for _ in range(400))
    monkeypatch.setattr(bpe_tokenizer, "PIECE", rng.choice([1, 2, 7, 50]))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    text = (tmp_path / "a.txt").read_text(encoding="utf-8")
    pieces = list(bpe_tokenizer.read_text(tmp_path / "a.txt"))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


DOCUMENTS = [f"Document {i}: {TEXT[200 * i : 200 * i + 200]}" for i in range(250)]


def write_documents(kind, folder):
    folder.mkdir()
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(DOCUMENTS))
    if kind == "txt":
        for i, text in enumerate(DOCUMENTS):
            (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    elif kind == "jsonl":
        (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    elif kind == "jsonl.gz":
        with gzip.open(folder / "a.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write(lines)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": DOCUMENTS}), folder / "a.parquet")
    return folder


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet", "hf"])
@pytest.mark.parametrize("piece", [3000, 2**21])  # in several processes, in this one
def test_every_kind_of_data_gives_the_same_documents(kind, piece, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bpe_tokenizer, "PIECE", piece)
    if kind == "hf":
        pytest.importorskip("datasets")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        data = f"hf:{write_documents('jsonl', tmp_path / 'data')}"
    else:
        data = str(write_documents(kind, tmp_path / "data"))
    train, val = splits_of(small(data=data), tokenizer.to_dict())
    end = [tokenizer.special_tokens["<|endoftext|>"]]
    expected = {"train": [], "val": []}
    for i, text in enumerate(DOCUMENTS):
        expected["val" if i in (1, 101, 201) else "train"] += end + tokenizer.encode(text)
    assert train == expected["train"] and val == expected["val"]


def test_documents_of_characters_have_no_mark_between_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = str(write_documents("txt", tmp_path / "data"))
    config = tiny_config(v5, tokenizer="char", data=data)
    vocab = v5.new_vocab(config)
    assert vocab == "".join(sorted(set("".join(DOCUMENTS))))
    _, val = splits_of(config, vocab)
    assert v5.make_tokenizer(vocab).decode(val) == DOCUMENTS[1] + DOCUMENTS[101] + DOCUMENTS[201]


def test_vocabulary_is_learned_from_the_training_split_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bpe_tokenizer, "PIECE", 1000)
    seen, learn = [], BPETokenizer.train
    monkeypatch.setattr(
        BPETokenizer,
        "train",
        lambda text, *args, **options: seen.append(text) or learn(text, *args, **options),
    )
    Path("a.txt").write_text(TEXT[:30_000], encoding="utf-8")
    v5.new_vocab(small(data="a.txt"))
    v5.new_vocab(small(data=str(write_documents("jsonl", tmp_path / "data"))))
    monkeypatch.setattr(v5, "VOCAB_TEXT", 5000)
    v5.new_vocab(small(data="a.txt"))
    train = "".join(text for i, text in enumerate(DOCUMENTS) if i not in (1, 101, 201))
    assert seen == [TEXT[:27_000], train, TEXT[:5000]]


BROKEN = ("jsonl", "truncated gzip", "corrupt gzip", "empty folder", "no text column", "latin1")
BROKEN += ("no parquet", "missing", "a number", "no file of ours")


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_data_is_refused_in_one_sentence(kind, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    word = "data is no file and no folder"
    if kind == "jsonl":
        (folder / "a.jsonl").write_text('{"text": "good"}\n\n{"text": \n', encoding="utf-8")
        word = f"line 3 of data{os.sep}a.jsonl"
    elif kind == "a number":
        (folder / "a.jsonl").write_text('{"text": "good"}\n{"text": 5}\n', encoding="utf-8")
        word = "document 2 in data"
    elif kind == "no file of ours":
        (folder / "a.doc").write_text("text", encoding="utf-8")
    elif kind.endswith("gzip"):
        content = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode())
        middle = len(content) // 2
        broken = content[:middle] if kind[0] == "t" else content[:middle] + bytes(50) + content[middle + 50 :]
        (folder / "a.jsonl.gz").write_bytes(broken)
        word = "a.jsonl.gz"
    elif kind == "no text column":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"words": ["a", "b"]}), folder / "a.parquet")
        word = "a.parquet"
    elif kind == "no parquet":
        pytest.importorskip("pyarrow")
        word = "a.parquet"
        (folder / "a.parquet").write_bytes(b"no parquet at all")
    elif kind == "latin1":
        (folder / "a.txt").write_bytes("café".encode("latin-1"))
        (folder / "b.txt").write_text("tea", encoding="utf-8")
        word = "a.txt"
    elif kind == "missing":
        folder.rmdir()
    Path("bpe.json").write_text(json.dumps(tokenizer.to_dict()), encoding="utf-8")
    for tokens in ("char", "bpe.json"):
        process = run_here("v5_gpt2", "--data=data", f"--tokenizer={tokens}", cwd=tmp_path)
        assert process.returncode and word in process.stderr, process.stderr
        lines = [line for line in process.stderr.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
        assert not Path("runs/v5_gpt2").exists() and not list(tmp_path.glob("runs/tokens/*[0-9a-f]"))


def test_more_ids_than_16_bits_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "".join(map(chr, [*range(0x20, 0xD800), *range(0x10000, 0x14000)]))
    Path("a.txt").write_text(text, encoding="utf-8")
    with pytest.raises((TokenizerError, SystemExit), match="65536"):
        config = tiny_config(v5, tokenizer="char", data="a.txt")
        v5.load_splits(config, v5.new_vocab(config))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("sign", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_killed_during_encoding_it_begins_again(sign, tmp_path, tokenizer):
    text = TEXT * 16
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    tokenizer.save(tmp_path / "bpe.json")
    flags = tiny_flags(v5, data="a.txt", tokenizer="bpe.json")
    process = subprocess.Popen(command("v5_gpt2", *flags), cwd=tmp_path, stderr=subprocess.DEVNULL)
    tokens = tmp_path / "runs" / "tokens"
    while not list(tokens.glob("*.tmp/train.bin")) or not next(tokens.glob("*.tmp/train.bin")).stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    process.send_signal(getattr(signal, sign))
    process.wait(timeout=30)
    until = time.time() + 30
    while [worker for worker in workers if Path(f"/proc/{worker}/cmdline").exists()]:
        assert time.time() < until, "its workers live on"
        time.sleep(0.1)
    assert not [path for path in tokens.iterdir() if path.suffix != ".tmp"]
    done = subprocess.run(command("v5_gpt2", *flags), cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    (folder,) = tokens.iterdir()
    ids = np.fromfile(folder / "train.bin", dtype=np.uint16)
    text = text[: int(0.9 * len(text))]
    assert text.endswith(tokenizer.decode(ids[-1000:].tolist()))
    assert len(ids) == len(tokenizer.encode(text))


def test_two_processes_that_encode_the_same_do_not_harm_each_other(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(TEXT * 8, encoding="utf-8")
    tokenizer.save(tmp_path / "bpe.json")
    both = [
        subprocess.Popen(
            command("v5_gpt2", *tiny_flags(v5, data="a.txt", tokenizer="bpe.json", out_dir=f"runs/{i}")),
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for i in range(2)
    ]
    for process in both:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    (folder,) = (tmp_path / "runs" / "tokens").iterdir()
    ids = np.fromfile(folder / "train.bin", dtype=np.uint16).tolist()
    assert ids == tokenizer.encode((TEXT * 8)[: int(0.9 * 8 * len(TEXT))])


def test_text_without_spaces_is_read_in_pieces_too(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a" * (2**24 + 2**22), encoding="utf-8")
    first = next(bpe_tokenizer.read_text(tmp_path / "a.txt"))
    assert len(first) <= 2**24 + bpe_tokenizer.PIECE


def test_processes_are_spawned_where_they_must_be(tmp_path, tokenizer):
    """As on Windows and macOS: the script is imported anew in each process, and must not train there."""
    (tmp_path / "a.txt").write_text(TEXT * 3, encoding="utf-8")
    tokenizer.save(tmp_path / "bpe.json")
    code = (ROOT / "v5_gpt2.py").read_text(encoding="utf-8")
    start = 'if __name__ == "__main__":\n    if hasattr'
    assert code.count(start) == 1
    spawn = '    import multiprocessing\n    multiprocessing.set_start_method("spawn")\n'
    script = tmp_path / "v5_gpt2.py"
    script.write_text(code.replace(start, start.replace("    if", spawn + "    if")), encoding="utf-8")
    shutil.copy(ROOT / "bpe_tokenizer.py", tmp_path)
    args = [sys.executable, str(script), *tiny_flags(v5, data="a.txt", tokenizer="bpe.json")]
    done = subprocess.run(args, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "tokens").iterdir()
    ids = np.fromfile(folder / "val.bin", dtype=np.uint16)
    assert ids.tolist() == tokenizer.encode((TEXT * 3)[int(0.9 * 3 * len(TEXT)) :])


@pytest.mark.parametrize("size", [100, 100_000])
def test_vocabularies_that_cannot_be_are_refused(size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT[:5000], encoding="utf-8")
    with pytest.raises(SystemExit, match=f"--vocab_size {size}"):
        v5.new_vocab(replace(small(), data="a.txt", vocab_size=size))


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes, and a limit of memory to hit")
def test_ids_larger_than_the_memory_are_mapped(tmp_path, monkeypatch):
    """600 GB of zeros that take no place on the disk: no more is read than a batch touches."""
    monkeypatch.setattr(v5, "encode_data", lambda *_: tmp_path)
    for name in ("train.bin", "val.bin"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(600 * 10**9)
    train_ids, _ = v5.load_splits(small(), None)
    assert len(train_ids) == 300 * 10**9
    x, y = v5.get_batch(train_ids, small())
    assert x.shape == y.shape and not x.any()
