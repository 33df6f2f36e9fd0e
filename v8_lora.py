"""v8, week 9: following instructions: fine-tuning in full, LoRA, QLoRA. A model that answers.

A base model goes on with any text. Shown thousands of examples of question and answer it learns to answer,
and to stop (Ouyang et al. 2022). LoRA (Hu et al. 2021) trains a few numbers beside each frozen matrix, QLoRA
(Dettmers et al. 2023) does so on a base of 4 bits. The examples are made from the plays, or read from a file.

Since v7_quantize.py
  added:    LONGEST, LoRALinear, METHODS, MODEL, NF4, NF4Linear, SpecialRows, Unpacked, adapt, answer,
            batches, bits_per_char, chat, encode_chat, encode_examples, encode_prompt, find_base, fit_window,
            grow, hash_of, invent_name, learned, load_adapter, load_tasks, load_val, make_examples,
            make_folder, make_model, make_optimizer, make_reading, measure, merge, pad, peak_memory,
            print_numbers, read_instructions, read_speeches, refuse_idle, show_answers, some_words, to_text,
            windows
  changed:  CharTokenizer, Config, MAY_CHANGE, SAMPLING, evaluate, generate, get_batch, keep_finished,
            load_checkpoint, main, make_tokenizer, parse_flags, report, save_checkpoint, save_report, train
  removed:  FloatLinear, Int4Linear, Int8Linear, KINDS, QUANTIZING, QuantizedLinear, VOCAB_TEXT,
            decoding_speed, find_model, load_model, load_splits, make_optimizers, memory_bandwidth, new_vocab,
            quantize

Result: 100.0% of new names right, before 0.0%; plain text 3.09 bits/char, 155 s on 2 CPU cores.

Run it with: python v8_lora.py, or with --help to see every flag.
"""

import argparse
import copy
import ctypes
import hashlib
import inspect
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends the program, also while torch loads
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")  # of kernels: some for each length

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from bpe_tokenizer import BPETokenizer, TokenizerError, encode_data, read_data

# --------------------------------------------- config ---------------------------------------------

NAME = Path(__file__).stem
SAMPLING = ("device", "seed", "greedy", "temperature", "top_k", "top_p", "prompt", "max_new_tokens")
SAMPLING += ("stream", "context")
TRAINING = ("max_steps", "learning_rate", "warmup_steps", "lr_floor", "grad_clip", "eval_interval")
TRAINING += ("dropout", "beta2", "weight_decay", "precision")
MODEL = ("tokenizer", "vocab_size", "block_size", "n_embd", "n_head", "n_layer", "init_std", "position")
METHODS = ("full", "lora", "qlora")
# Fields that a flag may change when a saved model is loaded; all others stay as they were in its training.
MAY_CHANGE = {"evaluate": ("device",), "sample": SAMPLING, "chat": tuple({*SAMPLING} - {"prompt"})}
MAY_CHANGE["resume"] = (*SAMPLING, *TRAINING, "base")
LONGEST = 150  # characters of a speech that an example is made from: long ones take long and teach the same
SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|context|>")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Config:
    """Every field is a command-line flag of the same name: --max_steps 500."""

    data: str = "input.txt"  # plays that examples are made from, and text to measure what was forgotten
    instructions: str = ""  # .jsonl of your own examples, in OpenAI's or Alpaca's form, not the plays
    base: str = "auto"  # folder of a trained model; auto: runs/v6_amp_ddp, trained first if there is none
    adapter: str = ""  # to answer with: an adapter.pt of lora or qlora, put on --base
    out_dir: str = f"runs/{NAME}"  # folder for the checkpoint, the adapter, metrics, pictures and answers
    method: str = "full"  # full: all weights learn; lora: a few beside them; qlora: lora on a 4-bit base
    lora_rank: int = 8  # rows of A and columns of B, an adapter's two matrices
    lora_alpha: float = 16.0  # what an adapter adds is multiplied by lora_alpha / lora_rank
    lora_targets: str = "qkv,proj,mlp.0,mlp.2"  # the linear layers of a block that get an adapter
    n_examples: int = 48_000  # examples made from the plays
    n_passages: int = 1  # passages in a reading example, one of which has the answer
    renamed: float = 0.75  # share of the reading examples whose names are invented
    device: str = "auto"  # auto, cuda, mps or cpu
    precision: str = "auto"  # of products in training: fp32, bf16, or auto: bf16 where hardware has it
    seed: int = 1337  # same seed on the same machine: same numbers
    tokenizer: str = "bpe"  # of the base, and so are the next seven: no flag can change them
    vocab_size: int = 1024  # ids, special tokens included
    block_size: int = 256  # tokens that the model looks back at (T)
    n_embd: int = 192  # numbers in an embedding (C)
    n_head: int = 8  # attention heads, each n_embd / n_head wide
    n_layer: int = 4  # transformer blocks
    init_std: float = 0.1  # standard deviation of the matrices before training
    position: str = "rope"  # learned or rope
    batch_size: int = 16  # examples in a step (B)
    dropout: float = 0.0  # share of activations set to zero in training
    max_steps: int = 3000  # optimizer steps
    learning_rate: float = 0.003  # peak step size
    warmup_steps: int = 100  # steps in which the step size rises to its peak
    lr_floor: float = 0.0  # share of the peak step size that is left in the last step
    beta2: float = 0.99  # share of AdamW's mean of squared gradients that a step keeps
    weight_decay: float = 0.0  # pull of all that learns towards zero
    grad_clip: float = 1.0  # a gradient with a larger Euclidean norm is scaled down to it
    eval_interval: int = 500  # steps between two estimates of the loss, with a checkpoint each
    greedy: bool = False  # always sample the likeliest token
    temperature: float = 1.0  # below 1: safer samples, above 1: bolder ones
    top_k: int = 0  # sample among the k likeliest tokens; 0: among all
    top_p: float = 1.0  # sample among the likeliest that together reach this probability
    prompt: str = "Good morrow, cousin.\\nAnswer as ROMEO."  # what the model is asked, \n is a new line
    context: str = ""  # a passage that the prompt asks about, \n is a new line
    max_new_tokens: int = 100  # tokens in an answer, at most
    stream: bool = False  # print the answer while it is written

    def __post_init__(self):
        may_be_zero = ("seed", "warmup_steps", "lr_floor", "dropout", "weight_decay", "top_k", "renamed")
        for name, value in vars(self).items():
            if type(value) in (int, float):  # bool and str can be anything
                limit = 2**31 if type(value) is int else math.inf
                if not (0 < value < limit or (value == 0 and name in may_be_zero)):
                    reason = f"it must be positive and below {limit}, or 0 for: {', '.join(may_be_zero)}"
                    sys.exit(f"error: --{name} {value} is impossible, {reason}")
        if self.dropout >= 1 or self.beta2 >= 1 or self.top_p > 1 or self.renamed > 1:
            sys.exit("error: --dropout and --beta2 must be below 1, --top_p and --renamed at most 1")
        if self.greedy and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            sys.exit("error: --greedy takes --temperature 1 --top_k 0 --top_p 1 only; --no-greedy draws")
        if self.n_examples < 2:
            sys.exit("error: --n_examples must be at least 2, a question and a reply")
        if self.n_embd % self.n_head:
            sys.exit(f"error: --n_embd {self.n_embd} is not a multiple of --n_head {self.n_head}")
        choices = {"position": ("learned", "rope"), "method": METHODS}
        for name, known in (choices | {"precision": ("auto", *PRECISIONS)}).items():
            if getattr(self, name) not in known:
                sys.exit(f"error: no --{name} {getattr(self, name)}, choose from: {', '.join(known)}")
        targets = ("qkv", "proj", "mlp.0", "mlp.2")
        if not set(self.lora_targets.split(",")) <= set(targets):
            sys.exit(f"error: no --lora_targets {self.lora_targets}, some of: {','.join(targets)}")


def parse_flags():
    """Return the mode and, as a dict, the flags given on the command line and only those."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"error: {message}; --help lists every flag")
    modes = parser.add_mutually_exclusive_group()
    mode = {"dest": "mode", "action": "store_const", "default": "train"}
    modes.add_argument("--sample", **mode, const="sample", help="no training: answer the prompt")
    modes.add_argument("--chat", **mode, const="chat", help="no training: a conversation in the terminal")
    modes.add_argument("--evaluate", **mode, const="evaluate", help="no training: measure the saved model")
    meaning = "go on from the last checkpoint; with more --max_steps the step size rises again"
    modes.add_argument("--resume", **mode, const="resume", help=meaning)
    # --help shows the comment beside each field of Config
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.MULTILINE))
    for field in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        meaning = f"{comments.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", **kind, default=argparse.SUPPRESS, help=meaning)
    flags = vars(parser.parse_args())
    if flags["mode"] == "chat" and "prompt" in flags:
        sys.exit("error: --chat asks you for each prompt; leave out --prompt, or take --sample for one reply")
    return flags.pop("mode"), flags


def pick_device(name):
    """Return the device of that name; `auto` is CUDA or MPS where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    available = [accelerator.type, "cpu"] if accelerator else ["cpu"]
    if name not in ["auto", *available]:
        sys.exit(f"error: there is no --device {name} here, choose from: auto, {', '.join(available)}")
    return available[0] if name == "auto" else name


def pick_precision(name, device):
    """Return the name of a precision that `device` computes in; auto is bf16 where it has hardware for it."""
    if name == "auto":
        cpu = torch.cpu.get_capabilities()
        fast = {"cpu": cpu.get("avx512_bf16") or cpu.get("amx_bf16")}
        fast["cuda"] = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if fast.get(device) else "fp32"
    try:
        x = torch.ones(16, 16, device=device, dtype=PRECISIONS[name])
        (x @ x).sum().item()
    except (RuntimeError, TypeError) as error:
        sys.exit(f"error: --device {device} cannot compute in --precision {name} ({error})")
    return name


# ---------------------------------------------- data ----------------------------------------------


class CharTokenizer:
    """Characters to ids and back: a token is a character, an id a place in the vocabulary.

    The vocabulary is a string, or a list of characters and special tokens.
    """

    def __init__(self, vocab):
        self.vocab, self.ids = vocab, {piece: i for i, piece in enumerate(vocab)}
        self.special_tokens = {piece: i for piece, i in self.ids.items() if len(piece) > 1}

    def encode(self, text):
        """Text to a list of ids; exits on a character that the vocabulary lacks."""
        try:
            return [self.ids[char] for char in text]
        except KeyError as error:
            sys.exit(f"error: the vocabulary lacks the character {error}; change --prompt or --data")

    def decode(self, ids):
        """List of ids to text."""
        return "".join(self.vocab[i] for i in ids)


def make_tokenizer(vocab):
    """Return the tokenizer of a vocabulary: of characters, or what BPETokenizer.to_dict returns."""
    return (BPETokenizer.from_dict if isinstance(vocab, dict) else CharTokenizer)(vocab)


def read_speeches(text):
    """All (NAME, speech) of plays in which a line NAME: stands above each speech."""
    return re.findall(r"(?:^|\n\n)([A-Z][A-Za-z' -]{1,30}):\n(\S.*?)(?=\n\n|\s*\Z)", text, flags=re.DOTALL)


def invent_name(words, names, known, rng):
    """A name that nobody in `known` has: one to three words, ends of words or ends of names, joined.

    A name is copied token by token, so each token should have been part of a name.
    """
    parts = []
    for _ in range(rng.randint(1, 3)):
        part, kind = rng.choice(words), rng.randrange(3)
        part = rng.choice(names) if kind == 2 else part
        parts.append(part[rng.randrange(len(part)) if kind else 0 :])
    name = rng.choice(("", " ", "-")).join(parts)[:24].strip(" '-")
    name = name.upper() if rng.random() < 0.5 else name.title()
    return invent_name(words, names, known, rng) if name in {"", *known} else name


def some_words(speech, rng):
    """Four to seven consecutive words of a speech."""
    words, n = speech.split(), rng.randint(4, 7)
    start = rng.randrange(max(1, len(words) - n + 1))
    return " ".join(words[start : start + n])


def make_reading(passages, i, rng):
    """The conversation that asks who speaks in passage i of `passages`, pairs (NAME, speech)."""
    context = "\n\n".join(f"{name}:\n{speech}" for name, speech in passages)
    name, speech = passages[i]
    return [("context", context), ("user", f"Who says: {some_words(speech, rng)}?"), ("assistant", name)]


def make_examples(speeches, n, config, rng, renamed, known=()):
    """Two lists of n conversations each, made from (NAME, speech) pairs: who says this, and what comes next.

    A conversation is a list of (role, text). In a share `renamed` of the first the names are invented: of a
    play's few names a model learns each by heart, of thousands it learns to copy. Names in `known` are not
    asked for.
    """
    short = [
        (name, speech) for name, speech in speeches if len(speech) <= LONGEST and len(speech.split()) >= 4
    ]
    asked = [(name, speech) for name, speech in short if name not in known]
    words = [word for _, speech in short for word in re.findall(r"[A-Za-z]{3,}", speech)]
    names = [name for name, _ in short]
    turns = [(a, b) for a, b in pairwise(speeches) if max(len(a[1]), len(b[1])) <= LONGEST]
    if not asked or not turns:
        sys.exit(
            f"error: --data {config.data} has no speeches under lines such as JULIET: ; use --instructions"
        )

    readings, replies = [], []
    for _ in range(n):
        passages, i = [rng.choice(short) for _ in range(config.n_passages)], rng.randrange(config.n_passages)
        passages[i] = rng.choice(asked)
        if rng.random() < renamed:
            passages = [(invent_name(words, names, known, rng), speech) for _, speech in passages]
        readings.append(make_reading(passages, i, rng))
        (_, speech), (name, reply) = rng.choice(turns)
        replies.append([("user", f"{speech}\nAnswer as {name}."), ("assistant", reply)])
    return readings, replies


def read_instructions(path):
    """Read conversations from a .jsonl file, each line an OpenAI "messages" or an Alpaca record."""
    conversations, roles = [], {"system": "context", "user": "user", "assistant": "assistant"}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: cannot read --instructions {path} ({error})")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "messages" in record:
                turns = [(roles[turn["role"]], turn["content"]) for turn in record["messages"]]
            else:
                turns = [("context", record["input"])] if record.get("input") else []
                turns += [("user", record["instruction"]), ("assistant", record["output"])]
            if not all(isinstance(text, str) and text for _, text in turns):
                raise ValueError("a text is missing, empty or no string")
            "".join(text for _, text in turns).encode()  # half a character is no text
            if [role for role, _ in turns][-2:] != ["user", "assistant"]:
                raise ValueError("it must end with a turn of the user and one of the assistant")
            conversations.append(turns)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{error} is missing, or no role" if isinstance(error, KeyError) else str(error)
            sys.exit(f"error: line {number} of {path} is no example ({reason})")
    if len(conversations) < 2:
        sys.exit(f"error: there are fewer than two examples in --instructions {path}")
    return conversations


def encode_chat(turns, tokenizer):
    """A list of (role, text) to ids and, for each, whether the model is to learn to write it: its answers.

    A turn is its role's special token and its text, an answer also <|endoftext|>. A special token that is
    written out in a text is plain text: nobody can end a turn by what they say.
    """
    ids, learned = [], []
    for role, text in turns:
        is_answer = role == "assistant"
        new = tokenizer.encode(text) + [tokenizer.special_tokens[SPECIAL_TOKENS[0]]] * is_answer
        ids += [tokenizer.special_tokens[f"<|{role}|>"], *new]
        learned += [False] + [is_answer] * len(new)
    return ids, learned


def encode_prompt(turns, tokenizer):
    """The ids of a conversation that the model is to go on with: an answer has begun."""
    return encode_chat(turns, tokenizer)[0] + [tokenizer.special_tokens["<|assistant|>"]]


def to_text(ids, tokenizer):
    """The text of an answer's ids, without its end."""
    return tokenizer.decode([i for i in ids if i != tokenizer.special_tokens[SPECIAL_TOKENS[0]]])


def encode_examples(conversations, tokenizer, config):
    """The encoded conversations that fit the window, shortest first: neighbours fill a batch."""
    examples = [encode_chat(turns, tokenizer) for turns in conversations]
    return sorted((e for e in examples if len(e[0]) <= config.block_size + 1), key=lambda e: len(e[0]))


def load_tasks(config, tokenizer):
    """What to learn from, "stages" and "val", and what to measure with, "exam" and "replies".

    A stage is a list of encoded examples. From the plays there are two: questions about a passage alone, then
    with replies among them (a curriculum, Bengio et al. 2009). The exam asks for names that stand above no
    speech that is learned from. All but the stages is held out.
    """
    rng = random.Random(config.seed)
    if config.instructions:
        conversations = read_instructions(config.instructions)
        random.Random(0).shuffle(conversations)  # one split for all seeds
        cut = max(1, len(conversations) // 10)
        held_out, stages, exam = conversations[:cut], [conversations[cut:]], []
    else:
        splits = {"train": "", "val": ""}
        for split, _, text in read_data(config.data):
            splits[split] += text
        speeches = {split: read_speeches(text) for split, text in splits.items()}
        names = {split: {name for name, _ in found} for split, found in speeches.items()}
        n, asked = config.n_examples // 2, names["val"] - names["train"]
        readings, replies = make_examples(speeches["train"], n, config, rng, config.renamed, asked)
        stages = [readings, readings + replies]
        rng = random.Random(0)  # one exam for all seeds
        exam, held_out = make_examples(speeches["val"], 500, config, rng, 0.0, names["train"])
    found = {"stages": [encode_examples(stage, tokenizer, config) for stage in stages]}
    found |= {"val": encode_examples(exam + held_out, tokenizer, config), "exam": exam, "replies": held_out}
    if not all([*found["stages"], found["val"]]):
        window = f"the base's window of {config.block_size} tokens"
        sys.exit(f"error: nothing to learn from, or nothing to measure with, fits {window}")
    if dropped := len(stages[-1]) - len(found["stages"][-1]):
        print(f"note: {dropped:,} of {len(stages[-1]):,} examples are longer than the window and left out")
    return found


def load_val(config, vocab):
    """Return the ids (N,) of the plain text to measure on, in a file that is mapped, not read."""
    path = encode_data(config.data, make_tokenizer, vocab) / "val.bin"
    n = path.stat().st_size // 2  # 16 bits an id
    if n < 2:
        sys.exit(f"error: {config.data} is too short: there is nothing to measure on")
    return torch.from_file(str(path), shared=True, size=n, dtype=torch.uint16)


def pad(examples):
    """Encoded examples to inputs and targets, both (B, T); -100 marks a target that is not learned."""
    ids, learned = (pad_sequence([torch.tensor(e[i]) for e in examples], batch_first=True) for i in (0, 1))
    return ids[:, :-1], ids[:, 1:].masked_fill(~learned[:, 1:], -100)


def get_batch(examples, config):
    """Draw neighbours in length from sorted `examples`; return inputs and targets, both (B, T).

    Of one length questions come before replies, so most batches are of one kind.
    """
    start = torch.randint(max(1, len(examples) - config.batch_size + 1), ()).item()
    return pad(examples[start : start + config.batch_size])


def batches(examples):
    """All examples as batches, for evaluate."""
    return (pad(examples[i : i + 64]) for i in range(0, len(examples), 64))


def windows(ids, config):
    """All of a text's ids (N,) as batches of consecutive windows, every token predicted once."""
    starts = torch.arange(0, len(ids) - 1, config.block_size)
    for first in starts.split(8):
        at = first[:, None] + torch.arange(config.block_size + 1)  # (B, T + 1)
        x = ids[at.clamp(max=len(ids) - 1)].long()
        yield x[:, :-1], x[:, 1:].masked_fill(at[:, 1:] >= len(ids), -100)  # the last window is not full


# ---------------------------------------------- model ----------------------------------------------


def rope_rotation(places, config):
    """For places (..., T) cosines and sines (2, ..., T, head_size), half of the sines with a minus."""
    D = config.n_embd // config.n_head
    frequencies = 10_000 ** (-torch.arange(0, D, 2, device=places.device) / D)
    angles = places[..., None] * frequencies  # (..., T, D / 2) in radians
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])


def apply_rope(x, rotation):
    """RoPE (Su et al. 2021): turn each pair (x_i, x_{i + D/2}) of x (B, n_head, T, D) by its place's angle i.

    (a, b) becomes (a cos - b sin, b cos + a sin). A query's dot product with a key then depends on their
    positions only by the distance. The pairs are those of GPT-NeoX and of LLaMA in transformers; the paper
    and Meta's LLaMA pair neighbours.
    """
    cos, sin = rotation
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin  # rolled by half, each meets its partner


class KVCache:
    """Keys and values of the tokens that a model has read, in rows that each have a length of their own.

    A token's keys and values depend on no later token, so they are computed once and kept (Shazeer 2019).
    All of the memory is taken at the start: block_size tokens for each row.
    """

    def __init__(self, model, n_rows):
        config, device = model.config, model.norm.weight.device
        shape = (config.n_layer, 2, n_rows, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.kv = torch.zeros(shape, device=device)
        self.lengths = torch.zeros(n_rows, dtype=torch.long, device=device)  # tokens that each row has

    def part(self, start, end):
        """A cache of the rows from `start` to before `end` alone, in the same memory."""
        part = copy.copy(self)
        part.kv, part.lengths = self.kv[:, :, start:end], self.lengths[start:end]
        return part

    def make_room(self, T):
        """Where T more tokens will be in each row: their places (B, T), from 0."""
        device = self.lengths.device
        self.rows = torch.arange(len(self.lengths), device=device)[:, None]
        self.places = self.lengths[:, None] + torch.arange(T, device=device)
        self.end = self.places.max().item() + 1  # of the longest row
        # A token looks at what its row has up to itself: (B, 1, T, end).
        self.mask = (torch.arange(self.end, device=device) <= self.places[..., None])[:, None]
        return self.places

    def extend(self, layer, k, v):
        """Keep k and v (B, n_head, T, head_size) of new tokens; return all, (B, n_head, end, head_size)."""
        kv = self.kv[layer]  # (2, B, n_head, block_size, head_size)
        kv.transpose(2, 3)[:, self.rows, self.places] = torch.stack([k, v]).transpose(2, 3)
        return kv[:, :, :, : self.end]


class MultiHeadAttention(nn.Module):
    """Causal self-attention, all heads in one matrix product and one fused kernel."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, rotation, cache=None, layer=0):
        """(B, T, C) to (B, T, C); `rotation` is that of rope_rotation or None; `cache` has earlier tokens."""
        qkv = self.qkv(x).unflatten(2, (3, self.config.n_head, -1))  # (B, T, 3, n_head, head_size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, head_size)
        if rotation is not None:
            q, k = apply_rope(q, rotation), apply_rope(k, rotation)
        mask = None
        if cache is not None:
            (k, v), mask = cache.extend(layer, k, v), cache.mask
        # scale, mask, softmax, weighted sum
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.proj(x.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Pre-LN block (Xiong et al. 2020): attention, then an MLP, each added to what came in."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd)
        self.attention = MultiHeadAttention(config)
        self.norm2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.n_embd, config.n_embd),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotation, cache=None, layer=0):
        """(B, T, C) to (B, T, C)."""
        x = x + self.dropout(self.attention(self.norm1(x), rotation, cache, layer))
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x


class LanguageModel(nn.Module):
    """Token (and position) embeddings, n_layer transformer blocks, a last norm, logits."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([TransformerBlock(config) for _ in range(config.n_layer)])
        self.norm = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.init_std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for block in self.blocks:  # 2 * n_layer of these add up: smaller terms keep the size of the sum
            for last in (block.attention.proj, block.mlp[2]):
                nn.init.normal_(last.weight, std=config.init_std / math.sqrt(2 * config.n_layer))

    def hidden_states(self, idx, cache=None):
        """Token ids (B, T) to what the last norm puts out (B, T, C); they follow those that a `cache` has."""
        x = self.embed(idx)  # (B, T, C)
        T, rotation = idx.shape[1], None
        places = torch.arange(T, device=idx.device)[None] if cache is None else cache.make_room(T)
        if self.config.position == "learned":
            x = x + self.position_embedding(places)
        else:
            rotation = rope_rotation(places, self.config)[:, :, None]  # the same for all heads
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, cache, layer)
        return self.norm(x)

    def embed(self, idx):
        """Token ids (B, T) to their vectors (B, T, C)."""
        return self.token_embedding(idx)

    def logits(self, x):
        """Hidden states (..., C) to logits (..., V): their products with the embeddings of all tokens."""
        return F.linear(x, self.token_embedding.weight)

    def forward(self, idx):
        """Token ids (B, T) to logits (B, T, V)."""
        return self.logits(self.hidden_states(idx))

    def loss(self, x, y):
        """Sum of the losses in nats of targets `y` (B, T) for inputs `x` (B, T); a target of -100 is skipped.

        The logits, V for each token, are the largest tensor: they are made for 256 tokens at a time.
        """
        device, loss = self.norm.weight.device, 0.0
        x, y = self.hidden_states(x.to(device)).flatten(0, 1), y.to(device).flatten()  # (B * T, C), (B * T,)
        for piece, targets in zip(x.split(256), y.split(256), strict=True):
            loss += F.cross_entropy(self.logits(piece).float(), targets, reduction="sum")
        return loss


# ------------------------------------------ quantization ------------------------------------------

# The sixteen values of NF4, as bitsandbytes has them: quantiles of a normal distribution, eight above zero
# and seven below, so that zero is exact; from -1 to 1.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635)
NF4 += (-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725)
NF4 += (0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941)
NF4 += (0.7229568362236023, 1.0)


class NF4Linear(nn.Module):
    """A frozen nn.Linear in 4 bits (Dettmers et al. 2023): weight = NF4[code] * scale.

    Each 64 weights share a scale. The scales, less their mean, are quantized again, to whole numbers of 8
    bits (in the paper floats), of which 256 share a step.
    """

    def __init__(self, layer):
        super().__init__()
        self.shape, self.bias = layer.weight.shape, layer.bias
        blocks = F.pad(layer.weight.flatten(), (0, -layer.weight.numel() % 64)).unflatten(0, (-1, 64))
        scales = blocks.abs().amax(dim=1)  # (blocks,)
        self.register_buffer("mean", scales.mean())
        groups = F.pad(scales - self.mean, (0, -len(scales) % 256)).unflatten(0, (-1, 256))
        self.register_buffer("steps", groups.abs().amax(dim=1).clamp(min=1e-12) / 127)  # (groups,)
        codes = (groups / self.steps[:, None]).round().to(torch.int8)
        self.register_buffer("scale_codes", codes.flatten()[: len(scales)])  # (blocks,)
        values = torch.tensor(NF4, device=blocks.device)
        middles = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize(blocks / self.scales()[:, None], middles).to(torch.uint8).flatten()
        self.register_buffer("codes", codes[::2] << 4 | codes[1::2])
        self.register_buffer("pairs", torch.cartesian_prod(values, values), persistent=False)  # of a byte

    def scales(self):
        """The scale of each block of 64, (blocks,)."""
        steps = self.steps.repeat_interleave(256)[: len(self.scale_codes)]
        return (self.scale_codes * steps + self.mean).clamp(min=1e-12)

    @property
    def weight(self):
        """The weights (N, K) in float32."""
        blocks = F.embedding(self.codes.int(), self.pairs).view(-1, 64) * self.scales()[:, None]
        return blocks.flatten()[: self.shape.numel()].view(self.shape)

    def forward(self, x):
        """x (..., K) to (..., N)."""
        return Unpacked.apply(x, self) + self.bias


class Unpacked(torch.autograd.Function):
    """x (..., K) times the weights of an NF4Linear: unpacked in both passes, kept in neither."""

    @staticmethod
    def forward(ctx, x, layer):
        """(..., K) to (..., N)."""
        ctx.layer = layer
        return F.linear(x, layer.weight)

    @staticmethod
    def backward(ctx, grad):
        """(..., N) to (..., K); the weights are frozen and get no gradient."""
        return grad @ ctx.layer.weight.to(grad.dtype), None


# -------------------------------------------- training --------------------------------------------


@torch.inference_mode()
def evaluate(model, batches):
    """Mean loss in nats of all targets in `batches`, pairs of inputs and targets (B, T)."""
    model.eval()
    loss, n = 0.0, 0
    for x, y in batches:
        loss += model.loss(x, y).item()
        n += (y != -100).sum().item()
    model.train()
    return loss / n


def save_checkpoint(checkpoint, config, name="checkpoint.pt"):
    """Write to a temporary file, then rename: a write that is cut short harms nothing."""
    path = Path(config.out_dir, name)
    torch.save(checkpoint, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def keep_finished(config):
    """Rename the files of a finished run that a new one is about to replace."""
    names = ("checkpoint.pt", "metrics.json", "adapter.pt")
    checkpoint, metrics, adapter = files = [Path(config.out_dir, name) for name in names]
    previous = checkpoint.with_suffix(".previous.pt")
    if checkpoint.exists() and (metrics.exists() or not previous.exists()):
        for path in files:
            kept = path.with_suffix(f".previous{path.suffix}")
            kept.unlink(missing_ok=True)  # of a run before that one
            if path.exists():
                path.replace(kept)
        print(f"\nthe model that was in {config.out_dir} is now {previous.name}", file=sys.stderr)
    elif checkpoint.exists():
        adapter.unlink(missing_ok=True)  # of an unfinished run


def load_weights(model, weights):
    """Copy saved weights, a dict of tensors, into `model`; exits if they do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        sys.exit(f"error: the saved weights do not fit the model in {NAME}.py; train again")


def make_optimizer(model, config):
    """AdamW (Loshchilov and Hutter 2019) for all that learns."""
    learning = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    return torch.optim.AdamW(learning, **options, betas=(0.9, config.beta2), fused=True)


def learning_rate_at(step, config):
    """Linear warm-up to config.learning_rate, then half a cosine down to lr_floor of it at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    floor = config.lr_floor
    return config.learning_rate * ((1 + floor) / 2 + (1 - floor) / 2 * math.cos(math.pi * progress))


def train(model, stages, val, config, checkpoint):
    """Train to config.max_steps from where `checkpoint` stands; save at each estimate, then also at Ctrl-C.

    The steps are shared out among the lists of examples in `stages`. checkpoint["model"] holds the weights as
    a plain model has them, checkpoint["last"] what learns.
    """
    device = model.norm.weight.device
    autocast = torch.autocast(device.type, PRECISIONS[config.precision], enabled=config.precision != "fp32")
    optimizer, learning = make_optimizer(model, config), learned(model)
    if "last" in checkpoint:
        settings = optimizer.state_dict()["param_groups"]  # of `config`, not of the saved run
        optimizer.load_state_dict({"state": checkpoint["optimizer"], "param_groups": settings})
    start = time.perf_counter() - checkpoint["seconds"]
    steps = range(checkpoint["step"] + 1, config.max_steps + 1)
    stop, signals = [], (signal.SIGINT, signal.SIGTERM)  # these leave a note, to be read between two steps
    handlers = {number: signal.signal(number, lambda *_: stop.append(1)) for number in signals}
    for step in (bar := tqdm(steps, initial=checkpoint["step"], total=config.max_steps, unit="step")):
        torch.manual_seed(1_000_000 * config.seed + step)  # a resumed run draws what it would have drawn
        examples = stages[(step - 1) * len(stages) // config.max_steps]
        x, y = get_batch(examples, config)
        checkpoint["tokens"] += x.numel()
        model.zero_grad()
        plain = device.type == "cpu" and x.shape[1] <= 256  # there the plain formula's gradient is faster
        with autocast, sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            loss = model.loss(x, y) / (y != -100).sum()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()

        evaluate_now = step % config.eval_interval == 0 or step == config.max_steps
        stop_now = bool(stop)  # asked once: a Ctrl-C from here on counts for the next step
        if evaluate_now or stop_now or step % 10 == 0:
            seconds = time.perf_counter() - start
            loss = loss.item()
            status = f"loss {loss:.4f}, {step * len(x) / seconds:,.0f} examples/s"
            bar.set_postfix_str(status, refresh=False)
            if not math.isfinite(loss):
                sys.exit(f"\nerror: the loss is not finite at step {step}; try a lower --learning_rate")
        if evaluate_now:
            some = [part[:: max(1, len(part) // 256)] for part in (stages[-1], val)]
            train_loss, val_loss = (evaluate(model, batches(part)) for part in some)
            if not math.isfinite(val_loss):
                sys.exit(f"\nerror: the loss is not finite at step {step}; try a lower --learning_rate")
            point = {"step": step, "seconds": seconds, "train_loss": train_loss, "val_loss": val_loss}
            checkpoint["history"].append(point)
        if evaluate_now or (stop_now and checkpoint["history"]):
            if "last" not in checkpoint:  # the first save of a new run
                keep_finished(config)
            checkpoint.update(model=merge(model), last=learning, optimizer=optimizer.state_dict()["state"])
            checkpoint.update(config=asdict(config), step=step, seconds=time.perf_counter() - start)
            save_checkpoint(checkpoint, config)
            if config.method != "full":
                parts = ("version", "config", "base_hash", "last")
                save_checkpoint({name: checkpoint[name] for name in parts}, config, "adapter.pt")
        if stop_now and checkpoint["history"]:
            sys.exit(f"\nstopped after step {step} and saved; the same command with --resume goes on")
        if stop_now:
            sys.exit(f"\nstopped after step {step}; nothing is saved before the first estimate")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stop:
        sys.exit("\nstopped after the last step, which is saved; the same command with --resume goes on")


# ------------------------------------------- finetuning -------------------------------------------


class LoRALinear(nn.Module):
    """A frozen linear layer W (N, K), and beside it two small matrices that learn (Hu et al. 2021).

    It computes with W + lora_alpha / lora_rank * B A. A (rank, K) begins at random, B (N, rank) at zero: at
    first nothing is added.
    """

    def __init__(self, layer, config):
        super().__init__()
        self.layer, self.scale = layer, config.lora_alpha / config.lora_rank
        N, K = layer.weight.shape
        self.lora_A = nn.Parameter(torch.empty(config.lora_rank, K, device=layer.bias.device))
        self.lora_B = nn.Parameter(torch.zeros(N, config.lora_rank, device=layer.bias.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as the authors' own code has it

    def forward(self, x):
        """x (..., K) to (..., N)."""
        return self.layer(x) + F.linear(self.scale * F.linear(x, self.lora_A), self.lora_B)

    @property
    def weight(self):
        """The weights (N, K) of a plain layer that computes the same."""
        return self.layer.weight + self.scale * self.lora_B @ self.lora_A

    @property
    def bias(self):
        """The bias (N,) of that layer."""
        return self.layer.bias


class SpecialRows(nn.Module):
    """A frozen embedding (V, C) of which only the rows `ids` learn, those of the special tokens."""

    def __init__(self, embedding, ids, dtype):
        super().__init__()
        self.register_buffer("table", embedding.weight.detach().to(dtype))
        self.register_buffer("ids", torch.tensor(ids, device=embedding.weight.device), persistent=False)
        self.rows = nn.Parameter(embedding.weight.detach()[ids].clone())

    @property
    def weight(self):
        """All rows (V, C)."""
        return self.table.float().index_copy(0, self.ids, self.rows)

    def forward(self, idx):
        """Token ids (B, T) to their vectors (B, T, C)."""
        return F.embedding(idx, self.weight)


def adapt(model, config, special_ids):
    """Make of a plain model one that learns as --method says; return it.

    With lora and qlora its norms learn too, and the rows of the special tokens, which text has never taught:
    both are a few numbers (as in LongLoRA, Chen et al. 2023). In qlora the embedding is kept in 16 bits.
    """
    if config.method == "full":
        return model
    model.requires_grad_(False)
    for path, part in list(model.named_modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.LayerNorm):
                child.requires_grad_(True)
            elif isinstance(child, nn.Linear):
                layer = NF4Linear(child) if config.method == "qlora" else child
                has_adapter = f"{path}.{name}".endswith(tuple(config.lora_targets.split(",")))
                setattr(part, name, LoRALinear(layer, config) if has_adapter else layer)
    dtype = torch.bfloat16 if config.method == "qlora" else torch.float32
    model.token_embedding = SpecialRows(model.token_embedding, special_ids, dtype)
    return model


def learned(model):
    """What learns of a model: {name: tensor}, in the model's own memory."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def merge(model):
    """The weights of a plain LanguageModel that computes what an adapted one does: {name: tensor}."""
    with torch.device("meta"):  # shapes without numbers
        plain = LanguageModel(model.config, model.config.vocab_size)
    weights = {}
    for name in plain.state_dict():
        path, _, leaf = name.rpartition(".")
        weights[name] = getattr(model.get_submodule(path), leaf).detach().clone()
    return weights


def hash_of(weights):
    """A short hash of saved weights, a dict of tensors."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def grow(vocab, weights, learned_from_text):
    """Give a vocabulary the special tokens that it lacks; return it and the weights with rows for them.

    A new row is the mean of all. In plain text the tokens of the roles never stood: their rows are nearly one
    vector, so each also gets a random part, as large as that of other tokens.
    """
    tokenizer, embedding = make_tokenizer(vocab), weights["token_embedding.weight"]
    lacking = [token for token in SPECIAL_TOKENS if token not in tokenizer.special_tokens]
    if lacking:
        print(f"note: the base's vocabulary lacks {', '.join(lacking)}: it grows by them", file=sys.stderr)
        first = len(tokenizer.vocab)
        if isinstance(vocab, dict):
            new = {token: first + i for i, token in enumerate(lacking)}
            vocab = vocab | {"special_tokens": vocab["special_tokens"] | new}
        else:
            vocab = [*vocab, *lacking]
        embedding = torch.cat([embedding, embedding.mean(dim=0).expand(len(lacking), -1)])
        tokenizer = make_tokenizer(vocab)
    if learned_from_text:
        roles = [tokenizer.special_tokens[token] for token in SPECIAL_TOKENS[1:]]
        random_part = torch.randn(len(roles), embedding.shape[1], generator=torch.Generator().manual_seed(0))
        embedding = embedding.clone()
        embedding[roles] = embedding.mean(dim=0) + random_part * embedding.std(dim=0)
    return vocab, weights | {"token_embedding.weight": embedding}


def refuse_idle(flags, config):
    """Exit if a flag would do nothing."""
    for name in flags:
        if config.method == "full" and name in ("lora_rank", "lora_alpha", "lora_targets"):
            sys.exit(f"error: --{name} does nothing in --method full; leave it out, or choose lora or qlora")
        if config.instructions and name in ("n_examples", "n_passages", "renamed"):
            sys.exit(f"error: --{name} is about examples from the plays; with --instructions leave it out")


def make_folder(config):
    """Make the folder of a run; exits if nothing can be written there."""
    try:
        Path(config.out_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=config.out_dir).close()  # a folder that is there may be read-only
    except OSError as error:
        sys.exit(f"error: cannot write to {config.out_dir} ({error}); name another folder: --out_dir")


def find_base(flags):
    """Return the folder of the base; if there is no model of v6 yet, train one if the flags are fine."""
    config = Config(**flags)
    refuse_idle(flags, config)
    if config.base != "auto":
        return config.base
    if not Path("runs/v6_amp_ddp/metrics.json").exists():
        for name in MODEL:
            if getattr(config, name) != getattr(Config, name):
                sys.exit(f"error: --{name} cannot change, it is {getattr(Config, name)!r} in the base of v6")
        make_folder(config)
        next(read_data(config.data))  # what cannot be read is refused now, and not after minutes of training
        if config.instructions:
            read_instructions(config.instructions)
        print("there is no base yet: runs v6_amp_ddp.py first, some three minutes on two cores", flush=True)
        if subprocess.run([sys.executable, Path(__file__).with_name("v6_amp_ddp.py")]).returncode:
            sys.exit("error: v6_amp_ddp.py has failed; name a trained model: --base FOLDER")
    return "runs/v6_amp_ddp"


def load_checkpoint(mode, flags, folder):
    """Return the checkpoint in `folder` and its Config with `flags` in it; exits if they do not fit.

    In mode train it is the base's, of which the Config takes over what the model is, and its text.
    """
    kinds = {field.name: field.type for field in fields(Config)}
    try:
        checkpoint = torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)
        if not re.fullmatch(rf"v[5-9]_\w+|{NAME}" if mode == "train" else NAME, checkpoint["version"]):
            raise ValueError(f"saved by {checkpoint['version']}")
        own = (*MODEL, "data") if mode == "train" else kinds
        known = {k: v for k, v in checkpoint["config"].items() if k in own}
        saved = {name: kinds[name](value) for name, value in known.items()}
        parts = {"vocab": (str, list, dict), "history": list, "step": int, "seconds": float, "model": dict}
        parts |= {"tokens": int, "before": tuple} if mode == "resume" else {}
        parts |= {"last": dict, "optimizer": dict, "base_hash": str} if mode == "resume" else {}
        damaged = [part for part, kind in parts.items() if not isinstance(checkpoint.get(part), kind)]
        if damaged or saved != known or "n_embd" not in known:
            raise ValueError(f"damaged: {', '.join(damaged) or 'config'}")
        if any(name.endswith(".codes") for name in checkpoint["model"]):
            raise ValueError("quantized, and what is quantized cannot learn")
        saved["vocab_size"] = len(make_tokenizer(checkpoint["vocab"]).vocab)
        shapes = {name: tuple(weight.shape) for name, weight in checkpoint["model"].items()}
        if shapes["token_embedding.weight"] != (saved["vocab_size"], saved["n_embd"]):
            raise ValueError("damaged: model")
    except Exception as error:  # a file that is missing, cut short or something else altogether
        reason, who = str(error).split("\n")[0], "v5 to v9" if mode == "train" else NAME
        hint = "name another --base" if mode == "train" else f"train first: python {NAME}.py"
        sys.exit(f"error: no checkpoint of {who} in {folder} ({reason}); {hint}")
    saved = asdict(Config(**saved)) | {"out_dir": flags.get("out_dir", Config.out_dir)}
    may_change = kinds.keys() - {*MODEL, "adapter"} if mode == "train" else MAY_CHANGE[mode]
    if mode == "resume" and flags.get("max_steps", saved["max_steps"]) <= checkpoint["step"]:
        may_change = (*SAMPLING, "base")  # nothing is left to train
    if mode == "train" and checkpoint["step"] < checkpoint["config"].get("max_steps", 0):
        print(f"note: the training of the model in {folder} is not finished", file=sys.stderr)
    for name, value in flags.items():
        if value != saved[name] and name not in may_change:
            reason = f"--{name} cannot change, it is {saved[name]!r} in the model in {folder}"
            other = "name another --base" if mode == "train" else f"train anew: python {NAME}.py"
            sys.exit(f"error: {reason}; leave out that flag or {other}")
    return checkpoint, Config(**saved | flags)


def load_adapter(mode, flags):
    """Return an adapter that --sample, --chat or --evaluate puts on a base, and its Config with `flags`."""
    if mode not in ("sample", "chat", "evaluate"):
        sys.exit("error: --adapter goes with --sample, --chat or --evaluate; to train it further: --resume")
    try:
        adapter = torch.load(flags["adapter"], map_location="cpu", weights_only=True)
        config = Config(**adapter["config"])
        if not isinstance(adapter["base_hash"], str) or not isinstance(adapter["last"], dict):
            raise ValueError("damaged")
    except Exception as error:
        reason = str(error).split("\n")[0]
        sys.exit(f"error: there is no adapter of {NAME} in {flags['adapter']} ({reason})")
    wrong = flags.keys() - {*MAY_CHANGE[mode], "base", "adapter"}
    if wrong:
        sys.exit(f"error: --{min(wrong)} cannot change with --adapter; leave it out")
    return adapter, replace(config, **flags)


def make_model(base, checkpoint, config, device):
    """Return a model that is adapted to learn, with what it has learned so far, and the plain base."""
    base_hash = hash_of(base["model"])
    if checkpoint.setdefault("base_hash", base_hash) != base_hash:
        sys.exit(
            f"error: the model in {config.base} is not the base that this was trained on; name that: --base"
        )
    learned_from_text = re.match(r"v[5-7]_", base["version"])
    checkpoint["vocab"], weights = grow(base["vocab"], base["model"], learned_from_text)
    tokenizer = make_tokenizer(checkpoint["vocab"])
    config.vocab_size = len(tokenizer.vocab)
    torch.manual_seed(config.seed)
    plain = LanguageModel(config, config.vocab_size).to(device)
    load_weights(plain, weights)
    special_ids = [tokenizer.special_tokens[token] for token in SPECIAL_TOKENS]
    model = adapt(copy.deepcopy(plain), config, special_ids)
    if "last" in checkpoint:
        load_weights(model, model.state_dict() | checkpoint["last"])
    return model, plain


def bits_per_char(loss, val_ids, tokenizer):
    """A loss on plain text, in nats a token, as bits a character: how much of it was forgotten."""
    # A token may be several characters: as many as it has bytes that begin one. Special tokens are no text.
    pieces = [piece.encode() if isinstance(piece, str) else piece for piece in tokenizer.vocab]
    chars_of = torch.tensor([sum(byte >> 6 != 2 for byte in piece) for piece in pieces])
    chars_of[list(tokenizer.special_tokens.values())] = 0
    n_chars = sum(chars_of[ids.long()].sum().item() for ids in val_ids[1:].split(2**20))
    return loss * (len(val_ids) - 1) / n_chars / math.log(2)


def measure(model, tasks, val_ids, tokenizer, config):
    """What a model can do: {name: number}, and its greedy answers to ten held-out examples of each kind."""
    end = tokenizer.special_tokens[SPECIAL_TOKENS[0]]
    config = replace(config, greedy=True, temperature=1.0, top_k=0, top_p=1.0)

    def ask(conversations, max_new_tokens):
        prompts = [encode_prompt(turns[:-1], tokenizer) for turns in conversations]
        return generate(model, prompts, replace(config, max_new_tokens=max_new_tokens), end)

    def share_right(conversations):
        answers = ask(conversations, 32)
        right = [
            turns[-1][1] == to_text(ids, tokenizer) for turns, ids in zip(conversations, answers, strict=True)
        ]
        return sum(right) / len(right), answers

    answers, numbers = ask(tasks["replies"][:100], 100), {}
    replies = answers[:10]
    if exam := tasks["exam"]:
        numbers["names_right"], names = share_right(exam)
        numbers["without_passage"], _ = share_right([turns[1:] for turns in exam])
        answers, replies = answers + names, names[:10] + replies
    numbers["answers_ended"] = sum(ids[-1] == end for ids in answers) / len(answers)
    numbers["val_loss"] = evaluate(model, batches(tasks["val"]))
    if examples := encode_examples(tasks["replies"], tokenizer, config):
        numbers["reply_loss"] = evaluate(model, batches(examples))
    loss = evaluate(model, windows(val_ids, config))
    numbers["bits_per_char"] = bits_per_char(loss, val_ids, tokenizer)
    return numbers, [to_text(ids, tokenizer) for ids in replies]


def peak_memory(device):
    """Most bytes in use at a time: by tensors on a CUDA device, else by this process, all it did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        counters = (ctypes.c_size_t * 9)()  # PROCESS_MEMORY_COUNTERS, its second is PeakWorkingSetSize
        this_process = ctypes.c_void_p(-1)
        ctypes.windll.kernel32.K32GetProcessMemoryInfo(this_process, counters, ctypes.sizeof(counters))
        return counters[1]
    if sys.platform == "linux":  # whose getrusage begins with what the parent process had
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def print_numbers(table):
    """Print what `measure` has found, {heading: numbers}, a column each."""
    print("\n" + " " * 18 + "".join(f"{heading:>12}" for heading in table))
    for name in next(iter(table.values())):
        print(f"{name:>18}" + "".join(f"{numbers[name]:12.4f}" for numbers in table.values()))


def report(model, before, after, config, checkpoint):
    """Print what fine-tuning has changed; return what metrics.json will hold."""
    plain = sum(x.numel() for x in checkpoint["model"].values())
    learning, saved = learned(model), model.state_dict()
    n_learned = sum(x.numel() for x in learning.values())
    added = {name: x for name, x in learning.items() if name.endswith(("lora_A", "lora_B", ".rows"))}
    # The rows of special tokens take the place of some that the embedding has.
    n_all = plain + sum(x.numel() for name, x in added.items() if not name.endswith(".rows"))
    base_bytes = sum(x.nbytes for name, x in saved.items() if name not in added)
    print_numbers({"before": before, "after": after})
    print(f"{'learned':>18} {n_learned:,} of {n_all:,} numbers, {n_learned / n_all:.2%}")
    print(f"{'base':>18} {base_bytes / 1e6:.2f} MB, {base_bytes / 4 / plain:.1%} of what it is in float32")
    memory = peak_memory(model.norm.weight.device)
    print(f"{'peak memory':>18} {memory / 1e9:.2f} GB, of all that this process did")
    print(f"{'seconds':>18} {checkpoint['seconds']:,.0f}")
    print(f"{'files in':>18} {config.out_dir}\n")
    metrics = {"version": NAME, "params": plain, "learned": n_learned, "share_learned": n_learned / n_all}
    metrics |= after | {"before": before, "base_bytes": base_bytes, "base_share": base_bytes / 4 / plain}
    metrics |= {"train_loss": checkpoint["history"][-1]["train_loss"], "steps": checkpoint["step"]}
    metrics |= {"perplexity": math.exp(min(after["val_loss"], 700))}  # a float holds no more
    metrics |= {"seconds": checkpoint["seconds"], "tokens": checkpoint["tokens"]}
    metrics |= {"tokens_per_second": checkpoint["tokens"] / checkpoint["seconds"]}
    metrics |= {"peak_memory": memory, "config": asdict(config)}
    metrics |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return metrics | {"device": model.norm.weight.device.type, "history": checkpoint["history"]}


def show_answers(tasks, before, after):
    """Ten held-out questions and ten replies as text, with the answers of before and after."""
    asked = tasks["exam"][:10] + tasks["replies"][:10]
    lines = []
    for turns, *answers in zip(asked, before, after, strict=True):
        lines += [f"<|{role}|> {text}" for role, text in turns[:-1]]
        labels = ("before", "after", "right" if turns[0][0] == "context" else "in the text")
        for label, text in zip(labels, (*answers, turns[-1][1]), strict=True):
            lines.append(f"{label:>11}: {text!r}")
        lines.append("")
    return "\n".join(lines)


def save_report(metrics, sample, config):
    """Write metrics.json, sample.txt and loss.png."""
    Path(config.out_dir, "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    Path(config.out_dir, "sample.txt").write_text(sample, encoding="utf-8")
    fig, ax = plt.subplots(layout="constrained")
    for name in ("train_loss", "val_loss"):
        points = [(point["step"], point[name]) for point in metrics["history"]]
        ax.plot(*zip(*points, strict=True), ".-", label=name)
    ax.set(xlabel="step", ylabel="loss (nats per token of an answer)")
    ax.legend()
    fig.savefig(Path(config.out_dir, "loss.png"))


# -------------------------------------------- sampling --------------------------------------------


def sample_next(logits, config, generator):
    """Draw ids (B, 1) from logits (B, V) after temperature, top-k and top-p; with greedy take the likeliest.

    Top-k is by Fan et al. 2018, top-p or nucleus sampling by Holtzman et al. 2020.
    """
    if config.greedy:
        return logits.argmax(dim=-1, keepdim=True)
    logits, ids = logits.sort(dim=-1, descending=True)
    probs = ((logits - logits[:, :1]) / config.temperature).softmax(dim=-1)  # (B, V), likeliest first
    if config.top_k:
        probs[:, config.top_k :] = 0
    if config.top_p < 1:
        probs = probs / probs.sum(dim=-1, keepdim=True)
        likelier = probs.cumsum(dim=-1) - probs  # the probability of all that come before
        probs[likelier >= config.top_p] = 0
    return ids.gather(-1, torch.multinomial(probs, num_samples=1, generator=generator))  # from rank to id


@dataclass
class Sequence:
    """What an Engine knows of a text that it continues."""

    ids: list  # all of it, the prompt first
    config: Config  # how to sample
    stop: int | None  # the id that ends it
    n_left: int  # tokens that it may still get; with 0 it has ended
    start: int  # where its window begins
    generator: torch.Generator  # its own, so that the other rows do not matter


class Engine:
    """Continues several texts at once, each in a row of a KVCache. It knows ids and no text.

    A row that has ended is free for another text while others go on (Yu et al. 2022). When a window is full,
    its older half is forgotten and the newer half read again: one more pass for block_size / 2 + 1 tokens. A
    window that slides would take one for each, as all places change.
    """

    def __init__(self, model, n_rows):
        self.model, self.cache = model.eval(), KVCache(model, n_rows)
        self.sequences = [None] * n_rows  # None: the row is free

    def add(self, ids, config, stop=None):
        """Take in a list of ids, to be continued as `config` says; return its row. ValueError: none free."""
        row = self.sequences.index(None)
        if not ids:
            raise ValueError("a text to be continued needs at least one id")
        start = max(0, len(ids) - self.model.config.block_size)
        generator = torch.Generator(self.cache.lengths.device).manual_seed(config.seed)
        sequence = Sequence(list(ids), config, stop, config.max_new_tokens, start, generator)
        self.prefill(row, sequence)
        self.sequences[row] = sequence
        return row

    def remove(self, row):
        """Free a row for another text; return the ids of the one that it had."""
        sequence, self.sequences[row] = self.sequences[row], None
        return sequence.ids

    @torch.inference_mode()
    def prefill(self, row, sequence):
        """Read the window of a text but for its last id, in one pass."""
        cache = self.cache.part(row, row + 1)
        cache.lengths.zero_()
        if ids := sequence.ids[sequence.start : -1]:
            self.model.hidden_states(torch.tensor([ids], device=cache.lengths.device), cache)

    @torch.inference_mode()
    def step(self):
        """Read the last id of each text that goes on and draw the next one; return {row: id}."""
        going = {row: sequence for row, sequence in enumerate(self.sequences) if sequence and sequence.n_left}
        if not going:
            return {}
        T, n_rows, device = self.model.config.block_size, max(going) + 1, self.cache.lengths.device
        last, lengths = [[0]] * n_rows, [0] * n_rows  # of a row that rests the first place is overwritten
        for row, sequence in going.items():
            if len(sequence.ids) - sequence.start > T:
                sequence.start = len(sequence.ids) - max(1, T // 2)
                self.prefill(row, sequence)
            last[row], lengths[row] = sequence.ids[-1:], len(sequence.ids) - 1 - sequence.start
        cache = self.cache.part(0, n_rows)  # the rows behind the last that goes on cost nothing
        cache.lengths.copy_(torch.tensor(lengths))
        x = self.model.hidden_states(torch.tensor(last, device=device), cache)
        logits = self.model.logits(x[:, -1])  # (n_rows, V)
        drawn = [sample_next(logits[row : row + 1], s.config, s.generator) for row, s in going.items()]
        new = dict(zip(going, torch.cat(drawn)[:, 0].tolist(), strict=True))
        for row, sequence in going.items():
            sequence.ids.append(new[row])
            sequence.n_left = 0 if new[row] == sequence.stop else sequence.n_left - 1
        return new


def generate(model, prompts, config, stop=None, show=None, n_rows=32):
    """Go on with each list of ids in `prompts` up to `stop` or by config.max_new_tokens; return what is new.

    Prompt i draws with seed config.seed + i. Up to n_rows are written at once; one that has ended makes room
    for the next. After each token `show` is given the new ids of the first.
    """
    engine, waiting = Engine(model, min(n_rows, len(prompts))), list(enumerate(prompts))[::-1]
    going, done = {}, {}  # row: number of a prompt; number: its new ids
    while waiting or going:
        while waiting and None in engine.sequences:
            i, ids = waiting.pop()
            going[engine.add(ids, replace(config, seed=config.seed + i), stop)] = i
        engine.step()
        for row, i in list(going.items()):
            sequence = engine.sequences[row]
            if show and i == 0:
                show(sequence.ids[len(prompts[0]) :])
            if not sequence.n_left:
                done[going.pop(row)] = engine.remove(row)[len(prompts[i]) :]
    return [done[i] for i in range(len(prompts))]


def fit_window(turns, tokenizer, config):
    """Return the ids of a prompt. To fit, the oldest questions are left out, but never the passage."""
    passage, turns = [x for x in turns if x[0] == "context"], [x for x in turns if x[0] != "context"]
    room = config.block_size - min(config.max_new_tokens, config.block_size // 2)
    while len(ids := encode_prompt(passage + turns, tokenizer)) > room and len(turns) > 1:
        turns = turns[2:]  # the oldest question and its answer
    if len(ids) > config.block_size:
        sys.exit(f"error: what is asked has {len(ids)} tokens, the model reads {config.block_size}")
    return ids


def answer(model, turns, tokenizer, config):
    """Print and return the answer to a conversation, a list of (role, text)."""
    end, printed = tokenizer.special_tokens[SPECIAL_TOKENS[0]], ""

    def show(ids):
        nonlocal printed
        text = to_text(ids, tokenizer).rstrip("\ufffd")  # without a character that has only begun
        print(text[len(printed) :], end="", flush=True)
        printed = text

    prompt = fit_window(turns, tokenizer, config)
    text = to_text(generate(model, [prompt], config, end, show if config.stream else None)[0], tokenizer)
    print(text[len(printed) :])
    return text


def chat(model, tokenizer, config):
    """A conversation in the terminal, until an empty line or the end of the input."""
    turns = [("context", config.context.replace("\\n", "\n"))] if config.context else []
    print("type as for --prompt, \\n is a new line; an empty line ends the conversation")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            text = ""
        if not text:
            return
        turns.append(("user", text.replace("\\n", "\n")))
        turns.append(("assistant", answer(model, turns, tokenizer, config)))


# ---------------------------------------------- main ----------------------------------------------


def main():
    mode, flags = parse_flags()
    training, base = mode in ("train", "resume"), None
    checkpoint = {"version": NAME, "step": 0, "seconds": 0.0, "tokens": 0, "history": []}
    if "adapter" in flags:
        adapter, config = load_adapter(mode, flags)
        checkpoint |= adapter
        base, _ = load_checkpoint("train", {}, config.base)
    elif mode == "train":
        folder = find_base(flags)
        base, config = load_checkpoint(mode, flags, folder)
        config.base = folder
    else:
        checkpoint, config = load_checkpoint(mode, flags, flags.get("out_dir", Config.out_dir))
        if mode == "resume":
            base, _ = load_checkpoint("train", {}, config.base)
    device = pick_device(config.device)
    if training:
        config.precision = pick_precision(config.precision, device)
        if Path(config.base).resolve() == Path(config.out_dir).resolve():
            sys.exit(f"error: --base {config.base} would be overwritten; name another folder: --out_dir")
        make_folder(config)
    if base:
        model, plain = make_model(base, checkpoint, config, device)
    else:
        model = LanguageModel(config, config.vocab_size).to(device)
        load_weights(model, checkpoint["model"])
    tokenizer = make_tokenizer(checkpoint["vocab"])
    context, prompt = (text.replace("\\n", "\n") for text in (config.context, config.prompt))
    turns = [("context", context)] * bool(context) + [("user", prompt)]
    if mode not in ("evaluate", "chat"):
        fit_window(turns, tokenizer, config)  # what cannot be asked is refused before any work

    if mode in ("train", "resume", "evaluate"):
        tasks = load_tasks(config, tokenizer)
        val_ids = load_val(config, checkpoint["vocab"])
    if mode == "train":
        print(f"fine-tunes the model in {config.base}: --method {config.method}; first its exam", flush=True)
        checkpoint["before"] = measure(plain, tasks, val_ids, tokenizer, config)
        if config.method == "qlora":
            loss = evaluate(model, windows(val_ids, config))
            rounded = bits_per_char(loss, val_ids, tokenizer)
            was = checkpoint["before"][0]["bits_per_char"]
            print(f"in 4 bits the base needs {rounded:.4f} bits per character, as it was {was:.4f}")
    if training:
        train(model, tasks["stages"], tasks["val"], config, checkpoint)
    if mode in ("train", "resume", "evaluate"):
        numbers, answers = measure(model, tasks, val_ids, tokenizer, config)
    if training:
        before, answers_before = checkpoint["before"]
        metrics = report(model, before, numbers, config, checkpoint)
        print(examples := show_answers(tasks, answers_before, answers))
    if mode == "evaluate":
        print_numbers({"now": numbers})
    elif mode == "chat":
        chat(model, tokenizer, config)
    else:
        sample = answer(model, turns, tokenizer, config)
    if training:
        save_report(metrics, f"{examples}\n{sample}\n", config)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # the stdout of IDLE and of some notebooks is no file
        sys.stdout.reconfigure(errors="replace")  # print even what the terminal has no character for
    try:
        main()
    except TokenizerError as error:  # the vocabulary file, or a prompt that is no text
        sys.exit(f"error: {error}")
