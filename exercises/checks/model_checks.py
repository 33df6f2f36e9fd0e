"""Checks of TODO 1 to 24. `m` is the learner's model.py; the truth comes from PyTorch, loops or by hand."""

import math
import random
import string

import torch
import torch.nn as nn
import torch.nn.functional as F

from .compare import Wrong, agrees, check, fill, has_layers, judge, learns, shake, show

EYE = [[1.0, 0.0], [0.0, 1.0]]

# ----------------------------------------- tensor basics ------------------------------------------


@check(
    1,
    "position_ids",
    "One row that counts to T - 1, and the same row B times.",
    "torch.arange(T) is one row, int64. repeat(B, 1) or expand(B, T) makes B rows of it.",
)
def todo_1(m):
    B, T = random.randint(2, 4), random.randint(5, 8)
    cases = [
        ("position_ids(2, 3)", (2, 3), torch.tensor([[0, 1, 2], [0, 1, 2]])),
        (f"position_ids({B}, {T})", (B, T), torch.tensor([list(range(T)) for _ in range(B)])),
    ]

    def slips(B, T):
        row = torch.arange(T)
        yield row.repeat(B, 1) + 1, "The rows count from 1; here and in all of PyTorch they count from 0."
        yield row, "That is one row, (T,): a batch needs B of them, (B, T)."
        yield row.repeat(B, 1).T, "Rows and columns are exchanged: B rows, each counting along T."
        yield torch.arange(B).repeat(T, 1), "B and T are exchanged: the shape is (B, T), rows first."
        yield torch.arange(B).repeat(T, 1).T, "The count runs down the columns; it must run along each row."
        yield torch.arange(B * T).view(B, T), "The count goes on from row to row: each row starts again at 0."
        yield row.repeat(B, 1).float(), "These are floats. Ids pick rows of a table: they must be int64."

    judge(m.position_ids, cases, slips)


@check(
    2,
    "softmax",
    "exp of the scores, divided by the sum of these exps along the last axis.",
    "x.max(dim=-1, keepdim=True).values is one number for each row, and thanks to keepdim it can be taken "
    "from x. The same with sum(dim=-1, keepdim=True) after exp.",
)
def todo_2(m):
    x = torch.randn(4, 4, 4)
    example = torch.tensor([[0.0, math.log(3)], [1000.0, 1000.0]])
    cases = [
        ("softmax([[0., 1.0986], [1000., 1000.]])", (example,), torch.tensor([[0.25, 0.75], [0.5, 0.5]])),
        ("softmax of random scores (4, 4, 4)", (x,), torch.softmax(x, dim=-1)),
    ]

    def slips(x):
        exp = (x - x.amax(-1, keepdim=True)).exp()
        overflow = "exp(1000) is infinite, and inf / inf is nan: subtract the maximum of each row first."
        yield x.exp() / x.exp().sum(-1, keepdim=True), overflow
        axis = "The softmax runs over the wrong axis: along the last one, dim=-1, it must sum to 1."
        yield x.softmax(0), axis
        yield x.softmax(-2), axis
        axis = "The sum runs over the wrong axis: along the last one, dim=-1, the result must sum to 1."
        yield exp / exp.sum(0, keepdim=True), axis
        yield exp / exp.sum(-2, keepdim=True), axis
        spread = "keepdim=True is missing: the sum or maximum of a row is spread over a column instead."
        shifted = (x - x.amax(-1)).exp()
        yield exp / exp.sum(-1), spread
        yield shifted / shifted.sum(-1, keepdim=True), spread
        yield shifted / shifted.sum(-1), spread
        yield exp / exp.sum(), "The whole tensor sums to 1; each row along the last axis should: dim=-1."
        yield x.log_softmax(-1), "That is the logarithm of the softmax."
        yield exp, "The exps are not divided by their sum."
        yield x / x.sum(-1, keepdim=True), "exp is missing: the scores themselves are divided by their sum."

    judge(m.softmax, cases, slips)


@check(
    3,
    "split_heads",
    "Cut the last axis in two first, (B, T, n_head, C / n_head); only then exchange axes.",
    "x.view(B, T, n_head, C // n_head) leaves every number at its position; transpose(1, 2) then brings the "
    "heads before the positions. view never moves numbers: it breaks the same row of them into other lines.",
)
def todo_3(m):
    n_head, size = 3, 4
    x = torch.randn(2, 5, n_head * size)
    by_hand = torch.stack([x[:, :, h * size : (h + 1) * size] for h in range(n_head)], dim=1)
    example, answer = torch.arange(8).view(1, 2, 4), torch.tensor([[[[0, 1], [4, 5]], [[2, 3], [6, 7]]]])
    cases = [
        ("[[[0, 1, 2, 3], [4, 5, 6, 7]]] with n_head = 2", (example, 2), answer),
        (f"random x {tuple(x.shape)} with n_head = {n_head}", (x, n_head), by_hand),
    ]

    def slips(x, n):
        B, T, C = x.shape
        mixed = "A view alone mixes positions with channels: first split the channels, then transpose."
        yield x.view(B, n, T, C // n), mixed
        yield x.view(B, T, n, C // n), "The heads stand after the positions: a transpose is missing."
        far = "Every n_head-th channel went to one head; a head gets neighbours: n_head before C / n_head."
        yield x.view(B, T, C // n, n).permute(0, 3, 1, 2), far
        yield x.view(B, T, C // n, n).transpose(1, 2), "n_head and C / n_head are exchanged."

    judge(m.split_heads, cases, slips)


# ---------------------------------------- nn.Module basics ----------------------------------------


@check(
    4,
    "MLP.__init__",
    "super().__init__() first, then self.hidden and self.output.",
    "self.hidden = nn.Linear(how many numbers come in, how many go out). A layer must be kept as "
    "self.something: that is how nn.Module finds its parameters.",
)
def todo_4(m):
    has_layers("MLP(2, 3, 1)", m.MLP(2, 3, 1), 13, hidden=nn.Linear(2, 3), output=nn.Linear(3, 1))


@check(
    5,
    "MLP.forward",
    "hidden, then tanh, then output, with the layers made in __init__; return the result.",
    "A layer is called like a function: self.hidden(x). torch.tanh works on every number of the result.",
)
def todo_5(m):
    one = fill(m.MLP(1, 1, 1), hidden__weight=2, hidden__bias=1, output__weight=2, output__bias=1)
    net, x = shake(m.MLP(3, 5, 2)), torch.randn(4, 6, 3)
    hidden = torch.einsum("bti,hi->bth", x, net.hidden.weight) + net.hidden.bias
    truth = torch.einsum("bth,oh->bto", hidden.tanh(), net.output.weight) + net.output.bias
    cases = [
        ("MLP(1, 1, 1), weights 2, biases 1, x = [[-0.5]]", (one, torch.tensor([[-0.5]])), torch.ones(1, 1)),
        ("MLP(3, 5, 2), random weights and x", (net, x), truth),
    ]

    def slips(net, x):
        hidden, output = net.hidden, net.output
        yield output(hidden(x)), "The tanh in between is missing; without it two linear layers are only one."
        yield output(hidden(x).tanh()).tanh(), "The result has a tanh too: the output layer comes last."
        yield (
            output(hidden(x)).tanh(),
            "tanh comes after the output layer; it belongs between the two layers.",
        )
        yield (
            output(hidden(x.tanh())),
            "tanh comes before the hidden layer; it belongs between the two layers.",
        )
        yield output(hidden(x).relu()), "That is ReLU, not tanh."
        yield output(hidden(x).sigmoid()), "That is the sigmoid, not tanh."
        yield hidden(x).tanh(), "The output layer is not used."

    judge(lambda net, x: net(x), cases, slips)
    learns("MLP(3, 5, 2), backward from the result", net(x), net)


# ---------------------------------------- token embedding -----------------------------------------


@check(
    6,
    "TokenEmbedding.__init__",
    "super().__init__(), then self.table = nn.Embedding(...).",
    "nn.Embedding(how many rows, how many numbers in a row): one row for each token of the vocabulary.",
)
def todo_6(m):
    has_layers("TokenEmbedding(65, 8)", m.TokenEmbedding(65, 8), 520, table=nn.Embedding(65, 8))


@check(
    7,
    "TokenEmbedding.forward",
    "Each id gives its row of the table, and the rows stay apart: (B, T) becomes (B, T, C).",
    "An nn.Embedding is called with the ids, like any layer: self.table(idx).",
)
def todo_7(m):
    three = fill(m.TokenEmbedding(3, 2), table__weight=[[0, 0], [1, 10], [2, 20]])
    embedding, idx = shake(m.TokenEmbedding(7, 4)), torch.randint(7, (2, 5))
    one_hot = F.one_hot(idx, 7).float() @ embedding.table.weight
    cases = [
        (
            "the example of the text",
            (three, torch.tensor([[2, 0]])),
            torch.tensor([[[2.0, 20.0], [0.0, 0.0]]]),
        ),
        ("TokenEmbedding(7, 4), random ids (2, 5)", (embedding, idx), one_hot),
    ]

    def slips(embedding, idx):
        table = embedding.table.weight
        yield (
            table[idx] * table.shape[1] ** 0.5,
            "The rows are multiplied by sqrt(C); here they stay as they are.",
        )
        yield table[idx].mean(1), "The rows of one line are averaged: every token keeps its own."
        yield table[idx].sum(1), "The rows of one line are added up: every token keeps its own."
        yield table[idx].transpose(1, 2), "Axes are exchanged: the channels come last, (B, T, C)."
        yield table, "That is the whole table, not the rows of the ids."
        yield table[idx[0]], "Only the first line of the batch is looked up."
        yield table[idx[:, -1]], "Only the last id of each line is looked up."
        yield table[idx - 1], "The rows are off by one: id 0 is row 0."

    judge(lambda embedding, idx: embedding(idx), cases, slips)
    learns("TokenEmbedding(7, 4), backward from the result", embedding(idx), embedding)


# -------------------------------------- positional encoding ---------------------------------------


def sinusoids(block_size, n_embd):
    """The table (block_size, n_embd), number by number."""
    angles = [[p / 10000 ** ((c - c % 2) / n_embd) for c in range(n_embd)] for p in range(block_size)]
    return torch.tensor([[(math.sin, math.cos)[c % 2](a) for c, a in enumerate(row)] for row in angles])


@check(
    8,
    "PositionalEncoding.__init__",
    "Sines in the even channels, cosines in the odd ones, row p for position p; then register_buffer.",
    "Make position (block_size, 1) with unsqueeze(1), and the n_embd / 2 numbers 10000 ** (2i / n_embd); the "
    "quotient of the two holds all angles, (block_size, n_embd / 2). table[:, 0::2] are the even channels of "
    "a table, table[:, 1::2] the odd ones.",
)
def todo_8(m):
    def table(block_size, n_embd):
        encoding = m.PositionalEncoding(block_size, n_embd)
        called = f"PositionalEncoding({block_size}, {n_embd})"
        if "table" in dict(encoding.named_parameters()):
            hint = "An nn.Parameter is trained, and this table is fixed: use self.register_buffer."
            raise Wrong(called, "the table as a buffer", "the table as a parameter", hint)
        if "table" not in dict(encoding.named_buffers()):
            came = "a plain attribute self.table" if hasattr(encoding, "table") else "no self.table"
            hint = 'self.register_buffer("table", ...): only then it is saved and moved with the model.'
            raise Wrong(called, "the table as a buffer", came, hint)
        return encoding.table

    n, c = random.randint(6, 12), 2 * random.randint(3, 6)
    rows = [
        [0.0, 1.0, 0.0, 1.0],
        [0.841471, 0.540302, 0.01, 0.99995],
        [0.909297, -0.416147, 0.019999, 0.9998],
    ]
    cases = [
        ("PositionalEncoding(3, 4).table", (3, 4), torch.tensor(rows)),
        (f"PositionalEncoding({n}, {c}).table", (n, c), sinusoids(n, c)),
    ]

    def slips(n, c):
        p, i = torch.arange(n)[:, None], torch.arange(c // 2)

        def take_turns(even, odd):
            return torch.stack([even, odd], dim=-1).flatten(1)

        angle = p / 10000 ** (2 * i / c)
        yield take_turns(angle.cos(), angle.sin()), "Sine and cosine are exchanged: even channels are sines."
        halves = "All sines stand before all cosines; they take turns: channel 0 sine, 1 cosine, 2 sine, ..."
        yield torch.cat([angle.sin(), angle.cos()], dim=1), halves
        single = p / 10000 ** (i / c)
        yield take_turns(single.sin(), single.cos()), "The exponent is i / n_embd; it must be 2i / n_embd."
        late = (p + 1) / 10000 ** (2 * i / c)
        yield take_turns(late.sin(), late.cos()), "The positions count from 1; the first is 0."
        odd = p / 10000 ** ((2 * i + 1) / c)
        yield (
            take_turns(angle.sin(), odd.cos()),
            "A sine and the cosine after it share one angle, 2i in both.",
        )
        product = p * 10000 ** (2 * i / c)
        yield (
            take_turns(product.sin(), product.cos()),
            "p is multiplied by 10000^(2i / n_embd); divide by it.",
        )
        yield sinusoids(n, c).T, "Rows and columns are exchanged: one row for each position."
        yield take_turns(angle.sin(), angle.sin()), "All channels are sines: the odd ones are cosines."

    judge(table, cases, slips)


@check(
    9,
    "PositionalEncoding.forward",
    "Only the first T rows of the table are needed, and every example gets the same.",
    "x is (B, T, C), so T is x.shape[1]. self.table[:T] is (T, C), and x plus it adds it to every example.",
)
def todo_9(m):
    encoding, ones, x = m.PositionalEncoding(9, 4), torch.ones(1, 3, 4), torch.randn(3, 5, 4)
    cases = [
        ("PositionalEncoding(9, 4), ones (1, 3, 4)", (encoding, ones), ones + sinusoids(3, 4)),
        ("PositionalEncoding(9, 4), random x (3, 5, 4)", (encoding, x), x + sinusoids(5, 4)),
    ]

    def slips(encoding, x):
        (B, T, _), table = x.shape, encoding.table
        batch = "The rows are added per batch: example b got row b. Positions are axis 1: T = x.shape[1]."
        yield x + table[:B].unsqueeze(1), batch
        yield table[:T].expand(x.shape), "x is lost: the result is x plus the rows, not the rows alone."
        yield table[:T], "The rows came back alone: the result is x plus the rows."
        yield x * table[:T], "x is multiplied by the rows; add them."
        yield x + table[1 : T + 1], "The rows are off by one: position 0 gets row 0."
        yield x + table[T], "Every position got the same row, row T; position t gets row t."
        yield x + table[-T:], "Those are the last rows of the table; the first T are needed."
        yield x, "Nothing was added to x."

    judge(lambda encoding, x: encoding(x), cases, slips)


# ----------------------------------------- self-attention -----------------------------------------


@check(
    10,
    "SelfAttentionHead.__init__",
    "Three layers of the same kind: self.query, self.key, self.value, all without bias.",
    "nn.Linear(n_embd, head_size, bias=False), three times.",
)
def todo_10(m):
    truth = nn.Linear(8, 4, bias=False)
    has_layers("SelfAttentionHead(8, 4)", m.SelfAttentionHead(8, 4), 96, query=truth, key=truth, value=truth)


def random_mask(T):
    """A mask in which every row has an open and a closed place, and which is not symmetric."""
    mask, i = torch.rand(T, T) < 0.5, torch.arange(T)
    mask[i, i], mask[i, (i + 1) % T] = True, False
    mask[0, T - 2], mask[T - 2, 0] = True, False
    return mask


@check(
    11,
    "SelfAttentionHead.forward",
    "Follow the four steps of the text in order: scores, mask, softmax, weighted sum.",
    "k.transpose(-2, -1) turns the keys into (B, head_size, T), so that q @ it is (B, T, T). "
    "scores.masked_fill(~mask, -math.inf) hides what mask does not allow. softmax along the last axis, the "
    "keys; then weights @ v.",
)
def todo_11(m):
    two = fill(m.SelfAttentionHead(2, 2), query__weight=EYE, key__weight=EYE, value__weight=EYE)
    x2, mask2 = torch.tensor([EYE]), torch.tensor([[True, False], [True, True]])
    head, x, mask = shake(m.SelfAttentionHead(6, 4)), torch.randn(3, 5, 6), random_mask(5)
    q, k, v = (F.linear(x, layer.weight) for layer in (head.query, head.key, head.value))
    free, masked = (F.scaled_dot_product_attention(q, k, v, attn_mask=seen) for seen in (None, mask))
    row = [0.330238, 0.669762]
    called = "SelfAttentionHead(6, 4), random x (3, 5, 6)"
    cases = [
        ("the example of the text, no mask", (two, x2, None), torch.tensor([[row[::-1], row]])),
        ("the example of the text, with its mask", (two, x2, mask2), torch.tensor([[[1.0, 0.0], row]])),
        (f"{called}, no mask", (head, x, None), free),
        (f"{called}, random mask", (head, x, mask), masked),
    ]

    def slips(head, x, mask):
        (_, T, C), size = x.shape, head.key.out_features
        q, k, v = head.query(x), head.key(x), head.value(x)
        allowed = torch.ones(T, T, dtype=torch.bool) if mask is None else mask
        upside_down = allowed if mask is None else ~mask

        def attend(scores, allowed=allowed, hidden=-math.inf, axis=-1, values=v):
            return scores.masked_fill(~allowed, hidden).softmax(axis) @ values

        dots = q @ k.mT
        scores = dots / math.sqrt(size)
        yield attend(dots), "The scores are not divided by sqrt(head_size)."
        yield attend(dots / size), "The scores are divided by head_size; the square root is missing."
        yield attend(dots / math.sqrt(C)), "The scores are divided by sqrt(n_embd); it is sqrt(head_size)."
        yield attend(dots / math.sqrt(T)), "The scores are divided by sqrt(T); it is sqrt(head_size)."
        yield attend(dots * math.sqrt(size)), "The scores are multiplied by sqrt(head_size); divide."
        columns = "The softmax runs over the wrong axis: each row of weights must sum to 1, dim=-1, the keys."
        yield attend(scores, axis=-2), columns
        yield attend(scores, axis=0), columns
        yield (
            attend(scores, upside_down),
            "The mask is upside down: True means may read; hide where it is False, ~mask.",
        )
        late = "The mask comes after the softmax: rows no longer sum to 1. Put -inf in the scores, before it."
        yield (scores.softmax(-1) * allowed) @ v, late
        yield attend(scores, allowed | True), "The mask is ignored."
        zero = "Hidden scores became 0, but exp(0) = 1 still counts: they must become minus infinity."
        yield attend(scores, hidden=0.0), zero
        yield attend(scores, allowed.T), "The mask is transposed: its rows are the positions that read."
        yield attend(scores.mT), "Query and key are exchanged: row i belongs to the query of position i."
        yield (
            scores.masked_fill(~allowed, -math.inf) @ v,
            "The softmax is missing: weights are positive and sum to 1.",
        )
        yield (
            scores.masked_fill(~allowed, 0.0) @ v,
            "The softmax is missing: weights are positive and sum to 1.",
        )
        yield attend(scores, values=k), "The weights average the keys; they must average the values."
        yield attend(scores, values=q), "The weights average the queries; they must average the values."
        yield v, "Those are the values alone, without attention."
        yield attend(scores, values=torch.eye(T)), "Those are the weights; the last step is weights @ v."

    judge(lambda head, x, mask: head(x, mask), cases, slips)
    learns(f"{called}, backward from the result", head(x, mask), head)


# -------------------------------------- multi-head attention --------------------------------------


@check(
    12,
    "MultiHeadAttention.__init__",
    "self.n_head, and four layers: query, key, value without bias, proj with bias.",
    "All heads together are n_embd numbers wide, so each of the four is an nn.Linear from n_embd to n_embd.",
)
def todo_12(m):
    attention, called = m.MultiHeadAttention(8, 2), "MultiHeadAttention(8, 2)"
    plain = nn.Linear(8, 8, bias=False)
    has_layers(called, attention, 264, query=plain, key=plain, value=plain, proj=nn.Linear(8, 8))
    if getattr(attention, "n_head", None) != 2:
        came = f"self.n_head = {attention.n_head!r}" if hasattr(attention, "n_head") else "no self.n_head"
        raise Wrong(called, "self.n_head = 2", came, "forward needs it: self.n_head = n_head.")


@check(
    13,
    "MultiHeadAttention.forward",
    "Split, attention in each head, merge, proj. Does the merge undo the split?",
    "After attention the shape is (B, n_head, T, head_size). transpose(1, 2) makes (B, T, n_head, head_size) "
    "of it; then flatten(2) or reshape(B, T, C) lays the heads side by side.",
)
def todo_13(m):
    weights = dict.fromkeys(("query__weight", "key__weight", "value__weight", "proj__weight"), EYE)
    two, x2 = fill(m.MultiHeadAttention(2, 2), **weights, proj__bias=0), torch.tensor([EYE])
    attention, x, mask = shake(m.MultiHeadAttention(12, 3)), torch.randn(2, 5, 12), random_mask(5)
    torch_module = copy_attention(attention, nn.MultiheadAttention(12, 3, batch_first=True))
    free, _ = torch_module(x, x, x, need_weights=False)
    masked, _ = torch_module(x, x, x, attn_mask=~mask, need_weights=False)
    called = "MultiHeadAttention(12, 3), random x (2, 5, 12)"
    cases = [
        ("the example of the text", (two, x2, None), torch.tensor([[[0.731059, 0.5], [0.5, 0.731059]]])),
        (f"{called}, no mask", (attention, x, None), free),
        (f"{called}, random mask", (attention, x, mask), masked),
    ]

    def slips(a, x, mask):
        (B, T, C), n = x.shape, a.n_head

        def split(y):
            return y.view(B, T, n, C // n).transpose(1, 2)

        def split_by_view(y):
            return y.view(B, n, T, C // n)

        def merge(y):
            return y.transpose(1, 2).flatten(2)

        def merge_by_view(y):
            return y.reshape(B, T, C)

        def attend(split=split, merge=merge, mask=mask, scale=None):
            q, k, v = split(a.query(x)), split(a.key(x)), split(a.value(x))
            return merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))

        no_merge = "The merge lacks a transpose: (B, n_head, T, head_size) read as (B, T, C) mixes positions."
        yield a.proj(attend(merge=merge_by_view)), no_merge
        no_split = "The split is a view and lacks a transpose: it mixes positions. split_heads does it right."
        yield a.proj(attend(split_by_view)), no_split
        no_either = "Split and merge are views where transposes are needed: positions and channels get mixed."
        yield a.proj(attend(split_by_view, merge_by_view)), no_either
        mixed = "The merge mixes the channels of the heads: first those of head 0, then those of head 1."
        yield a.proj(attend(merge=lambda y: y.permute(0, 2, 3, 1).flatten(2))), mixed
        yield a.proj(attend(scale=C**-0.5)), "The scores are divided by sqrt(n_embd); it is sqrt(head_size)."
        yield a.proj(attend(scale=1.0)), "The scores are not divided by sqrt(head_size)."
        yield attend(), "proj is missing: as the last step it mixes the heads."
        yield a.proj(attend(mask=None)), "The mask is ignored."
        upside_down = "The mask is upside down: True means may read, in F.scaled_dot_product_attention too."
        yield a.proj(attend(mask=mask if mask is None else ~mask)), upside_down
        one = "That is one wide head: the channels are not split into n_head heads."
        yield a.proj(attend(lambda y: y[:, None], lambda y: y[:, 0])), one
        across = "Attention runs over heads, not positions: the shape must be (B, n_head, T, head_size)."
        yield a.proj(attend(lambda y: y.view(B, T, n, C // n), lambda y: y.flatten(2), mask=None)), across

    judge(lambda attention, x, mask: attention(x, mask), cases, slips)
    learns(f"{called}, backward from the result", attention(x, mask), attention)


def copy_attention(attention, torch_module):
    """Copy the learner's weights into an nn.MultiheadAttention and return it."""
    q, k, v = attention.query, attention.key, attention.value
    with torch.no_grad():
        torch_module.in_proj_weight.copy_(torch.cat([q.weight, k.weight, v.weight]))
        torch_module.in_proj_bias.zero_()
    torch_module.out_proj.load_state_dict(attention.proj.state_dict())
    return torch_module


# ------------------------------------------ feed-forward ------------------------------------------


@check(
    14,
    "FeedForward.__init__",
    "expand to 4 * n_embd, shrink back to n_embd, and an nn.Dropout with the probability given.",
    "self.dropout = nn.Dropout(dropout): the argument is a number, the attribute a layer.",
)
def todo_14(m):
    layers = {"expand": nn.Linear(8, 32), "shrink": nn.Linear(32, 8), "dropout": nn.Dropout(0.1)}
    has_layers("FeedForward(8, 0.1)", m.FeedForward(8, 0.1), 552, **layers)


@check(
    15,
    "FeedForward.forward",
    "Four steps in this order: expand, GELU, shrink, dropout.",
    "F.gelu is the function, self.dropout the layer of __init__. Each step takes what the one before gave.",
)
def todo_15(m):
    one = fill(m.FeedForward(1, 0.0), expand__weight=1, expand__bias=0, shrink__weight=1, shrink__bias=0)
    net, x = shake(m.FeedForward(4, 0.5)).eval(), torch.randn(3, 5, 4)
    hidden = F.linear(x, net.expand.weight, net.expand.bias)
    normal_cdf = (1 + torch.erf(hidden / math.sqrt(2))) / 2
    truth = F.linear(hidden * normal_cdf, net.shrink.weight, net.shrink.bias)
    cases = [
        ("the example of the text, x = [[[1.]]]", (one, torch.ones(1, 1, 1)), torch.tensor([[[3.365379]]])),
        ("FeedForward(4, 0.5) in eval mode, random x (3, 5, 4)", (net, x), truth),
    ]

    def slips(net, x):
        expand, shrink = net.expand, net.shrink
        yield shrink(expand(x)), "GELU is missing; without it two linear layers are only one."
        yield shrink(expand(x).relu()), "That is ReLU, not GELU."
        yield F.gelu(shrink(expand(x))), "GELU comes after shrink; it belongs between expand and shrink."
        yield F.gelu(shrink(F.gelu(expand(x)))), "GELU comes twice; after shrink there is none."
        approximate = "That is the tanh approximation of GELU, as in GPT-2; here the exact one is used."
        yield shrink(F.gelu(expand(x), approximate="tanh")), approximate
        yield shrink(F.silu(expand(x))), "That is SiLU, not GELU."
        yield shrink(expand(x).tanh()), "That is tanh, not GELU."
        yield x + shrink(F.gelu(expand(x))), "x is added to the result; that comes in the block, TODO 17."

    out = net(x)
    if out is not None and not agrees(net(x), out):
        hint = "Dropout works in eval mode too. self.dropout knows the mode; F.dropout has to be told."
        raise Wrong("FeedForward(4, 0.5) in eval mode, twice the same x", "the same result", "another", hint)
    judge(lambda net, x: net(x), cases, slips)
    learns("FeedForward(4, 0.5), backward from the result", net(x), net)

    called, x = "FeedForward(4, 0.5) in train mode, random x (3, 1000, 4)", torch.randn(3, 1000, 4)
    full, out = net(x), net.train()(x)
    dropped, kept = out.eq(0), out.ne(0)
    share = dropped.float().mean().item()
    if not 0.45 < share < 0.55 or not torch.allclose(out[kept], 2 * full[kept], rtol=1e-3, atol=1e-4):
        hint = "Dropout is the last step, once, by self.dropout."
        if share == 0:
            hint = "Dropout is missing, or it stands before shrink; it is the last step."
        raise Wrong(called, "half of the numbers set to 0, the others doubled", f"{share:.0%} set to 0", hint)


# --------------------------------------- transformer block ----------------------------------------


@check(
    16,
    "TransformerBlock.__init__",
    "Four modules: norm1, attention, norm2, feed_forward.",
    "nn.LayerNorm(n_embd) twice, MultiHeadAttention(n_embd, n_head), FeedForward(n_embd, dropout).",
)
def todo_16(m):
    block, called = m.TransformerBlock(8, 2, 0.1), "TransformerBlock(8, 2, 0.1)"
    branches = {"attention": m.MultiHeadAttention(8, 2), "feed_forward": m.FeedForward(8, 0.1)}
    has_layers(called, block, 848, norm1=nn.LayerNorm(8), norm2=nn.LayerNorm(8), **branches)
    if block.attention.n_head != 2:
        came = f"{block.attention.n_head} heads"
        hint = "The arguments are MultiHeadAttention(n_embd, n_head)."
        raise Wrong(called, "attention with 2 heads", came, hint)


@check(
    17,
    "TransformerBlock.forward",
    "Two lines, x = x + ..., one for each branch. Each branch reads its own norm of x as x is then.",
    "x = x + attention(norm1(x), mask); then the same with feed_forward and norm2, which reads the new x.",
)
def todo_17(m):
    silent = ("attention__proj", "feed_forward__shrink")
    zeros = {f"{layer}__{part}": 0 for layer in silent for part in ("weight", "bias")}
    still, x2 = fill(m.TransformerBlock(2, 1, 0.0), **zeros), torch.tensor([[[1.0, 5.0]]])
    block, x, mask = shake(m.TransformerBlock(12, 3, 0.0)), torch.randn(2, 5, 12), random_mask(5)
    torch_block = copy_block(block)
    called = "TransformerBlock(12, 3, 0.0), random x (2, 5, 12)"
    cases = [
        ("the example of the text, x = [[[1., 5.]]]", (still, x2, None), x2.clone()),
        (f"{called}, no mask", (block, x, None), torch_block(x)),
        (f"{called}, random mask", (block, x, mask), torch_block(x, src_mask=~mask)),
    ]

    def slips(block, x, mask):
        norm1, norm2, feed_forward = block.norm1, block.norm2, block.feed_forward

        def attention(x):
            return block.attention(x, mask)

        def second(y):
            return y + feed_forward(norm2(y))

        bare, y = attention(norm1(x)), x + attention(norm1(x))
        both = "Both residuals are forgotten: what a branch gives is added to x, it does not replace x."
        yield feed_forward(norm2(bare)), both
        yield second(bare), "The first residual is forgotten: x + attention, not attention alone."
        yield (
            feed_forward(norm2(y)),
            "The second residual is forgotten: x + feed_forward, not feed_forward alone.",
        )
        post = norm1(x + attention(x))
        post_ln = "That is Post-LN, which normalises the sums. Here only what a branch reads is normalised."
        yield norm2(post + feed_forward(post)), post_ln
        raw = x + attention(x)
        yield (
            raw + feed_forward(raw),
            "Both norms are forgotten: attention reads norm1(x), feed_forward norm2(x).",
        )
        yield second(raw), "attention reads x itself; it should read norm1(x)."
        yield y + feed_forward(y), "feed_forward reads x itself; it should read norm2(x)."
        yield y + feed_forward(norm1(y)), "norm1 is used twice: feed_forward reads norm2(x)."
        crossed = x + attention(norm2(x))
        yield crossed + feed_forward(norm1(crossed)), "norm1 and norm2 are exchanged."
        over = norm1(x) + bare
        overwritten = "x is overwritten by its norm before the sum: add to x as it was before the norm."
        yield norm2(over) + feed_forward(norm2(over)), overwritten
        yield (
            y + feed_forward(norm2(x)),
            "feed_forward reads the x that came in; it should read the sum after attention.",
        )
        yield x + feed_forward(norm2(y)), "The second sum starts from the x that came in: attention is lost."
        blind = x + block.attention(norm1(x))
        yield second(blind), "The mask is not passed on to attention."
        yield (
            second(x) + attention(norm1(second(x))),
            "The order is exchanged: attention first, then feed_forward.",
        )
        yield y, "feed_forward is not used."

    judge(lambda block, x, mask: block(x, mask), cases, slips)
    learns(f"{called}, backward from the result", block(x, mask), block)


def copy_block(block):
    """An nn.TransformerEncoderLayer with the learner's weights: PyTorch's own Pre-LN block."""
    C, n_head = block.norm1.normalized_shape[0], block.attention.n_head
    layer = nn.TransformerEncoderLayer(C, n_head, 4 * C, 0.0, "gelu", batch_first=True, norm_first=True)
    copy_attention(block.attention, layer.self_attn)
    layer.norm1.load_state_dict(block.norm1.state_dict())
    layer.norm2.load_state_dict(block.norm2.state_dict())
    layer.linear1.load_state_dict(block.feed_forward.expand.state_dict())
    layer.linear2.load_state_dict(block.feed_forward.shrink.state_dict())
    return layer


# --------------------------------------- the complete model ---------------------------------------


@check(
    18,
    "TinyLLM.__init__",
    "Five modules: token_embedding, positions, blocks, norm, head.",
    "nn.ModuleList([TransformerBlock(n_embd, n_head, dropout) for _ in range(n_layer)]) holds n_layer "
    "different blocks; [block] * n_layer is one block n_layer times.",
)
def todo_18(m):
    model, called = m.TinyLLM(65, 32, 8, 2, 3, 0.0), "TinyLLM(65, 32, 8, 2, 3, 0.0)"
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, (list, tuple)):
        hint = "A Python list hides its blocks from parameters(): they would never learn. Use nn.ModuleList."
        raise Wrong(called, "self.blocks, an nn.ModuleList", f"self.blocks, {type(blocks).__name__}", hint)
    if isinstance(blocks, nn.ModuleList):
        if len(blocks) != 3:
            raise Wrong(called, "3 blocks", f"{len(blocks)} blocks", "There are n_layer blocks.")
        if len(set(blocks)) != 3:
            hint = "It is one and the same block n_layer times: make a new one for each layer."
            raise Wrong(called, "3 different blocks", "the same block again", hint)
    layers = {
        "token_embedding": m.TokenEmbedding(65, 8),
        "positions": m.PositionalEncoding(32, 8),
        "blocks": nn.ModuleList([m.TransformerBlock(8, 2, 0.0) for _ in range(3)]),
        "norm": nn.LayerNorm(8),
        "head": nn.Linear(8, 65),
    }
    has_layers(called, model, 3665, **layers)
    rows, heads = model.positions.table.shape[0], model.blocks[0].attention.n_head
    if rows != 32:
        hint = "The positions need block_size rows: PositionalEncoding(block_size, n_embd)."
        raise Wrong(called, "positions with 32 rows", f"{rows} rows", hint)
    if heads != 2:
        hint = "The arguments are TransformerBlock(n_embd, n_head, dropout)."
        raise Wrong(called, "blocks with 2 heads", f"{heads} heads", hint)


@check(
    19,
    "TinyLLM.forward",
    "token_embedding, positions, every block with the mask, norm, head: each takes what the one before gave.",
    "for block in self.blocks: x = block(x, mask). Then self.head(self.norm(x)), logits for every position.",
)
def todo_19(m):
    three = fill(m.TinyLLM(3, 8, 4, 2, 1, 0.0), head__weight=0, head__bias=[1, 2, 3])
    model, idx, mask = shake(m.TinyLLM(11, 8, 12, 3, 2, 0.0)), torch.randint(11, (2, 5)), random_mask(5)
    torch_blocks = [copy_block(block) for block in model.blocks]

    def truth(hidden):
        x = F.one_hot(idx, 11).float() @ model.token_embedding.table.weight + sinusoids(5, 12)
        for block in torch_blocks:
            x = block(x, src_mask=hidden)
        x = F.layer_norm(x, (12,), model.norm.weight, model.norm.bias)
        return F.linear(x, model.head.weight, model.head.bias)

    called = "TinyLLM(11, 8, 12, 3, 2, 0.0), random ids (2, 5)"
    example = torch.tensor([[[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]])
    cases = [
        ("the example of the text, idx = [[0, 2]]", (three, torch.tensor([[0, 2]]), None), example),
        (f"{called}, no mask", (model, idx, None), truth(None)),
        (f"{called}, random mask", (model, idx, mask), truth(~mask)),
    ]

    def slips(model, idx, mask):
        norm, head = model.norm, model.head
        embedded = model.token_embedding(idx)

        def through(x, blocks=model.blocks, mask=mask):
            for block in blocks:
                x = block(x, mask)
            return x

        x = model.positions(embedded)
        logits = head(norm(through(x)))
        yield logits.softmax(-1), "Those are probabilities. Logits come straight from head, without softmax."
        yield logits.log_softmax(-1), "Those are logarithms of probabilities. Logits come straight from head."
        yield head(norm(through(embedded))), "The positions are not added."
        yield head(through(x)), "The last norm, before head, is missing."
        yield head(norm(through(x, mask=None))), "The mask is not passed on to the blocks."
        yield head(norm(through(x, model.blocks[:1]))), "Only the first block is used."
        chain = "Only the last block has an effect: each takes what the one before gave, x = block(x, mask)."
        yield head(norm(through(x, model.blocks[-1:]))), chain
        lost = "The blocks have no effect: is their result thrown away? x = block(x, mask)."
        yield head(norm(x)), lost
        yield logits[:, -1], "Only the logits of the last position came back: return those of every position."
        yield norm(through(x)), "head is missing."
        yield head(norm(through(x, reversed(model.blocks)))), "The blocks run in reversed order."

    judge(lambda model, idx, mask: model(idx, mask), cases, slips)
    learns(f"{called}, backward from the result", model(idx, mask), model)


# ---------------------------------------- text generation -----------------------------------------


class SumModel(nn.Module):
    """At every position it wants the sum of all ids that it sees up to there, modulo 17."""

    def __init__(self):
        super().__init__()
        self.longest = 0

    def wants(self, idx):
        """Token ids (B, T) to wanted ids (B, T)."""
        return idx.cumsum(1) % 17

    def forward(self, idx):
        """Token ids (B, T) to logits (B, T, V)."""
        self.longest = max(self.longest, idx.shape[1])
        return 100.0 * F.one_hot(self.wants(idx), 17)


class NextModel(SumModel):
    """At every position it wants the id there plus one."""

    def wants(self, idx):
        """Token ids (B, T) to wanted ids (B, T)."""
        return (idx + 1) % 17


class ConstantModel(nn.Module):
    """The same logits (V,) at every position."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, idx):
        """Token ids (B, T) to logits (B, T, V)."""
        return self.logits.expand(*idx.shape, -1)


def continued(model, idx, n, crop, position=-1):
    """Append n times the id that `model` wants at `position` of the ids that `crop` leaves."""
    for _ in range(n):
        idx = torch.cat([idx, model.wants(crop(idx))[:, position, None]], dim=1)
    return idx


@check(
    20,
    "generate",
    "A loop of max_new_tokens rounds: crop to block_size, model, last position, softmax, draw, append.",
    "idx[:, -block_size:] are the last ids, at most block_size. model(...)[:, -1] is (B, V). "
    "torch.multinomial(probabilities, num_samples=1) is (B, 1), and torch.cat([idx, ...], dim=1) appends it.",
)
def todo_20(m):
    model, one_more = SumModel(), NextModel()
    short, long = torch.randint(1, 17, (3, 2)), torch.randint(1, 17, (4, 9))
    by_hand = torch.tensor([[3, 4, 5, 6]])
    called = "a model that wants the sum of the ids it sees"
    cases = [
        (
            "a model that wants the last id plus one, [[3, 4]], 2 more",
            (one_more, by_hand[:, :2], 2, 8),
            by_hand,
        ),
        (
            f"{called}, prompt (3, 2), 4 more, block_size 5",
            (model, short, 4, 5),
            continued(model, short, 4, lambda idx: idx[:, -5:]),
        ),
        (
            f"{called}, prompt (4, 9), 6 more, block_size 5",
            (model, long, 6, 5),
            continued(model, long, 6, lambda idx: idx[:, -5:]),
        ),
    ]

    def slips(model, idx, n, size):
        def crop(idx):
            return idx[:, -size:]

        right = continued(model, idx, n, crop)
        first = "The logits of the first position are used; the next id follows the last position: [:, -1]."
        yield continued(model, idx, n, crop, position=0), first
        too_long = "The prompt is not cropped to the block: the model gets at most the last block_size ids."
        yield continued(model, idx, n, lambda idx: idx), too_long
        front = "The model gets the first block_size ids; it needs the last ones, idx[:, -block_size:]."
        yield continued(model, idx, n, lambda idx: idx[:, :size]), front
        alone = "The model gets the last id alone; it needs the last block_size ids."
        yield continued(model, idx, n, lambda idx: idx[:, -1:]), alone
        yield right[:, -n:], "Only the new ids came back: the prompt belongs to the result."
        yield right[:, :-1], "There is one new id too few: max_new_tokens rounds."
        yield continued(model, idx, n + 1, crop), "There is one new id too many: max_new_tokens rounds."
        stuck = "The model gets the same prompt every time: append each new id before the next round."
        yield torch.cat([idx, model.wants(crop(idx))[:, -1:].expand(-1, n)], dim=1), stuck
        yield continued(model, idx, 1, crop), "Only one id is appended: append in every round."
        cropped = idx
        for _ in range(n):
            cropped = continued(model, crop(cropped), 1, crop)
        yield cropped, "The result is cropped: crop what the model gets, but append to all the ids."

    try:
        judge(m.generate, cases, slips)
    except Wrong as wrong:
        wrong.hint = wrong.hint or slip_of_draws(draw_shares(m))
        raise
    if model.longest > 5:
        hint = "The prompt is not cropped to the block: the model gets at most idx[:, -block_size:]."
        came = f"{model.longest} ids at once"
        raise Wrong("what the model gets, prompt (4, 9), block_size 5", "at most 5 ids", came, hint)
    shares, truth = draw_shares(m), torch.tensor([1.0, 2.0, 3.0]).softmax(0)
    if not near(shares, truth):
        checked = "4000 draws from the logits [1., 2., 3.]: the share of each id"
        raise Wrong(checked, show(truth), show(shares), slip_of_draws(shares))


def draw_shares(m):
    """How often `generate` draws each id where the logits are 1, 2, 3: shares (3,)."""
    prompt = torch.zeros(4000, 1, dtype=torch.int64)
    ids = m.generate(ConstantModel(torch.tensor([1.0, 2.0, 3.0])), prompt, 1, 4)
    return torch.bincount(ids[:, -1].clamp(0, 2), minlength=3) / 4000


def near(shares, truth):
    """Whether 4000 draws can have these shares, give or take six standard deviations."""
    return torch.allclose(shares, torch.as_tensor(truth), atol=0.045)


def slip_of_draws(shares):
    """The hint for a way of drawing that is known to be wrong, or None."""
    if near(shares, [0.0, 0.0, 1.0]):
        return "The likeliest id is taken every time; draw with torch.multinomial."
    if near(shares, [1 / 6, 2 / 6, 3 / 6]):
        return "The logits serve as probabilities; softmax comes first."
    if near(shares, [1 / 3, 1 / 3, 1 / 3]):
        return "All ids are equally likely. Is the softmax over the wrong axis? The vocabulary is the last."
    return None


# ------------------------------------------ causal mask -------------------------------------------


@check(
    21,
    "causal_mask",
    "True on the diagonal and below it, False above.",
    "torch.ones(T, T, dtype=torch.bool) is all True; tril keeps the lower triangle with its diagonal.",
)
def todo_21(m):
    T = random.randint(5, 9)
    three = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
    loops = torch.tensor([[column <= row for column in range(T)] for row in range(T)])
    cases = [("causal_mask(3)", (3,), three), (f"causal_mask({T})", (T,), loops)]

    def slips(T):
        everything = torch.ones(T, T, dtype=torch.bool)
        lower = everything.tril()
        yield lower.T, "The mask is upside down: row 0 may read from itself alone, the last row from all."
        yield ~lower, "The mask is inverted: True means that reading is allowed."
        yield everything.tril(-1), "The diagonal is missing: a position may read from itself too."
        yield (
            everything.tril(1),
            "Each row sees one position too many, the next one: the diagonal is the last True.",
        )
        booleans = "Those are numbers 0 and 1; the mask is made of booleans, dtype=torch.bool."
        yield lower.float(), booleans
        yield lower.long(), booleans
        added = torch.zeros(T, T).masked_fill(~lower, -math.inf)
        yield added, "Those are 0 and minus infinity, to be added to scores; here a mask is booleans."
        yield everything, "Everything is visible: above the diagonal it must be False."

    judge(m.causal_mask, cases, slips)


# -------------------------------------- character tokenizer ---------------------------------------


def random_text():
    """Letters and marks, most of them several times, not sorted."""
    return "zza" + "".join(random.choices(string.ascii_letters + " \n!'", k=60))


@check(
    22,
    "CharTokenizer.__init__",
    "chars: each character once, sorted, joined to a string. ids: the place of each in it.",
    'set(text) holds each character once, in no order; sorted makes a list of it, "".join a string. '
    "enumerate gives each character with its place.",
)
def todo_22(m):
    text = random_text()

    def attribute(name):
        def read(text):
            tokenizer = m.CharTokenizer(text)
            if not hasattr(tokenizer, name):
                hint = "The name is missing, or spelled in another way."
                raise Wrong("CharTokenizer(text)", f"self.{name}", f"no self.{name}", hint)
            return getattr(tokenizer, name)

        return read

    chars = "".join(char for char in map(chr, range(128)) if char in text)
    cases = [
        ('CharTokenizer("hello").chars', ("hello",), "ehlo"),
        ("chars of a random text", (text,), chars),
    ]

    def slips_of_chars(text):
        yield "".join(sorted(text)), "Each character should stand there once: set(text) drops the doubles."
        yield (
            "".join(dict.fromkeys(text)),
            "The characters are not sorted: they stand as they come in the text.",
        )
        yield (
            sorted(set(text)),
            'chars is a string and sorted() gives a list: "".join(...) makes a string of it.',
        )
        yield "".join(sorted(set(text), reverse=True)), "The order is reversed."
        yield text, "That is the text itself; chars holds each of its characters once."

    judge(attribute("chars"), cases, slips_of_chars)
    cases = [
        ('CharTokenizer("hello").ids', ("hello",), {"e": 0, "h": 1, "l": 2, "o": 3}),
        ("ids of a random text", (text,), {char: chars.index(char) for char in chars}),
    ]

    def slips_of_ids(text):
        chars = sorted(set(text))
        yield (
            {char: i for i, char in enumerate(chars, 1)},
            "The ids count from 1; an id is a place in chars, from 0.",
        )
        yield (
            dict(enumerate(chars)),
            "The dict is the wrong way round: characters are the keys, ids the values.",
        )
        yield (
            {char: ord(char) for char in chars},
            "Those are character codes (ord); an id is a place in chars.",
        )

    judge(attribute("ids"), cases, slips_of_ids)


@check(
    23,
    "CharTokenizer.encode",
    "A list with the id of each character of the text given here: look them up in self.ids.",
    "[self.ids[char] for char in text] goes through the text in order.",
)
def todo_23(m):
    text = random_text()
    word = "za" + "".join(random.choices(text, k=9)) + "z"  # one letter twice, and not sorted
    truth = [len({other for other in text if other < char}) for char in word]
    cases = [
        ('CharTokenizer("hello").encode("hole")', (m.CharTokenizer("hello"), "hole"), [1, 3, 2, 0]),
        (f"encode({word!r})", (m.CharTokenizer(text), word), truth),
    ]

    def slips(tokenizer, text):
        ids = tokenizer.ids
        yield (
            torch.tensor([ids[char] for char in text]),
            "A plain list is wanted; the tensor is made in train.py.",
        )
        yield [ord(char) for char in text], "Those are character codes (ord); the ids are in self.ids."
        yield list(text), "Those are the characters; their ids are in self.ids."
        yield sorted(ids[char] for char in text), "The ids are sorted; they must follow the text."
        yield [ids[char] for char in dict.fromkeys(text)], "Doubles are lost: every character gives its id."
        yield list(range(len(text))), "Those are places in this text, not ids."
        yield list(ids.values()), "Those are all ids of the vocabulary, not those of the text."
        yield [ids[char] for char in reversed(text)], "The order is reversed."

    judge(lambda tokenizer, text: tokenizer.encode(text), cases, slips)


@check(
    24,
    "CharTokenizer.decode",
    "One string: the character of each id, in order. An id is a place in self.chars.",
    'self.chars[i] is the character of id i; "".join(...) makes one string of them.',
)
def todo_24(m):
    text = random_text()
    tokenizer, word = m.CharTokenizer(text), "".join(random.choices(text, k=12))
    cases = [
        ('CharTokenizer("hello").decode([1, 3, 2, 0])', (m.CharTokenizer("hello"), [1, 3, 2, 0]), "hole"),
        ("decode(encode(word))", (tokenizer, tokenizer.encode(word)), word),
    ]

    def slips(tokenizer, ids):
        chars = tokenizer.chars
        yield [chars[i] for i in ids], 'That is a list of characters: "".join(...) makes one string of it.'
        yield " ".join(chars[i] for i in ids), 'There are blanks in between: "".join puts nothing there.'
        yield "".join(map(str, ids)), "The ids themselves are joined; look up their characters in self.chars."
        yield "".join(map(chr, ids)), "An id is no character code (chr); it is a place in self.chars."
        yield "".join(chars[i] for i in reversed(ids)), "The order is reversed."
        yield "".join(chars[i - 1] for i in ids), "Each character is one place too early: ids count from 0."

    judge(lambda tokenizer, ids: tokenizer.decode(ids), cases, slips)
