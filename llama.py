"""
The voice of LLaVA: from a sequence of embeddings to the next word.

    ids → embed → (here llava.py puts the picture) → block → block → … → norm → head → logits → sample → id

Llama (Touvron et al. 2023, section 2.2). Mistral (Jiang et al. 2023, section 2) has fewer key-value heads than query
heads and a window beyond which attention does not look back; Qwen2 (Yang et al. 2024) has biases of q, k and v.

    letter   meaning                                             llava-1.5-7b   bakLlava
    B        rows of the batch
    T        new positions, those of this call
    S        all positions: those in the cache, then the new
    D        width of the language model                         4096           4096
    A, K     query heads, key-value heads                        32, 32         32, 8
    E        width of one head                                   128            128
    F        width of the MLP                                    11008          14336
    V        size of the vocabulary                              32064          32064

Notebook: notebooks/3_the_voice.ipynb. Next file: llava.py.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------
# From text to ids, and back


class Tokenizer:
    """Byte-pair encoding as the checkpoint's tokenizer.json describes it.

    The merging itself is left to the library that the file was written for; it is the same in every language model.
    A prompt comes in pieces, text as str and special tokens as ids, and is encoded as one string, as text depends on
    what stands beside it. extras/checks.py sees to it that nobody can type a special token.
    """

    def __init__(self, file):
        self.bpe = tokenizers.Tokenizer.from_file(str(file))
        self.bpe.no_truncation()  # a prompt cut in the middle of a picture is worse than an error
        self.bpe.no_padding()
        letter = self.bpe.encode("a")
        self.bos = letter.ids[: letter.special_tokens_mask.index(0)]  # what the file puts in front: [the id of <s>]
        self.spelling = {i: token.content for i, token in self.bpe.get_added_tokens_decoder().items()}

    def id(self, token):
        """The id of a token, None if it is not in the vocabulary."""
        return self.bpe.token_to_id(token)

    def encode(self, text):
        """Text → ids, without <s>. "</s>", "<image>" and the like in it are special tokens."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def encode_pieces(self, pieces):
        """The pieces of a prompt, text as str and special tokens as ids → ids, without <s>."""
        return self.encode("".join(x if isinstance(x, str) else self.bpe.id_to_token(x) or "" for x in pieces))

    def decode(self, ids):
        """Ids → text, special tokens left out."""
        return self.bpe.decode([int(i) for i in ids], skip_special_tokens=True)


# ----------------------------------------------------------------------------------------------------------------
# The decoder


@dataclass
class TextConfig:
    """The text_config of config.json, in its own field names; defaults: transformers' LlamaConfig.

    The published files leave out rope_theta; those of the 7B leave out most of the sizes, too.
    """

    KINDS: ClassVar = {  # model_type → its other defaults (MistralConfig, Qwen2Config); a window only where it is named
        "llama": {},
        "mistral": dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072,
                        sliding_window=4096),
        "qwen2": dict(vocab_size=151936, intermediate_size=22016, max_position_embeddings=32768, qkv_bias=True,
                      bos_token_id=None, eos_token_id=None),
    }  # fmt: skip
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
    rope_scaling: list | None = None  # of "llama3" the four numbers: see frequencies
    qkv_bias: bool = False  # not in the files: a Qwen2 has them
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


def frequencies(config):
    """By how much each pair of dimensions turns from one position to the next: theta^(-2i/E), (E / 2) float32.

    Rotary position embedding (Su et al. 2021). Llama 3.1 slows down by a factor what turns less than `low` times over
    the length that it was first trained at, less and less up to `high` times (_compute_llama3_parameters).
    """
    f = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim)
    if config.rope_scaling is None:
        return f
    factor, low, high, trained = config.rope_scaling
    kept = ((trained / (2 * math.pi / f) - low) / (high - low)).clamp(0, 1)  # 1: as it was, 0: slowed down
    return (1 - kept) * f / factor + kept * f


def rope_angles(position_ids, frequencies):
    """Angles of m times its frequency for each pair of dimensions at position m (LlamaRotaryEmbedding):
    position_ids (B, T) int → cos, sin, each float32 (B, 1, T, E), the same for every head.
    """
    angles = position_ids[:, None, :, None].float() * frequencies.to(position_ids.device)  # (B, 1, T, E / 2)
    angles = torch.cat([angles, angles], dim=-1)  # (B, 1, T, E)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn queries or keys (B, A, T, E) by their angles (apply_rotary_pos_emb).

    The layout is half-split: dimension i is paired with i + E/2. Meta's own files pair 2i with 2i + 1; the published
    checkpoints have the rows of wq and wk reordered to suit this one.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attend(q, k, v, mask, output_attentions=False):
    """softmax(q kᵀ / √E) v over the keys that the mask allows (eager_attention_forward and sdpa_attention_forward).

    q (B, A, T, E), k and v (B, K, S, E), mask (B, 1, T, S) bool → (B, A, T, E), and the weights (B, A, T, S) or None.
    Each key-value head serves A / K query heads, its neighbours.
    """
    A, E = q.shape[1], q.shape[3]
    K = k.shape[1]
    if output_attentions:  # the equation, in float32 at least: sums and exponentials of 16-bit numbers are too coarse
        dtype = torch.promote_types(q.dtype, torch.float32)
        keys, values = (x.to(dtype).repeat_interleave(A // K, dim=1) for x in (k, v))  # (B, A, S, E)
        scores = q.to(dtype) @ keys.transpose(2, 3) / math.sqrt(E)  # (B, A, T, S)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)  # (B, A, T, S)
        return (weights @ values).to(q.dtype), weights.to(q.dtype)
    # the same in one fused call, which never materialises the weights
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=A != K), None


class Attention(nn.Module):
    """Each position looks at those before it (LlamaAttention, MistralAttention, Qwen2Attention)."""

    def __init__(self, config):
        super().__init__()
        D, A, K, E = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim = E
        self.wq = nn.Linear(D, A * E, bias=config.qkv_bias)
        self.wk = nn.Linear(D, K * E, bias=config.qkv_bias)
        self.wv = nn.Linear(D, K * E, bias=config.qkv_bias)
        self.wo = nn.Linear(A * E, D, bias=False)
        self.attend = attend  # where a machine has a faster way to the same numbers, load puts it here

    def forward(self, x, rope, mask, cached=None, output_attentions=False):
        """x (B, T, D) → (B, T, D), and the weights or None. rope: cos and sin, (B, 1, T, E) each. mask (B, 1, T, S).

        cached: None, or this layer's part of the cache: keys and values, (B, K, max_length, E) each, and the positions
        (T) where the new ones are written.
        """
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, *rope), rotate(k, *rope)  # (B, A, T, E), (B, K, T, E)
        if cached is not None:  # write the new keys and values behind the old ones, then look at all of them
            keys, values, positions = cached
            S = mask.shape[-1]  # what is filled: behind it the cache holds nothing yet
            k, v = k.to(keys.dtype), v.to(values.dtype)  # under autocast they come in another one
            k = keys.index_copy_(2, positions, k)[:, :, :S]  # (B, K, S, E)
            v = values.index_copy_(2, positions, v)[:, :, :S]  # (B, K, S, E)
        x, weights = self.attend(q, k, v, mask, output_attentions)
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

    def forward(self, x, rope, mask, cached=None, output_attentions=False):
        attended, weights = self.attention(self.attention_norm(x), rope, mask, cached, output_attentions)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), weights


class Llama(nn.Module):
    """The decoder and its two ends: embed, blocks, norm, head (LlamaForCausalLM and the like)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        rows = torch.empty(config.vocab_size, config.hidden_size)  # not drawn on "meta": torch loads a compiler first
        self.embed = nn.Embedding.from_pretrained(rows if rows.is_meta else rows.normal_(), freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight
        self.frequencies = frequencies(config)
        self.gradient_checkpointing = False

    def forward(
        self, x, attention_mask=None, position_ids=None, kv_cache=None,
        output_hidden_states=False, output_attentions=False,
    ):  # fmt: skip
        """Embeddings x (B, T, D) → (last hidden state after the norm (B, T, D), hidden_states, attentions).

        attention_mask (B, S): 1 where a position holds a real token. None: as the cache remembers; all new are real.
        position_ids (B, T): None: the number of real tokens before each one.
        kv_cache: from init_kv_cache; the new keys and values are written behind those that it holds. A step that would
        not fit is refused before anything is written.
        hidden_states: a tuple of layers + 1, [0] is x, [i] the output of block i, but the last one is after the norm.
        attentions: a tuple of layers, (B, A, T, S) each. Both are None unless asked for.
        """
        B, T, _ = x.shape
        past = length(kv_cache)
        real = real_tokens(attention_mask, kv_cache, (B, T), x.device)  # (B, S)
        if position_ids is None:
            position_ids = count_before(real)[:, past:]  # (B, T)
        elif position_ids.shape not in ((B, T), (1, T)):
            raise ValueError(f"position_ids has the shape {tuple(position_ids.shape)}, not {(B, T)}, that of the input")
        positions = torch.arange(past, past + T, device=x.device)  # (T)
        mask = visible(real, positions, self.config.sliding_window)  # (B, 1, T, S)
        rope = [a.to(x.dtype) for a in rope_angles(position_ids, self.frequencies)]
        cached = [None] * len(self.blocks)
        if kv_cache is not None:
            check_room(kv_cache, T)
            layers = range(len(self.blocks))
            cached = [(kv_cache[f"keys.{i}"], kv_cache[f"values.{i}"], positions) for i in layers]
        out = self.run(x, rope, mask, cached, output_hidden_states, output_attentions)
        if kv_cache is not None:
            kv_cache["real"][:, : past + T] = real
            kv_cache["length"] += T
        return out

    def run(self, x, rope, mask, cached, output_hidden_states=False, output_attentions=False):
        """forward once positions, mask and cache are settled: tensors alone, so that a single step can be recorded."""
        hidden_states, attentions = [x], []
        for block, layer_cache in zip(self.blocks, cached, strict=True):
            args = (x, rope, mask, layer_cache, output_attentions)
            x, weights = checkpoint(block, *args, use_reentrant=False) if self.gradient_checkpointing else block(*args)
            hidden_states.append(x)
            attentions.append(weights)
        x = self.norm(x)  # (B, T, D)
        hidden_states[-1] = x
        hidden_states = tuple(hidden_states) if output_hidden_states else None
        return x, hidden_states, tuple(attentions) if output_attentions else None


# ----------------------------------------------------------------------------------------------------------------
# The KV cache: what the decoder remembers. A key and a value never change once they are computed, since no position
# sees a later one; so they are kept, and a step costs one position instead of all of them.


def init_kv_cache(config, batch_size, max_length, dtype=torch.float32, device="cpu"):
    """An empty cache for max_length positions, a plain dict of tensors:

    keys.{i}, values.{i}  (B, K, max_length, E) for each block, in the model's dtype
    real                  (B, max_length) bool: which positions hold a token and not padding
    length                () int64, on the CPU: how many positions are filled; the only place that knows
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
        raise ValueError(f"the input has the shape {tuple(shape)}: it takes at least one row of at least one position")
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


def count_before(real):
    """How many real tokens stand before each position, (B, S) bool → (B, S) int64."""
    return real.cumsum(-1) - real.long()


def visible(real, positions, sliding_window=None):
    """The mask: for each new position (T), which of the S positions it may attend to, (B, 1, T, S) bool.

    For one row of four tokens, the first of them padding:      keys    0 1 2 3
                                                          query 0       x . . .   a pad sees itself, so that softmax
                                                          query 1       . x . .   has something to sum over; nobody
                                                          query 2       . x x .   ever reads what comes of it
                                                          query 3       . x x x
    """
    key = torch.arange(real.shape[1], device=real.device)  # (S)
    query = positions[:, None]  # (T, 1)
    mask = key <= query  # (T, S)
    if sliding_window is not None:
        mask = mask & (key > query - sliding_window)  # a window of W keys, the query's own included
    return (mask & real[:, None, None, :]) | (key == query)


# ----------------------------------------------------------------------------------------------------------------
# From logits to the next id


def sample(logits, temperature=0.0, top_k=None, top_p=1.0, generator=None):
    """The next id of each row: logits (B, V) → (B,) int64.

    temperature 0 takes the likeliest. Above it, one is drawn from what filtered leaves, by generator or torch's own.
    """
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
    if top_p < 1:  # p = 0.8, probabilities 0.1 0.2 0.3 0.4: the sums are 0.1 0.3 0.6 1.0, and only the first is dropped
        ascending, order = logits.sort(dim=-1)
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - top_p  # (B, V), the tail whose sum stays at or below 1 - p
        unlikely[:, -1] = False
        logits = logits.masked_fill(unlikely.scatter(-1, order, unlikely), -torch.inf)
    return logits


def check_sampling(max_new_tokens, temperature=0.0, top_k=None, top_p=1.0):
    """Raise ValueError that names the option which is out of range."""
    for name, value, fits, right in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or a positive number"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
    ):
        if not fits:
            raise ValueError(f"{name} is {value}, and must be {right}")
