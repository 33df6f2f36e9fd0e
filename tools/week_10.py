"""The experiments of week 10: python tools/week_10.py [experiment ...]

They begin with the model of v8's default run. What is compared has one thread a run, as many runs at a time
as there are cores; `times` and `examples` take the default settings, with all cores.
"""

import math

import matplotlib.pyplot as plt
import torch
from common import LOGS, ROOT, kept, machine, run, run_all, run_default, run_experiments, spread, table

import v9_rlhf as v9
from v9_rlhf import value_loss  # its own, also where a stand-in replaces it

RUNG, SEEDS = "v9_rlhf", (1, 2, 3)
BASE, V6 = ROOT / "runs" / "v8_lora", ROOT / "runs" / "v6_amp_ddp"
STOPPED = {
    1: 300,
    2: 320,
    3: 320,
}  # steps of v8, by seed, after which it reads a third to a half of the names
METHODS = ("ppo", "grpo", "dpo", "best_of_n")
NAMES = {"ppo": "PPO", "grpo": "GRPO", "dpo": "DPO", "best_of_n": "best of 16"}


def folder_of(name):
    """The folder of an experiment."""
    return ROOT / "runs" / "experiments" / "week_10" / name


def compare(week_folder, jobs):
    """Run {name: (stand-ins, flags)} on v8's model; return {name: metrics}."""
    jobs = {
        f"week_10/{week_folder}/{name}": (RUNG, replace, dict(base=BASE, seed=1) | flags)
        for name, (replace, flags) in jobs.items()
    }
    return {name.split("/")[-1]: metrics for name, metrics in run_all(jobs).items()}


def figures(metrics):
    """What is stored of a run."""
    names = ("preferred", "kl", "truth", "score", "length", "distinct_words", "bits_per_char")
    return {name: metrics[name] for name in names if name in metrics}


def seeds():
    """The four methods with three seeds each. Each seed has a reward model of its own, made by best_of_n."""
    results, runs = {}, {}
    for methods in (METHODS[3:], METHODS[:3]):
        jobs = {
            f"{method}_{seed}": (None, dict(method=method, seed=seed)) for method in methods for seed in SEEDS
        }
        runs |= compare("seeds", jobs)
    for method in METHODS:
        found = [runs[f"{method}_{seed}"] for seed in SEEDS]
        results[method] = {name: spread(figures(m)[name] for m in found) for name in figures(found[0])}
    found = [runs[f"best_of_n_{seed}"] for seed in SEEDS]
    results["before"] = {
        name: spread(figures(m["before"])[name] for m in found) for name in figures(found[0]["before"])
    }
    return results | {"judge": {name: spread(m[name] for m in found) for name in ("accuracy", "pairs")}}


FRONTIER = {
    "ppo": ("kl_coef", (0.1, 1.0)),
    "grpo": ("kl_coef", (0.15, 1.0)),
    "dpo": ("dpo_beta", (0.1, 1.0)),
    "best_of_n": ("n_best", (2, 4)),
}


def frontier():
    """How far each method goes at other prices of the KL: preferred share and KL, one seed."""
    jobs = {
        f"{method}_{value}": (None, {"method": method, flag: value})
        for method, (flag, values) in FRONTIER.items()
        for value in values
    }
    runs, results = compare("frontier", jobs), {}
    for method, (_, values) in FRONTIER.items():
        results[method] = {str(value): figures(runs[f"{method}_{value}"]) for value in values}
    draw_frontier(results)
    return results


def draw_frontier(results):
    """Write logs/week_10_frontier.png, with the runs of `seeds`."""
    own = seeds()
    fig, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for i, method in enumerate(METHODS):
        points = [(m["kl"], m["preferred"]) for m in results[method].values()]
        three = list(zip(own[method]["kl"]["values"], own[method]["preferred"]["values"], strict=True))
        points = sorted([*points, three[0]])
        ax.plot(*zip(*points, strict=True), ".-", color=f"C{i}", label=NAMES[method].replace(" 16", " n"))
        ax.plot(*zip(*three, strict=True), "o", color=f"C{i}", markerfacecolor="none")
    ax.plot(0, 0.5, "k*", label="v8", clip_on=False)
    ax.plot([], [], "o", color="gray", markerfacecolor="none", label="default, three seeds")
    ax.axvline(10, color="gray", linestyle="--", linewidth=1)
    ax.set(xlabel="KL from v8 (nats a reply)", ylabel="preferred by the annotator (share)", ylim=(0.45, 1.02))
    ax.set(xscale="symlog", xlim=(0, None))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(LOGS / "week_10_frontier.png", dpi=90)
    plt.close(fig)


def overoptimised():
    """PPO without a price for the KL, for longer: the score that it sees and the truth that it does not."""
    metrics = compare("overoptimised", {"ppo": (None, dict(kl_coef=0.0, max_steps=120))})["ppo"]
    draw_overoptimised(metrics["history"])
    sample = (folder_of("overoptimised/ppo") / "sample.txt").read_text(encoding="utf-8")
    names = ("step", "score", "truth", "kl", "length")
    history = [{name: point[name] for name in names} for point in metrics["history"]]
    best = max(history, key=lambda point: point["truth"])
    return figures(metrics) | {"history": history[::10] + history[-1:], "best": best, "sample": sample}


def draw_overoptimised(history):
    """Write logs/week_10_hacking.png."""
    fig, axes = plt.subplots(3, sharex=True, figsize=(7, 6), layout="constrained")
    labels = {"score": "reward model's score\n(standard deviations)", "truth": "annotator's truth"}
    labels["kl"] = "KL from v8\n(nats a reply)"
    for ax, (name, label) in zip(axes, labels.items(), strict=True):
        ax.plot([point["step"] for point in history], [point[name] for point in history])
        ax.set(ylabel=label)
        ax.grid(alpha=0.3)
    axes[-1].set(xlabel="step")
    fig.savefig(LOGS / "week_10_hacking.png", dpi=90)
    plt.close(fig)


def not_whitened(x, mask):
    """v9's whiten, but x stays as it is."""
    return x * mask


def unclipped_value_loss(new, old, returns, mask, clip_range):
    """v9's value_loss, but a value may move as far as it will."""
    return value_loss(new, old, returns, mask, math.inf)


DETAILS = {
    "no KL in the reward": (None, dict(kl_coef=0.0)),
    "advantages not whitened": (dict(whiten=not_whitened), {}),
    "values not clipped": (dict(value_loss=unclipped_value_loss), {}),
}


def details():
    """PPO with one of its details switched off, three seeds each."""
    jobs = {f"{name}, {seed}": (r, f | dict(seed=seed)) for name, (r, f) in DETAILS.items() for seed in SEEDS}
    runs, results = compare("details", jobs), {}
    for name in DETAILS:
        found = [figures(runs[f"{name}, {seed}"]) for seed in SEEDS]
        results[name] = {key: spread(m[key] for m in found) for key in found[0]}
    return results


def read():
    """GRPO on v8's reading task, from a v8 that was stopped early: names right, greedy, three seeds."""
    halves = {
        f"week_10/read/v8_{seed}": ("v8_lora", None, dict(base=V6, seed=seed, max_steps=STOPPED[seed]))
        for seed in SEEDS
    }
    run_all(halves)
    jobs = {
        f"grpo_{seed}": (None, dict(method="grpo", task="read", seed=seed, base=folder_of(f"read/v8_{seed}")))
        for seed in SEEDS
    }
    runs = compare("read", jobs)
    results = {name: [] for name in ("before", "after", "kl", "seconds")}
    for seed in SEEDS:
        metrics = runs[f"grpo_{seed}"]
        results["before"].append(metrics["before"]["truth"])
        results["after"].append(metrics["truth"])
        results["kl"].append(metrics["kl"])
        results["seconds"].append(metrics["seconds"])
    return {name: spread(values) for name, values in results.items()} | {"v8_steps": STOPPED}


def times():
    """Each method alone, default settings, all cores: seconds of training; and of the reward model."""
    results = {"machine": machine()}
    runs = {"ppo": kept(RUNG, ROOT / "runs" / RUNG, {}, {}) or run_default(RUNG)}
    for method in METHODS[1:]:
        runs[method] = run(RUNG, f"week_10/times/{method}", base=BASE, method=method)
    for method, metrics in runs.items():
        results[method] = {name: metrics[name] for name in ("seconds", "preferred", "kl")}
    return results


def by_hand():
    """One pair of the default run's annotator, seen by three methods: the numbers of the log."""
    metrics = kept(RUNG, ROOT / "runs" / RUNG, {}, {}) or run_default(RUNG)
    config = v9.Config(**metrics["config"])
    start, _ = v9.load_checkpoint("train", {}, str(BASE))
    tokenizer = v9.make_tokenizer(start["vocab"])
    base = v9.LanguageModel(config, config.vocab_size).eval().requires_grad_(False)
    v9.load_weights(base, start["model"])
    policy = v9.LanguageModel(config, config.vocab_size).eval()
    after = torch.load(ROOT / "runs" / RUNG / "checkpoint.pt", map_location="cpu", weights_only=True)
    v9.load_weights(policy, after["model"])
    learning, held_out = v9.load_prompts(config, tokenizer)
    place = v9.judge_folder(config, v9.hash_of(start["model"]), learning)
    pairs, test = v9.load_pairs(base, learning, held_out, tokenizer, config, place)
    judge, _ = v9.load_judge(base, pairs, test, learning, tokenizer, config, place)
    prompt, chosen, rejected = next(
        pair for pair in test if 12 <= len(pair[1]) <= 20 and 12 <= len(pair[2]) <= 20
    )
    results = {"prompt": v9.to_text(prompt, tokenizer), "margin": 0.0}
    for name, reply, sign in (("chosen", chosen, 1), ("rejected", rejected, -1)):
        x, y = v9.encode_replies([prompt], [reply])
        text = v9.to_text(reply, tokenizer)
        numbers = {"text": text, "truth": v9.annotate(text)}
        numbers["reward"] = judge.reward(x, y).item()
        numbers["score"] = (numbers["reward"] - judge.mean.item()) / judge.std.item()
        for key, model in (("base", base), ("policy", policy)):
            numbers[key] = v9.log_probs(model(x), y, 1.0).sum().item()
        numbers["log_ratio"] = numbers["policy"] - numbers["base"]
        numbers["left"] = numbers["score"] - config.kl_coef * numbers["log_ratio"]
        results[name], results["margin"] = numbers, results["margin"] + sign * numbers["log_ratio"]
    mean = (results["chosen"]["score"] + results["rejected"]["score"]) / 2
    std = abs(results["chosen"]["score"] - results["rejected"]["score"]) / math.sqrt(2)
    results["group"] = {"mean": mean, "std": std}
    raw = results["chosen"]["reward"] - results["rejected"]["reward"]
    results["reward_wins"] = 1 / (1 + math.exp(-raw))
    results["dpo_loss"] = math.log1p(math.exp(-config.dpo_beta * results["margin"]))
    return results


def examples():
    """Replies of the default run, before and after, and what all of it was."""
    metrics = kept(RUNG, ROOT / "runs" / RUNG, {}, {}) or run_default(RUNG)
    sample = (ROOT / "runs" / RUNG / "sample.txt").read_text(encoding="utf-8")
    return figures(metrics) | {"before": figures(metrics["before"]), "sample": sample}


EXPERIMENTS = {
    "seeds": seeds,
    "frontier": frontier,
    "overoptimised": overoptimised,
    "details": details,
    "read": read,
    "times": times,
    "by_hand": by_hand,
    "examples": examples,
}


def mean_and_range(value, form):
    """The spread of three seeds: 0.87 (0.85 to 0.90)."""
    return f"{value['mean']:{form}} ({value['least']:{form}} to {value['most']:{form}})"


def row(name, m):
    """A row of a table of runs, each number the spread of three seeds."""
    numbers = [mean_and_range(m["preferred"], ".1%") if "preferred" in m else "-"]
    numbers += [mean_and_range(m["kl"], ".1f"), mean_and_range(m["truth"], ".3f")]
    numbers += [f"{m['length']['mean']:.1f}", f"{m['distinct_words']['mean']:,.0f}"]
    return [name, *numbers, f"{m['bits_per_char']['mean']:.2f}"]


HEADER = ["", "preferred", "KL, nats a reply", "truth", "words a reply", "different words", "bits/char"]


def methods_table(week):
    """The four methods beside v8's model."""
    before = row("v8", week["seeds"]["before"])
    before[1:3] = "-", "0"
    return table(HEADER, [before, *(row(NAMES[method], week["seeds"][method]) for method in METHODS)])


def details_table(week):
    """PPO and PPO without one of its details."""
    rows = [row("all of them", week["seeds"]["ppo"])]
    return table(HEADER, rows + [row(name, week["details"][name]) for name in DETAILS])


def frontier_table(week):
    """The points of the diagram."""
    rows = []
    for method, (flag, values) in FRONTIER.items():
        for value in values:
            m = week["frontier"][method][str(value)]
            numbers = [
                f"{m['preferred']:.1%}",
                f"{m['kl']:.1f}",
                f"{m['truth']:.3f}",
                f"{m['distinct_words']:,}",
            ]
            rows.append([NAMES[method].replace(" 16", " n"), f"`--{flag} {value}`", *numbers])
    return table(["method", "flag", "preferred", "KL", "truth", "different words"], rows)


def some_examples(sample, n=4):
    """The first replies of a sample.txt."""
    return "```\n" + "\n\n".join(sample.strip().split("\n\n")[:n]) + "\n```"


def tables(results):
    """The tables of logs/week_10.md."""
    week = results["week_10"]
    return {
        "week_10": {
            "methods": methods_table(week),
            "frontier": frontier_table(week),
            "details": details_table(week),
            "hacked": some_examples(week["overoptimised"]["sample"], 3),
            "examples": some_examples(week["examples"]["sample"]),
        }
    }


if __name__ == "__main__":
    run_experiments(10, EXPERIMENTS, tables)
