"""Rendering of views as a GPU does it: from decoded images, or from the bytes of their files, to normalized views.

    python benchmarks/render.py --device cuda [--from-files]

Pictures are drawn, of ImageNet's usual size; they lie in pinned memory as a worker hands them over. In turns with sending
them alone and with matrix products in the precision of rendering. What a worker does before (`pack`) is timed as well.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import harness
import views
from dino.bench import measure_matrix_rate, measure_seconds
from dino.data.device_decode import Jpeg, check_device
from dino.data.device_render import DeviceRenderer
from dino.data.normalize import normalize
from dino.data.views import draw_views


def draw_pictures(count: int) -> list[np.ndarray]:
    """Of ImageNet's usual size, with about as much in them: a file of each has some 80 kB, as its photographs have."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 24, 32, 3), np.uint8)
    smooth = [cv2.resize(image, (500, 375), interpolation=cv2.INTER_CUBIC) for image in coarse]
    return [np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8) for image in smooth]


def encoded(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def measure(batch: int, pairs: int, device: torch.device, from_files: bool = False) -> dict[str, Any]:
    images: list[Any] = draw_pictures(batch)
    drawn = draw_views(views.OPTIONS, 0, 0, range(batch), np.array([image.shape[:2] for image in images]))
    if from_files:
        images = [Jpeg(encoded(image), image.shape) for image in images]
    renderer = DeviceRenderer(device)
    packed = renderer.prepare(images, drawn)
    if device.type == "cuda":
        packed = [x.pin_memory() for x in packed]

    def render() -> None:
        for group in renderer.finish(packed, drawn):
            normalize(group)

    with FlopCounterMode(display=False) as counter:
        render()
    copies = [torch.empty_like(x, device=device) for x in packed]
    turns = {
        "render": render,
        "transfer": lambda: [copy.copy_(x, non_blocking=True) for copy, x in zip(copies, packed, strict=True)],
        "product": lambda: rates.append(measure_matrix_rate(device, renderer.dtype)),
    }
    rates: list[float] = []
    took = harness.alternate(turns, pairs, device)
    products = [counter.get_total_flops() / t / rate for t, rate in zip(took["render"], rates, strict=True)]
    packing = [measure_seconds(lambda: renderer.prepare(images, drawn), torch.device("cpu")) for _ in range(pairs)]
    return {
        "seconds": harness.spread(took["render"]),
        "images_per_second": harness.spread([batch / t for t in took["render"]]),
        "gflop_per_image": counter.get_total_flops() / batch / 1e9,
        "share_of_matrix_product": harness.spread(products),
        "bytes_sent_per_image": sum(x.nbytes for x in packed) / batch,
        "transfer_share": harness.ratio(took["transfer"], took["render"]),
        "worker_seconds": harness.spread(packing),
    }


def main() -> None:
    parser = harness.parser(__doc__, "render")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--from-files", action="store_true", help="the device decodes, too (--data.decode device)")
    parser.add_argument("--device", default="cpu")
    options = harness.parse(parser)
    device = torch.device(options.device)
    if options.from_files and device.type == "cuda":
        check_device(device)
    what = "JPEG files in memory" if options.from_files else "decoded images"
    figures = measure(options.batch, options.pairs, device, options.from_files)
    harness.write({"what": f"{what} to 2 x 224 + 8 x 96 normalized views", "batch": options.batch} | figures, options)


if __name__ == "__main__":
    harness.run(main)
