"""The experiments of week 11: python tools/week_11.py [experiment ...]

`retrieval` also needs bm25s: pip install bm25s==0.3.16
"""

import random
import re
import statistics
import time

import faiss
import matplotlib.pyplot as plt
import numpy as np
import torch
from common import LOGS, ROOT, machine, run_experiments, table

import rag
import v8_lora as v8

N = 600  # questions
TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")
CUT = int(0.9 * len(TEXT))  # the model has learned from what stands before it
CONFIG = rag.Config(data=str(ROOT / "input.txt"), model=str(ROOT / "runs" / "v8_lora"))


def questions():
    """N pairs (words, name): four to seven words of a held-out speech by somebody new."""
    names = {name for name, _ in v8.read_speeches(TEXT[:CUT])}
    held_out = [x for x in v8.read_speeches(TEXT[CUT:]) if x[0] not in names and len(x[1].split()) >= 4]
    rng = random.Random(0)
    return [(v8.some_words(speech, rng), name) for name, speech in (rng.choice(held_out) for _ in range(N))]


def passages_of(text):
    """The passages that rag.py makes of a text."""
    return rag.split_passages(text, "input.txt", CONFIG.length)


class SingleWords(rag.HashedWords):
    """rag.py's tfidf without pairs of words."""

    @staticmethod
    def grams(text):
        """The words of a text."""
        return re.findall(r"\w+(?:'\w+)*", text.lower())


def ranks(found, asked, passages):
    """How many passages stand before the first by the right speaker, for each question; found is (N, n)."""
    names = np.array([passage.name for passage in passages])
    hits = names[found] == np.array([name for _, name in asked])[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1), 10**9)


def search(embedder, passages, asked, n=20):
    """Fit an embedder on passages and look questions up: scores and places (N, n)."""
    bodies = [passage.shown if embedder.reads_names else passage.text for passage in passages]
    embedder.fit(bodies)
    parts = [embedder(bodies[i : i + 1000]) for i in range(0, len(bodies), 1000)]
    index = rag.make_index(np.concatenate(parts), "flat")
    return index.search(embedder([words for words, _ in asked]), n)


def bm25(passages, asked, n=20):
    """What BM25 (Robertson and Zaragoza 2009) of the library bm25s finds: places (N, n)."""
    import bm25s

    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize([p.shown for p in passages], stopwords=None, show_progress=False), False)
    tokens = bm25s.tokenize([words for words, _ in asked], stopwords=None, show_progress=False)
    return retriever.retrieve(tokens, k=n, show_progress=False)[0]


def retrieval():
    """The right speaker among the first 1, 5, 20 passages, by embedder."""
    passages, asked, results = passages_of(TEXT), questions(), {}
    found = {"tfidf": search(rag.HashedWords(), passages, asked)[1]}
    found["tfidf, single words"] = search(SingleWords(), passages, asked)[1]
    found["lm"] = search(rag.HiddenStates(rag.Reader(CONFIG)), passages, asked)[1]
    found["BM25"] = bm25(passages, asked)
    for name, places in found.items():
        rank = ranks(places, asked, passages)
        results[name] = {f"recall_{k}": float((rank < k).mean()) for k in (1, 5, 20)}
    return results | {"passages": len(passages), "questions": N}


def shares(answers, asked):
    """The share of answers that are the right name."""
    return sum(answer == name for answer, (_, name) in zip(answers, asked, strict=True)) / len(asked)


def right_passage(words, name, passages):
    """A passage that has the words, under the name; the one that has most of them if they cross a border."""
    own = [p for p in passages if p.name == name]
    wanted = {*words.split()}
    return max(own, key=lambda p: (words in " ".join(p.text.split()), len(wanted & {*p.text.split()})))


def reading():
    """Exact answers: of what was retrieved, with the right passage given, with none, and by k."""
    passages, asked, reader = passages_of(TEXT), questions(), rag.Reader(CONFIG)
    held_out = passages_of(TEXT[CUT:])
    _, found = search(rag.HashedWords(), passages, asked)

    def share_right(lists):
        prompts = [
            reader.prompt(f"Who says: {words}", chosen)[0]
            for (words, _), chosen in zip(asked, lists, strict=True)
        ]
        return shares(reader.answer(prompts), asked)

    results = {"right passage given": share_right([[right_passage(*pair, held_out)] for pair in asked])}
    results["no passage"] = share_right([[] for _ in asked])
    by_k = {k: share_right([[passages[i] for i in row[:k]] for row in found]) for k in (1, 2, 3, 4, 5)}
    rank = ranks(found, asked, passages)
    recall = {k: float((rank < k).mean()) for k in by_k}
    draw_k(by_k, recall)
    return results | {"retrieved": by_k, "recall": recall}


def draw_k(by_k, recall):
    """Write logs/week_11_k.png."""
    fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    ax.plot(recall.keys(), recall.values(), "o-", label="the right speaker's passage is among them")
    ax.plot(by_k.keys(), by_k.values(), "o-", label="the answer is right")
    ax.set(xlabel="k, passages that the model reads", ylabel="share of 600 questions", ylim=(0, 1.02))
    ax.set(xticks=list(by_k))
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(LOGS / "week_11_k.png", dpi=90)
    plt.close(fig)


def threshold():
    """Best scores of questions with and without an answer in the collection, and a threshold between."""
    asked, results = questions(), {}
    with_answer, without = passages_of(TEXT), passages_of(TEXT[:CUT])
    for name, make in (("tfidf", rag.HashedWords), ("lm", lambda: rag.HiddenStates(rag.Reader(CONFIG)))):
        has, lacks = (search(make(), part, asked, 1)[0][:, 0] for part in (with_answer, without))
        limits = np.linspace(0, 1, 101)
        both = [(has >= limit).mean() + (lacks < limit).mean() for limit in limits]
        limit = float(limits[int(np.argmax(both))])
        results[name] = {"best": limit, "refused": float((lacks < limit).mean())}
        results[name] |= {"found": float((has >= limit).mean()), "used": make().threshold}
        if name == "tfidf":
            draw_threshold(has, lacks, limit)
    return results


def draw_threshold(has, lacks, limit):
    """Write logs/week_11_threshold.png."""
    fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    bins = np.linspace(0, 1, 51)
    ax.hist(has, bins, alpha=0.6, label="the words are in the collection")
    ax.hist(lacks, bins, alpha=0.6, label="they are not")
    ax.axvline(limit, color="gray", linestyle="--", label=f"threshold {limit:.2f}")
    ax.set(xlabel="score of the best passage", ylabel="questions")
    ax.legend()
    fig.savefig(LOGS / "week_11_threshold.png", dpi=90)
    plt.close(fig)


def failures():
    """Words changed in the question: one left out, one replaced by another; and the name in the question."""
    passages, asked, rng = passages_of(TEXT), questions(), random.Random(1)
    words = re.findall(r"[a-z]+", TEXT.lower())

    def without_one(text):
        parts = text.split()
        del parts[rng.randrange(1, len(parts) - 1)]
        return " ".join(parts)

    def one_other(text):
        parts = text.split()
        parts[rng.randrange(1, len(parts) - 1)] = rng.choice(words)
        return " ".join(parts)

    changed = {"as it is": lambda text: text, "a word left out": without_one, "a word replaced": one_other}
    changed["words in another order"] = lambda text: " ".join(rng.sample(text.split(), len(text.split())))
    reader, results = rag.Reader(CONFIG), {}
    for name, change in changed.items():
        new = [(change(text), name) for text, name in asked]
        _, found = search(rag.HashedWords(), passages, new)
        prompts = [
            reader.prompt(f"Who says: {text}", [passages[row[0]]])[0]
            for (text, _), row in zip(new, found, strict=True)
        ]
        right = float((ranks(found, new, passages) < 1).mean())
        results[name] = {"recall_1": right, "answers": shares(reader.answer(prompts), new)}
    bodies = [" ".join(p.text.split()) for p in passages]
    several = [
        len({p.name for p, body in zip(passages, bodies, strict=True) if text in body}) > 1
        for text, _ in asked
    ]
    return results | {"more than one speaker": sum(several)}


def scale():
    """100,000 passages of 25 words drawn from the plays: seconds to index, milliseconds a query, recall."""
    torch.set_num_threads(2)
    words, rng = TEXT.split(), random.Random(0)
    starts = [rng.randrange(len(words) - 25) for _ in range(100_000)]
    bodies = [" ".join(words[i : i + 25]) for i in starts]
    asked = [" ".join(words[i + 5 : i + 11]) for i in starts[:200]]
    embedder, start = rag.HashedWords(), time.perf_counter()
    embedder.fit(bodies)
    vectors = np.concatenate([embedder(bodies[i : i + 1000]) for i in range(0, len(bodies), 1000)])
    results = {"machine": machine(), "embedding_seconds": time.perf_counter() - start}
    exact = None
    for kind in rag.INDICES:
        start = time.perf_counter()
        index = rag.make_index(vectors, kind)
        seconds = time.perf_counter() - start
        times, scores = [], []
        for question in asked:
            start = time.perf_counter()
            score, _ = index.search(embedder([question]), 5)
            times.append(time.perf_counter() - start)
            scores.append(score[0, 0])
        scores = np.array(scores)
        exact = scores if exact is None else exact
        results[kind] = {"seconds": seconds, "milliseconds": 1000 * statistics.median(times)}
        results[kind] |= {"slowest": 1000 * max(times), "recall": float((scores >= exact - 1e-5).mean())}
        results[kind]["megabytes"] = faiss.serialize_index(index).nbytes / 1e6
    return results


EXPERIMENTS = {
    "retrieval": retrieval,
    "reading": reading,
    "threshold": threshold,
    "failures": failures,
    "scale": scale,
}


def percent(share):
    """0.953 as 95.3%."""
    return f"{share:.1%}"


def retrieval_table(week):
    """Recall by embedder."""
    rows = []
    for name, m in week["retrieval"].items():
        if isinstance(m, dict):
            rows.append([name, *(percent(m[f"recall_{k}"]) for k in (1, 5, 20))])
    return table(["", "first", "among 5", "among 20"], rows)


def reading_table(week):
    """Right answers by what the model was given."""
    m = week["reading"]
    rows = [[name, percent(m[name])] for name in ("no passage", "right passage given")]
    rows += [[f"the {k} best retrieved", percent(m["retrieved"][k])] for k in m["retrieved"]]
    return table(["the model reads", "answers right"], rows)


def failures_table(week):
    """What becomes of it if the quotation is not exact."""
    rows = [
        [name, percent(m["recall_1"]), percent(m["answers"])]
        for name, m in week["failures"].items()
        if isinstance(m, dict)
    ]
    return table(["the words in the question", "right speaker first", "answers right"], rows)


def scale_table(week):
    """100,000 passages."""
    rows = []
    for kind in rag.INDICES:
        m = week["scale"][kind]
        numbers = [
            f"{m['seconds']:.1f}",
            f"{m['megabytes']:.0f}",
            f"{m['milliseconds']:.1f}",
            percent(m["recall"]),
        ]
        rows.append([f"`--index {kind}`", *numbers])
    return table(["", "seconds to build", "MB", "ms a query", "finds the best"], rows)


def tables(results):
    """The tables of logs/week_11.md."""
    week = results["week_11"]
    blocks = {"retrieval": retrieval_table, "reading": reading_table}
    blocks |= {"failures": failures_table, "scale": scale_table}
    return {"week_11": {name: make(week) for name, make in blocks.items()}}


if __name__ == "__main__":
    run_experiments(11, EXPERIMENTS, tables)
