"""The experiments of week 5: python tools/week_5.py [experiment ...]"""

import json
import math
import shutil
import statistics
import unicodedata
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import islice, pairwise
from unittest.mock import patch

import matplotlib.pyplot as plt
import regex
import torch
from common import LOGS, ROOT, run, run_experiments, table

import bpe_tokenizer
import v4_rope_alibi as v4
from bpe_tokenizer import SPLIT, BPETokenizer, learn_merges

TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")
TRAIN, VAL = TEXT[: int(0.9 * len(TEXT))], TEXT[int(0.9 * len(TEXT)) :]
SPLITS = {"train": TRAIN, "val": VAL}
SIZES = [256, 512, 1024, 2048, 4096, 8192]
FOLDER = ROOT / "runs" / "experiments"

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
    for name, split in (("words", SPLIT.findall), ("characters", list), ("bytes", str.encode)):
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
    """RoPE of one pair of numbers, q = (1, 0) and k = (0, 1) at some places; ALiBi of 4 heads, 4 tokens."""
    config = v4.Config(n_embd=2, n_head=1)
    q, k = (v4.apply_rope(torch.eye(2)[i].expand(1, 1, 110, 2), config)[0, 0] for i in (0, 1))
    places = ((5, 3), (105, 103), (5, 4))
    bias = v4.alibi_bias(4, v4.Config(n_head=4), "cpu")[:, 3]
    return {
        "q5": q[5].tolist(),
        "k3": k[3].tolist(),
        "scores": {f"{i} {j}": (q[i] @ k[j]).item() for i, j in places},
        "alibi": {"bias": bias.tolist(), "weights": bias.softmax(-1).tolist()},
    }


def compare():
    """`python v4_rope_alibi.py --compare --resume`: losses by window and of training, and the picture."""
    out = FOLDER / "compare"
    with redirect_stdout(StringIO()):
        losses = v4.compare_positions({"data": str(ROOT / "input.txt"), "out_dir": str(out)}, resume=True)
    shutil.copy(out / "positions.png", LOGS / "week_5_positions.png")
    results = {"losses": losses, "runs": {}}
    for position in v4.POSITIONS:
        metrics = json.loads((out / position / "metrics.json").read_text(encoding="utf-8"))
        results["runs"][position] = {
            key: metrics[key] for key in ("params", "train_loss", "val_loss", "history")
        }
    return results


def interpolation():
    """The RoPE model of `compare` in longer windows: as it is, positions divided, base raised.

    Each before and after 200 more steps. The raised base is the "NTK-aware" one of a forum post (bloc97,
    2023), base * n^(D / (D - 2)) for n times the length, heads of D: only the fastest angle stays as it is.
    """
    saved = torch.load(FOLDER / "compare/rope/checkpoint.pt", weights_only=True)
    old, tokenizer = v4.Config(**saved["config"]), v4.CharTokenizer(saved["vocab"])
    train_ids, val_ids = v4.load_splits(old, tokenizer, "cpu")
    D = old.n_embd // old.n_head
    results = {}
    for n in (2, 4):
        ways = {
            "as it is": {},
            "positions divided": {"position_scale": float(n)},
            "base raised": {"position_base": old.position_base * n ** (D / (D - 2))},
        }
        for way, changes in ways.items():
            out_dir = FOLDER / f"interpolation_{n}_{way}"
            out_dir.mkdir(parents=True, exist_ok=True)
            changes |= dict(block_size=n * old.block_size, batch_size=old.batch_size // n)
            changes["out_dir"] = str(out_dir)
            changes |= dict(max_steps=200, learning_rate=0.001, warmup_steps=20, eval_interval=200)
            config = replace(old, **changes)
            model = v4.LanguageModel(config, len(tokenizer.vocab))
            model.load_state_dict(saved["model"])
            parts = (0, 3 * config.block_size // 4)
            before = [v4.evaluate(model, val_ids, config, skip=skip) for skip in parts]
            v4.train(model, train_ids, val_ids, config, {"step": 0, "seconds": 0.0, "history": []})
            after = [v4.evaluate(model, val_ids, config, skip=skip) for skip in parts]
            results[f"{n} {way}"] = {"before": before, "after": after}
    return results


def norms():
    """LayerNorm and RMSNorm, 600 steps: val loss."""
    runs = {norm: run("v4_rope_alibi", f"norm_{norm}", norm=norm, max_steps=600) for norm in v4.NORMS}
    return {norm: {key: m[key] for key in ("params", "val_loss", "seconds")} for norm, m in runs.items()}


def vocabularies():
    """Bits per character of characters and BPE, with the multiplications of half a default run.

    A token costs about 6 floating-point operations for each weight of a matrix, the token embedding apart.
    """
    results, all_tokenizers = {}, tokenizers()
    defaults = v4.Config()
    inner = 12 * defaults.n_layer * defaults.n_embd**2
    for size in (65, 512, 1024, 2048):
        flags, cost = {}, inner + size * defaults.n_embd
        if size > 65:
            path = FOLDER / f"bpe_{size}.json"
            all_tokenizers[size].save(path)
            flags = {"tokenizer": path}
        steps = round(defaults.max_steps / 2 * (inner + 65 * defaults.n_embd) / cost)
        m = run("v4_rope_alibi", f"vocabulary_{size}", max_steps=steps, **flags)
        keys = ("params", "steps", "tokens", "seconds", "train_loss", "val_loss", "bits_per_char", "history")
        results[str(size)] = {key: m[key] for key in keys}
        results[str(size)]["sample"] = (FOLDER / f"vocabulary_{size}/sample.txt").read_text("utf-8")[:300]
        if size in (65, 1024):
            shutil.copy(FOLDER / f"vocabulary_{size}/embeddings.png", LOGS / f"week_5_embeddings_{size}.png")
    return results


def recipes():
    """All RECIPES, two hours: what is done already in runs/experiments is not repeated."""
    results = []
    for number, flags in enumerate(RECIPES):
        done = FOLDER / f"recipe_{number}/metrics.json"
        metrics = (
            json.loads(done.read_text("utf-8"))
            if done.exists()
            else run("v4_rope_alibi", f"recipe_{number}", **flags)
        )
        keys = ("params", "steps", "tokens", "seconds", "threads", "train_loss", "val_loss")
        config = {name: x for name, x in metrics["config"].items() if name not in ("data", "out_dir")}
        results.append({key: metrics[key] for key in keys} | {"config": config})
    return results


# --------------------------------------------- the log ---------------------------------------------


def tables(results):
    """The blocks of logs/week_5.md."""
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
    alike = week["compare"]["runs"]
    scheme_rows = [
        [k, f"{m['params']:,}", f"{m['train_loss']:.4f}", f"{m['val_loss']:.4f}"]
        for k, m in sorted(alike.items(), key=lambda item: item[1]["val_loss"])
    ]
    losses = week["compare"]["losses"]
    windows = sorted(losses["none"], key=int)
    parts = {
        part: [
            [k, *(f"{losses[k][T][part]:.4f}" if T in losses[k] else "-" for T in windows)]
            for k in ("learned", "sinusoidal", "rope", "rope, interpolated", "alibi", "none")
        ]
        for part in (0, 1)
    }

    vocabulary_rows = []
    for size, m in sorted(week["vocabularies"].items(), key=lambda item: int(item[0])):
        characters = m["tokens"] * m["val_loss"] / math.log(2) / m["bits_per_char"]
        name = "characters (65)" if size == "65" else f"BPE, {int(size):,}"
        numbers = [f"{m['params']:,}", f"{m['steps']:,}", f"{characters / 1e6:.1f} M"]
        vocabulary_rows.append([name, *numbers, f"{m['val_loss']:.4f}", f"{m['bits_per_char']:.4f}"])

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
    return {
        "sample": f"```\n{results['rungs']['v4_rope_alibi']['sample'].strip()}\n```",
        "schemes": table(["position", "parameters", "train loss", "val loss"], scheme_rows),
        "window": table(["window, mean over all of it", *windows], parts[0]),
        "quarter": table(["window, mean over its last quarter", *windows], parts[1]),
        "interpolation": table(
            ["window", "RoPE", "whole", "last quarter", "200 steps later: whole", "last quarter"],
            [
                [n * 128, way, *(f"{x:.4f}" for when in ("before", "after") for x in row[when])]
                for n in (2, 4)
                for way in ("as it is", "positions divided", "base raised")
                for row in [week["interpolation"][f"{n} {way}"]]
            ],
        ),
        "vocabularies": table(
            ["vocabulary", "parameters", "steps", "characters read", "nats/token", "bits/char"],
            vocabulary_rows,
        ),
        "recipes": table(
            RECIPE_COLUMNS.split(","),
            recipe_rows,
        ),
        "norms": table(
            ["norm", "parameters", "val loss"],
            [[k, f"{m['params']:,}", f"{m['val_loss']:.4f}"] for k, m in week["norms"].items()],
        ),
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
    }


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
    "interpolation": interpolation,
    "norms": norms,
    "vocabularies": vocabularies,
    "recipes": recipes,
}

if __name__ == "__main__":
    run_experiments(5, EXPERIMENTS, tables, long=["recipes"])
