"""Start Python programs quickly: a process that has imported what dino needs forks one child per program.

A child is a process like any other: its own arguments, environment, folder, standard streams, session and exit code. Only the
imports, some three seconds of CPU time, are done already. `processes.py` is the tests' side.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import processes

PRELOADED = (
    "dino.cli",
    "dino.run",
    "dino.ablate",
    "dino.bench",
    "dino.engine.train",
    "dino.eval.copydetect",
    "dino.eval.davis",
    "dino.eval.finetune",
    "dino.eval.knn",
    "dino.eval.linear",
    "dino.eval.lowshot",
    "dino.eval.masks",
    "dino.eval.retrieval",
    "dino.features.commands",
    "dino.look.commands",
    "dino.report.run",
    "matplotlib.figure",
    "torch._dynamo",
    "torch.distributed.nn.functional",
)


def serve(address: str) -> dict[str, Any]:
    """Answer requests until the tests end. Returns, in a child only, what this child has to be."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        print("listening", flush=True)
        while True:
            ready, _, _ = select.select([listener, 0], [], [])
            with contextlib.suppress(ChildProcessError):  # there is none
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if 0 in ready:  # closed, by a process that has ended
                sys.exit()
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return keep(connection)
            connection.close()


def keep(connection: socket.socket) -> dict[str, Any]:
    """Start the ranks of one program and report how it ended, as `os.waitpid` does. Returns in the ranks only."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile() as lines:
        request = json.loads(lines.readline())
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    ranks = request["ranks"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            if request["new_session"]:
                os.setsid()
            connection.sendall(os.getpid().to_bytes(4))
            connection.close()
            if ranks > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                request["environment"] |= {name: str(value) for name, value in names.items()}
            return request
        children.append(child)
    for descriptor in range(3):
        os.close(descriptor)
    answer = 0
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and ranks > 1:  # as torchrun does
            status = 1 << 8
            for other in children:
                os.kill(other, signal.SIGTERM)
                os.kill(other, signal.SIGCONT)  # which may be stopped
        answer = answer or status
    connection.sendall(answer.to_bytes(4))
    os._exit(0)


def become(arguments: list[str], environment: dict[str, str]) -> None:
    """Run what `python *arguments` runs: `-m module`, `-c code` or a file."""
    os.environ.clear()
    os.environ.update(environment)
    if "WORLD_SIZE" in environment and "OMP_NUM_THREADS" not in environment:  # as torchrun does
        importlib.import_module("torch").set_num_threads(1)
    first, *rest = arguments
    if first in ("-m", "-c"):
        what, sys.path[0] = rest.pop(0), os.getcwd() if first == "-m" else ""
        sys.argv = [first, *rest]
        if first == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = arguments, str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def end() -> None:
    """The last function at exit. The kernel takes everything back at once; Python would tear down its modules for 0.3 s."""
    if ENDED_WITH:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ENDED_WITH[0])


ENDED_WITH: list[int] = []


if __name__ == "__main__":
    atexit.register(end)  # before all others, because the first comes last
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line sets it for ranks, before it is read
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    address = sys.argv[1]
    wanted = serve(address)
    processes.fork_own_programs(address)
    try:
        become(wanted["arguments"], wanted["environment"])
        ENDED_WITH.append(0)
    except SystemExit as ended:
        if isinstance(ended.code, int):
            ENDED_WITH.append(ended.code)
        raise
