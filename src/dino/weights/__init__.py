"""Weights by name: our run folders, the reference's releases and checkpoints, timm's and Hugging Face's files.

`load` gives a backbone, `read` everything that a file holds: teacher, student, heads, center, optimizer. Only tensors and
plain values are ever unpickled. Every key must fit, except the classifiers of `formats.TOLERATED`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dino import files
from dino.models import Backbone, create
from dino.models.vit import VisionTransformer
from dino.weights import formats, pickles, releases
from dino.weights.formats import State

if TYPE_CHECKING:
    from dino.models.timm_backbone import TimmBackbone

WEIGHTS, CONFIG = "teacher.safetensors", "config.json"


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a file holds.

    Args:
        where: its name, for messages.
        arguments: what `dino.create` builds the backbone from.
        state: tensors by the names of `dino.method.DINO`: ``(student|teacher).(backbone|head).*`` and ``center.value``;
            the teacher's backbone is always among them.
        left_out: names of what was not taken, all of them tolerated.
        head: the heads' options, where the file says them.
        optimizer: the optimizer's state dict as it was saved, if there is one.
    """

    where: str
    arguments: dict[str, Any]
    state: State
    left_out: tuple[str, ...] = ()
    head: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None

    def part(self, prefix: str) -> State:
        """The tensors whose names begin with `prefix`, without it; {} when there are none."""
        return {name[len(prefix) :]: value for name, value in self.state.items() if name.startswith(prefix)}

    def backbone(self, role: str = "teacher") -> State:
        return self.part(f"{role}.backbone.")


def save(folder: Path, backbone: nn.Module, arguments: dict[str, Any]) -> None:
    """Write `backbone` to `folder` as safetensors beside the arguments of `create` that rebuild it."""
    state = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    with files.replacing(folder / WEIGHTS) as temporary:
        save_file(state, temporary)
    with files.replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps({"model": arguments}, indent=2) + "\n")


def load(name: str | os.PathLike[str], offline: bool = False, **changes: Any) -> VisionTransformer | TimmBackbone:
    """The (teacher's) backbone that `name` stands for, in evaluation mode on the CPU.

    Its `image_size` is what it was trained at.

    Args:
        name: a run directory, a release ('dino_vits16', 'vits16:full'; see `dino models`), a .pth, .pt or .safetensors
            file, or a folder that timm or Hugging Face's `ViTModel` saved.
        offline: never download; $DINO_OFFLINE=1 means the same.
        changes: arguments of `create` that the file does not hold or that should differ, e.g. ``num_heads=3`` or
            ``pos_interp="antialias"``.

    Raises:
        ValueError: no such weights, or weights that do not fit; names the keys and shapes that differ.
        DownloadError: a release that is not cached and cannot be downloaded.
    """
    return build_backbone(read(name, offline, changes.get("num_heads"), only_backbone=True), **changes)


def build_backbone(weights: Weights, **changes: Any) -> VisionTransformer | TimmBackbone:
    """The (teacher's) backbone that `weights` hold; arguments and errors as for `load`."""
    try:
        model = create(**weights.arguments | changes)
    except TypeError as error:
        raise ValueError(f"{weights.where} cannot be built: {error}; its options are of another version.") from error
    load_strictly(model, weights.backbone(), weights.where)
    vars(model)["where"] = weights.where  # for messages
    return model.eval().requires_grad_(False)


def read(
    name: str | os.PathLike[str], offline: bool = False, num_heads: int | None = None, only_backbone: bool = False
) -> Weights:
    """Everything that `name` holds; arguments and errors as for `load`.

    Args:
        num_heads: of a ViT of unusual width whose file does not say it.
        only_backbone: the rest may be left unread, which is quicker for a run directory.
    """
    path = file = _locate(name, offline)
    try:
        pointer = path / "checkpoints" / "latest"
        if not only_backbone and pointer.is_file():
            file = pointer.with_name(pointer.read_text().strip())
        content, config = _open_folder(file) if file.is_dir() else _open_file(file)
        return _recognize(content, config, str(file), num_heads)
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds damaged weights: {error}. Resume or repeat the run, or copy it again."
        ) from error


def _locate(name: str | os.PathLike[str], offline: bool) -> Path:
    """The path of `name`, downloaded if it is a release."""
    if Path(name).exists():
        return Path(name)
    if releases.find_release(str(name)) is None:
        raise ValueError(
            f"there is no run, weight file or release '{name}'; give the --out folder of a training run, a .pth or "
            ".safetensors file, or a name that `dino models` lists."
        )
    return releases.fetch_release(str(name), offline)


def _open_folder(folder: Path) -> tuple[State, dict[str, Any]]:
    """Tensors and configuration of a run directory, or of a folder that timm or Hugging Face saved."""
    config = json.loads((folder / CONFIG).read_text()) if (folder / CONFIG).is_file() else {}
    if "model" in config and (folder / WEIGHTS).is_file():
        return load_file(folder / WEIGHTS), {"model": config["model"]}
    if not config or not (folder / "model.safetensors").is_file():
        raise ValueError(
            f"{folder} holds no {WEIGHTS} or model.safetensors with its {CONFIG}; give the --out folder of a training "
            "run, or a folder that timm or Hugging Face saved."
        )
    for key, rule in {"model_type": "vit", "hidden_act": "gelu", "qkv_bias": True}.items():  # timm says none of these
        if config.get(key, rule) != rule:
            raise ValueError(f"{folder / CONFIG} says {key} {config[key]}; only {key} {rule} can be read.")
    return load_file(folder / "model.safetensors"), {name: config[name] for name in config if name != "model"}


def _open_file(path: Path) -> tuple[Any, dict[str, Any]]:
    """What a file holds; and for safetensors that `dino export` wrote, the model's arguments in its header."""
    if path.suffix != ".safetensors":
        return pickles.load_pickle(path), {}
    with safe_open(path, "pt") as file:
        model = json.loads((file.metadata() or {}).get("model", "{}"))
    return load_file(path), {"model": model} if "arch" in model else {}


def _recognize(content: Any, config: dict[str, Any], where: str, num_heads: int | None) -> Weights:
    """The kinds of files, each told by its names or its configuration."""
    names = content.keys() if isinstance(content, dict) else set[str]()
    if "model" in config:  # in our keys
        return Weights(where, config["model"], {f"teacher.backbone.{name}": value for name, value in content.items()})
    if {"method", "options"} <= names:
        return _read_our_checkpoint(content, where)
    if {"teacher", "student"} & names:
        return _read_reference_checkpoint(content, where, num_heads)
    if "architecture" in config and "pos_embed" not in names:  # not a ViT like ours, so timm builds it
        backbone, _, left_out = formats.split_network(content)
        state = {f"teacher.backbone.model.{name}": value for name, value in backbone.items()}
        return Weights(where, {"arch": f"timm:{config['architecture']}"}, state, tuple(left_out))
    for wrapper in ("state_dict", "model"):
        content = content.get(wrapper, content) if isinstance(content, dict) else content
    num_heads = config.get("num_attention_heads") or config.get("model_args", {}).get("num_heads") or num_heads
    found = _read_networks({"teacher": content}, where, num_heads)
    if "pos_interp" in config:  # written by `dino export`
        found.arguments["pos_interp"] = config["pos_interp"]
    return found


def _read_our_checkpoint(content: dict[str, Any], where: str) -> Weights:
    options = content["options"]
    arguments = {key: value for key, value in options["model"].items() if key != "drop_path"}
    arguments["image_size"] = options["views"]["global_size"]
    return Weights(where, arguments, content["method"], head=options["head"], optimizer=content["optimizer"])


def _read_reference_checkpoint(content: dict[str, Any], where: str, num_heads: int | None) -> Weights:
    networks = {role: content[role] for role in ("teacher", "student") if role in content}
    found = _read_networks(networks, where, num_heads)
    known = {"teacher", "student", "optimizer", "dino_loss", "epoch", "args", "fp16_scaler"}
    if center := content.get("dino_loss"):
        found.state["center.value"] = center["center"].flatten()
    left_out = (*found.left_out, *sorted(content.keys() - known))
    return dataclasses.replace(found, left_out=left_out, optimizer=content.get("optimizer"))


def _read_networks(networks: dict[str, Any], where: str, num_heads: int | None) -> Weights:
    """The networks of the reference, or bare backbones, by role."""
    out: State = {}
    arguments: dict[str, Any] = {}
    left_out: list[str] = []
    for role, state in networks.items():
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{where} holds no state dict (names and tensors); save model.state_dict() instead.")
        if {name.removeprefix("module.") for name in state} == {"linear.weight", "linear.bias"}:
            raise ValueError(f"{where} is a linear classifier, not a backbone.")
        backbone, head, ignored = formats.split_network(state)
        arguments, backbone = formats.recognize(backbone, where, num_heads)
        out |= {f"{role}.backbone.{name}": value for name, value in backbone.items()}
        out |= {f"{role}.head.{name}": value for name, value in head.items()}
        left_out += ignored
    if "teacher" not in networks:
        out |= {name.replace("student.", "teacher.", 1): value for name, value in out.items()}
    return Weights(where, arguments, out, tuple(left_out))


def load_strictly(module: nn.Module, state: State, where: str) -> None:
    """Load `state` into `module`; every key and shape must agree, and every number must be finite.

    Raises:
        ValueError: names what is missing, unknown, of another shape, or not finite.
    """
    own = module.state_dict()
    reshaped = [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    kinds = {"missing": own.keys() - state.keys(), "unknown": state.keys() - own.keys(), "of another shape": reshaped}
    if wrong := [f"{len(names)} {kind} ({formats.list_first(names)})" for kind, names in kinds.items() if names]:
        raise ValueError(f"{where} does not fit this model: {'; '.join(wrong)}. Use the options it was trained with.")
    refuse_broken(state, where)
    module.load_state_dict(state)


def refuse_broken(state: State, where: str) -> None:
    """Refuse weights that are not finite; `where` is their name, for the message."""
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ValueError(
            f"{where} holds numbers that are not finite (NaN or infinity) in {len(broken)} of {len(state)} tensors "
            f"({formats.list_first(broken)}), because its training diverged; use an earlier checkpoint, or train again "
            "with a lower --optim.lr."
        )


def fingerprint(model: Backbone) -> str:
    """Hex digest of a model's weights."""
    assert isinstance(model, nn.Module)
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
