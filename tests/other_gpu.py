"""A GPU that is no NVIDIA's, as far as it can be had without one: numbers live apart, and there is no float64, as on Apple's.

PyTorch's device for other backends stands for it. The CPU computes, but an operation refuses numbers that were not sent
to the device, and results must be copied back. Run as a program, it is the command line on that device:

    python tests/other_gpu.py '[["train", "--device", "mps", ...], ["eval", ...]]'
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from dino import cli, distributed


class Sent(Tensor):
    """A tensor on the device; `raw` are its numbers."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Sent:
        if raw.dtype == torch.float64:
            raise TypeError("the device has no float64")
        sent = Tensor._make_wrapper_subclass(
            cls, raw.size(), raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=torch.device("other:0")
        )
        sent.raw = raw
        return sent

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.raw.__reduce_ex__(protocol)  # a checkpoint is read on any machine

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, *args, **(kwargs or {}))


def fetch(value: Any) -> Any:
    if isinstance(value, Sent):
        return value.raw
    return torch.device("cpu") if isinstance(value, torch.device) else value


def compute(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation of PyTorch on the device: none mixes its numbers with those of the CPU, but to copy them."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    sent = {id(x.raw): x for x in given if isinstance(x, Sent)}
    if "copy" not in str(operation):
        for x in given:
            assert isinstance(x, Sent) or not x.dim(), f"{operation}: {tuple(x.shape)} was not sent to the device"
    to_cpu = torch.device(kwargs.get("device") or "other").type == "cpu"

    def send(value: Any) -> Any:
        if not isinstance(value, Tensor) or to_cpu:
            return value
        return sent[id(value)] if id(value) in sent else Sent(value)

    return tree_map(send, operation(*tree_map(fetch, args), **tree_map(fetch, kwargs)))


class Module:
    """What PyTorch asks of a device's own module."""

    synchronize = staticmethod(lambda: None)
    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


def register() -> list[torch.library.Library]:
    """Make the device known to PyTorch; it is there as long as what this returns."""
    _setup_privateuseone_for_python_backend("other", Module())
    all_, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    all_.fallback(compute, "PrivateUse1")
    all_.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")

    def empty(size: Any, stride: Any = None, *, dtype: Any = None, **_: Any) -> Tensor:
        return Sent(
            torch.empty(size, dtype=dtype) if stride is None else torch.empty_strided(size, stride, dtype=dtype)
        )

    def copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        assert not non_blocking, "the CPU may use this memory again before it is copied"
        fetch(target).copy_(fetch(source))
        return target

    own.impl("empty.memory_format", lambda size, **kwargs: empty(size, **kwargs), "PrivateUse1")
    own.impl("empty_strided", empty, "PrivateUse1")
    own.impl("_copy_from", copy, "PrivateUse1")
    return [all_, own]


if __name__ == "__main__":
    libraries = register()
    distributed.start = lambda device: torch.device("other:0")
    for arguments in json.loads(sys.argv[1]):
        if code := cli.main([*arguments, "--debug"]):
            sys.exit(code)
