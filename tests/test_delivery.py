"""The container and the workflows: linted where the linters are, and what the image will hold is started."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from fnmatch import fnmatch
from pathlib import Path

import pytest
from conftest import ROOT, run_here, tiny_flags

import v0_bigram as v0

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PLACES = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def in_image(name):
    """Whether .dockerignore lets a file of the project in: its last line that fits decides."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    inside = True
    for line in [line for line in lines if line and not line.startswith("#")]:
        pattern = line.removeprefix("!")
        if pattern == "*" or (name.count("/") == pattern.count("/") and fnmatch(name, pattern)):
            inside = line.startswith("!")
    return inside


@pytest.mark.parametrize(
    "command",
    [
        ["hadolint", "Dockerfile"],
        ["actionlint", *map(str, WORKFLOWS)],
        ["check-jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS)],
    ],
    ids=lambda command: command[0],
)
def test_linters_find_nothing(command):
    if not (linter := shutil.which(command[0], path=PLACES)):
        pytest.skip(f"{command[0]} is not installed")
    process = subprocess.run([linter, *command[1:]], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert process.returncode == 0, process.stdout + process.stderr


def test_the_image_holds_code_text_and_models_and_nothing_else():
    for name in (
        "serve.py",
        "v9_rlhf.py",
        "rag.py",
        "bpe_tokenizer.py",
        "input.txt",
        "requirements-serve.txt",
    ):
        assert in_image(name), name
    for name in ("runs/v8_lora/checkpoint.pt", "runs/v8_lora/metrics.json", "requirements.txt"):
        assert in_image(name), name
    for name in (".git/config", "README.md", "tests/conftest.py", "tools/export.py", "exercises/model.py"):
        assert not in_image(name), name
    for name in (".venv/x.py", "runs/v8_lora/checkpoint.previous.pt", "runs/tokens/0/train.bin", ".env"):
        assert not in_image(name), name


def test_the_image_runs_as_somebody_without_rights():
    lines = re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    order = [name for name, _ in steps]
    assert dict(steps)["USER"] == "1000" and "--uid 1000" in DOCKERFILE
    assert order.index("USER") < order.index("ENTRYPOINT") and order.count("FROM") == 1
    assert dict(steps)["FROM"].endswith("-slim") and "--torch-backend=cpu" in dict(steps)["RUN"]


@pytest.mark.parametrize("key", ["", "a key"])
def test_what_the_image_holds_can_serve_and_says_that_it_is_well(key, tmp_path):
    """The files that .dockerignore lets in, the entry point and the health check, but for the port."""
    (tmp_path / "input.txt").write_text("To be or not to be\n" * 300, encoding="utf-8")
    trained = run_here("v0_bigram", *tiny_flags(v0, block_size=16), cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    for path in ROOT.iterdir():
        if path.is_file() and in_image(path.name):
            shutil.copy(path, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    entry, check = (
        json.loads(re.search(rf"^{name}.*?(\[.+\])$", DOCKERFILE, flags=re.MULTILINE)[1])
        for name in ("ENTRYPOINT", "HEALTHCHECK")
    )
    assert entry[:2] == ["python", "serve.py"] and check[:2] == ["python", "-c"]
    env = os.environ | {"SERVE_API_KEY": key}
    check = [sys.executable, "-c", check[2].replace(":8000", f":{port}")]
    assert subprocess.run(check, env=env, capture_output=True).returncode != 0  # nobody is there yet
    args = [sys.executable, *entry[1:], "--port", str(port)]
    server = subprocess.Popen(args, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while subprocess.run(check, env=env, capture_output=True).returncode:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        wrong = subprocess.run(check, env=env | {"SERVE_API_KEY": "other"}, capture_output=True)
        assert (wrong.returncode == 0) == (not key)
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models")
        asked.add_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(asked, timeout=10) as answer:
            assert [model["id"] for model in json.load(answer)["data"]] == ["v0_bigram"]
        if key:
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10)
    finally:
        server.terminate()
        server.wait()
