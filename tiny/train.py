"""Trains tiny in LLaVA's stages, from random numbers to a checkpoint in the published layout.

    python tiny/train.py                      # both parts, into tiny/new
    python tiny/train.py --scale 0.02         # a short run, to watch the stages go by
    python tiny/train.py --resume             # goes on where a run was cut off
    python tiny/train.py --talk FOLDER        # part 2 alone, from a checkpoint that part 1 has made

    part   stage       what learns            what it is shown
    1      eye         the vision tower       pictures: each patch says what covers it (by four heads, thrown away
                                              later)
    1      voice       Llama                  text: a scene in words, a question, its answer
    1      projector   the projector alone    pictures, questions and answers; both ends are frozen
    1      all         everything             the same
    2      talk        projector and Llama    talks (talks.py): several questions, one picture or two, a system
                                              sentence, things that are missing or in doubt

    letter   meaning
    N, P     pictures, patches of a picture
    B, T     questions, positions
    D, V     width, vocabulary
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from extras.beams import fork_cache  # noqa: E402
from llama import TextConfig, Tokenizer  # noqa: E402
from llava import Llava, LlavaConfig, Processor, load, save  # noqa: E402
from vision import PreprocessConfig, VisionConfig, preprocess  # noqa: E402

import scenes  # noqa: E402
import talks  # noqa: E402
from evaluate import evaluate  # noqa: E402

# how many questions of each kind about each scene, beside describing it: more of what is learnt late
WANTED = {"colour": 1, "shape": 2, "count": 2, "where": 4, "relation": 4, "yes/no": 4}
STAGES = {  # steps, scenes a step, learning rate
    "eye": (1500, 16, 2e-3),
    "voice": (800, 8, 2e-3),
    "projector": (200, 8, 2e-3),
    "all": (8000, 8, 2e-3),
    "talk": (6000, 8, 8e-4),
}
PART_1 = "all"  # its last stage
LENGTHS = (224, 416, 416)  # how long the talks of a step are, about, in positions
POSITIONS = 2000  # of all talks of a step
DOUBT = 0.3  # of the steps have a talk about what is in doubt
WARM_UP, WEIGHT_DECAY, CLIP = 100, 0.05, 1.0
FADE = 1 / 10  # the share of part 2 in which its rate goes down to zero
LOG_EVERY, SAVE_EVERY = 50, 100

VISION = VisionConfig(image_size=56, patch_size=8, hidden_size=96, intermediate_size=384, num_hidden_layers=5,
                      num_attention_heads=4)
TEXT = TextConfig(vocab_size=640, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
                  max_position_embeddings=512, rms_norm_eps=1e-5)
DESCRIPTION = (
    "tiny: 1.6 million parameters, trained on drawings of coloured shapes; about a photograph it talks nonsense"
)
PICTURE = PreprocessConfig(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})

# ----------------------------------------------------------------------------------------------------------------
# From scenes to tensors


def draw(rng, number, strange=False):
    """Fresh scenes, none with a held-out pair → [things, ...], pixel values (N, 3, H, W)."""
    worlds = [scenes.arrange(rng) for _ in range(number)]
    return worlds, torch.stack([preprocess(scenes.paint(rng, things, strange=strange), PICTURE) for things in worlds])


def ask(rng, things):
    """Questions about one scene → [(kind, question, answer), ...]: first describe, then those WANTED of each kind.

    As many for each scene, although a lone thing has no relation to anything: another kind takes its place.
    """
    kinds = ["describe", *(kind for kind, number in WANTED.items() for _ in range(number))]
    kinds = [rng.choice(("where", "yes/no")) if kind == "relation" and len(things) == 1 else kind for kind in kinds]
    return [(kind, *scenes.ASK[kind](rng, things, rng.choice(things), scenes.SEEN)) for kind in kinds]


ATTRIBUTES = {"colour": list(scenes.COLOURS), "shape": list(scenes.SHAPES), "size": list(scenes.SIZES),
              "place": list(scenes.PLACES)}


def patch_targets(things, grid):
    """What each patch shows, (P, attributes): 1 + the index of the value, 0 for background, -100 for a thing's edge."""
    middles = (torch.arange(grid) + 0.5) / grid  # (grid)
    targets = torch.zeros(grid, grid, len(ATTRIBUTES), dtype=torch.long)
    for thing in things:
        far = torch.maximum((middles - thing.y).abs()[:, None], (middles - thing.x).abs())  # (grid, grid)
        values = torch.tensor([1 + values.index(getattr(thing, name)) for name, values in ATTRIBUTES.items()])
        targets[far < thing.diameter / 2 + 0.5 / grid] = -100
        targets[far < max(0.5 / grid, 0.3 * thing.diameter)] = values  # at least the patch that holds its centre
    return targets.flatten(0, 1)


def encode(tokenizer, context, question, answer):
    """What follows the context in a conversation → its ids, and its labels: those of the answer and of </s> only."""
    prompt = f"USER: {context}\n{question} ASSISTANT:"
    texts = f"USER: {context}\n", prompt, f"{prompt} {answer}</s>"
    before, prompt_ids, ids = (tokenizer.encode(text) for text in texts)
    labels = [-100] * len(prompt_ids) + ids[len(prompt_ids) :]
    return ids[len(before) :], labels[len(before) :]


def pad(rows, value, device):
    """Lists of different lengths → (B, T), filled on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)


# ----------------------------------------------------------------------------------------------------------------
# One step of each stage: → loss, and for each answer (or patch) whether it is right


def right(logits, labels):
    """(B, T, V), (B, T) → (B,) bool: is every word of the answer the likeliest one, given those before it?"""
    guess, wanted = logits[:, :-1].argmax(-1), labels[:, 1:]
    return ((guess == wanted) | (wanted == -100)).all(1)


def see(model, heads, rng, worlds, pixels, device):
    """What LLaVA reads of N pictures: one block before the tower's end, without the class token → (N, P, D).
    And how well the heads tell from each patch what covers it: loss, correct.

    The heads are shown as many pictures again in colours that have no name. Otherwise the eye learns each shape once
    for each colour that it has seen it in, and takes a shape in a new colour for another one.
    """
    number = len(worlds)
    strange, more = draw(rng, number, strange=True)
    worlds, pixels = worlds + strange, torch.cat([pixels, more])
    (x,) = model.vision(pixels.to(device), [model.config.vision_feature_layer])
    x = x[:, 1:]  # (N, P, D)
    targets = torch.stack([patch_targets(things, model.vision.grid) for things in worlds])  # (2 N, P, attributes)
    colours = targets[number:, :, 0]
    colours[colours > 0] = -100
    targets = targets.to(device)
    logits = [head(x) for head in heads]  # (2 N, P, values + 1) each
    loss = sum(F.cross_entropy(logit.flatten(0, 1), targets[..., i].flatten()) for i, logit in enumerate(logits))
    guess = torch.stack([logit.argmax(-1) for logit in logits], -1)  # (2 N, P, attributes)
    return x[:number], loss, ((guess == targets) | (targets == -100)).all(-1)[targets[..., 1] > 0]


def eye_step(model, heads, processor, rng, number, device):
    worlds, pixels = draw(rng, number)
    _, loss, correct = see(model, heads, rng, worlds, pixels, device)
    return loss, correct


def voice_step(model, heads, processor, rng, number, device):
    worlds = [scenes.arrange(rng) for _ in range(number)]
    told = [scenes.sentence(rng.sample(things, len(things))) for things in worlds]  # in any order: describing must sort
    return answer(model, processor.tokenizer, told, [ask(rng, things) for things in worlds], None, device)


def picture_step(model, heads, processor, rng, number, device):
    """The eye keeps its own task: without it, it forgot shapes faster than the voice learnt to read them."""
    worlds, pixels = draw(rng, number)
    questions = [ask(rng, things) for things in worlds]
    x, eye_loss, _ = see(model, heads, rng, worlds, pixels, device)
    loss, correct = answer(model, processor.tokenizer, ["<image>"] * number, questions, model.projector(x), device)
    return loss + eye_loss, correct


def answer(model, tokenizer, contexts, questions, features, device):
    """Ask about N scenes, each given by its features or by the words in its context.

    What the questions of a scene share is read once, into a KV cache that is then forked, one copy for each question;
    the gradient takes the same way back. Long answers (describe) go apart from short ones, so that little is padding.
    """
    pad_id = model.config.pad_token_id
    ids = pad([tokenizer.bos + tokenizer.encode(f"USER: {context}\n") for context in contexts], pad_id, device)
    real = ids != pad_id  # (N, S)
    if features is not None:
        ids, real, _ = model.expand(ids, real, None, [features.shape[1]] * len(features))  # (N, S - 1 + P)
    cache = model.init_kv_cache(*ids.shape)
    model.llama(model.merge(ids, features), real, kv_cache=cache)

    losses, correct = [], []
    for group in ([scene[:1] for scene in questions], [scene[1:] for scene in questions]):
        pairs = [(context, q, a) for context, scene in zip(contexts, group, strict=True) for _, q, a in scene]
        rows = [encode(tokenizer, *pair) for pair in pairs]
        ids = pad([ids for ids, _ in rows], pad_id, device)  # (B, T)
        labels = pad([labels for _, labels in rows], -100, device)  # (B, T)
        copies = len(group[0])
        mask = torch.cat([real.repeat_interleave(copies, 0), ids != pad_id], 1)  # (B, S - 1 + P + T)
        out = model(ids, attention_mask=mask, kv_cache=fork_cache(cache, copies, ids.shape[1]), labels=labels)
        losses.append(out.loss)
        correct.append(right(out.logits, labels))
    return sum(losses) / len(losses), torch.cat(correct)


def talk_step(model, heads, processor, rng, number, device):
    """Whole talks about a few scenes; every answer of a talk is learnt at once. The eye stays as it is."""
    worlds, pixels = draw(rng, number)
    length = rng.choice(LENGTHS)

    def enough(talk):
        said = sum(len(words.split()) for _, words, *_ in talk.turns)
        return model.vision.grid**2 * len(talk.shown) + 1.6 * said + 3 * len(talk.turns) > length

    told = [talks.talk(rng, worlds, enough) for _ in range(round(POSITIONS / length))]
    if rng.random() < DOUBT:
        image, told[0] = talks.doubt(rng, enough)
        told[0].shown = [number]
        pixels = torch.cat([pixels, preprocess(image, PICTURE)[None]])
    with torch.no_grad():
        (x,) = model.vision(pixels.to(device), [model.config.vision_feature_layer])
    features = model.projector(x[:, 1:])[[i for talk in told for i in talk.shown]]  # (N, P, D)
    rows = [talks.encode(processor, talk, features.shape[1]) for talk in told]
    pad_id = model.config.pad_token_id
    ids = pad([ids for ids, _ in rows], pad_id, device)  # (B, T)
    labels = pad([labels for _, labels in rows], -100, device)[:, 1:]  # (B, T - 1)
    x, *_ = model.llama(model.merge(ids, features), ids != pad_id)
    taught = labels != -100
    logits, labels = model.llama.head(x[:, :-1][taught]), labels[taught]  # (words, V), (words)
    # an answer of n words weighs as much as the root of n answers of one: neither as one of them nor as n
    numbers = torch.cat([torch.zeros(1, dtype=torch.long, device=device), (labels == processor.eos_id).cumsum(0)[:-1]])
    lengths = numbers.bincount()
    weights = lengths[numbers] ** -0.5
    loss = (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
    wrong = numbers[logits.argmax(-1) != labels].bincount(minlength=len(lengths))
    return loss, wrong == 0


# ----------------------------------------------------------------------------------------------------------------
# The stages


def build(tokenizer):
    config = LlavaConfig(text_config=TEXT, vision_config=VISION, image_token_index=tokenizer.id("<image>"),
                         pad_token_id=tokenizer.id("<pad>"), description=DESCRIPTION)
    model = Llava(config)
    model.init_weights()
    with torch.no_grad():  # the usual deviation of 0.02 suits widths of thousands
        for layer in [*model.llama.blocks.modules(), *model.projector.modules()]:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.normal_(model.llama.embed.weight, std=0.5)
    heads = nn.ModuleList(nn.Linear(VISION.hidden_size, 1 + len(values)) for values in ATTRIBUTES.values())
    return model, heads


def train(args):
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer(FOLDER / "tokenizer.json")
    model, heads = build(tokenizer)
    processor = Processor(tokenizer, PICTURE, model.config)
    state = {"stage": "talk" if args.talk else "eye", "step": 0, "seconds": 0.0}
    if args.talk and not args.resume:
        model.load_state_dict(load(str(args.talk), device="cpu", dtype="float32")[0].state_dict())
    if args.resume:
        state = torch.load(args.out / "resume.pt", weights_only=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
    model.to(args.device), heads.to(args.device)
    eye = nn.ModuleList([model.vision, heads])
    learners = {  # each with its share of the learning rate
        "eye": (eye_step, [(eye, 1.0)]),
        "voice": (voice_step, [(model.llama, 1.0)]),
        "projector": (picture_step, [(model.projector, 1.0)]),
        "all": (picture_step, [(eye, 0.2), (model.projector, 1.0), (model.llama, 1.0)]),
        "talk": (talk_step, [(model.projector, 1.0), (model.llama, 1.0)]),
    }
    with open(args.out / "train.log", "a" if args.resume else "w") as log:
        if not args.resume:
            print("stage\tstep\tloss\taccuracy\tseconds", file=log)
        for stage in list(STAGES)[list(STAGES).index(state["stage"]) :]:
            run_stage(stage, *learners[stage], model, heads, processor, state, args, log)
            state = {"step": 0, "seconds": state["seconds"]}
            if stage == PART_1:  # part 2 begins from what the checkpoint in the folder holds, however it is started
                finish(model.half(), processor, args.out)
                model.float()
    return model, processor


def make_optimizers(learners):
    """The matrices of the blocks learn by Muon (Jordan et al. 2024), in half the steps of AdamW; all else by AdamW."""
    matrices, others = [], []
    for learner, share in learners:
        for name, parameter in learner.named_parameters():
            inside = "blocks" in name and parameter.dim() == 2
            group = {"params": [parameter], "share": 2 * share if inside else share}
            (matrices if inside else others).append(group)
    muon = [torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")] if matrices else []
    return [*muon, torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)]


def run_stage(stage, step_of, learners, model, heads, processor, state, args, log):
    """A linear warm-up and a cosine decay; `state` says where to start and is brought up to date."""
    steps, number, peak = STAGES[stage]
    steps = max(1, round(steps * args.scale))
    model.requires_grad_(False)
    for learner, _ in learners:
        learner.requires_grad_(True)
    parameters = [p for learner, _ in learners for p in learner.parameters()]
    optimizers = make_optimizers(learners)
    for optimizer, kept in zip(optimizers, state.get("optimizers", []), strict=False):
        optimizer.load_state_dict(kept)
    began, losses, correct = time.time() - state["seconds"], [], []
    bar = tqdm(range(state["step"], steps), initial=state["step"], total=steps, desc=f"{stage:9}")
    for step in bar:
        cooling = (1 + math.cos(math.pi * step / steps)) / 2
        if stage == "talk":  # as high as it is until the last steps, so that more of them can be put before these
            cooling = min(1, (steps - step) / (FADE * steps))
        rate = peak * min(1, (step + 1) / WARM_UP) * cooling
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["share"] * rate
        # its own stream of scenes for each step, so that a resumed run sees what an unbroken one would have seen
        rng = random.Random(f"{args.seed} {stage} {step}")
        loss, good = step_of(model, heads, processor, rng, number, args.device)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        correct.append(good.float().mean().item())
        state["seconds"] = time.time() - began
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            loss, accuracy = sum(losses) / len(losses), sum(correct) / len(correct)
            print(f"{stage}\t{step + 1}\t{loss:.4f}\t{accuracy:.4f}\t{state['seconds']:.0f}", file=log, flush=True)
            bar.set_postfix(loss=f"{loss:.3f}", right=f"{accuracy:.1%}")
            losses, correct = [], []
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            kept = {"stage": stage, "step": step + 1, "seconds": state["seconds"], "model": model.state_dict()}
            kept |= {"heads": heads.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            torch.save(kept, args.out / "resume.pt")


def finish(model, processor, folder):
    """Write the checkpoint in float16, and two files that only transformers needs, as the published ones have them."""
    save(model, processor, folder)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens |= {"pad_token": "<pad>", "image_token": "<image>"}
    write_json(folder / "tokenizer_config.json", {
        **tokens, "padding_side": "left", "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast"})
    write_json(folder / "processor_config.json", {
        "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": VISION.patch_size,
        "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"})


def write_json(file, values):
    file.write_text(json.dumps(values, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description="Train tiny and measure it. Writes the checkpoint, train.log and resume.pt into the folder --out, "
        "and nothing else. The shipped files in tiny/ are never written over unless --overwrite says so.")
    parser.add_argument("--out", type=Path, default=FOLDER / "new", metavar="FOLDER", help="where to write (tiny/new)")
    parser.add_argument("--overwrite", action="store_true", help="even where --out holds a checkpoint already")
    parser.add_argument("--resume", action="store_true", help="go on from resume.pt in the --out folder")
    parser.add_argument("--talk", type=Path, metavar="FOLDER", help="part 2 alone, from the checkpoint in this folder")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps: 0.02 for a quick look")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="1: on a model of this size more wait for each other")
    parser.add_argument("--questions", type=int, default=40, help="of each kind, to measure with; 0: none")
    args = parser.parse_args()
    taken = (args.out / "model.safetensors").exists() and not args.resume
    if (args.out.resolve() == FOLDER or taken) and not args.overwrite:
        parser.error(f"{args.out} holds a checkpoint: name another --out, or add --overwrite to write over it")
    if args.resume and not (args.out / "resume.pt").exists():
        parser.error(f"there is no resume.pt in {args.out}: name the --out of the run that was cut off")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    model, processor = train(args)
    finish(model.half(), processor, args.out)
    if args.questions:
        evaluate(args.out, args.questions, args.device)


if __name__ == "__main__":
    main()
