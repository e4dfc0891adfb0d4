"""What every rank of a run must see as the main one does: the run directory and the images."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

from dino import distributed, errors
from dino.data.sources import Source, look_at_some

Opened = tuple[Source, Source | None]


def check_folder(folder: Path) -> None:
    """Refuse ranks that do not see the run directory of the main one, where all find the checkpoint to go on from."""
    place = Path(os.path.abspath(folder))
    ending = f".{os.getpid()}.tmp"  # as of files that `files.sweep` deletes, should this process be killed here
    with contextlib.ExitStack() as held:
        named = distributed.from_main(
            lambda: held.enter_context(tempfile.NamedTemporaryFile(dir=place, prefix=".", suffix=ending)).name
        )
        problem = f"does not see the run directory of rank 0 as {place}; give --out a folder that all machines share."
        distributed.check(lambda: "" if (place / Path(named).name).exists() else problem)


def share_images(open_images: Callable[[], Opened], spec: str) -> Opened:
    """What `open_images` returns on the main rank, on every rank.

    Raises:
        ValueError: a rank does not see these images. Later it would take each for a damaged one, and go on without.
    """
    if distributed.world_size() == 1:
        return open_images()
    packed = distributed.from_main(lambda: pickle.dumps(open_images()))
    here = _look(packed)
    there = distributed.from_main(lambda: here)
    other = next((name for name, content in here.items() if content != there.get(name)), None)
    what = "it has another content" if len(here.get(other or "", "")) == 64 else here.get(other or "")
    problem = f"does not see the images of rank 0, first {other} ({what}); give every machine the same {spec}."
    distributed.check(lambda: "" if other is None else problem)
    return pickle.loads(packed)


def _look(packed: bytes) -> dict[str, str]:
    """What there is to see of some of the images: by name, a digest in hex, or why there is none."""
    try:
        opened: Opened = pickle.loads(packed)  # tables and indexes of tar files open files of this machine
        return {name: what for source in opened if source is not None for name, what in look_at_some(source).items()}
    except Exception as error:
        return {"their table or index": errors.find_reason(error)}
