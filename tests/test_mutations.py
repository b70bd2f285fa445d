"""The tests of the tests."""

import subprocess
import sys

import pytest
from reference import ROOT


@pytest.mark.slow
def test_no_deliberate_bug_survives():
    run = subprocess.run([sys.executable, "tests/mutations.py"], cwd=ROOT, capture_output=True, text=True)
    print(run.stdout, run.stderr)
    assert run.returncode == 0, run.stdout + run.stderr
