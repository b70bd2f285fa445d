"""Was something learnt? What a model answers about pictures that were kept back, beside what chance would give.

Two controls tell seeing from guessing: the same questions about another picture, and the model before training.
"""

import json
import math

import torch

from extras import conversations
from extras.intake import open_image

ENOUGH = 20  # pictures: with fewer, chance alone moves the share by 20 points and more
MOST = 200  # answers are generated, which takes time


def questions(examples):
    """Examples → [(picture, turns up to a question, answer), …], evenly thinned to MOST."""
    asked = [
        (x.image, x.turns[:k], x.turns[k][1])
        for x in examples if x.image is not None
        for k in range(1, len(x.turns), 2)
    ]  # fmt: skip
    return asked[:: -(-len(asked) // MOST)]


def shuffled(asked, others=()):
    """The same questions, each about the next one of their pictures. others: taken if there is but one."""
    images = list(dict.fromkeys(image for image, _, _ in asked))
    images += [image for image in others if image not in images][: 1 if len(images) == 1 else 0]
    return [(images[(images.index(image) + 1) % len(images)], turns, answer) for image, turns, answer in asked]


@torch.no_grad()
def answers(model, processor, asked, size=8):
    """What the model says, greedily, to each question → list of str."""
    said = []
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        rows = [conversations.ids_of(processor, turns, 1) for _, turns, _ in part]
        inputs = processor.prepare(rows, [open_image(image) for image, _, _ in part])
        longest = max(len(processor.tokenizer.encode(answer, special=False)) for _, _, answer in part)
        said += [processor.decode(ids) for ids in model.generate(**inputs, max_new_tokens=longest + 4)]
    return said


def right(asked, said):
    """How many answers are exactly right, but for spaces around them."""
    return sum(answer.strip() == words.strip() for (_, _, answer), words in zip(asked, said, strict=True))


def interval(hits, number):
    """The share that lies behind `hits` of `number`, with 95 % confidence: (low, high) (Wilson 1927)."""
    z, share = 1.96, hits / number
    middle, spread = share + z * z / (2 * number), z * math.sqrt(share * (1 - share) / number + (z / number / 2) ** 2)
    return (middle - spread) / (1 + z * z / number), (middle + spread) / (1 + z * z / number)


def pictures(asked):
    """How many pictures the questions are about."""
    return len({image for image, _, _ in asked})


def too_few(number, about):
    """The words for so many answers about so many pictures, if they will tell nothing; otherwise None."""
    if min(number, about) >= ENOUGH:
        return None
    return f"{number} answers are too few to tell" if number <= about else (
        f"{number} answers about no more than {about} picture{'s' * (about > 1)} are too few to tell"
    )  # fmt: skip


def verdict(number, before, after, other, about=None):
    """Numbers of right answers before, after, and after about another picture → sentences that say what they mean.

    about: how many pictures the questions are about; None: each about its own. Answers about one picture hang together:
    what is seen or not seen in it decides them all. So the certainty is that of one answer for each picture.
    """
    independent = number if about is None else min(number, about)
    low, high = interval(after / number * independent, independent)
    text = (
        f"right answers about pictures that were kept back: {before} → {after} of {number}, "
        f"about another picture {other} of {number}\n"
    )
    if few := too_few(number, independent):
        return text + (
            f"{few}: the true share may lie anywhere from {low:.0%} to {high:.0%}. "
            f"With at least {ENOUGH * conversations.KEPT_BACK} questions about as many pictures it can be told"
        )
    if low <= other / number:
        return text + "no better than about another picture: what it says does not come from what it sees"
    if low <= before / number:
        return text + "better than about another picture, but not than before: nothing new was learnt"
    return text + f"learnt: the true share lies between {low:.0%} and {high:.0%} (95 % confidence)"


def write(file, asked, said, other):
    """A line for each question: what was wanted, what was said, whether that is right, and about another picture."""
    with open(file, "w", encoding="utf-8") as out:
        for (image, turns, answer), words, blind in zip(asked, said, other, strict=True):
            row = {"image": image.name, "question": turns[-1][1], "answer": answer, "said": words}
            row |= {"right": words.strip() == answer.strip(), "about another picture": blind}
            print(json.dumps(row, ensure_ascii=False), file=out)
