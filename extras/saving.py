"""A checkpoint written in the published layout, which llava.load and transformers read, its AutoProcessor included."""

import contextlib
import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import llava
import weights
from extras import checks, family

TEMPLATES = ("chat_template.jinja", "chat_template.json")  # passed on for transformers: nothing here reads them
HOLDERS = ("tokenizer_config.json", "processor_config.json")  # which may hold one, too
STALE = (*TEMPLATES, "special_tokens_map.json", "added_tokens.json")  # where another checkpoint's would be believed


def save(model, processor, folder):
    """Write model and processor into a folder. Raises ValueError or OSError; then the folder is as it was."""
    folder = Path(folder)
    check_places(model)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), whose base model transformers would load in place of "
            f"this one: name another folder"
        )
    bpe = processor.tokenizer.bpe
    configs = json_files(model.config, processor.preprocess_config, model.dtype)
    configs |= processor_files(model.config, bpe)
    for file, template in held_templates(processor.tokenizer).items():
        configs[file]["chat_template"] = template
    write(model, folder, configs, {"tokenizer.json": bpe.to_str(pretty=True), **templates(processor.tokenizer)})


def check_places(model):
    """Raise ValueError that names the first parameter without a place in a checkpoint, or the first place without a
    parameter.
    """
    if any(hasattr(layer, "take_weight") for layer in model.modules()):
        raise ValueError(
            "a quantised, packed or split model cannot be saved: load it without quantize, compile or inference mode"
        )
    tensors, expected = model.state_dict(), {}
    if all(weights.translate(name, weights.THEIRS) for name in tensors):  # so it is a Llava, and has a config
        with torch.device("meta"):
            expected = llava.Llava(model.config).state_dict()
    for name, tensor in tensors.items():
        if not (name in expected if expected else weights.translate(name, weights.THEIRS)):
            raise ValueError(
                f"{name} has no place in a checkpoint, so nothing was written: merge or take off first what was put "
                f"around the model (LoRA, torch.compile, weight_norm, …) or added to it"
            )
        if expected and (tensor.is_meta or tensor.shape != expected[name].shape):
            shape = "no numbers (it is on the meta device)" if tensor.is_meta else f"the shape {tuple(tensor.shape)}"
            raise ValueError(f"{name} has {shape}; by the model's config it is {tuple(expected[name].shape)}")
    for name in expected:
        if name not in tensors:
            raise ValueError(f"{name} is missing in the model: what would be written could not be loaded again")


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


def processor_files(config, bpe):
    """What transformers' AutoProcessor needs besides: {file name: JSON object}. There is no image_processor in
    processor_config.json: it would count in place of preprocessor_config.json, which older versions read.
    """
    added = bpe.get_added_tokens_decoder()  # token_to_id would give some of these as they are after normalisation

    def token(i):
        return added[i].content if i in added else bpe.id_to_token(i)

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
    ids = {"bos": config.text_config.bos_token_id, "eos": config.eos_token_ids[0], "pad": config.padding}
    names = {f"{name}_token": token(i) for name, i in ids.items() if i is not None and token(i)}
    tokens = {
        **kind,
        **names,
        "image_token": processor["image_token"],
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that 4.x and 5.x both know
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,  # 4.x would take spaces out of what it decodes
    }
    return {"processor_config.json": processor, "tokenizer_config.json": tokens}


def templates(tokenizer):
    """The chat templates that lie beside the file of a tokenizer, if it has one: {file name: text}."""
    folder = Path(getattr(tokenizer, "file", "")).parent
    files = [folder / name for name in TEMPLATES if hasattr(tokenizer, "file")]
    return {file.name: file.read_text(encoding="utf-8") for file in files if file.is_file()}


def held_templates(tokenizer):
    """The chat templates inside other files beside that of a tokenizer, if it has one: {file name: template}."""
    folder, found = Path(getattr(tokenizer, "file", "")).parent, {}
    for file in HOLDERS if hasattr(tokenizer, "file") else ():
        with contextlib.suppress(ValueError, OSError):  # what cannot be read holds none
            found[file] = checks.read_json(folder / file).get("chat_template")
    return {file: template for file, template in found.items() if template}


def write(model, folder, configs, texts, shard_size=5_000_000_000):
    """The published layout: the tensors under the published names in files of at most shard_size bytes, and the rest.

    configs: {file name: JSON object}. texts: {file name: text}. Leftovers of another checkpoint in the folder are
    removed last.
    """
    tensors = {
        weights.translate(name, weights.THEIRS): tensor.contiguous() for name, tensor in model.state_dict().items()
    }
    head = "language_model.lm_head.weight"
    if weights.is_tied(model) and model.config.tie_word_embeddings:
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
        configs = {**configs, weights.INDEX: {"metadata": {"total_size": size}, "weight_map": weight_map}}
    jsons = {file: json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) for file, values in configs.items()}
    texts = {file: text + "\n" for file, text in jsons.items()} | texts
    names = [*files, *texts]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, part in zip(files, parts, strict=True):
            save_file(part, folder / f"{file}.new", metadata={"format": "pt"})
        for file, text in texts.items():
            (folder / f"{file}.new").write_text(text, encoding="utf-8")
        for file in names:  # only now that all is written: a disk that is full leaves the old checkpoint as it was
            (folder / f"{file}.new").replace(folder / file)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder} cannot be written: {error}") from None
    finally:
        for file in names:
            with contextlib.suppress(NotADirectoryError):
                (folder / f"{file}.new").unlink(missing_ok=True)
    others = [folder / name for name in (weights.SINGLE, weights.INDEX, *STALE)]
    for stale in [*others, *folder.glob("model-*-of-*.safetensors")]:
        if stale.name not in names:
            stale.unlink(missing_ok=True)
