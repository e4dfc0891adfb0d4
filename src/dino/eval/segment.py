"""Semantic segmentation by frozen features: each patch is classified alone, by its neighbors and by a linear layer.

Beside them stand two floors, which use no model: the most frequent class everywhere, and the k-NN of mean colors.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino import distributed
from dino.data.decode import BadImage
from dino.data.open import MOST_HELD_OUT
from dino.data.sources import Source, evenly_spaced, hold_out, read_bytes
from dino.eval.evaluate import Result, choose_view_size, measure_each
from dino.eval.lowshot import fit_logistic
from dino.eval.masks import check_sizes, open_voc, pair_folders, require_usable
from dino.features.neighbors import find_neighbors, split_rows, vote
from dino.look.attention import check_number
from dino.look.patches import extract_patches
from dino.models import Backbone
from dino.options import required
from dino.options.evaluate import SegmentOptions
from dino.randomness import Stream, open_stream
from dino.terminal import say, track

SIZE = 480  # pixels, for a model trained at 224
TEMP = 0.07  # of the votes exp(cosine / TEMP), as in `dino eval knn`
UNKNOWN = 255  # value of pixels of no known class
PARTS = "training images", "training masks", "test images", "test masks"

Classifier = Callable[[Tensor], Tensor]  # features of patches [m, d] to scores [m, classes]


# --- images and masks -----------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Images, and at the same positions their masks."""

    images: Source
    masks: Source

    def count_values(self) -> np.ndarray:
        """Pixels of each value in all masks, int64 [256]. Every rank counts in its share of them."""

        def count(index: int) -> np.ndarray:
            return np.bincount(read_mask(self.masks, index).ravel(), minlength=256)

        return np.sum(require_usable(measure_each(range(len(self.masks)), count, "masks"), self.images), axis=0)


def open_parts(options: SegmentOptions) -> tuple[Part, Part]:
    """What to learn from, and what to test on.

    Raises:
        ValueError: folders are not laid out as they should be, or a mask is missing.
    """
    if options.data is not None:
        train, test = (open_voc(options.data, part, ["SegmentationClass"]) for part in ("train", "val"))
        return Part(*train), Part(*test)
    train = pair_folders(required(options.images), required(options.masks))
    if options.val_images is not None:
        return Part(*train), Part(*pair_folders(options.val_images, required(options.val_masks)))
    # The choice depends on the number of files only, so it is the same of images and masks.
    (images, test_images), (masks, test_masks) = (hold_out(files, 0.1, MOST_HELD_OUT, 0) for files in train)
    if test_images is None or test_masks is None:
        raise ValueError(f"{len(images)} images are too few to set some aside; give --val-images and --val-masks.")
    return Part(images, masks), Part(test_images, test_masks)


def read_mask(masks: Source, index: int) -> np.ndarray:
    """Read the value of each pixel of a mask, of palette images the index: uint8 [h, w].

    Raises:
        BadImage: it cannot be read, or does not hold classes.
    """

    def fault(what: str) -> BadImage:
        advice = "write the class of each pixel, 0 to 254, or 255 for unknown, as a gray or palette PNG"
        return BadImage(f"its mask {masks.name(index)} {what}; {advice}")

    try:
        with Image.open(io.BytesIO(read_bytes(masks, index) or b""), formats=("PNG", "BMP", "GIF", "TIFF")) as image:
            values = np.array(image)
    except Exception as error:  # Pillow's decoders raise a dozen kinds. JPEG changes values, so it is none of these
        raise fault(f"cannot be read as PNG, BMP, GIF or TIFF ({type(error).__name__})") from error
    if values.ndim != 2:
        raise fault(f"is a picture of {values.shape[2]} channels")
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > UNKNOWN:
        raise fault(f"holds values from {values.min():g} to {values.max():g}")
    if np.count_nonzero(np.diff(values)) > values.size / 2 and len(np.unique(values)) > 64:
        raise fault("is a photograph, whose neighboring pixels mostly differ")
    return values.astype(np.uint8)


def survey(train: Part, test: Part) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of each class in the masks of each part, int64 [255], and the class that a mask's value means, uint8 [256].

    Raises:
        ValueError: there is nothing to tell apart, or to test on.
    """
    (learned, asked), meaning = (part.count_values() for part in (train, test)), np.arange(256, dtype=np.uint8)
    if set(np.flatnonzero(learned + asked)) == {0, UNKNOWN}:
        say("The masks are black and white, so 255 is the object (class 1).")
        learned[1], asked[1], meaning[UNKNOWN] = learned[UNKNOWN], asked[UNKNOWN], 1
    learned, asked = learned[:UNKNOWN], asked[:UNKNOWN]
    if np.count_nonzero(learned) < 2 or not asked.any():
        known, tested = (np.flatnonzero(counts).tolist() for counts in (learned, asked))
        raise ValueError(
            f"the training masks hold the classes {known} and the test masks {tested} (255 is unknown); two classes to "
            "learn and one to test on are needed."
        )
    if len(new := np.flatnonzero((asked > 0) & (learned == 0))):
        say(f"No training mask holds these classes of the test masks, so their IoU is 0: {', '.join(map(str, new))}.")
    return learned, asked, meaning


# --- patches --------------------------------------------------------------------------------------------------------


def describe(model: Backbone, image: np.ndarray, size: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Features [cells, d] and colors [cells, 4] of the patches of an image [h, w, 3] uint8, and their rows and columns.

    The image is resized to whole patches, with a shorter side of about `size` pixels. A color is the mean of its pixels,
    from -1 to 1, and a 1: so the cosine of two colors depends on their brightness too.
    """
    shorter, patch = min(image.shape[:2]), model.patch_size
    height, width = (max(1, round(edge * size / shorter / patch)) * patch for edge in image.shape[:2])
    check_number(height // patch * (width // patch), height, width)
    rows, columns = model.grid(height, width)
    view = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    means = cv2.resize(view.astype(np.float32) / 127.5 - 1, (columns, rows), interpolation=cv2.INTER_AREA)
    colors = F.pad(torch.from_numpy(means.reshape(-1, 3)), (0, 1), value=1.0)
    return extract_patches(model, view), colors, (rows, columns)


def label_patches(classes: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The most frequent class in each patch, int64 [cells], of the class of each pixel [h, w]; UNKNOWN: it has none."""
    (h, w), (rows, columns) = classes.shape, grid
    cells = (np.arange(h) * rows // h)[:, None] * columns + np.arange(w) * columns // w
    counts = np.bincount((cells * 256 + classes).ravel(), minlength=rows * columns * 256).reshape(-1, 256)[:, :UNKNOWN]
    return np.where(counts.any(axis=1), counts.argmax(axis=1), UNKNOWN)


def build_knn(bank: Tensor, labels: Tensor, num_classes: int, k: int) -> Classifier:
    """Shares of the votes exp(cosine / TEMP) of the k nearest of `bank` [m, d]; labels are [m]."""
    bank = F.normalize(bank, dim=1)

    def classify(features: Tensor) -> Tensor:
        cosines, rows = find_neighbors(F.normalize(features, dim=1), bank, k)
        return F.normalize(vote(cosines, labels[rows], num_classes, TEMP), p=1, dim=1)

    return classify


def build_linear(bank: Tensor, labels: Tensor, num_classes: int, c: float) -> Classifier:
    """Logits of a logistic regression on standardized features and a constant; see `fit_logistic`."""
    mean, deviation = bank.mean(dim=0), bank.std(dim=0, correction=0).clamp(min=1e-6)

    def standardize(features: Tensor) -> Tensor:
        return F.pad((features - mean) / deviation, (0, 1), value=1.0)

    fits = (fit_logistic(standardize(bank), labels, num_classes, c) for _ in range(1))
    [weights] = track(fits, 1, "linear layer")  # a bar, because it may take minutes
    return lambda features: standardize(features) @ weights.float()


def enlarge_to_classes(scores: Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """The class of largest score at each pixel, int64 [h, w]: scores of patches [cells, classes] enlarged bilinearly.

    A few classes at a time, because scores of all classes at all pixels may take gigabytes.
    """
    maps = scores.T.unflatten(1, grid)[None]
    most, best = scores.new_full(shape, -torch.inf), torch.zeros(shape, dtype=torch.int64, device=scores.device)
    for some in split_rows(scores.shape[1], shape[0] * shape[1]):
        values, found = F.interpolate(maps[:, some], shape, mode="bilinear")[0].max(dim=0)
        best = torch.where(values > most, found + some.start, best)
        most = torch.maximum(values, most)
    return best


# --- the measure ----------------------------------------------------------------------------------------------------


def count_pixels(predicted: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Pixels of each class that are right, predicted so, and truly so, int64 [3, 255], without unknown ones."""
    predicted, classes = (each[classes != UNKNOWN] for each in (predicted, classes))
    return np.stack([np.bincount(x, minlength=UNKNOWN) for x in (classes[predicted == classes], predicted, classes)])


def compute_ious(counts: np.ndarray) -> dict[int, float]:
    """Intersection over union of each class that there is, in percent, of counts [3, 255] over all images."""
    right, predicted, true = counts
    return {int(i): 100 * float(right[i] / (predicted[i] + true[i] - right[i])) for i in np.flatnonzero(true)}


def compute_figures(counts: dict[str, np.ndarray], ious: dict[str, dict[int, float]]) -> dict[str, float]:
    """mIoU and pixel accuracy of each classifier, percent, from counts [3, 255] over all images."""
    figures = {}
    for name, (right, _, true) in counts.items():
        figures[f"{name}_miou"] = float(np.mean([*ious[name].values()]))
        figures[f"{name}_pixel_accuracy"] = 100 * float(right.sum() / true.sum())
    return figures


def evaluate(model: Backbone, options: SegmentOptions, device: torch.device) -> Result:
    """mIoU and pixel accuracy over all test images, of both classifiers and both floors."""
    size = choose_view_size(options.size, model, SIZE)
    train, test = open_parts(options)
    learned, asked, meaning = survey(train, test)
    place = distributed.with_float64(device)

    def read(part: Part, index: int) -> tuple[np.ndarray, Tensor, Tensor, tuple[int, int]]:
        image, classes = part.images.read(index), meaning[read_mask(part.masks, index)]
        check_sizes(image, classes)
        return classes, *describe(model, image, size)

    used = evenly_spaced(len(train.images), options.patches)

    def sample(index: int) -> tuple[Tensor, Tensor, Tensor]:
        classes, features, colors, grid = read(train, index)
        labels = label_patches(classes, grid)
        known = np.flatnonzero(labels != UNKNOWN)
        draws = open_stream(Stream.PATCHES, options.seed, index).random(len(known))
        rows = known[np.argsort(draws)[: options.patches // len(used)]]
        return features[rows], colors[rows], torch.from_numpy(labels[rows])

    sampled = require_usable(measure_each(used, sample, "training images"), train.images)
    features, colors, labels = (torch.cat(each).to(place) for each in zip(*sampled, strict=True))
    numbers, labels = torch.unique(labels, return_inverse=True)
    classifiers = {
        "knn": build_knn(features, labels, len(numbers), options.k),
        "linear": build_linear(features, labels, len(numbers), options.c),
        "colors": build_knn(colors, labels, len(numbers), options.k),
    }

    def measure(index: int) -> np.ndarray:
        classes, features, colors, grid = read(test, index)
        shape, counts = (classes.shape[0], classes.shape[1]), []
        for name, classify in classifiers.items():
            scores = classify((colors if name == "colors" else features).to(place))
            counts.append(count_pixels(numbers[enlarge_to_classes(scores, grid, shape)].cpu().numpy(), classes))
        return np.stack(counts)

    measured = require_usable(measure_each(range(len(test.images)), measure, "test images"), test.images)
    frequent = np.arange(UNKNOWN) == learned.argmax()
    counts = dict(zip(classifiers, np.sum(measured, axis=0), strict=True))
    counts["majority"] = np.stack([asked * frequent, asked.sum() * frequent, asked])
    ious = {name: compute_ious(each) for name, each in counts.items()}
    figures = compute_figures(counts, ious)
    return Result(
        figures,
        f"patches classified by {options.k}-NN (votes exp(cosine / {TEMP:g})), logistic regression (C {options.c:g}) and "
        f"{options.k}-NN of colors, enlarged bilinearly; shorter side {size} pixels, mIoU of {len(ious['knn'])} classes",
        {name: files.fingerprint for name, files in zip(PARTS, (*train, *test), strict=True)},
        {"training images": len(used), "training patches": len(labels), "test images": len(measured)},
        {"iou": ious},
        floors={
            f"{name}_{what}": {
                "colors": figures[f"colors_{what}"],
                "the most frequent class": figures[f"majority_{what}"],
            }
            for name in ("knn", "linear")
            for what in ("miou", "pixel_accuracy")
        },
    )
