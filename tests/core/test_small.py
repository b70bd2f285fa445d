"""small: a language model that others trained, with tiny's eye and a projector that was trained here."""

import json
import sys

import pytest
import smollm2
import torch
from reference import ROOT, TINY
from safetensors.torch import load_file

import llava
from extras import speed

sys.path.append(str(ROOT / "small"))
sys.path.append(str(TINY))
SMALL = ROOT / "small"


def test_what_is_kept_is_small_and_goes_together():
    """Its projector takes what its eye gives and gives what the language model takes; both in less than 2 MB each."""
    eye, projector = load_file(SMALL / "eye.safetensors"), load_file(SMALL / "projector.safetensors")
    config = json.loads((SMALL / "eye.json").read_text())
    width = config["vision_config"]["hidden_size"]
    shapes = {name: tuple(x.shape) for name, x in projector.items()}
    assert shapes == {"linear_1.weight": (576, width), "linear_1.bias": (576,), "linear_2.weight": (576, 576),
                      "linear_2.bias": (576,)}  # fmt: skip
    assert {x.dtype for x in [*eye.values(), *projector.values()]} == {torch.float16}
    assert all((SMALL / f"{name}.safetensors").stat().st_size < 2e6 for name in ("eye", "projector"))
    assert eye["vision_tower.vision_model.embeddings.position_embedding.weight"].shape == (50, width)


def test_its_log_is_that_of_both_stages_and_the_loss_fell():
    rows = [line.split("\t") for line in (SMALL / "train.log").read_text().splitlines()]
    assert rows[0] == ["stage", "step", "loss", "right", "seconds"]
    for stage in ("words", "talk"):
        steps = [(int(step), float(loss)) for name, step, loss, *_ in rows[1:] if name == stage]
        assert [step for step, _ in steps] == sorted(step for step, _ in steps)
        assert steps[-1][1] < steps[0][1] / 2


@pytest.fixture(scope="module")
def small():
    import small

    return small


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    if smollm2.file() is None:
        pytest.skip(smollm2.NEEDS)
    return small.make(tmp_path_factory.mktemp("small"))


@pytest.mark.slow
def test_it_sees_more_than_it_can_guess(small, made, monkeypatch):
    """On questions that ask for one word: its loss is lower about its own picture than about another one, and lower by
    far than with a random projector.
    """
    monkeypatch.setitem(speed.FIXED, "dtype", "float32")  # takes minutes in 16 bits where a CPU has none
    model, processor = small.load(made)
    pictures, items = [], []
    for kind in ("colour", "shape"):
        found = small.collect(25, held_out=False)[kind]
        pictures, items = pictures + found[0], items + [(kind, *item) for item in found[1]]
    pixels = torch.stack([llava.vision.preprocess(x, processor.preprocess_config) for x in pictures])

    def loss(pixels):
        with torch.no_grad():
            features = model.projector(small.patches(model, pixels)).to(model.dtype)
            total, count, _ = small.answers(model, processor, features, [[item] for item in items])
        return (total / count).item()

    own, other = loss(pixels), loss(pixels.roll(-1, 0))
    torch.manual_seed(0)
    model.projector.linear_2.reset_parameters()
    assert own < 0.9 * other and own < loss(pixels) / 2


@pytest.mark.slow
def test_its_prompt_is_that_of_training_and_its_measured_answers_are_those_that_it_gives(small, made):
    """answers() judges by the likeliest tokens behind the right ones: generate must say the same words."""
    model, processor = llava.load(str(made), device="cpu", dtype=torch.float32)
    assert processor.prompt("Why?") == small.BEFORE + "Why?" + small.BETWEEN
    picture, question = small.scenes.draw(3)[0], "What colour is the object in the centre?"
    inputs = processor.chat([("user", question)], [picture])
    said = processor.decode(model.generate(**inputs, max_new_tokens=8)[0])
    with torch.no_grad():
        features = model.projector(small.patches(model, inputs["pixel_values"]))
        for answer, right in ((said, True), (said + " indeed", False)):
            assert small.answers(model, processor, features, [[("colour", question, answer)]])[2] == [("colour", right)]
