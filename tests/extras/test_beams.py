"""Beam search and the scores of given answers, against transformers."""

import copy
import math

import pytest
import torch
from inputs import PROMPTS, alone, filled, rare_ends, reference_generate
from reference import TINY

import llama
import llava
from extras import beams, training


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 12])
def test_beams_equal_the_reference(model, reference, batch, ends, n, length):
    for eos in (2, rare_ends(model, batch), int(model.generate(**batch, max_new_tokens=1)[0, 0])):
        ends(eos)
        ours = model.generate(**batch, max_new_tokens=length, num_beams=n)
        theirs = reference_generate(reference, batch, eos, max_new_tokens=length, num_beams=n)
        assert torch.equal(ours, theirs)


def test_beam_search_finishes_hypotheses_as_the_reference_does(reference):
    """Random logits with ends of every likelihood: the states in which an early end must beat,
    or wait for, a longer answer.
    """
    torch.manual_seed(4)
    for trial in range(40):
        n, eos = 2 + trial % 3, [3, 4][: 1 + trial % 2]
        table = torch.randn(12, 12) * 3  # the logits after each token
        table[:, eos] += trial % 5 - 1
        state = beams.init_beams(2, n, 8, 11, "cpu")
        rows = torch.tensor([1, 2]).repeat_interleave(n)
        more = True
        while more:
            rows, _, more = beams.beam_step(state, table[rows], eos)
        ours = beams.best_beams(state)
        theirs = scripted(reference, table, [[1], [2]], eos, 8, n)
        assert torch.equal(ours, theirs), trial


def scripted(reference, table, prompts, eos, new, beams):
    """transformers' beam search over a model whose logits are a table of the last token."""
    import types

    from transformers.modeling_outputs import CausalLMOutputWithPast

    def forward(self, input_ids, **_):
        return CausalLMOutputWithPast(logits=table[input_ids])

    original = reference.forward
    reference.forward = types.MethodType(forward, reference)
    try:
        out = reference.generate(
            input_ids=torch.tensor(prompts), max_new_tokens=new, num_beams=beams, do_sample=False, use_cache=False,
            eos_token_id=eos, pad_token_id=11,
        )  # fmt: skip
    finally:
        reference.forward = original
    return out[:, 1:]


def test_beams_find_a_likelier_answer_than_greedy(model, batch):
    single = alone(batch)[1]
    greedy, best = (model.generate(**single, max_new_tokens=8, num_beams=n)[0].tolist() for n in (1, 5))
    scores = model.score([greedy, best], single["input_ids"], single["pixel_values"])
    assert scores[1] / len(best) >= scores[0] / len(greedy)


def test_score_is_the_sum_of_log_probabilities(model, batch):
    single, answers = alone(batch)[0], [[60, 61, 2], [62, 2], [60, 61, 63, 64, 2]]
    scores = model.score(answers, single["input_ids"], single["pixel_values"])
    for score, answer in zip(scores, answers, strict=True):
        ids = torch.tensor([PROMPTS[0] + answer])
        logits = model(ids, single["pixel_values"]).logits[0, -len(answer) - 1 : -1].float().log_softmax(-1)
        assert math.isclose(score, sum(row[i] for row, i in zip(logits, answer, strict=True)), rel_tol=1e-6)


def test_a_search_leaves_the_prompt_in_the_cache(model, batch):
    single = alone(batch)[0]
    cache = model.init_kv_cache(1, 60)
    said = model.generate(**single, max_new_tokens=5, num_beams=3, kv_cache=cache)
    assert int(cache["length"]) == len(PROMPTS[0]) + 15
    again = model.generate(torch.tensor([[*said[0].tolist(), 70]]), max_new_tokens=5, kv_cache=cache)
    whole = torch.tensor([PROMPTS[0] + said[0].tolist() + [70]])
    assert torch.equal(again, model.generate(whole, single["pixel_values"], max_new_tokens=5))


SLOW = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float64)]


@pytest.mark.parametrize("default", [torch.float16, *SLOW], ids=str)
def test_the_default_dtype_changes_nothing(default):
    def everything():
        model, processor = llava.load("tiny", device="cpu", dtype=torch.float32)
        inputs = processor.chat([("user", "What is there?")], TINY / "scene.png")
        return [
            *inputs.values(), model(**inputs, output_attentions=True).attentions[1], model(**inputs).logits,
            *(model.generate(**inputs, max_new_tokens=6, num_beams=n) for n in (1, 2, 3)),
            model.generate(**inputs, max_new_tokens=6, temperature=1.0, top_p=0.9, top_k=9, seed=3),
            model.score([[40, 41, 2], [42]], **inputs), training.resize_token_embeddings(model, 640).weight,
        ]  # fmt: skip

    usual = everything()
    torch.set_default_dtype(default)
    try:
        found = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(usual, found, strict=True))


@pytest.mark.parametrize("default", [torch.float16, torch.float64], ids=str)
def test_a_search_is_in_float32_whatever_the_default_dtype_is(default):
    torch.set_default_dtype(default)
    try:
        state = beams.init_beams(2, 2, 4, 11, "cpu")
        beams.beam_step(state, torch.zeros(4, 12, dtype=torch.float16), [3])
    finally:
        torch.set_default_dtype(torch.float32)
    assert state["scores"].dtype == state["ended_scores"].dtype == torch.float32


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([], "nothing to score in the answers"),
        ([[]], "nothing to score in the answers"),
        ([5, 6], "a list of lists of ids"),
        ([[5.5]], "a list of lists of ids"),
        ("ab", "a list of lists of ids"),
        (None, "a list of lists of ids"),
    ],
    ids=repr,
)
def test_answers_that_are_none_are_named(model, batch, answers, words):
    with pytest.raises(ValueError, match=words):
        model.score(answers, torch.tensor([PROMPTS[0]]), batch["pixel_values"][:1])


def test_answers_are_scored_to_one_prompt(model, batch):
    with pytest.raises(ValueError, match=r"input_ids has the shape \(3, \d+\): answers are scored to one prompt"):
        model.score([[60, 2]], **batch)
    with pytest.raises(ValueError, match=r"to one prompt, \(1, T\)"):
        model.score([[60, 2]], torch.tensor([1, 40]))


def test_beams_do_not_sample(model):
    with pytest.raises(ValueError, match="beam search does not sample"):
        model.generate(torch.tensor([[1, 40]]), num_beams=2, temperature=1.0)


def test_more_ends_than_the_vocabulary_has_room_for(model):
    other = copy.deepcopy(model)
    other.config.eos_token_id = list(range(other.config.text_config.vocab_size))
    assert other.generate(torch.tensor([[1, 40]]), num_beams=2, max_new_tokens=3).shape[0] == 1


# ----------------------------------------------------------------------------------------------------------------
# The cache of several beams


def test_a_forked_cache_holds_each_row_several_times_side_by_side():
    cache = filled()
    before = {name: tensor.clone() for name, tensor in cache.items()}
    fork = beams.fork_cache(cache, copies=2, new=6)
    assert set(fork) == set(cache) and int(fork["length"]) == 5 and fork["real"].shape == (6, 11)
    for name in cache:
        if name != "length":
            dim = 1 if name == "real" else 2
            assert torch.equal(fork[name].narrow(dim, 0, 5), cache[name].narrow(dim, 0, 5)[[0, 0, 1, 1, 2, 2]])
            assert fork[name].shape[dim] == 11 and fork[name].dtype == cache[name].dtype
    for tensor in fork.values():
        tensor.fill_(1)
    assert all(torch.equal(before[name], cache[name]) for name in cache)  # nothing is shared


def test_a_fork_without_new_positions_has_no_room():
    fork = beams.fork_cache(filled(), copies=1, new=0)
    assert fork["real"].shape == (3, 5)
    with pytest.raises(ValueError, match="do not fit"):
        llama.check_room(fork, 1)
