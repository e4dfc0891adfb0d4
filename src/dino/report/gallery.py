"""The report's sections of pictures: attention, patch-feature colors, nearest neighbors, training views.

Which images are shown is a function of the data alone: evenly spaced ones, of different classes where classes are known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino.data.decode import BadImage
from dino.data.evaluation_views import resize_and_crop
from dino.data.normalize import normalize
from dino.data.render import CpuRenderer
from dino.data.scenes import Scenes
from dino.data.sources import Source, evenly_spaced
from dino.data.views import Views, draw_views
from dino.features.extract import extract
from dino.html import NEIGHBORS, draw_image, draw_neighbors, draw_tile, encode_image, get_label
from dino.look.attention import jaccard
from dino.look.pictures import MOST_PATCHES, Look, attention_maps, pca_colors, to_bytes
from dino.models import NO_ATTENTION, Backbone
from dino.options import required
from dino.report.run import Run

SHOWN, VIEWED = 6, 4
CANDIDATES = 48  # positions looked at for SHOWN images of different classes that can be read
BANK = 2000  # most training images among which neighbors are looked for
CPU_WORK = 3e11  # multiplications that a CPU may spend on them, a few seconds' worth
MASS = 0.6


class Picture(NamedTuple):
    position: int  # in its source
    pixels: np.ndarray  # [h, w, 3] uint8, as stored


@dataclass(frozen=True)
class Gallery:
    """What the sections share; each image in it was read once."""

    run: Run
    model: Backbone  # on `device`
    device: torch.device
    source: Source
    shown: Source  # held-out images, or the training images where none are held out
    pictures: list[Picture]  # of `shown`

    @classmethod
    def open(cls, run: Run, model: Backbone, source: Source, held_out: Source | None, device: torch.device) -> Gallery:
        shown = source if held_out is None else held_out
        return cls(run, model, device, source, shown, choose_pictures(shown, SHOWN))

    @property
    def held_out(self) -> bool:
        return self.shown is not self.source

    def sections(self) -> dict[str, str]:
        """Title to HTML."""
        if not self.pictures:
            return {"Pictures": "<p>None of the images tried could be read.</p>"}
        return {
            "Where it looks": self.attention(),
            "What it takes for alike": self.colors(),
            "Nearest neighbors": self.neighbors(),
            "What it trained on": self.views(),
        }

    # --- sections ----------------------------------------------------------------------------------------------

    def attention(self) -> str:
        """Maps and masks of each head, where the architecture has them."""
        if not self.model.has_attention:
            return f"<p>{escape(NO_ATTENTION[0].upper() + NO_ATTENTION[1:])}</p>"
        size = self._close_size()
        scenes = self._scenes(size)
        rows = []
        for picture in self.pictures:
            pixels = resize_and_crop(picture.pixels if scenes is None else scenes.read(picture.position), size)
            truth = None if scenes is None else torch.from_numpy(scenes.mask(picture.position))
            rows.append(self._looks(picture, attention_maps(self.model, pixels, size, MASS), truth))
        side = size // self.model.patch_size
        intro = (
            f"Self-attention of the [CLS] token over {side} &times; {side} patches in the last block, head by head: bright "
            f"is where a head looks, and beneath it the patches that hold {100 * MASS:.0f} % of its attention. Nobody told "
            "the model what an object is; that masks settle on objects, and heads on different parts, is what the paper "
            "found. Diffuse or identical maps are a sign of too little training."
        )
        if scenes is not None:
            intro += (
                " The figure under a mask is its overlap (Jaccard) with the drawn objects, and the best head is marked."
            )
        return f"<p>{intro}</p>" + "".join(rows)

    def _looks(self, picture: Picture, shown: Look, truth: Tensor | None) -> str:
        overlap = None if truth is None else 100 * jaccard(shown.masks, truth[None])
        best = -1 if overlap is None else int(overlap[:-1].argmax())
        names = [*(f"head {j}" for j in range(len(shown.attention) - 1)), "mean"]
        tiles = [draw_tile(shown.image, self._caption(picture), "whole")]
        for j, (name, lit, overlay) in enumerate(zip(names, shown.maps, shown.overlays, strict=True)):
            text = escape(name) if overlap is None else f"{escape(name)} <b>{overlap[j]:.0f}&nbsp;%</b>"
            pair = draw_image(lit, f"attention, {name}") + draw_image(overlay, f"mask, {name}")
            tiles.append(
                f'<figure class="pair{" best" if j == best else ""}">{pair}<figcaption>{text}</figcaption></figure>'
            )
        # Few heads fill the line; many wrap.
        kind, columns = ("looks few", f' style="--columns:{len(names)}"') if len(names) <= 7 else ("looks", "")
        return f'<div class="{kind}"{columns}>{"".join(tiles)}</div>'

    def colors(self) -> str:
        """Principal components of patch features, one basis for all images."""
        size = self._close_size()
        scenes = self._scenes(size)
        squares = [
            resize_and_crop(p.pixels if scenes is None else scenes.read(p.position), size) for p in self.pictures
        ]
        pairs = ""
        for picture, shown in zip(self.pictures, pca_colors(self.model, squares, size), strict=True):
            patches = draw_image(to_bytes(shown.colors), "patch features as colors", "pixels")
            pairs += f'<figure class="pair">{draw_image(shown.image, self._name(picture))}{patches}</figure>'
        return (
            "<p>The features of all patches on their three main axes, as red, green and blue. One basis for all images, "
            "so the same color means the same kind of patch anywhere. Good features give objects a color of their own "
            f'and tell their parts apart.</p><div class="row six">{pairs}</div>'
        )

    def neighbors(self) -> str:
        """Rows of a query and the training images whose features are most like its own."""
        size = self.model.image_size
        squares = [resize_and_crop(picture.pixels, size) for picture in self.pictures]
        bank = extract(self.model, self.source, size, self.device, self._bank())
        with torch.no_grad():
            queries = self.model(self._normalized(squares)).float().cpu()
        similarity = F.normalize(queries, dim=1) @ F.normalize(bank.values, dim=1).T
        if not self.held_out:  # an image is not its own neighbor
            itself = torch.tensor([p.position for p in self.pictures])[:, None] == torch.from_numpy(bank.indices)
            similarity[itself] = -2
        nearest = similarity.topk(min(NEIGHBORS, len(bank.indices)), dim=1)
        rows, same, judged = "", 0, 0
        for picture, square, likeness, places in zip(self.pictures, squares, *nearest, strict=True):
            wanted, positions = get_label(self.shown, picture.position), bank.indices[places.numpy()].tolist()
            found = [pair for pair in zip(likeness.tolist(), positions, strict=True) if pair[0] >= -1]
            row, ticks = draw_neighbors(square, self._caption(picture), wanted, self.source, found)
            rows, judged, same = rows + row, judged + len(ticks), same + sum(ticks)
        what = "held-out images" if self.held_out else "training images"
        score = f" Here {same} of {judged} share the query's class, marked with a tick." if judged else ""
        return (
            f"<p>On the left {what}, then the training images with the most similar features (cosine similarity "
            f"beneath, among {len(bank.indices)}).{score} Good neighbors share the content and not just the colors."
            f"</p>{rows}"
        )

    def views(self) -> str:
        """Crops and colors the run's first epoch drew, through the training pipeline itself."""
        options = self.run.options.views
        pictures = choose_pictures(self.source, VIEWED)
        shapes = np.array([picture.pixels.shape[:2] for picture in pictures]).reshape(-1, 2)
        chosen = draw_views(options, self.run.options.seed, 0, [p.position for p in pictures], shapes)
        groups = CpuRenderer().prepare([picture.pixels for picture in pictures], chosen)
        rendered = [view for group in groups for view in group.numpy()]  # [v] of [n, s, s, 3]
        rows = ""
        for i, picture in enumerate(pictures):
            crops = {"global": "", "local": ""}
            for v, view in enumerate(rendered):
                kind = "global" if v < 2 else "local"
                crops[kind] += draw_image(view[i], f"{kind} view", kind)
            name = escape(self.source.name(picture.position))
            rows += f'<div class="views"><figure title="{name}">{draw_boxes(picture.pixels, chosen, i)}'
            rows += f"<figcaption>{name}</figcaption></figure><div><div>{crops['global']}</div>"
            rows += f"<div>{crops['local']}</div></div></div>"
        return (
            f"<p>The student sees all views of an image: two global ones ({options.sizes[0]} pixels) and {options.num_local} "
            f"local ones ({required(options.local_size)} pixels). The teacher sees only the global ones, and the student "
            "learns to give its answer from any of them. These are the views of the first epoch, drawn and rendered as "
            'in training; the outlines show where they were cut (<span class="key global">global</span>, <span '
            f'class="key local">local</span>). Can you still tell what each shows?</p><div class="samples">{rows}</div>'
        )

    # --- helpers -----------------------------------------------------------------------------------------------

    def _close_size(self) -> int:
        """Twice the training resolution shows finer maps; beyond 512 pixels they cost more than they tell."""
        own, patch = self.model.image_size, self.model.patch_size
        size = min(max(own, min(2 * own, 512)) // patch, math.isqrt(MOST_PATCHES)) * patch
        try:
            self.model.grid(size, size)
        except ValueError:  # an architecture of one size
            return own
        return size

    def _normalized(self, squares: list[np.ndarray]) -> Tensor:
        """Pixels [h, w, 3] uint8 of equal size as the model takes them."""
        return normalize(torch.from_numpy(np.stack(squares))[None].to(self.device), self.model.in_channels)

    def _scenes(self, size: int) -> Scenes | None:
        """The shown scenes drawn at `size`, where they are scenes."""
        return self.shown.at(size) if isinstance(self.shown, Scenes) else None

    def _bank(self) -> Sequence[int]:
        model = self.model
        cells = math.prod(model.grid(model.image_size, model.image_size))
        work = (1 + cells) * sum(parameter.numel() for parameter in model.parameters())
        most = BANK if self.device.type == "cuda" else int(min(BANK, max(200, CPU_WORK / work)))
        return evenly_spaced(len(self.source), most)

    def _name(self, picture: Picture) -> str:
        return self.shown.name(picture.position)

    def _caption(self, picture: Picture) -> str:
        label = get_label(self.shown, picture.position)
        return escape(self._name(picture).rpartition("/")[2] if label is None else label)


def choose_pictures(source: Source, most: int) -> list[Picture]:
    """At most `most` readable images, evenly spaced, of different classes first."""
    positions = evenly_spaced(len(source), CANDIDATES)
    first: list[int] = []
    for i in positions:
        label = None if source.labels is None else source.labels[i]
        if label is None or label < 0 or all(source.labels[j] != label for j in first):  # pyright: ignore
            first.append(i)
    if len(first) > most:  # the whole range, not its beginning
        preferred = [first[i] for i in evenly_spaced(len(first), most)]
        first = preferred + [i for i in first if i not in preferred]
    pictures: list[Picture] = []
    for i in first + [i for i in positions if i not in first]:
        if len(pictures) == most:
            break
        try:
            pictures.append(Picture(i, source.read(i)))
        except BadImage:
            continue
    return sorted(pictures)


def draw_boxes(pixels: np.ndarray, views: Views, i: int) -> str:
    """The image with outlines of the boxes that its views were cut from."""
    height, width = pixels.shape[:2]
    outlines = ""
    for v, (top, left, h, w) in reversed(list(enumerate(views.box[i].tolist()))):
        kind = "global" if v < 2 else "local"
        outlines += f'<rect class="{kind}" x="{left}" y="{top}" width="{w}" height="{h}"/>'
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="original with the boxes of its views">'
        f'<image href="{encode_image(pixels)}" width="{width}" height="{height}"/>{outlines}</svg>'
    )
