"""Quantised layers beside the plain ones."""

import pytest
import torch
import torch.nn.functional as F
from reference import TINY

import llava
import weights
from extras import quantize, speed

SCHEMES = list(quantize.QUANTIZED)


KERNELS = [(scheme, name) for scheme in SCHEMES for name in quantize.QUANTIZED[scheme].KERNELS]


def quantized(scheme, weight, dtype=torch.float32, **settings):
    """A quantised layer that holds the given matrix."""
    outputs, inputs = weight.shape
    with torch.device("meta"):
        layer = quantize.QUANTIZED[scheme](inputs, outputs, dtype, **settings)
    layer.take_weight(weight, "cpu")
    return layer


def with_kernel(scheme, name, weight, most=1000):
    """The same, multiplied by a kernel."""
    if not quantize.works(quantize.QUANTIZED[scheme], name, torch.bfloat16):
        pytest.skip("this processor has no such kernel, or one that saturates")
    return quantized(scheme, weight, torch.bfloat16, kernel=name, most=most)


def written_out(layer, dtype):
    """The matrix that a quantised layer stands for, by its definition, one number at a time."""
    if isinstance(layer, quantize.Int8Linear):
        q = layer.q.to_dense().T if layer.q.is_mkldnn else layer.q
        return (q.to(dtype) * layer.scale.to(dtype)[:, None])[: layer.out_features, : layer.in_features]
    rows = torch.empty(layer.out_features, layer.in_features, dtype=dtype)
    q = four_bits(layer)
    for n in range(layer.out_features):
        scale, zero = layer.scale[:, n].to(dtype).repeat_interleave(32, 0)[: layer.in_features].unbind(1)
        rows[n] = (q[n] - 8) * scale + zero
    return rows


def four_bits(layer):
    rows, half = [], layer.q.shape[-1]
    for n in range(layer.out_features):
        byte = layer.q[n // (2 * half), : layer.in_features, n % half].int()
        rows.append(byte >> 4 if n % (2 * half) >= half else byte & 15)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "shape", [(128, 256), (96, 352), (640, 64), (1088, 192), (641, 100), (513, 1), (1, 65)], ids=str
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_layer_is_the_product_with_what_it_stands_for(scheme, shape):
    weight = torch.randn(shape, dtype=torch.float64)
    layer = quantized(scheme, weight, torch.float64)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64)
    matrix = written_out(layer, torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, matrix), rtol=1e-12, atol=1e-12)
    # and what it stands for is the nearest that its grid has
    steps = layer.scale[:, None] if scheme == "int8" else layer.scale[..., 0].T.repeat_interleave(32, 1)
    assert ((matrix - weight).abs() <= steps[: shape[0], : shape[1]] * 0.5001 + 1e-6).all()


def test_the_two_ends_of_a_group_are_kept():
    """They are the numbers that count."""
    weight = torch.randn(64, 128)
    error = (written_out(quantized("int4", weight), torch.float32) - weight).unflatten(1, (-1, 32))
    groups = weight.unflatten(1, (-1, 32))
    for places in (groups.argmin(2, keepdim=True), groups.argmax(2, keepdim=True)):
        assert error.gather(2, places).abs().max() < 1e-5


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 32, 70])
@pytest.mark.parametrize("scheme, name", KERNELS)
def test_a_kernel_is_the_plain_product(scheme, name, rows, wide):
    layer = with_kernel(scheme, name, torch.randn(192, 256))
    layer.wide = wide
    x = torch.randn(rows, 256).bfloat16()
    exact = F.linear(x.double(), written_out(layer, torch.float64))
    for product in (layer.multiply(x), layer(x), layer.plain(x)):
        assert product.dtype == torch.bfloat16
        torch.testing.assert_close(product.double(), exact, rtol=2e-2, atol=2e-2 * exact.std().item())


@pytest.mark.parametrize("rows, kernel", [(1, True), (3, True), (4, False)])
def test_many_rows_are_dequantised(rows, kernel, monkeypatch):
    layer = quantized("int8", torch.randn(64, 64), most=3)
    monkeypatch.setattr(layer, "multiply", lambda x: x * 0)
    assert (layer(torch.randn(1, rows, 64)) == 0).all() == kernel


def test_a_kernel_that_saturates_is_not_taken(monkeypatch):
    """As one does that adds products of eight bits in sixteen: right in most places, a little off elsewhere."""

    def product(x, w, scale):
        pairs = (x.int()[:, None] * w.int()).unflatten(2, (-1, 2)).sum(3).clamp(-(2**15), 2**15 - 1)
        return ((pairs.sum(2) - 128 * w.int().sum(1)) * scale).float()

    monkeypatch.setattr(quantize, "integer_product", product)
    monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", lambda q, shape: q)
    check = quantize.works.__wrapped__
    assert not check(quantize.Int8Linear, "onednn", torch.bfloat16)
    monkeypatch.setattr(quantize, "integer_product", lambda x, w, s: (x.float() - 128) @ w.float().T * s.float())
    assert check(quantize.Int8Linear, "onednn", torch.bfloat16)


@pytest.mark.parametrize("half", [16, 32])
def test_the_halves_of_a_block_are_those_of_the_processor(half, monkeypatch):
    monkeypatch.setattr(quantize, "half_block", lambda: half)
    weight, x = torch.randn(130, 96), torch.randn(3, 96)
    layer = quantized("int4", weight)
    assert layer.q.shape[-1] == half
    torch.testing.assert_close(layer(x), F.linear(x, written_out(layer, torch.float32)), rtol=1e-4, atol=1e-4)


def test_whole_numbers_are_as_fine_as_the_vector():
    """The activations of the eight-bit kernel, with an outlier as language models have them: two rows of whole numbers
    lose less than the rounding to bfloat16, which happened before and happens after, and no bit of theirs is idle.
    """
    layer = with_kernel("int8", "onednn", torch.randn(192, 4096))
    x = torch.randn(3, 4096).bfloat16()
    x[:, 7] *= 100
    exact = F.linear(x.double(), written_out(layer, torch.float64))
    error = (layer.multiply(x.float()).double() - exact).norm() / exact.norm()
    assert error < 2**-9 / 2  # half of what bfloat16 rounds off
    one_row = (x.float() / x.float().abs().amax(1, keepdim=True) * 127).round()
    one_row = F.linear(
        one_row.double() * x.double().abs().amax(1, keepdim=True) / 127, written_out(layer, torch.float64)
    )
    assert error < (one_row - exact).norm() / exact.norm() / 100


@pytest.mark.parametrize("scheme, name", [*KERNELS, *((scheme, "plain") for scheme in SCHEMES)])
def test_numbers_out_of_range_do_not_hide_in_whole_numbers(scheme, name):
    layer = quantized(scheme, torch.randn(64, 64), torch.bfloat16)
    if name != "plain":
        layer = with_kernel(scheme, name, torch.randn(64, 64))
    for bad in (torch.inf, torch.nan):
        x = torch.ones(1, 64).bfloat16()
        x[0, 3] = bad
        assert not layer(x).isfinite().any()


@pytest.mark.parametrize("scheme, name", KERNELS)
def test_the_last_positions_of_a_batch_are_a_product_too(scheme, name):
    """They do not lie side by side in memory, which the kernels want."""
    layer, x = with_kernel(scheme, name, torch.randn(128, 256)), torch.randn(3, 5, 256).bfloat16()
    torch.testing.assert_close(layer(x[:, -1:]), layer(x[:, -1:].clone()))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_layer_has_a_bias_where_the_linear_one_has(scheme, dtype):
    linear = torch.nn.Linear(96, 80)
    layer = quantize.in_place_of(linear, quantize.QUANTIZED[scheme], dtype)
    layer.take_weight(linear.weight.detach(), "cpu")
    without = quantized(scheme, linear.weight.detach(), dtype)
    layer.bias = torch.nn.Parameter(linear.bias.to(dtype))
    x = torch.randn(2, 5, 96).to(dtype)
    torch.testing.assert_close(layer(x), without(x) + linear.bias.to(dtype))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_zeros_stay_zeros(scheme):
    layer = quantized(scheme, torch.zeros(64, 64), torch.bfloat16)
    assert torch.equal(layer(torch.ones(1, 64).bfloat16()), torch.zeros(1, 64).bfloat16())


def test_an_equal_share_of_bytes():
    """A 7B layer: 8 bits and a scale a row; 4 bits and two numbers for 32."""
    size = 4096 * 11008
    for scheme, expected in (("int8", size + 2 * 11008), ("int4", size // 2 + size // 32 * 4)):
        with torch.device("meta"):
            layer = quantize.QUANTIZED[scheme](4096, 11008, torch.bfloat16)
        assert sum(buffer.nbytes for buffer in layer.buffers()) == expected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_loading_quantises_the_linear_layers_of_the_language_model_and_nothing_else(scheme, checkpoints, family):
    folder = str(checkpoints[family])
    plain, processor = llava.load(folder, device="cpu", dtype="float32")
    model, _ = llava.load(folder, device="cpu", dtype="float32", quantize=scheme)
    kept, left = dict(plain.named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(kept[name], parameter) for name, parameter in left.items())
    missing = set(kept) - set(left)
    layers = {name for name, layer in plain.llama.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert missing == {f"llama.{name}.weight" for name in layers}
    for name in missing:
        layer = model.get_submodule(name.removesuffix(".weight"))
        again = quantized("int8" if name == "llama.head.weight" else scheme, kept[name])
        assert torch.equal(layer.q, again.q) and torch.equal(layer.scale, again.scale)
    inputs = processor("USER: hello ASSISTANT:")
    close = {"int8": 0.999, "int4": 0.95}[scheme]
    a, b = model(**inputs).logits.flatten(), plain(**inputs).logits.flatten()
    assert close < F.cosine_similarity(a, b, dim=0) < 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_head_is_quantised_from_the_embedding(scheme, checkpoints, tmp_path):
    model, processor = llava.load(str(checkpoints["llama"]), device="cpu", dtype="float32")
    model.llama.head.weight = model.llama.embed.weight
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    llava.save(model, processor, tmp_path)
    again, _ = llava.load(str(tmp_path), device="cpu", dtype="float32", quantize=scheme)
    assert torch.equal(again.llama.head.q, quantized("int8", again.llama.embed.weight).q)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_a_quantised_model_cannot_do_is_said(scheme, tmp_path):
    model, processor = llava.load("tiny", device="cpu", quantize=scheme)
    with pytest.raises(ValueError, match="quantised, packed or split model cannot be saved"):
        llava.save(model, processor, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="quantised or packed model cannot be resized"):
        model.resize_token_embeddings(700)
    with pytest.raises(ValueError, match="quantize is 'int3', and must be int8 or int4"):
        llava.load("nobody/nothing", quantize="int3")  # before anything is looked for


# ----------------------------------------------------------------------------------------------------------------
# A whole model


def test_tiny_answers_alike_in_eight_bits():
    model, processor = llava.load("tiny", device="cpu")
    eight, _ = llava.load("tiny", device="cpu", quantize="int8")
    inputs = processor.chat([("user", "Describe the image.")], [TINY / "scene.png"])
    assert torch.equal(model.generate(**inputs, max_new_tokens=60), eight.generate(**inputs, max_new_tokens=60))


def test_the_memory_is_counted_as_it_will_be():
    with torch.device("meta"):
        model = llava.Llava(llava.LlavaConfig())
    quantize.quantize_layers(model.llama, "int4", torch.bfloat16)
    assert weights.is_tied(model) is False
    layers = sum(buffer.nbytes for buffer in model.buffers())
    assert 0.61 < layers / (7e9 - 0.5e9) < 0.66  # bytes for each parameter of the language model's layers


# ----------------------------------------------------------------------------------------------------------------
# Sides that are no whole number of the kernels' blocks, as fine-tuning with a few new words leaves them


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows, columns", [(641, 128), (640, 100), (63, 65), (1, 1), (577, 319)])
def test_any_sides_are_as_near_as_whole_blocks(scheme, rows, columns):
    weight, x = torch.randn(640, 320), torch.randn(5, 320)
    whole = quantized(scheme, weight)(x)
    whole = (whole - F.linear(x, weight)).norm() / F.linear(x, weight).norm()
    weight, x = torch.randn(rows, columns), torch.randn(5, columns)
    part = quantized(scheme, weight)(x)
    assert part.shape == (5, rows)
    assert (part - F.linear(x, weight)).norm() / F.linear(x, weight).norm() < 1.5 * whole


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_are_given_whole_blocks(scheme, monkeypatch):
    """Whatever the sides are: some kernels are not there for others, some read past the end of the memory."""
    layer, seen = quantized(scheme, torch.randn(641, 100), torch.bfloat16, most=32), []

    def product(x):
        seen.append((x.shape, layer.rows, layer.columns, layer.scale.shape))
        return x.new_zeros(len(x), layer.rows)

    monkeypatch.setattr(layer, "multiply", product)
    assert layer(torch.randn(2, 1, 100).bfloat16()).shape == (2, 1, 641)
    scales = {"int8": (704,), "int4": (4, 704, 2)}[scheme]
    assert seen == [((2, 128), 704, 128, scales)]


@pytest.mark.parametrize("scheme, name", KERNELS)
@pytest.mark.parametrize("rows, columns", [(65, 100), (129, 63), (1, 1)])
def test_the_kernel_of_padded_sides_is_the_plain_product(scheme, name, rows, columns):
    layer = with_kernel(scheme, name, torch.randn(rows, columns))
    x = torch.randn(3, columns).bfloat16()
    exact = F.linear(x.double(), written_out(layer, torch.float64))
    torch.testing.assert_close(layer(x).double(), exact, rtol=2e-2, atol=2e-2 * exact.std().item() + 1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [641, 642, 643, 703])
def test_a_vocabulary_that_has_grown_is_quantised(scheme, rows, tmp_path):
    model, processor = llava.load("tiny", device="cpu")
    model.resize_token_embeddings(rows)
    llava.save(model, processor, tmp_path)
    grown, _ = llava.load(str(tmp_path), device="cpu", quantize=scheme)
    before, _ = llava.load("tiny", device="cpu", quantize=scheme)
    inputs = processor("USER: hello ASSISTANT:")
    logits = grown(**inputs).logits
    assert logits.shape[-1] == rows
    torch.testing.assert_close(logits[..., :640], before(**inputs).logits, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------
# Versions of torch that lack a kernel


def lacking(error):
    def lack(*_, **__):
        raise error("not in this version")

    return lack


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError])
@pytest.mark.parametrize(
    "scheme, kernel, where, name",
    [
        ("int8", "torch", torch, "_weight_int8pack_mm"),
        ("int8", "onednn", torch.ops.onednn, "qlinear_prepack"),
        ("int8", "onednn", torch.ops.onednn, "qlinear_pointwise"),
        ("int4", "torch", torch.ops.aten, "_weight_int4pack_mm_for_cpu"),
    ],
)
def test_a_kernel_that_torch_lacks_is_done_without(monkeypatch, scheme, kernel, where, name, error):
    monkeypatch.setattr(where, name, lacking(error))
    assert not quantize.works.__wrapped__(quantize.QUANTIZED[scheme], kernel, torch.bfloat16)
    monkeypatch.setattr(quantize, "works", lambda *_: False)
    settings = speed.fastest_kernel(quantize.QUANTIZED[scheme], (64, 64), torch.bfloat16, {})
    assert set(settings) == {"wide"}


def test_an_unknown_processor_has_the_small_block(monkeypatch):
    monkeypatch.delattr(torch.backends.cpu, "get_cpu_capability")
    assert quantize.half_block() == 16


def test_what_fills_a_group_up_leaves_its_range_as_it_is():
    """All of W lies between 1 and 2: a group that held a zero, too, would have twice the range, and half the steps."""
    torch.manual_seed(0)
    weight = 1 + torch.rand(64, 70)
    layer = quantize.Int4Linear(70, 64, torch.float32)
    layer.take_weight(weight, "cpu")
    torch.testing.assert_close(layer(torch.eye(70)).T, weight, rtol=0, atol=0.5 / 15 + 0.001)
