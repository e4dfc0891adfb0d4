"""The teachers that a run writes: the last, the best, and some on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dino import distributed, weights
from dino.engine.best import BestTeacher
from dino.engine.build import Plan, model_arguments
from dino.method import DINO
from dino.models import create
from dino.weights import runs


class Teachers:
    """The teacher's backbone as it is now, and the files of it in the directory `run`. All ranks call each of this."""

    def __init__(self, plan: Plan, run: Path, method: DINO, device: torch.device):
        self.options, self.kept = plan.options, plan.kept_teachers
        self.run, self.method, self.device = run, method, device
        self.best = BestTeacher(starts_trained=self.options.init is not None)

    def get(self) -> Any:
        """The backbone; of a sharded run a copy with whole parameters."""
        backbone = self.method.teacher.backbone
        if self.options.shard == "none":
            return backbone
        whole: Any = create(**model_arguments(self.options))
        state = {name: distributed.gather_whole(value) for name, value in backbone.state_dict().items()}
        whole.load_state_dict(state)
        return whole.train(backbone.training).to(self.device)

    def save(self, step: int) -> None:
        """Write the best and the last one."""
        backbone = self.get()

        def write() -> None:
            self.best.save(self.run)
            weights.save(self.run, backbone, model_arguments(self.options), step, self.best.found)

        distributed.from_main(write)

    def keep(self, step: int) -> None:
        """Write this one to a file of its own, which stays, if the plan wants that of this step."""
        if step not in self.kept:
            return
        backbone = self.get()
        distributed.from_main(lambda: runs.save_on_the_way(self.run, backbone, model_arguments(self.options), step))
