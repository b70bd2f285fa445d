"""Tiles: what LLaVA-NeXT (1.6) and LLaVA-OneVision change between a picture and its positions in the prompt.

LLaVA-1.5 sees every picture at 336 x 336 pixels. LLaVA-NeXT (Liu et al. 2024, "LLaVA-NeXT: Improved reasoning, OCR, and
world knowledge", section "Dynamic High Resolution", there called AnyRes) sees it once so, as a whole, and once more in
tiles of that size. The tower looks at each tile as at a picture of its own; behind the projector the tiles are put
together again. A picture of 480 x 640 (always height x width here), and the grids of LLaVA-NeXT:

    choose   336 x 672, 672 x 336, 672 x 672, 1008 x 336, 336 x 1008: the grid that shows most of it, 672 x 672
    cut      scaled to 504 x 672, its shape kept, between 84 black rows above and 84 below; the whole goes in front

                                   ┌──────────┬──────────┐
              ┌─────────┐          │▓▓▓▓▓▓▓▓▓▓│▓▓▓▓▓▓▓▓▓▓│  84 rows of black
              │         │          │ - - - - -│- - - - - │
              │  whole, │          │  tile 1  │  tile 2  │
              │ tile 0  │          │          │          │  504 rows of the picture
              │         │          ├──────────┼──────────┤
              └─────────┘          │  tile 3  │  tile 4  │
               336 x 336,          │          │          │
               squashed            │ - - - - -│- - - - - │
                                   │▓▓▓▓▓▓▓▓▓▓│▓▓▓▓▓▓▓▓▓▓│
                                   └──────────┴──────────┘
    encode   5 tiles through tower and projector, 24 · 24 = 576 features each
    join     tiles 1 to 4 side by side: a map of 48 rows and 48 columns
    trim     the 6 rows above and the 6 below that show black: 36 rows and 48 columns are left
    newline  a learned vector ends each row of the map, as a line break does: 36 rows of 49

    positions = 576 of the whole, then 36 · 49 of the map, row by row = 2340, where LLaVA-1.5 takes 576

LLaVA-OneVision (Li et al. 2024, section 3) keeps all of this, with 36 grids of up to 6 x 6 tiles, and adds two rules:

    shrink   a map that holds much more than 9 tiles' features is made smaller, bilinearly, to about as many
    square   of several pictures in one prompt each is a single tile, padded to a square, and ends in one newline

How many positions a picture takes follows from its size alone: the size of the original travels with the pixels, as
image_sizes.

    letter   meaning
    N, P, D  pictures, features of a tile (side · side), width of the language model
    X        tiles of a picture, the whole in front
    M        positions of a picture in the prompt
"""

import contextlib
import math
import re
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from PIL import Image

import vision

MOST_TILES = 100  # of a grid: each is a picture for the tower; the published grids have up to 36
MOST_GRIDS = 1000
MISSING = "image_sizes are missing: the (height, width) of each picture before it was cut into tiles"


@dataclass(frozen=True)
class Plan:
    """How a checkpoint cuts pictures. All sizes are (height, width)."""

    grids: tuple  # of sizes in pixels, multiples of tile; among equally good ones the first is taken
    tile: int  # pixels along a side of a tile: what the tower takes
    patch: int  # pixels along a side of a patch
    cap: int | None = None  # OneVision: from how many tiles' features on the map is shrunk; None: LLaVA-NeXT

    @property
    def side(self):
        """Features along a side of a tile: pixels that do not fill a patch are not seen (384 = 27 · 14 + 6)."""
        return self.tile // self.patch


def plan(config):
    """A LlavaConfig → its Plan, or None if it does not cut pictures. Raises ValueError for what cannot be honoured."""
    if config.image_grid_pinpoints is None:
        return None
    tile, ratio, cap = config.vision_config.image_size, config.vision_aspect_ratio, None
    if ratio is not None:
        found = re.fullmatch(r"anyres_max_([1-9][0-9]{0,3})", str(ratio))
        if not found:
            raise ValueError(f"vision_aspect_ratio is {ratio!r:.100}, and must be 'anyres_max_' and a number of tiles")
        cap = int(found[1])
    return Plan(check_grids(config.image_grid_pinpoints, tile), tile, config.vision_config.patch_size, cap)


def check_grids(pinpoints, tile):
    """image_grid_pinpoints, a list of [height, width] → a tuple of them. Raises ValueError for what is no such list."""
    name = "image_grid_pinpoints"
    if not isinstance(pinpoints, (list, tuple)) or not 1 <= len(pinpoints) <= MOST_GRIDS:
        raise ValueError(f"{name} is {pinpoints!r:.100}, and must be a list of 1 to {MOST_GRIDS} sizes")
    for size in pinpoints:
        if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(type(edge) is int for edge in size):
            raise ValueError(f"{name} holds {size!r:.100}, which is not a [height, width] in pixels")
        if min(size) < 1 or size[0] % tile or size[1] % tile or size[0] * size[1] > MOST_TILES * tile * tile:
            raise ValueError(f"{name} holds {size!r:.100}: a grid is made of 1 to {MOST_TILES} tiles of {tile} pixels")
    return tuple((height, width) for height, width in pinpoints)


# ----------------------------------------------------------------------------------------------------------------
# From a picture to its tiles


def choose(height, width, plan):
    """The grid for a picture: where most of its own pixels show, and of those the one with the least area to spare.

    → (height, width) of plan.grids, the first of equals (select_best_resolution). Raises ValueError for an empty one.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {height} x {width} pixels cannot be cut into tiles")

    def merit(grid):
        scale = min(grid[1] / width, grid[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)  # truncated; enlarging shows no more
        return shown, shown - grid[0] * grid[1]

    return max(plan.grids, key=merit)  # max keeps the first


def fit(height, width, grid):
    """The size of a picture that is scaled into a grid with its shape kept, rounded up (get_patch_output_size)."""
    down, across = grid[0] / height, grid[1] / width  # the quotient first: 400 · (336 / 300) = 448.00000000000006
    if across < down:
        return min(math.ceil(height * across), grid[0]), grid[1]
    return grid[0], min(math.ceil(width * down), grid[1])


def cut(image, plan, resample, alone=True, colour=None):
    """A PIL image in RGB → its tiles, PIL images of tile x tile pixels, the whole picture in front.

    resample: Pillow's number of a filter. alone: whether it is the only picture of its prompt; if not, OneVision sees
    one tile, the picture on a square of this colour. Raises ValueError for a picture that would take gigabytes.
    """
    tile = (plan.tile, plan.tile)
    grid = choose(image.height, image.width, plan)  # refuses an empty picture
    if not tiled(plan, alone):
        return [vision.expand_to_square(image, colour).resize(tile, resample)]
    height, width = fit(image.height, image.width, grid)
    held = max(width, plan.tile) * image.height + 8 * max(image.size)  # by Pillow: the rows, scaled; and its weights
    if held > vision.MAX_PIXELS:
        raise ValueError(f"a picture of {image.width} x {image.height} pixels is too thin: crop it")
    canvas = Image.new("RGB", (grid[1], grid[0]))  # black, before the pixels are normalised
    canvas.paste(image.resize((width, height), resample), ((grid[1] - width) // 2, (grid[0] - height) // 2))
    corners = [(x, y) for y in range(0, grid[0], plan.tile) for x in range(0, grid[1], plan.tile)]  # row by row
    return [image.resize(tile, resample), *(canvas.crop((x, y, x + tile[0], y + tile[1])) for x, y in corners)]


def tiled(plan, alone):
    """Whether a picture is cut: in LLaVA-NeXT always, in OneVision if it is alone in its prompt."""
    return alone or plan.cap is None


def preprocess(image, config, plan, alone=True):
    """One PIL image → float32 (X, 3, tile, tile), bit for bit as the reference, and its size.

    The reference: LlavaNextImageProcessorPil, LlavaOnevisionImageProcessorPil of transformers 5. config: a
    vision.PreprocessConfig. The size is (height, width). Raises ValueError as cut does.
    """
    image = vision.to_rgb(image)
    parts = cut(image, plan, config.resample, alone, vision.mean_colour(config))
    return torch.stack([vision.preprocess(part, config, pad=False) for part in parts]), (image.height, image.width)


def prepare(images, config, plan, alone=None):
    """PIL images → what the model takes: pixel_values float32 (N, most X, 3, tile, tile), image_sizes int64 (N, 2).

    alone: a bool for each picture; None: all are. Behind the tiles that a picture has stand zeros, never to be read.
    """
    alone = [True] * len(images) if alone is None else alone
    pixels, sizes = zip(*(preprocess(x, config, plan, a) for x, a in zip(images, alone, strict=True)), strict=True)
    padded = torch.nn.utils.rnn.pad_sequence(pixels, batch_first=True)
    return {"pixel_values": padded, "image_sizes": torch.tensor(sizes, dtype=torch.int64)}


# ----------------------------------------------------------------------------------------------------------------
# How many positions: from the size alone


def tiles(height, width, plan, alone=True):
    """How many tiles a picture of this size has, the whole included (image_size_to_num_patches)."""
    return 1 if not tiled(plan, alone) else 1 + math.prod(choose(height, width, plan)) // plan.tile**2


def margins(height, width, rows, columns):
    """What of the map of a padded picture is trimmed: rows at top and bottom, columns at left and right (unpad_image).

    Half of what is too much, rounded down: of an odd number, one row or column more than the picture covers stays. The
    7 digits repair 62.9999999; the sizes have to be Python's integers, for the same reason.
    """
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


def shrunk(rows, columns, plan):
    """The rows and columns of a map once OneVision has made it smaller; nearly all are left as they are."""
    ratio = 0 if plan.cap is None else math.sqrt(rows * columns / (plan.cap * plan.side**2))
    if ratio <= 1.1:
        return rows, columns
    if min(rows, columns) < ratio:
        raise ValueError(f"a map of {rows} x {columns} features is too thin to be shrunk: crop the picture")
    return int(rows // ratio), int(columns // ratio)


def map_size(height, width, plan):
    """Rows and columns of the map of a picture of this size, trimmed and shrunk, without the newlines.

    A picture a few pixels wide has a map without columns, or without rows: the whole alone shows it.
    """
    rows, columns = (edge // plan.tile * plan.side for edge in choose(height, width, plan))
    top, left = margins(height, width, rows, columns)
    return shrunk(rows - 2 * top, columns - 2 * left, plan)


def count(height, width, plan, alone=True):
    """How many positions a picture of this size takes in the prompt."""
    if not tiled(plan, alone):
        return plan.side**2 + 1
    rows, columns = map_size(height, width, plan)
    return plan.side**2 + rows * (columns + 1)


def counts(image_sizes, plan, alone=None):
    """count for each picture of image_sizes (N, 2) → a list of N. alone: a bool for each; None: all are."""
    sizes = check_sizes(image_sizes)
    return [count(*size, plan, a) for size, a in zip(sizes, alone or [True] * len(sizes), strict=True)]


def lone(input_ids, image_token, image_sizes, plan):
    """Which pictures stand alone in their prompt → a list of N bools, read off the image tokens of input_ids (B, T).

    One token for each picture: where a row holds a single one. One for each position: where a run of them is as long as
    that picture takes alone; the others take side² + 1 each. What fits neither is for the merge to refuse.
    """
    sizes = check_sizes(image_sizes)
    if plan.cap is None:
        return [True] * len(sizes)
    rows = [[token == image_token for token in row] for row in input_ids.tolist()]
    if sum(map(sum, rows)) == len(sizes):
        return [sum(row) == 1 for row in rows for _ in range(sum(row))]
    found, single = [], plan.side**2 + 1
    for run in (len(list(run)) for row in rows for is_image, run in groupby(row) if is_image):
        while run > 0 and len(found) < len(sizes):
            taken = count(*sizes[len(found)], plan)
            found.append(taken == run or run % single != 0)
            run -= taken if found[-1] else single
    return found + [True] * (len(sizes) - len(found))


def check_sizes(image_sizes):
    """image_sizes (N, 2) as a list of pairs of Python's integers. Raises ValueError if they are something else."""
    sizes = None
    with contextlib.suppress(TypeError, ValueError, RuntimeError):  # of what is no table of numbers
        sizes = torch.as_tensor(image_sizes)
    wrong = sizes is None or sizes.dim() != 2 or sizes.shape[1] != 2 or not len(sizes) or sizes.is_floating_point()
    if wrong or (sizes < 1).any():
        given = " ".join(repr(image_sizes).split())
        raise ValueError(f"image_sizes has to hold (height, width) of each picture in whole pixels, not {given:.200}")
    return sizes.tolist()


# ----------------------------------------------------------------------------------------------------------------
# From the features of the tiles to those of the picture


def features(encode, pixel_values, image_sizes, plan, newline, alone=None):
    """Tiles (N, most X, 3, tile, tile) → the pictures' features, a list of N tensors (M, D).

    encode: (tiles, 3, tile, tile) → (tiles, P, D), tower and projector; all tiles go through it at once. newline: (D,).
    alone: a bool for each picture; None: no picture is, if there is one tile of each, and otherwise all are. Raises
    ValueError for image_sizes that do not belong to these pixel_values.
    """
    if image_sizes is None:
        raise ValueError(MISSING)
    sizes = check_sizes(image_sizes)
    shape = tuple(pixel_values.shape)
    alone = [shape[1:2] != (1,)] * len(sizes) if alone is None else alone
    number = [tiles(*size, plan, a) for size, a in zip(sizes, alone, strict=True)]
    if len(shape) != 5 or shape[0] != len(sizes) or shape[1] < max(number):
        raise ValueError(f"image_sizes {sizes!r:.80} ({number!r:.80} tiles) do not belong to pixel_values of {shape}")
    for i, (own, n) in enumerate(zip(pixel_values, number, strict=True)):
        if own[n:].any():  # of sizes in another order, say
            raise ValueError(f"image_sizes {sizes[i]} give picture {i} {n} tiles, and it has more in pixel_values")
    x = encode(torch.cat([own[:n] for own, n in zip(pixel_values, number, strict=True)]))  # (all tiles, P, D)
    return [pack(own, *size, plan, newline) for own, size in zip(x.split(number), sizes, strict=True)]


def pack(x, height, width, plan, newline):
    """The features of one picture's tiles, (X, P, D) → those of the picture, (M, D) (pack_image_features).

    height, width: of the original. newline: (D,), in any dtype. Raises ValueError for features that fill no square.
    """
    if x.shape[1] != plan.side**2:
        raise ValueError(f"a tile has {x.shape[1]} features, not {plan.side} x {plan.side}: another strategy fits")
    newline = newline.to(x)
    if len(x) == 1:
        return torch.cat([x[0], newline[None]])  # (M, D)
    own = join(x[1:], choose(height, width, plan), plan)
    own = shrink(trim(own, height, width), plan)
    own = torch.cat([own, newline.expand(len(own), 1, -1)], dim=1)  # (rows, columns + 1, D)
    return torch.cat([x[0], own.flatten(0, 1)])  # (M, D)


def join(x, grid, plan):
    """Tiles (X - 1, P, D), row by row → one map, (rows, columns, D)."""
    high, wide = grid[0] // plan.tile, grid[1] // plan.tile
    x = x.unflatten(1, (plan.side, plan.side)).unflatten(0, (high, wide))  # (high, wide, side, side, D)
    return x.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (rows, columns, D)


def trim(x, height, width):
    """Cut off what shows padding alone, from a map (rows, columns, D)."""
    top, left = margins(height, width, *x.shape[:2])
    return x[top : len(x) - top, left : x.shape[1] - left]


def shrink(x, plan):
    """OneVision's cap on a map (rows, columns, D): bilinear, align_corners off, without smoothing first."""
    size = shrunk(*x.shape[:2], plan)
    if size == tuple(x.shape[:2]):
        return x
    return F.interpolate(x.permute(2, 0, 1)[None].contiguous(), size, mode="bilinear")[0].permute(1, 2, 0)


# ----------------------------------------------------------------------------------------------------------------
# The doors: llava.get_image_features, llava.feature_counts, llava.Processor.pixels


def of_model(model, encode, pixel_values, image_sizes, input_ids=None):
    """features, for a Llava. input_ids (B, T): in which the pictures stand; they tell which of them are alone."""
    own, alone = plan(model.config), None
    if input_ids is not None and image_sizes is not None:
        alone = lone(input_ids, model.config.image_token_index, image_sizes, own)
    return features(encode, pixel_values, image_sizes, own, model.image_newline, alone)


def counts_of_model(model, image_sizes, input_ids):
    """counts, for a Llava. Raises ValueError if the sizes are missing."""
    if image_sizes is None:
        raise ValueError(MISSING)
    own = plan(model.config)
    return counts(image_sizes, own, lone(input_ids, model.config.image_token_index, image_sizes, own))


def of_processor(processor, images, ids, pad=None):
    """prepare, for a Processor, whose pictures stand in ids (B, T). pad: put each on a square first."""
    if pad:
        colour = vision.mean_colour(processor.preprocess_config)
        images = [vision.expand_to_square(vision.to_rgb(image), colour) for image in images]
    numbers = (ids == processor.image_id).sum(1).tolist()  # of the pictures of each row
    alone = [number == 1 for number in numbers for _ in range(number)]
    return prepare(images, processor.preprocess_config, plan(processor.config), alone)
