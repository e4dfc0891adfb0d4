"""Attention and its pictures: masks as the reference's, and what is bright is what is attended to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dino
from dino.data.normalize import normalize
from dino.look.attention import enlarge, fit_to_patches, jaccard, map_attention, mass_mask
from dino.look.pictures import attention_maps


def test_masks_are_the_references(golden):
    g = golden("attention_mask")
    found = mass_mask(torch.from_numpy(g["attention"])[:, None], float(g["mass"]))[:, 0]
    assert g["mask"].sum() > 6
    assert np.array_equal(found.numpy(), g["mask"])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.05, 1), st.integers(0, 1000))
def test_a_mask_holds_its_mass_with_as_few_patches_as_can(rows, columns, mass, seed):
    attention = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).double() + 1e-3
    mask = mass_mask(attention, mass)
    share = attention[mask].sum() / attention.sum()
    assert share >= mass - 1e-9
    if mask.sum() > 1:
        assert share - attention[mask].min() / attention.sum() < mass + 1e-9
    if not mask.all():
        assert attention[mask].min() >= attention[~mask].max()


def test_jaccard_by_hand():
    a = torch.tensor([[1, 1, 0, 0]]).bool()
    b = torch.tensor([[0, 1, 1, 0]]).bool()
    assert jaccard(a, b).item() == pytest.approx(1 / 3)
    assert jaccard(a, a).item() == 1
    assert jaccard(a & ~a, b & ~b).item() == 0
    with pytest.raises(ValueError, match="mass is 0"):
        mass_mask(torch.ones(2, 2), 0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return dino.create("vit_nano", patch_size=8, image_size=32).eval()


def test_maps_have_the_images_shape(model):
    images = torch.randn(2, 3, 48, 64)
    maps = map_attention(model, images)
    assert maps.shape == (2, 3, 6, 8)
    assert (maps.sum(dim=(-2, -1)) < 1).all()
    assert enlarge(maps, (48, 64)).shape == (2, 3, 48, 64)


def test_a_picture_is_what_the_model_attends_to(model):
    image = fit_to_patches(np.random.default_rng(1).integers(0, 255, (40, 60, 3), np.uint8), 48, 8)
    assert image.shape == (48, 72, 3)
    shown = attention_maps(model, image, 48)
    attention = map_attention(model, normalize(torch.from_numpy(image[:48, :48].copy())[None, None]))
    square = attention_maps(model, image[:48, :48], 48)
    assert len(shown.maps) == len(shown.overlays) == len(shown.masks) == model.num_heads + 1
    brightest = [np.unravel_index(m.sum(-1, dtype=int)[4::8, 4::8].argmax(), (6, 6)) for m in square.maps[:-1]]
    assert brightest == [np.unravel_index(int(a.argmax()), (6, 6)) for a in attention[0]]
    for overlay, mask in zip(shown.overlays, shown.masks.numpy(), strict=True):
        assert np.array_equal(overlay[mask], image[mask])
        assert overlay[~mask].max() <= 255 * 0.25 + 12
        assert 0 < mask.mean() < 1


def test_an_image_of_too_many_patches_is_refused_before_it_is_enlarged():
    with pytest.raises(ValueError, match=r"at 64000000 x 64 pixels it has 64,000,000 patches, more than 32,768"):
        fit_to_patches(np.zeros((8, 8 * 10**6, 3), np.uint8), 64, 8)  # would take 16 GB
