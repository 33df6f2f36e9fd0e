"""Run the checks in order and say what to do next. No error of the learner may look like one of ours."""

import _thread
import argparse
import contextlib
import importlib
import io
import pdb
import re
import shutil
import signal
import sys
import textwrap
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from . import model_checks, train_checks  # noqa: F401  they fill CHECKS
from .compare import CHECKS, Wrong

LAST = {"model": 24, "train": 31}  # the last TODO of each file; train.py builds on model.py
LATER, NEEDED_BY = (8, 9), 18  # passed over while 8 is not written, as far as the first TODO that needs them
TIME_LIMIT = 10.0  # seconds for one check; the slowest takes about 0.1

ERROR_HINTS = [  # (pattern in the error, what it usually means)
    (r"before Module.__init__\(\) call", "super().__init__() must be the first line of __init__."),
    (
        r"object has no attribute '_(modules|parameters|buffers)'",
        "super().__init__() is missing in __init__.",
    ),
    (
        r"shapes cannot be multiplied|batch2 tensor to be|Expected batch2",
        "In a @ b the last axis of a must be as long as the last but one of b.",
    ),
    (
        r"size of tensor a .* must match",
        "Shapes do not fit: does a sum or max lack keepdim=True, is a slice too long?",
    ),
    (
        r"view size is not compatible",
        "After a transpose the numbers lie in another order: reshape or flatten, not view.",
    ),
    (r"is invalid for input of size", "The numbers of a new shape must multiply to the number of elements."),
    (
        r"probability tensor contains",
        "torch.multinomial takes probabilities, not logits: softmax comes first.",
    ),
    (r"multi-target|Expected target size", "F.cross_entropy wants logits (N, V) and targets (N,)."),
    (r"batch_size .* to match target batch_size", "F.cross_entropy wants logits (N, V) and targets (N,)."),
    (
        r"can't convert .* to scalar|only one element tensors",
        ".item() works on a tensor with one element only.",
    ),
    (
        r"too many indices|Dimension out of range|not enough values to unpack",
        "A tensor has fewer axes than you think.",
    ),
    (
        r"Expected tensor for argument .*indices|must be tensors of type Long",
        "An embedding wants integer ids.",
    ),
    (r"index out of range", "An id or place is too large: both count from 0."),
    (r"return_types\.", "max and min with dim give values and places: take .values."),
    (r"Boolean value of Tensor .* ambiguous", "if takes one truth value, not many: `if mask is not None`."),
    (r"object is not subscriptable", "A layer is called, layer(x); only lists and tensors take [ ]."),
    (r"is not callable", "Something is called that is no function or layer: are arguments exchanged?"),
    (r"name '.*' is not defined", "Is a name misspelt, or does it lack self. or nn. in front?"),
    (
        r"expected scalar type|same dtype|must have the same dtype",
        "Two tensors hold numbers of different types.",
    ),
    (r"NoneType", "Something is None: a function without return?"),
    (r"does not require grad", "The loss is cut off from the weights, by .item(), .detach() or no_grad()?"),
    (
        r"positional argument|unexpected keyword",
        "Keep the names and arguments of functions as they stand in the file.",
    ),
    (r"RecursionError", "A function calls itself without end."),
    (r"has no attribute", "Is the name spelled as where it was made?"),
]


@dataclass
class Result:
    """What came of one check: right, wrong, open (not written yet) or waits (for another TODO)."""

    state: str
    message: str = ""  # the whole story, for the learner who stopped here
    brief: str = ""  # one line of it, for --all


# ------------------------------------------- one check --------------------------------------------


class TimeLimit:
    """Stop the code under `with` by KeyboardInterrupt after so many seconds, unless it is being debugged."""

    def __init__(self, seconds):
        self.timer, self.over = threading.Timer(seconds, self.stop), False

    def stop(self):
        self.over = True
        _thread.interrupt_main()

    def debug(self):
        """breakpoint() in the learner's code: no limit from here on, and output to the terminal."""
        self.timer.cancel()
        sys.stdout = self.stdout
        pdb.Pdb().set_trace(sys._getframe().f_back)

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
        self.stdout, self.hook = sys.stdout, sys.breakpointhook
        sys.breakpointhook = self.debug
        self.timer.start()
        return self

    def __exit__(self, *_):
        self.timer.cancel()
        self.timer.join()
        sys.breakpointhook = self.hook
        signal.signal(signal.SIGINT, self.before)


def attempt(number, module, limit=None):
    """Run one check on the learner's module; return its Result. Raises nothing but KeyboardInterrupt."""
    check, printed = CHECKS[number], io.StringIO()
    clock = TimeLimit(limit or TIME_LIMIT)
    torch.seed()  # other random inputs in every run
    try:
        with clock, contextlib.redirect_stdout(printed), torch.enable_grad():
            check.run(module)
        return Result("right")
    except Wrong as wrong:
        lines = [("checked", wrong.checked), ("expected", wrong.expected), ("came", wrong.came)]
        hint = wrong.hint or check.hint
    except KeyboardInterrupt as stop:
        if not clock.over:
            raise
        lines = where(stop, module)
        lines.append(("came", f"nothing: after {clock.timer.interval:.0f} s it was still running"))
        hint = "Does the loop ever end? Does what its condition looks at change?"
    except NotImplementedError as error:
        todo = re.fullmatch(r"TODO (\d+)", str(error))
        if todo and int(todo[1]) == number:
            return Result("open", brief="not written yet")
        if todo:
            return Result("waits", brief=f"for TODO {todo[1]}")
        lines, hint = story(error, module, check)
    except (Exception, SystemExit) as error:
        lines, hint = story(error, module, check)
    lines.append(("hint", hint))
    if printed.getvalue():
        lines.append(("printed", "\n".join(printed.getvalue().splitlines()[-20:])))
    return Result("wrong", "\n".join(labelled(*line) for line in lines), hint)


def where(error, module):
    """What was checked, and the lines of the learner's files that the error went through, at most 3."""
    files = {module.__file__} | {sys.modules[name].__file__ for name in LAST if name in sys.modules}
    files = {short(file) for file in files}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if short(frame.filename) in files]
    places = {f"{short(frame.filename)}, line {frame.lineno}": frame for frame in frames}  # each line once
    lines = [("at", f"{place}, in {frame.name}:\n    {frame.line}") for place, frame in places.items()]
    checked = getattr(error, "checked", None)
    return [("checked", checked), *lines[-3:]] if checked else lines[-3:]


def story(error, module, check):
    """Lines and hint for an error that is not one of our own."""
    text = f"{type(error).__name__}: {error}".strip().removesuffix(":")
    lines = [*where(error, module), ("error", textwrap.shorten(text, 400))]
    if isinstance(error, SystemExit):
        return lines, "The code ends the program: no exit() here; return the result."
    if isinstance(error, AttributeError) and error.obj is module:
        return (
            lines,
            f"{error.name} is gone from {short(module.__file__)}: keep the names as they stand there.",
        )
    usual = [hint for pattern, hint in ERROR_HINTS if re.search(pattern, text)]
    return lines, " ".join([*usual[:1], check.hint])


# ------------------------------------------- reporting --------------------------------------------


def labelled(label, text):
    """`text` behind its label, each line of it wrapped to the width of the terminal."""
    width = min(110, shutil.get_terminal_size((100, 24)).columns)
    lines = []
    for line in str(text).splitlines() or [""]:
        indent = " " * (12 + len(line) - len(line.lstrip()))
        wrapped = textwrap.wrap(line.strip(), width, initial_indent=indent, subsequent_indent=indent)
        lines += wrapped or [""]
    return f"  {label:<10}{lines[0][12:]}" + "".join(f"\n{line}" for line in lines[1:])


def short(path):
    """A path as the learner would type it from here."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def line_of(number, module):
    """Where the function of that TODO stands: "exercises/model.py, line 27", or only the file."""
    place = module
    for name in CHECKS[number].name.split("."):
        place = getattr(place, name, None)
    code = getattr(getattr(place, "__wrapped__", place), "__code__", None)
    return short(module.__file__) + (f", line {code.co_firstlineno}" if code else "")


def bar(done):
    """Progress in all TODOs of both files."""
    return f"[{'#' * done}{'.' * (len(CHECKS) - done)}] {done}/{len(CHECKS)}"


def parse_flags():
    """Return the flags of the command line; exits with one sentence where they make no sense."""
    what = "Check the TODOs of this file in order and stop at the first that is not right."
    parser = argparse.ArgumentParser(description=what, allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"error: {message}; --help lists every flag")
    parser.add_argument("--all", action="store_true", help="check every TODO of this file")
    parser.add_argument("--hint", type=int, metavar="N", help="print a second, stronger hint for TODO N")
    flags = parser.parse_args()
    if flags.hint is not None and flags.hint not in CHECKS:
        sys.exit(f"error: there is no TODO {flags.hint}, they are numbered 1 to {len(CHECKS)}")
    if flags.hint and flags.all:
        sys.exit("error: --all and --hint do not go together")
    return flags


def main(name):
    """Check the file that was started, "model" or "train"; return only when all of its TODOs are right."""
    flags, modules = parse_flags(), {name: sys.modules["__main__"]}
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # for a console that cannot show all of the learner's text
    if flags.hint:
        print(textwrap.fill(f"TODO {flags.hint}, {CHECKS[flags.hint].name}: {CHECKS[flags.hint].more}", 100))
        sys.exit()
    if name == "train":
        modules["model"] = importlib.import_module("model")
    try:
        complete = report(name, modules, flags.all)
    except KeyboardInterrupt:
        sys.exit("stopped")
    if flags.all or not complete:
        sys.exit(0 if complete else 1)


def report(name, modules, check_all=False):
    """Run the checks of a file and print what they say; return whether all of its TODOs are right."""
    done = 0  # how many are right
    first = later = None  # number and Result: of the TODO that comes next, of the one that is passed over
    for number in range(1, LAST[name] + 1):
        if number == NEEDED_BY and first is None:
            first = later
        if first and not check_all:
            break
        home = "model" if number <= LAST["model"] else "train"
        result = attempt(number, modules[home])
        done += result.state == "right"
        if check_all and home == name:
            line = f"TODO {number:>2}  {result.state:<5}  {CHECKS[number].name:<28}  {result.brief}"
            print(line.rstrip())
        if result.state == "right" or first:
            continue
        if number == LATER[0] and result.state == "open":
            later = number, result
        elif not (later and number in LATER):
            first = number, result
    print(bar(done))
    print()
    if later:
        sines = f"TODO {LATER[0]} and {LATER[1]}, sinusoidal positions"
        if first is later:
            print(f"TODO {NEEDED_BY}, the complete model, needs {sines}. Week 5 explains them.\n")
        else:
            print(f"{sines}, belong to week 5: passed over until TODO {NEEDED_BY} needs them.\n")
    print(advice(name, modules, first, check_all))
    return first is None


def advice(name, modules, first, check_all):
    """What to do next, in words. `first` is the number and Result of the TODO that comes next, if any."""
    command = f"python {sys.argv[0]}"
    if first is None and name == "model":
        return f"model.py is complete. Next: python {Path(sys.argv[0]).with_name('train.py')}"
    if first is None:
        return "All TODOs are right." + ("" if check_all else " Now the model is trained.")
    number, result = first
    if name == "train" and number <= LAST["model"]:
        model = Path(sys.argv[0]).with_name("model.py")
        return f"train.py builds on model.py, and there TODO {number} is not done yet: python {model}"
    if check_all:
        return f"{command} tells all about TODO {number}, which comes next."
    title = f"TODO {number}, {CHECKS[number].name}, {line_of(number, modules[name])}"
    stuck = f"Stuck? {command} --hint {number}"
    if result.state == "wrong":
        return f"{title}: not right yet\n\n{result.message}\n\n{stuck}"
    raised = f'raise NotImplementedError("TODO {number}")'
    return (
        f"{title}: comes next\n\nRead its text, put your code in place of {raised}, run this again.\n{stuck}"
    )
