"""v0, week 1: a bigram table. Which character tends to follow which?

The whole pipeline in its smallest form: load, tokenize, split, batch, train, evaluate, save, plot, sample.
The model is one (V, V) table: a row for the current character, in it a score (logit) for each next character.

Result: val loss 2.4882, 3.59 bits/char, 4,225 parameters, 3 s on 2 CPU cores.

Run it with: python v0_bigram.py, or with --help to see every flag.
"""

import argparse
import inspect
import json
import math
import re
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends the program, also while torch loads

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# --------------------------------------------- config ---------------------------------------------

NAME = Path(__file__).stem
SAMPLING = ("device", "seed", "greedy", "prompt", "max_new_tokens")
# Fields that a flag may change when a saved model is loaded; all others stay as they were in its training.
MAY_CHANGE = {"evaluate": ("device",), "sample": SAMPLING}


@dataclass
class Config:
    """Every field is a command-line flag of the same name: --max_steps 500."""

    data: str = "input.txt"  # UTF-8 text to learn from
    out_dir: str = f"runs/{NAME}"  # folder for the checkpoint, metrics, pictures and sample
    device: str = "auto"  # auto, cuda, mps or cpu
    seed: int = 1337  # same seed on the same machine: same numbers
    block_size: int = 64  # tokens in one training example (T)
    batch_size: int = 128  # training examples in one step (B)
    max_steps: int = 2000  # optimizer steps
    learning_rate: float = 100.0  # step size of SGD
    eval_interval: int = 100  # steps between two looks at the validation loss
    greedy: bool = False  # always sample the likeliest token
    prompt: str = ""  # text to continue, \n is a new line; empty: start from the first token
    max_new_tokens: int = 500  # tokens to sample

    def __post_init__(self):
        may_be_zero = ("seed",)
        for name, value in vars(self).items():
            if type(value) in (int, float):  # bool and str can be anything
                limit = 2**31 if type(value) is int else math.inf
                if not (0 < value < limit or (value == 0 and name in may_be_zero)):
                    reason = f"it must be positive and below {limit}, or 0 for: {', '.join(may_be_zero)}"
                    sys.exit(f"error: --{name} {value} is impossible, {reason}")


def parse_flags():
    """Return the mode and, as a dict, the flags given on the command line and only those."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"error: {message}; --help lists every flag")
    modes = parser.add_mutually_exclusive_group()
    mode = {"dest": "mode", "action": "store_const", "default": "train"}
    modes.add_argument("--sample", **mode, const="sample", help="no training: continue the prompt")
    modes.add_argument("--evaluate", **mode, const="evaluate", help="no training: measure the saved model")
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
    """Characters to ids and back: a token is a character, the vocabulary a string, an id a place in it."""

    def __init__(self, vocab):
        self.vocab = vocab
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


def load_text(config):
    """Return the text to learn from; exits if it is missing or not UTF-8."""
    try:
        return Path(config.data).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: cannot read {config.data} as UTF-8 text ({error}); name another file with --data")


def load_splits(config, tokenizer, device):
    """Return the ids (N,) to train on and those of the last 10% of the text; exits if these are too few."""
    text = load_text(config)
    cut = int(0.9 * len(text))
    train_ids = torch.tensor(tokenizer.encode(text[:cut]), device=device)
    val_ids = torch.tensor(tokenizer.encode(text[cut:]), device=device)
    if min(len(train_ids), len(val_ids)) <= config.block_size:
        lengths = f"{len(train_ids)} tokens to train on and {len(val_ids)} for validation"
        sys.exit(f"error: {config.data} is too short: {lengths}, one window needs {config.block_size + 1}")
    return train_ids, val_ids


def get_batch(ids, config):
    """Draw windows of `ids` (N,) at random; return inputs and targets, both (B, T)."""
    starts = torch.randint(len(ids) - config.block_size, (config.batch_size, 1), device=ids.device)
    batch = ids[starts + torch.arange(config.block_size + 1, device=ids.device)]  # (B, T + 1)
    # Teacher forcing: each position sees the true text so far, never the model's own guesses, and is asked
    # for the token that follows. So targets are inputs shifted by one: inputs "To b", targets "o be".
    return batch[:, :-1], batch[:, 1:]


# ---------------------------------------------- model ----------------------------------------------


class LanguageModel(nn.Module):
    """A bigram model: the current character alone decides the logits of the next one."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        nn.init.zeros_(self.table.weight)  # all characters equally likely: the loss starts at ln V

    def forward(self, idx):
        """Token ids (B, T) to next-token logits (B, T, V)."""
        return self.table(idx)


# -------------------------------------------- training --------------------------------------------


@torch.inference_mode()
def evaluate(model, ids, config):
    """Mean loss in nats per token over consecutive windows of `ids` (N,), every token predicted once."""
    T = config.block_size
    padding = -(len(ids) - 1) % T  # fills up the last window; cross_entropy skips targets of -100
    x = F.pad(ids[:-1], (0, padding)).view(-1, T)
    y = F.pad(ids[1:], (0, padding), value=-100).view(-1, T)
    model.eval()
    total = 0.0
    for xb, yb in zip(x.split(config.batch_size), y.split(config.batch_size), strict=True):
        total += F.cross_entropy(model(xb).flatten(0, 1), yb.flatten(), reduction="sum").item()
    model.train()
    return total / (y != -100).sum().item()


def save_checkpoint(checkpoint, config):
    """Write to a temporary file, then rename: a write that is cut short harms nothing."""
    path = Path(config.out_dir, "checkpoint.pt")
    torch.save(checkpoint, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load_checkpoint(mode, flags):
    """Return the saved checkpoint and its Config with `flags` in it; exits if they do not go together."""
    folder, kinds = flags.get("out_dir", Config.out_dir), {field.name: field.type for field in fields(Config)}
    try:
        checkpoint = torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)
        if checkpoint["version"] != NAME:
            raise ValueError(f"saved by {checkpoint['version']}")
        saved = {name: kinds[name](value) for name, value in checkpoint["config"].items()}
        parts = {"vocab": str, "history": list, "step": int, "seconds": float, "model": dict}
        damaged = [part for part, kind in parts.items() if not isinstance(checkpoint.get(part), kind)]
        if damaged or saved != checkpoint["config"]:
            raise ValueError(f"damaged: {', '.join(damaged) or 'config'}")
    except Exception as error:  # a file that is missing, cut short or something else altogether
        reason = str(error).split("\n")[0]
        sys.exit(f"error: no checkpoint of {NAME} in {folder} ({reason}); train first: python {NAME}.py")
    saved = asdict(Config(**saved)) | {"out_dir": folder}  # which may have been renamed since
    may_change = MAY_CHANGE[mode]
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


def train(model, train_ids, val_ids, config, checkpoint):
    """Take config.max_steps optimizer steps, then save; weights and history go into `checkpoint`."""
    # Stochastic gradient descent: each weight goes a step against its slope, -learning_rate * gradient.
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate)
    start = time.perf_counter()
    for step in (bar := tqdm(range(1, config.max_steps + 1), unit="step")):
        x, y = get_batch(train_ids, config)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # (B * T, V) against (B * T,)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if step % config.eval_interval == 0 or step == config.max_steps:
            train_loss, val_loss = loss.item(), evaluate(model, val_ids, config)
            seconds = time.perf_counter() - start
            status = f"val loss {val_loss:.4f}, {step * x.numel() / seconds:,.0f} tokens/s"
            bar.set_postfix_str(status, refresh=False)
            if not math.isfinite(val_loss):
                sys.exit(f"\nerror: the loss is not finite at step {step}; try a lower --learning_rate")
            point = {"step": step, "seconds": seconds, "train_loss": train_loss, "val_loss": val_loss}
            checkpoint["history"].append(point)
    checkpoint.update(config=asdict(config), model=model.state_dict(), step=step, seconds=seconds)
    save_checkpoint(checkpoint, config)


def report(model, tokenizer, train_ids, val_ids, config, checkpoint):
    """Evaluate on the whole validation split; print a summary; return what metrics.json will hold."""
    tokens = checkpoint["step"] * config.batch_size * config.block_size
    val_loss = evaluate(model, val_ids, config)
    metrics = {
        "params": sum(p.numel() for p in model.parameters()),
        "seconds": checkpoint["seconds"],
        "tokens_per_second": tokens / checkpoint["seconds"],
        "train_loss": evaluate(model, train_ids[: len(val_ids)], config),  # as much text as for val_loss
        "val_loss": val_loss,
        "perplexity": math.exp(min(val_loss, 700)),  # a float holds no more
        "bits_per_char": val_loss / math.log(2),
    }
    for name, value in metrics.items():
        print(f"{name:>18} {value:,.4f}".removesuffix(".0000"))
    print(f"{'files in':>18} {config.out_dir}\n")
    nothing = math.log(len(tokenizer.vocab))  # the loss if every token is given the same probability
    if val_loss > nothing:
        print(f"note: knowing nothing gives {nothing:.4f}; is the text too small, the step size too large?\n")
    metrics |= {"version": NAME, "tokens": tokens, "config": asdict(config), "torch": torch.__version__}
    metrics |= {"device": val_ids.device.type, "threads": torch.get_num_threads()}
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


@torch.inference_mode()
def generate(model, idx, config):
    """Continue token ids `idx` (B, T) by config.max_new_tokens; return (B, T + max_new_tokens)."""
    model.eval()
    for _ in range(config.max_new_tokens):
        logits = model(idx[:, -config.block_size :])[:, -1]  # (B, V), what follows the last position
        if config.greedy:
            next_id = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        else:
            next_id = torch.multinomial(logits.softmax(dim=-1), num_samples=1)
        idx = torch.cat([idx, next_id], dim=1)
    return idx


# ---------------------------------------------- main ----------------------------------------------


def main():
    mode, flags = parse_flags()
    if mode == "train":
        config = Config(**flags)
        vocab = "".join(sorted(set(load_text(config))))
        checkpoint = {"version": NAME, "vocab": vocab, "step": 0, "seconds": 0.0, "history": []}
    else:
        checkpoint, config = load_checkpoint(mode, flags)
    tokenizer = CharTokenizer(checkpoint["vocab"])
    device = pick_device(config.device)
    first = [0]  # where a sample starts if there is no prompt
    prompt = torch.tensor([tokenizer.encode(config.prompt.replace("\\n", "\n")) or first], device=device)
    if mode != "sample":
        train_ids, val_ids = load_splits(config, tokenizer, device)

    torch.manual_seed(config.seed)
    model = LanguageModel(config, len(tokenizer.vocab)).to(device)
    if "model" in checkpoint:
        load_weights(model, checkpoint["model"])
    if mode == "train":
        try:
            Path(config.out_dir).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=config.out_dir).close()  # a folder that is there may be read-only
        except OSError as error:
            sys.exit(f"error: cannot write to {config.out_dir} ({error}); name another folder: --out_dir")
        train(model, train_ids, val_ids, config, checkpoint)
    if mode != "sample":
        metrics = report(model, tokenizer, train_ids, val_ids, config, checkpoint)
    if mode != "evaluate":
        torch.manual_seed(config.seed)
        sample = tokenizer.decode(generate(model, prompt, config)[0].tolist())  # prompt: (1, T)
        print(sample)
    if mode == "train":
        save_report(metrics, sample, config)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # the stdout of IDLE and of some notebooks is no file
        sys.stdout.reconfigure(errors="replace")  # print even what the terminal has no character for
    main()
