"""Images in Parquet files and in data sets of Hugging Face: the same images and labels, whoever wrote the table."""

from __future__ import annotations

import shutil

import datasets
import numpy as np
import pandas
import pytest

import dino
from dino import cli
from dino.data.open import open_images, open_labeled_pair
from dino.data.specs import get_name
from helpers import TINY, assert_same_bits, draw_images, final_state, pack_images
from hub import Hub
from object_store import ObjectStore


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache/downloads")


@pytest.fixture
def folder(tmp_path):
    return draw_images(tmp_path / "images")


def rows_of(folder, column="image", **more):
    """What a user would write: the bytes of each file, and its class as a word."""
    files = sorted(folder.glob("*/*"))
    frame = {column: [file.read_bytes() for file in files], "label": [file.parent.name for file in files]}
    return pandas.DataFrame(frame | {name: [value] * len(files) for name, value in more.items()})


def check_same(found, folder):
    files = open_images(folder)
    assert len(found) == len(files)
    assert found.classes == files.classes
    np.testing.assert_array_equal(found.labels, files.labels)
    for i in (0, 9, 23):
        np.testing.assert_array_equal(found.read(i), files.read(i))


def test_a_folder_of_parquet(folder, tmp_path):
    frame = rows_of(folder, caption="x")
    (tmp_path / "tables").mkdir()
    for i in range(3):
        frame[8 * i : 8 * (i + 1)].to_parquet(tmp_path / f"tables/{i}.parquet", row_group_size=3)
    check_same(open_images(tmp_path / "tables"), folder)
    check_same(open_images(tmp_path / "tables/*.parquet"), folder)
    assert len(open_images(tmp_path / "tables/1.parquet")) == 8


def test_columns_of_images_and_paths(folder, tmp_path):
    frame = rows_of(folder, column="jpg")
    frame.to_parquet(tmp_path / "bytes.parquet")
    check_same(open_images(tmp_path / "bytes.parquet"), folder)
    files = sorted(folder.glob("*/*"))
    pandas.DataFrame(
        {"path": [f"images/{f.relative_to(folder)}" for f in files], "class": [f.parent.name for f in files]}
    ).to_parquet(tmp_path / "paths.parquet")
    check_same(open_images(tmp_path / "paths.parquet"), folder)
    files[3].unlink()
    with pytest.raises(dino.data.decode.BadImage, match="cannot be read"):
        open_images(tmp_path / "paths.parquet").read(3)


def test_what_hugging_face_saves(folder, tmp_path):
    whole = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    whole.save_to_disk(tmp_path / "one")
    check_same(open_images(tmp_path / "one"), folder)
    datasets.DatasetDict(train=whole, test=whole.select(range(6))).save_to_disk(tmp_path / "two")
    train, test = open_labeled_pair(tmp_path / "two", None)
    assert (len(train), len(test)) == (24, 6)
    whole.to_parquet(tmp_path / "hf/train-00000-of-00001.parquet")
    whole.select(range(6)).to_parquet(tmp_path / "hf/test-00000-of-00001.parquet")
    train, test = open_labeled_pair(tmp_path / "hf", None)
    assert (len(train), len(test)) == (24, 6)
    assert train.classes == ("class0", "class1", "class2")
    assert train.name(0) == "row 0 (000.jpg)"


def test_a_run_from_a_table_is_the_run_from_the_folder(folder, tmp_path):
    rows_of(folder).to_parquet(tmp_path / "images.parquet")
    for name, data in (("files", folder), ("table", tmp_path / "images.parquet")):
        dino.train(data=data, out=tmp_path / name, **TINY | {"epochs": 1, "data.num_workers": 2 * (name == "table")})
    assert_same_bits(final_state(tmp_path / "files"), final_state(tmp_path / "table"))


def test_unlabeled(folder, tmp_path):
    rows_of(folder).drop(columns="label").to_parquet(tmp_path / "images.parquet")
    assert open_images(tmp_path / "images.parquet").classes == ()


def test_parquet_in_a_bucket(folder, tmp_path, monkeypatch):
    (tmp_path / "tables").mkdir()
    rows_of(folder).to_parquet(tmp_path / "tables/images.parquet")
    with ObjectStore() as store:
        store.use_here(monkeypatch, tmp_path / "home")
        address = store.upload(tmp_path / "tables", "bucket/tables")
        check_same(open_images(address), folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub(tmp_path / "hub") as hub:
        hub.use_here(monkeypatch, tmp_path / "home")
        yield hub


@pytest.mark.parametrize("kind", ["tables", "tars", "files"])
def test_data_sets_of_the_hub(folder, hub, tmp_path, kind):
    place = hub.root / "datasets/org/photos"
    (place / "data").mkdir(parents=True)
    (place / "README.md").write_text("Photographs")
    if kind == "tables":
        rows_of(folder)[:20].to_parquet(place / "data/train-0.parquet")
        rows_of(folder)[20:].to_parquet(place / "data/test-0.parquet")
        train, test = open_labeled_pair("hf://datasets/org/photos", None)
        assert (len(train), len(test)) == (20, 4)
    elif kind == "tars":
        pack_images(folder, place / "data")
        check_same(open_images("hf://datasets/org/photos@main"), folder)
    else:
        shutil.copytree(folder, place, dirs_exist_ok=True)
        (place / "data").rmdir()
        check_same(open_images("hf://datasets/org/photos"), folder)
    assert get_name("hf://datasets/org/photos@main") == "photos"


def test_a_data_set_that_is_not_there(hub, tmp_path, capsys):
    assert cli.main(["train", "--data", "hf://datasets/org/nosuch", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert f"there is no repository datasets/org/nosuch that you may read at {hub.endpoint}/datasets/org/nosuch" in said


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        (
            "a.parquet",
            lambda path: pandas.DataFrame({"x": [1], "y": [2]}).to_parquet(path),
            "no column of images (its columns are x, y)",
        ),
        ("a.parquet", lambda path: path.write_bytes(b"PAR1 broken"), "cannot be read as a table"),
        ("a.parquet", lambda path: None, "cannot be read as a table"),
    ],
)
def test_bad_tables(tmp_path, name, write, said, capsys):
    write(tmp_path / name)
    assert cli.main(["train", "--data", str(tmp_path / name), "--out", str(tmp_path / "run")]) == 2
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text


def test_another_table_of_as_many_rows_is_another(folder, tmp_path):
    """Unlabeled rows have no names: their content tells tables apart."""
    frame = rows_of(folder).drop(columns="label")
    frame.to_parquet(tmp_path / "a.parquet")
    frame[::-1].to_parquet(tmp_path / "b.parquet")
    frame.to_parquet(tmp_path / "again.parquet")
    a, b, again = (open_images(tmp_path / f"{name}.parquet") for name in ("a", "b", "again"))
    assert a.fingerprint != b.fingerprint
    assert a.fingerprint == again.fingerprint
