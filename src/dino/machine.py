"""TODO."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from dino import distributed


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_spare_cores(share: int = 1) -> int:
    """Worker processes for one of `share` ranks on this machine: the cores left beside each rank's own."""
    return max(1, count_cores() // share - 1)


def name_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{distributed.world_size()} x {torch.cuda.get_device_name(device)}"
    return f"{distributed.world_size()} CPU process(es) of {torch.get_num_threads()} threads"
