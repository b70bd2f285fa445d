"""Makes docs/playground.html: tiny, live in a browser, in one file that needs no network and no server.

    python docs/playground.py                 write the page
    python docs/playground.py --screenshot    and docs/playground.png, with chromium and playwright
    python docs/playground.py --check         exit status 1 if the page is older than what it is made of
    python docs/playground.py --time          how long an answer takes here, the picture at rest and while it changes

It is made of playground.template.html (the page), playground.llava.js (LLaVA in JavaScript, to be read beside the
Python) and the three files behind it, playground.page.js (what a person does) and the files of tiny/. The weights go in
as they are stored.
"""

import argparse
import base64
import contextlib
import json
import re
import shutil
import statistics
import sys
import textwrap
from pathlib import Path

DOCS = Path(__file__).resolve().parent
TINY = DOCS.parent / "tiny"
PAGE = DOCS / "playground.html"
PORT = ("llava", "torch", "weights", "worker")  # the scripts that run the model, in a worker of the browser
CONFIGS = {  # as the page calls them → the file in tiny/
    "config": "config.json",
    "generation": "generation_config.json",
    "preprocessor": "preprocessor_config.json",
    "tokenizer": "tokenizer.json",
}
NEEDED = {  # what the JavaScript takes for granted: it has no other branch
    "config.model_type": "llava",
    "config.vision_feature_select_strategy": "default",
    "config.text_config.model_type": "llama",
    "config.text_config.sliding_window": None,
    "config.text_config.tie_word_embeddings": False,
    "config.vision_config.model_type": "clip_vision_model",
    "config.vision_config.hidden_act": "quick_gelu",
    "preprocessor.resample": 3,
    "preprocessor.do_pad": False,
    "tokenizer.pre_tokenizer": None,
    "tokenizer.model.type": "BPE",
    "tokenizer.model.byte_fallback": True,
}


def check(configs):
    """Refuse a tiny that the page would compute wrongly. Raises ValueError."""
    for path, wanted in NEEDED.items():
        found = configs
        for key in path.split("."):
            found = found[key]
        if found != wanted:
            raise ValueError(f"{path} of tiny is {found!r}, and the page can do only {wanted!r}")


def script(name):
    """One of the scripts. Raises ValueError if it would end before its end."""
    text = (DOCS / f"playground.{name}.js").read_text(encoding="utf-8").strip()
    if "</script" in text.lower():
        raise ValueError(f"playground.{name}.js: the sign that ends a script stands in it")
    return text


def build(tiny=TINY):
    """The page as a string."""
    configs = {name: json.loads((tiny / file).read_text(encoding="utf-8")) for name, file in CONFIGS.items()}
    check(configs)
    parts = {
        "port": "\n\n".join(script(name) for name in PORT),
        "page": script("page"),
        "configs": json.dumps(configs, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        "weights": textwrap.fill(base64.b64encode((tiny / "model.safetensors").read_bytes()).decode(), 20_000),
    }
    template = (DOCS / "playground.template.html").read_text(encoding="utf-8")
    return re.sub(r"%%(\w+)%%", lambda found: parts[found[1]], template)


@contextlib.contextmanager
def opened():
    """The page in chromium, when it has answered some times: a browser compiles what it runs often."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1180, "height": 720})
        tab.goto(PAGE.as_uri())
        tab.wait_for_selector("body[data-ready]", state="attached")
        for _ in range(10):
            answer(tab)
        yield tab
        browser.close()


def answer(tab, x=0.3):
    """[ms to the first word, ms to the last] of a description, seen from the page; x: where the star is."""
    return tab.evaluate(
        """async x => {
          const things = state.scene.things.map(thing => (thing.shape === "star" ? { ...thing, x } : thing));
          const picture = llava.paint({ ...state.scene, things }), began = performance.now(), marks = [];
          await llava.answer(picture, "Describe the image.", {}, () => marks.push(performance.now() - began));
          return [marks[0], marks.at(-1)];
        }""",
        x,
    )


def times(number=20):
    """Print the medians of so many answers, at rest and with another place of the star each time."""
    with opened() as tab:
        changing = [0.2 + 0.6 * i / number for i in range(number)]
        for words, places in (("at rest", [0.3] * number), ("changing", changing)):
            first, last = zip(*(answer(tab, x) for x in places), strict=True)
            print(f"{words:<8}  first word {statistics.median(first):4.0f} ms, whole {statistics.median(last):4.0f} ms")


def screenshot():
    """The page while a shape is moved, at a word that tells where it is."""
    with opened() as tab:
        star = tab.locator(".thing[aria-label*=star]")
        star.hover()
        tab.mouse.down()
        board = tab.locator("#board").bounding_box()
        tab.mouse.move(board["x"] + 0.8 * board["width"], board["y"] + 0.82 * board["height"], steps=20)
        tab.wait_for_function("!running && !wanted")
        tab.mouse.up()
        tab.locator("#answer button", has_text="star").click()
        tab.mouse.move(2, 2)
        tab.wait_for_timeout(1000)
        tab.screenshot(path=PAGE.with_suffix(".png"))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--screenshot", action="store_true", help="make docs/playground.png as well")
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    parser.add_argument("--time", action="store_true", help="measure the page as it is, with chromium and playwright")
    options = parser.parse_args(arguments)
    if options.time:
        times()
        return 0
    page = build()
    if options.check:
        stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page
        print(f"{PAGE.name} is {'older than what it is made of: run docs/playground.py' if stale else 'up to date'}")
        return int(stale)
    PAGE.write_text(page, encoding="utf-8", newline="\n")
    print(f"{PAGE.name}: {PAGE.stat().st_size / 1e6:.2f} MB")
    if options.screenshot:
        screenshot()
    return 0


if __name__ == "__main__":
    sys.exit(main())
