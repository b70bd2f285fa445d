"""The little world that tiny is trained on: one to four coloured shapes on a plain background, questions and answers.

    image, questions = draw(7)  # a PIL image and [(kind, question, answer), ...], one of each kind
    image, questions = draw(7, held_out=True)  # about a colour-shape pair that training never saw
    (first, second), questions = draw_pair(7)  # two pictures of one prompt: each question says which of them it means
    image, questions = draw_doubt(7)  # the answer of each question is a tuple: all that a fair eye could say

A thing stands well inside one of nine cells, and no two things of a scene are alike in colour, shape and size.
So "where" has one answer, "left of" has a clear margin, and each thing can be named without doubt. Only draw_doubt
draws what is in doubt: a colour halfway between two, a thing that covers a part of another.

    python tiny/scenes.py --seed 7                             # prints the questions of scene 7
    python tiny/scenes.py --seed 7 --out tiny/new/scene.png    # and writes its picture
"""

import argparse
import math
import random
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (217, 40, 44), "orange": (244, 132, 22), "yellow": (250, 212, 48),
    "green": (44, 158, 68), "blue": (38, 98, 222), "purple": (146, 58, 184),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": 0.18, "large": 0.27}  # diameter, as a fraction of the picture's side
REACH = 0.57  # how far a tip is from the centre, in diameters
PLACES = (
    "top left", "top middle", "top right",
    "middle left", "centre", "middle right",
    "bottom left", "bottom middle", "bottom right",
)
NUMBERS = ("zero", "one", "two", "three", "four")
ORDINALS = ("first", "second")
KINDS = ("describe", "colour", "shape", "count", "where", "relation", "yes/no", "missing")

# Training never shows, mentions or denies these: they test whether colour and shape were learnt apart from each other.
HELD_OUT = (("red", "star"), ("green", "square"), ("blue", "triangle"), ("purple", "circle"))
SEEN = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT)


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    size: str
    cell: int  # 0 ... 8 in reading order
    x: float  # the centre, as fractions of the side; y grows downwards
    y: float
    diameter: float

    @property
    def place(self):
        return PLACES[self.cell]


def draw(seed, held_out=False):
    """Scene number `seed`, any integer → (PIL image of 224 x 224, [(kind, question, answer), ...])."""
    rng = random.Random(f"scene {seed} held out" if held_out else f"scene {seed}")
    things = arrange(rng, held_out)
    return paint(rng, things), ask(rng, things, held_out)


def draw_pair(seed, held_out=False):
    """Two scenes for one prompt → ((first, second), [(kind, question, answer), ...]), one question of each kind.

    Each question says which picture it is about: "Where is the star in the second picture?".
    """
    rng = random.Random(f"pair {seed} held out" if held_out else f"pair {seed}")
    worlds = [arrange(rng, held_out) for _ in ORDINALS]
    images = tuple(paint(rng, things) for things in worlds)
    asked = [ask(rng, things, held_out) for things in worlds]
    questions = []
    for kind in KINDS:
        found = [(which, *rest) for which, about in enumerate(asked) for name, *rest in about if name == kind]
        if found:  # no relation if both show a lone thing
            which, question, answer = rng.choice(found)
            questions.append((kind, point(rng, question, which), answer))
    return images, questions


def draw_doubt(seed):
    """A scene in which something is in doubt → (PIL image, [(kind, question, answers), ...]).

    answers: a tuple of those that could be right. Either a thing has a colour halfway between two that have a name, or
    a thing covers a part of another one.
    """
    rng = random.Random(f"doubt {seed}")
    while True:
        things = arrange(rng)
        drawn = rng.choice((mix, cover))(rng, things)
        if drawn:
            return drawn

# ----------------------------------------------------------------------------------------------------------------
# The things


def arrange(rng, held_out=False):
    """One to four things in reading order. With held_out exactly one of them is a pair from HELD_OUT."""
    number = rng.randint(1, 4)
    cells = rng.sample(range(9), number)
    looks = [(*rng.choice(HELD_OUT), rng.choice(list(SIZES)))] if held_out else []
    # Some scenes share one colour or one shape, so that counting has something to count.
    theme = rng.choice((None, None, rng.choice(list(COLOURS)), rng.choice(SHAPES)))
    while len(looks) < number:
        pair = rng.choice([pair for pair in SEEN if theme in (None, *pair)])
        look = (*pair, rng.choice(list(SIZES)))
        if look not in looks:
            looks.append(look)
    placed = (place(rng, cell, *look) for cell, look in zip(cells, looks, strict=True))
    return sorted(placed, key=lambda thing: thing.cell)


def mix(rng, things):
    """One thing in a colour halfway between two neighbours, each of which it could be called; None if none can be."""
    index = rng.randrange(len(things))
    thing, colours = things[index], list(COLOURS)
    other = colours[(colours.index(thing.colour) + rng.choice((-1, 1))) % len(colours)]
    near = {thing.colour, other}
    if (other, thing.shape) in HELD_OUT or any(x.colour in near for x in things if x is not thing):
        return None
    share = rng.uniform(0.4, 0.6)
    between = [round(a + share * (b - a)) for a, b in zip(COLOURS[thing.colour], COLOURS[other], strict=True)]
    image = paint(rng, things, colours={index: between})
    either = [things, [replace(x, colour=other) if x is thing else x for x in things]]
    named = name(rng, thing, things, hide=("colour",))
    scenes = [sentence(world) for world in either]
    return image, [
        ("describe", describe(rng, things, thing, SEEN)[0], tuple(scenes)),
        ("colour", f"What colour is {named}?", (thing.colour, other)),
        ("count", f"How many {thing.colour} objects are there?", ("one", "zero")),
        ("yes/no", f"Is {named} {thing.colour}?", ("yes", "no")),
    ]


def cover(rng, things):
    """One thing half behind another of its colour: what shape it has, and whether it is one thing, is hard to say."""
    back = rng.choice(things)
    shapes = [shape for shape in SHAPES if shape != back.shape and (back.colour, shape) in SEEN]
    if not shapes or len(things) == 4:
        return None
    angle, far = rng.uniform(0, 2 * math.pi), rng.uniform(0.1, 0.3) * back.diameter
    front = replace(back, shape=rng.choice(shapes), diameter=0.9 * back.diameter,
                    x=back.x + far * math.sin(angle), y=back.y + far * math.cos(angle))
    shown = [x for thing in things for x in ((thing, front) if thing is back else (thing,))]
    where = f"the object {'in' if back.place == 'centre' else 'at'} the {back.place}"
    alike = sum(thing.colour == back.colour for thing in things)
    alone = [front if thing is back else thing for thing in things]
    return paint(rng, shown), [
        ("describe", describe(rng, things, back, SEEN)[0], (sentence(things), sentence(alone), sentence(shown))),
        ("shape", f"What shape is {where}?", (back.shape, front.shape)),
        ("count", f"How many {back.colour} objects are there?", (NUMBERS[alike], NUMBERS[alike + 1])),
        ("yes/no", f"Is {where} {with_article(back.shape)}?", ("yes", "no")),
    ]


def place(rng, cell, colour, shape, size):
    """A thing somewhere inside its cell, a third of the side wide."""
    diameter = SIZES[size] * rng.uniform(0.95, 1.05)
    slack = 1 / 6 - REACH * diameter - 0.004  # so that all of it is inside
    x, y = ((index + 0.5) / 3 + rng.uniform(-slack, slack) for index in (cell % 3, cell // 3))
    return Thing(colour, shape, size, cell, x, y, diameter)


# ----------------------------------------------------------------------------------------------------------------
# The picture


def paint(rng, things, side=224, strange=False, colours=None):
    """Things on a shaded background, pale or dark → PIL image (side, side).

    strange: in colours without a name here. colours: {the index of a thing: a colour (red, green, blue) for it}.
    """
    big = 2 * side  # drawn at twice the size, then halved: smooth edges
    base = rng.randint(22, 60) if rng.random() < 0.3 else rng.randint(205, 245)
    top = [base + rng.randint(-10, 10) for _ in range(3)]
    bottom = [max(0, value - rng.randint(0, 22)) for value in top]
    image = Image.new("RGB", (1, 2))
    image.putdata([tuple(top), tuple(bottom)])
    image = image.resize((big, big), Image.Resampling.BILINEAR)
    canvas = ImageDraw.Draw(image)
    for index, thing in enumerate(things):
        colour = nameless(rng) if strange else (colours or {}).get(index, COLOURS[thing.colour])
        colour = tuple(min(255, max(0, value + rng.randint(-10, 10))) for value in colour)
        canvas.polygon([(big * x, big * y) for x, y in outline(thing, tilt=rng.uniform(-0.2, 0.2))], fill=colour)
    return image.reduce(2)


def nameless(rng):
    """Any colour (red, green, blue) that lies well apart from the six of this world."""
    while True:
        colour = tuple(rng.randint(10, 245) for _ in range(3))
        if all(math.dist(colour, named) > 70 for named in COLOURS.values()):
            return colour


def outline(thing, tilt):
    """The corners of a thing, turned by tilt (radians). Radii are chosen so that all shapes look equally large."""
    corners, radii = {
        "circle": (60, (0.5,)), "square": (4, (0.6,)), "triangle": (3, (REACH,)), "star": (10, (REACH, 0.25)),
    }[thing.shape]
    start = tilt + (math.pi / 4 if thing.shape == "square" else 0)
    for i in range(corners):
        angle, radius = start + 2 * math.pi * i / corners, thing.diameter * radii[i % len(radii)]
        yield thing.x + radius * math.sin(angle), thing.y - radius * math.cos(angle)


# ----------------------------------------------------------------------------------------------------------------
# The questions


def ask(rng, things, held_out=False):
    """One question of each kind → [(kind, question, answer), ...]; a lone thing has no relation to anything.

    That something is missing is never said of a held-out pair, so this kind is not asked with held_out.
    """
    pairs = HELD_OUT if held_out else SEEN  # the pairs that a question may mention
    subjects = [thing for thing in things if (thing.colour, thing.shape) in pairs]
    questions = []
    for kind in KINDS:
        left_out = held_out if kind == "missing" else kind == "relation" and len(things) == 1
        if not left_out:
            questions.append((kind, *ASK[kind](rng, things, rng.choice(subjects), pairs)))
    return questions


def sentence(things):
    """The scene in words: "A small red circle in the centre and a large blue star at the top left."."""
    words = [f"a {t.size} {t.colour} {t.shape} {'in' if t.place == 'centre' else 'at'} the {t.place}" for t in things]
    text = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    return f"{text[0].upper()}{text[1:]}."


def name(rng, thing, things, hide=()):
    """Words that fit this thing and no other: "the small star". They give away none of the attributes in `hide`."""
    names = [] if "place" in hide else [f"the object {'in' if thing.place == 'centre' else 'at'} the {thing.place}"]
    for used in ((), ("size",), ("colour",), ("shape",), ("size", "colour"), ("size", "shape"), ("colour", "shape"),
                 ("size", "colour", "shape")):
        alike = [other for other in things if all(getattr(other, part) == getattr(thing, part) for part in used)]
        if len(alike) == 1 and not set(used) & set(hide):
            adjectives = [getattr(thing, part) for part in ("size", "colour") if part in used]
            names.append(" ".join(["the", *adjectives, thing.shape if "shape" in used else "object"]))
    return rng.choice(names)


def point(rng, question, which):
    """The question about picture `which`, 0 or 1, of two: "In the second picture, where is the star?"."""
    for noun in ("image", "picture"):
        if f"the {noun}" in question:
            return question.replace(f"the {noun}", f"the {ORDINALS[which]} {noun}")
    words = f"the {ORDINALS[which]} {rng.choice(('image', 'picture'))}"
    if rng.random() < 0.5:
        return f"{question[:-1]} in {words}?"
    return f"In {words}, {question[0].lower()}{question[1:]}"


def with_article(words):
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def describe(rng, things, thing, pairs):
    question = rng.choice(("Describe the image.", "Describe the image.", "Describe the picture.", "What do you see?",
                           "What is in the image?", "What is in the picture?"))
    return question, sentence(things)


def colour(rng, things, thing, pairs):
    question = rng.choice(("What colour is {}?", "What color is {}?", "Which colour is {}?"))
    return question.format(name(rng, thing, things, hide=("colour",))), thing.colour


def shape(rng, things, thing, pairs):
    question = rng.choice(("What shape is {}?", "Which shape is {}?"))
    return question.format(name(rng, thing, things, hide=("shape",))), thing.shape


def count(rng, things, thing, pairs):
    pair = (thing.colour, thing.shape) if rng.random() < 0.75 else rng.choice(pairs)
    used = rng.choice([used for used in ((), (0,), (1,), (0, 1)) if used or pairs is SEEN])  # all; colour, shape, both
    number = sum(all((other.colour, other.shape)[i] == pair[i] for i in used) for other in things)
    words = " ".join([pair[0]] * (0 in used) + [f"{pair[1]}s" if 1 in used else "objects"])
    question = rng.choice(("How many {} are there?", "How many {} do you see?", "How many {} are in the picture?"))
    return question.format(words), NUMBERS[number]


def where(rng, things, thing, pairs):
    question = rng.choice(("Where is {}?", "Where is {}?", "Where do you see {}?"))
    return question.format(name(rng, thing, things, hide=("place",))), thing.place


def relation(rng, things, thing, pairs):
    """Only across different columns (left, right) or rows (above, below), whose centres are far apart."""
    other = rng.choice([other for other in things if other is not thing])
    columns, rows = thing.cell % 3 - other.cell % 3, thing.cell // 3 - other.cell // 3
    facts = [("left of", columns < 0), ("to the left of", columns < 0), ("right of", columns > 0)] * (columns != 0)
    facts += [("above", rows < 0), ("above", rows < 0), ("below", rows > 0)] * (rows != 0)
    words, true = rng.choice(facts)
    question = f"Is {name(rng, thing, things, ('place',))} {words} {name(rng, other, things, ('place',))}?"
    return question, "yes" if true else "no"


def yes_no(rng, things, thing, pairs):
    """Is there such a thing? Is it of this colour, shape, size? A wrong value makes a pair, too, that may be said."""
    true = rng.random() < 0.5
    form = rng.choice(("there", "there", "colour", "shape", "size"))
    if form == "there":
        pair = (thing.colour, thing.shape) if true else absent(rng, things, pairs)
        question = f"Is there {with_article(' '.join(pair))}{rng.choice(('', ' in the picture'))}?"
        return question, "yes" if true else "no"
    allowed = SEEN if pairs is SEEN else SEEN + HELD_OUT
    wrong = {
        "colour": [colour for colour in COLOURS if colour != thing.colour and (colour, thing.shape) in allowed],
        "shape": [shape for shape in SHAPES if shape != thing.shape and (thing.colour, shape) in allowed],
        "size": [size for size in SIZES if size != thing.size],
    }[form]
    value = getattr(thing, form) if true else rng.choice(wrong)
    question = f"Is {name(rng, thing, things, hide=(form,))} {with_article(value) if form == 'shape' else value}?"
    return question, "yes" if true else "no"


def absent(rng, things, pairs):
    """A pair that is not in the picture, though its colour or its shape is, wherever there is such a pair."""
    others = [pair for pair in pairs if pair not in [(thing.colour, thing.shape) for thing in things]]
    near = [pair for pair in others if any(thing.colour == pair[0] or thing.shape == pair[1] for thing in things)]
    return rng.choice(near or others)


def missing(rng, things, thing, pairs):
    """Something is asked about as if it were there: "Where is the star?" → "There is no star."."""
    kind = rng.choice(("colour", "shape", "where"))
    parts = [part for part in ("size", "colour", "shape") if part != kind]
    options = []
    for used in (u for n in (1, 2, 3) for u in combinations(parts, n)):
        looks = [dict(size=size, colour=pair[0], shape=pair[1]) for size, pair in product(SIZES, pairs)]
        alike = [max(sum(getattr(x, part) == look[part] for part in used) for x in things) for look in looks]
        looks = [(look, n) for look, n in zip(looks, alike, strict=True) if n < len(used)]
        near = [look for look, n in looks if n == len(used) - 1]  # all but one of its attributes are those of a thing
        if looks:
            options.append((used, near if near and rng.random() < 0.7 else [look for look, _ in looks]))
    used, looks = rng.choice(options)
    look = rng.choice(looks)
    words = " ".join([look[part] for part in used] + ["object"] * ("shape" not in used))
    question = {"colour": "What colour is the {}?", "shape": "What shape is the {}?", "where": "Where is the {}?"}[kind]
    return question.format(words), f"There is no {words}."


ASK = dict(zip(KINDS, (describe, colour, shape, count, where, relation, yes_no, missing), strict=True))


def main():
    parser = argparse.ArgumentParser(
        description="Print the questions and answers of a scene; with --out also write its picture. Nothing else is "
        "written, and without --seed this help is all.")
    parser.add_argument("--seed", type=int, help="the number of the scene, any integer")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the picture, as .png")
    parser.add_argument("--overwrite", action="store_true", help="even where there is a file already")
    parser.add_argument("--held-out", action="store_true", help="a scene with a pair that training never saw")
    parser.add_argument("--doubt", action="store_true", help="a scene in which something is in doubt")
    args = parser.parse_args()
    if args.seed is None:
        return parser.print_help()
    if args.out and args.out.exists() and not args.overwrite:
        parser.error(f"{args.out} is there already: name another --out, or add --overwrite to write over it")
    image, questions = draw_doubt(args.seed) if args.doubt else draw(args.seed, args.held_out)
    for kind, question, answer in questions:
        print(f"{kind:9} {question} {answer if isinstance(answer, str) else ' / '.join(answer)}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        image.save(args.out)


if __name__ == "__main__":
    main()
