"""The recorded step beside the plain one."""

import math
import shutil

import pytest
import torch

import llava
from extras import recorded


@pytest.mark.parametrize("window", [1, 4, 16, 1000])
def test_a_step_through_a_window_is_the_plain_step(model, processor, monkeypatch, window):
    monkeypatch.setattr(recorded, "WINDOW", window)
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


# ----------------------------------------------------------------------------------------------------------------
# How often it is compiled


@pytest.fixture
def eager(monkeypatch):
    """The number of recordings. What is recorded and when is the same without a compiler, and takes no time."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    monkeypatch.setattr(recorded, "check_compiler", lambda device: None)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


@pytest.fixture
def compiled(checkpoints, family, monkeypatch, eager):
    """(a model whose step is recorded in windows of 16, the plain model, its processor, the number of recordings)."""
    monkeypatch.setattr(recorded, "WINDOW", 16)
    settings = dict(device="cpu", dtype="float32")
    plain, processor = llava.load(str(checkpoints[family]), **settings)
    fast, _ = llava.load(str(checkpoints[family]), **settings, compile=True)
    return fast, plain, processor, eager


def of_length(processor, length, rows=1):
    ids = processor("USER: hello how are you")["input_ids"][0]
    ids = ids.repeat(length // len(ids) + 1)[:length]
    return {"input_ids": ids.repeat(rows, 1)}


def test_packed_matrices_are_recorded_once_for_all_blocks(kind, checkpoints, eager):
    """Though each of them is another one: torch compiles anew for another int, and stops after eight of them."""
    folder, settings = str(checkpoints["llama"]), dict(device="cpu", dtype="bfloat16")
    with torch.inference_mode():
        plain, processor = llava.load(folder, **settings)
        fast, _ = llava.load(folder, **settings, compile=True)
        assert isinstance(fast.llama.head, kind)
        inputs = processor("USER: hello ASSISTANT:")
        assert torch.equal(fast.generate(**inputs, max_new_tokens=6), plain.generate(**inputs, max_new_tokens=6))
    assert len(fast.llama.blocks) > 1 and eager() == 1


@pytest.mark.slow
def test_a_window_is_recorded_once_whatever_the_lengths_of_prompts(compiled):
    fast, plain, processor, recordings = compiled
    met = set()
    lengths = [(3, 4), (4, 4), (5, 11), (11, 5), (12, 5), (13, 6), (28, 5), (29, 30), (60, 40), (2, 3), (7, 90)]
    for length, new in lengths:
        inputs = of_length(processor, length)
        answer = plain.generate(**inputs, max_new_tokens=new)
        assert torch.equal(fast.generate(**inputs, max_new_tokens=new), answer)
        met |= {math.ceil(seen / 16) for seen in range(length + 1, length + answer.shape[1])}
        assert recordings() == len(met)
    assert len(met) > 5


@pytest.mark.slow
def test_a_long_talk_is_recorded_to_its_end(compiled):
    """torch stops compiling a function after eight shapes."""
    fast, plain, processor, recordings = compiled
    caches = fast.init_kv_cache(1, 250), plain.init_kv_cache(1, 250)
    inputs = of_length(processor, 5)
    for model, cache in zip((fast, plain), caches, strict=True):
        model.prefill(**inputs, kv_cache=cache)
    real = torch.tensor([True])
    for word in range(3, 203):
        ids = torch.tensor([word])
        logits = [model.step(ids, cache, real) for model, cache in zip((fast, plain), caches, strict=True)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert recordings() == math.ceil(205 / 16) == 13


@pytest.mark.slow
def test_each_size_of_a_batch_is_recorded_to_the_last(compiled):
    fast, plain, processor, recordings = compiled
    for rows in range(1, 11):
        inputs = of_length(processor, 6, rows)
        assert torch.equal(fast.generate(**inputs, max_new_tokens=4), plain.generate(**inputs, max_new_tokens=4))
    assert recordings() == 10


def test_beams_are_recorded_once_for_each_window(compiled):
    fast, plain, processor, recordings = compiled
    for length in (3, 5, 6, 7):
        inputs = of_length(processor, length)
        options = dict(max_new_tokens=5, num_beams=2)
        assert torch.equal(fast.generate(**inputs, **options), plain.generate(**inputs, **options))
    assert recordings() == 1


@pytest.mark.parametrize("length", [15, 16, 17, 32])
def test_a_cache_of_whole_windows_holds_what_was_asked_for_and_no_more(compiled, length):
    fast, plain, processor, _ = compiled
    inputs = of_length(processor, length - 2)
    cache = fast.init_kv_cache(1, length)
    assert cache["real"].shape == (1, length)
    with pytest.raises(ValueError, match=f"holds 0 of at most {length} positions and {length + 1} more do not fit"):
        fast.prefill(**of_length(processor, length + 1), kv_cache=cache)
    answer = fast.generate(**inputs, max_new_tokens=3, kv_cache=cache)
    assert torch.equal(answer, plain.generate(**inputs, max_new_tokens=3))
