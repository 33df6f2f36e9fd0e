"""The page of serve.py in a real browser: every tab, long prompts, two windows, a phone, a key."""

import copy
import shutil
import time

import imageio_ffmpeg
import pytest
import record_demo
from PIL import Image
from playwright.sync_api import Error, expect, sync_playwright
from test_serve import TEXT, Running, make_runs

import serve
from bpe_tokenizer import BPETokenizer

ARGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
ARGS += " --disable-component-update --disable-sync"
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of small models."""
    return make_runs(tmp_path_factory.mktemp("shown"))


@pytest.fixture(scope="module")
def running(runs):
    """A server of all models."""
    server = Running(runs, max_tokens=200)
    yield server
    server.stop()


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
def opened(chromium, running):
    """A function that opens the page in a new window; none may complain or ask for something elsewhere."""
    contexts, elsewhere, errors = [], [], []

    def open_one(tab="Ladder", url=running.url, **settings):
        contexts.append(chromium.new_context(**settings))
        page = contexts[-1].new_page()
        own = (url, "data:", "blob:")
        page.on("request", lambda asked: None if asked.url.startswith(own) else elsewhere.append(asked.url))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.get_by_role("tab", name=tab, exact=True).click()
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not elsewhere and not errors


def written(running, name, prompt, **changes):
    """What the API says to a prompt of the tab Ladder."""
    asked = dict(temperature=0.8, seed=1, max_tokens=150) | changes
    return running.openai.completions.create(model=name, prompt=prompt, **asked).choices[0].text


def texts(page):
    """{name of a model: what its card shows}, when all are done."""
    cards = page.locator(".rung")
    expect(cards.filter(has_text="tokens/s").or_(cards.filter(has_text="cannot read"))).to_have_count(10)
    return {
        card.get_attribute("aria-label"): card.locator("pre").text_content()
        for card in (cards.nth(i) for i in range(10))
    }


def is_done(page, running):
    """Wait until no model is at work."""
    while any(model.working or model.waiting for model in running.models.values()):
        page.wait_for_timeout(100)
    page.wait_for_timeout(500)


def test_the_ladder_writes_what_the_api_writes(opened, running):
    page = opened()
    expect(page.locator(".rung h3")).to_have_text(list(serve.RUNGS))
    expect(page.locator(".rung").first).to_contain_text("a bigram table")
    page.get_by_label("Prompt").fill("JULIET:\nGood")
    page.get_by_role("button", name="Continue").click()
    texts(page)
    is_done(page, running)
    expected = {name: "JULIET:\nGood" + written(running, name, "JULIET:\nGood") for name in serve.RUNGS}
    assert texts(page) == expected
    facts = page.locator(".rung", has_text="v5_gpt2").first
    metrics = running.models["v5_gpt2"].metrics
    expect(facts).to_contain_text(f"val loss {metrics['val_loss']:.3f}")
    expect(facts).to_contain_text(f"{metrics['bits_per_char']:.2f} bits/char")
    expect(facts).to_contain_text(f"{running.models['v5_gpt2'].params:,} parameters")


def test_two_windows_at_once_get_their_own_texts(opened, running):
    pages = {prompt: opened() for prompt in ("ROMEO:\n", "JULIET:\n")}
    for prompt, page in pages.items():
        page.get_by_label("Prompt").fill(prompt)
        page.get_by_label("Prompt").press("Shift+Enter")  # by keyboard
    for page in pages.values():
        texts(page)
        is_done(page, running)
    for prompt, page in pages.items():
        assert texts(page) == {name: prompt + written(running, name, prompt) for name in serve.RUNGS}


def test_long_prompts_and_characters_that_a_vocabulary_lacks(opened, running):
    page, prompt = opened(), TEXT * 10
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Continue").click()
    texts(page)
    is_done(page, running)
    cut = prompt[:20_000]
    assert page.get_by_label("Prompt").input_value() == cut
    assert texts(page)["v3_gpt"] == cut + written(running, "v3_gpt", cut)
    page.get_by_label("Prompt").fill("ROMEO: 日本")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(".rung").filter(has_text="cannot read this prompt")).to_have_count(10)
    page.get_by_label("Prompt").fill("ROMEO")
    page.get_by_role("button", name="Continue").click()
    texts(page)


def test_the_next_token_is_chosen_by_a_click(opened, running):
    page, model = opened("Next token"), running.models["v9_rlhf"]
    rows = serve.next_tokens(model, "ROMEO:\nI", 1.0, 0, 1.0)
    table = page.get_by_role("table", name="next tokens")
    expect(table.locator("tr")).to_have_count(12)
    for i, (_, text, _, after) in enumerate(rows):
        expect(table.locator("tr").nth(i)).to_contain_text(serve.shown(text))
        expect(table.locator("tr").nth(i)).to_contain_text(f"{after:.2%}")
    expect(page.locator("img[alt]").first).to_be_visible()
    page.get_by_role("radio").nth(1).check()
    prompt = page.get_by_role("tabpanel").get_by_label("Prompt").last
    expect(prompt).to_have_value("ROMEO:\nI" + rows[1][1])
    rows = serve.next_tokens(model, "ROMEO:\nI" + rows[1][1], 1.0, 0, 1.0)
    expect(table.locator("tr").first).to_contain_text(f"{rows[0][3]:.2%}")
    page.get_by_label("number input for top-k").fill("2")
    page.get_by_label("number input for top-k").press("Enter")
    expect(page.get_by_role("radio")).to_have_count(2)


def test_the_models_that_answer_do_so_beside_each_other(opened, running):
    page = opened("Chat")
    for n, question in enumerate(("Good morrow", "Good cousin")):
        page.get_by_label("You").fill(question)
        page.get_by_label("You").press("Enter")
        expect(page.locator(".bot.message")).to_have_count(2 * n + 2)
        is_done(page, running)
    asked = dict(messages=[{"role": "user", "content": "Good morrow"}], temperature=0.7, seed=1)
    for i, name in enumerate(("v8_lora", "v9_rlhf")):
        answer = running.openai.chat.completions.create(model=name, **asked).choices[0].message.content
        told = page.locator(".bubble-wrap").nth(i).locator(".bot.message").first
        assert "".join(told.text_content().split()) == "".join(answer.split())
    page.get_by_label("You (Enter sends)").press("Enter")  # nothing: nobody answers
    page.wait_for_timeout(1000)
    expect(page.locator(".bot.message")).to_have_count(4)
    page.get_by_role("button", name="Begin anew").click()
    expect(page.locator(".bot.message")).to_have_count(0)


def test_a_question_is_answered_with_its_passages(opened, tmp_path, monkeypatch):
    sayings = ("the sun is up, my lord", "a horse was here", "no rose grows now", "who goes there")
    text = "".join(f"{name}:\nSir, {said}.\n\n" for said in sayings for name in ("ROMEO", "JULIET"))
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    page = opened("Ask")
    page.get_by_label("Question").fill("Who says: no rose grows now?")
    page.get_by_label("Question").press("Enter")
    expect(page.locator(".passage")).to_have_count(3)
    expect(page.locator(".passage.read")).to_contain_text("Sir, no rose grows now.")
    page.get_by_label("Question").fill("?")
    page.get_by_label("Question").press("Enter")
    expect(page.get_by_label("Answer")).to_have_value("(the question is empty)")


def test_what_a_card_shows_is_text_and_no_html(running):
    shown = serve.card(running.models["v0_bigram"], "<b>&", "<script>")
    assert "<b>&lt;b&gt;&amp;</b>&lt;script&gt;</pre>" in shown


def test_a_card_says_what_its_numbers_are_of(running):
    models = running.models
    assert "per character" in serve.card(models["v4_rope_alibi"])
    of_words = copy.copy(models["v8_lora"])
    of_words.metrics, of_words.tokenizer = {"val_loss": 3.0}, BPETokenizer.train("good good", 257, ())
    assert "val loss of answers 3.000 per token" in serve.card(of_words)
    job = serve.Job(models["v8_lora"], [1], None, None)
    assert "has ended" not in serve.card(models["v8_lora"], job=job)
    job.reason = "stop"
    assert "has ended its text" in serve.card(models["v8_lora"], job=job)


def test_the_losses_of_plain_weights_are_not_shown_for_quantized_ones(runs):
    models = serve.find_models(serve.Config(runs=str(runs), quantize="int8"))
    for name in ("v6_amp_ddp", "v9_rlhf"):
        told = serve.card(models[name])
        assert "weights in int8" in told and "val loss" not in told
    assert "val loss" in serve.card(models["v3_gpt"])


def test_a_conversation_that_a_browser_sends_back_is_taken_as_text(running, tmp_path):
    (tmp_path / "secret.txt").write_text("top secret", encoding="utf-8")
    file = {"path": str(tmp_path / "secret.txt"), "meta": {"_type": "gradio.FileData"}}
    page = running.http.get("/config").json()
    talk = next(f["id"] for f in page["dependencies"] if len(f["inputs"]) == 3 and len(f["outputs"]) == 3)
    for part in ({"type": "file", "file": file}, {"type": "component", "component": "image", "value": file}):
        data = ["Hi", [{"role": "user", "content": [part]}], []]
        body = {"data": data, "fn_index": talk, "session_hash": "abc"}
        assert running.http.post("/gradio_api/queue/join", json=body).status_code == 200
        with running.http.stream("GET", "/gradio_api/queue/data?session_hash=abc") as answer:
            told = "".join(answer.iter_text())
        assert "process_completed" in told and "secret" not in told


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(scheme, opened):
    page = opened(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    for tab in ("Ladder", "Next token", "Chat", "Ask"):
        page.get_by_role("tab", name=tab, exact=True).click()
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(",")[:3])) < 200) == (scheme == "dark"), colour


def test_the_tabs_and_the_button_are_reached_by_keyboard(opened):
    page, seen = opened(), []
    page.keyboard.press("Home")
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.innerText || document.activeElement.tagName"))
    assert "Continue" in seen and "TEXTAREA" in seen
    assert "Next token" in seen
    page.get_by_role("tab", name="Next token").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("tab", name="Next token")).to_have_attribute("aria-selected", "true")


def test_a_browser_gives_the_key_as_a_password(chromium, runs, monkeypatch):
    monkeypatch.setattr(serve, "KEY", "secret")
    server = Running(runs)
    try:
        for password, status in {"wrong": 401, "secret": 200}.items():
            credentials = {"username": "any", "password": password}
            context = chromium.new_context(http_credentials=credentials)
            page = context.new_page()
            assert page.goto(server.url).status == status
            if status == 200:
                page.get_by_label("Prompt").first.fill("ROMEO")
                page.get_by_role("button", name="Continue").click()
                texts(page)
            context.close()
    finally:
        server.stop()


def test_a_film_lasts_as_long_as_what_it_shows(chromium, tmp_path):
    page = chromium.new_page(viewport={"width": 640, "height": 400})
    page.set_content("<button>Go</button><input aria-label='Name' style='margin-top: 900px'>")
    page.evaluate(record_demo.OVERLAY)
    film = record_demo.Film(page, tmp_path)
    film.scene("first")
    film.say("A caption")
    film.click(page.get_by_role("button"))
    film.write(page.get_by_label("Name"), "JULIET")
    film.wait(1)
    lasted = time.time() - film.shots[0][0]
    film.save(tmp_path / "film.mp4")
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "film.mp4"))
    assert seconds == pytest.approx(lasted, abs=0.7) and seconds > 1
    assert frames == pytest.approx(15 * seconds, abs=2)
    record_demo.cut(tmp_path / "film.mp4", 0.5, 1.0, tmp_path / "cut.gif")
    with Image.open(tmp_path / "cut.gif") as animation:
        assert animation.n_frames > 1 and animation.size[0] == 900
    assert page.get_by_label("Name").input_value() == "JULIET"
    page.close()


def test_the_walkthrough_finds_all_that_it_shows(chromium, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(record_demo.ROOT)
    monkeypatch.setattr(
        record_demo.Film, "wait", lambda film, seconds: film.page.wait_for_timeout(20 * seconds)
    )
    server = Running(runs, max_tokens=200)  # one of its own, which has not opened another text
    page = chromium.new_page(viewport=record_demo.SIZE)
    film = record_demo.Film(page, tmp_path)
    film.scene("ladder", server.url)
    record_demo.ladder(film)
    record_demo.still(page, tmp_path / "still.png")
    with Image.open(tmp_path / "still.png") as picture:
        assert picture.size[0] == 1280 and picture.size[1] > 800
    record_demo.explore(film)
    expect(page.get_by_label("Prompt").last).not_to_have_value("ROMEO:\nI")
    record_demo.converse(film)
    expect(page.locator(".bot.message")).to_have_count(4)
    record_demo.ask(film)
    expect(page.locator(".passage.read")).to_contain_text("Asses are made to bear")
    page.close()
    server.stop()
