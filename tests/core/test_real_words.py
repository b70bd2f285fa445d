"""A language model that others trained on real words, SmolLM2, against transformers and against facts.

Random weights hide what training makes: numbers thousands of times as large as their neighbours, attention that rests
on the first position, distributions that are sharp. docs/real_words.md says what was found.
`pytest -m slow -s tests/core/test_real_words.py` prints its tables. Slow; skipped where the package is missing.
"""

import pytest
import torch
from english import PAGE, QUESTIONS, chatml
from PIL import Image
from reference import load_reference

import llava
from extras import speed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ours(real_words):
    """(model, processor) in float32."""
    return llava.load(str(real_words), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(real_words):
    return load_reference(real_words, torch.float32)


@pytest.fixture(scope="module")
def page(ours):
    """The ids of a page of English, (1, T)."""
    return torch.tensor([ours[1].tokenizer.encode(PAGE)])


@pytest.fixture(scope="module")
def exact(ours, page):
    """What the model makes of the page in float32: LlavaOutput."""
    with torch.no_grad():
        return ours[0](page, output_hidden_states=True)


def far(a, b):
    """How far a is from b, by norm."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ----------------------------------------------------------------------------------------------------------------
# The same as the reference


def test_the_logits_of_a_page_of_english_are_the_references(reference, page, exact):
    with torch.no_grad():
        theirs = reference(input_ids=page).logits
    assert page.shape[1] > 500 and far(exact.logits, theirs) < 1e-5
    assert torch.equal(exact.logits.argmax(-1), theirs.argmax(-1))


def test_a_picture_among_real_words_gives_the_references_logits(ours, reference):
    """The tower is random, and what it says is noise: but noise that the two must hear alike."""
    model, processor = ours
    torch.manual_seed(0)
    picture = Image.fromarray(torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).numpy())
    inputs = processor(chatml("<image>\nWhat do you see?"), picture)
    ids, size = inputs["input_ids"][0], model.vision.grid**2
    ids = ids.repeat_interleave(torch.where(ids == model.config.image_token_index, size, 1))[None]
    with torch.no_grad():
        theirs = reference(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
        assert far(model(**inputs).logits, theirs) < 1e-5


def continued(reference, inputs, new, **options):
    """What the reference generates behind prompts, greedily unless options say otherwise: (B, new tokens)."""
    options = {"do_sample": False, "max_new_tokens": new, **options}
    with torch.no_grad():
        return reference.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


@pytest.fixture(scope="module")
def asked(ours):
    """Twenty questions as one batch, padded on the left, and the ids that are answered to them."""
    model, processor = ours
    inputs = processor([chatml(question) for question in QUESTIONS])
    return inputs, model.generate(**inputs, max_new_tokens=24)


def test_twenty_answers_are_the_references_word_for_word(reference, asked):
    inputs, ids = asked
    assert len(QUESTIONS) == 20 and torch.equal(ids, continued(reference, inputs, 24)[:, : ids.shape[1]])


def test_the_answers_are_true(ours, asked):
    said = dict(zip(QUESTIONS, (ours[1].decode(ids) for ids in asked[1]), strict=True))
    for question, word in {
        "What is the capital of France?": "Paris", "What is the largest planet of the solar system?": "Jupiter",
        "Who wrote Romeo and Juliet?": "Shakespeare", "What is the first month of the year?": "January",
    }.items():  # fmt: skip
        assert word in said[question], said[question]


def test_an_answer_is_the_same_alone_and_in_a_batch(ours, asked):
    model, processor = ours
    for row in (0, 5, 13):
        alone = model.generate(**processor(chatml(QUESTIONS[row])), max_new_tokens=24)[0]
        assert torch.equal(alone, asked[1][row, : len(alone)])
        assert (asked[1][row, len(alone) :] == model.config.padding).all()


def test_a_conversation_of_several_turns_goes_on_in_its_cache_as_the_reference_would_read_it_anew(ours, reference):
    model, processor = ours
    cache, text = model.init_kv_cache(1, 400), ""
    for question in ("My name is Ada and I have a red boat.", "What is my name?", "And which colour has my boat?"):
        new = ("\n" if text else "") + chatml(question)
        ids = model.generate(processor(new)["input_ids"], max_new_tokens=24, kv_cache=cache)
        expected = continued(reference, processor(text + new), 24)
        assert torch.equal(ids, expected[:, : ids.shape[1]])
        text += new + processor.tokenizer.bpe.decode(ids[0].tolist(), skip_special_tokens=False)
        if not text.endswith("<|im_end|>"):  # cut off by the limit: the turn is ended by hand
            text += "<|im_end|>"
        last = torch.tensor([[ids[0, -1], 2]] if ids[0, -1] != 2 else [[2]])  # what generate has not put into the cache
        with torch.no_grad():
            model(last, kv_cache=cache)
    alone = model.generate(**processor(chatml("And which colour has my boat?")), max_new_tokens=24)
    assert not torch.equal(ids, alone)  # what was said before matters


def test_beams_are_the_references(ours, reference):
    model, processor = ours
    inputs = processor([chatml(QUESTIONS[8]), chatml(QUESTIONS[5])])
    ids = model.generate(**inputs, num_beams=3, max_new_tokens=16)
    theirs = continued(reference, inputs, 16, num_beams=3)
    width = min(ids.shape[1], theirs.shape[1])
    assert width > 4 and torch.equal(ids[:, :width], theirs[:, :width])


def test_what_is_cached_is_what_a_full_pass_gives_at_two_thousand_positions(ours):
    """One pass over 2,000 positions, against chunks of unequal size and single steps at the end."""
    model, processor = ours
    ids = torch.tensor([(processor.tokenizer.encode(PAGE) * 4)[:2000]])
    assert ids.shape[1] == 2000
    kept = torch.tensor([0, 700, 1499, *range(1990, 2000)])
    with torch.no_grad():
        whole = model(ids, logits_to_keep=kept).logits[0]
        cache, found = model.init_kv_cache(1, 2000), []
        for start, end in [(0, 701), (701, 1500), (1500, 1991), *((i, i + 1) for i in range(1991, 2000))]:
            found.append(model(ids[:, start:end], kv_cache=cache, logits_to_keep=1).logits[0])
    assert far(torch.cat(found), whole[1:]) < 1e-5


# ----------------------------------------------------------------------------------------------------------------
# Fewer bits


SCHEMES = {  # how it is loaded → bounds: perplexity beside float32's, KL in nats, share of equal likeliest tokens
    "bfloat16": ({"dtype": "bfloat16"}, 1.02, 0.01, 0.95),
    "int8": ({"dtype": "bfloat16", "quantize": "int8"}, 1.03, 0.02, 0.93),
    "int4": ({"dtype": "bfloat16", "quantize": "int4"}, 1.6, 0.6, 0.55),
}


def perplexity(logits, ids):
    """exp of the mean of -log P of each token given those before it."""
    return torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:]).exp().item()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fewer_bits_cost_little(real_words, ours, page, exact, asked, scheme, monkeypatch):
    for question in ("8 bits, many rows", "4 bits, many rows"):  # takes minutes in 16 bits where a CPU has none
        monkeypatch.setitem(speed.FIXED, question, "float32")
    settings, most, kl_bound, same_bound = SCHEMES[scheme]
    model, _ = llava.load(str(real_words), device="cpu", **settings)
    with torch.no_grad():
        logits = model(page).logits
    truth, found = (x[0].double().log_softmax(-1) for x in (exact.logits, logits))
    kl = (truth.exp() * (truth - found)).sum(-1).mean().item()
    same = (truth.argmax(-1) == found.argmax(-1)).double().mean().item()
    inputs, words = asked
    said = model.generate(**inputs, max_new_tokens=24)
    width = min(said.shape[1], words.shape[1])
    real = words[:, :width] != 2
    equal = ((said[:, :width] == words[:, :width]) & real).sum().item() / real.sum().item()
    before, after = perplexity(exact.logits, page), perplexity(logits, page)
    print(f"\n| {scheme} | {before:.2f} → {after:.2f} | {kl:.4f} | {same:.1%} | {equal:.1%} |")
    assert after < most * before and kl < kl_bound and same > same_bound


# ----------------------------------------------------------------------------------------------------------------
# What random weights hide


def test_some_numbers_are_thousands_of_times_as_large_as_the_others(exact):
    """Massive activations (Sun et al. 2024): one dimension of the first position, from the twelfth block on.

    They are within float16, which ends at 65504, and far outside int8 with one scale for a whole row.
    """
    largest = torch.stack([x[0].abs().max() for x in exact.hidden_states])
    x = exact.hidden_states[20][0].abs()
    print(f"\nlargest {x.max():.0f}, median {x.median():.2f}, largest behind the first position {x[1:].max():.0f}")
    assert x.max() > 5000 * x.median() and x.argmax() // x.shape[1] == 0 and x[1:].max() < x.max() / 50
    assert largest[:12].max() < 1000 and largest[12:29].min() > 20000 and largest.max() < 65504


def test_attention_rests_on_the_first_position(ours, page):
    """An attention sink (Xiao et al. 2023): what a head does when it has nothing to say."""
    model, _ = ours
    with torch.no_grad():
        weights = model(page[:, :200], output_attentions=True).attentions
    share = torch.stack([w[0, :, 100:, 0].mean() for w in weights])
    print(f"\non the first of 200 positions: {share.mean():.0%} of the attention, up to {share.max():.0%} in a block")
    assert share.max() > 0.5 and share.mean() > 0.2


def test_distributions_are_sharp_and_ties_are_not_there(exact):
    """So greedy words are a safe thing to compare, even in float32 whose sums depend on their order."""
    logits = exact.logits[0]
    likeliest = logits.double().softmax(-1).amax(-1)
    top = logits.topk(2).values
    gap = (top[:, 0] - top[:, 1]).sort().values
    sure = (likeliest > 0.9).double().mean()
    print(f"\nprobability of the likeliest: mean {likeliest.mean():.2f}, above 0.9 at {sure:.1%}")
    print(f"its logit's distance from the second: median {gap.median():.2f}, least {gap[0]:.1e}")
    assert likeliest.mean() > 0.25 and sure > 0.01 and gap[0] > 0
