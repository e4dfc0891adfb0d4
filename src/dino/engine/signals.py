"""Signals that ask a run to save and to end."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from dino.terminal import Terminal

# Ctrl-C; kill, Slurm or torchrun; a terminal or connection that closes. Windows has no SIGHUP.
_ASKING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Signals:
    """Inside this context the first signal is only noted, in `received`. The second ends the process as usual.

    Outside the main thread Python can handle no signals; then the program that started the thread must.
    """

    def __init__(self, terminal: Terminal):
        self.terminal = terminal
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            # `nohup` ignores SIGHUP; that must stay so.
            asking = [s for s in _ASKING if s in _ASKING[:2] or signal.getsignal(s) is not signal.SIG_IGN]
            self._before = {s: signal.signal(s, self._note) for s in asking}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.received = True
        for s in self._before:
            signal.signal(s, signal.default_int_handler if s == signal.SIGINT else signal.SIG_DFL)
        self.terminal.say("Finishing this step and saving; once more to stop at once.", style="yellow")
