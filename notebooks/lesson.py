"""What every notebook needs: the way to the modules, their source on the page, checks of exercises, where things stand.

Importing it puts the project's folders on the path. It knows nothing of LLaVA; lens.py does.
"""

import inspect
import os
import sys
import textwrap
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [
    str(ROOT / folder) for folder in (".", "tiny", "tests", "notebooks") if str(ROOT / folder) not in sys.path
]

NAME = os.environ.get("LLAVA_WEIGHTS", "tiny")  # what the notebooks load: tiny, a folder, or a Hub id
PHOTO = os.environ.get("LLAVA_PHOTO", str(ROOT / "tiny" / "scene.png"))
if NAME == "tiny":
    torch.set_num_threads(1)  # so small that threads would only wait for one another; and the same digits each time


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
    """Print the source of classes and functions as it stands in the modules, each below its file and line."""
    for thing in things:
        print(f"# {place(thing)}")
        print(textwrap.dedent(inspect.getsource(thing)).rstrip())
        if thing is not things[-1]:
            print()


def where(concepts):
    """Print concept → file:line. concepts: {words: a class or function, or (that, a text in one of its lines)}."""
    width = max(map(len, concepts))
    for words, thing in concepts.items():
        print(f"{words:<{width}}  {place(*thing) if isinstance(thing, tuple) else place(thing)}")


def check(yours, right, *cases, mistakes=None):
    """Hold a solution against what is right, and say what is wrong with it.

    yours, right: functions, called with each of the cases (tuples of arguments); without cases, values. An answer of
    ... is not there yet. mistakes: {what to say: a function that makes this mistake}.
    """
    for case in cases or [None]:
        try:
            got = yours if case is None else yours(*case)
        except Exception as error:
            print(f"Not right: it raises {type(error).__name__}: {error}")
            return
        if got is ... or got is NotImplemented:
            print("Not done yet.")
            return
        expected = right if case is None else right(*case)
        if (wrong := difference(got, expected)) is not None:
            for sentence, mistake in (mistakes or {}).items():
                if difference(got, mistake if case is None else mistake(*case)) is None:
                    wrong = sentence
            print(f"Not right: {wrong}")
            return
    print("Right.")


def difference(got, expected):
    """What distinguishes two values, in words; None if nothing does."""
    if isinstance(expected, torch.Tensor):
        if not isinstance(got, torch.Tensor):
            return f"it is a {type(got).__name__}, and should be a tensor"
        if got.shape != expected.shape:
            return f"its shape is {tuple(got.shape)}, and should be {tuple(expected.shape)}"
        if got.dtype != expected.dtype:
            return f"its dtype is {got.dtype}, and should be {expected.dtype}"
        if not torch.allclose(got.double(), expected.double(), rtol=1e-4, atol=1e-5):
            far = (got.double() - expected.double()).abs()
            where = tuple(int(i) for i in torch.unravel_index(far.argmax(), far.shape))
            return f"at {list(where)} it is {got[where].item():.4g}, and should be {expected[where].item():.4g}"
        return None
    if isinstance(expected, float):
        return None if got == expected or abs(got - expected) <= 1e-4 * max(1.0, abs(expected)) else f"it is {got:.6g}"
    return None if got == expected else f"it is {got!r}"
