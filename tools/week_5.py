"""The experiments of week 5: python tools/week_5.py [experiment ...]"""

import hashlib
import math
import os
import statistics
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import LOGS, ROOT, run, run_all, run_experiments, spread, table
from week_4 import SEEDS, race_table, seeds

import bpe_tokenizer
import v4_rope_alibi as v4
from bpe_tokenizer import SPLIT, BPETokenizer, learn_merges

TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")
TRAIN, VAL = TEXT[: int(0.9 * len(TEXT))], TEXT[int(0.9 * len(TEXT)) :]
SPLITS = {"train": TRAIN, "val": VAL}
SIZES = [256, 512, 1024, 2048, 4096, 8192]
FOLDER = ROOT / "runs" / "experiments"
TIMES = (1, 2, 4, 8)  # lengths of the windows in which position schemes are tested, in block_size

# How v4's defaults were found, in the order of the trials, from v3's recipe on; the last is the longer run.
RECIPE_COLUMNS = "blocks x width,heads,batch x block,rate,floor,std,beta2,dropout,decay,steps,train,val"
V3 = dict(n_head=4, init_std=0.02, lr_floor=0.1, beta2=0.95, learning_rate=0.006, max_steps=2400)
FLAT = V3 | dict(n_head=8, init_std=0.06, lr_floor=0, learning_rate=0.008, max_steps=2250)
RECIPES = [
    V3 | dict(block_size=64, batch_size=32),
    V3,
    V3 | dict(block_size=256, batch_size=8, max_steps=2200),
    V3 | dict(block_size=256, batch_size=4, max_steps=4400, learning_rate=0.004),
    V3 | dict(learning_rate=0.003),
    V3 | dict(learning_rate=0.008, lr_floor=0.01),
    V3 | dict(n_layer=3, max_steps=3200),
    V3 | dict(position_base=300, lr_floor=0.01),
    V3 | dict(weight_decay=1),
    V3 | dict(n_head=8, learning_rate=0.01, max_steps=2600),
    V3 | dict(n_head=8, learning_rate=0.008, lr_floor=0.01, max_steps=2600),
    V3 | dict(n_head=8, learning_rate=0.008, lr_floor=0.01, max_steps=2600, init_std=0.06),
    FLAT,
    FLAT | dict(beta2=0.98),
    FLAT | dict(beta2=0.99),
    FLAT | dict(beta2=0.99, learning_rate=0.005),
    FLAT | dict(beta2=0.98, learning_rate=0.004),
    FLAT | dict(beta2=0.99, learning_rate=0.005, init_std=0.1),
    FLAT | dict(beta2=0.99, learning_rate=0.004, init_std=0.1),
    dict(n_embd=192, block_size=256, batch_size=8, dropout=0.1, learning_rate=0.003, init_std=0.08)
    | dict(max_steps=8500, eval_interval=850),
]

# For each rung the flags of a run and its neighbours, what they change: does the recipe win elsewhere too?
NEIGHBOURS = {
    "v1_mlp": (
        dict(max_steps=800, eval_interval=400),
        {"chosen": {}} | {f"rate {rate}": dict(learning_rate=rate) for rate in (0.0035, 0.007)},
    ),
    "v4_rope_alibi": (
        dict(position="rope", max_steps=550, eval_interval=275),
        {"chosen": {}}
        | {f"rate {rate}": dict(learning_rate=rate) for rate in (0.0028, 0.0056)}
        | {"std 0.14": dict(init_std=0.14)},
    ),
}

# ------------------------------------------ the tokenizer ------------------------------------------


def tokenizers():
    """Vocabularies of all SIZES, learned from the training split; each begins with the one before."""
    merges = list(islice(learn_merges(TRAIN), max(SIZES) - 256))
    return {size: BPETokenizer(merges[: size - 256]) for size in SIZES}


def with_bars(tokenizer, text):
    """The pieces of a text with a bar between two; bytes that are only a part of a character like \\xc3."""
    return "|".join(tokenizer.vocab[i].decode(errors="backslashreplace") for i in tokenizer.encode(text))


def count_pairs(tokenizer, text):
    """How often each pair of neighbours occurs inside the words of a text, in the order of the text."""
    counts = Counter()
    for word, n in Counter(SPLIT.findall(text)).items():
        for x, y in pairwise(tokenizer.encode(word)):
            counts[f"{tokenizer.names[x]} {tokenizer.names[y]}"] += n
    return counts


def by_hand():
    """All merges of a text of 30 characters: the count of each, the pairs that share it, and the text."""
    text, rows = "low low low lower lowest newer", []
    merges = list(learn_merges(text))
    for n in range(len(merges) + 1):
        tokenizer = BPETokenizer(merges[:n])
        ids = tokenizer.encode(text)
        rows.append({"ids": len(ids), "text": " ".join(tokenizer.names[i] for i in ids)})
        if n < len(merges):
            counts = count_pairs(tokenizer, text)
            best = counts[merges[n]]
            equals = [pair for pair in counts if counts[pair] == best]
            rows[-1] |= {"merge": merges[n], "count": best, "equals": equals}
    return rows


def first_merges():
    """The first 20 merges of the training split, and what becomes of the pairs that are frequent at first."""
    merges = list(islice(learn_merges(TRAIN), max(SIZES) - 256))
    ids = [len(BPETokenizer(merges[:n]).encode(TRAIN)) for n in range(21)]
    counts = [count_pairs(BPETokenizer(merges[:n]), TRAIN) for n in range(3)]
    return {
        "merges": [
            [merge, before - after] for merge, (before, after) in zip(merges, pairwise(ids), strict=False)
        ],
        "pairs": [[pair, count, merges.index(pair) + 1] for pair, count in counts[0].most_common(3)],
        "th_left": [count["t h"] for count in counts],
        "longest": max(BPETokenizer(merges).names, key=len),
    }


def lengths():
    """Ids and characters per id for both splits, and how often the learned pieces occur; draw them."""
    rows = {"characters": {split: len(text) for split, text in SPLITS.items()}}
    for size, tokenizer in tokenizers().items():
        ids = {split: tokenizer.encode(text) for split, text in SPLITS.items()}
        counts = Counter(ids["train"])
        learned = {tokenizer.names[i]: counts[i] for i in range(256, size)}
        rows[str(size)] = {split: len(ids[split]) for split in SPLITS} | {
            "embedding": 128 * size,
            "median_count": statistics.median(learned.values()) if learned else 0,
            "rare": sum(count < 100 for count in learned.values()),
            "never": sum(count == 0 for count in learned.values()),
            "never_examples": [name for name, count in learned.items() if count == 0][:10],
        }
    for row in rows.values():
        row |= {f"{split}_ratio": len(text) / row[split] for split, text in SPLITS.items()}
        row["gap"] = 1 - row["val_ratio"] / row["train_ratio"]
    for small, large in pairwise(SIZES):
        rows[str(large)]["shorter"] = 1 - rows[str(large)]["train"] / rows[str(small)]["train"]

    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for split, style in ("train", "o-"), ("val", "s--"):
        left.plot(SIZES, [rows[str(size)][f"{split}_ratio"] for size in SIZES], style, label=split)
    left.axhline(1, color="gray", linestyle=":", label="characters")
    left.set(ylabel="characters per id", ylim=(0, 4))
    left.legend()
    right.plot(SIZES[1:], [rows[str(size)]["median_count"] for size in SIZES[1:]], "o-")
    right.set(ylabel="occurrences in train (median)", yscale="log", title="how often a learned piece is seen")
    right.set_yticks([5, 10, 50, 100, 500, 1000], ["5", "10", "50", "100", "500", "1,000"])
    left.set(title="how long a piece is")
    for ax in (left, right):
        ax.set(xlabel="vocabulary (ids)", xscale="log")
        ax.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    fig.savefig(LOGS / "week_5_lengths.png", dpi=90)
    return rows


def examples():
    """Some texts, and for two vocabularies the number of their ids and the pieces."""
    texts = [
        "First Citizen: Before we proceed any further, hear me speak.",
        "Romeo, romeo, ROMEO",
        "The tokenizer splits unbelievably long words.",
        "Roméo 🙂",
    ]
    ours = tokenizers()
    show = {
        size: lambda text, t=ours[size]: [len(t.encode(text)), with_bars(t, text)] for size in (512, 8192)
    }
    return [{"text": text, "512": show[512](text), "8192": show[8192](text)} for text in texts]


def unknown():
    """How much of the validation split words, characters and bytes from the training split cannot write."""
    results = {}
    for name, split in (
        ("words", SPLIT.findall),
        ("between spaces", str.split),
        ("characters", list),
        ("bytes", str.encode),
    ):
        train, val = set(split(TRAIN)), split(VAL)
        results[name] = {"known": len(train), "val": len(val), "unknown": sum(x not in train for x in val)}
        results[name]["share"] = results[name]["unknown"] / len(val)
    words = SPLIT.findall(TEXT)
    return results | {"words_in_all": len(words), "different_words": len(set(words))}


def counted_bits(train, val, size):
    """Bits per character on val of a model that knows only how often each of `size` ids occurs in train."""
    counts, total = Counter(train), len(train) + size  # add-one smoothing
    return -sum(math.log2((counts[x] + 1) / total) for x in val) / len(VAL)


def bits():
    """Bits per character on val of counted pieces, one by one, and of counted characters and their pairs."""
    n_chars = len(set(TEXT))
    results = {"characters": counted_bits(TRAIN, VAL, n_chars)}
    for size, tokenizer in tokenizers().items():
        results[str(size)] = counted_bits(tokenizer.encode(TRAIN), tokenizer.encode(VAL), size)
    pairs, firsts = Counter(pairwise(TRAIN)), Counter(TRAIN[:-1])
    logs = [math.log2((pairs[pair] + 1) / (firsts[pair[0]] + n_chars)) for pair in pairwise(VAL)]
    results["pairs of characters"] = -sum(logs) / len(logs)
    return results


def fewest(vocab, word):
    """The least number of pieces from `vocab`, a set, that give `word` (bytes) when put in a row."""
    best = [0]  # for the first 0, 1, 2 ... bytes
    for end in range(1, len(word) + 1):
        best.append(min(best[start] + 1 for start in range(end) if word[start:end] in vocab))
    return best[-1]


def fewest_pieces():
    """Ids of the training split by merges in their order, and with the fewest pieces of the vocabulary."""
    words, results = Counter(SPLIT.findall(TRAIN)), {}
    for size, tokenizer in tokenizers().items():
        vocab = set(tokenizer.vocab)
        merged = {word: len(tokenizer.encode(word)) for word in words}
        least = {word: fewest(vocab, word.encode()) for word in words}
        n_merged, n_least = (sum(words[word] * n for word, n in ids.items()) for ids in (merged, least))
        results[str(size)] = {"merged": n_merged, "least": n_least, "saved": 1 - n_least / n_merged}
        longer = [word for word in words if merged[word] > least[word]]
        if longer:
            word = max(longer, key=words.get)
            results[str(size)]["example"] = [with_bars(tokenizer, word), least[word], words[word]]
    return results


def without_split():
    """8192 ids learned with and without the split into words."""
    results = {}
    for name, pattern in (("with", SPLIT), ("without", regex.compile(r"(?s).+"))):
        with patch.object(bpe_tokenizer, "SPLIT", pattern):
            tokenizer = BPETokenizer.train(TRAIN, 8192)
            train, val = tokenizer.encode(TRAIN), tokenizer.encode(VAL)
        across = [piece.decode() for piece in tokenizer.vocab[256:] if len(SPLIT.findall(piece.decode())) > 1]
        results[name] = {
            "train_ratio": len(TRAIN) / len(train),
            "val_ratio": len(VAL) / len(val),
            "val": len(val),
            "bits": counted_bits(train, val, 8192),
            "across": len(across),
            "examples": across[:12],
            "with_speak": [name for name in tokenizer.names if "speak" in name],
            "longest": max(tokenizer.vocab, key=len).decode(),
        }
    results["fewer"] = 1 - results["without"]["val"] / results["with"]["val"]
    return results


def unicode_editions():
    """Characters that tiktoken does not take for what we take them for, a letter or a number or neither."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    different = []
    for start in range(0, 0x110000, 0x10000):
        chars = [chr(code) for code in range(start, start + 0x10000) if not 0xD800 <= code < 0xE000]
        ranks = {bytes([byte]): byte for byte in range(256)}
        for pair in [first + char for char in chars for first in "a1"]:  # one id if nothing splits the pair
            ranks.setdefault(pair.encode(), len(ranks))
        theirs = tiktoken.Encoding("pairs", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
        for char in chars:
            pairs = ["a" + char, "1" + char]
            if [len(SPLIT.findall(p)) for p in pairs] != [
                min(2, len(theirs.encode_ordinary(p))) for p in pairs
            ]:
                different.append(char)
    assigned = sum(unicodedata.category(char) != "Cn" for char in different)
    return {
        "different": len(different),
        "first": f"U+{ord(different[0]):04X}",
        "assigned": assigned,
        "python": unicodedata.unidata_version,
        "tiktoken": tiktoken.__version__,
        "regex": regex.__version__,
    }


# -------------------------------------------- positions --------------------------------------------


def turned_by_hand():
    """RoPE of one pair of numbers, q = (1, 0) and k = (0, 1) at some places; ALiBi of 4 heads, 4 tokens.

    Also how many tokens the slowest angle of a head and of the sines needs for one radian, the base that
    grows with the window, and the val loss before training of two initial spreads.
    """
    config = v4.Config(n_embd=2, n_head=1)
    rotation = v4.rope_rotation(110, config, "cpu")
    q, k = (v4.apply_rope(torch.eye(2)[i].expand(1, 1, 110, 2), rotation)[0, 0] for i in (0, 1))
    places = ((5, 3), (105, 103), (5, 4))
    bias = v4.alibi_bias(4, v4.Config(n_head=4), "cpu")[0, :, 3]  # (n_head, T): the last place
    first_losses = {}
    for std in (0.02, 0.1):
        config = v4.Config(data=str(ROOT / "input.txt"), init_std=std)
        torch.manual_seed(1)
        model, (_, val_ids) = new_model(config), splits(config)
        first_losses[str(std)] = v4.evaluate(model, val_ids, config, config.eval_tokens)
    return {
        "q5": q[5].tolist(),
        "k3": k[3].tolist(),
        "scores": {f"{i} {j}": (q[i] @ k[j]).item() for i, j in places},
        "alibi": {"bias": bias.tolist(), "weights": bias.softmax(-1).tolist()},
        "slowest": {str(D): 1 / v4.position_angles(2, D, config, "cpu")[1, -1].item() for D in (16, 128)},
        "bases": {str(n): raised_base(config, n) for n in (2, 4)},
        "first_losses": first_losses,
    }


def short_run(position="rope", **flags):
    """A quarter of a default run of v4, for run_all."""
    return "v4_rope_alibi", None, dict(position=position, max_steps=550, eval_interval=275) | flags


def short_runs(position):
    """The short runs of a scheme by name, so that experiments share them; three seeds where we rank."""
    seeds = SEEDS if position in ("learned", "rope", "alibi") else SEEDS[:1]
    return {f"{position}_{seed}": short_run(position, seed=seed) for seed in seeds}


def splits(config):
    """The ids of characters to train on and for validation."""
    return v4.load_splits(config, v4.CharTokenizer("".join(sorted(set(TEXT)))), "cpu")


def new_model(config):
    """A model of characters."""
    return v4.LanguageModel(config, len(set(TEXT)))


def longer(run_name, n, **changes):
    """The model of a run, to be used in windows n times as long: the model and its Config."""
    saved = torch.load(FOLDER / run_name / "checkpoint.pt", weights_only=True)
    config = v4.Config(**saved["config"] | {"data": str(ROOT / "input.txt")})
    rows = max(1, config.batch_size // n)
    config = replace(config, block_size=n * config.block_size, batch_size=rows, **changes)
    model = new_model(config)
    model.load_state_dict(saved["model"])
    return model, config


@torch.inference_mode()
def window_losses(model, config):
    """Val loss in consecutive windows of block_size: mean over all places, and over the last quarter."""
    T, (_, ids) = config.block_size, splits(config)
    padding = -(len(ids) - 1) % T  # fills up the last window
    x = F.pad(ids[:-1], (0, padding)).view(-1, T)
    y = F.pad(ids[1:], (0, padding), value=-100).view(-1, T)  # cross_entropy gives -100 a loss of 0
    model.eval()
    rows = zip(x.split(config.batch_size), y.split(config.batch_size), strict=True)
    losses = [F.cross_entropy(model(xb).transpose(1, 2), yb, reduction="none") for xb, yb in rows]
    losses, counted = torch.cat(losses), y != -100  # both (windows, T)
    model.train()
    return [(losses[:, t:].sum() / counted[:, t:].sum()).item() for t in (0, 3 * T // 4)]


def measured(runs):
    """Train the runs of each position scheme; return their losses, and those in longer windows."""
    metrics = run_all({name: job for jobs in runs.values() for name, job in jobs.items()})
    results = {"runs": {}, "windows": {}}
    for position, names in runs.items():
        row = {key: spread(metrics[name][key] for name in names) for key in ("train_loss", "val_loss")}
        results["runs"][position] = row | {"params": metrics[next(iter(names))]["params"]}
        ways = {position: lambda n: {}}
        if position == "rope":
            ways["rope, interpolated"] = lambda n: {"position_scale": float(n)}
        for way, changes in ways.items():
            results["windows"][way] = {}
            for n in [1] if position == "learned" else TIMES:
                losses = [window_losses(*longer(name, n, **changes(n))) for name in names]
                whole, last = zip(*losses, strict=True)
                results["windows"][way][str(128 * n)] = {"whole": spread(whole), "last": spread(last)}
            print(f"  {way}: tested", flush=True)
    return results


def compare():
    """All position schemes trained alike for a quarter of v4's steps and tested in windows; the picture."""
    results = measured({position: short_runs(position) for position in v4.POSITIONS})
    plot_windows(results["windows"])
    return results


def full_run(position):
    """A default run of v4 with another scheme, for run_all."""
    return {f"full_{position}": ("v4_rope_alibi", None, {"position": position})}


def compare_full():
    """The same with all of v4's steps, one seed: half an hour."""
    return measured({position: full_run(position) for position in v4.POSITIONS})


def plot_windows(windows):
    """Draw week_5_positions.png: the loss of each scheme over the length of the window, each seed thin."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    lengths = [128 * n for n in TIMES]
    for part, ax in zip(("whole", "last"), axes, strict=True):
        for color, (way, row) in enumerate(windows.items()):
            T = sorted(map(int, row))
            style = dict(color=f"C{color}", linestyle="--" if "," in way else "-", zorder=2)
            for i in range(len(row["128"][part]["values"])):
                ax.plot(T, [row[str(t)][part]["values"][i] for t in T], lw=0.7, alpha=0.5, **style)
            means = [row[str(t)][part]["mean"] for t in T]
            if way == "learned":  # one length only: it has no vector for place 129
                ax.plot(T, means, "*", ms=18, mfc="none", mec="C0", mew=2, label="learned: 128 only")
            else:
                ax.plot(T, means, "o", lw=2, ls=style.pop("linestyle"), label=way, **style)
        ax.set(xscale="log", xlabel="window (characters)", xlim=(112, 1170))
        ax.set_xticks(lengths, map(str, lengths))
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set(title="mean over the whole window", ylabel="val loss (nats per character)")
    axes[1].set(title="mean over its last quarter")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    fig.savefig(LOGS / "week_5_positions.png", dpi=90)


def raised_base(config, n):
    """The base for n times the window by the rule of bloc97 (2023), "NTK-aware scaled RoPE", a forum post.

    base * n^(D / (D - 2)) with heads of D: the fastest angle stays, the slowest is divided by n.
    """
    D = config.n_embd // config.n_head
    return config.position_base * n ** (D / (D - 2))


def interpolation():
    """The RoPE model of `compare_full` in longer windows: as it is, positions divided, base raised.

    Each before and after 200 more steps in these windows.
    """
    run_all(full_run("rope"))
    results = {}
    for n in (2, 4):
        ways = {
            "as it is": {},
            "positions divided": {"position_scale": float(n)},
            "base raised": {"position_base": raised_base(v4.Config(), n)},
        }
        for way, changes in ways.items():
            out_dir = FOLDER / f"interpolation_{n}_{way}"
            out_dir.mkdir(parents=True, exist_ok=True)
            changes |= dict(max_steps=200, learning_rate=0.001, warmup_steps=20, eval_interval=200)
            model, config = longer("full_rope", n, out_dir=str(out_dir), **changes)
            before = window_losses(model, config)
            v4.train(model, *splits(config), config, {"step": 0, "seconds": 0.0, "history": []})
            results[f"{n} {way}"] = {"before": before, "after": window_losses(model, config)}
    return results


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019): LayerNorm without the mean and without the bias."""

    def __init__(self, n_embd):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x):
        """(B, T, C) to (B, T, C): x / sqrt(mean of x^2 + 0.00001) * weight."""
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5) * self.weight


class WithRMSNorm(v4.LanguageModel):
    """v4's model with RMSNorm in place of every LayerNorm."""

    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size)
        for part in list(self.modules()):
            for name, child in part.named_children():
                if isinstance(child, nn.LayerNorm):
                    setattr(part, name, RMSNorm(config.n_embd))


def norms():
    """LayerNorm and RMSNorm, 600 steps, one seed: val loss and seconds."""
    models = {"LayerNorm": {}, "RMSNorm": {"LanguageModel": WithRMSNorm}}
    runs = {norm: run("v4_rope_alibi", norm, replace, max_steps=600) for norm, replace in models.items()}
    keys = ("params", "val_loss", "seconds", "machine")
    return {norm: {key: m[key] for key in keys} for norm, m in runs.items()}


def kind_of(token):
    """The kind of a token by its first character that is no space, for its colour in a picture."""
    first = token.strip()[:1]
    if not first.isalpha():
        return "digit" if first.isdigit() else "punctuation, space"
    return "capital" if first.isupper() else "vowel" if first in "aeiou" else "consonant"


def plot_embeddings(model, tokenizer, ids, path):
    """Draw the 100 most frequent tokens of `ids` (N,) in the two principal components of their embeddings."""
    ids, counts = ids.unique(return_counts=True)
    ids = ids[counts.argsort(descending=True)[:100]]
    tokens = [tokenizer.decode([i]) for i in ids.tolist()]
    vectors = model.token_embedding.weight.detach()[ids]  # (100, C)
    _, _, axes = torch.linalg.svd(vectors - vectors.mean(dim=0))
    points = (vectors @ axes[:2].T).numpy()
    fig, ax = plt.subplots(figsize=(9, 6), layout="constrained")
    for color, kind in enumerate(("vowel", "consonant", "capital", "digit", "punctuation, space")):
        members = [i for i, token in enumerate(tokens) if kind_of(token) == kind]
        ax.scatter(*points[members].T, 200, f"C{color}", alpha=0.15, label=kind)
        for i in members:
            label = repr(tokens[i])[1:-1].replace(" ", "\u2423")
            ax.text(*points[i], label, color=f"C{color}", ha="center", va="center", parse_math=False)
    ax.set(xlabel="first principal component", ylabel="second principal component")
    fig.legend(title="first character", loc="outside right upper")
    fig.savefig(path, dpi=90)


def runs_of_vocabulary(tokenizer, size, steps, seeds, **flags):
    """Jobs for a model of `size` ids with as many multiplications as one of characters has in `steps` steps.

    A token costs about 6 floating-point operations for each weight of a matrix, the token embedding apart.
    """
    defaults = v4.Config()
    inner = 12 * defaults.n_layer * defaults.n_embd**2
    cost = (inner + size * defaults.n_embd) / (inner + 65 * defaults.n_embd)
    path = FOLDER / f"bpe_{size}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    flags |= {"tokenizer": path, "max_steps": round(steps / cost)}
    return {f"vocabulary_{size}_{steps}_{seed}": short_run(seed=seed, **flags) for seed in seeds}


def measured_vocabularies(jobs, all_tokenizers):
    """Run the jobs of each size; return bits per character and the characters that were read in training."""
    metrics, results = run_all({name: job for runs in jobs.values() for name, job in runs.items()}), {}
    for size, names in jobs.items():
        runs = [metrics[name] for name in names]
        results[str(size)] = {key: runs[0][key] for key in ("params", "steps", "tokens")}
        per_token = len(TRAIN) / len(all_tokenizers[size].encode(TRAIN)) if size > 65 else 1.0
        results[str(size)]["characters"] = runs[0]["tokens"] * per_token
        for key in ("val_loss", "bits_per_char"):
            results[str(size)][key] = spread(m[key] for m in runs)
    return results


def vocabularies():
    """Characters and BPE, with the multiplications of a quarter of a default run; draw the embeddings.

    Three seeds for characters and 2,048 ids, one for 1,024.
    """
    all_tokenizers, jobs = tokenizers(), {65: short_runs("rope")}
    for size, some in ((1024, SEEDS[:1]), (2048, SEEDS)):
        jobs[size] = runs_of_vocabulary(all_tokenizers[size], size, 550, some)
    results = measured_vocabularies(jobs, all_tokenizers)
    for size in (65, 1024):
        saved = torch.load(FOLDER / next(iter(jobs[size])) / "checkpoint.pt", weights_only=True)
        tokenizer = v4.CharTokenizer(saved["vocab"]) if size == 65 else all_tokenizers[size]
        model = v4.LanguageModel(v4.Config(**saved["config"]), size)
        model.load_state_dict(saved["model"])
        ids = torch.tensor(tokenizer.encode(TRAIN))
        plot_embeddings(model, tokenizer, ids, LOGS / f"week_5_embeddings_{size}.png")
    return results


def vocabularies_half():
    """Characters and three sizes of BPE with the multiplications of half a default run, one seed."""
    all_tokenizers = tokenizers()
    jobs = {65: {"vocabulary_65_1100": short_run(max_steps=1100)}}
    for size in (512, 1024, 2048):
        jobs[size] = runs_of_vocabulary(all_tokenizers[size], size, 1100, [1337])
    return measured_vocabularies(jobs, all_tokenizers)


def recipes():
    """All RECIPES, two hours."""
    results = []
    for number, flags in enumerate(RECIPES):
        metrics = run("v4_rope_alibi", f"recipe_{number}", **flags)
        keys = ("params", "steps", "tokens", "seconds", "threads", "train_loss", "val_loss")
        config = {name: x for name, x in metrics["config"].items() if name not in ("data", "out_dir")}
        results.append({key: metrics[key] for key in keys} | {"config": config})
    return results


def elsewhere():
    """The recipes of v1 and v4 and their NEIGHBOURS, on our text and on one that no choice has seen.

    That is WikiText-2's test file, which is no part of this project; its first 1,115,394 characters are
    used, as many as input.txt has. ELSEWHERE=wiki.test.tokens python tools/week_5.py elsewhere
    """
    if "ELSEWHERE" not in os.environ:
        sys.exit("error: ELSEWHERE=PATH must lead to wiki.test.tokens of WikiText-2")
    file = Path(os.environ["ELSEWHERE"])
    if not file.is_file():
        sys.exit(f"error: ELSEWHERE={file} is no file; it must lead to wiki.test.tokens of WikiText-2")
    FOLDER.mkdir(parents=True, exist_ok=True)
    other = FOLDER / "elsewhere.txt"
    other.write_text(file.read_text(encoding="utf-8")[: len(TEXT)], encoding="utf-8", newline="\n")
    names, jobs = {}, {}
    for rung, (flags, changes) in NEIGHBOURS.items():
        for label, change in changes.items():
            for where, data in (("here", {}), ("there", {"data": other})):
                name = f"{where}_{rung}_{label}"
                names[rung, label, where] = name = "rope_1" if name == "here_v4_rope_alibi_chosen" else name
                jobs[name] = rung, None, {"seed": 1} | flags | change | data
    metrics = run_all(jobs)
    results = {rung: {label: {} for label in changes} for rung, (_, changes) in NEIGHBOURS.items()}
    for (rung, label, where), name in names.items():
        results[rung][label][where] = metrics[name]["val_loss"]
    text = other.read_text(encoding="utf-8")
    facts = {"characters": len(text), "different": len(set(text))}
    return results | facts | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


# --------------------------------------------- the log ---------------------------------------------


def tables(results):
    """The blocks of logs/week_5.md and logs/week_5_positions.md."""
    week = results["week_5"]
    hand = [["-", "-", "-", week["by_hand"][0]["ids"], f"`{week['by_hand'][0]['text']}`"]]
    for before, after in pairwise(week["by_hand"]):
        cells = [before["count"], len(before["equals"]), after["ids"]]
        hand.append([f"`{before['merge']}`", *cells, f"`{after['text']}`"])

    first = [f"`{merge}` {count:,}" for merge, count in week["first_merges"]["merges"]]
    merges = [[f"{n + 1} to {n + 5}", *first[n : n + 5]] for n in range(0, 20, 5)]

    shown = "\n\n".join(
        f"text        {example['text']}\n"
        + "\n".join(f"{size:>4}: {example[size][0]:>2} ids  {example[size][1]}" for size in ("512", "8192"))
        for example in week["examples"]
    )

    length_rows, price_rows = [], []
    for name in ("characters", *map(str, SIZES)):
        row, label = week["lengths"][name], "characters (65)" if name == "characters" else f"{int(name):,}"
        cells = [
            f"{row[split + key]:{form}}" for split in SPLITS for key, form in (("", ","), ("_ratio", ".4f"))
        ]
        length_rows.append([label, *cells, f"{100 * row['gap']:.1f}%"])
        if name not in ("characters", "256"):
            cells = [f"{row[key]:,}" for key in ("embedding", "train", "rare", "never")]
            price_rows.append([label, *cells, f"{row['median_count']:g}"])

    bits = week["bits"]
    bit_rows = [
        [f"{size:,} ids, counted one by one", f"{size:,}", f"{bits[str(size)]:.4f}"] for size in SIZES
    ]
    bit_rows.append(["65 characters, counted one by one", "65", f"{bits['characters']:.4f}"])
    bit_rows.append(
        ["65 characters, counted in pairs (week 1)", "4,225", f"{bits['pairs of characters']:.4f}"]
    )
    bit_rows.sort(key=lambda row: -float(row[-1]))

    bench = week["bench"]
    tasks = ["train_512", "train_8192", "encode_512", "encode_8192"]
    peers = ["bpe_tokenizer", "minbpe", "tokenizers", "rustbpe", "tiktoken"]
    times = [[bench[name].get(task) for task in tasks] for name in peers]
    bench_rows = [
        [name, *(f"{time['least']:.2f} ({time['median']:.2f})" if time else "-" for time in row)]
        for name, row in zip(peers, times, strict=True)
    ]
    vocabulary_rows = []
    for size, m in sorted(week["vocabularies_half"].items(), key=lambda item: int(item[0])):
        name = "characters (65)" if size == "65" else f"BPE, {int(size):,}"
        numbers = [f"{m['params']:,}", f"{m['steps']:,}", f"{m['characters'] / 1e6:.1f} M"]
        quarter = week["vocabularies"].get(size)
        three = seeds(quarter["bits_per_char"]) if quarter else "-"
        vocabulary_rows.append([name, *numbers, seeds(m["val_loss"]), seeds(m["bits_per_char"]), three])

    short, full = week["compare"], week["compare_full"]
    scheme_rows = [
        [name, f"{m['params']:,}", seeds(m["val_loss"]), seeds(full["runs"][name]["val_loss"])]
        for name, m in sorted(short["runs"].items(), key=lambda item: item[1]["val_loss"]["mean"])
    ]

    def window_table(windows, part):
        lengths = [str(128 * n) for n in TIMES]
        ways = ("learned", "sinusoidal", "rope", "rope, interpolated", "alibi", "none")
        rows = [
            [way, *(seeds(windows[way][T][part]) if T in windows[way] else "-" for T in lengths)]
            for way in ways
        ]
        return table(["window", *lengths], rows)

    longer_rows = [
        [128 * n, way, *(f"{x:.4f}" for when in ("before", "after") for x in row[when])]
        for n in (2, 4)
        for way in ("as it is", "positions divided", "base raised")
        for row in [week["interpolation"][f"{n} {way}"]]
    ]
    recipe_rows = []
    for m in week["recipes"]:
        c = m["config"]
        base = "" if c["position_base"] == 10_000 else f", base {c['position_base']:g}"
        batch = f"{c['batch_size']} x {c['block_size']}"
        shape = [f"{c['n_layer']} x {c['n_embd']}{base}", c["n_head"], batch]
        names = ("learning_rate", "lr_floor", "init_std", "beta2", "dropout", "weight_decay")
        numbers = [c[name] for name in names]
        losses_of = [f"{m['steps']:,}", f"{m['train_loss']:.4f}", f"{m['val_loss']:.4f}"]
        recipe_rows.append([*shape, *(f"{number:g}" for number in numbers), *losses_of])
    tokens = {
        "by_hand": table(["merge", "count", "pairs with this count", "ids", "text"], hand),
        "first_merges": table(["merges", *[""] * 5], merges),
        "examples": f"```\n{shown}\n```",
        "lengths": table(
            ["vocabulary", "train ids", "chars/id", "val ids", "chars/id", "val is worse by"], length_rows
        ),
        "price": table(
            ["vocabulary", "embedding, 128 wide", "train ids", "seen < 100 times", "never seen", "median"],
            price_rows,
        ),
        "bits": table(["what is counted", "cells", "bits/char on val"], bit_rows),
        "bench": table(["seconds: least (median)", *(task.replace("_", " ") for task in tasks)], bench_rows),
        "vocabularies": table(
            ["vocabulary", "parameters", "steps", "characters read", "nats/token", "bits/char", "a quarter"],
            vocabulary_rows,
        ),
    }
    positions = {
        "sample": f"```\n{results['rungs']['v4_rope_alibi']['sample'].strip()}\n```",
        "schemes": table(
            ["position", "parameters", "val loss, 550 steps", "2,200 steps, one seed, Xeon"], scheme_rows
        ),
        "window": window_table(short["windows"], "whole"),
        "quarter": window_table(short["windows"], "last"),
        "window_full": window_table(full["windows"], "whole"),
        "quarter_full": window_table(full["windows"], "last"),
        "interpolation": table(
            ["window", "RoPE", "whole", "last quarter", "200 steps later: whole", "last quarter"],
            longer_rows,
        ),
        "recipes": table(RECIPE_COLUMNS.split(","), recipe_rows),
        "norms": table(
            ["norm", "parameters", "val loss", "seconds"],
            [
                [name, f"{m['params']:,}", f"{m['val_loss']:.4f}", f"{m['seconds']:.0f}"]
                for name, m in week["norms"].items()
            ],
        ),
        "race": race_table(results, ["v4_1", "v4_2"]),
    }
    return {"week_5": tokens, "week_5_positions": positions}


EXPERIMENTS = {
    "by_hand": by_hand,
    "first_merges": first_merges,
    "lengths": lengths,
    "examples": examples,
    "unknown": unknown,
    "bits": bits,
    "fewest_pieces": fewest_pieces,
    "without_split": without_split,
    "unicode_editions": unicode_editions,
    "turned_by_hand": turned_by_hand,
    "compare": compare,
    "compare_full": compare_full,
    "interpolation": interpolation,
    "vocabularies": vocabularies,
    "vocabularies_half": vocabularies_half,
    "norms": norms,
    "recipes": recipes,
}

LONG = ["compare_full", "interpolation", "vocabularies_half", "recipes"]
NOT_SHOWN = {"elsewhere": elsewhere}  # in no table: the logs do not wait for it

if __name__ == "__main__":
    named = {name: NOT_SHOWN[name] for name in sys.argv[1:] if name in NOT_SHOWN}
    run_experiments(5, EXPERIMENTS | named, tables, LONG)
