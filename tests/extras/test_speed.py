"""What is chosen for a machine changes rounding alone."""

import pytest
import torch

import llama
import llava


def test_one_row_and_a_batch_go_the_same_way_in_bfloat16(checkpoints, family):
    """torch's own product and oneDNN's differ in rounding alone, and the switch between them is put back."""
    model, processor = llava.load(str(checkpoints[family]), device="cpu", dtype="bfloat16")
    inputs = processor("USER: hello ASSISTANT:")
    cache = model.init_kv_cache(1, 64)
    with torch.no_grad():
        model(**inputs, kv_cache=cache)
        fork = {name: tensor.clone() for name, tensor in cache.items()}
        mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.int64)], dim=1)
        step = model.step(torch.tensor([9]), mask, cache)
        whole = model(torch.tensor([[9]]), attention_mask=mask, kv_cache=fork).logits
    assert torch.backends.mkldnn.enabled
    torch.testing.assert_close(step.float(), whole.float(), rtol=0.05, atol=0.05 * whole.float().std().item())
    with pytest.raises(RuntimeError), llama.matrix_times_vector(torch.zeros(1, 1, 8)):
        assert not torch.backends.mkldnn.enabled
        raise RuntimeError
    with llama.matrix_times_vector(torch.zeros(2, 1, 8)):
        assert torch.backends.mkldnn.enabled
