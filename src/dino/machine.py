"""The machine: cores, memory, and what its parts are called."""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import sys
from pathlib import Path

import psutil
import torch

from dino import distributed

WORKERS_PER_CORE = 8  # at most; they read and decode, which may wait for a disk


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_spare_cores(share: int = 1) -> int:
    """Worker processes for one of `share` ranks on this machine: its part of the cores, less one for the rank itself."""
    return max(1, count_cores() // share - 1)


def check_memory(needed: float, what: str) -> None:
    """Refuse what would take more bytes than this machine has, before any is allocated.

    Raises:
        ValueError: `what` with the size.
    """
    if needed > (there := psutil.virtual_memory().total):
        raise ValueError(
            f"{what} would take {needed / 1e9:,.0f} GB, but this machine has {there / 1e9:,.0f} GB; choose smaller sizes."
        )


def check_cores(name: str, wanted: int, each: int) -> None:
    """Refuse more than `each` threads or processes for every core, before any is started.

    Raises:
        ValueError: `name` with the number, and the most that are taken.
    """
    if wanted > each * count_cores():
        raise ValueError(
            f"{name} is {wanted}, but there are {count_cores()} cores; use at most {each * count_cores()}."
        )


def check_workers(wanted: int) -> None:
    """Refuse worker processes that are too many, or that would run the script of this process again.

    Where processes are spawned and not forked, each first imports that script.

    Raises:
        ValueError: says how many are taken, or how the script must be written.
    """
    check_cores("num_workers", wanted, WORKERS_PER_CORE)
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    text = script.read_text(errors="replace") if wanted and method != "fork" and script.is_file() else "__name__ =="
    if not re.search(r"__name__\s*==|parent_process", text):
        raise ValueError(
            f'{script} would run again in each worker process; put its work under `if __name__ == "__main__":`, or '
            "use no workers (num_workers 0)."
        )


def measure_memory_in_use(device: torch.device) -> int:
    """Bytes that this process holds now: in tensors on a GPU, in all on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return psutil.Process().memory_info().rss


def measure_peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: in tensors on a GPU, in all on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":  # PyTorch keeps what it has taken, and counts no peak
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # psutil knows no peak outside Windows, and Windows has no `resource`

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


def name_processor() -> str:
    """The model of the CPU, e.g. "AMD EPYC 7B13"; its architecture or "" where the system tells no more."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def name_device(device: torch.device) -> str:
    """The GPU's model, or the CPU's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"Apple GPU ({device.type})"
    return f"{name_processor() or 'CPU'}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def describe_device(device: torch.device) -> str:
    """What all ranks together run on."""
    if device.type != "cpu":
        return f"{distributed.world_size()} x {name_device(device)}"
    return f"{distributed.world_size()} CPU process(es) of {torch.get_num_threads()} threads"
