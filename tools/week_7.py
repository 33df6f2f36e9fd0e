"""The experiments of week 7: python tools/week_7.py [experiment ...]"""

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile

import matplotlib.pyplot as plt
import torch
from common import LOGS, ROOT, machine, run, run_all, run_experiments, spread, table
from week_4 import race_table

import v6_amp_ddp as v6

FOLDER = ROOT / "runs" / "experiments"
GB = 1e9

# ------------------------------------------- by hand -------------------------------------------


def sixteen_bits():
    """Three numbers as each type keeps them, and the number above 1 in each."""
    kept = {}
    for name, dtype in v6.PRECISIONS.items():
        numbers = {str(x): str(torch.tensor(x, dtype=dtype).item()) for x in (1.001, 100_000.0, 1e-8)}
        info = torch.finfo(dtype)
        kept[name] = numbers | {"max": str(info.max), "above_1": str(1 + info.eps)}
    return kept


def muon_by_hand():
    """Muon's polynomial, and the singular values of diag(3, 0.1) after each step of it."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = torch.tensor([3.0, 0.1], dtype=torch.float64)
    x, values = x / x.norm(), []
    for _ in range(6):
        values.append(x.tolist())
        x = a * x + b * x**3 + c * x**5
    return {"coefficients": [a, b, c], "values": values}


# ------------------------------------- speed, memory and loss -------------------------------------

SIZES = {  # what differs from the defaults; steps, and steps in fp16, which this CPU only emulates
    "0.9 million": (dict(n_embd=128), 100, 20),
    "3 million": (dict(n_embd=256), 60, 6),
    "124 million": (dict(preset="gpt2", batch_size=1, grad_accum=1, dropout=0.0), 6, 2),
}

# Steps in a process of its own: prints the seconds that compiling took, seconds and loss of each step, the
# peak in bytes. The ids are those of characters, so that all sizes learn from the same.
STEPS = """
import json, sys, time, torch, v6_amp_ddp as v6
steps, flags = int(sys.argv[1]), json.loads(sys.argv[2])
config = v6.Config(**v6.PRESETS.get(flags.get("preset"), {}) | flags)
torch.manual_seed(1)
model = v6.LanguageModel(config, config.vocab_size)
optimizers = v6.make_optimizers(model, config)
dtype = v6.PRECISIONS[config.precision]
autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
text = open("input.txt", encoding="utf-8").read()
ids = torch.tensor([ord(char) for char in text[:500_000]], dtype=torch.uint16)
start = time.perf_counter()
wrapped = v6.compiled(model, *v6.get_batch(ids, config), autocast) if config.compile else model
print(time.perf_counter() - start)
for step in range(1, steps + 1):
    start = time.perf_counter()
    x, y = v6.get_batch(ids, config)
    model.zero_grad()
    with autocast:
        loss = wrapped(x, y) / y.numel()
    scaler.scale(loss).backward()
    for optimizer in optimizers.values():
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = v6.learning_rate_at(step, config)
    if torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
        for optimizer in optimizers.values():
            optimizer.step()
    scaler.update()
    print(time.perf_counter() - start, loss.item())
print(v6.peak_memory(torch.device("cpu")))
"""


def take_steps(steps, **flags):
    """Train in a process of its own; return seconds and loss of each step, and the peak in bytes."""
    args = [sys.executable, "-c", STEPS, str(steps), json.dumps(flags)]
    with tempfile.TemporaryDirectory() as empty:  # nothing that was compiled before is found there
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": empty}
        options = dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=True)
        compiling, *lines, peak = subprocess.run(args, **options).stdout.strip().split("\n")
    seconds, losses = zip(*(map(float, line.split()) for line in lines), strict=True)
    taken = {"seconds": seconds[2:] or seconds[1:], "losses": losses, "peak": int(peak)}
    return taken | {"compiling": float(compiling)}


def precisions():
    """Three sizes in fp32, bf16 and fp16, in turn: tokens per second, peak memory, loss after equal steps."""
    results = {}
    for size, (flags, steps, steps_fp16) in SIZES.items():
        taken = {precision: [] for precision in v6.PRECISIONS}
        for precision in ("fp32", "bf16", "fp16", "fp32", "bf16"):
            flags_here = dict(optimizer="adamw", learning_rate=0.001) | flags | {"precision": precision}
            n = steps_fp16 if precision == "fp16" else steps
            taken[precision].append(take_steps(n, **flags_here, max_steps=steps, warmup_steps=2))
        config = v6.Config(**v6.PRESETS.get(flags.get("preset"), {}) | flags)
        for precision, runs in taken.items():
            seconds = statistics.median(s for run in runs for s in run["seconds"])
            losses = runs[0]["losses"]
            results[f"{size} {precision}"] = {
                "tokens_per_second": config.batch_size * config.block_size / seconds,
                "peak": max(run["peak"] for run in runs),
                "early": losses[steps_fp16 - 1],
                "late": statistics.mean(losses[-(steps // 10 or 1) :]) if len(losses) == steps else None,
            }
            print(f"  {size} {precision}: {results[f'{size} {precision}']}", flush=True)
    device = torch.device("cpu")
    peaks = {name: v6.matmul_flops(device, dtype) for name, dtype in v6.PRECISIONS.items()}
    return results | {"matmul_flops": peaks, "machine": machine()}


# ------------------------------------------- processes -------------------------------------------

# The rung as from the command line; every loss that its processes agree on is kept in losses.json.
RECORD = """
import json, os, sys, v6_amp_ddp as v6
out, total, losses = sys.argv.pop(), v6.total, []
def recorded(x):
    result = total(x)
    if isinstance(x, float):
        losses.append(result)
    return result
v6.total = recorded
v6.main()
if not v6.RANK:
    open(out, "w").write(json.dumps(losses))
"""


def processes():
    """50 steps in one process of two threads and in two of one: seconds, and how far each loss is apart."""
    folder = FOLDER / "processes"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.py").write_text(RECORD, encoding="utf-8")
    results = {}
    for name, optimizer, precision in (
        ("AdamW, fp32", "adamw", "fp32"),
        ("Muon, fp32", "muon", "fp32"),
        ("Muon, bf16", "muon", "bf16"),
    ):
        flags = dict(optimizer=optimizer, precision=precision, max_steps=50, eval_interval=50)
        flags |= dict(grad_accum=2, warmup_steps=10)
        flags |= dict(learning_rate=0.004 if optimizer == "adamw" else 0.02, data=ROOT / "input.txt")
        flags = [f"--{key}={value}" for key, value in flags.items()] + ["--max_new_tokens=1"]
        losses, seconds = {1: [], 2: []}, {1: [], 2: []}
        for n in (1, 2) * 3:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
            args = [
                sys.executable,
                *(torchrun if n > 1 else []),
                folder / "record.py",
                *flags,
                f"--out_dir={folder / str(n)}",
                folder / "l.json",
            ]
            environment = os.environ | {"OMP_NUM_THREADS": str(2 // n), "PYTHONPATH": str(ROOT)}
            subprocess.run(args, cwd=ROOT, env=environment, capture_output=True, check=True)
            losses[n] = json.loads((folder / "l.json").read_text(encoding="utf-8"))[:50]
            metrics = json.loads((folder / str(n) / "metrics.json").read_text(encoding="utf-8"))
            seconds[n].append(metrics["seconds"])
        apart = max(abs(a / b - 1) for a, b in zip(losses[1], losses[2], strict=True))
        results[name] = {"one": spread(seconds[1]), "two": spread(seconds[2])}
        results[name]["apart"] = f"{apart:.0e}"  # as text: what is stored is rounded to six digits
        results[name]["losses"] = [losses[1][0], losses[1][-1]]
        print(f"  {name}: {results[name]}", flush=True)
    return results | {"machine": machine()}


# ---------------------------------------- what each line brings ----------------------------------------

GAINS = {  # one after the other
    "AdamW, fp32": dict(optimizer="adamw", precision="fp32"),
    "AdamW, bf16": dict(optimizer="adamw", precision="bf16"),
    "Muon, bf16": dict(precision="bf16"),
    "Muon, bf16, compiled": dict(precision="bf16", compile=True),
}


def gains():
    """Seconds of a step of the default model, from v5's way to torch.compile: three rounds in turn."""
    taken = {name: [] for name in GAINS}
    for _ in range(3):
        for name, flags in GAINS.items():
            taken[name].append(take_steps(60, **flags))
    results = {
        name: {
            "seconds": spread(statistics.median(run["seconds"]) for run in runs),
            "compiling": spread(run["compiling"] for run in runs),
            "peak": max(run["peak"] for run in runs),
        }
        for name, runs in taken.items()
    }
    return results | {"machine": machine()}


# ------------------------------------------- longer runs -------------------------------------------

LONGER = {
    "192 wide": dict(max_steps=2000, eval_interval=400),
    "192 wide, dropout 0.1": dict(dropout=0.1, max_steps=2000, eval_interval=400),
    "256 wide, dropout 0.2": dict(n_embd=256, dropout=0.2, max_steps=4000, eval_interval=400),
}


def characters():
    """v4's default run, then v6 on characters for about as long, with all cores."""
    keys = ("params", "steps", "seconds", "train_loss", "val_loss", "machine", "history")
    jobs = {"v4": ("v4_rope_alibi", {}), "v6": ("v6_amp_ddp", dict(tokenizer="char", max_steps=1100))}
    runs = {name: run(rung, f"characters_{name}", **flags) for name, (rung, flags) in jobs.items()}
    return {name: {key: metrics[key] for key in keys} for name, metrics in runs.items()}


def longer():
    """Longer runs on tokens with all cores; their losses per character in nats, as nanoGPT gives them."""
    results = {}
    for name, flags in LONGER.items():
        metrics = run("v6_amp_ddp", f"longer_{name.replace(' ', '_')}", **flags)
        keys = ("params", "steps", "seconds", "train_loss", "val_loss", "bits_per_char", "history", "machine")
        results[name] = {key: metrics[key] for key in keys}
        results[name]["nats_per_char"] = metrics["bits_per_char"] * math.log(2)
    return results


# ------------------------------------------- the recipe -------------------------------------------


class SquaredReLU(torch.nn.Module):
    """The square of max(0, x), So et al. 2021."""

    def forward(self, x):
        """Any shape to the same shape."""
        return torch.relu(x).square()


class WithSquaredReLU(v6.TransformerBlock):
    """v6's block with a squared ReLU in its MLP."""

    def __init__(self, config):
        super().__init__(config)
        self.mlp[1] = SquaredReLU()


class ZeroInitialised(v6.LanguageModel):
    """The last matrices of attention and MLP begin as zeros: each block begins as the identity."""

    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size)
        for block in self.blocks:
            for last in (block.attention.proj, block.mlp[2]):
                torch.nn.init.zeros_(last.weight)


def linear_decay(step, config):
    """Constant, then linear to zero over the last 60% of the steps, without warm-up."""
    return config.learning_rate * min(1, (config.max_steps - step + 1) / (0.6 * config.max_steps))


def adamw(learning_rate, weight_decay):
    """Flags of AdamW for all weights."""
    return {}, dict(optimizer="adamw", learning_rate=learning_rate, weight_decay=weight_decay)


TRIALS = {  # stand-ins, and flags besides those of all
    "default: Muon, step size 0.02, decay 0.5": ({}, {}),
    "AdamW, step size 0.003, decay 1": adamw(0.003, 1.0),
    "AdamW, step size 0.006, decay 1": adamw(0.006, 1.0),
    "AdamW, step size 0.006, decay 0.5": adamw(0.006, 0.5),
    "AdamW, step size 0.012, decay 0.5": adamw(0.012, 0.5),
    "step size 0.01": ({}, dict(learning_rate=0.01)),
    "step size 0.04": ({}, dict(learning_rate=0.04)),
    "decay 0.1": ({}, dict(weight_decay=0.1)),
    "decay 1": ({}, dict(weight_decay=1.0)),
    "squared ReLU": ({"TransformerBlock": WithSquaredReLU}, {}),
    "last matrices begin as zeros": ({"LanguageModel": ZeroInitialised}, {}),
    "step size constant, then falling in a line": ({"learning_rate_at": linear_decay}, {}),
}


def recipe():
    """What was tried: half of a default run, three seeds each, one thread each."""
    jobs = {}
    for name, (replace, flags) in TRIALS.items():
        for seed in (1337, 1, 2):
            flags_here = {"max_steps": 400, "eval_interval": 50, "precision": "bf16", "seed": seed} | flags
            jobs[name, seed] = ("v6_amp_ddp", replace, flags_here)
    names = {key: f"recipe_{re.sub(r'[^a-z0-9.]+', '_', key[0].lower())}_{key[1]}" for key in jobs}
    metrics = run_all({names[key]: job for key, job in jobs.items()})
    trials = {name: [metrics[names[name, seed]] for seed in (1337, 1, 2)] for name in TRIALS}
    results = {name: spread(m["bits_per_char"] for m in runs) for name, runs in trials.items()}
    best = min((name for name in TRIALS if name.startswith("AdamW")), key=lambda name: results[name]["mean"])
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, name in enumerate((best, next(iter(TRIALS)))):
        for j, run_of_seed in enumerate(trials[name]):
            points = [(point["step"], point["val_loss"]) for point in run_of_seed["history"]]
            label = name.removeprefix("default: ") if j == 0 else None
            ax.plot(*zip(*points, strict=True), ".-", color=f"C{i}", alpha=0.7, label=label)
    ax.set(xlabel="step", ylabel="val loss (nats per token), three seeds each")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(LOGS / "week_7_muon.png", dpi=90)
    return results


def schedule():
    """The default schedule and linear_decay over a whole default run, three seeds each, one thread each."""
    jobs = {}
    for seed in (1337, 1, 2):
        flags = {"max_steps": 800, "eval_interval": 200, "precision": "bf16", "seed": seed}
        jobs[f"full_cosine_{seed}"] = ("v6_amp_ddp", {}, flags)
        jobs[f"full_linear_{seed}"] = ("v6_amp_ddp", {"learning_rate_at": linear_decay}, flags)
    metrics = run_all(jobs)
    names = ("cosine", "linear")
    return {
        name: spread(metrics[f"full_{name}_{s}"]["bits_per_char"] for s in (1337, 1, 2)) for name in names
    }


# -------------------------------------------------- log --------------------------------------------------


def tables(results):
    """The blocks of logs/week_7.md."""
    week, rungs = results["week_7"], results["rungs"]
    sizes = [
        [
            *name.rsplit(" ", 1),
            f"{m['tokens_per_second']:,.{0 if m['tokens_per_second'] > 10 else 1}f}",
            f"{m['peak'] / GB:.2f} GB",
            f"{m['early']:.4f}",
            f"{m['late']:.4f}" if m["late"] else "-",
        ]
        for name, m in week["precisions"].items()
        if name not in ("machine", "matmul_flops")
    ]
    order = {name: i for i, name in enumerate(SIZES)}
    sizes.sort(key=lambda row: (order[row[0]], list(v6.PRECISIONS).index(row[1])))
    shared = [
        [
            name,
            *(f"{m[n]['mean']:.1f} ({m[n]['least']:.1f} to {m[n]['most']:.1f})" for n in ("one", "two")),
            m["apart"],
        ]
        for name, m in week["processes"].items()
        if name != "machine"
    ]
    gained = [
        [
            name,
            "{:.0f} ({:.0f} to {:.0f})".format(
                *(1000 * m["seconds"][key] for key in ("mean", "least", "most"))
            ),
            f"{m['peak'] / GB:.2f} GB",
        ]
        for name, m in week["gains"].items()
        if name != "machine"
    ]
    long = [
        [name, f"{m['params']:,}", f"{m['steps']:,}", f"{m['seconds']:.0f}"]
        + [f"{m[key]:.4f}" for key in ("bits_per_char", "nats_per_char")]
        for name, m in week["longer"].items()
    ]
    tried = [
        [name, f"{m['mean']:.4f}", f"{m['least']:.4f} to {m['most']:.4f}"]
        for name, m in sorted(week["recipe"].items(), key=lambda item: item[1]["mean"])
    ]
    columns = ("1.001", "100000.0", "1e-08", "above_1", "max")
    kept = [[name, *(f"{float(x[key]):,.8g}" for key in columns)] for name, x in week["sixteen_bits"].items()]
    steps = [
        [i, *(f"{s:.3f}" for s in values), f"{values[0] / values[1]:.1f}"]
        for i, values in enumerate(week["muon_by_hand"]["values"])
    ]
    blocks = {
        "sixteen": table(["kept as", "1.001", "100,000", "0.00000001", "next after 1", "largest"], kept),
        "muon": table(["after", "strong direction", "weak direction", "ratio"], steps),
        "precisions": table(["parameters", "precision", "tokens/s", "peak", "loss, early", "late"], sizes),
        "processes": table(
            ["training", "one process of two threads, s", "two of one thread, s", "losses apart by"], shared
        ),
        "gains": table(["training", "milliseconds of a step", "peak"], gained),
        "longer": table(
            ["training", "parameters", "steps", "seconds", "bits/char", "nats per character"], long
        ),
        "race": race_table(results, ["v6_1", "v6_bpe"]),
        "recipe": table(["what is changed", "bits/char, mean", "three seeds"], tried),
        "sample": f"```\n{rungs['v6_amp_ddp']['sample'].strip()}\n```",
    }
    return {"week_7": blocks}


EXPERIMENTS = {
    "sixteen_bits": sixteen_bits,
    "muon_by_hand": muon_by_hand,
    "precisions": precisions,
    "processes": processes,
    "gains": gains,
    "characters": characters,
    "longer": longer,
    "recipe": recipe,
    "schedule": schedule,
}

if __name__ == "__main__":
    run_experiments(7, EXPERIMENTS, tables)
