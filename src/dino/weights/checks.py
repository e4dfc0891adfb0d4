"""What weights must be before a model is built from them or gets them: each refusal is one sentence."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dino.options.rules import Pixels, PositiveInt, conform_named, get_types
from dino.options.train import ModelOptions
from dino.weights.formats import State, list_first


def check_arguments(arguments: dict[str, Any], where: str) -> dict[str, Any]:
    """Arguments of `create`, held to the rules of the options of these names.

    Raises:
        ValueError: `where` says an argument that there is not, or one that breaks its rule.
    """
    types = get_types(ModelOptions) | {"arch": str, "image_size": Pixels, "in_channels": PositiveInt}
    if unknown := [name for name in arguments if name not in types]:
        raise ValueError(f"{where} cannot be built: it says {unknown[0]}, which is of another version.")
    return {n: conform_named(f"{where} cannot be built: {n}", value, types[n]) for n, value in arguments.items()}


def load_strictly(module: nn.Module, state: State, where: str) -> None:
    """Load `state` into `module`; every key and shape must agree, and every number must be finite.

    Raises:
        ValueError: names what is missing, unknown, of another shape, or not finite.
    """
    check_fit(module, state, where)
    refuse_broken(state, where)
    module.load_state_dict(state)


def check_fit(module: nn.Module, state: State, where: str) -> None:
    """Refuse a state whose keys and shapes are not those of `module`; errors as for `load_strictly`."""
    own = module.state_dict()
    reshaped = [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    kinds = {"missing": own.keys() - state.keys(), "unknown": state.keys() - own.keys(), "of another shape": reshaped}
    if wrong := [f"{len(names)} {kind} ({list_first(names)})" for kind, names in kinds.items() if names]:
        raise ValueError(f"{where} does not fit this model: {'; '.join(wrong)}. Use the options it was trained with.")


def refuse_broken(state: State, where: str) -> None:
    """Refuse weights that are not finite; `where` is their name, for the message."""
    if any(value.layout != torch.strided or value.is_meta or value.is_complex() for value in state.values()):
        raise ValueError(
            f"{where} holds sparse, complex or empty tensors, which no model here has; save plain numbers."
        )
    if broken := [name for name, value in state.items() if not value.float().isfinite().all()]:
        raise ValueError(
            f"{where} holds numbers that are not finite (NaN or infinity) in {len(broken)} of {len(state)} tensors "
            f"({list_first(broken)}), because its training diverged; use an earlier checkpoint, or train again "
            "with a lower --optim.lr."
        )
