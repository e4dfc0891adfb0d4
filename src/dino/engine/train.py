"""The training loop around `dino.engine.step`: data, schedules, metrics without syncs, exact resume, orderly endings.

Everything random is a function of (seed, step, sample), so a checkpoint holds the step and tensors, no generator
state, and continuing from it is bit for bit the run that was never interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from dino import distributed, errors, weights
from dino.data.device_decode import Undecodable
from dino.data.loader import Batch, ViewBatches, WorkerDied, iterate
from dino.data.normalize import normalize
from dino.data.sources import Source
from dino.engine import optim, parallel, sharding
from dino.engine.build import Plan, build_method
from dino.engine.checkpoint import Checkpoints
from dino.engine.log import MetricsLog
from dino.engine.monitor import CollapseMonitor
from dino.engine.pace import Pace
from dino.engine.progress import Progress
from dino.engine.prototypes import PrototypeMonitor
from dino.engine.quarantine import Quarantine
from dino.engine.sharded_checkpoint import ShardedCheckpoints
from dino.engine.signals import Signals
from dino.engine.step import Split, TrainingStep, draw_drop_path_noise
from dino.engine.teachers import Teachers
from dino.engine.trackers import Guarded, open_trackers
from dino.engine.waiting import Waiting
from dino.errors import TrainingError
from dino.machine import measure_peak_memory
from dino.models import Backbone
from dino.options import flatten_names, required
from dino.options.resume import check_resumable
from dino.options.toml import to_dict
from dino.options.train import TrainOptions
from dino.randomness import seed_step
from dino.terminal import Terminal
from dino.weights.checkpoints import are_finite, find_tensors
from dino.weights.checks import load_strictly

LATER = ("prototypes", "best", "callback")  # parts of the state that older checkpoints may lack

# Measures the teacher's backbone after so many steps; all ranks call it. Its state, if it has one, is kept in checkpoints.
Callback = Callable[[Backbone, int], dict[str, float]]


class Trainer:
    """One run: state, the loop, and what it leaves in the run directory."""

    def __init__(
        self,
        options: TrainOptions,
        run: Path,
        source: Source,
        batches: ViewBatches,
        device: torch.device,
        terminal: Terminal,
        callback: Callback | None = None,
        frozen: Backbone | None = None,
    ):
        self.options, self.run, self.source, self.batches = options, run, source, batches
        self.device, self.terminal, self.callback = device, terminal, callback
        self.render = batches.renderer.finish
        self.render_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.plan = Plan(options, batches.steps_per_epoch)
        self.frozen = None if frozen is None else weights.fingerprint(frozen)  # once, for it takes a while
        self.method = build_method(options, frozen).to(device)
        optim.choose_trained(self.method.student.backbone, options.start.train)
        precision = parallel.choose_precision(options.precision, device)
        optimizer = optim.create_optimizer(options.optim, self.method.student)
        ranks, share = batches.world_size, batches.share
        weight = (share.stop - share.start) * ranks / batches.batch_size
        self.training_step = TrainingStep(self.method, optimizer, device, precision, options.optim.clip_grad, weight)
        self.training_step.set_split(self._check_split(Split(options.accumulate, options.recompute)))
        self._share_batch_norm()
        self.waiting = Waiting(device)
        if ranks > 1:
            self.training_step.time = self.waiting.time
        self.monitor = CollapseMonitor(options.head.out_dim or 1, batches.batch_size // batches.world_size)
        self.prototypes = PrototypeMonitor(self.training_step)
        self.teachers = Teachers(self.plan, run, self.method, device)
        kept = run / "checkpoints", options.log.keep
        sharded = options.shard != "none"
        self.checkpoints = ShardedCheckpoints(*kept, self.training_step) if sharded else Checkpoints(*kept)
        self.quarantine = Quarantine(run / "quarantine.jsonl", len(source), options.data.max_bad_fraction)
        self.step = 0  # steps done
        self.pace = Pace(required(options.data.num_workers))
        self.progress = Progress(terminal, self.plan, self.pace)
        self.signals = Signals(terminal)
        self.failure: Exception | None = None  # a reason to save and end
        self.hurts = False  # training has made the weights that it started from worse, for long
        self.metrics: MetricsLog | None = None
        self.trackers: list[Guarded] = []  # beside those of the option `log.to`
        self.copy: Callable[[], None] = lambda: None  # the run directory to another place, after every save
        self._pending: list[dict[str, Tensor]] = []
        self._bad: list[tuple[str, str]] = []

    def _check_split(self, split: Split) -> Split:
        if split.parts > 1 and parallel.has_batch_norm(self.method):
            raise ValueError(
                f"accumulate is {split.parts}, but this model has BatchNorm, whose statistics are of all images of a step; "
                "use --recompute blocks instead, or a smaller --batch-size."
            )
        offered = self.training_step.backbone.recomputable
        if split.recompute not in offered:
            raise ValueError(
                f"recompute is {split.recompute}, which {self.options.model.arch} does not offer; use "
                f"--recompute {' or '.join(offered)}."
            )
        return split

    def _share_batch_norm(self) -> None:
        if distributed.world_size() == 1 or not parallel.has_batch_norm(self.method):
            return
        if self.device.type == "cuda":
            parallel.synchronize_batch_norm(self.method)
        else:
            self.terminal.say("BatchNorm runs over each process's own images: only GPUs can share its statistics.")

    # --- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = {"step": self.step, "method": self.method.state_dict()}
        state |= {name: part.state_dict() for name, part in self._parts.items()}
        return state | {"options": to_dict(self.options), "frozen": self.frozen, "data": self.source.fingerprint}

    @property
    def _parts(self) -> dict[str, Any]:
        """What has a state beside the networks, by its name in checkpoints."""
        step = self.training_step
        parts: dict[str, Any] = {"optimizer": step.optimizer, "scaler": step.scaler, "monitor": self.monitor}
        parts |= {"prototypes": self.prototypes, "best": self.teachers.best, "callback": self.callback}
        return {name: part for name, part in parts.items() if isinstance(part, Stateful)}  # a callback may have none

    def resume(self) -> bool:
        """Load the newest whole checkpoint of the run directory, if there is one.

        Raises:
            ValueError: it was trained on other images or with other options.
        """
        found = self.checkpoints.load()
        if found is None:
            if (self.run / weights.WEIGHTS).exists():
                raise ValueError(f"{self.run} has weights but no checkpoint; start a new run with --init {self.run}.")
            return False
        for reason in found.refused:
            self.terminal.say(f"{reason} Taking {found.path.name}.", style="yellow")
        state = found.state
        if (trained := state["data"]) != self.source.fingerprint:
            raise ValueError(
                f"--resume {self.run}: the images are not the ones this run was started with (fingerprint "
                f"{self.source.fingerprint[:12]}, was {trained[:12]}); restore them or start a new run."
            )
        if self.frozen != state.get("frozen"):
            raise ValueError(
                f"--resume {self.run}: the weights of {self.options.method.frozen} are not those that this run learned from; "
                "restore them, or start a new run."
            )
        of_no_more_use = {name: getattr(self.options, name) for name in ("init", "out", "overwrite")}
        check_resumable(flatten_names(state["options"]) | of_no_more_use, self.options)
        load_strictly(self.method, state["method"], str(found.path))
        for name, part in self._parts.items():
            if name in state or name not in LATER:
                part.load_state_dict(state[name])
        self.step = state["step"]
        return True

    def save(self, last: bool) -> None:
        """Checkpoint, and the backbones of the best and the last teacher as files of their own.

        Args:
            last: of this process. Only then a sharded run, which goes on while it writes, writes its teachers.
        """
        sharded = self.options.shard != "none"
        with self.pace.pause(self.pace.saves):
            if sharded or distributed.is_main():
                self.checkpoints.save(self.step, self.state_dict())
            if last or not sharded:
                self.checkpoints.finish()
                self.teachers.save(self.step)
            if distributed.is_main():
                self._copy()

    def _copy(self) -> None:
        try:
            self.copy()
        except ValueError as error:  # of the network; the next save copies what is missing
            self.terminal.say(f"Warning: {error} The next save tries again.", style="yellow")

    def distribute(self) -> None:
        """Average the gradients over ranks, or with the option `shard` spread the networks over them. Before any resume."""
        if self.options.shard == "none" or distributed.world_size() == 1:
            self.training_step.distribute()
            return
        sharding.shard(self.method, self.device, self.options.shard)
        self.training_step.sharded = True
        self.training_step.optimizer = optim.create_optimizer(self.options.optim, self.method.student)

    # --- the loop ----------------------------------------------------------------------------------------------

    def fit(self) -> bool:
        """Train to the end, `stop_after`, or a signal; True when the run is complete.

        Raises:
            TrainingError: the run cannot go on; says why, and from which checkpoint it can be continued.
        """
        total = self.plan.total
        stop = min(total, self.options.stop_after or total)
        if self.options.compile:
            self.terminal.say("Compiling: the first step takes a minute or more.")
            parallel.compile_networks(self.method)
        self.terminal.start(self.step, total)
        with self.signals:
            try:
                if distributed.is_main():
                    to = open_trackers(self.options.log.to, self.run, self.step, flatten_names(to_dict(self.options)))
                    self.metrics = MetricsLog(self.run, self.step, [*to, *self.trackers])
                if self.step == 0:
                    self._measure()
                    self.teachers.keep(self.step)
                self._run(stop)
            except OSError as error:
                raise self._end(errors.find_reason(error)) from error
            finally:
                self.terminal.stop()
                if self.metrics is not None:
                    self.metrics.close()
        if self.failure is not None:
            raise self._end(str(self.failure)) from self.failure
        complete = self.step >= total or self.hurts
        if not complete:
            self.signals.pass_on()
        return complete

    def _end(self, reason: str) -> TrainingError:
        return TrainingError(
            f"{self.run} ended after step {self.step} ({reason}); {self.checkpoints.describe_good()}; "
            f"{errors.advise_space(reason)}continue with: dino train --resume {self.run}"
        )

    def _run(self, stop: int) -> None:
        batches = self._iterate(stop)
        log, per_epoch = self.options.log, self.plan.steps_per_epoch
        self.pace.start(self.step)
        saved = started = time.monotonic()
        waited = 0.0
        first = self.step
        can_ask = self.device.type != "cuda" or distributed.world_size() == 1  # at every step, without waiting
        while self.step < stop:
            before = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - before
            self._pending.append(self.take_step(batch))
            self.step += 1
            epoch_ends = self.step % per_epoch == 0
            measure = self.step % self.plan.measure_every == 0 or self.step == self.plan.total
            due = self.step % log.every == 0 or epoch_ends or measure or self.step == stop
            due = due or self.step in self.plan.kept_teachers  # only a log step looks whether all is finite
            if not (due or (can_ask and self._agree_to_end())):
                if self.device.type == "cpu":  # a GPU has only begun the step
                    self.pace.reach(self.step)
                    self.progress.show(self.step, stop)
                continue
            now = time.monotonic()
            ending = self._log(self.step - first, now - started, waited)
            self.pace.reach(self.step)
            first, started, waited = self.step, now, 0.0
            if measure:
                self._measure()
                ending = ending or self._agree_to_end()
                started = time.monotonic()
            self.teachers.keep(self.step)
            self.progress.show(self.step, stop)
            if epoch_ends or ending or self.step == stop or now - saved > 60 * log.checkpoint_minutes:
                self.save(last=ending or self.step == stop)
                saved = started = time.monotonic()
            if ending:
                return

    def _iterate(self, stop: int) -> Iterator[Batch]:
        """The batches from here on. This process reads the last ones, until all ranks have saved, after a worker has died.

        A signal to all processes of a job, as of Slurm or torchrun, ends the workers too. That is no failure.
        """
        workers = required(self.options.data.num_workers)
        try:
            for batch in iterate(self.batches, self.step, stop, workers, pin_memory=self.device.type == "cuda"):
                yield batch
                if self.signals.received:
                    break
        except WorkerDied as error:
            self.failure = None if self.signals.received else error
        yield from (self.batches[step] for step in range(self.step, stop))

    def _agree_to_end(self) -> bool:
        """Whether a signal or a failure asks any rank to end; all ranks call it. Among GPUs it waits for the device."""
        asked = self.signals.received or self.failure is not None or self.hurts or self.pace.is_over()
        device = self.device if distributed.world_size() > 1 else "cpu"
        own = torch.tensor([asked, self.signals.requeue], dtype=torch.float, device=device)
        asked, requeue = distributed.sum_(own).tolist()
        self.signals.requeue |= requeue > 0  # the main rank requeues the job, also where another had the signal first
        return asked > 0

    def take_step(self, batch: Batch) -> dict[str, Tensor]:
        """Train on one batch; what to log, on the device."""
        seed_step(self.options.seed, distributed.rank(), self.step)
        return self.training_step(self.render_views(batch), self.plan.rates(self.step), self.draw_noise(self.step))

    def draw_noise(self, step: int) -> list[Tensor] | None:
        """This rank's drop-path noise of a step; None where the backbone draws for itself or drops nothing."""
        batches, num = self.batches, self.training_step.backbone.num_drop_path
        if not num:
            return None
        return draw_drop_path_noise(
            self.options.seed, step, num, self.options.views.sizes, batches.batch_size, batches.share, self.device
        )

    def render_views(self, batch: Batch) -> list[Tensor]:
        """The batch's views as the networks take them, float32 [v * n, c, s, s] per resolution.

        A GPU renders them on a stream of their own, while it still computes the step before.
        """
        time = self.training_step.time
        with torch.cuda.stream(self.render_stream):
            with time("transfer, render"):
                try:
                    groups = self._render(batch)
                except Undecodable:  # decoding in this process names the file, and takes the stand-in of a worker
                    groups = self._render(self.batches.decode_batch(self.step))
            with time("normalize"):
                wanted = self.training_step.backbone.preprocessing
                groups = [normalize(distributed.send(g, self.device), wanted) for g in groups]
        if self.render_stream is not None:
            step = torch.cuda.current_stream(self.device)
            step.wait_stream(self.render_stream)
            for g in groups:
                g.record_stream(step)  # keeps its memory until the step is done
        return groups

    def _render(self, batch: Batch) -> list[Tensor]:
        self._bad += batch.bad
        if not batch.prepared:
            self._share_bad(only_here=True)
        return batch.prepared if batch.views is None else self.render(batch.prepared, batch.views)

    def _share_bad(self, only_here: bool = False) -> None:
        bad, self._bad = self._bad, []
        self.quarantine.share(bad, self.terminal, only_here)

    # --- between steps -----------------------------------------------------------------------------------------

    def _log(self, steps: int, seconds: float, waited: float) -> bool:
        """Average, write and show the metrics since the last time; True when a signal asks all ranks to end."""
        own = torch.stack([torch.stack(list(p.values())) for p in self._pending]).mean(dim=0)
        means = (distributed.sum_(own * self.training_step.weight) / distributed.world_size()).tolist()
        values = dict(zip(self._pending[0], means, strict=True))
        self._pending.clear()
        ending = self._agree_to_end()
        if what := self._find_not_finite(values):
            raise self._diverge(what, steps)
        self._share_bad()
        if distributed.world_size() > 1 and (said := self.waiting.look(steps, waited)):
            self.terminal.say(said, style="yellow")
        values |= self.prototypes.look(epoch_ends=self.step % self.plan.steps_per_epoch == 0)
        rates = self.plan.rates(self.step - 1)
        speed = steps * required(self.options.batch_size) / seconds
        if "teacher_entropy" in values:
            values["kl"] = values["loss"] - values["teacher_entropy"]
        values |= {
            "epoch": self.step / self.plan.steps_per_epoch,
            **{name: getattr(rates, name) for name in ("lr", "weight_decay", "momentum", "teacher_temp")},
            "images_per_second": speed,
            "data_wait_share": waited / seconds,
            "peak_memory_gb": measure_peak_memory(self.device) / 1e9,
        }
        if self.metrics is not None:
            self.metrics.write(self.step, values)
        if warning := self.monitor.look(self.step, values):
            self.terminal.say(f"Warning: {warning}", style="bold yellow")
            if self.metrics is not None:
                self.metrics.write(self.step, {"collapse": 1.0})
        elif advice := self.prototypes.advise(self.step, values):
            self.terminal.say(f"Advice: {advice}", style="yellow")
        self.progress.status = f"loss {values['loss']:.3f}  {speed:,.0f} images/s"
        return ending

    def _diverge(self, what: str, steps: int) -> TrainingError:
        """The error to raise for `what`, a clause, which happened within the last `steps` steps."""
        start = ", if you like from that checkpoint with --init" if self.checkpoints.good else ""
        return TrainingError(
            f"{what} between steps {self.step - steps} and {self.step} of {self.run}; "
            f"{self.checkpoints.describe_good()}. Lower --optim.lr, or use --precision bf16 or fp32 if it was fp16, and "
            f"start a new run{start}."
        )

    def _find_not_finite(self, means: dict[str, float]) -> str:
        """What is no longer finite, as the beginning of a sentence; "" if all is. Nothing else is ever saved."""
        if not math.isfinite(means["loss"]):
            return f"the loss became {means['loss']}"
        if not math.isfinite(means["grad_norm"]) and self.training_step.precision != "fp16":  # which skips such steps
            return f"the gradient became {means['grad_norm']}"
        kept = self.method.state_dict(), self.training_step.optimizer.state_dict()["state"]
        infinite = distributed.max_(1 - are_finite(find_tensors(kept)).int())  # ranks must agree
        return "the weights became infinite or not a number" if infinite else ""

    def _measure(self) -> None:
        """Let the callback look at the method."""
        if self.callback is None:
            return
        self.method.eval()
        with self.pace.pause(self.pace.checks):
            backbone = self.teachers.get()
            try:
                values = self.callback(backbone, self.step)
            except errors.NotFinite as error:  # of weights that are finite still
                raise self._diverge("the features became infinite or not a number", 1) from error
        self.method.train()
        if values and self.metrics is not None:
            self.metrics.write(self.step, {"epoch": self.step / self.plan.steps_per_epoch} | values)
        self.teachers.best.consider(self.step, values, backbone)
        self.hurts = self.options.start.stop and self.teachers.best.is_worse_for_long(self.plan.total)
        self.progress.set_knn(values.get("knn20_top1"), self.step)
        distributed.barrier()
