"""The command line: the answer goes to stdout, everything else to stderr.

    python llava.py --model tiny --image tiny/scene.png

llava.py hands over to `program` before anything heavy is imported: torch takes seconds, and Ctrl-C in them, a wrong
option or --help should not have to wait. So torch and the model are imported by `run`, when the options are known to be
right. Here are the options, the exit status, and one line for each mistake. What an answer is stands in turn.py;
chat.py, each.py and choices.py are the other ways to ask.
"""

import argparse
import io
import logging
import os
import re
import signal
import sys
import time
import warnings

from extras import memory

QUESTION = "Describe the image."
AUTHORS_SYSTEM = (  # the sentence that the authors' own code puts in front of every prompt (conv_vicuna_v1)
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def program():
    """What `python llava.py` runs → exit status. Ctrl-C stops it without a traceback, while it starts and ends, too."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # a job in the background ignores Ctrl-C, and this leaves it so
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # weights in pages of 2 MB, not 4 kB: a sixth faster to read
    leave = signal.getsignal(signal.SIGINT)
    status = main(started=lambda: signal.signal(signal.SIGINT, stop if usual is signal.default_int_handler else usual))
    signal.signal(signal.SIGINT, leave)
    return status


STOPPED = [float("-inf")]  # when Ctrl-C came last


def stop(*_):
    """Ctrl-C, noted: a library may turn the KeyboardInterrupt into an error of its own."""
    STOPPED[0] = time.monotonic()
    raise KeyboardInterrupt


def main(arguments=None, started=lambda: None):
    """Run the command line → exit status. started: called when all that is heavy is imported."""
    warnings.showwarning = show_warning
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # or its notes on damaged files would go to stderr
    sys.stdin = sys.stdin or io.TextIOWrapper(io.BytesIO())  # None where it is closed, as by `<&-`
    sys.stderr = sys.stderr or io.StringIO()  # or what is meant for it would go to stdout
    lenient = {"errors": "replace"}  # an undecodable or unprintable character should not end the program
    whole = {"line_buffering": True, "write_through": False}  # several processes may write to one place, each its lines
    for stream, ways in ((sys.stdin, lenient), (sys.stdout, lenient | whole), (sys.stderr, whole)):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(**ways)
    try:
        options = parse(arguments)
        check(options)
        if not (sys.argv[1:] if arguments is None else arguments):  # then nothing need be imported
            make_parser().print_help()
            return 0
        import torch  # noqa: F401 (with Ctrl-C as `program` has it)

        import llava  # noqa: F401

        started()
        return run(options)
    except BrokenPipeError:  # the reader of stdout went away, as in `… | head -c 10`: not a mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:  # the complete messages that are raised throughout
        return 130 if time.monotonic() - STOPPED[0] < 1 else fail(error)
    except (RuntimeError, MemoryError) as error:
        return fail(what_is_missing(error))


# ----------------------------------------------------------------------------------------------------------------
# Options


class Parser(argparse.ArgumentParser):
    """argparse, with one line for a mistake instead of two."""

    def error(self, message):
        sys.exit(fail(f"{message} (--help lists the options)"))


def parse(arguments):
    """Arguments → the options, and whether anything is asked with them."""
    options = make_parser().parse_args(arguments)
    options.asked = bool(options.image) or options.prompt is not None or options.chat
    options.prompt = QUESTION if options.prompt is None else options.prompt
    return options


def make_parser():
    parser = Parser(prog="llava.py", description="Ask a LLaVA about pictures.")
    add = parser.add_argument
    add("--image", nargs="+", default=[], metavar="FILE", help="pictures; - reads one from standard input")
    add(
        "--prompt", type=readable, metavar="TEXT",
        help=f"the question (default: {QUESTION})",
    )  # fmt: skip
    add(
        "--model", default="llava-hf/llava-1.5-7b-hf", metavar="NAME",
        help="a Hub id, a folder, or tiny (default: %(default)s, 14.1 GB to download)",
    )  # fmt: skip
    add("--revision", metavar="REV", help="a branch, tag or commit of the Hub's repository")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64")
    add("--quantize", choices=["int8", "int4"], help="fewer bits for the language model: smaller, and on a CPU faster")
    add("--compile", action="store_true", help="record the decode step (on a CPU this needs a C++ compiler)")
    add(
        "--max-new-tokens", type=int, default=512, metavar="N",
        help="maximum length of the answer, in tokens (default: %(default)s)",
    )  # fmt: skip
    add(
        "--temperature", type=float, default=0.0, metavar="T",
        help="above 0: sample; 0: the likeliest token each time (default)",
    )  # fmt: skip
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens that together reach P")
    add("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    add("--num-beams", type=int, default=1, metavar="N", help="search for the likeliest answer along N beams")
    add("--seed", type=int, metavar="N", help="seed for sampling, to repeat an answer")
    add(
        "--pad", action="store_true", default=None,
        help="pad to a square, as the authors' code does, instead of cropping to one",
    )  # fmt: skip
    add(
        "--system", type=readable, metavar="TEXT",
        help="a sentence in front of the prompt; authors: that of the authors' code",
    )  # fmt: skip
    add("--show-prompt", action="store_true", help="print the exact prompt, its ids and all shapes to stderr")
    add("--trace", action="store_true", help="print each stage's shape, dtype, milliseconds and bytes to stderr")
    add("--explain", metavar="PAGE.html", help="write a page that shows where in the picture each word looked")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--chat", action="store_true", help="talk about the pictures; /help lists what can be typed")
    way.add_argument("--each", action="store_true", help="ask the question of each picture, or of those in a folder")
    way.add_argument(
        "--choices", type=readable, nargs="+", metavar="ANSWER",
        help="how likely each of these answers is, given that it is one of them",
    )  # fmt: skip
    add("--batch-size", type=int, metavar="N", help="--each: so many pictures side by side (default: 1)")
    add("--out", metavar="FILE", help="--each: write the answers there, .jsonl or else name, tab, answer; and go on")
    return parser


def readable(argument):
    """An argument as text; undecodable bytes (surrogate escapes) become U+FFFD."""
    return argument.encode(errors="surrogateescape").decode(errors="replace")


def check(options):
    """Raise ValueError for options that are out of range or do not go together."""
    if not -(2**63) <= (options.seed or 0) < 2**64:
        raise ValueError(f"seed is {options.seed}, and must be a number of at most 64 bits")
    if options.each and not options.image:
        raise ValueError("--each needs pictures: name them after --image")
    for name, value in (("--batch-size", options.batch_size), ("--out", options.out)):
        if value is not None and not options.each:
            raise ValueError(f"{name} is about many pictures: add --each, or leave it out")
    options.batch_size = 1 if options.batch_size is None else options.batch_size
    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}, and must be at least 1")


# ----------------------------------------------------------------------------------------------------------------
# What goes wrong


def what_is_missing(error):
    """Describe a lack of memory or a failed device; re-raise anything else, which is a bug."""
    text = str(error)
    less = "--dtype bfloat16, --quantize int4, fewer or smaller pictures, or --model tiny"
    if "out of memory" in text:  # of a GPU
        return f"there is too little memory: try {less}"
    if isinstance(error, MemoryError) or re.search("can't allocate memory|Cannot allocate memory|unable to mmap", text):
        size, whose = memory.limit() or (0, memory.MACHINE)
        which = "" if whose == memory.MACHINE else f" ({size / 1e9:.1f} GB by {whose})"
        return f"there is too little memory{which}: try {less}"
    if "CUDA error" in text and "assert" not in text:  # a device-side assert means a bad index: a bug
        return f"the device failed ({text.splitlines()[0]}): start again, or try --device cpu"
    raise error


def show_warning(message, category, filename, *_, **__):
    """A warning is a notice. But what Pillow says about the tags of a file helps nobody: the picture is whole."""
    if not re.search(r"[/\\]PIL[/\\]", filename):
        notice(message)


def notice(message):
    print("notice:", one_line(message), file=sys.stderr)


def fail(message):
    print("error:", one_line(message), file=sys.stderr)
    return 2


def one_line(message):
    """At most 1000 characters, without control characters: names and fields come from untrusted files."""
    text = str(message)
    if getattr(message, "strerror", None):  # the system's own
        text = ": ".join(str(part) for part in (message.filename, message.strerror) if part)
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= 1000 else f"{text[:500]} … {text[-495:]}"


# ----------------------------------------------------------------------------------------------------------------
# What is asked for


def run(options):
    """Do what the options ask for → exit status."""
    import torch

    import llava
    from extras import beams, chat, choices, each, turn

    beams.check(options.max_new_tokens, options.num_beams, options.temperature, options.top_k, options.top_p)
    watch = None
    if options.trace or options.explain is not None:
        from extras import explain

        explain.check(options)
        watch = explain.watch
    if not options.asked:
        make_parser().print_help()
        return 0
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1:  # torchrun has set them
        from extras import parallel

        parallel.join(options)
    names, failed = each.plan(options) if options.each else ([], 0)
    if options.each and not names:  # all of them stand in the file
        return each.answer_each(None, None, options, [], names, failed)
    images = [] if options.each else [turn.open_named(name) for name in options.image]
    settings = dict(device=options.device, dtype=options.dtype, quantize=options.quantize, compile=options.compile)
    with torch.inference_mode():  # for answers only
        model, processor = llava.load(options.model, **settings, revision=options.revision)
    if model.config.description:
        notice(model.config.description)
    if options.compile:
        notice("the first words of an answer take longer: the step is being recorded")
    turns = question(options)
    if options.chat:
        return chat.chat(model, processor, images, options, turns[:-1])
    if options.choices:
        return choices.print_choices(model, processor, images, options, turns)
    if options.each:
        return each.answer_each(model, processor, options, turns, names, failed)
    conversation = turn.Conversation(processor.tokenizer.bos)
    pieces = turn.answer(model, processor, options, turns, images, conversation)
    if watch:
        pieces = watch(model, processor, options, images, conversation, pieces)
    for text in pieces:
        print(text, end="", flush=True)
    return 0


def question(options):
    """The turns that ask for an answer: the system's sentence, if there is one, and the user's question."""
    system = AUTHORS_SYSTEM if options.system == "authors" else options.system
    return [("system", system), ("user", options.prompt)] if system else [("user", options.prompt)]
