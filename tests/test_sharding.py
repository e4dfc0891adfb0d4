"""Runs whose networks are spread over ranks: the result of one rank, and checkpoints that any number of ranks reads."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import torch

import processes
from dino import weights
from dino.engine.log import read_metrics
from dino.engine.sharded_checkpoint import STATE
from dino.options import replace
from dino.options.train import TrainOptions
from dino.weights.checkpoints import WHOLE, list_sharded
from dino.weights.pickles import check_metadata
from helpers import dino_command, run_dino, tiny_flags

KILLS = 5  # 20 were tried once


def teachers(run: Path) -> dict[str, torch.Tensor]:
    return weights.load(f"{run}:last").state_dict()


def assert_same(run: Path, other: Path, atol: float = 0.0) -> None:
    ours, theirs = teachers(run), teachers(other)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=atol, msg=name)


@pytest.mark.slow
def test_four_then_two_then_one_rank_equal_one(photos, tmp_path):
    """Every part of the trainer at once: stochastic depth, parts of a step, clipping, a frozen last layer, checks."""
    changes = {
        "epochs": 4,
        "batch_size": 8,
        "model__drop_path": 0.2,
        "optim__freeze_last_layer": 0.5,
        "accumulate": 2,
        "log__every": 1,
    }
    flags = ["--data", photos, *tiny_flags(**changes)]
    assert run_dino("train", *flags, "--out", tmp_path / "one").returncode == 0
    spread = tmp_path / "spread"
    first = [*flags, "--out", spread, "--shard", "all", "--stop-after", 3]
    for ranks, arguments in ((4, first), (2, ["--resume", spread, "--stop-after", 6]), (1, ["--resume", spread])):
        done = run_dino("train", *arguments, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert ("Resuming after step" in done.stderr) == (ranks < 4)
    assert_same(tmp_path / "one", spread, 1e-5)
    losses = [
        [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        for run in (tmp_path / "one", spread)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    kept = list_sharded(spread / "checkpoints")
    assert (spread / "checkpoints/latest").read_text() == kept[-1].name
    assert len(kept) == 2
    assert not list((spread / "checkpoints").glob("*.pt"))


@pytest.mark.slow
def test_killed_at_random_moments_a_sharded_run_ends_as_if_it_was_not(photos, tmp_path):
    """SIGKILL to a rank while checkpoints are being written most of the time: the same to the bit."""
    flags = ["--data", photos, *tiny_flags(epochs=8, log__checkpoint_minutes=1e-4, log__every=1, log__knn_every=0)]
    flags += ["--shard", "all", "--no-report"]
    whole, run, chance = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    assert run_dino("train", *flags, "--out", whole, ranks=2).returncode == 0
    command = dino_command("train", *flags, "--out", run, "--resume", "auto")
    half_written = 0
    for _ in range(KILLS):
        before = set(list_sharded(run / "checkpoints", whole=False))
        process = processes.start(command, ranks=2)
        wait = time.monotonic() + 60
        while set(list_sharded(run / "checkpoints", whole=False)) <= before and time.monotonic() < wait:
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        folders = list_sharded(run / "checkpoints", whole=False)
        half_written += len(folders) > len(list_sharded(run / "checkpoints"))
        if len(list_sharded(run / "checkpoints")) and int(folders[-1].stem.removeprefix("step-")) > 30:
            break
    assert half_written  # else nothing was proved
    done = run_dino("train", *flags, "--out", run, "--resume", "auto", ranks=2)
    assert done.returncode == 0, done.stderr
    assert_same(whole, run)


@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_to_the_one_before(photos, tmp_path):
    flags = ["--data", photos, *tiny_flags(epochs=2, log__every=1), "--shard", "all", "--no-report"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert run_dino("train", *flags, "--out", whole, ranks=2).returncode == 0
    assert run_dino("train", *flags, "--out", run, "--stop-after", 6, ranks=2).returncode == 0
    newest = list_sharded(run / "checkpoints")[-1]
    parts = sorted(newest.glob("__*.distcp"))
    parts[-1].write_bytes(parts[-1].read_bytes()[:100])
    half = run / "checkpoints/step-00000007.shards"
    half.mkdir()
    (half / STATE).write_bytes((newest / STATE).read_bytes())
    done = run_dino("train", "--resume", run, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"{newest} is not a readable checkpoint") == 1
    assert not half.exists() or (half / WHOLE).exists()
    assert_same(whole, run)
    for path in list_sharded(run / "checkpoints"):
        (path / STATE).write_bytes(b"")
    done = run_dino("train", "--resume", run, ranks=2)
    assert done.returncode == 1
    assert "none of the 3 checkpoints" in done.stderr


def test_metadata_that_would_run_code_is_refused(tmp_path):
    (tmp_path / WHOLE).write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(Exception, match="could run code"):
        check_metadata(tmp_path / WHOLE)


@pytest.mark.parametrize("changes", [{"compile": True}, {"fit": "8GB"}])
def test_what_does_not_go_with_shards_is_refused(changes):
    with pytest.raises(ValueError, match="do not work yet"):
        replace(TrainOptions(), {"shard": "all"} | changes)
