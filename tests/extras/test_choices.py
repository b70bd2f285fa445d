"""How likely each of several given answers is: --choices."""

import re

import pytest
import tokenizer_files
import torch
from reference import IMAGE, expanded
from talkers import EOS
from transformers import AutoTokenizer

import llava
import vision
from extras import checks, cli

CHOICES = ["no", "yes", "a cat", "a circle and a square", "", "yes!"]


def likelihoods(model, processor, images, turns, choices):
    """log P of each whole answer and its end, by one full pass each, up to a constant that all of them share."""
    scores = []
    for words in choices:
        inputs = processor.chat([*turns, ("user", "Is it red?"), ("assistant", words)], images)
        ids, *_ = expanded(inputs["input_ids"])
        assert ids[0, -1] == EOS
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            logits = model(**{name: x.double() if name == "pixel_values" else x for name, x in inputs.items()}).logits
        start = len(ids[0]) - 1 - ids[0].tolist()[::-1].index(IMAGE) if images else 0  # behind the last picture
        predicted = logits[0, start:-1].double().log_softmax(-1)
        scores.append(predicted.gather(1, ids[0, start + 1 :, None]).sum())
    return torch.stack(scores)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_choices(main, pair, reference, monkeypatch, pictures, number):
    model, processor, _ = pair
    images = pictures[:number]
    monkeypatch.setattr(llava, "load", lambda *_, **__: pair[:2])
    found = main(*(["--image", *images] if images else []), "--prompt", "Is it red?", "--choices", *CHOICES)
    assert found.status == 0
    assert found.err == "notice: each probability is given that the answer is one of these\n"
    lines = [line.split("\t") for line in found.out.splitlines()]
    assert [words for _, words in lines] == CHOICES
    printed = torch.tensor([float(probability) for probability, _ in lines], dtype=torch.float64)
    assert abs(printed.sum() - 1) < 1e-3 and (printed > 0.01).sum() > 1

    prepared, preprocess = [], vision.preprocess
    monkeypatch.setattr(vision, "preprocess", lambda *args: prepared.append(args) or preprocess(*args))
    scores = []
    monkeypatch.setattr(
        model, "score", lambda *args, score=model.score, **inputs: scores.append(score(*args, **inputs)) or scores[-1]
    )
    main(*(["--image", *images] if images else []), "--prompt", "Is it red?", "--choices", *CHOICES)
    assert len(prepared) == number  # once, not once for each choice
    for whole in (model, reference):
        right = likelihoods(whole, processor, images, [], CHOICES)
        torch.testing.assert_close(printed, right.softmax(0), rtol=0, atol=1e-4)
        torch.testing.assert_close(scores[0] - scores[0][0], (right - right[0]).float(), rtol=1e-5, atol=1e-4)


def test_choices_take_the_other_options(main, pairs, monkeypatch, pictures):
    model, processor, _ = pairs["llama"]
    monkeypatch.setattr(llava, "load", lambda *_, **__: (model, processor))

    def choose(*more):
        found = main("--image", pictures[0], "--prompt", "Is it red?", *more, "--choices", *CHOICES)
        return found.err, torch.tensor([float(line.split("\t")[0]) for line in found.out.splitlines()])

    plain, padded, authors = (choose(*more)[1] for more in ([], ["--pad"], ["--system", "authors"]))
    right = likelihoods(model, processor, pictures[:1], [("system", cli.AUTHORS_SYSTEM)], CHOICES).softmax(0).float()
    torch.testing.assert_close(authors, right, rtol=0, atol=1e-4)
    assert not torch.equal(plain, padded) and not torch.equal(plain, authors)
    err, again = choose("--show-prompt")
    assert torch.equal(again, plain)
    assert re.findall(r"^prompt: '(.*)'$", err, re.M) == [
        rf"<s>USER: <image>\nIs it red? ASSISTANT: {words}</s>" for words in CHOICES
    ]


@pytest.mark.parametrize("rules", tokenizer_files.RULES)
def test_choices_are_scored_in_the_ids_of_the_written_conversation(main, monkeypatch, tmp_path, pictures, rules):
    model, processor = llava.load("tiny", device="cpu")
    processor.tokenizer = checks.Tokenizer(tokenizer_files.write(tmp_path, tokenizer_files.RULES[rules]))
    reference, seen = AutoTokenizer.from_pretrained(tmp_path), []
    monkeypatch.setattr(llava, "load", lambda *_, **__: (model, processor))
    monkeypatch.setattr(
        model, "score", lambda answers, **inputs: seen.append((answers, inputs)) or torch.zeros(len(answers))
    )
    found = main("--image", pictures[0], "--prompt", "Is it red?", "--choices", "no", " yes ", "")
    assert found.status == 0, found.err
    [(answers, inputs)] = seen
    for words, answer in zip(("no", " yes ", ""), answers, strict=True):
        whole = reference(f"USER: <image>\nIs it red? ASSISTANT: {words}</s>").input_ids
        assert inputs["input_ids"][0].tolist() + answer == whole
