"""Matrices for answers alone in eight or four bits. Such layers can be neither trained nor saved.

A step multiplies one vector by every matrix, so it takes as long as reading them: they are stored as small integers
with a scale. What is multiplied with them keeps its precision. Each layer stands in the place of an nn.Linear on the
meta device, and takes its weight when weights.read comes to it. Which of a layer's kernels is taken, extras/speed.py
finds out by timing them.
"""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def replace_layers(model, kind, dtype, **settings):
    """Put another kind of layer in the place of each nn.Linear of a model on the meta device; weights.read fills it."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                setattr(parent, name, in_place_of(layer, kind, dtype, **settings))


def quantize_layers(model, scheme, dtype, settings=lambda kind: {}):
    """Put quantised layers in the place of a decoder's linear ones. The head, which chooses the word, has eight bits at
    least. settings: what a kind of layer is made with.
    """
    model.head = in_place_of(model.head, HEAD, dtype, **settings(HEAD))
    replace_layers(model, QUANTIZED[scheme], dtype, **settings(QUANTIZED[scheme]))


def in_place_of(layer, kind, dtype, **settings):
    """Another kind of layer, of the sides of an nn.Linear, on the meta device."""
    bias = {} if layer.bias is None else {"bias": True}
    with torch.device("meta"):
        return kind(layer.in_features, layer.out_features, dtype, **bias, **settings)


def integer_product(x, w, scale):
    """(x - 128) Wᵀ · scale, float32, for rows x in uint8 and a W (outputs, inputs) in int8 that is packed."""
    x_scale, x_zero, out_scale, out_zero = 1.0, 128, 1.0, 0
    w_zeros, bias = torch.zeros_like(scale, dtype=torch.int64), None
    after = ("none", [], "")  # no function is applied to the product
    return torch.ops.onednn.qlinear_pointwise(
        x, x_scale, x_zero, w, scale, w_zeros, bias, out_scale, out_zero, torch.float32, *after
    )


# torch.compile cannot trace a product with a packed matrix, unless it is an operator of ours whose shape is told beside
# it. To call it takes as long as a small product, so that elsewhere it is done without.


@torch.library.custom_op("llava::packed_integer_product", mutates_args=())
def packed_integer_product(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """integer_product, for torch.compile."""
    return integer_product(x, w, scale)


@packed_integer_product.register_fake
def packed_integer_product_shape(x, w, scale):
    return x.new_empty(len(x), len(scale), dtype=torch.float32)


# ----------------------------------------------------------------------------------------------------------------
# In eight or four bits


class QuantizedLinear(nn.Module):
    """x Wᵀ + b for a W that is stored as integers. A kind has

    rounded   rows of W → their integers and scales
    product   x times some rows, dequantised, out of all integers
    KERNELS   the names of what may multiply instead, if the machine has it, for at most `most` rows of x
    pack      lays the integers out for the chosen kernel
    multiply  x times all of them, by that kernel

    Kernels want whole blocks, and some read past the end of what is none. So W is padded to `rows` and `columns`, x
    with zeros beside it, and the rows too many are cut off the product.
    """

    BLOCK = 64  # rows and columns of W come in blocks of so many
    CHUNK = 256  # rows of W that are dequantised at a time, whole blocks too: few enough to stay in the cache
    KERNELS = ()

    def __init__(self, in_features, out_features, dtype, bias=False, kernel="plain", most=0, wide=False):
        super().__init__()
        self.in_features, self.out_features, self.kernel = in_features, out_features, kernel
        self.most, self.wide = most, wide
        self.rows, self.columns = (math.ceil(size / self.BLOCK) * self.BLOCK for size in (out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None)

    def forward(self, x):
        rows = x.flatten(0, -2).contiguous()
        if self.columns > self.in_features:
            rows = F.pad(rows, (0, self.columns - self.in_features))
        product = self.multiply if len(rows) <= self.most else self.plain
        y = product(rows)[:, : self.out_features].unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias

    def plain(self, x):
        """The same product with W dequantised, on a CPU some rows at a time; wide: in float32, for a CPU that has no
        units for 16 bits.
        """
        step, y = self.CHUNK if x.is_cpu else self.rows, x.float() if self.wide else x
        q = self.q.to_dense().T if self.q.is_mkldnn else self.q
        parts = [self.product(y, q, start, min(start + step, self.rows)) for start in range(0, self.rows, step)]
        return torch.cat(parts, dim=-1).to(x.dtype)

    def take_weight(self, part, device):
        """Take a slice of a file, (outputs, inputs), some rows at a time, so that little memory is needed beside it."""
        weight = part[:]
        q, scale = zip(*(self.rounded(self.padded(rows.float())) for rows in weight.split(self.BLOCK)), strict=True)
        self.q, self.scale = torch.cat(q).to(device), torch.cat(scale, self.ROWS_OF_SCALE).to(device)
        if self.kernel != "plain":
            self.pack()
        return weight

    def padded(self, weight):
        """Some rows of W in whole blocks: the last column is repeated, which leaves the range of each group as it is;
        below are zeros.
        """
        if weight.shape == (self.BLOCK, self.columns):
            return weight
        weight = F.pad(weight, (0, self.columns - self.in_features), mode="replicate")
        return F.pad(weight, (0, 0, 0, -len(weight) % self.BLOCK))


class Int8Linear(QuantizedLinear):
    """W[n, k] ≈ scale[n] · q[n, k], with q in -127 … 127: one scale for each row, which is to say for each output.

    Kernels: torch's own multiplies the vector as it is. oneDNN's multiplies integers, 64 at once, and exactly. So each
    row of x is split into two of them, x ≈ (high + low / 254) · size, both in -127 … 127: finer than a bfloat16 is. It
    costs little: W is read once for both.
    """

    BITS, ROWS_OF_SCALE = 8, 0  # the dimension of `scale` that counts rows
    KERNELS = ("torch", "onednn")

    def __init__(self, in_features, out_features, dtype, **settings):
        super().__init__(in_features, out_features, dtype, **settings)
        self.register_buffer("q", torch.empty(self.rows, self.columns, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(self.rows, dtype=dtype))

    def rounded(self, weight):
        scale = (weight.abs().amax(1) / 127).to(self.scale.dtype)
        q = (weight / at_least_tiny(scale)[:, None]).round_().clamp_(-127, 127)
        return q.to(torch.int8), scale

    def product(self, x, q, start, end):
        q = q[start:end].view(torch.uint8).bitwise_xor(128)  # q + 128: torch is slow in converting int8
        return F.linear(x, q.to(x.dtype).sub_(128)) * self.scale[start:end].to(x.dtype)

    def pack(self):
        if self.kernel == "onednn":
            self.q, self.scale = torch.ops.onednn.qlinear_prepack(self.q, None), self.scale.float()

    def multiply(self, x):
        if self.kernel == "torch":
            return torch._weight_int8pack_mm(x, self.q, self.scale)
        size = at_least_tiny(x.abs().amax(1, keepdim=True)) / 127  # one for each row
        y = x / size
        high = y.round()
        low = (y - high) * 254
        integers = torch.cat([high, low.round()]).add(128).to(torch.uint8)  # the kernel subtracts the 128 again
        product = packed_integer_product if torch.compiler.is_compiling() else integer_product
        high, low = product(integers, self.q, self.scale).chunk(2)
        return ((high + low / 254) * size).to(x.dtype)


class Int4Linear(QuantizedLinear):
    """W[n, k] ≈ scale[n, g] · (q[n, k] - 8) + zero[n, g], with q in 0 … 15: a scale and a zero for each group g of 32
    columns.

    A byte holds the q of two rows, half a block apart, as torch's kernel wants it: q (rows / 2 HALF, columns, HALF).
    Beside it scale and zero, (columns / 32, rows, 2).
    """

    BITS, ROWS_OF_SCALE = 4, 1
    KERNELS = ("torch",)
    GROUP = 32  # columns
    LOW = 0x0F0F0F0F0F0F0F0F  # the lower half of each of eight bytes

    def __init__(self, in_features, out_features, dtype, **settings):
        super().__init__(in_features, out_features, dtype, **settings)
        half, groups = half_block(), self.columns // self.GROUP
        self.register_buffer("q", torch.empty(self.rows // half // 2, self.columns, half, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(groups, self.rows, 2, dtype=dtype))

    def rounded(self, weight):
        """From the least to the greatest of each group. A line that is fitted to the group's numbers is nearer in the
        mean square and further from the two ends; a real language model foretells a text worse with it.
        """
        groups = weight.unflatten(1, (-1, self.GROUP))
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scale = ((high - low) / 15).to(self.scale.dtype)
        zero = (low + 8 * scale).to(self.scale.dtype)
        q = ((groups - zero) / at_least_tiny(scale)).round_().clamp_(-8, 7)
        half = self.q.shape[-1]
        q = q.add_(8).to(torch.uint8).flatten(1)
        first, second = q.unflatten(0, (-1, 2 * half)).transpose(1, 2).chunk(2, dim=2)
        return first | second << 4, torch.cat([scale, zero], dim=2).transpose(0, 1)

    def product(self, x, q, start, end):
        half, groups = self.q.shape[-1], self.columns // self.GROUP
        pairs = q[start // (2 * half) : end // (2 * half)].view(torch.int64).transpose(0, 1)  # eight bytes at once
        q = torch.stack([pairs & self.LOW, pairs >> 4 & self.LOW], dim=2)  # (columns, blocks, 2, HALF / 8)
        q = q.view(torch.uint8).view(groups, self.GROUP, end - start)  # the rows in their order
        scale, zero = self.scale[:, None, start:end].to(x.dtype).unbind(3)
        weight = torch.addcmul(zero - 8 * scale, q.to(x.dtype), scale)  # Wᵀ
        return x @ weight.flatten(0, 1)

    def pack(self):
        pass  # they lie as the kernel wants them

    def multiply(self, x):
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.q.view(self.rows, -1), self.GROUP, self.scale)


def half_block():
    """Half the rows that torch's kernel of four bits takes at once: four registers hold them as float32."""
    return 32 if getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")() == "AVX512" else 16


def at_least_tiny(scale):
    """The scale in float32, clamped above 0 so that an all-zero row can be divided by it."""
    return scale.float().clamp(min=torch.finfo(torch.float32).tiny)


QUANTIZED = {"int8": Int8Linear, "int4": Int4Linear}
HEAD = Int8Linear


@functools.cache
def works(kind, kernel, dtype):
    """Whether this machine, and this version of torch, have a kernel, and it gives the numbers of the plain product.

    Checked on the largest numbers that there are, all of one sign, too: a processor that adds the products of eight
    bits in sixteen saturates there without a word, and by a little elsewhere.
    """
    shape, generator = (kind.BLOCK, 4 * kind.BLOCK), torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float32)
    weight = torch.cat([weight, weight.sign(), torch.ones_like(weight)])
    x = torch.cat([weight[:3], weight[-1:], -weight[-1:]]).to(dtype)
    layer, plain = (kind(weight.shape[1], len(weight), dtype, kernel=name, most=len(x)) for name in (kernel, "plain"))
    plain.take_weight(weight, "cpu")
    try:
        layer.take_weight(weight, "cpu")
        found, expected = layer(x).double(), plain.plain(x).double()
    except (AttributeError, NotImplementedError):  # some versions lack it, or parts of it
        return False
    return bool(((found - expected).abs() <= 0.01 * x.abs().double() @ weight.abs().double().T).all())
