"""The tools: what a kept run depends on, what Ctrl-C says, the ladder, README's steps to a new rung."""

import difflib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from threading import Thread

import common
import pytest
import race_nanogpt
import reproduce
import test_ladder
import torch
from conftest import ROOT, TINY

import v1_mlp

# ------------------------------------------- runs are kept -------------------------------------------

FAKE = '''"""v1, week 1: a rung that computes next to nothing."""

import argparse
import json
from pathlib import Path

import helper


def answer():
    return 1


def main():
    parser = argparse.ArgumentParser()
    for name in ("data", "out_dir", "rate"):
        parser.add_argument(f"--{name}", default="1")
    parser.add_argument("--bold", action=argparse.BooleanOptionalAction)
    args = parser.parse_args()
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "runs.txt").open("a") as file:
        file.write("x")
    metrics = {"val_loss": answer() + helper.ZERO, "rate": args.rate, "bold": args.bold}
    (folder / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main()
'''
WEEK = """def two():
    return 2


def stand_in():
    return two()


class Plain:
    def __new__(cls):
        return two()


class Derived(Plain):
    pass
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of one fake rung that counts how often it runs; the tools take it for theirs."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "v1_fake.py").write_text(FAKE)
    (tmp_path / "helper.py").write_text("ZERO = 0\n")
    (tmp_path / "input.txt").write_text("text")
    (tmp_path / "tools" / "week_9.py").write_text(WEEK)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "STARTED", time.time() + 1000)
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "tools"), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in ("v1_fake", "helper", "week_9"):
        sys.modules.pop(name, None)


def runs_of(project, replace=None, **flags):
    """Run the fake rung as a tool that starts now would; return how often it has run by now."""
    for name in ("v1_fake", "helper"):
        sys.modules.pop(name, None)
    common.run("v1_fake", "x", replace, **flags)
    return len((project / "runs" / "experiments" / "x" / "runs.txt").read_text())


def stand_in(name):
    """An object of the fake week's tool, as that file is now."""
    sys.modules.pop("week_9", None)
    return getattr(__import__("week_9"), name)


def edit(path, old, new):
    """Replace a text that stands in a file exactly once."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8", newline="\n")


def test_the_same_run_is_kept(project):
    assert [runs_of(project, rate=2, bold=True) for _ in range(2)] == [1, 1]
    assert common.run("v1_fake", "x", rate=2, bold=True)["val_loss"] == 1


def test_comments_and_docstrings_make_no_other_run(project):
    assert runs_of(project) == 1
    edit(project / "v1_fake.py", '"__main__":\n', '"__main__":\n    print("as a script")\n')
    edit(project / "v1_fake.py", "next to nothing", "nothing")
    edit(project / "v1_fake.py", "return 1", "return 1  # one")
    assert runs_of(project) == 1


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("v1_fake.py", "return 1", "return 3"),
        ("helper.py", "ZERO = 0", "ZERO = 1"),
        ("input.txt", "text", "other text"),
    ],
)
def test_other_code_or_data_is_another_run(project, file, old, new):
    assert runs_of(project) == 1
    edit(project / file, old, new)
    assert [runs_of(project), runs_of(project)] == [2, 2]


def test_other_flags_are_another_run(project):
    counts = [runs_of(project, **flags) for flags in ({}, {"rate": 1}, {"rate": 2}, {"bold": True})]
    assert counts == [1, 2, 3, 4]
    assert common.run("v1_fake", "x", bold=False)["bold"] is False


def test_the_contents_of_a_file_that_a_flag_names_count(project):
    path = project / "other.txt"
    path.write_text("a")
    assert runs_of(project, data=path) == 1
    path.write_text("b")
    assert runs_of(project, data=path) == 2


@pytest.mark.parametrize("name", ["stand_in", "Plain", "Derived"])
def test_other_code_of_a_stand_in_or_of_what_it_uses_is_another_run(project, name):
    assert runs_of(project, {"answer": stand_in(name)}) == 1
    assert runs_of(project, {"answer": stand_in(name)}) == 1
    edit(project / "tools" / "week_9.py", "return 2", "return 2  # two")
    assert runs_of(project, {"answer": stand_in(name)}) == 1
    edit(project / "tools" / "week_9.py", "return 2  # two", "return 5")
    assert runs_of(project, {"answer": stand_in(name)}) == 2
    assert json.loads((project / "runs/experiments/x/metrics.json").read_text())["val_loss"] == 5
    assert runs_of(project) == 3


def test_other_values_in_a_partial_are_another_run(project):
    counts = [runs_of(project, {"answer": functools.partial(max, 1, value)}) for value in (2, 2, 3)]
    assert counts == [1, 1, 2]


def test_other_threads_or_another_torch_are_another_run(project, monkeypatch):
    assert runs_of(project) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert runs_of(project) == 2
    monkeypatch.setattr(torch, "__version__", "0.1")
    assert [runs_of(project), runs_of(project)] == [3, 3]


def test_a_folder_that_another_run_has_used_is_not_kept(project):
    runs_of(project)
    argv = ["v1_fake.py", f"--out_dir={project}/runs/experiments/x", "--rate=7"]
    subprocess.run([sys.executable, *argv], cwd=project, check=True)
    assert [runs_of(project), runs_of(project)] == [3, 3]
    assert common.run("v1_fake", "x")["rate"] == "1"


def test_a_file_that_was_edited_after_the_start_is_not_taken_for_what_runs(project, monkeypatch):
    monkeypatch.setattr(common, "STARTED", time.time() - 1000)
    with pytest.raises(SystemExit, match=r"v1_fake.py has changed since .* again"):
        runs_of(project)


def test_a_rung_that_refuses_its_flags_ends_the_tool_with_its_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)error: --n_embd 0 .*what is done is kept") as end:
        common.run("v1_mlp", tmp_path / "x", n_embd=0)
    assert "--resume" not in str(end.value)


# --------------------------------------------- many runs ---------------------------------------------


class Halved(v1_mlp.LanguageModel):
    """v1's model, half as sure."""

    def forward(self, idx):
        return super().forward(idx) / 2


def test_run_all_gives_the_losses_of_run_with_one_thread(tmp_path, capsys):
    known = {"block_size", "batch_size", "window", "n_embd", "n_hidden", "warmup_steps", "max_steps"}
    flags = {name: value for name, value in TINY.items() if name in known} | {"eval_tokens": 300}
    data = tmp_path / "text.txt"
    data.write_text((ROOT / "input.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    flags["data"] = data
    replaces = {"plain": None, "halved": {"LanguageModel": Halved}}
    jobs = {str(tmp_path / name): ("v1_mlp", replace, flags) for name, replace in replaces.items()}
    losses = {name: metrics["val_loss"] for name, metrics in common.run_all(jobs).items()}
    assert capsys.readouterr().out.count("val loss") == 2
    alone = [common.run("v1_mlp", tmp_path / f"alone {name}", x, **flags) for name, x in replaces.items()]
    assert [*losses.values()] == [metrics["val_loss"] for metrics in alone]
    assert len(set(losses.values())) == 2

    keys = [(tmp_path / name / "key.txt").stat().st_mtime_ns for name in replaces]
    assert {name: metrics["val_loss"] for name, metrics in common.run_all(jobs).items()} == losses
    assert keys == [(tmp_path / name / "key.txt").stat().st_mtime_ns for name in replaces]
    assert capsys.readouterr().out == ""


STOP_ME = """
import sys
sys.path.insert(0, {tools!r})
from common import run, run_all, run_experiments
if __name__ == "__main__":
    flags = dict(max_steps=10**6, eval_interval=10**6, data={data!r})
    jobs = {{f"{folder}/{{seed}}": ("v1_mlp", None, flags | dict(seed=seed)) for seed in (1, 2, 3)}}
    alone = lambda: run("v1_mlp", "{folder}/1", **flags)
    run_experiments(99, {{"alone": alone, "many": lambda: run_all(jobs)}}, None)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is no signal there")
@pytest.mark.parametrize("experiment", ["alone", "many"])
def test_ctrl_c_in_an_experiment_says_what_is_true(experiment, folder):
    script = folder / "script.py"
    names = dict(tools=str(ROOT / "tools"), data=str(folder / "input.txt"), folder=folder)
    script.write_text(STOP_ME.format(**names))
    started = subprocess.Popen(
        [sys.executable, script, experiment],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    until = time.time() + 60
    while not (folder / "1").exists() and time.time() < until:
        time.sleep(0.05)
    time.sleep(0.5)  # by now it is in the loop
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does it: to all processes
    _, stderr = started.communicate(timeout=30)
    assert started.returncode == 1 and stderr.splitlines()[-1] == common.STOPPED
    assert "--resume" not in stderr and "Traceback" not in stderr
    with pytest.raises(ProcessLookupError):  # none is left; Python's own helper ends a moment later
        for _ in range(100):
            os.killpg(started.pid, 0)
            time.sleep(0.05)


# --------------------------------------- results and the ladder ---------------------------------------


def test_rungs_stand_in_the_order_of_their_numbers(tmp_path, monkeypatch):
    for name in ("v10_moe", "v9_rlhf", "v0_bigram", "v2_b"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert common.ladder() == ["v0_bigram", "v2_b", "v9_rlhf", "v10_moe"]


def test_nothing_is_lost_where_several_store_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "logs" / "results.json")

    def some(i):
        for n in range(10):
            common.store(f"section {i}", str(n), [0.12345678, {"n": n}])

    threads = [Thread(target=some, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = common.load_results()
    assert [len(results[f"section {i}"]) for i in range(8)] == [10] * 8
    assert results["section 3"]["7"] == [0.123457, {"n": 7}]


def test_spread_and_machine():
    assert common.spread([1.0, 3.0, 2.0]) == {"mean": 2, "least": 1, "most": 3, "values": [1, 3, 2]}
    assert re.fullmatch(r"\d+ cores of .+", common.machine())


def test_shares_of_nanogpt_are_of_one_machine():
    race = {"machine": "2 cores of A", "nanogpt": {"seconds": 50.0}}
    metrics = {"seconds": 10.0, "machine": "2 cores of A"}
    assert reproduce.share_of_nanogpt(metrics, {"race": race}) == "20%"
    for other in ({"seconds": 10.0}, metrics | {"machine": "2 cores of B"}):
        assert reproduce.share_of_nanogpt(other, {"race": race}) == "-"
    assert reproduce.share_of_nanogpt(metrics, {}) == "-"


def test_names_of_rungs():
    assert reproduce.named(["v1", "v0_bigram"]) == ["v0_bigram", "v1_mlp"]
    with pytest.raises(SystemExit, match=r"no rung v77; the rungs are v0_bigram, "):
        reproduce.named(["v1", "v77"])


@pytest.mark.parametrize(
    "flags", [["v0", "--all"], ["--all", "--tables"], ["--nanogpt=x"], ["v0", "--tables"]]
)
def test_reproduce_refuses_what_does_not_go_together(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags])
    with pytest.raises(SystemExit, match="error: give names of rungs, or --all"):
        reproduce.main()


@pytest.fixture
def done(tmp_path, monkeypatch):
    """Let reproduce.py do nothing but note what it would do; of all rungs only v0's default run is kept."""
    notes = []
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    for rung in common.RUNGS:
        (tmp_path / "runs" / rung).mkdir(parents=True)
        (tmp_path / "runs" / rung / "sample.txt").write_text("a sample")
    monkeypatch.setattr(reproduce, "kept", lambda rung, *_: {"config": {}} if rung == "v0_bigram" else None)
    monkeypatch.setattr(reproduce, "run_default", lambda rung: notes.append(rung) or {"config": {}})
    monkeypatch.setattr(reproduce, "run_tool", lambda *args: notes.append(" ".join(map(str, args))))
    monkeypatch.setattr(reproduce, "store", lambda *args: None)
    monkeypatch.setattr(reproduce, "rewrite", lambda: notes.append("rewrite"))
    monkeypatch.setattr(reproduce, "checkout", lambda path: path)
    monkeypatch.setattr(reproduce, "week_and_idea", lambda rung: ("1", "an idea"))

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *args])
        notes.clear()
        reproduce.main()
        return notes

    return run


def test_reproduce_runs_what_it_says(done, monkeypatch, capsys):
    weeks = [f"tools/{name}.py" for name in reproduce.WEEKS]
    assert len(weeks) >= 5
    stale = common.RUNGS[1:]
    assert done() == [*stale, *weeks, "rewrite"]
    assert done("v0", "v2") == ["v0_bigram", "v2_attention", "rewrite"]
    assert done("--tables") == ["rewrite"]
    everything = [*stale, *(f"{week} --all" for week in weeks)]
    monkeypatch.setattr(reproduce, "PEERS", ["json"])
    assert done("--all") == [*everything, "tests/bench_bpe.py --store", "rewrite"]
    monkeypatch.setattr(reproduce, "PEERS", ["json", "no_such_peer"])
    assert done("--all", "--nanogpt", "X") == [*everything, "tools/race_nanogpt.py X", "rewrite"]
    assert "its stored figures stay, no_such_peer not installed" in capsys.readouterr().out


def test_a_week_without_its_log_keeps_its_results_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "LOGS", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(sys, "argv", ["week_9.py"])
    common.run_experiments(9, {"a": lambda: 1}, lambda results: {"week_9": {"x": "new"}})
    assert common.load_results() == {"week_9": {"a": 1}}
    assert "there is no logs/week_9.md yet" in capsys.readouterr().out


def test_experiments_by_name_all_of_them_or_all_but_the_long_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "LOGS", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results.json")
    log = tmp_path / "week_9_b.md"
    log.write_text("<!-- block: x -->\nold\n<!-- end -->\n")
    done = []
    experiments = {
        name: functools.partial(lambda name: done.append(name) or len(done), name) for name in "abc"
    }

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["week_9.py", *args])
        tables = lambda results: {"week_9_b": {"x": str(sorted(results["week_9"]))}}  # noqa: E731
        done.clear()
        common.run_experiments(9, experiments, tables, long=["b"])
        return "".join(done)

    assert run() == "ac" and "old" in log.read_text()
    assert run("--all") == "abc" and "['a', 'b', 'c']" in log.read_text()
    assert run("c", "b") == "cb"
    with pytest.raises(SystemExit, match="no experiment d; choose from a, b, c"):
        run("d")


def test_a_race_without_nanogpt_is_refused_at_once(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="is no checkout of nanoGPT"):
        race_nanogpt.checkout(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "train.py").touch()
    (tmp_path / "config" / "train_shakespeare_char.py").touch()
    with pytest.raises(SystemExit, match=r"prepare.py"):
        race_nanogpt.checkout(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--all", f"--nanogpt={tmp_path}"])
    with pytest.raises(SystemExit, match=r"prepare.py"):
        reproduce.main()


# --------------------------------------- a rung of one's own ---------------------------------------

OLD, NEW = "v6_amp_ddp", "v10_mine"
FIELD = "    squared_relu: bool = False  # square what the ReLU lets through\n"
CLASS = '''class SquaredReLU(nn.Module):
    """The square of max(0, x)."""

    def forward(self, x):
        """Any shape to the same shape."""
        return F.relu(x).square()


'''
SINCE = """Since v6_amp_ddp.py
  added:    SquaredReLU
  changed:  Config, TransformerBlock
  removed:  -
"""
# README's steps: where they stand (a pattern), what is written there
STEPS = {
    "first line": (r'""".*', '"""v10, week 13: a squared ReLU (So et al. 2021). Does it beat the GELU?'),
    "result": (r"(?m)^Result: .*$", "Result: not measured yet."),
    "copied": (r"(?m)^Since v5_gpt2\.py$", "Since v6_amp_ddp.py"),
    "field": (r"(?m)^(?=    max_steps: int = )", FIELD),
    "class": (r"(?m)^(?=class TransformerBlock)", CLASS),
    "use": (
        r"nn\.GELU\(approximate=\"tanh\"\),",
        'SquaredReLU() if config.squared_relu else nn.GELU(approximate="tanh"),',
    ),
    "since": (r"Since v6_amp_ddp\.py\n(  .*\n)+", SINCE),
}


def section():
    """README's section on extending, without the indentation of a list."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return readme.split("\n## How to extend\n")[1].split("\n## ")[0]


def new_rung(without=()):
    """The source of the new rung after README's steps, or all but one of them."""
    text = (ROOT / f"{OLD}.py").read_text(encoding="utf-8")
    for name, (pattern, written) in STEPS.items():
        if name not in without:
            text, found = re.subn(pattern, lambda _: written, text, count=1)  # noqa: B023
            assert found == 1, name
    return text


def test_readme_has_the_steps():
    text = re.sub(r"\n +", "\n", section())
    for name, (_, written) in STEPS.items():
        lines = written.splitlines() if name != "since" else ["Since v6_amp_ddp.py"]
        for line in lines:
            assert line.strip() in text, f"{name}: {line}"


def commands():
    """The commands that README tells to type, in their order."""
    found = re.findall(r"^      ((?:cp|python|pytest|rm|git) .+)$", section(), flags=re.MULTILINE)
    assert [line.split()[0] for line in found] == ["cp", "python", "python", "pytest", "python", "rm", "git"]
    return found


@pytest.mark.parametrize(
    ("without", "test", "sentence"),
    [
        (
            "first line",
            "test_docstring_begins_with_number_week_and_idea",
            'Begin v10_mine.py with a line such as """v10, ',
        ),
        ("result", "test_docstring_result_is_the_stored_one", "make that line 'Result: not measured yet.'"),
        ("since", "test_docstring_lists_exactly_what_changed", f"of v10_mine.py these:\n\n{SINCE}"),
        (
            "comment",
            "test_config_fields_have_comments_and_classes_have_docstrings",
            "a comment behind Config's squared_relu",
        ),
        (
            "docstring",
            "test_config_fields_have_comments_and_classes_have_docstrings",
            "give SquaredReLU a docstring",
        ),
        ("room", "test_rooms_stand_in_order", "define LanguageModel in the room model"),
        (
            "banner",
            "test_rooms_stand_in_order",
            "keep the banners of these rooms, in this order: config, data, ",
        ),
        ("import", "test_imports_are_allowed", "copy what you need of v6_amp_ddp instead of importing it"),
        ("library", "test_imports_are_allowed", "do without scipy, a rung imports the standard library and "),
        ("mark", "test_no_marks_of_what_is_new", "say what the code does, not since when"),
        ("number", "test_every_rung_has_a_number_of_its_own", "rename yours to v11_mine.py"),
    ],
)
def test_a_step_that_is_left_out_fails_with_what_to_do(without, test, sentence, tmp_path, monkeypatch):
    text = new_rung([without])
    changes = {
        "comment": ("  # square what the ReLU lets through", ""),
        "docstring": ('    """The square of max(0, x)."""\n\n', ""),
        "room": ("\nclass LanguageModel(", "\nclass Model("),
        "banner": (" model -", " models -"),
        "import": ("import torch\n", f"import torch\nfrom {OLD} import main\n"),
        "library": ("import torch\n", "import torch\nimport scipy.special\n"),
        "mark": ("  # square what", "  # new in v10: square what"),
    }
    old, new = changes.get(without, ("", ""))
    assert old in text
    (tmp_path / f"{NEW}.py").write_text(text.replace(old, new) if old else text, encoding="utf-8")
    shutil.copy(ROOT / f"{OLD}.py", tmp_path)
    results = {"rungs": {OLD: common.load_results()["rungs"][OLD]}}
    rungs = [OLD, NEW, "v10_other"] if without == "number" else [OLD, NEW]
    monkeypatch.setattr(test_ladder, "ROOT", tmp_path)
    monkeypatch.setattr(test_ladder, "RUNGS", rungs)
    monkeypatch.setattr(test_ladder, "load_results", lambda: results)
    args = [OLD, NEW] if without == "since" else [NEW]
    with pytest.raises(pytest.fail.Exception, match=re.escape(sentence)) as end:
        getattr(test_ladder, test)(*args)
    assert NEW in str(end.value)


@pytest.mark.parametrize(("name", "passes"), [(NEW, True), ("v9_mine", False)])
def test_a_rung_of_ones_own_may_follow_any_lower_one(name, passes, tmp_path, monkeypatch):
    """Ours follow the direct neighbour below; v10 and more name the rung that they were copied from."""
    (tmp_path / f"{name}.py").write_text(new_rung(), encoding="utf-8")
    for rung in (OLD, "v8_lora"):
        shutil.copy(ROOT / f"{rung}.py", tmp_path)
    for module in (test_ladder, reproduce):
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "RUNGS", [OLD, "v8_lora", name])
    if passes:
        test_ladder.test_docstring_lists_exactly_what_changed("v8_lora", name)
        changed = difflib.ndiff(*((tmp_path / f"{x}.py").read_text().splitlines() for x in (OLD, name)))
        assert reproduce.lines_changed(name) == sum(line.startswith("+ ") for line in changed)
    else:
        with pytest.raises(pytest.fail.Exception, match=r"Since v8_lora\.py"):
            test_ladder.test_docstring_lists_exactly_what_changed("v8_lora", name)
        assert reproduce.lines_changed(name) > 500
    assert reproduce.lines_changed("v8_lora") > 500


@pytest.mark.skipif(sys.platform == "win32", reason="the commands are those of a Unix shell")
def test_readmes_steps_make_a_rung_that_passes_and_can_be_undone(tmp_path):
    project = tmp_path / "project"
    ignore = shutil.ignore_patterns(
        "runs", ".git", "exercises", ".venv", "venv", "__pycache__", ".*_cache", "v[0-9]*_*"
    )
    shutil.copytree(ROOT, project, ignore=ignore)
    for path in [ROOT / f"{name}.py" for name in common.RUNGS if common.number(name) < 10]:
        shutil.copy(path, project)  # a rung of the reader's own stays out
    results = common.load_results()
    results["rungs"].pop(NEW, None)
    (project / "logs" / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (project / "input.txt").write_text(
        (ROOT / "input.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8", newline="\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env["PATH"]

    def shell(line):
        done = subprocess.run(
            line,
            shell=True,
            cwd=project,
            env=env,
            encoding="utf-8",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}"
        return done.stdout

    shell("git init -q && git add . && git -c user.name=x -c user.email=x@x commit -qm x")
    copy, train, sample, test, measure, remove, restore = commands()
    shell(copy)
    (project / f"{NEW}.py").write_text(new_rung(), encoding="utf-8", newline="\n")
    shell(train)
    config = torch.load(project / "runs/try/checkpoint.pt", weights_only=True)["config"]
    assert config["squared_relu"] is True
    assert len(shell(sample)) > 300
    assert re.search(r"\b\d+ passed", shell(f"{test} -n 0"))

    for name, value in {**TINY, "squared_relu": True}.items():  # the defaults would take minutes
        text = (project / f"{NEW}.py").read_text(encoding="utf-8")
        text = re.sub(rf"(?m)^(    {name}: \w+ = )\S+", rf"\g<1>{value!r}", text)
        (project / f"{NEW}.py").write_text(text, encoding="utf-8", newline="\n")
    before = (project / "README.md").read_text(encoding="utf-8")
    shell(measure)
    stored = json.loads((project / "logs/results.json").read_text(encoding="utf-8"))["rungs"][NEW]
    assert reproduce.result_line(stored) in (project / f"{NEW}.py").read_text(encoding="utf-8")
    rows = set((project / "README.md").read_text(encoding="utf-8").splitlines()) - set(before.splitlines())
    assert [row.split(" | ")[0] for row in rows] == [f"| [{NEW}.py]({NEW}.py)"]
    row = rows.pop()
    assert (
        " | 13 | a squared ReLU | " in row
        and f" | {stored['val_loss']:.4f} | " in row
        and row.endswith(" | - |")
    )
    changed = {line[3:] for line in shell("git status --porcelain").splitlines()}
    assert changed == {"README.md", "logs/ladder.png", "logs/results.json", f"{NEW}.py"}
    shell(remove)
    shell(restore)
    assert shell("git status --porcelain") == ""
