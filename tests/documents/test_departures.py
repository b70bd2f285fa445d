"""Each departure from the reference names a test that holds it."""

import re

from reference import ROOT


def test_each_row_names_a_test_that_exists():
    rows = [line for line in (ROOT / "docs" / "departures.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| what ")]
    assert len(rows) > 30
    for row in rows:
        file, test = re.search(r"`(test_\w+\.py)::(test_\w+)` \|$", row).groups()
        assert f"def {test}(" in next((ROOT / "tests").rglob(file)).read_text(), row


def test_tables_are_whole_and_say_each_thing_once():
    text = (ROOT / "docs" / "departures.md").read_text()
    assert not re.search(r"^\|.*\n\n\|", text, re.M)  # a blank line ends a table: what follows would be no row of it
    for section in re.split("^## ", text, flags=re.M):
        first = [row.split(" | ")[0] for row in section.splitlines() if row.startswith("| ")]
        assert len(first) == len({*first})
