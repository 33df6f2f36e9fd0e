"""The experiments of week 2: python tools/week_2.py [experiment ...]"""

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import LOGS, ROOT, run, run_experiments, table

import v1_mlp

STEPS = dict(max_steps=500, eval_interval=50)


def by_hand():
    """One step of gradient descent on (w - 3)^2 from w = 1 with three learning rates."""
    w, results = 1.0, {}
    for rate in (0.1, 1.0, 1.1):
        stepped = w - rate * 2 * (w - 3)
        results[str(rate)] = {"w": stepped, "loss": (stepped - 3) ** 2}
    return results


def lookup():
    """An embedding is one-hot times matrix: the largest difference over all 65 characters."""
    torch.manual_seed(0)
    embedding = nn.Embedding(65, 32)
    ids = torch.arange(65)
    product = F.one_hot(ids, 65).float() @ embedding.weight
    return {"largest_difference": (embedding(ids) - product).abs().max().item()}


class WithoutPositions(v1_mlp.LanguageModel):
    """v1's model with its position vectors kept at zero."""

    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size)
        self.position_embedding.requires_grad_(False)


def fold_positions():
    """Move the trained position vectors into the first layer's bias: the largest change of a logit."""
    checkpoint = torch.load(ROOT / "runs/v1_mlp/checkpoint.pt", weights_only=True)
    config = v1_mlp.Config(**checkpoint["config"])
    model = v1_mlp.LanguageModel(config, len(checkpoint["vocab"]))
    model.load_state_dict(checkpoint["model"])
    idx = torch.randint(65, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(idx)
        model.mlp[0].bias += model.mlp[0].weight @ model.position_embedding.flatten()
        model.position_embedding.zero_()
        return (model(idx) - before).abs().max().item()


def positions():
    """Train v1 with and without its position vectors, three seeds each."""
    losses = {
        name: [run("v1_mlp", f"{name}_{s}", replace=replace, seed=s, **STEPS)["val_loss"] for s in (1, 2, 3)]
        for name, replace in {"with": {}, "without": {"LanguageModel": WithoutPositions}}.items()
    }
    changes = [abs(a - b) for a, b in zip(losses["with"], losses["without"], strict=True)]
    return losses | {
        "seed_spread": max(losses["with"]) - min(losses["with"]),
        "largest_change": max(changes),
        "folded_difference": fold_positions(),
    }


def optimizers():
    """SGD, SGD with momentum and AdamW, each at its best of several learning rates."""

    def sgd(momentum):
        return lambda model, config: torch.optim.SGD(model.parameters(), config.learning_rate, momentum)

    results = {}
    for name, make, rates in [
        ("SGD", sgd(0.0), [0.3, 1.0, 3.0, 10.0]),
        ("SGD with momentum 0.9", sgd(0.9), [0.1, 0.3, 1.0, 3.0]),
        ("AdamW", v1_mlp.make_optimizer, [0.001, 0.003, 0.01, 0.03]),
    ]:
        results[name] = {
            str(rate): run(
                "v1_mlp", f"{name[:3]}_{rate}", replace={"make_optimizer": make}, learning_rate=rate, **STEPS
            )["val_loss"]
            for rate in rates
        }
    best = {name: min(losses.values()) for name, losses in results.items()}
    return {"losses": results, "sgd_behind": best["SGD"] - best["AdamW"]}


def batch_sizes():
    """The same 1,024,000 characters in batches of different size, with one learning rate and a scaled one."""
    results = {}
    for batch_size in (4, 16, 64, 256):
        steps = 16_000 // batch_size
        common = dict(batch_size=batch_size, max_steps=steps, warmup_steps=steps // 10, eval_interval=steps)
        fixed = run("v1_mlp", f"batch_{batch_size}", **common)
        scaled = run("v1_mlp", f"scaled_{batch_size}", learning_rate=0.001 * batch_size**0.5, **common)
        results[str(batch_size)] = {
            "steps": steps,
            "val_loss": fixed["val_loss"],
            "seconds": fixed["seconds"],
            "scaled_val_loss": scaled["val_loss"],
        }
    return results


def fitting():
    """Too small a network, a fitting one, one that learns 20,000 characters by heart; draw their curves."""
    small_text = ROOT / "runs" / "experiments" / "small.txt"
    small_text.parent.mkdir(parents=True, exist_ok=True)
    small_text.write_text((ROOT / "input.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    common = dict(max_steps=1000, eval_interval=25)
    runs = {
        "8 hidden units, all of the text": dict(n_hidden=8),
        "256 hidden units, all of the text": dict(n_hidden=256),
        "256 hidden units, 20,000 characters": dict(n_hidden=256, data=small_text),
    }
    results = {}
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for i, (ax, (name, flags)) in enumerate(zip(axes, runs.items(), strict=True)):
        metrics = run("v1_mlp", f"fitting_{i}", **common, **flags)
        history = metrics["history"]
        steps = [point["step"] for point in history]
        for split in ("train", "val"):
            ax.plot(steps, [point[f"{split}_loss"] for point in history], label=f"{split} loss")
        ax.set(title=name, xlabel="step", ylim=(0, 4.5))
        best = min(history, key=lambda point: point["val_loss"])
        results[name] = {
            "last": {"train": history[-1]["train_loss"], "val": history[-1]["val_loss"]},
            "best": {"step": best["step"], "train": best["train_loss"], "val": best["val_loss"]},
        }
    axes[0].set(ylabel="loss (nats per character)")
    axes[0].legend()
    fig.savefig(LOGS / "week_2_fitting.png", dpi=90)
    return results


def tables(results):
    """The blocks of logs/week_2.md."""
    week, rung = results["week_2"], results["rungs"]["v1_mlp"]
    optimizer_rows = []
    for name, losses in week["optimizers"]["losses"].items():
        cells = [
            f"{rate}: {loss:.4f}" for rate, loss in sorted(losses.items(), key=lambda item: float(item[0]))
        ]
        optimizer_rows.append([name, *cells])
    batch_rows = [
        [
            size,
            f"{r['steps']:,}",
            f"{r['val_loss']:.4f}",
            f"{r['scaled_val_loss']:.4f}",
            f"{r['seconds']:.1f}",
        ]
        for size, r in sorted(week["batch_sizes"].items(), key=lambda item: int(item[0]))
    ]
    position_rows = [
        [name, *(f"{loss:.4f}" for loss in week["positions"][name])] for name in ("with", "without")
    ]
    fitting_rows = []
    for name, r in sorted(week["fitting"].items(), reverse=True):
        best, last = r["best"], r["last"]
        cells = [f"{best['val']:.4f}", best["step"], f"{last['train']:.4f}", f"{last['val']:.4f}"]
        fitting_rows.append([name, *cells])
    return {
        "result": table(
            ["rung", "parameters", "train loss", "val loss", "perplexity", "bits/char", "seconds"],
            [
                [
                    f"{name}.py",
                    f"{m['params']:,}",
                    f"{m['train_loss']:.4f}",
                    f"{m['val_loss']:.4f}",
                    f"{m['perplexity']:.2f}",
                    f"{m['bits_per_char']:.2f}",
                    f"{m['seconds']:.0f}",
                ]
                for name, m in results["rungs"].items()
                if name <= "v1_mlp"
            ],
        ),
        "optimizers": table(["optimizer", "lowest rate", "second", "third", "highest"], optimizer_rows),
        "batch_sizes": table(
            [
                "batch size",
                "steps",
                "val loss, rate 0.005",
                "val loss, rate 0.001 x root of batch",
                "seconds",
            ],
            batch_rows,
        ),
        "positions": table(["position vectors", "seed 1", "seed 2", "seed 3"], position_rows),
        "fitting": table(
            ["network and text", "lowest val", "at step", "train at 1000", "val at 1000"], fitting_rows
        ),
        "sample": f"```\n{rung['sample'].strip()}\n```",
    }


EXPERIMENTS = {
    "by_hand": by_hand,
    "lookup": lookup,
    "positions": positions,
    "optimizers": optimizers,
    "batch_sizes": batch_sizes,
    "fitting": fitting,
}

if __name__ == "__main__":
    run_experiments(2, EXPERIMENTS, tables)
