"""How the package speaks to whoever runs it: lines and a progress bar on stderr, from the main rank only.

Results go to stdout by `print`. The bar is drawn where stderr is a terminal; elsewhere, in a log file for example, there
are only the lines.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")


def is_main() -> bool:
    """As `distributed.is_main`. Ranks talk only after PyTorch was imported, which takes seconds, and is not done here."""
    return "torch" not in sys.modules or importlib.import_module("dino.distributed").is_main()


class Lasting(Console):
    """A console whose reader may go away, as when a connection ends: it falls silent, and the work goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True

    def print(self, *objects: Any, **how: Any) -> None:
        try:
            super().print(*objects, **how)
        except OSError:
            self.quiet = True


class TimeLeft(TimeRemainingColumn):
    """The time until the end that was told, else rich's own estimate."""

    def render(self, task: Task) -> Text:
        left = task.fields["end"] - time.monotonic()
        if math.isnan(left):
            return super().render(task)
        return Text(str(timedelta(seconds=max(0, round(left)))), style="progress.remaining")


class Terminal:
    """Lines, and one progress bar below them.

    Args:
        enabled: False says and shows nothing. None: as on the main rank, nothing on the others.
        keep: leave the bar there when it is stopped.
    """

    def __init__(self, enabled: bool | None = None, keep: bool = True):
        enabled = is_main() if enabled is None else enabled
        self.console = Lasting(stderr=True, quiet=not enabled, soft_wrap=True, emoji=False)
        self.live = enabled and sys.stderr.isatty()
        columns = "{task.description}", BarColumn(24), "{task.percentage:>3.0f}%", "{task.fields[status]}"
        times = TimeElapsedColumn(), "left", TimeLeft()
        # Results that go to a file or a pipe must not be drawn above the bar instead.
        redirect = sys.stdout.isatty()
        self.progress = Progress(
            *columns, *times, console=self.console, transient=not keep, redirect_stdout=redirect, disable=not self.live
        )
        self.task = self.progress.add_task("", total=None, status="", end=math.nan)

    def say(self, text: str, style: str | None = None) -> None:
        """A line of text."""
        self.console.print(text, style=style, markup=False, highlight=False)

    def start(self, done: int, total: int | None) -> None:
        """Show the bar with `done` of `total` steps; None: their number is unknown."""
        with contextlib.suppress(OSError):
            self.progress.update(self.task, completed=done, total=total)
            self.progress.start()

    def update(self, done: int, what: str, status: str = "", left: float = math.nan) -> None:
        """Steps done so far, the texts before and behind the bar, and the seconds left if they are known."""
        with contextlib.suppress(OSError):
            end = time.monotonic() + left
            self.progress.update(self.task, completed=done, description=what, status=status, end=end)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.progress.stop()


def say(text: str) -> None:
    """A line on stderr from the main rank, above a bar if there is one."""
    if is_main():
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr)


def track(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    """`items` one by one, with a progress bar that goes away at the end; `total` None: their number is unknown."""
    terminal = Terminal(keep=False)
    terminal.update(0, what)
    terminal.start(0, total)
    try:
        for done, item in enumerate(items, 1):
            yield item
            terminal.update(done, what)
    finally:
        terminal.stop()
