"""A checkpoint written in the published layout, which llava.load and transformers read, its AutoProcessor included."""

import contextlib
import dataclasses
import itertools
import json
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import llama
import llava
import vision
import weights
from extras import beside, checks, family

HEAD = "llama.head.weight"
# of the files that are passed on: what would count in place of what is written here, or name files that are not written
REPLACED = {"image_processor", "feature_extractor", "auto_map", "fast_tokenizer_files"}


def save(model, processor, folder):
    """Write model and processor into a folder. Raises ValueError or OSError; then the folder is as it was."""
    folder = Path(folder)
    check_names(model)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), whose base model transformers would load in place of "
            f"this one: name another folder"
        )
    try:
        config = plain(model)
        others = getattr(processor.tokenizer, "beside", {})  # a plain llama.Tokenizer has none
        texts = small_files(config, processor.preprocess_config, processor.tokenizer.bpe, others, model.dtype)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"the configs of model and processor are not such as load gives them: {error!r}") from None
    read, pictures = read_back(texts, folder)
    check_same(config, read, "the model's config")
    check_same(processor.preprocess_config, pictures, "processor.preprocess_config")
    check_tensors(model, read)
    write(model, folder, texts)


# ----------------------------------------------------------------------------------------------------------------
# Whether load would take it


def check_names(model):
    """Raise ValueError that names the first parameter for which a checkpoint has no name."""
    if any(hasattr(layer, "take_weight") for layer in model.modules()):
        raise ValueError(
            "a quantised, packed or split model cannot be saved: load it without quantize, compile or inference mode"
        )
    for name in model.state_dict():
        if not weights.translate(name, weights.THEIRS):
            raise ValueError(no_place(name))


def no_place(name):
    return (
        f"{name} has no place in a checkpoint, so nothing was written: merge or take off first what was put around the "
        f"model (LoRA, torch.compile, weight_norm, …) or added to it"
    )


def plain(model):
    """A model's config as load would give it: the ids that end and pad written out, tied as the model is."""
    config = model.config
    tied = is_tied(model)
    ids = {"eos_token_id": config.eos_token_ids, "pad_token_id": config.padding}
    text = dataclasses.replace(config.text_config, tie_word_embeddings=tied)
    return dataclasses.replace(config, text_config=text, tie_word_embeddings=tied, **ids)


def is_tied(model):
    """Whether one matrix is written for embedding and head. Tied by hand they are two: the config says so."""
    return weights.is_tied(model) and (model.config.tie_word_embeddings or model.config.text_config.tie_word_embeddings)


def read_back(texts, folder):
    """What load makes of the small files, {file name: text} → (LlavaConfig, PreprocessConfig).

    Raises ValueError with its words if it refuses them. folder: where they are to be written.
    """
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        try:
            put(texts, place, "")
        except OSError as error:
            raise OSError(f"{folder} cannot be written: {error}") from None
        try:
            checks.checkpoint(place)
            config = weights.read_config(place, llava.LlavaConfig, llama.TextConfig, vision.VisionConfig, checks.clean)
            pictures = weights.read_preprocess_config(place, vision.PreprocessConfig, config.vision_config)
            tokenizer = checks.Tokenizer(place / "tokenizer.json", config.text_config)
            llava.Processor(tokenizer, pictures, dataclasses.replace(config))
        except (ValueError, OSError) as error:
            why = str(error).replace(made, str(folder))
            raise ValueError(f"nothing was written, since load would refuse it: {why}") from None
    return config, pictures


def check_same(config, read, where):
    """Raise ValueError that names the first field of a dataclass which its file does not keep."""
    for name in [field.name for field in dataclasses.fields(config)]:
        value, found = getattr(config, name), getattr(read, name)
        if dataclasses.is_dataclass(value):
            check_same(value, found, f"{where}: {name}")
        elif json.loads(json.dumps(value)) != found:  # a tuple is a list by then
            raise ValueError(
                f"{where}: {name} is {value!r}, which a checkpoint of this kind cannot say: load would read {found!r}, "
                f"so nothing was written"
            )


def check_tensors(model, config):
    """Raise ValueError that names the first parameter which load would refuse or not find, by the config that it
    would read.
    """
    tensors = model.state_dict()
    with torch.device("meta"):
        expected = llava.Llava(config).state_dict()
    for name, tensor in tensors.items():
        if name not in expected:
            raise ValueError(no_place(name))
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
            kind = type(tensor).__name__ if type(tensor) is not torch.Tensor else tensor.layout
            raise ValueError(f"{name} is a {kind}: a checkpoint holds plain, dense tensors")
        if tensor.dtype not in weights.DTYPES.values():
            names = ", ".join(str(dtype) for dtype in weights.DTYPES.values())
            raise ValueError(f"{name} is in {tensor.dtype}, which load would refuse: cast it to one of {names}")
        if tensor.is_meta or tensor.shape != expected[name].shape:
            shape = "no numbers (it is on the meta device)" if tensor.is_meta else f"the shape {tuple(tensor.shape)}"
            raise ValueError(f"{name} has {shape}; by the model's config it is {tuple(expected[name].shape)}")
    for name in expected:
        if name not in tensors:
            raise ValueError(f"{name} is missing in the model: what would be written could not be loaded again")
    check_shared(tensors, {HEAD} if weights.is_tied(model) else set())


def check_shared(tensors, free):
    """Raise ValueError for two tensors that lie in the same memory: as two, they would be trained apart. free: the
    names that may. What is not contiguous is copied before it is written.
    """
    dense = {name: x for name, x in tensors.items() if x.is_contiguous() and name not in free}
    places = sorted((str(x.device), x.data_ptr(), x.data_ptr() + x.nbytes, name) for name, x in dense.items())
    for (device, _, end, name), (its_device, start, _, other) in itertools.pairwise(places):
        if device == its_device and start < end:
            raise ValueError(
                f"{name} and {other} share their numbers, which a checkpoint cannot say: give each its own, "
                f"torch.nn.Parameter(weight.detach().clone())"
            )


# ----------------------------------------------------------------------------------------------------------------
# The small files


def small_files(config, preprocess_config, bpe, others, dtype):
    """All files but the weights, {file name: text}. others: those that lay beside the tokenizer, as beside.read has
    them; what they say counts where this model does not say it.
    """
    if config.model_type not in family.KINDS:
        raise ValueError(f"the model's config: model_type is {config.model_type!r}, one of {', '.join(family.KINDS)}")
    configs = json_files(config, preprocess_config, dtype) | processor_files(config, bpe, others)
    for name in beside.OBJECTS:
        given = {field: value for field, value in others.get(name, {}).items() if field not in REPLACED}
        configs[name] = given | {field: value for field, value in configs[name].items() if value is not None}
    texts = {name: text for name, text in others.items() if name not in beside.OBJECTS}
    texts |= {name: as_json(values) for name, values in configs.items()}
    return texts | {"tokenizer.json": bpe.to_str(pretty=True)}


def as_json(values):
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def json_files(config, preprocess_config, dtype):
    """weights.read_config the other way round: {file name: JSON object}, as it and transformers read them."""
    kind, values = family.KINDS[config.model_type], dataclasses.asdict(config)
    values |= {"architectures": [kind.architecture], "projector_hidden_act": "gelu"}
    values |= {"vocab_size": config.text_config.vocab_size, "torch_dtype": str(dtype).removeprefix("torch.")}
    for name in {*family.SOME}.difference(kind.has):  # what a class does not have does not stand in its files
        values.pop(name, None)
    if config.projector_layernorm_eps is not None:  # ViP-LLaVA's layers, by the name that transformers 4 has for them
        values["vision_feature_layers"] = values["vision_feature_layer"]
    text, tower = values["text_config"], values["vision_config"]
    del text["qkv_bias"], tower["class_token"], tower["first_norm"], tower["patch_bias"]
    numbers = text.pop("rope_scaling")
    if numbers is not None:
        text["rope_scaling"] = {"rope_type": "llama3", **dict(zip(weights.ROPES["llama3"], numbers, strict=True))}
    if not config.vision_config.class_token:
        tower["vision_use_head"] = False
    preprocessor = picture_file(config, preprocess_config) | {"processor_class": kind.processor}
    ends = {"eos_token_id": config.eos_token_ids, "pad_token_id": config.padding}
    generation = {"bos_token_id": config.text_config.bos_token_id, **ends}
    return {"config.json": values, "generation_config.json": generation, "preprocessor_config.json": preprocessor}


def picture_file(config, preprocess_config):
    """preprocessor_config.json."""
    values = dataclasses.asdict(preprocess_config) | weights.STEPS
    if preprocess_config.image_grid_pinpoints is None:
        del values["image_grid_pinpoints"]
    # of the plain ones only Llava's class pads to a square, and SigLIP's does not crop
    plain = "LlavaImageProcessor" if preprocess_config.do_pad else "CLIPImageProcessor"
    if "height" in preprocess_config.size and not preprocess_config.do_pad:
        plain = "SiglipImageProcessor"
    kind = family.KINDS[config.model_type].pictures or plain
    its = weights.PICTURES[kind.removesuffix("Processor")]
    if not its["do_center_crop"]:
        del values["crop_size"]
    values["do_pad"] |= its["do_pad"] is True  # with tiles of zeros
    return values | {"image_processor_type": kind, "do_center_crop": its["do_center_crop"]}


def processor_files(config, bpe, others):
    """What transformers' AutoProcessor needs besides: {file name: JSON object}. There is no image_processor in
    processor_config.json: it would count in place of preprocessor_config.json, which older versions read.

    others: as in small_files. If they name tokens, it is left to them which, and which side is padded.
    """
    added = bpe.get_added_tokens_decoder()  # token_to_id would give some of these as they are after normalisation

    def token(i):
        return added[i].content if i in added else bpe.id_to_token(i) if 0 <= i < 2**32 else None

    kind = {"processor_class": family.KINDS[config.model_type].processor}
    processor = {
        **kind,
        "image_token": token(config.image_token_index),
        "patch_size": config.vision_config.patch_size,
        # the class token; for "default" LlavaProcessor subtracts one again
        "num_additional_image_tokens": int(config.vision_config.class_token),
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    if config.vision_aspect_ratio is not None:
        patches = config.vision_config.image_size // config.vision_config.patch_size
        processor |= {"num_image_tokens": patches**2, "vision_aspect_ratio": config.vision_aspect_ratio}
        processor |= {"video_token": token(config.video_token_index)}
    tokens = {**kind, "tokenizer_class": "PreTrainedTokenizerFast"}  # the name that 4.x and 5.x both know
    ids = {"bos": config.text_config.bos_token_id, "eos": [*config.eos_token_ids, None][0], "pad": config.padding}
    names = {f"{name}_token": token(i) for name, i in ids.items() if i is not None and token(i)}
    if not {"tokenizer_config.json", "special_tokens_map.json"} & others.keys():
        tokens |= {**names, "image_token": processor["image_token"], "padding_side": "left"}
        tokens |= {"clean_up_tokenization_spaces": False}  # 4.x would take spaces out of what it decodes
    elif others.get("tokenizer_config.json", {}).get("pad_token") is None:  # without one, there are no batches
        tokens |= {"pad_token": names.get("pad_token")}
    return {"processor_config.json": processor, "tokenizer_config.json": tokens}


# ----------------------------------------------------------------------------------------------------------------
# Writing


def put(texts, folder, end):
    """Write files, {name: text}, each with an end behind its name."""
    for name, text in texts.items():
        file = folder / f"{name}{end}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def write(model, folder, texts, shard_size=5_000_000_000):
    """The published layout: the tensors under the published names in files of at most shard_size bytes, and the rest.

    texts: {file name: text}. Leftovers of another checkpoint in the folder are removed last.
    """
    tensors = {
        weights.translate(name, weights.THEIRS): tensor.contiguous() for name, tensor in model.state_dict().items()
    }
    head = weights.THEIRS[HEAD]
    if is_tied(model):
        del tensors[head]
    elif weights.is_tied(model):  # by hand: the config says that there are two matrices
        tensors[head] = tensors[head].clone()
    parts, room = [], 0
    for name, tensor in tensors.items():
        if tensor.nbytes > room:
            parts.append({})
            room = shard_size
        parts[-1][name] = tensor
        room -= tensor.nbytes
    files = [weights.SINGLE]
    if len(parts) > 1:
        files = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        size = sum(tensor.nbytes for tensor in tensors.values())
        texts = {**texts, weights.INDEX: as_json({"metadata": {"total_size": size}, "weight_map": weight_map})}
    names = [*files, *texts]
    places = dict.fromkeys(place for name in names for place in ((folder / name).parent, folder, *folder.parents))
    new = sorted((place for place in places if not place.exists()), key=lambda place: -len(place.parts))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, part in zip(files, parts, strict=True):
            save_file(part, folder / f"{file}.new", metadata={"format": "pt"})
        put(texts, folder, ".new")
        for file in names:  # only now that all is written: a disk that is full leaves the old checkpoint as it was
            (folder / f"{file}.new").replace(folder / file)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder} cannot be written: {error}") from None
    finally:
        for file in names:
            with contextlib.suppress(NotADirectoryError):
                (folder / f"{file}.new").unlink(missing_ok=True)
        for place in new:
            with contextlib.suppress(OSError):  # is not empty, unless nothing was written
                place.rmdir()
    kinds = (weights.SINGLE, weights.INDEX, "model-*-of-*.safetensors", *beside.TEXTS)
    for stale in {file for kind in kinds for file in folder.glob(kind)}.difference(folder / name for name in names):
        stale.unlink()
