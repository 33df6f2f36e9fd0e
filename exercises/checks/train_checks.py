"""Checks of TODO 25 to 31. `m` is the learner's train.py; the truth comes from PyTorch, loops or by hand."""

import copy
import math
import random
import string

import torch
import torch.nn as nn
import torch.nn.functional as F

from .compare import Wrong, agrees, check, judge

# --------------------------------------------- dataset --------------------------------------------


@check(
    25,
    "TextDataset.__len__",
    "How many windows fit into all ids but the last? Whole windows only: an int.",
    "The last id can only be a target, so N - 1 ids can be inputs; // divides and drops the rest.",
)
def todo_25(m):
    size = random.randint(4, 7)
    full = size * random.randint(3, 9)
    cases = [
        ("10 ids, block_size 3", (10, 3), 3),
        ("9 ids, block_size 3", (9, 3), 2),
        (f"{full} ids, block_size {size}", (full, size), full // size - 1),
        (f"{full + 1} ids, block_size {size}", (full + 1, size), full // size),
    ]

    def slips(n, size):
        no_target = "The last window has no target for its last id: one more id must follow it."
        yield n // size, no_target
        yield n - size, "Those are windows that overlap; here window i starts at i * block_size."
        yield n - size + 1, "Those are windows that overlap; here window i starts at i * block_size."
        yield n, "That is the number of ids, not of windows."
        yield n - 1, "That is the number of inputs and targets; a window holds block_size of them."
        yield math.ceil((n - 1) / size), "Whole windows only: what is left at the end is dropped."
        yield (n - 1) / size, "The number of windows is whole, an int: // instead of /."
        yield (
            n // (size + 1),
            "A window's last target is also the next window's first input: ids are shared.",
        )

    # __len__ by its name: len() would refuse what is no int before it could be shown
    judge(lambda n, size: m.TextDataset(torch.arange(n), size).__len__(), cases, slips)


def shuffled_ids(n):
    """n different ids in random order."""
    return torch.randperm(1000)[:n]


@check(
    26,
    "TextDataset.inputs",
    "A slice of self.ids: from i * block_size, block_size ids long.",
    "self.ids[start : start + self.block_size] with start = i * self.block_size.",
)
def todo_26(m):
    tens, ids = torch.arange(0, 100, 10), shuffled_ids(22)
    cases = [
        ("ids 0, 10, ..., 90, block_size 3, inputs(1)", (tens, 3, 1), torch.tensor([30, 40, 50])),
        ("22 random ids, block_size 5, inputs(0)", (ids, 5, 0), ids[:5].clone()),
        ("22 random ids, block_size 5, inputs(2)", (ids, 5, 2), ids[10:15].clone()),
    ]

    def slips(ids, size, i):
        start = i * size
        yield ids[i : i + size], "The window begins at id i; it must begin at i * block_size."
        yield ids[start : start + size + 1], "That is one id too many: block_size ids, the target is apart."
        yield ids[start : start + size - 1], "That is one id too few: a slice ends before its second number."
        yield ids[start + 1 : start + size + 1], "That is shifted by one: those are the targets."
        yield ids[start : start + size].tolist(), "A list came back: a slice of the tensor is a tensor."
        yield ids[start:], "The slice has no end: block_size ids."
        yield ids[:size], "That is always the first window."
        yield ids[start], "That is one id, not block_size of them."

    judge(lambda ids, size, i: m.TextDataset(ids, size).inputs(i), cases, slips)


@check(
    27,
    "TextDataset.targets",
    "The same slice as the inputs, shifted by one to the right.",
    "What follows the id at place p is at p + 1: self.ids[start + 1 : start + 1 + self.block_size].",
)
def todo_27(m):
    tens, ids = torch.arange(0, 100, 10), shuffled_ids(21)
    cases = [
        ("ids 0, 10, ..., 90, block_size 3, targets(1)", (tens, 3, 1), torch.tensor([40, 50, 60])),
        ("21 random ids, block_size 5, targets(0)", (ids, 5, 0), ids[1:6].clone()),
        ("21 random ids, block_size 5, targets(3), the last", (ids, 5, 3), ids[16:21].clone()),
    ]

    def slips(ids, size, i):
        start = i * size
        window = ids[start : start + size]
        same = "The targets are not shifted: they equal the inputs, and the model would learn to copy."
        yield window, same
        yield (
            ids[start - 1 : start - 1 + size],
            "The shift goes the wrong way: the next id, not the one before.",
        )
        yield ids[start + size : start + 2 * size], "That is the next window; the shift is by one id."
        yield ids[start + size], "That is one target; each of the block_size positions has its own."
        yield (
            ids[start + size : start + size + 1],
            "That is one target; each of the block_size positions has its own.",
        )
        yield ids[start + 1 : start + size], "That is one too few: the last input has a target too."
        yield ids[start + 2 : start + 2 + size], "The shift is by two; the next id is one to the right."
        yield ids[i + 1 : i + 1 + size], "The window begins at id i; it must begin at i * block_size."
        yield window.roll(-1), "The last target is the first input: take the id that follows in the text."
        yield window + 1, "1 is added to the ids; it is their place that shifts by one."
        yield (
            ids[start + 1 : start + 1 + size].tolist(),
            "A list came back: a slice of the tensor is a tensor.",
        )

    judge(lambda ids, size, i: m.TextDataset(ids, size).targets(i), cases, slips)


# ------------------------------------- training and evaluation ------------------------------------


class Table(nn.Module):
    """A bigram table: small enough that its loss and its gradient can be written down."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.modes, self.grads = set(), set()  # what it met: training or not, gradients or not

    def forward(self, idx):
        """Token ids (B, T) to logits (B, T, V)."""
        self.modes.add(self.training)
        self.grads.add(torch.is_grad_enabled())
        return self.weight[idx]


def bigram_loss(weight, x, y):
    """Mean cross-entropy of the table, in closed form; a float."""
    logits = weight[x]
    return (logits.logsumexp(-1) - logits.gather(-1, y[..., None])[..., 0]).mean().item()


def bigram_gradient(weight, x, y):
    """The gradient of bigram_loss, in closed form: softmax minus one-hot, gathered by row."""
    change = (weight[x].softmax(-1) - F.one_hot(y, weight.shape[1])).flatten(0, 1) / y.numel()
    return torch.zeros_like(weight).index_add(0, x.flatten(), change)


@check(
    28,
    "train_step",
    "The order is: clear gradients, forward, loss, backward, step; then the loss as a float.",
    "optimizer.zero_grad(); F.cross_entropy wants logits (N, V) and targets (N,), so flatten(0, 1) and "
    "flatten(); loss.backward(), optimizer.step(), loss.item().",
)
def todo_28(m):
    V, rate = 6, 0.5
    start, stale = torch.randn(V, V), torch.randn(V, V)
    batches = [(torch.randint(V, (3, 4)), torch.randint(V, (3, 4))) for _ in range(2)]
    table = Table(start)
    table.weight.grad = stale.clone()  # left over from an earlier step
    optimizer = torch.optim.SGD(table.parameters(), lr=rate)
    for number, (x, y) in zip(("first", "second"), batches, strict=True):
        before = table.weight.detach().clone()
        left = torch.zeros(V, V) if table.weight.grad is None else table.weight.grad.clone()
        loss = m.train_step(table, optimizer, x, y)
        check_step(f"a bigram table and SGD, {number} step: the new weights", before, left, table, x, y, rate)
        checked = f"a bigram table and SGD, {number} step: the loss returned"
        judge(lambda loss=loss: loss, [(checked, (), bigram_loss(before, x, y))])
    uniform = Table(torch.zeros(65, 65))
    optimizer = torch.optim.SGD(uniform.parameters(), lr=rate)
    x, y = torch.randint(65, (2, 8)), torch.randint(65, (2, 8))
    judge(lambda: m.train_step(uniform, optimizer, x, y), [("65 equal logits", (), math.log(65))])


def wrong_gradients(weight, left, x, y):
    """Pairs: what a known mistake takes for the gradient, and the hint for it. `left` is from earlier."""
    (B, T), V = x.shape, weight.shape[1]
    right = bigram_gradient(weight, x, y)

    def of(loss):
        table = Table(weight)
        loss(table(x)).backward()
        return table.weight.grad

    old = "The gradients are not cleared before backward(): those of earlier steps are still in them."
    yield left + right, old
    yield left, "The step takes the gradients of the step before: backward() comes before optimizer.step()."
    summed = of(lambda logits: F.cross_entropy(logits.mT, y, reduction="sum"))
    yield summed, "The losses are added up; their mean over all B * T positions is wanted."
    yield -right, "The step goes up the gradient: the loss must have its plus sign."
    yield bigram_gradient(weight, x, x), "The model learns to copy its inputs: the targets are y."
    twice = of(lambda logits: F.cross_entropy(logits.softmax(-1).mT, y))
    yield twice, "There is a softmax too many: F.cross_entropy takes the logits themselves."
    mixed = of(lambda logits: F.cross_entropy(logits.reshape(B, V, T), y))
    yield mixed, "A view to (B, V, T) mixes positions with logits: use flatten(0, 1) or a transpose."
    last = of(lambda logits: F.cross_entropy(logits[:, -1], y[:, -1]))
    yield last, "Only the last position is learned from; all B * T positions count."


def check_step(checked, before, left, table, x, y, rate):
    """Raise Wrong unless `table` went from weights `before` one SGD step down the gradient."""

    def slips():
        unchanged = "The weights did not change: optimizer.step() is missing."
        if table.weight.grad is None or not table.weight.grad.any():
            unchanged = "Nothing changed: backward() is missing, or gradients are cleared before step()."
        yield before, unchanged
        for gradient, hint in wrong_gradients(before, left, x, y):
            yield before - rate * gradient, hint

    truth = before - rate * bigram_gradient(before, x, y)
    judge(table.weight.detach, [(checked, (), truth)], slips)


@check(
    29,
    "evaluate",
    "eval mode, no gradients, the sum of the losses of all tokens divided by their number, train mode again.",
    'F.cross_entropy(..., reduction="sum") is the sum over a batch, y.numel() its number of tokens; add both '
    "up over the loader. `with torch.inference_mode():` around the loop switches gradients off.",
)
def todo_29(m):
    # Row 0 gives target 0 the loss 1, row 1 the loss 2.
    hand = torch.tensor([[-loss, math.log(1 - math.exp(-loss))] for loss in (1.0, 2.0)])
    by_hand = [
        (torch.zeros(1, 3).long(), torch.zeros(1, 3).long()),
        (torch.ones(1, 1).long(), torch.zeros(1, 1).long()),
    ]
    weight = torch.randn(7, 7)
    batches = [(torch.randint(7, (B, 5)), torch.randint(7, (B, 5))) for B in (3, 3, 1)]
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    cases = [
        ("the example of the text: tokens of loss 1, 1, 1 and 2", (Table(hand), by_hand), 1.25),
        ("a bigram table, batches of 3, 3 and 1 lines", (Table(weight), batches), bigram_loss(weight, x, y)),
    ]

    def call(table, loader):
        before = table.weight.detach().clone()
        loss = m.evaluate(table, loader)
        checked = "a bigram table and what happens to it"
        if True in table.modes:
            hint = "The model is left in train mode at evaluation, with dropout on: model.eval() first."
            raise Wrong(checked, "model.training False while it is evaluated", "True", hint)
        if not table.training:
            hint = "The model stays in eval mode; training would go on without dropout: model.train() last."
            raise Wrong(checked, "model.training True afterwards", "False", hint)
        if not agrees(table.weight.detach(), before):
            hint = "The model learns while it is evaluated: no backward() and no step() here."
            raise Wrong(checked, "unchanged weights", "other weights", hint)
        if True in table.grads:
            hint = "Gradients are tracked, which costs time and memory: with torch.inference_mode(): ..."
            raise Wrong(checked, "gradients switched off", "gradients tracked", hint)
        return loss

    def slips(table, loader):
        losses = [bigram_loss(table.weight, x, y) for x, y in loader]
        sums = [loss * y.numel() for loss, (_, y) in zip(losses, loader, strict=True)]
        means = "That is the mean of the batch means: a token of the small last batch counts too much."
        yield sum(losses) / len(losses), means
        yield losses[-1], "That is the loss of the last batch alone."
        yield losses[0], "That is the loss of the first batch alone: is the return inside the loop?"
        yield sum(losses), "The batch means are added up, not averaged."
        yield sum(sums), "The losses are added up, not divided by the number of tokens."
        yield (
            sum(sums) / len(loader),
            "The sum is divided by the number of batches; divide by that of tokens.",
        )
        lines = sum(len(y) for _, y in loader)
        yield (
            sum(sums) / lines,
            "The sum is divided by the number of lines; divide by that of tokens, y.numel().",
        )

    judge(call, cases, slips)


def train_reference(
    table,
    train_loader,
    val_loader,
    epochs,
    rate,
    make=torch.optim.AdamW,
    again=False,
    early=False,
    batches=None,
):
    """The losses that `train` returns for a Table; the last four arguments make known mistakes."""
    weight = table.weight.detach().clone().requires_grad_()
    optimizer, losses = make([weight], lr=rate), [loss_over(weight, val_loader)]
    for _ in range(epochs):
        optimizer = make([weight], lr=rate) if again else optimizer
        for x, y in train_loader[:batches]:
            weight.grad = bigram_gradient(weight.detach(), x, y)
            optimizer.step()
        losses.append(loss_over(weight, val_loader))
    return losses[:-1] if early else losses[1:]


def loss_over(weight, loader):
    """Mean cross-entropy of the table over all batches of a loader; a float."""
    x, y = (torch.cat(part) for part in zip(*loader, strict=True))
    return bigram_loss(weight.detach(), x, y)


@check(
    30,
    "train",
    "One optimizer for all epochs; in each epoch every batch once, then one number for the list.",
    "torch.optim.AdamW(model.parameters(), lr=learning_rate) before the loop; for _ in range(epochs): "
    "for x, y in train_loader: train_step(...); then history.append(evaluate(model, val_loader)).",
)
def todo_30(m):
    V, epochs, rate = 6, random.randint(3, 4), 0.3
    table = Table(torch.randn(V, V))
    batches = [(torch.randint(V, (3, 5)), torch.randint(V, (3, 5))) for _ in range(6)]
    args = (table, batches[:4], batches[4:], epochs, rate)
    checked = f"a bigram table, 4 batches, {epochs} epochs, learning_rate {rate}"

    def call(table, *rest):
        return m.train(copy.deepcopy(table), *rest)

    def slips(*args):
        table, train_loader, val_loader, epochs, rate = args
        right = train_reference(*args)
        again = "The optimizer is made anew in each epoch and forgets its running averages: make it once."
        yield train_reference(*args, again=True), again
        yield train_reference(*args, make=torch.optim.SGD), "That is SGD; the text asks for AdamW."
        yield train_reference(*args, make=torch.optim.Adam), "That is Adam; the text asks for AdamW."
        slow = train_reference(table, train_loader, val_loader, epochs, 0.001)
        yield slow, "The learning rate is not used: lr=learning_rate."
        own = train_reference(table, train_loader, train_loader, epochs, rate)
        yield own, "Those are losses on train_loader; val_loader is asked for."
        yield train_reference(*args, early=True), "The loss is taken before the epoch; evaluate after it."
        yield right[:1], "Only one epoch was trained: is the return inside the loop?"
        yield right[-1:], "Only the last loss came back; one for each epoch is wanted."
        yield right[-1], "One number came back; a list with one for each epoch is wanted."
        one = "Only one batch in each epoch is learned from; take all of train_loader."
        yield train_reference(*args, batches=1), one
        yield train_reference(*args, batches=0), "The loss stays as it was: no step is taken."

    judge(call, [(checked, args, train_reference(*args))], slips)


# -------------------------------------------- sampling --------------------------------------------


class NextLetter(nn.Module):
    """At every position it wants the id there plus one."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.modes = vocab_size, set()

    def forward(self, idx):
        """Token ids (B, T) to logits (B, T, V)."""
        self.modes.add(self.training)
        return 100.0 * F.one_hot((idx + 1) % self.vocab_size, self.vocab_size)


@check(
    31,
    "generate_text",
    "Encode the prompt, make a tensor (1, T) of it, generate, take the one line of the result, decode.",
    "torch.tensor([tokenizer.encode(prompt)]) has the batch axis. generate(...)[0].tolist() is the list that "
    "decode takes.",
)
def todo_31(m):
    tokenizer = m.CharTokenizer(string.ascii_lowercase)
    first, n = random.randint(1, 9), random.randint(4, 7)
    prompt, whole = string.ascii_lowercase[first : first + 8], string.ascii_lowercase[first : first + 8 + n]
    model = NextLetter(26)
    cases = [
        ('a model that wants the next letter, prompt "abc", 3 more', ("abc", 3, 8), "abcdef"),
        (f'a model that wants the next letter, prompt "{prompt}", {n} more', (prompt, n, 5), whole),
    ]

    def slips(prompt, n, block_size):
        start = string.ascii_lowercase.index(prompt[0])
        ids = list(range(start, start + len(prompt) + n))
        text = "".join(string.ascii_lowercase[i] for i in ids)
        yield text[-n:], "Only the continuation came back: the prompt belongs to the result."
        yield prompt + text, "The prompt stands there twice: generate returns it with the new ids."
        yield ids, "Those are ids: tokenizer.decode makes text of them."
        yield [ids], "Those are ids: tokenizer.decode makes text of them."
        yield torch.tensor([ids]), "Those are ids: tokenizer.decode makes text of them."
        yield prompt, "Nothing was added to the prompt."
        yield [text], "A list came back; the string in it is wanted."
        yield text[: len(prompt) + 1], "Only one character was added; max_new_tokens are wanted."

    judge(lambda *args: m.generate_text(model, tokenizer, *args), cases, slips)
    if True in model.modes:
        hint = "The model is left in train mode, so dropout would disturb the text: model.eval() first."
        raise Wrong("the model while it generates", "model.training False", "True", hint)
