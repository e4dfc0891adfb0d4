"""The drawn data set: a function of (seed, index) alone, balanced, with masks that fit, the same at any size."""

from __future__ import annotations

import pickle

import cv2
import numpy as np
import pytest

import dino.data.scenes
from dino.data.scenes import SHAPES, Scenes


def test_an_image_depends_on_seed_and_index_alone():
    a, b = Scenes(30), Scenes(60, first=10)
    for i in (0, 7, 19):
        assert np.array_equal(a.read(i + 10), b.read(i))
        assert np.array_equal(a.mask(i + 10), b.mask(i))
        assert a.labels[i + 10] == b.labels[i]
        assert a.name(i + 10) == b.name(i)
    assert not np.array_equal(a.read(0), a.read(1))
    assert not np.array_equal(a.read(0), Scenes(30, seed=1).read(0))
    assert a.fingerprint != b.fingerprint != Scenes(30, seed=1).fingerprint


def test_labels_are_balanced_and_named():
    scenes = Scenes(200, first=3)
    assert np.bincount(scenes.labels).min() >= 19
    assert scenes.classes == tuple(SHAPES)
    assert list(np.sort(Scenes(10, first=20).labels)) == list(range(10))


def test_images_and_masks_are_sane():
    scenes = Scenes(100)
    shares = []
    for i in range(100):
        image, mask = scenes.read(i), scenes.mask(i)
        assert (image.shape, image.dtype) == ((48, 48, 3), np.uint8)
        assert (mask.shape, mask.dtype) == ((48, 48), np.bool_)
        assert not mask[[0, -1]].any()
        assert not mask[:, [0, -1]].any()  # whole things only
        shares.append(mask.mean())
    assert min(shares) > 0.1
    assert max(shares) < 0.35


def test_another_size_is_the_same_scene():
    small, large = Scenes(20), Scenes(20, size=192)
    for i in range(20):
        shrunk = cv2.resize(large.read(i), (48, 48), interpolation=cv2.INTER_AREA).astype(float)
        assert np.abs(shrunk - small.read(i)).mean() < 4
        share = cv2.resize(large.mask(i).astype(np.float32), (48, 48), interpolation=cv2.INTER_AREA)
        assert ((share > 0.5) == small.mask(i)).mean() > 0.97


def test_there_are_four_things():
    scenes = Scenes(40, size=192)
    counts = [cv2.connectedComponents(scenes.mask(i).astype(np.uint8))[0] - 1 for i in range(40)]
    assert set(counts) <= {2, 3, 4, 5}  # some touch, and one that overlaps another may be cut in two
    assert counts.count(4) > 25


def test_things_differ_from_their_background():
    scenes = Scenes(50)
    for i in range(50):
        gray, mask = scenes.read(i).mean(axis=2), scenes.mask(i)
        assert np.abs(gray[mask] - np.median(gray[~mask])).mean() > 20


def test_a_scene_is_drawn_once_and_nobody_can_change_it(monkeypatch):
    scenes = Scenes(12)
    expected = scenes.read(5).copy()
    scenes.read(5)[:] = 0
    monkeypatch.setattr(dino.data.scenes, "_draw", None)
    assert np.array_equal(scenes.read(5), expected)


def test_no_more_scenes_are_kept_than_memory_is_meant_for(monkeypatch):
    monkeypatch.setattr(dino.data.scenes, "KEPT", 3 * 48 * 48 * 3)
    scenes = Scenes(12)
    before = [scenes.read(i) for i in range(12)]
    monkeypatch.setattr(dino.data.scenes, "_scene", None)
    assert all(np.array_equal(scenes.read(i), before[i]) for i in range(3))
    with pytest.raises(TypeError):
        scenes.read(3)


def test_pickles_as_its_parameters():
    scenes = Scenes(12, seed=3)
    again = pickle.loads(pickle.dumps(scenes))
    assert np.array_equal(again.read(5), scenes.read(5))
    assert len(pickle.dumps(scenes)) < 2000


@pytest.mark.parametrize("arguments", [{"num_images": 0}, {"num_images": 5, "size": 4}, {"num_images": 5, "seed": -1}])
def test_what_cannot_be_drawn_is_refused(arguments):
    with pytest.raises(ValueError, match="is"):
        Scenes(**arguments)


def test_out_of_range_is_an_index_error():
    with pytest.raises(IndexError):
        Scenes(5).read(5)
