"""Tokens that stand beside a tokenizer.json, as AutoTokenizer reads them, and the secret spellings of them all."""

import json

import pytest
from reference import TINY
from transformers import AutoTokenizer

import llava
from extras import added_tokens, checks

NAMES = {0: "<unk>", 1: "<s>", 2: "</s>", 638: "<image>", 639: "<pad>"}
CALLED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
ALL = CALLED | {"pad_token": "<pad>", "image_token": "<image>"}
IDS = {"<image>": 638, "<pad>": 639}
TEXTS = ["USER: <image>\nWhat? ASSISTANT:", "a <image> b</s> c <pad>x", " <s> hi </s>\n <image><image>", "x<image>y"]


def token(name, *flags):
    return {"content": name, **{flag: flag in flags for flag in added_tokens.FLAGS}}


def decoder(*flags):
    return {"added_tokens_decoder": {str(i): token(name, *flags) for i, name in NAMES.items()}}


CASES = {  # the flags in tokenizer.json, what it lacks, the files beside it: of CONFIG, of IDS, of MAP
    "spaces taken beside": (["special"], [], ALL | decoder("special", "lstrip", "rstrip"), None, None),
    "spaces taken in tokenizer.json": (["special", "lstrip", "rstrip"], [], ALL | decoder("special"), None, None),
    "between words": (["special"], [], CALLED | decoder("special", "single_word"), None, None),
    "without its flag, called by a name": (["special"], [], ALL | decoder("normalized"), None, None),
    "without its flag in tokenizer.json": ([], [], ALL, None, None),
    "without its flag anywhere": ([], [], decoder("normalized"), None, None),
    "in the list alone": (["special"], IDS, CALLED | decoder("special", "lstrip"), None, None),
    "a list beside another": (["special"], IDS, CALLED | decoder("special"), {"<pad>": 638, "<image>": 639}, None),
    "with an id alone": (["special"], IDS, CALLED, IDS, None),
    "with an id, and called by a name": (["special"], IDS, {**CALLED, "pad_token": "<pad>"}, IDS, None),
    "with an id, and a map": (["special"], IDS, CALLED, IDS, {"pad_token": "<pad>", "image_token": {
        "content": "<image>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False}}),
    "in tokenizer.json and with an id": (["special", "lstrip"], [], CALLED, IDS, None),
    "more": (["special"], IDS, {**CALLED, "additional_special_tokens": ["<image>", "<pad>"]}, None, None),
    "more, by names": (["special"], IDS, {**CALLED, "extra_special_tokens": {"image_token": "<image>"}}, None, None),
    "called by a name, an object": (
        ["special"], IDS, {**CALLED, "image_token": {"__type": "AddedToken", **token("<image>", "special", "rstrip")}},
        None, None),
    "in the vocabulary, called by a name": (["special"], ["</s>"], ALL, None, None),
}  # fmt: skip


def write(folder, flags=("special",), lacks=(), config=None, ids=None, names=None, normalizers=()):
    """A tokenizer.json, and what stands beside it → its path."""
    values = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    values["added_tokens"] = [{"id": i, **token(name, *flags)} for i, name in NAMES.items() if name not in lacks]
    values["normalizer"]["normalizers"][:0] = normalizers
    files = dict(zip(added_tokens.FILES, (config, names, ids), strict=True))
    files |= {"tokenizer.json": values, "config.json": {"model_type": "llava"}}
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder / "tokenizer.json"


def flags_of(bpe):
    return {i: repr(x) for i, x in bpe.get_added_tokens_decoder().items()}


@pytest.mark.parametrize("case", CASES)
def test_ids_and_flags_are_the_references(tmp_path, case):
    file = write(tmp_path, *CASES[case])
    ours, theirs = checks.Tokenizer(file), AutoTokenizer.from_pretrained(tmp_path)
    assert flags_of(ours.bpe) == flags_of(theirs.backend_tokenizer)
    for text in TEXTS:
        assert ours.bos + ours.encode(text) == theirs(text).input_ids
    for pieces in (["a ", 638, "\nb"], ["a", 2, " b", 638], [638, 638]):
        text = "".join(NAMES.get(piece, piece) for piece in pieces)
        if ours.id("<image>") == 638:
            assert ours.encode_pieces(pieces) == theirs(text, add_special_tokens=False).input_ids
    assert not {*NAMES} & {*ours.encode_pieces(["</s> <image> <pad>"])}


@pytest.mark.parametrize("case", ["spaces taken beside", "in the list alone", "with an id, and a map"])
def test_what_was_read_is_saved(tmp_path, case):
    """In tokenizer.json itself: nothing beside it says otherwise, here and for transformers."""
    model, processor = llava.load("tiny", device="cpu")
    tokenizer = checks.Tokenizer(write(tmp_path, *CASES[case]))
    processor = llava.Processor(tokenizer, processor.preprocess_config, model.config)
    for folder in (tmp_path / "saved", tmp_path):  # and over what was read
        llava.save(model, processor, folder)
        again, theirs = checks.Tokenizer(folder / "tokenizer.json"), AutoTokenizer.from_pretrained(folder)
        assert flags_of(again.bpe) == flags_of(tokenizer.bpe) == flags_of(theirs.backend_tokenizer)
        for text in TEXTS:
            assert again.encode(text) == tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder is"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": token("<x>")}}, "an object of ids and tokens"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": token("<x>")}}, "an object of ids and tokens"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"640": 5}}, "5 is no token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"640": {"special": True}}}, "is no token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"640": {"content": 7}}}, "is no token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"640": token("<x>") | {"lstrip": "yes"}}}, "is no token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"640": token("\ud800")}}, "is no token"),
        ("tokenizer_config.json", {"extra_special_tokens": 5}, "extra_special_tokens is 5"),
        ("tokenizer_config.json", {"additional_special_tokens": [5]}, "5 is no token"),
        ("tokenizer_config.json", [], "is not a JSON object"),
        ("added_tokens.json", {"<x>": "a"}, "an object of ids and tokens"),
        ("added_tokens.json", {"<x>": None}, "an object of ids and tokens"),
        ("special_tokens_map.json", {"pad_token": {}}, "is no token"),
    ],
    ids=str,
)
def test_what_is_no_token_is_refused_by_its_file(tmp_path, file, values, words):
    write(tmp_path)
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=words) as caught:
        checks.Tokenizer(tmp_path / "tokenizer.json")
    assert file in str(caught.value) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------
# Secret spellings


def replace(*patterns):
    return [{"type": "Replace", "pattern": {"Regex": x}, "content": "0"} for x in patterns]


@pytest.mark.parametrize(
    "normalizers",
    [replace("[0-9]"), replace("[a-z0-9]"), replace("[a-zA-Z0-9]"), replace(r"\w"), [{"type": "Lowercase"}]],
    ids=str,
)
def test_a_secret_spelling_is_one_that_the_normalizer_leaves_apart(tmp_path, normalizers):
    file = write(tmp_path, ["special", "normalized"], normalizers=normalizers)
    ours, theirs = checks.Tokenizer(file), AutoTokenizer.from_pretrained(tmp_path)
    for pieces in (["USER: ", 638, "\nWhat? "], [638, 638, " 12"], ["a ", 638], [638]):
        text = "".join(NAMES.get(piece, piece) for piece in pieces)
        assert ours.encode_pieces(pieces) == theirs(text, add_special_tokens=False).input_ids
        assert 638 in ours.encode_pieces(pieces)
    assert len({*ours.secret.values()}) == len(NAMES)


def test_no_spelling_is_left(tmp_path):
    file = write(tmp_path, ["special", "normalized"], normalizers=replace("[^<>/imagesdpunk]"))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer: its normalizer"):
        checks.Tokenizer(file)
