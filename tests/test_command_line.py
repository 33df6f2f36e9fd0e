"""Each rung from the command line, as a user runs it: what it makes, what it refuses, what it never harms."""

import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import matplotlib.image
import pytest
import torch
from common import number
from conftest import (
    ROOT,
    RUNGS,
    TINY,
    VARIANTS,
    command,
    run_here,
    run_rung,
    tiny_config,
    tiny_flags,
    training_folder,
)

from bpe_tokenizer import BPETokenizer

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
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    lines = [line for line in lines if "step/s" not in line and "merge/s" not in line]  # no progress bars
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
    weights = torch.load(training_folder(rung, out) / "checkpoint.pt", weights_only=True)["model"]
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
    before = {path: path.read_bytes() for path in (folder / "runs" / rung).rglob("*.*")}
    args = ["--sample", "--prompt", "First Citizen:", "--max_new_tokens=30"]
    processes = [run_here(rung, *args, *more, cwd=folder) for more in ([], [], ["--seed=7"], ["--greedy"])]
    texts = [process.stdout for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert all(text.startswith("First Citizen:") and len(text) == 14 + 30 + 1 for text in texts)
    assert texts[0] == texts[1] != texts[2]
    assert before == {path: path.read_bytes() for path in before}


def test_help_names_every_flag_with_meaning_and_default(rung, tmp_path):
    process = run_here(rung, "--help", cwd=tmp_path)
    module = importlib.import_module(rung)
    text = " ".join(process.stdout.split())
    assert process.returncode == 0 and "--sample" in text and "--evaluate" in text
    for name, field in module.Config.__dataclass_fields__.items():
        assert re.search(rf"--{name}[ ,]", text) and f"(default: {field.default!r})" in text, name
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
    checkpoint = training_folder(rung, folder / "runs" / rung) / "checkpoint.pt"
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
    assert process.returncode != 0 and "Traceback" not in stderr
    last_line = stderr.strip().splitlines()[-1]
    if rung == "v0_bigram":
        assert checkpoint.read_bytes() == before  # a bigram trains in seconds: nothing to resume
    else:
        assert checkpoint.with_suffix(".previous.pt").read_bytes() == before
        assert "stopped" in last_line and "--resume" in last_line
        step = torch.load(checkpoint, weights_only=True)["step"]
        assert f"step {step} " in last_line and step > 10
        args = ["--resume", f"--max_steps={step + 3}", "--max_new_tokens=5"]
        assert run_rung(rung, *args, cwd=folder).returncode == 0
        assert torch.load(checkpoint, weights_only=True)["step"] == step + 3


def test_bad_input_is_refused_in_one_sentence_and_harms_nothing(rung, trained):
    folder, _ = trained(rung)
    out = folder / "runs" / rung
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    (folder / "short.txt").write_text("too short", encoding="utf-8")
    (folder / "latin1.txt").write_bytes("caf\xe9 ".encode("latin-1") * 1000)
    (folder / "afolder").mkdir(exist_ok=True)

    anew = ["--base=none"] if number(rung) == 7 else []  # else the trained model would be taken

    def run(*flags):
        return run_here(rung, *anew, *flags, cwd=folder)

    assert refused(run_rung(rung, *anew, "--data=nowhere.txt", cwd=folder), "nowhere.txt", "--data")
    assert refused(run("--data=afolder"), "afolder", "--data")
    assert refused(run("--data=latin1.txt"), "latin1.txt", "UTF-8")
    assert refused(run("--data=short.txt"), "short.txt", "too short")
    char = ["--tokenizer=char"] if number(rung) >= 4 else []  # bytes can write any text
    assert refused(run(*char, "--prompt=\u20ac"), "\u20ac", "vocabulary")
    assert refused(run_here(rung, "--sample", "--prompt=\u20ac", cwd=folder), "\u20ac", "vocabulary")
    assert refused(run("--batch_size=0"), "--batch_size 0")
    assert refused(run("--learning_rate=-1"), "--learning_rate -1")
    assert refused(run("--learning_rate=nan"), "--learning_rate nan")
    assert refused(run("--max_steps=many"), "--max_steps", "many")
    assert refused(run("--no_such_flag=1"), "--no_such_flag")
    assert refused(run("--device=abacus"), "abacus", "cpu")
    assert refused(run("--out_dir=input.txt"), "input.txt")
    assert before == {path: path.read_bytes() for path in out.rglob("*.*")}


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
        paths = {folder / name / "checkpoint.pt", training_folder(rung, folder / name) / "checkpoint.pt"}
        for path in sorted(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        for mode in modes:
            assert refused(
                run_here(rung, mode, "--out_dir", name, cwd=folder), f"{name}", "checkpoint", "train"
            )
            assert all(path.read_bytes() == content for path in paths)
    torch.save({"weights": torch.zeros(3)}, folder / "text" / "checkpoint.pt")
    assert refused(run_here(rung, "--sample", "--out_dir=text", cwd=folder), "text", "checkpoint")
    for mode in modes:
        assert refused(run_here(rung, mode, "--out_dir=nothing", cwd=folder), "nothing", "train first")
    if rung != "v0_bigram":
        for mode in modes:
            assert refused(run_here(rung, mode, "--n_embd=32", cwd=folder), "--n_embd", "16", "train anew")


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(rung, folder):
    module = importlib.import_module(rung)
    assert run_here(rung, *tiny_flags(module), cwd=folder).returncode == 0
    checkpoint = training_folder(rung, folder / "runs" / rung) / "checkpoint.pt"
    before = checkpoint.read_bytes()
    flags = tiny_flags(module, learning_rate=1e38, max_steps=40, eval_interval=40)
    if rung == "v0_bigram":  # a table of large logits has a large loss, but a finite one
        end = "    return total / (y != -100).sum().item()"
        process = copy_with(rung, folder, (end, f"{end} * math.inf"))("--max_steps=2")
    else:
        process = run_here(rung, *flags, cwd=folder)
    assert refused(process, "not finite", "--learning_rate")
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
        ("v3_gpt", "--greedy --temperature=0.5", ["--greedy", "--temperature"]),
    ],
)
def test_impossible_values_of_single_rungs(rung, flag, words, folder):
    assert refused(run_here(rung, *flag.split(), cwd=folder), *words)
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


# ------------------------------------ a flag takes effect or is refused ------------------------------------

# For every field of every Config another value than the small settings have.
OTHER = dict(data="other.txt", out_dir="nowhere", device="cpu", seed=7, block_size=4, batch_size=2, window=2)
OTHER |= dict(n_embd=32, n_head=1, n_layer=1, n_hidden=8, init_std=0.5, position="none")
OTHER |= dict(tokenizer="bpe.json", max_steps=13, learning_rate=0.5, warmup_steps=11, lr_floor=0.9, beta2=0.5)
OTHER |= dict(weight_decay=9.0, dropout=0.5, grad_clip=1e-4, eval_interval=4, eval_tokens=200, greedy=True)
OTHER |= dict(temperature=0.3, top_k=1, top_p=0.2, prompt="The", max_new_tokens=9, context=2)
OTHER |= dict(position_base=3.0, position_scale=9.0, preset="gpt2", init_from="model", vocab_size=300)
OTHER |= dict(grad_accum=2, gradient_checkpointing=True, precision="fp16", optimizer="adamw", compile=True)
OTHER |= dict(base="auto", quantize="int4", group_size=64, stream=True)
KEPT = {"data", "out_dir", "block_size", "batch_size", "window", "n_embd", "n_head", "n_layer", "n_hidden"}
KEPT |= {"init_std", "position", "position_base", "position_scale", "tokenizer", "eval_tokens"}
KEPT |= {"preset", "init_from", "vocab_size", "grad_accum", "optimizer", "base"}
SAMPLING = {"seed", "greedy", "temperature", "top_k", "top_p", "prompt", "max_new_tokens", "context"}
SAMPLING |= {"device", "position_base", "position_scale", "stream"}  # what --sample takes


def other(name, value, module):
    """Another value for a field; a learner's new field has none in OTHER."""
    if name == "precision" and "fp16" not in module.PRECISIONS:
        return "fp32" if value == "bf16" else "bf16"
    if name in OTHER:
        return OTHER[name]
    return not value if isinstance(value, bool) else value + type(value)(1)


def may_change(module, name, mode):
    """Whether a mode takes another value for this field; the table above says so, not the rung."""
    known = name in OTHER or name == "tokenizer"
    if not known:
        return name in module.MAY_CHANGE[mode]
    return name not in KEPT if mode == "resume" else name in SAMPLING


def flag(name, value):
    no = "" if value else "no-"
    return f"--{no}{name}" if isinstance(value, bool) else f"--{name}={value}"


def told(process):
    """What a run printed, without the speeds that v7 measures."""
    return re.sub(
        r"^ *(ms_per_token|new_tokens_|the_same_for_|gb_read_|share_of_|memory ).*\n",
        "",
        process.stdout,
        flags=re.M,
    )


def outcome(rung, out):
    """What a run made, without what no two runs share."""
    checkpoint = torch.load(training_folder(rung, out) / "checkpoint.pt", weights_only=True)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    history = [{k: v for k, v in point.items() if k != "seconds"} for point in metrics["history"]]
    weights = {name: weight.tolist() for name, weight in checkpoint["last"].items()}
    losses = [numbers["val_loss"] for numbers in [metrics, *metrics.get("compared", {}).values()]]
    return weights, history, losses, (out / "sample.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of small settings that Ctrl-C has stopped after step 7 of 12; returns its folder."""
    done = {}

    def stop(rung):
        if rung not in done:
            folder = tmp_path_factory.mktemp(rung)
            text = (ROOT / "input.txt").read_text(encoding="utf-8")[:6000]
            for name in ("input.txt", "other.txt"):
                (folder / name).write_text(text, encoding="utf-8", newline="\n")
            BPETokenizer.train(text, 300).save(folder / "bpe.json")
            module = importlib.import_module(rung)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.setattr(sys, "argv", [rung, *tiny_flags(module, eval_interval=3)])
                rate = module.learning_rate_at

                def learning_rate_at(step, config):
                    if step == 7:
                        signal.raise_signal(signal.SIGINT)
                    return rate(step, config)

                patch.setattr(module, "learning_rate_at", learning_rate_at)
                before = signal.getsignal(signal.SIGINT)
                with pytest.raises(SystemExit, match="step 7 and saved"):
                    module.main()
                signal.signal(signal.SIGINT, before)
            done[rung] = folder
        return done[rung]

    return stop


@pytest.mark.parametrize("rung", RUNGS[1:])
def test_a_flag_of_a_resumed_run_takes_effect_or_is_refused(rung, stopped, tmp_path):
    module = importlib.import_module(rung)
    folder = tmp_path / "copy"
    shutil.copytree(stopped(rung), folder)
    kept = shutil.copytree(folder / "runs", folder / "kept")

    def resume(*flags):
        shutil.rmtree(folder / "runs")
        shutil.copytree(kept, folder / "runs")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return run_here(rung, "--resume", *flags, cwd=folder), before

    process, _ = resume()
    assert process.returncode == 0, process.stderr
    plain = outcome(rung, folder / "runs" / rung)
    saved = torch.load(training_folder(rung, kept / rung) / "checkpoint.pt", weights_only=True)["config"]
    saved = module.Config(**saved)
    for name in (field.name for field in fields(module.Config)):
        value = other(name, getattr(saved, name), module)
        assert getattr(saved, name) != value, f"OTHER needs another {name}"
        process, before = resume(flag(name, value))
        if not may_change(module, name, "resume"):
            assert refused(process, value if name == "out_dir" else f"--{name}"), name
            after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            assert before == after, name
        else:
            assert process.returncode == 0, f"{name}: {process.stderr}"
            metrics = json.loads((folder / "runs" / rung / "metrics.json").read_text(encoding="utf-8"))
            assert metrics["config"][name] == value
            changed = outcome(rung, folder / "runs" / rung) != plain
            # The device was this one already, and checkpointing changes no bit. Fused operations may.
            same = name in ("device", "gradient_checkpointing", "stream")
            assert changed != same or name == "compile", name


@pytest.mark.parametrize("rung", RUNGS)
def test_a_flag_of_a_finished_run_takes_effect_or_is_refused(rung, trained, tmp_path):
    """Also in --resume when no step is left, where a training flag would do nothing."""
    module = importlib.import_module(rung)
    folder = tmp_path / "copy"
    shutil.copytree(trained(rung)[0], folder)
    shutil.copy(folder / "input.txt", folder / "other.txt")
    saved = torch.load(folder / "runs" / rung / "checkpoint.pt", weights_only=True)
    modes = ["--sample", "--evaluate"] + (["--resume"] if rung != "v0_bigram" else [])
    plain = {mode: run_here(rung, mode, cwd=folder) for mode in modes}
    before = {path: path.read_bytes() for path in training_folder(rung, folder / "runs" / rung).glob("*.pt")}
    for mode in modes:
        assert plain[mode].returncode == 0, plain[mode].stderr
        for name in (field.name for field in fields(module.Config)):
            if name == "max_steps" and mode == "--resume":
                continue
            value = other(name, saved["config"][name], module)
            process = run_here(rung, mode, flag(name, value), cwd=folder)
            takes = may_change(module, name, "sample") and mode != "--evaluate"
            takes |= name in ("quantize", "group_size") and mode == "--resume"  # which quantizes anew
            if name == "device" or (takes and (mode == "--sample" or name not in KEPT)):
                assert process.returncode == 0, f"{mode} {name}: {process.stderr}"
                changed = told(process) != told(plain[mode])
                assert changed == (name not in ("device", "stream")), f"{mode} {name}"
            else:
                assert refused(process, value if name == "out_dir" else f"--{name}"), name
            if mode == "--resume":
                metrics = json.loads((folder / "runs" / rung / "metrics.json").read_text(encoding="utf-8"))
                assert metrics["config"]["learning_rate"] == saved["config"]["learning_rate"]
    assert before == {path: path.read_bytes() for path in before}


def test_evaluate_prints_the_exact_losses_and_writes_nothing(rung, trained):
    folder, _ = trained(rung)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    evaluated = run_here(rung, "--evaluate", cwd=folder)
    metrics = json.loads((folder / "runs" / rung / "metrics.json").read_text(encoding="utf-8"))
    assert evaluated.returncode == 0 and f"{metrics['val_loss']:.4f}" in evaluated.stdout
    assert f"{metrics['train_loss']:.4f}" in evaluated.stdout and "step/s" not in evaluated.stderr
    assert (folder / "runs" / rung / "sample.txt").read_text(encoding="utf-8") not in evaluated.stdout
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_backslash_n_in_a_prompt_is_a_new_line(rung, trained):
    folder, _ = trained(rung)
    process = run_here(rung, "--sample", r"--prompt=First\nCitizen", "--max_new_tokens=3", cwd=folder)
    assert process.stdout.startswith("First\nCitizen")


# ------------------------------------ nothing is lost, nothing lies ------------------------------------


@pytest.mark.parametrize("rung", RUNGS[1:])
def test_a_finished_run_survives_a_new_one(rung, folder):
    module = importlib.import_module(rung)
    out = training_folder(rung, folder / "runs" / rung)
    assert run_here(rung, *tiny_flags(module), cwd=folder).returncode == 0
    sample = (folder / "runs" / rung / "sample.txt").read_text(encoding="utf-8")
    finished = {path.name: path.read_bytes() for path in out.iterdir()}

    def new_run(stop_at):
        rate = module.learning_rate_at

        def learning_rate_at(step, config):
            if step == stop_at:
                signal.raise_signal(signal.SIGINT)
            return rate(step, config)

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", [rung, *tiny_flags(module, seed=2, max_steps=20)])
            patch.setattr(module, "learning_rate_at", learning_rate_at)
            before = signal.getsignal(signal.SIGINT)
            with pytest.raises(SystemExit) as end:
                module.main()
            signal.signal(signal.SIGINT, before)
        return str(end.value)

    assert "nothing is saved" in new_run(3)  # the first estimate is after step 5
    assert finished == {path.name: path.read_bytes() for path in out.iterdir()}
    assert "step 7 and saved" in new_run(7)
    assert (out / "checkpoint.previous.pt").read_bytes() == finished["checkpoint.pt"]
    assert (out / "metrics.previous.json").read_bytes() == finished["metrics.json"]
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 7
    process = run_here(rung, "--sample", cwd=folder)
    told = "rename checkpoint.previous.pt to checkpoint.pt" in process.stderr
    assert process.returncode == 0 and told == (number(rung) != 7)  # whose quantized model is still there
    assert "step 8 and saved" in new_run(8)  # an unfinished run takes no finished one's place
    assert (out / "checkpoint.previous.pt").read_bytes() == finished["checkpoint.pt"]
    (out / "checkpoint.previous.pt").replace(out / "checkpoint.pt")
    assert "step 7 and saved" in new_run(7)  # back in its place, without its metrics, it is kept again
    assert (out / "checkpoint.previous.pt").read_bytes() == finished["checkpoint.pt"]
    (out / "checkpoint.previous.pt").replace(out / "checkpoint.pt")
    process = run_here(rung, "--sample", cwd=folder)
    assert process.returncode == 0 and process.stderr == ""
    assert process.stdout.rstrip("\n") == sample.rstrip("\n")


@pytest.mark.parametrize("rung", RUNGS[1:])
def test_a_renamed_folder_is_written_where_it_was_read(rung, trained, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(trained(rung)[0], folder)
    (folder / "runs" / rung).rename(folder / "mine")
    shutil.rmtree(folder / "runs")  # also the ids that are kept in it
    process = run_here(rung, "--resume", "--max_steps=25", "--out_dir=mine", cwd=folder)
    assert process.returncode == 0, process.stderr
    assert json.loads((folder / "mine/metrics.json").read_text(encoding="utf-8"))["steps"] == 25
    assert not (folder / "runs" / rung).exists()


@pytest.mark.parametrize("mode", ["--sample", "--evaluate", "--resume"])
def test_checkpoints_that_lack_a_part_or_have_another_shape(rung, mode, trained, tmp_path):
    if mode == "--resume" and rung == "v0_bigram":
        pytest.skip("v0 resumes nothing")
    folder = trained(rung)[0]
    place = training_folder(rung, Path()) if mode == "--resume" else Path()
    good = torch.load(folder / "runs" / rung / place / "checkpoint.pt", weights_only=True)
    name = next(iter(good["model"]))
    bad = [{key: value for key, value in good.items() if key != part} for part in good]
    for part in good.keys() - {"version", "config"}:
        kinds = [
            value for value in (None, "x", [], torch.zeros(2)) if not isinstance(value, type(good[part]))
        ]
        bad += [good | {part: value} for value in kinds[:: 1 if rung == "v1_mlp" else 3]]
    bad += [good | {"config": good["config"] | {"block_size": value}} for value in ("8", [8], None, 8.5, -1)]
    bad += [good | {"config": good["config"] | {"seed": "x"}}, good | {"config": {"unknown": 1}}]
    bad += [good | {"config": good["config"] | {"prompt": 5}}, good | {"config": None}, [good], 5]
    bad += [good | {"model": good["model"] | {name: torch.zeros(2, 3)}}]
    bad += [good | {"model": {"other": torch.zeros(2)}}, good | {"version": 3}]
    for i, checkpoint in enumerate(bad):
        out = tmp_path / str(i)
        (out / place).mkdir(parents=True)
        torch.save(checkpoint, out / place / "checkpoint.pt")
        assert refused(run_here(rung, mode, f"--out_dir={out}", cwd=folder)), i
        assert [path.name for path in out.rglob("*.*")] == ["checkpoint.pt"]


def copy_with(rung, folder, *changes):
    """Run a copy of a rung, edited as a learner would, in small settings."""
    text = (ROOT / f"{rung}.py").read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / f"{rung}.py").write_text(text, encoding="utf-8")
    flags = tiny_flags(importlib.import_module(rung))

    def run(*more, modes=()):
        args = [sys.executable, f"{rung}.py", *(modes or flags), *more]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(args, cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=120)

    return run


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("line", ["a, b = 1, 2, 3", "open('no such file')", "{}['key']"])
def test_a_mistake_of_the_learner_shows_its_traceback(rung, line, folder):
    place = "    model.eval()\n    for _ in range(config.max_new_tokens):"
    process = copy_with(rung, folder, (place, f"    {line}\n{place}"))("--max_steps=2")
    assert process.returncode == 1 and "Traceback" in process.stderr and line in process.stderr


@pytest.mark.parametrize("rung", RUNGS)
def test_a_new_field_needs_no_comment_may_be_bool_and_is_guarded(rung, folder):
    field = "    max_new_tokens: int = 500  # tokens to sample\n"
    run = copy_with(
        rung, folder, (field, field + "    squared: bool = False\n    shape: int = 3  # 100% new\n")
    )
    process = run("--help", modes=["--max_steps=2"])
    assert (
        process.returncode == 0 and "--squared, --no-squared" in process.stdout and "100%" in process.stdout
    )
    for flags, value in (([], False), (["--squared"], True), (["--no-squared"], False)):
        assert run("--max_steps=6", *flags).returncode == 0
        metrics = json.loads((folder / f"runs/{rung}/metrics.json").read_text(encoding="utf-8"))
        assert metrics["config"]["squared"] is value
    modes = ["--sample", "--evaluate"] + (["--resume"] if rung != "v0_bigram" else [])
    for mode in modes:
        assert refused(run("--squared", modes=[mode]), "--squared", "False")
        assert refused(run("--shape=4", modes=[mode]), "--shape", "3")
        assert run("--no-squared", "--shape=3", modes=[mode]).returncode == 0


@pytest.mark.parametrize("rung", [*RUNGS, "bpe_tokenizer"])
def test_ctrl_c_during_an_import_shows_no_traceback(rung, tmp_path):
    slow = "numpy" if rung == "bpe_tokenizer" else "torch"
    (tmp_path / f"{slow}.py").write_text(
        "import signal\nsignal.raise_signal(signal.SIGINT)\n", encoding="utf-8"
    )
    (tmp_path / "matplotlib").mkdir()  # imports numpy, which nothing else here must
    for name in ("__init__", "pyplot"):
        (tmp_path / f"matplotlib/{name}.py").touch()
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    args = [sys.executable, str(ROOT / f"{rung}.py")]
    process = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, encoding="utf-8")
    assert process.returncode != 0 and process.stderr == ""


def test_stdout_may_be_any_object(rung, trained):
    folder, _ = trained(rung)
    code = f"import io, runpy, sys; sys.path.insert(0, {str(ROOT)!r}); "
    code += "sys.stdout = io.StringIO(); sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__'); sys.stderr.write(sys.stdout.getvalue())"
    args = [
        sys.executable,
        "-c",
        code,
        str(ROOT / f"{rung}.py"),
        "--sample",
        "--max_new_tokens=3",
        "--prompt=To",
    ]
    process = subprocess.run(args, cwd=folder, capture_output=True, encoding="utf-8")
    assert process.returncode == 0 and process.stderr.startswith("To")


def test_texts_that_are_empty_or_too_small(rung, folder):
    module = importlib.import_module(rung)
    (folder / "empty.txt").write_text("", encoding="utf-8")
    process = run_rung(rung, *tiny_flags(module), "--data=empty.txt", cwd=folder)
    assert refused(process, "empty.txt", "too short") and process.stderr.count("\n") == 1  # and no warning
    # The last tenth is unlike the rest: whoever learns the rest is worse off than who knows nothing.
    (folder / "unlike.txt").write_text("ab" * 900 + "aabb" * 50, encoding="utf-8")
    flags = tiny_flags(module, data="unlike.txt", max_steps=60, eval_interval=60, learning_rate=0.1)
    flags = [flag for flag in flags if not (rung == "v0_bigram" and "learning_rate" in flag)]
    process = run_here(rung, *flags, cwd=folder)
    assert process.returncode == 0 and "note: knowing nothing gives 0.6931" in process.stdout
    flags = [*tiny_flags(module), *(["--learning_rate=1"] if rung == "v0_bigram" else [])]
    assert "note: knowing" not in run_here(rung, *flags, cwd=folder).stdout


def test_attention_picture_of_a_prompt_with_a_new_line(folder):
    flags = [*tiny_flags(importlib.import_module("v2_attention")), r"--prompt=First\nCitizen"]
    process = run_here("v2_attention", *flags, cwd=folder)
    assert process.returncode == 0 and (folder / "runs/v2_attention/attention.png").exists(), process.stderr


def test_perplexity_axis_has_the_ticks_of_the_loss(module, tmp_path):
    history = [{"step": step, "train_loss": 4 / step, "val_loss": 4.2 / step} for step in (1, 2, 3)]
    with pytest.MonkeyPatch.context() as patch:
        figures, real = [], module.plt.subplots
        patch.setattr(module.plt, "subplots", lambda **rest: figures.append(real(**rest)) or figures[-1])
        module.save_report(
            {"history": history, "compared": {}}, "", tiny_config(module, out_dir=str(tmp_path))
        )
    _, left = figures[0]
    right = left.child_axes[0]
    assert right.get_ylim() == left.get_ylim() and right.get_yticks().tolist() == left.get_yticks().tolist()
    labels = dict(zip(right.get_yticks(), [text.get_text() for text in right.get_yticklabels()], strict=True))
    assert any(
        float(label.replace(",", "")) == pytest.approx(math.exp(y), rel=1e-3) for y, label in labels.items()
    )


def test_attention_picture_of_a_text_without_glyphs_warns_of_nothing(folder):
    (folder / "other.txt").write_text("\u4e2d\u6587\u5b57 \U0001f9c0" * 300, encoding="utf-8")
    flags = [*tiny_flags(importlib.import_module("v2_attention")), "--data=other.txt"]
    process = run_rung("v2_attention", *flags, cwd=folder)
    assert process.returncode == 0 and "Glyph" not in process.stderr and "Warning" not in process.stderr


def test_an_unwritable_folder_is_refused_before_any_work(rung, folder):
    module = importlib.import_module(rung)
    process = run_here(rung, *tiny_flags(module), "--out_dir=input.txt/below", cwd=folder)
    assert refused(process, "input.txt", "--out_dir") and "step/s" not in process.stderr
    if sys.platform == "linux":  # a folder that exists, where not even root can write
        process = run_here(rung, *tiny_flags(module), "--out_dir=/proc", cwd=folder)
        assert refused(process, "/proc", "--out_dir") and "step/s" not in process.stderr
