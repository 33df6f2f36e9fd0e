"""The experiments of week 1: python tools/week_1.py [experiment ...]"""

import ast
import math
from collections import Counter
from itertools import pairwise
from unittest.mock import Mock, patch

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from common import LOGS, ROOT, run_all, run_experiments, spread, table
from matplotlib.colors import PowerNorm

import v0_bigram
from bpe_tokenizer import SPLIT

TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")
CHARS = sorted(set(TEXT))
IDS = np.array([CHARS.index(char) for char in TEXT])
TRAIN, VAL = np.split(IDS, [int(0.9 * len(IDS))])
V = len(CHARS)
RATES = (1, 10, 30, 100, 300, 1000)

# What to read first in v0: how a line begins, and what happens there
PLACES = [
    ("class CharTokenizer", "text becomes ids, and ids become text"),
    ("def get_batch", "ids become questions and answers: inputs, and the same shifted by one"),
    ("class LanguageModel", "the model: ids go in, logits for the next character come out"),
    ("x, y = get_batch(train_ids, config)", "one step of learning, in five lines"),
    ("def generate", "the model writes: draw a character, append it, ask again"),
]


def places(file, marks):
    """A table of the lines of `file` that begin with the marks; how many lines the places hold together."""
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = text.splitlines()
    ends = {
        node.lineno: node.end_lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    rows, total = [], 0
    for mark, meaning in marks:
        (number,) = [i for i, line in enumerate(lines, start=1) if line.strip().startswith(mark)]
        end = ends.get(number) or lines.index("", number)  # statements: to the next empty line
        total += end - number + 1
        rows.append([f"[{file}:{number}](../{file}#L{number})", f"`{mark}`", meaning])
    # aligned left, other than `table` does it
    listing = "\n".join(
        f"| {' | '.join(row)} |" for row in [["line", "it begins", "what happens there"], ["---"] * 3, *rows]
    )
    return f"{listing}\n\nTogether {total} of the file's {len(lines)} lines."


def by_hand():
    """Softmax and cross-entropy of three logits; bits per character of knowing nothing of 65 characters."""
    logits = [2.0, 1.0, 0.0]
    powers = [math.exp(logit) for logit in logits]
    probs = [power / sum(powers) for power in powers]
    bits = {"ln_2": math.log(2), "bits_of_nothing": math.log2(65)}
    losses = [-math.log(p) for p in probs]
    return {"powers": powers, "sum": sum(powers), "probs": probs, "losses": losses, **bits}


def shapes():
    """What v0's get_batch cuts out of ten ids with T = 3, and how its evaluate lays them out with T = 4."""
    ids, starts = torch.arange(20, 30), torch.tensor([[2], [5]])
    with patch.object(torch, "randint", return_value=starts):
        inputs, targets = v0_bigram.get_batch(ids, v0_bigram.Config(block_size=3, batch_size=2))
    places = starts + torch.arange(4)
    model = Mock(return_value=torch.zeros(3, 4, V))
    with patch.object(F, "cross_entropy", return_value=torch.tensor(0.0)) as loss:
        v0_bigram.evaluate(model, ids, v0_bigram.Config(block_size=4))
    seen = {"x": model.call_args.args[0], "y": loss.call_args.args[1].view(-1, 4)}
    batch = {"starts": starts, "places": places, "batch": ids[places], "inputs": inputs, "targets": targets}
    return {"ids": ids.tolist()} | {name: tensor.tolist() for name, tensor in (batch | seen).items()}


def rates():
    """v0 with six learning rates, three seeds each; how often the commonest and a rare character occur."""
    jobs = {
        f"rate_{rate}_{seed}": ("v0_bigram", None, dict(learning_rate=rate, seed=seed))
        for rate in RATES
        for seed in (1, 2, 3)
    }
    metrics = run_all(jobs)
    losses = {
        rate: spread(metrics[f"rate_{rate}_{seed}"]["val_loss"] for seed in (1, 2, 3)) for rate in RATES
    }
    percent = {char: 100 * float((TRAIN == CHARS.index(char)).mean()) for char in " q"}
    return {"losses": losses, "percent": percent}


def log_likelihood(counts):
    """Log-likelihood in nats of a text whose pieces have these counts and are drawn independently."""
    total = sum(counts.values())
    return sum(n * math.log(n / total) for n in counts.values() if n)


def vocabulary():
    """Sizes of vocabularies on this text, and which pair of characters each of three rules merges first."""
    words = TEXT.split()
    counts = Counter(words)
    singles, pairs = Counter(), Counter()
    for word, n in counts.items():
        for char in word:
            singles[char] += n
        for pair in {a + b for a, b in pairwise(word)}:
            pairs[pair] += n * word.count(pair)  # as often as it can be merged: twice in "----"

    def gain(pair):
        merged, n = singles.copy(), pairs[pair]
        merged[pair[0]] -= n
        merged[pair[1]] -= n
        merged[pair] = n
        return log_likelihood(merged) - log_likelihood(singles)

    gains = {pair: gain(pair) for pair in pairs}
    score = {pair: n / (singles[pair[0]] * singles[pair[1]]) for pair, n in pairs.items()}
    frequent = {pair: score[pair] for pair, n in pairs.items() if n >= 100}
    rules = {"bpe": pairs, "wordpiece": gains, "count_over_product": frequent, "of_all_pairs": score}
    results = {}
    for name, rule in rules.items():
        best = sorted(rule, key=rule.get, reverse=True)[:5]
        # the last number: how many times as often as if characters were drawn independently
        results[name] = [[pair, pairs[pair], gains[pair], score[pair] * singles.total()] for pair in best]
    for name, split in (
        ("never_seen_split_at_spaces", str.split),
        ("never_seen_split_of_gpt2", SPLIT.findall),
    ):
        known, val_words = set(split(TEXT[: len(TRAIN)])), split(TEXT[len(TRAIN) :])
        results[name] = sum(word not in known for word in val_words) / len(val_words)
    return results | {"characters": [V, len(TEXT)], "words": [len(counts), len(words)]}


def counted():
    """Val loss of counted tables over the last n - 1 characters, add-one and add-0.01 smoothing."""
    results = {}
    for n in (1, 2, 3, 4):
        contexts = [np.zeros(len(part) - n + 1, dtype=np.int64) for part in (TRAIN, VAL)]
        for context, part in zip(contexts, (TRAIN, VAL), strict=True):
            for i in range(n - 1):
                context *= V
                context += part[i : len(part) - n + 1 + i]
        train_targets, val_targets = TRAIN[n - 1 :], VAL[n - 1 :]
        counts = np.zeros((V ** (n - 1), V))
        np.add.at(counts, (contexts[0], train_targets), 1)
        losses = {}
        for smoothing in (1, 0.01):
            probs = counts[contexts[1], val_targets] + smoothing
            losses[str(smoothing)] = -np.log(probs / (counts.sum(1)[contexts[1]] + smoothing * V)).mean()
        train_probs = counts[contexts[0], train_targets] / counts.sum(1)[contexts[0]]
        results[str(n)] = {"cells": V**n, "val": losses, "train_unsmoothed": -np.log(train_probs).mean()}
    results["nothing"] = math.log(V)
    return results


def learned_table():
    """Draw the table that v0_bigram.py has learned, as probabilities; return its loss on all of train."""
    weights = torch.load(ROOT / "runs/v0_bigram/checkpoint.pt", weights_only=True)["model"]["table.weight"]
    probs = weights.softmax(-1).numpy()
    shown = "\n ',." + "".join(char for char in CHARS if char.islower())
    ids = [CHARS.index(char) for char in shown]
    labels = [{"\n": "\\n", " ": "\u2423"}.get(char, char) for char in shown]
    fig, ax = plt.subplots(figsize=(8, 7.4), layout="constrained")
    norm = PowerNorm(0.5, vmin=0, vmax=1)  # the root of the probability, so that small ones show
    picture = ax.imshow(probs[np.ix_(ids, ids)], cmap="Blues", norm=norm)
    ax.set_xticks(range(len(ids)), labels, fontsize=12)
    ax.set_yticks(range(len(ids)), labels, fontsize=12)
    ax.tick_params(top=True, labeltop=True, length=0)
    ax.set_xlabel("next character", fontsize=12)
    ax.set_ylabel("current character", fontsize=12)
    bar = fig.colorbar(picture, shrink=0.9, ticks=[0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1])
    bar.ax.set_yticklabels(["0", "1%", "5%", "10%", "20%", "40%", "60%", "80%", "100%"], fontsize=11)
    bar.set_label("probability of the next character", fontsize=12)
    fig.savefig(LOGS / "week_1_table.png", dpi=100)
    pairs = np.zeros((V, V))
    np.add.at(pairs, (TRAIN[:-1], TRAIN[1:]), 1)
    shares = pairs.sum(1) / pairs.sum()
    behind = np.zeros(V)  # how far each row is from the counted one, in nats each time it is used
    for i, row in enumerate(pairs):
        seen = row > 0
        behind[i] = (row[seen] / row.sum() * np.log(row[seen] / row.sum() / probs[i, seen])).sum()
    common = shares >= 0.02
    return {
        "train_loss": -np.log(probs[TRAIN[:-1], TRAIN[1:]].astype(float)).mean(),
        "behind": (shares * behind).sum(),
        "row_behind": {char: behind[CHARS.index(char)] for char in "$ze"},
        "common_rows": {
            "characters": int(common.sum()),
            "share": shares[common].sum(),
            "behind": (shares * behind)[common].sum(),
        },
        "share_of_text_shown": float(np.isin(IDS, ids).mean()),
    }


def listing(rows):
    """Rows of three texts as a block of plain text in three columns."""
    name, value = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"{a:{name}}   {b:{value}}   {c}".rstrip() for a, b, c in rows]
    return "\n".join(["```", *lines, "```"])


def shape_blocks(shapes):
    """The two worked examples of shapes."""
    ids = ("ids", str(shapes["ids"]), "(N,)")
    batch = [
        ids,
        ("starts", str(shapes["starts"]), "(B, 1)"),
        ("torch.arange(T + 1)", str(list(range(4))), "(T + 1,)"),
        ("their sum", str(shapes["places"]), "(B, T + 1)"),
        ("ids at these places", str(shapes["batch"]), "(B, T + 1)"),
        ("inputs", str(shapes["inputs"]), "(B, T)"),
        ("targets", str(shapes["targets"]), "(B, T)"),
    ]
    windows = [ids, ("x", str(shapes["x"]), "(windows, T)"), ("y", str(shapes["y"]), "(windows, T)")]
    return {"shapes_batch": listing(batch), "shapes_windows": listing(windows)}


def tables(results):
    """The blocks of logs/week_1.md."""
    week, rung = results["week_1"], results["rungs"]["v0_bigram"]
    counted = week["counted"]
    rows = [["nothing", "0", "-", f"{counted['nothing']:.4f}", f"{counted['nothing']:.4f}"]]
    names = [
        "the frequencies of characters",
        "1 character before",
        "2 characters before",
        "3 characters before",
    ]
    for n, name in enumerate(names, start=1):
        row = counted[str(n)]
        losses = [f"{row['val'][smoothing]:.4f}" for smoothing in ("1", "0.01")]
        rows.append([name, f"{row['cells']:,}", f"{row['train_unsmoothed']:.4f}", *losses])
    v0 = f"{rung['val_loss']:.4f}"
    train_loss = f"{week['learned_table']['train_loss']:.4f}"
    rows.append(["v0_bigram.py: 1 character before, learned", "4,225", train_loss, v0, v0])
    counted_header = [
        "what the table knows",
        "cells",
        "train loss, as counted",
        "val loss, add 1",
        "val loss, add 0.01",
    ]
    pairs_header = [
        "BPE: largest count",
        "WordPiece, 2012: largest gain",
        "common stand-in: count over product",
    ]
    rules = [week["vocabulary"][rule] for rule in ("bpe", "wordpiece", "count_over_product")]
    pairs = [
        [f"`{pair}` {n:,}, gain {gain:,.0f}" for pair, n, gain, _ in row] for row in zip(*rules, strict=True)
    ]
    rate_rows = [
        [rate, *(f"{loss[key]:.4f}" for key in ("mean", "least", "most"))]
        for rate, loss in sorted(week["rates"]["losses"].items(), key=lambda item: int(item[0]))
    ]
    blocks = {
        "places": places("v0_bigram.py", PLACES),
        "counted": table(counted_header, rows),
        "pairs": table(pairs_header, pairs),
        "rates": table(["learning rate", "val loss, mean of 3 seeds", "least", "most"], rate_rows),
        "sample": f"```\n{rung['sample'].strip()}\n```",
    }
    return {"week_1": blocks | shape_blocks(week["shapes"])}


EXPERIMENTS = {
    "by_hand": by_hand,
    "shapes": shapes,
    "vocabulary": vocabulary,
    "rates": rates,
    "counted": counted,
    "learned_table": learned_table,
}

if __name__ == "__main__":
    run_experiments(1, EXPERIMENTS, tables)
