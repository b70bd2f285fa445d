"""--trace and --explain: what they say is what the model did,
and the page works in a browser, by mouse, keyboard and voice.
"""

import base64
import html
import json
import re
import shutil
import zlib
from types import SimpleNamespace

import pytest
import tokenizer_files
import torch
from PIL import Image
from reference import ROOT, TINY, make_checkpoint

import llava
from extras import checks, cli, explain, lens

SCENE = TINY / "scene.png"


@pytest.fixture(scope="module")
def tiny():
    return llava.load("tiny", device="cpu")


@pytest.fixture
def main(capsys):
    """arguments → exit status, stdout, stderr."""

    def main(*arguments):
        try:
            status = cli.main(["--device", "cpu", *map(str, arguments)])
        except SystemExit as left:  # argparse leaves by itself
            status = left.code
        return SimpleNamespace(status=status, **dict(zip(("out", "err"), capsys.readouterr(), strict=True)))

    return main


def data_of(page):
    """What a page carries for its script."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, flags=re.S)[1])


def maps_of(data):
    """The levels of all views, (views, words, pictures * patches)."""
    flat = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(data["maps"]))), dtype=torch.uint8)
    return flat.view(len(data["views"]), len(data["words"]), -1)


def pages(main, tmp_path, *arguments):
    """Make a page → the run, the page, its data."""
    file = tmp_path / "page.html"
    run = main(*arguments, "--explain", file)
    assert run.status == 0, run.err
    return run, file.read_text(), data_of(file.read_text())


# ----------------------------------------------------------------------------------------------------------------
# The trace


def test_trace_is_a_table_of_what_was_computed(main, tiny):
    model, processor = tiny
    plain = main("--model", "tiny", "--image", SCENE)
    run = main("--model", "tiny", "--image", SCENE, "--trace")
    assert run.status == 0 and run.out == plain.out
    lines = run.err.splitlines()
    table = [
        re.split(r"  +", line.strip()) for line in lines[lines.index(next(x for x in lines if x.startswith("stage"))) :]
    ]
    assert table[0] == ["stage", "shape", "dtype", "ms", "bytes"]
    stages = lens.trace(
        model, **processor.chat([("user", "Describe the image.")], [str(SCENE)]), output_attentions=False
    )
    stages = {name: tensor for name, tensor in stages.items() if name[-2:] not in (".q", ".k", ".v")}
    stages["logits"] = stages["logits"][:, -1:]
    assert [row[0] for row in table[1:-2]] == list(stages)
    for (name, tensor), row in zip(stages.items(), table[1:], strict=False):
        shape, dtype = f"({', '.join(map(str, tensor.shape))})", str(tensor.dtype).removeprefix("torch.")
        assert row[:3] == [name, shape, dtype] and row[4] == f"{tensor.nbytes:,}" and float(row[3]) >= 0
    assert re.fullmatch(r"each of \d+ steps", table[-2][0]) and float(table[-2][3]) > 0
    assert table[-1][0] == "kv_cache"
    cache = model.init_kv_cache(1, model.config.text_config.max_position_embeddings)
    shape = (model.config.text_config.num_hidden_layers, 2, *cache["keys.0"].shape)
    assert table[-1][1] == f"({', '.join(map(str, shape))})"


def test_trace_of_words_alone_and_of_one_token(main):
    run = main("--model", "tiny", "--prompt", "Where is it?", "--max-new-tokens", 1, "--trace")
    names = [line.split()[0] for line in run.err[run.err.index("stage ") :].splitlines()]
    assert run.status == 0
    assert names == ["stage", "ids", "merge", "llama.1", "llama.2", "llama.3", "llama.4", "logits", "kv_cache"]


@pytest.mark.parametrize(
    "other", [["--chat"], ["--each"], ["--choices", "yes", "no"], ["--num-beams", "2"], ["--compile"]]
)
@pytest.mark.parametrize("option", [["--trace"], ["--explain", "page.html"]])
def test_what_is_not_one_answer_is_refused(main, other, option, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llava, "load", lambda *_, **__: pytest.fail("loaded"))
    run = main("--model", "tiny", "--image", SCENE, *option, *other)
    assert (run.status, run.out) == (2, "") and re.match(
        "error: --trace and --explain (look into a single answer|listen to)", run.err
    )
    assert run.err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_several_processes_are_refused(main, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(llava, "load", lambda *_, **__: pytest.fail("loaded"))
    run = main("--model", "tiny", "--image", SCENE, "--trace")
    assert run.status == 2 and "leave out --compile, and torchrun" in run.err


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantised_model_has_a_page_too(main, tmp_path, quantize):
    run, _, data = pages(
        main, tmp_path, "--model", "tiny", "--image", SCENE, "--quantize", quantize, "--max-new-tokens", 6
    )
    assert "".join(word["text"] for word in data["words"] if not word["end"]).strip() == run.out.strip()


@pytest.mark.parametrize("where", ["", ".", "nowhere/page.html"])
def test_a_page_that_cannot_be_written_is_refused_at_once(main, where, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llava, "load", lambda *_, **__: pytest.fail("loaded"))
    run = main("--model", "tiny", "--image", SCENE, "--explain", where)
    assert run.status == 2 and re.fullmatch(r"error: .* cannot be written: .*\n", run.err)


def test_nothing_of_it_is_imported_unless_asked_for(main, monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, name := "extras.explain")
    monkeypatch.delattr("extras.explain")
    assert main("--model", "tiny", "--image", SCENE).status == 0 and name not in sys.modules
    assert main("--model", "tiny", "--image", SCENE, "--trace").status == 0 and name in sys.modules


# ----------------------------------------------------------------------------------------------------------------
# The page


def test_words_and_probabilities_are_the_models_own(main, tmp_path, tiny):
    model, processor = tiny
    run, page, data = pages(main, tmp_path, "--model", "tiny", "--image", SCENE, "--prompt", "Where is the star?")
    words = [word["text"] for word in data["words"]]
    assert "".join(words[:-1]) + "\n" == run.out and words[-1] == "</s>" and data["words"][-1]["end"]
    inputs = processor.chat([("user", "Where is the star?")], [str(SCENE)])
    said = model.generate(**inputs, max_new_tokens=20)
    logits = model(torch.cat([inputs["input_ids"], said[:, :-1]], 1), inputs["pixel_values"]).logits[
        0, -said.shape[1] :
    ]
    for word, token, probabilities in zip(data["words"], said[0], logits.softmax(-1), strict=True):
        assert word["p"] == pytest.approx(probabilities[token].item(), rel=0.02)
        likely = [int(i) for i in probabilities.topk(6).indices if i != token][:5]
        assert [text for text, _ in word["others"]] == [explain.written(processor, i) for i in likely]
        assert [p for _, p in word["others"]] == pytest.approx(probabilities[likely].tolist(), rel=0.02)
    assert f"<p>{html.escape(run.out.strip())}</p>" in page  # also where no script runs


def test_a_sampled_answer_shows_what_was_said(main, tmp_path):
    options = ["--model", "tiny", "--image", SCENE, "--temperature", 3, "--seed", 5, "--max-new-tokens", 12]
    run, _, data = pages(main, tmp_path, *options)
    texts = "".join(word["text"] for word in data["words"] if not word["end"])
    assert re.sub(r"<0x[0-9A-F]{2}>", "", texts).strip() == run.out.strip()  # bytes that never became a character
    assert any(
        word["p"] < word["others"][0][1] for word in data["words"]
    )  # at this temperature not always the likeliest


def test_reading_again_gives_the_attention_of_a_whole_pass(model, processor):
    """From the rewound cache, in one chunk: the same as from one pass over everything, for both families."""
    torch.manual_seed(0)
    pictures = [Image.fromarray(torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy()) for _ in range(2)]
    inputs = processor.chat([("user", "What is this?")], pictures)
    ids, _ = model.expanded(inputs["input_ids"], inputs["pixel_values"])
    cache = model.init_kv_cache(1, 200)
    said = model.generate(**inputs, max_new_tokens=9, kv_cache=cache)[0].tolist()
    weights, question = explain.attention_on_pictures(model, ids, cache, said)
    whole = torch.cat([ids, torch.tensor([said[:-1]])], 1)
    full = lens.trace(model, input_ids=whole, pixel_values=inputs["pixel_values"])
    columns = lens.image_positions(model, ids).flatten()
    assert weights.shape == (3, 6, question + len(said) - 1, 32) and weights.abs().max() > 0.01
    for layer in range(3):
        expected = full[f"attention.{layer + 1}"][0, :, -weights.shape[2] :, columns]
        assert torch.allclose(weights[layer], expected.float(), atol=1e-6)


def test_views_and_what_is_left_out_where_there_is_no_room(monkeypatch):
    torch.manual_seed(0)
    weights = torch.rand(3, 4, 9, 20).softmax(-1)
    weights[1, 2] *= 9  # the head of layer 1 that looks most
    shown = list(explain.views(weights, question=4))
    assert len(shown) == 2 + 3 + 3 * 4 and all(view.shape == (6, 20) for *_, view in shown)
    assert torch.equal(shown[1][3], weights.mean((0, 1))[3:])
    head = next(view for layer, head, _, view in shown if (layer, head) == (1, 2))
    assert torch.equal(head, lens.without_sinks(weights[1, 2])[3:])
    monkeypatch.setattr(explain, "ROOM", 1)
    shown = list(explain.views(weights, question=4))
    assert [(layer, head) for layer, head, *_ in shown][5:][1] == (1, 2) and len(shown) == 2 + 3 + 3


def test_levels_are_a_square_root():
    assert list(explain.levels(torch.tensor([[0.0, 1.0, 4.0, 9.0]]))) == [0, 5, 10, 15]
    assert list(explain.levels(torch.zeros(1, 2))) == [0, 0]


def test_the_page_looks_at_the_things(main, tmp_path):
    """The light of a colour's word falls on the thing of that colour, for each thing of the scene."""
    _, _, data = pages(main, tmp_path, "--model", "tiny", "--image", SCENE)
    averaged = maps_of(data)[0]
    places = {
        "blue": (0, 3),
        "green": (1, 0),
        "yellow": (1, 2),
        "red": (2, 0),
    }  # row and column of thirds, the latter or next
    found = 0
    for word, levels in zip(data["words"], averaged, strict=True):
        if word["text"].strip() in places:
            row, column = divmod(int(levels.argmax()), 7)
            colour = torch.tensor(
                Image.open(SCENE).convert("RGB").resize((7, 7), Image.Resampling.BOX).getpixel((column, row))
            )
            wanted = {"blue": [2], "green": [1], "yellow": [0, 1], "red": [0]}[word["text"].strip()]
            assert colour[wanted].min() > 1.3 * colour[[i for i in range(3) if i not in wanted]].max(), (
                word,
                row,
                column,
            )
            found += 1
    assert found == 4 and averaged.max() == explain.LEVELS


def test_two_pictures_and_a_crop(main, tmp_path):
    Image.new("RGB", (400, 200), "green").save(tmp_path / "wide.png")
    arguments = ["--model", "tiny", "--image", SCENE, tmp_path / "wide.png", "--max-new-tokens", 5]
    _, _, data = pages(main, tmp_path, *arguments)
    assert [picture["seen"] for picture in data["pictures"]] == [[0, 0, 1, 1], [0.25, 0, 0.75, 1]]
    assert maps_of(data).shape[-1] == 98
    _, _, data = pages(main, tmp_path, *arguments, "--pad")
    assert data["pictures"][1]["seen"] == [0, -0.5, 1, 1.5]


def test_a_photo_is_shrunk_for_the_page(main, tmp_path):
    torch.manual_seed(0)
    Image.fromarray(torch.randint(0, 256, (1500, 2000, 3), dtype=torch.uint8).numpy()).save(tmp_path / "large.png")
    _, page, data = pages(main, tmp_path, "--model", "tiny", "--image", tmp_path / "large.png", "--max-new-tokens", 3)
    assert len(page) < 700_000 and data["pictures"][0]["src"].startswith("data:image/jpeg;base64,")
    assert data["pictures"][0]["width"] == 2000


def test_what_a_user_types_does_not_become_part_of_the_page(main, tmp_path):
    nasty = "</script><script>alert(1)</script>&%%data%%"
    _, page, _ = pages(main, tmp_path, "--model", "tiny", "--image", SCENE, "--prompt", nasty, "--max-new-tokens", 3)
    assert page.count('"words":') == 1  # a mark in what is typed is text, too
    assert "<script>alert" not in page and html.escape("</script><script>alert(1)</script>&") in page


def test_a_character_of_several_tokens(tiny):
    """The bytes that wait are shown as bytes, and the character where it is complete."""
    model, processor = tiny
    said = [*processor.tokenizer.encode("é"), *processor.tokenizer.encode("star"), model.config.eos_token_ids[0]]
    logits = [torch.zeros(model.config.text_config.vocab_size)] * len(said)
    texts = [word["text"] for word in explain.words(processor, SimpleNamespace(logits=logits, model=model), said)]
    assert "".join(texts).replace(" ", "") == "<0xC3>éstar</s>", texts


def test_a_random_checkpoint_with_odd_tokens(main, tmp_path):
    """Byte tokens, unfinished characters and the rows that round the vocabulary up have some text, too."""
    folder = make_checkpoint(tmp_path / "random", "mistral", scale=12.0)
    _, _, data = pages(main, tmp_path, "--model", folder, "--image", SCENE, "--max-new-tokens", 40)
    assert len(data["words"]) > 1 and all(word["text"] and len(word["others"]) == 5 for word in data["words"])


def test_without_a_picture_there_are_words_alone(main, tmp_path):
    _, page, data = pages(main, tmp_path, "--model", "tiny", "--prompt", "Where is it?", "--max-new-tokens", 3)
    assert data["pictures"] == [] and data["maps"] == "" and len(data["words"]) >= 1 and "pixels" not in page


def test_the_kept_page_is_the_current_one(main, tmp_path):
    """docs/explain.html is what the command makes now, but for times and the last bits: same template, same words."""
    _, page, data = pages(main, tmp_path, "--model", "tiny", "--image", SCENE)
    kept = (ROOT / "docs" / "explain.html").read_text()

    def bare(page):
        page = re.sub(r'id="data">.*?</script>', "", page, flags=re.S)
        return re.sub(r"<td>[\d.]+<td>", "<td><td>", page)

    assert bare(kept) == bare(page), "run python notebooks/run.py --write"
    assert [word["text"] for word in data_of(kept)["words"]] == [word["text"] for word in data["words"]]
    assert data_of(kept)["views"] == data["views"] and data_of(kept)["pictures"] == data["pictures"]
    assert (maps_of(data_of(kept)).int() - maps_of(data).int()).abs().max() <= 1


# ----------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, see requirements-dev.txt")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs a chromium, such as Debian's package of that name")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """(file, options of the window) → the opened page; at the end nothing was fetched, and nothing complained."""
    tabs, requests, complaints = [], [], []

    def visit(file, **options):
        tab = browser.new_page(**options)
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(file.as_uri())
        tab.wait_for_selector("body[data-ready]")
        tabs.append(tab)
        return tab

    yield visit
    for tab in tabs:
        tab.close()
    assert complaints == [] and all(url.startswith(("file:", "data:")) for url in requests)


@pytest.fixture
def page_file(main, tmp_path):
    pages(main, tmp_path, "--model", "tiny", "--image", SCENE)
    return tmp_path / "page.html"


def shown(tab):
    """(the chosen token, the patch that is framed or None, what a screen reader hears)."""
    chosen = tab.inner_text("#answer [aria-current]")
    framed = tab.evaluate("""() => { const frame = document.querySelector(".most");
        const at = ["x", "y"].map(side => frame[side].baseVal.value / frame.width.baseVal.value);
        return frame.getAttribute("visibility") === "visible" ? at : null }""")
    return chosen, None if framed is None else (round(framed[1]), round(framed[0])), tab.inner_text("#now")


def veil(tab):
    """How strongly each patch is veiled."""
    return tab.eval_on_selector_all(
        ".photo rect:not(.most)", "all => all.map(rect => +rect.getAttribute('fill-opacity'))"
    )


def test_stepping_through_the_words(visit, page_file, tmp_path):
    data = data_of(page_file.read_text())
    averaged = maps_of(data)[0].int()
    tab = visit(page_file, viewport={"width": 1060, "height": 860})
    for i, word in enumerate(data["words"]):
        chosen, framed, heard = shown(tab)
        assert chosen == word["text"].strip()
        assert heard.startswith(f"Token {i + 1} of {len(data['words'])}: “{chosen}”, with probability")
        best = averaged[i].argmax()
        assert framed == (divmod(int(best), 7) if averaged[i].max() else None)
        if framed:
            assert f"(row {framed[0] + 1}, column {framed[1] + 1} of 7 × 7 patches)" in heard
        assert veil(tab) == pytest.approx((0.8 * (1 - averaged[i] / explain.LEVELS)).tolist(), abs=1e-3)
        rows = tab.eval_on_selector_all(
            "#likely tbody tr", "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
        )
        assert (
            len(rows) == 6
            and rows[0][0].endswith("(said)")
            and rows[1][0] == (word["others"][0][0].strip() or "a space")
        )
        assert all("%" in row[1] for row in rows)
        assert tab.is_disabled("#next") == (i == len(data["words"]) - 1) and tab.is_disabled("#back") == (i == 0)
        if i < len(data["words"]) - 1:
            tab.click("#next")
    tab.screenshot(path=tmp_path / "shot.png")
    assert len(Image.open(tmp_path / "shot.png").convert("RGB").getcolors(1_000_000)) > 100


def test_keyboard_mouse_and_touch(visit, page_file, browser):
    words = [word["text"].strip() for word in data_of(page_file.read_text())["words"]]
    tab = visit(page_file)
    tab.keyboard.press("ArrowRight")
    assert shown(tab)[0] == words[1]
    tab.keyboard.press("End")
    assert shown(tab)[0] == words[-1]
    tab.keyboard.press("Home")
    tab.focus("#next")
    tab.keyboard.press("Enter")
    tab.keyboard.press("Space")
    assert shown(tab)[0] == words[2]
    tab.focus("#layer")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Tab") if tab.evaluate("document.activeElement.id") == "head" else None
    assert tab.evaluate("document.activeElement.textContent") == words[2]  # one stop for the whole answer
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.textContent") == words[3] == shown(tab)[0]
    tab.focus(".scroll")
    tab.keyboard.press("ArrowRight")  # scrolls the table
    assert shown(tab)[0] == words[3]
    tab.hover("#answer button:nth-child(9)")
    assert shown(tab)[0] == words[8]
    phone = visit(page_file, viewport={"width": 375, "height": 700}, has_touch=True, is_mobile=True)
    phone.tap("#answer button:nth-child(6)")
    assert shown(phone)[0] == words[5]


def test_layers_and_heads(visit, page_file):
    data = data_of(page_file.read_text())
    maps, views = maps_of(data), [tuple(view) for view in data["views"]]
    tab = visit(page_file)
    for _ in range(2):
        tab.keyboard.press("ArrowRight")
    assert tab.is_disabled("#head")
    for layer, head in ((1, "all"), (1, 3), (3, 0), ("sinks", "all"), ("all", "all")):
        tab.select_option(
            "#layer", index={"all": 0, "sinks": 1}.get(layer, layer + 2 if isinstance(layer, int) else None)
        )
        if head != "all":
            tab.select_option("#head", index=head + 1)
        number = views.index(
            (None if layer in ("all", "sinks") else layer, None if head == "all" else head, layer == "sinks")
        )
        assert veil(tab) == pytest.approx((0.8 * (1 - maps[number, 2].int() / explain.LEVELS)).tolist(), abs=1e-3)


def test_a_phone_and_the_dark(visit, page_file):
    """Nothing is wider than a phone's screen, the picture stays in sight, and in the dark text is light on dark."""
    phone = visit(page_file, viewport={"width": 360, "height": 640})
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    phone.locator("#answer button").last.scroll_into_view_if_needed()
    box = phone.locator(".photo").bounding_box()
    assert box["y"] >= -1 and box["height"] > 150
    colours = (
        "() => ['color', 'backgroundColor'].map(p => getComputedStyle(document.body)[p].match(/\\d+/g).map(Number)[0])"
    )
    ink, paper = phone.evaluate(colours)
    assert ink < 60 and paper > 220
    ink, paper = visit(page_file, color_scheme="dark").evaluate(colours)
    assert ink > 200 and paper < 60


def test_what_a_screen_reader_is_told(visit, page_file):
    tab = visit(page_file)
    tree = tab.locator("body").aria_snapshot()
    for part in (
        'button "Next →"', 'toolbar "The answer, token by token"', "status:", 'table "What else it could have said',
        'combobox "Layer"', 'rowheader "vision.0"', 'img "The picture; most looked at:', 'heading "How to read this',
    ):  # fmt: skip
        assert part in tree, tree
    assert tab.get_attribute("html", "lang") == "en" and tab.title().startswith("Where it looked")
    assert (
        tab.eval_on_selector_all("button, select", "all => all.filter(e => !(e.innerText || e.labels?.length)).length")
        == 0
    )


def test_pages_without_a_picture_and_with_two(visit, main, tmp_path):
    pages(main, tmp_path, "--model", "tiny", "--prompt", "Where is it?", "--max-new-tokens", 3)
    tab = visit(tmp_path / "page.html")
    assert tab.locator("#pictures, #layer, #head, #about").count() == 0 and tab.inner_text("#now").endswith("%.")
    Image.new("RGB", (400, 200), "green").save(tmp_path / "wide.png")
    pages(main, tmp_path, "--model", "tiny", "--image", SCENE, tmp_path / "wide.png", "--max-new-tokens", 5)
    tab = visit(tmp_path / "page.html")
    assert tab.locator("figure").count() == 2 and tab.locator("svg rect").count() == 2 * 50
    assert "cut off before the model saw it" in tab.inner_text("figure >> nth=1")
    assert "picture" in tab.inner_text("#now")


def test_the_template_fetches_nothing():
    text = explain.TEMPLATE.read_text()
    assert set(re.findall(r"\w+://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"} and "import" not in text
    assert "src=" not in re.sub(r"<script.*", "", text, flags=re.S)
    assert lens.patch_boxes.__doc__  # the map that the page stands on is the one beside preprocess


def test_a_token_is_shown_as_the_file_spells_it(tmp_path):
    """And not as the library searches for it, with a "▁" in front, where the token is normalized."""
    _, processor = llava.load("tiny", device="cpu")
    for rules in ("as published", "as add_tokens writes them"):
        processor.tokenizer = checks.Tokenizer(tokenizer_files.write(tmp_path, tokenizer_files.RULES[rules]))
        assert [explain.written(processor, i) for i in (2, 638)] == ["</s>", "<image>"]
        assert explain.written(processor, processor.tokenizer.id("▁star")) == " star"
        assert explain.written(processor, 10_000) == "id 10000"


def test_trace_says_which_way_was_taken_and_why(main):
    run = main("--model", "tiny", "--prompt", "Where is it?", "--max-new-tokens", 1, "--dtype", "bfloat16", "--trace")
    assert run.status == 0
    assert run.err[run.err.index("kv_cache ") :].splitlines()[1:3] == [
        "products: plain (fixed)", "one query: fused call (fixed)"
    ]  # fmt: skip
