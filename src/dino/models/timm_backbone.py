"""Every architecture of timm as a `Backbone`: a feature of the image, features of the cells of its last map, attention.

timm builds them with fresh weights (nothing is downloaded); its parameter names are kept, below `model`. The image sizes
that an architecture takes are found by running a copy of it on PyTorch's meta device, which computes shapes only.

Letters: n images, p prefix tokens ([CLS], registers), d width, h heads.
"""

import copy
import functools
import math
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import group_parameters
from timm.models.eva import Eva
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from dino import errors
from dino.models import NO_ATTENTION, Recompute, Stem
from dino.models.positions import PositionInterpolation
from dino.models.preprocessing import Preprocessed
from dino.models.stems import put_channels_last
from dino.models.timm_names import choose_pooling, split_arguments

# Options for every architecture; one that does not know an option is built without it.
OPTIONS: dict[str, Any] = {
    "dynamic_img_size": True,  # ViTs take views of several sizes
    "strict_img_size": False,  # Swin takes them
    "zero_init_last": False,  # residual branches start as in torchvision's ResNets, which the reference trains
}


# In these the last block's attention passes its softmaxed map through `attn_drop`. By name, because timm has moved them.
ATTENTIONS = ("Attention", "AttentionRope", "EvaAttention")


class TimmBackbone(Preprocessed, nn.Module):
    """The architecture `name` without its classifier.

    Args:
        name: as in `timm.list_models()`, and in brackets arguments of timm's class that differ from those of the name:
            "vit_small_patch14_dinov2(depth=4, num_heads=3)".
        image_size: edge of its images, pixels.
        drop_path: stochastic depth rate, as timm spreads it over the layers.
        stem: for ResNets on small images: a 3x3 convolution of stride 1 ("small") or 2 ("half"), no pooling.
        pos_interp: "size" interpolates a ViT's positions as Hugging Face does, anything else as timm does.
        sizes: arguments of timm's class that differ from those of `name`.
        weights: file of pretrained weights, in any form that timm converts from. None: fresh weights.

    Raises:
        ValueError: no such architecture, or it does not take these options.
    """

    exports_any_size = False
    recomputable: tuple[Recompute, ...] = ("nothing", "blocks")
    num_drop_path = 0  # its stochastic depth draws its own noise

    def __init__(
        self,
        name: str,
        image_size: int = 224,
        in_channels: int = 3,
        drop_path: float = 0.0,
        stem: Stem = "default",
        pos_interp: PositionInterpolation | None = None,
        sizes: dict[str, Any] | None = None,
        weights: Path | None = None,
    ):
        super().__init__()
        self.name, self.image_size, self.in_channels = name, image_size, in_channels
        name, given = split_arguments(name)
        if not timm.is_model(name):
            raise ValueError(f"timm has no architecture '{name}'.{errors.did_you_mean(name, timm.list_models())}")
        own = {"img_size": image_size, "drop_path_rate": drop_path}
        options = OPTIONS | choose_pooling(name) | own | (sizes or {}) | given
        if weights is not None:
            # The number of classes is one that no file has, so that timm drops any classifier.
            options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights), "num_classes": -1}}
        self.model, known = build_timm(name, in_channels, options)
        if drop_path and "drop_path_rate" not in known:
            raise ValueError(f"drop_path is {drop_path}, but timm:{name} has no stochastic depth; use 0.")
        if stem != "default":
            _shrink_stem(self.model, name, stride={"small": 1, "half": 2}[stem])
        learned = type(self.model) is TimmViT and self.model.pos_embed is not None
        self.pos_interp: PositionInterpolation | None = "antialias" if learned else None
        if pos_interp == "size":
            if not learned:
                raise ValueError(f"pos_interp 'size' is for learned positions, which timm:{name} lacks; leave it out.")
            self.pos_interp, self.model.__class__ = pos_interp, _HuggingFaceViT  # a class, so that copies keep it
        put_channels_last(self.model)
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        self._prefix: int | None = getattr(self.model, "num_prefix_tokens", None)
        rows, _ = self.grid(image_size, image_size)
        self.patch_size = -(-image_size // rows)
        self.embed_dim = int(getattr(self.model, "head_hidden_size", None) or self.model.num_features)
        self.has_attention = _has_cls_attention(self.model)

    def forward(self, images: Float[Tensor, "n c height width"]) -> Float[Tensor, "n d"]:
        """The feature that timm gives to a classifier: the normed [CLS] token or the pooled last map."""
        if not torch.compiler.is_compiling():
            self.grid(images.shape[-2], images.shape[-1])  # says what is wrong with a size
        if _is_empty(images):
            return self(images.new_zeros(1, *images.shape[1:]))[:0]
        return self.model.forward_head(self.model.forward_features(images))

    def set_recompute(self, what: Recompute) -> None:
        """See `VisionTransformer.set_recompute`."""
        assert what in self.recomputable
        self.model.set_grad_checkpointing(what == "blocks")

    def set_drop_path(self, rate: float) -> bool:
        return False

    def resize_positions(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `VisionTransformer.resize_positions`; another square grid of learned positions becomes this one's."""
        own, given = getattr(self.model, "pos_embed", None), state.get("model.pos_embed")
        if own is None or given is None or own.shape == given.shape or own.ndim != 3:
            return state
        grid = self.grid(self.image_size, self.image_size)
        return state | {"model.pos_embed": _resample(self.model, given, grid, antialias=self.pos_interp != "size")}

    def number_layers(self) -> dict[str, int]:
        """The layer of each parameter, by timm's own grouping. What follows a ViT's blocks is a layer of its own."""
        groups: Any = group_parameters(self.model, self.model.group_matcher(coarse=False), reverse=True)
        after = 1 + max(groups.values()) if isinstance(self.model, TimmViT | Eva) else 0
        return {
            f"model.{name}": after if after and layer and not name.startswith("blocks.") else layer
            for name, layer in groups.items()
        }

    def overlap_patches(self, stride: int) -> None:
        raise ValueError("only our own ViTs (and the releases) can overlap their patches; leave --stride out.")

    def tokens(self, images: Float[Tensor, "n c height width"], layers: int = 1) -> list[Float[Tensor, "n t d"]]:
        """The image's feature, then those of its cells row by row, normed; after the last `layers` blocks, oldest first.

        The feature of a ConvNet's cell is that of an image whose last map has the cell's values everywhere.

        Raises:
            ValueError: `layers` is above 1 and the architecture's blocks do not all have tokens of the last width.
        """
        if _is_empty(images):
            return [tokens[:0] for tokens in self.tokens(images.new_zeros(1, *images.shape[1:]), layers)]
        if layers == 1:
            return [self._tokens(self.model.forward_features(images))]
        if not isinstance(self.model, TimmViT | Eva) or not self._prefix:
            raise ValueError(
                f"layers is {layers}, but earlier layers of timm:{self.name} have other maps than the last; use 1."
            )
        if not 1 <= layers <= len(self.model.blocks):
            raise ValueError(f"layers is {layers}; this model has 1 to {len(self.model.blocks)} blocks.")
        kept: Any = self.model.forward_intermediates(
            images, layers, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        return [self._tokens(torch.cat([prefix, cells], dim=1)) for cells, prefix in kept]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of cells in the last map of images of this size, pixels.

        Raises:
            ValueError: the architecture does not take images of this size.
        """
        if (height, width) not in self._grids:
            try:
                with torch.no_grad():
                    images = torch.empty(1, self.in_channels, height, width, device="meta")
                    features = self._meta_copy.forward_features(images)
                    self._meta_copy.forward_head(features)
                self._grids[height, width] = self._cells(features, height, width)
            except Exception as error:  # each of a thousand architectures raises its own
                raise ValueError(
                    f"timm:{self.name}, built for {self.image_size}x{self.image_size} pixels, does not take images of "
                    f"{height}x{width} ({errors.first_line(error)}); use another size or architecture."
                ) from error
        return self._grids[height, width]

    def attention(self, images: Float[Tensor, "n c height width"], only_cls: bool = False) -> Float[Tensor, "n h q t"]:
        """Softmaxed self-attention of the last block, the p prefix tokens first.

        Raises:
            ValueError: the last block has no softmax attention of a [CLS] token over patches.
        """
        if not self.has_attention:
            raise ValueError(f"timm:{self.name}: {NO_ATTENTION}")
        seen: list[Tensor] = []
        attention: Any = self.model.blocks[-1].attn
        hook = attention.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        fused, attention.fused_attn = attention.fused_attn, False  # the fused kernel never holds the map
        try:
            self.model.forward_features(images)
        finally:
            hook.remove()
            attention.fused_attn = fused
        return seen[0][:, :, :1] if only_cls else seen[0]

    def cls_attention(self, images: Float[Tensor, "n c height width"]) -> Float[Tensor, "n h cells"]:
        """Where [CLS] looks: `attention`'s row 0 over the patches. Raises as `attention` does."""
        return self.attention(images, only_cls=True)[:, :, 0, self._prefix :]

    @functools.cached_property  # in __dict__, so it is not a submodule
    def _meta_copy(self) -> Any:
        return copy.deepcopy(self.model).to("meta").eval()

    def _cells(self, features: Any, height: int, width: int) -> tuple[int, int]:
        assert isinstance(features, Tensor), "its last layer gives several maps, not one"
        if features.ndim == 4:
            rows, columns = features.shape[1:3] if self._channels_last else features.shape[2:]
            return rows, columns
        length = features.shape[1]
        if self._prefix is None:  # the first images are square
            self._prefix = length - math.isqrt(length) ** 2
        edge = math.sqrt(height * width / (length - self._prefix))
        rows, columns = round(height / edge), round(width / edge)
        assert rows * columns == length - self._prefix, "its tokens form no grid"
        return rows, columns

    @property
    def _channels_last(self) -> bool:
        return str(getattr(self.model, "output_fmt", "NCHW")) == "NHWC"

    def _tokens(self, features: Tensor) -> Float[Tensor, "n t d"]:
        n, image = features.shape[0], self.model.forward_head(features)
        if features.ndim == 3 and self._prefix:
            cells = getattr(self.model, "fc_norm", nn.Identity())(features[:, self._prefix :])
        else:
            if features.ndim == 3:
                single = features.flatten(0, 1)[:, None]
            elif self._channels_last:
                single = features.flatten(0, 2)[:, None, None]
            else:
                single = features.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]
            cells = self.model.forward_head(single).unflatten(0, (n, -1))
        return torch.cat([image[:, None], cells], dim=1)


class _HuggingFaceViT(TimmViT):
    """timm's ViT that interpolates positions as Hugging Face's, without antialiasing."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        n, rows, columns, _ = x.shape
        assert self.pos_embed is not None
        positions = _resample(self, self.pos_embed, (rows, columns), antialias=False)
        prefix = [token.expand(n, -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = x.flatten(1, 2)
        if self.no_embed_class:
            return torch.cat([*prefix, x + positions], dim=1)
        return torch.cat([*prefix, x], dim=1) + positions


def _resample(model: Any, positions: Tensor, grid: tuple[int, int], antialias: bool) -> Tensor:
    """Positions of a square grid, behind those of prefix tokens if `model` has such, for another grid."""
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    return resample_abs_pos_embed(positions, [*grid], num_prefix_tokens=prefix, antialias=antialias)


def build_timm(name: str, in_channels: int, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """timm's model `name`, and those of the `options` that the architecture knows."""
    options = dict(options)
    while True:
        try:
            fixed = {"pretrained": False, "num_classes": 0, "in_chans": in_channels}
            return timm.create_model(name, **fixed | options), options
        except TypeError as error:
            unknown = [option for option in options if f"'{option}'" in str(error)]
            if not unknown:
                raise
            del options[unknown[0]]
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"timm:{name} cannot be built for images of {options.get('img_size')} pixels and {in_channels} channels "
                f"({error}); use another size or architecture."
            ) from error


def _is_empty(images: Tensor) -> bool:
    """Whether a rank has no image of a batch, which many of timm's models cannot take. A graph must not ask."""
    return not torch.compiler.is_compiling() and len(images) == 0


def _shrink_stem(model: Any, name: str, stride: int) -> None:
    """A 3x3 convolution in place of 7x7, and no pooling after it."""
    if not isinstance(model, ResNet) or not isinstance(model.conv1, nn.Conv2d):
        raise ValueError(
            f"a small stem replaces a ResNet's 7x7 convolution and pooling, which timm:{name} does not have; "
            "leave it out, or use for example timm:resnet18."
        )
    old = model.conv1
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def _has_cls_attention(model: nn.Module) -> bool:
    if not isinstance(model, TimmViT | Eva) or model.cls_token is None or model.global_pool != "token":
        return False
    # By name, not isinstance: subclasses compute something else.
    return type(getattr(model.blocks[-1], "attn", None)).__name__ in ATTENTIONS
