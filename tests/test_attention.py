"""Attention pictures: masks as the reference's, colours that repeat, files that show the image they are of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dino
from conftest import TINY, draw_images, run_dino
from dino.config import TrainOptions, replace
from dino.inference.attention import cls_attention, enlarge, jaccard, mass_mask, pca_colours
from dino.report.pictures import write_attention


def test_masks_are_the_references(golden):
    g = golden("attention_mask")
    mass = float(np.ravel(g["mass"])[0]) if g["mass"].size == 1 else 0.6
    found = mass_mask(torch.from_numpy(g["attention"])[:, None], mass)[:, 0]
    assert np.array_equal(found.numpy(), g["mask"].astype(bool))


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


def test_maps_and_colours_have_the_images_shape(model):
    images = torch.randn(2, 3, 48, 64)
    maps = cls_attention(model, images)
    assert maps.shape == (2, 3, 6, 8)
    assert (maps.sum(dim=(-2, -1)) < 1).all()
    assert enlarge(maps, (48, 64)).shape == (2, 3, 48, 64)
    colours = pca_colours(model, images)
    assert colours.shape == (2, 6, 8, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    assert torch.equal(colours, pca_colours(model, images))


def test_files_show_their_own_image_in_its_aspect(model, tmp_path):
    folder = draw_images(tmp_path / "images", 3)
    paths = write_attention(model, [str(folder)], tmp_path / "out", 64, 0.6, torch.device("cpu"))
    assert len(paths) == len(set(paths)) == 3 * (1 + model.num_heads)
    sheets = [p for p in paths if p.name.endswith("-attention.png")]
    assert len(sheets) == 3
    pixels = [np.asarray(Image.open(p)) for p in sheets]
    assert len({p.tobytes() for p in pixels}) == 3


@pytest.mark.parametrize(
    ("images", "words"), [(["{tmp}/nowhere.jpg"], "nowhere.jpg"), (["{tmp}/broken.jpg"], "broken.jpg")]
)
def test_bad_input_is_one_sentence(model, tmp_path, images, words):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=words):
        write_attention(model, [i.format(tmp=tmp_path) for i in images], tmp_path / "out", 64, 0.6, torch.device("cpu"))


def test_command_line(tmp_path, photos):
    run = dino.train(replace(TrainOptions(), TINY), data=str(photos), out=str(tmp_path / "run"), stop_after=1)
    done = run_dino("attention", run, photos / "class0" / "000.jpg", "--out", tmp_path / "maps")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "maps" / "000-attention.png").is_file()
    assert run_dino("attention", run, tmp_path / "no.jpg", "--out", tmp_path / "maps").returncode == 2
    assert run_dino("attention", tmp_path, photos / "class0" / "000.jpg").returncode == 2
