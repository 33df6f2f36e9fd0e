"""What all tests share: the rungs, small settings and texts for them, a way to run one as a user does."""

import importlib
import os
import re
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from io import BytesIO, TextIOWrapper
from pathlib import Path
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"  # the tests run in several processes already
os.environ["MPLBACKEND"] = "Agg"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import matplotlib.pyplot as plt  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
NUMBERS = {path.stem: int(re.findall(r"\d+", path.stem)[0]) for path in ROOT.glob("v[0-9]*_*.py")}
# v8 and v9 learn from instructions, not from text: tests/test_lora.py is about them.
RUNGS = sorted((name for name in NUMBERS if NUMBERS[name] not in (8, 9)), key=NUMBERS.get)
# What must hold for a rung must hold for every kind of position: "RUNG FLAG=VALUE ..."
VARIANTS = [f"v4_rope_alibi position={name}" for name in ("learned", "sinusoidal", "alibi", "none")]
TINY = dict(block_size=8, batch_size=4, window=3, n_embd=16, n_head=2, n_layer=2, n_hidden=16, warmup_steps=3)
TINY |= dict(max_steps=12, eval_interval=5, eval_tokens=300, max_new_tokens=20, tokenizer="char", dropout=0.0)
TINY |= dict(base="none")  # v7: train a model


def tiny_flags(module, **changes):
    """Command-line flags of small settings for a rung's module, as far as it has them."""
    known = {field.name for field in fields(module.Config)}
    settings = {name: value for name, value in TINY.items() if name in known} | changes
    return [f"--{name}={value}" for name, value in settings.items()]


def tiny_config(module, **changes):
    """A Config of small settings for a rung's module."""
    known = {field.name for field in fields(module.Config)}
    return module.Config(**({name: value for name, value in TINY.items() if name in known} | changes))


def training_folder(rung, out):
    """Where a run in folder `out` keeps the checkpoint of its training: that of v7 is its base."""
    return out / "base" if NUMBERS[rung] == 7 else out


def command(rung, *flags):
    """The command line, as a list, that runs a rung in this Python."""
    return [sys.executable, str(ROOT / f"{rung}.py"), *map(str, flags)]


def run_rung(rung, *flags, cwd):
    """Run a rung as a user does, in the folder `cwd`; return the finished process with its texts."""
    return subprocess.run(command(rung, *flags), cwd=cwd, capture_output=True, encoding="utf-8", timeout=120)


def run_here(rung, *flags, cwd):
    """The same inside this process, as `__main__`, which saves the second that importing torch takes."""
    stdout, stderr = (TextIOWrapper(BytesIO(), encoding="utf-8", newline="\n") for _ in range(2))
    code, back = 0, os.getcwd()
    argv = command(rung, *flags)[1:]
    os.chdir(cwd)
    try:
        with patch.object(sys, "argv", argv), redirect_stdout(stdout), redirect_stderr(stderr):
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:  # Python itself prints a text that is given to sys.exit, and exits with 1
        code = 1 if isinstance(end.code, str) else end.code or 0
        stderr.write(f"{end.code}\n" if isinstance(end.code, str) else "")
    finally:
        os.chdir(back)
        plt.close("all")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    texts = []
    for stream in (stdout, stderr):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8"))
    return subprocess.CompletedProcess(argv, code, *texts)


@pytest.fixture(autouse=True)
def no_open_figures():
    """Close the figures that a test's runs have drawn."""
    yield
    plt.close("all")


@pytest.fixture(params=RUNGS + VARIANTS)
def rung(request, monkeypatch):
    """Each rung's name in turn; for a variant the small settings have its flags."""
    name, *flags = request.param.split()
    for flag in flags:
        monkeypatch.setitem(TINY, *flag.split("="))
    return name


@pytest.fixture
def module(rung):
    """Each rung's module in turn, variants as for `rung`."""
    return importlib.import_module(rung)


@pytest.fixture
def folder(tmp_path):
    """A folder to work in that holds an input.txt of 6,000 characters of Shakespeare."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[:6000]
    (tmp_path / "input.txt").write_text(text, encoding="utf-8", newline="\n")
    return tmp_path
