"""Attention against outlines: the overlap by hand, both layouts, and what is said of masks that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dino
from dino.cli import main
from dino.data.decode import BadImage
from dino.data.normalize import normalize
from dino.data.scenes import Scenes
from dino.eval import masks
from dino.eval.online import measure_scene_masks
from dino.look.attention import map_attention
from dino.options.evaluate import MasksOptions
from helpers import ranks_agree

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(saved_model):
    return dino.load(saved_model)


def test_overlap_of_every_object_with_every_head_by_hand(model):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (40, 48, 3), np.uint8)
    objects = np.zeros((2, 40, 48), bool)
    objects[0, 3:30, 5:20], objects[1, 20:, 30:] = True, True
    found = masks.measure_overlap(model, image, objects, 0.6)
    attention = map_attention(model, normalize(torch.from_numpy(image)[None, None]))[0].double().numpy()
    assert found.shape == (2, model.num_heads) == (2, len(attention))
    for head, patches in enumerate(attention):
        kept, mass = np.zeros(30, bool), 0.0
        for i in np.argsort(-patches.ravel()):  # the heaviest patches until they hold 60 %
            if mass >= 0.6 * patches.sum():
                break
            kept[i], mass = True, mass + patches.ravel()[i]
        pixels = np.kron(kept.reshape(5, 6), np.ones((8, 8))) > 0
        for k, one in enumerate(objects):
            assert found[k, head] == pytest.approx((pixels & one).sum() / (pixels | one).sum())


def blob(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture and its two objects' numbers, with a rim of 255 as VOC has."""
    indices = np.zeros((height, width), np.uint8)
    indices[2:22, 2:27], indices[4:20, 4:25], indices[24:, 30:] = 255, 1, 2
    pixels = rng.integers(0, 80, (height, width, 3)) + 60 * indices[..., None].clip(0, 2)
    return pixels.astype(np.uint8), indices


def save_palette(indices: np.ndarray, path: Path) -> None:
    image = Image.fromarray(indices, "L")
    image.putpalette([value for i in range(256) for value in (i, 255 - i, i // 2)])  # turns it into indices
    image.save(path)


@pytest.fixture
def voc(tmp_path) -> Path:
    root, rng = tmp_path / "voc", np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationObject", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for i in range(7):
        pixels, indices = blob(rng, 40 + i, 56 - i)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{i}.jpg")
        save_palette(indices, root / "SegmentationObject" / f"{i}.png")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("".join(f"{i}\n" for i in range(1, 7)))
    return root


def test_command_line_on_voc(saved_model, voc):
    result = ranks_agree("eval", "masks", saved_model, "--data", voc)
    assert result["images"] == {"images": 6, "objects": 12, "images without an object": 0}
    assert 0 < result["figures"]["voc_jaccard_mean_head"] < result["figures"]["voc_jaccard_best_head"] < 100
    assert "hold 60 % of a head's last-block attention, shorter side 68 pixels" in result["protocol"]


def test_folder_pair_and_means_over_objects_then_images(model, tmp_path):
    """With all the mass kept a mask is the whole image, so that an object's figure is its share of the pixels."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    shares = []
    for i, size in enumerate([(40, 56), (64, 40), (48, 48)]):
        _, indices = blob(np.random.default_rng(i), *size)
        Image.new("RGB", size[::-1]).save(tmp_path / "images" / f"{i}.jpg")
        if i:
            save_palette(indices, tmp_path / "masks" / f"{i}.png")
            shares.append(np.mean([(indices == k).mean() for k in (1, 2)]))
        else:
            Image.fromarray((indices == 1).astype(np.uint8) * 255).save(tmp_path / "masks" / f"{i}.png")
            shares.append((indices == 1).mean())
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "none.jpg")
    Image.new("L", (40, 40)).save(tmp_path / "masks" / "none.png")
    pair = {"images": str(tmp_path / "images"), "masks": str(tmp_path / "masks")}
    found = masks.evaluate(model, MasksOptions(model="", size=40, mass=1.0, **pair), CPU)
    assert found.counts == {"images": 3, "objects": 5, "images without an object": 1}
    expected = 100 * np.mean(shares)
    assert found.figures == pytest.approx({"jaccard_best_head": expected, "jaccard_mean_head": expected}, rel=0.04)
    for i in range(3):
        (tmp_path / "images" / f"{i}.jpg").unlink()
    with pytest.raises(ValueError, match="none of the 1 masks holds an object"):
        masks.evaluate(model, MasksOptions(model="", **pair), CPU)


def test_agrees_with_the_training_monitor_on_drawn_scenes(model, tmp_path):
    scenes = Scenes(6)
    large = scenes.at(64)
    for i in range(6):
        for kind, pixels in (("images", large.read(i)), ("masks", large.mask(i).astype(np.uint8) * 255)):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / kind / f"{i}.png")
    pair = {"images": str(tmp_path / "images"), "masks": str(tmp_path / "masks")}
    found = masks.evaluate(model, MasksOptions(model="", size=64, **pair), CPU).figures
    monitored = measure_scene_masks(model, scenes, 32, CPU)
    assert found == pytest.approx({name: monitored[name] for name in found}, rel=1e-5)


@pytest.mark.parametrize(("values", "objects"), [((0, 1), 1), ((0, 255), 1), ((0, 200, 60), 1), ((0, 0), 0)])
def test_gray_masks(tmp_path, values, objects):
    Image.fromarray(np.array([values], np.uint8)).save(tmp_path / "m.png")
    assert masks.read_objects(tmp_path / "m.png").sum() == objects


def test_gray_numbers_are_no_mask(tmp_path):
    Image.fromarray(np.array([[0, 1, 2]], np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(BadImage, match="values up to 2; write objects as 255"):
        masks.read_objects(tmp_path / "m.png")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_photograph_is_no_mask(tmp_path, mode):
    """Else images and masks that were exchanged would give figures."""
    Image.fromarray(Scenes(1).at(64).read(0)).convert(mode).save(tmp_path / "m.jpg")
    with pytest.raises(BadImage, match="a picture, not black and white; exchange"):
        masks.read_objects(tmp_path / "m.jpg")
    Image.fromarray(Scenes(1).at(64).mask(0).astype(np.uint8) * 255).convert("RGB").save(tmp_path / "m.jpg")
    assert 0 < masks.read_objects(tmp_path / "m.jpg").mean() < 1


def test_bad_input_is_refused(saved_model, voc, tmp_path, capsys):
    def said(*arguments) -> str:
        assert main(["eval", "masks", str(saved_model), *map(str, arguments)]) == 2
        return capsys.readouterr().err

    with pytest.raises(ValueError, match="either --data with the VOC folder, or --images and --masks"):
        MasksOptions(model="", images="photos")
    with pytest.raises(ValueError, match=r"mass is 1\.5"):
        MasksOptions(model="", data="voc", mass=1.5)
    assert "smaller than one patch of 8" in said("--data", voc, "--size", 7)
    assert "not laid out as PASCAL VOC; expected are DATA/JPEGImages/NAME.jpg" in said("--data", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no files" in said("--images", voc / "JPEGImages", "--masks", tmp_path / "empty")
    (voc / "SegmentationObject" / "0.png").unlink()
    pair = said("--images", voc / "JPEGImages", "--masks", voc / "SegmentationObject")
    assert "1 of the 7 images of" in pair
    assert "have no mask of their name" in pair
    Image.new("L", (9, 9)).save(voc / "SegmentationObject" / "3.png")
    (voc / "JPEGImages" / "5.jpg").write_bytes(b"")
    assert (
        "2 of the 6 images cannot be used, first 3.jpg (its mask is 9 x 9 pixels and the image 53 x 43; make them agree)"
        in said("--data", voc)
    )
    (voc / "SegmentationObject" / "3.png").write_bytes(b"")
    assert "first 3.jpg (its mask 3.png cannot be read" in said("--data", voc)
    (voc / "SegmentationObject" / "3.png").unlink()
    assert "1 of the 6 files that" in said("--data", voc)
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("")
    assert "val.txt names no image" in said("--data", voc)


def test_a_model_without_attention_is_refused(voc):
    with pytest.raises(ValueError, match="no attention maps"):
        masks.evaluate(dino.create("timm:resnet18"), MasksOptions(model="", data=str(voc)), CPU)
