"""Tables: columns stand below each other, and no cell breaks its row."""

import pytest

from fbpc_ray.core.tables import escape_pipes, markdown_table, text_table


def test_a_text_table_has_columns_of_the_widest_cell():
    assert text_table(["a", "long name", "c"], [["first", "1", ""], ["x", "22", "333"]]) == (
        "a      long name  c\nfirst  1\nx      22         333"
    )
    assert text_table(["only", "head"], []) == "only  head"
    with pytest.raises(ValueError):
        text_table(["a", "b"], [["1"]])


def test_a_markdown_table_has_one_line_a_row():
    assert markdown_table(["a", "b"], [["1", "x|y"], ["*2*", "two\n lines"]]) == (
        "| a | b |\n|---|---|\n| 1 | x\\|y |\n| *2* | two lines |"
    )
    with pytest.raises(ValueError, match=r"expected 2 cells in every row, got \[1, 2\]"):
        markdown_table(["a", "b"], [["1"]])


def test_markdown_cells_are_escaped_as_asked_for():
    assert markdown_table(["a"], [["b|c"]], str.upper) == "| A |\n|---|\n| B|C |"
    assert escape_pipes(" a |\tb ") == "a \\| b"
