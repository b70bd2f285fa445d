"""The KV cache: whatever the pieces in which a sequence is read, the result is that of reading it at once."""

import contextlib

import pytest
import torch
from reference import EDGE, FEATURES, IMAGE, PAD, TINY

import llava

TEXT = [1, 40, 41, IMAGE, 42, 43, 44, 45, IMAGE, 46, 47, 48]  # two pictures, expanded to 12 - 2 + 2 * 16 = 42 positions
SIZE = len(TEXT) + 2 * (FEATURES - 1)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return {"input_ids": torch.tensor([TEXT]), "pixel_values": torch.randn(2, 3, EDGE, EDGE)}


def embeddings(model, inputs):
    """The merged sequence, which may be cut anywhere, also inside a picture. (1, T, D)"""
    return model(**inputs, output_hidden_states=True).hidden_states[0]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def read(model, x, pieces):
    """Logits of a sequence that is read in pieces of the given lengths, with a cache."""
    cache = model.init_kv_cache(len(x), x.shape[1])
    logits, start = [], 0
    for piece in pieces:
        end = start + piece
        logits.append(model(inputs_embeds=x[:, start:end], kv_cache=cache).logits)
        start = end
    assert start == x.shape[1] and int(cache["length"]) == start
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    "pieces", [[SIZE], [1] * SIZE, [5, 7, 1, 13, SIZE - 26], [SIZE - 1, 1], [1, SIZE - 1], [20, 20, 2]]
)
def test_cached_equals_full(model, inputs, pieces):
    full = model(**inputs).logits
    close(read(model, embeddings(model, inputs), pieces), full)


@pytest.mark.parametrize("cut", [1, 3, 4, 6, 8, 9, 11])
def test_a_prompt_cut_between_ids_equals_the_whole(model, inputs, cut):
    full = model(**inputs).logits
    cache, logits, seen = model.init_kv_cache(1, SIZE), [], 0
    for ids in (TEXT[:cut], TEXT[cut:]):
        pictures = inputs["pixel_values"][seen : seen + ids.count(IMAGE)]
        seen += ids.count(IMAGE)
        pictures = pictures if len(pictures) else None
        logits.append(model(torch.tensor([ids]), pictures, kv_cache=cache).logits)
    close(torch.cat(logits, dim=1), full)


def test_cached_equals_the_reference(model, reference, inputs):
    ids, *_ = model.prompt_ids(**inputs)
    theirs = reference(input_ids=ids, pixel_values=inputs["pixel_values"].double()).logits
    ours = read(model, embeddings(model, inputs), [11, 1, 1, SIZE - 13])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * theirs.abs().max().item())


def test_attention_weights_of_a_cached_step_are_the_last_rows_of_the_full_ones(model, inputs):
    full = model(**inputs, output_attentions=True).attentions
    x, cache = embeddings(model, inputs), model.init_kv_cache(1, SIZE)
    model(inputs_embeds=x[:, :-3], kv_cache=cache)
    step = model(inputs_embeds=x[:, -3:], kv_cache=cache, output_attentions=True).attentions
    for ours, whole in zip(step, full, strict=True):
        assert ours.shape == (1, model.config.text_config.num_attention_heads, 3, SIZE)
        close(ours, whole[:, :, -3:])


def test_padding_on_the_left_stays_masked_in_chunks_and_steps(model, inputs):
    full = model(**inputs).logits
    padded = torch.tensor([[PAD] * 5 + TEXT])
    mask = (padded != PAD).long()
    _, real = model.prompt_ids(padded, inputs["pixel_values"], mask)
    x = model(padded, inputs["pixel_values"], mask, output_hidden_states=True).hidden_states[0]
    cache, logits = model.init_kv_cache(1, x.shape[1]), []
    first = model(inputs_embeds=x[:, :9], attention_mask=real[:, :9], kv_cache=cache).logits
    logits = [first[:, 5:]]
    for start in range(9, x.shape[1], 4):  # from here on the cache knows which positions are real
        logits.append(model(inputs_embeds=x[:, start : start + 4], kv_cache=cache).logits)
    close(torch.cat(logits, dim=1), full)


def test_a_b_a_gives_a_twice(model, inputs):
    torch.manual_seed(2)
    other = {"input_ids": torch.tensor([[1, 60, IMAGE, 61]]), "pixel_values": torch.randn(1, 3, EDGE, EDGE)}
    first, between, again = (model.generate(**x, max_new_tokens=12) for x in (inputs, other, inputs))
    assert torch.equal(first, again) and not torch.equal(first, between)
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_a_clone_is_a_fork(model, inputs):
    cache = model.init_kv_cache(1, SIZE + 4)
    model(**inputs, kv_cache=cache)
    fork = {name: tensor.clone() for name, tensor in cache.items()}
    left = [model(torch.tensor([[i]]), kv_cache=cache).logits for i in (50, 51)]
    right = [model(torch.tensor([[i]]), kv_cache=fork).logits for i in (60, 51)]
    whole = model(torch.tensor([[*TEXT, 60, 51]]), inputs["pixel_values"]).logits[:, -2:]
    close(torch.cat(right, dim=1), whole)
    assert not torch.allclose(left[1], right[1])


def test_a_cache_is_a_dict_of_tensors_and_knows_its_length(model, inputs):
    cache = model.init_kv_cache(1, SIZE)
    assert type(cache) is dict and all(type(tensor) is torch.Tensor for tensor in cache.values())
    out = model(**inputs, kv_cache=cache)
    assert out.kv_cache is cache and int(cache["length"]) == SIZE


def test_beyond_its_capacity_nothing_is_overwritten(model, inputs):
    cache = model.init_kv_cache(1, SIZE + 1)
    model(**inputs, kv_cache=cache)
    before = {name: tensor.clone() for name, tensor in cache.items()}
    with pytest.raises(ValueError, match=f"holds {SIZE} of at most {SIZE + 1} positions and 2 more do not fit"):
        model(torch.tensor([[50, 51]]), kv_cache=cache)
    with pytest.raises(ValueError, match="do not fit"):
        model.generate(torch.tensor([[50]]), max_new_tokens=2, kv_cache=cache)
    assert all(torch.equal(before[name], cache[name]) for name in cache)
    model(torch.tensor([[50]]), kv_cache=cache)


def test_a_cache_of_another_batch_is_refused(model, inputs):
    with pytest.raises(ValueError, match="made for 2 rows and the input has 1"):
        model(**inputs, kv_cache=model.init_kv_cache(2, SIZE))


def test_a_mask_of_another_length_is_refused(model, inputs):
    with pytest.raises(ValueError, match="a column for each position"):
        model(**inputs, attention_mask=torch.ones(1, 3))


# ----------------------------------------------------------------------------------------------------------------
# Inside a training loop: autocast multiplies in 16 bits, while the cache has the model's dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_cache_is_autocast_without(checkpoints, family, dtype):
    model, processor = llava.load(str(checkpoints[family]), device="cpu", dtype="float32")
    ids = processor(["USER: hello ASSISTANT: ab cd", "USER: how are you today? ASSISTANT: no"])
    cache, T = model.init_kv_cache(2, 40), ids["input_ids"].shape[1]
    with torch.autocast("cpu", dtype=dtype):
        whole = model(**ids).logits.float()
        parts = []
        for start, end in ((0, T - 3), (T - 3, T - 1), (T - 1, T)):  # a prompt, a chunk, a step
            mask = ids["attention_mask"][:, :end]
            parts.append(model(ids["input_ids"][:, start:end], attention_mask=mask, kv_cache=cache).logits.float())
    assert {tensor.dtype for name, tensor in cache.items() if "." in name} == {torch.float32}
    real = ids["attention_mask"].bool()
    close = dict(rtol=0.05, atol=0.05 * whole.std().item())
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real], **close)
    torch.testing.assert_close(whole[real], model(**ids).logits[real], **close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_under_autocast_a_trained_model_says_the_same(dtype, quantize):
    model, processor = llava.load("tiny", device="cpu", dtype="float32", quantize=quantize)
    inputs = processor.chat([("user", "Describe the image.")], [TINY / "scene.png"])
    runs = []
    for context in (contextlib.nullcontext(), torch.autocast("cpu", dtype=dtype)):
        with context:
            answer = model.generate(**inputs, max_new_tokens=12)
            beams = model.generate(**inputs, max_new_tokens=6, num_beams=3)
            scores = model.score([answer[0].tolist(), [5, 6]], **inputs)
            drawn = [int(ids) for ids in model.stream(**inputs, max_new_tokens=4, temperature=0.1, seed=1)]
        runs.append((answer, beams, drawn, scores))
    plain, cast = runs
    assert torch.equal(cast[0], plain[0]) and torch.equal(cast[1], plain[1]) and cast[2] == plain[2]
    torch.testing.assert_close(cast[3], plain[3], rtol=0.05, atol=0.05)
