"""The tests of the tests."""

import subprocess
import sys

import mutations
import pytest
from reference import ROOT


def test_each_bug_is_one_change_of_one_place():
    """Whether the tests beside it catch it, the slow test says."""
    assert len(mutations.MUTATIONS) > 90 and len({name for name, *_ in mutations.MUTATIONS}) == len(mutations.MUTATIONS)
    for name, file, right, planted, tests in mutations.MUTATIONS:
        source = (ROOT / file).read_text()
        assert source.count(right) == 1, f"{name}: {file} holds {source.count(right)} times, not once: {right}"
        assert planted != right
        compile(source.replace(right, planted), file, "exec")
        assert all((ROOT / "tests" / test.split("::")[0]).is_file() for test in tests.split()), f"{name}: {tests}"


def test_a_bug_may_be_of_several_lines_and_in_any_folder():
    text = "# what it is\n\na name\nextras/x.py: core/test_a.py extras/test_b.py\n- one\n-     two\n-\n+ three\n"
    assert [*mutations.read(text)] == [
        ("a name", "extras/x.py", "one\n    two\n", "three", "core/test_a.py extras/test_b.py")
    ]


@pytest.mark.parametrize(
    "block", ["a name", "a name\nx.py: t.py\n- one", "a name\nx.py: t.py\n+ one\n- two", "x.py: t.py\n- a\n+ b"]
)
def test_a_block_that_is_no_bug_is_shown(block):
    with pytest.raises(ValueError, match="this is not a name, a file and its tests"):
        [*mutations.read(block)]


@pytest.mark.slow
def test_no_deliberate_bug_survives():
    run = subprocess.run([sys.executable, "tests/mutations.py"], cwd=ROOT, capture_output=True, text=True)
    last = "\n".join((run.stdout + run.stderr).splitlines()[-40:])  # who survived, or why it stopped
    assert run.returncode == 0, last
