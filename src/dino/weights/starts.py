"""Good weights to start from, and what `dino models` does: list them and the authors' releases, or download one.

Figures are what their authors published for ImageNet: 20-NN as for DINO, and a linear classifier. Licenses are those that
timm states.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from dino import names
from dino.options.commands import ModelsOptions
from dino.weights import hub, releases

_OPEN, _DINOV3 = "Apache-2.0", "DINOv3 license: not open"


class Start(NamedTuple):
    name: str
    architecture: str
    megabytes: int
    knn: float | None  # ImageNet top-1, percent
    linear: float | None
    license: str


STARTS = (
    Start("timm:vit_small_patch14_dinov2.lvd142m", "ViT-S/14", 88, 79.0, 81.1, _OPEN),
    Start("timm:vit_small_patch14_reg4_dinov2.lvd142m", "ViT-S/14, registers", 88, 79.1, 80.9, _OPEN),
    Start("timm:vit_base_patch14_dinov2.lvd142m", "ViT-B/14", 346, 82.1, 84.5, _OPEN),
    Start("timm:vit_base_patch14_reg4_dinov2.lvd142m", "ViT-B/14, registers", 346, 82.0, 84.6, _OPEN),
    Start("timm:vit_large_patch14_dinov2.lvd142m", "ViT-L/14", 1217, 83.5, 86.3, _OPEN),
    Start("timm:vit_small_patch16_dinov3.lvd1689m", "ViT-S/16, RoPE", 86, None, None, _DINOV3),
    Start("timm:vit_base_patch16_dinov3.lvd1689m", "ViT-B/16, RoPE", 343, None, None, _DINOV3),
    Start("timm:convnext_tiny.dinov3_lvd1689m", "ConvNeXt-T", 111, None, None, _DINOV3),
    Start("timm:vit_base_patch16_clip_224.openai", "ViT-B/16 of CLIP", 343, None, None, _OPEN),
    Start("timm:vit_base_patch16_siglip_224.v2_webli", "ViT-B/16 of SigLIP 2", 371, None, None, _OPEN),
    Start("timm:resnet50.a1_in1k", "ResNet-50, with labels", 102, None, None, _OPEN),
    Start("timm:resnet18.a1_in1k", "ResNet-18, with labels", 47, None, None, _OPEN),
)


def models_command(options: ModelsOptions) -> None:
    """List good weights to start from, or download those of a name and print their path."""
    if name := options.name:
        of_hub = names.is_hub_name(name)
        print(
            hub.fetch_named(name, options.offline).weights if of_hub else releases.fetch_release(name, options.offline)
        )
        return
    console = Console(width=None if os.isatty(1) else 130)
    console.print(_draw("Releases of DINO's authors (in parts: * cached)", _list_releases(), "parts"))
    console.print(_draw("Newer weights to start from", [_list(*start) for start in STARTS]))
    console.print(
        "Any other: timm:NAME (timm.list_pretrained()) and hf:ORG/NAME (vit, dinov2, dinov2_with_registers, dinov3_vit, "
        "dinov3_convnext, and what timm or dino saved), each with @REVISION.\nFigures: ImageNet top-1, %, as published."
    )


def _list_releases() -> list[tuple[str, ...]]:
    rows = []
    for name, it in names.RELEASES.items():
        parts = " ".join(part + "*" * releases.locate_cached(file).is_file() for part, file in it.files.items())
        rows.append(_list(name, it.arch, it.megabytes, it.knn, it.linear, releases.LICENSE, parts))
    return rows


def _list(name: str, arch: str, megabytes: int, knn: float | None, linear: float | None, *more: str) -> tuple[str, ...]:
    figures = ("" if figure is None else f"{figure:.1f}" for figure in (knn, linear))
    return (name, arch, str(megabytes), *figures, *more)


def _draw(title: str, rows: list[tuple[str, ...]], *more: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("name", "architecture", "MB", "k-NN", "linear", "license", *more):
        table.add_column(name, justify="right" if name in ("MB", "k-NN", "linear") else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
