"""Other ways to the numbers of attention change rounding alone."""

import pytest
import torch

import llama
from extras import attention


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_query_in_two_products_is_the_plain_attention(dtype, kv_heads):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 1, 8), torch.randn(3, kv_heads, 11, 8), torch.randn(3, kv_heads, 11, 8)
    mask = torch.rand(3, 1, 1, 11) > 0.3
    mask[..., 0] = True
    expected, _ = llama.attend(q.double(), k.double(), v.double(), mask, output_attentions=True)
    ours, weights = attention.attend_one_query(q.to(dtype), k.to(dtype), v.to(dtype), mask)
    exact = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(ours.double(), expected, rtol=exact, atol=exact)
    assert ours.dtype == dtype and weights is None


def queries(T, S, K=2, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(2, 4, T, 8, dtype=dtype), *torch.randn(2, 2, K, S, 8, dtype=dtype)


@pytest.mark.parametrize("K", [4, 2])
@pytest.mark.parametrize("kind", ["causal", "padded", "window", "behind a cache", "all see all"])
def test_the_fused_call_is_told_of_a_causal_mask_and_of_no_other(kind, K, monkeypatch):
    T, S = 5, 9 if kind == "behind a cache" else 5
    real = torch.ones(2, S, dtype=torch.bool)
    real[1, 0] = kind != "padded"
    mask = llama.visible(real, torch.arange(S - T, S), 3 if kind == "window" else None)
    mask = torch.ones_like(mask) if kind == "all see all" else mask
    q, k, v = queries(T, S, K)
    expected, _ = llama.attend(q, k, v, mask, output_attentions=True)
    told, call = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*args, **options):
        told.append(options.get("is_causal", False))
        return call(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    attend = attention.Attend(attention.attend_one_query)
    for _ in range(2):
        torch.testing.assert_close(attend(q, k, v, mask)[0], expected, rtol=1e-4, atol=1e-5)
    assert told == [kind == "causal"] * 2
    assert attend(q, k, v, mask, True)[1] is not None


def test_a_mask_in_the_place_of_an_old_one_is_looked_at_again():
    attend = attention.Attend(llama.attend)
    for n in range(30):  # the memory of the last one is free again
        mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril() if n % 2 else torch.ones(1, 1, 4, 4, dtype=torch.bool)
        assert attend.is_causal(mask) == bool(n % 2)
        del mask
