"""`check` of the exercises: compares a solution with what is right, and says what helps.

It names a cause only where the solution gives what that mistake gives, in every case. Where no listed mistake does, it
says what distinguishes the two values: another kind or shape, the right numbers in another order, a factor, a shift;
and, if nothing of that, the place of the first difference. The arguments stand below.
"""

import inspect
import itertools
import linecache
import math
import numbers

import torch

ROOM = 300  # characters of a line, at most
SMALL = 20_000_000  # parameters of a model whose weights are compared before and after
NOT_YET = (..., NotImplemented)


class Raised:
    """What stands in place of a value when there is none: the error, and the line of the solution that raised it."""

    def __init__(self, error):
        self.error, trace, self.line = error, error.__traceback__.tb_next, ""
        while trace:  # the innermost line that is the student's own: a cell, or what a test compiled
            file = trace.tb_frame.f_code.co_filename
            if "site-packages" not in file and (text := linecache.getline(file, trace.tb_lineno).strip()):
                self.line = text if "ipykernel" in file or file.startswith("<") else self.line
            trace = trace.tb_next

    def __str__(self):
        said = f"it raises {type(self.error).__name__}: {self.error}"
        return said + (f"\n  in the line: {self.line}" if self.line else "")


class Spoiled(Raised):
    """What stands in place of a value when a solution has left a model with other weights."""

    def __init__(self):
        self.error, self.line = "", ""

    def __str__(self):
        return "it leaves the model with other weights (they are put back): every later answer would come from those"


def check(yours, right, *cases, mistakes=None, also=()):
    """Compare a solution with what is right, and print what is wrong with it, or "Right.".

    yours, right: functions, called with each of the cases (tuples of arguments); without cases, values. An answer of
    ... is not there yet. mistakes: {what to say: a function that makes this mistake, or a value}. also: other values
    that are right.
    """
    if not cases:
        got, expected, names = [yours], [right], ()
        wrong = {words: [value] for words, value in (mistakes or {}).items()}
        if any(difference(yours, value) is None for value in also):
            print("Right.")
            return
    else:
        got, expected = ([result(f, case) for case in cases] for f in (yours, right))
        wrong = {words: [result(f, case) for case in cases] for words, f in (mistakes or {}).items()}
        names = list(inspect.signature(yours).parameters)
    if any(any(value is x for x in NOT_YET) for value in got):
        print("Not done yet.")
        return
    failed = [i for i, pair in enumerate(zip(got, expected, strict=True)) if difference(*pair) is not None]
    if not failed:
        print("Right.")
        return
    causes = [words for words, values in wrong.items() if all(map(same, got, values))]
    telling = [i for i in failed if "numbers differ" not in difference(got[i], expected[i])]
    where = (telling or failed)[0]  # a shape or a kind says more than the place of a number
    says = difference(got[where], expected[where])
    lines = [f"Not right: {' Or: '.join(causes)}" if causes else f"Not right: {pattern(got, expected, failed) or says}"]
    if causes and not isinstance(got[where], Raised):
        lines.append(f"  {says}")
    if cases:
        lines.append(f"  for {described(names, cases[where])}")
        if len(failed) < len(cases):
            lines.append(f"  ({len(cases) - len(failed)} of {len(cases)} cases are right)")
    print("\n".join(short(line) for text in lines for line in text.split("\n")))


def result(function, case):
    """What a function gives. It may spoil what it is handed: a copy, and a small model is put right."""
    copies = [copied(x) for x in case]
    numbers = [p for x in case if isinstance(x, torch.nn.Module) for p in x.parameters()]
    numbers = numbers if sum(p.numel() for p in numbers) < SMALL else []
    kept = [p.detach().clone() for p in numbers]
    try:
        value = function(*copies)
    except Exception as error:
        value = Raised(error)
    spoiled = [(p, was) for p, was in zip(numbers, kept, strict=True) if not torch.equal(p, was)]
    with torch.no_grad():
        for p, was in spoiled:
            p.copy_(was)
    if spoiled and not isinstance(value, Raised):
        return Spoiled()
    return value.detach() if isinstance(value, torch.Tensor) else value


def copied(x):
    """A copy of what a solution might change: tensors, and lists, tuples and dicts of such."""
    if isinstance(x, torch.Tensor):
        return x.clone()
    if type(x) in (list, tuple):
        return type(x)(map(copied, x))
    return {key: copied(value) for key, value in x.items()} if isinstance(x, dict) else x


def same(a, b):
    if isinstance(a, Raised) or isinstance(b, Raised):
        return isinstance(a, Raised) and isinstance(b, Raised) and str(a.error) == str(b.error)
    return difference(a, b) is None


def short(line):
    return line if len(line) <= ROOM else line[: ROOM - 2] + " …"


# ----------------------------------------------------------------------------------------------------------------
# In words


def kind(value):
    """What a value is, in words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, bool) or value is None:
        return repr(value)
    if isinstance(value, numbers.Integral):
        return "a whole number"
    if isinstance(value, numbers.Real):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, (list, tuple)):
        of = {kind(x).replace("a whole number", "whole numbers").replace("a string", "strings") for x in value}
        inside = f" of {of.pop()}" if len(of) == 1 else ""
        return f"a {type(value).__name__} of length {len(value)}{'' if not inside else ',' + inside}"
    if isinstance(value, dict):
        return f"a dict of {len(value)} entries"
    return f"a {type(value).__name__}"


def described(names, case):
    """The arguments of a case, in short."""
    names = [*names, *("…" for _ in case)]
    return ", ".join(f"{name} = {brief(value)}" for name, value in zip(names, case, strict=False))


def brief(value):
    if isinstance(value, torch.Tensor):
        few = value.dim() <= 1 and value.numel() <= 8
        return str(value.tolist()) if few else kind(value).removeprefix("a ")
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value):,} bytes"
    if isinstance(value, (int, float, str, list, tuple, type(None))) and len(repr(value)) < 60:
        return repr(value)
    return kind(value).removeprefix("a ").split(",")[0]


def digits(x):
    return f"{x:.4g}" if isinstance(x, float) else repr(x)


# ----------------------------------------------------------------------------------------------------------------
# What distinguishes


def difference(got, expected):
    """What distinguishes two values, in words; None if nothing does."""
    if isinstance(got, Raised):
        return str(got)
    if got is None and expected is not None:
        return f"it returns None (is there a `return`? on every way?), and should be {kind(expected)}"
    if isinstance(expected, torch.Tensor):
        return of_tensors(got, expected)
    if isinstance(expected, bool) and isinstance(got, bool):
        return None if got == expected else f"it is {got}, and should be {expected}"
    if isinstance(expected, numbers.Real):
        return of_numbers(got, expected)
    if isinstance(expected, (list, tuple)):
        return of_lists(got, expected)
    if isinstance(expected, dict):
        return of_dicts(got, expected)
    if type(got) is not type(expected):
        return f"it is {kind(got)}, and should be {kind(expected)}"
    return None if got == expected else f"it is {brief(got)}, which is not it"


def of_numbers(got, expected):
    if isinstance(got, torch.Tensor) and got.numel() == 1:
        right = " (its value is right)" if of_numbers(got.item(), expected) is None else ""
        return f"it is a tensor, and should be {kind(expected)}{right}: `.item()` takes it out"
    if not isinstance(got, numbers.Real) or isinstance(got, bool):
        return f"it is {kind(got)}, and should be {kind(expected)}"
    near = isinstance(expected, float) and math.isfinite(expected) and math.isfinite(got)
    if got == expected or (near and abs(got - expected) <= 1e-4 * max(1.0, abs(expected))):
        return None
    if math.isnan(got):
        return "it is nan, not a number"
    return f"it is {digits(got)}, which is too {'large' if got > expected else 'small'}"


def of_lists(got, expected):
    wanted = f"and should be {kind(expected)}"
    if isinstance(got, torch.Tensor):
        right = " (its numbers are right: `.tolist()`)" if plain(got.tolist()) == plain(expected) else ""
        return f"it is {kind(got)}, {wanted}{right}"
    if not isinstance(got, (list, tuple)):
        return f"it is {kind(got)}, {wanted}"
    if len(got) != len(expected):
        return f"its length is {len(got)}, and should be {len(expected)}{order(list(got), list(expected))}"
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and a.numel() == 1 and a.item() == b:
            return f"at [{i}] there is a tensor, and should be {kind(b)} (its value is right: `int()` or `.item()`)"
        if (found := difference(a, b)) is not None:
            return f"the first difference is at [{i}]: {found}{order(list(got), list(expected))}"
    if type(got) is not type(expected):
        return f"it is a {type(got).__name__}, and should be a {type(expected).__name__} (what is in it is right)"
    return None


def plain(value):
    return [plain(x) for x in value] if isinstance(value, (list, tuple)) else value


def order(got, expected):
    """How one list is the other, otherwise arranged."""
    try:
        if got[::-1] == expected:
            return " (it is the right one, backwards)"
        if len(got) > 1 and (got[1:] == expected[: len(got) - 1] or expected[1:] == got[: len(expected) - 1]):
            return " (it is shifted by one place)"
        if sorted(got) == sorted(expected):
            return " (the right ones, in another order)"
        if expected and got[: len(expected)] == expected:
            return " (it begins right and goes on too long)"
        if got and expected[: len(got)] == got:
            return " (it is right as far as it goes)"
    except (TypeError, RuntimeError):
        pass
    return ""


def of_dicts(got, expected):
    if not isinstance(got, dict):
        return f"it is {kind(got)}, and should be {kind(expected)}"
    if missing := [key for key in expected if key not in got]:
        return f"{len(missing)} of {len(expected)} keys are missing, such as {brief(missing[0])}"
    if more := [key for key in got if key not in expected]:
        return f"there is a key too many: {brief(more[0])}"
    wrong = {key: found for key, value in expected.items() if (found := difference(got[key], value)) is not None}
    if not wrong:
        return None
    key, found = next(iter(wrong.items()))
    return f"{len(wrong)} of {len(expected)} entries differ; the first is {brief(key)}: {found}"


def of_tensors(got, expected):
    if not isinstance(got, torch.Tensor):
        return f"it is {kind(got)}, and should be {kind(expected)}"
    if got.shape != expected.shape:
        return f"its shape is {tuple(got.shape)}, and should be {tuple(expected.shape)}{reshaped(got, expected)}"
    if got.dtype != expected.dtype:
        right = " (its numbers are right)" if close(got, expected) else ""
        return f"its dtype is {got.dtype}, and should be {expected.dtype}{right}"
    if close(got, expected):
        return None
    far = ~torch.isclose(got.double(), expected.double(), rtol=tolerance(expected), atol=1e-5)
    where = tuple(int(i) for i in far.nonzero()[0])
    count = f"{int(far.sum())} of {far.numel()} numbers differ"
    numbers_ = f"{digits(got[where].item())}, and should be {digits(expected[where].item())}"
    return f"{count}, the first at {list(where)}: it is {numbers_}{alike(got, expected, far)}"


def tolerance(expected):
    """Relative: in 16 bits two right ways of computing differ by the last digits that there are."""
    return max(1e-4, 4 * torch.finfo(expected.dtype).eps) if expected.is_floating_point() else 1e-4


def close(got, expected):
    return torch.allclose(got.double(), expected.double(), rtol=tolerance(expected), atol=1e-5)


def reshaped(got, expected):
    """How one shape comes from the other, where the numbers are right."""
    if got.numel() == expected.numel():
        if got.dim() == expected.dim() <= 4:
            for axes in itertools.permutations(range(got.dim())):
                if got.permute(axes).shape == expected.shape and close(got.permute(axes), expected):
                    return f" (the numbers are right: `.permute{axes}`)"
        if close(got.flatten(), expected.flatten()):
            return " (the numbers are right, in the right order)"
    elif got.dim() == expected.dim() and all(a in (1, b) for a, b in zip(got.shape, expected.shape, strict=True)):
        axes = [i for i, (a, b) in enumerate(zip(got.shape, expected.shape, strict=True)) if a != b]
        return f" (axis {axes[0]} has one entry, where one for each of {expected.shape[axes[0]]} is wanted)"
    elif got.dim() == expected.dim():
        axes = [i for i, (a, b) in enumerate(zip(got.shape, expected.shape, strict=True)) if a != b]
        if len(axes) == 1:
            few, axis = min(got.shape[axes[0]], expected.shape[axes[0]]), axes[0]
            ends = ((got.narrow(axis, 0, few), expected.narrow(axis, 0, few), "first"),)
            last = (x.narrow(axis, x.shape[axis] - few, few) for x in (got, expected))
            for a, b, end in (*ends, (*last, "last")):
                if close(a, b):
                    return f" (the {end} {few} along axis {axis} are right)"
            return f" (axis {axis} differs)"
    return ""


def alike(got, expected, far):
    """What two tensors of one shape have in common, in words."""
    a, b = got.double(), expected.double()
    if not a.isfinite().all():
        bad = "nan" if a.isnan().any() else "infinite"
        return f" (some of it is {bad}: an overflow, a division by 0, or a softmax over nothing)"
    if got.dtype == torch.bool and bool(far.all()):
        return " (it is exactly the other way round: True for False)"
    if (a == 0).all():
        return " (all of it is 0)"
    for name, other in variants(b):
        if torch.allclose(a, other, rtol=1e-4, atol=1e-5):
            return f" ({name})"
    ratio = (a / b)[b.abs() > 1e-6]
    if len(ratio) > 1 and (ratio - ratio[0]).abs().max() < 1e-3 * ratio[0].abs():
        return f" (all of it is {digits(ratio[0].item())} times what it should be)"
    if a.numel() > 2 and (a - b - (a - b).flatten()[0]).abs().max() < 1e-4:
        return f" (all of it is off by {digits((a - b).flatten()[0].item())})"
    if torch.allclose(a.flatten().sort().values, b.flatten().sort().values, rtol=1e-4, atol=1e-5):
        return " (these are the right numbers, in another order)"
    rows = far.flatten(1).any(1) if far.dim() > 1 else far.flatten()
    if 0 < int(rows.sum()) < len(rows):
        return f" ({len(rows) - int(rows.sum())} of {len(rows)} along axis 0 are right)"
    return ""


def variants(b):
    """Ways in which a right tensor is often misplaced."""
    if b.dim() > 1 and b.shape[-1] == b.shape[-2]:
        yield "it is transposed", b.transpose(-1, -2)
    for axis in range(b.dim()):
        if b.shape[axis] > 1:
            yield f"it is backwards along axis {axis}", b.flip(axis)
            yield f"it is shifted by one along axis {axis}", b.roll(1, axis)
            yield f"it is shifted by one along axis {axis}", b.roll(-1, axis)


def pattern(got, expected, failed):
    """What numbers have in common over several cases: always off by the same, or by the same factor."""
    pairs = list(zip(got, expected, strict=True))
    if len(pairs) < 2 or not all(isinstance(x, numbers.Real) for pair in pairs for x in pair):
        return None
    says = difference(*pairs[failed[0]])
    off = {round(a - b, 6) for a, b in pairs}
    if len(off) == 1:
        return f"{says} (in each case by {digits(abs(off.pop()))})"
    factors = {round(a / b, 4) for a, b in pairs if b}
    if len(factors) == 1:
        return f"{says} (in each case it is {digits(factors.pop())} times what it should be)"
    return None
