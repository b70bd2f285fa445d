"""Pictures for the tests, of every kind, and what transformers makes of them."""

import io
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from reference import EDGE
from transformers import CLIPImageProcessorPil

import vision
from extras import intake

MODES = ["1", "L", "LA", "P", "P int", "P bytes", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"]
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm"}


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(width, height, mode="RGB", seed=0):
    """Slanted gradients under noise: no two places are alike, so that a wrong filter, rounding or offset shows."""
    y, x = np.mgrid[0:height, 0:width]
    slant = np.stack([x * 255 / width, y * 255 / height, (x + 2 * y) % 256], axis=-1)
    rgb = Image.fromarray(((slant + noise(height, width, 3, seed)) / 2).astype(np.uint8))
    alpha = Image.fromarray(noise(height, width, 1, seed + 1)[..., 0])
    if mode in ("LA", "RGBA"):
        rgb = rgb.convert(mode[:-1])
        rgb.putalpha(alpha)
        return rgb
    if mode.startswith("P "):  # a palette with one clear colour, or with an opacity for each
        rgb = rgb.quantize(16)
        rgb.info["transparency"] = 3 if mode == "P int" else bytes(range(0, 256, 16))
        return rgb
    if mode == "PA":
        rgb = rgb.convert("P").convert("PA")
        rgb.putalpha(alpha)
        return rgb
    if mode == "F":
        return Image.fromarray(np.asarray(rgb.convert("L"), dtype=np.float32) * 0.77)
    return rgb.convert("L").convert("I") if mode == "I" else rgb.convert(mode)


def preprocess_config(edge=EDGE, crop=None):
    crop = crop or edge
    return vision.PreprocessConfig(size={"shortest_edge": edge}, crop_size={"height": crop, "width": crop})


def reference_pixels(image, config, kind=CLIPImageProcessorPil, **options):
    processor = kind(size=config.size, crop_size=config.crop_size)
    return processor(image, return_tensors="pt", **options)["pixel_values"][0]


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image):
    return np.asarray(image).astype(int)


def refused(file, *words, kind=(ValueError, OSError)):
    """The one sentence with which a picture is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(kind) as caught:
            intake.open_image(file)
    text = str(caught.value)
    assert "\n" not in text and not re.search("0x[0-9a-f]{4}|Traceback|object at|errno", text, re.I), text
    for word in words:
        assert word in text, text
    return text


def claimed_png(width, height):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def make_picture(file, seed):
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (40 + 5 * seed, 60, 3), dtype=np.uint8)).save(file)
    return str(file)


# ----------------------------------------------------------------------------------------------------------------
# Files made by hand, as no library writes them


def exif(*entries, turn=6):
    """EXIF tags as a camera stores them: the orientation, and entries (tag, type, count, value or offset)."""
    entries = [(0x0112, 3, 1, turn), *entries]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4)


def png_chunk(name, content, checksum=None):
    checksum = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png_with(*chunks, behind=()):
    """A PNG with chunks in front of its pixels and behind them."""
    data = encoded(picture(40, 20))
    end = data.index(b"IEND") - 4
    return data[:33] + b"".join(chunks) + data[33:end] + b"".join(behind) + data[end:]


def jpeg_with(*segments, **options):
    """A JPEG with segments (marker, content) behind its first one."""
    data = encoded(picture(40, 20), "JPEG", **options)
    made = [bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content for marker, content in segments]
    return data[:20] + b"".join(made) + data[20:]


def tiff(width, height, *tags, inside=None, order="<", magic=b""):
    """A grey TIFF. tags: (tag, type, count, value). inside: the size of a picture in a directory inside its first one,
    as cameras store what they saw. magic: what stands behind the header.
    """

    def directory(width, height, pixels, tags):
        tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), *tags]
        tags += [(273, 4, 1, pixels), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, width * height)]
        packed = [struct.pack(f"{order}HHI", *tag[:3]) + value(*tag[1:]) for tag in sorted(tags)]
        return struct.pack(f"{order}H", len(packed)) + b"".join(packed) + bytes(4)

    def value(kind, count, value):
        if isinstance(value, bytes):
            return value.ljust(4, b"\0")
        return struct.pack(f"{order}H2x" if kind == 3 and count == 1 else f"{order}I", value)

    body = magic.ljust(8, b"\0") + picture(width, height, "L").tobytes()
    if inside:
        tags = [*tags, (330, 4, 1, 8 + len(body))]
        body += directory(*inside, 16, [])
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(body)) + body + directory(
        width, height, 16, tags
    )  # fmt: skip


def bmp(pixels, header=108, masks=(0xFF0000, 0xFF00, 0xFF, 0xFF000000)):
    """A BMP of 32 bits with a mask for each channel, as Windows programs write it. pixels (H, W, 4): b, g, r, a."""
    height, width = pixels.shape[:2]
    fields = (header, width, height, 1, 32, 3, pixels.size, 2835, 2835, 0, 0, *masks)
    info = (struct.pack("<IiiHHIIiiIIIIII", *fields) + b"BGRs").ljust(header, b"\0")
    file = struct.pack("<IHHI", 14 + header + pixels.size, 0, 0, 14 + header)
    return b"BM" + file + info + pixels[::-1].tobytes()
