"""Checkpoints: atomic, bounded in number, kept whole by a full disk, read without running code."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dino.engine.checkpoint import CheckpointError, Checkpoints, lock_folder, read_checkpoint


def state(value: float, size: int = 10) -> dict:
    return {"step": int(value), "weights": torch.full((size,), value)}


def test_keeps_the_newest_and_points_at_the_last(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.load() is None
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["step-00000002.pt", "step-00000003.pt"]
    assert torch.equal(checkpoints.load()["weights"], torch.full((10,), 3.0))


def test_a_half_written_file_is_ignored_and_swept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))
    (tmp_path / "step-00000002.pt.tmp").write_bytes(b"half")
    assert checkpoints.load()["step"] == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_damaged_file_is_one_sentence(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, state(1))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        checkpoints.load()


def test_reading_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    path = tmp_path / "evil.pt"
    torch.save({"x": 1}, path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not (tmp_path / "owned").exists()


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_leaves_the_previous_one_usable_and_says_so(small_disk: Path):
    checkpoints = Checkpoints(small_disk)
    good = checkpoints.save(1, state(1, 100_000))  # 400 kB
    with pytest.raises(CheckpointError, match=r"No space left|PytorchStreamWriter|unexpected pos") as error:
        checkpoints.save(2, state(2, 500_000))
    assert f"previous checkpoint {good} is still good" in str(error.value)
    assert checkpoints.load()["step"] == 1
    assert not list(small_disk.glob("*.tmp"))
    checkpoints.save(3, state(3, 1000))
    assert checkpoints.load()["step"] == 3


def fork(work: Callable[[], object]) -> int:
    """The id of a child process that does `work` and exits: with 0, or with 1 where it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def take(folder: Path) -> None:
    with lock_folder(folder):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_folder_has_one_writer_whatever_its_children_do(tmp_path):
    with lock_folder(tmp_path / "run"):
        assert exit_code(fork(lambda: take(tmp_path / "run"))) == 1
        assert exit_code(fork(lambda: None)) == 0  # closes what it inherited
        assert exit_code(fork(lambda: take(tmp_path / "run"))) == 1
        with pytest.raises(ValueError, match=r"another process is writing to .*run; wait for it"):
            take(tmp_path / "run")
    assert exit_code(fork(lambda: take(tmp_path / "run"))) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_killed_writer_leaves_no_lock_though_its_workers_live(tmp_path):
    noted = tmp_path / "worker"

    def write() -> None:
        with lock_folder(tmp_path / "run"):
            worker = fork(lambda: time.sleep(60))
            (tmp_path / "half").write_text(str(worker))
            (tmp_path / "half").rename(noted)
            time.sleep(60)

    writer = fork(write)
    while not noted.exists():
        time.sleep(0.01)
    assert exit_code(fork(lambda: take(tmp_path / "run"))) == 1
    os.kill(writer, signal.SIGKILL)
    assert exit_code(writer) == -signal.SIGKILL
    worker = int(noted.read_text())
    try:
        os.kill(worker, 0)  # it lives
        take(tmp_path / "run")
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_folder_of_a_file_system_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> bool:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("dino.engine.checkpoint.lock_descriptor", refuse)
    take(tmp_path / "run")
    assert (tmp_path / "run" / ".lock").exists()
