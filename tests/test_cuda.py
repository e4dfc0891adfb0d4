"""Paths that need an NVIDIA GPU; skipped without one."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

import dino
from dino.data.decode import decode
from dino.data.device_decode import decode_jpegs
from dino.engine.log import read_metrics, read_quarantine
from dino.engine.train import Trainer
from dino.options import replace
from dino.options.train import TrainOptions
from drawing import TO_DEVICE, as_bytes, without_tables
from helpers import TINY, assert_same_bits, draw_images, final_state, run_dino, tiny_flags

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trains_on_a_gpu_in_every_precision(tmp_path, precision):
    images = draw_images(tmp_path / "images")
    options = replace(TrainOptions(), TINY | {"device": "cuda", "precision": precision, "data.num_workers": 2})
    run = dino.train(options, data=str(images), out=str(tmp_path / "run"))
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_gpu_and_cpu_losses_agree(tmp_path):
    images = draw_images(tmp_path / "images")
    losses = []
    for device in ("cpu", "cuda"):
        options = replace(TrainOptions(), TINY | {"device": device, "precision": "fp32", "log.every": 1})
        run = dino.train(options, data=str(images), out=str(tmp_path / device), stop_after=3)
        losses.append([line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)  # the renderers differ by rounding


def test_resume_on_a_gpu_is_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    images = draw_images(tmp_path / "images")
    # Views of one size: the gradient of interpolated positions is summed in any order.
    options = replace(TrainOptions(), TINY | {"device": "cuda", "precision": "fp32", "views.local_size": 32})
    whole = dino.train(options, data=str(images), out=str(tmp_path / "whole"))
    part = dino.train(options, data=str(images), out=str(tmp_path / "part"), stop_after=7)
    dino.train(resume=part, stop_after=1000)
    assert_same_bits(final_state(whole), final_state(part))


def test_compiled_steps_agree_and_are_compiled_once(tmp_path):
    """In processes of their own: shape checks are on in this one."""
    images, losses = draw_images(tmp_path / "images"), []
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        wanted = tiny_flags(device="cuda", precision="fp32", log__every=1, model__drop_path=0.2)
        environment = os.environ | {"TORCH_LOGS": "recompiles"}
        done = run_dino("train", "--data", images, "--out", tmp_path / name, *wanted, *flags, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("Recompiling function") <= 1  # the second of two networks that share their code
        losses.append([line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_fit_keeps_to_the_memory_given(tmp_path):
    images = draw_images(tmp_path / "images", 64)
    wanted = tiny_flags(
        device="cuda", batch_size=32, views__global_size=128, model__width=192, model__depth=8, epochs=1
    )
    peaks = []
    for name, flags in (("whole", []), ("fit", ["--fit", "300MB"])):
        done = run_dino("train", "--data", images, "--out", tmp_path / name, *wanted, *flags)
        assert done.returncode == 0, done.stderr
        peaks.append(read_metrics(tmp_path / name / "metrics.jsonl")[-2]["peak_memory_gb"])
    assert peaks[1] < 0.3 < peaks[0]


def test_the_gpu_decodes_the_files_and_leaves_broken_ones_to_us(tmp_path):
    """nvJPEG's pixels are not libjpeg's to the last level; which files are refused is the same."""
    pytest.importorskip("torchcodec")
    images, losses, bad = draw_images(tmp_path / "images"), [], []
    (images / "class0" / "003.jpg").write_bytes(without_tables((images / "class0" / "003.jpg").read_bytes()))
    for who in ("workers", "device"):
        wanted = {"device": "cuda", "precision": "fp32", "log.every": 1, "data.num_workers": 2, "data.decode": who}
        options = replace(TrainOptions(), TINY | wanted | {"data.max_bad_fraction": 0.5})
        run = dino.train(options, data=str(images), out=str(tmp_path / who), epochs=1)
        losses.append([line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line])
        bad.append([line["image"] for line in read_quarantine(run / "quarantine.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert bad[0] == bad[1] == ["class0/003.jpg"]


@pytest.mark.parametrize("name", TO_DEVICE)
def test_the_gpu_makes_about_the_pixels_that_we_do(name):
    pytest.importorskip("torchcodec")
    expected = torch.from_numpy(decode(TO_DEVICE[name])).int()
    (found,) = decode_jpegs([as_bytes(TO_DEVICE[name])], [tuple(expected.shape[:2])], torch.device("cuda"))
    difference = (found.cpu().permute(1, 2, 0).int() - expected).abs().float()
    assert difference.mean() < 3  # colors of 2 x 2 pixels may be spread otherwise


def test_steps_between_logs_wait_for_nothing(tmp_path, monkeypatch):
    """With CUDA's sync-debug mode on, a step that reads anything back from the device is an error."""
    images = draw_images(tmp_path / "images")
    options = replace(TrainOptions(), TINY | {"device": "cuda", "data.num_workers": 2, "log.every": 100})
    plain = Trainer.take_step

    def watched(self, batch):
        if self.step < 2:  # allocations and choices of kernels
            return plain(self, batch)
        try:
            torch.cuda.set_sync_debug_mode("error")
            return plain(self, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "take_step", watched)
    dino.train(options, data=str(images), out=str(tmp_path / "run"))


def test_knn_agrees_with_the_cpu(tmp_path, saved_model):
    images, found = draw_images(tmp_path / "images", 120), {}
    for device in ("cpu", "cuda"):
        environment = os.environ | {"DINO_CACHE": str(tmp_path / device)}  # features of its own
        flags = ["--data", images, "--k", 10, "--device", device, "--json", tmp_path / f"{device}.json"]
        done = run_dino("eval", "knn", saved_model, *flags, env=environment)
        assert done.returncode == 0, done.stderr
        found[device] = json.loads((tmp_path / f"{device}.json").read_text())["figures"]
    assert found["cuda"] == pytest.approx(found["cpu"], abs=10)  # of twelve images, one may be on the border


def test_fine_tunes_on_a_gpu(tmp_path, saved_model):
    flags = ["--epochs", 2, "--batch-size", 32, "--device", "cuda", "--json", tmp_path / "tuned.json"]
    done = run_dino("eval", "finetune", saved_model, "--data", draw_images(tmp_path / "images", 120), *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "tuned.json").read_text())["figures"].keys() >= {"imagenet_top1"}
