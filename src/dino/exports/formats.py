"""Write models for other libraries (weights that `dino.weights` reads back) and other runtimes (graphs)."""

from __future__ import annotations

import argparse
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dino import errors, files
from dino.exports import families
from dino.exports.positions import interpolate_symbolically
from dino.models import CONVNETS
from dino.models.preprocessing import choose_preprocessing
from dino.models.timm_names import choose_pooling, split_arguments
from dino.models.vit import HYBRIDS, SIZES
from dino.weights import Weights, build_backbone, formats
from dino.weights.formats import State


def write_reference(weights: Weights, out: Path) -> None:
    """The reference's backbone-only file.

    Raises:
        ValueError: the reference has no such network.
    """
    state, arch = formats.to_reference(weights.backbone()), weights.arguments["arch"]
    if arch.startswith("timm:"):
        try:
            known = formats.recognize(state, weights.where)[0]["arch"]
        except ValueError:
            known = ""
        if known != arch.partition(".")[0]:
            raise ValueError(f"{weights.where} is a {arch}, which the reference has not; use --to timm.")
    torch.save(state, out)


def write_reference_checkpoint(weights: Weights, out: Path) -> None:
    """The reference's checkpoint of a run, for its training script and its evaluations."""
    if not weights.part("teacher.head."):
        raise ValueError(f"{weights.where} holds no projection heads; convert it with --to reference instead.")
    content: dict[str, Any] = {"epoch": 0, "args": _make_flags(weights)}
    for role in ("student", "teacher"):
        backbone, head = formats.to_reference(weights.backbone(role)), weights.part(f"{role}.head.")
        network = {f"backbone.{k}": v for k, v in backbone.items()} | {f"head.{k}": v for k, v in head.items()}
        # The reference wraps the student always, and the teacher when there are batch statistics to share.
        wrapped = role == "student" or any(name.endswith("running_mean") for name in network)
        content[role] = {f"module.{name}" if wrapped else name: value for name, value in network.items()}
    if (center := weights.state.get("center.value")) is not None:
        content["dino_loss"] = {"center": center[None]}
    if weights.optimizer is not None:
        content["optimizer"] = weights.optimizer
    torch.save(content, out)


def _make_flags(weights: Weights) -> argparse.Namespace:
    sizes, head = weights.arguments, formats.infer_head(weights.part("student.head."))
    return argparse.Namespace(
        arch=sizes["arch"].removeprefix("timm:"),
        patch_size=sizes.get("patch_size", 16),
        out_dim=head["out_dim"],
        norm_last_layer=head["norm_last_layer"],
        use_bn_in_head=head["batch_norm"],
    )


def write_safetensors(weights: Weights, out: Path) -> None:
    """One file of the backbone in our keys, which are timm's, with the arguments that rebuild it in its header."""
    _save(weights.backbone(), out, {"model": json.dumps(formats.fill_sizes(weights.arguments))})


def write_timm(weights: Weights, out: Path) -> None:
    """A folder for `timm.create_model("local-dir:FOLDER")`."""
    sizes = formats.fill_sizes(weights.arguments)
    if sizes.get("stem") not in (None, "default"):
        raise ValueError(
            f"{weights.where} has stem '{sizes['stem']}', which timm's folders cannot say; use safetensors."
        )
    if sizes["arch"] in HYBRIDS:
        raise ValueError(f"{weights.where} is a {sizes['arch']}, which timm does not have; use safetensors.")
    channels, edge, wanted = sizes.get("in_channels", 3), sizes.get("image_size", 224), choose_preprocessing(sizes)
    view = wanted.size or edge
    architecture, given = split_arguments(sizes["arch"].removeprefix("timm:"))
    config: dict[str, Any] = {"architecture": architecture, "num_classes": 0}
    of_timm = sizes["arch"].startswith("timm:")
    if of_timm:
        from timm.models import get_pretrained_cfg_value  # timm takes a second to import

        if get_pretrained_cfg_value(architecture, "fixed_input_size"):  # it has positions for one size
            given["img_size"] = edge
    if given := choose_pooling(architecture) | given:
        config["model_args"] = given
    if sizes["arch"] in CONVNETS:
        config["architecture"], config["model_args"] = CONVNETS[sizes["arch"]]
    elif not sizes["arch"].startswith("timm:"):
        config["architecture"] = "vit_small_patch16_224"  # of which every size is given, so that any ViT fits
        config["model_args"] = {
            "img_size": edge,
            "patch_size": sizes["patch_size"],
            "embed_dim": sizes["width"],
            "depth": sizes["depth"],
            "num_heads": sizes["num_heads"],
            "in_chans": channels,
        }
        config["pos_interp"] = sizes.get("pos_interp", "offset")
    config["pretrained_cfg"] = {
        "input_size": [channels, view, view],
        "mean": list(wanted.mean),
        "std": list(wanted.std),
        "interpolation": wanted.interpolation,
        "crop_pct": wanted.crop or (1.0 if wanted.choose_edge(view) == view else 0.875),
        "crop_mode": "center" if wanted.resize == "center" else "squash",
        "num_classes": 0,
    }
    _save_folder(formats.to_timm(weights.backbone()), out, {"config.json": config})


def write_hf(weights: Weights, out: Path) -> None:
    """A folder for `transformers.AutoModel` and its image processor."""
    sizes = formats.fill_sizes(weights.arguments)
    edge, channels, wanted = sizes.get("image_size", 224), sizes.get("in_channels", 3), choose_preprocessing(sizes)
    if sizes["arch"].startswith("timm:") and sizes.get("stem") in (None, "default"):
        model: Any = build_backbone(weights)
        config, state = families.convert(sizes["arch"], model.model, edge, channels)
    elif sizes["arch"] not in SIZES:
        raise ValueError(f"{weights.where} is a {sizes['arch']}, which transformers does not have; use safetensors.")
    else:
        state = formats.to_hf(weights.backbone())
        config = {
            "architectures": ["ViTModel"],
            "model_type": "vit",
            "hidden_size": sizes["width"],
            "num_hidden_layers": sizes["depth"],
            "num_attention_heads": sizes["num_heads"],
            "intermediate_size": 4 * sizes["width"],
            "layer_norm_eps": 1e-6,
            "image_size": edge,
            "patch_size": sizes["patch_size"],
            "num_channels": channels,
            "pos_interp": sizes.get("pos_interp", "offset"),
        }
    view = wanted.size or edge
    whole = wanted.choose_edge(view)
    processor = {
        "image_processor_type": "BitImageProcessor",  # ViT's cannot crop in all versions
        "size": {"shortest_edge": whole} if wanted.resize == "center" else {"height": whole, "width": whole},
        "resample": int(Image.Resampling[wanted.interpolation.upper()]),
        "do_center_crop": True,
        "crop_size": {"height": view, "width": view},
        "image_mean": list(wanted.mean),
        "image_std": list(wanted.std),
    }
    configs = {"config.json": config} | ({"preprocessor_config.json": processor} if channels == 3 else {})
    _save_folder(state, out, configs)


def _save_folder(state: State, out: Path, configs: dict[str, dict[str, Any]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    _save(state, out / "model.safetensors", {"format": "pt"})
    for name, content in configs.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def _save(state: State, path: Path, metadata: dict[str, str]) -> None:
    # Parts of one tensor share its memory, which safetensors refuses.
    with files.replacing(path) as temporary:
        save_file({name: value.clone().contiguous() for name, value in state.items()}, temporary, metadata)


class Outputs(nn.Module):
    """The outputs of a graph: the features of normalized images [n, d], and their tokens [n, 1 + cells, d]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model  # a `Backbone`

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.tokens(images)[-1]
        return tokens[:, 0], tokens


def write_torch_export(weights: Weights, out: Path) -> None:
    """A program for `torch.export.load`, of any number of images of any size that the model takes."""
    content = io.BytesIO()  # where its file cannot be written, PyTorch ends the process
    torch.export.save(_trace(weights), content)
    out.write_bytes(content.getbuffer())


def write_onnx(weights: Weights, out: Path) -> None:
    """An ONNX graph: `images` to `features` and `tokens`; number, height and width of the images are left open."""
    program = _trace(weights)
    with warnings.catch_warnings(action="ignore"):
        graph = torch.onnx.export(program, input_names=["images"], output_names=["features", "tokens"], verbose=False)
    assert graph is not None
    names = ({0: "number", 2: "height", 3: "width"}, {0: "number"}, {0: "number", 1: "tokens"})
    for value, named in zip([*graph.model.graph.inputs, *graph.model.graph.outputs], names, strict=True):
        assert value.shape is not None
        for axis, name in named.items():
            value.shape[axis] = name
    graph.save(out)


def _trace(weights: Weights) -> ExportedProgram:
    model: Any = build_backbone(weights).to(memory_format=torch.contiguous_format)  # PyTorch warns of any other
    patch, height, width = model.patch_size, Dim.AUTO, Dim.AUTO
    if model.exports_any_size:
        height, width = patch * Dim("rows"), patch * Dim("columns")
        model.interpolate = interpolate_symbolically
    cells = max(2, model.image_size // patch)
    images = torch.zeros(2, model.in_channels, (cells + 1) * patch, (cells + 2) * patch)
    try:
        if any(hasattr(module, "window_size") for module in model.modules()):
            raise ValueError("its attention is cut into windows, which take too long to trace")
        with warnings.catch_warnings(action="ignore"):
            return torch.export.export(
                Outputs(model), (images,), dynamic_shapes={"images": {0: Dim("number"), 2: height, 3: width}}
            )
    except Exception as error:  # there are a thousand architectures, and each fails in its own way
        raise ValueError(
            f"{weights.where} ({weights.arguments['arch']}) cannot be written as one graph for all image sizes "
            f"({errors.first_line(error)}); its weights can, e.g. with --to safetensors."
        ) from error
