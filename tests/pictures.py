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
