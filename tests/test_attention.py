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
from dino.data.decode import decode
from dino.data.render import normalise
from dino.inference.attention import cls_attention, enlarge, fit, jaccard, mass_mask, pca_colours
from dino.report.pictures import look, names, write_attention

CPU = torch.device("cpu")


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


def test_colours_share_one_basis_and_follow_the_features(model):
    images = torch.randn(3, 3, 32, 32)
    images[2] = images[0]
    colours = pca_colours(model, images)
    torch.testing.assert_close(colours[2], colours[0])
    assert not torch.allclose(colours[1], colours[0])
    torch.testing.assert_close(pca_colours(model, images[[1, 0, 2]])[[1, 0, 2]], colours, atol=2e-3, rtol=0)
    assert colours.std(dim=(0, 1, 2)).min() > 0.05
    one_patch = pca_colours(model, images[:1, :, :8, :8])
    assert one_patch.shape == (1, 1, 1, 3)
    assert one_patch.isfinite().all()


def test_files_show_their_own_image_in_its_aspect(model, tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"wide": (40, 90), "tall": (70, 50), "odd": (33, 47)}
    (tmp_path / "images").mkdir()
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
    paths = write_attention(model, [str(tmp_path / "images")], tmp_path / "out", 64, 0.6, CPU)
    assert len(paths) == len(set(paths)) == 3 * (1 + model.num_heads)
    shapes = {p.name: decode(p).shape[1::-1] for p in paths}
    # Shorter side 64; the longer is 144, 89.6 or 91.2, cut down to whole patches of 8.
    assert [shapes[f"{name}-head0.png"] for name in sizes] == [(144, 64), (64, 88), (88, 64)]
    for name in sizes:
        width, height = shapes[f"{name}-attention.png"]
        shown_width, shown_height = shapes[f"{name}-head0.png"]
        assert width > (model.num_heads + 2) * shown_width
        assert height > 2 * shown_height
    assert len({p.read_bytes() for p in paths}) == len(paths)


def test_a_picture_is_what_the_model_attends_to(model):
    image = fit(np.random.default_rng(1).integers(0, 255, (40, 60, 3), np.uint8), 48, 8)
    assert image.shape == (48, 72, 3)
    shown = look(model, image, 0.6, CPU)
    attention = cls_attention(model, normalise(torch.from_numpy(image[:48, :48].copy())[None, None]))
    square = look(model, image[:48, :48], 0.6, CPU)
    assert len(shown.maps) == len(shown.overlays) == len(shown.masks) == model.num_heads + 1
    brightest = [np.unravel_index(m.sum(-1, dtype=int)[4::8, 4::8].argmax(), (6, 6)) for m in square.maps[:-1]]
    assert brightest == [np.unravel_index(int(a.argmax()), (6, 6)) for a in attention[0]]
    for overlay, mask in zip(shown.overlays, shown.masks.numpy(), strict=True):
        assert np.array_equal(overlay[mask], image[mask])
        assert overlay[~mask].max() <= 255 * 0.25 + 12
        assert 0 < mask.mean() < 1


def test_colliding_names_are_told_apart():
    assert names(["/a/x.jpg", "/a/y.jpg"]) == ["x", "y"]
    assert names(["/a/x.jpg", "/b/x.jpg", "/b/y.png"]) == ["a-x", "b-x", "y"]
    assert names(["/a/x.jpg", "/a/X.png"]) == ["x.jpg", "X.png"]
    tricky = ["/r/a/x.jpg", "/r/a-x.jpg", "/r/b/x.jpg", "/r/b/x.png", "/r/b-x.jpg.jpg"]
    assert len({name.lower() for name in names(tricky)}) == len(tricky)


def test_a_bad_image_in_a_folder_is_skipped_and_named(model, tmp_path, capsys):
    folder = draw_images(tmp_path / "images", 2)
    (folder / "class0" / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (5, 5)).save(folder / "small.png")
    paths = write_attention(model, [str(folder), str(folder / "class0")], tmp_path / "out", 32, 0.6, CPU)
    assert len(paths) == 2 * (1 + model.num_heads)
    said = capsys.readouterr().err
    assert "broken.jpg" in said
    assert "5 x 5 pixels" in said


@pytest.mark.parametrize(
    ("image", "out", "size", "mass", "words"),
    [
        ("nowhere.jpg", "out", 64, 0.6, "no image '.*nowhere.jpg'"),
        ("broken.jpg", "out", 64, 0.6, "broken.jpg cannot be shown: not an image"),
        ("small.png", "out", 64, 0.6, "5 x 5 pixels, smaller than one patch of 8"),
        ("long.png", "out", 512, 0.6, "use a smaller --size"),
        ("good.png", "broken.jpg", 64, 0.6, "--out .*broken.jpg cannot be written"),
        ("good.png", "broken.jpg/below", 64, 0.6, "--out .*below cannot be written"),
        ("good.png", "out", 4, 0.6, "--size is 4, not a multiple of the patch size 8"),
        ("good.png", "out", 64, 1.5, "mass is 1.5"),
        ("folder", "out", 64, 0.6, "none of the 2 images"),
    ],
)
def test_bad_input_is_one_sentence(model, tmp_path, image, out, size, mass, words):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "folder").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "folder" / name).write_bytes(b"no image")
    for name, edges in (("small", (5, 5)), ("long", (6400, 40)), ("good", (40, 40))):
        Image.new("RGB", edges).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match=words) as caught:
        write_attention(model, [str(tmp_path / image)], tmp_path / out, size, mass, CPU)
    assert "\n" not in str(caught.value)


def test_command_line(tmp_path, photos):
    run = dino.train(replace(TrainOptions(), TINY), data=str(photos), out=str(tmp_path / "run"), stop_after=1)
    done = run_dino("attention", run, photos / "class0" / "000.jpg", "--out", tmp_path / "maps")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "maps" / "000-attention.png").is_file()
    assert run_dino("attention", run, tmp_path / "no.jpg", "--out", tmp_path / "maps").returncode == 2
    assert run_dino("attention", tmp_path, photos / "class0" / "000.jpg").returncode == 2
