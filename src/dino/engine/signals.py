"""Signals that ask a run to save and to end."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from dino.terminal import Terminal

# Windows has neither: a terminal or connection that closes; Slurm, before a job's time is over or it is preempted.
_HANG_UP, _REQUEUE = getattr(signal, "SIGHUP", 0), getattr(signal, "SIGUSR1", 0)
_ASKING = [signal.SIGINT, signal.SIGTERM, *filter(None, (_HANG_UP, _REQUEUE))]  # Ctrl-C; kill, Slurm or torchrun


class Signals:
    """Inside this context the first signal is only noted, in `received`. The second ends the process as usual.

    SIGUSR1 is noted in `requeue`, too, and ends nothing at once: it may follow a SIGTERM, and a SIGTERM may follow it.

    Outside the main thread Python can handle no signals; then the program that started the thread must.
    """

    def __init__(self, terminal: Terminal):
        self.terminal = terminal
        self.received = self.requeue = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            # `nohup` ignores SIGHUP; that must stay so.
            asking = [s for s in _ASKING if s != _HANG_UP or signal.getsignal(s) is not signal.SIG_IGN]
            self._before = {s: signal.signal(s, self._note) for s in asking}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_on(self) -> None:
        """Now that the run is saved, give SIGUSR1 to who handled it before: submitit, which requeues the job and ends."""
        if self.requeue and callable(self._before.get(_REQUEUE)):
            signal.raise_signal(_REQUEUE)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = True
        if number == _REQUEUE:
            self.requeue = True
            self.terminal.say("Finishing this step and saving.", style="yellow")
            return
        for s in self._before.keys() - {_REQUEUE}:
            signal.signal(s, signal.default_int_handler if s == signal.SIGINT else signal.SIG_DFL)
        self.terminal.say("Finishing this step and saving; once more to stop at once.", style="yellow")
