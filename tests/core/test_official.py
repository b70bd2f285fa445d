"""tests/official.py, with a small checkpoint and values that were recorded from transformers: it sees what differs."""

import dataclasses
import json
import re

import official
import pytest
import torch
import transformers
from line import photo


@pytest.fixture(scope="module")
def recorded(made, tmp_path_factory):
    """A case of a small checkpoint whose values are the reference's, and its folders."""
    folder = tmp_path_factory.mktemp("pictures")
    photo(40, 61).save(folder / "noise.png")
    model, processor, reference = made.pair("onevision")
    prompt = processor.prompt("What?")
    inputs = processor(prompt, folder / "noise.png")
    ids, mask = model.prompt_ids(**inputs)
    pictures = {"pixel_values": inputs["pixel_values"].double(), "image_sizes": inputs["image_sizes"]}
    with torch.no_grad():
        logits = reference(input_ids=ids, attention_mask=mask.long(), **pictures).logits[0, :3, :3].tolist()
    new = reference.generate(input_ids=ids, attention_mask=mask.long(), **pictures, max_new_tokens=5, do_sample=False)
    text = processor.decode(new[0, ids.shape[1] :]).strip()
    case = official.Case(
        "small", prompt, ["noise.png"], 5, text, logits, 1e-4, ids.shape[1], tuple(inputs["pixel_values"].shape),
        [[40, 61]], inputs["input_ids"][0].tolist(),
    )  # fmt: skip
    return case, made.folder("onevision"), folder


def command(recorded, *more):
    _, weights, pictures = recorded
    return ["small", "--weights", str(weights), "--pictures", str(pictures), "--dtype", "float64", "--device", "cpu",
            *more]  # fmt: skip


def test_what_is_as_published_is_said_so(recorded, capsys):
    assert official.main(command(recorded), [recorded[0]]) == 0
    out = capsys.readouterr().out
    assert out.count("as published\n") == 6 and out.endswith("6 as published, 0 different\n")


@pytest.mark.parametrize("field, wrong", [
    ("begins", "Something else"), ("logits", [[0.0] * 3] * 3), ("positions", 7), ("pixels", (1, 2, 3)),
    ("sizes", [[61, 40]]), ("ids", [1, 2]),
])  # fmt: skip
def test_what_differs_is_shown_beside_the_published_value(recorded, capsys, field, wrong):
    case = dataclasses.replace(recorded[0], **{field: wrong})
    assert official.main(command(recorded), [case]) == 1
    out = capsys.readouterr().out
    assert out.endswith("5 as published, 1 different\n") and f"published {wrong!r}" in out


def test_the_ids_of_an_answer_are_compared(recorded, capsys):
    case = dataclasses.replace(recorded[0], answer=[1, 2])
    assert official.main(command(recorded), [case]) == 1
    out = capsys.readouterr().out
    found = json.loads(re.search(r"answer: ours (\[.*\])", out)[1])
    assert official.main(command(recorded), [dataclasses.replace(case, answer=found)]) == 0
    assert len(found) == case.new and "answer: as published" in capsys.readouterr().out


def test_several_pictures_are_given_in_tiles_as_the_reference_gives_a_flat_list(made, tmp_path):
    model, processor, reference = made.pair("onevision")
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, size in zip(files, [(40, 61), (90, 33)], strict=True):
        photo(*size).save(file)
    inputs = official.in_tiles(processor("<image><image>\nWhich?", files), files, processor)
    flat = transformers.AutoImageProcessor.from_pretrained(made.folder("onevision"), backend="pil")(
        [photo(40, 61), photo(90, 33)], return_tensors="pt"
    )
    assert torch.equal(inputs["pixel_values"], flat["pixel_values"].float())
    flat = {key: x.double() if key == "pixel_values" else torch.as_tensor(x) for key, x in flat.items()}
    with torch.no_grad():
        theirs = reference(input_ids=inputs["input_ids"], **flat).logits
        assert torch.allclose(model(**inputs).logits, theirs, rtol=0, atol=1e-9)


def test_a_missing_picture_is_named_and_nothing_is_compared(recorded, capsys, tmp_path):
    assert official.main(command(recorded, "--pictures", str(tmp_path)), [recorded[0]]) == 3
    assert f"{tmp_path} holds no noise.png" in capsys.readouterr().out


def test_mistakes_are_one_line(capsys, tmp_path):
    assert official.main(["nobody/nothing"]) == 2
    assert official.main([official.SEVEN, "--weights", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_the_list_names_each_checkpoint_and_picture(capsys):
    assert official.main([]) == 0
    out = capsys.readouterr().out
    assert all(case.checkpoint in out for case in official.CASES) and all(name in out for name in official.PICTURES)


def test_each_case_can_be_run():
    """Its pictures are known, one for each image token, and something is compared."""
    assert len(official.CASES) >= 20
    for case in official.CASES:
        assert case.prompt.count("<image>") == len(case.pictures) and {*case.pictures} <= {*official.PICTURES}
        assert case.logits or (case.begins and case.new)
        assert case.logits is None or [len(row) for row in case.logits] == [3, 3, 3]
