"""Python programs as processes of their own, without three seconds of imports each: the tests' side of `fork_server.py`."""

from __future__ import annotations

import atexit
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Nothing reads these variables while it is imported, so a program that differs in them can be forked.
FREE = ("DINO_", "PYTEST_")

_popen = subprocess.Popen
_addresses: list[str] = []


def find_server() -> str:
    """The address of the process that forks. The first call starts it; it ends with this process."""
    if not _addresses:
        folder = (
            tempfile.mkdtemp()
        )  # a TemporaryDirectory would end where a forked process forgets what is done at exit
        _addresses.append(str(Path(folder, "socket")))
        command = [sys.executable, Path(__file__).with_name("fork_server.py"), *_addresses]
        process = _popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # it listens

        def close() -> None:
            process.communicate()
            shutil.rmtree(folder)

        atexit.register(close)
    return _addresses[0]


def can_fork(environment: dict[str, str] | None) -> bool:
    """Whether a program with this environment (None: ours) finds what is imported already as it would import it."""
    differ = set() if environment is None else environment.items() ^ os.environ.items()
    return hasattr(os, "fork") and all(name.startswith(FREE) for name, _ in differ)


class Forked(subprocess.Popen):
    """A Popen of `[sys.executable, ...]` whose process `fork_server.py` forks; with `ranks` it stands for torchrun.

    Of Popen's options it knows the streams, text, cwd, env and start_new_session. `pid` is that of the first rank.
    """

    def __init__(self, command: list[str], ranks: int, **options: Any) -> None:
        self.ranks = ranks
        super().__init__(command, **options)

    def _execute_child(self, args, *rest):
        _, preexec_fn, _, _, cwd, env, _, _, _, *ends, _, _, _, _, _, new_session, _ = rest
        assert preexec_fn is None
        child_stdin, _, _, child_stdout, _, child_stderr = ends
        request = {
            "arguments": [str(word) for word in args[1:]],
            "environment": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
            "new_session": new_session,
            "ranks": self.ranks,
        }
        self.link = socket.socket(socket.AF_UNIX)
        self.link.connect(find_server())
        streams = [i if end == -1 else end for i, end in enumerate((child_stdin, child_stdout, child_stderr))]
        socket.send_fds(self.link, [b"+"], streams)
        self.link.sendall(json.dumps(request).encode() + b"\n")
        self.pid, *_ = [self._receive() for _ in range(self.ranks)]
        self._child_created = True
        self._close_pipe_fds(*ends)

    def _receive(self) -> int:
        answer = self.link.recv(4, socket.MSG_WAITALL)
        assert len(answer) == 4, "the fork server ended"
        return int.from_bytes(answer)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags & os.WNOHANG and not select.select([self.link], [], [], 0)[0]:
            return 0, 0
        with self.link:
            return self.pid, self._receive()

    def _internal_poll(self, _deadstate: int | None = None) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)
        return self.returncode


def start(command: list[str], *, ranks: int = 1, real: bool = False, **options: Any) -> subprocess.Popen:
    """Start `[sys.executable, ...]`, on `ranks` ranks.

    It is forked, unless it has to be `real` or its environment differs in what is read while modules are imported.
    """
    if not real and can_fork(options.get("env")):
        return Forked(command, ranks, **options)
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *launcher, *command[1:]]
    return _popen(command, **options)


def run(command: list[str], *, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with captured text."""
    with start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


class Popen(_popen):
    """The Popen of a forked program: what it starts of Python is forked as well."""

    def __new__(cls, command: Any, *rest: Any, **options: Any) -> Any:
        if not rest and isinstance(command, list) and command[0] == sys.executable:
            return start(command, **options)
        return super().__new__(cls)


def fork_own_programs(address: str) -> None:
    _addresses[:] = [address]
    subprocess.Popen = Popen
