"""The table of the line of LLaVAs, held against transformers' classes."""

import base64
import json
import re
import zlib
from types import SimpleNamespace

import line
import pytest
import torch
import transformers
from line import TILED, photo

import llama
import llava
import weights
from extras import chat, checks, explain, family, recorded, turn


@pytest.mark.parametrize("name", family.KINDS)
def test_the_defaults_are_those_of_the_classes(name):
    kind = family.KINDS[name]
    theirs = getattr(transformers, kind.architecture).config_class()
    assert theirs.model_type == name and theirs.text_config.model_type == kind.text
    for field, value in kind.defaults.items():
        their = getattr(theirs, field)
        assert value == (list(their) if isinstance(their, tuple) else their)
    for field, value in kind.tower.items():
        assert value == getattr(theirs.vision_config, field)
    for field in family.SOME:  # vision_feature_layers and the like are other names
        assert (field in kind.has) == hasattr(theirs, field)


def test_what_a_file_says_counts_and_a_null_is_nothing():
    values = {
        "model_type": "llava_onevision",
        "vision_feature_layer": -3,
        "image_token_id": 7,
        "vision_aspect_ratio": None,
    }
    found = family.complete(values, "config.json")
    assert (found["vision_feature_layer"], found["vision_aspect_ratio"]) == (-3, "anyres_max_9")
    assert found["image_token_id"] == 7 and "image_token_index" not in found  # one of its two names is enough
    assert found["vision_config"] == family.ONEVISION_TOWER and found["text_config"] == {"model_type": "qwen2"}
    part = {"hidden_size": 8}
    found = family.complete({"model_type": "llava_onevision", "vision_config": part, "text_config": part}, "")
    assert found["vision_config"] == {"model_type": "siglip_vision_model", **part}
    assert found["text_config"] == {"model_type": "qwen2", **part}


def test_the_published_list_of_layers_has_an_older_name():
    found = family.complete({"model_type": "vipllava", "vision_feature_layers": [-2, 1]}, "config.json")
    assert "vision_feature_layer" not in found and weights.ALIASES["vision_feature_layers"] == "vision_feature_layer"


def test_load_hands_it_in():
    assert checks.clean is family.clean


# ----------------------------------------------------------------------------------------------------------------
# The command line with each of them


@pytest.fixture(params=line.params(("interleave", "onevision")))
def asked(request, made, main, tmp_path):
    """(name, a function from more arguments to what the command line made of them, the same model and pictures)."""
    folder, files = made.folder(request.param), [tmp_path / "a.png", tmp_path / "b.png"]
    images = [photo(40, 61), photo(90, 33, 1)]
    for file, image in zip(files, images, strict=True):
        image.save(file)

    def ask(*more, pictures=files):
        image = ["--image", *pictures] if pictures else []
        settings = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", 5]
        run = main("--model", folder, *settings, *image, *more)
        assert run.status == 0, run.err
        return run

    model, processor = llava.load(str(folder), device="cpu", dtype="float32")
    return request.param, ask, model, processor, files, images


def said(model, processor, images, words="What?", **options):
    inputs = processor.chat([("user", words)], images)
    ids = model.generate(**inputs, max_new_tokens=5, **options)[0]
    return processor.decode(ids) if options else "".join(turn.as_text(processor.tokenizer, ids))


def test_the_command_line_answers_as_python_does(asked):
    _, ask, model, processor, files, images = asked
    assert ask("--prompt", "What?").out.strip() == said(model, processor, images).strip()
    beams = ask("--prompt", "What?", "--num-beams", 2).out
    assert (
        re.sub("\ufffd", "", beams).strip() == re.sub("\ufffd", "", said(model, processor, images, num_beams=2)).strip()
    )
    each = ask("--prompt", "What?", "--each").out.splitlines()
    assert [row.split("\t")[0] for row in each] == [str(file) for file in files]
    assert [row.split("\t")[1] for row in each] == [
        " ".join(said(model, processor, [image]).split()) for image in images
    ]


def test_the_prompt_that_is_shown_is_the_one_that_counts(asked):
    _, ask, model, processor, _, images = asked
    shown = ask("--prompt", "What?", "--show-prompt").err
    inputs = processor.chat([("user", "What?")], images)
    assert f"ids: {inputs['input_ids'][0].tolist()}\n" in shown
    assert f"expanded to {model.prompt_ids(**inputs)[0].shape[1]} positions" in shown
    bos = processor.as_text(processor.tokenizer.bos)
    assert f"prompt: {bos + processor.prompt('What?', 2)!r}" in shown


def test_choices_are_scored_with_the_form_around_them(asked):
    _, ask, model, processor, _, images = asked
    shown = ask("--prompt", "What?", "--choices", "red", "a blue one").out.splitlines()
    inputs = processor.chat([("user", "What?")], images)
    asked_ids, answers = inputs["input_ids"][0].tolist(), []
    for words in ("red", "a blue one"):
        pieces = processor.pieces([("user", "What?"), ("assistant", words)], 2)
        answers.append((processor.tokenizer.bos + processor.tokenizer.encode_pieces(pieces))[len(asked_ids) :])
        assert answers[-1][-1] == processor.eos_id
    scores = model.score(answers, **inputs).softmax(0)
    assert [float(row.split("\t")[0]) for row in shown] == pytest.approx(scores.tolist(), abs=1e-3)


def test_trace_and_explain_look_into_each(asked, tmp_path):
    """The light of the page adds up to what the words paid to the pictures, whatever their positions are."""
    name, ask, model, *_ = asked
    run = ask("--prompt", "What?", "--trace", "--explain", tmp_path / "page.html")
    assert re.search(r"^vision\.0 ", run.err, re.M) and re.search(r"^projector ", run.err, re.M)
    page = (tmp_path / "page.html").read_text()
    data = json.loads(re.search(r'<script[^>]*id="?data"?[^>]*>(.*?)</script>', page, re.S)[1])
    grid = data["pictures"][0]["columns"]
    assert grid == model.vision.grid * (2 if name in TILED else 1)
    flat = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(data["maps"]))), dtype=torch.uint8)
    parts = {False: 2 * grid**2, True: max(data["cells"]) + 1}  # of a view, patch by patch or in cells
    assert len(flat) == len(data["words"]) * sum(parts[coarse] for *_, coarse in data["views"])


def test_a_conversation_in_which_a_picture_is_added(asked):
    """Each turn reads what is new alone, and answers as the whole conversation would."""
    _, _, model, processor, _, images = asked
    options = SimpleNamespace(
        temperature=0.0, top_k=None, top_p=1.0, seed=None, max_new_tokens=4, num_beams=1, show_prompt=False, pad=None
    )  # fmt: skip
    conversation = turn.Conversation(processor.tokenizer.bos, model.init_kv_cache(1, 1000))
    ids = [*conversation.ids]
    for words, own in (("What?", images[:1]), ("Why?", []), ("And this?", images[1:])):
        pieces = processor.pieces([("user", words)], len(own), going_on=llama.length(conversation.kv_cache) > 0)
        before = conversation.ids
        "".join(turn.answer(model, processor, options, [("user", words)], own, conversation))
        if ids == processor.tokenizer.bos:
            ids = [*ids, *processor.tokenizer.encode_pieces(pieces)]
        else:
            assert before[-1] in model.config.eos_token_ids
            ids = [*ids[:-1], *processor.tokenizer.encode_pieces(pieces)]
        so_far = images[: 2 if words == "And this?" else 1]
        answered = model.generate(**whole_conversation(model, processor, ids, so_far), max_new_tokens=4)[0].tolist()
        ended = answered[-1] in model.config.eos_token_ids
        ids += answered + ([] if ended else [processor.eos_id])
        assert ids[-len(conversation.ids) :] == conversation.ids


def whole_conversation(model, processor, ids, images):
    """What the model takes for ids with one token for each picture, each of which was alone in its turn."""
    if not images:
        return processor.prepare([ids], [])
    each = [processor.prepare([[processor.image_id]], [image]) for image in images]
    counts = iter([model.prompt_ids(**one)[0].shape[1] for one in each])
    ids = [i for token in ids for i in [token] * (next(counts) if token == processor.image_id else 1)]
    pixels = torch.nn.utils.rnn.pad_sequence([one["pixel_values"][0] for one in each], batch_first=True)
    if model.image_newline is None:
        pixels = torch.cat([one["pixel_values"] for one in each])
    sizes = {"image_sizes": torch.cat([one["image_sizes"] for one in each])} if "image_sizes" in each[0] else {}
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels, **sizes}


def test_chat_by_the_command_line_adds_a_picture(asked, main, made, monkeypatch):
    name, _, model, processor, files, images = asked
    typed = iter(["What?", f"/image {files[1]}", "And this?"])
    monkeypatch.setattr(chat, "read_line", lambda: next(typed, None))
    settings = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", 4, "--show-prompt"]
    run = main("--model", made.folder(name), "--chat", "--image", files[0], *settings)
    assert run.status == 0 and "error" not in run.err, run.err
    asked_first = processor.tokenizer.encode_pieces(processor.pieces([("user", "What?")], 1))
    ids, shown = [*processor.tokenizer.bos, *asked_first], ""
    for so_far in (images[:1], images):
        answered = model.generate(**whole_conversation(model, processor, ids, so_far), max_new_tokens=4)[0].tolist()
        shown += "".join(turn.as_text(processor.tokenizer, answered)) + "\n"
        end = answered if answered[-1] in model.config.eos_token_ids else [*answered, processor.eos_id]
        behind = processor.tokenizer.encode_pieces(processor.pieces([("user", "And this?")], 1, going_on=True))
        ids = [*ids, *end[:-1], *behind]
    assert run.out == shown
    assert run.err.count("expanded to ") == 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--quantize", "int8"], ["--quantize", "int4"], ["--compile"], ["--pad"]], ids=str)
def test_the_command_line_takes_its_options_with_each(asked, made, options, monkeypatch):
    name, ask, _, _, _, images = asked
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **more: compile(function, backend="eager", **more))
    monkeypatch.setattr(recorded, "check_compiler", lambda device: None)
    quantize = options[1] if "--quantize" in options else None
    model, processor = llava.load(str(made.folder(name)), device="cpu", dtype="float32", quantize=quantize)
    inputs = processor.chat([("user", "What?")], images, True if "--pad" in options else None)
    expected = turn.as_text(processor.tokenizer, model.generate(**inputs, max_new_tokens=5)[0])
    assert ask("--prompt", "What?", *options).out.strip() == "".join(expected).strip()


def test_cells_of_the_page_take_what_falls_on_them():
    boxes = torch.tensor(
        [[0.0, 0.0, 4.0, 4.0], [2.0, 0.0, 4.0, 2.0], [-2.0, 0.0, 2.0, 4.0], [float("nan")] * 4]
    ).numpy()
    parts = explain.lens.onto_grid(boxes, 4, 4, 2)
    assert parts.tolist() == [[0.25] * 4, [0, 1, 0, 0], [0.25, 0, 0.25, 0], [0] * 4]
