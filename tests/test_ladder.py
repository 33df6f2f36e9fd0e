"""The ladder as a whole: declared changes, same rooms, allowed imports, and every published number."""

import ast
import hashlib
import importlib
import re
import subprocess
import sys
from itertools import pairwise

import pytest
import reproduce
from common import load_results
from conftest import ROOT, RUNGS

ROOMS = ["config", "data", "model", "training", "sampling", "main"]
STEPS = list(pairwise(RUNGS))
ALLOWED = {"torch", "numpy", "matplotlib", "tqdm"}
LOGS = sorted((ROOT / "logs").glob("week_*.md"))


def source(rung):
    return (ROOT / f"{rung}.py").read_text(encoding="utf-8")


def definitions(rung):
    """Top-level functions, classes and constants of a rung with their source text, decorators included."""
    text = source(rung)
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                found[target.id] = ast.get_source_segment(text, node)
    return found


def test_input_is_tiny_shakespeare_byte_for_byte():
    data = (ROOT / "input.txt").read_bytes()
    digest = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert hashlib.sha256(data).hexdigest() == digest
    assert len(data.decode("utf-8")) == 1_115_394 and len(set(data.decode("utf-8"))) == 65


@pytest.mark.parametrize(("below", "rung"), STEPS)
def test_docstring_lists_exactly_what_changed(below, rung):
    old, new = definitions(below), definitions(rung)
    actual = {
        "added": new.keys() - old.keys(),
        "changed": {name for name in new.keys() & old.keys() if new[name] != old[name]},
        "removed": old.keys() - new.keys(),
    }
    block = re.search(
        r"^Since (\w+)\.py\n  added:    (.+?)\n  changed:  (.+?)\n  removed:  (.+?)\n\n",
        source(rung),
        flags=re.M | re.S,
    )
    assert block and block[1] == below
    for kind, names in zip(("added", "changed", "removed"), block.groups()[1:], strict=True):
        listed = [] if names == "-" else re.split(r",(?: |\n {12})", names)
        assert listed == sorted(actual[kind]), f"{rung} {kind}"


@pytest.mark.parametrize("rung", RUNGS)
def test_rooms_stand_in_order(rung):
    banners = re.findall(r"^# -{10,} (\w+) -{10,}$", source(rung), flags=re.M)
    assert banners == ROOMS
    lines = {node.name: node.lineno for node in ast.parse(source(rung)).body if hasattr(node, "name")}
    at = {room: source(rung).split(f" {room} -")[0].count("\n") for room in ROOMS}
    for name, room in {
        **{"Config": "config", "CharTokenizer": "data", "get_batch": "data", "LanguageModel": "model"},
        **{"evaluate": "training", "train": "training", "generate": "sampling", "main": "main"},
    }.items():
        following = ROOMS[ROOMS.index(room) + 1 :]
        assert at[room] < lines[name] < (at[following[0]] if following else 10**6), name


@pytest.mark.parametrize("rung", RUNGS)
def test_imports_are_allowed(rung):
    allowed = ALLOWED | ({"bpe_tokenizer"} if rung >= "v4" else set())
    for node in ast.walk(ast.parse(source(rung))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.split(".")[0]
            assert top in allowed or top in sys.stdlib_module_names, top
            assert top not in RUNGS


@pytest.mark.parametrize("rung", RUNGS)
def test_config_fields_have_comments_and_classes_have_docstrings(rung):
    tree = ast.parse(source(rung))
    lines = source(rung).splitlines()
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    for field in config.body:
        if isinstance(field, ast.AnnAssign):
            assert "  # " in lines[field.end_lineno - 1], field.target.id
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "main":
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("rung", RUNGS)
def test_no_marks_of_what_is_new(rung):
    assert not re.search(r"#.*\bnew in\b|#.*\bv\d\b", source(rung))


@pytest.mark.parametrize("rung", RUNGS)
def test_docstring_result_is_the_stored_one(rung):
    line = re.search(r"^Result: .*$", ast.get_docstring(ast.parse(source(rung))), flags=re.M)[0]
    assert line == reproduce.result_line(load_results()["rungs"][rung])


def block(text, name):
    """The text between the markers of a block."""
    return re.search(rf"<!-- block: {name} -->\n(.*?)\n<!-- end -->", text, flags=re.DOTALL)[1]


def test_readme_blocks_are_made_from_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, content in reproduce.readme_blocks(load_results()).items():
        assert block(readme, name) == content, name


@pytest.mark.parametrize("log", LOGS, ids=lambda path: path.stem)
def test_tables_of_the_logs_are_made_from_the_results(log):
    text = log.read_text(encoding="utf-8")
    blocks = importlib.import_module(log.stem).tables(load_results())
    assert re.findall(r"<!-- block: (\w+) -->", text) and set(
        re.findall(r"<!-- block: (\w+) -->", text)
    ) == set(blocks)
    for name, content in blocks.items():
        assert block(text, name) == content, name


def leaves(x):
    """All numbers in nested results, those that are keys included."""
    if isinstance(x, dict):
        keys = [float(key) for key in x if re.fullmatch(r"\d+\.\d+", key)]
        return keys + [leaf for value in x.values() for leaf in leaves(value)]
    if isinstance(x, list):
        return [leaf for value in x for leaf in leaves(value)]
    return [x] if isinstance(x, int | float) else []


@pytest.mark.parametrize("path", [ROOT / "README.md", *LOGS], ids=lambda path: path.stem)
def test_numbers_in_prose_are_in_the_results(path):
    """Every number with two or more decimals is some stored result, rounded as it is written."""
    results = load_results()
    known = results if path.stem == "README" else {k: results[k] for k in ("rungs", "references", path.stem)}
    known = [abs(number) for number in leaves(known)]
    text = re.sub(
        r"<!-- block: .*?<!-- end -->|```.*?```|`[^`]*`|Python 3\.\d+",
        "",
        path.read_text("utf-8"),
        flags=re.DOTALL,
    )
    for number in re.findall(r"(?<![\w.])\d+\.\d{2,}(?![\w.]*\d)", text):
        digits = len(number.split(".")[1])
        assert any(f"{leaf:.{digits}f}" == number for leaf in known), f"{number} is not in results.json"


@pytest.mark.parametrize("path", [ROOT / "README.md", *LOGS], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_concepts_index_points_to_lines_that_exist():
    """Each `file.py: name` of README's concepts index names something that is defined in that file."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    index = readme.split("## Concepts index")[1].split("\n## ")[0]
    pointers = re.findall(r"`(v\d\w+)\.py: ([\w.]+)`", index)
    assert len(pointers) > 20
    for rung, name in pointers:
        assert name.split(".")[0] in definitions(rung), f"{rung} {name}"
        assert name.split(".")[-1] in definitions(rung)[name.split(".")[0]]


def test_pictures_are_small_and_shown():
    shown = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *LOGS])
    pictures = list((ROOT / "logs").glob("*.png"))
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 150_000, picture.name
        assert picture.name in shown, picture.name


def test_readme_commands_are_the_ones_that_ci_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -r requirements.txt && python v3_gpt.py" in readme
    command = "pip install -r requirements-dev.txt && pytest"
    assert command in readme and command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert command in (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")


def test_git_tracks_no_run():
    tracked = subprocess.run(["git", "ls-files", "runs"], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert tracked.stdout == ""
