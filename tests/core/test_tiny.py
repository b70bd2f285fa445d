"""tiny: what is in its folder, the world that it was trained on, and what it has learnt."""

import json
import random
import sys

import parity
import pytest
import torch
from reference import TINY
from safetensors import safe_open
from transformers import AutoProcessor

import llava
import weights

sys.path.append(str(TINY))
import scenes

KNOWN = json.loads((TINY.parent / "tests" / "tiny_answers.json").read_text())


@pytest.fixture(scope="module")
def tiny():
    return llava.load("tiny", device="cpu")


def test_the_folder_is_a_published_layout():
    files = {file.name for file in TINY.iterdir() if file.is_file()}
    assert {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "model.safetensors",
    } <= files
    assert [name for name in files if name.endswith(".png")] == ["scene.png"]
    assert (TINY / "model.safetensors").stat().st_size < 5e6
    with safe_open(TINY / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert all(weights.translate(name, weights.OURS) for name in names)  # the names of layout A, as they are published


def test_it_is_small_and_says_what_it_is(tiny):
    model, _ = tiny
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000
    assert model.dtype == torch.float32  # what "auto" means for it on a CPU
    assert "shapes" in model.config.description


def test_transformers_loads_the_folder_and_gives_the_same(capsys):
    assert parity.main([]) == 0, capsys.readouterr().out


def test_transformers_reads_its_prompts_and_pictures_alike(tiny):
    _, processor = tiny
    image, _ = scenes.draw(0)
    prompt = processor.prompt("Describe the image.")
    theirs = AutoProcessor.from_pretrained(TINY)(text=prompt, images=image, return_tensors="pt")
    ours = processor(prompt, image)
    ids, _ = tiny[0].expanded(ours["input_ids"], ours["pixel_values"])
    assert torch.equal(ids, theirs["input_ids"]) and torch.equal(ours["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: f"{known['seed']}-{known['kind']}")
def test_questions_about_pairs_that_it_never_saw(tiny, known):
    """Each scene holds a colour-shape pair that training never showed, and the question is about it."""
    model, processor = tiny
    image, questions = scenes.draw(known["seed"], held_out=True)
    question, answer = next((q, a) for kind, q, a in questions if kind == known["kind"])
    assert (question, answer) == (known["question"], known["answer"])
    ids = model.generate(**processor.chat([("user", question)], [image]), max_new_tokens=80)
    assert processor.decode(ids[0]) == answer


def things(seed, held_out):
    """What draw puts into scene number `seed`."""
    return scenes.arrange(random.Random(f"scene {seed} held out" if held_out else f"scene {seed}"), held_out)


def test_the_world_is_as_large_as_it_says():
    assert len(scenes.COLOURS) >= 6 and len(scenes.SHAPES) >= 4 and len(scenes.SIZES) >= 2
    seen = [things(seed, False) for seed in range(400)]
    assert {len(scene) for scene in seen} == {1, 2, 3, 4}
    assert {(thing.colour, thing.shape) for scene in seen for thing in scene} == set(scenes.SEEN)
    assert {thing.size for scene in seen for thing in scene} == set(scenes.SIZES)
    assert {thing.place for scene in seen for thing in scene} == set(scenes.PLACES)


def test_a_held_out_pair_is_in_no_other_scene_or_question():
    for seed in range(300):
        _, questions = scenes.draw(seed)
        text = " ".join(question + " " + answer for _, question, answer in questions)
        assert not any(f"{colour} {shape}" in text for colour, shape in scenes.HELD_OUT)
        assert sum((thing.colour, thing.shape) in scenes.HELD_OUT for thing in things(seed, True)) == 1


def test_a_scene_is_the_same_each_time_and_has_a_question_of_each_kind():
    for seed in (0, 1, 2, -5, 10**12):
        (image, questions), (again, same) = scenes.draw(seed), scenes.draw(seed)
        assert image.tobytes() == again.tobytes() and questions == same
        assert [kind for kind, _, _ in questions] == [
            kind for kind in scenes.KINDS if kind != "relation" or len(things(seed, False)) > 1
        ]


def test_answers_are_true():
    """Read back from the picture's things, by other means than those that made the question."""
    for seed in range(400):
        scene = things(seed, False)
        for kind, question, answer in scenes.draw(seed)[1]:
            words = question.rstrip("?").split()
            if kind == "describe":
                assert [thing.cell for thing in scene] == sorted(thing.cell for thing in scene)
                assert answer.count(" at the ") + answer.count(" in the ") == len(scene)
            elif kind == "count":
                wanted = [word.removesuffix("s") for word in words]
                fits = [
                    thing
                    for thing in scene
                    if all(word not in scenes.COLOURS or word == thing.colour for word in wanted)
                    and all(word not in scenes.SHAPES or word == thing.shape for word in wanted)
                ]
                assert answer == scenes.NUMBERS[len(fits)]
            elif kind in ("colour", "shape", "where"):
                fits = [thing for thing in scene if all(fit(thing, word) for word in words)]
                if " object at the " in question or " object in the " in question:
                    fits = [thing for thing in scene if question.rstrip("?").endswith(f"the {thing.place}")]
                assert len(fits) == 1, (question, scene)
                assert answer == getattr(fits[0], {"where": "place"}.get(kind, kind))


def fit(thing, word):
    """Whether a word of a question may be said of a thing."""
    for values, own in ((scenes.COLOURS, thing.colour), (scenes.SHAPES, thing.shape), (scenes.SIZES, thing.size)):
        if word in values:
            return word == own
    return True
