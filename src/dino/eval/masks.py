"""Overlap of attention masks with objects (paper figure 4): does [CLS] look at the objects of an image?"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from dino.data.decode import BadImage
from dino.data.image_files import Files, open_listed, open_source
from dino.data.labels import read_text
from dino.data.sources import Source
from dino.eval.evaluate import Result, choose_view_size, measure_each
from dino.look.attention import enlarge, fit_to_patches, jaccard, map_attention, mass_mask
from dino.look.patches import prepare_image
from dino.models import NO_ATTENTION, Backbone
from dino.options import required
from dino.options.evaluate import MasksOptions

MARGIN = 32  # by which JPEG may change a mask's black and white
SIZE = 480  # pixels, for a model trained at 224
T = TypeVar("T")


def open_masks(options: MasksOptions) -> tuple[Files, Files]:
    """Images, and at the same positions their mask files.

    Raises:
        ValueError: folders are not laid out as they should be, or a mask is missing.
    """
    if options.data is not None:
        return open_voc(options.data, "val", ("SegmentationObject", "SegmentationClass"))
    return pair_folders(required(options.images), required(options.masks))


def pair_folders(images: str, masks: str) -> tuple[Files, Files]:
    """The images of a folder, and at the same positions the masks of their names; raises as `open_masks` does."""
    found, others = open_source(images, "none"), open_source(masks, "none")
    by_stem = {os.path.splitext(others.name(i))[0]: others.name(i) for i in range(len(others))}
    stems = [os.path.splitext(found.name(i))[0] for i in range(len(found))]
    if missing := [stem for stem in stems if stem not in by_stem]:
        raise ValueError(
            f"{len(missing)} of the {len(stems)} images of {images} have no mask of their name in {masks}, first "
            f"{missing[0]}; add the masks or take the images out."
        )
    return found, open_listed(Path(others.root), [by_stem[stem] for stem in stems], masks, "a mask to an image")


def open_voc(data: str, part: str, kinds: Sequence[str]) -> tuple[Files, Files]:
    """The images of a part ("val") of PASCAL VOC, and at the same positions the masks from the first folder of `kinds`
    that exists; raises as `open_masks` does."""
    root = Path(data).expanduser()
    split = root / "ImageSets" / "Segmentation" / f"{part}.txt"
    folder = next((root / kind for kind in kinds if (root / kind).is_dir()), None)
    folders = f"DATA/JPEGImages/NAME.jpg, DATA/{' or '.join(kinds)}/NAME.png"
    layout = f"expected are {folders} and DATA/ImageSets/Segmentation/{part}.txt"
    if folder is None or not split.is_file():
        raise ValueError(f"--data {root} is not laid out as PASCAL VOC; {layout}. Other data: --images and --masks.")
    names = read_text(str(split)).split()
    images = open_listed(root / "JPEGImages", [f"{name}.jpg" for name in names], str(split), layout)
    return images, open_listed(folder, [f"{name}.png" for name in names], str(split), layout)


def require_usable(found: Mapping[int, T | str], images: Source) -> list[T]:
    """What was found of each image, by its position.

    Raises:
        ValueError: of some there is only a sentence why not.
    """
    if bad := [(i, reason) for i, reason in found.items() if isinstance(reason, str)]:
        raise ValueError(
            f"{len(bad)} of the {len(found)} images cannot be used, first {images.name(bad[0][0])} ({bad[0][1]}); repair "
            "or remove them, every image counts."
        )
    return [each for each in found.values() if not isinstance(each, str)]


def check_sizes(image: np.ndarray, mask: np.ndarray) -> None:
    """Refuse a mask of another size than its image."""
    if mask.shape != image.shape[:2]:
        (h, w), (height, width) = mask.shape, image.shape[:2]
        raise ValueError(f"its mask is {w} x {h} pixels and the image {width} x {height}; make them agree")


def read_objects(path: Path) -> np.ndarray:
    """Read the object that each pixel of a mask file belongs to, uint8 [h, w]; 0: none, 255: unknown.

    Raises:
        BadImage: it cannot be read, or is a picture and no mask.
    """
    try:
        with Image.open(path, formats=("PNG", "BMP", "GIF", "TIFF", "JPEG", "WEBP")) as image:
            if image.mode == "P":
                return np.array(image)
            gray = np.array(image.convert("L"))
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise BadImage(f"its mask {path.name} cannot be read ({type(error).__name__})") from error
    brightest = int(gray.max())
    if 1 < brightest < 128:
        raise BadImage(
            f"its mask {path.name} is a gray image of values up to {brightest}; write objects as 255 and the rest as "
            "0, or number them in a palette PNG"
        )
    between = (gray >= MARGIN) & (gray <= 255 - MARGIN)
    if between.mean() > 0.6 and len(np.unique(gray[between])) > MARGIN:  # so are nine photographs of ten
        raise BadImage(
            f"its mask {path.name} is a picture, not black and white; exchange --images and --masks, or write masks so"
        )
    return (gray > (127 if brightest > 1 else 0)).astype(np.uint8)


def read_pair(image: np.ndarray, indices: np.ndarray, size: int, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """An image [h, w, 3] and its objects, bool [k, h, w], both resized and trimmed by `fit_to_patches`.

    Raises:
        ValueError: they differ in size, or are smaller than a patch.
    """
    check_sizes(image, indices)
    indices = fit_to_patches(indices, size, patch_size, Image.Resampling.NEAREST)
    objects = [i for i in np.unique(indices) if i not in (0, 255)]
    return fit_to_patches(image, size, patch_size), indices == np.array(objects, np.uint8)[:, None, None]


@torch.no_grad()
def measure_overlap(model: Backbone, image: np.ndarray, objects: np.ndarray, mass: float) -> np.ndarray:
    """Jaccard index of each object with the mask of each head [k, heads].

    Args:
        image: [h, w, 3] uint8 of whole patches; objects: bool [k, h, w].
        mass: share of a head's attention that its mask keeps.
    """
    attention = map_attention(model, prepare_image(model, image)).float()
    masks = enlarge(mass_mask(attention, mass), (objects.shape[1], objects.shape[2])) > 0
    return jaccard(masks, torch.from_numpy(objects)[:, None].to(masks.device)).cpu().numpy()


def evaluate(model: Backbone, options: MasksOptions, device: torch.device) -> Result:
    """Jaccard index of the head that fits an object best, and the mean of all heads; averaged over an image's objects,
    then over images."""
    if not model.has_attention:
        raise ValueError(NO_ATTENTION)
    size = choose_view_size(options.size, model, SIZE)
    images, masks = open_masks(options)

    def measure(index: int) -> np.ndarray:
        indices = read_objects(Path(masks.root, masks.name(index)))
        image, objects = read_pair(images.read(index), indices, size, model.patch_size)
        whole = objects.mean(axis=(1, 2))[:, None]  # overlap of a mask of the whole image
        return np.concatenate([measure_overlap(model, image, objects, options.mass), whole], axis=1)

    found = measure_each(range(len(images)), measure, "attention")  # one by one: images differ in size
    measured = [overlaps for overlaps in require_usable(found, images) if len(overlaps)]
    used = [overlaps[:, :-1] for overlaps in measured]
    if not used:
        raise ValueError(
            f"none of the {len(found)} masks holds an object; objects are white, or palette indices 1 to 254."
        )
    prefix = "voc_" if options.data is not None else ""
    floor = {"a mask of the whole image": 100 * float(np.mean([overlaps[:, -1].mean() for overlaps in measured]))}
    return Result(
        {
            f"{prefix}jaccard_best_head": 100 * float(np.mean([heads.max(axis=1).mean() for heads in used])),
            f"{prefix}jaccard_mean_head": 100 * float(np.mean([heads.mean() for heads in used])),
        },
        f"Jaccard index of objects and the patches that hold {100 * options.mass:g} % of a head's last-block attention, "
        f"shorter side {size} pixels",
        {"images": images.fingerprint, "masks": masks.fingerprint},
        {"images": len(used), "objects": sum(map(len, used)), "images without an object": len(found) - len(used)},
        floors={f"{prefix}jaccard_{which}_head": floor for which in ("best", "mean")},
    )
