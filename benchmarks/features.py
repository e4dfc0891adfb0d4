"""Features of JPEG files (decode, resize, forward pass) as a share of the forward pass alone, in turns.

    python benchmarks/features.py --images FOLDER [--device cuda]

Forward alone is the same batches of normalized views, already on the device.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import harness
import views
from dino.bench import measure_matrix_rate
from dino.data.image_files import open_source
from dino.data.normalize import normalize
from dino.data.sources import Subset
from dino.features.extract import EvaluationViews, choose_batch_size, extract
from dino.models import create


@torch.no_grad()
def main() -> None:
    parser = harness.parser(__doc__, "features")
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEGs, searched at any depth")
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--num", type=int, default=256, help="images, the same ones again where there are fewer")
    parser.add_argument("--device", default="cpu")
    options = harness.parse(parser)
    device, size = torch.device(options.device), options.size
    count = len(views.jpeg_paths(options.images))
    source = open_source(str(options.images))
    spread = [i * count // options.num if options.num < count else i % count for i in range(options.num)]
    source = Subset(source, spread)
    model = create(options.arch, image_size=size).to(device).eval()
    whole = EvaluationViews(source, range(len(source)), size, choose_batch_size(size), threads=torch.get_num_threads())
    batches = [part for item in range(len(whole)) for part in whole[item][0]]
    ready = [normalize(batch.to(device)) for batch in batches]
    with FlopCounterMode(display=False) as counter:
        model(ready[0][:1])
    rates: list[float] = []
    turns = {
        "files": lambda: extract(model, source, size),
        "forward": lambda: [model(batch) for batch in ready],
        "product": lambda: rates.append(measure_matrix_rate(device)),
    }
    extract(model, source, size, range(2))
    took = harness.alternate(turns, options.pairs, device)
    flops = counter.get_total_flops() * len(source)
    result = {
        "what": "features of JPEG files, as a share of the forward pass alone",
        "arch": options.arch,
        "size": size,
        "images": len(source),
        "share_of_forward": harness.ratio(took["forward"], took["files"]),
        "images_per_second": harness.spread([len(source) / t for t in took["files"]]),
        "forward_images_per_second": harness.spread([len(source) / t for t in took["forward"]]),
        "forward_share_of_matrix_product": harness.spread(
            [flops / t / rate for t, rate in zip(took["forward"], rates, strict=True)]
        ),
    }
    harness.write(result, options)


if __name__ == "__main__":
    harness.run(main)
