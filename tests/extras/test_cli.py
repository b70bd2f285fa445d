"""The command line: the answer on stdout and nothing else, everything else on stderr, and one line for a mistake.

Most tests call main in this process; a few start a real one, for what belongs to processes: pipes, signals, the exit
status.
"""

import ast
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import ENVIRONMENT
from pictures import exif, jpeg_with, tiff
from PIL import Image
from reference import EDGE, ROOT, TOKENIZER, expanded
from talkers import COST, CUT, EOS, byte_ids, expected, make_brief_talker, make_talker, say

import llava
import weights
from extras import chat, cli, memory


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A checkpoint whose answers last for many seconds."""
    return make_talker(tmp_path_factory.mktemp("long"), text={"max_position_embeddings": 8192})


# ----------------------------------------------------------------------------------------------------------------
# The answer


def test_the_answer_alone_is_on_stdout(ask, ours, pictures):
    found = ask("--image", pictures[0], "--prompt", "What is there?", "--max-new-tokens", 20)
    text = expected(ours, "What is there?", pictures[:1], max_new_tokens=20)
    assert found.status == 0 and len(text) > 20
    assert found.out == text + "\n"
    cost, cut = found.err.splitlines()
    assert re.fullmatch(COST, cost)[1] and re.fullmatch(COST, cost)[2] == "20" and cut == CUT.format(20)
    assert (
        ask("--image", pictures[1], "--prompt", "What is there?", "--max-new-tokens", 20).out != found.out
    )  # it looks


def test_the_default_question(ask, ours, pictures):
    found = ask("--image", pictures[0], "--max-new-tokens", 9)
    assert found.out == expected(ours, "Describe the image.", pictures[:1], max_new_tokens=9) + "\n"


def test_several_pictures_belong_to_one_question(ask, ours, pictures):
    found = ask("--image", *pictures, "--max-new-tokens", 9)
    assert found.out == expected(ours, "Describe the image.", pictures, max_new_tokens=9) + "\n"
    assert found.out != ask("--image", *reversed(pictures), "--max-new-tokens", 9).out


def test_text_alone(ask, ours):
    found = ask("--prompt", "Hello", "--max-new-tokens", 9)
    assert found.out == expected(ours, "Hello", max_new_tokens=9) + "\n"
    assert re.fullmatch(COST, found.err.splitlines()[0])[1] is None


def test_standard_input_is_a_picture(ask, monkeypatch, pictures):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(pictures[1]).read_bytes())))
    found = ask("--image", pictures[0], "-", "--max-new-tokens", 9)
    assert found.status == 0 and found.out == ask("--image", *pictures[:2], "--max-new-tokens", 9).out


def test_an_answer_that_ends_has_no_notice(tmp_path, main, pictures):
    brief = make_brief_talker(tmp_path, "llama", "float32", "Hi", pictures[0])
    answer = brief[0].generate(**brief[1].chat([("user", "Hi")], pictures[0]))[0].tolist()
    found = main("--model", tmp_path, "--device", "cpu", "--image", pictures[0], "--prompt", "Hi")
    assert answer[-1] == EOS and found.out == brief[1].decode(answer[:-1]) + "\n"
    assert re.fullmatch(COST + "\n", found.err)[2] == str(len(answer))  # the end is a token too


@pytest.mark.parametrize("number", [1, 2, 7])
def test_max_new_tokens(ask, ours, number):
    found = ask("--prompt", "Hello", "--max-new-tokens", number)
    assert found.out == expected(ours, "Hello", max_new_tokens=number) + "\n"
    assert re.fullmatch(COST, found.err.splitlines()[0])[2] == str(number) and found.err.endswith(
        CUT.format(number) + "\n"
    )


def test_a_letter_that_stdout_lacks_is_no_error(monkeypatch, folder):
    say(monkeypatch, byte_ids("café"))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli.main(["--model", str(folder), "--device", "cpu", "--prompt", "Describe the image."]) == 0
    assert written.getvalue() == b"caf?\n"


# ----------------------------------------------------------------------------------------------------------------
# Options


def test_defaults():
    assert vars(cli.parse([])) == {
        "image": [], "prompt": "Describe the image.", "model": "llava-hf/llava-1.5-7b-hf", "revision": None,
        "device": "auto",
        "dtype": "auto", "quantize": None, "compile": False, "max_new_tokens": 512, "temperature": 0.0, "top_p": 1.0,
        "top_k": None, "num_beams": 1, "seed": None,
        "pad": None, "system": None, "show_prompt": False, "trace": False, "explain": None, "chat": False,
        "each": False,
        "batch_size": None, "out": None, "choices": None, "asked": False,
    }  # fmt: skip


def test_the_model_options_reach_load(main, monkeypatch):
    seen = []
    monkeypatch.setattr(llava, "load", lambda *args, **kwargs: seen.append((args, kwargs)) or ours_fails())

    def ours_fails():
        raise ValueError("enough")

    main("--prompt", "Hi")
    main(
        "--prompt",
        "Hi",
        "--model",
        "a/b",
        "--revision",
        "v1",
        "--device",
        "cpu",
        "--dtype",
        "float16",
        "--quantize",
        "int4",
        "--compile",
    )
    assert seen == [
        (("llava-hf/llava-1.5-7b-hf",), dict(device="auto", dtype="auto", quantize=None, compile=False, revision=None)),
        (("a/b",), dict(device="cpu", dtype="float16", quantize="int4", compile=True, revision="v1")),
    ]


@pytest.mark.parametrize("options", [[], ["--num-beams", "2"], ["--chat"]])
def test_the_answer_s_line_ends_before_the_cost(monkeypatch, options):
    """On a terminal both go to the same place."""
    both = io.StringIO()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    assert cli.main(["--model", "tiny", "--device", "cpu", "--prompt", "Hi", "--max-new-tokens", "3", *options]) == 0
    assert re.search(r"^prefill \d+ ms, ", both.getvalue(), re.M), both.getvalue()


def test_a_model_is_loaded_for_answers_only(main, monkeypatch):
    modes = []

    def load(*args, **kwargs):
        modes.append(torch.is_inference_mode_enabled())
        raise ValueError("enough")

    monkeypatch.setattr(llava, "load", load)
    for options in ([], ["--chat"], ["--each", "--image", "a.png"], ["--choices", "a"]):
        main("--prompt", "Hi", *options)
    assert modes == [True] * 4 and not torch.is_inference_mode_enabled()


def test_dtype(monkeypatch, ask):
    seen = []
    generate = llava.Llava.stream
    monkeypatch.setattr(llava.Llava, "stream", lambda self, *a, **k: seen.append(self.dtype) or generate(self, *a, **k))
    for name in ("float32", "bfloat16", "float16"):
        assert ask("--prompt", "Hi", "--max-new-tokens", 2, "--dtype", name).status == 0
    assert seen == [torch.float32, torch.bfloat16, torch.float16]


def test_greedy_by_default_and_always_the_same(ask):
    first, again, seeded = (ask("--prompt", "Hi", "--max-new-tokens", 9, *more).out for more in ([], [], ["--seed", 3]))
    assert first == again == seeded


def test_sampling(ask, ours):
    def sampled(*options, words=("--prompt", "Hi", "--max-new-tokens", 12)):
        return ask(*words, *options).out.removesuffix("\n")

    hot = dict(max_new_tokens=12, temperature=1.5)
    seeds = [sampled("--temperature", 1.5, "--seed", seed) for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert seeds == [expected(ours, "Hi", seed=seed, **hot) for seed in (1, 1, 2)]
    assert sampled("--temperature", 1.5) != sampled("--temperature", 1.5)  # without a seed
    for option, name, value in (("--top-k", "top_k", 3), ("--top-p", "top_p", 0.5)):
        found = sampled("--temperature", 1.5, "--seed", 1, option, value)
        assert found == expected(ours, "Hi", seed=1, **hot, **{name: value}) != seeds[0]
    greedy = sampled()
    assert (
        greedy
        == sampled("--temperature", 1.5, "--top-k", 1)
        == sampled("--temperature", 1.5, "--top-p", 1e-6)
        != seeds[0]
    )


def test_beams(watch, ours):
    screen = watch("--prompt", "Hi", "--max-new-tokens", 12, "--num-beams", 4)
    found = expected(ours, "Hi", max_new_tokens=12, num_beams=4)
    assert screen.getvalue() == found + "\n"
    assert found != expected(ours, "Hi", max_new_tokens=12)
    assert screen.pieces[0][0].startswith(found)  # all at once
    assert screen.rows == {1, 4}  # the prompt, and the steps of all beams


def test_pad_and_crop(ask, ours, pictures):
    padded, cropped = (ask("--image", pictures[0], "--max-new-tokens", 9, *more).out for more in (["--pad"], []))
    assert padded == expected(ours, "Describe the image.", pictures[:1], pad=True, max_new_tokens=9) + "\n" != cropped


def test_system(ask, ours):
    authors = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    answers = [expected(ours, "Hi", max_new_tokens=9) + "\n"]
    for given, sentence in (("authors", authors), ("Be brief.", "Be brief.")):
        found = ask("--prompt", "Hi", "--max-new-tokens", 9, "--system", given, "--show-prompt")
        assert found.err.startswith(f'prompt: "<s>{sentence} USER: Hi ASSISTANT:"' if "'" in sentence else
                                    f"prompt: '<s>{sentence} USER: Hi ASSISTANT:'")  # fmt: skip
        answers.append(found.out)
        assert found.out == expected(ours, "Hi", turns=[("system", sentence)], max_new_tokens=9) + "\n"
    assert len(set(answers)) == 3


def shown(err):
    """What --show-prompt says: the string, the ids, the shapes."""
    return [ast.literal_eval(re.search(rf"^{key}: (.*)$", err, re.M)[1]) for key in ("prompt", "ids")]


def test_show_prompt(ask, ours, pictures):
    arguments = ("--image", *pictures[:2], "--prompt", "What is there?", "--max-new-tokens", 5)
    plain, found = ask(*arguments), ask(*arguments, "--show-prompt")
    assert found.out == plain.out and "prompt" not in plain.err
    text = "USER: <image>\n<image>\nWhat is there? ASSISTANT:"
    inputs = ours[1](text, pictures[:2])
    ids = TOKENIZER.encode(text).ids
    assert shown(found.err) == ["<s>" + text, ids] and inputs["input_ids"].tolist() == [ids]
    size = expanded(inputs["input_ids"])[0].shape[1]
    shapes = f"shapes: input_ids (1, {len(ids)}), pixel_values (2, 3, {EDGE}, {EDGE}), expanded to {size} positions"
    assert found.err.splitlines()[2] == shapes


@pytest.mark.parametrize("words", ["<image>", "How do I write </s> and <image>?", "<s><pad><unk>"])
def test_what_is_typed_is_text(ask, ours, pictures, words):
    found = ask("--image", pictures[0], "--prompt", words, "--max-new-tokens", 5, "--show-prompt")
    assert found.status == 0
    string, ids = shown(found.err)
    assert string == f"<s>USER: <image>\n{words} ASSISTANT:"
    assert [ids.count(TOKENIZER.token_to_id(token)) for token in ("<s>", "<image>", "</s>", "<pad>", "<unk>")] == [
        1,
        1,
        0,
        0,
        0,
    ]
    assert words in ours[1].decode(ids)
    assert ask("--prompt", "Hi", "--system", words, "--choices", words, "no").status == 0


def test_bytes_that_are_no_characters(ask):
    """As the system hands them over: 0xff becomes U+DCFF."""
    found = ask("--prompt", "caf\udcc3\udca9 \udcff", "--system", "\udcff", "--max-new-tokens", 3, "--show-prompt")
    assert found.status == 0 and shown(found.err)[0] == "<s>\ufffd USER: café \ufffd ASSISTANT:"
    assert ask("--prompt", "Hi", "--choices", "\udcff", "no").out.splitlines()[0].endswith("\t\ufffd")


def test_the_model_says_what_it_is(tmp_path, folder, main):
    copy = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"description": "It knows shapes and nothing else."}))
    found = main("--model", copy, "--device", "cpu", "--prompt", "Hi", "--max-new-tokens", 3)
    assert found.err.startswith("notice: It knows shapes and nothing else.\n") and "shapes" not in found.out


def test_a_warning_is_a_notice(ask, tmp_path, pictures):
    frames = [Image.open(name).resize((30, 30)) for name in pictures]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    found = ask("--image", tmp_path / "moving.gif", "--max-new-tokens", 3)
    assert found.status == 0
    assert (
        found.err.splitlines()[0] == f"notice: {tmp_path}/moving.gif holds several pictures; only the first one is used"
    )


# ----------------------------------------------------------------------------------------------------------------
# Choices


# ----------------------------------------------------------------------------------------------------------------
# Mistakes: exit status 2, and one line that says what is wrong


def damaged(folder, tmp_path, name, change):
    """A copy of a checkpoint in which one file is another."""
    copy = shutil.copytree(folder, tmp_path / "damaged")
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    return ["--model", copy]


def other(content, **values):
    return json.dumps(json.loads(content) | values).encode()


MISTAKES = {  # name: (arguments made from a good folder, an empty one and a picture, what the line must say)
    "no such picture": (lambda *_: ["--image", "nowhere.png"], r"no such picture: nowhere\.png"),
    "a folder": (lambda folder, tmp, _: ["--image", tmp], "is a folder: name the pictures in it"),
    "not a picture": (lambda folder, *_: ["--image", folder / "config.json"], r"config\.json is not a picture"),
    "the second of two": (lambda folder, tmp, picture: ["--image", picture, "nowhere.png"], "no such picture: nowhere"),
    "a name of two lines": (lambda *_: ["--image", "no\nwhere.png"], "no such picture: no where"),
    "an address": (lambda *_: ["--image", "https://example.org/x.png"], "download it first"),
    "no such model": (lambda *_: ["--model", "no/such/folder"], r"no model folder no/such/folder: .*tiny"),
    "not in the cache": (
        lambda *_: ["--model", "some/thing"], "some/thing is not in the cache.*a folder, or --model tiny"),
    "an empty folder": (lambda folder, tmp, _: ["--model", tmp], r"holds no config\.json"),
    "another architecture": (
        lambda folder, tmp, _: damaged(folder, tmp, "config.json", lambda old: other(
            old, model_type="qwen2_vl", architectures=["Qwen2VLForConditionalGeneration"])),
        "describes a Qwen2VLForConditionalGeneration",
    ),
    "another language model": (
        lambda folder, tmp, _: damaged(
            folder, tmp, "config.json", lambda old: other(old, text_config={"model_type": "opt"})),
        "'opt'; supported: llama, mistral",
    ),
    "half the weights": (
        lambda folder, tmp, _: damaged(folder, tmp, "model.safetensors", lambda old: old[: len(old) // 2]),
        r"model\.safetensors is damaged",
    ),
    "no weights": (lambda folder, tmp, _: damaged(folder, tmp, "model.safetensors", lambda old: b""), "is damaged"),
    "half a config": (
        lambda folder, tmp, _: damaged(folder, tmp, "config.json", lambda old: old[:99]),
        r"config\.json is not valid JSON",
    ),
    "no tokenizer": (
        lambda folder, tmp, _: damaged(folder, tmp, "tokenizer.json", lambda old: b"{\n"),
        "cannot be read as a tokenizer",
    ),
    "no GPU": (lambda *_: ["--device", "cuda"], "no device 'cuda'.*--device cpu"),
    "no such GPU": (lambda *_: ["--device", "cuda:7"], "no device 'cuda:7'"),
    "no device": (lambda *_: ["--device", "toaster"], "no device 'toaster': auto, cuda, mps, cpu are known"),
    "a device without numbers": (lambda *_: ["--device", "meta"], "no device 'meta'"),
    "no dtype": (lambda *_: ["--dtype", "float7"], "no dtype 'float7' here: auto, float64, float32, float16, bfloat16"),
    "no floating-point dtype": (lambda *_: ["--dtype", "int8"], "no dtype 'int8' here"),
    "each of nothing": (lambda *_: ["--each"], "--each needs pictures"),
    "too long": (lambda *_: ["--prompt", "word " * 600], r"take \d+ positions, and the model has 512: ask for less"),
    "too many pictures": (
        lambda folder, tmp, picture: ["--image", *[picture] * 40], "positions, and the model has 512"),
    "a choice too long": (lambda *_: ["--choices", "yes", "word " * 600], r"take \d+ positions, and the model has 512"),
}  # fmt: skip
OPTIONS = {  # options that nothing need be read for: what the line must say
    "--temperature -0.1": "temperature is -0.1, and must be 0",
    "--temperature nan": "temperature is nan",
    "--temperature inf": "temperature is inf",
    "--temperature warm": "--temperature: invalid float value: 'warm'",
    "--top-p 0": "top_p is 0.0, and must be above 0 and at most 1",
    "--top-p 1.5": "top_p is 1.5",
    "--top-p nan": "top_p is nan",
    "--top-k 0": "top_k is 0, and must be at least 1",
    "--top-k 1.5": "--top-k: invalid int value",
    "--max-new-tokens 0": "max_new_tokens is 0, and must be at least 1",
    "--max-new-tokens -3": "max_new_tokens is -3",
    "--num-beams 0": "num_beams is 0, and must be 1 to 256",
    "--num-beams 257": "num_beams is 257, and must be 1 to 256",
    "--num-beams 2 --temperature 1": "beam search does not sample",
    "--seed 99999999999999999999": "seed is 99999999999999999999, and must be",
    "--seed x": "--seed: invalid int value",
    "--chat --each": "--each: not allowed with argument --chat",
    "--choices a --chat": "--chat: not allowed with argument --choices",
    "--choices": "--choices: expected at least one argument",
    "--image": "--image: expected at least one argument",
    "--frobnicate": "unrecognized arguments: --frobnicate",
    "question": "unrecognized arguments: question",
}


def is_one_line(found, message):
    assert found.status == 2 and found.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", found.err) and "Traceback" not in found.err
    assert re.search(message, found.err)
    return True


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(ask, monkeypatch, folder, tmp_path, pictures, mistake):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # also where there is one
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    make, message = MISTAKES[mistake]
    (tmp_path / "empty").mkdir()
    assert is_one_line(
        ask("--prompt", "Hi", "--max-new-tokens", 3, *make(folder, tmp_path / "empty", pictures[0])), message
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_options_out_of_range(monkeypatch, main, options):
    monkeypatch.setattr(llava, "load", lambda *_, **__: pytest.fail("this must be said before a model is loaded"))
    assert is_one_line(main(*options.split()), OPTIONS[options])


def test_a_temperature_next_to_zero_is_no_crash(ask):
    """1e-45 divides logits to infinity; whatever is answered, it is not a traceback."""
    found = ask("--prompt", "Hi", "--max-new-tokens", 3, "--temperature", "1e-45")
    assert found.status == 0 or is_one_line(found, "temperature")


def test_pictures_are_looked_at_before_a_model_is_loaded(main, monkeypatch):
    monkeypatch.setattr(llava, "load", lambda *_, **__: pytest.fail("the picture first"))
    assert is_one_line(main("--image", "nowhere.png"), "no such picture")


def test_weights_larger_than_the_memory(ask, monkeypatch):
    monkeypatch.setattr(weights, "read", lambda *_, **__: pytest.fail("this must be said before they are read"))
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    assert is_one_line(ask("--prompt", "Hi"), r"take 0\.0 GB in float32 and the cpu has 0\.0 GB.*--model tiny")


def test_a_device_that_is_full(ask, monkeypatch):
    monkeypatch.setattr(llava.Llava, "stream", raising(torch.OutOfMemoryError("CUDA out of memory")))
    assert is_one_line(ask("--prompt", "Hi"), "too little memory")


LACKS = {  # what torch, numpy and Pillow raise where the machine lacks something → what the line must say
    "a GPU that is full": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "memory: .*bfloat16"),
    "a Mac that is full": (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "too little memory"),
    "memory that is full": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:122] DefaultCPUAllocator: can't allocate memory: you tried to "
                     "allocate 9"),
        "too little memory.*--model tiny",
    ),
    "no memory for Python": (MemoryError(), "too little memory"),
    "a file that cannot be mapped": (
        RuntimeError("unable to mmap 4992933400 bytes from file <m.safetensors>: Cannot allocate memory (12)"),
        "too little memory.*--model tiny",
    ),
    "a file that cannot be mapped by safetensors": (MemoryError("Cannot allocate memory (os error 12)"), "too little"),
    "no memory for a thread": (RuntimeError("fork: Cannot allocate memory"), "too little memory"),
    "a device that vanishes": (
        RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported"),
        r"the device failed \(CUDA error: unspecified launch failure\): start again, or try --device cpu$",
    ),
    "a device that was unplugged": (
        RuntimeError("CUDA error: no CUDA-capable device is detected\nx"), "the device failed"),
}  # fmt: skip


@pytest.mark.parametrize("lack", LACKS)
def test_what_the_machine_lacks_is_said_in_one_sentence(ask, monkeypatch, lack):
    error, message = LACKS[lack]
    monkeypatch.setattr(llava.Llava, "stream", raising(error))
    assert is_one_line(ask("--prompt", "Hi"), message)
    monkeypatch.setattr(llava, "load", raising(error))
    assert is_one_line(ask("--prompt", "Hi"), message)


def test_memory_that_is_limited_is_said_with_the_limit(ask, monkeypatch):
    full = RuntimeError("unable to mmap 4992933400 bytes from file <m.safetensors>: Cannot allocate memory (12)")
    monkeypatch.setattr(llava, "load", raising(full))
    monkeypatch.setattr(memory, "limit", lambda: (7_500_000_000, "ulimit -v"))
    assert is_one_line(ask("--prompt", "Hi"), r"too little memory \(7\.5 GB by ulimit -v\): try .*--model tiny")
    for unknown in (None, (7_500_000_000, memory.MACHINE)):
        monkeypatch.setattr(memory, "limit", lambda unknown=unknown: unknown)
        assert is_one_line(ask("--prompt", "Hi"), "too little memory: try .*--model tiny")


def test_an_assertion_on_a_device_is_our_own_mistake(ask, monkeypatch):
    monkeypatch.setattr(llava.Llava, "stream", raising(RuntimeError("CUDA error: device-side assert triggered\n")))
    with pytest.raises(RuntimeError):
        ask("--prompt", "Hi")


def test_a_system_without_readline(monkeypatch):
    """Windows has no readline module."""
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setitem(sys.modules, "readline", None)
    monkeypatch.setattr("builtins.input", lambda prompt: "Hello")
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert chat.read_line() == "Hello"


def test_what_comes_from_outside_does_not_speak_to_the_terminal(tmp_path, folder, main):
    """Neither the description of a checkpoint nor a field of it: one line, without escapes, of a bounded length."""
    copy = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    description = "\x1b[2J\x1b]0;x\x07one\nnotice: two\u202e" + "é" * 5000
    (copy / "config.json").write_text(json.dumps(config | {"description": description}))
    said = main("--model", copy, "--device", "cpu", "--prompt", "Hi", "--max-new-tokens", 2).err.splitlines()[0]
    assert (
        said.startswith("notice:  [2J ]0;x one notice: two éé")
        and said.endswith(" … " + "é" * 495)
        and len(said) < 1100
    )
    (copy / "config.json").write_text(json.dumps(config | {"unknown\x1b[31m": ["x\n"] * 10_000}))
    assert is_one_line(
        main("--model", copy, "--device", "cpu", "--prompt", "Hi"),
        r"the field unknown \[31m = .* … .*might change what",
    )


def raising(error):
    def f(*_, **__):
        raise error

    return f


def test_our_own_mistakes_keep_their_traceback(ask, monkeypatch):
    for error in (RuntimeError, KeyError, TypeError, IndexError):
        monkeypatch.setattr(llava.Llava, "stream", raising(error("a bug")))
        with pytest.raises(error):
            ask("--prompt", "Hi")


def test_an_interrupt_is_130(ask, monkeypatch, capsys):
    monkeypatch.setattr(llava.Llava, "stream", raising(KeyboardInterrupt()))
    found = ask("--prompt", "Hi")
    assert found.status == 130 and found.err == ""


# ----------------------------------------------------------------------------------------------------------------
# Processes


def start(folder, *arguments, **streams):
    command = [sys.executable, ROOT / "llava.py", "--model", folder, "--device", "cpu", *arguments]
    return subprocess.Popen(
        list(map(str, command)), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **streams
    )


def test_a_process_in_another_folder_with_a_picture_from_a_pipe(tmp_path, folder, ours, pictures):
    process = start(folder, "--image", "-", "--max-new-tokens", 9, cwd=tmp_path, stdin=subprocess.PIPE)
    out, err = process.communicate(Path(pictures[0]).read_bytes(), timeout=200)
    assert process.returncode == 0
    assert out.decode() == expected(ours, "Describe the image.", pictures[:1], max_new_tokens=9) + "\n"
    assert re.fullmatch(f"{COST}\n{CUT.format(9)}\n", err.decode())


def test_a_stream_whose_reader_goes_away(long):
    """The first words are there while the answer has hardly begun;
    and when nobody reads on, the process ends in silence.
    """
    with start(long, "--prompt", "Hi", "--max-new-tokens", 8000) as process:
        first = os.read(process.stdout.fileno(), 100_000)
        assert 0 < len(first) < 500 and process.poll() is None
        process.stdout.close()
        assert process.wait(200) == 0
        assert process.stderr.read() == b""


def test_an_interrupted_process(long):
    with start(long, "--prompt", "Hi", "--max-new-tokens", 8000) as process:
        os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        assert process.wait(200) == 130
        assert process.stderr.read() == b""


def test_what_is_imported(tmp_path):
    """torch, numpy, safetensors, tokenizers and Pillow; what a small model from a folder does not need is not waited
    for. torch itself holds a compiler, which it imports in two seconds when something asks for it by mistake.
    """
    heavy = "transformers torchvision huggingface_hub requests httpx pandas scipy matplotlib sklearn IPython"
    heavy += " torch._dynamo sympy"
    code = "import sys, llava; llava.load('tiny', device='cpu')\n"
    code += "print(*[name for name in sys.argv[1:] if name in sys.modules])"
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *heavy.split()]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")


def test_nothing_asked_is_the_help(main, monkeypatch):
    """Also beside options; but a mistake in one of them is said first."""
    monkeypatch.setattr(llava, "load", lambda *_, **__: pytest.fail("nothing is asked"))
    for options in ([], ["--model", "tiny"], ["--choices", "yes", "no"]):
        found = main(*options)
        assert found.status == 0 and found.out.startswith("usage: llava.py") and "--each" in found.out
    assert is_one_line(main("--top-p", "0"), "top_p")


def test_help_imports_nothing_heavy():
    code = "import sys; sys.argv = ['llava.py']; from extras import cli; cli.program(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.stdout.splitlines()[-1] == "False" and "usage: llava.py" in run.stdout


def test_what_pillow_warns_of_is_no_notice(ask, tmp_path):
    """The picture is whole. What our own files warn of is one."""
    (tmp_path / "short.jpg").write_bytes(jpeg_with(exif=exif()[:20]))
    with pytest.warns(UserWarning, match="EXIF") as said:
        Image.open(tmp_path / "short.jpg").getexif()
    assert "PIL" in Path(said[0].filename).parts
    assert "notice" not in ask("--image", tmp_path / "short.jpg", "--max-new-tokens", "1000").err.replace(
        "notice: the answer is cut off", ""
    )  # fmt: skip
    (tmp_path / "reduced.tif").write_bytes(tiff(16, 12, (254, 4, 1, 1)))
    assert "notice: " in ask("--image", tmp_path / "reduced.tif", "--max-new-tokens", "4").err


def test_an_error_that_ctrl_c_was_turned_into_is_no_message(monkeypatch, capsys):
    """A library that is interrupted may raise what it likes."""

    def run(options):
        try:
            cli.stop()
        except KeyboardInterrupt:
            raise OSError("a storage cannot be made") from None

    monkeypatch.setattr(cli, "STOPPED", [float("-inf")])
    monkeypatch.setattr(cli, "run", run)
    assert cli.main(["--model", "tiny", "--prompt", "Hi"]) == 130
    assert capsys.readouterr().err == ""
