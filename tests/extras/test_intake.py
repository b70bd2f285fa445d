"""Pictures from outside: used as the person who took them sees them, or refused in one sentence by their right name."""

import io
import logging
import os
import random
import signal
import socket
import struct
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch
from effort import effort
from examples import examples, tried
from hypothesis import given
from hypothesis import strategies as st
from pictures import (
    EXTENSIONS,
    bmp,
    claimed_png,
    encoded,
    exif,
    jpeg_with,
    picture,
    pixels,
    png_chunk,
    png_with,
    refused,
    tiff,
)  # fmt: skip
from PIL import Image, ImageFile, PngImagePlugin, features
from transformers.image_utils import load_image

import llava
import vision
from extras import intake

# ----------------------------------------------------------------------------------------------------------------
# Files of all kinds


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_used_and_said_so(tmp_path, kind):
    frames = [picture(20, 10, seed=seed).quantize(16).convert("RGB") for seed in range(3)]
    file = tmp_path / f"frames.{EXTENSIONS[kind]}"
    frames[0].save(file, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    with pytest.warns(UserWarning, match=r"frames\.\w+ holds several pictures; only the first one is used") as said:
        opened = intake.open_image(file)
    assert len(said) == 1 and said[0].filename == __file__
    assert (pixels(opened) == pixels(frames[0])).all()


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_a_single_picture_is_opened_without_a_word(tmp_path, kind):
    image = picture(20, 10).quantize(16).convert("RGB")
    file = tmp_path / "picture.xyz"  # the name's ending says nothing: the bytes do
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = intake.open_image(file)
    assert opened.mode == "RGB" and opened.size == (20, 10)
    assert kind == "JPEG" or (pixels(opened) == pixels(image)).all()


def test_the_previews_in_a_cameras_file_are_not_mentioned():
    frames = [picture(20, 10, seed=seed) for seed in range(2)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert intake.open_image(io.BytesIO(data)).size == (20, 10)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "MPO"])
@pytest.mark.filterwarnings("ignore:.*only the first one is used")
def test_a_file_is_closed_again(tmp_path, monkeypatch, kind):
    picture(20, 10).save(tmp_path / "frames", kind, save_all=True, append_images=[picture(20, 10, seed=1)])
    files, really_open = [], open
    monkeypatch.setattr(
        "builtins.open", lambda *args, **options: files.append(really_open(*args, **options)) or files[-1]
    )
    intake.open_image(tmp_path / "frames")
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
    expected = intake.open_image(tmp_path / "picture").tobytes()
    assert intake.open_image(io.BytesIO(data)).tobytes() == expected
    assert intake.open_image(io.BufferedReader(Pipe(data))).tobytes() == expected
    with open(tmp_path / "picture", "rb") as file:
        assert intake.open_image(file).tobytes() == expected
        assert not file.closed


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_read(tmp_path):
    """As the shell's <(…) is one: used like any file, though nothing can be read twice in it."""
    data = encoded(picture(20, 10))
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    assert pixels(intake.open_image(tmp_path / "pipe")).tolist() == pixels(picture(20, 10)).tolist()
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
    monkeypatch.setattr(intake, "MAX_BYTES", 10**6)
    pipe = Endless()
    refused(io.BufferedReader(pipe), "standard input is not a picture", kind=ValueError)
    assert pipe.given < 2 * 10**6


# ----------------------------------------------------------------------------------------------------------------
# What is none is refused in one sentence


@pytest.mark.parametrize("percent", [0, 10, 50, 99])
@pytest.mark.parametrize("kind", [*EXTENSIONS, "progressive JPEG", "lossless WEBP"])
def test_a_file_cut_short_is_refused(tmp_path, kind, percent):
    options = {"progressive JPEG": {"progressive": True}, "lossless WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(picture(64, 48), kind.split()[-1], **options)
    file = tmp_path / "short.img"
    file.write_bytes(data)
    assert intake.open_image(file).size == (64, 48)
    file.write_bytes(data[: len(data) * percent // 100])
    refused(file, str(file), kind=ValueError)
    refused(io.BytesIO(file.read_bytes()), "standard input", kind=ValueError)


AVIF = "avif" in features.modules and features.check("avif")  # from Pillow 11.3 on
VARIANTS = {  # name: (format, mode, options); libtiff's own JPEG decoder is left out, as it writes to stderr by itself
    "progressive JPEG": ("JPEG", "RGB", {"progressive": True}), "lossless WEBP": ("WEBP", "RGB", {"lossless": True}),
    "PNG with opacity": ("PNG", "RGBA", {}), "PNG with a palette": ("PNG", "P", {}),
    "BMP with a palette": ("BMP", "P", {}),
    "TIFF, LZW": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "TIFF, deflate": ("TIFF", "RGB", {"compression": "tiff_deflate"}),
    "grey PPM": ("PPM", "L", {}), "PPM of one bit": ("PPM", "1", {}), "PPM of 16 bits": ("PPM", "I", {}),
    "JPEG of inks": ("JPEG", "CMYK", {}),
    **{f"moving {kind}": (kind, "RGB", {"frames": 2}) for kind in ("GIF", "PNG", "TIFF")},
    **({"AVIF": ("AVIF", "RGB", {})} if AVIF else {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*EXTENSIONS, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)])
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
        whole = intake.open_image(io.BytesIO(data)).tobytes()
        for length in range(len(data)):
            try:
                outcomes.append(intake.open_image(io.BytesIO(data[:length])).tobytes() == whole)
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
                intake.open_image(io.BytesIO(bytes(data)))
        except (ValueError, OSError):
            refused(io.BytesIO(bytes(data)), "standard input", kind=ValueError)
            refusals += 1
    assert refusals


def test_a_text_file_and_an_empty_file_are_refused(tmp_path):
    for name, content in [("notes.png", b"This is not a picture.\n" * 20), ("zeros", bytes(1000))]:
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, f"{tmp_path / name} is not a picture in a known format (PNG, JPEG, ", kind=ValueError)
    (tmp_path / "empty.jpg").touch()
    refused(tmp_path / "empty.jpg", f"{tmp_path / 'empty.jpg'} is empty", "downloaded", kind=ValueError)


def test_a_format_outside_the_list_is_refused(tmp_path):
    for kind, what in [("ICO", "is an icon"), ("TGA", "is not a picture in a known"), ("PCX", "in a known format")]:
        picture(16, 16).save(tmp_path / "picture", kind)
        refused(tmp_path / "picture", what, kind=ValueError)


def test_a_directory_a_missing_file_and_an_address_are_refused(tmp_path):
    refused(tmp_path, f"{tmp_path} is a folder: name the pictures in it")
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
            intake.open_image(address)


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
        image, calls = effort(intake.open_image, tmp_path / "chain.tif")
    assert image.size == (1, 1) and calls < pages  # to look at each would be many calls a page


def test_memory_that_runs_out_is_not_called_a_damaged_picture(tmp_path, monkeypatch):
    (tmp_path / "picture.png").write_bytes(encoded(picture(20, 10)))

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", full)
    with pytest.raises(MemoryError):
        intake.open_image(tmp_path / "picture.png")


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
    image = tried(intake.open_image, io.BytesIO(bytes(content)))
    assert image is None or (image.mode == "RGB" and image.width * image.height <= vision.MAX_PIXELS)


@examples(200)
@given(st.binary(max_size=200), st.sampled_from(["", *EXTENSIONS]))
def test_any_bytes_are_a_picture_or_refused(files, content, kind):
    start = files[kind][: len(content) // 2] if kind else b""
    image = tried(intake.open_image, io.BytesIO(start + content))
    assert image is None or image.mode == "RGB"


# ----------------------------------------------------------------------------------------------------------------
# The state of the process


def state():
    """What a process has once, and threads share."""
    switches = [Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK]
    switches += [torch.backends.mkldnn.enabled, torch.get_default_dtype(), torch.get_num_threads(), dict(os.environ)]
    streams = [id(stream) for stream in (sys.stdin, sys.stdout, sys.stderr, warnings.showwarning, warnings.filters)]
    return [*switches, *streams, list(warnings.filters), signal.getsignal(signal.SIGINT), logging.root.level]


@pytest.mark.parametrize("odd", [False, True], ids=["a sound file", "a file that is read once more"])
def test_nothing_of_the_process_is_changed_while_a_picture_is_opened(monkeypatch, odd):
    """Threads share it: what one puts back, another has put aside."""
    data = png_with(png_chunk(b"tEXt", b"a\0b", checksum=1)) if odd else png_with()
    seen, load = [], PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: seen.append(state()) or load(self))
    before = state()
    intake.open_image(io.BytesIO(data))
    assert seen and [*seen, state()] == [before] * (len(seen) + 1)


def test_threads_that_open_pictures_and_answer_leave_the_process_as_it_was(tmp_path):
    model, processor = llava.load("tiny", device="cpu")
    for name, data in [("sound.png", png_with()), ("odd.png", png_with(png_chunk(b"tEXt", b"a\0b", checksum=1)))]:
        (tmp_path / name).write_bytes(data)
    seen = []
    hooks = [model.llama.register_forward_hook(lambda *_: seen.append(state()))]
    hooks += [model.vision.register_forward_hook(lambda *_: seen.append(state()))]
    before, answers = state(), []

    def work(name):
        for _ in range(10):
            inputs = processor.chat([("user", "What is there?")], [tmp_path / name])
            answers.append(model.generate(**inputs, max_new_tokens=3))

    threads = [threading.Thread(target=work, args=(name,)) for name in ("sound.png", "odd.png")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    for hook in hooks:
        hook.remove()
    assert len(answers) == 20 and len(seen) > 20
    assert [*seen, state()] == [before] * (len(seen) + 1)


# ----------------------------------------------------------------------------------------------------------------
# What is not the picture costs no picture

BIG = zlib.compress(b"a" * 3_000_000)
XMP = b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='6' tiff:Orientation=\"6\"/>"
ODD = {  # file → (its bytes, whether it says that the picture lies on its side)
    "a JPEG, a resolution unit that is too long": (jpeg_with(exif=exif((0x0128, 4, 1, 70000))), True),
    "a JPEG, a text that begins beyond the end": (jpeg_with(exif=exif((0x010F, 2, 400, 99999))), True),
    "a JPEG, a fraction of which half is missing": (jpeg_with(exif=exif((0x011A, 5, 1, 8))), True),
    "a JPEG, a tag of an unknown type": (jpeg_with(exif=exif((0x0131, 99, 1, 5))), True),
    "a JPEG, a place on earth that is nowhere": (jpeg_with(exif=exif((0x8825, 4, 1, 0x7FFFFFFF))), True),
    "a JPEG, text where a number should be": (jpeg_with(exif=exif((0x011A, 2, 4, 0x61616161))), True),
    "a JPEG, tags cut short": (jpeg_with(exif=exif()[:20]), False),
    "a JPEG, an orientation that is none": (jpeg_with(exif=exif(turn=9)), False),
    "a JPEG, tags that are none": (jpeg_with((0xE1, b"Exif\0\0garbage")), False),
    "a JPEG, a broken list of pictures": (jpeg_with((0xE2, b"MPF\0II*\0\x08\0\0\0\x05\0" + b"\xb0\xff" * 40)), False),
    "a JPEG, a broken profile": (jpeg_with((0xE2, b"ICC_PROFILE\0\x05\x02" + b"x" * 99)), False),
    "a JPEG, Photoshop's block broken": (jpeg_with((0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\xff" + b"x" * 9)), False),
    "a PNG, a large text": (png_with(png_chunk(b"zTXt", b"x\0\0" + BIG)), False),
    "a PNG, a large text behind the pixels": (png_with(behind=[png_chunk(b"zTXt", b"x\0\0" + BIG)]), False),
    "a PNG, a large international text": (png_with(png_chunk(b"iTXt", b"x\0\1\0\0\0" + BIG)), False),
    "a PNG, a large profile": (png_with(png_chunk(b"iCCP", b"x\0\0" + BIG)), False),
    "a PNG, many texts": (
        png_with(*[png_chunk(b"zTXt", b"x%d\0\0" % i + zlib.compress(b"a" * 1_000_000)) for i in range(70)]), False),
    "a PNG, a wrong checksum of a text": (png_with(png_chunk(b"tEXt", b"a\0b", checksum=1)), False),
    "a PNG, a wrong checksum of its time": (png_with(png_chunk(b"tIME", bytes(7), checksum=1)), False),
    "a PNG, a wrong checksum of its tags": (png_with(png_chunk(b"eXIf", exif()[6:], checksum=1)), True),
    "a PNG, tags that are odd": (png_with(png_chunk(b"eXIf", exif((0x0128, 4, 1, 70000))[6:])), True),
    "a PNG, tags, and a large text": (
        png_with(png_chunk(b"eXIf", exif()[6:]), png_chunk(b"zTXt", b"x\0\0" + BIG)), True),
    "a PNG, XMP that turns it, and a large text": (
        png_with(png_chunk(b"iTXt", XMP), png_chunk(b"zTXt", b"x\0\0" + BIG)), True),
    "a PNG, a large XMP": (png_with(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BIG)), False),
    "a PNG, a number of frames of the wrong length": (png_with(png_chunk(b"acTL", b"\0\0\0")), False),
    "a PNG, a density of the wrong length": (png_with(png_chunk(b"pHYs", b"\0\0")), False),
    "a PNG, a gamma of the wrong length": (png_with(png_chunk(b"gAMA", b"\0")), False),
    "a WEBP, a resolution unit that is too long": (
        encoded(picture(40, 20), "WEBP", lossless=True, exif=exif((0x0128, 4, 1, 70000))[6:]), True),
    "a TIFF, a resolution of an unknown type": (tiff(40, 20, (274, 3, 1, 6), (282, 99, 1, 5)), True),
    "a TIFF, numbers that begin beyond the end": (tiff(40, 20, (274, 3, 1, 6), (269, 9, 100, 99999)), True),
    "a TIFF, a directory of tags beyond the end": (tiff(40, 20, (274, 3, 1, 6), (34853, 6, 3, 2**32 - 1)), True),
    "a TIFF, XMP that is no text": (tiff(40, 20, (274, 3, 1, 6), (700, 10, 5, 1)), True),
    "a WEBP, tags that are none": (encoded(picture(40, 20), "WEBP", lossless=True, exif=b"x" * 30), False),
    "a TIFF, XMP that is no text, and no orientation": (tiff(40, 20, (700, 2, 3, 8)), False),
    "a TIFF of a Macintosh, a text without an end": (
        tiff(40, 20, (274, 3, 1, 6), (305, 2, 10**6, 8), order=">"), True),
}  # fmt: skip
SOUND = {"JPEG": jpeg_with(), "PNG": png_with(), "WEBP": png_with(), "TIFF": tiff(40, 20)}


@pytest.mark.parametrize("file", ODD)
@pytest.mark.filterwarnings("ignore:::PIL")
def test_what_is_not_the_picture_may_be_broken(file):
    """The pixels are those of the sound file, upright wherever that can be read."""
    data, turned = ODD[file]
    expected = pixels(Image.open(io.BytesIO(SOUND[file.split(",")[0].split()[1]])).convert("RGB"))
    found = pixels(intake.open_image(io.BytesIO(data)))
    assert (found == (np.rot90(expected, -1) if turned else expected)).all()


FAR = exif((0x010F, 2, 400, 99999))  # a text that begins beyond the end
LIES = {  # files that lie on their side, of whose tags Pillow warns
    "JPEG": jpeg_with(exif=FAR),
    "JPEG, the broken tag in front": jpeg_with(exif=FAR[:16] + FAR[28:40] + FAR[16:28] + FAR[40:]),
    "JPEG, cut behind the orientation": jpeg_with(exif=FAR[:35]),
    "PNG": png_with(png_chunk(b"eXIf", FAR[6:])),
    "PNG, tags behind the pixels": png_with(behind=[png_chunk(b"eXIf", FAR[6:])]),
    "WEBP": encoded(picture(40, 20), "WEBP", lossless=True, exif=FAR[6:]),
    "TIFF": tiff(40, 20, (274, 3, 1, 6), (271, 2, 400, 99999)),
}  # fmt: skip


@pytest.mark.parametrize("action", ["ignore", "error"])
@pytest.mark.parametrize("file", LIES)
def test_which_way_is_up_does_not_depend_on_the_filters_of_warnings(file, action):
    """As python -W error sets them; transformers' load_image turns them all where warnings are none."""
    from transformers.image_utils import load_image

    with warnings.catch_warnings():
        warnings.simplefilter(action)
        assert intake.open_image(io.BytesIO(LIES[file])).size == (20, 40)
        if action == "ignore" and file != "TIFF":  # that one Pillow cannot open with the broken tag in it
            assert load_image(Image.open(io.BytesIO(LIES[file]))).size == (20, 40)


@pytest.mark.parametrize("file", [file for file, (_, turned) in ODD.items() if turned])
def test_what_is_odd_is_turned_though_warnings_are_errors(file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test_what_is_not_the_picture_may_be_broken(file)


@pytest.mark.parametrize("name", [b"IHDR", b"tRNS", b"PLTE"])
def test_a_wrong_checksum_of_the_picture_itself_is_refused(name):
    data = bytearray(encoded(picture(40, 20).quantize(16), transparency=3))
    at = data.index(name)
    end = at + 4 + struct.unpack(">I", data[at - 4 : at])[0]
    data[end : end + 4] = bytes(4)
    refused(io.BytesIO(bytes(data)), "standard input cannot be read as a picture", kind=ValueError)


def test_a_moving_png_that_is_read_once_more_is_still_one_of_several(tmp_path):
    data = encoded(picture(40, 20), save_all=True, append_images=[picture(40, 20, seed=1)])
    odd = data[:33] + png_chunk(b"tEXt", b"a\0b", checksum=1) + data[33:]
    with pytest.warns(UserWarning, match="several pictures"):
        assert (pixels(intake.open_image(io.BytesIO(odd))) == pixels(picture(40, 20))).all()


# ----------------------------------------------------------------------------------------------------------------
# Previews

DNG, NEF = (50706, 1, 4, b"\1\4\0\0"), (254, 4, 1, 1)
RAW = {
    "DNG": tiff(16, 12, NEF, DNG, inside=(64, 48)),
    "DNG without a flag": tiff(16, 12, DNG),
    "NEF": tiff(16, 12, NEF, inside=(64, 48), order=">"),
    "NEF with a smaller one inside": tiff(16, 12, NEF, inside=(8, 6), order=">"),
    "ARW without a flag": tiff(16, 12, inside=(64, 48)),
    "CR2": tiff(16, 12, magic=b"CR\2\0"),
    "DNG with an odd tag": tiff(16, 12, NEF, DNG, (282, 99, 1, 5)),
}


@pytest.mark.parametrize("file", RAW)
def test_the_preview_in_a_raw_file_is_not_taken_for_the_picture(file):
    refused(io.BytesIO(RAW[file]), "standard input is a camera's raw file", "preview of 16 x 12 pixels", "save it as")


@pytest.mark.parametrize("tags", [[(254, 4, 1, 1)], [(255, 3, 1, 2)], [(254, 4, 1, 5)]], ids=str)
def test_a_reduced_picture_is_said_to_be_one(tags):
    with pytest.warns(UserWarning, match="begins with a reduced picture of 16 x 12 pixels") as said:
        opened = intake.open_image(io.BytesIO(tiff(16, 12, *tags)))
    assert len(said) == 1 and said[0].filename == __file__
    assert (pixels(opened)[..., 0] == pixels(picture(16, 12, "L"))).all()


@pytest.mark.parametrize("tags, inside", [([], (16, 12)), ([], (8, 6)), ([(254, 4, 1, 0)], None), ([(254, 4, 1, 2)],
    (8, 6)), ([(254, 2, 4, 0x61616161)], None), ([(330, 4, 1, 10**9)], None), ([(330, 2, 4, 0x61616161)], None)],
    ids=str)  # fmt: skip
def test_a_whole_picture_is_taken_without_a_word(tags, inside):
    """Though it holds smaller ones, or flags that say something else or nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = intake.open_image(io.BytesIO(tiff(16, 12, *tags, inside=inside)))
    assert (pixels(opened)[..., 0] == pixels(picture(16, 12, "L"))).all()


# ----------------------------------------------------------------------------------------------------------------
# A fourth channel that means nothing


def blue_green_red(alpha):
    """(4, 6, 4) bytes as a BMP stores them, all of them (200, 100, 50)."""
    colours = np.empty((4, 6, 4), np.uint8)
    colours[..., :3], colours[..., 3] = (50, 100, 200), alpha
    return colours


MEANINGLESS = {
    "BMP of version 4": bmp(blue_green_red(0)),
    "BMP of version 5": bmp(blue_green_red(0), header=124),
    "BMP of version 4, no mask of alpha": bmp(blue_green_red(0), masks=(0xFF0000, 0xFF00, 0xFF, 0)),
    "BMP of version 4, another order": bmp(
        blue_green_red(0)[..., [2, 1, 0, 3]], masks=(0xFF, 0xFF00, 0xFF0000, 0xFF000000)
    ),
}


@pytest.mark.parametrize("file", MEANINGLESS)
def test_a_bmp_whose_alpha_is_nought_everywhere_has_its_colours(tmp_path, file):
    """As Windows shows it, and the reference."""
    (tmp_path / "x.bmp").write_bytes(MEANINGLESS[file])
    opened = intake.open_image(tmp_path / "x.bmp")
    assert opened.mode == "RGB" and (pixels(opened) == (200, 100, 50)).all()
    assert opened.tobytes() == load_image(str(tmp_path / "x.bmp")).tobytes()


def test_a_tiff_that_does_not_say_what_its_fourth_channel_is_has_its_colours(tmp_path):
    image = Image.new("RGBA", (6, 4), (200, 100, 50, 0))
    image.save(tmp_path / "x.tif", tiffinfo={274: 6})
    said = bytearray((tmp_path / "x.tif").read_bytes())
    assert (pixels(intake.open_image(io.BytesIO(bytes(said)))) == 255).all()  # it says that it is opacity
    at = said.index(struct.pack("<HHI", 338, 3, 1))
    said[at : at + 2] = struct.pack("<H", 340)  # no longer
    opened = intake.open_image(io.BytesIO(bytes(said)))
    assert opened.size == (4, 6) and (pixels(opened) == (200, 100, 50)).all()


def test_opacity_that_means_something_stays():
    alpha = np.zeros((4, 6), np.uint8)
    alpha[2, 3] = 255
    shown = pixels(intake.open_image(io.BytesIO(bmp(blue_green_red(alpha)))))
    assert (shown[2, 3] == (200, 100, 50)).all() and (shown.sum(-1) == 765).sum() == 23
    clear = Image.new("RGBA", (6, 4), (200, 100, 50, 0))
    for kind in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        assert (pixels(intake.open_image(io.BytesIO(encoded(clear, kind, **options)))) == 255).all()


def test_a_transparent_file_is_white_where_the_reference_shows_hidden_colours(tmp_path):
    """As a PIL image the same picture is white there, too."""
    Image.new("RGBA", (6, 4), (200, 100, 50, 0)).save(tmp_path / "x.png")
    assert load_image(str(tmp_path / "x.png")).getpixel((0, 0)) == (200, 100, 50)
    assert intake.open_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)


# ----------------------------------------------------------------------------------------------------------------
# Other formats

needs_avif = pytest.mark.skipif(not AVIF, reason="this Pillow reads no AVIF")


@needs_avif
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_avif_is_read_as_the_reference_reads_it(tmp_path, turn):
    picture(40, 20).save(tmp_path / "x.avif", exif=exif(turn=turn)[6:])
    opened, expected = intake.open_image(tmp_path / "x.avif"), load_image(str(tmp_path / "x.avif"))
    assert opened.size == ((20, 40) if turn in (6, 8) else (40, 20))
    assert opened.tobytes() == expected.tobytes()


@needs_avif
def test_avif_with_an_odd_tag_is_turned_as_without():
    """The way up stands in a box of the file; Pillow puts it among the tags, and fails over the odd one."""
    sound = encoded(picture(40, 20), "AVIF", exif=exif((0x0128, 3, 1, 2))[6:])
    odd = sound.replace(struct.pack("<HHII", 0x0128, 3, 1, 2), struct.pack("<HHII", 0x0128, 4, 1, 70000))
    assert odd != sound
    found = [intake.open_image(io.BytesIO(data)) for data in (sound, odd)]
    assert found[0].size == (20, 40) and found[0].tobytes() == found[1].tobytes()


def box(kind, content):
    return struct.pack(">I", 8 + len(content)) + kind + content


NONE = {  # file → (its beginning, what is said of it)
    "HEIC": (box(b"ftyp", b"heic\0\0\0\0mif1heic") + bytes(99), ["HEIC", "iPhones", "as PNG or JPEG"]),
    "HEIC of another brand": (box(b"ftyp", b"mif1\0\0\0\0mif1heic") + bytes(99), ["HEIC"]),
    "a film": (box(b"ftyp", b"isom\0\0\2\0isomiso2mp41") + bytes(99), ["is a film", "the frame"]),
    "a film of QuickTime": (box(b"ftyp", b"qt  \0\0\2\0qt  ") + bytes(99), ["is a film"]),
    "a film of Matroska": (b"\x1aE\xdf\xa3\x01\0\0\0\0\0\0\x1fB\x86\x81\x01", ["is a film"]),
    "an old film": (b"RIFF\0\1\0\0AVI LIST", ["is a film"]),
    "CR3": (box(b"ftyp", b"crx \0\0\0\1crx isom") + bytes(99), ["raw file"]),
    "RAF": (b"FUJIFILMCCD-RAW 0201FF", ["raw file"]),
    "ORF": (b"IIRO\x08\0\0\0" + bytes(99), ["raw file"]),
    "a TIFF of raw colours": (tiff(16, 12, order=">").replace(struct.pack(">HHIH", 262, 3, 1, 1),
                              struct.pack(">HHIH", 262, 3, 1, 32803)), ["TIFF", "raw file", "as PNG or JPEG"]),
    "SVG": (b'\xef\xbb\xbf\n<svg xmlns="http://www.w3.org/2000/svg"/>', ["SVG", "as PNG or JPEG"]),
    "SVG with a head": (b'<?xml version="1.0"?>\n<!-- x -->\n<svg/>', ["SVG"]),
    "a page": (b"\n<!DOCTYPE html>\n<title>403 Forbidden</title>", ["is a web page", "save the picture on it"]),
    "a page of XML": (b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml">', ["is a web page"]),
    "a page with a note": (b"<!-- saved --><html><svg/></html>", ["is a web page"]),
    "a PDF": (b"%PDF-1.7\n%\xe2\xe3", ["is a PDF", "the page"]),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", ["Git LFS", "git lfs pull"]),
    "a Photoshop file": (b"8BPS\0\1" + bytes(99), ["Photoshop"]),
    "JPEG XL": (b"\xff\x0a\xfa\x1f", ["JPEG XL"]),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", ["JPEG 2000"]),
    "an archive": (b"PK\3\4" + bytes(30), ["archive", "unpack"]),
    "the beginning of a PNG": (b"\x89PNG\r\n\x1a\n\0\0", ["damaged or cut short"]),
    "the beginning of a WEBP": (b"RIFF\0\1\0\0WEBPVP", ["cannot be read as a picture"]),
}  # fmt: skip


@pytest.mark.parametrize("file", NONE)
def test_what_is_no_picture_is_called_by_its_name(tmp_path, file):
    content, words = NONE[file]
    (tmp_path / "cat.jpg").write_bytes(content)
    said = refused(tmp_path / "cat.jpg", f"{tmp_path / 'cat.jpg'} ", *words, kind=ValueError)
    assert "known format" not in said


def test_avif_without_a_reader_says_what_to_install(monkeypatch):
    data = box(b"ftyp", b"avif\0\0\0\0avifmif1") + bytes(99)
    monkeypatch.setattr(intake, "FORMATS", ["PNG", "JPEG"])
    refused(io.BytesIO(data), "is an AVIF picture", "from version 11.3 on", "pip install --upgrade pillow")
    monkeypatch.setattr(intake, "FORMATS", ["PNG", "AVIF"])
    refused(io.BytesIO(data), "the file is damaged")


def test_a_name_that_no_file_can_have_is_one_of_no_picture(tmp_path):
    (tmp_path / "file").touch()
    for name in (tmp_path / ("x" * 5000), tmp_path / "file" / "x.png"):
        refused(name, "no such picture", kind=FileNotFoundError)
