"""Whatever comes from outside is taken as it should be, or refused in one sentence: examples that hypothesis makes up.

The same ones in each run, as a test that fails only sometimes helps nobody; fuzz/ goes on from here for millions of others.
"""

import io
import json
import re
import struct
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import EDGE, IMAGE, TINY, make_checkpoint
from test_pictures import EXTENSIONS, MODES, encoded, picture, preprocess_config, reference_pixels
from transformers import LlavaImageProcessorPil

import llama
import llava
import vision
import weights

CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def examples(number):
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=CHECKS)


def refused(call, *args):
    """What the call returns; None if it refuses the input, with an error of the right kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call(*args)
        except (ValueError, OSError) as error:
            assert str(error) and "\n" not in llava.line(error)


# ----------------------------------------------------------------------------------------------------------------
# Pictures


@examples(80)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(MODES), st.booleans(), st.sampled_from([EDGE, 27, 41]))
def test_any_picture_equals_the_reference(width, height, mode, pad, edge):
    image, config = picture(width, height, mode), preprocess_config(edge)
    theirs = reference_pixels(image, config, LlavaImageProcessorPil, do_pad=True) if pad else reference_pixels(image, config)
    assert torch.equal(vision.preprocess(image, config, pad), theirs)


@pytest.fixture(scope="module")
def files():
    return {kind: encoded(picture(17, 12).quantize(16).convert("RGB"), kind) for kind in EXTENSIONS}


@examples(400)
@given(st.data(), st.sampled_from([*EXTENSIONS]), st.sampled_from(["change", "insert", "remove", "cut", "join"]))
def test_any_damage_gives_a_picture_or_one_sentence(files, data, kind, way):
    content = bytearray(files[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        some = data.draw(st.binary(max_size=9))
        content[at : len(content) if way == "cut" else at + len(some) * (way != "insert")] = b"" if way == "remove" else some
        content = content or bytearray(b"\0")
    if way == "join":
        content += files[data.draw(st.sampled_from([*EXTENSIONS]))]
    image = refused(vision.open_image, io.BytesIO(bytes(content)))
    assert image is None or (image.mode == "RGB" and image.width * image.height <= vision.MAX_PIXELS)


@examples(200)
@given(st.binary(max_size=200), st.sampled_from(["", *EXTENSIONS]))
def test_any_bytes_are_a_picture_or_refused(files, content, kind):
    start = files[kind][: len(content) // 2] if kind else b""
    image = refused(vision.open_image, io.BytesIO(start + content))
    assert image is None or image.mode == "RGB"


# ----------------------------------------------------------------------------------------------------------------
# Text

BROKEN = st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF, exclude_categories=())  # bytes, as the shell disguises them
LETTERS = st.characters(codec="utf-8") | BROKEN
ARGUMENTS = st.text(LETTERS) | st.text("<>/simagepdun|USER:ASTN \n▁\0", max_size=60)
PLAIN = ARGUMENTS.map(llava.readable)


@pytest.fixture(scope="module")
def processor():
    config = llava.LlavaConfig(image_token_index=IMAGE)
    return llava.Processor(llama.Tokenizer(TINY / "tokenizer.json"), preprocess_config(), config)


@examples(300)
@given(PLAIN, st.integers(0, 3), st.sampled_from(["user", "system", "assistant"]))
def test_any_words_stay_words(processor, words, images, role):
    """They come back as they were, hold no special token, and the pictures stand where they stand without them."""
    turns = [(role, words), ("user", "Why?")]
    ids = processor.chat(turns, [Image.new("RGB", (9, 9))] * images)["input_ids"][0].tolist()
    assert ids.count(IMAGE) == images and ids[0] == 1 and ids.count(1) == 1 and ids.count(2) == (role == "assistant")
    assert words.replace("▁", " ") in processor.decode(ids)  # the letter that this vocabulary writes for a space
    assert "".join(processor.tokenizer.stream(ids)).rstrip("\ufffd") == processor.decode(ids).replace("\ufffd", "")


@examples(300)
@given(ARGUMENTS)
def test_any_argument_is_text(argument):
    """The shell's bytes that are no characters come as lone surrogates, which have no UTF-8 form; what is left of them has."""
    readable = llava.readable(argument)
    assert readable.encode().decode() == readable
    assert readable == argument or any("\udc80" <= letter <= "\udcff" for letter in argument)


@examples(300)
@given(st.text(st.characters(exclude_categories=()), max_size=3000))
def test_any_message_is_one_short_line(message):
    for said in (llava.line(message), llava.line(OSError(2, message[:50], message))):
        assert said.isprintable() and len(said) <= 1000 and len(said.splitlines()) <= 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@examples(30)
@given(PLAIN, st.lists(PLAIN, max_size=3))
def test_any_prompt_and_any_talk_are_answered(checkpoint, capsys, words, lines):
    """At the command line: exit status 0, or 2 and one line for a prompt that is too long."""
    arguments = ["--model", str(checkpoint), "--device", "cpu", "--max-new-tokens", "1"]
    assert llava.main([*arguments, f"--prompt={words}"]) == 0
    typed = "".join(line + "\n" for line in lines).encode()
    stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8")
    try:
        assert llava.main([*arguments, "--chat"]) == 0
    finally:
        sys.stdin = stdin
    out, err = capsys.readouterr()
    assert "Traceback" not in err and len(re.findall("tokens/s", err)) >= 1 and out.endswith("\n")


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-3, 5000) | st.floats() | st.text(max_size=9)
    | st.sampled_from(["default", "full", "gelu", "llama", "mistral", "a.safetensors", "../a.safetensors", "a\0.safetensors"]),
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
    for file in refused(weights.shards, folder) or []:
        assert file.parent == folder and re.fullmatch(r"[\w-][\w.-]*\.safetensors", file.name)
        assert file.resolve().parent == folder.resolve()


def run(folder):
    """Everything that a config decides: sizes, the form of the prompt, pixels and, of a small model, an answer."""
    config, preprocess = weights.read_config(folder, llava.LlavaConfig, vision.PreprocessConfig)
    processor = llava.Processor(llama.Tokenizer(TINY / "tokenizer.json"), preprocess, config)
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
    names = sorted({*place, "rope_scaling", "sliding_window", "vision_feature_layer", "head_dim", "eos_token_id", "do_pad", "x"})
    name = data.draw(st.sampled_from([name for name in names if name not in ("num_hidden_layers",)]))
    place[name] = value
    (folder / file).write_text(json.dumps(values))
    try:
        refused(run, folder)
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
    config = weights.read_config(folder, llava.LlavaConfig, vision.PreprocessConfig)[0]
    with torch.device("meta"):
        model = llava.Llava(config)
    found = refused(weights.scan, model, folder)
    if found:
        weights.read(model, found, torch.float32, torch.device("cpu"))
        assert all(np.isfinite(tensor.shape).all() for tensor in model.parameters())
