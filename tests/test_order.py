"""The order of an epoch: every image once, by (seed, epoch) alone, mixed, in little memory; sources by their weights."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino.data.order import Order, apportion, order_epoch
from dino.data.sources import Parts, Remaining, Subset, find_bounds, hold_out


class Many:
    """A source of `count` images in shards that begin at `bounds`, or of `parts`."""

    classes: tuple[str, ...] = ()
    labels, fingerprint = None, ""

    def __init__(self, count: int, bounds: list[int] | None = None, parts: Parts | None = None):
        self.count, self.parts = count, parts
        if bounds is not None:
            self.bounds = np.array(bounds)

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return str(index)

    def stamp(self) -> str:
        return ""

    def read(self, index: int) -> np.ndarray:
        return np.full((1, 1, 3), index, np.uint8)


def visit_all(order: Order, epoch: int, total: int, batch: int) -> np.ndarray:
    """[2, total]: an epoch in batches."""
    found = [np.stack(order.visit(epoch, a, min(a + batch, total))) for a in range(0, total, batch)]
    return np.concatenate(found, axis=1)


shards = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) > 0)


@settings(max_examples=200, deadline=None)
@given(shards, st.integers(1, 60), st.integers(1, 17), st.integers(0, 2**40), st.booleans())
def test_every_image_once_an_epoch(sizes, window, batch, seed, in_shards):
    total = sum(sizes)
    source = Many(total, [0, *np.cumsum(sizes).tolist()] if in_shards else None)
    order = Order(source, seed, most=0, window=window)
    for epoch in (0, 3):
        positions, numbers = visit_all(order, epoch, total, batch)
        assert sorted(positions.tolist()) == [*range(total)]
        np.testing.assert_array_equal(positions, numbers)
    again = visit_all(Order(source, seed, most=0, window=window), 3, total, 1000)
    np.testing.assert_array_equal(again, visit_all(order, 3, total, batch))


def test_few_images_are_one_permutation():
    positions, _ = Order(Many(20), 5).visit(3, 4, 9)
    np.testing.assert_array_equal(positions, order_epoch(5, 3, 20)[4:9])


def test_any_place_may_be_asked_for_first():
    order, source = Order(Many(5000), 1, most=0, window=700), Many(5000)
    places = np.random.default_rng(0).permutation(5000)[:100]
    expected = visit_all(Order(source, 1, most=0, window=700), 2, 5000, 5000)
    for place in places.tolist():
        assert order.visit(2, place, place + 1)[0][0] == expected[0, place]


def test_it_mixes():
    """Neighbors in a window come from shards as far apart as in a permutation of the window; epochs differ."""
    size, number = 100, 200
    source = Many(size * number, [*range(0, size * number + 1, size)])
    order = Order(source, 0, most=0, window=2000)
    first, second = (visit_all(order, epoch, len(source), 64)[0] for epoch in (0, 1))
    for positions in (first, second):
        shards = positions // size
        assert np.abs(np.diff(shards)).mean() == pytest.approx(number / 3, rel=0.1), "as of two shards at random"
        assert (np.diff(shards) == 0).mean() == pytest.approx(1 / 20, rel=0.2), "of the twenty shards in a window"
        batches = shards[: 312 * 64].reshape(-1, 64)
        assert min(len({*batch}) for batch in batches.tolist()) > 14, "a batch sees most shards of its window"
    assert (first == second).mean() < 0.01
    assert np.abs(np.corrcoef(np.arange(len(first)), first)[0, 1]) < 0.25  # of 200 shards in random order


def test_a_window_reads_few_shards():
    size, number = 100, 200
    order = Order(Many(size * number, [*range(0, size * number + 1, size)]), 0, most=0, window=2000)
    positions, _ = order.visit(0, 2000, 4000)
    assert len({*(positions // size).tolist()}) == 20


# --- what is held out of many images ---------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 300), st.integers(1, 20), st.integers(0, 9))
def test_remaining_is_the_subset_that_lists_them(total, count, seed):
    left_out = np.sort(np.random.default_rng(seed).permutation(total)[: min(count, total - 1)])
    source = Many(total, [0, total // 3, total])
    source.labels = np.arange(total)
    listed, remaining = Subset(source, np.setdiff1d(np.arange(total), left_out)), Remaining(source, left_out)
    assert len(listed) == len(remaining)
    assert [listed.name(i) for i in range(len(listed))] == [remaining.name(i) for i in range(len(remaining))]
    np.testing.assert_array_equal(listed.labels, remaining.labels)
    np.testing.assert_array_equal(find_bounds(listed), find_bounds(remaining))
    assert find_bounds(remaining)[-1] == len(remaining)


def test_of_many_images_some_are_held_out(monkeypatch):
    monkeypatch.setattr("dino.data.sources.MOST_LISTED", 100)
    train, held_out = hold_out(Many(5000), 0.1, 300, 7)
    assert isinstance(train, Remaining)
    names = [held_out.name(i) for i in range(300)], [train.name(i) for i in range(4700)]
    assert sorted(map(int, [*names[0], *names[1]])) == [*range(5000)]
    assert [*map(int, names[0])] == sorted(map(int, names[0]))
    assert np.mean([*map(int, names[0])]) == pytest.approx(2500, rel=0.1)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 10_000])
def test_weights_are_the_shares_of_an_epoch(most):
    sizes, weights = [300, 50, 650], (1.0, 1.0, 2.0)
    edges = np.cumsum([0, *sizes])
    source = Many(1000, parts=Parts(edges, weights))
    order = Order(source, 0, most, window=100)
    seen = []
    for epoch in range(4):
        positions, numbers = visit_all(order, epoch, 1000, 32)
        assert sorted(numbers.tolist()) == [*range(1000)], "which differ, so that views of one image do"
        part = np.searchsorted(edges, positions, side="right") - 1
        assert np.bincount(part).tolist() == [250, 250, 500]
        for batch in part[:960].reshape(-1, 96):
            assert np.abs(np.bincount(batch, minlength=3) - [24, 24, 48]).max() < 24, "at any time"
        seen.append(positions)
    visits = np.bincount(np.concatenate(seen), minlength=1000)
    assert {*visits[:300].tolist()} == {3, 4}  # 1,000 visits of 300 images
    assert {*visits[300:350].tolist()} == {20}
    assert {*visits[350:].tolist()} == {3, 4}  # 2,000 of 650


def test_weights_without_what_is_held_out():
    source = Many(100, parts=Parts(np.array([0, 90, 100]), (1.0, 1.0)))
    train, _ = hold_out(source, 0.2, 100, 0)
    positions, _ = Order(train, 0).visit(0, 0, 80)
    original = np.array([train.locate(int(i)) for i in positions])
    assert (original < 90).sum() == 40


@given(st.integers(1, 10**6), st.lists(st.floats(0.01, 100), min_size=1, max_size=9))
def test_shares_are_whole_and_near(total, weights):
    shares = apportion(total, tuple(weights))
    assert sum(shares) == total
    assert all(abs(share - total * weight / sum(weights)) < 1 for share, weight in zip(shares, weights, strict=True))
    assert all(a >= b - 1 for (a, v), (b, w) in pairwise(zip(shares, weights, strict=True)) if v >= w)
