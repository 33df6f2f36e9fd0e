"""v6: 16-bit numbers, Muon, torch.compile, several processes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, run_here, run_rung, tiny_config, tiny_flags

import v5_gpt2 as v5
import v6_amp_ddp as v6

V = 65


@pytest.fixture(autouse=True)
def signals_as_before():
    """Training that ends in an error leaves its handlers behind."""
    heard = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in heard.items():
        signal.signal(number, handler)


def trained(config, ids=None, checkpoint=None):
    """Train a tiny model in this process; return it and its checkpoint."""
    config.precision = v6.pick_precision(config.precision, "cpu")
    torch.manual_seed(config.seed)
    model = v6.LanguageModel(config, V)
    ids = torch.randint(V, (3000,), dtype=torch.uint16) if ids is None else ids
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    checkpoint = checkpoint or {"step": 0, "seconds": 0.0, "history": [], "skipped": 0}
    v6.train(model, ids, ids[:500], config, checkpoint)
    return model, checkpoint


def text_ids():
    """The first 100,000 characters of Shakespeare as ids below 65."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    ids = {char: i for i, char in enumerate(sorted(set(text)))}
    return torch.tensor([ids[char] for char in text[:100_000]], dtype=torch.uint16)


# ---------------------------------------------- precision ----------------------------------------------


def test_auto_is_bf16_only_where_hardware_has_it(monkeypatch):
    for cpu, expected in (
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ({}, "fp32"),  # not x86
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda cpu=cpu: cpu)
        assert v6.pick_precision("auto", "cpu") == expected
    assert v6.pick_precision("fp16", "cpu") == "fp16"


def test_a_precision_that_the_device_lacks_is_refused(monkeypatch, folder):
    def ones(*size, dtype, **options):
        raise RuntimeError(f"no {dtype} on this device")

    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(SystemExit, match=r"^error: --device cpu cannot compute in --precision fp16 \(no"):
        v6.pick_precision("fp16", "cpu")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_gradients_and_moments_stay_in_32_bits(precision, tmp_path):
    model, checkpoint = trained(tiny_config(v6, precision=precision, max_steps=5, out_dir=str(tmp_path)))
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())
    for states in checkpoint["optimizer"].values():
        for state in states.values():
            assert all(x.dtype == torch.float32 for x in state.values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_loss_in_16_bits_is_that_in_32(precision, optimizer, tmp_path):
    sizes = dict(n_embd=32, n_head=2, block_size=32, batch_size=8, max_steps=120, eval_interval=120)
    ids, losses = text_ids(), {}
    for name in ("fp32", precision):
        config = tiny_config(v6, precision=name, optimizer=optimizer, out_dir=str(tmp_path), **sizes)
        _, checkpoint = trained(config, ids)
        losses[name] = checkpoint["history"][-1]["val_loss"]
    assert losses["fp32"] < 3.0  # has learned something: knowing nothing gives 4.17
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.01)
    assert losses[precision] != losses["fp32"]


def test_overflow_is_skipped_by_all_optimizers_and_the_scale_falls(tmp_path):
    config = tiny_config(v6, precision="fp16", max_steps=6, eval_interval=6, out_dir=str(tmp_path))
    scaler, weights, scales = torch.amp.GradScaler, [], []

    class Watched(scaler):
        def __init__(self, device, enabled):
            super().__init__(device, init_scale=2.0**60, enabled=enabled)

        def update(self):
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
            scales.append(self.get_scale())
            super().update()

    torch.manual_seed(config.seed)
    model = v6.LanguageModel(config, V)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    checkpoint = {"step": 0, "seconds": 0.0, "history": [], "skipped": 0}
    ids = torch.randint(V, (3000,), dtype=torch.uint16)
    with patch.object(torch.amp, "GradScaler", Watched):
        v6.train(model, ids, ids[:500], config, checkpoint)
    assert checkpoint["skipped"] == 6
    assert scales == [2.0**n for n in range(60, 54, -1)]
    assert all(torch.equal(before, after) for after in weights)
    assert all(not states for states in checkpoint["optimizer"].values())
    assert checkpoint["scaler"]["scale"] == 2.0**54


def test_after_the_overflows_fp16_learns(tmp_path):
    """From a scale that is far too large: skipped until it fits, then trained as ever."""
    config = tiny_config(v6, precision="fp16", max_steps=150, eval_interval=150, out_dir=str(tmp_path))
    scaler = torch.amp.GradScaler
    with patch.object(
        torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**40, enabled=enabled)
    ):
        _, checkpoint = trained(config, text_ids())
    assert 10 < checkpoint["skipped"] < 40 and checkpoint["history"][-1]["val_loss"] < 3.3


def test_skipped_steps_and_precision_are_reported(folder):
    process = run_here("v6_amp_ddp", *tiny_flags(v6, precision="fp16"), cwd=folder)
    assert process.returncode == 0, process.stderr
    metrics = json.loads((folder / "runs/v6_amp_ddp/metrics.json").read_text())
    assert metrics["precision"] == "fp16"
    assert 0 <= metrics["skipped"] <= 12
    assert f"fp16, evaluated in fp32, {metrics['skipped']} steps skipped" in process.stdout


def test_fp16_resumes_with_its_scale(folder):
    """Stopped in the middle and resumed: the weights and the scale of one long run, to the bit."""
    flags = tiny_flags(v6, precision="fp16", max_steps=20, eval_interval=10)
    assert run_here("v6_amp_ddp", *flags, "--out_dir=whole", cwd=folder).returncode == 0
    assert run_here("v6_amp_ddp", *flags, "--out_dir=parts", cwd=folder).returncode == 0
    saved = torch.load(folder / "parts/checkpoint.pt")
    whole = torch.load(folder / "whole/checkpoint.pt")
    assert saved["scaler"]["scale"] > 1 and saved["scaler"] == whole["scaler"]
    flags = tiny_flags(v6, precision="fp16", max_steps=20, eval_interval=10, out_dir="stopped")
    stop = "import sys; sys.path.insert(0, {root!r}); import v6_amp_ddp as v6, signal, threading\n"
    stop += "seen = v6.evaluate\n"
    stop += "def evaluate(*args):\n    signal.raise_signal(signal.SIGTERM)\n    return seen(*args)\n"
    stop += "v6.evaluate = evaluate\nsys.argv = ['v6_amp_ddp.py', *{flags!r}]\nv6.main()"
    args = [sys.executable, "-c", stop.format(root=str(ROOT), flags=flags)]
    process = subprocess.run(args, cwd=folder, capture_output=True, encoding="utf-8", timeout=120)
    assert "--resume goes on" in process.stderr, process.stderr
    assert torch.load(folder / "stopped/checkpoint.pt")["step"] in (10, 11)
    assert run_here("v6_amp_ddp", "--resume", "--out_dir=stopped", cwd=folder).returncode == 0
    resumed = torch.load(folder / "stopped/checkpoint.pt")
    assert resumed["scaler"] == whole["scaler"]
    assert all(torch.equal(resumed["last"][name], whole["last"][name]) for name in whole["last"])


def test_a_scale_that_falls_to_nothing_ends_the_run(tmp_path):
    """Gradients that are never finite while the loss is: no endless skipping."""
    config = tiny_config(v6, precision="fp16", max_steps=200, eval_interval=200, out_dir=str(tmp_path))
    with patch.object(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf)):
        update = torch.amp.GradScaler.update
        with patch.object(torch.amp.GradScaler, "update", lambda s: (update(s), s._scale.mul_(0.5))):
            with pytest.raises(SystemExit, match="not finite"):
                trained(config)


# ---------------------------------------------- optimizers ----------------------------------------------


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(optimizer, position):
    config = tiny_config(v6, optimizer=optimizer, position=position)
    model = v6.LanguageModel(config, V)
    optimizers = v6.make_optimizers(model, config)
    groups = [group for o in optimizers.values() for group in o.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.dim() == 2), names[id(p)]
    if optimizer == "muon":
        assert {names[id(p)].split(".")[0] for g in optimizers["muon"].param_groups for p in g["params"]} == {
            "blocks"
        }
        assert len(optimizers["muon"].param_groups[0]["params"]) == 4 * config.n_layer


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
def test_muon_applies_its_polynomial_to_the_singular_values(shape):
    """Jordan et al. 2024: five times x -> 3.4445 x - 4.775 x^3 + 2.0315 x^5, from x / the Frobenius norm."""
    config = tiny_config(v6, optimizer="muon", learning_rate=0.5, weight_decay=0.25)
    model = v6.LanguageModel(config, V)
    torch.manual_seed(3)
    weight = torch.nn.Parameter(torch.randn(shape))
    model.blocks[0].mlp[0].weight = weight
    before, gradient = weight.detach().clone(), torch.randn(shape)
    weight.grad = gradient
    v6.make_optimizers(model, config)["muon"].step()
    U, S, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    x = S / S.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.775 * x**3 + 2.0315 * x**5
    assert 0.6 < x.min() and x.max() < 1.3
    step = U @ x.diag() @ Vh * 0.5 * 0.2 * math.sqrt(max(shape))
    expected = before.double() * (1 - 0.5 * 0.25) - step
    error = (weight.detach().double() - expected).norm() / step.norm()
    assert error < 0.02  # it is computed in bfloat16


def test_adamw_in_fp32_is_v5_to_the_bit(folder):
    flags = dict(tokenizer="char", dropout=0.0, weight_decay=0.1, learning_rate=0.004)
    for rung, module, more in (
        ("v5_gpt2", v5, {}),
        ("v6_amp_ddp", v6, dict(optimizer="adamw", precision="fp32")),
    ):
        process = run_here(rung, *tiny_flags(module, **flags, **more), cwd=folder)
        assert process.returncode == 0, process.stderr
    a, b = (torch.load(folder / f"runs/{rung}/checkpoint.pt") for rung in ("v5_gpt2", "v6_amp_ddp"))
    assert a["last"].keys() == b["last"].keys()
    assert all(torch.equal(a["last"][name], b["last"][name]) for name in a["last"])


# ---------------------------------------------- torch.compile ----------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="needs a compiler, and the name of one that is missing")
def test_without_a_compiler_training_goes_on(folder):
    env = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    args = [sys.executable, str(ROOT / "v6_amp_ddp.py"), "--compile", *tiny_flags(v6)]
    process = subprocess.run(args, cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=300)
    assert process.returncode == 0, process.stderr
    assert "torch.compile fails here" in process.stderr and "Traceback" not in process.stderr
    assert (folder / "runs/v6_amp_ddp/metrics.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a compiler")
def test_compiled_it_learns_the_same_and_saves_plain_names(folder):
    histories = []
    for flag in ("--no-compile", "--compile"):
        flags = tiny_flags(v6, precision="fp32", optimizer="adamw", out_dir=flag.strip("-"))
        process = run_rung("v6_amp_ddp", flag, *flags, cwd=folder)
        assert process.returncode == 0 and "fails" not in process.stderr, process.stderr
        saved = torch.load(folder / flag.strip("-") / "checkpoint.pt")
        assert not any("_orig_mod" in name for name in saved["last"])
        histories.append([point["val_loss"] for point in saved["history"]])
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)


# ------------------------------------------ several processes ------------------------------------------


def torchrun(n, *flags, cwd):
    """Start a rung in n processes of one thread each, as torchrun does."""
    args = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    options = dict(cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    return subprocess.Popen([*args, str(ROOT / "v6_amp_ddp.py"), *flags], start_new_session=True, **options)


def finished(process, timeout=240):
    """Wait for a process; return its status and texts."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun there needs USE_LIBUV=0")
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-5), ("muon", 1e-3)])
def test_two_processes_learn_what_one_learns(optimizer, tolerance, folder):
    flags = dict(optimizer=optimizer, precision="fp32", learning_rate=0.004, grad_accum=2)
    flags = tiny_flags(v6, **flags, max_steps=50, eval_interval=1)
    alone = run_rung("v6_amp_ddp", *flags, "--out_dir=one", cwd=folder)
    assert alone.returncode == 0, alone.stderr
    both = finished(torchrun(2, *flags, "--out_dir=two", cwd=folder))
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("val_loss") == 1  # the first process alone prints
    one, two = (torch.load(folder / name / "checkpoint.pt") for name in ("one", "two"))
    for split in ("train_loss", "val_loss"):
        losses = [[point[split] for point in checkpoint["history"]] for checkpoint in (one, two)]
        assert len(losses[0]) == 50 and losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert one["last"].keys() == two["last"].keys()  # no "module."
    metrics = [json.loads((folder / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[0]["val_loss"] == pytest.approx(metrics[1]["val_loss"], rel=tolerance)
    assert metrics[0]["tokens"] == metrics[1]["tokens"] and metrics[1]["processes"] == 2


def children(pid):
    """The processes that a process has started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, encoding="utf-8").stdout
    return [int(line) for line in found.split()]


def wait_for(path, process):
    """Wait until a file is there, as long as its writer lives."""
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, finished(process).stderr
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written")


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun there needs USE_LIBUV=0")
def test_other_modes_work_in_two_processes(folder):
    flags = tiny_flags(v6, precision="fp32")
    assert run_rung("v6_amp_ddp", *flags, cwd=folder).returncode == 0
    for mode, word in (("--evaluate", "val_loss"), ("--sample", "")):
        alone = run_rung("v6_amp_ddp", mode, cwd=folder)
        both = finished(torchrun(2, mode, cwd=folder))
        assert both.returncode == 0 and word in both.stdout, both.stderr
        assert both.stdout == alone.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="pgrep, signals")
def test_a_stop_is_agreed_on_and_resumed(folder):
    """SIGTERM to one process, kill -9 to one later: each time --resume ends where one long run ends."""
    flags = tiny_flags(v6, precision="fp32", optimizer="adamw", max_steps=1500, eval_interval=30)
    whole = finished(torchrun(2, *flags, "--out_dir=whole", cwd=folder))
    assert whole.returncode == 0, whole.stderr
    process = torchrun(2, *flags, "--out_dir=parts", cwd=folder)
    wait_for(folder / "parts/checkpoint.pt", process)
    os.kill(children(process.pid)[1], signal.SIGTERM)
    stopped = finished(process)
    assert stopped.returncode and "saved; the same command with --resume goes on" in stopped.stderr
    step = torch.load(folder / "parts/checkpoint.pt")["step"]
    assert 30 <= step < 1500
    process = torchrun(2, "--resume", "--out_dir=parts", cwd=folder)
    until = time.monotonic() + 120
    while torch.load(folder / "parts/checkpoint.pt")["step"] == step:
        assert process.poll() is None and time.monotonic() < until, finished(process, timeout=1).stderr
        time.sleep(0.05)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    assert finished(process).returncode
    assert torch.load(folder / "parts/checkpoint.pt")["step"] < 1500
    last = finished(torchrun(2, "--resume", "--out_dir=parts", cwd=folder))
    assert last.returncode == 0, last.stderr
    a, b = (torch.load(folder / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert all(torch.equal(a["last"][name], b["last"][name]) for name in a["last"])


@pytest.mark.skipif(sys.platform != "linux", reason="pgrep, signals")
@pytest.mark.parametrize("flag", ["--batch_size=5", "--learning_rate=1e30"])
def test_an_error_ends_all_processes_with_its_sentence(flag, folder):
    flags = tiny_flags(v6, precision="fp32", max_steps=200)
    ended = finished(torchrun(2, *flags, flag, cwd=folder), timeout=120)
    assert ended.returncode
    assert (
        "--batch_size 5 cannot be shared by 2" if "batch" in flag else "the loss is not finite"
    ) in ended.stderr
    assert "Traceback" not in ended.stderr.split("torch/distributed/elastic")[0]
