"""Copy detection: find the original of an edited copy among distractors (paper table 4)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino.data.image_files import open_source
from dino.data.sources import Source, Subset
from dino.eval.evaluate import Result, choose_view_size
from dino.eval.floors import describe_plainly, read_views
from dino.eval.ranking import average_precision, extract_comparable
from dino.features.neighbors import split_rows
from dino.models import Backbone
from dino.options.evaluate import CopydetectOptions

SIZE = 320  # pixels, for a model trained at 224
SMALL = 32  # pixels, of what needs no network
TOP = 20  # ranks that the original protocol counts
BLOCKS = ("strong", "jpegqual", "crops")
LAYOUT = "expected are DATA/original/ and at least one of DATA/strong/, DATA/jpegqual/N/ and DATA/crops/N/"


def rank_originals(copies: Tensor, database: Tensor, owners: Tensor) -> np.ndarray:
    """Rank of each copy's original [n] in the database of all originals and distractors, counted from 0.

    Images as near as the original rank before it, so a model that gives all images the same feature finds nothing.

    Args:
        copies, database: features of length 1, one row per image.
        owners: index in the database of each copy's original [n].
    """
    found = []
    for part in split_rows(len(copies), len(database)):
        similarity = copies[part] @ database.T
        found.append((similarity >= similarity.gather(1, owners[part, None])).sum(dim=1) - 1)
    return torch.cat(found).cpu().numpy()


def score_ranks(ranks: np.ndarray, blocks: Sequence[str], top: int | None) -> dict[str, float]:
    """Mean average precision of each block of copies, in percent. An original below the `top` ranks is not found."""
    found = [average_precision(np.array([p] if top is None or p < top else [], int), 1) for p in ranks.tolist()]
    precisions, of = np.array(found), np.array(blocks)
    order = sorted(set(blocks), key=lambda name: (not name.startswith("strong"), name))
    return {f"{block}_map": 100 * float(np.mean(precisions[of == block])) for block in order}


def find_original(name: str, stems: dict[str, int]) -> int | None:
    """The original of a copy, by name: it has the stem of the copy, or the longest part of it that ends before an '_'."""
    words = Path(name).stem.split("_")
    candidates = ("_".join(words[:n]) for n in range(len(words), 0, -1))
    return next((stems[stem] for stem in candidates if stem in stems), None)


def match_copies(originals: Source, copies: Source, characters: int | None, where: str) -> list[int]:
    """Index of each copy's original. The first `characters` of their names agree; None: see `find_original`.

    Raises:
        ValueError: two originals have the same name, or a copy has no original.
    """
    stems: dict[str, int] = {}
    for i in range(len(originals)):
        stem = Path(originals.name(i)).stem[:characters]
        if stem in stems:
            raise ValueError(
                f"the originals {originals.name(stems[stem])} and {originals.name(i)} are both '{stem}' to their "
                "copies; rename one."
            )
        stems[stem] = i
    owners = []
    for i in range(len(copies)):
        name = copies.name(i)
        owner = find_original(name, stems) if characters is None else stems.get(Path(name).stem[:characters])
        if owner is None:
            raise ValueError(f"the copy {name} of {where} belongs to no original by its name; rename or remove it.")
        owners.append(owner)
    return owners


def open_copies(options: CopydetectOptions) -> tuple[Source, Source, list[int], list[str]]:
    """Originals, copies, and for each copy the index of its original and its block.

    Raises:
        ValueError: the folders are laid out otherwise, or see `match_copies`.
    """
    if options.data is None:
        assert options.originals is not None
        assert options.copies is not None
        originals, copies = open_source(options.originals, "none"), open_source(options.copies, "none")
        owners = match_copies(originals, copies, None, options.copies)
        return originals, copies, owners, [os.path.dirname(copies.name(i)) or "copies" for i in range(len(copies))]
    root = Path(options.data).expanduser()
    if not (root / "original").is_dir() or not any((root / block).is_dir() for block in BLOCKS):
        raise ValueError(f"--data {root} is not laid out as Copydays; {LAYOUT}. Other data: --originals and --copies.")
    everything = open_source(options.data, "none")
    mine = [i for i in range(len(everything)) if everything.name(i).split("/")[0] in BLOCKS]
    if not mine:
        raise ValueError(f"--data {root} holds no copies; {LAYOUT}.")
    originals, copies = open_source(str(root / "original"), "none"), Subset(everything, mine)
    blocks = [os.path.dirname(copies.name(i)) for i in range(len(copies))]
    return originals, copies, match_copies(originals, copies, 4, options.data), blocks


def find_floors(
    sources: dict[str, Source], owners: list[int], blocks: Sequence[str], top: int | None
) -> dict[str, dict[str, float]]:
    """The same figures of raw pixels and of color histograms, of the central squares."""
    views = {part: read_views(source, np.arange(len(source)), SMALL, "floors") for part, source in sources.items()}
    found = {}
    for name, describe in describe_plainly(SMALL).items():
        features = {part: F.normalize(describe(read).values, dim=1) for part, read in views.items()}
        database = torch.cat([features[part] for part in ("originals", "distractors") if part in features])
        found[name] = score_ranks(rank_originals(features["copies"], database, torch.tensor(owners)), blocks, top)
    return found


def evaluate(model: Backbone, options: CopydetectOptions, device: torch.device) -> Result:
    """Mean average precision by the cosine of [CLS] and GeM-pooled patch features (p = 4), exact, in float32."""
    originals, copies, owners, blocks = open_copies(options)
    size = options.size or choose_view_size(None, model, SIZE) // model.patch_size * model.patch_size
    model.grid(size, size)  # refuses before any work
    sources = {"originals": originals, "copies": copies}
    if options.distractors is not None:
        sources["distractors"] = open_source(options.distractors, "none")
    features, _, whitened, data = extract_comparable(model, options, device, size, "cls+gem", "stretched", sources)
    database = torch.cat([features[part] for part in ("originals", "distractors") if part in features])
    found = rank_originals(features["copies"], database, torch.tensor(owners, device=device))
    top = TOP if options.protocol == "original" else None
    figures = score_ranks(found, blocks, top)
    floors = find_floors(sources, owners, blocks, top)
    return Result(
        figures,
        f"{options.protocol} protocol: cosine of [CLS] and GeM features at {size} x {size} pixels{whitened}, average "
        f"precision on {'the whole ranking' if top is None else f'the first {top} ranks'}",
        data,
        {part: len(source) for part, source in sources.items()},
        floors={figure: {name: of[figure] for name, of in floors.items()} for figure in figures},
    )
