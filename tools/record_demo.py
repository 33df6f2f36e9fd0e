"""Record a walkthrough of the page and of a diff in a real browser: python tools/record_demo.py

It writes the film to runs/demo/demo.mp4, README's animation to logs/demo.gif and a still picture to
logs/week_12_page.png. Needs requirements-dev.txt, Chromium, and the models of all rungs in runs/.

It starts `python serve.py`, builds the site, and does what a visitor would do. Nothing is sped up: Chromium
sends a picture whenever the page changes, with its time, and ffmpeg (from imageio-ffmpeg) makes a film of
them. The animation is the film's first scene.
"""

import argparse
import base64
import io
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import imageio_ffmpeg
from PIL import Image
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
SIZE = {"width": 1280, "height": 960}  # pixels
ARGS = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
# Where the mouse is, which Chromium does not draw into its pictures, and what is being shown.
OVERLAY = """
const style = document.createElement("style");
style.textContent = `#mouse {position: fixed; z-index: 9999; width: 18px; height: 18px; margin: -9px;
  border-radius: 50%; background: #e06c2b99; pointer-events: none}
#caption {position: fixed; z-index: 9998; bottom: 0; left: 0; right: 0; padding: 12px 24px;
  pointer-events: none; font: 22px system-ui, sans-serif; color: white; background: #1f2937ee;
  text-align: center}`;
const mouse = document.createElement("div"), caption = document.createElement("div");
mouse.id = "mouse"; caption.id = "caption"; caption.ariaHidden = true;
document.body.append(style, mouse, caption);
addEventListener("mousemove", event => {
  mouse.style.left = event.clientX + "px";
  mouse.style.top = event.clientY + "px";
});
"""


class Film:
    """The pictures that Chromium sends of a page, in a folder, each with its time."""

    def __init__(self, page, folder):
        self.page, self.folder, self.shots, self.begin = page, folder, [], {}
        self.chromium = page.context.new_cdp_session(page)
        self.chromium.on("Page.screencastFrame", self.keep)
        self.chromium.send("Page.startScreencast", {"format": "png"})

    def keep(self, shot):
        """Write one picture; Chromium sends the next when it is told that this one has come."""
        path = self.folder / f"{len(self.shots):06}.png"
        path.write_bytes(base64.b64decode(shot["data"]))
        self.shots.append((shot["metadata"]["timestamp"], path))
        self.chromium.send("Page.screencastFrameAck", {"sessionId": shot["sessionId"]})

    def scene(self, name, url=None):
        """A scene begins, on another page if there is a url."""
        if url:
            self.page.goto(url)
            expect(self.page.locator("h1").first).to_be_visible()
            self.page.evaluate(OVERLAY)
            self.wait(0.3)
        self.begin[name] = time.time()

    def say(self, text):
        """Show a caption from here on."""
        self.page.evaluate("text => document.getElementById('caption').textContent = text", text)

    def wait(self, seconds):
        """Let the page go on for so long."""
        self.page.wait_for_timeout(1000 * seconds)

    def click(self, place):
        """Move the mouse to an element, as one would, and click."""
        place.scroll_into_view_if_needed()
        box = place.bounding_box()
        self.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=15)
        self.wait(0.4)
        place.click()

    def write(self, place, text):
        """Type a text, as one would, in the place of what is there."""
        self.click(place)
        place.press("ControlOrMeta+a")
        place.press_sequentially(text, delay=45)

    def scroll(self, pixels, seconds):
        """Scroll down, or up, evenly."""
        steps = int(20 * seconds)
        for _ in range(steps):
            self.page.mouse.wheel(0, pixels / steps)
            self.wait(seconds / steps)

    def save(self, path):
        """Make a film of all pictures, 15 a second."""
        self.chromium.send("Page.stopScreencast")
        ends = [*self.shots, (time.time(), None)]
        lines = [f"file '{a[1].name}'\nduration {max(b[0] - a[0], 0.001):.4f}" for a, b in pairwise(ends)]
        (self.folder / "list.txt").write_text("\n".join([*lines, f"file '{self.shots[-1][1].name}'"]))
        form = "fps=15,scale=1280:-2:flags=lanczos,format=yuv420p"
        ffmpeg("-f", "concat", "-i", self.folder / "list.txt", "-vf", form, "-crf", "20", path)


def ffmpeg(*args):
    """Run ffmpeg; exits with what it says where it fails."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, args)]
    if (process := subprocess.run(command, capture_output=True, text=True)).returncode:
        sys.exit(f"error: ffmpeg has failed: {process.stderr.strip()}")


def cut(film, start, seconds, path):
    """Cut an animation out of a film, 6 pictures a second, of 48 colours; the last stays for 3 seconds."""
    form = "tpad=stop_mode=clone:stop_duration=3,fps=6,scale=900:-1:flags=lanczos,split[a][b];"
    form += "[a]palettegen=max_colors=48:stats_mode=full[p];"
    form += "[b][p]paletteuse=dither=none:diff_mode=rectangle"
    ffmpeg("-ss", f"{start:.2f}", "-t", f"{seconds:.2f}", "-i", film, "-filter_complex", form, path)


@contextmanager
def served(runs):
    """`python serve.py` while this lasts: its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, ROOT / "serve.py", "--runs", runs, "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT) as server:
        try:
            while True:
                if server.poll() is not None:
                    sys.exit("error: serve.py has ended")
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.2)
            yield address
        finally:
            server.terminate()


def still(page, path):
    """A picture of the whole page, in 64 colours."""
    hide = "#mouse, #caption {display: none}"
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True, style=hide))).convert("RGB")
    picture.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def ladder(film):
    """One prompt, every rung."""
    page = film.page
    film.say("One prompt, continued by every rung of the ladder")
    film.wait(1)
    film.write(page.get_by_label("Prompt").first, "JULIET:\nO my love")
    film.click(page.get_by_role("button", name="Continue"))
    cards = page.locator(".rung")
    cards.first.evaluate("card => card.scrollIntoView({behavior: 'smooth'})")
    begun = cards.filter(has_text=re.compile("tokens/s|cannot read"))
    expect(begun).to_have_count(cards.count(), timeout=60_000)
    before, texts = [], cards.all_text_contents()
    while before != texts:  # until all have ended
        film.wait(1)
        before, texts = texts, cards.all_text_contents()


def explore(film):
    """What comes next, and how likely."""
    page = film.page
    film.scroll(600, 4)
    film.say("From a table of pairs at the top to a model that answers: each is one file")
    film.wait(4)
    film.scroll(-1500, 2)
    film.click(page.get_by_role("tab", name="Next token"))
    film.say("What a model draws from: the probability of each next token")
    film.wait(4)
    for _ in range(3):
        film.click(page.get_by_role("radio").first)
        film.wait(2)
    film.say("A low temperature keeps the likeliest")
    slider = page.get_by_role("slider", name="temperature").last
    film.click(slider)
    for _ in range(6):
        slider.press("ArrowLeft")
        film.wait(0.4)
    film.wait(3)
    film.say("What a head reads from")
    film.scroll(900, 3)
    film.wait(4)
    film.write(page.get_by_label("head", exact=True), "3")
    film.wait(5)
    film.scroll(-2000, 2)


def converse(film):
    """A model that answers, and one that has learned what is preferred."""
    page = film.page
    film.click(page.get_by_role("tab", name="Chat"))
    film.say("Fine-tuned to answer (v8), and to answer as somebody prefers (v9)")
    for text in ("Good morrow, cousin. Answer as ROMEO.", "What say you of the king? Answer as JULIET."):
        film.write(page.get_by_label("You (Enter sends)"), text)
        page.keyboard.press("Enter")
        film.wait(8)


def ask(film):
    """A question that the model could not answer by itself."""
    page = film.page
    film.click(page.get_by_role("tab", name="Ask"))
    film.say("Looked up first, then answered")
    film.write(page.get_by_label("Question"), "Who says: Asses are made to bear")
    page.keyboard.press("Enter")
    expect(page.locator(".passage").first).to_be_visible(timeout=60_000)
    film.wait(6)


def compare(film):
    """What one idea adds."""
    film.say("What attention adds: the diff between two files is the lesson")
    film.wait(4)
    film.page.locator("#diff").evaluate("part => part.scrollIntoView({behavior: 'smooth'})")
    film.wait(3)
    film.scroll(2600, 16)
    film.wait(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the models")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo" / "demo.mp4", help="the film")
    parser.add_argument(
        "--animation", type=Path, default=ROOT / "logs" / "demo.gif", help="README's animation"
    )
    parser.add_argument("--still", type=Path, default=ROOT / "logs" / "week_12_page.png", help="a picture")
    flags = parser.parse_args()
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, served(flags.runs.resolve()) as url:
        site, shots = Path(folder, "site"), Path(folder, "shots")
        shots.mkdir()
        subprocess.run([sys.executable, ROOT / "tools" / "build_site.py", "--out", site], check=True)
        with sync_playwright() as playwright:
            path = shutil.which("chromium") or shutil.which("chromium-browser")
            browser = playwright.chromium.launch(executable_path=path, args=ARGS)
            film = Film(browser.new_page(viewport=SIZE, color_scheme="light"), shots)
            film.scene("ladder", url)
            ladder(film)
            still(film.page, flags.still)
            film.scene("explore")
            explore(film)
            converse(film)
            ask(film)
            film.scene("compare", (site / "diff" / "v1_mlp-v2_attention.html").as_uri())
            compare(film)
            film.save(flags.out)
            browser.close()
        first = film.shots[0][0]
        cut(
            flags.out,
            film.begin["ladder"] - first,
            film.begin["explore"] - film.begin["ladder"],
            flags.animation,
        )
    for path in (flags.out, flags.animation, flags.still):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
