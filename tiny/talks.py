"""What tiny's second part of training is shown: talks about the scenes of scenes.py.

A talk has several questions, one picture or two, or a picture that comes later, and sometimes a system sentence.

    letter   meaning
    T        positions of a talk, those of its pictures included
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from extras.cli import AUTHORS_SYSTEM  # noqa: E402

import scenes  # noqa: E402

# How often a kind is asked about: more of what is learnt late
WANTED = {"describe": 6, "colour": 3, "shape": 3, "count": 7, "where": 5, "relation": 1, "yes/no": 4, "missing": 4}
SHARES = {"one picture": 0.2, "two pictures": 0.45, "a picture added": 0.35}
SYSTEM = 0.1  # of the talks begin with the authors' sentence


@dataclass
class Talk:
    """turns: as Processor.chat takes them. shown: the pictures, as indices into those that there are."""

    turns: list = field(default_factory=list)
    shown: list = field(default_factory=list)

    def add(self, question, answer, shown=()):
        self.turns += [("user", question, len(shown)), ("assistant", answer)]
        self.shown += shown


def ask(rng, things):
    """A question about one scene → question, answer."""
    while True:
        kind = rng.choices(list(WANTED), WANTED.values())[0]
        if kind != "relation" or len(things) > 1:
            return scenes.ASK[kind](rng, things, rng.choice(things), scenes.SEEN)


def talk(rng, worlds, enough):
    """A talk about one or two of the scenes `worlds`. enough(talk): is it long enough?"""
    situation = rng.choices(list(SHARES), SHARES.values())[0]
    chosen = rng.sample(range(len(worlds)), 1 if situation == "one picture" else 2)
    result, waiting = Talk(), list(chosen)
    if rng.random() < SYSTEM:
        result.turns.append(("system", AUTHORS_SYSTEM))
    alone = rng.randint(1, 3)  # questions about the first picture before the second one is added
    while True:
        asked, new = len(result.turns) // 2, waiting
        if situation == "a picture added":
            new = waiting[:1] if asked == 0 else waiting if asked == alone else []
        waiting = waiting[len(new) :]
        seen = len(result.shown) + len(new)
        which = rng.randrange(seen)
        question, answer = ask(rng, worlds[chosen[which]])
        # a picture that came later is also meant where none is named
        if seen == 2 and (situation == "two pictures" or which == 0 or rng.random() < 0.5):
            question = scenes.point(rng, question, which)
        result.add(question, answer, new)
        if enough(result):
            return result


def doubt(rng, enough):
    """A talk about a scene in which something is in doubt → picture, Talk. Of the answers that it has, any one."""
    image, questions = scenes.draw_doubt(rng.random())
    result = Talk()
    for _, question, answers in rng.sample(questions, len(questions)):
        result.add(question, rng.choice(answers), [] if result.shown else [0])
        if enough(result):
            break
    return image, result


def encode(processor, talk, size):
    """A talk → ids (T) with `size` image tokens for each picture, labels (T): those of the answers and of their </s>.

    They are the ids that Processor.chat has, and -100 where nothing is to be learnt.
    """
    tokenizer, pieces, ids, labels = processor.tokenizer, [], list(processor.tokenizer.bos), []
    labels += [-100] * len(ids)
    for role, *turn in talk.turns:
        before, pieces = pieces, pieces + processor.pieces([(role, *turn)], sum(turn[1:]))
        if role == "assistant":
            behind = [processor.eos_id] if len(ids) > len(tokenizer.bos) else []  # text begins in another way there
            whole = tokenizer.encode_pieces(behind + pieces)[len(behind) :]
            prompt = tokenizer.encode_pieces(behind + before)[len(behind) :]
            answer = whole[len(prompt) :]
            prompt = [i for token in prompt for i in [token] * (size if token == processor.image_id else 1)]
            ids += prompt + answer
            labels += [-100] * len(prompt) + answer
            pieces = []
    return ids, labels
