"""A GPU that is not there: fake tensors say where everything would be computed."""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import processes
from dino.data.device_render import LARGEST, DeviceRenderer
from dino.data.loader import ViewBatches
from dino.engine import train
from dino.engine.build import build_method
from dino.engine.train import Trainer
from dino.models import create
from dino.options import replace
from dino.options.auto import resolve
from dino.options.train import TrainOptions
from dino.terminal import Terminal
from helpers import TINY

GPU = torch.device("cuda", 0)


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


def to_gpu(module: nn.Module, device: torch.device | None = None, memory_format: object = None) -> nn.Module:
    if device is None:
        return module
    frozen = getattr(module, "_frozen", [])  # of a student, which moves it by itself
    for part in (part for network in (module, *frozen) for part in network.modules()):
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
    frozen = create("vit_nano", patch_size=8, image_size=32) if options.method.frozen else None
    batch, method = batches[0], build_method(options, frozen)
    # Initial weights and a digest of weights are numbers, which fake tensors have not.
    train.build_method = lambda *_: method
    train.weights.fingerprint = lambda _: ""
    without_backward(method.student)
    with tempfile.TemporaryDirectory() as folder, FakeTensorMode(allow_non_fake_inputs=True):
        subject = Trainer(options, Path(folder), source, batches, GPU, Terminal(False), frozen=frozen)
        return work(subject, batch)


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
