"""A conversation: whatever is asked, stopped or added,
the model has read exactly what was said, each piece of it once.
"""

import fcntl
import io
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import pytest
import torch
from forks import ENVIRONMENT
from PIL import Image
from reference import FEATURES, IMAGE, ROOT, TOKENIZER
from talkers import EOS, make_brief_talker, make_talker

import llava
from extras import chat, cli, turn

ASKED = ["What is there?", "Which colour is it?", "And where?"]
FORMS = {"llama": "USER: {} ASSISTANT:", "mistral": "USER: {}\nASSISTANT:"}


@pytest.fixture(scope="module")
def talkers(tmp_path_factory, pictures):
    """family → (model, processor) in float64, whose first answer to ASKED,
    about the first picture, ends after a few tokens.
    """
    return {
        family: make_brief_talker(tmp_path_factory.mktemp(family), family, "float64", ASKED[0], pictures[0])
        for family in FORMS
    }


@pytest.fixture
def talker(talkers, family, monkeypatch):
    monkeypatch.setattr(llava, "load", lambda *_, **__: talkers[family])
    return talkers[family]


class Log:
    """What a model reads and says, and what may happen meanwhile."""

    def __init__(self, model, monkeypatch):
        self.passes = []  # the ids of each pass through the decoder, of its first row, one for each picture
        self.rows = []  # how many rows each pass had
        self.pictures = []  # how many pictures each look took in
        self.answers = []  # the ids of each answer, as far as it came
        monkeypatch.setattr(model, "stream", self.overheard(model.stream, lambda ids: ids.tolist()))
        monkeypatch.setattr(model, "generate", self.overheard(model.generate, lambda ids: ids[0].tolist()))
        self.hooks = [
            model.llama.register_forward_pre_hook(self.read),
            model.vision.register_forward_pre_hook(lambda _, args: self.pictures.append(len(args[0]))),
        ]

    def read(self, llama, args):
        """The ids of what the decoder is given: the words whose embeddings they are, else a feature of a picture."""
        self.rows.append(len(args[0]))
        known = (args[0][0][:, None] == llama.embed.weight).all(-1)  # (T, V)
        ids = [row.index(True) if True in row else IMAGE for row in known.tolist()]
        starts = [i for i, token in enumerate(ids) if token == IMAGE]
        assert len(starts) % FEATURES == 0
        spare = {start for i, start in enumerate(starts) if i % FEATURES}
        self.passes.append([token for i, token in enumerate(ids) if i not in spare])

    def overheard(self, function, ids_of):
        def streamed(results):
            said = self.answers[-1]
            for ids in results:
                said += ids_of(ids)
                yield ids

        def heard(*args, **kwargs):
            self.answers.append([])
            results = function(*args, **kwargs)
            if isinstance(results, torch.Tensor):
                self.answers[-1] += ids_of(results)
                return results
            return streamed(results)

        return heard


@pytest.fixture
def log(talker, monkeypatch):
    log = Log(talker[0], monkeypatch)
    yield log
    for hook in log.hooks:
        hook.remove()


@pytest.fixture
def talk(monkeypatch, capsys):
    """What is typed, options → exit status, stdout, stderr."""

    def talk(typed, *options):
        typed = typed if isinstance(typed, bytes) else "".join(line + "\n" for line in typed).encode()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
            status = cli.main(["--chat", *map(str, options)])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err, errors=re.findall("^error: .*$", err, re.M))

    return talk


def form(family, turns, said, opening=""):
    """The ids of the published form, tokenised as a whole, up to the last question. turns: (number of pictures,
    question).

    said: the ids of the answers so far, which stand where the form has "</s>", with or without their own end.
    """
    asked = [FORMS[family].format("<image>\n" * images + question) for images, question in turns]
    ids = TOKENIZER.encode(opening + "</s>".join(asked)).ids
    said = iter(said)
    whole = []
    for i in ids:
        whole += [*without_end(next(said)), EOS] if i == EOS else [i]
    assert next(said, None) is None
    return whole


def without_end(ids):
    return ids[:-1] if ids[-1:] == [EOS] else ids


def cold(talker, ids, images, **settings):
    """The answer of a model that reads the whole conversation at once."""
    model, processor = talker
    inputs = processor.prepare([ids], images, None)
    generate = type(model).generate
    return generate(model, **inputs, **settings)[0].tolist()


def written(talker, said):
    """How answers look on stdout, a line each."""
    return "".join(talker[1].decode(ids) + "\n" for ids in said)


# ----------------------------------------------------------------------------------------------------------------
# What the model reads


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_turns_together_are_the_published_form(talk, talker, log, family, pictures, number):
    images = pictures[:number]
    found = talk(ASKED, *(["--image", *images] if images else []), "--max-new-tokens", 12)
    assert found.status == 0 and found.out == written(talker, log.answers) and not found.errors
    turns = [(number, ASKED[0]), (0, ASKED[1]), (0, ASKED[2])]
    read = [token for ids in log.passes for token in ids]
    end = without_end(log.answers[-1][-1:])  # the last token of all is not read by anybody
    assert read + end == form(family, turns, log.answers[:-1]) + without_end(log.answers[-1])


def test_each_answer_is_that_of_a_cold_run(talk, talker, log, family, pictures):
    talk(ASKED, "--image", pictures[0], "--max-new-tokens", 12)
    answers = list(log.answers)
    ends = [ids[-1] == EOS for ids in answers]
    assert any(ends) and not all(ends), "of both kinds: answers that end and answers that are cut off"
    for i, said in enumerate(answers):
        turns = [(1, ASKED[0]), (0, ASKED[1]), (0, ASKED[2])][: i + 1]
        assert said == cold(talker, form(family, turns, answers[:i]), pictures[:1], max_new_tokens=12)


def test_a_turn_reads_only_what_is_new(talk, talker, log, family, pictures):
    found = talk(ASKED, "--image", pictures[0], "--max-new-tokens", 12)
    assert log.pictures == [1]
    prompts = [ids for ids in log.passes if len(ids) > 1]
    assert len(prompts) == 3 and [ids.count(IMAGE) for ids in prompts] == [1, 0, 0]
    for ids, said, asked in zip(prompts[1:], log.answers, ASKED[1:], strict=False):
        new = TOKENIZER.encode("</s>" + FORMS[family].format(asked)).ids[1:]  # without <s>
        assert ids == without_end(said[-1:]) + new
    assert len(log.passes) == 3 + sum(len(said) - 1 for said in log.answers)  # else single steps
    assert len(re.findall("image", found.err)) == 1  # and so says the cost line


def test_pictures_that_come_later(talk, talker, log, family, pictures):
    typed = [ASKED[0], f"/image {pictures[1]}", ASKED[1], f"/image {pictures[2]}", f"/image   {pictures[0]} ", ASKED[2]]
    found = talk(typed, "--image", pictures[0], "--max-new-tokens", 8)
    assert found.status == 0 and not found.errors and found.out == written(talker, log.answers)
    assert log.pictures == [1, 1, 2]
    turns, order = [(1, ASKED[0]), (1, ASKED[1]), (2, ASKED[2])], [0, 1, 2, 0]
    answers = list(log.answers)
    for i, seen in enumerate([1, 2, 4]):
        ids = form(family, turns[: i + 1], answers[:i])
        assert answers[i] == cold(talker, ids, [pictures[j] for j in order[:seen]], max_new_tokens=8)
    assert [ids.count(IMAGE) for ids in log.passes if len(ids) > 1][:3] == [1, 1, 2]


def test_pictures_that_are_none(talk, talker, log, pictures, tmp_path):
    (tmp_path / "words.txt").write_text("words")
    bad = [
        "/image nowhere.png",
        f"/image {tmp_path}",
        f"/image {tmp_path / 'words.txt'}",
        "/image http://x.org/y.png",
    ]
    found = talk([ASKED[0], *bad, "/image", ASKED[1]], "--image", pictures[0], "--max-new-tokens", 8)
    answers = log.answers[:]
    assert found.status == 0 and found.out == written(talker, answers) and len(answers) == 2
    assert len(found.errors) == len(bad) and "Traceback" not in found.err
    assert "no such picture: nowhere.png" in found.errors[0] and "download it" in found.errors[3]
    assert f"{tmp_path} is a folder: name the pictures in it" in found.errors[1]
    assert talk(ASKED[:2], "--image", pictures[0], "--max-new-tokens", 8).out == found.out


@pytest.mark.parametrize("opening", ["authors", "Be brief."])
def test_a_system_sentence_stands_once_in_front(talk, talker, log, family, pictures, opening):
    talk(ASKED[:2], "--image", pictures[0], "--system", opening, "--max-new-tokens", 8)
    sentence = cli.AUTHORS_SYSTEM if opening == "authors" else opening
    whole = form(family, [(1, ASKED[0]), (0, ASKED[1])], log.answers[:1], opening=sentence + " ")
    read = [token for ids in log.passes for token in ids]
    assert read[: len(whole)] == whole


def test_what_is_typed_is_text(talk, talker, log, pictures):
    typed = ["</s><s><image> and <pad>?", "USER: <image>"]
    found = talk(typed, "--image", pictures[0], "--max-new-tokens", 4)
    assert found.status == 0 and not found.errors
    prompts = [ids for ids in log.passes if len(ids) > 1]
    assert sum(ids.count(IMAGE) for ids in prompts) == 1
    assert sum(ids.count(TOKENIZER.token_to_id(token)) for ids in prompts for token in ("<s>", "<pad>", "<unk>")) == 1
    for words, ids in zip(typed, prompts, strict=True):
        assert words in talker[1].decode(ids)


def test_show_prompt(talk, talker, log, pictures):
    found = talk(ASKED[:2], "--image", pictures[0], "--max-new-tokens", 4, "--show-prompt")
    shown = re.findall(r"^ids: \[(.*)\]$", found.err, re.M)
    assert [[int(i) for i in ids.split(", ")] for ids in shown] == [ids for ids in log.passes if len(ids) > 1]
    assert re.findall(r"^prompt: '(<s>)?.*USER: (?:<image>\\n)?(.*?)(?: |\\n)ASSISTANT:'$", found.err, re.M) == [
        ("<s>", ASKED[0]), ("", ASKED[1]),
    ]  # fmt: skip


def test_an_id_without_a_token_has_no_string(talkers):
    """Published vocabularies are padded: the last rows of the head have no token,
    and a conversation may hold one even so.
    """
    _, processor = talkers["llama"]
    assert processor.as_text([*TOKENIZER.encode("Hi").ids[1:], 31999, EOS]).endswith("Hi</s>")


# ----------------------------------------------------------------------------------------------------------------
# Decoding


def test_beams(talk, talker, log, family, pictures):
    found = talk(ASKED, "--image", pictures[0], "--max-new-tokens", 8, "--num-beams", 3)
    answers = [ids[:] for ids in log.answers]
    assert found.status == 0 and found.out == written(talker, answers) and log.pictures == [1]
    assert set(log.rows) == {1, 3}  # prompts, and the steps of three beams
    for i, said in enumerate(answers):
        turns = [(1, ASKED[0]), (0, ASKED[1]), (0, ASKED[2])][: i + 1]
        assert said == cold(talker, form(family, turns, answers[:i]), pictures[:1], max_new_tokens=8, num_beams=3)


def test_sampling(talk, talker, log, family, pictures):
    sampled = dict(max_new_tokens=8, temperature=1.5, top_k=50, top_p=0.95, seed=3)
    options = [text for name, value in sampled.items() for text in ("--" + name.replace("_", "-"), value)]
    talk(ASKED[:2], "--image", pictures[0], *options)
    answers = [ids[:] for ids in log.answers]
    for i, said in enumerate(answers):
        ids = form(family, [(1, ASKED[0]), (0, ASKED[1])][: i + 1], answers[:i])
        assert said == cold(talker, ids, pictures[:1], **sampled)


# ----------------------------------------------------------------------------------------------------------------
# Ctrl-C


class Interrupt:
    """Ctrl-C when something has happened for the n-th time since it was armed."""

    def __init__(self, number):
        self.left = number + 1

    def __call__(self, *_, **__):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


PLACES = {  # where Ctrl-C strikes: (a part of the model or the screen, at which of its calls, tokens drawn before)
    "the picture": (lambda model: model.vision.blocks[1], 0, 0),
    "the prompt": (lambda model: model.llama.blocks[1], 0, 0),
    "the prompt, just read": (lambda model: model.llama, 0, 0),
    "the first word": (None, 0, 1),
    "the first step": (lambda model: model.llama.blocks[1], 1, 1),
    "the first step, just done": (lambda model: model.llama, 1, 1),
    "a later step": (lambda model: model.llama.blocks[2], 4, 4),
    "a later step, just done": (lambda model: model.llama, 4, 4),
    "a later word": (None, 3, 4),
}


class Screen(io.StringIO):
    """A stdout that something may happen to when a word of an answer is written.
    As on a terminal, the word is there then.
    """

    def __init__(self):
        super().__init__()
        self.happens = None

    def write(self, text):
        super().write(text)
        if self.happens and text not in ("", "\n"):
            self.happens()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("turn", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_ctrl_c_stops_the_answer_and_keeps_the_talk(talker, log, family, pictures, monkeypatch, place, turn, capsys):
    """The turn may be the first or another; a picture is new in it.
    What comes next is what a cold run says to what was said.
    """
    model, _ = talker
    where, number, drawn = PLACES[place]
    happens, screen, typed = Interrupt(number), Screen(), []
    asked = iter([*ASKED[:turn], f"/image {pictures[0]}", "List everything.", *ASKED[1:]])

    def read_line():
        typed.append(next(asked, None))
        if typed[-1] == "List everything.":
            if where is None:
                screen.happens = happens
            else:
                log.hooks.append(where(model).register_forward_hook(happens))
        return typed[-1]

    monkeypatch.setattr(chat, "read_line", read_line)
    monkeypatch.setattr(sys, "stdout", screen)
    assert cli.main(["--chat", "--max-new-tokens", "8"]) == 0
    assert happens.left <= 0, "it happened"
    answers = [ids[:] for ids in log.answers]
    assert len(answers) == turn + 3 and len(answers[turn]) == drawn

    turns = [(0, ASKED[0])] * turn + [(1, "List everything."), (0, ASKED[1]), (0, ASKED[2])]
    if drawn == 0:  # as if it had not been asked; the picture waits for the next question
        turns[turn : turn + 2] = [(1, ASKED[1])]
        del answers[turn]
    assert log.pictures == [1] if drawn else [1, 1]
    for i, said in enumerate(answers):
        if drawn == 0 or i != turn:
            ids = form(family, turns[: i + 1], answers[:i])
            assert said == cold(
                talker, ids, pictures[:1] * sum(images for images, _ in turns[: i + 1]), max_new_tokens=8
            )
    lines = screen.getvalue().split("\n")
    assert len(lines) == turn + 4 and lines[-1] == ""
    assert lines[-3:-1] == [talker[1].decode(ids) for ids in answers[-2:]]
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_while_beams_are_searched(talk, talker, log, family, pictures):
    happens = Interrupt(3)
    log.hooks.append(talker[0].llama.register_forward_hook(happens))
    found = talk(["List everything.", *ASKED[:2]], "--image", pictures[0], "--max-new-tokens", 8, "--num-beams", 3)
    assert found.status == 0 and happens.left <= 0
    answers = log.answers[1:]
    assert found.out == "\n" + written(talker, answers)
    for i, said in enumerate(answers[:]):
        ids = form(family, [(1, ASKED[0]), (0, ASKED[1])][: i + 1], answers[:i])
        assert said == cold(talker, ids, pictures[:1], max_new_tokens=8, num_beams=3)


def test_ctrl_c_at_the_prompt_is_not_the_end(monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, "  ", "Hello ", KeyboardInterrupt, EOFError])

    def line(*_):
        words = next(typed)
        if isinstance(words, str):
            return words
        raise words

    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert [chat.read_line(), chat.read_line()] == ["Hello", None]
    assert capsys.readouterr() == ("", "\nnotice: Ctrl-D or /exit leaves\n" * 2)  # and the cursor goes to a new line


@pytest.mark.parametrize("terminal", [True, False])
def test_on_a_terminal_ctrl_d_ends_the_line(monkeypatch, capsys, terminal):
    def end(*_):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    monkeypatch.setattr(chat, "on_terminal", lambda: terminal)
    assert chat.read_line() is None and capsys.readouterr() == ("", "\n" * terminal)


# ----------------------------------------------------------------------------------------------------------------
# The end of the context


def test_a_question_that_is_too_long_costs_only_itself(talk, talker, log, family, pictures):
    found = talk([ASKED[0], "word " * 600, ASKED[1]], "--image", pictures[0], "--max-new-tokens", 8)
    answers = [ids[:] for ids in log.answers]
    assert found.status == 0 and len(found.errors) == 1 and len(answers) == 2
    assert re.search(r"take \d+ positions, and the model has 512", found.errors[0])
    first, empty, second = found.out.splitlines()
    assert [first, empty, second] == [talker[1].decode(answers[0]), "", talker[1].decode(answers[1])]
    assert talk(ASKED[:2], "--image", pictures[0], "--max-new-tokens", 8).out == f"{first}\n{second}\n"


def test_a_talk_that_has_filled_the_context(talk, talker, log, family, monkeypatch):
    model, processor = talker
    monkeypatch.setattr(model.config, "eos_token_id", VOID)
    words = "Look:"
    while (asked := len(form(family, [(0, words)], []))) < 490:
        words += " there"
    found = talk([words, *ASKED], "--max-new-tokens", 10**12)
    assert found.status == 0 and "Traceback" not in found.err
    assert [len(said) for said in log.answers] == [512 - asked + 1]
    assert len(found.errors) == 3 and all("positions, and the model has 512" in error for error in found.errors)
    assert found.out == processor.decode(log.answers[0]) + "\n\n\n\n"


def test_a_waiting_picture_that_does_not_fit_is_let_go_and_said_so(talk, talker, log, family, pictures, monkeypatch):
    """Or it would be refused again with each question from there on. What fits without it is answered."""
    monkeypatch.setattr(turn, "context", lambda model: 96)
    typed = [ASKED[0], *[f"/image {pictures[1]}"] * 5, ASKED[1], ASKED[2], f"/image {pictures[2]}", "And here?"]
    found = talk(typed, "--image", pictures[0], "--max-new-tokens", 4)
    answers = [ids[:] for ids in log.answers]
    assert found.status == 0 and len(found.errors) == 1 and len(answers) == 3
    sentence = r"error: text and pictures take \d+ positions, and the model has 96: (\d+) hold what was said so far: .*"
    past = re.fullmatch(sentence, found.errors[0])[1]
    assert int(past) > FEATURES
    assert re.findall("^notice: (.*dropped.*)$", found.err, re.M) == [
        "the pictures attached to this question were dropped; attach them again with /image FILE"
    ]
    turns = [(1, ASKED[0]), (0, ASKED[2]), (1, "And here?")]
    for i in range(3):
        images = [pictures[0], pictures[2]][: 1 + (i == 2)]
        assert answers[i] == cold(talker, form(family, turns[: i + 1], answers[:i]), images, max_new_tokens=4)


def test_a_conversation_knows_nothing_of_the_one_before(talk, log, pictures):
    """One, another, and the first again, with pictures and stopped by an error in between: the same answers."""
    first, other, again = (
        talk([*questions, "word " * 600], "--image", pictures[number], "--max-new-tokens", 6).out
        for questions, number in [(ASKED, 0), (ASKED[::-1], 1), (ASKED, 0)]
    )
    assert first == again != other


VOID = 3  # a byte's token, which these models never say


# ----------------------------------------------------------------------------------------------------------------
# What is typed


def test_empty_lines_and_the_end_of_the_input(talk, talker, log, family):
    whole = talk(ASKED[:2], "--max-new-tokens", 4).out
    for typed in ("\n\n  \n{}\n\t\n{}\n\n", "{}\r\n{}\r\n", "  {}  \n{}"):
        found = talk(typed.format(*ASKED).encode(), "--max-new-tokens", 4)
        assert (found.status, found.out) == (0, whole)
    for nothing in (b"", b"\n\n"):
        found = talk(nothing)
        assert (found.status, found.out, found.err) == (0, "", "")


def test_any_bytes(talk, talker, log):
    found = talk("Où est le 猫? 🐈\n".encode() + b"caf\xe9 \xff\xfe\xf0\x9f\n\x00 \x1b[A\n", "--max-new-tokens", 4)
    assert found.status == 0 and not found.errors and len(log.answers) == 3
    prompts = [talker[1].decode(ids) for ids in log.passes if len(ids) > 1]
    assert "Où est le 猫? 🐈" in prompts[0] and "caf\ufffd \ufffd\ufffd\ufffd" in prompts[1]


# ----------------------------------------------------------------------------------------------------------------
# On a terminal


class Terminal:
    """llava.py --chat on a terminal of its own."""

    def __init__(self, command, errors):
        self.master, slave = pty.openpty()
        self.shown = ""
        self.errors = errors
        environment = ENVIRONMENT | {"TERM": "xterm", "INPUTRC": os.devnull}

        def control():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C reaches this process

        with open(errors, "wb") as err:
            self.process = subprocess.Popen(
                command, stdin=slave, stdout=slave, stderr=err, env=environment, preexec_fn=control
            )  # fmt: skip
        os.close(slave)

    def type(self, keys):
        os.write(self.master, keys.encode())

    def wait(self, pattern, seconds=100):
        """Read until something is shown that was not there at the last call."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.shown):
            left = end - time.monotonic()
            assert left > 0 and select.select([self.master], [], [], left)[0], f"{pattern} is not in {self.shown!r}"
            self.shown += os.read(self.master, 4096).decode(errors="replace")
        shown, self.shown = self.shown, ""
        return shown

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


BEGUN = "\r\n[^\x1b]*[a-z]"  # a word on a new line


@pytest.mark.skipif(
    not sys.stdin.isatty(), reason="needs to be started on a terminal: a job without one may not get Ctrl-C"
)
def test_a_terminal(tmp_path):
    """Editing, history, Ctrl-C at the prompt and in an answer, Ctrl-D."""
    folder, errors = make_talker(tmp_path / "long", text={"max_position_embeddings": 8192}), tmp_path / "errors"
    command = [sys.executable, ROOT / "llava.py", "--model", folder, "--device", "cpu", "--chat", "--show-prompt"]
    terminal = Terminal([*map(str, command), "--max-new-tokens", "8000"], errors)
    try:
        terminal.wait("> $")
        terminal.type("ello\x01H\x05 there\r")  # Ctrl-A goes to the beginning of the line, Ctrl-E to its end
        terminal.wait(BEGUN)  # the answer has begun, and would last for many seconds
        terminal.type("\x03")
        terminal.wait("\n> $")
        terminal.type("\x1b[A\x7f\x7f\r")  # arrow up: the line before; backspace
        terminal.wait(BEGUN)
        terminal.type("\x03")
        terminal.wait("\n> $")
        terminal.type("never mind")
        terminal.wait("never mind")
        terminal.type("\x03")
        terminal.wait("> $")
        terminal.type("\x04")
        assert terminal.process.wait(100) == 0
    finally:
        terminal.close()
    err = errors.read_text()
    assert re.findall(r"USER: (.*?) ASSISTANT", err) == ["Hello there", "Hello the"] and "Traceback" not in err
    assert "tokens/s" not in err  # neither answer came to its end


# ----------------------------------------------------------------------------------------------------------------
# Commands

NAMES = {  # what is typed or pasted → the file that is meant, in the folder where one stands
    "my scene.png": "my scene.png",
    '"my scene.png"': "my scene.png",
    "'my scene.png'": "my scene.png",
    r"my\ scene.png": "my scene.png",
    "'it'\\''s.png'": "it's.png",
    "it's.png": "it's.png",
    '"it\'s.png"': "it's.png",
    "{here}/my\\ scene.png": "my scene.png",
    "file://{here}/my%20scene.png": "my scene.png",
    "'file://{here}/my scene.png'": "my scene.png",
    "file://localhost{here}/my%20scene.png": "my scene.png",
    "FILE:{here}/my%20scene.png": "my scene.png",
    "file://{here}/caf%C3%A9.png": "café.png",
    "~/my scene.png": "my scene.png",
    r"~/my\ scene.png": "my scene.png",
    r"a\ b.png": r"a\ b.png",  # a file of the literal name is there
    '"c.png"': '"c.png"',
    "~.png": "~.png",
    "100%25.png": "100%25.png",
}


@pytest.fixture
def named(tmp_path, monkeypatch):
    """A folder of pictures, each of another colour, in which one stands and is at home."""
    for i, name in enumerate([*{*NAMES.values()}, "a b.png", "c.png", "100%.png"]):
        Image.new("RGB", (30, 30), (8 * i, 255 - 8 * i, 5 * i)).save(tmp_path / name, "PNG")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("typed", NAMES)
def test_a_name_is_taken_as_it_is_or_as_a_shell_would_read_it(named, typed):
    expected = Image.open(named / NAMES[typed]).getpixel((0, 0))
    assert [image.getpixel((0, 0)) for image in chat.open_typed(typed.format(here=named))] == [expected]


def test_several_names_side_by_side(named):
    found = chat.open_typed(f"'{named}/my scene.png' c.png  file://{named}/caf%C3%A9.png")
    expected = [Image.open(named / name).getpixel((0, 0)) for name in ("my scene.png", "c.png", "café.png")]
    assert [image.getpixel((0, 0)) for image in found] == expected


@pytest.mark.parametrize("typed", [
    "none.png", "my scene", '"my scene.png', "c.png none.png", "~/none", "~nobody/x", '""', "file:///none", "x" * 5000,
])  # fmt: skip
def test_a_name_that_is_none_is_said_as_it_was_typed(named, typed):
    with pytest.raises(FileNotFoundError) as caught:
        chat.open_typed(typed)
    assert str(caught.value) == f"no such picture: {typed}"


def test_a_pasted_name_attaches_the_picture(talk, talker, log, family, pictures, named):
    shutil.copy(pictures[0], named / "my photo.png")
    found = talk(["/image 'my photo.png' ", ASKED[0]], "--max-new-tokens", 8)
    assert not found.errors and log.pictures == [1]
    assert log.answers[0] == cold(talker, form(family, [(1, ASKED[0])], []), pictures[:1], max_new_tokens=8)


def test_a_picture_that_waits_is_named_with_its_size(talk, talker, log, named):
    found = talk(["/image c.png", "/image 'a b.png' my\\ scene.png", ASKED[0]], "--max-new-tokens", 8)
    notices = re.findall("^notice: (.* waits .*)$", found.err, re.M)
    assert notices == [
        "c.png (30 x 30) waits for your question",
        "'a b.png' my\\ scene.png (30 x 30, 30 x 30) waits for your question, behind 1 more",
    ]


@pytest.mark.parametrize("bad", ["none.png", "/", "http://x.org/y.png"])
def test_a_picture_that_cannot_be_had_is_not_answered_over(talk, talker, log, family, pictures, bad):
    """No question is answered until a picture is there, or is given up; the one that waits since before stays."""
    typed = [f"/image {pictures[0]}", f"/image {bad}", *ASKED[:2], f"/image {pictures[1]}", ASKED[2]]
    found = talk(typed, "--max-new-tokens", 8)
    assert found.status == 0 and len(found.errors) == 3 and found.out == written(talker, log.answers)
    assert all(f"not answered, as {bad} is not attached" in error for error in found.errors[1:])
    assert len(log.answers) == 1 and log.pictures == [2]
    assert log.answers[0] == cold(talker, form(family, [(2, ASKED[2])], []), pictures[:2], max_new_tokens=8)


def test_a_picture_that_cannot_be_had_may_be_given_up(talk, talker, log, family, pictures):
    found = talk(["/image", "/image none.png", ASKED[0], "/image", ASKED[1], ASKED[2]], "--max-new-tokens", 8)
    assert found.status == 0 and len(found.errors) == 2 and found.out == written(talker, log.answers)
    assert len(re.findall("^notice: ", found.err, re.M)) >= 2 and "none.png is given up" in found.err
    answers = log.answers[:]
    assert len(answers) == 2 and log.pictures == []
    assert answers[0] == cold(talker, form(family, [(0, ASKED[1])], []), [], max_new_tokens=8)


@pytest.mark.parametrize("words", ["exit", "Quit "])
def test_who_forgets_the_slash_is_told(talk, log, words):
    """Rather than answered: the model would speak of the picture."""
    found = talk([words, "exit the room"], "--max-new-tokens", 4)
    assert found.errors == ["error: /exit leaves, as Ctrl-D does"] and len(log.answers) == 1


@pytest.mark.parametrize("way", ["/exit", "/quit", " /EXIT "])
def test_exit_leaves(talk, talker, log, way):
    found = talk([ASKED[0], way, ASKED[1]], "--max-new-tokens", 4)
    assert found.status == 0 and not found.errors and len(log.answers) == 1


def test_help_is_printed_to_stderr_and_names_each_command(talk, talker, log):
    found = talk(["/help"])
    assert (found.status, found.out, log.answers) == (0, "", [])
    for command in ("/image FILE", "/image ", "/help", "/exit", "Ctrl-D", "Ctrl-C"):
        assert command in found.err


@pytest.mark.parametrize("typed", ["/imagine x.png", "/clear", "/", "/usr/share/x.png", "/Help me"])
def test_an_unknown_command_does_not_go_to_the_model(talk, talker, log, typed):
    found = talk([typed, ASKED[0]], "--max-new-tokens", 4)
    assert found.status == 0 and len(log.answers) == 1 and found.out == written(talker, log.answers)
    if typed != "/Help me":
        begin = f"error: there is no command {typed.split()[0]}: /help lists them"
        assert found.errors == [f"{begin}; a question begins with another sign"]


def test_a_slash_elsewhere_is_a_letter_of_the_question(talk, talker, log):
    found = talk(["What is in /etc/hosts?", "1/2 /help"], "--max-new-tokens", 4)
    assert not found.errors and len(log.answers) == 2


def test_on_a_terminal_a_line_says_how_to_begin(talk, talker, monkeypatch):
    assert talk([]).err == ""
    monkeypatch.setattr(chat, "on_terminal", lambda: True)
    monkeypatch.setattr(chat, "read_line", lambda: None)
    found = talk([])
    assert found.out == "" and len(found.err.splitlines()) == 1
    assert "/image FILE" in found.err and "/help" in found.err
