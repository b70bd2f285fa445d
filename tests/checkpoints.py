"""Checkpoints to be broken: under the names of other versions of transformers, with other tensors, other configs."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from reference import PREPROCESSOR
from safetensors.torch import load_file, save_file

import llama
import llava
import vision
import weights

RENAMINGS = {  # layout → from the beginning of a published name to its own; the first that matches
    "A": {"": ""},  # as published
    "B": {  # transformers 4.52 to 4.57 in memory
        "language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    },
    "C": {  # transformers 5 in memory
        "language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
        "vision_tower.vision_model.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    },
    "D": {"vision_tower.vision_model.": "vision_tower.", "": ""},  # saved by transformers 5
    "E": {  # the authors' own
        "language_model.model.": "model.", "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.vision_tower.",
        "multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "image_newline": "model.image_newline",
    },
}  # fmt: skip


def rename(name, layout):
    """A published name in another layout."""
    for old, new in RENAMINGS[layout].items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise KeyError(name)


def leftovers(layout):
    """What old versions wrote beside the parameters, under the layout's names."""
    number = torch.arange(17)[None]
    return {
        rename("vision_tower.vision_model.embeddings.position_ids", layout): number,
        rename("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", layout): torch.rand(4),
    }


def write_shards(folder, tensors, shards=1):
    """One file, or several and their index, the tensors dealt out in turn."""
    if shards == 1:
        return save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    write_index(folder, files)


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


class Checkpoint:
    """A copy of a published checkpoint, of which a test changes tensors and configs before it is written."""

    def __init__(self, source, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in Path(source).glob("*.json"):
            shutil.copy(file, self.folder)
        self.tensors = load_file(Path(source) / "model.safetensors")

    def write(self, layout="A", shards=1, beside=None):
        tensors = {rename(name, layout): tensor for name, tensor in self.tensors.items()}
        write_shards(self.folder, {**tensors, **(beside or {})}, shards)
        return str(self.folder)

    def config(self, file="config.json", **changes):
        """Change fields of a config: text_config={…} and vision_config={…} are changed inside; ... removes a field."""
        path = self.folder / file
        values = json.loads(path.read_text()) if path.exists() else {}
        for name, value in changes.items():
            if name in ("text_config", "vision_config") and isinstance(value, dict):
                value = {**values[name], **value}
                value = {inner: it for inner, it in value.items() if it is not ...}
            values[name] = value
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
        return self


ATTENTION = "language_model.model.layers.1.self_attn.q_proj.weight"
EMBED, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def load(folder, dtype=torch.float32, **options):
    return llava.load(str(folder), device="cpu", dtype=dtype, **options)[0]


def refusal(folder):
    """The sentence with which load refuses a folder: one line, and an error that the user can mend."""
    with pytest.raises((ValueError, OSError)) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def meta(config):
    with torch.device("meta"):
        return llava.Llava(config)


def read_config(folder, values, edge=336):
    """weights.read_config of config.json's values and a preprocessor_config.json for pictures of that edge."""
    preprocessor = PREPROCESSOR | {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return configs(folder)


def configs(folder):
    """The config of the model and that of its pictures, as weights.py reads them by itself."""
    config = weights.read_config(folder, llava.LlavaConfig, llama.TextConfig, vision.VisionConfig)
    return config, weights.read_preprocess_config(folder, vision.PreprocessConfig, config.vision_config)


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def tied(copy):
    return copy.config(tie_word_embeddings=True, text_config={"tie_word_embeddings": True})


def header(values):
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
