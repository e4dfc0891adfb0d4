"""Memory of a rank of ViT-L/16 with 65,536 prototypes on two ranks: networks whole, and spread over both (`--shard all`).
And the share of time that sharded checkpoints take while training goes on.

    python benchmarks/sharding.py [--arch vit_large] [--out-dim 65536] [--ranks 2]

Images are small, for memory of parameters is in question, not of activations. "kept" are the tensors between two steps:
parameters, buffers, gradients and moments; whole networks are measured in one process, of which every rank of DDP is a copy.
"peak" is the whole process at its largest. Time: steps of a smaller network, with
a checkpoint every `--every` steps and without, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import harness
from dino import distributed
from dino.engine import optim, sharding
from dino.engine.sharded_checkpoint import ShardedCheckpoints
from dino.engine.step import Rates, TrainingStep
from dino.machine import measure_peak_memory
from dino.method import DINO, Network
from dino.models import Head, create
from dino.options.train import OptimOptions
from dino.weights.checkpoints import find_tensors

RATES = Rates(lr=1e-4, weight_decay=0.04, momentum=0.99, teacher_temp=0.04)


def build_step(arch: str, out_dim: int, shard: str, device: torch.device) -> TrainingStep:
    def network() -> Network:
        backbone: Any = create(arch, patch_size=16, image_size=32)
        return Network(backbone, Head(backbone.embed_dim, out_dim))

    method = DINO(network(), network()).to(device)
    if shard != "none":
        sharding.shard(method, device, "all")
    step = TrainingStep(method, optim.create_optimizer(OptimOptions(name="adamw"), method.student), device)
    if shard == "none":
        step.distribute()
    return step


def take(step: TrainingStep) -> float:
    """Seconds of a step of one image."""
    started = time.perf_counter()
    step([torch.randn(2, 3, 32, 32, device=step.device)], RATES)
    return time.perf_counter() - started


def count_kept(step: TrainingStep) -> int:
    """Bytes of this rank's parts of all tensors that are there between two steps; shared storage counts once."""
    gradients = [p.grad for p in step.method.student.parameters() if p.grad is not None]
    tensors = find_tensors([step.method.state_dict(), step.optimizer.state_dict(), gradients])
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in map(distributed.get_local, tensors)
    }
    return sum(storages.values())


def measure_memory(options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    step = build_step(options.arch, options.out_dim, options.measure, device)
    for _ in range(2):
        take(step)
    return {"kept_gb": count_kept(step) / 1e9, "peak_gb": measure_peak_memory(device) / 1e9}


def measure_checkpoints(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of as many steps with a checkpoint as without, in turns."""
    step = build_step("vit_small", 4096, "all", device)
    take(step)
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    blocked: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        place = distributed.from_main(lambda: folder)
        checkpoints = ShardedCheckpoints(Path(place), 1, step)
        for turn in range(options.pairs):
            for way, times in seconds.items():
                started = time.perf_counter()
                for number in range(options.every):
                    take(step)
                    if way == "with" and number == 0:
                        before = time.perf_counter()
                        state = {
                            "method": step.method.state_dict(),
                            "optimizer": step.optimizer.state_dict(),
                            "step": turn,
                        }
                        checkpoints.save(turn, state)
                        blocked.append(time.perf_counter() - before)
                distributed.barrier()
                times.append(time.perf_counter() - started)
                checkpoints.finish()
        size = sum(file.stat().st_size for file in checkpoints.good[-1].iterdir())
        distributed.barrier()
    without, with_ = (statistics.median(times) for times in seconds.values())
    return {
        "steps": options.every,
        "seconds_without": without,
        "seconds_with": with_,
        "training_waits_seconds": statistics.median(blocked),
        "checkpoint_mb": size / 1e6,
        "pairs": options.pairs,
    }


def launch(options: argparse.Namespace, what: str, ranks: int) -> dict[str, Any]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    given = ["--measure", what, "--arch", options.arch, "--out-dim", str(options.out_dim)]
    more = ["--every", str(options.every), "--pairs", str(options.pairs)]
    done = subprocess.run([*launcher, __file__, *given, *more], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    made = harness.parser(__doc__, "sharding")
    made.set_defaults(pairs=3)
    made.add_argument("--arch", default="vit_large")
    made.add_argument("--out-dim", type=int, default=65536)
    made.add_argument("--ranks", type=int, default=2)
    made.add_argument("--every", type=int, default=100, help="steps from one checkpoint to the next")
    made.add_argument("--measure", choices=("none", "all", "checkpoints"), help="for this program itself")
    options = harness.parse(made)
    if options.measure:
        device = distributed.start("auto")
        found = (measure_checkpoints if options.measure == "checkpoints" else measure_memory)(options, device)
        if distributed.is_main():
            print(json.dumps(found))
        distributed.stop()
        return
    whole = launch(options, "none", 1)
    sharded, checkpoints = (launch(options, what, options.ranks) for what in ("all", "checkpoints"))
    result = {"whole": whole, "sharded": sharded, "checkpoints": checkpoints}
    result |= {f"{key}_of_whole": sharded[f"{key}_gb"] / whole[f"{key}_gb"] for key in ("kept", "peak")}
    result["more_time_with_checkpoints"] = checkpoints["seconds_with"] / checkpoints["seconds_without"] - 1
    harness.write(result, options)


if __name__ == "__main__":
    harness.run(main)
