"""A tokenizer.json in the ways in which trainers, converters and `add_tokens` write it: tiny's with other rules around
the same pieces.
"""

import json

from reference import TINY

FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def metaspace(scheme, split=False):
    """No normalizer; a "▁" in front of the first text alone, of every text, or of none."""
    pre_tokenizer = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    return {"normalizer": None, "pre_tokenizer": pre_tokenizer}


def flags(*names):
    """Every added token with these flags and no others."""
    return {"flags": {name: name in names for name in FLAGS}}


def template(*parts):
    """A post-processor that puts tokens around a text, which is $."""
    ids = {"<s>": 1, "</s>": 2}
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if part == "$" else {"SpecialToken": {"id": part, "type_id": 0}}
        for part in parts
    ]
    tokens = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PAIR = {"sep": ["</s>", 2], "cls": ["<s>", 1]}
RULES = {  # how text is cut, and how special tokens are found in it
    "as published": {},
    "a space in front of the first text alone": metaspace("first"),
    "a space in front of the first text, words apart": metaspace("first", split=True),
    "a space in front of every text": metaspace("always"),
    "a space in front of no text": metaspace("never"),
    "no normalizer but for spaces": {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    },
    "bytes": {"normalizer": None, "pre_tokenizer": BYTES},
    "as add_tokens writes them": flags("normalized"),
    "not special": flags(),
    "special and normalized": flags("special", "normalized"),
    "with the space in front": flags("special", "lstrip"),
    "with the space behind": flags("rstrip"),
    "between words alone": flags("special", "single_word"),
    "all flags": flags(*FLAGS),
    "all flags, a space in front of the first text alone": {**metaspace("first"), **flags(*FLAGS)},
}
TEMPLATES = {  # what is put around a text
    "<s> in front": template("<s>", "$"),
    "</s> behind": template("$", "</s>"),
    "both": template("<s>", "$", "</s>"),
    "several": template("<s>", "<s>", "$", "</s>", "</s>"),
    "nothing": None,
    "bert": {"type": "BertProcessing", **PAIR},
    "roberta": {"type": "RobertaProcessing", **PAIR, "trim_offsets": True, "add_prefix_space": False},
    "bytes": BYTES,
    "bytes, then both": {"type": "Sequence", "processors": [BYTES, template("<s>", "$", "</s>")]},
}


def write(folder, changes):
    """A tokenizer.json with such rules in a folder, and a config.json by which transformers takes it → the file."""
    values = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    values |= {name: value for name, value in changes.items() if name not in ("flags", "model")}
    values["model"] |= changes.get("model", {})
    for token in values["added_tokens"]:
        token.update(changes.get("flags", {}))
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "llava"}', encoding="utf-8")
    return folder / "tokenizer.json"
