"""What is chosen for a machine changes rounding alone."""

import contextlib
import itertools
import re
import sys

import pytest
import torch

import llama
import llava
from extras import packed, parallel, quantize, speed


def test_a_step_touches_no_switch_of_the_process(checkpoints, family, monkeypatch):
    monkeypatch.setitem(speed.FIXED, "one query", "two products")
    model, processor = llava.load(str(checkpoints[family]), device="cpu", dtype="bfloat16")
    seen = []
    model.llama.norm.register_forward_hook(lambda *_: seen.append(torch.backends.mkldnn.enabled))
    model.generate(**processor("USER: hello ASSISTANT:"), max_new_tokens=3)
    assert all(seen) and len(seen) == 3


# ----------------------------------------------------------------------------------------------------------------
# Which way is taken


def clock(*laps):
    """A way that takes so many hundredths of a second in its rounds, the first of which is not counted."""
    return lambda: (lap / 100 for lap in laps).__next__


@pytest.mark.parametrize(
    "plain, other, taken",
    [(1.0, 0.89, "other"), (1.0, 0.91, "plain"), (1.0, 1.5, "plain"), (1.0, 0.2, "other")],
)
def test_another_way_must_win_by_a_tenth(plain, other, taken):
    noted = {}
    laps = {"plain": (9, plain + 1, plain, plain), "other": (0.01, other, other + 2, other)}  # the first warms up
    assert speed.fastest("a question", {name: clock(*laps[name]) for name in laps}, noted) == taken
    assert noted["a question"][0] == taken and f"other {10 * other:.3g} ms" in noted["a question"][1]


def test_the_fastest_of_several_is_taken_if_it_wins_by_a_tenth():
    ways = {"plain": clock(*[1.0] * 4), "a": clock(*[0.8] * 4), "b": clock(*[0.7] * 4)}
    assert speed.fastest("q", ways, {}) == "b"


def test_a_hopeless_way_is_tried_once(monkeypatch):
    assert speed.fastest("q", {"plain": clock(300), "other": clock(*[20] * 4)}, {}) == "other"
    monkeypatch.setattr(speed, "ROUNDS", 1)
    assert speed.fastest("q", {"plain": clock(8, 1), "other": clock(0.1, 2)}, {}) == "plain"  # it had to get ready
    assert speed.fastest("q", {"plain": clock(50, 1), "other": clock(20, 2)}, {}) == "plain"  # others took as long


def test_what_is_fixed_is_not_timed(monkeypatch):
    noted = {}
    monkeypatch.setitem(speed.FIXED, "q", "other")
    assert speed.fastest("q", {"plain": None, "other": None}, noted) == "other"
    assert noted == {"q": ("other", "fixed")}
    monkeypatch.setitem(speed.FIXED, "q", "unknown")
    with pytest.raises(ValueError, match="has 'unknown' for 'q'; there is plain, other here"):
        speed.fastest("q", {"plain": None, "other": None}, {})


def test_all_processes_of_a_group_take_what_the_first_one_found(monkeypatch):
    monkeypatch.setattr(parallel, "agreed", lambda name: "other")
    assert speed.fastest("q", {"plain": clock(*[1] * 4), "other": clock(*[2] * 4)}, {}) == "other"


@pytest.mark.parametrize("quantize_to", [None, "int8", "int4"])
def test_float32_goes_the_plain_way_and_times_nothing(checkpoints, family, quantize_to, monkeypatch):
    monkeypatch.setattr(speed, "race", None)
    monkeypatch.setattr(speed, "FIXED", {})
    with torch.inference_mode():
        model, _ = llava.load(str(checkpoints[family]), device="cpu", dtype="float32", quantize=quantize_to)
    assert model.ways == {}
    assert not any(isinstance(layer, packed.PackedLinear) for layer in model.modules())
    assert all(not getattr(layer, "most", 0) for layer in model.modules())
    attend = model.llama.blocks[0].attention.attend
    assert attend.one_query is llama.attend and not attend.tell


@pytest.mark.parametrize("quantize_to", [None, "int8", "int4"])
def test_sixteen_bits_are_timed_on_the_sizes_of_the_model(checkpoints, family, quantize_to, monkeypatch):
    """Whatever is found to be the fastest computes the same."""
    folder, settings = str(checkpoints[family]), dict(device="cpu", dtype="bfloat16", quantize=quantize_to)
    with torch.inference_mode():
        plain, processor = llava.load(folder, **settings)
        monkeypatch.setattr(speed, "FIXED", {})
        model, _ = llava.load(folder, **settings)
    questions = {"products", "one query"}
    if quantize_to:
        assert {"8 bits", "8 bits, many rows"} <= set(model.ways)
        assert ("4 bits" in model.ways) == (quantize_to == "int4")
    assert questions <= set(model.ways) and all(why != "fixed" for _, why in model.ways.values())
    inputs = processor("USER: hello, how are you today? ASSISTANT:")
    with torch.no_grad():
        a, b = model(**inputs).logits.float(), plain(**inputs).logits.float()
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.1 * b.std().item())


def test_a_kernel_serves_as_many_rows_as_it_is_faster_for(monkeypatch):
    found = {"8 bits, many rows": "float32", "8 bits": "torch", "8 bits, 4 rows": "torch", "8 bits, 16 rows": "plain"}
    monkeypatch.setattr(speed, "fastest", lambda question, ways, noted: found[question])
    settings = speed.fastest_kernel(quantize.Int8Linear, (64, 64), torch.bfloat16, {})
    assert settings == {"wide": True, "kernel": "torch", "most": 4}
    found["8 bits"] = "plain"
    assert speed.fastest_kernel(quantize.Int8Linear, (64, 64), torch.bfloat16, {}) == {"wide": True}
    monkeypatch.setattr(speed, "fastest", lambda question, ways, noted: list(ways)[-1])  # it wins each time
    settings = speed.fastest_kernel(quantize.Int4Linear, (64, 64), torch.bfloat16, {})
    assert settings == {"wide": True, "kernel": "torch", "most": sys.maxsize}


class Recorder(torch.nn.Linear):
    """Notes how many rows it multiplies; by a clock of its own it takes 5 seconds to be laid out."""

    rows, clock, seconds = [], [0], itertools.repeat(5)

    def pack(self):
        self.clock[0] += next(self.seconds)

    def forward(self, x):
        self.rows.append((len(x), self.out_features, id(self)))
        return x


@torch.inference_mode()
def test_an_answer_begins_with_laying_its_matrix_out(monkeypatch):
    monkeypatch.setattr(speed.time, "perf_counter", lambda: Recorder.clock[0])
    assert speed.answer((64, 64), 256, Recorder, torch.float32)() == 5
    assert speed.answer((64, 64), 256, torch.nn.Linear, torch.float32)() == 0
    monkeypatch.setattr(Recorder, "seconds", itertools.chain([90, 80], itertools.repeat(5)))  # something disturbed it
    assert speed.answer((64, 64), 256, Recorder, torch.float32)() == 5


@torch.inference_mode()
@pytest.mark.parametrize("grid, positions", [(1, 256), (16, 256), (24, 576)])
def test_an_answer_stands_behind_a_picture(monkeypatch, large, grid, positions):
    seconds = {1: 3, speed.PROMPT: 512}  # of a word, and of so many positions
    monkeypatch.setattr(speed, "filled", lambda rows, *_: (7, lambda: seconds[rows]))
    large.vision.grid = grid
    assert speed.sizes(large) == ((1024, 64000), positions)
    assert speed.answer(*speed.sizes(large), torch.nn.Linear, torch.float32)() == 7 + 300 + 2 * positions


@torch.inference_mode()
def test_what_is_timed_with_few_rows_is_read_from_memory(monkeypatch):
    """From several matrices, unless one is large; with many rows a part of a matrix is enough."""
    monkeypatch.setattr(speed, "NUMBERS", {"few": 64 * 100, "many": 64 * 70})
    for rows, part, streamed, copies in ((1, 100, 1e3, 1), (1, 100, 64 * 100 * 4 * 5, 5), (1, 100, 1e12, speed.COPIES),
                                         (16, 70, 1e12, 1)):  # fmt: skip
        monkeypatch.setattr(speed, "STREAMED", streamed)
        Recorder.rows.clear()
        speed.rows_at_once(rows, Recorder, (64, 700), torch.float32)()
        assert {(found, size) for found, size, _ in Recorder.rows} == {(rows, part)}
        assert len({layer for *_, layer in Recorder.rows}) == copies


def test_what_is_timed_has_the_sides_of_the_matrix_that_counts_most():
    with torch.device("meta"):
        model = llava.Llava(llava.LlavaConfig())
    assert speed.largest(model) == (4096, 11008)


# ----------------------------------------------------------------------------------------------------------------
# dtype="auto" on a CPU


@pytest.fixture
def large():
    """A model on the meta device that is large enough for its dtype to be timed, and has a picture's size."""
    text = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, vocab_size=64000)
    with torch.device("meta"):
        return llava.Llava(llava.LlavaConfig(text_config=llama.TextConfig(**text, num_attention_heads=8)))


@pytest.fixture
def seconds(monkeypatch):
    """What a race finds, to be filled: {way: seconds}; the races that were held."""
    found, held = {}, []

    def race(ways):
        held.append([*ways])
        return {name: found[name] for name in ways}

    monkeypatch.setattr(speed, "FIXED", {})
    monkeypatch.setattr(speed, "race", race)
    monkeypatch.setattr(packed, "kinds", lambda dtype: {"packed": packed.PackedLinear})
    return found, held


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("wide, half, packs, dtype, products", [
    (1, 2, 2, torch.float32, None), (2, 1, 1, torch.bfloat16, "plain"), (2, 3, 1, torch.bfloat16, "packed"),
    (2, 1.9, 1.85, torch.float32, None), (4, 1, 0.5, torch.bfloat16, "packed"), (4, 1, 0.95, torch.bfloat16, "plain"),
])  # fmt: skip
def test_the_products_that_were_timed_with_the_dtype_are_not_timed_again(
    large, seconds, inference, wide, half, packs, dtype, products
):
    (found, held), ways = seconds, {}
    found |= {"float32": wide, "bfloat16": half, "bfloat16 packed": packs}
    with torch.inference_mode(inference):
        chosen = speed.fastest_dtype(large, torch.device("cpu"), torch.float16, None, ways)
        if not inference:  # then nothing is packed
            assert held == [["float32", "bfloat16"]] and [*ways] == ["dtype"]
            assert chosen == (torch.bfloat16 if half < speed.MARGIN * wide else torch.float32)
            return
        assert chosen == dtype and held == [["float32", "bfloat16", "bfloat16 packed"]]
        assert ways.get("products", (None,))[0] == products
        if products:
            kind = speed.fastest_product(*speed.sizes(large), dtype, ways)
            assert kind is {"plain": torch.nn.Linear, "packed": packed.PackedLinear}[products] and len(held) == 1


def test_a_cpu_takes_sixteen_bits_where_others_do_not_fit(large, seconds, monkeypatch):
    """However slow they are."""
    numbers = speed.count_parameters(large)
    seconds[0].update({"float32": 1, "bfloat16": 9})
    for room, dtype in ((4 * numbers, torch.float32), (4 * numbers - 1, torch.bfloat16)):
        monkeypatch.setattr(speed.memory, "limit", lambda processes, room=room: (room, "this machine"))
        assert speed.fastest_dtype(large, torch.device("cpu"), torch.float16, None, {}) == dtype


def test_a_way_without_another_says_so():
    noted = {}
    assert speed.fastest("q", {"plain": None}, noted) == "plain" and noted == {"q": ("plain", "there is no other")}


# ----------------------------------------------------------------------------------------------------------------
# dtype="auto" on a GPU


@pytest.mark.parametrize(
    "stored, native, chosen",
    [
        (torch.bfloat16, False, torch.float16),  # a T4, a V100: bfloat16 would be emulated
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float16, False, torch.float16),
        (torch.float16, True, torch.float16),
        (torch.float32, False, torch.float32),
        (torch.float64, True, torch.float32),
    ],
)
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_auto_is_a_dtype_that_the_gpu_has_units_for(monkeypatch, stored, native, chosen, quantize):
    asked = []

    def supported(including_emulation=True):
        asked.append(including_emulation)
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    with torch.device("meta"):
        model = torch.nn.Linear(8, 8)
    assert speed.fastest_dtype(model, torch.device("cuda"), stored, quantize, {}) == chosen
    assert not any(asked)


def test_each_gpu_is_asked_for_itself(monkeypatch):
    """The second may be older than the first."""
    current = [0]

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: current[-1] == 0)
    dtypes = [speed.fastest_dtype(None, torch.device("cuda", i), torch.bfloat16, None, {}) for i in (0, 1)]
    assert dtypes == [torch.bfloat16, torch.float16] and current == [0]


# ----------------------------------------------------------------------------------------------------------------
# Memory


def test_the_limit_that_holds_is_named(monkeypatch):
    with torch.device("meta"):
        model = torch.nn.Linear(1000, 1000, bias=False)
    for there, words in (((3_999_999, "ulimit -v"), r"take 0\.0 GB in float32 .* \(ulimit -v\).*--model tiny"),
                         ((4_000_000, "ulimit -v"), None), (None, None)):  # fmt: skip
        monkeypatch.setattr(speed.memory, "limit", lambda processes, there=there: there)
        if words is None:
            assert speed.too_large(model, torch.device("cpu"), torch.float32) is None
        else:
            assert re.search(words, speed.too_large(model, torch.device("cpu"), torch.float32))


def test_processes_of_torchrun_share_the_memory(monkeypatch):
    asked = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(speed.memory, "limit", lambda processes: asked.append(processes))
    speed.too_large(torch.nn.Linear(1, 1), torch.device("cpu"), torch.float32)
    assert asked == [4]


@pytest.fixture
def numberless():
    """(A model on the meta device, how many numbers it has)."""
    text = dict(hidden_size=128, intermediate_size=1024, num_hidden_layers=4, vocab_size=64, num_attention_heads=4)
    with torch.device("meta"):
        model = llava.Llava(llava.LlavaConfig(text_config=llama.TextConfig(**text)))
        model.vision, model.projector = torch.nn.Identity(), torch.nn.Identity()
    return model, sum(tensor.numel() for tensor in model.parameters())


@pytest.mark.parametrize("size, fits", [(2, True), (4, False), (None, True)])
def test_memory_is_judged_by_config_and_size_before_a_download(monkeypatch, numberless, size, fits):
    """There are 3 bytes for each number: enough if it is stored in 16 bits, as is assumed where nobody says."""
    model, numbers = numberless
    monkeypatch.setattr(speed.memory, "limit", lambda processes: (3 * numbers, "this machine"))
    monkeypatch.setattr(speed, "fastest_dtype", lambda model, device, stored, *_: stored)
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="the weights take"):
        speed.check_before_download(model, torch.device("cpu"), "auto", None, size and size * numbers)
    with pytest.raises(ValueError, match="in float64"):
        speed.check_before_download(model, torch.device("cpu"), torch.float64, None, size and size * numbers)


def test_memory_is_judged_with_the_bits_that_are_asked_for(monkeypatch, numberless):
    """And the model itself stays as it is: its names are still to be compared with those of the files."""
    model, numbers = numberless
    names = set(model.state_dict())
    monkeypatch.setattr(speed.memory, "limit", lambda processes: (numbers, "this machine"))
    speed.check_before_download(model, torch.device("cpu"), torch.bfloat16, "int4")
    with pytest.raises(ValueError, match="in bfloat16"):
        speed.check_before_download(model, torch.device("cpu"), torch.bfloat16, None)
    assert set(model.state_dict()) == names
