"""The table of what was taken in names tests that there are."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_row_names_a_test_that_there_is():
    rows = [line for line in (HERE / "README.md").read_text().splitlines() if "::" in line and "|" in line]
    assert len(rows) > 60
    for row in rows:
        there, here, proof = (cell.strip() for cell in row.strip("|").split(" | "))
        assert min(len(there), len(here)) > 0, row
        file, name = re.fullmatch(r"`(.+)::(\w+)`", proof.rstrip(" |")).groups()
        path = HERE.parents[1] / file if "/" in file else HERE / file
        assert f"def {name}(" in path.read_text(), row
