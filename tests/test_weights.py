"""Weights in every format: exact round trips, equal features in timm and transformers, strictness, safe pickles."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import pickle

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.xcit import checkpoint_filter_fn

import dino
from conftest import GOLDEN, TINY, assert_same_bits, final_state
from dino import cli, config
from dino.models import Head, create, export, formats, weights
from dino.models.weights import Weights, read, read_linear, write_linear

SIZES = {"arch": "vit_nano", "patch_size": 8, "image_size": 64, "width": 96, "depth": 4, "num_heads": 3}


def random_state(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Values of every entry's own, buffers too, so that no two can be mistaken for each other."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator).mul(0.05).to(value.dtype)
        if value.is_floating_point()
        else torch.full_like(value, seed)
        for name, value in module.state_dict().items()
    }


def vit_weights(**changes: object) -> Weights:
    arguments = SIZES | changes
    state = random_state(create(**arguments), 0)
    return Weights("test", arguments, {f"teacher.backbone.{k}": v for k, v in state.items()})


def full_weights(**changes: object) -> Weights:
    found = vit_weights(**changes)
    head = Head(96, 64, 32, 16, batch_norm=True)
    state = dict(found.state)
    state |= {f"student.backbone.{k}": v for k, v in random_state(create(**found.arguments), 1).items()}
    for seed, role in enumerate(("student", "teacher"), 2):
        state |= {f"{role}.head.{k}": v for k, v in random_state(head, seed).items()}
    return Weights("test", found.arguments, state | {"centre.value": torch.randn(64)})


@pytest.mark.parametrize("kind", sorted(export.FORMATS))
@pytest.mark.parametrize(
    "sizes", [{}, {"width": 128, "num_heads": 2, "depth": 2, "patch_size": 16}], ids=["own", "odd"]
)
def test_a_vit_comes_back_bit_for_bit_from_every_format(kind, sizes, tmp_path):
    given = full_weights(**sizes) if kind == "reference-checkpoint" and not sizes else vit_weights(**sizes)
    if kind == "reference-checkpoint" and sizes:
        pytest.skip("heads are of one width here")
    out = tmp_path / ("file.safetensors" if kind == "safetensors" else "out")
    export.FORMATS[kind](given, out)
    found = read(out)
    assert {k: v for k, v in found.arguments.items() if k != "pos_interp"} == formats.full_sizes(given.arguments)
    assert_same_bits(found.state, given.state)
    assert found.left_out == ()
