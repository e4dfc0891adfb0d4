"""TODO."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn


class Terminal:
    """A live progress line where there is a terminal, plain lines where there is none; silent on other ranks."""

    def __init__(self, enabled: bool):
        self.console = Console(stderr=True, quiet=not enabled, soft_wrap=True)
        self.live = enabled and sys.stderr.isatty()
        shown = "epoch {task.fields[epoch]}", BarColumn(24), "{task.percentage:>3.0f}%", "{task.fields[status]}"
        times = TimeElapsedColumn(), "left", TimeRemainingColumn()
        self.progress = Progress(*shown, *times, console=self.console, disable=not self.live)
        self.task = self.progress.add_task("train", total=None, epoch="", status="")

    def start(self, step: int, total: int) -> None:
        self.progress.update(self.task, completed=step, total=total)
        self.progress.start()

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False, highlight=False)

    def update(self, step: int, epoch: str, status: str) -> None:
        self.progress.update(self.task, completed=step, epoch=epoch, status=status)

    def stop(self) -> None:
        self.progress.stop()


T = TypeVar("T")


def track(items: Iterable[T], total: int | None, what: str) -> Iterable[T]:
    """`items`, with a progress bar where a terminal can show it."""
    return rich.progress.track(
        items, what, total, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    )
