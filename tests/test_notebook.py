"""The notebook: it runs, what it shows was made by its code, and it holds no model of its own."""

import ast
import base64
import copy
import importlib.util
import re
import subprocess
import sys

import build_notebook
import nbformat
import pytest
from conftest import ROOT

PATH = ROOT / "notebooks" / "walkthrough.ipynb"
REBUILD = "give this command: python tools/build_notebook.py"
RUNGS = {"v0_bigram", "v1_mlp", "v2_attention", "v3_gpt", "v4_rope_alibi", "bpe_tokenizer"}


@pytest.fixture
def notebook():
    """The notebook as it is committed."""
    return nbformat.read(PATH, as_version=4)


def code_cells(notebook):
    """Its cells of code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    """Its text, without what stands in backquotes."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return re.sub(r"`[^`]+`", "", "\n".join(texts))


def printed(notebook):
    """All that its cells have printed."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(notebook):
    """Its pictures as bytes."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    data = [output.data for output in outputs if output.output_type == "display_data"]
    return [base64.b64decode(item["image/png"]) for item in data if "image/png" in item]


def python(notebook):
    """The code of all cells, without Jupyter's own commands, as a tree."""
    lines = "\n".join(cell.source for cell in code_cells(notebook)).splitlines()
    return ast.parse("\n".join(line for line in lines if not line.startswith("%")))


def test_it_runs_from_top_to_bottom(notebook):
    fresh = copy.deepcopy(notebook)
    for cell in code_cells(fresh):
        cell.outputs, cell.execution_count = [], None
    build_notebook.run(fresh)  # a cell that fails raises its error here
    assert [cell.execution_count for cell in code_cells(fresh)] == [*range(1, len(code_cells(fresh)) + 1)]
    assert len(pictures(fresh)) == len(pictures(notebook))
    assert all(picture.startswith(b"\x89PNG") for picture in pictures(fresh))


def test_its_outputs_were_made_by_its_code(notebook):
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == [*range(1, len(counts) + 1)], REBUILD
    assert notebook.metadata["outputs_of"] == build_notebook.fingerprint(notebook), REBUILD
    kinds = {output.output_type for cell in code_cells(notebook) for output in cell.outputs}
    assert kinds == {"stream", "display_data"}, "there is an output of an unexpected kind, perhaps an error"
    silent = [cell.source for cell in code_cells(notebook) if not cell.outputs]
    assert not [source for source in silent if re.search(r"^(print\(|plt\.show)", source, re.MULTILINE)], (
        REBUILD
    )


def test_a_changed_cell_is_noticed(notebook):
    code_cells(notebook)[-1].source += "\nprint()"
    assert notebook.metadata["outputs_of"] != build_notebook.fingerprint(notebook)


def test_it_is_small(notebook):
    assert PATH.stat().st_size < 600_000
    assert len(pictures(notebook)) >= 9
    assert max(map(len, pictures(notebook))) < 100_000


def test_it_holds_no_second_implementation(notebook):
    tree = python(notebook)
    assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    forbidden = {
        "Linear",
        "Embedding",
        "LayerNorm",
        "Module",
        "Parameter",
        "optim",
        "multinomial",
        "no_grad_",
    }
    assert not names & forbidden
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported >= RUNGS


def test_every_figure_in_the_text_is_one_that_a_cell_printed(notebook):
    figures = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", prose(notebook))
    assert [figure for figure in figures if figure not in printed(notebook)] == []


def test_its_parts_are_numbered_and_each_asks_a_question(notebook):
    parts = re.split(r"^## (\d+)\. ", prose(notebook), flags=re.MULTILINE)[1:]
    assert parts[::2] == [str(n) for n in range(1, len(parts) // 2 + 1)]
    for part in parts[1:-2:2]:
        assert part.count("**Question.**") == part.count("<details><summary>Answer</summary>\n\n") == 1, part
        assert part.count("</details>") == 1 and "**The idea: " in part, part


def test_its_links_lead_to_files(notebook):
    links = re.findall(r"\]\(([^)]+)\)", prose(notebook))
    assert links
    assert [link for link in links if not (PATH.parent / link).exists()] == []


# ------------------------------------------- the first cell -------------------------------------------


@pytest.fixture
def first(notebook):
    """The code of the first cell, which finds the repository or fetches it."""
    return code_cells(notebook)[0].source


def run_first(code, folder):
    """Run the first cell's code in a folder, then print what it made the current one."""
    command = [sys.executable, "-c", f"{code}\nprint(os.getcwd())"]
    return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", timeout=120)


def test_outside_the_repository_the_first_cell_asks_for_its_address(first, tmp_path):
    process = run_first(first, tmp_path)
    assert process.returncode == 1
    assert (
        process.stderr == "error: the scripts are not here; write the repository's address into REPOSITORY\n"
    )


def test_the_first_cell_fetches_the_repository(first, tmp_path):
    """Once: run again, from the folder that it has made the current one, it finds the scripts there."""
    origin, colab = tmp_path / "origin", tmp_path / "colab"
    origin.mkdir()
    colab.mkdir()
    for name in ("v0_bigram.py", "requirements.txt"):
        (origin / name).write_bytes((ROOT / name).read_bytes())
    git = [
        "git",
        "-C",
        str(origin),
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b.c",
        "-c",
        "commit.gpgsign=false",
    ]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    assert 'REPOSITORY = ""' in first
    named = first.replace('REPOSITORY = ""', f"REPOSITORY = {str(origin)!r}")
    for folder in (colab, colab / "ladder"):
        process = run_first(named, folder)
        assert process.returncode == 0, process.stderr
        assert process.stdout.strip().endswith("ladder")
    assert (colab / "ladder" / "v0_bigram.py").exists() and not (colab / "ladder" / "ladder").exists()

    wrong = first.replace('REPOSITORY = ""', f"REPOSITORY = {str(tmp_path / 'nowhere')!r}")
    process = run_first(wrong, tmp_path)
    assert process.returncode == 1
    assert process.stderr.startswith("error: cannot fetch ") and "Traceback" not in process.stderr


def test_the_first_cell_installs_what_is_missing_and_no_more(first, monkeypatch):
    found, commands = importlib.util.find_spec, []
    monkeypatch.chdir(PATH.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "regex" else found(name))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    exec(first, {})
    assert [command[1:] for command in commands] == [
        ["-m", "pip", "install", "-q", "-c", "requirements.txt", "regex"]
    ]
