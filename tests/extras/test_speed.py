"""What is chosen for a machine changes rounding alone."""

import contextlib

import pytest
import torch
from PIL import Image

import llama
import llava
from extras import speed


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_query_in_two_products_is_the_plain_attention(dtype, kv_heads):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 1, 8), torch.randn(3, kv_heads, 11, 8), torch.randn(3, kv_heads, 11, 8)
    mask = torch.rand(3, 1, 1, 11) > 0.3
    mask[..., 0] = True
    expected, _ = llama.attend(q.double(), k.double(), v.double(), mask, output_attentions=True)
    ours, weights = speed.attend_one_query(q.to(dtype), k.to(dtype), v.to(dtype), mask)
    exact = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(ours.double(), expected, rtol=exact, atol=exact)
    assert ours.dtype == dtype and weights is None


def test_a_step_touches_no_switch_of_the_process(checkpoints, family):
    model, processor = llava.load(str(checkpoints[family]), device="cpu", dtype="bfloat16")
    seen = []
    model.llama.norm.register_forward_hook(lambda *_: seen.append(torch.backends.mkldnn.enabled))
    model.generate(**processor("USER: hello ASSISTANT:"), max_new_tokens=3)
    assert all(seen) and len(seen) == 3


# ----------------------------------------------------------------------------------------------------------------
# dtype="auto" on a GPU


@pytest.mark.parametrize(
    "stored, native, chosen",
    [
        (torch.bfloat16, False, torch.float16),  # a T4, a V100: bfloat16 would be emulated
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float16, False, torch.float16),
        (torch.float16, True, torch.float16),
        (torch.float32, False, torch.float32),
        (torch.float64, True, torch.float32),
    ],
)
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_auto_is_a_dtype_that_the_gpu_has_units_for(monkeypatch, stored, native, chosen, quantize):
    asked = []

    def supported(including_emulation=True):
        asked.append(including_emulation)
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    with torch.device("meta"):
        model = torch.nn.Linear(8, 8)
    assert speed.fastest_dtype(model, torch.device("cuda"), stored, quantize) == chosen
    assert not any(asked)


def test_each_gpu_is_asked_for_itself(monkeypatch):
    """The second may be older than the first."""
    current = [0]

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: current[-1] == 0)
    dtypes = [speed.fastest_dtype(None, torch.device("cuda", i), torch.bfloat16, None) for i in (0, 1)]
    assert dtypes == [torch.bfloat16, torch.float16] and current == [0]


# ----------------------------------------------------------------------------------------------------------------
# Memory


def test_the_limit_that_holds_is_named(monkeypatch):
    with torch.device("meta"):
        model = torch.nn.Linear(1000, 1000, bias=False)
    for there, words in (((3_999_999, "ulimit -v"), r"take 0\.0 GB in float32 .* \(ulimit -v\).*--model tiny"),
                         ((4_000_000, "ulimit -v"), None), (None, None)):  # fmt: skip
        monkeypatch.setattr(speed.memory, "limit", lambda processes, there=there: there)
        if words is None:
            speed.check_memory(model, torch.device("cpu"), torch.float32)
        else:
            with pytest.raises(ValueError, match=words):
                speed.check_memory(model, torch.device("cpu"), torch.float32)


def test_processes_of_torchrun_share_the_memory(monkeypatch):
    asked = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(speed.memory, "limit", lambda processes: asked.append(processes))
    speed.check_memory(torch.nn.Linear(1, 1), torch.device("cpu"), torch.float32)
    assert asked == [4]


@pytest.fixture
def numberless():
    """(A model on the meta device, how many numbers it has)."""
    text = dict(hidden_size=128, intermediate_size=1024, num_hidden_layers=4, vocab_size=64, num_attention_heads=4)
    with torch.device("meta"):
        model = llava.Llava(llava.LlavaConfig(text_config=llama.TextConfig(**text)))
        model.vision, model.projector = torch.nn.Identity(), torch.nn.Identity()
    return model, sum(tensor.numel() for tensor in model.parameters())


@pytest.mark.parametrize("size, fits", [(2, True), (4, False), (None, True)])
def test_memory_is_judged_by_config_and_size_before_a_download(monkeypatch, numberless, size, fits):
    """There are 3 bytes for each number: enough if it is stored in 16 bits, as is assumed where nobody says."""
    model, numbers = numberless
    monkeypatch.setattr(speed.memory, "limit", lambda processes: (3 * numbers, "this machine"))
    monkeypatch.setattr(speed, "fastest_dtype", lambda model, device, stored, *_: stored)
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="the weights take"):
        speed.check_before_download(model, torch.device("cpu"), "auto", None, size and size * numbers)
    with pytest.raises(ValueError, match="in float64"):
        speed.check_before_download(model, torch.device("cpu"), torch.float64, None, size and size * numbers)


def test_memory_is_judged_with_the_bits_that_are_asked_for(monkeypatch, numberless):
    """And the model itself stays as it is: its names are still to be compared with those of the files."""
    model, numbers = numberless
    names = set(model.state_dict())
    monkeypatch.setattr(speed.memory, "limit", lambda processes: (numbers, "this machine"))
    speed.check_before_download(model, torch.device("cpu"), torch.bfloat16, "int4")
    with pytest.raises(ValueError, match="in bfloat16"):
        speed.check_before_download(model, torch.device("cpu"), torch.bfloat16, None)
    assert set(model.state_dict()) == names


# ----------------------------------------------------------------------------------------------------------------
# Threads


@pytest.fixture
def threads():
    """Three of them outside, for one test."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("small, inside", [(True, {1}), (False, {3})])
def test_a_small_model_computes_on_one_thread(threads, monkeypatch, checkpoints, small, inside):
    """Wherever it is used, and whatever else the process does keeps its threads."""
    monkeypatch.setattr(speed, "SMALL", 10**9 if small else 10)
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


def test_an_error_or_ctrl_c_inside_leaves_the_threads_as_they_were(threads, checkpoints):
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
