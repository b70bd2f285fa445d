"""How likely each of several given answers is: --choices."""

import torch

from extras.cli import notice
from extras.turn import check_prompt


def print_choices(model, processor, images, options, turns):
    """Print each choice and its probability, given that the answer is one of them → exit status.

    A choice is worth the likelihood of its tokens and of the end. What all of them share with the question is read
    once.
    """
    tokenizer, asked = processor.tokenizer, processor.pieces(turns, len(images))
    pieces = [[*asked, *processor.pieces([("assistant", words)])] for words in options.choices]
    rows = [tokenizer.bos + tokenizer.encode_pieces(each) for each in pieces]
    # the question ends where the rows part, unless the tokenizer merges a choice's beginning into its last token
    shared, end = 0, len(tokenizer.bos + tokenizer.encode_pieces(asked))
    while shared < end and len({row[shared] for row in rows}) == 1:
        shared += 1
    inputs = processor.prepare([rows[0][:shared]], images, options.pad)
    del inputs["attention_mask"]  # a single row has no padding
    for each, row in zip(pieces, rows, strict=True):
        check_prompt(model, processor, options, [*tokenizer.bos, *each], {**inputs, "input_ids": torch.tensor([row])})
    notice("each probability is given that the answer is one of these")
    scores = model.score([row[shared:] for row in rows], **inputs)
    for words, probability in zip(options.choices, scores.softmax(0).tolist(), strict=True):
        print(f"{probability:.4f}\t{words}")
    return 0
