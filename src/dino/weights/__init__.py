"""Weights by name: our run folders, the reference's releases and checkpoints, timm's and Hugging Face's files.

`load` gives a backbone, `read` everything that a file holds: teacher, student, heads, center, optimizer. Only tensors and
plain values are ever unpickled. Every key must fit, except the classifiers of `formats.TOLERATED`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dino import distributed, errors, names
from dino.models import SIZES, Backbone, create
from dino.models.vit import VisionTransformer
from dino.terminal import say
from dino.weights import addresses, formats, hub, pickles, pictures, releases, runs
from dino.weights.checkpoints import list_checkpoints
from dino.weights.checks import check_arguments, check_fit, load_strictly
from dino.weights.folders import open_folder, open_timm, read_config
from dino.weights.formats import State
from dino.weights.runs import CONFIG, WEIGHTS, save

if TYPE_CHECKING:
    from dino.models.timm_backbone import TimmBackbone

__all__ = ["CONFIG", "WEIGHTS", "Weights", "build_backbone", "fingerprint", "load", "read", "save", "take"]

# What a file that holds other things than its kind should raises on the way.
_MISSHAPED = (LookupError, TypeError, AttributeError, RecursionError, OverflowError, RuntimeError)


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
        step: of its training, where it is of a run; best: why this teacher is the best of its run, where it was chosen so.
    """

    where: str
    arguments: dict[str, Any]
    state: State
    left_out: tuple[str, ...] = ()
    head: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    step: int | None = None
    best: runs.Best | None = None

    def part(self, prefix: str) -> State:
        """The tensors whose names begin with `prefix`, without it; {} when there are none."""
        return {name[len(prefix) :]: value for name, value in self.state.items() if name.startswith(prefix)}

    def backbone(self, role: str = "teacher") -> State:
        return self.part(f"{role}.backbone.")


def load(name: str | os.PathLike[str], offline: bool = False, **changes: Any) -> VisionTransformer | TimmBackbone:
    """The (teacher's) backbone that `name` stands for, trainable, in evaluation mode, on the CPU.

    Its `image_size` is what it was trained at. `model.transform` prepares a picture, `model.embed` gives the features of
    many, as the weights want their pictures.

    Args:
        name: a run directory ('runs/a' is its best teacher, 'runs/a:last' the last), a release ('dino_vits16',
            'vits16:full'; see `dino models`), pretrained weights of timm ('timm:NAME') or of a repository of Hugging Face's
            hub ('hf:ORG/NAME'), a .pth, .pt or .safetensors file, or a folder that timm or transformers saved. A run or
            a file may also lie at an address such as s3://bucket/runs/a.
        offline: never download; $DINO_OFFLINE=1 means the same.
        changes: arguments of `create` that the file does not hold or that should differ, e.g. ``num_heads=3`` or
            ``pos_interp="antialias"``.

    Raises:
        ValueError: no such weights, or weights that do not fit; names the keys and shapes that differ.
        DownloadError: a release that is not cached and cannot be downloaded.
    """
    return build_backbone(read(name, offline, changes.get("num_heads"), only_backbone=True), **changes)


def take(model: str | os.PathLike[str] | Backbone, device: str = "auto") -> Backbone:
    """A model that may be given by its name, as `load` takes it; then it computes on `device`."""
    return load(model).to(distributed.start(device)) if isinstance(model, str | os.PathLike) else model


def build_backbone(weights: Weights, **changes: Any) -> VisionTransformer | TimmBackbone:
    """The (teacher's) backbone that `weights` hold; arguments and errors as for `load`."""
    where, arguments = weights.where, check_arguments(weights.arguments | changes, weights.where)
    state = weights.backbone()
    try:
        if arguments["arch"] in SIZES:  # sizes that the file only says, and does not hold, are never allocated
            with torch.device("meta"):
                check_fit(create(**arguments), state, where)
        model = create(**arguments)
    except ValueError as error:
        raise error if str(error).startswith(where) else ValueError(f"{where} cannot be built: {error}") from error
    load_strictly(model, state, where)
    vars(model)["where"] = where  # for messages
    pictures.attach(model)
    return model.eval()


def read(
    name: str | os.PathLike[str], offline: bool = False, num_heads: int | None = None, only_backbone: bool = False
) -> Weights:
    """Everything that `name` holds; arguments and errors as for `load`.

    Args:
        num_heads: of a ViT of unusual width whose file does not say it.
        only_backbone: the rest may be left unread, which is quicker for a run directory. Of its best teacher only the
            backbone is kept; with more, it is the last that is read.
    """
    text, last = runs.split_name(addresses.bring(os.fspath(name)))
    remote = names.is_hub_name(text)
    path = Path(text) if remote else _locate(text, offline)
    try:
        if remote:
            opened = _open_remote(text, offline)
        elif list_checkpoints(path / "checkpoints"):
            opened = runs.open_run(path, last, only_backbone)
        else:
            opened = _open_folder(path, last) if path.is_dir() else _open_file(path)
        found = _recognize(opened.content, opened.config, str(opened.where), num_heads)
        arguments = check_arguments(found.arguments, str(opened.where))  # JSON has lists for tuples
        found = dataclasses.replace(found, arguments=arguments, step=opened.step, best=opened.best)
        if not all(isinstance(value, Tensor) for value in found.state.values()):
            raise TypeError("what should be a tensor is none")
        return found
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({errors.first_line(error)}); check its permissions.") from error
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, *_MISSHAPED) as error:
        raise ValueError(
            f"{path} holds damaged weights ({errors.first_line(error)}); resume or repeat the run, or copy it again."
        ) from error


def _locate(name: str, offline: bool) -> Path:
    """The path of `name`, downloaded if it is a release."""
    if (path := Path(name).expanduser()).exists():
        return path
    if names.find_release(name) is None:
        raise names.no_model(name)
    return releases.fetch_release(name, offline)


def _open_folder(folder: Path, last: bool) -> runs.Opened:
    """A run directory without checkpoints, or a folder that timm or Hugging Face saved."""
    config = read_config(folder / CONFIG)
    if "model" in config and (folder / WEIGHTS).is_file():
        return runs.open_run(folder, last, only_backbone=True)
    return open_folder(folder, str(folder))


def _open_remote(name: str, offline: bool) -> runs.Opened:
    found = hub.fetch_named(name, offline)
    say(f"{name}: trained weights, commit {found.folder.name[:12]}.")
    if found.pretrained_cfg is not None:
        return open_timm(name.partition("@")[0], found.weights, found.pretrained_cfg, name)
    if (found.folder / CONFIG).is_file():
        return open_folder(found.folder, name)
    return _open_file(found.weights)._replace(where=Path(name))  # a file of `dino export`


def _open_file(path: Path) -> runs.Opened:
    """What a file holds; and for safetensors the model's arguments, in its header (`dino export`) or beside it (a run)."""
    if path.suffix != ".safetensors":
        return runs.Opened(path, pickles.load_pickle(path), {})
    with safe_open(path, "pt") as file:
        model = json.loads((file.metadata() or {}).get("model", "{}"))
    if "arch" not in model:
        runs_of = [folder for folder in path.absolute().parents[:2] if (folder / WEIGHTS).is_file()]
        model = read_config(runs_of[0] / CONFIG).get("model", {}) if runs_of else {}
    return runs.Opened(path, load_file(path), {"model": model} if "arch" in model else {})


def _recognize(content: Any, config: dict[str, Any], where: str, num_heads: int | None) -> Weights:
    """The kinds of files, each told by its names or its configuration."""
    keys = content.keys() if isinstance(content, dict) else set[str]()
    if "model" in config:  # in our keys
        return Weights(where, config["model"], {f"teacher.backbone.{name}": value for name, value in content.items()})
    if {"method", "options"} <= keys:
        return _read_our_checkpoint(content, where)
    if {"teacher", "student"} & keys:
        return _read_reference_checkpoint(content, where, num_heads)
    if "arch" in config:  # one of our ConvNets, written for timm
        state = {f"teacher.backbone.model.{name}": value for name, value in content.items()}
        return Weights(where, {"arch": config["arch"]} | config["pictures"], state)
    for wrapper in ("state_dict", "model"):
        content = content.get(wrapper, content) if isinstance(content, dict) else content
    num_heads = config.get("num_attention_heads") or config.get("model_args", {}).get("num_heads") or num_heads
    found = _read_networks({"teacher": content}, where, num_heads)
    found.arguments.update(config.get("pictures", {}))
    return found


def _read_our_checkpoint(content: dict[str, Any], where: str) -> Weights:
    options = content["options"]
    arguments = {key: value for key, value in options["model"].items() if key != "drop_path"}
    arguments["image_size"] = options["views"]["global_size"]
    if options["method"]["teacher"].startswith("frozen:"):  # its head leads to another network's features
        state = {name: value for name, value in content["method"].items() if ".backbone." in name}
        return Weights(where, arguments, state)
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


def fingerprint(model: Backbone) -> str:
    """Hex digest of a model's weights."""
    assert isinstance(model, nn.Module)
    return runs.hash_state(model.state_dict())
