"""Lines of code by area, held to the budget in pyproject.toml ([tool.dino.budget]): exit code 1 above it.

A line of code holds a token of Python that is not a comment and not a docstring; blank lines do not count. Templates,
style sheets and TOML are counted apart: their lines that are not blank.

    python tools/count_lines.py [FOLDER]
"""

from __future__ import annotations

import ast
import io
import sys
import textwrap
import tokenize
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
OTHER = {".html", ".css", ".js", ".jinja", ".j2", ".toml"}


def count_code(source: str) -> int:
    """Lines of code of one Python file; a string that stands alone counts as a docstring."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code)


def count_areas(package: Path) -> tuple[Counter[str], Counter[str]]:
    """Lines of Python code and of other text, by the module or folder directly below `package`."""
    python: Counter[str] = Counter()
    other: Counter[str] = Counter()
    for path in sorted(package.rglob("*")):
        area = path.relative_to(package).parts[0].removesuffix(".py")
        if path.suffix == ".py":
            python[area] += count_code(path.read_text(encoding="utf-8"))
        elif path.suffix in OTHER:
            other[area] += sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines())
    return python, other


def main(package: Path) -> int:
    budget = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["dino"]["budget"]
    python, other = count_areas(package)
    core = {area: python[area] for area in budget["core_areas"]}
    rest = {area: lines for area, lines in python.most_common() if area not in core}
    for title, areas in (("core", core), ("around it", rest), ("not Python", dict(other))):
        listed = ", ".join(f"{area} {lines:,}" for area, lines in areas.items())
        print(
            textwrap.fill(
                listed, 120, initial_indent=f"{title:10}{sum(areas.values()):7,}   ", subsequent_indent=20 * " "
            )
        )
    found = {"core": sum(core.values()), "all": python.total()}
    for name, lines in found.items():
        if lines > budget[name]:
            print(
                f"{lines:,} lines of code in {name} are above the budget of {budget[name]:,}: shorten, or raise it in "
                "pyproject.toml ([tool.dino.budget]) and say why in the commit.",
                file=sys.stderr,
            )
    print(
        f"{'all':12}{found['all']:6,}   of {budget['all']:,} lines of code; core {found['core']:,} of {budget['core']:,}"
    )
    return int(any(lines > budget[name] for name, lines in found.items()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "src" / "dino"))
