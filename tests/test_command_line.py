"""Each rung from the command line, as a user runs it: what it makes, what it refuses, what it never harms."""

import importlib
import json
import math
import signal
import subprocess
import sys
import time

import matplotlib.image
import pytest
import torch
from conftest import ROOT, RUNGS, TINY, VARIANTS, command, run_here, run_rung, tiny_flags

METRICS = {
    *("version", "params", "steps", "tokens", "seconds", "tokens_per_second", "train_loss", "val_loss"),
    *("perplexity", "bits_per_char", "history", "config", "torch", "device", "threads"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a rung once with small settings; return its folder and the finished process."""
    done = {}

    def train(rung):
        variant = rung, TINY.get("position")
        if variant not in done:
            folder = tmp_path_factory.mktemp(rung)
            text = (ROOT / "input.txt").read_text(encoding="utf-8")[:6000]
            (folder / "input.txt").write_text(text, encoding="utf-8", newline="\n")
            done[variant] = folder, run_rung(rung, *tiny_flags(importlib.import_module(rung)), cwd=folder)
        return done[variant]

    return train


def refused(process, *words):
    """The process failed with one sentence on stderr that holds these words, and no traceback."""
    lines = [line for line in process.stderr.strip().splitlines() if "step/s" not in line and line]
    assert process.returncode != 0
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    for word in words:
        assert word in lines[0], lines[0]
    return True


def test_training_makes_all_its_files(rung, trained):
    folder, process = trained(rung)
    assert process.returncode == 0, process.stderr
    out = folder / "runs" / rung
    files = {path.name for path in out.iterdir()}
    assert files >= {"checkpoint.pt", "metrics.json", "loss.png", "sample.txt"}
    assert not [name for name in files if name.endswith(".tmp")]
    assert {path.name for path in folder.iterdir()} == {"input.txt", "runs"}

    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics) >= METRICS and metrics["version"] == rung
    assert metrics["steps"] == 12 and metrics["tokens"] == 12 * 4 * 8
    assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["seconds"])
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["val_loss"]), rel=1e-5)
    assert metrics["bits_per_char"] == pytest.approx(metrics["val_loss"] / math.log(2))
    assert [point["step"] for point in metrics["history"]] == [5, 10, 12]
    assert all(set(point) >= {"seconds", "train_loss", "val_loss"} for point in metrics["history"])
    weights = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    module = importlib.import_module(rung)
    model = module.LanguageModel(module.Config(**metrics["config"]), len_chars(out))
    model.load_state_dict(weights)
    assert metrics["params"] == sum(p.numel() for p in model.parameters())

    sample = (out / "sample.txt").read_text(encoding="utf-8")
    assert len(sample) == 21 and sample in process.stdout
    assert f"{metrics['val_loss']:.4f}" in process.stdout and f"runs/{rung}" in process.stdout
    assert "loss" in process.stderr and "tokens/s" in process.stderr
    assert matplotlib.image.imread(out / "loss.png").std() > 0


def len_chars(out):
    """The vocabulary size of the checkpoint in folder `out`."""
    return len(torch.load(out / "checkpoint.pt", weights_only=True)["vocab"])


def test_attention_picture(trained):
    folder, _ = trained("v2_attention")
    picture = matplotlib.image.imread(folder / "runs/v2_attention/attention.png")
    assert picture.shape[1] == 2 * picture.shape[0] and picture.std() > 0  # two heads side by side


def test_sampling_continues_the_prompt_and_changes_no_file(rung, trained):
    folder, _ = trained(rung)
    before = {path: path.read_bytes() for path in (folder / "runs" / rung).iterdir()}
    args = ["--sample", "--prompt", "First Citizen:", "--max_new_tokens=30"]
    processes = [run_here(rung, *args, *more, cwd=folder) for more in ([], [], ["--seed=7"], ["--greedy"])]
    texts = [process.stdout for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert all(text.startswith("First Citizen:") and len(text) == 14 + 30 + 1 for text in texts)
    assert texts[0] == texts[1] != texts[2]
    assert before == {path: path.read_bytes() for path in (folder / "runs" / rung).iterdir()}


def test_help_names_every_flag_with_meaning_and_default(rung, tmp_path):
    process = run_here(rung, "--help", cwd=tmp_path)
    module = importlib.import_module(rung)
    text = " ".join(process.stdout.split())
    assert process.returncode == 0 and "--sample" in text and "--greedy" in text
    for name, field in module.Config.__dataclass_fields__.items():
        assert f"--{name} " in text and f"(default: {field.default!r})" in text, name
    assert "None" not in text and ("--resume" in text) == (rung != "v0_bigram")


@pytest.mark.parametrize("rung", RUNGS[1:] + VARIANTS, indirect=True)
def test_resume_from_the_command_line_goes_on(rung, trained):
    folder, _ = trained(rung)
    process = run_rung(rung, "--resume", "--max_steps=20", "--out_dir", f"runs/{rung}", cwd=folder)
    assert process.returncode == 0, process.stderr
    metrics = json.loads((folder / "runs" / rung / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["steps"] == 20 and [p["step"] for p in metrics["history"]] == [5, 10, 12, 15, 20]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one child process")
def test_ctrl_c(rung, folder):
    module = importlib.import_module(rung)
    run_here(rung, *tiny_flags(module), cwd=folder)
    checkpoint = folder / "runs" / rung / "checkpoint.pt"
    before = checkpoint.read_bytes()
    args = command(rung, *tiny_flags(module, max_steps=10_000_000, eval_interval=10))
    process = subprocess.Popen(
        args, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )
    text = ""
    while "tokens/s" not in text:  # it trains
        text += process.stderr.read(1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode not in (0, -signal.SIGINT) and "Traceback" not in stderr
    last_line = stderr.strip().splitlines()[-1]
    assert "stopped" in last_line
    if rung == "v0_bigram":
        assert checkpoint.read_bytes() == before  # a bigram trains in seconds: nothing to resume
    else:
        assert "--resume" in last_line
        step = torch.load(checkpoint, weights_only=True)["step"]
        assert f"step {step} " in last_line and step > 10
        args = ["--resume", f"--max_steps={step + 3}", "--max_new_tokens=5"]
        assert run_rung(rung, *args, cwd=folder).returncode == 0
        assert torch.load(checkpoint, weights_only=True)["step"] == step + 3


def test_bad_input_is_refused_in_one_sentence_and_harms_nothing(rung, trained):
    folder, _ = trained(rung)
    checkpoint = folder / "runs" / rung / "checkpoint.pt"
    before = {path: path.read_bytes() for path in checkpoint.parent.iterdir()}
    (folder / "short.txt").write_text("too short", encoding="utf-8")
    (folder / "latin1.txt").write_bytes("caf\xe9 ".encode("latin-1") * 1000)
    (folder / "afolder").mkdir(exist_ok=True)

    def run(*flags):
        return run_here(rung, *flags, cwd=folder)

    assert refused(run_rung(rung, "--data=nowhere.txt", cwd=folder), "nowhere.txt", "--data")
    assert refused(run("--data=afolder"), "afolder", "--data")
    assert refused(run("--data=latin1.txt"), "latin1.txt", "UTF-8")
    assert refused(run("--data=short.txt"), "short.txt", "too short")
    assert refused(run("--prompt=\u20ac"), "\u20ac", "vocabulary")
    assert refused(run("--sample", "--prompt=\u20ac"), "\u20ac", "vocabulary")
    assert refused(run("--batch_size=0"), "--batch_size 0")
    assert refused(run("--learning_rate=-1"), "--learning_rate -1")
    assert refused(run("--learning_rate=nan"), "--learning_rate nan")
    assert refused(run("--max_steps=many"), "--max_steps", "many")
    assert refused(run("--no_such_flag=1"), "--no_such_flag")
    assert refused(run("--device=abacus"), "abacus", "cpu")
    assert refused(run("--out_dir=input.txt"), "input.txt")
    assert before == {path: path.read_bytes() for path in checkpoint.parent.iterdir()}


def test_bad_checkpoints_are_refused_in_one_sentence(rung, trained):
    folder, _ = trained(rung)
    good = (folder / "runs" / rung / "checkpoint.pt").read_bytes()
    other = "v1_mlp" if rung == "v0_bigram" else "v0_bigram"
    foreign = trained(other)[0] / "runs" / other / "checkpoint.pt"
    modes = ["--sample"] if rung == "v0_bigram" else ["--sample", "--resume"]
    for name, content in {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "text": b"not a checkpoint",
        "foreign": foreign.read_bytes(),
    }.items():
        (folder / name).mkdir()
        (folder / name / "checkpoint.pt").write_bytes(content)
        for mode in modes:
            assert refused(
                run_here(rung, mode, "--out_dir", name, cwd=folder), f"{name}", "checkpoint", "train"
            )
            assert (folder / name / "checkpoint.pt").read_bytes() == content
    torch.save({"weights": torch.zeros(3)}, folder / "text" / "checkpoint.pt")
    assert refused(run_here(rung, "--sample", "--out_dir=text", cwd=folder), "text", "checkpoint")
    for mode in modes:
        assert refused(run_here(rung, mode, "--out_dir=nothing", cwd=folder), "nothing", "train first")
    if rung != "v0_bigram":
        for mode in modes:
            assert refused(run_here(rung, mode, "--n_embd=32", cwd=folder), "--n_embd 16", "train anew")


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(rung, folder):
    module = importlib.import_module(rung)
    assert run_here(rung, *tiny_flags(module), cwd=folder).returncode == 0
    checkpoint = folder / "runs" / rung / "checkpoint.pt"
    before = checkpoint.read_bytes()
    flags = tiny_flags(module, learning_rate=1e38, max_steps=40, eval_interval=40)
    assert refused(run_here(rung, *flags, cwd=folder), "not finite", "--learning_rate")
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ("rung", "flag", "words"),
    [
        ("v2_attention", "--n_head=3", ["--n_embd 128", "--n_head 3"]),
        ("v3_gpt", "--n_head=3", ["--n_embd", "--n_head 3"]),
        ("v3_gpt", "--dropout=1", ["--dropout"]),
        ("v3_gpt", "--top_p=1.5", ["--top_p"]),
        ("v3_gpt", "--temperature=0", ["--temperature 0"]),
        ("v3_gpt", "--top_k=-1", ["--top_k -1"]),
    ],
)
def test_impossible_values_of_single_rungs(rung, flag, words, folder):
    assert refused(run_here(rung, flag, cwd=folder), *words)
    assert not (folder / "runs").exists()


def test_any_utf8_text_can_be_learned(rung, folder):
    text = "Ein Text ohne Zeilenumbruch, \u00fcber K\u00e4se \U0001f9c0 und \u4e2d\u6587. " * 30
    (folder / "other.txt").write_text(text, encoding="utf-8")
    module = importlib.import_module(rung)
    flags = [*tiny_flags(module), "--data=other.txt", "--prompt=K\u00e4se \U0001f9c0"]
    process = run_here(rung, *flags, cwd=folder)
    assert process.returncode == 0, process.stderr
    sample = (folder / "runs" / rung / "sample.txt").read_text(encoding="utf-8")
    assert sample.startswith("K\u00e4se \U0001f9c0") and set(sample) <= set(text)
