"""Parameters spread over ranks (FSDP2): each rank keeps a part of every tensor, and the whole of one block at a time."""

from __future__ import annotations

import os
import re
from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from dino import distributed
from dino.method import DINO, Network

Shard = Literal["none", "all", "machine"]

# Containers of a network's blocks, as this package and timm name them.
BLOCKS = re.compile(r"(blocks|layer\d)$")


def create_mesh(device: torch.device, how: Shard) -> DeviceMesh:
    """The ranks as a row, or for "machine" as [machines, ranks of each]: tensors are spread along the last dimension.

    Raises:
        ValueError: machines have different numbers of ranks.
    """
    ranks = distributed.world_size()
    if how == "all":
        return init_device_mesh(device.type, (ranks,))
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if any(other != here for other in distributed.gather(here)):
        raise ValueError("shard is machine, but machines have different numbers of processes; use --shard all.")
    return init_device_mesh(device.type, (ranks // here, here), mesh_dim_names=("machines", "ranks"))


def shard(method: DINO, device: torch.device, how: Shard) -> None:
    """Spread all networks of `method` over the ranks, in place. Optimizers must be made afterwards.

    A block is whole while it computes, in the precision of its parameters: autocast is for what it computes, as in a run that
    is not sharded.
    """
    mesh = create_mesh(device, how)
    for network in method.modules():
        if not isinstance(network, Network):
            continue
        for parameter in network.parameters():
            parameter.data = parameter.data.contiguous()  # channels-last weights cannot be cut
        for name, container in network.backbone.named_modules():
            if BLOCKS.search(name):
                for block in container.children():
                    fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # Also the outermost, else the teacher would go on with what it gathered before the student moved.
        for part in (network.head.last_layer, network.head, network):
            if any(True for _ in part.parameters()):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
