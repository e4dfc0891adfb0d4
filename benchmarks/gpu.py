"""The GPU's benchmarks in one go of at most ten minutes on an H100: rendering, steps, their memory.

    python benchmarks/gpu.py
    python benchmarks/train.py --device cuda --images FOLDER --compile     # end to end, another five minutes

Steps are compared with the plain peer in fp16, as the reference ships it (fp32 with fp32), or with `--reference
CHECKOUT` with the reference's own step. Rendering is everything from decoded images in the training process to normalised
views, or from the bytes of their files where the device decodes (`--data.decode device`); compared with the time of a
step of as many. A batch that does not fit is halved, for both. What is done is written at once, so a slot that ends early
loses only the rest.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import harness
import step
import views
from dino.bench import matrix_rate, seconds
from dino.data.device_decode import Jpeg, check_device
from dino.data.device_render import DeviceRenderer, pack
from dino.data.render import normalise
from dino.data.views import draw_views


class Way(NamedTuple):
    arch: str
    patch: int
    precision: str
    compiled: bool


WAYS = (  # the ones that matter most first
    Way("vit_small", 16, "bf16", True),
    Way("vit_small", 16, "bf16", False),
    Way("vit_base", 16, "bf16", True),
    Way("vit_small", 8, "bf16", True),
    Way("vit_small", 16, "fp16", False),
    Way("vit_small", 16, "fp32", False),
)


def draw_pictures(batch: int) -> list[np.ndarray]:
    """Of ImageNet's usual size, with about as much in them: a file of each has some 80 kB, as its photographs have."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (batch, 24, 32, 3), np.uint8)
    smooth = [cv2.resize(image, (500, 375), interpolation=cv2.INTER_CUBIC) for image in coarse]
    return [np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8) for image in smooth]


def rendering(batch: int, pairs: int, device: torch.device, from_files: bool = False) -> dict[str, Any]:
    """From `batch` decoded images, or the bytes of their files, in pinned memory to normalised views."""
    images: list[Any] = draw_pictures(batch)
    drawn = draw_views(views.OPTIONS, views.SIZES, 0, 0, range(batch), np.array([image.shape[:2] for image in images]))
    if from_files:
        files = [cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes() for image in images]
        images = [Jpeg(data, image.shape) for data, image in zip(files, images, strict=True)]
    packed, renderer = pack(images, drawn), DeviceRenderer(device)
    if device.type == "cuda":
        packed = [x.pin_memory() for x in packed]

    def render() -> None:
        for group in renderer(packed, drawn):
            normalise(group)

    with FlopCounterMode(display=False) as counter:
        render()
    copies = [torch.empty_like(x, device=device) for x in packed]
    turns = {
        "render": render,
        "transfer": lambda: [copy.copy_(x, non_blocking=True) for copy, x in zip(copies, packed, strict=True)],
        "product": lambda: rates.append(matrix_rate(device, renderer.dtype)),
    }
    rates: list[float] = []
    took = harness.alternate(turns, pairs, device)
    products = [counter.get_total_flops() / t / rate for t, rate in zip(took["render"], rates, strict=True)]
    packing = [seconds(lambda: pack(images, drawn), torch.device("cpu")) for _ in range(pairs)]
    return {
        "seconds": harness.spread(took["render"]),
        "images_per_second": harness.spread([batch / t for t in took["render"]]),
        "gflop_per_image": counter.get_total_flops() / batch / 1e9,
        "share_of_matrix_product": harness.spread(products),
        "bytes_sent_per_image": sum(x.nbytes for x in packed) / batch,
        "transfer_share": harness.ratio(took["transfer"], took["render"]),
        "worker_seconds": harness.spread(packing),
    }


def measure_what_fits(way: Way, batch: int, options: Any) -> dict[str, Any]:
    """`step.measure` of the largest batch, halved from `batch`, whose step and the peer's fit into memory."""
    device = torch.device(options.device)
    precision = "bf16" if way.precision == "fp16" and device.type == "cpu" else way.precision
    peer = "fp32" if way.precision == "fp32" or device.type == "cpu" else "fp16"
    sizes = (way.arch, batch, options.prototypes, options.pairs, device)
    try:
        return step.measure(*sizes, precision, peer, way.compiled, way.patch, options.reference)
    except torch.OutOfMemoryError:
        if batch == 1:
            raise
    gc.collect()  # here, where the error no longer holds what was allocated
    torch.cuda.empty_cache()
    return measure_what_fits(way, batch // 2, options)


def main() -> None:
    parser = harness.parser(__doc__, "gpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--minutes", type=float, default=7, help="no new measurement is started after these")
    parser.add_argument("--reference", type=Path, help="checkout of facebookresearch/dino to compare with")
    parser.add_argument("--device", default="cuda", help="cpu: to see that this runs, with a small --batch")
    options = harness.parse(parser)
    device, started = torch.device(options.device), time.monotonic()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "benchmarks/gpu.py measures an NVIDIA GPU and PyTorch sees none; run it on a machine with one."
        )
    result: dict[str, Any] = {
        "what": "training steps and rendering on a GPU, peer / ours",
        "rendering": rendering(options.batch, options.pairs, device),
        "steps": [],
    }
    try:
        if device.type == "cuda":
            check_device(device)
        result["decoding and rendering"] = rendering(options.batch, options.pairs, device, from_files=True)
    except ValueError as error:  # without nvJPEG the rest is worth measuring all the same
        result["decoding and rendering"] = str(error)
    for way in WAYS:
        if time.monotonic() - started > 60 * options.minutes:
            break
        result["steps"].append(measure_what_fits(way, options.batch, options))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        step_rate = result["steps"][0]["ours_images_per_second"]["median"]
        result["rendering_share_of_step"] = step_rate / result["rendering"]["images_per_second"]["median"]
        harness.write(result, options)


if __name__ == "__main__":
    harness.run(main)
