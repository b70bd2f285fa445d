"""How it grows, ours beside transformers: reading a longer and longer prompt, a step behind it, more and more rows.

    python benchmarks/growth.py --picture growth.png
    python benchmarks/growth.py --positions 128 4096 --rows 1 16 --rounds 1

The table has the seconds of each, their ratio to transformers' within a round, and the most memory that the process
has had so far, the weights included. Rows are read and continued at 256 positions each.
"""

import statistics

import peers

ROWS_AT = 256  # positions of each row
COLOURS = {peers.BASE: "#8a8a8a", "ours bfloat16": "#2a6f97", "ours int8": "#52a675", "ours int4": "#c98a2b"}


def main():
    parser = peers.parser(__doc__, [peers.BASE, "ours bfloat16"])
    sizes = [128, 512, 1024, 2048, 4096, 8192]
    parser.add_argument("--positions", type=int, nargs="+", default=sizes, metavar="N", help="(default: %(default)s)")
    rows = [1, 2, 4, 8, 16, 32]
    parser.add_argument("--rows", type=int, nargs="+", default=rows, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--picture", metavar="FILE", help="draw it, too (needs matplotlib)")
    options = parser.parse_args()
    names, folder = peers.installed(options.sides), peers.checkpoint(options)
    long, wide = {}, {}
    try:
        for number in options.positions:
            long[number] = peers.rounds(names, folder.name, options.rounds, "grow", positions=number)[0]
        for number in options.rows:
            wide[number] = peers.rounds(names, folder.name, options.rounds, "grow", positions=ROWS_AT, rows=number)[0]
    finally:
        folder.cleanup()
    print(f"{peers.machine()}; {peers.what(options)}\n")
    table("positions", long, names, ("prefill", "step"))
    table(f"rows of {ROWS_AT} positions", wide, names, ("prefill", "step"))
    if options.picture:
        draw(long, wide, names, options)


def table(what, results, names, keys):
    heads = [f"{key} of {name}, s" for key in keys for name in names] + [f"peak of {name}, GB" for name in names]
    print(f"| {what} | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}")
    for number, found in results.items():
        cells = [str(number)]
        for key in keys:
            for name in names:
                base = [run[key] for run in found.get(peers.BASE, found[name])]
                runs = [run[key] for run in found[name]]
                ratio = statistics.median(ours / theirs for ours, theirs in zip(runs, base, strict=True))
                cells.append(f"{statistics.median(runs):.3f}" + (f" ({ratio:.2f})" if name != peers.BASE else ""))
        cells += [f"{max(run['peak'] for run in found[name]) / 1e9:.2f}" for name in names]
        print(f"| {' | '.join(cells)} |")
    print()


def draw(long, wide, names, options):
    """Time relative to transformers': what lies below 1 is faster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained", sharey=True)
    parts = [("reading a prompt", "positions", long, "prefill"), ("a step behind it", "positions", long, "step"),
             ("a step of several rows", "rows", wide, "step")]  # fmt: skip
    for axes, (title, what, results, key) in zip(plots, parts, strict=True):
        for name in names:
            ratios = []
            for found in results.values():
                base = found.get(peers.BASE, found[name])
                pairs = zip(found[name], base, strict=True)
                ratios.append(statistics.median(ours[key] / theirs[key] for ours, theirs in pairs))
            axes.plot(list(results), ratios, "o-", color=COLOURS.get(name), label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(results), list(results))
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.set_xlabel(what)
        axes.spines[["top", "right"]].set_visible(False)
    plots[0].set_ylabel(f"time, of {peers.BASE}'s")
    plots[-1].legend(frameon=False)
    figure.suptitle(f"{peers.machine()}; {peers.what(options)}, random weights", fontsize=9)
    figure.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
