"""One table of a GPU, in at most eight minutes: decode, prefill, attention with a mask, load, and the tests that need
CUDA.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --layers 1 --tokens 4     what a machine without a GPU can try of it

A 7B with random weights, whole on a GPU, beside transformers on the same card. A step reads all weights of the language
model: GB/s is that by the time of a step, beside what a sum over 4 GB reads. What would begin after --minutes is left
out, and says so.
"""

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peers
import torch

import llama

SIDES = {
    "transformers": ("transformers", {}),
    "ours": ("ours", {"dtype": "bfloat16"}),
    "ours, CUDA graph": ("ours", {"dtype": "bfloat16", "compile": True}),
    "ours, int8": ("ours", {"dtype": "bfloat16", "quantize": "int8"}),
    "ours, int4": ("ours", {"dtype": "bfloat16", "quantize": "int4"}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=32 if cuda else 1, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64 if cuda else 4, help="of an answer (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=6.5, help="after which nothing begins (default: %(default)s)")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    name = torch.cuda.get_device_name() if options.device == "cuda" else peers.machine()
    width = bandwidth(options.device)
    print(
        f"{name}; torch {torch.__version__}; 7B widths, {options.layers} layers; a sum reads {width / 1e9:.0f} GB/s\n"
    )
    print("| side | load, s | tokens/s | GB/s | of the bandwidth | a picture and 40 words, ms | peak, GB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        peers.full_size.write(Path(folder), "7b", options.layers)
        for side in peers.installed(SIDES, SIDES):
            row = "out of time" if time.monotonic() > end else measure(*SIDES[side], folder, options, width)
            print(f"| {side} | {row} |", flush=True)
            gc.collect()
    print("\n| 2,900 queries and keys, 32 and 8 heads | ms | memory, MB |\n|---|---|---|")
    for name, (milliseconds, memory) in attention(options.device).items():
        print(f"| {name} | {milliseconds:.1f} | {memory / 1e6:.0f} |", flush=True)
    if options.device == "cuda":
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", "-k", "cuda or gpu", "tests/extras"]
        left = max(30, end + 80 - time.monotonic())
        print(f"\n{' '.join(command[1:])}", flush=True)
        try:
            raise SystemExit(subprocess.run(command, cwd=peers.HERE.parent, timeout=left).returncode)
        except subprocess.TimeoutExpired:
            raise SystemExit("the tests were stopped: out of time") from None


def measure(kind, settings, folder, options, width):
    """The cells of a side's row."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif "compile" in settings:
        return "needs a GPU"
    begin = time.perf_counter()
    side = peers.KINDS[kind](folder, device=options.device, **settings)
    load = time.perf_counter() - begin
    side.decode(4)
    seconds = min(side.decode(options.tokens) for _ in range(3))
    side.prefill(40)
    prompt = min(side.prefill(40) for _ in range(3))
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else peers.full_size.high_water()
    rate = side.bytes / seconds
    cells = f"{load:.1f}", f"{1 / seconds:.1f}", f"{rate / 1e9:.0f}", f"{rate / width:.0%}", f"{1000 * prompt:.0f}"
    return " | ".join([*cells, f"{peak / 1e9:.2f}"])


def attention(device):
    """llama.attend with a mask, grouped heads, beside the same with the keys repeated: {name: (ms, bytes)}."""
    T = 2900 if device == "cuda" else 290
    q, k, v = (torch.randn(1, heads, T, 128, dtype=torch.bfloat16, device=device) for heads in (32, 8, 8))
    mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=device).tril()
    ways = {
        "grouped, with a mask": lambda: llama.attend(q, k, v, mask),
        "keys repeated, with a mask": lambda: llama.attend(q, *(x.repeat_interleave(4, 1) for x in (k, v)), mask),
    }
    found = {}
    for name, way in ways.items():
        way()
        synchronize(device)
        before = 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        begin = time.perf_counter()
        for _ in range(5):
            way()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
        found[name] = 1000 * (time.perf_counter() - begin) / 5, peak
    return found


def bandwidth(device):
    """Bytes a second that a sum over 4 GB reads (over 1 GB on a CPU), the best of five."""
    if device == "cpu":
        return peers.bandwidth()
    numbers, best = torch.ones(1_000_000_000, device=device), 0.0
    for _ in range(6):
        synchronize(device)
        begin = time.perf_counter()
        numbers.sum().item()
        best = max(best, numbers.nbytes / (time.perf_counter() - begin))
    return best


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
