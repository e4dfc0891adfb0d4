"""Named complete configurations. Each says its command, hardware, time and expected figure; a test builds all of them.

The reference trained in fp16 or fp32; here `precision` stays "auto" (bf16 on a GPU that has it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dino import errors
from dino.options import flatten_names, replace
from dino.options.toml import read_recorded, read_toml
from dino.options.train import HeadOptions, MethodOptions, ModelOptions, OptimOptions, TrainOptions, ViewOptions


class Recipe(NamedTuple):
    about: str
    command: str
    hardware: str
    expected: str
    options: TrainOptions


def _change(options: TrainOptions, **changes: Any) -> TrainOptions:
    """A copy with other values; a dictionary holds those of a section."""
    return replace(options, flatten_names(changes))


# The defaults of the reference's main_dino.py.
_PAPER = TrainOptions(
    batch_size=512,
    epochs=100,
    model=ModelOptions(arch="vit_small", patch_size=16),
    head=HeadOptions(out_dim=65536, hidden_dim=2048, bottleneck_dim=256),
    method=MethodOptions(momentum=0.996, teacher_temp_start=0.04, teacher_temp=0.04, teacher_temp_epochs=0),
    views=ViewOptions(global_size=224, local_size=96, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4)),
    optim=OptimOptions(lr=5e-4, warmup_epochs=10),
)
_BOOSTED = _change(
    _PAPER,
    epochs=300,
    batch_size=1024,
    head={"norm_last_layer": False},
    method={"teacher_temp": 0.07, "teacher_temp_epochs": 30},
)

# As quoted in public from the argument files beside the released weights.
_SMALL_16 = _change(
    _BOOSTED,
    epochs=800,
    views={"num_local": 10, "global_scale": (0.25, 1.0), "local_scale": (0.05, 0.25)},
    optim={"min_lr": 1e-5, "clip_grad": 0.0},
)
_SMALL_8 = _change(_BOOSTED, epochs=800, model={"patch_size": 8}, views={"num_local": 10})
_BASE_16 = _change(
    _SMALL_16,
    epochs=400,
    model={"arch": "vit_base"},
    head={"norm_last_layer": True},
    method={"teacher_temp_epochs": 50},
    optim={"lr": 7.5e-4, "min_lr": 2e-6, "clip_grad": 0.3, "freeze_last_layer": 3},
)
_BASE_8 = _change(
    _BASE_16,
    epochs=300,
    batch_size=1056,
    model={"patch_size": 8},
    method={"teacher_temp_start": 0.03},
    optim={"lr": 5e-4, "clip_grad": 3.0},
)

_RESNET_50 = _change(
    _PAPER,
    model={"arch": "timm:resnet50", "patch_size": None, "drop_path": 0.0},
    views={"global_scale": (0.14, 1.0), "local_scale": (0.05, 0.14)},
)
_RESNET_50_SGD = _change(_RESNET_50, optim={"name": "sgd", "lr": 0.03, "weight_decay": 1e-4, "weight_decay_end": 1e-4})
_RESNET_50_LARS = _change(
    _RESNET_50,
    epochs=800,
    batch_size=4080,
    head={"out_dim": 60000, "batch_norm": True},
    method={"teacher_temp": 0.07, "teacher_temp_epochs": 50},
    views={"num_local": 6},
    optim={
        "name": "lars",
        "lr": 0.3,
        "min_lr": 0.0048,
        "weight_decay": 1e-6,
        "weight_decay_end": 1e-6,
        "clip_grad": 0.0,
    },
)

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
_LITTLE_DATA = TrainOptions(
    batch_size=32,
    model=ModelOptions(arch="vit_nano", drop_path=0.0),
    head=HeadOptions(hidden_dim=512, bottleneck_dim=128),
    method=MethodOptions(momentum=0.99, teacher_temp_start=0.03, teacher_temp=0.03, teacher_temp_epochs=0),
    views=ViewOptions(num_local=2, blur_prob=(0.0, 0.0, 0.0), solarize_prob=(0.0, 0.0, 0.0)),
    optim=OptimOptions(lr=8e-3),
)


def _describe_reference(
    name: str, options: TrainOptions, figures: str, hardware: str, about: str, nodes: int = 1, data: str = "imagenet"
) -> Recipe:
    ranks = f"--nnodes {nodes} --nproc-per-node 8" if nodes > 1 else "--nproc-per-node 8"
    command = f"torchrun {ranks} -m dino train {name} --data {data}/train"
    return Recipe(about, command, f"{hardware} (reference)", f"{figures} (reference)", options)


def _describe_compared(name: str, method: str, figures: str, changes: dict[str, Any], num_local: int) -> Recipe:
    """Another method on the paper's ViT-S/16 and its schedule of 300 epochs."""
    options = replace(_change(_BOOSTED, views={"num_local": num_local}), changes)
    about = f"{method} as the paper compares it (Table 7)."
    return _describe_reference(name, options, f"ImageNet {figures}", "16 GPUs", about, nodes=2)


def _describe_xcit(name: str, options: TrainOptions, figures: str) -> Recipe:
    """No public quotation of the argument files of the released XCiTs was found; the ViT of like size stands in."""
    patch = name[-1] if name.endswith("p8") else "16"
    like = f"ViT-{'S' if 'small' in name else 'B'}/{patch}"
    options = _change(options, model={"arch": f"timm:{name}_224", "patch_size": None})
    about = f"The released {name}. Unverified: these are the settings of the released {like}."
    return _describe_reference(name, options, f"ImageNet {figures}", "GPUs and time unknown", about, nodes=4)


RECIPES: dict[str, Recipe] = {
    "demo": Recipe(
        about="Built-in drawn scenes: learns to tell things apart from nothing, in minutes.",
        command="dino train",
        hardware="4 CPU cores, 4 minutes",
        expected="20-NN 10 -> 26 % (raw pixels 19 %), attention overlap 24 -> 54 %",
        options=_change(
            _LITTLE_DATA,
            epochs=7,
            data={"path": "scenes:4000"},
            model={"patch_size": 6, "num_heads": 6},
            head={"out_dim": 512},
            # The teacher is slow and decay strong so that heads keep looking at whole things.
            method={"momentum": 0.997},
            optim={"weight_decay": 1.0, "weight_decay_end": 1.0},
            views={
                "global_size": 48,
                "local_size": 24,
                "global_scale": (0.6, 1.0),
                "local_scale": (0.3, 0.9),
                "brightness": 0.2,
                "contrast": 0.2,
                "hue": 0.5,
                "gray_prob": 0.5,
            },
        ),
    ),
    "cifar10": Recipe(
        about="32-pixel images (CIFAR-10): patch 4, views of 32 and 16 pixels.",
        command="dino train cifar10 --data cifar10/train",
        hardware="1 CPU core, half an hour for 5,000 images and 16 epochs",
        expected="5,000 images, 16 epochs: 20-NN 26 -> 29 % (raw pixels 37 %); the whole set on a GPU is still to be run",
        options=_change(
            _LITTLE_DATA,
            epochs=100,
            model={"patch_size": 4},
            head={"out_dim": 1024},
            views={"global_size": 32, "local_size": 16, "global_scale": (0.5, 1.0), "local_scale": (0.3, 0.9)},
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
        options=TrainOptions(
            epochs=200,
            batch_size=128,
            model=ModelOptions(arch="timm:resnet18", stem="small", drop_path=0.0),
            head=HeadOptions(out_dim=2048, hidden_dim=2048, bottleneck_dim=256, num_layers=2, batch_norm=True),
            method=MethodOptions(momentum=0.99, teacher_temp_start=0.04, teacher_temp=0.04, teacher_temp_epochs=0),
            views=ViewOptions(
                global_size=32, local_size=16, num_local=0, global_scale=(0.4, 1.0), blur_prob=(0.0, 0.0, 0.0)
            ),
            optim=OptimOptions(
                name="sgd", lr=0.12, warmup_epochs=10, weight_decay=5e-4, weight_decay_end=5e-4, clip_grad=0.0
            ),
        ),
    ),
    "vit_small_100ep": _describe_reference(
        "vit_small_100ep",
        _PAPER,
        "ImageNet k-NN 69.3 %, linear 74.0 %",
        "8 V100 GPUs, 1.75 days",
        "The reference's vanilla recipe: ViT-S/16, 100 epochs of ImageNet, 8 local views.",
    ),
    "vit_small_300ep": _describe_reference(
        "vit_small_300ep",
        _BOOSTED,
        "ImageNet k-NN 73.3 %, linear 76.0 %",
        "16 V100 GPUs, 2.6 days",
        "The reference's boosted recipe: ViT-S/16, 300 epochs, warmer teacher, trained prototype gains.",
        nodes=2,
    ),
    "byol_vit_small": _describe_compared("byol_vit_small", "BYOL", "k-NN 66.6 %, linear 71.4 %", BYOL, 0),
    "mocov2_vit_small": _describe_compared("mocov2_vit_small", "MoCo-v2", "k-NN 62.0 %, linear 71.6 %", MOCO, 0),
    "swav_vit_small": _describe_compared("swav_vit_small", "SwAV", "k-NN 64.7 %, linear 71.8 %", SWAV, 10),
    "vit_small_800ep": _describe_reference(
        "vit_small_800ep",
        _SMALL_16,
        "ImageNet k-NN 74.5 %, linear 77.0 %",
        "16 GPUs",
        "The released ViT-S/16: 800 epochs, 10 local views, no clipping.",
        nodes=2,
    ),
    "vit_small_p8": _describe_reference(
        "vit_small_p8",
        _SMALL_8,
        "ImageNet k-NN 78.3 %, linear 79.7 %",
        "GPUs of 16 images each",
        "The released ViT-S/8: 800 epochs, 10 local views. Unverified: the batch of 1024, which is the paper's.",
        nodes=8,
    ),
    "vit_base_p16": _describe_reference(
        "vit_base_p16",
        _BASE_16,
        "ImageNet k-NN 76.1 %, linear 78.2 %",
        "32 GPUs",
        "The released ViT-B/16: 400 epochs, tight clipping, prototypes frozen for 3 epochs.",
        nodes=4,
    ),
    "vit_base_p8": _describe_reference(
        "vit_base_p8",
        _BASE_8,
        "ImageNet k-NN 77.4 %, linear 80.1 %",
        "176 GPUs of 6 images each",
        "The released ViT-B/8: 300 epochs.",
        nodes=22,
    ),
    "resnet50": _describe_reference(
        "resnet50",
        _RESNET_50_SGD,
        "ImageNet, 300 epochs: k-NN 65.6 %, linear 74.5 %; for 100 epochs nothing is published",
        "8 GPUs",
        "The reference's recipe for ConvNets: ResNet-50, SGD, synchronized BatchNorm, 100 epochs.",
    ),
    "resnet50_800ep": _describe_reference(
        "resnet50_800ep",
        _RESNET_50_LARS,
        "ImageNet k-NN 67.5 %, linear 75.3 %",
        "80 GPUs of 51 images each",
        "The released ResNet-50: LARS, 800 epochs, batches of 4080, BatchNorm in the head, 60,000 prototypes.",
        nodes=10,
    ),
    "xcit_small_12_p16": _describe_xcit("xcit_small_12_p16", _SMALL_16, "k-NN 76.0 %, linear 77.8 %"),
    "xcit_small_12_p8": _describe_xcit("xcit_small_12_p8", _SMALL_8, "k-NN 77.1 %, linear 79.2 %"),
    "xcit_medium_24_p16": _describe_xcit("xcit_medium_24_p16", _BASE_16, "k-NN 76.4 %, linear 78.8 %"),
    "xcit_medium_24_p8": _describe_xcit(
        "xcit_medium_24_p8", _change(_BASE_8, batch_size=1024), "k-NN 77.9 %, linear 80.3 %"
    ),
    "vit_small_gldv2": _describe_reference(
        "vit_small_gldv2",
        _BOOSTED,
        "mAP medium/hard: rOxford 51.5/24.3, rParis 75.3/51.6; no k-NN or linear figure is published",
        "GPUs and time unknown",
        "ViT-S/16 on Google Landmarks v2 with the boosted recipe, as its author says. Unverified: 300 epochs.",
        nodes=2,
        data="gldv2",
    ),
}


def find_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise errors.unknown("recipe", name, RECIPES)
    return RECIPES[name]


def choose_base(recipe: str | None, has_data: bool = True, resume: str | None = None) -> TrainOptions:
    """The options that flags or keywords change: a recipe's, a TOML file's, or those of the run to resume.

    Without any of them it is the demo, or, where the data is given, options that are chosen for it.

    Raises:
        ValueError: there is no such recipe, file or run, or both a recipe and a run are given.
    """
    if resume is not None:
        if recipe is not None:
            raise ValueError(f"--resume continues a run with its own options; leave '{recipe}' out.")
        return read_recorded(resume)
    if recipe is None:
        return TrainOptions() if has_data else find_recipe("demo").options
    if recipe.endswith(".toml"):
        return read_toml(Path(recipe))
    if recipe not in RECIPES and Path(recipe).exists():
        raise ValueError(f"'{recipe}' is not a recipe; to train on it write: dino train --data {recipe}")
    return find_recipe(recipe).options
