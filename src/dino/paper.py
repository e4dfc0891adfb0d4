"""Every published figure, once, read from paper.toml: what the paper reports of its models, and its ablations.

`FIGURES` is what `dino eval` prints beside its own figures. `TABLES` are the ablations as rows of option changes, which
`dino ablate` runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dino import errors
from dino.options import flatten_names
from dino.options.recipes import list_changes
from dino.options.toml import read_packaged

# Mini-runs on small images; --recipe and --epochs replace them.
TINY_RECIPE, TINY_EPOCHS = "cifar10", 8

_DATA = read_packaged("paper.toml")

# Evaluation -> model, as `Backbone.name` has it -> figure, as the evaluation calls it -> percent.
FIGURES: dict[str, dict[str, dict[str, float]]] = _DATA["figures"]


class Row(NamedTuple):
    name: str
    changes: dict[str, Any]
    tiny: dict[str, Any]  # the changes at tiny scale
    knn: float | None
    linear: float | None


class Table(NamedTuple):
    title: str
    rows: list[Row]
    recipe: str  # what paper scale starts from
    base: dict[str, Any]  # changes to it, or to the tiny recipe, for all rows
    paper_base: dict[str, Any]  # and at paper scale only


def _read_row(row: dict[str, Any]) -> Row:
    common, own = list_changes(row.get("use", ())), flatten_names(row.get("options", {}))
    tiny = flatten_names(row["tiny"]) if "tiny" in row else own
    return Row(row["name"], common | own, common | tiny, row.get("knn"), row.get("linear"))


TABLES = {
    name: Table(
        table["title"],
        [_read_row(row) for row in table["rows"]],
        table.get("recipe", "vit_small_300ep"),
        flatten_names(table.get("base", {})),
        flatten_names(table.get("paper_base", {})),
    )
    for name, table in _DATA["tables"].items()
}


def find_table(name: str) -> Table:
    """A table by name, with or without the word itself ("7", "table7")."""
    wanted = name.lower().removeprefix("table").strip("-_ ")
    if wanted not in TABLES:
        raise errors.unknown("table", name, TABLES)
    return TABLES[wanted]
