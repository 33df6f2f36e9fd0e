"""Build the site: the ladder to read in a browser, each step a diff beside its log.

    python tools/build_site.py                 writes site/; open site/index.html, no server is needed
    python tools/build_site.py --out FOLDER    writes another folder, new or made by this tool

Needs git and `pip install -r requirements-site.txt`. All is made from what the repository holds: the
scripts, README.md, SUMMARY.md, logs/*.md with their pictures, logs/results.json. A new rung or log appears by
itself.

What makes what, and why:

- Pages come from Jinja2 templates (tools/site/*.html), text from markdown-it-py, which follows CommonMark and
  GitHub's tables, formulas in $...$ from latex2mathml: browsers draw MathML without any script.
- Colours come from Pygments, as classes, so that one page serves light and dark.
- Diffs are git's own, those that README's commands show. diff2html would need Node or draw them in the
  browser, once for each layout; difflib.HtmlDiff knows no layout but its own. Here a diff is plain HTML, each
  line has an address, and the style sheet alone lays it out in two columns or in one. RapidFuzz says which of
  the changed lines belong together, difflib which of their words differ.
- All pairs of rungs are written, each as a page: comparing needs no script either.
- The search looks for the words as they are typed, in some hundred kilobytes of text. Stemming, as lunr does
  it, would lose names such as `masked_fill`, and Pagefind cannot be opened from files.

It imports no torch, so that publishing takes seconds.
"""

import argparse
import ast
import html
import itertools
import json
import math
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache, cached_property
from io import StringIO
from pathlib import Path
from urllib.parse import unquote

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure
from mdit_py_plugins.anchors import anchors_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments.lexers import PythonLexer
from pygments.token import Token
from rapidfuzz import fuzz, process

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).resolve().parent / "site"
GENERATOR = "tools/build_site.py"  # stands in each page: a folder without it is not ours to replace
CONTEXT = 3  # unchanged lines that stay visible around a change
LONG = 40  # a line of more characters may wrap on a phone: it is told where to go on


def number(name):
    """The number in the name of a rung or a log: 10 for v10_moe, 5 for week_5_positions."""
    return int(re.search(r"\d+", name)[0])


# ---------------------------------------------- sources ----------------------------------------------

CLASSES = {
    Token.Keyword: "k",
    Token.Operator.Word: "k",
    Token.Literal.String: "s",
    Token.Literal.String.Interpol: "",
    Token.Literal.Number: "m",
    Token.Comment: "c",
    Token.Name.Function: "f",
    Token.Name.Class: "f",
    Token.Name.Decorator: "d",
    Token.Name.Builtin: "b",
}


@cache
def css_class(kind):
    """The class of the style sheet for a kind of token: its own or that of the nearest kind above it."""
    return next((CLASSES[k] for k in reversed(kind.split()) if k in CLASSES), "")


def coloured(runs):
    """HTML of (class, text) runs."""
    escaped = ((name, html.escape(text, quote=False)) for name, text in runs)
    return "".join(f'<span class="{name}">{text}</span>' if name else text for name, text in escaped)


def paint(text):
    """Python as lines of (class, text) runs."""
    lines = [[]]
    for kind, piece in PythonLexer(stripnl=False, ensurenl=False).get_tokens(text):
        for i, part in enumerate(piece.split("\n")):
            if i:
                lines.append([])
            if part:
                lines[-1].append((css_class(kind), part))
    return lines


class Source:
    """A Python file: its lines in colour, its rooms, and what is defined where."""

    def __init__(self, root, path):
        self.path = path  # as the repository names it, with slashes
        self.stem = Path(path).stem
        self.text = (root / path).read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        self.tree = ast.parse(self.text)
        self.docstring = ast.get_docstring(self.tree) or ""
        banner = re.compile(r"# -{8,} (.+?) -{8,}$")
        self.rooms = [(m[1], i) for i, line in enumerate(self.lines, 1) if (m := banner.match(line))]

    @cached_property
    def runs(self):
        """Each line as a list of (class, text)."""
        return paint(self.text)[: len(self.lines)]

    @cached_property
    def painted(self):
        """Each line as HTML."""
        lines = [coloured(runs) for runs in self.runs]
        for _, i in self.rooms:  # the style sheet shortens the dashes
            lines[i - 1] = re.sub("-{8,}", r'<span class="r">\g<0></span>', lines[i - 1])
        return lines

    def marked(self, i, spans):
        """Line i (from 0) as HTML, the columns of `spans` marked."""
        if not spans:
            return self.painted[i]
        inside = [False] * len(self.lines[i])
        for begin, end in spans:
            inside[begin:end] = [True] * (end - begin)
        classes = [name for name, text in self.runs[i] for _ in text]
        out = []
        for is_marked, group in itertools.groupby(
            zip(inside, classes, self.lines[i], strict=True), key=lambda x: x[0]
        ):
            groups = itertools.groupby(group, key=lambda x: x[1])
            text = coloured((name, "".join(x[2] for x in run)) for name, run in groups)
            out.append(f"<mark>{text}</mark>" if is_marked else text)
        return "".join(out)

    @cached_property
    def definitions(self):
        """{name: (first line, last line)} of constants, functions, classes and methods, from 1."""
        found = {}
        for node in self.tree.body:
            names = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                names = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            for name in names:  # a constant may be put together in several statements
                first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
                found[name] = (found.get(name, (first,))[0], node.end_lineno)
            if isinstance(node, ast.ClassDef):
                for part in node.body:
                    if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                        found[f"{node.name}.{part.name}"] = (part.lineno, part.end_lineno)
        return found

    def line_of(self, name):
        """The line of a definition's `def` or `class`, below its decorators."""
        first, last = self.definitions[name]
        own = re.compile(rf"\s*(async def|def|class) {re.escape(name.split('.')[-1])}\b")
        return next((i for i in range(first, last + 1) if own.match(self.lines[i - 1])), first)

    @cached_property
    def around(self):
        """For each line the name of the function or class that it stands in, '' outside."""
        names = [""] * (len(self.lines) + 1)
        for name, (first, last) in self.definitions.items():  # methods come after their classes
            names[first : last + 1] = [name] * (last + 1 - first)
        return names

    # What a docstring says: """v4, week 5: positions (Su et al. 2021). ...

    @cached_property
    def week(self):
        """The week that the first line names, None where it names none."""
        found = re.search(r"\bweek (\d+)\b", self.docstring.split("\n")[0])
        return int(found[1]) if found else None

    @cached_property
    def headline(self):
        """The first line without number and week: the idea in a sentence or two."""
        first = self.docstring.split("\n")[0]
        line = re.sub(r"^(v\d+|\S+\.py), week \d+: ", "", re.sub(r", week \d+:", ":", first, count=1))
        line = re.sub(r"^v\d+: |^\S+\.py: ", "", line)
        return line[:1].upper() + line[1:]

    @cached_property
    def idea(self):
        """What stands between colon and full stop or bracket, as in README's ladder."""
        found = re.match(r"\S+, week \d+: (.+?)[.(]", self.docstring.split("\n")[0])
        return found[1].strip() if found else self.headline.rstrip(".")

    @cached_property
    def more(self):
        """What the first line says beyond the idea and its source."""
        found = re.match(rf"{re.escape(self.idea)}(?: \([^)]*\))?\. +(.+)$", self.headline, flags=re.I)
        return found[1] if found else ""

    @cached_property
    def paragraph(self):
        """The docstring's second paragraph."""
        return self.docstring.split("\n\n")[1] if "\n\n" in self.docstring else ""

    @cached_property
    def result(self):
        """What the docstring's line `Result:` says."""
        found = re.search(r"^Result: (.+)$", self.docstring, flags=re.M)
        return found[1] if found else ""

    @cached_property
    def since(self):
        """(the rung below as the docstring names it, {"added": names, "changed": ..., "removed": ...})."""
        found = re.search(r"^Since (\w+)\.py\n(.*?)(?:\n\n|\Z)", self.docstring, flags=re.M | re.S)
        if not found:
            return None, {}
        blocks = re.split(r"^ +(added|changed|removed):", found[2], flags=re.M)[1:]
        kinds = dict(zip(blocks[::2], blocks[1::2], strict=True))
        return found[1], {
            k: [n for n in re.split(r"[,\s]+", v) if n not in ("", "-")] for k, v in kinds.items()
        }


# ----------------------------------------------- diffs -----------------------------------------------

WORDS = re.compile(r"\w+|\s+|[^\w\s]")


def git_diff(root, below, above):
    """What `git diff --no-index` says, as runs: a list of (' ', n, n), or ('-', removed, added) lines."""
    args = ["git", "diff", "--no-index", "--no-color", "--no-ext-diff", "--unified=1000000", below, above]
    said = subprocess.run(args, cwd=root, capture_output=True, encoding="utf-8")
    if said.returncode > 1:
        sys.exit(f"error: git cannot compare {below} and {above}: {said.stderr.strip()}")
    body = re.split(r"^@@.*@@.*\n", said.stdout, maxsplit=1, flags=re.M)[-1]
    signs = [line[0] for line in body.splitlines() if line[:1] in " -+"]
    runs = []
    for same, group in itertools.groupby(signs, key=lambda sign: sign == " "):
        count = Counter(group)
        runs.append((" ", count[" "], count[" "]) if same else ("-", count["-"], count["+"]))
    return runs


def pairs(old, new):
    """Which removed and added lines belong together: pairs of indices, in order, of lines that are alike."""
    if not old or not new:
        return []
    alike = process.cdist(
        [x.strip() for x in old], [x.strip() for x in new], scorer=fuzz.ratio, score_cutoff=55
    )
    alike *= np.array([len(x.strip()) > 3 for x in old])[:, None]  # a bracket is like any other
    best = np.zeros((len(old) + 1, len(new) + 1))  # the most likeness of the first i with the first j
    for i, row in enumerate(alike):
        taken = np.maximum(best[i, 1:], best[i, :-1] + row)
        best[i + 1, 1:] = np.maximum.accumulate(taken)
    found, i, j = [], len(old), len(new)
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            found.append((i, j))
    return found[::-1]


@cache
def changed_words(old, new):
    """The columns of two lines that differ, word by word: a list of (begin, end) for each."""
    a, b = WORDS.findall(old), WORDS.findall(new)
    ends = [list(itertools.accumulate(map(len, words), initial=0)) for words in (a, b)]
    spans = [], []
    for what, *edges in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for side, line, (first, last) in zip((0, 1), (old, new), (edges[:2], edges[2:]), strict=True):
            begin, end = ends[side][first], ends[side][last]
            if what == "equal" or begin == end:
                continue
            if spans[side] and not re.search(r"\w", line[spans[side][-1][1] : begin]):
                begin = spans[side].pop()[0]  # one mark, not two with a bracket or a space between
            spans[side].append((begin, end))
    return spans


def div(source, i, kind, key, spans=(), row=None, link=True):
    """A line (i from 0) as HTML: its number, which is a link to it, and its code."""
    line = source.lines[i]
    style = f"grid-row:{row};" if row else ""
    if len(line) > LONG:
        style += f"--i:{len(line) - len(line.lstrip())}ch"
    style = f' style="{style.rstrip(";")}"' if style else ""
    tag = {"old": "del", "new": "ins"}.get(kind, "code")
    code = f"<{tag}>{source.marked(i, spans)}</{tag}>"
    if not link:  # the left one of two equal lines
        return f'<div class="l {kind}"{style} aria-hidden="true"><b>{i + 1}</b>{code}</div>'
    name = f"{key}{i + 1}"
    number = f'<a href="#{name}" tabindex="-1">{i + 1}</a>'
    return f'<div class="l {kind}" id="{name}"{style}>{number}{code}</div>'


@dataclass
class Diff:
    """A diff of two sources as HTML, and where in it each name changes."""

    below: Source
    above: Source
    added: int = 0
    removed: int = 0
    html: Markup = ""
    changed: dict = field(default_factory=lambda: ({}, {}))  # {name: its first changed line}, below and above

    def address(self, name):
        """The anchor of the first line that changes in `name`, or of its definition."""
        old, new = self.changed
        if name in new and name in self.above.definitions:
            return f"b{new[name]}"
        if name in old:
            return f"a{old[name]}"
        if name in self.above.definitions:
            return f"b{self.above.line_of(name)}"
        return f"a{self.below.line_of(name)}" if name in self.below.definitions else None


def note_names(source, first, count, into):
    """Note the first changed line of each definition that lines first .. first + count - 1 stand in."""
    for name, (begin, end) in source.definitions.items():
        at = max(begin, first + 1)
        if at <= min(end, first + count):
            into[name] = min(at, into.get(name, at))


def split_docstring(runs, below, above):
    """The runs of a diff in two: those of the docstrings, and the rest, which may be all."""
    ends = [source.tree.body[0].end_lineno if source.docstring else 0 for source in (below, above)]
    a, b = 0, 0
    for i, (kind, n_old, n_new) in enumerate(runs):
        first = ends[0] - a
        if kind == " " and 0 <= first <= n_old and first == ends[1] - b:
            head, tail = [(" ", first, first)], [(" ", n_old - first, n_old - first)]
            return runs[:i] + head * (first > 0), tail * (n_old > first) + runs[i + 1 :]
        a, b = a + n_old, b + n_new
    return [], runs


def make_diff(root, below, above):
    """The Diff of two sources. What changes in the docstrings is folded: the page tells it in larger type."""
    diff = Diff(below, above)
    doc, rest = split_docstring(git_diff(root, below.path, above.path), below, above)
    a, b, told = write_runs(diff, doc, 0, 0, math.inf)
    *_, code = write_runs(diff, rest, a, b, CONTEXT)
    if told:
        told = f'<details class="doc"><summary>The docstrings</summary>\n{told}</details>\n'
    diff.html = Markup(told + code)
    return diff


def write_runs(diff, runs, a, b, context):
    """HTML of the runs of a diff that begin at lines a and b (from 0): (the next a, the next b, HTML)."""
    below, above, out = diff.below, diff.above, []

    def same(n):
        """The next n unchanged lines, each twice: the left one is not shown in a single column."""
        lines = [
            div(below, a + i, "left", "a", link=False) + div(above, b + i, "both", "b") for i in range(n)
        ]
        return '<div class="run">' + "\n".join(lines) + "</div>\n" if lines else ""

    for place, (kind, n_old, n_new) in enumerate(runs):
        if kind == " ":
            head = context if place else 0
            tail = context if place < len(runs) - 1 else 0
            hidden = n_old - head - tail
            if hidden < 4:  # not worth a fold
                out.append(same(n_old))
                a, b = a + n_old, b + n_old
                continue
            out.append(same(head))
            a, b = a + head, b + head
            name = above.around[min(b + hidden + tail + 1, len(above.lines))] if tail else ""
            inside = f", then <code>{html.escape(name)}</code>" if name else ""
            out.append(
                f"<details><summary>{hidden} unchanged lines{inside}</summary>\n{same(hidden)}</details>\n"
            )
            a, b = a + hidden, b + hidden
            out.append(same(tail))
            a, b = a + tail, b + tail
            continue
        old, new = below.lines[a : a + n_old], above.lines[b : b + n_new]
        left, right, rows, i, j = [], [], 0, 0, 0
        for pi, pj in [*pairs(old, new), (n_old, n_new)]:
            left += [div(below, a + k, "old", "a", row=rows + 1 + k - i) for k in range(i, pi)]
            right += [div(above, b + k, "new", "b", row=rows + 1 + k - j) for k in range(j, pj)]
            rows += max(pi - i, pj - j)
            if pi < n_old and pj < n_new:
                rows += 1
                marks = changed_words(old[pi], new[pj])
                left.append(div(below, a + pi, "old", "a", marks[0], rows))
                right.append(div(above, b + pj, "new", "b", marks[1], rows))
            i, j = pi + 1, pj + 1
        out.append('<div class="hunk">' + "\n".join(left + right) + "</div>\n")
        note_names(below, a, n_old, diff.changed[0])
        note_names(above, b, n_new, diff.changed[1])
        diff.removed, diff.added = diff.removed + n_old, diff.added + n_new
        a, b = a + n_old, b + n_new
    return a, b, "".join(out)


# ---------------------------------------------- Markdown ----------------------------------------------


def slug(title):
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


@dataclass
class Page:
    """One page of the site. `source` is the file of the repository that it shows, if it is one file."""

    url: str
    title: str
    kind: str
    source: str = ""
    week: int | None = None
    label: str = ""
    rungs: tuple = ()


class Site:
    """Everything that the pages are made of."""

    def __init__(self, root):
        self.root = root
        path = root / "logs" / "results.json"
        self.results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.measured = self.results.get("rungs", {})
        files = [
            p.relative_to(root).as_posix()
            for d in (".", "tools", "exercises")
            for p in (root / d).glob("*.py")
        ]
        self.sources = {path: Source(root, path) for path in sorted(files)}
        rungs = [s for path, s in self.sources.items() if re.fullmatch(r"v\d+_\w+\.py", path)]
        self.rungs = sorted(rungs, key=lambda s: (number(s.stem), s.stem))
        self.logs = sorted((root / "logs").glob("week_*.md"), key=lambda p: (number(p.stem), p.stem))
        self.by_stem = {s.stem: s for s in self.rungs}
        self.steps = [(self.below(rung), rung) for rung in self.rungs if self.below(rung)]
        self.copied, self.search = {}, []
        self.make_pages()
        self.read_concepts()

    def below(self, rung):
        """The rung that this one follows: the one that its docstring names, or the next lower one."""
        lower = self.rungs[: self.rungs.index(rung)]
        named = self.by_stem.get(rung.since[0])
        return named if named in lower else lower[-1] if lower else None

    # ------- pages and their order

    def make_pages(self):
        """All pages, by what they show, and the weeks: what to read, in which order."""
        self.pages = {"start": Page("index.html", "The ladder", "start")}
        self.pages["README.md"] = Page("guide.html", "Guide", "text", "README.md", label="guide")
        if (self.root / "SUMMARY.md").is_file():
            self.pages["SUMMARY.md"] = Page("summary.html", "Summary", "text", "SUMMARY.md", label="summary")
        for path in [*(self.root / "logs").glob("post.md"), *sorted((self.root / "logs").glob("card_*.md"))]:
            title = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), flags=re.M)[1]
            label = " ".join(reversed(path.stem.split("_")))  # post, base card
            name = f"logs/{path.name}"
            self.pages[name] = Page(f"logs/{path.stem}.html", title, "text", name, label=label)
        self.about = [page for page in self.pages.values() if page.kind == "text"]  # the whole, not a week
        self.pages["compare"] = Page("compare.html", "Compare", "compare")
        self.pages["search"] = Page("search.html", "Search", "search")
        for path, source in self.sources.items():
            title = posixpath.basename(path) if source.week or "/" not in path else path
            self.pages[path] = Page(f"code/{path[:-3]}.html", title, "code", path, source.week, "code")
        for below, above in itertools.combinations(self.rungs, 2):
            title = f"{below.stem.split('_')[0]} to {above.stem.split('_')[0]}"
            step = (below, above) in self.steps
            url = f"diff/{below.stem}-{above.stem}.html"
            label = f"diff {title.replace(' to ', ' → ')}"
            week = above.week if step else None
            self.pages[below, above] = Page(url, title, "diff", "", week, label, (below, above))
        weeks = defaultdict(list)
        for log in self.logs:
            path = f"logs/{log.name}"
            first = log.read_text(encoding="utf-8").split("\n## ")[0]
            title = re.search(r"^# (?:Week \d+: )?(.+)$", first, flags=re.M)[1]
            week = number(log.stem)
            self.pages[path] = Page(f"logs/{log.stem}.html", title, "text", path, week, f"log: {title}")
            weeks[week].append(self.pages[path])
            code = re.search(r"\]\(\.\./(\w+\.py)", first)
            if code and code[1] in self.sources:
                weeks[week] += self.pages_of(self.sources[code[1]], weeks[week])
        for source in [s for s in self.sources.values() if s.week and "/" not in s.path]:
            weeks[source.week] += self.pages_of(source, weeks[source.week])
        self.weeks = {week: weeks[week] for week in sorted(weeks)}
        self.way = [self.pages["start"], *itertools.chain(*self.weeks.values())]
        self.way += [*self.about, self.pages["compare"], self.pages["search"]]
        others = [page for page in self.pages.values() if page not in self.way]
        self.order = self.way + sorted(others, key=lambda page: page.kind == "code")

    def pages_of(self, source, there):
        """The pages about one script: the diff to the rung below, the code; those that are not `there`."""
        step = [self.pages[pair] for pair in self.steps if pair[1] is source]
        return [page for page in [*step, self.pages[source.path]] if page not in there]

    def log_of(self, source):
        """The log that is about a script: the one whose first link is it, or the first of its week."""
        pages = [p for p in self.weeks.get(source.week, []) if p.kind == "text"]
        about = [p for p in pages if self.code_of(p.source)[:1] == [source]]
        return (about or pages or [None])[0]

    def code_of(self, path):
        """The scripts that a log names before its first section, the one it is about first."""
        text = (self.root / path).read_text(encoding="utf-8").split("\n## ")[0]
        names = dict.fromkeys(re.findall(r"\]\(\.\./([\w/]+\.py)", text))
        return [self.sources[name] for name in names if name in self.sources]

    # ------- what README's index and the logs say about names

    def read_concepts(self):
        """README's concepts index: [(concept, [(source, name)], [(text, path of a log)])]."""
        readme = (self.root / "README.md").read_text(encoding="utf-8")
        self.concepts = []
        index = readme.partition("## Concepts index")[2].partition("\n## ")[0]
        for concept, code, logs in re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", index, flags=re.M):
            places = [
                (self.sources.get(f), name) for f, name in re.findall(r"`([\w/]+\.py): ([\w.]+)`", code)
            ]
            places = [(s, name) for s, name in places if s and name in s.definitions]
            places += [
                (self.sources[f], "") for f in re.findall(r"\]\(([\w/]+\.py)\)", code) if f in self.sources
            ]
            self.concepts.append((concept, places, re.findall(r"\[(.+?)\]\((logs/\w+\.md)\)", logs)))
        sections = []  # (log, anchor, title, text) in which a name may be explained
        for log in self.logs:
            parts = re.split(r"^## (.+)$", log.read_text(encoding="utf-8"), flags=re.M)
            sections += [(f"logs/{log.name}", t, x) for t, x in zip(parts[1::2], parts[2::2], strict=True)]
        self.mentions = defaultdict(list)  # {name, or (file, name) of quoted code: [(log, section)]}
        for path, title, text in sections:
            for name in dict.fromkeys(re.findall(r"`([A-Za-z_][\w.]*)`", text)):
                self.mentions[name].append((path, title))
            for quoted in re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S):
                for source in self.code_of(path):
                    if found := stands_at(quoted, source):
                        name = source.around[found[1]]
                        for part in {name, name.split(".")[0]}:
                            self.mentions[source.path, part].append((path, title))

    def explained(self, source, name):
        """(page, anchor, words) of the log that explains a name; where none does, the one it came with."""
        own = self.log_of(source)
        entries = [logs for _, places, logs in self.concepts if (source, name) in places]
        logs = [path for entry in entries for _, path in entry if path in self.pages]
        places = self.mentions.get((source.path, name), []) + self.mentions.get(name, [])
        if logs:
            titles = [title for path, title in places if path == logs[0]]
            return self.pages[logs[0]], slug(titles[0]) if titles else "", "explained"
        ours = [place for place in places if own and place[0] == own.source]
        earlier = [p for p in places if number(p[0]) <= (source.week or 0)]
        if found := ours or earlier[-1:]:
            return self.pages[found[0][0]], slug(found[0][1]), "explained"
        if "." in name:  # a method that no log tells of: that of its class will do
            return None
        first = next((s for s in self.rungs if source in self.rungs and name in s.definitions), source)
        page = self.log_of(first)
        return (page, "what-changed-in-the-code" if first.since[0] else "", "came") if page else None

    # ------- links

    def link(self, target, base, page):
        """Where a link of the repository, written in the file `base`, leads to on the site."""
        if re.match(r"[a-z]+:", target):
            return target
        path, _, anchor = target.partition("#")
        anchor = f"#{unquote(anchor)}" if anchor else ""
        if not path:
            return anchor
        path = posixpath.normpath(posixpath.join(posixpath.dirname(base), unquote(path)))
        if path in self.pages:
            return self.to(self.pages[path].url, page) + anchor
        if not (self.root / path).is_file():
            sys.exit(f"error: {base} links to {target}, and there is no such file")
        name = path if Path(path).suffix else f"{path}.txt"  # or a browser would not show it
        self.copied[f"files/{name}"] = self.root / path
        return self.to(f"files/{name}", page)

    def to(self, url, page):
        """The address of a page, seen from another one."""
        here, there = posixpath.dirname(page.url), url
        return posixpath.relpath(there, here or ".")

    def code_link(self, text, sources, page):
        """The address of what is named in backticks: `file.py: name`, a file, or a name of `sources`."""
        if text.endswith(".md") and text in self.pages:
            return self.to(self.pages[text].url, page)
        if found := re.fullmatch(r"([\w/]+\.py)(?:: ([\w.]+))?", text):
            source, name = self.sources.get(found[1]), found[2]
            if source and (not name or name in source.definitions):
                return self.to(self.pages[source.path].url, page) + (f"#{name}" if name else "")
        for source in sources:
            if text in source.definitions:
                return self.to(self.pages[source.path].url, page) + f"#{text}"
        return None

    # ------- Markdown

    def markdown(self, text, page, base, sources=(), top=1, html_too=True):
        """Markdown as HTML, with links to the site's pages: (HTML, [(level, title, anchor)])."""
        md = MarkdownIt("commonmark", {"html": html_too}).enable("table").enable("strikethrough")
        md.use(anchors_plugin, min_level=1, max_level=4, slug_func=slug)
        md.use(dollarmath_plugin, allow_space=False, allow_digits=False, double_inline=True, renderer=formula)
        text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.S)
        tokens = md.parse(text)
        self.turn(tokens, page, base, sources, md)
        heads = [
            (int(t.tag[1]), tokens[i + 1].content, t.attrs["id"])
            for i, t in enumerate(tokens)
            if t.type == "heading_open"
        ]
        return Markup(md.renderer.render(tokens, md.options, {})), heads

    def turn(self, tokens, page, base, sources, md):
        """Change tokens in place: links, pictures, code in backticks, fences, tables, what is folded."""
        inside = tables = 0
        for i, token in enumerate(tokens):
            if token.children:
                self.turn(token.children, page, base, sources, md)
            inside += (token.type == "link_open") - (token.type == "link_close")
            if token.type == "link_open":
                token.attrs["href"] = self.link(token.attrs["href"], base, page)
            elif token.type == "image":
                path = self.root / posixpath.dirname(base) / token.attrs["src"]
                token.attrs["src"] = self.link(token.attrs["src"], base, page)
                token.attrs |= {"loading": "lazy"} | size_of(path)
                still = self.root / STILLS.get(path.relative_to(self.root).as_posix(), "")
                if still.is_file():
                    href = self.link(still.relative_to(self.root).as_posix(), "", page)
                    size = " ".join(f'{key}="{value}"' for key, value in size_of(still).items())
                    source = f'<source media="(prefers-reduced-motion: reduce)" srcset="{href}" {size}>'
                    shown = md.renderer.render([token], md.options, {})
                    token.type, token.content = "html_inline", f"<picture>{source}{shown}</picture>"
            elif token.type == "code_inline" and not inside:
                if href := self.code_link(token.content, sources, page):
                    token.type = "html_inline"
                    token.content = f'<a href="{href}"><code>{html.escape(token.content)}</code></a>'
            elif token.type in ("fence", "code_block"):
                token.content = self.fence(token, sources, page)
                token.type = "html_block"
            elif token.type == "table_open":
                tables += 1
                name = f'role="region" aria-label="table {tables}"'
                token.type, token.content = "html_block", f'<div class="scroll" {name} tabindex="0"><table>\n'
            elif token.type == "table_close":
                token.type, token.content = "html_block", "</table></div>\n"
            elif token.type == "th_open" and not tokens[i + 1].content:  # it heads nothing
                token.tag = tokens[i + 2].tag = "td"
            elif token.type == "html_block":
                token.content = re.sub(
                    r"<summary>(.*?)</summary>",
                    lambda m: f"<summary>{md.renderInline(m[1])}</summary>",
                    token.content,
                    flags=re.S,
                )

    def fence(self, token, sources, page):
        """A block of code: Python in colour, with a link to the place in the code where it stands."""
        text = token.content.rstrip("\n")
        if token.info.strip() != "python":
            return f'<pre tabindex="0">{html.escape(text, False)}</pre>\n'
        where = next((found for s in sources if (found := stands_at(text, s))), None)
        lines = "\n".join(coloured(runs) for runs in paint(text))
        caption = ""
        if where:
            source, line = where
            href = f"{self.to(self.pages[source.path].url, page)}#L{line}"
            caption = f'<figcaption><a href="{href}">{source.path}, line {line}</a></figcaption>'
        return f'<figure class="quote">{caption}<pre tabindex="0">{lines}</pre></figure>\n'

    def inline(self, text, page, sources=()):
        """A piece of a docstring as HTML."""
        return Markup(self.markdown(text, page, "README.md", sources, html_too=False)[0])


def formula(content, options):
    """A formula between dollars as MathML."""
    return convert(content, display="block" if options["display_mode"] else "inline")


def size_of(path):
    """Width and height of a PNG or GIF, so that a page does not jump when its pictures arrive."""
    if path.suffix not in (".png", ".gif") or not path.is_file():
        return {}
    head = path.read_bytes()[:24]
    width, height = (head[16:20], head[20:24]) if path.suffix == ".png" else (head[6:8], head[8:10])
    order = "big" if path.suffix == ".png" else "little"
    return {"width": int.from_bytes(width, order), "height": int.from_bytes(height, order)}


# What is shown in place of an animation to readers who ask their system for less motion.
STILLS = {"logs/demo.gif": "logs/week_12_page.png"}


def front_matter(text):
    """The YAML head of a model card as [(key, values)], and the text below it."""
    found = re.match(r"---\n(.*?)^---\n", text, flags=re.M | re.S)
    if not found:
        return [], text
    rows = []
    for key, value, listed in re.findall(r"^(\w+):(.*)\n((?:- .*\n)*)", found[1], flags=re.M):
        rows.append((key, value.strip() or ", ".join(re.findall(r"^- (.+)$", listed, flags=re.M))))
    return rows, text[found.end() :]


def stands_at(text, source):
    """(source, line) where quoted lines stand, indented or not; None if the first three do not."""
    wanted = [line.strip() for line in text.splitlines() if line.strip()][:3]
    lines = [line.strip() for line in source.lines]
    for i in range(len(lines) - len(wanted) + 1):
        if lines[i : i + len(wanted)] == wanted:
            return source, i + 1
    return None


# ---------------------------------------------- numbers ----------------------------------------------

# What results.json may hold of a run, how it is called, and how it is written.
FACTS = {
    "params": ("parameters", "{:,}"),
    "val_loss": ("val loss", "{:.4f}"),
    "bits_per_char": ("bits per character", "{:.2f}"),
    "seconds": ("seconds of training", "{:.0f}"),
    "steps": ("steps", "{:,}"),
    "tokens": ("tokens read", "{:,}"),
    "tokens_per_second": ("tokens read a second", "{:,.0f}"),
    "megabytes": ("megabytes of weights", "{:.2f}"),
    "new_tokens_per_second": ("tokens written a second", "{:.0f}"),
    "names_right": ("new names right", "{:.1%}"),
    "preferred": ("preferred to v8's replies", "{:.1%}"),
    "kl": ("KL to the start, nats", "{:.1f}"),
}
OF_TRAINING = ("seconds", "steps", "tokens", "tokens_per_second")


def taken_over(site, rung):
    """Whether a rung's model is one that a rung below has trained: then it has its history."""
    lower = site.rungs[: site.rungs.index(rung)]
    runs = site.measured
    return rung.stem in runs and any(
        runs[other.stem]["history"] == runs[rung.stem]["history"] for other in lower if other.stem in runs
    )


def fact(site, rung, key):
    """A number of a rung as the ladder writes it; '-' where there is none, or none of its own."""
    m = site.measured.get(rung.stem, {})
    if m.get(key) is None or (key in OF_TRAINING and taken_over(site, rung)):
        return "-"
    if key == "val_loss" and kind_of(m) != "text":
        return "-"
    return FACTS[key][1].format(m[key])


def facts(site, *rungs):
    """Rows of (name, number of each rung) for what at least one of them has."""
    rows = [(label, [fact(site, rung, key) for rung in rungs]) for key, (label, _) in FACTS.items()]
    return [row for row in rows if set(row[1]) != {"-"}]


# What a rung's curve shows, by what its history holds.
CURVES = {
    "text": ("bits per character", ("val_loss", "train_loss")),
    "answers": ("nats a token of answers", ("val_loss", "train_loss")),
    "replies": ("reward model's score", ("score",)),
}


def kind_of(m):
    """Which of CURVES the metrics of a rung have."""
    if "score" in m["history"][0]:
        return "replies"
    return "answers" if "before" in m else "text"


def draw(site, *rungs):
    """The loss curves of rungs as SVG in the page's own colours, and a sentence for each that has none."""
    shown, notes = [], []
    for rung in rungs:
        name = rung.stem
        if name not in site.measured:
            notes.append(f"{name} is not measured yet.")
        elif taken_over(site, rung):
            notes.append(f"{name} trains nothing of its own.")
        else:
            shown.append(rung)
    if not shown:
        return "", notes
    runs = [site.measured[rung.stem] for rung in shown]
    kinds = [kind_of(m) for m in runs]
    settings = {"svg.fonttype": "none", "svg.hashsalt": "site", "font.size": 9.5, "axes.spines.top": False}
    settings |= {"axes.spines.right": False, "font.family": "sans-serif"}
    ink, colours = "#010203", ["#010204", "#010205"]  # replaced by those of the style sheet
    for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"):
        settings[key] = ink
    with matplotlib.rc_context(settings):
        apart = len(set(kinds)) > 1
        fig = Figure(figsize=(5.6, 2.9), layout="constrained")
        axes = fig.subplots(1, 2 if apart else 1, squeeze=False)
        for i, (rung, m, kind) in enumerate(zip(shown, runs, kinds, strict=True)):
            ax = axes[0, i if apart else 0]
            colour = colours[rungs.index(rung)] if len(rungs) > 1 else colours[1]
            # A token may be several characters.
            scale = m["bits_per_char"] / m["val_loss"] if kind == "text" else 1
            seconds = [point["seconds"] for point in m["history"]]
            label, names = CURVES[kind]
            for name, style in zip(names, ("-", ":"), strict=False):
                width = {"lw": 2, "label": rung.stem} if style == "-" else {"lw": 1}
                ax.plot(seconds, [scale * p[name] for p in m["history"]], style, color=colour, **width)
            ax.set(ylabel=label, xlabel="seconds")
            ax.grid(alpha=0.15, color=ink)
            ax.legend(frameon=False)
        out = StringIO()
        fig.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)  # its style is for *
    svg = re.sub(r'\s(xmlns(:\w+)?|version|xlink:\w+(?=="http))="[^"]*"', "", svg, count=3)
    svg = svg.replace("xlink:href", "href").replace(' width="403.2pt" height="208.8pt"', "")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, name in zip([ink, *colours], ["--text", "--old-line", "--new-line"], strict=True):
        svg = svg.replace(colour, f"var({name})")
    names = " and ".join(rung.stem for rung in shown)
    label = f"Loss over seconds of training, {names}; the final values stand in the table"
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)), notes


# ----------------------------------------------- writing -----------------------------------------------


def words_of(tokens):
    """What a reader sees of inline Markdown; code as it stands."""
    kinds = {"softbreak": "\n", "hardbreak": "\n"}
    own = ("text", "code_inline", "math_inline")
    seen = [words_of(t.children or []) if t.type == "image" else kinds.get(t.type, "") for t in tokens]
    return "".join(t.content if t.type in own else words for t, words in zip(tokens, seen, strict=True))


def sections_of(text):
    """(title, what a reader sees of it) of each section of a Markdown file, down to ###."""
    md = MarkdownIt("commonmark").enable("table").enable("strikethrough")
    md.use(dollarmath_plugin, allow_space=False, allow_digits=False, double_inline=True)
    tokens = md.parse(re.sub(r"<!--.*?-->\n?", "", text, flags=re.S))
    found = []
    for i, token in enumerate(tokens):
        opens = tokens[i - 1].type if i else ""
        if token.type == "inline" and opens == "heading_open" and tokens[i - 1].tag in ("h1", "h2", "h3"):
            found.append((words_of(token.children), []))
        elif found and token.type == "inline":
            found[-1][1].append(
                words_of(token.children) + (" | " if opens in ("td_open", "th_open") else "\n")
            )
        elif found and token.type in ("fence", "code_block", "math_block"):
            found[-1][1].append(token.content)
        elif found and token.type == "html_block":  # such as the summary of what is folded
            found[-1][1].append(re.sub(r"</?\w+>|`", "", token.content))
        elif found and token.type == "tr_close":
            found[-1][1].append("\n")
    return [(title, "".join(parts).replace(" | \n", "\n").strip()) for title, parts in found]


def search_index(site):
    """What the search looks through: {k: kind, t: title, w: where, u: address, x: text}. Equal code once."""
    found, seen = [], {}

    def add(kind, title, where, url, text):
        found.append({"k": kind, "t": title.replace("`", ""), "w": where, "u": url, "x": text})

    for concept, places, _ in site.concepts:
        for source, name in places:
            where = "concept, " + (f"{source.path}: {name}" if name else source.path)
            add("concept", concept, where, site.pages[source.path].url + (f"#{name}" if name else ""), "")
    for page in [page for page in site.way if page.kind == "text"]:
        where = f"week {page.week}: {page.title}" if page.week else page.title
        text = (site.root / page.source).read_text(encoding="utf-8")
        for title, words in sections_of(front_matter(text)[1]):
            add("log", title, where, f"{page.url}#{slug(title)}", words)
    for below, above in site.steps:
        page = site.pages[below, above]
        names = " ".join(itertools.chain(*above.since[1].values()))
        add("log", page.label, f"week {above.week}", page.url, f"{above.headline} {names}")
    for source in [*site.rungs, *(s for s in site.sources.values() if s not in site.rungs)]:
        url, kind = site.pages[source.path].url, "code" if site.pages[source.path] in site.way else ""
        add(kind, source.path, "code", url, source.docstring)
        for name in [name for name in source.definitions if "." not in name]:
            first, last = source.definitions[name]
            text = "\n".join(source.lines[first - 1 : last])
            if text in seen:
                seen[text]["a"] = seen[text].get("a", 0) + 1
            else:
                add(kind, name, source.path, f"{url}#{name}", text)
                seen[text] = found[-1]
    return found


def code_html(site, source, page):
    """A whole file as HTML: each line and each name has an anchor, each name a link to its log."""
    anchors = {source.line_of(name): name for name in reversed(source.definitions)}
    also = defaultdict(list)
    for name in source.definitions:
        line = source.line_of(name)
        if anchors[line] != name:
            also[line].append(name)
    rooms = {line: name for name, line in source.rooms}
    out = []
    for i in range(len(source.lines)):
        line, extra = div(source, i, "room" if i + 1 in rooms else "both", "L"), ""
        if name := anchors.get(i + 1):
            line = line.replace("<code>", f'<code id="{name}">', 1)
            extra = "".join(f'<i id="{other}"></i>' for other in also[i + 1])
            if told := site.explained(source, name):
                to, anchor, how = told
                href = site.to(to.url, page) + (f"#{anchor}" if anchor and how == "explained" else "")
                words = f"week {to.week}" if how == "explained" else f"came in week {to.week}"
                title = f"{name}: {how} in week {to.week}, {html.escape(to.title)}"
                extra += f'<a class="why {how}" href="{href}" title="{title}">{words}</a>'
        if i + 1 in rooms:
            extra += f'<i id="room-{slug(rooms[i + 1])}"></i>'
        out.append(line[:-6] + extra + "</div>" if extra else line)
    return Markup("\n".join(out))


def split_sample(site, rung, lines):
    """What a rung wrote, in two: what is shown at once, and the rest."""
    rows = site.measured.get(rung.stem, {}).get("sample", "").strip("\n").split("\n")
    return "\n".join(rows[:lines]), "\n".join(rows[lines:])


def text_values(site, page):
    """What the page of README or of a log shows."""
    text = (site.root / page.source).read_text(encoding="utf-8")
    matter, text = front_matter(text)
    body, heads = site.markdown(text, page, page.source, site.code_of(page.source) if page.week else ())
    return {"body": body, "heads": [head for head in heads if head[0] == 2], "matter": matter}


def code_values(site, source, page):
    """What the page of a script shows."""
    names = defaultdict(list)  # of each room
    for name in [name for name in source.definitions if "." not in name]:
        above = [room for room, line in source.rooms if line <= source.line_of(name)]
        names[above[-1] if above else ""].append(name)
    return {
        "source": source,
        "log": site.log_of(source),
        "steps": [site.pages[pair] for pair in site.steps if source in pair],
        "headline": site.inline(source.headline, page),
        "paragraph": site.inline(source.paragraph, page),
        "rooms": [(room, f"room-{slug(room)}", names[room]) for room, _ in source.rooms]
        or [("", "", names[""])],
        "concepts": [(concept, n) for concept, places, _ in site.concepts for s, n in places if s is source],
        "code": code_html(site, source, page),
    }


def diff_values(site, below, above, page):
    """What the page of two rungs shows; that of a step has names, numbers and samples too."""
    diff = make_diff(site.root, below, above)
    values = {"below": below, "above": above, "diff": diff, "log": site.log_of(above)}
    values |= {"more": site.inline(above.more, page), "paragraph": site.inline(above.paragraph, page)}
    values["step"] = (below, above) in site.steps
    if not values["step"]:
        return values
    curve, notes = draw(site, below, above)
    machines = {site.measured.get(rung.stem, {}).get("machine") for rung in (below, above)} - {None}
    return values | {
        "names": [(kind, [(n, diff.address(n)) for n in names]) for kind, names in above.since[1].items()],
        "samples": [(rung, split_sample(site, rung, 18)) for rung in (below, above)],
        "facts": facts(site, below, above),
        "machines": sorted(machines),
        "curve": curve,
        "notes": notes,
    }


def start_values(site, page):
    """What the first page shows: the head of README, the ladder, and what its best model of text writes."""
    readme = (site.root / "README.md").read_text(encoding="utf-8")
    intro = readme.split("\n## ")[0].partition("\n")[2]
    # The guide has the animation and what is said of it: here it would push the way to begin out of sight.
    intro = re.sub(r"^!\[.*\]\(.*\.gif\)\n", "", intro, flags=re.M)
    intro = re.split(r"^The animation\b", intro, flags=re.M)[0]
    keys = ("params", "val_loss", "bits_per_char", "seconds")
    size = size_of(site.root / "logs" / "ladder.png")
    of_text = [rung for rung in site.rungs if "before" not in site.measured.get(rung.stem, {"before": None})]
    of_text = [rung for rung in of_text if not taken_over(site, rung)]
    best = min(of_text, key=lambda rung: site.measured[rung.stem]["bits_per_char"], default=None)
    return {
        "heading": re.match(r"# (.+)", readme)[1],
        "intro": site.markdown(intro, page, "README.md")[0],
        "rows": [(rung, [fact(site, rung, key) for key in keys]) for rung in site.rungs],
        "picture": site.link("logs/ladder.png", "README.md", page) if size else "",
        "picture_size": size,
        "sampled": best,
        "sample": split_sample(site, best, 14)[0] if best else "",
    }


def write(site, out):
    """Write all pages into the folder `out`."""
    env = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    env.trim_blocks = env.lstrip_blocks = True
    env.globals |= {"site": site, "generator": GENERATOR, "version": lambda s: s.stem.split("_")[0]}
    for at, page in enumerate(site.order):
        values = {
            "page": page,
            "root": posixpath.relpath(".", posixpath.dirname(page.url) or "."),
            "to": lambda other, anchor="", page=page: site.to(other.url, page) + anchor,
            "strip": site.about if page in site.about else site.weeks.get(page.week, []),
            "before": site.order[at - 1] if at else None,
            "after": site.order[at + 1] if at + 1 < len(site.order) else None,
        }
        if page.kind == "text":
            values |= text_values(site, page)
        elif page.kind == "code":
            values |= code_values(site, site.sources[page.source], page)
        elif page.kind == "diff":
            values |= diff_values(site, *page.rungs, page)
        elif page.kind == "start":
            values |= start_values(site, page)
        path = out / page.url
        path.parent.mkdir(parents=True, exist_ok=True)
        text = env.get_template(f"{page.kind}.html").render(values)
        path.write_text(text, encoding="utf-8", newline="\n")
    text = json.dumps(search_index(site), ensure_ascii=False, separators=(",", ":"))
    (out / "index.js").write_text(f"const INDEX = {text};\n", encoding="utf-8", newline="\n")
    for name in ("style.css", "site.js"):
        shutil.copy(TEMPLATES / name, out / name)
    for url, path in site.copied.items():
        (out / url).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, out / url)


def build(root, out):
    """Build the site of the repository `root` in the folder `out`, which is replaced as a whole."""
    out = Path(out).resolve()
    start = out / "index.html"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        text = start.read_text(encoding="utf-8", errors="replace") if start.is_file() else ""
        if f'content="{GENERATOR}"' not in text:
            sys.exit(f"error: {out} holds something that this tool has not made; name a folder that is new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".site") as unfinished:
            new = Path(unfinished, "new")
            new.mkdir()
            site = Site(Path(root))
            write(site, new)
            if out.exists():
                os.replace(out, Path(unfinished, "old"))
            os.replace(new, out)
    except OSError as error:
        sys.exit(f"error: cannot build {out} ({error})")
    return site


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=ROOT / "site", help="the folder to write (default: site)")
    out = Path(parser.parse_args().out)
    begun = time.perf_counter()
    site = build(ROOT, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    seconds = time.perf_counter() - begun
    print(f"{len(site.pages)} pages, {size:.1f} MB, {seconds:.1f} s: open {out / 'index.html'}")


if __name__ == "__main__":
    main()
