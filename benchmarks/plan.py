"""How well `dino plan` foretells the time and the memory of the training that follows it, in seconds of each.

    python benchmarks/plan.py FOLDER [--data SPEC] [--pairs 2]

Plans and runs in turns, as the command line makes them, of two lengths and sizes of views. FOLDER keeps nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import harness

SIZES = {
    "32 pixels": ["--epochs", "6", "--views.global-size", "32"],
    "64 pixels": ["--epochs", "2", "--views.global-size", "64"],
}


def measure(command: list[str]) -> tuple[float, float, str]:
    """Seconds, the most GB that the process held, and what it printed."""
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "dino", *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    assert status == 0, said
    return time.monotonic() - began, usage.ru_maxrss * 1024 / 1e9, said


def main() -> None:
    made = harness.parser(__doc__, "plan")
    made.add_argument("folder", type=Path)
    made.add_argument("--data", default="scenes:2000")
    options = harness.parse(made)
    ratios: dict[str, dict[str, list[float]]] = {}
    for name, flags in SIZES.items():
        seen: dict[str, list[float]] = {"time": [], "memory": []}
        for _ in range(options.pairs):
            shutil.rmtree(options.folder, ignore_errors=True)
            options.folder.mkdir(parents=True)
            toml, run = str(options.folder / "plan.toml"), str(options.folder / "run")
            said = measure(["plan", "--data", options.data, *flags, "--threads", "1", "--toml", toml])[2]
            words = re.search(r"time +([\d.]+) (seconds|minutes)", said), re.search(r"memory +([\d.]+) GB", said)
            assert words[0] is not None, said
            assert words[1] is not None, said
            planned = float(words[0][1]) * (60 if words[0][2] == "minutes" else 1)
            took, memory, _ = measure(["train", toml, "--out", run])
            seen["time"].append(planned / took)
            seen["memory"].append(float(words[1][1]) / memory)
            print(
                name, f"planned {planned:.0f} s and {words[1][1]} GB, took {took:.0f} s and {memory:.2f} GB", flush=True
            )
        ratios[name] = seen
    shutil.rmtree(options.folder)
    result = {name: {what: harness.spread(values) for what, values in seen.items()} for name, seen in ratios.items()}
    harness.write({"planned to taken": result}, options)


if __name__ == "__main__":
    harness.run(main)
