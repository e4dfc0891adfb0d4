"""A GPU's step where there is none: PyTorch's fake tensors have a device, a shape and a type, but no numbers.

So a tensor on the wrong device, and a read-back from the GPU (`item`, `nonzero`, a condition), which would be waited for,
are errors here as there. What they cannot show: PyTorch's own backward pass and kernels, and whether numbers are right;
for that CPU tests compare the same code with float64, and test_cuda.py runs on GPUs.

All cases run in one process of their own, `python test_fake_gpu.py`, that prints a line for each. What is not a step of
training is in test_fake_gpu_beside.py.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import processes
from conftest import TINY
from dino.data import device_render
from dino.data.device_decode import Jpeg
from dino.data.device_render import LARGEST, DeviceRenderer
from dino.data.loader import ViewBatches
from dino.engine import parallel, train
from dino.engine.build import build_method
from dino.engine.train import Trainer
from dino.options import replace
from dino.options.auto import resolve
from dino.options.train import TrainOptions
from dino.terminal import Terminal
from test_memory import VARIANTS

GPU = torch.device("cuda", 0)

OWN = dict.fromkeys(("model.width", "model.depth", "model.num_heads", "model.patch_size"))
STEPS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "in parts": {"accumulate": 3, "recompute": "blocks"},
    "recomputed": {"recompute": "elementwise"},
    "gray": {"model.in_channels": 1},
    "LARS": {"optim.name": "lars"},
    "ResNet": OWN | {"model.arch": "timm:resnet18", "model.drop_path": 0.0},
    **VARIANTS,
}
PLANTED = {
    "a read-back": ("DataDependentOutputException", lambda loss, center: loss * float(center.sum())),
    "another device": ("same device", lambda loss, center: loss * torch.zeros(3)),
}


class Pictures:
    """Six images, one of them so large that its worker cuts it."""

    classes: tuple[str, ...] = ()
    labels = None
    fingerprint = ""

    def __len__(self) -> int:
        return 6

    def name(self, index: int) -> str:
        return str(index)

    def stamp(self) -> str:
        return ""

    def read(self, index: int) -> np.ndarray:
        return np.zeros((40 + index, LARGEST + 1 if index == 2 else 50, 3), np.uint8)


def to_gpu(module: nn.Module, device: torch.device) -> nn.Module:
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = torch.empty_like(b, device=device)
    return module


def without_driver() -> None:
    """What of PyTorch asks for the GPU's driver before our own code can run, and its backward pass."""
    nn.Module.to = to_gpu  # pyright: ignore
    torch.cuda.Stream = lambda _: None  # pyright: ignore
    Tensor.pin_memory = lambda self: self  # pyright: ignore
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # pyright: ignore


def without_backward(network: nn.Module) -> None:
    """PyTorch's backward pass cannot run on fake tensors; gradients are there after it."""

    def backward(_: Tensor) -> None:
        for p in filter(lambda p: p.requires_grad, network.parameters()):
            p.grad = torch.empty_like(p)

    Tensor.backward = backward  # pyright: ignore


def with_trainer(changes: dict[str, Any], work: Any) -> Any:
    """What `work` makes of a trainer on the GPU, under these options, and a batch."""
    source = Pictures()
    wanted = {"device": "cuda", "precision": "bf16", "batch_size": len(source), "model.drop_path": 0.3}
    options = resolve(replace(TrainOptions(), TINY | wanted | changes), len(source), 50, on_gpu=True, cores=0)
    batches = ViewBatches(source, options.views, DeviceRenderer(GPU), len(source), options.seed)
    batch, method = batches[0], build_method(options)
    train.build_method = lambda _: method  # its initial weights are numbers, which fake tensors have not
    without_backward(method.student)
    with tempfile.TemporaryDirectory() as folder, FakeTensorMode(allow_non_fake_inputs=True):
        subject = Trainer(options, Path(folder), source, batches, GPU, Terminal(False))
        return work(subject, batch)


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


def report(cases: dict[str, Callable[[], str]]) -> NoReturn:
    """Run the cases and print what each finds."""
    without_driver()
    gc.disable()  # fake tensors of a device that is not there are better left alone
    for name, case in cases.items():
        try:
            found = case()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        print(json.dumps([name, found]), flush=True)
    os._exit(0)


def reported(file: str) -> dict[str, str]:
    """What `report` prints when `file` runs by itself."""
    done = processes.run([sys.executable, file])
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


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


if __name__ == "__main__":
    cases = {name: functools.partial(one_step, changes) for name, changes in STEPS.items()}
    cases |= {name: functools.partial(one_step, {}, act) for name, (_, act) in PLANTED.items()}
    report(cases | {"rendering of files": rendering_of_files})
