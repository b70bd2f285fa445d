"""A product of FBGEMM, torch's second library for matrices on a CPU: rows in float32 by a matrix that lies in float16.

It asks for no units of 16 bits. Nothing is lost beside the plain product: a number of 16 bits that is a float16, too,
stays what it is, and sums are float32. What it has laid out is an object of its own, which neither torch.compile nor a
copy of the model can look into: `Held` holds it, and an operator is given its number, in a tensor, since torch.compile
would compile anew for another int.
"""

import functools
import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

LARGEST = torch.finfo(torch.float16).max
PIECES, PIECE = 4, 4_000_000  # a matrix is laid out in so many pieces at most, by so many threads, of so many numbers
HELD = weakref.WeakValueDictionary()  # number → Held


class Held:
    """A matrix as FBGEMM has laid it out, in pieces, and the number by which an operator finds it."""

    numbers = itertools.count()

    def __init__(self, pieces, nbytes):
        number = next(self.numbers)
        self.pieces, self.nbytes, self.number = pieces, nbytes, torch.tensor(number, device="cpu")
        HELD[number] = self

    def __deepcopy__(self, memo):
        return self  # nothing changes it


def hold(w):
    """Lay out a matrix (outputs, inputs) of 16 bits → Held; None if one of its numbers is too large for float16.

    A bfloat16 below 2^-17 may lose bits, 3e-8 at most. It takes as long as a hundred words of an answer.
    """
    least, most = w.aminmax()
    if not -LARGEST <= least <= most <= LARGEST:  # nor if one is NaN
        return None
    pieces = w.chunk(max(1, min(PIECES, torch.get_num_threads(), w.numel() // PIECE)))
    with ThreadPoolExecutor(len(pieces)) as pool:
        return Held([*pool.map(lay_out, pieces)], 2 * w.numel())


def lay_out(rows):
    return torch.ops.quantized.linear_prepack_fp16(rows.float(), None)


def product(x, number, outputs):
    """x Wᵀ for rows x of any dtype and a W that is held → float32. Autograd is told that it has no gradient."""
    if torch.compiler.is_compiling() or x.requires_grad:
        return operator(x, number, outputs)
    return multiply(x, number)


def multiply(x, number):
    x = x.float()
    parts = [torch.ops.quantized.linear_dynamic_fp16(x, piece) for piece in HELD[int(number)].pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@torch.library.custom_op("llava::fbgemm_product", mutates_args=())
def operator(x: torch.Tensor, number: torch.Tensor, outputs: int) -> torch.Tensor:
    """product, for torch.compile."""
    return multiply(x, number)


@operator.register_fake
def shape(x, number, outputs):
    return x.new_empty(*x.shape[:-1], outputs, dtype=torch.float32)


@functools.cache
def works():
    """Whether this machine, and this version of torch, have it, and it multiplies as torch does."""
    w, x = torch.randn(2, 40, 72, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    try:
        held = hold(w.half())
        found = product(x, held.number, len(w))
    except (AttributeError, RuntimeError):  # some versions lack it, and some machines have another library
        return False
    return torch.allclose(found, F.linear(x, w.half().float()), rtol=1e-4, atol=1e-4)
