"""
How the numbers are stored: the only file that knows.

    find a checkpoint → read its configs → map every tensor's name onto ours → check → cast → (and write it all back)

A checkpoint is a folder of JSON files and of safetensors files (a JSON header with names, shapes and offsets, then the raw
numbers). Nothing here unpickles, and loading is strict both ways: each tensor of the files is used exactly once, each
parameter of the model is set exactly once, or there is an error that names the one that was not.

No paper has a section on this. Notebook: notebooks/6_the_bug_zoo.ipynb.
"""

import contextlib
import dataclasses
import json
import os
import re
import types
import typing
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# ----------------------------------------------------------------------------------------------------------------
# Names. Read from left to right to load, from right to left to save.

NAMES = [  # as llava-hf publishes them → as the modules call them; {i} is the number of the block
    ("vision_tower.vision_model.embeddings.class_embedding", "vision.class_embedding"),
    ("vision_tower.vision_model.embeddings.patch_embedding.weight", "vision.patch_embedding.weight"),
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
    ("multi_modal_projector.linear_1", "projector.linear_1"),
    ("multi_modal_projector.linear_2", "projector.linear_2"),
    ("language_model.model.embed_tokens.weight", "llama.embed.weight"),
    ("language_model.model.layers.{i}.input_layernorm.weight", "llama.blocks.{i}.attention_norm.weight"),
    ("language_model.model.layers.{i}.self_attn.q_proj.weight", "llama.blocks.{i}.attention.wq.weight"),
    ("language_model.model.layers.{i}.self_attn.k_proj.weight", "llama.blocks.{i}.attention.wk.weight"),
    ("language_model.model.layers.{i}.self_attn.v_proj.weight", "llama.blocks.{i}.attention.wv.weight"),
    ("language_model.model.layers.{i}.self_attn.o_proj.weight", "llama.blocks.{i}.attention.wo.weight"),
    ("language_model.model.layers.{i}.post_attention_layernorm.weight", "llama.blocks.{i}.mlp_norm.weight"),
    ("language_model.model.layers.{i}.mlp.gate_proj.weight", "llama.blocks.{i}.mlp.gate.weight"),
    ("language_model.model.layers.{i}.mlp.up_proj.weight", "llama.blocks.{i}.mlp.up.weight"),
    ("language_model.model.layers.{i}.mlp.down_proj.weight", "llama.blocks.{i}.mlp.down.weight"),
    ("language_model.model.norm.weight", "llama.norm.weight"),
    ("language_model.lm_head.weight", "llama.head.weight"),
]
# a name without a dot-weight stands for both of a pair, weight and bias
NAMES = [
    (theirs + end, ours + end)
    for theirs, ours in NAMES
    for end in ([""] if theirs.endswith(("weight", "class_embedding")) else [".weight", ".bias"])
]
OURS, THEIRS = dict(NAMES), {ours: theirs for theirs, ours in NAMES}

LAYOUTS = [  # the first matching beginning is replaced: other ages of the library saved other ones
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model."),  # the authors' own
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),  # transformers 4.52 to 4.57 in memory
    ("model.vision_tower.", "vision_tower.vision_model."),  # transformers 5 in memory
    ("vision_tower.vision_model.", "vision_tower.vision_model."),  # as published
    ("vision_tower.", "vision_tower.vision_model."),  # saved by transformers 5
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),  # the authors' own; 1 is the GELU
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("language_model.", "language_model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),  # the authors' own
]

UNUSED = [  # known tensors that the model has no use for, and why
    (r"\.embeddings\.position_ids$", "0, 1, 2, …: written by old versions, a position is its own index"),
    (r"\.rotary_emb\.inv_freq$", "computed from rope_theta"),
]


def our_name(name):
    """A tensor's name in a file of any layout → ours, None if no parameter has it."""
    for beginning, published in LAYOUTS:
        if name.startswith(beginning):
            return translate(published + name.removeprefix(beginning), OURS)
    return None


def translate(name, table):
    """Look a name up with its first number as {i}; None if it is not there."""
    number = re.search(r"\.(0|[1-9]\d{0,3})\.", name)
    if number is None:
        return table.get(name)
    found = table.get(name.replace(number[0], ".{i}.", 1))
    return found and found.replace("{i}", number[1])


# ----------------------------------------------------------------------------------------------------------------
# Where a checkpoint is

CONFIGS = ["config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth")


def find(model, revision=None):
    """A folder, "tiny" or a Hub id → the folder (pathlib.Path). A Hub id is downloaded unless the Hub's cache has it.

    Raises OSError with a finished sentence.
    """
    if model == "tiny":
        return Path(__file__).resolve().parent / "tiny"
    if Path(model).is_dir():
        return Path(model)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(model)):
        raise OSError(f"there is no model folder {model}: give a folder, a Hub id such as llava-hf/llava-1.5-7b-hf, or tiny")
    return download(model, revision)


def download(repo, revision):
    """Bring the files that are needed, and no others, into the Hub's cache; a broken download goes on where it stopped.

    Obeys HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT and HF_TOKEN. Returns the folder of the snapshot.
    """
    from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download

    here = f"{repo} at revision {revision}" if revision else repo
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*CONFIGS, INDEX]))
        commit = folder.name  # so that all the files are of the same one
        files = [file.name for file in shards(folder)] if (folder / INDEX).exists() else [SINGLE]
        for name in files:
            if not (folder / name).exists() and not constants.HF_HUB_OFFLINE:
                fetch(repo, name, commit, folder.parents[1] / "blobs")
            hf_hub_download(repo, name, revision=commit)
    except errors.GatedRepoError:
        raise OSError(f"{here} asks for a consent: give it on its page and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise OSError(f"{repo} has no revision {revision}") from None
    except errors.RepositoryNotFoundError:
        raise OSError(f"{here} is neither a folder here nor a repository on the Hub (a private one needs HF_TOKEN)") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = f"the Hub gave no answer ({reason(error.__cause__ or error)})"
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else why
        raise OSError(f"{here} is not in the cache and {why}: give a folder, or --model tiny") from None
    except errors.EntryNotFoundError:
        kept = []
        with contextlib.suppress(OSError, errors.HTTPError):  # no answer now: then it is just missing
            kept = [file for file in HfApi().list_repo_files(repo, revision=commit) if file.endswith(PICKLED) and name == SINGLE]
        raise OSError(pickled(here, kept[0]) if kept else f"{here} holds no {name}") from None
    except errors.HfHubHTTPError as error:
        raise OSError(f"the Hub refused {here}: {reason(error)}") from None
    except json.JSONDecodeError:  # a page where an answer should be: some networks ask for a password first
        raise OSError(f"{here} cannot be had, as what answers is not the Hub: give a folder, or --model tiny") from None
    except errors.HTTPError as error:  # of the connection
        raise OSError(f"the download of {here} broke off ({reason(error)}): the same command goes on from there") from None
    return folder


def fetch(repo, name, commit, blobs):
    """A large file into the Hub's cache, where hf_hub_download then finds it. What an earlier call got of it before it was
    stopped is kept and continued, while recent versions of the Hub's own client begin anew.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    blobs.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(repo, name, revision=commit)
    about = get_hf_file_metadata(url)
    whole, part = blobs / about.etag, blobs / f"{about.etag}.part"
    with WeakFileLock(blobs / f"{about.etag}.lock"):  # two processes that want the same file
        if whole.exists():
            return
        with open(part, "ab") as file:
            http_get(
                url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=about.size, displayed_filename=name
            )
        part.replace(whole)


def reason(error):
    """The first line of an error that says anything."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def pickled(where, name):
    return (
        f"{where} holds its weights only as {name}: such files are pickled, can run any code when opened and are not read here. "
        f"Ask for a repository with .safetensors files"
    )


def shards(folder):
    """The safetensors files of a checkpoint, in order. Raises OSError or ValueError with a finished sentence."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        kept = sorted(file.name for file in folder.iterdir() if file.name.endswith(PICKLED))
        raise OSError(pickled(folder, kept[0]) if kept else f"{folder} holds neither {SINGLE} nor {INDEX}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map, which says what is in which file")
    for name in weight_map.values():
        # the index comes from outside: a name with a path in it would make us open any file of this machine
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ValueError(f"{folder / INDEX}: weight_map names {name!r}, which is not the bare name of a .safetensors file")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    here = folder.resolve()
    for file in files:  # nor may a link lead elsewhere, except to where the Hub's cache keeps what its snapshots link to
        if Path(os.path.realpath(file)).parent not in (here, here.parent.parent / "blobs"):
            raise ValueError(f"{folder / INDEX}: {file.name} is a link out of the folder: put the file itself there")
    return files


# ----------------------------------------------------------------------------------------------------------------
# Configs


def small_file(file, most=50_000_000):
    """The same path, if a file of at most so many bytes is there. Raises OSError or ValueError with a finished sentence."""
    if not file.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{file.parent} holds no {file.name}")
    if file.stat().st_size > most:
        raise ValueError(f"{file} is too large for what it should hold")
    return file


def read_json(file):
    """A JSON file that holds an object → dict. Raises OSError or ValueError with a finished sentence."""
    small_file(file, 4_000_000)  # an object takes forty times the memory of its two brackets
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of its syntax, its UTF-8, a number of thousands of digits, its depth
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object")
    return values


IGNORED = {  # fields that do not change what the model computes, of the model's own config …
    "architectures", "attention_dropout", "attn_implementation", "auto_map", "bos_token_id", "description", "dropout", "dtype",
    "eos_token_id", "ignore_index", "image_seq_length", "initializer_factor", "initializer_range", "is_composition",
    "max_window_layers", "model_type", "num_image_tokens", "pad_token_id", "pretraining_tp", "processor_class", "projection_dim",
    "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache", "use_image_newline_parameter",
    "vocab_size", "_attn_implementation_autoset", "_name_or_path",
    # … of the preprocessor's …
    "data_format", "feature_extractor_type", "image_processor_type", "_valid_processor_keys",
    # … and those that every config of transformers 4 carried along when it was saved in full
    "begin_suppress_tokens", "chunk_size_feed_forward", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "id2label", "label2id", "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_scores", "prefix", "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16",
}  # fmt: skip


def fill(cls, values, where, **fixed):
    """A dataclass from a JSON object; what is absent or null takes the class's default.

    fixed: fields that this code honours for one value only. Raises ValueError that names the field: of a wrong type or size,
    fixed to another value, or neither known nor empty, since it might change what the model computes.
    """
    types_ = {field.name: field.type for field in dataclasses.fields(cls)}
    known = {}
    for name, value in values.items():
        if name in fixed:
            if value != fixed[name] and value is not None:
                raise ValueError(f"{where}: {name} is {value!r}, and only {fixed[name]!r} is supported")
        elif name in types_:
            if value is not None:
                known[name] = checked(value, types_[name], f"{where}: {name}")
        elif name not in IGNORED and value not in (None, False, [], {}):
            raise ValueError(f"{where}: the field {name} = {value!r} is not known here and might change what the model computes")
    return cls(**known)


def checked(value, expected, where):
    """The value, if it is of the expected type and, being a number, within bounds that no real checkpoint leaves."""
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    if float in options and type(value) is int:
        value = float(value)
    if type(value) not in options:
        raise ValueError(f"{where} is {value!r}, of the wrong type")
    few = ("heads", "channels", "_dim", "image_size", "patch_size")
    limit = 256 if where.endswith("layers") else 4096 if where.endswith(few) else 2**24
    if type(value) in (int, float) and not -limit <= value <= limit:
        raise ValueError(f"{where} is {value!r}, out of range")
    positive = ("size", "layers", "heads", "channels", "_dim", "embeddings", "window", "_eps", "_theta", "_factor")
    if type(value) in (int, float) and value <= 0 and where.endswith(positive):
        raise ValueError(f"{where} is {value!r}, and must be above 0")
    numbers = (int,) if where.endswith(("_layer", "_id")) else (int, float)
    if type(value) is list:
        good = all(type(item) in numbers and -limit <= item <= limit for item in value)
        if not (good and 0 < len(value) <= 256):
            raise ValueError(f"{where} is {value!r}, and must be a list of 1 to 256 numbers")
    if type(value) is dict and not all(type(item) is int and 0 < item <= 4096 for item in value.values()):
        raise ValueError(f"{where} is {value!r}, and must hold numbers of pixels")
    return value


# where transformers' MistralConfig has other defaults than LlamaConfig
MISTRAL = dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
PUBLISHED_TOWER = dict(  # the default of LlavaConfig for a missing vision_config: CLIP's ViT-L/14 at 336 pixels
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
)
TEXT_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
STEPS = dict.fromkeys(["do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"], True)


def read_config(folder, llava_config, preprocess_config):
    """The JSON files of a checkpoint → the two given dataclasses, filled (llava.LlavaConfig, vision.PreprocessConfig).

    Raises ValueError that names the field, or OSError that names the file.
    """
    where = folder / "config.json"
    values = read_json(where)
    if "mm_vision_tower" in values or "mm_projector_type" in values:
        raise ValueError(f"{where} is of the authors' own format: use the same model as llava-hf converted it")
    if values.get("model_type") != "llava":
        names = values.get("architectures")
        name = names[0] if isinstance(names, list) and names else values.get("model_type")
        raise ValueError(f"{where} describes a {name}; this is LLaVA (LlavaForConditionalGeneration) and runs nothing else")
    if "image_token_id" in values:  # its other name
        values.setdefault("image_token_index", values.pop("image_token_id"))
    text, tower = section(values, "text_config", where), section(values, "vision_config", where) or PUBLISHED_TOWER
    kind = text.setdefault("model_type", "llama")
    if kind not in ("llama", "mistral"):
        raise ValueError(f"{where}: text_config.model_type is {kind!r}; llama and mistral are supported")
    if tower.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise ValueError(f"{where}: vision_config.model_type is {tower['model_type']!r}; clip_vision_model is supported")
    rope = section(text, "rope_scaling", where) | section(text, "rope_parameters", where)  # its old and its new name
    if [rope.pop("rope_type", "default"), rope.pop("type", "default")] != ["default"] * 2:
        raise ValueError(f"{where}: text_config.rope_scaling is set, and only unscaled positions are supported")
    if kind == "mistral":
        text = MISTRAL | text
    else:
        text.pop("sliding_window", None)  # Llama has none, whatever its config says

    classes = {field.name: field.type for field in dataclasses.fields(llava_config)}
    text = fill(classes["text_config"], text | rope, f"{where}: text_config", **TEXT_FIXED)
    tower = fill(classes["vision_config"], tower, f"{where}: vision_config", hidden_act="quick_gelu")
    if (folder / "generation_config.json").exists():  # it has the last word on where an answer ends
        generation = read_json(folder / "generation_config.json")
        for name in ("eos_token_id", "pad_token_id"):
            if generation.get(name) is not None:
                values[name] = checked(generation[name], classes[name], f"{folder / 'generation_config.json'}: {name}")
    if tower.image_size < tower.patch_size:
        raise ValueError(f"{where}: vision_config: image_size is smaller than patch_size")
    if tower.hidden_size % tower.num_attention_heads:
        raise ValueError(f"{where}: vision_config: hidden_size is not a multiple of num_attention_heads")
    if text.num_attention_heads % text.num_key_value_heads or text.head_dim % 2 or not text.head_dim:
        raise ValueError(f"{where}: text_config: num_attention_heads is no multiple of num_key_value_heads, or head_dim not even")
    config = fill(llava_config, values, where, projector_hidden_act="gelu")
    config.text_config, config.vision_config = text, tower
    layers = config.vision_feature_layer if isinstance(config.vision_feature_layer, list) else [config.vision_feature_layer]
    if any(not -tower.num_hidden_layers - 1 <= layer <= tower.num_hidden_layers for layer in layers):
        raise ValueError(f"{where}: vision_feature_layer is {layers}, and the tower has {tower.num_hidden_layers} layers")
    if (strategy := config.vision_feature_select_strategy) not in ("default", "full"):
        raise ValueError(f"{where}: vision_feature_select_strategy is {strategy!r}, and must be 'default' or 'full'")
    text.tie_word_embeddings = config.tie_word_embeddings = text.tie_word_embeddings or config.tie_word_embeddings
    return config, read_preprocess_config(folder, preprocess_config, tower.image_size)


def section(values, name, where):
    """Take a JSON object out of another one; {} if it is absent or null."""
    value = values.pop(name, None)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where}: {name} is {value!r}, and must be an object")
    return value or {}


def read_preprocess_config(folder, preprocess_config, image_size):
    """preprocessor_config.json, or the part of processor_config.json in which transformers 5 keeps it → the dataclass."""
    where = folder / "preprocessor_config.json"
    if where.exists():
        values = read_json(where)
    else:
        where = folder / "processor_config.json"
        values = section(read_json(where), "image_processor", where)
        if not values:
            raise ValueError(f"{folder} holds no preprocessor_config.json, and its processor_config.json no image_processor")
    kind = values.get("image_processor_type", "CLIP")
    if not str(kind).startswith(("CLIP", "Llava")):
        raise ValueError(f"{where}: image_processor_type is {kind!r}; only CLIP's is supported")
    size, crop = values.get("size", 224), values.get("crop_size", 224)
    values["size"] = {"shortest_edge": size} if isinstance(size, int) else size  # old files hold bare numbers
    values["crop_size"] = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    config = fill(preprocess_config, values, where, **STEPS)
    if not len(config.image_mean) == len(config.image_std) == 3 or min(config.image_std) <= 0 or config.resample not in range(6):
        raise ValueError(f"{where}: image_mean and image_std must have 3 numbers, the latter above 0, and resample be 0 to 5")
    if set(config.size) != {"shortest_edge"} or config.crop_size != {"height": image_size, "width": image_size}:
        raise ValueError(
            f"{where}: size {config.size} and crop_size {config.crop_size} are not supported: the picture's shortest_edge "
            f"must be given, and the crop be the {image_size} pixels of the vision tower"
        )
    return config


def json_files(config, preprocess_config, dtype):
    """The same, the other way round: {file name: JSON object} as read_config and transformers read them."""
    values = dataclasses.asdict(config)
    values |= {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "projector_hidden_act": "gelu"}
    values |= {"vocab_size": config.text_config.vocab_size, "torch_dtype": str(dtype).removeprefix("torch.")}
    values["vision_config"]["model_type"] = "clip_vision_model"
    preprocessor = dataclasses.asdict(preprocess_config) | STEPS | {"image_processor_type": "CLIPImageProcessor"}
    ends = {"eos_token_id": config.eos_token_ids, "pad_token_id": config.padding}
    generation = {"bos_token_id": config.text_config.bos_token_id, **ends}
    return {"config.json": values, "generation_config.json": generation, "preprocessor_config.json": preprocessor}


# ----------------------------------------------------------------------------------------------------------------
# Reading

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def scan(model, folder):
    """Compare the headers of a checkpoint with a model, before any of the numbers is read.

    Returns {our name: (file, name in the file, dtype)}. Raises ValueError naming the tensor, as it is named in the file, that
    is unknown, missing, repeated, of another shape, or not of floating-point numbers.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {}
    for file in shards(folder):
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise ValueError(f"{file} is a folder or a pipe, and should be a file")
        try:
            with safe_open(file, framework="pt") as header:
                slices = {name: header.get_slice(name) for name in header.keys()}  # noqa: SIM118
                entries = [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()]
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder} lacks {file.name}, which its index names: download it again") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from None
        for name, shape, dtype in entries:
            ours = our_name(name)
            if ours not in expected:
                if not any(re.search(pattern, name) for pattern, _ in UNUSED):
                    raise ValueError(f"{file}: the tensor {name} has no place in this model")
                continue
            if ours in found:
                other = found[ours]
                raise ValueError(f"{file}: the tensor {name} is there twice, the other is {other[1]} in {other[0].name}")
            if shape != expected[ours]:
                raise ValueError(f"{file}: the tensor {name} has the shape {shape}, by config.json it should be {expected[ours]}")
            if dtype not in DTYPES:
                raise ValueError(f"{file}: the tensor {name} is of type {dtype}; {', '.join(DTYPES)} are read")
            found[ours] = (file, name, DTYPES[dtype])
    if is_tied(model) and "llama.head.weight" not in found and "llama.embed.weight" in found:
        found["llama.head.weight"] = found["llama.embed.weight"]
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{folder}: the tensor {their_name(missing[0], found)} is missing ({len(missing)} in all)")
    return found


def their_name(ours, found):
    """Our name → the name it would have in this checkpoint, judged by a tensor that is there."""
    published = translate(ours, THEIRS)
    names = [name for _, name, _ in found.values()]
    if any(name.startswith("model.") for name in names):
        names.append("lm_head.")  # where the rest is below model., the head stands beside it
    for beginning, replaced in LAYOUTS:
        if published.startswith(replaced) and any(name.startswith(beginning) for name in names):
            return beginning + published.removeprefix(replaced)
    return published


def main_dtype(found, model):
    """The dtype that most of a checkpoint's numbers are stored in."""
    sizes = dict.fromkeys(DTYPES.values(), 0)
    for ours, tensor in model.state_dict().items():
        sizes[found[ours][2]] += tensor.numel()
    return max(sizes, key=sizes.get)


@torch.inference_mode(False)  # ordinary tensors, whatever mode load is called in
def read(model, found, dtype, device):
    """Put the numbers that scan found into a model on the meta device, one tensor at a time, cast to dtype on the device."""
    state, expected = {}, model.state_dict()
    for ours in progress(found, sum(tensor.numel() for tensor in expected.values())):
        file, name, _ = found[ours]
        # Opened anew each time, as a file's pages stay in memory while it is open; and copied, so that nothing refers to it.
        with safe_open(file, framework="pt") as tensors:
            numbers = read_part(tensors, name, expected.get(ours))
            layer = model.get_submodule(ours.rpartition(".")[0])
            if hasattr(layer, "keep") and ours.endswith(".weight"):
                layer.keep(numbers, device)
            else:
                numbers = numbers.to(device, dtype, copy=True)
                state[ours] = as_part(numbers, expected[ours])
            if not (numbers.sum().isfinite() or numbers.isfinite().all()):  # the sum is fast, and may itself overflow
                warnings.warn(f"{file}: the tensor {name} holds numbers that are not finite in {numbers.dtype}", stacklevel=2)
    tied = is_tied(model)
    if tied and not torch.equal(state["llama.head.weight"], state["llama.embed.weight"]):
        file, name, _ = found["llama.head.weight"]
        warnings.warn(f"{file}: tie_word_embeddings is true, but {name} differs from the embedding: it is used", stacklevel=2)
        tied = model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    state |= {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}  # those that layers keep
    model.load_state_dict(state, assign=True)
    if tied:  # assign makes two parameters of them
        model.llama.head.weight = model.llama.embed.weight


def read_part(tensors, name, parameter):
    """A tensor of an open file; of a parameter that is split over several processes, only this one's rows or columns."""
    if not hasattr(parameter, "placements"):
        return tensors.get_tensor(name)
    dim, mesh = parameter.placements[0].dim, parameter.device_mesh
    size = parameter.shape[dim] // mesh.size()
    own = slice(mesh.get_local_rank() * size, (mesh.get_local_rank() + 1) * size)
    return tensors.get_slice(name)[(slice(None),) * dim + (own,)]


def as_part(numbers, parameter):
    """What read_part gave, in the form in which the parameter is split, if it is."""
    if not hasattr(parameter, "placements"):
        return numbers
    return type(parameter).from_local(numbers, parameter.device_mesh, parameter.placements)


def is_tied(model):
    """Whether the head is the embedding; a quantised one is a copy of it."""
    return getattr(model.llama.head, "weight", None) is model.llama.embed.weight


def progress(names, parameters):
    """The same names, with a bar on stderr if the model is so large that one waits for it."""
    if parameters < 100e6:
        return names
    from huggingface_hub.utils import tqdm

    return tqdm(names, desc="loading", unit="tensor", leave=False)


# ----------------------------------------------------------------------------------------------------------------
# Writing


def write(model, folder, configs, tokenizer, shard_size=5_000_000_000):
    """The published layout: the tensors under the published names in files of at most shard_size bytes, and the rest.

    configs: {file name: JSON object}. tokenizer: the text of tokenizer.json. What another checkpoint left in the folder is
    removed last of all.
    """
    if list(model.buffers()):
        raise ValueError("a quantised or packed model cannot be saved: load it without quantize, compile or inference mode")
    tensors = {translate(name, THEIRS): tensor.contiguous() for name, tensor in model.state_dict().items()}
    if is_tied(model):
        del tensors["language_model.lm_head.weight"]
    parts, room = [], 0
    for name, tensor in tensors.items():
        if tensor.nbytes > room:
            parts.append({})
            room = shard_size
        parts[-1][name] = tensor
        room -= tensor.nbytes
    files = [SINGLE]
    if len(parts) > 1:
        files = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        size = sum(tensor.nbytes for tensor in tensors.values())
        configs = {**configs, INDEX: {"metadata": {"total_size": size}, "weight_map": weight_map}}
    texts = {file: json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n" for file, values in configs.items()}
    texts["tokenizer.json"] = tokenizer
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, part in zip(files, parts, strict=True):
            save_file(part, folder / f"{file}.new", metadata={"format": "pt"})
        for file, text in texts.items():
            (folder / f"{file}.new").write_text(text, encoding="utf-8")
        for file in (*files, *texts):  # only now that all is written: a disk that is full leaves the old checkpoint as it was
            (folder / f"{file}.new").replace(folder / file)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder} cannot be written: {error}") from None
    finally:
        for file in (*files, *texts):
            with contextlib.suppress(NotADirectoryError):
                (folder / f"{file}.new").unlink(missing_ok=True)
    for stale in [folder / SINGLE, *folder.glob("model-*-of-*.safetensors"), folder / INDEX]:
        if stale.name not in files and stale.name not in texts:
            stale.unlink(missing_ok=True)
