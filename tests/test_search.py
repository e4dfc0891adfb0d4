"""Search in embeddings through the real command line, against plain products; and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dino
from dino import weights
from dino.cli import main
from dino.features.embed import Embedding, Folder
from dino.features.search import Index
from helpers import draw_images, run_dino

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
    return Embedding(Folder(place, [], {}, rows, dim, []), [f"{i}.jpg" for i in range(rows)], np.arange(rows), values)


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


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_approximate_indices_are_kept_and_find_most(kind, embedded, saved_model, album, tmp_path):
    pytest.importorskip("faiss")
    index = Index(drawn(4000, place=tmp_path / "x.parquet"), kind)
    assert 0.8 < index.measure_recall(10) <= 1
    assert (tmp_path / f"x.{kind}.faiss").stat().st_size > 4000 * 16 * 4
    query = album / "class1" / "001.jpg"
    found = dino.search(embedded, [query], 4, kind, device="cpu")
    file = embedded.with_suffix(f".{kind}.faiss")
    made = file.stat().st_mtime_ns
    assert sorted(found.paths[0][:3]) == ["class1/001.jpg", "class2/copy0.jpg", "class2/copy1.jpg"]
    assert dino.search(embedded, [query], 4, kind, device="cpu").paths == found.paths
    assert file.stat().st_mtime_ns == made
    assert [sorted(group) for group in dino.duplicates(embedded, 0.999, kind)] == dino.duplicates(embedded, 0.999)
    np.testing.assert_allclose(dino.outliers(embedded, 5, kind), dino.outliers(embedded, 5), atol=0.05)


def test_the_command_finds_copies_first(embedded, album, tmp_path):
    query, page, file = album / "class1" / "001.jpg", tmp_path / "p.html", tmp_path / "r.json"
    done = run_dino("search", embedded, query, "--k", 5, "--index", "hnsw", "--html", page, "--json", file)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(query)
    assert lines[1].split()[0] == "1.0000"
    assert lines[-1].startswith("recall@5 of hnsw: ")
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


def test_duplicates_are_groups_and_outliers_stand_alone(embedded, tmp_path, capsys):
    page, file = tmp_path / "p.html", tmp_path / "r.json"
    assert main(["duplicates", str(embedded), "--threshold", "0.9999", "--html", str(page), "--json", str(file)]) == 0
    assert "3 of 44 images are in 1 groups" in capsys.readouterr().out
    (group,) = json.loads(file.read_text())["groups"]
    assert [entry["path"] for entry in group] == ["class1/001.jpg", "class2/copy0.jpg", "class2/copy1.jpg"]
    assert page.read_text().count("<img") == 3
    assert main(["outliers", str(embedded), "--k", "5", "--top", "3", "--html", str(page), "--json", str(file)]) == 0
    first = json.loads(file.read_text())["outliers"]
    assert first[0]["path"] == "class0/noise.png"
    assert [entry["cosine"] for entry in first] == sorted(entry["cosine"] for entry in first)
    assert page.read_text().count("<img") == 3


def test_groups_are_stars_against_a_plain_count():
    """Every member is so like the first of its group, and nobody outside is like a first one and still free."""
    embedding, threshold = drawn(300, dim=4, seed=3), 0.9
    groups = dino.duplicates(embedding, threshold)
    taken: set[int] = set()
    expected = []
    alike = (embedding.values @ embedding.values.T >= threshold).numpy()
    for row in range(300):
        members = [j for j in range(row + 1, 300) if alike[row, j] and j not in taken]
        if row not in taken and members:
            expected.append([row, *members])
            taken |= set(members)
    assert groups == sorted(expected, key=len, reverse=True)


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
    assert "incomplete, 2 of 3 shards" in complaint("search", cut, image)

    patches = dino.embed(str(saved_model), "scenes:3", tmp_path / "patches.parquet", "patches", device="cpu")
    assert "holds features of patches" in complaint("outliers", patches.path)


def test_an_index_must_be_of_its_embedding(embedded, album, saved_model, tmp_path, capsys):
    """What it was built from counts, not when: a copied embedding is younger, a new one may be older."""
    pytest.importorskip("faiss")
    own = shutil.copytree(embedded, tmp_path / "own.parquet")
    query = ["search", str(own), str(album / "class0" / "000.jpg"), "--index", "hnsw", "--device", "cpu"]
    assert main(query) == 0
    index = tmp_path / "own.hnsw.faiss"
    os.utime(index, (1e9, 1e9))
    assert main(query) == 0
    shutil.rmtree(own)
    dino.embed(str(saved_model), str(album), own, "average", device="cpu")  # as many rows, as long
    for file in own.iterdir():
        os.utime(file, (1, 1))
    assert main(query) == 2
    assert "own.hnsw.faiss is older than its embedding" in capsys.readouterr().err
    assert main([*query, "--rebuild"]) == 0
    assert main(query) == 0
    Index(drawn(50, place=tmp_path / "own.parquet"), "hnsw", rebuild=True)
    assert main(query) == 2
    for rest in (100, 0):
        index.write_bytes(index.read_bytes()[:rest])
        assert main(query) == 2
        assert "or damaged; add --rebuild." in capsys.readouterr().err


def test_a_picture_that_is_gone_bad_is_gray_on_the_page(saved_model, tmp_path):
    photos = draw_images(tmp_path / "photos", 12)
    out = dino.embed(str(saved_model), str(photos), tmp_path / "x.parquet", device="cpu").path
    (photos / "class0" / "000.jpg").write_text("no image any more")
    assert main(["outliers", str(out), "--k", "2", "--top", "12", "--html", str(tmp_path / "p.html")]) == 0
    assert (tmp_path / "p.html").read_text().count("<img") == 12


def test_what_is_a_copy_depends_on_what_is_around(tmp_path):
    """Rows of a dense cluster are no copies of each other, though nearer than a copy is elsewhere."""
    rng = np.random.default_rng(0)
    dense, sparse = np.eye(16)[0] + 0.01 * rng.standard_normal((60, 16)), rng.standard_normal((60, 16))
    sparse[7] = sparse[3] + 0.05 * rng.standard_normal(16)
    values = F.normalize(torch.tensor(np.concatenate([dense, sparse]), dtype=torch.float32), dim=1)
    embedding = Embedding(Folder(tmp_path / "x.parquet", [], {}, 120, 16, []), [], np.arange(120), values)
    assert values[63] @ values[67] < (values[:60] @ values[:60].T).median()
    for kind in ("flat", "hnsw"):
        assert dino.duplicates(embedding, index=kind) == [[63, 67]]
    same = Embedding(embedding.folder, [], np.arange(9), torch.cat([values[:1].expand(5, -1), values[60:64]]))
    assert dino.duplicates(same) == [[0, 1, 2, 3, 4]]


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
