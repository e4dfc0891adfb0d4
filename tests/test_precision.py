"""The fast path is the plain path, in each precision within what that precision allows.

Plain is `benchmarks/step.py`: softmax attention in whole blocks, one log-softmax per pair of views; here in float64.
Fast is what trains. Tolerances are relative, of the loss, and of all gradients as one vector, which the centre keeps to as
well: some five to ten times what is seen.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import step  # pyright: ignore[reportMissingImports]

TOLERANCES = {  # loss, gradients
    "fp64": (1e-12, 1e-12),
    "fp32": (1e-6, 1e-5),
    "fp16": (1e-3, 1e-2),
    "bf16": (1e-3, 5e-2),
}
GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")],
)


def computed(side: step.Side, groups: list[Tensor], fast: bool) -> tuple[float, Tensor, Tensor]:
    """Loss, gradients and centre of one step, in float64."""
    loss = (step.our_loss if fast else step.plain_loss)(side, groups)
    side.backward(loss)
    named = sorted(side.method.student.named_parameters(), key=lambda pair: pair[0])
    grads = [p.grad.flatten() for _, p in named if p.grad is not None]
    return loss.item(), torch.cat(grads).double(), side.method.centre.value.double()


def error(found: Tensor, true: Tensor) -> float:
    return ((found - true).norm() / true.norm()).item()


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("precision", TOLERANCES)
def test_the_fast_path_is_the_plain_path(precision, device):
    device, wide = torch.device(device), precision == "fp64"
    fast, plain = step.sides("vit_tiny", 512, device, "fp32" if wide else precision, "fp32", patch=16, size=64)
    plain.method.double()
    if wide:
        fast.method.double()
    torch.manual_seed(1)
    groups = [torch.randn(v * 4, 3, s, s, device=device) for v, s in ((2, 64), (4, 32))]
    own = [group.double() for group in groups] if wide else groups
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # else a GPU's fp32 is none in the first layer
        loss, grads, centre = computed(fast, own, fast=True)
    true_loss, true_grads, true_centre = computed(plain, [group.double() for group in groups], fast=False)
    for_loss, for_gradients = TOLERANCES[precision]
    assert abs(loss - true_loss) <= for_loss * true_loss
    assert error(grads, true_grads) <= for_gradients
    assert error(centre, true_centre) <= for_gradients
