"""The limits of the house: the four modules stay short and plain, and all else hangs on a few doors, in extras/."""

import ast
import io
import re
import tokenize

import pytest
from reference import ROOT

LIMITS = {  # lines, comments and docstrings included; raised only with a reason beside the number
    "llava.py": 548,  # 520, and what hands image_sizes on: pictures may have different numbers of features
    "llama.py": 441,  # 440, and a line that spares every start torch's compiler
    "vision.py": 320,
    "weights.py": 360,  # 340, and tables of what kinds of tower, text, positions and preprocessing mean by default
}
EXTRA = 360  # lines of a file of extras/
COLUMNS = 120
SCREEN = 60  # lines of a function of the four
FOLDERS = ("extras", "tests", "tiny", "small", "docs", "benchmarks", "notebooks")
NOT_SAID = {  # in code; comments and docstrings may speak of them
    r"torch\.ops", r"mkldnn", r"int4pack", r"CUDAGraph", r"DeviceMesh", r"\bplacements\b", r"torch\.distributed",
    r"\bargparse\b", r"\breadline\b",
}  # fmt: skip
DOORS = {  # module → (the function that imports it when it is called, the file of extras/)
    "llava.py": {
        ("__main__", "cli"),
        ("load", "checks"), ("load", "hub"), ("load", "speed"),
        ("Llava.generate", "beams"), ("Llava.score", "beams"), ("Processor.__init__", "forms"),
        ("Llava.get_image_features", "anyres"), ("Llava.feature_counts", "anyres"), ("Processor.pixels", "anyres"),
        ("Llava.resize_token_embeddings", "training"), ("Llava.init_weights", "training"),
        ("save", "saving"),
    },
    "vision.py": set(),
    "llama.py": set(),
    "weights.py": set(),
}  # fmt: skip
CORE = {name: (ROOT / name).read_text(encoding="utf-8") for name in LIMITS}
EXTRAS = sorted(file for file in (ROOT / "extras").glob("*.py") if file.name != "__init__.py")
SCRIPTS = sorted([*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))])
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
HELPERS = [file for file in SCRIPTS if file.is_relative_to(ROOT / "tests")]


# ----------------------------------------------------------------------------------------------------------------
# What is looked for: functions from a source to what is wrong in it


def lines(source):
    return len(source.splitlines())


def wide_lines(source):
    """The numbers of the lines that are too wide."""
    return [number for number, line in enumerate(source.splitlines(), start=1) if len(line) > COLUMNS]


def tall_functions(source):
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [node.name for node in nodes if node.end_lineno - node.lineno + 1 > SCREEN]


def code(source):
    """A source without its comments and docstrings, its tokens one space apart, but for the dots of names."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstrings.add((node.body[0].lineno, node.body[0].col_offset))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kept = [token for token in tokens if token.type != tokenize.COMMENT]
    kept = [token.string for token in kept if token.type != tokenize.STRING or token.start not in docstrings]
    return re.sub(r" ?\. ?", ".", " ".join(kept))


def said(source):
    """What the code says and should not."""
    return sorted(pattern for pattern in NOT_SAID if re.search(pattern, code(source)))


def crowded_lines(source):
    """The numbers of the lines on which a statement stands behind another, or behind the colon of one."""
    kept = source.splitlines()
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    return sorted({node.lineno for node in nodes if kept[node.lineno - 1].encode()[: node.col_offset].strip()})


def imported(node):
    """The modules that an import statement names: those of `from a import b, c` are a.b and a.c, if a is a package."""
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    return [f"{node.module}.{name.name}" for name in node.names] if node.module == "extras" else [node.module or ""]


def is_hand_over(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def doors(node, path="", function=""):
    """Every import of extras in a syntax tree: (the function it stands in, "" for none; the file of extras/)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            parts = [f"{name}.".split(".") for name in imported(child)]
            yield from ((function, name) for package, name, *_ in parts if package == "extras")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from doors(child, f"{path}{child.name}.", f"{path}{child.name}")
        elif isinstance(child, ast.ClassDef):
            yield from doors(child, f"{path}{child.name}.", function)
        else:
            yield from doors(child, path, "__main__" if is_hand_over(child) and not function else function)


def imports(source):
    """The first part of the name of every module that a source imports, wherever in it."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {name.split(".")[0] for node in nodes for name in imported(node)}


def siblings(name, source):
    """The modules of the four that a source imports beside itself."""
    return imports(source) & {other.removesuffix(".py") for other in LIMITS} - {name.removesuffix(".py")}


def foreign(source, benchmarks):
    """The test files and benchmarks that a source imports."""
    return sorted(name for name in imports(source) if name.startswith("test_") or name in {"benchmarks", *benchmarks})


def rows(readme):
    """The rows of a table, each with four cells: file, what it adds, which door, its test."""
    table = [line.strip("| ").split(" | ") for line in readme.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line] for line in table]
    return {name[1]: cells for cells in table if (name := re.search(r"\b(\w+)\.py\b", cells[0]))}


def unlisted(names, readme, tests):
    """The files of extras/ that have no complete row or no test of their name, and the rows that have no file."""
    table = rows(readme)
    incomplete = [name for name, cells in table.items() if len(cells) != 4 or not all(cells)]
    wrong = [name for name, cells in table.items() if f"test_{name}.py" not in cells[-1]]
    untested = [name for name in names if f"test_{name}.py" not in tests]
    return sorted({*incomplete, *wrong, *untested, *({*names} ^ {*table})})


# ----------------------------------------------------------------------------------------------------------------
# The house


@pytest.mark.parametrize("name", LIMITS)
def test_a_module_stays_short_and_plain(name):
    source = CORE[name]
    assert lines(source) <= LIMITS[name]
    assert tall_functions(source) == []
    assert crowded_lines(source) == []
    assert said(source) == []


@pytest.mark.parametrize("name", LIMITS)
def test_extras_hang_on_these_doors_and_no_others(name):
    assert set(doors(ast.parse(CORE[name]))) == DOORS[name]


@pytest.mark.parametrize("name", [name for name in LIMITS if name != "llava.py"])
def test_the_ground_floor_imports_none_of_its_siblings(name):
    assert siblings(name, CORE[name]) == set()


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_line_is_too_wide(file):
    assert wide_lines(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("file", EXTRAS, ids=lambda file: file.stem)
def test_a_file_of_extras_stays_short(file):
    assert lines(file.read_text(encoding="utf-8")) <= EXTRA


def test_each_file_of_extras_has_a_row_and_a_test():
    names, tests = {file.stem for file in EXTRAS}, {file.name for file in (ROOT / "tests" / "extras").glob("test_*.py")}
    assert len(names) > 10 and unlisted(names, (ROOT / "extras" / "README.md").read_text(encoding="utf-8"), tests) == []


def users(files):
    """file of extras/ → the others that import it."""
    found = {file.stem: set() for file in files}
    for file in files:
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for node in (node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))):
            parts = [f"{name}.".split(".") for name in imported(node)]
            for name in (name for package, name, *_ in parts if package == "extras"):
                found[name].add(file.stem)
    return found


def test_the_row_of_a_file_of_extras_names_all_that_use_it():
    """What has to go with it, if somebody deletes it."""
    table = rows((ROOT / "extras" / "README.md").read_text(encoding="utf-8"))
    named = {name: {*re.findall(r"(\w+)\.py", cells[2])} for name, cells in table.items()}
    core = {name.removesuffix(".py") for name in LIMITS}
    assert {name: found - core for name, found in named.items()} == users(EXTRAS)


def test_the_readme_of_the_tests_names_each_file():
    readme = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    names = [file.stem.removeprefix("test_") for file in TESTS if file.parent.name != "extras"]
    names += [file.name for file in (ROOT / "tests").glob("*.py")]
    assert [name for name in names if f"`{name}`" not in readme] == []


@pytest.mark.parametrize("file", HELPERS, ids=lambda file: file.name)
def test_tests_import_neither_tests_nor_benchmarks(file):
    benchmarks = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert foreign(file.read_text(encoding="utf-8"), benchmarks) == []


def test_rooms_are_no_packages_and_names_are_unique():
    """A tests/extras that is a package would hide extras, and pytest imports test files by their bare names."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
    names = [file.name for file in TESTS]
    assert sorted(set(names)) == sorted(names)
    assert {file.parent.name for file in TESTS} == {"core", "extras", "documents"}


# ----------------------------------------------------------------------------------------------------------------
# Each of these is seen


@pytest.mark.parametrize("source, found", [("x = 1\n" * 3, 3), ('"""one\ntwo"""\n# three\n', 3), ("", 0)])
def test_lines_are_counted_with_comments_and_docstrings(source, found):
    assert lines(source) == found


@pytest.mark.parametrize("width, found", [(COLUMNS, []), (COLUMNS + 1, [2])])
def test_a_wide_line_is_seen(width, found):
    assert wide_lines("\n" + "é" * width) == found


@pytest.mark.parametrize("height, found", [(SCREEN, []), (SCREEN + 1, ["f"])])
def test_a_tall_function_is_seen(height, found):
    function = "    def f():\n" + "        x\n" * (height - 1)
    assert tall_functions("class C:\n" + function) == found


@pytest.mark.parametrize("source, found", [
    ("import torch\ny = torch.ops.x(1)", [r"torch\.ops"]),
    ("y = torch . ops", [r"torch\.ops"]),
    ("from torch import distributed\ntorch.distributed.init()", [r"torch\.distributed"]),
    ("torch._convert_weight_to_int4pack(x)", ["int4pack"]),
    ("torch.backends.mkldnn.enabled = False", ["mkldnn"]),
    ('getattr(torch, "CUDAGraph")', ["CUDAGraph"]),
    ("import argparse, readline", [r"\bargparse\b", r"\breadline\b"]),
    ("from x import DeviceMesh\nDeviceMesh.placements", ["DeviceMesh", r"\bplacements\b"]),
    ('"""argparse"""\n# readline\ndef f():\n    """torch.ops"""\n    return replacements  # mkldnn', []),
])  # fmt: skip
def test_a_word_that_belongs_to_extras_is_seen_in_code_alone(source, found):
    assert said(source) == sorted(found)


@pytest.mark.parametrize("source, found", [
    ("a = 1; b = 2", [1]),
    ("a = 1\nif a: b = 2", [2]),
    ("if a:\n    b\nelse: c", [3]),
    ("class C: pass", [1]),
    ("é = 1; b = 2", [1]),
    ("@f\ndef g():\n    if a:\n        b\n    elif c:\n        d\n    return [\n        x for x in y\n    ]", []),
])  # fmt: skip
def test_a_crowded_line_is_seen(source, found):
    assert crowded_lines(source) == found


@pytest.mark.parametrize("source, found", [
    ("from extras import cli", {("", "cli")}),
    ("import extras.cli as x", {("", "cli")}),
    ("import extras", {("", "")}),
    ("if x:\n    from extras.cli import main", {("", "cli")}),
    ("try:\n    from extras import hub\nexcept ImportError:\n    pass", {("", "hub")}),
    ("class C:\n    from extras import hub", {("", "hub")}),
    ('if __name__ == "__main__":\n    from extras.cli import main', {("__main__", "cli")}),
    ("def load():\n    from extras import checks, hub\n    import extras.speed", {
        ("load", "checks"), ("load", "hub"), ("load", "speed")}),
    ("class C:\n    def f(self):\n        if x:\n            from extras.beams import search", {("C.f", "beams")}),
    ("import torch\nfrom os import path", set()),
])  # fmt: skip
def test_a_door_is_seen_wherever_it_stands(source, found):
    assert set(doors(ast.parse(source))) == found


@pytest.mark.parametrize("source, found", [
    ("import llama", {"llama"}), ("import torch, llava", {"llava"}),
    ("def f():\n    from weights import read", {"weights"}),
    ("import vision\nimport torch.nn as llama", set()),
])  # fmt: skip
def test_a_sibling_is_seen_wherever_it_stands(source, found):
    assert siblings("vision.py", source) == found


@pytest.mark.parametrize("source, found", [
    ("from test_cli import start", ["test_cli"]), ("import test_cli", ["test_cli"]),
    ("def f():\n    from benchmarks import full_size", ["benchmarks"]), ("import full_size", ["full_size"]),
    ("from extras import speed\nfrom reference import full_size", []),
])  # fmt: skip
def test_an_import_from_a_test_or_a_benchmark_is_seen(source, found):
    assert foreign(source, {"full_size", "speed"}) == found


TABLE = "| file | adds | door | test |\n|---|---|---|---|\n"
ROW = "| [cli.py](cli.py) | options | the first statement | `test_cli.py` |\n"


@pytest.mark.parametrize("names, readme, tests, found", [
    ({"cli"}, TABLE + ROW, {"test_cli.py"}, []),
    ({"cli", "hub"}, TABLE + ROW, {"test_cli.py", "test_hub.py"}, ["hub"]),
    ({"cli"}, TABLE + ROW + ROW.replace("cli", "hub"), {"test_cli.py"}, ["hub"]),
    ({"cli"}, TABLE + ROW, {"test_hub.py"}, ["cli"]),
    ({"cli"}, TABLE + ROW.replace("options", " "), {"test_cli.py"}, ["cli"]),
    ({"cli"}, TABLE + ROW.replace("test_cli", "test_hub"), {"test_cli.py"}, ["cli"]),
    ({"cli"}, "cli.py has options", {"test_cli.py"}, ["cli"]),
])  # fmt: skip
def test_a_file_without_a_row_or_a_test_is_seen(names, readme, tests, found):
    assert unlisted(names, readme, tests) == found
