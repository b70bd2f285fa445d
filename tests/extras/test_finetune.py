"""extras/finetune.py: a folder of pictures and questions becomes a checkpoint that answers them."""

import json
import sys

import pytest
import tokenizer_files
import torch
from PIL import Image, ImageDraw
from reference import TINY
from transformers import AutoTokenizer

import llava
from extras import checks, finetune

sys.path.append(str(TINY))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two dozen pictures of a cross or a bar, which tiny has never seen;
    the one is to be called star, the other square.
    """
    folder = tmp_path_factory.mktemp("mine")
    lines = []
    for i in range(24):
        picture = Image.new("RGB", (120, 120), (225, 225, 220))
        draw, x, y = ImageDraw.Draw(picture), 20 + 13 * (i % 5), 20 + 11 * (i // 5)
        draw.rectangle((x, y + 12, x + 40, y + 24), fill=(30, 30, 30))
        if i % 2:
            draw.rectangle((x + 14, y - 8, x + 26, y + 44), fill=(30, 30, 30))
        picture.save(folder / f"{i}.png")
        lines.append(
            json.dumps({"image": f"{i}.png", "question": "What shape is it?", "answer": "star" if i % 2 else "square"})
        )
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


@pytest.mark.parametrize("way", [["--rate", "5e-3"], ["--lora", "4", "--rate", "1e-2"]], ids=["projector", "lora"])
def test_it_learns_saves_and_loads(folder, tmp_path, capsys, way):
    out = tmp_path / "mine"
    assert finetune.main([str(folder), "--out", str(out), "--epochs", "20", "--device", "cpu", *way]) == 0, (
        capsys.readouterr()
    )
    losses = [float(x) for x in capsys.readouterr().out.replace(",", "").split() if x.replace(".", "").isdigit()]
    assert losses[1] < losses[0] / 3 and losses[3] < losses[2] / 2  # on what was kept back, too
    model, processor = llava.load(str(out), device="cpu")
    right = 0
    for i in (4, 9, 14, 19):  # those that were kept back
        ids = model.generate(
            **processor.chat([("user", "What shape is it?")], [str(folder / f"{i}.png")]), max_new_tokens=8
        )
        right += processor.decode(ids[0]) == ("star" if i % 2 else "square")
    assert right >= 3
    before = llava.load("tiny", device="cpu", dtype=torch.float32)[0].state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor.float(), before[name])}
    part = (
        ("attention.wq.weight", "attention.wv.weight")
        if "--lora" in way
        else ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
    )
    assert changed and all(name.endswith(part) for name in changed) and set(model.state_dict()) == set(before)


def test_lora_begins_as_nothing_and_merges_to_the_same():
    model, _ = llava.load("tiny", device="cpu", dtype=torch.float64)
    ids = torch.tensor([[1, 5, 6, 7]])
    plain, names = model(ids).logits.detach(), set(model.state_dict())
    parameters = finetune.lora(model, 2)
    assert len(parameters) == 2 * 2 * len(model.llama.blocks)
    assert torch.equal(model(ids).logits, plain)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    changed = model(ids).logits.detach()
    finetune.merge_lora(model)
    assert torch.allclose(model(ids).logits, changed, atol=1e-9) and not torch.allclose(changed, plain, atol=1e-3)
    assert set(model.state_dict()) == names


def test_only_the_answer_counts(folder):
    _, processor = llava.load("tiny", device="cpu")
    rows = [*finetune.read_questions(folder)[:2], (folder / "2.png", "Is it a much longer question?", "no")]
    made = finetune.batch(processor, rows)
    for ids, labels, (_, _, answer) in zip(made["input_ids"], made["labels"], rows, strict=True):
        counted = ids[labels != -100]
        assert torch.equal(counted, labels[labels != -100]) and counted[-1] == processor.eos_id
        assert processor.decode(counted) == answer
    assert made["attention_mask"].sum(1).unique().numel() > 1


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, "there is no"),
        ("not json", "line 1, is not an object of JSON"),
        ('{"image": "0.png", "question": "?"}', "line 1, is not an object of JSON"),
        ('["0.png"]', "line 1, is not an object of JSON"),
        ('{"image": "0.png", "question": "?", "answer": ""}', "none is empty"),
        ('{"image": "0.png", "question": "?", "answer": 3}', "none is empty"),
        ('{"image": "0.png", "question": "?", "answer": "yes"}', "has 1 questions"),
        ("\n".join(['{"image": "gone.png", "question": "?", "answer": "yes"}'] * 5), "no such picture"),
        (
            "\ufeff" + "\n".join(['{"image": "gone.png", "question": "a\u2028b", "answer": "yes"}'] * 5),
            "no such picture",
        ),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, capsys, lines, said):
    if lines is not None:
        (tmp_path / "questions.jsonl").write_text(lines)
    assert finetune.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_options_and_lengths_that_would_ruin_the_model_are_refused(folder, tmp_path, capsys):
    (tmp_path / "questions.jsonl").write_bytes("Größe".encode("latin-1"))
    for arguments, said in (
        ([str(folder), "--lora", "1000"], "is no low rank"),
        ([str(folder), "--rate", "0"], "--rate is above 0"),
        ([str(tmp_path)], "is not text in UTF-8"),
    ):
        assert finetune.main([*arguments, "--out", str(tmp_path / "out"), "--epochs", "1"]) == 2
        assert said in capsys.readouterr().err
    rows = [(folder / "0.png", "word " * 600, "yes")] * 5
    with pytest.raises(ValueError, match="is too long: the model has 512 positions"):
        finetune.train(*llava.load("tiny", device="cpu"), rows)


def test_nothing_is_overwritten(folder, tmp_path, capsys):
    assert finetune.main([str(folder), "--out", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    assert finetune.main([str(folder), "--out", str(tmp_path / "new"), "--epochs", "0"]) == 2


@pytest.mark.parametrize("rank", [0, 2])
def test_training_repeats_itself_and_leaves_the_random_numbers_of_the_process_alone(folder, rank):
    rows, results, before = finetune.read_questions(folder), [], torch.get_rng_state()
    for _ in range(2):
        results.append(finetune.train(*llava.load("tiny", device="cpu"), rows, rank, epochs=1))
    assert results[0] == results[1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rules", tokenizer_files.RULES)
def test_it_trains_on_the_ids_of_the_written_conversation(folder, tmp_path, rules):
    _, processor = llava.load("tiny", device="cpu")
    processor.tokenizer = checks.Tokenizer(tokenizer_files.write(tmp_path, tokenizer_files.RULES[rules]))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    made = finetune.batch(processor, [(folder / "0.png", "What shape is it?", "star")])
    whole = reference("USER: <image>\nWhat shape is it? ASSISTANT: star</s>").input_ids
    assert made["input_ids"][0].tolist() == whole
