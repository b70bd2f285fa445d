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
