"""Commands as jobs of Slurm, through submitit, and `dino submit`, which sends a training.

Slurm starts a process for each GPU, with what torchrun would tell it. SIGUSR1 (before the time limit, at preemption, or from
`scancel --signal=USR1`) reaches all of them: they save, then submitit queues the job again, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomli_w

from dino import errors, files
from dino.data.specs import find_path
from dino.engine.folder import choose_folder, find_options
from dino.options import replace, toml
from dino.options.train import AUTO
from dino.options.trainings import SlurmOptions, SubmitOptions
from dino.terminal import say

LOGS = "slurm"  # a folder in the run's, for what Slurm and submitit write
WARNING = 90  # seconds before the time limit at which SIGUSR1 comes, or up to a minute earlier
MOST = 10_000  # times that a job reaches its time limit


class Job:
    """What each process of a job does: commands of dino, one after the other. submitit pickles it and calls it."""

    def __init__(self, commands: list[list[str]]):
        self.commands = commands

    def __call__(self) -> None:
        """Run the commands in this process, whose signals submitit handles; the first that fails ends it."""
        helpers = importlib.import_module("submitit.helpers")
        if helpers.JobEnvironment().num_tasks > 1:
            helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        for command in self.commands:
            if code := importlib.import_module("dino.cli").main(command):
                sys.exit(code)

    def checkpoint(self) -> Any:
        """What submitit queues again after a signal."""
        return importlib.import_module("submitit.helpers").DelayedSubmission(self)


def find_submitit() -> Any:
    """The module, before anything is written.

    Raises:
        ValueError: it is not installed, or there is no Slurm here.
    """
    submitit = errors.import_optional("submitit", "jobs of Slurm need submitit", "slurm")
    if not (shutil.which("sbatch") and shutil.which("srun")):
        raise ValueError(
            "there is no Slurm here (no sbatch and srun); use a machine of the cluster from which jobs are sent."
        )
    return submitit


def send(jobs: list[Job], folder: Path, name: str, options: SlurmOptions) -> str:
    """Give jobs to Slurm, several as one array, and return the id. Logs go to `folder`.

    Raises:
        ValueError: there is no Slurm or no submitit here, or Slurm refuses the job.
    """
    submitit = find_submitit()
    more = {key.replace("-", "_"): value or True for key, _, value in (text.partition("=") for text in options.slurm)}
    # It says where the cluster is, and must stay when the rest of a job's environment is left out.
    kept = {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}
    with (
        contextlib.redirect_stderr(io.StringIO()),  # submitit repeats there what its error says
        submitit.helpers.clean_env(),  # of the job in which this command may run
        submitit.helpers.environment_variables(**kept),
    ):
        executor = submitit.SlurmExecutor(folder, max_num_timeout=MOST)
        executor.update_parameters(
            job_name=name,
            partition=options.partition,
            time=math.ceil(60 * options.hours),
            nodes=options.nodes,
            ntasks_per_node=max(1, options.gpus),
            gpus_per_node=options.gpus or None,
            cpus_per_task=options.cpus,
            stderr_to_stdout=True,
            # srun of Slurm 22.05 and later does not see the cores of a task otherwise.
            setup=[
                "export SUBMITIT_PREEMPT_SIGNAL=USR1 SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
                "export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}",  # as `dino.cli` sets it for ranks of torchrun
            ],
            srun_args=["--kill-on-bad-exit=1"],
            additional_parameters={"requeue": True, "signal": f"USR1@{WARNING}", **more},
        )
        try:
            return executor.submit_array(jobs)[0].job_id.partition("_")[0]
        except submitit.core.utils.FailedJobError as error:
            said = str(error).replace("sbatch: error: ", "").strip().replace("\n", "; ").rstrip(".")
            raise ValueError(
                f"Slurm refuses the job ({said}); `sinfo` shows the cluster's partitions and nodes."
            ) from error


def count_left(job: str) -> int:
    """How many jobs of the array `job` wait or run."""
    if not job or not shutil.which("squeue"):
        return 0
    asked = ["squeue", "--noheader", "--array", "--jobs", job]
    return len(subprocess.run(asked, capture_output=True).stdout.splitlines())


def submit_command(options: SubmitOptions) -> None:
    """Send the training and say how to look at it. Its run directory is chosen here, and its options are written there."""
    find_submitit()
    training = find_options(options.training)
    run = choose_folder(training).absolute()
    if (path := find_path(training.data.path)) is not None and not path.exists():
        say(f"Warning: {training.data.path} is not on this machine; the job needs it on its own.")
    if training.data.num_workers is None and options.gpus:
        training = replace(training, {"data.num_workers": max(1, options.cpus - 1)})
    logs, there = run / LOGS, run.exists()
    with files.writing(run, leave=there):
        logs.mkdir(parents=True, exist_ok=True)
        files.write(logs / "train.toml", tomli_w.dumps(toml.to_dict(replace(training, {"resume": None, "out": None}))))
        command = ["train", str(logs / "train.toml"), "--out", str(run), "--resume", AUTO]
        job = send([Job([command])], logs, run.name, options)
    shown = os.path.relpath(run)
    print(
        f"Job {job}: {options.nodes} machine(s), {options.gpus} GPU(s) each, {options.hours:g} hours at a time; in {shown}\n"
        f"  log     tail -F {shown}/{LOGS}/{job}_0_log.out\n"
        f"  state   squeue --job {job}\n"
        f"  cancel  scancel {job}, which saves; to go on: dino submit train --resume {shown}"
    )
