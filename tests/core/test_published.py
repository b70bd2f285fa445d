"""Answers that others have published for the real checkpoints.

They need those checkpoints in the Hub's local cache (nothing is downloaded here) and their pictures in
LLAVA_TEST_DATA/images, and skip otherwise. They are marked slow. The texts are those of transformers' own tests and
docstrings; where theirs were made in 4 bits only the first words are compared, which rounding does not change.
"""

import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import try_to_load_from_cache

import llava

PICTURES = {  # file → where it comes from
    "view.jpg": "https://llava-vl.github.io/static/images/view.jpg",
    "000000039769.jpg": "http://images.cocodataset.org/val2017/000000039769.jpg",
    "australia.jpg": "https://www.ilankelman.org/stopsigns/australia.jpg",
    "dog.jpg": "https://images.unsplash.com/photo-1552053831-71594a27632d",
    "llama.jpg": "https://images.unsplash.com/photo-1617258683320-61900b281ced",
}
SEVEN, BAK = "llava-hf/llava-1.5-7b-hf", "llava-hf/bakLlava-v1-hf"
VISIT = "What are the things I should be cautious about when I visit this place?"
PUBLISHED = [  # checkpoint, pictures, prompt, new tokens, how the answer begins
    (SEVEN, ["australia.jpg"], "USER: <image>\nWhat's the content of the image? ASSISTANT:", 15,
     "The image features a busy city street with a stop sign prominently displayed"),
    (SEVEN, ["dog.jpg"], "<image>\nUSER: Describe the image.\nASSISTANT:", 20,
     "The image features a"),
    (SEVEN, ["llama.jpg"], "<image>\nUSER: Describe the image.\nASSISTANT:", 20,
     "The image features a lone"),
    (SEVEN, ["view.jpg"], f"USER: <image>\n{VISIT} ASSISTANT:", 40,
     "When visiting this place, which"),
    (SEVEN, ["000000039769.jpg"], "USER: <image>\nWhat is this? ASSISTANT:", 20,
     "The image features two cats"),
    (BAK, ["view.jpg"], f"<image>\nUSER: {VISIT}\nASSISTANT:", 20,
     "When visiting this place, there are a few things one should be cautious about. Firstly,"),
    (BAK, ["000000039769.jpg"], "USER: <image>\nWhat is this?\nASSISTANT:", 20,
     "Cats"),
]  # fmt: skip


def picture(name):
    file = Path(os.environ.get("LLAVA_TEST_DATA", ".")) / "images" / name
    if not file.exists():
        pytest.skip(f"needs the picture {PICTURES[name]} as LLAVA_TEST_DATA/images/{name}")
    return file


@pytest.fixture(scope="module")
def loaded():
    """repository → (model, processor), one at a time in memory."""
    kept = {}

    def load(repository):
        if not isinstance(try_to_load_from_cache(repository, "config.json"), str):
            pytest.skip(f"needs the weights of {repository} in the Hub's cache: hf download {repository}")
        if repository not in kept:
            kept.clear()
            kept[repository] = llava.load(repository)
        return kept[repository]

    return load


@pytest.mark.slow
@pytest.mark.parametrize(("repository", "pictures", "prompt", "new", "begins"), PUBLISHED)
def test_an_answer_begins_as_published(loaded, repository, pictures, prompt, new, begins):
    model, processor = loaded(repository)
    inputs = processor(prompt, [picture(name) for name in pictures])
    assert processor.decode(model.generate(**inputs, max_new_tokens=new)[0]).startswith(begins)


@pytest.mark.slow
def test_a_batch_of_conversations_over_three_pictures(loaded):
    """Test 5 of transformers: two rows, one picture in the first and two in the second."""
    model, processor = loaded(SEVEN)
    rows = [
        f"USER: <image>\n{VISIT} What should I bring with me?\nASSISTANT:",
        "USER: <image>\nWhat is this?\nASSISTANT: Two cats lying on a bed!\nUSER: <image>\nAnd this?\nASSISTANT:",
    ]
    inputs = processor(rows, [picture(name) for name in ("view.jpg", "000000039769.jpg", "view.jpg")])
    first, second = (processor.decode(ids) for ids in model.generate(**inputs, max_new_tokens=20))
    assert first.startswith("When visiting this place, which") and second


@pytest.mark.slow
def test_published_ids_of_bakllava(loaded):
    _, processor = loaded(BAK)
    ids = processor(f"<image>\nUSER: {VISIT}\nASSISTANT:", picture("view.jpg"))["input_ids"]
    expected = [1, 32000, 28705, 13, 11123, 28747, 1824, 460, 272, 1722, 315, 1023, 347, 13831, 925, 684, 739, 315,
                3251, 456, 1633, 28804, 13, 4816, 8048, 12738, 28747]  # fmt: skip
    assert torch.equal(ids, torch.tensor([expected]))
