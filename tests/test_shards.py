"""Images in tar files: the same images, labels and run as from a folder, whatever wrote the tar files."""

from __future__ import annotations

import gc
import gzip
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
import webdataset

import dino
from dino import cli, weights
from dino.data import index
from dino.data.open import open_images, open_labeled_pair
from dino.data.shards import find_shards
from dino.data.specs import get_name, make_absolute
from helpers import (
    TINY,
    add_member,
    assert_same_bits,
    draw_images,
    final_state,
    pack_images,
    ranks_agree,
    run_dino,
    tiny_flags,
)


@pytest.fixture
def folder(tmp_path):
    return draw_images(tmp_path / "images")


def said_by(*arguments: object, capsys) -> str:
    assert cli.main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_a_run_from_shards_is_the_run_from_the_folder(folder, tmp_path):
    shards = pack_images(folder, tmp_path / "shards")
    for name, data in (("files", folder), ("tars", shards)):
        dino.train(data=str(data), out=str(tmp_path / name), **TINY | {"epochs": 1})
    assert_same_bits(final_state(tmp_path / "files"), final_state(tmp_path / "tars"))


def test_images_names_and_labels_are_those_of_the_folder(folder, tmp_path):
    files, shards = open_images(folder), open_images(pack_images(folder, tmp_path / "shards"))
    assert len(shards) == len(files) == 24
    assert shards.classes == files.classes == ("class0", "class1", "class2")
    np.testing.assert_array_equal(shards.labels, files.labels)
    for i in range(24):
        assert shards.name(i) == f"{i // 8:04d}.tar/{files.name(i)}"
        np.testing.assert_array_equal(shards.read(i), files.read(i))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves files open
def test_the_same_images_as_webdataset_reads(folder, tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=10, verbose=0) as writer:
        for i, file in enumerate(sorted(folder.glob("*/*"))):
            writer.write({"__key__": f"{i:05d}", "jpg": file.read_bytes(), "cls": i % 7, "json": {"label": "other"}})
    shutil.rmtree(folder)
    ours = open_images(tmp_path)
    theirs = [*webdataset.WebDataset([str(p) for p in sorted(tmp_path.glob("*.tar"))], shardshuffle=False)]
    assert len(ours) == len(theirs) == 24
    assert [ours.read_bytes(i) for i in range(24)] == [sample["jpg"] for sample in theirs]
    assert [ours.classes[label].encode() for label in ours.labels] == [sample["cls"] for sample in theirs]
    del theirs
    gc.collect()


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ({"cls": "CLASS"}, ("class0", "class1", "class2")),
        ({"json": '{"url": "x", "label": "CLASS"}'}, ("class0", "class1", "class2")),
        ({"txt": "CLASS\n", "json": "[1]"}, ("class0", "class1", "class2")),
        ({"txt": "x" * 101}, ("class0", "class1", "class2")),  # of the folders, as nothing else is a label
        ({"txt": "the same text"}, ()),
        ({"json": "{", "cls": ""}, ("class0", "class1", "class2")),
    ],
)
def test_labels(folder, tmp_path, labels, classes):
    shards = open_images(pack_images(folder, tmp_path / "shards", **labels))
    assert shards.classes == classes
    assert (shards.labels is None) == (not classes)


def test_numbers_are_sorted_by_value_and_some_labels_are_unknown(folder, tmp_path):
    (tmp_path / "shards").mkdir()
    content = (folder / "class0/000.jpg").read_bytes()
    with tarfile.open(tmp_path / "shards/a.tar", "w") as tar:
        for i, label in enumerate([10, 9, 9, 10, None]):
            add_member(tar, f"{i}.jpg", content)
            if label is not None:
                add_member(tar, f"{i}.cls", str(label).encode())
    shards = open_images(tmp_path / "shards")
    assert shards.classes == ("9", "10")
    assert shards.labels.tolist() == [1, 0, 0, 1, -1]


def test_what_is_an_image(folder, tmp_path):
    """Hidden files and masks are none; what has a dot in its name is."""
    content, path = (folder / "class0/000.jpg").read_bytes(), tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in (
            "./a.jpg",
            "./a.mask.png",
            "._a.jpg",
            "__MACOSX/b.jpg",
            "b.2019.JPG",
            "c/",
            "d.txt",
            "é" * 120 + ".jpg",
        ):
            add_member(tar, name, content)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(link)
    shards = open_images(path)
    assert [shards.name(i) for i in range(len(shards))] == ["a.tar/a.jpg", "a.tar/b.2019.JPG", f"a.tar/{'é' * 120}.jpg"]
    assert all(shards.read_bytes(i) == content for i in range(3))


def test_places_beyond_four_gigabytes(folder, tmp_path):
    content, path = (folder / "class0/000.jpg").read_bytes(), tmp_path / "a.tar"
    big = tarfile.TarInfo("big.bin")
    big.size = 5 * 2**30
    with path.open("wb") as file:
        file.write(big.tobuf(tarfile.PAX_FORMAT))
        file.seek(big.size, os.SEEK_CUR)
        with tarfile.open(fileobj=file, mode="w") as tar:
            add_member(tar, "a.jpg", content)
    shards = open_images(path)
    assert shards.index.offsets[0] > 5 * 2**30
    assert shards.read_bytes(0) == content


# --- which shards --------------------------------------------------------------------------------------------------


def test_specs(folder, tmp_path, monkeypatch):
    shards = pack_images(folder, tmp_path / "shards")
    paths = [str(shards / f"000{i}.tar") for i in range(3)]
    (tmp_path / "list.txt").write_text("# some\nshards/{0002,0000}.tar\n")
    monkeypatch.chdir(tmp_path)
    assert find_shards("shards") == find_shards("shards/{0000..0002}.tar") == find_shards("shards/*.tar") == paths
    assert find_shards("list.txt") == [paths[2], paths[0]]
    assert find_shards("shards/0001.tar") == [paths[1]]
    assert find_shards("images") is None
    assert get_name("shards/{0000..0002}.tar") == get_name("shards") == "shards"
    assert make_absolute("shards/{0000..0002}.tar") == f"{shards}/{{0000..0002}}.tar"
    (shards / "photo.jpg").touch()
    assert find_shards("shards") is None, "a folder of images in which a tar file lies"


def test_parts_for_training_and_testing(folder, tmp_path):
    for part in ("train", "val"):
        pack_images(folder, tmp_path / "sets" / part)
    train, val = open_labeled_pair(tmp_path / "sets", None)
    assert len(train) == len(val) == 24


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("shards/{0000..0003}.tar", "of the 4 shards of"),
        ("shards/000[3].tar", "check the path"),
        ("shards/x*.tar", "check the path"),
        ("shards/{0000,0001,0000}.tar", "name each shard once"),
    ],
)
def test_shards_that_are_not_there(folder, tmp_path, monkeypatch, spec, said, capsys):
    pack_images(folder, tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    assert said in said_by("train", "--data", spec, "--out", "runs/x", capsys=capsys)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "cut off or damaged after '"),
        (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), "no plain tar file"),
        (lambda path: path.write_bytes(b""), "no plain tar file"),
        (lambda path: path.write_bytes(b"hello" * 1000), "no plain tar file"),
    ],
)
def test_a_damaged_shard_is_named(folder, tmp_path, damage, said, capsys):
    shards = pack_images(folder, tmp_path / "shards")
    damage(shards / "0001.tar")
    assert said in (text := said_by("train", "--data", shards, "--out", tmp_path / "run", capsys=capsys))
    assert "0001.tar" in text
    assert "Traceback" not in text


def test_shards_without_images(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, "a.txt", b"hello")
    assert "a.tar holds no image." in said_by(
        "train", "--data", tmp_path / "a.tar", "--out", tmp_path / "r", capsys=capsys
    )


# --- the index -----------------------------------------------------------------------------------------------------


def count_read(monkeypatch) -> list[str]:
    """The names of the shards that are indexed from here on, in this process."""
    read, save = [], index._save
    monkeypatch.setattr(index, "count_cores", lambda: 0)
    monkeypatch.setattr(
        index, "_save", lambda place, shard, entries: (read.append(shard.name), save(place, shard, entries))
    )
    return read


def test_only_shards_that_changed_are_read_again(folder, tmp_path, monkeypatch):
    shards, read = pack_images(folder, tmp_path / "shards"), count_read(monkeypatch)
    before = open_images(shards)
    assert read == ["0000.tar", "0001.tar", "0002.tar"]
    open_images(shards)
    assert len(read) == 3
    with tarfile.open(shards / "0001.tar", "a") as tar:
        add_member(tar, "class0/new.jpg", (folder / "class0/000.jpg").read_bytes())
    after = open_images(shards)
    assert read[3:] == ["0001.tar"]
    assert len(after) == 25
    assert after.fingerprint != before.fingerprint
    assert after.stamp() != before.stamp()
    found = {path.name for path in (shards / ".dino-index").glob("*")} - {"lock"}
    assert len(found) == 4, "three shards and all of them, nothing of before"


def test_an_interrupted_indexing_goes_on(folder, tmp_path, monkeypatch):
    shards, read = pack_images(folder, tmp_path / "shards"), count_read(monkeypatch)
    whole = (shards / "0002.tar").read_bytes()
    (shards / "0002.tar").write_bytes(whole[:5000])
    with pytest.raises(ValueError, match="cut off"):
        open_images(shards)
    (shards / "0002.tar").write_bytes(whole)
    assert len(open_images(shards)) == 24
    assert read == ["0000.tar", "0001.tar", "0002.tar"]


def test_it_lies_in_the_cache_where_shards_may_not_be_written(folder, tmp_path, monkeypatch):
    shards = pack_images(folder, tmp_path / "shards")
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    assert len(open_images(shards)) == 24
    assert not (shards / ".dino-index").exists()
    assert [*(tmp_path / "cache").rglob("about.json")]


def test_the_fingerprint_is_that_of_names_and_labels(folder, tmp_path):
    first, moved = pack_images(folder, tmp_path / "a"), pack_images(folder, tmp_path / "b")
    labeled = pack_images(folder, tmp_path / "c", cls="0CLASS")
    prints = [open_images(path).fingerprint for path in (first, moved, labeled, first / "0000.tar")]
    assert prints[0] == prints[1]
    assert len({*prints}) == 3


def test_workers_of_any_start_method_get_it(folder, tmp_path):
    shards = open_images(pack_images(folder, tmp_path / "shards"))
    copy = pickle.loads(pickle.dumps(shards))
    assert len(pickle.dumps(shards)) < 5000
    assert copy.name(23) == shards.name(23)
    np.testing.assert_array_equal(copy.read(23), shards.read(23))


def test_a_shard_that_goes_away_counts_as_images_that_cannot_be_read(folder, tmp_path):
    shards = open_images(pack_images(folder, tmp_path / "shards"))
    (tmp_path / "shards/0000.tar").unlink()
    os.truncate(tmp_path / "shards/0001.tar", 600)
    for i, said in ((0, "cannot be read"), (8, "shorter")):
        with pytest.raises(dino.data.decode.BadImage, match=said):
            shards.read(i)


# --- commands ------------------------------------------------------------------------------------------------------


def test_two_ranks_train_as_one(folder, tmp_path):
    shards = pack_images(folder, tmp_path / "shards")
    flags = tiny_flags(epochs=1)
    for ranks in (1, 2):
        done = run_dino("train", "--data", shards, *flags, "--out", tmp_path / f"run{ranks}", ranks=ranks)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(shards / ".dino-index")
    one, two = (weights.read(tmp_path / f"run{ranks}").backbone() for ranks in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


def test_every_command_takes_them_on_one_rank_and_two(folder, saved_model, tmp_path):
    shards = pack_images(folder, tmp_path / "shards")
    pattern = f"{shards}/{{0000..0002}}.tar"
    of_files = ranks_agree("eval", "knn", saved_model, "--data", folder, "--k", 3)
    of_shards = ranks_agree("eval", "knn", saved_model, "--data", pattern, "--k", 3)
    assert of_files["figures"] == of_shards["figures"]
    done = run_dino("embed", saved_model, pattern, "--out", tmp_path / "embedded")
    assert done.returncode == 0, done.stderr
    done = run_dino("search", tmp_path / "embedded", folder / "class1/001.jpg", "--k", 1)
    assert done.returncode == 0, done.stderr
    assert "0001.tar/class1/001.jpg" in done.stdout
