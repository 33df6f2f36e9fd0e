"""What the tools share: logs/results.json, tables in Markdown files, and one way to run a rung."""

import importlib
import json
import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "logs"
RESULTS = LOGS / "results.json"
sys.path.insert(0, str(ROOT))


def load_results():
    """Return logs/results.json as a dict, an empty one if there is no such file yet."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def store(section, name, value):
    """Set results[section][name] = value in logs/results.json, floats rounded to 6 digits after the point."""

    def rounded(x):
        if isinstance(x, dict):
            return {str(k): rounded(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [rounded(v) for v in x]
        return round(x, 6) if isinstance(x, float) else x

    results = load_results()
    results.setdefault(section, {})[name] = rounded(value)
    RESULTS.parent.mkdir(exist_ok=True)
    text = json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False)
    RESULTS.write_text(text + "\n", encoding="utf-8", newline="\n")


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


def run(rung, name, replace=None, **flags):
    """Run `rung` ("v1_mlp") as from the command line with `flags`; return its metrics.

    `name` is the folder below runs/experiments; `replace` maps names in the rung's module to stand-ins: so
    an experiment leaves something out or puts something else in.
    """
    module = importlib.import_module(rung)
    out_dir = ROOT / "runs" / "experiments" / name
    argv = [f"{rung}.py", f"--data={ROOT / 'input.txt'}", f"--out_dir={out_dir}"]
    argv += [f"--{flag}={value}" for flag, value in flags.items()]
    replace = {"NAME": rung, **(replace or {})}
    with patch.object(sys, "argv", argv), patch.multiple(module, **replace), redirect_stdout(StringIO()):
        module.main()
    plt.close("all")
    return json.loads((out_dir / "metrics.json").read_text(encoding="utf-8"))


def run_experiments(week, experiments, tables, long=()):
    """The main of tools/week_N.py: run the experiments named on the command line or all; fill the log.

    `experiments` maps names to functions that return what is stored, `tables` makes blocks of the results.
    Those in `long` take hours and run only if they are named.
    """
    chosen = sys.argv[1:] or [name for name in experiments if name not in long]
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
    results = load_results()
    if "rungs" in results and set(experiments) <= results[f"week_{week}"].keys():
        fill(LOGS / f"week_{week}.md", tables(results))
