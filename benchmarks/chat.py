"""A second question about the same picture: seconds to the first token of the first and of the second one.

    python benchmarks/chat.py
    python benchmarks/chat.py --layers 4

The first reads the picture, 576 positions, and 20 words; the second its own 20 words behind what the cache holds.
"""

import peers


def main():
    parser = peers.parser(__doc__, ["ours bfloat16", "ours int8", "ours int4"])
    options = parser.parse_args()
    folder = peers.checkpoint(options)
    try:
        results, _ = peers.rounds(options.sides, folder.name, options.rounds, "turns")
    finally:
        folder.cleanup()
    print(f"{peers.machine()}; {peers.what(options)} and the whole tower\n")
    print("| side | first question, s | second question, s | second / first, within a round |\n|---|---|---|---|")
    for name, pairs in results.items():
        first, second = zip(*pairs, strict=True)
        ratio = [b / a for a, b in pairs]
        print(f"| {name} | {peers.spread(first, 3)} | {peers.spread(second, 3)} | {peers.spread(ratio, 3)} |")


if __name__ == "__main__":
    main()
