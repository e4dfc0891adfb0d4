"""Whether all ranks of a run are still there: no collective ends because a machine stops or a cable is pulled.

Each rank says every few seconds that it is there, from a thread of its own, whatever its step waits for. The main rank
listens to all others, and they listen to it. Where one falls silent, all say which, and end.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dino import distributed

BEAT = 5.0  # seconds
SILENT = 12  # beats, after which a rank is lost
_LEFT, _LOST = "left", "lost:"


class Presence:
    """What this rank hears of others, through the store by which they found one another.

    Args:
        store: for the use of one thread.
        machines: of all ranks.
    """

    def __init__(self, store: Any, machines: list[str]):
        self.store, self.rank, self.beats = store, distributed.rank(), 0
        self.names = [f"rank {rank} on {machine}" for rank, machine in enumerate(machines)]
        self.last = dict.fromkeys(range(1, len(machines)) if self.rank == 0 else [0], "")
        self.silent = dict.fromkeys(self.last, 0)  # beats

    def listen(self) -> str:
        """Say that this rank is there, and look whether the others do; who is lost, "" if nobody is."""
        self.beats += 1
        self.store.set(str(self.rank), str(self.beats))
        for other, before in self.last.items():
            word = self.store.get(str(other)).decode()
            if word.startswith(_LOST):
                return word.removeprefix(_LOST)
            self.silent[other] = self.silent[other] + 1 if word == before != _LEFT else 0
            self.last[other] = word
        lost = ", ".join(self.names[other] for other, beats in self.silent.items() if beats >= SILENT)
        if lost and self.rank == 0:
            self.store.set("0", _LOST + lost)
        return lost


@contextlib.contextmanager
def watching(run: Path) -> Iterator[None]:
    """While the block runs, end this process with a sentence if another rank of the `run` is lost."""
    if distributed.world_size() == 1:
        yield
        return
    store: Any = dist.distributed_c10d.PrefixStore("presence", dist.distributed_c10d._get_default_store().clone())
    store.set(str(distributed.rank()), "")  # torchrun may have kept the store of an earlier start
    presence, over = Presence(store, distributed.gather(platform.node())), threading.Event()

    def watch() -> None:
        lost = ""
        while not lost and not over.wait(BEAT):
            # A store that cannot be reached may not answer at all, whatever its own time-out is.
            alarm = threading.Timer(BEAT * SILENT, end, presence.names[:1])
            alarm.start()
            try:
                lost = presence.listen()
            except RuntimeError:  # the store was on the main rank's machine, and has gone
                lost = presence.names[0]
            alarm.cancel()
        if lost:
            end(lost)
        else:
            with contextlib.suppress(RuntimeError):
                store.set(str(presence.rank), _LEFT)

    def end(lost: str) -> None:
        if over.wait(BEAT):  # the block has ended, and says itself if it could not
            return
        if (run / "config.toml").is_file():
            how = f"what was saved stays, continue with: dino train --resume {run}"
        else:
            how = "it had not begun to train, so give the same command again"
        print(
            f"dino: no word from {lost} for {BEAT * SILENT:.0f} seconds: the machine has stopped, or its network is down; "
            f"{how}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the main thread waits in a collective that nothing else ends

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(BEAT)
