"""Vision Transformer as the paper trains it (section 3.2; DeiT's pre-norm ViT with a learned position per patch).

State-dict keys are the reference's, so released weights load unchanged. Notable: attention runs through
`scaled_dot_product_attention`; where only the [CLS] output is asked for, the last block computes that one query
(6 % of all FLOPs saved, same mathematics); positions are interpolated for every input size but the one trained at.

Letters: n images, t tokens (1 + patches), d width, h heads.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PositionInterpolation = Literal["offset", "size", "antialias"]
Recompute = Literal["nothing", "elementwise", "blocks"]

# name: width, depth, heads. `vit_nano` is ours, for CPUs and small images.
SIZES: dict[str, tuple[int, int, int]] = {
    "vit_nano": (96, 4, 3),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
}


class ImageSizeError(ValueError):
    """A backbone cannot take images of this size."""


class DropPath(nn.Module):
    """Stochastic depth: a residual branch is added for random samples only, scaled by 1 / (1 - rate)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(
        self,
        x: Float[Tensor, "n q d"],
        branch: Callable[[Tensor], Tensor],
        given: Tensor,
        draw: Float[Tensor, " n"] | None = None,
    ) -> Tensor:
        """`x` plus what `branch` makes of `given` [n, ...]; `draw`: see `VisionTransformer.forward`."""
        if self.rate == 0 or not self.training:
            return x + branch(given)
        keep = 1 - self.rate
        kept = x.new_empty(len(x)).bernoulli_(keep) if draw is None else (draw < keep).to(x.dtype)
        if x.device.type != "cpu" or torch.compiler.is_compiling():  # their number would be waited for
            return x + branch(given) * (kept / keep)[:, None, None]
        rows = kept.nonzero()[:, 0]  # what is dropped need not be computed
        return x.index_add(0, rows, branch(given.index_select(0, rows)).to(x.dtype), alpha=1 / keep)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "n t d"], norm: nn.Module, only_cls: bool = False, recompute: bool = False
    ) -> Float[Tensor, "n q d"]:
        """Of `x`, normed first; `recompute`: see `_up_to_a_product`."""
        q, k, v = self._heads(_up_to_a_product(lambda x: self.qkv(norm(x)), x, recompute), only_cls)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def weights(self, x: Float[Tensor, "n t d"], norm: nn.Module, only_cls: bool = False) -> Float[Tensor, "n h q t"]:
        q, k, _ = self._heads(self.qkv(norm(x)), only_cls)
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)

    def _heads(self, qkv: Float[Tensor, "n t _"], only_cls: bool) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q[:, :, :1] if only_cls else q, k, v


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, norm: nn.Module, recompute: bool = False) -> Tensor:
        """Of `x`, normed first; `recompute`: see `_up_to_a_product`."""
        hidden = _up_to_a_product(lambda x: self.fc1(norm(x)), x, recompute)
        return _up_to_a_product(lambda hidden: self.fc2(F.gelu(hidden)), hidden, recompute)


def _up_to_a_product(work: Callable[[Tensor], Tensor], x: Tensor, recompute: bool) -> Tensor:
    """`work(x)`, which ends in a matrix product.

    With `recompute` only `x` is kept for the backward pass, which computes again what leads to the product, but not the
    product: PyTorch stops where it has all it needs.
    """
    return checkpoint(work, x, use_reentrant=False, preserve_rng_state=False) if recompute else work(x)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)
        self.recompute = False  # norms and GELU; needs a backward pass

    def forward(
        self, x: Float[Tensor, "n t d"], only_cls: bool = False, draws: Float[Tensor, "2 n"] | None = None
    ) -> Float[Tensor, "n q d"]:
        first, second = (None, None) if draws is None else draws.unbind()
        again = self.recompute and self.training
        x = self.drop_path(x[:, :1] if only_cls else x, lambda x: self.attn(x, self.norm1, only_cls, again), x, first)
        return self.drop_path(x, lambda x: self.mlp(x, self.norm2, again), x, second)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Float[Tensor, "n c height width"]) -> Float[Tensor, "n p d"]:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Images to features.

    Args:
        image_size: edge of the images the positions are learned for, pixels.
        patch_size: edge of a patch, pixels.
        drop_path: stochastic depth rate of the last block, rising linearly from 0 at the first.
        pos_interp: how positions are interpolated for other sizes; 'offset' is what released weights were trained with.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        drop_path: float = 0.0,
        pos_interp: PositionInterpolation = "offset",
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of num_heads {num_heads}; change one of them.")
        self.embed_dim, self.patch_size, self.num_heads, self.depth = dim, patch_size, num_heads, depth
        self.image_size, self.in_channels = image_size, in_channels
        self.pos_interp: PositionInterpolation = pos_interp
        self.has_attention = True
        self.recomputable: tuple[Recompute, ...] = ("nothing", "elementwise", "blocks")
        self.recompute: Recompute = "nothing"
        self.grid(image_size, image_size)
        self.patch_embed = PatchEmbed(patch_size, in_channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, dim))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.num_draws = 2 * depth if drop_path else 0
        self.blocks = nn.ModuleList(Block(dim, num_heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)  # the patch convolution keeps PyTorch's default, as in the reference

    def forward(
        self, images: Float[Tensor, "n c height width"], draws: Float[Tensor, "branches n"] | None = None
    ) -> Float[Tensor, "n d"]:
        """The normed [CLS] feature.

        Args:
            draws: uniform numbers in [0, 1) by which stochastic depth chooses, for each of `num_draws` branches in the order
                of the blocks, which samples skip it; drawn here where None.
        """
        x = self._embed(images)
        of_blocks = [None] * self.depth if draws is None else draws.unflatten(0, (-1, 2)).unbind()
        again = self.recompute == "blocks" and self.training
        for block, own in zip(self.blocks[:-1], of_blocks, strict=False):
            x = checkpoint(block, x, False, own, use_reentrant=False) if again else block(x, draws=own)
        return self.norm(self.blocks[-1](x, only_cls=True, draws=of_blocks[-1]))[:, 0]

    def set_recompute(self, what: Recompute) -> None:
        """What the backward pass computes again, so that it need not be kept: less memory, more time, same gradients.

        "elementwise" is norms and GELU, no matrix product; of "blocks" nothing is kept but each block's input.
        """
        assert what in self.recomputable
        self.recompute = what
        for block in self.blocks:
            assert isinstance(block, Block)
            block.recompute = what == "elementwise"

    def tokens(self, images: Float[Tensor, "n c height width"], layers: int = 1) -> list[Float[Tensor, "n t d"]]:
        """Normed tokens ([CLS] first) after each of the last `layers` blocks, oldest first."""
        if not 1 <= layers <= self.depth:
            raise ValueError(f"layers is {layers}; this model has 1 to {self.depth} blocks.")
        x, kept = self._embed(images), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= self.depth - layers:
                kept.append(self.norm(x))
        return kept

    def attention(self, images: Float[Tensor, "n c height width"]) -> Float[Tensor, "n h t t"]:
        """Softmaxed self-attention of the last block; row 0 is where [CLS] looks (paper Fig. 1)."""
        return self._attention(images)

    def cls_attention(self, images: Float[Tensor, "n c height width"]) -> Float[Tensor, "n h p"]:
        """Where [CLS] looks: `attention`'s row 0 over the patches, without computing the other rows."""
        return self._attention(images, only_cls=True)[:, :, 0, 1:]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in images of this size, pixels.

        Raises:
            ImageSizeError: the size is no multiple of the patch size.
        """
        p = self.patch_size
        if height < p or width < p:
            raise ImageSizeError(
                f"images are {height}x{width} pixels, smaller than one patch of {p} pixels; enlarge them."
            )
        if height % p or width % p:
            raise ImageSizeError(
                f"images are {height}x{width} pixels, which is not a multiple of the patch size {p}; "
                f"use {height // p * p}x{width // p * p} or another patch size."
            )
        return height // p, width // p

    def _attention(self, images: Tensor, only_cls: bool = False) -> Float[Tensor, "n h q t"]:
        x = self._embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return last.attn.weights(x, last.norm1, only_cls)

    def _embed(self, images: Tensor) -> Float[Tensor, "n t d"]:
        rows, columns = self.grid(*images.shape[-2:])
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self._positions(rows, columns)

    def _positions(self, rows: int, columns: int) -> Float[Tensor, "1 t d"]:
        return resize_positions(self.pos_embed, rows, columns, self.pos_interp)


def resize_positions(
    positions: Float[Tensor, "1 t d"], rows: int, columns: int, how: PositionInterpolation
) -> Float[Tensor, "1 u d"]:
    """Positions of a square grid ([CLS] first) for one of rows x columns, by bicubic interpolation."""
    side = math.isqrt(positions.shape[1] - 1)
    if torch.compiler.is_exporting():  # rows and columns are symbols, which PyTorch's interpolation would make numbers
        return _resize_symbolically(positions, side, rows, columns, how)
    if (rows, columns) == (side, side):
        return positions
    grid = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if how == "offset":
        # The reference adds 0.1 patch before dividing, and PyTorch then samples at exactly that scale.
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    else:
        grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=how == "antialias")
    assert grid.shape[-2:] == (rows, columns)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def _resize_symbolically(positions: Tensor, side: int, rows: int, columns: int, how: PositionInterpolation) -> Tensor:
    """`resize_positions` within 1e-5 as one graph for every size: products with two matrices of bicubic weights."""
    sizes = torch.stack([torch.scalar_tensor(rows), torch.scalar_tensor(columns)])
    excess = 0.1 * (sizes != side).any() if how == "offset" else 0.0
    steps = side / (sizes + excess)  # a step of 1 leaves the grid as it is
    along_rows, along_columns = (
        _bicubic(size, side, step, how == "antialias").to(positions)
        for size, step in zip((rows, columns), steps.unbind(), strict=True)
    )
    grid = torch.einsum("ri,ijd->rjd", along_rows, positions[0, 1:].unflatten(0, (side, side)))
    grid = torch.einsum("cj,rjd->rcd", along_columns, grid)
    return torch.cat([positions[:, :1], grid.flatten(0, 1)[None]], dim=1)


def _bicubic(size: int, side: int, step: Tensor, antialias: bool) -> Tensor:
    """Weights [size, side] with which `side` cells make `size`, as PyTorch's; `step` cells lie between two targets."""
    cells, targets = torch.arange(side) + 0.5, (torch.arange(size)[:, None] + 0.5) * step
    if antialias:  # the kernel is as wide as a step, and cut off at the border
        weights = _cubic((cells - targets) / step.clamp(min=1), -0.5)
        return weights / weights.sum(dim=1, keepdim=True)
    taps = (targets - 0.5).floor() + torch.arange(-1, 3)
    reached = taps.clamp(0, side - 1)[..., None] == cells - 0.5  # the border is repeated
    return (_cubic(targets - 0.5 - taps, -0.75)[..., None] * reached).sum(dim=1)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' convolution kernel."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


def init_linear(module: nn.Module) -> None:
    """Linear weights from a normal of standard deviation 0.02 cut at +-2, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
