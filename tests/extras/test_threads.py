"""A small model computes on one thread, and all else keeps its threads."""

import pytest
import torch
from PIL import Image

import llava
from extras import threads


@pytest.fixture
def three_threads():
    """Three of them outside, for one test."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("small, inside", [(True, {1}), (False, {3})])
def test_a_small_model_computes_on_one_thread(three_threads, monkeypatch, checkpoints, small, inside):
    """Wherever it is used, and whatever else the process does keeps its threads."""
    monkeypatch.setattr(threads, "SMALL", 10**9 if small else 10)
    model, processor = llava.load(str(checkpoints["llama"]), device="cpu")
    seen = {"vision": set(), "projector": set(), "llama": set(), "llama.head": set()}
    for name, numbers in seen.items():
        model.get_submodule(name).register_forward_pre_hook(lambda *_, to=numbers: to.add(torch.get_num_threads()))
    edge = model.config.vision_config.image_size
    inputs = processor.chat([("user", "Hi")], [Image.new("RGB", (edge, edge))])
    model.generate(**inputs, max_new_tokens=3)
    assert torch.get_num_threads() == 3 and list(seen.values()) == [inside] * 4
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert torch.get_num_threads() == 3


def test_an_error_or_ctrl_c_inside_leaves_the_threads_as_they_were(three_threads, checkpoints):
    model, _ = llava.load(str(checkpoints["llama"]), device="cpu")
    with pytest.raises(RuntimeError):
        model.projector(torch.zeros(1, 1, 3))
    assert torch.get_num_threads() == 3
    x = torch.zeros(1, 1, model.projector.linear_1.in_features)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.projector.linear_1.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.projector(x)
    hook.remove()
    model.projector(x)
    assert torch.get_num_threads() == 3
