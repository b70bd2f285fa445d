"""Hostile input to the command line as a whole: a process of its own, its exit status, what it prints, the memory it
takes.

The table in docs/robustness.md names these cases. Each is run in a fork of one clean process that has imported torch,
as starting Python and torch anew would take two seconds a case: from there on it is `python llava.py`, with its own
standard streams.
"""

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from checkpoints import Checkpoint, write_index
from examples import ARGUMENTS, PLAIN, examples
from forks import ENVIRONMENT, SECONDS, Forks
from hypothesis import given
from hypothesis import strategies as st
from pictures import claimed_png, encoded, exif, jpeg_with, picture, png_chunk, png_with, tiff
from PIL import Image
from reference import ROOT, TINY, make_checkpoint

import llava
from extras import cli

pytestmark = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="each case runs in a fork, and its streams are of Linux"
)
MEGABYTES = 450  # what a case may add to the memory that torch and the modules take
LARGE = 750  # the same for the largest picture


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture
def run(forks):
    return forks.run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base"))


def copy_of(base, tmp, **options):
    """A copy of the checkpoint to be broken."""
    return Checkpoint(base, tmp / "copy")


def written(file, content):
    file.write_bytes(content)
    return file


def piped(tmp):
    os.mkfifo(tmp / "pipe")
    return tmp / "pipe"


def animated(tmp):
    frames = [picture(30, 20, seed=seed) for seed in range(3)]
    frames[0].save(tmp / "moving.gif", save_all=True, append_images=frames[1:])
    return tmp / "moving.gif"


def grey_bomb(size):
    """A PNG of 16 bits of grey, all black: hundreds of megabytes out of a few kilobytes."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    pack = zlib.compressobj(9)
    rows = b"".join([*(pack.compress(bytes(1 + 2 * size)) for _ in range(size)), pack.flush()])
    header = struct.pack(">IIBBBBB", size, size, 16, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff_of_channels(number):
    """Pillow logs a line about such a file, which goes to stderr unless somebody listens."""
    data, tag = encoded(picture(9, 9), "TIFF"), struct.pack("<HHI", 277, 3, 1)
    at = data.index(tag) + len(tag)
    return data[:at] + struct.pack("<H", number) + data[at + 2 :]


def indexed(base, tmp, name):
    copy = copy_of(base, tmp)
    write_index(copy.folder, {"x": name})
    return copy.folder


def linked_out(base, tmp):
    copy = copy_of(base, tmp)
    shutil.copy(base / "model.safetensors", tmp / "secret")
    (copy.folder / "a.safetensors").symlink_to(tmp / "secret")
    write_index(copy.folder, {"x": "a.safetensors"})
    return copy.folder


def with_file(base, tmp, name, content):
    copy = copy_of(base, tmp)
    copy.write()
    (copy.folder / name).unlink(missing_ok=True)
    if content is None:
        os.mkfifo(copy.folder / name)
    elif isinstance(content, int):
        with open(copy.folder / name, "wb") as file:
            file.truncate(content)
    else:
        (copy.folder / name).write_bytes(content)
    return copy.folder


def truncated(base, tmp):
    folder = Path(copy_of(base, tmp).write())
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)
    return folder


def incomplete(base, tmp):
    folder = Path(copy_of(base, tmp).write(shards=3))
    (folder / "model-00002-of-00003.safetensors").unlink()
    return folder


def configured(base, tmp, **changes):
    return copy_of(base, tmp).config(**changes).write()


def with_nan(base, tmp):
    copy = copy_of(base, tmp)
    copy.tensors["language_model.model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    return copy.write()


def with_code(base, tmp):
    """Everything in a checkpoint that other programs run: a Python file, a template, a pickle."""
    copy = copy_of(base, tmp)
    touch = f"open({str(tmp / 'ran')!r}, 'w')"
    copy.config(auto_map={"AutoModel": "modeling.Llava"})
    (copy.folder / "modeling.py").write_text(touch)
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp / "ran") + "') }}"
    copy.config("tokenizer_config.json", chat_template=template)
    copy.config("chat_template.json", chat_template=template)
    (copy.folder / "pytorch_model.bin").write_bytes(f"cposix\nsystem\n(S'touch {tmp / 'ran'}'\ntR.".encode())
    return copy.write()


def with_tokens_of_no_kind(base, tmp):
    values = json.loads((TINY / "tokenizer.json").read_text())
    for token in values["added_tokens"]:
        token.update(special=False, normalized=True)
    return with_file(base, tmp, "tokenizer.json", json.dumps(values).encode())


def tokenizer(**changes):
    values = json.loads((TINY / "tokenizer.json").read_text())
    values["model"] |= changes
    return json.dumps(values).encode()


MODEL = "--model"
IMAGE = "--image"
NOISE = bytes(range(256)) * 20
LARGE_TEXT = zlib.compress(bytes(3_000_000))
PICTURES = {  # case: (arguments made from a folder, exit status, what stderr must say)
    "a picture that claims 60000 x 60000 pixels": (
        lambda tmp: [IMAGE, written(tmp / "bomb.png", claimed_png(60000, 60000))], 2, "over 89,478,485 pixels"),
    "a picture of 6000 x 6000 pixels in 70 kB": (
        lambda tmp: [IMAGE, written(tmp / "bomb.png", grey_bomb(6000))], 0, "image"),
    "a thin picture that would grow to gigabytes": (
        lambda tmp: [IMAGE, written(tmp / "thin.png", encoded(Image.new("RGB", (1, 300_000))))], 2, "is too thin"),
    "a picture of 1 x 1 pixel": (lambda tmp: [IMAGE, written(tmp / "dot.png", encoded(picture(1, 1)))], 0, "image"),
    "a picture of 20000 x 30 pixels": (
        lambda tmp: [IMAGE, written(tmp / "wide.png", encoded(picture(20000, 30)))], 0, "image"),
    "half a picture": (
        lambda tmp: [IMAGE, written(tmp / "half.jpg", encoded(picture(90, 60), "JPEG")[:999])], 2,
        "half.jpg cannot be read"),
    "a moving picture": (lambda tmp: [IMAGE, animated(tmp)], 0, "holds several pictures; only the first one is used"),
    "a picture under a wrong name": (
        lambda tmp: [IMAGE, written(tmp / "x.png", encoded(picture(90, 60), "WEBP"))], 0, "image"),
    "a TIFF of 39171 channels": (
        lambda tmp: [IMAGE, written(tmp / "x.tif", tiff_of_channels(39171))], 2, "x.tif is a TIFF that Pillow cannot"),
    "noise": (lambda tmp: [IMAGE, written(tmp / "noise.jpg", NOISE)], 2, "is not a picture in a known format"),
    "a photograph with an odd tag": (
        lambda tmp: [IMAGE, written(tmp / "x.jpg", jpeg_with(exif=exif((0x0128, 4, 1, 70000))))], 0, "image"),
    "tags about which Pillow warns": (
        lambda tmp: [IMAGE, written(tmp / "x.jpg", jpeg_with(exif=exif()[:20]))], 0, "image"),
    "a PNG with a large text": (
        lambda tmp: [IMAGE, written(tmp / "x.png", png_with(png_chunk(b"zTXt", b"x\0\0" + LARGE_TEXT)))], 0, "image"),
    "a camera's raw file": (
        lambda tmp: [IMAGE, written(tmp / "x.dng", tiff(16, 12, (254, 4, 1, 1), inside=(64, 48)))], 2, "raw file"),
    "a reduced picture in front": (
        lambda tmp: [IMAGE, written(tmp / "x.tif", tiff(16, 12, (254, 4, 1, 1)))], 0, "begins with a reduced picture"),
    "a web page in place of a picture": (
        lambda tmp: [IMAGE, written(tmp / "x.jpg", b"<!DOCTYPE html><title>403</title>")], 2, "is a web page"),
    "a HEIC picture": (
        lambda tmp: [IMAGE, written(tmp / "x.jpg", b"\0\0\0\x18ftypheic" + bytes(99))], 2, "is a HEIC picture"),
    "a directory as a picture": (lambda tmp: [IMAGE, tmp], 2, "is a folder: name the pictures in it"),
    "a picture that is not there": (lambda tmp: [IMAGE, tmp / "none.png"], 2, "no such picture"),
    "an address": (lambda tmp: [IMAGE, "https://localhost/x.png"], 2, "download it first"),
    "an endless device": (lambda tmp: [IMAGE, "/dev/zero"], 2, "is not a picture"),
    "nothing on standard input": (lambda tmp: [IMAGE, "-"], 2, "standard input is empty"),
    "one good picture and a bad one": (
        lambda tmp: [IMAGE, written(tmp / "good.png", encoded(picture(9, 9))), written(tmp / "bad.png", NOISE)], 2,
        "bad.png"),
    "a name that would speak to the terminal": (
        lambda tmp: [IMAGE, "x\x1b]0;title\x07\n\udcff.png"], 2, "no such picture: x"),
}  # fmt: skip
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 14126000000\n"
CHECKPOINTS = {  # case: (a folder made from a good one, exit status, what stderr must say)
    "an index that leads to a parent folder": (lambda b, t: indexed(b, t, "../x.safetensors"), 2, "not the bare name"),
    "an index that leads to the root": (lambda b, t: indexed(b, t, "/etc/x.safetensors"), 2, "not the bare name"),
    "an index with a drive letter": (lambda b, t: indexed(b, t, "C:\\x.safetensors"), 2, "not the bare name"),
    "an index with NUL": (lambda b, t: indexed(b, t, "x\0.safetensors"), 2, "not the bare name"),
    "an index that names a pickle": (lambda b, t: indexed(b, t, "pytorch_model.bin"), 2, "not the bare name"),
    "a link out of the folder": (linked_out, 2, "a.safetensors is a link out of the folder"),
    "a header that lies": (
        lambda b, t: with_file(b, t, "model.safetensors", struct.pack("<Q", 2**62) + b"{}"), 2,
        "damaged or not a safetensors"),
    "weights of noise": (lambda b, t: with_file(b, t, "model.safetensors", NOISE), 2, "damaged or not a safetensors"),
    "half the weights": (truncated, 2, "is damaged"),
    "a missing shard": (incomplete, 2, "lacks model-00002-of-00003.safetensors"),
    "a weight that is not a number": (
        with_nan, 2, r"notice: .*layers\.1\.mlp\.up_proj\.weight holds numbers that are not finite"),
    "a pipe in place of the config": (lambda b, t: with_file(b, t, "config.json", None), 2, "holds no config.json"),
    "a pipe in place of the weights": (lambda b, t: with_file(b, t, "model.safetensors", None), 2, "model.safetensors"),
    "a config of a terabyte": (
        lambda b, t: with_file(b, t, "config.json", 10**12), 2, "config.json is larger than any real"),
    "a tokenizer of a terabyte": (
        lambda b, t: with_file(b, t, "tokenizer.json", 10**12), 2, "tokenizer.json is larger than any real"),
    "a config nested a million deep": (lambda b, t: with_file(b, t, "config.json", b"[" * 10**6), 2, "not valid JSON"),
    "a hidden_size of a billion": (
        lambda b, t: configured(b, t, text_config={"hidden_size": 10**9}), 2, "text_config: hidden_size is 1000000000"),
    "a hidden_size that is a string": (
        lambda b, t: configured(b, t, text_config={"hidden_size": "48"}), 2, "text_config: hidden_size is '48'"),
    "an unknown activation": (
        lambda b, t: configured(b, t, text_config={"hidden_act": "relu"}), 2, "hidden_act is 'relu'"),
    "positions that are scaled": (
        lambda b, t: configured(b, t, text_config={"rope_scaling": {"type": "yarn"}}), 2,
        "text_config.rope_scaling is 'yarn'"),
    "an unknown field": (lambda b, t: configured(b, t, wholly_new="x" * 10**6), 2, "the field wholly_new"),
    "a pad id outside the vocabulary, or an end": (
        lambda b, t: with_file(b, t, "generation_config.json", b'{"eos_token_id": 2, "pad_token_id": 640}'), 2,
        "pad_token_id is 640, and the ids of the vocabulary are 0 to 639"),
    "special tokens that the file does not call special": (with_tokens_of_no_kind, 0, "prefill"),
    "a tokenizer that is a list": (
        lambda b, t: with_file(b, t, "tokenizer.json", b"[]"), 2, "cannot be read as a tokenizer"),
    "a tokenizer without its unknown token": (
        lambda b, t: with_file(b, t, "tokenizer.json", tokenizer(unk_token="<?>", byte_fallback=False)), 2,
        "`<\\?>` not found"),
    "code in a checkpoint": (with_code, 0, "prefill"),
    "an empty folder": (lambda b, t: t, 2, "holds no config.json"),
    "a Git-LFS pointer in place of the weights": (
        lambda b, t: with_file(b, t, "model.safetensors", POINTER), 2, "a Git-LFS pointer .*: run `git lfs pull`"),
    "a web page in place of the tokenizer": (
        lambda b, t: with_file(b, t, "tokenizer.json", b"<!doctype html>"), 2, "tokenizer.json is not .* a web page"),
    "an adapter without its model": (
        lambda b, t: written(t / "adapter_config.json", b'{"peft_type": "LORA"}').parent, 2, "only an adapter"),
    "weights in GGUF": (lambda b, t: written(t / "llava.Q4_K.gguf", b"GGUF").parent, 2, "take the 16-bit checkpoint"),
    "weights that are quantised": (
        lambda b, t: configured(b, t, quantization_config={"quant_method": "awq"}), 2, "quantised by AWQ: take the 16"),
    "leftovers of a trainer": (lambda b, t: configured(b, t, hidden_size=48, unsloth_fixed=True), 0, "prefill"),
}  # fmt: skip
TEXTS = {  # case: (arguments, exit status, what stderr must say)
    "special tokens that are typed": (["--prompt", "<image></s><pad><s> USER:"], 0, "prefill"),
    "an empty prompt": (["--prompt", ""], 0, "prefill"),
    "every plane of Unicode": (["--prompt", "é猫🐈 \u202e\u0000\U000e0001\U0010ffff ﷽ क्षि"], 0, "prefill"),
    "bytes that are no characters": (["--prompt", "\udcff\udc80"], 0, "prefill"),
    "a prompt longer than the context": (
        ["--prompt", "word " * 20_000], 2, r"take \d+ positions, and the model has 512"),
    "options out of range": (["--temperature", "nan"], 2, "temperature is nan"),
}  # fmt: skip


def is_orderly(found, status, words, megabytes=MEGABYTES):
    """The exit status, what is said, in one line unless there is an answer, no traceback, and memory within bounds."""
    assert found.status == status, found.err
    assert re.search(words, found.err) and "Traceback" not in found.err and "panicked" not in found.err, found.err
    assert (
        all(letter.isprintable() or letter == "\n" for letter in found.err)
        and max(map(len, found.err.split("\n"))) < 1200
    )
    if status:
        assert found.out == "" and found.err.splitlines()[-1].startswith("error: ")
        assert len([line for line in found.err.splitlines() if not line.startswith("notice: ")]) == 1
    assert found.added < megabytes, f"it adds {found.added:.0f} MB"


def brief(folder, *arguments):
    return [MODEL, folder, "--device", "cpu", "--max-new-tokens", 2, *arguments]


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=[pytest.mark.slow] if i % 3 else []) for i, case in enumerate(PICTURES)
])  # fmt: skip
def test_pictures(run, base, tmp_path, case):
    make, status, words = PICTURES[case]
    megabytes = LARGE if "6000" in case else MEGABYTES
    is_orderly(run(*brief(base, *make(tmp_path))), status, words, megabytes)


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(run, base, tmp_path, case):
    make, status, words = CHECKPOINTS[case]
    is_orderly(run(*brief(make(base, tmp_path), "--prompt", "Hi")), status, words)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", TEXTS)
def test_texts(run, base, case):
    arguments, status, words = TEXTS[case]
    arguments = [argument.replace("\0", "") for argument in arguments]  # no shell can hand that over
    is_orderly(run(*brief(base, *arguments)), status, words)


# ----------------------------------------------------------------------------------------------------------------
# Running


@pytest.mark.parametrize("lacking", ["for a picture", "for a cache"])
def test_memory_that_runs_out(run, base, tmp_path, lacking):
    """Of Pillow or numpy, and of torch: real allocations that the system refuses."""
    folder = configured(base, tmp_path, text_config={"max_position_embeddings": 8192})
    if lacking == "for a picture":
        arguments = [IMAGE, written(tmp_path / "large.png", grey_bomb(6000))]
    else:
        arguments = ["--prompt", "Hi", "--num-beams", 256, "--max-new-tokens", 8000]
    found = run(*brief(folder), *arguments, room=300)
    words = r"error: there is too little memory \(.* by ulimit -v\): try --dtype bfloat16, .* or --model tiny"
    is_orderly(found, 2, words, LARGE)


KEPT = """
import llama

check_sampling, kept = llama.check_sampling, []
llama.check_sampling = lambda *options: kept.append(b"x" * ({} << 20)) or check_sampling(*options)
"""


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [0, MEGABYTES])
def test_the_memory_of_a_case_is_counted(run, base, megabytes):
    found = run(*brief(base, "--prompt", "Hi"), prepare=KEPT.format(megabytes))
    assert found.status == 0 and (found.added > MEGABYTES) == (megabytes > 0)


@pytest.mark.slow
def test_standard_streams_that_are_closed(run, base):
    usual = run(*brief(base, "--prompt", "Hi"))
    assert usual.status == 0 and usual.out
    for closed in ([0], [2], [0, 2]):
        found = run(*brief(base, "--prompt", "Hi"), closed=closed)
        assert (found.status, found.out) == (0, usual.out)
        assert 2 in closed or found.err.startswith("prefill")
    silent = run(*brief(base, "--prompt", "Hi"), closed=[1])
    assert (silent.status, silent.out) == (0, "")
    assert run(*brief(base, "--chat"), closed=[0]).status == 0
    is_orderly(run(*brief(base, IMAGE, "-"), closed=[0]), 2, "standard input is empty")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_an_answer_that_cannot_be_written(run, base):
    full = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    is_orderly(run(*brief(base, "--prompt", "Hi"), prepare=full), 2, "error: No space left on device")


@pytest.mark.slow
def test_a_megabyte_through_a_pipe(run, base):
    found = run(*brief(base, "--chat"), given=b"a" * 10**6 + b"\n" + "猫".encode() * 10**5 + b"\nHi\n")
    assert found.status == 0 and found.added < MEGABYTES
    numbers = re.findall(
        r"^error: text and pictures take (\d+) positions, and the model has 512: ask for less", found.err, re.M
    )
    assert [int(number) > 10**5 for number in numbers] == [True, True]
    assert found.out.startswith("\n\n") and len(found.out) > 3  # the third question is answered


@pytest.mark.slow
def test_a_conversation_of_fifty_turns_and_past_the_end_of_the_context(run, base):
    """A question that does not fit any more is refused with both numbers,
    and says what to do; nothing is dropped silently.
    """
    turns = [f"Question number {i}, if you please?" for i in range(50)]
    found = run(*brief(base, "--chat"), given="".join(turn + "\n" for turn in turns).encode())
    sentence = r"take (\d+) positions, and the model has 512: (\d+) hold what was said so far: ask for less, "
    refused = re.findall(f"^error: text and pictures {sentence}or start a new conversation$", found.err, re.M)
    answered = len(re.findall("tokens/s", found.err))
    assert found.status == 0 and len(found.out.split("\n")) == 51
    assert answered > 5 and len(refused) > 5 and answered + len(refused) == 50
    assert all(int(wanted) > 512 >= int(held) > 450 for wanted, held in refused)


@pytest.mark.slow
def test_a_prompt_that_fills_the_context_exactly_and_one_more(run, base):
    processor = llava.load(base, device="cpu")[1]
    words = "x"
    while processor.chat([("user", words)])["input_ids"].shape[1] < 512:
        words += " a"
    found = run(*brief(base, "--prompt", words, "--show-prompt"))
    assert found.status == 0 and "expanded to 512 positions" in found.err and "cut off after 1 tokens" in found.err
    is_orderly(
        run(*brief(base, "--prompt", words + " a")),
        2,
        "take 513 positions, and the model has 512: ask for less at once$",
    )


def test_a_name_as_the_system_gives_it(run, base, tmp_path):
    """What the system says is shown without its number and its quotes."""
    is_orderly(run(*brief("x" * 5000, "--prompt", "Hi")), 2, "error: x{500}.*x: File name too long$")


COMMAND = [sys.executable, llava.__file__, MODEL, "tiny", "--device", "cpu"]


def interrupted(moment):
    """Start it, wait so many seconds, or until it has loaded a library of that name,
    then press Ctrl-C → status, stderr.
    """
    streams = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen([*COMMAND, "--prompt", "Hi"], env=ENVIRONMENT, **streams) as process:
        end = time.monotonic() + (60 if isinstance(moment, str) else moment)
        while time.monotonic() < end and process.poll() is None:
            if isinstance(moment, str) and moment in Path(f"/proc/{process.pid}/maps").read_text():
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        return process.wait(60), process.stderr.read().decode()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="/proc is Linux's")
@pytest.mark.parametrize("library", ["libtorch_cpu", "_C.cpython", "_imaging.cpython"])
def test_ctrl_c_while_torch_is_imported(library):
    assert interrupted(library) == (130, "")


INTERRUPTED = """
import llama

signal.signal(signal.SIGINT, signal.{})
check_sampling = llama.check_sampling
llama.check_sampling = lambda *args: os.kill(os.getpid(), signal.SIGINT) or check_sampling(*args)
"""


@pytest.mark.slow
@pytest.mark.parametrize("handler, status", [("SIG_IGN", 0), ("default_int_handler", 130)], ids=["ignored", "usual"])
def test_a_job_in_the_background_goes_on_ignoring_ctrl_c(run, base, handler, status):
    """As a shell starts it there: Ctrl-C is for the others."""
    prepare = INTERRUPTED.format(handler)
    found = run(*brief(base, "--prompt", "Hi"), prepare=prepare)
    assert found.status == status and bool(found.out) == (status == 0) and "Traceback" not in found.err


@pytest.mark.slow
def test_ctrl_c_at_any_moment():
    """From the first line of extras/cli.py's `program` to the end of the answer, which takes two seconds."""
    for step in range(16):
        status, err = interrupted(0.1 + step / 8)
        if "in program" not in err and err.startswith("Traceback") and "\nKeyboardInterrupt" in err:
            continue  # a busy machine: Python has not come so far yet
        assert "Traceback" not in err and "Exception" not in err
        # once the answer is there and Python takes itself down, it has no handlers any more: a shell calls that 130,
        # too
        assert (status, err) == (130, "") or (status in (0, 130, -signal.SIGINT) and err.startswith("notice: tiny"))


@pytest.mark.slow
def test_the_same_seed_in_two_processes(capsys):
    """A process with hashes of its own, and this one twice."""
    arguments = ["--prompt", "Hi", "--temperature", "8", "--seed", "5", "--max-new-tokens", "12"]
    other = subprocess.run(
        [*COMMAND, *arguments], env=ENVIRONMENT | {"PYTHONHASHSEED": "7"}, capture_output=True, timeout=200
    )
    said = []
    for _ in range(2):
        assert cli.main(["--model", "tiny", "--device", "cpu", *arguments]) == 0
        said.append(capsys.readouterr().out)
    assert said == [other.stdout.decode()] * 2 and len(said[0]) > 10


def test_the_table_names_each_case_and_only_tests_that_exist():
    """docs/robustness.md: each row names a test, or a case of this file; each case of this file stands in a row."""
    cases = {**PICTURES, **CHECKPOINTS, **TEXTS}
    text = (ROOT / "docs" / "robustness.md").read_text()
    assert f"within {SECONDS} s" in text and f"less than {MEGABYTES} MB" in text and f"({LARGE} MB" in text
    rows = [row for row in text.splitlines() if row.startswith("| ") and not row.startswith("| case ")]
    named = set()
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 4, row
        named |= {cells[0]} & set(cases)
        for file, test in re.findall(r"`(test_\w+\.py)::(test_\w+)`", cells[2]):
            assert f"def {test}(" in next((ROOT / "tests").rglob(file)).read_text(), row
        assert "`test_" in cells[2], row
        if cells[0] in cases:
            assert cells[3] == str(cases[cells[0]][1]), row
    assert named == set(cases), set(cases) - named


# ----------------------------------------------------------------------------------------------------------------
# Examples that hypothesis makes up


@examples(300)
@given(ARGUMENTS)
def test_any_argument_is_text(argument):
    """The shell's bytes that are no characters come as lone surrogates,
    which have no UTF-8 form; what is left of them has.
    """
    readable = cli.readable(argument)
    assert readable.encode().decode() == readable
    assert readable == argument or any("\udc80" <= letter <= "\udcff" for letter in argument)


@examples(300)
@given(st.text(st.characters(exclude_categories=()), max_size=3000))
def test_any_message_is_one_short_line(message):
    for said in (cli.one_line(message), cli.one_line(OSError(2, message[:50], message))):
        assert said.isprintable() and len(said) <= 1000 and len(said.splitlines()) <= 1


@pytest.mark.slow
@examples(30)
@given(PLAIN, st.lists(PLAIN, max_size=3))
def test_any_prompt_and_any_talk_are_answered(base, capsys, words, lines):
    """At the command line: exit status 0, or 2 and one line for a prompt that is too long."""
    arguments = ["--model", str(base), "--device", "cpu", "--max-new-tokens", "1"]
    assert cli.main([*arguments, f"--prompt={words}"]) == 0
    typed = "".join(line + "\n" for line in lines).encode()
    stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8")
    try:
        assert cli.main([*arguments, "--chat"]) == 0
    finally:
        sys.stdin = stdin
    out, err = capsys.readouterr()
    assert "Traceback" not in err and len(re.findall("tokens/s", err)) >= 1 and out.endswith("\n")
