"""tiny: what is in its folder, the world that it was trained on, and what it has learnt."""

import argparse
import itertools
import json
import random
import re
import sys

import parity
import pytest
import torch
from PIL import Image
from reference import TINY
from safetensors import safe_open
from transformers import AutoProcessor

import llava
import weights

sys.path.append(str(TINY))
import evaluate
import scenes
import talks
import tokenizer
import train

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
    ids, _ = tiny[0].prompt_ids(ours["input_ids"], ours["pixel_values"])
    assert torch.equal(ids, theirs["input_ids"]) and torch.equal(ours["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize("situation", evaluate.SITUATIONS)
def test_questions_about_pairs_that_it_never_saw(tiny, situation):
    """Each scene holds a colour-shape pair that training never showed, and the question is about it."""
    model, processor = tiny
    wrong, known = {}, [known for known in KNOWN if known["situation"] == situation]
    assert {item["kind"] for item in known} == {*scenes.KINDS} - {"missing"}
    for item in known:
        asked = evaluate.SITUATIONS[situation](item["seed"], held_out=True)
        turns, pictures, answer = next(rest for kind, *rest in asked if kind == item["kind"])
        assert (turns[-1][1], answer) == (item["question"], item["answer"])
        ids = model.generate(**processor.chat(turns, pictures), max_new_tokens=80)
        if processor.decode(ids[0]) != answer:
            wrong[item["question"]] = processor.decode(ids[0]), answer
    assert wrong == {}


def test_what_is_missing_is_said_to_be(tiny):
    model, processor = tiny
    for seed in range(10):
        image, questions = scenes.draw(seed)
        _, question, answer = questions[-1]
        ids = model.generate(**processor.chat([("user", question)], [image]), max_new_tokens=20)
        assert processor.decode(ids[0]) == answer


def sureness(tiny, image, question, answers):
    """The probability of the likeliest of the answers, among them alone."""
    model, processor = tiny
    inputs = processor.chat([("user", question)], [image])
    ids = [[*processor.tokenizer.encode(answer), processor.eos_id] for answer in answers]
    return float(model.score(ids, **inputs).softmax(0).max())


def test_it_doubts_what_is_in_doubt_and_nothing_else(tiny):
    """A colour halfway between two, a thing that covers another: there is something to sample from."""
    doubts, sure = [], []
    for seed in range(12):
        image, questions = scenes.draw_doubt(seed)
        _, question, answers = next(asked for asked in questions if asked[0] in ("colour", "shape"))
        doubts.append(sureness(tiny, image, question, answers))
        image, questions = scenes.draw(seed)
        _, question, answer = questions[1]
        sure.append(sureness(tiny, image, question, [answer, *({*scenes.COLOURS} - {answer})]))
    assert sum(doubts) / 12 < 0.9 and min(doubts) < 0.7, doubts
    assert sum(sure) / 12 > 0.99, sure


def test_the_table_says_that_it_can_hold_a_talk():
    """97 % of fresh questions and 90 % about held-out pairs, in each situation. A slow test makes the tables anew."""
    tables = (TINY / "README.md").read_text(encoding="utf-8").split("\n| ")
    for name, least in (("fresh scenes", 97), ("a held-out pair", 90)):
        head = " | ".join([name, *evaluate.SITUATIONS])
        start = next(i for i, line in enumerate(tables) if line.startswith(head))
        row = next(line for line in tables[start:] if line.startswith("**all**"))
        shares = [float(share) for share in re.findall(r"([\d.]+)%", row)]
        for situation, share in zip(evaluate.SITUATIONS, shares, strict=True):
            assert share >= least, situation


# ----------------------------------------------------------------------------------------------------------------
# Its world


def things(seed, held_out):
    """What draw puts into scene number `seed`."""
    return scenes.arrange(random.Random(f"scene {seed} held out" if held_out else f"scene {seed}"), held_out)


def worlds(seed, held_out=False):
    """What draw_pair puts into the pictures of pair number `seed`."""
    rng = random.Random(f"pair {seed} held out" if held_out else f"pair {seed}")
    return scenes.arrange(rng, held_out), scenes.arrange(rng, held_out)


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
        assert "missing" not in [kind for kind, _, _ in scenes.draw(seed, held_out=True)[1]]


def test_answers_are_true():
    """Read back from the picture's things, by other means than those that made the question."""
    for seed in range(400):
        scene = things(seed, False)
        for kind, question, answer in scenes.draw(seed)[1]:
            check_answer(scene, kind, question, answer)


POINTER = re.compile(r"[Ii]n the (first|second) (?:picture|image)(?:, )?|(?<=the )(first|second) ")


def test_each_question_about_two_pictures_says_which():
    for seed, held_out in itertools.product(range(30), (False, True)):
        pair, (pictures, questions) = worlds(seed, held_out), scenes.draw_pair(seed, held_out)
        again, same = scenes.draw_pair(seed, held_out)
        assert [x.tobytes() for x in pictures] == [x.tobytes() for x in again] and questions == same
        assert pictures[0].tobytes() != pictures[1].tobytes()
        for kind, question, answer in questions:
            which = [word for words in POINTER.findall(question) for word in words if word]
            assert len(which) == 1, question
            plain = POINTER.sub("", question).replace(" ?", "?")
            check_answer(pair[scenes.ORDINALS.index(which[0])], kind, plain, answer)
            assert held_out or not any(f"{colour} {shape}" in question + answer for colour, shape in scenes.HELD_OUT)


def check_answer(scene, kind, question, answer):
    words = question.rstrip("?").split()
    if kind == "describe":
        assert [thing.cell for thing in scene] == sorted(thing.cell for thing in scene)
        assert answer.count(" at the ") + answer.count(" in the ") == len(scene)
        assert all(f"{thing.colour} {thing.shape}" in answer for thing in scene)
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
    elif kind == "missing":
        assert not any(all(fit(thing, word) for word in words) for thing in scene), (question, scene)
        assert answer == f"There is no {re.search('the (.*)[?]', question)[1]}."


def fit(thing, word):
    """Whether a word of a question may be said of a thing."""
    for values, own in ((scenes.COLOURS, thing.colour), (scenes.SHAPES, thing.shape), (scenes.SIZES, thing.size)):
        if word in values:
            return word == own
    return True


def test_what_is_in_doubt_has_several_answers():
    kinds = set()
    for seed in range(60):
        (image, questions), (again, same) = scenes.draw_doubt(seed), scenes.draw_doubt(seed)
        assert image.tobytes() == again.tobytes() and questions == same
        kinds.add(questions[1][0])
        for _, question, answers in questions:
            assert len({*answers}) == len(answers) > 1
            text = " ".join([question, *answers])
            assert not any(f"{colour} {shape}" in text for colour, shape in scenes.HELD_OUT)
    assert kinds == {"colour", "shape"}


# ----------------------------------------------------------------------------------------------------------------
# How it is trained


def some_talks(number):
    for seed in range(number):
        rng = random.Random(seed)
        scene = [scenes.arrange(rng) for _ in range(3)]
        pictures = [scenes.paint(rng, things) for things in scene]
        yield pictures, talks.talk(rng, scene, lambda talk: len(talk.turns) > 7)
        picture, talk = talks.doubt(rng, lambda talk: len(talk.turns) > 3)
        yield [picture], talk


def test_a_talk_is_trained_on_as_it_is_held(tiny):
    """The ids are those of a conversation, and what is learnt are its answers, each with its end."""
    _, processor = tiny
    for pictures, talk in some_talks(12):
        ids, labels = talks.encode(processor, talk, size=1)
        assert ids == processor.chat(talk.turns, [pictures[i] for i in talk.shown])["input_ids"][0].tolist()
        answers = [words for role, words, *_ in talk.turns if role == "assistant"]
        learnt = [label for label in labels if label != -100]
        assert len(labels) == len(ids) and learnt == [i for i, label in zip(ids, labels, strict=True) if label != -100]
        text = processor.tokenizer.bpe.decode(learnt, skip_special_tokens=False)
        assert text == " ".join(f"{words}</s>" for words in answers)


def test_no_talk_mentions_a_held_out_pair():
    for _, talk in some_talks(60):
        text = " ".join(words for _, words, *_ in talk.turns)
        assert not any(f"{colour} {shape}" in text for colour, shape in scenes.HELD_OUT)


@pytest.fixture
def short(monkeypatch):
    """A second part of four steps, that saves each second one."""
    monkeypatch.setattr(train, "STAGES", {**train.STAGES, "talk": (4, 2, 1e-3)})
    monkeypatch.setattr(train, "LENGTHS", (90,))
    monkeypatch.setattr(train, "POSITIONS", 270)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(short, tmp_path, monkeypatch, capsys):
    def run(name, resume=False):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        args = dict(out=folder, resume=resume, talk=TINY, scale=1.0, seed=0, device="cpu")
        return train.train(argparse.Namespace(**args))[0].state_dict()

    whole, step, calls = run("whole"), train.talk_step, itertools.count()

    def cut_off(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train, "talk_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run("halves")
    resumed = run("halves", resume=True)
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    before = llava.load("tiny", device="cpu")[0].state_dict()
    changed = {name.split(".")[0] for name, weight in whole.items() if not torch.equal(weight, before[name])}
    assert changed == {"projector", "llama"}  # the eye stays as it is


@pytest.mark.parametrize("script", (scenes, tokenizer, train), ids=lambda module: module.__name__)
def test_no_script_writes_over_what_is_there(script, tmp_path, monkeypatch, capsys):
    """Unless it is told to: it says so, with status 2, before it begins, and what is there stays as it was."""
    there = tmp_path / "there"
    there.write_text("mine")
    before = {file.name: file.read_bytes() for file in TINY.iterdir() if file.is_file()}
    for out in (TINY, TINY / "new" / "..") if script is train else (there, TINY / "tokenizer.json"):
        monkeypatch.setattr(sys, "argv", [script.__file__, "--out", str(out), *["--seed", "1"] * (script is scenes)])
        with pytest.raises(SystemExit) as end:
            script.main()
        assert end.value.code == 2 and "--overwrite" in capsys.readouterr().err.splitlines()[-1]
    assert there.read_text() == "mine"
    assert before == {file.name: file.read_bytes() for file in TINY.iterdir() if file.is_file()}


def test_a_scene_is_printed_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scenes.py", "--seed", "7", "--out", str(tmp_path / "new" / "scene.png")])
    scenes.main()
    image, questions = scenes.draw(7)
    printed = capsys.readouterr().out.splitlines()
    assert [line[10:] for line in printed] == [f"{question} {answer}" for _, question, answer in questions]
    assert Image.open(tmp_path / "new" / "scene.png").tobytes() == image.tobytes()


@pytest.mark.slow
def test_the_tokenizer_is_made_of_the_same_pieces():
    """As tiny/tokenizer.py says: the pieces of the shipped one, some with other ids."""
    made, shipped = tokenizer.published_form(tokenizer.train()), json.loads((TINY / "tokenizer.json").read_text())
    assert {*made["model"]["vocab"]} == {*shipped["model"]["vocab"]} and len(shipped["model"]["vocab"]) == 638
    assert {*map(tuple, made["model"]["merges"])} == {*map(tuple, shipped["model"]["merges"])}
