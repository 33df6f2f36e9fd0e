"""v6, week 7: the same training, faster. 16-bit numbers, Muon, torch.compile, several processes.

Matrix products take 16-bit numbers (--precision, Micikevicius et al. 2018), while weights and losses keep 32.
Muon (Jordan et al. 2024) makes an update equally large in all directions of a matrix. --compile fuses
operations. Under torchrun several processes share each batch, exchange gradients, and learn as one.

Since v5_gpt2.py
  added:    LOCAL_RANK, PRECISIONS, RANK, WORLD_SIZE, compiled, join_processes, make_optimizers,
            pick_precision, total
  changed:  Config, GPT2, LanguageModel, TRAINING, evaluate, hardware, load_checkpoint, load_splits, main,
            matmul_flops, new_vocab, report, train
  removed:  FINE_TUNING, PUBLISHED, fetch, load_published, make_optimizer, new_config, published_name,
            read_published

Result: val loss 3.2628, 2.09 bits/char, 1,976,448 parameters, 154 s on 2 CPU cores.

Run it with: python v6_amp_ddp.py, or with --help to see every flag.
"""

import argparse
import copy
import ctypes
import inspect
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends the program, also while torch loads

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from bpe_tokenizer import BPETokenizer, TokenizerError, encode_data, read_data

# --------------------------------------------- config ---------------------------------------------

NAME = Path(__file__).stem
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many processes torchrun has started
RANK = int(os.environ.get("RANK", 0))  # the number of this one among all
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # and among those of this machine
SAMPLING = ("device", "seed", "greedy", "temperature", "top_k", "top_p", "prompt", "max_new_tokens")
TRAINING = ("max_steps", "learning_rate", "warmup_steps", "lr_floor", "grad_clip", "eval_interval")
TRAINING += ("dropout", "beta2", "weight_decay", "gradient_checkpointing", "precision", "compile")
# Fields that a flag may change when a saved model is loaded; all others stay as they were in its training.
MAY_CHANGE = {"evaluate": ("device",), "sample": SAMPLING, "resume": SAMPLING + TRAINING}
VOCAB_TEXT = 10_000_000  # characters that a vocabulary is learned from, at most
SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|context|>")
# What a preset sets, below the flags. GPT-2's batch of 512 x 1,024 tokens is 4 x 128 here. How it was trained
# was not published in full: the step sizes and what goes with them are GPT-3's (Brown et al. 2020). Its
# dropout inside the attention is left out, as the fused kernel for CPUs has none.
GPT2 = dict(vocab_size=50257, position="learned", block_size=1024, init_std=0.02, dropout=0.1, batch_size=4)
GPT2 |= dict(grad_accum=128, max_steps=20_000, warmup_steps=700, lr_floor=0.1, beta2=0.95, weight_decay=0.1)
GPT2 |= dict(eval_interval=20, optimizer="adamw")
PRESETS = {
    "small": {},
    "gpt2": GPT2 | dict(n_layer=12, n_head=12, n_embd=768, learning_rate=0.0006),
    "gpt2-medium": GPT2 | dict(n_layer=24, n_head=16, n_embd=1024, learning_rate=0.0003),
    "gpt2-large": GPT2 | dict(n_layer=36, n_head=20, n_embd=1280, learning_rate=0.00025),
    "gpt2-xl": GPT2 | dict(n_layer=48, n_head=25, n_embd=1600, learning_rate=0.0002),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Config:
    """Every field is a command-line flag of the same name: --max_steps 500."""

    preset: str = "small"  # small, gpt2, gpt2-medium, gpt2-large or gpt2-xl: other defaults for these flags
    data: str = "input.txt"  # text, folder of .txt, .jsonl, .jsonl.gz, .parquet, or hf:NAME[:CONFIG]
    tokenizer: str = "bpe"  # char, bpe, a vocabulary file, or a folder with GPT-2's two files
    vocab_size: int = 1024  # ids that --tokenizer bpe learns, special tokens included
    out_dir: str = f"runs/{NAME}"  # folder for the checkpoint, metrics, pictures and sample
    device: str = "auto"  # auto, cuda, mps or cpu
    precision: str = "auto"  # of matrix products: fp32, bf16, fp16, or auto: bf16 where hardware has it
    compile: bool = False  # fuse operations with torch.compile: a slow start, then faster steps (GPUs)
    seed: int = 1337  # same seed on the same machine: same numbers
    block_size: int = 256  # tokens in one training example (T)
    batch_size: int = 8  # training examples that are in memory at once (B), of all processes together
    grad_accum: int = 1  # batches whose gradients are added up for one step
    gradient_checkpointing: bool = False  # keep few activations, compute the others twice
    n_embd: int = 192  # numbers in an embedding (C)
    n_head: int = 8  # attention heads, each n_embd / n_head wide
    n_layer: int = 4  # transformer blocks
    init_std: float = 0.1  # standard deviation of the matrices before training
    position: str = "rope"  # learned or rope
    dropout: float = 0.0  # share of activations set to zero in training
    optimizer: str = "muon"  # muon for the matrices of the blocks, or adamw for everything
    max_steps: int = 800  # optimizer steps
    learning_rate: float = 0.02  # peak step size
    warmup_steps: int = 100  # steps in which the step size rises to its peak
    lr_floor: float = 0.0  # share of the peak step size that is left in the last step
    beta2: float = 0.99  # share of AdamW's mean of squared gradients that a step keeps
    weight_decay: float = 0.5  # pull of the matrices towards zero
    grad_clip: float = 1.0  # a gradient with a larger Euclidean norm is scaled down to it
    eval_interval: int = 200  # steps between two estimates of the loss, with a checkpoint each
    eval_tokens: int = 20_000  # tokens of each split in such an estimate
    greedy: bool = False  # always sample the likeliest token
    temperature: float = 1.0  # below 1: safer samples, above 1: bolder ones
    top_k: int = 0  # sample among the k likeliest tokens; 0: among all
    top_p: float = 1.0  # sample among the likeliest that together reach this probability
    prompt: str = ""  # text to continue, \n is a new line; empty: from token 0, with BPE a new line
    max_new_tokens: int = 500  # tokens to sample

    def __post_init__(self):
        may_be_zero = ("seed", "warmup_steps", "lr_floor", "dropout", "weight_decay", "top_k")
        for name, value in vars(self).items():
            if type(value) in (int, float):  # bool and str can be anything
                limit = 2**31 if type(value) is int else math.inf
                if not (0 < value < limit or (value == 0 and name in may_be_zero)):
                    reason = f"it must be positive and below {limit}, or 0 for: {', '.join(may_be_zero)}"
                    sys.exit(f"error: --{name} {value} is impossible, {reason}")
        if self.dropout >= 1 or self.beta2 >= 1 or self.top_p > 1:
            sys.exit("error: --dropout and --beta2 must be below 1 and --top_p at most 1")
        if self.greedy and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            sys.exit("error: --greedy takes --temperature 1 --top_k 0 --top_p 1 only; --no-greedy draws")
        if self.n_embd % self.n_head:
            sys.exit(f"error: --n_embd {self.n_embd} is not a multiple of --n_head {self.n_head}")
        if self.vocab_size > 2**16:
            sys.exit(f"error: --vocab_size {self.vocab_size} is too large: ids are kept as 16 bits")
        choices = {"position": ("learned", "rope"), "optimizer": ("adamw", "muon"), "preset": PRESETS}
        for name, known in (choices | {"precision": ("auto", *PRECISIONS)}).items():
            if getattr(self, name) not in known:
                sys.exit(f"error: no --{name} {getattr(self, name)}, choose from: {', '.join(known)}")
        if self.batch_size % WORLD_SIZE:
            sys.exit(f"error: --batch_size {self.batch_size} cannot be shared by {WORLD_SIZE} processes")
        if self.position == "rope" and self.n_embd // self.n_head % 2:
            sys.exit(f"error: --n_embd {self.n_embd} must give every head an even number, RoPE turns pairs")


def parse_flags():
    """Return the mode and, as a dict, the flags given on the command line and only those."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"error: {message}; --help lists every flag")
    modes = parser.add_mutually_exclusive_group()
    mode = {"dest": "mode", "action": "store_const", "default": "train"}
    modes.add_argument("--sample", **mode, const="sample", help="no training: continue the prompt")
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


def join_processes(device):
    """Meet the other processes that torchrun has started, if it has; on CUDA each takes a GPU."""
    if WORLD_SIZE > 1:
        if device == "mps" or (device == "cuda" and LOCAL_RANK >= torch.cuda.device_count()):
            sys.exit(f"error: --device {device} has no place for so many processes; --device cpu has")
        if device == "cuda":
            torch.cuda.set_device(LOCAL_RANK)
        dist.init_process_group(timeout=timedelta(days=1))  # encoding a large text can take that long


def total(x):
    """The sum of a number over all processes, on each of them."""
    if WORLD_SIZE == 1:
        return x
    x = torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(x)
    return x.item()


# ---------------------------------------------- data ----------------------------------------------


class CharTokenizer:
    """Characters to ids and back: a token is a character, the vocabulary a string, an id a place in it."""

    def __init__(self, vocab):
        self.vocab, self.special_tokens = vocab, {}
        self.ids = {char: i for i, char in enumerate(vocab)}

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
    """Return the tokenizer of a vocabulary: a string of characters, or what BPETokenizer.to_dict returns."""
    return (CharTokenizer if isinstance(vocab, str) else BPETokenizer.from_dict)(vocab)


def new_vocab(config):
    """Return the vocabulary that --tokenizer names; bpe learns it from the beginning of the training text."""
    if config.tokenizer == "char":
        return "".join(sorted({char for *_, text in read_data(config.data) for char in text}))
    if config.tokenizer == "bpe":
        sample = ""  # of bounded size, whatever the size of the data
        for split, _, text in read_data(config.data):
            sample += text if split == "train" else ""
            if len(sample) >= VOCAB_TEXT:
                break
        sample = sample[:VOCAB_TEXT]
        try:
            return BPETokenizer.train(sample, config.vocab_size, SPECIAL_TOKENS, progress=RANK == 0).to_dict()
        except TokenizerError as error:
            sys.exit(f"error: {config.data} is too short, or --vocab_size {config.vocab_size} wrong: {error}")
    return BPETokenizer.load(config.tokenizer).to_dict()


def load_splits(config, vocab):
    """Return the ids (N,) to train on and those for validation, in files that are mapped, not read."""
    if RANK:
        total(0)  # waits until the first process has encoded the text
    folder, splits = encode_data(config.data, make_tokenizer, vocab), []
    if not RANK:
        total(0)
    for name in ("train", "val"):
        path = folder / f"{name}.bin"
        n = path.stat().st_size // 2  # 16 bits an id
        if n <= config.block_size:
            reason = f"{n} tokens in the {name} split, one window needs {config.block_size + 1}"
            sys.exit(f"error: {config.data} is too short: {reason}")
        splits.append(torch.from_file(str(path), shared=True, size=n, dtype=torch.uint16))
    return splits


def get_batch(ids, config):
    """Draw windows of `ids` (N,) at random; return inputs and targets, both (B, T)."""
    starts = torch.randint(len(ids) - config.block_size, (config.batch_size, 1))
    batch = ids[starts + torch.arange(config.block_size + 1)].long()  # (B, T + 1)
    # Teacher forcing: each position sees the true text so far, never the model's own guesses, and is asked
    # for the token that follows. So targets are inputs shifted by one: inputs "To b", targets "o be".
    return batch[:, :-1], batch[:, 1:]


# ---------------------------------------------- model ----------------------------------------------


def rope_rotation(T, config, device):
    """Cosines and sines (2, T, head_size) for apply_rope, the sines of the first half with a minus."""
    D = config.n_embd // config.n_head
    frequencies = 10_000 ** (-torch.arange(0, D, 2, device=device) / D)
    angles = torch.outer(torch.arange(T, device=device), frequencies)  # (T, D / 2) in radians
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)])


def apply_rope(x, rotation):
    """RoPE (Su et al. 2021): turn each pair (x_i, x_{i + D/2}) of x (B, n_head, T, D) by its place's angle i.

    (a, b) becomes (a cos - b sin, b cos + a sin). A query's dot product with a key then depends on their
    positions only by the distance. The pairs are those of GPT-NeoX and of LLaMA in transformers; the paper
    and Meta's LLaMA pair neighbours.
    """
    cos, sin = rotation
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin  # rolled by half, each meets its partner


class MultiHeadAttention(nn.Module):
    """Causal self-attention, all heads in one matrix product and one fused kernel."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, rotation):
        """(B, T, C) to (B, T, C); `rotation` is that of rope_rotation, or None."""
        qkv = self.qkv(x).unflatten(2, (3, self.config.n_head, -1))  # (B, T, 3, n_head, head_size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, head_size)
        if rotation is not None:
            q, k = apply_rope(q, rotation), apply_rope(k, rotation)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # scale, mask, softmax, weighted sum
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

    def forward(self, x, rotation):
        """(B, T, C) to (B, T, C)."""
        x = x + self.dropout(self.attention(self.norm1(x), rotation))
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

    def run(self, part, *inputs):
        """part(*inputs); with --gradient_checkpointing what is inside is computed again for its gradients."""
        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            return recompute(part, *inputs, use_reentrant=False)  # Chen et al. 2016
        return part(*inputs)

    def hidden_states(self, idx):
        """Token ids (B, T) to what the last norm puts out (B, T, C)."""
        x = self.token_embedding(idx)  # (B, T, C)
        T, rotation = idx.shape[1], None
        if self.config.position == "learned":
            x = x + self.position_embedding(torch.arange(T, device=idx.device))
        else:
            rotation = rope_rotation(T, self.config, idx.device)
        x = self.dropout(x)
        for block in self.blocks:
            x = self.run(block, x, rotation)
        return self.norm(x)

    def logits(self, x):
        """Hidden states (..., C) to logits (..., V): their products with the embeddings of all tokens."""
        return F.linear(x, self.token_embedding.weight)

    def forward(self, idx, targets=None):
        """Token ids (B, T) to logits (B, T, V), or with targets (B, T) to the sum of their losses."""
        # Training goes through here: this is what torch.compile and DistributedDataParallel wrap.
        return self.logits(self.hidden_states(idx)) if targets is None else self.loss(idx, targets)

    def loss(self, x, y):
        """Sum of the losses in nats of targets `y` (B, T) for inputs `x` (B, T); a target of -100 is skipped.

        The logits, V for each token, are the largest tensor: they are made for 256 tokens at a time, and with
        --gradient_checkpointing not kept.
        """
        device, loss = self.norm.weight.device, 0.0
        x, y = self.hidden_states(x.to(device)).flatten(0, 1), y.to(device).flatten()  # (B * T, C), (B * T,)
        for piece in zip(x.split(256), y.split(256), strict=True):
            loss += self.run(lambda x, y: F.cross_entropy(self.logits(x).float(), y, reduction="sum"), *piece)
        return loss


# -------------------------------------------- training --------------------------------------------


@torch.inference_mode()
def evaluate(model, ids, config, max_tokens=None):
    """Mean loss in nats per token over consecutive windows of `ids` (N,), every token predicted once.

    With `max_tokens`, over evenly spread windows of about that many tokens: fixed, and cheap to repeat.
    """
    stride = max(1, len(ids) // max_tokens) if max_tokens else 1
    starts = torch.arange(0, len(ids) - 1, stride * config.block_size)[RANK::WORLD_SIZE]
    model.eval()
    loss, n = 0.0, 0
    for first in starts.split(config.batch_size):
        at = first[:, None] + torch.arange(config.block_size + 1)  # (B, T + 1)
        windows = ids[at.clamp(max=len(ids) - 1)].long()
        y = windows[:, 1:].masked_fill(at[:, 1:] >= len(ids), -100)  # the last window is not full
        loss += model.loss(windows[:, :-1], y).item()
        n += (y != -100).sum().item()
    model.train()
    return total(loss) / total(n)


def save_checkpoint(checkpoint, config):
    """Write to a temporary file, then rename: a write that is cut short harms nothing."""
    path = Path(config.out_dir, "checkpoint.pt")
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


def load_checkpoint(mode, flags):
    """Return the saved checkpoint and its Config with `flags` in it; exits if they do not go together."""
    folder, kinds = flags.get("out_dir", Config.out_dir), {field.name: field.type for field in fields(Config)}
    try:
        checkpoint = torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)
        if checkpoint["version"] != NAME:
            raise ValueError(f"saved by {checkpoint['version']}")
        saved = {name: kinds[name](value) for name, value in checkpoint["config"].items()}
        parts = {"vocab": (str, dict), "history": list, "step": int, "seconds": float, "model": dict}
        parts |= {"last": dict, "optimizer": dict, "scaler": dict, "skipped": int}
        damaged = [part for part, kind in parts.items() if not isinstance(checkpoint.get(part), kind)]
        if damaged or saved != checkpoint["config"]:
            raise ValueError(f"damaged: {', '.join(damaged) or 'config'}")
    except Exception as error:  # a file that is missing, cut short or something else altogether
        reason = str(error).split("\n")[0]
        sys.exit(f"error: no checkpoint of {NAME} in {folder} ({reason}); train first: python {NAME}.py")
    saved = asdict(Config(**saved)) | {"out_dir": folder}  # which may have been renamed since
    may_change = MAY_CHANGE[mode]
    if mode == "resume" and flags.get("max_steps", saved["max_steps"]) <= checkpoint["step"]:
        may_change = SAMPLING  # nothing is left to train
    if checkpoint["step"] < saved["max_steps"] and Path(folder, "checkpoint.previous.pt").exists():
        hint = "to get back the one before it, rename checkpoint.previous.pt to checkpoint.pt"
        print(f"note: the run in {folder} is not finished; {hint}", file=sys.stderr)
    for name, value in flags.items():
        if value != saved[name] and name not in may_change:
            reason = f"--{mode} cannot change --{name}, {saved[name]!r} in the saved model"
            sys.exit(f"error: {reason}; leave out that flag or train anew")
    return checkpoint, Config(**saved | flags)


def load_weights(model, weights):
    """Copy saved weights, a dict of tensors, into `model`; exits if they do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        sys.exit(f"error: the saved weights do not fit the model in {NAME}.py; train again")


def make_optimizers(model, config):
    """AdamW (Loshchilov and Hutter 2019) and, for the matrices of the blocks, Muon (Jordan et al. 2024).

    AdamW decays matrices, not biases and norms. Muon's steps are scaled to the size that AdamW's have (Liu et
    al. 2025), so that both take the same learning rate and weight decay. Its directions are computed in bf16.
    """
    hidden, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        for_muon = config.optimizer == "muon" and name.startswith("blocks.")
        (vectors if p.dim() < 2 else hidden if for_muon else matrices).append(p)
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimizers = {"adamw": torch.optim.AdamW(groups, **options, betas=(0.9, config.beta2), fused=True)}
    if hidden:
        optimizers["muon"] = torch.optim.Muon(hidden, **options, adjust_lr_fn="match_rms_adamw")
    return optimizers


def learning_rate_at(step, config):
    """Linear warm-up to config.learning_rate, then half a cosine down to lr_floor of it at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    floor = config.lr_floor
    return config.learning_rate * ((1 + floor) / 2 + (1 - floor) / 2 * math.cos(math.pi * progress))


def compiled(model, x, y, autocast):
    """`model` as torch.compile makes it, tried out on x and y (B, T); as it is if there is no compiler."""
    try:
        fast = torch.compile(model)
        with autocast:
            fast(x, y)
        return fast
    except Exception as error:  # torch has many for this
        reason = f"{' '.join(str(error).split()):.200}"
        if not RANK:
            print(f"note: torch.compile fails here, training goes on without it ({reason})", file=sys.stderr)
        return model


def train(model, train_ids, val_ids, config, checkpoint):
    """Train to config.max_steps from where `checkpoint` stands; save at each estimate, then also at Ctrl-C.

    checkpoint["model"] holds the weights of the lowest val loss, checkpoint["last"] those to go on from.
    """
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, PRECISIONS[config.precision], enabled=config.precision != "fp32")
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    optimizers = make_optimizers(model, config)
    if "last" in checkpoint:
        load_weights(model, checkpoint["last"])
        for name, optimizer in optimizers.items():
            settings = optimizer.state_dict()["param_groups"]  # of `config`, not of the saved run
            optimizer.load_state_dict({"state": checkpoint["optimizer"][name], "param_groups": settings})
        if scaler.is_enabled() and checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
    start = time.perf_counter() - checkpoint["seconds"]
    steps = range(checkpoint["step"] + 1, config.max_steps + 1)
    plain = wrapped = DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    if config.compile and steps:
        wrapped = compiled(plain, *(ids[RANK::WORLD_SIZE] for ids in get_batch(train_ids, config)), autocast)
        config.compile = wrapped is not plain
    stop, signals = [], (signal.SIGINT, signal.SIGTERM)  # these leave a note, to be read between two steps
    handlers = {number: signal.signal(number, lambda *_: stop.append(1)) for number in signals}
    options = dict(initial=checkpoint["step"], total=config.max_steps, unit="step", disable=RANK > 0)
    for step in (bar := tqdm(steps, **options)):
        torch.manual_seed(1_000_000 * config.seed + step)  # a resumed run draws what it would have drawn
        batches = [get_batch(train_ids, config) for _ in range(config.grad_accum)]
        torch.manual_seed((1_000_000 * config.seed + step) * WORLD_SIZE + RANK)  # each its own dropout
        model.zero_grad()
        loss = 0.0
        for i, (x, y) in enumerate(batches, start=1):
            share_later = WORLD_SIZE > 1 and i < config.grad_accum  # the last backward pass shares gradients
            with wrapped.no_sync() if share_later else nullcontext():
                with autocast:
                    part = wrapped(x[RANK::WORLD_SIZE], y[RANK::WORLD_SIZE])
                part = part / (config.grad_accum * y.numel())  # the mean over all that is added up
                # The mean over processes that DistributedDataParallel takes, times WORLD_SIZE, is a sum.
                scaler.scale(WORLD_SIZE * part).backward()
            loss += part.detach()
        for optimizer in optimizers.values():
            scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, config)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        if scaler.is_enabled() and not norm.isfinite():  # a gradient was too large for 16 bits
            checkpoint["skipped"] += 1
        else:
            for optimizer in optimizers.values():
                optimizer.step()
        scaler.update()  # halves the scale after an overflow, doubles it after 2,000 steps without one

        evaluate_now = step % config.eval_interval == 0 or step == config.max_steps
        stop_now = total(len(stop)) > 0  # asked once: a Ctrl-C from here on counts for the next step
        if evaluate_now or stop_now or step % 10 == 0 or config.grad_accum > 1:
            seconds = time.perf_counter() - start
            loss = total(loss.item())
            status = f"loss {loss:.4f}, {step * config.grad_accum * x.numel() / seconds:,.0f} tokens/s"
            bar.set_postfix_str(status, refresh=False)
            # fp16 skips single overflows; if the scale falls to nothing, none would help
            hopeless = scaler.get_scale() < 1e-6 if scaler.is_enabled() else not norm.isfinite()
            if hopeless or not math.isfinite(loss):
                sys.exit(f"\nerror: the loss is not finite at step {step}; try a lower --learning_rate")
        if evaluate_now:
            train_loss = evaluate(model, train_ids, config, config.eval_tokens)
            val_loss = evaluate(model, val_ids, config, config.eval_tokens)
            if not math.isfinite(val_loss):
                sys.exit(f"\nerror: the loss is not finite at step {step}; try a lower --learning_rate")
            point = {"step": step, "seconds": seconds, "train_loss": train_loss, "val_loss": val_loss}
            checkpoint["history"].append(point)
            if val_loss == min(point["val_loss"] for point in checkpoint["history"]):
                checkpoint["model"] = copy.deepcopy(model.state_dict())
        if evaluate_now or (stop_now and checkpoint["history"]):
            if "last" not in checkpoint and not RANK:  # the first save of a new run
                keep_finished(config)
            states = {name: optimizer.state_dict()["state"] for name, optimizer in optimizers.items()}
            checkpoint.update(last=model.state_dict(), optimizer=states, scaler=scaler.state_dict())
            checkpoint.update(config=asdict(config), step=step, seconds=time.perf_counter() - start)
            if not RANK:
                save_checkpoint(checkpoint, config)
            total(0)  # no process goes on, or ends, before it is written
        if stop_now and checkpoint["history"]:
            sys.exit(f"\nstopped after step {step} and saved; the same command with --resume goes on")
        if stop_now:
            sys.exit(f"\nstopped after step {step}; nothing is saved before the first estimate")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if total(len(stop)):
        sys.exit("\nstopped after the last step, which is saved; the same command with --resume goes on")


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


def matmul_flops(device, dtype):
    """Floating-point operations per second in a product of two large matrices, the best of five."""
    n = 8192 if device.type == "cuda" else 512 if dtype == torch.float16 else 2048  # CPUs emulate fp16
    speeds = []
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits until it is computed
        speeds.append(2 * n**3 / (time.perf_counter() - start))
    return max(speeds)


def hardware(model, config, speed):
    """What training took of the machine: peak memory in bytes, operations per second, share of matmul_flops.

    A token costs 6 operations for each number in a matrix and 12 C T in each block, the half that the mask
    hides included, nothing that is computed twice (Chowdhery et al. 2022, appendix B).
    """
    device, L, C, T = next(model.parameters()).device, config.n_layer, config.n_embd, config.block_size
    flops = speed * (6 * (12 * L * C**2 + config.vocab_size * C) + 12 * L * C * T)
    measured = {"peak_memory": peak_memory(device), "flops_per_second": flops}
    peak = WORLD_SIZE * matmul_flops(device, PRECISIONS[config.precision])
    return measured | {"share_of_matmul": flops / peak}


def report(model, tokenizer, train_ids, val_ids, config, checkpoint, before):
    """Evaluate on the whole validation split; print a summary; return what metrics.json will hold."""
    tokens = checkpoint["step"] * config.grad_accum * config.batch_size * config.block_size
    val_loss = evaluate(model, val_ids, config)
    # A token may be several characters: as many as it has bytes that begin one. Special tokens are no text.
    pieces = [piece.encode() if isinstance(piece, str) else piece for piece in tokenizer.vocab]
    chars_of = torch.tensor([sum(byte >> 6 != 2 for byte in piece) for piece in pieces])
    chars_of[list(tokenizer.special_tokens.values())] = 0
    n_chars = sum(chars_of[ids.long()].sum().item() for ids in val_ids[1:].split(2**20))
    metrics = {
        "params": sum(p.numel() for p in model.parameters()),
        "seconds": checkpoint["seconds"],
        "tokens_per_second": tokens / (checkpoint["seconds"] or 1),  # none if only evaluated
        "train_loss": evaluate(model, train_ids[: len(val_ids)], config),  # as much text as for val_loss
        "val_loss": val_loss,
        "perplexity": math.exp(min(val_loss, 700)),  # a float holds no more
        "bits_per_char": val_loss * (len(val_ids) - 1) / n_chars / math.log(2),
    }
    if steps := checkpoint["step"] - before["step"]:  # since the checkpoint that this training began with
        seconds = checkpoint["seconds"] - before["seconds"]
        metrics |= hardware(model, config, tokens / checkpoint["step"] * steps / seconds)
    for name, value in metrics.items():
        print(f"{name:>18} {value:,.4f}".removesuffix(".0000"))
    skipped = f", {checkpoint['skipped']} steps skipped" if config.precision == "fp16" else ""
    print(f"{'precision':>18} {config.precision}, evaluated in fp32{skipped}")
    print(f"{'files in':>18} {config.out_dir}\n")
    nothing = math.log(len(tokenizer.vocab))  # the loss if every token is given the same probability
    if val_loss > nothing:
        print(f"note: knowing nothing gives {nothing:.4f}; is the text too small, the step size too large?\n")
    metrics |= {"version": NAME, "tokens": tokens, "config": asdict(config), "torch": torch.__version__}
    metrics |= {"device": model.norm.weight.device.type, "threads": torch.get_num_threads()}
    metrics |= {"precision": config.precision, "skipped": checkpoint["skipped"], "processes": WORLD_SIZE}
    return metrics | {"steps": checkpoint["step"], "history": checkpoint["history"]}


def save_report(metrics, sample, config):
    """Write metrics.json, sample.txt and loss.png."""
    Path(config.out_dir, "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    Path(config.out_dir, "sample.txt").write_text(sample, encoding="utf-8")
    fig, ax = plt.subplots(layout="constrained")
    for name in ("train_loss", "val_loss"):
        points = [(point["step"], point[name]) for point in metrics["history"]]
        ax.plot(*zip(*points, strict=True), ".-", label=name)
    ax.set(xlabel="step", ylabel="loss (nats per token)")
    ax.legend()
    right = ax.secondary_yaxis("right")  # the same ticks as perplexity
    right.set_ylabel("perplexity")
    right.yaxis.set_major_formatter(lambda loss, _: f"{math.exp(min(loss, 700)):,.4g}")
    fig.savefig(Path(config.out_dir, "loss.png"))


# -------------------------------------------- sampling --------------------------------------------


def sample_next(logits, config):
    """Draw ids (B, 1) from logits (B, V) after temperature, top-k and top-p.

    Top-k is by Fan et al. 2018, top-p or nucleus sampling by Holtzman et al. 2020.
    """
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
def generate(model, idx, config):
    """Continue token ids `idx` (B, T) by config.max_new_tokens; return (B, T + max_new_tokens)."""
    model.eval()
    for _ in range(config.max_new_tokens):
        x = model.hidden_states(idx[:, -config.block_size :])
        logits = model.logits(x[:, -1])  # (B, V), what follows the last position
        if config.greedy:
            next_id = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        else:
            next_id = sample_next(logits, config)
        idx = torch.cat([idx, next_id], dim=1)
    return idx


# ---------------------------------------------- main ----------------------------------------------


def main():
    mode, flags = parse_flags()
    if mode == "train":
        config = Config(**PRESETS.get(flags.get("preset"), {}) | flags)
    else:
        checkpoint, config = load_checkpoint(mode, flags)
    device = pick_device(config.device)
    join_processes(device)
    if training := mode in ("train", "resume"):
        config.precision = pick_precision(config.precision, device)
    if mode == "train":
        checkpoint = {"version": NAME, "vocab": new_vocab(config), "step": 0, "seconds": 0.0, "history": []}
        checkpoint["skipped"] = 0  # steps whose gradient was too large for fp16
    before, tokenizer = dict(checkpoint), make_tokenizer(checkpoint["vocab"])
    config.vocab_size = len(tokenizer.vocab)
    if flags.get("vocab_size", config.vocab_size) != config.vocab_size:
        sys.exit(f"error: --vocab_size must be {config.vocab_size}, as --tokenizer {config.tokenizer} has it")
    first = [0] if config.tokenizer == "char" else tokenizer.encode("\n")  # if there is no prompt
    prompt = torch.tensor([tokenizer.encode(config.prompt.replace("\\n", "\n")) or first], device=device)
    if mode != "sample":
        train_ids, val_ids = load_splits(config, checkpoint["vocab"])

    torch.manual_seed(config.seed)
    model = LanguageModel(config, len(tokenizer.vocab)).to(device)
    if "model" in checkpoint:
        load_weights(model, checkpoint["model"])
    if training:
        try:
            Path(config.out_dir).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=config.out_dir).close()  # a folder that is there may be read-only
        except OSError as error:
            sys.exit(f"error: cannot write to {config.out_dir} ({error}); name another folder: --out_dir")
        train(model, train_ids, val_ids, config, checkpoint)
        model.load_state_dict(checkpoint["model"])
    if mode != "sample":
        metrics = report(model, tokenizer, train_ids, val_ids, config, checkpoint, before)
    if mode != "evaluate":
        torch.manual_seed(config.seed)
        sample = tokenizer.decode(generate(model, prompt, config)[0].tolist())  # prompt: (1, T)
        print(sample)
    if training and not RANK:
        save_report(metrics, sample, config)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # the stdout of IDLE and of some notebooks is no file
        sys.stdout.reconfigure(errors="replace")  # print even what the terminal has no character for
    if RANK:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # the first process tells for all
    try:
        main()
    except TokenizerError as error:  # the vocabulary file, or a prompt that is no text
        sys.exit(f"error: {error}")
