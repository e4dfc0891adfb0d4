"""Is it learning? The paper's two collapses (section 5.3) told apart, and the health of features without labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dino.variants import feature_spread

Collapse = Literal["uniform", "dominated", "same", "point"]

POINT_BELOW = 0.01  # spread of the targets; an untrained network's is above 0.05
UNIFORM_WITHIN = 1e-3  # nats below ln K; logits that vary by sigma cost sigma^2 / 2, so this is a sigma of 0.045
SAME_WITHIN = 1e-3  # nats that a target tells of its image; in some eighty runs those that learned stayed above 0.1

ADVICE: dict[Collapse, str] = {
    "uniform": (
        "uniform collapse: the teacher's targets spread evenly over all prototypes (entropy {teacher_entropy:.3f} of at "
        "most {limit:.3f}) and the student copies that (KL {kl:.4f}). There is too little sharpening: lower "
        "--method.teacher-temp (now {teacher_temp:g}), or use fewer prototypes (--head.out-dim)."
    ),
    "dominated": (
        "collapse to one prototype: the targets of all images are the same (entropy {teacher_entropy:.4f}, usage "
        "{prototype_usage:.4f}, KL {kl:.4f}). Centering is too weak: use --method.targets centering with a "
        "--method.center-momentum of 0.9, or raise --method.teacher-temp (now {teacher_temp:g})."
    ),
    "same": (
        "collapse: all images have the same target (its entropy {teacher_entropy:.3f}, that of the mean target "
        "{prototype_usage:.3f}), and only that moves. Use --method.teacher momentum with a --method.momentum closer to "
        "1, --method.targets sinkhorn, or a lower --optim.lr."
    ),
    "point": (
        "collapse to one point: the teacher's outputs are the same for all images (spread {target_spread:.4f}). Use "
        "--method.teacher momentum with --head.predictor, or --method.targets centering."
    ),
}


@dataclass
class CollapseMonitor:
    """Looks at averages over a log interval and speaks when one collapse has lasted for `patience` steps.

    A loss that rises early is normal, and so is an entropy close to ln K in the first steps: centering takes away what
    all images share, and an untrained network tells them little apart. Only targets that are uniform to the third
    decimal, which no teacher at a sharpening temperature gives, count.
    """

    out_dim: int
    images: int = 64  # of a batch that the entropy of the mean target is over
    patience: int = 50
    since: dict[str, int] = field(default_factory=dict)
    reported: Collapse | Literal[""] = ""

    def look(self, step: int, values: Mapping[str, float]) -> str | None:
        """A warning the first time a collapse is certain, else None; `values` are the step's metrics."""
        now = self._collapse(values)
        if now is None:
            self.since.clear()
            self.reported = ""
            return None
        self.since.setdefault(now, step)
        if step - min(self.since.values()) < self.patience or self.reported:
            return None
        # One that swings between the kinds is a teacher that follows a student astray.
        self.reported = now if len(self.since) == 1 else "same"
        return ADVICE[self.reported].format(limit=math.log(self.out_dim), **values)

    def _collapse(self, values: Mapping[str, float]) -> Collapse | None:
        if "target_spread" in values:
            return "point" if values["target_spread"] < POINT_BELOW else None
        limit, entropy = math.log(self.out_dim), values["teacher_entropy"]
        uniform = limit - entropy < UNIFORM_WITHIN
        dominated = max(values["prototype_usage"], values["kl"]) < 0.05 * limit
        # Of one or two images the targets are meant to be alike.
        same = self.images >= 4 and values["prototype_usage"] - entropy < SAME_WITHIN
        if not (uniform or dominated or same):
            return None
        return "uniform" if entropy > 0.95 * limit else "dominated" if dominated else "same"

    def state_dict(self) -> dict[str, object]:
        return {"since": dict(self.since), "reported": self.reported}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.since, self.reported = dict(state["since"]), state["reported"]  # pyright: ignore


@torch.no_grad()
def feature_health(features: Tensor) -> dict[str, float]:
    """Label-free signs of life of features [m, d].

    `feature_std`: see `dino.variants.spread`. `effective_rank`: exp of the entropy of the normalized singular values
    (Roy & Vetterli 2007), between 1 and d.
    """
    z = torch.nn.functional.normalize(features.float(), dim=1)
    values = torch.linalg.svdvals(z - z.mean(dim=0))
    share = values / values.sum().clamp(min=1e-12)
    rank = torch.special.entr(share).sum().exp()
    return {"feature_std": feature_spread(features).item(), "effective_rank": rank.item()}
