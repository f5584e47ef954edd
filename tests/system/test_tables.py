"""Tables in Markdown and for a console."""

from __future__ import annotations

import pytest

from spatial_mamba_d2.system.tables import console_table, markdown_table

HEADER = ("model", "s")
ROWS = [("swin", "0.7"), ("", "10.25")]


def test_markdown():
    expected = "| model | s |\n| --- | --- |\n| swin | 0.7 |\n|  | 10.25 |"
    assert markdown_table(HEADER, iter(ROWS)) == expected
    assert markdown_table(HEADER, []) == "| model | s |\n| --- | --- |"


def test_console():
    assert console_table(HEADER, iter(ROWS)) == "model      s\nswin     0.7\n       10.25"
    assert console_table(HEADER, []) == "model  s"
    assert console_table(("model",), [("a longer name",)]) == "model\na longer name"


@pytest.mark.parametrize("table", [markdown_table, console_table])
@pytest.mark.parametrize("row", [("swin",), ("swin", "0.7", "0.8")])
def test_a_row_of_another_length_is_an_error(table, row):
    with pytest.raises(ValueError, match=r"rows must have 2 cells each, got \['swin'"):
        table(HEADER, [row])
