"""Tokens a second, one at a time: ours beside transformers and llama.cpp, in turns, at the widths of a published model.

    python benchmarks/decode.py
    python benchmarks/decode.py --layers 4 --rounds 7 --picture decode.png
    python benchmarks/decode.py --table benchmarks/README.md --picture decode.png     draw what was measured before

A step reads every weight of the language model once: GB/s is that number of bytes by the time of a step, and the last
column is its share of what a sum over 1 GB reads on the same machine in the same run. Each side takes about 2 GB of
memory at two layers; name fewer of them after --sides if that is too much.
"""

import statistics
from pathlib import Path

import peers

BITS = {16: ("bfloat16", "BF16", "static, compiled"), 8: ("int8", "Q8_0"), 4: ("int4", "Q4_0")}  # as sides are called
COLOURS = {"ours": "#2a6f97", "transformers": "#8a8a8a", "llama.cpp": "#c9c9c9"}
HEAD = "| side | tokens/s | of transformers bfloat16, within a round | GB/s | of the bandwidth |"


def main():
    parser = peers.parser(__doc__, [name for name in peers.SIDES if name != "ours float16"])  # memory for one side less
    parser.add_argument("--tokens", type=int, default=32, help="in each round (default: %(default)s)")
    parser.add_argument("--picture", metavar="FILE", help="draw the table, too (needs matplotlib)")
    parser.add_argument("--table", metavar="FILE", help="measure nothing: draw the table that stands in a document")
    parser.add_argument("--machine", default=peers.machine(), help="what the picture calls it (default: %(default)s)")
    options = parser.parse_args()
    if options.table:
        if not options.picture:
            parser.error("--table is there to be drawn: give --picture")
        return draw(read_table(Path(options.table).read_text(encoding="utf-8")), options)
    names = peers.installed(options.sides)
    folder = peers.checkpoint(options)
    try:
        before = peers.bandwidth()
        seconds, about = peers.rounds(names, folder.name, options.rounds, "decode", tokens=options.tokens)
        width = max(before, peers.bandwidth())
    finally:
        folder.cleanup()
    print(f"{peers.machine()}; {peers.what(options)}; a sum reads {width / 1e9:.1f} GB/s\n")
    print(f"{HEAD}\n|---|---|---|---|---|")
    rows = []
    for name in names:
        rate = [1 / value for value in seconds[name]]
        base = seconds.get(peers.BASE, seconds[name])
        ratio = [theirs / ours for theirs, ours in zip(base, seconds[name], strict=True)]
        speed = about[name]["bytes"] * statistics.median(rate)
        rows.append((name, statistics.median(rate)))
        print(f"| {name} | {peers.spread(rate, 1)} | {peers.spread(ratio)} | {speed / 1e9:.1f} | {speed / width:.0%} |")
    if options.picture:
        draw(rows, options)


def read_table(text):
    """The table that main prints, somewhere in a text → rows (side, tokens a second)."""
    if HEAD not in text:
        raise SystemExit(f"there is no table that begins with {HEAD}")
    lines = text.split(HEAD)[1].strip().splitlines()[1:]  # without the rule below the head
    end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end]]
    return [(name, float(rate.split()[0])) for name, rate, *_ in cells]


def bits(side):
    return next(number for number, parts in BITS.items() if any(part in side for part in parts))


def draw(rows, options):
    """Bars, the sides of as many bits beside one another; the numbers are kept in the file's metadata as well."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole = peers.full_size.CONFIGS.get(options.model, {}).get("text_config", {}).get("num_hidden_layers", 32)
    cut = options.model != peers.SMALL and options.layers < whole
    part = f"{options.layers} of the {whole}" if cut else "all"
    title = f"One token at a time, with {part} layers of a {options.model.upper()}"
    note = f"{options.machine}; random weights"
    if cut:
        note += ". The whole model is many times slower: compare the bars"
    places, names, rates = [], [], []
    for gap, number in enumerate(BITS):
        for name, rate in rows:
            if bits(name) == number:
                places.append(len(places) + gap)
                names.append(f"{name} ({number} bits)" if not any(char.isdigit() for char in name) else name)
                rates.append(rate)
    figure, axes = pyplot.subplots(figsize=(9, 0.36 * len(rows) + 2), layout="constrained")
    bars = axes.barh(places, rates, color=[COLOURS[name.split()[0]] for name in names])
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xlabel("tokens a second; longer is faster")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    figure.supxlabel(note, fontsize=9, color="#555555")
    numbers = "; ".join(f"{name}: {rate:.1f}" for name, rate in rows)
    figure.savefig(options.picture, dpi=110, metadata={"Title": title, "Description": f"{note}. {numbers}"})


if __name__ == "__main__":
    main()
