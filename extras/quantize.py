"""Matrices for answers alone: packed, or in eight or four bits. Such layers can be neither trained nor saved.

A step multiplies one vector by every matrix, so it takes as long as reading them. They are laid out in the order in
which a CPU reads them fastest, or stored as small integers with a scale. What is multiplied with them keeps its
precision. Each layer stands in the place of an nn.Linear on the meta device, and takes its weight when weights.read
comes to it.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def replace_layers(model, kind, dtype):
    """Put another kind of layer in the place of each nn.Linear of a model on the meta device; weights.read fills it."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                bias = {} if layer.bias is None else {"bias": True}
                with torch.device("meta"):
                    setattr(parent, name, kind(layer.in_features, layer.out_features, dtype, **bias))


# ----------------------------------------------------------------------------------------------------------------
# Packed


class PackedLinear(nn.Module):
    """x Wᵀ + b for a W that is laid out as oneDNN wants it, torch's library for products on a CPU. The same numbers."""

    def __init__(self, in_features, out_features, dtype, bias=False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("w", torch.empty(out_features, in_features, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None)

    def take_weight(self, part, device):
        """Take a slice of a file, (outputs, inputs) → the numbers, before they are packed."""
        weight = part[:].to(device, self.w.dtype)
        self.w = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        return weight

    def forward(self, x):
        return packed_product(x, self.w, self.bias)

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
            layer.take_weight(torch.zeros(64, 64), "cpu")
            return layer(torch.zeros(1, 64, dtype=dtype)).shape == (1, 64)
        except (AttributeError, NotImplementedError):
            return False


# torch.compile cannot trace a product with a packed matrix, unless it is an operator of ours whose shape is told beside
# it.


@torch.library.custom_op("llava::packed_product", mutates_args=())
def packed_product(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + b for a W (outputs, inputs) that is packed."""
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")


@packed_product.register_fake
def packed_product_shape(x, w, bias):
    return x.new_empty(*x.shape[:-1], w.shape[0])


@torch.library.custom_op("llava::packed_integer_product", mutates_args=())
def packed_integer_product(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(x - 128) Wᵀ · scale, float32, for rows x in uint8 and a W (outputs, inputs) in int8 that is packed."""
    x_scale, x_zero, out_scale, out_zero = 1.0, 128, 1.0, 0
    w_zeros, bias = torch.zeros_like(scale, dtype=torch.int64), None
    after = ("none", [], "")  # no function is applied to the product
    return torch.ops.onednn.qlinear_pointwise(
        x, x_scale, x_zero, w, scale, w_zeros, bias, out_scale, out_zero, torch.float32, *after
    )


@packed_integer_product.register_fake
def packed_integer_product_shape(x, w, scale):
    return x.new_empty(len(x), len(scale), dtype=torch.float32)


# ----------------------------------------------------------------------------------------------------------------
# In eight or four bits


class QuantizedLinear(nn.Module):
    """x Wᵀ + b for a W that is stored as integers. A kind has

    rounded   rows of W → their integers and scales
    product   x times some rows, dequantised
    pack      lays the integers out for the kernel of this machine, and says for how many rows of x it pays
    kernel    x times all of them, by that kernel

    Kernels want whole blocks, and some read past the end of what is none. So W is padded to `rows` and `columns`, x
    with zeros beside it, and the rows too many are cut off the product.
    """

    BLOCK = 64  # rows and columns of W come in blocks of so many
    CHUNK = 512  # rows of W that are dequantised at a time, whole blocks too

    def __init__(self, in_features, out_features, dtype, bias=False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None)
        self.rows, self.columns = (math.ceil(size / self.BLOCK) * self.BLOCK for size in (out_features, in_features))
        self.most = 0  # up to this many rows of x the kernel is faster than the plain product

    def forward(self, x):
        x = self.multiplied(x)
        return x if self.bias is None else x + self.bias

    def multiplied(self, x):
        """x Wᵀ: by the kernel where it is faster."""
        rows = x.flatten(0, -2).contiguous()
        if self.columns > self.in_features:
            rows = F.pad(rows, (0, self.columns - self.in_features))
        product = self.kernel if len(rows) <= self.most else self.plain
        return product(rows)[:, : self.out_features].unflatten(0, x.shape[:-1])

    def plain(self, x):
        """The same product with W dequantised: on a CPU some rows at a time, few enough to stay in its cache."""
        step = self.CHUNK if x.is_cpu else self.rows
        return torch.cat([self.product(x, start, start + step) for start in range(0, self.rows, step)], dim=-1)

    def take_weight(self, part, device):
        """Take a slice of a file, (outputs, inputs), some rows at a time, so that little memory is needed beside it."""
        weight = part[:]
        q, scale = zip(*(self.rounded(self.padded(rows.float())) for rows in weight.split(self.CHUNK)), strict=True)
        self.q, self.scale = torch.cat(q).to(device), torch.cat(scale, self.ROWS_OF_SCALE).to(device)
        if torch.device(device).type == "cpu" and self.scale.dtype == torch.bfloat16:
            self.try_kernel()
        return weight

    def try_kernel(self):
        """Lay the integers out for the kernel, if there is one: some versions of torch lack it, or parts of it."""
        q, scale = self.q, self.scale
        try:
            self.pack()
            self.multiplied(torch.zeros(1, self.in_features, dtype=scale.dtype))
        except (AttributeError, NotImplementedError):
            self.q, self.scale, self.most = q, scale, 0

    def padded(self, weight):
        """Some rows of W in whole blocks: the last column is repeated, which leaves the range of each group as it is;
        below are zeros.
        """
        weight = F.pad(weight, (0, self.columns - self.in_features), mode="replicate")
        return F.pad(weight, (0, 0, 0, -len(weight) % self.BLOCK))


class Int8Linear(QuantizedLinear):
    """W[n, k] ≈ scale[n] · q[n, k], with q in -127 … 127: one scale for each row, which is to say for each output.

    A CPU with VNNI multiplies integers, 64 at once, and exactly. So each row of x is split into two of them, x ≈ (high
    + low / 254) · size, both in -127 … 127: finer than a bfloat16 is. It costs little: W is read once for both.
    """

    ROWS_OF_SCALE = 0  # the dimension of `scale` that counts rows

    def __init__(self, in_features, out_features, dtype, bias=False):
        super().__init__(in_features, out_features, dtype, bias)
        self.register_buffer("q", torch.empty(self.rows, self.columns, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(self.rows, dtype=dtype))

    def rounded(self, weight):
        scale = (weight.abs().amax(1) / 127).to(self.scale.dtype)
        q = (weight / at_least_tiny(scale)[:, None]).round().clamp(-127, 127)
        return q.to(torch.int8), scale

    def product(self, x, start, end):
        return F.linear(x, self.q[start:end].to(x.dtype)) * self.scale[start:end].to(x.dtype)

    def pack(self):
        self.most = 32
        if getattr(torch.cpu, "_is_vnni_supported", lambda: False)() and torch.backends.mkldnn.is_available():
            self.q, self.scale, self.most = torch.ops.onednn.qlinear_prepack(self.q, None), self.scale.float(), math.inf

    def kernel(self, x):
        if self.most < math.inf:
            return torch._weight_int8pack_mm(x, self.q, self.scale)
        size = at_least_tiny(x.abs().amax(1, keepdim=True)) / 127  # one for each row
        y = x / size
        high = y.round()
        low = (y - high) * 254
        integers = torch.cat([high, low.round()]).add(128).to(torch.uint8)  # the kernel subtracts the 128 again
        high, low = packed_integer_product(integers, self.q, self.scale).chunk(2)
        return ((high + low / 254) * size).to(x.dtype)


class Int4Linear(QuantizedLinear):
    """W[n, k] ≈ scale[n, g] · (q[n, k] - 8) + zero[n, g], with q in 0 … 15: a scale and a zero for each group g of 64
    columns.

    A byte holds the q of two rows, 32 apart, as the kernel wants it: q (rows / 64, columns, 32). Beside it scale and
    zero, (columns / 64, rows, 2).
    """

    ROWS_OF_SCALE = 1

    def __init__(self, in_features, out_features, dtype, bias=False):
        super().__init__(in_features, out_features, dtype, bias)
        blocks, groups = self.rows // self.BLOCK, self.columns // self.BLOCK
        self.register_buffer("q", torch.empty(blocks, self.columns, self.BLOCK // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(groups, self.rows, 2, dtype=dtype))

    def rounded(self, weight):
        groups = weight.unflatten(1, (-1, self.BLOCK))
        low, high = groups.aminmax(dim=2, keepdim=True)
        scale = ((high - low) / 15).to(self.scale.dtype)
        zero = (low + 8 * scale).to(self.scale.dtype)
        q = ((groups - zero) / at_least_tiny(scale)).round().add(8).clamp(0, 15).to(torch.uint8).flatten(1)
        first, second = q.unflatten(0, (-1, self.BLOCK)).transpose(1, 2).chunk(2, dim=2)
        return first | second << 4, torch.cat([scale, zero], dim=2).transpose(0, 1)

    def product(self, x, start, end):
        q = self.q[start // self.BLOCK : end // self.BLOCK]
        q = torch.cat([q & 15, q >> 4], dim=2).transpose(1, 2).contiguous().to(x.dtype)
        q = q.flatten(0, 1).unflatten(1, (-1, self.BLOCK))
        scale, zero = self.scale[:, start:end].to(x.dtype).permute(2, 1, 0).unsqueeze(3)
        return F.linear(x, q.sub_(8).mul_(scale).add_(zero).flatten(1))

    def pack(self):
        self.most = 32 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 0

    def kernel(self, x):
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.q.view(self.rows, -1), self.BLOCK, self.scale)


def at_least_tiny(scale):
    """The scale in float32, clamped above 0 so that an all-zero row can be divided by it."""
    return scale.float().clamp(min=torch.finfo(torch.float32).tiny)


QUANTIZED = {"int8": Int8Linear, "int4": Int4Linear}
