"""View parameters against torchvision's own samplers, and as functions of (seed, epoch, sample) alone."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop

from dino.data.views import Views, draw_views
from dino.options.recipes import find_recipe

OPTIONS = find_recipe("vit_small_100ep").options.views
SIZES = OPTIONS.sizes
NUM = 3000
LEVEL = 1e-3  # of some 150 tests of distributions; all seeds are fixed, so a test that passes keeps passing


def draw(num: int = NUM, shape: tuple[int, int] = (375, 500), seed: int = 3, epoch: int = 0, **changes) -> Views:
    options = dataclasses.replace(OPTIONS, **changes)
    return draw_views(options, seed, epoch, range(num), np.tile(shape, (num, 1)))


def columns(views: Views) -> dict[str, np.ndarray]:
    return {f.name: getattr(views, f.name) for f in dataclasses.fields(views) if f.name != "sizes"}


def torchvision_boxes(shape: tuple[int, int], scale: tuple[float, float], num: int) -> np.ndarray:
    torch.manual_seed(0)
    image = torch.empty(3, *shape)
    boxes = [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(num)]
    return np.array(boxes)


@pytest.fixture(scope="module")
def views() -> Views:
    return draw()


# ------------------------------------------------------------------------------------------------- distributions


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (96, 96), (400, 120)])
@pytest.mark.parametrize(
    ("view", "scale"), [(0, OPTIONS.global_scale), (1, OPTIONS.global_scale), (5, OPTIONS.local_scale)]
)
def test_boxes_are_distributed_as_torchvisions(shape, view, scale):
    ours, theirs = draw(shape=shape).box[:, view], torchvision_boxes(shape, scale, NUM)
    for measure in (
        lambda b: b[:, 2] * b[:, 3],  # area
        lambda b: np.log(b[:, 3] / b[:, 2]),  # log ratio
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] / np.maximum(shape[0] - b[:, 2], 1),  # place within the room there is
        lambda b: b[:, 1] / np.maximum(shape[1] - b[:, 3], 1),
    ):
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > LEVEL


@pytest.mark.parametrize("shape", [(10, 10000), (10000, 10), (3, 700), (1, 50), (50, 1), (1, 1), (7, 100), (100, 7)])
def test_where_no_box_fits_the_central_one_is_torchvisions(shape):
    ours = draw(20, shape).box
    for view, scale in enumerate([OPTIONS.global_scale] * 2 + [OPTIONS.local_scale]):
        if scale[0] * shape[0] * shape[1] > (4 / 3) * (min(shape) + 0.5) ** 2:  # always too long for the short edge
            assert (ours[:, view] == torchvision_boxes(shape, scale, 1)).all()
    assert (ours[..., :2] >= 0).all()
    assert (ours[..., 2:] >= 1).all()
    assert (ours[..., :2] + ours[..., 2:] <= shape).all()


def test_some_boxes_need_several_attempts_and_some_the_fallback():
    boxes = draw(shape=(100, 210), global_scale=(0.6, 1.0)).box[:, 0]
    central = (boxes == [0, 38, 100, 133]).all(1)
    theirs = torchvision_boxes((100, 210), (0.6, 1.0), NUM)
    expected = (theirs == [0, 38, 100, 133]).all(1)
    assert 0.02 < expected.mean() < 0.98
    assert stats.fisher_exact([[central.sum(), expected.sum()], [(~central).sum(), (~expected).sum()]])[1] > LEVEL


def test_factors_are_distributed_as_torchvisions(views):
    torch.manual_seed(0)
    jitter = ColorJitter(OPTIONS.brightness, OPTIONS.contrast, OPTIONS.saturation, OPTIONS.hue)
    bounds = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    theirs = np.array([jitter.get_params(*bounds)[1:] for _ in range(NUM)], np.float64)
    for step in range(4):
        for view in (0, 4):
            assert stats.ks_2samp(views.factors[:, view, step], theirs[:, step]).pvalue > LEVEL


def test_every_order_of_the_jitter_is_as_likely(views):
    _, counts = np.unique(views.order.reshape(-1, 4), axis=0, return_counts=True)
    assert len(counts) == 24
    assert (np.sort(views.order, -1) == range(4)).all()
    assert stats.chisquare(counts).pvalue > LEVEL


@pytest.mark.parametrize("view", [0, 1, 2, 9])
def test_probabilities(views, view):
    kind = min(view, 2)
    for values, prob in (
        (views.flip, OPTIONS.flip_prob),
        (views.jitter, OPTIONS.jitter_prob),
        (views.gray, OPTIONS.gray_prob),
        (views.sigma > 0, OPTIONS.blur_prob[kind]),
        (views.solarize, OPTIONS.solarize_prob[kind]),
    ):
        assert stats.binomtest(int(values[:, view].sum()), NUM, prob).pvalue > LEVEL


def test_sigma_is_distributed_as_the_references(views):
    rng = random.Random(0)
    theirs = [rng.uniform(0.1, 2.0) for _ in range(NUM)]
    for view in (0, 4):
        sigma = views.sigma[:, view]
        assert stats.ks_2samp(sigma[sigma > 0], theirs).pvalue > LEVEL


def test_draws_are_independent_of_each_other(views):
    table = np.concatenate(
        [
            np.stack([v[:, 2:4].astype(np.float64) for v in (views.flip, views.jitter, views.gray)], -1),
            views.factors[:, 2:4],
            views.order[:, 2:4, :2],
            np.log(views.box[:, 2:4, 2:3] * views.box[:, 2:4, 3:]),
            np.log(views.box[:, 2:4, 2:3] / views.box[:, 2:4, 3:]),
            views.box[:, 2:4, :1] / (376 - views.box[:, 2:4, 2:3]),
            views.box[:, 2:4, 1:2] / (501 - views.box[:, 2:4, 3:]),
        ],
        -1,
    ).reshape(NUM, -1)
    correlation = np.corrcoef(table, rowvar=False)
    num = len(correlation) // 2
    for first in (0, num):  # the first two places of one order exclude each other
        correlation[first + 7, first + 8] = correlation[first + 8, first + 7] = 0
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / np.sqrt(NUM)


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_certain_and_impossible(prob):
    views = draw(50, flip_prob=prob, jitter_prob=prob, gray_prob=prob, blur_prob=(prob,) * 3, solarize_prob=(prob,) * 3)
    for values in (views.flip, views.jitter, views.gray, views.sigma > 0, views.solarize):
        assert (values == prob).all()


# ---------------------------------------------------------------------------------- a function of its arguments


def test_batches_and_order_change_nothing():
    rng = np.random.default_rng(0)
    indices = rng.choice(10**9, 50, replace=False)
    shapes = rng.integers(1, 900, (50, 2))
    whole = draw_views(OPTIONS, 3, 5, indices.tolist(), shapes)
    order = rng.permutation(50)
    for part in (order[:1], order[1:8], order[8:25], order[25:]):
        views = draw_views(OPTIONS, 3, 5, indices[part].tolist(), shapes[part])
        for name, values in columns(views).items():
            assert (values == getattr(whole, name)[part]).all(), name


def test_seed_epoch_and_index_each_matter():
    base = draw(4)
    for other in (draw(4, seed=4), draw(4, epoch=1)):
        for name in ("box", "factors"):
            assert (getattr(base, name) != getattr(other, name)).any(-1).all()
    assert len(np.unique(base.factors.reshape(-1, 4), axis=0)) == 4 * len(SIZES)


def test_an_option_changes_only_its_own_numbers():
    base = columns(draw(20))
    for changes, own in (
        ({"num_local": 3}, set()),
        ({"blur_prob": (0.2, 0.2, 0.2)}, {"sigma"}),
        ({"blur_sigma": (0.5, 3.0)}, {"sigma"}),
        ({"hue": 0.3}, {"factors"}),
        ({"local_scale": (0.2, 0.3)}, {"box"}),
        ({"solarize_prob": (1.0, 0.0, 0.0)}, {"solarize"}),
    ):
        for name, values in columns(draw(20, **changes)).items():
            same = (values == base[name][:, : values.shape[1]]).all()
            assert same == (name not in own), (changes, name)


def test_groups_are_the_global_views_and_runs_of_equal_size():
    assert draw(1).groups == [slice(0, 2), slice(2, 10)]
    assert draw(1, num_local=0).groups == [slice(0, 2)]
    equal = dataclasses.replace(draw(1), sizes=(96,) * 10)
    assert equal.groups == [slice(0, 2), slice(2, 10)]  # the teacher sees the first group


def test_types_and_shapes():
    types = {"box": np.int32, "order": np.int8, "factors": np.float32, "sigma": np.float32}
    for name, values in columns(draw(3)).items():
        assert values.dtype == types.get(name, np.bool_), name
        assert values.shape == (3, 10, 4) if name in ("box", "order", "factors") else (3, 10), name
