"""A run in a notebook: curves that grow while it trains, and the path that `dino.train` returns, shown with its verdict."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino.html import render
from dino.report.run import Run
from dino.report.verdict import judge

_Path = Path if TYPE_CHECKING else type(Path())  # before Python 3.12 only the path of the system can be derived from


class RunFolder(_Path):
    num_images = 0  # that it trains on

    @classmethod
    def of(cls, folder: Path, num_images: int) -> RunFolder:
        found = cls(folder)
        found.num_images = num_images
        return found

    @property
    def report(self) -> Path:
        """The page that tells of the run."""
        return Path(self, "report.html")

    @property
    def verdict(self) -> list[str]:
        """Whether the run was worth it, why, and what to do next: sentences."""
        return judge(Run.read(self, self.num_images)).lines

    def _repr_html_(self) -> str | None:
        return self.draw(done=True) if self.num_images else None

    def draw(self, done: bool) -> str:
        """The curves so far, for a page; below the verdict and a link to the report if the run is `done`."""
        from dino.report.curves import draw_curves  # Matplotlib takes a while

        run = Run.read(self, self.num_images)
        verdict, report = judge(run) if done else None, self.report if done and self.report.is_file() else None
        return render("run", folder=self, verdict=verdict, report=report, charts=draw_curves(run))


class GrowingCurves:
    """A tracker whose curves grow in the output of a notebook's cell, for a twentieth of the time at most."""

    id = url = ""

    def __init__(self, run: RunFolder):
        from IPython.display import HTML, display

        import dino.report.curves  # noqa: F401 - Matplotlib takes a while, which is not the time of a drawing

        self.run, self.page, self.due = run, HTML, 0.0
        self.shown: Any = display(HTML(""), display_id=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        began = time.monotonic()
        if step and began >= self.due:  # after step 0 there is no curve yet
            self.draw()
            self.due = time.monotonic() + 20 * (time.monotonic() - began)

    def draw(self) -> None:
        self.shown.update(self.page(self.run.draw(done=False)))

    close = draw  # the last points


def is_notebook() -> bool:
    """Whether a cell of Jupyter is running, whose output can change."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None
