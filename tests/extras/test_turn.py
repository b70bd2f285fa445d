"""One answer: pieces of text, the cost line, the end of the context."""

import re
import resource
import sys
from types import SimpleNamespace

import pytest
import texts
import tokenizer_files
import torch
from reference import TINY
from talkers import COST, CUT, byte_ids, say
from texts import TEXTS, random_ids
from transformers import AutoTokenizer

import llama
import vision
from extras import checks, turn


def test_an_answer_ends_with_the_context(ask, ours):
    words, asked = "Look:", 0
    while asked < 500:
        words += " there"
        asked = ours[1].chat([("user", words)])["input_ids"].shape[1]
    found = ask("--prompt", words, "--max-new-tokens", 10**12)
    assert found.status == 0 and found.err.endswith(CUT.format(512 - asked + 1) + "\n")


def test_the_cost_line_tells_the_stages_apart(monkeypatch, ask, pictures):
    """With a clock that only the stages move: 3 s a picture, 0.5 s a pass through the language model."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(turn, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def slow(cls, seconds):
        forward = cls.forward

        def slower(*args, **kwargs):
            clock.now += seconds
            return forward(*args, **kwargs)

        monkeypatch.setattr(cls, "forward", slower)

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9

    slow(vision.VisionTower, 3.0)
    slow(llama.Llama, 0.5)
    for images, image in (([], ""), (["--image", *pictures[:1]], "image 3000 ms, ")):
        before = peak()
        cost = ask("--prompt", "Hi", "--max-new-tokens", 5, *images).err.splitlines()[0]
        assert cost.startswith(f"{image}prefill 500 ms, 5 tokens, 2.0 tokens/s, peak memory ")
        assert before - 0.01 < float(re.fullmatch(COST, cost)[3]) < peak() + 0.01


def test_the_answer_is_streamed(watch, ours):
    model, processor = ours
    screen = watch("--prompt", "Hello", "--max-new-tokens", 8)
    pieces = [(piece, passes) for piece, passes in screen.pieces if piece]
    ids = model.generate(**processor.chat([("user", "Hello")]), max_new_tokens=8)[0]
    assert pieces[:-1] == [(piece, i + 1) for i, piece in enumerate(turn.as_text(processor.tokenizer, ids))]
    assert pieces[-1] == ("\n", 8)


def test_only_whole_characters_are_shown(watch, monkeypatch):
    say(monkeypatch, [*byte_ids("é猫🐈"), byte_ids("猫")[0]])
    pieces = [piece for piece in watch("--prompt", "Hi").pieces if piece[0]]
    assert pieces == [("é", 2), ("猫", 5), ("🐈", 9), ("\n", 10)]


def test_a_system_without_the_figure_of_the_memory(ask, monkeypatch):
    """Windows has no resource module."""
    monkeypatch.setitem(sys.modules, "resource", None)
    found = ask("--prompt", "Hi", "--max-new-tokens", 2)
    assert found.status == 0 and re.match(
        r"prefill \d+ ms, 2 tokens, \d+\.\d tokens/s, peak memory unknown\n", found.err
    )


# ----------------------------------------------------------------------------------------------------------------
# A stream of ids as pieces of text


@pytest.fixture(scope="module", params=["tiny", "vicuna"])
def tokenizer(request):
    """That of this repository, and the published one."""
    if request.param == "tiny":
        return checks.Tokenizer(TINY / "tokenizer.json")
    return checks.Tokenizer(request.getfixturevalue("data") / "vicuna-tokenizer" / "tokenizer.json")


class Logged:
    """An iterator that knows how many of its items were taken."""

    def __init__(self, items):
        self.items, self.taken = iter(items), 0

    def __iter__(self):
        return self

    def __next__(self):
        item = next(self.items)
        self.taken += 1
        return item


def test_special_tokens_are_not_in_the_stream(tokenizer):
    ids = [tokenizer.id(token) for token in ("<s>", "<image>", "<unk>", "<pad>", "</s>")]
    assert "".join(turn.as_text(tokenizer, [*ids, *tokenizer.encode("Hello"), *ids])) == "Hello"
    assert list(turn.as_text(tokenizer, ids)) == []


@pytest.mark.parametrize("text", [text for text in TEXTS if "\ufffd" not in text], ids=ascii)
def test_a_stream_adds_up_to_the_decoded_text(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = list(turn.as_text(tokenizer, iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(piece and "\ufffd" not in piece for piece in pieces)


def test_a_stream_shows_each_character_when_its_last_byte_is_there(tokenizer):
    ids = texts.byte_ids(tokenizer, "é猫🐈".encode())
    stream = turn.as_text(tokenizer, log := Logged(ids))
    assert [(piece, log.taken) for piece in stream] == [("é", 2), ("猫", 5), ("🐈", 9)]


def test_a_stream_shows_each_token_at_once(tokenizer):
    ids = tokenizer.encode("What is there in the picture? A cat, and two dogs.")
    shown = [(piece, log.taken) for log in [Logged(ids)] for piece in turn.as_text(tokenizer, log)]
    assert [taken for _, taken in shown] == list(
        range(1 + len(ids) - len(shown), 1 + len(ids))
    )  # at most "▁" shows nothing
    assert len(ids) - len(shown) <= 1


@pytest.mark.parametrize("broken", [False, True])
def test_a_stream_of_random_ids_adds_up(tokenizer, broken):
    for seed in range(broken, 200, 2):
        ids = random_ids(tokenizer, seed)
        text, pieces = tokenizer.decode(ids), list(turn.as_text(tokenizer, ids))
        assert all(piece and "\ufffd" not in piece for piece in pieces), seed
        assert broken or "\ufffd" not in text
        if "\ufffd" not in text:
            assert "".join(pieces) == text, seed
        else:  # whatever is not broken is shown, in its order
            shown = iter("".join(pieces))
            assert all(letter in shown for letter in text.replace("\ufffd", "")), seed


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_stream_cut_inside_a_character_shows_what_is_whole(tokenizer, cut):
    ids = tokenizer.encode("Here: ") + texts.byte_ids(tokenizer, "猫🐈".encode()[:-cut])
    assert "".join(turn.as_text(tokenizer, ids)) == "Here: 猫"


def test_a_stream_never_shows_a_broken_character(tokenizer):
    words = tokenizer.encode("cat")
    for broken in (b"\xff", b"\xe5", b"\xf0\x9f\x90", b"\x80\x80", b"\xe7\x8c"):
        ids = texts.byte_ids(tokenizer, broken)
        assert "".join(turn.as_text(tokenizer, [*words, *ids, *words])) == "cat cat"
        assert "".join(turn.as_text(tokenizer, [*words, *ids])) == "cat"
        assert (
            "".join(turn.as_text(tokenizer, [*words, *texts.byte_ids(tokenizer, "猫".encode()), *ids, *words]))
            == "cat猫 cat"
        )


def test_a_stream_is_lazy(tokenizer):
    def ids():
        yield from tokenizer.encode("Hello")
        raise RuntimeError("asked for more than was needed")

    assert next(turn.as_text(tokenizer, ids()))


# ----------------------------------------------------------------------------------------------------------------
# A later turn


@pytest.mark.parametrize("rules", tokenizer_files.RULES)
def test_a_later_turn_has_the_ids_of_the_whole_conversation(tmp_path, rules):
    """Behind the end of the last answer, whether the model has said it or it was put there for it."""
    tokenizer = checks.Tokenizer(tokenizer_files.write(tmp_path, tokenizer_files.RULES[rules]))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    later = turn.Conversation([2], {"length": torch.tensor(9)})
    for asked in ("USER: And? ASSISTANT:", " x", "", "\n"):
        whole = reference(f"USER: Hi ASSISTANT: Yes. </s>{asked}").input_ids
        found = turn.following(tokenizer, later, [2, asked])
        if 2 in whole:
            assert found == whole[whole.index(2) :]
        else:  # by its flags it is letters in the written form, and the model has said it all the same
            assert found == [2, *reference(asked, add_special_tokens=False).input_ids]


@pytest.mark.parametrize("rules", tokenizer_files.RULES)
def test_the_first_turn_has_the_ids_of_the_written_prompt(tmp_path, rules):
    tokenizer = checks.Tokenizer(tokenizer_files.write(tmp_path, tokenizer_files.RULES[rules]))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    for kv_cache in (None, {"length": torch.tensor(0)}):
        first = turn.Conversation(tokenizer.bos, kv_cache)
        pieces = ["USER: ", 638, "\nWhat? ASSISTANT:"]
        assert turn.following(tokenizer, first, pieces) == reference("USER: <image>\nWhat? ASSISTANT:").input_ids
    assert first.ids == tokenizer.bos == [1]
