"""Walls around what comes from outside: pictures, tokenizers, and the small files of a checkpoint.

They are looked at before anything in them is used, and refused with a complete message: what is wrong, and what to do.
The plain functions of the four modules stand inside, unchanged: `open_image` calls vision.open_image, `Tokenizer` is
llama.Tokenizer, and `checkpoint` looks at a folder before weights.read_config does. What belongs to strict loading
(unknown fields, unknown or missing tensors) is in weights.py. docs/robustness.md lists what happens with each kind.
"""

import contextlib
import io
import os
import warnings
from pathlib import Path

from PIL import Image

import llama
import llava
import vision
import weights

# ----------------------------------------------------------------------------------------------------------------
# Pictures

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]  # what cameras, phones and screens write
MAX_PIXELS = 89_478_485  # the number from which Pillow warns: a small file with more may be a bomb of gigabytes
MAX_BYTES = 8 * MAX_PIXELS  # four channels of 16 bits: read at most this much from a pipe, which may be endless


def open_image(file):
    """vision.open_image with its formats limited, its size known before it is decoded, and its errors in plain words.

    file: a path, or a binary file object. Raises FileNotFoundError, or ValueError, with a complete message.
    """
    if not isinstance(file, (str, Path)) and not hasattr(file, "read"):
        raise ValueError(f"a picture is a path, a PIL image or a binary file, not a {type(file).__name__}")
    name = str(file) if isinstance(file, (str, Path)) else "standard input"
    if name.lower().startswith(("http://", "https://")):
        raise ValueError(f"{name} is an address; pictures are read from files: download it first")
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as opened:
            warnings.simplefilter("ignore")  # silence Pillow's own warnings; those that matter are raised below
            stream = file if hasattr(file, "read") else opened.enter_context(open(file, "rb"))
            if not stream.seekable():
                stream = io.BytesIO(stream.read(MAX_BYTES))
            start = stream.tell()
            with Image.open(stream, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:  # from the header: nothing has been decoded yet
                    raise Image.DecompressionBombError
                # the other frames of an MPO (a phone's JPEG) are previews
                several = image.format != "MPO" and getattr(image, "is_animated", False)
            stream.seek(start)
            image = vision.open_image(stream, FORMATS)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such picture: {name}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has over {MAX_PIXELS:,} pixels: shrink it first") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture in a known format ({', '.join(FORMATS)})") from None
    except MemoryError:  # not the file's fault
        raise
    except Exception:  # whatever Pillow's decoders trip over: OSError, SyntaxError, struct.error and more
        why = "the file is damaged, cut short or not readable"
        raise ValueError(f"{name} cannot be read as a picture: {why}") from None
    if several:
        warnings.warn(f"{name} holds several pictures; only the first one is used", stacklevel=2)
    return image


# ----------------------------------------------------------------------------------------------------------------
# Tokenizers


@contextlib.contextmanager
def named(file):
    """Turn any error inside into a ValueError that names the file."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the library raises plain Exception, and a panic in Rust is a BaseException
        raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from None


class Tokenizer(llama.Tokenizer):
    """llama.Tokenizer, of a file that may be anything."""

    def __init__(self, file):
        self.file = small_file(file)
        with named(file):
            super().__init__(file)
        self.decode(self.encode("\U0010ffff"))  # a character outside any vocabulary: some broken files fail only there

    def encode(self, text, special=True):
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"the text {text!r:.100} holds half a character, a lone surrogate")
        with named(self.file):
            return super().encode(text, special)

    def decode(self, ids):
        ids = [int(i) for i in ids]
        with named(self.file):
            return super().decode(ids)


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints

PICKLED = (".bin", ".pt", ".pth")
MOST = 2**24

FIELDS = {  # of every config: its types, and the bounds that no real checkpoint leaves (of each item, if it is a list)
    "model_type": ((str,), None, None),
    "description": ((str,), None, None),
    "vision_feature_select_strategy": ((str,), None, None),
    "multimodal_projector_bias": ((bool,), None, None),
    "tie_word_embeddings": ((bool,), None, None),
    "do_pad": ((bool,), None, None),
    "vocab_size": ((int,), 1, MOST),
    "hidden_size": ((int,), 1, MOST),
    "intermediate_size": ((int,), 1, MOST),
    "max_position_embeddings": ((int,), 1, MOST),
    "sliding_window": ((int,), 1, MOST),
    "num_hidden_layers": ((int,), 1, 256),
    "num_attention_heads": ((int,), 1, 4096),
    "num_key_value_heads": ((int,), 1, 4096),
    "head_dim": ((int,), 1, 4096),
    "num_channels": ((int,), 1, 4096),
    "image_size": ((int,), 1, 4096),
    "patch_size": ((int,), 1, 4096),
    "rms_norm_eps": ((float,), 1e-30, 1.0),
    "layer_norm_eps": ((float,), 1e-30, 1.0),
    "rope_theta": ((float,), 1e-30, MOST),
    "rescale_factor": ((float,), 1e-30, MOST),
    "image_token_index": ((int,), -MOST, MOST),
    "pad_token_id": ((int,), -MOST, MOST),
    "bos_token_id": ((int,), -MOST, MOST),
    "eos_token_id": ((int, list), -MOST, MOST),
    "vision_feature_layer": ((int, list), -256, 256),
    "resample": ((int,), 0, 5),
    "image_mean": ((list,), -MOST, MOST),
    "image_std": ((list,), 1e-30, MOST),
    "size": ((int, dict), 1, 4096),
    "crop_size": ((int, dict), 1, 4096),
    "hidden_act": ((str,), None, None),
}
CONFIGS = {  # file → the objects in it that hold fields
    "config.json": ("text_config", "vision_config"),
    "generation_config.json": (),
    "preprocessor_config.json": (),
    "processor_config.json": ("image_processor",),
}


def checkpoint(folder):
    """Look at the small files of a checkpoint; `shards` looks at those of its weights, which may not be there yet.

    Raises ValueError or OSError with a complete message: for a missing file, a pipe, a file too large, one that is
    not JSON, a value of a wrong type or out of range, sizes that do not go together.
    """
    read_json(folder / "config.json")
    for name, sections in CONFIGS.items():
        where = folder / name
        if not where.exists():
            continue
        values = read_json(where)
        parts = {f"{where}: {section}": part(values, section, where) for section in sections}
        for text in [place for place in parts if place.endswith("text_config")]:
            parts |= {f"{text}: {rope}": part(parts[text], rope, text) for rope in ("rope_scaling", "rope_parameters")}
        if name == "config.json":
            weights.check_kind(values, where)  # the fields of another kind of model are no matter of ours
        for place, section in {str(where): values, **parts}.items():
            fields(section, place)
    if not (folder / "preprocessor_config.json").exists():
        where = folder / "processor_config.json"
        if not where.exists() or not part(read_json(where), "image_processor", where):
            raise FileNotFoundError(
                f"{folder} holds no preprocessor_config.json, and no processor_config.json in its place"
            )
    sizes(folder)


def small_file(file, most=50_000_000):
    """The same path, if a file of at most so many bytes is there."""
    if not file.is_file():  # opening a pipe would block
        raise FileNotFoundError(f"{file.parent} holds no {file.name}")
    if file.stat().st_size > most:
        raise ValueError(f"{file} is larger than any real {file.name}")
    return file


def read_json(file):
    """weights.read_json, of a file that may be anything → dict."""
    small_file(file, 4_000_000)  # parsed JSON can take forty times the memory of its text
    try:
        values = weights.read_json(file)
    except (ValueError, RecursionError) as error:  # bad syntax, bad UTF-8, thousands of digits, or too deep
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object")
    return values


def part(values, name, where):
    """An object inside another one; {} if it is absent or null."""
    value = values.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where}: {name} is {value!r}, and must be an object")
    return value or {}


def fields(values, where):
    """Check the types and the ranges of those fields that mean something here. null is as good as absent."""
    for name, value in values.items():
        if name not in FIELDS or value is None:
            continue
        types, low, high = FIELDS[name]
        if type(value) not in types and not (types == (float,) and type(value) is int):
            raise ValueError(f"{where}: {name} is {value!r}, of the wrong type")
        items = {list: list, dict: lambda value: list(value.values())}.get(type(value), lambda value: [value])(value)
        if type(value) in (list, dict) and not 0 < len(items) <= 256:
            raise ValueError(f"{where}: {name} is {value!r}, and must hold 1 to 256 numbers")
        numbers = (int, float) if float in types or types == (list,) else (int,)
        for item in items if low is not None else []:
            if type(item) not in numbers or not low <= item <= high:
                raise ValueError(f"{where}: {name} is {value!r}, out of range: it must be {low} to {high}")


def sizes(folder):
    """Check what has to go together in the configs, once absent fields have their defaults."""
    where = folder / "config.json"
    config = weights.read_config(folder, llava.LlavaConfig, llama.TextConfig, vision.VisionConfig)
    text, tower = config.text_config, config.vision_config
    if tower.image_size < tower.patch_size:
        raise ValueError(f"{where}: vision_config: image_size is smaller than patch_size")
    if tower.hidden_size % tower.num_attention_heads:
        raise ValueError(f"{where}: vision_config: hidden_size is not a multiple of num_attention_heads")
    if text.num_attention_heads % text.num_key_value_heads:
        raise ValueError(f"{where}: text_config: num_attention_heads is not a multiple of num_key_value_heads")
    if text.head_dim % 2 or not text.head_dim:
        raise ValueError(f"{where}: text_config: head_dim is {text.head_dim}, and must be even")
    layers, most = llava.as_list(config.vision_feature_layer), tower.num_hidden_layers
    if any(not -most - 1 <= layer <= most for layer in layers):
        raise ValueError(f"{where}: vision_feature_layer is {layers}, and the tower has {most} layers")
    if (strategy := config.vision_feature_select_strategy) not in ("default", "full"):
        raise ValueError(f"{where}: vision_feature_select_strategy is {strategy!r}, and must be 'default' or 'full'")
    pictures = weights.read_preprocess_config(folder, vision.PreprocessConfig, tower)
    if not len(pictures.image_mean) == len(pictures.image_std) == 3:
        raise ValueError(f"{folder}: preprocessor_config.json: image_mean and image_std must have 3 numbers")


def shards(folder):
    """weights.shards, of a folder that may hold anything → the files.

    Raises ValueError or OSError with a complete message: for pickled weights, an index that is none, a link that leads
    out, a pipe.
    """
    if not (folder / weights.SINGLE).exists():
        if not (folder / weights.INDEX).exists():
            kept = sorted(file.name for file in folder.iterdir() if file.name.endswith(PICKLED))
            nothing = f"{folder} holds neither {weights.SINGLE} nor {weights.INDEX}"
            raise OSError(pickled(folder, kept[0]) if kept else nothing)
        names = read_json(folder / weights.INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{folder / weights.INDEX} has no weight_map that says which tensor is in which file")
    files, here = weights.shards(folder), folder.resolve()
    # the Hub's cache keeps its files in blobs/ and links to them from snapshots/COMMIT/; no other link is followed
    allowed = (here, here.parent.parent / "blobs")
    for file in files:
        if file.name != weights.SINGLE and Path(os.path.realpath(file)).parent not in allowed:
            link = f"{folder / weights.INDEX}: {file.name} is a link out of the folder"
            raise ValueError(f"{link}: put the file itself there")
        if file.exists() and not file.is_file():  # opening a pipe would block
            raise ValueError(f"{file} is a folder or a pipe, and should be a file")
    return files


def pickled(where, name):
    return (
        f"{where} holds its weights only as {name}: such files are pickled, can run any code when opened and are not "
        f"read here. Ask for a repository with .safetensors files"
    )
