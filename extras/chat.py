"""A conversation about pictures, line by line: --chat.

A turn is the ids that are new, behind what the cache holds: pictures are encoded once, and nothing that was said is
read again. The form is the one published for several turns, "USER: … ASSISTANT: …</s>USER: …".
"""

import contextlib
import sys

import llama
from extras import checks, turn
from extras.cli import fail, notice


def chat(model, processor, images, options, system=()):
    """Read questions from standard input and answer them → exit status. system: the turns that stand before them."""
    conversation = turn.Conversation(processor.tokenizer.bos, model.init_kv_cache(1, turn.context(model)))
    turns = list(system)
    while (words := read_line()) is not None:
        if words.split()[0] == "/image":
            try:
                images = [*images, checks.open_image(words.removeprefix("/image").strip())]
            except (ValueError, OSError) as error:
                fail(error)
            continue
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
        if conversation.ids is before:  # nothing was answered: as if it had not been asked
            conversation.kv_cache["length"].fill_(past)
        else:
            turns, images = [], []
    return 0


def read_line():
    """The next line that is not empty, None at the end of the input. On a terminal with line editing and a history."""
    while True:
        try:
            terminal = sys.stdin.isatty() and sys.stdout.isatty()
            if terminal:
                with contextlib.suppress(ImportError):  # Windows edits lines by itself
                    import readline  # noqa: F401 (input() edits lines once it is there)
            words = input("> " if terminal else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if words:
            return words
