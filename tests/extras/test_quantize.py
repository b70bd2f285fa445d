"""Quantised and packed layers beside the plain ones."""

import pytest
import torch
import torch.nn.functional as F
from reference import TINY

import llava
import weights
from extras import quantize

SCHEMES = list(quantize.QUANTIZED)


def quantized(scheme, weight, dtype=torch.float32):
    """A quantised layer that holds the given matrix."""
    outputs, inputs = weight.shape
    with torch.device("meta"):
        layer = quantize.QUANTIZED[scheme](inputs, outputs, dtype)
    layer.take_weight(weight, "cpu")
    return layer


def written_out(layer, dtype):
    """The matrix that a quantised layer stands for, by its definition, one number at a time."""
    if isinstance(layer, quantize.Int8Linear):
        q = layer.q.to_dense().T if layer.q.is_mkldnn else layer.q
        return (q.to(dtype) * layer.scale.to(dtype)[:, None])[: layer.out_features, : layer.in_features]
    rows = torch.empty(layer.out_features, layer.in_features, dtype=dtype)
    for n in range(layer.out_features):
        byte = layer.q[n // 64, : layer.in_features, n % 32].int()
        q = byte >> 4 if n % 64 >= 32 else byte & 15
        scale, zero = layer.scale[:, n].to(dtype).repeat_interleave(64, 0)[: layer.in_features].unbind(1)
        rows[n] = (q - 8) * scale + zero
    return rows


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
    steps = layer.scale[:, None] if scheme == "int8" else layer.scale[..., 0].T.repeat_interleave(64, 1)
    assert ((matrix - weight).abs() <= steps[: shape[0], : shape[1]] * 0.5001 + 1e-6).all()


def plain_twin(layer, matrix):
    """The same layer, but one that has not laid its numbers out for a kernel."""
    twin = quantized({quantize.Int8Linear: "int8", quantize.Int4Linear: "int4"}[type(layer)], matrix)
    assert not twin.most
    return twin


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 32, 70])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_packed_kernel_is_the_plain_product(scheme, rows, vnni, monkeypatch):
    if not vnni:  # an older processor
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    layer = quantized(scheme, torch.randn(192, 256), torch.bfloat16)
    if not layer.most or layer.q.is_mkldnn < (vnni and scheme == "int8"):
        pytest.skip("this processor has no kernel for it (AVX-512, VNNI)")
    x = torch.randn(rows, 256).bfloat16()
    matrix = written_out(layer, torch.float64)
    exact = F.linear(x.double(), matrix)
    for product in (layer.kernel(x), layer(x), plain_twin(layer, matrix.float()).plain(x)):
        assert product.dtype == torch.bfloat16
        torch.testing.assert_close(product.double(), exact, rtol=2e-2, atol=2e-2 * exact.std().item())


def test_whole_numbers_are_as_fine_as_the_vector():
    """The activations of the eight-bit kernel, with an outlier as language models have them: two rows of whole numbers
    lose less than the rounding to bfloat16, which happened before and happens after, and no bit of theirs is idle.
    """
    layer = quantized("int8", torch.randn(192, 4096), torch.bfloat16)
    if not layer.q.is_mkldnn:
        pytest.skip("this processor has no kernel for it (VNNI)")
    x = torch.randn(3, 4096).bfloat16()
    x[:, 7] *= 100
    exact = F.linear(x.double(), written_out(layer, torch.float64))
    error = (layer.kernel(x.float()).double() - exact).norm() / exact.norm()
    assert error < 2**-9 / 2  # half of what bfloat16 rounds off
    one_row = (x.float() / x.float().abs().amax(1, keepdim=True) * 127).round()
    one_row = F.linear(
        one_row.double() * x.double().abs().amax(1, keepdim=True) / 127, written_out(layer, torch.float64)
    )
    assert error < (one_row - exact).norm() / exact.norm() / 100


@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_out_of_range_do_not_hide_in_whole_numbers(scheme):
    layer = quantized(scheme, torch.randn(64, 64), torch.bfloat16)
    for bad in (torch.inf, torch.nan):
        x = torch.ones(1, 64).bfloat16()
        x[0, 3] = bad
        assert not layer(x).isfinite().any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_last_positions_of_a_batch_are_a_product_too(scheme):
    """They do not lie side by side in memory, which the kernels want."""
    layer, x = quantized(scheme, torch.randn(128, 256), torch.bfloat16), torch.randn(3, 5, 256).bfloat16()
    torch.testing.assert_close(layer(x[:, -1:]), layer(x[:, -1:].clone()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_zeros_stay_zeros(scheme):
    layer = quantized(scheme, torch.zeros(64, 64), torch.bfloat16)
    assert torch.equal(layer(torch.ones(1, 64).bfloat16()), torch.zeros(1, 64).bfloat16())


def test_an_equal_share_of_bytes():
    """A 7B layer: 8 bits and a scale a row; 4 bits and two numbers for 64."""
    size = 4096 * 11008
    for scheme, expected in (("int8", size + 2 * 11008), ("int4", size // 2 + size // 64 * 4)):
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
        again = quantized(scheme, kept[name])
        assert torch.equal(layer.q, again.q) and torch.equal(layer.scale, again.scale)
    inputs = processor("USER: hello ASSISTANT:")
    close = {"int8": 0.999, "int4": 0.9}[scheme]
    a, b = model(**inputs).logits.flatten(), plain(**inputs).logits.flatten()
    assert close < F.cosine_similarity(a, b, dim=0) < 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_head_is_quantised_from_the_embedding(scheme, checkpoints, tmp_path):
    model, processor = llava.load(str(checkpoints["llama"]), device="cpu", dtype="float32")
    model.llama.head.weight = model.llama.embed.weight
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    llava.save(model, processor, tmp_path)
    again, _ = llava.load(str(tmp_path), device="cpu", dtype="float32", quantize=scheme)
    assert torch.equal(again.llama.head.q, quantized(scheme, again.llama.embed.weight).q)


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


packs = pytest.mark.skipif(
    not quantize.PackedLinear.works(torch.bfloat16), reason="this processor does not multiply bfloat16"
)


@packs
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_is_the_linear_layer(bias):
    linear = torch.nn.Linear(96, 80, bias=bias, dtype=torch.bfloat16)
    layer = quantize.PackedLinear(96, 80, torch.bfloat16, bias)
    layer.take_weight(linear.weight.detach(), torch.device("cpu"))
    layer.bias = linear.bias
    x = torch.randn(3, 5, 96).bfloat16()
    torch.testing.assert_close(layer(x[:, -1:]), layer(x)[:, -1:])  # not side by side in memory
    for shape in ((1, 96), (2, 5, 96), (577, 96)):
        x = torch.randn(shape).bfloat16()
        exact = F.linear(x.double(), *(p.double() for p in linear.parameters()))
        torch.testing.assert_close(layer(x).double(), exact, rtol=1e-2, atol=1e-2)


@packs
def test_loading_in_inference_mode_packs_every_linear_layer_and_changes_no_answer(checkpoints, family, tmp_path):
    settings = dict(device="cpu", dtype="bfloat16")
    plain, processor = llava.load(str(checkpoints[family]), **settings)
    with torch.inference_mode():
        model, _ = llava.load(str(checkpoints[family]), **settings)
    kept = dict(plain.named_modules())
    for name, layer in model.named_modules():
        assert isinstance(layer, quantize.PackedLinear) == isinstance(kept[name], torch.nn.Linear), name
        if isinstance(layer, quantize.PackedLinear):
            assert torch.equal(layer.w.to_dense(), kept[name].weight)
            assert layer.bias is kept[name].bias is None or torch.equal(layer.bias, kept[name].bias)
    picture = torch.rand(1, 3, plain.config.vision_config.image_size, plain.config.vision_config.image_size)
    inputs = [*processor.tokenizer.bos, plain.config.image_token_index, 9, 10]
    inputs = {"input_ids": torch.tensor([inputs]), "pixel_values": picture}
    with torch.no_grad():
        a, b = model(**inputs).logits.float(), plain(**inputs).logits.float()
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * b.std().item())
    assert model.generate(**inputs, max_new_tokens=4).shape == (1, 4)
    with pytest.raises(ValueError, match="packed or split model cannot be saved"):
        llava.save(model, processor, tmp_path / "new")
    with pytest.raises(ValueError, match="packed model cannot be resized"):
        model.resize_token_embeddings(700)
    with pytest.raises(RuntimeError, match=r"autograd|inference"):  # not gradients that are zero
        model(**inputs).logits.sum().backward()


@packs
def test_a_tied_head_is_packed_from_the_embedding(checkpoints, tmp_path):
    model, processor = llava.load(str(checkpoints["llama"]), device="cpu", dtype="float32")
    model.llama.head.weight = model.llama.embed.weight
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    llava.save(model, processor, tmp_path)
    with torch.inference_mode():
        again, _ = llava.load(str(tmp_path), device="cpu", dtype="bfloat16")
    assert torch.equal(again.llama.head.w.to_dense(), again.llama.embed.weight)


def test_inference_mode_in_float32_and_without_the_product_is_plain(checkpoints, monkeypatch):
    folder = str(checkpoints["llama"])
    with torch.inference_mode():
        wide, _ = llava.load(folder, device="cpu", dtype="float32")
        monkeypatch.setattr(quantize.PackedLinear, "works", staticmethod(lambda dtype: False))
        plain, _ = llava.load(folder, device="cpu", dtype="bfloat16")
    assert not any(isinstance(layer, quantize.PackedLinear) for model in (wide, plain) for layer in model.modules())


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
    quantize.replace_layers(model.llama, quantize.QUANTIZED["int4"], torch.bfloat16)
    assert weights.is_tied(model) is False
    layers = sum(buffer.nbytes for buffer in model.buffers())
    assert 0.55 < layers / (7e9 - 0.5e9) < 0.58  # bytes for each parameter of the language model's layers


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
    layer = quantized(scheme, torch.randn(641, 100), torch.bfloat16)
    seen, layer.most = [], 32

    def product(x):
        seen.append((x.shape, layer.rows, layer.columns, layer.scale.shape))
        return x.new_zeros(len(x), layer.rows)

    monkeypatch.setattr(layer, "kernel", product)
    assert layer(torch.randn(2, 1, 100).bfloat16()).shape == (2, 1, 641)
    scales = {"int8": (704,), "int4": (2, 704, 2)}[scheme]
    assert seen == [((2, 128), 704, 128, scales)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows, columns", [(65, 100), (129, 63), (1, 1)])
def test_the_kernel_of_padded_sides_is_the_plain_product(scheme, rows, columns):
    layer = quantized(scheme, torch.randn(rows, columns), torch.bfloat16)
    if not layer.most:
        pytest.skip("this processor has no kernel for it (AVX-512)")
    x = torch.randn(3, columns).bfloat16()
    exact = F.linear(x.double(), written_out(layer, torch.float64))
    torch.testing.assert_close(layer(x).double(), exact, rtol=2e-2, atol=2e-2 * exact.std().item() + 1e-3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows, columns", [(641, 128), (640, 101), (33, 7)])
def test_a_packed_layer_takes_any_sides(rows, columns, bias):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this processor has no oneDNN")
    linear = torch.nn.Linear(columns, rows, bias=bias)
    layer = quantize.PackedLinear(columns, rows, torch.float32, bias)  # any processor packs float32
    layer.take_weight(linear.weight.detach(), "cpu")
    layer.bias = linear.bias
    x = torch.randn(2, 3, columns)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-4)


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
    "scheme, vnni, where, name",
    [
        ("int8", False, torch, "_weight_int8pack_mm"),
        ("int8", True, torch.ops.onednn, "qlinear_prepack"),
        ("int8", True, torch.ops.onednn, "qlinear_pointwise"),
        ("int8", True, torch.backends.mkldnn, "is_available"),
        ("int4", False, torch.ops.aten, "_weight_int4pack_mm_for_cpu"),
        ("int4", False, torch.backends.cpu, "get_cpu_capability"),
    ],
)
def test_a_kernel_that_torch_lacks_is_done_without(monkeypatch, scheme, vnni, where, name, error):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(where, name, lacking(error))
    weight, x = torch.randn(128, 192), torch.randn(3, 192).bfloat16()
    layer = quantized(scheme, weight, torch.bfloat16)
    assert layer.most == 0
    exact = F.linear(x.double(), written_out(layer, torch.float64))
    torch.testing.assert_close(layer(x).double(), exact, rtol=2e-2, atol=2e-2 * exact.std().item())


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError])
@pytest.mark.parametrize("name", ["_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise"])
def test_a_product_that_torch_lacks_is_done_without(monkeypatch, checkpoints, name, error):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    kept = {"_is_mkldnn_bf16_supported": lambda: True, "_reorder_linear_weight": lambda weight, rows: weight}
    for other, function in kept.items():
        monkeypatch.setattr(torch.ops.mkldnn, other, function)
    monkeypatch.setattr(torch.ops.mkldnn, name, lacking(error))
    assert not quantize.PackedLinear.works(torch.bfloat16)
    with torch.inference_mode():
        model, processor = llava.load(str(checkpoints["llama"]), device="cpu", dtype="bfloat16")
        model.generate(**processor("USER: hello ASSISTANT:"), max_new_tokens=2)
