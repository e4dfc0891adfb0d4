"""Every option of a training run: frozen dataclasses, one unit per quantity.

The text under a field is its help on the command line. Durations are epochs here and steps inside the engine;
the batch size is global; the learning rate is given for a batch of 256 and scaled linearly (paper, section 3.2).
``None`` means "chosen for you": `dino.options.auto.resolve` fills it in from the data and the machine and prints what it
chose. A value's rule (`dino.options.rules`) stands with its field, and what excludes each other in `_contradictions`; either
is a ``ValueError`` that names the value and the rule or the fix. `dino.options.toml` writes and reads them as TOML.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from dino.options import flatten, required
from dino.options.rules import (
    AREA,
    BELOW_ONE,
    COUNT,
    MEMORY,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    TURN,
    at_least,
    check,
)

Scale = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    path: Annotated[str, tyro.conf.arg(aliases=["--data"])] = "scenes"
    """Images to learn from: a folder (searched at any depth), a list file (.txt or .csv), 'scenes' (built in), or
    torchvision:NAME:FOLDER."""
    val: str | None = None
    """Held-out images for the monitors: a folder or list. None: the test images that belong to `path`, else a share of the
    training images is set aside."""
    val_fraction: Annotated[float, BELOW_ONE] = 0.1
    """Share of the images set aside when `val` is not given, at most 1000 images. 0: none."""
    labels: str = "auto"
    """Labels for the k-NN monitor: 'auto' or 'folders' (first folder level), 'none', or a CSV file of path,label."""
    max_bad_fraction: Annotated[float, SHARE] = 0.01
    """The run ends when more than this share of the images cannot be read."""
    num_workers: Annotated[int | None, NOT_NEGATIVE] = None
    """Processes that read, decode and render images. 0: the training process itself. None: one per spare core."""
    decode: Literal["workers", "device"] = "workers"
    """Who decodes JPEG files: the workers, or a GPU (needs TorchCodec), for where too few cores feed it."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    arch: str | None = None
    """Backbone: vit_nano, vit_tiny, vit_small, vit_base, vit_large, or timm:NAME. None: chosen for data and device."""
    patch_size: Annotated[int | None, COUNT] = None
    """Edge of a patch of our own ViTs, pixels. None: 16, or 8 for views under 128 pixels, or 4 under 48."""
    width: Annotated[int | None, COUNT] = None
    """Embedding width; None: the architecture's own."""
    depth: Annotated[int | None, COUNT] = None
    """Number of blocks; None: the architecture's own."""
    num_heads: Annotated[int | None, COUNT] = None
    """Attention heads; None: the architecture's own."""
    drop_path: Annotated[float, BELOW_ONE] = 0.1
    """Stochastic depth rate of the last block (linear from 0 at the first), student only."""
    pos_interp: Literal["offset", "size", "antialias"] = "offset"
    """Position interpolation for other sizes: 'offset' as in released weights (+0.1 patch), 'size', or 'antialias'."""
    stem: Literal["default", "small"] = "default"
    """'small' is for ResNets on small images: a 3x3 first convolution of stride 1, no pooling after it."""
    in_channels: Literal[1, 3] = 3
    """Channels the backbone sees: 3 colors, or 1, their luma (after the colors of a view were changed)."""


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    out_dim: Annotated[int | None, COUNT] = None
    """Number of prototypes K. None: chosen from the number of images (paper: 65536)."""
    hidden_dim: Annotated[int | None, COUNT] = None
    """Width of the hidden layers. None: 2048, or 512 for vit_nano."""
    bottleneck_dim: Annotated[int | None, COUNT] = None
    """Width of the L2-normalized bottleneck. None: 256, or 128 for vit_nano."""
    num_layers: Annotated[int, NOT_NEGATIVE] = 3
    """Linear layers before the prototypes, the last of them into the bottleneck (the paper counts one more)."""
    norm_last_layer: bool = True
    """Keep the prototypes at length one (weight norm with a fixed gain). False trains the gain; helps large models."""
    batch_norm: bool = False
    """BatchNorm after each hidden layer."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Activation after each hidden layer."""
    bottleneck: bool = True
    """Reduce to `bottleneck_dim` and L2-normalize before the prototypes."""
    prototypes: bool = True
    """End in prototypes. False ends at the bottleneck, for losses that compare vectors (BYOL, MoCo)."""
    predictor: bool = False
    """One more hidden layer on the student's side only (BYOL)."""


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    teacher: Literal["momentum", "previous-epoch", "previous-iteration", "student"] = "momentum"
    """What the teacher is: a moving average of the student, or the student itself then or now (paper Fig. 6)."""
    momentum: Annotated[float | None, SHARE] = None
    """Teacher momentum at the first step; rises to 1 on a cosine. None: chosen from the batch and run length."""
    loss: Literal["cross-entropy", "mse", "infonce"] = "cross-entropy"
    """Between distributions over prototypes (DINO), normalized vectors (BYOL), or one against negatives (MoCo-v2)."""
    queue_size: Annotated[int, COUNT] = 65536
    """Negatives that infonce remembers."""
    student_temp: Annotated[float, POSITIVE] = 0.1
    """Temperature of the student's softmax, and of infonce's."""
    teacher_temp: Annotated[float | None, POSITIVE] = None
    """Temperature of the teacher's softmax after warm-up; lower is sharper. None: 0.07, 0.04 or 0.03 by run and model."""
    teacher_temp_start: Annotated[float | None, POSITIVE] = None
    """Temperature of the teacher's softmax at the first epoch. None: 0.04, or 0.03 for vit_nano."""
    teacher_temp_epochs: Annotated[float | None, NOT_NEGATIVE] = None
    """Epochs over which the temperature rises from start to end. None: 30, or three tenths of a shorter run."""
    targets: Literal["centering", "softmax-batch", "sinkhorn", "none"] = "centering"
    """What keeps the teacher from one dominating prototype: the moving center of its outputs, softmax over the batch,
    3 iterations of Sinkhorn-Knopp (SwAV), or nothing."""
    center_momentum: Annotated[float, SHARE] = 0.9
    """Momentum of the center (paper Eq. 4)."""


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Multi-crop and augmentation; defaults are the reference's for ImageNet."""

    global_size: Annotated[int | None, COUNT] = None
    """Edge of the 2 global views, pixels. None: 224 on a GPU, 96 on a CPU."""
    local_size: Annotated[int | None, COUNT] = None
    """Edge of the local views, pixels. None: 96 for 224-pixel globals, else about half of the global size."""
    num_local: Annotated[int, NOT_NEGATIVE] = 8
    """Local views per image; 0 switches multi-crop off."""
    global_scale: Annotated[Scale | None, AREA] = None
    """Share of the image area a global crop may cover. None: 0.4 to 1, or 0.5 to 1 for views under 96 pixels."""
    local_scale: Annotated[Scale | None, AREA] = None
    """Share of the image area a local crop may cover. None: 0.05 to 0.4, or 0.3 to 0.9 for views under 96 pixels."""
    flip_prob: Annotated[float, SHARE] = 0.5
    """Probability of a horizontal flip."""
    jitter_prob: Annotated[float, SHARE] = 0.8
    """Probability of color jitter."""
    brightness: Annotated[float, SHARE] = 0.4
    """Brightness factor is drawn from 1 +- this."""
    contrast: Annotated[float, SHARE] = 0.4
    """Contrast factor is drawn from 1 +- this."""
    saturation: Annotated[float, SHARE] = 0.2
    """Saturation factor is drawn from 1 +- this."""
    hue: Annotated[float, TURN] = 0.1
    """Hue shift is drawn from +- this, in turns (0.5 is the opposite color)."""
    gray_prob: Annotated[float, SHARE] = 0.2
    """Probability of dropping color."""
    blur_prob: Annotated[tuple[float, float, float], SHARE] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur: first global, second global, locals."""
    blur_sigma: Annotated[Scale, POSITIVE] = (0.1, 2.0)
    """Blur radius range (standard deviation), pixels of the view."""
    solarize_prob: Annotated[tuple[float, float, float], SHARE] = (0.0, 0.2, 0.0)
    """Probability of inverting pixels of 128 and above: first global, second global, locals."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Edge of each view, pixels: the 2 global views, then the local ones."""
        return (required(self.global_size),) * 2 + (required(self.local_size),) * self.num_local


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """Optimizer of the student."""
    lr: Annotated[float | None, NOT_NEGATIVE] = None
    """Peak learning rate for a batch of 256; scaled by batch_size / 256. None: 5e-4, or 8e-3 for vit_nano."""
    min_lr: Annotated[float, NOT_NEGATIVE] = 1e-6
    """Learning rate at the end of the cosine (not scaled)."""
    warmup_epochs: Annotated[float | None, NOT_NEGATIVE] = None
    """Epochs of linear learning-rate warm-up from 0. None: 10, or a tenth of a shorter run."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.04
    """Weight decay at the first step; not applied to biases and one-dimensional parameters."""
    weight_decay_end: Annotated[float, NOT_NEGATIVE] = 0.4
    """Weight decay at the last step (cosine in between)."""
    clip_grad: Annotated[float, NOT_NEGATIVE] = 3.0
    """Largest norm of each parameter's gradient (clipped one by one). 0: off."""
    freeze_last_layer: Annotated[float, NOT_NEGATIVE] = 1
    """Epochs at the start during which the prototypes are not updated; steadies the start."""


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    every: Annotated[int, at_least(1, "log at least every 1 step")] = 10
    """Steps between log lines; metrics leave the device only then."""
    knn_every: Annotated[float, NOT_NEGATIVE] = 1
    """Epochs between k-NN and feature-health checks. 0: only before and after training."""
    evaluate: tuple[str, ...] = ()
    """Evaluations to make then, each as one word: "knn --data labeled/ --k 20", see `dino eval NAME --help`."""
    checkpoint_minutes: Annotated[float, POSITIVE] = 10
    """Minutes between checkpoints; one is also written after every epoch."""
    keep: Annotated[int, at_least(1, "keep at least 1 checkpoint, or a resume is impossible")] = 2
    """Checkpoints to keep, the newest first."""
    tensorboard: bool = True
    """Also write TensorBoard events."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    out: str | None = None
    """Run directory to write. None: runs/<data name>."""
    resume: str | None = None
    """Run directory to continue; all other options come from its config.toml."""
    init: str | None = None
    """Weights to start from: a run directory, a release ('vits16:full', see `dino models`) or a weight file. None: fresh."""
    overwrite: bool = False
    """Delete what is in the run directory first."""
    epochs: Annotated[int | None, COUNT] = None
    """Passes over the images. None: chosen from the number of images."""
    batch_size: Annotated[int | None, COUNT] = None
    """Images per step, over all processes. None: chosen from the number of images and the device."""
    seed: Annotated[int, SEED] = 0
    """Seed of initial weights, order and views; with the data it determines the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass: 'auto' is bf16 on a GPU that has it, fp32 on a CPU."""
    fit: Annotated[str | None, MEMORY] = None
    """Memory of the device to stay within, e.g. 8GB: chooses `accumulate` and `recompute`. The gradients stay the same."""
    accumulate: Annotated[int, COUNT] = 1
    """Parts that a step's images are computed in, one after the other; the same gradients in less memory."""
    recompute: Literal["nothing", "elementwise", "blocks"] = "nothing"
    """What the backward pass computes again instead of keeping it, with the same gradients. 'elementwise': norms and GELU, a
    quarter less memory for a twelfth more time; 'blocks': all but each block's input, a fifth of the memory for a third."""
    compile: bool = False
    """Compile the networks (torch.compile): minutes at the start, then faster steps, on a GPU above all."""
    threads: Annotated[int | None, COUNT] = None
    """CPU threads for the arithmetic. None: all cores but one, from four cores on."""
    stop_after: Annotated[int | None, COUNT] = None
    """Stop (and save) after this many steps; schedules still span all epochs."""
    report: bool = True
    """Write report.html at the end."""
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    head: HeadOptions = field(default_factory=HeadOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    views: ViewOptions = field(default_factory=ViewOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    log: LogOptions = field(default_factory=LogOptions)

    def __post_init__(self) -> None:
        check(self)
        for message in _contradictions(self):
            raise ValueError(message)


def _contradictions(o: TrainOptions) -> Iterator[str]:
    """Options that exclude each other, each in a sentence."""
    for name in ("global_scale", "local_scale", "blur_sigma"):
        low, high = getattr(o.views, name) or (1, 1)
        if low > high:
            yield f"views.{name} is {low} {high}; give the lower bound first."
    if o.head.bottleneck and o.head.num_layers < 1:
        yield f"head.num_layers is {o.head.num_layers}; use at least 1, the layer into the bottleneck."
    if not o.head.bottleneck and (o.head.predictor or not o.head.prototypes):
        yield "head.bottleneck is False: then the head must end in prototypes and has no place for a predictor."
    if not o.head.prototypes and o.method.loss == "cross-entropy":
        yield "head.prototypes is False but method.loss cross-entropy needs them; use --method.loss mse or infonce."
    if o.method.teacher != "momentum" and o.method.momentum is not None:
        yield (
            f"method.momentum is {o.method.momentum} but method.teacher is {o.method.teacher}, which has none; leave one "
            "out."
        )
    allowed = {"mse": ("centering", "none"), "infonce": ("none",)}.get(o.method.loss)
    if allowed and o.method.targets not in allowed:
        yield (
            f"method.loss {o.method.loss} compares vectors, to which method.targets {o.method.targets} does not apply; "
            f"use {' or '.join(allowed)}."
        )
    if o.device == "cpu" and o.precision == "fp16":
        yield "precision is fp16 with device cpu; fp16 needs a GPU. Use --precision fp32 or bf16."
    if o.epochs is not None:
        for name in ("optim.warmup_epochs", "method.teacher_temp_epochs"):
            if (flatten(o)[name] or 0) > o.epochs:
                yield f"{name} is {flatten(o)[name]} but the run has only {o.epochs} epochs; lower it or train longer."
