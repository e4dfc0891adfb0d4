"""A GPU's step where there is none: PyTorch's fake tensors have a device, a shape and a type, but no numbers.

So a tensor on the wrong device, and a read-back from the GPU (`item`, `nonzero`, a condition), which would be waited for,
are errors here as there. What they cannot show: PyTorch's own backward pass and kernels, and whether numbers are right;
for that CPU tests compare the same code with float64, and test_cuda.py runs on GPUs.

All cases run in one process of their own, `python test_fake_gpu.py`, that prints a line for each. What is not a step of
training is in test_fake_gpu_beside.py.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dino.data import device_render
from dino.data.device_decode import Jpeg
from dino.data.device_render import DeviceRenderer
from dino.data.loader import ViewBatches
from dino.engine import parallel
from dino.engine.train import Trainer
from dino.options import replace
from dino.options.train import TrainOptions
from fake_gpu import GPU, Pictures, report, reported, with_trainer
from helpers import TINY
from training import VARIANTS

OWN = dict.fromkeys(("model.width", "model.depth", "model.num_heads", "model.patch_size"))
STEPS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "in parts": {"accumulate": 3, "recompute": "blocks"},
    "recomputed": {"recompute": "elementwise"},
    "gray": {"model.in_channels": 1},
    "frozen teacher": dict.fromkeys(("method.loss", "method.targets", "head.prototypes", "head.out_dim"))
    | {"method.teacher": "frozen:vit_nano", "views.num_local": 0, "head.bottleneck_dim": 96},
    "layer decay": {"optim.layer_decay": 0.5},
    "LARS": {"optim.name": "lars"},
    "Muon": {"optim.name": "muon"},
    "convolutions": {"model.arch": "vit_nano_hybrid", "model.width": 32, "model.depth": 2, "model.num_heads": 2},
    "ResNet": OWN | {"model.arch": "timm:resnet18", "model.drop_path": 0.0},
    **VARIANTS,
}
PLANTED = {
    "a read-back": ("DataDependentOutputException", lambda loss, center: loss * float(center.sum())),
    "another device": ("same device", lambda loss, center: loss * torch.zeros(3)),
}


def one_step(changes: dict[str, Any], planted: Any = None) -> str:
    """What is wrong with a GPU's steps under these options; '' if nothing."""

    def work(subject: Trainer, batch: Any) -> str:
        method, seen = subject.method, set()
        if planted is not None:
            plain = method.student_loss
            method.student_loss = lambda *arguments: planted(plain(*arguments), method.center.value)
        linear = next(m for m in method.student.modules() if isinstance(m, nn.Linear))
        linear.register_forward_hook(lambda _, given, made: seen.add(made.dtype))
        for _ in range(2):  # before and after the prototypes are set free
            logged = subject.take_step(batch)
            subject.step += subject.plan.steps_per_epoch
        devices = {value.device for value in [*logged.values(), *method.state_dict().values()]}
        if devices != {GPU}:
            return f"tensors on {devices}"
        expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            subject.training_step.precision
        ]
        return "" if seen == {expected} else f"computed in {seen}"

    return with_trainer(changes, work)


def rendering_of_files() -> str:
    """What is wrong with rendering JPEGs that the device decodes, pages and crops of one batch; '' if nothing."""

    def decoded(data: list[Tensor], shapes: list[tuple[int, int]], device: torch.device) -> list[Tensor]:
        assert all(piece.device.type == "cpu" for piece in data)  # as TorchCodec asks
        return [torch.empty(3, *shape, dtype=torch.uint8, device=device) for shape in shapes]

    device_render.decode_jpegs = decoded
    source, jpeg = Pictures(), Jpeg(b"\xff\xd8\xff\xd9", (40, 50, 3))
    images = [jpeg, source.read(1), source.read(2), jpeg]
    options = replace(TrainOptions(), TINY).views
    views = ViewBatches(source, options, DeviceRenderer(GPU), 6, 0)[0].views
    assert views is not None
    given = DeviceRenderer(GPU).prepare(images, views.of([0, 1, 2, 0]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        groups = DeviceRenderer(GPU).finish(given, views.of([0, 1, 2, 0]))
        found = [(group.device, tuple(group.shape)) for group in groups]
    expected = [(GPU, (2, 4, 32, 32, 3)), (GPU, (2, 4, 16, 16, 3))]
    return "" if found == expected else str(found)


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return reported(__file__)


@pytest.mark.parametrize("case", [*STEPS, "rendering of files"])
def test_a_gpu_computes_all_of_it_and_is_not_waited_for(found, case):
    assert found[case] == ""


@pytest.mark.parametrize("case", PLANTED)
def test_what_is_planted_is_found(found, case):
    assert PLANTED[case][0] in found[case]


@pytest.mark.parametrize(("major", "precision"), [(7, "fp16"), (8, "bf16")])
def test_bf16_is_for_gpus_that_do_not_emulate_it(monkeypatch, major, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert parallel.choose_precision("auto", GPU) == precision


@pytest.mark.parametrize(("able", "precision"), [({"avx512_bf16": True}, "bf16"), ({"avx512_bf16": False}, "fp32")])
def test_bf16_is_for_processors_that_have_it(able, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert parallel.choose_precision("auto", torch.device("cpu")) == precision


if __name__ == "__main__":
    cases = {name: functools.partial(one_step, changes) for name, changes in STEPS.items()}
    cases |= {name: functools.partial(one_step, {}, act) for name, (_, act) in PLANTED.items()}
    report(cases | {"rendering of files": rendering_of_files})
