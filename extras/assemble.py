"""A new LLaVA from two parts that others trained: a vision tower and a language model, joined by a new projector.

    python extras/assemble.py --vision openai/clip-vit-large-patch14-336 --language lmsys/vicuna-7b-v1.5 --out NEW

So LLaVA began (Liu et al. 2023, "Visual Instruction Tuning", section 4). NEW is a checkpoint in the published layout.
It loads, and sees nothing yet: its projector is random, and `extras/finetune.py --model NEW --stage 1` trains it.

    --vision     a CLIP or SigLIP, whole or its vision half alone, as published or as transformers 5 saves it
    --language   a Llama, Mistral or Qwen2 with its tokenizer.json

Both are taken as they are, each in its own dtype. <image> and, where the language model has none of its own, <pad> are
added to the tokenizer and to both matrices, which grow to a multiple of 64 rows as the reference's resize does. Every
tensor is used once, or stands on the list of what is known and unused: the text half of a CLIP.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

import tokenizers
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import llama
import llava
import vision
import weights
from extras import checks, family, hub, other_formats, training
from extras.cli import fail

TOWERS = {  # model_type → where its config.json holds the tower's part ("": all of it), and the part's own model_type
    "clip": ("vision_config", "clip_vision_model"),
    "clip_vision_model": ("", "clip_vision_model"),
    "siglip": ("vision_config", "siglip_vision_model"),
    "siglip_vision_model": ("", "siglip_vision_model"),
}
UNUSED = [  # of a CLIP or SigLIP, known and without use here, and why
    (r"^text_model\.", "the half that reads captions"),
    (r"^(text|visual)_projection\.weight$", "into the space in which pictures and captions are compared"),
    (r"^logit_(scale|bias)$", "of that comparison"),
    (r"^(vision_model\.)?head\.", "SigLIP's own end: one vector for a whole picture"),
    *weights.UNUSED,
]
IMAGE = "<image>"
FULL = {"siglip_vision_model"}  # without a class token: every position is a patch
NEEDED = 16  # positions beside those of a picture, for a question and an answer

# ----------------------------------------------------------------------------------------------------------------
# The small files


def config_of(folder, kinds, what):
    """The config.json of a part. Raises ValueError or OSError for one that is of none of these kinds, or whose fields
    are none of a config's.
    """
    other_formats.check_folder(folder)
    where = folder / "config.json"
    if not where.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: {what} is a folder or a Hub id with one")
    values = checks.read_json(where)
    if values.get("model_type") not in kinds:
        named = values.get("model_type")
        raise ValueError(f"{where}: model_type is {named!r}; {what} takes {', '.join(kinds)}")
    objects = {f"{where}: {name}": checks.part(values, name, where) for name in ("text_config", "vision_config")}
    for place, fields in {str(where): values, **objects}.items():
        checks.fields(fields, place)
    other_formats.check_quantization(values, where)
    return values


def tower_config(folder):
    values = config_of(folder, list(TOWERS), "--vision")
    place, kind = TOWERS[values["model_type"]]
    return {**(checks.part(values, place, folder / "config.json") if place else values), "model_type": kind}


def new_tokens(folder, ends, pads):
    """The language model's tokenizer with what it lacks → (tokenizers.Tokenizer, id of <image>, id that pads).

    ends: the ids that end an answer. pads: those with which its configs pad; the first that is a token stays.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json: save its tokenizer with transformers' fast class")
    bpe = checks.Tokenizer(file).bpe
    own = [i for i in (*pads, bpe.token_to_id("<pad>")) if i is not None and i >= 0]  # -1: trainers' way to say none
    pad = next((i for i in own if i not in ends and bpe.id_to_token(i) is not None), None)
    wanted = [IMAGE] + (["<pad>"] if pad is None else [])
    bpe.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in wanted])
    return bpe, bpe.token_to_id(IMAGE), bpe.token_to_id("<pad>") if pad is None else pad


def compose(folder, tower_folder, text_folder):
    """Write the small files of the new checkpoint into a folder, for the checks that every checkpoint goes through.

    → how many rows the language model's matrices have now; its new config says how many they will have.
    """
    tower = tower_config(tower_folder)
    text = config_of(text_folder, list(llama.TextConfig.KINDS), "--language")
    file = text_folder / "generation_config.json"
    generation = checks.read_json(file) if file.is_file() else {}
    checks.fields(generation, file)
    of_both = {name: [x.get(name) for x in (generation, text)] for name in ("eos_token_id", "pad_token_id")}
    ends = next((ids for ids in of_both["eos_token_id"] if ids is not None), None)  # as weights.read_config has them
    if ends is None:
        raise ValueError(f"{text_folder}: neither config.json nor generation_config.json says eos_token_id")
    bpe, image, pad = new_tokens(text_folder, llava.as_list(ends), of_both["pad_token_id"])
    known = llama.TextConfig(**weights.kind_of(llama.TextConfig, text)).vocab_size
    known = known if text.get("vocab_size") is None else text["vocab_size"]
    number = bpe.get_vocab_size()
    rows = known if number <= known else -(-number // 64) * 64  # some have rows to spare
    config = {
        "model_type": "llava", "vision_config": tower, "text_config": {**text, "vocab_size": rows},
        "image_token_index": image,
        "pad_token_id": pad, "tie_word_embeddings": bool(text.get("tie_word_embeddings")),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full" if tower["model_type"] in FULL else "default",
    }  # fmt: skip
    ids = {"eos_token_id": ends, "pad_token_id": pad}
    for name, values in {"config.json": config, "generation_config.json": ids}.items():
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (tower_folder / name).is_file():
            (folder / name).write_bytes(checks.small_file(tower_folder / name).read_bytes())
    bpe.save(str(folder / "tokenizer.json"))
    return known


def prepare(folder, tower_folder, text_folder):
    """The small files, checked as those of any checkpoint → (config, preprocess_config, rows now).

    Messages name the parts.
    """
    places = {
        f"{folder / 'config.json'}: vision_config": f"{tower_folder / 'config.json'}",
        f"{folder / 'config.json'}: text_config": f"{text_folder / 'config.json'}",
        f"{folder / 'generation_config.json'}": f"{text_folder / 'generation_config.json'}",
        f"{folder / 'tokenizer.json'}": f"{text_folder / 'tokenizer.json'}",
        f"{folder}": f"{tower_folder}",  # the rest is about its pictures
    }
    try:
        rows = compose(folder, tower_folder, text_folder)
        checks.checkpoint(folder)
        config = weights.read_config(folder, llava.LlavaConfig, llama.TextConfig, vision.VisionConfig, family.clean)
        pictures = weights.read_preprocess_config(folder, vision.PreprocessConfig, config.vision_config)
        return config, pictures, rows
    except (ValueError, OSError) as error:
        message = str(error)
        for ours, theirs in places.items():
            message = message.replace(ours, theirs)
        raise type(error)(message) from None


# ----------------------------------------------------------------------------------------------------------------
# The numbers


def tower_name(name):
    """A tensor's name in a CLIP or SigLIP → ours; vision_model. stands in front, or does not (transformers 5)."""
    return weights.our_name("vision_tower.vision_model." + name.removeprefix("vision_model."))


def scan(expected, folder, our_name, unused):
    """weights.scan for a part: {our name: (file, name in the file)}, of all that is expected: {our name: shape}.

    Raises ValueError that names the tensor which is unknown, missing, repeated, of another shape or no float.
    """
    found = {}
    for file in checks.shards(folder):
        for name, shape, dtype in weights.header(file):
            ours, tensor = our_name(name), f"{file}: the tensor {name}"
            if any(re.search(pattern, name) for pattern, _ in unused):
                continue
            if ours not in expected:
                raise ValueError(f"{tensor} has no place in this model")
            if ours in found:
                raise ValueError(f"{tensor} appears twice (the other: {found[ours][1]} in {found[ours][0].name})")
            if shape != expected[ours]:
                raise ValueError(f"{tensor} has the shape {shape}, by config.json it should be {expected[ours]}")
            if dtype not in weights.DTYPES:
                raise ValueError(f"{tensor} is of type {dtype}; {', '.join(weights.DTYPES)} are read")
            found[ours] = file, name
    missing = [name for name in expected if name not in found]
    if missing:
        name = weights.translate(missing[0], weights.THEIRS)
        name = re.sub(r"^vision_tower\.|^language_model\.(?=model\.|lm_head)", "", name)
        raise ValueError(f"{folder}: the tensor {name} is missing ({len(missing)} in all)")
    return found


def read(model, tower_folder, text_folder):
    """Fill a model on the meta device with the numbers of both parts, as they are stored; the projector is new."""
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    tower = {name: shape for name, shape in shapes.items() if name.startswith("vision.")}
    text = {name: shape for name, shape in shapes.items() if name.startswith("llama.")}
    head, embed = "llama.head.weight", "llama.embed.weight"
    heads = [name for file in checks.shards(text_folder) for name, _, _ in weights.header(file) if "lm_head" in name]
    if weights.is_tied(model) and not heads:
        del text[head]
    found = scan(tower, tower_folder, tower_name, UNUSED) | scan(text, text_folder, weights.our_name, weights.UNUSED)
    state = {}
    for ours, (file, name) in found.items():
        with safe_open(file, framework="pt") as tensors:
            state[ours] = tensors.get_tensor(name).clone()
    state.setdefault(head, state[embed])
    tied = torch.equal(state[head], state[embed]) and weights.is_tied(model)
    for name, shape in shapes.items():  # the projector, as the reference draws it
        if name not in state:
            drawn = torch.zeros(shape, dtype=torch.float32)
            if not name.endswith("bias"):
                drawn.normal_(std=0.02)
            state[name] = drawn.to(state[embed].dtype)
    model.load_state_dict(state, assign=True)
    if tied:
        model.llama.head.weight = model.llama.embed.weight
    else:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False


def assemble(tower, language):
    """Two Hub ids or folders → (Llava, Processor), with a random projector, the same one each time.

    Raises ValueError or OSError with a complete message; nothing is read of the weights before the rest is checked.
    """
    tower_folder, text_folder = find(tower, "--vision"), find(language, "--language")
    with tempfile.TemporaryDirectory() as made:
        config, preprocess_config, rows = prepare(Path(made), tower_folder, text_folder)
        tokenizer = checks.Tokenizer(Path(made) / "tokenizer.json", config.text_config)
    tokenizer.beside = {}  # what lies there is of the tower
    positions, most = (config.vision_config.image_size // config.vision_config.patch_size) ** 2, config.text_config
    if positions + NEEDED > most.max_position_embeddings:
        raise ValueError(
            f"a picture takes {positions} positions and the language model has {most.max_position_embeddings}: "
            f"take a tower with fewer patches, or a language model that reads longer texts"
        )
    grown, config.text_config.vocab_size = config.text_config.vocab_size, rows
    with torch.device("meta"):
        model = llava.Llava(config).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        read(model, hub.complete(tower, tower_folder), hub.complete(language, text_folder))
        training.resize_token_embeddings(model, grown)
    return model, llava.Processor(tokenizer, preprocess_config, config, checks.open_image)


def find(name, option):
    """hub.find, but those of this repository are whole LLaVAs and no parts."""
    if name in hub.OWN:
        raise ValueError(f"{option} {name}: {name} is a whole LLaVA; give a part of one")
    return hub.find(name)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vision", required=True, metavar="MODEL", help="a CLIP or SigLIP: a Hub id or a folder")
    parser.add_argument("--language", required=True, metavar="MODEL", help="a Llama, Mistral or Qwen2, likewise")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to; it must not be there yet")
    options = parser.parse_args(arguments)
    try:
        if Path(options.out).exists():
            raise ValueError(f"{options.out} is there already: name a new folder")
        model, processor = assemble(options.vision, options.language)
        llava.save(model, processor, options.out)
    except (ValueError, OSError) as error:
        return fail(error)
    print(f"{options.out}: its projector is random: python extras/finetune.py --model {options.out} --stage 1 …")
    return 0


if __name__ == "__main__":
    sys.exit(main())
