"""Input from outside: pictures, tokenizers and checkpoints are taken as they should be, or refused in one sentence."""

import ast
import io
import json
import os
import random
import re
import socket
import struct
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizer_files
import torch
from checkpoints import EMBED, HEAD, configs, entry, header, load, refusal, same, write_index
from effort import effort
from examples import examples, tried
from hypothesis import given
from hypothesis import strategies as st
from pictures import EXTENSIONS, claimed_png, encoded, picture, pixels, refused
from PIL import Image, PngImagePlugin
from reference import ROOT, TINY, VOCABULARY, make_checkpoint
from transformers import AutoTokenizer

import llama
import llava
import vision
import weights
from extras import checks

# ----------------------------------------------------------------------------------------------------------------
# Pictures: files of all kinds


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_used_and_said_so(tmp_path, kind):
    frames = [picture(20, 10, seed=seed).quantize(16).convert("RGB") for seed in range(3)]
    file = tmp_path / f"frames.{EXTENSIONS[kind]}"
    frames[0].save(file, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    with pytest.warns(UserWarning, match=r"frames\.\w+ holds several pictures; only the first one is used") as said:
        opened = checks.open_image(file)
    assert len(said) == 1 and said[0].filename == __file__
    assert (pixels(opened) == pixels(frames[0])).all()


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_a_single_picture_is_opened_without_a_word(tmp_path, kind):
    image = picture(20, 10).quantize(16).convert("RGB")
    file = tmp_path / "picture.xyz"  # the name's ending says nothing: the bytes do
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = checks.open_image(file)
    assert opened.mode == "RGB" and opened.size == (20, 10)
    assert kind == "JPEG" or (pixels(opened) == pixels(image)).all()


def test_the_previews_in_a_cameras_file_are_not_mentioned():
    frames = [picture(20, 10, seed=seed) for seed in range(2)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checks.open_image(io.BytesIO(data)).size == (20, 10)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "MPO"])
@pytest.mark.filterwarnings("ignore:.*only the first one is used")
def test_a_file_is_closed_again(tmp_path, monkeypatch, kind):
    picture(20, 10).save(tmp_path / "frames", kind, save_all=True, append_images=[picture(20, 10, seed=1)])
    files, really_open = [], open
    monkeypatch.setattr(
        "builtins.open", lambda *args, **options: files.append(really_open(*args, **options)) or files[-1]
    )
    checks.open_image(tmp_path / "frames")
    monkeypatch.undo()
    assert files and all(file.closed for file in files)


class Pipe(io.RawIOBase):
    """Standard input: can be read, and only forwards."""

    def __init__(self, data):
        self.left = data

    def readable(self):
        return True

    def readinto(self, buffer):
        part, self.left = self.left[: len(buffer)], self.left[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_a_binary_file_object_is_read(tmp_path, kind):
    data = encoded(picture(20, 10).quantize(16).convert("RGB"), kind)
    (tmp_path / "picture").write_bytes(data)
    expected = checks.open_image(tmp_path / "picture").tobytes()
    assert checks.open_image(io.BytesIO(data)).tobytes() == expected
    assert checks.open_image(io.BufferedReader(Pipe(data))).tobytes() == expected
    with open(tmp_path / "picture", "rb") as file:
        assert checks.open_image(file).tobytes() == expected
        assert not file.closed


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_read(tmp_path):
    """As the shell's <(…) is one: used like any file, though nothing can be read twice in it."""
    data = encoded(picture(20, 10))
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    assert pixels(checks.open_image(tmp_path / "pipe")).tolist() == pixels(picture(20, 10)).tolist()
    writer.join(20)


class Endless(io.RawIOBase):
    """A pipe that never ends."""

    given = 0

    def readable(self):
        return True

    def readinto(self, buffer):
        self.given += len(buffer)
        return len(buffer)


def test_a_pipe_that_never_ends_is_not_read_for_ever(monkeypatch):
    monkeypatch.setattr(checks, "MAX_BYTES", 10**6)
    pipe = Endless()
    refused(io.BufferedReader(pipe), "standard input is not a picture", kind=ValueError)
    assert pipe.given < 2 * 10**6


# ----------------------------------------------------------------------------------------------------------------
# Pictures: what is none is refused in one sentence


@pytest.mark.parametrize("percent", [0, 10, 50, 99])
@pytest.mark.parametrize("kind", [*EXTENSIONS, "progressive JPEG", "lossless WEBP"])
def test_a_file_cut_short_is_refused(tmp_path, kind, percent):
    options = {"progressive JPEG": {"progressive": True}, "lossless WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(picture(64, 48), kind.split()[-1], **options)
    file = tmp_path / "short.img"
    file.write_bytes(data)
    assert checks.open_image(file).size == (64, 48)
    file.write_bytes(data[: len(data) * percent // 100])
    refused(file, str(file), kind=ValueError)
    refused(io.BytesIO(file.read_bytes()), "standard input", kind=ValueError)


VARIANTS = {  # name: (format, mode, options); libtiff's own JPEG decoder is left out, as it writes to stderr by itself
    "progressive JPEG": ("JPEG", "RGB", {"progressive": True}), "lossless WEBP": ("WEBP", "RGB", {"lossless": True}),
    "PNG with opacity": ("PNG", "RGBA", {}), "PNG with a palette": ("PNG", "P", {}),
    "BMP with a palette": ("BMP", "P", {}),
    "TIFF, LZW": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "TIFF, deflate": ("TIFF", "RGB", {"compression": "tiff_deflate"}),
    "grey PPM": ("PPM", "L", {}), "PPM of one bit": ("PPM", "1", {}), "PPM of 16 bits": ("PPM", "I", {}),
    "JPEG of inks": ("JPEG", "CMYK", {}),
    **{f"moving {kind}": (kind, "RGB", {"frames": 2}) for kind in ("GIF", "PNG", "TIFF")},
}  # fmt: skip


@pytest.mark.parametrize("kind", [*EXTENSIONS, *VARIANTS])
def test_a_file_cut_anywhere_is_refused_or_the_same_picture(kind):
    """Never a picture of which the lower half is grey. PNG,
    GIF and BMP end with bytes that hold nothing of the picture.
    """
    form, mode, options = VARIANTS.get(kind, (kind, "RGB", {}))
    if options.get("frames"):
        options = {"save_all": True, "append_images": [picture(17, 12, seed=1)]}
    data = encoded(picture(17, 12, mode), form, **options)
    outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = checks.open_image(io.BytesIO(data)).tobytes()
        for length in range(len(data)):
            try:
                outcomes.append(checks.open_image(io.BytesIO(data[:length])).tobytes() == whole)
            except ValueError:
                outcomes.append(None)
    assert False not in outcomes and outcomes[: len(data) // 3] == [None] * (len(data) // 3)


@pytest.mark.parametrize("kind", [*EXTENSIONS, "MPO"])
def test_damaged_bytes_give_a_picture_or_one_sentence(kind):
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF", "MPO") else {}
    whole, refusals = encoded(picture(17, 12), kind, **options), 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(min(len(data), rng.choice([60, 200, 10000])))] = rng.choice([0, 255, rng.randrange(256)])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                checks.open_image(io.BytesIO(bytes(data)))
        except (ValueError, OSError):
            refused(io.BytesIO(bytes(data)), "standard input", kind=ValueError)
            refusals += 1
    assert refusals


def test_a_text_file_and_an_empty_file_are_refused(tmp_path):
    for name, content in [("notes.png", b"This is not a picture.\n" * 20), ("empty.jpg", b""), ("zeros", bytes(1000))]:
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, f"{tmp_path / name} is not a picture in a known format (PNG, JPEG, ", kind=ValueError)


def test_a_format_outside_the_list_is_refused(tmp_path):
    for kind in ("ICO", "TGA", "PCX"):
        picture(16, 16).save(tmp_path / "picture", kind)
        refused(tmp_path / "picture", "is not a picture in a known format", kind=ValueError)


def test_a_directory_a_missing_file_and_an_address_are_refused(tmp_path):
    refused(tmp_path, f"{tmp_path} cannot be read")
    refused(tmp_path / "none.png", f"no such picture: {tmp_path / 'none.png'}", kind=FileNotFoundError)
    refused(str(tmp_path / "none.png"), f"no such picture: {tmp_path / 'none.png'}", kind=FileNotFoundError)
    for address in ("http://localhost/cat.jpg", "https://localhost/cat.jpg", "HTTPS://localhost/cat.jpg"):
        refused(address, f"{address} is an address", kind=ValueError)
    for other in ("ftp://localhost/cat.jpg", "file:///cat.jpg", "data:image/png;base64,iVBORw0KGgo="):
        refused(other, "no such picture", kind=FileNotFoundError)


def test_nothing_is_fetched_for_a_picture(monkeypatch):
    """Whatever an address looks like: no socket is opened."""
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a connection"))
    for address in (
        "http://localhost/x.png",
        "https:\\\\localhost\\x.png",
        "//localhost/x.png",
        "\\\\localhost\\x.png",
        "s3://x/y.png",
    ):
        with pytest.raises((ValueError, OSError)):
            checks.open_image(address)


@pytest.mark.parametrize("size", [(60000, 60000), (10000, 9999), (89478486, 1)], ids=str)
def test_a_small_file_that_claims_a_huge_picture_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, size):
    (tmp_path / "bomb.png").write_bytes(claimed_png(*size))
    assert (tmp_path / "bomb.png").stat().st_size < 1000
    refused(tmp_path / "bomb.png", "bomb.png has over 89,478,485 pixels", kind=ValueError)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # some libraries do that
    refused(tmp_path / "bomb.png", "bomb.png has over 89,478,485 pixels", kind=ValueError)


def test_a_chain_of_many_pages_takes_no_time(tmp_path):
    """To count them, Pillow compares each with all before it: 41 s for 100,000 pages. One is enough to know."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1), "red").save(file, "TIFF")
    whole = bytearray(file.getvalue() + b"\0" * (len(file.getvalue()) % 2))
    begin = struct.unpack("<I", whole[4:8])[0]
    end = begin + 2 + 12 * struct.unpack("<H", whole[begin : begin + 2])[0]
    page, base, pages = bytes(whole[begin:end]), len(whole), 20_000
    whole[end : end + 4] = struct.pack("<I", base)
    for i in range(pages):
        whole += page + struct.pack("<I", base + (len(page) + 4) * (i + 1) if i < pages - 1 else 0)
    (tmp_path / "chain.tif").write_bytes(whole)
    with pytest.warns(UserWarning, match="several pictures"):
        image, calls = effort(checks.open_image, tmp_path / "chain.tif")
    assert image.size == (1, 1) and calls < pages  # to look at each would be many calls a page


def test_memory_that_runs_out_is_not_called_a_damaged_picture(tmp_path, monkeypatch):
    (tmp_path / "picture.png").write_bytes(encoded(picture(20, 10)))

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", full)
    with pytest.raises(MemoryError):
        checks.open_image(tmp_path / "picture.png")


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


# ----------------------------------------------------------------------------------------------------------------
# Examples that hypothesis makes up: pictures


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
        content[at : len(content) if way == "cut" else at + len(some) * (way != "insert")] = (
            b"" if way == "remove" else some
        )
        content = content or bytearray(b"\0")
    if way == "join":
        content += files[data.draw(st.sampled_from([*EXTENSIONS]))]
    image = tried(checks.open_image, io.BytesIO(bytes(content)))
    assert image is None or (image.mode == "RGB" and image.width * image.height <= vision.MAX_PIXELS)


@examples(200)
@given(st.binary(max_size=200), st.sampled_from(["", *EXTENSIONS]))
def test_any_bytes_are_a_picture_or_refused(files, content, kind):
    start = files[kind][: len(content) // 2] if kind else b""
    image = tried(checks.open_image, io.BytesIO(start + content))
    assert image is None or image.mode == "RGB"


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
        ([5.0], r"a list of whole numbers, and not \[5.0\]"),
        (torch.tensor([5.0]), "a list of whole numbers"),
        (["5"], "a list of whole numbers"),
        ("5", "a list of whole numbers"),
        ([[5, 6]], "a list of whole numbers"),
        (torch.tensor([[5, 6], [7, 8]]), "a list of whole numbers"),
        (5, "a list of whole numbers, and not 5"),
        (torch.tensor(5), "a list of whole numbers"),
        (None, "a list of whole numbers, and not None"),
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
        (["a", None], "a list of whole numbers"),
        (["a", 2.0], "a list of whole numbers"),
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
