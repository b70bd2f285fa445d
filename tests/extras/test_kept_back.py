"""extras/kept_back.py: it says that something was learnt only when it was, and when there are too few to tell."""

import json
from pathlib import Path

import pytest
from reference import TINY

import llava
from extras import kept_back
from extras.conversations import Example


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((12, 0, 12, 0), "12 answers are too few to tell"),
        ((19, 0, 19, 0), "too few to tell"),
        ((100, 10, 95, 30), "learnt: the true share lies between 89% and 98%"),
        ((100, 10, 35, 30), "no better than about another picture"),
        ((100, 10, 30, 30), "no better than about another picture"),
        ((100, 90, 95, 30), "better than about another picture, but not than before"),
        ((100, 10, 95, 30, 19), "100 answers about no more than 19 pictures are too few to tell"),
        ((100, 10, 95, 30, 1), "100 answers about no more than 1 picture are too few to tell"),
        ((100, 10, 95, 30, 20), "learnt: the true share lies between 76% and 99%"),  # 19 of 20
        ((100, 10, 95, 80, 20), "no better than about another picture"),
        ((19, 0, 19, 0, 19), "19 answers are too few to tell"),
    ],
)
def test_the_verdict(numbers, said):
    first, second = kept_back.verdict(*numbers).split("\n")
    number, before, after, other = numbers[:4]
    assert first.endswith(f": {before} → {after} of {number}, about another picture {other} of {number}")
    assert said in second


def test_what_is_too_few_is_known_before_training():
    asked = [(f"{i % 10}.png", [], "yes") for i in range(50)]
    assert kept_back.pictures(asked) == 10
    assert kept_back.too_few(50, 10) == "50 answers about no more than 10 pictures are too few to tell"
    assert kept_back.too_few(20, 20) is None and kept_back.too_few(19, 30) == "19 answers are too few to tell"


def test_the_interval_is_wilsons():
    """Against values that are printed in textbooks: 0 of 10, 5 of 10, 10 of 10."""
    for hits, low, high in ((0, 0.0, 0.2775), (5, 0.2366, 0.7634), (10, 0.7225, 1.0)):
        assert kept_back.interval(hits, 10) == pytest.approx((low, high), abs=1e-4)


def test_questions_are_one_for_each_answer_with_what_was_said_before():
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    examples = [Example(Path("x.png"), turns), Example(None, turns)]
    assert kept_back.questions(examples) == [(Path("x.png"), turns[:1], "b"), (Path("x.png"), turns[:3], "d")]
    many = kept_back.questions([Example(Path(f"{i}.png"), turns) for i in range(500)])
    assert 100 < len(many) <= kept_back.MOST and len({image for image, _, _ in many}) > 100


def test_the_control_asks_about_another_picture():
    asked = [("a", [], "1"), ("a", [], "2"), ("b", [], "3"), ("c", [], "4")]
    assert [image for image, _, _ in kept_back.shuffled(asked)] == ["b", "b", "c", "a"]
    assert [image for image, _, _ in kept_back.shuffled(asked[:2], ["a", "z", "y"])] == ["z", "z"]


def test_answers_are_the_models_and_are_written_down(tmp_path):
    model, processor = llava.load("tiny", device="cpu")
    picture = TINY / "scene.png"
    asked = [
        (picture, [("user", "How many objects are there?")], "four"),
        (picture, [("user", "What colour is the star?")], " yellow"),
        (picture, [("user", "What colour is the star?"), ("assistant", "yellow"), ("user", "Where is it?")], "nowhere"),
    ]
    said = kept_back.answers(model, processor, asked, size=2)
    assert said[:2] == ["four", "yellow"] and kept_back.right(asked, said) == 2
    kept_back.write(tmp_path / "kept", asked, said, ["x", "y", "z"])
    rows = [json.loads(line) for line in (tmp_path / "kept").read_text().splitlines()]
    assert [row["right"] for row in rows] == [True, True, False] and rows[2]["question"] == "Where is it?"
    assert rows[0] == {"image": "scene.png", "question": "How many objects are there?", "answer": "four",
                       "said": "four", "right": True, "about another picture": "x"}  # fmt: skip
