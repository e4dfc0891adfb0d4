"""Backbones and the projection head: plain PyTorch, independent of the rest of the package.

Other modules use of a backbone only what `Backbone` names, so that any backbone works everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor, nn

from dino import errors
from dino.models.head import Head
from dino.models.positions import PositionInterpolation
from dino.models.preprocessing import Interpolation, Preprocessing, Resize, choose_preprocessing
from dino.models.vit import HYBRIDS, SIZES, ImageSizeError, Recompute, VisionTransformer

if TYPE_CHECKING:
    from dino.models.timm_backbone import TimmBackbone

__all__ = [
    "CONVNETS",
    "HYBRIDS",
    "NO_ATTENTION",
    "SIZES",
    "Backbone",
    "Head",
    "ImageSizeError",
    "Recompute",
    "VisionTransformer",
    "create",
]

# Ours of timm's parts: name in timm, and the sizes in which ours differs. Few layers, for CPUs and small sets of images.
CONVNETS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet_nano": ("resnet18", {"layers": [1, 1, 1, 0], "channels": [64, 128, 256, 256]})
}
Stem = Literal["default", "half", "small"]
TIMM = "timm:"  # prefix of the architectures that timm builds
NO_ATTENTION = (
    "this model has no attention maps: only ViTs with a [CLS] token have them. Train one (dino train --data photos/ "
    "--model vit_nano_hybrid; on a GPU vit_small), or load one (timm:vit_..., timm:deit_...). dino pca and dino match "
    "work with every model."
)


class Backbone(Protocol):
    """The interface of every backbone. Images are normalized, NCHW.

    A cell is a patch of a transformer or a position of a ConvNet's last map.
    """

    embed_dim: int
    in_channels: int
    image_size: int  # it was built for, pixels
    patch_size: int  # edge of a cell, pixels
    preprocessing: Preprocessing  # of pictures
    has_attention: bool
    exports_any_size: bool  # in multiples of `patch_size`; False: torch.export finds out
    recomputable: tuple[Recompute, ...]  # choices of `set_recompute`
    num_drop_path: int  # branches of stochastic depth whose noise is passed as a second argument; 0: it draws its own

    @property
    def pos_interp(self) -> PositionInterpolation | None: ...  # how it interpolates positions; None: in its own way
    @property
    def view_size(self) -> int: ...  # edge of an evaluation's view, pixels
    @property
    def name(self) -> str: ...  # the paper's or timm's, e.g. "vit_small/16"; "" where it has none
    def __call__(self, images: Tensor) -> Tensor: ...  # [n, embed_dim]
    def tokens(self, images: Tensor, layers: int = 1) -> list[Tensor]: ...  # normed [n, 1 + cells, embed_dim]
    def grid(self, height: int, width: int) -> tuple[int, int]: ...  # rows and columns of cells; ValueError: cannot
    def attention(self, images: Tensor) -> Tensor: ...  # [n, heads, tokens, tokens]; ValueError: has none
    def cls_attention(self, images: Tensor) -> Tensor: ...  # [n, heads, cells]; ValueError: has none
    def set_recompute(self, what: Recompute) -> None: ...  # activation checkpointing
    def set_drop_path(self, rate: float) -> bool: ...  # False: it keeps the rate that it was built with
    def resize_positions(self, state: dict[str, Tensor]) -> dict[str, Tensor]: ...  # for its own `image_size`
    def number_layers(self) -> dict[str, int]: ...  # of each parameter, from 0, for layer-wise rates
    def overlap_patches(self, stride: int) -> None: ...  # finer maps; ValueError: cannot
    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...


def require_architecture(arch: str) -> None:
    """Refuse a name that stands for nothing.

    Raises:
        ValueError: with the nearest one.
    """
    own = [*SIZES, *HYBRIDS, *CONVNETS]
    if arch not in own and not arch.startswith(TIMM):
        import timm  # slow, and needed only to explain the mistake

        near = errors.did_you_mean(arch, [*own, *(TIMM + name for name in timm.list_models())])
        raise ValueError(f"there is no architecture '{arch}'; known are {', '.join(own)} and timm:NAME.{near}")


def create(
    arch: str,
    patch_size: int | None = None,
    image_size: int = 224,
    width: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    in_channels: int = 3,
    stem: Stem | None = None,
    drop_path: float = 0.0,
    pos_interp: PositionInterpolation = "offset",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    interpolation: Interpolation | None = None,
    resize: Resize | None = None,
    crop: float | None = None,
    eval_size: int | None = None,
) -> VisionTransformer | TimmBackbone:
    """Create a backbone with fresh weights: one of ours by name, or "timm:NAME" for any architecture of timm.

    Args:
        patch_size: of our own ViTs, 16 by default.
        image_size: edge of the global views, pixels; other sizes work too where the architecture allows them.
        width, depth, num_heads: of our own ViTs; they override the architecture's own.
        in_channels: channels of the images, 1 or more.
        stem: makes a ResNet's first convolution 3x3, of stride 1 ("small") or 2 ("half"), without pooling.
        drop_path: stochastic depth rate, where the architecture has it.
        pos_interp: how a ViT's positions are interpolated for other sizes; "offset" is timm's own way for a ViT of timm.
        mean, std, interpolation, resize, crop, eval_size: of its pictures, see `Preprocessing` (whose size is `eval_size`).

    Raises:
        ValueError: an unknown name, a size that the architecture cannot take, or an option it does not have.
    """
    sizes = {"patch_size": patch_size, "width": width, "depth": depth, "num_heads": num_heads}
    for name, value in (sizes | {"image_size": image_size, "in_channels": in_channels}).items():
        if value is not None and (not isinstance(value, Integral) or value < 1):
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    if not (isinstance(drop_path, Real) and 0 <= drop_path < 1):
        raise ValueError(f"drop_path is {drop_path!r}; it must be in [0, 1).")
    pictures = {"in_channels": in_channels, "mean": mean, "std": std, "interpolation": interpolation}
    preprocessing = choose_preprocessing(pictures | {"resize": resize, "crop": crop, "eval_size": eval_size})
    if arch.startswith(TIMM) or arch in CONVNETS:
        if fixed := [name for name, value in sizes.items() if value is not None]:
            raise ValueError(f"{arch} fixes its own {' and '.join(fixed)}; leave that out, or choose another name.")
        from dino.models.timm_backbone import TimmBackbone

        name, parts = CONVNETS.get(arch, (arch.removeprefix(TIMM), {}))
        model = TimmBackbone(name, image_size, in_channels, drop_path, stem or "default", pos_interp, parts)
    else:
        require_architecture(arch)
        if stem not in (None, "default"):
            raise ValueError(
                f"stem '{stem}' is for ResNets; {arch} has patches, so choose a smaller patch_size instead."
            )
        usual = (SIZES | HYBRIDS)[arch]
        dim, layers, heads = (given or own for given, own in zip((width, depth, num_heads), usual, strict=True))
        chosen = (image_size, patch_size or 16, in_channels, dim, layers, heads)
        model = VisionTransformer(*chosen, drop_path, pos_interp, hybrid=arch in HYBRIDS)
    model.preprocessing = preprocessing
    return model
