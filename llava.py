"""
LLaVA: a picture is a few hundred words in a language that a projector speaks.

    picture → vision tower → projector ┐
                                       merge → Llama → sample → text
    prompt  → tokenizer    → embed     ┘

LLaVA (Liu et al. 2023, "Visual Instruction Tuning", section 4.1) joins a CLIP vision tower to a Llama by one small trained
part, the projector: in LLaVA-1.5 (Liu et al. 2023, "Improved Baselines", section 3.2) two linear layers with a GELU between.
Its outputs are embeddings like those of words; they take the place of <image> in the prompt, and the rest is a language model
that goes on from there. This file is that paper; vision.py and llama.py hold the two towers, weights.py the file formats.

    python llava.py --model tiny --image tiny/scene.png

    letter   meaning
    N        pictures, in reading order over the batch
    P        features of a picture, one for each patch
    H, W     height and width of a preprocessed picture
    L, C     layers of the tower that are read, width of each
    B, T     rows of the batch, positions (new ones, where a cache holds others)
    S        all positions, those in the cache first
    D, A     width and attention heads of the language model
    V        size of the vocabulary

Notebooks: notebooks/1_one_question.ipynb, and 4_the_bridge.ipynb of the projector. Next file: weights.py.
"""

import os
import signal

if __name__ == "__main__":  # what is imported takes seconds, and Ctrl-C in it is no reason for a traceback
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # a job in the background ignores Ctrl-C, and goes on doing so
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import atexit
import contextlib
import io
import logging
import shutil
import sys
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # weights in pages of 2 MB instead of 4 kB: Linux reads them a sixth faster

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

import llama
import vision
import weights

# ----------------------------------------------------------------------------------------------------------------
# The model


@dataclass
class LlavaConfig:
    """config.json, in its own field names; defaults: transformers' LlavaConfig."""

    vision_config: vision.VisionConfig = field(default_factory=vision.VisionConfig)
    text_config: llama.TextConfig = field(default_factory=llama.TextConfig)
    image_token_index: int = 32000
    vision_feature_layer: int | list = -2
    vision_feature_select_strategy: str = "default"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    eos_token_id: int | list | None = None  # generation_config.json has the last word on where an answer ends
    description: str | None = None  # shown to whoever runs the model

    @property
    def eos_token_ids(self):
        """The ids that end an answer, a list."""
        return as_list(self.text_config.eos_token_id if self.eos_token_id is None else self.eos_token_id)

    @property
    def padding(self):
        """The id that fills a row which is shorter than the others; the mask keeps it from being read."""
        return self.eos_token_ids[0] if self.pad_token_id is None else self.pad_token_id


class Projector(nn.Module):
    """The bridge: two linear layers with an exact GELU between them (LlavaMultiModalProjector)."""

    def __init__(self, config):
        super().__init__()
        layers = len(as_list(config.vision_feature_layer))  # several layers of the tower come side by side
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(layers * config.vision_config.hidden_size, width, config.multimodal_projector_bias)
        self.linear_2 = nn.Linear(width, width, config.multimodal_projector_bias)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x)))  # (N, P, D)


@dataclass
class LlavaOutput:
    """What forward returns; T counts expanded positions.

    loss () float32 · logits (B, T, V) · kv_cache as it was passed in · hidden_states: layers + 1 of (B, T, D), the last after
    the final norm · attentions: layers of (B, A, T, S) · image_hidden_states (N, P, D), the features that were merged.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    kv_cache: dict | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    image_hidden_states: torch.Tensor | None = None


class Llava(nn.Module):
    """A vision tower, a projector and a language model (LlavaForConditionalGeneration)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = vision.VisionTower(config.vision_config)
        self.projector = Projector(config)
        self.llama = llama.Llama(config.text_config)
        self.init_weights()

    @property
    def device(self):
        return self.llama.embed.weight.device

    @property
    def dtype(self):
        return self.llama.embed.weight.dtype

    def get_image_features(self, pixel_values, vision_feature_layer=None, vision_feature_select_strategy=None):
        """Pictures (N, 3, H, W) → one embedding for each patch, (N, P, D) (LlavaModel.get_image_features).

        vision_feature_layer: which hidden states of the tower to read, an int or a list of them, side by side.
        vision_feature_select_strategy: "default" leaves the class token out, "full" keeps it. None: as the config says.
        """
        layers = as_list(self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer)
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(f"vision_feature_select_strategy is {strategy!r}, and must be 'default' or 'full'")
        wanted = self.projector.linear_1.in_features // self.config.vision_config.hidden_size
        if len(layers) != wanted:
            raise ValueError(f"vision_feature_layer names {len(layers)} layers of the tower, and the projector takes {wanted}")
        states = self.vision(pixel_values.to(self.device), layers)
        if strategy == "default":
            states = [x[:, 1:] for x in states]
        x = torch.cat(states, dim=-1)  # (N, P, L * C)
        x = self.projector(x)  # (N, P, D)
        return check_finite(x, "the picture features")

    def merge(self, input_ids, features=None):
        """Embed the ids (B, T) and put the features (N, P, D) where the image tokens stand → (B, T, D).

        By position, whatever the values are: an embedding of zeros is text. The image token itself is never embedded.
        Raises ValueError unless there is exactly one image token for each feature.
        """
        is_image = input_ids == self.config.image_token_index  # (B, T)
        tokens = int(is_image.sum())
        pictures, size = (0, 0) if features is None else features.shape[:2]
        if tokens != pictures * size:
            raise ValueError(
                f"the prompt holds {tokens} image tokens and {pictures} pictures were given: it takes one <image> for each "
                f"picture (or {size or 'all its features'} in a row, if they are expanded already)"
            )
        input_ids = input_ids.masked_fill(is_image, 0)
        last = self.llama.embed.num_embeddings - 1
        unknown = input_ids[(input_ids < 0) | (input_ids > last)]
        if len(unknown):
            raise ValueError(f"{int(unknown[0])} is not an id: those of this model end at {last}")
        x = self.llama.embed(input_ids)  # (B, T, D)
        return x if features is None else x.masked_scatter(is_image[..., None], features.to(x.dtype))

    def forward(
        self, input_ids=None, pixel_values=None, attention_mask=None, position_ids=None, kv_cache=None, inputs_embeds=None,
        labels=None, vision_feature_layer=None, vision_feature_select_strategy=None, output_hidden_states=False,
        output_attentions=False, logits_to_keep=0,
    ):  # fmt: skip
        """One pass over whole prompts, a chunk or a single step → LlavaOutput.

        input_ids (B, T) int64, the image token once for each picture or once for each feature; or inputs_embeds (B, T, D),
        merged already. pixel_values (N, 3, H, W). attention_mask (B, past + T), 1 = real. position_ids (B, T).
        kv_cache: from init_kv_cache, filled in place. labels (B, T): -100 is ignored, as are the positions of pictures.
        logits_to_keep: only the last so many positions get logits; 0: all. Or the numbers of those that do.
        Raises ValueError for shapes that do not belong together, and for numbers out of range.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is not None and pixel_values is not None:
            raise ValueError("inputs_embeds come merged: pixel_values beside them would not be used")
        shape = inputs_embeds.shape[:2] if input_ids is None else input_ids.shape
        attention_mask = llama.real_tokens(attention_mask, kv_cache, shape, self.device)
        if labels is not None and labels.shape != shape:
            raise ValueError(f"labels has the shape {tuple(labels.shape)}, and the input {tuple(shape)}: one for each id")
        features = None
        if input_ids is None:
            x = inputs_embeds.to(self.device)
        else:
            input_ids = input_ids.to(self.device)
            if pixel_values is not None:
                features = self.get_image_features(pixel_values, vision_feature_layer, vision_feature_select_strategy)
                input_ids, attention_mask, labels = self.expand(input_ids, attention_mask, labels, *features.shape[:2])
            x = self.merge(input_ids, features)  # (B, T, D)

        x, states, attentions = self.llama(x, attention_mask, position_ids, kv_cache, output_hidden_states, output_attentions)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = check_finite(self.llama.head(x[:, keep]), "the logits")
        loss = None
        if labels is not None:
            first = llama.before(attention_mask)[:, -x.shape[1] :] == 0  # nothing to be predicted from
            labels = labels.to(self.device, torch.int64).masked_fill(first, -100)
            if input_ids is not None:
                labels = labels.masked_fill(input_ids == self.config.image_token_index, -100)
            loss = next_token_loss(logits, labels[:, keep])
        return LlavaOutput(loss, logits, kv_cache, states, attentions, features)

    def expand(self, input_ids, attention_mask, labels, pictures, size):
        """Grow the image token of each picture into `size` of them, and mask and labels with it, as transformers 4.38 does inside
        the model and transformers 5 in its processor. What is grown already is returned as it is.

        Rows of unequal length are padded again, on the left, unless the mask says that they were padded on the right.
        """
        is_image = input_ids == self.config.image_token_index  # (B, T)
        if int(is_image.sum()) != pictures or size == 1:  # a wrong number is for merge to report
            return input_ids, attention_mask, labels
        new = input_ids.shape[1]
        past, mask = attention_mask[:, :-new], attention_mask[:, -new:]
        side = "left" if mask[:, -1].all() else "right"
        copies = torch.where(is_image, size, 1)  # (B, T)

        def grow(x, padding):
            rows = [row.repeat_interleave(times) for row, times in zip(x, copies, strict=True)]
            return pad_sequence(rows, batch_first=True, padding_value=padding, padding_side=side)

        mask = torch.cat([past, grow(mask, False)], dim=1)
        labels = None if labels is None else grow(labels.to(self.device), -100)
        return grow(input_ids, self.config.padding), mask, labels

    def expanded(self, input_ids, pixel_values, attention_mask=None, kv_cache=None):
        """ids and mask with the pictures' positions in them, before a picture is looked at: to know how much room is needed."""
        input_ids = input_ids.to(self.device)
        attention_mask = llama.real_tokens(attention_mask, kv_cache, input_ids.shape, self.device)
        pictures = 0 if pixel_values is None else len(pixel_values)
        size = self.vision.grid**2 + (self.config.vision_feature_select_strategy == "full")
        return self.expand(input_ids, attention_mask, None, pictures, size)[:2]

    def init_kv_cache(self, batch_size, max_length):
        """An empty cache for max_length positions, a dict of tensors; see llama.init_kv_cache for what is in it."""
        return llama.init_kv_cache(self.llama.config, batch_size, max_length, self.dtype, self.device)

    @torch.no_grad()
    def stream(
        self, input_ids, pixel_values=None, attention_mask=None, *,
        max_new_tokens=512, temperature=0.0, top_k=None, top_p=1.0, seed=None, kv_cache=None,
    ):  # fmt: skip
        """Yield the next id of every row, (B,) int64, until each row has met an end-of-sequence id or max_new_tokens are made.

        A row that has ended yields the pad id. Greedy at temperature 0, above it drawn from llama.filtered, with a seed of its
        own or torch's. kv_cache: goes on from there, with room for the prompt and all new tokens but the last, which is not put
        into it. Raises ValueError for an option out of range.
        """
        llama.check_sampling(max_new_tokens, temperature, top_k, top_p)
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        eos = torch.tensor(self.config.eos_token_ids, device=self.device)
        going = torch.ones(len(input_ids), dtype=torch.bool, device=self.device)  # (B,)

        def choose(logits):
            nonlocal going
            ids = llama.sample(logits, temperature, top_k, top_p, generator).where(going, self.config.padding)  # (B,)
            real, going = going, going & ~torch.isin(ids, eos)
            return ids, None, real, bool(going.any())

        yield from self.steps(input_ids, pixel_values, attention_mask, kv_cache, max_new_tokens, choose)

    @torch.no_grad()
    def generate(
        self, input_ids, pixel_values=None, attention_mask=None, *,
        max_new_tokens=512, temperature=0.0, top_k=None, top_p=1.0, num_beams=1, seed=None, kv_cache=None,
    ):  # fmt: skip
        """The answers of all rows, (B, new tokens) int64: the new ids only, filled with the pad id behind the end of a row.

        The arguments are those of stream; num_beams above 1 searches for the likeliest answer instead of going greedily
        (Graves 2012; GenerationMixin._beam_search). A search leaves only the prompt in kv_cache.
        """
        if num_beams == 1:
            options = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
            return torch.stack(list(self.stream(input_ids, pixel_values, attention_mask, kv_cache=kv_cache, **options)), dim=1)
        llama.check_sampling(max_new_tokens, temperature, top_k, top_p, num_beams)
        beams = llama.init_beams(len(input_ids), num_beams, max_new_tokens, self.config.padding, self.device)

        def choose(logits):
            ids, parents, more = llama.beam_step(beams, logits, self.config.eos_token_ids)
            return ids, parents, torch.ones_like(ids, dtype=torch.bool), more

        for _ in self.steps(input_ids, pixel_values, attention_mask, kv_cache, max_new_tokens, choose, num_beams):
            pass
        return llama.best_beams(beams)

    def steps(self, input_ids, pixel_values, attention_mask, kv_cache, max_new_tokens, choose, copies=1):
        """The one loop over time: prefill, then choose and step in turn; yields the ids of each step.

        choose: logits (rows, V) → ids (rows,), the parents of the rows or None, which ids are real tokens (rows,), and whether
        to go on. copies: how many rows the step has for each row of the prompt.
        """
        input_ids, attention_mask = self.expanded(input_ids, pixel_values, attention_mask, kv_cache)
        B, T = input_ids.shape
        past, new = attention_mask[:, :-T], attention_mask[:, -T:]
        order = new.long().argsort(dim=1, stable=True)  # padding goes to the left: a new token follows the last real one
        input_ids, attention_mask = input_ids.gather(1, order), torch.cat([past, new.gather(1, order)], dim=1)
        if kv_cache is None:
            kv_cache = self.init_kv_cache(B, T + max_new_tokens - 1)
        elif copies == 1:
            llama.check_room(kv_cache, T + max_new_tokens - 1)
        logits = self(input_ids, pixel_values, attention_mask, kv_cache=kv_cache, logits_to_keep=1).logits  # (B, 1, V)
        if copies > 1:
            kv_cache = llama.fork_cache(kv_cache, copies, max_new_tokens - 1)
            logits = logits.repeat_interleave(copies, dim=0)
        for step in range(max_new_tokens):
            ids, parents, real, more = choose(logits[:, -1])
            yield ids
            if not more or step == max_new_tokens - 1:
                return
            if parents is not None:
                llama.reorder_cache(kv_cache, parents)
            attention_mask = torch.cat([kv_cache["real"][:, : llama.length(kv_cache)], real[:, None]], dim=1)
            logits = self.step(ids, attention_mask, kv_cache)  # (B * copies, 1, V)

    def step(self, ids, attention_mask, kv_cache, **recorded):
        """One id for each row, (B,), behind what the cache holds → the logits of what follows, (B, 1, V)."""
        x = self.llama.embed(ids[:, None])  # not by merge: an <image> that the model itself has said is a word
        with llama.matrix_times_vector(x):
            x = self.llama(x, attention_mask, kv_cache=kv_cache, **recorded)[0]
            return check_finite(self.llama.head(x), "the logits")

    @torch.no_grad()
    def score(self, answers, input_ids, pixel_values=None, attention_mask=None):
        """log P(answer | prompt) of several answers, each a list of ids, to one prompt (1, T) → (answers,) float32.

        The prompt and its pictures are read once; the answers go on from copies of its cache, side by side.
        """
        rows = [torch.tensor(answer, dtype=torch.int64, device=self.device) for answer in answers]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.config.padding)
        real = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
        input_ids, attention_mask = self.expanded(input_ids, pixel_values, attention_mask)
        kv_cache = self.init_kv_cache(1, input_ids.shape[1])
        first = self(input_ids, pixel_values, attention_mask, kv_cache=kv_cache, logits_to_keep=1).logits  # (1, 1, V)
        kv_cache = llama.fork_cache(kv_cache, len(answers), ids.shape[1])
        attention_mask = torch.cat([attention_mask.expand(len(answers), -1), real], dim=1)
        rest = self(ids, attention_mask=attention_mask, kv_cache=kv_cache).logits
        logits = torch.cat([first.expand(len(answers), -1, -1), rest[:, :-1]], dim=1)
        scores = logits.float().log_softmax(-1).gather(2, ids[..., None])[..., 0]
        return scores.masked_fill(~real, 0).sum(1)

    reorder_cache = staticmethod(llama.reorder_cache)  # takes kv_cache and beam_idx, in place

    @property
    def gradient_checkpointing(self):
        """Forget what is inside a block and compute it again for its gradient: less memory, a third more time."""
        return self.llama.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on):
        self.llama.gradient_checkpointing = self.vision.gradient_checkpointing = on

    @torch.no_grad()
    def resize_token_embeddings(self, n):
        """Give embedding and head n rows, for a vocabulary of another size (PreTrainedModel.resize_token_embeddings).

        New rows are drawn around the mean of the old ones, with 1e-9 of their covariance: no new word is likelier than an
        average one (Hewitt 2021, "Initializing new word embeddings").
        """
        if type(n) is not int or n < 1:
            raise ValueError(f"the vocabulary cannot have {n!r} rows: give a whole number of at least 1")
        if not isinstance(self.llama.head, nn.Linear):
            raise ValueError("a quantised or packed model cannot be resized: load it without quantize, compile or inference mode")

        def resized(weight):
            if n == len(weight):
                return weight
            rows, new = weight.float(), max(0, n - len(weight))
            spread = (rows - rows.mean(0)) / len(rows) ** 0.5  # spreadᵀ spread is the covariance
            drawn = rows.mean(0) + 1e-9**0.5 * torch.randn(new, len(rows), device=rows.device) @ spread
            return nn.Parameter(torch.cat([weight[:n], drawn.to(weight.dtype)]), weight.requires_grad)

        embed, head = self.llama.embed, self.llama.head
        tied = head.weight is embed.weight
        embed.weight = resized(embed.weight)
        head.weight = embed.weight if tied else resized(head.weight)
        embed.num_embeddings = head.out_features = self.config.text_config.vocab_size = n
        return embed

    @torch.no_grad()
    def init_weights(self):
        """Random weights for training from scratch, drawn from the reference's distributions."""
        self.vision.init_weights()
        self.llama.init_weights()
        for layer in (self.projector.linear_1, self.projector.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def next_token_loss(logits, labels):
    """Mean cross-entropy of each position's logits (B, T, V) with the next position's label (B, T), -100 left out.

    In float32, whatever the logits are (ForCausalLMLoss). nan if no label is left.
    """
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def check_finite(x, stage):
    """Return x, or say at which stage numbers went out of range, before they become an answer of exclamation marks."""
    total = x.sum(dtype=torch.promote_types(x.dtype, torch.float32))  # one number is looked at faster than all of them
    if not (total.isfinite() or x.isfinite().all()):
        raise ValueError(f"{stage} are not finite in {x.dtype}: use a dtype of wider range, bfloat16 or float32")
    return x


def as_list(x):
    return list(x) if isinstance(x, (list, tuple)) else [x]


# ----------------------------------------------------------------------------------------------------------------
# The prompt

IMAGE = "<image>"
TEMPLATES = {  # text_config.model_type → what stands before a user's words, and between them and the answer
    "llama": ("USER: ", " ASSISTANT:"),
    "mistral": ("USER: ", "\nASSISTANT:"),  # as BakLlava's card has it; the template in its repository is another model's
}
AUTHORS_SYSTEM = (  # the sentence that the authors' own code puts in front of every prompt (conv_vicuna_v1)
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Processor:
    """Text and pictures → what the model takes, and ids → text (LlavaProcessor)."""

    def __init__(self, tokenizer, preprocess_config, config):
        self.tokenizer = tokenizer
        self.preprocess_config = preprocess_config
        self.image_id = config.image_token_index
        self.eos_id, self.pad_id = config.eos_token_ids[0], config.padding
        self.before, self.after = TEMPLATES[config.text_config.model_type]
        if tokenizer.id(IMAGE) != self.image_id:
            raise ValueError(f"tokenizer.json gives {IMAGE} the id {tokenizer.id(IMAGE)}, config.json {self.image_id}")

    def __call__(self, text, images=None, pad=None):
        """A prompt or a list of them, and their pictures → dict of input_ids, attention_mask and, with pictures, pixel_values.

        text: special tokens in it count as such; one <image> for each picture. Rows are padded on the left to the longest.
        images: a PIL image, a path, or a list of them in reading order over all rows. pad: as in vision.preprocess.
        input_ids and attention_mask (B, T) int64, pixel_values (N, 3, H, W) float32. Raises ValueError or OSError.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("there is no prompt in the list")
        return self.inputs([self.tokenizer.start + self.tokenizer.encode(text) for text in texts], images, pad)

    def chat(self, turns, images=None, pad=None):
        """A conversation in the checkpoint's own form → the same dict. turns: a list of (role, words), the roles being
        system, user and assistant; the words are plain text, whatever they look like. All pictures belong to the first
        user turn. After a user turn the answer is asked for.
        """
        images = [] if images is None else as_list(images)
        return self.inputs([self.tokenizer.start + self.encode(self.turns(turns, len(images)))], images, pad)

    def prompt(self, question, images=1):
        """The form of a first question as a string, for reading: what chat encodes."""
        return self.written(self.turns([("user", question)], images))

    def decode(self, ids):
        """ids (T,) → text, without special tokens."""
        return self.tokenizer.decode(ids)

    def inputs(self, rows, images, pad):
        """Rows of ids and pictures → the dict that the model takes."""
        images = [] if images is None else as_list(images)
        wanted = sum(row.count(self.image_id) for row in rows)
        if wanted != len(images):
            raise ValueError(f"the prompt holds {wanted} {IMAGE} and {len(images)} pictures were given: it takes one for each")
        rows = [torch.tensor(row, dtype=torch.int64) for row in rows]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        inputs = {"input_ids": ids, "attention_mask": mask}
        if images:
            images = [image if isinstance(image, Image.Image) else vision.open_image(image) for image in images]
            inputs["pixel_values"] = torch.stack([vision.preprocess(image, self.preprocess_config, pad) for image in images])
        return inputs

    def turns(self, turns, images=0):
        """A conversation as a list of pieces: text as str, special tokens as their ids."""
        pieces = []
        for role, words in turns:
            if role == "system":
                pieces += [words + " "]
            elif role == "user":
                pieces += [self.before, *[self.image_id, "\n"] * images, words, self.after]
                images = 0
            elif role == "assistant":
                pieces += [" " + words, self.eos_id]
            else:
                raise ValueError(f"a turn's role is {role!r}, and must be system, user or assistant")
        if images:
            raise ValueError("pictures were given, but no user turn that they could belong to")
        return pieces

    def encode(self, pieces):
        """Pieces → ids. What stands between two special tokens is encoded as a whole, as the tokenizer does it."""
        ids, text = [], ""
        for piece in [*pieces, None]:
            if isinstance(piece, str):
                text += piece
                continue
            ids += self.tokenizer.encode(text, special=False)
            text = ""
            ids += [] if piece is None else [piece]
        return ids

    def written(self, pieces):
        """Pieces → the string that they stand for."""
        token = self.tokenizer.bpe.id_to_token  # None for the rows that round the vocabulary up
        return "".join(piece if isinstance(piece, str) else token(piece) or "" for piece in pieces)


# ----------------------------------------------------------------------------------------------------------------
# From a folder or the Hub, and back


def load(model, *, device="auto", dtype="auto", quantize=None, compile=False, revision=None):
    """A checkpoint → (Llava, Processor).

    model: a folder, "tiny", or a Hub id, which is downloaded once. device: "auto", "cpu", "cuda", "cuda:1", "mps".
    dtype: a torch dtype, its name, or "auto": on a GPU what the checkpoint is stored in, on a CPU what is fastest there.
    quantize: None, "int8" or "int4", for the linear layers of the language model. compile: record the decode step. With it, and
    under torch.inference_mode(), a CPU's matrices are packed: faster, but they can be neither trained nor saved. In a process
    group of torch.distributed each process gets its part of the language model.
    Raises ValueError or OSError with a finished sentence; nothing is read before everything is checked.
    """
    device = pick_device(device)
    dtype = dtype if dtype == "auto" else pick_dtype(dtype)
    if quantize not in (None, *llama.QUANTIZED):
        raise ValueError(f"quantize is {quantize!r}, and must be {' or '.join(llama.QUANTIZED)}")
    if compile:
        check_compiler(device)
    folder = weights.find(model, revision)
    config, preprocess_config = weights.read_config(folder, LlavaConfig, vision.PreprocessConfig)
    processor = Processor(llama.Tokenizer(weights.small_file(folder / "tokenizer.json")), preprocess_config, config)
    with torch.device("meta"):
        llava = Llava(config).eval()
    found = weights.scan(llava, folder)
    if dtype == "auto":
        dtype = fastest_dtype(llava, device, weights.main_dtype(found, llava), quantize)
    packed = compile or torch.is_inference_mode_enabled()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if quantize or compile:
            raise ValueError("a model that is split over several processes is neither quantised nor compiled: leave these out")
        llama.split(llava.llama, device)
        packed = False
    if quantize is not None:
        llama.replace_layers(llava.llama, llama.QUANTIZED[quantize], dtype)
    if packed and device.type == "cpu" and llama.PackedLinear.works(dtype):
        llama.replace_layers(llava, llama.PackedLinear, dtype)
    check_memory(llava, device, dtype)
    weights.read(llava, found, dtype, device)
    if compile:
        llava.step = RecordedStep(llava)
    return llava, processor


def save(model, processor, folder):
    """Write a checkpoint in the published layout, which load and transformers read."""
    configs = weights.json_files(model.config, processor.preprocess_config, model.dtype)
    weights.write(model, Path(folder), configs, processor.tokenizer.bpe.to_str(pretty=True))


def pick_device(name):
    """A device's name, or auto for the best there is → torch.device. Raises ValueError if it is not there."""
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind, number in there.items() if number))
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"there is no device {name!r}: auto, {', '.join(there)} are known") from None
    if (device.index or 0) >= there.get(device.type, 0):
        raise ValueError(f"this machine has no device {str(device)!r}, or torch was built without it: try --device cpu")
    return device


def pick_dtype(dtype):
    """A floating-point torch dtype, or its name → the torch dtype."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in weights.DTYPES.values()}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ValueError(f"there is no dtype {name!r} here: auto, {', '.join(known)} are known")
    return known[name]


def fastest_dtype(model, device, stored, quantize):
    """What dtype="auto" means. A GPU takes the checkpoint's own. A CPU takes float32, unless the model is so large that
    reading its weights is what takes the time, and the CPU multiplies bfloat16 natively: half the bytes, twice the speed.
    The kernels of quantised weights take bfloat16 alone.
    """
    if device.type != "cpu":
        return stored if stored.itemsize == 2 else torch.float32
    large = sum(tensor.numel() for tensor in model.parameters()) > 100e6
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() or torch.backends.mkldnn.is_acl_available()
    return torch.bfloat16 if large and (quantize or (native and stored.itemsize == 2)) else torch.float32


def check_memory(model, device, dtype):
    """Say that a model will not fit before it is read, instead of being stopped by the system halfway through."""
    mine = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in model.parameters()]  # of a split model
    needed = sum(tensor.numel() for tensor in mine) * dtype.itemsize
    needed += sum(tensor.nbytes for tensor in model.buffers())  # of quantised and packed layers
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu" and hasattr(os, "sysconf"):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        there //= int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # the processes of torchrun share it
    else:
        return
    if needed > there:
        raise ValueError(
            f"the weights take {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')} and the {device.type} has "
            f"{there / 1e9:.1f} GB: try a smaller dtype, --quantize int4, another device or --model tiny"
        )


# ----------------------------------------------------------------------------------------------------------------
# A step that is recorded once and played again


class RecordedStep:
    """Llava.step, recorded once and played again for each token: what load(compile=True) puts in its place.

    A recording fits one shape. So a step looks at a window of the cache that grows by 256 positions at a time, of which the
    mask hides those that are not filled yet. On a CPU torch.compile fuses what stands between the matrix products (it needs
    a C++ compiler); on a GPU a CUDA graph starts all kernels of a step at once, instead of one by one.
    """

    WINDOW = 256

    def __init__(self, model):
        self.plain = model.step
        if model.device.type == "cpu":
            blocks = [torch.compile(block, dynamic=False) for block in model.llama.blocks]  # all alike: compiled once
            self.run = partial(model.llama.run, blocks=blocks)
        else:
            self.run = CudaGraph(model.llama.run)

    def __call__(self, ids, attention_mask, kv_cache):
        needed, capacity = llama.length(kv_cache) + 1, kv_cache["real"].shape[1]
        end = min(capacity, -(-needed // self.WINDOW) * self.WINDOW)
        return self.plain(ids, attention_mask, kv_cache, end=end, run=self.run)


class CudaGraph:
    """A function of tensors whose kernels are recorded at the first call for each shape (and each cache), and then replayed."""

    def __init__(self, function):
        self.function, self.recorded = function, {}

    def __call__(self, x, cos, sin, mask, where, cached, *options):
        inputs = (x, cos, sin, mask, where)
        key = (mask.shape, *(tensor.data_ptr() for pair in cached for tensor in pair))
        if key not in self.recorded:
            if any(key[1:] != other[1:] for other in self.recorded):
                self.recorded.clear()  # another cache: the old graphs hold memory that nobody will use again
            held = [tensor.clone() for tensor in inputs]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # a first run outside the recording lets libraries set themselves up
                self.function(*held, cached, *options)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self.function(*held, cached, *options)
            self.recorded[key] = graph, held, out
        graph, held, out = self.recorded[key]
        for old, new in zip(held, inputs, strict=True):
            old.copy_(new)
        graph.replay()
        return out


def check_compiler(device):
    """Raise ValueError where a step cannot be recorded: torch.compile writes C++ for a CPU."""
    if device.type == "mps":
        raise ValueError("compile works on a CPU and on CUDA, not on mps: leave it out")
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name):
        raise ValueError("compile needs a C++ compiler on a CPU, and there is none: install g++ or leave it out")


# ----------------------------------------------------------------------------------------------------------------
# The command line: answers to stdout, everything else to stderr


class Parser(argparse.ArgumentParser):
    """argparse, with one line for a mistake instead of two."""

    def error(self, message):
        sys.exit(fail(f"{message} (--help lists the options)"))


def parse(arguments):
    parser = Parser(prog="llava.py", description="Ask a LLaVA about pictures.")
    add = parser.add_argument
    add("--image", nargs="+", default=[], metavar="FILE", help="pictures; - reads one from standard input")
    add("--prompt", type=readable, default="Describe the image.", metavar="TEXT", help="the question (default: %(default)s)")
    add("--model", default="llava-hf/llava-1.5-7b-hf", metavar="NAME", help="a Hub id, a folder, or tiny (default: %(default)s)")
    add("--revision", metavar="REV", help="a branch, tag or commit of the Hub's repository")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--quantize", choices=["int8", "int4"], help="keep the language model's matrices in fewer bits: smaller and faster")
    add("--compile", action="store_true", help="record the decode step (on a CPU this needs a C++ compiler)")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="the answer's longest length (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="above 0: sample; 0: the likeliest word each time (default)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens that together reach P")
    add("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    add("--num-beams", type=int, default=1, metavar="N", help="search for the likeliest answer along N beams")
    add("--seed", type=int, metavar="N", help="of the sampling, to repeat it")
    add("--pad", action="store_true", default=None, help="pad to a square, as the authors' code does, instead of cropping to one")
    add("--system", type=readable, metavar="TEXT", help="a sentence in front of the prompt; authors: that of the authors' code")
    add("--show-prompt", action="store_true", help="print the exact prompt, its ids and all shapes to stderr")
    add("--trace", action="store_true", help="print each stage's shape, dtype, milliseconds and bytes to stderr")
    add("--explain", metavar="PAGE.html", help="write a page that shows where in the picture each word of the answer looked")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--chat", action="store_true", help="talk about the pictures; /image FILE adds one, Ctrl-D leaves")
    way.add_argument("--each", action="store_true", help="ask the question of each picture in turn")
    likely = "how likely each of these answers is, instead of an answer"
    way.add_argument("--choices", type=readable, nargs="+", metavar="ANSWER", help=likely)
    return parser.parse_args(arguments)


def readable(argument):
    """An argument as text; bytes that are no characters, which the system hands over in disguise, become U+FFFD."""
    return argument.encode(errors="surrogateescape").decode(errors="replace")


def main(arguments=None):
    """Run the command line; returns the exit status."""
    warnings.showwarning = lambda message, *_, **__: notice(message)
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # or its notes on damaged files would go to stderr
    sys.stdin = sys.stdin or io.TextIOWrapper(io.BytesIO())  # None where it is closed, as by `<&-`
    sys.stderr = sys.stderr or io.StringIO()  # or what is meant for it would go to stdout
    for stream in (sys.stdin, sys.stdout):  # one broken letter, or one that the terminal does not have, is no reason to stop
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return run(parse(arguments))
    except BrokenPipeError:  # the reader of stdout went away, as in `… | head -c 10`: not a mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:  # the finished sentences that are raised throughout
        return fail(error)
    except (RuntimeError, MemoryError) as error:
        return fail(lack(error))


def lack(error):
    """What the machine lacks, as a sentence. Raises the error again if it is another: then it is our mistake."""
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in text or "can't allocate memory" in text:
        return "there is too little memory: try --dtype bfloat16, --quantize int4, fewer or smaller pictures, or --model tiny"
    if "CUDA error" in text and "assert" not in text:  # an assertion is about a number of ours
        return f"the device failed ({text.splitlines()[0]}): start again, or try --device cpu"
    raise error


def notice(message):
    print("notice:", line(message), file=sys.stderr)


def fail(message):
    print("error:", line(message), file=sys.stderr)
    return 2


def line(message):
    """As one line of at most 1000 characters, none of which a terminal obeys: names and fields may come from anywhere."""
    text = str(message)
    if getattr(message, "strerror", None):  # the system's own
        text = ": ".join(str(part) for part in (message.filename, message.strerror) if part)
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= 1000 else f"{text[:500]} … {text[-495:]}"


def run(options):
    """What the options ask for; returns the exit status."""
    llama.check_sampling(options.max_new_tokens, options.temperature, options.top_k, options.top_p, options.num_beams)
    if not -(2**63) <= (options.seed or 0) < 2**64:
        raise ValueError(f"seed is {options.seed}, and must be a number of at most 64 bits")
    if options.each and not options.image:
        raise ValueError("--each needs pictures: name them after --image")
    explain = None
    if options.trace or options.explain is not None:  # the one import from notebooks/, for these two alone
        sys.path.append(str(Path(__file__).resolve().parent / "notebooks"))
        import explain

        explain.check(options)
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1:  # torchrun has set them
        join(options)
    images = [] if options.each else [open_named(name) for name in options.image]
    settings = dict(device=options.device, dtype=options.dtype, quantize=options.quantize, compile=options.compile)
    with torch.inference_mode(options.chat or options.each):  # packed matrices pay for themselves by the second answer
        model, processor = load(options.model, **settings, revision=options.revision)
    if model.config.description:
        notice(model.config.description)
    if options.chat:
        return chat(model, processor, images, options)
    if options.choices:
        return print_choices(model, processor, images, options)
    if options.each:
        return answer_each(model, processor, options)
    talk = Talk(processor.tokenizer.start)
    pieces = answer(model, processor, options, question(options), images, talk)
    for text in explain.watch(model, processor, options, images, talk, pieces) if explain else pieces:
        print(text, end="", flush=True)
    return 0


def join(options):
    """Under torchrun: enter the group, and leave the talking to the first process."""
    if options.chat or "-" in options.image:
        raise ValueError("several processes cannot share one standard input: leave out --chat and --image -")
    device, rank = pick_device(options.device), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        options.device = f"cuda:{rank}"
        torch.cuda.set_device(pick_device(options.device))
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(torch.distributed.destroy_process_group)
    seed = [options.seed if options.seed is not None else torch.seed() % 2**63]
    torch.distributed.broadcast_object_list(seed)  # all of them must draw the same
    options.seed = seed[0]
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)


def open_named(name):
    return vision.open_image(sys.stdin.buffer if name == "-" else name)


def question(options):
    """The turns that ask for an answer: the system's sentence, if there is one, and the user's question."""
    system = AUTHORS_SYSTEM if options.system == "authors" else options.system
    return [("system", system), ("user", options.prompt)] if system else [("user", options.prompt)]


@dataclass
class Talk:
    """Where a conversation stands: what the model has read, and the ids that it has not read yet."""

    ids: list
    kv_cache: dict | None = None


def answer(model, processor, options, turns, images, talk=None):
    """Yield the answer to the last turn in pieces of text, and print what it cost to stderr. The talk goes on from there."""
    talk = talk or Talk(processor.tokenizer.start)
    pieces = processor.turns(turns, len(images))
    inputs = processor.inputs([[*talk.ids, *processor.encode(pieces)]], images, options.pad)
    del inputs["attention_mask"]  # one row has no padding, and what the cache holds it knows itself
    end = check_prompt(model, processor, options, [*talk.ids, *pieces], inputs, llama.length(talk.kv_cache))
    cost, said = Cost(model), []
    settings = dict(max_new_tokens=min(options.max_new_tokens, context(model) - end + 1), kv_cache=talk.kv_cache)
    settings |= dict(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    try:
        if options.num_beams > 1:
            best = model.generate(**inputs, **settings, num_beams=options.num_beams)
            said += best[0].tolist()
            yield processor.decode(said)
        else:
            yield from processor.tokenizer.stream(model.stream(**inputs, **settings), said)
    finally:  # also when the answer is broken off
        cost.close()
        if said:
            read = max(0, llama.length(talk.kv_cache) - end)
            talk.ids = said[read:] + ([] if said[-1] in model.config.eos_token_ids else [processor.eos_id])
    yield "\n"
    print(cost.summary(len(said)), file=sys.stderr)
    if said[-1] not in model.config.eos_token_ids:
        notice(f"the answer is cut off after {len(said)} tokens")


def check_prompt(model, processor, options, pieces, inputs, past=0):
    """Where a prompt ends, behind `past` positions. Refuses what is too long; prints it to stderr if that is asked for."""
    new = model.expanded(inputs["input_ids"], inputs.get("pixel_values"))[0].shape[1]
    if past + new > context(model):
        hint = f"{past} hold what was said so far: ask for less, or start a new conversation" if past else "ask for less at once"
        raise ValueError(f"text and pictures take {past + new} positions, and the model has {context(model)}: {hint}")
    if options.show_prompt:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
        print(f"prompt: {processor.written(pieces)!r}\nids: {inputs['input_ids'][0].tolist()}", file=sys.stderr)
        print(f"shapes: {shapes}, expanded to {new} positions", file=sys.stderr)
    return past + new


def context(model):
    """How many positions a conversation may take: what the model was trained for, but no cache of many gigabytes."""
    return min(model.config.text_config.max_position_embeddings, 8192)


def answer_each(model, processor, options):
    """The question of each picture in turn, an answer a line after the file's name. A bad file costs only its own line."""
    status = 0
    for name in options.image:
        try:
            text = "".join(answer(model, processor, options, question(options), [open_named(name)]))
            print(f"{line(name)}\t{' '.join(text.split())}", flush=True)
        except (ValueError, FileNotFoundError) as error:
            status = fail(error)
    return status


def print_choices(model, processor, images, options):
    """Each choice and its probability, given that the answer is one of them: the likelihood of its words and of the end."""
    start, asked = processor.tokenizer.start, processor.turns(question(options), len(images))
    pieces = [[*start, *asked, *processor.turns([("assistant", words)])] for words in options.choices]
    rows = [processor.encode(each) for each in pieces]
    shared, end = 0, len(processor.encode([*start, *asked]))
    while shared < end and len({row[shared] for row in rows}) == 1:  # to the end of the question, unless a choice melts into it
        shared += 1
    inputs = processor.inputs([rows[0][:shared]], images, options.pad)
    del inputs["attention_mask"]  # one row has no padding
    for each, row in zip(pieces, rows, strict=True):
        check_prompt(model, processor, options, each, {**inputs, "input_ids": torch.tensor([row])})
    scores = model.score([row[shared:] for row in rows], inputs["input_ids"], inputs.get("pixel_values"))
    for words, probability in zip(options.choices, scores.softmax(0).tolist(), strict=True):
        print(f"{probability:.4f}\t{words}")
    return 0


class Cost:
    """Clocks around the stages of an answer, by hooks on the modules, so that the model itself knows nothing of it."""

    def __init__(self, model):
        self.device, self.marks = model.device, {}
        self.hooks = [
            model.vision.register_forward_pre_hook(lambda *_: self.mark("image")),
            model.llama.register_forward_pre_hook(lambda *_: self.mark("prefill")),
            model.llama.register_forward_hook(lambda *_: self.mark("first")),
        ]

    def mark(self, stage):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.marks.setdefault(stage, time.perf_counter())

    def close(self):
        self.mark("end")
        for hook in self.hooks:
            hook.remove()

    def summary(self, tokens):
        """What `tokens` new tokens took; the first of them comes out of the prefill."""
        marks = self.marks
        image = f"image {1000 * (marks['prefill'] - marks['image']):.0f} ms, " if "image" in marks else ""
        prefill = f"prefill {1000 * (marks['first'] - marks['prefill']):.0f} ms, "
        speed = f"{tokens} tokens, {(tokens - 1) / (marks['end'] - marks['first']):.1f} tokens/s, "
        peak = peak_memory(self.device)
        return f"{image}{prefill}{speed}peak memory " + (f"{peak / 1e9:.2f} GB" if peak else "unknown")


def peak_memory(device):
    """The most memory that was used so far, in bytes: of the GPU, or else of this process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ----------------------------------------------------------------------------------------------------------------
# A conversation


def chat(model, processor, images, options):
    """Talk about pictures. A turn is the ids that are new, behind what the cache holds: pictures are encoded once, and nothing
    that was said is read again. The form is the one published for several turns, "USER: … ASSISTANT: …</s>USER: …".
    """
    talk, turns = Talk(processor.tokenizer.start, model.init_kv_cache(1, context(model))), question(options)[:-1]
    while (words := read_line()) is not None:
        if words.split()[0] == "/image":
            try:
                images = [*images, vision.open_image(words.removeprefix("/image").strip())]
            except (ValueError, OSError) as error:
                fail(error)
            continue
        before, past = talk.ids, llama.length(talk.kv_cache)
        try:
            for text in answer(model, processor, options, [*turns, ("user", words)], images, talk):
                print(text, end="", flush=True)
        except KeyboardInterrupt:  # stops the answer and keeps the talk
            print(flush=True)
        except ValueError as error:
            print(flush=True)
            fail(error)
            if images:  # or they would be refused with each question from here on
                notice("the pictures that waited for this question are let go: /image FILE gives one again")
                images = []
        if talk.ids is before:  # nothing was answered: as if it had not been asked
            talk.kv_cache["length"].fill_(past)
        else:
            turns, images = [], []
    return 0


def read_line():
    """The next line that is not empty, None at the end of the input. On a terminal with line editing and a history."""
    while True:
        try:
            terminal = sys.stdin.isatty() and sys.stdout.isatty()
            if terminal:
                with contextlib.suppress(ImportError):  # Windows edits lines by itself
                    import readline  # noqa: F401 (input() edits lines once it is there)
            words = input("> " if terminal else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if words:
            return words


if __name__ == "__main__":
    leave = signal.signal(signal.SIGINT, usual)
    status = main()
    signal.signal(signal.SIGINT, leave)
    sys.exit(status)
