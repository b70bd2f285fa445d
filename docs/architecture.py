"""Draws docs/architecture.svg: how a picture becomes words, with the shapes of tiny and of the 7B.

    python docs/architecture.py

The shapes are not written here: those of tiny are heard while it runs, those of the 7B come from a model on the meta
device, which has the published sizes and no numbers.
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
import vision  # noqa: E402
from extras import lens  # noqa: E402

WORDS = 12  # of a prompt beside the picture, for the shapes
QUESTION = "Describe the image."


def tiny():
    return llava.load("tiny", device="cpu")[0]


def seven():
    """LLaVA-1.5-7B in shape alone: ViT-L/14 at 336 pixels and Vicuna 7B, whose sizes are the defaults of TextConfig."""
    tower = vision.VisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                                image_size=336, patch_size=14)  # fmt: skip
    with torch.device("meta"):
        return llava.Llava(llava.LlavaConfig(tower, llama.TextConfig(vocab_size=32064), image_token_index=32000)).half()


def shapes(model):
    """The shape behind each box, as text."""
    config, found = model.config, {}
    size = config.vision_config.image_size
    with torch.no_grad(), lens.hear(model, lambda name, x: found.setdefault(name, tuple(x.shape))):
        pixels = torch.zeros(1, 3, size, size, dtype=model.dtype, device=model.device)
        x = model.vision(pixels, [config.vision_feature_layer])[0]
        features = model.projector(x[:, 1:])
        words = torch.zeros(1, WORDS, config.text_config.hidden_size, dtype=model.dtype, device=model.device)
        model.llama.head(model.llama(torch.cat([words, features], 1))[0][:, -1:])
    last = config.vision_feature_layer % (config.vision_config.num_hidden_layers + 1)
    cache = model.init_kv_cache(1, found["merge"][1])
    return {
        "picture": (1, 3, size, size),
        "embed": found["vision.0"],
        "tower": found[f"vision.{last}"],
        "select": tuple(x[:, 1:].shape),
        "projector": found["projector"],
        "text": tuple(words.shape),
        "merge": found["merge"],
        "llama": found[f"llama.{len(model.llama.blocks)}"],
        "logits": found["logits"],
        "cache": tuple(cache["keys.0"].shape),
    }


def parts(model):
    """Parameters of the three parts, in words."""
    counts = (sum(p.numel() for p in part.parameters()) for part in (model.vision, model.projector, model.llama))
    return [readable(count) for count in counts]


def readable(n):
    for unit, digits, word in ((1e9, 2, "billion"), (1e6, 2, "million")):
        if n > 0.1 * unit:
            return f"{n / unit:.{digits}f} {word}"
    return f"{n / 1e3:.0f} thousand"


def inside(sheet, x, kind, title, norm, attention, mlp):
    """What a block consists of: twice a norm, a part, and a sum with what went in."""
    sheet.text(x, 74, title, "t")
    sheet.rect(x, 84, 236, 250, "none", 8)
    for i, (part, lines) in enumerate((("attention", attention), ("MLP", mlp))):
        y = 96 + 118 * i
        sheet.rect(x + 44, y, 150, 24, kind, 5)
        sheet.text(x + 119, y + 17, norm, "s", "middle")
        sheet.rect(x + 14, y + 34, 208, 46, kind, 5)
        sheet.text(x + 118, y + 52, part, "t", "middle")
        sheet.text(x + 118, y + 70, lines, "s", "middle")
        sheet.text(x + 118, y + 100, "+ what went in", "s", "middle")


def ends():
    """The two ends of the road: the prompt, and what tiny answers."""
    model, processor = llava.load("tiny", device="cpu")
    inputs = processor.chat([("user", QUESTION)], [str(ROOT / "tiny" / "scene.png")])
    answer = processor.decode(model.generate(**inputs, max_new_tokens=64)[0])
    return processor.prompt(QUESTION).replace("\n", "⏎ "), answer


def drawing():
    models = tiny(), seven()
    small, large = (shapes(model) for model in models)
    counts = list(zip(*(parts(model) for model in models), strict=True))
    blocks = [(len(m.vision.blocks) - 1, len(m.vision.blocks), len(m.llama.blocks)) for m in models]
    sizes = {key: f"{small[key]} · {large[key]}".replace("(1, ", "(") for key in small}
    prompt, answer = ends()
    says = "A picture goes through vision tower and projector, a prompt through the embedding; merged, both go through "
    sheet = Sheet(1000, 950, says + "Llama to the next token, which goes into Llama again.")
    sheet.text(20, 34, "LLaVA-1.5: how a picture becomes words", "b")
    sheet.text(980, 34, "shapes: tiny · 7B", "s", "end")
    sheet.scene(20, 56, 100)
    sheet.box(150, 62, 270, 80, "eye", "preprocess", "scale, crop, normalise", sizes["picture"])
    tower = "{} of {} run · 7B: {} of {}".format(*blocks[0][:2], *blocks[1][:2])
    column = (("patches, class token", "one linear layer, plus positions", "embed"), ("ViT blocks", tower, "tower"),
              ("leave the class token out", "one vector for each patch is left", "select"),
              ("projector", "W₂ · GELU(W₁ · x)", "projector"))  # fmt: skip
    for i, (title, what, key) in enumerate(column):
        kind = "bridge" if key == "projector" else "eye"
        sheet.box(20, 170 + 94 * i, 400, 74, kind, title, what, sizes[key])
        sheet.arrow((220, 150 + 94 * i - 8 * (i == 0)), (220, 168 + 94 * i))
    sheet.arrow((122, 102), (148, 102))
    inside(sheet, 480, "eye", "inside a ViT block", "LayerNorm", "every patch sees every patch", "quick GELU")
    inside(sheet, 744, "voice", "inside a Llama block", "RMSNorm", "RoPE, mask, shared K and V", "SwiGLU")
    sheet.text(480, 372, "the prompt", "s")
    sheet.rect(480, 380, 500, 34, "none", 6)
    sheet.text(492, 402, prompt, "m")
    sheet.arrow((730, 414), (730, 450))
    words = f"a prompt of {WORDS} tokens beside the picture"
    sheet.box(480, 452, 500, 74, "voice", "tokenizer, embed", words, sizes["text"])
    sheet.box(200, 566, 520, 64, "bridge", "merge: patches where <image> stood", sizes["merge"])
    sheet.arrow((220, 526), (300, 564))
    sheet.arrow((730, 526), (640, 564))
    sheet.arrow((460, 630), (460, 656))
    layers = f"{blocks[0][2]} · 7B: {blocks[1][2]}"
    sheet.box(200, 658, 520, 64, "voice", "Llama blocks, norm", f"{layers} blocks, {sizes['llama']}")
    sheet.arrow((460, 722), (460, 748))
    sheet.box(200, 750, 520, 64, "voice", "head, sample", f"the last position → the next token, {sizes['logits']}")
    sheet.box(770, 640, 210, 92, "cache", "KV cache", "keys and values, each block", sizes["cache"].split(" · ")[0],
              sizes["cache"].split(" · ")[1])  # fmt: skip
    sheet.arrow((722, 678), (768, 678))
    sheet.arrow((768, 702), (722, 702))
    sheet.arrow((200, 782), (100, 782), (100, 690), (198, 690), dashed=True)
    for i, words in enumerate(("once more, for each", "new token: its embed-", "ding, one position")):
        sheet.text(20, 804 + 18 * i, words, "s")
    sheet.arrow((460, 814), (460, 844))
    sheet.rect(200, 846, 780, 34, "none", 6)
    sheet.text(212, 868, answer if len(answer) < 86 else answer[:84].rsplit(" ", 1)[0] + " …", "m")
    files = (
        ("vision tower", "eye", "vision.py"),
        ("projector and merge", "bridge", "llava.py"),
        ("language model", "voice", "llama.py"),
    )
    for i, (name, kind, file) in enumerate(files):
        x = 20 + 325 * i
        sheet.rect(x, 902, 18, 18, kind, 3)
        sheet.text(x + 28, 916, f"{name}, {file}", "t")
        sheet.text(x + 28, 936, f"{counts[i][0]} parameters · 7B: {counts[i][1]}", "s")
    return sheet.written()


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    (ROOT / "docs" / "architecture.svg").write_text(drawing(), encoding="utf-8")
