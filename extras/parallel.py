"""A language model split over the processes of torch.distributed (Shoeybi et al. 2019, "Megatron-LM", section 3).

    torchrun --nproc-per-node 2 llava.py …

Each process holds some of the heads and some columns of the MLP: rows of the matrices that lead there, and columns of
those that lead back. What these give is one part of a sum, which is added up over the processes: one all-reduce after
attention, one after the MLP. The vision tower, the embedding and the head are whole in each process.

With --each and a model that fits each of them, pictures are dealt out to the processes instead.
"""

import atexit
import dataclasses
import datetime
import os
import sys

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

ROWS, COLUMNS = ("attention.wq", "attention.wk", "attention.wv", "mlp.gate", "mlp.up"), ("attention.wo", "mlp.down")


def in_group():
    """Whether this process belongs to a group of torch.distributed, over which a model is to be split."""
    return there_are_others() and not Deal.agreed


def there_are_others():
    return dist.is_available() and dist.is_initialized()


def split(model, dtype):
    """Keep only this process's part of each block of a decoder, which is on the meta device."""
    config, parts = model.config, dist.get_world_size()
    if any(size % parts for size in (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)):
        sizes = f"{config.num_key_value_heads} key-value heads and {config.intermediate_size} columns"
        raise ValueError(f"{sizes} cannot be dealt out evenly to {parts} processes: take another number of them")
    for block in model.blocks:
        for name in ROWS + COLUMNS:
            parent, _, own = name.rpartition(".")
            layer = block.get_submodule(name)
            bias = layer.bias is not None
            part = SplitLinear(layer.in_features, layer.out_features, dtype, dim=int(name in COLUMNS), bias=bias)
            setattr(block.get_submodule(parent), own, part)
    heads = {name: getattr(config, name) // parts for name in ("num_attention_heads", "num_key_value_heads")}
    model.config = dataclasses.replace(config, **heads)


def agreed(x):
    """What rank 0 has for x: what is chosen by timing must be the same in all processes."""
    held = [x]
    if there_are_others():
        dist.broadcast_object_list(held)
    return held[0]


class SplitLinear(nn.Module):
    """x Wᵀ of which this process holds some rows of W (dim 0), or some columns and adds up with the others (dim 1).

    For answers alone: a part of a matrix can be neither trained nor saved. bias: of W by rows; it is held whole.
    """

    def __init__(self, in_features, out_features, dtype, dim, bias=False):
        super().__init__()
        shape, self.dim = [out_features, in_features], dim
        shape[dim] //= dist.get_world_size()
        self.register_buffer("w", torch.empty(shape, dtype=dtype, device="meta"))
        whole = nn.Parameter(torch.empty(out_features, dtype=dtype, device="meta")) if bias else None
        self.register_parameter("bias", whole)

    def take_weight(self, part, device):
        """Take this process's rows or columns out of a slice of a file, (outputs, inputs) → them."""
        numbers = part[self.own()] if self.dim == 0 else part[:, self.own()]
        self.w = numbers.to(device, self.w.dtype, copy=True)
        return self.w

    def own(self):
        """Which rows or columns of the whole matrix this process has, a slice."""
        size = self.w.shape[self.dim]
        return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)

    def forward(self, x):
        x = F.linear(x, self.w, None if self.bias is None else self.bias[self.own()])
        if self.dim == 1:
            dist.all_reduce(x)
        return x


def join(options):
    """Under torchrun: join the group, set the device and the seed of the command line's options; only rank 0 prints."""
    from extras import speed

    if options.chat or "-" in options.image:
        raise ValueError("several processes cannot share one standard input: leave out --chat and --image -")
    device, rank = speed.pick_device(options.device), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        options.device = f"cuda:{rank}"
        torch.cuda.set_device(speed.pick_device(options.device))
    Deal.wanted = options.each
    patience = datetime.timedelta(days=30) if options.each else None  # until the last one has answered its share
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    atexit.register(dist.destroy_process_group)
    seed = [options.seed if options.seed is not None else torch.seed() % 2**63]
    dist.broadcast_object_list(seed)  # all of them must draw the same
    options.seed = seed[0]
    Deal.streams = sys.stdout, sys.stderr
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)


# ----------------------------------------------------------------------------------------------------------------
# Pictures dealt out to processes that each hold the whole model


class Deal:
    wanted, agreed = False, False  # whether the command has pictures to deal out; whether they will be
    streams = None  # stdout and stderr, which only rank 0 has until then


def deal(fits):
    """Deal out the pictures, if there are any to, and the model fits each of the processes."""
    if Deal.wanted:
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, fits)
        Deal.agreed = all(everywhere)


def share():
    """Which of all pictures this process asks about, a slice. Where they are dealt out, each speaks for itself."""
    if not Deal.agreed:
        return slice(None)
    sys.stdout, sys.stderr = Deal.streams
    return slice(dist.get_rank(), None, dist.get_world_size())


def speaks():
    """Whether this process writes down what it finds out."""
    return not in_group() or dist.get_rank() == 0


def wait():
    """Until all processes have come so far."""
    if there_are_others():
        dist.barrier()


def worst(status):
    """The worst exit status of all processes: torchrun ends them all when one of them fails."""
    found = [status]
    if there_are_others():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, status)
    return max(found)
