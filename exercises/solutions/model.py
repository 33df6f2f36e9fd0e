"""Build the transformer yourself, TODO 1 to 24; train.py has TODO 25 to 31.

Each TODO is the body of one function: put your code in place of its `raise NotImplementedError(...)`.
Keep names and arguments as they stand. Shapes: B examples in a batch, T positions in each, C = n_embd
numbers for a position, V = vocab_size characters. The rung behind the title of a group, v0 to v4, is the
one that explains it. TODO 8 and 9 belong to week 5: until you begin with 8, the checker passes over both,
as far as TODO 18, which needs them. The solutions lie in exercises/solutions/.

    python exercises/model.py             check in order, stop at the first TODO that is not right
    python exercises/model.py --hint 11   a stronger hint for TODO 11
    python exercises/model.py --all       check every TODO of this file
"""
# ruff: noqa: F401, RUF100  the imports are for your code

import math
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("stopped"))  # Ctrl-C, also while torch loads

import torch
import torch.nn as nn
import torch.nn.functional as F

# -------------------------------- tensor basics: TODO 1 to 3 (v0) ---------------------------------


def position_ids(B, T):
    """The position of every token in a batch: integers (B, T)."""
    return torch.arange(T).repeat(B, 1)


def softmax(x):
    """Scores (..., V) to probabilities (..., V): along the last axis they sum to 1."""
    exp = (x - x.amax(dim=-1, keepdim=True)).exp()
    return exp / exp.sum(dim=-1, keepdim=True)


def split_heads(x, n_head):
    """Cut the channels into n_head equal slices: (B, T, C) to (B, n_head, T, C / n_head)."""
    B, T, C = x.shape
    return x.view(B, T, n_head, C // n_head).transpose(1, 2)


# -------------------------------- nn.Module basics: TODO 4, 5 (v1) --------------------------------


class MLP(nn.Module):
    """Two linear layers with a tanh in between."""

    def __init__(self, n_in, n_hidden, n_out):
        super().__init__()
        self.hidden = nn.Linear(n_in, n_hidden)
        self.output = nn.Linear(n_hidden, n_out)

    def forward(self, x):
        """(..., n_in) to (..., n_out)."""
        return self.output(torch.tanh(self.hidden(x)))


# -------------------------------- token embedding: TODO 6, 7 (v1) ---------------------------------


class TokenEmbedding(nn.Module):
    """A table with one learned vector per token."""

    def __init__(self, vocab_size, n_embd):
        super().__init__()
        self.table = nn.Embedding(vocab_size, n_embd)

    def forward(self, idx):
        """Token ids (B, T) to vectors (B, T, C)."""
        return self.table(idx)


# ------------------------- sinusoidal positional encoding: TODO 8, 9 (v4) -------------------------


class PositionalEncoding(nn.Module):
    """Add to each position a fixed pattern of sines and cosines (Vaswani et al. 2017)."""

    def __init__(self, block_size, n_embd):
        super().__init__()
        position = torch.arange(block_size).unsqueeze(1)  # (block_size, 1)
        angle = position / 10000 ** (torch.arange(0, n_embd, 2) / n_embd)  # (block_size, n_embd / 2)
        table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (block_size, n_embd)
        self.register_buffer("table", table)

    def forward(self, x):
        """Add row t of the table to position t of every example: (B, T, C) to (B, T, C), T <= block_size."""
        return x + self.table[: x.shape[1]]


# -------------------------------- self-attention: TODO 10, 11 (v2) --------------------------------


class SelfAttentionHead(nn.Module):
    """One head: every position reads from the others, from each as much as query and key match."""

    def __init__(self, n_embd, head_size):
        super().__init__()
        self.query = nn.Linear(n_embd, head_size, bias=False)  # what am I looking for?
        self.key = nn.Linear(n_embd, head_size, bias=False)  # what do I contain?
        self.value = nn.Linear(n_embd, head_size, bias=False)  # what do I hand over if chosen?

    def forward(self, x, mask=None):
        """(B, T, C) to (B, T, head_size)."""
        q, k, v = self.query(x), self.key(x), self.value(x)  # (B, T, head_size)
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1])  # (B, T, T)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return softmax(scores) @ v


# --------------------------- multi-head attention: TODO 12, 13 (v2, v3) ---------------------------


class MultiHeadAttention(nn.Module):
    """n_head heads side by side, each on its own slice of the channels, mixed by one linear layer."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.query = nn.Linear(n_embd, n_embd, bias=False)
        self.key = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(n_embd, n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x, mask=None):
        """(B, T, C) to (B, T, C)."""
        q = split_heads(self.query(x), self.n_head)  # (B, n_head, T, head_size)
        k = split_heads(self.key(x), self.n_head)
        v = split_heads(self.value(x), self.n_head)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(x.transpose(1, 2).flatten(2))  # heads side by side: (B, T, C)


# --------------------------------- feed-forward: TODO 14, 15 (v3) ---------------------------------


class FeedForward(nn.Module):
    """A small network applied to each position by itself."""

    def __init__(self, n_embd, dropout):
        super().__init__()
        self.expand = nn.Linear(n_embd, 4 * n_embd)
        self.shrink = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(B, T, C) to (B, T, C)."""
        return self.dropout(self.shrink(F.gelu(self.expand(x))))


# ------------------------------ transformer block: TODO 16, 17 (v3) -------------------------------


class TransformerBlock(nn.Module):
    """Pre-LN block: attention, then feed-forward; each reads a normalised x and adds its result to x."""

    def __init__(self, n_embd, n_head, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(n_embd)
        self.attention = MultiHeadAttention(n_embd, n_head)
        self.norm2 = nn.LayerNorm(n_embd)
        self.feed_forward = FeedForward(n_embd, dropout)

    def forward(self, x, mask=None):
        """(B, T, C) to (B, T, C)."""
        x = x + self.attention(self.norm1(x), mask)
        x = x + self.feed_forward(self.norm2(x))
        return x


# ------------------------------ the complete model: TODO 18, 19 (v3) ------------------------------


class TinyLLM(nn.Module):
    """Token embedding plus positional encoding, n_layer blocks, a last LayerNorm, logits."""

    def __init__(self, vocab_size, block_size, n_embd, n_head, n_layer, dropout):
        super().__init__()
        self.token_embedding = TokenEmbedding(vocab_size, n_embd)
        self.positions = PositionalEncoding(block_size, n_embd)
        self.blocks = nn.ModuleList([TransformerBlock(n_embd, n_head, dropout) for _ in range(n_layer)])
        self.norm = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx, mask=None):
        """Token ids (B, T) to next-token logits (B, T, V)."""
        x = self.positions(self.token_embedding(idx))  # (B, T, C)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


# --------------------------------- text generation: TODO 20 (v0) ----------------------------------


@torch.inference_mode()
def generate(model, idx, max_new_tokens, block_size):
    """Continue token ids (B, T) by max_new_tokens; return all of them, (B, T + max_new_tokens)."""
    for _ in range(max_new_tokens):
        logits = model(idx[:, -block_size:])[:, -1]  # (B, V), what follows the last position
        next_id = torch.multinomial(logits.softmax(dim=-1), num_samples=1)  # (B, 1)
        idx = torch.cat([idx, next_id], dim=1)
    return idx


# ----------------------------------- causal mask: TODO 21 (v2) ------------------------------------


def causal_mask(T):
    """Who may read from whom: booleans (T, T), True where row i may read from column j."""
    return torch.ones(T, T, dtype=torch.bool).tril()


class CausalLLM(TinyLLM):
    """TinyLLM under the causal mask. Nothing to do here: this is the model that train.py trains."""

    def forward(self, idx):
        """Token ids (B, T) to next-token logits (B, T, V)."""
        return super().forward(idx, causal_mask(idx.shape[1]).to(idx.device))


# ---------------------------- character tokenizer: TODO 22 to 24 (v0) -----------------------------


class CharTokenizer:
    """Characters to ids and back: the vocabulary is a string, an id is a place in it."""

    def __init__(self, text):
        self.chars = "".join(sorted(set(text)))
        self.ids = {char: i for i, char in enumerate(self.chars)}

    def encode(self, text):
        """Text to a list of ids."""
        return [self.ids[char] for char in text]

    def decode(self, ids):
        """List of ids to text."""
        return "".join(self.chars[i] for i in ids)


if __name__ == "__main__":
    import checks

    checks.main("model")
