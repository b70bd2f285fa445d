"""Walls around what comes from outside: tokenizers, and the small files of a checkpoint.

llava.load takes two more walls from here that have files of their own: `open_image` of intake.py, for pictures, and
`clean` of leftovers.py, for what other programs leave in a config.

They are looked at before anything in them is used, and refused with a complete message: what is wrong, and what to do.
The plain functions of the four modules stand inside, unchanged: `Tokenizer` is llama.Tokenizer, and `checkpoint` looks
at a folder before weights.read_config does. What belongs to strict loading (unknown fields, unknown or missing tensors)
is in weights.py. docs/robustness.md lists what happens with each kind.
"""

import contextlib
import operator
import os
from pathlib import Path

import llama
import llava
import vision
import weights
from extras import added_tokens, anyres, beside, other_formats
from extras.family import clean
from extras.intake import open_image  # noqa: F401 (for llava.load)

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
    """llama.Tokenizer, of a file that may be anything, with the tokens that stand beside it (extras/added_tokens.py).
    What the caller gives is looked at first, and is no fault of it.

    Nobody must be able to type a special token: a prompt goes to a twin of the tokenizer that knows these tokens by
    secret spellings alone. To it, "</s>" is four letters.
    text_config: of the model that it belongs to, which may have rows that stand for no token.
    control: the ids that no text may give and no answer shows. A Processor adds those that its model calls special.
    beside: what lies beside the file, to be passed on.
    """

    def __init__(self, file, text_config=None):
        self.file, self.text_config = small_file(file), text_config
        self.beside = beside.read(file.parent)
        with named(file):
            super().__init__(file)
        self.bpe.add_tokens(added_tokens.beside(file.parent, self.bpe.get_added_tokens_decoder(), read_json))
        added = self.bpe.get_added_tokens_decoder()
        self.spelling = {i: token.content for i, token in added.items()}
        self.control = {i for i, token in added.items() if token.special}
        self.unknown = self.id(getattr(self.bpe.model, "unk_token", None) or "")
        with named(file):
            self.twin, self.secret = added_tokens.twin(self.bpe)
        self.decode(self.encode("\U0010ffff"))  # a character outside any vocabulary: some broken files fail only there

    def encode(self, text, special=True):
        """Text → ids, without <s>. special=False: "</s>", "<image>" and the like are ordinary letters."""
        whole(text)
        if not special:
            return self.encode_pieces([text])
        with named(self.file):
            return super().encode(text)

    def encode_pieces(self, pieces):
        for piece in pieces:
            if isinstance(piece, str):
                whole(piece)
            else:
                self.check([piece])
        with named(self.file):
            ids = self.twin_ids(pieces)
        for i in self.control.intersection(ids) - {self.unknown}:
            if ids.count(i) > pieces.count(i):  # some models hold them as whole words, and find them in any text
                raise ValueError(f"{self.file} takes {self.spelling[i]} in a text for a special token: leave it out")
        return ids

    def twin_ids(self, pieces):
        """llama.Tokenizer.encode_pieces by the twin."""
        spelled = [x if isinstance(x, str) else self.secret.get(x) or self.bpe.id_to_token(x) or "" for x in pieces]
        found = self.twin.encode("".join(spelled), add_special_tokens=False)
        ids, place = found.ids, 0
        for n, piece in enumerate(pieces):
            if piece in self.secret:
                at = found.char_to_token(place)
                if at is None or ids[at] != self.twin.token_to_id(spelled[n]):  # its flags want other neighbours:
                    return self.twin_ids([*pieces[:n], self.spelling[piece], *pieces[n + 1 :]])  # it is letters
                ids[at] = piece
            place += len(spelled[n])
        return ids

    def decode(self, ids):
        ids = self.check(ids)
        with named(self.file):
            return super().decode([i for i in ids if i not in self.control])

    def check(self, ids):
        """The ids as a list of int. Raises ValueError that names the first one that is none of the vocabulary's."""
        try:
            ids = [operator.index(i) for i in ids]
        except TypeError:
            raise ValueError(f"ids are a list of integers, and not {ids!r:.100}") from None
        rows = 0 if self.text_config is None else self.text_config.vocab_size
        for i in ids:
            if not 0 <= i < rows and not (0 <= i < 2**32 and self.bpe.id_to_token(i) is not None):
                last = max(rows, self.bpe.get_vocab_size()) - 1
                hint = ": labels hold it where nothing counts, leave it out" if i == -100 else ""
                raise ValueError(f"{i} is not an id, they are 0 to {last}{hint}")
        return ids


def whole(text):
    """Raise ValueError unless this is a string of whole characters."""
    if not isinstance(text, str):
        raise ValueError(f"a text is a str, and not {text!r:.100}")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"the text {text!r:.100} holds half a character, a lone surrogate")


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints

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
    "original_max_position_embeddings": ((int,), 1, MOST),
    "num_hidden_layers": ((int,), 1, 256),
    "num_attention_heads": ((int,), 1, 4096),
    "num_key_value_heads": ((int,), 1, 4096),
    "head_dim": ((int,), 1, 4096),
    "num_channels": ((int,), 1, 4096),
    "image_size": ((int,), 1, 4096),
    "patch_size": ((int,), 1, 4096),
    "rms_norm_eps": ((float,), 1e-30, 1.0),
    "layer_norm_eps": ((float,), 1e-30, 1.0),
    "projector_layernorm_eps": ((float,), 1e-30, 1.0),
    "rope_theta": ((float,), 1e-30, MOST),
    "factor": ((float,), 1e-30, MOST),
    "low_freq_factor": ((float,), 1e-30, MOST),
    "high_freq_factor": ((float,), 1e-30, MOST),
    "rescale_factor": ((float,), 1e-30, MOST),
    "image_token_index": ((int,), -MOST, MOST),
    "image_token_id": ((int,), -MOST, MOST),
    "video_token_index": ((int,), -MOST, MOST),
    "video_token_id": ((int,), -MOST, MOST),
    "pad_token_id": ((int,), -MOST, MOST),
    "bos_token_id": ((int,), -MOST, MOST),
    "eos_token_id": ((int, list), -MOST, MOST),
    "vision_feature_layer": ((int, list), -256, 256),
    "vision_feature_layers": ((int, list), -256, 256),
    "vision_aspect_ratio": ((str,), None, None),
    "use_sliding_window": ((bool,), None, None),
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
    not JSON, a value of a wrong type or out of range, sizes that do not go together, what is no checkpoint but
    something else (extras/other_formats.py).
    """
    other_formats.check_folder(folder)
    read_json(folder / "config.json")
    old = "preprocessor_config.json"
    nested = has_nested(folder)
    for name, sections in CONFIGS.items():
        where = folder / name
        if not where.exists() or (name == old and nested):  # the reference does not look at the old file then
            continue
        values = read_json(where)
        parts = {f"{where}: {section}": part(values, section, where) for section in sections}
        for text in [place for place in parts if place.endswith("text_config")]:
            parts |= {f"{text}: {rope}": part(parts[text], rope, text) for rope in ("rope_scaling", "rope_parameters")}
        if name == "config.json":
            other_formats.check_kind(values, where)  # the fields of another kind of model are no matter of ours
            other_formats.check_quantization(values, where)
        for place, section in {str(where): values, **parts}.items():
            fields(section, place)
    if not nested and not (folder / old).exists():
        raise FileNotFoundError(f"{folder} holds no {old}, and no image_processor in a processor_config.json")
    sizes(folder)


def has_nested(folder):
    """Whether the preprocessing numbers stand in processor_config.json: then they count, not those of the old file."""
    where = folder / "processor_config.json"
    return where.exists() and read_json(where).get("image_processor") is not None


def small_file(file, most=50_000_000):
    """The same path, if a file of at most so many bytes is there."""
    if not file.is_file():  # opening a pipe would block
        raise FileNotFoundError(f"{file.parent} holds no {file.name}")
    if file.stat().st_size > most:
        raise ValueError(f"{file} is larger than any real {file.name}")
    other_formats.check_file(file)
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
    config = weights.read_config(folder, llava.LlavaConfig, llama.TextConfig, vision.VisionConfig, clean)
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
    generation, last = folder / "generation_config.json", text.vocab_size - 1
    generated = read_json(generation) if generation.exists() else {}
    for name, ids in (("eos_token_id", config.eos_token_ids), ("pad_token_id", [config.padding])):
        for i in ids:
            if not 0 <= i <= last:
                file = where if generated.get(name) is None else generation
                raise ValueError(f"{file}: {name} is {i}, and the ids of the vocabulary are 0 to {last}")
    if any(not -most - 1 <= layer <= most for layer in layers):
        raise ValueError(f"{where}: vision_feature_layer is {layers}, and the tower has {most} layers")
    if (strategy := config.vision_feature_select_strategy) not in ("default", "full"):
        raise ValueError(f"{where}: vision_feature_select_strategy is {strategy!r}, and must be 'default' or 'full'")
    if text.rope_scaling is not None and text.rope_scaling[1] >= text.rope_scaling[2]:
        raise ValueError(f"{where}: text_config.rope_scaling: high_freq_factor must be above low_freq_factor")
    pictures = weights.read_preprocess_config(folder, vision.PreprocessConfig, tower)
    tiles(config, strategy, pictures, where)
    file = folder / ("processor_config.json" if has_nested(folder) else "preprocessor_config.json")
    if config.image_grid_pinpoints is not None and tower.image_size not in pictures.size.values():
        edge = f"{tower.image_size}, a tile's: of others the edges are cropped"
        raise ValueError(f"{file}: size is {pictures.size}, and must be {edge}")
    if not len(pictures.image_mean) == len(pictures.image_std) == 3:
        raise ValueError(f"{file}: image_mean and image_std must have 3 numbers")


def tiles(config, strategy, pictures, where):
    """Check how pictures are cut into tiles, if they are: in config.json as in the file for the preprocessing."""
    try:
        plan = anyres.plan(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    right = "default" if config.vision_config.class_token else "full"
    if plan is not None and strategy != right:
        why = f"vision_feature_select_strategy is {strategy!r}: what this tower sees fills a square only with {right!r}"
        raise ValueError(f"{where}: {why}")
    if pictures.image_grid_pinpoints not in (None, config.image_grid_pinpoints):
        raise ValueError(f"{where}: image_grid_pinpoints are not those of preprocessor_config.json")


def shards(folder):
    """weights.shards, of a folder that may hold anything → the files.

    Raises ValueError or OSError with a complete message: for pickled weights, an index that is none, a link that leads
    out, a pipe.
    """
    if not (folder / weights.SINGLE).exists():
        if not (folder / weights.INDEX).exists():
            why = other_formats.without_weights(folder, [file.name for file in folder.iterdir()], folder)
            raise OSError(why or f"{folder} holds neither {weights.SINGLE} nor {weights.INDEX}")
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
        if file.exists():  # weights.scan names one that is missing
            other_formats.check_weights(file)
    return files
