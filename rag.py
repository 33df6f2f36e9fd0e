"""rag.py, week 11: answers from retrieved passages.

A model knows what it was trained on, a library knows the rest. Retrieval-augmented generation (Lewis et al.
2020) looks up the passages that a question is about and lets the model read them. The model is one of week 9
or 10, and its own rung's code reads and writes: here is none.

Run it with: python rag.py "Who says: Asses are made to bear", or with --help to see every flag.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import zlib
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

if sys.platform == "darwin":  # faiss and torch each bring an OpenMP, and two of them in one process may crash
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # isort: skip, before faiss: whichever comes first brings the OpenMP that both use
import faiss  # isort: skip
import numpy as np
from tqdm import tqdm

# --------------------------------------------- config ---------------------------------------------

RUNGS = ("v8_lora", "v9_rlhf")  # whose models answer; nothing else is imported by a name in a checkpoint
EMBEDDERS = ("tfidf", "lm")  # and sentence-transformers:NAME
INDICES = ("flat", "hnsw", "ivf")
FORMAT = 1  # of the files in out_dir


@dataclass
class Config:
    """Every field is a command-line flag of the same name: --k 3."""

    data: str = "input.txt"  # what to look things up in: a file, or a folder of them
    model: str = "auto"  # folder of a model that answers; auto: runs/v8_lora, trained first if there is none
    out_dir: str = "runs/rag"  # folder for the index
    embedder: str = "tfidf"  # tfidf, lm, or sentence-transformers:NAME
    index: str = "flat"  # flat: exact; hnsw or ivf: faster in large collections, and sometimes wrong
    length: int = 150  # characters of a passage, at most
    k: int = 1  # passages that the model reads
    show: int = 3  # passages that are shown
    threshold: float = -1.0  # a best score below it: nothing found; -1: what was measured for the embedder
    max_new_tokens: int = 32  # tokens in an answer, at most
    device: str = "auto"  # auto, cuda, mps or cpu

    def __post_init__(self):
        for name in ("length", "k", "show", "max_new_tokens"):
            if getattr(self, name) < 1:
                sys.exit(f"error: --{name} {getattr(self, name)} is impossible, it must be at least 1")
        if self.embedder not in EMBEDDERS and not re.fullmatch("sentence-transformers:.+", self.embedder):
            known = ", ".join([*EMBEDDERS, "sentence-transformers:NAME"])
            sys.exit(f"error: no --embedder {self.embedder}, choose from: {known}")
        if self.index not in INDICES:
            sys.exit(f"error: no --index {self.index}, choose from: {', '.join(INDICES)}")
        if not -1 <= self.threshold <= 1:
            sys.exit(f"error: --threshold {self.threshold} is impossible, scores are between -1 and 1")


def parse_flags():
    """Return the question and the Config of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"error: {message}; --help lists every flag")
    parser.add_argument("question", help='what is asked, such as "Who says: Asses are made to bear"')
    # --help shows the comment beside each field of Config
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.MULTILINE))
    for field in fields(Config):
        meaning = f"{comments.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help=meaning)
    flags = vars(parser.parse_args())
    question = flags.pop("question").strip()
    if not re.search(r"\w", question):
        sys.exit("error: the question is empty")
    return question, Config(**flags)


# ---------------------------------------------- data ----------------------------------------------


@dataclass
class Passage:
    """A piece of a text."""

    text: str
    place: str  # file:line
    name: str = ""  # in a play, of the speaker

    @property
    def shown(self):
        """As the model reads it: a speech stands under its speaker's name."""
        return f"{self.name}:\n{self.text}" if self.name else self.text


def pack(units, length):
    """Pack pieces of a text, (line, text), into windows of up to `length` characters: (line, [texts]).

    A window begins with the last piece of the window before where that fits, so that words across a border
    are together in one of them. A piece that is longer is cut between words first.
    """
    units = [(line, part) for line, text in units for part in textwrap.wrap(text, length)]

    def fits(first, last):
        return last < len(units) and sum(len(text) + 1 for _, text in units[first : last + 1]) - 1 <= length

    windows, first = [], 0
    while first < len(units):
        last = first
        while fits(first, last + 1):
            last += 1
        windows.append((units[first][0], [text for _, text in units[first : last + 1]]))
        first = last if fits(last, last + 1) else last + 1
    return windows


def split_passages(text, name, length):
    """The Passages of one file: speeches where it is a play, else overlapping windows of sentences."""
    speeches = list(
        re.finditer(r"(?:^|\n\n)([A-Z][A-Za-z' -]{1,30}):\n(\S.*?)(?=\n\n|\s*\Z)", text, flags=re.DOTALL)
    )
    line_of = np.cumsum([0, *(char == "\n" for char in text)]) + 1 if text else []  # of each character
    passages = []
    if sum(len(speech[0]) for speech in speeches) > len(text) / 2:
        for speech in speeches:
            lines = list(enumerate(speech[2].split("\n"), start=line_of[speech.start(2)]))
            for line, window in pack(lines, length):
                passages.append(Passage("\n".join(window), f"{name}:{line}", speech[1]))
        return passages
    sentences = re.finditer(r"\S.*?(?:[.!?][\"')\]]*(?=\s)|(?=\n\s*\n)|\s*\Z)", text, flags=re.DOTALL)
    units = [(line_of[s.start()], " ".join(s[0].split())) for s in sentences]
    return [Passage(" ".join(window), f"{name}:{line}") for line, window in pack(units, length)]


def read_texts(data):
    """The files of --data: {name: (sha256 of its bytes, text)}; exits where there is no text."""
    path = Path(data)
    if not path.exists():
        sys.exit(f"error: there is no --data {data}")
    files = [path]
    if path.is_dir():
        files = [
            f
            for f in sorted(path.rglob("*"))
            if f.is_file() and not any(p[0] == "." for p in f.relative_to(path).parts)
        ]
    texts = {}
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        try:
            raw = file.read_bytes()
            text = raw.decode("utf-8-sig").replace("\r\n", "\n")
            if "\0" in text:
                raise ValueError("it has zero bytes")
        except (OSError, ValueError) as error:
            if path.is_file():
                sys.exit(f"error: --data {data} is no UTF-8 text ({error})")
            print(f"note: {name} is no UTF-8 text and left out", file=sys.stderr)
            continue
        if re.search(r"\w", text):
            texts[name] = (hashlib.sha256(raw).hexdigest(), text)
    if not texts:
        sys.exit(f"error: there is no text in --data {data}")
    return texts


# ------------------------------------------- retrieval -------------------------------------------


class HashedWords:
    """TF-IDF (Salton and Buckley 1988) of words and pairs of words, by hashing (Weinberger et al. 2009).

    A word adds its weight to the number that its hash names, with the sign that its hash says: without a
    vocabulary, and what two words of one number say of each other cancels on average. A weight is the root of
    ln(texts / texts with the word): the product of two texts' weights is then that logarithm.
    """

    n_dims, n_counts = 1024, 2**20
    threshold, reads_names = 0.25, True

    def fit(self, texts):
        """Count in how many texts each word is; the counts (n_counts,) are by hash too."""
        counts = np.zeros(self.n_counts, np.float32)
        for text in texts:
            counts[list({self.hash(gram) % self.n_counts for gram in self.grams(text)})] += 1
        self.weights = np.sqrt(np.log((len(texts) + 1) / (counts + 0.5)), dtype=np.float32)

    @staticmethod
    def grams(text):
        """The words of a text and the pairs of neighbours among them."""
        words = re.findall(r"\w+(?:'\w+)*", text.lower())
        return words + [" ".join(pair) for pair in pairwise(words)]

    @staticmethod
    def hash(gram):
        """32 bits that are the same in every process."""
        return zlib.crc32(gram.encode())

    def state(self):
        """What fit has found, an array."""
        return self.weights

    def load(self, state):
        """Take back what `state` has returned."""
        self.weights = state

    def __call__(self, texts):
        """Texts to vectors (N, n_dims) of length 1; a text without words is 0."""
        found = [np.array([self.hash(gram) for gram in self.grams(text)], np.int64) for text in texts]
        rows = np.repeat(np.arange(len(texts)), [len(hashes) for hashes in found])
        hashes = np.concatenate(found) if found else np.zeros(0, np.int64)
        x = np.zeros((len(texts), self.n_dims), np.float32)
        sign = np.where(hashes >> 31, 1, -1)
        np.add.at(x, (rows, hashes % self.n_dims), sign * self.weights[hashes % self.n_counts])
        return normalised(x)


def normalised(x):
    """Vectors (N, n_dims) with length 1, in 32 bits; a vector of zeros stays one."""
    x = np.ascontiguousarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


class HiddenStates:
    """The mean of a language model's own hidden states over the tokens of a text, less that of all texts."""

    threshold, reads_names = 0.5, False  # a name would stand out in a mean of few words

    def __init__(self, reader):
        self.reader, self.n_dims = reader, reader.config.n_embd

    @torch.inference_mode()
    def means(self, texts):
        """Texts to the means of their hidden states (N, C); a text that is too long is cut."""
        model, means = self.reader.model, np.zeros((len(texts), self.n_dims), np.float32)
        ids = [self.reader.tokenizer.encode(text)[: self.reader.config.block_size] or [0] for text in texts]
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # neighbours fill a batch
        for i in range(0, len(ids), 64):
            batch = by_length[i : i + 64]
            x = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids[j]) for j in batch], batch_first=True)
            lengths = torch.tensor([len(ids[j]) for j in batch])[:, None]
            states = model.hidden_states(x.to(model.norm.weight.device)).float().cpu()  # (B, T, C)
            mask = torch.arange(x.shape[1]) < lengths  # (B, T)
            means[batch] = ((states * mask[..., None]).sum(dim=1) / lengths).numpy()
        return means

    def fit(self, texts):
        """Find the mean of all texts, or of 10,000 among them."""
        self.mean = self.means(texts[:: max(1, len(texts) // 10_000)]).mean(axis=0)

    def state(self):
        """What fit has found, an array."""
        return self.mean

    def load(self, state):
        """Take back what `state` has returned."""
        self.mean = state

    def __call__(self, texts):
        """Texts to vectors (N, n_dims) of length 1."""
        return normalised(self.means(texts) - self.mean)


class SentenceTransformer:
    """A model of the package sentence-transformers, where that is installed."""

    threshold, reads_names = 0.4, True

    def __init__(self, name):
        try:
            from sentence_transformers import SentenceTransformer as Model

            self.model = Model(name)
        except ImportError:
            sys.exit("error: --embedder sentence-transformers needs: pip install sentence-transformers")
        except Exception as error:  # no such model, no network
            sys.exit(
                f"error: cannot load --embedder sentence-transformers:{name} ({str(error).splitlines()[0]})"
            )
        self.n_dims = self.model.get_sentence_embedding_dimension()

    def fit(self, texts):
        """Nothing is left to find."""

    def state(self):
        """An empty array."""
        return np.zeros(0, np.float32)

    def load(self, state):
        """Nothing is kept."""

    def __call__(self, texts):
        """Texts to vectors (N, n_dims) of length 1."""
        return normalised(self.model.encode(texts, show_progress_bar=False))


def make_embedder(config, reader):
    """Return the embedder of --embedder; `reader` is the model that answers."""
    if config.embedder == "tfidf":
        return HashedWords()
    if config.embedder == "lm":
        return HiddenStates(reader)
    return SentenceTransformer(config.embedder.partition(":")[2])


def make_index(vectors, kind):
    """A faiss index of vectors (N, n_dims) by their dot products.

    flat compares with all. hnsw (Malkov and Yashunin 2018) walks a graph of neighbours, ivf (Jégou et al.
    2011) looks into the nearest few of many cells.
    """
    n, n_dims = vectors.shape
    if kind == "flat":
        index = faiss.IndexFlatIP(n_dims)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(n_dims, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 40, 128
    else:
        n_cells = max(1, min(round(4 * math.sqrt(n)), n // 39))  # faiss wants 39 vectors for each cell
        quantizer = faiss.IndexFlatIP(n_dims)
        index = faiss.IndexIVFFlat(quantizer, n_dims, n_cells, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = min(n_cells, 16)
        index.train(vectors)
    index.add(vectors)
    return index


class Library:
    """The passages of --data and their index, kept in --out_dir."""

    def __init__(self, config, embedder):
        self.config, self.embedder = config, embedder
        self.passages, self.files, self.index = [], {}, None

    def open(self, texts):
        """Take the index that is kept of texts, as read_texts returns them; add new ones; make it anew if
        others have changed.
        """
        folder = Path(self.config.out_dir, self.key())
        reason = self.load(folder)
        if not reason:
            changed = [name for name, digest in self.files.items() if texts.get(name, [0])[0] != digest]
            reason = f"{changed[0]} has changed since or is gone" if changed else ""
        if reason:
            if reason != "new":
                print(f"note: the index in {folder} is made anew: {reason}", file=sys.stderr)
            self.passages, self.files, self.index = [], {}, None
        new = {name: found for name, found in texts.items() if name not in self.files}
        if new:
            self.add(new)
            self.save(folder)
        return self

    def add(self, texts):
        """Take in files, {name: (sha256, text)}. What the first of them have taught the embedder stays."""
        passages = [
            p for name, (_, text) in texts.items() for p in split_passages(text, name, self.config.length)
        ]
        bodies = [passage.shown if self.embedder.reads_names else passage.text for passage in passages]
        if self.index is None:
            self.embedder.fit(bodies)
        parts = [bodies[i : i + 1000] for i in range(0, len(bodies), 1000)]
        bar = tqdm(parts, desc="1,000 passages", disable=len(parts) < 20)
        vectors = np.concatenate([self.embedder(part) for part in bar])
        if self.index is None:
            self.index = make_index(vectors, self.config.index)
        else:
            self.index.add(vectors)
        self.passages += passages
        self.files |= {name: digest for name, (digest, _) in texts.items()}

    def key(self):
        """The name of an index's folder, a hash of all that it depends on beside the texts."""
        model = self.embedder.reader.hash if self.config.embedder == "lm" else ""
        settings = (self.config.embedder, self.config.index, self.config.length, model, FORMAT)
        return hashlib.sha256(repr((Path(self.config.data).resolve(), settings)).encode()).hexdigest()[:12]

    def save(self, folder):
        """Write index.faiss, embedder.npy, and last what says that both are whole: library.json."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "library.json").unlink(missing_ok=True)
            faiss.write_index(self.index, str(folder / "index.faiss"))
            np.save(folder / "embedder.npy", self.embedder.state())
            found = {"files": self.files, "passages": [asdict(p) for p in self.passages]}
            found["sha256"] = {name: sha256(folder / name) for name in ("index.faiss", "embedder.npy")}
            (folder / "library.tmp").write_text(json.dumps(found), encoding="utf-8")
            (folder / "library.tmp").replace(folder / "library.json")
        except (OSError, RuntimeError) as error:  # faiss raises the second
            sys.exit(f"error: cannot write the index to {folder} ({error}); name another folder: --out_dir")

    def load(self, folder):
        """Read what `save` has written; return why that cannot be, or an empty text."""
        if not (folder / "library.json").exists():
            return "new"
        try:
            found = json.loads((folder / "library.json").read_text(encoding="utf-8"))
            for name, digest in found["sha256"].items():  # faiss may crash on a damaged file: look first
                if sha256(folder / name) != digest:
                    return f"{name} is damaged"
            self.passages = [Passage(**passage) for passage in found["passages"]]
            self.files, self.index = found["files"], faiss.read_index(str(folder / "index.faiss"))
            self.embedder.load(np.load(folder / "embedder.npy"))
            if self.index.ntotal != len(self.passages):
                return "it has not as many vectors as passages"
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            return f"it is damaged ({str(error).splitlines()[0]})"
        return ""

    def search(self, question, n):
        """The n best passages for a question: [(score, Passage)], the best first."""
        if n > len(self.passages):
            sys.exit(
                f"error: there are {len(self.passages):,} passages in --data {self.config.data}, not {n:,}"
            )
        quoted = re.sub(
            r"^who says:?", "", question, flags=re.IGNORECASE
        )  # that is no part of what is quoted
        scores, found = self.index.search(self.embedder([quoted]), n)
        return [(float(s), self.passages[i]) for s, i in zip(scores[0], found[0], strict=True) if i >= 0]


def sha256(path):
    """The hash of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# -------------------------------------------- answering --------------------------------------------


class Reader:
    """A model that answers, and its rung's own functions."""

    def __init__(self, config):
        folder = Path(find_model(config))
        try:
            checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            version = checkpoint["version"]
            if version not in RUNGS:
                raise ValueError(f"saved by {version}, choose one of {' or '.join(RUNGS)}")
        except Exception as error:  # a file that is missing, cut short or something else altogether
            sys.exit(f"error: there is no model that answers in {folder} ({str(error).splitlines()[0]})")
        self.rung = importlib.import_module(version)
        checkpoint, saved = self.rung.load_checkpoint("sample", {}, str(folder))
        self.config = replace(saved, greedy=True, temperature=1.0, top_k=0, top_p=1.0)
        self.config.max_new_tokens = min(config.max_new_tokens, self.config.block_size // 2)
        self.tokenizer = self.rung.make_tokenizer(checkpoint["vocab"])
        device = self.rung.pick_device(config.device)
        self.model = self.rung.LanguageModel(self.config, self.config.vocab_size).to(device).eval()
        self.rung.load_weights(self.model, checkpoint["model"])
        self.hash = self.rung.hash_of(checkpoint["model"])

    def prompt(self, question, passages):
        """The ids of a prompt, and how many of the passages it holds: of too many the last are left out."""
        question += "" if question[-1] in ".?!" else "?"
        for n in range(len(passages), -1, -1):
            context = "\n\n".join(passage.shown for passage in passages[:n])
            turns = [("context", context)] * bool(context) + [("user", question)]
            ids = self.rung.encode_prompt(turns, self.tokenizer)
            if len(ids) <= self.config.block_size - self.config.max_new_tokens:
                return ids, n
        sys.exit(f"error: the question has {len(ids)} tokens, the model reads {self.config.block_size}")

    def answer(self, prompts):
        """The likeliest answers to prompts, lists of ids."""
        end = self.tokenizer.special_tokens[self.rung.SPECIAL_TOKENS[0]]
        replies = self.rung.generate(self.model, prompts, self.config, end)
        return [self.rung.to_text(reply, self.tokenizer) for reply in replies]


def find_model(config):
    """Return the folder of the model; if there is none of v8 yet, train it."""
    if config.model != "auto":
        return config.model
    if not Path("runs/v8_lora/metrics.json").exists():
        print(
            "there is no model that answers yet: runs v8_lora.py first, some five minutes on two cores",
            flush=True,
        )
        if subprocess.run([sys.executable, Path(__file__).with_name("v8_lora.py")]).returncode:
            sys.exit("error: v8_lora.py has failed; name a trained model: --model FOLDER")
    return "runs/v8_lora"


# ---------------------------------------------- main ----------------------------------------------


def main():
    question, config = parse_flags()
    texts = read_texts(config.data)  # what cannot be read is refused now, not after minutes of training
    reader = Reader(config)
    embedder = make_embedder(config, reader)
    library = Library(config, embedder).open(texts)
    print(f"{len(library.passages):,} passages in {config.data}")
    found = library.search(question, max(config.k, min(config.show, len(library.passages))))
    threshold = embedder.threshold if config.threshold == -1 else config.threshold
    if not found or found[0][0] < threshold:
        best = f"the best passage scores {found[0][0]:.2f}" if found else "no passage has any of its words"
        print(f"nothing found: {best}, less than --threshold {threshold}")
        return
    prompt, n = reader.prompt(question, [passage for _, passage in found[: config.k]])
    for i, (score, passage) in enumerate(found):
        print(f"\n[{score:.2f}] {passage.place}{'' if i < n else ', not read'}")
        print(textwrap.indent(passage.shown, "    "))
    if n < config.k:
        fit = f"{n} of {config.k} passages fit into the {reader.config.block_size} tokens"
        print(f"\nnote: {fit} that the model reads")
    print(f"\nthe prompt: {reader.tokenizer.decode(prompt)!r}")
    print(f"the answer: {reader.answer([prompt])[0]}")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # the stdout of IDLE and of some notebooks is no file
        sys.stdout.reconfigure(errors="replace")  # print even what the terminal has no character for
    main()
