"""The recorded step beside the plain one."""

import math
import shutil

import pytest
import torch

import llava
from extras import recorded


@pytest.mark.parametrize("window", [1, 4, 16, 1000])
def test_a_step_through_a_window_is_the_plain_step(model, processor, monkeypatch, window):
    monkeypatch.setattr(recorded.RecordedStep, "WINDOW", window)
    inputs = processor(["USER: hello ASSISTANT:", "USER: how are you today? ASSISTANT:"])
    expected = model.generate(**inputs, max_new_tokens=20)
    windows, step = set(), recorded.RecordedStep(model.llama, model.device)

    def plain(x, rope, mask, cached):
        windows.add(mask.shape[-1])
        return step.plain(x, rope, mask, cached)

    step.recorded = plain  # in the place of the compiled one
    monkeypatch.setattr(model.llama, "run", step)
    assert torch.equal(model.generate(**inputs, max_new_tokens=20), expected)
    width = inputs["input_ids"].shape[1]
    capacity = width + 19
    assert windows == {min(capacity, math.ceil(needed / window) * window) for needed in range(width + 1, capacity + 1)}


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler on a CPU"
)
@pytest.mark.parametrize(
    "dtype, quantize",
    [("float32", None), ("float32", "int8"), ("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "int4")],
)
def test_the_compiled_step_is_the_plain_step(checkpoints, family, dtype, quantize):
    settings = dict(device="cpu", dtype=dtype, quantize=quantize)
    model, processor = llava.load(str(checkpoints[family]), **settings)
    fast, _ = llava.load(str(checkpoints[family]), **settings, compile=True)
    inputs = processor("USER: hello ASSISTANT:")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    if dtype == "float32":  # where no rounding decides between two words
        assert torch.equal(fast.generate(**inputs, max_new_tokens=12), model.generate(**inputs, max_new_tokens=12))
    logits = []
    with torch.no_grad():
        for each in (fast, model):
            cache = each.init_kv_cache(1, inputs["input_ids"].shape[1] + 11)  # as generate makes it
            each(**inputs, kv_cache=cache)
            ids, real = torch.tensor([9]), torch.tensor([True])
            logits += [each.step(ids, cache, real).float(), each.step(ids, cache, real).float()]
    torch.testing.assert_close(logits[:2], logits[2:], rtol=0.05, atol=0.05 * logits[2].std().item())
    assert counters["stats"]["unique_graphs"] == 1  # one for all the blocks and all the steps
    assert not counters["graph_break"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("batch", [1, 2])
def test_the_cuda_graph_is_the_plain_step(checkpoints, family, batch):
    model, processor = llava.load(str(checkpoints[family]), device="cuda", dtype="float32")
    fast, _ = llava.load(str(checkpoints[family]), device="cuda", dtype="float32", compile=True)
    for text in ("USER: hello ASSISTANT:", "USER: how are you? ASSISTANT:", "USER: hello ASSISTANT:"):
        inputs = processor([text] * batch)
        assert torch.equal(fast.generate(**inputs, max_new_tokens=40), model.generate(**inputs, max_new_tokens=40))


def test_a_missing_compiler_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        llava.load("tiny", device="cpu", compile=True)
    with pytest.raises(ValueError, match="not on mps"):
        recorded.check_compiler(torch.device("mps"))
