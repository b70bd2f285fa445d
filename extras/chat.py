"""A conversation about pictures, line by line: --chat.

A turn is the ids that are new, behind what the cache holds: pictures are encoded once, and nothing that was said is
read again. The form is the one published for several turns, "USER: … ASSISTANT: …</s>USER: …".
"""

import contextlib
import os
import shlex
import sys
from urllib.parse import unquote

import llama
from extras import intake, turn
from extras.cli import fail, notice

HELP = """\
/image FILE   attach a picture to the next question; several may be named
/image        go on without a picture that could not be attached
/help         print these lines
/exit         leave, as Ctrl-D does
Ctrl-C stops an answer. Everything else is a question."""


def chat(model, processor, images, options, system=()):
    """Read questions from standard input and answer them → exit status. system: the turns that stand before them."""
    conversation = turn.Conversation(processor.tokenizer.bos, model.init_kv_cache(1, turn.context(model)))
    turns, missing = list(system), None  # missing: what /image asked for and did not get
    if on_terminal():
        print("ask about the pictures; /image FILE attaches one, /help lists the commands", file=sys.stderr)
    while (words := read_line()) is not None:
        command, argument = [*words.split(maxsplit=1), ""][:2]
        command = command.lower()
        if command in ("/exit", "/quit"):
            break
        if command == "/image":
            attached, missing = attach(argument, missing)
            images = [*images, *attached]
            if attached:
                sizes = ", ".join(f"{image.width} x {image.height}" for image in attached)
                before = len(images) - len(attached)
                notice(f"{argument} ({sizes}) waits for your question" + (f", behind {before} more" if before else ""))
        elif words.strip().lower() in ("exit", "quit"):
            fail("/exit leaves, as Ctrl-D does")
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command.startswith("/"):
            fail(f"there is no command {command}: /help lists them; a question begins with another sign")
        elif missing:
            fail(f"not answered, as {missing} is not attached: /image FILE attaches another, /image goes on without")
        else:
            turns, images = ask(model, processor, turns, words, images, options, conversation)
    return 0


def ask(model, processor, turns, words, images, options, conversation):
    """Print the answer → the turns and pictures that still wait to be read: those before, if there was none."""
    before, past = conversation.ids, llama.length(conversation.kv_cache)
    try:
        for text in turn.answer(model, processor, options, [*turns, ("user", words)], images, conversation):
            print(text, end="", flush=True)
    except KeyboardInterrupt:  # stops the answer and keeps the conversation
        print(flush=True)
    except ValueError as error:
        print(flush=True)
        fail(error)
        if images:  # or they would be refused with each question from here on
            notice("the pictures attached to this question were dropped; attach them again with /image FILE")
            images = []
    if conversation.ids is not before:
        return [], []
    conversation.kv_cache["length"].fill_(past)  # nothing was answered: as if it had not been asked
    return turns, images


# ----------------------------------------------------------------------------------------------------------------
# Pictures in a conversation


def attach(argument, missing):
    """What follows /image → the pictures, and what could not be had of what was asked for. None: nothing is missing."""
    if not argument:
        notice(f"{missing} is given up" if missing else "nothing is missing; /image FILE attaches a picture")
        return [], None
    try:
        return open_typed(argument), None
    except (ValueError, OSError) as error:
        fail(error)
        return [], argument


def open_typed(argument):
    """The pictures that are meant by what was typed: a name as it is written, or else as a shell would read it, since
    terminals paste names in that form: "a name", a\\ name, ~/x.png, file:///x%20y.png, and several side by side.
    """
    readings, failure = [[argument], [as_path(argument)]], None
    with contextlib.suppress(ValueError):  # a quote without its end
        readings.append([as_path(name) for name in shlex.split(argument)])
    for names in readings:
        try:
            return [intake.open_image(name) for name in names]
        except FileNotFoundError as error:
            failure = failure or error
    raise failure


def as_path(name):
    """A name as a desktop or a shell writes it → the path."""
    if not name.lower().startswith("file:/"):
        return os.path.expanduser(name)
    path = unquote(name[len("file:") :])
    if path.startswith("//"):  # the name of a machine, mostly left out, and then the path
        path = "/" + path[2:].partition("/")[2]
    return path.removeprefix("/") if os.name == "nt" else path


# ----------------------------------------------------------------------------------------------------------------
# Lines


def on_terminal():
    return sys.stdin.isatty() and sys.stdout.isatty()


def read_line():
    """The next line that is not empty, None at the end of the input. On a terminal with line editing and a history."""
    while True:
        terminal = on_terminal()
        try:
            if terminal:
                with contextlib.suppress(ImportError):  # Windows edits lines by itself
                    import readline  # noqa: F401 (input() edits lines once it is there)
            words = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print(file=sys.stderr)  # what comes next begins on a line of its own
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)
            notice("Ctrl-D or /exit leaves")
            continue
        if words:
            return words
