"""Time a script to a fixed target on this machine: nanoGPT's 1.4697 nats per character, all of the split.

    python tools/speedrun.py SCRIPT [FLAG ...]                 three seeds, in turn with v4's default run
    python tools/speedrun.py --record NAME SCRIPT [FLAG ...]   the same, kept in logs/results.json

SCRIPT is a rung, or any script with a rung's command line: it takes --seed, --data and --out_dir, and leaves
a metrics.json there. The flags are those that it needs to get there. NAME says what is new in the record.
1.4697 is the val loss that nanoGPT's README gives for its character model, trained on a GPU; a model of
longer tokens is compared per character. The time is that of whole processes, start-up included. v4's default
run in between says how fast this machine is, so that records of different machines compare: by the share of
its time. Nothing else should run then.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, machine, spread, store

TARGET = 1.4697
SEEDS = (1337, 1, 2)
YARDSTICK = "v4_rope_alibi.py"


def timed(script, flags, seed, folder):
    """Run a script; return its wall time in seconds, its loss in nats per character, and its metrics."""
    ours = [f"--seed={seed}", f"--out_dir={folder}", f"--data={ROOT / 'input.txt'}"]  # last: these hold
    args = [sys.executable, str(script), *flags, *ours]
    (folder / "metrics.json").unlink(missing_ok=True)  # of the seed before
    with tempfile.TemporaryDirectory() as empty:  # nothing that was compiled before is found there
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": empty}
        options = dict(cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        start = time.perf_counter()
        done = subprocess.run(args, **options)
    seconds = time.perf_counter() - start
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().split("\n")[-1]
        sys.exit(f"error: {script} with seed {seed} failed: {last}")
    if not (folder / "metrics.json").exists():
        sys.exit(f"error: {script} with seed {seed} left no metrics.json in its --out_dir")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return seconds, metrics["bits_per_char"] * math.log(2), metrics


def main():
    args = sys.argv[1:]
    name = args[1] if args[:1] == ["--record"] and len(args) > 2 else None
    script, *flags = args[2:] if name else args or [""]
    if not Path(script).is_file():
        sys.exit(
            "error: name a script, then its flags: python tools/speedrun.py v6_amp_ddp.py --tokenizer=char"
        )
    folder, rows, yardsticks = ROOT / "runs" / "speedrun", [], []
    for seed in SEEDS:
        yardsticks.append(timed(ROOT / YARDSTICK, [], seed, folder / "yardstick")[0])
        print(f"{YARDSTICK}: {yardsticks[-1]:.1f} s", flush=True)
        seconds, loss, metrics = timed(Path(script).resolve(), flags, seed, folder / Path(script).stem)
        rows.append(
            {"seconds": seconds, "loss": loss, "params": metrics["params"], "steps": metrics["steps"]}
        )
        verdict = "reached" if loss < TARGET else f"missed the target of {TARGET}"
        print(f"{script}, seed {seed}: {seconds:.1f} s, {loss:.4f} nats per character, {verdict}", flush=True)
    seconds, losses = (spread(row[key] for row in rows) for key in ("seconds", "loss"))
    share = sum(row["seconds"] for row in rows) / sum(yardsticks)
    print(f"mean: {seconds['mean']:.1f} s, {share:.2f} times {YARDSTICK}'s default run")
    if losses["most"] >= TARGET:
        sys.exit(f"no record: {losses['most']:.4f} is not below {TARGET}")
    if name:
        record = {"script": Path(script).name, "flags": flags, "seconds": seconds, "loss": losses}
        record |= {"params": rows[0]["params"], "steps": rows[0]["steps"], "share": share}
        store("speedrun", name, record | {"yardstick": spread(yardsticks), "machine": machine()})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: nothing of this run is kept")
