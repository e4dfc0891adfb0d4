"""Options of commands that send, repeat, measure or plan trainings. The text under a field is its help."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from tyro.conf import Positional, Suppress, arg

from dino.options.rules import Few, NoneOrFew, Options, PositiveFloat, PositiveInt, Rule
from dino.options.train import TrainOptions

SBATCH_OPTION = Rule(
    re.compile(r"[a-z][a-z_-]*(=.*)?").fullmatch, "write an option of sbatch as KEY=VALUE, or KEY alone, without dashes"
)


class SlurmOptions(Options):
    nodes: Few = 1
    """Machines."""
    gpus: NoneOrFew = 1
    """GPUs of each machine, every one with a process of its own. 0: one process on the machine's CPU."""
    cpus: Few = 8
    """Cores of each process."""
    hours: PositiveFloat = 24
    """Limit of time. What is not done by then is saved, queued again, and goes on."""
    partition: str | None = None
    """Where to run. None: the cluster's usual one."""
    slurm: tuple[Annotated[str, SBATCH_OPTION], ...] = ()
    """Other options of sbatch, e.g. qos=high mem=64G exclusive."""


class SubmitOptions(SlurmOptions):
    training: Suppress[TrainOptions] = TrainOptions()  # what follows the word `train`

    def contradictions(self) -> Iterator[str]:
        if self.training.overwrite:
            yield (
                "a job that is queued again continues its run, so --overwrite does not go with dino submit; delete the old "
                "run yourself, or choose another --out."
            )


class AblateOptions(Options):
    table: Annotated[Positional[str], arg(metavar="[TABLE]")] = ""
    """Which of the paper's tables (7, 14, 15, teacher, crops, prototypes, ...). Without one, they are listed."""
    data: str | None = None
    """Labeled images: a folder with train/ and val/, or a folder of classes (a tenth of it becomes the test set)."""
    val: str | None = None
    """Labeled test images, when they lie elsewhere."""
    scale: Literal["tiny", "paper"] = "tiny"
    """'tiny': minutes a row, small images and model; shows what collapses. 'paper': ViT-S/16, 100 or 300 epochs."""
    recipe: str | None = None
    """Recipe or TOML file that rows start from. None: cifar10 at tiny scale, the table's own at paper scale."""
    epochs: PositiveInt | None = None
    """Epochs of every row. None: 8 at tiny scale, the recipe's at paper scale."""
    out: str | None = None
    """Folder for the runs and the table. None: runs/ablate-TABLE. The same command again goes on where it stopped."""
    jobs: Few = 1
    """Rows trained at a time on a CPU; with GPUs it is one row for each."""
    report: bool = True
    """Write each row's report.html."""
    device: Literal["auto", "cpu"] = "auto"
    """Where to compute."""
    slurm: tuple[Annotated[str, SBATCH_OPTION], ...] | None = None
    """Train the rows as jobs of Slurm, an array with a GPU each, with options of sbatch such as partition=P time=8:00:00. The
    same command again collects them."""


class BenchOptions(TrainOptions):
    json: str | None = None
    """File to write the figures to."""
    seconds: PositiveFloat = 40
    """About how long to measure."""


class PlanOptions(TrainOptions):
    toml: str = "plan.toml"
    """File of options to write, which `dino train` takes."""
    gpu: Literal["h200", "h100", "a100", "l4", "t4", "v100", "rtx4090", "mps"] | None = None
    """Plan for a GPU that is not here: its time is computed from the arithmetic of a step. None: this machine, measured."""
    seconds: PositiveFloat = 20
    """About how long to measure steps."""
    price: PositiveFloat | None = None
    """What an hour of this machine costs, in any currency."""
