"""What training costs on a GPU that is not here: its arithmetic is counted, on tensors that hold nothing."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from dino.engine.build import build_method
from dino.engine.fit import MARGIN, try_step
from dino.engine.optim import create_optimizer
from dino.engine.step import TrainingStep
from dino.options import required
from dino.options.train import TrainOptions


class Device(NamedTuple):
    """A kind of GPU.

    Args:
        peak: dense products in 16 bits, floating-point operations per second, as its maker says.
        memory: bytes.
    """

    name: str
    peak: float
    memory: float


DEVICES = {
    "h200": Device("NVIDIA H200", 989e12, 141e9),
    "h100": Device("NVIDIA H100 SXM", 989e12, 80e9),
    "a100": Device("NVIDIA A100 80GB", 312e12, 80e9),
    "l4": Device("NVIDIA L4", 121e12, 24e9),
    "t4": Device("NVIDIA T4", 65e12, 16e9),
    "v100": Device("NVIDIA V100", 125e12, 32e9),
    "rtx4090": Device("NVIDIA RTX 4090", 165e12, 24e9),
    "mps": Device("Apple M3 Max", 14e12, 36e9),
}
# Of a GPU's peak, what trainings of ViTs are said to reach: DINO's ViT-S on V100s 8 %, DINOv3's ViT-L on H100s 24 %.
LEAST, USUAL, MOST = 0.06, 0.12, 0.25
LAUNCH = 0.02  # seconds that a step of any size takes to be asked for, some thousand kernels
HALF = 0.6  # bytes of activations in 16 bits, of those in 32; norms and losses stay in 32


class Step(NamedTuple):
    """What a step of all images computes and holds: floating-point operations and bytes."""

    flops: float
    memory: float
    parameters: int  # of the student's backbone


@functools.cache
def count_step(options: TrainOptions) -> Step:
    """The cost of one step with options that are all chosen.

    Raises:
        ValueError: the networks cannot be built so, or without memory.
    """
    if options.method.frozen is not None:
        raise ValueError("--gpu cannot count a frozen teacher; leave it out, and measure on the machine itself.")
    with torch.device("meta"):
        try:
            method = build_method(options)
        except (RuntimeError, NotImplementedError) as error:  # of timm, where building computes
            raise ValueError(f"{options.model.arch} cannot be counted without computing; leave --gpu out.") from error
    step = TrainingStep(method, create_optimizer(options.optim, method.student), torch.device("meta"))
    step.set_split(step.split._replace(recompute=options.recompute))

    def measure(images: int) -> tuple[float, float]:
        with FlopCounterMode(display=False) as counter:
            peak = try_step(step, options, images)
        return counter.get_total_flops(), peak

    (flops, peak), (more_flops, more) = measure(2), measure(4)  # both are linear in the images
    moments = 1 if options.optim.name in ("muon", "sgd", "lars") else 2
    learned = sum(p.numel() * p.element_size() for p in method.student.parameters())
    each, fixed = (more - peak) / 2, 2 * peak - more  # bytes of an image; of the gradients, however many images
    batch = required(options.batch_size)
    at_once = -(-batch // options.accumulate)
    memory = learned * (2 + moments) + fixed + MARGIN * HALF * each * at_once  # of student, teacher and moments first
    return Step((more_flops - flops) / 2 * batch, memory, sum(p.numel() for p in step.backbone.parameters()))
