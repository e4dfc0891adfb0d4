"""What was exported, opened again by the library it was written for, and compared with the model itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dino import weights
from dino.exports import formats
from dino.models.positions import PositionInterpolation
from dino.weights import Weights

TOLERANCE = 1e-4  # of the largest number that the model gives

Opened = Callable[[Tensor], tuple[Tensor, ...]]  # normalized images to features and, mostly, tokens


class Format(NamedTuple):
    """How a model is written, and opened again as its readers do."""

    write: Callable[[Weights, Path], None]
    opened: Callable[[Path, Weights], Opened]
    ending: str = ""  # that its readers want
    needs: tuple[str, ...] = ()  # packages
    # How its readers interpolate a ViT's positions for sizes that it was not trained at; None: as the model.
    positions: PositionInterpolation | None = None


class Difference(NamedTuple):
    """The largest between what an export and the model give for images of one size (height x width)."""

    size: str
    largest: float
    alike: float  # the same where the model interpolates positions as the other library does
    scale: float  # the largest number that the model gives


def check_format(to: str, out: Path) -> None:
    """Refuse what can be neither written nor checked.

    Raises:
        ValueError: a package that format `to` needs is not installed, or the name of `out` has not its ending.
    """
    ending, needs = FORMATS[to].ending, FORMATS[to].needs
    if not out.name.endswith(ending):
        raise ValueError(f"--out {out}: readers of {to} want the ending {ending}; write --out {out}{ending}.")
    if missing := [name for name in needs if importlib.util.find_spec(name) is None]:
        raise ValueError(f"--to {to} needs {' and '.join(missing)}; install them with: pip install 'dino[export]'.")


@torch.no_grad()
def compare(found: Weights, to: str, out: Path) -> list[Difference]:
    """What `out`, in format `to`, gives for random images of three sizes, beside what the model of `found` gives.

    The sizes are the native one (or two cells, if that is one), one that is higher and one that is flatter.

    Raises:
        ValueError: the file cannot be opened again.
    """
    own = weights.build_backbone(found)
    way = FORMATS[to].positions if own.pos_interp else None
    models = [formats.Outputs(own), formats.Outputs(weights.build_backbone(found, pos_interp=way) if way else own)]
    opened, patch = FORMATS[to].opened(out, found), own.patch_size
    cells, generator, differences = max(2, own.image_size // patch), torch.Generator().manual_seed(0), []
    for number, rows, columns in ((2, cells, cells), (1, cells + 3, cells), (3, max(2, cells // 2), cells + 1)):
        images = torch.randn(number, own.in_channels, rows * patch, columns * patch, generator=generator)
        given, expected = opened(images), [model(images) for model in models]
        largest, alike = (
            max((a - b).abs().max().item() for a, b in zip(given, each, strict=False)) for each in expected
        )
        scale = max(value.abs().max().item() for value in expected[0])
        differences.append(Difference(f"{rows * patch}x{columns * patch}", largest, alike, scale))
    return differences


def describe_differences(differences: list[Difference], to: str) -> str:
    """The largest of all and each; and what is left of them where only the interpolation of positions differs."""
    _, largest, alike, scale = map(max, zip(*differences, strict=True))
    each = ", ".join(f"{seen.largest:.1e} at {seen.size}" for seen in differences)
    text = f"{largest:.1e} in numbers up to {scale:.3g} ({each})"
    if largest != alike:
        way = FORMATS[to].positions
        text += f", as {to} interpolates positions its own way; with pos_interp='{way}' here too: {alike:.1e}"
    return text


def _ours(out: Path, found: Weights) -> Opened:
    """By `dino.load`, told what the reference's files do not say."""
    model = weights.load(out, **{k: found.arguments[k] for k in ("num_heads", "pos_interp") if k in found.arguments})
    return formats.Outputs(model)


def _timm(out: Path, found: Weights) -> Opened:
    from dino.models.timm_backbone import WISHES, build_timm

    wishes: dict[str, Any] = WISHES | {"pretrained": True}
    model = build_timm(f"local-dir:{out}", found.arguments.get("in_channels", 3), wishes)[0].eval()
    return lambda images: (model(images),)


def _hf(out: Path, found: Weights) -> Opened:
    import transformers

    transformers.logging.disable_progress_bar()
    model: nn.Module = transformers.AutoModel.from_pretrained(out, add_pooling_layer=False).eval()

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = model(images, interpolate_pos_encoding=True).last_hidden_state
        return tokens[:, 0], tokens

    return run


def _onnx(out: Path, found: Weights) -> Opened:
    import onnxruntime

    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


def _torch_export(out: Path, found: Weights) -> Opened:
    return torch.export.load(out).module()


FORMATS = {
    "reference": Format(formats.write_reference, _ours),
    "reference-checkpoint": Format(formats.write_reference_checkpoint, _ours),
    "safetensors": Format(formats.write_safetensors, _ours, ".safetensors"),
    "timm": Format(formats.write_timm, _timm, positions="antialias"),
    "hf": Format(formats.write_hf, _hf, needs=("transformers",), positions="size"),
    "onnx": Format(formats.write_onnx, _onnx, ".onnx", ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": Format(formats.write_torch_export, _torch_export, ".pt2"),
}
