"""Paths that need an NVIDIA GPU; skipped without one."""

from __future__ import annotations

import math

import pytest
import torch

import dino
from conftest import TINY, assert_same_bits, draw_images, final_state
from dino.config import TrainOptions, replace
from dino.engine.log import read_metrics

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trains_on_a_gpu_in_every_precision(tmp_path, precision):
    images = draw_images(tmp_path / "images")
    options = replace(TrainOptions(), TINY | {"device": "cuda", "precision": precision, "data.num_workers": 2})
    run = dino.train(options, data=str(images), out=str(tmp_path / "run"))
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_gpu_and_cpu_losses_agree(tmp_path):
    images = draw_images(tmp_path / "images")
    losses = []
    for device in ("cpu", "cuda"):
        options = replace(TrainOptions(), TINY | {"device": device, "precision": "fp32", "log.every": 1})
        run = dino.train(options, data=str(images), out=str(tmp_path / device), stop_after=3)
        losses.append([line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)  # the renderers differ by rounding


def test_resume_on_a_gpu_is_exact(tmp_path):
    images = draw_images(tmp_path / "images")
    options = replace(TrainOptions(), TINY | {"device": "cuda", "precision": "fp32"})
    torch.use_deterministic_algorithms(True, warn_only=True)
    whole = dino.train(options, data=str(images), out=str(tmp_path / "whole"))
    part = dino.train(options, data=str(images), out=str(tmp_path / "part"), stop_after=7)
    dino.train(replace(options, {"resume": str(part)}))
    assert_same_bits(final_state(whole), final_state(part))
