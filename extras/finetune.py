"""Train a checkpoint on pictures with questions and answers, in the paper's two stages.

    python extras/finetune.py FOLDER --out MINE --epochs 20
    python extras/finetune.py --model MODEL --data FILE --images FOLDER --stage 1 --out FIRST
    python extras/finetune.py --model FIRST --data FILE --images FOLDER --stage 2 --lora 16 --out SECOND

Then `llava.py --model MINE` answers. The first form: FOLDER holds pictures and a file questions.jsonl, a line for each
question; extras/conversations.py says what a line looks like. The authors' own JSON is read, too.

    stage                what learns                                    rate    (Liu et al. 2023, section 4.2, and
    1                    the projector alone                            1e-3    "Improved Baselines", table 9)
    2                    projector and language model                   2e-5
    2 with --lora RANK   projector, and a change of low rank in the     2e-4    the projector 2e-5
                         matrices of the language model

The vision tower stays as it is. The loss is on answers alone. Every fifth picture is kept back: what the model answers
about those, before and after, says whether something was learnt or only memorised (extras/kept_back.py). What is
written is a whole checkpoint in the published layout; LoRA is merged into the weights before. While it trains, --out
holds what --resume goes on from, whenever it was stopped: the end is the same, to the last bit on the same machine.
"""

import argparse
import contextlib
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import llava
from extras import conversations, kept_back, lora, threads
from extras.cli import fail, notice

RATES = {"projector": 1e-3, "language model": 2e-5, "lora": 2e-4}
WARM_UP = 0.03  # of the steps
CLIP = 1.0
STATE, LOG, KEPT = "training.safetensors", "training.jsonl", "kept_back.jsonl"  # in --out, while and after it trains
SAME = ("model", "stage", "lora", "epochs", "batch", "accumulate", "rate", "seed", "dtype")  # options to go on with

# ----------------------------------------------------------------------------------------------------------------
# What learns, and how fast


def learners(model, stage, rank=0, rate=None, seed=0):
    """Freeze all but what a stage trains, and keep that in float32 at least → [{"params": […], "peak": rate}, …].

    rate: None: the paper's; otherwise for everything. Raises ValueError for a rank that is none.
    """
    model.requires_grad_(False)
    groups = [(list(model.projector.parameters()), RATES["projector"] if stage == 1 else RATES["language model"])]
    if rank:
        groups.append((lora.add(model, rank, torch.Generator().manual_seed(seed)), RATES["lora"]))
    elif stage == 2:  # with the newline of pictures in tiles, which stands where words do
        newline = [] if model.image_newline is None else [model.image_newline]
        groups.append(([*model.llama.parameters(), *newline], RATES["language model"]))
    for parameters, _ in groups:
        for parameter in parameters:  # 16 bits are too coarse for small steps
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(True)
    return [{"params": parameters, "peak": usual if rate is None else rate} for parameters, usual in groups]


def factor(step, steps):
    """What the learning rate of step 0 … steps - 1 is multiplied by: a linear warm-up from 0, then half a cosine
    (transformers' get_cosine_schedule_with_warmup).
    """
    warm = math.ceil(WARM_UP * steps)
    return step / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def order(number, epoch, seed):
    """The order of so many examples in an epoch: the same whenever it is asked for, so that a run can go on from it."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


# ----------------------------------------------------------------------------------------------------------------
# One step


def forward(model, inputs, dtype):
    """The mean loss over the counted tokens; in bfloat16 where the model is loaded so, the sums in float32."""
    with torch.autocast(model.device.type, dtype, enabled=dtype == torch.bfloat16):
        return model(**inputs).loss


def gradients(model, batches, dtype):
    """Gradients of one step into .grad, from several batches that are as one → the loss, the mean over all tokens.

    Each batch counts by its number of tokens, as in the reference's Trainer (num_items_in_batch): a mean of means would
    weigh short answers more.
    """
    tokens = [conversations.counted(inputs["labels"]) for inputs in batches]
    total = 0.0
    for inputs, number in zip(batches, tokens, strict=True):
        loss = forward(model, inputs, dtype) * (number / sum(tokens))
        if loss.requires_grad:  # in stage 1 words without a picture teach nothing
            loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def mean_loss(model, processor, examples, size, dtype):
    """The loss over all answers of the examples."""
    total, count = 0.0, 0
    for i in range(0, len(examples), size):
        inputs = conversations.batch(processor, examples[i : i + size])
        number = conversations.counted(inputs["labels"])
        total, count = total + forward(model, inputs, dtype).item() * number, count + number
    return total / count


# ----------------------------------------------------------------------------------------------------------------
# A run that can be stopped at any moment


def save_state(file, model, optimizer, about):
    """What learns and its optimizer's memory into a file, whole or not at all. about: JSON to find there again."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    tensors = {f"parameter {name}": p.detach().contiguous() for name, p in learning}
    for name, p in learning:
        tensors |= {f"{key} {name}": x.contiguous() for key, x in optimizer.state.get(p, {}).items()}
    new = file.with_name(file.name + ".new")
    save_file(tensors, new, metadata={"about": json.dumps(about)})
    new.replace(file)


@torch.no_grad()
def load_state(file, model, optimizer):
    """Put back what save_state wrote. Its JSON is read before, by about_state."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with safe_open(file, framework="pt") as tensors:
        for full in tensors.keys():  # noqa: SIM118
            key, _, name = full.partition(" ")
            x, p = tensors.get_tensor(full), learning[name]
            if key == "parameter":
                p.copy_(x)
            else:
                optimizer.state[p][key] = x if key == "step" else x.to(p.device)


def about_state(file, options):
    """The JSON in a state, None if there is none. Raises ValueError if the run was begun with other options."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as tensors:
            about = json.loads(tensors.metadata()["about"])
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise ValueError(f"{file} is damaged: delete {file.parent} and begin again") from None
    for name, value in options.items():
        if about["options"].get(name) != value:
            was = about["options"].get(name)
            raise ValueError(f"--resume: {name} is {value!r} and was {was!r} when the run began: it takes the same")
    return about


def begin(model, optimizer, out, resume):
    """The JSON of the state that is gone on from, with its parts put in place; that of a new run has step 0."""
    if resume is None:
        return {"step": 0, "seconds": 0.0}
    load_state(out / STATE, model, optimizer)
    if (out / LOG).exists():  # what came behind the state is done again
        lines = (out / LOG).read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= resume["step"]]
        (out / LOG).write_text("".join(kept), encoding="utf-8")
    return resume


def train(model, processor, taught, options, out, resume=None, facts=None):
    """Train on [Example, …] and keep what a stopped run goes on from in the folder `out`.

    options: what main parses. resume: the JSON of a state to go on from. facts: JSON kept in it.
    """
    dtype, size = model.dtype, options.batch * options.accumulate
    groups = learners(model, options.stage, options.lora, options.rate, options.seed)
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
    model.gradient_checkpointing = model.device.type == "cuda"
    at = begin(model, optimizer, out, resume)
    per_epoch = -(-len(taught) // size)
    steps, began = options.epochs * per_epoch, time.time() - at["seconds"]
    with open(out / LOG, "a", encoding="utf-8") as log, bar(steps, at["step"]) as shown:
        for step in range(at["step"], steps):
            if step == 0:
                save_state(out / STATE, model, optimizer, {"step": 0, "seconds": 0.0, **(facts or {})})
            rows = order(len(taught), step // per_epoch, options.seed)[step % per_epoch * size :][:size]
            chosen = [[taught[k] for k in rows[i : i + options.batch]] for i in range(0, len(rows), options.batch)]
            optimizer.zero_grad()
            loss = gradients(model, [conversations.batch(processor, part) for part in chosen], dtype)
            nn.utils.clip_grad_norm_(parameters, CLIP)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor(step, steps)
            optimizer.step()
            seconds = time.time() - began
            line = {"step": step + 1, "loss": loss, "rate": optimizer.param_groups[0]["lr"], "seconds": seconds}
            print(json.dumps(line), file=log, flush=True)
            shown.set_postfix(loss=f"{loss:.3f}")
            shown.update()
            if (step + 1) % options.save_every == 0 or step + 1 == steps:
                about = {"step": step + 1, "seconds": seconds, **(facts or {})}
                save_state(out / STATE, model, optimizer, about)
    lora.merge(model)
    model.to(dtype)
    model.gradient_checkpointing = False


def bar(steps, done):
    """How far it is, with rate and time left, on stderr if that is a terminal."""
    from huggingface_hub.utils import tqdm

    return tqdm(total=steps, initial=done, unit="step", disable=None)


# ----------------------------------------------------------------------------------------------------------------
# The command


def measure(model, processor, taught, kept, asked, options):
    """(loss on what is trained on, loss on what is kept back, answers to what is kept back)."""
    losses = [mean_loss(model, processor, rows, options.batch, model.dtype) for rows in (taught, kept)]
    return *losses, kept_back.answers(model, processor, asked, options.batch)


def announce(taught, asked):
    """Say what comes before the training, which takes time in silence, and whether it will tell anything."""
    about = kept_back.pictures(asked)
    few = kept_back.too_few(len(asked), about)
    notice(
        f"{len(taught)} conversations to learn from; {len(asked)} questions about {about} pictures are kept back, and "
        f"answered before and after{'' if few is None else f': {few}'}"
    )


def run(options):
    """The command, its options settled. Raises ValueError or OSError with a complete message."""
    out, data, images = Path(options.out), Path(options.data), Path(options.images)
    examples = conversations.read(data, images)
    taught, kept = conversations.split(examples)
    if options.stage == 1:
        taught = [x for x in taught if x.image is not None]  # without a picture the projector takes no part
    settings = {name: getattr(options, name) for name in SAME}
    settings["data"] = hashlib.sha256(data.read_bytes()).hexdigest()
    resume = about_state(out / STATE, settings) if options.resume else None
    begun = {LOG, f"{STATE}.new"}  # all that is there if it was stopped before the first save
    if resume is None and out.exists() and not (options.resume and begun.issuperset(x.name for x in out.iterdir())):
        whole = options.resume and (out / "config.json").exists()
        raise ValueError(f"{out} is {'complete' if whole else 'there'} already: name a new folder")
    model, processor = llava.load(options.model, device=options.device, dtype=options.dtype)
    if sum(p.numel() for p in model.parameters()) < threads.SMALL:
        torch.set_num_threads(1)  # of the way back, too, and of the optimizer
    if model.dtype == torch.float16:
        raise ValueError("gradients overflow in float16: give --dtype bfloat16 or float32")
    conversations.check(model, processor, examples)
    asked = kept_back.questions(kept)
    announce(taught, asked)
    if resume is None:
        lora.check(model, options.lora)  # before anything is written
        before = measure(model, processor, taught, kept, asked, options)
        out.mkdir(parents=True, exist_ok=True)
    else:
        before = resume["before"]
    train(model, processor, taught, options, out, resume, {"options": settings, "before": before})
    after = measure(model, processor, taught, kept, asked, options)
    blind = kept_back.shuffled(asked, [x.image for x in taught if x.image is not None])
    other = kept_back.answers(model, processor, blind, options.batch)
    kept_back.write(out / KEPT, asked, after[2], other)
    llava.save(model, processor, out)
    (out / STATE).unlink()  # last: until then the same command goes on
    print(
        f"loss on what was trained: {before[0]:.3f} → {after[0]:.3f}, "
        f"on what was kept back: {before[1]:.3f} → {after[1]:.3f}"
    )
    right = [kept_back.right(asked, said) for said in (before[2], after[2], other)]
    print(kept_back.verdict(len(asked), *right, kept_back.pictures(asked)))
    print(f"each answer is in {KEPT}, beside the checkpoint")


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("folder", nargs="?", help="short for --data FOLDER/questions.jsonl --images FOLDER")
    add("--out", required=True, metavar="FOLDER", help="where the checkpoint goes; it must not be there yet")
    add("--model", default="tiny", help="what to begin with: tiny (default), a folder, or a Hub id")
    add("--data", metavar="FILE", help="questions and answers: JSON, or an object a line")
    add("--images", metavar="FOLDER", help="where the pictures are")
    add("--stage", type=int, choices=(1, 2), help="of the paper (default: 1, with --lora 2)")
    add("--lora", type=int, default=0, metavar="RANK", help="in stage 2, train changes of this rank alone")
    add("--epochs", type=int, default=1, help="how often each question is seen (default: %(default)s, the paper's)")
    add("--batch", type=int, default=8, help="conversations side by side (default: %(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches that make one step (default: %(default)s)")
    add("--rate", type=float, help="learning rate, of everything (default: the paper's; tiny likes more)")
    add("--seed", type=int, default=0, help="of the order, and of LoRA's beginning (default: %(default)s)")
    add("--save-every", type=int, default=50, metavar="N", help="steps between two saves (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add("--device", default="auto")
    add("--dtype", default="float32", help="float32 (default), or bfloat16 for a large model on a GPU")
    return parser


def main(arguments=None):
    options = make_parser().parse_args(arguments)
    try:
        settle(options)
        run(options)
    except (ValueError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        with contextlib.suppress(Exception):
            notice(f"stopped; with --resume the same command goes on from the last save in {options.out}")
        return 130
    return 0


def settle(options):
    """What was left out follows from the rest. Raises ValueError for what does not go together."""
    if options.folder is not None and options.data is None and options.images is None:
        options.data, options.images = str(Path(options.folder) / "questions.jsonl"), options.folder
    elif options.folder is not None or options.data is None or options.images is None:
        raise ValueError("give --data and --images, or a folder that holds pictures and questions.jsonl")
    options.stage = options.stage or (2 if options.lora else 1)
    if options.stage == 1 and options.lora:
        raise ValueError("--lora belongs to stage 2: stage 1 trains the projector alone")
    if min(options.epochs, options.batch, options.accumulate, options.save_every) < 1 or options.lora < 0:
        raise ValueError("--epochs, --batch, --accumulate and --save-every are at least 1, --lora is not negative")
    if options.rate is not None and not 0 < options.rate < math.inf:
        raise ValueError("--rate is above 0")


if __name__ == "__main__":
    sys.exit(main())
