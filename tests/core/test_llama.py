"""The pieces of the decoder, each against its counterpart in transformers
or against the definition written out in loops.
"""

import itertools

import pytest
import torch
from inputs import filled, small
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb, repeat_kv

import llama

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def prepared():
    torch.manual_seed(1)
    with torch.no_grad():
        yield


# ----------------------------------------------------------------------------------------------------------------
# The norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.3])
def test_rms_norm_is_the_references_bit_for_bit(dtype, eps):
    ours, theirs = llama.RMSNorm(48, eps).to(dtype), LlamaRMSNorm(48, eps).to(dtype)
    ours.weight.normal_()
    theirs.weight.copy_(ours.weight)
    for scale in (1, 1e-3, 30):
        x = (scale * torch.randn(4, 5, 48, dtype=torch.float64)).to(dtype)
        assert ours(x).dtype == dtype
        assert torch.equal(ours(x), theirs(x))


def test_rms_norm_takes_eps_from_the_config():
    model = small(rms_norm_eps=0.3).float()
    assert {module.eps for module in model.modules() if isinstance(module, llama.RMSNorm)} == {0.3}
    x = torch.randn(3, 16)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 0.3).sqrt()
    torch.testing.assert_close(model.norm(x), expected)


def test_squares_that_overflow_float16_do_not_overflow_the_norm():
    x = torch.full((1, 48), 300.0, dtype=torch.float16)
    assert x.pow(2).isinf().all()
    torch.testing.assert_close(llama.RMSNorm(48, 1e-5).half()(x), torch.ones_like(x))


# ----------------------------------------------------------------------------------------------------------------
# Positions


def frequencies(head_dim, theta):
    return llama.frequencies(llama.TextConfig(head_dim=head_dim, rope_theta=theta))


@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("head_dim", [8, 128])
def test_rope_is_the_references_bit_for_bit(theta, head_dim):
    rope = {"rope_type": "default", "rope_theta": theta}
    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, rope_parameters=rope)
    position_ids = torch.stack([torch.arange(40), torch.randint(0, 40000, (40,))])
    for dtype in DTYPES:
        q, k = torch.randn(2, 4, 40, head_dim).to(dtype), torch.randn(2, 2, 40, head_dim).to(dtype)
        theirs = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, position_ids))
        cos, sin = llama.rope_angles(position_ids, frequencies(head_dim, theta))
        assert cos.dtype == sin.dtype == torch.float32  # bfloat16 counts only to 256
        ours = [llama.rotate(x, cos.to(dtype), sin.to(dtype)) for x in (q, k)]
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.dtype == dtype and torch.equal(mine, other)


def test_half_split_rope_is_complex_multiplication_after_a_permutation():
    """Dimensions i and i + E/2 are the two parts of a complex number;
    Meta's files have them side by side, at 2i and 2i + 1.
    """
    E, T, theta = 16, 50, 10000.0
    x = torch.randn(1, 3, T, E, dtype=torch.float64)
    angles = torch.arange(T)[:, None] * theta ** (-torch.arange(0, E, 2, dtype=torch.float64) / E)  # (T, E / 2)
    permutation = torch.stack([torch.arange(E // 2), torch.arange(E // 2) + E // 2], dim=-1).flatten()
    interleaved = torch.view_as_complex(x[..., permutation].unflatten(-1, (-1, 2)).contiguous())
    expected = torch.view_as_real(interleaved * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    cos, sin = llama.rope_angles(torch.arange(T)[None], frequencies(E, theta))
    torch.testing.assert_close(llama.rotate(x, cos, sin)[..., permutation], expected, rtol=0, atol=1e-4)
    assert (
        llama.rotate(x[..., permutation], cos, sin) - expected
    ).abs().max() > 0.1  # the other layout is another thing


def test_a_query_and_a_key_know_only_how_far_they_are_apart():
    q, k = torch.randn(16), torch.randn(16)

    def product(here, there):
        at = [llama.rope_angles(torch.tensor([[position]]), frequencies(16, 10000.0)) for position in (here, there)]
        return (llama.rotate(q, *at[0]) * llama.rotate(k, *at[1])).sum()

    for far in (7, 1000):
        torch.testing.assert_close(product(far + 3, far), product(3, 0), rtol=0, atol=1e-3)
    assert (product(4, 0) - product(3, 0)).abs() > 0.1


# ----------------------------------------------------------------------------------------------------------------
# Attention


def plain(q, k, v, mask):
    """The definition, one head of queries after the other."""
    outputs, weights = torch.empty_like(q), torch.empty(*q.shape[:3], k.shape[2], dtype=q.dtype)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        group = h // (q.shape[1] // k.shape[1])
        scores = (q[b, h] @ k[b, group].T) / q.shape[-1] ** 0.5
        scores[~mask[b, 0]] = -torch.inf
        weights[b, h] = scores.softmax(-1)
        outputs[b, h] = weights[b, h] @ v[b, group]
    return outputs, weights


@pytest.mark.parametrize("heads, groups", [(6, 6), (6, 2), (6, 1)])
@pytest.mark.parametrize("past, new", [(0, 9), (7, 4), (9, 1)])
@pytest.mark.parametrize("window", [None, 3, 100])
def test_fused_and_written_out_attention_are_the_definition(heads, groups, past, new, window):
    q = torch.randn(3, heads, new, 8, dtype=torch.float64)
    k, v = (torch.randn(3, groups, past + new, 8, dtype=torch.float64) for _ in range(2))
    real = torch.ones(3, past + new, dtype=torch.bool)
    real[0, :4] = False  # padding on the left
    real[1, -2:] = False  # on the right
    mask = llama.visible(real, torch.arange(past, past + new), window)
    expected, their_weights = plain(q, k, v, mask)
    fused, nothing = llama.attend(q, k, v, mask)
    written, weights = llama.attend(q, k, v, mask, output_attentions=True)
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(written, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, their_weights, rtol=0, atol=1e-12)
    assert nothing is None and torch.equal(weights > 0, mask.expand_as(weights))


def test_key_value_heads_serve_their_neighbours():
    q, k, v = torch.randn(1, 6, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    mask = llama.visible(torch.ones(1, 5, dtype=torch.bool), torch.arange(5))
    for output_attentions in (False, True):
        grouped = llama.attend(q, k, v, mask, output_attentions)[0]
        torch.testing.assert_close(
            grouped, llama.attend(q, repeat_kv(k, 3), repeat_kv(v, 3), mask, output_attentions)[0]
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_keeps_its_dtype(dtype):
    q, k, v = (torch.randn(1, 4, 5, 8).to(dtype) for _ in range(3))
    mask = llama.visible(torch.ones(1, 5, dtype=torch.bool), torch.arange(5))
    fused, _ = llama.attend(q, k, v, mask)
    written, weights = llama.attend(q, k, v, mask, output_attentions=True)
    assert fused.dtype == written.dtype == weights.dtype == dtype
    torch.testing.assert_close(fused, written, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


# ----------------------------------------------------------------------------------------------------------------
# Who sees whom


@pytest.mark.parametrize("window", [None, 1, 2, 5, 50])
@pytest.mark.parametrize("past, new", [(0, 1), (0, 8), (5, 3), (8, 1)])
def test_the_mask_is_what_two_loops_say(window, past, new):
    real = torch.rand(4, past + new) < 0.6
    real[0], real[1] = True, False
    mask = llama.visible(real, torch.arange(past, past + new), window)
    assert mask.shape == (4, 1, new, past + new) and mask.dtype == torch.bool
    for b, i, j in itertools.product(range(4), range(past, past + new), range(past + new)):
        sees = i == j or (real[b, j] and j <= i and (window is None or i - j < window))
        assert bool(mask[b, 0, i - past, j]) == bool(sees), (b, i, j)


def test_a_mask_for_a_chunk_is_the_last_rows_of_the_whole_one():
    real = torch.rand(3, 10) < 0.7
    for window, new in itertools.product((None, 4), range(1, 11)):
        whole = llama.visible(real, torch.arange(10), window)
        assert torch.equal(llama.visible(real, torch.arange(10 - new, 10), window), whole[:, :, -new:])


@pytest.mark.parametrize("window", [None, 2])
def test_rows_of_nothing_but_padding_stay_finite(window):
    model = small(sliding_window=window)
    x, mask = torch.randn(2, 6, 16, dtype=torch.float64), torch.tensor([[0] * 6, [1] * 6])
    for output_attentions in (False, True):
        out, _, _ = model(x, mask, output_attentions=output_attentions)
        assert out.isfinite().all()
        torch.testing.assert_close(out[1:], model(x[1:])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_nobody_sees_later_positions_or_padding(window):
    """Changing a position changes itself and real ones behind it, as far as layer upon layer of windows reaches."""
    model = small(sliding_window=window)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    before = model(x, mask)[0]
    for at in range(9):
        other = x.clone()
        other[0, at] += 1
        changed = (model(other, mask)[0] - before).abs().amax(-1)[0] > 1e-9
        reach = 9 if window is None else at + 2 * (window - 1) + 1
        expected = [at] if at < 2 else range(at, min(reach, 9))
        assert changed.nonzero().flatten().tolist() == list(expected)


# ----------------------------------------------------------------------------------------------------------------
# The cache's rows


def test_reordering_copies_rows_in_place():
    cache = filled()
    before = {name: tensor.clone() for name, tensor in cache.items()}
    held = {name: tensor.data_ptr() for name, tensor in cache.items()}
    rows = torch.tensor([2, 0, 0])  # row 0 is read after it has been overwritten
    llama.reorder_cache(cache, rows)
    for name, tensor in cache.items():
        assert tensor.data_ptr() == held[name]
        assert torch.equal(tensor, before[name] if name == "length" else before[name][rows])


def test_after_reordering_each_row_goes_on_as_its_parent():
    model = small(num_key_value_heads=2)
    x, step = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 1, 16, dtype=torch.float64)
    mask, rows = torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1]]), torch.tensor([2, 0, 0])
    cache = llama.init_kv_cache(model.config, 3, 6, torch.float64)
    model(x, mask, kv_cache=cache)
    llama.reorder_cache(cache, rows)
    expected = model(torch.cat([x[rows], step], dim=1), torch.cat([mask[rows], torch.ones_like(mask[:, :1])], dim=1))[0]
    torch.testing.assert_close(model(step, kv_cache=cache)[0], expected[:, -1:], rtol=0, atol=1e-12)
