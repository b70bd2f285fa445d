"""The notebooks: their form, what they share, and, in the slow set, that they run and print what is kept in them."""

import ast
import re
import sys

import nbformat
import pytest
import run
import torch
from reference import ROOT, make_checkpoint

import lesson
import llava

NOTEBOOKS = run.notebooks()


def markdown(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_eight():
    assert [file.name[0] for file in NOTEBOOKS] == list("12345678")


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_form(file):
    """Question, time and prerequisites at the top; outputs kept;
    three exercises with folded solutions; a map at the end.
    """
    notebook = run.read(file)
    nbformat.validate(notebook)
    opening = markdown(notebook)[0]
    assert re.match(r"# \d\. ", opening) and re.search(r"^\*\*[^*]+\?\*\*$", opening, flags=re.M)
    assert "Before: " in opening and re.search(r"About \d+ seconds on two CPU cores\.", opening)
    assert len(list(run.exercises(notebook))) == 3
    for exercise, check, solution in run.exercises(notebook):
        assert "..." in exercise.source and "check(" in check.source and "return ..." not in solution
        assert run.text(check) == "Not done yet.\n"
    assert code(notebook)[-1].source.startswith("where({") and re.search(r"\w\.py:\d+", run.text(code(notebook)[-1]))
    assert all(
        cell.execution_count and not any(o.output_type == "error" for o in cell.outputs) for cell in code(notebook)
    )
    assert file.stat().st_size < 300_000
    everything = "\n".join(cell.source for cell in code(notebook))
    assert everything.count("assert ") >= 5 and "Predict:" in "".join(markdown(notebook))
    assert any("image/png" in o.get("data", {}) for cell in code(notebook) for o in cell.outputs)
    assert re.search("control|shuffled", "".join(cell.source for cell in code(notebook) if "subplots" in cell.source))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_they_import_the_modules_and_define_none_of_them(file):
    """Nothing but matplotlib beside what the modules need, no copy of the model, and links that lead somewhere."""
    notebook = run.read(file)
    ours = {path.stem for folder in (".", "notebooks", "tiny", "tests") for path in (ROOT / folder).glob("*.py")}
    allowed = {"matplotlib", "torch", "PIL", "numpy", "safetensors", "extras"} | ours | set(sys.stdlib_module_names)
    for cell in code(notebook):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                assert {name.name.split(".")[0] for name in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed
            assert not (isinstance(node, ast.ClassDef) and any("Module" in ast.unparse(base) for base in node.bases))
    for link in re.findall(r"\]\(([^)#]+)\)", "".join(markdown(notebook))):
        assert (file.parent / link).exists(), link


def test_the_modules_name_their_notebooks():
    for name in ("vision", "llama", "llava", "weights"):
        docstring = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
        found = re.findall(r"notebooks/(\w+\.ipynb)", docstring)
        assert found and all((run.FOLDER / file).exists() for file in found)
        assert f"({'../' + name}.py)" in "".join(markdown(run.read(run.FOLDER / found[0])))


# ----------------------------------------------------------------------------------------------------------------
# What they share


@pytest.mark.parametrize(
    ("yours", "said"),
    [
        (lambda x: ..., "Not done yet."),
        (lambda x: 2 * x, "Right."),
        (lambda x: 3 * x, "Not right: three is too many"),
        (lambda x: 2.001 * x, "Not right: at [1] it is 4.002, and should be 4"),
        (lambda x: (2 * x).double(), "Not right: its dtype is torch.float64, and should be torch.float32"),
        (lambda x: 2 * x[:1], "Not right: its shape is (1,), and should be (2,)"),
        (lambda x: 7, "Not right: it is a int, and should be a tensor"),
        (lambda x: 1 / 0, "Not right: it raises ZeroDivisionError: division by zero"),
    ],
)
def test_check_says_what_is_wrong(capsys, yours, said):
    lesson.check(yours, lambda x: 2 * x, (torch.tensor([1.0, 2.0]),), mistakes={"three is too many": lambda x: 3 * x})
    assert capsys.readouterr().out == said + "\n"


def test_check_of_values(capsys):
    lesson.check(..., 3)
    lesson.check(4, 3, mistakes={"one too many": 4})
    lesson.check(5, 3)
    lesson.check(3, 3)
    lesson.check(0.5, 0.25)
    lesson.check(float("inf"), float("inf"))
    assert capsys.readouterr().out.splitlines() == [
        "Not done yet.", "Not right: one too many", "Not right: it is 5", "Right.", "Not right: it is 0.5", "Right.",
    ]  # fmt: skip


def test_places_are_those_of_the_source(capsys):
    for thing, line in ((llava.Llava.merge, "def merge"), (llava.Llava.generate, "@torch.no_grad()"), (llava, '"""')):
        file, number = lesson.place(thing).split(":")
        assert line in (ROOT / file).read_text().splitlines()[int(number) - 1]
    file, number = lesson.place(llava.Llava, "masked_scatter").split(":")
    assert "masked_scatter" in (ROOT / file).read_text().splitlines()[int(number) - 1]
    with pytest.raises(ValueError, match="has no line with"):
        lesson.place(llava.Llava, "no such thing")
    lesson.show(llava.Projector.forward)
    assert "self.linear_2(F.gelu(self.linear_1(" in capsys.readouterr().out


def test_a_changed_output_is_found():
    kept = run.read(NOTEBOOKS[0])
    fresh = run.read(NOTEBOOKS[0])
    assert run.differences(kept, fresh) == []
    cell = next(cell for cell in code(fresh) if run.text(cell))
    cell.outputs[0] = nbformat.v4.new_output("stream", text="something else\n")
    assert "+something else" in run.differences(kept, fresh)
    cell.metadata["tags"] = []
    next(c for c in code(kept) if run.text(c)).metadata["tags"] = ["volatile"]
    assert run.differences(kept, fresh) == []


# ----------------------------------------------------------------------------------------------------------------
# Running them


def small(tmp_path, solution):
    """A notebook with one exercise, run from a file."""
    cells = [
        nbformat.v4.new_code_cell("import lesson"),
        nbformat.v4.new_code_cell("def twice(x):\n    return ...", metadata={"tags": ["exercise"]}),
        nbformat.v4.new_code_cell("lesson.check(twice, lambda x: 2 * x, (3,))"),
        nbformat.v4.new_markdown_cell(
            f"<details><summary>Solution</summary>\n\n```python\n{solution}\n```\n</details>"
        ),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "0.ipynb")
    return tmp_path / "0.ipynb"


@pytest.mark.slow
def test_a_wrong_solution_is_found(tmp_path):
    fresh, _ = run.execute(small(tmp_path, "def twice(x):\n    return 2 * x"))
    assert len(fresh.cells) == 4 and run.text(fresh.cells[2]) == "Not done yet.\n"
    with pytest.raises(RuntimeError, match="Not right: it is 9"):
        run.execute(small(tmp_path, "def twice(x):\n    return 3 * x"))


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs_and_prints_what_is_kept(file):
    fresh, seconds = run.execute(file)
    assert run.differences(run.read(file), fresh) == [], "run python notebooks/run.py --write"
    assert seconds < run.SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in NOTEBOOKS if file.name[0] in "1235"], ids=lambda file: file.stem)
def test_it_runs_on_another_checkpoint(file, tmp_path, monkeypatch):
    """With LLAVA_WEIGHTS the same cells run on any checkpoint in the published layout: here a random one."""
    make_checkpoint(tmp_path, "llama", scale=2.0)
    monkeypatch.setenv("LLAVA_WEIGHTS", str(tmp_path))
    run.execute(file)
