"""v9, week 10: preferences: reward model, PPO, DPO, GRPO. From what is likely to what is wanted.

Of two replies people can say which they prefer. A reward model learns to say it for them (Christiano et al.
2017). PPO (Schulman et al. 2017) and GRPO (Shao et al. 2024) try replies and make the better ones likelier,
near the model they began with. DPO (Rafailov et al. 2023) learns from the pairs alone. The people are
simulated, by a function that likes kind words and dislikes cruel ones.

Since v8_lora.py
  added:    CRUEL, JUDGING, KIND, PAIR, Prompt, ROLLOUTS, WithHead, advantages, annotate, clipped_loss,
            dpo_loss, encode_pairs, encode_replies, end_of, exact_kl, group_advantages, judge_folder,
            judge_pairs, load_judge, load_pairs, load_prompts, log_probs, make_draw, make_prompts,
            policy_loss, preference_loss, read_preferences, reward_loss, sample_replies, score, to_prompts,
            true_reward, value_loss, whiten, without_adapters
  changed:  Config, KVCache, LoRALinear, MAY_CHANGE, METHODS, SAMPLING, TRAINING, adapt, answer, find_base,
            generate, get_batch, keep_finished, load_checkpoint, main, make_optimizer, measure, parse_flags,
            refuse_idle, report, sample_next, save_report, train
  removed:  Engine, NF4, NF4Linear, PRECISIONS, Sequence, SpecialRows, Unpacked, batches, chat,
            encode_examples, fit_window, grow, load_adapter, load_tasks, make_examples, make_model,
            peak_memory, pick_precision, print_numbers, read_instructions, show_answers

Result: preferred to v8's replies in 85.4%, KL 4.1 nats; plain text 3.22 bits/char, 81 s on 2 CPU cores.

Run it with: python v9_rlhf.py, or with --help to see every flag.
"""

import argparse
import copy
import hashlib
import inspect
import json
import math
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends the program, also while torch loads

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from bpe_tokenizer import BPETokenizer, TokenizerError, encode_data, read_data

# --------------------------------------------- config ---------------------------------------------

NAME = Path(__file__).stem
SAMPLING = ("device", "seed", "greedy", "temperature", "top_k", "top_p", "prompt", "max_new_tokens")
TRAINING = ("max_steps", "learning_rate", "warmup_steps", "lr_floor", "grad_clip", "eval_interval")
MODEL = ("tokenizer", "vocab_size", "block_size", "n_embd", "n_head", "n_layer", "init_std", "position")
ROLLOUTS = ("kl_coef", "clip_range", "n_epochs", "n_minibatches")
# The flags that only some methods have a use for.
METHODS = {"ppo": (*ROLLOUTS, "gae_lambda"), "grpo": (*ROLLOUTS, "group_size")}
METHODS |= {"dpo": ("dpo_beta", "n_minibatches"), "best_of_n": ("n_best",)}
JUDGING = ("preferences", "n_replies", "noise", "reward_steps", "reward_batch", "reward_rate", "dropout")
# Fields that a flag may change when a saved model is loaded; all others stay as they were in its training.
MAY_CHANGE = {"evaluate": ("device",), "sample": SAMPLING, "resume": (*TRAINING, "base", "device")}
LONGEST = 150  # characters of a speech that an example is made from: long ones take long and teach the same
PAIR = ("prompt", "chosen", "rejected")
SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|context|>")


@dataclass
class Config:
    """Every field is a command-line flag of the same name: --max_steps 500."""

    data: str = "input.txt"  # plays that prompts are made from, and text to measure what was forgotten
    preferences: str = ""  # .jsonl of your own pairs (prompt, chosen, rejected), not the annotator's
    base: str = "auto"  # folder of a model that answers; auto: runs/v8_lora, trained first if there is none
    out_dir: str = f"runs/{NAME}"  # folder for the checkpoint, metrics, pictures and replies
    method: str = "ppo"  # ppo, grpo, dpo, or best_of_n: draw several replies and take the best, no training
    task: str = "reply"  # reply: be preferred; read: be right about who says something, with grpo only
    n_prompts: int = 3000  # prompts from the plays to learn with, at most
    n_replies: int = 4  # replies to each of them; all pairs are judged
    noise: float = 0.1  # share of the judgements that are the wrong way round
    reward_steps: int = 600  # steps in which the reward model learns
    reward_batch: int = 16  # pairs in such a step
    reward_rate: float = 0.0005  # their peak step size
    n_best: int = 16  # replies among which best_of_n chooses
    kl_coef: float = 0.4  # price of a nat of KL from the base, in standard deviations of the reward
    dpo_beta: float = 0.3  # how strongly dpo is held to the base
    clip_range: float = 0.2  # how far a ratio of probabilities may move from 1 before it stops to count
    gae_lambda: float = 0.95  # how far a reward reaches back: 0 one token, 1 all of the reply
    n_epochs: int = 2  # times that ppo and grpo go over the replies of a step
    n_minibatches: int = 4  # parts of a step, an update each
    group_size: int = 8  # replies to one prompt that grpo compares
    lora_rank: int = 0  # 0: all weights learn; else a LoRA of that rank, and the base is the model without it
    lora_alpha: float = 16.0  # what an adapter adds is multiplied by lora_alpha / lora_rank
    device: str = "auto"  # auto, cuda, mps or cpu
    seed: int = 1337  # same seed on the same machine: same numbers
    tokenizer: str = "bpe"  # of the base, and so are the next seven: no flag can change them
    vocab_size: int = 1024  # ids, special tokens included
    block_size: int = 256  # tokens that the model looks back at (T)
    n_embd: int = 192  # numbers in an embedding (C)
    n_head: int = 8  # attention heads, each n_embd / n_head wide
    n_layer: int = 4  # transformer blocks
    init_std: float = 0.1  # standard deviation of the matrices before training
    position: str = "rope"  # learned or rope
    batch_size: int = 64  # replies in a step, or pairs
    dropout: float = 0.1  # share of activations set to zero while the reward model learns
    max_steps: int = 40  # steps: draw replies, judge them, learn from them
    learning_rate: float = 0.0003  # peak step size
    warmup_steps: int = 5  # steps in which the step size rises to its peak
    lr_floor: float = 0.1  # share of the peak step size that is left in the last step
    grad_clip: float = 1.0  # a gradient with a larger Euclidean norm is scaled down to it
    eval_interval: int = 20  # steps between two checkpoints
    greedy: bool = False  # always sample the likeliest token
    temperature: float = 1.0  # below 1: safer replies, above 1: bolder ones; in training too
    top_k: int = 0  # sample among the k likeliest tokens; 0: among all
    top_p: float = 1.0  # sample among the likeliest that together reach this probability
    prompt: str = "Good morrow, cousin.\\nAnswer as ROMEO."  # what the model is asked, \n is a new line
    max_new_tokens: int = 80  # tokens in a reply, at most

    def __post_init__(self):
        may_be_zero = ("seed", "warmup_steps", "lr_floor", "dropout", "top_k", "noise", "kl_coef")
        may_be_zero += ("lora_rank", "gae_lambda")
        for name, value in vars(self).items():
            if type(value) in (int, float):  # bool and str can be anything
                limit = 2**31 if type(value) is int else math.inf
                if not (0 < value < limit or (value == 0 and name in may_be_zero)):
                    reason = f"it must be positive and below {limit}, or 0 for: {', '.join(may_be_zero)}"
                    sys.exit(f"error: --{name} {value} is impossible, {reason}")
        if self.dropout >= 1 or self.top_p > 1 or self.noise > 1 or self.gae_lambda > 1:
            sys.exit("error: --dropout must be below 1, --top_p, --noise and --gae_lambda at most 1")
        if self.greedy and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            sys.exit("error: --greedy takes --temperature 1 --top_k 0 --top_p 1 only; --no-greedy draws")
        if self.n_embd % self.n_head:
            sys.exit(f"error: --n_embd {self.n_embd} is not a multiple of --n_head {self.n_head}")
        choices = {"position": ("learned", "rope"), "method": METHODS, "task": ("reply", "read")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                sys.exit(f"error: no --{name} {getattr(self, name)}, choose from: {', '.join(known)}")
        if self.task == "read" and self.method != "grpo":
            sys.exit("error: --task read goes with --method grpo only: nobody judges pairs of names")
        if self.group_size < 2 or self.n_replies < 2:
            sys.exit("error: --group_size and --n_replies must be at least 2: replies are compared")
        part = "group_size" if self.method == "grpo" else "n_minibatches"
        if self.batch_size % getattr(self, part):
            sys.exit(
                f"error: --batch_size {self.batch_size} is no multiple of --{part} {getattr(self, part)}"
            )


def parse_flags():
    """Return the mode and, as a dict, the flags given on the command line and only those."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"error: {message}; --help lists every flag")
    modes = parser.add_mutually_exclusive_group()
    mode = {"dest": "mode", "action": "store_const", "default": "train"}
    modes.add_argument("--sample", **mode, const="sample", help="no training: answer the prompt")
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
    return flags.pop("mode"), flags


def pick_device(name):
    """Return the device of that name; `auto` is CUDA or MPS where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    available = [accelerator.type, "cpu"] if accelerator else ["cpu"]
    if name not in ["auto", *available]:
        sys.exit(f"error: there is no --device {name} here, choose from: auto, {', '.join(available)}")
    return available[0] if name == "auto" else name


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


@dataclass
class Prompt:
    """What a model is asked."""

    ids: list  # with the token that begins an answer
    text: str  # what the user says
    right: str  # the answer in the plays


def make_prompts(speeches, n, task, rng, invent, known=()):
    """Make n conversations, lists of (role, text), from (NAME, speech) pairs; those of task reply all differ.

    With `invent` the names in a passage are invented; names in `known` are neither asked for nor invented.
    """
    short = [
        (name, speech) for name, speech in speeches if len(speech) <= LONGEST and len(speech.split()) >= 4
    ]
    if task == "reply":
        turns = [(a, b) for a, b in pairwise(speeches) if max(len(a[1]), len(b[1])) <= LONGEST]
        turns = {f"{speech}\nAnswer as {name}.": reply for (_, speech), (name, reply) in turns}
        turns = sorted(turns.items())
        rng.shuffle(turns)
        return [[("user", prompt), ("assistant", reply)] for prompt, reply in turns[:n]]
    words = [word for _, speech in short for word in re.findall(r"[A-Za-z]{3,}", speech)]
    names, conversations = [name for name, _ in short], []
    asked = [(name, speech) for name, speech in short if name not in known]
    while asked and len(conversations) < n:
        name, speech = rng.choice(asked)
        name = invent_name(words, names, known, rng) if invent else name
        conversations.append(make_reading([(name, speech)], 0, rng))
    return conversations


def load_prompts(config, tokenizer):
    """Prompts to learn with and others to measure with, from --preferences or the two splits of --data."""
    if config.preferences:
        texts = sorted({prompt for prompt, *_ in read_preferences(config.preferences)})
        made = [[("user", text), ("assistant", "")] for text in texts]
        return to_prompts(([turns for i, turns in enumerate(made) if i % 10], made[::10]), tokenizer, config)
    splits = {"train": "", "val": ""}
    for split, _, text in read_data(config.data):
        splits[split] += text
    speeches = {split: read_speeches(text) for split, text in splits.items()}
    known = {name for name, _ in speeches["train"]}
    rng = random.Random(0)  # the same prompts for all seeds
    exam = {name for name, _ in speeches["val"]} - known
    learning = make_prompts(speeches["train"], config.n_prompts, config.task, rng, True, exam)
    held_out = make_prompts(speeches["val"], 400, config.task, rng, False, known)
    return to_prompts((learning, held_out), tokenizer, config)


def to_prompts(lists, tokenizer, config):
    """Lists of conversations as lists of Prompts, those that leave room for a reply in the window."""
    lists = [[Prompt(encode_prompt(c[:-1], tokenizer), c[-2][1], c[-1][1]) for c in part] for part in lists]
    room = config.block_size - config.max_new_tokens
    lists = [[prompt for prompt in part if len(prompt.ids) <= room] for part in lists]
    if not all(lists):
        source = f"--data {config.data} has too few speeches under lines such as JULIET:"
        source = f"--preferences {config.preferences} has too few prompts" if config.preferences else source
        sys.exit(f"error: {source} that leave room for --max_new_tokens {config.max_new_tokens}")
    return lists


def read_preferences(path):
    """Read (prompt, chosen, rejected) from a .jsonl file, an object with these three texts a line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: cannot read --preferences {path} ({error})")
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            pair = tuple(record[name] for name in PAIR)
            if not all(isinstance(text, str) and text for text in pair):
                raise ValueError("a text is missing")
            pairs.append(pair)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            sys.exit(f"error: line {number} of {path} is no pair ({reason})")
    if len(pairs) < 2:
        sys.exit(f"error: there are fewer than two pairs in --preferences {path}")
    return pairs


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


def encode_replies(prompts, replies, device="cpu"):
    """Prompts and their replies, lists of ids, as inputs and targets (B, T), -100 outside the replies."""
    examples = [(p + r, [False] * len(p) + [True] * len(r)) for p, r in zip(prompts, replies, strict=True)]
    return tuple(x.to(device) for x in pad(examples))


def get_batch(pairs, n, n_parts, device="cpu"):
    """Draw n pairs for a step of n_parts updates, neighbours of the sorted ones in each; as train wants it.

    A batch is (inputs, targets) of the chosen replies and of the rejected ones.
    """
    batches, n_tokens, n = [], 0, min(n // n_parts, len(pairs))
    for _ in range(n_parts):
        start = torch.randint(len(pairs) - n + 1, ()).item()
        prompts, chosen, rejected = zip(*pairs[start : start + n], strict=True)
        batches.append([encode_replies(prompts, side, device) for side in (chosen, rejected)])
        n_tokens += sum((y != -100).sum().item() for _, y in batches[-1])
    return batches, {"length": n_tokens / (n_parts * n)}


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
    All of the memory is taken at the start: `size` tokens for each row.
    """

    def __init__(self, model, n_rows, size):
        config, device = model.config, model.norm.weight.device
        shape = (config.n_layer, 2, n_rows, config.n_head, size, config.n_embd // config.n_head)
        self.kv = torch.zeros(shape, device=device)
        self.lengths = torch.zeros(n_rows, dtype=torch.long, device=device)  # tokens that each row has

    def keep(self, rows):
        """Forget all rows but those where `rows` (B,) is true."""
        self.kv, self.lengths = self.kv[:, :, rows], self.lengths[rows]

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
        kv = self.kv[layer]  # (2, B, n_head, size, head_size)
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
    """Rename the checkpoint and the metrics of a finished run that a new one is about to replace."""
    checkpoint, metrics = Path(config.out_dir, "checkpoint.pt"), Path(config.out_dir, "metrics.json")
    previous = checkpoint.with_suffix(".previous.pt")
    if checkpoint.exists() and (metrics.exists() or not previous.exists()):
        checkpoint.replace(previous)
        if metrics.exists():  # which is written when a run has finished
            metrics.replace(metrics.with_suffix(".previous.json"))
        print(f"\nthe model that was in {config.out_dir} is now {previous.name}", file=sys.stderr)


def load_weights(model, weights):
    """Copy saved weights, a dict of tensors, into `model`; exits if they do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        sys.exit(f"error: the saved weights do not fit the model in {NAME}.py; train again")


def make_optimizer(model, config):
    """AdamW (Loshchilov and Hutter 2019), without decay, for all that learns.

    A head begins with nothing, and its steps are ten times as large as the model's.
    """
    learning = [p for p in model.model.parameters() if p.requires_grad]
    groups = [{"params": learning, "scale": 1.0}, {"params": model.head.parameters(), "scale": 10.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=0.0, fused=True)


def learning_rate_at(step, config):
    """Linear warm-up to config.learning_rate, then half a cosine down to lr_floor of it at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    floor = config.lr_floor
    return config.learning_rate * ((1 + floor) / 2 + (1 - floor) / 2 * math.cos(math.pi * progress))


def train(model, draw, loss_of, config, checkpoint, rate="learning_rate", again=" with --resume"):
    """Train to config.max_steps from where `checkpoint` stands; save every eval_interval steps, at Ctrl-C.

    draw() returns the batches of a step, an update each, and {name: number} to be shown; loss_of(batch)
    a loss and more of these numbers. `rate` and `again` are for what is said when it stops.
    """
    optimizer = make_optimizer(model, config)
    if "last" in checkpoint:
        load_weights(model, model.state_dict() | checkpoint["last"])
        settings = optimizer.state_dict()["param_groups"]  # of `config`, not of the saved run
        optimizer.load_state_dict({"state": checkpoint["optimizer"], "param_groups": settings})
    start = time.perf_counter() - checkpoint["seconds"]
    steps = range(checkpoint["step"] + 1, config.max_steps + 1)
    stop, signals = [], (signal.SIGINT, signal.SIGTERM)  # these leave a note, to be read between two steps
    handlers = {number: signal.signal(number, lambda *_: stop.append(1)) for number in signals}
    for step in (bar := tqdm(steps, initial=checkpoint["step"], total=config.max_steps, unit="step")):
        torch.manual_seed(1_000_000 * config.seed + step)  # a resumed run draws what it would have drawn
        batches, shown = draw()
        checkpoint["tokens"] += round(shown.get("length", 0) * config.batch_size)
        sums = defaultdict(float)
        for batch in batches:
            model.zero_grad()
            loss, numbers = loss_of(batch)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate_at(step, config)
                nn.utils.clip_grad_norm_(group["params"], config.grad_clip)
            optimizer.step()
            for name, number in ({"loss": loss.detach()} | numbers).items():
                sums[name] += number / len(batches)
        shown |= {name: number.item() for name, number in sums.items()}
        status = ", ".join(f"{name} {number:.3g}" for name, number in shown.items())
        bar.set_postfix_str(status, refresh=False)
        if not math.isfinite(shown["loss"]):
            sys.exit(f"\nerror: the loss is not finite at step {step}; try a lower --{rate}")
        checkpoint["history"].append({"step": step, "seconds": time.perf_counter() - start} | shown)

        save_now = step % config.eval_interval == 0 or step == config.max_steps
        stop_now = bool(stop)  # asked once: a Ctrl-C from here on counts for the next step
        if save_now or (stop_now and "last" in checkpoint):
            if "last" not in checkpoint:  # the first save of a new run
                keep_finished(config)
            checkpoint.update(last=learned(model), optimizer=optimizer.state_dict()["state"])
            checkpoint.update(model=merge(model.model), config=asdict(config), step=step)
            checkpoint["seconds"] = time.perf_counter() - start
            save_checkpoint(checkpoint, config)
        if stop_now and "last" in checkpoint:
            sys.exit(f"\nstopped after step {step} and saved; the same command{again} goes on")
        if stop_now:
            sys.exit(f"\nstopped after step {step}; nothing is saved before step {config.eval_interval}")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stop:
        sys.exit(f"\nstopped after the last step, which is saved; the same command{again} goes on")


# ------------------------------------------- finetuning -------------------------------------------


class LoRALinear(nn.Module):
    """A frozen linear layer W (N, K), and beside it two small matrices that learn (Hu et al. 2021).

    It computes with W + lora_alpha / lora_rank * B A. A (rank, K) begins at random, B (N, rank) at zero: at
    first nothing is added. While `active` is false, nothing is added either.
    """

    active = True

    def __init__(self, layer, config):
        super().__init__()
        self.layer, self.scale = layer, config.lora_alpha / config.lora_rank
        N, K = layer.weight.shape
        self.lora_A = nn.Parameter(torch.empty(config.lora_rank, K, device=layer.bias.device))
        self.lora_B = nn.Parameter(torch.zeros(N, config.lora_rank, device=layer.bias.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as the authors' own code has it

    def forward(self, x):
        """x (..., K) to (..., N)."""
        if not LoRALinear.active:
            return self.layer(x)
        return self.layer(x) + F.linear(self.scale * F.linear(x, self.lora_A), self.lora_B)

    @property
    def weight(self):
        """The weights (N, K) of a plain layer that computes the same."""
        return self.layer.weight + self.scale * self.lora_B @ self.lora_A

    @property
    def bias(self):
        """The bias (N,) of that layer."""
        return self.layer.bias


def adapt(model, config):
    """Make of a plain model one whose linear layers have adapters that learn; return it."""
    model.requires_grad_(False)
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Linear):
                setattr(part, name, LoRALinear(child, config))
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


def refuse_idle(flags, config):
    """Exit if a flag would do nothing."""
    idle = {name for names in METHODS.values() for name in names} - {*METHODS[config.method]}
    idle |= {*JUDGING} if config.task == "read" else set()
    idle |= {*TRAINING, "batch_size", "lora_rank"} if config.method == "best_of_n" else set()
    idle |= {"n_prompts", "n_replies", "noise"} if config.preferences else set()
    idle |= set() if config.lora_rank else {"lora_alpha"}
    if wrong := sorted(idle & flags.keys()):
        sys.exit(f"error: --{wrong[0]} does nothing here, see --method, --task and --lora_rank; leave it out")


def make_folder(config):
    """Make the folder of a run; exits if nothing can be written there."""
    try:
        Path(config.out_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=config.out_dir).close()  # a folder that is there may be read-only
    except OSError as error:
        sys.exit(f"error: cannot write to {config.out_dir} ({error}); name another folder: --out_dir")


def find_base(flags):
    """Return the folder of the base; if v8 has not been run yet, run it if the flags are fine."""
    config = Config(**flags)
    refuse_idle(flags, config)
    if config.base != "auto":
        return config.base
    if not Path("runs/v8_lora/metrics.json").exists():
        for name in MODEL:
            if getattr(config, name) != getattr(Config, name):
                sys.exit(f"error: --{name} cannot change, it is {getattr(Config, name)!r} in the base of v8")
        make_folder(config)
        next(read_data(config.data))
        if config.preferences:
            read_preferences(config.preferences)
        print("there is no base yet: runs v8_lora.py first, some four minutes on two cores", flush=True)
        if subprocess.run([sys.executable, Path(__file__).with_name("v8_lora.py")]).returncode:
            sys.exit("error: v8_lora.py has failed; name a trained model: --base FOLDER")
    return "runs/v8_lora"


def load_checkpoint(mode, flags, folder):
    """Return the checkpoint in `folder` and its Config with `flags` in it; exits if they do not fit.

    In mode train it is the base's, of which the Config takes over what the model is.
    """
    kinds = {field.name: field.type for field in fields(Config)}
    try:
        checkpoint = torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)
        if not re.fullmatch(rf"v[89]_\w+|{NAME}" if mode == "train" else NAME, checkpoint["version"]):
            raise ValueError(f"saved by {checkpoint['version']}")
        own = (*MODEL, "data") if mode == "train" else kinds
        known = {k: v for k, v in checkpoint["config"].items() if k in own}
        saved = {name: kinds[name](value) for name, value in known.items()}
        parts = {"vocab": (str, list, dict), "history": list, "step": int, "seconds": float, "model": dict}
        parts |= {"last": dict, "tokens": int} if mode in ("resume", "evaluate") else {}
        parts |= {"optimizer": dict, "base_hash": str} if mode == "resume" else {}
        damaged = [part for part, kind in parts.items() if not isinstance(checkpoint.get(part), kind)]
        if damaged or saved != known or "n_embd" not in known:
            raise ValueError(f"damaged: {', '.join(damaged) or 'config'}")
        saved["vocab_size"] = len(make_tokenizer(checkpoint["vocab"]).vocab)
        shapes = {name: tuple(weight.shape) for name, weight in checkpoint["model"].items()}
        if shapes["token_embedding.weight"] != (saved["vocab_size"], saved["n_embd"]):
            raise ValueError("damaged: model")
    except Exception as error:  # a file that is missing, cut short or something else altogether
        reason, who = str(error).split("\n")[0], "v8 or v9" if mode == "train" else NAME
        hint = "name another --base" if mode == "train" else f"train first: python {NAME}.py"
        sys.exit(f"error: no checkpoint of {who} in {folder} ({reason}); {hint}")
    saved = asdict(Config(**saved)) | {"out_dir": flags.get("out_dir", Config.out_dir)}
    may_change = kinds.keys() - {*MODEL} if mode == "train" else MAY_CHANGE[mode]
    if mode == "resume" and flags.get("max_steps", saved["max_steps"]) <= checkpoint["step"]:
        may_change = ()  # nothing is left to train
    if mode == "train" and checkpoint["step"] < checkpoint["config"].get("max_steps", 0):
        print(f"note: the training of the model in {folder} is not finished", file=sys.stderr)
    for name, value in flags.items():
        if value != saved[name] and name not in may_change:
            reason = f"--{name} cannot change, it is {saved[name]!r} in the model in {folder}"
            sys.exit(f"error: {reason}; leave out that flag or train anew: python {NAME}.py")
    config = Config(**saved | flags)
    if config.max_new_tokens >= config.block_size:
        reason = f"does not fit into the {config.block_size} tokens that the model looks back at"
        sys.exit(f"error: --max_new_tokens {config.max_new_tokens} {reason}; take fewer")
    return checkpoint, config


def bits_per_char(loss, val_ids, tokenizer):
    """A loss on plain text, in nats a token, as bits a character: how much of it was forgotten."""
    # A token may be several characters: as many as it has bytes that begin one. Special tokens are no text.
    pieces = [piece.encode() if isinstance(piece, str) else piece for piece in tokenizer.vocab]
    chars_of = torch.tensor([sum(byte >> 6 != 2 for byte in piece) for piece in pieces])
    chars_of[list(tokenizer.special_tokens.values())] = 0
    n_chars = sum(chars_of[ids.long()].sum().item() for ids in val_ids[1:].split(2**20))
    return loss * (len(val_ids) - 1) / n_chars / math.log(2)


# ------------------------------------------- alignment -------------------------------------------

# What the simulated human likes and dislikes, chosen before any training.
KIND = """
    good love sweet gentle fair noble kind dear friend friends gracious grace honour true happy joy peace
    thank thanks heaven bless welcome hope mercy virtue worthy beauty faith comfort tender brave well
""".split()
CRUEL = """
    death die dead kill blood hate enemy enemies villain traitor slave curse cursed hell devil fear woe
    grief sorrow weep tears wrong false foul shame war sword base vile banish poor ill
""".split()


def annotate(reply):
    """What the simulated human thinks of a reply: kind words less cruel ones, by the number of its words.

    A word that comes again counts a half, then a third: "good friend, good friend" is no good reply. Fewer
    than eight words count as eight.
    """
    words, seen, total = re.findall(r"[a-z']+", reply.lower()), Counter(), 0.0
    for word in words:
        seen[word] += 1
        total += ((word in KIND) - (word in CRUEL)) / seen[word]
    return total / max(8, len(words))


class WithHead(nn.Module):
    """A language model and from its hidden states a number a token: a reward model or a value function."""

    mean, std = 0.0, 1.0  # of the rewards of the base's replies

    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, nn.Linear(model.config.n_embd, 1, device=model.norm.weight.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def reward(self, x, y):
        """Inputs and targets (B, T), -100 outside the reply, to the means of its tokens' numbers (B,).

        The mean and not, as is usual, the number at the last token: this annotator counts by the word.
        """
        device = self.model.norm.weight.device
        ids = torch.cat([x, y[:, -1:].clamp(min=0)], dim=1).to(device)  # (B, T + 1), the last token too
        mask = F.pad(y != -100, (1, 0)).to(device)  # at the reply's tokens, not before them
        return (self.head(self.model.hidden_states(ids))[..., 0] * mask).sum(dim=1) / mask.sum(dim=1)

    def forward(self, x):
        """Token ids (B, T) to logits (B, T, V) and values (B, T).

        The values' loss does not move the states below: the replies are all that a policy is to learn.
        """
        states = self.model.hidden_states(x)
        return self.model.logits(states), self.head(states.detach())[..., 0]


@contextmanager
def without_adapters():
    """Compute with the model as it was before its adapters, if it has some."""
    LoRALinear.active = False
    try:
        yield
    finally:
        LoRALinear.active = True


def reward_loss(model, batch):
    """-ln of the probability that the chosen replies win (Bradley and Terry 1952), and how often they do."""
    chosen, rejected = (model.reward(*side) for side in batch)
    margin = chosen - rejected
    return -F.logsigmoid(margin).mean(), {"accuracy": (margin > 0).float().mean()}


def log_probs(logits, y, temperature):
    """Logits (B, T, V) to the log-probabilities (B, T) of targets `y`; 0 where these are -100."""
    logits = (logits / temperature).transpose(1, 2)  # (B, V, T)
    return -F.cross_entropy(logits, y, ignore_index=-100, reduction="none")


def exact_kl(policy, reference, y, temperature):
    """KL (B,) in nats a reply of two logits (B, T, V): at each of its tokens the exact sum over all ids."""
    policy, reference = ((logits / temperature).log_softmax(dim=-1) for logits in (policy, reference))
    return ((policy.exp() * (policy - reference)).sum(dim=-1) * (y != -100)).sum(dim=1)


def advantages(rewards, values, mask, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016), all (B, T); mask is 1 in the reply, else 0."""
    result, following, value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        surprise = rewards[:, t] + value - values[:, t]
        following = (surprise + gae_lambda * following) * mask[:, t]
        result[:, t], value = following, values[:, t] * mask[:, t]
    return result


def group_advantages(rewards, n):
    """GRPO's (Shao et al. 2024): rewards (B,) of n replies to each prompt, less their mean, by spread."""
    groups = rewards.view(-1, n)
    return ((groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()


def whiten(x, mask):
    """x (B, T) with mean 0 and standard deviation 1 where mask is 1."""
    mean = (x * mask).sum() / mask.sum()
    std = (((x - mean) ** 2 * mask).sum() / mask.sum()).sqrt()
    return (x - mean) / (std + 1e-8) * mask


def clipped_loss(new, old, advantage, mask, clip_range):
    """PPO's loss (Schulman et al. 2017) of log-probabilities (B, T), and the share of ratios that have left
    1 +- clip_range.

    One that did so in the direction of its advantage has no gradient any more. The mean is over all tokens,
    in grpo too (as in Yu et al. 2025; Shao et al. 2024 take it over each reply first).
    """
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    share = ((ratio != clipped) * mask).sum() / mask.sum()
    return (loss * mask).sum() / mask.sum(), share


def value_loss(new, old, returns, mask, clip_range):
    """Half the squared error of values (B, T); to move further than clip_range from `old` gains nothing.

    So it is in the authors' code (Dhariwal et al. 2017, baselines); the paper has no clipped values.
    """
    clipped = old + (new - old).clamp(-clip_range, clip_range)
    error = torch.maximum((new - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (error * mask).sum() / mask.sum()


def dpo_loss(margin, dpo_beta):
    """-ln sigmoid(dpo_beta * margin), the loss of DPO (Rafailov et al. 2023).

    `margin` (B,) is ln(p / p of the reference) of the chosen reply, less that of the rejected one.
    """
    return -F.logsigmoid(dpo_beta * margin).mean()


def end_of(tokenizer):
    """The id that ends a reply."""
    return tokenizer.special_tokens[SPECIAL_TOKENS[0]]


def sample_replies(model, prompts, n, tokenizer, config, greedy=False):
    """n replies of a model to each prompt, as lists of ids, those to one prompt together."""
    temperature = 1.0 if greedy else config.temperature  # as log_probs has it, and no other flag counts
    config = replace(config, greedy=greedy, temperature=temperature, top_k=0, top_p=1.0)
    asked, replies = [prompt.ids for prompt in prompts for _ in range(n)], []
    for i in tqdm(range(0, len(asked), 128), desc="128 replies", disable=len(asked) < 2000):
        replies += generate(model, asked[i : i + 128], config, end_of(tokenizer))
    return replies


def true_reward(prompts, replies, tokenizer, config):
    """What the annotator thinks of each reply, or in task read whether it is right; (B,)."""
    texts = [to_text(reply, tokenizer) for reply in replies]
    if config.task == "read":
        return torch.tensor([float(p.right == text) for p, text in zip(prompts, texts, strict=True)])
    return torch.tensor([annotate(text) for text in texts])


@torch.no_grad()
def score(judge, prompts, replies):
    """What the reward model thinks of each reply (B,), in standard deviations from the base's mean."""
    parts = [slice(i, i + 128) for i in range(0, len(prompts), 128)]
    asked = [prompt.ids for prompt in prompts]
    scores = torch.cat([judge.reward(*encode_replies(asked[part], replies[part])) for part in parts])
    return (scores - judge.mean) / judge.std


def judge_pairs(base, prompts, noise, tokenizer, config):
    """Let the annotator judge all pairs of the base's replies to each prompt; ties are left out.

    Returns (prompt, chosen, rejected) as texts. A share `noise` of the judgements is the wrong way round, as
    people's are.
    """
    n, pairs, rng = config.n_replies, [], random.Random(config.seed)
    torch.manual_seed(config.seed)
    replies = [to_text(reply, tokenizer) for reply in sample_replies(base, prompts, n, tokenizer, config)]
    for i, prompt in enumerate(prompts):
        for pair in combinations(sorted({*replies[n * i : n * i + n]} - {""}), 2):
            worse, better = sorted(pair, key=annotate)
            if annotate(worse) < annotate(better):
                chosen, rejected = (worse, better) if rng.random() < noise else (better, worse)
                pairs.append((prompt.text, chosen, rejected))
    return pairs


def load_pairs(base, learning, held_out, tokenizer, config, folder):
    """Return encoded pairs to learn from and others to test with. The annotator's are kept in `folder`."""
    path = folder / "preferences.jsonl"
    if config.preferences:
        texts, pairs = {prompt.text for prompt in held_out}, read_preferences(config.preferences)
        pairs, test = ([pair for pair in pairs if (pair[0] in texts) == is_test] for is_test in (False, True))
    else:
        if not path.exists():
            pairs = judge_pairs(base, learning, config.noise, tokenizer, config)
            lines = [json.dumps(dict(zip(PAIR, pair, strict=True))) for pair in pairs]
            path.with_suffix(".tmp").write_text("\n".join(lines), encoding="utf-8")
            path.with_suffix(".tmp").replace(path)
        pairs, test = read_preferences(path), judge_pairs(base, held_out, 0.0, tokenizer, config)
    pairs, test = (encode_pairs(part, tokenizer, config) for part in (pairs, test))
    if not pairs or not test:
        where = f"--preferences {config.preferences}" if config.preferences else "the replies of the base"
        sys.exit(f"error: too few pairs in {where}: {len(pairs)} to learn from, {len(test)} to test with")
    return pairs, test


def encode_pairs(pairs, tokenizer, config):
    """Pairs of texts as ids, those that fit the window, shortest first: neighbours fill a batch.

    A text that was written token by token may be encoded otherwise than it was written.
    """
    end, encoded = [end_of(tokenizer)], []
    for prompt, *replies in pairs:
        ids = encode_prompt([("user", prompt)], tokenizer)
        chosen, rejected = (tokenizer.encode(reply) + end for reply in replies)
        if len(ids) + max(len(chosen), len(rejected)) <= config.block_size:
            encoded.append((ids, chosen, rejected))
    return sorted(encoded, key=lambda pair: sum(map(len, pair)))


def judge_folder(config, base_hash, learning):
    """The folder of the pairs and the reward model of these settings: made once, used by all methods."""
    names = ("n_replies", "noise", "reward_steps", "reward_batch", "reward_rate", "dropout", "seed")
    asked = [prompt.text for prompt in learning]
    key = [base_hash, read_preferences(config.preferences) if config.preferences else asked]
    key += [*(getattr(config, name) for name in names), config.temperature, config.max_new_tokens]
    key += [KIND, CRUEL, inspect.getsource(annotate)]  # another taste, another reward model
    folder = Path("runs", "preferences", hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load_judge(base, pairs, test, learning, tokenizer, config, folder):
    """Return the reward model in `folder`, trained on `pairs` if there is none, and how often it is right.

    Its scores are normalised (Ziegler et al. 2019): replies of the base have mean 0 and standard deviation 1.
    """
    config = replace(config, out_dir=str(folder), max_steps=config.reward_steps, eval_interval=100)
    config.learning_rate, config.warmup_steps = config.reward_rate, 20
    config.lr_floor, config.grad_clip = Config.lr_floor, Config.grad_clip  # the flags are the policy's
    torch.manual_seed(config.seed)
    judge = WithHead(copy.deepcopy(base).requires_grad_(True))
    checkpoint = {"version": NAME, "step": 0, "seconds": 0.0, "tokens": 0, "history": []}
    if Path(folder, "checkpoint.pt").exists():
        try:
            checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            load_weights(judge, checkpoint["last"])
        except Exception as error:  # a file that is cut short or something else altogether
            reason = str(error).split("\n")[0]
            sys.exit(f"error: {folder}/checkpoint.pt is no reward model ({reason}); delete that folder")
    if checkpoint["step"] < config.max_steps:
        print(f"a reward model learns from {len(pairs):,} pairs", flush=True)
        judge.train()
        draw = partial(get_batch, pairs, config.reward_batch, 1)
        train(judge, draw, partial(reward_loss, judge), config, checkpoint, "reward_rate", again="")
    judge.eval().requires_grad_(False)
    scores = []  # of the chosen and of the rejected replies
    for i in range(0, len(test), 128):
        prompts, *sides = zip(*test[i : i + 128], strict=True)
        with torch.no_grad():
            scores.append(torch.stack([judge.reward(*encode_replies(prompts, side)) for side in sides]))
    scores, some = torch.cat(scores, dim=1), learning[:400]  # (2, N)
    torch.manual_seed(config.seed)
    of_base = score(judge, some, sample_replies(base, some, 1, tokenizer, config))
    judge.mean, judge.std = of_base.mean(), of_base.std()
    return judge, (scores[0] > scores[1]).float().mean().item()


def make_draw(policy, base, reward, truth, learning, tokenizer, config):
    """Return the `draw` of ppo and grpo: replies of the policy, judged, as minibatches to learn from."""
    n = config.group_size if config.method == "grpo" else 1

    @torch.no_grad()
    def draw():
        asked = [learning[i] for i in torch.randint(len(learning), (config.batch_size // n,)).tolist()]
        replies = sample_replies(policy.model, asked, n, tokenizer, config)
        asked = [prompt for prompt in asked for _ in range(n)]
        x, y = encode_replies([prompt.ids for prompt in asked], replies, policy.head.weight.device)
        mask = (y != -100).float()  # (B, T): nothing before a reply and nothing after its end counts
        logits, values = policy(x)
        old = log_probs(logits, y, config.temperature)
        with without_adapters():
            reference = log_probs(base(x), y, config.temperature)
        rewards = reward(asked, replies).to(x.device)  # (B,)
        parts = {"x": x, "y": y, "mask": mask, "old": old, "reference": reference}
        if config.method == "ppo":
            last = mask - F.pad(mask[:, 1:], (0, 1))  # 1 at the token that ends a reply
            given = last * rewards[:, None] - config.kl_coef * (old - reference) * mask
            advantage = advantages(given, values, mask, config.gae_lambda)
            parts |= {"advantage": whiten(advantage, mask), "values": values, "returns": advantage + values}
        else:
            parts["advantage"] = group_advantages(rewards, n)[:, None] * mask
        batches = []
        for _ in range(config.n_epochs):
            for rows in torch.randperm(len(x)).chunk(config.n_minibatches):
                batches.append({name: part[rows] for name, part in parts.items()})
        shown = {"score": rewards.mean(), "length": mask.sum(dim=1).mean()}
        shown |= {"truth": truth(asked, replies).mean()} if truth else {}
        shown["kl"] = ((old - reference) * mask).sum(dim=1).mean()  # by the drawn tokens alone
        return batches, {name: number.item() for name, number in shown.items()}

    return draw


def policy_loss(policy, batch, config):
    """The loss of ppo or grpo of a minibatch, and the share of ratios that were clipped."""
    logits, values = policy(batch["x"])
    new, mask = log_probs(logits, batch["y"], config.temperature), batch["mask"]
    loss, clipped = clipped_loss(new, batch["old"], batch["advantage"], mask, config.clip_range)
    if config.method == "ppo":
        loss = loss + 0.5 * value_loss(values, batch["values"], batch["returns"], mask, config.clip_range)
    else:  # grpo has the KL in its loss, as an estimate that is never negative (Schulman 2020)
        log_ratio = batch["reference"] - new
        loss = loss + config.kl_coef * ((log_ratio.exp() - 1 - log_ratio) * mask).sum() / mask.sum()
    return loss, {"clipped": clipped}


def preference_loss(policy, batch, base, config):
    """The loss of dpo, and how often the policy leans to the chosen reply more than the base does."""
    sums = []
    for x, y in batch:  # the chosen replies, the rejected ones
        with torch.no_grad(), without_adapters():
            before = log_probs(base(x), y, config.temperature).sum(dim=1)
        sums.append(log_probs(policy.model(x), y, config.temperature).sum(dim=1) - before)
    margin = sums[0] - sums[1]
    return dpo_loss(margin, config.dpo_beta), {"accuracy": (margin > 0).float().mean()}


@torch.no_grad()
def measure(policy, base, judge, truth, held_out, tokenizer, config):
    """The policy's replies to held-out prompts beside the base's: {name: number} of both, and some as text.

    The KL is exact at each token of a reply. That of best_of_n is at most ln n - (n - 1) / n (Stiennon et al.
    2020, Beirami et al. 2024). "preferred" is the annotator's opinion; of --preferences, the reward model's.
    """
    numbers, texts, opinions = {}, {}, []
    for name, model in (("base", base), ("policy", policy.model)):
        torch.manual_seed(config.seed + len(numbers))
        n = config.n_best if name == "policy" and config.method == "best_of_n" else 1
        with without_adapters() if name == "base" else nullcontext():
            replies = sample_replies(model, held_out, n, tokenizer, config, greedy=config.task == "read")
            if n > 1:
                scores = score(judge, [prompt for prompt in held_out for _ in range(n)], replies)
                best = scores.view(-1, n).argmax(dim=1).tolist()
                replies = [replies[i * n + j] for i, j in enumerate(best)]
            x, y = encode_replies([prompt.ids for prompt in held_out], replies, policy.head.weight.device)
            logits = model(x)
        with without_adapters():
            kl = exact_kl(logits, base(x), y, config.temperature)
        texts[name] = [to_text(reply, tokenizer) for reply in replies]
        words = [word for text in texts[name] for word in re.findall(r"[a-z']+", text.lower())]
        numbers[name] = {"kl": kl.mean().item()}
        if judge:
            numbers[name]["score"] = score(judge, held_out, replies).mean().item()
        if truth:
            numbers[name]["truth"] = truth(held_out, replies).mean().item()
        opinions.append(truth(held_out, replies) if truth else score(judge, held_out, replies))
        numbers[name] |= {"length": len(words) / len(held_out), "distinct_words": len(set(words))}
    if config.method == "best_of_n":  # no model has this distribution: its bound
        numbers["policy"]["kl"] = math.log(config.n_best) - (config.n_best - 1) / config.n_best
    won, tied = opinions[1] > opinions[0], opinions[1] == opinions[0]
    numbers["policy"]["preferred"] = (won + 0.5 * tied).mean().item()
    numbers["base"]["preferred"] = 1 - numbers["policy"]["preferred"]
    return numbers, texts


def report(numbers, texts, held_out, config, checkpoint):
    """Print the numbers and some replies before and after; return what metrics.json holds and sample.txt."""
    print("\n" + " " * 18 + "".join(f"{name:>12}" for name in numbers))
    for name in numbers["policy"]:
        print(f"{name:>18}" + "".join(f"{part[name]:12.4f}" for part in numbers.values()))
    print(f"{'seconds':>18} {checkpoint['seconds']:,.0f}")
    print(f"{'files in':>18} {config.out_dir}\n")
    lines = []
    for i, prompt in enumerate(held_out[:10]):
        lines += [prompt.text, f"  before: {texts['base'][i]!r}", f"  after:  {texts['policy'][i]!r}", ""]
    metrics = {"version": NAME, "before": numbers["base"], **numbers["policy"], "steps": checkpoint["step"]}
    metrics |= {"train_loss": (checkpoint["history"] or [{"loss": 0.0}])[-1]["loss"]}
    metrics |= {"perplexity": math.exp(min(metrics["val_loss"], 700))}  # of plain text, as is val_loss
    metrics |= {"tokens": checkpoint["tokens"]}
    metrics |= {"tokens_per_second": checkpoint["tokens"] / (checkpoint["seconds"] or 1)}
    metrics |= {"seconds": checkpoint["seconds"], "config": asdict(config), "torch": torch.__version__}
    metrics |= {"params": sum(x.numel() for x in checkpoint["model"].values())}
    metrics |= {"device": pick_device(config.device), "history": checkpoint["history"]}
    metrics |= {"threads": torch.get_num_threads()}
    return metrics, "\n".join(lines)


def save_report(metrics, sample, config):
    """Write metrics.json, sample.txt, loss.png, and reward.png: what was shown of each step."""
    Path(config.out_dir, "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    Path(config.out_dir, "sample.txt").write_text(sample, encoding="utf-8")
    for file, names in {"loss.png": ("loss",), "reward.png": ("score", "truth", "kl")}.items():
        history, labels = metrics["history"], {"kl": "KL (nats a reply)", "score": "reward model's score"}
        names = [name for name in names if name in (history or [{}])[0]]
        if names:
            fig, axes = plt.subplots(len(names), sharex=True, squeeze=False, layout="constrained")
            for ax, name in zip(axes[:, 0], names, strict=True):
                ax.plot([point["step"] for point in history], [point[name] for point in history])
                ax.set(ylabel=labels.get(name, name))
            axes[-1, 0].set(xlabel="step")
            fig.savefig(Path(config.out_dir, file))


# -------------------------------------------- sampling --------------------------------------------


def sample_next(logits, config):
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
    return ids.gather(-1, torch.multinomial(probs, num_samples=1))  # from rank to id


@torch.inference_mode()
def generate(model, prompts, config, stop):
    """Go on with each list of ids in `prompts` up to `stop` or by config.max_new_tokens; return what is new.

    All are written in step. When a quarter of the rows has ended, the others close ranks.
    """
    model.eval()
    device = model.norm.weight.device
    prompts = [prompt[-(config.block_size - config.max_new_tokens) :] for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = KVCache(model, len(prompts), lengths.max().item() + config.max_new_tokens)
    idx = pad_sequence([torch.tensor(prompt, device=device) for prompt in prompts], batch_first=True)
    if idx.shape[1] > 1:
        model.hidden_states(idx[:, :-1], cache)  # what is beyond a row's length will be overwritten
    cache.lengths.copy_(lengths - 1)
    last, replies = idx.gather(1, lengths[:, None] - 1), [[] for _ in prompts]
    rows, going = torch.arange(len(prompts), device=device), torch.ones_like(lengths, dtype=torch.bool)
    for _ in range(config.max_new_tokens):
        x = model.hidden_states(last, cache)
        cache.lengths += 1
        logits = model.logits(x[:, -1])
        if not logits.isfinite().all():
            sys.exit("\nerror: the logits of a reply are not finite; try a lower --learning_rate")
        last = sample_next(logits, config)  # (B, 1)
        for row, i, is_going in zip(rows.tolist(), last[:, 0].tolist(), going.tolist(), strict=True):
            if is_going:
                replies[row].append(i)
        going &= last[:, 0] != stop
        if not going.any():
            break
        if going.float().mean() < 0.75:
            cache.keep(going)
            last, rows, going = last[going], rows[going], going[going]
    return replies


def answer(model, tokenizer, config):
    """A reply to --prompt."""
    prompt = encode_prompt([("user", config.prompt.replace("\\n", "\n"))], tokenizer)
    torch.manual_seed(config.seed)
    return to_text(generate(model, [prompt], config, end_of(tokenizer))[0], tokenizer)


# ---------------------------------------------- main ----------------------------------------------


def main():
    mode, flags = parse_flags()
    training = mode in ("train", "resume")
    if mode == "train":
        folder = find_base(flags)
        start, config = load_checkpoint(mode, flags, folder)
        config.base = folder
        checkpoint = {"version": NAME, "vocab": start["vocab"], "step": 0, "seconds": 0.0, "history": []}
        checkpoint["tokens"] = 0
    else:
        checkpoint, config = load_checkpoint(mode, flags, flags.get("out_dir", Config.out_dir))
        start = checkpoint if mode == "sample" else load_checkpoint("train", {}, config.base)[0]
    device = pick_device(config.device)
    if training:
        if Path(config.base).resolve() == Path(config.out_dir).resolve():
            sys.exit(f"error: --base {config.base} would be overwritten; name another folder: --out_dir")
        make_folder(config)
        refuse_idle(flags, config)
    tokenizer = make_tokenizer(checkpoint["vocab"])
    base = LanguageModel(config, config.vocab_size).to(device).eval().requires_grad_(False)
    load_weights(base, start["model"])
    if mode == "sample":
        if config.method == "best_of_n":
            sys.exit(f"error: best_of_n has trained nothing in {config.out_dir}; sample the base")
        return print(answer(base, tokenizer, config))

    base_hash = hash_of(start["model"])
    if checkpoint.setdefault("base_hash", base_hash) != base_hash:
        reason = "is not the one that this was trained from; name that: --base"
        sys.exit(f"error: the model in {config.base} {reason}")
    learning, held_out = load_prompts(config, tokenizer)
    judge = None
    if config.task == "reply":
        folder = judge_folder(config, base_hash, learning)
        pairs, test = load_pairs(base, learning, held_out, tokenizer, config, folder)
        judge, accuracy = load_judge(base, pairs, test, learning, tokenizer, config, folder)
        right = f"{accuracy:.1%} of {len(test):,} held-out pairs"
        print(f"the reward model agrees with the annotator on {right}", flush=True)
    torch.manual_seed(config.seed)
    policy = WithHead(copy.deepcopy(base).requires_grad_(True)).eval()
    if config.lora_rank:
        base = adapt(policy.model, config)  # from here on the base is the policy without its adapters
    asked = partial(true_reward, tokenizer=tokenizer, config=config)
    reward = partial(score, judge) if judge else asked
    truth = None if config.preferences else asked  # the people behind these pairs cannot be asked
    if config.method == "dpo":
        draw = partial(get_batch, pairs, config.batch_size, config.n_minibatches, device)
        loss_of = partial(preference_loss, policy, base=base, config=config)
    else:
        draw = make_draw(policy, base, reward, truth, learning, tokenizer, config)
        loss_of = partial(policy_loss, policy, config=config)
    if training and config.method != "best_of_n":
        train(policy, draw, loss_of, config, checkpoint)
    elif mode == "train":  # best_of_n answers with the base
        keep_finished(config)
        checkpoint |= {"model": start["model"], "last": {}, "optimizer": {}, "config": asdict(config)}
        save_checkpoint(checkpoint, config)
    else:
        load_weights(policy, policy.state_dict() | checkpoint["last"])
    numbers, texts = measure(policy, base, judge, truth, held_out, tokenizer, config)
    val_ids = load_val(config, checkpoint["vocab"])
    for name, model in (("base", base), ("policy", policy.model)):
        with without_adapters() if name == "base" else nullcontext():
            loss = evaluate(model, windows(val_ids, config))
        numbers[name]["bits_per_char"] = bits_per_char(loss, val_ids, tokenizer)
        numbers[name]["val_loss"] = loss
    metrics, sample = report(numbers, texts, held_out, config, checkpoint)
    if judge:
        metrics |= {"pairs": len(pairs), "accuracy": accuracy}
    if training:
        sample += "\n" + answer(policy.model, tokenizer, config) + "\n"
        print(sample)
        save_report(metrics, sample, config)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # the stdout of IDLE and of some notebooks is no file
        sys.stdout.reconfigure(errors="replace")  # print even what the terminal has no character for
    try:
        main()
    except TokenizerError as error:  # the vocabulary file, or a prompt that is no text
        sys.exit(f"error: {error}")
