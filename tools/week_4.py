"""The experiments of week 4: python tools/week_4.py [experiment ...]"""

import subprocess
import sys
import time

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import LOGS, ROOT, run, run_experiments, table

import v2_attention
import v3_gpt

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


class PostNorm(v3_gpt.TransformerBlock):
    """The order of the first transformer (Vaswani et al. 2017): normalise after adding."""

    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


def by_hand():
    """LayerNorm of four numbers, and what ten layers with derivative 0.5 leave of a gradient."""
    x = torch.tensor([1.0, 2.0, 3.0, 6.0])
    return {
        "deviation": x.std(correction=0).item(),
        "normalised": F.layer_norm(x, (4,)).tolist(),
        "plain": 0.5**10,
        "residual": 1.5**10,
    }


def residuals():
    """Val loss with and without residuals and LayerNorm, four blocks of width 64."""
    blocks = {
        "both": v3_gpt.TransformerBlock,
        "no LayerNorm": WithoutNorm,
        "no residual": WithoutResidual,
        "neither": WithoutBoth,
    }
    results = {}
    fig, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for name, block in blocks.items():
        metrics = run("v3_gpt", f"block_{name}", replace={"TransformerBlock": block}, **SMALL)
        results[name] = {"val_loss": metrics["val_loss"], "params": metrics["params"]}
        history = metrics["history"]
        style = "--" if name == "neither" else "-"  # it hides the one below otherwise
        ax.plot([p["step"] for p in history], [p["val_loss"] for p in history], style, label=name)
    ax.set(xlabel="step", ylabel="val loss (nats per character)")
    ax.legend()
    ax.grid(alpha=0.3)
    fig.savefig(LOGS / "week_4_residuals.png", dpi=90)
    return results


def gradient_norms(block, n_layer):
    """Norm of the gradient in the first and the last block's MLP at initialisation, one fixed batch."""
    torch.manual_seed(0)
    config = v3_gpt.Config(n_embd=64, n_layer=n_layer)
    original, v3_gpt.TransformerBlock = v3_gpt.TransformerBlock, block
    model = v3_gpt.LanguageModel(config, 65)
    v3_gpt.TransformerBlock = original
    text = v3_gpt.load_text(v3_gpt.Config(data=str(ROOT / "input.txt")))
    chars = sorted(set(text))
    ids = torch.tensor([chars.index(char) for char in text[: 33 * 64]])
    x, y = ids[: 32 * 64].view(32, 64), ids[1 : 32 * 64 + 1].view(32, 64)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    return [model.blocks[i].mlp[0].weight.grad.norm().item() for i in (0, -1)]


def norm_order():
    """Pre-LN against Post-LN at depths 2, 4, 8 and 12: val loss, gradient norms of first and last block."""
    flags = SMALL | dict(max_steps=300)
    results = {}
    for name, block in (("Pre-LN", v3_gpt.TransformerBlock), ("Post-LN", PostNorm)):
        results[name] = {}
        for n_layer in (2, 4, 8, 12):
            metrics = run(
                "v3_gpt", f"{name}_{n_layer}", replace={"TransformerBlock": block}, n_layer=n_layer, **flags
            )
            first, last = gradient_norms(block, n_layer)
            results[name][str(n_layer)] = {"val_loss": metrics["val_loss"], "first": first, "last": last}
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


def tables(results):
    """The blocks of logs/week_4.md."""
    week, rungs = results["week_4"], results["rungs"]
    result_rows = []
    for name in ("v1_mlp", "v2_attention", "v3_gpt"):
        m = rungs[name]
        losses = [f"{m['train_loss']:.4f}", f"{m['val_loss']:.4f}", f"{m['bits_per_char']:.2f}"]
        result_rows.append([f"{name}.py", f"{m['params']:,}", *losses, f"{m['seconds']:.0f}"])
    order_rows = []
    for n_layer in ("2", "4", "8", "12"):
        pre, post = week["norm_order"]["Pre-LN"][n_layer], week["norm_order"]["Post-LN"][n_layer]
        losses = [f"{r['val_loss']:.4f}" for r in (pre, post)]
        norms = [f"{r['first']:.4f} / {r['last']:.4f}" for r in (pre, post)]
        order_rows.append([n_layer, *losses, *norms])
    dropout_rows = []
    for p, r in sorted(week["dropout"].items()):
        whole = [f"{r['all']['train_loss']:.4f}", f"{r['all']['val_loss']:.4f}"]
        part = [f"{r['part'][key]:.4f}" for key in ("last_train", "last_val", "best_val")]
        dropout_rows.append([p, *whole, *part])

    def sizes(runs):
        return [[name, f"{r['params']:,}", f"{r['val_loss']:.4f}"] for name, r in runs]

    speed = week["attention_speed"]
    return {
        "result": table(
            ["rung", "parameters", "train loss", "val loss", "bits/char", "seconds"], result_rows
        ),
        "residuals": table(
            ["block", "parameters", "val loss"],
            [
                [name, f"{week['residuals'][name]['params']:,}", f"{week['residuals'][name]['val_loss']:.4f}"]
                for name in ("both", "no LayerNorm", "no residual", "neither")
            ],
        ),
        "norm_order": table(
            ["blocks", "val loss, Pre-LN", "Post-LN", "gradient first / last block, Pre-LN", "Post-LN"],
            order_rows,
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
        "samples": "\n\n".join(f"`{way}`\n\n```\n{text}\n```" for way, text in week["samples"].items()),
        "sample": f"```\n{rungs['v3_gpt']['sample'].strip()}\n```",
    }


EXPERIMENTS = {
    "by_hand": by_hand,
    "residuals": residuals,
    "norm_order": norm_order,
    "shape": shape,
    "dropout": dropout,
    "scale": scale,
    "tying": tying,
    "attention_speed": attention_speed,
    "samples": samples,
}

if __name__ == "__main__":
    run_experiments(4, EXPERIMENTS, tables)
