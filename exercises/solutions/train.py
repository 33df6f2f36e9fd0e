"""Train the transformer that you built in model.py, TODO 25 to 31.

When all 31 TODOs are right, this trains a small model on input.txt for five epochs and prints a sample.

    python exercises/train.py             check in order, stop at the first TODO that is not right; then train
    python exercises/train.py --hint 28   a stronger hint for TODO 28
    python exercises/train.py --all       check every TODO of this file, no training
"""
# ruff: noqa: F401, RUF100  the imports are for your code

import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("stopped"))  # Ctrl-C, also while torch loads

import torch
import torch.nn.functional as F
from model import CausalLLM, CharTokenizer, generate
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# --------------------------------------------- config ---------------------------------------------

BLOCK_SIZE = 64  # characters in one training example (T)
BATCH_SIZE = 32  # training examples in one step (B)
N_EMBD = 96  # numbers in an embedding (C)
N_HEAD = 4  # attention heads, each N_EMBD / N_HEAD wide
N_LAYER = 3  # transformer blocks
DROPOUT = 0.0  # share of activations set to zero in training
EPOCHS = 5  # passes over the training text
LEARNING_RATE = 0.003  # step size of AdamW

# ------------------------------------ data: TODO 25 to 27 (v0) ------------------------------------


class TextDataset(Dataset):
    """Consecutive windows of a text: window i starts at character i * block_size, none overlap."""

    def __init__(self, ids, block_size):
        """`ids` is an int64 tensor (N,), the whole text."""
        self.ids, self.block_size = ids, block_size

    def __len__(self):
        """The number of windows."""
        return (len(self.ids) - 1) // self.block_size

    def inputs(self, i):
        """The ids of window i: (block_size,)."""
        start = i * self.block_size
        return self.ids[start : start + self.block_size]

    def targets(self, i):
        """For each id of window i the id that follows it: (block_size,)."""
        start = i * self.block_size + 1
        return self.ids[start : start + self.block_size]

    def __getitem__(self, i):
        """What the DataLoader stacks to batches x, y, both (B, T)."""
        return self.inputs(i), self.targets(i)


class LoaderWithBar(DataLoader):
    """A DataLoader that shows a progress bar."""

    def __iter__(self):
        return iter(tqdm(super().__iter__(), total=len(self), unit="step", leave=False))


# ------------------------ training and evaluation: TODO 28 to 30 (v0, v1) -------------------------


def train_step(model, optimizer, x, y):
    """One optimizer step on inputs and targets, both (B, T); return the loss before it, a float."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    loss.backward()
    optimizer.step()
    return loss.item()


def evaluate(model, loader):
    """Mean cross-entropy over all tokens of the batches x, y, both (B, T), in loader; a float."""
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for x, y in loader:
            total += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
            count += y.numel()
    model.train()
    return total / count


def train(model, train_loader, val_loader, epochs, learning_rate):
    """Train for `epochs` passes over train_loader; return the losses on val_loader, a list of floats."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    history = []
    for epoch in range(1, epochs + 1):
        for x, y in train_loader:
            train_step(model, optimizer, x, y)
        history.append(evaluate(model, val_loader))
        print(f"epoch {epoch}: val loss {history[-1]:.4f}")
    return history


# ------------------------------------- sampling: TODO 31 (v0) -------------------------------------


def generate_text(model, tokenizer, prompt, max_new_tokens, block_size):
    """Continue the text `prompt` by max_new_tokens characters; return prompt and continuation, one string."""
    model.eval()
    idx = torch.tensor([tokenizer.encode(prompt)])  # (1, T)
    return tokenizer.decode(generate(model, idx, max_new_tokens, block_size)[0].tolist())


# ---------------------------------------------- main ----------------------------------------------


def main():
    try:
        text = Path("input.txt").read_text(encoding="utf-8")
    except OSError as error:
        sys.exit(f"error: {error}; start this in the folder that holds input.txt")
    torch.manual_seed(1337)
    tokenizer = CharTokenizer(text)
    ids = torch.tensor(tokenizer.encode(text))
    train_ids, val_ids = ids.tensor_split([int(0.9 * len(ids))])
    train_loader = LoaderWithBar(TextDataset(train_ids, BLOCK_SIZE), BATCH_SIZE, shuffle=True)
    val_loader = DataLoader(TextDataset(val_ids, BLOCK_SIZE), BATCH_SIZE)
    model = CausalLLM(len(tokenizer.chars), BLOCK_SIZE, N_EMBD, N_HEAD, N_LAYER, DROPOUT)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {EPOCHS} epochs")

    start = time.perf_counter()
    history = train(model, train_loader, val_loader, EPOCHS, LEARNING_RATE)
    print(f"val loss {history[-1]:.4f} after {time.perf_counter() - start:.0f} s\n")
    print(generate_text(model, tokenizer, "ROMEO:", 500, BLOCK_SIZE))


if __name__ == "__main__":
    import checks

    checks.main("train")
    main()
