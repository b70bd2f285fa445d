"""LoRA (Hu et al. 2021): each matrix of the language model gets a change of low rank, which alone is trained."""

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

LAYERS = ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "mlp.gate", "mlp.up", "mlp.down")
SCALE = 2.0  # alpha / rank, in the authors' script 256 / 128


class LowRank(nn.Module):
    """W → W + 2 B A, with A (rank, in) random and B (out, rank) zero: it begins as W (Hu et al. 2021, section 4.1).

    In float32, whatever W is in: steps of training are too small for 16 bits.
    """

    def __init__(self, weight, rank, generator=None):
        super().__init__()
        drawn = torch.randn(rank, weight.shape[1], generator=generator, dtype=torch.float32)
        self.a = nn.Parameter((drawn * weight.shape[1] ** -0.5).to(weight.device))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device, dtype=torch.float32))

    def forward(self, weight):
        return weight + (SCALE * self.b @ self.a).to(weight.dtype)


def linears(model):
    """The linear layers of the decoder's blocks, those that the authors' script changes."""
    return [block.get_submodule(name) for block in model.llama.blocks for name in LAYERS]


def add(model, rank, generator=None):
    """Give each linear layer of each block of the decoder a change of low rank → its parameters, to be trained."""
    check(model, rank)
    for linear in linears(model):
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank, generator), unsafe=True)
    return [p for linear in linears(model) for p in linear.parametrizations.weight[0].parameters()]


def check(model, rank):
    """Raise ValueError for a rank that the narrowest of the matrices has itself."""
    smallest = min(min(linear.weight.shape) for linear in linears(model))
    if rank >= smallest:
        raise ValueError(f"--lora {rank} is no low rank: the narrowest of the matrices has {smallest} rows or columns")


def merge(model):
    """Put the changes into the weights, which are then plain parameters again."""
    for linear in linears(model):
        if parametrize.is_parametrized(linear):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
