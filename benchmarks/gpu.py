"""All figures of a GPU by one command, in slots of ten minutes: every part is a benchmark of its own, in its own process.

    python benchmarks/gpu.py [--images FOLDER] [--reference CHECKOUT]

The parts that matter most come first. After each one what is known is written, so a slot that ends early loses one part at
most, and the same command again goes on with what is missing or has failed. Without FOLDER, JPEGs of ImageNet's size are
drawn. With `--device cpu` tiny networks go the same way, to see that all of it runs; such figures mean nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import harness
from dino.machine import name_device
from render import draw_pictures, encoded

HERE = Path(__file__).parent
PARTS = {  # name: benchmark and flags
    "step of S/16, compiled": "step --precision bf16 --compile",
    "training from files": "train --compile --pairs 3",
    "step of S/16": "step --precision bf16",
    "rendering": "render",
    "memory": "memory --images 32 64",
    "step of B/16, compiled": "step --arch vit_base --precision bf16 --compile",
    "features": "features --num 8192 --pairs 3",
    "step of S/8, compiled": "step --patch 8 --batch 32 --precision bf16 --compile",
    "step of S/16, fp16": "step --precision fp16",
    "decoding and rendering": "render --from-files",
    "training from files, decoded there": "train --compile --decode device --pairs 3",
    "step of S/16, norms and GELU twice": "step --precision bf16 --recompute elementwise",
    "step of S/16, fp32": "step --precision fp32",
    "learning curves": "curves --steps 300 --batch 64 --workers 14",
    "tests": "pytest",
}
TAKES = {"images": ("train", "features", "curves"), "reference": ("step", "train", "memory")}  # flags passed on
TINY = {  # on a CPU, behind the others
    "step": "--arch vit_tiny --prototypes 64 --batch 2 --pairs 1",
    "train": "--arch vit_tiny --prototypes 64 --batch 2 --steps 1 --pairs 1 --workers 0 --decode workers",
    "render": "--batch 2 --pairs 1",
    "memory": "--arch vit_tiny --prototypes 64 --images 4 8",
    "features": "--arch vit_nano --num 4 --pairs 1",
    "curves": "--steps 20 --batch 4 --workers 0",
}
LEAST, MOST = 60, 240  # seconds that a part is worth starting for, and that it may take
KEPT = 200  # lines of what a part that failed has said
FOLDERS, FILES = 4, 64  # drawn: classes, and images of each
HEADLINES = {  # of a part's figures, what the table shows
    "ratio": "{:.2f}x the peer",
    "images_per_second": "{:,.0f} images/s",
    "ours_images_per_second": "{:,.0f} images/s",
    "share_of_matrix_product": "{:.0%} of the matrix-product rate",
    "share_of_in_memory": "{:.0%} of views in memory",
    "share_of_forward": "{:.0%} of the forward pass",
}


def draw_files(folder: Path) -> Path:
    for i, image in enumerate(draw_pictures(FOLDERS * FILES)):
        path = folder / f"class{i % FOLDERS}" / f"{i:04d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(image))
    return folder


def command(part: str, options: Any, images: Path, json_file: Path) -> list[str]:
    name, *flags = PARTS[part].split()
    if name == "pytest":
        files = [str(HERE.parent / "tests" / f"test_{file}.py") for file in ("cuda", "fast_paths", "render")]
        return [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "cuda", *files]
    given = {"images": images, "reference": options.reference}
    passed = [
        str(x)
        for flag, value in given.items()
        if value and name in TAKES[flag]
        for x in (f"--{flag}", value.absolute())
    ]
    tiny = TINY[name].split() if options.device == "cpu" else []
    if tiny:  # what takes minutes there
        flags = [flag for flag in flags if flag != "--compile"]
    return [
        *(sys.executable, str(HERE / f"{name}.py"), *flags, *passed, "--device", options.device),
        *("--json", str(json_file), *tiny),
    ]


def run(part: str, options: Any, images: Path, limit: float) -> dict[str, Any]:
    """A part's figures; or {"failed": why}, in `limit` seconds at most."""
    with tempfile.TemporaryDirectory() as folder:
        file, said = Path(folder, "result.json"), Path(folder, "said")
        with said.open("w") as stream:
            given = command(part, options, images, file)
            try:
                code = subprocess.run(given, stdout=stream, stderr=stream, timeout=limit, cwd=HERE.parent).returncode
            except subprocess.TimeoutExpired:
                partly = json.loads(file.read_text()) if file.exists() else {}
                lines = said.read_text(errors="replace").splitlines()
                return partly | {"failed": f"not done after {limit:.0f} s", "output": lines[-KEPT:]}
        lines = said.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        if PARTS[part] == "pytest" and code == 0:
            return {"tests": lines[-1].strip("= ")}
        if code == 0 and file.exists():
            return json.loads(file.read_text())
        last = next((line for line in reversed(lines) if "destroy_process_group" not in line), lines[-1])  # a warning
        return {"failed": last, "output": lines[-KEPT:]}


def headline(figures: dict[str, Any]) -> str:
    """What is worth knowing of a part at once."""
    if "failed" in figures:
        return f"FAILED: {figures['failed']}"
    said = []
    for name, text in HEADLINES.items():
        value = figures.get(name, {})
        value = value.get("ours", value) if name == "images_per_second" else value
        if "median" in value:
            said.append(text.format(value["median"]))
    ratios = figures.get("ratio") or figures.get("ratio_extrapolated") or {}
    said += [f"{way} {value:.2f}x" for way, value in ratios.items() if way.startswith("ours")]
    if "ways" in figures:
        said += [f"{way} {f['largest_difference']:.1g}" for way, f in figures["ways"].items() if way != "plain"]
    return figures.get("tests") or ", ".join(said)


def show(parts: dict[str, dict[str, Any]]) -> None:
    for name in PARTS:
        print(f"{name:36}{headline(parts[name]) if name in parts else 'not yet'}")
    if {"rendering", "step of S/16, compiled"} <= {name for name in parts if "failed" not in parts[name]}:
        rates = parts["step of S/16, compiled"]["ours_images_per_second"], parts["rendering"]["images_per_second"]
        print(f"{'rendering, of the compiled step':36}{rates[0]['median'] / rates[1]['median']:.1%}")


def main() -> None:
    parser = harness.parser(__doc__, "gpu")
    parser.add_argument("--images", type=Path, help="folder with a folder of JPEGs per class; None: drawn ones")
    parser.add_argument("--reference", type=Path, help="checkout of facebookresearch/dino to compare with")
    parser.add_argument("--minutes", type=float, default=9.5, help="of this slot")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="None: all", metavar="PART")
    parser.add_argument("--again", action="store_true", help="measure what is known already once more")
    parser.set_defaults(device="cuda")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    options, started = harness.parse(parser), time.monotonic()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "benchmarks/gpu.py measures an NVIDIA GPU and PyTorch sees none; run it on a machine with one."
        )
    device = name_device(torch.device(options.device))
    known: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    same = (known.get("device"), known.get("torch")) == (device, torch.__version__)
    parts: dict[str, Any] = known["parts"] if same else {}
    with tempfile.TemporaryDirectory() as folder:
        images = options.images or draw_files(Path(folder))
        for part in options.parts:
            left = 60 * options.minutes - (time.monotonic() - started)
            if part in parts and "failed" not in parts[part] and not options.again:
                continue
            if left < LEAST:
                print("The slot is over; the same command goes on with what is missing.", file=sys.stderr)
                break
            print(f"{part} ...", file=sys.stderr, flush=True)
            begun = time.monotonic()
            parts[part] = run(part, options, images, min(left, MOST))
            parts[part]["took_seconds"] = round(time.monotonic() - begun)
            print(f"  {headline(parts[part])} ({parts[part]['took_seconds']} s)", file=sys.stderr, flush=True)
            harness.save({"what": "all that is measured on a GPU; peer / ours", "parts": parts}, options)
    show(parts)


if __name__ == "__main__":
    harness.run(main)
