"""Runs the notebooks, and compares what they print with what is kept in them.

    python notebooks/run.py                    all; exit status 1 if one fails or prints something else
    python notebooks/run.py 4 7                only those
    python notebooks/run.py --write            keep what they print and draw, and make the figures of docs/ anew
    python notebooks/run.py --handout FOLDER   for students: a copy of the project whose notebooks have neither outputs
                                               nor solutions

Each runs in a kernel of its own, in this folder. Pictures are not compared, nor the text of cells tagged "volatile":
what training comes to differs from machine to machine, and the assertions in those cells say within which bounds. Nor
are those that rest, since a package is missing: they say which. Then the folded solution of each exercise takes the
place of its gap, and the check has to say "Right.".
"""

import argparse
import difflib
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
DUMP = "tests/parity.py --dtype float32 --no-gradients --dump docs/tiny_stages.safetensors"  # as docs/porting.md has it
LARGEST = 400_000  # bytes of a notebook, with figures of 150 dpi
RESTS = "This cell needs "  # what a cell prints that does nothing, for lack of a package: lesson.needs
SECONDS = 300  # of computing that a notebook may take on any machine; waiting for other programs does not count


def notebooks(wanted=()):
    """The notebooks whose names begin with one of the words, all if there are none."""
    return [file for file in sorted(FOLDER.glob("[0-9]*.ipynb")) if not wanted or file.name.startswith(tuple(wanted))]


def read(file):
    return nbformat.read(file, as_version=4)


def tags(cell):
    return cell.metadata.get("tags", [])


def exercises(notebook):
    """(the cell with the gap, the cell that checks, the folded solution's code) of each exercise."""
    cells = notebook.cells
    for i, cell in enumerate(cells):
        if "exercise" in tags(cell):
            solution = re.search(r"<details>.*?```python\n(.*?)```.*?</details>", cells[i + 2].source, flags=re.S)
            yield cell, cells[i + 1], solution[1]


def execute(file, answers=()):
    """Run a notebook → it with fresh outputs, the seconds of computing, and what the checks print about the answers.

    answers: [(number of an exercise, such as 3.1, the code of an answer)], of which only its own are tried. Raises
    nbclient's error if a cell fails, RuntimeError if a solution is not right.
    """
    fresh = read(file)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    kept = len(fresh.cells)
    tasks = {f"{file.name[0]}.{i}": task for i, task in enumerate(exercises(fresh), start=1)}
    for _, check, solution in tasks.values():
        fresh.cells.append(nbformat.v4.new_code_cell(f"{solution}\n{check.source}"))
    tried = [(code, tasks[number][1].source) for number, code in answers if number in tasks]
    fresh.cells += [nbformat.v4.new_code_cell("\n".join(parts)) for parts in tried]
    start = computed()
    options = dict(timeout=900, startup_timeout=300, kernel_name="python3", coalesce_streams=True)
    options["extra_arguments"] = ["--IPKernelApp.log_level=ERROR"]  # its warning of TCP is not about the lesson
    NotebookClient(fresh, resources={"metadata": {"path": str(FOLDER)}}, **options).execute()
    seconds = computed() - start
    said = [text(cell) for cell in fresh.cells[kept + len(tasks) :]]
    for cell in fresh.cells[kept : kept + len(tasks)]:
        if text(cell).strip() != "Right.":
            raise RuntimeError(f"{file.name}: a solution is not right: {text(cell)}\n{cell.source}")
    del fresh.cells[kept:]
    for cell in fresh.cells:
        cell.metadata.pop("execution", None)  # times of day
    fresh.metadata["language_info"] = {"name": "python"}
    return fresh, seconds, said


def computed():
    """The seconds that ended child processes, kernels among them, have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def text(cell):
    """What a code cell prints, without pictures."""
    parts = [
        output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", [])
    ]
    return "".join(part for part in parts if not part.startswith("<Figure"))


def resting(notebook):
    """Why cells of a notebook that was run did nothing: what each of them prints."""
    return [text(cell).strip() for cell in notebook.cells if text(cell).startswith(RESTS)]


def differences(kept, fresh):
    """The lines in which the outputs differ, as a diff."""
    found = []
    for i, (a, b) in enumerate(zip(kept.cells, fresh.cells, strict=True)):
        compared = a.cell_type == "code" and "volatile" not in tags(a) and not text(b).startswith(RESTS)
        if compared and text(a) != text(b):
            found += difflib.unified_diff(
                text(a).splitlines(), text(b).splitlines(), f"cell {i}, kept", f"cell {i}, now", lineterm=""
            )
    return found


def write(file, notebook):
    nbformat.write(notebook, file)
    assert file.stat().st_size < LARGEST, f"{file.name} is larger than {LARGEST / 1e3:.0f} KB: draw smaller"


def blank(notebook):
    """Make a notebook one to work in: no outputs, no solutions, no rubrics."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        else:
            cell.source = re.sub(r"\s*<details>.*?</details>", "", cell.source, flags=re.S)
    notebook.cells = [cell for cell in notebook.cells if cell.source]
    return notebook


def handout(folder):
    """Copy the project to a folder, with blank notebooks. Raises ValueError if something is there already."""
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: give the name of a folder that is new or empty")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:  # not a clone, but a download
        files = [f for f in ROOT.rglob("*") if not any(p.startswith((".", "__")) for p in f.relative_to(ROOT).parts)]
    files = [f for f in files if f.is_file() and folder not in f.parents and f.name != "wrong_answers.txt"]
    for file in files:
        target = folder / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file in notebooks():
            nbformat.write(blank(read(file)), target)
        else:
            shutil.copy(file, target)
    return folder


def figures():
    """Make what docs/ shows anew: the page of --explain, its screenshot, drawings, the playground, tiny's stages."""
    page = ROOT / "docs" / "explain.html"
    options = ["--model", "tiny", "--image", "tiny/scene.png", "--device", "cpu", "--explain", str(page)]
    command = [sys.executable, "llava.py", *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    screenshot(page, page.with_suffix(".png"))
    subprocess.run([sys.executable, "docs/architecture.py"], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "docs/drawings.py"], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "docs/playground.py", "--screenshot"], cwd=ROOT, check=True)
    subprocess.run([sys.executable, *DUMP.split()], cwd=ROOT, check=True)


def screenshot(page, file):
    """The page in a browser, as it opens."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1060, "height": 1190})
        tab.goto(page.as_uri())
        tab.wait_for_selector("body[data-ready]")
        tab.screenshot(path=file)
        browser.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="the beginnings of the names of some, such as 4")
    parser.add_argument("--write", action="store_true", help="keep the outputs, and make the figures of docs/ anew")
    parser.add_argument("--handout", metavar="FOLDER", help="copy the project there, without outputs and solutions")
    options = parser.parse_args()
    if options.handout is not None:
        try:
            folder, number = handout(options.handout), len(notebooks())
            print(f"{folder}: {number} notebooks without outputs and solutions, and all that they need")
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    return run(options)


def run(options):
    """Run those that are asked for, and end with a verdict → the exit status."""
    wrong, files = [], notebooks(options.names)
    for file in files:
        try:
            fresh, seconds, _ = execute(file)
        except (CellExecutionError, RuntimeError) as error:
            print(f"{file.name:<28} fails:\n{error}", flush=True)
            wrong.append(file.name)
            continue
        found = [] if options.write else differences(read(file), fresh)
        late = f", more than {SECONDS} s" if seconds > SECONDS else ""
        says = ": prints something else" if found else ""
        print(f"{file.name:<28} {seconds:5.0f} s of computing{late}{says}", flush=True)
        print("".join(f"  {line}\n" for line in found), end="")
        wrong += [file.name] * bool(found or late)
        if rests := resting(fresh):
            print(f"  {len(rests)} cells rest{' and nothing is written' * options.write}. {rests[0]}")
        elif options.write:
            write(file, fresh)
    if options.write and not options.names:
        figures()
    print(verdict(len(files), wrong, options.write))
    return int(bool(wrong) or not files)


def verdict(number, wrong, written=False):
    """The last line: what all of it comes to."""
    if wrong:
        return f"{len(wrong)} of {number} are not as they should be: {', '.join(wrong)}."
    if not number:
        return "No notebook has such a name."
    those = {1: "It prints", 2: "Both print"}.get(number, f"All {number} print")
    kept = "what is now kept" if written else "what they should" if number > 1 else "what it should"
    return f"{those} {kept}, and every solution is right."


if __name__ == "__main__":
    sys.exit(main())
