"""The GPU's benchmarks in one go of at most ten minutes on an H100: steps, their memory, rendering.

    python benchmarks/gpu.py

Steps run as they are, in fp32 and bf16, and compiled, against the plain peer in fp16 as the reference ships it (fp32
against fp32). Rendering compares colouring on the device with a bf16 step's time. What is done is written at once, so
a slot that ends early loses only the rest.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

import harness
import step
from dino.bench import seconds
from dino.config import ViewOptions
from dino.data.render import DeviceRenderer, crop, normalise
from dino.data.views import draw_views
from dino.engine import parallel

VIEWS = ViewOptions(global_scale=(0.4, 1.0), local_scale=(0.05, 0.4))
SIZES = (224,) * 2 + (96,) * VIEWS.num_local


def rendering(batch: int, pairs: int, device: torch.device) -> dict[str, Any]:
    """Transfer, colour and normalisation of the views of `batch` images cut on the CPU."""
    images = list(np.random.default_rng(0).integers(0, 256, (batch, 300, 400, 3), np.uint8))
    drawn = draw_views(VIEWS, SIZES, 0, 0, range(batch), np.array([image.shape[:2] for image in images]))
    crops = [group.pin_memory() for group in crop(images, drawn)]
    renderer = DeviceRenderer(device)

    def render() -> None:
        for group in renderer.colour(crops, drawn):
            normalise(group)

    render()
    took = [seconds(render, device) for _ in range(pairs)]
    return {"seconds": harness.spread(took), "images_per_second": harness.spread([batch / t for t in took])}


def main() -> None:
    parser = harness.parser(__doc__, "gpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--minutes", type=float, default=9, help="no new measurement is started after these")
    options = harness.parse(parser)
    if not torch.cuda.is_available():
        raise ValueError(
            "benchmarks/gpu.py measures an NVIDIA GPU and PyTorch sees none; run it on a machine with one."
        )
    device, started = torch.device("cuda"), time.monotonic()
    ways = [("vit_small", "bf16", False), ("vit_small", "fp32", False)]
    if hasattr(parallel, "compile_networks"):
        ways.append(("vit_small", "bf16", True))
    ways.append(("vit_base", "bf16", False))
    result: dict[str, Any] = {
        "what": "training steps and rendering on a GPU, plain / ours",
        "peer": "the same mathematics written plainly",
        "rendering": rendering(options.batch, options.pairs, device),
        "steps": [],
    }
    for arch, precision, compiled in ways:
        if time.monotonic() - started > 60 * options.minutes:
            break
        peer = "fp32" if precision == "fp32" else "fp16"
        sizes = (arch, options.batch, options.prototypes, options.pairs, device)
        result["steps"].append(step.measure(*sizes, precision, peer, compiled))
        torch.cuda.empty_cache()
        took = result["steps"][0]["ours_seconds"]["median"]
        result["rendering_share_of_step"] = result["rendering"]["seconds"]["median"] / took
        harness.write(result, options.json, device)


if __name__ == "__main__":
    harness.run(main)
