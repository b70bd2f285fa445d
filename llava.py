"""
LLaVA: a picture is a few hundred words in a language that a projector speaks.

    picture → vision tower → projector ┐
                                       merge → Llama → sample → text
    prompt  → tokenizer    → embed     ┘

LLaVA (Liu et al. 2023, "Visual Instruction Tuning", section 4.1) joins a CLIP vision tower to a Llama by one small
trained part, the projector: in LLaVA-1.5 (Liu et al. 2023, "Improved Baselines", section 3) two linear layers with a
GELU between. Its outputs are embeddings like those of words; they take the place of <image> in the prompt, and the rest
is a language model that goes on from there. This file is that paper; vision.py and llama.py hold the two towers,
weights.py the file formats. What is not LLaVA itself (the command line, beams, what makes it faster, …) is in extras/.

    python llava.py --model tiny --image tiny/scene.png

    letter   meaning
    N, P     pictures, in reading order over the batch; features of each, one for a patch
    H, W     height and width of a preprocessed picture
    L, C     layers of the vision tower that are read, width of each
    B, T     rows of the batch, positions (new ones, where a cache holds others)
    S        all positions, those in the cache first
    D, A, V  width, attention heads and vocabulary of the language model

Notebooks: notebooks/1_one_question.ipynb, and 4_the_bridge.ipynb of the projector. Next file: weights.py.
"""

if __name__ == "__main__":  # the command line is a file of its own, which imports this one: the paper begins below
    from extras import cli

    raise SystemExit(cli.program())

from dataclasses import dataclass, field
from functools import partial

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
    """config.json, in its own field names; defaults: transformers' LlavaConfig. extras/family.py has those of the
    classes after it.
    """

    vision_config: vision.VisionConfig = field(default_factory=vision.VisionConfig)
    text_config: llama.TextConfig = field(default_factory=llama.TextConfig)
    image_token_index: int = 32000
    vision_feature_layer: int | list = -2  # the tower's hidden state that is read; several are read side by side
    vision_feature_select_strategy: str = "default"  # leaves the class token out; "full" keeps it
    image_grid_pinpoints: list | None = None  # this and the next two: of pictures in parts, extras/anyres.py
    vision_aspect_ratio: str | None = None
    video_token_index: int | None = None
    projector_layernorm_eps: float | None = None  # ViP-LLaVA norms what the projector takes
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    eos_token_id: int | list | None = None  # generation_config.json has the last word on where an answer ends
    model_type: str = "llava"
    description: str | None = None  # printed when the command line has loaded the model

    @property
    def eos_token_ids(self):
        """The ids that end an answer, a list."""
        ids = as_list(self.text_config.eos_token_id if self.eos_token_id is None else self.eos_token_id)
        return [i for i in ids if i is not None]

    @property
    def padding(self):
        """The id that pads shorter rows; the mask hides it."""
        return [*self.eos_token_ids, 0][0] if self.pad_token_id is None else self.pad_token_id


class Projector(nn.Module):
    """The bridge: two linear layers with an exact GELU between them (LlavaMultiModalProjector)."""

    def __init__(self, config):
        super().__init__()
        L = len(as_list(config.vision_feature_layer))
        C, D = config.vision_config.hidden_size, config.text_config.hidden_size
        eps = config.projector_layernorm_eps
        self.norm = nn.Identity() if eps is None else nn.LayerNorm(L * C, eps)
        self.linear_1 = nn.Linear(L * C, D, config.multimodal_projector_bias)
        self.linear_2 = nn.Linear(D, D, config.multimodal_projector_bias)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(self.norm(x))))  # (N, P, D)


@dataclass
class LlavaOutput:
    """What forward returns; T counts expanded positions. What was not asked for is None."""

    loss: torch.Tensor | None = None  # a scalar in float32
    logits: torch.Tensor | None = None  # of shape (B, T, V), in the model's dtype
    kv_cache: dict | None = None  # the one that was passed in
    hidden_states: tuple | None = None  # layers + 1 of (B, T, D), the last one after the final norm
    attentions: tuple | None = None  # layers of (B, A, T, S)
    image_hidden_states: torch.Tensor | list | None = None  # the features that were merged, as of get_image_features


class Llava(nn.Module):
    """A vision tower, a projector and a language model (LlavaForConditionalGeneration)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = vision.VisionTower(config.vision_config)
        self.projector = Projector(config)
        self.llama = llama.Llama(config.text_config)
        in_parts = config.image_grid_pinpoints is not None  # pictures, each with a number of features of its own
        self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size)) if in_parts else None

    @property
    def device(self):
        return self.llama.embed.weight.device

    @property
    def dtype(self):
        return self.llama.embed.weight.dtype

    def get_image_features(
        self, pixel_values, vision_feature_layer=None, vision_feature_select_strategy=None, image_sizes=None,
        input_ids=None,
    ):  # fmt: skip
        """Pictures (N, 3, H, W) → one embedding for each patch, (N, P, D) (LlavaModel.get_image_features).

        vision_feature_layer, vision_feature_select_strategy: as in LlavaConfig; None: what this model's config says.
        image_sizes, input_ids: of pictures in parts, whose features are a list of N; see extras/anyres.py.
        Raises ValueError for pictures of another size, for numbers out of range, and for layers that do not fit.
        """
        layers = as_list(self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer)
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(f"vision_feature_select_strategy is {strategy!r}, and must be 'default' or 'full'")
        taken = self.projector.linear_1.in_features // self.config.vision_config.hidden_size
        if len(layers) != taken:
            raise ValueError(f"vision_feature_layer names {len(layers)} layers, and the projector takes {taken}")

        def encode(pixel_values):
            states = self.vision(pixel_values.to(self.device), layers)
            if strategy == "default":
                states = [x[:, 1:] for x in states]
            x = torch.cat(states, dim=-1)  # (N, P, L * C)
            return check_finite(self.projector(x), "the picture features")  # (N, P, D)

        if self.image_newline is None:
            return encode(pixel_values)
        from extras import anyres

        return anyres.of_model(self, encode, pixel_values, image_sizes, input_ids)

    def feature_counts(self, pixel_values, image_sizes=None, input_ids=None):
        """How many features each picture has → a list of N. Nothing is encoded for it."""
        if self.image_newline is None:
            dropped = self.config.vision_feature_select_strategy == "default"
            return [self.vision.grid**2 + self.config.vision_config.class_token - dropped] * len(pixel_values)
        from extras import anyres

        return anyres.counts_of_model(self, image_sizes, input_ids)

    def merge(self, input_ids, features=None):
        """Embed the ids (B, T) and put the features (N, P, D), in order, where the image tokens stand → (B, T, D).

        features: or a list of N, (P, D) each, where pictures have different numbers of them.
        By position, not by value: a text embedding may be all zeros (transformers 4.38 took those for pictures).
        Raises ValueError unless there is exactly one image token for each feature, and for an id out of range.
        """
        is_image = input_ids == self.config.image_token_index  # (B, T)
        tokens = int(is_image.sum())
        counts = [] if features is None else [len(x) for x in features]
        if tokens != sum(counts):
            size = " or ".join(map(str, dict.fromkeys(counts))) or "all its features"
            raise ValueError(
                f"the prompt holds {tokens} image tokens and {len(counts)} pictures were given: it takes one <image> "
                f"for each picture (or {size} in a row, if they are expanded already)"
            )
        input_ids = input_ids.masked_fill(is_image, 0)  # the image token is not embedded: it may have no row there
        last = self.llama.embed.num_embeddings - 1
        unknown = input_ids[(input_ids < 0) | (input_ids > last)]
        if len(unknown):
            raise ValueError(f"{int(unknown[0])} is not an id: those of this model end at {last}")
        x = self.llama.embed(input_ids)  # (B, T, D)
        return x if features is None else x.masked_scatter(is_image[..., None], torch.cat([*features]).to(x.dtype))

    def forward(
        self, input_ids=None, pixel_values=None, attention_mask=None, position_ids=None, kv_cache=None,
        inputs_embeds=None, labels=None, vision_feature_layer=None, vision_feature_select_strategy=None,
        output_hidden_states=False, output_attentions=False, logits_to_keep=0, image_sizes=None,
    ):  # fmt: skip
        """One pass over whole prompts, a chunk or a single step → LlavaOutput.

        input_ids (B, T) int64, the image token once for each picture or once for each feature; or inputs_embeds (B, T,
        D), merged already. pixel_values (N, 3, H, W); image_sizes: as get_image_features takes them. attention_mask (B,
        past + T), 1 = real; position_ids (B, T): None as in Llama.forward. kv_cache: from init_kv_cache, filled in
        place. labels (B, T): -100 is ignored, as are the positions of pictures. logits_to_keep: logits of the last n
        positions (0: all), or of a tensor of positions.
        Raises ValueError for shapes that do not match, and for numbers out of range.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is not None and pixel_values is not None:
            raise ValueError("inputs_embeds hold the pictures already: leave out pixel_values")
        shape = inputs_embeds.shape[:2] if input_ids is None else input_ids.shape
        attention_mask = llama.real_tokens(attention_mask, kv_cache, shape, self.device)
        if labels is not None and labels.shape != shape:
            raise ValueError(f"labels has the shape {tuple(labels.shape)}, not {tuple(shape)}: one for each id")
        features = None
        if input_ids is None:
            x = inputs_embeds.to(self.device)
        else:
            input_ids = input_ids.to(self.device)
            if pixel_values is not None:
                options = vision_feature_layer, vision_feature_select_strategy, image_sizes, input_ids
                features = self.get_image_features(pixel_values, *options)
                counts = [len(x) for x in features]
                input_ids, attention_mask, labels = self.expand(input_ids, attention_mask, labels, counts)
            x = self.merge(input_ids, features)  # (B, T, D)

        x, hidden_states, attentions = self.llama(
            x, attention_mask, position_ids, kv_cache, output_hidden_states, output_attentions
        )
        # the last n of a sequence are its slice from -n on, and -0 is 0: all of them
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = check_finite(self.llama.head(x[:, kept]), "the logits")
        loss = None
        if labels is not None:
            first = llama.count_before(attention_mask)[:, -x.shape[1] :] == 0  # no real token stands before it
            labels = labels.to(self.device, torch.int64).masked_fill(first, -100)
            if input_ids is not None:
                labels = labels.masked_fill(input_ids == self.config.image_token_index, -100)
            loss = next_token_loss(logits, labels, kept)
        return LlavaOutput(loss, logits, kv_cache, hidden_states, attentions, features)

    def expand(self, input_ids, attention_mask, labels, counts):
        """Repeat the image token of each picture as often as it has features, in ids (B, T), in mask and labels.

        counts: of the features of each of the N pictures.
        So do transformers 4.38 inside the model and transformers 5 in its processor. Expanded ids are returned as they
        are. Rows of unequal length are padded on the left, or on the right if the mask says that they were.
        """
        is_image = input_ids == self.config.image_token_index  # (B, T)
        if not counts or int(is_image.sum()) != len(counts):  # expanded, or wrong, which merge reports
            return input_ids, attention_mask, labels
        new = input_ids.shape[1]
        past, mask = attention_mask[:, :-new], attention_mask[:, -new:]
        side = "left" if mask[:, -1].all() else "right"
        copies = torch.ones_like(input_ids)
        copies[is_image] = torch.tensor(counts, device=copies.device)

        def grow(x, padding):
            rows = [row.repeat_interleave(times) for row, times in zip(x, copies, strict=True)]
            return pad_sequence(rows, batch_first=True, padding_value=padding, padding_side=side)

        mask = torch.cat([past, grow(mask, False)], dim=1)
        labels = None if labels is None else grow(labels.to(self.device), -100)
        return grow(input_ids, self.config.padding), mask, labels

    def prompt_ids(self, input_ids, pixel_values=None, attention_mask=None, kv_cache=None, image_sizes=None):
        """expand, before a picture is encoded → ids and mask: how many positions will this prompt take?"""
        input_ids = input_ids.to(self.device)
        attention_mask = llama.real_tokens(attention_mask, kv_cache, input_ids.shape, self.device)
        counts = [] if pixel_values is None else self.feature_counts(pixel_values, image_sizes, input_ids)
        return self.expand(input_ids, attention_mask, None, counts)[:2]

    # --- one word after the other

    def init_kv_cache(self, batch_size, max_length):
        """An empty cache for max_length positions, a dict of tensors; see llama.init_kv_cache for what is in it."""
        return llama.init_kv_cache(self.llama.config, batch_size, max_length, self.dtype, self.device)

    def prefill(self, input_ids, pixel_values=None, attention_mask=None, kv_cache=None, room=0, image_sizes=None):
        """Read whole prompts → (logits of the token after each, (B, V); the cache, with `room` more positions free).

        kv_cache: the prompts go on from it; None: a new one. Padding goes to the left, wherever it was: the next token
        has to follow the last real one.
        """
        input_ids, attention_mask = self.prompt_ids(input_ids, pixel_values, attention_mask, kv_cache, image_sizes)
        B, T = input_ids.shape
        past, new = attention_mask[:, :-T], attention_mask[:, -T:]
        order = new.long().argsort(dim=1, stable=True)  # (B, T), padding first
        input_ids, attention_mask = input_ids.gather(1, order), torch.cat([past, new.gather(1, order)], dim=1)
        if kv_cache is None:
            kv_cache = self.init_kv_cache(B, T + room)
        llama.check_room(kv_cache, T + room)
        options = dict(kv_cache=kv_cache, logits_to_keep=1, image_sizes=image_sizes)
        logits = self(input_ids, pixel_values, attention_mask, **options).logits  # (B, 1, V)
        return logits[:, -1], kv_cache

    def step(self, ids, kv_cache, real):
        """One more token for each row, ids (B,) → the next logits, (B, V). real (B,): False where a row has ended."""
        seen = kv_cache["real"][:, : llama.length(kv_cache)]
        x = self.llama.embed(ids[:, None])  # not merged: an <image> that the model generates is a word
        x, _, _ = self.llama(x, torch.cat([seen, real[:, None]], dim=1), kv_cache=kv_cache)
        return check_finite(self.llama.head(x)[:, -1], "the logits")

    @torch.no_grad()
    def stream(
        self, input_ids, pixel_values=None, attention_mask=None, *,
        max_new_tokens=512, temperature=0.0, top_k=None, top_p=1.0, seed=None, kv_cache=None, image_sizes=None,
    ):  # fmt: skip
        """Yield the next id of every row, (B,) int64, until all rows have ended or max_new_tokens are made.

        The first arguments are those of forward. A row ends with an end-of-sequence id and yields the pad id from then
        on. Greedy at temperature 0; above it drawn from llama.filtered, by a generator with this seed or by torch's.
        kv_cache: continue from it; it needs room for all but the last of the new tokens, which is never written. Raises
        ValueError for an option out of range.
        """
        llama.check_sampling(max_new_tokens, temperature, top_k, top_p)
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        eos = torch.tensor(self.config.eos_token_ids, device=self.device)
        going = torch.ones(len(input_ids), dtype=torch.bool, device=self.device)  # (B,)
        prompt, room = (input_ids, pixel_values, attention_mask, kv_cache), max_new_tokens - 1
        logits, kv_cache = self.prefill(*prompt, room, image_sizes)
        for i in range(max_new_tokens):
            ids = llama.sample(logits, temperature, top_k, top_p, generator).where(going, self.config.padding)  # (B,)
            yield ids
            real, going = going, going & ~torch.isin(ids, eos)
            if not going.any() or i == max_new_tokens - 1:
                return
            logits = self.step(ids, kv_cache, real)  # (B, V)

    @torch.no_grad()
    def generate(
        self, input_ids, pixel_values=None, attention_mask=None, *,
        max_new_tokens=512, temperature=0.0, top_k=None, top_p=1.0, num_beams=1, seed=None, kv_cache=None,
        image_sizes=None,
    ):  # fmt: skip
        """The answers of all rows, (B, new tokens) int64: the new ids alone, and the pad id behind the end of a row.

        The arguments are those of stream; num_beams above 1 searches for the likeliest answer instead of going greedily
        (Graves 2012; GenerationMixin._beam_search). A search leaves only the prompt in kv_cache.
        """
        prompt = dict(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask, kv_cache=kv_cache)
        prompt["image_sizes"] = image_sizes
        options = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
        if num_beams != 1:
            from extras import beams

            return beams.search(self, **prompt, num_beams=num_beams, **options)
        return torch.stack(list(self.stream(**prompt, seed=seed, **options)), dim=1)

    reorder_cache = staticmethod(llama.reorder_cache)  # takes kv_cache and beam_idx (B,), in place

    # --- doors to extras/

    def score(self, answers, input_ids, pixel_values=None, attention_mask=None, image_sizes=None):
        """log P(answer | prompt) of several answers, each a list of ids, to one prompt (1, T) → (answers,) float32."""
        from extras import beams

        return beams.score(self, answers, input_ids, pixel_values, attention_mask, image_sizes)

    def resize_token_embeddings(self, n):
        """Give embedding and head n rows, in place → the embedding (PreTrainedModel.resize_token_embeddings)."""
        from extras import training

        return training.resize_token_embeddings(self, n)

    def init_weights(self):
        """Draw random weights from the reference's distributions, to train from scratch."""
        from extras import training

        training.init_weights(self)

    @property
    def gradient_checkpointing(self):
        """Whether what is inside a block is computed again for its gradient: less memory, a third more time."""
        return self.llama.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on):
        self.llama.gradient_checkpointing = self.vision.gradient_checkpointing = on


def next_token_loss(logits, labels, kept=slice(None)):
    """Mean cross-entropy of each position's logits (B, T, V) with the label (B, T) of the next position, -100 left out.

    In float32, whatever the logits are (ForCausalLMLoss). kept: which of the T positions have logits. nan if no label
    is left.
    """
    labels = F.pad(labels[:, 1:], (0, 1), value=-100)[:, kept]
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def check_finite(x, stage):
    """Return x, or raise ValueError if numbers went out of range at this stage: all later ones would be nan."""
    total = x.sum(dtype=torch.promote_types(x.dtype, torch.float32))
    if not (total.isfinite() or x.isfinite().all()):  # the sum is fast, but may itself overflow
        raise ValueError(f"{stage} are not finite in {x.dtype}: use a dtype of wider range, bfloat16 or float32")
    return x


def as_list(x):
    return list(x) if isinstance(x, (list, tuple)) else [x]


# ----------------------------------------------------------------------------------------------------------------
# The prompt


class Processor:
    """Text and pictures → what the model takes, and ids → text (LlavaProcessor).

    tokenizer: a llama.Tokenizer. open_image: what decodes a picture that is given as a path.
    """

    def __init__(self, tokenizer, preprocess_config, config, open_image=vision.open_image):
        from extras import forms

        self.tokenizer, self.preprocess_config, self.config = tokenizer, preprocess_config, config
        self.open_image, self.form = open_image, forms.choose(config, tokenizer)
        self.image_id, self.pad_id = config.image_token_index, config.padding
        self.eos_id = config.eos_token_ids[0] if self.form.end is None else tokenizer.id(self.form.end)
        if self.eos_id not in config.eos_token_ids:  # the end of a turn ends an answer, whatever the config says
            config.eos_token_id = [*config.eos_token_ids, self.eos_id]
        self.image_token = tokenizer.spelling.get(self.image_id)  # <image> in nearly all
        if (its_id := tokenizer.id("<image>")) not in (None, self.image_id) or self.image_token is None:
            raise ValueError(f"tokenizer.json gives <image> the id {its_id}, config.json {self.image_id}")
        tokenizer.control = forms.control(self)

    def __call__(self, text, images=None, pad=None):
        """A prompt or a list of them, and their pictures → dict of input_ids, attention_mask and pixel_values.

        text: special tokens in it are tokens; one image_token for each picture. Rows are padded on the left to the
        longest. images: a PIL image, a path, a list of them in reading order over all rows, or a list of such lists,
        one for each row. pad: as in vision.preprocess. input_ids and attention_mask (B, T) int64, pixel_values
        (N, 3, H, W) float32, if there are pictures, and what get_image_features takes with them. Raises ValueError or
        OSError.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("there is no prompt in the list")
        return self.prepare([self.tokenizer.bos + self.tokenizer.encode(text) for text in texts], images, pad)

    def chat(self, turns, images=None, pad=None):
        """A conversation → the same dict, in the checkpoint's template.

        turns: a list of (role, words), the roles being system, user and assistant, or of (role, words, number of its
        pictures); without numbers all pictures belong to the first user turn. Words are always plain text: a typed </s>
        stays four characters. If the last turn is the user's, the prompt for an answer follows.
        """
        images = [] if images is None else as_list(images)
        pieces = self.pieces(turns, len(images))
        return self.prepare([self.tokenizer.bos + self.tokenizer.encode_pieces(pieces)], images, pad)

    def prompt(self, question, images=1):
        """A single question as chat would encode it, as a string to look at."""
        return self.as_text(self.pieces([("user", question)], images))

    def decode(self, ids):
        """ids (T,) → text, without special tokens."""
        return self.tokenizer.decode(ids)

    def prepare(self, rows, images, pad=None):
        """Rows of ids and pictures → the dict that the model takes."""
        images = [] if images is None else as_list(images)
        dealt = any(isinstance(image, (list, tuple)) for image in images)  # a list of pictures for each row
        if dealt and len(images) != len(rows):
            raise ValueError(f"{len(images)} lists of pictures were given for {len(rows)} prompts: one for each")
        groups = [([row], as_list(x)) for row, x in zip(rows, images, strict=True)] if dealt else [(rows, images)]
        for n, (prompts, given) in enumerate(groups):
            tokens, name = sum(row.count(self.image_id) for row in prompts), f"row {n}" if dealt else "the prompt"
            if tokens != len(given):
                raise ValueError(
                    f"{name} holds {tokens} {self.image_token} and {len(given)} pictures were given: one for each"
                )
        if any(self.config.video_token_index in row for row in rows):
            raise ValueError("the prompt holds the token of a video: only pictures are seen here")
        images = [image for _, given in groups for image in given]
        rows = [torch.tensor(row, dtype=torch.int64) for row in rows]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        inputs = {"input_ids": ids, "attention_mask": mask}
        if images:
            images = [image if isinstance(image, Image.Image) else self.open_image(image) for image in images]
            inputs |= self.pixels(images, ids, pad)
        return inputs

    def pixels(self, images, ids, pad=None):
        """PIL images, and the ids (B, T) that they belong to → what the tower takes, a dict."""
        if self.config.image_grid_pinpoints is None:
            return {"pixel_values": torch.stack([vision.preprocess(x, self.preprocess_config, pad) for x in images])}
        from extras import anyres

        return anyres.of_processor(self, images, ids, pad)

    def pieces(self, turns, images=0, going_on=False):
        """A conversation as a list of pieces: plain text as str, special tokens as their ids. So a special token is one
        that the form puts there, never one that somebody has typed. LLaVA-1.5's form, others are in extras/forms.py:

            USER: <image>\nWhat is there? ASSISTANT: A cat.</s>USER: Which colour? ASSISTANT:

        going_on: what was said before ends with an answer, without its end.
        """
        return self.form.pieces(self, turns, images, going_on)

    def as_text(self, pieces):
        """Pieces → the string that they stand for."""
        names, token = self.tokenizer.spelling, self.tokenizer.bpe.id_to_token  # None for padding rows of the embedding
        return "".join(x if isinstance(x, str) else names.get(x) or token(x) or "" for x in pieces)


# ----------------------------------------------------------------------------------------------------------------
# From a folder or the Hub, and back


def load(model, *, device="auto", dtype="auto", quantize=None, compile=False, revision=None):
    """A checkpoint → (Llava, Processor).

    model: a folder, "tiny", or a Hub id, which is downloaded once. device: "auto", "cpu", "cuda", "cuda:1", "mps".
    dtype: a torch dtype, its name, or "auto": on a GPU the stored one, on a CPU the fastest there.
    quantize: None, "int8" or "int4", for the linear layers of the language model. compile: record the decode step.
    With it, and under torch.inference_mode(), a CPU's matrices are packed where that pays; then they can be neither
    trained nor saved. In a process group of torch.distributed each process holds its part of the language model.
    Raises ValueError or OSError with a complete message; no weights are read before everything is checked.
    """
    from extras import checks, hub, speed

    device, dtype = speed.choose(device, dtype, quantize, compile)  # refuses what this machine does not have
    folder = hub.find(model, revision)  # downloads all but the weights
    checks.checkpoint(folder)  # refuses what no real checkpoint has in its small files
    config = weights.read_config(folder, LlavaConfig, llama.TextConfig, vision.VisionConfig, checks.clean)
    preprocess_config = weights.read_preprocess_config(folder, vision.PreprocessConfig, config.vision_config)
    tokenizer = checks.Tokenizer(folder / "tokenizer.json", config.text_config)
    processor = Processor(tokenizer, preprocess_config, config, checks.open_image)
    with torch.device("meta"):  # names and shapes alone: no memory yet
        llava = Llava(config).eval()
    will_fit = partial(speed.check_before_download, llava, device, dtype, quantize)
    found = weights.scan(llava, hub.complete(model, folder, will_fit))  # downloads the weights
    dtype = speed.prepare(llava, found, device, dtype, quantize, compile)  # puts in what makes it faster
    weights.read(llava, found, dtype, device, hub.progress)
    return llava, processor


def save(model, processor, folder):
    """Write a checkpoint in the published layout, which load and transformers read. Raises ValueError or OSError."""
    from extras import saving

    saving.save(model, processor, folder)
