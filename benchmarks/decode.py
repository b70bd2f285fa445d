"""Tokens a second, one at a time: ours beside transformers and llama.cpp, in turns, at the widths of a published model.

    python benchmarks/decode.py
    python benchmarks/decode.py --layers 4 --rounds 7 --picture decode.png

A step reads every weight of the language model once: GB/s is that number of bytes by the time of a step, and the last
column is its share of what a sum over 1 GB reads on the same machine in the same run. Each side takes about 2 GB of
memory at two layers; name fewer of them after --sides if that is too much.
"""

import statistics

import peers


def main():
    parser = peers.parser(__doc__, [name for name in peers.SIDES if name != "ours float16"])  # memory for one side less
    parser.add_argument("--tokens", type=int, default=32, help="in each round (default: %(default)s)")
    parser.add_argument("--picture", metavar="FILE", help="draw the table, too (needs matplotlib)")
    options = parser.parse_args()
    names = peers.installed(options.sides)
    folder = peers.checkpoint(options)
    try:
        before = peers.bandwidth()
        seconds, about = peers.rounds(names, folder.name, options.rounds, "decode", tokens=options.tokens)
        width = max(before, peers.bandwidth())
    finally:
        folder.cleanup()
    print(f"{peers.machine()}; {options.model}, {options.layers} layers; a sum reads {width / 1e9:.1f} GB/s\n")
    print("| side | tokens/s | of transformers bfloat16, within a round | GB/s | of the bandwidth |")
    print("|---|---|---|---|---|")
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


def draw(rows, options):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(rows) + 1), layout="constrained")
    names, rates = zip(*reversed(rows), strict=True)
    bars = axes.barh(names, rates, color=["#2a6f97" if name.startswith("ours") else "#b8b8b8" for name in names])
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xlabel(
        f"tokens a second, {options.model} widths, {options.layers} layers, {peers.os.cpu_count()} CPU cores"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
