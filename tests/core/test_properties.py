"""Any picture and any words, as hypothesis makes them up; fuzz/ goes on from here for millions of others."""

import pytest
import torch
from examples import PLAIN, examples
from hypothesis import given
from hypothesis import strategies as st
from pictures import MODES, picture, preprocess_config, reference_pixels
from PIL import Image
from reference import EDGE, IMAGE, TINY
from transformers import LlavaImageProcessorPil

import llava
import vision
from extras import checks, turn


@examples(80)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(MODES), st.booleans(), st.sampled_from([EDGE, 27, 41]))
def test_any_picture_equals_the_reference(width, height, mode, pad, edge):
    image, config = picture(width, height, mode), preprocess_config(edge)
    theirs = (
        reference_pixels(image, config, LlavaImageProcessorPil, do_pad=True) if pad else reference_pixels(image, config)
    )
    assert torch.equal(vision.preprocess(image, config, pad), theirs)


@pytest.fixture(scope="module")
def processor():
    config = llava.LlavaConfig(image_token_index=IMAGE)
    return llava.Processor(checks.Tokenizer(TINY / "tokenizer.json"), preprocess_config(), config)


@examples(300)
@given(PLAIN, st.integers(0, 3), st.sampled_from(["user", "system", "assistant"]))
def test_any_words_stay_words(processor, words, images, role):
    """They come back as they were, hold no special token, and the pictures stand where they stand without them."""
    turns = [(role, words), ("user", "Why?")]
    ids = processor.chat(turns, [Image.new("RGB", (9, 9))] * images)["input_ids"][0].tolist()
    assert ids.count(IMAGE) == images and ids[0] == 1 and ids.count(1) == 1 and ids.count(2) == (role == "assistant")
    assert words.replace("▁", " ") in processor.decode(ids)  # the letter that this vocabulary writes for a space
    assert "".join(turn.as_text(processor.tokenizer, ids)).rstrip("\ufffd") == processor.decode(ids).replace(
        "\ufffd", ""
    )
