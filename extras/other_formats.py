"""What stands where a checkpoint should be: a Git-LFS pointer, a web page, an adapter, quantised weights.

None of these is read. This file only recognises them, so that the refusal says what it is that one has, and what to do.
"""

import contextlib
import json
import re
import warnings

import llama
import vision
import weights
from extras import family, leftovers

INSTEAD = "take the 16-bit checkpoint that they were made from, and --quantize int8 or int4"
STAND_INS = [  # how a small text begins that came in place of a file: what it is, and what to do
    # a clone without git-lfs, or an archive of the repository
    (rb"version https://(git-lfs|hawser)\.github\.com/spec/", "a Git-LFS pointer", "run `git lfs pull` in its folder"),
    (rb"[./]*(git/)?annex/objects/", "a git-annex pointer", "run `git annex get` in its folder"),
    # a page to log in, the page about the file instead of the file, an error of the storage behind
    (rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype html|html|head|body|error)\b", "a web page",
     "download it again"),
    (rb"(entry|repository|not) (not )?found|invalid (username|credentials)|access (to|denied)\b", "a server's refusal",
     "download it again"),
]  # fmt: skip
PICKLED = (
    "such files are pickled, can run any code when opened and are not read here. Ask for a repository with "
    ".safetensors files"
)
FILES = {  # the end of a file's name → why it is not read
    **dict.fromkeys((".bin", ".pt", ".pth"), PICKLED),
    ".gguf": f"GGUF, llama.cpp's format, is not read here: {INSTEAD}",
    ".npz": f"MLX's format is not read here: {INSTEAD}",
    **dict.fromkeys((".onnx", ".h5", ".msgpack", ".tflite"), "ask for a repository with .safetensors files"),
}
OF_TRAINING = ("training_args", "optimizer", "scheduler", "rng_state")  # pickled, and no weights
METHODS = {"awq": "AWQ", "gptq": "GPTQ", "bitsandbytes": "bitsandbytes", "mlx": "MLX"}  # others are named as they are
TENSORS = [  # the end of a tensor's name → who writes such
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.(SCB|weight\.absmax|weight\.quant_map|weight\.quant_state\..*)$", "bitsandbytes"),
    (r"\.(scales|biases)$", "MLX"),
    (r"\.(weight_packed|weight_scale|weight_scale_inv|input_scale)$", "compressed-tensors or FP8"),
]
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
BASE = "base_model_name_or_path"


def check_file(file):
    """Raise ValueError if a file is a small text that stands in its place."""
    with open(file, "rb") as opened:
        head = opened.read(1000)
    for beginning, kind, advice in STAND_INS:
        if re.match(beginning, head, flags=re.I | re.S):
            size = re.search(rb"^size (\d{1,15})\s*$", head, flags=re.M)
            size = f" to a file of {int(size[1]):,} bytes" if size else ""
            raise ValueError(f"{file} is not the file itself, but {kind}{size}: {advice}")


def check_folder(folder):
    """Raise OSError if a folder holds something else than a model.

    Weights that are missing beside a config.json may still have to be fetched: checks.shards speaks of them.
    """
    names = [file.name for file in folder.iterdir()]
    adapter = any(name in names for name in ADAPTERS)
    if weights.SINGLE in names or weights.INDEX in names:
        if adapter:
            notice = f"{folder} also holds an adapter ({adapter_of(folder)}): it is not applied"
            warnings.warn(notice, stacklevel=4)  # at load's caller
    elif "config.json" not in names and (message := without_weights(folder, names, folder)):
        raise OSError(message)


def without_weights(here, names, folder):
    """Why a list of file names holds no model.safetensors, in a sentence; None if it does not say.

    here: the folder or repository. folder: where adapter_config.json lies, if it is one of the names.
    """
    if any(name in names for name in ADAPTERS):
        return (
            f"{here} holds only an adapter ({adapter_of(folder)}), not the model that it changes: merge it into that "
            f"(peft: merge_and_unload), save the whole, and load what was saved"
        )
    for end, why in FILES.items():
        for name in sorted(names):
            if name.lower().endswith(end) and not name.startswith(OF_TRAINING):
                return f"{here} holds its weights only as {name}: {why}"
    return None


def adapter_of(folder):
    """What an adapter's config says: its kind, and the model that it belongs to."""
    file, values = folder / ADAPTERS[0], {}
    if file.is_file() and file.stat().st_size < 1_000_000:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            values = json.loads(file.read_text(encoding="utf-8"))
    kind, base = (values.get(name) if isinstance(values, dict) else None for name in ("peft_type", BASE))
    kind = kind if isinstance(kind, str) and kind.isalnum() else "of an unknown kind"
    base = f"{base!r:.200}" if isinstance(base, str) and base else "a model that it does not name"
    return f"{kind}, of {base}"


def check_kind(values, where):
    """Raise ValueError that says which other kind of model a config.json describes."""
    if "mm_vision_tower" in values or "mm_projector_type" in values:
        raise ValueError(f"{where} is in the authors' own format: use the same model as llava-hf converted it")
    if values.get("model_type") not in [*family.KINDS]:
        names = values.get("architectures")
        name = names[0] if isinstance(names, list) and names else values.get("model_type")
        raise ValueError(f"{where} describes a {name}; this is LLaVA and nothing else: {', '.join(family.KINDS)}")
    for part, cls in {"text_config": llama.TextConfig, "vision_config": vision.VisionConfig}.items():
        kind = (values.get(part) or {}).get("model_type", next(iter(cls.KINDS)))
        if kind not in [*cls.KINDS]:
            raise ValueError(f"{where}: {part}.model_type is {kind!r}; supported: {', '.join(cls.KINDS)}")


def check_quantization(values, where):
    """Raise ValueError if a config.json, or a part of it, describes weights that somebody has quantised."""
    parts = {name: values.get(name) for name in ("text_config", "vision_config")}
    for place, part in {where: values, **{f"{where}: {name}": part or {} for name, part in parts.items()}}.items():
        for field in ("quantization", "quantization_config"):  # the first is MLX's, which also writes the second
            if leftovers.is_off(quantization := part.get(field)):
                continue
            said = quantization.get("quant_method") if isinstance(quantization, dict) else None
            said = "mlx" if field == "quantization" else str(said or "somebody")
            method = METHODS.get(said.lower(), said)
            raise ValueError(f"{place}: by {field}, the weights were quantised by {method}: {INSTEAD}")


def check_weights(file):
    """Raise ValueError if a safetensors file is a small text in its place, or holds quantised matrices."""
    check_file(file)
    names = []
    with contextlib.suppress(ValueError, OSError):  # weights.scan says what is wrong with a damaged file
        names = [name for name, _, _ in weights.header(file)]
    for name in names:
        for end, method in TENSORS:
            if re.search(end, name):
                raise ValueError(f"{file}: the tensor {name} is of weights quantised by {method}: {INSTEAD}")
