"""State dicts of other libraries in our keys and back: pure functions of names and shapes.

Our ViT's keys are the reference's and timm's already. Hugging Face's `ViTModel` has other names, and separate tensors for
queries, keys and values. The reference's XCiT differs from timm's in its class attention and position projection.
torchvision's ResNets have timm's keys. A timm backbone is the `model` of an adapter, hence its prefix ``model.``.
Unknown names pass through unchanged, so that strict loading can list them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from dino.models.vit import SIZES

State = dict[str, Tensor]
NameMap = dict[str, tuple[str, ...]]  # name -> the same tensor's name elsewhere, or the names of its parts there

# The only names that may be left out: classifiers and poolers on top of a backbone. `Weights.left_out` lists them.
TOLERATED = frozenset(
    f"{layer}.{leaf}" for layer in ("fc", "head", "classifier", "pooler.dense") for leaf in ("weight", "bias")
)

_WRAPPERS = re.compile(
    r"^(backbone\.)?((vit|dinov2|dinov2_with_registers|dinov3_vit)\.|model\.(?=(layer|embeddings|norm|stages)\.))?"
)

_HF: NameMap = {"patch_embed.proj": ("embeddings.patch_embeddings.projection",), "norm": ("layernorm",)}
_HF_BLOCK: NameMap = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}
_XCIT_SIZES = {128: "nano", 192: "tiny", 384: "small", 512: "medium", 768: "large"}
_RESNETS = {(True, 16): 50, (True, 33): 101, (True, 50): 152, (False, 8): 18, (False, 16): 34}  # (bottleneck, blocks)


def split_names(state: State, names: NameMap) -> State:
    """Rename; a tensor with several counterparts is cut into equal parts along its first axis."""
    out: State = {}
    for name, value in state.items():
        parts = names.get(name, (name,))
        out |= zip(parts, (value,) if len(parts) == 1 else value.chunk(len(parts)), strict=True)
    return out


def join_names(state: State, names: NameMap) -> State:
    """The inverse of `split_names`; if one of several parts is absent, the others stay as they are."""
    whole = {name: parts for name, parts in names.items() if all(part in state for part in parts)}
    taken = {part for parts in whole.values() for part in parts}
    out = {name: value for name, value in state.items() if name not in taken}
    return out | {
        name: state[parts[0]] if len(parts) == 1 else torch.cat([state[p] for p in parts])
        for name, parts in whole.items()
    }


def map_hf_names(depth: int) -> NameMap:
    """Our ViT's names to those of Hugging Face's `ViTModel`."""
    layers = dict(_HF)
    for i in range(depth):
        for ours, theirs in _HF_BLOCK.items():
            layers[f"blocks.{i}.{ours}"] = tuple(f"encoder.layer.{i}.{part}" for part in theirs)
    embeddings = {"cls_token": ("embeddings.cls_token",), "pos_embed": ("embeddings.position_embeddings",)}
    return embeddings | _name_parameters(layers)


def map_xcit_names(state: State) -> NameMap:
    """The reference's XCiT names to timm's."""
    layers: NameMap = {"pos_embeder.token_projection": ("pos_embed.token_projection",)}
    for i in range(_count(state, r"cls_attn_blocks\.(\d+)\.")):
        stem = f"cls_attn_blocks.{i}.attn."
        layers[f"{stem}qkv"] = tuple(f"{stem}{part}" for part in "qkv")
    return _name_parameters(layers)


def _name_parameters(layers: NameMap) -> NameMap:
    """The names of the layers' weights and biases."""
    return {
        f"{ours}.{leaf}": tuple(f"{part}.{leaf}" for part in theirs)
        for ours, theirs in layers.items()
        for leaf in ("weight", "bias")
    }


def recognize(state: State, where: str, num_heads: int | None = None) -> tuple[dict[str, Any], State]:
    """A backbone's state dict of any known library: the arguments of `create` that build it, and the state in our keys.

    Args:
        where: the file, for messages.
        num_heads: a ViT's attention heads, where they are known.

    Raises:
        ValueError: no architecture has these keys, or `num_heads` is needed.
    """
    if "embeddings.cls_token" in state:
        state = join_names(state, map_hf_names(_count(state, r"encoder\.layer\.(\d+)\.")))
    state = to_timm(state)
    if {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
        return infer_vit(state, where, num_heads), state
    if "cls_attn_blocks.0.norm1.weight" in state and "cls_token" in state:
        state = split_names(state, map_xcit_names(state))
        width, depth = state["cls_token"].shape[-1], _count(state, r"blocks\.(\d+)\.")
        patch = 16 if "patch_embed.proj.6.0.weight" in state else 8
        arch = f"timm:xcit_{_XCIT_SIZES.get(width, width)}_{depth}_p{patch}_224"
    elif "layer1.0.conv1.weight" in state and "conv1.weight" in state:
        blocks = sum(_count(state, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
        arch = f"timm:resnet{_RESNETS.get(('layer1.0.conv3.weight' in state, blocks), f' of {blocks} blocks')}"
    else:
        raise ValueError(
            f"{where} holds no ViT, XCiT or ResNet backbone: its {len(state)} keys are {list_first(state)}."
        )
    return {"arch": arch}, {f"model.{name}": value for name, value in state.items()}


def infer_vit(state: State, where: str, num_heads: int | None) -> dict[str, Any]:
    """Architecture, sizes and image size of a ViT, from its shapes.

    Shapes do not tell the number of heads: a width of `SIZES` has its architecture's, any other width heads of 64 channels.
    """
    cls_token, positions, patches = state["cls_token"], state["pos_embed"], state["patch_embed.proj.weight"]
    if cls_token.ndim != 3 or positions.ndim != 3 or patches.ndim != 4 or min(*positions.shape, *patches.shape) < 1:
        raise ValueError(f"{where} is no ViT of this kind: pos_embed is {list(positions.shape)}, expected [1, n, d].")
    width, depth, patch_size = cls_token.shape[-1], _count(state, r"blocks\.(\d+)\."), patches.shape[-1]
    usual = ("vit_small", None if width % 64 else width // 64)
    arch, own_heads = next(((arch, heads) for arch, (w, _, heads) in SIZES.items() if w == width), usual)
    if num_heads is None and own_heads is None:
        raise ValueError(f"{where} does not say how many heads share its width of {width}; give num_heads.")
    return {
        "arch": arch,
        "patch_size": patch_size,
        "image_size": math.isqrt(positions.shape[1] - 1) * patch_size,
        "width": width,
        "depth": depth,
        "num_heads": num_heads or own_heads,
        "in_channels": patches.shape[1],
    }


def fill_sizes(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `create`; a ViT's width, depth and heads are its architecture's where they are not given."""
    own = zip(("width", "depth", "num_heads"), SIZES.get(arguments["arch"], ()), strict=False)
    return arguments | {name: arguments.get(name) or value for name, value in own}


def to_reference(state: State) -> State:
    """Our backbone's state with the keys of the reference (its ViT, the XCiT of its hub, torchvision's ResNet)."""
    state = to_timm(state)
    return join_names(state, map_xcit_names(state))


def to_timm(state: State) -> State:
    """Without the prefix of our timm adapter."""
    return {name.removeprefix("model."): value for name, value in state.items()}


def to_hf(state: State) -> State:
    return split_names(state, map_hf_names(_count(state, r"blocks\.(\d+)\.")))


def split_network(state: State) -> tuple[State, State, list[str]]:
    """One network of the reference, with any wrapper's prefix: its backbone, its head ({}: none), and the names left out.

    ``module.`` is DistributedDataParallel's, ``backbone.`` the multi-crop wrapper's, and the others those of Hugging Face's
    models with a classifier.
    """
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    heads = {name for name in plain if name.startswith(("head.mlp.", "head.last_layer.", "head.predictor."))}
    backbone = {_WRAPPERS.sub("", name, count=1): value for name, value in plain.items() if name not in heads}
    left_out = sorted(backbone.keys() & TOLERATED)
    head = {name.removeprefix("head."): value for name, value in plain.items() if name in heads}
    return {name: value for name, value in backbone.items() if name not in TOLERATED}, head, left_out


def infer_head(head: State) -> dict[str, Any]:
    """The sizes of a projection head by the names of `dino.options.train.HeadOptions`."""
    layers = [value for name, value in head.items() if re.fullmatch(r"mlp\.(\d+\.)?weight", name) and value.ndim == 2]
    out_dim, bottleneck_dim = head["last_layer.weight_v"].shape
    return {
        "out_dim": out_dim,
        "hidden_dim": layers[0].shape[0],  # a head of one layer has none; the bottleneck's width will do
        "bottleneck_dim": bottleneck_dim,
        "num_layers": len(layers),
        "batch_norm": any(name.endswith("running_mean") for name in head),
        "norm_last_layer": bool((head["last_layer.weight_g"] == 1).all()),
    }


def list_first(names: Collection[str]) -> str:
    """The first few names, for messages."""
    return ", ".join([*sorted(names)[:3], *(["..."] if len(names) > 3 else [])]) or "none"


def _count(state: State, pattern: str) -> int:
    """The number of blocks in a numbered sequence of a state dict."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})
