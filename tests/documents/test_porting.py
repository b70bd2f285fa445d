"""docs/porting.md: its tables are those of the code, its bugs show where it says, and the stored dump is up to date."""

import contextlib
import importlib
import inspect
import re
import sys
import types

import mutations
import parity
import pytest
import run
import torch
from checkpoints import RENAMINGS, rename
from PIL import Image
from reference import ROOT, make_checkpoint

import llava
import weights

DUMP = ROOT / "docs" / "tiny_stages.safetensors"
COMMAND = "python tests/parity.py --dtype float32 --no-gradients --dump docs/tiny_stages.safetensors"
TEXT = (ROOT / "docs" / "porting.md").read_text(encoding="utf-8")
MODULES = ("vision", "llama", "weights", "llava")


def table(head):
    """The rows below a head, each a list of cells."""
    lines = TEXT.split(f"\n| {head} |\n")[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# ----------------------------------------------------------------------------------------------------------------
# The names


def authors(name):
    """A published name, or one that .weight and .bias are still to follow, as the authors of LLaVA spell it."""
    try:
        return f"`{rename(f'{name}.', 'E').removesuffix('.')}`"
    except KeyError:
        return "–"  # of a checkpoint by others


def test_the_names_are_those_of_the_code():
    """The authors' are spelt by checkpoints.py, which the tests of loading are built on."""
    right = [[f"`{theirs}`", f"`{ours}`", authors(theirs)] for theirs, ours in weights.PUBLISHED]
    assert table("published | ours | the authors'") == right
    assert len(right) > 25
    for _, ours, theirs in right:
        if theirs == "–":
            continue
        end = "" if ours.strip("`") in dict(weights.NAMES).values() else ".bias"
        found = weights.our_name(theirs.strip("`").replace("{i}", "11") + end)
        assert found == ours.strip("`").replace("{i}", "11") + end


def test_the_beginnings_are_those_of_the_layouts():
    rows = table("where | language model | head | vision tower | projector")
    published = [cell.strip("`") for cell in rows[0][1:]]
    assert [name for row in rows for name in row[1:]] == [
        f"`{rename(name, layout)}`" for layout in RENAMINGS if layout != "E" for name in published
    ]


# ----------------------------------------------------------------------------------------------------------------
# The stored dump


def test_the_stored_dump_is_tinys(capsys):
    """tiny may be trained anew; then so are its stages."""
    again = f"make it again: {COMMAND} (notebooks/run.py --write does so too)"
    assert f"    {COMMAND}\n" in TEXT
    assert DUMP.stat().st_size < 2e6
    about = {"model": "tiny", "question": parity.QUESTION, "picture": "tiny/scene.png", "dtype": "float32"}
    assert parity.read_stages(DUMP)[1] == about, again
    status = parity.main(["--against", str(DUMP)])
    said = capsys.readouterr().out
    assert status == 0 and "not compared" not in said, f"{said}\n{again}"


def test_the_command_for_it_and_that_of_the_notebooks_are_one():
    assert f"python {run.DUMP}" == COMMAND and "*DUMP.split()" in inspect.getsource(run.figures)


def test_its_stages_have_the_shapes_of_the_table():
    """Each letter stands for one number, wherever it is."""
    stages, sizes, listed = parity.read_stages(DUMP)[0], {"3": 3}, set()
    for names, shape, _ in table("stage | shape | what it is"):
        for name in re.findall(r"`([\w.]+)`", names):
            kin = [stage for stage in stages if re.fullmatch(re.sub(r"\d+", r"\\d+", re.escape(name)), stage)]
            if "…" not in names:
                kin = [name]
            elif name == "vision.1":
                kin.remove("vision.0")
            assert kin
            listed |= {*kin}
            for stage in kin:
                letters = shape.split(", ") if shape != "a scalar" else []
                assert len(letters) == stages[stage].dim(), stage
                for letter, size in zip(letters, stages[stage].shape, strict=True):
                    assert sizes.setdefault(letter, size) == size, (stage, letter)
    assert listed == set(stages) and sizes["Q"] == sizes["P"] + 1 and sizes["B"] == sizes["N"] == 1


# ----------------------------------------------------------------------------------------------------------------
# The bugs

BUGS = {name: (file, right, wrong) for name, file, right, wrong, _ in mutations.MUTATIONS}
STAGES = {bug: stage.strip("`") for bug, stage, _ in table("bug | stage | symptom")}
HIDDEN = [bug.replace("`", "") for bug, *_ in table("bug | needs | symptom")]


@contextlib.contextmanager
def planted(file, right, wrong):
    """Inside of it, the four modules are copies of ours; in one, or in a file of extras/, is a bug → their llava.

    No other file of extras/ is copied: what registers operators with torch must not be there twice.
    """
    names = [*MODULES, *([file[:-3].replace("/", ".")] if file[:-3] not in MODULES else [])]
    kept = {name: importlib.import_module(name) for name in names}
    try:
        for name in names:
            put(name, types.ModuleType(name))
            path = ROOT / f"{name.replace('.', '/')}.py"
            source = path.read_text(encoding="utf-8")
            sys.modules[name].__file__ = str(path)
            source = source.replace(right, wrong) if path == ROOT / file else source
            exec(compile(source, path, "exec"), vars(sys.modules[name]))
        yield sys.modules["llava"]
    finally:
        for name, module in kept.items():
            put(name, module)


def put(name, module):
    """What is imported under this name from now on, also by `from package import module`."""
    sys.modules[name] = module
    package, _, last = name.rpartition(".")
    if package:
        setattr(sys.modules[package], last, module)


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A random checkpoint, a picture that is not square, and the stages without a bug."""
    folder = tmp_path_factory.mktemp("mistral")
    make_checkpoint(folder, "mistral")
    torch.manual_seed(0)
    image = Image.fromarray(torch.randint(0, 256, (40, 61, 3), dtype=torch.uint8).numpy())
    return str(folder), image, stages(llava, str(folder), image)


def stages(module, folder, image):
    torch.manual_seed(0)
    model, processor = module.load(folder, device="cpu", dtype="float64")
    return parity.ours(model, processor, image, gradients=False)


def first_over(bug, right):
    folder, image, reference = right
    with planted(*BUGS[bug]) as module:
        rows = parity.compare(stages(module, folder, image), reference, torch.float64)
    last = max(int(name.split(".")[1]) for name in reference if name.startswith("llama."))
    over = [row[0] for row in rows if not row[2] <= row[4]]
    return over[0].replace(f"llama.{last}", "llama.last") if over else None


@pytest.mark.slow
@pytest.mark.parametrize("bug", STAGES)
def test_a_bug_shows_first_where_the_table_says(bug, right):
    assert first_over(bug, right) == STAGES[bug]


@pytest.mark.slow
@pytest.mark.parametrize("bug", HIDDEN)
def test_a_bug_that_needs_more_does_not_show(bug, right):
    assert first_over(bug, right) is None


def test_the_bugs_that_real_ports_had_are_there():
    """Those of the four modules that have a number, but for what is no port's: refusing, and other encodings."""
    core = [*(f"{name}.py" for name in MODULES), "extras/forms.py"]
    ours = {name for name, (file, *_) in BUGS.items() if re.match(r"T\d+ ", name) and file in core}
    refusals = {name for name in ours if re.match(r"T(17|18|23|24) |T19 numbers|T21 an|T21 a ", name)}
    assert ours - refusals == {name for name in [*STAGES, *HIDDEN] if re.match(r"T\d+ ", name)}
