"""The experiments of week 11: python tools/week_11.py [experiment ...]

`retrieval` also needs bm25s: pip install bm25s==0.3.16
"""

import math
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace

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


def recall(found, asked):
    """How often the right speaker is among the first 1, 5, 20 passages that were found."""
    right = [
        [passage.name == name for _, passage in row] for row, (_, name) in zip(found, asked, strict=True)
    ]
    return {f"recall_{k}": sum(any(row[:k]) for row in right) / len(right) for k in (1, 5, 20)}


class Quiet(rag.Library):
    """A Library in memory."""

    def save(self, folder):
        """Keep nothing."""

    def load(self, folder):
        """Find nothing."""
        return "new"


def library_of(text, embedder, kind="flat"):
    """A Library of one text."""
    config = replace(CONFIG, index=kind)
    return Quiet(config, embedder).open({"input.txt": ("", text)})


def search(library, asked, n=20):
    """Look up the words of pairs (words, name): [[(score, Passage)]], n for each, as rag.py finds them."""
    return [library.search(words, n) for words, _ in asked]


def by_vector(library, asked, n=20):
    """The same by the vectors alone, without a second look at the words."""
    scores, places = library.index.search(library.embedder([words for words, _ in asked]), n)
    return [
        [(s, library.passages[i]) for s, i in zip(*row, strict=True)]
        for row in zip(scores, places, strict=True)
    ]


def bm25(passages, asked, n=20):
    """What BM25 (Robertson and Zaragoza 2009) finds, as the library bm25s has it: single words of two letters
    or more."""
    import bm25s

    retriever = bm25s.BM25()
    tokens = bm25s.tokenize([p.shown for p in passages], stopwords=None, show_progress=False)
    retriever.index(tokens, show_progress=False)
    tokens = bm25s.tokenize([words for words, _ in asked], stopwords=None, show_progress=False)
    places = retriever.retrieve(tokens, k=n, show_progress=False)[0]
    return [[(0.0, passages[i]) for i in row] for row in places]


def retrieval():
    """The right speaker among the first 1, 5, 20 passages, by embedder."""
    asked, library = questions(), library_of(TEXT, rag.HashedWords())
    found = {
        "tfidf, as rag.py has it": search(library, asked),
        "tfidf, vectors alone": by_vector(library, asked),
    }
    found["tfidf, vectors alone, single words"] = by_vector(library_of(TEXT, SingleWords()), asked)
    found["lm"] = search(library_of(TEXT, rag.HiddenStates(rag.Reader(CONFIG))), asked)
    found["BM25"] = bm25(library.passages, asked)
    results = {name: recall(rows, asked) for name, rows in found.items()}
    return results | {"passages": len(library.passages), "questions": N}


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
    asked, reader = questions(), rag.Reader(CONFIG)
    found, held_out = search(library_of(TEXT, rag.HashedWords()), asked), passages_of(TEXT[CUT:])

    def share_right(lists):
        wanted = zip(asked, lists, strict=True)
        prompts = [reader.prompt(f"Who says: {words}", chosen)[0] for (words, _), chosen in wanted]
        return shares(reader.answer(prompts), asked)

    results = {"right passage given": share_right([[right_passage(*pair, held_out)] for pair in asked])}
    results["no passage"] = share_right([[] for _ in asked])
    by_k, among = {}, {}
    for k in (1, 2, 3, 4, 5):
        lists = [[passage for _, passage in row[:k]] for row in found]
        by_k[k] = share_right(lists)
        among[k] = (
            sum(any(p.name == name for p in row) for row, (_, name) in zip(lists, asked, strict=True)) / N
        )
    draw_k(by_k, among)
    return results | {"retrieved": by_k, "recall": among}


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
    """Best scores of questions with and without an answer in the collection, and a threshold between.

    It is chosen with the even questions and judged with the odd ones. A question counts as found only if one
    word of it may be wrong: one is replaced in half of them.
    """
    asked, results, rng = questions(), {}, random.Random(2)
    asked = [(one_other(words, rng) if i % 4 > 1 else words, name) for i, (words, name) in enumerate(asked)]
    for name, make in (("tfidf", rag.HashedWords), ("lm", lambda: rag.HiddenStates(rag.Reader(CONFIG)))):
        has, lacks = (
            np.array([row[0][0] for row in search(library_of(text, make()), asked, 1)])
            for text in (TEXT, TEXT[:CUT])
        )
        limits = np.linspace(0, 1, 101)
        both = [(has[::2] >= limit).mean() + (lacks[::2] < limit).mean() for limit in limits]
        best = float(limits[int(np.argmax(both))])
        results[name] = {"best": best, "used": make().threshold}
        for kind, limit in (("best", best), ("used", results[name]["used"])):
            results[name][f"found_at_{kind}"] = float((has[1::2] >= limit).mean())
            results[name][f"refused_at_{kind}"] = float((lacks[1::2] < limit).mean())
        if name == "tfidf":
            draw_threshold(has, lacks, results[name]["used"])
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


WORDS = re.findall(r"[a-z]+", TEXT.lower())


def one_other(text, rng):
    """A text with one of its inner words replaced."""
    parts = text.split()
    parts[rng.randrange(1, max(2, len(parts) - 1))] = rng.choice(WORDS)
    return " ".join(parts)


def without_one(text, rng):
    """A text without one of its inner words."""
    parts = text.split()
    del parts[rng.randrange(1, max(2, len(parts) - 1))]
    return " ".join(parts)


def shuffled(text, rng):
    """The words of a text in another order."""
    return " ".join(rng.sample(text.split(), len(text.split())))


CHANGES = {"as it is": lambda text, rng: text, "one left out": without_one, "one replaced": one_other}
CHANGES["in another order"] = shuffled


def failures():
    """Words changed in the question; how many quotations more than one speaker has."""
    library, asked, rng = library_of(TEXT, rag.HashedWords()), questions(), random.Random(1)
    reader, results = rag.Reader(CONFIG), {}
    for kind, change in CHANGES.items():
        new = [(change(text, rng), name) for text, name in asked]
        found = search(library, new)
        wanted = zip(new, found, strict=True)
        prompts = [reader.prompt(f"Who says: {text}", [row[0][1]])[0] for (text, _), row in wanted]
        results[kind] = {
            "recall_1": recall(found, new)["recall_1"],
            "answers": shares(reader.answer(prompts), new),
        }
    bodies = [(p.name, " ".join(p.text.split())) for p in library.passages]
    several = [len({name for name, body in bodies if text in body}) > 1 for text, _ in asked]
    return results | {"more than one speaker": sum(several)}


def scale():
    """100,000 passages of 25 words drawn from the plays: seconds to index, milliseconds a query, recall."""
    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    words, rng = TEXT.split(), random.Random(0)
    starts = [rng.randrange(len(words) - 25) for _ in range(100_000)]
    passages = [rag.Passage(" ".join(words[i : i + 25]), "") for i in starts]
    asked = [" ".join(words[i + 5 : i + 11]) for i in starts[:200]]
    embedder, start = rag.HashedWords(), time.perf_counter()
    bodies = [passage.text for passage in passages]
    embedder.fit(bodies)
    vectors = np.concatenate([embedder(bodies[i : i + 1000]) for i in range(0, len(bodies), 1000)])
    results = {"machine": machine(), "embedding_seconds": time.perf_counter() - start}
    exact = None
    for kind in rag.INDICES:
        library, start = Quiet(replace(CONFIG, index=kind), embedder), time.perf_counter()
        library.passages, library.index = passages, rag.make_index(vectors, kind)
        results[kind] = {"seconds": time.perf_counter() - start}
        times, scores = {"index": [], "search": []}, []
        for question in asked:
            vector, start = embedder([question]), time.perf_counter()
            score, _ = library.index.search(vector, 100)
            times["index"].append(time.perf_counter() - start)
            start = time.perf_counter()
            library.search(question, 5)
            times["search"].append(time.perf_counter() - start)
            scores.append(score[0, 0])
        scores = np.array(scores)
        exact = scores if exact is None else exact
        results[kind] |= {f"{name}_milliseconds": 1000 * statistics.median(x) for name, x in times.items()}
        results[kind] |= {"recall": float((scores >= exact - 1e-5).mean())}
        results[kind]["megabytes"] = faiss.serialize_index(library.index).nbytes / 1e6
    return results


def by_hand():
    """The weights of the log's small example, from 1,000 passages, and the dot products."""
    n_passages = {"made": 40, "to": 500, "bear": 10, "rare": 2}
    weights = {word: math.sqrt(math.log(1001 / (n + 0.5))) for word, n in n_passages.items()}
    products = {word: weight**2 for word, weight in weights.items()}
    whole = products["made"] + products["to"] + products["bear"]
    return {"weights": weights, "both": whole, "without_bear": whole - products["bear"]}


def example():
    """What rag.py prints for one question."""
    command = [sys.executable, "rag.py", "Who says: Asses are made to bear"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    return done.stdout


EXPERIMENTS = {
    "retrieval": retrieval,
    "reading": reading,
    "threshold": threshold,
    "failures": failures,
    "scale": scale,
    "by_hand": by_hand,
    "example": example,
}


def percent(share):
    """0.953 as 95.3%."""
    return f"{share:.1%}"


def retrieval_table(week):
    """Recall by embedder."""
    rows = []
    found = [(name, m) for name, m in week["retrieval"].items() if isinstance(m, dict)]
    for name, m in sorted(found, key=lambda x: -x[1]["recall_1"]):
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
        numbers = [f"{m['seconds']:.1f}", f"{m['megabytes']:.0f}", f"{m['index_milliseconds']:.1f}"]
        numbers += [f"{m['search_milliseconds']:.1f}", percent(m["recall"])]
        rows.append([f"`--index {kind}`", *numbers])
    return table(["", "seconds to build", "MB", "ms for the index", "ms in all", "finds the best"], rows)


def tables(results):
    """The tables of logs/week_11.md."""
    week = results["week_11"]
    blocks = {"retrieval": retrieval_table, "reading": reading_table}
    blocks |= {"failures": failures_table, "scale": scale_table}
    tables = {name: make(week) for name, make in blocks.items()}
    return {"week_11": tables | {"example": f"```\n{week['example'].strip()}\n```"}}


if __name__ == "__main__":
    run_experiments(11, EXPERIMENTS, tables)
