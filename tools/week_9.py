"""The experiments of week 9: python tools/week_9.py [experiment ...]

They begin with the model of v6's default run. What is compared has one thread a run, as many runs at a time
as there are cores; `times` and `examples` take the default run, with all cores.
"""

from functools import partial
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
from common import LOGS, ROOT, kept, machine, run, run_all, run_default, run_experiments, spread, table

import v8_lora as v8
from v8_lora import encode_chat, load_tasks  # the rung's own, also where stand-ins replace them

RUNG, SEEDS = "v8_lora", (1, 2, 3)
BASE = ROOT / "runs" / "v6_amp_ddp"
LORA = dict(method="lora")
FLAGS = {"full": dict(method="full"), "lora": LORA, "qlora": LORA | dict(method="qlora")}


def compare(week_folder, jobs):
    """Run {name: (stand-ins, flags)} on v6's model; return {name: metrics}."""
    jobs = {
        f"week_9/{week_folder}/{name}": (RUNG, replace, dict(base=BASE, seed=1) | flags)
        for name, (replace, flags) in jobs.items()
    }
    return {name.split("/")[-1]: metrics for name, metrics in run_all(jobs).items()}


def figures(metrics):
    """What is stored of a run."""
    names = (
        "names_right",
        "without_passage",
        "answers_ended",
        "val_loss",
        "reply_loss",
        "bits_per_char",
        "learned",
    )
    return {name: metrics[name] for name in (*names, "share_learned", "base_bytes", "base_share", "steps")}


def seeds():
    """The three methods with three seeds each: spreads of what they reach."""
    jobs = {f"{method}_{seed}": (None, FLAGS[method] | dict(seed=seed)) for method in FLAGS for seed in SEEDS}
    found, results = compare("seeds", jobs), {}
    for method in FLAGS:
        runs = [figures(found[f"{method}_{seed}"]) for seed in SEEDS]
        results[method] = {name: spread(run[name] for run in runs) for name in runs[0]}
        results[method]["history"] = found[f"{method}_1"]["history"]
    draw_loss(results)
    return results | {"before": found["full_1"]["before"]}


def draw_loss(results):
    """Write logs/week_9_loss.png."""
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for method in FLAGS:
        points = [(point["step"], point["val_loss"]) for point in results[method]["history"]]
        ax.plot(*zip(*points, strict=True), ".-", label=method)
    ax.set(xlabel="step", ylabel="held-out loss (nats per token of an answer)", xlim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(LOGS / "week_9_loss.png", dpi=90)
    plt.close(fig)


def whole_word_name(words, names, known, rng):
    """A name of one to three whole words of the plays, as v8's invent_name but for ends and joints."""
    name = " ".join(rng.choice(words) for _ in range(rng.randint(1, 3)))[:24].strip(" '-")
    name = name.upper() if rng.random() < 0.5 else name.title()
    return whole_word_name(words, names, known, rng) if name in {"", *known} else name


NAMES = {
    "none invented": (None, dict(renamed=0.0)),
    "three quarters, of whole words, LoRA": (dict(invent_name=whole_word_name), LORA),
}


def names():
    """What share of the names is invented, and how; one seed."""
    return {name: figures(metrics) for name, metrics in compare("names", NAMES).items()}


def learn_the_prompt_too(turns, tokenizer):
    """v8's encode_chat, but all tokens are learned."""
    ids, _ = encode_chat(turns, tokenizer)
    return ids, [True] * len(ids)


def learn_no_end(turns, tokenizer):
    """v8's encode_chat, but no answer ends with <|endoftext|>."""
    ids, learned = encode_chat(turns, tokenizer)
    end = tokenizer.special_tokens[v8.SPECIAL_TOKENS[0]]
    keep = [i for i, x in enumerate(ids) if x != end]
    return [ids[i] for i in keep], [learned[i] for i in keep]


def load_tasks_with(config, tokenizer, encode):
    """v8's load_tasks, but what is learned from is encoded otherwise; what is measured is not."""
    with patch.object(v8, "encode_chat", encode):
        stages = load_tasks(config, tokenizer)["stages"]
    return load_tasks(config, tokenizer) | {"stages": stages}


MISTAKES = {
    "loss on the prompt too": (dict(load_tasks=partial(load_tasks_with, encode=learn_the_prompt_too)), {}),
    "no end token": (dict(load_tasks=partial(load_tasks_with, encode=learn_no_end)), {}),
    "step size of pretraining": (None, dict(learning_rate=0.02)),
}


def mistakes():
    """Three mistakes, full fine-tuning, one seed."""
    return {name: figures(metrics) for name, metrics in compare("mistakes", MISTAKES).items()}


PASSAGES = {"full": (None, dict(n_passages=3)), "lora": (None, LORA | dict(n_passages=3))}
READER = dict(base=ROOT / "runs" / "v8_lora", n_passages=3)  # begun from the model that reads one passage
PASSAGES |= {"full, from the model of one passage": (None, READER)}
SLOWLY = READER | dict(learning_rate=0.001, max_steps=4500)
PASSAGES |= {"the same, a third of the step size, 4,500 steps": (None, SLOWLY)}


def passages():
    """Two other passages beside the right one; one seed."""
    return {name: figures(metrics) for name, metrics in compare("passages", PASSAGES).items()}


def times():
    """Each method alone, all cores, default settings: seconds of training, and the memory of the process."""
    results = {"machine": machine()}
    runs = {"full": kept(RUNG, ROOT / "runs" / RUNG, {}, {}) or run_default(RUNG)}
    for method in ("lora", "qlora"):
        runs[method] = run(RUNG, f"week_9/times/{method}", base=BASE, **FLAGS[method])
    for method, metrics in runs.items():
        results[method] = {name: metrics[name] for name in ("seconds", "peak_memory", "names_right")}
    return results


def rounding():
    """Bits per character of plain text of the base as QLoRA keeps it, and as it is."""
    base, config = v8.load_checkpoint("train", {}, BASE)
    config.method, vocab, results = "qlora", base["vocab"], {}
    checkpoint = {}
    for name, model in zip(
        ("in 4 bits", "as it is"), v8.make_model(base, checkpoint, config, "cpu"), strict=True
    ):
        tokenizer = v8.make_tokenizer(checkpoint["vocab"])
        val_ids = v8.load_val(config, vocab)
        loss = v8.evaluate(model, v8.windows(val_ids, config))
        results[name] = v8.bits_per_char(loss, val_ids, tokenizer)
    return results


def weights_of(folder):
    """The weights of a run's model."""
    return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["model"]


def update():
    """Singular values of what full fine-tuning added to each matrix, and of the matrices themselves."""
    before = weights_of(BASE)
    after = weights_of(ROOT / "runs" / "experiments" / "week_9" / "seeds" / "full_1")
    results, spectra = {}, {"the update": [], "the base": []}
    for name, weight in before.items():
        if name.startswith("blocks.") and weight.dim() == 2:
            added = torch.linalg.svdvals(after[name] - weight)
            own = torch.linalg.svdvals(weight)
            spectra["the update"].append(added / added[0])
            spectra["the base"].append(own / own[0])
            share = added.square().cumsum(0) / added.square().sum()
            results[name] = {f"share_of_{r}": share[r - 1].item() for r in (1, 8, 32)}
            results[name]["size"] = (added.square().sum().sqrt() / own.square().sum().sqrt()).item()
    draw_update(spectra)
    values = list(results.values())
    return {key: spread(value[key] for value in values) for key in values[0]}


def draw_update(spectra):
    """Write logs/week_9_update.png."""
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, curves in spectra.items():
        curves = torch.stack(curves)  # (matrices, 192)
        places = range(1, curves.shape[1] + 1)
        (line,) = ax.plot(places, curves.mean(dim=0), label=f"{label}, mean of 16 matrices")
        ax.fill_between(places, curves.amin(dim=0), curves.amax(dim=0), color=line.get_color(), alpha=0.2)
    ax.axvline(8, color="gray", linestyle="--", label="rank 8")
    ax.set(xlabel="place of the singular value", ylabel="its size, the largest is 1", ylim=(0, 1))
    ax.legend()
    fig.savefig(LOGS / "week_9_update.png", dpi=90)
    plt.close(fig)


def by_hand():
    """The small examples of the log: four weights in NF4, a LoRA of rank 1 for a matrix of 2 x 3."""
    weights = torch.tensor([0.31, -0.62, 0.05, 0.9])
    scale = weights.abs().max()
    values = torch.tensor(v8.NF4)
    codes = (weights[:, None] / scale - values).abs().argmin(dim=1)
    A, B = torch.tensor([[0.5, -1.0, 0.2]]), torch.tensor([[0.1], [0.3]])
    results = {"weights": weights, "divided": weights / scale, "codes": codes, "values": values[codes]}
    results |= {"back": values[codes] * scale, "A": A, "B": B, "update": 2 * B @ A}
    return {name: x.tolist() for name, x in results.items()}


def examples():
    """Some answers of the default run, before and after."""
    metrics = kept(RUNG, ROOT / "runs" / RUNG, {}, {}) or run_default(RUNG)
    sample = (ROOT / "runs" / RUNG / "sample.txt").read_text(encoding="utf-8")
    return {"sample": sample, "names_right": metrics["names_right"], "before": metrics["before"]}


EXPERIMENTS = {
    "seeds": seeds,
    "names": names,
    "mistakes": mistakes,
    "passages": passages,
    "update": update,
    "times": times,
    "rounding": rounding,
    "by_hand": by_hand,
    "examples": examples,
}


def percent(value):
    """A share, or the spread of one: 98.9% (97.2 to 100.0)."""
    if isinstance(value, dict):
        return f"{value['mean']:.1%} ({100 * value['least']:.1f} to {100 * value['most']:.1f})"
    return f"{value:.1%}"


def methods_table(week):
    """The three methods beside the base."""
    header = ["method", "numbers that learn", "names right", "bits/char of plain text", "loss of replies"]
    before = week["seeds"]["before"]
    row = ["before", "-", percent(before["names_right"]), f"{before['bits_per_char']:.2f}"]
    rows = [[*row, f"{before['reply_loss']:.2f}", "-", "-"]]
    for method in FLAGS:
        m = week["seeds"][method]
        learned = f"{m['learned']['mean']:,.0f} ({m['share_learned']['mean']:.1%})"
        row = [method, learned, percent(m["names_right"]), f"{m['bits_per_char']['mean']:.2f}"]
        size, seconds = m["base_bytes"]["mean"] / 1e6, week["times"][method]["seconds"]
        rows.append([*row, f"{m['reply_loss']['mean']:.2f}", f"{size:.2f}", f"{seconds:.0f}"])
    return table([*header, "base, MB", "seconds"], rows)


def small_table(first, results):
    """Names right and what plain text costs, a row for each of `results`."""
    rows = [[name, percent(m["names_right"]), f"{m['bits_per_char']:.2f}"] for name, m in results.items()]
    return table([first, "names right", "bits/char of plain text"], rows)


def mistakes_table(week):
    """Three mistakes beside the same run without."""
    names = ("names_right", "answers_ended", "bits_per_char", "reply_loss")
    right = {name: week["seeds"]["full"][name]["values"][0] for name in names}
    rows = []
    for name, m in ({"none of them": right} | week["mistakes"]).items():
        numbers = [percent(m["names_right"]), percent(m["answers_ended"])]
        rows.append([name, *numbers, f"{m['reply_loss']:.2f}", f"{m['bits_per_char']:.2f}"])
    return table(["mistake", "names right", "answers that end", "loss of replies", "bits/char"], rows)


def some_examples(sample):
    """Two questions and two replies of a run's sample.txt."""
    parts = sample.strip().split("\n\n<|")
    parts = [parts[0], *("<|" + part for part in parts[1:])]
    questions = [part for part in parts if part.startswith("<|context|>")]
    replies = [part for part in parts if part.startswith("<|user|>")]
    return "```\n" + "\n\n".join(questions[:2] + replies[:2]) + "\n```"


def tables(results):
    """The tables of logs/week_9.md."""
    week = results["week_9"]
    own = {
        f"three quarters, of words and ends, {method}": {
            name: week["seeds"][method][name]["values"][0] for name in ("names_right", "bits_per_char")
        }
        for method in ("full", "lora")
    }
    names = own | week["names"]
    return {
        "week_9": {
            "methods": methods_table(week),
            "names": small_table("names in the passages", names),
            "mistakes": mistakes_table(week),
            "passages": small_table("three passages", {name: week["passages"][name] for name in PASSAGES}),
            "examples": some_examples(week["examples"]["sample"]),
        }
    }


if __name__ == "__main__":
    run_experiments(9, EXPERIMENTS, tables)
