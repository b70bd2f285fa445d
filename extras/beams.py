"""Beam search: keep the n likeliest beginnings instead of one. And the score of answers that are given.

Both go over the verbs of llava.py: prefill, step, reorder_cache. The state of a search is a dict of tensors, as the
cache is. Greedy decoding is a search with one beam; a test compares the two.

    letter   meaning
    B, T     rows of the batch, positions of a prompt
    V        size of the vocabulary
    n, k     beams of a row, candidates that they grow into
"""

import operator

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import llama


@torch.no_grad()
def search(
    model, input_ids, pixel_values, attention_mask, *,
    max_new_tokens, num_beams, kv_cache=None, image_sizes=None, **sampling,
):  # fmt: skip
    """The likeliest answer of each row that a search along num_beams beams finds, (B, length of the longest) int64.

    (Graves 2012; GenerationMixin._beam_search.) sampling: the options of Llava.generate that a search leaves alone.
    Raises ValueError for an option out of range.
    """
    check(max_new_tokens, num_beams, **sampling)
    beams = init_beams(len(input_ids), num_beams, max_new_tokens, model.config.padding, model.device)
    logits, kv_cache = model.prefill(input_ids, pixel_values, attention_mask, kv_cache, image_sizes=image_sizes)
    logits = logits.repeat_interleave(num_beams, dim=0)  # (B * n, V)
    room = model.init_kv_cache(len(logits), llama.length(kv_cache) + max_new_tokens - 1)
    kv_cache = moved(fork_cache(kv_cache, num_beams, 0), room)
    real = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    while True:
        ids, parents, more = beam_step(beams, logits, model.config.eos_token_ids)
        if not more:
            return best_beams(beams)
        llama.reorder_cache(kv_cache, parents)
        logits = model.step(ids, kv_cache, real)  # (B * n, V)


def check(max_new_tokens, num_beams, temperature=0.0, top_k=None, top_p=1.0):
    """Raise ValueError that names the option which is out of range."""
    llama.check_sampling(max_new_tokens, temperature, top_k, top_p)
    if not 1 <= num_beams <= 256:
        raise ValueError(f"num_beams is {num_beams}, and must be 1 to 256")
    if num_beams > 1 and temperature > 0:
        raise ValueError("beam search does not sample: leave num_beams at 1 or temperature at 0")


@torch.no_grad()
def score(model, answers, input_ids, pixel_values=None, attention_mask=None, image_sizes=None):
    """log P(answer | prompt) of several answers, each a list of ids, to one prompt (1, T) → (answers,) float32.

    The prompt and its pictures are read once; the answers go on from copies of its cache, side by side. Raises
    ValueError for what is no list of answers, and for several prompts.
    """
    if input_ids.dim() != 2 or len(input_ids) != 1:
        raise ValueError(f"input_ids has the shape {tuple(input_ids.shape)}: answers are scored to one prompt, (1, T)")
    rows = [torch.tensor(ids, dtype=torch.int64, device=model.device) for ids in as_ids(answers)]
    ids = pad_sequence(rows, batch_first=True, padding_value=model.config.padding)
    real = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    first, kv_cache = model.prefill(input_ids, pixel_values, attention_mask, image_sizes=image_sizes)
    kv_cache = fork_cache(kv_cache, len(answers), ids.shape[1])
    seen = kv_cache["real"][:, : llama.length(kv_cache)]
    rest = model(ids, attention_mask=torch.cat([seen, real], dim=1), kv_cache=kv_cache).logits
    logits = torch.cat([first.expand(len(answers), 1, -1), rest[:, :-1]], dim=1)
    scores = logits.float().log_softmax(-1).gather(2, ids[..., None])[..., 0]
    return scores.masked_fill(~real, 0).sum(1)


def as_ids(answers):
    """Answers as lists of int. Raises ValueError unless they are lists of ids, and hold one at least."""
    try:
        rows = [[operator.index(i) for i in answer] for answer in answers]
    except TypeError:
        raise ValueError(f"answers are a list of lists of ids, and not {answers!r:.100}") from None
    if not any(rows):
        raise ValueError(f"there is nothing to score in the answers {answers!r:.100}: each is a list of ids")
    return rows


# ----------------------------------------------------------------------------------------------------------------
# One step of all beams

# the score of what must not be chosen; finite, as in the reference, so that ties fall the same way
NEVER = torch.tensor(-1e9, dtype=torch.float32, device="cpu")  # a plain number times bool is of torch's default dtype


def init_beams(batch_size, num_beams, max_new_tokens, pad_token_id, device):
    """The state of a search: n beginnings that go on and the n best that have ended, for each of B rows.

    ids, ended_ids (B, n, max_new_tokens) · scores, ended_scores (B, n), sums of log-probabilities, the latter by length
    · ended (B, n) and open (B, 1) bool · ended_lengths (B, n) int64 · step () int64
    """
    shape = (batch_size, num_beams)
    scores = torch.full(shape, float(NEVER), dtype=torch.float32, device=device)
    ids = torch.full((*shape, max_new_tokens), pad_token_id, device=device)
    beams = {"ids": ids, "ended_ids": ids.clone(), "scores": scores.clone(), "ended_scores": scores.clone()}
    beams["scores"][:, 0] = 0  # all n begin alike: let the first one alone branch out
    beams["ended"] = torch.zeros(shape, dtype=torch.bool, device=device)
    beams["ended_lengths"] = torch.zeros(shape, dtype=torch.int64, device=device)
    beams["open"] = torch.ones(batch_size, 1, dtype=torch.bool, device=device)
    beams["step"] = torch.zeros((), dtype=torch.int64)
    return beams


def beam_step(beams, logits, eos_token_ids):
    """One step of all beams, in place: logits (B * n, V) → next ids (B * n,), parents (B * n,), and whether to go on.

    The scoring of GenerationMixin._beam_search with length_penalty 1 and early_stopping False: an ended hypothesis is
    worth its log-probability divided by its length, and the search ends when no open one could beat the worst of n
    ended ones.
    """
    B, n, limit = beams["ids"].shape
    step = int(beams["step"])
    scores = logits.float().log_softmax(-1).view(B, n, -1) + beams["scores"][..., None]  # (B, n, V)
    V = scores.shape[-1]
    # enough that n survive even if all the best ones end here
    scores, order = scores.flatten(1).topk(min(max(2, 1 + len(eos_token_ids)), V) * n)  # (B, k), (B, k)
    parents, tokens = order // V, order % V  # (B, k), (B, k)
    ids = pick_beams(beams["ids"], parents)  # (B, k, limit)
    ids[:, :, step] = tokens
    ends = torch.isin(tokens, torch.tensor(eos_token_ids, device=tokens.device)) | (step + 1 == limit)  # (B, k)

    beams["scores"], chosen = (scores + ends * NEVER).topk(n)
    beams["ids"] = pick_beams(ids, chosen)
    parents, tokens = pick_beams(parents, chosen), pick_beams(tokens, chosen)  # (B, n), (B, n)

    # of those that end here, only the ones among the n best are answers
    answers = ends & (torch.arange(ends.shape[1], device=ends.device) < n)  # (B, k)
    worth = scores / (step + 1) + ~beams["open"] * NEVER + ~answers * NEVER  # (B, k)
    beams["ended_scores"], best = torch.cat([beams["ended_scores"], worth], dim=1).topk(n)
    beams["ended_ids"] = pick_beams(torch.cat([beams["ended_ids"], ids], dim=1), best)
    beams["ended"] = pick_beams(torch.cat([beams["ended"], answers], dim=1), best)
    lengths = torch.full_like(order, step + 1)
    beams["ended_lengths"] = pick_beams(torch.cat([beams["ended_lengths"], lengths], dim=1), best)

    hope = beams["scores"][:, :1] / (step + 1)  # (B, 1), what the best open one is worth if it ended now
    worst = beams["ended_scores"].amin(1, keepdim=True).where(beams["ended"], NEVER)  # (B, n)
    beams["open"] &= (hope > worst).any(1, keepdim=True)
    beams["step"] += 1
    parents = parents + torch.arange(B, device=parents.device)[:, None] * n
    return tokens.flatten(), parents.flatten(), bool(beams["open"].any() and not ends.all())


def best_beams(beams):
    """The best ended hypothesis of each row, (B, length of the longest) int64."""
    return beams["ended_ids"][:, 0, : int(beams["ended_lengths"][:, 0].max())]


def pick_beams(x, index):
    """x (B, n, …), index (B, k) → (B, k, …): the beams that the index names, row by row."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def fork_cache(kv_cache, copies, new):
    """A new cache in which each row stands `copies` times, side by side, with room for `new` more positions."""
    end = llama.length(kv_cache)

    def fork(name, tensor):
        if name == "length":
            return tensor.clone()
        dim, room = (1, (0, new)) if name == "real" else (2, (0, 0, 0, new))  # real (B, S), the others (B, K, S, E)
        return F.pad(tensor.narrow(dim, 0, end).repeat_interleave(copies, dim=0), room)

    return {name: fork(name, tensor) for name, tensor in kv_cache.items()}


def moved(kv_cache, empty):
    """What a cache holds, put into a longer one that is empty."""
    end = llama.length(kv_cache)
    for name, tensor in kv_cache.items():
        place = () if name == "length" else (slice(None),) * (1 if name == "real" else 2) + (slice(end),)
        empty[name][place] = tensor[place]
    return empty
