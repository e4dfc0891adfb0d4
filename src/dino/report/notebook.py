"""The run directory that `dino.train` returns: a path, which a notebook shows with the run's verdict and curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
        from dino.report.curves import draw_curves  # Matplotlib takes a while

        if not self.num_images:
            return None
        run = Run.read(self, self.num_images)
        report = self.report if self.report.is_file() else None
        return render("run", folder=self, verdict=judge(run), report=report, charts=draw_curves(run))
