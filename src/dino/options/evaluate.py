"""Options of the evaluations. The text under a field is its help; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What every evaluation takes."""

    model: Positional[str]
    """A run directory, a weight file, or a model's name (dino models)."""
    size: int | None = None
    """Edge of the evaluation view, pixels. None: what the protocol or the model was made for."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. Under torchrun the work is shared, with the same result."""
    json: str | None = None
    """File for the result. None: eval/NAME.json in a run's directory, none for other models."""


@dataclass(frozen=True, kw_only=True)
class LabeledOptions(EvalOptions):
    """For evaluations that classify."""

    data: str
    """Labeled images: DATA/train/CLASS/image.jpg and DATA/val/CLASS/image.jpg; or DATA/CLASS/image.jpg, a tenth of
    which becomes the test set; or torchvision:NAME:FOLDER, a data set whose files are there already."""
    val: str | None = None
    """Labeled test images, when they lie elsewhere."""


@dataclass(frozen=True, kw_only=True)
class KnnOptions(LabeledOptions):
    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbors."""
    temp: float = 0.07
    """Temperature of the votes exp(cosine / temp)."""

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k is {self.k}; ask for numbers of neighbors of at least 1.")
        if self.temp <= 0:
            raise ValueError(f"temp is {self.temp}; a temperature must be above 0.")


@dataclass(frozen=True, kw_only=True)
class RankingOptions(EvalOptions):
    """For evaluations that rank a database by its likeness to queries."""

    protocol: Literal["fixed", "original"] = "fixed"
    """'original' repeats what the reference does otherwise, see docs/evaluations.md."""
    whiten: str | None = None
    """Other images, a folder or list, to learn a PCA whitening of the features from. None: features as they are."""


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions(RankingOptions):
    data: str
    """Folder DATA with one ground truth, DATA/gnd_roxford5k.pkl, DATA/gnd_rparis6k.pkl or any gnd_NAME.pkl of that
    form, and its images DATA/jpg/NAME.jpg; or such a .pkl file with jpg/ beside it."""
    scales: Literal[1, 3] | None = None
    """1, or 3 for the mean of the features at 1, 1/sqrt(2) and 1/2 of --size (that of the longer side). None: as
    published, 1 for Oxford (at 224 pixels), and 3 for Paris (at 512 pixels) and all others."""


@dataclass(frozen=True, kw_only=True)
class CopydetectOptions(RankingOptions):
    data: str | None = None
    """Copydays: a folder DATA with DATA/original/ and at least one block of copies, DATA/strong/, DATA/jpegqual/N/ or
    DATA/crops/N/. A copy and its original begin with the same four characters."""
    originals: str | None = None
    """Instead of --data: a folder of originals, with --copies."""
    copies: str | None = None
    """A folder of copies, or of sub-folders with one kind of copies each. A copy has its original's name, or that name,
    '_' and anything: beach.jpg and beach_crop20.png are copies of beach.jpg."""
    distractors: str | None = None
    """Other images, a folder or list, that the originals must be found among."""

    def __post_init__(self) -> None:
        if (self.data is None) == (self.originals is None) or (self.originals is None) != (self.copies is None):
            raise ValueError("give either --data with the Copydays folder, or --originals and --copies.")


@dataclass(frozen=True, kw_only=True)
class MasksOptions(EvalOptions):
    data: str | None = None
    """PASCAL VOC: a folder DATA with DATA/JPEGImages/, DATA/SegmentationObject/ (or DATA/SegmentationClass/) and
    DATA/ImageSets/Segmentation/val.txt."""
    images: str | None = None
    """Instead of --data: a folder of images, with --masks."""
    masks: str | None = None
    """A folder of masks of the same names and sizes: gray images whose bright half is the object, or palette images
    with an object to an index (0 is none, 255 is unknown)."""
    mass: float = 0.6
    """Share of a head's attention that its mask keeps."""

    def __post_init__(self) -> None:
        if (self.data is None) == (self.images is None) or (self.images is None) != (self.masks is None):
            raise ValueError("give either --data with the VOC folder, or --images and --masks.")
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass is {self.mass}; the share of attention to keep lies above 0 and up to 1.")


@dataclass(frozen=True, kw_only=True)
class TrainedOptions(LabeledOptions):
    """For evaluations that train."""

    seed: int = 0
    """Of splits, orders, first weights and augmentations."""
    num_workers: int | None = None
    """Processes that read images. None: the spare cores beside a GPU, none on a CPU."""
    checkpoint_minutes: float = 10.0
    """Between checkpoints, which lie beside the result; the same command goes on after an interruption, to the bit."""


@dataclass(frozen=True, kw_only=True)
class LinearOptions(TrainedOptions):
    mode: Literal["fast", "paper"] = "fast"
    """'fast': sweep on features of the evaluation view, kept on disk. 'paper': crops and flips, 100 epochs of forwards."""
    protocol: Literal["default", "original"] = "default"
    """'original' (paper mode): report the best epoch on the test images, as the reference does, not the last."""
    pooling: tuple[Literal["cls", "average", "last4", "cls+average"], ...] | None = None
    """Features to classify. None: in fast mode all that the model has, in paper mode the paper's for its size."""
    lr: tuple[float, ...] | None = None
    """Learning rates per 256 images. None: seven from 0.001 to 1 in fast mode, 0.001 in paper mode."""
    weight_decay: tuple[float, ...] | None = None
    """None: 0, 1e-5 and 1e-4 in fast mode, 0 in paper mode."""
    epochs: int = 100
    """Cosine decay to 0 over these, from epoch to epoch."""
    batch_size: int = 1024
    """Images per step, over all ranks."""
    held_out: float = 0.1
    """Share of each class of the training images that chooses where there is more than one classifier."""

    def __post_init__(self) -> None:
        if self.protocol == "original" and self.mode != "paper":
            raise ValueError("protocol 'original' differs from the default only in paper mode; add --mode paper.")
        for name, values in (("lr", self.lr), ("pooling", self.pooling), ("weight-decay", self.weight_decay)):
            if values is not None and not values:
                raise ValueError(f"--{name} is empty; give at least one value.")
        if min(self.lr or (1.0,)) <= 0 or min(self.weight_decay or (0.0,)) < 0:
            raise ValueError("learning rates must be above 0 and weight decays not below.")
        if self.mode == "paper" and len(self.pooling or ()) > 1:
            raise ValueError("paper mode classifies one pooling; give one, or use --mode fast.")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("epochs and batch_size must be at least 1.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it is a share between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class LowshotOptions(LabeledOptions):
    percent: tuple[float, ...] = (1.0, 10.0)
    """Shares of each class of the training images, drawn from the seed, at least one image of each; 100: all."""
    list: tuple[str, ...] = ()
    """Files with a name of an image per line, e.g. ImageNet's published 1 % and 10 % lists, in place of drawn shares."""
    c: float | None = None
    """Inverse strength of the L2 penalty, sum of losses + |W|^2 / 2C. None: chosen by cross-validation."""
    folds: int = 5
    """Of the cross-validation."""
    k: int = 20
    """Neighbors of the k-NN beside it."""
    seed: int = 0
    """Of the drawn shares."""

    def __post_init__(self) -> None:
        if not self.list and (not self.percent or not 0 < min(self.percent) <= max(self.percent) <= 100):
            raise ValueError(f"percent is {self.percent}; give shares above 0 and up to 100.")
        if self.c is not None and self.c <= 0:
            raise ValueError(f"c is {self.c}; it must be above 0.")
        if self.folds < 2 or self.k < 1:
            raise ValueError("folds must be at least 2 and k at least 1.")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainedOptions):
    recipe: Literal["cifar10", "cifar100", "flowers", "cars", "inat18", "inat19", "imagenet"] = "imagenet"
    """Where what is not given comes from; docs/evaluations.md lists them with what is known of each."""
    epochs: int | None = None
    batch_size: int | None = None
    """Images per step, over all ranks."""
    lr: float | None = None
    """Peak learning rate per 512 images."""
    min_lr: float | None = None
    warmup_epochs: int | None = None
    weight_decay: float | None = None
    layer_decay: float | None = None
    """The learning rate of a block is this times that of the next one; 1: all alike."""
    drop_path: float | None = None
    """Stochastic depth of the last block, of our own ViTs."""
    mixup: float | None = None
    """Of its Beta distribution; 0: none. With CutMix, each step takes one of them at random."""
    cutmix: float | None = None
    smoothing: float | None = None
    """Of labels."""
    rand_augment: str | None = None
    """timm's name of an augmentation policy, '' for none."""
    erasing: float | None = None
    """Probability of random erasing."""
    repeats: int | None = None
    """Copies of an image in a batch."""
    head_scale: float | None = None
    """Factor on the new classifier's first weights."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward pass; auto: bf16 on GPUs that have it."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "repeats", "lr", "layer_decay"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")
        for name in ("drop_path", "smoothing", "erasing"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; it lies in [0, 1).")
        for name in ("min_lr", "warmup_epochs", "weight_decay", "mixup", "cutmix", "head_scale"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; it must not be negative.")


@dataclass(frozen=True, kw_only=True)
class DavisOptions(EvalOptions):
    data: str
    """DAVIS-2017, or videos laid out like it: a folder DATA with DATA/JPEGImages/480p/VIDEO/00000.jpg and so on,
    DATA/Annotations/480p/VIDEO/00000.png and so on, and DATA/ImageSets/2017/val.txt with a VIDEO per line."""
    out: str | None = None
    """Folder for the masks, OUT/VIDEO/00000.png; videos finished there are not computed again. None: davis.masks beside
    the result."""
    protocol: Literal["fixed", "original"] = "fixed"
    """'original' repeats what the reference does otherwise, see docs/evaluations.md."""
    queue: int = 7
    """Frames before a frame that labels come from, besides the first."""
    neighborhood: int = 12
    """Rows and columns of patches that a label can move between two frames."""
    top_k: int = 5
    """Likest patches that labels are taken from."""

    def __post_init__(self) -> None:
        if self.queue < 0 or self.neighborhood < 0 or self.top_k < 1:
            raise ValueError("queue and neighborhood must not be negative, and top_k must be at least 1.")


# Name -> what it measures and its options; the rest is `PAPER` and `evaluate` of the module dino.eval.NAME.
EVALUATIONS: dict[str, tuple[str, type[EvalOptions]]] = {
    "knn": ("k-NN accuracy of a run's features", KnnOptions),
    "linear": ("linear classification of frozen features", LinearOptions),
    "lowshot": ("a few labels: logistic regression, k-NN", LowshotOptions),
    "finetune": ("train it on labels, end to end", FinetuneOptions),
    "retrieval": ("landmark retrieval, Oxford and Paris", RetrievalOptions),
    "copydetect": ("find the originals of copies", CopydetectOptions),
    "masks": ("overlap of attention with objects", MasksOptions),
    "davis": ("objects followed through videos, J and F", DavisOptions),
}
