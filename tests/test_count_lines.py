"""What the line budget of `make check` counts."""

from __future__ import annotations

import runpy
from pathlib import Path

TOOL = runpy.run_path(str(Path(__file__).parent.parent / "tools" / "count_lines.py"))

SOURCE = '''"""A module.

Of several lines."""

import os  # code, and a comment


# a comment
def name(x: int) -> str:
    """A docstring."""
    text = """two
lines"""
    return os.path.join(
        text,

        str(x),
    )
'''


def test_code_is_what_is_no_blank_line_comment_or_docstring():
    assert TOOL["count_code"](SOURCE) == 8


def test_areas_are_the_modules_and_folders_of_the_package(tmp_path, capsys):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text("x = 1\n")
    (tmp_path / "room" / "page.html").write_text("<p>\n\n</p>\n")
    (tmp_path / "method.py").write_text("x = 1\ny = 2\n")
    assert TOOL["count_areas"](tmp_path) == ({"room": 1, "method": 2}, {"room": 2})
    assert TOOL["main"](tmp_path) == 0
    (tmp_path / "method.py").write_text("x = 1\n" * 9000)
    assert TOOL["main"](tmp_path) == 1
    assert "9,000 lines of code in core are above the budget" in capsys.readouterr().err
