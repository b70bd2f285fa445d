"""From a file to pixel values: bit for bit as transformers, and one clear sentence for what is not a picture."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from pictures import EXTENSIONS, MODES, encoded, picture, pixels, preprocess_config, reference_pixels
from PIL import Image
from reference import EDGE, IMAGE, TINY
from transformers import LlavaImageProcessorPil
from transformers.image_utils import load_image

import llava
import vision
from extras import checks, intake

PUBLISHED = 336
SIZES = [
    (1, 1), (2, 2), (3, 3), (3, 1000), (800, 7), (7, 5), (16, 24), (101, 78), (335, 336), (336, 335), (336, 336),
    (336, 337),
    (337, 336), (338, 341), (427, 640), (640, 427), (640, 428), (801, 800), (1200, 500),
]  # fmt: skip
LONG = [(1, 1000), (1000, 1), (1, 77), (78, 1)]


def squared(image):
    """The authors' expand2square, independently of ours: a square in the mean colour, the picture in its middle."""
    pixels, side = np.asarray(image.convert("RGB")), max(image.size)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = (122, 116, 104)
    top, left = (side - image.height) // 2, (side - image.width) // 2
    square[top : top + image.height, left : left + image.width] = pixels
    return Image.fromarray(square)


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


@pytest.mark.slow
@pytest.mark.parametrize("size, middle", [((1, 1000), (0, 490, 1, 510)), ((20000, 30), (9900, 0, 10100, 30))], ids=str)
def test_one_pixel_wide_at_the_published_size(size, middle):
    """The middle square of 1 x 1000 is that of its middle 1 x 20;
    the reference itself takes gigabytes for the whole.
    """
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
        image, expected = intake.open_image(file), load_image(str(file))
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
    stored.save(
        file, **{"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {}), exif=exif
    )
    for opened in (
        intake.open_image(file),
        intake.open_image(str(file)),
        intake.open_image(io.BytesIO(file.read_bytes())),
        vision.open_image(file),
        vision.open_image(io.BytesIO(file.read_bytes())),
    ):
        assert opened.mode == "RGB" and opened.size == seen.size
        assert np.abs(pixels(opened) - pixels(seen)).max() <= (8 if kind == "JPEG" else 0)
    assert intake.open_image(file).tobytes() == load_image(str(file)).tobytes()


def test_the_eight_orientations_differ():
    assert len({turned(picture(16, 16), orientation)[0].tobytes() for orientation in STORED}) == 8


def test_a_pil_image_is_taken_as_it_is_and_a_path_is_turned(tmp_path):
    stored, exif = turned(picture(24, 16), 6)
    stored.save(tmp_path / "turned.png", exif=exif)
    config = llava.LlavaConfig(image_token_index=IMAGE)
    processor = llava.Processor(checks.Tokenizer(TINY / "tokenizer.json"), preprocess_config(), config)
    upright, sideways = (reference_pixels(image, preprocess_config()) for image in (picture(24, 16), stored))
    with Image.open(tmp_path / "turned.png") as opened:
        for image, expected in [
            (opened, sideways),
            (tmp_path / "turned.png", upright),
            (str(tmp_path / "turned.png"), upright),
        ]:
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
        opened = intake.open_image(io.BytesIO(encoded(image, kind, **options)))
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
    opened = intake.open_image(io.BytesIO(encoded(image, transparency=clear)))
    expected = pixels(image.convert("RGB"))
    assert hidden.any() and not hidden.all() and (expected[hidden] != 255).any()
    expected[hidden] = 255
    assert (pixels(opened) == expected).all()


def test_a_palette_with_an_opacity_for_each_colour_is_laid_on_white():
    image = picture(20, 10).quantize(4)
    opened = intake.open_image(io.BytesIO(encoded(image, transparency=bytes([0, 64, 128, 255]))))
    opacity = np.array([0, 64, 128, 255])[np.asarray(image)][..., None] / 255
    expected = pixels(image.convert("RGB")) * opacity + 255 * (1 - opacity)
    assert np.abs(pixels(opened) - expected).max() <= 1


def test_the_transparent_part_of_a_gif_is_white():
    image = picture(20, 10).quantize(8)
    opened = intake.open_image(io.BytesIO(encoded(image, "GIF", transparency=image.getpixel((4, 3)))))
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


@pytest.mark.parametrize(
    "kind, mode", [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("PPM", "I"), ("TIFF", "F")]
)
def test_a_sixteen_bit_file_is_scaled(kind, mode):
    levels = np.arange(256).reshape(16, 16)
    opened = intake.open_image(io.BytesIO(encoded(grey(levels.astype(np.uint16) * 257, mode), kind)))
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
    shown = pixels(intake.open_image(io.BytesIO(data)))[..., 0]
    assert shown[4, 6] == 255 and (np.delete(shown.ravel(), 70) == np.delete(np.arange(256), 70)).all()


def test_numbers_that_are_none_are_black():
    image = Image.fromarray(np.array([[np.nan, 0], [128 * 257, -9]], dtype=np.float32))
    assert pixels(vision.to_rgb(image))[..., 0].tolist() == [[0, 0], [128, 0]]


# ----------------------------------------------------------------------------------------------------------------
# Inks


def test_a_cmyk_jpeg_has_its_true_colours(tmp_path):
    y, x = np.mgrid[0:64, 0:96]
    smooth = Image.fromarray(np.stack([x * 2, y * 3, 255 - x - y], axis=-1).astype(np.uint8))
    data = encoded(smooth.convert("CMYK"), "JPEG", quality=100)
    assert b"Adobe" in data and Image.open(io.BytesIO(data)).mode == "CMYK"  # such files hold inverted inks
    opened = intake.open_image(io.BytesIO(data))
    assert np.abs(pixels(opened) - pixels(smooth)).mean() < 2
    (tmp_path / "inks.jpg").write_bytes(data)
    assert opened.tobytes() == load_image(str(tmp_path / "inks.jpg")).tobytes()


# ----------------------------------------------------------------------------------------------------------------
# Opacity and thin pictures


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_colours_multiplied_with_their_opacity_land_on_white_too(mode):
    grey = (100,) if mode == "LA" else (100, 100, 100)
    for opacity, expected in ((0, 255), (255, 100), (128, 177)):
        image = Image.new(mode, (2, 2), (*grey, opacity)).convert(mode.replace("A", "a"))
        assert image.mode in ("La", "RGBa")
        assert abs(np.asarray(vision.to_rgb(image)).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 60000), (0, 5), (5, 0), (0, 0)], ids=str)
def test_a_picture_too_thin_to_be_scaled_is_refused(size):
    with pytest.raises(ValueError, match=f"a picture of {size[0]} x {size[1]} pixels is too thin"):
        vision.preprocess(Image.new("RGB", size), preprocess_config(PUBLISHED))


def test_a_thin_picture_can_be_padded_unless_the_square_is_huge():
    assert vision.preprocess(Image.new("RGB", (1, 2000)), preprocess_config(PUBLISHED), pad=True).shape == (3, 336, 336)
    with pytest.raises(ValueError, match="a picture of 1 x 50000 pixels is too long for a square"):
        vision.preprocess(Image.new("RGB", (1, 50000)), preprocess_config(PUBLISHED), pad=True)
