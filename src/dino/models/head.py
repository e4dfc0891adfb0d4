"""The projection head (paper section 3.1 and appendix C): an MLP, an L2-normalized bottleneck, and K prototypes."""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dino.machine import check_memory
from dino.models.vit import init_linear

Activation = Literal["gelu", "relu"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class Prototypes(nn.Module):
    """Linear map without bias to K prototypes, each direction times a gain (weight normalization).

    Keys are `weight_v` [K, d] (directions) and `weight_g` [K, 1] (gains), as in the reference. With unit gains and a
    normalized input the outputs are cosines.
    """

    def __init__(self, dim: int, out_dim: int, fixed_gain: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not fixed_gain)
        # PyTorch's default initialization of a linear layer, which the reference's last layer keeps.
        self.weight_v = nn.Parameter(torch.empty(out_dim, dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        scale = self.weight_g / self.weight_v.norm(dim=1, keepdim=True)
        if len(x) < x.shape[1]:  # fewer scores than weights to scale
            return F.linear(x, self.weight_v) * scale.T
        return F.linear(x, self.weight_v * scale)


class Head(nn.Module):
    """Features to prototype scores, or to projections for losses that compare vectors.

    Args:
        in_dim: width of the features.
        out_dim: number of prototypes K.
        num_layers: linear layers before the prototypes, the last of them into the bottleneck if there is one.
        norm_last_layer: fix the prototypes' gains at one.
        bottleneck: reduce to `bottleneck_dim` and L2-normalize before the prototypes.
        prototypes: False ends at the bottleneck, not normalized (BYOL, MoCo).
        predictor: one more hidden layer behind the bottleneck, for a student whose teacher has none (BYOL).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        norm_last_layer: bool = True,
        batch_norm: bool = False,
        activation: Activation = "gelu",
        bottleneck: bool = True,
        prototypes: bool = True,
        predictor: bool = False,
    ):
        super().__init__()
        if num_layers < int(bottleneck) or min(out_dim, hidden_dim, bottleneck_dim) < 1:
            raise ValueError("the head needs a layer into its bottleneck, and every width must be at least 1.")
        if not bottleneck and (predictor or not prototypes):
            raise ValueError("a head without bottleneck needs prototypes and has no place for a predictor.")
        numbers = hidden_dim * (in_dim + hidden_dim * num_layers) + bottleneck_dim * (out_dim + 2 * hidden_dim)
        check_memory(4 * numbers, f"a head of {out_dim} prototypes and hidden layers of {hidden_dim}")
        style = (batch_norm, activation)
        widths = [in_dim] + [hidden_dim] * (num_layers - int(bottleneck)) + [bottleneck_dim] * int(bottleneck)
        self.mlp = build_mlp(widths, *style, activate_last=not bottleneck)
        self.predictor = build_mlp([bottleneck_dim, hidden_dim, bottleneck_dim], *style) if predictor else nn.Identity()
        self.apply(init_linear)
        width = widths[-1]
        self.last_layer = Prototypes(width, out_dim, fixed_gain=norm_last_layer) if prototypes else nn.Identity()
        self.normalize = bottleneck and prototypes
        self.out_dim = out_dim if prototypes else width

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        x = self.predictor(self.mlp(x))
        return self.last_layer(F.normalize(x, dim=-1) if self.normalize else x)


def build_mlp(widths: list[int], batch_norm: bool, activation: Activation, activate_last: bool = False) -> nn.Module:
    """Linear layers through `widths` with activations between them, and after the last one with `activate_last`."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(a, b))
        if i < len(widths) - 2 or activate_last:
            if batch_norm:
                layers.append(nn.BatchNorm1d(b))
            layers.append(ACTIVATIONS[activation]())
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)
