"""Precision, compilation and gradients over ranks: wrappers around the networks."""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dino import distributed, errors
from dino.method import DINO

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(precision: str, device: torch.device) -> str:
    """'auto' as what this device does best; an impossible wish is refused."""
    # GPUs before Ampere emulate bf16 slowly, which PyTorch counts as support by default.
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        if device.type == "cuda":
            return "bf16" if bf16 else "fp16"
        # Other processors emulate bf16 slowly. PyTorch before 2.12 cannot tell.
        able = getattr(torch.cpu, "get_capabilities", dict[str, bool])() if device.type == "cpu" else {}
        return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"precision is fp16 but the device is {device.type}; use --precision fp32 or bf16.")
    if precision == "bf16" and not bf16:
        raise ValueError("precision is bf16 but this GPU has no bfloat16; use --precision fp16.")
    return precision


def autocast(device: torch.device, precision: str, cache: bool = True) -> contextlib.AbstractContextManager[object]:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision], cache_enabled=cache)


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


def synchronize_batch_norm(module: nn.Module) -> None:
    """BatchNorm over the images of all GPUs, in both networks, as in the reference; in place, same parameters and keys."""
    from timm.layers.norm_act import convert_sync_batchnorm  # PyTorch's would lose the activation in some of timm's

    convert_sync_batchnorm(module)


def check_compiler(device: torch.device) -> None:
    """Whether networks can be compiled for `device` here, found by trying.

    Raises:
        ValueError: they cannot.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except RuntimeError as error:
        raise ValueError(
            f"compile does not work here ({errors.first_line(error)}); install a C++ compiler such as g++, or leave out "
            "--compile."
        ) from error


def compile_networks(method: DINO, backend: str = "inductor") -> None:
    """Both networks as one graph each, for all resolutions; a step's shapes never change, so nothing is compiled again."""
    for network in (method.student, method.teacher):
        network.compile(dynamic=False, backend=backend)


def distribute(student: nn.Module, device: torch.device) -> nn.Module:
    """The student's forward pass, with gradients averaged over ranks when there are several.

    `TrainingStep` weights each rank's loss by its share of the images, so the mean of their gradients is that of all.
    """
    if distributed.world_size() == 1:
        return student
    # Without find_unused_parameters gradients are grouped in one way in the first step after a start, and in another in all
    # later ones. With three ranks or more their sums are then rounded otherwise: a resumed run would differ. PyTorch warns
    # that it looks for unused parameters and finds none; `dino.cli` keeps that from the terminal.
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():  # PyTorch 2.15 has a new name for broadcast_buffers, older ones do not know it
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            student, device_ids=ids, broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
        )


def without_sync(student: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[object]:
    """No averaging of gradients over ranks while `wanted`: in all parts of a step but the last."""
    if wanted and isinstance(student, DistributedDataParallel):
        return student.no_sync()
    return contextlib.nullcontext()
