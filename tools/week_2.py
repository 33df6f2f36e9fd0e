"""The experiments of week 2: python tools/week_2.py [experiment ...]"""

import math
import shutil
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import LOGS, ROOT, run, run_all, run_experiments, spread, table
from week_1 import listing

import v1_mlp

SEEDS = (1, 2, 3)
SHORT_RUN = dict(max_steps=500, eval_interval=50)


def three_seeds(rung, name, replace=None, **flags):
    """The jobs for run_all that train one setting with three seeds."""
    return {f"{name}_{seed}": (rung, replace, flags | {"seed": seed}) for seed in SEEDS}


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


def shapes():
    """v1's pad, unfold and transpose for B = 1, T = 4, window = 3, C = 2, as forward computes them."""
    config = v1_mlp.Config(window=3, n_embd=2)
    model = v1_mlp.LanguageModel(config, 4)
    model.token_embedding.weight.data = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]])
    seen = []  # what goes into the network, caught on its way
    model.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    idx = torch.arange(4).view(1, 4)
    with torch.inference_mode():
        model(idx)
        embedded = model.token_embedding(idx)
        padded = F.pad(embedded, (0, 0, 2, 0))
        unfolded = padded.unfold(1, 3, 1)
        windows = unfolded.transpose(2, 3)
    steps = {"embedded": embedded, "padded": padded, "unfolded": unfolded, "windows": windows}
    steps["flat"] = seen[0]
    return {name: x.int().tolist() for name, x in steps.items()} | {
        "shapes": {name: str(tuple(x.shape)) for name, x in steps.items()}
    }


def backprop_by_hand():
    """Loss and gradient of w2 * GELU(w1 * x), two weights, by the chain rule; the same by autograd."""
    x, w1, w2, target, rate = 2.0, 0.5, 2.0, 1.0, 0.01

    def gelu(z):
        return z * (1 + math.erf(z / math.sqrt(2))) / 2

    def loss_at(w1, w2):
        return (w2 * gelu(w1 * x) - target) ** 2

    z = w1 * x
    h = gelu(z)
    y = w2 * h
    slope = (1 + math.erf(z / math.sqrt(2))) / 2 + z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    values = {"x": x, "w1": w1, "w2": w2, "target": target, "z": z, "h": h, "y": y, "loss": (y - target) ** 2}
    values |= {"slope": slope, "gelu_of_1": gelu(1), "gelu_of_minus_1": gelu(-1)}
    values["dy"] = 2 * (y - target)
    values["dw2"] = values["dy"] * h
    values["dh"] = values["dy"] * w2
    values["dz"] = values["dh"] * slope
    values["dw1"] = values["dz"] * x
    w1_new, w2_new = w1 - rate * values["dw1"], w2 - rate * values["dw2"]
    values |= {"w1_new": w1_new, "w2_new": w2_new, "loss_new": loss_at(w1_new, w2_new)}
    values["nudged"] = (loss_at(w1 + 0.0001, w2) - loss_at(w1, w2)) / 0.0001

    weights = torch.tensor([w1, w2], dtype=torch.float64, requires_grad=True)
    loss = (weights[1] * F.gelu(weights[0] * x) - target) ** 2
    loss.backward()
    difference = weights.grad - torch.tensor([values["dw1"], values["dw2"]], dtype=torch.float64)
    return values | {"rate": rate, "largest_difference": difference.abs().max().item()}


class WithoutNonlinearity(v1_mlp.LanguageModel):
    """v1's model without its GELUs: three linear layers in a row."""

    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size)
        self.mlp = nn.Sequential(*(layer for layer in self.mlp if isinstance(layer, nn.Linear)))


def collapse():
    """Multiply the three trained matrices of such a model into one: the largest change of a logit."""
    checkpoint = torch.load(ROOT / "runs/experiments/linear_1/checkpoint.pt", weights_only=True)
    model = WithoutNonlinearity(v1_mlp.Config(**checkpoint["config"]), len(checkpoint["vocab"]))
    model.load_state_dict(checkpoint["model"])
    idx = torch.randint(65, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(idx)
        first, second, third = model.mlp
        one = nn.Linear(first.in_features, third.out_features)
        one.weight.copy_(third.weight @ second.weight @ first.weight)
        one.bias.copy_(third.weight @ (second.weight @ first.bias + second.bias) + third.bias)
        model.mlp = nn.Sequential(one)
        change = (model(idx) - before).abs().max().item()
    return {"change": change, "params_of_one": sum(p.numel() for p in one.parameters())}


def nonlinearity():
    """v1 with and without its GELUs, three seeds each, and the one layer that the latter amounts to."""
    kinds = {"as_it_is": None, "linear": {"LanguageModel": WithoutNonlinearity}}
    jobs = {}
    for name, replace in kinds.items():
        jobs |= three_seeds("v1_mlp", name, replace, **SHORT_RUN)
    metrics = run_all(jobs)
    results = {name: spread(metrics[f"{name}_{seed}"]["val_loss"] for seed in SEEDS) for name in kinds}
    model = v1_mlp.LanguageModel(v1_mlp.Config(), 65)
    sizes = {"mlp": sum(p.numel() for p in model.mlp.parameters())}
    sizes["first_layer"] = sum(p.numel() for p in model.mlp[0].parameters())
    return results | collapse() | {"params": sizes}


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
    jobs = three_seeds("v1_mlp", "as_it_is", **SHORT_RUN)
    jobs |= three_seeds("v1_mlp", "without", {"LanguageModel": WithoutPositions}, **SHORT_RUN)
    metrics = run_all(jobs)
    runs = {"with": "as_it_is", "without": "without"}
    losses = {name: [metrics[f"{run}_{seed}"]["val_loss"] for seed in SEEDS] for name, run in runs.items()}
    changes = [abs(a - b) for a, b in zip(losses["with"], losses["without"], strict=True)]
    return losses | {
        "seed_spread": max(losses["with"]) - min(losses["with"]),
        "largest_change": max(changes),
        "folded_difference": fold_positions(),
    }


def sgd(model, config, momentum):
    """An optimizer to stand in for v1's."""
    return torch.optim.SGD(model.parameters(), config.learning_rate, momentum)


def optimizers():
    """SGD, SGD with momentum, AdamW: the best of five rates with seed 1, then that rate with three seeds."""
    choices = {
        "SGD": ({"make_optimizer": partial(sgd, momentum=0.0)}, [1.0, 2.0, 4.0, 8.0, 16.0]),
        "SGD with momentum 0.9": ({"make_optimizer": partial(sgd, momentum=0.9)}, [0.25, 0.5, 1.0, 2.0, 4.0]),
        "AdamW": (None, [0.0025, 0.005, 0.01, 0.02, 0.04]),
    }

    def job(name, rate, seed):
        flags = SHORT_RUN | dict(learning_rate=rate, seed=seed)
        return f"{name.replace(' ', '_')}_{rate}_{seed}", ("v1_mlp", choices[name][0], flags)

    search = run_all(dict(job(name, rate, 1) for name, (_, rates) in choices.items() for rate in rates))
    losses, best = {}, {}
    for name, (_, rates) in choices.items():
        losses[name] = {str(rate): search[job(name, rate, 1)[0]]["val_loss"] for rate in rates}
        rate = min(rates, key=lambda rate: losses[name][str(rate)])
        best[name] = {"rate": rate}
    again = run_all(dict(job(name, best[name]["rate"], seed) for name in choices for seed in SEEDS))
    for name, r in best.items():
        r |= spread(again[job(name, r["rate"], seed)[0]]["val_loss"] for seed in SEEDS)
    behind = {name: r["mean"] - best["AdamW"]["mean"] for name, r in best.items()}
    return {"losses": losses, "best": best, "behind_adamw": behind}


def batch_flags(batch_size):
    """About 1,024,000 characters in batches of this size, warm-up and decay in proportion."""
    steps = 16_000 // batch_size
    return dict(batch_size=batch_size, max_steps=steps, warmup_steps=steps // 10, eval_interval=steps)


def batch_sizes():
    """As much text in batches of each size, with one learning rate and a scaled one, three seeds each."""
    jobs = {}
    for size in (4, 16, 64, 256):
        jobs |= three_seeds("v1_mlp", f"batch_{size}", **batch_flags(size))
        scaled = batch_flags(size) | dict(learning_rate=0.001 * size**0.5)
        jobs |= three_seeds("v1_mlp", f"scaled_{size}", **scaled)
    metrics = run_all(jobs)
    return {
        str(size): {"steps": batch_flags(size)["max_steps"]}
        | {
            kind: spread(metrics[f"{kind}_{size}_{seed}"]["val_loss"] for seed in SEEDS)
            for kind in ("batch", "scaled")
        }
        for size in (4, 16, 64, 256)
    }


def batch_seconds():
    """How long the training takes with each batch size: these runs have the machine for themselves."""
    return {
        str(size): run("v1_mlp", f"batch_seconds_{size}", **batch_flags(size))["seconds"]
        for size in (4, 16, 64, 256)
    }


def fitting():
    """Too small a network, a fitting one, one that learns 20,000 characters by heart; draw their curves."""
    small_text = ROOT / "runs" / "experiments" / "small.txt"
    small_text.parent.mkdir(parents=True, exist_ok=True)
    small_text.write_text((ROOT / "input.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    common = dict(max_steps=1000, eval_interval=25)
    kinds = {
        "8 hidden units, all of the text": dict(n_hidden=8),
        "256 hidden units, all of the text": dict(n_hidden=256),
        "256 hidden units, 20,000 characters": dict(n_hidden=256, data=small_text),
    }
    jobs = {}
    for i, flags in enumerate(kinds.values()):
        jobs |= three_seeds("v1_mlp", f"fitting_{i}", **common, **flags)
    metrics = run_all(jobs)
    results = {}
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for i, (ax, name) in enumerate(zip(axes, kinds, strict=True)):
        histories = [metrics[f"fitting_{i}_{seed}"]["history"] for seed in SEEDS]
        for split, color in (("train", "tab:blue"), ("val", "tab:orange")):
            for history in histories:
                label = f"{split} loss" if history is histories[0] else None
                points = [(point["step"], point[f"{split}_loss"]) for point in history]
                ax.plot(*zip(*points, strict=True), color=color, linewidth=1, label=label)
        ax.set(title=name, xlabel="step", ylim=(0, 4.5))
        best = [min(history, key=lambda point: point["val_loss"]) for history in histories]
        results[name] = {
            "last_train": spread(history[-1]["train_loss"] for history in histories),
            "last_val": spread(history[-1]["val_loss"] for history in histories),
            "best_val": spread(point["val_loss"] for point in best),
            "best_step": spread(point["step"] for point in best),
        }
    axes[0].set(ylabel="loss (nats per character)")
    axes[0].legend()
    fig.savefig(LOGS / "week_2_fitting.png", dpi=90)
    return results


def resumed():
    """800 steps, resumed to 1,600, against one run of 1,600, three seeds each; draw rates and losses."""
    metrics = run_all(three_seeds("v1_mlp", "first", max_steps=800))
    for seed in SEEDS:
        first, second = (ROOT / "runs/experiments" / f"{name}_{seed}" for name in ("first", "resumed"))
        second.mkdir(exist_ok=True)
        shutil.copy(first / "checkpoint.pt", second / "checkpoint.pt")
    metrics |= run_all(three_seeds("v1_mlp", "resumed", max_steps=1600, resume=True))
    metrics |= run_all(three_seeds("v1_mlp", "whole", max_steps=1600))

    half, whole = v1_mlp.Config(max_steps=800), v1_mlp.Config(max_steps=1600)
    names = {"first": "800 steps", "resumed": "800, resumed to 1,600", "whole": "1,600 in one run"}
    steps = range(1, 1601)
    rates = {
        "resumed": [v1_mlp.learning_rate_at(step, half if step <= 800 else whole) for step in steps],
        "whole": [v1_mlp.learning_rate_at(step, whole) for step in steps],
    }
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, color in (("whole", "tab:blue"), ("resumed", "tab:orange")):
        left.plot(steps, rates[name], color=color)
        for seed in SEEDS:
            history = metrics[f"{name}_{seed}"]["history"]
            points = [(point["step"], point["val_loss"]) for point in history]
            label = names[name] if seed == 1 else None
            right.plot(*zip(*points, strict=True), color=color, linewidth=1, label=label)
    left.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    right.set(xlabel="step", ylabel="val loss (nats per character)", ylim=(1.6, 2.2))
    right.legend()
    fig.savefig(LOGS / "week_2_resume.png", dpi=90)

    results = {name: spread(metrics[f"{name}_{seed}"]["val_loss"] for seed in SEEDS) for name in names}
    at = {
        step: spread(
            next(p["val_loss"] for p in metrics[f"resumed_{seed}"]["history"] if p["step"] == step)
            for seed in SEEDS
        )
        for step in (800, 900, 1600)
    }
    return results | {
        "names": names,
        "estimates": at,
        "rates": {"800": rates["resumed"][799], "801": rates["resumed"][800], "1600": rates["resumed"][-1]},
        "cost": results["resumed"]["mean"] - results["whole"]["mean"],
        "gain": results["first"]["mean"] - results["resumed"]["mean"],
    }


def shape_block(shapes):
    """The worked example of v1's window."""
    rows = [
        ("x, embedded", "embedded", shapes["embedded"]),
        ("F.pad", "padded", shapes["padded"]),
        ("unfold, at t = 2", "unfolded", shapes["unfolded"][0][2]),
        ("transpose, at t = 2", "windows", shapes["windows"][0][2]),
        ("flatten, at t = 0", "flat", shapes["flat"][0][0]),
        ("           t = 1", "", shapes["flat"][0][1]),
        ("           t = 2", "", shapes["flat"][0][2]),
        ("           t = 3", "", shapes["flat"][0][3]),
    ]
    return listing([(name, str(value), shapes["shapes"].get(key, "")) for name, key, value in rows])


def backprop_table(r):
    """The forward and the backward pass of backprop_by_hand, a line a step."""
    x, w1, w2, target = (f"{r[name]:g}" for name in ("x", "w1", "w2", "target"))
    n = {name: f"{r[name]:.4f}" for name in r}
    rows = [
        ["forward", "z = w1 * x", f"{w1} * {x}", n["z"]],
        ["", "h = GELU(z)", f"GELU({r['z']:g})", n["h"]],
        ["", "y = w2 * h", f"{w2} * {n['h']}", n["y"]],
        ["", "loss = (y - target)^2", f"({n['y']} - {target})^2", n["loss"]],
        ["backward", "slope by y: 2 (y - target)", f"2 * ({n['y']} - {target})", n["dy"]],
        ["", "**by w2**: slope by y * h", f"{n['dy']} * {n['h']}", f"**{n['dw2']}**"],
        ["", "by h: slope by y * w2", f"{n['dy']} * {w2}", n["dh"]],
        ["", "by z: slope by h * slope of GELU", f"{n['dh']} * {n['slope']}", n["dz"]],
        ["", "**by w1**: slope by z * x", f"{n['dz']} * {x}", f"**{n['dw1']}**"],
    ]
    return table(["pass", "step", "numbers", "result"], rows)


def tables(results):
    """The blocks of logs/week_2.md."""
    week, rungs = results["week_2"], results["rungs"]
    result_rows = []
    for name in ("v0_bigram", "v1_mlp"):
        m = rungs[name]
        losses = [f"{m[key]:.4f}" for key in ("train_loss", "val_loss")]
        others = [f"{m['perplexity']:.2f}", f"{m['bits_per_char']:.2f}", f"{m['seconds']:.0f}"]
        result_rows.append([f"{name}.py", f"{m['params']:,}", *losses, *others])

    def three(r):
        return [f"{r[key]:.4f}" for key in ("mean", "least", "most")]

    optimizer_rows, best_rows = [], []
    for name, losses in week["optimizers"]["losses"].items():
        by_rate = sorted(losses.items(), key=lambda item: float(item[0]))
        optimizer_rows.append([name, *(f"{rate}: {loss:.4f}" for rate, loss in by_rate)])
    for name, r in week["optimizers"]["best"].items():
        best_rows.append([name, r["rate"], *three(r)])
    batch_rows = []
    for size, r in sorted(week["batch_sizes"].items(), key=lambda item: int(item[0])):
        ranges = [f"{x['mean']:.4f} ({x['least']:.4f} to {x['most']:.4f})" for x in (r["batch"], r["scaled"])]
        batch_rows.append([size, f"{r['steps']:,}", *ranges, f"{week['batch_seconds'][size]:.1f}"])
    position_rows = [
        [name, *(f"{loss:.4f}" for loss in week["positions"][name])] for name in ("with", "without")
    ]
    kinds = {"with its GELUs": "as_it_is", "without: three linear layers": "linear"}
    fitting_rows = []
    for name, r in sorted(week["fitting"].items(), reverse=True):
        steps = ", ".join(str(step) for step in r["best_step"]["values"])
        best, train, val = (f"{r[key]['mean']:.4f}" for key in ("best_val", "last_train", "last_val"))
        fitting_rows.append([name, best, steps, train, val, *three(r["last_val"])[1:]])
    blocks = {
        "result": table(
            ["rung", "parameters", "train loss", "val loss", "perplexity", "bits/char", "seconds"],
            result_rows,
        ),
        "shapes": shape_block(week["shapes"]),
        "backprop": backprop_table(week["backprop_by_hand"]),
        "nonlinearity": table(
            ["v1, 500 steps", "val loss, mean of 3 seeds", "least", "most"],
            [[name, *three(week["nonlinearity"][key])] for name, key in kinds.items()],
        ),
        "optimizers": table(["optimizer", "lowest rate", "2nd", "3rd", "4th", "highest"], optimizer_rows),
        "best": table(["optimizer", "rate", "val loss, mean of 3 seeds", "least", "most"], best_rows),
        "batch_sizes": table(
            ["batch size", "steps", "val loss, rate 0.005", "rate 0.001 x root of batch", "seconds"],
            batch_rows,
        ),
        "positions": table(["position vectors", "seed 1", "seed 2", "seed 3"], position_rows),
        "fitting": table(
            ["network and text", "lowest val", "at step", "train at 1000", "val at 1000", "least", "most"],
            fitting_rows,
        ),
        "resumed": table(
            ["steps", "val loss, mean of 3 seeds", "least", "most"],
            [[name, *three(week["resumed"][key])] for key, name in week["resumed"]["names"].items()],
        ),
        "sample": f"```\n{rungs['v1_mlp']['sample'].strip()}\n```",
    }
    return {"week_2": blocks}


EXPERIMENTS = {
    "by_hand": by_hand,
    "lookup": lookup,
    "shapes": shapes,
    "backprop_by_hand": backprop_by_hand,
    "nonlinearity": nonlinearity,
    "positions": positions,
    "optimizers": optimizers,
    "batch_sizes": batch_sizes,
    "batch_seconds": batch_seconds,
    "fitting": fitting,
    "resumed": resumed,
}

if __name__ == "__main__":
    run_experiments(2, EXPERIMENTS, tables)
