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
        # TODO 25: count the full windows of block_size characters. The last character of a window needs one
        # more character after it, as its target.
        #
        # block_size 3: 10 ids hold 3 windows, 9 ids hold only 2.
        raise NotImplementedError("TODO 25")

    def inputs(self, i):
        """The ids of window i: (block_size,)."""
        # TODO 26: the block_size ids that begin at i * block_size.
        #
        # ids 0, 10, 20, ..., 90 and block_size 3: inputs(1) is [30, 40, 50].
        raise NotImplementedError("TODO 26")

    def targets(self, i):
        """For each id of window i the id that follows it: (block_size,)."""
        # TODO 27: the window shifted by one: at each place the id that comes next in the text.
        #
        # ids 0, 10, 20, ..., 90 and block_size 3: targets(1) is [40, 50, 60].
        raise NotImplementedError("TODO 27")

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
    # TODO 28: clear the gradients that are left from earlier; logits (B, T, V) of x; mean cross-entropy of
    # all B * T positions with y; backward; one step of the optimizer.
    #
    # A model whose 65 logits are all equal returns ln 65 = 4.1744.
    raise NotImplementedError("TODO 28")


def evaluate(model, loader):
    """Mean cross-entropy over all tokens of the batches x, y, both (B, T), in loader; a float."""
    # TODO 29: model.eval() before, model.train() after; no gradients are tracked, nothing is learned.
    # Every token counts the same: the last batch may be smaller than the others.
    #
    # 3 tokens of loss 1 each in one batch, 1 token of loss 2 in the next: (1 + 1 + 1 + 2) / 4 = 1.25.
    raise NotImplementedError("TODO 29")


def train(model, train_loader, val_loader, epochs, learning_rate):
    """Train for `epochs` passes over train_loader; return the losses on val_loader, a list of floats."""
    # TODO 30: make one torch.optim.AdamW with that learning rate, its other settings left as they are.
    # In each epoch: a train_step on every batch, then evaluate on val_loader and print the loss.
    #
    # train(model, train_loader, val_loader, 2, 0.001) returns 2 numbers such as [1.9521, 1.8034].
    raise NotImplementedError("TODO 30")


# ------------------------------------- sampling: TODO 31 (v0) -------------------------------------


def generate_text(model, tokenizer, prompt, max_new_tokens, block_size):
    """Continue the text `prompt` by max_new_tokens characters; return prompt and continuation, one string."""
    # TODO 31: model.eval(); the prompt as ids in a batch of one, (1, T); generate; back to text.
    #
    # A model that always wants the next letter: prompt "abc", max_new_tokens = 3 gives "abcdef".
    raise NotImplementedError("TODO 31")


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
