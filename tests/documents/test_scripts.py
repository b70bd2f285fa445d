"""Every script says at --help what it is, and does nothing else; benchmarks/decode.py draws what its table says."""

import ast
import os
import re
import shutil
import subprocess
import sys

import published
import pytest
from PIL import Image
from reference import ROOT

FOLDERS = ("benchmarks", "docs", "extras", "notebooks", "small", "tests", "tiny")
INTERNAL = ("forks.py",)  # started by tests alone, and spoken to through a pipe
HEARD = """
import os, runpy, sys
import numpy, PIL.Image, torch, transformers  # once, for all of them
root, *scripts = sys.argv[1:]
for script in scripts:
    child = os.fork()
    if not child:
        place = os.path.join(root, os.path.dirname(script))
        out = os.open(script.replace("/", "+"), os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.argv, sys.path[0] = [script, "--help"], place
        os.chdir(root)
        status = 70
        try:
            runpy.run_path(os.path.join(root, script), run_name="__main__")
            status = 71  # it went on
        except SystemExit as end:
            status = end.code or 0
        finally:
            sys.stdout.flush()
            os._exit(status if type(status) is int else 72)
    _, status = os.waitpid(child, 0)
    print(script, os.waitstatus_to_exitcode(status), flush=True)
"""


def is_script(source):
    """Whether a source does something when it is started."""
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test).startswith("__name__ == '__main__'")
        for node in ast.parse(source).body
    )


def scripts():
    files = [ROOT / "llava.py", *(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py")))]
    files = [file for file in files if file.name not in INTERNAL and not file.name.startswith("test_")]
    return [str(file.relative_to(ROOT)) for file in files if is_script(file.read_text(encoding="utf-8"))]


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Each script's --help in a copy of the repository → ({script: exit status}, {script: what it said}, the files of
    the copy before and behind that).
    """
    root, heard = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("heard")
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.new")
    shutil.copytree(ROOT, root, ignore=skip, dirs_exist_ok=True)
    before = contents(root)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", HEARD, str(root), *scripts()], cwd=heard, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    status = {line.split()[0]: int(line.split()[1]) for line in run.stdout.splitlines()}
    return status, {name: (heard / name.replace("/", "+")).read_text() for name in status}, before, contents(root)


@pytest.mark.slow
def test_every_script_has_a_help(asked):
    status, said, _, _ = asked
    assert len(status) == len(scripts()) > 15 and {"tests/parity.py", "benchmarks/parts.py"} <= set(status)
    wrong = [name for name in status if status[name] != 0 or not said[name].startswith("usage: ")]
    assert wrong == [], "\n".join(f"{name}: {status[name]}\n{said[name][-500:]}" for name in wrong)


@pytest.mark.slow
def test_help_writes_nothing(asked):
    _, _, before, behind = asked
    assert {name for name in {*before, *behind} if before.get(name) != behind.get(name)} == set()


@pytest.mark.parametrize("source, found", [
    ("import os\nif __name__ == '__main__':\n    os.abort()", True),
    ('if __name__ == "__main__" and x:\n    y()', True),
    ("def f():\n    if __name__ == '__main__':\n        pass", False),
    ("x = 'if __name__ == \"__main__\"'", False),
])  # fmt: skip
def test_a_script_is_seen(source, found):
    assert is_script(source) == found


@pytest.mark.slow
def test_the_checkpoints_at_full_size_are_those_that_are_published(tmp_path):
    """Each of the line, its files all header and holes: so many tensors, and so many GB, as are counted elsewhere."""
    models = [*published.CONFIGS, *published.FAMILY]
    command = [sys.executable, "benchmarks/full_size.py", "--check", "--folder", str(tmp_path), "--models", *models]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    counts = {name: published.COUNTED[name][0] for name in published.FAMILY}
    counts |= {name: published.PUBLISHED[name][0] for name in published.CONFIGS}
    said = dict(re.findall(r"^(\S+)\n  checked (\d+) tensors in ", run.stdout, re.M))
    assert said == {name: str(counts[name]) for name in models} and not [*tmp_path.iterdir()]
    sizes = re.findall(r"^  ([\d.]+) GB in the files", run.stdout, re.M)
    for name, size in zip(models, sizes, strict=True):
        if name in published.SHARDS:
            assert abs(float(size) - sum(published.SHARDS[name])) < 0.02


# ----------------------------------------------------------------------------------------------------------------
# benchmarks/decode.png

HEAD = "| side | tokens/s | of transformers bfloat16, within a round | GB/s | of the bandwidth |\n"
HEAD += "|---|---|---|---|---|\n"
README = ROOT / "benchmarks" / "README.md"


def rates(text):
    """The medians of the table of decode.py in a text: {side: tokens a second as written}."""
    table = text.split(HEAD)[1].split("\n\n")[0]
    return dict(re.findall(r"^\| (.+?) \| ([\d.]+) \(", table, flags=re.M))


def test_the_picture_is_of_the_table():
    """And its title says of what: a part of the layers, and which machine."""
    kept = Image.open(README.with_name("decode.png")).text
    drawn = dict(part.split(": ") for part in kept["Description"].split(". ", 2)[2].split("; "))
    assert len(drawn) > 10 and drawn == rates(README.read_text(encoding="utf-8"))
    assert kept["Title"] == "One token at a time, with 2 of the 32 layers of a 7B"
    machine = re.search(r"decode\.py --table .* --machine \"(.*)\"", README.read_text(encoding="utf-8"))[1]
    assert kept["Description"].startswith(f"{machine}; random weights. ")


def draw(tmp_path, *options):
    command = [sys.executable, "benchmarks/decode.py", "--table", str(tmp_path / "table.md")]
    return subprocess.run(
        [*command, "--picture", str(tmp_path / "drawn.svg"), *options], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.slow
def test_a_table_is_drawn_without_measuring(tmp_path):
    """Its numbers stand at the bars, those of as many bits beside one another."""
    pytest.importorskip("matplotlib", reason="needs matplotlib, see requirements-notebooks.txt")
    rows = {"ours int4": "90.0", "transformers bfloat16": "21.0", "llama.cpp Q4_0": "131.0", "ours bfloat16": "32.0"}
    table = "".join(f"| {name} | {rate} (1.0–2.0) | 1.00 (1.00–1.00) | 9.9 | 50% |\n" for name, rate in rows.items())
    (tmp_path / "table.md").write_text(f"| other |\n|---|\n| 7 |\n\n{HEAD}{table}\nWords | and a line.\n")
    run = draw(tmp_path, "--model", "13b", "--layers", "3", "--machine", "A <small> machine")
    assert run.returncode == 0, run.stderr
    words = re.findall(r"<!-- (.*?) -->", (tmp_path / "drawn.svg").read_text())
    order = ["transformers bfloat16", "ours bfloat16", "ours int4", "llama.cpp Q4_0"]
    assert [word for word in words if word in rows] == order
    assert {"21", "32", "90", "131"} <= set(words)
    assert "One token at a time, with 3 of the 40 layers of a 13B" in words
    assert "tokens a second; longer is faster" in words
    assert any(word.startswith("A &lt;small&gt; machine; random weights. The whole model is") for word in words), words


@pytest.mark.slow
def test_a_text_without_the_table_is_refused(tmp_path):
    (tmp_path / "table.md").write_text("nothing")
    run = draw(tmp_path)
    assert run.returncode == 1 and "there is no table that begins with | side |" in run.stderr
