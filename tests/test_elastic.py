"""Processes and machines that are killed and come back: torchrun starts the run again, and it goes on by itself."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch

from dino.engine.log import read_metrics
from helpers import assert_same_bits, dino_command, draw_images, final_state, pack_images, run_dino, tiny_flags

pytestmark = pytest.mark.slow

CONF = "join_timeout=120,last_call_timeout=5"


def start_torchrun(
    log: Path, *arguments: object, enter: Sequence[str] = (), **environment: str
) -> subprocess.Popen[bytes]:
    """Start torchrun, by the command `enter` if one is given, with a process group as a terminal would give it."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [*enter, sys.executable, "-m", "torch.distributed.run", *map(str, arguments)],
            stdout=out,
            stderr=out,
            process_group=0,
            # As docs/scale.md says: the store that torchrun keeps over restarts has the addresses of processes that are gone.
            env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} | environment,
        )


def find_processes(node: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """torchrun, and those that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(node.pid)
        return [process, *process.children(recursive=True)]
    return []


def kill(node: subprocess.Popen[bytes]) -> None:
    for process in find_processes(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait()


@contextlib.contextmanager
def killing_at_the_end(nodes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    try:
        yield
    finally:
        for node in nodes:
            kill(node)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in {seconds} seconds"
        time.sleep(0.1)


def get_step(run: Path) -> int:
    return max((line["step"] for line in read_metrics(run / "metrics.jsonl")), default=0)


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train_undisturbed(tmp_path: Path, ranks: int = 1, **options: object) -> tuple[list[object], Path]:
    """Train to `tmp_path / "whole"`. Returns the flags, and where the same run is to be trained in spite of disturbances."""
    flags = ["--data", draw_images(tmp_path / "photos"), *tiny_flags(log__knn_every=0, **options)]
    done = run_dino("train", *flags, "--out", tmp_path / "whole", ranks=ranks)
    assert done.returncode == 0, done.stderr
    return flags, tmp_path / "run"


def start_machine(
    number: int, log: Path, port: int, *command: object, nodes: str = "1:3", host: int = 0, restarts: int = 5
) -> subprocess.Popen[bytes]:
    """One of several machines of a process each, which meet at number `host`. Their addresses give the ranks."""
    size = ["--nnodes", nodes, "--nproc-per-node", "1", "--max-restarts", restarts, "--monitor-interval", "0.5"]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "x"]
    meet += ["--rdzv-conf", f"{CONF},is_host={int(number == host)}", "--local-addr", f"127.0.0.{number + 1}"]
    return start_torchrun(log, *size, *meet, "-m", "dino", "train", *command)


@pytest.mark.machines
def test_four_then_two_then_three_machines(tmp_path):
    """Each machine is a torchrun of one process. The main rank's is among those that are killed."""
    flags, run = train_undisturbed(tmp_path, epochs=300, batch_size=5, log__checkpoint_minutes=0.02)
    port, logs = find_free_port(), [tmp_path / f"log{number}" for number in range(5)]

    def start(number: int) -> subprocess.Popen[bytes]:
        command = [*flags, "--out", run, "--resume", "auto"]
        return start_machine(number, logs[number], port, *command, nodes="1:4", host=4, restarts=20)

    def trains_on(machines: int) -> list[int]:
        """The machines whose rank was the main one of so many."""
        said = f"on {machines} CPU process(es)"
        return [number for number, log in enumerate(logs) if log.exists() and said in log.read_text(errors="replace")]

    nodes = [start(4), *map(start, (1, 2, 3))]  # addresses give the ranks: the one where they meet is the last
    with killing_at_the_end(nodes):
        wait_for(lambda: trains_on(4) and get_step(run) > 20, "training on four")
        assert trains_on(4) == [1]
        kill(nodes[1])
        kill(nodes[2])
        wait_for(lambda: trains_on(2), "training on two")
        before = get_step(run)
        wait_for(lambda: get_step(run) > before + 20, "steps on two")
        nodes.append(start(0))  # its address makes it the main one
        wait_for(lambda: trains_on(3), "training on three")
        assert trains_on(3) == [0]
        for node in (nodes[0], nodes[3], nodes[4]):
            assert node.wait(timeout=300) == 0
    said = logs[4].read_text(errors="replace")
    assert "dino: another process of this run has ended" in said
    assert "Traceback" not in said
    one, other = final_state(tmp_path / "whole"), final_state(run)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.machines
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_started_again(tmp_path, victim):
    """Its data workers do not stay, the others end soon, and the result is that of the same number of ranks, to the bit."""
    log = tmp_path / "log"
    flags, run = train_undisturbed(tmp_path, 2, epochs=100, log__checkpoint_minutes=0.02)
    size = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = ["-m", "dino", "train", *flags, "--data.num-workers", "1", "--out", run, "--resume", "auto"]
    nodes = [start_torchrun(log, *size, *command)]
    with killing_at_the_end(nodes):
        wait_for(lambda: get_step(run) > 40, "training")
        before = find_processes(nodes[0])[1:]
        assert len(before) == 4
        ranks = psutil.Process(nodes[0].pid).children()
        ranks[victim].kill()
        wait_for(lambda: not any(process.is_running() for process in before), "the end of all processes", 20)
        assert nodes[0].wait(timeout=200) == 0
    said = log.read_text(errors="replace")
    assert "Resuming after step" in said
    assert said.count("dino: another process of this run has ended") == 1
    assert "Traceback" not in said
    assert_same_bits(final_state(tmp_path / "whole"), final_state(run))


@pytest.mark.machines
@pytest.mark.parametrize("leaving", [1, 2])
def test_a_machine_that_leaves_by_ctrl_c(tmp_path, leaving):
    """Nothing that was computed is lost, and the others go on without it."""
    photos, run = draw_images(tmp_path / "photos"), tmp_path / "run"
    flags = ["--data", photos, *tiny_flags(epochs=200, batch_size=6, log__knn_every=0, log__checkpoint_minutes=60)]
    port, logs = find_free_port(), [tmp_path / f"log{number}" for number in range(3)]
    nodes = [start_machine(n, logs[n], port, *flags, "--out", run, "--resume", "auto") for n in range(3)]
    with killing_at_the_end(nodes):
        wait_for(lambda: get_step(run) > 20, "training on three")
        before = get_step(run)
        os.killpg(nodes[leaving].pid, signal.SIGINT)
        wait_for(lambda: nodes[leaving].poll() is not None, "the end of torchrun", 60)
        assert [node.wait(timeout=200) for node in nodes if node is not nodes[leaving]] == [0, 0]
    said = logs[0].read_text(errors="replace")
    assert "on 3 CPU process(es)" in said
    assert "on 2 CPU process(es)" in said
    assert int(re.findall(r"Resuming after step (\d+) of", said)[0]) >= before
    assert "Traceback" not in said


@pytest.mark.machines
def test_the_machine_where_all_meet_is_killed(tmp_path):
    """torchrun ends on the others, too; the same lines go on, to the same bits."""
    flags, run = train_undisturbed(tmp_path, 3, epochs=100, log__checkpoint_minutes=0.02)
    logs = [tmp_path / f"log{number}" for number in range(3)]

    def start_all() -> list[subprocess.Popen[bytes]]:
        port = find_free_port()
        return [start_machine(n, logs[n], port, *flags, "--out", run, "--resume", "auto") for n in range(3)]

    nodes = start_all()
    with killing_at_the_end(nodes):
        wait_for(lambda: get_step(run) > 40, "training")
        started = [process for node in nodes for process in find_processes(node)]
        kill(nodes[0])
        assert all(node.wait(timeout=150) for node in nodes[1:])
        wait_for(lambda: not any(process.is_running() for process in started), "the end of all processes", 20)
    assert get_step(run) < get_step(tmp_path / "whole")
    nodes = start_all()
    with killing_at_the_end(nodes):
        assert not any(node.wait(timeout=200) for node in nodes)
    assert_same_bits(final_state(tmp_path / "whole"), final_state(run))


@contextlib.contextmanager
def two_machines() -> Iterator[list[str]]:
    """Two network namespaces that a cable joins, with the addresses 10.231.7.1 and 2."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    names = [f"dino-{os.getpid()}-{side}" for side in "ab"]

    def ip(words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["ip", *words.split()], capture_output=True)

    try:
        made = [ip(f"netns add {name}") for name in names]
        made += [ip(f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}")]
        made += [ip(f"-n {name} addr add 10.231.7.{n}/24 dev cable") for n, name in enumerate(names, 1)]
        made += [ip(f"-n {name} link set {device} up") for name in names for device in ("lo", "cable")]
        if failed := [done.stderr for done in made if done.returncode]:
            pytest.skip(f"no network namespaces here: {failed[0]}")
        yield names
    finally:
        for name in names:
            ip(f"netns del {name}")


@pytest.mark.machines
def test_a_cable_that_is_pulled(tmp_path):
    """Both sides end soon and say whom they miss; when it is back, the same command goes on, to the same bits."""
    flags, run = train_undisturbed(tmp_path, 2, epochs=100, log__checkpoint_minutes=0.02)
    logs = [tmp_path / "log1", tmp_path / "log2"]

    def start(number: int, machine: str) -> subprocess.Popen[bytes]:
        enter = ["ip", "netns", "exec", machine, "unshare", "--uts", "sh", "-c", f'hostname {machine}; exec "$@"', "sh"]
        size = ["--nnodes", "2", "--nproc-per-node", "1", "--local-addr", f"10.231.7.{number + 1}"]
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.231.7.1:29400", "--rdzv-id", "x", "--rdzv-conf"]
        meet += [f"{CONF},is_host={int(number == 0)}"]  # these machines cannot resolve names
        command = ["-m", "dino", "train", *flags, "--out", run, "--resume", "auto"]
        return start_torchrun(logs[number], *size, *meet, *command, enter=enter, GLOO_SOCKET_IFNAME="cable")

    with two_machines() as machines:
        nodes = [start(number, machine) for number, machine in enumerate(machines)]
        with killing_at_the_end(nodes):
            wait_for(lambda: get_step(run) > 40, "training")
            subprocess.run(["ip", "-n", machines[1], "link", "set", "cable", "down"], check=True)
            assert nodes[0].wait(timeout=150) == 1
            missed = [f"dino: no word from rank {1 - n} on {machines[1 - n]} for 60 seconds" for n in range(2)]
            assert missed[0] in logs[0].read_text(errors="replace")
            wait_for(lambda: missed[1] in logs[1].read_text(errors="replace"), "the end of the other rank")
            assert final_state(run)["step"] < final_state(tmp_path / "whole")["step"]
            subprocess.run(["ip", "-n", machines[1], "link", "set", "cable", "up"], check=True)
            assert nodes[1].wait(timeout=150) == 1
        nodes = [start(number, machine) for number, machine in enumerate(machines)]
        with killing_at_the_end(nodes):
            assert not any(node.wait(timeout=200) for node in nodes)
    assert_same_bits(final_state(tmp_path / "whole"), final_state(run))


def run_two_ranks(behind: Path, place: Path, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """`dino` on two ranks as on two machines: the second sees the folder `behind` at `place`."""
    mount = ["unshare", "-m", "sh", "-c", f'mount --bind "{behind}" "{place}" && exec "$@"', "sh"]
    if os.geteuid() != 0 or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("a mount of one process needs root and the command unshare")
    names = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}
    ranks = [
        subprocess.Popen(
            [*enter, *dino_command(*arguments)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | names | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank, enter in enumerate(([], mount))
    ]
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [subprocess.CompletedProcess("", rank.returncode, "", text) for rank, text in zip(ranks, said, strict=True)]


@pytest.mark.parametrize(("kind", "there"), [("folder", "others"), ("tar", "nothing"), ("tar", "the same")])
def test_a_rank_that_sees_other_images_is_refused(tmp_path, kind, there):
    photos, empty, run = draw_images(tmp_path / "photos"), tmp_path / "empty", tmp_path / "run"
    others = draw_images(tmp_path / "others", seed=1)
    empty.mkdir()
    if kind == "tar":
        photos, others = pack_images(photos, tmp_path / "tars"), pack_images(others, tmp_path / "other tars")
        run_dino(
            "train", "--data", others, *tiny_flags(stop_after=1), "--out", tmp_path / "unused"
        )  # which makes an index
    behind = {"nothing": empty, "others": others, "the same": photos}[there]
    ranks = run_two_ranks(behind, photos, "train", "--data", photos, *tiny_flags(epochs=1), "--out", run)
    if there == "the same":
        assert not any(done.returncode for done in ranks), ranks
        return
    reason = "No such file or directory)" if there == "nothing" else "(it has another content)"
    for done in ranks:
        assert done.returncode == 2, done
        assert f"dino: rank 1 on {platform.node()} does not see the images of rank 0, first" in done.stderr
        assert reason in done.stderr
        assert "Traceback" not in done.stderr
    assert not run.exists()


@pytest.mark.parametrize("resumed", [False, True])
def test_a_rank_that_does_not_see_the_run_is_refused(tmp_path, resumed):
    photos, runs, empty = draw_images(tmp_path / "photos"), tmp_path / "runs", tmp_path / "empty"
    runs.mkdir()
    empty.mkdir()
    command = ["train", "--data", photos, *tiny_flags(epochs=2), "--out", runs / "a", "--resume", "auto"]
    if resumed:
        assert run_dino(*command, "--stop-after", "5").returncode == 0
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    for done in run_two_ranks(empty, runs, *command):
        assert done.returncode == 2, done
        assert f"dino: rank 1 on {platform.node()} does not see the run directory of rank 0" in done.stderr
        assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before
    assert (runs / "a").exists() == resumed
