"""The site: links lead somewhere, pages are valid and good to use, what they show is what is stored."""

import html
import json
import posixpath
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from urllib.parse import unquote, urlsplit

import build_site
import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import ROOT
from justhtml import JustHTML
from playwright.sync_api import Error, expect, sync_playwright

ARGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
ARGS += " --disable-component-update --disable-sync"


class Built:
    """A built site: its folder, what it was made of, its pages as texts, the seconds that it took."""

    def __init__(self, root, out):
        began = time.process_time()
        self.out, self.site = out, build_site.build(root, out)
        self.seconds = time.process_time() - began
        self.pages = {
            path.relative_to(out).as_posix(): path.read_text(encoding="utf-8") for path in out.rglob("*.html")
        }

    def steps(self):
        """(rung below, rung above, text of the page) of each step."""
        pages = self.site.pages
        return [(a, b, self.pages[pages[a, b].url]) for a, b in self.site.steps]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return Built(ROOT, tmp_path_factory.mktemp("site") / "site")


def ids(text):
    return re.findall(r'\sid="([^"]*)"', text)


def plain(fragment):
    """The text of a piece of HTML."""
    return html.unescape(re.sub(r"<[^>]+>", "", fragment))


def cells(row):
    return [plain(cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.S)]


# ------------------------------------------- all the pages -------------------------------------------


def test_every_step_rung_and_log_has_its_page_and_the_build_is_quick(built):
    rungs = sorted(path.stem for path in ROOT.glob("v[0-9]*_*.py"))
    pairs = {
        f"diff/{a}-{b}.html" for a in rungs for b in rungs if build_site.number(a) < build_site.number(b)
    }
    others = {f"code/{name}.html" for name in [*rungs, "bpe_tokenizer", "rag", "serve"]}
    logs = {f"logs/{path.stem}.html" for path in (ROOT / "logs").glob("week_*.md")}
    alone = {"index.html", "compare.html", "search.html", "guide.html", "summary.html", "logs/post.html"}
    alone |= {f"logs/{path.stem}.html" for path in (ROOT / "logs").glob("card_*.md")}
    assert pairs | others | logs | alone <= set(built.pages)
    assert len(pairs) == len(rungs) * (len(rungs) - 1) / 2
    assert built.seconds < 20


def test_every_link_and_anchor_leads_somewhere(built):
    anchors = {url: set(ids(text)) for url, text in built.pages.items()}
    wrong, counted, files = [], 0, {path.relative_to(built.out).as_posix() for path in built.out.rglob("*.*")}
    links = {u: set(re.findall(r'\s(?:href|src|action)="([^"]*)"', text)) for u, text in built.pages.items()}
    index = json.loads((built.out / "index.js").read_text(encoding="utf-8").partition("=")[2].rstrip(";\n"))
    links["search.html"] |= {entry["u"] for entry in index}
    for url, found in links.items():
        for link in found:
            parts = urlsplit(html.unescape(link))
            if parts.scheme in ("https", "http", "data"):
                continue
            counted += 1
            there = posixpath.normpath(posixpath.join(posixpath.dirname(url), unquote(parts.path)))
            there = there if parts.path else url
            if there not in files or (
                parts.fragment and unquote(parts.fragment) not in anchors.get(there, ())
            ):
                wrong.append(f"{url}: {link}")
    assert counted > 10_000
    assert not wrong, wrong[:20]


def test_pages_are_valid_and_no_id_stands_twice(built):
    """The strict parser of the standard takes all pages; of the pairs that are no steps each fifth."""
    steps = {built.site.pages[pair].url for pair in built.site.steps}
    others = [url for url in built.pages if url.startswith("diff/") and url not in steps]
    for url, text in built.pages.items():
        if url not in others or others.index(url) % 5 == 0:
            JustHTML(text, strict=True, sanitize=False)
        twice = [name for name, count in Counter(ids(text)).items() if count > 1]
        assert not twice, (url, twice[:5])


def test_pages_can_be_turned_from_the_first_to_the_last(built):
    seen, url = [], "index.html"
    while url:
        seen.append(url)
        to = re.search(r'<a rel="next" href="([^"]+)"', built.pages[url])
        back = re.search(r'<a rel="prev" href="([^"]+)"', built.pages[url])
        assert bool(back) == (len(seen) > 1)
        url = to and ((built.out / url).parent / to[1]).resolve().relative_to(built.out.resolve()).as_posix()
        assert url not in seen
    assert set(seen) == set(built.pages)


def test_the_first_page_is_small(built):
    text = built.pages["index.html"]
    files = re.findall(r'(?:src|href)="([^"]+\.(?:css|js|png))"', text)
    assert {"./style.css", "./site.js"} <= set(files)
    assert len(text.encode()) + sum((built.out / name).stat().st_size for name in set(files)) < 300_000


def test_nothing_is_loaded_from_elsewhere(built):
    for url, text in built.pages.items():
        loaded = re.findall(
            r'<(?:script|link|img|iframe|source|video|object)[^>]*?(?:src|href)="([^"]*)"', text
        )
        assert loaded and not [x for x in loaded if x.startswith(("http", "//"))], url
    css = (built.out / "style.css").read_text(encoding="utf-8")
    assert "url(" not in css and "@import" not in css
    assert not re.search(
        r"fetch\(|XMLHttpRequest|import\(", (built.out / "site.js").read_text(encoding="utf-8")
    )


# ------------------------------------------ what they show ------------------------------------------


def sides(page):
    """{line number: text} of the left and of the right side of a diff."""
    left, right = {}, {}
    pattern = (
        r'<div class="l (left|both|old|new)"[^>]*><[ab][^>]*>(\d+)</[ab]><(code|del|ins)>(.*?)</\3></div>'
    )
    for kind, number, _, code in re.findall(pattern, page):
        side = left if kind in ("left", "old") else right
        assert int(number) not in side
        side[int(number)] = plain(code)
    return left, right


def test_each_side_of_a_diff_is_the_whole_file(built):
    for a, b in [*built.site.steps, (built.site.rungs[0], built.site.rungs[-1])]:
        left, right = sides(built.pages[built.site.pages[a, b].url])
        assert [left[i] for i in sorted(left)] == a.lines
        assert [right[i] for i in sorted(right)] == b.lines
        assert list(left) == sorted(left) and list(right) == sorted(right)


def test_lines_are_counted_as_git_counts_them(built):
    for a, b, page in built.steps():
        args = ["git", "diff", "--no-index", "--numstat", a.path, b.path]
        added, removed = subprocess.run(args, cwd=ROOT, capture_output=True, encoding="utf-8").stdout.split()[
            :2
        ]
        assert (
            f'<span class="plus">+{added}</span> <span class="minus">\N{MINUS SIGN}{removed}</span>' in page
        )
        assert page.count('<div class="l new"') == int(added) and page.count('<div class="l old"') == int(
            removed
        )


def test_declared_names_lead_to_lines_that_change(built):
    for a, b, page in built.steps():
        shown = page[page.index('<section class="names"') : page.index('id="diff"')]
        for kind, names in b.since[1].items():
            part = re.search(rf'<div class="{kind}">(.*?)</div>', shown, flags=re.S)[1]
            links = dict((name, anchor) for anchor, name in re.findall(r'href="#(\w+)"><code>(\w+)<', part))
            assert list(links) == names
            for name, anchor in links.items():
                line = re.search(rf'<div class="l (\w+)" id="{anchor}"', page)[1]
                assert line in {"added": ["new"], "removed": ["old"], "changed": ["old", "new"]}[kind], name
                source = a if anchor[0] == "a" else b
                first, last = source.definitions[name]
                assert first <= int(anchor[1:]) <= last, name


def test_numbers_are_those_of_the_results(built):
    rungs = json.loads((ROOT / "logs" / "results.json").read_text(encoding="utf-8"))["rungs"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ladder = dict(re.findall(r"^\| \[(v\w+)\.py\]\(\S+\) \| (.+) \|$", readme, flags=re.M))
    rows = re.findall(r"<tr><td>\d+</td>.*?</tr>", built.pages["index.html"], flags=re.S)
    assert len(rows) == len(built.site.rungs) and len(ladder) > 8
    for rung, row in zip(built.site.rungs, rows, strict=True):
        if rung.stem in rungs:  # README's ladder is checked against the results elsewhere
            week, idea, *numbers = ladder[rung.stem].split(" | ")
            assert cells(row)[:2] == [week, idea] and cells(row)[5:] == numbers[:4]
        else:
            assert cells(row)[5:] == ["-"] * 4
    for a, b, page in built.steps():
        table = dict(
            (row[0], row[1:]) for row in map(cells, re.findall(r"<tr><th scope.*?</tr>", page, flags=re.S))
        )
        for i, rung in enumerate((a, b)):
            m = rungs.get(rung.stem)
            assert table["parameters"][i] == (f"{m['params']:,}" if m else "-")
            own = m and not build_site.taken_over(built.site, rung)
            assert table["seconds of training"][i] == (f"{m['seconds']:.0f}" if own else "-")
            if m:
                samples = plain(page[page.index('id="samples"') :])
                assert m["sample"].strip().split("\n")[0] in samples


def test_names_and_concepts_lead_into_code_and_logs(built):
    guide, rung = built.pages["guide.html"], built.pages["code/v2_attention.html"]
    assert 'href="code/v2_attention.html#SelfAttentionHead.weights"' in guide
    assert re.search(
        r'<code id="SelfAttentionHead">.*?class="why explained" href="\.\./logs/week_3\.html#', rung
    )
    tops = [name for name in built.site.by_stem["v2_attention"].definitions if "." not in name]
    assert len(re.findall(r'class="why \w+"', rung)) >= len(tops)
    for room, _ in built.site.by_stem["v2_attention"].rooms:
        assert f'href="#room-{room}"' in rung and f'id="room-{room}"' in rung
    log = built.pages["logs/week_3.html"]
    assert re.search(
        r'<figcaption><a href="\.\./code/v2_attention\.html#L\d+">v2_attention.py, line \d+', log
    )
    assert log.count("<details>") == log.count("</details>") - 1 == 4  # and that of the contents
    assert log.count("<img ") == 2 and 'width="' in log


def test_the_search_holds_code_as_it_stands(built):
    index = json.loads((built.out / "index.js").read_text(encoding="utf-8").partition("=")[2].rstrip(";\n"))
    told = {
        url: "\n".join(entry["x"] for entry in index if entry["u"].startswith(url))
        for url in ("logs/week_3.html", "logs/week_10.html")
    }
    assert "masked_fill(~self.mask[:T, :T], -math.inf)" in told["logs/week_3.html"]
    line = "given = last * rewards[:, None] - config.kl_coef * (old - reference) * mask"
    assert line in told["logs/week_10.html"]
    assert not re.search(r"\]\(\w|<!--|```", "".join(told.values()))


def test_sections_are_read_as_a_reader_sees_them():
    text = "# A `b`\n\nSee [this](x.md), *that*\nand `c[0]`.\n\n| n | m |\n|---|---|\n| 1 | 2 |\n\n"
    text += "```\n# no heading\n```\n\n## Next\n\n<details><summary>Why `x`?</summary>\n"
    first, second = build_site.sections_of(text)
    assert first == ("A b", "See this, that\nand c[0].\nn | m\n1 | 2\n# no heading")
    assert second == ("Next", "Why x?")


def test_summary_post_and_cards_are_pages_and_none_is_an_orphan(built):
    about = ["guide.html", "summary.html", "logs/post.html", "logs/card_base.html"]
    for url in ["index.html", *about]:
        here = posixpath.dirname(url) or "."
        links = set(re.findall(r'href="([^"#]+)"', built.pages[url]))
        assert {posixpath.relpath(other, here) for other in about} <= links
    assert 'href="files/SUMMARY' not in "".join(built.pages.values())
    card = built.pages["logs/card_base.html"]
    assert "---" not in plain(card) and "pipeline_tag" not in card
    assert ["tags", "from-scratch, shakespeare, education"] in [
        cells(row) for row in re.findall("<tr>.*?</tr>", card)
    ]
    assert '<a href="week_6.html"><code>logs/week_6.md</code></a>' in card


def test_the_animation_stands_on_the_guide_and_a_still_stands_in_for_it(built):
    assert "demo.gif" not in built.pages["index.html"] and "animation" not in built.pages["index.html"]
    picture = re.search(r"<picture>(.*?)</picture>", built.pages["guide.html"])[1]
    still = re.search(
        r'<source media="\(prefers-reduced-motion: reduce\)" srcset="([^"]+)" width="\d+"', picture
    )
    assert (built.out / still[1]).is_file() and still[1].endswith("week_12_page.png")
    assert re.search(r'<img src="\S+demo.gif" alt="[^"]+" loading="lazy" width="\d+"', picture)


def test_each_step_sends_to_its_log_for_more_seeds(built):
    for _, b, page in built.steps():
        if b.stem in built.site.measured:
            week = built.site.log_of(b).week
            assert re.search(
                rf'What more seeds say.*<a href="\.\./logs/week_{week}\w*\.html">the log of week {week}<',
                page,
            )


# ------------------------------------- other repositories than this -------------------------------------


@pytest.fixture
def small(tmp_path):
    """A repository of two rungs, one log and no results, and its address on disk."""
    root = tmp_path / "small"
    (root / "logs").mkdir(parents=True)
    for name in ("v0_bigram.py", "v1_mlp.py"):
        shutil.copy(ROOT / name, root / name)
    (root / "README.md").write_text("# Small\n\nIt is small.\n", encoding="utf-8")
    text = "# Week 2: a network\n\nCode: [v1_mlp.py](../v1_mlp.py).\n\n## The idea\n\n"
    text += "See $a^2 < b$, `train` and `$5`.\n"
    (root / "logs" / "week_2.md").write_text(text, encoding="utf-8")
    return root


def test_what_is_not_measured_is_said_and_formulas_are_drawn(small, tmp_path):
    built = Built(small, tmp_path / "out")
    page = built.pages["diff/v0_bigram-v1_mlp.html"]
    assert "v1_mlp is not measured yet" in page and "No sample is stored yet" in page
    log = built.pages["logs/week_2.html"]
    assert "<msup>" in log and "$a" not in log and "<code>$5</code>" in log
    assert '<a href="../code/v1_mlp.html#train"><code>train</code></a>' in log


def test_a_rung_that_is_added_appears(small, tmp_path):
    text = (
        (small / "v1_mlp.py")
        .read_text(encoding="utf-8")
        .replace("v1, week 2: a window of", "v10, week 13: two ")
    )
    (small / "v10_mine.py").write_text(text, encoding="utf-8")
    built = Built(small, tmp_path / "out")
    assert [(a.stem, b.stem) for a, b in built.site.steps] == [
        ("v0_bigram", "v1_mlp"),
        ("v0_bigram", "v10_mine"),
    ]
    assert "diff/v1_mlp-v10_mine.html" in built.pages
    assert "two  characters" in built.pages["index.html"]


def run(*flags):
    args = [sys.executable, str(ROOT / "tools" / "build_site.py"), *map(str, flags)]
    return subprocess.run(args, capture_output=True, encoding="utf-8", timeout=120)


def test_a_folder_of_others_is_not_replaced(tmp_path):
    (tmp_path / "index.html").write_text("mine", encoding="utf-8")
    done = run("--out", tmp_path)
    assert done.returncode and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == "mine"


def test_a_broken_link_is_named_and_the_old_site_stays(small, tmp_path):
    out = tmp_path / "out"
    build_site.build(small, out)
    before = (out / "index.html").read_text(encoding="utf-8")
    (small / "README.md").write_text("# Small\n\nSee [this](gone.md).\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"error: README.md links to gone.md"):
        build_site.build(small, out)
    assert (out / "index.html").read_text(encoding="utf-8") == before
    assert not list(tmp_path.glob(".site*"))


# ------------------------------------------- in a browser -------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    """A browser: the system's, or the one that `playwright install chromium` brings."""
    with sync_playwright() as playwright:
        try:
            path = shutil.which("chromium") or shutil.which("chromium-browser")
            browser = playwright.chromium.launch(executable_path=path, args=ARGS.split())
        except Error as error:
            pytest.skip(f"no browser, `playwright install chromium` brings one: {error.message[:200]}")
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, built):
    """A function that opens a page from its file; none may complain or ask for what is not in the site."""
    contexts, elsewhere, errors = [], [], []
    own = (built.out.as_uri(), "data:", "blob:")

    def open_one(url, **settings):
        contexts.append(chromium.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("request", lambda asked: None if asked.url.startswith(own) else elsewhere.append(asked.url))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{built.out.as_uri()}/{url}")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not elsewhere and not errors


PHONE = {"viewport": {"width": 390, "height": 844}}
WIDE = {"viewport": {"width": 1280, "height": 900}}
STEP = "diff/v1_mlp-v2_attention.html"
KINDS = [
    "index.html",
    STEP,
    "code/v0_bigram.html",
    "logs/week_3.html",
    "compare.html",
    "search.html?q=mask",
    "guide.html",
    "summary.html",
    "logs/card_base.html",
]


@pytest.mark.parametrize("url", KINDS)
def test_axe_finds_nothing_and_nothing_is_wider_than_the_window(opened, url):
    for scheme, size in (("light", WIDE), ("dark", PHONE)):
        page = opened(url, color_scheme=scheme, **size)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["viewport"]["width"]
        found = (
            Axe().run(page, options={"preload": False, "resultTypes": ["violations"]}).response["violations"]
        )
        assert not found, [(v["id"], v["nodes"][0]["html"][:200], len(v["nodes"])) for v in found]


def test_a_diff_has_two_layouts_folds_and_keys(opened):
    page = opened(STEP, **WIDE)
    left = page.locator(".diff .run .left:visible").first
    expect(left).to_be_visible()
    page.keyboard.press("s")
    expect(left).to_be_hidden()
    page.reload()  # the choice is kept
    expect(left).to_be_hidden()
    page.keyboard.press("s")
    folded = page.locator(".diff details .both").first
    expect(folded).to_be_hidden()
    page.keyboard.press("u")
    expect(folded).to_be_visible()
    page.keyboard.press("u")
    expect(folded).to_be_hidden()
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.wait_for_function("scrollY > 500")
    page.keyboard.press("]")
    expect(page).to_have_title(re.compile("v2_attention"))
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()


def test_the_two_sides_stand_beside_each_other(opened):
    page = opened(STEP, **WIDE)
    pairs = page.evaluate(
        """[...document.querySelectorAll(".hunk")].flatMap((hunk) => {
            const marked = (side) => [...hunk.querySelectorAll(side)].filter((l) => l.querySelector("mark"));
            const [old, now] = [marked(".old"), marked(".new")];
            if (old.length !== 1 || now.length !== 1) return [];
            return [[old[0], now[0]].map((line) => line.getBoundingClientRect().y)];
        })"""
    )
    assert pairs and all(left == right for left, right in pairs)


def test_a_line_in_a_fold_is_shown_when_it_is_addressed(opened):
    page = opened(STEP, **PHONE)
    line = page.locator(".diff details:not(.doc) .both[id]").first
    expect(line).to_be_hidden()
    page.goto(f"{page.url}#{line.get_attribute('id')}")
    expect(line).to_be_in_viewport()


def test_any_two_rungs_are_compared(opened):
    page = opened("compare.html", **PHONE)
    page.get_by_label("From").select_option("v4_rope_alibi")
    page.get_by_label("to", exact=True).select_option("v1_mlp")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("h1")).to_have_text("v1 → v4")


def test_the_same_rung_twice_is_told(opened):
    page = opened("compare.html", **PHONE)
    page.get_by_label("From").select_option("v9_rlhf")
    expect(page.get_by_role("status")).to_have_text("v9_rlhf twice: choose two that differ.")
    page.get_by_role("button", name="Compare").click()
    assert page.url.endswith("compare.html")
    page.get_by_label("From").select_option("v4_rope_alibi")
    expect(page.get_by_role("status")).to_have_text("")
    expect(page.locator(".pairs")).to_be_hidden()


def test_changes_are_counted_and_the_current_one_is_marked(opened):
    for size in (PHONE, WIDE):
        page = opened(STEP, **size)
        count = page.locator(".diff .hunk:visible").count()
        counter, previous = page.locator("#at-change"), page.get_by_role("button", name="Previous change")
        expect(counter).to_have_text(f"{count} changes")
        for _ in range(count + 2):  # the end of the page keeps no change from its turn
            page.keyboard.press("j")
        expect(counter).to_have_text(f"change {count} of {count}")
        expect(page.locator(".hunk.now")).to_be_in_viewport()
        expect(previous).to_be_in_viewport(ratio=1)
        previous.dispatch_event("click")  # a click as Playwright does it scrolls back to where the bar began
        expect(counter).to_have_text(f"change {count - 1} of {count}")
        expect(page.locator(".hunk.now")).to_have_count(1)
        bar = page.locator(".bar").bounding_box()
        assert bar["y"] == 0 and bar["height"] < 60 and (size is WIDE or bar["width"] == 390)


def test_begin_is_seen_at_once(opened):
    page = opened("index.html", viewport={"width": 1280, "height": 800})
    expect(page.get_by_role("link", name="Begin")).to_be_in_viewport(ratio=1)


def test_wide_tables_show_that_they_go_on_and_links_can_be_hit(opened):
    page = opened("guide.html", **PHONE)
    assert "local" in page.locator(".scroll").first.evaluate("e => getComputedStyle(e).backgroundAttachment")
    for url in ("index.html", "guide.html", "logs/week_3.html"):
        page = opened(url, **PHONE)
        heights = page.evaluate(
            """[...document.querySelectorAll(":is(td, th, figcaption) a")]
                .map((link) => link.getBoundingClientRect().height)"""
        )
        assert heights and min(heights) >= 24


def test_what_is_folded_is_printed(opened):
    page = opened("logs/week_3.html", **WIDE)
    answers = page.locator("article details")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert answers.count() == page.locator("article details[open]").count() > 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not page.locator("article details[open]").count()
    page = opened("logs/week_3.html", color_scheme="dark", **WIDE)
    page.emulate_media(media="print")
    assert page.locator("article img").first.evaluate("e => getComputedStyle(e).filter") == "none"


def test_a_question_is_searched_by_its_telling_words(opened):
    page = opened("search.html?q=why+do+we+divide+by+sqrt%3F", **PHONE)
    found, status = page.locator("#found li"), page.get_by_role("status")
    expect(found.first).to_contain_text(re.compile("divide", re.I))
    page.get_by_role("searchbox").fill("rope qqzz zzqq")
    expect(status).to_contain_text("Some of them")
    expect(found.first).to_contain_text(re.compile("rope", re.I))
    page.get_by_role("searchbox").fill("masked_fill")
    part = page.locator("#found .mono p").first
    assert "mono" in part.evaluate("e => getComputedStyle(e).fontFamily").lower()
    page.get_by_role("searchbox").fill("qqzz zzqq")
    expect(page.get_by_role("main").get_by_role("link", name="concepts index")).to_be_visible()


def test_the_search_finds_logs_and_code(opened):
    page = opened("index.html", **PHONE)
    page.get_by_role("searchbox").fill("causal mask")
    page.keyboard.press("Enter")
    found = page.locator("#found li")
    expect(found.first).to_contain_text("causal mask")
    page.get_by_role("searchbox").fill("masked_fill")
    expect(found.filter(has_text="SelfAttentionHead").first).to_be_visible()
    page.get_by_role("searchbox").fill("<b>nosuchthing")
    expect(page.get_by_role("status")).to_have_text("Nothing found.")


def test_the_theme_is_switched_and_kept(opened):
    page = opened("index.html", color_scheme="light", **WIDE)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.get_by_role("button", name="Theme").click()
    assert page.evaluate(paper) == light
    page.get_by_role("button", name="Theme").click()
    dark = page.evaluate(paper)
    assert dark != light
    page.reload()
    assert page.evaluate(paper) == dark


def test_all_is_there_without_javascript(opened):
    page = opened(STEP, java_script_enabled=False, **WIDE)
    page.get_by_text("37 unchanged lines").click()
    expect(page.locator("#b20")).to_be_visible()
    page.get_by_role("link", name="SelfAttentionHead").click()
    expect(page.locator(":target")).to_contain_text("class SelfAttentionHead")
