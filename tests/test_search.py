"""Search in embeddings through the real command line, against plain products; and what is refused."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.sparse.csgraph
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

import dino
from dino import weights
from dino.cli import main
from dino.data.decode import decode
from dino.data.image_files import Images
from dino.data.scenes import Scenes
from dino.features import ivfpq, shards
from dino.features import search as finding
from dino.features.copies import EDGE, find_copies, is_copy
from dino.features.embedding import Embedding, Folder, Mapped
from dino.features.ivfpq import Ivfpq
from dino.features.neighbors import find_neighbors
from dino.features.search import Index
from dino.features.shards import write_shard
from helpers import draw_images, run_dino

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> Path:
    """Forty images; the second three times more (once at another quality), and one of nothing but noise."""
    folder = draw_images(tmp_path_factory.mktemp("album"), 40)
    for i in range(2):
        shutil.copy(folder / "class1" / "001.jpg", folder / "class2" / f"copy{i}.jpg")
    Image.open(folder / "class1" / "001.jpg").save(folder / "class2" / "copy2.jpg", quality=60)
    noise = np.random.default_rng(5).integers(0, 2, (48, 48, 1), np.uint8) * 255
    Image.fromarray(noise.repeat(3, 2)).save(folder / "class0" / "noise.png")
    return folder


@pytest.fixture(scope="module")
def embedded(album, saved_model) -> Path:
    return dino.embed(str(saved_model), str(album), album.parent / "e.parquet", shard=16, device="cpu").path


def drawn(rows: int, dim: int = 16, seed: int = 0, place: Path = Path("x.parquet")) -> Embedding:
    values = F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)
    return Embedding(
        Folder(place, [], {}, rows, dim, [], digest=f"{rows} {dim} {seed}"),
        [f"{i}.jpg" for i in range(rows)],
        np.arange(rows),
        values,
    )


def pixels_of(images: Path, embedding: Path) -> np.ndarray:
    """Features that tell images apart: their pixels."""
    names = pq.read_table(embedding)["path"].to_pylist()
    pixels = np.stack([cv2.resize(decode(images / name), (6, 6)).astype(np.float32) for name in names])
    return (pixels - pixels.mean((0, 1, 2))).reshape(len(names), -1)


def rewrite(embedding: Path, out: Path, values: np.ndarray) -> Path:
    """An embedding with other features, as one file."""
    table = pq.read_table(embedding)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    pq.write_table(table.set_column(table.column_names.index("feature"), "feature", column), out)
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 9), st.integers(1, 12), st.floats(0, 3), st.integers(0, 99))
def test_flat_finds_the_nearest_exactly(rows, queries, k, together, seed):
    """One by one through half precision or all at once; also where features crowd about a common mean."""
    embedding = drawn(rows, seed=seed)
    values = F.normalize(embedding.values + together, dim=1)
    asked = torch.randn(queries, 16, generator=torch.Generator().manual_seed(seed + 1)) + together
    cosine, found = Index(Embedding(embedding.folder, [], embedding.positions, values)).find_nearest(asked, k)
    truth = F.normalize(asked, dim=1) @ values.T
    torch.testing.assert_close(cosine, truth.topk(min(k, rows), dim=1).values, rtol=0, atol=1e-6)
    torch.testing.assert_close(truth.gather(1, found), cosine, rtol=0, atol=1e-6)
    assert all(len(set(row)) == min(k, rows) for row in found.tolist())


def test_the_approximate_index_is_kept_and_finds_most(embedded, saved_model, album, tmp_path):
    pytest.importorskip("faiss")
    embedding = drawn(10_000, place=tmp_path / "x.parquet")
    index = Index(embedding, "ivfpq")
    assert index.approximate.recall > 0.9
    queries = drawn(50, seed=1).values
    (cosine, rows), (true, exact) = index.find_nearest(queries, 10), Index(embedding).find_nearest(queries, 10)
    found = (exact[:, :, None] == rows[:, None]).any(dim=2)
    assert found.float().mean() > 0.9
    torch.testing.assert_close(cosine, (queries[:, None] * embedding.values[rows]).sum(dim=2))  # exact ones
    torch.testing.assert_close(cosine[:, 0][found[:, 0]], true[:, 0][found[:, 0]])
    assert all(len({*row}) == 10 for row in rows.tolist())
    assert index.approximate.recall >= ivfpq.ENOUGH or index.approximate.about["refined"] == ivfpq.REFINED[-1]
    assert (tmp_path / "x.ivfpq.faiss").stat().st_size < 10_000 * 16 * 4
    query = album / "class1" / "001.jpg"
    found = dino.search(embedded, [query], 4, "ivfpq", device="cpu")
    file = embedded.with_suffix(".ivfpq.faiss")
    made = file.stat().st_mtime_ns
    assert sorted(found.paths[0][:3]) == ["class1/001.jpg", "class2/copy0.jpg", "class2/copy1.jpg"]
    assert dino.search(embedded, [query], 4, "ivfpq", device="cpu").paths == found.paths
    assert file.stat().st_mtime_ns == made
    assert dino.duplicates(embedded, 0.999, "ivfpq") == dino.duplicates(embedded, 0.999)
    np.testing.assert_allclose(dino.outliers(embedded, 5, "ivfpq"), dino.outliers(embedded, 5), atol=0.05)


def test_an_index_is_gone_on_with(tmp_path, monkeypatch):
    """One that was interrupted adds only the rows that it does not hold, and is the index that nothing interrupted."""
    faiss = pytest.importorskip("faiss")
    monkeypatch.setattr(ivfpq, "BLOCK", 250)
    whole = Ivfpq(drawn(1250, place=tmp_path / "whole.parquet"))
    monkeypatch.setattr(ivfpq, "SAVED", -1)
    embedding = drawn(1250, place=tmp_path / "x.parquet")
    iterate, added = Embedding.iterate, []

    def fail(self, count):
        for number, block in enumerate(iterate(self, count)):
            if number == 3:
                raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(Embedding, "iterate", fail)
    with pytest.raises(KeyboardInterrupt):
        Ivfpq(embedding)
    monkeypatch.setattr(Embedding, "iterate", iterate)
    add = faiss.IndexIVFPQ.add
    monkeypatch.setattr(faiss.IndexIVFPQ, "add", lambda self, x: (added.append(len(x)), add(self, x)))
    again = Ivfpq(embedding)
    assert added == [250, 250]
    assert again.index.ntotal == 1250
    assert again.recall == whole.recall
    assert all(map(torch.equal, again.find_nearest(embedding.values, 5), whole.find_nearest(embedding.values, 5)))


# --- features that stay on the disk --------------------------------------------------------------------------------


def write_embedding(out: Path, values: np.ndarray, shard: int = 1000, **about: object) -> Path:
    """An embedding of these features, as `dino embed` writes it."""
    out.mkdir()
    said = dict.fromkeys(("model", "model_sha256", "data", "data_sha256", "stamp"), "") | {"pooling": "cls", "bad": []}
    said |= {"images": len(values), "shard": shard, "shards": -(-len(values) // shard), "size": 32, "fp16": False}
    for number in range(said["shards"]):
        rows = np.arange(number * shard, min(len(values), (number + 1) * shard))
        columns = {"path": np.array([f"{row}.jpg" for row in rows], object), "index": rows}
        write_shard(str(out / f"part-{number:06d}.parquet"), columns, values[rows], said | about)
    return out


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_mapped_rows_are_the_rows_in_memory(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(shards, "ROW_GROUP", 700)
    values = np.random.default_rng(0).normal(size=(2500, 24)).astype(kind)
    folder = Folder.open(write_embedding(tmp_path / "x.parquet", values))
    mapped, memory = Mapped(folder), folder.read()
    assert all(isinstance(piece, np.memmap) for piece in mapped.pieces)
    assert [*map(len, mapped.pieces)] == [700, 300, 700, 300, 500]
    rows = np.random.default_rng(1).integers(0, 2500, 300)
    torch.testing.assert_close(mapped.take(rows), memory.values[rows])
    torch.testing.assert_close(torch.cat([*mapped.iterate(800)]), memory.values)
    assert [mapped.names[row] for row in rows] == [memory.names[row] for row in rows]
    assert [mapped.positions[row] for row in rows] == memory.positions[rows].tolist()
    queries = F.normalize(torch.from_numpy(values[:7]).float(), dim=1)
    cosines, found = Index(mapped, "flat").find_nearest(queries, 9)
    expected, nearest = find_neighbors(queries, memory.values, 9)
    torch.testing.assert_close(cosines, expected)
    assert torch.equal(found, nearest)


@pytest.mark.parametrize(
    "layout", [{}, {"compression": "none"}, {"compression": "none", "use_dictionary": False, "data_page_size": 100}]
)
def test_a_shard_that_others_have_written_is_read_all_the_same(tmp_path, layout):
    values = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)
    (file,) = (out := write_embedding(tmp_path / "x.parquet", values, 3000)).iterdir()
    pq.write_table(pq.read_table(file), file, **layout)
    mapped = Mapped(Folder.open(out))
    torch.testing.assert_close(mapped.take(range(3000)), F.normalize(torch.from_numpy(values), dim=1))


def test_many_rows_are_searched_on_the_disk_with_an_index(embedded, album, tmp_path, monkeypatch, capsys):
    """By default, beyond a number of images; and a page and a result are those of an exact search."""
    pytest.importorskip("faiss")
    query, page, file = album / "class1" / "001.jpg", tmp_path / "p.html", tmp_path / "r.json"
    shutil.copytree(embedded, own := tmp_path / "own.parquet")
    command = ["search", str(own), str(query), "--k", "5", "--html", str(page), "--json", str(file)]
    assert main(command) == 0
    exact, said = json.loads(file.read_text()), capsys.readouterr().out
    monkeypatch.setattr(finding, "MANY", 40)
    monkeypatch.setattr(Folder, "read", lambda self: pytest.fail("it is read into memory"))
    assert main(command) == 0
    found, now = json.loads(file.read_text()), capsys.readouterr().out
    assert re.search(r"\nrecall@10 of ivfpq: [\d.]+ % of the exact neighbors of 100 images\n$", now)
    assert (found["index"], exact["index"]) == ("ivfpq", "flat")
    nearest = [{row["path"] for row in result["queries"][0]["neighbors"][:4]} for result in (found, exact)]
    assert nearest[0] == nearest[1]
    assert page.read_text().count("<img") == 6
    assert main([*command, "--index", "flat"]) == 0
    assert sorted(capsys.readouterr().out.split("\n")) == sorted(said.split("\n"))  # copies are equally near


def test_the_command_finds_copies_first(embedded, album, tmp_path):
    query, page, file = album / "class1" / "001.jpg", tmp_path / "p.html", tmp_path / "r.json"
    done = run_dino("search", embedded, query, "--k", 5, "--index", "ivfpq", "--html", page, "--json", file)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(query)
    assert lines[1].split()[0] == "1.0000"
    assert lines[-1].startswith("recall@10 of ivfpq: ")
    result = json.loads(file.read_text())
    (asked,) = result["queries"]
    assert asked["query"] == str(query)
    assert {entry["path"] for entry in asked["neighbors"][:3]} == {
        "class1/001.jpg",
        "class2/copy0.jpg",
        "class2/copy1.jpg",
    }
    assert [entry["cosine"] for entry in asked["neighbors"]] == sorted(
        (e["cosine"] for e in asked["neighbors"]), reverse=True
    )
    assert result["recall"] > 0.9
    assert page.read_text().count("<img") == 6


@pytest.mark.parametrize("most", [2**20, 10], ids=["in memory", "on the disk"])
def test_duplicates_are_groups_and_outliers_stand_alone(most, embedded, album, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finding, "MANY", most)
    page, file = tmp_path / "p.html", tmp_path / "r.json"
    assert main(["duplicates", str(embedded), "--threshold", "0.999", "--html", str(page), "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert "4 of 44 images are in 1 groups of near-copies; the 3 that are not to keep take " in said
    assert re.search(r"keep  1.0000  \d\d x \d\d, .* (kB|bytes) +class1/001.jpg", said)
    (group,) = json.loads(file.read_text())["groups"]
    best, copies = group["keep"], group["copies"]
    assert [entry["path"] for entry in (best, *copies)] == [
        "class1/001.jpg",
        *(f"class2/copy{i}.jpg" for i in range(3)),
    ]
    assert best["bytes"] == copies[0]["bytes"] == (album / best["path"]).stat().st_size > copies[2]["bytes"]
    assert decode(album / best["path"]).shape == (best["height"], best["width"], 3)
    assert page.read_text().count("<img") == 4
    told = rewrite(embedded, tmp_path / "told.parquet", pixels_of(album, embedded))
    assert main(["outliers", str(told), "--k", "5", "--top", "3", "--html", str(page), "--json", str(file)]) == 0
    first = json.loads(file.read_text())["outliers"]
    assert first[0]["path"] == "class0/noise.png"
    assert [entry["cosine"] for entry in first] == sorted(entry["cosine"] for entry in first)
    assert page.read_text().count("<img") == 3


def test_copies_and_outliers_of_rows_on_the_disk_are_those_in_memory(tmp_path, monkeypatch):
    """With several reads."""
    monkeypatch.setattr(finding, "READ", 250)
    values = np.random.default_rng(0).normal(size=(900, 24)).astype(np.float32)
    values[::7] = values[1::7][: len(values[::7])]
    folder = Folder.open(write_embedding(tmp_path / "x.parquet", values))
    mapped, memory = Mapped(folder), folder.read()
    torch.testing.assert_close(dino.outliers(mapped, 4, "flat"), dino.outliers(memory, 4))
    groups = dino.duplicates(memory, 0.999, confirm=False)
    assert len(groups) > 100
    assert sorted(dino.duplicates(mapped, 0.999, "flat", confirm=False)) == sorted(groups)


@pytest.mark.parametrize("kind", ["flat", "ivfpq"])
def test_features_join_all_rows_that_a_chain_of_pairs_joins(kind, tmp_path):
    pytest.importorskip("faiss")
    embedding, threshold = drawn(300, dim=4, seed=3, place=tmp_path / "x.parquet"), 0.97
    near = scipy.sparse.csr_matrix((embedding.values @ embedding.values.T >= threshold).numpy())
    _, labels = scipy.sparse.csgraph.connected_components(near)
    expected = {tuple(np.flatnonzero(labels == label)) for label in set(labels) if (labels == label).sum() > 1}
    groups = dino.duplicates(embedding, threshold, kind, confirm=False)
    assert {*map(tuple, groups)} == expected
    assert [*map(len, groups)] == sorted(map(len, groups), reverse=True)


def test_outliers_against_a_plain_count():
    embedding = drawn(250)
    similarity = embedding.values @ embedding.values.T
    similarity.fill_diagonal_(-2)
    torch.testing.assert_close(dino.outliers(embedding, 4), similarity.topk(4, dim=1).values.mean(dim=1))
    twins = torch.ones(5, 3)  # where an image's copies come before itself
    same = Embedding(embedding.folder, [], np.arange(5), F.normalize(twins, dim=1))
    torch.testing.assert_close(dino.outliers(same, 2), torch.ones(5))


def test_unreadable_queries_are_named(embedded, album, tmp_path, capsys):
    (tmp_path / "no.jpg").write_bytes(b"no")
    found = dino.search(embedded, [tmp_path / "no.jpg", album / "class0" / "000.jpg"], 1, device="cpu")
    assert found.paths == [["class0/000.jpg"]]
    assert [Path(name).name for name, _ in found.bad] == ["no.jpg"]
    assert "no.jpg: not an image" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none of the 1 query images can be read"):
        dino.search(embedded, [tmp_path / "no.jpg"], device="cpu")


def test_what_cannot_be_searched_is_one_sentence(embedded, album, saved_model, tmp_path, capsys):
    image = str(album / "class0" / "000.jpg")

    def complaint(*arguments: object) -> str:
        assert main([*map(str, arguments)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    torch.manual_seed(1)
    arguments = {"arch": "vit_nano", "patch_size": 8, "image_size": 32, "width": 64, "num_heads": 2}
    (other := tmp_path / "other").mkdir()
    weights.save(other, dino.create(**arguments), arguments)
    assert "was made by another model" in complaint("search", embedded, image, "--model", other)
    assert "there is no run, weight file" in complaint("search", embedded, image, "--model", "nowhere")
    assert "there is no embedding" in complaint("outliers", tmp_path / "no.parquet")
    assert "holds no embedding" in complaint("outliers", other)
    assert "k is 0" in complaint("search", embedded, image, "--k", 0)
    assert "from 1 to 43" in complaint("outliers", embedded, "--k", 44)
    assert "a cosine lies between" in complaint("duplicates", embedded, "--threshold", 2)

    mixed = tmp_path / "mixed.parquet"
    narrow = dino.embed(str(other), str(album), mixed, shard=16, device="cpu")
    shutil.copy(embedded / "part-000001.parquet", mixed)
    assert "different lengths (64 and 96, part-000001.parquet)" in complaint("duplicates", mixed)
    table = pq.read_table(narrow.files[0])
    varying = table.set_column(2, "feature", [[[1.0], [1.0, 2.0]] * (len(table) // 2)])
    pq.write_table(varying, single := tmp_path / "varying.parquet")
    assert "different lengths (varying" in complaint("duplicates", single)
    pq.write_table(table.replace_schema_metadata(None), single)
    assert "is no embedding that `dino embed` wrote" in complaint("duplicates", single)
    about = json.loads(table.schema.metadata[b"dino"])
    about["readout"] = about.pop("pooling")  # as it was called before
    pq.write_table(table.replace_schema_metadata({"dino": json.dumps(about)}), single)
    assert "was written by another version of dino; embed anew" in complaint("duplicates", single)

    cut = shutil.copytree(embedded, tmp_path / "cut.parquet")
    (cut / "part-000001.parquet").write_bytes((embedded / "part-000001.parquet").read_bytes()[:2000])
    assert "part-000001.parquet is damaged or cut short" in complaint("search", cut, image)
    (cut / "part-000001.parquet").unlink()
    assert "incomplete, 2 of 3 shards (missing: 1); complete it with: dino embed" in complaint("search", cut, image)

    patches = dino.embed(str(saved_model), "scenes:3", tmp_path / "patches.parquet", "patches", device="cpu")
    assert "holds features of patches" in complaint("outliers", patches.path)


def test_an_index_must_be_of_its_embedding(embedded, album, saved_model, tmp_path, capsys):
    """What it was built from counts, not when: a copied embedding is younger, a new one may be older."""
    pytest.importorskip("faiss")
    own = shutil.copytree(embedded, tmp_path / "own.parquet")
    query = ["search", str(own), str(album / "class0" / "000.jpg"), "--index", "ivfpq", "--device", "cpu"]
    assert main(query) == 0
    index = tmp_path / "own.ivfpq.faiss"
    os.utime(index, (1e9, 1e9))
    assert main(query) == 0
    shutil.rmtree(own)
    dino.embed(str(saved_model), str(album), own, "average", device="cpu")  # as many rows, as long
    for file in own.iterdir():
        os.utime(file, (1, 1))
    assert main(query) == 2
    assert "own.ivfpq.faiss is older than its embedding" in capsys.readouterr().err
    assert main([*query, "--rebuild"]) == 0
    assert main(query) == 0
    Index(drawn(50, place=tmp_path / "own.parquet"), "ivfpq", rebuild=True)
    assert main(query) == 2
    capsys.readouterr()
    assert main([*query, "--rebuild"]) == 0
    whole = index.read_bytes()
    for at in (20, len(whole) // 2, len(whole) - 40, len(whole) - 1):  # one bit of it
        index.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert main(query) == 2
        assert "or damaged; add --rebuild." in capsys.readouterr().err
    for rest in (100, 0):
        index.write_bytes(whole[:rest])
        assert main(query) == 2
        assert "or damaged; add --rebuild." in capsys.readouterr().err


def test_a_picture_that_is_gone_bad_is_gray_on_the_page(saved_model, tmp_path):
    photos = draw_images(tmp_path / "photos", 12)
    out = dino.embed(str(saved_model), str(photos), tmp_path / "x.parquet", device="cpu").path
    (photos / "class0" / "000.jpg").write_text("no image any more")
    assert main(["outliers", str(out), "--k", "2", "--top", "12", "--html", str(tmp_path / "p.html")]) == 0
    assert (tmp_path / "p.html").read_text().count("<img") == 12


# --- near-copies ---------------------------------------------------------------------------------------------------

SCENES = Scenes(60, size=160)


def scene(i: int) -> Image.Image:
    return Image.fromarray(SCENES.read(i))


def paste(image: Image.Image) -> Image.Image:
    image.paste((240, 220, 60), (60, 60, 85, 85))
    return image


def encode(image: Image.Image, quality: int) -> Image.Image:
    image.save(file := io.BytesIO(), "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


@pytest.mark.parametrize(
    ("change", "same"),
    {
        "smaller": (lambda image: image.resize((50, 50)), True),
        "stretched": (lambda image: image.resize((160, 180)), True),
        "compressed": (lambda image: encode(image, 30), True),
        "cropped": (lambda image: image.crop((6, 0, 157, 154)), True),
        "brighter": (lambda image: ImageEnhance.Brightness(image).enhance(1.1), True),
        "darker": (lambda image: ImageEnhance.Brightness(image).enhance(0.9), True),
        "mirrored": (ImageOps.mirror, False),
        "half of it": (lambda image: image.crop((0, 0, 80, 160)), False),
        "other colors": (
            lambda image: Image.merge("RGB", [image.split()[0], *ImageOps.invert(image).split()[1:]]),
            False,
        ),
        "something added": (paste, False),
        "another": (lambda image: scene(30), False),
    }.values(),
)
def test_pixels_tell_copies_from_others(change, same):
    def thumbnail(image: Image.Image) -> np.ndarray:
        return cv2.resize(np.asarray(image), (EDGE, EDGE), interpolation=cv2.INTER_AREA)

    found = [is_copy(thumbnail(scene(i)), thumbnail(change(scene(i)))) for i in range(8)]
    assert np.mean(found) >= 0.9 if same else not any(found)


def test_pictures_of_one_color_are_copies_of_the_same_color_only():
    plain = {
        name: np.full((EDGE, EDGE, 3), color, np.uint8) for name, color in (("white", 255), ("black", 0), ("gray", 190))
    }
    plain |= {"red": np.uint8([255, 0, 0]) * np.ones_like(plain["white"]), "page": plain["white"].copy()}
    plain["page"][20:30, 20:40] = 0
    assert {(a, b) for a in plain for b in plain if is_copy(plain[a], plain[b])} == {(name, name) for name in plain}


def made(pictures: list[Image.Image], values: torch.Tensor) -> tuple[Embedding, Images]:
    folder = Folder(Path("x.parquet"), [], {}, len(values), values.shape[1], [])
    names = [f"{i}.png" for i in range(len(values))]
    embedding = Embedding(folder, names, np.arange(len(values)), F.normalize(values, dim=1))
    return embedding, Images([np.asarray(picture) for picture in pictures])


@pytest.mark.slow
def test_a_group_has_no_limit_and_the_best_of_it_comes_first():
    """A hundred equal copies, and forty that differ a little, among others; the features say which may be copies."""
    pictures = [scene(0)] * 100 + [encode(scene(1), 40 + i).resize((150 - i, 150 - i)) for i in range(40)]
    pictures += [scene(i) for i in range(2, 42)]
    noise = 0.01 * torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    values = drawn(42, 64).values
    embedding, images = made(pictures, torch.cat([values[:1].expand(100, -1), values[1] + noise, values[2:]]))
    groups = find_copies(embedding, images).groups
    assert [[copy.row for copy in group] for group in groups] == [[*range(100)], [*range(100, 140)]]
    assert groups[1][0].view is not None
    assert (groups[1][0].view.width, groups[1][0].view.height) == (150, 150)


def test_features_alone_make_no_copies_and_a_chain_makes_no_group():
    """Two pictures for one feature; and a picture that becomes another in small steps."""
    pictures = [Image.blend(scene(0), scene(1), step / 24) for step in range(25)] + [scene(i) for i in range(2, 30)]
    values = drawn(29, 64).values
    embedding, images = made(pictures, torch.cat([values[:1].expand(25, -1), values[1:2].expand(2, -1), values[3:]]))
    groups = find_copies(embedding, images).groups
    assert len(groups) > 2
    for first, *others in groups:
        assert others
        assert all(is_copy(first.view.thumbnail, copy.view.thumbnail) for copy in others)
    assert {copy.row for group in groups for copy in group} <= {*range(25)}


def test_a_model_that_cannot_tell_says_so(embedded, album, tmp_path, capsys):
    """Its copies are found by their pixels alone, and no list is written that somebody might delete by."""
    page, file = tmp_path / "p.html", tmp_path / "r.json"
    file.write_text("of before")
    assert main(["duplicates", str(embedded), "--html", str(page)]) == 0
    said = capsys.readouterr()
    assert re.search(
        r"The model .* cannot tell these images apart \(half of all pairs have a cosine over 0\.9", said.err
    )
    assert "cannot tell these images apart" in page.read_text()
    assert said.out.startswith("group 1: 4 images\n  keep")
    assert main(["outliers", str(embedded), "--k", "5"]) == 0
    assert "cannot tell these images apart" in capsys.readouterr().err
    for command, what in (("outliers", "outliers"), ("duplicates", "near-copies")):
        assert main([command, str(embedded), "--json", str(file)]) == 2
        assert f"no list of {what} is written: The model " in capsys.readouterr().err
        assert file.read_text() == "of before"


def test_without_the_images_there_is_no_list_of_copies(album, saved_model, tmp_path, capsys):
    moved = shutil.copytree(album, tmp_path / "photos")
    out = dino.embed(saved_model, moved, tmp_path / "x.parquet", device="cpu").path
    told = rewrite(out, tmp_path / "told.parquet", pixels_of(moved, out))
    shutil.rmtree(moved)
    assert main(["duplicates", str(told)]) == 0
    said = capsys.readouterr()
    assert "Not confirmed by pixels, candidates by features alone: " in said.err
    assert "class2/copy1.jpg" in said.out
    for option in ("--json", "--html"):
        file = tmp_path / f"r.{option[2:]}"
        assert main(["duplicates", str(told), option, str(file)]) == 2
        assert "cannot be confirmed by their pixels, so none are written" in capsys.readouterr().err
        assert not file.exists()
    assert main(["duplicates", str(out)]) == 2  # neither the model nor pixels can tell
    assert "near-copies cannot be found without the pixels of the images: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="does not exist"):
        dino.duplicates(told)


def test_a_page_needs_the_images_as_they_were(saved_model, tmp_path, capsys):
    photos = draw_images(tmp_path / "photos", 12)
    out = dino.embed(str(saved_model), str(photos), tmp_path / "x.parquet", device="cpu").path
    (photos / "class0" / "000.jpg").unlink()
    assert main(["outliers", str(out), "--k", "2", "--html", str(tmp_path / "p.html")]) == 2
    assert "are no longer those of" in capsys.readouterr().err
    assert main(["outliers", str(out), "--k", "2"]) == 0


def test_what_a_nameless_model_embedded_is_searched_with_it(saved_model, album, tmp_path):
    model = dino.load(saved_model)
    out = dino.embed(model, str(album), tmp_path / "x.parquet").path
    query = [np.array(Image.open(album / "class0" / "noise.png"))]
    with pytest.raises(ValueError, match="does not say where its model lies"):
        dino.search(out, query)
    assert dino.search(out, query, 1, model=model).paths == [["class0/noise.png"]]


def test_what_embed_returns_and_pictures_in_memory_are_taken(embedded, saved_model, album):
    folder = Folder.open(embedded)
    path = sorted(album.rglob("*.jpg"))[0]
    found = dino.search(folder, path, k=3)
    for picture in (Image.open(path), np.asarray(Image.open(path)), [Image.open(path)]):
        assert np.array_equal(dino.search(embedded, picture, k=3).rows, found.rows)
    assert torch.equal(dino.outliers(folder), dino.outliers(embedded))
    assert dino.duplicates(folder) == dino.duplicates(embedded)
    chosen = [dino.select(each, 3, threshold=0.99999).rows for each in (folder, embedded)]
    assert np.array_equal(*chosen)
    for function in (dino.outliers, lambda model: dino.search(model, path), lambda model: dino.select(model, 3)):
        with pytest.raises(ValueError, match=r"a VisionTransformer is no embedding; give what dino.embed returned"):
            function(dino.load(saved_model))
