"""llama.attend by other ways to the same numbers, where a machine has one that is faster; extras/speed.py times them.

    letter   meaning
    B, T, S  rows of the batch, new positions, all positions
    A, K     query heads, key-value heads
    E        width of one head
"""

import math
import weakref

import torch
import torch.nn.functional as F

import llama


class Attend:
    """llama.attend, by another way to the same numbers where there is one that is faster.

    One query for each row, as a step has it: the way that is fastest here. A whole prompt without padding: the fused
    call skips what a causal mask hides, if it is told so; it does not look for itself.
    """

    def __init__(self, one_query, tell=True):
        self.one_query, self.tell, self.seen = one_query, tell, (None, False)

    def __call__(self, q, k, v, mask, output_attentions=False):
        if output_attentions:
            return llama.attend(q, k, v, mask, output_attentions)
        if q.shape[2] == 1:
            return self.one_query(q, k, v, mask)
        if self.tell and self.is_causal(mask):
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped), None
        return llama.attend(q, k, v, mask)

    def is_causal(self, mask):
        """Whether each position sees all before it and itself; asked once for all blocks, which get the same mask."""
        held, answer = self.seen
        if held is None or held() is not mask:
            T, S = mask.shape[-2:]
            answer = T == S and bool((mask == torch.ones(T, S, dtype=torch.bool, device=mask.device).tril()).all())
            self.seen = weakref.ref(mask), answer
        return answer


def attend_one_query(q, k, v, mask, output_attentions=False):
    """llama.attend for one query, in two float32 products: on some CPUs five times as fast as the fused call, on others
    five times as slow. Queries that share a key-value head are stacked, so that keys are not repeated.
    """
    B, A, _, E = q.shape
    K = k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype).reshape(B, K, A // K, E) @ k.to(dtype).transpose(2, 3) / math.sqrt(E)  # (B, K, A // K, S)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)  # (B, K, A // K, S)
    return (weights @ v.to(dtype)).view(B, A, 1, E).to(q.dtype), None
