"""Checkpoints: atomic, bounded in number, kept whole by a full disk, read without running code."""

from __future__ import annotations

import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch

from dino.engine.checkpoint import CheckpointError, Checkpoints, read_checkpoint


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
