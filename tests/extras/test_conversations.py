"""extras/conversations.py: the authors' form and a plain one become ids and labels; each fifth picture is kept back."""

import json

import pytest
import tokenizer_files
import torch
from PIL import Image
from transformers import AutoTokenizer

import llava
from extras import checks, conversations
from extras.conversations import Example


@pytest.fixture(scope="module")
def processor():
    return llava.load("tiny", device="cpu")[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        Image.new("RGB", (60, 50), (40 * i, 90, 90)).save(folder / f"{i}.png")
    return folder


AUTHORS = [  # as in llava_v1_5_mix665k.json: <image> before or behind the words, several turns, words alone
    {"id": "a", "image": "0.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A star."},
        {"from": "human", "value": "And its colour?"}, {"from": "gpt", "value": "Red."}]},
    {"id": "b", "image": "1.png", "conversations": [
        {"from": "human", "value": "What is this?\n<image>"}, {"from": "gpt", "value": "A square."}]},
    {"id": "c", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]},
]  # fmt: skip


def test_the_authors_form_is_read(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(AUTHORS))
    first, second, third = conversations.read(tmp_path / "data.json", tmp_path / "here")
    turns = [("user", "What is this?"), ("assistant", "A star."), ("user", "And its colour?"), ("assistant", "Red.")]
    assert first == Example(tmp_path / "here" / "0.png", turns)
    assert second.turns == [("user", "What is this?"), ("assistant", "A square.")]
    assert third == Example(None, [("user", "Hello"), ("assistant", "Hi.")])
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, AUTHORS)))
    assert conversations.read(tmp_path / "data.jsonl", tmp_path / "here") == [first, second, third]


def test_the_plain_form_is_read_from_a_list_or_from_lines(tmp_path):
    row = {"image": "0.png", "question": "What?", "answer": "that \u2028 one"}
    for text in (json.dumps([row]), json.dumps(row), "\ufeff" + json.dumps(row, ensure_ascii=False) + "\n\n"):
        (tmp_path / "data").write_text(text, encoding="utf-8")
        expected = [Example(tmp_path / "0.png", [("user", "What?"), ("assistant", "that \u2028 one")])]
        assert conversations.read(tmp_path / "data", tmp_path) == expected


def human(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


WRONG = {
    "[" * 100_000: "is not JSON",
    '{"a": ' * 100_000: "line 1, is not an object of JSON",
    "not json": "line 1, is not an object of JSON",
    "[1, 2": "is not JSON",
    '[{"image": "0.png"}]': "object 1, is not an object of JSON",
    '{"image": "0.png", "question": "?"}': "line 1, is not an object of JSON",
    '["0.png"]': "object 1, is not an object of JSON",
    '{"image": "0.png", "question": "?", "answer": ""}': "line 1, has an image, a question or an answer that is empty",
    '{"image": "0.png", "question": "?", "answer": 3}': "or is no text",
    '{"image": 3, "question": "?", "answer": "x"}': "or is no text",
    '{"image": null, "question": "?", "answer": "x"}': "or is no text",
    json.dumps({"image": "0.png", "conversations": human("<image>", "x")}): "is empty",
    json.dumps({"image": "0.png", "conversations": human("what?", "x")}): "has 1 image and 0 <image>",
    json.dumps({"image": "0.png", "conversations": human("<image><image> what?", "x")}): "has 1 image and 2 <image>",
    json.dumps({"conversations": human("<image> what?", "x")}): "has 0 image and 1 <image>",
    json.dumps({"image": "0.png", "conversations": human("<image>a", "x", "<image>b", "y")}): "in a later turn",
    json.dumps({"image": "0.png", "conversations": human("<image>a", "x", "b")}): "and end with gpt",
    json.dumps({"image": "0.png", "conversations": human("<image>a", "x")[::-1]}): "human first",
    json.dumps({"image": "0.png", "conversations": []}): "and end with gpt",
    json.dumps({"image": "0.png", "conversations": [{"from": "human", "value": 3}]}): "each with a value",
    json.dumps({"image": "0.png", "conversations": ["a", "b"]}): "human first",
    json.dumps({"image": "0.png", "conversations": [{"from": "system", "value": "x"}]}): "human first",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_a_wrong_file_is_one_sentence(tmp_path, text):
    (tmp_path / "data").write_text(text)
    with pytest.raises(ValueError) as caught:
        conversations.read(tmp_path / "data", tmp_path)
    assert WRONG[text] in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_in_another_encoding_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'there is no .*: a line for each question, such as \{"image"'):
        conversations.read(tmp_path / "gone", tmp_path)
    (tmp_path / "data").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        conversations.read(tmp_path / "data", tmp_path)


def test_only_answers_count_in_each_turn_and_rows_are_padded_on_the_left(processor, folder):
    long = [("user", "What is this?"), ("assistant", "star"), ("user", "Where is it?"), ("assistant", "top left")]
    rows = [Example(folder / "0.png", long), Example(folder / "1.png", long[:2]), Example(None, long[2:])]
    made = conversations.batch(processor, rows)
    assert len(made["pixel_values"]) == 2
    answers = ["star top left", "star", "top left"]
    for ids, labels, said, ends in zip(made["input_ids"], made["labels"], answers, (2, 1, 1), strict=True):
        counts = labels != -100
        assert torch.equal(ids[counts], labels[counts])
        assert processor.decode(labels[counts]) == said and int((labels == processor.eos_id).sum()) == ends
        assert counts[-1] and labels[-1] == processor.eos_id
    assert made["attention_mask"].sum(1).tolist() == sorted(made["attention_mask"].sum(1).tolist(), reverse=True)
    assert made["attention_mask"][:, -1].all() and not made["attention_mask"][1, 0]
    assert conversations.counted(made["labels"]) == int((made["labels"] != -100).sum())


@pytest.mark.parametrize("rules", tokenizer_files.RULES)
def test_it_trains_on_the_ids_of_the_written_conversation(processor, folder, tmp_path, rules):
    other = llava.load("tiny", device="cpu")[1]
    other.tokenizer = checks.Tokenizer(tokenizer_files.write(tmp_path, tokenizer_files.RULES[rules]))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    example = Example(folder / "0.png", [("user", "What shape is it?"), ("assistant", "star")])
    made = conversations.batch(other, [example])
    whole = reference("USER: <image>\nWhat shape is it? ASSISTANT: star</s>").input_ids
    assert made["input_ids"][0].tolist() == whole


def test_pictures_are_kept_back_with_all_that_is_asked_about_them(folder):
    rows = [Example(folder / f"{i % 6}.png", [("user", f"{i}"), ("assistant", "x")]) for i in range(18)]
    rows.append(Example(None, [("user", "hello"), ("assistant", "x")]))
    taught, kept = conversations.split(rows)
    assert {x.image.name for x in kept} == {"4.png"} and len(kept) == 3
    assert not {x.image for x in kept} & {x.image for x in taught} and len(taught) + len(kept) == len(rows)
    with pytest.raises(ValueError, match="there are 4 pictures, and it takes 5 or more"):
        conversations.split([x for x in rows if x.image is not None and x.image.name < "4"])


def test_what_is_too_long_or_no_picture_is_named(processor, folder):
    model, _ = llava.load("tiny", device="cpu")
    with pytest.raises(ValueError, match=r"0\.png is too long: the model has 512 positions"):
        turns = [("user", "word " * 600), ("assistant", "x")]
        conversations.check(model, processor, [Example(folder / "0.png", turns)])
    with pytest.raises(OSError, match=r"no such picture"):
        conversations.check(model, processor, [Example(folder / "gone.png", [("user", "a"), ("assistant", "b")])])
