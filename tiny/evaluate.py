"""Asks tiny questions and prints how many it answers exactly, by kind and situation: the tables of tiny/README.md.

    python tiny/evaluate.py                                    # the shipped checkpoint
    python tiny/evaluate.py --model tiny/new --questions 20    # another one, quickly

It reads the checkpoint, prints, and writes nothing. The answers before the one that is asked for are the right ones.
"""

import argparse
import random
import sys
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from extras.cli import AUTHORS_SYSTEM  # noqa: E402
from llava import load  # noqa: E402

import scenes  # noqa: E402

BATCH = 50

# ----------------------------------------------------------------------------------------------------------------
# Situations: functions of a seed → [(kind, turns, pictures, answer), ...]; the last turn is the question


def one_question(seed, held_out):
    image, questions = scenes.draw(seed, held_out)
    return [(kind, [("user", question, 1)], [image], answer) for kind, question, answer in questions]


def later_question(seed, held_out, before):
    """Each question of a scene after `before` others of the same scene and their answers."""
    image, questions = scenes.draw(seed, held_out)
    rng, items = random.Random(f"talk {seed}"), []
    for asked in questions:
        others = rng.sample([other for other in questions if other is not asked], before)
        turns = [turn for _, question, answer in others for turn in (("user", question, 0), ("assistant", answer))]
        turns += [("user", asked[1], 0)]
        turns[0] = (*turns[0][:2], 1)
        items.append((asked[0], turns, [image], asked[2]))
    return items


def second_question(seed, held_out):
    return later_question(seed, held_out, 1)


def third_question(seed, held_out):
    return later_question(seed, held_out, 2)


def two_pictures(seed, held_out):
    images, questions = scenes.draw_pair(seed, held_out)
    return [(kind, [("user", question, 2)], [*images], answer) for kind, question, answer in questions]


def picture_added(seed, held_out):
    """A question about the first picture, then the second picture and a question.

    It is about either and says which, or says nothing: then it is about the new one.
    """
    (first, before), (second, after) = scenes.draw(2 * seed, held_out), scenes.draw(2 * seed + 1, held_out)
    rng, items = random.Random(f"added {seed}"), []
    for kind in scenes.KINDS:
        which, named = rng.choice(((0, True), (1, True), (1, False), (1, False)))
        for _, question, answer in [asked for asked in (before, after)[which] if asked[0] == kind]:
            _, opening, opened, *_ = rng.choice(before)
            question = scenes.point(rng, question, which) if named else question
            turns = [("user", opening, 1), ("assistant", opened), ("user", question, 1)]
            items.append((kind, turns, [first, second], answer))
    return items


def system_sentence(seed, held_out):
    return [
        (kind, [("system", AUTHORS_SYSTEM), *turns], *rest) for kind, turns, *rest in one_question(seed, held_out)
    ]


SITUATIONS = {
    "one question": one_question, "second question": second_question, "third question": third_question,
    "two pictures": two_pictures, "a picture added": picture_added, "authors' system": system_sentence,
}  # fmt: skip


def collect(situation, number, held_out):
    """Scenes that training never saw → {kind: [(turns, pictures, answer), ...]}, `number` of each kind."""
    kinds = [kind for kind in scenes.KINDS if not (kind == "missing" and held_out)]
    table, seed = {kind: [] for kind in kinds}, 0
    while any(len(items) < number for items in table.values()):
        for kind, *item in SITUATIONS[situation](seed, held_out):
            if len(table[kind]) < number:
                table[kind].append(item)
        seed += 1
    return table


# ----------------------------------------------------------------------------------------------------------------
# Answers


def answers(model, processor, items):
    """What the model says to [(turns, pictures, answer), ...], greedily and in batches → [str, ...]."""
    said = []
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        rows = [
            processor.tokenizer.bos + processor.tokenizer.encode_pieces(processor.pieces(turns, len(pictures)))
            for turns, pictures, _ in batch
        ]
        inputs = processor.prepare(rows, [picture for _, pictures, _ in batch for picture in pictures])
        said += [processor.decode(row) for row in model.generate(**inputs, max_new_tokens=80)]
    return said


def count_right(model, processor, items):
    """How many of the questions are answered exactly."""
    said = answers(model, processor, items)
    return sum(words == answer for words, (*_, answer) in zip(said, items, strict=True))


def covered(items):
    """The same questions about pictures that show nothing."""
    return [(turns, [Image.new("RGB", p.size, (128, 128, 128)) for p in pictures], answer)
            for turns, pictures, answer in items]


def exchanged(items):
    """The same questions, each about the pictures of the next one."""
    pictures = [pictures for _, pictures, _ in items]
    return [(turns, other, answer)
            for (turns, _, answer), other in zip(items, pictures[1:] + pictures[:1], strict=True)]


def spoil_projector(model):
    """Numbers drawn by chance in the place of the projector's, as large as they were."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.projector.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std())


# ----------------------------------------------------------------------------------------------------------------
# Tables


def print_table(title, rows):
    print(f"| {title} | {' | '.join(SITUATIONS)} |\n|---|{'---|' * len(SITUATIONS)}")
    for name, shares in rows.items():
        print(f"| {name} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    print(flush=True)


def measure(model, processor, number, held_out):
    """{kind: [the share of right answers in each situation]}, the last of them "**all**"."""
    rows = defaultdict(list)
    for situation in SITUATIONS:
        table = collect(situation, number, held_out)
        hits = {kind: count_right(model, processor, items) for kind, items in table.items()}
        for kind, n in hits.items():
            rows[kind].append(n / number)
        rows["**all**"].append(sum(hits.values()) / (number * len(hits)))
    return rows


def evaluate(folder, number, device="cpu"):
    """Print the three tables. number: questions of each kind in each situation; controls are asked a quarter of it."""
    model, processor = load(str(folder), device=device, dtype="float32")
    print_table("fresh scenes", measure(model, processor, number, held_out=False))
    print_table("a held-out pair", measure(model, processor, number, held_out=True))
    controls, few = defaultdict(list), max(2, number // 4)
    for name in ("the picture is covered", "another picture", "a random projector"):
        if name == "a random projector":
            spoil_projector(model)
        change = {"the picture is covered": covered, "another picture": exchanged}.get(name, list)
        for situation in SITUATIONS:
            table = collect(situation, few, held_out=False)
            hits = sum(count_right(model, processor, change(items)) for items in table.values())
            controls[name].append(hits / (few * len(table)))
    print_table("controls, fresh scenes", controls)


def main():
    parser = argparse.ArgumentParser(description="Print how many questions tiny answers exactly. Writes nothing.")
    parser.add_argument("--model", type=Path, default=FOLDER, metavar="FOLDER", help="the checkpoint (tiny)")
    parser.add_argument("--questions", type=int, default=40, help="of each kind in each situation (40)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)  # more of them wait for each other on a model of this size
    evaluate(args.model, args.questions, args.device)


if __name__ == "__main__":
    main()
