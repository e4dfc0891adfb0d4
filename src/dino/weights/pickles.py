"""Pickles read without running code: tensors, plain values and a short list of harmless classes."""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import re
import warnings
from typing import Any

import numpy as np
import torch

_SCALAR = np.float64(0).__reduce__()[0]  # rebuilds a NumPy number from its bytes

# The reference's checkpoints hold, beside tensors, its parsed flags with paths, and learning rates that are NumPy numbers.
# To build one of these classes has no effect. NumPy and pathlib have moved some of them, hence the second names.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    (pathlib.PosixPath, "pathlib.PosixPath"),
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype("float64")),
    type(np.dtype("int64")),
]


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """The content of a file of `torch.save`, on the CPU.

    Raises:
        ValueError: the file is damaged, or would build anything beyond tensors, plain values and the classes above.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle formats; a user cannot change the file
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); check its permissions.") from error
    except Exception as error:  # damaged pickles raise a dozen kinds
        asked = re.search(r"GLOBAL (\S+)|class (\S+) was not", str(error))
        if asked is None or not isinstance(error, pickle.UnpicklingError):
            raise ValueError(f"{path} is damaged or no PyTorch file; download or save it again.") from error
        raise ValueError(
            f"{path} asks for {asked[1] or asked[2]}, which weights never need and which could run code; it was not "
            "read. Get the weights from a source you trust, saved as tensors only."
        ) from error


_ARRAYS = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
    (f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if not self.is_harmless(module_name, global_name):
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which could run code")
        return super().find_class(module_name, global_name)

    def is_harmless(self, module_name: str, global_name: str) -> bool:
        return (module_name, global_name) in _ARRAYS


class _MetadataUnpickler(_PlainUnpickler):
    """For what torch.distributed.checkpoint writes of its tensors: its own records, types and sizes of tensors, paths."""

    def is_harmless(self, module_name: str, global_name: str) -> bool:
        if module_name == "torch":
            return global_name == "Size" or isinstance(getattr(torch, global_name, None), torch.dtype)
        return (module_name, global_name) in _RECORDS


_CHECKPOINT = "torch.distributed.checkpoint"
_METADATA = "Metadata MetadataIndex StorageMeta ChunkStorageMetadata TensorProperties TensorStorageMetadata"
_RECORDS = {(f"{_CHECKPOINT}.metadata", name) for name in (*_METADATA.split(), "_MEM_FORMAT_ENCODING")}
_RECORDS |= {(f"{_CHECKPOINT}.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")}
_RECORDS |= {(module, kind) for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "WindowsPath")}


def check_metadata(path: str | os.PathLike[str]) -> None:
    """Refuse a file of torch.distributed.checkpoint, which PyTorch itself would load whatever it asks for.

    Raises:
        Exception, of many kinds: the file is damaged, or holds anything but such records.
    """
    with open(path, "rb") as file:
        _MetadataUnpickler(file).load()


def load_plain_pickle(path: str | os.PathLike[str]) -> Any:
    """The content of a file of `pickle.dump` that holds dicts, lists, strings, numbers and NumPy arrays.

    Raises:
        Exception, of many kinds: the file is damaged, or holds anything else.
    """
    with open(path, "rb") as file:
        return _PlainUnpickler(file, encoding="latin1").load()
