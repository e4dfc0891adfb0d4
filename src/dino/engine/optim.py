"""Which parameters learn and how fast, LARS and Muon, and clipping to the reference's letter but without its syncs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dino import distributed
from dino.models.preprocessing import Preprocessed
from dino.options import required
from dino.options.train import OptimOptions

MATRICES, DECAYED, PLAIN = range(3)  # kinds of parameters: Muon's, others whose decay is scheduled, never decayed


def number_layers(module: nn.Module) -> dict[str, int]:
    """Layers that each parameter lies below the last one: 0 for the last layer of a backbone, and for all outside of it."""
    below = {name: 0 for name, _ in module.named_parameters()}
    for prefix, part in module.named_modules():
        if isinstance(part, Preprocessed):
            layers = part.number_layers()
            stem = f"{prefix}." if prefix else ""
            below |= {stem + name: max(layers.values()) - layer for name, layer in layers.items()}
    return below


def choose_trained(backbone: nn.Module, rule: str) -> None:
    """Let only those parameters of `backbone` learn that `rule` names, as `dino.options.train.StartOptions.train` does.

    Raises:
        ValueError: it has none of them.
    """
    names = [name for name, _ in backbone.named_parameters()]
    chosen = set(names)
    if rule == "attention-proj":
        chosen = {name for name in names if ".attn.proj." in name}
    elif rule == "norms":
        norms = [name for name, part in backbone.named_modules() if "norm" in type(part).__name__.lower()]
        chosen = {name for name in names if name.rpartition(".")[0] in norms}
    elif rule.startswith("last:"):
        below, count = number_layers(backbone), int(rule.removeprefix("last:"))
        blocks = sorted({depth for name, depth in below.items() if re.search(r"\.\d+\.", name)})
        if count >= len(blocks):
            raise ValueError(f"start.train is {rule}, but this backbone has {len(blocks)} blocks; use fewer, or all.")
        chosen = {name for name in names if below[name] <= blocks[count - 1]}
    if not chosen:
        raise ValueError(f"start.train is {rule}, which this backbone has not; use all, norms or last:N.")
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name in chosen)


def group_parameters(module: nn.Module, matrices_apart: bool = False, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups of weights, whose decay is scheduled, and of biases and one-dimensional parameters, which never decay.

    Args:
        matrices_apart: the matrices and convolutions, but not the prototypes, are groups of their own, the first.
        layer_decay: the share of the learning rate, `scale`, is this from one layer to the one before; then there are groups
            for each layer.
    """
    groups: dict[tuple[int, float], list[nn.Parameter]] = {(DECAYED, 1.0): [], (PLAIN, 1.0): []}
    if matrices_apart:
        groups[MATRICES, 1.0] = []
    below = number_layers(module) if layer_decay != 1 else {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = DECAYED
        if parameter.ndim == 1 or name.endswith(".bias"):
            kind = PLAIN
        elif matrices_apart and parameter.ndim in (2, 4) and "last_layer" not in name:
            kind = MATRICES
        scale = layer_decay ** below.get(name, 0)
        groups.setdefault((kind, scale), []).append(parameter)
    return [
        {"params": parameters, "kind": kind, "scale": scale} | ({"weight_decay": 0.0} if kind == PLAIN else {})
        for (kind, scale), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def create_optimizer(options: OptimOptions, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `options.name`; learning rate and decay are set at every step by `set_rates`."""
    groups = group_parameters(module, options.name == "muon", options.layer_decay or 1.0)
    return OPTIMIZERS[required(options.name)](groups, options.weight_decay)


def create_sgd(groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    parameters = [p for group in groups for p in group["params"]]
    fused = not any(isinstance(p, DTensor) for p in parameters)  # PyTorch has no fused SGD for sharded tensors
    sgd = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=weight_decay, fused=fused)
    for parameter in parameters:
        # Starting from zero momentum gives the same first step. Without it the fused kernel fails when the last layer,
        # frozen during the first epoch, takes its first step later than the others.
        sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for kind, group in list_groups(optimizer):
        group["lr"] = lr * group.get("scale", 1.0)
        if kind != PLAIN:
            group["weight_decay"] = weight_decay


def list_groups(optimizer: torch.optim.Optimizer) -> list[tuple[int, dict[str, Any]]]:
    """Kinds and parameter groups. Checkpoints of before do not say the kinds: matrices were first, and plain ones last."""
    groups = optimizer.param_groups
    before = {0: MATRICES, len(groups) - 1: PLAIN}
    return [(group.get("kind", before.get(i, DECAYED)), group) for i, group in enumerate(groups)]


def clip_per_parameter_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale each gradient to at most `max_norm` on its own (0: leave them); the norm of all of them before, a scalar.

    The reference reads each norm on the host; here all stay on the device.
    """
    whole = [p.grad for p in parameters if p.grad is not None]
    grads = [distributed.get_local(grad) for grad in whole]
    norms = torch._foreach_norm(grads)  # pyright: ignore[reportPrivateImportUsage]
    stacked = distributed.sum_over_parts(torch.stack(norms) ** 2, whole[0]).sqrt()
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


class Muon(torch.optim.AdamW):
    """Muon (Jordan 2024) for the first group, matrices and convolutions; AdamW for the others.

    A matrix moves along its momentum with all singular values set to about one. The root mean square of its numbers is
    then 2 `lr`, about as far as AdamW moves, so that one learning rate is for both.
    """

    def __init__(self, groups: list[dict[str, Any]], weight_decay: float, momentum: float = 0.95):
        super().__init__(groups, lr=0.0, weight_decay=weight_decay)
        self.momentum = momentum

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in (group for kind, group in list_groups(self) if kind == MATRICES):
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group["lr"], group["weight_decay"])
        super().step()

    def _move(self, p: Tensor, lr: float, weight_decay: float) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}  # AdamW asks each state for its step
        state["momentum"].lerp_(p.grad, 1 - self.momentum)
        momentum = distributed.gather_whole(p.grad.lerp(state["momentum"], self.momentum))
        matrix = orthogonalize(momentum.flatten(1))
        update = matrix.view(p.shape)
        if isinstance(p, DTensor):  # each rank takes its part of what all have computed
            update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
        p.mul_(1 - lr * weight_decay)
        p.add_(update, alpha=-2 * lr * max(matrix.shape) ** 0.5)
        p.grad = None  # AdamW leaves it alone


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Roughly U V^T of a matrix U S V^T, by the Newton-Schulz iteration with the coefficients of Muon's authors.

    The singular values of the result lie between 0.7 and 1.2, which is near enough and quick.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x.contiguous() / (x.norm() + 1e-7)  # a CPU multiplies transposed views at half the speed
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


# `options.name` -> a function of parameter groups and weight decay
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]] = {
    "adamw": lambda groups, decay: torch.optim.AdamW(groups, lr=0.0, weight_decay=decay, fused=True),
    "sgd": create_sgd,
    "lars": LARS,
    "muon": Muon,
}
