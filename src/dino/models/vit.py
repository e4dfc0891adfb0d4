"""The Vision Transformer as the paper trains it (section 3.2; DeiT's pre-norm ViT with a learned position per patch).

State-dict keys are the reference's, so released weights load unchanged. Three things are done otherwise than written down
in the papers, with the same results: attention runs through `scaled_dot_product_attention`, unless a CPU learns from a few
tokens; where only the [CLS] output is asked for, the last block computes that one query (6 % of all FLOPs saved); activations
may be computed again in the backward pass.

Letters: n images, t tokens (1 + patches), q tokens that are asked for (t or 1), d width, h heads.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dino.machine import check_memory
from dino.models.positions import PositionInterpolation, interpolate_positions
from dino.models.preprocessing import Preprocessed
from dino.models.stems import ConvStem, PatchEmbed

Recompute = Literal["nothing", "elementwise", "blocks"]

# name: width, depth, heads. `vit_nano` is ours, for CPUs and small images.
SIZES: dict[str, tuple[int, int, int]] = {
    "vit_nano": (96, 4, 3),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
}

# The same with a stem of convolutions in place of patches.
HYBRIDS: dict[str, tuple[int, int, int]] = {"vit_nano_hybrid": (128, 3, 4)}

# Up to so many tokens, and half as many channels of a head, a CPU learns faster with two plain products than with PyTorch's
# own kernel, whose backward pass is slow there: the demo's steps take 0.4 of the time (docs/performance-log.md).
FEW = 64

# Results that "elementwise" keeps for the backward pass. Norms, GELU and sums are computed again from them.
PRODUCTS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


class ImageSizeError(ValueError):
    """A backbone cannot take images of this size."""


class DropPath(nn.Module):
    """Stochastic depth: a residual branch is added for random samples only, scaled by 1 / (1 - rate)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(
        self, residual: Tensor, branch: Callable[[Tensor], Tensor], x: Tensor, noise: Float[Tensor, " n"] | None = None
    ) -> Tensor:
        """`residual` + `branch(x)`; samples whose `noise` is at least 1 - rate get `residual` alone."""
        if self.rate == 0 or not self.training:
            return residual + branch(x)
        keep = 1 - self.rate
        kept = x.new_empty(len(x)).bernoulli_(keep) if noise is None else (noise < keep).to(residual.dtype)
        if x.device.type != "cpu" or torch.compiler.is_compiling():  # to count the kept samples would wait for the GPU
            return residual + branch(x) * (kept / keep)[:, None, None]
        rows = kept.nonzero()[:, 0]  # the branch is computed for these samples only
        return residual.index_add(0, rows, branch(x.index_select(0, rows)).to(residual.dtype), alpha=1 / keep)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "n t d"], only_cls: bool = False) -> Float[Tensor, "n q d"]:
        q, k, v = self._heads(x, only_cls)
        if self.training and x.device.type == "cpu" and max(x.shape[1], 2 * q.shape[-1]) <= FEW:
            mixed = _compare(q, k) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def weights(self, x: Float[Tensor, "n t d"], only_cls: bool = False) -> Float[Tensor, "n h q t"]:
        q, k, _ = self._heads(x, only_cls)
        return _compare(q, k)

    def _heads(self, x: Float[Tensor, "n t d"], only_cls: bool) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q[:, :, :1] if only_cls else q, k, v


def _compare(q: Float[Tensor, "n h q d"], k: Float[Tensor, "n h t d"]) -> Float[Tensor, "n h q t"]:
    return (q * (1 / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)).softmax(dim=-1)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + drop_path(attn(norm1(x))), then x + drop_path(mlp(norm2(x)))."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(0.0)

    def forward(
        self, x: Float[Tensor, "n t d"], only_cls: bool = False, drop_path_noise: Float[Tensor, "2 n"] | None = None
    ) -> Float[Tensor, "n q d"]:
        """With `only_cls` of the [CLS] token alone: q is 1."""
        first, second = (None, None) if drop_path_noise is None else drop_path_noise.unbind()
        x = self.drop_path(x[:, :1] if only_cls else x, lambda x: self.attn(self.norm1(x), only_cls), x, first)
        return self.drop_path(x, lambda x: self.mlp(self.norm2(x)), x, second)


class VisionTransformer(Preprocessed, nn.Module):
    """Images to features.

    Args:
        hybrid: a stem of convolutions instead of patches.
        image_size: edge of the images the positions are learned for, pixels.
        patch_size: edge of a patch, pixels.
        drop_path: stochastic depth rate of the last block, rising linearly from 0 at the first.
        pos_interp: how positions are interpolated for other sizes; 'offset' is what released weights were trained with.

    Raises:
        ValueError: sizes that do not divide.
    """

    has_attention = True
    exports_any_size = True
    recomputable: tuple[Recompute, ...] = ("nothing", "elementwise", "blocks")

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
        hybrid: bool = False,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of num_heads {num_heads}; change one of them.")
        if pos_interp not in get_args(PositionInterpolation):
            choices = ", ".join(get_args(PositionInterpolation))
            raise ValueError(f"pos_interp is '{pos_interp}'; choose one of {choices}.")
        self.embed_dim, self.patch_size, self.num_heads, self.depth = dim, patch_size, num_heads, depth
        self.image_size, self.in_channels = image_size, in_channels
        self.pos_interp: PositionInterpolation = pos_interp
        self.interpolate = interpolate_positions  # `dino.exports` sets one that takes symbols
        self.recompute: Recompute = "nothing"
        rows, columns = self.grid(image_size, image_size)
        numbers = dim * (12 * dim * depth + rows * columns + in_channels * patch_size**2)
        check_memory(4 * numbers, f"a ViT of width {dim} and depth {depth} for images of {image_size} pixels")
        self.patch_embed = (ConvStem if hybrid else PatchEmbed)(patch_size, in_channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.set_drop_path(drop_path)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)  # the patch convolution keeps PyTorch's default, as in the reference

    @property
    def name(self) -> str:
        """What the paper calls it, e.g. "vit_small/16"; "" where it has no name."""
        sizes = (self.embed_dim, self.depth, self.num_heads)
        return next((f"{arch}/{self.patch_size}" for arch, known in SIZES.items() if known == sizes), "")

    def forward(
        self, images: Float[Tensor, "n c height width"], drop_path_noise: Float[Tensor, "branches n"] | None = None
    ) -> Float[Tensor, "n d"]:
        """The normed [CLS] feature.

        Args:
            drop_path_noise: uniform numbers in [0, 1), for each of `num_drop_path` branches in the order of the blocks;
                they decide which samples skip the branch. Drawn here where None.
        """
        noise = self._share_noise(drop_path_noise)
        x = self._embed(images)
        for i, block in enumerate(self.blocks):
            x = self._run(block, x, i == self.depth - 1, noise[i])
        return self.norm(x)[:, 0]

    def _share_noise(self, noise: Tensor | None) -> Sequence[Tensor | None]:
        """Each block's part of the noise for stochastic depth: of its two branches."""
        return [None] * self.depth if noise is None else noise.unflatten(0, (-1, 2)).unbind()

    def _run(self, block: nn.Module, x: Tensor, only_cls: bool, noise: Tensor | None) -> Tensor:
        if not self.training or self.recompute == "nothing" or (self.recompute == "blocks" and only_cls):
            return block(x, only_cls, noise)
        if self.recompute == "blocks":
            return checkpoint(block, x, only_cls, noise, use_reentrant=False)
        device = x.device.type
        autocast = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # Without its cache: both passes must cast the same weights, and the cache is empty in the second.
        with torch.autocast(device, *autocast, cache_enabled=False):
            contexts = functools.partial(create_selective_checkpoint_contexts, PRODUCTS)
            return checkpoint(block, x, only_cls, noise, use_reentrant=False, context_fn=contexts)

    def set_recompute(self, what: Recompute) -> None:
        """Choose which activations the backward pass computes again: less memory, more time, same gradients.

        "elementwise": norms, GELU and sums, no matrix product. "blocks": all but the input of each block.
        """
        assert what in self.recomputable
        self.recompute = what

    def set_drop_path(self, rate: float) -> bool:
        """Stochastic depth that rises linearly from 0 at the first block to `rate` at the last."""
        self.num_drop_path = 2 * self.depth if rate else 0
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            block.drop_path.rate = rate * i / max(self.depth - 1, 1)
        return True

    def resize_positions(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of a ViT for images of any size, with positions for images of `image_size`."""
        if "pos_embed" not in state:
            return state
        rows, columns = self.grid(self.image_size, self.image_size)
        return state | {"pos_embed": interpolate_positions(state["pos_embed"], rows, columns, self.pos_interp)}

    def number_layers(self) -> dict[str, int]:
        """The layer of each parameter: 0 before the blocks, then a block each, and after the blocks."""
        found = {}
        for name, _ in self.named_parameters():
            outside = self.depth + 1 if name.startswith("norm.") else 0
            found[name] = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else outside
        return found

    def overlap_patches(self, stride: int) -> None:
        """Cut a patch every `stride` pixels from now on, so that patches overlap and maps are finer.

        The image is padded with its mean so that a patch is centered on each square of `stride` pixels; positions are
        interpolated to that grid.

        Raises:
            ValueError: patches cannot be centered so, or there are none.
        """
        patch = self.patch_size
        if not isinstance(self.patch_embed, PatchEmbed):
            raise ValueError("a stem of convolutions has no patches to overlap; leave --stride out.")
        if not 0 < stride < patch or (patch - stride) % 2:
            raise ValueError(
                f"--stride is {stride}; it must be less than the patch size {patch} by an even number, e.g. {patch // 2}."
            )
        self.patch_size = stride  # the edge of a cell, which others ask for
        self.patch_embed.proj.stride = stride, stride
        self.patch_embed.proj.padding = (patch - stride) // 2, (patch - stride) // 2

    def tokens(
        self,
        images: Float[Tensor, "n c height width"],
        layers: int = 1,
        drop_path_noise: Float[Tensor, "branches n"] | None = None,
    ) -> list[Float[Tensor, "n t d"]]:
        """Normed tokens ([CLS] first) after each of the last `layers` blocks, oldest first; noise as for `forward`."""
        if not 1 <= layers <= self.depth:
            raise ValueError(f"layers is {layers}; this model has 1 to {self.depth} blocks.")
        noise = self._share_noise(drop_path_noise)
        x, kept = self._embed(images), []
        for i, block in enumerate(self.blocks):
            x = self._run(block, x, only_cls=False, noise=noise[i])
            if i >= self.depth - layers:
                kept.append(self.norm(x))
        return kept

    def attention(self, images: Float[Tensor, "n c height width"], only_cls: bool = False) -> Float[Tensor, "n h q t"]:
        """Softmaxed self-attention of the last block; row 0 is where [CLS] looks (paper Fig. 1)."""
        x = self._embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return last.attn.weights(last.norm1(x), only_cls)

    def cls_attention(self, images: Float[Tensor, "n c height width"]) -> Float[Tensor, "n h p"]:
        """Where [CLS] looks: `attention`'s row 0 over the patches, without computing the other rows."""
        return self.attention(images, only_cls=True)[:, :, 0, 1:]

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

    def _embed(self, images: Tensor) -> Float[Tensor, "n t d"]:
        rows, columns = self.grid(*images.shape[-2:])
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self.interpolate(self.pos_embed, rows, columns, self.pos_interp)


def init_linear(module: nn.Module) -> None:
    """Linear weights from a normal of standard deviation 0.02 cut at +-2, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
