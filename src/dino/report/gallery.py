"""The report's sections of pictures: attention, patch-feature colors, nearest neighbors, training views.

Which images are shown is a function of the data alone: evenly spaced ones, of different classes where classes are known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from markupsafe import Markup
from PIL import Image

from dino.data.decode import BadImage
from dino.data.evaluation_views import resize_and_crop
from dino.data.image_files import Images
from dino.data.render import CpuRenderer
from dino.data.scenes import Scenes
from dino.data.sources import Source, evenly_spaced, spread_over_classes
from dino.data.views import draw_views
from dino.features.extract import extract
from dino.features.neighbors import find_neighbors
from dino.html import EDGE, NUM_NEIGHBORS, get_label, read_row, render
from dino.look.attention import MOST_PATCHES, jaccard
from dino.look.drawing import to_bytes
from dino.look.pictures import Fitted, attention_maps, fit_image, pca_colors
from dino.models import NO_ATTENTION, Backbone
from dino.options import required
from dino.report.run import Run

NUM_SHOWN, NUM_VIEWED = 6, 4  # images in the sections of held-out images; in the section of training views
MAX_BANK = 2000  # training images among which neighbors are searched
MAX_CPU_WORK = 3e11  # multiplications for their features on a CPU, which take a few seconds
MOST_EDGE = 640  # pixels of a photograph with attention over it
MASS = 0.6  # share of the attention that a mask keeps


class Picture(NamedTuple):
    position: int  # in its source
    pixels: np.ndarray  # [h, w, 3] uint8, as stored


@dataclass(frozen=True)
class Gallery:
    """What the sections share. Each image is read once."""

    run: Run
    model: Backbone  # on `device`
    device: torch.device
    source: Source
    shown: Source  # held-out images, or the training images where none are held out
    pictures: list[Picture]  # of `shown`

    @classmethod
    def open(cls, run: Run, model: Backbone, source: Source, held_out: Source | None, device: torch.device) -> Gallery:
        shown = source if held_out is None else held_out
        return cls(run, model, device, source, shown, choose_pictures(shown, NUM_SHOWN))

    def render_sections(self) -> dict[str, Markup]:
        """HTML by title."""
        if not self.pictures:
            return {"Pictures": render("text", text="None of the images tried could be read.")}
        return {
            "Where it looks": self.render_attention(),
            "What it takes for alike": self.render_colors(),
            "Nearest neighbors": self.render_neighbors(),
            "What it trained on": self.render_views(),
        }

    # --- sections ----------------------------------------------------------------------------------------------

    def render_attention(self) -> Markup:
        """Maps and masks of each head, where the architecture has attention."""
        if not self.model.has_attention:
            return render("text", text=NO_ATTENTION[0].upper() + NO_ATTENTION[1:])
        pictures = []
        for picture, photo in zip(self.pictures, self.photos, strict=True):
            look = attention_maps(self.model, photo, self.close_size, MASS)
            names = [*(f"head {j}" for j in range(len(look.attention) - 1)), "mean map"]
            overlap, best = [None] * len(names), None
            if self.scenes is not None:
                truth = torch.from_numpy(self.scenes.mask(picture.position))
                overlap = (100 * jaccard(look.masks, truth[None])).tolist()
                best = int(np.argmax(overlap))  # the mean of all maps may be better than each
            heads = [*zip(names, look.heated, look.overlays, overlap, look.ranges, strict=True)]
            pictures.append({"image": look.photo, "caption": self._caption(picture), "heads": heads, "best": best})
        side, scenes = self.close_size // self.model.patch_size, self.scenes is not None
        kinds = {"best_head": "best head", "mean_map": "mean map", "mean_head": "average over heads"}
        figures = {what: self.run.get_metric(f"jaccard_{kind}")[1][-1:] for kind, what in kinds.items()}
        return render("attention", pictures=pictures, side=side, mass=MASS, scenes=scenes, figures=figures)

    def render_colors(self) -> Markup:
        """Principal components of patch features, one basis for all images."""
        colored = pca_colors(self.model, self.photos, self.close_size)
        names = [self.shown.name(picture.position) for picture in self.pictures]
        pictures = [(name, c.image, to_bytes(c.colors)) for name, c in zip(names, colored, strict=True)]
        return render("colors", pictures=pictures)

    def render_neighbors(self) -> Markup:
        """Rows of a query and the training images with the most similar features."""
        size, held_out = self.model.view_size, self.shown is not self.source
        bank = extract(self.model, self.source, size, self._choose_bank())
        queries = extract(self.model, Images([picture.pixels for picture in self.pictures]), size).values
        nearest = find_neighbors(F.normalize(queries, dim=1), F.normalize(bank.values, dim=1), NUM_NEIGHBORS + 1)
        rows = []
        for picture, cosines, places in zip(self.pictures, *nearest, strict=True):
            found = zip(cosines.tolist(), bank.indices[places.numpy()].tolist(), strict=True)
            others = [pair for pair in found if held_out or pair[1] != picture.position]  # not the image itself
            label, edge = get_label(self.shown, picture.position), min(picture.pixels.shape[:2])
            square = resize_and_crop(picture.pixels, max(size, min(edge, EDGE)))  # as people see it, not the model
            rows.append(read_row(square, self._caption(picture), label, self.source, others[:NUM_NEIGHBORS]))
        same = [found.same for row in rows for found in row.neighbors if found.same is not None]
        return render("neighbors", rows=rows, held_out=held_out, num_images=len(bank.indices), same=same)

    def render_views(self) -> Markup:
        """Views that the first epoch of the run drew, rendered by the training pipeline itself."""
        options = self.run.options.views
        pictures = choose_pictures(self.source, NUM_VIEWED)
        shapes = np.array([picture.pixels.shape[:2] for picture in pictures]).reshape(-1, 2)
        chosen = draw_views(options, self.run.options.seed, 0, [p.position for p in pictures], shapes)
        groups = CpuRenderer().prepare([picture.pixels for picture in pictures], chosen)
        views = [view for group in groups for view in group.numpy()]  # one [n, s, s, 3] of n pictures for each view
        kinds = ["global"] * 2 + ["local"] * required(options.num_local)
        samples = [
            {
                "name": self.source.name(picture.position),
                "pixels": picture.pixels,
                "boxes": [*zip(kinds, chosen.box[i].tolist(), strict=True)][::-1],
                "global_crops": [view[i] for view in views[:2]],
                "local_crops": [view[i] for view in views[2:]],
            }
            for i, picture in enumerate(pictures)
        ]
        return render("views", samples=samples, options=options)

    # --- helpers -----------------------------------------------------------------------------------------------

    @cached_property
    def close_size(self) -> int:
        """Twice the training resolution shows finer maps. More than 512 pixels are slow and show little more."""
        own, patch = self.model.view_size, self.model.patch_size
        size = min(max(own, min(2 * own, 512)) // patch, math.isqrt(MOST_PATCHES)) * patch
        try:
            self.model.grid(size, size)
        except ValueError:  # an architecture of one size
            return own
        return size

    @cached_property
    def scenes(self) -> Scenes | None:
        """The shown images drawn again at `close_size`, if they are scenes."""
        return self.shown.at(self.close_size) if isinstance(self.shown, Scenes) else None

    @cached_property
    def photos(self) -> Sequence[Fitted | np.ndarray]:
        """The pictures in their own shape, or as squares of `close_size` where the architecture takes no others."""
        if self.scenes is not None:
            return [self.scenes.read(picture.position) for picture in self.pictures]
        try:
            return [fit_image(self.model, shrink(picture.pixels), self.close_size) for picture in self.pictures]
        except ValueError:
            return [resize_and_crop(picture.pixels, self.close_size) for picture in self.pictures]

    def _choose_bank(self) -> Sequence[int]:
        """Positions of the training images among which neighbors are searched, fewer for a large model on a CPU."""
        model = self.model
        cells = math.prod(model.grid(model.view_size, model.view_size))
        work = (1 + cells) * sum(parameter.numel() for parameter in model.parameters())
        most = MAX_BANK if self.device.type != "cpu" else int(min(MAX_BANK, max(200, MAX_CPU_WORK / work)))
        return evenly_spaced(len(self.source), most)

    def _caption(self, picture: Picture) -> str:
        label = get_label(self.shown, picture.position)
        return self.shown.name(picture.position).rpartition("/")[2] if label is None else label


def shrink(pixels: np.ndarray) -> np.ndarray:
    """The middle of a photograph, at most twice as long as wide, with at most MOST_EDGE pixels on its longer side."""
    height, width = pixels.shape[:2]
    top, left = max(0, height - 2 * width) // 2, max(0, width - 2 * height) // 2
    middle = Image.fromarray(pixels[top : height - top, left : width - left])
    middle.thumbnail((MOST_EDGE, MOST_EDGE))
    return np.asarray(middle)


def choose_pictures(source: Source, most: int) -> list[Picture]:
    """At most `most` readable images, evenly spaced, of different classes first."""
    pictures: list[Picture] = []
    for i in spread_over_classes(source, most):
        if len(pictures) == most:
            break
        try:
            pictures.append(Picture(i, source.read(i)))
        except BadImage:
            continue
    return sorted(pictures)
