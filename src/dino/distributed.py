"""Ranks: who am I, and sums over all of us. With one process all of this is the identity and no group exists."""

from __future__ import annotations

import datetime
import importlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

PATIENCE = datetime.timedelta(
    hours=2
)  # of the other ranks, while one lists millions of files or propagates a long video


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def start(device: str) -> torch.device:
    """Join the process group that `torchrun` describes, if there is one, and return this rank's device.

    Raises:
        ValueError: `device` is 'cuda' and there is no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ValueError("device is cuda but PyTorch sees no NVIDIA GPU; use --device cpu or --device auto.")
    use_gpu = has_gpu and device != "cpu"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ and not dist.is_initialized():
        if use_gpu and local >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started local rank {local} but this machine has {torch.cuda.device_count()} GPUs; "
                "lower --nproc-per-node, or use --device cpu."
            )
        # DistributedDataParallel imports this, and its functions' defaults keep the group of that moment for ever. Threads of
        # a group that is never let go make Python abort, now and then, as it exits.
        importlib.import_module("torch.distributed.nn.functional")
        own = torch.device("cuda", local) if use_gpu else None
        dist.init_process_group("nccl" if use_gpu else "gloo", timeout=PATIENCE, device_id=own)
    if not use_gpu:
        return torch.device("cpu")
    torch.cuda.set_device(local)
    torch.backends.cudnn.allow_tf32 = False  # of convolutions, and the default is True; fp32 means fp32 here
    return torch.device("cuda", local)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_(tensor: Tensor) -> Tensor:
    """Maximum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def concatenate(tensor: Tensor) -> Tensor:
    """The rows of every rank, in rank order; all ranks hold equally many."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather(value: Any) -> list[Any]:
    """The `value` of every rank, in rank order, on every rank. Any picklable object."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(work: Callable[[], T]) -> T:
    """What `work` returns on the main rank, the only one that does it, on every rank; picklable. All raise what it raises."""
    outcome: list[Any] = [None]
    if is_main():
        try:
            outcome = [work()]
        except Exception as error:
            outcome = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
