"""The parts of a step on a CPU, each timed alone: a matrix and one vector, and one query over a cache.

    python benchmarks/parts.py
    THP_MEM_ALLOC_ENABLE=0 python benchmarks/parts.py     # with pages of 4 kB

It takes no options.
"""

import argparse
import time

import peers
import torch
import torch.nn.functional as F

import llama
from extras import attention, packed, quantize


def best(function, number=30):
    """Seconds of one call, the best of some."""
    function(0)
    times = []
    for i in range(number):
        begin = time.perf_counter()
        function(i)
        times.append(time.perf_counter() - begin)
    return min(times)


def products(rows=11008, columns=4096, copies=8):
    """Some matrices in turn, so that none of them is still in the processor's cache."""
    x = torch.randn(1, columns).bfloat16()
    weights = [torch.randn(rows, columns).bfloat16() for _ in range(copies)]
    layers = {}
    kinds = {f"bfloat16, {name}": (kind, {}) for name, kind in packed.kinds(torch.bfloat16).items()}
    for scheme, kind in quantize.QUANTIZED.items():
        for name in kind.KERNELS:
            if quantize.works(kind, name, torch.bfloat16):
                kinds[f"{scheme}, kernel of {name}"] = kind, {"kernel": name, "most": 1}
    for scheme, (kind, settings) in kinds.items():
        with torch.device("meta"):
            layers[scheme] = [kind(columns, rows, torch.bfloat16, **settings) for _ in range(copies)]
        for layer, weight in zip(layers[scheme], weights, strict=True):
            layer.take_weight(weight, "cpu")
            layer.state_dict()  # packed when it is asked for

    def own(i):  # torch's own product, which it takes where oneDNN is switched off
        torch.backends.mkldnn.enabled = False
        F.linear(x, weights[i % copies])
        torch.backends.mkldnn.enabled = True

    sizes = {scheme: peers.nbytes(layers[scheme][0]) for scheme in layers}
    half = [weight.half() for weight in weights]
    yield "bfloat16, oneDNN's product", weights[0].nbytes, best(lambda i: F.linear(x, weights[i % copies]))
    yield "bfloat16, torch's own", weights[0].nbytes, best(own)
    yield "float16", half[0].nbytes, best(lambda i: F.linear(x.half(), half[i % copies]))
    for scheme in layers:
        yield scheme, sizes[scheme], best(lambda i, scheme=scheme: layers[scheme][i % copies](x))


def prompts(rows=256, outputs=11008, inputs=4096):
    """Of each way in 16 bits that this machine has: seconds to lay a matrix out, and of a product with some rows."""
    weight, x = torch.randn(outputs, inputs).bfloat16(), torch.randn(rows, inputs).bfloat16()
    yield "plain", 0.0, best(lambda i: F.linear(x, weight), 3)
    for name, kind in packed.kinds(torch.bfloat16).items():
        layer = kind(inputs, outputs, torch.bfloat16)
        begin = time.perf_counter()
        layer.take_weight(weight, "cpu")
        layer.state_dict()
        yield name, time.perf_counter() - begin, best(lambda i, layer=layer: layer(x), 3)


def one_query(keys):
    q = torch.randn(1, 32, 1, 128).bfloat16()
    k, v = torch.randn(2, 1, 32, keys, 128).bfloat16()
    mask = torch.ones(1, 1, 1, keys, dtype=torch.bool)
    return best(lambda i: llama.attend(q, k, v, mask)), best(lambda i: attention.attend_one_query(q, k, v, mask))


@torch.no_grad()
def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{peers.machine()}; a sum reads {peers.bandwidth() / 1e9:.1f} GB/s\n")
    print("| a matrix of 7B and one vector | ms | GB/s |")
    print("|---|---|---|")
    for name, size, seconds in products():
        print(f"| {name} | {seconds * 1e3:.2f} | {size / seconds / 1e9:.1f} |")
    print("\n| a matrix of 7B in bfloat16 | laid out, s | 256 rows, ms |\n|---|---|---|")
    for name, made, seconds in prompts():
        print(f"| {name} | {made:.2f} | {seconds * 1e3:.0f} |")
    print("\n| one query, 32 heads | the fused call, ms | two float32 products, ms |\n|---|---|---|")
    for keys in (100, 700):
        fused, written = one_query(keys)
        print(f"| {keys} keys | {fused * 1e3:.2f} | {written * 1e3:.2f} |")


if __name__ == "__main__":
    main()
