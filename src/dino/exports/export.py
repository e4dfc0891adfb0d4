"""Models out: `dino export` and `dino.export`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from huggingface_hub import constants
from torch import nn

from dino import files, weights
from dino.exports import card, compare
from dino.exports.push import log_in, upload
from dino.options.commands import ExportOptions
from dino.options.rules import checked
from dino.weights import fingerprint


class ExportError(RuntimeError):
    """An export computes something else than its model; the message says how much."""


@checked(ExportOptions, "model", "out", "num_heads", "offline", "push", "private")
def export(
    model: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str] | None = None,
    num_heads: int | None = None,
    offline: bool = False,
    push: str | None = None,
    private: bool = False,
) -> list[compare.Difference]:
    """Write a model for others, with its card, and compare what was written with the model itself.

    Args:
        model: as `dino.load` takes it.
        to: a format: a key of `FORMATS` of `dino.exports.compare`.
        out: file or folder to write; the card is its README.md, or lies beside it. None: only `push`.
        num_heads, offline: as for `dino.load`.
        push: ORG/NAME, a repository of Hugging Face's hub to upload it to; it is created if there is none.
        private: of `push`: only its owners see it.

    Raises:
        ValueError: the model cannot be written so, or a package is missing.
        ExportError: what was written computes something else. In both cases nothing is left at `out`.
        PushError: the hub refuses it or cannot be reached; what was written stays at `out`.
    """
    if push is None and (out is None or private):
        raise ValueError(
            "say where the export goes, with --out PATH or --push ORG/NAME or both; --private is of --push."
        )
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model" + (compare.FORMATS[to].ending if to in compare.FORMATS else ""))
            return export(model, to, path, num_heads, offline, push, private)
    path = Path(out).expanduser()
    if os.path.exists(path):  # of a name that is too long it is no error
        raise ValueError(f"--out {out} exists already; choose another name, or remove it.")
    compare.check_format(to, path)
    api = log_in(push, offline) if push is not None else None
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
        facts = _list_facts(found, backbone, compare.describe_differences(differences, to))
        about = (fingerprint(backbone), backbone, found.step)
        text = card.render_card(os.fspath(model), to, path, facts, *about)
        (path / "README.md" if path.is_dir() else path.with_name(path.name + ".md")).write_text(text)
    if api is not None and push is not None:
        name = f"model{path.suffix or '.pth'}"
        text = card.render_card(os.fspath(model), to, Path(name), facts, *about, repo=push)
        written = {f.name: f for f in path.iterdir()} if path.is_dir() else {name: path}
        upload(api, push, written | {"README.md": text.encode()}, private)
    return differences


def _list_facts(found: weights.Weights, backbone: nn.Module, difference: str) -> dict[str, str]:
    """What the card says of the model, by what it is called there."""
    facts = {
        "architecture": ", ".join(f"{k} {v}" for k, v in found.arguments.items() if v is not None),
        "parameters": f"{sum(p.numel() for p in backbone.parameters()):,}",
        "largest difference from the model that was exported": difference,
    }
    if found.best is not None:
        facts["of the teachers of its run"] = found.best.why
    return facts


def export_command(options: ExportOptions) -> None:
    differences = export(**vars(options))
    print(f"{options.out or options.push}: {options.to} of {options.model}")
    print(f"Largest difference from the model itself: {compare.describe_differences(differences, options.to)}")
    if options.push is not None:
        print(f"Pushed to {constants.ENDPOINT}/{options.push}")
