"""The feature loop: the reference's evaluation view to the pixel, order kept, unreadable images left out and named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

import dino
from dino.data.evaluation_views import resize_and_crop
from dino.data.image_files import open_source
from dino.data.normalize import normalize
from dino.data.open import probe
from dino.data.scenes import Scenes
from dino.data.sources import evenly_spaced
from dino.eval.floors import count_colors, flatten_pixels, read_views
from dino.eval.online import OnlineEvaluation, measure_scene_masks
from dino.features.extract import Features, extract
from dino.html import read_row
from dino.models.preprocessing import IMAGENET
from helpers import draw_images
from training import SMALL_VIEWS


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


@settings(max_examples=40, deadline=None)
@given(st.integers(7, 400), st.integers(7, 400))
def test_preprocess_is_the_references_resize_and_crop(height, width):
    image = noise(height, width)
    bicubic = transforms.InterpolationMode.BICUBIC
    expected = transforms.Compose([transforms.Resize(256, bicubic), transforms.CenterCrop(224)])(Image.fromarray(image))
    assert np.array_equal(resize_and_crop(image, 224), np.asarray(expected))


@pytest.mark.parametrize("shape", [(3, 400), (400, 3), (1, 301), (5, 2001)])
def test_a_very_long_image_is_cut_before_it_is_resized(shape):
    image, bicubic = noise(*shape), transforms.InterpolationMode.BICUBIC
    plain = transforms.Compose([transforms.Resize(256, bicubic), transforms.CenterCrop(224)])(Image.fromarray(image))
    assert np.abs(resize_and_crop(image, 224).astype(int) - np.asarray(plain)).max() <= 3
    longer = np.zeros([10**8 if edge == max(shape) else 1 for edge in shape] + [3], np.uint8)  # would take 10 TB
    assert resize_and_crop(longer, 224).shape == (224, 224, 3)


def test_small_models_keep_the_border():
    image = noise(32, 32)
    assert np.array_equal(resize_and_crop(image, 32), image)
    assert resize_and_crop(noise(50, 90), 48).shape == (48, 48, 3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return dino.create("vit_nano", patch_size=8, image_size=32).eval()


def test_extract_keeps_order_whatever_the_batch_size_and_workers(model, tmp_path):
    source = open_source(str(draw_images(tmp_path / "images", 11)))
    expected = [model(normalize(torch.tensor(resize_and_crop(source.read(i), 32))[None, None])) for i in range(11)]
    for batch_size, workers in ((3, 0), (100, 0), (4, 2)):
        found = extract(model, source, 32, batch_size=batch_size, num_workers=workers)
        torch.testing.assert_close(found.values, torch.cat(expected).detach(), rtol=1e-4, atol=1e-5)
        assert list(found.indices) == list(range(11))


def test_unreadable_images_are_left_out_and_named(model, tmp_path):
    folder = draw_images(tmp_path / "images", 9)
    (folder / "class1" / "001.jpg").write_bytes(b"")
    found = extract(model, open_source(str(folder)), 32, batch_size=4)
    assert len(found.values) == len(found.indices) == 8
    assert [name for name, _ in found.bad] == ["class1/001.jpg"]


def test_probe_wants_one_readable_image(tmp_path):
    folder = draw_images(tmp_path / "images", 6)
    assert 40 <= probe(open_source(str(folder))) < 70
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match="none of the 6 images"):
        probe(open_source(str(folder)))


def test_spread_covers_evenly():
    assert list(evenly_spaced(5, 10)) == [0, 1, 2, 3, 4]
    chosen = list(evenly_spaced(1000, 10))
    assert (chosen[0], chosen[-1], len(chosen)) == (0, 999, 10)
    assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1


def test_online_evaluation_of_scenes_measures_everything_and_pixels_once():
    backbone = dino.create("vit_nano", patch_size=8, image_size=32)
    measure = OnlineEvaluation(Scenes(60), Scenes(30, first=60), SMALL_VIEWS, 0, torch.device("cpu"))
    first, second = measure(backbone, 0), measure(backbone, 1)
    assert {"knn10_top1", "knn20_top5", "effective_rank", "jaccard_best_head", "color_agreement"} <= first.keys()
    assert first["knn_queries"] == 30
    assert {"pixels_knn20_top1", "colors_knn20_top1"} <= first.keys()
    assert first.keys() - second.keys() == {name for name in first if name.startswith(("pixels_", "colors_"))}
    assert first["jaccard_best_head"] >= first["jaccard_mean_head"]


def test_scene_masks_of_a_perfect_model_is_one_hundred():
    """A model whose heads look exactly at the object: its Jaccard is limited only by the patch grid."""
    scenes = Scenes(5)

    class Oracle:
        preprocessing = IMAGENET

        def grid(self, height, width):
            return height, width

        def cls_attention(self, images):
            drawn = scenes.at(images.shape[-1])
            masks = torch.from_numpy(np.stack([drawn.mask(i) for i in range(5)])).flatten(1).float()
            return masks[:, None].expand(-1, 2, -1)

    result = measure_scene_masks(Oracle(), scenes, 48, torch.device("cpu"))
    # Keeping 60 % of an even mass keeps 60 % of the object.
    assert result == pytest.approx(
        dict.fromkeys(("jaccard_best_head", "jaccard_mean_head", "jaccard_mean_map"), 60), abs=1
    )


def test_the_mean_map_may_be_better_than_every_head_and_has_a_figure_of_its_own():
    scenes = Scenes(5)

    class Halves:
        """One head looks at the upper halves of objects, the other at the lower ones."""

        preprocessing = IMAGENET

        def grid(self, height, width):
            return height, width

        def cls_attention(self, images):
            drawn = scenes.at(images.shape[-1])
            masks = torch.from_numpy(np.stack([drawn.mask(i) for i in range(5)])).float()
            rows = torch.arange(masks.shape[1])[:, None] < masks.shape[1] // 2
            return torch.stack([masks * rows, masks * ~rows], dim=1).flatten(2)

    result = measure_scene_masks(Halves(), scenes, 48, torch.device("cpu"))
    assert result["jaccard_mean_map"] == pytest.approx(60, abs=1)
    assert result["jaccard_mean_head"] == pytest.approx(30, abs=1)
    assert 30 < result["jaccard_best_head"] < 40


def test_images_that_vanish_after_their_features_were_computed_end_nothing(photos):
    source = open_source(str(photos))
    found = Features(torch.zeros(5, 1), np.arange(5), [])
    whole = read_views(source, found.indices, 32)
    assert whole.values.shape == (5, 32, 32, 3)
    (photos / source.name(1)).unlink()
    (photos / source.name(2)).write_bytes(b"")
    left = read_views(source, found.indices, 32)
    assert left.indices.tolist() == [0, 3, 4]
    assert torch.equal(left.values, whole.values[[0, 3, 4]])
    assert [name for name, _ in left.bad] == [source.name(1), source.name(2)]
    row = read_row(np.zeros((8, 8, 3), np.uint8), "", None, source, [(1.0, 1), (0.5, 0)])  # of a page
    assert np.ptp(row.neighbors[0].pixels) == 0
    assert np.ptp(row.neighbors[1].pixels) > 0
    for path in photos.rglob("*.jpg"):
        path.unlink()
    none = read_views(source, found.indices, 32)
    assert flatten_pixels(none).values.shape == (0, 3 * 32 * 32)
    assert count_colors(none).values.shape == (0, 512)


def test_narrow_images_at_several_scales(tmp_path, saved_model):
    Image.new("RGB", (1, 3000), "red").save(tmp_path / "line.png")
    found = extract(
        dino.load(str(saved_model)), open_source(str(tmp_path)), 32, pooling="three scales", resize="shrunk"
    )
    assert found.values.isfinite().all()
    assert len(found.values) == 1
