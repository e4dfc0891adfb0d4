"""Are the prototypes worth their number? How many differ from each other, and how many were chosen in an epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dino import distributed
from dino.engine.step import TrainingStep
from dino.method import CrossEntropy
from dino.models.head import Prototypes

DISTANCE = 0.025  # cosine distance within which two prototypes count as one (Arteaga et al. 2025)
BLOCK = 256  # prototypes that are compared with all others at a time: 64 MB for K = 65536
LOW = 0.1  # share of the prototypes below which there are too many
EARLIEST = 1000  # steps; before, prototypes tell little of the images


@torch.no_grad()
def share_unique(prototypes: Float[Tensor, "k d"]) -> float:
    """The share of unique prototypes: those whose cosine distance from every earlier unique one is above `DISTANCE`.

    "Why Prototypes Collapse" (Arteaga et al. 2025, arXiv 2510.20108) finds 908 of 60,000 in a released DINO.
    """
    unit = F.normalize(prototypes.float(), dim=1)
    unique, count = torch.empty_like(unit), 0
    for block in unit.split(BLOCK):
        covered = (block @ unique[:count].T >= 1 - DISTANCE).any(dim=1).cpu()
        alike = (block @ block.T >= 1 - DISTANCE).cpu().fill_diagonal_(True)  # also of a prototype of zeros
        kept: list[int] = []
        while not covered.all():
            kept.append(first := int(covered.to(torch.uint8).argmin()))
            covered |= alike[first]
        unique[count : count + len(kept)] = block[kept]
        count += len(kept)
    return count / len(unit)


class PrototypeMonitor:
    """Counts over an epoch which prototypes were the largest of a target, and looks at all of them when it ends.

    Args:
        step: shows its targets. Where these are not distributions over prototypes, nothing is counted.
    """

    def __init__(self, step: TrainingStep):
        layer, loss = step.method.teacher.head.last_layer, step.method.loss
        counts = isinstance(layer, Prototypes) and isinstance(loss, CrossEntropy)
        self.layer = cast(Prototypes, layer) if counts else None
        directions = torch.zeros(0, 1) if self.layer is None else self.layer.weight_v
        # Not bool, which ranks cannot exchange. 1: chosen in this epoch.
        self.chosen = torch.zeros(len(directions), dtype=torch.uint8, device=directions.device)
        self.said = False
        if counts:
            step.watch = self.count

    def count(self, targets: Float[Tensor, "g n k"]) -> None:
        """Take note of the targets of a step; nothing waits for the device."""
        self.chosen.index_fill_(0, targets.argmax(dim=-1).flatten(), 1)

    def look(self, epoch_ends: bool) -> dict[str, float]:
        """Share what was chosen among all ranks, which all call this; with `epoch_ends` also what to log of the epoch."""
        distributed.max_(self.chosen)
        if not epoch_ends or self.layer is None:
            return {}
        chosen = self.chosen.float().mean().item()
        self.chosen.zero_()
        directions = distributed.gather_whole(self.layer.weight_v)
        unique = share_unique(directions) if distributed.is_main() else 0.0
        return {"prototypes_unique": unique, "prototypes_chosen": chosen}

    def advise(self, step: int, values: Mapping[str, float]) -> str | None:
        """What to say of what was logged, the first time that it is low."""
        text = None if self.said else advise(step, values, len(self.chosen))
        self.said |= text is not None
        return text

    def state_dict(self) -> dict[str, Any]:
        return {"chosen": self.chosen, "said": self.said}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.chosen.copy_(state["chosen"])
        self.said = state["said"]


def advise(step: int, values: Mapping[str, float], out_dim: int) -> str | None:
    """A sentence if few of the `out_dim` prototypes are of use, by the metrics of a `step` at which an epoch ends; else None.

    Which prototype is the largest of a target says little while targets are nearly uniform.
    """
    if step < EARLIEST or "prototypes_unique" not in values:
        return None
    unique, chosen = values["prototypes_unique"], values.get("prototypes_chosen", 1.0)
    sharp = values.get("teacher_entropy", math.inf) < math.log(out_dim) / 2
    if (useful := min(unique, chosen) if sharp else unique) >= LOW:
        return None
    return (
        f"too many prototypes: of {out_dim:,}, {100 * unique:.3g} % differ from each other, and {100 * chosen:.3g} % were "
        f"chosen for an image in this epoch. The others only cost memory and time; in a next run try --head.out-dim "
        f"{2 ** math.ceil(math.log2(max(2 * useful * out_dim, 2)))}."
    )
