"""`dino bench` measures what a run does and adds up; the benchmarks' harness takes turns and writes what it says."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch

import processes
from dino.bench import advise, measure_parts, measure_seconds, measure_step
from dino.options.trainings import BenchOptions
from helpers import draw_images, run_dino, tiny_flags
from training import build_trainer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import harness  # noqa: E402  # pyright: ignore[reportMissingImports]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


def test_bench_adds_up_and_leaves_nothing_but_its_json(images, tmp_path):
    flags = tiny_flags(data__num_workers=1, model__drop_path=0.0)
    done = run_dino("bench", "--data", images, *flags, "--seconds", 1, "--json", "result.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["step"]) == {"normalize", "teacher", "student", "backward", "optimizer", "EMA", "other"}
    assert set(result["data"]) == {"decode", "render"}
    for parts in (result["data"], result["step"]):
        assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
        assert all(part["ms_per_image"] >= 0 for part in parts.values())
    for name in ("teacher", "student", "backward", "optimizer", "EMA"):
        assert result["step"][name]["ms_per_image"] > 0, name
    whole, parts = 1e3 / result["step_images_per_second"], sum(p["ms_per_image"] for p in result["step"].values())
    assert whole / 30 < parts < 30 * whole  # other work may have slowed the steps of either: of the right unit
    assert 2 <= result["images_measured"] <= result["batch_size"] == 4
    assert result["workers"] == 1
    assert result["precision"] == "fp32"
    gflops = result["gflop_per_image"] * result["step_images_per_second"]
    assert gflops / result["matrix_product_gflops_per_second"] == pytest.approx(result["share_of_matrix_product"])
    assert 0 < result["share_of_matrix_product"] < 10  # more than 1 where other work slowed the product
    assert "bottleneck" in result["advice"]
    assert "--" in result["advice"]
    for said in ("decode", "backward", "matrix-product rate", result["advice"]):
        assert said in done.stdout
    assert "3/3" in done.stderr  # progress


@pytest.mark.slow
def test_flops_are_those_of_the_model(images, tmp_path):
    """Twice the width of the head's last layer adds 2 K d for each view of the teacher, and thrice that of the student."""
    counted, epochs = {}, {"optim__warmup_epochs": 1.0, "method__teacher_temp_epochs": 1.0}
    for out_dim in (64, 128):
        small = {"head__out_dim": out_dim, "views__num_local": 0, "batch_size": 2} | epochs
        counted[out_dim] = 1e9 * measure_step(build_trainer(images, tmp_path, **small), 0.01)["gflop_per_image"]
    # 2 teacher views forward; 2 student views forward and backward to inputs and weights; the loss's own products
    products = 2 * 64 * 16 * (2 + 3 * 2)
    assert products <= counted[128] - counted[64] <= 1.5 * products


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no_such_recipe"], "no_such_recipe"),
        (["--data", "{images}", "--batch-size", "4000"], "only"),
        (["--data", "{images}", "--json", "missing/result.json"], "--json missing/result.json cannot be written"),
        (["--data", "{images}", "--json", "{images}"], "is a folder; give the name of a file in it"),
        (["--data", "{images}", "--batch-size", "4", "--accumulate", "5"], "use --accumulate 4 or less"),
        (["--data", "{images}", "--compile"], "install a C++ compiler such as g++, or leave out --compile"),
        (["{images}"], "dino bench --data"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said, images, tmp_path):
    no_compiler = os.environ | {
        "CXX": "/nonexistent",
        "CC": "/nonexistent",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "i"),
    }
    arguments = [a.replace("{images}", str(images)) for a in arguments]
    done = run_dino("bench", *arguments, cwd=tmp_path, env=no_compiler if "--compile" in arguments else None)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("dino: ")
    assert said in last
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.iterdir() if path.name != "i"]


def test_no_time_is_refused():
    with pytest.raises(ValueError, match="seconds is 0"):
        BenchOptions(seconds=0)
    with pytest.raises(ValueError, match="seconds is inf"):
        BenchOptions(seconds=math.inf)


def test_fewer_images_come_in_parts_of_the_same_size(images, tmp_path):
    """Else a step in parts would be measured with parts of an image or two, which no run has."""
    subject = build_trainer(images, tmp_path, accumulate=3, optim__warmup_epochs=1.0, method__teacher_temp_epochs=1.0)
    assert measure_step(subject, 1e-6)["images_measured"] == 2
    assert subject.training_step.split.parts == 1


def test_advice_names_the_bottleneck_and_the_option(images, tmp_path):
    parts = {"teacher": 2.0, "student": 3.0, "backward": 6.0, "optimizer": 0.1, "EMA": 0.1}
    step = {"images_per_second": 100.0, "share_of_matrix_product": 0.6, "parts": parts}
    data = {"decode": 4.0, "render": 2.0}

    def asked(loader: float, parts: dict[str, float] = parts, **changes: object) -> str:
        return advise(build_trainer(images, tmp_path, **changes), data, loader, step | {"parts": parts})

    assert "--data.num-workers" in asked(300.0)  # 0 workers: rendering takes a quarter of the time
    assert "mostly decoding" in asked(50.0, data__num_workers=512)
    assert "50 images/s from 512 workers" in asked(50.0, data__num_workers=512)
    assert "--views.num-local" in asked(1000.0)
    assert "--views.global-size" in asked(1000.0, views__num_local=0)
    assert "--recompute nothing" in asked(1000.0, recompute="elementwise")
    assert "--batch-size" in asked(1000.0, parts | {"optimizer": 6.0})
    step["share_of_matrix_product"] = 0.2
    assert "--precision fp32" in asked(1000.0, precision="bf16")
    assert "from 1 worker where" in asked(50.0, data__num_workers=1)


def test_parts_of_a_step_are_timed_and_then_no_longer(images, tmp_path):
    subject = build_trainer(images, tmp_path, optim__warmup_epochs=1.0, method__teacher_temp_epochs=1.0)
    parts, step = measure_parts(subject, subject.batches[0]), subject.training_step
    assert list(parts) == ["normalize", "teacher", "student", "backward", "optimizer", "EMA", "other"]
    assert min(parts.values()) >= 0
    assert parts["backward"] > parts["EMA"] > 0
    assert step.time is contextlib.nullcontext
    step.compute_gradients = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        measure_parts(subject, subject.batches[0])
    assert step.time is contextlib.nullcontext


def test_turns_alternate_and_ratios_are_of_pairs():
    order: list[str] = []
    took = harness.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [len(times) for times in took.values()] == [3, 3]
    assert harness.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == {"median": 3.0, "min": 2.0, "max": 4.0, "count": 3}
    assert measure_seconds(lambda: time.sleep(0.02), torch.device("cpu")) >= 0.02


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("", "step-cpu.json"),
        ("--device cuda", "step-cuda.json"),
        ("--arch b --threads 3 --reference some/where", "step-cpu-arch-b-threads-3-reference.json"),
    ],
)
def test_results_of_other_devices_and_options_go_to_other_files(flags, name):
    parser = harness.parser(None, "step")
    parser.add_argument("--arch", default="a")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reference", type=Path)
    threads = torch.get_num_threads()
    assert harness.parse(parser, flags.split()).json == harness.RESULTS / name
    torch.set_num_threads(threads)


def test_peak_bytes_counts_what_is_alive():
    assert harness.peak_bytes(lambda: torch.zeros(1000) + 1, torch.device("cpu")) == 8000


@pytest.mark.slow
def test_step_and_memory_benchmarks_write_their_figures(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    for name in ("step", "memory"):
        flags = f"--arch vit_nano --prototypes 64 --pairs 1 --threads 1 --json {tmp_path / name}.json"
        flags += " --batch 2" if name == "step" else " --images 4 8"
        monkeypatch.setattr(sys, "argv", [name, *flags.split()])
        importlib.import_module(name).main()
    torch.set_num_threads(threads)
    step, memory = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("step", "memory"))
    for result in (step, memory):
        assert result["device"]
        assert result["peer"] == "the same mathematics written plainly"
    assert step["ratio"]["min"] <= step["ratio"]["median"] <= step["ratio"]["max"]
    assert 0 < step["share_of_matrix_product"]["median"] < 1
    names = ("ours, blocks", "ours, in 2 parts", "ours, elementwise", "ours", "plain")
    peaks = [memory[name]["bytes_8_images"] for name in names]
    assert peaks == sorted(peaks)


def test_a_batch_that_does_not_fit_a_gpu_is_halved(monkeypatch):
    """No more is lost of a benchmark's slot than the try."""
    step, tried = importlib.import_module("step"), []

    def measure(_: str, batch: int, *rest: object) -> dict[str, int]:
        tried.append(batch)
        if batch > 16:
            raise torch.OutOfMemoryError("out of memory")
        return {"batch": batch}

    monkeypatch.setattr(step, "measure", measure)
    open_ones = dict.fromkeys(("compile", "patch", "reference", "recompute"))
    options = argparse.Namespace(device="cpu", arch="", prototypes=64, pairs=1, precision="bf16", **open_ones)
    assert step.measure_what_fits(64, options) == {"batch": 16}
    assert tried == [64, 32, 16]


def test_rendering_is_a_share_of_what_the_machine_can():
    found = importlib.import_module("render").measure(2, 1, torch.device("cpu"))
    canvas = 375 * 504 * 3  # rows of whole words
    assert canvas <= found["bytes_sent_per_image"] < canvas + 100
    # Columns first, then rows, of the two products of each of 2 views of 224 and 8 of 96 pixels.
    products = sum(v * 2 * 3 * (375 * 504 * s + 375 * s * s) for v, s in ((2, 224), (8, 96)))
    blur_too = 1.2 * products
    assert products <= 1e9 * found["gflop_per_image"] < blur_too
    assert 0 < found["share_of_matrix_product"]["median"] < 1
    assert found["images_per_second"]["median"] * found["seconds"]["median"] == pytest.approx(2)


def test_training_from_files_is_measured_against_a_peer(images, tmp_path):
    command = [
        sys.executable,
        str(BENCHMARKS / "train.py"),
        "--images",
        str(images),
        "--json",
        str(tmp_path / "t.json"),
    ]
    flags = "--arch vit_nano --prototypes 64 --batch 2 --steps 1 --pairs 1 --workers 0 --threads 1"
    done = processes.run([*command, *flags.split()])
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "t.json").read_text())
    rates = {name: rate["median"] for name, rate in result["images_per_second"].items()}
    assert set(rates) == {"ours", "in memory", "peer"}
    assert result["ratio"]["median"] == pytest.approx(rates["ours"] / rates["peer"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_benchmarks_refuse_a_machine_without_one(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--json", str(tmp_path / "gpu.json")]
    done = processes.run(command)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_gpu_benchmarks_go_on_with_what_is_missing(tmp_path):
    """Each part in its own process: one that fails is recorded, leaves the others alone, and is tried again."""
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.jpg").write_bytes(b"no picture")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--json", str(tmp_path / "gpu.json")]

    def parts(*flags: str) -> tuple[dict, str]:
        done = processes.run([*command, *flags])
        assert done.returncode == 0, done.stderr
        for line in ("learning curves", "tests"):
            assert line in done.stdout  # a line for every part, measured or not
        return json.loads((tmp_path / "gpu.json").read_text())["parts"], done.stderr

    first, _ = parts("--parts", "features", "rendering", "--images", str(flat))
    assert set(first) == {"features", "rendering"}
    assert "failed" in first["features"]
    assert first["rendering"]["images_per_second"]["median"] > 0
    second, said = parts("--parts", "rendering", "features")
    assert second["rendering"] == first["rendering"]
    assert "rendering ..." not in said
    assert second["features"]["share_of_forward"]["median"] > 0
    _, said = parts("--parts", "step of S/16", "--minutes", "0.1")
    assert "the same command goes on with what is missing" in said


def test_gpu_parts_find_what_is_given_relative_to_where_they_were_started(tmp_path, monkeypatch):
    """They run in the project's folder."""
    gpu = importlib.import_module("gpu")
    monkeypatch.chdir(tmp_path)
    options = argparse.Namespace(device="cpu", reference=Path("checkout"))
    words = gpu.command("training from files", options, Path("photos"), Path("/result.json"))
    given = dict(itertools.pairwise(words))
    assert given["--reference"] == str(tmp_path / "checkout")
    assert given["--images"] == str(tmp_path / "photos")
