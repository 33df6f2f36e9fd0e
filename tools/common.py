"""What the tools share: logs/results.json, tables in Markdown files, and runs of rungs that are kept."""

import ast
import functools
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from multiprocessing.connection import wait
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "logs"
RESULTS = LOGS / "results.json"
STARTED = time.time()
STOPPED = "stopped: what is done is kept, the same command goes on with the rest"
FAILED = "a run has failed: what is done is kept, the same command goes on with the rest"
sys.path.insert(0, str(ROOT))


def number(name):
    """The number in the name of a rung or a log: 10 for v10_moe, 5 for week_5_positions."""
    return int(re.search(r"\d+", name)[0])


def ladder():
    """The names of all rungs from the lowest up, v10 after v9."""
    names = [path.stem for path in ROOT.glob("v[0-9]*_*.py")]
    return sorted(names, key=lambda name: (number(name), name))


RUNGS = ladder()

# ---------------------------------------- results and tables ----------------------------------------


def load_results():
    """Return logs/results.json as a dict, an empty one if there is no such file yet."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


@contextmanager
def locked():
    """Wait until no other tool is at logs/results.json, and keep the others waiting."""
    path = ROOT / "runs" / "results.lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("a+") as file:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # given back when the file is closed
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def store(section, name, value):
    """Set results[section][name] = value in logs/results.json, floats rounded to 6 digits after the point."""

    def rounded(x):
        if isinstance(x, dict):
            return {str(k): rounded(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [rounded(v) for v in x]
        return round(x, 6) if isinstance(x, float) else x

    with locked():
        results = load_results()
        results.setdefault(section, {})[name] = rounded(value)
        RESULTS.parent.mkdir(exist_ok=True)
        text = json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False)
        whole = RESULTS.with_suffix(".json.new")
        whole.write_text(text + "\n", encoding="utf-8", newline="\n")
        os.replace(whole, RESULTS)


def spread(values):
    """What three seeds of one setting say: their mean, the least, the most, and each."""
    values = list(values)
    return {"mean": sum(values) / len(values), "least": min(values), "most": max(values), "values": values}


def table(header, rows):
    """Return a Markdown table; columns are aligned right but the first."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def fill(path, blocks):
    """Put each text of `blocks` between `<!-- block: NAME -->` and `<!-- end -->` in the file `path`."""
    text = path.read_text(encoding="utf-8")
    for name, content in blocks.items():
        pattern = rf"(<!-- block: {re.escape(name)} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m: m[1] + content + "\n" + m[2], text, flags=re.DOTALL)  # noqa: B023
        if found != 1:
            raise ValueError(f"{path.name} has {found} blocks named {name}, not one")
    path.write_text(text, encoding="utf-8", newline="\n")


# ------------------------------------------- running rungs -------------------------------------------


def cores():
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine():
    """This machine in words, to stand beside what was timed on it: 2 cores of AMD EPYC."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux" and Path("/proc/cpuinfo").exists():
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
        name = names[0] if names else name
    elif sys.platform == "darwin":
        args = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(args, capture_output=True, encoding="utf-8").stdout.strip() or name
    return f"{cores()} cores of {name}"


def code_of(source):
    """A Python text without what changes no run here: comments, docstrings, what only a script does."""
    try:
        tree = ast.parse(textwrap.dedent(source))
    except SyntaxError:  # a lambda's lines may be half a statement
        return source
    main = "if __name__ == '__main__':"  # the tools import a rung, then call its main()
    tree.body = [node for node in tree.body if not ast.unparse(node).startswith(main)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def own_file(thing):
    """The file that a class, function or module comes from if it is one of ours, else None."""
    try:
        path = Path(inspect.getsourcefile(thing) or "").resolve()
    except TypeError:  # built in, or no such thing
        return None
    return path if path.parent in (ROOT, ROOT / "tools", ROOT / "tests") else None


def described(thing, seen):
    """What a stand-in does, as text: its code and that of all it uses of ours. `seen` gets what is told."""
    if isinstance(thing, functools.partial):
        return described([thing.func, thing.args, thing.keywords], seen)
    if isinstance(thing, dict):
        return described(sorted(thing.items()), seen)
    if isinstance(thing, list | tuple):
        return "\n".join(described(x, seen) for x in thing)
    is_code = inspect.isclass(thing) or inspect.isfunction(thing)
    path = own_file(thing)
    if not path:
        return getattr(thing, "__name__", re.sub(r" at 0x\w+", "", repr(thing)))
    if not is_code or path.parent == ROOT:  # a module, or a piece of a rung: the whole file
        name, thing, source = thing.__name__, path, path.read_text(encoding="utf-8")
    else:
        name, source = thing.__qualname__, inspect.getsource(thing)
    if thing in seen:
        return name
    seen.append(thing)
    functions, uses = [thing] if inspect.isfunction(thing) else [], []
    if inspect.isclass(thing):
        parts = [getattr(x, "__func__", getattr(x, "fget", x)) for x in vars(thing).values()]
        functions = [x for x in parts if inspect.isfunction(x) and own_file(x)]
        uses = [*thing.__bases__, *(x for x in parts if inspect.isclass(x))]
    for function in functions:
        found = inspect.getclosurevars(function)
        uses += [found.globals, found.nonlocals]
    return name + "\n" + code_of(source) + described(uses, seen)


def key_of(rung, replace, flags):
    """A hash of all that decides what a run computes; while it is the same, a kept result is true.

    That is the code of the rung and of the files of ours that it imports, of the stand-ins, the flags, the
    contents of the files they name, the number of threads and PyTorch's version.
    """
    code = code_of((ROOT / f"{rung}.py").read_text(encoding="utf-8"))
    imported = [ROOT / f"{name}.py" for name in re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)]
    values = {}
    for name, value in flags.items():
        file = Path(str(value))
        file = file / "checkpoint.pt" if file.is_dir() else file  # a model that is begun with
        values[name] = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else str(value)
    parts = [code, *(code_of(file.read_text(encoding="utf-8")) for file in imported if file.exists())]
    parts += [json.dumps(values, sort_keys=True), described(replace, []).replace(str(ROOT), "")]
    parts += [str(torch.get_num_threads()), torch.__version__]
    return hashlib.sha256("\n\n".join(parts).encode()).hexdigest()


def with_data(flags):
    """The flags of a run, and the text that it learns from if they name none."""
    return {"data": ROOT / "input.txt", **flags}


def seal(folder, key):
    """What is written beside a run: its key, and a hash of what it made, which another run would replace."""
    made = b"".join(
        (folder / name).read_bytes() for name in ("metrics.json", "checkpoint.pt") if (folder / name).exists()
    )
    return f"{key}\n{hashlib.sha256(made).hexdigest()}\n"


def kept(rung, folder, replace, flags):
    """The metrics of a run that is kept in `folder` if it is this very run, else None."""
    file, key = folder / "key.txt", key_of(rung, replace, with_data(flags))
    if file.exists() and file.read_text(encoding="utf-8") == seal(folder, key):
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return None


def run_in(folder, rung, replace, flags):
    """Run a rung as from the command line, in this process; its files and its key go to `folder`."""
    for path in {ROOT / f"{rung}.py", *map(own_file, replace.values())} - {None}:
        if path.stat().st_mtime > STARTED:
            sys.exit(f"{path.name} has changed since this command began: give the command again")
    key = key_of(rung, replace, with_data(flags))
    module = importlib.import_module(rung)
    (folder / "key.txt").unlink(missing_ok=True)
    argv = [f"{rung}.py", f"--out_dir={folder}"]
    for name, value in with_data(flags).items():
        no = "" if value else "no-"
        argv.append(f"--{no}{name}" if isinstance(value, bool) else f"--{name}={value}")
    # A rung answers Ctrl-C with a checkpoint to resume from. Here nothing is resumed: let Ctrl-C end it.
    with patch.object(signal, "signal"), patch.object(sys, "argv", argv), redirect_stdout(StringIO()):
        with patch.multiple(module, **replace) if replace else nullcontext():
            module.main()
    plt.close("all")
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8")) | {"machine": machine()}
    path.write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    (folder / "key.txt").write_text(seal(folder, key), encoding="utf-8")
    return metrics


def run(rung, name, replace=None, **flags):
    """Run `rung` ("v1_mlp") as from the command line with `flags`, with all cores; return its metrics.

    `name` is the folder below runs/experiments; `replace` maps names in the rung's module to stand-ins: so
    an experiment leaves something out or puts something else in. A result that is kept is returned at once.
    """
    folder = ROOT / "runs" / "experiments" / name
    try:
        return kept(rung, folder, replace or {}, flags) or run_in(folder, rung, replace or {}, flags)
    except SystemExit as end:
        sys.exit(f"{name}: {str(end).strip()}\n{FAILED}")


def job(name, *args):
    """One run of run_all, in a process of its own: one thread, no progress bar."""
    torch.set_num_threads(1)
    try:
        with redirect_stderr(StringIO()):
            run_in(*args)
    except SystemExit as end:
        sys.exit(f"{name}: {str(end).strip()}")


def start(target, *args):
    """Start a function in a fresh process that does not hear Ctrl-C; return the process."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a new process begins with that
    process.start()
    signal.signal(signal.SIGINT, heard)
    return process


def run_all(jobs):
    """Run many experiments, as many at a time as there are cores; return {name: metrics}.

    `jobs` maps names to (rung, replace, flags), as for `run`. Each has one thread, so that losses do not
    depend on the number of cores; its seconds mean little. What is kept is not run again.
    """
    threads, results, waiting, processes = torch.get_num_threads(), {}, [], {}
    torch.set_num_threads(1)
    try:
        for name, (rung, replace, flags) in jobs.items():
            folder = ROOT / "runs" / "experiments" / name
            results[name] = kept(rung, folder, replace or {}, flags)
            if not results[name]:
                waiting.append((name, folder, rung, replace or {}, flags))
        while waiting or processes:
            while waiting and len(processes) < cores():
                process = start(job, *waiting[0])
                processes[process.sentinel] = process, *waiting.pop(0)[:2]
            for sentinel in wait(processes):
                process, name, folder = processes.pop(sentinel)
                process.join()
                if process.exitcode:  # it has said why
                    sys.exit(FAILED)
                results[name] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
                print(f"  {name}: val loss {results[name]['val_loss']:.4f}", flush=True)
    finally:
        torch.set_num_threads(threads)
        for process, *_ in processes.values():
            process.terminate()
            process.join()
    return results


def default(rung):
    """A default run as if typed in the project's folder: what it saves names its text and folder that way."""
    os.chdir(ROOT)
    run_in(Path("runs", rung), rung, {}, {"data": "input.txt"})


def run_default(rung):
    """Run a rung with its defaults, alone, with all cores, in a process of its own; return its metrics."""
    process = start(default, rung)
    try:
        process.join()
    finally:
        process.terminate()
        process.join()
    if process.exitcode:
        sys.exit(FAILED)
    return json.loads((ROOT / "runs" / rung / "metrics.json").read_text(encoding="utf-8"))


def run_experiments(week, experiments, tables, long=()):
    """The main of tools/week_N.py: run the experiments named on the command line or all; fill the logs.

    `experiments` maps names to functions that return what is stored, `tables` makes of the results a dict
    {stem of a log: {name of a block: text}}. Those in `long` take hours and run only if they are named or
    with --all.
    """
    chosen = sys.argv[1:] or [name for name in experiments if name not in long]
    chosen = list(experiments) if chosen == ["--all"] else chosen
    if unknown := set(chosen) - set(experiments):
        sys.exit(f"error: no experiment {', '.join(sorted(unknown))}; choose from {', '.join(experiments)}")
    for name in chosen:
        print(f"week {week}: {name}", flush=True)
        try:
            store(f"week_{week}", name, experiments[name]())
        except FileNotFoundError as error:
            sys.exit(
                f"error: there is no {error.filename}; run the rung of week {week} with its defaults first"
            )
        except KeyboardInterrupt:
            sys.exit(f"\n{STOPPED}")
    fill_logs(week, experiments, tables)


def fill_logs(week, experiments, tables):
    """Write the tables of a week into those of its logs that there are, if all its experiments have run."""
    results = load_results()
    if missing := set(experiments) - results.get(f"week_{week}", {}).keys():
        print(f"week {week}: its logs stay as they are until {', '.join(sorted(missing))} has run")
    else:
        for stem, blocks in tables(results).items():
            if (LOGS / f"{stem}.md").exists():
                fill(LOGS / f"{stem}.md", blocks)
            else:
                print(f"week {week}: there is no logs/{stem}.md yet, its results are in results.json alone")
