"""
The three published checkpoints at their full size, with random numbers: do they load, in how much time and memory?

Writes a checkpoint with exactly the published names, shapes, dtypes and cuts into shards, then loads it in fresh processes, with
this code and with transformers in turn, on the CPU in bfloat16, and lets each give a few tokens. Before each load the files
are put out of the page cache, so that everybody starts from the disk; --warm leaves them there.

    python benchmarks/full_size.py --models 7b bakllava
    python benchmarks/full_size.py --models 13b --layers 20

A checkpoint that is larger than the memory is only checked: its files are then all header, and holes where the numbers would be.
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

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import llava  # noqa: E402
import vision  # noqa: E402
import weights  # noqa: E402

TOP = {
    "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000, "model_type": "llava",
    "pad_token_id": 32001, "projector_hidden_act": "gelu", "transformers_version": "4.36.0.dev0", "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "vocab_size": 32064,
}  # fmt: skip
TOWER = {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
CONFIGS = {  # config.json as published: most of the sizes are left to the classes' defaults
    "7b": TOP | {"tie_word_embeddings": False, "torch_dtype": "float16", "vision_config": TOWER, "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096,
        "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
    }},
    "13b": TOP | {"tie_word_embeddings": False, "torch_dtype": "float16", "vision_config": TOWER, "text_config": {
        "_name_or_path": "meta-llama/Llama-2-13b-hf", "architectures": ["LlamaForCausalLM"], "hidden_size": 5120,
        "intermediate_size": 13824, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 40,
        "num_hidden_layers": 40, "num_key_value_heads": 40, "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
    }},
    "bakllava": TOP | {"torch_dtype": "float32", "vision_config": TOWER, "text_config": {
        "_name_or_path": "mistralai/Mistral-7B-v0.1", "architectures": ["MistralForCausalLM"], "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "sliding_window": 4096, "torch_dtype": "bfloat16", "vocab_size": 32064,
    }},
}  # fmt: skip
DTYPES = {  # tower, projector and language model as stored: BakLlava's files are mixed
    "7b": (torch.float16, torch.float16),
    "13b": (torch.float16, torch.float16),
    "bakllava": (torch.float32, torch.bfloat16),
}
PUBLISHED = {  # tensors, metadata.total_size, bytes of numbers in each shard (the last ones to three digits of a GB)
    "7b": (686, 14_126_854_144, [4_992_864_256, 4_957_863_936, 4_176_125_952]),
    "13b": (758, 26_702_989_312, [4.96e9, 4.97e9, 4.88e9, 4.93e9, 4.93e9, 2.02e9]),
    "bakllava": (686, 15_740_502_016, [4.89e9, 5.00e9, 4.92e9, 0.934e9]),
}
PREPROCESSOR = {
    "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "image_processor_type": "CLIPImageProcessor",
}  # fmt: skip
TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


# ----------------------------------------------------------------------------------------------------------------
# Writing


def tensors(config, tower_dtype, text_dtype):
    """Names, shapes and dtypes in the order of the published files, written out here by themselves, apart from weights.py."""
    tower, text = config["vision_config"], config["text_config"]
    width, inner = tower["hidden_size"], tower["intermediate_size"]
    start = "vision_tower.vision_model."
    shapes = {
        f"{start}embeddings.class_embedding": [width],
        f"{start}embeddings.patch_embedding.weight": [width, 3, tower["patch_size"], tower["patch_size"]],
        f"{start}embeddings.position_embedding.weight": [(tower["image_size"] // tower["patch_size"]) ** 2 + 1, width],
        f"{start}pre_layrnorm.weight": [width],
        f"{start}pre_layrnorm.bias": [width],
    }
    for i in range(tower["num_hidden_layers"]):
        block = f"{start}encoder.layers.{i}."
        linears = {f"self_attn.{name}_proj": [width, width] for name in ("k", "v", "q", "out")}
        parts = linears | {"layer_norm1": [width], "mlp.fc1": [inner, width], "mlp.fc2": [width, inner], "layer_norm2": [width]}
        for part, shape in parts.items():
            shapes |= {f"{block}{part}.weight": shape, f"{block}{part}.bias": shape[:1]}
    shapes |= {f"{start}post_layernorm.weight": [width], f"{start}post_layernorm.bias": [width]}
    seen = len(shapes)

    wide, inner = text.get("hidden_size", 4096), text.get("intermediate_size", 11008)
    heads = text.get("num_attention_heads", 32)
    narrow = wide * text.get("num_key_value_heads", heads) // heads
    shapes |= {"multi_modal_projector.linear_1.weight": [wide, width], "multi_modal_projector.linear_1.bias": [wide]}
    shapes |= {"multi_modal_projector.linear_2.weight": [wide, wide], "multi_modal_projector.linear_2.bias": [wide]}
    start = "language_model.model."
    shapes[f"{start}embed_tokens.weight"] = [text["vocab_size"], wide]
    for i in range(text.get("num_hidden_layers", 32)):
        block = f"{start}layers.{i}."
        for name, rows in {"q": wide, "k": narrow, "v": narrow, "o": wide}.items():
            shapes[f"{block}self_attn.{name}_proj.weight"] = [rows, wide]
        shapes |= {f"{block}mlp.gate_proj.weight": [inner, wide], f"{block}mlp.up_proj.weight": [inner, wide]}
        shapes |= {f"{block}mlp.down_proj.weight": [wide, inner]}
        shapes |= {f"{block}input_layernorm.weight": [wide], f"{block}post_attention_layernorm.weight": [wide]}
    shapes |= {f"{start}norm.weight": [wide], "language_model.lm_head.weight": [text["vocab_size"], wide]}
    return [(name, shape, tower_dtype if i < seen else text_dtype) for i, (name, shape) in enumerate(shapes.items())]


def nbytes(shape, dtype):
    return torch.Size(shape).numel() * dtype.itemsize


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
    """The checkpoint; returns the bytes of its numbers, in the files and in bfloat16. One block of them is written repeatedly."""
    config = json.loads(json.dumps(CONFIGS[model]))
    if layers:
        config["text_config"]["num_hidden_layers"] = layers
    entries = tensors(config, *DTYPES[model])
    parts = cut(entries)
    sizes = [sum(nbytes(*entry[1:]) for entry in part) for part in parts]
    if not layers:
        count, total, shard_bytes = PUBLISHED[model]
        assert (len(entries), sum(sizes), len(sizes)) == (count, total, len(shard_bytes)), (len(entries), sum(sizes), sizes)
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
    """In a process of its own: load, remember the time and the peak of the memory, and let the model say a few tokens."""
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
        ids = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)[:, 16:]
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
    parser.add_argument("--folder", type=Path, help="where to write them (default: a temporary folder, removed afterwards)")
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
