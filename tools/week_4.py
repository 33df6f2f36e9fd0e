"""The experiments of week 4: python tools/week_4.py [experiment ...]"""

import math
import subprocess
import sys
import textwrap
import time
from collections import Counter

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import LOGS, ROOT, load_results, run, run_all, run_experiments, spread, table
from race_nanogpt import OURS

import v2_attention
import v3_gpt

SEEDS = (1, 2, 3)
INITS = (0.02, 0.05, 0.1, 0.2)
DEPTHS = (2, 4, 8, 12)
SMALL = dict(n_embd=64, max_steps=600, eval_interval=50)


class WithoutResidual(v3_gpt.TransformerBlock):
    """Each branch replaces its input instead of adding to it."""

    def forward(self, x):
        return self.mlp(self.norm2(self.attention(self.norm1(x))))


class WithoutNorm(v3_gpt.TransformerBlock):
    """No LayerNorm in the block."""

    def __init__(self, config):
        super().__init__(config)
        self.norm1, self.norm2 = nn.Identity(), nn.Identity()


class WithoutBoth(WithoutResidual, WithoutNorm):
    """Neither."""


class AroundAttention(v3_gpt.TransformerBlock):
    """A residual around the attention, none around the MLP."""

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return self.mlp(self.norm2(x))


class AroundMLP(v3_gpt.TransformerBlock):
    """A residual around the MLP, none around the attention."""

    def forward(self, x):
        x = self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PostNorm(v3_gpt.TransformerBlock):
    """The order of the first transformer (Vaswani et al. 2017): normalise after adding."""

    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


BLOCKS = {
    "both": v3_gpt.TransformerBlock,
    "residual around attention only": AroundAttention,
    "no LayerNorm": WithoutNorm,
    "residual around MLP only": AroundMLP,
    "no residual": WithoutResidual,
    "neither": WithoutBoth,
}
LEARN = ("both", "residual around attention only", "no LayerNorm")
ORDERS = {"Pre-LN": v3_gpt.TransformerBlock, "Post-LN": PostNorm}


def job(block=v3_gpt.TransformerBlock, **flags):
    """One run of v3 for run_all."""
    replace = {} if block is v3_gpt.TransformerBlock else {"TransformerBlock": block}
    return "v3_gpt", replace, flags


def new_model(block, **flags):
    """v3 with another block, width 64, as it is before training."""
    torch.manual_seed(1)
    original, v3_gpt.TransformerBlock = v3_gpt.TransformerBlock, block
    model = v3_gpt.LanguageModel(v3_gpt.Config(n_embd=64, **flags), 65)
    v3_gpt.TransformerBlock = original
    return model


def first_batch():
    """The first 2,048 characters of the text: inputs and targets, both (32, 64)."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    chars = sorted(set(text))
    ids = torch.tensor([chars.index(char) for char in text[: 32 * 64 + 1]])
    return ids[:-1].view(32, 64), ids[1:].view(32, 64)


def by_hand():
    """LayerNorm of four numbers; what ten layers leave of a gradient, four real ones too; differences."""
    orders = load_results()["week_4"]["norm_order"]
    pre, post = (orders[order] for order in ORDERS)
    x = torch.tensor([1.0, 2.0, 3.0, 6.0])
    return {
        "deviation": x.std(correction=0).item(),
        "normalised": F.layer_norm(x, (4,)).tolist(),
        "plain": 0.5**10,
        "residual": 1.5**10,
        "gradient": {name: gradient_norms(BLOCKS[name], 4, 0.02) for name in ("both", "no residual")},
        "post_minus_pre": {n: post[n]["val_loss"]["mean"] - pre[n]["val_loss"]["mean"] for n in pre},
        "post_minus_pre_0.02": {n: post[n]["tried"]["0.02"] - pre[n]["tried"]["0.02"] for n in pre},
        "gained_by_std": {
            order: [row["tried"]["0.02"] - min(row["tried"].values()) for row in rows.values()]
            for order, rows in orders.items()
        },
    }


def loss_of_frequencies():
    """Val loss in nats of a model that knows only how often each character occurs in the training split."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    train, val = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    counts = Counter(train)
    return -sum(math.log(counts[char] / len(train)) for char in val) / len(val)


@torch.no_grad()
def what_arrives(block, init_std):
    """What four untrained blocks pass on: the size of their output, and what the last character does to it.

    The second is how far another last character moves the last position's vector, over the vector's length.
    """
    model, (idx, _) = new_model(block, init_std=init_std).double(), first_batch()
    other = idx.clone()
    other[:, -1] = idx[:, -1].roll(1)
    place = model.position_embedding.weight
    x, moved = (model.blocks(model.token_embedding(ids) + place)[:, -1] for ids in (idx, other))  # (32, 64)
    x, moved = (vectors[idx[:, -1] != other[:, -1]] for vectors in (x, moved))
    size = x.square().mean().sqrt().item()
    own = ((moved - x).norm(dim=-1) / x.norm(dim=-1)).mean().item()
    return {"size": size, "own": own, "written": [f"{size:.2g}", f"{own:.2g}"]}  # some are too small to store


def residuals():
    """Blocks with and without residuals and LayerNorm, at two initial spreads; fewer without residuals.

    Three seeds for the block as it is, one for the others: they differ by far more.
    """
    flags = dict(n_embd=64, max_steps=300, eval_interval=50)
    stds, seeds_of = (0.02, 0.1), {name: SEEDS if name == "both" else SEEDS[:1] for name in BLOCKS}
    jobs = {
        f"block_{name}_{std}_{seed}": job(block, init_std=std, seed=seed, **flags)
        for name, block in BLOCKS.items()
        for std in stds
        for seed in seeds_of[name]
    }
    for n_layer in (1, 2):
        for std in stds:
            fewer = job(WithoutResidual, n_layer=n_layer, init_std=std, seed=1, **flags)
            jobs[f"block_no residual_{n_layer}_{std}"] = fewer
    metrics = run_all(jobs)
    results = {"blocks": {}, "depth": {}, "frequencies": loss_of_frequencies()}
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    for std, ax in zip(stds, axes, strict=True):
        results["blocks"][str(std)] = {}
        for name, block in BLOCKS.items():
            runs = [metrics[f"block_{name}_{std}_{seed}"] for seed in seeds_of[name]]
            row = {"params": runs[0]["params"], "val_loss": spread(m["val_loss"] for m in runs)}
            results["blocks"][str(std)][name] = row | what_arrives(block, std)
            steps, losses = ([p[key] for p in runs[0]["history"]] for key in ("step", "val_loss"))
            # three lie on each other: a wide line, dashes on it, dots on these
            style = {"no residual": dict(lw=3, ls="--"), "neither": dict(lw=3, ls=":", color="black")}
            ax.plot(steps, losses, label=name, **style.get(name, dict(lw=2 if name in LEARN else 7)))
        results["depth"][str(std)] = {
            str(n_layer): metrics[f"block_no residual_{n_layer}_{std}"]["val_loss"] for n_layer in (1, 2)
        }
        ax.set(title=f"std {std}", xlabel="step")
        ax.grid(alpha=0.3)
    axes[0].set(ylabel="val loss (nats per character)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    fig.savefig(LOGS / "week_4_residuals.png", dpi=90)
    return results


def gradient_norms(block, n_layer, init_std):
    """Norm of the gradient in the first and the last block's MLP at initialisation, one fixed batch."""
    model, (x, y) = new_model(block, n_layer=n_layer, init_std=init_std), first_batch()
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    return [model.blocks[i].mlp[0].weight.grad.norm().item() for i in (0, -1)]


def norm_order():
    """Pre-LN and Post-LN at four depths: the best of four initial spreads by seed 1, then three seeds."""

    def jobs(inits, seeds):
        return {
            f"{order}_{n_layer}_{std}_{seed}": job(
                ORDERS[order],
                n_layer=n_layer,
                init_std=std,
                seed=seed,
                n_embd=64,
                max_steps=300,
                eval_interval=150,
            )
            for (order, n_layer), stds in inits.items()
            for std in stds
            for seed in seeds
        }

    settings = [(order, n_layer) for order in ORDERS for n_layer in DEPTHS]
    metrics = run_all(jobs({setting: INITS for setting in settings}, SEEDS[:1]))
    tried = {
        (order, n_layer): {std: metrics[f"{order}_{n_layer}_{std}_1"]["val_loss"] for std in INITS}
        for order, n_layer in settings
    }
    best = {setting: min(losses, key=losses.get) for setting, losses in tried.items()}
    metrics |= run_all(jobs({setting: [std] for setting, std in best.items()}, SEEDS[1:]))
    results = {order: {} for order in ORDERS}
    for (order, n_layer), std in best.items():
        losses = [metrics[f"{order}_{n_layer}_{std}_{seed}"]["val_loss"] for seed in SEEDS]
        results[order][str(n_layer)] = {
            "tried": {str(init): loss for init, loss in tried[order, n_layer].items()},
            "best": std,
            "val_loss": spread(losses),
            "gradients": {str(x): gradient_norms(ORDERS[order], n_layer, x) for x in (0.02, std)},
        }
    return results


def shape():
    """Depth against width at about 0.8 million parameters, equal steps."""
    results = {}
    for n_layer, n_embd in ((1, 256), (2, 180), (4, 128), (8, 92)):
        flags = dict(n_layer=n_layer, n_embd=n_embd, max_steps=400, eval_interval=200)
        metrics = run("v3_gpt", f"shape_{n_layer}", **flags)
        results[f"{n_layer} x {n_embd}"] = {key: metrics[key] for key in ("params", "val_loss")}
    return results


def dropout():
    """Dropout 0, 0.1 and 0.2: 600 steps on all of the text, and on its first 50,000 characters."""
    small_text = ROOT / "runs" / "experiments" / "small_50k.txt"
    small_text.parent.mkdir(parents=True, exist_ok=True)
    small_text.write_text((ROOT / "input.txt").read_text(encoding="utf-8")[:50_000], encoding="utf-8")
    results = {}
    for p in (0.0, 0.1, 0.2):
        whole = run("v3_gpt", f"dropout_{p}", dropout=p, **SMALL)
        part = run("v3_gpt", f"dropout_small_{p}", dropout=p, data=small_text, **SMALL)
        results[str(p)] = {
            "all": {key: whole[key] for key in ("train_loss", "val_loss")},
            "part": {
                "best_val": min(point["val_loss"] for point in part["history"]),
                "last_val": part["history"][-1]["val_loss"],
                "last_train": part["history"][-1]["train_loss"],
            },
        }
    return results


def scale():
    """Val loss after 400 steps as the width grows; draw it against parameters."""
    results = {}
    for n_embd in (16, 32, 64, 128):
        metrics = run("v3_gpt", f"scale_{n_embd}", n_embd=n_embd, max_steps=400, eval_interval=200)
        results[str(n_embd)] = {key: metrics[key] for key in ("params", "val_loss")}
    fig, ax = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    params = [r["params"] for r in results.values()]
    ax.plot(params, [r["val_loss"] for r in results.values()], marker="o")
    ax.set(xscale="log", xlabel="parameters", ylabel="val loss after 400 steps\n(nats per character)")
    ax.set_xticks(params, [f"{n:,}" for n in params])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    fig.savefig(LOGS / "week_4_scale.png", dpi=90)
    return results


class Tied(v3_gpt.LanguageModel):
    """Token embedding and output layer share one matrix (Press and Wolf 2017)."""

    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size)
        self.head.weight = self.token_embedding.weight


def tying():
    """Val loss with and without weight tying, 400 steps, two seeds."""
    return {
        name: [
            run("v3_gpt", f"{name}_{s}", replace=replace, seed=s, max_steps=400, eval_interval=200)[
                "val_loss"
            ]
            for s in (1, 2)
        ]
        for name, replace in {"separate": {}, "tied": {"LanguageModel": Tied}}.items()
    }


def attention_speed():
    """Milliseconds for forward and backward of v2's heads in a loop and v3's fused attention, same shapes."""
    results = {}
    for block_size in (64, 256):
        config = dict(n_embd=128, n_head=4, block_size=block_size)
        x = torch.randn(2048 // block_size, block_size, 128, requires_grad=True)
        for module in (v2_attention, v3_gpt):
            attention = module.MultiHeadAttention(module.Config(**config))
            times = []
            for _ in range(30):
                start = time.perf_counter()
                attention(x).sum().backward()
                times.append(time.perf_counter() - start)
            results[f"{module.__name__} {block_size}"] = 1000 * sorted(times)[len(times) // 2]
    return results


def samples():
    """One prompt continued by the default model in seven ways."""
    ways = ["--greedy", "--temperature=0.5", "--temperature=0.8", "--temperature=1.0", "--temperature=1.5"]
    ways += ["--top_k=5", "--top_p=0.9"]
    results = {}
    for way in ways:
        args = [sys.executable, "v3_gpt.py", "--sample", "--prompt=ROMEO:", "--max_new_tokens=200", way]
        text = subprocess.run(args, cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
        results[way] = text.removesuffix("\n")
    return results


def seeds(losses):
    """A cell of a table: the mean of three seeds, the least and the most; of one seed only the loss."""
    if len(losses["values"]) == 1:
        return f"{losses['mean']:.4f}"
    return f"{losses['mean']:.4f} ({losses['least']:.4f} to {losses['most']:.4f})"


def race_table(results, names):
    """Commands of race_nanogpt.py by name: val loss, seconds, share of nanoGPT's seconds, and the machine."""
    race, to_pass = results["race"], results["references"]["val_loss_to_pass"]
    rows = []
    for name in ("nanogpt", *names):
        row = race[name]
        command = f"`python {' '.join(OURS[name])}`" if name in OURS else "nanoGPT's"
        passes = "yes" if row["val_loss"] < to_pass else "no"
        share = f"{row.get('percent', 100):.0f}%"
        rows.append([command, f"{row['val_loss']:.4f}", passes, f"{row['seconds']:.1f}", share])
    header = ["command", "val loss", f"below {to_pass}", "seconds, whole program", "share of nanoGPT's"]
    return f"{table(header, rows)}\n\nMachine: {race['machine']}."


def gain(rungs):
    """What v3 has over v2, in three sentences."""
    v2, v3 = rungs["v2_attention"], rungs["v3_gpt"]
    size, duration = (v3[key] / v2[key] for key in ("params", "seconds"))
    before, last = v3["history"][-2:]
    text = f"""v3 reaches {v3["val_loss"]:.4f} where v2 stops at {v2["val_loss"]:.4f}. It has {size:.1f}
        times the parameters and takes {duration:.1f} times the time. Its val loss still falls at the end,
        from {before["val_loss"]:.4f} to {last["val_loss"]:.4f} in the last {last["step"] - before["step"]}
        steps, with a tenth of the learning rate left."""
    return textwrap.fill(" ".join(text.split()), 118)


def start(rungs, to_pass):
    """How slowly v3 starts, as an item of a list."""
    history = rungs["v3_gpt"]["history"]
    below = next(point for point in history if point["val_loss"] < to_pass)
    v1 = min(rungs["v1_mlp"]["history"], key=lambda point: abs(point["seconds"] - 1))
    text = f"""- A GPT starts slowly. After {history[0]["step"]} steps and {history[0]["seconds"]:.0f} seconds
        v3's val loss is {history[0]["val_loss"]:.4f}; v1 is at {v1["val_loss"]:.4f} after {v1["seconds"]:.1f}
        seconds. What the window of v1 has built in, v3 must first find out. Its defaults are below
        {to_pass} after {below["seconds"]:.0f} seconds of training, by the estimates on 20,000 characters."""
    return textwrap.fill(" ".join(text.split()), 118, subsequent_indent="  ")


def tables(results):
    """The blocks of logs/week_4.md."""
    week, rungs = results["week_4"], results["rungs"]
    result_rows = []
    for name in ("v1_mlp", "v2_attention", "v3_gpt"):
        m = rungs[name]
        losses = [f"{m['train_loss']:.4f}", f"{m['val_loss']:.4f}", f"{m['bits_per_char']:.2f}"]
        result_rows.append([f"{name}.py", f"{m['params']:,}", *losses, f"{m['seconds']:.0f}"])

    blocks, depth = week["residuals"]["blocks"], week["residuals"]["depth"]
    block_rows = [
        [name, *(seeds(blocks[std][name]["val_loss"]) for std in ("0.02", "0.1"))] for name in BLOCKS
    ]
    arrive_rows = [
        [name, *blocks["0.02"][name]["written"], *blocks["0.1"][name]["written"]] for name in BLOCKS
    ]
    order_rows, tried_rows = [], []
    for n_layer in map(str, DEPTHS):
        rows = [week["norm_order"][order][n_layer] for order in ORDERS]
        cells = [cell for row in rows for cell in (row["best"], seeds(row["val_loss"]))]
        gap = rows[1]["val_loss"]["mean"] - rows[0]["val_loss"]["mean"]
        order_rows.append([n_layer, *cells, f"{gap:+.4f}"])
        for order, row in zip(ORDERS, rows, strict=True):
            losses = [f"{row['tried'][str(std)]:.4f}" for std in INITS]
            tried_rows.append([f"{n_layer}, {order}", *losses])
    gradient_rows = []
    for n_layer in map(str, DEPTHS):
        rows = [week["norm_order"][order][n_layer] for order in ORDERS]
        norms = [row["gradients"][str(row["best"])] for row in rows]
        gradient_rows.append([n_layer, *(f"{first:.4f} / {last:.4f}" for first, last in norms)])
    dropout_rows = []
    for p, r in sorted(week["dropout"].items()):
        whole = [f"{r['all']['train_loss']:.4f}", f"{r['all']['val_loss']:.4f}"]
        part = [f"{r['part'][key]:.4f}" for key in ("last_train", "last_val", "best_val")]
        dropout_rows.append([p, *whole, *part])

    def sizes(runs):
        return [[name, f"{r['params']:,}", f"{r['val_loss']:.4f}"] for name, r in runs]

    speed = week["attention_speed"]
    blocks_of_log = {
        "result": table(
            ["rung", "parameters", "train loss", "val loss", "bits/char", "seconds"], result_rows
        ),
        "gain": gain(rungs),
        "start": start(rungs, results["references"]["val_loss_to_pass"]),
        "residuals": table(["block", "val loss, std 0.02", "val loss, std 0.1"], block_rows),
        "arrives": table(
            ["block", "std 0.02: size", "own character", "std 0.1: size", "own character"], arrive_rows
        ),
        "depth": table(
            ["blocks without residuals", "std 0.02", "std 0.1"],
            [
                *([n, *(f"{depth[std][n]:.4f}" for std in ("0.02", "0.1"))] for n in ("1", "2")),
                ["4", *(seeds(blocks[std]["no residual"]["val_loss"]) for std in ("0.02", "0.1"))],
            ],
        ),
        "norm_order": table(
            [
                "blocks",
                "Pre-LN: best std",
                "val loss",
                "Post-LN: best std",
                "val loss",
                "Post-LN minus Pre-LN",
            ],
            order_rows,
        ),
        "norm_order_tried": table(["blocks", *(f"std {std}" for std in INITS)], tried_rows),
        "gradients": table(
            ["blocks", "gradient of first / last block, Pre-LN", "Post-LN"],
            gradient_rows,
        ),
        "shape": table(
            ["blocks x width", "parameters", "val loss"],
            sizes(sorted(week["shape"].items(), key=lambda item: int(item[0].split()[0]))),
        ),
        "dropout": table(
            ["dropout", "all: train", "all: val", "50,000: train", "50,000: val", "50,000: lowest val"],
            dropout_rows,
        ),
        "scale": table(
            ["width", "parameters", "val loss"],
            sizes(sorted(week["scale"].items(), key=lambda item: int(item[0]))),
        ),
        "tying": table(
            ["output matrix", "val loss, seed 1", "seed 2"],
            [[name, *(f"{loss:.4f}" for loss in week["tying"][name])] for name in ("separate", "tied")],
        ),
        "attention_speed": table(
            ["T", "v2: a loop over heads (ms)", "v3: one product, fused (ms)"],
            [[T, f"{speed[f'v2_attention {T}']:.2f}", f"{speed[f'v3_gpt {T}']:.2f}"] for T in (64, 256)],
        ),
        "race": race_table(results, ["v3_2", "v3_4"]),
        "samples": "\n\n".join(f"`{way}`\n\n```\n{text}\n```" for way, text in week["samples"].items()),
        "sample": f"```\n{rungs['v3_gpt']['sample'].strip()}\n```",
    }
    return {"week_4": blocks_of_log}


EXPERIMENTS = {
    "residuals": residuals,
    "norm_order": norm_order,
    "by_hand": by_hand,  # with differences of norm_order
    "shape": shape,
    "dropout": dropout,
    "scale": scale,
    "tying": tying,
    "attention_speed": attention_speed,
    "samples": samples,
}

if __name__ == "__main__":
    run_experiments(4, EXPERIMENTS, tables)
