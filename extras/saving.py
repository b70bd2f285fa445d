"""A checkpoint written in the published layout, which llava.load and transformers read."""

import contextlib
import dataclasses
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

import weights


def save(model, processor, folder):
    """Write model and processor into a folder. Raises ValueError or OSError; then the folder is as it was."""
    configs = json_files(model.config, processor.preprocess_config, model.dtype)
    write(model, Path(folder), configs, processor.tokenizer.bpe.to_str(pretty=True))


def json_files(config, preprocess_config, dtype):
    """weights.read_config the other way round: {file name: JSON object}, as it and transformers read them."""
    values = dataclasses.asdict(config)
    values |= {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "projector_hidden_act": "gelu",
    }
    values |= {"vocab_size": config.text_config.vocab_size, "torch_dtype": str(dtype).removeprefix("torch.")}
    values["vision_config"]["model_type"] = "clip_vision_model"
    preprocessor = (
        dataclasses.asdict(preprocess_config) | weights.STEPS | {"image_processor_type": "CLIPImageProcessor"}
    )
    ends = {"eos_token_id": config.eos_token_ids, "pad_token_id": config.padding}
    generation = {"bos_token_id": config.text_config.bos_token_id, **ends}
    return {"config.json": values, "generation_config.json": generation, "preprocessor_config.json": preprocessor}


def write(model, folder, configs, tokenizer, shard_size=5_000_000_000):
    """The published layout: the tensors under the published names in files of at most shard_size bytes, and the rest.

    configs: {file name: JSON object}. tokenizer: the text of tokenizer.json. Leftovers of another checkpoint in the
    folder are removed last.
    """
    if list(model.buffers()):
        raise ValueError(
            "a quantised, packed or split model cannot be saved: load it without quantize, compile or inference mode"
        )
    tensors = {
        weights.translate(name, weights.THEIRS): tensor.contiguous() for name, tensor in model.state_dict().items()
    }
    if weights.is_tied(model):
        del tensors["language_model.lm_head.weight"]
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
    texts = {
        file: json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        for file, values in configs.items()
    }
    texts["tokenizer.json"] = tokenizer
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
    for stale in [folder / weights.SINGLE, *folder.glob("model-*-of-*.safetensors"), folder / weights.INDEX]:
        if stale.name not in names:
            stale.unlink(missing_ok=True)
