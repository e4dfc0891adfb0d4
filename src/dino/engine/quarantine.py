"""Images of a run that could not be read."""

from __future__ import annotations

import json
from pathlib import Path

from dino import distributed, files
from dino.data.decode import BadImage
from dino.data.sources import Source
from dino.engine.log import read_quarantine
from dino.errors import TrainingError
from dino.terminal import Terminal

A_FEW = 5  # unreadable images that any folder may have


class Quarantine:
    """Images that could not be read: `quarantine.jsonl` names each once, with the reason.

    Args:
        max_fraction: the largest share of the images that may be unreadable. Above 0 it allows a few of any folder.
    """

    def __init__(self, path: Path, total: int, max_fraction: float):
        self.path, self.total, self.max_fraction = path, total, max_fraction
        self.limit = max(max_fraction * total, min(A_FEW, total / 4)) if max_fraction else 0
        self.names: set[str] = set()

    def reread(self, source: Source) -> None:
        """Take up the images that the file names and that still cannot be read; forget those that were repaired."""
        lines = {line["image"]: line for line in read_quarantine(self.path)}
        for i in range(len(source)) if lines else ():
            if source.name(i) in lines:
                try:
                    source.read(i)
                except BadImage:
                    self.names.add(source.name(i))
        if self.names != lines.keys():
            files.write(self.path, "".join(json.dumps(lines[name]) + "\n" for name in lines if name in self.names))

    def share(self, bad: list[tuple[str, str]], terminal: Terminal, only_here: bool = False) -> None:
        """Write down and say the names and reasons that ranks have found, unless `only_here`, since the last time.

        Raises:
            TrainingError: there are too many; or, `only_here`, a batch found no image in their place.
        """
        found = [bad] if only_here else distributed.gather(bad)
        shared = [entry for part in found for entry in part]
        if distributed.is_main():
            for name, reason in self.add(shared):
                terminal.say(f"Skipped {name}: {reason}.", style="yellow")
        else:
            self.names.update(name for name, _ in shared)
        count, too_many = len(self.names), len(self.names) > self.limit
        if only_here or too_many:
            limit = f"more than --data.max-bad-fraction {self.max_fraction:g} allows"
            raise TrainingError(
                f"{count} of {self.total} images could not be read ({100 * count / self.total:.1f} %), "
                f"{limit if too_many else 'so a batch found none'}; they are listed with reasons in {self.path}. Repair them "
                "and resume, or raise that limit, or remove them and start anew with --overwrite."
            )

    def add(self, bad: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Write down the names and reasons that are new, and return them."""
        fresh = [(name, reason) for name, reason in dict(bad).items() if name not in self.names]
        if fresh:
            with open(self.path, "a") as file:
                file.writelines(json.dumps({"image": name, "reason": reason}) + "\n" for name, reason in fresh)
            self.names.update(name for name, _ in fresh)
        return fresh
