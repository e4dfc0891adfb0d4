"""Networks of Hugging Face's transformers as those of timm: the architecture from `config.json`, and the tensors renamed.

Each family is a function from the configuration and a state dict to the name of timm's architecture, with the arguments that
differ from its own, and the state in timm's keys. The numbers are the same; only names, and the places of some, are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from dino.models.timm_names import name_architecture

State = dict[str, torch.Tensor]
Config = dict[str, Any]
Family = tuple[str, State]

_BLOCK = [
    (r"^encoder\.layer\.(\d+)\.|^layer\.(\d+)\.", lambda m: f"blocks.{m[1] or m[2]}."),
    (r"attention\.attention\.(query|key|value)\.", lambda m: f"attn.{m[1][0]}."),
    (r"attention\.([qkv])_proj\.", r"attn.\1."),
    (r"attention\.(output\.dense|o_proj)\.", "attn.proj."),
    (r"embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"^layernorm\.", "norm."),
]
_DINOV2 = [
    *_BLOCK,
    (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
    (r"mlp\.weights_in\.", "mlp.fc1."),
    (r"mlp\.weights_out\.", "mlp.fc2."),
]
_CONVNEXT = [
    (r"^stages\.0\.downsample_layers\.", "stem."),
    (r"downsample_layers\.", "downsample."),
    (r"\.layers\.", ".blocks."),
    (r"depthwise_conv", "conv_dw"),
    (r"pointwise_conv([12])", r"mlp.fc\1"),
    (r"^layer_norm\.", "head.norm."),
    (r"\.layer_norm\.", ".norm."),
]
# Width, depth and heads to the size in the name of timm's architecture; others take the first, with arguments.
_Sizes = dict[tuple[int, int, int], str]
_PLAIN: _Sizes = {(384, 12, 6): "small", (768, 12, 12): "base", (1024, 24, 16): "large"}
_GATED_V2: _Sizes = {(1536, 40, 24): "giant"}
_GATED_V3: _Sizes = {(384, 12, 6): "small_plus", (1280, 32, 20): "huge_plus"}
_CONVNEXTS = {(96, 9): "tiny", (96, 27): "small", (128, 27): "base", (192, 27): "large"}  # first width, third depth


def convert_dinov2(config: Config, state: State) -> Family:
    """`dinov2` and `dinov2_with_registers`: ViTs with LayerScale, the largest with SwiGLU."""
    state = _join_qkv(_rename(state, _DINOV2))
    gated, registers = config.get("use_swiglu_ffn", False), "reg_token" in state
    if registers:  # timm adds no position to [CLS] and the registers, so that of [CLS] goes into its token
        positions = state["pos_embed"]
        state |= {"cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    size, given = _find_size(config, 14, _GATED_V2 if gated else _PLAIN)
    width, hidden = config["hidden_size"], state["blocks.0.mlp.fc1.weight"].shape[0]
    if hidden != int(width * (2.66667 * 2 if gated else 4)):  # timm's ratios
        given["mlp_ratio"] = hidden / width
    if registers and (count := state["reg_token"].shape[1]) != 4:
        given["reg_tokens"] = count
    if not config.get("qkv_bias", True):
        given["qkv_bias"] = False
    return "timm:" + name_architecture(f"vit_{size}_patch14_{'reg4_' * registers}dinov2", given), state


def convert_dinov3(config: Config, state: State) -> Family:
    """`dinov3_vit`: rotary positions, registers and LayerScale."""
    gated = config.get("use_gated_mlp", False)
    mlp = [(r"mlp\.gate_proj\.", "mlp.fc1_g."), (r"mlp\.up_proj\.", "mlp.fc1_x." if gated else "mlp.fc1.")]
    state = _rename(
        state, [*_BLOCK, *mlp, (r"mlp\.down_proj\.", "mlp.fc2."), (r"layer_scale([12])\.lambda1", r"gamma_\1")]
    )
    biased = any(name.endswith("attn.q.bias") for name in state)
    state = {re.sub(r"attn\.([qv])\.bias", r"attn.\1_bias", name): value for name, value in state.items()}
    state = _join_qkv(state, leaves=("weight",))
    size, given = _find_size(config, 16, _GATED_V3 if gated else _PLAIN)
    if config["intermediate_size"] != 4 * config["hidden_size"]:
        given["mlp_ratio"] = config["intermediate_size"] / config["hidden_size"]
    if (registers := config.get("num_register_tokens", 0)) != 4:
        given["num_reg_tokens"] = registers
    if config.get("rope_theta", 100.0) != 100:
        given["rope_temperature"] = config["rope_theta"]
    return "timm:" + name_architecture(f"vit_{size}_patch16_dinov3{'_qkvb' * biased}", given), state


def convert_convnext(config: Config, state: State) -> Family:
    """`dinov3_convnext`."""
    depths, widths = tuple(config["depths"]), tuple(config["hidden_sizes"])
    size = _CONVNEXTS.get((widths[0], depths[2]))
    given = {} if size else {"depths": depths, "dims": widths}
    return "timm:" + name_architecture(f"convnext_{size or 'tiny'}", given), _rename(state, _CONVNEXT)


FAMILIES: dict[str, Callable[[Config, State], Family]] = {
    "dinov2": convert_dinov2,
    "dinov2_with_registers": convert_dinov2,
    "dinov3_vit": convert_dinov3,
    "dinov3_convnext": convert_convnext,
}


def _rename(state: State, rules: list[tuple[str, Any]]) -> State:
    """New names by regular expressions, each applied once, without what only pre-training used."""
    out: State = {}
    for name, value in state.items():
        if name.endswith("mask_token") or value.numel() == 0:  # of no registers
            continue
        for pattern, new in rules:
            name = re.sub(pattern, new, name, count=1)
        out[name] = value
    return out


def _join_qkv(state: State, leaves: tuple[str, ...] = ("weight", "bias")) -> State:
    """Queries, keys and values of a block in one tensor."""
    out = dict(state)
    for name in state:
        for leaf in leaves:
            if name.endswith(f".attn.q.{leaf}"):
                stem = name.removesuffix(f"q.{leaf}")
                out[f"{stem}qkv.{leaf}"] = torch.cat([out.pop(f"{stem}{part}.{leaf}") for part in "qkv"])
    return out


def _find_size(config: Config, patch: int, sizes: _Sizes) -> tuple[str, dict[str, Any]]:
    """The size in an architecture's name, and the arguments that it does not tell."""
    own = (config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"])
    given: dict[str, Any] = {}
    if own not in sizes:
        given = dict(zip(("embed_dim", "depth", "num_heads"), own, strict=True))
    if config["patch_size"] != patch:
        given["patch_size"] = config["patch_size"]
    return sizes.get(own, next(iter(sizes.values()))), given
