"""What the checks are made of: compare what came with the truth, and name the slip that explains it."""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn as nn

CHECKS = {}  # number of the TODO -> Check


@dataclass
class Check:
    """One TODO: where it stands, its check, the hint for a mistake of no known kind, and a stronger one."""

    number: int
    name: str  # of the function or method, as in "MLP.forward"
    hint: str
    more: str
    run: callable


def check(number, name, hint, more):
    """Register the function below as the check of that TODO; it takes the learner's module."""

    def register(run):
        CHECKS[number] = Check(number, name, hint, more, run)
        return run

    return register


class Wrong(Exception):
    """A TODO that does not do what its text says. Without a hint the one of its Check is shown."""

    def __init__(self, checked, expected, came, hint=None):
        super().__init__(checked)
        self.checked, self.expected, self.came, self.hint = checked, expected, came, hint


# -------------------------------------------- showing ---------------------------------------------


def numbers(values):
    """Nested lists of numbers as text, floats with four digits."""
    if isinstance(values, list):
        return "[" + ", ".join(numbers(value) for value in values) + "]"
    return f"{values:.4f}".replace("-0.0000", "0.0000") if isinstance(values, float) else repr(values)


def kind(value):
    """Name a value in few words: a tensor by shape and dtype, anything else by its type."""
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def show(value):
    """A small tensor, number, list or text as it would be written; anything longer is cut."""
    if isinstance(value, torch.Tensor):
        if value.numel() > 24:
            return kind(value)
        value = value.tolist()
    if isinstance(value, (float, list)):
        value = numbers(value)
        return value if len(value) < 200 else value[:200] + " ..."
    value = repr(value)
    return value if len(value) < 200 else value[:200] + " ..."


# ------------------------------------------- comparing --------------------------------------------


def agrees(value, truth):
    """Whether two values are equal in type, shape and dtype, and within rounding where they are floats."""
    if isinstance(truth, torch.Tensor):
        if not isinstance(value, torch.Tensor) or value.shape != truth.shape or value.dtype != truth.dtype:
            return False
        return torch.allclose(value, truth, rtol=1e-4, atol=1e-5, equal_nan=True)
    if isinstance(truth, float):
        return isinstance(value, float) and abs(value - truth) < 1e-4 * max(1.0, abs(truth))
    if isinstance(truth, list):
        same_length = isinstance(value, list) and len(value) == len(truth)
        return same_length and all(agrees(a, b) for a, b in zip(value, truth, strict=True))
    return type(value) is type(truth) and value == truth


def difference(value, truth):
    """Return (expected, came, hint) for a value that does not agree with the truth; the hint may be None."""
    if value is None:
        return show(truth), "None", "None comes back where a function ends without return."
    if isinstance(truth, torch.Tensor):
        if not isinstance(value, torch.Tensor):
            return kind(truth), f"{kind(value)}: {show(value)}", "The result must be a tensor."
        if value.shape != truth.shape:
            hint = "The shape is another one. Print .shape after each of your lines."
            return kind(truth), kind(value), hint
        if value.dtype != truth.dtype:
            hint = f"The numbers are of another type: {value.dtype} in place of {truth.dtype}."
            return kind(truth), kind(value), hint
        hint = None
        if value.is_floating_point() and value.isnan().any() and not truth.isnan().any():
            hint = "nan comes from 0 / 0, from inf - inf, or from a softmax over nothing but minus infinity."
        if value.numel() <= 24:
            return show(truth), show(value), hint
        wrong = value != truth
        if truth.is_floating_point():
            wrong = ~torch.isclose(value, truth, rtol=1e-4, atol=1e-5)
        *row, column = wrong.nonzero()[0].tolist()
        start = max(0, min(column, truth.shape[-1] - 5))
        place = ", ".join([*map(str, row), f"{start}:{min(start + 5, truth.shape[-1])}"])
        there = (*row, slice(start, start + 5))
        came = f"there {show(value[there])}; {wrong.sum().item()} of {wrong.numel()} numbers differ"
        return f"shape {tuple(truth.shape)}, at [{place}] {show(truth[there])}", came, hint
    if type(value) is not type(truth):
        hint = f"The result must be {kind(truth)}, not {kind(value)}."
        if isinstance(value, torch.Tensor):
            hint += " .item() makes a plain number of a tensor with one element, .tolist() a list."
        return f"{kind(truth)}: {show(truth)}", f"{kind(value)}: {show(value)}", hint
    if isinstance(truth, list) and len(value) == len(truth):
        for a, b in zip(value, truth, strict=True):
            if type(a) is not type(b):
                return show(truth), show(value), f"The list holds {kind(a)} where {kind(b)} belongs."
    return show(truth), show(value), None


def judge(call, cases, slips=lambda *args: ()):
    """Raise Wrong unless call(*args) agrees with the truth in every case (checked, args, truth).

    slips(*args) yields pairs: the result of a known mistake, and the hint for it. The first mistake that
    gives what came, in every case, lends its hint.
    """
    answers, first = [], None  # first: the first case that went wrong
    for checked, args, truth in cases:
        before = [arg.clone() if isinstance(arg, torch.Tensor) else None for arg in args]
        try:
            value = call(*args)
        except BaseException as error:
            if first and isinstance(error, Exception):
                break  # there is something to show already
            if not isinstance(error, Wrong):
                error.checked = checked
            raise
        for arg, copy in zip(args, before, strict=True):
            if copy is not None and not agrees(arg, copy):
                hint = "x += y changes x in place, and whoever gave it has lost it; x = x + y makes a new x."
                raise Wrong(checked, "inputs that stay as they are", "a changed input", hint)
        answers.append((args, value))
        if first is None and not agrees(value, truth):
            first = (checked, *difference(value, truth))
    if first is None:
        return
    checked, expected, came, hint = first
    with contextlib.suppress(Exception):  # modules from earlier TODOs may be wrong too, under --all
        for mistakes in zip(*(slips(*args) for args, _ in answers), strict=True):
            pairs = zip(answers, mistakes, strict=True)
            if all(agrees(value, mistake) for (_, value), (mistake, _) in pairs):
                hint = mistakes[0][1]
                break
    raise Wrong(checked, expected, came, hint)


# -------------------------------------------- modules ---------------------------------------------


def has_layers(checked, module, parameters, **layers):
    """Raise Wrong unless `module` has the layers, made like those given, and so many parameters in all."""
    for name, truth in layers.items():
        value = getattr(module, name, None)
        expected, came = f"self.{name} = {brief(truth)}", f"self.{name} = {brief(value)}"
        if value is None:
            hint = "Names are as in the text, with self. in front: a plain variable is gone after __init__."
            raise Wrong(checked, expected, f"no self.{name}", hint)
        if not isinstance(value, nn.Module):
            hint = f"self.{name} must be a layer, of the type {type(truth).__name__}."
            if isinstance(value, (list, tuple)):
                hint += " Layers in a Python list are hidden from parameters(): they would never learn."
            raise Wrong(checked, expected, came, hint)
        if repr(value) != repr(truth):
            hint = layer_slip(name, value, truth)
            if expected == came:  # what differs lies deeper
                lines = zip(repr(truth).splitlines(), repr(value).splitlines(), strict=False)
                wanted, found = next((a.strip(), b.strip()) for a, b in lines if a != b)
                expected, came = f"self.{name} with {wanted}", f"self.{name} with {found}"
            raise Wrong(checked, expected, came, hint)
    count = sum(p.numel() for p in module.parameters())
    if count != parameters:
        hint = "There are too many: a layer more than the text asks for?"
        if count < parameters:
            hint = "There are too few: is one layer used twice under two names, where each needs its own?"
        raise Wrong(checked, f"{parameters} parameters", f"{count} parameters", hint)


def brief(layer):
    """A layer as PyTorch writes it, if that is one line; else its type."""
    text = repr(layer)
    return f"{type(layer).__name__}(...)" if "\n" in text else text


def layer_slip(name, value, truth):
    """The hint for a layer that is there but made in another way."""
    if type(value) is not type(truth):
        return f"self.{name} is of another type: {type(value).__name__} in place of {type(truth).__name__}."
    a, b = getattr(value, "weight", None), getattr(truth, "weight", None)
    if a is not None and b is not None and a.shape != b.shape:
        if a.shape == b.shape[::-1]:
            return f"The two sizes of self.{name} are swapped: first what goes in, then what comes out."
        return f"self.{name} has another size: compare its numbers with those of the text."
    if getattr(value, "bias", None) is not None and getattr(truth, "bias", None) is None:
        return f"self.{name} has a bias; it must be without."
    if getattr(value, "bias", None) is None and getattr(truth, "bias", None) is not None:
        return f"self.{name} has no bias; it must have one."
    if isinstance(value, nn.Dropout):
        return f"self.{name} must use the argument dropout: nn.Dropout() alone means 0.5."
    return f"self.{name} is made with other settings: the right arguments, in the right order?"


def learns(checked, out, module):
    """Raise Wrong unless a gradient reaches every parameter of `module` from `out`."""
    hint = "The result is cut off from the weights: .detach(), .data, .item(), no_grad() or a new tensor?"
    if not out.requires_grad:
        raise Wrong(checked, "a result that gradients can flow back from", "one without gradients", hint)
    out.sum().backward()
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            raise Wrong(checked, f"a gradient for {name}", "none: it plays no part in the result", hint)


def shake(module):
    """Give all parameters fresh random values, so that no two are alike; return the module."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.6)
    return module


def fill(module, **values):
    """Set parameters, named with _ for the dot, to a number or nested lists; return the module."""
    with torch.no_grad():
        for name, value in values.items():
            parameter = module.get_parameter(name.replace("__", "."))
            parameter.copy_(torch.as_tensor(value, dtype=torch.float32).expand_as(parameter))
    return module
