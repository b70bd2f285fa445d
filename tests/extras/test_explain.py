"""--trace and --explain: what they say is what the model did,
and the page works in a browser, by mouse, keyboard and voice.
"""

import base64
import html
import itertools
import json
import re
import shutil
import zlib
from types import SimpleNamespace

import line
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
    """The levels of all views, (views, words, patches of all pictures); what is coarse is spread over its patches."""
    flat = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(data["maps"]))), dtype=torch.uint8)
    cells = torch.tensor(data["cells"])
    wide = [int(cells.max()) + 1 if coarse else len(cells) for *_, coarse in data["views"]]
    assert len(flat) == sum(wide) * len(data["words"])
    parts = flat.split([width * len(data["words"]) for width in wide])
    parts = [part.view(len(data["words"]), -1) for part in parts]
    return torch.stack([part[:, cells] if v[3] else part for part, v in zip(parts, data["views"], strict=True)])


def shares_of(data):
    """What part of a word's attention went to pictures, (views, words)."""
    flat = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(data["shares"]))), dtype=torch.int16)
    return flat.view(len(data["views"]), len(data["words"])) / 1000


def seen(picture):
    """The part of an image that the model saw, in fractions of its sides."""
    edges = torch.tensor(picture["patches"])
    left, top, right, bottom = [*edges.amin(0)[:2].tolist(), *edges.amax(0)[2:].tolist()]
    return [left / picture["width"], top / picture["height"], right / picture["width"], bottom / picture["height"]]


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
    *lines, note = run.err.splitlines()
    assert note == explain.NOTE
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
    names = [line.split()[0] for line in run.err[run.err.index("stage ") :].splitlines()[:-1]]
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
    ids, _ = model.prompt_ids(inputs["input_ids"], inputs["pixel_values"])
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


def test_views_and_what_is_coarse_where_there_is_no_room(monkeypatch):
    torch.manual_seed(0)
    weights = torch.rand(3, 4, 9, 20).softmax(-1)
    weights[1, 2] *= 9  # the head of layer 1 that looks most
    cells = torch.arange(20) // 10
    shown = list(explain.views(weights, 4, cells))
    assert len(shown) == 2 + 3 + 3 * 4 and all(view.shape == (6, 20) for *_, view, _ in shown)
    assert torch.equal(shown[1][4], weights.mean((0, 1))[3:])
    head = next(shown for shown in shown if shown[:2] == (1, 2))
    assert torch.equal(head[4], lens.without_sinks(weights[1, 2])[3:])
    assert torch.allclose(head[5], weights[1, 2, 3:].sum(-1))  # the share is of all attention, sinks included
    assert torch.allclose(shown[0][5], weights.mean((0, 1))[3:].sum(-1))
    monkeypatch.setattr(explain, "ROOM", 1)
    few = list(explain.views(weights, 4, cells))
    assert [view[:2] for view in few] == [view[:2] for view in shown]  # every head is there
    assert [view[:2] for view in few if view[1] is not None and not view[3]][1] == (1, 2)
    other = next(view for view in few if view[3])
    expected = lens.without_sinks(weights[other[0], other[1]])[3:].unflatten(1, (2, 10)).mean(-1)
    assert torch.allclose(other[4], expected, atol=1e-6)


def boxes(rows, columns):
    """Patches of a picture of 10 x 10 pixels each."""
    return [[10 * c, 10 * r, 10 * c + 10, 10 * r + 10] for r in range(rows) for c in range(columns)]


def view_of(rows, columns, name=""):
    return {"name": name, "width": 10 * columns, "height": 10 * rows, "rows": rows, "columns": columns,
            "patches": boxes(rows, columns)}  # fmt: skip


def test_cells_are_neighbours_and_few_enough(monkeypatch):
    assert explain.cells_of([view_of(2, 3)], 100).tolist() == list(range(6))  # small enough as it is
    cells = explain.cells_of([view_of(24, 24), view_of(3, 30)], 1000)
    assert (cells[:576].view(24, 24)[:4, :4] == 0).all() and cells[4] == 1 and cells[96] == 6
    assert cells[576:].view(3, 30)[:, :4].unique().tolist() == [36] and int(cells.max()) == 43
    monkeypatch.setattr(explain, "ROOM", 1000 * 10)
    assert int(explain.cells_of([view_of(24, 24), view_of(3, 30)], 1000).max()) < 10
    assert explain.cells_of([view_of(24, 24)], 10**9).tolist() == [0] * 576


def test_the_page_opens_at_something_to_see():
    words = [{"text": text, "p": p, "end": text == "</s>"} for text, p in
             ((" a", 1.0), (",", 1.0), (" star", 0.7), (" red", 0.9), ("</s>", 0.2))]  # fmt: skip
    assert explain.opening(words, torch.tensor([0.1, 0.9, 0.2, 0.3, 1.0])) == 3
    assert explain.opening(words, None) == 2
    assert explain.opening(words[-1:], None) == 0


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
    assert [seen(picture) for picture in data["pictures"]] == [[0, 0, 1, 1], [0.25, 0, 0.75, 1]]
    assert maps_of(data).shape[-1] == 98
    _, _, data = pages(main, tmp_path, *arguments, "--pad")
    assert seen(data["pictures"][1]) == [0, -0.5, 1, 1.5]


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
    assert (shares_of(data_of(kept)) - shares_of(data)).abs().max() < 0.003


def test_shares_are_those_of_the_view(main, tmp_path, tiny):
    """Each layer and each head has its own."""
    model, processor = tiny
    _run, _, data = pages(main, tmp_path, "--model", "tiny", "--image", SCENE, "--max-new-tokens", 6)
    inputs = processor.chat([("user", "Describe the image.")], [str(SCENE)])
    said = model.generate(**inputs, max_new_tokens=6)
    whole = torch.cat([inputs["input_ids"], said[:, :-1]], 1)
    found = lens.trace(model, input_ids=whole, pixel_values=inputs["pixel_values"])
    columns = lens.image_positions(model, model.prompt_ids(**inputs)[0])[0]
    shares = shares_of(data)
    for number, (layer, head, sinks, _) in enumerate(data["views"]):
        layers = range(4) if layer is None else [layer]
        parts = torch.cat([found[f"attention.{i + 1}"] for i in layers])[:, :, -6:, columns].sum(-1)  # (L, A, W)
        part = parts.mean((0, 1)) if head is None else parts[:, head].mean(0)
        assert torch.allclose(shares[number], part, atol=6e-4), (layer, head, sinks)
    assert len({round(share, 2) for share in shares[:, 0].tolist()}) > 8


# ----------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, see requirements-dev.txt")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium on the PATH, such as Debian's package of that name")
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


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    assert cli.main(["--device", "cpu", "--model", "tiny", "--image", str(SCENE), "--explain", str(file)]) in (None, 0)
    return file


def shown(tab):
    """(the chosen token, the patch that is framed or None, what a screen reader hears)."""
    chosen = tab.inner_text("#answer [aria-current]")
    framed = tab.evaluate("""() => { const most = document.querySelector(".most"), frame = most.querySelector("rect");
        const at = ["x", "y"].map(side => frame[side].baseVal.value / frame.width.baseVal.value);
        return most.getAttribute("visibility") === "visible" ? at : null }""")
    return chosen, None if framed is None else (round(framed[1]), round(framed[0])), tab.inner_text("#now")


def token(tab, i):
    return tab.locator("#answer button").nth(i)


def light(tab):
    """How much of its colour each patch has."""
    return tab.eval_on_selector_all(".photo rect.patch", "all => all.map(rect => +rect.getAttribute('fill-opacity'))")


def looks(tab):
    """How strongly each word is marked as one that looked at a patch."""
    return tab.eval_on_selector_all("#answer button", "all => all.map(e => +e.style.getPropertyValue('--look'))")


def over_patch(tab, row, column, grid=7):
    """Where on the screen a patch lies."""
    box = tab.locator(".photo").first.bounding_box()
    return box["x"] + box["width"] * (column + 0.5) / grid, box["y"] + box["height"] * (row + 0.5) / grid


@pytest.mark.slow
def test_stepping_through_the_words(visit, page_file, tmp_path):
    data = data_of(page_file.read_text())
    averaged = maps_of(data)[0].int()
    tab = visit(page_file, viewport={"width": 1060, "height": 860})
    assert shown(tab)[0] == data["words"][data["opens"]]["text"].strip() and max(light(tab)) > 0.9
    tab.keyboard.press("Home")
    for i, word in enumerate(data["words"]):
        chosen, framed, heard = shown(tab)
        assert chosen == word["text"].strip()
        assert heard.startswith(f"Token {i + 1} of {len(data['words'])}: “{chosen}”, with probability")
        best = averaged[i].argmax()
        assert framed == (divmod(int(best), 7) if averaged[i].max() else None)
        if framed:
            assert f"(row {framed[0] + 1}, column {framed[1] + 1} of 7 × 7 patches)" in heard
        assert light(tab) == pytest.approx((averaged[i] / explain.LEVELS).tolist(), abs=1e-3)
        rows = tab.eval_on_selector_all(
            "#likely tbody tr", "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
        )
        assert rows[0][0].endswith("(said)") and all("%" in row[1] for row in rows)
        others = [text.strip() or "a space" for text, p in word["others"] if p >= 0.001]
        assert [row[0] for row in rows[1:]] == others
        rare = [text.strip() or "a space" for text, p in word["others"] if p < 0.001]
        assert re.findall("“(.*?)”", tab.inner_text("#rest")) == rare
        assert tab.is_disabled("#next") == (i == len(data["words"]) - 1) and tab.is_disabled("#back") == (i == 0)
        if i < len(data["words"]) - 1:
            tab.click("#next")
    tab.screenshot(path=tmp_path / "shot.png")
    assert len(Image.open(tmp_path / "shot.png").convert("RGB").getcolors(1_000_000)) > 100


@pytest.mark.slow
def test_keyboard_mouse_and_touch(visit, page_file, browser):
    words = [word["text"].strip() for word in data_of(page_file.read_text())["words"]]
    tab = visit(page_file)
    tab.keyboard.press("Home")
    tab.keyboard.press("ArrowRight")
    assert shown(tab)[0] == words[1]
    tab.keyboard.press("End")
    assert shown(tab)[0] == words[-1]
    tab.keyboard.press("Home")
    tab.focus("#next")
    tab.keyboard.press("Enter")
    tab.keyboard.press("Space")
    assert shown(tab)[0] == words[2]
    tab.focus("#plain")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == words[2]  # one stop for the whole answer
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.textContent") == words[3] == shown(tab)[0]
    tab.focus(".scroll")
    tab.keyboard.press("ArrowRight")  # scrolls the table
    assert shown(tab)[0] == words[3]
    tab.keyboard.press("Shift+Tab")
    phone = visit(page_file, viewport={"width": 375, "height": 700}, has_touch=True, is_mobile=True)
    token(phone, 5).tap()
    assert shown(phone)[0] == words[5]


def test_layers_and_heads(visit, page_file):
    data = data_of(page_file.read_text())
    maps, views = maps_of(data), [tuple(view) for view in data["views"]]
    tab = visit(page_file)
    tab.keyboard.press("Home")
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
            (None if layer in ("all", "sinks") else layer, None if head == "all" else head, layer == "sinks", False)
        )
        assert light(tab) == pytest.approx((maps[number, 2].int() / explain.LEVELS).tolist(), abs=1e-3)
        share = shares_of(data)[number, 2].item()
        assert f" {100 * share:.1f}% of its attention went to the picture" in shown(tab)[2].replace(" 100%", " 100.0%")


def test_pointing_shows_and_clicking_chooses(visit, page_file):
    """On the way from a word to the next control the word is not lost."""
    data = data_of(page_file.read_text())
    averaged = maps_of(data)[0].int() / explain.LEVELS
    tab = visit(page_file)
    token(tab, 2).click()
    token(tab, 8).hover()
    assert shown(tab)[0] == data["words"][2]["text"].strip() and "Token 9 of" in shown(tab)[2]
    assert light(tab) == pytest.approx(averaged[8].tolist(), abs=1e-3)
    tab.hover("#layer")
    assert "Token 3 of" in shown(tab)[2] and light(tab) == pytest.approx(averaged[2].tolist(), abs=1e-3)


def test_the_way_back(visit, page_file):
    """From a patch to the words that looked there: by mouse, by keyboard, in the selected view."""
    data = data_of(page_file.read_text())
    maps = maps_of(data).int()
    tab = visit(page_file, viewport={"width": 1060, "height": 860})
    patch = int(maps[0].amax(0).argmax())
    row, column = divmod(patch, 7)
    tab.mouse.move(*over_patch(tab, row, column))
    assert looks(tab) == pytest.approx((maps[0, :, patch] / explain.LEVELS).tolist(), abs=1e-3)
    assert tab.locator(".pointer").get_attribute("visibility") == "visible"
    assert light(tab) == pytest.approx((maps[0, data["opens"]] / explain.LEVELS).tolist(), abs=1e-3)  # until a click
    tab.mouse.click(*over_patch(tab, row, column))
    tab.mouse.move(0, 0)
    assert [i for i, value in enumerate(light(tab)) if value] == [patch]
    most = int(maps[0, :, patch].argmax())
    heard = shown(tab)[2]
    assert f"(row {row + 1}, column {column + 1} of 7 × 7 patches)" in heard
    assert f"most of all “{data['words'][most]['text'].strip()}” ({most + 1})" in heard
    assert f"{int((maps[0, :, patch] > 0).sum())} of {len(data['words'])} tokens" in heard
    tab.select_option("#layer", index=5)
    view = [tuple(view) for view in data["views"]].index((3, None, False, False))
    assert looks(tab) == pytest.approx((maps[view, :, patch] / explain.LEVELS).tolist(), abs=1e-3)
    tab.keyboard.press("Escape")
    assert sum(looks(tab)) == 0 and "Token" in shown(tab)[2]
    tab.focus(".photo")
    before = shown(tab)[0]
    for key in ("ArrowRight", "ArrowUp", "ArrowLeft"):
        tab.keyboard.press(key)
    tab.keyboard.press("Enter")
    assert "(row 3, column 3 of 7 × 7 patches)" in shown(tab)[2] and shown(tab)[0] == before  # from the middle
    token(tab, 1).click()
    assert "Token 2 of" in shown(tab)[2] and sum(looks(tab)) == 0


def test_all_heads_at_once(visit, page_file):
    """A small map for each head of each layer, of the chosen word; pointing shows it large, a click selects it."""
    data = data_of(page_file.read_text())
    maps, views = maps_of(data).int() / explain.LEVELS, [tuple(view[:2]) for view in data["views"]]
    tab = visit(page_file, viewport={"width": 1060, "height": 1400})
    assert tab.locator("#heads .head").count() == 16
    names = tab.eval_on_selector_all("#heads .head", "all => all.map(e => e.getAttribute('aria-label'))")
    heads = [f"layer {i + 1}, head {j + 1}" for i in range(4) for j in range(4)]
    assert [name.split(":")[0] for name in names] == heads
    share = shares_of(data)[views.index((2, 1)), data["opens"]].item()
    assert re.search(rf": {100 * share:.1f}% on the picture".replace("100.0%", r"100(\.0)?%"), names[9])
    painted = """all => all.map(canvas => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
        .filter((value, i) => i % 4 === 3 && value > 200).length)"""
    strong = tab.eval_on_selector_all("#heads canvas", painted)
    peaks = [maps[views.index((i, j)), data["opens"]].max().item() for i in range(4) for j in range(4)]
    assert all((count > 0) == (peak > 0.75) for count, peak in zip(strong, peaks, strict=True))
    third = tab.locator("#heads .head").nth(9)
    third.hover()
    expected = maps[views.index((2, 1)), data["opens"]].tolist()
    assert light(tab) == pytest.approx(expected, abs=1e-3) and tab.input_value("#layer") == "all"
    tab.mouse.move(0, 0)
    assert light(tab) == pytest.approx(maps[0, data["opens"]].tolist(), abs=1e-3)
    third.click()
    assert (tab.input_value("#layer"), tab.input_value("#head")) == ("2", "1")
    assert third.get_attribute("aria-pressed") == "true" and "in layer 3, head 2" in shown(tab)[2]
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    assert (tab.input_value("#layer"), tab.input_value("#head")) == ("3", "1")
    tab.keyboard.press("Enter")
    assert tab.input_value("#layer") == "all"  # chosen twice is chosen no more


def test_the_picture_can_be_seen_plain(visit, page_file):
    tab = visit(page_file)
    shade = tab.locator(".photo .shade")
    assert shade.is_visible()
    tab.click("#plain")
    assert not shade.is_visible() and tab.get_attribute("#plain", "aria-pressed") == "true"
    tab.keyboard.press("p")
    assert shade.is_visible() and tab.get_attribute("#plain", "aria-pressed") == "false"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_picture_stays_readable(visit, page_file, tmp_path, scheme):
    """Where nothing was read it is grey, the things still stand out, and it is the same in both themes."""
    tab = visit(page_file, viewport={"width": 1060, "height": 860}, color_scheme=scheme)
    tab.locator(".photo").screenshot(path=tmp_path / "photo.png")
    shot = Image.open(tmp_path / "photo.png").convert("RGB")
    scene = Image.open(SCENE).convert("RGB").resize(shot.size)
    dark = torch.tensor([value < 0.05 for value in light(tab)]).view(7, 7)
    row, column = divmod(int(dark.flatten().int().argmax()), 7)
    found = torch.frombuffer(bytearray(shot.tobytes()), dtype=torch.uint8).view(*shot.size[::-1], 3).float()
    plain = torch.frombuffer(bytearray(scene.tobytes()), dtype=torch.uint8).view(*shot.size[::-1], 3).float()
    grey = found[found.shape[0] * row // 7 + 9 : found.shape[0] * (row + 1) // 7 - 9,
                 found.shape[1] * column // 7 + 9 : found.shape[1] * (column + 1) // 7 - 9]  # fmt: skip
    assert (grey.amax(-1) - grey.amin(-1)).max() <= 3 and 60 < grey.mean() < 200
    inner = slice(9, -9)
    together = torch.stack([found.mean(-1)[inner, inner].flatten(), plain.mean(-1)[inner, inner].flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.8  # no slab, black or white, hides it


def made(tmp_path, data, title="Where it looked"):
    """A page of data that were made by hand."""
    file = tmp_path / "made.html"
    file.write_text(explain.filled(data, title, "a model", "What?", "it", [("ids", "(1, 9)", "int64", "0.1", "72")]))
    return file


def by_hand(pictures, weights, question=2, probabilities=(0.99, 0.4, 0.8, 1.0)):
    texts = ("It", " was", " blue", "\n", "!")
    words = [{"text": text, "p": p, "end": False, "others": [[" red", 1 - p]]}
             for text, p in zip(texts, probabilities, strict=False)]  # fmt: skip
    data = {"words": words} | explain.looks(weights, question, pictures)
    data["opens"] = explain.opening(words, data.pop("peaks"))
    return data


def test_a_picture_in_tiles(visit, tmp_path):
    """The whole of it and its tiles: two sets of patches on one image, which need not be square."""
    colour = "data:image/png;base64," + base64.b64encode(red_and_green(tmp_path)).decode()
    whole, tiles = view_of(2, 3, "the whole"), view_of(4, 6, "in tiles")
    for view in (whole, tiles):
        view |= {"src": colour, "width": 120, "height": 80}
        size = 120 / view["columns"]
        view["patches"] = [[edge / 10 * size for edge in patch] for patch in view["patches"]]
    weights = torch.full((2, 2, 5, 30), 1e-3)
    weights[1, 0, 3, 6 + 3 * 6 + 5] = 0.9  # the third word, in layer 2, the last patch of the tiles
    weights[0, 1, 2, 4] = 0.5  # the second, in layer 1, on the whole
    tab = visit(made(tmp_path, by_hand([whole, tiles], weights)), viewport={"width": 900, "height": 900})
    assert tab.locator("figure").count() == 2 and tab.locator("rect.patch").count() == 30
    assert shown_names(tab) == ["the whole", "in tiles"] and "Token 3 of 4" in tab.inner_text("#now")
    assert "in tiles, the bottom right (row 4, column 6 of 4 × 6 patches)" in tab.inner_text("#now")
    assert tab.get_attribute("svg >> nth=0", "aria-label") == "the whole; no patch stands out"
    box = tab.locator(".photo").nth(1).bounding_box()
    tab.mouse.click(box["x"] + box["width"] * 0.95, box["y"] + box["height"] * 0.95)
    tab.mouse.move(0, 0)
    assert [look > 0 for look in looks(tab)] == [False, False, True, False]
    assert tab.locator("#heads .head").count() == 4
    token(tab, 1).click()
    assert "the whole, the bottom middle (row 2, column 2 of 2 × 3 patches)" in tab.inner_text("#now")


@pytest.mark.slow
def test_a_model_that_cuts_pictures_shows_its_tiles(visit, main, tmp_path):
    """Where they meet is drawn, and the line below says that the picture was seen twice."""
    folder = line.make(tmp_path / "next", "next-mistral")
    line.photo(60, 80).save(tmp_path / "photo.png")
    _, _, data = pages(main, tmp_path, "--model", folder, "--image", tmp_path / "photo.png", "--max-new-tokens", 4)
    (picture,) = data["pictures"]
    side = llava.load(folder, device="cpu")[0].vision.grid
    assert (picture["rows"], picture["columns"]) == (2 * side, 2 * side) and maps_of(data).max() == explain.LEVELS
    assert picture["tiles"] == {"tiles": 4, "down": [30.0], "across": [40.0]}
    assert seen(picture) == pytest.approx([0, 0, 1, 1])
    tab = visit(tmp_path / "page.html")
    assert tab.locator(".tiles path").first.get_attribute("d") == "M0 30H80M40 0V60"
    assert "Seen twice: as a whole, and in 4 tiles" in tab.inner_text("figcaption")
    tab.keyboard.press("p")
    assert not tab.locator(".tiles").is_visible()  # the plain picture is plain


def shown_names(tab):
    return tab.eval_on_selector_all(".photo svg", "all => all.map(svg => svg.getAttribute('aria-label').split(';')[0])")


def red_and_green(tmp_path):
    image = Image.new("RGB", (120, 80), "red")
    image.paste("green", (60, 0, 120, 80))
    image.save(tmp_path / "two.png")
    return (tmp_path / "two.png").read_bytes()


def test_many_heads_are_all_there_where_most_are_coarse(visit, tmp_path, monkeypatch):
    """8 layers of 32 heads, 24 x 24 patches, and little room: none is left out, and a coarse one is drawn, too."""
    monkeypatch.setattr(explain, "ROOM", 50_000)
    torch.manual_seed(0)
    picture = view_of(24, 24) | {"src": "data:image/png;base64," + base64.b64encode(red_and_green(tmp_path)).decode()}
    weights = torch.rand(8, 32, 3, 576) * 1e-4
    weights[2, 5, 2, :3] = 0.3  # the first cells of three by three
    weights[2, :5] += 0.01  # these look more, and get the room
    data = by_hand([picture], weights, question=2, probabilities=(0.9, 0.9))
    assert sum(view[3] for view in data["views"]) > 100
    view = next(i for i, view in enumerate(data["views"]) if view[:2] == [2, 5])
    assert data["views"][view][3]
    tab = visit(made(tmp_path, data), viewport={"width": 1060, "height": 900})
    assert tab.locator("#heads .head").count() == 256
    tab.select_option("#layer", index=4)
    tab.select_option("#head", index=6)
    tab.keyboard.press("End")
    token(tab, 1).click()
    lit = light(tab)
    assert lit == pytest.approx((maps_of(data)[view, 1].int() / explain.LEVELS).tolist(), abs=1e-3)
    assert min(lit[i] for i in (0, 2, 24 + 1, 48 + 2)) == 1 and lit[3] < 1


def test_doubt_is_seen_at_the_words(visit, tmp_path):
    """The line below a token is as long as certainty is short; the least certain one can be chosen at once."""
    picture = view_of(2, 2) | {"src": "data:image/png;base64," + base64.b64encode(red_and_green(tmp_path)).decode()}
    tab = visit(made(tmp_path, by_hand([picture], torch.rand(1, 1, 5, 4) / 9)))
    unsure = tab.eval_on_selector_all(
        "#answer button", "all => all.map(e => +e.style.getPropertyValue('--unsure') || 0)"
    )
    assert unsure == pytest.approx([0.01, 0.6, 0.2, 0])
    names = tab.eval_on_selector_all("#answer button", "all => all.map(e => e.getAttribute('aria-label'))")
    assert names == ["It, 99.0%", "was, 40.0%", "blue, 80.0%", "⏎, 100%"]
    assert tab.inner_text("#doubt") == "“was”"
    tab.click("#doubt")
    assert shown(tab)[0] == "was"
    sizes = "all => all.map(e => getComputedStyle(e).backgroundSize)"
    sizes = tab.eval_on_selector_all("#answer button", sizes)
    assert re.match(r"max\(\d[.\d]*px, 60%\) 3px", sizes[1]) and re.match(r"max\(\d[.\d]*px, 1%\)", sizes[0])
    assert re.match(r"(max\(0px, 0%\)|0%|0px) 3px", sizes[3])  # where nothing is missing, no line


def test_words_are_set_as_text(visit, page_file):
    """What the answer's line holds is the answer, a comma stands at its word, and lines begin at one edge."""
    data = data_of(page_file.read_text())
    tab = visit(page_file, viewport={"width": 1060, "height": 860})
    text = tab.evaluate("document.getElementById('answer').textContent")
    assert text == "".join(word["text"] for word in data["words"]).strip()
    edges = "all => all.map(e => e.getBoundingClientRect()).map(b => [b.left, b.right, Math.round(b.top)])"
    edges = tab.eval_on_selector_all("#answer button", edges)
    gaps = [round(b[0] - a[1], 1) for a, b in itertools.pairwise(edges) if a[2] == b[2]]
    comma = next(i for i, word in enumerate(data["words"]) if word["text"] == ",")
    assert abs(edges[comma][0] - edges[comma - 1][1]) < 0.5 and max(gaps) < 12
    lines = {}
    for left, _, top in edges[:-1]:
        lines.setdefault(top, left)
    assert max(lines.values()) - min(lines.values()) < 1


def test_what_belongs_to_a_word_stays_on_its_line(visit, tmp_path):
    """At no width does a comma, the end or the rest of a word begin a line; Chinese may be broken anywhere."""
    texts = ("A", " whole", " con", "nect", "or", ",", " 12", "3", " is", " un", "usual", ".", "</s>")
    chinese = (" ", *"猫坐在很长很长的桌子上看着外面的雨下了一整天没有停", "。", "</s>")
    for texts_, narrow in ((texts, 330), (chinese, 330)):
        words = [{"text": text, "p": 1.0, "end": text == "</s>", "others": []} for text in texts_]
        data = {"words": words, "pictures": [], "views": [], "maps": "", "opens": 0}
        tab = visit(made(tmp_path, data, "How it answered"))
        broken = set()
        for width in range(narrow, narrow + 160, 8):
            tab.set_viewport_size({"width": width, "height": 700})
            tops = "all => all.map(e => Math.round(e.getBoundingClientRect().bottom / 12))"
            tops = tab.eval_on_selector_all("#answer button:not(.end)", tops)
            broken |= {i + 1 for i, (a, b) in enumerate(itertools.pairwise(tops)) if abs(a - b) > 1}
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            end, last = (tab.eval_on_selector_all(f"#answer {which}", "all => all.at(-1).getBoundingClientRect().top")
                         for which in (".end", "button:not(.end)"))  # fmt: skip
            assert abs(end - last) < 15
        if texts_ is texts:
            assert broken and all(texts[i].startswith(" ") for i in broken)
        else:
            assert broken and chinese.index("。") not in broken


def test_a_phone_and_the_dark(visit, page_file):
    """Nothing is wider than a phone's screen, the picture stays in sight, and in the dark text is light on dark."""
    phone = visit(page_file, viewport={"width": 360, "height": 640})
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    for part in (".scroll", ".maps"):  # the tables fit, nothing of them is out of sight
        assert phone.eval_on_selector(part, "e => e.scrollWidth - e.clientWidth") <= 0
    for part in ("#layer", "#head"):  # room for the whole of what is chosen, and the arrow beside it
        box = phone.locator(part).bounding_box()
        assert box["x"] + box["width"] <= 360 and box["width"] >= 66
    assert abs(phone.locator("#back").bounding_box()["y"] - phone.locator("#head").bounding_box()["y"]) < 3  # one row
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
        'combobox "Layer"', 'button "Plain picture"',
        'button "layer 1, head 1: ', 'application "The picture: arrow keys',
        'rowheader "vision.0"', 'img "The picture; most looked at:', 'heading "How to read this',
    ):  # fmt: skip
        assert part in tree, tree
    assert tab.get_attribute("html", "lang") == "en" and tab.title().startswith("Where it looked")
    assert (
        tab.eval_on_selector_all(
            "button, select", "all => all.filter(e => !(e.innerText || e.ariaLabel || e.labels?.length)).length"
        )
        == 0
    )


@pytest.mark.slow
def test_pages_without_a_picture_and_with_two(visit, main, tmp_path):
    pages(main, tmp_path, "--model", "tiny", "--prompt", "Where is it?", "--max-new-tokens", 3)
    tab = visit(tmp_path / "page.html")
    assert tab.locator("#pictures, #layer, #head, #about, #overview").count() == 0
    assert tab.inner_text("#now").endswith("%.") and tab.inner_text("h1") == "How it answered"
    Image.new("RGB", (400, 200), "green").save(tmp_path / "wide.png")
    pages(main, tmp_path, "--model", "tiny", "--image", SCENE, tmp_path / "wide.png", "--max-new-tokens", 5)
    tab = visit(tmp_path / "page.html")
    assert tab.locator("figure").count() == 2 and tab.locator("svg rect.patch").count() == 2 * 49
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
