"""The pace of a run: what its steps, checks and saves take, and so how much time is left."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator

from dino.engine.build import Plan

UNITS = (86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds")


class Pace:
    """Seconds of a step, as the median over recent blocks of steps of a second or more: a pause of the machine moves it
    little. Checks and saves are timed on their own.

    Args:
        workers: processes that prepare batches. The first steps, which wait for their start or take what was prepared
            meanwhile, do not count. As batches come in bursts, a block has at least one step for each process.
    """

    def __init__(self, workers: int = 0):
        self.least, self.skip = max(1, workers), 3 + 2 * workers
        self.blocks: deque[float] = deque(maxlen=60)
        self.checks: deque[float] = deque(maxlen=5)
        self.saves: deque[float] = deque(maxlen=5)
        self.limit = math.inf  # seconds after which a trial is over

    def start(self, step: int) -> None:
        """The steps after `step` begin now."""
        self.begun = self.since = time.monotonic()
        self.first, self.seconds = step, 0.0
        self.early = self.mark = step, 0.0  # the steps that do not count, and the blocks, reach to here

    def reach(self, step: int) -> None:
        """`step` steps are done now."""
        now = time.monotonic()
        self.seconds, self.since = self.seconds + now - self.since, now
        if self.early[0] - self.first < self.skip:
            self.early = self.mark = step, self.seconds
            return
        steps, seconds = step - self.mark[0], self.seconds - self.mark[1]
        if steps >= self.least and seconds >= 1:
            self.blocks.append(seconds / steps)
            self.mark = step, self.seconds

    @contextlib.contextmanager
    def pause(self, kind: deque[float]) -> Iterator[None]:
        """Around a check or a save."""
        before = time.monotonic()
        yield
        self.since = time.monotonic()
        kind.append(self.since - before)

    @property
    def step(self) -> float:
        """Seconds of a step; NaN as long as it is unknown."""
        return statistics.median(self.blocks) if self.blocks else math.nan

    @property
    def start_up(self) -> float:
        """Seconds that the first steps took beyond what steps take."""
        return max(0.0, self.early[1] - (self.early[0] - self.first) * self.step)

    def is_settled(self) -> bool:
        """Whether a few dozen steps, or some that are slow, have been timed."""
        return bool(self.blocks) and (self.mark[0] - self.early[0] >= 30 or self.mark[1] - self.early[1] >= 20)

    def is_over(self) -> bool:
        """Whether a trial has timed enough."""
        took = time.monotonic() - self.begun
        return took > self.limit and len(self.blocks) >= (3 if took < 3 * self.limit else 1)

    def predict(self, plan: Plan, start: int, stop: int) -> float:
        """Seconds from step `start` to the end of step `stop`, with the checks and saves on the way."""
        saves = count_ends(start, stop, plan.steps_per_epoch) * low(self.saves)
        return (stop - start) * self.step + count_ends(start, stop, plan.measure_every) * low(self.checks) + saves

    def describe(self, plan: Plan, start: int, stop: int) -> str:
        """What there is to do from step `start` to step `stop`: "5,600 steps at 3.3 steps/s and 36 checks of 4.2 s"."""
        checks = count_ends(start, stop, plan.measure_every) if self.checks else 0
        rate = f"at {1 / self.step:,.1f} steps/s" if self.step < 1 else f"of {self.step:.1f} s"
        more = f" and {checks} check{'s' * (checks > 1)} of {low(self.checks):.1f} s" if checks else ""
        return f"{stop - start:,} steps {rate}{more}"


def low(seconds: deque[float]) -> float:
    """The median, or the less of two: the first check of a run takes longer, as it also measures raw pixels."""
    return statistics.median_low(seconds) if seconds else 0.0


def count_ends(start: int, stop: int, every: int) -> int:
    """Steps after `start` and up to `stop` that are multiples of `every`, or `stop` itself."""
    return stop // every - start // every + (stop > start and stop % every > 0)


def describe_time(seconds: float) -> str:
    """A rough time for people: "90 seconds", "28 minutes", "5.2 hours"."""
    size, name = next((unit for unit in UNITS if seconds >= 2 * unit[0]), UNITS[-1])
    return f"{round(seconds / size, 1 if size > 60 else 0):g} {name}"
