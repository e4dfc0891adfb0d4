"""Embeddings through the real command line: killed and gone on with, over ranks, read by others, and refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dino
import processes
from dino.cli import main
from dino.data.image_files import open_source
from dino.data.open import open_images
from dino.features.embedding import Folder
from dino.features.extract import extract
from dino.weights import fingerprint
from helpers import dino_command, draw_images, draw_images_and_a_broken_one, run_dino

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COUNT, SHARD = 120, 2


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    return draw_images_and_a_broken_one(tmp_path_factory.mktemp("many"), COUNT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, many, saved_model) -> Folder:
    """An embedding that nothing interrupted."""
    return dino.embed(
        str(saved_model), str(many), tmp_path_factory.mktemp("whole") / "x.parquet", shard=SHARD, device="cpu"
    )


def rows(folder: Path):
    return pq.read_table(folder).replace_schema_metadata(None)


def assert_same_rows(out: Path, other: Path) -> None:
    """The same images once each in the same order; features to rounding, which differs with the number of threads."""
    a, b = rows(out), rows(other)
    assert a.drop_columns(["feature"]).equals(b.drop_columns(["feature"]))
    found, expected = (np.stack(table["feature"].to_pylist()) for table in (a, b))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_are_the_features_of_the_readable_images_in_order(whole, many, saved_model):
    source, model = open_source(str(many)), dino.load(saved_model)
    expected, table = extract(model, source, 32, batch_size=SHARD), rows(whole.path)
    assert table["index"].to_pylist() == expected.indices.tolist()
    assert table["path"].to_pylist() == [source.name(i) for i in expected.indices.tolist()]
    found = np.array(table["feature"].to_pylist(), np.float32)
    torch.testing.assert_close(torch.from_numpy(found), expected.values, rtol=0, atol=0)
    assert [name for name, _ in whole.bad] == ["class1/broken.jpg"]
    assert whole.rows == COUNT - 1
    assert len(whole.files) == COUNT // SHARD
    assert whole.about["model_sha256"] == fingerprint(model)


def test_killed_at_several_moments_and_gone_on_with_it_has_the_same_rows(tmp_path, whole, many, saved_model):
    out = tmp_path / "x.parquet"
    command = dino_command("embed", saved_model, many, "--out", out, "--shard", SHARD, "--device", "cpu")
    kept: dict[Path, int] = {}
    for moment in (1, 14, 35):  # files written, of 60
        process = processes.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while len(list(out.glob("*.parquet"))) < moment and process.poll() is None:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        written = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
        assert moment <= len(written) < COUNT // SHARD
        assert kept.items() <= written.items()  # nothing is done twice
        kept = written
        if moment == 14:
            abandoned = out / ".part-000020.parquet.1.tmp"
            abandoned.write_bytes(b"half a shard")
            os.utime(abandoned, (1e9, 1e9))
            with pytest.raises(ValueError, match=r"incomplete, \d+ of 60 shards"):
                Folder.open(out)
    done = run_dino(*command[3:])
    assert done.returncode == 0, done.stderr
    assert f"{COUNT - 1} features of 96 numbers, 60 files" in done.stdout
    assert "1 images could not be read" in done.stderr
    assert "class1/broken.jpg: not an image" in done.stderr
    assert_same_rows(out, whole.path)
    assert not abandoned.exists()


def test_two_ranks_write_what_one_does(tmp_path, whole, many, saved_model):
    out = tmp_path / "x.parquet"
    done = run_dino("embed", saved_model, many, "--out", out, "--shard", SHARD, "--device", "cpu", ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("119 features") == 1
    assert_same_rows(out, whole.path)


def test_a_damaged_shard_is_named_and_written_again(tmp_path, whole, many, saved_model):
    shutil.copytree(whole.path, out := tmp_path / "x.parquet")
    shard = out / "part-000003.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"part-000003.parquet is damaged or cut short"):
        Folder.open(out)
    dino.embed(str(saved_model), str(many), out, shard=SHARD, device="cpu")
    assert_same_rows(out, whole.path)


def test_a_bit_that_flipped_is_noticed(tmp_path, whole):
    shutil.copytree(whole.path, out := tmp_path / "x.parquet")
    shard = out / "part-000003.parquet"
    content = bytearray(shard.read_bytes())
    features = np.array(pq.read_table(shard)["feature"].to_pylist(), np.float32).tobytes()
    content[content.index(features) + 100] ^= 255
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"part-000003.parquet is damaged or cut short"):
        Folder.open(out).read()


def alter_column(name: str, values: object):
    return lambda table, about: (table.set_column(table.column_names.index(name), name, values), about)


@pytest.mark.parametrize(
    ("alter", "text"),
    {
        "no JSON": (lambda table, about: (table, "{"), "holds damaged metadata"),
        "no object": (lambda table, about: (table, "[]"), "holds damaged metadata"),
        "deep": (lambda table, about: (table, "[" * 100_000), "holds damaged metadata"),
        "a key is gone": (
            lambda table, about: (table, {k: v for k, v in about.items() if k != "bad"}),
            "damaged metadata",
        ),
        "no size": (lambda table, about: (table, about | {"size": 0}), "its size is not as"),
        "a size that is text": (lambda table, about: (table, about | {"size": "32"}), "its size is not as"),
        "a pooling": (lambda table, about: (table, about | {"pooling": ["cls"]}), "its pooling is not as"),
        "no shards": (lambda table, about: (table, about | {"shards": None}), "its shards is not as"),
        "a model": (lambda table, about: (table, about | {"model": 3}), "its model is not as"),
        "bad images": (lambda table, about: (table, about | {"bad": [["a"]]}), "its bad is not as"),
        "no paths": (lambda table, about: (table.drop_columns(["path"]), about), "its path is not as"),
        "two paths": (lambda table, about: (table.append_column("path", table["path"]), about), "its path is not as"),
        "paths are numbers": (alter_column("path", [[1, 2]]), "its path is not as"),
        "no features": (lambda table, about: (table.drop_columns(["feature"]), about), "its feature is not as"),
        "features are text": (alter_column("feature", [["a", "b"]]), "its feature is not as"),
        "an index is text": (alter_column("index", [["a", "b"]]), "its index is not as"),
        "an index is missing": (alter_column("index", [[0, None]]), "holds empty values"),
        "an index is too large": (alter_column("index", [[0, 10**6]]), "names images outside of its data"),
        "an index is below 0": (alter_column("index", [[0, -1]]), "names images outside of its data"),
        "a path is missing": (alter_column("path", [["a", None]]), "holds empty values"),
        "no rows": (lambda table, about: (table.slice(0, 0), about), "holds no features"),
    }.values(),
)
def test_an_altered_shard_is_one_sentence(alter, text, whole, tmp_path, capsys):
    table, about = alter(pq.read_table(whole.files[0]), whole.about)
    said = about if isinstance(about, str) else json.dumps(about)
    pq.write_table(table.replace_schema_metadata({"dino": said}), tmp_path / "x.parquet")
    assert main(["outliers", str(tmp_path / "x.parquet"), "--k", "1"]) == 2
    complaint = capsys.readouterr().err
    assert text in complaint
    assert len(complaint.splitlines()) == 1


def test_features_that_are_not_finite_are_refused(whole, saved_model, tmp_path):
    """Stored ones, those of weights, and those that a sound file's weights compute. All name the model."""
    table = pq.read_table(whole.files[0])
    values = np.array(table["feature"].to_pylist(), np.float32)
    values[1, 5] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    pq.write_table(table.set_column(table.column_names.index("feature"), "feature", column), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=f"are not finite .* made by the model {saved_model}"):
        Folder.open(tmp_path / "x.parquet").read()
    shutil.copytree(saved_model, model := tmp_path / "model")
    state = load_file(model / "teacher.safetensors")
    state["norm.bias"] = torch.full_like(state["norm.bias"], 3e38)
    save_file(state | {"norm.weight": 3e38 * torch.ones_like(state["norm.weight"])}, model / "teacher.safetensors")
    with pytest.raises(ValueError, match=f"the model {model} computes numbers that are not finite"):
        dino.embed(model, "scenes:3", tmp_path / "e", device="cpu")
    save_file(state | {"norm.weight": float("nan") * state["norm.weight"]}, model / "teacher.safetensors")
    with pytest.raises(
        ValueError, match=rf"{model} holds numbers that are not finite .* in 1 of \d+ tensors \(norm.weight\)"
    ):
        dino.load(model)
    broken = dino.load(saved_model)
    broken.norm.weight.data *= float("nan")
    with pytest.raises(ValueError, match=f"{saved_model} holds numbers that are not finite"):
        dino.evaluate("knn", broken, data=str(tmp_path))


def test_paths_may_be_given_as_such(many, saved_model, tmp_path):
    out = dino.embed(saved_model, many, tmp_path / "x.parquet", shard=64, device="cpu").path
    found = dino.search(out, many / "class0" / "000.jpg", 1, model=saved_model, device="cpu")
    assert found.paths == [["class0/000.jpg"]]
    assert dino.DinoFeatures(saved_model, device="cpu").fit_transform([many / "class0" / "000.jpg"]).shape == (1, 96)


def test_one_row_is_searched_and_has_no_others(saved_model, tmp_path, capsys):
    one = draw_images(tmp_path / "one", 1)
    out = str(dino.embed(saved_model, one, tmp_path / "x.parquet", device="cpu").path)
    assert main(["search", out, str(one / "class0" / "000.jpg"), "--k", "5", "--index", "ivfpq"]) == 0
    assert main(["duplicates", out]) == 0
    assert "0 of 1 images are in 0 groups" in capsys.readouterr().out
    assert main(["outliers", out]) == 2
    assert "holds one image only" in capsys.readouterr().err


def test_two_ranks_refuse_with_one_sentence(tmp_path, whole, many, saved_model):
    done = run_dino("embed", saved_model, many, "--out", whole.path, "--pooling", "gem", "--device", "cpu", ranks=2)
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("dino: ")]
    assert "holds another embedding, whose pooling is cls and not gem" in said


def test_memory_holds_one_shard(tmp_path, saved_model):
    """When an image is read, all shards before its own are on the disk."""
    out, source = tmp_path / "x.parquet", open_source(str(draw_images(tmp_path / "photos", 12)))
    read = source.read

    def watched(index: int) -> np.ndarray:
        assert len(list(out.glob("*.parquet"))) == index // 3
        return read(index)

    source.read = watched
    assert dino.embed(dino.load(saved_model), source, out, shard=3).rows == 12


@pytest.mark.parametrize(("pooling", "each", "dim"), [("average", 1, 96), ("gem", 1, 96), ("patches", 16, 96)])
@pytest.mark.parametrize("fp16", [False, True])
def test_pandas_polars_and_duckdb_read_it(tmp_path, saved_model, pooling, each, dim, fp16):
    pandas, polars, duckdb = map(pytest.importorskip, ("pandas", "polars", "duckdb"))
    out = tmp_path / "x.parquet"
    written = dino.embed(str(saved_model), "scenes:5", out, pooling, fp16=fp16, shard=2, device="cpu")
    assert (written.rows, written.dim) == (5 * each, dim)
    truth = extract(dino.load(saved_model), open_images("scenes:5"), 32, pooling=pooling)
    expected, tolerance = truth.values.reshape(-1, dim).numpy(), 2e-3 if fp16 else 1e-5
    columns = ["path", "index", *(["patch"] if each > 1 else []), "feature"]
    a, b = pandas.read_parquet(out), polars.read_parquet(out)
    assert list(a.columns) == b.columns == columns
    np.testing.assert_allclose(np.stack(a["feature"]).astype(np.float32), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.stack(b["feature"].to_list()), expected, rtol=tolerance, atol=tolerance)
    c = duckdb.sql(f"select * from '{out}/*.parquet' order by index" + (", patch" if each > 1 else "")).fetchall()
    np.testing.assert_allclose([row[-1] for row in c], expected, rtol=tolerance, atol=tolerance)
    assert a["index"].tolist() == b["index"].to_list() == [row[1] for row in c] == np.repeat(range(5), each).tolist()
    assert b.schema["feature"] == polars.Array(polars.Float16 if fp16 else polars.Float32, dim)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere", "{photos}"], "there is no run, weight file or release 'nowhere'"),
        (["{model}", "{photos}/nothing"], "does not exist"),
        (["{model}", "{photos}", "--shard", "0"], "shard is 0; it must be at least 1."),
        (["{model}", "{photos}", "--out", "{photos}"], "holds class0, which is no part of an embedding"),
        (["{model}", "{photos}", "--out", "{photos}/class0/000.jpg"], "cannot be written (File exists)"),
        (["{model}", "{photos}", "--out", "{whole}"], "holds another embedding, whose data_sha256 is"),
        (["{model}", "{many}", "--out", "{whole}", "--shard", "3"], "whose shard is 2 and not 3"),
        (["{model}", "{many}", "--out", "{whole}", "--pooling", "gem", "--shard", "2"], "pooling is cls and not gem"),
        (["{model}", "{broken}"], "none of the 1 images can be read, first broken.jpg: not an image"),
    ],
)
def test_misuse_is_one_sentence(arguments, text, photos, many, whole, saved_model, tmp_path, capsys):
    (broken := tmp_path / "broken").mkdir()
    shutil.copy(many / "class1" / "broken.jpg", broken)
    named = {"photos": photos, "model": saved_model, "whole": whole.path, "many": many, "broken": broken}
    given = [argument.format(**named) for argument in arguments]
    given += [] if "--out" in given else ["--out", str(tmp_path / "x.parquet")]
    assert main(["embed", *given, "--device", "cpu"]) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert text in complaint


def test_what_is_not_installed_is_named(monkeypatch, saved_model, photos, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main(["embed", str(saved_model), str(photos), "--out", str(tmp_path / "x.parquet")]) == 2
    assert (
        capsys.readouterr().err == "dino: embeddings need PyArrow; install it with: pip install 'dino-vision[search]'\n"
    )


def test_a_step_of_a_pipeline(photos, saved_model):
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    source, model = open_source(str(photos)), dino.load(saved_model)
    paths = [photos / source.name(i) for i in range(len(source))]
    pipeline = make_pipeline(dino.DinoFeatures(str(saved_model), device="cpu"), LogisticRegression())
    assert pipeline.fit(paths, source.labels).score(paths, source.labels) > 0.9
    expected = extract(model, source, 32).values.numpy()
    step = pipeline[0]
    np.testing.assert_allclose(step.transform(paths), expected, atol=1e-6)
    np.testing.assert_allclose(step.transform([source.read(i) for i in range(len(source))]), expected, atol=1e-6)
    assert list(step.get_feature_names_out())[:2] == ["dinofeatures0", "dinofeatures1"]
    assert dino.DinoFeatures(model, "average").fit_transform(np.zeros((2, 40, 50, 3), np.uint8)).shape == (2, 96)
    with pytest.raises(ValueError, match=r"1 of 2 images cannot be read, first .*nothing.jpg"):
        step.transform([paths[0], photos / "nothing.jpg"])
    with pytest.raises(ValueError, match=r"an array float64 \[5\], where uint8 \[h, w, 3\] is an image"):
        step.transform(np.zeros((4, 5)))
    with pytest.raises(ValueError, match="0 images"):
        step.transform([])


def test_it_is_an_estimator(saved_model):
    """scikit-learn's checks hold as far as they apply: it says itself that most need rows of numbers."""
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    from sklearn.exceptions import SkipTestWarning

    step = dino.DinoFeatures(str(saved_model), device="cpu")
    with pytest.warns(SkipTestWarning, match="Can't test estimator DinoFeatures"):
        found = checks.check_estimator(step)
    assert {check["status"] for check in found} == {"passed"}
    for name in (
        "check_no_attributes_set_in_init",
        "check_get_params_invariance",
        "check_set_params",
        "check_parameters_default_constructible",
        "check_mixin_order",
        "check_estimator_repr",
    ):
        getattr(checks, name)("DinoFeatures", step)


def test_nothing_of_the_users_in_the_folder_is_deleted(saved_model, photos, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / ".notes.tmp").write_text("precious")
    with pytest.raises(ValueError, match=r"holds \.notes\.tmp, which is no part of an embedding"):
        dino.embed(saved_model, photos, out, device="cpu")
    assert (out / ".notes.tmp").read_text() == "precious"
