"""Pictures among words: one placeholder or many, batches and their padding, against transformers."""

import copy

import pytest
import torch
from inputs import PICTURES, ROW, ROWS, close, padded, pictures, theirs_of
from reference import FEATURES, IMAGE, PAD, expanded

import llama
import llava


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# ----------------------------------------------------------------------------------------------------------------
# Placeholders: where pictures stand, how many there are, and in which form

PLACES = {
    "in the middle": [ROW],
    "at the start": [[IMAGE, 40, 41]],
    "at the end": [[1, 40, 41, IMAGE]],
    "nothing else": [[IMAGE]],
    "side by side": [[1, IMAGE, IMAGE, 40, IMAGE]],
    "different numbers": ROWS,
    "all in the last row": [[1, 40, 41], [1, 42], [1, IMAGE, IMAGE, IMAGE]],
    "all in the first row": [[IMAGE, 40, IMAGE], [1, 42, 43, 44, 45]],
    "one long text row": [[1, IMAGE, 40], list(range(40, 80))],
    "none": [[1, 40, 41, 42], [1, 43]],
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("place", PLACES)
def test_pictures_stand_where_their_placeholders_do(model, reference, place, side):
    ids, mask = padded(PLACES[place], side)
    number = int((ids == IMAGE).sum())
    pixels = pictures(number) if number else None
    out = model(ids, pixels, mask, output_hidden_states=True)
    theirs = reference(**theirs_of(ids, pixels, mask), output_hidden_states=True)
    their_mask = expanded(ids, mask)[1].bool()
    grown_ids, real = model.prompt_ids(ids, pixels, mask)
    assert torch.equal(grown_ids[real], expanded(ids, mask)[0][their_mask])
    assert real.sum(1).tolist() == their_mask.sum(1).tolist()
    close(out.hidden_states[0][real], theirs.hidden_states[0][their_mask], 1e-12)
    close(out.logits[real], theirs.logits[their_mask])


@pytest.mark.parametrize("side", ["left", "right"])
def test_repeated_placeholders_give_what_one_for_each_picture_gives(model, side):
    ids, mask = padded(ROWS, side)
    pixels = pictures(3)
    grown, real = model.prompt_ids(ids, pixels, mask)
    assert (grown == IMAGE).sum(1).tolist() == [0, FEATURES, 2 * FEATURES]
    one, repeated = (
        model(ids, pixels, mask, labels=ids),
        model(grown, pixels, real, labels=grown.masked_fill(~real, -100)),
    )
    assert torch.equal(one.logits, repeated.logits)
    assert torch.equal(model.prompt_ids(grown, pixels, real)[0], grown)
    close(repeated.loss, model(ids, pixels, mask, labels=ids.masked_fill(mask == 0, -100)).loss, 1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_goes_where_the_callers_padding_is(model, side):
    ids, mask = padded(ROWS, side)
    grown, real = model.prompt_ids(ids, pictures(3), mask)
    longest = real.shape[1]
    for row, count in zip(real, real.sum(1).tolist(), strict=True):
        pads = [0] * (longest - count)
        assert row.long().tolist() == (pads + [1] * count if side == "left" else [1] * count + pads)
    assert (grown[~real] == PAD).all()


def test_a_mask_is_not_needed_without_padding(model):
    ids = torch.tensor([ROW, [1, IMAGE, IMAGE, 40, 41, 42, 43]])
    pixels = pictures(4)
    assert torch.equal(model(ids, pixels).logits, model(ids, pixels, torch.ones_like(ids)).logits)
    assert torch.equal(model(ids, pixels).logits, model(ids, pixels, torch.ones_like(ids, dtype=torch.bool)).logits)


def test_pictures_are_taken_in_reading_order(model):
    pixels = pictures(3)
    ids, mask = padded(ROWS, "left")
    features = model.get_image_features(pixels)
    grown, _ = model.prompt_ids(ids, pixels, mask)
    x = model(ids, pixels, mask, output_hidden_states=True).hidden_states[0]
    assert torch.equal(x[grown == IMAGE], features.flatten(0, 1))
    assert torch.equal(x[grown != IMAGE], model.llama.embed(grown[grown != IMAGE]))


def test_a_tower_with_a_single_feature():
    """One feature for each picture: one placeholder and the repeated form are the same."""
    tower = llava.vision.VisionConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=4
    )
    text = llama.TextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = llava.Llava(llava.LlavaConfig(tower, text, image_token_index=19))
    out = model(torch.tensor([[1, 19, 5, 19]]), torch.randn(2, 3, 4, 4), output_hidden_states=True)
    assert out.logits.shape == (1, 4, 20)
    assert torch.equal(out.hidden_states[0][0, [1, 3]], out.image_hidden_states[:, 0])


def test_an_embedding_of_zeros_is_text(model, reference):
    ours, theirs = copy.deepcopy(model), copy.deepcopy(reference)
    ours.llama.embed.weight[[55, 0]] = theirs.get_input_embeddings().weight[[55, 0]] = 0
    ids, mask = padded([[1, 55, IMAGE, 55, 40], [55, 0, 41]], "left")
    out = ours(ids, pictures(1), mask, output_hidden_states=True)
    grown, real = ours.prompt_ids(ids, pictures(1), mask)
    assert (out.hidden_states[0][grown == 55] == 0).all() and (grown == 55).sum() == 3
    close(out.logits[real], theirs(**theirs_of(ids, pictures(1), mask)).logits[real])


def test_features_of_zeros_are_a_picture(model, reference):
    ours, theirs = copy.deepcopy(model), copy.deepcopy(reference)
    for layer in (ours.projector.linear_2, theirs.model.multi_modal_projector.linear_2):
        layer.weight.zero_()
        layer.bias.zero_()
    ids, mask = padded(ROWS, "left")
    out = ours(ids, pictures(3), mask)
    assert (out.image_hidden_states == 0).all()
    _, real = ours.prompt_ids(ids, pictures(3), mask)
    there = expanded(ids, mask)[1].bool()
    close(out.logits[real], theirs(**theirs_of(ids, pictures(3), mask)).logits[there])


def test_the_image_token_itself_is_never_embedded(model):
    other = copy.deepcopy(model)
    other.llama.embed.weight[IMAGE] = torch.nan
    for ids in (torch.tensor([ROW]), model.prompt_ids(torch.tensor([ROW]), pictures(2))[0]):
        assert torch.equal(other(ids, pictures(2)).logits, model(ids, pictures(2)).logits)
    other.config.image_token_index = 10**6  # or beyond the vocabulary, as in checkpoints that were never resized
    other.llama.embed.weight[IMAGE] = model.llama.embed.weight[IMAGE]
    try:
        ids = torch.tensor([ROW]).where(torch.tensor([ROW]) != IMAGE, 10**6)
        assert torch.equal(other(ids, pictures(2)).logits, model(torch.tensor([ROW]), pictures(2)).logits)
    finally:
        other.config.image_token_index = IMAGE


@pytest.mark.parametrize(
    "tokens, images", [(1, 2), (2, 1), (0, 1), (3, 1), (2, 3), (1, 0), (16, 2), (17, 1), (15, 1), (32, 1)]
)
def test_a_wrong_number_of_pictures_is_one_error(model, tokens, images):
    ids = torch.tensor([[1, *[IMAGE] * tokens, 40]])
    with pytest.raises(ValueError, match=f"holds {tokens} image tokens and {images} pictures were given") as error:
        model(ids, pictures(images) if images else None)
    assert "one <image> for each picture" in str(error.value)
    if images:
        assert f"or {FEATURES} in a row" in str(error.value)


def test_image_tokens_without_pictures_are_refused(model):
    grown = expanded(torch.tensor([ROW]))[0]
    with pytest.raises(ValueError, match="32 image tokens and 0 pictures"):
        model(grown)


def test_a_missing_picture_is_counted_over_the_whole_batch(model):
    ids, mask = padded(ROWS, "left")
    with pytest.raises(ValueError, match="holds 3 image tokens and 2 pictures"):
        model(ids, pictures(2), mask)


@pytest.mark.parametrize("wrong", [-1, -200, 10**6])
def test_an_id_outside_the_vocabulary_is_named(model, wrong):
    with pytest.raises(ValueError, match=f"{wrong} is not an id"):
        model(torch.tensor([[1, 40, wrong, 41]]))
    with pytest.raises(ValueError, match=f"{wrong} is not an id"):
        model(torch.tensor([[1, IMAGE, wrong, 41]]), pictures(1))


# ----------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_each_row_what_it_gives_alone(model, side):
    ids, mask = padded(ROWS, side)
    pixels = pictures(3)
    logits = model(ids, pixels, mask).logits
    real = model.prompt_ids(ids, pixels, mask)[1]
    tokens = model.generate(ids, pixels, mask, max_new_tokens=14)
    for i, (row, images) in enumerate(zip(ROWS, pixels.split(PICTURES), strict=True)):
        alone = {"input_ids": torch.tensor([row]), "pixel_values": images if len(images) else None}
        close(logits[i][real[i]], model(**alone).logits[0], 1e-11)
        assert tokens[i].tolist() == model.generate(**alone, max_new_tokens=14)[0].tolist()
    assert len({tuple(row) for row in tokens.tolist()}) == 3


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_padding_on_the_right_generates_what_padding_on_the_left_does(model, options):
    left, right = (
        {"input_ids": ids, "attention_mask": mask} for ids, mask in (padded(ROWS, "left"), padded(ROWS, "right"))
    )
    expected = model.generate(**left, pixel_values=pictures(3), max_new_tokens=8, **options)
    assert torch.equal(model.generate(**right, pixel_values=pictures(3), max_new_tokens=8, **options), expected)


def test_positions_and_masks_of_padded_steps_are_those_of_the_references_generate(model, reference, monkeypatch):
    steps, angles, visible = 5, llama.rope_angles, llama.visible
    positions, masks, theirs = [], [], []
    monkeypatch.setattr(llama, "rope_angles", lambda *args: positions.append(args[0]) or angles(*args))
    monkeypatch.setattr(llama, "visible", lambda *args: masks.append(args[0]) or visible(*args))
    hook = reference.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: theirs.append((kwargs["position_ids"], kwargs["attention_mask"])), with_kwargs=True
    )
    ids, mask = padded(ROWS, "left")
    inputs = theirs_of(ids, pictures(3), mask)
    del inputs["position_ids"]
    try:
        tokens = reference.generate(**inputs, max_new_tokens=steps, do_sample=False, eos_token_id=2, pad_token_id=PAD)
    finally:
        hook.remove()
    assert torch.equal(model.generate(**inputs, max_new_tokens=steps), tokens[:, -steps:])
    assert len(positions) == len(masks) == len(theirs) == steps
    for position, mask, (their_position, their_mask) in zip(positions, masks, theirs, strict=True):
        assert torch.equal(position, their_position)
        assert torch.equal(mask.long(), their_mask)
    assert positions[-1].flatten().tolist() == [n + steps - 2 for n in inputs["attention_mask"].sum(1).tolist()]


def test_the_model_may_say_the_image_token(model, reference):
    """A word like any other once it comes out of the head: its own row is embedded in the next step."""
    ours, theirs = copy.deepcopy(model), copy.deepcopy(reference)
    ids, pixels = torch.tensor([ROW]), pictures(2)
    last = model(ids, pixels, output_hidden_states=True).hidden_states[-1][0, -1]
    ours.llama.head.weight[IMAGE] = theirs.lm_head.weight[IMAGE] = 3 * last
    inputs = theirs_of(ids, pixels)
    tokens = theirs.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=PAD)[:, -6:]
    assert tokens[0, 0] == IMAGE
    assert torch.equal(ours.generate(ids, pixels, max_new_tokens=6), tokens)
