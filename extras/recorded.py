"""A decode step that is recorded once and played again: what load(compile=True) puts in.

A recording fits one shape. So a step looks at a window of the cache that grows by 256 positions at a time, in which the
mask hides what is not filled yet. On a CPU torch.compile fuses what stands between the matrix products (it needs a C++
compiler); on a GPU a CUDA graph starts all kernels of a step at once, instead of one by one.
"""

import math
import os
import shutil
import types

import torch
import torch.nn.functional as F

WINDOW = 256


class RecordedStep:
    """Llama.run, but single steps go through a recording: llava.llama.run = RecordedStep(llava.llama, device)."""

    def __init__(self, model, device):
        self.plain = model.run
        if device.type == "cpu":
            self.recorded = CompiledBlocks(model)
        else:
            self.recorded = CudaGraph(model.run)

    def __call__(self, x, rope, mask, cached, *options):
        if x.shape[1] > 1 or cached[0] is None or any(options):
            return self.plain(x, rope, mask, cached, *options)
        capacity, seen = cached[0][0].shape[2], mask.shape[-1]
        window = min(capacity, whole_windows(seen))
        return self.recorded(x, rope, F.pad(mask, (0, window - seen)), cached)


def whole_windows(positions):
    return math.ceil(positions / WINDOW) * WINDOW


def init_kv_cache(model, batch_size, max_length):
    """llama.init_kv_cache in a form that one recording of a window fits, however long the cache is.

    Keys and values have room for whole windows, and lie in memory position by position, (positions, B, K, E), so that
    the beginning of a long cache looks like that of a short one. `real` still says how many positions there are.
    """
    cache = type(model).init_kv_cache(model, batch_size, max_length)
    for name, tensor in cache.items():
        if name not in ("real", "length"):
            B, K, _, E = tensor.shape
            cache[name] = tensor.new_zeros(whole_windows(max_length), B, K, E).permute(1, 2, 0, 3)
    return cache


class CompiledBlocks:
    """Llama.run with its blocks compiled. They are all alike: what is compiled for the first one serves them all.

    torch compiles a function for a few shapes only, and from then on runs it plainly. So each shape, which is to say
    each window and size of the batch, has a function of its own.
    """

    def __init__(self, model):
        self.blocks, self.norm, self.functions = model.blocks, model.norm, {}

    def __call__(self, x, rope, mask, cached):
        if mask.shape not in self.functions:
            self.functions[mask.shape] = torch.compile(copy_of(run_block), dynamic=False)
        window = mask.shape[-1]
        for block, (keys, values, positions) in zip(self.blocks, cached, strict=True):
            layer = keys[:, :, :window], values[:, :, :window], positions
            x = self.functions[mask.shape](block, x, rope, mask, layer)
        return self.norm(x), None, None


def run_block(block, x, rope, mask, layer):
    return block(x, rope, mask, layer)[0]


def copy_of(function):
    """The same function for Python, and another one for torch.compile, which counts shapes by the code."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


class CudaGraph:
    """Llama.run whose kernels are captured at the first call for each window and each cache, and then replayed."""

    def __init__(self, function):
        self.function, self.recorded = function, {}

    def __call__(self, x, rope, mask, cached):
        inputs = (x, *rope, mask, cached[0][2])
        key = (mask.shape, *(tensor.data_ptr() for layer in cached for tensor in layer[:2]))
        if key not in self.recorded:
            if any(key[1:] != other[1:] for other in self.recorded):
                self.recorded.clear()  # another cache: the old graphs hold memory that nobody will use again
            self.recorded[key] = self.capture(inputs, cached)
        graph, held, out = self.recorded[key]
        for old, new in zip(held, inputs, strict=True):
            old.copy_(new)
        graph.replay()
        return out

    def capture(self, inputs, cached):
        """Capture one step → the graph, the tensors that it reads its inputs from, and those that it writes to."""
        held = [tensor.clone() for tensor in inputs]
        x, cos, sin, mask, positions = held
        arguments = x, (cos, sin), mask, [(keys, values, positions) for keys, values, _ in cached]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a warm-up run, so that libraries initialise outside the capture
            self.function(*arguments)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.function(*arguments)
        return graph, held, out


def check_compiler(device):
    """Raise ValueError where a step cannot be recorded: torch.compile writes C++ for a CPU."""
    if device.type == "mps":
        raise ValueError("compile works on a CPU and on CUDA, not on mps: leave it out")
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    if device.type == "cpu" and not any(shutil.which(name) for name in names if name):
        raise ValueError("compile needs a C++ compiler on a CPU, and there is none: install g++ or leave it out")
