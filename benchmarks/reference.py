"""The reference's own networks, loss and step as a peer, imported from a checkout of facebookresearch/dino."""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino.method import DINO, Network

EPOCH = 10  # of 100: warm-up and frozen prototypes are over


def imported(checkout: Path, module: str) -> Any:
    """A module of the checkout.

    Raises:
        ValueError: it is none.
    """
    if not (checkout / "main_dino.py").is_file():
        raise ValueError(f"{checkout} holds no main_dino.py; --reference takes a checkout of facebookresearch/dino.")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return import_module(module)


class Reference:
    """Student and teacher with the weights of `ours`, trained by the reference's code (main_dino.train_one_epoch)."""

    def __init__(self, checkout: Path, ours: DINO, arch: str, patch: int, device: torch.device, precision: str):
        vit, self.utils, main = (imported(checkout, name) for name in ("vision_transformer", "utils", "main_dino"))
        if not dist.is_initialized():  # the center is averaged over ranks
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
            dist.all_reduce(torch.zeros(1, device=device))  # what it takes of the memory it takes now
        prototypes = ours.center.value.numel()

        def network(trained: Network) -> nn.Module:
            rate = trained.backbone.blocks[-1].drop_path.rate  # pyright: ignore
            backbone = getattr(vit, arch)(patch_size=patch, drop_path_rate=rate)
            made = self.utils.MultiCropWrapper(backbone, vit.DINOHead(backbone.embed_dim, prototypes))
            made.load_state_dict(trained.state_dict())
            return made.to(device)

        self.student, self.teacher = network(ours.student), network(ours.teacher)
        self.teacher.requires_grad_(False)
        self.loss = main.DINOLoss(prototypes, 2, 0.04, 0.04, 0, 100).to(device)
        self.optimizer = torch.optim.AdamW(self.utils.get_params_groups(self.student), lr=1e-4)
        self.optimizer.param_groups[0]["weight_decay"] = 0.04
        self.device, self.precision = device, precision
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def gradients(self, groups: list[Tensor]) -> float:
        images = len(groups[0]) // 2
        crops = [crop for group in groups for crop in group.split(images)]
        self.loss.ncrops = len(crops)
        with torch.autocast(self.device.type, torch.float16, enabled=self.precision == "fp16"):
            loss = self.loss(self.student(crops), self.teacher(crops[:2]), EPOCH)
        assert torch.isfinite(torch.tensor(loss.item()))
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        return loss.item()

    def step(self, groups: list[Tensor]) -> float:
        loss = self.gradients(groups)
        self.utils.clip_gradients(self.student, 3.0)
        self.utils.cancel_gradients_last_layer(EPOCH, self.student, 1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for q, k in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                k.data.mul_(0.996).add_((1 - 0.996) * q.detach().data)
        return loss
