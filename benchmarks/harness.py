"""What the benchmarks share: turns taken in one process, medians with their spread, the device's name, JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from dino.bench import measure_seconds
from dino.engine.fit import measure_peak
from dino.machine import name_device

RESULTS = Path(__file__).parent / "results"
# Options whose results go to files of their own.
NAMED = ("arch", "patch", "precision", "threads", "compile", "recompute", "from_files", "reference")


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """Options of every benchmark; JSON goes to results/`name`-DEVICE.json unless told otherwise."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--pairs", type=int, default=5, help="times that ours and the peer take turns")
    made.add_argument("--threads", type=int, default=0, help="0: PyTorch's choice")
    made.add_argument("--json", type=Path, help=f"default: results/{name}-DEVICE[-WHAT IS UNUSUAL].json")
    made.set_defaults(name=name, device="cpu")
    return made


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed options, with the number of threads set and a file to write to."""
    options = made.parse_args(arguments)
    if options.pairs < 1:
        raise ValueError(f"--pairs is {options.pairs}; it must be at least 1.")
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, as in the trainer
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.json is None:
        given = {name: value for name in NAMED if (value := getattr(options, name, None)) != made.get_default(name)}
        plain = "compile", "from_files", "reference"
        words = [name.replace("_", "-") if name in plain else f"{name}-{value}" for name, value in given.items()]
        options.json = RESULTS / ("-".join([options.name, torch.device(options.device).type, *words]) + ".json")
    return options


def alternate(
    turns: Mapping[str, Callable[[], object]], pairs: int, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every turn, `pairs` times; every other time in reverse order, so that none is always first."""
    took: dict[str, list[float]] = {name: [] for name in turns}
    for pair in range(pairs):
        for name in list(turns)[:: -1 if pair % 2 else 1]:
            took[name].append(measure_seconds(turns[name], torch.device(device)))
        print("   ".join(f"{name} {times[-1]:.3f} s" for name, times in took.items()), file=sys.stderr)
    return took


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that `work` adds at most to what there was before; on a CPU counted tensor by tensor."""
    if device.type != "cuda":
        return measure_peak(work)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)  # where ours is measured the peer's weights are, too
    work()
    return torch.cuda.max_memory_allocated(device) - before


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def ratio(peer: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Peer / ours pair by pair: above 1 ours is faster."""
    return spread([a / b for a, b in zip(peer, ours, strict=True)])


def write(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the result and write it, with what it was measured on."""
    print(save(result, options))


def save(result: dict[str, Any], options: argparse.Namespace) -> str:
    """What was written: the result, with what it was measured on."""
    device = name_device(torch.device(options.device))
    text = json.dumps({"device": device, "torch": torch.__version__, "date": f"{date.today()}"} | result, indent=2)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(text + "\n", encoding="utf-8")
    return text


def run(main: Callable[[], None]) -> None:
    """`main`, with what it refuses said in one sentence."""
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
