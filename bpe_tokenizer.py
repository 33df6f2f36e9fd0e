"""Byte-level BPE, week 5: text to token ids and back, in the manner of GPT-2.

Text is split into words, and a word is a row of UTF-8 bytes. Training joins the two neighbours that are seen
together most often into one piece, and again, until the vocabulary is full. Encoding repeats these merges in
the order in which they were learned. No text is unknown: what training never saw stays bytes. How text of any
kind and size is read and encoded into files, read_data and encode_data, is used by rungs from v5 on.

    python bpe_tokenizer.py                       learn 512 ids, save them and the encoded text, show examples
    python bpe_tokenizer.py --vocab_size 1024     the same with another value
    python bpe_tokenizer.py --encode "To be"      no training: text to ids with the saved vocabulary
    python bpe_tokenizer.py --decode "84 111"     no training: ids to text
    python bpe_tokenizer.py --help                every flag
"""

import argparse
import gzip
import hashlib
import importlib
import inspect
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import chain, islice, pairwise, repeat
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends the program

import numpy as np
import regex
from tqdm import tqdm

# --------------------------------------------- config ---------------------------------------------

NAME = Path(__file__).stem

# GPT-2's split into words: contractions; letters (\p{L}), digits (\p{N}) or other signs, with the one space
# before them if there is one; white space. Merges stay within a word: dog in "dog." and "dog!" is one piece.
SPLIT = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# A character to write each byte with, as GPT-2 does: itself if it prints, else one from code 256 on.
PRINTS = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in PRINTS]
VISIBLE = {byte: chr(byte) for byte in PRINTS} | {byte: chr(256 + n) for n, byte in enumerate(HIDDEN)}
BYTES = {char: byte for byte, char in VISIBLE.items()}
ALPHABET = "".join(VISIBLE[byte] for byte in range(256))

END_OF_TEXT = "<|endoftext|>"  # GPT-2's special token: each of several documents begins with it
DOCUMENTS = (".jsonl", ".jsonl.gz", ".parquet")  # files of many documents, their "text" is read
PIECE = 2**21  # characters that are read and encoded at a time


@dataclass
class Config:
    """Every field is a command-line flag of the same name: --vocab_size 1024."""

    data: str = "input.txt"  # UTF-8 text to learn from
    out_dir: str = f"runs/{NAME}"  # folder for the vocabulary and the encoded text
    vocab_size: int = 512  # ids in all: 256 bytes, and one for each merge

    def __post_init__(self):
        if not 256 <= self.vocab_size <= 65536:
            reason = "the least is 256, the bytes, and the most 65536, as ids are saved in 16 bits"
            sys.exit(f"error: --vocab_size {self.vocab_size} is impossible, {reason}")


def parse_flags():
    """Return the flags given on the command line, and only those, as a dict."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"error: {message}; --help lists every flag")
    parser.add_argument("--encode", metavar="TEXT", help="do not train: show the pieces and ids of a text")
    parser.add_argument("--decode", metavar="IDS", help='do not train: show the text of ids like "84 111"')
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.MULTILINE))
    for field in fields(Config):
        meaning = f"{comments.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", type=field.type, default=argparse.SUPPRESS, help=meaning)
    return vars(parser.parse_args())


# ---------------------------------------------- data ----------------------------------------------


def load_text(config):
    """Return the text to learn from; exits if it is missing, not UTF-8 or too short to split."""
    try:
        text = Path(config.data).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: cannot read {config.data} as UTF-8 text ({error}); name another file with --data")
    if len(text) < 2:
        sys.exit(f"error: there is no text in {config.data}; name another file with --data")
    return text


def text_files(data):
    """Return the files of a folder that can be read, by name, or the one file that `data` is."""
    path, kinds = Path(data), (".txt", *DOCUMENTS)
    files = sorted(file for file in path.rglob("*") if file.name.endswith(kinds)) if path.is_dir() else [path]
    if not data or not files or not files[0].exists():
        raise TokenizerError(f"--data {data} is no file and no folder with files {', '.join(kinds)}")
    return files


def read_text(path):
    """Yield a text file in pieces, each cut before a space that follows a word: no word is cut."""
    rest = ""
    try:
        with open(path, encoding="utf-8") as file:
            while more := file.read(PIECE):
                rest += more
                if cut := regex.search(r"(?r)(?<=\S)(?=\s)", rest):  # (?r): from the end
                    yield rest[: cut.start()]
                    rest = rest[cut.start() :]
                elif len(rest) > 2**24:  # no spaces in it
                    yield rest
                    rest = ""
        yield rest
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot read {path} as UTF-8 text ({error}); name another file with --data"
        raise TokenizerError(reason) from error


def read_documents(source):
    """Yield the documents of a file or of hf:NAME[:CONFIG] in pieces: (whether one begins here, text)."""
    try:
        if str(source).startswith("hf:"):  # streamed from the Hugging Face hub
            load = importlib.import_module("datasets").load_dataset
            rows = load(*source[3:].split(":"), split="train", streaming=True)
            yield from ((True, row["text"]) for row in rows)
        elif source.suffix == ".parquet":
            file = importlib.import_module("pyarrow.parquet").ParquetFile(source)
            for rows in file.iter_batches(1000, columns=["text"]):
                yield from ((True, text) for text in rows["text"].to_pylist())
        elif source.name.endswith(DOCUMENTS):
            path = source
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    source = f"line {number} of {path}"  # where an error is
                    yield True, json.loads(line)["text"] if line.strip() else ""
        else:
            yield from zip(chain([True], repeat(False)), read_text(source), strict=False)
    except TokenizerError:
        raise
    except ImportError as error:
        raise TokenizerError(f"{source} needs a package that is missing: pip install {error.name}") from error
    except Exception as error:  # whatever gzip, json, pyarrow or datasets raise
        raise TokenizerError(f"cannot read {source} ({error!r}); name another with --data") from error


def read_data(data):
    """Yield a file, a folder or hf:NAME[:CONFIG] in pieces: (split, whether a document begins here, text).

    Of a single text the last 10% are for validation, of documents the second and every hundredth after it.
    """
    sources = [data] if data.startswith("hf:") else text_files(data)
    if len(sources) == 1 and not data.startswith("hf:") and not sources[0].name.endswith(DOCUMENTS):
        cut = int(0.9 * sum(map(len, read_text(sources[0]))))
        for text in read_text(sources[0]):
            yield "train", False, text[: max(0, cut)]
            yield "val", False, text[max(0, cut) :]
            cut -= len(text)
        return
    number = -1
    for begins, text in chain.from_iterable(map(read_documents, sources)):
        if not isinstance(text, str | None):
            raise TokenizerError(f"the text of document {number + 2} in {data} is no text but {text!r:.100}")
        if text:
            number += begins
            yield "val" if number % 100 == 1 else "train", begins, text


def start_worker(make_tokenizer, vocab):
    """Make the tokenizer of all jobs that this process will do."""
    global worker_tokenizer
    worker_tokenizer = make_tokenizer(vocab)


def encode_job(pieces):
    """Encode pieces of read_data; return for each split its ids as bytes, 16 bits an id."""
    ids = {"train": [], "val": []}
    for split, begins, text in pieces:
        if begins and END_OF_TEXT in worker_tokenizer.special_tokens:
            ids[split].append(worker_tokenizer.special_tokens[END_OF_TEXT])
        ids[split] += worker_tokenizer.encode(text)
    return {split: np.array(ids[split], dtype=np.uint16).tobytes() for split in ids}


def encoding_jobs(data):
    """Yield lists of pieces for encode_job, each with at least PIECE characters but the last."""
    pieces, size = [], 0
    with tqdm(desc="encoding", unit="char", unit_scale=True, delay=1) as bar:
        for piece in read_data(data):
            pieces.append(piece)
            size += len(piece[-1])
            if size >= PIECE:
                yield pieces
                bar.update(size)
                pieces, size = [], 0
        yield pieces
        bar.update(size)


def begin_process(start, *args):
    """Call start(*args) in a new process, which Ctrl-C ends without a word, and the end of its parent too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    start(*args)


def on_all_cores(function, jobs, start, *args):
    """Like map, but in a process for each core, which begins with start(*args). A single job is done here.

    Few jobs wait at a time, so memory does not grow with the data.
    """
    first = list(islice(jobs, 2))
    if len(first) == 1:
        start(*args)
        yield function(first[0])
        return
    with ProcessPoolExecutor(initializer=begin_process, initargs=(start, *args)) as pool:
        pending = deque()
        for job in chain(first, jobs):
            pending.append(pool.submit(function, job))
            if len(pending) > 2 * os.cpu_count():
                yield pending.popleft().result()
        for job in pending:
            yield job.result()


def encode_data(data, make_tokenizer, vocab):
    """Encode what read_data yields into train.bin and val.bin, 16 bits an id; return the folder they are in.

    That is done once: its name in runs/tokens is a hash of the sources and of the vocabulary, which each
    process gives to make_tokenizer. It gets this name when all is written.
    """
    if len(make_tokenizer(vocab).vocab) > 65536:
        raise TokenizerError("there are more than 65536 ids in the vocabulary, and 16 bits hold no more")
    files = [] if data.startswith("hf:") else text_files(data)
    try:
        sources = [data, *((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)]
        key = hashlib.sha256(json.dumps([sources, vocab]).encode()).hexdigest()[:16]
        folder = Path("runs", "tokens", key)
        unfinished = folder.with_suffix(f".{os.getpid()}.tmp")
        if folder.exists():
            return folder
        unfinished.mkdir(parents=True, exist_ok=True)
        with open(unfinished / "train.bin", "wb") as train, open(unfinished / "val.bin", "wb") as val:
            for ids in on_all_cores(encode_job, encoding_jobs(data), start_worker, make_tokenizer, vocab):
                train.write(ids["train"])
                val.write(ids["val"])
        if not folder.exists():  # another process may have been faster
            unfinished.rename(folder)
        for old in folder.parent.glob(f"{key}.*.tmp"):  # this one, or what killed runs have left
            shutil.rmtree(old, ignore_errors=True)
        return folder
    except OSError as error:
        raise TokenizerError(f"cannot write ids to runs/tokens ({error})") from error


def write_file(path, content):
    """Write bytes to a temporary file, then rename: a write that is cut short harms nothing."""
    path = Path(path)
    path.with_suffix(".tmp").write_bytes(content)
    path.with_suffix(".tmp").replace(path)


# ---------------------------------------------- model ----------------------------------------------


class TokenizerError(ValueError):
    """A BPETokenizer, or a text to encode, is not what it should be; the text says why."""


class BPETokenizer:
    """Text to ids and back. What cannot be done raises a TokenizerError that says why.

    Ids 0 to 255 are the bytes, in the order of `alphabet`; then each merge makes one, such as "t h" the piece
    "th"; then come the special tokens. vocab[id] is the piece as bytes, names[id] the same made VISIBLE, and
    merges[x, y] the id of pieces x and y joined.
    """

    def __init__(self, merges=(), special_tokens=(), alphabet=ALPHABET):
        if sorted(alphabet) != sorted(ALPHABET):
            raise TokenizerError("the alphabet does not have each byte once")
        ids = {name: i for i, name in enumerate(alphabet)}
        self.merges = {}
        for merge in merges:
            x, _, y = merge.partition(" ")
            if x not in ids or y not in ids or x + y in ids:
                raise TokenizerError(f"the merge {merge!r} does not make a new piece of two known ones")
            self.merges[ids[x], ids[y]] = ids[x + y] = len(ids)
        if "" in special_tokens or len(set(special_tokens)) < len(special_tokens):
            raise TokenizerError("special tokens must not be empty or the same")
        self.special_tokens = {token: len(ids) + n for n, token in enumerate(special_tokens)}
        self.names = [*ids, *special_tokens]
        self.vocab = [bytes(BYTES[char] for char in name) for name in ids]
        self.vocab += [token.encode() for token in special_tokens]
        self.byte_ids = bytes(ids[char] for char in ALPHABET)
        self.encode_word = lru_cache(maxsize=2**16)(self.encode_word)  # text repeats its words

    @classmethod
    def train(cls, text, vocab_size, special_tokens=(), progress=False):
        """Learn a vocabulary of `vocab_size` ids in all from `text`."""
        n_merges = vocab_size - 256 - len(special_tokens)
        if n_merges < 0:
            raise TokenizerError(f"{vocab_size} ids are too few: there are 256 bytes and the special tokens")
        if not text:
            raise TokenizerError("there is no text to learn from")
        merges = islice(learn_merges(text), n_merges)
        merges = list(tqdm(merges, total=n_merges, unit="merge", disable=not progress))
        if len(merges) < n_merges:
            most = vocab_size - n_merges + len(merges)
            raise TokenizerError(
                f"{vocab_size} ids are too many: with {most} this text has no pair left to join"
            )
        return cls(merges, special_tokens)

    def encode_word(self, word):
        """One word to ids: of all pairs that can be joined, the one learned first, leftmost first."""
        get = self.merges.get
        try:
            word = word.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"half a character in the text: {error}") from error
        ids = [*word.translate(self.byte_ids), -1]  # -1 ends the word; ids[-1] is also left of it
        left, right = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))  # places of the neighbours
        heap = [(z, i) for i, pair in enumerate(pairwise(ids)) if (z := get(pair))]
        heapify(heap)
        while heap:
            z, i = heappop(heap)
            j = right[i]
            if get((ids[i], ids[j])) != z:
                continue  # out of date: one of the two was joined to another
            h, k = left[i], right[j]
            ids[i], ids[j], right[i], left[k] = z, -1, k, i
            if new := get((ids[h], z)):
                heappush(heap, (new, h))
            if new := get((z, ids[k])):
                heappush(heap, (new, i))
        return tuple([i for i in ids if i >= 0])

    def encode(self, text, allowed_special=()):
        """Text to ids. A special token in it is plain text unless `allowed_special` names it or is "all"."""
        allowed = set(self.special_tokens if allowed_special == "all" else allowed_special)
        if unknown := allowed - set(self.special_tokens):
            raise TokenizerError(f"there is no special token {min(unknown)!r} to allow")
        if not allowed:
            return list(chain.from_iterable(map(self.encode_word, SPLIT.findall(text))))
        ids = []
        longest_first = sorted(allowed, key=len, reverse=True)
        for part in regex.split(f"({'|'.join(map(regex.escape, longest_first))})", text):
            ids += [self.special_tokens[part]] if part in allowed else self.encode(part)
        return ids

    def decode(self, ids):
        """Ids to text; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        pieces = []
        for i in ids:
            if not 0 <= i < len(self.vocab):
                raise TokenizerError(f"the id {i} is outside the vocabulary, 0 to {len(self.vocab) - 1}")
            pieces.append(self.vocab[i])
        return b"".join(pieces).decode(errors="replace")

    def to_dict(self):
        """All that from_dict needs, in plain strings, lists and dicts: for a JSON file or a checkpoint."""
        return {
            "pattern": SPLIT.pattern,
            "special_tokens": dict(self.special_tokens),
            "alphabet": "".join(self.names[:256]),
            "merges": [f"{self.names[x]} {self.names[y]}" for x, y in self.merges],
        }

    @classmethod
    def from_dict(cls, state):
        """The reverse of to_dict."""
        try:
            tokenizer = cls(state["merges"], list(state["special_tokens"]), state["alphabet"])
        except (AttributeError, KeyError, TypeError) as error:
            raise TokenizerError(f"it is no vocabulary of {NAME} ({error!r})") from error
        if tokenizer.to_dict() != state:
            raise TokenizerError(f"its pattern or special tokens are not those that {NAME} would write")
        return tokenizer

    def save(self, path):
        """Write to_dict() to a JSON file, for load and for people to read."""
        write_file(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False).encode())

    @classmethod
    def load(cls, path):
        """Read what save wrote, or a folder with GPT-2's two files under either of their usual names."""
        if Path(path).is_dir():
            old = Path(path, "encoder.json").exists()
            names = ("encoder.json", "vocab.bpe") if old else ("vocab.json", "merges.txt")
            return cls.from_gpt2(*(Path(path, name) for name in names))
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:  # missing, not UTF-8, not JSON, or not a vocabulary
            raise TokenizerError(f"no vocabulary in {path} ({error}); make one: python {NAME}.py") from error

    @classmethod
    def from_gpt2(cls, encoder_json, vocab_bpe):
        """Read the two files that OpenAI published with GPT-2, or such files of other special tokens."""
        try:
            ids = json.loads(Path(encoder_json).read_text(encoding="utf-8"))
            lines = Path(vocab_bpe).read_text(encoding="utf-8").split("\n")
            merges = [line for line in lines[1:] if line]  # the first is the version
            names = sorted(ids, key=ids.get)
            special_tokens = [name for name in names if regex.fullmatch(r"<\|\w+\|>", name)]
            tokenizer = cls(merges, special_tokens, "".join(names[:256]))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise TokenizerError(f"no vocabulary in {encoder_json} and {vocab_bpe} ({error})") from error
        if {name: i for i, name in enumerate(tokenizer.names)} != ids:
            raise TokenizerError(f"{encoder_json} and {vocab_bpe} do not belong together")
        return tokenizer


# -------------------------------------------- training --------------------------------------------


def learn_merges(text):
    """Yield merges such as "t h": always the most frequent pair, of equals the one that is first in `text`.

    Each different word is kept once, with its count, and all stand in one row of ids. A merge visits only the
    places where its pair stands, and corrects the counts of the pairs around them.
    """
    ids, weights = [], []
    for word, count in Counter(SPLIT.findall(text)).items():
        ids += [*word.encode(), -1]  # -1 ends a word; ids[-1] is also left of the first
        weights += [count] * (len(ids) - len(weights))
    left, right = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))  # places of the neighbours
    counts, places = defaultdict(int), defaultdict(deque)  # of each pair; places that are taken stay listed
    for i, pair in enumerate(pairwise(ids)):
        if -1 not in pair:
            counts[pair] += weights[i]
            places[pair].append(i)

    def entry(pair):
        """What the heap sorts by: the count, then the first place. With time both can only get worse."""
        while (ids[i := places[pair][0]], ids[right[i]]) != pair:
            places[pair].popleft()
        return -counts[pair], i, pair

    names = list(ALPHABET)
    heap = [entry(pair) for pair in counts]
    heapify(heap)
    while heap:
        count, _, pair = heappop(heap)
        if counts[pair] != -count:  # out of date: other merges have taken some of its places
            if counts[pair]:
                heappush(heap, entry(pair))
            continue
        x, y = pair
        z = len(names)
        names.append(names[x] + names[y])
        yield f"{names[x]} {names[y]}"
        found = set()
        for i in places.pop(pair):
            j = right[i]
            if ids[i] != x or ids[j] != y:
                continue  # taken
            h, k = left[i], right[j]
            ids[i], ids[j], right[i], left[k] = z, -1, k, i
            if (before := ids[h]) >= 0:
                counts[before, x] -= weights[i]
                counts[before, z] += weights[i]
                places[before, z].append(h)
                found.add((before, z))
            if (after := ids[k]) >= 0:
                counts[y, after] -= weights[i]
                counts[z, after] += weights[i]
                places[z, after].append(i)
                found.add((z, after))
        del counts[pair]
        for new in found:
            if counts[new]:
                heappush(heap, entry(new))


def report(train_text, val_text):
    """Print how long both texts are in characters, and in ids of vocabularies learned from the first."""
    lengths = {"characters": (len(train_text), len(val_text))}
    merges = list(islice(learn_merges(train_text), 8192 - 256))
    for vocab_size in (256, 512, 1024, 2048, 4096, 8192):
        if vocab_size <= 256 + len(merges):
            tokenizer = BPETokenizer(merges[: vocab_size - 256])  # a large vocabulary begins with a small one
            lengths[vocab_size] = len(tokenizer.encode(train_text)), len(tokenizer.encode(val_text))
    print(f"{'vocabulary':>12}{'train ids':>12}{'chars per id':>14}{'val ids':>12}{'chars per id':>14}")
    for name, (train, val) in lengths.items():
        print(f"{name:>12}{train:>12,}{len(train_text) / train:>14.4f}{val:>12,}{len(val_text) / val:>14.4f}")


# -------------------------------------------- sampling --------------------------------------------

EXAMPLES = (
    "First Citizen: Before we proceed any further, hear me speak.",
    "In 2024 the tokenizer didn't know this sentence.",
    "Naïve café 🙂",
)


def show(tokenizer, text):
    """Print a text, its pieces with a bar between two of them, and their ids."""
    ids = tokenizer.encode(text)
    # A piece may be only a part of a character: such bytes are printed like \xc3.
    pieces = "|".join(tokenizer.vocab[i].decode(errors="backslashreplace") for i in ids)
    print(f"{'text':>8}  {text}\n{'pieces':>8}  {pieces}\n{'ids':>8}  {' '.join(map(str, ids))}\n")


def convert(tokenizer, text, ids):
    """Print the ids of `text`, the text of `ids`, or both; None means not asked for, and empty is refused."""
    if text is not None:
        if not text:
            sys.exit("error: --encode needs a text that is not empty")
        show(tokenizer, text)
    if ids is not None:
        if not re.fullmatch(r"\d{1,18}([\s,]+\d{1,18})*", ids.strip()):
            sys.exit(f'error: --decode needs ids like "84 111", not {ids!r}')
        print(tokenizer.decode([int(number) for number in re.findall(r"\d+", ids)]))


# ---------------------------------------------- main ----------------------------------------------


def find_vocabulary(config, named):
    """Return the file of config.vocab_size ids; if it is missing and no size was `named`, the only one."""
    path = Path(config.out_dir, f"bpe_vocab_{config.vocab_size}.json")
    others = sorted(Path(config.out_dir).glob("bpe_vocab_*.json"))
    if path in others or not others:
        return path
    if len(others) == 1 and not named:
        return others[0]
    there = ", ".join(other.name for other in others)
    sys.exit(f"error: there is no {path}, only {there}; name a size with --vocab_size")


def main():
    flags = parse_flags()
    to_encode, to_decode = flags.pop("encode", None), flags.pop("decode", None)
    config = Config(**flags)
    if to_encode is not None or to_decode is not None:
        if "data" in flags:
            sys.exit("error: --encode and --decode read no --data: leave it out")
        tokenizer = BPETokenizer.load(find_vocabulary(config, named="vocab_size" in flags))
        return convert(tokenizer, to_encode, to_decode)

    text = load_text(config)
    splits = {"train": text[: int(0.9 * len(text))], "val": text[int(0.9 * len(text)) :]}
    try:
        Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: cannot write to {config.out_dir} ({error}); name another folder with --out_dir")
    tokenizer = BPETokenizer.train(splits["train"], config.vocab_size, progress=True)
    tokenizer.save(Path(config.out_dir, f"bpe_vocab_{config.vocab_size}.json"))
    for name, split in splits.items():
        ids = np.array(tokenizer.encode(split), dtype=np.uint16)
        np.save(file := io.BytesIO(), ids)
        write_file(Path(config.out_dir, f"{name}_ids_{config.vocab_size}.npy"), file.getvalue())
        print(f"{name:>8}  {len(ids):,} ids, {len(split) / len(ids):.4f} characters per id")
    print(f"{'files in':>8}  {config.out_dir}\n")
    for example in EXAMPLES:
        show(tokenizer, example)
    report(splits["train"], splits["val"])


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # the stdout of IDLE and of some notebooks is no file
        sys.stdout.reconfigure(encoding="utf-8")  # a piece can be any text, whatever the console's default
    try:
        main()
    except TokenizerError as error:
        sys.exit(f"error: {error}")
