"""A budget of time instead of epochs: what is chosen, that measuring leaves no trace, and what a run says of its time."""

from __future__ import annotations

import io
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from rich.console import Console

import dino
import processes
from dino import cli
from dino.engine import pace as pace_module
from dino.engine.budget import TRIAL, choose_epochs
from dino.engine.build import Plan
from dino.engine.log import read_metrics
from dino.engine.pace import Pace, describe_time
from dino.engine.progress import Progress
from dino.options import flatten, replace, toml
from dino.options.train import TrainOptions
from dino.report.run import Run
from dino.terminal import Terminal
from helpers import TINY, assert_same_bits, dino_command, final_state, run_dino, tiny_flags
from training import build_trainer

FREE = replace(TrainOptions(), TINY | {"epochs": None})


def paced(step: float, check: float = 0.0, save: float = 0.0) -> Pace:
    pace = Pace()
    pace.blocks.append(step)
    pace.checks.append(check)
    pace.saves.append(save)
    return pace


@pytest.mark.parametrize(
    ("per_epoch", "step", "check", "save", "seconds"),
    [
        (100_000, 0.3, 5, 0.5, 1800),  # less than an epoch
        (156, 0.3, 4, 0.1, 1700),
        (5, 0.05, 1, 0.1, 280),  # checks take most of it
        (1, 12, 0, 0, 36_000),
    ],
)
def test_the_chosen_length_fills_the_budget(per_epoch, step, check, save, seconds):
    pace, plan = paced(step, check, save), Plan(FREE, per_epoch)
    epochs = choose_epochs(pace, plan, seconds)
    total = Plan(replace(FREE, {"epochs": epochs}), per_epoch).total
    ends = -(-total // per_epoch)  # an epoch ends with a check and a save, and so does the run
    assert pace.predict(plan, 0, total) == pytest.approx(total * step + ends * (check + save))
    assert pace.predict(plan, 0, total) == pytest.approx(seconds, rel=0.02)
    assert choose_epochs(pace, plan, step / 2) == 0


def test_a_stall_a_check_or_a_slow_start_do_not_move_the_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pace_module.time, "monotonic", lambda: now[0])
    pace, plan, left = Pace(workers=1), Plan(replace(FREE, {"epochs": 40}), 150), {}
    pace.start(0)
    for step in range(1, 2001):
        # The first step starts workers, one waits minutes for the machine, all vary, and checks pause the steps.
        now[0] += 30 if step == 1 else 300 if step == 900 else (0.2, 0.4, 0.3)[step % 3]
        pace.reach(step)
        left[step] = pace.predict(plan, step, plan.total)
        if step % 150 == 0:
            with pace.pause(pace.checks):
                now[0] += 40
    assert min(step for step, value in left.items() if value > 0) < 15  # seconds after the start-up
    settled = [left[step] for step in range(300, 2001)]
    expected = [(6000 - step) * 0.3 + (40 - step // 150 + (step % 150 == 0)) * 40 for step in range(300, 2001)]
    assert settled == pytest.approx(expected, rel=0.05)
    assert all(later < before + 60 for before, later in pairwise(settled))
    assert pace.start_up == pytest.approx(30, abs=1)


def test_bursts_of_several_workers_are_averaged(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pace_module.time, "monotonic", lambda: now[0])
    pace = Pace(workers=4)
    pace.start(0)
    for step in range(1, 200):
        now[0] += 2.8 if step % 4 == 0 else 0.4
        pace.reach(step)
    assert pace.step == pytest.approx(1)


def test_the_bar_shows_the_time_that_it_is_told(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    terminal = Terminal()
    terminal.update(1, "epoch 1/2", "", left=3725.0)
    plain = Console(file=io.StringIO(), width=200, color_system=None)
    with plain.capture() as shown:
        plain.print(terminal.progress.get_renderable())
    assert "left 1:02:05" in shown.get()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(42, "42 seconds"), (1700, "28 minutes"), (5400, "90 minutes"), (18_800, "5.2 hours"), (3e5, "3.5 days")],
)
def test_times_are_said_roughly(seconds, said):
    assert describe_time(seconds) == said


def test_a_given_length_replaces_that_of_a_recipe_or_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("minutes = 5\n")
    parse = lambda *flags: flatten(cli.parse(["train", *map(str, flags)])[1])  # noqa: E731
    length = lambda options: (options["epochs"], options["minutes"], options["hours"])  # noqa: E731
    timed = parse("vit_small_300ep", "--data", "x", "--hours", 2)
    assert length(timed) == (None, None, 2)
    assert (timed["optim.warmup_epochs"], timed["method.teacher_temp_epochs"]) == (None, None)  # for 300 epochs
    assert length(parse(file, "--epochs=3")) == (3, None, None)
    assert length(parse(file, "--hours=1")) == (None, None, 1)
    assert length(parse("--minutes", 1)) == (None, 1, None)  # the demo


def test_a_time_is_refused_with_epochs_and_on_resume(photos, tmp_path):
    with pytest.raises(ValueError, match="minutes is 5 and epochs is 3; give either the time or the epochs"):
        cli.parse(["train", "--data", "x", "--minutes", "5", "--epochs", "3"])
    run = dino.train(FREE, data=photos, out=tmp_path / "run", epochs=1, stop_after=1)
    for refused in (
        lambda: dino.train(resume=run, minutes=5),
        lambda: cli.parse(["train", f"--resume={run}", "--minutes=5"]),
    ):
        with pytest.raises(ValueError, match=r"minutes is 5, but --resume continues .* leave it out"):
            refused()


@pytest.mark.slow
def test_a_time_without_room_for_a_step_is_refused(photos, tmp_path):
    with pytest.raises(ValueError, match=r"no step fits into 2 seconds.* give more --minutes"):
        dino.train(FREE, data=photos, out=tmp_path / "none", minutes=0.03)
    assert not (tmp_path / "none").exists()


def test_a_log_file_is_told_each_accuracy_once(capsys):
    progress = Progress(Terminal(), Plan(replace(TrainOptions(), {"epochs": 4, "log.knn_every": 1}), 5), Pace())
    progress.set_knn(12.0, 0)  # of the untrained network
    for step, knn in ((1, None), (4, 24.0), (5, None), (10, 50.0)):
        progress.said = -math.inf
        if knn is not None:
            progress.set_knn(knn, step)
        progress.show(step, 20)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("k-NN ")[2] for line in said] == ["", "24.0 %", "", "50.0 %"]


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 2), (2.5, 12), (3.0, 15)])
def test_a_run_may_end_within_an_epoch(photos, tmp_path, capsys, epochs, steps):
    run = dino.train(FREE, data=photos, out=tmp_path / "run", epochs=epochs)
    lines = read_metrics(run / "metrics.jsonl")
    assert lines[-1]["step"] == steps  # of 5 in an epoch
    assert "effective_rank" in lines[-1]  # a check at the end
    assert Run.read(run, 22).complete
    assert f"epoch {epochs:g}/{epochs:g}  step {steps}" in capsys.readouterr().err
    assert f"epochs = {epochs:g}\n" in (run / "config.toml").read_text()


def test_the_schedules_of_a_part_of_an_epoch_are_complete(photos, tmp_path):
    changes = {
        "batch_size": 2,
        "epochs": 0.8,
        "optim__warmup_epochs": 0.1,
        "optim__lr": 0.1,
        "method__teacher_temp": 0.07,
    }
    trainer = build_trainer(photos, tmp_path, method__teacher_temp_epochs=0.4, **changes)
    rates = [trainer.plan.rates(step) for step in range(trainer.plan.total)]
    assert trainer.plan.total == 10  # of 12 in an epoch
    assert [rates[0].teacher_temp, rates[-1].teacher_temp] == [0.04, 0.07]
    assert [r.freeze_last_layer for r in rates] == [True] * 3 + [False] * 7
    assert rates[-1].lr < max(r.lr for r in rates) / 20


def test_few_steps_and_few_images_are_told_before_a_run(photos, tmp_path, capsys):
    run = dino.train(FREE, data=photos, out=tmp_path / "run", epochs=2, stop_after=3)
    said = capsys.readouterr().err
    assert "Warning: 10 steps are few; a model goes on learning for some thousands (--minutes or --epochs)." in said
    assert "Of photographs, 22 are few: starting from released weights is likely better" in said
    dino.train(resume=run)
    assert "are few" not in capsys.readouterr().err
    dino.train(FREE, data=photos, out=tmp_path / "again", init=run, epochs=300, stop_after=1)
    assert "are few" not in capsys.readouterr().err


@pytest.mark.slow
def test_measuring_leaves_no_trace_and_a_resume_keeps_the_length(photos, tmp_path, capsys):
    """A run of so many minutes has the bits of one of as many epochs, BatchNorm's buffers included; also interrupted."""
    options = replace(FREE, {"head.batch_norm": True, "model.drop_path": 0.2})
    timed = dino.train(options, data=photos, out=tmp_path / "timed", minutes=0.3, stop_after=7)
    recorded = toml.read_recorded(str(timed))
    assert recorded.epochs
    assert recorded.budget is None
    whole = dino.train(options, data=photos, out=tmp_path / "whole", epochs=recorded.epochs, stop_after=40)
    assert "Measuring how much fits" in capsys.readouterr().err
    dino.train(resume=timed, stop_after=40)
    assert "Measuring" not in capsys.readouterr().err
    assert_same_bits(final_state(whole), final_state(timed))
    assert toml.read_recorded(str(whole)) == replace(recorded, {"data.num_workers": 0})
    assert {p.name for p in timed.iterdir()} == {p.name for p in whole.iterdir()}
    measured = [
        [line for line in read_metrics(r / "metrics.jsonl") if "effective_rank" in line] for r in (timed, whole)
    ]
    assert measured[0] == measured[1]  # also of the pixels, before the first step


@pytest.mark.slow
def test_a_run_takes_its_time(photos, tmp_path):
    """The real command. Its time is held loosely: tests share this machine with others."""
    flags = tiny_flags(minutes=0.3, data__num_workers=1)[2:]  # without epochs
    before = time.monotonic()
    done = run_dino("train", "--data", photos, "--out", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    assert 9 < time.monotonic() - before < 36
    fit = re.search(r"([\d.]+) epochs fit, at [\d,.]+ steps/s\.\n", done.stderr)
    steps = re.search(r" ([\d,]+) steps of \d+, on", done.stderr)
    assert fit is not None, done.stderr
    assert steps is not None, done.stderr
    assert toml.read_recorded(str(tmp_path / "run")).epochs == float(fit[1])
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == int(steps[1].replace(",", ""))
    assert re.search(r"About \d+ seconds to go: [\d,]+ steps at", done.stderr)
    assert re.search(r"Took 0\.\d of 0\.3 minutes", done.stderr)


@pytest.mark.slow
def test_ranks_choose_the_same_length(photos, tmp_path):
    flags = tiny_flags(minutes=1, stop_after=4)[2:]
    done = run_dino("train", "--data", photos, "--out", tmp_path / "run", *flags, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("epochs fit") == done.stderr.count("Stopped and saved after step 4") == 1


def test_a_trial_that_meets_unreadable_images_leaves_them_to_the_run(photos, tmp_path, capsys):
    for path in sorted(photos.rglob("*.jpg"))[::2]:
        path.write_bytes(b"no image")
    flags = ["--data", str(photos), "--out", str(tmp_path / "run"), *tiny_flags(minutes=1)[2:]]
    assert cli.main(["train", *flags]) == 1
    said = capsys.readouterr().err
    assert f"they are listed with reasons in {tmp_path / 'run' / 'quarantine.jsonl'}" in said
    assert (tmp_path / "run" / "quarantine.jsonl").is_file()
    assert not (tmp_path / "run" / TRIAL).exists()


@pytest.mark.slow
def test_a_trial_that_is_stopped_or_killed_leaves_nothing(photos, tmp_path):
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        run = tmp_path / "run"
        flags = ["--data", photos, "--out", run, *tiny_flags(minutes=10)[2:]]
        process = processes.start(dino_command("train", *flags), stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not list(run.glob(f"{TRIAL}/checkpoints/step*.pt")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code, stderr
        assert run.exists() == (run / TRIAL).exists() == (number == signal.SIGKILL)
    dino.train(FREE, data=photos, out=run, epochs=1)
    assert not (run / TRIAL).exists()
    shutil.rmtree(run)
