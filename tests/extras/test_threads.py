"""A small model computes on one thread, and all else keeps its threads."""

import copy
import io
import os
import pickle
import threading

import pytest
import torch
from PIL import Image
from reference import ROOT

import llava
from extras import threads

pytestmark = pytest.mark.skipif(threads.SET_OPENMP is torch.set_num_threads, reason="OpenMP cannot be asked here")


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


def in_a_thread(function):
    """What a function returns in a new thread."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def model(three_threads, checkpoints):
    return llava.load(str(checkpoints["llama"]), device="cpu")[0]


def project(model):
    return model.projector(torch.zeros(1, 1, model.projector.linear_1.in_features))


def test_a_thread_that_is_born_while_the_model_computes_has_the_number_of_the_process(model):
    def born():
        inside = torch.get_num_threads()
        hook.remove()
        project(model)
        return inside, torch.get_num_threads()

    seen = []
    hook = model.projector.linear_1.register_forward_hook(lambda *_: seen.append(in_a_thread(born)))
    project(model)
    assert seen == [(3, 3)] and torch.get_num_threads() == 3 == in_a_thread(torch.get_num_threads)


def test_of_two_threads_side_by_side_each_has_its_number_back(model):
    """In whatever order they come and go: the one that came first leaves first."""
    here, there, seen = threading.Event(), threading.Event(), []

    def wait(*_):
        seen.append(torch.get_num_threads())
        if threading.current_thread() is first:
            here.set()
            assert there.wait(60)
        else:
            there.set()
            first.join()

    model.projector.linear_1.register_forward_hook(wait)
    first = threading.Thread(target=lambda: (project(model), seen.append(torch.get_num_threads())))
    first.start()
    assert here.wait(60)
    project(model)
    assert seen == [1, 1, 3] and torch.get_num_threads() == 3 == in_a_thread(torch.get_num_threads)


def test_a_thread_of_another_number_has_it_back(model):
    def other():
        torch.set_num_threads(2)
        project(model)
        return torch.get_num_threads()

    assert in_a_thread(other) == 2
    project(model)
    assert torch.get_num_threads() == 3


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux")
def test_no_library_starts_a_thread_for_a_small_model(three_threads):
    """In a thread of its own, for which none is there yet."""
    model, processor = llava.load(ROOT / "tiny", device="cpu", dtype="float32")
    pixels = processor.chat([("user", "Hi")], [str(ROOT / "tiny" / "scene.png")])["pixel_values"]

    def started():
        before = len(os.listdir("/proc/self/task"))
        x = model.projector(model.vision(pixels, [-2])[0])
        model.llama.head(model.llama(x)[0])
        return len(os.listdir("/proc/self/task")) - before

    assert in_a_thread(started) == 0


@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_a_small_model_can_be_pickled(model, way):
    """And its copy computes on one thread, too."""
    if way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        other = copy.deepcopy(model)
    seen = []
    other.projector.linear_1.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    assert torch.equal(project(other), project(model)) and seen == [1] and torch.get_num_threads() == 3
