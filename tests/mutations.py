"""Deliberate bugs, planted one at a time: the tests must catch each.

    python tests/mutations.py                 all of them; exit status 1 if one survives
    python tests/mutations.py cls pad         those whose names contain one of the words

Most are bugs that real LLaVA ports had and nobody noticed, as their answers stayed plausible. Each is a change of a line in
one of the modules. The tests named beside it are run first; if they let it pass, so must the whole suite before it is called a
survivor. Everything heavy is imported once, and each bug gets a copy of the repository and a fork of this process.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

MUTATIONS = [  # name, file, the right line, the wrong one, the tests that should see it
]


def plant(folder, file, right, wrong):
    """Copy the repository to a folder and change one place of it."""
    keep = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", "notebooks", "benchmarks")
    shutil.copytree(ROOT, folder, ignore=keep, dirs_exist_ok=True)
    source = (folder / file).read_text()
    if source.count(right) != 1:
        raise SystemExit(f"{file} holds {source.count(right)} times, not once: {right}")
    (folder / file).write_text(source.replace(right, wrong))


def first_failure(folder, tests):
    """Run tests in a fork, in the given repository, until the first fails → its name, or None. A bug that makes them hang
    is caught by the time it takes."""
    result = folder / "caught"
    child = os.fork()
    if child == 0:
        os.setsid()
        with contextlib.suppress(BaseException), open(folder / "out", "w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            os.chdir(folder)
            sys.path[:] = [str(folder), str(folder / "tests"), *[path for path in sys.path if not path.startswith(str(ROOT))]]
            import pytest

            class Note:
                def pytest_runtest_logreport(self, report):
                    if report.failed:
                        result.write_text(report.nodeid)

                def pytest_collectreport(self, report):
                    if report.failed:
                        result.write_text(f"{report.nodeid} (cannot be imported)")

            arguments = ["-x", "-q", "-p", "no:cacheprovider", *tests]
            pytest.main(arguments, plugins=[Note()])
        os._exit(0)
    limit = time.monotonic() + 120
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > limit:
            os.killpg(child, 9)
            os.waitpid(child, 0)
            return f"{' '.join(tests)} (did not end)"
        time.sleep(0.05)
    return result.read_text() if result.exists() else None


def try_one(mutation):
    """Plant one bug → (its name, the test that caught it or None, seconds)."""
    name, file, right, wrong, tests = mutation
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        plant(Path(folder), file, right, wrong)
        caught = first_failure(Path(folder), tests.split()) or first_failure(Path(folder), ["tests"])
    return name, caught, time.monotonic() - start


def main(words):
    import reference  # noqa: F401 (transformers and torch, once for all)
    import torch
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel  # noqa: F401

    torch.set_num_threads(1)
    chosen = [mutation for mutation in MUTATIONS if not words or any(word in mutation[0] for word in words)]
    for _, file, right, wrong, _ in chosen:
        source = (ROOT / file).read_text()
        if source.count(right) != 1 or right == wrong:
            print(f"{file} holds {source.count(right)} times, not once: {right}", file=sys.stderr)
            return 2
    start, survivors = time.monotonic(), []
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2))) as pool:
        for name, caught, seconds in pool.map(try_one, chosen):
            print(f"{name:<64} {caught or 'SURVIVED'}  ({seconds:.0f} s)", flush=True)
            survivors += [] if caught else [name]
    print(f"{len(chosen)} bugs, {len(survivors)} survived, {time.monotonic() - start:.0f} s")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
