"""Tables as text."""

from common.tables import markdown_table


def test_a_cell_stays_a_cell():
    assert markdown_table(["a|b", "n"], [["x\ny", 1]]).splitlines() == ["| a\\|b | n |", "| --- | --- |", "| x y | 1 |"]
