"""Teach a checkpoint about pictures of your own: the projector alone, or LoRA.

    python extras/finetune.py FOLDER --out MINE
    python extras/finetune.py FOLDER --out MINE --model llava-hf/llava-1.5-7b-hf --lora 16 --device cuda

Then `llava.py --model MINE` answers. FOLDER holds pictures and a file questions.jsonl, a line for each question:

    {"image": "1.png", "question": "What shape is it?", "answer": "star"}

Every fifth line is kept back: the loss on those says whether something was learnt or only memorised. What is written is
a whole checkpoint in the published layout; LoRA (Hu et al. 2021) is merged into the weights before. Both ends stay as
they are, but for the low-rank change, as in the first stage of the paper (Liu et al. 2023, section 4.2). So it can
learn to see something new, and to say it in words that the language model has already: tiny has few.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import llava
from extras.cli import fail
from extras.intake import open_image
from extras.turn import context

HELD_BACK = 5  # one line in so many is not trained on
EXAMPLE = next(line.strip() for line in __doc__.splitlines() if "{" in line)


class LowRank(nn.Module):
    """W → W + B A, with A (rank, in) random and B (out, rank) zero: it begins as W (Hu et al. 2021, section 4.1)."""

    def __init__(self, weight, rank, generator=None):
        super().__init__()
        drawn = torch.randn(rank, weight.shape[1], generator=generator, dtype=torch.float32)
        self.a = nn.Parameter((drawn * weight.shape[1] ** -0.5).to(weight.device))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device, dtype=torch.float32))

    def forward(self, weight):
        return weight + (self.b @ self.a).to(weight.dtype)


def lora(model, rank, generator=None):
    """Give queries and values of each block of the decoder a change of low rank → its parameters, to be trained."""
    if rank > min(min(block.attention.wv.weight.shape) for block in model.llama.blocks):
        raise ValueError(f"--lora {rank} is no low rank: the matrices themselves have fewer columns")
    linears = [getattr(block.attention, name) for block in model.llama.blocks for name in ("wq", "wv")]
    for linear in linears:
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank, generator), unsafe=True)
    return [p for linear in linears for p in linear.parametrizations.weight[0].parameters()]


def merge_lora(model):
    """Put the changes into the weights, which are then plain parameters again."""
    for block in model.llama.blocks:
        for linear in (block.attention.wq, block.attention.wv):
            if parametrize.is_parametrized(linear):
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def read_questions(folder):
    """questions.jsonl → [(picture's path, question, answer), ...]. Raises ValueError or OSError."""
    file = Path(folder) / "questions.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}: a line for each question, such as {EXAMPLE}")
    rows = []
    try:
        # not splitlines, which also splits where JSON does not
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not text in UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, question, answer = (row[name] for name in ("image", "question", "answer"))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{file}, line {number}, is not an object of JSON with image, question and answer"
            ) from None
        if not all(isinstance(value, str) and value.strip() for value in (image, question, answer)):
            raise ValueError(f"{file}, line {number}: image, question and answer are text, and none is empty")
        rows.append((Path(folder) / image, question, answer))
    if len(rows) < HELD_BACK:
        raise ValueError(
            f"{file} has {len(rows)} questions, and it takes at least {HELD_BACK}: one of them is kept back"
        )
    return rows


def batch(processor, rows):
    """Questions with their answers → inputs and labels; only the answer and its end count. Padded on the left."""
    images = [open_image(image) for image, _, _ in rows]
    prompts, whole = [], []
    for _, question, answer in rows:
        asked = [("user", question)]
        prompts.append(encoded(processor, asked))
        whole.append(encoded(processor, [*asked, ("assistant", answer)]))
    inputs = processor.prepare(whole, images)
    labels = torch.full_like(inputs["input_ids"], -100)
    for i, (prompt, ids) in enumerate(zip(prompts, whole, strict=True)):
        shared = next((k for k, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
        labels[i, labels.shape[1] - len(ids) + shared :] = torch.tensor(ids[shared:])
    return inputs | {"labels": labels}


def encoded(processor, turns):
    """The ids of a conversation about one picture."""
    return processor.tokenizer.bos + processor.tokenizer.encode_pieces(processor.pieces(turns, 1))


@torch.no_grad()
def mean_loss(model, processor, rows, size):
    """The loss over all rows."""
    losses = [model(**batch(processor, rows[i : i + size])).loss for i in range(0, len(rows), size)]
    return torch.stack(losses).mean().item()


def train(model, processor, rows, rank=0, epochs=20, size=8, rate=None, seed=0):
    """Train the projector, or with a rank above 0 LoRA → (losses before, after), each of (trained on, kept back)."""
    kept, taught = rows[HELD_BACK - 1 :: HELD_BACK], [row for i, row in enumerate(rows, start=1) if i % HELD_BACK]
    for image, question, answer in rows:
        inputs = batch(processor, [(image, question, answer)])
        del inputs["labels"]
        if model.expanded(**inputs)[0].shape[1] > context(model):
            raise ValueError(f"the question about {image} is too long: the model has {context(model)} positions")
    generator = torch.Generator().manual_seed(seed)  # of its own: that of the process is the caller's
    model.requires_grad_(False)
    model.gradient_checkpointing = model.device.type == "cuda"
    parameters = lora(model, rank, generator) if rank else list(model.projector.requires_grad_(True).parameters())
    before = mean_loss(model, processor, taught, size), mean_loss(model, processor, kept, size)
    optimizer = torch.optim.AdamW(parameters, lr=(1e-3 if rank else 2e-3) if rate is None else rate, weight_decay=0.0)
    steps = epochs * -(-len(taught) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, optimizer.param_groups[0]["lr"], total_steps=max(2, steps), pct_start=0.1
    )
    for _ in range(epochs):
        order = torch.randperm(len(taught), generator=generator).tolist()
        for i in range(0, len(taught), size):
            optimizer.zero_grad()
            model(**batch(processor, [taught[k] for k in order[i : i + size]])).loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    if rank:
        merge_lora(model)
    model.gradient_checkpointing = False
    return before, (mean_loss(model, processor, taught, size), mean_loss(model, processor, kept, size))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="pictures, and questions.jsonl")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="where the checkpoint goes; it must not be there yet"
    )
    parser.add_argument("--model", default="tiny", help="what to begin with: tiny (default), a folder, or a Hub id")
    parser.add_argument(
        "--lora", type=int, default=0, metavar="RANK", help="train a change of this rank instead of the projector"
    )
    parser.add_argument("--epochs", type=int, default=20, help="how often each question is seen (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="questions a step (default: %(default)s)")
    parser.add_argument("--rate", type=float, help="learning rate (default: 2e-3, with --lora 1e-3; tiny likes more)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", help="float32 (default), or bfloat16 for a large model on a GPU")
    options = parser.parse_args(arguments)
    try:
        if Path(options.out).exists():
            raise ValueError(f"{options.out} is there already: name a new folder")
        if (
            min(options.epochs, options.batch) < 1
            or options.lora < 0
            or (options.rate is not None and options.rate <= 0)
        ):
            raise ValueError("--epochs and --batch are at least 1, --lora is not negative, and --rate is above 0")
        rows = read_questions(options.folder)
        for image, _, _ in rows:  # before anything is loaded
            open_image(image)
        model, processor = llava.load(options.model, device=options.device, dtype=options.dtype)
        before, after = train(model, processor, rows, options.lora, options.epochs, options.batch, options.rate)
        llava.save(model, processor, options.out)
    except (ValueError, OSError) as error:
        return fail(error)
    trained, kept = zip(before, after, strict=True)
    print(
        f"loss on what was trained: {trained[0]:.3f} → {trained[1]:.3f}, "
        f"on what was kept back: {kept[0]:.3f} → {kept[1]:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
