"""--each: the same question about many pictures, some of them side by side, an answer a line.

    python llava.py --each --image FOLDER --prompt "What is this?" --batch-size 8 --out answers.jsonl

A line is written as soon as it is complete and those before it in its batch are. With --out the same command goes on
where it was stopped: what stands in the file is not asked again. A picture that cannot be read costs its own line.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

from PIL import Image

from extras import parallel
from extras.cli import fail, notice, one_line
from extras.turn import Cost, as_text, check_prompt, context, open_named

# ----------------------------------------------------------------------------------------------------------------
# Which pictures


def plan(options):
    """What is to be asked → (names of pictures, how many of those that are not have failed in an earlier run).

    A folder stands for the pictures in it, sorted by name. Raises ValueError or OSError.
    """
    names = [each for name in options.image for each in in_folder(name)]
    if options.out is None:
        return names, 0
    names, (answered, failed) = dict.fromkeys(names), earlier(options)
    parallel.wait()  # before one process writes, another one has cut off half a line
    left = [name for name in names if shown(options, name) not in answered | failed]
    return left, sum(shown(options, name) in failed for name in names)


def in_folder(name):
    """The pictures in a folder, which are the files with the ending of one; of anything else the name itself."""
    folder = Path(name)
    if name == "-" or not folder.is_dir():
        return [name]
    endings = Image.registered_extensions()
    found = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in endings and file.is_file())
    if not found:
        raise ValueError(f"there are no pictures in the folder {name}: name another one, or files")
    return [os.path.join(name, each) for each in found]


def earlier(options):
    """The pictures that stand in the file of --out → (those that are answered, those that failed). Half a line at its
    end, of a run that was stopped, is cut off. Raises ValueError if something else stands there.
    """
    answered, failed, path = set(), set(), Path(options.out)
    data = path.read_bytes() if path.exists() else b""
    *lines, half = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = parsed(options, line.decode(errors="surrogateescape"))
        except (ValueError, KeyError, TypeError):
            form = '{"file": …, "prompt": …, "answer": …}' if is_json(options) else "name, tab, answer"
            raise ValueError(
                f"{path}, line {number} is not {form}: give --out a file of --each, or a new one"
            ) from None
        if "error" in entry:
            failed.add(entry["file"])
        elif entry["prompt"] == options.prompt:
            answered.add(entry["file"])
    if half:
        os.truncate(path, len(data) - len(half))
    path.open("ab").close()  # what cannot be written is said before the model is loaded
    return answered, failed - answered


def parsed(options, line):
    """A line of the file → its entry. A line that is no JSON does not tell its prompt: it is taken for the same."""
    if is_json(options):
        entry = json.loads(line)
        return {"file": entry["file"], "error": entry["error"]} if "error" in entry else {
            "file": entry["file"], "prompt": entry["prompt"], "answer": entry["answer"]
        }  # fmt: skip
    name, answer = line.split("\t", 1)
    return {"file": name, "error": answer} if answer.startswith("error: ") else {
        "file": name, "prompt": options.prompt, "answer": answer
    }  # fmt: skip


def is_json(options):
    return options.out is not None and options.out.lower().endswith(".jsonl")


def shown(options, name):
    """A picture's name as it stands in a line."""
    return name if is_json(options) else one_line(name)


# ----------------------------------------------------------------------------------------------------------------
# Asking


def answer_each(model, processor, options, turns, names, failed=0):
    """Ask about each picture → exit status. failed: the second number of `plan`."""
    own, size = names[parallel.share()], options.batch_size
    if options.temperature > 0 and options.seed is not None:
        size = 1  # from one seed each answer is drawn as it is alone
    with Lines(options, len(own)) as lines:
        for start in range(0, len(own), size):
            opened = [(name, opened_or_error(name)) for name in own[start : start + size]]
            side_by_side(model, processor, options, turns, opened, lines)
    if failed:
        fail(f"{failed} of the pictures failed in an earlier run: {options.out} says why")
    return parallel.worst(2 if failed or lines.failed else 0)


def side_by_side(model, processor, options, turns, opened, lines):
    """Ask about some pictures at once. If that fails, the rest of them one by one: a single picture is to blame.

    opened: (name, picture, or the error that it cost) of each.
    """
    good = [image for _, image in opened if not isinstance(image, Exception)]
    told = 0
    with contextlib.closing(answers(model, processor, options, turns, good, lines)) as rows:
        for name, image in opened:
            try:
                if isinstance(image, Exception):
                    raise image
                ids = next(rows)
            except (ValueError, OSError) as error:
                if image is not error and len(good) > 1:
                    break
                lines.failure(name, error)
            else:
                lines.answer(name, ids, "".join(as_text(processor.tokenizer, ids)))
            told += 1
    for pair in opened[told:]:
        side_by_side(model, processor, options, turns, [pair], lines)


def opened_or_error(name):
    try:
        return open_named(name)
    except (ValueError, OSError) as error:
        return error


def answers(model, processor, options, turns, images, lines):
    """Yield the ids of each picture's answer in order, as soon as they are complete."""
    if not images:
        return
    bos, pieces = processor.tokenizer.bos, processor.pieces(turns, 1)
    row = [*bos, *processor.tokenizer.encode_pieces(pieces)]
    inputs = processor.prepare([row] * len(images), [[image] for image in images], options.pad)
    end = check_prompt(model, processor, options, [*bos, *pieces], inputs)
    sampling = dict(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    sampling["max_new_tokens"] = min(options.max_new_tokens, context(model) - end + 1)
    ends, cost, said = set(model.config.eos_token_ids), Cost(model), [[] for _ in images]
    if options.num_beams > 1:
        steps = model.generate(**inputs, **sampling, num_beams=options.num_beams).T
    else:
        steps = model.stream(**inputs, **sampling, seed=options.seed)
    first = 0  # of those that are not complete
    try:
        for ids in steps:
            for ids_of_row, i in zip(said, ids.tolist(), strict=True):
                if not ids_of_row or ids_of_row[-1] not in ends:
                    ids_of_row.append(i)
            while first < len(said) and said[first][-1] in ends:
                yield said[first]
                first += 1
    finally:  # also when the last of them has ended, and nobody asks for more
        cost.close()
        if said[0] and lines.bar.disable:
            print(cost.summary(sum(map(len, said))), file=sys.stderr)
    for ids in said[first:]:  # a row behind may have ended before
        if ids[-1] not in ends:
            lines.notice(f"an answer is cut off after {len(ids)} tokens")
        yield ids


class Lines:
    """Where the answers go, a line each; and the bar, with rate and time left, if stderr is a terminal."""

    def __init__(self, options, number):
        from huggingface_hub.utils import tqdm

        self.options, self.failed = options, 0
        self.file = None
        if options.out is not None:
            self.file = open(options.out if parallel.speaks() else os.devnull, "ab", buffering=0)  # noqa: SIM115
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=number, unit="picture", disable=hidden, file=sys.stderr, dynamic_ncols=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        if self.file is not None:
            self.file.close()

    def answer(self, name, ids, text):
        entry = {"file": name, "prompt": self.options.prompt, "answer": text, "tokens": len(ids)}
        self.write(entry, " ".join(text.split()))

    def failure(self, name, error):
        self.failed += 1
        with self.aside():
            fail(error)
        if self.file is not None:
            self.write({"file": name, "error": one_line(error)}, f"error: {one_line(error)}")
        else:
            self.bar.update()

    def notice(self, words):
        with self.aside():
            notice(words)

    def write(self, entry, text):
        """Write a line at once, as it is complete, so that a run which is stopped leaves half a line at most."""
        line = f"{one_line(entry['file'])}\t{text}"
        if self.file is None:
            with self.aside():
                print(line, flush=True)
        else:
            self.file.write(as_bytes(json_line(entry) if is_json(self.options) else line))
        self.bar.update()

    @contextlib.contextmanager
    def aside(self):
        """The bar makes way for a line, which may be written to the same terminal."""
        self.bar.clear()
        yield
        self.bar.refresh()


def json_line(entry):
    line = json.dumps(entry, ensure_ascii=False)
    return line if line.isprintable() else json.dumps(entry)  # names may hold what is no Unicode


def as_bytes(line):
    return line.encode() + b"\n"
