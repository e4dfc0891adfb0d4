"""The projection head (paper section 3.1 and appendix C): an MLP, an L2-normalised bottleneck, and K prototypes."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dino.models.vit import init_linear


class Prototypes(nn.Module):
    """Linear map without bias to K prototypes, each direction times a gain (weight normalisation).

    Keys are `weight_v` [K, d] (directions) and `weight_g` [K, 1] (gains), as in the reference. With unit gains and a
    normalised input the outputs are cosines.
    """

    def __init__(self, dim: int, out_dim: int, fixed_gain: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not fixed_gain)
        # PyTorch's default initialisation of a linear layer, which the reference's last layer keeps.
        self.weight_v = nn.Parameter(torch.empty(out_dim, dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)))


class Head(nn.Module):
    """Features to prototype scores.

    Args:
        in_dim: width of the features.
        out_dim: number of prototypes K.
        num_layers: linear layers before the prototypes, the last of them into the bottleneck.
        norm_last_layer: fix the prototypes' gains at one.
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
    ):
        super().__init__()
        if num_layers < 1 or min(out_dim, hidden_dim, bottleneck_dim) < 1:
            raise ValueError("the head needs at least one layer, and every width must be at least 1.")
        widths = [in_dim] + [hidden_dim] * (num_layers - 1) + [bottleneck_dim]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            layers.append(nn.Linear(a, b))
            if i < num_layers - 1:
                layers += [nn.BatchNorm1d(b), nn.GELU()] if batch_norm else [nn.GELU()]
        self.mlp = nn.Sequential(*layers) if num_layers > 1 else layers[0]
        self.apply(init_linear)
        self.last_layer = Prototypes(bottleneck_dim, out_dim, fixed_gain=norm_last_layer)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))
