"""
The voice of LLaVA: from a sequence of embeddings to the next word.

    ids → embed → (here llava.py puts the picture) → block → block → … → norm → head → logits → sample → id

Llama (Touvron et al. 2023, section 2.2) and Mistral (Jiang et al. 2023, section 2), which is the same network with fewer
key-value heads than query heads and a window beyond which attention does not look back.

    letter   meaning                                             llava-1.5-7b   bakLlava
    B        rows of the batch
    T        new positions, those of this call
    S        all positions: those in the cache, then the new
    D        width of the model                                  4096           4096
    H, K     query heads, key-value heads                        32, 32         32, 8
    E        width of one head                                   128            128
    F        width of the MLP                                    11008          14336
    V        size of the vocabulary                              32064          32064
    n, k     beams of a row, candidates that they grow into

The last two chapters make it faster and change nothing: they can wait.

Notebook: notebooks/3_the_voice.ipynb. Next file: llava.py.
"""

import contextlib
import dataclasses
import math
from dataclasses import dataclass

import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------
# From text to ids, and back


class Tokenizer:
    """Byte-pair encoding as the checkpoint's tokenizer.json describes it; the file is used as it is.

    Each stretch of text between two special tokens is encoded by itself and gets a "▁" (a space) in front: the reason why
    there is one after every <image>. A character outside the vocabulary falls back to its UTF-8 bytes.
    """

    def __init__(self, file):
        self.file = file
        with self.blamed():
            self.bpe = tokenizers.Tokenizer.from_file(str(file))
            self.bpe.no_truncation()  # a prompt cut in the middle of a picture is worse than an error
            self.bpe.no_padding()
            self.start = self.bpe.encode("").ids  # what the file puts in front of every text: <s>, once
        self.decode(self.encode("\U0010ffff"))  # a character that no vocabulary has: some files fail only there

    @contextlib.contextmanager
    def blamed(self):
        """What goes wrong inside is the file's fault, said in a ValueError."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the library raises bare Exceptions, and where it panics not even these
            raise ValueError(f"{self.file} cannot be read as a tokenizer: {error}") from None

    def id(self, token):
        """The id of a token, None if it is not in the vocabulary."""
        return self.bpe.token_to_id(token)

    def encode(self, text, special=True):
        """Text → ids, without <s>. special=False: "</s>", "<image>" and the like are ordinary letters."""
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"the text {text!r:.100} holds half a character, a lone surrogate")
        with self.blamed():
            self.bpe.encode_special_tokens = not special
            return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids → text, special tokens left out."""
        ids = [int(i) for i in ids]
        with self.blamed():
            return self.bpe.decode(ids, skip_special_tokens=True)

    def stream(self, ids, seen=None):
        """An iterator of ids → an iterator of pieces of text, each of whole characters.

        Bytes of a character that is not complete yet decode to U+FFFD: they wait for the rest, and if it never comes they
        are not shown. seen: a list to which the ids are appended on their way.
        """
        seen, shown = [] if seen is None else seen, 0
        for i in ids:
            seen.append(int(i))
            text = self.decode(seen)
            if not text.endswith("\ufffd"):
                piece, shown = text[shown:].replace("\ufffd", ""), len(text)
                if piece:
                    yield piece


# ----------------------------------------------------------------------------------------------------------------
# The decoder


@dataclass
class TextConfig:
    """The text_config of config.json, in its own field names; defaults: transformers' LlamaConfig.

    weights.py lays the defaults of MistralConfig over them where model_type says mistral. The published files leave out
    rope_theta, and those of the 7B most of the sizes too.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    sliding_window: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight: a layer norm without the mean and without a bias (LlamaRMSNorm).

    In float32 whatever the model's dtype is: squares overflow float16 at 256.
    """

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_angles(position_ids, head_dim, theta):
    """Rotary position embedding (Su et al. 2021): position m turns the i-th pair of dimensions by m · theta^(-2i/E).

    position_ids (B, T) int → cos, sin, each float32 (B, 1, T, E), the same for every head (LlamaRotaryEmbedding).
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim)
    angles = position_ids[:, None, :, None].float() * frequencies  # (B, 1, T, E / 2)
    angles = torch.cat([angles, angles], dim=-1)  # (B, 1, T, E)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn queries or keys (B, H, T, E) by their angles (apply_rotary_pos_emb).

    The layout is half-split: dimension i is paired with i + E/2. Meta's own files pair 2i with 2i + 1; the published
    checkpoints have the rows of wq and wk reordered to suit this one.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attend(q, k, v, mask, output_attentions=False):
    """softmax(q kᵀ / √E) v over the keys that the mask allows (eager_attention_forward and sdpa_attention_forward).

    q (B, H, T, E), k and v (B, K, S, E), mask (B, 1, T, S) bool → (B, H, T, E), and the weights (B, H, T, S) or None.
    Each key-value head serves H / K query heads, its neighbours.
    """
    B, H, T, E = q.shape
    K, S = k.shape[1:3]
    one_on_cpu = T == 1 and q.device.type == "cpu"  # where the two products below take a fifth of the time
    if not output_attentions and not one_on_cpu:  # the same in one fused call, which never writes the weights down
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=H != K), None
    # The queries that share a key-value head stand below one another, so that no key is copied for them. In float32: sums and
    # exponentials of 16-bit numbers are too coarse, and a CPU has no fast way for them.
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype).reshape(B, K, -1, E) @ k.to(dtype).transpose(2, 3) / math.sqrt(E)  # (B, K, H // K * T, S)
    weights = scores.view(B, H, T, S).masked_fill(~mask, -torch.inf).softmax(-1)  # (B, H, T, S)
    x = weights.view(B, K, -1, S) @ v.to(dtype)  # (B, K, H // K * T, E)
    return x.view(B, H, T, E).to(q.dtype), weights.to(q.dtype) if output_attentions else None


class Attention(nn.Module):
    """Each position looks at those before it (LlamaAttention, MistralAttention)."""

    def __init__(self, config):
        super().__init__()
        width, E = config.hidden_size, config.head_dim
        self.head_dim = E
        self.wq = nn.Linear(width, config.num_attention_heads * E, bias=False)
        self.wk = nn.Linear(width, config.num_key_value_heads * E, bias=False)
        self.wv = nn.Linear(width, config.num_key_value_heads * E, bias=False)
        self.wo = nn.Linear(config.num_attention_heads * E, width, bias=False)

    def forward(self, x, cos, sin, mask, where, cached, output_attentions=False):
        """cached: None, or this layer's (keys, values) in the cache, (B, K, S, E) each; the new ones go to `where` (T)."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, H, T, E), (B, K, T, E)
        if cached is not None:
            k, v = (old.index_copy_(2, where, new) for old, new in zip(cached, (k, v), strict=True))  # (B, K, S, E), (B, K, S, E)
        x, weights = attend(q, k, v, mask, output_attentions)
        return self.wo(x.transpose(1, 2).flatten(2)), weights


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate x) · up x) (LlamaMLP)."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        x = F.silu(self.gate(x)) * self.up(x)  # (B, T, F)
        return self.down(x)  # (B, T, D)


class Block(nn.Module):
    """Attention between the positions, then an MLP on each, both added to what is there (LlamaDecoderLayer)."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, where, cached, output_attentions=False):
        attended, weights = self.attention(self.attention_norm(x), cos, sin, mask, where, cached, output_attentions)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), weights


class Llama(nn.Module):
    """The decoder and its two ends: embed, blocks, norm, head (LlamaForCausalLM, MistralForCausalLM)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight
        self.gradient_checkpointing = False

    def forward(
        self, x, attention_mask=None, position_ids=None, kv_cache=None, output_hidden_states=False, output_attentions=False,
        end=None, run=None,
    ):  # fmt: skip
        """Embeddings x (B, T, D) → (last hidden state after the norm (B, T, D), hidden_states, attentions).

        attention_mask (B, S): 1 where a position holds a real token. None: as the cache remembers, and all new ones are real.
        position_ids (B, T): None: the number of real tokens before each one.
        kv_cache: from init_kv_cache; the new keys and values are written behind those that it holds. A step that would not
        fit is refused before anything is written.
        hidden_states: a tuple of layers + 1, [0] is x, [i] the output of block i, but the last one is after the norm.
        attentions: a tuple of layers, (B, H, T, S) each. Both are None unless asked for.
        end, run: for a recorded step, how many positions of the cache to look at (S, more than are filled), and what to call
        in place of self.run.
        """
        B, T, _ = x.shape
        past = length(kv_cache)
        if kv_cache is not None:
            check_room(kv_cache, T)
        S = end or past + T
        real = real_tokens(attention_mask, kv_cache, (B, T), x.device)  # (B, past + T)
        if position_ids is None:
            position_ids = before(real)[:, past:]  # (B, T)
        elif position_ids.shape not in ((B, T), (1, T)):
            raise ValueError(f"position_ids has the shape {tuple(position_ids.shape)}, and the input {B} rows of {T} positions")
        real = F.pad(real, (0, S - past - T))  # (B, S)
        where = torch.arange(past, past + T, device=x.device)  # (T)
        mask = visible(real, where, self.config.sliding_window)  # (B, 1, T, S)
        cos, sin = (a.to(x.dtype) for a in rope_angles(position_ids, self.config.head_dim, self.config.rope_theta))
        cached = [None] * len(self.blocks)
        if kv_cache is not None:  # views of the cache: each block writes its new keys and values there
            cached = [(kv_cache[f"keys.{i}"][:, :, :S], kv_cache[f"values.{i}"][:, :, :S]) for i in range(len(self.blocks))]
        out = (run or self.run)(x, cos, sin, mask, where, cached, output_hidden_states, output_attentions)
        if kv_cache is not None:
            kv_cache["real"][:, :S] = real
            kv_cache["length"] += T
        return out

    def run(self, x, cos, sin, mask, where, cached, output_hidden_states=False, output_attentions=False, blocks=None):
        """The same once position, mask and cache are settled: tensors only, so that a step can be compiled or recorded."""
        hidden_states, attentions = [x], []
        for block, keys_values in zip(blocks or self.blocks, cached, strict=True):
            args = (x, cos, sin, mask, where, keys_values, output_attentions)
            x, weights = checkpoint(block, *args, use_reentrant=False) if self.gradient_checkpointing else block(*args)
            if output_hidden_states:
                hidden_states.append(x)
            attentions.append(weights)
        x = self.norm(x)  # (B, T, D)
        hidden_states = (*hidden_states[:-1], x) if output_hidden_states else None
        return x, hidden_states, tuple(attentions) if output_attentions else None

    @torch.no_grad()
    def init_weights(self):
        """Random weights for training from scratch, as PreTrainedModel draws them: normal, std 0.02, norms 1."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)


# ----------------------------------------------------------------------------------------------------------------
# The KV cache: what the decoder remembers. A key and a value never change once they are computed, since no position sees a
# later one; so they are kept, and a step costs one position instead of all of them.


def init_kv_cache(config, batch_size, max_length, dtype=torch.float32, device="cpu"):
    """An empty cache for max_length positions, a plain dict of tensors:

    keys.{i}, values.{i}  (B, K, max_length, E) for each block, in the model's dtype
    real                  (B, max_length) bool: which positions hold a token and not padding
    length                () int64, on the CPU: how many positions are filled. Nothing else knows how far the sequence has come.
    """
    shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
    cache = {
        f"{name}.{i}": torch.zeros(shape, dtype=dtype, device=device)
        for i in range(config.num_hidden_layers)
        for name in ("keys", "values")
    }
    cache["real"] = torch.zeros(batch_size, max_length, dtype=torch.bool, device=device)
    cache["length"] = torch.zeros((), dtype=torch.int64)
    return cache


def length(kv_cache):
    """The number of positions that a cache holds; without one, 0."""
    return 0 if kv_cache is None else int(kv_cache["length"])


def check_room(kv_cache, new):
    """Raise ValueError if the cache has no room for `new` more positions."""
    held, capacity = length(kv_cache), kv_cache["real"].shape[1]
    if held + new > capacity:
        raise ValueError(
            f"the cache holds {held} of at most {capacity} positions and {new} more do not fit: "
            f"make a longer one with init_kv_cache(batch_size, max_length)"
        )


def fork_cache(kv_cache, copies, new):
    """A new cache in which each row stands `copies` times, side by side, with room for `new` more positions."""
    end = length(kv_cache)

    def fork(name, tensor):
        if name == "length":
            return tensor.clone()
        dim, room = (1, (0, new)) if name == "real" else (2, (0, 0, 0, new))  # real (B, S), the others (B, K, S, E)
        return F.pad(tensor.narrow(dim, 0, end).repeat_interleave(copies, dim=0), room)

    return {name: fork(name, tensor) for name, tensor in kv_cache.items()}


def reorder_cache(kv_cache, beam_idx):
    """Row b becomes a copy of row beam_idx[b], in place: what beam search does when one beam grows out of another.

    kv_cache: from init_kv_cache. beam_idx (B,) int64.
    """
    end = length(kv_cache)
    for name, tensor in kv_cache.items():
        if name == "real":
            tensor[:, :end] = tensor[beam_idx, :end]
        elif name != "length":
            tensor[:, :, :end] = tensor[beam_idx, :, :end]


# ----------------------------------------------------------------------------------------------------------------
# Who sees whom: the one place, for whole prompts, chunks with a past, and single steps


def real_tokens(attention_mask, kv_cache, shape, device):
    """(B, S) bool: which positions hold real tokens, those in the cache first. shape: of the ids, (B, T)."""
    if len(shape) != 2 or not all(shape):
        raise ValueError(f"the input has the shape {tuple(shape)}: it takes at least one row, and in it at least one position")
    batch_size, new = shape
    past = length(kv_cache)
    if kv_cache is not None and len(kv_cache["real"]) != batch_size:
        raise ValueError(f"the cache was made for {len(kv_cache['real'])} rows and the input has {batch_size}")
    if attention_mask is None:
        real = torch.ones(batch_size, new, dtype=torch.bool, device=device)  # (B, T)
        return real if kv_cache is None else torch.cat([kv_cache["real"][:, :past], real], dim=1)
    if attention_mask.shape != (batch_size, past + new):
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}, not {(batch_size, past + new)}: "
            f"a row for each of the batch, a column for each position, the {past} in the cache included"
        )
    return attention_mask.to(device, torch.bool)


def before(real):
    """How many real tokens stand before each position, (B, S) bool → (B, S) int64."""
    return real.cumsum(-1) - real.long()


def visible(real, where, sliding_window=None):
    """The mask: which of the S positions each of the new ones, which stand at `where`, may look at, (B, 1, T, S) bool.

    For one row of four tokens, the first of them padding:      keys    0 1 2 3
                                                          query 0       x . . .   a pad sees itself, so that softmax
                                                          query 1       . x . .   has something to sum over; nobody
                                                          query 2       . x x .   ever reads what comes of it
                                                          query 3       . x x x
    """
    key = torch.arange(real.shape[1], device=real.device)  # (S)
    query = where[:, None]  # (T, 1)
    mask = key <= query  # (T, S)
    if sliding_window is not None:
        mask = mask & (key > query - sliding_window)  # a window of W keys, the query's own included
    return (mask & real[:, None, None, :]) | (key == query)


# ----------------------------------------------------------------------------------------------------------------
# From logits to the next id


def sample(logits, temperature=0.0, top_k=None, top_p=1.0, generator=None):
    """The next id of each row: logits (B, V) → (B,) int64.

    temperature 0 takes the likeliest. Above it, one is drawn from the filtered distribution.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature < 1e-6:  # next to 0 it is the same, and dividing by it would overflow
        return logits.argmax(-1)
    probabilities = filtered(logits.float(), temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def filtered(logits, temperature=1.0, top_k=None, top_p=1.0):
    """Logits (B, V) with what may not be drawn set to -inf, in the reference's order: temperature, top-k, top-p.

    top_k keeps the k likeliest. top_p (Holtzman et al. 2020) keeps the likeliest ones that together just reach the
    probability p (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper).
    """
    logits = logits / temperature
    if top_k is not None:
        threshold = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort(dim=-1)
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - top_p  # (B, V), the tail whose sum stays below 1 - p
        unlikely[:, -1] = False
        logits = logits.masked_fill(unlikely.scatter(-1, order, unlikely), -torch.inf)
    return logits


def check_sampling(max_new_tokens, temperature=0.0, top_k=None, top_p=1.0, num_beams=1):
    """Raise ValueError that names the option which is out of range."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, and must be at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, and must be 0 (greedy) or a positive number")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, and must be at least 1")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, and must be above 0 and at most 1")
    if not 1 <= num_beams <= 256:
        raise ValueError(f"num_beams is {num_beams}, and must be 1 to 256")
    if num_beams > 1 and temperature > 0:
        raise ValueError("beam search does not sample: leave num_beams at 1 or temperature at 0")


# ----------------------------------------------------------------------------------------------------------------
# Beam search: keep the n likeliest beginnings instead of one. The state is a dict of tensors, as the cache is.

NEVER = -1e9  # the score of what must not be chosen; finite, as in the reference, so that ties fall the same way


def init_beams(batch_size, num_beams, max_new_tokens, pad_token_id, device):
    """The state of a search: n beginnings that go on and the n best that have ended, for each of B rows.

    ids, ended_ids (B, n, max_new_tokens) · scores, ended_scores (B, n), sums of log-probabilities, the latter by length ·
    ended (B, n) and open (B, 1) bool · ended_lengths (B, n) int64 · step () int64
    """
    shape = (batch_size, num_beams)
    scores = torch.full(shape, NEVER, device=device)
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

    The scoring of GenerationMixin._beam_search with length_penalty 1 and early_stopping False: an ended hypothesis is worth
    its log-probability divided by its length, and the search ends when no open one could beat the worst of n ended ones.
    """
    B, n, limit = beams["ids"].shape
    step = int(beams["step"])
    scores = logits.float().log_softmax(-1).view(B, n, -1) + beams["scores"][..., None]  # (B, n, V)
    V = scores.shape[-1]
    # so many that n go on even if all the best ones end here
    scores, order = scores.flatten(1).topk(min(max(2, 1 + len(eos_token_ids)), V) * n)  # (B, k), (B, k)
    parents, tokens = order // V, order % V  # (B, k), (B, k)
    ids = take(beams["ids"], parents)  # (B, k, limit)
    ids[:, :, step] = tokens
    ends = torch.isin(tokens, torch.tensor(eos_token_ids, device=tokens.device)) | (step + 1 == limit)  # (B, k)

    beams["scores"], chosen = (scores + ends * NEVER).topk(n)
    beams["ids"] = take(ids, chosen)
    parents, tokens = take(parents, chosen), take(tokens, chosen)  # (B, n), (B, n)

    # of those that end here, only the ones among the n best are answers
    answers = ends & (torch.arange(ends.shape[1], device=ends.device) < n)  # (B, k)
    worth = scores / (step + 1) + ~beams["open"] * NEVER + ~answers * NEVER  # (B, k)
    beams["ended_scores"], best = torch.cat([beams["ended_scores"], worth], dim=1).topk(n)
    beams["ended_ids"] = take(torch.cat([beams["ended_ids"], ids], dim=1), best)
    beams["ended"] = take(torch.cat([beams["ended"], answers], dim=1), best)
    lengths = torch.full_like(order, step + 1)
    beams["ended_lengths"] = take(torch.cat([beams["ended_lengths"], lengths], dim=1), best)

    hope = beams["scores"][:, :1] / (step + 1)  # (B, 1), what the best open one is worth if it ended now
    worst = beams["ended_scores"].amin(1, keepdim=True).where(beams["ended"], NEVER)  # (B, n)
    beams["open"] &= (hope > worst).any(1, keepdim=True)
    beams["step"] += 1
    parents = parents + torch.arange(B, device=parents.device)[:, None] * n
    return tokens.flatten(), parents.flatten(), bool(beams["open"].any() and not ends.all())


def best_beams(beams):
    """The best ended hypothesis of each row, (B, length of the longest) int64."""
    return beams["ended_ids"][:, 0, : int(beams["ended_lengths"][:, 0].max())]


def take(x, index):
    """x (B, n, …), index (B, k) → (B, k, …): the beams that the index names, row by row."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


# ----------------------------------------------------------------------------------------------------------------
# Matrices for answers alone. A step multiplies one vector by every matrix, so it takes as long as reading them: they are laid
# out in the order in which a CPU reads them fastest, or kept as small whole numbers and a scale. What is multiplied with them
# keeps its precision. None of these layers can be trained or saved.


class PackedLinear(nn.Module):
    """x Wᵀ + b for a W that lies in memory as oneDNN wants it, torch's library for products on a CPU. The same numbers."""

    def __init__(self, in_features, out_features, dtype, bias=False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("w", torch.empty(out_features, in_features, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None)

    def keep(self, weight, device):
        self.w = torch.ops.mkldnn._reorder_linear_weight(weight.to(device, self.w.dtype), 1)

    def forward(self, x):
        return packed_product(x, self.w, self.bias)

    @staticmethod
    def works(dtype):
        """Whether this machine has the product for a dtype."""
        there = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
        return dtype in there and torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, there[dtype])()


# Operators of our own around those of torch, since torch.compile takes such a matrix from nobody else.


@torch.library.custom_op("llava::packed_product", mutates_args=())
def packed_product(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + b for a W (outputs, inputs) that is packed."""
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")


@torch.library.custom_op("llava::packed_whole_product", mutates_args=())
def packed_whole_product(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(x - 128) Wᵀ · scale, float32, for rows x in uint8 and a W (outputs, inputs) in int8 that is packed."""
    zeros = torch.zeros_like(scale, dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise(x, 1.0, 128, w, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")


@packed_product.register_fake
def _(x, w, bias):
    return x.new_empty(*x.shape[:-1], w.shape[0])


@packed_whole_product.register_fake
def _(x, w, scale):
    return x.new_empty(len(x), len(scale), dtype=torch.float32)


class QuantizedLinear(nn.Module):
    """x Wᵀ for a W that is kept in whole numbers; its two kinds say how."""

    CHUNK = 512  # rows of W that are written out at a time

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.most = 0  # rows of x up to which there is a kernel that is faster than the plain product

    def forward(self, x):
        rows = x.flatten(0, -2).contiguous()
        product = self.kernel if len(rows) <= self.most else self.plain
        return product(rows).unflatten(0, x.shape[:-1])

    def plain(self, x):
        """The same product with W written out. A CPU keeps some rows of it in its cache, where the product finds them again."""
        step = self.CHUNK if x.is_cpu else self.out_features
        return torch.cat([self.product(x, start, start + step) for start in range(0, self.out_features, step)], dim=-1)

    def keep(self, weight, device):
        """Keep a matrix (outputs, inputs) of any dtype, some rows at a time, so that little memory is needed beside it."""
        q, scale = zip(*(self.rounded(rows.float()) for rows in weight.split(self.CHUNK)), strict=True)
        self.q, self.scale = torch.cat(q).to(device), torch.cat(scale, self.ROWS_OF_SCALE).to(device)
        if torch.device(device).type == "cpu" and self.scale.dtype == torch.bfloat16:
            self.pack()


class Int8Linear(QuantizedLinear):
    """W[n, k] ≈ scale[n] · q[n, k], with q in -127 … 127: one scale for each row, which is to say for each output.

    A CPU with VNNI multiplies whole numbers, 64 at once, and exactly. So x is written in them, too, in two rows for each:
    x ≈ (high + low / 254) · size, where both are in -127 … 127. That is finer than a bfloat16 is.
    """

    ROWS_OF_SCALE = 0  # the dimension of `scale` that counts rows

    def __init__(self, in_features, out_features, dtype):
        super().__init__(in_features, out_features)
        self.register_buffer("q", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(out_features, dtype=dtype))

    def rounded(self, weight):
        scale = (weight.abs().amax(1) / 127).to(self.scale.dtype)
        q = (weight / at_least_tiny(scale)[:, None]).round().clamp(-127, 127)
        return q.to(torch.int8), scale

    def product(self, x, start, end):
        return F.linear(x, self.q[start:end].to(x.dtype)) * self.scale[start:end].to(x.dtype)

    def pack(self):
        self.most = 32
        if getattr(torch.cpu, "_is_vnni_supported", lambda: False)() and torch.backends.mkldnn.is_available():
            self.q, self.scale, self.most = torch.ops.onednn.qlinear_prepack(self.q, None), self.scale.float(), math.inf

    def kernel(self, x):
        if self.most < math.inf:
            return torch._weight_int8pack_mm(x, self.q, self.scale)
        size = at_least_tiny(x.abs().amax(1, keepdim=True)) / 127  # one for each row
        y = x / size
        high = y.round()
        low = (y - high) * 254
        whole = torch.cat([high, low.round()]).add(128).to(torch.uint8)  # the kernel subtracts the 128 again
        high, low = packed_whole_product(whole, self.q, self.scale).chunk(2)
        return ((high + low / 254) * size).to(x.dtype)


class Int4Linear(QuantizedLinear):
    """W[n, k] ≈ scale[n, g] · (q[n, k] - 8) + zero[n, g], with q in 0 … 15: a scale and a zero for each group g of 64 columns.

    A byte holds the q of two rows, 32 apart, as the kernel wants it: q (outputs / 64, inputs, 32). Beside it scale and zero,
    (inputs / 64, outputs, 2). Both 64s are smaller where a width is not divisible by them, and there is no kernel then.
    """

    ROWS_OF_SCALE = 1

    def __init__(self, in_features, out_features, dtype):
        super().__init__(in_features, out_features)
        self.group, self.block = math.gcd(in_features, 64), math.gcd(out_features, 64)
        self.register_buffer("q", torch.empty(out_features // self.block, in_features, self.block // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(in_features // self.group, out_features, 2, dtype=dtype))

    def rounded(self, weight):
        groups = weight.unflatten(1, (-1, self.group))
        low, high = groups.aminmax(dim=2, keepdim=True)
        scale = ((high - low) / 15).to(self.scale.dtype)
        zero = (low + 8 * scale).to(self.scale.dtype)
        q = ((groups - zero) / at_least_tiny(scale)).round().add(8).clamp(0, 15).to(torch.uint8).flatten(1)
        first, second = q.unflatten(0, (-1, self.block)).transpose(1, 2).chunk(2, dim=2)
        return first | second << 4, torch.cat([scale, zero], dim=2).transpose(0, 1)

    def product(self, x, start, end):
        q = self.q[start // self.block : end // self.block]
        q = torch.cat([q & 15, q >> 4], dim=2).transpose(1, 2).contiguous().to(x.dtype)
        q = q.flatten(0, 1).unflatten(1, (-1, self.group))
        scale, zero = self.scale[:, start:end].to(x.dtype).permute(2, 1, 0).unsqueeze(3)
        return F.linear(x, q.sub_(8).mul_(scale).add_(zero).flatten(1))

    def pack(self):
        self.most = 32 if self.group == self.block == 64 and torch.backends.cpu.get_cpu_capability() == "AVX512" else 0

    def kernel(self, x):
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.q.view(self.out_features, -1), self.group, self.scale)


def at_least_tiny(scale):
    """In float32, without the zeros of rows that are all zero."""
    return scale.float().clamp(min=torch.finfo(torch.float32).tiny)


QUANTIZED = {"int8": Int8Linear, "int4": Int4Linear}


def replace_layers(model, kind, dtype):
    """Put a layer of another kind in the place of each nn.Linear of a model on the meta device; weights.read fills them."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                bias = {} if layer.bias is None else {"bias": True}
                with torch.device("meta"):
                    setattr(parent, name, kind(layer.in_features, layer.out_features, dtype, **bias))


@contextlib.contextmanager
def matrix_times_vector(x):
    """On a CPU, torch's own product of a bfloat16 matrix and one vector reads it twice as fast as oneDNN's, which it prefers."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = before and not (x.is_cpu and x.shape[:-1].numel() == 1)
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


# ----------------------------------------------------------------------------------------------------------------
# Several devices (Shoeybi et al. 2019, "Megatron-LM", section 3). Each of them holds some of the heads and some columns of the
# MLP: rows of the matrices that lead there, and columns of those that lead back, whose products are added up over the devices.

ROWS, COLUMNS = ("attention.wq", "attention.wk", "attention.wv", "mlp.gate", "mlp.up"), ("attention.wo", "mlp.down")


def split(model, device):
    """Leave a decoder on the meta device with the part of its blocks that belongs to this process of torch.distributed."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    config, parts = model.config, mesh.size()
    if any(size % parts for size in (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)):
        sizes = f"{config.num_key_value_heads} key-value heads and {config.intermediate_size} columns"
        raise ValueError(f"{sizes} cannot be dealt out evenly to {parts} processes: take another number of them")
    # PyTorch thinks of x W, where the rows of W as it is stored are columns
    plan = {name: ColwiseParallel() for name in ROWS} | {name: RowwiseParallel() for name in COLUMNS}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    heads = {name: getattr(config, name) // parts for name in ("num_attention_heads", "num_key_value_heads")}
    model.config = dataclasses.replace(config, **heads)
