"""How long a run should be: the epochs that fit into a budget of time, by a trial that leaves no trace."""

from __future__ import annotations

import bisect
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dino import distributed
from dino.engine.build import Plan
from dino.engine.pace import Pace, describe_time, low
from dino.engine.train import Trainer
from dino.errors import TrainingError
from dino.options import replace, required
from dino.options.auto import choose_check_interval
from dino.options.train import TrainOptions
from dino.terminal import Terminal

TRIAL = ".trial"  # folder in that of a run, for the time of its trial
CHECKS_SHARE = 0.1  # of the time
REPORT = 2.0  # seconds of a report, beside features of as many images as a check computes

Make = Callable[[TrainOptions, Path, Terminal], Trainer]


class Trial(NamedTuple):
    """A run without end that was stopped.

    Args:
        apart: what such a run takes apart from its steps, its saves and all checks but the first, seconds.
    """

    trainer: Trainer
    apart: float


def try_out(options: TrainOptions, place: Path, make: Make, seconds: float, patience: float = math.inf) -> Trial:
    """Some `seconds` of the steps of a run with these options, and two checks.

    Args:
        place: folder for the trial.
        make: builds the trainer of a run.
        patience: seconds that the first check may take for a second one; later ones are faster.

    Raises:
        TrainingError: the run cannot go on.
    """
    before = time.monotonic()
    endless = {"epochs": 10**6, "log.knn_every": 0, "log.keep_teachers": 0, "log.to": (), "stop_after": None}
    trainer = make(replace(options, endless), place, Terminal(False))
    getting_ready, pace = time.monotonic() - before, trainer.pace
    pace.limit = seconds
    trainer.fit()
    if any(distributed.gather(trainer.signals.received)):
        raise KeyboardInterrupt
    first_check = low(pace.checks)
    if distributed.from_main(lambda: first_check < patience):
        with pace.pause(pace.checks):
            trainer.method.eval()
            required(trainer.callback)(trainer.teachers.get(), 0)
    return Trial(trainer, getting_ready + pace.start_up + first_check + options.report * (low(pace.checks) + REPORT))


def choose_length(
    options: TrainOptions, folder: Path, make: Make, terminal: Terminal, began: float, seconds: float
) -> TrainOptions:
    """`options` with the epochs that fit into its minutes and hours, from a trial of which nothing is kept.

    Args:
        make: builds the trainer of a run.
        began: when the command did, on the monotonic clock.
        seconds: of the trial, at most.

    Raises:
        ValueError: not even a step fits.
        TrainingError: the trial failed.
    """
    limit, place = required(options.budget), folder / TRIAL
    terminal.say(f"Measuring how much fits into {describe_time(limit)} ...")
    options = replace(options, {"minutes": None, "hours": None})
    try:
        distributed.from_main(place.mkdir)
        trial = try_out(options, place, make, min(seconds, max(3, limit / 25)), limit / 20)
    except TrainingError as error:
        if error.__cause__ is None:
            return options  # unreadable images, for example: the run ends so itself, and keeps the list of them
        raise TrainingError(f"the speed could not be measured ({error.__cause__}); repeat the command.") from error
    finally:
        if distributed.is_main():
            shutil.rmtree(place, ignore_errors=True)
    pace, plan = trial.trainer.pace, Plan(options, trial.trainer.plan.steps_per_epoch)
    left = limit - (time.monotonic() - began) - trial.apart
    epochs = distributed.from_main(lambda: choose_epochs(pace, plan, left))
    if not epochs:
        needed = describe_time(limit - left)
        raise ValueError(
            f"no step fits into {describe_time(limit)}, as checks and all else take {needed}; give more --minutes."
        )
    terminal.say(f"{epochs:g} epochs fit, at {1 / pace.step:,.1f} steps/s.")
    every = distributed.from_main(lambda: space_checks(pace, options, epochs, left))
    return replace(options, {"epochs": epochs, "log.knn_every": every})


def choose_epochs(pace: Pace, plan: Plan, seconds: float) -> float:
    """The epochs that fit into so many seconds; 0 if no step does. Many are a whole number, few have three digits."""

    def predict(steps: int) -> float:
        every = space_checks(pace, plan.options, steps / plan.steps_per_epoch, seconds)
        return pace.predict(Plan(replace(plan.options, {"log.knn_every": every}), plan.steps_per_epoch), 0, steps)

    steps = bisect.bisect_right(range(1, 10**9), seconds, key=predict)
    epochs = steps / plan.steps_per_epoch
    return round(epochs) if epochs >= 50 else float(f"{epochs:.3g}")


def space_checks(pace: Pace, options: TrainOptions, epochs: float, seconds: float) -> float:
    """Epochs between checks, which take a tenth of the time at most where `options` leave them open."""
    if options.log.knn_every is not None:
        return options.log.knn_every
    checks = CHECKS_SHARE * max(seconds, 0) / max(low(pace.checks), 1e-3)
    return choose_check_interval(epochs, min(20, max(2, checks)))
