"""Scores without labels, against plain NumPy and on shapes with known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dino
from dino.data.scenes import Scenes
from dino.engine.health import feature_health, two_crop_retrieval
from dino.eval.online import CROPPED, extract_crops
from training import SMALL_VIEWS


def test_feature_health_of_known_shapes():
    torch.manual_seed(0)
    spread = feature_health(torch.randn(4000, 32))
    assert spread["feature_std"] == pytest.approx(1, abs=0.02)
    assert spread["effective_rank"] == pytest.approx(32, rel=0.02)
    line = feature_health(torch.randn(500, 1) @ torch.randn(1, 32) + 5)
    assert line["effective_rank"] < 3
    same = feature_health(torch.ones(100, 32) + 1e-6 * torch.randn(100, 32))
    assert same["feature_std"] < 1e-3


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def rotate(features: torch.Tensor) -> torch.Tensor:
    return features @ torch.linalg.qr(draw(features.shape[-1], features.shape[-1], seed=9)).Q


def test_two_crop_retrieval_by_hand():
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    second = torch.tensor(
        [[1.0, 0.1], [1.0, 0.9], [-1.0, -0.5], [0.1, -1.0]]
    )  # of the second image nearest to the first
    assert two_crop_retrieval(first, second) == 75
    assert two_crop_retrieval(3 * rotate(first.double()), rotate(second.double())) == 75
    z = draw(100, 16)
    assert two_crop_retrieval(z, z) == 100
    assert two_crop_retrieval(z, z.roll(1, 0)) == 0


def test_features_that_are_all_the_same_retrieve_by_chance():
    assert two_crop_retrieval(torch.ones(40, 8), torch.ones(40, 8)) == pytest.approx(100 / 40)
    assert two_crop_retrieval(torch.zeros(40, 8), torch.zeros(40, 8)) == pytest.approx(100 / 40)


def test_crops_are_the_same_at_every_check_and_in_the_order_of_images():
    torch.manual_seed(0)
    model = dino.create("vit_nano", patch_size=8, image_size=32).eval()
    arguments = model, Scenes(12), list(range(12)), SMALL_VIEWS
    first = extract_crops(*arguments, 0)
    assert first.shape == (12, 2, 96)
    torch.rand(3)  # whatever else draws
    assert torch.equal(extract_crops(*arguments, 0), first)
    assert not torch.equal(extract_crops(*arguments, 1), first)
    some = extract_crops(model, Scenes(12), [11, 2], SMALL_VIEWS, 0)
    torch.testing.assert_close(some, first[[11, 2]])
    assert CROPPED <= 500  # a check stays quick
