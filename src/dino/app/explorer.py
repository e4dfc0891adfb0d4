"""What the explorer shows, as pictures: one model, one embedding, any image.

A page's visitors share the model, so whatever runs it holds the lock. Errors are `ValueError`s of one sentence.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from dino import weights
from dino.data.decode import BadImage, decode
from dino.data.open import open_images
from dino.data.sources import Source, WithPlaceholders, evenly_spaced
from dino.engine.checkpoint import Checkpoints
from dino.features.embed import Folder, embed
from dino.features.search import Index, check_same_model, duplicates, search_index
from dino.look.patches import extract_patches, fit_axes
from dino.look.pictures import (
    ColoredPatches,
    Look,
    attention_maps,
    choose_size,
    draw_heat,
    draw_mosaic,
    enlarge_cells,
    fit_image,
)
from dino.models import Backbone
from dino.weights import fingerprint

MOST_PIXELS, MOST_SIZE = 50_000_000, 1024  # of an image that a browser sends; of its shorter side as it is looked at
THUMBNAIL, LEGIBLE = 240, 360  # pixels of the longer edge; at least of the shorter
OFFERED = 24  # images of the data to pick from
MOST_CHECKPOINTS = 8  # of a run, evenly spaced
MOST_GROUPS, MOST_OF_GROUP = 20, 6  # near-copies shown
SHARD = 256  # images indexed between two signs of progress

Captioned = tuple[np.ndarray, str]


@dataclass(frozen=True)
class Shown:
    """An image as the model is shown it."""

    pixels: np.ndarray  # [h, w, 3] uint8, of whole patches
    original: np.ndarray  # as it was read
    features: Tensor  # [cells, d], of length 1
    colors: np.ndarray  # [h, w, 3] uint8, the features on their three main axes
    look: Look | None  # None: this model has no attention

    @property
    def zoom(self) -> int:
        """How many times larger a page shows it, lest small images are too small to click on."""
        return -(-LEGIBLE // min(self.pixels.shape[:2]))

    def zoomed(self, picture: np.ndarray | None = None) -> np.ndarray:
        """A picture of its size, or itself, as large as that."""
        picture = self.pixels if picture is None else picture
        return picture.repeat(self.zoom, axis=0).repeat(self.zoom, axis=1)


class Explorer:
    """A model, and if there are any, images to pick from, an embedding of them, and the run it comes from."""

    def __init__(self, model: Backbone, run: Path | None, data: str | None, embedding: str | None):
        self.model, self.run, self.data = model, run, data
        self.lock = threading.Lock()
        self.source: Source | None = None if data is None else open_images(data)
        self.neighbors: Index | None = None  # of an embedding
        if embedding is not None:
            self._use(Folder.open(embedding))
            if self.source is None:
                self.source = self.images

    # --- one image -------------------------------------------------------------------------------------------------

    def open(self, file: str | int, size: int) -> Shown:
        """An image file, or one of `offered` by position, `size` pixels on its shorter side."""
        try:
            original = decode(Path(file), MOST_PIXELS) if isinstance(file, str) else self._offered(file)
        except BadImage as error:
            raise ValueError(f"This cannot be shown: {error.reason}.") from error
        return self.resize(original, size)

    def resize(self, original: np.ndarray, size: int) -> Shown:
        with self.lock:
            pixels = fit_image(self.model, original, size)
            features = extract_patches(self.model, pixels)
            look = attention_maps(self.model, pixels, size) if self.sees else None
            return Shown(pixels, original, F.normalize(features, dim=1), self._painted(pixels, features), look)

    @property
    def sees(self) -> bool:
        """Whether the model has attention to show."""
        return self.model.has_attention

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Least, most, usual and step of the edge of an image's shorter side, pixels."""
        usual, patch = choose_size(self.model, None), self.model.patch_size
        return 4 * patch, max(usual, min(64, MOST_SIZE // patch) * patch), usual, patch

    def heads(self, shown: Shown) -> list[Captioned]:
        assert shown.look is not None
        return [(shown.pixels, "the image"), *self._captioned(shown.look.maps)]

    def masks(self, shown: Shown, mass: float) -> list[Captioned]:
        """The image where `mass` of each head's attention lies."""
        assert shown.look is not None
        return self._captioned(replace(shown.look, mass=mass).overlays)

    @staticmethod
    def _captioned(pictures: list[np.ndarray]) -> list[Captioned]:
        names = ["mean of all heads", *(f"head {j}" for j in range(len(pictures) - 1))]
        return list(zip([pictures[-1], *pictures[:-1]], names, strict=True))

    def colors(self, shown: Shown) -> np.ndarray:
        """Its patches' features as colors."""
        return shown.zoomed(shown.colors)

    def _painted(self, pixels: np.ndarray, features: Tensor) -> np.ndarray:
        colors = fit_axes([features]).colors(features).view(*self.model.grid(*pixels.shape[:2]), 3)
        return ColoredPatches(pixels, colors.numpy()).picture

    def alike(self, a: Shown, b: Shown | None, point: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
        """How like the patch at `point` (x, y; pixels of `a` zoomed) is to each patch of `a` and of `b`."""
        rows, columns = self._grid(a)
        height, width = (a.zoom * edge for edge in a.pixels.shape[:2])
        row, column = min(point[1] * rows // height, rows - 1), min(point[0] * columns // width, columns - 1)
        wanted = a.features[row * columns + column]
        first = self._heated(a, a.features @ wanted, row * columns + column)
        if b is None:
            return first, None
        cosine = b.features @ wanted
        return first, self._heated(b, cosine, int(cosine.argmax()))

    def _grid(self, shown: Shown) -> tuple[int, int]:
        rows, columns = self.model.grid(*shown.pixels.shape[:2])
        return rows, columns

    def _heated(self, shown: Shown, cosine: Tensor, cell: int) -> np.ndarray:
        """The image under the map of cosines [cells], with a frame round a cell."""
        rows, columns = self._grid(shown)
        map_ = enlarge_cells(draw_heat(cosine.clamp(min=0).view(rows, columns).numpy() ** 2), shown.pixels)
        picture = Image.fromarray(shown.zoomed((0.35 * shown.pixels + 0.65 * map_).astype(np.uint8)))
        left, top = cell % columns * picture.width // columns, cell // columns * picture.height // rows
        box = [left - 1, top - 1, left + picture.width // columns, top + picture.height // rows]
        ImageDraw.Draw(picture).rectangle(box, outline="white", width=3)
        return np.asarray(picture)

    # --- a run's checkpoints -----------------------------------------------------------------------------------------

    @cached_property
    def checkpoints(self) -> list[Path]:
        found = Checkpoints(self.run / "checkpoints").complete() if self.run is not None else []
        return [found[i] for i in evenly_spaced(len(found), MOST_CHECKPOINTS)]

    def over_time(self, shown: Shown, size: int) -> np.ndarray:
        """The image as each checkpoint's teacher sees it: attention above, features of patches below."""
        if not self.checkpoints:
            raise ValueError("There are no checkpoints: start the explorer with a run directory.")
        rows: list[list[np.ndarray | str]] = [[shown.pixels], ["features of\npatches"]]
        for path in self.checkpoints:
            model = weights.load(path).to(next(self.model.parameters()).device)
            if self.sees:
                rows[0].append(attention_maps(model, shown.pixels, size).maps[-1])
            rows[1].append(self._painted(shown.pixels, extract_patches(model, shown.pixels)))
        titles = ["image", *(f"step {int(path.stem.removeprefix('step-')):,}" for path in self.checkpoints)]
        return np.asarray(draw_mosaic(rows if self.sees else [[shown.pixels, *rows[1][1:]]], titles))

    # --- many images -------------------------------------------------------------------------------------------------

    @cached_property
    def offered(self) -> list[np.ndarray]:
        """Some images of the data, as thumbnails."""
        return [] if self.source is None else [draw_thumbnail(self.source, i) for i in self._spread(self.source)]

    @staticmethod
    def _spread(source: Source) -> Sequence[int]:
        return evenly_spaced(len(source), OFFERED)

    def _offered(self, number: int) -> np.ndarray:
        assert self.source is not None
        return self.source.read(self._spread(self.source)[number])

    def _use(self, folder: Folder) -> None:
        check_same_model(folder, self.model)
        embedding = folder.read()
        self.images, self.neighbors = embedding.images(), Index(embedding)

    def index(self, cache: Path) -> Iterator[tuple[int, int]]:
        """Embed the data, or use what `cache` has of it: images done, and of how many."""
        if self.source is None or self.data is None:
            raise ValueError("There are no images to index: start the explorer with --data FOLDER.")
        out = cache / f"{fingerprint(self.model)[:16]}-{self.source.fingerprint[:16]}.parquet"
        out.parent.mkdir(parents=True, exist_ok=True)
        failed: list[Exception] = []

        def work() -> None:
            try:
                embed(self.model, str(self.data), out, shard=SHARD)
            except Exception as error:
                failed.append(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        while worker.is_alive():
            worker.join(0.5)
            done = len(list(out.glob("*.parquet"))) * SHARD if out.is_dir() else 0
            yield min(done, len(self.source)), len(self.source)
        if failed:
            raise failed[0]
        self._use(Folder.open(out))

    def nearest(self, shown: Shown, k: int) -> list[Captioned]:
        """The most similar images of the embedding, with cosine and name."""
        with self.lock:
            found = search_index(self._ready(), self.model, [shown.original], k)
        embedding = found.embedding
        return [
            (draw_thumbnail(self.images, int(embedding.positions[row])), f"{cosine:.3f}  {embedding.names[row]}")
            for cosine, row in zip(found.cosine[0].tolist(), found.rows[0].tolist(), strict=True)
        ]

    def copies(self) -> tuple[str, list[Captioned]]:
        """Groups of near-copies: how many there are, and the largest."""
        embedding = self._ready().embedding
        groups = duplicates(embedding)
        count = sum(map(len, groups))
        said = f"{count:,} of {len(embedding.names):,} images are near-copies, in groups: {len(groups):,}."
        if len(groups) > MOST_GROUPS:
            said += f" The {MOST_GROUPS} largest are shown."
        shown = [
            (draw_thumbnail(self.images, int(embedding.positions[row])), f"{number} · {embedding.names[row]}")
            for number, group in enumerate(groups[:MOST_GROUPS], 1)
            for row in group[:MOST_OF_GROUP]
        ]
        return said, shown

    def _ready(self) -> Index:
        if self.neighbors is None:
            raise ValueError("The images are not indexed yet: press the button first.")
        return self.neighbors


def draw_thumbnail(source: Source, position: int) -> np.ndarray:
    """A gray square where the image cannot be read."""
    picture = Image.fromarray(WithPlaceholders(source).read(position))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(picture)


def find_newest_run(folder: Path = Path("runs")) -> str:
    """The run directory in `folder` whose model was written last.

    Raises:
        ValueError: there is none.
    """
    found = sorted(folder.glob(f"*/{weights.WEIGHTS}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(
            f"there is no run in {folder}/; give a run directory or a model, e.g. dino app runs/a, or train one first: "
            "dino train --data photos/"
        )
    return str(found[-1].parent)
