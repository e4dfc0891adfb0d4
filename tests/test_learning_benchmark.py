"""`benchmarks/learning.py` trains, stops, goes on and measures; its table, floors and sets are what they say."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from PIL import Image

import processes
from dino.data.open import open_training_pair
from dino.engine.log import read_metrics
from dino.options import replace
from dino.options.toml import to_dict
from dino.options.train import TrainOptions
from helpers import TINY

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import learning_data  # noqa: E402  # pyright: ignore[reportMissingImports]
import learning_figures  # noqa: E402  # pyright: ignore[reportMissingImports]
import learning_table  # noqa: E402  # pyright: ignore[reportMissingImports]


@pytest.fixture
def experiment(tmp_path) -> Path:
    """One set of drawn scenes, and two settings."""
    (tmp_path / "settings").mkdir()
    (tmp_path / "sets.toml").write_text('[scenes]\ntrain = "scenes:100"\n')
    for name, epochs in (("base", 16), ("short", 1)):
        write_setting(tmp_path, name, epochs=epochs)
    return tmp_path


def write_setting(folder: Path, name: str, **changes: object) -> None:
    (folder / "settings" / f"{name}.toml").write_text(
        tomli_w.dumps(to_dict(replace(TrainOptions(), TINY | {"log.knn_every": 8.0} | changes)))
    )


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, str(BENCHMARKS / "learning.py"), str(folder), "--seeds", "1", "--jobs", "1", *more]


@pytest.mark.slow
def test_an_experiment_stops_goes_on_and_ends_in_a_table(experiment):
    base, short = (experiment / "out" / "scenes" / name / "seed-0" for name in ("base", "short"))
    for step, kill in ((20, signal.SIGTERM), (120, signal.SIGKILL)):
        with processes.start(command(experiment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as stopped:
            while not any(line["step"] > step for line in read_metrics(base / "run" / "metrics.jsonl")):
                assert stopped.poll() is None, stopped.communicate()
                time.sleep(0.05)
            stopped.send_signal(kill)
            said = stopped.communicate(timeout=60)[1]
        assert stopped.returncode == (130 if kill == signal.SIGTERM else -kill)
        assert ("the same command goes on" in said) == (kill == signal.SIGTERM)
        assert not (base / "figures.json").exists()

    done = processes.run(command(experiment))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Resuming after step" in (base / "train.log").read_text()
    table = (experiment / "out" / "table.md").read_text()
    assert done.stdout.count(table) == 1
    assert "| linear |" in table
    for row in ("| base | 1 |", "| short | 1 |", "| untrained base |", "| raw pixels, 16x16 |", "| majority class |"):
        assert row in table
    found, lines = json.loads((base / "figures.json").read_text()), read_metrics(base / "run" / "metrics.jsonl")
    checks = [line["knn20_top1"] for line in lines if "knn20_top1" in line]
    assert found["curve"]["knn20_top1"] == checks
    assert len(checks) == 3
    assert found["curve"]["minutes"] == sorted(found["curve"]["minutes"])
    ends = [found[state]["knn20_top1"] for state in ("untrained", "trained")]
    assert ends == pytest.approx(
        [checks[0], max(checks[1:])]
    )  # the network that the run began with, and the best teacher
    assert (experiment / "out" / "curves.png").stat().st_size > 10_000

    before = {file: file.stat().st_mtime_ns for file in experiment.rglob("*.json")}
    write_setting(experiment, "broken", batch_size=400)
    write_setting(experiment, "short", epochs=2)  # after it was run
    again = processes.run(command(experiment))
    assert again.returncode == 1
    assert "batch_size is 400 but there are only 100 images" in again.stdout
    assert f"{short} was begun with other options" in again.stdout
    assert "Failed:" in (experiment / "out" / "table.md").read_text()
    assert {file: file.stat().st_mtime_ns for file in before} == before  # nothing finished was done again


@pytest.mark.parametrize(
    ("sets", "flags", "said"),
    [
        ("[a]\nval = 'x'\n", [], "needs the path 'train'"),
        ("[a]\ntrain = 'x'\ntests = 'y'\n", [], "tests"),
        ("[a]\ntrain = 'x'\n", ["--sets", "b"], "there is no set 'b'"),
        ("[a]\ntrain = 'x'\n", ["--settings", "shrt"], "Did you mean 'short'"),
        ("[a]\ntrain = 3\n", [], "has 3 in place of a path"),
        ("[a\n", [], "is not a valid TOML file"),
        (None, [], "there is no"),
    ],
)
def test_experiments_that_cannot_be_meant_are_refused(experiment, sets, flags, said):
    (experiment / "sets.toml").unlink()
    if sets is not None:
        (experiment / "sets.toml").write_text(sets)
    done = processes.run(command(experiment, *flags))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert not (experiment / "out").exists()


def test_a_difference_counts_from_two_standard_errors():
    base = [30.0, 31.0, 32.0]  # each side: variance 1, so the difference has a standard error of sqrt(2 / 3) = 0.816
    for shift, verdict in ((1.6, "not clear"), (1.7, "better"), (-1.7, "worse")):
        said = learning_table.format_difference([value + shift for value in base], base)
        assert said == f"{shift:+.1f} (SE 0.8): {verdict}"
    assert learning_table.format_difference([35.0], base) == "+4.0"  # one seed proves nothing
    assert learning_table.format_mean(base) == "31.0 ± 1.0"


def test_a_table_has_the_columns_that_were_measured():
    run = {"trained": {"jaccard_best_head": 50.0, "minutes": 2.0}, "untrained": {"jaccard_best_head": 20.0}}
    text = learning_table.format_set(
        "photos", {"base": [run | {"collapse": True}]}, {"ellipse": {"jaccard_best_head": 40.0}}
    )
    assert [line.split(" | ")[0].strip("| ") for line in text.splitlines()] == [
        *("photos", "---", "base (1 collapsed)", "untrained base", "ellipse"),
    ]
    assert text.splitlines()[0] == "| photos | seeds | Jaccard best head | minutes | Jaccard best head against base |"
    assert text.splitlines()[2].startswith("| base (1 collapsed) | 1 | 50.0 | 2.0 |")


def test_floors_see_pixels_without_brightness_and_colors_without_places():
    image = np.random.default_rng(0).integers(0, 200, (40, 30, 3)).astype(np.uint8)
    moved = np.roll(image, 7, axis=0)
    pixels, colors = learning_figures.describe_pixels, learning_figures.describe_colors
    np.testing.assert_allclose(pixels(image + np.uint8(40)), pixels(image), atol=1)
    assert np.abs(pixels(moved) - pixels(image)).max() > 10
    np.testing.assert_array_equal(colors(moved), colors(image))
    assert (colors(image + np.uint8(40)) @ colors(image)) < 0.9
    assert colors(image) @ colors(image) == pytest.approx(1)


def encode(seed: int, gray: bool = False) -> bytes:
    pixels, file = np.random.default_rng(seed).integers(0, 255, (16, 16, 3)).astype(np.uint8), io.BytesIO()
    Image.fromarray(pixels[..., 0] // 128 * 255 if gray else pixels).save(file, "PNG" if gray else "JPEG")
    return file.getvalue()


def test_sets_are_made_from_archives_as_dino_reads_them(tmp_path):
    archives = tmp_path / "archives"
    archives.mkdir()
    with tarfile.open(archives / "cifar10.tar.xz", "w:xz") as tar:
        for name in (
            "train/cat/0000",
            "train/cat/0100",
            "train/dog/0499",
            "train/dog/0500",
            "test/cat/0099",
            "test/dog/0100",
        ):
            entry, content = tarfile.TarInfo(f"cifar10/{name}.jpg"), encode(0)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    truth = {
        "imlist": ["a", "b", "c"],
        "imclass": ["milk", "juice", None],
        "qimlist": ["d", "e"],
        "qclass": ["juice", "milk"],
    }
    with zipfile.ZipFile(archives / "grocery_retrieval_dev.zip", "w") as images:
        images.writestr("grocery_retrieval_dev/gnd.json", json.dumps(truth))
        for number, name in enumerate("abcde"):
            images.writestr(f"grocery_retrieval_dev/jpg/{name}.jpg", encode(number))
    out = tmp_path / "sets"
    done = processes.run([sys.executable, str(BENCHMARKS / "learning_data.py"), str(archives), str(out)])
    assert done.returncode == 0, done.stderr
    sets = tomllib.loads((out / "sets.toml").read_text())
    assert set(sets) == {"cifar10-5000", "cifar10-1000", "grocery", "scenes"}
    assert learning_data.prepare(archives, out) == sets  # nothing to do
    names = [sorted(str(path.relative_to(out / "cifar10")) for path in (out / "cifar10").rglob("*.jpg"))]
    expected = ["train-1000/cat/0000", "train-5000/cat/0000", "train-5000/cat/0100", "train-5000/dog/0499"]
    assert names == [[f"{name}.jpg" for name in ("test/cat/0099", "test/dog/0100", *expected, "val/cat/0099")]]

    grocery = {
        f"data.{name}": sets["grocery"][key] for name, key in (("path", "train"), ("val", "val"), ("labels", "labels"))
    }
    options = replace(TrainOptions(), grocery)
    train, test = open_training_pair(options, None)
    assert test is not None
    assert (len(train), len(test), train.classes) == (3, 2, ("juice", "milk"))
    pair = learning_figures.open_labeled(options)
    assert pair is not None
    assert [len(part) for part in pair] == [2, 2]  # without the distractor, which is trained on
