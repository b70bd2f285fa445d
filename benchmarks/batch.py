"""Several rows at once: tokens a second of all of them together, for batches of growing size.

python benchmarks/batch.py
python benchmarks/batch.py --batches 1 16 --sides "ours bfloat16" "ours int4"
"""

import statistics

import peers


def main():
    sides = [peers.BASE, "ours bfloat16", "ours int8", "ours int4"]
    parser = peers.parser(__doc__, sides)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="(default: 1 2 4 8)")
    parser.add_argument("--tokens", type=int, default=16, help="of each row, in each round (default: %(default)s)")
    options = parser.parse_args()
    names, folder = peers.installed(options.sides), peers.checkpoint(options)
    table = {name: [] for name in names}
    try:
        for batch in options.batches:
            results, _ = peers.rounds(names, folder.name, options.rounds, "decode", tokens=options.tokens, batch=batch)
            for name in names:
                table[name].append(batch / statistics.median(results[name]))
    finally:
        folder.cleanup()
    print(f"{peers.machine()}; {peers.what(options)}; tokens/s of all rows\n")
    print(f"| side | {' | '.join(f'batch {batch}' for batch in options.batches)} |")
    print(f"|{'---|' * (1 + len(options.batches))}")
    for name, rates in table.items():
        print(f"| {name} | {' | '.join(f'{rate:.1f}' for rate in rates)} |")


if __name__ == "__main__":
    main()
