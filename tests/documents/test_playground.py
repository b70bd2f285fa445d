"""docs/playground.html: tiny in a browser, held against the Python by tokens and stages, and used as people use it.

Needs chromium and playwright, which the project itself does not; without them only the page's file is looked at.
"""

import base64
import importlib.util
import json
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import parity
import PIL
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import llava

ROOT = Path(__file__).resolve().parents[2]
DOCS, TINY = ROOT / "docs", ROOT / "tiny"
CLOSE = 1e-4  # two tokens whose logits lie no further apart may fall either way
PILLOW = int(PIL.__version__.split(".")[0])


def load_script(path):
    spec = importlib.util.spec_from_file_location(f"documents_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


playground = load_script(DOCS / "playground.py")
scenes = load_script(TINY / "scenes.py")

# ----------------------------------------------------------------------------------------------------------------
# The file


def test_the_page_is_made_of_what_is_there_now():
    assert playground.main(["--check"]) == 0, "run docs/playground.py"


def test_a_stale_page_is_noticed(tmp_path, monkeypatch, capsys):
    stale = tmp_path / "playground.html"
    monkeypatch.setattr(playground, "PAGE", stale)
    assert playground.main(["--check"]) == 1  # there is none
    assert playground.main([]) == 0 and playground.main(["--check"]) == 0
    page = stale.read_text(encoding="utf-8")
    stale.write_text(page.replace("A picture becomes words", "Something older"), encoding="utf-8")
    assert playground.main(["--check"]) == 1
    assert "run docs/playground.py" in capsys.readouterr().out


def test_a_page_of_other_weights_is_stale(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    assert playground.build(folder) == playground.build()
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert playground.build(folder) != playground.build()


def test_a_tiny_that_the_page_cannot_run_is_refused(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["sliding_window"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"text_config.sliding_window of tiny is 16"):
        playground.build(folder)


def test_the_page_is_one_small_file_that_fetches_nothing():
    page = playground.PAGE.read_text(encoding="utf-8")
    assert len(page.encode()) < 6_000_000
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", page)
    assert not re.findall(r"\b(?:fetch|XMLHttpRequest|importScripts|WebSocket|EventSource)\s*\(", page)
    for link in re.findall(r'href="([^"#:]+)"', page):
        assert (DOCS / link).exists(), link


def test_lines_of_the_scripts_fit_beside_the_python():
    for name in (*playground.PORT, "page"):
        for number, line in enumerate(playground.script(name).splitlines(), start=1):
            assert len(line) <= 120, f"playground.{name}.js:{number}"
    assert len(playground.script("llava").splitlines()) <= 400


def test_names_and_order_of_the_port_are_those_of_the_python():
    found, own = [], {"resize", "resample", "bicubic", "head"}  # Pillow's; what in the Python is a layer
    for module in ("vision", "llama", "llava"):
        part = playground.script("llava").split(f"const {module} = {{\n")[1].split("\n};")[0]
        names = re.findall(r"^  \*?(\w+)(?:\(.*\) \{$|: )", part, flags=re.MULTILINE)
        python = re.findall(r"^ *(?:def|class) (\w+)", (ROOT / f"{module}.py").read_text(), flags=re.MULTILINE)
        there = iter({"MLP": "mlp", "RMSNorm": "rms_norm"}.get(name, name).lower() for name in python)
        missing = [name for name in names if name not in own and name not in there]  # takes from `there` in order
        assert missing == [], module
        found += names
    assert len(found) > 30 and own <= set(found)


def test_what_the_page_says_of_tiny_is_so():
    page = (DOCS / "playground.template.html").read_text(encoding="utf-8")
    honest = " ".join(re.sub(r"<[^>]+>", "", page.split('id="honest"')[1].split("</main>")[0]).split())
    assert "one to four shapes, six colours, two sizes, each in one of nine places" in honest
    assert (len(scenes.NUMBERS) - 1, len(scenes.COLOURS), len(scenes.SIZES), len(scenes.PLACES)) == (4, 6, 2, 9)
    with safe_open(TINY / "model.safetensors", "pt") as file:
        numbers = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert "more than 4,000 times as many numbers" in honest and 7_063_427_072 / numbers > 4000  # LLaVA-1.5-7B
    assert f"{numbers / 1e6:.1f} million" in page
    assert "A light is not a reason" in honest and "Sure is not right" in honest


# ----------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright, see requirements-dev.txt")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs chromium on the PATH, such as Debian's package of that name")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Tab:
    """The page in a tab of its own; whatever it complains about is kept."""

    def __init__(self, browser, before="", **context):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page, self.complaints, self.requests = self.context.new_page(), [], []
        self.page.set_default_timeout(120_000)
        self.page.on("console", self.heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.add_init_script(before)
        self.page.goto(playground.PAGE.as_uri())
        self.page.wait_for_selector("body[data-ready]", state="attached")

    def heard(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def run(self, script, *arguments):
        """The value of a script in the page; the arguments are called a, b, c in it."""
        return self.page.evaluate(f"async ([a, b, c]) => {{ {script} }}", list(arguments))

    def settled(self):
        """The answer that is shown once nothing is computed any more."""
        self.page.wait_for_function("!running && !wanted && state.done")
        return self.page.evaluate("state.done.text")

    def ask(self, question):
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        return self.settled()


@pytest.fixture(scope="module")
def tab(browser):
    """One tab for questions to window.llava, which leave no trace."""
    tab = Tab(browser)
    yield tab
    tab.context.close()


@pytest.fixture
def fresh(browser):
    """A tab for what a person does."""
    tab = Tab(browser)
    yield tab
    assert tab.complaints == []
    assert all(url.startswith(("file:", "blob:", "data:")) for url in tab.requests)
    tab.context.close()


@pytest.fixture(scope="module")
def tiny():
    return llava.load("tiny", device="cpu", dtype=torch.float32)


# Raw RGBA bytes, so that no decoder and no colour profile stands between the two
READ = "const read = ([w, h, s]) => new ImageData(Uint8ClampedArray.from(atob(s), x => x.charCodeAt(0)), w, h);"


def raw(image):
    return [*image.size, base64.b64encode(image.convert("RGBA").tobytes()).decode()]


def page_stages(tab, image, question, options=None):
    """window.llava.stages, as tensors."""
    found = tab.run(
        f"""{READ} const stages = await llava.stages(read(a), b, c);
        const base64 = data => {{
          const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
          let text = "";
          for (let i = 0; i < bytes.length; i += 4096) text += String.fromCharCode(...bytes.subarray(i, i + 4096));
          return btoa(text);
        }};
        return Object.entries(stages).map(([name, stage]) =>
          [name, stage.shape, base64(stage.data), stage.data.constructor.name]);""",
        raw(image), question, options or {},
    )  # fmt: skip
    assert all(kind == "Float32Array" for *_, kind in found)
    return {name: torch.from_numpy(np.frombuffer(base64.b64decode(data), np.float32).copy()).view(shape)
            for name, shape, data, _ in found}  # fmt: skip


def asked(image, question, processor):
    return processor.chat([("user", question)], [image])


def differs(model, inputs, ours, theirs):
    """Whether two answers differ at a place where the first one had no tie."""
    if ours == theirs:
        return False
    same = next(i for i, (a, b) in enumerate(zip([*ours, None], [*theirs, None], strict=False)) if a != b)
    said = torch.cat([inputs["input_ids"], torch.tensor([ours[:same]], dtype=torch.int64)], dim=1)
    logits = model(said, inputs["pixel_values"], logits_to_keep=1).logits[0, -1]
    best = logits.topk(2).values
    return bool(best[0] - best[1] > CLOSE)


def compare_answers(tab, tiny, seeds):
    """Ask page and Python the same about fresh scenes, one question each → the seeds at which they differ."""
    model, processor = tiny
    wrong = []
    for seed in seeds:
        image, questions = scenes.draw(50_000 + seed)
        _, question, _ = questions[seed % len(questions)]
        said = tab.run(f"{READ} return (await llava.answer(read(a), b)).ids;", raw(image), question)
        inputs = asked(image, question, processor)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=128)[0].tolist()
            if differs(model, inputs, ids, said):
                wrong.append((seed, question, processor.decode(ids), processor.decode(said)))
    return wrong


@pytest.mark.slow
def test_the_page_says_what_python_says(tab, tiny):
    assert compare_answers(tab, tiny, range(14)) == []


@pytest.mark.slow
def test_the_page_says_what_python_says_of_two_hundred_scenes(tab, tiny):
    assert compare_answers(tab, tiny, range(200)) == []


@pytest.mark.slow
def test_ask_answers_in_words_whatever_the_size_of_the_picture(tab, tiny):
    model, processor = tiny
    image, _ = scenes.draw(3)
    for size in ((224, 224), (61, 40), (300, 500)):
        picture = image.resize(size)
        text = tab.run(f"{READ} await llava.ready; return llava.ask(read(a), b);", raw(picture), "Describe the image.")
        ids = model.generate(**asked(picture, "Describe the image.", processor), max_new_tokens=128)
        assert text == processor.decode(ids[0])


@pytest.mark.slow
def test_it_works_where_no_worker_is_allowed(browser, tiny):
    tab = Tab(browser, before="delete window.Worker;")
    model, processor = tiny
    image, _ = scenes.draw(4)
    text = tab.run(f"{READ} return llava.ask(read(a), b);", raw(image), "Describe the image.")
    ids = model.generate(**asked(image, "Describe the image.", processor), max_new_tokens=128)
    assert text == processor.decode(ids[0]) and tab.complaints == []
    tab.context.close()


def against(stages, tmp_path, capsys):
    """tests/parity.py --against the page's stages of its own picture and question → exit status, what it printed."""
    save_file({name: tensor.contiguous() for name, tensor in stages.items()}, tmp_path / "page.safetensors")
    status = parity.main(["--dtype", "float32", "--no-gradients", "--against", str(tmp_path / "page.safetensors")])
    return status, capsys.readouterr().out


def scene_png():
    return Image.open(TINY / "scene.png")


def test_every_stage_is_pythons(tab, tmp_path, capsys):
    stages = page_stages(tab, scene_png(), parity.QUESTION)
    status, out = against(stages, tmp_path, capsys)
    assert status == 0 and "all within their bounds" in out  # 1e-5 of the largest number; ids and pixels exactly
    config = json.loads((TINY / "config.json").read_text())
    eye, voice = (config[part]["num_hidden_layers"] for part in ("vision_config", "text_config"))
    wanted = ["ids", "pixels", *(f"vision.{i}" for i in range(eye + 1)), "projector", "merge"]
    wanted += [*(f"llama.{i + 1}" for i in range(voice)), "logits"]
    assert list(stages) == wanted and f"{len(wanted)} stages" in out


@pytest.mark.slow
def test_each_bug_of_the_switch_is_found_at_its_stage(tab, tmp_path, capsys):
    bugs = tab.run("return (await llava.ready).bugs;")
    assert len(bugs) == 5
    for name, bug in bugs.items():
        status, out = against(page_stages(tab, scene_png(), parity.QUESTION, {"bug": name}), tmp_path, capsys)
        assert status == 1 and f"{bug['stage']} is the first that diverges" in out, name
    status, _ = against(page_stages(tab, scene_png(), parity.QUESTION), tmp_path, capsys)
    assert status == 0  # none of them stays


MISTAKES = [  # what stands in the scripts of the port, what is planted there, the stage at which parity.py finds it
    ("return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;", "return 0;", "pixels"),
    ("Math.exp(-1.702 * x)", "Math.exp(-1.773 * x)", "vision.1"),
    ("1 + erf(x / Math.SQRT2)", "1 + Math.tanh(0.7978845608 * (x + 0.044715 * x ** 3))", "projector"),
    ("[features, patch++]", "[features, 0 * patch++]", "merge"),
    ("=> past + t + 1,", "=> past + t + 2,", "llama.1"),
    ("first * c - second * s", "first * c + second * s", "llama.1"),
    ("* scale * weight[i] + bias[i]", "* scale * weight[i]", "vision.0"),
]


@pytest.mark.slow
def test_planted_mistakes_in_the_javascript_are_found_at_their_stage(tab, tmp_path, capsys):
    source = "\n".join(map(playground.script, playground.PORT))
    for right, wrong, stage in MISTAKES:
        assert source.count(right) == 1, right
        tab.run(
            """window.kept ??= llava.stages;
            const serve = new Function(a + "\\nreturn serve;")(), text = atob($("weights").textContent);
            const weights = Uint8Array.from(text, x => x.charCodeAt(0)).buffer;
            let hear;
            const handle = serve(message => hear(message));
            await new Promise(done => { hear = done; handle({ job: 1, load: { ...files, weights } }); });
            llava.stages = (image, question) => new Promise((done, fail) => {
              hear = message => message.error ? fail(new Error(message.error)) : done(message.done);
              handle({ job: 2, kind: "stages", image, question });
            });""",
            source.replace(right, wrong),
        )
        try:
            status, out = against(page_stages(tab, scene_png(), parity.QUESTION), tmp_path, capsys)
        finally:
            tab.run("llava.stages = kept;")
        assert status == 1 and f"{stage} is the first that diverges" in out, (right, out)


@pytest.mark.slow
def test_a_covered_and_a_shuffled_picture_reach_the_model(tab, tiny):
    model, processor = tiny
    image = scene_png()
    inputs = asked(image, parity.QUESTION, processor)
    patch, grid = model.config.vision_config.patch_size, model.vision.grid
    for change in ("cover", "shuffle"):
        stages = page_stages(tab, image, parity.QUESTION, {"change": change})
        pixels, plain = stages["pixels"], inputs["pixel_values"]
        if change == "cover":
            assert pixels.eq(0).all()
        else:  # the same patches, few of them at their place
            cut = [torch.nn.functional.unfold(x, patch, stride=patch)[0].T for x in (pixels, plain)]
            same = (cut[0][:, None] == cut[1][None]).all(-1)  # (P, P)
            assert cut[0].sort(0).values.equal(cut[1].sort(0).values) and same.any(1).all()
            assert same.diagonal().sum() < grid**2 / 2
        with torch.no_grad():
            logits = model(inputs["input_ids"], pixels).logits
        assert torch.allclose(stages["logits"], logits, atol=1e-3)


PORT = """const source = $("port").textContent + "\\nreturn { vision, llama, llava };";
const { vision, llama, llava: port } = new Function(source)();"""


@pytest.mark.slow
def test_a_picture_of_any_size_is_scaled_to_the_byte(tab, tiny):
    rng, pixels = random.Random(5), np.random.default_rng(5)
    sizes = [(56, 56), (1, 1), (3, 5), (57, 56), (640, 480), (56, 112), (112, 56), (448, 448), (100, 400), (333, 21)]
    sizes += [(rng.randint(1, 400), rng.randint(1, 400)) for _ in range(16)]
    if PILLOW < 13:  # which resizes across first, always
        sizes = [(w, h) for w, h in sizes if h <= 2 * w or w < 56]
    for n, (width, height) in enumerate(sizes):
        data = pixels.integers(0, 256, (height, width, 4), dtype=np.uint8)
        if n % 3:
            data[..., 3] = 255
        image = Image.fromarray(data, "RGBA")
        wanted = asked(image, "", tiny[1])["pixel_values"].flatten().numpy()
        found = tab.run(f"{READ} {PORT} return [...vision.preprocess(read(a), files.preprocessor)];", raw(image))
        assert np.array_equal(np.float32(found), wanted), (width, height)


@pytest.mark.slow
def test_the_tokenizer_is_pythons(tab, tiny):
    processor = tiny[1]
    rng = random.Random(2)
    texts = ["", " ", "Describe the image.", " two  spaces ", "naïve café ☃ 🎉", "</s><image><s>", "\n\n", "▁▁x"]
    texts += ["\u0000\u0001", "e\u0301"]
    letters = "abc ABC▁\n.,?!é☃🎉0<>/simage"
    texts += ["".join(rng.choices(letters, k=rng.randint(0, 40))) for _ in range(60)]
    size = processor.tokenizer.bpe.get_vocab_size()
    anything = [*range(size), *range(3, 259), *range(3, 259)]  # bytes, above all
    rows = [rng.choices(anything, k=rng.randint(0, 12)) for _ in range(150)]
    picture = Image.new("RGB", (8, 8))
    ids, decoded = tab.run(
        f"""{PORT} const model = {{ tokenizer: llama.tokenizer(files.tokenizer), config: files.config }};
        return [a.map(text => port.chat(text, model)), b.map(ids => llama.decode(ids, model.tokenizer))];""",
        texts, rows,
    )  # fmt: skip
    for text, found in zip(texts, ids, strict=True):
        assert found == asked(picture, text, processor)["input_ids"][0].tolist(), repr(text)
    for row, found in zip(rows, decoded, strict=True):
        assert found == processor.decode(row), row


@pytest.mark.slow
def test_probabilities_and_looks_are_pythons(tab, tiny):
    """What the page shows of each word: its probability, the five likeliest others, and where it looked."""
    model, processor = tiny
    image, _ = scenes.draw(11)
    inputs = asked(image, "Describe the image.", processor)
    found = tab.run(
        f"""{READ} const words = [], hear = ({{ logits, ...word }}) => words.push(word);
        const done = await llava.answer(read(a), "Describe the image.", {{}}, hear);
        return [words, done.looks.map(look => [...look]), done.share];""",
        raw(image),
    )  # fmt: skip
    words, looks, share = found
    said = [word["id"] for word in words]
    assert "".join(word["text"] for word in words if not word["end"]).strip() == processor.decode(said)
    ids = torch.cat([inputs["input_ids"], torch.tensor([said[:-1]])], dim=1)
    with torch.no_grad():
        out = model(ids, inputs["pixel_values"], output_attentions=True)
    chances = out.logits[0, -len(said) :].softmax(-1)
    for word, row in zip(words, chances, strict=True):
        assert abs(row[word["id"]] - word["p"]) < CLOSE
        others = sorted((p.item() for i, p in enumerate(row) if i != word["id"]), reverse=True)[:5]
        assert np.allclose([p for _, p in word["others"]], others, atol=CLOSE)
    first = inputs["input_ids"][0].tolist().index(model.config.image_token_index)
    patches = out.image_hidden_states.shape[1]
    weights = torch.stack(out.attentions)[:, 0].mean((0, 1))  # over blocks and heads
    rows = weights[first + patches :, first : first + patches]  # of every word behind the picture
    wanted = (rows - rows.mean(0)).clamp(min=0)[-len(said) :]
    assert np.allclose(looks, wanted.numpy(), atol=CLOSE)
    assert np.allclose(share, rows.sum(1)[-len(said) :].numpy(), atol=CLOSE)


@pytest.mark.slow
def test_what_the_canvas_draws_is_what_tiny_knows(tab):
    """Scenes of the page's own, drawn by the browser and described: nearly always rightly."""
    right, total = tab.run(
        """let seed = 1, right = 0;
        const kept = Math.random;
        Math.random = () => (seed = seed * 16807 % 2147483647) / 2147483647;
        const drawn = Array.from({ length: 40 }, randomScene);
        Math.random = kept;
        for (const scene of drawn) {
          const text = await llava.ask(llava.paint(scene), "Describe the image.");
          right += text.toLowerCase() === sentence(scene.things);
        }
        return [right, drawn.length];"""
    )
    assert right >= 0.9 * total, f"{right} of {total}"


# ----------------------------------------------------------------------------------------------------------------
# What a person does


def middle(locator):
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def on_board(tab, x, y):
    box = tab.page.locator("#board").bounding_box()
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def star(tab):
    return tab.page.locator('.thing[aria-label*="star"]')


@pytest.mark.slow
def test_dragging_a_shape_changes_the_answer_while_it_moves(fresh):
    page = fresh.page
    assert fresh.ask("Where is the star?") == "middle right"
    page.mouse.move(*middle(star(fresh)))
    page.mouse.down()
    page.mouse.move(*on_board(fresh, 0.5, 0.75), steps=4)
    page.mouse.move(*on_board(fresh, 0.5, 0.83), steps=4)
    assert fresh.settled() == "bottom middle"  # the button is still down
    assert page.locator("#board.dragging").count() == 1
    page.mouse.up()
    assert fresh.settled() == "bottom middle"
    assert "at the bottom middle" in star(fresh).get_attribute("aria-label")
    assert page.locator("#answer .new").count() > 0 and "“middle right”" not in page.inner_text("#answer")
    assert page.inner_text("#changed") == "Before you changed the picture: “middle right”."
    page.wait_for_function("$('said').textContent === 'tiny says: bottom middle'")


@pytest.mark.slow
def test_words_appear_one_by_one_and_the_time_is_told(fresh):
    page = fresh.page
    fresh.settled()
    page.evaluate("""() => {
      window.counts = [];
      const seen = () => counts.push($("answer").children.length);
      new MutationObserver(seen).observe($("answer"), { childList: true });
    }""")
    fresh.ask("Describe the image.")
    counts, total = page.evaluate("[counts, state.done.words.length]")
    assert set(range(1, total + 1)) <= set(counts), counts
    times = page.evaluate("state.done.words.map(word => word.ms)")
    assert times == sorted(times) and times[0] > 0
    told = r"First word after [\d.]+ ms, all (\d+) after [\d.]+ ms, in this browser\."
    assert re.fullmatch(told, page.inner_text("#time"))[1] == str(total)


@pytest.mark.slow
def test_probabilities_follow_a_shape_while_it_is_dragged(fresh):
    page = fresh.page
    fresh.ask("Where is the star?")
    bars = "[...document.querySelectorAll('#bars dt, #bars .share')].map(e => e.textContent)"
    before = page.evaluate(bars)
    assert page.locator("#bars .track b").count() == 0 and page.locator("#before").is_hidden()
    page.mouse.move(*middle(star(fresh)))
    page.mouse.down()
    page.mouse.move(*on_board(fresh, 0.5, 0.83), steps=6)
    assert fresh.settled() == "bottom middle"
    assert page.locator("#board.dragging").count() == 1  # the button is still down
    page.locator("#answer button").first.evaluate("button => button.click()")  # its first word
    assert page.evaluate(bars) != before and page.locator("#before").is_visible()
    assert page.locator("#bars .track b").count() > 0  # a stroke: how likely it was before
    page.mouse.up()


@pytest.mark.slow
def test_a_finger_drags_too(browser):
    tab = Tab(browser, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert tab.ask("Where is the star?") == "middle right"
    tab.page.evaluate("scrollTo(0, 0)")
    touch = tab.context.new_cdp_session(tab.page)
    (x, y), (u, v) = middle(star(tab)), on_board(tab, 0.5, 0.83)
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
    for i in range(1, 6):
        point = {"x": x + (u - x) * i / 5, "y": y + (v - y) * i / 5}
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert tab.settled() == "bottom middle"
    assert tab.page.evaluate("scrollY") == 0  # the page did not scroll instead
    assert tab.complaints == []
    tab.context.close()


@pytest.mark.slow
def test_the_keyboard_alone_is_enough(fresh):
    page = fresh.page
    page.keyboard.press("Tab")
    labels = set()
    for _ in range(4):  # the shapes come first
        labels.add(page.evaluate("document.activeElement.getAttribute('aria-label')"))
        page.keyboard.press("Tab")
    assert len(labels) == 4 and all("at the" in label for label in labels)
    assert page.evaluate("document.activeElement.closest('#kinds') !== null")
    star(fresh).focus()
    for _ in range(5):
        page.keyboard.press("Shift+ArrowDown")
    assert "bottom right" in star(fresh).get_attribute("aria-label")
    assert fresh.ask("Where is the star?") == "bottom right"
    star(fresh).focus()
    sizes = [page.evaluate("state.chosen.diameter")]
    for key in ("-", "+", "+"):
        page.keyboard.press(key)
        sizes.append(page.evaluate("state.chosen.diameter"))
    assert sizes[1] < sizes[0] < sizes[3]
    page.keyboard.press("c")
    assert "green" in star(fresh).get_attribute("aria-label")
    page.keyboard.press("s")
    assert star(fresh).count() == 0
    page.keyboard.press("Delete")
    assert page.locator(".thing").count() == 3
    assert page.evaluate("document.activeElement.className") == "thing"  # not lost
    fresh.settled()
    page.locator("#answer button[tabindex='0']").focus()
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == "end"
    page.keyboard.press("Home")
    assert page.locator("#answer button").first.get_attribute("aria-pressed") == "true"
    page.keyboard.press("Escape")
    assert page.locator("#answer [aria-pressed='true']").count() == 0


@pytest.mark.slow
def test_shapes_are_added_coloured_resized_and_removed(fresh):
    page = fresh.page
    assert fresh.ask("How many objects are there?") == "four"
    for count in ("three", "two"):
        page.locator(".thing").first.click()
        page.click("#remove")
        assert fresh.settled() == count
    page.click("[aria-label='Add a circle']")
    assert fresh.settled() == "three"
    page.click("#colours [title='purple']")
    page.locator("#size").fill("18")
    assert page.locator(".thing").last.get_attribute("aria-label").startswith("small purple circle, ")
    assert "a small purple circle" in page.inner_text("#caption")
    handle, before = page.locator("#handle"), page.evaluate("state.chosen.diameter")
    x, y = middle(handle)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 25, y + 25, steps=3)
    page.mouse.up()
    assert page.evaluate("state.chosen.diameter") > before + 0.03
    page.click("#ground")
    page.click("#fresh")
    assert fresh.settled() in ("one", "two", "three", "four")


@pytest.mark.slow
def test_each_kind_of_question_has_a_button(fresh):
    page = fresh.page
    for button in page.locator("#kinds button").all():
        button.click()
        assert fresh.settled()
        assert button.get_attribute("aria-pressed") == "true"
        assert page.input_value("#question").endswith(("?", "."))
    assert page.locator("#kinds [aria-pressed='true']").count() == 1


@pytest.mark.slow
def test_a_picture_of_ones_own_can_be_dropped(fresh, tmp_path):
    page = fresh.page
    image = Image.new("RGB", (90, 60), (200, 200, 200))
    image.save(tmp_path / "grey.png")
    data = base64.b64encode((tmp_path / "grey.png").read_bytes()).decode()
    page.evaluate(
        """data => {
          const file = new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], "grey.png", { type: "image/png" });
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(file);
          for (const name of ["dragenter", "dragover", "drop"])
            $("board").dispatchEvent(new DragEvent(name, { dataTransfer, bubbles: true, cancelable: true }));
        }""",
        data,
    )
    page.wait_for_function("state.own")
    fresh.settled()
    assert page.evaluate("[state.own.width, state.own.height]") == [90, 60]
    assert "means nothing" in page.inner_text("#caption") and page.locator("#hint").is_hidden()
    assert page.locator(".thing").first.is_hidden() and page.locator("#remove").is_disabled()
    page.click("#back")
    fresh.settled()
    assert page.locator(".thing").first.is_visible()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.set_input_files("#file", tmp_path / "broken.png")
    page.wait_for_function("$('caption').textContent.includes('not a picture')")
    page.set_input_files("#file", tmp_path / "grey.png")
    page.wait_for_function("state.own")


@pytest.mark.slow
def test_a_word_shows_where_it_looked_and_what_else_it_could_have_been(fresh):
    page = fresh.page
    fresh.ask("Describe the image.")
    word = page.locator("#answer button", has_text="yellow").first
    word.hover()
    assert page.inner_text("#chosen") == "“yellow”"
    assert page.locator("#bars dt").count() == 6
    assert page.inner_text("#bars dt.chosen") == "yellow"
    assert page.locator("#looked").inner_text().startswith("Looked most at the ")
    lit = "[...$('heat').getContext('2d').getImageData(0, 0, grid, grid).data].filter((_, i) => i % 4 === 3)"
    veils = page.evaluate(lit)
    assert len(veils) == 49 and min(veils) < 100 < 140 < max(veils)  # what the word did not look at is veiled
    page.mouse.move(2, 2)
    word.click()
    assert word.get_attribute("aria-pressed") == "true"
    page.mouse.move(2, 2)
    assert page.inner_text("#chosen") == "“yellow”"  # stays


@pytest.mark.slow
def test_a_bug_is_planted_and_mended(fresh):
    page = fresh.page
    fresh.ask("Describe the image.")
    right = fresh.settled()
    for name in page.evaluate("[...document.querySelectorAll('#switch input')].map(i => i.value).filter(Boolean)"):
        page.check(f"#switch input[value={name}]")
        wrong = fresh.settled()
        page.wait_for_function("comparing && $('verdict').textContent")
        shown = page.inner_text("#wrong").removesuffix("…")  # which stands where an answer was cut off
        assert page.inner_text("#right") == right and shown.split() == wrong.split()
        stage = page.evaluate("name => ready.then(r => r.bugs[name]?.stage ?? 'pixels')", name)
        assert f"diverges is {stage}," in page.inner_text("#verdict")
        changed = page.locator("#wrong mark").count()
        stayed = any(word in right.split() for word in wrong.split())  # then it is not marked
        assert changed + stayed <= len(wrong.split()) and (wrong != right or changed == 0)
        assert page.locator("#warning").is_visible()
    page.click("#mend")
    assert fresh.settled() == right
    assert page.locator("#warning").is_hidden() and page.locator("#compare").is_hidden()


@pytest.mark.slow
def test_the_road_follows_a_patch(fresh):
    page = fresh.page
    for view in ("pixels", "patches", "tower", "projector", "merge", "decoder", "words"):
        page.locator(f"[data-view={view}]").hover(position={"x": 40, "y": 70})
        assert page.inner_text("#reading")
        shape = page.locator(f"li:has([data-view={view}]) code").inner_text()
        assert re.fullmatch(r"\d+( × \d+)*", shape), (view, shape)
    page.locator("#probe").focus()
    page.keyboard.press("Home")
    assert page.inner_text("#reading").startswith("Patch 1 of 49, row 1, column 1.")
    page.keyboard.press("ArrowRight")
    assert page.locator("#probe").get_attribute("aria-valuetext") == "row 1, column 2"
    for view, key, read in [  # and with the keyboard alone
        ("patches", "ArrowDown", "Patch 9 of 49, row 2, column 2."),
        ("tower", "ArrowDown", "Patch 10 of 49, row 2, column 3."),
        ("merge", "ArrowUp", "Patch 9 of 49, row 2, column 2."),
    ]:
        page.locator(f"[data-view={view}]").focus()
        page.keyboard.press(key)
        assert page.inner_text("#reading").startswith(read), view
    for _ in range(9):
        page.keyboard.press("ArrowUp")
    assert page.inner_text("#reading").startswith("Position ")  # before the picture, in the prompt's words
    page.locator("[data-view=words]").focus()
    word = page.inner_text("#reading").split("Word ")[-1]
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#reading").split("Word ")[-1] != word


@pytest.mark.slow
def test_a_question_that_is_too_long_is_refused_in_words(tab):
    with pytest.raises(Exception, match="too long"):
        tab.run(f"{READ} await llava.ask(read(a), b);", raw(scene_png()), "☃" * 300)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.slow
def test_phone_and_dark(browser, scheme):
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True}
    tab = Tab(browser, **phone, color_scheme=scheme, reduced_motion="reduce")
    page = tab.page
    assert page.evaluate("document.documentElement.scrollWidth") == 360  # nothing sticks out
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(ground) < 60) == (scheme == "dark")
    moving = """[...document.querySelectorAll("*")].map(element => getComputedStyle(element))
      .filter(s => parseFloat(s.transitionDuration) || parseFloat(s.animationDuration)).length"""
    assert page.evaluate(moving) == 0
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(moving) > 0  # without the wish, something does
    contrast = page.evaluate("""() => {
      const linear = v => v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
      const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
      const rgb = text => text.match(/[\\d.]+/g).map(Number);
      const behind = light(rgb(getComputedStyle(document.body).backgroundColor));
      return [...document.querySelectorAll("p, h1, h2, h3, label, code, summary, a")].map(element => {
        const ink = light(rgb(getComputedStyle(element).color)), [a, b] = [ink, behind].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
      });
    }""")
    assert min(contrast) >= 4.5
    small = page.evaluate("""[...document.querySelectorAll("button:not(#answer button), .choice, .button")]
      .filter(e => e.offsetWidth && Math.min(e.offsetWidth, e.offsetHeight) < 32).map(e => e.outerHTML)""")
    assert small == []  # large enough for a finger
    assert tab.complaints == []
    tab.context.close()


@pytest.mark.slow
def test_everything_has_a_name_for_a_screen_reader(tab):
    nameless = tab.run(
        """return [...document.querySelectorAll("button, input, canvas, [role]")].filter(e => {
          if (e.closest("[aria-hidden=true]") || e.closest(".view")) return false;
          const by = e.getAttribute("aria-labelledby"), label = e.id && document.querySelector(`label[for=${e.id}]`);
          return !(e.getAttribute("aria-label") || (by && $(by)?.textContent) || label || e.closest("label")
            || e.textContent.trim() || e.getAttribute("role") === "status");
        }).map(e => e.outerHTML.slice(0, 120));"""
    )
    assert nameless == []
