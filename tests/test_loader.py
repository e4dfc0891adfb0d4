"""Batches are a function of the step: the same for any number of workers and ranks, each epoch a permutation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dino.data.device_render import DeviceRenderer
from dino.data.image_files import open_source
from dino.data.loader import ViewBatches, iterate
from dino.data.order import order_epoch
from dino.data.render import CpuRenderer
from dino.engine.step import draw_drop_path_noise
from helpers import draw_images
from training import SMALL_VIEWS

OPTIONS = SMALL_VIEWS


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(str(draw_images(tmp_path_factory.mktemp("images"), 20)))


def batches(source, rank: int = 0, ranks: int = 1, batch_size: int = 6) -> ViewBatches:
    return ViewBatches(source, OPTIONS, CpuRenderer(), batch_size, 5, rank, ranks)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")  # on two cores
def test_identical_for_0_1_and_4_workers(source):
    expected = list(iterate(batches(source), 0, 7, 0, False))
    assert [tuple(g.shape) for g in expected[0].prepared] == [(2, 6, 32, 32, 3), (3, 6, 16, 16, 3)]
    for workers in (1, 4):
        found = list(iterate(batches(source), 0, 7, workers, False))
        assert len(found) == 7
        for a, b in zip(expected, found, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.prepared, b.prepared, strict=True))


def test_two_ranks_share_the_batch_of_one(source):
    for step in range(7):
        whole = batches(source)[step].prepared
        parts = [batches(source, rank, 2)[step].prepared for rank in (0, 1)]
        for x, a, b in zip(whole, *parts, strict=True):
            assert torch.equal(x, torch.cat([a, b], dim=1))


def test_two_ranks_share_the_drop_path_noise(source):
    def draw(step: int, rank: int = 0, ranks: int = 1) -> list[torch.Tensor]:
        share = batches(source, rank, ranks).share
        return draw_drop_path_noise(5, step, 4, OPTIONS.sizes, 6, share, torch.device("cpu"))

    whole = draw(3)
    assert [(x.shape, x.dtype) for x in whole] == [((4, 2, 6), torch.float32), ((4, 3, 6), torch.float32)]
    assert all(x.min() >= 0 and x.max() < 1 for x in whole)
    for x, a, b in zip(whole, draw(3, 0, 2), draw(3, 1, 2), strict=True):
        assert torch.equal(x, torch.cat([a, b], dim=2))
    assert not torch.equal(whole[0], draw(4)[0])


def test_starting_later_is_the_same_run(source):
    late, early = list(iterate(batches(source), 4, 6, 0, False)), list(iterate(batches(source), 0, 6, 0, False))[4:]
    for a, b in zip(late, early, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.prepared, b.prepared, strict=True))


def test_an_epoch_visits_every_image_at_most_once_in_its_own_order(source):
    data = batches(source)
    assert data.steps_per_epoch == 3
    seen = np.concatenate([data.indices(step)[0] for step in range(3)])
    assert len(set(seen)) == 18
    assert sorted(order_epoch(5, 0, 20)) == list(range(20))
    assert list(order_epoch(5, 0, 20)) != list(order_epoch(5, 1, 20))
    assert list(order_epoch(5, 0, 20)) != list(order_epoch(6, 0, 20))


def test_an_unreadable_image_gets_the_same_stand_in_everywhere(tmp_path):
    folder = draw_images(tmp_path / "images", 20)
    for name in ("class0/000.jpg", "class0/003.jpg"):
        (folder / name).write_bytes(b"broken")
    data = open_source(str(folder))
    whole = list(iterate(batches(data), 0, 3, 0, False))
    bad = {name for batch in whole for name, _ in batch.bad}
    assert bad <= {"class0/000.jpg", "class0/003.jpg"}
    assert bad
    for step, batch in enumerate(whole):
        parts = [batches(data, rank, 2)[step].prepared for rank in (0, 1)]
        for x, a, b in zip(batch.prepared, *parts, strict=True):
            assert torch.equal(x, torch.cat([a, b], dim=1))


def test_nothing_readable_is_an_empty_batch_that_names_them(tmp_path):
    folder = draw_images(tmp_path / "images", 8, classes=1)
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"")
    batch = batches(open_source(str(folder)), batch_size=4)[0]
    assert batch.prepared == []
    assert len({name for name, _ in batch.bad}) == 8


def test_views_of_a_device_are_those_of_workers(source):
    """A loader that hands over images, and a renderer in the training process: the views up to rounding."""
    device = DeviceRenderer("cpu")
    ahead = ViewBatches(source, OPTIONS, device, 6, 5)
    for batch, packed in zip(iterate(batches(source), 0, 4, 0, False), iterate(ahead, 0, 4, 2, False), strict=True):
        assert packed.views is not None
        for a, b in zip(batch.prepared, device.finish(packed.prepared, packed.views), strict=True):
            assert (a.int() - b.int()).abs().float().mean() < 1
