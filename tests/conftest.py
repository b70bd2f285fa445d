import os
import signal
from pathlib import Path

import pytest
import smollm2
import torch
from reference import EDGE, FAMILIES, PAD, load_reference, make_checkpoint

import llava
from extras import speed

pytest.register_assert_rewrite("checkpoints", "examples", "forks", "inputs", "line", "pictures", "talkers")
from checkpoints import Checkpoint  # noqa: E402
from inputs import PROMPTS  # noqa: E402
from line import Made  # noqa: E402

torch.set_num_threads(1)  # the models of these tests are so small that threads only wait for one another
os.environ.setdefault("HF_HUB_OFFLINE", "1")
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell in the background ignores Ctrl-C, and so would its children


# what is timed elsewhere is settled here: no test depends on how fast this machine is at this moment
SETTLED = {
    "dtype": "bfloat16", "products": "plain", "one query": "fused call", "8 bits": "plain", "4 bits": "plain",
    "8 bits, many rows": "as is", "4 bits, many rows": "as is",
}  # fmt: skip
speed.FIXED.update(SETTLED)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """What opens a page in a browser takes seconds: it is slow."""
    for item in items:
        if "browser" in item.fixturenames:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """family → the folder of a random checkpoint in the published layout, float32."""
    return {family: make_checkpoint(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The line of LLaVAs: made.folder(name), made.pair(name)."""
    return Made(tmp_path_factory)


@pytest.fixture(scope="session")
def pairs(checkpoints):
    """family → (our model, our processor, the reference), all in float64."""
    return {
        family: (*llava.load(str(folder), device="cpu", dtype=torch.float64), load_reference(folder))
        for family, folder in checkpoints.items()
    }


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def pair(pairs, family):
    """(our model, our processor, the reference), for each of the two families in turn."""
    return pairs[family]


@pytest.fixture
def model(pair):
    return pair[0]


@pytest.fixture
def processor(pair):
    return pair[1]


@pytest.fixture
def reference(pair):
    return pair[2]


@pytest.fixture(scope="session")
def data():
    """Real pictures and the real Vicuna tokenizer, which are not part of this repository."""
    if "LLAVA_TEST_DATA" not in os.environ:
        pytest.skip("needs photographs and the published tokenizer: CONTRIBUTING.md says how to get them")
    return Path(os.environ["LLAVA_TEST_DATA"])


@pytest.fixture(scope="session")
def real_words(tmp_path_factory):
    """The folder of a LLaVA whose language model others trained on real words: tests/smollm2.py."""
    if smollm2.reason():
        pytest.skip(smollm2.reason())
    return smollm2.made() or smollm2.make(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture
def batch():
    """Three unequal prompts, padded on the left, and their three pictures."""
    torch.manual_seed(3)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in PROMPTS])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": torch.randn(3, 3, EDGE, EDGE)}


@pytest.fixture
def ends(model):
    """Set the ids that end an answer, for one test."""
    before = model.config.eos_token_id

    def set_ids(ids):
        model.config.eos_token_id = ids

    yield set_ids
    model.config.eos_token_id = before


@pytest.fixture
def copy(checkpoints, tmp_path):
    """A copy of the llama checkpoint, to be changed."""
    return Checkpoint(checkpoints["llama"], tmp_path / "copy")
