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
class LabelledOptions(EvalOptions):
    """For evaluations that classify."""

    data: str
    """Labelled images: a folder with train/ and val/, or a folder of classes (a tenth of it becomes the test set)."""
    val: str | None = None
    """Labelled test images, when they lie elsewhere."""


@dataclass(frozen=True, kw_only=True)
class KnnOptions(LabelledOptions):
    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours."""
    temp: float = 0.07
    """Temperature of the votes exp(cosine / temp)."""

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k is {self.k}; ask for numbers of neighbours of at least 1.")
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
    """A folder of masks of the same names and sizes: grey images whose bright half is the object, or palette images
    with an object to an index (0 is none, 255 is unknown)."""
    mass: float = 0.6
    """Share of a head's attention that its mask keeps."""

    def __post_init__(self) -> None:
        if (self.data is None) == (self.images is None) or (self.images is None) != (self.masks is None):
            raise ValueError("give either --data with the VOC folder, or --images and --masks.")
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass is {self.mass}; the share of attention to keep lies above 0 and up to 1.")
