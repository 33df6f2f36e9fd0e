"""v7: the cache, the engine, int8 and int4, and models that other rungs have trained."""

import importlib
import io
import json
import math
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import pairwise

import matplotlib.image
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, run_here, run_rung, tiny_config, tiny_flags

import v7_quantize as v7

V = 65
RUNG = "v7_quantize"


def make_model(seed=0, **changes):
    """A model of small settings with weights large enough that every part of it matters, and its Config."""
    torch.manual_seed(seed)
    config = tiny_config(v7, vocab_size=V, **changes)
    model = v7.LanguageModel(config, V)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval(), config


# ---------------------------------------------- the cache ----------------------------------------------


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("B", [1, 3, 8])
@pytest.mark.parametrize("pieces", [[8], [1] * 8, [3, 1, 4], [7, 1]])
def test_cached_logits_are_those_of_one_pass(position, B, pieces):
    model, config = make_model(position=position)
    idx = torch.randint(V, (B, config.block_size))
    cache = v7.KVCache(model, B)
    with torch.inference_mode():
        expected, found = model(idx), []
        for piece in idx.split(pieces, dim=1):
            found.append(model.logits(model.hidden_states(piece, cache)))
            cache.lengths += piece.shape[1]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=0)


def uncached(model, ids, config, n):
    """Continue `ids` by n tokens with no cache: each is drawn after a pass over the whole window."""
    T, start, ids = config.block_size, max(0, len(ids) - config.block_size), list(ids)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(n):
        if len(ids) - start > T:
            start = len(ids) - T // 2
        with torch.inference_mode():
            logits = model(torch.tensor([ids[start:]]))[:, -1]
        ids.append(v7.sample_next(logits, config, generator).item())
    return ids


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("greedy", [True, False])
def test_same_tokens_with_and_without_cache_beyond_the_window(position, greedy):
    model, config = make_model(position=position, max_new_tokens=50, greedy=greedy)
    for length in (1, 5, 8, 9, 30):
        idx = torch.randint(V, (3, length))
        found = v7.generate(model, idx, config).tolist()
        for i, ids in enumerate(idx.tolist()):
            assert found[i] == uncached(model, ids, replace(config, seed=config.seed + i), 50)


def test_a_window_of_one_token():
    model, config = make_model(block_size=1, max_new_tokens=6, greedy=True)
    ids = v7.generate(model, torch.tensor([[3, 4]]), config)[0].tolist()
    with torch.inference_mode():
        for before, after in pairwise(ids[1:]):
            assert model(torch.tensor([[before]]))[0, -1].argmax() == after


def test_rows_of_a_batch_have_lengths_settings_and_seeds_of_their_own():
    model, config = make_model(block_size=16)
    texts = [([1], replace(config, seed=3)), ([5, 6, 7, 8, 9], replace(config, greedy=True))]
    texts += [(list(range(40)), replace(config, seed=9, temperature=0.5, top_k=5)), ([2] * 16, config)]
    engine = v7.Engine(model, 4)
    assert [engine.add(ids, replace(how, max_new_tokens=30)) for ids, how in texts] == [0, 1, 2, 3]
    for _ in range(30):
        assert set(engine.step()) == {0, 1, 2, 3}
    assert engine.step() == {}
    for row, (ids, how) in enumerate(texts):
        assert engine.remove(row) == uncached(model, ids, how, 30)


def test_a_row_that_has_ended_stays_ended_and_another_takes_its_place():
    model, config = make_model()
    long, short = replace(config, max_new_tokens=60, seed=1), replace(config, max_new_tokens=9, seed=2)
    engine = v7.Engine(model, 2)
    first, second = engine.add([1, 2, 3], long), engine.add([4], short)
    steps = [engine.step() for _ in range(12)]
    assert [second in new for new in steps] == [True] * 9 + [False] * 3
    assert all(first in new for new in steps)
    with pytest.raises(ValueError, match="None is not in list"):  # no row is free
        engine.add([7], short)
    assert engine.remove(second) == uncached(model, [4], short, 9)
    third = engine.add([5, 5], replace(short, seed=7))
    assert third == second
    while engine.step():
        pass
    assert engine.remove(third) == uncached(model, [5, 5], replace(short, seed=7), 9)
    assert engine.remove(first) == uncached(model, [1, 2, 3], long, 60)


def test_a_text_that_ends_leaves_no_trace_for_the_next():
    model, config = make_model(max_new_tokens=8)
    engine = v7.Engine(model, 1)
    engine.add(list(range(8)), config)  # fills its window
    for _ in range(20):
        engine.step()
    engine.remove(0)
    engine.add([9], config)
    for _ in range(8):
        engine.step()
    assert engine.remove(0) == uncached(model, [9], config, 8)


def test_a_text_without_ids_and_one_with_a_wrong_id_take_no_row():
    model, config = make_model()
    engine = v7.Engine(model, 1)
    with pytest.raises(ValueError, match="at least one id"):
        engine.add([], config)
    with pytest.raises(IndexError):
        engine.add([V, 1], config)
    assert engine.step() == {} and engine.add([1], config) == 0


def test_the_stop_id_ends_a_text():
    model, config = make_model(max_new_tokens=40)
    ids = uncached(model, [1], config, 40)
    stop = ids[7]
    engine = v7.Engine(model, 1)
    engine.add([1], config, stop=stop)
    while engine.step():
        pass
    assert engine.remove(0) == ids[: ids.index(stop, 1) + 1]


def test_a_token_costs_one_row_of_products_and_a_full_window_one_more_pass():
    model, config = make_model(max_new_tokens=40)
    passes = []
    model.blocks[0].register_forward_hook(lambda block, inputs, output: passes.append(output.shape[1]))
    v7.generate(model, torch.tensor([[1, 2, 3]]), config)
    assert passes.count(1) == 40 and passes[0] == 2  # the prompt but for its last token
    # Before the steps that read the 9th, 14th, ... 39th id the newer half, 3 and that one, is read again.
    assert [n for n in passes if n != 1] == [2] + [3] * 7


# ---------------------------------------------- int8 and int4 ----------------------------------------------


def linear(n, k, scale=0.1, shift=0.0, bias=True):
    torch.manual_seed(n * k)
    layer = nn.Linear(k, n, bias=bias)
    nn.init.normal_(layer.weight, shift, scale)
    return layer.requires_grad_(False)


SHAPES = [(48, 64), (37, 96), (64, 68), (5, 72), (33, 200), (16, 16), (257, 256)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("shift", [0.0, 1.0, -100.0])
def test_int8_is_off_by_half_a_step_at_most(n, k, shift):
    layer = linear(n, k, shift=shift)
    small = v7.Int8Linear(layer, v7.Config())
    step = small.scales.float()[:, None]
    torch.testing.assert_close(step, layer.weight.abs().amax(dim=1, keepdim=True) / 127, rtol=2**-8, atol=0)
    assert ((small.rows(slice(None)) - layer.weight).abs() <= step * 0.5001).all()
    assert small.codes.dtype == torch.int8 and small.codes.abs().amax() == 127


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("shift", [0.0, 1.0, -100.0])
def test_int4_is_off_by_half_a_step_at_most(n, k, group_size, shift):
    layer = linear(n, k, shift=shift)
    small = v7.Int4Linear(layer, v7.Config(group_size=group_size))
    step = small.scales[:n].float().repeat_interleave(group_size, dim=1)[:, :k]
    assert ((small.rows(slice(n)) - layer.weight).abs() <= step * 0.5001).all()
    assert small.codes.shape == (n + -n % 16, (k + -k % group_size) // 2)


def test_codes_of_weights_that_int8_can_hold_come_back():
    codes = torch.randint(-127, 128, (9, 48), dtype=torch.int8)
    codes[:, 0] = 127
    layer = linear(9, 48)
    layer.weight.data = codes * torch.logspace(-3, 1, 9).bfloat16().float()[:, None]
    assert torch.equal(v7.Int8Linear(layer, v7.Config()).codes, codes)


@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_codes_of_weights_that_int4_can_hold_come_back(group_size):
    codes = torch.randint(0, 16, (16, 128), dtype=torch.uint8)
    codes[:, ::group_size], codes[:, 1::group_size] = 0, 15
    scales = 2.0 ** torch.randint(-6, 3, (16, 128 // group_size))
    zeros = scales * torch.randint(-7, 9, scales.shape)  # the range includes 0
    layer = linear(16, 128)
    layer.weight.data = (codes.float() - 8) * scales.repeat_interleave(group_size, 1)
    layer.weight.data += zeros.repeat_interleave(group_size, 1)
    small = v7.Int4Linear(layer, v7.Config(group_size=group_size))
    assert torch.equal(small.unpacked(slice(None)), codes)
    assert torch.equal(small.rows(slice(None)), layer.weight)
    assert torch.equal(small.scales.float(), scales)


def test_four_numbers_by_hand():
    """The example of the log: int8 and int4 of 0.31, -0.62, 0.05, 0.9."""
    layer = linear(1, 4)
    layer.weight.data = torch.tensor([[0.31, -0.62, 0.05, 0.9]])
    small = v7.Int8Linear(layer, v7.Config())
    assert small.scales.item() == pytest.approx(0.9 / 127, rel=2**-8)
    assert small.codes.tolist() == [[44, -88, 7, 127]]
    small = v7.Int4Linear(layer, v7.Config())
    scale = (0.9 + 0.62) / 15
    assert small.scales[0, 0].item() == pytest.approx(scale, rel=2**-8)
    assert small.unpacked(slice(1))[0, :4].tolist() == [9, 0, 7, 15]


MAKERS = {"none": v7.FloatLinear, "int8": v7.Int8Linear, "int4": v7.Int4Linear}


@pytest.mark.parametrize("kind", v7.KINDS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("group_size", [16, 32, 64, 256])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_unpacked_weights(kind, n, k, group_size, bias):
    """With gradients by the unpacked weights, without by PyTorch's kernels, which take x in bfloat16."""
    layer = linear(n, k, bias=bias)
    small = MAKERS[kind](layer, v7.Config(group_size=group_size))
    weight = small.rows(slice(n)).double()
    shift = layer.bias.double() if bias else torch.zeros(n, dtype=torch.float64)
    for shape in ((1, k), (1, 1, k), (3, 5, k), (16, k), (2, 100, k)):
        x = torch.randn(shape)
        exact = F.linear(x.double(), weight, shift)
        size = F.linear(x.double().abs(), weight.abs(), shift.abs())  # what rounding goes by
        for grad, tolerance in ((True, 1e-6), (False, 1e-6 if kind == "none" or not small.fits else 2**-7)):
            with torch.set_grad_enabled(grad):
                found = small(x)
            assert found.shape == exact.shape and found.dtype == torch.float32
            assert ((found.double() - exact).abs() <= tolerance * size).all()


def test_the_kernels_alone_in_float32_are_the_reference():
    layer, x = linear(48, 64), torch.randn(3, 64)
    small = v7.Int8Linear(layer, v7.Config())
    found = torch._weight_int8pack_mm(x, small.codes, small.scales.float()) + layer.bias
    torch.testing.assert_close(found, small(x), atol=1e-5, rtol=1e-5)
    small = v7.Int4Linear(layer, v7.Config())
    packed, group_size, scales = small.packed
    found = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales.float()) + layer.bias
    torch.testing.assert_close(found, small(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_shapes_that_the_kernels_refuse_do_not_reach_them(monkeypatch):
    calls = []
    real = torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *args: calls.append(1) or real(*args))
    for n, k, rows, fused in ((48, 64, 1, True), (48, 64, 100, True), (64, 68, 1, False), (64, 72, 1, False)):
        calls.clear()
        v7.Int8Linear(linear(n, k), v7.Config())(torch.randn(rows, k))
        assert bool(calls) == fused, (n, k, rows)
    for n, k, group_size, fused in ((37, 64, 32, True), (37, 64, 16, False), (37, 72, 32, False)):
        small = v7.Int4Linear(linear(n, k), v7.Config(group_size=group_size))
        small(torch.randn(1, k))
        assert ("packed" in vars(small)) == fused, (n, k, group_size)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("sizes", [dict(n_embd=64, n_head=4), dict(n_embd=68, n_head=2), dict(n_embd=20)])
def test_a_quantized_model_computes_what_its_unpacked_weights_do(kind, sizes):
    """Every matrix of the blocks and the embedding, but not the positions, is that of the codes."""
    model, config = make_model(position="learned", quantize=kind, **sizes)
    plain = v7.LanguageModel(config, V).eval()
    plain.load_state_dict(model.state_dict())
    small = v7.quantize(model, config)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) or name == "token_embedding":
            module.weight.data = small.get_submodule(name).rows(slice(len(module.weight)))
    idx = torch.randint(V, (2, 8))
    torch.testing.assert_close(small(idx), plain(idx), atol=1e-4, rtol=1e-4)  # with gradients: unpacked
    with torch.inference_mode():  # by the kernels, in bfloat16
        difference = (small(idx) - plain(idx)).abs().max()
    assert difference < 0.05 * plain(idx).std()


@pytest.mark.parametrize("kind", v7.KINDS)
def test_rows_of_a_quantized_batch_are_what_each_would_be_alone(kind):
    model, config = make_model(n_embd=64, n_head=4, quantize=kind, greedy=True, max_new_tokens=20)
    small = v7.quantize(model, config)
    idx = torch.randint(V, (5, 3))
    together = v7.generate(small, idx, config)
    for i in range(5):
        assert torch.equal(v7.generate(small, idx[i : i + 1], config)[0], together[i])


# ------------------------------------ from the command line ------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folder with models that v5, v6 and v7 have trained in small settings, of 32 numbers in an embedding."""
    folder = tmp_path_factory.mktemp("bases")
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[:6000]
    (folder / "input.txt").write_text(text, encoding="utf-8", newline="\n")
    for rung in ("v5_gpt2", "v6_amp_ddp", RUNG):
        more = ["--base=none"] if rung == RUNG else []
        flags = tiny_flags(importlib.import_module(rung), n_embd=32)
        process = run_rung(rung, *flags, *more, cwd=folder)
        assert process.returncode == 0, process.stderr
    return folder


def metrics_of(folder, rung):
    return json.loads((folder / "runs" / rung / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("rung", ["v5_gpt2", "v6_amp_ddp"])
def test_models_of_other_rungs_are_quantized(rung, bases):
    out = f"of_{rung}"
    process = run_here(RUNG, f"--base=runs/{rung}", f"--out_dir={out}", "--max_new_tokens=30", cwd=bases)
    assert process.returncode == 0, process.stderr
    assert f"runs/{rung}" in process.stdout
    theirs, ours = metrics_of(bases, rung), json.loads((bases / out / "metrics.json").read_text())
    assert ours["compared"]["none"]["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-5)
    assert ours["compared"]["none"]["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
    assert ours["params"] == theirs["params"] and ours["tokens"] == theirs["tokens"]
    assert ours["seconds"] == theirs["seconds"] and ours["history"] == theirs["history"]
    assert ours["val_loss"] == ours["compared"]["int8"]["val_loss"]
    for kind, most in (("int8", 0.02), ("int4", 0.2)):  # of a model that has hardly learned
        assert abs(ours["compared"][kind]["bits_per_char"] - ours["compared"]["none"]["bits_per_char"]) < most
    sizes = [ours["compared"][kind]["megabytes"] for kind in ("none", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    assert matplotlib.image.imread(bases / out / "quantization.png").std() > 0


def test_v6s_run_is_the_default_base(bases):
    process = run_here(RUNG, "--out_dir=default", "--max_new_tokens=3", cwd=bases)
    assert process.returncode == 0 and "runs/v6_amp_ddp" in process.stdout
    assert not (bases / "default/base").exists()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_checkpoint_needs_no_float_weights(kind, bases, tmp_path):
    shutil.copy(bases / "input.txt", tmp_path)
    args = [f"--base={bases}/runs/v6_amp_ddp", f"--quantize={kind}", "--max_new_tokens=40"]
    process = run_here(RUNG, *args, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    path = tmp_path / "runs" / RUNG / "checkpoint.pt"
    weights = torch.load(path, weights_only=True)["model"]
    assert not [name for name, weight in weights.items() if name.endswith(".weight") and weight.dim() == 2]
    assert all(weight.dtype != torch.float32 or weight.dim() == 1 for weight in weights.values())
    params = sum(p.numel() for p in v7.load_model(weights, v7.Config(**saved(path)), "cpu").parameters())
    assert params < 0.2 * metrics_of(bases, "v6_amp_ddp")["params"]  # biases and norms
    assert metrics_of(tmp_path, RUNG)["config"]["base"].endswith("runs/v6_amp_ddp")
    again = run_here(RUNG, "--sample", "--max_new_tokens=40", cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.strip("\n") in process.stdout
    evaluated = run_here(RUNG, "--evaluate", cwd=tmp_path)
    metrics = metrics_of(tmp_path, RUNG)
    assert f"{metrics['val_loss']:.4f}" in evaluated.stdout and "none" not in evaluated.stdout


def saved(path):
    """The Config fields of a checkpoint."""
    config = torch.load(path, weights_only=True)["config"]
    return {name: value for name, value in config.items() if name in v7.Config.__dataclass_fields__}


@pytest.mark.parametrize(("kind", "share"), [("none", 1.0), ("int8", 0.27), ("int4", 0.17)])
def test_size_on_disk_at_124_million(kind, share, tmp_path):
    sizes = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, position="learned", vocab_size=50257)
    config = v7.Config(**sizes, quantize=kind)
    with torch.device("meta"):
        model = v7.quantize(v7.LanguageModel(config, 50257), config)
    size = sum(x.nbytes for x in model.state_dict().values())
    whole = 4 * 124_439_808
    assert size <= share * whole
    if kind != "int8":  # and the file is no larger than its numbers
        return
    model.to_empty(device="cpu")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 1.001 * size


def test_what_cannot_be_a_base_is_refused(bases, tmp_path):
    shutil.copy(bases / "input.txt", tmp_path)
    good = bases / "runs/v6_amp_ddp/checkpoint.pt"
    checkpoint = torch.load(good, weights_only=True)
    quantized = torch.load(bases / "runs" / RUNG / "checkpoint.pt", weights_only=True)
    bad = {"cut": good.read_bytes()[:-500], "empty": b"", "text": b"no checkpoint"}
    for name, content in bad.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").write_bytes(content)
    first = next(iter(checkpoint["model"]))
    for name, content in {
        "quantized": quantized,
        "older": checkpoint | {"version": "v4_rope_alibi"},
        "other": [1],
        "shape": checkpoint | {"model": checkpoint["model"] | {first: torch.zeros(2, 3)}},
        "lacks": {key: value for key, value in checkpoint.items() if key != "vocab"},
        "config": checkpoint | {"config": checkpoint["config"] | {"n_head": "2"}},
    }.items():
        (tmp_path / name).mkdir()
        torch.save(content, tmp_path / name / "checkpoint.pt")
    (tmp_path / "nothing").mkdir()
    for path in tmp_path.iterdir():
        if path.is_dir():
            process = run_here(RUNG, f"--base={path.name}", cwd=tmp_path)
            assert process.returncode != 0 and process.stderr.count("\n") == 1, process.stderr
            assert process.stderr.startswith("error: "), path.name
            assert path.name == "shape" or path.name in process.stderr
    assert "quantized already" in run_here(RUNG, "--base=quantized", cwd=tmp_path).stderr
    assert not (tmp_path / "runs" / RUNG / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--quantize=int5", ["int5", "int4"]),
        ("--group_size=24", ["24", "32"]),
        ("--n_embd=64", ["--n_embd", "32", "--base none"]),
        ("--max_steps=5", ["--max_steps", "12", "--base none"]),
        ("--learning_rate=0.5", ["--learning_rate"]),
        ("--base=nowhere", ["nowhere", "checkpoint"]),
        ("--base=runs/v6_amp_ddp --out_dir=runs/../runs/v6_amp_ddp", ["overwritten", "--out_dir"]),
        ("--precision=fp16", ["--precision", "--base none"]),
        ("--base=none --precision=fp16", ["fp16", "bf16"]),
    ],
)
def test_flags_that_cannot_take_effect_are_refused(flags, words, bases):
    before = {path: path.read_bytes() for path in bases.rglob("*") if path.is_file()}
    process = run_here(RUNG, *flags.split(), cwd=bases)
    assert process.returncode != 0 and process.stderr.count("\n") == 1
    assert all(word in process.stderr for word in words), process.stderr
    assert before == {path: path.read_bytes() for path in bases.rglob("*") if path.is_file()}


def test_stream_prints_the_same_text_while_it_is_written(bases):
    plain, streamed = (
        run_here(RUNG, "--sample", "--prompt=First", *more, cwd=bases) for more in ([], ["--stream"])
    )
    assert plain.returncode == streamed.returncode == 0
    assert streamed.stdout == plain.stdout


def test_stream_shows_whole_characters_only(bases):
    """What has been printed at any time is the beginning of the sample, whatever bytes a character has."""
    text = "ab\u00e9\u4e2d\U0001f9c0" * 300
    (bases / "bytes.txt").write_text(text, encoding="utf-8")
    flags = tiny_flags(v7, data="bytes.txt", tokenizer="bpe", vocab_size=262, out_dir="bytes")
    assert run_here(RUNG, *flags, cwd=bases).returncode == 0
    pieces = []

    class Out(io.StringIO):
        def write(self, piece):
            pieces.append(piece)
            return len(piece)

    argv = [RUNG, "--sample", "--stream", "--out_dir=bytes", "--max_new_tokens=60", "--seed=3"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(Out()):
        patch.chdir(bases)
        patch.setattr(sys, "argv", argv)
        v7.main()
    streamed = "".join(pieces)
    argv.remove("--stream")
    assert run_here(*argv, cwd=bases).stdout == streamed
    assert len(pieces) > 30 and not any(piece.endswith("\ufffd") for piece in pieces[:-2])


def test_perplexity_and_bits_of_the_table_belong_together(bases):
    for numbers in metrics_of(bases, RUNG)["compared"].values():
        assert numbers["perplexity"] == pytest.approx(math.exp(numbers["val_loss"]))
        assert numbers["bits_per_char"] == pytest.approx(numbers["val_loss"] / math.log(2))  # of characters
        speed = numbers["new_tokens_per_second"]
        assert numbers["ms_per_token"] == pytest.approx(1000 / speed)
        read = speed * numbers["megabytes"] / 1000
        assert numbers["gb_read_per_second"] == pytest.approx(read)


def test_the_base_that_is_trained_here_is_that_of_v6(bases):
    """The recipe of v6 on one process: the same weights to the bit, and the same history."""
    mine, theirs = (
        torch.load(bases / "runs" / path / "checkpoint.pt", weights_only=True)
        for path in (f"{RUNG}/base", "v6_amp_ddp")
    )
    assert mine["model"].keys() == theirs["model"].keys()
    assert all(torch.equal(mine["model"][name], weight) for name, weight in theirs["model"].items())
    assert [point["val_loss"] for point in mine["history"]] == [p["val_loss"] for p in theirs["history"]]


def test_a_plain_checkpoint_can_be_a_base_and_be_exported_and_a_quantized_one_cannot(bases, tmp_path):
    args = ["--base=runs/v6_amp_ddp", "--quantize=none", "--out_dir=plain", "--max_new_tokens=3"]
    assert run_here(RUNG, *args, cwd=bases).returncode == 0
    again = run_here(RUNG, "--base=plain", "--out_dir=again", "--max_new_tokens=3", cwd=bases)
    assert again.returncode == 0, again.stderr
    for folder, code in ((bases / "plain", 0), (bases / "again", 1), (bases / "runs" / RUNG / "base", 0)):
        args = [sys.executable, str(ROOT / "tools/export.py"), str(folder), str(tmp_path / folder.name)]
        process = subprocess.run(args, capture_output=True, encoding="utf-8")
        assert process.returncode == code, process.stderr
        assert code == 0 or (process.stderr.count("\n") == 1 and "quantized" in process.stderr)
