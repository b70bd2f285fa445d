"""
The three published checkpoints at their full size, with random numbers: do they load, in how much time and memory?

Writes a checkpoint with exactly the published names, shapes, dtypes and cuts into shards, then loads it in fresh
processes, with this code and with transformers in turn, on the CPU in bfloat16, and lets each give a few tokens. Before
each load the files are put out of the page cache, so that everybody starts from the disk; --warm leaves them there.

    python benchmarks/full_size.py --models 7b bakllava
    python benchmarks/full_size.py --models 13b --layers 20

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
from published import CONFIGS, DTYPES, PUBLISHED, nbytes, tensors  # noqa: E402

import llama  # noqa: E402
import llava  # noqa: E402
import vision  # noqa: E402
import weights  # noqa: E402

PREPROCESSOR = {
    "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336},
    "image_processor_type": "CLIPImageProcessor",
}  # fmt: skip
TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


# ----------------------------------------------------------------------------------------------------------------
# Writing


def cut(entries, limit=5_000_000_000):
    """Into shards, as transformers cut them in 2023: in order, a new one where the limit would be passed."""
    parts, size = [[]], 0
    for entry in entries:
        if size + nbytes(*entry[1:]) > limit:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += nbytes(*entry[1:])
    return parts


def write(folder, model, layers=None, holes=False):
    """The checkpoint; returns the bytes of its numbers, in the files and in bfloat16. One block of them is written
    repeatedly.
    """
    config = json.loads(json.dumps(CONFIGS[model]))
    if layers:
        config["text_config"]["num_hidden_layers"] = layers
    entries = tensors(config, *DTYPES[model])
    parts = cut(entries)
    sizes = [sum(nbytes(*entry[1:]) for entry in part) for part in parts]
    if not layers:
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
    blocks = {dtype: memoryview(block.to(dtype).view(torch.uint8).numpy()) for dtype in TYPES}
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
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
            for _, shape, dtype in part:
                fill(file, nbytes(shape, dtype), blocks[dtype])
            file.flush()
            os.fsync(file.fileno())
    files = {
        "config.json": config,
        "model.safetensors.index.json": {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map},
        "preprocessor_config.json": PREPROCESSOR,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001},
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2))
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 32000))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<image>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return sum(sizes), sum(nbytes(shape, torch.bfloat16) for _, shape, _ in entries)


def fill(file, size, block):
    while size > 0:
        size -= file.write(block[:size])


# ----------------------------------------------------------------------------------------------------------------
# Loading


def measure(side, folder, tokens=4):
    """In a process of its own: load, remember the time and the peak of the memory,
    and let the model say a few tokens.
    """
    ids = torch.arange(1, 17)[None]
    begin, cpu = time.perf_counter(), time.process_time()
    if side == "ours":
        model, _ = llava.load(folder, device="cpu", dtype="bfloat16")
    else:
        from transformers import LlavaForConditionalGeneration

        begin, cpu = time.perf_counter(), time.process_time()  # its imports take seconds and are not the load
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    seconds, cpu, peak = time.perf_counter() - begin, time.process_time() - cpu, high_water()
    begin = time.perf_counter()
    if side == "ours":
        ids = model.generate(ids, max_new_tokens=tokens)
    else:
        ids = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )[:, 16:]
    got = {"seconds": seconds, "cpu": cpu, "peak": peak, "talk": time.perf_counter() - begin, "peak_talk": high_water()}
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
    config = weights.read_config(folder, llava.LlavaConfig, llama.TextConfig, vision.VisionConfig)
    with torch.device("meta"):
        model = llava.Llava(config)
    found = weights.scan(model, folder)
    print(f"  checked {len(found)} tensors in {time.perf_counter() - begin:.2f} s")


def compare(model, folder, options):
    print(f"{model}{f', {options.layers} layers' if options.layers else ''}", flush=True)
    size, needed = write(folder, model, options.layers, holes=True)
    check(folder)
    print(f"  {size / 1e9:.2f} GB in the files, {needed / 1e9:.2f} GB in bfloat16", flush=True)
    if needed * 1.05 + 2e9 > available():
        print(f"  not loaded: {available() / 1e9:.1f} GB of memory are free. --layers makes it smaller")
        return
    write(folder, model, options.layers)
    print("  | side         | load s | load CPU s | peak GB | peak / weights | 4 tokens s | peak with them GB | ids")
    best = {}
    for _ in range(options.rounds):
        for side in options.sides:
            if not options.warm:
                drop(folder)
            command = [sys.executable, __file__, "--measure", side, "--folder", str(folder)]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=1800)
            if result.returncode:
                print(f"  | {side:12} | stopped with status {result.returncode}")
                continue
            got = json.loads(result.stdout.splitlines()[-1])
            print(
                f"  | {side:12} | {got['seconds']:6.1f} | {got['cpu']:10.1f} | {got['peak'] / 1e9:7.2f} "
                f"| {got['peak'] / needed:14.3f} | {got['talk']:10.1f} | {got['peak_talk'] / 1e9:17.2f} | {got['ids']}",
                flush=True,
            )
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--sides", nargs="+", choices=["ours", "transformers"], default=["ours", "transformers"])
    parser.add_argument(
        "--folder", type=Path, help="where to write them (default: a temporary folder, removed afterwards)"
    )
    parser.add_argument("--keep", action="store_true", help="do not remove the checkpoints")
    parser.add_argument("--layers", type=int, help="of the language model, to scale it down")
    parser.add_argument("--rounds", type=int, default=2, help="loads of each side, in turn (default: %(default)s)")
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--measure", choices=["ours", "transformers"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the files are removed then, too
    if options.measure:
        return measure(options.measure, str(options.folder))
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
