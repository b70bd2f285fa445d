"""A sheet to draw on, for the scripts of this folder: SVG that is legible on a projector, by day and in the dark."""

import base64
import html
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STYLE = """
svg { color-scheme: light dark; }
text { font-family: system-ui, "DejaVu Sans", sans-serif; font-size: 15px; fill: #1d1d1f; }
.t { font-weight: 600; } .s { font-size: 13px; fill: #55555c; } .b { font-size: 19px; font-weight: 600; }
.m { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 14px; }
.paper { fill: #ffffff; } .box { fill: #f4f4f6; stroke: #77777f; } .none { fill: none; stroke: #77777f; }
.eye { fill: #d7e7f7; stroke: #3a6ea5; } .bridge { fill: #fde3cc; stroke: #b8651b; }
.voice { fill: #dcefd8; stroke: #3f8038; } .cache { fill: #ece2f6; stroke: #7a4fa3; }
.on { fill: #b3123f; } .off { fill: #e3e3e8; } .ink { fill: #1d1d1f; } .kept { fill: #cdb6e4; }
.line { stroke: #55555c; fill: none; stroke-width: 1.6; } .dash { stroke-dasharray: 6 4; } .tip { fill: #55555c; }
.cell { stroke: #ffffff; stroke-width: 1; }
@media (prefers-color-scheme: dark) {
text { fill: #ececf0; } .s { fill: #b4b4bd; }
.paper { fill: #0d1117; } .box { fill: #20242c; stroke: #8b8b95; } .none { stroke: #8b8b95; }
.eye { fill: #16324d; stroke: #6ea8df; } .bridge { fill: #4a2c10; stroke: #e0975a; }
.voice { fill: #1a3b17; stroke: #7cc274; } .cache { fill: #33214a; stroke: #b48be0; }
.on { fill: #ff7f9f; } .off { fill: #2d323b; } .ink { fill: #ececf0; } .kept { fill: #6a4893; }
.line { stroke: #b4b4bd; } .tip { fill: #b4b4bd; } .cell { stroke: #0d1117; }
}
""".strip()


class Sheet:
    """What is drawn, in order. Places and sizes are in pixels, y goes down."""

    def __init__(self, width, height, says):
        """says: what a screen reader says of the drawing."""
        self.width, self.height, self.says, self.parts = width, height, says, []
        self.rect(0, 0, width, height, "paper")

    def add(self, part):
        self.parts.append(part)

    def rect(self, x, y, width, height, kind="box", r=0, **more):
        options = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
        self.add(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{r}" class="{kind}"{options}/>')

    def text(self, x, y, words, kind="", anchor="start"):
        self.add(f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{html.escape(str(words))}</text>')

    def box(self, x, y, width, height, kind, title, *lines, right=""):
        """A rounded box with a title, a word at its right, and lines below."""
        self.rect(x, y, width, height, kind, 8)
        self.text(x + 12, y + 22, title, "t")
        self.text(x + width - 12, y + 22, right, "s", "end")
        for i, line in enumerate(lines):
            self.text(x + 12, y + 42 + 18 * i, line, "s")

    def arrow(self, *points, dashed=False):
        way = "L".join(f"{x:g} {y:g}" for x, y in points)
        self.add(f'<path d="M{way}" class="line{" dash" if dashed else ""}" marker-end="url(#tip)"/>')

    def line(self, *points, kind="line"):
        self.add(f'<path d="M{"L".join(f"{x:g} {y:g}" for x, y in points)}" class="{kind}"/>')

    def scene(self, x, y, size, part=(0, 0, 1, 1)):
        """tiny's scene, or a part of it: left, top, width, height as fractions."""
        left, top, width, height = part
        inner = '<use href="#scene" width="1" height="1"/>'
        self.add(f'<svg x="{x:g}" y="{y:g}" width="{size:g}" height="{size * height / width:g}" '
                 f'viewBox="{left:g} {top:g} {width:g} {height:g}">{inner}</svg>')  # fmt: skip

    def written(self):
        picture = base64.b64encode((ROOT / "tiny" / "scene.png").read_bytes()).decode()
        body = "\n".join(self.parts)
        scene = ""
        if "#scene" in body:
            image = f'<image width="1" height="1" href="data:image/png;base64,{picture}"/>'
            scene = f'<symbol id="scene" viewBox="0 0 1 1">{image}</symbol>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" aria-label="{html.escape(self.says)}">\n'
            f'<style>{STYLE}</style>\n<defs>{scene}<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" '
            f'markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" class="tip"/></marker></defs>\n'
            f"{body}\n</svg>\n"
        )
