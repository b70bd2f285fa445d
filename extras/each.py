"""One question of many pictures, each by itself: --each."""

from extras.cli import fail, one_line
from extras.turn import answer, open_named


def answer_each(model, processor, options, turns):
    """Print an answer a line after the file's name → exit status. A bad file fails only its own line."""
    status = 0
    for name in options.image:
        try:
            text = "".join(answer(model, processor, options, turns, [open_named(name)]))
            print(f"{one_line(name)}\t{' '.join(text.split())}", flush=True)
        except (ValueError, FileNotFoundError) as error:
            status = fail(error)
    return status
