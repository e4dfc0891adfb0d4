"""Unique and chosen prototypes: by their definition, over epochs, ranks and resumes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dino
from dino.engine.log import read_metrics
from dino.engine.prototypes import BLOCK, DISTANCE, PrototypeMonitor, advise, share_unique
from dino.engine.step import TrainingStep
from dino.method import DINO, Network
from dino.models import Head
from helpers import TINY, as_flags, run_dino

SHARES = ("prototypes_unique", "prototypes_chosen")


def count_one_by_one(prototypes: torch.Tensor) -> int:
    kept: list[torch.Tensor] = []
    for row in F.normalize(prototypes.double(), dim=1):
        if all(1 - row @ other > DISTANCE for other in kept):
            kept.append(row)
    return len(kept)


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_unique_ones_are_those_far_from_all_unique_ones_before(dim):
    torch.manual_seed(dim)
    prototypes = torch.randn(2 * BLOCK + 70, dim) * torch.rand(
        2 * BLOCK + 70, 1
    )  # over blocks; their length is no matter
    expected = count_one_by_one(prototypes)
    assert 1 < expected < len(prototypes)
    assert share_unique(prototypes) == expected / len(prototypes)


def test_known_numbers_of_unique_prototypes():
    assert share_unique(torch.eye(300)) == 1
    assert share_unique(torch.ones(300, 5)) == 1 / 300
    assert share_unique(torch.eye(10).repeat(60, 1) + 1e-3) == 10 / 600
    # Each within the distance of the next: those in between are covered, the others count.
    angles = 0.2 * torch.arange(7)  # 1 - cos 0.2 is 0.02, 1 - cos 0.4 is 0.08
    assert share_unique(torch.stack([angles.cos(), angles.sin()], dim=1)) == 4 / 7


def watch(out_dim: int) -> PrototypeMonitor:
    networks = [Network(torch.nn.Identity(), Head(4, out_dim, 4, 4)) for _ in range(2)]
    method = DINO(*networks)
    return PrototypeMonitor(TrainingStep(method, torch.optim.SGD(networks[0].parameters()), torch.device("cpu")))


def test_chosen_ones_are_counted_over_an_epoch():
    monitor = watch(10)
    monitor.count(F.one_hot(torch.tensor([[1, 2], [1, 9]]), 10).float())
    assert monitor.look(epoch_ends=False) == {}
    again = watch(10)
    again.load_state_dict(monitor.state_dict())  # as a resume within the epoch
    again.count(F.one_hot(torch.tensor([[1, 5], [2, 2]]), 10).float())
    assert again.look(epoch_ends=True)["prototypes_chosen"] == pytest.approx(0.4)
    assert again.look(epoch_ends=True)["prototypes_chosen"] == 0


def advice(step=2000, unique=1.0, chosen=1.0, entropy=1.0) -> str:
    values = {"prototypes_unique": unique, "prototypes_chosen": chosen, "teacher_entropy": entropy}
    return advise(step, values, 60_000) or ""


def test_advice_where_few_are_of_use_and_never_too_early():
    assert "--head.out-dim 2048." in advice(unique=908 / 60_000, chosen=0.5)
    assert "of 60,000, 1.51 % differ from each other, and 50 % were chosen" in advice(unique=908 / 60_000, chosen=0.5)
    assert "--head.out-dim 4096." in advice(unique=0.8, chosen=0.02)
    assert advice(unique=0.2, chosen=0.2) == ""
    assert advice(step=500, unique=0.01) == ""
    assert (
        advice(chosen=0.02, entropy=0.9 * math.log(60_000)) == ""
    )  # the largest share of a uniform target says little
    assert advise(2000, {"loss": 1.0}, 60_000) is None
    assert "--head.out-dim 2." in advice(unique=1 / 60_000, chosen=1 / 60_000)


def test_it_is_given_once():
    monitor = watch(60_000)
    low = dict.fromkeys(SHARES, 0.01)
    assert monitor.advise(10, low) is None
    assert monitor.advise(1000, low)
    again = watch(60_000)
    again.load_state_dict(monitor.state_dict())
    assert again.advise(1100, low) is None


def read_shares(run: Path) -> list[tuple[float, ...]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [(line["step"], *(line[name] for name in SHARES)) for line in lines if SHARES[0] in line]


@pytest.mark.slow
def test_every_epoch_of_a_run_has_its_shares_whatever_ranks_and_stops(photos, tmp_path):
    # So that each step chooses prototypes that others do not.
    changes = {"head.out_dim": 4096, "method.targets": "sinkhorn"}
    whole = dino.train(data=str(photos), out=str(tmp_path / "whole"), **TINY | changes)
    shares = read_shares(whole)
    assert [step for step, *_ in shares] == [5, 10, 15]
    assert all(0 < value <= 1 for _, *both in shares for value in both)
    part = dino.train(data=str(photos), out=str(tmp_path / "part"), stop_after=8, **TINY | changes)
    assert read_shares(dino.train(resume=part)) == shares
    for flags in ([], ["--resume", tmp_path / "two"]):  # stops in the middle of an epoch, on two ranks
        start = ["--data", photos, "--out", tmp_path / "two", *as_flags(TINY | changes | {"stop_after": 8})]
        done = run_dino("train", *(flags or start), ranks=2)
        assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(read_shares(tmp_path / "two"), shares)


def test_without_prototypes_there_is_nothing_to_count(photos, tmp_path):
    changes = {"method.loss": "mse", "method.targets": "none", "head.prototypes": False, "epochs": 1}
    run = dino.train(data=str(photos), out=str(tmp_path / "run"), **TINY | changes)
    assert read_shares(run) == []
