"""The machine: cores, memory, and what its parts are called."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import psutil
import torch

from dino import distributed


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_spare_cores(share: int = 1) -> int:
    """Worker processes for one of `share` ranks on this machine: its part of the cores, less one for the rank itself."""
    return max(1, count_cores() // share - 1)


def measure_memory_in_use(device: torch.device) -> int:
    """Bytes that this process holds now: in tensors on a GPU, in all on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def measure_peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: in tensors on a GPU, in all on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
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
    return f"{name_processor() or 'CPU'}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def describe_device(device: torch.device) -> str:
    """What all ranks together run on."""
    if device.type == "cuda":
        return f"{distributed.world_size()} x {torch.cuda.get_device_name(device)}"
    return f"{distributed.world_size()} CPU process(es) of {torch.get_num_threads()} threads"
