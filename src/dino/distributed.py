"""The ranks of a run and what they exchange. With a single process there is no group, and all of this changes nothing."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import itertools
import os
import platform
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dino import errors

T = TypeVar("T")
DEVICES = ("auto", "cpu", "cuda", "mps")

# How long ranks wait for one that lists millions of files or follows a long video.
PATIENCE = datetime.timedelta(hours=2)


class LostRank(Exception):
    """Another process of this run has ended, or cannot be reached."""


def require_single(command: str) -> None:
    """Refuse to be one of several processes.

    Raises:
        ValueError: it is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"dino {command} measures one process; start it without torchrun.")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def start(device: str) -> torch.device:
    """Join the process group that `torchrun` describes, if there is one, and return this rank's device.

    Raises:
        ValueError: there is no such device, or `device` is 'cuda' or 'mps' and there is no such GPU.
    """
    if device not in DEVICES:
        raise errors.unknown("device", device, DEVICES)
    if device == "mps":  # for one process: neither NCCL nor gloo can use it
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("device is mps, which is one GPU of one machine; start it without torchrun.")
        if not torch.backends.mps.is_available():
            raise ValueError("device is mps but PyTorch sees no GPU of Apple; use --device cpu or --device auto.")
        return torch.device("mps")
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
        # Import before init_process_group: DistributedDataParallel imports this module, whose functions take the current
        # group as their default. A group that they hold is never freed, and its threads can make Python abort at exit.
        importlib.import_module("torch.distributed.nn.functional")
        own = torch.device("cuda", local) if use_gpu else None
        dist.init_process_group("nccl" if use_gpu else "gloo", timeout=PATIENCE, device_id=own)
    if not use_gpu:
        return torch.device("cpu")
    torch.cuda.set_device(local)
    torch.backends.cudnn.allow_tf32 = False  # True by default, for convolutions; but fp32 is to mean fp32
    return torch.device("cuda", local)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. An NVIDIA GPU copies it while this process goes on. Others might copy too late, when
    the memory holds something else."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def with_float64(device: torch.device) -> torch.device:
    """The device for work in float64: the CPU where the GPU has none, as Apple's."""
    return device if device.type == "cuda" else torch.device("cpu")


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Around work of several ranks: what backends make of a rank that has gone becomes a `LostRank`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise LostRank(
            "another process of this run has ended or cannot be reached, so this one ends too; what was saved stays, and "
            "the same command with --resume auto goes on from there."
        ) from error


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


def split(total: int, parts: int) -> list[slice]:
    """At most `parts` slices of `total` images, in order, of nearly equal length; none is empty."""
    parts = min(parts, total)
    bounds = [total * number // parts for number in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def concatenate(tensor: Tensor, images: int | None = None) -> Tensor:
    """The rows of all ranks, in rank order.

    Args:
        images: of all ranks, as `split` gives them to each; the rows are as many for every image. None: every rank has as
            many rows.
    """
    if not dist.is_initialized():
        return tensor
    shares = split(world_size() if images is None else images, world_size())
    counts = [share.stop - share.start for share in shares]
    rows = [len(tensor) // counts[rank()] * count for count in counts]
    padded = torch.cat([tensor, tensor.new_zeros(max(rows) - len(tensor), *tensor.shape[1:])])
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank; any object that can be pickled."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(work: Callable[[], T]) -> T:
    """Call `work` on the main rank alone, and return its result, or raise its error, on every rank.

    The result must be an object that can be pickled.
    """
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


def get_local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread over ranks; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is spread over ranks, which all call this; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_over_parts(tensor: Tensor, whole: Tensor) -> Tensor:
    """Sum of `tensor` over the ranks among which `whole` is spread, in place; nothing where it is not."""
    if isinstance(whole, DTensor):
        mesh = whole.device_mesh
        dist.all_reduce(tensor, group=mesh.get_group(mesh.ndim - 1))
    return tensor


def check(find_problem: Callable[[], str]) -> None:
    """Let every rank look for a problem, and refuse the first that one has found, on all ranks.

    Args:
        find_problem: returns how a sentence goes on that begins with a rank and its machine; "" where all is well.

    Raises:
        ValueError: there is one.
    """
    for number, (machine, problem) in enumerate(gather((platform.node(), find_problem()))):
        if problem:
            raise ValueError(f"rank {number} on {machine} {problem}")


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
