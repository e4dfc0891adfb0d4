"""Scores without labels, against plain NumPy and SciPy and on shapes with known answers."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

import dino
from dino.data.scenes import Scenes
from dino.engine.health import LIDAR_FLOOR, feature_health, lidar, rankme, two_crop_retrieval
from dino.eval.online import CROPPED, PAIRS, extract_crops
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


def exp_entropy(values: np.ndarray) -> float:
    share = values / values.sum()
    return float(np.exp(-sum(p * np.log(p) for p in share if p > 0)))


def test_rankme_by_hand():
    z = draw(50, 8) * torch.arange(1, 9) + 1
    assert rankme(z) == pytest.approx(exp_entropy(scipy.linalg.svdvals(z.numpy())))
    assert rankme(torch.eye(5)) == pytest.approx(5)
    assert rankme(torch.ones(9, 4)) == pytest.approx(1)
    assert rankme(rotate(7 * z)) == pytest.approx(rankme(z))
    assert rankme(torch.zeros(3, 4)) == pytest.approx(1)


def test_lidar_by_hand():
    n, q, d = 30, 4, 6
    z = draw(n, 1, d) + 0.3 * draw(n, q, d, seed=1)
    means = z.numpy().mean(axis=1)
    between = np.cov(means.T, bias=True)
    within = sum(np.cov(crops.T, bias=True) for crops in z.numpy()) / n + LIDAR_FLOOR * np.eye(d)
    root = scipy.linalg.inv(scipy.linalg.sqrtm(within))
    expected = exp_entropy(scipy.linalg.eigvalsh(root @ between @ root))
    assert lidar(z) == pytest.approx(expected, rel=1e-6)
    assert lidar(rotate(z)) == pytest.approx(expected, rel=1e-6)
    assert lidar(z + 100) == pytest.approx(expected, rel=1e-6)
    assert lidar(z.flip(0, 1)) == pytest.approx(expected, rel=1e-6)


def test_lidar_counts_directions_that_tell_images_apart():
    images, noise = draw(400, 1, 8), draw(400, 4, 8, seed=1)
    known = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0])
    assert lidar(images * known + 0.01 * noise) == pytest.approx(3, abs=0.1)  # RankMe and others would count the noise
    assert lidar(images + 1e-3 * noise) == pytest.approx(8, abs=0.2)
    assert lidar(torch.ones(5, 4, 3)) == pytest.approx(1)


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
    assert first.shape == (12, PAIRS, 2, 96)
    torch.rand(3)  # whatever else draws
    assert torch.equal(extract_crops(*arguments, 0), first)
    assert not torch.equal(extract_crops(*arguments, 1), first)
    some = extract_crops(model, Scenes(12), [11, 2], SMALL_VIEWS, 0)
    torch.testing.assert_close(some, first[[11, 2]])
    assert CROPPED <= 500  # a check stays quick
