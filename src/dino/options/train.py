"""Every option of a training run: frozen dataclasses, one unit per quantity.

The text under a field is its help on the command line. Durations are epochs here and steps inside the engine;
the batch size is global; the learning rate is given for a batch of 256 and scaled linearly (paper, section 3.2).
``None`` means "chosen for you": `dino.options.auto.resolve` fills it in from the data and the machine, and the run prints
its choices. The rule of a value stands in the type of its field (`dino.options.rules`); options that exclude each other are
found by `contradictions`. Both raise a ``ValueError`` with the value and the rule or the fix. `dino.options.toml` reads and
writes options as TOML.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import tyro

from dino.options import flatten, required, rules
from dino.options.rules import Options

Area = Annotated[
    float, rules.Rule(lambda value: 0 < value <= 1, "a share of the image area lies above 0 and is at most 1")
]
AreaRange = tuple[Area, Area]
ViewEdge = Annotated[int, rules.between(1, 2048, " pixels")]
Sigma = Annotated[float, rules.between(0.001, 100, " pixels")]
Prototypes = Annotated[int, rules.between(1, 2**24)]
TRACKER = rules.matching(
    r"tensorboard|wandb|mlflow|trackio|[\w.]+:\w+", "it is tensorboard, wandb, mlflow, trackio or package.module:Class"
)

AUTO = "auto"  # as --resume


class DataOptions(Options, section="data."):
    """Images and their labels."""

    path: Annotated[rules.DataSpec, tyro.conf.arg(aliases=["--data"])] = "scenes"
    """Images to learn from: a folder (searched at any depth), a list file (.txt or .csv), tar files ('shards/{000..127}.tar',
    or their folder), Parquet files, an address of these (s3://...), hf://datasets/ORG/NAME, 'scenes' (built in), or
    torchvision:NAME:FOLDER. Given several times: several sources."""
    weights: tuple[rules.PositiveFloat, ...] | None = None
    """How often images of each source are visited, in proportion, one number for each --data. None: every image as often."""
    cache: rules.MemorySize | None = None
    """Keep images that are read from an address (s3://, https://) on this disk, e.g. 20GB of them. None: none."""
    val: rules.DataSpec | None = None
    """Held-out images for the monitors: a folder or list. None: the test images that belong to `path`, else a share of the
    training images is set aside."""
    val_fraction: rules.BelowOne = 0.1
    """Share of the images set aside when `val` is not given, at most 1000 images. 0: none."""
    labels: Annotated[str, rules.Metavar("auto|folders|none|FILE")] = "auto"
    """Labels for the k-NN monitor: 'auto' or 'folders' (first folder level), 'none', or a CSV file of path,label."""
    max_bad_fraction: rules.Share = 0.01
    """The run ends when more than this share of the images, and more than five, cannot be read. 0: when any cannot."""
    num_workers: rules.NoneOrFew | None = None
    """Processes that read, decode and render images. 0: the training process itself. None: one per spare core."""
    decode: Literal["workers", "device"] = "workers"
    """Who decodes JPEG files: the workers, or a GPU (needs TorchCodec), for where too few cores feed it."""


class ModelOptions(Options, section="model."):
    """The backbone, and how it wants its pictures."""

    arch: Annotated[rules.Name | None, tyro.conf.arg(aliases=["--model"])] = None
    """Backbone: resnet_nano, vit_nano_hybrid, vit_nano, vit_tiny, vit_small, vit_base, vit_large, or timm:NAME. None: chosen
    for data and device."""
    patch_size: rules.Pixels | None = None
    """Edge of a patch of our own ViTs, pixels. None: 16, or 8 for views under 128 pixels, or 4 under 48."""
    width: rules.Width | None = None
    """Embedding width. None: the architecture's own."""
    depth: rules.Few | None = None
    """Number of blocks. None: the architecture's own."""
    num_heads: rules.Few | None = None
    """Attention heads. None: the architecture's own."""
    drop_path: rules.BelowOne | None = None
    """Stochastic depth rate of the last block (linear from 0 at the first), student only. None: 0.1, or 0 for little data."""
    pos_interp: Literal["offset", "size", "antialias"] = "offset"
    """Position interpolation for other sizes: 'offset' as in released weights (+0.1 patch), 'size', or 'antialias'."""
    stem: Literal["default", "half", "small"] | None = None
    """For ResNets on small images: a 3x3 first convolution of stride 2 ('half') or 1 ('small'), no pooling after it. None:
    chosen for the size of the views."""
    in_channels: Literal[1, 3] = 3
    """Channels the backbone sees: 3 colors, or 1, their luma (after the colors of a view were changed)."""
    mean: tuple[rules.Share, ...] | None = None
    """Mean of each channel (white is 1), subtracted from pixels. None: ImageNet's, or that of the weights of --init."""
    std: tuple[rules.PositiveFloat, ...] | None = None
    """Standard deviation of each channel, which pixels are divided by. None: as for the mean."""
    interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest"] | None = None
    """How an evaluation resizes images. None: bicubic, or as the weights of --init want it."""
    resize: Literal["center", "stretched"] | None = None
    """What an evaluation sees of an image: its central square, or all of it stretched. None: the square, or as the weights
    of --init want it."""
    crop: Area | None = None
    """Edge of the central square as a share of the shorter side. None: 0.875, or 1 for views under 128 pixels."""
    eval_size: rules.Pixels | None = None
    """Edge of an evaluation's view, pixels. None: that of the global views."""


class HeadOptions(Options, section="head."):
    """The projection head."""

    out_dim: Prototypes | None = None
    """Number of prototypes K. None: chosen from the number of images (paper: 65536)."""
    hidden_dim: rules.Width | None = None
    """Width of the hidden layers. None: 2048, or 512 for vit_nano."""
    bottleneck_dim: rules.Width | None = None
    """Width of the L2-normalized bottleneck. None: 256, or 128 for vit_nano."""
    num_layers: rules.NoneOrFew | None = None
    """Linear layers before the prototypes, the last of them into the bottleneck (the paper counts one more). None: 3, or 2
    for little data."""
    norm_last_layer: bool = True
    """Keep the prototypes at length one (weight norm with a fixed gain). False trains the gain; helps large models."""
    batch_norm: bool | None = None
    """BatchNorm after each hidden layer. None: for little data."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Activation after each hidden layer."""
    bottleneck: bool = True
    """Reduce to `bottleneck_dim` and L2-normalize before the prototypes."""
    prototypes: bool | None = None
    """End in prototypes. False ends at the bottleneck, for losses that compare vectors (BYOL, MoCo). None: as the loss
    needs."""
    predictor: bool = False
    """One more hidden layer on the student's side only (BYOL)."""


TEACHERS = ("momentum", "previous-epoch", "previous-iteration", "student")
_NAMED = rules.matching("|".join([*TEACHERS, "frozen:.+"]), f"choose {', '.join(TEACHERS)} or frozen:NAME")
Teacher = Annotated[str, rules.Metavar("NAME"), _NAMED]


class MethodOptions(Options, section="method."):
    """Teacher, loss and targets."""

    teacher: Teacher = "momentum"
    """What the teacher is: momentum (a moving average of the student), previous-epoch, previous-iteration or student (paper
    Fig. 6); or frozen:NAME, trained weights whose features the student learns (a name as for --init)."""
    momentum: rules.Share | None = None
    """Teacher momentum at the first step; rises to 1 on a cosine. None: chosen from the batch and run length."""
    loss: Literal["cross-entropy", "mse", "infonce", "cosine"] | None = None
    """Between distributions over prototypes (DINO), normalized vectors (BYOL), one against negatives (MoCo), or features of
    a frozen teacher. None: cross-entropy, infonce for little data, or cosine with a frozen teacher."""
    queue_size: rules.NonNegativeInt | None = None
    """Negatives that infonce remembers. 0: none, but the other images of the step (MoCo-v3). None: 65536, or 0 for little
    data."""
    student_temp: rules.Temperature | None = None
    """Temperature of the student's softmax, and of infonce's. None: 0.1, or 0.2 for infonce."""
    teacher_temp: rules.Temperature | None = None
    """Temperature of the teacher's softmax after warm-up; lower is sharper. None: 0.07, 0.04 or 0.03 by run and model."""
    teacher_temp_start: rules.Temperature | None = None
    """Temperature of the teacher's softmax at the first epoch. None: 0.04, or 0.03 for vit_nano."""
    teacher_temp_epochs: rules.NonNegativeFloat | None = None
    """Epochs over which the temperature rises from start to end. None: 30, or three tenths of a shorter run."""
    targets: Literal["centering", "softmax-batch", "sinkhorn", "none"] | None = None
    """What keeps the teacher from one dominating prototype: the moving center of its outputs, softmax over the batch,
    3 iterations of Sinkhorn-Knopp (SwAV), or nothing. None: centering, or sinkhorn for little data."""
    center_momentum: rules.Share = 0.9
    """Momentum of the center (paper Eq. 4)."""

    @property
    def frozen(self) -> str | None:
        """The name of the frozen teacher."""
        return self.teacher.removeprefix("frozen:") if self.teacher.startswith("frozen:") else None


_PARTS = "choose all, attention-proj, norms, or last:N for the last N blocks"
Trained = Annotated[str, rules.matching(r"all|attention-proj|norms|last:[1-9][0-9]{0,3}", _PARTS)]


class StartOptions(Options, section="start."):
    """Of training that starts from weights (--init)."""

    frozen_epochs: rules.NonNegativeFloat | None = None
    """Epochs at the start in which only the heads learn. None: a twentieth of the run where the weights bring no heads."""
    train: Trained = "all"
    """What of the backbone learns: all, attention-proj (the output projections of attention), norms, or last:N (the last N
    blocks and the last norm). The heads always learn."""
    stop: bool = True
    """End the run when for a quarter of it every check (three at least) finds the model worse than at the start."""


class ViewOptions(Options, section="views."):
    """Multi-crop and augmentation; defaults are the reference's for ImageNet."""

    global_size: ViewEdge | None = None
    """Edge of the 2 global views, pixels. None: 224 on a GPU, 96 on a CPU."""
    local_size: ViewEdge | None = None
    """Edge of the local views, pixels. None: 96 for 224-pixel globals, else about half of the global size."""
    num_local: rules.NoneOrFew | None = None
    """Local views per image; 0 switches multi-crop off. None: 8, or 2 for little data."""
    global_scale: AreaRange | None = None
    """Share of the image area a global crop may cover. None: 0.4 to 1, or 0.5 to 1 for views under 96 pixels."""
    local_scale: AreaRange | None = None
    """Share of the image area a local crop may cover. None: 0.05 to 0.4, or 0.3 to 0.9 for views under 96 pixels."""
    flip_prob: rules.Share = 0.5
    """Probability of a horizontal flip."""
    jitter_prob: rules.Share = 0.8
    """Probability of color jitter."""
    brightness: rules.Share = 0.4
    """Brightness factor is drawn from 1 +- this."""
    contrast: rules.Share = 0.4
    """Contrast factor is drawn from 1 +- this."""
    saturation: rules.Share = 0.2
    """Saturation factor is drawn from 1 +- this."""
    hue: Annotated[float, rules.Rule(lambda value: 0 <= value <= 0.5, "a hue shift lies in [0, 0.5] turns")] = 0.1
    """Hue shift is drawn from +- this, in turns (0.5 is the opposite color)."""
    gray_prob: rules.Share = 0.2
    """Probability of dropping color."""
    blur_prob: tuple[rules.Share, rules.Share, rules.Share] | None = None
    """Probability of Gaussian blur: first global, second global, locals. None: 1, 0.1 and 0.5, or 0 for little data."""
    blur_sigma: tuple[Sigma, Sigma] = (0.1, 2.0)
    """Blur radius range (standard deviation), pixels of the view."""
    solarize_prob: tuple[rules.Share, rules.Share, rules.Share] = (0.0, 0.2, 0.0)
    """Probability of inverting pixels of 128 and above: first global, second global, locals."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Edge of each view, pixels: the 2 global views, then the local ones."""
        return (required(self.global_size),) * 2 + (required(self.local_size),) * required(self.num_local)


class OptimOptions(Options, section="optim."):
    """Optimizer and schedules."""

    name: Literal["adamw", "sgd", "lars", "muon"] | None = None
    """Optimizer of the student. None: adamw, or muon for little data."""
    lr: rules.Rate | None = None
    """Peak learning rate for a batch of 256; scaled by batch_size / 256. None: 5e-4, or 8e-3 for vit_nano."""
    min_lr: rules.NonNegativeFloat = 1e-6
    """Learning rate at the end of the cosine (not scaled)."""
    layer_decay: Annotated[float, rules.between(0.01, 1)] | None = None
    """The learning rate of a block is this times that of the next one; what comes before the blocks has the least. None: 1,
    or 0.8 with --init."""
    warmup_epochs: rules.NonNegativeFloat | None = None
    """Epochs of linear learning-rate warm-up from 0. None: 10, or a tenth of a shorter run."""
    weight_decay: rules.NonNegativeFloat = 0.04
    """Weight decay at the first step; not applied to biases and one-dimensional parameters."""
    weight_decay_end: rules.NonNegativeFloat = 0.4
    """Weight decay at the last step (cosine in between)."""
    clip_grad: rules.NonNegativeFloat = 3.0
    """Largest norm of each parameter's gradient (clipped one by one). 0: off."""
    freeze_last_layer: rules.NonNegativeFloat = 1
    """Epochs at the start, a third of the run at most, in which the prototypes are not updated; steadies the start."""


class LogOptions(Options, section="log."):
    """What is written down, and when."""

    every: rules.PositiveInt = 10
    """Steps between log lines; metrics leave the device only then."""
    knn_every: rules.NonNegativeFloat | None = None
    """Epochs between k-NN and feature-health checks. 0: only before and after training. None: 1, or a twentieth of a longer
    run."""
    evaluate: tuple[str, ...] = ()
    """Evaluations to make then, each as one word: "knn --data labeled/ --k 20", see `dino eval NAME --help`."""
    checkpoint_minutes: rules.PositiveFloat = 10
    """Minutes between checkpoints; one is also written after every epoch."""
    keep: rules.PositiveInt = 2
    """Checkpoints to keep, the newest first."""
    keep_teachers: rules.NonNegativeInt = 0
    """Teachers to keep of the whole run, evenly spaced from before the first step to the last: small files without optimizer,
    which `dino app` shows over time. 0: none."""
    to: tuple[Annotated[str, TRACKER], ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl: any of tensorboard, wandb, mlflow, trackio, or a class of yours as
    package.module:Class."""


class TrainOptions(
    Options, common=("data.path", "out", "epochs", "minutes", "hours", "model.arch", "init", "resume", "overwrite")
):
    """Learn from images without labels.

    dino train --data photos/ --out runs/b --minutes 30
    dino train --data photos/ --out runs/c --model vit_small --epochs 100
    dino train --resume runs/a

    A recipe (`dino recipes`) or a file of options can come first; options win over it.
    """

    out: rules.Folder | None = None
    """Run directory to write; of an address (s3://...) a folder of the cache, copied there after every save. None: runs/<data
    name>."""
    resume: rules.Folder | None = None
    """Run directory to continue; all other options come from its config.toml. Moved images: with --data, their new place.
    'auto': continue the run in --out if there is one, else start it."""
    init: rules.ModelName | None = None
    """Trained weights to start from: a run (its last step), a release ('vits16:full', see `dino models`), timm:NAME,
    hf:ORG/NAME or a file. None: fresh ones."""
    overwrite: bool = False
    """Replace the run that is in the run directory: what a run writes is deleted, all else stays."""
    epochs: rules.PositiveFloat | None = None
    """Passes over the images, e.g. 30 or 0.5. None: what `minutes` allow, or on a GPU chosen from the number of images."""
    minutes: rules.PositiveFloat | None = None
    """Instead of epochs: how long the command may take, with its checks and its report. The speed is measured first. None:
    30 on a CPU where no epochs are given."""
    hours: rules.PositiveFloat | None = None
    """The same in hours; added to `minutes` if both are given."""
    batch_size: rules.PositiveInt | None = None
    """Images per step, over all processes. None: chosen from the number of images and the device."""
    seed: rules.Seed = 0
    """Seed of initial weights, order and views; with the data it determines the run."""
    device: rules.Device = "auto"
    """Where to compute: 'auto' is an NVIDIA GPU if there is one; 'mps' is Apple's, taken only by name."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass: 'auto' is bf16 on a GPU that has it, fp32 on a CPU."""
    fit: rules.MemorySize | None = None
    """Memory of the device to stay within, e.g. 8GB: chooses `accumulate` and `recompute`. The gradients stay the same."""
    accumulate: rules.PositiveInt = 1
    """Parts that a step's images are computed in, one after the other; the same gradients in less memory."""
    recompute: Literal["nothing", "elementwise", "blocks"] = "nothing"
    """Activation checkpointing: what the backward pass computes again instead of keeping it, with the same gradients.
    'elementwise': norms and GELU, a quarter less memory for a twelfth more time; 'blocks': all but each block's input, a
    fifth of the memory for a third more time."""
    shard: Literal["none", "all", "machine"] = "none"
    """Spread networks and optimizer over the processes (FSDP): 'all' of them, or those of each 'machine'. For models that are
    too large for one device; the same result."""
    compile: bool = False
    """Compile the networks (torch.compile): minutes at the start, then faster steps, on a GPU above all."""
    threads: rules.PositiveInt | None = None
    """CPU threads for the arithmetic. None: all cores but one."""
    dry_run: Annotated[bool, tyro.conf.arg(aliases=["--print-config"])] = False
    """Open the images, choose and check all options, print them as TOML (which `dino train` takes), and stop there."""
    stop_after: rules.PositiveInt | None = None
    """Stop (and save) after this many steps of the run; schedules still span all epochs. A resume goes on to the end."""
    report: bool = True
    """Write report.html at the end."""
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    head: HeadOptions = HeadOptions()
    method: MethodOptions = MethodOptions()
    start: StartOptions = StartOptions()
    views: ViewOptions = ViewOptions()
    optim: OptimOptions = OptimOptions()
    log: LogOptions = LogOptions()

    def check(self) -> None:
        super().check()
        if self.epochs is not None and self.epochs.is_integer():
            object.__setattr__(self, "epochs", int(self.epochs))  # so that it is shown as a whole number

    @property
    def budget(self) -> float | None:
        """Seconds that the run may take."""
        return 60 * (self.minutes or 0) + 3600 * (self.hours or 0) or None

    def contradictions(self) -> Iterator[str]:
        head, method = self.head, self.method
        budget = f"minutes is {self.minutes:g}" if self.minutes else f"hours is {self.hours or 0:g}"
        if self.budget and self.resume not in (None, AUTO):
            yield f"{budget}, but --resume continues a run to the length that was chosen at its start; leave it out."
        if self.budget and self.epochs is not None:
            yield f"{budget} and epochs is {self.epochs:g}; give either the time or the epochs."
        for name in ("global_scale", "local_scale", "blur_sigma"):
            low, high = getattr(self.views, name) or (1, 1)
            if low > high:
                yield f"views.{name} is {low} {high}; give the lower bound first."
        if self.init is None and self.resume is None and (self.start != StartOptions()):
            yield "start.* is of training that starts from weights; give them with --init, or leave it out."
        if head.bottleneck and head.num_layers == 0:
            yield f"head.num_layers is {head.num_layers}; use at least 1, the layer into the bottleneck."
        if not head.bottleneck and (head.predictor or head.prototypes is False):
            yield "head.bottleneck is False: then the head must end in prototypes and has no place for a predictor."
        if head.prototypes is False and method.loss == "cross-entropy":
            yield "head.prototypes is False but method.loss cross-entropy needs them; use --method.loss mse or infonce."
        if method.frozen:
            for name, usual in (("method.loss", "cosine"), ("views.num_local", 0), ("head.prototypes", False)):
                if (given := flatten(self)[name]) not in (None, usual):
                    yield f"{name} is {given}, but a student of a frozen teacher has its own; leave it out."
        elif method.loss == "cosine":
            yield "method.loss is cosine, which is for a frozen teacher; give one with --method.teacher frozen:NAME."
        elif method.teacher != "momentum" and method.momentum is not None:
            yield (
                f"method.momentum is {method.momentum} but method.teacher is {method.teacher}, which has none; leave one out."
            )
        allowed = {"mse": ("centering", "none"), "infonce": ("none",)}.get(method.loss or "")
        if allowed and method.targets not in (None, *allowed):
            yield (
                f"method.loss {method.loss} compares vectors, to which method.targets {method.targets} does not apply; "
                f"use {' or '.join(allowed)}."
            )
        if self.shard != "none" and (self.compile or self.fit):
            yield f"shard is {self.shard}, with which --compile and --fit do not work yet; leave them out."
        if self.device == "cpu" and self.precision == "fp16":
            yield "precision is fp16 with device cpu; fp16 needs a GPU. Use --precision fp32 or bf16."
        for name in ("optim.warmup_epochs", "method.teacher_temp_epochs"):
            epochs = flatten(self)[name]
            if self.epochs is not None and epochs is not None and epochs > self.epochs:
                yield f"{name} is {epochs} but the run has only {self.epochs:g} epochs; lower it or train longer."
