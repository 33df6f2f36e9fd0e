"""Run the rungs with their defaults; rewrite every number and picture that README and logs show of them.

    python tools/reproduce.py             all rungs, then the experiments of every week (90 minutes)
    python tools/reproduce.py v0 v3       these rungs only
    python tools/reproduce.py --tables    run nothing: rewrite tables and ladder.png from logs/results.json

Written: logs/results.json, the ladder table in README, logs/ladder.png, each docstring's `Result:` line.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys

import matplotlib.pyplot as plt
from common import LOGS, ROOT, fill, load_results, store, table

RUNGS = sorted(path.stem for path in ROOT.glob("v[0-9]*_*.py"))

# Figures of nanoGPT that the text compares with: its README's for an A100, and one of its CPU command.
REFERENCES = {"nanogpt_gpu_val_loss": 1.4697, "val_loss_to_pass": 1.886}


def run_rung(rung):
    """Train a rung with its defaults in a process of its own; store its metrics."""
    print(f"\n{rung}", flush=True)
    subprocess.run([sys.executable, f"{rung}.py"], cwd=ROOT, check=True)
    metrics = json.loads((ROOT / "runs" / rung / "metrics.json").read_text(encoding="utf-8"))
    metrics["sample"] = (ROOT / "runs" / rung / "sample.txt").read_text(encoding="utf-8")
    del metrics["config"]
    store("rungs", rung, metrics)


def lines_changed(rung):
    """Larger column of `git diff --no-index --numstat` against the rung below; None for the first."""
    place = RUNGS.index(rung)
    if place == 0:
        return None
    args = ["git", "diff", "--no-index", "--numstat", f"{RUNGS[place - 1]}.py", f"{rung}.py"]
    numstat = subprocess.run(args, cwd=ROOT, capture_output=True, encoding="utf-8").stdout
    return max(map(int, numstat.split()[:2]))


def result_line(metrics):
    """The `Result:` line of a rung's docstring."""
    machine = f"{metrics['threads']} CPU cores" if metrics["device"] == "cpu" else metrics["device"]
    return (
        f"Result: val loss {metrics['val_loss']:.4f}, {metrics['bits_per_char']:.2f} bits/char, "
        f"{metrics['params']:,} parameters, {metrics['seconds']:.0f} s on {machine}."
    )


def ladder_table(results):
    """The ladder as a Markdown table, one row a rung."""
    header = [
        "rung",
        "week",
        "idea",
        "parameters",
        "val loss",
        "bits/char",
        "seconds",
        "lines changed",
        "log",
    ]
    rows = []
    for rung in RUNGS:
        first_line = (ROOT / f"{rung}.py").read_text(encoding="utf-8").split("\n")[0]
        week, idea = re.match(r'"""v\d+, week (\d+): (.+?)[.(]', first_line).groups()
        m = results["rungs"][rung]
        numbers = [
            f"{m['params']:,}",
            f"{m['val_loss']:.4f}",
            f"{m['bits_per_char']:.2f}",
            f"{m['seconds']:.0f}",
        ]
        log = f"[week {week}](logs/week_{week}.md)"
        rows.append(
            [f"[{rung}.py]({rung}.py)", week, idea.strip(), *numbers, lines_changed(rung) or "-", log]
        )
    return table(header, rows)


def readme_blocks(results):
    """The blocks of README.md."""
    sample = results["rungs"]["v3_gpt"]["sample"].strip()
    return {"ladder": ladder_table(results), "sample": f"```\n{sample[:330].rsplit(chr(10), 1)[0]}\n```"}


def plot_ladder(results):
    """Write logs/ladder.png: the validation curves of all rungs over training time."""
    fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for rung in RUNGS:
        history = results["rungs"][rung]["history"]
        ax.plot([point["seconds"] for point in history], [point["val_loss"] for point in history], label=rung)
    ax.set(
        xscale="log",
        xlabel="training time on two CPU cores (seconds)",
        ylabel="val loss (nats per character)",
    )
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(LOGS / "ladder.png", dpi=100)


def rewrite():
    """Rewrite from logs/results.json all that README, the docstrings and the weekly logs show of it."""
    results = load_results()
    if missing := set(RUNGS) - results.get("rungs", {}).keys():
        print(f"no tables yet: {', '.join(sorted(missing))} has not run")
        return
    for rung in RUNGS:
        path = ROOT / f"{rung}.py"
        text = re.sub(
            r"^Result: .*$", result_line(results["rungs"][rung]), path.read_text("utf-8"), flags=re.M
        )
        path.write_text(text, encoding="utf-8", newline="\n")
    fill(ROOT / "README.md", readme_blocks(results))
    plot_ladder(results)
    for path in sorted(LOGS.glob("week_*.md")):
        fill(path, importlib.import_module(path.stem).tables(results))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rungs", nargs="*", help="v0 v1 ...; none: everything, the weekly experiments too")
    parser.add_argument("--tables", action="store_true", help="run nothing, rewrite the tables only")
    args = parser.parse_args()
    chosen = [
        rung for rung in RUNGS if not args.rungs or rung.split("_")[0] in args.rungs or rung in args.rungs
    ]
    if len(chosen) < len(set(args.rungs)):
        sys.exit(f"error: the rungs are {', '.join(RUNGS)}, or v0, v1 ...; got {' '.join(args.rungs)}")
    if not args.tables:
        for name, value in REFERENCES.items():
            store("references", name, value)
        for rung in chosen:
            run_rung(rung)
        for path in [] if args.rungs else sorted(ROOT.glob("tools/week_*.py")):
            subprocess.run([sys.executable, path], cwd=ROOT, check=True)
    rewrite()


if __name__ == "__main__":
    main()
