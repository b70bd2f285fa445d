"""A picture from outside: any file that a camera, a phone, a screen or a stranger has written → a PIL image in RGB.

`open_image` stands around vision.open_image. It looks before anything is decoded: at the format, the size, and whether
what Pillow sees is the picture itself or a preview of it. It reads once more, without them, a file whose texts, tags
or colour profile are broken: those are not the picture. What is none is refused by its right name. No switch of Pillow
or of the process is touched, so that threads can open pictures side by side.
"""

import contextlib
import errno
import io
import struct
import warnings
import zlib
from pathlib import Path

from PIL import Image, TiffImagePlugin

import vision

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]  # what cameras, phones and screens write
with contextlib.suppress(ImportError):  # Pillow has it from 11.3 on
    from PIL import AvifImagePlugin

    FORMATS += ["AVIF"] if AvifImagePlugin.SUPPORTED else []
MAX_PIXELS = 89_478_485  # the number from which Pillow warns: a small file with more may be a bomb of gigabytes
MAX_BYTES = 8 * MAX_PIXELS  # four channels of 16 bits: read at most this much from a pipe, which may be endless


class Refusal(ValueError):
    """What is said of a file is complete already; {} in it is the file's name."""


def open_image(file):
    """vision.open_image with its formats limited, its size known before it is decoded, and its errors in plain words.

    file: a path, or a binary file object. Raises FileNotFoundError, or ValueError, with a complete message.
    """
    if not isinstance(file, (str, Path)) and not hasattr(file, "read"):
        raise ValueError(f"a picture is a path, a PIL image or a binary file, not a {type(file).__name__}")
    name = str(file) if isinstance(file, (str, Path)) else "standard input"
    if name.lower().startswith(("http://", "https://")):
        raise ValueError(f"{name} is an address; pictures are read from files: download it first")
    head = b""
    try:
        with contextlib.ExitStack() as opened:
            stream = file if hasattr(file, "read") else opened.enter_context(open(file, "rb"))
            if not stream.seekable():
                stream = io.BytesIO(stream.read(MAX_BYTES))
            start = stream.tell()
            head = stream.read(1024)
            stream.seek(start)
            image, note = decode_somehow(stream, head)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no such picture: {name}") from None
    except IsADirectoryError:
        raise ValueError(f"{name} is a folder: name the pictures in it") from None
    except Refusal as refusal:
        raise ValueError(str(refusal).format(name)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{name} has over {MAX_PIXELS:,} pixels: shrink it first") from None
    except Image.UnidentifiedImageError:
        what = kind(head) or f"is not a picture in a known format ({', '.join(FORMATS)})"
        raise ValueError(f"{name} {what}") from None
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:  # whatever Pillow's decoders trip over: OSError, SyntaxError, struct.error and more
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            raise FileNotFoundError(f"no such picture: {name}") from None
        why = "the file is damaged, cut short or not readable"
        raise ValueError(f"{name} cannot be read as a picture: {why}") from None
    if note:
        warnings.warn(note.format(name), stacklevel=2)
    return image


def decode_somehow(stream, head):
    """decode, of the file as it is, or else without the parts of it that are not the picture."""
    failure = None
    for version in versions(stream, head):
        try:
            return decode(version, head)
        except (Refusal, Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
            raise
        except Exception as error:
            failure = failure or error
    raise failure


def decode(stream, head):
    """A stream that can be read twice → (image in RGB, what has to be said about it, or None)."""
    start, note = stream.tell(), None
    with Image.open(stream, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:  # from the header: nothing has been decoded yet
            raise Image.DecompressionBombError
        if image.format != "MPO" and getattr(image, "is_animated", False):  # an MPO is a phone's JPEG, with previews
            note = "{} holds several pictures; only the first one is used"
        if image.format == "TIFF":
            note = look_for_preview(image, head) or note
        if has_empty_alpha(image):
            forget_tags(image)
            return vision.upright(image).convert("RGB"), note
    stream.seek(start)
    with Image.open(stream, formats=FORMATS) as image:
        image.load()  # a PNG's tags may stand behind its pixels
        forget_tags(image)
        return vision.decode(image), note


def forget_tags(image):
    """Leave of a picture's EXIF tags what says which way is up: Pillow warns of broken ones, and a warning may be an
    error.
    """
    with contextlib.suppress(KeyError, struct.error):
        image.info["exif"] = only_orientation(image.info["exif"])


def only_orientation(exif):
    """EXIF tags, a TIFF in bytes, without all but that of the orientation."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}[tiff[:4]]
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, start)
    entries = (tiff[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12))
    kept = [entry for entry in entries if len(entry) == 12 and struct.unpack_from(order + "H", entry) == (0x0112,)]
    return b"Exif\0\0" + tiff[:4] + struct.pack(order + "IH", 8, len(kept)) + b"".join(kept) + bytes(4)


def has_empty_alpha(image):
    """Whether the fourth channel is 0 everywhere and the format does not say that it means opacity.

    Windows programs write such BMPs, and TIFFs without ExtraSamples may hold anything there. A PNG that is transparent
    everywhere says so, and is white.
    """
    unsaid = image.format == "BMP" or (image.format == "TIFF" and EXTRA_SAMPLES not in image.tag_v2)
    return unsaid and image.mode == "RGBA" and image.getextrema()[3] == (0, 0)


# ----------------------------------------------------------------------------------------------------------------
# A preview in place of the picture

NEW_SUBFILE_TYPE, SUBFILE_TYPE, WIDTH, HEIGHT, SUB_DIRECTORIES, EXTRA_SAMPLES = 254, 255, 256, 257, 330, 338
DNG_VERSION = 50706


def look_for_preview(image, head):
    """Refuse a camera's raw file: a TIFF that begins with a small picture of what the camera saw. Only that is read by
    Pillow, as if it were all. Returns what has to be said of another TIFF that begins with a reduced picture.
    """
    tags, size = image.tag_v2, f"{image.width} x {image.height}"
    flags = tags.get(NEW_SUBFILE_TYPE, 0)
    reduced = bool(isinstance(flags, int) and flags & 1) or tags.get(SUBFILE_TYPE) == 2
    inside = SUB_DIRECTORIES in tags and (reduced or holds_larger(image, head))
    if head[8:10] == b"CR" or DNG_VERSION in tags or inside:  # Canon's, Adobe's, and those of Nikon, Sony, Pentax, …
        raise Refusal(f"{{}} is a camera's raw file; only its preview of {size} pixels can be read: save it as JPEG")
    return f"{{}} begins with a reduced picture of {size} pixels, and only that one is used" if reduced else None


def holds_larger(image, head):
    """Whether one of the directories inside a TIFF's first one describes a picture with more pixels."""
    offsets, place = image.tag_v2[SUB_DIRECTORIES], image.fp.tell()
    sizes = [0]
    for offset in offsets[:16] if isinstance(offsets, tuple) else [offsets]:
        with contextlib.suppress(Exception):  # one that cannot be read shows nothing
            directory = TiffImagePlugin.ImageFileDirectory_v2(head[:8])
            image.fp.seek(offset)
            directory.load(image.fp)
            sizes.append(int(directory[WIDTH]) * int(directory[HEIGHT]))
    image.fp.seek(place)
    return max(sizes) > image.width * image.height


# ----------------------------------------------------------------------------------------------------------------
# What is not the picture

PNG, JPEG, TIFF, AVIF = (b"\x89PNG\r\n\x1a\n",), (b"\xff\xd8",), (b"II*\0", b"MM\0*"), (b"ftypavif", b"ftypavis")
PNG_USED = {b"eXIf", b"acTL", b"fcTL", b"fdAT"}  # which way is up, and how many frames there are
PNG_TURNED = (b"iTXtXML:com.adobe.xmp", b"tEXtRaw profile type", b"zTXtRaw profile type")  # which way is up, elsewhere
JPEG_USED = {(0xE1, b"Exif"), (0xE1, b"http"), (0xEE, b"Adob")}  # which way is up, twice; how the colours are stored
TIFF_USED = {
    *range(254, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, 320, *range(322, 326), 330, 338, 339,
    347, *range(512, 522), *range(529, 533), DNG_VERSION,
}  # fmt: skip


def versions(stream, head):
    """The file itself; and then, if somebody asks for more, without what is not the picture: texts, tags, colour
    profiles, previews, and the checksums of those. Pillow refuses a file over one that is broken or larger than a
    megabyte.
    """
    start = stream.tell()
    yield stream
    bare = next((bare for magic, bare in BARE if head.startswith(magic) or head[4:12] in magic), None)
    if bare:
        stream.seek(start)
        data = stream.read(MAX_BYTES)
        for used in (True, False):  # what says which way is up is kept, unless it is what is broken
            with contextlib.suppress(struct.error, IndexError):
                yield io.BytesIO(bare(data, used))


def bare_png(data, used):
    out, at = [data[:8]], 8
    while at + 12 <= len(data):
        size, name = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 4 : at + 8 + size]
        if name[0] < ord("a") or name == b"tRNS":  # a picture cannot be decoded without it: as it is
            out.append(data[at : at + 12 + size])
        elif used and (name in PNG_USED or body.startswith(PNG_TURNED)):
            out.append(data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + size
    return b"".join(out)


def bare_jpeg(data, used):
    out, at = [data[:2]], 2
    while data[at] == 0xFF and data[at + 1] != 0xDA:  # up to the pixels
        marker, name = data[at + 1], data[at + 4 : at + 8]
        size = struct.unpack(">H", data[at + 2 : at + 4])[0] + 2
        segment = data[at : at + size]
        if name == b"Exif":
            with contextlib.suppress(KeyError, struct.error):
                tags = only_orientation(segment[4:])
                segment = segment[:2] + struct.pack(">H", len(tags) + 2) + tags
        unused = 0xE1 <= marker <= 0xEF or marker == 0xFE
        if not unused or ((marker, name) in JPEG_USED and (used or marker == 0xEE)):
            out.append(segment)
        at += size
    return b"".join([*out, data[at:]])


def bare_tiff(data, used):
    """The first directory with the tags that say how the pixels are stored, and no others."""
    order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack(order + "I", data[4:8])[0]
    count = struct.unpack(order + "H", data[start : start + 2])[0]
    end = start + 2 + 12 * count
    entries = [data[at : at + 12] for at in range(start + 2, end, 12)]
    wanted = TIFF_USED if used else TIFF_USED - {274}
    kept = [entry for entry in entries if struct.unpack(order + "H", entry[:2])[0] in wanted]
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept) + data[end : end + 4]  # and where the next one is
    return data[:start] + directory + data[start + len(directory) :]


def bare_avif(data, used):
    """Its boxes give the way up once more: the tags are made into something that nobody looks for."""
    return data.replace(b"Exif", b"none", 1)


BARE = [(PNG, bare_png), (JPEG, bare_jpeg), (TIFF, bare_tiff), (AVIF, bare_avif)]


# ----------------------------------------------------------------------------------------------------------------
# What is no picture

EXPORT = "save the picture as PNG or JPEG"
RAW = f"is a camera's raw file: {EXPORT}"
FILM = "is a film: save the frame you mean as PNG or JPEG"
HEIC = f"is a HEIC picture, as iPhones take them, and Pillow cannot read it: {EXPORT}"
DAMAGED = "cannot be read as a picture: the file is damaged or cut short"
UNREAD = f"is an AVIF picture, which Pillow reads from version 11.3 on: pip install --upgrade pillow, or {EXPORT}"
BRANDS = {  # of files that begin with a box "ftyp"
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), HEIC),
    b"crx ": RAW,
}
BEGINNINGS = {
    **dict.fromkeys((*PNG, *JPEG, b"GIF8"), DAMAGED),
    **dict.fromkeys(TIFF, f"is a TIFF that Pillow cannot read, damaged or a camera's raw file: {EXPORT}"),
    **dict.fromkeys((b"FUJIFILM", b"IIRO", b"IIRS", b"IIU\0", b"MMOR", b"II\x1a\0", b"\0MRM", b"FOVb"), RAW),
    **dict.fromkeys((b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3", b"FLV\1", b"0&\xb2u"), FILM),
    **dict.fromkeys((b"\xff\x0a", b"\0\0\0\x0cJXL"), f"is a JPEG XL picture, and Pillow cannot read it: {EXPORT}"),
    **dict.fromkeys((b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51"), f"is a JPEG 2000 picture, not read here: {EXPORT}"),
    b"\0\0\1\0": f"is an icon: {EXPORT}",
    b"%PDF": "is a PDF: save the page or the picture you mean as PNG or JPEG",
    b"8BPS": f"is a Photoshop file: {EXPORT}",
    b"version https://git-lfs": "is a pointer of Git LFS instead of the file: run git lfs pull",
    **dict.fromkeys((b"PK\3\4", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!"), "is an archive: unpack it first"),
}


def kind(head):
    """What a file is that Pillow did not recognise, and what to do, from its first bytes; None if nobody knows."""
    if not head:
        return "is empty: there is no picture in it. Was it downloaded or written to its end?"
    if head[4:12] in AVIF:
        return DAMAGED if "AVIF" in FORMATS else UNREAD
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], FILM)
    if head[:4] == b"RIFF":
        return {b"AVI ": FILM, b"WEBP": DAMAGED}.get(head[8:12])
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script")) or b"<html" in text:
        return "is a web page: save the picture on it instead of the page"
    if text.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")):
        return f"is a drawing in SVG, or other XML: {EXPORT}"
    return next((what for beginning, what in BEGINNINGS.items() if head.startswith(beginning)), None)
