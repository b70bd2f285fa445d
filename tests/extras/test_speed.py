"""What is chosen for a machine changes rounding alone."""

import pytest
import torch

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
