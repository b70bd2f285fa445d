"""Packed layers beside the plain ones."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F

import llava
from extras import fbgemm, packed


def holds(layer, weight):
    """Whether a packed layer holds a matrix, as nearly as float16 does if it is held in that."""
    if isinstance(layer, packed.PackedLinear) and not isinstance(layer, packed.HalfLinear):
        return torch.equal(layer.w.to_dense(), weight)
    rows = torch.cat([torch.ops.quantized.linear_unpack_fp16(piece)[0] for piece in layer.held.pieces])
    return torch.equal(rows, weight.half().float()) and (rows - weight.float()).abs().max() <= 3e-8


@pytest.mark.parametrize("gradients", [False, True])  # with them by an operator of ours, without them directly
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_is_the_linear_layer(kind, bias, gradients):
    linear = torch.nn.Linear(96, 80, bias=bias, dtype=torch.bfloat16)
    layer = kind(96, 80, torch.bfloat16, bias)
    layer.take_weight(linear.weight.detach(), torch.device("cpu"))
    layer.state_dict()  # waits for the thread that packs
    layer.bias = linear.bias
    x = torch.randn(3, 5, 96).bfloat16()
    torch.testing.assert_close(layer(x[:, -1:]), layer(x)[:, -1:])  # not side by side in memory
    for shape in ((1, 96), (2, 5, 96), (577, 96)):
        x = torch.randn(shape).bfloat16()
        exact = F.linear(x.double(), *(p.double() for p in linear.parameters()))
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(layer(x).double(), exact, rtol=1e-2, atol=1e-2)


def test_packing_goes_on_while_the_next_matrix_is_read(monkeypatch):
    """And what goes wrong there is not lost."""
    going, release = threading.Event(), threading.Event()

    def pack(layer):
        going.set()
        assert release.wait(60)
        layer.w = layer.w + 1

    monkeypatch.setattr(packed.PackedLinear, "pack", pack)
    first, second = (packed.PackedLinear(4, 4, torch.float32) for _ in range(2))
    first.take_weight(torch.zeros(4, 4), "cpu")
    assert going.wait(60) and (first.w == 0).all()  # take_weight is back before it is packed
    release.set()
    assert (first.state_dict()["w"] == 1).all()
    monkeypatch.setattr(packed.PackedLinear, "pack", lambda layer: 1 / 0)
    second.take_weight(torch.zeros(4, 4), "cpu")
    with pytest.raises(ZeroDivisionError):
        second.state_dict()


@pytest.mark.parametrize("units", [True, False])
def test_fbgemm_is_for_processors_without_units(units, monkeypatch):
    monkeypatch.setattr(packed.PackedLinear, "works", staticmethod(lambda dtype: units))
    monkeypatch.setattr(fbgemm, "works", lambda: True)
    assert ("packed by FBGEMM" in packed.kinds(torch.bfloat16)) != units
    assert "packed by FBGEMM" not in packed.kinds(torch.float32)


def test_no_thread_is_left_behind():
    """With a team of OpenMP's of its own, for which all other teams would fall asleep between two products."""
    before = {*threading.enumerate()}
    future = packed.in_a_thread(threading.current_thread)
    future.result().join(20)
    assert not future.result().is_alive() and {*threading.enumerate()} <= before


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16),
                                    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])  # fmt: skip
def test_numbers_are_converted_as_torch_does_it(dtypes):
    numbers = (torch.randn(70, 9) * 100).to(dtypes[0])
    copy = packed.converted(numbers, dtypes[1])
    assert torch.equal(copy, numbers.to(dtypes[1])) and copy.data_ptr() != numbers.data_ptr()


def test_loading_in_inference_mode_packs_every_linear_layer_and_changes_no_answer(
    kind, checkpoints, family, tmp_path, monkeypatch
):
    settings = dict(device="cpu", dtype="bfloat16")
    plain, processor = llava.load(str(checkpoints[family]), **settings)
    with torch.inference_mode():
        model, _ = llava.load(str(checkpoints[family]), **settings)
    kept = dict(plain.named_modules())
    for name, layer in model.named_modules():
        assert isinstance(layer, packed.PackedLinear) == isinstance(kept[name], torch.nn.Linear), name
        if isinstance(layer, packed.PackedLinear):
            assert type(layer) is kind and holds(layer, kept[name].weight)
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


def test_a_tied_head_is_packed_from_the_embedding(kind, checkpoints, tmp_path):
    model, processor = llava.load(str(checkpoints["llama"]), device="cpu", dtype="float32")
    model.llama.head.weight = model.llama.embed.weight
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    llava.save(model, processor, tmp_path)
    with torch.inference_mode():
        again, _ = llava.load(str(tmp_path), device="cpu", dtype="bfloat16")
    assert type(again.llama.head) is kind and holds(again.llama.head, again.llama.embed.weight)


def test_inference_mode_in_float32_and_without_the_product_is_plain(checkpoints, monkeypatch):
    folder = str(checkpoints["llama"])
    with torch.inference_mode():
        wide, _ = llava.load(folder, device="cpu", dtype="float32")
        monkeypatch.setattr(packed, "kinds", lambda dtype: {})
        plain, _ = llava.load(folder, device="cpu", dtype="bfloat16")
    assert not any(isinstance(layer, packed.PackedLinear) for model in (wide, plain) for layer in model.modules())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows, columns", [(641, 128), (640, 101), (33, 7)])
def test_a_packed_layer_takes_any_sides(rows, columns, bias):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this processor has no oneDNN")
    linear = torch.nn.Linear(columns, rows, bias=bias)
    layer = packed.PackedLinear(columns, rows, torch.float32, bias)  # any processor packs float32
    layer.take_weight(linear.weight.detach(), "cpu")
    layer.state_dict()
    layer.bias = linear.bias
    x = torch.randn(2, 3, columns)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError])
@pytest.mark.parametrize("name", ["_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise"])
def test_a_product_that_torch_lacks_is_done_without(monkeypatch, checkpoints, name, error):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    kept = {"_is_mkldnn_bf16_supported": lambda: True, "_reorder_linear_weight": lambda weight, rows: weight}
    for other, function in kept.items():
        monkeypatch.setattr(torch.ops.mkldnn, other, function)

    def lack(*_):
        raise error("not in this version")

    monkeypatch.setattr(torch.ops.mkldnn, name, lack)
    assert not packed.PackedLinear.works(torch.bfloat16)
    with torch.inference_mode():
        model, processor = llava.load(str(checkpoints["llama"]), device="cpu", dtype="bfloat16")
        model.generate(**processor("USER: hello ASSISTANT:"), max_new_tokens=2)


def test_a_copy_of_a_model_multiplies_as_the_model(kind):
    layer = kind(96, 80, torch.bfloat16)
    layer.take_weight(torch.randn(80, 96), "cpu")
    layer.state_dict()
    twin, x = copy.deepcopy(layer), torch.randn(2, 96).bfloat16()
    expected = layer(x)
    del layer
    assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("bad", [1e6, torch.inf, torch.nan])
def test_numbers_that_no_float16_holds_are_multiplied_as_they_are(bad, capfd):
    if not fbgemm.works():
        pytest.skip("this processor, or this version of torch, has no FBGEMM that multiplies as torch does")
    weight = torch.ones(3, 64)
    weight[1, 5] = bad
    layer = packed.HalfLinear(64, 3, torch.bfloat16)
    layer.take_weight(weight, "cpu")
    layer.state_dict()
    x = torch.ones(1, 64).bfloat16()
    torch.testing.assert_close(layer(x), F.linear(x, weight.bfloat16()), equal_nan=True)
    assert capfd.readouterr().err == ""
