"""Time v3_gpt.py against nanoGPT's command for a machine without a GPU, in turn, on this machine.

    python tools/race_nanogpt.py PATH     PATH: a checkout of nanoGPT, its shakespeare_char data prepared

Times are those of whole processes. nanoGPT's val loss is its own last estimate, v3's that of the whole split.
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
V3 = """v3_gpt.py --block_size 32 --max_steps 1000 --warmup_steps 50 --eval_interval 500
--out_dir runs/race""".split()


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
    runs = []
    for _ in range(2):
        seconds, text = timed(NANOGPT, sys.argv[1])
        run = {
            "nanogpt_seconds": seconds,
            "nanogpt_val_loss": float(re.findall(r"val loss ([\d.]+)", text)[-1]),
        }
        for n_layer in (2, 4):
            seconds, _ = timed([*V3, f"--n_layer={n_layer}"], ROOT)
            metrics = json.loads((ROOT / "runs/race/metrics.json").read_text(encoding="utf-8"))
            run[f"v3_{n_layer}_seconds"] = seconds
            run[f"v3_{n_layer}_training_seconds"] = metrics["seconds"]
            run[f"v3_{n_layer}_val_loss"] = metrics["val_loss"]
            run[f"v3_{n_layer}_percent"] = 100 * seconds / run["nanogpt_seconds"]
        runs.append(run)
        print(run, flush=True)
    store("week_4", "race", {key: statistics.mean(run[key] for run in runs) for key in runs[0]})


if __name__ == "__main__":
    main()
