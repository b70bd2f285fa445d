"""What every notebook needs: the way to the modules, their source on the page, checks of exercises, where things stand.

Importing it puts the project's folders on the path. It knows nothing of LLaVA; lens.py does.
"""

import inspect
import os
import sys
import textwrap
from pathlib import Path

import matplotlib
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [
    str(ROOT / name) for name in (".", "tiny", "small", "tests", "notebooks") if str(ROOT / name) not in sys.path
]

from checking import check, difference  # noqa: E402, F401 (the notebooks take them from here)


def found(path):
    """A path as it was meant: from the project's root, if it is not to be found from here."""
    return str(path if os.path.exists(path) or not (ROOT / path).exists() else ROOT / path)


NAME = os.environ.get("LLAVA_WEIGHTS", "tiny")  # what the notebooks load: tiny, a folder, or a Hub id
NAME = found(NAME) if os.sep in NAME else NAME
PHOTO = found(os.environ.get("LLAVA_PHOTO", str(ROOT / "tiny" / "scene.png")))
matplotlib.rcParams["figure.dpi"] = 150  # legible on a projector
if NAME == "tiny":
    torch.set_num_threads(1)  # so small that threads would only wait for one another; and the same digits each time


def needs(mark, what=None):
    """From here on a cell that begins with the comment `mark` says what it needs, and does nothing; None: it runs.

    So a notebook runs to its end where something is missing that some of its cells need.
    """
    from IPython import get_ipython

    def rest(lines):
        return [f"print({f'This cell needs {what}'!r})\n"] if what and lines and lines[0].strip() == mark else lines

    rest.mark = mark
    changes = get_ipython().input_transformers_cleanup
    changes[:] = [change for change in changes if getattr(change, "mark", None) != mark] + [rest]


def place(thing, line=None):
    """file:line of a class, function or module, or of the first line in it that contains the given text."""
    thing = inspect.unwrap(thing) if callable(thing) else thing
    source, first = inspect.getsourcelines(thing)
    if line is not None:
        found = [i for i, text in enumerate(source) if line in text]
        if not found:
            raise ValueError(f"{thing.__name__} has no line with {line!r}")
        first = max(first, 1) + found[0]
    return f"{Path(inspect.getsourcefile(thing)).relative_to(ROOT)}:{max(first, 1)}"


def show(*things):
    """Print the source of classes and functions as it stands in the modules, each below its file and line.

    (thing, text, …) stands for those of its lines alone that contain one of the texts.
    """
    for number, thing in enumerate(things):
        thing, *texts = thing if isinstance(thing, tuple) else (thing,)
        lines = textwrap.dedent(inspect.getsource(thing)).rstrip().splitlines()
        kept = [i for i, line in enumerate(lines) if not texts or any(text in line for text in texts)]
        print(("\n" if number else "") + f"# {place(thing)}")
        for i in kept:
            print(("    ...\n" if i and i - 1 not in kept else "") + lines[i])


def where(concepts):
    """Print concept → file:line. concepts: {words: a class or function, or (that, a text in one of its lines)}."""
    width = max(map(len, concepts))
    for words, thing in concepts.items():
        print(f"{words:<{width}}  {place(*thing) if isinstance(thing, tuple) else place(thing)}")
