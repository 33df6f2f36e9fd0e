"""v7, week 8: inference: a cache for keys and values, 8-bit and 4-bit weights. Fast, and small.

To write one token a model reads all of its weights: for a large one memory decides how fast. A KVCache keeps
what attention has computed, so that a token costs one row and not the whole text. An Engine continues several
texts at once: one reading serves them all. Weights in 8 bits or 4 are fewer bytes to read. The model is one
that v5 or v6 has trained (--base); if there is none, one is trained first.

Since v6_amp_ddp.py
  added:    Engine, FloatLinear, Int4Linear, Int8Linear, KINDS, KVCache, QUANTIZING, QuantizedLinear,
            Sequence, decoding_speed, find_model, load_model, memory_bandwidth, quantize
  changed:  Config, LanguageModel, MAY_CHANGE, MultiHeadAttention, PRECISIONS, SAMPLING, TRAINING,
            TransformerBlock, evaluate, generate, load_checkpoint, load_splits, main, new_vocab, report,
            rope_rotation, sample_next, save_report, train
  removed:  GPT2, LOCAL_RANK, PRESETS, RANK, WORLD_SIZE, compiled, hardware, join_processes, matmul_flops,
            peak_memory, total

Result: int8 2.02 MB, 2.09 bits/char, 1422 tokens/s; as it was 7.91 MB, 2.09, 945 on 2 CPU cores.

Run it with: python v7_quantize.py, or with --help to see every flag.
"""

import argparse
import copy
import inspect
import json
import math
import re
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends the program, also while torch loads

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from bpe_tokenizer import BPETokenizer, TokenizerError, encode_data, read_data

# --------------------------------------------- config ---------------------------------------------

NAME = Path(__file__).stem
SAMPLING = ("device", "seed", "greedy", "temperature", "top_k", "top_p", "prompt", "max_new_tokens")
SAMPLING += ("stream",)
TRAINING = ("max_steps", "learning_rate", "warmup_steps", "lr_floor", "grad_clip", "eval_interval")
TRAINING += ("dropout", "beta2", "weight_decay", "precision")
QUANTIZING = ("quantize", "group_size")
# Fields that a flag may change when a saved model is loaded; all others stay as they were in its training.
MAY_CHANGE = {"evaluate": ("device",), "sample": SAMPLING, "resume": SAMPLING + QUANTIZING + TRAINING}
MAY_CHANGE |= {"train": (*SAMPLING, *QUANTIZING, "base", "out_dir")}  # when it begins with a base
VOCAB_TEXT = 10_000_000  # characters that a vocabulary is learned from, at most
SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|context|>")
KINDS = ("none", "int8", "int4")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Config:
    """Every field is a command-line flag of the same name: --max_steps 500."""

    data: str = "input.txt"  # text, folder of .txt, .jsonl, .jsonl.gz, .parquet, or hf:NAME[:CONFIG]
    tokenizer: str = "bpe"  # char, bpe, a vocabulary file, or a folder with GPT-2's two files
    vocab_size: int = 1024  # ids that --tokenizer bpe learns, special tokens included
    out_dir: str = f"runs/{NAME}"  # folder for the checkpoint, metrics, pictures and sample
    base: str = "auto"  # folder of a trained model; auto: runs/v6_amp_ddp if it is finished; none: train one
    quantize: str = "int8"  # weights as int8, int4, or none: as they are
    group_size: int = 32  # weights in a row of a matrix that share a scale and a zero point in int4
    device: str = "auto"  # auto, cuda, mps or cpu
    precision: str = "auto"  # of products in training: fp32, bf16, or auto: bf16 where hardware has it
    seed: int = 1337  # same seed on the same machine: same numbers
    block_size: int = 256  # tokens in one training example (T)
    batch_size: int = 8  # training examples that are in memory at once (B)
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
    stream: bool = False  # print the sample while it is written

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
        choices = {"position": ("learned", "rope"), "optimizer": ("adamw", "muon")}
        choices |= {"precision": ("auto", *PRECISIONS), "quantize": KINDS}
        for name, known in (choices | {"group_size": (16, 32, 64, 128, 256)}).items():
            if getattr(self, name) not in known:
                known = ", ".join(map(str, known))
                sys.exit(f"error: no --{name} {getattr(self, name)}, choose from: {known}")
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
            return BPETokenizer.train(sample, config.vocab_size, SPECIAL_TOKENS, progress=True).to_dict()
        except TokenizerError as error:
            sys.exit(f"error: {config.data} is too short, or --vocab_size {config.vocab_size} wrong: {error}")
    return BPETokenizer.load(config.tokenizer).to_dict()


def load_splits(config, vocab):
    """Return the ids (N,) to train on and those for validation, in files that are mapped, not read."""
    folder, splits = encode_data(config.data, make_tokenizer, vocab), []
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


class QuantizedLinear(nn.Module):
    """Stands in for an nn.Linear, or for the nn.Embedding that also makes the logits; its weights are (N, K).

    Each kind has `rows`, its weights in float32, and `product`, a kernel of PyTorch's that reads them as they
    are stored. These kernels check nothing: `fits` says whether they take the shape.
    """

    def __init__(self, layer):
        super().__init__()
        (self.n, self.k), self.bias = layer.weight.shape, getattr(layer, "bias", None)

    def forward(self, x):
        """x (..., K) to (..., N), as nn.Linear does; with gradients or on a GPU by unpacked weights."""
        if self.fits and x.device.type == "cpu" and not torch.is_grad_enabled():
            y = self.product(x.flatten(0, -2))[:, : self.n].unflatten(0, x.shape[:-1])
        else:
            y = F.linear(x, self.rows(slice(self.n)))
        return y if self.bias is None else y + self.bias


class FloatLinear(QuantizedLinear):
    """Weights as they are. oneDNN multiplies a single row with them twice as fast as what nn.Linear calls."""

    def __init__(self, layer, config):
        super().__init__(layer)
        self.weight, self.fits = layer.weight, torch.backends.mkldnn.is_available()

    def rows(self, ids):
        """The weights (..., K) of rows `ids` (...), or of a slice of them."""
        return self.weight[ids]

    def product(self, x):
        """x (M, K) to (M, N)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class Int8Linear(QuantizedLinear):
    """Whole numbers from -127 to 127, a scale for each row (Krishnamoorthi 2018): weight = code * scale."""

    def __init__(self, layer, config):
        super().__init__(layer)
        self.fits = self.k % 16 == 0
        scales = (layer.weight.abs().amax(dim=1).clamp(min=1e-12) / 127).bfloat16()
        self.register_buffer("scales", scales)  # (N,)
        self.register_buffer("codes", (layer.weight / scales[:, None]).round().to(torch.int8))  # (N, K)

    def rows(self, ids):
        """The weights (..., K) of rows `ids` (...), or of a slice of them."""
        return self.codes[ids] * self.scales[ids, None].float()

    def product(self, x):
        """x (M, K) to (M, N); the kernel is fast in bfloat16 only."""
        return torch._weight_int8pack_mm(x.bfloat16(), self.codes, self.scales).float()


class Int4Linear(QuantizedLinear):
    """Whole numbers from 0 to 15, two in a byte: weight = (code - 8) * scale + zero.

    Every group of group_size neighbours in a row has a scale and a zero (Shen et al. 2020). Both are rounded
    to bfloat16 before the codes are computed. A range that includes 0 keeps the error of that small.
    """

    def __init__(self, layer, config):
        super().__init__(layer)
        self.group_size = config.group_size
        self.fits = self.k % self.group_size == 0 and self.group_size >= 32
        # Zeros at the ends make whole groups, and the whole 16s of rows that the kernel takes.
        weight = F.pad(layer.weight, (0, -self.k % self.group_size, 0, -self.n % 16))
        groups = weight.unflatten(1, (-1, self.group_size))  # (N, groups, group_size)
        low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
        scales = ((high - low) / 15).clamp(min=1e-12).bfloat16()
        zeros = (low + 8 * scales.float()).bfloat16()
        codes = ((groups - zeros[..., None]) / scales[..., None] + 8).round().clamp(0, 15)
        codes = codes.flatten(1).to(torch.uint8)
        self.register_buffer("codes", codes[:, ::2] << 4 | codes[:, 1::2])  # (N, K / 2)
        self.register_buffer("scales", scales)  # (N, groups)
        self.register_buffer("zeros", zeros)

    def unpacked(self, ids):
        """The codes (..., K) of rows `ids` (...), one in a byte."""
        return torch.stack([self.codes[ids] >> 4, self.codes[ids] & 15], dim=-1).flatten(-2)

    def rows(self, ids):
        """The weights (..., K) of rows `ids` (...), or of a slice of them."""
        codes = self.unpacked(ids).unflatten(-1, (-1, self.group_size)).float()
        weight = (codes - 8) * self.scales[ids, :, None] + self.zeros[ids, :, None]
        return weight.flatten(-2)[..., : self.k]

    @cached_property
    def packed(self):
        """What the kernel takes: codes in an order that depends on the machine, group size, scales, zeros."""
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.unpacked(slice(None)).int(), 1)
        return codes, self.group_size, torch.stack([self.scales.T, self.zeros.T], dim=2).contiguous()

    def product(self, x):
        """x (M, K) to (M, N); the kernel is fast in bfloat16 only."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), *self.packed).float()


@torch.no_grad()
def quantize(model, config):
    """Replace the linear layers and the token embedding of a model as --quantize says; return the model."""
    make = {"none": FloatLinear, "int8": Int8Linear, "int4": Int4Linear}[config.quantize]
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, make(child, config))
    model.token_embedding = make(model.token_embedding, config)
    model.embed, model.logits = model.token_embedding.rows, model.token_embedding.forward
    return model


# -------------------------------------------- training --------------------------------------------


@torch.inference_mode()
def evaluate(model, ids, config, max_tokens=None):
    """Mean loss in nats per token over consecutive windows of `ids` (N,), every token predicted once.

    With `max_tokens`, over evenly spread windows of about that many tokens: fixed, and cheap to repeat.
    """
    stride = max(1, len(ids) // max_tokens) if max_tokens else 1
    starts = torch.arange(0, len(ids) - 1, stride * config.block_size)
    model.eval()
    loss, n = 0.0, 0
    for first in starts.split(config.batch_size):
        at = first[:, None] + torch.arange(config.block_size + 1)  # (B, T + 1)
        windows = ids[at.clamp(max=len(ids) - 1)].long()
        y = windows[:, 1:].masked_fill(at[:, 1:] >= len(ids), -100)  # the last window is not full
        loss += model.loss(windows[:, :-1], y).item()
        n += (y != -100).sum().item()
    model.train()
    return loss / n


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


def load_checkpoint(mode, flags, folder):
    """Return the checkpoint in `folder` and its Config with `flags` in it; exits if they do not fit."""
    kinds = {field.name: field.type for field in fields(Config)}
    try:
        checkpoint = torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)
        if not re.fullmatch(rf"v[5-9]_\w+|{NAME}" if mode == "train" else NAME, checkpoint["version"]):
            raise ValueError(f"saved by {checkpoint['version']}")
        # What is done with a base is not its own, nor is how precisely it was trained.
        foreign = (*MAY_CHANGE["train"], "precision") if mode == "train" else ()
        known = {k: v for k, v in checkpoint["config"].items() if k in kinds and k not in foreign}
        saved = {name: kinds[name](value) for name, value in known.items()}
        parts = {"vocab": (str, dict), "history": list, "step": int, "seconds": float, "model": dict}
        parts |= {"last": dict, "optimizer": dict} if mode == "resume" else {}
        damaged = [part for part, kind in parts.items() if not isinstance(checkpoint.get(part), kind)]
        if damaged or saved != known or "n_embd" not in known:
            raise ValueError(f"damaged: {', '.join(damaged) or 'config'}")
        if mode == "train" and any(name.endswith(".codes") for name in checkpoint["model"]):
            raise ValueError("quantized already")
    except Exception as error:  # a file that is missing, cut short or something else altogether
        reason, who = str(error).split("\n")[0], "v5 to v9" if mode == "train" else NAME
        go_on = " --resume" * Path(folder, "base", "checkpoint.pt").exists()
        hint = "name another --base, or none" if mode == "train" else f"train first: python {NAME}.py{go_on}"
        sys.exit(f"error: no checkpoint of {who} in {folder} ({reason}); {hint}")
    saved = asdict(Config(**saved)) | {"out_dir": flags.get("out_dir", Config.out_dir)}
    may_change = MAY_CHANGE[mode]
    if mode == "resume" and flags.get("max_steps", saved["max_steps"]) <= checkpoint["step"]:
        may_change = SAMPLING + QUANTIZING  # nothing is left to train
    if mode == "train" and checkpoint["step"] < saved["max_steps"]:
        print(f"note: the training of the model in {folder} is not finished", file=sys.stderr)
    for name, value in flags.items():
        if value != saved[name] and name not in may_change:
            reason = f"--{name} cannot change, it is {saved[name]!r} in the model in {folder}"
            anew = f"quantize anew: python {NAME}.py" if name in QUANTIZING else "train anew: --base none"
            sys.exit(f"error: {reason}; leave out that flag or {anew}")
    return checkpoint, Config(**saved | flags)


def find_model(mode, flags):
    """Return the folder of the model to begin with, or None if one is to be trained."""
    base, out_dir = flags.get("base", Config.base), flags.get("out_dir", Config.out_dir)
    own = f"{out_dir}/base"  # where a model is trained, if none is found
    if mode != "train":
        return own if mode == "resume" else out_dir
    if base != "auto":
        if Path(base).resolve() == Path(out_dir).resolve():
            sys.exit(f"error: --base {base} would be overwritten; name another folder: --out_dir")
        return base if base != "none" else None
    finished = (folder for folder in ("runs/v6_amp_ddp", own) if Path(folder, "metrics.json").exists())
    return next(finished, None)


def load_weights(model, weights):
    """Copy saved weights, a dict of tensors, into `model`; exits if they do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        sys.exit(f"error: the saved weights do not fit the model in {NAME}.py; train again")


def load_model(weights, config, device):
    """A model of saved weights, quantized as --quantize says: when they were saved, else now."""
    before = any(name.endswith(".codes") for name in weights)
    with torch.device("meta"):  # shapes without numbers
        model = LanguageModel(config, config.vocab_size)
        if before:
            quantize(model, config)
    model.to_empty(device=device)
    load_weights(model, weights)
    model = model if before else quantize(model, config)
    fast = device == "cpu" and all(getattr(part, "fits", True) for part in model.modules())
    if config.quantize != "none" and not fast:
        unpacked = f"weights of {config.quantize} are unpacked for each product"
        print(f"note: there is no fast kernel for this shape or device: {unpacked}", file=sys.stderr)
    return model


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


def train(model, train_ids, val_ids, config, checkpoint):
    """Train to config.max_steps from where `checkpoint` stands; save at each estimate, then also at Ctrl-C.

    checkpoint["model"] holds the weights of the lowest val loss, checkpoint["last"] those to go on from.
    """
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, PRECISIONS[config.precision], enabled=config.precision != "fp32")
    optimizers = make_optimizers(model, config)
    if "last" in checkpoint:
        load_weights(model, checkpoint["last"])
        for name, optimizer in optimizers.items():
            settings = optimizer.state_dict()["param_groups"]  # of `config`, not of the saved run
            optimizer.load_state_dict({"state": checkpoint["optimizer"][name], "param_groups": settings})
    start = time.perf_counter() - checkpoint["seconds"]
    steps = range(checkpoint["step"] + 1, config.max_steps + 1)
    stop, signals = [], (signal.SIGINT, signal.SIGTERM)  # these leave a note, to be read between two steps
    handlers = {number: signal.signal(number, lambda *_: stop.append(1)) for number in signals}
    for step in (bar := tqdm(steps, initial=checkpoint["step"], total=config.max_steps, unit="step")):
        torch.manual_seed(1_000_000 * config.seed + step)  # a resumed run draws what it would have drawn
        x, y = get_batch(train_ids, config)
        model.zero_grad()
        with autocast:
            loss = model.loss(x, y) / y.numel()
        loss.backward()
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, config)
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for optimizer in optimizers.values():
            optimizer.step()

        evaluate_now = step % config.eval_interval == 0 or step == config.max_steps
        stop_now = bool(stop)  # asked once: a Ctrl-C from here on counts for the next step
        if evaluate_now or stop_now or step % 10 == 0:
            seconds = time.perf_counter() - start
            loss = loss.item()
            status = f"loss {loss:.4f}, {step * x.numel() / seconds:,.0f} tokens/s"
            bar.set_postfix_str(status, refresh=False)
            if not math.isfinite(loss):
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
            if "last" not in checkpoint:  # the first save of a new run
                keep_finished(config)
            states = {name: optimizer.state_dict()["state"] for name, optimizer in optimizers.items()}
            checkpoint.update(last=model.state_dict(), optimizer=states)
            checkpoint.update(config=asdict(config), step=step, seconds=time.perf_counter() - start)
            save_checkpoint(checkpoint, config)
        if stop_now and checkpoint["history"]:
            sys.exit(f"\nstopped after step {step} and saved; the same command with --resume goes on")
        if stop_now:
            sys.exit(f"\nstopped after step {step}; nothing is saved before the first estimate")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stop:
        sys.exit("\nstopped after the last step, which is saved; the same command with --resume goes on")


def memory_bandwidth(device):
    """Bytes a second that a sum over a large tensor reads, the best of five."""
    x, speeds = torch.ones(2**27, device=device), []
    for _ in range(5):
        start = time.perf_counter()
        x.sum().item()
        speeds.append(x.nbytes / (time.perf_counter() - start))
    return max(speeds)


def decoding_speed(model, ids, n_rows):
    """Tokens a second of n_rows greedy texts together, 64 each after 32 of `ids` (N,), the best of three."""
    engine, speeds = Engine(model, n_rows), []
    for _ in range(3):
        rows = [engine.add(ids[:32].tolist(), Config(greedy=True, max_new_tokens=65)) for _ in range(n_rows)]
        engine.step()  # the very first one packs the weights
        start = time.perf_counter()
        for _ in range(64):
            engine.step()
        speeds.append(64 * n_rows / (time.perf_counter() - start))
        for row in rows:
            engine.remove(row)
    return max(speeds)


def report(models, tokenizer, train_ids, val_ids, config, checkpoint):
    """Evaluate models {kind: model}; print a table; return what metrics.json will hold."""
    grad_accum = checkpoint["config"].get("grad_accum", 1)  # batches in a step
    tokens = checkpoint["step"] * grad_accum * config.batch_size * config.block_size
    # A token may be several characters: as many as it has bytes that begin one. Special tokens are no text.
    pieces = [piece.encode() if isinstance(piece, str) else piece for piece in tokenizer.vocab]
    chars_of = torch.tensor([sum(byte >> 6 != 2 for byte in piece) for piece in pieces])
    chars_of[list(tokenizer.special_tokens.values())] = 0
    n_chars = sum(chars_of[ids.long()].sum().item() for ids in val_ids[1:].split(2**20))
    with torch.device("meta"):  # shapes without numbers
        params = sum(p.numel() for p in LanguageModel(config, config.vocab_size).parameters())
    bandwidth, table = memory_bandwidth(next(iter(models.values())).norm.weight.device), {}
    for kind, model in models.items():
        size = sum(x.nbytes for x in model.state_dict().values())  # all of it is read for each token
        val_loss, speed = evaluate(model, val_ids, config), decoding_speed(model, val_ids, 1)
        table[kind] = {
            "megabytes": size / 1e6,
            "train_loss": evaluate(model, train_ids[: len(val_ids)], config),  # as much text as for val_loss
            "val_loss": val_loss,
            "perplexity": math.exp(min(val_loss, 700)),  # a float holds no more
            "bits_per_char": val_loss * (len(val_ids) - 1) / n_chars / math.log(2),
            "ms_per_token": 1000 / speed,
            "new_tokens_per_second": speed,
            "the_same_for_8_texts": decoding_speed(model, val_ids, 8),
            "gb_read_per_second": speed * size / 1e9,
            "share_of_bandwidth": speed * size / bandwidth,
        }
    metrics = {"params": params, "seconds": checkpoint["seconds"]}
    metrics |= {"tokens_per_second": tokens / (checkpoint["seconds"] or 1), "memory_bandwidth": bandwidth}
    print(f"\n{'parameters':>22} {params:,}, trained in {checkpoint['seconds']:,.0f} s")
    print(f"{'memory':>22} gives {bandwidth / 1e9:.1f} GB/s to a plain sum")
    print(f"{'quantize':>22}" + "".join(f"{kind:>12}" for kind in table))
    for name in table[config.quantize]:
        print(f"{name:>22}" + "".join(f"{numbers[name]:12,.4f}" for numbers in table.values()))
    print(f"{'files in':>22} {config.out_dir}: {config.quantize}, groups of {config.group_size} if int4\n")
    metrics |= table[config.quantize]
    nothing = math.log(len(tokenizer.vocab))  # the loss if every token is given the same probability
    if metrics["val_loss"] > nothing:
        print(f"note: knowing nothing gives {nothing:.4f}; is the text too small, the step size too large?\n")
    metrics |= {"version": NAME, "tokens": tokens, "config": asdict(config), "torch": torch.__version__}
    metrics |= {"device": model.norm.weight.device.type, "threads": torch.get_num_threads()}
    return metrics | {"steps": checkpoint["step"], "history": checkpoint["history"], "compared": table}


def save_report(metrics, sample, config):
    """Write metrics.json, sample.txt, loss.png and quantization.png."""
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

    fig, ax = plt.subplots(layout="constrained")
    for kind, numbers in metrics["compared"].items():
        label = f"{kind}: {numbers['ms_per_token']:.2f} ms a token"
        ax.plot(numbers["megabytes"], numbers["bits_per_char"], "o", label=label)
    ax.set(xlabel="size of the weights (MB)", ylabel="bits per character", xlim=(0, None))
    ax.legend()
    fig.savefig(Path(config.out_dir, "quantization.png"))


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


def generate(model, idx, config, show=None):
    """Continue token ids `idx` (B, T) by config.max_new_tokens; return (B, T + max_new_tokens).

    Row i draws with seed config.seed + i. After each token `show` is given the ids of row 0.
    """
    engine = Engine(model, len(idx))
    for i, ids in enumerate(idx.tolist()):
        engine.add(ids, replace(config, seed=config.seed + i))
    model.eval()
    for _ in range(config.max_new_tokens):
        engine.step()
        if show:
            show(engine.sequences[0].ids)
    return idx.new_tensor([sequence.ids for sequence in engine.sequences])


# ---------------------------------------------- main ----------------------------------------------


def main():
    mode, flags = parse_flags()
    folder, quantizing = find_model(mode, flags), mode in ("train", "resume")
    checkpoint, config = load_checkpoint(mode, flags, folder) if folder else ({}, Config(**flags))
    device = pick_device(config.device)
    training = mode == "resume" or not folder
    if training:
        config.precision = pick_precision(config.precision, device)
    if not folder:
        checkpoint = {"version": NAME, "vocab": new_vocab(config), "step": 0, "seconds": 0.0, "history": []}
    tokenizer = make_tokenizer(checkpoint["vocab"])
    config.vocab_size = len(tokenizer.vocab)
    if flags.get("vocab_size", config.vocab_size) != config.vocab_size:
        sys.exit(f"error: --vocab_size must be {config.vocab_size}, as --tokenizer {config.tokenizer} has it")
    first = [0] if config.tokenizer == "char" else tokenizer.encode("\n")  # if there is no prompt
    prompt = torch.tensor([tokenizer.encode(config.prompt.replace("\\n", "\n")) or first], device=device)
    if mode != "sample":
        train_ids, val_ids = load_splits(config, checkpoint["vocab"])

    base = replace(config, out_dir=f"{config.out_dir}/base")
    if quantizing:
        try:
            Path((base if training else config).out_dir).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=config.out_dir).close()  # a folder that is there may be read-only
        except OSError as error:
            sys.exit(f"error: cannot write to {config.out_dir} ({error}); name another folder: --out_dir")
    if training:
        action = "goes on with the model" if mode == "resume" else "trains a model"
        print(f"{action} in {base.out_dir} first: with the defaults some three minutes on two cores")
        torch.manual_seed(config.seed)
        model = LanguageModel(config, config.vocab_size).to(device)
        if "model" in checkpoint:
            load_weights(model, checkpoint["model"])
        train(model, train_ids, val_ids, base, checkpoint)
        finished = {name: checkpoint[name] for name in ("version", "config", "step", "seconds", "history")}
        Path(base.out_dir, "metrics.json").write_text(json.dumps(finished, indent=1), encoding="utf-8")
    if quantizing:
        config.base = base.out_dir if training else folder
        print(f"quantizes the model in {config.base}")
    models = {}
    for kind in KINDS if quantizing else (config.quantize,):
        models[kind] = load_model(checkpoint["model"], replace(config, quantize=kind), device)
    model = models[config.quantize]
    if mode != "sample":
        metrics = report(models, tokenizer, train_ids, val_ids, config, checkpoint)
    if quantizing:
        saved = {name: checkpoint[name] for name in ("vocab", "step", "seconds", "history")}
        saved |= {"version": NAME, "config": checkpoint["config"] | asdict(config)}
        keep_finished(config)
        save_checkpoint(saved | {"model": model.state_dict()}, config)
    if mode != "evaluate":
        printed = ""

        def show(ids):
            nonlocal printed
            text = tokenizer.decode(ids).rstrip("\ufffd")  # without a character that has only begun
            print(text[len(printed) :], end="", flush=True)
            printed = text

        sample = generate(model, prompt, config, show if config.stream else None)[0].tolist()
        sample = tokenizer.decode(sample)
        print(sample[len(printed) :])
    if quantizing:
        save_report(metrics, sample, config)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # the stdout of IDLE and of some notebooks is no file
        sys.stdout.reconfigure(errors="replace")  # print even what the terminal has no character for
    try:
        main()
    except TokenizerError as error:  # the vocabulary file, or a prompt that is no text
        sys.exit(f"error: {error}")
