"""Which device, which dtype, and what is put in to make it faster: called by llava.load, between names and numbers.

On the meta device a model is names and shapes: now is the time to put other layers in the place of some. Everything
here gives the same numbers as the plain way, or says by how much it differs, and none of the four modules knows of it.

    letter   meaning
    B, S     rows of the batch, positions that are attended to
    A, K     query heads, key-value heads
    E        width of one head
"""

import contextlib
import copy
import functools
import math
import os

import torch

import llama
import weights
from extras import memory, parallel, quantize, recorded

SMALL = 20e6  # numbers of a model that one thread computes as fast as several


def choose(device, dtype, quantize_to, compile):
    """The options of llava.load → (torch.device, torch.dtype or "auto"). Raises ValueError for what is not here."""
    device = pick_device(device)
    dtype = dtype if dtype == "auto" else pick_dtype(dtype)
    if quantize_to not in (None, *quantize.QUANTIZED):
        raise ValueError(f"quantize is {quantize_to!r}, and must be {' or '.join(quantize.QUANTIZED)}")
    if compile:
        recorded.check_compiler(device)
    if (quantize_to or compile) and parallel.in_group():
        raise ValueError(
            "a model that is split over several processes is neither quantised nor compiled: leave these out"
        )
    return device, dtype


def prepare(model, found, device, dtype, quantize_to, compile):
    """Replace the layers of a model on the meta device by those that suit the options → the dtype to read it in.

    found: from weights.scan. Raises ValueError if the model does not fit into the memory.
    """
    if dtype == "auto":
        dtype = fastest_dtype(model, device, main_dtype(model, found), quantize_to)
    if parallel.in_group():
        parallel.split(model.llama, dtype)
    if quantize_to is not None:
        quantize.replace_layers(model.llama, quantize.QUANTIZED[quantize_to], dtype)
    answers_only = (compile or torch.is_inference_mode_enabled()) and not parallel.in_group()
    if answers_only and device.type == "cpu" and quantize.PackedLinear.works(dtype):
        quantize.replace_layers(model, quantize.PackedLinear, dtype)
    check_memory(model, device, dtype)
    if device.type == "cpu":
        for block in model.llama.blocks:
            block.attention.attend = attend_one_query
    if compile:
        model.llama.run = recorded.RecordedStep(model.llama, device)
        if device.type == "cpu":
            model.init_kv_cache = functools.partial(recorded.init_kv_cache, model)
    if device.type == "cpu" and sum(x.numel() for x in (*model.parameters(), *model.buffers())) < SMALL:
        one_thread(model)
    return dtype


def check_before_download(model, device, dtype, quantize_to, size=None):
    """Refuse a model on the meta device that will not fit into the memory before a byte of its weights is fetched: how
    many numbers there are stands in its config. size: bytes of its files, or None if they are not known: then it is 16
    bits for each. Of a model that is split over processes it depends on them what fits, and is left to prepare.
    """
    if not parallel.in_group():
        wide = size is not None and size > 3 * sum(tensor.numel() for tensor in model.parameters())
        found = dict.fromkeys(model.state_dict(), (None, None, torch.float32 if wide else torch.float16))
        prepare(copy.deepcopy(model), found, device, dtype, quantize_to, compile=False)


def one_thread(model):
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


def pick_device(name):
    """A device's name, or auto for the best there is → torch.device. Raises ValueError if it is not there."""
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind, number in there.items() if number))
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"there is no device {name!r}: auto, {', '.join(there)} are known") from None
    if (device.index or 0) >= there.get(device.type, 0):
        raise ValueError(f"this machine has no device {str(device)!r}, or torch was built without it: try --device cpu")
    return device


def pick_dtype(dtype):
    """A floating-point torch dtype, or its name → the torch dtype."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in weights.DTYPES.values()}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ValueError(f"there is no dtype {name!r} here: auto, {', '.join(known)} are known")
    return known[name]


def fastest_dtype(model, device, stored, quantize_to):
    """What dtype="auto" means. A GPU takes the checkpoint's own, but float16 for bfloat16 if it has no units for that
    and would emulate it, as a T4 or a V100. A CPU takes float32, unless the model is so large that reading its weights
    is what takes the time, and the CPU multiplies bfloat16 natively: half the bytes, twice the speed. The kernels of
    quantised weights take bfloat16 alone.
    """
    if device.type == "cuda" and stored == torch.bfloat16:
        with contextlib.nullcontext() if device.index is None else torch.cuda.device(device):
            return stored if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type != "cpu":
        return stored if stored.itemsize == 2 else torch.float32
    large = sum(tensor.numel() for tensor in model.parameters()) > 100e6
    native = (
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() or torch.backends.mkldnn.is_acl_available()
    )
    return torch.bfloat16 if large and (quantize_to or (native and stored.itemsize == 2)) else torch.float32


def main_dtype(model, found):
    """The dtype that most of a checkpoint's numbers are stored in."""
    sizes = dict.fromkeys(weights.DTYPES.values(), 0)
    for ours, tensor in model.state_dict().items():
        sizes[found[ours][2]] += tensor.numel()
    return max(sizes, key=sizes.get)


def check_memory(model, device, dtype):
    """Refuse a model that will not fit before reading it, rather than being killed halfway."""
    needed = sum(tensor.numel() for tensor in model.parameters()) * dtype.itemsize
    needed += sum(tensor.nbytes for tensor in model.buffers())  # of quantised and packed layers
    there = None
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[0], "free"
    elif device.type == "cpu":
        there = memory.limit(processes=int(os.environ.get("LOCAL_WORLD_SIZE") or 1))  # those of torchrun share it
    if there is not None and needed > there[0]:
        raise ValueError(
            f"the weights take {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')} and the {device.type} has "
            f"{there[0] / 1e9:.1f} GB ({there[1]}): try a smaller dtype, --quantize int4, another device or "
            f"--model tiny"
        )


def attend_one_query(q, k, v, mask, output_attentions=False):
    """llama.attend, in two float32 products where there is one query for each row: faster on some CPUs.

    Queries that share a key-value head are stacked, so that keys are not repeated.
    """
    B, A, T, E = q.shape
    if T > 1 or output_attentions:
        return llama.attend(q, k, v, mask, output_attentions)
    K = k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype).reshape(B, K, A // K, E) @ k.to(dtype).transpose(2, 3) / math.sqrt(E)  # (B, K, A // K, S)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)  # (B, K, A // K, S)
    return (weights @ v.to(dtype)).view(B, A, 1, E).to(q.dtype), None
