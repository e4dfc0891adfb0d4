"""Which rank the others wait for, and why: its images come late, or its own passes take longer."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from dino import distributed

OWN = ("transfer, render", "student")  # parts of a step in which no rank waits for another
SLOWER = 1.25  # times as long as the median rank
LOOKS = 3  # in a row that one rank is the slowest; the first of a run, while it starts, does not count


class Spent(NamedTuple):
    """Seconds per step of one rank."""

    rank: int
    machine: str
    images: float  # waiting for them
    passes: float  # of its own device

    @property
    def total(self) -> float:
        return self.images + self.passes


class Waiting:
    """Measures what a rank spends by itself, and compares the ranks. With one rank it does nothing."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.slowest: list[int] = []  # at the last looks
        self.told: int | None = None

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Around a part of a step."""
        if part not in OWN:
            yield
        elif self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self.events.append((begin, end))
        else:
            before = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - before

    def look(self, steps: int, waited: float) -> str:
        """Who is waited for, as a sentence; "" where nobody is, or it was said. All ranks call it, on a GPU after its steps.

        Args:
            steps: since the last look; waited: seconds in which this rank waited for images.
        """
        passes = self.seconds + sum(begin.elapsed_time(end) for begin, end in self.events) / 1000
        self.seconds, self.events = 0.0, []
        ranks = distributed.gather(Spent(distributed.rank(), platform.node(), waited / steps, passes / steps))
        return self.compare(ranks)

    def compare(self, ranks: list[Spent]) -> str:
        slow, usual = max(ranks, key=lambda spent: spent.total), statistics.median_low(spent.total for spent in ranks)
        self.slowest = [*self.slowest, slow.rank if slow.total > SLOWER * usual else -1][-LOOKS - 1 :]
        if self.slowest[1:] != [slow.rank] * LOOKS or slow.rank == self.told:
            return ""
        self.told = slow.rank
        late = slow.images - statistics.median(spent.images for spent in ranks if spent.rank != slow.rank)
        why = (
            "its images come late (more --data.num-workers, or a nearer disk)"
            if late > (slow.total - usual) / 2
            else ("its own passes take longer (other programs, or a slower device)")
        )
        return (
            f"The others wait for rank {slow.rank} on {slow.machine}: {slow.total:.2g} seconds of each step, where they need "
            f"{usual:.2g}; {why}."
        )
