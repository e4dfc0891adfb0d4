"""End-to-end fine-tuning on labels, after DeiT as the paper does (table 6, section 4.2.3 and appendix).

Augmentations and parameter groups are timm's, mixing is torchvision's. The recipes below follow what the authors have
published of theirs; `assumed` names the values that they have not published.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.transforms_factory import create_transform
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn
from torchvision.transforms import v2

from dino import distributed, schedules
from dino.data.open import open_labeled_pair
from dino.engine import parallel
from dino.eval.evaluate import Result, locate_work
from dino.eval.supervised import LabeledBatch, LabeledBatches, compute_accuracies, save_weights, train_supervised
from dino.features.extract import extract, select_labels
from dino.models import Backbone
from dino.models.preprocessing import Preprocessing
from dino.options.evaluate import FinetuneOptions
from dino.randomness import open_weights, seed_finetuning_step, seed_mixing
from dino.weights import fingerprint

MIX_GROUP = 16  # images; mixing stays within groups of a batch, so that it does not depend on the number of ranks
WARMUP_LR = 1e-6


@dataclass(frozen=True)
class FinetuneRecipe:
    """Hyper-parameters of one data set; the learning rates are per 512 images."""

    epochs: int
    lr: float
    batch_size: int = 768
    min_lr: float = 1e-6
    warmup_epochs: int = 5
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    drop_path: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25
    repeats: int = 3
    head_scale: float = 1.0
    assumed: tuple[str, ...] = ()


# CIFAR-10: dino#81, 7.5e-6 after scaling; CIFAR-100: dino#144, ViT-B; iNaturalist: dino#171; ImageNet: dino#31, the
# defaults of DeiT and a classifier that starts smaller.
_CIFAR = FinetuneRecipe(1000, 5e-6, erasing=0.0, assumed=("min_lr", "erasing"))
_OTHER_SMALL = dataclasses.replace(_CIFAR, assumed=("all but the model",))
_INATURALIST = FinetuneRecipe(300, 5e-5, batch_size=1024, assumed=("batch_size", "min_lr"))
FINETUNE_RECIPES = {
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "flowers": _OTHER_SMALL,
    "cars": _OTHER_SMALL,
    "inat18": _INATURALIST,
    "inat19": _INATURALIST,
    "imagenet": FinetuneRecipe(
        100, 5e-4, batch_size=1024, min_lr=1e-5, head_scale=0.001, assumed=("epochs", "head_scale", "min_lr")
    ),
}


class Classifier(nn.Module):
    """A backbone with a linear layer on its image feature; all parameters are trained."""

    def __init__(self, backbone: Backbone, num_classes: int, head_scale: float, seed: int):
        super().__init__()
        assert isinstance(backbone, nn.Module)
        self.backbone = backbone.requires_grad_(True)
        self.preprocessing, self.embed_dim = backbone.preprocessing, backbone.embed_dim
        self.head = nn.Linear(backbone.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02, generator=open_weights(seed))
        self.head.weight.data.mul_(head_scale)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def group_matcher(self, coarse: bool) -> Callable[[str], int]:
        """timm asks for this to group parameters by layer."""
        layers = {f"backbone.{name}": layer for name, layer in self.backbone.number_layers().items()}
        last = max(layers.values()) + (not self.backbone.has_attention)
        return lambda name: layers.get(name, last)


def group_by_layer(model: Classifier, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """timm's groups for AdamW with `lr_scale`, a layer's share of the learning rate.

    One-dimensional parameters, positions and the [CLS] token do not decay, as in DeiT. With b blocks the classifier and
    the last norm have scale 1, block i (from 0) layer_decay^(b - i), and what comes before layer_decay^(b + 1).
    """
    names = [name for name, _ in model.named_parameters()]
    undecayed = [name for name in names if name.endswith((".bias", "pos_embed", "cls_token"))]
    return param_groups_layer_decay(model, weight_decay, undecayed, layer_decay=layer_decay)


def compute_rate(epoch: int, recipe: FinetuneRecipe, epochs: int) -> float:
    """The rate of an epoch at the recipe's batch size: a linear warm-up, then the cosine as timm computes it."""
    peak = recipe.lr * recipe.batch_size / 512
    least = min(recipe.min_lr, peak)  # DeiT's own minimum, 1e-5, lies above the peak for CIFAR
    if epoch < recipe.warmup_epochs:
        return WARMUP_LR + epoch * (peak - WARMUP_LR) / recipe.warmup_epochs
    return schedules.cosine(epoch, epochs, peak, least)


class Finetuning:
    """One fine-tuning: the classifier, its optimizer, and a step."""

    def __init__(
        self, model: Classifier, recipe: FinetuneRecipe, per_epoch: int, seed: int, device: torch.device, precision: str
    ):
        self.model, self.recipe, self.per_epoch, self.seed = model.to(device).train(), recipe, per_epoch, seed
        self.device, self.precision = device, precision
        groups = group_by_layer(model, recipe.weight_decay, recipe.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
        classes = model.head.out_features
        kinds = ((v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix))
        self.mixes = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha > 0]

    def step(self, step: int, batch: LabeledBatch) -> Tensor:
        rate = compute_rate(step // self.per_epoch, self.recipe, self.recipe.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        images, targets = self._mix(batch, step)
        seed_finetuning_step(self.seed, distributed.rank(), step)  # stochastic depth; each rank has its own
        with parallel.autocast(self.device, self.precision):
            scores = self.model(images)
        smoothing = self.recipe.smoothing
        loss = F.cross_entropy(scores.float(), targets, label_smoothing=smoothing, reduction="sum") / batch.total
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                distributed.sum_(parameter.grad)
        self.optimizer.step()
        return distributed.sum_(loss.detach())

    def _mix(self, batch: LabeledBatch, step: int) -> tuple[Tensor, Tensor]:
        """MixUp or CutMix, the same for the whole batch: every group of every rank starts from the same seed."""
        if not self.mixes or not len(batch.images):
            return batch.images, batch.labels
        parts = []
        for images, labels in zip(batch.images.split(MIX_GROUP), batch.labels.split(MIX_GROUP), strict=True):
            seed_mixing(self.seed, step)
            parts.append(v2.RandomChoice(self.mixes)(images, labels))
        return torch.cat([images for images, _ in parts]), torch.cat([targets for _, targets in parts])

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def resolve_recipe(options: FinetuneOptions) -> FinetuneRecipe:
    """The recipe, with the given options in place of its values."""
    recipe = FINETUNE_RECIPES[options.recipe]
    names = [field.name for field in dataclasses.fields(FinetuneRecipe) if field.name != "assumed"]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    recipe = dataclasses.replace(recipe, **given)
    if options.epochs is not None and options.warmup_epochs is None:
        recipe = dataclasses.replace(recipe, warmup_epochs=min(recipe.warmup_epochs, options.epochs // 2))
    return recipe


def build_augmentation(size: int, recipe: FinetuneRecipe, wanted: Preprocessing) -> Any:
    """DeiT's, of timm: random crop and flip, RandAugment (without it, color jitter), erasing; [3, size, size]."""
    try:
        augmentation: Any = create_transform(
            size,
            is_training=True,
            auto_augment=recipe.rand_augment or None,
            color_jitter=0.3,
            interpolation=wanted.interpolation,
            mean=wanted.mean,
            std=wanted.std,
            re_prob=recipe.erasing,
            re_mode="pixel",
        )
    except Exception as error:  # timm asserts and looks up what stands in the name
        raise ValueError(
            f"rand_augment is '{recipe.rand_augment}', which timm cannot read; write e.g. rand-m9-mstd0.5-inc1, or ''."
        ) from error
    for op in (op for part in augmentation.transforms for op in getattr(part, "ops", ())):
        # At a magnitude of 10, in one draw of 40, timm posterizes to 0 bits: black, and an error in newer Pillow.
        op.magnitude_max = op.magnitude_max or 9.99
    return augmentation


def evaluate(model: Backbone, options: FinetuneOptions, device: torch.device) -> Result:
    """Fine-tune a copy of `model`, write it beside the result, and classify the test images with its last weights."""
    if model.in_channels != 3:
        raise ValueError(f"fine-tuning augments in color, but this model takes {model.in_channels} channel(s).")
    folder = locate_work(options, "finetune")
    train_on, test = open_labeled_pair(options.data, options.val)
    size, recipe, digest = options.size or model.view_size, resolve_recipe(options), fingerprint(model)
    model.grid(size, size)
    precision = "fp32" if options.precision == "auto" and device.type == "cpu" else options.precision
    if (precision := parallel.choose_precision(precision, device)) == "fp16":
        precision = "fp32"  # old GPUs; half precision would need its loss scaled
    tuned = Classifier(copy.deepcopy(model), len(train_on.classes), recipe.head_scale, options.seed)
    note = "" if tuned.backbone.set_drop_path(recipe.drop_path) else ", without stochastic depth"
    if distributed.world_size() > 1 and parallel.has_batch_norm(tuned):
        if device.type == "cpu":
            raise ValueError(
                "this model has BatchNorm, which CPU processes cannot share; fine-tune it with one process."
            )
        parallel.synchronize_batch_norm(tuned)
    recipe, seed = dataclasses.replace(recipe, batch_size=min(recipe.batch_size, len(train_on))), options.seed
    augmentation = build_augmentation(size, recipe, model.preprocessing)
    batches = LabeledBatches(
        train_on, augmentation, size, recipe.batch_size, seed, recipe.repeats, group=MIX_GROUP, drop_last=True
    )
    trainee = Finetuning(tuned, recipe, batches.steps_per_epoch, seed, device, precision)
    identity = {name: value for name, value in dataclasses.asdict(recipe).items() if name != "assumed"}
    identity |= {"seed": seed, "size": size, "precision": precision, "data": train_on.fingerprint, "model": digest}
    train_supervised(trainee, batches, recipe.epochs, folder, identity, options, device)
    tuned.eval().requires_grad_(False)
    classifier: Any = tuned  # its scores are features of the test images like any others
    scores = extract(classifier, test, size, shared=True, progress="test images")
    wanted = select_labels(test, scores, "test")
    save_weights(options, "finetune", tuned.state_dict(), train_on.classes)
    found = compute_accuracies(scores.values, wanted)
    return Result(
        {f"{options.recipe}_{name}": value for name, value in found.items()},
        f"fine-tuned end to end at {size} pixels by the recipe {options.recipe} (AdamW, {recipe.epochs} epochs at batch "
        f"{recipe.batch_size}, lr {recipe.lr:g} x batch / 512{note})",
        {"training": train_on.fingerprint, "test": test.fingerprint},
        {"training images": len(train_on), "test images": len(wanted)},
        {"recipe": dataclasses.asdict(recipe), "precision": precision},
    )
