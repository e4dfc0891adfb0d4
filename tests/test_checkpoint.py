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

from dino.engine.checkpoint import Checkpoints, lock_folder
from dino.weights.checkpoints import CheckpointError, read_checkpoint, read_newest


def state(value: float, size: int = 10) -> dict:
    return {"step": int(value), "weights": torch.full((size,), value)}


def load_step(folder: Path) -> int:
    found = read_newest(folder)
    assert found is not None
    return found.state["step"]


def list_steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.pt"))


def test_keeps_the_newest_and_points_at_the_last(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.load() is None
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    assert list_steps(tmp_path) == [2, 3]
    assert (tmp_path / "latest").read_text() == "step-00000003.pt"
    assert torch.equal(checkpoints.load().state["weights"], torch.full((10,), 3.0))


def test_a_half_written_file_is_ignored_and_swept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))
    (tmp_path / ".step-00000002.pt.77.tmp").write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"of somebody else")
    assert checkpoints.load().state["step"] == 1
    assert [path.name for path in tmp_path.glob(".*.tmp")] == [".mine.tmp"]


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    at = content.index(torch.full((10,), 3).numpy().tobytes()) + 5
    content[at] ^= 1
    path.write_bytes(content)


HARMS: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: os.truncate(path, 1000),
    "empty": lambda path: os.truncate(path, 0),
    "a bit flipped": flip_bit,
    "deleted": lambda path: path.unlink(),
    "no checkpoint": lambda path: torch.save([1, 2], path),
    "not finite": lambda path: torch.save({"step": 3, "weights": torch.tensor([1.0, float("nan")])}, path),
    "latest is empty": lambda path: (path.parent / "latest").write_text(""),
    "latest is lost": lambda path: (path.parent / "latest").unlink(),
    "latest names another file": lambda path: (path.parent / "latest").write_text("../../etc/passwd"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_the_newest_whole_checkpoint_is_taken_and_what_was_refused_is_said(tmp_path, harm):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    HARMS[harm](tmp_path / "step-00000003.pt")
    found = Checkpoints(tmp_path, keep=2).load()
    assert found is not None
    expected = 3 if harm.startswith("latest") else 2
    assert found.state["step"] == expected
    assert len(found.refused) == (expected == 2 and harm != "deleted")
    assert all("step-00000003.pt" in reason for reason in found.refused)


def test_a_checkpoint_just_written_is_never_the_one_that_is_deleted(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (4, 51, 54):
        checkpoints.save(step, state(step))
    (tmp_path / "step-00000054.pt").write_bytes(b"damaged")
    resumed = Checkpoints(tmp_path)
    assert resumed.load().state["step"] == 51
    for step in (52, 53):
        resumed.save(step, state(step))
        assert step in list_steps(tmp_path)
    assert list_steps(tmp_path) == [52, 53, 54]  # and what it has not written stays
    assert load_step(tmp_path) == 53


def test_when_no_checkpoint_is_whole_nothing_starts_again_from_zero(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, state(1))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints .* can be used: .*not a readable checkpoint"):
        checkpoints.load()


def test_reading_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    path = tmp_path / "evil.pt"
    torch.save({"x": 1}, path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert "weights_only" not in str(error.value)
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
    with pytest.raises(CheckpointError, match="No space left") as error:
        checkpoints.save(2, state(2, 500_000))
    assert f"the last good checkpoint is {good}" in str(error.value)
    assert load_step(small_disk) == 1
    assert not list(small_disk.glob("*.tmp"))
    checkpoints.save(3, state(3, 1000))
    assert load_step(small_disk) == 3


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
