"""The built-in data set: drawn scenes of four objects of one class, with labels and masks.

Image `i` of seed `s` is a function of (s, i) alone and drawn when it is first read; nothing is stored on disk. A class is
one of ten shapes with a pattern (two classes share each pattern). Places, sizes, rotations and colors of the four objects,
and whether they are lighter or darker than the background, do not depend on the class. So single pixels say little about
the class, while every crop of a scene shows it.

Lengths are shares of the image edge, y points down. A shape is a signed distance function of coordinates [h, w]
in which its area is about that of a unit disc: negative inside, zero on the outline, exact only near it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from dino.randomness import Stream, open_stream

Array = np.ndarray

SIZE_RANGE = (0.1, 0.125)  # radius of the disc that has the object's area
DISTANCE = (0.22, 0.32)  # of its center from the middle of the image
UNEVENNESS = 0.07  # largest distance of an object from its even place on the circle, in turns
MAX_TURN = 0.2  # rotation is drawn from +- this, in turns
CONTRAST = (0.22, 0.4)  # difference in luma between objects and background
TEXTURE_CONTRAST = (0.3, 0.4)  # and between the objects' two colors
BACKGROUND_MEAN = (0.4, 0.46)  # luma, white = 1
BACKGROUND_CELLS = 4  # cells per edge of the grid of colors behind the objects
BACKGROUND_LUMA = 0.03  # the cells' luma differs from their mean by up to this
BACKGROUND_HUE = 0.2  # and their hue by up to this, in turns
BACKGROUND_CHROMA = (0.03, 0.15)
GRAIN_CELLS = 48  # fixed, so that a scene has the same grain at any size
GRAIN = 0.005  # standard deviation, white = 1
HELD_OUT = 500  # scenes
KEPT = 10**8  # bytes of drawn scenes that a process keeps; drawing one takes milliseconds


# ---------------------------------------------------------------------------------------------------- shapes


def _fold(x: Array, y: Array, sectors: int) -> tuple[Array, Array]:
    """Coordinates mirrored into the first half sector of an n-fold symmetric shape with a corner at the top."""
    angle = np.abs((np.arctan2(x, -y) * (sectors / (2 * np.pi)) + 0.5) % 1 - 0.5) * (2 * np.pi / sectors)
    radius = np.hypot(x, y)
    return radius * np.cos(angle), radius * np.sin(angle)


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _triangle(x: Array, y: Array) -> Array:
    along, across = _fold(x, y, 3)
    return 0.5 * along + 0.866 * across - 0.778


def _star(x: Array, y: Array) -> Array:
    along, across = _fold(x, y, 5)
    # The edge from the outer corner (1.6, 0) to the inner one at radius 0.72 and half a sector.
    inner = 0.72 * np.cos(np.pi / 5), 0.72 * np.sin(np.pi / 5)
    length = np.hypot(1.6 - inner[0], inner[1])
    return ((along - 1.6) * inner[1] + across * (1.6 - inner[0])) / length


def _heart(x: Array, y: Array) -> Array:
    x, y = np.abs(x) / 1.95, 0.53 - y / 1.95  # the unit heart stands on its tip at (0, 0)
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    foot = np.maximum(x + y, 0) / 2
    edge = np.minimum(np.hypot(x, y - 1), np.hypot(x - foot, y - foot)) * np.sign(x - y)
    return 1.95 * np.where(x + y > 1, lobe, edge)


def _arrow(x: Array, y: Array) -> Array:
    y = np.abs(y)
    head = np.maximum(0.05 - x, (x - 1.5) * 0.634 + y * 0.773)
    return np.minimum(head, _box(x + 0.65, y, 0.75, 0.37))


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda x, y: np.hypot(x, y) - 1,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.95) - 0.34,
    "square": lambda x, y: _box(x, y, 0.886, 0.886),
    "triangle": _triangle,
    "star": _star,
    "cross": lambda x, y: np.minimum(_box(x, y, 1.2, 0.38), _box(x, y, 0.38, 1.2)),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1.3, 0.98 - np.hypot(x - 0.62, y)),
    "heart": _heart,
    "arrow": _arrow,
    "capsule": lambda x, y: np.hypot(np.maximum(np.abs(x) - 1.05, 0), y) - 0.54,
}


# -------------------------------------------------------------------------------------------------- textures


def _wave(x: Array) -> Array:
    """A square wave with soft edges, period 1, values 0 to 1."""
    return np.clip(0.5 + 1.5 * np.sin(2 * np.pi * x), 0, 1)


# Each is the share [h, w] of the second color; kind k has texture k modulo their number.
TEXTURES: tuple[Callable[[Array, Array], Array], ...] = (
    lambda x, y: np.zeros_like(x + y),  # plain
    lambda x, y: _wave(1.6 * x + 0 * y),  # upright stripes
    lambda x, y: _wave(1.6 * y + 0 * x),  # level stripes
    lambda x, y: np.abs(_wave(1.1 * x) - _wave(1.1 * y)),  # checks
    lambda x, y: _wave(1.2 * (x + y)),  # slanted stripes
)


# ---------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class _Scene:
    """The content of a scene, independent of the resolution."""

    shape: Callable[[Array, Array], Array]
    texture: Callable[[Array, Array], Array]
    poses: Array  # float32 [4, 4]: x and y of the center, radius, rotation in turns
    colors: Array  # float32 [2, 4, 3], first and second color of each object
    background: Array  # float32 [cells, cells, 3]
    grain: Array  # float32 [cells, cells]


def _color(luma: Array, hue: Array, chroma: Array) -> Array:
    """RGB [..., 3] of mean `luma`; hue in turns."""
    thirds = np.array([0, 1 / 3, 2 / 3])
    return np.asarray(luma)[..., None] + np.asarray(chroma)[..., None] * np.cos(2 * np.pi * (hue[..., None] - thirds))


def _poses(rng: np.random.Generator) -> Array:
    """Four objects around the middle, about a quarter turn apart: float32 [4, 4]."""
    radius = rng.uniform(*SIZE_RANGE, 4)
    angle = 2 * np.pi * (rng.uniform() + np.arange(4) / 4 + rng.uniform(-UNEVENNESS, UNEVENNESS, 4))
    distance = rng.uniform(*DISTANCE, 4)
    center = 0.5 + distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    turn = rng.uniform(-MAX_TURN, MAX_TURN, 4)
    return np.column_stack([center, radius, turn]).astype(np.float32)


def _scene(seed: int, index: int, label: int) -> _Scene:
    rng = open_stream(Stream.SCENES, seed, index)
    poses = _poses(rng)
    cells = (BACKGROUND_CELLS, BACKGROUND_CELLS)
    luma = rng.uniform(*BACKGROUND_MEAN)
    background = _color(
        luma + rng.uniform(-1, 1, cells) * BACKGROUND_LUMA,
        rng.uniform() + rng.uniform(-1, 1, cells) * BACKGROUND_HUE,
        rng.uniform(*BACKGROUND_CHROMA) * rng.uniform(0.5, 1.2, cells),
    )
    # All lighter or all darker than the background, each by another amount.
    first = luma + rng.choice([-1, 1]) * rng.uniform(*CONTRAST, 4)
    second = first + rng.uniform(*TEXTURE_CONTRAST, 4) * np.where(first < 0.5, 1, -1)
    hue = rng.uniform() + np.stack([np.zeros(4), rng.uniform(-0.12, 0.12, 4)])
    colors = _color(np.stack([first, second]), hue, rng.uniform(0.15, 0.35, 4))
    return _Scene(
        shape=list(SHAPES.values())[label],
        texture=TEXTURES[label % len(TEXTURES)],
        poses=poses,
        colors=np.clip(colors, 0.02, 0.98).astype(np.float32),
        background=np.clip(background, 0.02, 0.98).astype(np.float32),
        grain=rng.standard_normal((GRAIN_CELLS, GRAIN_CELLS), dtype=np.float32) * np.float32(GRAIN),
    )


def _object_coordinates(scene: _Scene, size: int) -> tuple[Array, Array, Array]:
    """x, y float32 [size, size] in the frame of the nearest object, in units of its radius, and which object it is."""
    cx, cy, radius, turn = scene.poses.T[..., None, None]
    cos, sin = np.cos(2 * np.pi * turn) / radius, np.sin(2 * np.pi * turn) / radius
    centers = ((np.arange(size) + 0.5) / size).astype(np.float32)  # of the pixels along an edge
    x, y = centers - cx, centers[:, None] - cy
    xs, ys = cos * x + sin * y, cos * y - sin * x  # [4, size, size]
    nearest = np.argmin(xs**2 + ys**2, axis=0)[None]
    x, y = np.take_along_axis(xs, nearest, 0)[0], np.take_along_axis(ys, nearest, 0)[0]
    return x, y, nearest[0]


def _draw(scene: _Scene, size: int) -> Array:
    """The scene as uint8 [size, size, 3]."""
    x, y, nearest = _object_coordinates(scene, size)
    distance = scene.shape(x, y)
    image = cv2.resize(scene.background, (size, size), interpolation=cv2.INTER_CUBIC)
    # A soft shadow around and a darker rim.
    image *= (1 - 0.3 * np.clip(1 - distance / 0.35, 0, 1) ** 2)[..., None]
    first, second = scene.colors[:, nearest]
    paint = first + scene.texture(x, y)[..., None] * (second - first)
    paint *= (0.88 + 0.12 * np.clip(-distance / 0.25, 0, 1))[..., None]
    cover = np.clip(0.5 - distance * scene.poses[nearest, 2] * size, 0, 1)[..., None]
    image += cover * (paint - image)
    smooth = cv2.INTER_AREA if size < GRAIN_CELLS else cv2.INTER_LINEAR
    image += cv2.resize(scene.grain, (size, size), interpolation=smooth)[..., None]
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


class Scenes:
    """Drawn scenes `first` to `first + num_images - 1` of a seed, as a source of labeled images.

    Other positions of the same seed give held-out images. Another `size` (edge, pixels) gives the same scenes at another
    resolution. Labels are balanced: each block of ten scenes holds each class once, in an order of its own.

    Raises:
        ValueError: a size or count cannot be drawn.
    """

    classes: tuple[str, ...] = tuple(SHAPES)

    def __init__(self, num_images: int, seed: int = 0, size: int = 48, first: int = 0) -> None:
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}; ask for at least 1 scene.")
        if size < 8:
            raise ValueError(f"size is {size}; a scene needs at least 8 pixels to show its object.")
        for name, value in (("seed", seed), ("first", first)):
            if not 0 <= value < 2**63:
                raise ValueError(f"{name} is {value}; it must be in [0, 2**63).")
        self.num_images, self.seed, self.size, self.first = num_images, seed, size, first
        self._drawn: dict[int, Array] = {}
        self.labels = _labels(num_images, seed, first)
        content = f"scenes 2 {seed} {size} {first}".encode() + self.labels.astype("<i8").tobytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_drawn": {}}  # a process draws its own

    def __len__(self) -> int:
        return self.num_images

    def at(self, size: int) -> Scenes:
        """The same scenes drawn at another size."""
        return Scenes(self.num_images, self.seed, size, self.first)

    def name(self, index: int) -> str:
        """'scene-00042': its position among all scenes of the seed."""
        return f"scene-{self.first + self._checked(index):05d}"

    def stamp(self) -> str:
        return ""  # the fingerprint says it all

    def read(self, index: int) -> Array:
        """The scene as uint8 [size, size, 3]."""
        image = self._drawn.get(index)
        if image is None:
            image = _draw(self._scene(index), self.size)
            if len(self._drawn) * image.nbytes < KEPT:
                self._drawn[index] = image
        return image.copy()

    def mask(self, index: int) -> Array:
        """Where the objects are, bool [size, size]."""
        scene = self._scene(index)
        return scene.shape(*_object_coordinates(scene, self.size)[:2]) < 0

    def _scene(self, index: int) -> _Scene:
        return _scene(self.seed, self.first + self._checked(index), int(self.labels[index]))

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.num_images:
            raise IndexError(f"scene {index} is out of range; there are {self.num_images}, counted from 0.")
        return index


def _labels(num_images: int, seed: int, first: int) -> Array:
    """int64 [num_images]; each block of ten positions is a permutation drawn from (seed, block)."""
    num = len(SHAPES)
    blocks = range(first // num, (first + num_images - 1) // num + 1)
    orders = [open_stream(Stream.SCENE_LABELS, seed, block).permutation(num) for block in blocks]
    start = first % num
    return np.concatenate(orders)[start : start + num_images].astype(np.int64)


def open_scenes(spec: str) -> tuple[Scenes, Scenes]:
    """Training and held-out scenes of 'scenes' or 'scenes:NUMBER'.

    Raises:
        ValueError: NUMBER is no number from 1 to 10 million.
    """
    count = spec.partition(":")[2] or "3000"
    if not (count.isdecimal() and len(count) < 9 and 1 <= int(count) <= 10**7):
        raise ValueError(
            f"--data {spec[:99]}: write scenes:NUMBER with 1 to 10,000,000 images to draw, e.g. scenes:3000."
        )
    train = Scenes(int(count))
    return train, Scenes(HELD_OUT, first=len(train))
