"""Apple's GPUs, of which none was here: what needs no GPU, and everything on a device that is as strict."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import other_gpu
import processes
from dino import distributed
from dino.engine import parallel
from dino.machine import describe_device, measure_memory_in_use, measure_peak_memory, name_device
from drawing import draw_video
from helpers import draw_images, final_state, run_dino, tiny_flags

MPS = torch.device("mps")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("photos"))


def run(*commands: list[str]) -> None:
    """Commands one after the other in a process that has such a device."""
    words = [[str(word) for word in command] for command in commands]
    done = processes.run([sys.executable, other_gpu.__file__, json.dumps(words)])
    assert done.returncode == 0, done.stderr


def test_a_machine_without_one_says_so(monkeypatch):
    with pytest.raises(ValueError, match="PyTorch sees no GPU of Apple; use --device cpu or --device auto"):
        distributed.start("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert distributed.start("mps") == MPS
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it without torchrun"):
        distributed.start("mps")


def test_precision_there():
    assert parallel.choose_precision("auto", MPS) == "fp32"
    assert parallel.choose_precision("bf16", MPS) == "bf16"
    with pytest.raises(ValueError, match="precision is fp16 but the device is mps; use --precision fp32 or bf16"):
        parallel.choose_precision("fp16", MPS)


def test_its_name_and_memory(monkeypatch):
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 3)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5)
    assert (measure_memory_in_use(MPS), measure_peak_memory(MPS)) == (3, 5)
    assert name_device(MPS) == "Apple GPU (mps)"
    assert describe_device(MPS) == "1 x Apple GPU (mps)"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim__name": "muon", "method__targets": "sinkhorn", "head__batch_norm": True},
        {
            "optim__name": "sgd",
            "method__loss": "infonce",
            "method__targets": "none",
            "method__queue_size": 8,
            "recompute": "blocks",
            "accumulate": 2,
        },
        {"optim__name": "lars", "fit": "4GB"},
    ],
    ids=["paper", "muon, sinkhorn, BatchNorm", "infonce, in parts", "lars, fit"],
)
def test_a_run_there_is_the_run_here(photos, tmp_path, changes):
    flags = tiny_flags(data__path=photos, **changes)
    run(["train", *flags, "--out", tmp_path / "there"])
    assert run_dino("train", *flags, "--out", tmp_path / "here").returncode == 0
    there, here = (final_state(tmp_path / name) for name in ("there", "here"))
    assert there.keys() == here.keys()
    for name, value in here.items():
        torch.testing.assert_close(
            there[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_run_there_resumes_to_the_bit(photos, tmp_path):
    flags = tiny_flags(data__path=photos, log__checkpoint_minutes=1e-9)
    run(["train", *flags, "--out", tmp_path / "a"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    sorted((tmp_path / "b/checkpoints").iterdir())[-1].unlink()
    run(["train", *flags, "--out", tmp_path / "b", "--resume", "auto"])
    whole, resumed = (final_state(tmp_path / name) for name in "ab")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def draw_masks(folder: Path) -> list[str]:
    """Six images of noise with a bright half, which is their object; the options that name them."""
    rng = np.random.default_rng(0)
    for i in range(6):
        classes = np.zeros((32, 48), np.uint8)
        classes[:, 8 * (i % 3) : 8 * (i % 3) + 24] = 1
        pixels = rng.integers(0, 80, (32, 48, 3)) + 120 * classes[..., None]
        for kind, values in (("images", pixels), ("masks", classes)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(folder / kind / f"{i}.png")
    return ["--images", str(folder / "images"), "--masks", str(folder / "masks"), "--size", "32"]


def test_what_is_done_with_a_run_there(photos, tmp_path):
    """Commands end well, and figures are those of the CPU."""
    one, two = (str(sorted(photos.glob("*/*"))[i]) for i in (0, -1))
    assert run_dino("train", *tiny_flags(data__path=photos), "--out", tmp_path / "a").returncode == 0
    a, data = tmp_path / "a", ["--data", photos, "--val", photos]
    evaluations = [["eval", name, a, *data] for name in ("knn", "linear", "lowshot", "finetune")]
    evaluations.append(["eval", "retrieval", a, "--data", photos, "--whiten", photos])
    evaluations += [["eval", name, a, *draw_masks(tmp_path / "masked")] for name in ("segment", "masks")]
    draw_video(tmp_path / "clips", "one", count=3)
    evaluations.append(["eval", "davis", a, "--data", tmp_path / "clips", "--size", 96, "--queue", 2])
    for place in ("here", "there"):
        table = tmp_path / place / "x.parquet"
        commands = [[*command, "--json", tmp_path / place / f"{command[1]}.json"] for command in evaluations]
        commands += [["embed", a, photos, "--out", table], ["search", table, one], ["duplicates", table]]
        commands += [["attention", a, one, "--out", tmp_path / place], ["pca", a, one, "--out", tmp_path / place]]
        commands += [["match", a, one, two, "--out", tmp_path / place / "m.png"], ["report", a]]
        commands += [["figure", "tsne", a, "--data", photos, "--out", tmp_path / place / "t.png"]]
        commands += [["train", *tiny_flags(data__path=photos), "--init", a, "--out", tmp_path / place / "b"]]
        if place == "there":
            run(*commands)
        else:
            for command in commands[: len(evaluations)]:
                done = run_dino(*command)
                assert done.returncode == 0, done.stderr
    for command in evaluations:
        here, there = (json.loads((tmp_path / place / f"{command[1]}.json").read_text()) for place in ("here", "there"))
        assert there["figures"] == pytest.approx(here["figures"], abs=1e-3)
