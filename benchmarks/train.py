"""Training from JPEG files, end to end: ours against the reference's pipeline and step, in turns on one machine.

    python benchmarks/train.py --images FOLDER [--reference CHECKOUT] [--device cuda]

Each turn is a loader with its workers and some steps of a run (2 x 224 + 8 x 96 views), timed once the batches that
workers make ahead are used up, and for whole rounds of the workers: a slow loader delivers a batch of each at once.
'In memory' are the same steps of ours with one batch of views that lies on the device already: what the loader and the
rendering cost is the difference. The peer reads the same files with torchvision's transforms (with `--reference`, the
class DataAugmentationDINO of a checkout of facebookresearch/dino) and trains with the plain step of `step.py` or of
that checkout, in fp16 on a GPU as the reference ships it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import harness
import step
import views
from dino import run
from dino.bench import measure_seconds
from dino.data.loader import Batch, iterate
from dino.engine import parallel
from dino.engine.train import Trainer
from dino.machine import count_spare_cores
from dino.options import replace
from dino.options.recipes import find_recipe
from dino.terminal import Terminal

VIEWS = {"views.global_scale": views.OPTIONS.global_scale, "views.local_scale": views.OPTIONS.local_scale}
WARM_UP = 3  # steps that are not timed, beside those that take what the workers made ahead: kernels are chosen
AHEAD = 2  # batches that a worker makes ahead, here and in PyTorch's loader


class PeerImages(Dataset[list[Tensor]]):
    """The files over and over, each time with other views."""

    def __init__(self, paths: list[Path], peer: views.Peer):
        self.paths, self.peer = paths, peer

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.peer(Image.open(self.paths[index % len(self.paths)]).convert("RGB"))


class InMemory(Trainer):
    """A trainer whose views lie on the device, once there are any."""

    ready: list[Tensor] | None = None

    def render_views(self, batch: Batch) -> list[Tensor]:
        self.ready = self.ready or super().render_views(batch)
        return self.ready


def timed(one: Callable[[], object], steps: int, workers: int, batch: int, device: torch.device) -> float:
    """Images per second of `steps` steps, more for a whole number of rounds of the workers, after others."""

    def work(count: int) -> None:
        for _ in range(count):
            one()

    work(WARM_UP + AHEAD * workers)
    steps = -(-steps // max(1, workers)) * max(1, workers)
    return steps * batch / measure_seconds(lambda: work(steps), device)


def measure(paths: list[Path], peer: views.Peer, folder: Path, options: Any) -> dict[str, Any]:
    device, workers, batch = torch.device(options.device), options.workers, options.batch
    on_gpu = device.type == "cuda"
    values = {
        "data.path": str(options.images),
        "data.num_workers": workers,
        "data.decode": options.decode,
        "data.val_fraction": 0.0,
        "batch_size": batch,
        "model.arch": options.arch,
        "head.out_dim": options.prototypes,
        "log.knn_every": 0,
    }
    values |= {} if on_gpu else {"precision": "fp32", "views.global_size": 96, "views.local_size": 48}
    wanted = replace(find_recipe("vit_small_100ep").options, VIEWS | values)
    ours, _ = run.set_up(wanted, folder / "ours", device, Terminal(False))
    memory = InMemory(*(getattr(ours, name) for name in ("options", "run", "source", "batches", "device", "terminal")))
    if options.compile:
        parallel.compile_networks(ours.method)
        parallel.compile_networks(memory.method)
    precisions = "fp32", "fp16" if on_gpu else "fp32"
    _, plain = step.sides(options.arch, options.prototypes, device, *precisions, drop_path=step.DROP_PATH)
    _, peer_step = step.peer_of(plain, options.arch, 16, options.reference)

    def our_turn(trainer: Trainer) -> float:
        trainer.step = trainer.plan.total // 2  # away from warm-up and frozen prototypes, as the peer
        if trainer is memory:
            first = trainer.batches[trainer.step]
            return timed(lambda: trainer.take_step(first), options.steps, 0, batch, device)
        prepared = iterate(trainer.batches, trainer.step, 10**9, workers, on_gpu)
        return timed(lambda: trainer.take_step(next(prepared)), options.steps, workers, batch, device)

    def peer_turn() -> float:
        loader = DataLoader(PeerImages(paths, peer), batch, num_workers=workers, pin_memory=on_gpu)
        batches = iter(loader)

        def one() -> None:
            crops = [crop.to(device, non_blocking=True) for crop in next(batches)]
            peer_step([torch.cat(crops[:2]), torch.cat(crops[2:])])

        return timed(one, options.steps, workers, batch, device)

    turns = {"ours": lambda: our_turn(ours), "in memory": lambda: our_turn(memory), "peer": peer_turn}
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for pair in range(options.pairs):
        for name in list(turns)[:: -1 if pair % 2 else 1]:
            rates[name].append(turns[name]())
        print("   ".join(f"{name} {rate[-1]:.1f} images/s" for name, rate in rates.items()), file=sys.stderr)
    return {
        "arch": options.arch,
        "views": "2 x 224 + 8 x 96",
        "prototypes": options.prototypes,
        "batch": batch,
        "workers": workers,
        "decode": options.decode,
        "precision": ours.training_step.precision,
        "compiled": options.compile,
        "images": len(paths),
        "ratio": harness.ratio(rates["ours"], rates["peer"]),
        "share_of_in_memory": harness.ratio(rates["ours"], rates["in memory"]),
        "images_per_second": {name: harness.spread(rate) for name, rate in rates.items()},
    }


def main() -> None:
    parser = harness.parser(__doc__, "train")
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEGs, searched at any depth")
    parser.add_argument(
        "--reference", type=Path, help="checkout of facebookresearch/dino, whose augmentation and step are the peer"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of a turn")
    parser.add_argument("--workers", type=int, default=count_spare_cores())
    parser.add_argument("--decode", choices=("workers", "device"), default="workers", help="who decodes for us")
    parser.add_argument("--compile", action="store_true")
    options = harness.parse(parser)
    paths = views.jpeg_paths(options.images)
    peer = views.plain_peer() if options.reference is None else views.reference_peer(options.reference)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(paths, peer, Path(folder), options)
    plain = "torchvision transforms on Pillow, the plain step of step.py"
    own = "the reference's DataAugmentationDINO and step, in PyTorch's loader"
    what = {
        "what": "training from JPEG files, images/s of ours / the peer's",
        "peer": own if options.reference else plain,
    }
    harness.write(what | figures, options)


if __name__ == "__main__":
    harness.run(main)
