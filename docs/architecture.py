"""Draws docs/architecture.svg: how a picture becomes words, with the shapes of tiny and of the 7B.

    python docs/architecture.py

The shapes are not written here: those of tiny are heard while it runs, those of the 7B come from a model on the meta
device, which has the published sizes and no numbers.
"""

import argparse
import html
import itertools
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import llama  # noqa: E402
import llava  # noqa: E402
import vision  # noqa: E402
from extras import lens  # noqa: E402

WORDS = 12  # of a prompt beside the picture, for the shapes


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
    for unit, digits, word in ((1e9, 2, "billion"), (1e6, 1, "million")):
        if n > unit:
            return f"{n / unit:.{digits}f} {word}"
    return f"{n / 1e3:.0f} thousand"


def drawing():
    models = tiny(), seven()
    small, large = (shapes(model) for model in models)
    counts = list(zip(*(parts(model) for model in models), strict=True))
    blocks = [(len(m.vision.blocks) - 1, len(m.vision.blocks), len(m.llama.blocks)) for m in models]
    boxes = [  # key, x, y, colour, title, what it does
        ("picture", 30, 60, "eye", "preprocess", "scale, crop, normalise"),
        ("embed", 30, 150, "eye", "patches + class token", "one linear layer, plus positions"),
        ("tower", 30, 240, "eye", "ViT blocks", "{0} of {1} run · 7B: {3} of {4}".format(*blocks[0], *blocks[1])),
        ("select", 30, 330, "eye", "no class token", "one vector for each patch"),
        ("projector", 30, 420, "bridge", "projector", "W₂ · GELU(W₁ · x)"),
        ("text", 400, 420, "voice", "tokenizer, embed", f"the prompt, here {WORDS} tokens"),
        ("merge", 215, 520, "bridge", "merge", "patches where <image> stood"),
        ("llama", 215, 610, "voice", "Llama blocks, norm", f"{blocks[0][2]} · 7B: {blocks[1][2]}"),
        ("logits", 215, 700, "voice", "head, sample", "the last position → the next token"),
    ]
    width, height, names = 340, 58, {"eye": "vision.py", "bridge": "llava.py", "voice": "llama.py"}
    out = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 770 800" role="img" aria-label="A picture goes through '
        "vision tower and projector, a prompt through the embedding; "
        'merged, both go through Llama to the next token.">',
        "<style>text{font:13px system-ui,sans-serif;fill:#222}.t{font-weight:600}.s{font-size:11px;fill:#444}"
        ".eye{fill:#dbe9f6}.bridge{fill:#fbe3d2}.voice{fill:#e0efdc}rect{stroke:#777}"
        "path{stroke:#555;fill:none;marker-end:url(#a)}</style>",
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" style="fill:#555;stroke:none"/></marker></defs>',
        '<rect x="0" y="0" width="770" height="800" style="fill:#fff;stroke:none"/>',
        '<text x="30" y="30" class="t">LLaVA-1.5: how a picture becomes words</text>'
        '<text x="30" y="47" class="s">shapes: tiny, then the 7B; colours: which file</text>',
    ]
    cached = f"{small['cache']} · {large['cache']}".replace("(1, ", "(")
    at = {}
    for key, x, y, colour, title, what in boxes:
        at[key] = x + width / 2, y, y + height
        sizes = f"{small[key]} · {large[key]}".replace("(1, ", "(")
        out.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" class="{colour}"/>'
            f'<text x="{x + 10}" y="{y + 18}" class="t">{html.escape(title)}</text>'
            f'<text x="{x + width - 10}" y="{y + 18}" class="s" text-anchor="end">{names[colour]}</text>'
            f'<text x="{x + 10}" y="{y + 34}" class="s">{html.escape(what)}</text>'
            f'<text x="{x + 10}" y="{y + 50}" class="s">{sizes}</text>'
        )
    road = ("picture", "embed", "tower", "select", "projector", "merge", "llama", "logits")
    for a, b in [*itertools.pairwise(road), ("text", "merge")]:
        out.append(f'<path d="M{at[a][0]:g} {at[a][2]}L{at[b][0] + (at[a][0] - at[b][0]) / 4:g} {at[b][1]}"/>')
    out += [  # what happens for each further token
        '<path d="M555 729H640V639H557" stroke-dasharray="4 3"/>',
        '<text x="650" y="676" class="s">its embedding,</text><text x="650" y="690" class="s">one at a time</text>',
        '<rect x="12" y="610" width="170" height="58" rx="6" class="voice"/>',
        '<text x="22" y="628" class="t">KV cache</text>',
        '<text x="22" y="644" class="s">keys and values, each block</text>',
        f'<text x="22" y="660" class="s">{cached}</text>',
        '<path d="M213 632H184"/><path d="M182 646H213"/>',
    ]
    for i, (name, colour) in enumerate((("eye", "eye"), ("bridge", "bridge"), ("voice", "voice"))):
        y = 90 + 60 * i
        out.append(
            f'<rect x="420" y="{y}" width="16" height="16" class="{colour}"/>'
            f'<text x="446" y="{y + 13}" class="t">the {name}, {names[colour]}</text>'
            f'<text x="446" y="{y + 30}" class="s">{counts[i][0]} parameters · 7B: {counts[i][1]}</text>'
        )
    return "\n".join([*out, "</svg>\n"])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    (ROOT / "docs" / "architecture.svg").write_text(drawing(), encoding="utf-8")
