"""Looking inside a LLaVA from outside: what passes through it, heard by hooks, and what can be read from that.

    stages = trace(model, **processor.chat([("user", "What is there?")], [image]))  # {"vision.0": tensor, ...}

The modules know nothing of this. Stages are named as in tests/parity.py, and a test compares the two:

    ids, pixels            what goes in, the image token once for each patch
    vision.0 … vision.i    the tower's embedding, then the output of each block that is run
    projector, merge       the picture as words; the whole prompt as embeddings
    llama.1 … llama.i      the output of each block of the decoder, the last one after the final norm
    attention.1 …          who looked at whom in that block
    logits
    vision.i.q, llama.i.q  and k, v: what a block's queries, keys and values are before heads and rotation

    letter   meaning
    N, P     pictures, patches of each
    M, Q     positions of a picture in tiles, patches of all pictures on the page of explain.py
    B, T, S  rows of the batch, positions that look, positions that are looked at
    D, V     width of the language model, size of the vocabulary
"""

import contextlib

import numpy as np
import torch

import vision
from extras import anyres

# ----------------------------------------------------------------------------------------------------------------
# Hearing


@contextlib.contextmanager
def hear(model, note):
    """Within it, note(name, tensor) is called as soon as a stage is computed."""
    hooks = []

    def after(module, name, part=None):
        def hook(module, args, output):
            output = output if part is None else output[part]
            if output is not None:
                note(name, output)

        hooks.append(module.register_forward_hook(hook))

    def before(module, args):
        note("merge", args[0])

    after(model.vision.pre_norm, "vision.0")
    for i, block in enumerate(model.vision.blocks, start=1):
        for letter in "qkv":
            after(getattr(block.attention, f"w{letter}"), f"vision.{i}.{letter}")
        after(block, f"vision.{i}")
    after(model.projector, "projector")
    hooks.append(model.llama.register_forward_pre_hook(before))
    last = len(model.llama.blocks)
    for i, block in enumerate(model.llama.blocks, start=1):
        for letter in "qkv":
            after(getattr(block.attention, f"w{letter}"), f"llama.{i}.{letter}")
        after(block.attention, f"attention.{i}", part=1)
        if i < last:
            after(block, f"llama.{i}", part=0)
    after(model.llama.norm, f"llama.{last}")
    after(model.llama.head, "logits")
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def trace(model, **inputs):
    """One forward pass → {stage: tensor}, in the order in which they were computed. inputs: those of Llava.forward."""
    found = {}
    if inputs.get("input_ids") is not None:
        names = ("input_ids", "pixel_values", "attention_mask", "kv_cache", "image_sizes")
        found["ids"] = model.prompt_ids(**{name: inputs.get(name) for name in names})[0]
    if inputs.get("pixel_values") is not None:
        found["pixels"] = inputs["pixel_values"]
    with hear(model, found.__setitem__):
        model(**{"output_attentions": True, **inputs})
    return found


@contextlib.contextmanager
def patched(module, change):
    """Within it, what the module puts out is what `change` makes of it: activation patching."""
    hook = module.register_forward_hook(lambda module, args, output: change(output))
    try:
        yield
    finally:
        hook.remove()


# ----------------------------------------------------------------------------------------------------------------
# Reading


def image_positions(model, ids):
    """Where the patches of each picture stand in one row of expanded ids (1, T) → (N, P). A class token is left out.

    Not of a picture in tiles: there each has a number of its own, and tile_boxes says what each position shows.
    """
    (count,) = model.feature_counts(range(1))
    extra = max(0, count - model.vision.grid**2)
    return (ids[0] == model.config.image_token_index).nonzero()[:, 0].view(-1, count)[:, extra:]


def patch_boxes(width, height, grid, config, pad=None):
    """The inverse of vision.preprocess: the rectangle of the original picture that each patch covers, in its pixels.

    → (P, 4) left, top, right, bottom. grid: how many patches stand along a side. config, pad: those of preprocess. What
    lies outside of the picture is the margin that padding added.
    """
    margin = (0, 0)
    if pad or (pad is None and config.do_pad):  # as in vision.expand_to_square
        side = max(width, height)
        margin = ((side - width) // 2, (side - height) // 2)
        width = height = side
    size, left, top = vision.framing(width, height, config)
    rows, columns = np.divmod(np.arange(grid**2), grid)
    corners = np.stack([columns, rows, columns + 1, rows + 1], axis=1) / grid  # (P, 4), fractions of what is kept
    corners = corners * np.tile([config.crop_size["width"], config.crop_size["height"]], 2) + np.tile([left, top], 2)
    return corners * np.tile([width / size[0], height / size[1]], 2) - np.tile(margin, 2)


def tile_boxes(height, width, plan, alone=True):
    """The same for a picture in tiles: the rectangle of the original picture that each of its positions shows.

    → (M, 4) left, top, right, bottom, in the order of the prompt: the whole picture, then the map, nan for newlines.
    What lies outside of the picture is padding. A position of a shrunk map stands for its share of the map.
    plan, alone: those of anyres.cut.
    """
    if not anyres.tiled(plan, alone):
        side = max(height, width)
        down, across = (spans(plan, plan.side) * side / plan.tile - (side - edge) // 2 for edge in (height, width))
        return np.concatenate([rectangles(down, across), np.full((1, 4), np.nan)])
    whole = rectangles(*(spans(plan, plan.side) * edge / plan.tile for edge in (height, width)))
    size, grid = (height, width), anyres.choose(height, width, plan)
    cells = [edge // plan.tile * plan.side for edge in grid]
    cut, kept = anyres.margins(height, width, *cells), anyres.map_size(height, width, plan)
    scaled = anyres.fit(height, width, grid)
    axes = (spans(plan, cells[i] - 2 * cut[i], kept[i], cut[i]) - (grid[i] - scaled[i]) // 2 for i in (0, 1))
    own = rectangles(*(x * size[i] / scaled[i] for i, x in enumerate(axes))).reshape(*kept, 4)
    own = np.concatenate([own, np.full((len(own), 1, 4), np.nan)], axis=1)
    return np.concatenate([whole, own.reshape(-1, 4)])


def spans(plan, number, parts=None, first=0):
    """Where features begin and end along one axis of the grid, in its pixels: (parts, 2).

    number features from the given first one on, divided into so many equal parts; None: one part each. Between two
    tiles lie the pixels that fill no patch.
    """
    parts = number if parts is None else parts
    ends = first + np.arange(parts + 1) * number / max(parts, 1)
    begin, end = ends[:-1], ends[1:]
    last = np.ceil(end) - 1  # the feature in which a part ends
    begin = begin // plan.side * plan.tile + begin % plan.side * plan.patch
    return np.stack([begin, last // plan.side * plan.tile + (last % plan.side + end - last) * plan.patch], axis=1)


def rectangles(down, across):
    """Spans (rows, 2) and (columns, 2) → rectangles (rows · columns, 4), row by row."""
    rows, columns = np.divmod(np.arange(len(down) * len(across)), max(len(across), 1))
    return np.stack([across[columns, 0], down[rows, 0], across[columns, 1], down[rows, 1]], axis=1)


def photo_boxes(width, height, grid):
    """The rectangles of a grid over a photo, row by row: (grid², 4) left, top, right, bottom, in its pixels."""
    ends = np.arange(grid + 1) / grid
    down, across = (np.stack([ends[:-1], ends[1:]], axis=1) * edge for edge in (height, width))
    return rectangles(down, across)


def onto_grid(boxes, width, height, grid):
    """Which part of each box (M, 4) lies in each cell of a grid over a picture → (M, grid²), fractions of the box.

    boxes: from tile_boxes; of a newline, which shows nothing, all are 0.
    """
    lines = np.arange(grid + 1) / grid

    def along(low, high, size):
        begin, end = np.maximum(low, lines[:-1] * size), np.minimum(high, lines[1:] * size)
        return np.nan_to_num((end - begin).clip(0) / (high - low))

    left, top, right, bottom = boxes.T[:, :, None]
    parts = along(top, bottom, height)[:, :, None] * along(left, right, width)[:, None]
    return torch.from_numpy(parts.reshape(len(boxes), -1)).float()


def onto_patches(model, ids, sizes, images):
    """How many patches the page of explain.py has along a side of a picture, and a matrix from the positions of all
    pictures to those patches, (positions, Q); None where each position is a patch.

    A picture in tiles is seen twice, as a whole and in parts: a patch has what both of them got, by area.
    """
    grid, parts = model.vision.grid, []
    if model.image_newline is None:
        (count,) = model.feature_counts(range(1))
        missing = grid**2 - count  # the first patch, where "default" leaves it out of a tower without a class token
        each = torch.eye(grid**2, dtype=torch.float32)[missing:]
        return grid, torch.block_diag(*[each] * len(images)) if missing > 0 else None
    grid, plan = 2 * grid, anyres.plan(model.config)
    alone = anyres.lone(ids, model.config.image_token_index, sizes, plan)
    for image, (height, width), single in zip(images, sizes.tolist(), alone, strict=True):
        margin = (width - image.width) // 2, (height - image.height) // 2  # what --pad put around it
        boxes = tile_boxes(height, width, plan, single) - np.tile(margin, 2)
        parts.append(onto_grid(boxes, image.width, image.height, grid))
    return grid, torch.block_diag(*parts)


def without_sinks(weights):
    """Attention of words on patches (…, words, P) → how much more each word looks there than the words do on average.

    Some patches draw the attention of every word, whatever is on them (Xiao et al. 2023 call such positions sinks;
    Darcet et al. 2023 find them in vision towers). What all words share says nothing about one of them: their mean is
    taken away, and what falls below it counts as 0.
    """
    return (weights - weights.mean(-2, keepdim=True)).clamp(min=0)


def rollout(attentions):
    """Attention through all layers, (B, heads, T, S) each with T = S → (B, T, S): the product of all (A + I) / 2.

    Abnar and Zuidema 2020, section 3: A is the mean over the heads, I stands for what a block adds its output to.
    """
    flow = torch.eye(attentions[0].shape[-1], dtype=attentions[0].dtype, device=attentions[0].device)
    for weights in attentions:
        flow = (weights.mean(1) + torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)) / 2 @ flow
    return flow


def logit_lens(model, state):
    """What a hidden state (…, D) would say if the decoder ended here: its logits (…, V) (nostalgebraist 2020)."""
    return model.llama.head(model.llama.norm(state))


@torch.no_grad()
def occlusion(model, answer, input_ids, pixel_values, reach=0, fill=None):
    """What each place is worth to an answer (a list of ids): the fall of its log-probability when it is covered → (P,).

    reach: how many patches around each one are covered with it. fill: what is painted there, as a pixel value; None:
    the picture's median colour, which is as good as background. (Zeiler and Fergus 2014, section 4.2.)
    """
    if pixel_values.dim() != 4:
        raise ValueError("a picture in tiles shows each place more than once: occlusion_on_photo covers all of them")
    grid, size = model.vision.grid, model.config.vision_config.patch_size
    if fill is None:
        fill = pixel_values[0].flatten(1).median(1).values[:, None, None]
    whole = model.score([answer], input_ids, pixel_values)[0]
    falls = []
    for patch in range(grid**2):
        rows, columns = (slice(max(0, i - reach) * size, (i + reach + 1) * size) for i in divmod(patch, grid))
        covered = pixel_values.clone()
        covered[0, :, rows, columns] = fill
        falls.append(whole - model.score([answer], input_ids, covered)[0])
    return torch.stack(falls)


@torch.no_grad()
def occlusion_on_photo(model, processor, answer, input_ids, images, which=0, grid=None, reach=0, fill=None, pad=None):
    """The same for every checkpoint, on the photo itself → (grid²,), one for each cell of a grid over it, row by row.

    A place that a picture in tiles shows is in the whole and in a tile, or in several: so it is covered on the photo,
    and this is cut and scaled anew. images: PIL images, as the prompt has them; the one with the number `which` is
    covered. grid: cells along a side, None: as many as a tile has patches; photo_boxes says where they are. fill: a
    colour, None: the photo's median. pad: as in Processor.
    """
    photo, grid = vision.to_rgb(images[which]), model.vision.grid if grid is None else grid
    if fill is None:
        fill = tuple(int(level) for level in np.median(np.asarray(photo), axis=(0, 1)))
    x, y = (np.rint(np.arange(grid + 1) * edge / grid).astype(int).tolist() for edge in photo.size)

    def worth(own):
        shown = [*images[:which], own, *images[which + 1 :]]
        return model.score([answer], input_ids, **processor.pixels(shown, input_ids, pad))[0]

    whole, falls = worth(photo), []
    for row, column in np.ndindex(grid, grid):
        covered, up, left = photo.copy(), max(0, row - reach), max(0, column - reach)
        down, right = min(grid, row + reach + 1), min(grid, column + reach + 1)
        covered.paste(fill, (x[left], y[up], x[right], y[down]))
        falls.append(whole - worth(covered))
    return torch.stack(falls)


# ----------------------------------------------------------------------------------------------------------------
# Showing


def heat(ax, image, values, boxes, title="", limit=None):
    """Lay one value for each patch (P,) over the picture: above 0 magenta, below it cyan, and 0 leaves it as it is.

    boxes: from patch_boxes or photo_boxes. limit: the value that has full colour; without one, the largest there is,
    however small.
    """
    values = torch.as_tensor(values).float().cpu()
    grid = round(len(values) ** 0.5)
    limit = limit or max(values.abs().max().item(), 1e-9)
    strength = (values / limit).clamp(-1, 1).view(grid, grid)
    veil = torch.zeros(grid, grid, 4)  # red, green, blue, and how much of it
    veil[..., 0], veil[..., 1], veil[..., 2], veil[..., 3] = strength > 0, strength < 0, 1, 0.75 * strength.abs()
    (left, top), (right, bottom) = boxes[0][:2], boxes[-1][2:]
    ax.imshow(image)
    ax.imshow(veil.numpy(), extent=(left, right, bottom, top), interpolation="nearest")
    ax.set(xlim=(0, image.width), ylim=(image.height, 0), xticks=[], yticks=[])
    ax.set_title(title, fontsize=9)


def tile_edges(model, ids, sizes, images):
    """Where the tiles of each picture meet, in its own pixels → [{tiles: their number, down: [y …], across: [x …]}, …],
    None for a picture that was not cut. The arguments are those of onto_patches.
    """
    if model.image_newline is None:
        return [None] * len(images)
    plan, found = anyres.plan(model.config), []
    alone = anyres.lone(ids, model.config.image_token_index, sizes, plan)
    for image, size, single in zip(images, sizes.tolist(), alone, strict=True):
        grid = anyres.choose(*size, plan)
        scaled, edges = anyres.fit(*size, grid), []
        for i, inside in enumerate((image.height, image.width)):
            lines = np.arange(plan.tile, grid[i], plan.tile) - (grid[i] - scaled[i]) // 2  # on the scaled picture
            lines = lines * size[i] / scaled[i] - (size[i] - inside) // 2
            edges.append([round(float(x), 2) for x in lines if 0 < x < inside])
        number = anyres.tiles(*size, plan) - 1
        tiled = anyres.tiled(plan, single)
        found.append({"tiles": number, "down": edges[0], "across": edges[1]} if tiled else None)
    return found
