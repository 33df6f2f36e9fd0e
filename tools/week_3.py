"""The experiments of week 3: python tools/week_3.py [experiment ...]"""

import math

import matplotlib.pyplot as plt
import torch
from common import LOGS, ROOT, run_all, run_experiments, spread, table

import v2_attention

SEEDS = (1, 2, 3)
SIZES = (4, 8, 16, 32, 64)


def three_seeds(rung, name, **flags):
    """The jobs for run_all that train one setting with three seeds."""
    return {f"{name}_{seed}": (rung, None, flags | {"seed": seed}) for seed in SEEDS}


def losses(metrics, name):
    """Val loss of the three runs that `three_seeds` has named."""
    return spread(metrics[f"{name}_{seed}"]["val_loss"] for seed in SEEDS)


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
            "mean_1_scaled_variance": (((q + 1) @ (k + 1).transpose(1, 2)) / math.sqrt(d)).var().item(),
        }
    return results


def equal_text():
    """v1's and v2's defaults, and v1 on as much text as v2: 3,500 steps of 2,048 characters; three seeds."""
    jobs = three_seeds("v2_attention", "v2_default")
    jobs |= three_seeds("v1_mlp", "v1_default")
    jobs |= three_seeds("v1_mlp", "equal_text", max_steps=3500, eval_interval=500)
    metrics = run_all(jobs)
    return {
        name: losses(metrics, name) | {"tokens": metrics[f"{name}_1"]["tokens"]}
        for name in ("v1_default", "v2_default", "equal_text")
    }


def heads():
    """1, 2, 4 and 8 heads at equal width and steps, three seeds each."""
    jobs = {}
    for n in (1, 2, 4, 8):
        jobs |= three_seeds("v2_attention", f"heads_{n}", n_head=n, max_steps=600, eval_interval=100)
    metrics = run_all(jobs)
    return {str(n): losses(metrics, f"heads_{n}") for n in (1, 2, 4, 8)}


def context():
    """Val loss and parameters of v1 and v2 as the context grows, three seeds each; draw both."""
    flags = dict(max_steps=600, eval_interval=600)
    jobs = {}
    for size in SIZES:
        # 2,048 characters a step for both, whatever the context
        jobs |= three_seeds("v1_mlp", f"window_{size}", window=size, batch_size=32, block_size=64, **flags)
        jobs |= three_seeds(
            "v2_attention", f"block_{size}", block_size=size, batch_size=2048 // size, **flags
        )
    metrics = run_all(jobs)
    results = {
        rung: {
            str(size): losses(metrics, f"{name}_{size}") | {"params": metrics[f"{name}_{size}_1"]["params"]}
            for size in SIZES
        }
        for rung, name in (("v1_mlp", "window"), ("v2_attention", "block"))
    }
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for rung, label in (("v1_mlp", "v1: window of an MLP"), ("v2_attention", "v2: block of attention")):
        rows = list(results[rung].values())
        (line,) = left.plot(SIZES, [r["mean"] for r in rows], marker="o", label=label)
        least, most = ([r[key] for r in rows] for key in ("least", "most"))
        left.fill_between(SIZES, least, most, color=line.get_color(), alpha=0.2)
        right.plot(SIZES, [r["params"] for r in rows], marker="o", label=label)
    left.set(ylabel="val loss (nats per character)")
    right.set(ylabel="parameters", ylim=(0, None))
    for ax in (left, right):
        ax.set(xscale="log", xlabel="context (characters)")
        ax.set_xticks(SIZES, SIZES)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    left.legend()
    fig.savefig(LOGS / "week_3_context.png", dpi=90)
    return results


def plot_heads(chosen, text, weights):
    """Write logs/week_3_attention.png: who (row) reads from whom (column) in `text`.

    `chosen` maps the numbers of four heads to titles, `weights` (n_head, T, T) holds a map for each head.
    """
    labels = [{"\n": "\u21b5", " ": "\u2423"}.get(char, char) for char in text]
    fig, axes = plt.subplots(2, 2, figsize=(8, 8.8), layout="constrained")
    for ax, (head, title) in zip(axes.flat, chosen.items(), strict=True):
        picture = ax.imshow(weights[head], cmap="Blues", vmin=0, vmax=1)
        ax.set_title(title, fontsize=12)
        ax.set_xticks(range(len(text)), labels, fontsize=11)
        ax.set_yticks(range(len(text)), labels, fontsize=11)
        ax.set_xticks([x - 0.5 for x in range(1, len(text))], minor=True)
        ax.set_yticks([y - 0.5 for y in range(1, len(text))], minor=True)
        ax.grid(which="minor", color="0.92", linewidth=0.5)
        ax.tick_params(which="both", length=0)
    fig.supxlabel("reads from", fontsize=12)
    fig.supylabel("reader", fontsize=12)
    bar = fig.colorbar(picture, ax=axes, location="top", shrink=0.6, aspect=40)
    bar.set_label("attention weight", fontsize=12)
    fig.savefig(LOGS / "week_3_attention.png", dpi=100)


@torch.inference_mode()
def heat_map():
    """Measure on 64 validation windows how far back each head of the default run reads; draw four heads."""
    checkpoint = torch.load(ROOT / "runs/v2_attention/checkpoint.pt", weights_only=True)
    config = v2_attention.Config(**checkpoint["config"])
    model = v2_attention.LanguageModel(config, len(checkpoint["vocab"]))
    model.load_state_dict(checkpoint["model"])
    tokenizer = v2_attention.CharTokenizer(checkpoint["vocab"])
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text[-65 * 64 :]))
    windows = ids[: 64 * config.block_size].view(64, config.block_size)
    results = {}
    rows = torch.arange(8, config.block_size)  # queries with at least 8 characters before them
    for i, head in enumerate(model.attention.heads):
        weights = head.weights(model.embed(windows))[:, 8:]
        by_distance = [weights[:, rows - 8, rows - d].mean().item() for d in range(8)]
        results[str(i)] = {"by_distance": by_distance, "farther": 1 - sum(by_distance)}

    chosen = {}
    for d in (1, 2, 3):  # for each distance the head that reads from there most
        shares = {i: r["by_distance"][d] for i, r in results.items() if int(i) not in chosen}
        head = max(shares, key=shares.get)
        chosen[int(head)] = f"head {head}: {100 * shares[head]:.0f}% from {d} back"
    largest = {i: max(r["by_distance"]) for i, r in results.items() if int(i) not in chosen}
    head = min(largest, key=largest.get)  # and the one that is least tied to a distance
    chosen[int(head)] = f"head {head}: at most {100 * largest[head]:.0f}% from one distance"
    text = text[int(0.9 * len(text)) :][:24]
    idx = torch.tensor([tokenizer.encode(text)])
    weights = torch.cat([head.weights(model.embed(idx)) for head in model.attention.heads])
    plot_heads(chosen, text, weights)
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
    for size in map(str, SIZES):
        pair = [week["context"][rung][size] for rung in ("v1_mlp", "v2_attention")]
        ranges = [f"{m['mean']:.4f} ({m['least']:.4f} to {m['most']:.4f})" for m in pair]
        context_rows.append([size, *ranges, *(f"{m['params']:,}" for m in pair)])

    def three(r):
        return [f"{r[key]:.4f}" for key in ("mean", "least", "most")]

    equal = {
        "v1, its defaults": "v1_default",
        "v2, its defaults": "v2_default",
        "v1, as much text": "equal_text",
    }
    heat_rows = [
        [f"head {i}", *(f"{100 * share:.0f}%" for share in [*r["by_distance"], r["farther"]])]
        for i, r in sorted(week["heat_map"].items())
    ]
    blocks = {
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
        "equal_text": table(
            ["one thread, three seeds", "characters read", "val loss, mean", "least", "most"],
            [
                [name, f"{week['equal_text'][key]['tokens']:,}", *three(week["equal_text"][key])]
                for name, key in equal.items()
            ],
        ),
        "heads": table(
            ["heads", "width of each", "val loss, mean of 3 seeds", "least", "most"],
            [[n, 128 // int(n), *three(r)] for n, r in sorted(week["heads"].items())],
        ),
        "context": table(
            ["context", "v1 val loss", "v2 val loss", "v1 parameters", "v2 parameters"], context_rows
        ),
        "heat_map": table(
            ["reads from", "itself", *(f"{d} back" for d in range(1, 8)), "farther"], heat_rows
        ),
        "sample": f"```\n{rungs['v2_attention']['sample'].strip()}\n```",
    }
    return {"week_3": blocks}


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
