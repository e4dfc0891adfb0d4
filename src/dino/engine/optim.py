"""Optimization: parameter groups, LARS, and per-parameter clipping, to the reference's letter but without its syncs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dino.options.train import OptimOptions


def group_parameters(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups: weights, whose decay is scheduled, and biases and one-dimensional parameters, never decayed."""
    decayed, plain = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim == 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def create_optimizer(options: OptimOptions, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `options.name`; learning rate and decay are set at every step by `set_rates`."""
    return OPTIMIZERS[options.name](group_parameters(module), options.weight_decay)


def create_adamw(groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay, fused=True)


def create_sgd(groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    sgd = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=weight_decay, fused=True)
    for parameter in (p for group in groups for p in group["params"]):
        # Starting from zero momentum gives the same first step. Without it the fused kernel fails when the last layer,
        # frozen during the first epoch, takes its first step later than the others.
        sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def clip_per_parameter_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale each gradient to at most `max_norm` on its own (0: leave them); the norm of all of them before, a scalar.

    The reference reads each norm on the host; here all stay on the device.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(grads)  # pyright: ignore[reportPrivateImportUsage]
    stacked = torch.stack(norms)
    if max_norm > 0:
        factors = (max_norm / (stacked + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, list(factors.unbind()))  # pyright: ignore[reportPrivateImportUsage]
    return stacked.norm()


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al. 2017) as in the reference.

    Decay and the trust ratio `eta * |w| / |g|` skip one-dimensional parameters; momentum comes after the ratio.
    """

    def __init__(
        self, params: Any, weight_decay: float = 0.0, lr: float = 0.0, momentum: float = 0.9, eta: float = 0.001
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim != 1:
                    update = update + group["weight_decay"] * p
                    weight_norm, update_norm = p.norm(), update.norm()
                    ratio = group["eta"] * weight_norm / update_norm
                    usable = (weight_norm > 0) & (update_norm > 0)
                    update = update * torch.where(usable, ratio, torch.ones_like(ratio))
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(update)
                p.sub_(group["lr"] * state["momentum"])


# `options.name` -> a function of parameter groups and weight decay
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]] = {
    "adamw": create_adamw,
    "sgd": create_sgd,
    "lars": LARS,
}
