"""extras/lora.py: a change of low rank that begins as none and merges to what it was."""

import pytest
import torch

import llava
from extras import lora


def test_lora_begins_as_nothing_and_merges_to_the_same():
    model, _ = llava.load("tiny", device="cpu", dtype=torch.float64)
    ids = torch.tensor([[1, 5, 6, 7]])
    plain, names = model(ids).logits.detach(), set(model.state_dict())
    parameters = lora.add(model, 2)
    assert len(parameters) == 7 * 2 * len(model.llama.blocks)
    assert torch.equal(model(ids).logits, plain)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    changed = model(ids).logits.detach()
    lora.merge(model)
    assert torch.allclose(model(ids).logits, changed, atol=1e-9) and not torch.allclose(changed, plain, atol=1e-3)
    assert set(model.state_dict()) == names
    lora.merge(model)  # where there is none, nothing happens
    assert set(model.state_dict()) == names


def test_the_change_is_twice_b_a():
    """alpha / rank of the authors' script, held against a product written out here."""
    weight = torch.randn(5, 4, dtype=torch.float64)
    change = lora.LowRank(weight, 2)
    with torch.no_grad():
        change.b.normal_()
    a, b = change.a.tolist(), change.b.tolist()
    expected = weight.clone()
    for i in range(5):
        for j in range(4):
            expected[i, j] += 2 * sum(b[i][r] * a[r][j] for r in range(2))
    assert torch.allclose(change(weight), expected, atol=1e-6)


def test_a_rank_that_is_none_is_refused():
    model, _ = llava.load("tiny", device="cpu")
    with pytest.raises(ValueError, match="is no low rank: the narrowest of the matrices has 128 rows or columns"):
        lora.add(model, 128)
    lora.add(model, 127)
