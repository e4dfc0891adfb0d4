"""Folders, here or on a hub, that timm or Hugging Face's transformers saved: the network, its tensors, and its pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from dino import errors
from dino.models import CONVNETS
from dino.models.timm_names import choose_pooling, name_architecture
from dino.weights import hub, pickles
from dino.weights.families import FAMILIES
from dino.weights.formats import State, split_network
from dino.weights.runs import CONFIG, Opened

PROCESSOR = "preprocessor_config.json"
# What timm's networks cannot be told, and must be so, by `model_type`.
RULES: dict[str, dict[str, Any]] = {
    "vit": {"hidden_act": "gelu", "qkv_bias": True},
    "dinov2": {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
    "dinov2_with_registers": {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
    "dinov3_vit": {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "key_bias": False},
    "dinov3_convnext": {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
}
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def open_folder(folder: Path, where: str) -> Opened:
    """What a folder with a `config.json` of timm or transformers holds.

    Raises:
        ValueError: it has no weights, or those of a network that is not known here.
    """
    config = read_config(folder / CONFIG)
    weights = next((folder / name for name in hub.FILES if (folder / name).is_file()), None)
    if not config or weights is None:
        raise ValueError(
            f"{where} holds no teacher.safetensors or model.safetensors with its {CONFIG}; give the --out folder of a "
            "training run, or a folder that timm or Hugging Face saved."
        )
    if "architecture" in config:
        return _open_timm_folder(config, weights, where)
    return _open_transformers_folder(folder, config, weights, where)


def _open_transformers_folder(folder: Path, config: dict[str, Any], weights: Path, where: str) -> Opened:
    """A ViT becomes ours, and a network of another family timm's."""
    kind = config.get("model_type", "vit")
    if kind not in RULES:
        raise ValueError(
            f"{where} is of Hugging Face's type {kind}; known are {', '.join(RULES)}. timm has CLIP's and SigLIP's, "
            "e.g. timm:vit_base_patch16_clip_224.openai."
        )
    rules = RULES[kind] | ({"hidden_act": "silu"} if config.get("use_gated_mlp") else {})
    for key, rule in rules.items():
        if config.get(key, rule) != rule:
            raise ValueError(f"{folder / CONFIG} says {key} {config[key]}; only {key} {rule} can be read.")
    pictures = read_processor(folder / PROCESSOR)
    if kind == "vit":
        pictures |= {"pos_interp": config.get("pos_interp", "size")}  # `dino export` says it
        return Opened(Path(where), read_tensors(weights), config | {"pictures": pictures})
    state, _, _ = split_network(read_tensors(weights))
    arch, state = FAMILIES[kind](config, state)
    edge = config["image_size"]
    model = {
        "arch": arch,
        "image_size": edge[0] if isinstance(edge, list) else edge,
        "in_channels": config.get("num_channels", 3),
        # With registers transformers interpolates positions as timm does.
        "pos_interp": "size" if kind == "dinov2" else "offset",
    }
    return Opened(Path(where), {f"model.{name}": value for name, value in state.items()}, {"model": model | pictures})


def _open_timm_folder(config: dict[str, Any], weights: Path, where: str) -> Opened:
    """A folder that timm saved, or `dino export` for timm: then it may be a ViT of ours, and says how to interpolate."""
    name, given = config["architecture"], config.get("model_args") or {}
    pictures = config.get("pretrained_cfg") or config
    own = next((arch for arch, parts in CONVNETS.items() if parts == (name, given)), None)
    if "pos_interp" in config or own:
        found: dict[str, Any] = {"pictures": describe_pictures(pictures)} | ({"arch": own} if own else {})
        found["pictures"] |= {"pos_interp": config["pos_interp"]} if "pos_interp" in config else {}
        return Opened(Path(where), read_tensors(weights), config | found)
    # What timm says of pooling where it saves a DINOv3 is its own default, not that of the weights.
    ignored = ("num_classes", "in_chans", "img_size", *choose_pooling(name))
    arch = "timm:" + name_architecture(name, {key: value for key, value in given.items() if key not in ignored})
    edge = given.get("img_size")
    return open_timm(arch, weights, pictures, where, edge[0] if isinstance(edge, list) else edge)


def open_timm(arch: str, weights: Path, config: dict[str, Any], where: str, edge: int | None = None) -> Opened:
    """Weights of timm's network `arch`, which timm itself converts from the form that they were published in.

    Args:
        config: timm's `pretrained_cfg`.
        edge: of the images that its positions are for, pixels. None: of those that it was evaluated at.
    """
    from dino.models.timm_backbone import TimmBackbone  # timm takes a second to import

    channels, *_, view = config.get("input_size", (3, 224, 224))
    model = TimmBackbone(arch.removeprefix("timm:"), edge or view, channels, weights=weights)
    arguments = {"arch": arch, "image_size": edge or view, "in_channels": channels} | describe_pictures(config)
    arguments |= {"eval_size": view} if edge not in (None, view) else {}
    return Opened(Path(where), model.state_dict(), {"model": arguments})


def describe_pictures(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `dino.create` from timm's `pretrained_cfg`."""
    found: dict[str, Any] = {name: tuple(config[name]) for name in ("mean", "std") if config.get(name)}
    if config.get("interpolation") in _FILTERS.values():
        found["interpolation"] = config["interpolation"]
    found["resize"] = "stretched" if config.get("crop_mode") == "squash" else "center"
    return found | ({"crop": float(config["crop_pct"])} if config.get("crop_pct") else {})


def read_processor(path: Path) -> dict[str, Any]:
    """Arguments of `dino.create` from transformers' `preprocessor_config.json`; {} without such a file."""
    if not path.is_file():
        return {}
    config = read_config(path)
    size, crop = (_read_size(config.get(name)) for name in ("size", "crop_size"))
    found: dict[str, Any] = {"resize": "center"}
    if config.get("do_normalize", True):
        found |= {name: tuple(config[f"image_{name}"]) for name in ("mean", "std") if f"image_{name}" in config}
    else:
        found |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if (filter := config.get("resample")) in _FILTERS:
        found["interpolation"] = _FILTERS[filter]
    cropped = bool(config.get("do_center_crop")) and crop is not None
    if isinstance(config.get("size"), dict):
        found["resize"] = "stretched" if "height" in config["size"] else "center"
    elif not cropped:  # an old file's number
        found["resize"] = "stretched"
    if cropped and crop is not None:
        found |= {"eval_size": crop, "crop": min(1.0, crop / (size or crop))}
    elif size:
        found |= {"eval_size": size, "crop": 1.0}
    return found


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file; {} if there is none."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({errors.first_line(error)}); copy or download it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__} and no configuration; copy or download it again.")
    return found


def _read_size(size: Any) -> int | None:
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return size


def read_tensors(path: Path) -> State:
    """The tensors of a file, or of all files in an index."""
    if path.suffix == ".json":
        return {
            name: value for shard in hub.list_shards(path) for name, value in load_file(path.with_name(shard)).items()
        }
    return load_file(path) if path.suffix == ".safetensors" else pickles.load_pickle(path)
