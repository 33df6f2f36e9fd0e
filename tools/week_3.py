"""The experiments of week 3: python tools/week_3.py [experiment ...]"""

import math
import shutil

import matplotlib.pyplot as plt
import torch
from common import LOGS, ROOT, run, run_experiments, table

import v2_attention


def by_hand():
    """Causal self-attention over four tokens with two-dimensional queries, keys and values."""
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    products = q @ k.T
    scores = products / math.sqrt(2)
    future = ~torch.tril(torch.ones(4, 4, dtype=torch.bool))
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    return {
        "products": products.tolist(),
        "scores": scores.tolist(),
        "weights": weights.tolist(),
        "output": (weights @ v).tolist(),
    }


def scaling():
    """Variance of q.k for standard normal vectors of d numbers, and what softmax makes of 32 such scores."""
    generator = torch.Generator().manual_seed(0)
    results = {}
    for d in (4, 16, 64, 256):
        q = torch.randn(10_000, 1, d, generator=generator)
        k = torch.randn(10_000, 32, d, generator=generator)
        scores = (q @ k.transpose(1, 2)).squeeze(1)
        results[str(d)] = {
            "variance": scores.var().item(),
            "scaled_variance": (scores / math.sqrt(d)).var().item(),
            "largest_weight": scores.softmax(-1).amax(-1).mean().item(),
            "scaled_largest_weight": (scores / math.sqrt(d)).softmax(-1).amax(-1).mean().item(),
        }
    return results


def equal_text():
    """v1 trained on as much text as v2's defaults: 3,500 steps of 2,048 characters."""
    metrics = run("v1_mlp", "equal_text", max_steps=3500, eval_interval=500)
    return {key: metrics[key] for key in ("val_loss", "train_loss", "seconds", "tokens")}


def heads():
    """1, 2, 4 and 8 heads at equal width and steps, two seeds each."""
    flags = dict(max_steps=600, eval_interval=100)
    return {
        str(n): [run("v2_attention", f"heads_{n}_{s}", n_head=n, seed=s, **flags)["val_loss"] for s in (1, 2)]
        for n in (1, 2, 4, 8)
    }


def context():
    """Val loss and parameters of v1 and v2 as the context grows; draw both."""
    sizes = (4, 8, 16, 32, 64)
    flags = dict(max_steps=600, eval_interval=600, batch_size=32)
    results = {"v1_mlp": {}, "v2_attention": {}}
    for size in sizes:
        # 2,048 characters a step for both, whatever the context
        mlp = run("v1_mlp", f"window_{size}", window=size, block_size=64, **flags)
        attention_flags = flags | dict(batch_size=2048 // size)
        attention = run("v2_attention", f"block_{size}", block_size=size, **attention_flags)
        for name, metrics in (("v1_mlp", mlp), ("v2_attention", attention)):
            results[name][str(size)] = {key: metrics[key] for key in ("val_loss", "params", "seconds")}
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for name, label in (("v1_mlp", "v1: window of an MLP"), ("v2_attention", "v2: block of attention")):
        runs = results[name].values()
        left.plot(sizes, [r["val_loss"] for r in runs], marker="o", label=label)
        right.plot(sizes, [r["params"] for r in runs], marker="o", label=label)
    left.set(ylabel="val loss (nats per character)")
    right.set(ylabel="parameters", ylim=(0, None))
    for ax in (left, right):
        ax.set(xscale="log", xlabel="context (characters)")
        ax.set_xticks(sizes, sizes)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    left.legend()
    fig.savefig(LOGS / "week_3_context.png", dpi=90)
    return results


def heat_map():
    """Copy the default run's attention.png; measure on 64 validation windows how far back each head reads."""
    run_dir = ROOT / "runs" / "v2_attention"
    shutil.copy(run_dir / "attention.png", LOGS / "week_3_attention.png")
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    config = v2_attention.Config(**checkpoint["config"])
    model = v2_attention.LanguageModel(config, len(checkpoint["vocab"]))
    model.load_state_dict(checkpoint["model"])
    ids = torch.tensor([checkpoint["vocab"].index(c) for c in v2_attention.load_text(config)[-65 * 64 :]])
    windows = ids[: 64 * config.block_size].view(64, config.block_size)
    results = {}
    with torch.inference_mode():
        for i, head in enumerate(model.attention.heads):
            weights = head.weights(model.embed(windows))[
                :, 8:
            ]  # queries with at least 8 characters before them
            rows = torch.arange(8, config.block_size)
            by_distance = [weights[:, rows - 8, rows - d].mean().item() for d in range(8)]
            results[str(i)] = {"by_distance": by_distance, "farther": 1 - sum(by_distance)}
    return results


def tables(results):
    """The blocks of logs/week_3.md."""
    week, rungs = results["week_3"], results["rungs"]
    hand = week["by_hand"]
    tokens = ["1", "2", "3", "4"]

    def matrix(rows, digits, masked=False):
        cells = [
            [
                f"**{i}**",
                *("-inf" if masked and j > i else f"{x:.{digits}f}" for j, x in enumerate(row, start=1)),
            ]
            for i, row in enumerate(rows, start=1)
        ]
        return table(["", *tokens[: len(rows[0])]], cells)

    result_rows = []
    for name in ("v1_mlp", "v2_attention"):
        m = rungs[name]
        losses = [f"{m['train_loss']:.4f}", f"{m['val_loss']:.4f}", f"{m['bits_per_char']:.2f}"]
        result_rows.append([f"{name}.py", f"{m['params']:,}", *losses, f"{m['seconds']:.0f}"])
    scaling_rows = [
        [
            d,
            *(
                f"{r[key]:.2f}"
                for key in ("variance", "scaled_variance", "largest_weight", "scaled_largest_weight")
            ),
        ]
        for d, r in sorted(week["scaling"].items(), key=lambda item: int(item[0]))
    ]
    context_rows = []
    for size in ("4", "8", "16", "32", "64"):
        mlp, attention = week["context"]["v1_mlp"][size], week["context"]["v2_attention"][size]
        cells = [f"{m['val_loss']:.4f}" for m in (mlp, attention)] + [
            f"{m['params']:,}" for m in (mlp, attention)
        ]
        context_rows.append([size, *cells])
    heat_rows = [
        [f"head {i}", *(f"{100 * share:.0f}%" for share in [*r["by_distance"], r["farther"]])]
        for i, r in sorted(week["heat_map"].items())
    ]
    return {
        "result": table(
            ["rung", "parameters", "train loss", "val loss", "bits/char", "seconds"], result_rows
        ),
        "products": matrix(hand["products"], 0),
        "scores": matrix(hand["scores"], 2, masked=True),
        "weights": matrix(hand["weights"], 2),
        "output": matrix(hand["output"], 2),
        "scaling": table(
            ["d", "variance of q.k", "after division", "largest of 32 weights", "after division"],
            scaling_rows,
        ),
        "heads": table(
            ["heads", "width of each", "val loss, seed 1", "seed 2"],
            [
                [n, 128 // int(n), *(f"{loss:.4f}" for loss in losses)]
                for n, losses in sorted(week["heads"].items())
            ],
        ),
        "context": table(
            ["context", "v1 val loss", "v2 val loss", "v1 parameters", "v2 parameters"], context_rows
        ),
        "heat_map": table(
            ["reads from", "itself", *(f"{d} back" for d in range(1, 8)), "farther"], heat_rows
        ),
        "sample": f"```\n{rungs['v2_attention']['sample'].strip()}\n```",
    }


EXPERIMENTS = {
    "by_hand": by_hand,
    "scaling": scaling,
    "equal_text": equal_text,
    "heads": heads,
    "context": context,
    "heat_map": heat_map,
}

if __name__ == "__main__":
    run_experiments(3, EXPERIMENTS, tables)
