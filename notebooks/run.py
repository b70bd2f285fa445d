"""Runs the notebooks, and holds what they print against what is kept in them.

    python notebooks/run.py                    all; exit status 1 if one fails or prints something else
    python notebooks/run.py 4 7                only those
    python notebooks/run.py --write            keep what they print and draw, and make the figures of docs/ anew

Each runs in a kernel of its own, in this folder. Pictures are not compared, nor the text of cells tagged "volatile":
what training comes to differs from machine to machine, and the assertions in those cells say within which bounds. Then
the folded solution of each exercise takes the place of its gap, and the check has to say "Right.".
"""

import argparse
import difflib
import re
import resource
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
DUMP = "tests/parity.py --dtype float32 --no-gradients --dump docs/tiny_stages.safetensors"  # as docs/porting.md has it
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


def execute(file):
    """Run a notebook → it with fresh outputs, and the seconds of computing.

    Raises nbclient's error if a cell fails, RuntimeError if a solution is not right.
    """
    fresh = read(file)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    kept = len(fresh.cells)
    for _, check, solution in exercises(fresh):
        fresh.cells.append(nbformat.v4.new_code_cell(f"{solution}\n{check.source}"))
    start = computed()
    options = dict(timeout=900, startup_timeout=300, kernel_name="python3", coalesce_streams=True)
    NotebookClient(fresh, resources={"metadata": {"path": str(FOLDER)}}, **options).execute()
    seconds = computed() - start
    for cell in fresh.cells[kept:]:
        if text(cell).strip() != "Right.":
            raise RuntimeError(f"{file.name}: a solution is not right: {text(cell)}\n{cell.source}")
    del fresh.cells[kept:]
    for cell in fresh.cells:
        cell.metadata.pop("execution", None)  # times of day
    fresh.metadata["language_info"] = {"name": "python"}
    return fresh, seconds


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


def differences(kept, fresh):
    """The lines in which the outputs differ, as a diff."""
    found = []
    for i, (a, b) in enumerate(zip(kept.cells, fresh.cells, strict=True)):
        if a.cell_type == "code" and "volatile" not in tags(a) and text(a) != text(b):
            found += difflib.unified_diff(
                text(a).splitlines(), text(b).splitlines(), f"cell {i}, kept", f"cell {i}, now", lineterm=""
            )
    return found


def write(file, notebook):
    nbformat.write(notebook, file)
    assert file.stat().st_size < 300_000, f"{file.name} is larger than 300 KB: draw smaller"


def figures():
    """Make what docs/ shows anew: the page of --explain, its screenshot, the drawing, the playground, tiny's stages."""
    page = ROOT / "docs" / "explain.html"
    options = ["--model", "tiny", "--image", "tiny/scene.png", "--device", "cpu", "--explain", str(page)]
    command = [sys.executable, "llava.py", *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    screenshot(page, page.with_suffix(".png"))
    subprocess.run([sys.executable, "docs/architecture.py"], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "docs/playground.py", "--screenshot"], cwd=ROOT, check=True)
    subprocess.run([sys.executable, *DUMP.split()], cwd=ROOT, check=True)


def screenshot(page, file):
    """The page in a browser, as it opens."""
    import shutil

    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1060, "height": 760})
        tab.goto(page.as_uri())
        tab.wait_for_selector("body[data-ready]")
        tab.screenshot(path=file)
        browser.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="the beginnings of the names of some, such as 4")
    parser.add_argument("--write", action="store_true", help="keep the outputs, and make the figures of docs/ anew")
    options = parser.parse_args()
    failed = False
    for file in notebooks(options.names):
        fresh, seconds = execute(file)
        found = [] if options.write else differences(read(file), fresh)
        late = f", more than {SECONDS} s" if seconds > SECONDS else ""
        print(
            f"{file.name:<28} {seconds:5.0f} s of computing{late}{': prints something else' if found else ''}",
            flush=True,
        )
        print("".join(f"  {line}\n" for line in found), end="")
        failed |= bool(found or late)
        if options.write:
            write(file, fresh)
    if options.write and not options.names:
        figures()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
