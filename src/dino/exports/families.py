"""timm's networks as those of Hugging Face's transformers: the inverse of `dino.weights.families`.

A converter there moves numbers and computes nothing with them. So the places of all numbers of a network of transformers
are sent through it, and what comes out says where each number of timm's network belongs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dino.models.timm_names import split_arguments
from dino.weights.families import FAMILIES
from dino.weights.formats import State, split_network, to_timm


def convert(arch: str, model: Any, image_size: int, in_channels: int) -> tuple[dict[str, Any], State]:
    """The configuration and the state of transformers' network that computes what timm's `model` does.

    Args:
        arch: its name, with its arguments.

    Raises:
        ValueError: transformers has none of its family, or not with these sizes.
    """
    from transformers import AutoConfig  # it takes seconds to import

    describe = next((function for kind, function in _DESCRIPTIONS.items() if kind in split_arguments(arch)[0]), None)
    if describe is None:
        raise ValueError(
            f"{arch} has no counterpart that hf is written for (they are our own ViTs, DINOv2, DINOv3 and ConvNeXt); "
            "use --to timm."
        )
    config = AutoConfig.for_model(**describe(model), image_size=image_size, num_channels=in_channels)
    places = _number_places(config)
    named, kind = split_network(places)[0], config.model_type
    if kind == "dinov2_with_registers":  # the position of [CLS] is in its token, and so stays zero
        named["embeddings.position_embeddings"][:, 0] = 0
    moved, state = FAMILIES[kind](config.to_dict(), named)[1], to_timm(model.state_dict())
    if wrong := [name for name, value in state.items() if name not in moved or moved[name].shape != value.shape]:
        raise ValueError(f"{arch} is no {kind} of transformers: {wrong[0]} has no place there.")
    # Place 0 stays zero: it is that of what only pre-training uses.
    numbers = torch.zeros(1 + sum(value.numel() for value in places.values()))
    for name, value in state.items():
        numbers[moved[name].flatten().long()] = value.float().flatten()
    written = config.to_dict() | {
        "architectures": [type(config).__name__.replace("Config", "Model")],
        "dtype": "float32",
    }
    return written, {name: numbers[value.long()] for name, value in places.items()}


def _number_places(config: Any) -> State:
    """Tensors as transformers writes them, in which each number is a place of its own, from 1 on."""
    from transformers import AutoModel, logging

    logging.disable_progress_bar()
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.float64)  # in which every such number is exact
    first, numbered = 1, dict[str, Tensor]()
    for name, value in model.state_dict().items():
        numbered[name] = torch.arange(first, first + value.numel(), dtype=torch.float64).view(value.shape)
        first += value.numel()
    model.load_state_dict(numbered, assign=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = load_file(Path(folder, "model.safetensors"))
    return {name: torch.zeros_like(value) if name.endswith("mask_token") else value for name, value in found.items()}


def _describe_dinov2(model: Any) -> dict[str, Any]:
    mlp, registers = model.blocks[0].mlp, model.reg_token
    hidden = mlp.fc2.in_features
    gated = mlp.fc1.out_features != hidden
    return _describe_vit(model) | {
        "model_type": "dinov2" if registers is None else "dinov2_with_registers",
        "mlp_ratio": round((1.5 if gated else 1) * hidden / model.embed_dim),
        "use_swiglu_ffn": gated,
        "qkv_bias": model.blocks[0].attn.qkv.bias is not None,
        **({} if registers is None else {"num_register_tokens": registers.shape[1]}),
    }


def _describe_dinov3(model: Any) -> dict[str, Any]:
    mlp, biased = model.blocks[0].mlp, getattr(model.blocks[0].attn, "q_bias", None) is not None
    gated = hasattr(mlp, "fc1_g")
    return _describe_vit(model) | {
        "model_type": "dinov3_vit",
        "intermediate_size": mlp.fc2.in_features,
        "num_register_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "query_bias": biased,
        "value_bias": biased,
        "rope_theta": model.rope.temperature,
    }


def _describe_convnext(model: Any) -> dict[str, Any]:
    return {
        "model_type": "dinov3_convnext",
        "depths": [len(stage.blocks) for stage in model.stages],
        "hidden_sizes": [stage.blocks[0].conv_dw.out_channels for stage in model.stages],
    }


def _describe_vit(model: Any) -> dict[str, Any]:
    return {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.blocks[0].attn.num_heads,
        "patch_size": model.patch_embed.patch_size[0],
    }


# By a part of the architecture's name.
_DESCRIPTIONS = {"dinov2": _describe_dinov2, "dinov3": _describe_dinov3, "convnext": _describe_convnext}
