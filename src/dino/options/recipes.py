"""Named complete configurations. Each says its command, hardware, time and expected figure; a test builds all of them.

The reference trained in fp16 or fp32; here `precision` stays "auto" (bf16 on a GPU that has it).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dino import errors
from dino.options import replace
from dino.options.train import TrainOptions


class Recipe(NamedTuple):
    about: str
    command: str
    hardware: str
    expected: str
    options: TrainOptions


def _options(**changes: Any) -> TrainOptions:
    return replace(TrainOptions(), {name.replace("__", "."): value for name, value in changes.items()})


# The defaults of the reference's main_dino.py.
_PAPER = {
    "batch_size": 512,
    "epochs": 100,
    "model__arch": "vit_small",
    "model__patch_size": 16,
    "head__out_dim": 65536,
    "head__hidden_dim": 2048,
    "head__bottleneck_dim": 256,
    "method__momentum": 0.996,
    "method__teacher_temp_start": 0.04,
    "method__teacher_temp": 0.04,
    "method__teacher_temp_epochs": 0,
    "views__global_size": 224,
    "views__local_size": 96,
    "views__global_scale": (0.4, 1.0),
    "views__local_scale": (0.05, 0.4),
    "optim__lr": 5e-4,
    "optim__warmup_epochs": 10,
}

_BOOSTED = _PAPER | {
    "epochs": 300,
    "batch_size": 1024,
    "head__norm_last_layer": False,
    "method__teacher_temp": 0.07,
    "method__teacher_temp_epochs": 30,
}

# As quoted in public from the argument files beside the released weights.
_SMALL_16 = _BOOSTED | {
    "epochs": 800,
    "views__num_local": 10,
    "views__global_scale": (0.25, 1.0),
    "views__local_scale": (0.05, 0.25),
    "optim__min_lr": 1e-5,
    "optim__clip_grad": 0.0,
}
_SMALL_8 = _BOOSTED | {"epochs": 800, "model__patch_size": 8, "views__num_local": 10}
_BASE_16 = _SMALL_16 | {
    "epochs": 400,
    "model__arch": "vit_base",
    "head__norm_last_layer": True,
    "method__teacher_temp_epochs": 50,
    "optim__lr": 7.5e-4,
    "optim__min_lr": 2e-6,
    "optim__clip_grad": 0.3,
    "optim__freeze_last_layer": 3,
}
_BASE_8 = _BASE_16 | {
    "epochs": 300,
    "batch_size": 1056,
    "model__patch_size": 8,
    "method__teacher_temp_start": 0.03,
    "optim__lr": 5e-4,
    "optim__clip_grad": 3.0,
}

_RESNET_50 = _PAPER | {
    "model__arch": "timm:resnet50",
    "model__patch_size": None,
    "model__drop_path": 0.0,
    "views__global_scale": (0.14, 1.0),
    "views__local_scale": (0.05, 0.14),
}
_RESNET_50_SGD = _RESNET_50 | {
    "optim__name": "sgd",
    "optim__lr": 0.03,
    "optim__weight_decay": 1e-4,
    "optim__weight_decay_end": 1e-4,
}
_RESNET_50_LARS = _RESNET_50 | {
    "epochs": 800,
    "batch_size": 4080,
    "head__out_dim": 60000,
    "head__batch_norm": True,
    "method__teacher_temp": 0.07,
    "method__teacher_temp_epochs": 50,
    "views__num_local": 6,
    "optim__name": "lars",
    "optim__lr": 0.3,
    "optim__min_lr": 0.0048,
    "optim__weight_decay": 1e-6,
    "optim__weight_decay_end": 1e-6,
    "optim__clip_grad": 0.0,
}

# What the paper compares DINO with, as changes to it (Tables 2, 7, 14 and 15).
NO_MOMENTUM: dict[str, Any] = {"method.teacher": "student", "method.momentum": None}
BYOL: dict[str, Any] = {
    "method.loss": "mse",
    "method.targets": "none",
    "head.prototypes": False,
    "head.predictor": True,
    "head.batch_norm": True,
}
MOCO: dict[str, Any] = {
    "method.loss": "infonce",
    "method.targets": "none",
    "method.student_temp": 0.2,
    "head.prototypes": False,
}
SWAV: dict[str, Any] = NO_MOMENTUM | {"method.targets": "sinkhorn"}


# What little data needs (docs/experiments.md): crops that agree, a sharp teacher that moves, small batches, many steps.
_SMALL = {
    "batch_size": 32,
    "model__arch": "vit_nano",
    "model__drop_path": 0.0,
    "head__hidden_dim": 512,
    "head__bottleneck_dim": 128,
    "method__momentum": 0.99,
    "method__teacher_temp_start": 0.03,
    "method__teacher_temp": 0.03,
    "method__teacher_temp_epochs": 0,
    "views__num_local": 2,
    "views__blur_prob": (0.0, 0.0, 0.0),
    "views__solarize_prob": (0.0, 0.0, 0.0),
    "optim__lr": 8e-3,
}


def _reference(
    name: str, about: str, hardware: str, figures: str, options: dict[str, Any], nodes: int = 1, data: str = "imagenet"
) -> Recipe:
    ranks = f"--nnodes {nodes} --nproc-per-node 8" if nodes > 1 else "--nproc-per-node 8"
    command = f"torchrun {ranks} -m dino train {name} --data {data}/train"
    return Recipe(about, command, f"{hardware} (reference)", f"{figures} (reference)", _options(**options))


def _compared(name: str, about: str, figures: str, changes: dict[str, Any], local: int) -> Recipe:
    """Another method on the paper's ViT-S/16 and its schedule of 300 epochs."""
    recipe = _reference(
        name, about, "16 GPUs", f"ImageNet {figures}", _BOOSTED | {"views__num_local": local, "epochs": 300}, 2
    )
    return recipe._replace(options=replace(recipe.options, changes))


def _xcit(name: str, options: dict[str, Any], figures: str) -> Recipe:
    """No public quotation of the released XCiTs' argument files was found; the ViT of like size and patch stands in."""
    patch = name[-1] if name.endswith("p8") else "16"
    like = f"ViT-{'S' if 'small' in name else 'B'}/{patch}"
    options = options | {"model__arch": f"timm:{name}_224", "model__patch_size": None}
    return _reference(
        name,
        f"The released {name}. Unverified: these are the settings of the released {like}.",
        "GPUs and time unknown",
        figures,
        options,
        nodes=4,
    )


RECIPES: dict[str, Recipe] = {
    "demo": Recipe(
        about="Built-in drawn scenes: learns to tell things apart from nothing, in minutes.",
        command="dino train",
        hardware="4 CPU cores, 4 minutes",
        expected="20-NN 10 -> 26 % (raw pixels 19 %), attention overlap 24 -> 54 %",
        options=_options(
            data__path="scenes:4000",
            epochs=7,
            **_SMALL
            | {
                "model__patch_size": 6,
                # The teacher is slow and decay strong so that heads keep looking at whole things.
                "method__momentum": 0.997,
                "optim__weight_decay": 1.0,
                "optim__weight_decay_end": 1.0,
                "head__out_dim": 512,
                "model__num_heads": 6,
                "views__global_size": 48,
                "views__local_size": 24,
                "views__global_scale": (0.6, 1.0),
                "views__local_scale": (0.3, 0.9),
                "views__brightness": 0.2,
                "views__contrast": 0.2,
                "views__hue": 0.5,
                "views__gray_prob": 0.5,
            },
        ),
    ),
    "cifar10": Recipe(
        about="32-pixel images (CIFAR-10): patch 4, views of 32 and 16 pixels.",
        command="dino train cifar10 --data cifar10/train",
        hardware="1 CPU core, half an hour for 5,000 images and 16 epochs",
        expected="5,000 images, 16 epochs: 20-NN 26 -> 29 % (raw pixels 37 %); the whole set on a GPU is still to be run",
        options=_options(
            epochs=100,
            **_SMALL
            | {
                "model__patch_size": 4,
                "head__out_dim": 1024,
                "views__global_size": 32,
                "views__local_size": 16,
                "views__global_scale": (0.5, 1.0),
                "views__local_scale": (0.3, 0.9),
            },
        ),
    ),
    "resnet18_cifar10": Recipe(
        about="ResNet-18 with a 3x3 stem on the 50,000 images of CIFAR-10: two views of 32 pixels, no local ones.",
        command=(
            "dino train resnet18_cifar10 --data cifar10/train --data.val cifar10/test --out runs/resnet18 && "
            "dino eval knn runs/resnet18 --data cifar10/train --val cifar10/test --k 200 --temp 0.1"
        ),
        hardware="1 GPU, a few hours",
        expected="200-NN above 84.0 %, what Lightly publishes for DINO at 200 epochs; still to be run",
        # Close to what Lightly reports for its benchmark: two-layer head with BatchNorm, K 2048, SGD 0.06 at batch 128.
        options=_options(
            epochs=200,
            batch_size=128,
            model__arch="timm:resnet18",
            model__stem="small",
            model__drop_path=0.0,
            head__out_dim=2048,
            head__hidden_dim=2048,
            head__bottleneck_dim=256,
            head__num_layers=2,
            head__batch_norm=True,
            method__momentum=0.99,
            method__teacher_temp_start=0.04,
            method__teacher_temp=0.04,
            method__teacher_temp_epochs=0,
            views__global_size=32,
            views__local_size=16,
            views__num_local=0,
            views__global_scale=(0.4, 1.0),
            views__blur_prob=(0.0, 0.0, 0.0),
            optim__name="sgd",
            optim__lr=0.12,
            optim__warmup_epochs=10,
            optim__weight_decay=5e-4,
            optim__weight_decay_end=5e-4,
            optim__clip_grad=0.0,
        ),
    ),
    "vit_small_100ep": _reference(
        "vit_small_100ep",
        "The reference's vanilla recipe: ViT-S/16, 100 epochs of ImageNet, 8 local views.",
        "8 V100 GPUs, 1.75 days",
        "ImageNet k-NN 69.3 %, linear 74.0 %",
        _PAPER,
    ),
    "vit_small_300ep": _reference(
        "vit_small_300ep",
        "The reference's boosted recipe: ViT-S/16, 300 epochs, warmer teacher, trained prototype gains.",
        "16 V100 GPUs, 2.6 days",
        "ImageNet k-NN 73.3 %, linear 76.0 %",
        _BOOSTED,
        nodes=2,
    ),
    "byol_vit_small": _compared(
        "byol_vit_small", "BYOL as the paper compares it (Table 7).", "k-NN 66.6 %, linear 71.4 %", BYOL, 0
    ),
    "mocov2_vit_small": _compared(
        "mocov2_vit_small", "MoCo-v2 as the paper compares it (Table 7).", "k-NN 62.0 %, linear 71.6 %", MOCO, 0
    ),
    "swav_vit_small": _compared(
        "swav_vit_small", "SwAV as the paper compares it (Table 7).", "k-NN 64.7 %, linear 71.8 %", SWAV, 10
    ),
    "vit_small_800ep": _reference(
        "vit_small_800ep",
        "The released ViT-S/16: 800 epochs, 10 local views, no clipping.",
        "16 GPUs",
        "ImageNet k-NN 74.5 %, linear 77.0 %",
        _SMALL_16,
        nodes=2,
    ),
    "vit_small_p8": _reference(
        "vit_small_p8",
        "The released ViT-S/8: 800 epochs, 10 local views. Unverified: the batch of 1024, which is the paper's.",
        "GPUs of 16 images each",
        "ImageNet k-NN 78.3 %, linear 79.7 %",
        _SMALL_8,
        nodes=8,
    ),
    "vit_base_p16": _reference(
        "vit_base_p16",
        "The released ViT-B/16: 400 epochs, tight clipping, prototypes frozen for 3 epochs.",
        "32 GPUs",
        "ImageNet k-NN 76.1 %, linear 78.2 %",
        _BASE_16,
        nodes=4,
    ),
    "vit_base_p8": _reference(
        "vit_base_p8",
        "The released ViT-B/8: 300 epochs.",
        "176 GPUs of 6 images each",
        "ImageNet k-NN 77.4 %, linear 80.1 %",
        _BASE_8,
        nodes=22,
    ),
    "resnet50": _reference(
        "resnet50",
        "The reference's recipe for ConvNets: ResNet-50, SGD, synchronized BatchNorm, 100 epochs.",
        "8 GPUs",
        "ImageNet, 300 epochs: k-NN 65.6 %, linear 74.5 %; for 100 epochs nothing is published",
        _RESNET_50_SGD,
    ),
    "resnet50_800ep": _reference(
        "resnet50_800ep",
        "The released ResNet-50: LARS, 800 epochs, batches of 4080, BatchNorm in the head, 60,000 prototypes.",
        "80 GPUs of 51 images each",
        "ImageNet k-NN 67.5 %, linear 75.3 %",
        _RESNET_50_LARS,
        nodes=10,
    ),
    "xcit_small_12_p16": _xcit("xcit_small_12_p16", _SMALL_16, "ImageNet k-NN 76.0 %, linear 77.8 %"),
    "xcit_small_12_p8": _xcit("xcit_small_12_p8", _SMALL_8, "ImageNet k-NN 77.1 %, linear 79.2 %"),
    "xcit_medium_24_p16": _xcit("xcit_medium_24_p16", _BASE_16, "ImageNet k-NN 76.4 %, linear 78.8 %"),
    "xcit_medium_24_p8": _xcit(
        "xcit_medium_24_p8", _BASE_8 | {"batch_size": 1024}, "ImageNet k-NN 77.9 %, linear 80.3 %"
    ),
    "vit_small_gldv2": _reference(
        "vit_small_gldv2",
        "ViT-S/16 on Google Landmarks v2 with the boosted recipe, as its author says. Unverified: 300 epochs.",
        "GPUs and time unknown",
        "mAP medium/hard: rOxford 51.5/24.3, rParis 75.3/51.6; no k-NN or linear figure is published",
        _BOOSTED,
        nodes=2,
        data="gldv2",
    ),
}


def find_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise errors.unknown("recipe", name, RECIPES)
    return RECIPES[name]
