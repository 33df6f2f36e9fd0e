"""Time v3 and v4 against nanoGPT's command for a machine without a GPU, in turn, on this machine.

    python tools/race_nanogpt.py PATH     PATH: a checkout of nanoGPT, its shakespeare_char data prepared

Times are those of whole processes. nanoGPT's val loss is its own last estimate, ours that of the whole split.
"""

import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, store

NANOGPT = """train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20
--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000
--lr_decay_iters=2000 --dropout=0.0""".split()
V3 = "v3_gpt.py --block_size 32 --max_steps 1000 --warmup_steps 50 --eval_interval 500".split()
V4 = "v4_rope_alibi.py --block_size 32 --batch_size 32 --warmup_steps 50 --eval_interval 500".split()
OURS = {  # for week, name of the run, command
    4: {"v3_2": [*V3, "--n_layer=2"], "v3_4": [*V3, "--n_layer=4"]},
    5: {
        "v4_1": [*V4, "--n_layer=1", "--learning_rate=0.008", "--max_steps=850"],
        "v4_2": [*V4, "--n_layer=2", "--learning_rate=0.006", "--max_steps=700"],
    },
}


def timed(args, folder):
    """Run a Python command in a folder; return its wall time in seconds and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *args], cwd=folder, capture_output=True, encoding="utf-8", check=True
    )
    return time.perf_counter() - start, done.stdout


def main():
    if len(sys.argv) != 2 or not Path(sys.argv[1], "train.py").exists():
        sys.exit("error: name the folder of a nanoGPT checkout: python tools/race_nanogpt.py PATH")
    runs = {week: [] for week in OURS}
    for _ in range(2):
        seconds, text = timed(NANOGPT, sys.argv[1])
        nanogpt = {"nanogpt_seconds": seconds}
        nanogpt["nanogpt_val_loss"] = float(re.findall(r"val loss ([\d.]+)", text)[-1])
        for week, commands in OURS.items():
            run = dict(nanogpt)
            for name, args in commands.items():
                run[f"{name}_seconds"], _ = timed([*args, "--out_dir=runs/race"], ROOT)
                metrics = json.loads((ROOT / "runs/race/metrics.json").read_text(encoding="utf-8"))
                run[f"{name}_training_seconds"] = metrics["seconds"]
                run[f"{name}_val_loss"] = metrics["val_loss"]
                run[f"{name}_percent"] = 100 * run[f"{name}_seconds"] / seconds
            runs[week].append(run)
            print(run, flush=True)
    for week, rows in runs.items():
        store(f"week_{week}", "race", {key: statistics.mean(row[key] for row in rows) for key in rows[0]})


if __name__ == "__main__":
    main()
