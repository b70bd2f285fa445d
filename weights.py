"""
How the numbers are stored: the only file that knows.

    read the configs → map every tensor's name onto ours → compare with the model → cast and put in

A checkpoint is a folder of JSON files and of safetensors files (a JSON header with names, shapes and offsets, then the
raw numbers). Nothing here unpickles, and loading is strict both ways: each tensor of the files is used exactly once,
each parameter of the model is set exactly once, or there is an error that names the one that was not.

No paper has a section on this. Notebook: notebooks/6_the_bug_zoo.ipynb. This is the last of the four files.
"""

import dataclasses
import json
import re
import warnings

import torch
from safetensors import SafetensorError, safe_open

# ----------------------------------------------------------------------------------------------------------------
# Names. Read from left to right to load, from right to left to save.

PUBLISHED = [  # as llava-hf publishes them → as the modules call them; {i} is the number of the block
    ("vision_tower.vision_model.embeddings.class_embedding", "vision.class_embedding"),
    ("vision_tower.vision_model.embeddings.patch_embedding", "vision.patch_embedding"),
    ("vision_tower.vision_model.embeddings.position_embedding.weight", "vision.position_embedding"),
    ("vision_tower.vision_model.pre_layrnorm", "vision.pre_norm"),  # sic
    ("vision_tower.vision_model.encoder.layers.{i}.layer_norm1", "vision.blocks.{i}.norm1"),
    ("vision_tower.vision_model.encoder.layers.{i}.self_attn.q_proj", "vision.blocks.{i}.attention.wq"),
    ("vision_tower.vision_model.encoder.layers.{i}.self_attn.k_proj", "vision.blocks.{i}.attention.wk"),
    ("vision_tower.vision_model.encoder.layers.{i}.self_attn.v_proj", "vision.blocks.{i}.attention.wv"),
    ("vision_tower.vision_model.encoder.layers.{i}.self_attn.out_proj", "vision.blocks.{i}.attention.wo"),
    ("vision_tower.vision_model.encoder.layers.{i}.layer_norm2", "vision.blocks.{i}.norm2"),
    ("vision_tower.vision_model.encoder.layers.{i}.mlp.fc1", "vision.blocks.{i}.mlp.fc1"),
    ("vision_tower.vision_model.encoder.layers.{i}.mlp.fc2", "vision.blocks.{i}.mlp.fc2"),
    ("vision_tower.vision_model.post_layernorm", "vision.post_norm"),
    ("multi_modal_projector.projector_layernorm", "projector.norm"),
    ("multi_modal_projector.linear_1", "projector.linear_1"),
    ("multi_modal_projector.linear_2", "projector.linear_2"),
    ("language_model.model.embed_tokens.weight", "llama.embed.weight"),
    ("language_model.model.layers.{i}.input_layernorm.weight", "llama.blocks.{i}.attention_norm.weight"),
    ("language_model.model.layers.{i}.self_attn.q_proj", "llama.blocks.{i}.attention.wq"),
    ("language_model.model.layers.{i}.self_attn.k_proj", "llama.blocks.{i}.attention.wk"),
    ("language_model.model.layers.{i}.self_attn.v_proj", "llama.blocks.{i}.attention.wv"),
    ("language_model.model.layers.{i}.self_attn.o_proj.weight", "llama.blocks.{i}.attention.wo.weight"),
    ("language_model.model.layers.{i}.post_attention_layernorm.weight", "llama.blocks.{i}.mlp_norm.weight"),
    ("language_model.model.layers.{i}.mlp.gate_proj.weight", "llama.blocks.{i}.mlp.gate.weight"),
    ("language_model.model.layers.{i}.mlp.up_proj.weight", "llama.blocks.{i}.mlp.up.weight"),
    ("language_model.model.layers.{i}.mlp.down_proj.weight", "llama.blocks.{i}.mlp.down.weight"),
    ("language_model.model.norm.weight", "llama.norm.weight"),
    ("language_model.lm_head.weight", "llama.head.weight"),
    ("image_newline", "image_newline"),
]
NAMES = []  # the same in full: a name that does not end in .weight stands for two, its .weight and its .bias
for theirs, ours in PUBLISHED:
    ends = [""] if theirs.endswith(("weight", "class_embedding", "newline")) else [".weight", ".bias"]
    NAMES += [(theirs + end, ours + end) for end in ends]
OURS, THEIRS = dict(NAMES), {ours: theirs for theirs, ours in NAMES}

LAYOUTS = [  # other prefixes → the published ones; the first match is replaced, and without one a name stays
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model."),  # the authors' own
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),  # transformers 4.52 to 4.57 in memory
    ("model.vision_tower.", "vision_tower.vision_model."),  # transformers 5 in memory
    ("vision_tower.vision_model.", "vision_tower.vision_model."),  # as published: not to be changed by the next row
    ("vision_tower.", "vision_tower.vision_model."),  # saved by transformers 5
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),  # the authors' own; 1 is the GELU
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.image_newline", "image_newline"),
    ("model.", "language_model.model."),  # the authors' own
]

UNUSED = [  # known tensors that the model has no use for, and why
    (r"\.embeddings\.position_ids$", "0, 1, 2, …: written by old versions, a position is its own index"),
    (r"\.rotary_emb\.inv_freq$", "computed from rope_theta"),
    (r"^(model\.)?vision_tower\..*\bhead\.(probe$|(attention|layernorm|mlp)\.)", "SigLIP's own last step"),
]


def our_name(name):
    """A tensor's name in a file of any layout → ours, None if no parameter has it."""
    for beginning, published in LAYOUTS:
        if name.startswith(beginning):
            return translate(published + name.removeprefix(beginning), OURS)
    return translate(name, OURS)


def translate(name, table):
    """Look a name up with its first number as {i}; None if it is not there."""
    number = re.search(r"\.(0|[1-9]\d{0,3})\.", name)  # no zero in front: 07 is not another spelling of 7
    if number is None:
        return table.get(name)
    found = table.get(name.replace(number[0], ".{i}.", 1))
    return found and found.replace("{i}", number[1])


# ----------------------------------------------------------------------------------------------------------------
# Files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def shards(folder):
    """The safetensors files of a checkpoint: one, or those that its index names, in order."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    files = {str(name) for name in read_json(folder / INDEX)["weight_map"].values()}
    for name in files:  # a path in it would make us open any file of this machine
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ValueError(f"{folder / INDEX}: {name!r} is not the bare name of a .safetensors file")
    return [folder / name for name in sorted(files)]


def read_json(file):
    return json.loads(file.read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------------
# Configs

IGNORED = {  # fields of the published files that do not change what the model computes
    "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "ignore_index", "image_seq_length",
    "initializer_factor", "initializer_range", "model_type", "pad_token_id", "pretraining_tp", "processor_class",
    "projection_dim", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache", "vision_use_head",
    "vocab_size", "_name_or_path",
    # of the preprocessor's
    "data_format", "feature_extractor_type", "image_processor_type", "_valid_processor_keys",
}  # fmt: skip


def fill(cls, values, where, defaults=None, **fixed):
    """A dataclass from a JSON object; what is absent or null takes its default, or else the class's.

    fixed: fields that this code honours for one value only. Raises ValueError that names the field: fixed to another
    value, or neither known nor empty, since it might change what the model computes.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    values = {name: value for name, value in values.items() if value is not None}
    for name, value in values.items():
        if name in fixed and value != fixed[name]:
            raise ValueError(f"{where}: {name} is {value!r}, and only {fixed[name]!r} is supported")
        if name not in known and name not in fixed and name not in IGNORED and value not in (False, "", [], {}):
            unknown = f"{where}: the field {name} = {value!r} is not known here"
            raise ValueError(f"{unknown} and might change what the model computes")
    return cls(**{**(defaults or {}), **{name: value for name, value in values.items() if name in known}})


ALIASES = {"image_token_id": "image_token_index", "vision_feature_layers": "vision_feature_layer"}  # → its other name
ALIASES["video_token_id"] = "video_token_index"
PUBLISHED_TOWER = dict(  # the default of LlavaConfig for a missing vision_config: CLIP's ViT-L/14 at 336 pixels
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    image_size=336, patch_size=14,
)  # fmt: skip
TEXT_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
ROPES = {  # rope_type → the numbers that it takes, in the order of TextConfig.rope_scaling
    "default": [],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
}


def read_config(folder, llava_config, text_config, vision_config, clean=lambda values, where: values):
    """config.json and generation_config.json → the three given dataclasses, filled and put together.

    clean: fills in what other kinds of LLaVA have by default (extras/family.py knows them), and takes out what other
    programs leave in config.json (extras/leftovers.py). Raises ValueError that names the field which asks for something
    that is not here.
    """
    where = folder / "config.json"
    values = read_json(where)
    values = clean(values, where)
    values = {ALIASES.get(name, name): value for name, value in values.items()}
    text, tower = values.pop("text_config", None) or {}, values.pop("vision_config", None) or PUBLISHED_TOWER
    defaults = kind_of(text_config, text)
    window = text.pop("sliding_window", defaults.get("sliding_window"))  # null is none, and not the default
    if "sliding_window" in defaults:  # the other kinds have none, whatever their configs say
        defaults["sliding_window"] = window
    text = fill(text_config, rope(text, where), f"{where}: text_config", defaults, **TEXT_FIXED)
    defaults = kind_of(vision_config, tower)
    act = vision_config(**defaults).hidden_act
    tower = fill(vision_config, tower, f"{where}: vision_config", defaults, hidden_act=act)
    if (folder / "generation_config.json").exists():  # it has the last word on where an answer ends
        generation = read_json(folder / "generation_config.json")
        ends = ("eos_token_id", "pad_token_id")
        values |= {name: generation[name] for name in ends if generation.get(name) is not None}
    config = fill(llava_config, values, where, projector_hidden_act="gelu")
    config.text_config, config.vision_config = text, tower
    text.tie_word_embeddings = config.tie_word_embeddings = text.tie_word_embeddings or config.tie_word_embeddings
    return config


def kind_of(cls, values):
    """The defaults of the kind that a part's model_type names, of those that the part's class knows."""
    kind = values.get("model_type") or next(iter(cls.KINDS))
    return {"model_type": kind, **cls.KINDS[kind]}


def rope(text, where):
    """A text_config, its rotary fields as TextConfig has them: the old place, unless empty, counts whole and alone."""
    old, new = text.pop("rope_scaling", None), text.pop("rope_parameters", None)
    scaling = {**(old or new or {})}
    kinds = [scaling.pop(name, None) for name in ("rope_type", "type")]
    kind = kinds[0] or kinds[1] or "default"
    if kind not in list(ROPES):
        raise ValueError(f"{where}: text_config.rope_scaling is {kind!r}; supported: {', '.join(ROPES)}")
    numbers = [scaling.pop(name, None) for name in ROPES[kind]]
    if None in numbers:
        raise ValueError(f"{where}: text_config.rope_scaling lacks {ROPES[kind][numbers.index(None)]} of {kind}")
    return text | scaling | {"rope_scaling": numbers or None}


STEPS = {step: True for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")}
OFF = {"do_resize", "do_rescale", "do_normalize", "do_center_crop"}  # null is false here, and elsewhere as if absent
CROPS = {"size": 224, "crop_size": 224, "do_center_crop": True, "do_pad": None}
SQUASHES = CROPS | {"crop_size": None, "do_center_crop": False}
PICTURES = {  # how image_processor_type begins → what its class has by default; do_pad stands for padding to a square
    # only where it is False: what has a True pads with tiles, what has none does not pad
    "CLIPImage": CROPS, "CLIPFeature": CROPS, "LlavaImage": CROPS | {"do_pad": False},
    "SiglipImage": SQUASHES | dict(size={"height": 224, "width": 224}, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    "LlavaNextImage": CROPS | {"do_pad": True},
    "LlavaOnevisionImage": SQUASHES | dict(size={"height": 384, "width": 384}, do_pad=True),
}  # fmt: skip


def read_preprocess_config(folder, preprocess_config, tower):
    """The part of processor_config.json in which transformers 5 keeps it, or else preprocessor_config.json → the
    dataclass. As in the reference, the part counts whole and alone: nothing is merged with an older file beside it.

    tower: the config of the vision tower, whose size the pictures must have.
    """
    where = folder / "processor_config.json"
    values = read_json(where).get("image_processor") if where.exists() else None
    if values is None:
        where = folder / "preprocessor_config.json"
        values = read_json(where)
    name = values.get("image_processor_type") or values.get("feature_extractor_type") or "LlavaImageProcessor"
    kind = next((kind for kind in PICTURES if str(name).startswith(kind)), None)
    if kind is None:
        raise ValueError(f"{where}: image_processor_type is {name!r}; supported: those of CLIP, SigLIP and LLaVA")
    given = {name: value is not None and value for name, value in values.items() if value is not None or name in OFF}
    values, pads = PICTURES[kind] | given, PICTURES[kind]["do_pad"]
    values["do_pad"] = pads is False and values["do_pad"]  # the others never pad to a square, whatever they say
    size, crop = values["size"], values["crop_size"]
    values["size"] = {"shortest_edge": size} if isinstance(size, int) else size  # old files hold bare numbers
    values["crop_size"] = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    if "height" in values["size"] and not values["do_center_crop"]:  # squashed; a crop_size still is that of tiles
        values |= {"crop_size": (pads and values["crop_size"]) or values["size"], "do_center_crop": True}
    config = fill(preprocess_config, values, where, **STEPS, do_center_crop=True)
    edge = tower.image_size
    square = {"height": edge, "width": edge}
    if config.crop_size != square or (config.size != square and set(config.size) != {"shortest_edge"}):
        raise ValueError(
            f"{where}: size {config.size} and crop_size {config.crop_size} are not supported: a picture is scaled to "
            f"the {edge} x {edge} pixels of the vision tower, or its shortest_edge is given and it is cropped to them"
        )
    return config


# ----------------------------------------------------------------------------------------------------------------
# Reading

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def scan(model, folder):
    """Compare the headers of a checkpoint with a model, before any of the numbers is read.

    Returns {our name: (file, name in the file, dtype)}. Raises ValueError naming the tensor, as it is named in the
    file, that is unknown, missing, repeated, of another shape, or not of floating-point numbers.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {}
    for file in shards(folder):
        for name, shape, dtype in header(file):
            ours, tensor = our_name(name), f"{file}: the tensor {name}"
            if ours not in expected:
                if not any(re.search(pattern, name) for pattern, _ in UNUSED):
                    raise ValueError(f"{tensor} has no place in this model")
                continue
            if ours in found:
                other, its_name, _ = found[ours]
                raise ValueError(f"{tensor} appears twice (the other: {its_name} in {other.name})")
            if shape != expected[ours]:
                raise ValueError(f"{tensor} has the shape {shape}, by config.json it should be {expected[ours]}")
            if dtype not in DTYPES:
                raise ValueError(f"{tensor} is of type {dtype}; {', '.join(DTYPES)} are read")
            found[ours] = (file, name, DTYPES[dtype])
    if is_tied(model) and "llama.head.weight" not in found and "llama.embed.weight" in found:
        found["llama.head.weight"] = found["llama.embed.weight"]
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{folder}: the tensor {their_name(missing[0], found)} is missing ({len(missing)} in all)")
    return found


def header(file):
    """(name, shape, type) of each tensor in a safetensors file; the numbers are not read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()]
    except FileNotFoundError:
        raise FileNotFoundError(f"{file.parent} lacks {file.name}, which its index names: download it again") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from None


def their_name(ours, found):
    """Our name → the name it would have in this checkpoint, judged by the prefixes of the tensors that are there."""
    published = translate(ours, THEIRS)
    names = [name for _, name, _ in found.values()]
    if ours == "llama.head.weight" and any(name.startswith("model.") for name in names):
        return "lm_head.weight"  # where the rest is below model., the head stands beside it
    for beginning, replaced in LAYOUTS:
        if published.startswith(replaced) and any(name.startswith(beginning) for name in names):
            return beginning + published.removeprefix(replaced)
    return published


@torch.inference_mode(False)  # ordinary tensors, whatever mode load is called in
def read(model, found, dtype, device, progress=iter):
    """Put the numbers that scan found into a model on the meta device, one tensor at a time, cast on the device.

    progress: an iterator around the names that shows how far it is, such as tqdm. A layer with a method take_weight
    (those of extras/) gets its slice of the file and keeps the numbers in a form of its own.
    """
    state = {}
    for ours in progress(found):
        file, name, _ = found[ours]
        layer = model.get_submodule(ours.rpartition(".")[0])
        if ours == "llama.head.weight" and is_tied(model) and found[ours] == found["llama.embed.weight"]:
            state[ours] = state["llama.embed.weight"]  # one matrix of the file is both
            continue
        # reopened for each tensor, since a file's pages stay in memory while it is open; copied, to keep none mapped
        with safe_open(file, framework="pt") as tensors:
            part = tensors.get_slice(name)
            if hasattr(layer, "take_weight") and ours.endswith(".weight"):
                numbers = layer.take_weight(part, device)
            else:
                numbers = state[ours] = part[:].to(device, dtype, copy=True)
        if not (numbers.sum().isfinite() or numbers.isfinite().all()):  # the sum is fast, and may itself overflow
            notice = f"{file}: the tensor {name} holds numbers that are not finite in {numbers.dtype}"
            warnings.warn(notice, stacklevel=2)
    tied = is_tied(model)
    state |= {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}  # what layers took
    model.load_state_dict(state, assign=True)  # makes two parameters of embedding and head
    if tied and torch.equal(model.llama.head.weight, model.llama.embed.weight):
        model.llama.head.weight = model.llama.embed.weight
    elif tied:
        file, name, _ = found["llama.head.weight"]
        notice = f"{file}: tie_word_embeddings is true, but {name} differs from the embedding: it is used"
        warnings.warn(notice, stacklevel=2)
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False


def is_tied(model):
    """Whether the head is the embedding; a quantised one is a copy of it."""
    return getattr(model.llama.head, "weight", None) is model.llama.embed.weight
