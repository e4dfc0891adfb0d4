"""Classes of pixels by patch features: the measure against scikit-learn, drawn textures of known classes, and masks that
cannot be used."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score

import dino
from dino.cli import main
from dino.data.image_files import open_source
from dino.data.scenes import Scenes
from dino.engine.log import read_metrics
from dino.eval import segment
from dino.features import neighbors
from dino.options.evaluate import SegmentOptions
from helpers import TINY, ranks_agree


def draw_textures(folder: Path, count: int = 8, size: tuple[int, int] = (40, 56)) -> dict[str, str]:
    """Images of three textures with the same mean color in a grid of patches of 8, and masks of their numbers 0, 3, 7."""
    stripes = np.tile(np.repeat(np.array([[0, 200]], np.uint8), 2, axis=1), (8, 2))
    textures = np.stack([np.full((8, 8), 100, np.uint8), stripes, stripes.T])
    rng = np.random.default_rng(0)
    for i in range(count):
        kinds = rng.integers(0, 3, (size[0] // 8, size[1] // 8))
        pixels = textures[kinds].swapaxes(1, 2).reshape(size)
        for kind, values in (("images", pixels), ("masks", np.kron(np.array([0, 3, 7])[kinds], np.ones((8, 8))))):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(folder / kind / f"{i}.png")
    return {"images": str(folder / "images"), "masks": str(folder / "masks")}


def lay_out_voc(folder: Path) -> Path:
    drawn = draw_textures(folder / "drawn", 6)
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    (folder / "JPEGImages").mkdir()
    for i in range(6):
        Image.open(Path(drawn["images"], f"{i}.png")).save(folder / "JPEGImages" / f"{i}.jpg", quality=100)
    shutil.copytree(drawn["masks"], folder / "SegmentationClass")
    for part, names in (("train", "0123"), ("val", "45")):
        (folder / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names))
    return folder


def save_mask(values: np.ndarray, path: Path) -> None:
    Image.fromarray(values).save(path)


def test_iou_over_all_images_equals_scikit_learns():
    rng = np.random.default_rng(0)
    truths = [rng.choice([0, 1, 2, 9, 255], (30, 20 + i)).astype(np.uint8) for i in range(4)]
    guesses = [rng.choice([0, 1, 2, 5, 9], truth.shape) for truth in truths]
    counts = sum(segment.count_pixels(*pair) for pair in zip(guesses, truths, strict=True))
    truth, guess = (np.concatenate([each.ravel() for each in all_]) for all_ in (truths, guesses))
    truth, guess = truth[truth != 255], guess[truth != 255]
    expected = 100 * jaccard_score(truth, guess, labels=[0, 1, 2, 9], average=None)
    assert segment.compute_ious(counts) == pytest.approx(dict(zip([0, 1, 2, 9], expected, strict=True)))


def test_iou_by_hand():
    truth = np.array([[0, 0, 1], [1, 255, 4]], np.uint8)
    counts = segment.count_pixels(np.array([[0, 1, 1], [7, 0, 4]]), truth)  # 7 is nowhere, and is no class of the mean
    assert segment.compute_ious(counts) == pytest.approx({0: 50, 1: 100 / 3, 4: 100})


def test_a_patch_has_the_most_frequent_class_of_its_pixels():
    rng = np.random.default_rng(0)
    classes = rng.choice([0, 2, 254, 255], (11, 17)).astype(np.uint8)
    classes[:4, :6] = 255
    found = segment.label_patches(classes, (3, 4)).reshape(3, 4)
    for row in range(3):
        for column in range(4):
            here = [classes[y, x] for y in range(11) for x in range(17) if (y * 3 // 11, x * 4 // 17) == (row, column)]
            known = np.bincount([value for value in here if value != 255], minlength=1)
            assert found[row, column] == (known.argmax() if known.any() else 255)


@pytest.mark.parametrize("most", [2**26, 700])
def test_scores_are_enlarged_bilinearly(monkeypatch, most):
    """Also a few classes at a time."""
    monkeypatch.setattr(neighbors, "MOST_NUMBERS", most)
    scores = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(scores.T.reshape(1, 5, 3, 4), (13, 22), mode="bilinear")[0].argmax(dim=0)
    assert torch.equal(segment.enlarge_to_classes(scores, (3, 4), (13, 22)), expected)


def test_linear_layer_is_scikit_learns_logistic_regression():
    rng = np.random.default_rng(0)
    bank, labels = rng.normal(3, 2, (300, 6)).astype(np.float32), rng.integers(0, 3, 300)
    bank[:, :3] += np.eye(3)[labels]
    classify = segment.build_linear(torch.from_numpy(bank), torch.from_numpy(labels), 3, 0.05)
    x = np.pad((bank - bank.mean(0)) / bank.std(0), ((0, 0), (0, 1)), constant_values=1)
    theirs = LogisticRegression(C=0.05, fit_intercept=False, tol=1e-8, max_iter=1000).fit(x, labels)
    found = classify(torch.from_numpy(bank)).softmax(dim=1)
    np.testing.assert_allclose(found, theirs.predict_proba(x), atol=1e-3)


def test_command_line_tells_textures_apart_that_colors_cannot(saved_model, tmp_path):
    pair = draw_textures(tmp_path, 20)
    flags = ["--images", pair["images"], "--masks", pair["masks"], "--size", 40, "--patches", 500]
    result = ranks_agree("eval", "segment", saved_model, *flags)
    assert result["images"] == {"training images": 18, "training patches": 18 * 27, "test images": 2}
    figures = result["figures"]
    assert min(figures[f"{name}_{kind}"] for name in ("knn", "linear") for kind in ("miou", "pixel_accuracy")) > 80
    assert figures["colors_miou"] < 50
    assert result["iou"].keys() == {"knn", "linear", "colors", "majority"}
    assert result["iou"]["knn"].keys() == {"0", "3", "7"}
    assert figures["knn_miou"] == pytest.approx(np.mean([*result["iou"]["knn"].values()]))
    tested = [segment.read_mask(segment.open_parts(SegmentOptions(model="", **pair))[1].masks, i) for i in range(2)]
    shares = sorted(100 * np.mean(np.array(tested) == value) for value in (0, 3, 7))
    assert figures["majority_pixel_accuracy"] in [pytest.approx(share) for share in shares]
    assert figures["majority_miou"] == pytest.approx(figures["majority_pixel_accuracy"] / 3)


def test_colors_alone_are_enough_where_classes_are_colors(saved_model, tmp_path):
    """Dark and bright of one hue too; regions end where patches do, so that every pixel is right."""
    palette, rng = np.array([[30, 0, 0], [240, 0, 0], [0, 90, 250]], np.uint8), np.random.default_rng(0)
    for i in range(9):
        kinds = np.kron(rng.integers(0, 3, (1, 2)), np.ones((32, 24), int))
        for kind, values in (("images", palette[kinds]), ("masks", kinds.astype(np.uint8))):
            (tmp_path / kind).mkdir(exist_ok=True)
            save_mask(values, tmp_path / kind / f"{i}.png")
    pair = {"images": tmp_path / "images", "masks": tmp_path / "masks"}
    found = dino.evaluate("segment", saved_model, size=32, **pair).figures
    assert found["colors_miou"] == found["colors_pixel_accuracy"] == 100 > found["majority_miou"]


def test_layouts_and_what_is_held_out(saved_model, tmp_path):
    pair = draw_textures(tmp_path / "pair", 20)
    train, test = segment.open_parts(SegmentOptions(model="", **pair))
    names = [[part.images.name(i) for i in range(len(part.images))] for part in (train, test)]
    assert [[part.masks.name(i) for i in range(len(part.masks))] for part in (train, test)] == names
    assert sorted(names[0] + names[1]) == sorted(f"{i}.png" for i in range(20))
    other = draw_textures(tmp_path / "other", 3)
    given = SegmentOptions(model="", **pair, val_images=other["images"], val_masks=other["masks"])
    assert [len(part.images) for part in segment.open_parts(given)] == [20, 3]
    voc = dino.evaluate("segment", saved_model, data=lay_out_voc(tmp_path / "voc"), size=40)
    assert voc.counts == {"training images": 4, "training patches": 4 * 35, "test images": 2}
    assert voc.figures["knn_miou"] > 80


def test_black_and_white_masks_and_unknown_pixels(saved_model, tmp_path, capsys):
    """255 is the object where there is nothing else; otherwise it is unknown, and what is drawn there counts nowhere."""
    pair = draw_textures(tmp_path)
    numbered = dino.evaluate("segment", saved_model, size=40, **pair)
    for i in range(8):
        path = Path(pair["masks"], f"{i}.png")
        values = np.array(Image.open(path))
        save_mask(np.where(values == 7, 255, values), path)
    found = dino.evaluate("segment", saved_model, size=40, **pair)
    assert found.details["iou"]["knn"].keys() == {0, 3}
    assert found.counts["training patches"] < numbered.counts["training patches"]
    for i in range(8):
        path = Path(pair["masks"], f"{i}.png")
        save_mask(np.where(np.array(Image.open(path)) == 0, 0, 255).astype(np.uint8), path)
    assert "255 is the object" not in capsys.readouterr().err
    found = dino.evaluate("segment", saved_model, size=40, **pair)
    assert "255 is the object" in capsys.readouterr().err
    assert found.details["iou"]["knn"].keys() == {0, 1}
    assert found.figures["knn_miou"] > 90


def test_a_convnet_and_the_seed(tmp_path):
    pair = draw_textures(tmp_path, 8, (64, 96))
    torch.manual_seed(0)
    model = dino.create("resnet_nano", image_size=64).eval()
    first, again, other = (
        dino.evaluate("segment", model, size=64, patches=60, seed=seed, **pair).figures for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first["linear_miou"] > first["majority_miou"]


def test_it_measures_a_model_in_training(tmp_path):
    pair = draw_textures(tmp_path)
    text = f"segment --images {pair['images']} --masks {pair['masks']} --size 40"
    options = TINY | {"epochs": 1, "log.evaluate": (text,)}
    run = dino.train(data=pair["images"], out=str(tmp_path / "run"), **options)
    measured = [row for row in read_metrics(run / "metrics.jsonl") if "segment/knn_miou" in row]
    assert len(measured) == 2
    options["log.evaluate"] = (f"{text} --val-images {pair['images']} --val-masks gone",)
    with pytest.raises(ValueError, match="val_masks is gone, which does not exist"):
        dino.train(data=pair["images"], out=str(tmp_path / "other"), **options)


PHOTOGRAPH = Scenes(1).at(56).read(0)[:40] + np.random.default_rng(0).integers(0, 20, (40, 56, 3), np.uint8)
BAD_MASKS = {
    "a photograph": (
        PHOTOGRAPH,
        "first 2.png (its mask 2.png is a picture of 3 channels; write the class of each pixel",
    ),
    "a gray photograph": (PHOTOGRAPH[..., 1], "its mask 2.png is a photograph, whose neighboring pixels mostly differ"),
    "depths": (np.full((40, 56), 900, np.uint16), "its mask 2.png holds values from 900 to 900"),
    "another size": (np.zeros((40, 50), np.uint8), "first 2.png (its mask is 50 x 40 pixels and the image 56 x 40"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_a_mask_that_holds_no_classes(saved_model, tmp_path, capsys, case):
    pair = draw_textures(tmp_path)
    save_mask(BAD_MASKS[case][0], Path(pair["masks"], "2.png"))
    assert main(["eval", "segment", str(saved_model), "--images", pair["images"], "--masks", pair["masks"]]) == 2
    said = capsys.readouterr().err
    assert BAD_MASKS[case][1] in said
    assert "1 of the " in said


def test_bad_input_is_refused(saved_model, tmp_path, capsys):
    pair = draw_textures(tmp_path)
    flags = ["--images", pair["images"], "--masks", pair["masks"]]
    masks = Path(pair["masks"])

    def said(*arguments) -> str:
        assert main(["eval", "segment", str(saved_model), *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "give either --data with the VOC folder, or --images and --masks" in said("--images", "photos")
    assert "give --val-images and --val-masks both or not at all" in said(*flags, "--val-images", "v")
    assert "only beside --images and --masks" in said("--data", "v", "--val-images", "v", "--val-masks", "v")
    assert "DATA/SegmentationClass/NAME.png and DATA/ImageSets/Segmentation/train.txt" in said("--data", tmp_path)
    assert "smaller than one patch of 8" in said(*flags, "--size", 7)
    assert "k is 0; it must be at least 1" in said(*flags, "--k", 0)
    Image.fromarray(PHOTOGRAPH).save(masks / "2.jpg")
    (masks / "2.png").rename(tmp_path / "kept.png")
    assert "its mask 2.jpg cannot be read as PNG, BMP, GIF or TIFF (UnidentifiedImageError); write" in said(*flags)
    (masks / "2.jpg").unlink()
    assert "1 of the 8 images of" in said(*flags)
    (tmp_path / "kept.png").rename(masks / "2.png")
    Path(pair["images"], "3.png").write_bytes(b"")
    assert "1 of the " in (broken := said(*flags))
    assert "first 3.png (empty file)" in broken
    shutil.copy(Path(pair["images"], "4.png"), Path(pair["images"], "3.png"))
    for i in range(8):
        save_mask(np.full((40, 56), 5, np.uint8), masks / f"{i}.png")
    assert "the training masks hold the classes [5] and the test masks [5] (255 is unknown); two classes to" in said(
        *flags
    )
    for i in range(4, 8):
        Path(pair["images"], f"{i}.png").unlink()
    assert "4 images are too few to set some aside; give --val-images and --val-masks" in said(*flags)


def test_classes_that_no_training_mask_holds_count_as_missed(saved_model, tmp_path, capsys):
    pair, other = draw_textures(tmp_path / "a"), draw_textures(tmp_path / "b", 2)
    save_mask(np.full((40, 56), 9, np.uint8), Path(other["masks"], "1.png"))
    given = {"val_images": other["images"], "val_masks": other["masks"]}
    found = dino.evaluate("segment", saved_model, size=40, **pair, **given).details["iou"]["knn"]
    assert "No training mask holds these classes of the test masks, so their IoU is 0: 9." in capsys.readouterr().err
    assert found.keys() == {0, 3, 7, 9}
    assert found[9] == 0


def test_masks_of_one_bit_and_of_a_palette(tmp_path):
    values = np.array([[0, 1], [1, 0]], np.uint8)
    Image.fromarray(values.astype(bool)).save(tmp_path / "bit.png")
    palette = Image.fromarray(values * 200, "L")
    palette.putpalette([0, 0, 9] * 256)
    palette.save(tmp_path / "palette.png")
    source = open_source(tmp_path, "none")
    assert segment.read_mask(source, 0).tolist() == values.tolist()
    assert segment.read_mask(source, 1).tolist() == (values * 200).tolist()
