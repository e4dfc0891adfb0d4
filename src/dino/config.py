"""Every option of a training run: frozen dataclasses, one unit per quantity.

The text under a field is its help on the command line. Durations are epochs here and steps inside the engine;
the batch size is global; the learning rate is given for a batch of 256 and scaled linearly (paper, section 3.2).
``None`` means "chosen for you": `dino.recipes.resolve` fills it in from the data and the machine and prints what it
chose. Checks that need only the options live in ``__post_init__``; a broken rule is a ``ValueError`` that names the
value, the rule and the fix.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro

Scale = tuple[float, float]


T = TypeVar("T")


def known(value: T | None) -> T:
    """An option that `dino.recipes.resolve` has filled in."""
    assert value is not None
    return value


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _fraction(name: str, value: float) -> None:
    _require(0 <= value <= 1, f"{name} is {value}; a probability or share lies between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    path: Annotated[str, tyro.conf.arg(aliases=["--data"])] = "scenes"
    """Images to learn from: a folder (searched at any depth), a list file (.txt or .csv), or 'scenes' (built in)."""
    val: str | None = None
    """Held-out images for the monitors: a folder or list. None: a share of the training images is set aside."""
    val_fraction: float = 0.1
    """Share of the images set aside when `val` is not given, at most 1000 images. 0: none."""
    labels: str = "auto"
    """Labels for the k-NN monitor: 'auto' or 'folders' (first folder level), 'none', or a CSV file of path,label."""
    max_bad_fraction: float = 0.01
    """The run ends when more than this share of the images cannot be read."""
    num_workers: int | None = None
    """Processes that read, decode and render images. 0: the training process itself. None: one per spare core."""

    def __post_init__(self) -> None:
        _fraction("data.max_bad_fraction", self.max_bad_fraction)
        _require(0 <= self.val_fraction < 1, f"data.val_fraction is {self.val_fraction}; it must be in [0, 1).")
        _require(
            self.num_workers is None or self.num_workers >= 0,
            f"data.num_workers is {self.num_workers}; use 0 (no extra processes) or more.",
        )


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    arch: str | None = None
    """Backbone: vit_nano, vit_tiny, vit_small, vit_base, vit_large, or timm:NAME. None: chosen for data and device."""
    patch_size: int | None = None
    """Edge of a patch of our own ViTs, pixels. None: 16, or 8 for views under 128 pixels, or 4 under 48."""
    width: int | None = None
    """Embedding width; None: the architecture's own."""
    depth: int | None = None
    """Number of blocks; None: the architecture's own."""
    num_heads: int | None = None
    """Attention heads; None: the architecture's own."""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block (linear from 0 at the first), student only."""
    pos_interp: Literal["offset", "size", "antialias"] = "offset"
    """Position interpolation for other sizes: 'offset' as in released weights (+0.1 patch), 'size', or 'antialias'."""
    stem: Literal["default", "small"] = "default"
    """'small' is for ResNets on small images: a 3x3 first convolution of stride 1, no pooling after it."""
    in_channels: Literal[1, 3] = 3
    """Channels the backbone sees: 3 colours, or 1, their luma (after the colours of a view were changed)."""

    def __post_init__(self) -> None:
        _require(0 <= self.drop_path < 1, f"model.drop_path is {self.drop_path}; it must be in [0, 1).")
        for name in ("patch_size", "width", "depth", "num_heads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"model.{name} is {value}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    out_dim: int | None = None
    """Number of prototypes K. None: chosen from the number of images (paper: 65536)."""
    hidden_dim: int | None = None
    """Width of the hidden layers. None: 2048, or 512 for vit_nano."""
    bottleneck_dim: int | None = None
    """Width of the L2-normalised bottleneck. None: 256, or 128 for vit_nano."""
    num_layers: int = 3
    """Linear layers before the prototypes, the last of them into the bottleneck (the paper counts one more)."""
    norm_last_layer: bool = True
    """Keep the prototypes at length one (weight norm with a fixed gain). False trains the gain; helps large models."""
    batch_norm: bool = False
    """BatchNorm after each hidden layer."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Activation after each hidden layer."""
    bottleneck: bool = True
    """Reduce to `bottleneck_dim` and L2-normalise before the prototypes."""
    prototypes: bool = True
    """End in prototypes. False ends at the bottleneck, for losses that compare vectors (BYOL, MoCo)."""
    predictor: bool = False
    """One more hidden layer on the student's side only (BYOL)."""

    def __post_init__(self) -> None:
        for name in ("out_dim", "hidden_dim", "bottleneck_dim"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"head.{name} is {value}; it must be at least 1.")
        least = int(self.bottleneck)
        _require(
            self.num_layers >= least,
            f"head.num_layers is {self.num_layers}; use at least {least}"
            + (", the layer into the bottleneck." if least else "."),
        )
        _require(
            self.bottleneck or (self.prototypes and not self.predictor),
            "head.bottleneck is False: then the head must end in prototypes and has no place for a predictor.",
        )


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    teacher: Literal["momentum", "previous-epoch", "previous-iteration", "student"] = "momentum"
    """What the teacher is: a moving average of the student, or the student itself then or now (paper Fig. 6)."""
    momentum: float | None = None
    """Teacher momentum at the first step; rises to 1 on a cosine. None: chosen from the batch and run length."""
    loss: Literal["cross-entropy", "mse", "infonce"] = "cross-entropy"
    """Between distributions over prototypes (DINO), normalised vectors (BYOL), or one against negatives (MoCo-v2)."""
    queue_size: int = 65536
    """Negatives that infonce remembers."""
    student_temp: float = 0.1
    """Temperature of the student's softmax, and of infonce's."""
    teacher_temp: float | None = None
    """Temperature of the teacher's softmax after warm-up; lower is sharper. None: 0.07, 0.04 or 0.03 by run and model."""
    teacher_temp_start: float | None = None
    """Temperature of the teacher's softmax at the first epoch. None: 0.04, or 0.03 for vit_nano."""
    teacher_temp_epochs: float | None = None
    """Epochs over which the temperature rises from start to end. None: 30, or three tenths of a shorter run."""
    targets: Literal["centring", "softmax-batch", "sinkhorn", "none"] = "centring"
    """What keeps the teacher from one dominating prototype: the moving centre of its outputs, softmax over the batch,
    3 iterations of Sinkhorn-Knopp (SwAV), or nothing."""
    centre_momentum: float = 0.9
    """Momentum of the centre (paper Eq. 4)."""

    def __post_init__(self) -> None:
        for name in ("momentum", "centre_momentum"):
            value = getattr(self, name)
            if value is not None:
                _fraction(f"method.{name}", value)
        for name in ("student_temp", "teacher_temp", "teacher_temp_start"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"method.{name} is {value}; a temperature must be above 0.")
        _require(self.queue_size >= 1, f"method.queue_size is {self.queue_size}; remember at least 1 negative.")
        _require(
            self.teacher == "momentum" or self.momentum is None,
            f"method.momentum is {self.momentum} but method.teacher is {self.teacher}, which has none; leave one out.",
        )
        allowed = {"mse": ("centring", "none"), "infonce": ("none",)}.get(self.loss)
        _require(
            allowed is None or self.targets in allowed,
            f"method.loss {self.loss} compares vectors, to which method.targets {self.targets} does not apply; "
            f"use {' or '.join(allowed or ())}.",
        )


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Multi-crop and augmentation; defaults are the reference's for ImageNet."""

    global_size: int | None = None
    """Edge of the 2 global views, pixels. None: 224 on a GPU, 96 on a CPU."""
    local_size: int | None = None
    """Edge of the local views, pixels. None: 96 for 224-pixel globals, else about half of the global size."""
    num_local: int = 8
    """Local views per image; 0 switches multi-crop off."""
    global_scale: Scale | None = None
    """Share of the image area a global crop may cover. None: 0.4 to 1, or 0.5 to 1 for views under 96 pixels."""
    local_scale: Scale | None = None
    """Share of the image area a local crop may cover. None: 0.05 to 0.4, or 0.3 to 0.9 for views under 96 pixels."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip."""
    jitter_prob: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """Brightness factor is drawn from 1 +- this."""
    contrast: float = 0.4
    """Contrast factor is drawn from 1 +- this."""
    saturation: float = 0.2
    """Saturation factor is drawn from 1 +- this."""
    hue: float = 0.1
    """Hue shift is drawn from +- this, in turns (0.5 is the opposite colour)."""
    grey_prob: float = 0.2
    """Probability of dropping colour."""
    blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur: first global, second global, locals."""
    blur_sigma: Scale = (0.1, 2.0)
    """Blur radius range (standard deviation), pixels of the view."""
    solarise_prob: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """Probability of inverting pixels of 128 and above: first global, second global, locals."""

    def __post_init__(self) -> None:
        _require(self.num_local >= 0, f"views.num_local is {self.num_local}; use 0 (no multi-crop) or more.")
        for name in ("global_size", "local_size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"views.{name} is {value}; a view has at least 1 pixel.")
        for name in ("global_scale", "local_scale", "blur_sigma"):
            low, high = getattr(self, name) or (1, 1)
            _require(0 < low <= high, f"views.{name} is {low} {high}; give a lower and an upper bound above 0.")
        for name in ("global_scale", "local_scale"):
            _require(
                (getattr(self, name) or (1, 1))[1] <= 1,
                f"views.{name} is a share of the image area; it cannot exceed 1.",
            )
        for name in ("flip_prob", "jitter_prob", "grey_prob"):
            _fraction(f"views.{name}", getattr(self, name))
        for name in ("blur_prob", "solarise_prob"):
            for value in getattr(self, name):
                _fraction(f"views.{name}", value)
        for name in ("brightness", "contrast", "saturation"):
            _fraction(f"views.{name}", getattr(self, name))
        _require(0 <= self.hue <= 0.5, f"views.hue is {self.hue}; a hue shift lies in [0, 0.5] turns.")


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """Optimiser of the student."""
    lr: float | None = None
    """Peak learning rate for a batch of 256; scaled by batch_size / 256. None: 5e-4, or 8e-3 for vit_nano."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine (not scaled)."""
    warmup_epochs: float | None = None
    """Epochs of linear learning-rate warm-up from 0. None: 10, or a tenth of a shorter run."""
    weight_decay: float = 0.04
    """Weight decay at the first step; not applied to biases and one-dimensional parameters."""
    weight_decay_end: float = 0.4
    """Weight decay at the last step (cosine in between)."""
    clip_grad: float = 3.0
    """Largest norm of each parameter's gradient (clipped one by one). 0: off."""
    freeze_last_layer: float = 1
    """Epochs at the start during which the prototypes are not updated; steadies the start."""

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "weight_decay", "weight_decay_end", "clip_grad", "freeze_last_layer"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"optim.{name} is {value}; it cannot be negative.")


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    every: int = 10
    """Steps between log lines; metrics leave the device only then."""
    knn_every: float = 1
    """Epochs between k-NN and feature-health checks. 0: only before and after training."""
    evaluate: tuple[str, ...] = ()
    """Evaluations to make then, each as one word: "knn --data labelled/ --k 20", see `dino eval NAME --help`."""
    checkpoint_minutes: float = 10
    """Minutes between checkpoints; one is also written after every epoch."""
    keep: int = 2
    """Checkpoints to keep, the newest first."""
    tensorboard: bool = True
    """Also write TensorBoard events."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"log.every is {self.every}; log at least every 1 step.")
        _require(self.keep >= 1, f"log.keep is {self.keep}; keep at least 1 checkpoint, or a resume is impossible.")
        _require(self.checkpoint_minutes > 0, f"log.checkpoint_minutes is {self.checkpoint_minutes}; must be above 0.")


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
    epochs: int | None = None
    """Passes over the images. None: chosen from the number of images."""
    batch_size: int | None = None
    """Images per step, over all processes. None: chosen from the number of images and the device."""
    seed: int = 0
    """Seed of initial weights, order and views; with the data it determines the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass: 'auto' is bf16 on a GPU that has it, fp32 on a CPU."""
    fit: str | None = None
    """Memory of the device to stay within, e.g. 8GB: chooses `accumulate` and `recompute`. The gradients stay the same."""
    accumulate: int = 1
    """Parts that a step's images are computed in, one after the other; the same gradients in less memory."""
    recompute: bool = False
    """Keep only each block's input for the backward pass: about a third more time, much less memory."""
    compile: bool = False
    """Compile the networks (torch.compile): minutes at the start, then faster steps, on a GPU above all."""
    threads: int | None = None
    """CPU threads for the arithmetic. None: all cores but one, from four cores on."""
    stop_after: int | None = None
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
        _require(0 <= self.seed < 2**32, f"seed is {self.seed}; a seed lies in [0, 2**32).")
        _require(self.epochs is None or self.epochs >= 1, f"epochs is {self.epochs}; train at least 1 epoch.")
        _require(self.batch_size is None or self.batch_size >= 1, f"batch_size is {self.batch_size}; use 1 or more.")
        _require(self.accumulate >= 1, f"accumulate is {self.accumulate}; compute a step in 1 part or more.")
        _require(self.stop_after is None or self.stop_after >= 1, f"stop_after is {self.stop_after}; use 1 or more.")
        _require(
            self.device != "cpu" or self.precision != "fp16",
            "precision is fp16 with device cpu; fp16 needs a GPU. Use --precision fp32 or bf16.",
        )
        _require(
            self.head.prototypes or self.method.loss != "cross-entropy",
            "head.prototypes is False but method.loss cross-entropy needs them; use --method.loss mse or infonce.",
        )
        if self.epochs is not None:
            for name, value in (
                ("optim.warmup_epochs", self.optim.warmup_epochs),
                ("method.teacher_temp_epochs", self.method.teacher_temp_epochs),
            ):
                _require(
                    value is None or value <= self.epochs,
                    f"{name} is {value} but the run has only {self.epochs} epochs; lower it or train longer.",
                )


def flatten(options: Any, prefix: str = "") -> dict[str, Any]:
    """Options as {dotted name: value}, in declaration order."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = value
    return flat


def replace(options: Any, changes: dict[str, Any]) -> Any:
    """A copy of `options` with dotted names replaced, e.g. ``{"head.out_dim": 256}``."""
    nested: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            own[head] = value
    own |= {name: replace(getattr(options, name), inner) for name, inner in nested.items()}
    return dataclasses.replace(options, **own)


def to_dict(options: Any) -> dict[str, Any]:
    """Options as nested dictionaries without unset values: what `config.toml` holds."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    return {
        name: to_dict(value) if dataclasses.is_dataclass(value) else value
        for name, value in values.items()
        if value is not None
    }


def from_dict(kind: type, values: dict[str, Any], where: str) -> Any:
    """Options of class `kind` from nested dictionaries; an unknown name is an error that says `where`."""
    hints = get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where} has unknown options {unknown}; known are {sorted(known)}.")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value, where)  # pyright: ignore[reportArgumentType]
        elif isinstance(value, list):
            value = tuple(value)
        arguments[name] = value
    return kind(**arguments)


def toml_flags(path: Path) -> list[str]:
    """The flags a TOML file stands for, so that one parser checks files and flags alike."""
    flags: list[str] = []

    def walk(values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            name = f"{prefix}{key}".replace("_", "-")
            if isinstance(value, dict):
                walk(value, f"{name}.")
            elif isinstance(value, bool):
                parent, _, leaf = name.rpartition(".")
                flags.append(f"--{name}" if value else f"--{parent + '.' if parent else ''}no-{leaf}")
            else:
                flags.extend([f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])])

    walk(_toml(path), "")
    return flags


def read_toml(path: Path) -> TrainOptions:
    """The options a TOML file gives, the others at their defaults."""
    return from_dict(TrainOptions, _toml(path), str(path))


def _toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no options file '{path}'.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a valid TOML file: {error}.") from error


def recorded(run: str) -> TrainOptions:
    """The options that the run in directory `run` was started with."""
    path = Path(run) / "config.toml"
    if not path.is_file():
        raise ValueError(f"{run} holds no run (no config.toml); give the --out folder of a run.")
    return read_toml(path)
