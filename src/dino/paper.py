"""Every published figure, once: what the paper and the reference's README report of their models, and the ablations.

`FIGURES` is what `dino eval` prints beside its own figures. `TABLES` are the ablations (k-NN and linear accuracy on
ImageNet, percent) as rows of option changes, which `dino ablate` runs. A row says what differs from its table's base
recipe; `tiny` replaces these changes where the paper's number makes no sense on small images.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from dino import errors
from dino.options.recipes import BYOL, MOCO, NO_MOMENTUM, SWAV

# Top-1 accuracy on ImageNet of k-NN (k = 20) and of linear classification: table 2 and the reference's README.
_IMAGENET = {
    "vit_small/16": (74.5, 77.0),
    "vit_small/8": (78.3, 79.7),
    "vit_base/16": (76.1, 78.2),
    "vit_base/8": (77.4, 80.1),
    "resnet50": (67.5, 75.3),
    "xcit_small_12_p16_224": (76.0, 77.8),
    "xcit_small_12_p8_224": (77.1, 79.2),
    "xcit_medium_24_p16_224": (76.4, 78.8),
    "xcit_medium_24_p8_224": (77.9, 80.3),
}


def _name(names: str, *values: float) -> dict[str, float]:
    return dict(zip(names.split(), values, strict=True))


# Table 10: 1, 10 and 100 % of the labels.
_LOWSHOT = " ".join(f"{what}_{share}%_top1" for share in (1, 10, 100) for what in ("knn", "logistic"))
_LANDMARKS = "roxford5k_medium_map roxford5k_hard_map rparis6k_medium_map rparis6k_hard_map"
_TRANSFER = "cifar10_top1 cifar100_top1 inat18_top1 inat19_top1 flowers_top1 cars_top1 imagenet_top1"
_DAVIS = "davis2017_jf_mean davis2017_j_mean davis2017_f_mean"

# Evaluation -> model, as `Backbone.name` has it -> figure, as the evaluation calls it -> percent.
FIGURES: dict[str, dict[str, dict[str, float]]] = {
    "knn": {model: {"knn20_top1": knn} for model, (knn, _) in _IMAGENET.items()},
    "linear": {model: {"linear_top1": linear} for model, (_, linear) in _IMAGENET.items()},
    "lowshot": {"vit_small/16": _name(_LOWSHOT, 61.3, 64.5, 69.1, 72.2, 74.5, 75.7)},
    "finetune": {  # table 6
        "vit_small/16": _name(_TRANSFER, 99.0, 90.5, 72.0, 78.2, 98.5, 93.0, 81.5),
        "vit_base/16": _name(_TRANSFER, 99.1, 91.7, 72.6, 78.6, 98.8, 93.0, 82.8),
    },
    "retrieval": {  # table 3
        "vit_small/16": _name(_LANDMARKS, 41.8, 13.7, 63.1, 34.4),
        "vit_small/16 of Google Landmarks v2": _name(_LANDMARKS, 51.5, 24.3, 75.3, 51.6),
        "resnet50": _name(_LANDMARKS, 35.4, 11.1, 55.9, 27.5),
    },
    # Table 4, with 10,000 distractors; ViT-B/16 at 224 pixels.
    "copydetect": {"vit_base/16": {"strong_map": 81.7}, "vit_base/8": {"strong_map": 85.5}},
    "masks": {"vit_small/16": {"voc_jaccard_best_head": 45.9}},  # figure 4: PASCAL VOC 2012
    "davis": {  # table 5: DAVIS-2017, 30 validation videos with 61 objects
        "vit_small/16": _name(_DAVIS, 61.8, 60.2, 63.4),
        "vit_base/16": _name(_DAVIS, 62.3, 60.7, 63.9),
        "vit_small/8": _name(_DAVIS, 69.9, 66.6, 73.1),
        "vit_base/8": _name(_DAVIS, 71.4, 67.9, 74.9),
    },
}

# --- ablations ------------------------------------------------------------------------------------------------------

Changes = Mapping[str, Any]


class Row(NamedTuple):
    name: str
    changes: Changes
    knn: float | None = None
    linear: float | None = None
    tiny: Changes | None = None  # in place of `changes` at tiny scale; None: the same


class Table(NamedTuple):
    title: str
    rows: list[Row]
    recipe: str = "vit_small_300ep"  # what paper scale starts from
    base: Changes = MappingProxyType({})  # changes to it, or to the tiny recipe, for all rows
    paper_base: Changes = MappingProxyType({})  # and at paper scale only


# Mini-runs on small images; --recipe and --epochs replace them.
TINY_RECIPE, TINY_EPOCHS = "cifar10", 8

_TINY_QUEUE = {"method.queue_size": 2048}
# One pass of normalization over a batch of 32 lets a student that is its own teacher drift at the tiny recipe's rate.
_BATCH = NO_MOMENTUM | {"method.targets": "softmax-batch"}
_SINGLE = {"views.num_local": 0}
_TEN_CROPS = {"views.num_local": 10}


def _split(s: float, knn: float) -> Row:
    """Local crops cover up to share s of the image, global ones from s on."""
    return Row(f"s = {s:g}", {"views.local_scale": (0.05, s), "views.global_scale": (s, 1.0)}, knn)


def _head(layers: int, bottleneck: bool, knn: float) -> Row:
    name = f"{layers} linear layers, {'with' if bottleneck else 'no'} bottleneck"
    return Row(name, {"head.num_layers": layers - 1, "head.bottleneck": bottleneck}, knn)


TABLES: dict[str, Table] = {
    "7": Table(
        "Components of DINO, and other methods (Table 7)",
        [
            Row("DINO", {}, 72.8, 76.1),
            Row("no momentum", NO_MOMENTUM, 0.1, 0.1),
            Row("Sinkhorn-Knopp", {"method.targets": "sinkhorn"}, 72.2, 76.0),
            Row("no multi-crop", _SINGLE, 67.9, 72.5),
            Row("MSE", {"method.loss": "mse"}, 52.6, 62.4),
            Row("predictor", {"head.predictor": True}, 71.8, 75.6),
            Row("BYOL", BYOL | _SINGLE, 66.6, 71.4),
            Row("MoCo-v2", MOCO | _SINGLE, 62.0, 71.6, MOCO | _SINGLE | _TINY_QUEUE),
            Row("SwAV", SWAV, 64.7, 71.8),
        ],
        paper_base=_TEN_CROPS,
    ),
    "14": Table(
        "Momentum teacher and what is done to its outputs (Table 14)",
        [
            Row("momentum, centering", {}, None, 76.1),
            Row("momentum, softmax over the batch", {"method.targets": "softmax-batch"}, None, 75.8),
            Row("momentum, Sinkhorn-Knopp", {"method.targets": "sinkhorn"}, None, 76.0),
            Row("no momentum, centering", NO_MOMENTUM, None, 0.1),
            Row("no momentum, softmax over the batch", _BATCH, None, 72.2, _BATCH | {"optim.lr": 2e-3}),
            Row("no momentum, Sinkhorn-Knopp", SWAV, None, 71.8),
        ],
        paper_base=_TEN_CROPS,
    ),
    "15": Table(
        "From BYOL and MoCo-v2 to DINO (Table 15)",
        [
            Row("BYOL", BYOL | _SINGLE, None, 71.4),
            Row("BYOL, no predictor", BYOL | _SINGLE | {"head.predictor": False}, None, 0.1),
            Row("BYOL, multi-crop", BYOL, None, 64.8),
            Row("MSE with centering, no multi-crop", {"method.loss": "mse"} | _SINGLE, None, 52.6),
            Row("MoCo-v2", MOCO | _SINGLE, None, 71.6, MOCO | _SINGLE | _TINY_QUEUE),
            Row("MoCo-v2, multi-crop", MOCO, None, 73.4, MOCO | _TINY_QUEUE),
            Row("DINO", {}, None, 76.1),
        ],
        paper_base=_TEN_CROPS,
    ),
    "teacher": Table(
        "What the teacher is (Fig. 6)",
        [
            Row("student copy", NO_MOMENTUM, 0.1),
            Row("previous iteration", {"method.teacher": "previous-iteration", "method.momentum": None}, 0.1),
            Row("previous epoch", {"method.teacher": "previous-epoch", "method.momentum": None}, 66.6),
            Row("momentum", {}, 72.8),
        ],
        paper_base=_TEN_CROPS,
    ),
    "collapse": Table(
        "Centering and sharpening against collapse (Fig. 7, which gives curves)",
        [
            Row("both", {}),
            Row("no centering", {"method.targets": "none"}),
            Row("no sharpening", {"method.teacher_temp": 0.1, "method.teacher_temp_start": 0.1}),
        ],
    ),
    "multi-crop": Table(
        "Number of local crops (Table 8, 300 epochs)",
        [
            Row("2 global", _SINGLE, None, 72.5),
            Row("+ 2 local", {"views.num_local": 2}, None, 74.5),
            Row("+ 6 local", {"views.num_local": 6}, None, 75.9),
            Row("+ 10 local", {"views.num_local": 10}, None, 76.1),
        ],
    ),
    "crops": Table(
        "Where local crops end and global ones begin",
        [_split(0.08, 65.6), _split(0.16, 68.0), _split(0.24, 69.7), _split(0.32, 69.8), _split(0.48, 69.5)],
        "vit_small_100ep",
        {"views.num_local": 6},
    ),
    "prototypes": Table(
        "Number of prototypes K",
        [
            Row(f"{k}", {"head.out_dim": k}, knn, tiny={"head.out_dim": k // 16})
            for k, knn in ((1024, 67.8), (4096, 69.3), (16384, 69.2), (65536, 69.7), (262144, 69.1))
        ],
        "vit_small_100ep",
    ),
    "head": Table(
        "Depth and bottleneck of the head (K = 4096)",
        [
            _head(1, False, 61.6),
            _head(2, True, 62.2),
            _head(2, False, 62.9),
            _head(3, True, 68.0),
            _head(3, False, 0.1),
            _head(4, True, 69.3),
            _head(4, False, 0.1),
        ],
        "vit_small_100ep",
        paper_base={"head.out_dim": 4096},
    ),
    "activation": Table(
        "Batch normalization and activation of the head",
        [
            Row("no BN, GELU", {}, 69.7),
            Row("BN, GELU", {"head.batch_norm": True}, 68.6),
            Row("no BN, ReLU", {"head.activation": "relu"}, 68.9),
        ],
        "vit_small_100ep",
    ),
    "center": Table(
        "Momentum of the center",
        [
            Row(f"{m:g}", {"method.center_momentum": m}, knn)
            for m, knn in ((0, 69.1), (0.9, 69.7), (0.99, 69.4), (0.999, 0.1))
        ],
        "vit_small_100ep",
    ),
    "temperature": Table(
        "Temperature of the teacher",
        [  # the paper's 0, one-hot targets, is 0.001 here
            Row(f"{t:g}", {"method.teacher_temp": t, "method.teacher_temp_start": t}, knn)
            for t, knn in ((1e-3, 43.9), (0.02, 66.7), (0.04, 69.6), (0.06, 68.7), (0.08, 0.1))
        ]
        + [Row("0.04 to 0.07", {"method.teacher_temp": 0.07, "method.teacher_temp_start": 0.04}, 69.7)],
        "vit_small_100ep",
    ),
    "batch": Table(
        "Batch size, no multi-crop",
        [
            Row(f"{b}", {"batch_size": b}, knn, tiny={"batch_size": b // 8})
            for b, knn in ((128, 57.9), (256, 59.1), (512, 59.6), (1024, 59.9))
        ],
        "vit_small_100ep",
        _SINGLE,
    ),
    "heads": Table(
        "Attention heads of ViT-S (300 epochs)",
        [
            Row(f"{h}", {"model.num_heads": h}, knn, tiny={"model.num_heads": t})
            for h, t, knn in ((6, 3, 72.8), (8, 4, 73.1), (12, 6, 73.7), (16, 8, 73.8))
        ],
        paper_base=_TEN_CROPS,
    ),
    "patch": Table(
        "Patch size (Fig. 5, which gives no figures as text)",
        [
            Row(f"{patch}", {"model.patch_size": patch} | views, tiny={"model.patch_size": patch // 2})
            for patch, views in ((16, {}), (8, {}), (5, {"views.global_size": 225, "views.local_size": 95}))
        ],
    ),
}


def find_table(name: str) -> Table:
    """A table by name, with or without the word itself ("7", "table7")."""
    wanted = name.lower().removeprefix("table").strip("-_ ")
    if wanted not in TABLES:
        raise errors.unknown("table", name, TABLES)
    return TABLES[wanted]
