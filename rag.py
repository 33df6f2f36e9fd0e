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
import signal
import subprocess
import sys
import textwrap
import unicodedata
import zlib
from bisect import bisect_left
from dataclasses import asdict, dataclass, fields, replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends the program, also while torch loads

import torch  # isort: skip, before faiss: in the other order some macOS crash

try:
    import faiss  # isort: skip
except ImportError:
    sys.exit("error: rag.py needs faiss, so once: pip install -r requirements-serve.txt")
import numpy as np
from tqdm import tqdm

from bpe_tokenizer import TokenizerError

if sys.platform == "darwin":  # torch and faiss each bring an OpenMP; the threads of two of them may crash
    faiss.omp_set_num_threads(1)

# --------------------------------------------- config ---------------------------------------------

RUNGS = ("v8_lora", "v9_rlhf")  # whose models answer; nothing else is imported by a name in a checkpoint
EMBEDDERS = ("tfidf", "lm")  # and sentence-transformers:NAME
INDICES = ("flat", "hnsw", "ivf")
FILES = ("index.faiss", "embedder.npy")  # what is kept of an index beside the list of its passages


@dataclass
class Config:
    """Every field is a command-line flag of the same name: --k 3."""

    data: str = "input.txt"  # what to look things up in: a file, or a folder of them
    model: str = "auto"  # folder of a model that answers; auto: runs/v8_lora, trained first if there is none
    out_dir: str = "runs/rag"  # folder for the index
    embedder: str = "tfidf"  # tfidf; lm: the model's own states, to compare; or sentence-transformers:NAME
    index: str = "flat"  # flat: exact; hnsw or ivf: faster in large collections, and sometimes wrong
    length: int = 150  # characters of a passage, at most
    k: int = 1  # passages that the model reads
    show: int = 3  # passages that are shown, at most
    threshold: str = "auto"  # a best score below this number: nothing found; auto: the embedder's own
    max_new_tokens: int = 32  # tokens in an answer, at most
    device: str = "auto"  # auto, cuda, mps or cpu

    def __post_init__(self):
        for name, least in {"length": 20, "k": 1, "show": 1, "max_new_tokens": 1}.items():
            if getattr(self, name) < least:
                sys.exit(f"error: --{name} {getattr(self, name)} is impossible, it must be at least {least}")
        if self.embedder not in EMBEDDERS and not re.fullmatch("sentence-transformers:.+", self.embedder):
            known = ", ".join([*EMBEDDERS, "sentence-transformers:NAME"])
            sys.exit(f"error: no --embedder {self.embedder}, choose from: {known}")
        if self.index not in INDICES:
            sys.exit(f"error: no --index {self.index}, choose from: {', '.join(INDICES)}")
        if self.device not in ("auto", "cuda", "mps", "cpu"):
            sys.exit(f"error: no --device {self.device}, choose from: auto, cuda, mps, cpu")
        if self.threshold != "auto" and not re.fullmatch(r"-?(0?\.\d+|0|1|[01]\.0*)", self.threshold):
            sys.exit(f"error: --threshold {self.threshold} is impossible, it is auto or between -1 and 1")


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


def split_sentences(text):
    """Sentences and parts of a text, (where it begins, text in one line)."""
    ends = r"[.!?][\"')\]]*(?=\s)|(?=\n\s*\n)|\Z"
    found = re.finditer(rf"\S.*?(?:{ends})", text.rstrip(), flags=re.DOTALL)
    return [(sentence.start(), " ".join(sentence[0].split())) for sentence in found]


def split_passages(text, name, length):
    """The Passages of one file: speeches where it is a play, else overlapping windows of sentences."""
    pattern = r"(?:^|\n\n)([A-Z][A-Za-z' -]{1,30}):\n(\S.*?)(?=\n\n|\s*\Z)"
    text = text.rstrip()
    speeches = list(re.finditer(pattern, text, flags=re.DOTALL))
    if sum(len(speech[0]) for speech in speeches) <= len(text) / 2:
        speeches = []
    line_ends = [end.start() for end in re.finditer("\n", text)]
    parts, at = [], 0  # (speaker, pieces): speeches, and what stands between them
    for speech in speeches:
        parts.append(
            ("", [(at + start, piece) for start, piece in split_sentences(text[at : speech.start()])])
        )
        at = speech.start(2)
        lines = list(re.finditer(".+", speech[2]))
        parts.append((speech[1], [(at + line.start(), line[0]) for line in lines]))
        at = speech.end()
    parts.append(("", [(at + start, piece) for start, piece in split_sentences(text[at:])]))
    return [
        Passage("\n".join(window) if speaker else " ".join(window), f"{name}:{line}", speaker)
        for speaker, pieces in parts
        for line, window in pack([(bisect_left(line_ends, at) + 1, piece) for at, piece in pieces], length)
    ]


def read_texts(config):
    """The files of --data: {name: (sha256 of its bytes, text)}; exits where there is no text."""
    path, own = Path(config.data), Path(config.out_dir).resolve()
    if not config.data or not path.exists():
        sys.exit(f"error: there is no --data {config.data}")
    files = [path]
    if path.is_dir():  # without what is hidden, and without an index that lies in it
        found = (
            file for file in sorted(path.rglob("*")) if file.is_file() and own not in file.resolve().parents
        )
        files = [file for file in found if not any(part[0] == "." for part in file.relative_to(path).parts)]
    texts, left_out = {}, []
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        try:
            raw = file.read_bytes()
            text = raw.decode("utf-8-sig").replace("\r\n", "\n")
            if "\0" in text:
                raise ValueError("it has zero bytes")
        except (OSError, ValueError) as error:
            if path.is_file():
                sys.exit(f"error: --data {config.data} is no UTF-8 text ({error})")
            left_out.append(name)
            continue
        if re.search(r"\w", text):
            texts[name] = (hashlib.sha256(raw).hexdigest(), text)
    if left_out:
        print(
            f"note: left out, as they are no UTF-8 text: {len(left_out)}, {left_out[0]} first",
            file=sys.stderr,
        )
    if not texts:
        sys.exit(f"error: there is no text in --data {config.data}")
    return texts


# ------------------------------------------- retrieval -------------------------------------------


class HashedWords:
    """TF-IDF (Salton and Buckley 1988) of words and pairs of words, by hashing (Weinberger et al. 2009).

    A word adds its weight to the number that its hash names, with the sign that its hash says: without a
    vocabulary, and what two words of one number say of each other cancels on average. A weight is the root of
    ln(texts / texts with the word): the product of two texts' weights is then that logarithm.
    """

    n_dims, n_counts = 1024, 2**20
    threshold, reads_names = 0.5, True

    def fit(self, texts):
        """Count in how many texts each word is; the counts (n_counts,) are by hash too."""
        counts = np.zeros(self.n_counts, np.float32)
        for text in texts:
            counts[list({self.hash(gram) % self.n_counts for gram in self.grams(text)})] += 1
        self.weights = np.sqrt(np.log((len(texts) + 1) / (counts + 0.5)), dtype=np.float32)

    @staticmethod
    def grams(text):
        """The words of a text and the pairs of neighbours among them."""
        text = unicodedata.normalize("NFKC", text).replace("\u2019", "'")  # a curly apostrophe
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

    def share(self, question, text):
        """The share of a question's weight that a text has, from 0 to 1. Nothing falls together here."""
        weight = {gram: self.weights[self.hash(gram) % self.n_counts] ** 2 for gram in self.grams(question)}
        there = {*self.grams(text)}
        return float(sum(w for gram, w in weight.items() if gram in there) / (sum(weight.values()) or 1))


def normalised(x):
    """Vectors (N, n_dims) with length 1, in 32 bits; a vector of zeros stays one."""
    x = np.ascontiguousarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


class HiddenStates:
    """The mean of a language model's own hidden states over the tokens of a text, less that of all texts."""

    threshold, reads_names = 0.87, False  # a name would stand out in a mean of few words

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

    threshold, reads_names = 0.4, True  # a guess: it depends on the model

    def __init__(self, name):
        try:
            from sentence_transformers import SentenceTransformer as Model

            self.model = Model(name)
        except ImportError:
            sys.exit("error: --embedder sentence-transformers needs: pip install sentence-transformers")
        except Exception as error:  # no such model, no network
            sys.exit(f"error: cannot load --embedder sentence-transformers:{name} ({reason_of(error)})")
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
        n_cells = max(1, min(round(4 * math.sqrt(n)), n // 39))  # faiss advises 39 vectors for each cell
        quantizer = faiss.IndexFlatIP(n_dims)
        index = faiss.IndexIVFFlat(quantizer, n_dims, n_cells, faiss.METRIC_INNER_PRODUCT)
        index.nprobe, index.cp.min_points_per_centroid = min(n_cells, 16), 1  # the second: no warning
        index.train(vectors)
    index.add(vectors)
    return index


class Library:
    """The passages of --data and their index, kept in --out_dir."""

    def __init__(self, config, embedder):
        self.config, self.embedder = config, embedder
        self.forget()

    def forget(self):
        """Begin with nothing."""
        self.passages, self.files, self.index, self.n_fitted = [], {}, None, 0

    def open(self, texts):
        """Get ready for texts, as read_texts returns them; return self.

        An index that is kept is taken where it is whole and all its files are still the same. New files are
        added to it. Otherwise, or once most of the passages came later, it is made anew.
        """
        folder = Path(self.config.out_dir, self.key())
        reason = self.load(folder)
        if not reason:
            changed = [name for name, digest in self.files.items() if texts.get(name, [0])[0] != digest]
            reason = f"{changed[0]} has changed since or is gone" if changed else ""
        if reason:
            if reason != "new":
                print(f"note: the index in {folder} is made anew: {reason}", file=sys.stderr)
            self.forget()
        if new := {name: found for name, found in texts.items() if name not in self.files}:
            self.add(new)
            if len(self.passages) > 2 * self.n_fitted:
                print(f"note: the index in {folder} is made anew: most of it is new", file=sys.stderr)
                self.forget()
                self.add(texts)
            self.save(folder)
        return self

    def add(self, texts):
        """Take in files, {name: (sha256, text)}. The embedder is fitted to the first that come."""
        files = texts.items()
        passages = [p for name, (_, text) in files for p in split_passages(text, name, self.config.length)]
        bodies = [passage.shown if self.embedder.reads_names else passage.text for passage in passages]
        if self.index is None:
            self.embedder.fit(bodies)
            self.n_fitted = len(bodies)
        parts = [bodies[i : i + 1000] for i in range(0, len(bodies), 1000)]
        bar = tqdm(parts, desc="1,000 passages", disable=len(parts) < 20)
        vectors = np.concatenate([self.embedder(part) for part in bar])
        if self.index is None:
            self.index = make_index(vectors, self.config.index)
        else:
            self.index.add(vectors)
        self.passages += passages
        self.files |= {name: digest for name, (digest, _) in files}

    def key(self):
        """The name of an index's folder, a hash of all that it depends on beside the texts."""
        code = [inspect.getsource(x) for x in (type(self.embedder), pack, split_passages, make_index)]
        model = self.embedder.reader.hash if self.config.embedder == "lm" else ""
        settings = [self.config.embedder, self.config.index, str(self.config.length), model]
        parts = [str(Path(self.config.data).resolve()), *settings, *code]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]

    def save(self, folder):
        """Write the files of the index, and last what says that they are whole: library.json."""
        state = BytesIO()
        np.save(state, self.embedder.state())
        raw = dict(zip(FILES, (faiss.serialize_index(self.index).tobytes(), state.getvalue()), strict=True))
        found = {
            "files": self.files,
            "passages": [asdict(p) for p in self.passages],
            "n_fitted": self.n_fitted,
        }
        found["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in raw.items()}
        raw["library.json"] = json.dumps(found).encode()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in raw.items():
                new = folder / f"{name}.{os.getpid()}.tmp"
                new.write_bytes(content)
                new.replace(folder / name)
        except OSError as error:
            sys.exit(f"error: cannot write the index to {folder} ({error}); name another folder: --out_dir")

    def load(self, folder):
        """Read what `save` has written; return why that cannot be, or an empty text.

        faiss may crash on a damaged file, so it gets none whose hash is another. That finds accidents; an
        index from a stranger is not made safe by it.
        """
        if not (folder / "library.json").exists():
            return "new"
        try:
            found = json.loads((folder / "library.json").read_text(encoding="utf-8"))
            raw = {name: (folder / name).read_bytes() for name in FILES}
            for name, content in raw.items():
                if hashlib.sha256(content).hexdigest() != found["sha256"][name]:
                    return f"{name} is damaged"
            self.passages = [Passage(**passage) for passage in found["passages"]]
            self.files, self.n_fitted = dict(found["files"]), int(found["n_fitted"])
            self.index = faiss.deserialize_index(np.frombuffer(raw["index.faiss"], np.uint8))
            self.embedder.load(np.load(BytesIO(raw["embedder.npy"])))
            if self.index.ntotal != len(self.passages):
                return "it has not as many vectors as passages"
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            return f"it is damaged ({reason_of(error)})"
        return ""

    def search(self, question, n):
        """The n best passages for a question: [(score, Passage)], the best first.

        Of the 100 whose vectors are nearest, tfidf then looks at the words themselves: in 1,024 numbers many
        words fall together.
        """
        quoted = re.sub(
            r"^who says:?", "", question, flags=re.IGNORECASE
        )  # the form is no part of the quotation
        scores, places = self.index.search(self.embedder([quoted]), min(max(n, 100), len(self.passages)))
        found = [(float(s), self.passages[i]) for s, i in zip(scores[0], places[0], strict=True) if i >= 0]
        if share := getattr(self.embedder, "share", None):
            found = [(share(quoted, passage.shown), score, passage) for score, passage in found]
            found = [(best, p) for best, _, p in sorted(found, key=lambda x: x[:2], reverse=True)]
        return found[:n]


def reason_of(error):
    """The first line of what an exception says."""
    return (str(error) or type(error).__name__).splitlines()[0]


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
            sys.exit(f"error: there is no model that answers in {folder} ({reason_of(error)})")
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
        """The ids of a prompt, and how many of the passages it holds: of too many the last are left out.

        A character that the model's vocabulary lacks ends the program: only models of characters lack some.
        """
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
    folder = Path("runs/v8_lora")
    if config.model != "auto":
        return config.model
    if not (folder / "metrics.json").exists():
        resume = ["--resume"] * (folder / "checkpoint.pt").exists()
        time = "some four minutes on two cores, or seven if there is no model of v6 either"
        print(f"there is no model that answers yet: runs v8_lora.py first, {time}", flush=True)
        if subprocess.run([sys.executable, Path(__file__).with_name("v8_lora.py"), *resume]).returncode:
            sys.exit("error: v8_lora.py has failed; name a trained model: --model FOLDER")
    return str(folder)


# ---------------------------------------------- main ----------------------------------------------


def main():
    question, config = parse_flags()
    texts = read_texts(config)
    reader = Reader(config) if config.embedder == "lm" else None
    embedder = make_embedder(config, reader)
    library = Library(config, embedder).open(texts)
    n_passages = len(library.passages)
    print(f"passages in {config.data}: {n_passages:,}", flush=True)
    if config.k > n_passages:
        sys.exit(f"error: --k {config.k:,} is more than the passages in {config.data}: {n_passages:,}")
    found = library.search(question, max(config.k, config.show))
    threshold = embedder.threshold if config.threshold == "auto" else float(config.threshold)
    if not found or found[0][0] < threshold:
        best = f"the best passage scores {found[0][0]:.2f}" if found else "no passage has any of its words"
        print(f"nothing found: {best}, less than --threshold {threshold}")
        return
    reader = reader or Reader(config)
    chosen = [passage for _, passage in found[: config.k]]
    prompt, n = reader.prompt(question, chosen)
    for i, (score, passage) in enumerate(found):
        print(f"\n[{score:.2f}] {passage.place}{'' if i < n else ', not read'}")
        print(textwrap.indent(passage.shown, "    "))
    if n < len(chosen):
        fit = f"{n} of {len(chosen)} passages fit into the {reader.config.block_size} tokens"
        print(f"\nnote: {fit} that the model reads")
    print(f"\nthe prompt: {reader.tokenizer.decode(prompt)!r}")
    print(f"the answer: {reader.answer([prompt])[0]}")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # the stdout of IDLE and of some notebooks is no file
        sys.stdout.reconfigure(errors="replace")  # print even what the terminal has no character for
    try:
        main()
    except TokenizerError as error:  # a question that is no text
        sys.exit(f"error: {error}")
