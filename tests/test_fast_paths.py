"""Every fast way to take a step against the plain one in float64: loss, gradients and center.

Plain is the peer of benchmarks/step.py: whole attention of whole blocks, one softmax per pair of views. Its stochastic
depth computes what it drops. Compiled networks: tests/test_compile.py; thirty steps of the reference: tests/test_method.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dino.data.image_files import open_source
from dino.engine.step import Split
from dino.engine.train import Trainer
from dino.options import replace
from dino.options.train import TrainOptions
from dino.run import build_batches
from dino.terminal import Terminal
from helpers import TINY, draw_images

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from step import Plain, plain_copy, plain_loss

# Relative error allowed of the loss, and of all gradients as one vector. A number alone is rounded by 6e-8, 5e-4 and 4e-3.
TOLERANCE = {"fp32": (1e-6, 1e-5), "fp16": (1e-3, 1e-2), "bf16": (1e-2, 8e-2)}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
PLACES = [
    ("cpu", "fp32"),
    ("cpu", "bf16"),
    *(pytest.param("cuda", precision, marks=[pytest.mark.cuda, GPU]) for precision in TOLERANCE),
]


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
@pytest.mark.parametrize("split", [Split(), Split(3), Split(1, "elementwise"), Split(2, "blocks")], ids=str)
@pytest.mark.parametrize(("device", "precision"), PLACES)
def test_a_step_is_the_plain_one(tmp_path, monkeypatch, device, precision, split, drop_path):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    where, source = torch.device(device), open_source(str(draw_images(tmp_path / "images")))
    wanted = {"model.drop_path": drop_path, "batch_size": 6, "precision": precision, "device": device}
    wanted |= {"model.depth": 4, "model.width": 64, "views.num_local": 4}
    options = replace(TrainOptions(), TINY | wanted)
    trainer = Trainer(options, tmp_path, source, build_batches(options, source, where), where, Terminal(False))
    # The narrow head's gradients are large before its norm: the usual scale is for wide ones.
    trainer.training_step.scaler = torch.amp.GradScaler(device, init_scale=16.0, enabled=precision == "fp16")
    plain = Plain(plain_copy(trainer.method).double(), trainer.training_step.optimizer, where, "fp32")
    torch.manual_seed(1)
    groups = [torch.randn(v * 6, 3, s, s) for v, s in ((2, 32), (4, 16))]
    noise = trainer.draw_noise(0)
    assert (noise is None) == (drop_path == 0)

    whole = None if noise is None else [group.flatten(1) for group in noise]
    exact = plain_loss(plain, [group.to(where).double() for group in groups], whole)
    exact.backward()
    trainer.training_step.set_split(split)
    loss, _ = trainer.training_step.compute_gradients([group.to(where) for group in groups], 0.04, noise)
    trainer.training_step.scaler.unscale_(trainer.training_step.optimizer)

    ours, theirs = (
        torch.cat([p.grad.double().flatten() for _, p in sorted(student.named_parameters()) if p.grad is not None])
        for student in (trainer.method.student, plain.method.student)
    )
    of_loss, of_gradient = TOLERANCE[precision]
    assert abs(loss.item() / exact.item() - 1) <= of_loss
    assert (ours - theirs).norm() <= of_gradient * theirs.norm()
    centers = (trainer.method.center.value.double(), plain.method.center.value)
    torch.testing.assert_close(*centers, rtol=of_gradient, atol=of_gradient * float(centers[1].abs().max()))
