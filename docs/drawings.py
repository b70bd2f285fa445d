"""Draws docs/drawings/*.svg, one idea each: patches, merge, attention with its mask, RoPE, KV cache, stages.

    python docs/drawings.py

What they show is computed by the modules: the patches' vectors, the prompt's ids, mask, weights and angles.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from sheet import Sheet  # noqa: E402

import llama  # noqa: E402
import llava  # noqa: E402
from extras import explain, lens  # noqa: E402

SCENE = ROOT / "tiny" / "scene.png"
PICKED = (3, 10, 14, 15, 26, 27, 43)  # patches with something on them


def heat(sheet, x, y, values, size, kind="on", height=None):
    """A table of numbers from 0 to 1 as squares, the stronger the darker."""
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            at = x + j * size, y + i * (height or size)
            sheet.rect(*at, size, height or size, "off cell")
            if value > 0.004:
                sheet.rect(*at, size, height or size, f"{kind} cell", fill_opacity=f"{value:.2f}")


def patches(model, stages):
    """A picture becomes a sequence."""
    grid, size = model.vision.grid, model.config.vision_config.patch_size
    sheet = Sheet(1000, 430, f"A picture is cut into {grid} by {grid} patches, each becomes a row of numbers.")
    sheet.text(20, 34, "A picture becomes a sequence", "b")
    sheet.scene(20, 60, 280)
    for i in range(grid + 1):
        sheet.line((20 + i * 280 / grid, 60), (20 + i * 280 / grid, 340))
        sheet.line((20, 60 + i * 280 / grid), (300, 60 + i * 280 / grid))
    sheet.text(20, 366, f"{grid} × {grid} patches of {size} × {size} pixels")
    sheet.text(20, 388, f"{3 * size * size} numbers each (three colours)", "s")
    sheet.arrow((315, 200), (360, 200))
    step, small = 38, 32
    for i in range(7):
        row, column = divmod(PICKED[i], grid)
        sheet.scene(380, 62 + i * step, small, (column / grid, row / grid, 1 / grid, 1 / grid))
        sheet.text(424, 84 + i * step, f"patch {row * grid + column}", "s")
    sheet.text(380, 366, "in a row, row by row")
    sheet.text(380, 388, "(seven of them)", "s")
    sheet.arrow((505, 200), (560, 200))
    sheet.text(532, 190, "W ·", "t", "middle")
    sheet.text(532, 222, "+ place", "s", "middle")
    vectors = stages["vision.0"][0]
    chosen = vectors[[0, *(1 + i for i in PICKED)]]
    shown = chosen[:, :: vectors.shape[1] // 32][:, :32]
    shown = (shown - shown.amin()) / (shown.amax() - shown.amin())
    heat(sheet, 580, 34, shown[:1], 12, height=22)
    sheet.text(580, 26, "class token, in front", "s")
    for i in range(7):
        heat(sheet, 580, 68 + i * step, shown[i + 1 : i + 2], 12, height=22)
    sheet.text(580, 366, f"{vectors.shape[0]} vectors of {vectors.shape[1]} numbers: what the blocks take")
    sheet.text(580, 388, "the 7B: 24 × 24 patches of 14 × 14, and 1024 numbers each", "s")
    below = "W is one linear layer, the same for every patch; the place is added, or it were a bag of patches."
    sheet.text(20, 416, below, "s")
    return sheet


def merge(processor, ids):
    """What takes the place of <image>."""
    names = [explain.written(processor, i).strip(" ").replace("<0x0A>", "⏎").replace("\n", "⏎") or "␣" for i in ids]
    where = names.index("<image>")
    sheet = Sheet(1000, 330, "The image token in the prompt is replaced by forty-nine vectors, one for each patch.")
    sheet.text(20, 34, "The picture takes the place of <image>", "b")

    def chip(x, y, name, kind):
        width = max(26, 9 * len(name) + 14)
        sheet.rect(x, y, width, 30, kind, 5)
        sheet.text(x + width / 2, y + 20, name, "m", "middle")
        return width + 5

    sheet.text(20, 70, f"the prompt: {len(names)} ids", "s")
    x, left = 20, 0
    for i, name in enumerate(names):
        left = x if i == where else left
        x += chip(x, 80, name, "bridge" if i == where else "voice")
    right = left + 9 * len("<image>") + 14
    sheet.text(20, 226, f"what it gets: {len(names) + 48} vectors", "s")
    x, begin = 20, 0
    for i, name in enumerate(names):
        if i == where:
            begin = x
            for k in (0, 1, 2, 3, 4, 45, 46, 47, 48):
                row, column = divmod(k, 7)
                if k == 45:
                    sheet.text(x + 10, 258, "…", "t", "middle")
                    x += 24
                sheet.rect(x - 1, 237, 32, 32, "bridge", 3)
                sheet.scene(x + 1, 239, 28, (column / 7, row / 7, 1 / 7, 1 / 7))
                x += 34
            end = x - 4
            x += 6
        else:
            x += chip(x, 238, name, "voice")
    sheet.line((left, 112), (begin, 234), kind="line dash")
    sheet.line((right, 112), (end, 234), kind="line dash")
    sheet.text(end + 14, 180, "49 patches, from vision tower and projector", "s")
    below = "By position, and nothing else is done to them. From here on it is a row that the language model continues."
    sheet.text(20, 304, below, "s")
    return sheet


def attention():
    """Who sees whom, and how much."""
    words = ["USER:", "▣", "▣", "▣", "What", "?"]
    T, E = len(words), 8
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, T, E, generator=generator)
    scores = q @ k.T / E**0.5
    mask = llama.visible(torch.ones(1, T, dtype=torch.bool), torch.arange(T))[0, 0]
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    sheet = Sheet(1000, 400, "Attention: scores, a mask that hides what is later, softmax, a weighted mean.")
    sheet.text(20, 34, "Attention, with its mask", "b")
    size, top = 34, 110
    panels = (
        (90, "scores", "q kᵀ / √E", (scores - scores.min()) / (scores.max() - scores.min())),
        (350, "mask", "key ≤ query", mask.float()),
        (610, "weights", "softmax of what is left", weights),
    )
    for x, title, formula, values in panels:
        heat(sheet, x, top, values, size, "kept" if title == "mask" else "on")
        sheet.text(x, top - 34, title, "t")
        sheet.text(x, top - 14, formula, "s")
        for i in range(T):
            sheet.text(x + (i + 0.5) * size, top + T * size + 20, words[i][:4], "s", "middle")
    for i, word in enumerate(words):
        sheet.text(80, top + i * size + 23, word, "", "end")
    sheet.text(20, top + T * size + 20, "key →", "s")
    sheet.text(20, 92, "query ↓", "s")
    for x in (300, 560):
        sheet.arrow((x, top + 100), (x + 38, top + 100))
    sheet.arrow((820, top + 100), (858, top + 100))
    sheet.text(870, top + 78, "· values", "t")
    sheet.text(870, top + 102, "each row of", "s")
    sheet.text(870, top + 120, "weights sums to 1:", "s")
    sheet.text(870, top + 138, "a weighted mean", "s")
    sheet.text(870, top + 156, "of the values", "s")
    below = "A word sees the picture (▣) and the words before it. Nothing earlier changes when something is appended."
    sheet.text(20, 372, below, "s")
    return sheet


def rope():
    """A position is a turn."""
    E, positions = 8, 9
    turns = 100.0 ** (-torch.arange(0, E, 2) / E)  # theta^(-2i/E), theta = 100
    cos, sin = (part.reshape(-1, E) for part in llama.rope_angles(torch.arange(positions)[None], turns))
    sheet = Sheet(1000, 400, "RoPE: each pair of dimensions turns with the position, the last slowly.")
    sheet.text(20, 34, "RoPE: a position is a turn", "b")
    for i in range(E // 2):
        y = 92 + 62 * i
        sheet.text(20, y + 5, f"dimensions {i} and {i + E // 2}", "")
        for m in range(positions):
            x = 230 + 84 * m
            sheet.add(f'<circle cx="{x}" cy="{y}" r="25" class="none"/>')
            end = x + 23 * float(cos[m, i]), y - 23 * float(sin[m, i])
            sheet.add(f'<path d="M{x} {y}L{end[0]:.1f} {end[1]:.1f}" class="line" style="stroke-width:3"/>')
            if i == 0:
                sheet.text(x, 58, f"m = {m}", "s", "middle")
    below = (
        "Pair i turns by m · θ^(−2i/E): the first pair fast, the last so slowly that far places still differ.",
        "Queries and keys are both turned; their product knows only the difference of the two turns: the distance.",
        "“Half-split”: dimension i goes with i + E/2, as the published weights want it. (Here E = 8 and θ = 100.)",
    )
    for i, line in enumerate(below):
        sheet.text(20, 340 + 22 * i, line, "s")
    return sheet


def cache(T=6, n=5):
    """What each step computes."""
    sheet = Sheet(1000, 400, "Without a cache each step computes every position; with it only the new one.")
    sheet.text(20, 34, "The KV cache: what each step computes", "b")
    size = 34
    for x, title, cached in ((150, "without a cache", False), (590, "with a cache", True)):
        sheet.text(x, 72, title, "t")
        total = 0
        for step in range(n):
            y = 88 + step * (size + 8)
            if x == 150:
                sheet.text(130, y + 22, "the prompt" if step == 0 else f"word {step + 1}", "s", "end")
            for i in range(T + step):
                new = not cached or step == 0 or i == T + step - 1
                total += new
                sheet.rect(x + i * size, y, size - 4, size - 4, "on" if new else "kept", 4)
        sheet.text(x, 88 + n * (size + 8) + 22, f"{total} positions computed")
    sheet.rect(20, 346, 18, 18, "on", 3)
    sheet.text(46, 360, "goes through all blocks", "s")
    sheet.rect(230, 346, 18, 18, "kept", 3)
    read = "its keys and values come from the cache: 2 · blocks · key-value heads · width of a head for each position"
    sheet.text(256, 360, read, "s")
    below = "It works because of the mask: what is earlier never sees what comes later, and so never changes."
    sheet.text(20, 386, below, "s")
    return sheet


def stages():
    """What is trained when."""
    sheet = Sheet(1000, 400, "Stage one trains the projector alone; stage two trains projector and language model.")
    sheet.text(20, 34, "Two stages of training", "b")
    texts = (
        ("Stage 1: line them up", "pictures and their captions", "the bridge learns where the voice has its words"),
        ("Stage 2: learn to answer", "questions, answers, conversations about pictures", "bridge and voice together"),
    )
    for i, (title, data, what) in enumerate(texts):
        y = 62 + 162 * i
        sheet.text(20, y + 14, title, "t")
        sheet.text(240, y + 14, data, "s")
        parts = (
            (20, 300, "eye", "vision tower", False),
            (370, 190, "bridge", "projector", True),
            (610, 370, "voice", "language model", i == 1),
        )
        for x, width, kind, name, learns in parts:
            does = "learns" if learns else "frozen: its numbers stay"
            sheet.box(x, y + 26, width, 74, kind, name, does, right="●" if learns else "○")
        sheet.arrow((322, y + 63), (366, y + 63))
        sheet.arrow((562, y + 63), (606, y + 63))
        sheet.text(20, y + 122, what, "s")
        start = 720 if i == 0 else 900
        sheet.arrow((start, y + 112), (470, y + 112), dashed=True)
        where = "goes through the frozen voice, and stops at the projector" if i == 0 else "stops at the projector"
        sheet.text(480, y + 132, f"the gradient {where}", "s")
    sheet.text(20, 390, "Liu et al. 2023, Visual Instruction Tuning, section 4.2", "s")
    return sheet


def drawings():
    """name → the drawing as text."""
    model, processor = llava.load("tiny", device="cpu")
    inputs = processor.chat([("user", "Describe the image.")], [str(SCENE)])
    found = lens.trace(model, **inputs)
    sheets = {
        "patches": patches(model, found),
        "merge": merge(processor, inputs["input_ids"][0].tolist()),
        "attention": attention(),
        "rope": rope(),
        "cache": cache(),
        "stages": stages(),
    }
    return {name: sheet.written() for name, sheet in sheets.items()}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, text in drawings().items():
        (ROOT / "docs" / "drawings" / f"{name}.svg").write_text(text, encoding="utf-8")
