"""Video object segmentation (paper table 5): the first frame's objects followed by nearest patches, nothing trained."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from torch import Tensor

from dino import distributed
from dino.data.decode import BadImage
from dino.data.labels import text
from dino.data.render import STD, normalise
from dino.data.sources import Files, listed
from dino.eval.judge import Judgement, fingerprint, result_path
from dino.eval.masks import object_indices
from dino.eval.options import DavisOptions
from dino.eval.propagation import contour, harden, mean_recall_decay, propagate, region
from dino.models import Backbone

SIZE, MULTIPLE = 480, 64  # pixels: the shorter side, and what the longer one is cut to a multiple of
MISPRINT = 0.228  # the reference divides red by this instead of 0.229
LAYOUT = (
    "expected are DATA/JPEGImages/480p/VIDEO/NUMBER.jpg, DATA/Annotations/480p/VIDEO/NUMBER.png and "
    "DATA/ImageSets/2017/val.txt with a VIDEO a line"
)


class Clip(NamedTuple):
    name: str
    frames: Files
    annotations: Files  # of the same positions


def open_clips(options: DavisOptions) -> list[Clip]:
    """The listed videos.

    Raises:
        ValueError: folders are not laid out as they should be, or frames are missing or out of order.
    """
    root = Path(options.data)
    split = root / "ImageSets" / "2017" / "val.txt"
    if not split.is_file():
        raise ValueError(f"--data {root} is not laid out as DAVIS-2017; {LAYOUT}.")
    clips = []
    for name in text(str(split)).split():
        folder, outlines = (root / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
        stems = sorted(path.stem for path in folder.glob("*.jpg")) if folder.is_dir() else []
        if len(stems) < 3:
            raise ValueError(
                f"{folder} holds {len(stems)} frames; a video needs 3 (the first is given, the last not judged)."
            )
        if all(stem.isdigit() for stem in stems):
            numbers = [int(stem) for stem in stems]
            gap = next((b for a, b in pairwise(numbers) if b != a + 1), None)
            if gap is not None:
                raise ValueError(
                    f"the frames of {folder} are not in order: by name {gap} follows {numbers[numbers.index(gap) - 1]}; "
                    "number them without gaps, with leading zeros."
                )
        by = f"{folder} (an annotation to a frame)"
        clips.append(
            Clip(
                name,
                listed(folder, [f"{s}.jpg" for s in stems], by, LAYOUT),
                listed(outlines, [f"{s}.png" for s in stems], by, LAYOUT),
            )
        )
    if not clips:
        raise ValueError(f"{split} names no video; {LAYOUT}.")
    return clips


def frame_size(height: int, width: int, size: int, patch_size: int) -> tuple[int, int]:
    """Height and width to look at a frame with, pixels: the shorter side `size`, the longer cut to a multiple of 64."""
    multiple = math.lcm(MULTIPLE, patch_size) if MULTIPLE % patch_size == 0 else patch_size
    long = int(size * max(height, width) / min(height, width)) // multiple * multiple
    return (long, size) if height > width else (size, long)


@torch.no_grad()
def patches(model: Backbone, image: np.ndarray, protocol: str, device: torch.device) -> Tensor:
    """L2-normalised features of the patches of an image [h, w, 3] uint8, of whole patches; [rows, columns, d]."""
    pixels = normalise(torch.from_numpy(image)[None, None].to(device), model.in_channels)
    if protocol == "original" and model.in_channels == 3:
        pixels[:, 0] *= STD[0] / MISPRINT
    tokens = model.tokens(pixels)[-1][0, 1:].float()
    return F.normalize(tokens, dim=-1).unflatten(0, model.grid(*image.shape[:2]))


def follow(
    model: Backbone, clip: Clip, first: np.ndarray, options: DavisOptions, device: torch.device
) -> Iterator[np.ndarray]:
    """Which object each pixel of the frames after the first belongs to, uint8 [h, w]; `first` says it of the first."""
    size = shown_at(model, options)
    height, width = first.shape
    shape = frame_size(height, width, size, model.patch_size)
    rows, columns = (edge // model.patch_size for edge in shape)
    small = np.asarray(Image.fromarray(first).resize((columns, rows), Image.Resampling.NEAREST))
    label = F.one_hot(torch.from_numpy(small.astype(np.int64)), int(first.max()) + 1).float().to(device)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=options.queue)
    start: tuple[Tensor, Tensor] | None = None
    for i in range(len(clip.frames)):
        image = cv2.resize(clip.frames.read(i), (shape[1], shape[0]))
        target = patches(model, image, options.protocol, device)
        if start is None:
            start = target, label
            continue
        known = [start, *recent]
        sources, labels = (torch.stack([pair[k] for pair in known], dim=2) for k in (0, 1))  # [rows, columns, m, .]
        soft = propagate(target, sources, labels, options.radius, options.topk)
        recent.append((target, soft))
        found = Image.fromarray(harden(soft, model.patch_size))
        yield np.asarray(found.resize((width, height), Image.Resampling.NEAREST))


def shown_at(model: Backbone, options: DavisOptions) -> int:
    """The shorter side of a frame, pixels: models made for less than 224 are shown as much less."""
    size = options.size or min(SIZE, round(SIZE * model.image_size / 224))
    return max(size // model.patch_size, 1) * model.patch_size


def segment(
    model: Backbone, clip: Clip, options: DavisOptions, out: Path, device: torch.device
) -> dict[str, list[list[float]]]:
    """Follow the objects of a clip, write a palette PNG a frame, and judge all but the first and last: J and F by object.

    Raises:
        ValueError: a frame or annotation cannot be used, or `out` not be written.
    """
    truth = [_truth(clip, i) for i in range(len(clip.annotations))]
    if (first := truth[0]).max() == 0:
        raise ValueError(f"{clip.annotations.root}/{clip.annotations.name(0)} outlines no object to follow.")
    with Image.open(Path(clip.annotations.root, clip.annotations.name(0))) as image:
        palette = image.getpalette() or [0, 0, 0, *[255] * 765]
    judged: dict[str, list[list[float]]] = {"j": [], "f": []}
    objects = range(1, int(first.max()) + 1)
    try:
        (out / clip.name).mkdir(parents=True, exist_ok=True)
        _write(first, palette, out / clip.name / clip.annotations.name(0))
        for i, found in enumerate(follow(model, clip, first, options, device), start=1):
            _write(found, palette, out / clip.name / clip.annotations.name(i))
            if i < len(truth) - 1:
                judged["j"].append([region(found == k, truth[i] == k) for k in objects])
                judged["f"].append([contour(found == k, truth[i] == k) for k in objects])
    except BadImage as error:
        raise ValueError(f"a frame of {clip.frames.root} cannot be used: {error.reason}; repair it.") from error
    except OSError as error:
        raise ValueError(f"the masks cannot be written to {out} ({error.strerror}); choose another --out.") from error
    return judged


def _truth(clip: Clip, index: int) -> np.ndarray:
    path = Path(clip.annotations.root, clip.annotations.name(index))
    try:
        outlined = object_indices(path)
        height, width = clip.frames.read(index).shape[:2]
    except BadImage as error:
        raise ValueError(f"frame {index} of {clip.name} cannot be used: {error.reason}; repair it.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error
    if outlined.shape != (height, width):
        h, w = outlined.shape
        raise ValueError(f"{path} is {w} x {h} pixels and its frame {width} x {height}; make them agree.")
    return np.where(outlined == 255, 0, outlined).astype(np.uint8)


def _write(objects: np.ndarray, palette: list[int], path: Path) -> None:
    image = Image.fromarray(objects)
    image.putpalette(palette)
    image.save(path)


# Table 5.
PAPER = {
    "vit_small/16": {"jf_mean": 61.8, "j_mean": 60.2, "f_mean": 63.4},
    "vit_base/16": {"jf_mean": 62.3, "j_mean": 60.7, "f_mean": 63.9},
    "vit_small/8": {"jf_mean": 69.9, "j_mean": 66.6, "f_mean": 73.1},
    "vit_base/8": {"jf_mean": 71.4, "j_mean": 67.9, "f_mean": 74.9},
}


def evaluate(model: Backbone, options: DavisOptions, device: torch.device) -> Judgement:
    """J, F and their mean over objects; a clip that was done with the same model and options is not done again."""
    clips, out = open_clips(options), _folder(options)
    size = shown_at(model, options)
    model.grid(size, size)  # refuses before any work
    settings = [fingerprint(model), size, options.protocol, options.queue, options.radius, options.topk]
    mine = range(distributed.rank(), len(clips), distributed.world_size())
    show = distributed.is_main() and sys.stderr.isatty()
    shares: list[tuple[int, dict[str, list[list[float]]]]] = []
    for i in track(mine, "videos", transient=True) if show else mine:
        done, stamp = (
            out / f"{clips[i].name}.json",
            _digest([*settings, clips[i].frames.stamp(), clips[i].annotations.stamp()]),
        )
        found = json.loads(done.read_text()) if done.is_file() else {}
        if found.get("stamp") != stamp:
            found = {"stamp": stamp, **segment(model, clips[i], options, out, device)}
            temporary = done.with_suffix(".tmp")
            temporary.write_text(json.dumps(found))
            os.replace(temporary, done)
        shares.append((i, found))
    results = dict(pair for share in distributed.gather(shares) for pair in share)
    columns: dict[str, list[tuple[float, float, float]]] = {"j": [], "f": []}
    by_video: dict[str, dict[str, float]] = {}
    for i, clip in enumerate(clips):
        for key, collected in columns.items():
            objects = [mean_recall_decay(values) for values in np.array(results[i][key]).T]
            collected += objects
            by_video.setdefault(clip.name, {})[f"{key}_mean"] = 100 * float(np.mean([o[0] for o in objects]))
    names = ("mean", "recall", "decay")
    figures = {
        f"{key}_{name}": 100 * float(np.mean([o[k] for o in collected]))
        for key, collected in columns.items()
        for k, name in enumerate(names)
    }
    return Judgement(
        {"jf_mean": (figures["j_mean"] + figures["f_mean"]) / 2, **figures},
        f"{options.protocol} protocol: labels of the {options.topk} most alike patches within {options.radius} rows and "
        f"columns in the first and the last {options.queue} frames, shorter side {size} pixels; masks in {out}",
        {clip.name: clip.frames.fingerprint for clip in clips},
        {"videos": len(clips), "objects": len(columns["j"])},
        {"videos_by_name": by_video},
    )


def _folder(options: DavisOptions) -> Path:
    if options.out is not None:
        return Path(options.out)
    path = result_path(options, "davis")
    if path is None:
        raise ValueError(f"{options.model} is no run directory; say with --out where the masks should go.")
    return path.with_suffix("")


def _digest(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
