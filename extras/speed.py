"""Which device, which dtype, and what is put in to make it faster: called by llava.load, between names and numbers.

On the meta device a model is names and shapes: now is the time to put other layers in the place of some. Everything
here gives the same numbers as the plain way, or says by how much it differs, and none of the four modules knows of it.

There is no list of processors. Where several ways compute the same, they are timed for some milliseconds on the sizes
of the model that is being loaded, and the fastest is taken: model.ways says which and why, --trace shows it, and FIXED
settles it beforehand. float32 always goes the plain way; in 16 bits another one must win by a tenth, so that the same
command gives the same words twice.
"""

import contextlib
import copy
import functools
import itertools
import math
import os
import sys
import time

import torch
import torch.nn as nn

import llama
import weights
from extras import attention, memory, packed, parallel, quantize, recorded, threads

FIXED = {}  # question → the way that is taken without timing any, as {"one query": "fused call", "8 bits": "plain"}
MARGIN = 0.9  # of the plain way's time: what does not stay below is not worth another rounding
STEPS, PROMPT = 100, 256  # what is timed: so many words of an answer, behind a picture or so many positions at least
FEW = (4, 16, 64)  # rows of several answers side by side, up to which a kernel for one may still be faster
KEYS = 700  # positions that one query looks at: a picture and some words
NUMBERS = {"few": 20_000_000, "many": 4_000_000}  # of a matrix that is timed with few rows or with many, at most
STREAMED = 96e6  # bytes of its copies, so that a vector's product reads memory, as in an answer, and not a cache
COPIES = 32  # at most
ROUNDS = 3  # of all ways in turn, the best counts
HOPELESS = 0.1, 4  # over so many seconds and so many times as long as another way: not tried again


def choose(device, dtype, quantize_to, compile):
    """The options of llava.load → (torch.device, torch.dtype or "auto"). Raises ValueError for what is not here."""
    device = pick_device(device)
    dtype = dtype if dtype == "auto" else pick_dtype(dtype)
    if quantize_to not in (None, *quantize.QUANTIZED):
        raise ValueError(f"quantize is {quantize_to!r}, and must be {' or '.join(quantize.QUANTIZED)}")
    if compile:
        recorded.check_compiler(device)
    if (quantize_to or compile) and parallel.in_group() and not parallel.Deal.wanted:
        raise ValueError(
            "a model that is split over several processes is neither quantised nor compiled: leave these out"
        )
    return device, dtype


def prepare(model, found, device, dtype, quantize_to, compile):
    """Replace the layers of a model on the meta device by those that suit the options → the dtype to read it in.

    found: from weights.scan. Raises ValueError if the model does not fit into the memory.
    """
    model.ways = ways = {}
    if dtype == "auto":
        dtype = fastest_dtype(model, device, main_dtype(model, found), quantize_to, ways)
    parallel.deal(bool(quantize_to or compile) or too_large(model, device, dtype) is None)
    if parallel.in_group():
        parallel.split(model.llama, dtype)
    timed, shape, positions = device.type == "cpu" and dtype.itemsize == 2, *sizes(model)
    if quantize_to is not None:
        settings = functools.cache(lambda kind: fastest_kernel(kind, shape, dtype, ways) if timed else {})
        quantize.quantize_layers(model.llama, quantize_to, dtype, settings)
    answers_only = (compile or torch.is_inference_mode_enabled()) and not parallel.in_group()
    if answers_only and timed and (kind := fastest_product(shape, positions, dtype, ways)) is not nn.Linear:
        quantize.replace_layers(model, kind, dtype)
    check_memory(model, device, dtype)
    if device.type == "cpu":
        one_query = fastest_attention(model, dtype, ways) if timed else llama.attend
        attend = attention.Attend(one_query, tell=timed)
        for block in model.llama.blocks:
            block.attention.attend = attend
        if sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())) < threads.SMALL:
            threads.one(model)
    if compile:
        model.llama.run = recorded.RecordedStep(model.llama, device)
        if device.type == "cpu":
            model.init_kv_cache = functools.partial(recorded.init_kv_cache, model)
    return dtype


def check_before_download(model, device, dtype, quantize_to, size=None):
    """Refuse a model on the meta device that will not fit into the memory before a byte of its weights is fetched.

    size: bytes of its files; None, not known: 16 bits a number. What processes share is left to prepare.
    """
    if parallel.in_group():
        return
    if dtype == "auto":
        wide = size is not None and size > 3 * count_parameters(model)
        dtype = fastest_dtype(model, device, torch.float32 if wide else torch.float16, quantize_to, {})
    if quantize_to is not None:
        model = copy.deepcopy(model)
        quantize.quantize_layers(model.llama, quantize_to, dtype)
    check_memory(model, device, dtype)


def count_parameters(model):
    return sum(tensor.numel() for tensor in model.parameters())


# ----------------------------------------------------------------------------------------------------------------
# Device, dtype, memory


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


def fastest_dtype(model, device, stored, quantize_to, ways):
    """What dtype="auto" means. A GPU takes the checkpoint's own, but float16 for bfloat16 if it has no units for that
    and would emulate it, as a T4 or a V100. A CPU takes float32, unless the model is so large that reading its weights
    is what takes the time and bfloat16 is faster there, or so large that there is no memory for it. The kernels of
    quantised weights take bfloat16 alone.
    """
    if device.type == "cuda" and stored == torch.bfloat16:
        with contextlib.nullcontext() if device.index is None else torch.cuda.device(device):
            return stored if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type != "cpu":
        return stored if stored.itemsize == 2 else torch.float32
    if count_parameters(model) <= 100e6 or (stored.itemsize > 2 and not quantize_to):
        return torch.float32
    if quantize_to:
        return torch.bfloat16
    packs = torch.is_inference_mode_enabled() and not parallel.in_group()
    kinds = {"plain": nn.Linear, **(packed.kinds(torch.bfloat16) if packs else {})}
    names = {kind: f"bfloat16 {kind}".removesuffix(" plain") for kind in kinds}
    answers = {names[kind]: functools.partial(answer, *sizes(model), kinds[kind], torch.bfloat16) for kind in kinds}
    if too_large(model, device, torch.float32) is None:
        answers = {"float32": functools.partial(answer, *sizes(model), nn.Linear, torch.float32), **answers}
    times = {} if "dtype" in FIXED else race(answers)
    if decide("dtype", answers, times, ways) == "float32":
        return torch.float32
    if packs and times:  # they were timed with it
        decide("products", kinds, {kind: times[names[kind]] for kind in kinds}, ways)
    return torch.bfloat16


def main_dtype(model, found):
    """The dtype that most of a checkpoint's numbers are stored in."""
    sizes = dict.fromkeys(weights.DTYPES.values(), 0)
    for ours, tensor in model.state_dict().items():
        sizes[found[ours][2]] += tensor.numel()
    return max(sizes, key=sizes.get)


def too_large(model, device, dtype):
    """Why a model does not fit into the memory, None if it does: to be asked before reading it, rather than being
    killed halfway.
    """
    needed = count_parameters(model) * dtype.itemsize
    needed += sum(tensor.nbytes for tensor in model.buffers())  # of quantised and packed layers
    there = None
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[0], "free"
    elif device.type == "cpu":
        there = memory.limit(processes=int(os.environ.get("LOCAL_WORLD_SIZE") or 1))  # those of torchrun share it
    if there is None or needed <= there[0]:
        return None
    return (
        f"the weights take {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')} and the {device.type} has "
        f"{there[0] / 1e9:.1f} GB ({there[1]}): try a smaller dtype, --quantize int4, another device or --model tiny"
    )


def check_memory(model, device, dtype):
    """Raise what too_large says."""
    refusal = too_large(model, device, dtype)
    if refusal is not None:
        raise ValueError(refusal)


# ----------------------------------------------------------------------------------------------------------------
# Which of several ways is the fastest


def fastest(question, ways, taken):
    """The name of the fastest of several ways to the same numbers; it is noted in `taken`, with the reason.

    ways: {name: a function that prepares a way and returns another one, which returns how long it took, in seconds}.
    The first way is the plain one.
    """
    return decide(question, ways, {} if question in FIXED else race(ways), taken)


def decide(question, ways, times, taken):
    """The same once they have been timed: {name: seconds}."""
    plain, name, why = next(iter(ways)), FIXED.get(question), "fixed"
    if name is None:
        name = min(times, key=lambda each: times[each] * (1 if each == plain else 1 / MARGIN))
        why = ", ".join(f"{each} {1000 * seconds:.3g} ms" for each, seconds in times.items())
        why = why if len(times) > 1 else "there is no other"
    name = parallel.agreed(name)
    if name not in ways:
        raise ValueError(f"speed.FIXED has {name!r} for {question!r}; there is {', '.join(ways)} here")
    taken[question] = name, why
    return name


@torch.inference_mode()
def race(ways):
    """{name: seconds}, all ways in turn, the best of some rounds: what disturbs the machine makes a way slower only.

    The first round is not counted, as a way may have to get ready, but it shows which are hopeless.
    """
    if len(ways) == 1:
        return dict.fromkeys(ways, math.nan)
    trials = {name: prepare_way() for name, prepare_way in ways.items()}
    times = {name: trial() for name, trial in trials.items()}
    seconds, factor = HOPELESS
    trials = {name: trial for name, trial in trials.items() if times[name] < max(seconds, factor * min(times.values()))}
    rounds = [{name: trial() for name, trial in trials.items()} for _ in range(ROUNDS)]
    return {**times, **{name: min(each[name] for each in rounds) for name in trials}}


def answer(shape, positions, kind, dtype):
    """A matrix's share of an answer behind a prompt: a function that takes its time, in seconds. To lay it out is part
    of it: the fastest of several times, lest what disturbs the machine at that moment decides.
    """
    (made, step), (_, prompt) = (filled(rows, kind, shape, dtype) for rows in (1, PROMPT))
    return lambda: made + STEPS * step() + prompt() * positions / PROMPT


def rows_at_once(rows, kind, shape, dtype, **settings):
    """The same of a single product with so many rows."""
    return filled(rows, kind, shape, dtype, **settings)[1]


def filled(rows, kind, shape, dtype, **settings):
    """Layers of a kind that hold ones → the seconds that it takes to make one, and a function that takes the time of a
    product with so many rows. For many of them a part of a matrix will do: computing takes the time, not reading.
    """
    (inputs, outputs), few = shape, rows <= FEW[0]
    part = min(outputs, max(64, NUMBERS["few" if few else "many"] // inputs))
    size = inputs * part * dtype.itemsize * getattr(kind, "BITS", 16) / 16
    copies = min(COPIES, math.ceil(STREAMED / size)) if few else 1
    layers, marks = [], [time.perf_counter()]
    for _ in range(copies):
        layers.append(layer_of_ones(kind, inputs, part, dtype, **settings))
        marks.append(time.perf_counter())
    made, x = min(end - begin for begin, end in itertools.pairwise(marks)), torch.ones(rows, inputs, dtype=dtype)
    return made * outputs / part, lambda: product(layers, x) * outputs / part


def layer_of_ones(kind, inputs, outputs, dtype, **settings):
    """For its time it does not matter what it holds."""
    with torch.device("meta"):
        layer = kind(inputs, outputs, dtype=dtype, bias=False, **settings)
    layer.to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.fill_(1)
    if kind is not nn.Linear:
        layer.pack()
    return layer


def product(layers, x):
    """Seconds of a product, the mean over several layers."""
    begin = time.perf_counter()
    for layer in layers:
        layer(x)
    return (time.perf_counter() - begin) / len(layers)


def sizes(model):
    """What an answer takes its time for: the sides of the matrix that counts most, and the positions of a picture."""
    return largest(model), max(PROMPT, model.vision.grid**2)


def largest(model):
    """(inputs, outputs) of the matrix that holds most of a language model's numbers."""
    sizes = {}
    for layer in model.llama.modules():
        if isinstance(layer, nn.Linear):
            shape = layer.in_features, layer.out_features
            sizes[shape] = sizes.get(shape, 0) + math.prod(shape)
    return max(sizes, key=sizes.get)


def fastest_product(shape, positions, dtype, ways):
    """nn.Linear, or a kind of packed layer where that is faster."""
    kinds = {"plain": nn.Linear, **packed.kinds(dtype)}
    if "products" not in ways:  # else they were timed with the dtype
        answers = {name: functools.partial(answer, shape, positions, kinds[name], dtype) for name in kinds}
        fastest("products", answers, ways)
    return kinds[ways["products"][0]]


def fastest_kernel(kind, shape, dtype, ways):
    """Settings of a quantised layer: its kernel, for how many rows at most, and whether the others go by float32."""
    make, question = functools.partial(rows_at_once, kind=kind, shape=shape, dtype=dtype), f"{kind.BITS} bits"
    some = shape[0], kind.CHUNK  # of the rows of W: where "as is" is slow, it is a hundred times as slow
    prompt = functools.partial(make, PROMPT, shape=some)
    prompts = {"as is": prompt, "float32": functools.partial(prompt, wide=True)}
    wide = {"wide": fastest(f"{question}, many rows", prompts, ways) == "float32"}
    kernels = [name for name in kind.KERNELS if quantize.works(kind, name, dtype)]
    steps = {name: functools.partial(make, 1, kernel=name, most=1) for name in kernels}
    kernel = fastest(question, {"plain": functools.partial(make, 1, **wide), **steps}, ways)
    if kernel == "plain":
        return wide
    chosen = {**wide, "kernel": kernel, "most": 1}
    for rows in (*FEW, PROMPT):
        pair = {"plain": functools.partial(make, rows, **wide)}
        pair[kernel] = functools.partial(make, rows, kernel=kernel, most=rows)
        if fastest(f"{question}, {rows} rows", pair, ways) == "plain":
            break
        chosen["most"] = rows if rows < PROMPT else sys.maxsize
    return chosen


def fastest_attention(model, dtype, ways):
    """One query for each row: the fused call, or the two products."""
    config = model.llama.config
    E, K = config.head_dim, config.num_key_value_heads
    q, k = torch.ones(1, config.num_attention_heads, 1, E, dtype=dtype), torch.ones(1, K, KEYS, E, dtype=dtype)
    mask = torch.ones(1, 1, 1, KEYS, dtype=torch.bool)
    functions = {"fused call": llama.attend, "two products": attention.attend_one_query}

    def trial(function):
        begin = time.perf_counter()
        function(q, k, k, mask)
        return time.perf_counter() - begin

    ways_to = {name: lambda f=function: functools.partial(trial, f) for name, function in functions.items()}
    return functions[fastest("one query", ways_to, ways)]
