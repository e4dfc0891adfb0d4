"""Weight files: a backbone saved with what is needed to rebuild it, and strict loading."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dino.models import create
from dino.models.vit import VisionTransformer

if TYPE_CHECKING:
    from dino.models.timm_backbone import TimmBackbone

WEIGHTS, CONFIG = "teacher.safetensors", "config.json"


def save(folder: Path, backbone: nn.Module, arguments: dict[str, Any]) -> None:
    """Write `backbone` to `folder` as safetensors beside the arguments of `create` that rebuild it."""
    state = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    temporary = folder / (WEIGHTS + ".tmp")
    save_file(state, temporary)
    os.replace(temporary, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"model": arguments}, indent=2) + "\n")


def load(name: str | os.PathLike[str]) -> VisionTransformer | TimmBackbone:
    """The backbone of a run directory, in evaluation mode on the CPU; its `image_size` is what it was trained at.

    Raises:
        ValueError: no such run, no weights in it yet, or weights of another shape.
    """
    folder = Path(name)
    if not folder.exists():
        raise ValueError(f"there is no run or weight file '{name}'; give the --out folder of a training run.")
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise ValueError(f"{name} holds no {WEIGHTS} with its {CONFIG}; give the --out folder of a training run.")
    try:
        state = load_file(folder / WEIGHTS)
        model = create(**json.loads((folder / CONFIG).read_text())["model"])
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{name} holds damaged weights: {error}. Resume or repeat the run.") from error
    load_strictly(model, state, str(folder / WEIGHTS))
    return model.eval().requires_grad_(False)


def load_strictly(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load `state` into `module`; every key and shape must agree.

    Raises:
        ValueError: names what is missing, unknown, or of another shape.
    """
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    if missing or unknown or reshaped:
        parts = [
            f"{len(items)} {what} ({', '.join(sorted(items)[:3])}{', ...' if len(items) > 3 else ''})"
            for what, items in (("missing", missing), ("unknown", unknown), ("of another shape", reshaped))
            if items
        ]
        raise ValueError(f"{where} does not fit this model: {'; '.join(parts)}. Use the options it was trained with.")
    module.load_state_dict(state)
