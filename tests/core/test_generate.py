"""Decoding: greedy, sampled, the ends of rows, streams, and going on from a cache."""

import math

import pytest
import torch
from inputs import PROMPTS, alone, rare_ends, reference_generate
from reference import PAD, VOCABULARY
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import llama


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_greedy_equals_the_reference(model, reference, batch, ends):
    for eos in (2, rare_ends(model, batch)):
        ends(eos)
        assert torch.equal(
            model.generate(**batch, max_new_tokens=20), reference_generate(reference, batch, eos, max_new_tokens=20)
        )


def test_a_batch_gives_each_row_token_for_token_what_it_gives_alone(model, batch, ends):
    ends(rare_ends(model, batch))
    together = model.generate(**batch, max_new_tokens=20)
    for row, single in zip(together, alone(batch), strict=True):
        ids = model.generate(**single, max_new_tokens=20)[0]
        assert torch.equal(row[: len(ids)], ids) and (row[len(ids) :] == PAD).all()


def test_a_row_stops_at_each_of_several_ends_and_is_filled_with_the_pad(model, batch, ends):
    whole = model.generate(**batch, max_new_tokens=20)
    stops = rare_ends(model, batch)
    ends(stops)
    ids = model.generate(**batch, max_new_tokens=20)
    for row, free in zip(ids.tolist(), whole.tolist(), strict=True):
        first = next((i for i, token in enumerate(free) if token in stops), len(free) - 1)
        assert row == (free[: first + 1] + [PAD] * 20)[: len(row)]


def test_the_first_token_may_be_the_end(model, batch, ends):
    single = alone(batch)[0]
    first = int(model.generate(**single, max_new_tokens=1)[0, 0])
    ends(first)
    assert model.generate(**single, max_new_tokens=20).tolist() == [[first]]


def test_filtered_distribution_equals_the_reference():
    torch.manual_seed(5)
    logits = torch.randn(6, 50) * 3
    logits[0, :3] = logits[0].max() + 1  # a tie at the top
    for temperature in (0.2, 1.0, 1.7):
        for top_k in (None, 1, 2, 7, 50, 400):
            for top_p in (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0):
                theirs = TemperatureLogitsWarper(temperature)(None, logits)
                theirs = theirs if top_k is None else TopKLogitsWarper(top_k)(None, theirs)
                theirs = theirs if top_p == 1 else TopPLogitsWarper(top_p)(None, theirs)
                assert torch.equal(llama.filtered(logits, temperature, top_k, top_p), theirs), (
                    temperature,
                    top_k,
                    top_p,
                )


def test_samples_follow_the_filtered_distribution():
    torch.manual_seed(6)
    logits = torch.randn(1, 8)
    expected = llama.filtered(logits, 0.8, 5, 0.9).softmax(-1)[0]
    generator = torch.Generator().manual_seed(0)
    drawn = llama.sample(logits.expand(40000, -1), 0.8, 5, 0.9, generator)
    shares = torch.bincount(drawn, minlength=8) / 40000
    assert (shares - expected).abs().max() < 0.01 and (shares[expected == 0] == 0).all()


def test_a_seed_repeats_a_sample_and_another_does_not(model, batch):
    ids = [model.generate(**batch, max_new_tokens=12, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])


def test_a_seed_leaves_torchs_own_generator_alone(model, batch):
    before = torch.get_rng_state()
    model.generate(**batch, max_new_tokens=2, temperature=1.0, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_temperature_near_zero_and_top_k_of_one_are_greedy(model, batch):
    greedy = model.generate(**batch, max_new_tokens=8)
    assert torch.equal(model.generate(**batch, max_new_tokens=8, temperature=1e-6), greedy)
    assert torch.equal(model.generate(**batch, max_new_tokens=8, temperature=1.5, top_k=1), greedy)


def test_stream_yields_the_columns_of_generate_one_by_one(model, batch):
    ids = model.generate(**batch, max_new_tokens=9)
    calls = []
    hook = model.llama.register_forward_hook(lambda *_: calls.append(len(calls)))
    stream = model.stream(**batch, max_new_tokens=9)
    for step, column in enumerate(stream):
        assert column.shape == (3,) and torch.equal(column, ids[:, step])
        assert len(calls) == step + 1  # the next step is not computed before it is asked for
    hook.remove()


def test_the_picture_is_encoded_once(model, batch):
    calls = []
    hook = model.vision.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**batch, max_new_tokens=6, num_beams=2)
    hook.remove()
    assert len(calls) == 1


def test_a_conversation_goes_on_from_its_cache(model, batch):
    """The last new token is not in the cache yet: the next turn begins with it."""
    single, more = alone(batch)[1], [70, 71, 72]
    cache = model.init_kv_cache(1, 100)
    said = model.generate(**single, max_new_tokens=7, kv_cache=cache)
    end = int(cache["length"])
    again = model.generate(torch.tensor([[int(said[0, -1]), *more]]), max_new_tokens=9, kv_cache=cache)
    whole = torch.tensor([PROMPTS[1] + said[0].tolist() + more])
    assert torch.equal(again, model.generate(whole, single["pixel_values"], max_new_tokens=9))
    assert end == len(PROMPTS[1]) + 2 * 15 + 6 and int(cache["length"]) == end + 4 + 8


@pytest.mark.parametrize(
    "family", ["llama"], indirect=True
)  # a window counts the padding between the turns, as the reference does
def test_a_batch_of_conversations_goes_on_although_its_rows_ended_at_different_times(model, batch, ends):
    ends(rare_ends(model, batch))
    cache = model.init_kv_cache(3, 120)
    said = model.generate(**batch, max_new_tokens=12, kv_cache=cache)
    ends(2)
    last_is_new = said[:, -1] != PAD  # of a row that ended earlier, all is in the cache
    again = model.generate(
        torch.stack([said[:, -1], torch.tensor([70, 71, 72])], dim=1),
        attention_mask=torch.cat(
            [cache["real"][:, : int(cache["length"])], last_is_new[:, None], torch.ones(3, 1, dtype=torch.bool)], dim=1
        ),
        max_new_tokens=6,
        kv_cache=cache,
    )
    for row, single in enumerate(alone(batch)):
        words = [token for token in said[row].tolist() if token != PAD] + [70 + row]
        whole = {**single, "input_ids": torch.tensor([PROMPTS[row] + words])}
        assert torch.equal(again[row], model.generate(**whole, max_new_tokens=6)[0])


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("temperature", math.nan), ("temperature", math.inf), ("top_k", 0),
     ("top_p", 0.0), ("top_p", 1.1), ("num_beams", 0)],
)  # fmt: skip
def test_an_option_out_of_range_is_named(model, option, value):
    with pytest.raises(ValueError, match=option):
        model.generate(torch.tensor([[1, 40]]), **{option: value})


def test_text_only(model, reference):
    batch = {"input_ids": torch.tensor([[1, 40, 41, 42]])}
    ours = model.generate(**batch, max_new_tokens=10)
    assert torch.equal(ours, reference_generate(reference, batch, 2, max_new_tokens=10))
    assert ours.max() < VOCABULARY
