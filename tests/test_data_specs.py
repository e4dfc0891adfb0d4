"""What `--data` may be: one grammar for training, evaluations, embeddings, figures and the explorer."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from torchvision.datasets import CIFAR10

import dino
from dino.cli import main
from dino.data import open as data
from dino.data import specs
from dino.features.embedding import Folder
from dino.options import replace, toml
from dino.options.train import TrainOptions
from drawing import draw_images
from helpers import TINY


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> Path:
    """A folder with a CIFAR-10 of 40 training and 20 test images, as torchvision stores it."""
    folder = tmp_path / "sets" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (("data_batch_1", 40), ("test_batch", 20)):
        labels = [i % 4 for i in range(count)]
        pixels = rng.integers(0, 60, (count, 3072)) + 45 * np.array(labels)[:, None]
        (folder / name).write_bytes(pickle.dumps({"data": pixels.astype(np.uint8), "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "deer", "dog", "frog"]}))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    return folder.parent


def test_a_set_of_torchvisions_goes_through_every_command(cifar, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = "torchvision:CIFAR10:sets"
    run = dino.train(replace(TrainOptions(), TINY | {"stop_after": 3}), data=spec)
    assert run == Path("runs/CIFAR10")
    recorded = toml.read_recorded(str(run))
    assert recorded.data.path == f"torchvision:CIFAR10:{cifar}"
    train, test = data.open_training_pair(recorded, run)
    assert test is not None
    assert (len(train), len(test)) == (40, 20)  # the test images are held out, not a share of the others

    assert main(["eval", "knn", str(run), "--data", spec, "--k", "10"]) == 0
    assert json.loads((run / "eval" / "knn.json").read_text())["images"] == {"images in the bank": 40, "classified": 20}
    assert dino.embed(str(run), spec, "x.parquet", device="cpu").rows == 40
    monkeypatch.chdir("/")  # what was recorded means the same from another working directory
    assert len(Folder.open(tmp_path / "x.parquet").images()) == 40
    drawn = tmp_path / "map.png"
    assert main(["figure", "tsne", str(tmp_path / run), "--data", recorded.data.path, "--out", str(drawn)]) == 0
    assert drawn.exists()
    assert main(["train", "--resume", str(tmp_path / run), "--stop-after", "5"]) == 0
    assert (tmp_path / run / "checkpoints" / "latest").read_text() == "step-00000005.pt"


def test_the_explorer_finds_the_data_of_a_run(cifar, tmp_path):
    pytest.importorskip("gradio")
    from dino.app.page import find_data

    for spec, there in (
        (f"torchvision:CIFAR10:{cifar}", True),
        (f"torchvision:CIFAR10:{tmp_path}/gone", False),
        ("scenes:50", True),
        (str(cifar), True),
        (f"{tmp_path}/gone", False),
    ):
        (tmp_path / "config.toml").write_text(tomli_w.dumps(toml.to_dict(replace(TrainOptions(), {"data.path": spec}))))
        assert find_data(tmp_path) == (spec if there else None)
    assert find_data(None) is None


def test_held_out_images_may_be_given_for_any_training_images(cifar, photos):
    def held_out(path: str, val: str | None) -> int:
        options = replace(TrainOptions(), {"data.path": path, "data.val": val, "data.labels": "none"})
        return len(data.open_training_pair(options, None)[1] or ())

    spec = f"torchvision:CIFAR10:{cifar}"
    assert held_out(str(photos), spec) == 20  # its test images
    assert held_out("scenes:30", None) == 500
    assert held_out(str(photos), None) == 2
    with pytest.raises(ValueError, match="differ in their classes"):
        data.open_labeled_pair(spec, str(photos))
    assert [len(part) for part in data.open_labeled_pair("scenes:30", "scenes:9")] == [30, 500]


def test_the_fingerprint_of_a_set_does_not_depend_on_how_its_folder_is_written(cifar, monkeypatch):
    monkeypatch.chdir(cifar.parent)
    found = {
        data.open_images(f"torchvision:CIFAR10:{root}").fingerprint for root in (cifar, "sets", "./sets/", ".//sets")
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    ("spec", "name", "path"),
    [
        ("scenes", "scenes", None),
        ("scenes:64", "scenes", None),
        ("torchvision:CIFAR10:some/folder:1", "CIFAR10", Path("some/folder:1")),
        ("torchvision", "torchvision", None),
        ("photos/cats/", "cats", Path("photos/cats")),
        ("cats.csv", "cats", Path("cats.csv")),
        ("/", "run", Path("/")),
    ],
)
def test_parts_of_a_spec(spec, name, path):
    assert specs.get_name(spec) == name
    assert specs.find_path(spec) == path


def test_what_a_spec_means_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "scenes").mkdir()
    assert specs.make_absolute("photos") == str(tmp_path / "photos")
    assert specs.make_absolute("torchvision:ImageNet:photos") == f"torchvision:ImageNet:{tmp_path}/photos"
    for spec in ("scenes", "scenes:5", "gone", "torchvision:ImageNet:gone", "~/photos"):
        assert specs.make_absolute(spec) == spec


def test_training_takes_a_folder_of_train_and_val_as_evaluations_do(tmp_path):
    draw_images(tmp_path / "data/train", 9)
    draw_images(tmp_path / "data/val", 6)
    options = replace(TrainOptions(), {"data.path": str(tmp_path / "data")})
    train, held_out = data.open_training_pair(options, None)
    assert held_out is not None
    assert (len(train), len(held_out)) == (9, 6)
    assert train.classes == held_out.classes == ("class0", "class1", "class2")


@pytest.mark.parametrize("test", ["valid", "validation", "Test"])
def test_folders_of_training_and_test_images_are_found_by_their_usual_names(tmp_path, capsys, test):
    root = tmp_path / f"data {test}"
    draw_images(root / "Training", 30)
    draw_images(root / test, 6)
    draw_images(root / "extra", 3)
    train, held_out = data.open_training_pair(replace(TrainOptions(), {"data.path": str(root)}), None)
    assert held_out is not None
    assert (len(train), len(held_out)) == (30, 6)
    said = f"{root}: training images are in Training/, test images in {test}/; not used: extra/.\n"
    assert capsys.readouterr().err == said
    train, held_out = data.open_labeled_pair(root, None)
    assert (len(train), len(held_out)) == (30, 6)
    assert specs.split_folders(str(root), "other") == (str(root), "other")
    assert specs.split_folders(root / "Training", None) == (str(root / "Training"), None)


def test_a_test_folder_without_classes_measures_nothing(tmp_path, capsys):
    """As competitions publish them: images of training are held out in its place."""
    draw_images(tmp_path / "train", 30)
    draw_images(tmp_path / "test/unknown", 6, classes=1)
    train, held_out = data.open_training_pair(replace(TrainOptions(), {"data.path": str(tmp_path)}), None)
    assert held_out is not None
    assert (len(train), len(held_out), len(held_out.classes)) == (27, 3, 3)
    assert "has no class folders" in capsys.readouterr().err


def test_the_folders_of_images_without_classes_are_named(tmp_path, capsys):
    draw_images(tmp_path, 4)
    draw_images(tmp_path / "attention", 2, classes=1)
    for path in tmp_path.glob("class?/*"):
        path.rename(tmp_path / path.name)
    data.open_training_pair(replace(TrainOptions(), {"data.path": str(tmp_path)}), None)
    said = capsys.readouterr().err
    assert said == f"{tmp_path}: the images come from the folder itself (4), attention/ (2).\n"


def test_paths_are_taken_as_text_is(tmp_path):
    folder = draw_images(tmp_path / "photos", 30)
    assert len(data.open_images(folder)) == 30
    assert specs.get_name(folder) == "photos"
    assert specs.make_absolute(folder) == str(folder)
    assert specs.find_path(folder) == folder
    assert specs.split_folders(folder, folder) == (str(folder), str(folder))
    assert len(data.open_labeled_test(folder)) == 30
    assert len([*data.expand_images([folder])]) == 30
    assert dino.embed(dino.create("vit_nano", patch_size=8, image_size=32), folder, tmp_path / "out").rows == 30


def test_a_home_folder_is_found_wherever_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    draw_images(tmp_path / "data/train", 30)
    draw_images(tmp_path / "data/val", 6)
    train, test = data.open_labeled_pair("~/data", None)
    assert (len(train), len(test)) == (30, 6)
    assert specs.make_absolute("~/data") == str(tmp_path / "data")
    assert specs.find_path("~/data") == tmp_path / "data"
    assert specs.find_path("~nobody-of-this-name/data") == Path("~nobody-of-this-name/data")


@pytest.mark.parametrize("evaluation", ["masks", "segment", "copydetect", "retrieval", "davis"])
def test_evaluations_with_folders_of_their_own_know_the_home_folder(
    tmp_path, monkeypatch, saved_model, evaluation, capsys
):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["eval", evaluation, str(saved_model), "--data=~/set", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert f"--data {tmp_path}/set" in said or f"'{tmp_path}' exists, so check" in said


def test_an_unknown_kind_of_data_is_named_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no kind of data 'torchvison'; known are .*Did you mean 'torchvision'\?"):
        data.open_images("torchvison:CIFAR10:cifar")
