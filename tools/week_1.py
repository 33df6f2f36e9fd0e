"""The experiments of week 1: python tools/week_1.py [experiment ...]"""

import math
from collections import Counter
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import LOGS, ROOT, run_experiments, table

TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")
CHARS = sorted(set(TEXT))
IDS = np.array([CHARS.index(char) for char in TEXT])
TRAIN, VAL = np.split(IDS, [int(0.9 * len(IDS))])
V = len(CHARS)


def by_hand():
    """Softmax and cross-entropy of three logits."""
    logits = [2.0, 1.0, 0.0]
    powers = [math.exp(logit) for logit in logits]
    probs = [power / sum(powers) for power in powers]
    return {"powers": powers, "sum": sum(powers), "probs": probs, "losses": [-math.log(p) for p in probs]}


def vocabulary():
    """Sizes of three vocabularies on this text, and which pair BPE and WordPiece would merge first."""
    words = TEXT.split()
    counts = Counter(words)
    singles, pairs = Counter(), Counter()
    for word, n in counts.items():
        for char in word:
            singles[char] += n
        for pair in pairwise(word):
            pairs[pair] += n
    score = {pair: n / (singles[pair[0]] * singles[pair[1]]) for pair, n in pairs.items() if n >= 100}
    bpe = [["".join(pair), n] for pair, n in pairs.most_common(5)]
    wordpiece = sorted(score, key=score.get, reverse=True)[:5]
    train_words = set(TEXT[: len(TRAIN)].split())
    val_words = TEXT[len(TRAIN) :].split()
    return {
        "characters": [V, len(TEXT)],
        "words": [len(counts), len(words)],
        "val_words_never_seen": sum(word not in train_words for word in val_words) / len(val_words),
        "bpe": bpe,
        "wordpiece": [["".join(pair), pairs[pair]] for pair in wordpiece],
    }


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
    labels = [repr(char)[1:-1].replace(" ", "space") for char in CHARS]
    fig, ax = plt.subplots(figsize=(9, 8.4), layout="constrained")
    picture = ax.imshow(probs, cmap="Blues", vmin=0, vmax=0.6)
    ax.set_xticks(range(V), labels, fontsize=6, rotation=90)
    ax.set_yticks(range(V), labels, fontsize=6)
    ax.set(xlabel="next character", ylabel="current character")
    fig.colorbar(picture, label="probability", shrink=0.8)
    fig.savefig(LOGS / "week_1_table.png", dpi=80)
    return {"train_loss": -np.log(probs[TRAIN[:-1], TRAIN[1:]].astype(float)).mean()}


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
    rows.append(
        [
            "v0_bigram.py: 1 character before, learned",
            "4,225",
            f"{week['learned_table']['train_loss']:.4f}",
            v0,
            v0,
        ]
    )
    header = [
        "what the table knows",
        "cells",
        "train loss, as counted",
        "val loss, add 1",
        "val loss, add 0.01",
    ]
    pairs = [
        [b[0], f"{b[1]:,}", w[0], f"{w[1]:,}"]
        for b, w in zip(week["vocabulary"]["bpe"], week["vocabulary"]["wordpiece"], strict=True)
    ]
    return {
        "counted": table(header, rows),
        "pairs": table(["BPE: most frequent pair", "count", "WordPiece: count over product", "count"], pairs),
        "sample": f"```\n{rung['sample'].strip()}\n```",
    }


EXPERIMENTS = {
    "by_hand": by_hand,
    "vocabulary": vocabulary,
    "counted": counted,
    "learned_table": learned_table,
}

if __name__ == "__main__":
    run_experiments(1, EXPERIMENTS, tables)
