"""Matrices for answers alone that are packed: the same numbers, in the order in which a CPU reads them fastest.

A step multiplies one vector by every matrix, so it takes as long as reading them. Each layer stands in the place of an
nn.Linear on the meta device, and takes its weight when weights.read comes to it. It can be neither trained nor saved.
Which kind is taken, if any, extras/speed.py finds out by timing them.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn as nn
import torch.nn.functional as F

from extras import fbgemm


class PackedLinear(nn.Module):
    """x Wᵀ + b for a W that is laid out as oneDNN wants it, torch's library for products on a CPU. The same numbers."""

    ROWS = 64  # of x that the layout is made for: one for fewer rows may take three times as long for a whole prompt
    packing = None  # the future of the matrix that is packed while the next one is read

    def __init__(self, in_features, out_features, dtype, bias=False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("w", torch.empty(out_features, in_features, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None)
        self.register_state_dict_pre_hook(lambda *_: self.wait())

    def take_weight(self, part, device):
        """Take a slice of a file, (outputs, inputs) → the numbers, before they are packed."""
        weight = converted(part[:], self.w.dtype)
        self.wait()  # no more than one lies in memory twice
        self.w = weight
        PackedLinear.packing = in_a_thread(self.pack)
        return weight

    @staticmethod
    def wait():
        """Until all are packed. What went wrong in the thread is raised here."""
        packing, PackedLinear.packing = PackedLinear.packing, None
        if packing is not None:
            packing.result()

    def pack(self):
        self.w = torch.ops.mkldnn._reorder_linear_weight(self.w, self.ROWS)

    def forward(self, x):
        direct = not torch.compiler.is_compiling() and not torch.is_grad_enabled()
        return (multiply if direct else packed_product)(x, self.w, self.bias)

    @staticmethod
    def works(dtype):
        """Whether this machine, and this version of torch, have the product for a dtype."""
        there = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
        if dtype not in there or not torch.backends.mkldnn.is_available():
            return False
        try:
            if not getattr(torch.ops.mkldnn, there[dtype])():
                return False
            layer = PackedLinear(64, 64, dtype)
            layer.w.zero_()
            layer.pack()
            return layer(torch.zeros(1, 64, dtype=dtype)).shape == (1, 64)
        except (AttributeError, NotImplementedError):
            return False


class HalfLinear(PackedLinear):
    """The same by FBGEMM: W in float16 and x in float32. For a CPU that has no units for 16 bits: its steps read as few
    bytes as in those, and a prompt is multiplied as fast as in float32.
    """

    held = None  # until it is packed, or for good if W has numbers that are too large for float16

    def pack(self):
        self.held = fbgemm.hold(self.w)
        if self.held is not None:
            self.w = self.w.new_empty(0)

    def forward(self, x):
        if self.held is None:
            return F.linear(x, self.w, self.bias)
        y = fbgemm.product(x, self.held.number, self.out_features).to(x.dtype)
        return y if self.bias is None else y + self.bias

    @staticmethod
    def works(dtype):
        """Whether it can help: where there are units for a dtype, it could not win, and to time it takes a second."""
        return dtype.itemsize == 2 and not PackedLinear.works(dtype) and fbgemm.works()


KINDS = {"packed": PackedLinear, "packed by FBGEMM": HalfLinear}  # by the names of these ways


def kinds(dtype):
    """Those that this machine has for a dtype."""
    return {name: kind for name, kind in KINDS.items() if kind.works(dtype)}


def in_a_thread(function):
    """Call a function in a thread that ends with it → its future.

    OpenMP gives each thread that computes a team of its own. While teams have more members than there are cores, all
    fall asleep between two products, and to wake them takes longer than a small product.
    """
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return future


def converted(numbers, dtype):
    """A copy in another dtype. From one of 16 bits to the other by float32 and few rows at a time: torch's own way
    between the two is slower.
    """
    if numbers.dtype == dtype or numbers.dtype.itemsize > 2:
        return numbers.to(dtype, copy=True)
    copy = torch.empty(numbers.shape, dtype=dtype)
    for rows, new in zip(numbers.split(32), copy.split(32), strict=True):
        new.copy_(rows.float())
    return copy


def multiply(x, w, bias):
    """x Wᵀ + b for a W (outputs, inputs) that is packed."""
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")


# torch.compile cannot trace a product with a packed matrix, unless it is an operator of ours whose shape is told beside
# it. To call it takes as long as a small product, so that elsewhere it is done without.


@torch.library.custom_op("llava::packed_product", mutates_args=())
def packed_product(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """multiply, for torch.compile and for autograd, which is told that it has no gradient."""
    return multiply(x, w, bias)


@packed_product.register_fake
def packed_product_shape(x, w, bias):
    return x.new_empty(*x.shape[:-1], w.shape[0])
