"""Time bpe_tokenizer.py beside other tokenizers on input.txt: python tests/bench_bpe.py [--store]

Run by hand. Peers that are not installed are left out: tiktoken, tokenizers and rustbpe are on PyPI, minbpe
is a folder of its repository that PYTHONPATH must lead to. All of them split text by GPT-2's pattern. Shown
are the least and median time of some repeats. With --store they go to logs/results.json, for week 5's log.
"""

import gc
import importlib
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from common import store  # noqa: E402

from bpe_tokenizer import BYTES, SPLIT, BPETokenizer  # noqa: E402

TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")
OURS = {vocab_size: BPETokenizer.train(TEXT, vocab_size) for vocab_size in (512, 8192)}
REPEATS, ENOUGH = 9, 10  # stop after so many repeats, or so many seconds

# Each contestant prepares two functions to be timed, anew for each repeat so that nothing is cached: one that
# trains and returns the pieces as bytes, and one that encodes TEXT with our merges. None: it cannot do that.


def bpe_tokenizer(_, vocab_size):
    tokenizer = BPETokenizer.from_dict(OURS[vocab_size].to_dict())
    return lambda: BPETokenizer.train(TEXT, vocab_size).vocab, lambda: tokenizer.encode(TEXT)


def minbpe(library, vocab_size):
    tokenizer = library.RegexTokenizer(SPLIT.pattern)
    tokenizer.merges = OURS[vocab_size].merges

    def train():
        tokenizer.train(TEXT, vocab_size)
        return list(tokenizer.vocab.values())

    return train if vocab_size <= 512 else None, lambda: tokenizer.encode_ordinary(TEXT)


def tiktoken(library, vocab_size):
    ranks = {piece: i for i, piece in enumerate(OURS[vocab_size].vocab)}
    encoding = library.Encoding("ours", pat_str=SPLIT.pattern, mergeable_ranks=ranks, special_tokens={})
    return None, lambda: encoding.encode_ordinary(TEXT)


def tokenizers(library, vocab_size):
    names, merges = OURS[vocab_size].names, OURS[vocab_size].merges
    vocab = {name: i for i, name in enumerate(names)}
    learner = library.Tokenizer(library.models.BPE())
    encoder = library.Tokenizer(library.models.BPE(vocab, [(names[x], names[y]) for x, y in merges]))
    split = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.pre_tokenizer = encoder.pre_tokenizer = split
    settings = dict(vocab_size=vocab_size, initial_alphabet=split.alphabet(), show_progress=False)

    def train():
        learner.train_from_iterator([TEXT], library.trainers.BpeTrainer(**settings))
        return [bytes(BYTES[char] for char in name) for name in learner.get_vocab()]

    return train, lambda: encoder.encode(TEXT).ids


def rustbpe(library, vocab_size):
    tokenizer = library.Tokenizer()

    def train():
        tokenizer.train_from_iterator([TEXT], vocab_size, pattern=SPLIT.pattern)
        return [bytes(piece) for piece, _ in tokenizer.get_mergeable_ranks()]

    return train, None


def main():
    figures = {"cores": os.cpu_count(), "python": ".".join(map(str, sys.version_info[:3]))}
    print(f"{'':>14}{'task':>8}{'ids':>7}{'least':>10}{'median':>10}{'repeats':>9}   same as ours")
    for contestant in (bpe_tokenizer, minbpe, tiktoken, tokenizers, rustbpe):
        name = contestant.__name__
        try:
            library = importlib.import_module(name)
        except ImportError:
            print(f"{name:>14}  is not installed")
            continue
        for task, vocab_size in [(task, size) for task in ("train", "encode") for size in OURS]:
            times = []
            while len(times) < REPEATS and sum(times) < ENOUGH:
                function = contestant(library, vocab_size)[task == "encode"]
                if function is None:
                    break
                gc.collect()
                start = time.perf_counter()
                result = function()
                times.append(time.perf_counter() - start)
            if times:
                if task == "train":
                    same = len(set(result) & set(OURS[vocab_size].vocab))
                else:
                    same = sum(a == b for a, b in zip(result, OURS[vocab_size].encode(TEXT), strict=True))
                row = {"least": min(times), "median": statistics.median(times), "repeats": len(times)}
                figures.setdefault(name, {})[f"{task}_{vocab_size}"] = row | {"same": same / len(result)}
                columns = f"{row['least']:>10.3f}{row['median']:>10.3f}{len(times):>9}"
                print(
                    f"{name:>14}{task:>8}{vocab_size:>7}{columns}   {same:,} of {len(result):,}", flush=True
                )
    if "--store" in sys.argv:
        store("week_5", "bench", figures)


if __name__ == "__main__":
    main()
