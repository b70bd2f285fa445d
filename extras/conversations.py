"""Pictures with questions and answers, to be trained on: from a file to ids, and to labels that count answers alone.

A file is a list in JSON, or an object a line, in either of two forms, the second being that of the authors' data:

    {"image": "1.png", "question": "What shape is it?", "answer": "star"}
    {"image": "1.png", "conversations": [{"from": "human", "value": "<image>\\nWhat shape is it?"},
                                         {"from": "gpt", "value": "star"}, …]}
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from extras.intake import open_image
from extras.turn import context

KEPT_BACK = 5  # one picture in so many is not trained on
EXAMPLE = next(line.strip() for line in __doc__.splitlines() if '"answer"' in line)
ROLES = {"human": "user", "gpt": "assistant"}


@dataclass
class Example:
    """A conversation about a picture, or about none: turns of (role, words), user and assistant by turns."""

    image: Path | None
    turns: list

    @property
    def pictures(self):
        return [] if self.image is None else [self.image]


def read(file, images):
    """A file of questions, the folder of its pictures → [Example, …]. Raises ValueError or OSError that names the line
    or, in a list, the number of the object.
    """
    file, images = Path(file), Path(images)
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}: a line for each question, such as {EXAMPLE}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not text in UTF-8") from None
    if text.lstrip().startswith("["):
        try:
            rows = [(f"{file}, object {number},", row) for number, row in enumerate(json.loads(text), start=1)]
        except (ValueError, RecursionError) as error:  # the latter of what is nested too deep
            raise ValueError(f"{file} is not JSON: {error}") from None
    else:  # not splitlines, which also splits where JSON does not
        rows = [(f"{file}, line {number},", line) for number, line in enumerate(text.split("\n"), start=1)]
        rows = [(where, parsed(line, where)) for where, line in rows if line.strip()]
    return [example(row, images, where) for where, row in rows]


def parsed(line, where):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is not an object of JSON with image, question and answer") from None


def example(row, images, where):
    """An object of the file → Example."""
    if not isinstance(row, dict) or not ("conversations" in row or {"image", "question", "answer"} <= row.keys()):
        raise ValueError(f"{where} is not an object of JSON with image, question and answer, or with conversations")
    image = row.get("image")
    if "conversations" in row:
        turns = written(row["conversations"], image is not None, where)
    else:
        turns = [("user", row["question"]), ("assistant", row["answer"])]
    texts = [words for _, words in turns] + ([] if image is None and "conversations" in row else [image])
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{where} has an image, a question or an answer that is empty, or is no text")
    return Example(None if image is None else images / image, turns)


def written(conversations, has_image, where):
    """The authors' conversations → turns. <image> marks the turn of the picture, which then stands in front of its
    words, wherever it stood in them; so does their preprocess_multimodal.
    """
    turns, seen = [], 0
    for turn in conversations if isinstance(conversations, list) else []:
        role, words = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if ROLES.get(role) != ("assistant" if len(turns) % 2 else "user") or not isinstance(words, str):
            raise ValueError(f"{where}: conversations are turns of human and gpt, human first, each with a value")
        found = words.count("<image>") if role == "human" else 0
        if found and turns:
            raise ValueError(f"{where}: <image> stands in a later turn than the first, and is supported there alone")
        seen += found
        turns.append((ROLES[role], words.replace("<image>", "").strip() if found else words))
    if not turns or len(turns) % 2:
        raise ValueError(f"{where}: conversations are turns of human and gpt, and end with gpt")
    if seen != has_image:
        raise ValueError(f"{where} has {int(has_image)} image and {seen} <image> in its conversations: one for each")
    return turns


def split(examples):
    """Examples → (to be trained on, kept back): every fifth picture is kept back, with all that is asked about it.

    By picture, not by line: a picture that was trained on tells nothing about what the model sees in new ones.
    """
    order = {image: i for i, image in enumerate(dict.fromkeys(x.image for x in examples if x.image is not None), 1)}
    if len(order) < KEPT_BACK:
        raise ValueError(f"there are {len(order)} pictures, and it takes {KEPT_BACK} or more: one of them is kept back")
    kept = [x for x in examples if x.image is not None and order[x.image] % KEPT_BACK == 0]
    return [x for x in examples if x.image is None or order[x.image] % KEPT_BACK], kept


def check(model, processor, examples):
    """Raise ValueError or OSError for a picture that cannot be read, and for a conversation that is too long."""
    for x in examples:
        inputs = batch(processor, [x])
        inputs.pop("labels")
        if model.prompt_ids(**inputs)[0].shape[1] > context(model):
            raise ValueError(f"the question about {x.image} is too long: the model has {context(model)} positions")


def encode(processor, x):
    """An Example → its ids, and its labels: those of the answers and of their ends alone, -100 elsewhere."""
    whole = ids_of(processor, x.turns, len(x.pictures))
    labels = [-100] * len(whole)
    for k in range(1, len(x.turns), 2):  # the answers: what stands behind the prompt, up to the end of the turn
        begin = shared(whole, ids_of(processor, x.turns[:k], len(x.pictures)))
        end = shared(whole, ids_of(processor, x.turns[: k + 1], len(x.pictures)))
        labels[begin:end] = whole[begin:end]
    return whole, labels


def ids_of(processor, turns, pictures):
    """The ids of a conversation about so many pictures; the prompt for an answer follows a last turn of the user."""
    return processor.tokenizer.bos + processor.tokenizer.encode_pieces(processor.pieces(turns, pictures))


def shared(a, b):
    """How many ids two lists have in common at their beginning."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def batch(processor, examples):
    """Examples → what model(**batch) takes, labels (B, T) included. Padded on the left."""
    encoded = [encode(processor, x) for x in examples]
    inputs = processor.prepare([ids for ids, _ in encoded], [open_image(i) for x in examples for i in x.pictures])
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (_, wanted) in zip(labels, encoded, strict=True):
        row[len(row) - len(wanted) :] = torch.tensor(wanted)
    return inputs | {"labels": labels}


def counted(labels):
    """How many tokens of labels (B, T) the loss is a mean of: the first of a row is predicted by nothing."""
    return int((labels[:, 1:] != -100).sum())
