"""Behind --trace and --explain of llava.py: what happened inside while it answered, as a table on stderr and as a page.

    python llava.py --model tiny --image tiny/scene.png --trace
    python llava.py --model tiny --image tiny/scene.png --explain page.html

The answer is computed as ever, and hooks only note shapes and times on the way. Afterwards the KV cache is taken back
to where the question begins, and question and answer are read once more in one chunk, this time with the attention
weights written down. So no picture is encoded twice, and no more is held than the weights of those few words.

    letter   meaning
    N, P     pictures, patches of a picture
    Q        patches of all pictures, one after the other
    R        the words that are read again: the question's, then the answer's
    L, A     blocks of the decoder, heads of a block
"""

import base64
import html
import io
import json
import os
import re
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from extras import lens

TEMPLATE = Path(__file__).with_name("explain.html")
LEVELS = 15  # of light that a patch can have on the page, above none
ROOM = 4_000_000  # patches that the page's fine views may hold in all, before they are compressed; as many the coarse
COARSE = 8  # cells along a side of a picture, at most, where there is no room for all patches
WIDEST = 800  # pixels of a picture on the page
ALTERNATIVES = 5


def check(options):
    """Refuse what cannot be shown, before anything is loaded."""
    if options.chat or options.each or options.choices or options.num_beams > 1:
        raise ValueError(
            "--trace and --explain look into a single answer: leave out --chat, --each, --choices and --num-beams"
        )
    if options.compile or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "--trace and --explain listen to each module of one process: leave out --compile, and torchrun"
        )
    if options.explain is not None:
        page = Path(options.explain)
        if page.is_dir() or not page.parent.is_dir():
            raise ValueError(f"{page} cannot be written: give the name of a file in a folder that is there")


def watch(model, processor, options, images, conversation, pieces):
    """Yield the pieces of an answer as they come. When it is complete, print the trace and write the page, as asked."""
    record = Record(model)
    with record:
        yield from pieces
    if options.trace:
        print(table(record), NOTE, sep="\n", file=sys.stderr)
    if options.explain is not None:
        said = conversation.ids[: len(record.steps)]
        Path(options.explain).write_text(page(model, processor, options, images, record, said), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------
# Noting


@dataclass
class Stage:
    """One line of the table."""

    name: str
    shape: tuple
    dtype: str
    ms: float | None
    bytes: int


class Record:
    """Notes, while it is open, what a model computes: the stages of the first pass, each step's time and logits."""

    def __init__(self, model):
        self.model, self.stages, self.steps, self.logits, self.ids, self.kv_cache = model, [], [], [], None, None
        self.heard = lens.hear(model, self.note)

    def __enter__(self):
        self.heard.__enter__()
        self.hooks = [
            self.model.register_forward_pre_hook(self.first, with_kwargs=True),
            self.model.llama.register_forward_pre_hook(self.before),
            self.model.llama.head.register_forward_hook(self.after),
        ]
        self.last = time.perf_counter()
        return self

    def __exit__(self, *error):
        self.heard.__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def lap(self):
        """Milliseconds since it was asked last."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        last, self.last = self.last, time.perf_counter()
        return 1000 * (self.last - last)

    def note(self, name, tensor):
        if not self.steps and name[-1] not in "qkv":
            self.stages.append(Stage(name, tuple(tensor.shape), written_dtype(tensor), self.lap(), tensor.nbytes))

    def first(self, model, args, kwargs):
        """The pass over the prompt."""
        self.ids, self.kv_cache = args[0], kwargs["kv_cache"]  # Llava.prefill has expanded them
        self.sizes = kwargs["image_sizes"]
        self.note("ids", self.ids)
        if args[1] is not None:
            self.note("pixels", args[1])

    def before(self, module, args):
        self.lap()
        self.began = self.last

    def after(self, module, args, logits):
        self.lap()
        self.steps.append(1000 * (self.last - self.began))
        self.logits.append(logits[0, -1].float().cpu())


def written_dtype(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def lines(record):
    """The table's cells: the stages of the first pass, the later steps on average, the cache that they went on from."""
    stages, steps = list(record.stages), record.steps[1:]
    if steps:
        last = stages[-1]  # the logits, of one position here as there
        stages.append(Stage(f"each of {len(steps)} steps", last.shape, last.dtype, sum(steps) / len(steps), last.bytes))
    keys = record.kv_cache["keys.0"]
    shape = (len(record.model.llama.blocks), 2, *keys.shape)
    size = sum(tensor.nbytes for tensor in record.kv_cache.values())
    stages.append(Stage("kv_cache", shape, written_dtype(keys), None, size))
    for stage in stages:
        ms = "" if stage.ms is None else f"{stage.ms:.1f}"
        yield stage.name, f"({', '.join(map(str, stage.shape))})", stage.dtype, ms, f"{stage.bytes:,}"


NOTE = "(ids: all that comes before the tower, the picture's preprocessing too; kv_cache: its mask and its length too)"


def table(record):
    """The trace as text."""
    rows = [("stage", "shape", "dtype", "ms", "bytes"), *lines(record)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{'<' if i < 3 else '>'}{width}}}" for i, width in enumerate(widths))
    ways = [f"{question}: {name} ({why})" for question, (name, why) in getattr(record.model, "ways", {}).items()]
    return "\n".join([*(form.format(*row) for row in rows), *ways])


# ----------------------------------------------------------------------------------------------------------------
# Where each word looked


@torch.no_grad()
def attention_on_pictures(model, ids, kv_cache, said, onto=None):
    """Read question and answer again → attention on the pictures' patches (L, A, R, Q), and how many of R are the
    question's. onto: what lens.onto_patches says of pictures whose positions are not their patches.

    The last of the question's words chooses the answer's first one, and so on: word i of the answer was chosen at row
    question - 1 + i.
    """
    columns = (ids[0] == model.config.image_token_index).nonzero()[:, 0]
    if onto is None:
        columns = lens.image_positions(model, ids).flatten()
    first = int(columns[-1]) + 1
    kv_cache["length"].fill_(first)
    words = torch.cat([ids[0, first:], torch.tensor(said[:-1], dtype=ids.dtype, device=ids.device)])
    out = model(inputs_embeds=model.llama.embed(words[None]), kv_cache=kv_cache, output_attentions=True)
    weights = torch.stack([layer[0, :, :, columns].float().cpu() for layer in out.attentions])  # (L, A, R, Q)
    return weights if onto is None else weights @ onto, ids.shape[1] - first


def views(weights, question, cells):
    """What the page can show: yields (layer or None, head or None, sinks left in?, coarse?, view, shares).

    view: how much each of the answer's W words looked where, (W, Q), or (W, cells) if it is coarse. shares: how much of
    a word's attention went to pictures at all, in this view, (W,); the sinks are counted there.

    All of it averaged; the same with its sinks; each layer averaged; then every head. As many heads of each layer as
    there is room for, those first that look at the pictures most, are shown patch by patch, the others in cells.
    """
    L, _, R, Q = weights.shape
    answer = slice(question - 1, R)

    def view(layer, head, part, sinks=False, coarse=False):
        shown = part if sinks else lens.without_sinks(part)
        shown = pooled(shown[answer], cells) if coarse else shown[answer]
        return layer, head, sinks, coarse, shown, part[answer].sum(-1)

    yield view(None, None, weights.mean((0, 1)))
    yield view(None, None, weights.mean((0, 1)), sinks=True)
    for layer in range(L):
        yield view(layer, None, weights[layer].mean(0))
    room = ROOM // ((R - question + 1) * Q * L) - 1
    for layer in range(L):
        fine = weights[layer].sum((1, 2)).argsort(descending=True)[: max(1, room)].tolist()
        for head, part in enumerate(weights[layer]):
            yield view(layer, head, part, coarse=head not in fine)


def pooled(view, cells):
    """Patch by patch (W, Q) → the mean of each cell (W, cells). cells: the cell of each patch (Q,)."""
    sums = view.new_zeros(len(view), int(cells.max()) + 1).index_add_(1, cells, view)
    return sums / cells.bincount()


def cells_of(pictures, views):
    """The cell of each patch (Q,): neighbours of a picture together, few enough for `views` views to have room."""
    finest = max(-(-side // COARSE) for picture in pictures for side in (picture["rows"], picture["columns"]))
    for size in range(finest, finest + 1000):
        found, count = [], 0
        for picture in pictures:
            wide = -(-picture["columns"] // size)
            for i in range(len(picture["patches"])):
                row, column = divmod(i, picture["columns"])
                found.append(count + row // size * wide + column // size)
            count += -(-picture["rows"] // size) * wide
        if count * views <= ROOM or count == len(pictures):
            return torch.tensor(found)


def levels(view):
    """A view as bytes, 0 … LEVELS, by the square root, so that a little attention is seen, too."""
    return (LEVELS * (view / view.max().clamp(min=1e-12)).sqrt()).round().to(torch.uint8).numpy().tobytes()


# ----------------------------------------------------------------------------------------------------------------
# The page


def page(model, processor, options, images, record, said):
    """The page as a string, with everything in it: nothing is fetched."""
    data = {"words": words(processor, record, said), "pictures": [], "views": [], "maps": ""}
    if images:
        grid, onto = lens.onto_patches(model, record.ids, record.sizes, images)
        weights, question = attention_on_pictures(model, record.ids, record.kv_cache, said, onto)
        pictures = [picture(image, model, processor, options, grid) for image in images]
        for one, tiles in zip(pictures, lens.tile_edges(model, record.ids, record.sizes, images), strict=True):
            one["tiles"] = tiles
        data |= looks(weights, question, pictures)
    data["opens"] = opening(data["words"], data.pop("peaks", None))
    title = "Where it looked" if images else "How it answered"
    return filled(data, title, options.model, options.prompt, processor.decode(said), lines(record))


def looks(weights, question, pictures):
    """What the page's script draws the pictures from.

    weights (L, A, R, Q), question: from attention_on_pictures. pictures: one for each set of patches, in the order of
    the columns of weights; several may lie on one image, as the tiles of a picture do. Each is a dict: `src`, `width`,
    `height` (of the image, in pixels), `patches` (a list of left, top, right, bottom in the image's pixels, row by
    row), `rows`, `columns` (how they stand), `name` (of the set, may be empty), `tiles` (of lens.tile_edges, or none).
    """
    cells = cells_of(pictures, weights.shape[0] * weights.shape[1] * (weights.shape[2] - question + 1))
    shown = list(views(weights, question, cells))
    shares = torch.stack([shares for *_, shares in shown])
    return {
        "pictures": pictures,
        "levels": LEVELS,
        "cells": cells.tolist(),
        "heads": weights.shape[1],
        "views": [[layer, head, sinks, coarse] for layer, head, sinks, coarse, *_ in shown],
        "maps": encoded(zlib.compress(b"".join(levels(view) for *_, view, _ in shown), 9)),
        "shares": encoded(zlib.compress((1000 * shares).round().numpy().astype("<u2").tobytes(), 9)),
        "peaks": shown[0][4].amax(-1),
    }


def opening(words, peaks):
    """The token that the page opens at: whose light is the most concentrated; without a picture the least certain."""
    scores = [-word["p"] for word in words] if peaks is None else peaks.tolist()
    names = [i for i, word in enumerate(words) if not word["end"] and any(map(str.isalnum, word["text"]))]
    return max(names or range(len(words)), key=lambda i: scores[i])


def filled(data, title, model, question, answer, rows):
    """The template with its marks replaced."""
    marks = {"title": title, "model": model, "question": question, "answer": answer}
    marks = {mark: html.escape(text) for mark, text in marks.items()} | {
        "stages": "\n".join(f"<tr><th scope=row>{'<td>'.join(map(html.escape, row))}" for row in rows),
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    # in one pass: what is put in is not looked at again, whatever a question or an answer holds
    return re.sub(r"%%(\w+)%%", lambda found: marks[found[1]], TEMPLATE.read_text(encoding="utf-8"))


def words(processor, record, said):
    """For each token of the answer its text, its probability and the likeliest others, as the model itself had them:
    before temperature, top-k and top-p.
    """
    found, shown = [], 0
    for i, (token, logits) in enumerate(zip(said, record.logits, strict=True)):
        probabilities = logits.softmax(-1)
        others = [int(other) for other in probabilities.topk(ALTERNATIVES + 1).indices if other != token][:ALTERNATIVES]
        text, piece = processor.decode(said[: i + 1]), ""
        if not text.endswith("\ufffd"):  # as in turn.as_text: an incomplete character is held back
            piece, shown = text[shown:].replace("\ufffd", ""), len(text)
        found.append({
            "text": piece or written(processor, token),
            "end": token in record.model.config.eos_token_ids,
            "p": float(f"{probabilities[token]:.3g}"),
            "others": [[written(processor, other), float(f"{probabilities[other]:.3g}")] for other in others],
        })  # fmt: skip
    return found


def written(processor, token):
    """A token by itself, as it stands in the vocabulary, a space for the sign that stands for one."""
    return (processor.as_text([token]) or f"id {token}").replace("▁", " ")


def picture(image, model, processor, options, grid):
    """A picture for the page, as `looks` wants it: small enough, and the rectangle of it that each patch covers."""
    small = image.copy()
    small.thumbnail((WIDEST, WIDEST))
    plain = io.BytesIO(), io.BytesIO()
    small.save(plain[0], "PNG", optimize=True)
    small.save(plain[1], "JPEG", quality=80)
    kind, file = min(zip(("png", "jpeg"), plain, strict=True), key=lambda pair: len(pair[1].getvalue()))
    if model.image_newline is None:
        boxes = lens.patch_boxes(*image.size, grid, processor.preprocess_config, options.pad)
    else:  # lens.onto_patches has laid what all its tiles got over the whole picture
        lines = np.stack([np.arange(grid), np.arange(1, grid + 1)], axis=1) / grid
        boxes = lens.rectangles(lines * image.height, lines * image.width)
    return {
        "name": "",
        "src": f"data:image/{kind};base64,{encoded(file.getvalue())}",
        "width": image.width,
        "height": image.height,
        "rows": grid,
        "columns": grid,
        "patches": boxes.round(2).tolist(),
    }


def encoded(data):
    return base64.b64encode(data).decode()
