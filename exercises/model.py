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
    # TODO 1: return an int64 tensor (B, T) in which every row counts 0, 1, ..., T - 1.
    #
    # position_ids(2, 3) is [[0, 1, 2], [0, 1, 2]].
    raise NotImplementedError("TODO 1")


def softmax(x):
    """Scores (..., V) to probabilities (..., V): along the last axis they sum to 1."""
    # TODO 2: exp(x) divided by its sum along the last axis. Write it yourself, without torch.softmax.
    # First subtract from each row its maximum: the result stays the same, and exp never overflows.
    #
    # softmax of [[0., 1.0986], [1000., 1000.]] is [[0.25, 0.75], [0.5, 0.5]], for exp(1.0986) is 3.
    raise NotImplementedError("TODO 2")


def split_heads(x, n_head):
    """Cut the channels into n_head equal slices: (B, T, C) to (B, n_head, T, C / n_head)."""
    # TODO 3: head 0 gets the first C / n_head channels of every position, head 1 the next, and so on.
    # Channels are the C numbers of a position. Week 3 calls such slices heads; TODO 13 can use it.
    #
    # [[[0, 1, 2, 3], [4, 5, 6, 7]]], shape (1, 2, 4), with n_head = 2 becomes
    # [[[[0, 1], [4, 5]], [[2, 3], [6, 7]]]], shape (1, 2, 2, 2).
    raise NotImplementedError("TODO 3")


# -------------------------------- nn.Module basics: TODO 4, 5 (v1) --------------------------------


class MLP(nn.Module):
    """Two linear layers with a tanh in between."""

    def __init__(self, n_in, n_hidden, n_out):
        # TODO 4: call super().__init__(), then make two nn.Linear layers, both with bias:
        # self.hidden from n_in to n_hidden numbers, self.output from n_hidden to n_out.
        #
        # MLP(2, 3, 1).hidden.weight is (3, 2), .output.weight is (1, 3); with the biases 13 parameters.
        raise NotImplementedError("TODO 4")

    def forward(self, x):
        """(..., n_in) to (..., n_out)."""
        # TODO 5: x through the hidden layer, tanh, then the output layer.
        #
        # MLP(1, 1, 1) with both weights 2 and both biases 1: x = [[-0.5]] gives 2 * tanh(0) + 1 = [[1.]].
        raise NotImplementedError("TODO 5")


# -------------------------------- token embedding: TODO 6, 7 (v1) ---------------------------------


class TokenEmbedding(nn.Module):
    """A table with one learned vector per token."""

    def __init__(self, vocab_size, n_embd):
        # TODO 6: call super().__init__(), here and in every module below.
        # Make self.table, an nn.Embedding with vocab_size rows of n_embd numbers.
        #
        # TokenEmbedding(65, 8).table.weight is (65, 8): 520 parameters.
        raise NotImplementedError("TODO 6")

    def forward(self, idx):
        """Token ids (B, T) to vectors (B, T, C)."""
        # TODO 7: look up the row of every id.
        #
        # With the rows [0., 0.], [1., 10.], [2., 20.]: idx [[2, 0]] gives [[[2., 20.], [0., 0.]]].
        raise NotImplementedError("TODO 7")


# ------------------------- sinusoidal positional encoding: TODO 8, 9 (v4) -------------------------


class PositionalEncoding(nn.Module):
    """Add to each position a fixed pattern of sines and cosines (Vaswani et al. 2017)."""

    def __init__(self, block_size, n_embd):
        # TODO 8: make the table (block_size, n_embd); n_embd is even. In row p, for i = 0, 1, 2, ...
        #   channel 2i      is  sin(p / 10000^(2i / n_embd))
        #   channel 2i + 1  is  cos(p / 10000^(2i / n_embd))
        # Keep it with self.register_buffer("table", ...): it is saved and moved with the model, not trained.
        #
        # The last row of PositionalEncoding(3, 4).table is [0.9093, -0.4161, 0.0200, 0.9998].
        raise NotImplementedError("TODO 8")

    def forward(self, x):
        """Add row t of the table to position t of every example: (B, T, C) to (B, T, C), T <= block_size."""
        # TODO 9: return the sum as a new tensor; x itself stays as it is.
        #
        # PositionalEncoding(9, 4), x = ones (1, 3, 4): position 2 becomes [1.9093, 0.5839, 1.0200, 1.9998].
        raise NotImplementedError("TODO 9")


# -------------------------------- self-attention: TODO 10, 11 (v2) --------------------------------


class SelfAttentionHead(nn.Module):
    """One head: every position reads from the others, from each as much as query and key match."""

    def __init__(self, n_embd, head_size):
        # TODO 10: make self.query, self.key and self.value,
        # each an nn.Linear from n_embd to head_size numbers, without bias.
        #
        # SelfAttentionHead(8, 4).query.weight is (4, 8); 96 parameters in all.
        raise NotImplementedError("TODO 10")

    def forward(self, x, mask=None):
        """(B, T, C) to (B, T, head_size)."""
        # TODO 11: with q, k and v of every position, each (B, T, head_size):
        # 1. scores (B, T, T): row i, column j holds the dot product of q at i and k at j,
        #    divided by the square root of head_size;
        # 2. where mask is False the score becomes minus infinity. mask is (T, T), True where the position
        #    of the row may read from the position of the column; None means that all may read from all;
        # 3. softmax (TODO 2), so that each row of weights sums to 1;
        # 4. position i of the result is the sum of all v, weighted by row i.
        # Write it out; F.scaled_dot_product_attention has its turn in TODO 13.
        #
        # With three weights [[1., 0.], [0., 1.]], x = [[[1., 0.], [0., 1.]]] gives
        # [[[0.6698, 0.3302], [0.3302, 0.6698]]], and with the mask [[True, False], [True, True]]
        # [[[1.0000, 0.0000], [0.3302, 0.6698]]].
        raise NotImplementedError("TODO 11")


# --------------------------- multi-head attention: TODO 12, 13 (v2, v3) ---------------------------


class MultiHeadAttention(nn.Module):
    """n_head heads side by side, each on its own slice of the channels, mixed by one linear layer."""

    def __init__(self, n_embd, n_head):
        # TODO 12: keep self.n_head. Make self.query, self.key and self.value for all heads together,
        # each an nn.Linear from n_embd to n_embd without bias, and self.proj, the same with bias.
        #
        # MultiHeadAttention(8, 2) has 3 * 64 + 64 + 8 = 264 parameters.
        raise NotImplementedError("TODO 12")

    def forward(self, x, mask=None):
        """(B, T, C) to (B, T, C)."""
        # TODO 13: split query, key and value of x into heads (B, n_head, T, head_size); attention as in
        # TODO 11 in each head, with head_size = C / n_head; put the heads side by side again, head 0 in
        # the first channels, (B, T, C); then proj. F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        # is the attention of all heads in one fast call.
        #
        # n_head = 2, four weights [[1., 0.], [0., 1.]], bias 0: x = [[[1., 0.], [0., 1.]]] gives
        # [[[0.7311, 0.5000], [0.5000, 0.7311]]].
        raise NotImplementedError("TODO 13")


# --------------------------------- feed-forward: TODO 14, 15 (v3) ---------------------------------


class FeedForward(nn.Module):
    """A small network applied to each position by itself."""

    def __init__(self, n_embd, dropout):
        # TODO 14: make self.expand, an nn.Linear from n_embd to 4 * n_embd; self.shrink, an nn.Linear back
        # to n_embd; both with bias; and self.dropout, an nn.Dropout with probability dropout.
        #
        # FeedForward(8, 0.1) has 256 + 32 + 256 + 8 = 552 parameters.
        raise NotImplementedError("TODO 14")

    def forward(self, x):
        """(B, T, C) to (B, T, C)."""
        # TODO 15: expand, GELU (the exact one, PyTorch's default), shrink, dropout.
        #
        # FeedForward(1, 0.0) with all weights 1 and biases 0: x = [[[1.]]] gives 4 * GELU(1) = [[[3.3654]]].
        raise NotImplementedError("TODO 15")


# ------------------------------ transformer block: TODO 16, 17 (v3) -------------------------------


class TransformerBlock(nn.Module):
    """Pre-LN block: attention, then feed-forward; each reads a normalised x and adds its result to x."""

    def __init__(self, n_embd, n_head, dropout):
        # TODO 16: make self.norm1 and self.norm2, each an nn.LayerNorm of its own over n_embd numbers,
        # self.attention, a MultiHeadAttention, and self.feed_forward, a FeedForward.
        #
        # TransformerBlock(8, 2, 0.1) has 16 + 16 + 264 + 552 = 848 parameters.
        raise NotImplementedError("TODO 16")

    def forward(self, x, mask=None):
        """(B, T, C) to (B, T, C)."""
        # TODO 17: add to x the attention (with mask) of norm1 of x;
        # add to that sum the feed_forward of norm2 of the sum.
        #
        # Where proj and shrink are all zeros, both branches add zero: x = [[[1., 5.]]] gives [[[1., 5.]]].
        raise NotImplementedError("TODO 17")


# ------------------------------ the complete model: TODO 18, 19 (v3) ------------------------------


class TinyLLM(nn.Module):
    """Token embedding plus positional encoding, n_layer blocks, a last LayerNorm, logits."""

    def __init__(self, vocab_size, block_size, n_embd, n_head, n_layer, dropout):
        # TODO 18: make self.token_embedding, a TokenEmbedding; self.positions, a PositionalEncoding;
        # self.blocks, an nn.ModuleList of n_layer TransformerBlocks; self.norm, an nn.LayerNorm over n_embd
        # numbers; self.head, an nn.Linear from n_embd to vocab_size, with bias.
        #
        # TinyLLM(65, 32, 8, 2, 3, 0.0) has 520 + 3 * 848 + 16 + 585 = 3665 parameters.
        raise NotImplementedError("TODO 18")

    def forward(self, idx, mask=None):
        """Token ids (B, T) to next-token logits (B, T, V)."""
        # TODO 19: embed the ids, add the positions, pass through every block (with mask), norm, head.
        # Logits are plain scores, not probabilities.
        #
        # V = 3, head.weight all zeros, head.bias [1., 2., 3.]: every position gives [1., 2., 3.].
        raise NotImplementedError("TODO 19")


# --------------------------------- text generation: TODO 20 (v0) ----------------------------------


@torch.inference_mode()
def generate(model, idx, max_new_tokens, block_size):
    """Continue token ids (B, T) by max_new_tokens; return all of them, (B, T + max_new_tokens)."""
    # TODO 20: max_new_tokens times: give the model the last block_size ids, at most; it returns logits
    # (B, t, V), of which those at the last position are for the next id; softmax; draw one id for each row
    # with torch.multinomial; append it to the ids.
    #
    # A model that always wants the last id plus one: [[3, 4]], max_new_tokens 2, becomes [[3, 4, 5, 6]].
    raise NotImplementedError("TODO 20")


# ----------------------------------- causal mask: TODO 21 (v2) ------------------------------------


def causal_mask(T):
    """Who may read from whom: booleans (T, T), True where row i may read from column j."""
    # TODO 21: a position reads from itself and from the positions before it, never from later ones.
    #
    # causal_mask(3) is [[True, False, False], [True, True, False], [True, True, True]].
    raise NotImplementedError("TODO 21")


class CausalLLM(TinyLLM):
    """TinyLLM under the causal mask. Nothing to do here: this is the model that train.py trains."""

    def forward(self, idx):
        """Token ids (B, T) to next-token logits (B, T, V)."""
        return super().forward(idx, causal_mask(idx.shape[1]).to(idx.device))


# ---------------------------- character tokenizer: TODO 22 to 24 (v0) -----------------------------


class CharTokenizer:
    """Characters to ids and back: the vocabulary is a string, an id is a place in it."""

    def __init__(self, text):
        # TODO 22: self.chars is a string of the distinct characters of text, sorted;
        # self.ids is a dict from each of them to its place in self.chars.
        #
        # For "hello": chars is "ehlo", ids is {"e": 0, "h": 1, "l": 2, "o": 3}.
        raise NotImplementedError("TODO 22")

    def encode(self, text):
        """Text to a list of ids."""
        # TODO 23: the id of every character, in order.
        #
        # CharTokenizer("hello").encode("hole") is [1, 3, 2, 0].
        raise NotImplementedError("TODO 23")

    def decode(self, ids):
        """List of ids to text."""
        # TODO 24: the characters of all ids, in order, as one string.
        #
        # CharTokenizer("hello").decode([1, 3, 2, 0]) is "hole".
        raise NotImplementedError("TODO 24")


if __name__ == "__main__":
    import checks

    checks.main("model")
