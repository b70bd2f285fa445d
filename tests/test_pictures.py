"""From a file to pixel values: bit for bit as transformers, and one clear sentence for what is not a picture."""

import io
import os
import random
import re
import socket
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch
from effort import effort
from PIL import Image, PngImagePlugin
from reference import EDGE, IMAGE, TINY
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil
from transformers.image_utils import load_image

import llama
import llava
import vision

PUBLISHED = 336
SIZES = [
    (1, 1), (2, 2), (3, 3), (3, 1000), (800, 7), (7, 5), (16, 24), (101, 78), (335, 336), (336, 335), (336, 336), (336, 337),
    (337, 336), (338, 341), (427, 640), (640, 427), (640, 428), (801, 800), (1200, 500),
]  # fmt: skip
LONG = [(1, 1000), (1000, 1), (1, 77), (78, 1)]
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


def squared(image):
    """The authors' expand2square, independently of ours: a square in the mean colour, the picture in its middle."""
    pixels, side = np.asarray(image.convert("RGB")), max(image.size)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = (122, 116, 104)
    top, left = (side - image.height) // 2, (side - image.width) // 2
    square[top : top + image.height, left : left + image.width] = pixels
    return Image.fromarray(square)


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
            vision.open_image(file)
    text = str(caught.value)
    assert "\n" not in text and not re.search("0x[0-9a-f]{4}|Traceback|object at|errno", text, re.I), text
    for word in words:
        assert word in text, text
    return text


# ----------------------------------------------------------------------------------------------------------------
# Bit for bit


def test_default_preprocessing_has_the_published_numbers():
    config = vision.PreprocessConfig()
    assert config.size == {"shortest_edge": 336}
    assert config.crop_size == {"height": 336, "width": 336}
    assert config.resample == 3 == Image.Resampling.BICUBIC
    assert config.rescale_factor == 0.00392156862745098
    assert config.image_mean == [0.48145466, 0.4578275, 0.40821073]
    assert config.image_std == [0.26862954, 0.26130258, 0.27577711]
    assert config.do_pad is False


@pytest.mark.parametrize("edge", [EDGE, PUBLISHED])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size_equals_the_reference(size, edge):
    image, config = picture(*size), preprocess_config(edge)
    before = image.tobytes()
    found = vision.preprocess(image, config)
    assert found.dtype == torch.float32 and found.shape == (3, edge, edge) and found.is_contiguous()
    assert torch.equal(found, reference_pixels(image, config))
    assert image.tobytes() == before


@pytest.mark.parametrize("size", LONG, ids=str)
def test_one_pixel_wide_equals_the_reference(size):
    image, config = picture(*size), preprocess_config()
    assert torch.equal(vision.preprocess(image, config), reference_pixels(image, config))


@pytest.mark.parametrize("size, middle", [((1, 1000), (0, 490, 1, 510)), ((20000, 30), (9900, 0, 10100, 30))], ids=str)
def test_one_pixel_wide_at_the_published_size(size, middle):
    """The middle square of 1 x 1000 is that of its middle 1 x 20; the reference itself takes gigabytes for the whole."""
    image, config = picture(*size), preprocess_config(PUBLISHED)
    assert torch.equal(vision.preprocess(image, config), reference_pixels(image.crop(middle), config))


@pytest.mark.parametrize("edge, crop", [(40, 28), (41, 28), (28, 27), (20, 28), (21, 28)])
@pytest.mark.parametrize("size", [(50, 37), (37, 50), (33, 33)], ids=str)
def test_a_crop_of_another_size_than_the_short_side_equals_the_reference(size, edge, crop):
    image, config = picture(*size), preprocess_config(edge, crop)
    assert torch.equal(vision.preprocess(image, config), reference_pixels(image, config))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size, edge", [((61, 44), EDGE), ((20, 27), EDGE), ((403, 350), PUBLISHED)], ids=str)
def test_any_mode_equals_the_reference(mode, size, edge):
    image, config = picture(*size, mode), preprocess_config(edge)
    assert image.mode == mode.split()[0]
    found = vision.preprocess(image, config)
    assert torch.equal(found, reference_pixels(image, config))
    assert found.std() > 0.1


@pytest.mark.parametrize("resample", Image.Resampling)
def test_another_filter_in_the_config_is_followed(resample):
    image, config = picture(61, 44), preprocess_config()
    config.resample = int(resample)
    assert torch.equal(vision.preprocess(image, config), reference_pixels(image, config, resample=resample))


def test_another_mean_std_and_factor_in_the_config_are_followed():
    image, config = picture(61, 44), preprocess_config()
    config.image_mean, config.image_std, config.rescale_factor = [0.1, 0.5, 0.7], [0.3, 0.5, 0.9], 1 / 127.5
    changes = {"image_mean": config.image_mean, "image_std": config.image_std, "rescale_factor": config.rescale_factor}
    assert torch.equal(vision.preprocess(image, config), reference_pixels(image, config, **changes))


@pytest.mark.parametrize("edge", [EDGE, PUBLISHED])
@pytest.mark.parametrize("size", [size for size in SIZES if max(size) < 900] + LONG, ids=str)
def test_padding_equals_expand2square_and_the_reference(size, edge):
    image, config = picture(*size), preprocess_config(edge)
    found = vision.preprocess(image, config, pad=True)
    assert torch.equal(found, reference_pixels(squared(image), config))
    assert torch.equal(found, reference_pixels(image, config, LlavaImageProcessorPil, do_pad=True))


@pytest.mark.parametrize("mode", ["L", "LA", "P bytes", "RGBA", "CMYK"])
def test_padding_any_mode_equals_the_reference(mode):
    image, config = picture(61, 44, mode), preprocess_config()
    expected = reference_pixels(image, config, LlavaImageProcessorPil, do_pad=True)
    assert torch.equal(vision.preprocess(image, config, pad=True), expected)


def test_pad_none_means_what_the_config_says():
    image, config = picture(61, 44), preprocess_config()
    cropped, padded = (vision.preprocess(image, config, pad) for pad in (False, True))
    assert not torch.equal(cropped, padded)
    assert torch.equal(vision.preprocess(image, config), cropped)
    config.do_pad = True
    assert torch.equal(vision.preprocess(image, config), padded)
    assert torch.equal(vision.preprocess(image, config, pad=False), cropped)


def test_real_pictures_equal_the_reference(data):
    files = sorted((data / "images").iterdir())
    assert files
    for file in files:
        image, expected = vision.open_image(file), load_image(str(file))
        assert image.tobytes() == expected.tobytes()
        for edge in (EDGE, PUBLISHED):
            config = preprocess_config(edge)
            assert torch.equal(vision.preprocess(image, config), reference_pixels(expected, config))
            padded = reference_pixels(expected, config, LlavaImageProcessorPil, do_pad=True)
            assert torch.equal(vision.preprocess(image, config, pad=True), padded)


# ----------------------------------------------------------------------------------------------------------------
# Upright


STORED = {  # EXIF orientation → how a picture is stored: where its first row and its first column are seen
    1: lambda seen: seen,  # top, left
    2: np.fliplr,  # top, right
    3: lambda seen: seen[::-1, ::-1],  # bottom, right
    4: np.flipud,  # bottom, left
    5: lambda seen: seen.swapaxes(0, 1),  # left, top
    6: lambda seen: seen[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda seen: seen[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda seen: seen[::-1].swapaxes(0, 1),  # left, bottom
}


def turned(image, orientation):
    """A picture as a camera stores it, and the EXIF tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(image)))), exif


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_file_is_turned_upright(tmp_path, orientation, kind):
    seen = picture(24, 16) if kind != "JPEG" else picture(24, 16).resize((96, 64))  # smooth: JPEG is lossy
    stored, exif = turned(seen, orientation)
    file = tmp_path / f"turned.{EXTENSIONS[kind]}"
    stored.save(file, **{"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {}), exif=exif)
    for opened in (vision.open_image(file), vision.open_image(str(file)), vision.open_image(io.BytesIO(file.read_bytes()))):
        assert opened.mode == "RGB" and opened.size == seen.size
        assert np.abs(pixels(opened) - pixels(seen)).max() <= (8 if kind == "JPEG" else 0)
    assert vision.open_image(file).tobytes() == load_image(str(file)).tobytes()


def test_the_eight_orientations_differ():
    assert len({turned(picture(16, 16), orientation)[0].tobytes() for orientation in STORED}) == 8


def test_a_pil_image_is_taken_as_it_is_and_a_path_is_turned(tmp_path):
    stored, exif = turned(picture(24, 16), 6)
    stored.save(tmp_path / "turned.png", exif=exif)
    config = llava.LlavaConfig(image_token_index=IMAGE)
    processor = llava.Processor(llama.Tokenizer(TINY / "tokenizer.json"), preprocess_config(), config)
    upright, sideways = (reference_pixels(image, preprocess_config()) for image in (picture(24, 16), stored))
    with Image.open(tmp_path / "turned.png") as opened:
        for image, expected in [(opened, sideways), (tmp_path / "turned.png", upright), (str(tmp_path / "turned.png"), upright)]:
            assert torch.equal(processor("<image>\nWhat?", image)["pixel_values"], expected[None])
            assert torch.equal(processor.chat([("user", "What?")], [image])["pixel_values"], expected[None])
        both = processor("<image><image>", [opened, str(tmp_path / "turned.png")])["pixel_values"]
        assert torch.equal(both, torch.stack([sideways, upright]))
    padded = processor("<image>", tmp_path / "turned.png", pad=True)["pixel_values"]
    assert torch.equal(padded[0], reference_pixels(squared(picture(24, 16)), preprocess_config()))


# ----------------------------------------------------------------------------------------------------------------
# Transparent


def with_hidden_colours(mode, seed):
    """Left half clear, over colours that nobody is to see; right half opaque and always the same."""
    image = picture(20, 10, "L" if mode == "LA" else "RGB", seed=0)
    image.paste(picture(10, 10, image.mode, seed=seed), (0, 0))
    alpha = Image.new("L", (20, 10), 255)
    alpha.paste(0, (0, 0, 10, 10))
    image.putalpha(alpha)
    return image


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_colours_under_full_transparency_are_white(mode, kind):
    results = []
    for seed in (1, 2):
        image = with_hidden_colours(mode, seed)
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        opened = vision.open_image(io.BytesIO(encoded(image, kind, **options)))
        assert (pixels(opened)[:, :10] == 255).all()
        assert (pixels(opened)[:, 10:] == pixels(image.convert("RGB"))[:, 10:]).all()
        results += [opened.tobytes(), vision.to_rgb(image).tobytes()]
    assert len(set(results)) == 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_one_transparent_colour_is_white(mode):
    """The tRNS chunk of a PNG: a colour of the palette, a grey, or an RGB colour, that is not to be seen."""
    image = picture(20, 10).quantize(8) if mode == "P" else picture(20, 10, mode)
    clear = image.getpixel((4, 3))
    hidden = np.asarray(image) == clear if mode != "RGB" else (np.asarray(image) == clear).all(-1)
    opened = vision.open_image(io.BytesIO(encoded(image, transparency=clear)))
    expected = pixels(image.convert("RGB"))
    assert hidden.any() and not hidden.all() and (expected[hidden] != 255).any()
    expected[hidden] = 255
    assert (pixels(opened) == expected).all()


def test_a_palette_with_an_opacity_for_each_colour_is_laid_on_white():
    image = picture(20, 10).quantize(4)
    opened = vision.open_image(io.BytesIO(encoded(image, transparency=bytes([0, 64, 128, 255]))))
    opacity = np.array([0, 64, 128, 255])[np.asarray(image)][..., None] / 255
    expected = pixels(image.convert("RGB")) * opacity + 255 * (1 - opacity)
    assert np.abs(pixels(opened) - expected).max() <= 1


def test_the_transparent_part_of_a_gif_is_white():
    image = picture(20, 10).quantize(8)
    opened = vision.open_image(io.BytesIO(encoded(image, "GIF", transparency=image.getpixel((4, 3)))))
    assert opened.getpixel((4, 3)) == (255, 255, 255)
    hidden = np.asarray(image) == image.getpixel((4, 3))
    assert (pixels(opened)[~hidden] == pixels(image.convert("RGB"))[~hidden]).all()


def test_half_transparent_black_is_grey():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert vision.to_rgb(image).getpixel((0, 0)) == (127, 127, 127)


# ----------------------------------------------------------------------------------------------------------------
# 16 bits of grey


def grey(values, mode):
    """uint16 values (H, W) as a picture of this mode."""
    if mode in ("I;16", "I;16B"):
        return Image.frombytes(mode, values.shape[::-1], values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    return Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_sixteen_bit_grey_is_scaled(mode):
    levels = np.arange(256).reshape(16, 16)
    image = grey(levels.astype(np.uint16) * 257, mode)
    assert image.mode == mode
    rgb = vision.to_rgb(image)
    assert rgb.mode == "RGB" and (pixels(rgb) == levels[..., None]).all()

    ramp = grey(np.arange(65536, dtype=np.uint16).reshape(256, 256), mode)
    shown = pixels(vision.to_rgb(ramp))
    assert (shown[..., 0] == shown[..., 1]).all() and (shown[..., 0] == shown[..., 2]).all()
    shown = shown[..., 0].ravel()
    assert (np.diff(shown) >= 0).all() and shown[0] == 0 and shown[-1] == 255 and len(set(shown)) == 256
    assert np.abs(shown - np.arange(65536) / 257).max() <= 0.5

    found, config = vision.preprocess(ramp, preprocess_config()), preprocess_config()
    assert torch.equal(found, reference_pixels(Image.fromarray(shown.reshape(256, 256).astype(np.uint8)), config))
    cut_off = reference_pixels(ramp, config)  # the reference cuts it off at 255: on purpose not followed
    assert not torch.equal(found, cut_off) and (cut_off == cut_off.amax((1, 2), keepdim=True)).float().mean() > 0.9


@pytest.mark.parametrize("kind, mode", [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("PPM", "I"), ("TIFF", "F")])
def test_a_sixteen_bit_file_is_scaled(kind, mode):
    levels = np.arange(256).reshape(16, 16)
    opened = vision.open_image(io.BytesIO(encoded(grey(levels.astype(np.uint16) * 257, mode), kind)))
    assert (pixels(opened) == levels[..., None]).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_a_dark_sixteen_bit_picture_stays_dark(mode):
    assert pixels(vision.to_rgb(grey(np.arange(256, dtype=np.uint16).reshape(16, 16), mode))).max() == 1


def test_the_transparent_grey_of_a_sixteen_bit_png_is_white():
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    data = encoded(grey(levels, "I;16"))
    clear = b"tRNS" + struct.pack(">H", 70 * 257)
    at = data.index(b"IDAT") - 4
    data = data[:at] + struct.pack(">I", 2) + clear + struct.pack(">I", zlib.crc32(clear)) + data[at:]
    shown = pixels(vision.open_image(io.BytesIO(data)))[..., 0]
    assert shown[4, 6] == 255 and (np.delete(shown.ravel(), 70) == np.delete(np.arange(256), 70)).all()


def test_numbers_that_are_none_are_black():
    image = Image.fromarray(np.array([[np.nan, 0], [128 * 257, -9]], dtype=np.float32))
    assert pixels(vision.to_rgb(image))[..., 0].tolist() == [[0, 0], [128, 0]]


# ----------------------------------------------------------------------------------------------------------------
# Files of all kinds


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_used_and_said_so(tmp_path, kind):
    frames = [picture(20, 10, seed=seed).quantize(16).convert("RGB") for seed in range(3)]
    file = tmp_path / f"frames.{EXTENSIONS[kind]}"
    frames[0].save(file, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    with pytest.warns(UserWarning, match=r"frames\.\w+ holds several pictures; only the first one is used") as said:
        opened = vision.open_image(file)
    assert len(said) == 1 and said[0].filename == __file__
    assert (pixels(opened) == pixels(frames[0])).all()


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_a_single_picture_is_opened_without_a_word(tmp_path, kind):
    image = picture(20, 10).quantize(16).convert("RGB")
    file = tmp_path / "picture.xyz"  # the name's ending says nothing: the bytes do
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = vision.open_image(file)
    assert opened.mode == "RGB" and opened.size == (20, 10)
    assert kind == "JPEG" or (pixels(opened) == pixels(image)).all()


def test_the_previews_in_a_cameras_file_are_not_mentioned():
    frames = [picture(20, 10, seed=seed) for seed in range(2)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vision.open_image(io.BytesIO(data)).size == (20, 10)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "MPO"])
@pytest.mark.filterwarnings("ignore:.*only the first one is used")
def test_a_file_is_closed_again(tmp_path, monkeypatch, kind):
    picture(20, 10).save(tmp_path / "frames", kind, save_all=True, append_images=[picture(20, 10, seed=1)])
    files, really_open = [], open
    monkeypatch.setattr("builtins.open", lambda *args, **options: files.append(really_open(*args, **options)) or files[-1])
    vision.open_image(tmp_path / "frames")
    monkeypatch.undo()
    assert files and all(file.closed for file in files)


def test_a_cmyk_jpeg_has_its_true_colours(tmp_path):
    y, x = np.mgrid[0:64, 0:96]
    smooth = Image.fromarray(np.stack([x * 2, y * 3, 255 - x - y], axis=-1).astype(np.uint8))
    data = encoded(smooth.convert("CMYK"), "JPEG", quality=100)
    assert b"Adobe" in data and Image.open(io.BytesIO(data)).mode == "CMYK"  # such files hold inverted inks
    opened = vision.open_image(io.BytesIO(data))
    assert np.abs(pixels(opened) - pixels(smooth)).mean() < 2
    (tmp_path / "inks.jpg").write_bytes(data)
    assert opened.tobytes() == load_image(str(tmp_path / "inks.jpg")).tobytes()


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
    expected = vision.open_image(tmp_path / "picture").tobytes()
    assert vision.open_image(io.BytesIO(data)).tobytes() == expected
    assert vision.open_image(io.BufferedReader(Pipe(data))).tobytes() == expected
    with open(tmp_path / "picture", "rb") as file:
        assert vision.open_image(file).tobytes() == expected
        assert not file.closed


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_read(tmp_path):
    """As the shell's <(…) is one: used like any file, though nothing can be read twice in it."""
    data = encoded(picture(20, 10))
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    assert pixels(vision.open_image(tmp_path / "pipe")).tolist() == pixels(picture(20, 10)).tolist()
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
    monkeypatch.setattr(vision, "MAX_BYTES", 10**6)
    pipe = Endless()
    refused(io.BufferedReader(pipe), "standard input is not a picture", kind=ValueError)
    assert pipe.given < 2 * 10**6


# ----------------------------------------------------------------------------------------------------------------
# What is not a picture: one sentence


@pytest.mark.parametrize("percent", [0, 10, 50, 99])
@pytest.mark.parametrize("kind", [*EXTENSIONS, "progressive JPEG", "lossless WEBP"])
def test_a_file_cut_short_is_refused(tmp_path, kind, percent):
    options = {"progressive JPEG": {"progressive": True}, "lossless WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(picture(64, 48), kind.split()[-1], **options)
    file = tmp_path / "short.img"
    file.write_bytes(data)
    assert vision.open_image(file).size == (64, 48)
    file.write_bytes(data[: len(data) * percent // 100])
    refused(file, str(file), kind=ValueError)
    refused(io.BytesIO(file.read_bytes()), "standard input", kind=ValueError)


VARIANTS = {  # name: (format, mode, options); libtiff's own JPEG decoder is left out, as it writes to stderr by itself
    "progressive JPEG": ("JPEG", "RGB", {"progressive": True}), "lossless WEBP": ("WEBP", "RGB", {"lossless": True}),
    "PNG with opacity": ("PNG", "RGBA", {}), "PNG with a palette": ("PNG", "P", {}), "BMP with a palette": ("BMP", "P", {}),
    "TIFF, LZW": ("TIFF", "RGB", {"compression": "tiff_lzw"}), "TIFF, deflate": ("TIFF", "RGB", {"compression": "tiff_deflate"}),
    "grey PPM": ("PPM", "L", {}), "PPM of one bit": ("PPM", "1", {}), "PPM of 16 bits": ("PPM", "I", {}),
    "JPEG of inks": ("JPEG", "CMYK", {}), **{f"moving {kind}": (kind, "RGB", {"frames": 2}) for kind in ("GIF", "PNG", "TIFF")},
}  # fmt: skip


@pytest.mark.parametrize("kind", [*EXTENSIONS, *VARIANTS])
def test_a_file_cut_anywhere_is_refused_or_the_same_picture(kind):
    """Never a picture of which the lower half is grey. PNG, GIF and BMP end with bytes that hold nothing of the picture."""
    form, mode, options = VARIANTS.get(kind, (kind, "RGB", {}))
    if options.get("frames"):
        options = {"save_all": True, "append_images": [picture(17, 12, seed=1)]}
    data = encoded(picture(17, 12, mode), form, **options)
    outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = vision.open_image(io.BytesIO(data)).tobytes()
        for length in range(len(data)):
            try:
                outcomes.append(vision.open_image(io.BytesIO(data[:length])).tobytes() == whole)
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
                vision.open_image(io.BytesIO(bytes(data)))
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
    for address in ("http://localhost/x.png", "https:\\\\localhost\\x.png", "//localhost/x.png", "\\\\localhost\\x.png", "s3://x/y.png"):
        with pytest.raises((ValueError, OSError)):
            vision.open_image(address)


def claimed_png(width, height):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("size", [(60000, 60000), (10000, 9999), (89478486, 1)], ids=str)
def test_a_small_file_that_claims_a_huge_picture_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, size):
    (tmp_path / "bomb.png").write_bytes(claimed_png(*size))
    assert (tmp_path / "bomb.png").stat().st_size < 1000
    refused(tmp_path / "bomb.png", "bomb.png has over 89,478,485 pixels", kind=ValueError)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # some libraries do that
    refused(tmp_path / "bomb.png", "bomb.png has over 89,478,485 pixels", kind=ValueError)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_colours_multiplied_with_their_opacity_land_on_white_too(mode):
    grey = (100,) if mode == "LA" else (100, 100, 100)
    for opacity, expected in ((0, 255), (255, 100), (128, 177)):
        image = Image.new(mode, (2, 2), (*grey, opacity)).convert(mode.replace("A", "a"))
        assert image.mode in ("La", "RGBa")
        assert abs(np.asarray(vision.to_rgb(image)).astype(int) - expected).max() <= 1


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
        image, calls = effort(vision.open_image, tmp_path / "chain.tif")
    assert image.size == (1, 1) and calls < pages  # to look at each would be many calls a page


def test_memory_that_runs_out_is_not_called_a_damaged_picture(tmp_path, monkeypatch):
    (tmp_path / "picture.png").write_bytes(encoded(picture(20, 10)))

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", full)
    with pytest.raises(MemoryError):
        vision.open_image(tmp_path / "picture.png")


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 60000), (0, 5), (5, 0), (0, 0)], ids=str)
def test_a_picture_too_thin_to_be_scaled_is_refused(size):
    with pytest.raises(ValueError, match=f"a picture of {size[0]} x {size[1]} pixels is too thin"):
        vision.preprocess(Image.new("RGB", size), preprocess_config(PUBLISHED))


def test_a_thin_picture_can_be_padded_unless_the_square_is_huge():
    assert vision.preprocess(Image.new("RGB", (1, 2000)), preprocess_config(PUBLISHED), pad=True).shape == (3, 336, 336)
    with pytest.raises(ValueError, match="a picture of 1 x 50000 pixels is too long for a square"):
        vision.preprocess(Image.new("RGB", (1, 50000)), preprocess_config(PUBLISHED), pad=True)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("size", [(90, 60), (61, 128), (75, 75), (301, 97)])
def test_the_way_back_from_a_patch_to_the_photo(size, pad):
    """Whiten a box on a black photo, and it is that patch which turns white, whatever crop or margin lies between."""
    config, grid = vision.PreprocessConfig(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}), 7
    boxes = vision.patch_boxes(*size, grid, config, pad)
    assert boxes.shape == (grid**2, 4)
    seen = 0
    for patch in range(grid**2):
        left, top, right, bottom = boxes[patch]
        if min(left, top) < 0 or right > size[0] or bottom > size[1]:  # partly on the margin
            continue
        photo = Image.new("RGB", size)
        photo.paste((255, 255, 255), tuple(round(edge) for edge in (left, top, right, bottom)))
        light = vision.preprocess(photo, config, pad)[0].unfold(0, 8, 8).unfold(1, 8, 8).mean((2, 3)).flatten()
        if pad:  # the margin is of a middling grey
            outside = (boxes[:, 0] < 0) | (boxes[:, 1] < 0) | (boxes[:, 2] > size[0]) | (boxes[:, 3] > size[1])
            light[torch.from_numpy(outside)] = light.min()
        assert light.argmax() == patch
        seen += 1
    assert seen >= (grid if pad else grid**2)


def test_the_kept_part_and_the_margin_of_the_photo():
    config = vision.PreprocessConfig(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    assert vision.patch_boxes(112, 224, 7, config)[[0, -1]].tolist() == [[0, 56, 16, 72], [96, 152, 112, 168]]
    assert vision.patch_boxes(112, 224, 7, config, pad=True)[[0, -1]].tolist() == [[-56, 0, -24, 32], [136, 192, 168, 224]]
