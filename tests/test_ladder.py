"""The ladder as a whole: declared changes, same rooms, allowed imports, and every published number.

Where a rung does not pass, the message says in one sentence what to do: README's "How to extend" sends
learners here with rungs of their own.
"""

import ast
import hashlib
import importlib
import re
import subprocess
import sys
import textwrap
from itertools import pairwise

import pytest
import reproduce
from common import RUNGS, load_results, number
from conftest import ROOT

ROOMS = {  # and what stands in each of them in every rung
    "config": ["Config"],
    "data": ["CharTokenizer", "get_batch"],
    "model": ["LanguageModel"],
    "training": ["evaluate", "train"],
    "sampling": ["generate"],
    "main": ["main"],
}
ORDER = ("config", "data", "model", "quantization", "training", "finetuning", "alignment", "sampling", "main")
LAST = 9  # of our own rungs; from 10 on they are a learner's
STEPS = list(pairwise(RUNGS))
ALLOWED = {"torch", "numpy", "matplotlib", "tqdm"}
MOST_LINES_CHANGED = {"v1_mlp": 135, "v2_attention": 90, "v3_gpt": 95, "v4_rope_alibi": 150, "v5_gpt2": 330}
MOST_LINES_CHANGED |= {"v6_amp_ddp": 200, "v7_quantize": 490, "v8_lora": 830, "v9_rlhf": 770}
LOGS = sorted((ROOT / "logs").glob("week_*.md"), key=lambda path: (number(path.stem), path.stem))
TEXTS = [ROOT / "README.md", ROOT / "SUMMARY.md", ROOT / "logs" / "post.md", *LOGS]


def check(holds, sentence):
    """Fail with this sentence, and nothing around it, unless the condition holds."""
    if not holds:
        pytest.fail(sentence, pytrace=False)


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
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in [x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)]:
                found[name] = found.get(name, "") + ast.get_source_segment(text, node)
    return found


def docstring(rung):
    """The docstring of a rung, empty if it has none."""
    return ast.get_docstring(ast.parse(source(rung)), clean=False) or ""


def test_input_is_tiny_shakespeare_byte_for_byte():
    data = (ROOT / "input.txt").read_bytes()
    digest = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert hashlib.sha256(data).hexdigest() == digest
    assert len(data.decode("utf-8")) == 1_115_394 and len(set(data.decode("utf-8"))) == 65


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_has_a_number_of_its_own(rung):
    same = [other for other in RUNGS if number(other) == number(rung)]
    free = max(map(number, RUNGS)) + 1
    check(
        same == [rung],
        f"{' and '.join(same)} have one number: rename yours to v{free}_{rung.split('_', 1)[1]}.py.",
    )


@pytest.mark.parametrize("rung", RUNGS)
def test_docstring_begins_with_number_week_and_idea(rung):
    found = re.match(r"v(\d+), week \d+: [^\n.(]+[.(]", docstring(rung))
    line = f'"""v{number(rung)}, week 6: my idea. What it is for.'
    check(found and int(found[1]) == number(rung), f"Begin {rung}.py with a line such as {line}")


@pytest.mark.parametrize(("below", "rung"), STEPS)
def test_docstring_lists_exactly_what_changed(below, rung):
    """Since the rung below, or, for a learner's own, since any lower one that its docstring names."""
    since = re.search(r"^Since (\w+)\.py$", docstring(rung), flags=re.M)
    if number(rung) > LAST and since and since[1] in RUNGS[: RUNGS.index(rung)]:
        below = since[1]
    old, new = definitions(below), definitions(rung)
    actual = {
        "added": sorted(new.keys() - old.keys()) or ["-"],
        "changed": sorted(name for name in new.keys() & old.keys() if new[name] != old[name]) or ["-"],
        "removed": sorted(old.keys() - new.keys()) or ["-"],
    }
    lines = [f"Since {below}.py"]
    for kind, names in actual.items():
        indents = {"initial_indent": f"  {kind}:".ljust(12), "subsequent_indent": 12 * " "}
        lines += textwrap.wrap(", ".join(names), width=110, break_on_hyphens=False, **indents)
    found = re.search(
        r"^Since (\w+)\.py\n  added:    (.+?)\n  changed:  (.+?)\n  removed:  (.+?)(?:\n\n|\s*\Z)",
        docstring(rung),
        flags=re.M | re.S,
    )
    block, *listed = found.groups() if found else [None]
    is_true = block == below and [re.split(r",\s+", names) for names in listed] == [*actual.values()]
    sentence = f"Make the lines from `Since` to `removed:` in the docstring of {rung}.py these:"
    check(is_true, "\n".join([sentence, "", *lines, ""]))


@pytest.mark.parametrize("rung", MOST_LINES_CHANGED)
def test_steps_are_small(rung):
    changed = reproduce.lines_changed(rung)
    check(changed <= MOST_LINES_CHANGED[rung], f"{rung}.py changes {changed} lines: make it fewer.")
    longest = {"v4_rope_alibi": 615, "v5_gpt2": 800, "v6_amp_ddp": 800, "v7_quantize": 1010, "v8_lora": 1370}
    longest |= {"v9_rlhf": 1405}
    longest = longest.get(rung, 600)
    check(source(rung).count("\n") <= longest, f"{rung}.py is longer than {longest} lines.")


@pytest.mark.parametrize("rung", RUNGS)
def test_rooms_stand_in_order(rung):
    banners = re.findall(r"^# -{10,} (\w+) -{10,}$", source(rung), flags=re.M)
    rooms = [room for room in ORDER if room in ROOMS or (room in banners and number(rung) >= 7)]
    check(banners == rooms, f"{rung}.py: keep the banners of these rooms, in this order: {', '.join(rooms)}.")
    lines = {node.name: node.lineno for node in ast.parse(source(rung)).body if hasattr(node, "name")}
    starts = [source(rung).split(f" {room} -")[0].count("\n") for room in ROOMS]
    for (room, names), start, end in zip(ROOMS.items(), starts, [*starts[1:], 10**6], strict=True):
        for name in names:
            check(start < lines.get(name, -1) < end, f"{rung}.py: define {name} in the room {room}.")


@pytest.mark.parametrize("rung", RUNGS)
def test_imports_are_allowed(rung):
    allowed = ALLOWED | ({"bpe_tokenizer"} if number(rung) >= 4 else set())
    allowed |= {"safetensors", "huggingface_hub"} if number(rung) >= 5 else set()
    for node in ast.walk(ast.parse(source(rung))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for top in [name.split(".")[0] for name in names]:
            sentence = f"{rung}.py: copy what you need of {top} instead of importing it, a rung is one file."
            check(top not in RUNGS, sentence)
            sentence = (
                f"{rung}.py: do without {top}, a rung imports the standard library and {', '.join(allowed)}."
            )
            check(top in allowed or top in sys.stdlib_module_names, sentence)


@pytest.mark.parametrize("rung", RUNGS)
def test_config_fields_have_comments_and_classes_have_docstrings(rung):
    lines = source(rung).splitlines()
    for node in ast.parse(source(rung)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "main":
            check(ast.get_docstring(node), f"{rung}.py: give {node.name} a docstring of a line.")
        for field in node.body if isinstance(node, ast.ClassDef) and node.name == "Config" else []:
            if isinstance(field, ast.AnnAssign):
                sentence = f"{rung}.py: put a comment behind Config's {field.target.id}, --help shows it."
                check("  # " in lines[field.end_lineno - 1], sentence)


@pytest.mark.parametrize("rung", RUNGS)
def test_no_marks_of_what_is_new(rung):
    marks = re.findall(r"#.*\bnew in\b.*|#.*\bv\d+\b.*", source(rung))
    check(not marks, f"{rung}.py: say what the code does, not since when, in {''.join(marks[:1])!r}.")


@pytest.mark.parametrize("rung", RUNGS)
def test_docstring_result_is_the_stored_one(rung):
    line = re.search(r"^Result: .*$", docstring(rung), flags=re.M)
    metrics = load_results()["rungs"].get(rung)
    if metrics:
        check(line, f"{rung}.py: write a line {reproduce.NOT_MEASURED!r} into the docstring.")
        sentence = f"Run `python tools/reproduce.py --tables`: {rung}.py gets its stored result."
        check(line[0] == reproduce.result_line(metrics), sentence)
    else:
        sentence = f"{rung}.py: there is no stored result, so make that line {reproduce.NOT_MEASURED!r}"
        check(not line or line[0] == reproduce.NOT_MEASURED, sentence)


def blocks_of(path):
    """What stands in a Markdown file between the markers of its blocks: {name: text}."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"<!-- block: (\w+) -->\n(.*?)<!-- end -->", text, flags=re.DOTALL)
    return {name: content.removesuffix("\n") for name, content in found}


def check_blocks(path, blocks):
    """Fail unless the blocks of a Markdown file are these."""
    found = blocks_of(path)
    check(found.keys() == blocks.keys(), f"{path.name} must have these blocks: {', '.join(sorted(blocks))}.")
    wrong = [name for name, content in blocks.items() if found[name] != content]
    sentence = f"Run `python tools/reproduce.py --tables`: {path.name} gets {', '.join(wrong)} as stored."
    check(not wrong, sentence)


def test_readme_blocks_are_made_from_the_results():
    check_blocks(ROOT / "README.md", reproduce.readme_blocks(load_results()))


@pytest.mark.parametrize("log", LOGS, ids=lambda path: path.stem)
def test_tables_of_the_logs_are_made_from_the_results(log):
    week = importlib.import_module(f"week_{number(log.stem)}")
    check_blocks(log, week.tables(load_results())[log.stem])


def leaves(x, history=True):
    """All numbers in nested results, those that are keys included, with or without estimates along a run."""
    if isinstance(x, dict):
        keys = [float(key) for key in x if re.fullmatch(r"\d+\.\d+", key)]
        values = [value for key, value in x.items() if history or key != "history"]
        return keys + [leaf for value in values for leaf in leaves(value, history)]
    if isinstance(x, list):
        return [leaf for value in x for leaf in leaves(value, history)]
    return [x] if isinstance(x, int | float) else []


def code_files(path):
    """The files that a log is about: those that links after `Code:` lead to."""
    parts = re.findall(r"^Code: .*?\n\n", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [path.parent / target for part in parts for target in re.findall(r"\]\(([^)]+\.py)\)", part)]


def is_stored(written, results):
    """Whether a number as it is written is one of the results, rounded to as many digits.

    Estimates along a run are so many that with less than four digits nearly everything is one of them.
    """
    digits = len(written.split(".")[1])
    return any(f"{abs(leaf):.{digits}f}" == written for leaf in leaves(results, history=digits >= 4))


DECIMALS = r"(?<![\w.])\d+\.\d{2,}(?![\w.]*\d)"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_numbers_in_prose_are_in_the_results(path):
    """Every number with two or more decimals is some stored result, rounded as it is written.

    What is in backticks may also be a quotation: a number of the code that the log is about. Values of flags
    are commands, quoted lines of Python and the tables that tools write have tests of their own.
    """
    results = load_results()
    if path in LOGS:
        sections = ("rungs", "references", "race", f"week_{number(path.stem)}")
        results = {section: results.get(section) for section in sections}
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"<!-- block: .*?<!-- end -->|```python\n.*?```|Python 3\.\d+", "", text, flags=re.DOTALL)
    text = re.sub(r"--\w+[ =][^\s`]+", "", text)
    in_backticks = "\n".join(re.findall(r"```.*?```|`[^`]+`", text, flags=re.DOTALL))
    code = "\n".join(file.read_text(encoding="utf-8") for file in code_files(path))
    quoted = set(re.findall(DECIMALS, in_backticks)) & set(re.findall(DECIMALS, code))
    in_prose = re.sub(r"```.*?```|`[^`]+`", "", text, flags=re.DOTALL)
    for written in sorted({*re.findall(DECIMALS, in_prose), *re.findall(DECIMALS, in_backticks)} - quoted):
        sentence = f"{path.name}: {written} is not in logs/results.json, correct or store it."
        check(is_stored(written, results), sentence)


@pytest.mark.parametrize("log", LOGS, ids=lambda path: path.stem)
def test_quoted_python_stands_in_the_code(log):
    """Each line of each ```python block is a line of a file that the log is about, indentation aside."""
    files = code_files(log)
    check(files, f"{log.name}: say what it is about in a line 'Code: [v1_mlp.py](../v1_mlp.py)'.")
    lines = {line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()}
    for quoted in re.findall(r"^```python\n(.*?)^```", log.read_text(encoding="utf-8"), flags=re.M | re.S):
        for line in quoted.splitlines():
            names = " or ".join(file.name for file in files)
            check(
                line.strip() in lines,
                f"{log.name} quotes {line.strip()!r}: no line of {names}, quote it as it is.",
            )


def pointers(log):
    """What a log says of lines of code: (file, line, the line in its link, how that line begins)."""
    text = log.read_text(encoding="utf-8")
    rows = re.findall(r"\[(\w+\.py):(\d+)\]\(\.\./(\w+\.py)#L(\d+)\) \| `([^`]+)` \|", text)
    count = len(re.findall(r"\w+\.py:\d+", text))
    check(
        len(rows) == count,
        f"{log.name}: write each pointer as [v0_x.py:12](../v0_x.py#L12) | `how line 12 begins` |.",
    )
    return rows


@pytest.mark.parametrize("log", LOGS, ids=lambda path: path.stem)
def test_pointers_to_lines_lead_to_what_stands_beside_them(log):
    for name, line, linked_name, linked_line, begin in pointers(log):
        lines = [line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
        places = [str(i) for i, text in enumerate(lines, start=1) if text.startswith(begin)]
        where = " or ".join(places) or "none"
        sentence = f"{log.name}: `{begin}` is line {where} of {name}, correct {name}:{line} and its link."
        check(line in places and (name, line) == (linked_name, linked_line), sentence)


def test_week_1_points_to_five_places():
    assert len(pointers(ROOT / "logs" / "week_1.md")) >= 5


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
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
    defined = {rung: definitions(rung) for rung in RUNGS}
    for rung, name in pointers:
        text = defined[rung].get(name.split(".")[0], "")
        check(name.split(".")[-1] in text, f"README.md: there is no {name} in {rung}.py, correct the index.")


def test_pictures_are_small_and_shown():
    shown = "".join(path.read_text(encoding="utf-8") for path in TEXTS)
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
