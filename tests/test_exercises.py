"""exercises/: the two files and their solutions, the checks, and what a learner gets to read."""

import ast
import functools
import inspect
import linecache
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXERCISES = ROOT / "exercises"
sys.path.insert(0, str(EXERCISES))  # for the package `checks`

from checks import compare, model_checks, runner, train_checks  # noqa: E402
from checks.compare import CHECKS  # noqa: E402

FILES = {"model": range(1, 25), "train": range(25, 32)}
EXERCISE = {name: (EXERCISES / f"{name}.py").read_text(encoding="utf-8") for name in FILES}
SOLUTION = {name: (EXERCISES / "solutions" / f"{name}.py").read_text(encoding="utf-8") for name in FILES}

# --------------------------------- filling in the bodies of TODOs ---------------------------------


@functools.cache
def functions(source):
    """All functions and methods of a file, by qualified name."""
    found = {}
    for node in ast.parse(source).body:
        for function in [node, *node.body] if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(function, ast.FunctionDef):
                inside = f"{node.name}." if function is not node else ""
                found[inside + function.name] = function
    return found


def body_lines(source, function):
    """First and last line of the body after the docstring, comments included: a slice of lines."""
    docstring = ast.get_docstring(function) is not None
    start = function.body[0].end_lineno if docstring else function.lineno  # headers have one line here
    assert docstring or source.splitlines()[start - 1].endswith(":")
    return start, function.end_lineno


@functools.cache
def todos(name):
    """The TODOs of an exercise file: number -> qualified name of the function."""
    found = {}
    for qualified, function in functions(EXERCISE[name]).items():
        if isinstance(function.body[-1], ast.Raise):
            found[int(re.search(r"TODO (\d+)", ast.unparse(function.body[-1]))[1])] = qualified
    return found


NAMES = {number: qualified for name in FILES for number, qualified in todos(name).items()}


def home(number):
    return "model" if number in FILES["model"] else "train"


@functools.cache
def body(number):
    """The solution of a TODO, without its indentation."""
    source = SOLUTION[home(number)]
    start, end = body_lines(source, functions(source)[NAMES[number]])
    return inspect.cleandoc("\n" + "\n".join(source.splitlines()[start:end]))


def fill(name, bodies):
    """The exercise file `name` with the bodies of some TODOs replaced: number -> source, not indented."""
    source, lines = EXERCISE[name], EXERCISE[name].splitlines()
    found = functions(source)
    for number in sorted(FILES[name], reverse=True):
        if number in bodies:
            function = found[NAMES[number]]
            start, end = body_lines(source, function)
            indent = " " * (function.col_offset + 4)
            lines[start:end] = [indent + line if line else "" for line in bodies[number].splitlines()]
    return "\n".join(lines) + "\n"


def solved(numbers):
    return {number: body(number) for number in numbers}


@pytest.fixture
def learner(monkeypatch):
    """Return a function that makes the modules model and train of a learner who wrote these bodies."""

    def make(bodies):
        modules = {}
        for name in FILES:
            source, path = fill(name, bodies), f"/learner/{name}.py"
            module = types.ModuleType(name)
            module.__file__ = path
            linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
            monkeypatch.setitem(sys.modules, name, module)  # train.py imports model
            exec(compile(source, path, "exec"), vars(module))
            modules[name] = module
        return modules

    return make


def attempt(number, modules, limit=None):
    return runner.attempt(number, modules[home(number)], limit)


# ------------------------------------------- the files --------------------------------------------


def test_exercise_and_solution_differ_only_in_the_bodies_of_the_todos():
    assert list(NAMES) == list(range(1, 32)) == sorted(CHECKS)
    assert {number: check.name for number, check in CHECKS.items()} == NAMES
    for name in FILES:
        assert fill(name, solved(FILES[name])) == SOLUTION[name]


@pytest.mark.parametrize("number", NAMES)
def test_a_todo_is_a_text_and_a_raise_and_nothing_else(number):
    source = EXERCISE[home(number)]
    function = functions(source)[NAMES[number]]
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    assert [ast.unparse(statement) for statement in statements] == [
        f"raise NotImplementedError('TODO {number}')"
    ]
    start, end = body_lines(source, function)
    text = [line.strip() for line in source.splitlines()[start : end - 1]]
    assert text[0].startswith(f"# TODO {number}: ") and all(line.startswith("#") for line in text)
    assert "#" in text, "an empty comment line comes before the numeric example"
    assert re.search(r"\d", " ".join(text[text.index("#") :])) or number == 31
    assert len(text) <= 18


@pytest.mark.parametrize("path", sorted(EXERCISES.rglob("*.py")), ids=lambda path: path.name)
def test_only_torch_and_tqdm_are_needed(path):
    known = {"torch", "tqdm", "model", "checks", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= known
        elif isinstance(node, ast.ImportFrom):
            assert node.level or node.module.split(".")[0] in known


# ------------------------------------------- the checks -------------------------------------------


@pytest.mark.parametrize("again", range(5))
def test_the_solutions_are_right(learner, again):
    modules = learner(solved(NAMES))
    for number in NAMES:
        result = attempt(number, modules)
        assert result.state == "right", result.message


@pytest.mark.parametrize("number", NAMES)
def test_the_untouched_exercise_stops_at_each_todo_in_turn(learner, number):
    modules = learner(solved(range(1, number)))
    states = [attempt(n, modules).state for n in range(1, number + 1)]
    assert states == ["right"] * (number - 1) + ["open"]


def test_no_known_slip_describes_a_right_answer(learner, monkeypatch):
    """And every slip can be computed for every case, whatever the learner's answer is."""
    judged = []

    def judge(call, cases, slips=lambda *args: ()):
        compare.judge(call, cases, slips)
        per_case = [list(slips(*args)) for _, args, _ in cases]
        for slip in zip(*per_case, strict=True):
            assert not all(
                compare.agrees(mistake, truth)
                for (mistake, _), (_, _, truth) in zip(slip, cases, strict=True)
            ), slip[0][1]
        judged.append(len(per_case[0]))

    monkeypatch.setattr(model_checks, "judge", judge)
    monkeypatch.setattr(train_checks, "judge", judge)
    modules = learner(solved(NAMES))
    for number in list(NAMES) * 10:  # their inputs are random
        CHECKS[number].run(modules[home(number)])
    assert sum(judged) > 10 * 150


def read_mistakes():
    """The blocks of exercise_mistakes.txt: number, what, words, old, new."""
    blocks = (ROOT / "tests" / "exercise_mistakes.txt").read_text(encoding="utf-8").strip().split("\n\n")[2:]
    for block in blocks:
        title, *lines = block.split("\n")
        number, what, words = re.fullmatch(r"TODO (\d+): (.+) => (.+)", title).groups()
        old, new = ([line[2:] for line in lines if line[0] == sign] for sign in "-+")
        assert len(old) + len(new) == len(lines), block
        yield int(number), what, words, "\n".join(old), "\n".join(new)


MISTAKES = list(read_mistakes())


def test_there_are_mistakes_enough():
    assert len(MISTAKES) >= 60
    assert {number for number, *_ in MISTAKES} == set(NAMES)
    assert len({(number, what) for number, what, *_ in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize("mistake", MISTAKES, ids=[f"{m[0]}-{m[1].replace(' ', '-')}" for m in MISTAKES])
def test_a_mistake_is_caught_at_its_todo_with_a_fitting_message(learner, mistake):
    number, _, words, old, new = mistake
    right = body(number)
    assert right.count(old) == 1 or not old, f"not found once: {old}"
    modules = learner(solved(NAMES) | {number: right.replace(old, new) if old else new})
    assert all(attempt(n, modules).state == "right" for n in range(max(1, number - 3), number))
    result = attempt(number, modules, limit=0.5 if "still running" in words else None)
    assert result.state == "wrong"
    message = " ".join(result.message.split())
    assert words in message, result.message
    assert re.search(r"\bhint\b", message)
    assert "Traceback" not in message and "checks/" not in message


OTHER_WAYS = [
    (1, "return torch.arange(T).expand(B, T)"),
    (1, "return torch.arange(T) + torch.zeros(B, 1, dtype=torch.int64)"),
    (2, "e = torch.exp(x - torch.max(x, dim=-1, keepdim=True).values)\nreturn e / torch.sum(e, -1, True)"),
    (3, "return torch.stack(x.chunk(n_head, dim=-1), dim=1)"),
    (3, "return x.unflatten(2, (n_head, -1)).movedim(2, 1)"),
    (5, "x = F.tanh(x @ self.hidden.weight.T + self.hidden.bias)\nreturn self.output(x)"),
    (7, "return self.table.weight[idx]"),
    (
        8,
        "super().__init__()\ntable = torch.zeros(block_size, n_embd)\nfor p in range(block_size):\n"
        "    for c in range(0, n_embd, 2):\n        table[p, c] = math.sin(p / 10000 ** (c / n_embd))\n"
        "        table[p, c + 1] = math.cos(p / 10000 ** (c / n_embd))\n"
        'self.register_buffer("table", table, persistent=False)',
    ),
    (9, "B, T, C = x.shape\nreturn x + self.table[:T].unsqueeze(0).expand(B, T, C)"),
    (11, "return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), attn_mask=mask)"),
    (
        11,
        'scores = torch.einsum("bic,bjc->bij", self.query(x), self.key(x)) * self.key.out_features**-0.5\n'
        "if mask is not None:\n    scores = scores.masked_fill(mask == 0, -1e9)\n"
        "return F.softmax(scores, dim=2) @ self.value(x)",
    ),
    (
        13,
        "B, T, C = x.shape\nsize, out = C // self.n_head, []\nfor h in range(self.n_head):\n"
        "    part = slice(h * size, (h + 1) * size)\n"
        "    q, k, v = self.query(x)[..., part], self.key(x)[..., part], self.value(x)[..., part]\n"
        "    out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))\n"
        "return self.proj(torch.cat(out, dim=-1))",
    ),
    (15, "x = nn.GELU()(self.expand(x))\nreturn F.dropout(self.shrink(x), self.dropout.p, self.training)"),
    (17, "y = self.attention(self.norm1(x), mask=mask) + x\nreturn y + self.feed_forward(self.norm2(y))"),
    (
        20,
        "n = idx.shape[1] + max_new_tokens\nwhile idx.shape[1] < n:\n"
        "    p = F.softmax(model(idx[:, -block_size:])[:, -1, :], 1)\n"
        "    idx = torch.hstack([idx, torch.distributions.Categorical(p).sample()[:, None]])\nreturn idx",
    ),
    (21, "return torch.tril(torch.ones(T, T)) == 1"),
    (21, "i = torch.arange(T)\nreturn i[:, None] >= i"),
    (22, 'self.chars = "".join(sorted(set(text)))\nself.ids = {c: self.chars.index(c) for c in self.chars}'),
    (23, "return list(map(self.ids.get, text))"),
    (24, 'text = ""\nfor i in ids:\n    text += self.chars[i]\nreturn text'),
    (25, "n = 0\nwhile (n + 1) * self.block_size + 1 <= len(self.ids):\n    n += 1\nreturn n"),
    (27, "return self.ids[1:].unfold(0, self.block_size, self.block_size)[i]"),
    (
        28,
        "loss = torch.nn.CrossEntropyLoss()(model(x).transpose(1, 2), y)\nmodel.zero_grad()\n"
        "loss.backward()\noptimizer.step()\nreturn float(loss.detach())",
    ),
    (
        29,
        "model.eval()\nlosses = []\nwith torch.no_grad():\n    for x, y in loader:\n"
        '        losses += F.cross_entropy(model(x).mT, y, reduction="none").flatten().tolist()\n'
        "model.train()\nreturn sum(losses) / len(losses)",
    ),
    (
        31,
        "model.train(False)\nidx = torch.as_tensor(tokenizer.encode(prompt)).unsqueeze(0)\n"
        "out = generate(model, idx, max_new_tokens, block_size)\n"
        "return prompt + tokenizer.decode(out[0, len(prompt) :].tolist())",
    ),
]


@pytest.mark.parametrize(("number", "way"), OTHER_WAYS)
def test_other_right_ways_are_right(learner, number, way):
    modules = learner(solved(NAMES) | {number: way})
    for _ in range(3):
        result = attempt(number, modules)
        assert result.state == "right", result.message


STRANGE = {
    "nothing": "pass",
    "a text": 'return "text"',
    "a number": "return 42",
    "a tensor": "return torch.zeros(2, 3, 5)",
    "complex numbers": "return torch.zeros(2, 3, dtype=torch.complex64)",
    "no numbers": "return torch.empty(0)",
    "an object": "return object()",
    "a module": "return torch.nn.Linear(2, 2)",
    "a list of all sorts": 'return [None, "a", torch.ones(1)]',
    "an error": 'raise ValueError("my own")',
    "an error without words": "assert False",
    "an exit": "sys.exit(0)",
    "a recursion": "def f():\n    return f()\nreturn f()",
    "another TODO": 'raise NotImplementedError("to be done")',
}


@pytest.mark.parametrize("what", STRANGE)
def test_whatever_is_written_the_answer_is_a_sentence(learner, what):
    for number in NAMES:
        modules = learner(solved(NAMES) | {number: "import sys\n\nimport torch\n\n" + STRANGE[what]})
        result = attempt(number, modules)
        assert result.state == "wrong", (number, what)
        assert "Traceback" not in result.message and "hint" in result.message
        if what in ("an error", "an error without words", "an exit", "a recursion", "another TODO"):
            assert f"/learner/{home(number)}.py, line" in result.message
            assert STRANGE[what].splitlines()[-1].strip() in " ".join(result.message.split())


def test_endless_loops_are_stopped(learner):
    assert attempt(28, learner(solved(NAMES))).state == "right"  # the first optimizer takes a second to load
    for number in (1, 4, 13, 28):
        modules = learner(solved(NAMES) | {number: "while True:\n    pass"})
        result = attempt(number, modules, limit=0.2)
        assert result.state == "wrong"
        assert (
            "still running" in result.message and "while True:" in result.message
        ) or "pass" in result.message


def test_numbers_of_another_type_are_named(learner):
    for number, word in {2: "float64", 7: "float64", 11: "float64", 17: "float64", 19: "float64"}.items():
        right = body(number)
        wrong = right[: right.rindex("return ")] + "result = " + right[right.rindex("return ") + 7 :]
        modules = learner(solved(NAMES) | {number: f"{wrong}\nreturn result.double()"})
        result = attempt(number, modules)
        assert result.state == "wrong" and word in result.message, result.message


def test_a_learner_who_prints_sees_it_where_it_matters(learner, capsys):
    modules = learner(solved(NAMES) | {5: "print('x is', x.shape)\nreturn x"})
    assert attempt(4, modules).message == ""
    assert "x is torch.Size([1, 1])" in attempt(5, modules).message
    assert capsys.readouterr().out == ""


def test_what_needs_another_todo_waits(learner, capsys):
    modules = learner(solved(set(NAMES) - {13, 15}) | {5: "return x"})
    assert not runner.report("model", modules, check_all=True)
    out = capsys.readouterr().out
    assert (
        "TODO 13  open " in out and "TODO 17  waits  TransformerBlock.forward" in out and "for TODO 13" in out
    )
    assert "TODO  5  wrong  MLP.forward" in out
    assert "19/31" in out
    assert "TODO 25" not in out


def story(learner, capsys, numbers, bodies=None, name="model", check_all=False):
    """What a learner reads who solved these TODOs and wrote those bodies; whether the file is complete."""
    modules = learner(solved(numbers) | (bodies or {}))
    complete = runner.report(name, modules, check_all)
    return " ".join(capsys.readouterr().out.split()), complete


PASSED = "TODO 8 and 9, sinusoidal positions, belong to week 5: passed over until TODO 18 needs them."
DUE = "TODO 18, the complete model, needs TODO 8 and 9, sinusoidal positions. Week 5 explains them."
WITHOUT_SINES = [number for number in range(1, 32) if number not in (8, 9)]


@pytest.mark.parametrize("number", range(10, 18))
def test_sinusoidal_positions_are_passed_over_with_a_word(learner, capsys, number):
    done = [n for n in WITHOUT_SINES if n < number]
    out, complete = story(learner, capsys, done)
    assert not complete and f" {len(done)}/31 " in out and out.count("comes next") == 1
    assert f"{PASSED} TODO {number}, {NAMES[number]}, " in out and DUE not in out
    out, _ = story(learner, capsys, done, {number: "return 42"})
    assert f"{PASSED} TODO {number}, {NAMES[number]}, " in out and ": not right yet" in out


def test_sinusoidal_positions_come_when_the_complete_model_needs_them(learner, capsys):
    for done in (set(WITHOUT_SINES) - {18}, WITHOUT_SINES, [n for n in WITHOUT_SINES if n < 18]):
        out, complete = story(learner, capsys, done)
        assert not complete and " 15/31 " in out and out.count("comes next") == 1
        assert f"{DUE} TODO 8, PositionalEncoding.__init__, " in out and PASSED not in out
        out, complete = story(learner, capsys, done, name="train")
        assert not complete and DUE in out and "there TODO 8 is not done yet" in out
    out, complete = story(learner, capsys, set(NAMES) - {9})
    assert not complete and "TODO 9, PositionalEncoding.forward, " in out and PASSED not in out
    out, complete = story(learner, capsys, NAMES)
    assert complete and PASSED not in out and DUE not in out


def test_only_the_complete_model_needs_sinusoidal_positions(learner):
    for missing in ({8}, {9}, {8, 9}):
        modules = learner(solved(set(NAMES) - missing))
        waiting = {19} if missing == {9} else {18, 19}
        for number in WITHOUT_SINES:
            assert attempt(number, modules).state == ("waits" if number in waiting else "right"), number


def test_sinusoidal_positions_once_begun_are_checked_like_all_others(learner, capsys):
    slip = body(8).replace("angle.sin(), angle.cos()", "angle.cos(), angle.sin()")
    for done in (range(1, 8), WITHOUT_SINES):  # in order of the numbers, and in week 5
        out, complete = story(learner, capsys, done, {8: slip})
        assert not complete and PASSED not in out and DUE not in out
        assert "TODO 8, PositionalEncoding.__init__, " in out and "Sine and cosine are exchanged" in out
        out, complete = story(learner, capsys, done, {8: body(8)})
        assert not complete and PASSED not in out and DUE not in out
        assert "TODO 9, PositionalEncoding.forward, " in out and ": comes next" in out
        out, complete = story(learner, capsys, done, {8: body(8), 9: "return x"})
        assert not complete and "TODO 9, PositionalEncoding.forward, " in out and "Nothing was added" in out


def test_all_shows_sinusoidal_positions_as_they_are(learner, capsys):
    out, _ = story(learner, capsys, range(1, 8), check_all=True)
    assert "TODO 8 open PositionalEncoding.__init__ not written yet" in out
    assert "TODO 9 waits PositionalEncoding.forward for TODO 8" in out
    assert f"7/31 {PASSED} " in out and "tells all about TODO 10, which comes next" in out
    out, _ = story(learner, capsys, range(1, 3), check_all=True)  # far from there
    assert PASSED not in out and "TODO 3, which comes next" in out
    out, _ = story(learner, capsys, WITHOUT_SINES, check_all=True)
    assert "TODO 18 waits TinyLLM.__init__ for TODO 8" in out and DUE in out
    assert "20/31" in out and "tells all about TODO 8, which comes next" in out


def test_a_debugger_speaks_where_the_program_does(learner, monkeypatch):
    """In IDLE and in notebooks sys.__stdout__ is another place than sys.stdout, or None."""
    spoke, hook, stdout = [], sys.breakpointhook, sys.stdout
    debugger = types.SimpleNamespace(set_trace=lambda frame: spoke.append(sys.stdout))
    monkeypatch.setattr(runner.pdb, "Pdb", lambda: debugger)
    monkeypatch.setattr(sys, "__stdout__", None)
    modules = learner(solved(NAMES) | {3: "breakpoint()\n" + body(3)})
    assert attempt(3, modules).state == "right"
    assert spoke and all(place is stdout for place in spoke)
    assert sys.stdout is stdout and sys.breakpointhook is hook


def test_ctrl_c_is_not_taken_for_an_endless_loop(learner):
    modules = learner(solved(NAMES) | {3: "import signal\n\nsignal.raise_signal(signal.SIGINT)\nreturn x"})
    with pytest.raises(KeyboardInterrupt):
        attempt(3, modules)


def test_a_name_that_is_gone_is_named(learner):
    modules = learner(solved(NAMES))
    del modules["model"].split_heads
    assert "split_heads is gone" in attempt(3, modules).message


def test_the_finished_model_is_causal(learner):
    model_py = learner(solved(NAMES))["model"]
    model = model_py.CausalLLM(11, 8, 12, 3, 2, 0.0).eval()
    idx = torch.randint(10, (2, 8))
    other = idx.clone()
    other[:, 5] = 10
    assert torch.equal(model(idx)[:, :5], model(other)[:, :5])
    assert not torch.equal(model(idx)[:, 5:], model(other)[:, 5:])


# ---------------------------------------- the command line ----------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A copy of exercises/ as the learner has it."""
    shutil.copytree(EXERCISES, tmp_path / "exercises", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def start(folder, *args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


def test_a_learner_begins(folder):
    run = start(folder, "exercises/model.py")
    assert run.returncode == 1 and run.stderr == ""
    assert run.stdout.startswith(f"[{'.' * 31}] 0/31\n")
    assert "TODO 1, position_ids, exercises" in run.stdout and "--hint 1" in run.stdout
    run = start(folder, "exercises/train.py")
    assert run.returncode == 1 and run.stderr == ""
    assert "train.py builds on model.py, and there TODO 1" in run.stdout


def test_a_learner_slips_and_errs(folder):
    model = folder / "exercises" / "model.py"
    model.write_text(
        fill("model", solved(range(1, 11)) | {11: body(11).replace("~mask", "mask")}), encoding="utf-8"
    )
    run = start(folder, "exercises/model.py")
    assert run.returncode == 1 and run.stderr == ""
    assert "10/31" in run.stdout
    for word in ("TODO 11, SelfAttentionHead.forward", "checked", "expected", "came", "hint", "upside down"):
        assert word in run.stdout
    model.write_text(fill("model", solved(range(1, 11)) | {11: "return x @ self.kee(x)"}), encoding="utf-8")
    run = start(folder / "exercises", "model.py")
    assert run.returncode == 1 and run.stderr == ""
    assert "model.py, line" in run.stdout and "return x @ self.kee(x)" in run.stdout
    assert "has no attribute 'kee'" in run.stdout and "Traceback" not in run.stdout


def test_a_learner_finishes_and_the_model_is_trained(folder):
    run = start(folder, "exercises/solutions/model.py", "--all")  # the solutions run where they lie
    assert run.returncode == 0, run.stderr
    assert "24/31" in run.stdout and "train.py" in run.stdout
    for name in FILES:
        shutil.copy(EXERCISES / "solutions" / f"{name}.py", folder / "exercises")
    run = start(folder, "exercises/train.py")
    assert run.returncode == 1
    assert run.stderr.startswith("error: ") and "input.txt" in run.stderr and "Traceback" not in run.stderr
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[:20_000]
    (folder / "input.txt").write_text(text, encoding="utf-8")
    run = start(folder, "exercises/train.py")
    assert run.returncode == 0, run.stderr
    assert "31/31" in run.stdout and "epoch 5: val loss" in run.stdout and "\nROMEO:" in run.stdout


def test_an_error_of_the_learner_in_training_keeps_its_traceback(folder):
    for name in FILES:
        shutil.copy(EXERCISES / "solutions" / f"{name}.py", folder / "exercises")
    train = folder / "exercises" / "train.py"
    source = train.read_text(encoding="utf-8")
    start_of_training = "    start = time.perf_counter()\n"
    assert source.count(start_of_training) == 1
    mine = start_of_training + '    model.load_state_dict(torch.load("mine.pt"))\n'
    train.write_text(source.replace(start_of_training, mine), encoding="utf-8")
    (folder / "input.txt").write_text("ROMEO: to be or not to be\n" * 100, encoding="utf-8")
    run = start(folder, "exercises/train.py")
    assert run.returncode == 1 and "31/31" in run.stdout
    assert "Traceback" in run.stderr and "mine.pt" in run.stderr and "holds input.txt" not in run.stderr


@pytest.mark.parametrize("name", FILES)
def test_ctrl_c_while_torch_loads_is_a_word(folder, name):
    """A stand-in for torch, which takes its time."""
    source = "import signal\n\nsignal.raise_signal(signal.SIGINT)\n"
    (folder / "exercises" / "torch.py").write_text(source, encoding="utf-8")
    run = start(folder, f"exercises/{name}.py")
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "stopped\n")


@pytest.mark.parametrize("where", ["checks", "training"])
def test_ctrl_c_later_is_a_word_too(folder, where):
    for name in FILES:
        shutil.copy(EXERCISES / "solutions" / f"{name}.py", folder / "exercises")
    (folder / "input.txt").write_text("ROMEO: to be or not to be\n" * 100, encoding="utf-8")
    train = folder / "exercises" / "train.py"
    line = {"checks": "    model.eval()\n", "training": "    start = time.perf_counter()\n"}[where]
    source = train.read_text(encoding="utf-8")
    assert line in source
    stop = "    import signal; signal.raise_signal(signal.SIGINT)\n"
    train.write_text(source.replace(line, line + stop), encoding="utf-8")
    run = start(folder, "exercises/train.py")
    assert run.returncode == 1 and run.stderr == "stopped\n"
    assert ("31/31" in run.stdout) == (where == "training")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--hint", "32"], "no TODO 32"),
        (["--hint", "eleven"], "invalid int value"),
        (["--hin", "3"], "unrecognized arguments"),
        (["--all", "--hint", "3"], "do not go together"),
    ],
)
def test_flags_that_make_no_sense(monkeypatch, capsys, flags, sentence):
    monkeypatch.setattr(sys, "argv", ["exercises/model.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runner.main("model")
    assert str(stop.value).startswith("error: ") and sentence in str(stop.value)
    assert "\n" not in str(stop.value) and capsys.readouterr().out == ""


@pytest.mark.parametrize("number", NAMES)
def test_hints_are_two_and_the_second_is_stronger(monkeypatch, capsys, number):
    monkeypatch.setattr(sys, "argv", ["exercises/model.py", "--hint", str(number)])
    with pytest.raises(SystemExit) as stop:
        runner.main("model")
    assert not stop.value.code
    out = " ".join(capsys.readouterr().out.split())
    assert out == f"TODO {number}, {NAMES[number]}: {CHECKS[number].more}"
    assert CHECKS[number].hint not in CHECKS[number].more
