"""Ours beside transformers, stage by stage, on any checkpoint: which stage diverges first, and by how much?

    python tests/parity.py                                   tiny, in float64
    python tests/parity.py FOLDER_OR_HUB_ID --dtype bfloat16 --device cuda
    python tests/parity.py --dump stages.safetensors         write every stage of ours, by name
    python tests/parity.py --against stages.safetensors      compare such a file, from another port, with ours

The exit status is 1 if a stage is over its bound. The bounds on the largest difference, relative to the largest number
of the stage: 1e-9 in float64 (1e-6 for loss and gradients, which transformers computes in float32), 1e-5 in float32.
Ids, pixels and tokens must be the same. In 16 bits the logits are judged instead, against those in float32: by how
often the likeliest token is the same, and by the KL divergence, which may not be worse than those of transformers
itself.

A file of stages keeps in its metadata what went in: question, picture, dtype. --against asks ours the same, unless
told otherwise. docs/porting.md has the format of the file, and what usually causes a departure at which stage.
"""

import argparse
import contextlib
import gc
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import llava
import weights
from extras import anyres, family, hub, intake, lens, speed
from extras.lens import patched

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "Describe the image."
NEW_TOKENS = 24
EXACT = ("ids", "pixels", "sizes", "tokens", "beams")  # stages that must be the same number for number
IN_FLOAT32 = ("loss", "gradient")  # stages that the reference computes in float32 even in float64
SIXTEEN = (torch.bfloat16, torch.float16)


def ours(model, processor, image, gradients=True, pad=None, question=QUESTION):
    """Every stage of our model on one question about one picture: {name: tensor}, in the order of the data's flow."""
    inputs = processor.chat([("user", question)], [image], pad)
    ids, _ = model.prompt_ids(**inputs)
    pictures = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    stages = {"ids": ids, "pixels": inputs["pixel_values"]}
    with torch.no_grad():
        tiles = inputs["pixel_values"].flatten(0, -4).to(model.device)  # of a picture in tiles: as many pictures
        states = model.vision(tiles, range(len(model.vision.blocks) + 1))
        with patched(model.projector, keep(found := [])):
            out = model(**inputs, output_hidden_states=True)
        stages |= {f"vision.{i}": state for i, state in enumerate(states)} | {"projector": found[0]}
        if isinstance(out.image_hidden_states, list):  # packed: the tiles joined and trimmed; newline: with these
            own = anyres.plan(model.config)
            rows = ~torch.from_numpy(lens.tile_boxes(image.height, image.width, own)).isnan()[:, 0]
            (features,) = out.image_hidden_states
            packed = features[rows.to(features.device)]
            stages |= {"sizes": inputs["image_sizes"], "packed": packed, "newline": features}
        stages["merge"] = out.hidden_states[0]
        stages |= {f"llama.{i}": state for i, state in enumerate(out.hidden_states[1:], start=1)}
        stages["logits"] = out.logits
        weights_ = model(**inputs, output_attentions=True).attentions
        stages |= {f"attention.{i}": weight for i, weight in enumerate(weights_, start=1)}
    labels = ids.masked_fill(ids == model.config.image_token_index, -100)
    stages |= loss_and_gradients(lambda: model(ids, **pictures, labels=labels).loss, model, gradients, str)
    stages["tokens"] = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
    stages["beams"] = model.generate(**inputs, max_new_tokens=NEW_TOKENS, num_beams=3)
    return on_cpu(stages)


def theirs(reference, folder, model_config, preprocess_config, prompt, image, gradients=True):
    """The same stages from transformers (LlavaForConditionalGeneration 5.x), under the same names."""
    from transformers import PreTrainedTokenizerFast

    seen = their_pictures(model_config, preprocess_config, image)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    pictures = {name: tensor.to(reference.device) for name, tensor in seen.items()}
    pictures["pixel_values"] = pixels = pictures["pixel_values"].to(reference.dtype)
    with torch.no_grad(), patched(reference.model.multi_modal_projector, keep(found := [])):
        features = reference.model.get_image_features(**pictures).pooler_output
    counts = [len(x) for x in features]
    # its processor repeats <image> in the text, once for each feature
    token = tokenizer.convert_ids_to_tokens(model_config.image_token_index)
    ids = tokenizer(prompt.replace(token, token * sum(counts)), return_tensors="pt")["input_ids"]
    stages = {"ids": ids, "pixels": seen["pixel_values"]}
    ids = ids.to(reference.device)
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, **pictures, "attention_mask": mask}
    with torch.no_grad():
        tower = reference.model.vision_tower(pixels.flatten(0, -4), output_hidden_states=True)
        out = reference(**inputs, output_hidden_states=True)
        stages |= {f"vision.{i}": state for i, state in enumerate(tower.hidden_states)} | {"projector": found[0]}
        if "image_sizes" in pictures:
            stages |= {"sizes": seen["image_sizes"], "packed": their_packing(reference, found[0], pictures)}
            stages["newline"] = features[0]
        stages["merge"] = out.hidden_states[0]
        stages |= {f"llama.{i}": state for i, state in enumerate(out.hidden_states[1:], start=1)}
        stages["logits"] = out.logits
        reference.set_attn_implementation("eager")
        with exact_softmax():
            weights_ = reference(**inputs, output_attentions=True).attentions
        reference.set_attn_implementation("sdpa")
        stages |= {f"attention.{i}": weight for i, weight in enumerate(weights_, start=1)}
    labels = ids.masked_fill(ids == model_config.image_token_index, -100)
    stages |= loss_and_gradients(
        lambda: reference(**inputs, labels=labels).loss, reference, gradients, weights.our_name
    )
    eos, pad = model_config.eos_token_ids, model_config.padding
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=eos, pad_token_id=pad)
    stages["tokens"] = reference.generate(**inputs, **options)[:, ids.shape[1] :]
    stages["beams"] = reference.generate(**inputs, **options, num_beams=3)[:, ids.shape[1] :]
    return on_cpu(stages)


def their_pictures(config, preprocess_config, image):
    """What the reference's class of pictures makes of one."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    squashed = "height" in preprocess_config.size
    plain = SiglipImageProcessorPil if squashed else CLIPImageProcessorPil
    cls = {"llava_next": LlavaNextImageProcessorPil, "llava_onevision": LlavaOnevisionImageProcessorPil}
    names = ("size", "resample", "image_mean", "image_std", *([] if squashed else ["crop_size"]))
    values = {name: getattr(preprocess_config, name) for name in names}
    if config.image_grid_pinpoints is not None:
        values["image_grid_pinpoints"] = config.image_grid_pinpoints
    found = cls.get(config.model_type, plain)(**values)(image, return_tensors="pt")
    return {name: found[name] for name in ("pixel_values", "image_sizes") if name in found}


def their_packing(reference, tiles, pictures):
    """The features of one picture's tiles, put together by the reference, without the newlines."""
    config = reference.config
    more = [] if config.model_type == "llava_onevision" else [config.vision_feature_select_strategy]
    packed, _ = reference.model.pack_image_features([tiles], pictures["image_sizes"], *more, image_newline=None)
    return packed[0]


def keep(found):
    """A hook for `patched` that leaves what a module puts out as it is, and keeps it."""
    return lambda output: found.append(output) or output


@contextlib.contextmanager
def exact_softmax():
    """The reference's written-out attention takes its softmax in float32 even of float64: where scores are large that
    alone costs 1e-6, more than what is looked for. Here float64 stays float64."""
    softmax = torch.nn.functional.softmax

    def kept(x, dim=None, dtype=None, **rest):
        return softmax(x, dim=dim, dtype=torch.float64 if x.dtype == torch.float64 else dtype, **rest)

    torch.nn.functional.softmax = kept
    try:
        yield
    finally:
        torch.nn.functional.softmax = softmax


def loss_and_gradients(compute, model, gradients, rename):
    """The loss and, if asked for, its gradient by each parameter that has one."""
    if not gradients:
        with torch.no_grad():
            return {"loss": compute()}
    model.zero_grad(set_to_none=True)
    loss = compute()
    loss.backward()
    found = {rename(name): parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach()} | {f"gradient.{name}": found[name] for name in sorted(found)}


def on_cpu(stages):
    return {name: tensor.detach().cpu() for name, tensor in stages.items()}


# ----------------------------------------------------------------------------------------------------------------


def bound(stage, dtype):
    """The largest relative difference that a stage may show."""
    if stage.split(".")[0] in EXACT:
        return 0.0
    if dtype == torch.float64:
        return 1e-6 if stage.split(".")[0] in IN_FLOAT32 else 1e-9
    return 1e-5 if dtype == torch.float32 else float("inf")


def difference(a, b):
    """Worst absolute difference of two lists of tensors,
    the same relative to the largest number of b, and the cosine.
    """
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf"), float("inf"), 0.0
    a, b = (torch.cat([tensor.double().flatten() for tensor in tensors]) for tensors in (a, b))
    worst = (a - b).abs().max().item()
    worst = float("inf") if worst != worst else worst
    return worst, worst / max(b.abs().max().item(), 1e-30), torch.cosine_similarity(a, b, dim=0).item()


def compare(a, b, dtype):
    """Two dicts of stages → rows (stage, absolute, relative, cosine, bound), in the order of b. Gradients count by
    block: those of some biases are zero but for rounding."""
    groups = {}
    for stage in b:
        if stage in a:
            groups.setdefault(block(stage), []).append(stage)
    return [
        (label, *difference([a[stage] for stage in stages], [b[stage] for stage in stages]), bound(label, dtype))
        for label, stages in groups.items()
    ]


def is_gradient(stage):
    return stage.startswith("gradient.")


def block(stage):
    """gradient.llama.blocks.3.mlp.up.weight → gradient.llama.blocks.3; other stages stand for themselves."""
    if not is_gradient(stage):
        return stage
    return ".".join(stage.split(".")[: 4 if "blocks" in stage else 3])


def different_shapes(a, b):
    """Two dicts of stages → {stage, or block of gradients: both shapes in words}, where they differ."""
    found = {}
    for stage in b:
        if stage in a and a[stage].shape != b[stage].shape:
            x, y = tuple(a[stage].shape), tuple(b[stage].shape)
            more = ": its batch dimension is missing" if (1, *x) == y else ""
            found.setdefault(block(stage), f"{x} against {y}{more}")
    return found


def why_zeros(rows):
    """Stages of float64 that differ by nothing behind one that differs make a careful reader ask → the reason."""
    known = [row for row in rows if 0 < row[4] <= 1e-6]  # those with a bound for float64
    first = next((i for i, row in enumerate(known) if row[1] > 0), len(known))
    zeros = [i for i, row in enumerate(known) if i >= first and row[1] == 0]
    if not zeros or max(row[2] for row in known[: zeros[0]]) > torch.finfo(torch.float32).eps / 2:
        return []  # none, or not for this reason
    zeros = [known[i][0] for i in zeros]
    return [
        f"{brief(zeros)}: 0, though stages before differ.\n"
        "The language model's norms compute in float32 in both, so what differs by less than float32 resolves\n"
        "is the same behind them, and so are gradients on the way back."
    ]


def hints_at_dtype(other, dtype, rows):
    """What a file of stages tells about the dtype that it was computed in, where that is not the one compared in."""
    parts = {name: tensor for name, tensor in other.items() if name.split(".")[0] not in EXACT + IN_FLOAT32}
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in parts.values()}
    here = str(dtype).removeprefix("torch.")
    over = [relative for stage, _, relative, _, limit in rows if relative > limit > 0]
    if over and len(kinds) == 1 and here not in kinds:
        (kind,) = kinds
        return [f"hint: the file's numbers are {kind}, ours {here}: try --dtype {kind}"]
    if over and dtype == torch.float64 and max(over) <= bound("logits", torch.float32):
        return ["hint: what is over is within the bound of float32. If the port computes in it, try --dtype float32"]
    return []


def brief(names, most=4):
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def count(number):
    return f"{number} stage{'' if number == 1 else 's'}"


def report(rows, names, shapes=None, notes=()):
    """Print the table, notes, and a verdict as the last line; returns the names of the stages over their bound, the
    first that diverges in front. shapes: what different_shapes says.
    """
    a, b = names
    print(f"{'stage':<34} {'worst absolute':>15} {'relative':>10} {'cosine':>12} {'bound':>8}")
    over = []
    for stage, worst, relative, cosine, limit in rows:
        ok = relative <= limit and relative != float("inf")  # not numbers, or of another shape: over any bound
        over += [] if ok else [stage]
        if stage in (shapes or {}):
            print(f"{stage:<34} {shapes[stage]}  <-- over")
            continue
        print(f"{stage:<34} {worst:>15.3e} {relative:>10.1e} {cosine:>12.9f} {limit:>8.0e}{'' if ok else '  <-- over'}")
    for note in notes:
        print(note)
    verdict = "all within their bounds"
    if over:
        verdict = f"{over[0]} is the first that diverges, {len(over)} in all (docs/porting.md: what usually does that)"
    elif any(row[4] == float("inf") for row in rows):
        verdict += ", which in 16 bits only ids, pixels and tokens have"
    print(f"{count(len(rows))}, {a} against {b}: {verdict}")
    return over


def judge_logits(logits, truth):
    """Logits in 16 bits against those in float32 → (share of positions with the same likeliest token,
    mean KL divergence).
    """
    truth, logits = truth.double().log_softmax(-1), logits.double().log_softmax(-1)
    kl = (truth.exp() * (truth - logits)).sum(-1).mean().item()
    return (truth.argmax(-1) == logits.argmax(-1)).double().mean().item(), kl


def report_logits(ours_, theirs_, truth):
    """Print both judgements; returns whether ours is worse. A tenth more KL is chance:
    the last bit of a sum's order.
    """
    rows = {"ours": judge_logits(ours_, truth), "transformers": judge_logits(theirs_, truth)}
    for name, (same, kl) in rows.items():
        print(f"{name:<14} against float32: the same likeliest token at {same:.1%} of positions, KL {kl:.2e}")
    (same, kl), (their_same, their_kl) = rows.values()
    return kl > 1.1 * their_kl + 1e-9 or same < their_same - 1 / len(truth[0])


def load_theirs(folder, dtype, device):
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind = weights.read_json(Path(folder) / "config.json")["model_type"]
    cls = getattr(transformers, family.KINDS[kind].architecture)
    reference = cls.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return reference.eval().to(device)


def run_ours(name, dtype, device, image, gradients, question=QUESTION):
    model, processor = llava.load(name, device=device, dtype=dtype)
    return ours(model, processor, image, gradients, question=question), model.config, processor


def run_theirs(folder, config, processor, dtype, device, image, gradients, question=QUESTION):
    reference = load_theirs(folder, dtype, device)
    stages = theirs(
        reference, folder, config, processor.preprocess_config, processor.prompt(question), image, gradients
    )
    del reference
    gc.collect()  # the two models are never in memory together
    return stages


# ----------------------------------------------------------------------------------------------------------------
# Files of stages


def read_stages(file):
    """A file of stages → ({name: tensor}, its metadata: {"question", "picture", "dtype", "model"}, or some of them)."""
    with safe_open(file, framework="pt") as stages:
        return {name: stages.get_tensor(name) for name in stages.keys()}, stages.metadata() or {}  # noqa: SIM118


def write_stages(stages, file, **metadata):
    save_file({name: tensor.contiguous() for name, tensor in stages.items()}, file, metadata=metadata)


def portable(path):
    """A path as the metadata keeps it: inside the repository from its root, so that it holds in another clone."""
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def against_file(options, other, said, stages, dtype):
    """Compare a file's stages with ours → the exit status."""
    rows = compare(other, stages, dtype)
    if not rows:
        named = f"{options.against} holds none of our stages, which are called {brief([*stages])}"
        print(f"error: {named}", file=sys.stderr)
        return 2
    unknown, missing = ([name for name in a if name not in b] for a, b in ((other, stages), (stages, other)))
    notes = []
    if said.get("model", options.model) != options.model:
        notes.append(f"the file says that it is of {said['model']!r}, and is compared with {options.model}")
    if unknown:
        notes.append(f"not compared, as ours has no stage of that name: {brief(unknown)}")
    if missing:
        notes.append(f"not compared, as the file does not have it: {brief([*dict.fromkeys(map(block, missing))])}")
    notes += why_zeros(rows) + hints_at_dtype(other, dtype, rows)
    return int(bool(report(rows, (options.against, "ours"), different_shapes(other, stages), notes)))


# ----------------------------------------------------------------------------------------------------------------
# The command


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny", help="a folder, a Hub id, or tiny (default)")
    parser.add_argument("--dtype", help="float64 (default), float32, bfloat16 or float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--image", metavar="FILE", help="a picture (default: tiny/scene.png)")
    parser.add_argument("--question", metavar="TEXT", help=f"what is asked about it (default: {QUESTION})")
    parser.add_argument("--no-gradients", action="store_true", help="half the memory")
    parser.add_argument("--dump", metavar="FILE", help="write every stage of ours to a safetensors file, and stop")
    parser.add_argument("--against", metavar="FILE", help="compare a file of stages with ours, instead of "
                        "transformers; question, picture and dtype are its own, unless they are given")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        other, said = read_stages(options.against) if options.against else ({}, {})
        dtype = speed.pick_dtype(options.dtype or said.get("dtype", "float64"))
        device = speed.pick_device(options.device)
        folder = hub.find(options.model)
        question = said.get("question", QUESTION) if options.question is None else options.question
        picture = options.image or ROOT / said.get("picture", "tiny/scene.png")
        if not options.image and not picture.exists():
            raise OSError(f"{options.against} is of the picture {said['picture']!r}, which is not here: give --image")
        image = intake.open_image(picture)
        if options.dump:
            Path(options.dump).open("ab").close()  # now, and not after all the work
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        gradients = not options.no_gradients and not (other and not any(map(is_gradient, other)))
        # loads it by its name, so that what does not fit into memory is not downloaded
        stages, config, processor = run_ours(options.model, dtype, device, image, gradients, question)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {str(error).replace('--model tiny', 'tiny')}", file=sys.stderr)  # here it is no option
        return 2

    named = str(dtype).removeprefix("torch.")
    if options.dump:
        about = {"model": options.model, "question": question, "picture": portable(picture), "dtype": named}
        write_stages(stages, options.dump, **about)
        print(f"{count(len(stages))} of {options.model} in {named} written to {options.dump}")
        return 0
    gc.collect()
    print(f"{options.model} in {named}, asked {question!r} about {portable(picture)!r}\n")
    if options.against:
        return against_file(options, other, said, stages, dtype)

    reference = run_theirs(folder, config, processor, dtype, device, image, gradients, question)
    missing = sorted(set(reference) ^ set(stages))
    rows = compare(stages, reference, dtype)
    notes = why_zeros(rows) + ([f"only one of the two has {brief(missing)}"] if missing else [])
    over = report(rows, ("ours", "transformers"), different_shapes(stages, reference), notes)
    if dtype in SIXTEEN:
        truth = run_theirs(folder, config, processor, torch.float32, device, image, False, question)
        over = [
            name for name in over if name not in ("tokens", "beams")
        ]  # a tie that rounding breaks ends their likeness
        if report_logits(stages["logits"], reference["logits"], truth["logits"]):
            over.append("logits")
    return int(bool(over or missing))


if __name__ == "__main__":
    sys.exit(main())
