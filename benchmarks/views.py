"""Cost of turning JPEG files into multi-crop views on one core, side by side with the reference's own pipeline.

    python benchmarks/views.py --images FOLDER [--reference CHECKOUT]

Both decode the same bytes (in memory) and draw views of the same distribution: 2 global ones of 224 pixels and 8 local
ones of 96. The peer is the reference's chain of Pillow and torchvision transforms; with `--reference` its class
DataAugmentationDINO is taken from a checkout of facebookresearch/dino. Methods take turns every few images, in one
process and thread, so that a busy machine slows all of them. Ratios compare CPU time.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode

import harness
from dino.data.decode import decode
from dino.data.normalize import normalize
from dino.data.render import CpuRenderer, crop
from dino.data.scenes import Scenes
from dino.data.views import draw_views
from dino.options import required
from dino.options.recipes import find_recipe
from reference import imported

OPTIONS = find_recipe("vit_small_100ep").options.views
CHUNK = 8  # images between turns
Peer = Callable[[Image.Image], list]  # an image's views, float32 [3, s, s]
Clock = dict[str, list[float]]  # stage: CPU and wall seconds

# ------------------------------------------------------------------------------------------------------ the peer


class Blur:
    def __init__(self, prob: float):
        self.prob = prob

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() > self.prob:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*OPTIONS.blur_sigma)))


class Solarize:
    def __init__(self, prob: float):
        self.prob = prob

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.prob else image


def plain_peer() -> Peer:
    """The reference's augmentation, written out in torchvision's transforms."""
    jitter = transforms.ColorJitter(OPTIONS.brightness, OPTIONS.contrast, OPTIONS.saturation, OPTIONS.hue)

    def chain(size: int, kind: int) -> transforms.Compose:
        scale = OPTIONS.local_scale if kind == 2 else OPTIONS.global_scale
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(OPTIONS.flip_prob),
                transforms.RandomApply([jitter], p=OPTIONS.jitter_prob),
                transforms.RandomGrayscale(OPTIONS.gray_prob),
                Blur(required(OPTIONS.blur_prob)[kind]),
                Solarize(OPTIONS.solarize_prob[kind]),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    chains = [chain(size, min(view, 2)) for view, size in enumerate(OPTIONS.sizes)]
    return lambda image: [chain(image) for chain in chains]


def reference_peer(checkout: Path) -> Peer:
    kind = imported(checkout, "main_dino").DataAugmentationDINO
    return kind(OPTIONS.global_scale, OPTIONS.local_scale, OPTIONS.num_local)


# -------------------------------------------------------------------------------------------------- the methods


def lap(clock: Clock, stage: str, since: tuple[float, float]) -> tuple[float, float]:
    now = time.process_time(), time.perf_counter()
    total = clock.setdefault(stage, [0.0, 0.0])
    total[0] += now[0] - since[0]
    total[1] += now[1] - since[1]
    return time.process_time(), time.perf_counter()


def run_peer(clock: Clock, files: list[bytes], peer: Peer) -> None:
    start = time.process_time(), time.perf_counter()
    views = [peer(Image.open(BytesIO(file)).convert("RGB")) for file in files]
    lap(clock, "peer", start)
    del views


def run_ours(clock: Clock, files: list[bytes], epoch: int, as_float: bool) -> None:
    start = time.process_time(), time.perf_counter()
    images = [decode(file) for file in files]
    shapes = np.array([image.shape[:2] for image in images])
    views = draw_views(OPTIONS, 0, epoch, range(len(files)), shapes)
    groups = CpuRenderer().prepare(images, views)
    if as_float:
        groups = [normalize(group) for group in groups]
    lap(clock, "ours, float32 normalized" if as_float else "ours, uint8", start)
    del groups


def run_stages(clock: Clock, files: list[bytes], epoch: int) -> None:
    now = time.process_time(), time.perf_counter()
    images = [decode(file) for file in files]
    now = lap(clock, "decode", now)
    shapes = np.array([image.shape[:2] for image in images])
    views = draw_views(OPTIONS, 0, epoch, range(len(files)), shapes)
    now = lap(clock, "draw", now)
    groups = crop(images, views)
    now = lap(clock, "crop, resize, flip", now)
    groups = CpuRenderer().color(groups, views)
    now = lap(clock, "color", now)
    groups = [normalize(group) for group in groups]
    lap(clock, "normalize", now)


def measure(files: list[bytes], num_pairs: int, peer: Peer) -> list[Clock]:
    """Milliseconds an image of every method and stage, [CPU, wall], one dictionary a pair."""
    chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    clocks: list[Clock] = []
    for pair in range(-1, num_pairs):
        clock: Clock = {}
        for k, chunk in enumerate(chunks[:1] if pair < 0 else chunks):  # the first is a warm-up
            epoch = (pair + 1) * len(chunks) + k
            turns: list[Callable[[], None]] = [
                lambda chunk=chunk, clock=clock: run_peer(clock, chunk, peer),
                lambda chunk=chunk, clock=clock, epoch=epoch: run_ours(clock, chunk, epoch, as_float=False),
                lambda chunk=chunk, clock=clock, epoch=epoch: run_ours(clock, chunk, epoch, as_float=True),
                lambda chunk=chunk, clock=clock, epoch=epoch: run_stages(clock, chunk, epoch),
            ]
            for turn in turns if (pair + k) % 2 else reversed(turns):
                turn()
        if pair >= 0:
            clocks.append({name: [1e3 * t / len(files) for t in times] for name, times in clock.items()})
    return clocks


# --------------------------------------------------------------------------------------------------- the report


def summarize(clocks: list[Clock]) -> dict:
    methods = {
        name: {
            "cpu_ms": statistics.median(clock[name][0] for clock in clocks),
            "wall_ms": statistics.median(clock[name][1] for clock in clocks),
        }
        for name in sorted(clocks[0])
    }
    ratios = {}
    for name in ("ours, uint8", "ours, float32 normalized"):
        pairs = [clock["peer"][0] / clock[name][0] for clock in clocks]
        ratios[name] = harness.spread(pairs)
    return {"ratios": ratios, "methods": methods}


def show(summary: dict) -> None:
    print(f"{'':28}{'peer / ours':>14}{'min .. max':>16}{'CPU ms':>10}{'wall ms':>10}   an image")
    for name, ratio in summary["ratios"].items():
        times = summary["methods"][name]
        spread = f"{ratio['min']:.2f} .. {ratio['max']:.2f}"
        print(f"{name:28}{ratio['median']:>14.2f}{spread:>16}{times['cpu_ms']:>10.2f}{times['wall_ms']:>10.2f}")
    rest = ("peer", "decode", "draw", "crop, resize, flip", "color", "normalize")
    for name in rest:
        times = summary["methods"][name]
        print(f"{name if name == 'peer' else '  ' + name:58}{times['cpu_ms']:>10.2f}{times['wall_ms']:>10.2f}")


def jpeg_paths(folder: Path) -> list[Path]:
    """The folder's JPEGs, sorted."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise ValueError(f"{folder} holds no .jpg or .jpeg file at any depth; give --images a folder of photographs.")
    return paths


def jpegs(folder: Path, num: int) -> list[bytes]:
    """`num` files spread evenly over the folder's sorted JPEGs."""
    paths = jpeg_paths(folder)
    num = min(num, len(paths))
    return [paths[i * len(paths) // num].read_bytes() for i in range(num)]


def drawn(num: int) -> list[bytes]:
    """As many of the built-in scenes, of about the size of ImageNet's photographs."""
    files = []
    for index in range(num):
        Image.fromarray(Scenes(num, size=448).read(index)).save(file := BytesIO(), "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def main() -> None:
    parser = harness.parser(__doc__, "views")
    parser.add_argument("--images", type=Path, help="folder of JPEGs, searched at any depth; None: drawn ones")
    parser.add_argument("--reference", type=Path, help="checkout of facebookresearch/dino to compare with")
    parser.add_argument("--num", type=int, default=64, help="images")
    parser.set_defaults(threads=1)
    args = harness.parse(parser)
    if args.num < 1:
        raise ValueError(f"--num is {args.num}; it must be at least 1.")
    cv2.setNumThreads(1)
    files = jpegs(args.images, args.num) if args.images else drawn(args.num)
    peer = reference_peer(args.reference) if args.reference else plain_peer()
    clocks = measure(files, args.pairs, peer)
    summary = summarize(clocks)
    show(summary)
    packages = ("torchvision", "pillow", "opencv-python-headless", "numpy")
    decoding = [clock["decode"][0] for clock in clocks]
    result = {
        "what": "JPEG bytes in memory to 2 x 224 + 8 x 96 views, one process and thread; ratios of CPU time",
        "peer": "DataAugmentationDINO of a reference checkout"
        if args.reference
        else "torchvision transforms on Pillow",
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "images": {
            "real": args.images is not None,
            "num": len(files),
            "mean_kilobytes": sum(map(len, files)) / len(files) / 1e3,
            "pairs": args.pairs,
        },
        "share_of_decoding_alone": harness.ratio(decoding, [clock["ours, uint8"][0] for clock in clocks]),
        **summary,
    }
    harness.write(result, args)


if __name__ == "__main__":
    harness.run(main)
