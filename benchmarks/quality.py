"""What fewer bits cost: the answers that tiny loses, and how far the logits of a random model of 7B width move.

    python benchmarks/quality.py
    python benchmarks/quality.py --questions 300 --layers 4

KL is the mean over positions of KL(float32 ‖ scheme) between the distributions of the next token, in nats; top-1 the
share of positions at which the likeliest token is the same.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import peers
import torch

import llava

sys.path[:0] = [str(peers.HERE.parent / "tiny")]
import evaluate  # noqa: E402

SCHEMES = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "int4": {"dtype": "bfloat16", "quantize": "int4"},
}


def answers(settings, table):
    """tiny's answers to all questions of a table, and how many are right."""
    model, processor = llava.load("tiny", device="cpu", **settings)
    said = [words for items in table.values() for words in evaluate.answers(model, processor, items)]
    return said, sum(words == answer for words, answer in zip(said, truth(table), strict=True))


def truth(table):
    return [answer for items in table.values() for *_, answer in items]


def tiny(number):
    table = evaluate.collect("one question", number, held_out=False)
    rows = {name: answers(settings, table) for name, settings in SCHEMES.items()}
    base, right = rows["float32"]
    print(f"tiny, {len(base)} questions about fresh scenes\n")
    print("| scheme | right | right in float32 and now wrong | other words |")
    print("|---|---|---|---|")
    for name, (said, hits) in rows.items():
        lost = sum(a == t != b for a, b, t in zip(base, said, truth(table), strict=True))
        other = sum(a != b for a, b in zip(base, said, strict=True))
        print(f"| {name} | {hits} ({hits / len(base):.2%}) | {lost} ({lost / right:.2%}) | {other} |", flush=True)


def wide(layers):
    """A random model of the published widths. Its logits are nearly flat: the numbers only compare schemes."""
    with tempfile.TemporaryDirectory() as folder:
        peers.full_size.write(Path(folder), "7b", layers)
        torch.manual_seed(0)
        ids = torch.randint(3, 32000, (1, 256))
        print(f"\na random model of 7B width, {layers} layers, 256 positions\n\n| scheme | KL | top-1 |\n|---|---|---|")
        exact = None
        for name, settings in SCHEMES.items():
            model, _ = llava.load(folder, device="cpu", **settings)
            with torch.no_grad():
                found = model(ids).logits[0].double().log_softmax(-1)
            exact = found if exact is None else exact
            kl = (exact.exp() * (exact - found)).sum(-1).mean()
            same = (exact.argmax(-1) == found.argmax(-1)).double().mean()
            print(f"| {name} | {kl:.2e} | {same:.1%} |", flush=True)
            del model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300, help="of each kind (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="of the wide model (default: %(default)s)")
    options = parser.parse_args()
    tiny(options.questions)
    wide(options.layers)


if __name__ == "__main__":
    main()
