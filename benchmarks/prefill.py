"""Reading a prompt: one picture and 40 words, from pixels to the logits of the next token, ours beside transformers.

python benchmarks/prefill.py
python benchmarks/prefill.py --layers 4 --words 400
"""

import peers


def main():
    sides = [name for name in peers.SIDES if not name.startswith("llama.cpp") and "compiled" not in name]
    parser = peers.parser(__doc__, sides)
    parser.add_argument("--words", type=int, default=40, help="beside the picture (default: %(default)s)")
    options = parser.parse_args()
    folder = peers.checkpoint(options)
    try:
        print(f"{peers.machine()}; {peers.what(options)} and the whole tower\n")
        peers.compare(peers.installed(options.sides), folder.name, options.rounds, "prefill", words=options.words)
    finally:
        folder.cleanup()


if __name__ == "__main__":
    main()
