"""
The eye of LLaVA: from a picture to one vector for each patch of it.

    open_image → preprocess → patches → block → block → … → hidden states

This is CLIP's Vision Transformer (Radford et al. 2021, section 2.4, after Dosovitskiy et al. 2020, section 3.1).
LLaVA-1.5 uses ViT-L/14 at 336 pixels and reads it one block before its end: there every patch still describes
its own place, while the last block serves CLIP's own aim, one vector for the whole picture.

    letter   meaning                                      llava-1.5
    N        pictures
    H, W     height and width of a preprocessed picture   336, 336
    P        patches, row by row from the top left        24 · 24 = 576
    S        positions: the class token, then patches     P + 1
    D        width of the tower                           1024
    A, E     attention heads, width of one head           16, 64
    F        width of the MLP                             4096

Notebook: notebooks/2_the_eye.ipynb. Next file: llama.py.
"""

import contextlib
import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------
# From a file to a picture in RGB

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]  # what cameras, phones and screens write
MAX_PIXELS = 89_478_485  # Pillow's own limit: beyond it a small file may be a bomb that unpacks to gigabytes
MAX_BYTES = 8 * MAX_PIXELS  # what four channels of 16 bits take: no more than that is read from a pipe, which may never end


def open_image(file):
    """Decode a picture as a person would see it.

    file: a path, or a binary file object. Returns a PIL image in mode RGB, upright, the first frame if there are several.
    The reference (transformers' load_image) also applies the EXIF orientation to what it opens from a path.
    Raises FileNotFoundError, or ValueError, with a finished sentence.
    """
    if not isinstance(file, (str, Path)) and not hasattr(file, "read"):
        raise ValueError(f"a picture is a path, a PIL image or a binary file, not a {type(file).__name__}")
    name = str(file) if isinstance(file, (str, Path)) else "standard input"
    if name.lower().startswith(("http://", "https://")):
        raise ValueError(f"{name} is an address; pictures are read from files: download it first")
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as opened:
            warnings.simplefilter("ignore")  # Pillow's own: what matters of them is said below
            stream = file if hasattr(file, "read") else opened.enter_context(open(file, "rb"))
            if not stream.seekable():
                stream = io.BytesIO(stream.read(MAX_BYTES))
            with Image.open(stream, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:  # so says the header; nothing is unpacked yet
                    raise Image.DecompressionBombError
                several = image.format != "MPO" and getattr(image, "is_animated", False)  # an MPO's others are previews
                image.load()
                image = ImageOps.exif_transpose(image)
        image = to_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such picture: {name}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has over {MAX_PIXELS:,} pixels: shrink it first") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture in a known format ({', '.join(FORMATS)})") from None
    except MemoryError:  # says nothing about the file
        raise
    except Exception:  # whatever Pillow's decoders trip over: OSError, SyntaxError, struct.error and more
        raise ValueError(f"{name} cannot be read as a picture: the file is damaged, cut short or not readable") from None
    if several:
        warnings.warn(f"{name} holds several pictures; only the first one is used", stacklevel=2)
    return image


def to_rgb(image):
    """Any PIL mode → RGB: what is transparent shows white, as in the reference (convert_to_rgb, transformers 5).

    Grey of 16 bits (mode I;16, and I or F with values over 255) is scaled, 65535 → 255; the reference cuts it off at 255,
    almost all white.
    """
    if image.mode in ("La", "RGBa"):  # whose colours are multiplied with their opacity
        image = image.convert(image.mode.upper())
    clear = image.info.get("transparency")
    if image.mode[0] in "IF":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
        if image.mode.startswith("I;16") or grey.max(initial=0) > 255:
            if clear is not None:  # of a grey picture, one value is the transparent one
                grey[grey == clear] = 65535
            return Image.fromarray((grey / 257).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or clear is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ----------------------------------------------------------------------------------------------------------------
# From RGB to the numbers that the tower was trained on


@dataclass
class PreprocessConfig:
    """preprocessor_config.json, in its own field names; the defaults are those of the three published checkpoints."""

    size: dict = field(default_factory=lambda: {"shortest_edge": 336})
    crop_size: dict = field(default_factory=lambda: {"height": 336, "width": 336})
    resample: int = 3  # Pillow's number for bicubic
    rescale_factor: float = 0.00392156862745098  # 1/255, with the digits that the reference multiplies by
    image_mean: list = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])  # of CLIP's training pictures
    image_std: list = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    do_pad: bool = False


def preprocess(image, config, pad=None):
    """One PIL image → float32 (3, H, W), bit for bit as the reference (CLIPImageProcessorPil, transformers 5).

    pad: pad to a square first, as the authors' own code does (expand2square), so that nothing is cut off; None: as the
    config says, and the published ones say no: the short side becomes 336 pixels and the middle square is kept.
    """
    image = to_rgb(image)
    if config.do_pad if pad is None else pad:
        image = expand_to_square(image, tuple(int(255 * m) for m in config.image_mean))
    size, left, top = framing(*image.size, config)
    image = image.resize(size, config.resample)  # on bytes, each of them rounded: resizing floats gives other numbers
    image = image.crop((left, top, left + config.crop_size["width"], top + config.crop_size["height"]))

    pixels = (np.asarray(image).astype(np.float64) * config.rescale_factor).astype(np.float32)  # (H, W, 3) in 0…1
    pixels = (pixels - np.float32(config.image_mean)) / np.float32(config.image_std)  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def framing(width, height, config):
    """How preprocess scales a picture, and where the part that it keeps begins: (width, height), left, top."""
    short, long = sorted((width, height))
    edge = config.size["shortest_edge"]
    if not short or edge * edge * long / short > 2 * MAX_PIXELS:
        raise ValueError(f"a picture of {width} x {height} pixels is too thin: pad it to a square or crop it")
    other = int(edge * long / short)  # truncated, not rounded
    size = (edge, other) if width <= height else (other, edge)
    return size, (size[0] - config.crop_size["width"]) // 2, (size[1] - config.crop_size["height"]) // 2


def patch_boxes(width, height, grid, config, pad=None):
    """The way back: where each patch of a picture of this size lies on it, in its own pixels: (P, 4) left, top, right, bottom.

    grid: how many patches stand along a side. What lies outside of the picture is the margin that padding added.
    """
    margin = (0, 0)
    if config.do_pad if pad is None else pad:  # as in expand_to_square
        side = max(width, height)
        margin = ((side - width) // 2, (side - height) // 2)
        width = height = side
    size, left, top = framing(width, height, config)
    rows, columns = np.divmod(np.arange(grid**2), grid)
    corners = np.stack([columns, rows, columns + 1, rows + 1], axis=1) / grid  # (P, 4), as fractions of the part that is kept
    corners = corners * np.tile([config.crop_size["width"], config.crop_size["height"]], 2) + np.tile([left, top], 2)
    return corners * np.tile([width / size[0], height / size[1]], 2) - np.tile(margin, 2)


def expand_to_square(image, colour):
    """Centre a picture on a square of the given colour; of an odd difference, the larger part goes below or right."""
    side = max(image.size)
    if side * side > 2 * MAX_PIXELS:
        raise ValueError(f"a picture of {image.width} x {image.height} pixels is too long for a square: shrink or crop it")
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


# ----------------------------------------------------------------------------------------------------------------
# The Vision Transformer


@dataclass
class VisionConfig:
    """The vision_config of config.json, in its own field names; defaults: transformers' CLIPVisionConfig.

    The published files leave out layer_norm_eps, num_channels and hidden_act: the defaults are part of the model.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"


def quick_gelu(x):
    """x σ(1.702 x): the approximation of GELU that CLIP was trained with. Not exact GELU, which the projector uses."""
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Every patch looks at every patch: softmax(q kᵀ / √E) v, in A heads side by side (CLIPAttention)."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, x):
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))  # (N, A, S, E)
        x = F.scaled_dot_product_attention(q, k, v)  # (N, A, S, E)
        return self.wo(x.transpose(1, 2).flatten(2))  # (N, S, D)


class MLP(nn.Module):
    """Two linear layers with quick_gelu between them (CLIPMLP)."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        x = quick_gelu(self.fc1(x))  # (N, S, F)
        return self.fc2(x)  # (N, S, D)


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
        return x + self.mlp(self.norm2(x))  # (N, S, D)


class VisionTower(nn.Module):
    """CLIP's image encoder up to its hidden states (CLIPVisionModel)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.grid = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        # a convolution whose stride is its width: one linear layer applied to each patch
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, config.patch_size, bias=False
        )
        self.position_embedding = nn.Parameter(torch.empty(self.grid**2 + 1, config.hidden_size))
        self.pre_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # never run: CLIP's pooled output needs it
        self.gradient_checkpointing = False

    def embed(self, pixel_values):
        """(N, 3, H, W), any float type → the patches' embeddings (N, S, D), before the first block (CLIPVisionEmbeddings)."""
        size = self.config.image_size
        if pixel_values.dim() != 4 or pixel_values.shape[1:] != (self.config.num_channels, size, size):
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}; the tower takes (pictures, 3, {size}, {size})"
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)  # (N, P, D)
        cls = self.class_embedding.expand(len(patches), 1, -1)  # (N, 1, D)
        x = torch.cat([cls, patches], dim=1) + self.position_embedding  # (N, S, D)
        return self.pre_norm(x)

    def forward(self, pixel_values, layers):
        """Hidden states of the asked layers, a list of (N, S, D), none of them through post_norm.

        layers: numbers as in the reference's hidden_states: 0 is the embedding, i the output of block i, -1 the last.
        For LLaVA's -2 all blocks but the last are run. The last one stays in memory, unused, as it is part of the checkpoint.
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

    @torch.no_grad()
    def init_weights(self):
        """Random weights for training from scratch, drawn as CLIPPreTrainedModel does: normal, biases 0, norms the identity."""
        width, depth = self.config.hidden_size, (2 * self.config.num_hidden_layers) ** -0.5
        normal = nn.init.normal_
        normal(self.class_embedding, std=width**-0.5)
        normal(self.patch_embedding.weight, std=0.02)
        normal(self.position_embedding, std=0.02)
        for block in self.blocks:
            for w in (block.attention.wq, block.attention.wk, block.attention.wv, block.mlp.fc2):
                normal(w.weight, std=width**-0.5 * depth)
            normal(block.attention.wo.weight, std=width**-0.5)
            normal(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
