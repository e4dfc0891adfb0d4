"""From images to tokens: a patch each, or a stem of convolutions. Letters: n images, p patches, d width."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def put_channels_last(module: nn.Module) -> nn.Module:
    """Convolutions are up to a third faster with their channels last in memory; its state dicts stay as others want them."""
    module.register_state_dict_post_hook(_make_contiguous)
    return module.to(memory_format=torch.channels_last)


def _make_contiguous(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """safetensors and others refuse tensors whose channels come last in memory."""
    state |= {name: value.contiguous() for name, value in state.items() if name.startswith(prefix)}


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Float[Tensor, "n c height width"]) -> Float[Tensor, "n p d"]:
        return self.proj(images).flatten(2).transpose(1, 2)


class ConvStem(nn.Module):
    """Convolutions in place of patches (Xiao et al. 2021), which learn from little data. Each stage halves the map.

    Raises:
        ValueError: the patch size is no power of two.
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int):
        stages = patch_size.bit_length() - 1
        if patch_size != 2**stages or stages == 0:
            raise ValueError(
                f"patch_size is {patch_size}; a stem of convolutions needs 2, 4, 8, 16 or another power of two."
            )
        super().__init__()
        layers: list[nn.Module] = []
        width = in_channels
        for stage in range(stages):
            before, width = width, max(32, dim >> (stages - 1 - stage))
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = put_channels_last(nn.Sequential(*layers, nn.Conv2d(width, dim, 1)))

    def forward(self, images: Float[Tensor, "n c height width"]) -> Float[Tensor, "n p d"]:
        return self.layers(images).flatten(2).transpose(1, 2)
