"""Models in and out: `dino models`, `dino export` and `dino.export`."""

from __future__ import annotations

import os
from pathlib import Path

from dino import files, weights
from dino.exports import card, compare
from dino.options.commands import ExportOptions
from dino.options.rules import checked
from dino.weights import fingerprint


class ExportError(RuntimeError):
    """An export computes something else than its model; the message says how much."""


@checked(ExportOptions, "model", "out", "num_heads", "offline")
def export(
    model: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    num_heads: int | None = None,
    offline: bool = False,
) -> list[compare.Difference]:
    """Write a model for others, with its card, and compare what was written with the model itself.

    Args:
        model: as `dino.load` takes it.
        to: a format: a key of `FORMATS` of `dino.exports.compare`.
        out: file or folder to write; the card is its README.md, or lies beside it.
        num_heads, offline: as for `dino.load`.

    Raises:
        ValueError: the model cannot be written so, or a package is missing.
        ExportError: what was written computes something else. In all cases nothing is left at `out`.
    """
    path = Path(out).expanduser()
    if os.path.exists(path):  # of a name that is too long it is no error
        raise ValueError(f"--out {out} exists already; choose another name, or remove it.")
    compare.check_format(to, path)
    found = weights.read(model, offline, num_heads, only_backbone=to != "reference-checkpoint")
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        compare.FORMATS[to].write(found, path)
        differences = compare.compare(found, to, path)
        if wrong := [seen.size for seen in differences if not seen.alike <= compare.TOLERANCE * seen.scale]:
            raise ExportError(
                f"{to} of {model} gives other numbers than the model for images of {' and '.join(wrong)}: "
                f"{compare.describe_differences(differences, to)}; nothing was written."
            )
        backbone = weights.build_backbone(found)
        facts = {
            "architecture": ", ".join(f"{k} {v}" for k, v in found.arguments.items() if v is not None),
            "parameters": f"{sum(p.numel() for p in backbone.parameters()):,}",
            "largest difference from the model that was exported": compare.describe_differences(differences, to),
        }
        if found.best is not None:
            facts["of the teachers of its run"] = found.best.why
        about = (fingerprint(backbone), backbone.image_size, found.step)
        text = card.render_card(os.fspath(model), to, path, facts, *about)
        (path / "README.md" if path.is_dir() else path.with_name(path.name + ".md")).write_text(text)
    return differences


def export_command(options: ExportOptions) -> None:
    differences = export(options.model, options.to, options.out, options.num_heads, options.offline)
    print(f"{options.out}: {options.to} of {options.model}")
    print(f"Largest difference from the model itself: {compare.describe_differences(differences, options.to)}")
