"""
The published checkpoints at their full size, with random numbers: do they load, in how much time and memory?

Writes a checkpoint with exactly the published names, shapes, dtypes and cuts into shards, then loads it in fresh
processes, with this code and with transformers in turn, on the CPU in bfloat16, and lets each give a few tokens. Their
logits behind the prompt are compared; --dtype float32 or float64 tells rounding from a mistake. Before each load the
files are put out of the page cache, so that everybody starts from the disk; --warm leaves them there.

    python benchmarks/full_size.py --models 7b bakllava
    python benchmarks/full_size.py --models 13b --layers 20
    python benchmarks/full_size.py --models interleave-0.5b onevision-0.5b --picture
    python benchmarks/full_size.py --models v1.6-mistral-7b onevision-7b vip-llava-7b --layers 2 --picture
    python benchmarks/full_size.py --models onevision-7b --layers 2 --picture --dtype float32 --rounds 1

A checkpoint that is larger than the memory is only checked: its files are then all header, and holes where the numbers
would be.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tokenizers
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from published import CONFIGS, COUNTED, DTYPES, FAMILY, PUBLISHED, cut, nbytes, tensors  # noqa: E402

import llama  # noqa: E402
import llava  # noqa: E402
import vision  # noqa: E402
import weights  # noqa: E402
from extras import checks, family  # noqa: E402

MODELS = CONFIGS | FAMILY
PREPROCESSOR = {
    "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336},
    "image_processor_type": "CLIPImageProcessor",
}  # fmt: skip
SQUARE = {
    "size": {"height": 384, "width": 384}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3,
    "image_processor_type": "SiglipImageProcessor",
}  # fmt: skip
PHOTO = (480, 640)  # height and width of the picture of --picture
WORDS = 16  # behind the first one, over which the time of a word is the mean
TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


# ----------------------------------------------------------------------------------------------------------------
# Writing


def write(folder, model, layers=None, holes=False, dtype=torch.bfloat16):
    """The checkpoint; returns the bytes of its numbers, in the files and in a dtype. One block of them is written
    repeatedly, around 1 in norms.
    """
    config = json.loads(json.dumps(MODELS[model]))
    if layers:
        config["text_config"]["num_hidden_layers"] = layers
    entries = tensors(config, *DTYPES[model])
    parts = cut(entries)
    single = model in FAMILY and len(parts) == 1
    sizes = [sum(nbytes(*entry[1:]) for entry in part) for part in parts]
    if not layers and model in COUNTED:
        assert (len(entries), sum(torch.Size(shape).numel() for _, shape, _ in entries)) == COUNTED[model]
    elif not layers:
        count, total, shard_bytes = PUBLISHED[model]
        assert (len(entries), sum(sizes), len(sizes)) == (count, total, len(shard_bytes)), (
            len(entries),
            sum(sizes),
            sizes,
        )
        for size, published in zip(sizes, shard_bytes, strict=True):
            assert size == published or abs(size / published - 1) < 0.003, (size, published)

    torch.manual_seed(0)
    block = torch.randn(4_000_037) * 0.02  # a prime number of numbers, so that no two rows are the same
    blocks = {
        (dtype, mean): memoryview((block + mean).to(dtype).view(torch.uint8).numpy())
        for dtype in TYPES
        for mean in (0, 1)
    }
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        name = weights.SINGLE if single else f"model-{number:05}-of-{len(parts):05}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for tensor, shape, dtype in part:
            end = offset + nbytes(shape, dtype)
            header[tensor] = {"dtype": TYPES[dtype], "shape": shape, "data_offsets": [offset, end]}
            weight_map[tensor], offset = name, end
        header = json.dumps(header).encode()
        header += b" " * (-len(header) % 8)
        with open(folder / name, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            if holes:
                file.truncate(8 + len(header) + offset)
                continue
            for tensor, shape, dtype in part:
                is_norm = "norm" in tensor and tensor.endswith("weight")
                fill(file, nbytes(shape, dtype), blocks[dtype, int(is_norm)])
            file.flush()
            os.fsync(file.fileno())
    kind = family.KINDS[config["model_type"]]
    pictures = PREPROCESSOR if config["vision_config"]["model_type"] == "clip_vision_model" else SQUARE
    if kind.pictures is not None:
        pictures = {**pictures, "image_processor_type": kind.pictures, "do_pad": True}
    files = {
        "config.json": config,
        "preprocessor_config.json": pictures,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001},
    }
    if not single:
        files |= {"model.safetensors.index.json": {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}}
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2))
    image = config["image_token_index"]
    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, image))]
    words = {word: i for i, word in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<image>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return sum(sizes), sum(nbytes(shape, dtype) for _, shape, _ in entries)


def fill(file, size, block):
    while size > 0:
        size -= file.write(block[:size])


# ----------------------------------------------------------------------------------------------------------------
# Loading


def inputs_of(folder, picture):
    """A prompt of 16 ids in random words, and a picture in front of it if one is asked for, as both sides take them."""
    ids = torch.arange(3, 19)[None]
    if not picture:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (*PHOTO, 3), dtype=np.uint8)
    config = weights.read_config(folder, llava.LlavaConfig, llama.TextConfig, vision.VisionConfig, checks.clean)
    pictures = weights.read_preprocess_config(folder, vision.PreprocessConfig, config.vision_config)
    tokenizer = llama.Tokenizer(folder / "tokenizer.json")
    inputs = llava.Processor(tokenizer, pictures, config).prepare(
        [[config.image_token_index, *ids[0].tolist()]], [Image.fromarray(noise)]
    )
    with torch.device("meta"):
        model = llava.Llava(config)
    (count,) = model.feature_counts(inputs["pixel_values"], inputs.get("image_sizes"), inputs["input_ids"])
    row = torch.tensor([[config.image_token_index] * count + ids[0].tolist()])
    return inputs | {"input_ids": row, "attention_mask": torch.ones_like(row)}


def measure(side, folder, dtype, tokens=4, picture=False):
    """In a process of its own: load, remember the time and the peak of the memory,
    and let the model say a few tokens; with a picture, the first of them by itself. Writes the logits behind the
    prompt into the folder.
    """
    inputs = inputs_of(Path(folder), picture)
    new = inputs["input_ids"].shape[1]
    begin, cpu = time.perf_counter(), time.process_time()
    if side == "ours":
        model, _ = llava.load(folder, device="cpu", dtype=dtype)
    else:
        import transformers

        kind = family.KINDS[json.loads((Path(folder) / "config.json").read_text())["model_type"]]
        cls = getattr(transformers, kind.architecture)
        begin, cpu = time.perf_counter(), time.process_time()  # its imports take seconds and are not the load
        model = cls.from_pretrained(folder, dtype=dtype)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    seconds, cpu, peak = time.perf_counter() - begin, time.process_time() - cpu, high_water()

    def talk(tokens):
        begin = time.perf_counter()
        if side == "ours":
            ids = model.generate(**inputs, max_new_tokens=tokens)
        else:
            ids = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)[:, new:]
        return time.perf_counter() - begin, ids

    first = talk(1)[0] if picture else 0.0
    seconds_of, ids = talk(tokens)
    got = {"seconds": seconds, "cpu": cpu, "peak": peak, "talk": seconds_of, "peak_talk": high_water()}
    got |= {"first": first, "word": 0.0}
    if picture:  # the best of some runs: a disturbed one says too much, and of two a difference may say anything
        one, more = (min(talk(number)[0] for _ in range(3)) for number in (1, 1 + WORDS))
        got["word"] = (more - one) / WORDS
    with torch.no_grad():
        torch.save(model(**inputs, logits_to_keep=1).logits[0, -1].double(), Path(folder) / f"{side}.logits")
    print(json.dumps({**got, "ids": ids[0].tolist()}))


def high_water():
    """VmHWM: the most memory that this process has had at once, files that it has mapped among it; bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def available():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def drop(folder):
    """Put the files of a folder out of the page cache."""
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check(folder):
    """Compare all names and shapes with the model that config.json describes, without reading a number."""
    begin = time.perf_counter()
    config = weights.read_config(folder, llava.LlavaConfig, llama.TextConfig, vision.VisionConfig, checks.clean)
    with torch.device("meta"):
        model = llava.Llava(config)
    found = {name for _, name, _ in weights.scan(model, folder).values()}  # a tied head is no tensor of its own
    print(f"  checked {len(found)} tensors in {time.perf_counter() - begin:.2f} s")


def compare(model, folder, options):
    print(f"{model}{f', {options.layers} layers' if options.layers else ''}", flush=True)
    size, needed = write(folder, model, options.layers, True, getattr(torch, options.dtype))
    check(folder)
    print(f"  {size / 1e9:.2f} GB in the files, {needed / 1e9:.2f} GB in {options.dtype}", flush=True)
    if options.check:
        return
    if needed * 1.05 + 2e9 > available():
        print(f"  not loaded: {available() / 1e9:.1f} GB of memory are free. --layers makes it smaller")
        return
    write(folder, model, options.layers)
    print("  | side         | load s | load CPU s | peak GB | peak / weights | 4 tokens s | peak with them GB | ids")
    best, ids = {}, {}
    for _ in range(options.rounds):
        for side in options.sides:
            if not options.warm:
                drop(folder)
            command = [sys.executable, __file__, "--measure", side, "--folder", str(folder)]
            command += ["--dtype", options.dtype]
            command += ["--picture"] if options.picture else []
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=1800)
            if result.returncode:
                print(f"  | {side:12} | stopped with status {result.returncode}")
                continue
            got = json.loads(result.stdout.splitlines()[-1])
            ids[side] = got["ids"]
            print(
                f"  | {side:12} | {got['seconds']:6.1f} | {got['cpu']:10.1f} | {got['peak'] / 1e9:7.2f} "
                f"| {got['peak'] / needed:14.3f} | {got['talk']:10.1f} | {got['peak_talk'] / 1e9:17.2f} | {got['ids']}",
                flush=True,
            )
            if options.picture:
                first, word = got["first"], got["word"]
                start = got["seconds"] + first
                said = f"first word after {start:.1f} s, of them {first:.1f} s of picture and prompt; "
                print(f"  |              | {said}a word after it {1000 * word:.0f} ms")
            best[side] = {key: min(got[key], best.get(side, got)[key]) for key in ("seconds", "cpu", "peak", "talk")}
    if "ours" in best:
        bound = 1.05 * needed + 0.5 * 2**30
        print(f"  bound of 1.05 x weights + 0.5 GiB: {bound / 1e9:.2f} GB, kept: {best['ours']['peak'] <= bound}")
    if len(best) == 2:
        ratios = {key: best["ours"][key] / best["transformers"][key] for key in best["ours"]}
        ours, theirs = ({**best[side]} for side in ("ours", "transformers"))
        whole = (ours["seconds"] + ours["talk"]) / (theirs["seconds"] + theirs["talk"])
        print(
            f"  ours / transformers, the best of {options.rounds} each: load {ratios['seconds']:.2f}, its CPU time "
            f"{ratios['cpu']:.2f}, peak {ratios['peak']:.2f}, load and 4 tokens {whole:.2f}",
            flush=True,
        )
        a, b = (torch.load(folder / f"{side}.logits") for side in ("ours", "transformers"))
        said = "the same ids" if ids["ours"] == ids["transformers"] else "other ids"
        print(
            f"  {said}; of the logits behind the prompt in {options.dtype} the largest difference is "
            f"{(a - b).abs().max() / b.abs().max():.1e} of the largest one",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(CONFIGS))
    parser.add_argument("--sides", nargs="+", choices=["ours", "transformers"], default=["ours", "transformers"])
    parser.add_argument(
        "--folder", type=Path, help="where to write them (default: a temporary folder, removed afterwards)"
    )
    parser.add_argument("--keep", action="store_true", help="do not remove the checkpoints")
    parser.add_argument("--layers", type=int, help="of the language model, to scale it down")
    parser.add_argument("--rounds", type=int, default=2, help="loads of each side, in turn (default: %(default)s)")
    parser.add_argument("--picture", action="store_true", help="with a picture of 480 x 640 in front of the prompt")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float64"], default="bfloat16")
    parser.add_argument("--check", action="store_true", help="names, shapes and sizes alone: nothing is loaded")
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--measure", choices=["ours", "transformers"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the files are removed then, too
    if options.measure:
        dtype = getattr(torch, options.dtype)
        return measure(options.measure, str(options.folder), dtype, picture=options.picture)
    root = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        for model in options.models:
            folder = root / model
            folder.mkdir()
            compare(model, folder, options)
            if not options.keep:
                shutil.rmtree(folder)
    finally:
        if options.keep:
            print(f"kept in {root}")
        else:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
