"""extras/finetune.py: the paper's two stages, on a folder of pictures and questions, stopped and gone on with."""

import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace

import line
import pytest
import torch
from PIL import Image, ImageDraw
from reference import ROOT, TINY, expanded
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, get_cosine_schedule_with_warmup

import llava
from extras import conversations, finetune, kept_back

sys.path.append(str(TINY))
SCRIPT = ROOT / "extras" / "finetune.py"


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


def weights_of(folder):
    return load_file(folder / "model.safetensors")


WAYS = {
    "stage 1": (["--rate", "5e-3"], ["multi_modal_projector."]),
    "stage 2": (["--stage", "2", "--rate", "1e-3"], ["multi_modal_projector.", "language_model."]),
    "lora": (["--lora", "4", "--rate", "5e-3"], ["multi_modal_projector.", "_proj.weight"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_it_learns_saves_and_loads(folder, tmp_path, capsys, way):
    out, (options, learnt) = tmp_path / "mine", WAYS[way]
    assert finetune.main([str(folder), "--out", str(out), "--epochs", "20", "--device", "cpu", *options]) == 0
    said, told = capsys.readouterr()
    assert "20 conversations to learn from; 4 questions about 4 pictures are kept back" in told  # before it trains
    assert "answered before and after: 4 answers are too few to tell\n" in told
    losses = [float(x) for x in said.splitlines()[0].replace(",", "").split() if x.replace(".", "").isdigit()]
    assert losses[1] < losses[0] / 3 and losses[3] < losses[2] / 2  # on what was kept back, too
    assert "→ 4 of 4" in said or "→ 3 of 4" in said
    assert "4 answers are too few to tell" in said
    assert said.endswith(f"each answer is in {finetune.KEPT}, beside the checkpoint\n")
    rows = [json.loads(line) for line in (out / finetune.KEPT).read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"{i}.png" for i in (4, 9, 14, 19)]
    model, processor = llava.load(str(out), device="cpu")
    for row in rows:  # what was written down is what the saved checkpoint says
        ids = model.generate(**processor.chat([("user", row["question"])], [str(folder / row["image"])]))
        assert processor.decode(ids[0]) == row["said"] and row["right"] == (row["said"] == row["answer"])
    before, after = weights_of(TINY), weights_of(out)
    changed = {name for name in after if not torch.equal(after[name].float(), before[name].float())}
    assert set(after) == set(before) and all(any(part in name for part in learnt) for name in changed)
    assert all(any(part in name for name in changed) for part in learnt)
    log = [json.loads(line) for line in (out / finetune.LOG).read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 61)) and not (out / finetune.STATE).exists()


def test_a_small_model_learns_on_one_thread(folder, tmp_path, monkeypatch):
    """On the way back, too: on a busy machine several wait for one another."""
    seen, gradients = [], finetune.gradients
    monkeypatch.setattr(finetune, "gradients", lambda *a: seen.append(torch.get_num_threads()) or gradients(*a))
    torch.set_num_threads(2)
    try:
        assert finetune.main([str(folder), "--out", str(tmp_path / "mine"), "--device", "cpu"]) == 0
    finally:
        torch.set_num_threads(1)
    assert set(seen) == {1}


def options(**changes):
    usual = {"stage": 1, "lora": 0, "rate": None, "seed": 0, "batch": 4, "accumulate": 1, "epochs": 1, "save_every": 50}
    return Namespace(**{**usual, **changes})


@pytest.mark.parametrize("changes", [{"stage": 1, "rate": 1e-3}, {"stage": 2, "lora": 2, "rate": 1e-3}], ids=str)
def test_training_repeats_itself_and_leaves_the_random_numbers_of_the_process_alone(folder, tmp_path, changes):
    examples, results = conversations.read(folder / "questions.jsonl", folder)[:10], []
    before = torch.get_rng_state()
    for n in range(2):
        (tmp_path / f"{n}").mkdir()
        model, processor = llava.load("tiny", device="cpu")
        finetune.train(model, processor, examples, options(**changes), tmp_path / f"{n}")
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------------------------------------------
# One step, against definitions and against the reference


@pytest.mark.parametrize("steps", [1, 2, 33, 34, 100])
def test_the_rate_is_that_of_the_references_schedule(steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * steps), steps)
    for step in range(steps):
        assert finetune.factor(step, steps) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_each_epoch_sees_each_example_once_in_an_order_of_its_own():
    orders = [finetune.order(40, epoch, seed) for epoch, seed in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert all(sorted(rows) == list(range(40)) for rows in orders)
    assert orders[0] == orders[3] and orders[0] != orders[1] and orders[0] != orders[2] != list(range(40))


def test_accumulated_batches_are_as_one(folder):
    """Of unequal answers: a mean of the batches' means would be another loss, and another gradient."""
    model, processor = llava.load("tiny", device="cpu", dtype=torch.float64)
    words = ["star", "a large yellow star at the top left and a small red circle in the centre", "no", "two"]
    rows = [conversations.Example(folder / f"{i}.png", [("user", "What?"), ("assistant", words[i])]) for i in range(4)]
    results = []
    for size in (4, 1, 2):
        finetune.learners(model, 1)
        model.projector.zero_grad()
        batches = [conversations.batch(processor, rows[i : i + size]) for i in range(0, 4, size)]
        loss = finetune.gradients(model, batches, torch.float64)
        results.append((loss, model.projector.linear_2.weight.grad.clone()))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)  # the loss itself is in float32
        assert (gradient - results[0][1]).norm() < 1e-6 * gradient.norm()


@pytest.mark.parametrize("stage", [1, 2])
def test_loss_and_gradients_are_those_of_the_reference(folder, stage):
    """On tiny in float64: the same batch in transformers, its own loss, its own backward pass."""
    model, processor = llava.load("tiny", device="cpu", dtype=torch.float64)
    finetune.learners(model, stage)
    made = conversations.batch(processor, conversations.read(folder / "questions.jsonl", folder)[:3])
    loss = finetune.gradients(model, [made], torch.float64)
    reference = LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float64)
    theirs = reference(**for_reference(made, model))
    theirs.loss.backward()
    assert loss == pytest.approx(theirs.loss.item(), rel=1e-6)
    compare_gradients(model, reference, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", line.LINE)
def test_each_of_the_line_is_trained_as_the_reference_is(made, tmp_path, name):
    """A batch of unequal pictures and answers, some in different numbers of tiles; stage 2 trains the newline, too."""
    model, processor = llava.load(str(made.folder(name)), device="cpu", dtype=torch.float64)
    rows = []
    for i, (size, words) in enumerate({(40, 61): "a red one", (90, 33): "no", (29, 30): "two"}.items()):
        line.photo(*size, i).save(tmp_path / f"{i}.png")
        rows.append(conversations.Example(tmp_path / f"{i}.png", [("user", "What?"), ("assistant", words)]))
    groups = finetune.learners(model, 2)
    learning = {id(p) for group in groups for p in group["params"]}
    assert model.image_newline is None or id(model.image_newline) in learning
    inputs = conversations.batch(processor, rows)
    loss = finetune.gradients(model, [inputs], torch.float64)
    ids, mask = model.prompt_ids(**{key: value for key, value in inputs.items() if key != "labels"})
    labels = torch.full_like(ids, -100)
    labels[:, -inputs["labels"].shape[1] :] = inputs["labels"]  # answers stand at the end, unchanged
    labels = labels.where(ids != model.config.image_token_index, -100)
    pictures = {"pixel_values": inputs["pixel_values"].double()}
    pictures |= {"image_sizes": inputs["image_sizes"]} if "image_sizes" in inputs else {}
    places = (mask.long().cumsum(-1) - 1).clamp(min=0)
    reference = line.reference(made.folder(name))
    theirs = reference(input_ids=ids, attention_mask=mask.long(), position_ids=places, labels=labels, **pictures).loss
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), rel=1e-6)
    compare_gradients(model, reference, 1e-6)


def for_reference(made, model):
    """A batch of ours as transformers takes it: <image> once for each feature, in ids and labels."""
    size = model.vision.grid**2
    ids, mask, _ = expanded(made["input_ids"], made["attention_mask"], size)
    grown = torch.full_like(ids, -100)
    for row, labels in zip(grown, made["labels"], strict=True):  # answers stand at the end, unchanged
        row[len(row) - len(labels) :] = labels
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": made["pixel_values"], "labels": grown}


def compare_gradients(model, reference, bound):
    theirs = {llava.weights.our_name(name): p for name, p in reference.named_parameters()}
    checked = 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            far = (p.grad - theirs[name].grad).norm() / theirs[name].grad.norm()
            assert far < bound, (name, far)
            checked += 1
    assert checked >= 4


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="needs the reference's Trainer: pip install accelerate"
)
@pytest.mark.parametrize("stage", [1, 2])
def test_three_steps_of_the_references_trainer_are_ours(folder, tmp_path, stage):
    """The same batches in the same order, two accumulated to a step: losses of three steps and gradients of the third,
    after two steps of AdamW with warm-up, cosine and clipping.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    examples = conversations.read(folder / "questions.jsonl", folder)[:12]
    words = ["star", "a large yellow star at the top left", "no", "two", "middle left", "yes"]
    for i, x in enumerate(examples):
        x.turns[1] = ("assistant", words[i % 6])
    model, processor = llava.load("tiny", device="cpu", dtype=torch.float32)
    rows = finetune.order(12, 0, 0)
    made = [for_reference(conversations.batch(processor, [examples[k]]), model) for k in rows]
    ours = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            ours["theirs"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def collate(parts):
        longest = max(part["input_ids"].shape[1] for part in parts)
        fill = {"input_ids": model.config.padding, "attention_mask": 0, "labels": -100}
        grown = {name: torch.cat([torch.nn.functional.pad(part[name], (longest - part[name].shape[1], 0), value=value)
                                  for part in parts]) for name, value in fill.items()}  # fmt: skip
        return grown | {"pixel_values": torch.cat([part["pixel_values"] for part in parts])}

    reference = LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    for name, p in reference.named_parameters():
        part = name.removeprefix("model.").split(".")[0]
        p.requires_grad_(part == "multi_modal_projector" or (stage == 2 and part in ("language_model", "lm_head")))
    arguments = TrainingArguments(
        str(tmp_path / "theirs"), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=1, max_grad_norm=1.0, weight_decay=0.0,
        optim="adamw_torch", logging_steps=1, report_to=[], use_cpu=True, remove_unused_columns=False,
        save_strategy="no", disable_tqdm=True, dataloader_drop_last=False,
    )  # fmt: skip
    trainer = InOrder(reference, arguments, train_dataset=made, data_collator=collate, callbacks=[Keep()])
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]

    (tmp_path / "ours").mkdir()
    finetune.train(
        model, processor, examples, options(stage=stage, rate=1e-3, batch=2, accumulate=2), tmp_path / "ours"
    )
    log = [json.loads(line) for line in (tmp_path / "ours" / finetune.LOG).read_text().splitlines()]
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-4)
    assert len(losses) == 3 and losses[0] != losses[1]
    theirs = {llava.weights.our_name(name): p for name, p in reference.named_parameters()}
    gradients = {llava.weights.our_name(name): grad for name, grad in ours["theirs"].items()}
    checked = 0
    for name, p in model.named_parameters():
        if name in gradients:
            assert (p.grad - gradients[name]).norm() <= 2e-3 * gradients[name].norm() + 1e-7, name
            assert (p - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name
            checked += 1
    assert checked == (4 if stage == 1 else 4 + 3 + 9 * len(model.llama.blocks))


# ----------------------------------------------------------------------------------------------------------------
# Stopped, and gone on with


def command(folder, out, *more):
    return [str(folder), "--out", str(out), "--epochs", "3", "--rate", "5e-3", "--save-every", "2", "--device", "cpu",
            "--batch", "4", *more]  # fmt: skip


def stopped_at(monkeypatch, step):
    """Let gradients raise what Ctrl-C raises at one step."""
    count, real = [0], finetune.gradients

    def gradients(*args):
        count[0] += 1
        if count[0] == step:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(finetune, "gradients", gradients)


@pytest.mark.slow
@pytest.mark.parametrize("way", [["--stage", "1"], ["--lora", "2"]], ids=["projector", "lora"])
def test_a_stopped_run_goes_on_to_the_same_weights(folder, tmp_path, capsys, monkeypatch, way):
    assert finetune.main(command(folder, tmp_path / "whole", *way)) == 0
    whole = capsys.readouterr().out
    for step in (1, 6):  # before the first step, and between two saves
        with monkeypatch.context() as patch:
            stopped_at(patch, step)
            assert finetune.main(command(folder, tmp_path / "parts", *way, *["--resume"] * (step > 1))) == 130
            assert "--resume" in capsys.readouterr().err
    assert finetune.main(command(folder, tmp_path / "parts", *way, "--resume")) == 0
    assert capsys.readouterr().out == whole
    expected, found = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    logs = [(tmp_path / name / finetune.LOG).read_text().splitlines() for name in ("whole", "parts")]
    for a, b in zip(*logs, strict=True):
        a, b = json.loads(a), json.loads(b)
        assert (a["step"], a["loss"], a["rate"]) == (b["step"], b["loss"], b["rate"])
    assert finetune.main(command(folder, tmp_path / "parts", *way, "--resume")) == 2
    assert "is complete already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_is_killed_at_three_random_moments_ends_with_the_same_weights(folder, tmp_path):
    """As a process, with a signal that nothing can catch; each time it goes on by the same command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def start(out):
        arguments = [sys.executable, str(SCRIPT), *command(folder, out, "--epochs", "12", "--resume")]
        return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()
    log, killed, reached = tmp_path / "parts" / finetune.LOG, 0, 0
    for share in sorted(random.sample(range(5, 95), 3)):  # of the steps, whatever the machine's speed
        process = start(tmp_path / "parts")
        while process.poll() is None and reached < share * 60 / 100:
            time.sleep(0.01)
            reached = len(log.read_text().splitlines()) if log.exists() else 0
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    last = start(tmp_path / "parts")
    assert last.wait() == 0, last.stderr.read()
    assert killed == 3 and last.stdout.read() == whole.stdout.read()
    expected, found = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_goes_on_with_the_options_that_it_began_with(folder, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        stopped_at(patch, 4)
        assert finetune.main(command(folder, tmp_path / "out")) == 130
    assert finetune.main(command(folder, tmp_path / "out")) == 2
    assert "is there already" in capsys.readouterr().err
    assert finetune.main(command(folder, tmp_path / "out", "--resume", "--batch", "3")) == 2
    assert "--resume: batch is 3 and was 4 when the run began" in capsys.readouterr().err
    (tmp_path / "out" / finetune.STATE).write_bytes(b"\x08" + bytes(15))
    assert finetune.main(command(folder, tmp_path / "out", "--resume")) == 2
    assert "is damaged: delete" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, "there is no"),
        ("not json", "line 1, is not an object of JSON"),
        ('{"image": "0.png", "question": "?", "answer": "yes"}', "there are 1 pictures"),
        ("\n".join(f'{{"image": "{i}.png", "question": "?", "answer": "yes"}}' for i in range(5)), "no such picture"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, capsys, lines, said):
    if lines is not None:
        (tmp_path / "questions.jsonl").write_text(lines)
    assert finetune.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_options_that_would_ruin_the_model_are_refused(folder, tmp_path, capsys):
    file = str(folder / "questions.jsonl")
    for arguments, said in (
        ([str(folder), "--lora", "1000"], "is no low rank"),
        ([str(folder), "--rate", "0"], "--rate is above 0"),
        ([str(folder), "--rate", "nan"], "--rate is above 0"),
        ([str(folder), "--epochs", "0"], "are at least 1"),
        ([str(folder), "--stage", "1", "--lora", "2"], "--lora belongs to stage 2"),
        ([str(folder), "--dtype", "float16"], "gradients overflow in float16"),
        (["--data", file], "give --data and --images"),
        ([], "give --data and --images"),
        ([str(folder), "--data", file, "--images", str(folder)], "give --data and --images"),
    ):
        assert finetune.main([*arguments, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_nothing_is_overwritten(folder, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    for more in ([], ["--resume"]):
        assert finetune.main([str(folder), "--out", str(tmp_path), *more]) == 2
        assert "is there already" in capsys.readouterr().err and [x.name for x in tmp_path.iterdir()] == ["mine"]


def test_the_form_with_a_file_and_a_folder_is_the_same_as_the_short_one(folder):
    long = ["--data", str(folder / "questions.jsonl"), "--images", str(folder), "--stage", "1", "--out", "x"]
    settled = []
    for arguments in (long, [str(folder), "--out", "x"]):
        settled.append(finetune.make_parser().parse_args(arguments))
        finetune.settle(settled[-1])
    assert {**vars(settled[0]), "folder": None} == {**vars(settled[1]), "folder": None}


def test_in_bfloat16_what_learns_is_kept_in_float32(folder, tmp_path):
    examples = conversations.read(folder / "questions.jsonl", folder)[:4]
    model, processor = llava.load("tiny", device="cpu", dtype=torch.bfloat16)
    finetune.train(model, processor, examples, options(rate=1e-3), tmp_path)
    kept = load_file(tmp_path / finetune.STATE)
    assert {x.dtype for name, x in kept.items()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert kept_back.answers(model, processor, kept_back.questions(examples[:1]))


def test_words_without_a_picture_are_trained_on_in_stage_2(folder, tmp_path):
    model, processor = llava.load("tiny", device="cpu", dtype=torch.float32)
    before = model.llama.head.weight.clone()
    words = [conversations.Example(None, [("user", "What is this?"), ("assistant", "star")])]
    finetune.train(model, processor, words, options(stage=2, batch=1, epochs=2, rate=1e-3), tmp_path)
    assert not torch.equal(model.llama.head.weight, before)
