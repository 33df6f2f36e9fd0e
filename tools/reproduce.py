"""Rerun what is published; rewrite every number and picture that README, docstrings and logs show of it.

    python tools/reproduce.py             train what is stale or missing: the rungs with their defaults, then
                                          the experiments of every week
    python tools/reproduce.py v0 v7_mine  train these rungs anew with their defaults, nothing else
    python tools/reproduce.py --all       all that is published: as without arguments, then the experiments
                                          that take hours, the tokenizer's bench, the race (--nanogpt PATH)
    python tools/reproduce.py --tables    train nothing: rewrite text and pictures from logs/results.json

A run is kept below runs/ with a key: a hash of the rung's code, flags and text, the number of threads and
PyTorch's version. Where the key is the same, nothing is trained. A fresh clone keeps no run: there, on two
cores, it takes some five hours, and --all some eight. The rungs alone take a quarter of an hour. Ctrl-C ends
it at any time; what is done is kept, and the same command goes on with the rest. What --all cannot measure
here stays as it is stored, and it says so: the race without PATH, the bench without all of its peers (see
tests/bench_bpe.py), week 5's `elsewhere` without the text it is about.

Written: logs/results.json, the tables and pictures of README, logs and model cards, each docstring's
`Result:` line. With `git checkout README.md logs 'v*.py'` all of this is as it was, also other edits there.
"""

import argparse
import importlib
import importlib.util
import math
import re
import signal
import subprocess
import sys

import matplotlib.pyplot as plt
from cards import published_blocks
from common import (
    LOGS,
    ROOT,
    RUNGS,
    STOPPED,
    fill,
    fill_logs,
    kept,
    load_results,
    number,
    run_default,
    store,
    table,
)
from race_nanogpt import checkout

# Figures of nanoGPT that the text compares with: its README's for an A100, and one of its CPU command.
REFERENCES = {"nanogpt_gpu_val_loss": 1.4697, "val_loss_to_pass": 1.886}
WEEKS = sorted((path.stem for path in ROOT.glob("tools/week_*.py")), key=lambda name: int(name[5:]))
PEERS = ("minbpe", "tiktoken", "tokenizers", "rustbpe")  # of the tokenizer, in tests/bench_bpe.py
NOT_MEASURED = "Result: not measured yet."


def run_rung(rung, anew):
    """Train a rung with its defaults unless that run is kept and not wanted `anew`; store its metrics."""
    folder = ROOT / "runs" / rung
    metrics = None if anew else kept(rung, folder, {}, {})
    print(f"{rung}: {'kept' if metrics else 'training'}", flush=True)
    metrics = metrics or run_default(rung)
    metrics["sample"] = (folder / "sample.txt").read_text(encoding="utf-8")
    del metrics["config"]
    store("rungs", rung, metrics)


def run_tool(*args):
    """Run another tool in a process of its own. Ctrl-C ends it; it says what is kept, so we say nothing."""
    process = subprocess.Popen([sys.executable, *args], cwd=ROOT)
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = process.wait()
    signal.signal(signal.SIGINT, heard)
    if code:
        sys.exit(code)


def lines_changed(rung):
    """Larger column of `git diff --no-index --numstat` against the rung below; None for the first.

    A learner's own rung, from v10 on, may follow any lower one: the one that it names after `Since`.
    """
    lower = RUNGS[: RUNGS.index(rung)]
    if not lower:
        return None
    since = re.search(r"^Since (\w+)\.py$", (ROOT / f"{rung}.py").read_text(encoding="utf-8"), flags=re.M)
    below = since[1] if number(rung) > 9 and since and since[1] in lower else lower[-1]
    args = ["git", "diff", "--no-index", "--numstat", f"{below}.py", f"{rung}.py"]
    numstat = subprocess.run(args, cwd=ROOT, capture_output=True, encoding="utf-8").stdout
    return max(map(int, numstat.split()[:2]))


def result_line(metrics):
    """The `Result:` line of a rung's docstring."""
    machine = f"{metrics['threads']} CPU cores" if metrics["device"] == "cpu" else metrics["device"]
    if compared := metrics.get("compared"):  # from v7 on, a model in fewer bytes
        plain = compared["none"]
        kind = next(name for name, m in compared.items() if m["megabytes"] == metrics["megabytes"])
        return (
            f"Result: {kind} {metrics['megabytes']:.2f} MB, {metrics['bits_per_char']:.2f} bits/char, "
            f"{metrics['new_tokens_per_second']:.0f} tokens/s; as it was {plain['megabytes']:.2f} MB, "
            f"{plain['bits_per_char']:.2f}, {plain['new_tokens_per_second']:.0f} on {machine}."
        )
    if "preferred" in metrics:  # v9, a model that is preferred
        return (
            f"Result: preferred to v8's replies in {metrics['preferred']:.1%}, KL {metrics['kl']:.1f} nats; "
            f"plain text {metrics['bits_per_char']:.2f} bits/char, {metrics['seconds']:.0f} s on {machine}."
        )
    if "names_right" in metrics:  # v8, a model that answers
        before = metrics["before"]
        return (
            f"Result: {metrics['names_right']:.1%} of new names right, before {before['names_right']:.1%}; "
            f"plain text {metrics['bits_per_char']:.2f} bits/char, {metrics['seconds']:.0f} s on {machine}."
        )
    return (
        f"Result: val loss {metrics['val_loss']:.4f}, {metrics['bits_per_char']:.2f} bits/char, "
        f"{metrics['params']:,} parameters, {metrics['seconds']:.0f} s on {machine}."
    )


def week_and_idea(rung):
    """What the first line of a rung's docstring says: \"\"\"v4, week 5: positions (Su et al. 2021). ..."""
    first_line = (ROOT / f"{rung}.py").read_text(encoding="utf-8").split("\n")[0]
    found = re.match(r'"""v\d+, week (\d+): (.+?)[.(]', first_line)
    if not found:
        sys.exit(f'error: {rung}.py must begin with a line such as """{rung.split("_")[0]}, week 5: an idea.')
    return found[1], found[2].strip()


def share_of_nanogpt(metrics, results):
    """The seconds of a run as a percentage of those of nanoGPT's CPU command, if timed on one machine."""
    race = results.get("race", {})
    if "machine" not in metrics or metrics["machine"] != race.get("machine"):
        return "-"
    return f"{100 * metrics['seconds'] / race['nanogpt']['seconds']:.0f}%"


def taken_over(rung, results):
    """Whether a rung's model is one that a rung below has trained: they have one history."""
    runs, below = results["rungs"], RUNGS[: RUNGS.index(rung)]
    return any(runs[other]["history"] == runs[rung]["history"] for other in below if other in runs)


def ladder_table(results):
    """The ladder as a Markdown table, one row for each rung that has run."""
    header = ["rung", "week", "idea", "parameters", "val loss", "bits/char", "seconds", "of nanoGPT's"]
    rows = []
    for rung in [rung for rung in RUNGS if rung in results["rungs"]]:
        m, (week, idea) = results["rungs"][rung], week_and_idea(rung)
        loss = "-" if "before" in m else f"{m['val_loss']:.4f}"  # of answers, not of text
        numbers = [f"{m['params']:,}", loss, f"{m['bits_per_char']:.2f}"]
        seconds = [f"{m['seconds']:.0f}", "-" if "before" in m else share_of_nanogpt(m, results)]
        numbers += ["-", "-"] if taken_over(rung, results) else seconds
        numbers.append(lines_changed(rung) or "-")
        has_log = (LOGS / f"week_{week}.md").exists()
        log = f"[week {week}](logs/week_{week}.md)" if has_log else "-"
        rows.append([f"[{rung}.py]({rung}.py)", week, idea, *numbers, log])
    return table([*header, "lines changed", "log"], rows)


def records_table(results):
    """The records of tools/speedrun.py as a Markdown table, the slowest first."""
    records = sorted(results.get("speedrun", {}).items(), key=lambda record: -record[1]["share"])
    rows = []
    for name, m in records:
        seconds = "{mean:.0f} ({least:.0f} to {most:.0f})".format(**m["seconds"])
        losses = "{least:.4f} to {most:.4f}".format(**m["loss"])
        command = f"`{' '.join([m['script'], *m['flags']])}`"
        rows.append(
            [name, command, f"{m['params']:,}", f"{m['steps']:,}", losses, seconds, f"{m['share']:.2f}"]
        )
    header = ["what is new", "command", "parameters", "steps", "nats per character", "seconds"]
    return table([*header, "of v4's default run"], rows)


def readme_blocks(results):
    """The blocks of README.md."""
    sample = results["rungs"]["v3_gpt"]["sample"].strip()
    blocks = {"ladder": ladder_table(results), "records": records_table(results)}
    return blocks | {"sample": f"```\n{sample[:330].rsplit(chr(10), 1)[0]}\n```"}


def plot_ladder(results):
    """Write logs/ladder.png: the validation curves of all rungs over training time, and how each ends."""
    trained = [rung for rung in RUNGS if rung in results["rungs"] and not taken_over(rung, results)]
    runs = {rung: results["rungs"][rung] for rung in trained if "before" not in results["rungs"][rung]}
    fig, ax = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for i, (rung, run) in enumerate(runs.items()):
        seconds = [point["seconds"] for point in run["history"]]
        per_char = run["bits_per_char"] * math.log(2) / run["val_loss"]  # a token may be several characters
        losses = [per_char * point["val_loss"] for point in run["history"]]
        ax.plot(seconds, losses, color=f"C{i}", label=rung)
        ax.plot(run["seconds"], per_char * run["val_loss"], "o", color=f"C{i}", markeredgecolor="black")
    ax.plot([], [], "o", color="white", markeredgecolor="black", label="at the end, on the whole split")
    mlp, attention = (runs[rung] for rung in ("v1_mlp", "v2_attention"))
    passes = [point["seconds"] for point in attention["history"] if point["val_loss"] < mlp["val_loss"]]
    text = f"v1 has {mlp['val_loss']:.2f} after {mlp['seconds']:.0f} s,\n"
    text += f"v2 is there after {passes[0]:.0f} s" if passes else "v2 does not get there"
    ax.text(mlp["seconds"], mlp["val_loss"] - 0.02, text, ha="right", va="top")
    end = (passes[0] if passes else attention["seconds"], mlp["val_loss"])
    ax.annotate("", (mlp["seconds"], mlp["val_loss"]), end, arrowprops={"arrowstyle": "<->"})
    machines = {run.get("machine", "") for run in runs.values()}
    where = f" on {machines.pop()}" if len(machines) == 1 and "" not in machines else ""
    ax.set(xscale="log", xlabel=f"training time{where} (seconds)", ylabel="val loss (nats per character)")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(LOGS / "ladder.png", dpi=100)
    plt.close(fig)


def rewrite():
    """Rewrite from logs/results.json all that README, the docstrings and the weekly logs show of it."""
    results = load_results()
    for rung in [rung for rung in RUNGS if rung in results["rungs"]]:
        path = ROOT / f"{rung}.py"
        line = result_line(results["rungs"][rung])
        text = re.sub(r"^Result: .*$", line, path.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
        path.write_text(text, encoding="utf-8", newline="\n")
    fill(ROOT / "README.md", readme_blocks(results))
    for kind, blocks in published_blocks(results).items():
        fill(LOGS / f"card_{kind}.md", blocks)
    plot_ladder(results)
    for name in WEEKS:
        week = importlib.import_module(name)
        fill_logs(int(name[5:]), week.EXPERIMENTS, week.tables)


def named(names):
    """The rungs of these names: v3_gpt, or v3 for all of that number."""
    chosen = [rung for rung in RUNGS if rung in names or rung.split("_")[0] in names]
    known = {*RUNGS, *(rung.split("_")[0] for rung in RUNGS)}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"error: no rung {', '.join(unknown)}; the rungs are {', '.join(RUNGS)}, or v0, v1 ...")
    return chosen


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rungs", nargs="*", help="v0 v1 ...: train these anew, and nothing else")
    parser.add_argument("--all", action="store_true", help="all that is published")
    parser.add_argument("--nanogpt", metavar="PATH", help="with --all: a checkout of nanoGPT to race against")
    parser.add_argument("--tables", action="store_true", help="train nothing, rewrite text and pictures only")
    args = parser.parse_args()
    if sum(map(bool, (args.rungs, args.all, args.tables))) > 1 or (args.nanogpt and not args.all):
        sys.exit(
            "error: give names of rungs, or --all, with or without --nanogpt PATH, or --tables, or nothing"
        )
    chosen = named(args.rungs)
    for rung in RUNGS:  # what is wrong should be said now rather than after hours
        week_and_idea(rung)
    if args.nanogpt:
        checkout(args.nanogpt)
    if not args.tables:
        for name, value in REFERENCES.items():
            store("references", name, value)
        for rung in chosen or RUNGS:
            run_rung(rung, anew=bool(chosen))
        for name in [] if chosen else WEEKS:
            run_tool(f"tools/{name}.py", *["--all"] * args.all)
        if args.all:
            if missing := [name for name in PEERS if not importlib.util.find_spec(name)]:
                print(f"bench: its stored figures stay, {', '.join(missing)} not installed")
            else:
                run_tool("tests/bench_bpe.py", "--store")
            if args.nanogpt:
                run_tool("tools/race_nanogpt.py", args.nanogpt)
            else:
                print("race: its stored figures stay, no --nanogpt PATH is given")
    rewrite()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(f"\n{STOPPED}")
