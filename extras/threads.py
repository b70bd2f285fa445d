"""A small model computes on one thread, wherever it is used: on a busy machine several of them wait for one another."""

import torch

SMALL = 20e6  # parameters of a model that one thread computes as fast as several


def one(model):
    """Let the parts of a model compute on one thread. If it is small, several only wait for one another, and on a busy
    machine for long. Around the parts, and for whatever else the process does, their number stays as it is.
    """
    outside = []

    def enter(*_):
        if torch.get_num_threads() > 1:
            outside.append(torch.get_num_threads())
            torch.set_num_threads(1)

    def leave(*_):
        if outside:
            torch.set_num_threads(outside.pop())

    for part in (model.vision, model.projector, model.llama, model.llama.head):
        part.register_forward_pre_hook(enter)
        part.register_forward_hook(leave, always_call=True)
