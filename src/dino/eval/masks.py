"""Overlap of attention masks with objects (paper figure 4): does [CLS] look where the things are?"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from dino import distributed
from dino.data.decode import BadImage
from dino.data.labels import text
from dino.data.listing import Names
from dino.data.render import normalise
from dino.data.scenes import Scenes
from dino.data.sources import Files, open_source
from dino.eval.judge import Judgement, judge, open_scenes
from dino.eval.options import MasksOptions
from dino.inference.attention import cls_attention, enlarge, fit, jaccard, mass_mask
from dino.models import NO_ATTENTION, Backbone

SIZE, SIZE_OF_SMALL = 480, 2  # pixels; models made for fewer than 128 get so many times their own size
UNSEEN = 10**6  # position of the first drawn scene: behind those that a run is trained on
LAYOUT = (
    "expected are DATA/JPEGImages/NAME.jpg, DATA/SegmentationObject/NAME.png (or SegmentationClass) and "
    "DATA/ImageSets/Segmentation/val.txt"
)


class Outlined(Protocol):
    """Images with their objects outlined, by position."""

    fingerprint: str

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def read(self, index: int, size: int, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Image [h, w, 3] uint8 of `fit` and its objects, bool [k, h, w]. BadImage or ValueError: not usable."""
        ...


class DrawnScenes:
    """Scenes with their four things as one object."""

    def __init__(self, scenes: Scenes):
        self.scenes, self.fingerprint = scenes, scenes.fingerprint

    def __len__(self) -> int:
        return len(self.scenes)

    def name(self, index: int) -> str:
        return self.scenes.name(index)

    def read(self, index: int, size: int, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
        scenes = self.scenes.at(size // patch_size * patch_size)
        return scenes.read(index), scenes.mask(index)[None]


class MaskFiles:
    """Images of `source`, each with the mask file at its position."""

    def __init__(self, source: Files, masks: list[Path]):
        self.source, self.masks = source, masks
        digest = hashlib.sha256(source.fingerprint.encode())
        digest.update("\0".join(path.name for path in masks).encode("utf-8", "surrogateescape"))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def read(self, index: int, size: int, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
        image, indices = self.source.read(index), object_indices(self.masks[index])
        if indices.shape != image.shape[:2]:
            (h, w), (height, width) = indices.shape, image.shape[:2]
            raise ValueError(f"its mask is {w} x {h} pixels and the image {width} x {height}; make them agree")
        indices = fit(indices, size, patch_size, Image.Resampling.NEAREST)
        objects = [i for i in np.unique(indices) if i not in (0, 255)]
        return fit(image, size, patch_size), indices == np.array(objects, np.uint8)[:, None, None]


def object_indices(path: Path) -> np.ndarray:
    """Which object each pixel of a mask file belongs to, uint8 [h, w]; 0: none, 255: unknown.

    Raises:
        BadImage: it cannot be read.
        ValueError: a grey image that is no mask.
    """
    try:
        with Image.open(path, formats=("PNG", "BMP", "GIF", "TIFF", "JPEG", "WEBP")) as image:
            if image.mode == "P":
                return np.array(image)
            grey = np.array(image.convert("L"))
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise BadImage(f"its mask {path.name} cannot be read ({type(error).__name__})") from error
    brightest = int(grey.max())
    if 1 < brightest < 128:
        raise ValueError(
            f"its mask {path.name} is a grey image of values up to {brightest}; write objects as 255 and the rest as 0, "
            "or number them in a palette PNG"
        )
    return (grey > (127 if brightest > 1 else 0)).astype(np.uint8)


def open_data(options: MasksOptions) -> Outlined:
    """Images and outlines of the options.

    Raises:
        ValueError: folders are not laid out as they should be.
    """
    if options.data is None:
        assert options.images is not None
        assert options.masks is not None
        source, others = open_source(options.images, "none"), open_source(options.masks, "none")
        by_stem = {Path(others.name(i)).stem: Path(others.root, others.name(i)) for i in range(len(others))}
        stems = [Path(source.name(i)).stem for i in range(len(source))]
        if missing := [stem for stem in stems if stem not in by_stem]:
            raise ValueError(
                f"{len(missing)} of the {len(stems)} images of {options.images} have no mask of their name in "
                f"{options.masks}, first {missing[0]}; add the masks or take the images out."
            )
        return MaskFiles(source, [by_stem[stem] for stem in stems])
    if (scenes := open_scenes(options.data)) is not None:
        return DrawnScenes(Scenes(len(scenes[0]), first=UNSEEN))
    root = Path(options.data)
    listed = root / "ImageSets" / "Segmentation" / "val.txt"
    folder = next((root / kind for kind in ("SegmentationObject", "SegmentationClass") if (root / kind).is_dir()), None)
    if folder is None or not listed.is_file():
        raise ValueError(
            f"--data {root} is not laid out as PASCAL VOC; {LAYOUT}. Other data: --images and --masks, or scenes:500."
        )
    names = text(str(listed)).split()
    masks = [folder / f"{name}.png" for name in names]
    photos = [root / "JPEGImages" / f"{name}.jpg" for name in names]
    if missing := [path for path in photos + masks if not path.is_file()] or ([] if names else [listed]):
        raise ValueError(f"{len(missing)} files that {listed} calls for are missing, first {missing[0]}; {LAYOUT}.")
    blob = b"".join(f"{name}.jpg".encode() + b"\0" for name in names)
    return MaskFiles(Files(str(root / "JPEGImages"), Names(blob), (), None, "listed"), masks)


class Overlap(NamedTuple):
    index: int
    heads: list[list[float]]  # Jaccard index of each object with each head's mask; none where nothing is outlined
    problem: str = ""  # why the image was left out


@torch.no_grad()
def overlap(model: Backbone, image: np.ndarray, objects: np.ndarray, mass: float, device: torch.device) -> Tensor:
    """Jaccard index of each object with the mask of each head [k, heads].

    Args:
        image: [h, w, 3] uint8 of whole patches; objects: bool [k, h, w].
        mass: share of a head's attention that its mask keeps.
    """
    pixels = torch.from_numpy(np.array(image))[None, None].to(device)
    attention = cls_attention(model, normalise(pixels, model.in_channels)).float()
    masks = enlarge(mass_mask(attention, mass), (objects.shape[1], objects.shape[2]))[0] > 0
    truth = torch.from_numpy(objects).to(device)
    return torch.stack([jaccard(masks, one) for one in truth]).cpu()


def overlaps(
    model: Backbone, data: Outlined, size: int, mass: float, device: torch.device, indices: Iterable[int]
) -> list[Overlap]:
    """`overlap` for the images at `indices`; an image that cannot be used is named."""
    results = []
    for index in indices:
        try:
            image, objects = data.read(index, size, model.patch_size)
        except (BadImage, ValueError) as error:
            results.append(Overlap(index, [], str(error)))
            continue
        found = overlap(model, image, objects, mass, device).tolist() if len(objects) else []
        results.append(Overlap(index, found))
    return results


# Figure 4: PASCAL VOC 2012.
PAPER = {"vit_small/16": {"voc_jaccard_best_head": 45.9}}


def evaluate(model: Backbone, options: MasksOptions, device: torch.device) -> Judgement:
    """The head that fits an object best, and the mean of heads; averaged over an image's objects, then over images."""
    if not model.has_attention:
        raise ValueError(NO_ATTENTION)
    size = options.size or (SIZE if model.image_size >= 128 else SIZE_OF_SMALL * model.image_size)
    if size < model.patch_size:
        raise ValueError(f"--size is {size}, smaller than one patch of {model.patch_size} pixels; use a larger one.")
    data = open_data(options)
    # Batches of one: images differ in size. Every rank takes its share, and the order does not matter.
    mine = range(distributed.rank(), len(data), distributed.world_size())
    show = distributed.is_main() and sys.stderr.isatty()
    shares = distributed.gather(
        overlaps(model, data, size, options.mass, device, track(mine, "attention", transient=True) if show else mine)
    )
    results = sorted(result for share in shares for result in share)
    bad = [result for result in results if result.problem]
    used = [np.array(result.heads) for result in results if result.heads]
    if bad and distributed.is_main():
        print(f"{len(bad)} images were left out, first {data.name(bad[0].index)}: {bad[0].problem}")
    if not used:
        reason = f"the first, {data.name(bad[0].index)}: {bad[0].problem}" if bad else "no mask holds an object"
        raise ValueError(f"none of the {len(data)} images can be used ({reason}); check the images and masks.")
    prefix = "voc_" if options.data is not None and not isinstance(data, DrawnScenes) else ""
    return Judgement(
        {
            f"{prefix}jaccard_best_head": 100 * float(np.mean([heads.max(axis=1).mean() for heads in used])),
            f"{prefix}jaccard_mean_head": 100 * float(np.mean([heads.mean() for heads in used])),
        },
        f"Jaccard index of objects and the patches that hold {100 * options.mass:g} % of a head's last-block attention, "
        f"shorter side {size} pixels",
        {"images": data.fingerprint},
        {"images": len(used), "objects": sum(map(len, used))},
    )


def command(options: MasksOptions) -> None:
    judge("masks", options, evaluate, PAPER)
