"""Carry labels from frame to frame by the similarity of patch features (paper section 4.2.2, table 5)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino.features.extract import require_finite
from dino.look.patches import prepare_image
from dino.models import Backbone

TEMPERATURE = 0.1
# Edge in patches. A tile's similarities with 8 frames at radius 12 take 6 MB, whatever the size of the frames.
TILE = 12


def find_neighborhoods(
    height: int, width: int, radius: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice], Tensor]]:
    """Cut a grid of patches into tiles. Each patch sees the patches within `radius` rows and columns.

    Yields:
        rows and columns of a tile (t patches); rows and columns of all patches that it sees (s patches); and which patch
        sees which, bool [t, s].
    """
    rows, columns = (torch.arange(n, device=device) for n in (height, width))
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            tile = slice(top, top + TILE), slice(left, left + TILE)
            seen = slice(max(top - radius, 0), top + TILE + radius), slice(max(left - radius, 0), left + TILE + radius)
            vertical, horizontal = (
                (line[a][:, None] - line[b]).abs() <= radius
                for line, a, b in zip((rows, columns), tile, seen, strict=True)
            )
            yield tile, seen, (vertical[:, None, :, None] & horizontal[None, :, None, :]).flatten(2).flatten(0, 1)


def propagate(target: Tensor, sources: Tensor, labels: Tensor, radius: int, top_k: int) -> Tensor:
    """Label the patches of a frame: the mean of the labels of the `top_k` most similar source patches, weighted by
    exp(cosine / 0.1). A patch sees those at most `radius` rows and columns away, in every source frame. Patches that
    tie with the last of the `top_k` count too.

    A tile of patches is compared only with the patches that it sees, so there is no matrix of all pairs.

    Args:
        target: unit features [h, w, d]; sources: unit features [f, h, w, d]; labels: theirs [f, h, w, c].

    Returns:
        [h, w, c]
    """
    height, width, dim = target.shape
    out = labels.new_empty(height, width, labels.shape[-1])
    for tile, seen, visible in find_neighborhoods(height, width, radius, target.device):
        similarity = target[tile].reshape(-1, dim) @ sources[:, *seen].reshape(-1, dim).T
        similarity = similarity.view(len(visible), len(sources), -1).masked_fill_(~visible[:, None], -torch.inf)
        similarity = similarity.flatten(1)
        least = similarity.topk(min(top_k, similarity.shape[1])).values[:, -1:]
        weights = similarity.masked_fill_(similarity < least, -torch.inf).div_(TEMPERATURE).softmax(dim=1)
        found = weights @ labels[:, *seen].reshape(-1, labels.shape[-1])
        out[tile] = found.view(out[tile].shape)
    return out


def follow(features: Iterable[Tensor], first: Tensor, queue: int, radius: int, top_k: int) -> Iterator[Tensor]:
    """Label each frame after the first from the first and from the `queue` frames before it.

    Args:
        features: of each frame in order [h, w, d]; first: labels of the first frame's patches [h, w, c].

    Yields:
        [h, w, c]
    """
    frames = (F.normalize(frame, dim=-1) for frame in features)
    start, previous = (next(frames), first), deque[tuple[Tensor, Tensor]](maxlen=queue)
    for frame in frames:
        sources, labels = (torch.stack(part) for part in zip(start, *previous, strict=True))
        found = propagate(frame, sources, labels, radius, top_k)
        previous.append((frame, found))
        yield found


def fit_view(height: int, width: int, size: int, patch_size: int) -> tuple[int, int]:
    """Height and width that a frame is resized to: shorter side `size`, same aspect ratio, both cut to whole patches.
    From 480 pixels on the longer side is a multiple of 64, as in the reference."""
    step = 64 if size >= 480 and 64 % patch_size == 0 else patch_size
    shorter = size // patch_size * patch_size
    longer = shorter * max(height, width) // min(height, width) // step * step
    return (longer, shorter) if height > width else (shorter, longer)


@torch.no_grad()
def extract_frame(model: Backbone, image: np.ndarray, view: tuple[int, int], original: bool = False) -> Tensor:
    """Patch features after the last norm of a frame [h, w, 3] uint8 resized to `view`: [rows, columns, d] float32.

    Args:
        original: divide red by the reference's 0.228, not by ImageNet's 0.229.
    """
    resized = cv2.resize(image, (view[1], view[0]), interpolation=cv2.INTER_LINEAR)
    pixels = prepare_image(model, resized)
    if original and model.in_channels == 3:
        pixels[:, 0] *= model.preprocessing.std[0] / 0.228
    return require_finite(model.tokens(pixels)[-1][0, 1:].float(), model).unflatten(0, model.grid(*view))


def soften(indices: np.ndarray, grid: tuple[int, int], objects: int) -> Tensor:
    """One-hot labels of patches [rows, columns, 1 + objects] from a mask's indices [h, w], taken at each patch's center."""
    small = np.array(Image.fromarray(indices).resize((grid[1], grid[0]), Image.Resampling.NEAREST))
    return F.one_hot(torch.from_numpy(small).long(), objects + 1).float()


def harden(labels: Tensor, view: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Indices of a mask [height, width] uint8 from patches' labels [rows, columns, c].

    Labels are enlarged to `view` pixels and each is stretched to [0, 1]. A pixel gets the object whose label is largest,
    and the result is resized to `shape`.
    """
    maps = F.interpolate(labels.permute(2, 0, 1)[None], view, mode="bilinear", align_corners=False)[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    # A label that is the same everywhere, but not 0, cannot be stretched; it wins, as NaN does in the reference's maximum.
    stretched = torch.where(high > 0, ((maps - low) / (high - low)).nan_to_num(torch.inf), maps)
    winner = stretched.argmax(dim=0).byte().cpu().numpy()
    return np.asarray(Image.fromarray(winner).resize((shape[1], shape[0]), Image.Resampling.NEAREST))
