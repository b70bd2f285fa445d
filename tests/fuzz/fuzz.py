"""Coverage-guided fuzzing of everything that is read from outside; not part of the tests, as it needs atheris and many
minutes.

    python tests/fuzz/fuzz.py picture -runs=50000

The first argument is a target: config, index, header, tokenizer or picture. The others are libFuzzer's. An input may be
taken, or refused with a ValueError or an OSError; anything else, 2 seconds of the processor for one input or 2 GB of
memory end the run with the input saved. README.md beside this file says what was found.
"""

import argparse
import copy
import io
import json
import random
import shutil
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path

TARGETS = ("config", "index", "header", "tokenizer", "picture")
if __name__ == "__main__":  # before atheris is asked for, so that --help works without it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("libfuzzer", nargs="*", metavar="...", help="options and files for libFuzzer")
    parser.parse_args(sys.argv[1:2])

import atheris  # noqa: E402

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]
with atheris.instrument_imports(include=["PIL", "vision", "llama", "weights", "llava", "extras"]):
    import torch
    from PIL import Image

    import llama
    import llava
    import vision
    import weights
    from extras import checks, intake

TINY = HERE.parents[2] / "tiny"
CONFIGS = ("config.json", "preprocessor_config.json", "generation_config.json")
JSON = {name: json.loads((TINY / name).read_text()) for name in CONFIGS}
EXTREME = [
    None, True, False, 0, 1, -1, 2, 7, 2**24, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "",
    "x", "default", "full", "linear", "llama", "mistral", "../x.safetensors", "a.safetensors", "\0", "\ud800", [], [0],
    [None],
    [2.5], [[[]]], {}, {"a": 1}, {"shortest_edge": 28}, {"height": 28, "width": 28},
]  # fmt: skip
FIELDS = [
    "rope_scaling", "rope_parameters", "rope_theta", "rope_type", "type", "sliding_window", "head_dim",
    "num_key_value_heads",
    "vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act", "pad_token_id", "eos_token_id",
    "do_pad",
    "quantization_config", "auto_map", "architectures", "model_type", "size", "crop_size", "resample", "description",
    "x",
]  # fmt: skip


def changed(values, data):
    """A JSON object with some fields replaced, added or removed, at any depth."""
    values = json.loads(json.dumps(values))
    for _ in range(data.ConsumeIntInRange(1, 4)):
        place = values
        while True:
            name = data.PickValueInList([*place, *FIELDS])
            if isinstance(place.get(name), dict) and place[name] and data.ConsumeProbability() < 0.8:
                place = place[name]
                continue
            break
        choice = data.ConsumeIntInRange(0, 9)
        if choice == 0:
            place.pop(name, None)
        elif choice < 3:
            place[name] = data.ConsumeIntInRange(-10, 5000)
        elif choice == 3:
            place[name] = [data.ConsumeRegularFloat() for _ in range(data.ConsumeIntInRange(0, 4))]
        elif choice == 4:
            place[name] = data.ConsumeUnicode(20)
        else:
            place[name] = extreme(data)
    return values


def extreme(data):
    return copy.deepcopy(data.PickValueInList(EXTREME))


def encoded(values):
    return json.dumps(values).encode("utf-8", "surrogatepass")


def small_model():
    """The folder of a checkpoint of a few thousand numbers, and its model without numbers."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    tower = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    values = JSON["config.json"]
    values["vision_config"] |= tower | {"patch_size": 14}
    values["text_config"] |= text | {"head_dim": 4}
    JSON["preprocessor_config.json"] |= {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    shutil.copy(TINY / "tokenizer.json", folder)
    for name, content in JSON.items():
        (folder / name).write_text(json.dumps(content))
    pictures = vision.PreprocessConfig(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    config = weights.read_config(folder, llava.LlavaConfig, llama.TextConfig, vision.VisionConfig)
    torch.manual_seed(0)
    model = llava.Llava(config)
    model.init_weights()
    llava.save(model, llava.Processor(checks.Tokenizer(folder / "tokenizer.json"), pictures, config), folder)
    with torch.device("meta"):
        return folder, llava.Llava(config)


def read_config(folder):
    checks.checkpoint(folder)
    config = weights.read_config(folder, llava.LlavaConfig, llama.TextConfig, vision.VisionConfig)
    return config, weights.read_preprocess_config(folder, vision.PreprocessConfig, config.vision_config)


def config(data):
    """One of the three configs is damaged text, or has other fields; what is taken must also run."""
    name = data.PickValueInList([*JSON])
    as_text = data.ConsumeProbability() < 0.2
    content = data.ConsumeBytes(4000) if as_text else encoded(changed(JSON[name], data))
    (FOLDER / name).write_bytes(content)
    try:
        config, preprocess = read_config(FOLDER)
        tower, text = config.vision_config, config.text_config
        processor = llava.Processor(TOKENIZER, preprocess, config)
        for pad in (None, True):
            vision.preprocess(PICTURE, preprocess, pad)
        if tower.num_hidden_layers + text.num_hidden_layers > 8:
            return
        with torch.device("meta"):
            model = llava.Llava(config)
        if sum(tensor.numel() for tensor in model.parameters()) > 200_000:
            return
        model = model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.fill_(0.01)
        inputs = processor.chat([("user", "Hi")], [PICTURE])
        if inputs["input_ids"].shape[1] + tower.image_size**2 < 2000:
            model.generate(**inputs, max_new_tokens=2)
    finally:
        (FOLDER / name).write_text(json.dumps(JSON[name]))


def index(data):
    """model.safetensors.index.json, as damaged text or with other names of files."""
    if data.ConsumeProbability() < 0.2:
        content = data.ConsumeBytes(2000)
    else:
        names = [
            "a.safetensors",
            "model.safetensors",
            "..",
            "/",
            "\\",
            "C:",
            ".safetensors",
            "\0",
            "%2e%2e",
            "\u2215",
            " ",
        ]
        parts = [data.PickValueInList(names) if data.ConsumeBool() else data.ConsumeUnicode(8) for _ in range(3)]
        name = "".join(parts[: data.ConsumeIntInRange(0, 3)]) + data.PickValueInList(["", ".safetensors"])
        values = {"metadata": {}, "weight_map": {"x": name if data.ConsumeBool() else extreme(data)}}
        content = encoded(changed(values, data) if data.ConsumeBool() else values)
    (FOLDER / weights.INDEX).write_bytes(content)
    for file in checks.shards(FOLDER):
        assert file.parent == FOLDER and file.resolve().parent == FOLDER.resolve() and file.suffix == ".safetensors", (
            file
        )
    weights.scan(MODEL, FOLDER)


def header(data):
    """model.safetensors, as damaged bytes or with other entries; what passes the check must also be read."""
    original = WEIGHTS
    length = struct.unpack("<Q", original[:8])[0]
    way = data.ConsumeIntInRange(0, 3)
    if way == 0:
        content = data.ConsumeBytes(3000)
    elif way == 1:
        content = bytearray(original)
        for _ in range(data.ConsumeIntInRange(1, 8)):
            at = data.ConsumeIntInRange(0, len(content) - 1 if data.ConsumeBool() else length + 7)
            content[at] = data.ConsumeIntInRange(0, 255)
        content = bytes(content[: data.ConsumeIntInRange(0, len(content))] if data.ConsumeBool() else content)
    else:
        values = json.loads(original[8 : 8 + length])
        for _ in range(data.ConsumeIntInRange(1, 3)):
            name = data.PickValueInList([*values])
            entry = values[name] if isinstance(values[name], dict) else {}
            choice = data.ConsumeIntInRange(0, 6)
            if choice == 0:
                values[data.ConsumeUnicodeNoSurrogates(30) or "x"] = values.pop(name)
            elif choice == 1:
                entry["dtype"] = data.PickValueInList(
                    ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "x", 3]
                )
            elif choice == 2:
                sizes = [0, 1, 2, 8, 2**31, 2**63, -1, 2.0, None]
                entry["shape"] = [data.PickValueInList(sizes) for _ in range(data.ConsumeIntInRange(0, 3))]
            elif choice == 3:
                entry["data_offsets"] = [data.ConsumeIntInRange(-8, 10**5) for _ in range(data.ConsumeIntInRange(0, 3))]
            elif choice == 4:
                values["__metadata__"] = extreme(data)
            elif choice == 5:
                del values[name]
            else:
                values[name] = extreme(data)
            if not values:
                break
        text = encoded(values)
        stated = len(text) if way == 2 else data.ConsumeIntInRange(0, 2**64 - 1)
        content = struct.pack("<Q", stated) + text + original[8 + length :]
    (FOLDER / weights.SINGLE).write_bytes(content)
    weights.read(MODEL, weights.scan(MODEL, FOLDER), torch.float32, torch.device("cpu"))


def tokenizer(data):
    """tokenizer.json, as damaged text or with other fields; what is taken must encode and decode."""
    values = json.loads((TINY / "tokenizer.json").read_text())
    values["model"]["vocab"] = {name: i for name, i in values["model"]["vocab"].items() if i < 300 or len(name) == 1}
    values["model"]["merges"] = []
    content = data.ConsumeBytes(4000) if data.ConsumeProbability() < 0.2 else encoded(changed(values, data))
    (FOLDER / "broken.json").write_bytes(content)
    read = checks.Tokenizer(FOLDER / "broken.json")
    read.decode(read.encode("Hello </s> <image>\n猫", special=data.ConsumeBool()))


def picture(data):
    """The bytes of a file; libFuzzer starts from small ones of each format."""
    image = intake.open_image(io.BytesIO(data.ConsumeBytes(100_000)))
    assert image.mode == "RGB"
    if image.width * image.height < 10**6:
        for pad in (False, True):
            pixels = vision.preprocess(image, PREPROCESS, pad)
            assert pixels.shape == (3, 28, 28) and pixels.isfinite().all()


def seeds(folder):
    """Small pictures of each format and mode, as a folder for libFuzzer to begin with."""
    import numpy as np

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    saved = [("PNG", mode, {}) for mode in ("RGB", "RGBA", "L", "LA", "1", "P", "I;16")]
    saved += [
        ("JPEG", mode, {"progressive": way, "exif": exif}) for mode in ("RGB", "L", "CMYK") for way in (False, True)
    ]
    saved += [("WEBP", mode, {"lossless": way}) for mode in ("RGB", "RGBA") for way in (False, True)]
    saved += [("BMP", mode, {}) for mode in ("RGB", "L", "1", "P")] + [
        ("PPM", mode, {}) for mode in ("RGB", "L", "1", "I")
    ]
    saved += [("TIFF", "RGB", {"compression": way}) for way in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")]
    saved += [("TIFF", mode, {}) for mode in ("RGB", "L", "I;16", "I", "F", "CMYK", "1", "P")]
    frames = {"save_all": True, "append_images": [noise.transpose(0)]}
    saved += [(kind, "RGB", frames) for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO")]
    for number, (kind, mode, options) in enumerate(saved):
        image = noise.convert("L").convert("I").convert(mode) if mode == "I;16" else noise.convert(mode)
        image.save(folder / f"{number:02}", kind, **options)


def main():
    global FOLDER, MODEL, WEIGHTS, TOKENIZER, PICTURE, PREPROCESS
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    FOLDER, MODEL = small_model()
    WEIGHTS = (FOLDER / weights.SINGLE).read_bytes()
    TOKENIZER, PICTURE = checks.Tokenizer(FOLDER / "tokenizer.json"), Image.new("RGB", (40, 30), "red")
    PREPROCESS = read_config(FOLDER)[1]
    target = globals()[sys.argv[1]]  # one of TARGETS
    if target is index:
        shutil.copy(FOLDER / weights.SINGLE, FOLDER / "a.safetensors")
        (FOLDER / weights.SINGLE).unlink()
    taken = [0, 0, 0.0]

    def one(data):
        taken[1] += 1
        start = time.process_time()
        try:
            target(atheris.FuzzedDataProvider(data))
            taken[0] += 1
        except (ValueError, OSError):
            pass
        seconds = time.process_time() - start
        assert seconds < 2, f"{seconds:.1f} s"
        taken[2] = max(taken[2], seconds)
        if taken[1] % 10_000 == 0:
            print(f"{taken[1]:,} inputs, {taken[0]:,} of them taken, the slowest {taken[2]:.2f} s", file=sys.stderr)

    corpus = FOLDER / "corpus"
    corpus.mkdir()
    if target is picture:
        vision.MAX_PIXELS = intake.MAX_PIXELS = (
            4_000_000  # so that thousands of pictures a minute are possible; the cap itself has its tests
        )
        seeds(corpus)
    else:  # random choices, so that it does not begin with inputs that are too short to choose anything
        rng = random.Random(0)
        for number in range(50):
            (corpus / f"{number:02}").write_bytes(rng.randbytes(rng.randint(50, 600)))
    limits = ["-timeout=300", "-rss_limit_mb=2048", "-max_len=4096", "-len_control=0", "-reduce_inputs=0"]
    arguments = [sys.argv[0], str(corpus), *limits, *sys.argv[2:]]
    atheris.Setup(arguments, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
