"""Pictures from outside: used as the person who took them sees them, or refused in one sentence by their right name."""

import io
import os
import random
import socket
import struct
import threading
import warnings

import pytest
from effort import effort
from examples import examples, tried
from hypothesis import given
from hypothesis import strategies as st
from pictures import EXTENSIONS, claimed_png, encoded, picture, pixels, refused
from PIL import Image, PngImagePlugin

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
