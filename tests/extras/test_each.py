"""The same question about each of several pictures: a line for each."""

import re
import shutil

from talkers import COST, byte_ids, expected, say


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
