"""Is it collapsing? The paper's two collapses (section 5.3) told apart, and those of losses that compare vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Collapse = Literal["uniform", "dominated", "same", "point"]

POINT_BELOW = 0.01  # spread of the targets below which they are one point; an untrained network is above 0.05
UNIFORM_WITHIN = 1e-3  # nats between entropy and ln K; logits with deviation s lose s^2 / 2, so s is below 0.045
SAME_WITHIN = 1e-3  # nats of information that a target has of its image; runs that learned stayed above 0.1

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
    all images share, and an untrained network hardly separates them. So targets count as uniform only to the third
    decimal, which a teacher with a sharpening temperature never reaches.
    """

    out_dim: int
    images: int = 64  # of one process's batch, whose mean target has the entropy `prototype_usage`
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
        # Swinging between the kinds means that the teacher follows the student too closely.
        self.reported = now if len(self.since) == 1 else "same"
        return ADVICE[self.reported].format(limit=math.log(self.out_dim), **values)

    def _collapse(self, values: Mapping[str, float]) -> Collapse | None:
        if "target_spread" in values:
            return "point" if values["target_spread"] < POINT_BELOW else None
        limit, entropy = math.log(self.out_dim), values["teacher_entropy"]
        uniform = limit - entropy < UNIFORM_WITHIN
        dominated = max(values["prototype_usage"], values["kl"]) < 0.05 * limit
        # With fewer than four images, similar targets are normal.
        same = self.images >= 4 and values["prototype_usage"] - entropy < SAME_WITHIN
        if not (uniform or dominated or same):
            return None
        return "uniform" if entropy > 0.95 * limit else "dominated" if dominated else "same"

    def state_dict(self) -> dict[str, object]:
        return {"since": dict(self.since), "reported": self.reported}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.since, self.reported = dict(state["since"]), state["reported"]  # pyright: ignore
