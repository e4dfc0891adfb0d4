"""A selection of images for training: what is left out and kept, against plain counts; and the list that training takes."""

from __future__ import annotations

import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dino
from dino.cli import main
from dino.data.image_files import RemoteFiles
from dino.data.open import open_images
from dino.features import cluster
from dino.features import select as selecting
from dino.features.embedding import Embedding, Folder
from dino.features.select import divide, select
from helpers import TINY, add_member, draw_images, final_state, pack_images
from object_store import ObjectStore

pytest.importorskip("pyarrow.parquet")


def hold(values: torch.Tensor) -> Embedding:
    """Features in memory."""
    folder = Folder(Path("x.parquet"), [], {}, len(values), values.shape[1], [])
    names = [f"{i}.jpg" for i in range(len(values))]
    return Embedding(folder, names, np.arange(len(values)), F.normalize(values, dim=1))


def draw(
    counts: list[int], copies: int = 0, dim: int = 32, spread: float = 0.4, seed: int = 0
) -> tuple[Embedding, np.ndarray]:
    """Features about as many centers as there are counts, in random order, with that many near-copies; and their classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    centers = F.normalize(torch.randn(len(counts), dim, generator=generator), dim=1)
    noise = torch.randn(len(classes), dim, generator=generator)
    values = F.normalize(centers[classes] + spread * dim**-0.5 * noise, dim=1)
    of = torch.randint(len(classes), (copies,), generator=generator)
    near = values[of] + 0.02 * dim**-0.5 * torch.randn(copies, dim, generator=generator)
    values, classes = torch.cat([values, near]), torch.cat([classes, classes[of]])
    order = torch.randperm(len(values), generator=generator)
    return hold(values[order]), classes[order].numpy()


def test_copies_go_and_rare_classes_stay():
    """A thousand images of one class, 40 of each of nine others, and 300 near-copies: these go, and the rest is even.

    Also those that a border of clusters parts from their originals, here two.
    """
    embedding, classes = draw([1000, *[40] * 9], copies=300)
    found = select(embedding, 360, threshold=0.99)
    assert 299 <= found.copies <= 300
    every = embedding.values[select(embedding, 9999, threshold=0.99).rows]
    assert (torch.triu(every @ every.T, 1) >= 0.99).sum() == 300 - found.copies
    counts = np.bincount(classes[found.rows], minlength=10)
    assert counts.sum() == 360
    assert counts[0] < 90, "of 1000; it would be 265 in a draw of all"
    assert counts[1:].min() >= 25, "of 40; it would be 11"
    assert found.all_counts.sum() == len(embedding)
    assert found.kept_counts.sum() == 360


def test_copies_against_all_pairs(monkeypatch):
    """One cluster: the first of each group of copies stays, whatever the blocks."""
    monkeypatch.setattr(selecting, "count_cells", lambda rows: 1)
    embedding, _ = draw([200], copies=150, spread=0.5)
    products, expected = embedding.values @ embedding.values.T, []
    for row in range(350):
        if all(products[row, other] < 0.995 for other in expected):
            expected.append(row)
    for block in (1, 7, 1000):
        monkeypatch.setattr(selecting, "COMPARED", block)
        found = select(embedding, 350, threshold=0.995)
        assert found.rows.tolist() == expected
        assert found.copies == 350 - len(expected) > 100


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 500), st.floats(-1, 1), st.integers(0, 5), st.integers(1, 6))
def test_a_selection_is_what_was_asked_for(rows, keep, threshold, seed, classes):
    counts = [rows // classes + (i < rows % classes) for i in range(classes)]
    embedding, _ = draw([count for count in counts if count], dim=8, seed=seed)
    found = select(embedding, keep, threshold, seed)
    assert len(found.rows) == min(keep, rows - found.copies)
    assert len({*found.rows.tolist()}) == len(found.rows)
    assert (np.diff(found.rows) > 0).all()
    assert found.rows.min() >= 0
    assert found.rows.max() < rows
    assert np.array_equal(select(embedding, keep, threshold, seed).rows, found.rows)
    every = select(embedding, rows, threshold, seed)
    assert {*found.rows.tolist()} <= {*every.rows.tolist()}
    removed = np.setdiff1d(np.arange(rows), every.rows)
    if len(removed):  # each has a copy that stays
        assert (embedding.values[removed] @ embedding.values[every.rows].T).amax(dim=1).min() >= threshold - 1e-5


def test_another_seed_is_another_draw():
    embedding, _ = draw([300, 300])
    assert not np.array_equal(select(embedding, 50, 0.999, 0).rows, select(embedding, 50, 0.999, 1).rows)


@given(st.integers(0, 2000), st.lists(st.integers(0, 100), min_size=1, max_size=30))
def test_a_number_is_divided_evenly(total, most):
    parts = divide(total, np.array(most))
    assert parts.sum() == min(total, sum(most))
    assert (parts <= most).all()
    open_parts = parts[parts < most]
    if len(open_parts):
        assert parts.max() - open_parts.min() <= 1


def test_first_centers_are_of_all_clusters():
    """Of ten clusters, one of which has nearly all rows, each gets a center."""
    embedding, classes = draw([5000, *[10] * 9], spread=0.02)
    centers = cluster.find_centers(embedding.values, 10, 0, "test")
    assert {*classes[(centers @ embedding.values.T).argmax(dim=1).numpy()]} == {*range(10)}


# --- the list ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> Path:
    """Sixty images, six of which are copies."""
    folder = draw_images(tmp_path_factory.mktemp("album"), 54)
    for i in range(6):
        shutil.copy(folder / "class1" / f"0{10 + 3 * i}.jpg", folder / "class1" / f"copy{i}.jpg")
    return folder


def embed_and_select(model: Path, data: str | Path, folder: Path, *options: str) -> tuple[int, Path]:
    dino.embed(model, data, folder / "x.parquet", device="cpu")
    out = folder / "list.txt"
    return main(["select", str(folder / "x.parquet"), "--out", str(out), "--threshold", "0.99999", *options]), out


def test_a_list_of_files_is_trained_on(album, saved_model, tmp_path, monkeypatch, capsys):
    code, out = embed_and_select(saved_model, album, tmp_path, "--keep", "20")
    assert code == 0
    said = capsys.readouterr().out
    assert "6 of 60 images are near-copies of others (cosine 1.0000 or more) and left out" in said
    assert re.search(r"list.txt: 20 images of \d+ groups?; the largest group holds [\d.]+ % of all, and ", said)
    lines = out.read_text().splitlines()
    assert len({*lines}) == 20
    assert all(Path(line).is_file() for line in lines)
    monkeypatch.chdir(tmp_path)
    dino.train(data="list.txt", out="run", **TINY | {"epochs": 1, "data.val_fraction": 0.0})
    assert final_state(tmp_path / "run")
    assert len(open_images("list.txt")) == 20


def test_more_than_there_is(album, saved_model, tmp_path, capsys):
    code, out = embed_and_select(saved_model, album, tmp_path, "--keep", "100")
    assert code == 0
    assert "--keep is 100, but only 54 are left; all of them are kept" in capsys.readouterr().out
    names = sorted(Path(line).name for line in out.read_text().splitlines())
    assert names[0] == "000.jpg"
    assert not any("copy" in name for name in names), "the first of a group stays"


def test_a_list_of_images_in_tar_files(album, saved_model, tmp_path):
    """Its images are those of the files, and a run from them is the run from the files."""
    shards = pack_images(album, tmp_path / "shards")
    code, out = embed_and_select(saved_model, shards, tmp_path, "--keep", "20")
    assert code == 0
    source = open_images(out)
    assert len(source) == 20
    (tmp_path / "files.txt").write_text("\n".join(str(album / source.name(i).partition(".tar/")[2]) for i in range(20)))
    files = open_images(tmp_path / "files.txt")
    for i in range(20):
        np.testing.assert_array_equal(source.read(i), files.read(i))
    assert dino.embed(saved_model, str(out), tmp_path / "again.parquet", device="cpu").rows == 20
    run = dino.train(data=out, out=tmp_path / "run", **TINY | {"epochs": 1, "data.num_workers": 2})
    assert final_state(run)


def test_lines_of_tar_files_that_cannot_be_meant(album, tmp_path):
    shards = pack_images(album, tmp_path / "shards")
    first = open_images(shards).name(0)
    (file := tmp_path / "list.txt").write_text(f"shards/{first}\nshards/0001.tar/nothing.jpg\n")
    with pytest.raises(ValueError, match=r"1 images that '.*' names are not in .*0001.tar, first nothing.jpg"):
        open_images(file)
    for lines in (f"shards/{first}\n{album}/class0/000.jpg", f"{album}/class0/000.jpg\nshards/{first}"):
        file.write_text(lines)
        with pytest.raises(ValueError, match="names images in tar files, and others; write two lists"):
            open_images(file)
    file.write_text(f"shards/0007.tar/{first}")
    with pytest.raises(ValueError, match=r"of the 1 shards of '.*', 1 are missing"):
        open_images(file)
    file.write_text(f"# chosen\nshards/{first}\n\nshards/{first}\n")
    assert len(open_images(file)) == 1
    shutil.copytree(album, tmp_path / "photos.tar")  # a folder of such a name
    file.write_text("photos.tar/class0/000.jpg")
    assert len(open_images(file)) == 1


@pytest.mark.parametrize("kind", ["files", "tars"])
def test_a_list_of_images_in_a_bucket(album, saved_model, tmp_path, monkeypatch, kind):
    with ObjectStore() as store:
        store.use_here(monkeypatch, tmp_path / "home")
        local = album if kind == "files" else pack_images(album, tmp_path / "shards")
        address = store.upload(local, f"bucket-{kind}/data")
        code, out = embed_and_select(saved_model, address, tmp_path, "--keep", "20")
        assert code == 0
        assert all(line.startswith(f"{address}/") for line in out.read_text().splitlines())
        source = open_images(out)
        assert len(source) == 20
        assert isinstance(source, RemoteFiles) == (kind == "files")
        name = out.read_text().splitlines()[7].removeprefix(f"{address}/")
        expected = open_images(album)
        at = [expected.name(i) for i in range(60)].index(name.rpartition(".tar/")[2])
        np.testing.assert_array_equal(source.read(7), expected.read(at))
        assert dino.embed(saved_model, str(out), tmp_path / "again.parquet", device="cpu").rows == 20
        (tmp_path / "mixed.txt").write_text(f"{out.read_text()}{album}/class0/000.jpg\n")
        with pytest.raises(ValueError, match="write two lists"):
            open_images(tmp_path / "mixed.txt")


def test_what_cannot_be_selected_is_one_sentence(album, saved_model, tmp_path, capsys):
    dino.embed(saved_model, album, made := tmp_path / "x.parquet", device="cpu")
    dino.embed(saved_model, "scenes:40", drawn := tmp_path / "scenes.parquet", device="cpu")
    (mine := tmp_path / "mine.txt").write_text("precious")
    (empty := tmp_path / "empty").mkdir()
    new = tmp_path / "new.txt"
    for embedding, more, text in (
        (made, ["--keep", "0", "--out", new], "keep is 0; it must be at least 1"),
        (made, ["--keep", "5", "--out", mine], "mine.txt exists; choose another, or delete it"),
        (made, ["--keep", "5", "--out", tmp_path / "x.csv"], "choose a name that ends in .txt"),
        (made, ["--keep", "5", "--out", new, "--threshold", "2"], "a cosine lies between -1 and 1"),
        (made, ["--keep", "5", "--out", new], "no images are selected: The model "),
        (drawn, ["--keep", "5", "--out", new], "no list can name them"),
        (empty, ["--keep", "5", "--out", new], "holds no embedding"),
        (tmp_path / "no", ["--keep", "5", "--out", new], "there is no embedding"),
    ):
        assert main(["select", str(embedding), *map(str, more)]) == 2, text
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert text in said
    assert mine.read_text() == "precious"
    assert not new.exists()


def test_a_name_that_no_line_can_hold(album, saved_model, tmp_path, capsys):
    shutil.copytree(album, photos := tmp_path / "photos")
    (photos / "class0" / "000.jpg").rename(photos / "class0" / "a\nb.jpg")
    code, out = embed_and_select(saved_model, photos, tmp_path, "--keep", "60")
    assert code == 2
    assert "holds a line break, so no list can hold it; rename it" in capsys.readouterr().err
    assert not out.exists()


def test_a_member_with_a_name_of_another_alphabet(saved_model, tmp_path, album):
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for number, file in enumerate(sorted(album.rglob("*.jpg"))[:40]):
            add_member(tar, f"größe {number}.tar/日本 {number}.jpg", file.read_bytes())
    code, out = embed_and_select(saved_model, tmp_path / "shards", tmp_path, "--keep", "10")
    assert code == 0
    assert len(open_images(out)) == 10
