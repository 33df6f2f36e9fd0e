"""v1, week 2: a window of characters through a small neural network (Bengio et al. 2003).

Each of the last `window` characters is looked up in a table of vectors, its embedding; a learned vector for
its place in the window is added; all of them, side by side, go through two hidden layers to the logits. The
training loop is now one to trust: AdamW, warm-up and decay, gradient clipping, the best weights, --resume.

Since v0_bigram.py
  added:    TRAINING, keep_finished, learning_rate_at, make_optimizer
  changed:  Config, LanguageModel, MAY_CHANGE, evaluate, load_checkpoint, main, parse_flags, train
  removed:  -

Result: val loss 1.7209, 2.48 bits/char, 150,625 parameters, 17 s on 2 CPU cores.

Run it with: python v1_mlp.py, or with --help to see every flag.
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
TRAINING = ("max_steps", "learning_rate", "warmup_steps", "lr_floor", "grad_clip", "eval_interval")
# Fields that a flag may change when a saved model is loaded; all others stay as they were in its training.
MAY_CHANGE = {"evaluate": ("device",), "sample": SAMPLING, "resume": SAMPLING + TRAINING}


@dataclass
class Config:
    """Every field is a command-line flag of the same name: --max_steps 500."""

    data: str = "input.txt"  # UTF-8 text to learn from
    out_dir: str = f"runs/{NAME}"  # folder for the checkpoint, metrics, pictures and sample
    device: str = "auto"  # auto, cuda, mps or cpu
    seed: int = 1337  # same seed on the same machine: same numbers
    block_size: int = 64  # tokens in one training example (T)
    batch_size: int = 32  # training examples in one step (B)
    window: int = 8  # tokens that the model sees, the current one included
    n_embd: int = 32  # numbers in an embedding (C)
    n_hidden: int = 256  # units in each hidden layer
    max_steps: int = 800  # optimizer steps
    learning_rate: float = 0.005  # peak step size of AdamW
    warmup_steps: int = 50  # steps in which the step size rises to its peak
    lr_floor: float = 0.1  # share of the peak step size that is left in the last step
    grad_clip: float = 1.0  # a gradient with a larger Euclidean norm is scaled down to it
    eval_interval: int = 100  # steps between two estimates of the loss, with a checkpoint each
    eval_tokens: int = 20_000  # tokens of each split in such an estimate
    greedy: bool = False  # always sample the likeliest token
    prompt: str = ""  # text to continue, \n is a new line; empty: start from the first token
    max_new_tokens: int = 500  # tokens to sample

    def __post_init__(self):
        may_be_zero = ("seed", "warmup_steps", "lr_floor")
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
    """The last `window` characters, embedded and concatenated, through a multilayer perceptron."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.window = config.window
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        # Concatenation already tells the slots apart: the bias of the first layer could hold these instead.
        self.position_embedding = nn.Parameter(torch.zeros(config.window, config.n_embd))
        self.mlp = nn.Sequential(
            nn.Linear(config.window * config.n_embd, config.n_hidden),
            nn.GELU(),
            nn.Linear(config.n_hidden, config.n_hidden),
            nn.GELU(),
            nn.Linear(config.n_hidden, vocab_size),
        )

    def forward(self, idx):
        """Token ids (B, T) to next-token logits (B, T, V); before the first token the window holds zeros."""
        x = self.token_embedding(idx)  # (B, T, C)
        x = F.pad(x, (0, 0, self.window - 1, 0))  # (B, window - 1 + T, C)
        x = x.unfold(1, self.window, 1).transpose(2, 3)  # (B, T, window, C): t sees t - window + 1 to t
        return self.mlp((x + self.position_embedding).flatten(2))


# -------------------------------------------- training --------------------------------------------


@torch.inference_mode()
def evaluate(model, ids, config, max_tokens=None):
    """Mean loss in nats per token over consecutive windows of `ids` (N,), every token predicted once.

    With `max_tokens`, over evenly spread windows of about that many tokens: fixed, and cheap to repeat.
    """
    T = config.block_size
    padding = -(len(ids) - 1) % T  # fills up the last window; cross_entropy skips targets of -100
    x = F.pad(ids[:-1], (0, padding)).view(-1, T)
    y = F.pad(ids[1:], (0, padding), value=-100).view(-1, T)
    if max_tokens:
        stride = max(1, len(ids) // max_tokens)
        x, y = x[::stride], y[::stride]
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
        parts = {"vocab": str, "history": list, "step": int, "seconds": float, "model": dict}
        parts |= {"last": dict, "optimizer": dict}
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


def make_optimizer(model, config):
    """AdamW (Loshchilov and Hutter 2019); `fused` updates all parameters in one kernel."""
    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)


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
    optimizer = make_optimizer(model, config)
    if "last" in checkpoint:
        load_weights(model, checkpoint["last"])
        settings = optimizer.state_dict()["param_groups"]  # of `config`, not of the saved run
        optimizer.load_state_dict({"state": checkpoint["optimizer"], "param_groups": settings})
    stop = []  # Ctrl-C leaves a note here, to be read between two steps
    on_ctrl_c = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    start = time.perf_counter() - checkpoint["seconds"]
    steps = range(checkpoint["step"] + 1, config.max_steps + 1)
    for step in (bar := tqdm(steps, initial=checkpoint["step"], total=config.max_steps, unit="step")):
        torch.manual_seed(1_000_000 * config.seed + step)  # a resumed run draws what it would have drawn
        x, y = get_batch(train_ids, config)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # (B * T, V) against (B * T,)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        optimizer.step()

        evaluate_now = step % config.eval_interval == 0 or step == config.max_steps
        stop_now = bool(stop)  # asked once: a Ctrl-C from here on counts for the next step
        if evaluate_now or stop_now or step % 10 == 0:
            seconds = time.perf_counter() - start
            status = f"loss {loss.item():.4f}, {step * x.numel() / seconds:,.0f} tokens/s"
            bar.set_postfix_str(status, refresh=False)
            if not math.isfinite(loss.item()) or not math.isfinite(norm):
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
            checkpoint.update(last=model.state_dict(), optimizer=optimizer.state_dict()["state"])
            checkpoint.update(config=asdict(config), step=step, seconds=time.perf_counter() - start)
            save_checkpoint(checkpoint, config)
        if stop_now and checkpoint["history"]:
            sys.exit(f"\nstopped after step {step} and saved; the same command with --resume goes on")
        if stop_now:
            sys.exit(f"\nstopped after step {step}; nothing is saved before the first estimate")
    signal.signal(signal.SIGINT, on_ctrl_c)
    if stop:
        sys.exit("\nstopped after the last step, which is saved; the same command with --resume goes on")


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
    if training := mode in ("train", "resume"):
        try:
            Path(config.out_dir).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=config.out_dir).close()  # a folder that is there may be read-only
        except OSError as error:
            sys.exit(f"error: cannot write to {config.out_dir} ({error}); name another folder: --out_dir")
        train(model, train_ids, val_ids, config, checkpoint)
        model.load_state_dict(checkpoint["model"])
    if mode != "sample":
        metrics = report(model, tokenizer, train_ids, val_ids, config, checkpoint)
    if mode != "evaluate":
        torch.manual_seed(config.seed)
        sample = tokenizer.decode(generate(model, prompt, config)[0].tolist())  # prompt: (1, T)
        print(sample)
    if training:
        save_report(metrics, sample, config)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # the stdout of IDLE and of some notebooks is no file
        sys.stdout.reconfigure(errors="replace")  # print even what the terminal has no character for
    main()
