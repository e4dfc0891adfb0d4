"""What a run says of how far it is: a bar, or in a log file a line a minute."""

from __future__ import annotations

import time

from dino.engine.build import Plan
from dino.engine.pace import Pace, describe_time
from dino.options import required
from dino.terminal import Terminal


class Progress:
    """Shows steps, the newest figures, and how long the rest will take."""

    def __init__(self, terminal: Terminal, plan: Plan, pace: Pace):
        self.terminal, self.plan, self.pace = terminal, plan, pace
        self.told, self.said = False, time.monotonic()  # the length of the run; a line
        self.status = ""
        self.knn: float | None = None  # percent; a log file is told each figure once

    def set_knn(self, knn: float | None, step: int) -> None:
        """The k-NN accuracy after `step`. A log file is not told that of step 0: its lines are of later steps."""
        self.knn = knn if step or self.terminal.live else None

    def show(self, step: int, stop: int) -> None:
        """`step` steps are done; the run goes on to `stop`. Once, as soon as it is known, it says how long that takes."""
        status = self.status + ("" if self.knn is None else f"  k-NN {self.knn:.1f} %")
        per_epoch, epochs = self.plan.steps_per_epoch, required(self.plan.options.epochs)
        what = f"epoch {min(epochs, 1 + (step - 1) // per_epoch):g}/{epochs:g}"
        left = self.pace.predict(self.plan, step, stop)
        self.terminal.update(step, what, status, left)
        since = time.monotonic() - self.said
        due = since > 60 or (since > 10 and step % per_epoch == 0) or step == self.plan.total
        if due and not self.terminal.live:
            more = f"  {describe_time(left)} left" if left > 0 else ""
            self.terminal.say(f"{what}  step {step} of {self.plan.total}  {status}{more}")
            self.said, self.knn = time.monotonic(), None
        if self.pace.is_settled() and not self.told and step < stop:
            self.terminal.say(f"About {describe_time(left)} to go: {self.pace.describe(self.plan, step, stop)}.")
            self.told = True
