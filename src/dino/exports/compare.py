"""Exports are opened again by the library that they were written for, and compared with the model itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino import errors, weights
from dino.exports import formats
from dino.models.positions import PositionInterpolation
from dino.models.vit import SIZES
from dino.weights import Weights

TOLERANCE = 1e-4  # relative to the largest output of the model

RunExport = Callable[[Tensor], tuple[Tensor, ...]]  # normalized images to features and, mostly, tokens


class Format(NamedTuple):
    """How a model is written, and how its readers open it."""

    write: Callable[[Weights, Path], None]
    open: Callable[[Path, Weights], RunExport]
    ending: str = ""  # of the file's name
    needs: tuple[str, ...] = ()  # packages
    # How its readers interpolate a ViT's positions for sizes that it was not trained at; None: as the model.
    positions: PositionInterpolation | None = None


class Difference(NamedTuple):
    """The difference between the outputs of an export and of the model, for images of one size (height x width)."""

    size: str
    largest: float
    alike: float  # as `largest`, with the model interpolating positions as the other library does
    scale: float  # the largest output of the model


def check_format(to: str, out: Path) -> None:
    """Refuse a format or a name that cannot be written and checked.

    Raises:
        ValueError: no such format, a package that it needs is missing, or the name of `out` has another ending.
    """
    form = errors.look_up("format", to, FORMATS)
    if not out.name.endswith(form.ending):
        raise ValueError(f"--out {out}: readers of {to} want the ending {form.ending}; write --out {out}{form.ending}.")
    if missing := [name for name in form.needs if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"--to {to} needs {' and '.join(missing)}; install them with: pip install 'dino-vision[export]'."
        )


@torch.no_grad()
def compare(found: Weights, to: str, out: Path) -> list[Difference]:
    """Compare `out`, in format `to`, with the model of `found` on random images of three sizes.

    The sizes are the model's own (at least two cells), a higher one and a wider one.

    Raises:
        ValueError: the file cannot be opened again.
    """
    own = weights.build_backbone(found)
    way = FORMATS[to].positions if own.pos_interp else None
    models = [formats.Outputs(own), formats.Outputs(weights.build_backbone(found, pos_interp=way) if way else own)]
    run, patch = FORMATS[to].open(out, found), own.patch_size
    cells, generator, differences = max(2, own.image_size // patch), torch.Generator().manual_seed(0), []
    for number, rows, columns in ((2, cells, cells), (1, cells + 3, cells), (3, max(2, cells // 2), cells + 1)):
        images = torch.randn(number, own.in_channels, rows * patch, columns * patch, generator=generator)
        expected = [model(images) for model in models]
        try:
            given = run(images)
        except (AssertionError, RuntimeError) as error:  # PyTorch's word for a graph of fewer sizes than were asked for
            size = f"{rows * patch}x{columns * patch}"
            raise ValueError(
                f"the {to} of {found.where} does not take images of {size} ({errors.first_line(error)}); use --to onnx, "
                "safetensors or timm."
            ) from error
        largest, alike = (
            max((a - b).abs().max().item() for a, b in zip(given, each, strict=False)) for each in expected
        )
        # hf interpolates the positions of some families in its own way, and those of others as the model does.
        alike = min(largest, alike)
        scale = max(value.abs().max().item() for value in expected[0])
        differences.append(Difference(f"{rows * patch}x{columns * patch}", largest, alike, scale))
    return differences


def describe_differences(differences: list[Difference], to: str) -> str:
    """The largest difference and that of each size; and the largest if positions were interpolated in the same way."""
    _, largest, alike, scale = map(max, zip(*differences, strict=True))
    each = ", ".join(f"{seen.largest:.1e} at {seen.size}" for seen in differences)
    text = f"{largest:.1e} in numbers up to {scale:.3g} ({each})"
    if largest != alike:
        way = FORMATS[to].positions
        text += f", as {to} interpolates positions its own way; with pos_interp='{way}' here too: {alike:.1e}"
    return text


def _open_ours(out: Path, found: Weights) -> RunExport:
    """Open with `dino.load`, with the arguments that the reference's files do not hold."""
    model = weights.load(out, **{k: found.arguments[k] for k in ("num_heads", "pos_interp") if k in found.arguments})
    return formats.Outputs(model)


def _open_timm(out: Path, found: Weights) -> RunExport:
    from dino.models.timm_backbone import OPTIONS, build_timm

    options: dict[str, Any] = OPTIONS | {"pretrained": True}
    model = build_timm(f"local-dir:{out}", found.arguments.get("in_channels", 3), options)[0].eval()
    return lambda images: (model(images),)


def _open_hf(out: Path, found: Weights) -> RunExport:
    import transformers

    transformers.logging.disable_progress_bar()
    of_vit = found.arguments["arch"] in SIZES
    model: Any = transformers.AutoModel.from_pretrained(out, **{"add_pooling_layer": False} if of_vit else {}).eval()
    registers = getattr(model.config, "num_register_tokens", 0)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = model(images, **{"interpolate_pos_encoding": True} if of_vit else {}).last_hidden_state
        return tokens[:, 0], torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], dim=1)

    return run


def _open_onnx(out: Path, found: Weights) -> RunExport:
    import onnxruntime

    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


def _open_torch_export(out: Path, found: Weights) -> RunExport:
    return torch.export.load(out).module()


FORMATS = {
    "reference": Format(formats.write_reference, _open_ours),
    "reference-checkpoint": Format(formats.write_reference_checkpoint, _open_ours),
    "safetensors": Format(formats.write_safetensors, _open_ours, ".safetensors"),
    "timm": Format(formats.write_timm, _open_timm, positions="antialias"),
    "hf": Format(formats.write_hf, _open_hf, needs=("transformers",), positions="size"),
    "onnx": Format(formats.write_onnx, _open_onnx, ".onnx", ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": Format(formats.write_torch_export, _open_torch_export, ".pt2"),
}
