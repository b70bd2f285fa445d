"""
The eye of LLaVA: from a picture to one vector for each patch of it.

    open_image → preprocess → patches → block → block → … → hidden states

This is CLIP's Vision Transformer (Radford et al. 2021, section 2.4, after Dosovitskiy et al. 2020, section 3.1).
LLaVA-1.5 uses ViT-L/14 at 336 pixels and reads it one block before its end: there every patch still describes
its own place, while the last block serves CLIP's own aim, one vector for the whole picture.
SigLIP (Zhai et al. 2023) is the same network without the class token and the first norm.

    letter   meaning                                      llava-1.5         so400m of SigLIP
    N        pictures
    H, W     height and width of a preprocessed picture   336, 336          384, 384
    P        patches, row by row from the top left        24 · 24 = 576     27 · 27 = 729
    S        positions: the class token, then patches     P + 1             P
    C        width of the tower                           1024              1152
    A, E     attention heads, width of one head           16, 64            16, 72
    F        width of the MLP                             4096              4304

The four files use the same letters for dimensions; S, A, E and F are those of the network at hand: here the tower.
Notebook: notebooks/2_the_eye.ipynb. Next file: llama.py.
"""

import contextlib
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------
# From a file to a picture in RGB


def open_image(file):
    """A file → its picture as a person would see it: a PIL image in mode RGB, upright, the first of several frames.

    file: a path, or a binary file object. The reference (transformers' load_image) also turns what it opens from a path
    as its EXIF orientation says.
    """
    with Image.open(file) as image:
        return decode(image)


def decode(image):
    """A picture that has been opened and not been read → the same."""
    image.load()
    return to_rgb(upright(image))


TURNS = {  # the orientation in a picture's EXIF tags → what brings it upright; 1: nothing
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image):
    """Turn a picture as its EXIF tags say. Pillow's exif_transpose also rewrites the other tags, and fails over an odd
    one; but whatever is wrong with the tags, the pixels are whole.
    """
    turn = None
    with contextlib.suppress(Exception):
        turn = TURNS.get(image.getexif().get(0x0112))
    return image if turn is None else image.transpose(turn)


def to_rgb(image):
    """Any PIL mode → RGB: transparent areas become white, as in the reference (convert_to_rgb, transformers 5).

    Grey of 16 bits (mode I;16, and I or F with values over 255) is divided by 257, 65535 → 255; the reference clips it.
    """
    if image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert(image.mode.upper())
    clear = image.info.get("transparency")  # the value or colour that the file declares transparent
    sixteen_bits = image.mode.startswith("I;16")
    if sixteen_bits or image.mode in ("I", "F"):
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
        if sixteen_bits or grey.max(initial=0) > 255:
            if clear is not None:
                grey[grey == clear] = 65535
            return Image.fromarray((grey / 257).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or clear is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ----------------------------------------------------------------------------------------------------------------
# From RGB to the numbers that the tower was trained on

MAX_PIXELS = 178_956_970  # of a picture once it is scaled or padded: Pillow decodes none that has more


@dataclass
class PreprocessConfig:
    """preprocessor_config.json, in its own field names; the defaults are those of LLaVA-1.5's checkpoints.

    size: {"shortest_edge": pixels}, the sides keep their ratio and crop_size is what is kept; or {"height", "width"},
    the whole picture is squashed into it, as SigLIP's are, and crop_size is the same.
    """

    size: dict = field(default_factory=lambda: {"shortest_edge": 336})
    crop_size: dict = field(default_factory=lambda: {"height": 336, "width": 336})
    resample: int = 3  # Pillow's number for bicubic
    rescale_factor: float = 0.00392156862745098  # 1/255, with the digits that the reference multiplies by
    image_mean: list = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])  # of CLIP's training pictures
    image_std: list = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    do_pad: bool = False
    image_grid_pinpoints: list | None = None  # of checkpoints that see a picture in parts: extras/anyres.py


def preprocess(image, config, pad=None):
    """One PIL image → float32 (3, H, W), bit for bit as the reference (CLIPImageProcessorPil, SiglipImageProcessorPil).

    pad: pad to a square first, as the authors' own code does (expand2square), so that nothing is cut off; None: as the
    config says, and the published ones say no: the short side becomes 336 pixels and the middle square is kept.
    Raises ValueError for a picture so long or so thin that scaling or padding would take gigabytes.
    """
    image = to_rgb(image)
    if pad or (pad is None and config.do_pad):
        image = expand_to_square(image, mean_colour(config))
    size, left, top = framing(*image.size, config)
    image = image.resize(size, config.resample)  # on bytes, each of them rounded: resizing floats gives other numbers
    image = image.crop((left, top, left + config.crop_size["width"], top + config.crop_size["height"]))

    # in float64 and back, as the reference does it: another order of rounding would differ in the last bit
    pixels = (np.asarray(image).astype(np.float64) * config.rescale_factor).astype(np.float32)  # (H, W, 3) in 0…1
    pixels = (pixels - np.float32(config.image_mean)) / np.float32(config.image_std)  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def framing(width, height, config):
    """How preprocess scales a picture, and where the part that it keeps begins: (width, height), left, top."""
    if "height" in config.size:
        return (config.size["width"], config.size["height"]), 0, 0
    short, long = sorted((width, height))
    edge = config.size["shortest_edge"]
    if not short or edge * edge * long / short > MAX_PIXELS:
        raise ValueError(f"a picture of {width} x {height} pixels is too thin: pad it to a square or crop it")
    other = int(edge * long / short)  # truncated, not rounded
    size = (edge, other) if width <= height else (other, edge)
    return size, (size[0] - config.crop_size["width"]) // 2, (size[1] - config.crop_size["height"]) // 2


def expand_to_square(image, colour):
    """Centre a picture on a square of the given colour; of an odd difference, the larger part goes below or right."""
    side = max(image.size)
    if side * side > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        raise ValueError(f"a picture of {size} pixels is too long for a square: shrink or crop it")
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def mean_colour(config):
    """The mean of the tower's training pictures as a colour: padding is 0, or nearly, once it is normalised."""
    return tuple(int(255 * m) for m in config.image_mean)


# ----------------------------------------------------------------------------------------------------------------
# The Vision Transformer


@dataclass
class VisionConfig:
    """The vision_config of config.json, in its own field names; defaults: transformers' CLIPVisionConfig.

    The published files leave out layer_norm_eps, num_channels and hidden_act: the defaults are part of the model.
    The three before model_type are not in the files: they are what makes one kind of tower another, and KINDS has them.
    """

    KINDS: ClassVar = {  # model_type → what is different from a CLIP, by SiglipVisionConfig and SiglipVisionModel
        "clip_vision_model": {},
        "siglip_vision_model": dict(
            patch_size=16, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh",
            class_token=False, first_norm=False, patch_bias=True,
        ),
    }  # fmt: skip
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    class_token: bool = True  # one position more, in front
    first_norm: bool = True  # a layer norm before the first block
    patch_bias: bool = False
    model_type: str = "clip_vision_model"


def quick_gelu(x):
    """x σ(1.702 x): the approximation of GELU that CLIP was trained with. Not exact GELU, which the projector uses."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


class Attention(nn.Module):
    """Every patch looks at every patch: softmax(q kᵀ / √E) v, in A heads side by side (CLIPAttention)."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, x):
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)) for w in (self.wq, self.wk, self.wv))  # (N, S, A, E)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (N, A, S, E)
        x = F.scaled_dot_product_attention(q, k, v)  # (N, A, S, E)
        return self.wo(x.transpose(1, 2).flatten(2))  # (N, S, C)


class MLP(nn.Module):
    """Two linear layers with an approximation of GELU between them (CLIPMLP)."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        x = self.activation(self.fc1(x))  # (N, S, F)
        return self.fc2(x)  # (N, S, C)


class Block(nn.Module):
    """Attention between the positions, then an MLP on each, both added to what is there (CLIPEncoderLayer)."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # (N, S, C)


class VisionTower(nn.Module):
    """CLIP's or SigLIP's image encoder up to its hidden states (CLIPVisionModel, SiglipVisionModel)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.grid = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size)) if config.class_token else None
        # a convolution whose stride is its width: one linear layer applied to each patch
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, config.patch_size, bias=config.patch_bias
        )
        self.position_embedding = nn.Parameter(torch.zeros(self.grid**2 + config.class_token, config.hidden_size))
        first_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.pre_norm = first_norm if config.first_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # never run: for a pooled output
        self.gradient_checkpointing = False

    def embed(self, pixel_values):
        """(N, 3, H, W), any float type → embeddings (N, S, C), what the first block takes (CLIPVisionEmbeddings)."""
        size = self.config.image_size
        if pixel_values.dim() != 4 or pixel_values.shape[1:] != (self.config.num_channels, size, size):
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}; the tower takes (pictures, 3, {size}, {size})"
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)  # (N, P, C)
        cls = [] if self.class_embedding is None else [self.class_embedding.expand(len(patches), 1, -1)]
        x = torch.cat([*cls, patches], dim=1) + self.position_embedding  # (N, S, C)
        return self.pre_norm(x)

    def forward(self, pixel_values, layers):
        """Pictures (N, 3, H, W) → hidden states of the asked layers, a list of (N, S, C), none through post_norm.

        layers: a list of numbers as in the reference's hidden_states: 0 is the embedding, i the output of block i, -1
        the last. For LLaVA's -2 all blocks but the last are run. It stays in memory: it is part of the checkpoint.
        """
        last = len(self.blocks)
        for layer in layers:
            if not -last - 1 <= layer <= last:
                raise ValueError(f"vision_feature_layer {layer} is not one of this tower's {last + 1} hidden states")
        layers = [layer % (last + 1) for layer in layers]
        x = self.embed(pixel_values)
        states = {0: x}
        for i, block in enumerate(self.blocks[: max(layers)], start=1):
            x = checkpoint(block, x, use_reentrant=False) if self.gradient_checkpointing else block(x)
            if i in layers:
                states[i] = x
        return [states[layer] for layer in layers]
