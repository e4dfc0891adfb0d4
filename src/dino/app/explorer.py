"""What the explorer shows, as pictures: one model, one embedding, any image.

Visitors of the page share the model; it runs under a lock. Every error is a `ValueError` of one sentence. Numbers that
come from the page (a position, a size, a point, a share) are whatever its visitor has sent, and are checked here.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dino import weights
from dino.app.atlas import Atlas, Captioned, check_whole, draw_thumbnail
from dino.data.decode import BadImage, decode
from dino.data.image_files import Images
from dino.data.open import open_images
from dino.data.sources import Source, evenly_spaced, spread_over_classes
from dino.features.embed import embed
from dino.features.embedding import Folder
from dino.features.search import Index, check_same_model
from dino.html import format_cosines
from dino.look import drawing, pictures
from dino.look.patches import extract_patches, fit_axes
from dino.models import Backbone
from dino.weights import fingerprint
from dino.weights.checkpoints import get_step, list_checkpoints
from dino.weights.runs import list_on_the_way

UPLOAD_PIXELS = 50_000_000  # of an image that a browser sends
MAX_SIZE = 1024  # pixels of the shorter side that the model is given
MAX_PATCHES = 2**13  # of an image as the model gets it; the work grows with their square
MIN_LEGIBLE = 360  # pixels of the shorter side; a smaller picture is enlarged, so that its patches can be clicked on
MAX_LENGTH = 4096  # pixels of the longer side of an enlarged picture
NUM_OFFERED = 24  # images of the data to pick from
MAX_TEACHERS = 10  # of a run, evenly spaced
SHARD = 256  # images that are indexed between two reports of progress


@dataclass(frozen=True)
class ShownImage:
    """An image as the model gets it, and what the model makes of it."""

    pixels: np.ndarray  # [h, w, 3] uint8, of whole patches
    original: np.ndarray  # [h, w, 3] uint8, as it was read
    features: Tensor  # [rows, columns, d], a vector of length 1 for each patch
    colors: np.ndarray  # [h, w, 3] uint8, the features on their three main axes
    look: pictures.Look | None  # None: this model has no attention

    @property
    def zoom(self) -> int:
        """How many times larger the page shows it, a very long one not beyond MAX_LENGTH."""
        shorter, longer = sorted(self.pixels.shape[:2])
        return min(-(-MIN_LEGIBLE // shorter), max(1, MAX_LENGTH // longer))

    def enlarge(self, picture: np.ndarray | None = None) -> np.ndarray:
        """A picture of the size of `pixels`, by default `pixels`, `zoom` times larger."""
        picture = self.pixels if picture is None else picture
        return picture.repeat(self.zoom, axis=0).repeat(self.zoom, axis=1)

    def draw_cosines(self, cosine: Tensor, row: int, column: int) -> np.ndarray:
        """The image under the map of cosines [rows, columns], with a frame around one patch."""
        heat = drawing.lay_over(self.pixels, drawing.draw_heat(cosine.clamp(min=0).numpy() ** 2))
        picture = Image.fromarray(self.enlarge(heat))
        rows, columns = cosine.shape
        left, top = column * picture.width // columns, row * picture.height // rows
        box = [left - 1, top - 1, left + picture.width // columns, top + picture.height // rows]
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(14, picture.width // 28))
        draw.rectangle(box, outline="white", width=3)
        said = " to ".join(format_cosines([cosine.min().item(), cosine.max().item()]))
        draw.text((6, picture.height - 6), f"cosine {said}", "white", font, "lb", stroke_width=2, stroke_fill="black")
        return np.asarray(picture)

    def draw_heads(self) -> list[Captioned]:
        assert self.look is not None
        return [(self.look.photo, "the image"), *_caption_heads(self.look.heated, self.look.ranges)]

    def draw_masks(self, mass: float) -> list[Captioned]:
        """The image within the patches that hold `mass` of each head's attention."""
        assert self.look is not None
        if not isinstance(mass, int | float) or not 0 < mass <= 1:
            raise ValueError("The share of the attention must be a number above 0 and up to 1.")
        return _caption_heads(replace(self.look, mass=mass).overlays, [""] * len(self.look.attention))


class Explorer:
    """A model, and if there are any, images to pick from, an embedding of them, and the run it comes from."""

    def __init__(self, model: Backbone, run: Path | None, data: str | None, embedding: str | None):
        self.model, self.run, self.data = model, run, data
        self.lock = threading.Lock()
        self.source: Source | None = None if data is None else open_images(data)
        self.neighbors: Index | None = None  # of an embedding
        self.atlas: Atlas | None = None  # of the same
        if embedding is not None:
            self._use_embedding(Folder.open(embedding))
            self.source = self.atlas.images if self.atlas and self.source is None else self.source

    # --- one image -------------------------------------------------------------------------------------------------

    def open_file(self, file: Path, size: int) -> ShownImage:
        """An image file, `size` pixels on its shorter side."""
        with _explain():
            return self.show_pixels(decode(file, UPLOAD_PIXELS), size)

    def open_offered(self, position: int, size: int) -> ShownImage:
        """One of `thumbnails`, `size` pixels on its shorter side."""
        check_whole(position, 0, len(self._offered) - 1, "The position of an image")
        assert self.source is not None
        with _explain():
            return self.show_pixels(self.source.read(self._offered[position]), size)

    def show_pixels(self, original: np.ndarray, size: int) -> ShownImage:
        check_whole(size, *self.sizes[:2], "The shorter side")
        short, long = sorted(original.shape[:2])
        if (size / self.model.patch_size) ** 2 * long / short > MAX_PATCHES:  # before it is enlarged to them
            raise ValueError(
                f"This cannot be shown: {long} x {short} pixels are too long and narrow for this size; choose a smaller "
                "shorter side, or crop the image."
            )
        with self.lock:
            pixels, photo = pictures.fit_image(self.model, original, size)
            features = extract_patches(self.model, pixels)
            seen = pictures.Fitted(pixels, drawing.fit_cell(photo))
            look = pictures.attention_maps(self.model, seen, size) if self.model.has_attention else None
            unit = F.normalize(features, dim=1).view(*self.model.grid(*pixels.shape[:2]), -1)
            return ShownImage(pixels, original, unit, self._color_features(pixels, features), look)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Minimum, maximum, default and step of the shorter side of an image, pixels."""
        usual, patch = pictures.choose_size(self.model, None), self.model.patch_size
        return 4 * patch, max(usual, min(64, MAX_SIZE // patch) * patch), usual, patch

    def _color_features(self, pixels: np.ndarray, features: Tensor) -> np.ndarray:
        colors = fit_axes([features]).colors(features).view(*self.model.grid(*pixels.shape[:2]), 3)
        return pictures.ColoredPatches(pixels, colors.numpy(), pixels).picture

    # --- a run's teachers -----------------------------------------------------------------------------------------

    @cached_property
    def teachers(self) -> list[Path]:
        """Files of teachers on the way, else checkpoints."""
        if self.run is None:
            return []
        found = list_on_the_way(self.run) or list_checkpoints(self.run / "checkpoints")
        return [found[i] for i in evenly_spaced(len(found), MAX_TEACHERS)]

    def draw_teachers(self, shown: ShownImage) -> np.ndarray:
        """The image as each teacher on the way sees it: attention above, features of patches below."""
        if not self.teachers:
            raise ValueError("There are no teachers of a run: start the explorer with a run directory.")
        attention: list[np.ndarray | str] = [shown.pixels]
        features: list[np.ndarray | str] = ["features of\npatches" if self.model.has_attention else shown.pixels]
        steps, said = [f"step {get_step(path):,}" for path in self.teachers], [""] * len(self.teachers)
        for path in self.teachers:
            model = weights.load(path).to(next(self.model.parameters()).device)
            if model.has_attention:
                look = pictures.attention_maps(model, shown.pixels, min(shown.pixels.shape[:2])).only(None)
                attention += look.heated
                said[len(attention) - 2] = look.ranges[0]
            features.append(self._color_features(shown.pixels, extract_patches(model, shown.pixels)))
        titles = ["image", *map("\n".join, zip(steps, said, strict=True))]
        rows = [attention, features] if self.model.has_attention else [features]
        return np.asarray(drawing.draw_mosaic(rows, titles))

    # --- many images -------------------------------------------------------------------------------------------------

    @cached_property
    def thumbnails(self) -> list[np.ndarray]:
        """Some images of the data to pick from."""
        return [] if self.source is None else [draw_thumbnail(self.source, i) for i in self._offered]

    @property
    def _offered(self) -> Sequence[int]:
        """Positions in the data, at first of different classes."""
        return [] if self.source is None else spread_over_classes(self.source, NUM_OFFERED)[:NUM_OFFERED]

    def _use_embedding(self, folder: Folder) -> None:
        check_same_model(folder, self.model)
        embedding = folder.read()
        self.neighbors, self.atlas = Index(embedding), Atlas(embedding, folder.images())

    def index_images(self, cache: Path) -> Iterator[tuple[int, int]]:
        """Embed the data, or use the embedding in `cache`; yields how many images are done, of how many."""
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

        worker = threading.Thread(target=work, daemon=True)  # does not keep the program from ending
        worker.start()
        while worker.is_alive():
            worker.join(0.5)
            done = len(list(out.glob("*.parquet"))) * SHARD  # none while there is no such folder
            yield min(done, len(self.source)), len(self.source)
        if failed:
            raise failed[0]
        self._use_embedding(Folder.open(out))

    def find_nearest(self, shown: ShownImage, k: int) -> list[Captioned]:
        """The most similar images of the embedding, with cosine and name."""
        if self.neighbors is None or self.atlas is None:
            raise ValueError("The images are not indexed yet: press the button first.")
        with self.lock:
            found = self.neighbors.search(self.model, Images([shown.original]), k)
        cosines = format_cosines(found.cosine[0].tolist())
        nearest = zip(cosines, found.rows[0].tolist(), strict=True)
        return [self.atlas.draw(row, f"{cosine}  ") for cosine, row in nearest]


@contextlib.contextmanager
def _explain() -> Iterator[None]:
    """Around the reading of an image."""
    try:
        yield
    except BadImage as error:
        raise ValueError(f"This cannot be shown: {error.reason}.") from error


def draw_alike(a: ShownImage, b: ShownImage | None, point: Sequence[int]) -> tuple[np.ndarray, np.ndarray | None]:
    """How similar each patch of `a` and of `b` is to the patch of `a` at `point` (x, y; pixels of `a` enlarged)."""
    (rows, columns, _), (height, width, _) = a.features.shape, a.pixels.shape
    if not isinstance(point, list | tuple) or len(point) != 2:
        raise ValueError("A point must be two numbers, x and y.")
    x, y = (check_whole(at, 0, a.zoom * edge, "A point") for at, edge in zip(point, (width, height), strict=True))
    row, column = min(y * rows // (a.zoom * height), rows - 1), min(x * columns // (a.zoom * width), columns - 1)
    wanted = a.features[row, column]
    first = a.draw_cosines(a.features @ wanted, row, column)
    if b is None:
        return first, None
    cosine = b.features @ wanted
    return first, b.draw_cosines(cosine, *divmod(int(cosine.argmax()), cosine.shape[1]))


def _caption_heads(maps: list[np.ndarray], said: list[str]) -> list[Captioned]:
    """One picture for each head, and that of their mean, which is last in `maps` and first on the page."""
    names = [*(f"head {j}" for j in range(len(maps) - 1)), "mean of all heads"]
    named = [(picture, ": ".join(filter(None, both))) for picture, *both in zip(maps, names, said, strict=True)]
    return [named[-1], *named[:-1]]


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
