"""The same question about each of several pictures: a line for each."""

import json
import re
import shutil
import subprocess
import sys

import huggingface_hub.utils  # noqa: F401
import pytest
import torch
from groups import torchrun
from pictures import make_picture
from reference import ROOT
from talkers import COST, byte_ids, expected, make_talker, say

import llava
from extras import each

tqdm = sys.modules["huggingface_hub.utils.tqdm"]


def test_each_picture_in_turn(ask, ours, pictures, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    names = [pictures[0], str(bad), str(tmp_path / "missing.png"), pictures[1]]
    found = ask("--each", "--image", *names, "--prompt", "What is there?", "--max-new-tokens", 9)
    answers = {name: expected(ours, "What is there?", [name], max_new_tokens=9) for name in pictures[:2]}
    assert found.out == "".join(f"{name}\t{' '.join(answer.split())}\n" for name, answer in answers.items())
    assert found.status == 2
    errors = [line for line in found.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and str(bad) in errors[0] and "missing.png" in errors[1]
    assert len(re.findall(COST, found.err)) == 2

    odd = tmp_path / "odd\x1b[2J\n.png"  # what a terminal would obey, and a line of its own
    shutil.copy(pictures[0], odd)
    found = ask("--each", "--image", odd, "--max-new-tokens", 3)
    assert found.status == 0 and found.out.startswith(f"{tmp_path}/odd [2J .png\t") and found.out.count("\n") == 1

    found = ask("--each", "--image", *pictures, "--max-new-tokens", 3)
    assert found.status == 0 and [line.split("\t")[0] for line in found.out.splitlines()] == pictures


def test_an_answer_of_several_lines_is_one_line(ask, monkeypatch, pictures):
    say(monkeypatch, byte_ids("a\nb\n\nc\t"))
    assert ask("--each", "--image", pictures[0]).out == f"{pictures[0]}\ta b c\n"


def test_each_line_is_there_before_the_next_picture(watch, pictures):
    screen = watch("--each", "--image", *pictures, "--max-new-tokens", 4)
    assert [(piece.split("\t")[0], passes) for piece, passes in screen.pieces if piece] == [
        (name, 4 * (i + 1)) for i, name in enumerate(pictures)
    ]


# ----------------------------------------------------------------------------------------------------------------
# A folder, and several side by side


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """A folder of six pictures and what else lies about in one."""
    folder = tmp_path_factory.mktemp("album")
    for seed in range(6):
        make_picture(folder / f"{'fcadbe'[seed]}.png", seed)
    (folder / "notes.txt").write_text("no picture")
    (folder / "inner.png").mkdir()
    return folder


def test_a_folder_stands_for_its_pictures_by_name(ask, album, pictures, tmp_path):
    found = ask("--each", "--image", pictures[1], album, "--max-new-tokens", 2)
    names = [line.split("\t")[0] for line in found.out.splitlines()]
    assert found.status == 0 and names == [pictures[1], *(f"{album}/{letter}.png" for letter in "abcdef")]
    found = ask("--each", "--image", tmp_path)
    assert (found.status, found.out) == (2, "") and "there are no pictures in the folder" in found.err


@pytest.fixture(scope="module")
def brief(tmp_path_factory, album):
    """A talker whose answers about the album end after different numbers of tokens."""
    folder = tmp_path_factory.mktemp("brief")
    model, processor = llava.load(make_talker(folder / "endless"), device="cpu")
    inputs = processor.chat([("user", "Hi")], [f"{album}/a.png"])
    ending = model.generate(**inputs, max_new_tokens=6)[0, -1].item()
    return make_talker(folder / "brief", ending=ending)


@pytest.mark.parametrize("size", [2, 3, 4, 10])
def test_side_by_side_each_answer_is_what_it_is_alone(main, brief, album, size, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    names = [f"{album}/a.png", f"{album}/b.png", bad, *(f"{album}/{letter}.png" for letter in "cdef")]
    command = ["--model", brief, "--device", "cpu", "--each", "--image", *names, "--prompt", "Hi"]
    command += ["--max-new-tokens", 12]
    alone, together = main(*command), main(*command, "--batch-size", size)
    assert together.out == alone.out and alone.out.count("\n") == 6
    assert together.status == alone.status == 2 and together.err.count("error: ") == 1
    tokens = [int(found[1]) for found in re.findall(COST, alone.err)]
    assert len(set(tokens)) > 1  # of different lengths
    assert sum(int(found[1]) for found in re.findall(COST, together.err)) == sum(tokens)
    assert together.err.count("an answer is cut off") == alone.err.count("an answer is cut off")


def test_so_many_rows_go_side_by_side(watch, album):
    screen = watch("--each", "--image", album, "--max-new-tokens", 3, "--batch-size", 4)
    assert screen.rows == {4, 2} and screen.passes == 6


def test_a_line_does_not_wait_for_the_rows_behind_it(watch, album, monkeypatch):
    def stream(self, input_ids, *_, **__):
        for i in range(5):  # row 1 ends first, row 0 at the fourth token
            self.llama(torch.zeros(1, 1, self.config.text_config.hidden_size))
            yield torch.tensor([2 if i >= 3 else 9, 2 if i >= 1 else 9, 9, 9])[: len(input_ids)]

    monkeypatch.setattr(llava.Llava, "stream", stream)
    names = [f"{album}/{letter}.png" for letter in "abcd"]
    screen = watch("--each", "--image", *names, "--batch-size", 4)
    assert [(piece.split("\t")[0][-5], passes) for piece, passes in screen.pieces if piece] == [
        ("a", 4), ("b", 4), ("c", 5), ("d", 5)
    ]  # fmt: skip


@pytest.mark.parametrize("options", [["--temperature", 1.0, "--seed", 3], ["--num-beams", 2]])
def test_drawn_and_searched_answers_are_those_of_one_alone_too(ask, album, options):
    command = ["--each", "--image", album, "--max-new-tokens", 5, *options]
    assert ask(*command, "--batch-size", 4).out == ask(*command).out


def test_a_picture_on_which_the_model_fails_costs_its_own_line(ask, album, monkeypatch):
    features = llava.Llava.get_image_features
    dark = []

    def fails(self, pixels, *args, **kwargs):
        if any((picture == dark[0]).all() for picture in pixels):
            raise ValueError("the picture features are not finite in float16: use another dtype")
        return features(self, pixels, *args, **kwargs)

    command = ["--each", "--image", album, "--max-new-tokens", 4]
    whole = ask(*command).out.splitlines()
    prepare = llava.Processor.prepare

    def noted(self, rows, images, *args):
        inputs = prepare(self, rows, images, *args)
        if not dark:
            dark.append(inputs["pixel_values"][2].clone())
        return inputs

    monkeypatch.setattr(llava.Processor, "prepare", noted)
    monkeypatch.setattr(llava.Llava, "get_image_features", fails)
    found = ask(*command, "--batch-size", 4)
    assert found.status == 2 and found.err.count("error: the picture features are not finite") == 1
    assert found.out.splitlines() == whole[:2] + whole[3:]


# ----------------------------------------------------------------------------------------------------------------
# A file that goes on where it was stopped


def entries(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("size", [1, 4])
def test_out_holds_a_line_for_each(ask, ours, album, tmp_path, size):
    bad, out = tmp_path / "bad.png", tmp_path / "answers.jsonl"
    bad.write_bytes(b"no picture")
    command = ["--each", "--image", album, bad, "--prompt", "Hi", "--max-new-tokens", 4, "--out", out]
    found = ask(*command, "--batch-size", size)
    assert (found.status, found.out) == (2, "")
    *answers, failure = entries(out)
    assert [entry["file"] for entry in answers] == [f"{album}/{letter}.png" for letter in "abcdef"]
    for entry in answers:
        text = expected(ours, "Hi", [entry["file"]], max_new_tokens=4)
        assert entry == {"file": entry["file"], "prompt": "Hi", "answer": text, "tokens": 4}
    assert set(failure) == {"file", "error"} and failure["file"] == str(bad) and str(bad) in failure["error"]


def test_what_stands_in_the_file_is_not_asked_again(ask, album, tmp_path, monkeypatch):
    bad, out = tmp_path / "bad.png", tmp_path / "answers.jsonl"
    bad.write_bytes(b"no picture")
    command = ["--each", "--image", bad, album, "--prompt", "Hi", "--max-new-tokens", 4, "--out", out]
    assert ask(*command).status == 2
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:4]) + lines[4][:-9])  # stopped in the middle of a line
    found = ask(*command)
    assert found.status == 2 and out.read_bytes() == whole
    assert len(re.findall(COST, found.err)) == 3
    assert found.err.count("error: ") == 1 and "1 of the pictures failed in an earlier run" in found.err
    monkeypatch.setattr(llava, "load", lambda *_, **__: pytest.fail("loaded"))
    assert ask(*command).status == 2 and out.read_bytes() == whole
    monkeypatch.undo()
    assert ask(*command[:-6], "--prompt", "Hello", *command[-4:]).status == 2  # another question
    assert [entry.get("prompt") for entry in entries(out)] == [None, *["Hi"] * 6, *["Hello"] * 6]


def test_a_file_of_another_form_goes_on_too(ask, album, tmp_path):
    bad, out = tmp_path / "b\tad.png", tmp_path / "answers.tsv"
    bad.write_bytes(b"no picture")
    command = ["--each", "--image", bad, album, "--max-new-tokens", 4, "--out", out]
    assert ask(*command).status == 2
    whole = out.read_text()
    assert [line.count("\t") for line in whole.splitlines()] == [1] * 7
    assert whole.startswith(f"{tmp_path}/b ad.png\terror: ")
    out.write_text("".join(whole.splitlines(keepends=True)[:3]) + "half a li")
    assert ask(*command).status == 2 and out.read_text() == whole


@pytest.mark.parametrize(
    "name, content",
    [("a.txt", "a letter\nto a friend\nwithout an end"), ("a.jsonl", '{"file": "x"}\nhalf'), ("a.jsonl", "[1]\nhalf"),
     ("a.jsonl", "a.png\tanswer\nhalf")],
)  # fmt: skip
def test_a_file_of_somebody_else_is_left_alone(ask, album, tmp_path, name, content, monkeypatch):
    monkeypatch.setattr(llava, "load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / name).write_text(content)
    found = ask("--each", "--image", album, "--out", tmp_path / name)
    assert found.status == 2 and "line 1 is not" in found.err and found.err.count("\n") == 1
    assert (tmp_path / name).read_text() == content
    found = ask("--each", "--image", album, "--out", tmp_path / "nowhere" / name)
    assert found.status == 2 and found.err.count("\n") == 1


def test_a_name_that_is_no_unicode_stands_in_the_file(tmp_path):
    line = each.json_line({"file": "\udc80.png", "prompt": "Größe?", "answer": "ö"})
    assert json.loads(each.as_bytes(line))["file"] == "\udc80.png"
    assert "ö" in each.json_line({"file": "a.png", "answer": "ö"})
    assert each.as_bytes(each.json_line({"answer": "a\u2028b\n"})).count(b"\n") == 1


@pytest.mark.parametrize(
    "options, words",
    [
        (["--batch-size", 2], "--batch-size is about many pictures"),
        (["--out", "a.txt"], "--out is about many pictures"),
        (["--each", "--batch-size", 0], "--batch-size is 0, and must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(ask, pictures, options, words, monkeypatch):
    monkeypatch.setattr(llava, "load", lambda *_, **__: pytest.fail("loaded"))
    found = ask("--image", pictures[0], *options)
    assert found.status == 2 and words in found.err and found.err.count("\n") == 1


def test_a_terminal_has_a_bar_with_rate_and_time_left(ask, album, monkeypatch):
    plain = ask("--each", "--image", album, "--max-new-tokens", 3)
    assert "picture" not in plain.err and len(re.findall(COST, plain.err)) == 6
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(tqdm, "progress_bar_states", {})  # the tests of the reference switch all bars off
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    found = ask("--each", "--image", album, "--max-new-tokens", 3)
    assert found.out == plain.out and found.status == 0
    assert re.search(r"6/6 \[\d\d:\d\d<\d\d:\d\d,.*picture", found.err) and not re.search(COST, found.err)


# ----------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.mark.slow
def test_pictures_are_dealt_out_to_processes(folder, album, tmp_path):
    bad, out = tmp_path / "bad.png", tmp_path / "answers.jsonl"
    bad.write_bytes(b"no picture")
    command = ["--model", folder, "--device", "cpu", "--each", "--image", album, bad, "--max-new-tokens", 4]
    alone = subprocess.run([sys.executable, "llava.py", *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    together = torchrun("llava.py", *command, status=2)
    assert sorted(together.stdout.splitlines()) == sorted(alone.stdout.splitlines())
    assert len(re.findall(COST, together.stderr)) == 6 and together.stderr.count(f"error: {bad}") == 1
    torchrun("llava.py", *command, "--out", out, "--batch-size", 2, status=2)
    whole = {entry["file"]: entry for entry in entries(out)}
    assert len(whole) == 7 and "error" in whole[str(bad)]
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:5]) + lines[5][:-3])
    torchrun("llava.py", *command, "--out", out, "--quantize", "int8", status=2)
    assert {entry["file"] for entry in entries(out)} == set(whole) and len(entries(out)) == 7
