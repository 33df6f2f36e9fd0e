"""Time v3, v4 and v6 against nanoGPT's command for a machine without a GPU, in turn, on this machine.

    python tools/race_nanogpt.py PATH     PATH: a checkout of nanoGPT, its shakespeare_char data prepared

Times are those of whole processes, each the mean of two; a percentage is the share of nanoGPT's time.
nanoGPT's val loss is its own last estimate, ours that of the whole split, in nats per character. All goes to
the section "race" of logs/results.json, with the machine's name. It takes some minutes; nothing else should
run meanwhile.
"""

import json
import math
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, machine, store

NANOGPT = """train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20
--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000
--lr_decay_iters=2000 --dropout=0.0""".split()
V3 = "v3_gpt.py --block_size 32 --max_steps 1000 --warmup_steps 50 --eval_interval 500".split()
V4 = "v4_rope_alibi.py --block_size 32 --batch_size 32 --warmup_steps 50 --eval_interval 500".split()
V6 = """v6_amp_ddp.py --precision fp32 --n_layer 1 --block_size 32 --batch_size 32 --init_std 0.04
--warmup_steps 10 --eval_interval 500 --max_new_tokens 1""".split()
OURS = {  # name: command; the number behind _ is that of blocks, v6_bpe has one
    "v3_2": [*V3, "--n_layer=2"],
    "v3_4": [*V3, "--n_layer=4"],
    "v4_1": [*V4, "--n_layer=1", "--learning_rate=0.008", "--max_steps=850"],
    "v4_2": [*V4, "--n_layer=2", "--learning_rate=0.006", "--max_steps=700"],
    "v6_1": [*V6, "--tokenizer=char", "--n_embd=96", "--max_steps=470"],
    "v6_bpe": [*V6, "--vocab_size=512", "--n_embd=128", "--learning_rate=0.03", "--max_steps=150"],
}


def checkout(path):
    """Return the folder of nanoGPT as an absolute path; exits if it is none or its data is not prepared."""
    path = Path(path).resolve()
    if not (path / "train.py").exists() or not (path / "config" / "train_shakespeare_char.py").exists():
        sys.exit(f"error: {path} is no checkout of nanoGPT, it has no train.py or no config folder")
    if not (path / "data" / "shakespeare_char" / "train.bin").exists():
        sys.exit(f"error: run python data/shakespeare_char/prepare.py in {path} first")
    return path


def timed(args, folder):
    """Run a Python command in a folder; return its wall time in seconds and what it printed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *args], cwd=folder, capture_output=True, encoding="utf-8")
    if done.returncode:
        sys.exit(f"error: {' '.join(args)} failed in {folder}:\n{done.stderr}")
    return time.perf_counter() - start, done.stdout


def main():
    if len(sys.argv) != 2:
        sys.exit("error: name the folder of a nanoGPT checkout: python tools/race_nanogpt.py PATH")
    folder = checkout(sys.argv[1])
    rounds = {name: [] for name in ("nanogpt", *OURS)}
    for _ in range(2):
        seconds, text = timed(NANOGPT, folder)
        val_loss = float(re.findall(r"val loss ([\d.]+)", text)[-1])
        rounds["nanogpt"].append({"seconds": seconds, "val_loss": val_loss})
        print(f"nanoGPT: {seconds:.1f} s, val loss {val_loss:.4f}", flush=True)
        for name, args in OURS.items():
            ours, _ = timed([*args, "--out_dir=runs/race"], ROOT)
            metrics = json.loads((ROOT / "runs/race/metrics.json").read_text(encoding="utf-8"))
            val_loss = metrics["bits_per_char"] * math.log(2)
            row = {"seconds": ours, "percent": 100 * ours / seconds, "val_loss": val_loss}
            rounds[name].append(row | {"training_seconds": metrics["seconds"], "params": metrics["params"]})
            print(f"{name}: {ours:.1f} s, {row['percent']:.0f}%, val loss {row['val_loss']:.4f}", flush=True)
    for name, rows in rounds.items():
        store("race", name, {key: statistics.mean(row[key] for row in rows) for key in rows[0]})
    store("race", "machine", machine())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: nothing of this race is kept")
