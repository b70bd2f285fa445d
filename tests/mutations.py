"""Deliberate bugs, planted one at a time: the tests must catch each.

    python tests/mutations.py                 all of them; exit status 1 if one survives
    python tests/mutations.py cls pad         those whose names contain one of the words

mutations.txt lists them, and says how a bug is written down. Everything heavy is imported once, and each bug gets a
copy of the repository and a fork of this process.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNTESTED = "this processor"  # with which the reason begins for which a test of a kernel skips where there is none


def read(text):
    """The blocks of mutations.txt, each as (name, file, what is right there, what is planted instead, test files)."""
    for block in re.split(r"\n\s*\n", text.strip()):
        if block.startswith("#"):
            continue
        match = re.fullmatch(r"(.+)\n([\w/]+\.py): (.+)\n((?:-.*\n)+)((?:\+.*\n?)+)", block)
        if match is None:
            raise ValueError(f"this is not a name, a file and its tests, lines with - and lines with +:\n{block}")
        name, file, tests, *snippets = match.groups()
        yield name, file, *("\n".join(line[2:] for line in snippet.splitlines()) for snippet in snippets), tests


MUTATIONS = [*read(Path(__file__).with_suffix(".txt").read_text(encoding="utf-8"))]


def plant(folder, file, right, wrong):
    """Copy the repository to a folder and change one place of it."""
    keep = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache")
    shutil.copytree(ROOT, folder, ignore=keep, dirs_exist_ok=True)
    source = (folder / file).read_text()
    if source.count(right) != 1:
        raise SystemExit(f"{file} holds {source.count(right)} times, not once: {right}")
    source = source.replace(right, wrong)
    compile(source, file, "exec")
    (folder / file).write_text(source)


def ours(path):
    """Whether a path lies in this repository, and not in a virtual environment that happens to stand inside it."""
    path = Path(path).resolve()
    return path.is_relative_to(ROOT) and not path.is_relative_to(Path(sys.prefix).resolve())


def start(folder, tests):
    """Run tests in a fork, in the given repository, until the first fails → the fork's process id. A whole file runs
    without its slow tests; one that is named by itself, file.py::test, may be slow.
    """
    child = os.fork()
    if child:
        return child
    status = 70  # of a fork that never came to its tests
    try:
        os.setsid()
        out = os.open(folder / "out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(folder)
        for name, module in list(sys.modules.items()):  # what came from here must come from there
            if name != "__main__" and ours(getattr(module, "__file__", None) or sys.prefix):
                del sys.modules[name]
        sys.path[:] = [str(folder), str(folder / "tests"), *[path for path in sys.path if not ours(path)]]
        import pytest

        class Note:
            def pytest_runtest_logreport(self, report):
                if report.failed:
                    (folder / "caught").write_text(report.nodeid)
                elif report.skipped and UNTESTED in str(report.longrepr):
                    (folder / "skipped").touch()

        slow_too = ["-m", ""] if all("::" in test for test in tests) else []
        status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *slow_too, *tests], plugins=[Note()]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def verdict(folder, status):
    """How a fork ended → the name of the test that failed; UNTESTED if none did, and some skip on this processor;
    None if all passed. Anything else is no verdict, and stops us.
    """
    code = os.waitstatus_to_exitcode(status)
    if code == 1 and (folder / "caught").exists():
        return (folder / "caught").read_text()
    if code != 0:
        raise SystemExit(f"the tests did not run (exit status {code}):\n{(folder / 'out').read_text()}")
    return UNTESTED if (folder / "skipped").exists() else None


def try_all(mutations, jobs, limit=600):
    """Plant each bug and run the tests beside it; yields (name, what verdict says of it, seconds).

    Forks from this one thread only: a fork of a process with several may find a lock that nobody is left to open.
    """
    waiting, running = list(reversed(mutations)), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                mutation = waiting.pop()
                folder = tempfile.TemporaryDirectory()
                plant(Path(folder.name), *mutation[1:4])
                tests = [f"tests/{test}" for test in mutation[4].split()]
                running[start(Path(folder.name), tests)] = mutation[0], folder, time.monotonic()
            child, status = os.waitpid(-1, os.WNOHANG)
            if not child:
                time.sleep(0.02)
                if any(time.monotonic() - began > limit for _, _, began in running.values()):
                    raise SystemExit(f"the tests did not end within {limit} s")
                continue
            name, folder, began = running.pop(child)
            caught = verdict(Path(folder.name), status)
            folder.cleanup()
            yield name, caught, time.monotonic() - began
    finally:
        for child in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only the bugs whose names contain one of them")
    words = parser.parse_args(arguments).words

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
    began, survivors, untested = time.monotonic(), [], 0
    for name, caught, seconds in try_all(chosen, jobs=os.cpu_count() or 2):
        survivors += [name] if caught is None else []
        untested += caught == UNTESTED
        found = {None: "SURVIVED", UNTESTED: "not caught, as its tests skip on this processor"}.get(caught, caught)
        print(f"{name:<64} {found}  ({seconds:.0f} s)", flush=True)
    skipped = f", {untested} cannot be told on this processor" if untested else ""
    named = "".join(f"\n  {name}" for name in survivors)
    print(f"{len(chosen)} bugs, {len(survivors)} survived{skipped}, {time.monotonic() - began:.0f} s{named}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
