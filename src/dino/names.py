"""What names of models can stand for, as far as that is known without PyTorch: then a wrong one is refused at once.

Figures and addresses of releases are those of the reference's README; sizes are those of the tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dino.errors import did_you_mean
from dino.paper import FIGURES

PREFIXES = ("timm:", "hf:")


class Release(NamedTuple):
    arch: str
    megabytes: int  # of the backbone
    files: dict[str, str]  # part -> path below BASE
    knn: float | None = None  # ImageNet top-1 accuracies, percent
    linear: float | None = None


def _release(model: str, megabytes: int, stem: str, arch: str | None = None) -> Release:
    folder = f"{stem}_pretrain"
    files = {
        "backbone": f"{folder}/{folder}.pth",
        "full": f"{folder}/{folder}_full_checkpoint.pth",
        "linear": f"{folder}/{stem}_linearweights.pth",
    }
    knn, linear = FIGURES["knn"][model]["knn20_top1"], FIGURES["linear"][model]["linear_top1"]
    return Release(arch or model, megabytes, files, knn, linear)


_S8_300, _S16_LANDMARKS = "dino_deitsmall8_300ep_pretrain", "dino_vitsmall16_googlelandmark_pretrain"

RELEASES: dict[str, Release] = {
    "dino_vits16": _release("vit_small/16", 87, "dino_deitsmall16"),
    "dino_vits8": _release("vit_small/8", 87, "dino_deitsmall8"),
    "dino_vitb16": _release("vit_base/16", 343, "dino_vitbase16"),
    "dino_vitb8": _release("vit_base/8", 343, "dino_vitbase8"),
    "dino_resnet50": _release("resnet50", 94, "dino_resnet50"),
    "dino_xcit_small_12_p16": _release("xcit_small_12_p16_224", 104, "dino_xcit_small_12_p16", "xcit_small_12/16"),
    "dino_xcit_small_12_p8": _release("xcit_small_12_p8_224", 103, "dino_xcit_small_12_p8", "xcit_small_12/8"),
    "dino_xcit_medium_24_p16": _release("xcit_medium_24_p16_224", 336, "dino_xcit_medium_24_p16", "xcit_medium_24/16"),
    "dino_xcit_medium_24_p8": _release("xcit_medium_24_p8_224", 335, "dino_xcit_medium_24_p8", "xcit_medium_24/8"),
    # Of its evaluations and example runs: attention pictures, landmark retrieval, ResNet-50 of 100 epochs.
    "dino_vits8_300ep": Release("vit_small/8", 87, {"backbone": f"{_S8_300}/{_S8_300}.pth"}),
    "dino_vits16_landmarks": Release("vit_small/16", 87, {"backbone": f"{_S16_LANDMARKS}/{_S16_LANDMARKS}.pth"}),
    "dino_resnet50_100ep": Release("resnet50", 94, {"full": "example_runs_logs/dino_rn50_checkpoint.pth"}),
}


def find_release(name: str) -> tuple[str, str] | None:
    """Release and part that `name` stands for, e.g. 'dino_vits16', 'vits16', 'vits16:full', 'vits16:linear'."""
    release, _, part = name.partition(":")
    release = release if release.startswith("dino_") else f"dino_{release}"
    if release not in RELEASES:
        return None
    files = RELEASES[release].files
    part = part or next(iter(files))
    if part not in files:
        raise ValueError(f"{release} has no part '{part}'; it has {', '.join(files)}.")
    return release, part


def is_hub_name(name: str) -> bool:
    """Whether weights are named by where they are published. A path that exists is taken as such."""
    return name.startswith(PREFIXES) and not Path(name).exists()


def no_model(name: str) -> ValueError:
    near = did_you_mean(name, [each.removeprefix("dino_") for each in RELEASES])
    return ValueError(
        f"there is no run, weight file or release '{name}'; give the --out folder of a training run, a .pth or "
        f".safetensors file, a name that `dino models` lists, timm:NAME or hf:ORG/NAME.{near}"
    )


def no_embedding(name: str) -> ValueError:
    return ValueError(f"there is no embedding '{name}'; write one with: dino embed MODEL DATA --out x.parquet")


def require_model(name: str) -> None:
    """Refuse what can be no model, for it names no file, address or release, and nothing on a hub. Nothing is opened.

    Raises:
        ValueError: it is none of these.
    """
    before = name.rpartition(":")[0]  # of the name of a run and ":last"
    is_there = any(Path(path).expanduser().exists() for path in (name, before) if path)
    if not (is_there or "://" in name or is_hub_name(name) or find_release(name)):
        raise no_model(name)
