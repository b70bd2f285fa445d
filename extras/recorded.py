"""A decode step that is recorded once and played again: what load(compile=True) puts in.

A recording fits one shape. So a step looks at a window of the cache that grows by 256 positions at a time, in which the
mask hides what is not filled yet. On a CPU torch.compile fuses what stands between the matrix products (it needs a C++
compiler); on a GPU a CUDA graph starts all kernels of a step at once, instead of one by one.
"""

import os
import shutil

import torch
import torch.nn.functional as F


class RecordedStep:
    """Llama.run, but single steps go through a recording: llava.llama.run = RecordedStep(llava.llama, device)."""

    WINDOW = 256

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
        window = min(capacity, -(-seen // self.WINDOW) * self.WINDOW)
        return self.recorded(x, rope, F.pad(mask, (0, window - seen)), cached)


class CompiledBlocks:
    """Llama.run with its blocks compiled. They are all alike: what is compiled for the first one serves them all."""

    def __init__(self, model):
        self.blocks = [torch.compile(block, dynamic=False) for block in model.blocks]
        self.norm = model.norm

    def __call__(self, x, rope, mask, cached):
        for block, layer in zip(self.blocks, cached, strict=True):
            x, _ = block(x, rope, mask, layer)
        return self.norm(x), None, None


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
