"""Input from outside: tokenizers and checkpoints are taken as they should be, or refused in one sentence."""

import ast
import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import tokenizer_files
import torch
from checkpoints import EMBED, HEAD, configs, entry, header, load, refusal, same, write_index
from examples import examples, tried
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reference import ROOT, TINY, VOCABULARY, make_checkpoint
from transformers import AutoTokenizer

import llama
import llava
import weights
from extras import checks

# ----------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    for name, content in [("tokenizer.json", "{}"), ("other.json", "not json")]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as a tokenizer"):
            checks.Tokenizer(tmp_path / name)


LATE = {  # what the library takes when it reads the file, and trips over when something is encoded
    "an unknown token outside the vocabulary": {"model": {"unk_token": "<?>", "byte_fallback": False}},
    "words without an unknown one": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}},
    "a template of tokens that are not there": {
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "?", "type_id": 0}}],
                           "pair": [],
                           "special_tokens": {}},
    },
    "a prefix longer than the tokens": {"model": {"continuing_subword_prefix": "x" * 100}},
}  # fmt: skip


@pytest.mark.parametrize("kind", LATE)
def test_a_tokenizer_that_fails_late_is_refused_at_once(tmp_path, kind, capfd):
    values = json.loads((TINY / "tokenizer.json").read_text())
    for name, change in LATE[kind].items():
        values[name] = values[name] | change if name == "model" else change
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        checks.Tokenizer(tmp_path / "tokenizer.json")


def test_half_a_character_is_refused():
    tokenizer = checks.Tokenizer(TINY / "tokenizer.json")
    for text in ("a\udcffb", "\ud83d"):
        with pytest.raises(ValueError, match="holds half a character"):
            tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode("a \U0001f600")) == "a \U0001f600"


@pytest.mark.parametrize(
    ("text", "change"),
    [
        # of which the library tires
        ("a" * 60 + "b", {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a*)*$"}, "content": "b"}}),
        # more than there is to take off
        ("AAAA", {"decoder": {"type": "Strip", "content": "A", "start": 0, "stop": 1000}}),
    ],
    ids=["normalizer", "decoder"],
)
def test_a_tokenizer_that_fails_on_one_text_alone_is_named(tmp_path, text, change):
    values = json.loads((TINY / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = checks.Tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        tokenizer.decode(tokenizer.encode(text))


def test_ctrl_c_while_a_tokenizer_is_read_is_not_its_fault(monkeypatch):
    monkeypatch.setattr(checks.Tokenizer, "encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checks.Tokenizer(TINY / "tokenizer.json")


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints: what is not JSON


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", "3", '"x"', "{'model_type': 'llava'}", '{"a": 1,}', "[" * 100_000, '{"a":' * 100_000, "\xff",
    "\0",
    '{"model_type": "llava", "image_token_index": ' + "9" * 5000 + "}",
])  # fmt: skip
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "generation_config.json"])
def test_what_is_not_a_json_object_is_refused_by_its_name(copy, file, text):
    (copy.folder / file).write_bytes(text.encode("latin-1"))
    assert str(copy.folder / file) in refusal(copy.folder)


def test_a_huge_config_is_refused_before_it_is_read(copy):
    with open(copy.folder / "config.json", "wb") as file:
        file.truncate(10**12)
    assert "larger than any real" in refusal(copy.folder)


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints: hostile and damaged files

NAMES = [
    "../model.safetensors", "..", ".safetensors", "/etc/x.safetensors", "a/b.safetensors", "a/../model.safetensors",
    "C:\\x.safetensors", "C:x.safetensors", "..\\x.safetensors", "a\\b.safetensors", "\\\\host\\x.safetensors",
    "x\0.safetensors", "x.safetensors\0", "x.safetensors\n", "pytorch_model.bin", "model.safetensors.bin",
    "config.json", "", " ",
    "*.safetensors", "[a].safetensors", "https://host/x.safetensors", "~/x.safetensors", "$HOME.safetensors",
    None, 3, True, ["a.safetensors"], {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_index_may_only_name_files_beside_it(copy, name):
    (copy.folder.parent / "model.safetensors").write_bytes(b"outside")
    write_index(copy.folder, {EMBED: "model-00001-of-00001.safetensors", HEAD: name})
    message = refusal(copy.folder)
    assert "model.safetensors.index.json" in message and repr(name) in message and "bare name" in message


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": None}, {"weight_map": []}, {"weight_map": "x"}, {"weight_map": {}}]
)
def test_an_index_without_weight_map_is_refused(copy, index):
    (copy.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(copy.folder)
    assert "model.safetensors.index.json" in message and "weight_map" in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links and pipes")
def test_a_link_that_leads_to_itself_is_refused(copy):
    folder = Path(copy.write("B", 2))
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.unlink()
    shard.symlink_to(shard.name)
    assert shard.name in refusal(folder)


def test_a_link_out_of_the_folder_is_refused(copy, tmp_path):
    """As in an archive that was unpacked: the index names a file of the folder, which leads to another."""
    Path(copy.write(shards=2))
    file = copy.folder / "model-00001-of-00002.safetensors"
    inside, outside = copy.folder / "other.safetensors", tmp_path / "outside.safetensors"
    file.rename(outside)
    for target in (outside, "../outside.safetensors"):
        file.symlink_to(target)
        assert f"{file.name} is a link out of the folder" in refusal(copy.folder)
        file.unlink()
    outside.rename(inside)
    file.symlink_to(inside.name)  # within the folder it may
    assert load(copy.folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links and pipes")
def test_the_links_of_the_hubs_cache_are_followed(copy, tmp_path, checkpoints):
    """A snapshot there is a folder of links to ../../blobs; and the folder itself may be reached through a link."""
    copy.write(shards=2)
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(copy.folder.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "shortcut").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "shortcut"):
        assert same(load(folder), load(checkpoints["llama"]))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links and pipes")
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "model-00001-of-00002.safetensors"]
)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(copy, name):
    copy.write(shards=1 if name == "model.safetensors" else 2)
    (copy.folder / name).unlink()
    os.mkfifo(copy.folder / name)
    assert name in refusal(copy.folder)


DAMAGED = {
    "nothing": b"",
    "half a length": b"\1\0\0",
    "length 0": struct.pack("<Q", 0),
    "length beyond the file": struct.pack("<Q", 10**6) + b"{}",
    "length 2**63": struct.pack("<Q", 2**63) + b"{}",
    "length over 100 MB": struct.pack("<Q", 200 * 10**6) + b"{}",
    "noise": bytes(range(256)) * 40,
    "a pickle": b"\x80\x02}q\x00." + b"\0" * 100,
    "not UTF-8": header(b'{"\xff": 1}'),
    "a list": header([]),
    "deep": header(b'{"a":' * 100_000),
    "numbers cut off": header({"a": entry(0, 8)}) + b"\0" * 7,
    "trailing bytes": header({"a": entry(0, 8)}) + b"\0" * 9,
    "overlap": header({"a": entry(0, 8), "b": entry(4, 12)}) + b"\0" * 12,
    "a hole": header({"a": entry(0, 8), "b": entry(12, 20)}) + b"\0" * 20,
    "backwards": header({"a": entry(8, 0)}) + b"\0" * 8,
    "negative": header({"a": entry(-8, 0)}),
    "shape and bytes differ": header({"a": entry(0, 8, shape=(3,))}) + b"\0" * 8,
    "shape overflows": header({"a": entry(0, 8, shape=(2**40, 2**40))}) + b"\0" * 8,
    "shape of floats": header({"a": entry(0, 8, shape=(2.0,))}) + b"\0" * 8,
    "unknown type": header({"a": entry(0, 8, dtype="F31")}) + b"\0" * 8,
    "the same name twice": header(
        b'{"a":%b,"a":%b}' % (json.dumps(entry(0, 8)).encode(), json.dumps(entry(8, 16)).encode())
    )
    + b"\0" * 16,
    "a shape of true": header({"a": entry(0, 4, shape=(True,))}) + b"\0" * 4,
    "metadata of another kind": header({"__metadata__": [1], "a": entry(0, 8)}) + b"\0" * 8,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_with_one_sentence(copy, kind):
    file = copy.folder / "model.safetensors"
    file.write_bytes(DAMAGED[kind])
    assert f"{file} is damaged or not a safetensors file" in refusal(copy.folder)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.9999])
def test_a_truncated_file_is_refused_with_one_sentence(copy, kept):
    file = Path(copy.write()) / "model.safetensors"
    os.truncate(file, int(kept * file.stat().st_size))
    assert f"{file} is damaged" in refusal(copy.folder)


def test_a_folder_in_place_of_the_file_is_refused_with_one_sentence(copy):
    (copy.folder / "model.safetensors").mkdir()
    assert str(copy.folder / "model.safetensors") in refusal(copy.folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.pt"]
)
def test_pickled_weights_are_refused_and_not_opened(copy, name):
    (copy.folder / name).write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    message = refusal(copy.folder)
    assert name in message and "pickled" in message and ".safetensors" in message


def test_code_in_a_checkpoint_is_not_run(copy, tmp_path):
    """A Python file that the config names, a template that Jinja would run, a pickle beside the weights."""
    ran = tmp_path / "ran"
    copy.config(auto_map={"AutoModel": "modeling.Llava", "AutoConfig": "modeling.Config"})
    (copy.folder / "modeling.py").write_text(f"open({str(ran)!r}, 'w')")
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(ran) + "') }}"
    for file in ("tokenizer_config.json", "chat_template.json"):
        copy.config(file, chat_template=template)
    (copy.folder / "chat_template.jinja").write_text(template)
    (copy.folder / "pytorch_model.bin").write_bytes(f"cposix\nsystem\n(S'touch {ran}'\ntR.".encode())
    _, processor = llava.load(copy.write(), device="cpu")
    assert processor.prompt("Hi", 0) == "USER: Hi ASSISTANT:" and not ran.exists()


def test_the_modules_know_no_way_to_run_code_of_others():
    """No pickle, no template engine, no module from a checkpoint: not imported,
    and no function of that kind is called.
    """
    called, imported = set(), set()
    for file in ("vision.py", "llama.py", "weights.py", "llava.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call):
                called.add(ast.unparse(node.func))
    assert not imported & {"pickle", "jinja2", "importlib", "runpy", "subprocess", "transformers", "shelve", "marshal"}
    assert not called & {
        "eval",
        "exec",
        "compile",
        "__import__",
        "torch.load",
        "os.system",
        "np.load",
        "torch.hub.load",
    }
    assert {"json.loads", "safe_open"} <= called, "it looks where something is to be seen"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


# ----------------------------------------------------------------------------------------------------------------
# Examples that hypothesis makes up: checkpoints

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-3, 5000) | st.floats() | st.text(max_size=9)
    | st.sampled_from(["default", "full", "gelu", "llama", "mistral",
                       "a.safetensors", "../a.safetensors", "a\0.safetensors"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4), max_leaves=6,
)  # fmt: skip


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of which files are overwritten, example by example."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@examples(150)
@given(VALUES | st.fixed_dictionaries({"weight_map": VALUES | st.dictionaries(st.text(max_size=5), VALUES)}))
def test_any_index_names_files_of_its_folder_or_is_refused(folder, index):
    (folder / weights.SINGLE).unlink(missing_ok=True)
    (folder / weights.INDEX).write_text(json.dumps(index), encoding="utf-8")
    for file in tried(checks.shards, folder) or []:
        assert file.parent == folder and re.fullmatch(r"[\w-][\w.-]*\.safetensors", file.name)
        assert file.resolve().parent == folder.resolve()


def run(folder):
    """Everything that a config decides: sizes, the form of the prompt, pixels and, of a small model, an answer."""
    checks.checkpoint(folder)
    config, preprocess = configs(folder)
    processor = llava.Processor(checks.Tokenizer(TINY / "tokenizer.json"), preprocess, config)
    inputs = processor.chat([("user", "Hi")], [Image.new("RGB", (30, 20))], pad=True)
    with torch.device("meta"):
        model = llava.Llava(config)
    if sum(tensor.numel() for tensor in model.parameters()) < 10**6:
        model = model.to_empty(device="cpu")
        for tensor in model.parameters():
            torch.nn.init.constant_(tensor, 0.01)
        model.generate(**inputs, max_new_tokens=2)


@examples(80)
@given(st.data(), st.sampled_from(["config.json", "preprocessor_config.json", "generation_config.json"]), VALUES)
def test_any_field_of_a_config_is_honoured_or_refused(folder, checkpoint, data, file, value):
    values = json.loads((checkpoint / file).read_text())
    place = values[data.draw(st.sampled_from(["text_config", "vision_config"]))] if file == "config.json" and data.draw(
        st.booleans()) else values  # fmt: skip
    names = sorted(
        {*place, "rope_scaling", "sliding_window", "vision_feature_layer", "head_dim", "eos_token_id", "do_pad", "x"}
    )
    name = data.draw(st.sampled_from([name for name in names if name not in ("num_hidden_layers",)]))
    place[name] = value
    (folder / file).write_text(json.dumps(values))
    try:
        tried(run, folder)
    finally:
        (folder / file).write_bytes((checkpoint / file).read_bytes())


@examples(80)
@given(st.data(), st.sampled_from(["length", "bytes", "entry", "cut"]))
def test_any_header_is_read_or_refused(folder, checkpoint, data, way):
    file = folder / weights.SINGLE
    content = bytearray((checkpoint / weights.SINGLE).read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    if way == "length":
        content[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1) | st.integers(0, 2 * length)))
    elif way == "bytes":
        at = data.draw(st.integers(0, length + 7))
        some = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(some)] = some
    elif way == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        entries = json.loads(content[8 : 8 + length])
        name = data.draw(st.sampled_from(sorted(entries)))
        if name == "__metadata__" or data.draw(st.booleans()):
            entries[name] = data.draw(VALUES)
        else:
            entries[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(VALUES)
        text = json.dumps(entries).encode()
        content[: 8 + length] = struct.pack("<Q", len(text)) + text
    file.write_bytes(content)
    config, _ = configs(folder)
    with torch.device("meta"):
        model = llava.Llava(config)
    found = tried(weights.scan, model, folder)
    if found:
        weights.read(model, found, torch.float32, torch.device("cpu"))
        assert all(np.isfinite(tensor.shape).all() for tensor in model.parameters())


# ----------------------------------------------------------------------------------------------------------------
# What the caller gives wrongly is the caller's fault, not the tokenizer's


@pytest.fixture(scope="module")
def processor():
    return llava.load("tiny", device="cpu")[1]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([5, -100], "-100 is not an id, they are 0 to 639: labels hold it"),
        (torch.tensor([5, -100, 6]), "-100 is not an id"),
        ([-1], "-1 is not an id"),
        ([640], "640 is not an id, they are 0 to 639"),
        ([2**31], f"{2**31} is not an id"),
        ([2**32 + 5], f"{2**32 + 5} is not an id"),
        ([10**30], f"{10**30} is not an id"),
        ([5.0], r"a list of integers, and not \[5.0\]"),
        (torch.tensor([5.0]), "a list of integers"),
        (["5"], "a list of integers"),
        ("5", "a list of integers"),
        ([[5, 6]], "a list of integers"),
        (torch.tensor([[5, 6], [7, 8]]), "a list of integers"),
        (5, "a list of integers, and not 5"),
        (torch.tensor(5), "a list of integers"),
        (None, "a list of integers, and not None"),
    ],
    ids=repr,
)
def test_ids_that_are_none_are_named(processor, ids, words):
    with pytest.raises(ValueError, match=words) as caught:
        processor.decode(ids)
    assert "tokenizer.json" not in str(caught.value)


def test_rows_that_round_the_vocabulary_up_are_no_text(copy):
    """A model may say such an id, as its head has these rows; the reference decodes it to nothing, too."""
    processor = llava.load(copy.write(), device="cpu")[1]
    reference = AutoTokenizer.from_pretrained(copy.folder)
    rows = processor.tokenizer.text_config.vocab_size = len(reference) + 64
    ids = [360, rows - 1, len(reference), 360]
    assert processor.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    with pytest.raises(ValueError, match=f"{rows} is not an id, they are 0 to {rows - 1}"):
        processor.decode([rows])
    processor.tokenizer.text_config.vocab_size = 8  # a model whose embedding lacks the tokens that were added
    assert processor.decode([360]) == reference.decode([360])


@pytest.mark.parametrize("text", [None, 5, b"Hi", ["Hi"], 2.5], ids=repr)
def test_a_text_that_is_none_is_the_callers_fault(processor, text):
    for encode in (
        processor.tokenizer.encode,
        lambda text: processor.tokenizer.encode(text, special=False),
        lambda text: processor([text]),
    ):
        with pytest.raises(ValueError, match="a text is a str, and not") as caught:
            encode(text)
        assert "tokenizer.json" not in str(caught.value)


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["a", -100], "-100 is not an id"),
        ([640], "640 is not an id"),
        ([2**40, "a"], f"{2**40} is not an id"),
        (["a", None], "a list of integers"),
        (["a", 2.0], "a list of integers"),
        (["a\udcff", 2], "holds half a character"),
    ],
)
def test_pieces_that_are_neither_text_nor_ids_are_the_callers_fault(processor, pieces, words):
    with pytest.raises(ValueError, match=words) as caught:
        processor.tokenizer.encode_pieces(pieces)
    assert "tokenizer.json" not in str(caught.value)


def test_a_model_that_finds_a_special_token_in_any_text_is_not_given_it(tmp_path):
    """One that takes words whole if it has them, and whose words include its special tokens."""
    rules = {**tokenizer_files.metaspace("never"), "model": {"ignore_merges": True}}
    tokenizer = checks.Tokenizer(tokenizer_files.write(tmp_path, rules))
    for typed in ("</s>", "<s>"):
        assert llama.Tokenizer(tmp_path / "tokenizer.json").encode_pieces([typed]) == [tokenizer.id(typed)]
        for pieces in ([typed], [2, typed, 638], [1, 2, typed]):
            with pytest.raises(ValueError, match=f"takes {typed} in a text for a special token"):
                tokenizer.encode_pieces(pieces)
        with pytest.raises(ValueError, match=f"takes {typed} in a text for a special token"):
            tokenizer.encode(typed, special=False)
    assert tokenizer.encode_pieces(["star", 2, "star", 2]).count(2) == 2
    assert tokenizer.encode("</s>") == [2]  # the low-level door, where special tokens count


# ----------------------------------------------------------------------------------------------------------------
# The ids that end and fill a row


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("generation_config.json", {"pad_token_id": VOCABULARY}),
        ("generation_config.json", {"pad_token_id": -1}),
        ("generation_config.json", {"eos_token_id": VOCABULARY}),
        ("generation_config.json", {"eos_token_id": [2, 9999]}),
        ("config.json", {"pad_token_id": VOCABULARY}),
        ("config.json", {"eos_token_id": [-1, 2]}),
        ("config.json", {"text_config": {"eos_token_id": 32001}}),
    ],
    ids=repr,
)
def test_ends_and_pads_outside_the_vocabulary_are_refused_by_their_field(copy, file, changes):
    if file == "config.json":
        (copy.folder / "generation_config.json").unlink()
    [(name, value)] = (changes.get("text_config") or changes).items()
    wrong = next(i for i in (value if isinstance(value, list) else [value]) if not 0 <= i < VOCABULARY)
    assert f"{file}: {name} is {wrong}, and the ids of the vocabulary are 0 to {VOCABULARY - 1}" in refusal(
        copy.config(file, **changes).write()
    )


def test_the_last_row_of_the_vocabulary_may_end_and_fill(copy):
    last = VOCABULARY - 1
    copy.config("generation_config.json", pad_token_id=last, eos_token_id=[0, last])
    model, processor = llava.load(copy.write(), device="cpu")
    inputs = processor(["Hello there, you", "Hi"])
    assert inputs["input_ids"][1, 0] == last and model(**inputs).logits.isfinite().all()
