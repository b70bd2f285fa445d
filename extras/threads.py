"""A small model computes on one thread, wherever it is used: on a busy machine several of them wait for one another.

torch.set_num_threads is not the way: besides the number of the thread that calls it, it sets the one with which every
thread begins that first computes from then on, whoever's it is. OpenMP and MKL, which compute for torch, keep a number
for each thread, so they are asked themselves, and nobody else's changes. Where they cannot be (Windows), it is.
"""

import ctypes
import threading
from pathlib import Path

import torch

SMALL = 20e6  # parameters of a model that one thread computes as fast as several


def function(name):
    """A function of torch's own library or of one that it is linked to; None if there is none of that name."""
    for file in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        return getattr(ctypes.PyDLL(str(file)), name, None)  # is in the memory already


SET_OPENMP = function("omp_set_num_threads") or torch.set_num_threads  # for the thread that calls
SET_MKL = function("MKL_Set_Num_Threads_Local")  # as well, and returns what it was; on x86 only
outside = threading.local()  # of each thread what is to be put back


def one(model):
    """Let the parts of a model compute on one thread. If it is small, several only wait for one another, and on a busy
    machine for long. Around the parts, and for whatever else the process does, their number stays as it is.
    """
    for part in (model.vision, model.projector, model.llama, model.llama.head):  # none of them runs in another one
        part.register_forward_pre_hook(enter)
        part.register_forward_hook(leave, always_call=True)


def enter(*_):
    """A hook with a name of its own, as is the next one, so that the model can be pickled."""
    number = torch.get_num_threads()  # gets a new thread ready, too: torch would set its number later
    if number > 1:
        outside.numbers = number, SET_MKL and SET_MKL(1)
        SET_OPENMP(1)


def leave(*_):
    """Ctrl-C passes it by; then the next part that runs puts back what was there before."""
    if hasattr(outside, "numbers"):
        number, of_mkl = outside.numbers
        del outside.numbers
        SET_OPENMP(number)
        if SET_MKL:
            SET_MKL(of_mkl)
