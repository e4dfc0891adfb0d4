"""Video object segmentation on DAVIS-2017 (paper table 5): frozen features carry the masks of the first frame through
each video, and region (J) and boundary (F) similarity are measured as the benchmark does.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image

from dino import distributed, files
from dino.data.decode import BadImage
from dino.data.image_files import Files, open_listed
from dino.data.labels import read_text
from dino.eval.evaluate import Result, choose_view_size, locate_result, measure_each
from dino.eval.masks import read_objects
from dino.eval.propagation import extract_frame, fit_view, follow, harden, soften
from dino.models import Backbone
from dino.options.evaluate import DavisOptions
from dino.terminal import track
from dino.weights import fingerprint

SIZE = 480  # pixels, for a model trained at 224
LIST = Path("ImageSets", "2017", "val.txt")
LAYOUT = f"expected are DATA/JPEGImages/480p/VIDEO/00000.jpg, DATA/Annotations/480p/VIDEO/00000.png and DATA/{LIST}"
TOLERANCE = 0.008  # distance of boundaries that still agree, as a share of the image's diagonal
# Palette of DAVIS's own masks. Index i gives its bits 0, 3 and 6 to red, highest first, 1, 4 and 7 to green, 2 and 5 to blue.
PALETTE = [sum((i >> 3 * j + c & 1) << 7 - j for j in range(3)) for i in range(256) for c in range(3)]

# --- the measures ---------------------------------------------------------------------------------------------------


def region(mask: np.ndarray, truth: np.ndarray) -> float:
    """J: intersection over union of masks, bool [h, w]; 1 where both are empty."""
    either = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / either if either else 1.0


def contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one to the right, the one below, or the one below to the right, bool [h, w]."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def boundary(mask: np.ndarray, truth: np.ndarray) -> float:
    """F: harmonic mean of two shares, of each mask's contour the part near the other's contour; masks are bool [h, w]."""
    found, expected = contour(mask), contour(truth)
    if not found.any() or not expected.any():
        return float(found.any() == expected.any())
    radius = int(np.ceil(TOLERANCE * np.hypot(*mask.shape)))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x * x + y * y <= radius * radius).astype(np.uint8)
    precision = (cv2.dilate(expected.astype(np.uint8), disk) > 0)[found].mean()
    recall = (cv2.dilate(found.astype(np.uint8), disk) > 0)[expected].mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def summarize(values: np.ndarray) -> dict[str, float]:
    """Mean, recall (share above 0.5) and decay (mean of the first quarter minus the last) of values [frames]."""
    second, _, last = np.floor(np.linspace(0, len(values) - 1, 5)[1:4] + 0.5).astype(int)
    decay = values[: second + 1].mean() - values[last:].mean()
    return {"mean": float(values.mean()), "recall": float((values > 0.5).mean()), "decay": float(decay)}


# --- the videos -----------------------------------------------------------------------------------------------------


class Video(NamedTuple):
    name: str
    frames: Files
    masks: Files  # at the same positions
    objects: int


def open_videos(data: str) -> list[Video]:
    """The videos of the validation list.

    Raises:
        ValueError: the folder is not laid out as it should be, or a video cannot be used.
    """
    root = Path(data).expanduser()
    if not (root / LIST).is_file():
        raise ValueError(f"--data {root} is not laid out as DAVIS-2017, {root / LIST} is missing; {LAYOUT}.")
    names = dict.fromkeys(read_text(str(root / LIST)).split())
    if not names:
        raise ValueError(f"{root / LIST} names no video; write one per line.")
    return [open_video(root, name) for name in names]


def open_video(root: Path, name: str) -> Video:
    images, masks = root / "JPEGImages" / "480p", root / "Annotations" / "480p"
    if not (images / name).is_dir():
        raise ValueError(f"{images / name} is missing, a video that {LIST} names; {LAYOUT}.")
    stems = sorted(path.stem for path in (images / name).glob("*.jpg"))
    if len(stems) < 3:
        raise ValueError(
            f"video {name} has {len(stems)} frame{'s' * (len(stems) != 1)}; all but the first and the last are measured, so "
            "it needs at least 3."
        )
    _check_order(name, stems)
    frames = open_listed(images, [f"{name}/{stem}.jpg" for stem in stems], name, LAYOUT)
    truth = open_listed(masks, [f"{name}/{stem}.png" for stem in stems], f"the frames of {name}", LAYOUT)
    expected = _read_size(frames, 0)
    for listed, what in ((frames, "frame"), (truth, "annotation")):
        for i in range(len(listed)):
            if (size := _read_size(listed, i)) != expected:
                raise ValueError(
                    f"{what} {listed.name(i)} is {size} pixels and the first frame of the video {expected}; make them agree."
                )
    objects = int(_read_indices(truth, 0).max())
    if not objects:
        raise ValueError(
            f"the annotation {truth.name(0)} of the first frame holds no object; palette indices 1 to 254 are."
        )
    return Video(name, frames, truth, objects)


def _check_order(name: str, stems: list[str]) -> None:
    if odd := [stem for stem in stems if not stem.isdecimal()]:
        raise ValueError(
            f"frame {odd[0]}.jpg of video {name} is not named by a number; name frames 00000.jpg, 00001.jpg, ..."
        )
    steps = np.diff([int(stem) for stem in stems])
    wrong = np.flatnonzero(steps != min((step for step in steps if step > 0), default=1))
    if len(wrong):
        raise ValueError(
            f"frames of video {name} are out of order or missing: by name {stems[wrong[0]]}.jpg is followed by "
            f"{stems[wrong[0] + 1]}.jpg; number them with leading zeros, in even steps."
        )


def _read_size(files: Files, index: int) -> str:
    path = Path(files.root, files.name(index))
    try:
        with Image.open(path) as image:
            return f"{image.width} x {image.height}"
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise ValueError(f"{path} cannot be read as an image ({type(error).__name__}); replace it.") from error


def _read_indices(masks: Files, index: int) -> np.ndarray:
    """Read the object of each pixel, uint8 [h, w]; unknown pixels (255) become background, as in the benchmark."""
    try:
        indices = read_objects(Path(masks.root, masks.name(index)))
    except BadImage as error:
        raise ValueError(f"frame {masks.name(index)[:-4]}: {error.reason}.") from error
    return np.where(indices == 255, 0, indices).astype(np.uint8)


# --- the evaluation -------------------------------------------------------------------------------------------------


def segment(model: Backbone, video: Video, options: DavisOptions) -> Iterator[np.ndarray]:
    """Yield the mask of each frame after the first, uint8 [h, w]; memory does not grow with the video's length.

    Raises:
        ValueError: a frame cannot be read.
    """
    first = _read_indices(video.masks, 0)
    shape = first.shape[0], first.shape[1]
    view = fit_view(*shape, choose_view_size(options.size, model, SIZE), model.patch_size)

    def features() -> Iterator[torch.Tensor]:
        for index in range(len(video.frames)):
            try:
                image = video.frames.read(index)
            except BadImage as error:
                raise ValueError(
                    f"frame {video.frames.name(index)} cannot be read ({error.reason}); replace it."
                ) from error
            yield extract_frame(model, image, view, options.protocol == "original")

    start = soften(first, model.grid(*view), video.objects).to(next(model.parameters()).device)
    for labels in follow(features(), start, options.queue, options.neighborhood, options.top_k):
        yield harden(labels, view, shape)


def measure_video(model: Backbone, digest: str, video: Video, options: DavisOptions, out: Path) -> dict[str, Any]:
    """Write the masks of a video to out/VIDEO/, and measure J and F of every object and frame [objects, frames - 2].

    Both are kept in figures.json beside the masks. It is written last, and read instead of computing everything again if
    model, video and options are the same.
    """
    folder = out / video.name
    key = ["still", digest]
    key += [part for of in (video.frames, video.masks) for part in (of.fingerprint, of.stamp())]
    key += [str(x) for x in (options.size, options.protocol, options.queue, options.neighborhood, options.top_k)]
    done, found = folder / "figures.json", {"of": hashlib.sha256(json.dumps(key).encode()).hexdigest()}
    try:
        if (kept := json.loads(done.read_text()))["of"] == found["of"]:
            return kept
    except (OSError, ValueError, KeyError):
        pass
    with files.naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
    values: list[list[tuple[float, float]]] = []
    still, first = [], _read_indices(video.masks, 0)  # what the first mask has where it is left there
    masks = itertools.chain([first], segment(model, video, options))
    for index, mask in enumerate(track(masks, len(video.frames), video.name)):
        picture = Image.fromarray(mask)
        picture.putpalette(PALETTE)
        with files.replacing(folder / Path(video.masks.name(index)).name) as temporary:
            picture.save(temporary, "PNG")
        if 0 < index < len(video.frames) - 1:
            truth, objects = _read_indices(video.masks, index), range(1, video.objects + 1)
            for rows, one in ((values, mask), (still, first)):
                rows.append([(region(one == k, truth == k), boundary(one == k, truth == k)) for k in objects])
    for rows, names in ((values, "jf"), (still, ("still j", "still f"))):
        found |= dict(zip(names, np.array(rows).transpose(2, 1, 0).tolist(), strict=True))
    files.write(done, json.dumps(found) + "\n")
    return found


def make_masks_folder(options: DavisOptions) -> Path:
    """The folder for masks: --out, or beside the result.

    Raises:
        ValueError: there is neither, or it cannot be written.
    """
    path = locate_result(options, "davis")
    if options.out is None and path is None:
        raise ValueError(f"{options.model} is no run directory that can be written; give --out FOLDER for the masks.")
    folder = path.with_suffix(".masks") if options.out is None and path else Path(str(options.out))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"masks cannot be written to {folder} ({error.strerror}); choose another --out.") from error
    return folder


def describe_objects(found: dict[str, Any], names: Sequence[str]) -> list[dict[str, dict[str, float]]]:
    """Statistics of each object of a video, of the J and F by these names in its figures.json."""
    regions, boundaries = (np.array(found[name]) for name in names)
    return [{"j": summarize(j), "f": summarize(f)} for j, f in zip(regions, boundaries, strict=True)]


def average_objects(every: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    names = itertools.product("jf", ("mean", "recall", "decay"))
    figures = {f"{m}_{what}": 100 * float(np.mean([one[m][what] for one in every])) for m, what in names}
    return {"jf_mean": (figures["j_mean"] + figures["f_mean"]) / 2} | figures


def evaluate(model: Backbone, options: DavisOptions, device: torch.device) -> Result:
    """J, F and their mean over all objects."""
    choose_view_size(options.size, model, SIZE)  # refuses a wrong size before any work
    videos = {video.name: video for video in open_videos(options.data)}
    out, digest, found = make_masks_folder(options), fingerprint(model), {}
    measured = measure_each(list(videos), lambda name: measure_video(model, digest, videos[name], options, out))
    for name, result in measured.items():
        if isinstance(result, str):
            raise ValueError(result)
        found[name] = result
    if distributed.is_main():
        print(f"Masks: {out}")
    objects = {name: describe_objects(result, "jf") for name, result in found.items()}
    every = list(itertools.chain.from_iterable(objects.values()))
    prefix = "davis2017_" if (len(videos), len(every)) == (30, 61) else ""
    figures = average_objects(every)
    still = (describe_objects(result, ("still j", "still f")) for result in found.values())
    floors = average_objects([*itertools.chain.from_iterable(still)])
    floors = {name: value for name, value in floors.items() if not name.endswith("decay")}  # of which less is better
    frames, masks = (
        hashlib.sha256("".join(files.fingerprint for files in part).encode()).hexdigest()
        for part in ([v.frames for v in videos.values()], [v.masks for v in videos.values()])
    )
    return Result(
        {prefix + name: value for name, value in figures.items()},
        f"{options.protocol} protocol: labels propagated from the first and {options.queue} previous frames, "
        f"{options.top_k} most similar patches within {options.neighborhood} rows and columns",
        {"frames": frames, "annotations": masks},
        {"videos": len(videos), "frames": sum(len(v.frames) for v in videos.values()), "objects": len(every)},
        {"objects": objects},
        floors={prefix + name: {"the first mask, left where it is": value} for name, value in floors.items()},
    )
