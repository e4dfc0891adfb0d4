"""Options of commands that send, repeat, measure or plan trainings. The text under a field is its help."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from tyro.conf import Positional, Suppress

from dino.options import rules
from dino.options.rules import Options
from dino.options.train import TrainOptions

_SBATCH = "write an option of sbatch as KEY=VALUE, or KEY alone, without dashes"
SbatchOption = Annotated[str, rules.Metavar("KEY=VALUE"), rules.matching(r"[a-z][a-z_-]*(=.*)?", _SBATCH)]


class SlurmOptions(Options):
    nodes: rules.Few = 1
    """Machines."""
    gpus: rules.NoneOrFew = 1
    """GPUs of each machine, every one with a process of its own. 0: one process on the machine's CPU."""
    cpus: rules.Few = 8
    """Cores of each process."""
    hours: rules.PositiveFloat = 24
    """Limit of time. What is not done by then is saved, queued again, and goes on."""
    partition: rules.Name | None = None
    """Where to run. None: the cluster's usual one."""
    slurm: tuple[SbatchOption, ...] = ()
    """Other options of sbatch, e.g. qos=high mem=64G exclusive."""


class SubmitOptions(SlurmOptions):
    """Train as a job of Slurm, which goes on by itself after its time limit.

    dino submit --gpus 8 train --data photos/ --out runs/a
    dino submit --nodes 2 --gpus 8 train vit_small_100ep --data imagenet/train

    `dino submit train --help` explains what can follow the word `train`.
    """

    training: Suppress[TrainOptions] = TrainOptions()  # what follows the word `train`

    def contradictions(self) -> Iterator[str]:
        if self.training.overwrite:
            yield (
                "a job that is queued again continues its run, so --overwrite does not go with dino submit; delete the old "
                "run yourself, or choose another --out."
            )


class AblateOptions(Options, common=("data", "val", "scale", "epochs", "out")):
    """Train the rows of one of the paper's tables, and compare them.

    dino ablate
    dino ablate 7 --data labeled/ --epochs 2
    """

    table: Positional[str] = ""
    """Which of the paper's tables (7, 14, 15, teacher, crops, prototypes, ...). Without one, they are listed."""
    data: rules.DataSpec | None = None
    """Labeled images: a folder with train/ and val/, or a folder of classes (a tenth of it becomes the test set)."""
    val: rules.DataSpec | None = None
    """Labeled test images, when they lie elsewhere."""
    scale: Literal["tiny", "paper"] = "tiny"
    """'tiny': minutes a row, small images and model; shows what collapses. 'paper': ViT-S/16, 100 or 300 epochs."""
    recipe: rules.Name | None = None
    """Recipe or TOML file that rows start from. None: cifar10 at tiny scale, the table's own at paper scale."""
    epochs: rules.PositiveInt | None = None
    """Epochs of every row. None: 8 at tiny scale, the recipe's at paper scale."""
    out: rules.Folder | None = None
    """Folder for the runs and the table. None: runs/ablate-TABLE. The same command again goes on where it stopped."""
    jobs: rules.Few = 1
    """Rows trained at a time on a CPU; with GPUs it is one row for each."""
    report: bool = True
    """Write each row's report.html."""
    device: Literal["auto", "cpu"] = "auto"
    """Where to compute."""
    slurm: tuple[SbatchOption, ...] | None = None
    """Train the rows as jobs of Slurm, an array with a GPU each, with options of sbatch such as partition=P time=8:00:00. The
    same command again collects them."""


class BenchOptions(TrainOptions, common=("data.path", "seconds", "json", "model.arch", "batch_size")):
    """Measure what training costs with your data on this machine, and which options help.

    dino bench --data photos/
    dino bench --data photos/ --seconds 20 --json bench.json

    A recipe (`dino recipes`) or a file of options can come first.
    """

    json: rules.File | None = None
    """File to write the figures to."""
    seconds: rules.PositiveFloat = 40
    """About how long to measure."""


class PlanOptions(
    TrainOptions, common=("data.path", "epochs", "minutes", "model.arch", "init", "gpu", "toml", "price")
):
    """Say what a training would be: the model, the time, the memory, and what to consider. Nothing is trained.

    dino plan --data photos/
    dino plan --data photos/ --minutes 30 --toml night.toml
    dino plan --data photos/ --gpu a100 --price 2.5

    A recipe (`dino recipes`) or a file of options can come first.
    """

    toml: rules.File | None = None
    """File of options to write, which `dino train` takes. None: plan.toml, or plan-2.toml and so on where that is."""
    gpu: Literal["h200", "h100", "a100", "l4", "t4", "v100", "rtx4090", "mps", "cpu"] | None = None
    """Plan for a GPU that is not here: its time is computed from the arithmetic of a step. None: this machine, measured;
    'cpu': without its GPU."""
    seconds: rules.PositiveFloat = 20
    """About how long to measure steps."""
    price: rules.PositiveFloat | None = None
    """What an hour of the machine costs, in any currency."""
