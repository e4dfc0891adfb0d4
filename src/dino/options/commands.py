"""Options of commands that use a model. The text under a field is its help on the command line."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from dino.options.rules import (
    AttentionMass,
    Few,
    NoneOrFew,
    NonNegativeInt,
    Options,
    Part,
    Pixels,
    PositiveInt,
    Rule,
    Seed,
    between,
)


class InferenceOptions(Options):
    """For commands that look at images with a trained model."""

    model: Positional[str]
    """A run directory (its best teacher; with :last the last), a release (see `dino models`) or a weight file."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


class LookOptions(InferenceOptions):
    size: Pixels | None = None
    """Edge the image's shorter side is resized to, pixels. None: twice what the model was trained at."""
    stride: Pixels | None = None
    """Pixels from a patch to the next, for finer maps of overlapping patches, e.g. 8 of 16. None: side by side."""


class PcaOptions(LookOptions):
    images: Positional[tuple[str, ...]]
    """Image files or folders."""
    out: str = "pca"
    """Folder to write the pictures to."""


class AttentionOptions(PcaOptions):
    out: str = "attention"
    """Folder to write the pictures to."""
    mass: AttentionMass = 0.6
    """Share of the attention that the mask keeps."""
    panel: bool = False
    """Write also all images, cut to squares, into one panel.png: a row each, a column for each head."""


class MatchOptions(LookOptions):
    a: Positional[str]
    """An image."""
    b: Positional[str]
    """Another image."""
    out: str = "match.png"
    """Picture to write."""
    lines: NonNegativeInt = 50
    """Most pairs to draw, those that are most alike."""


class VideoOptions(LookOptions):
    clip: Positional[str]
    """A video (mp4, mov, webm, gif, ...), or a folder of frames named in their order."""
    show: Literal["attention", "mask", "pca"] = "attention"
    """A map of the attention, the picture where most of it lies, or the features of patches as colors."""
    head: NoneOrFew | None = None
    """Whose attention. None: the mean of all heads."""
    mass: AttentionMass = 0.6
    """Share of the attention that the mask keeps."""
    alone: bool = False
    """Leave out the clip itself, which is shown on the left."""
    fps: Annotated[float, between(0.1, 1000)] = 24.0
    """Frames per second of a folder of frames; videos say their own."""
    out: str | None = None
    """Video to write, an .mp4. None: CLIP-SHOW.mp4 in the working directory."""


class TsneOptions(InferenceOptions):
    data: str
    """Labeled images: a folder of classes, a folder with train/ and val/, of which val/ is used, scenes:NUMBER, or
    torchvision:NAME:FOLDER, of which the test images are used."""
    size: Pixels | None = None
    """Edge of the evaluation view, pixels. None: what the model was made for."""
    out: str = "tsne.png"
    """Figure to write: .png, .svg or .pdf."""


class NeighborsOptions(TsneOptions):
    data: str
    """Labeled images: a folder with train/ and val/, a folder of classes (a tenth of it becomes the queries),
    scenes:NUMBER, or torchvision:NAME:FOLDER."""
    val: str | None = None
    """Labeled queries, when they lie elsewhere."""
    k: PositiveInt = 20
    """Neighbors that vote."""
    rows: Few = 12
    """Most queries to show of those that are right, and of those that are wrong."""
    out: str = "neighbors.html"
    """Page to write."""


class EmbedOptions(InferenceOptions):
    data: Positional[str]
    """Images: a folder, a list of files (.txt, .csv), tar files, scenes:NUMBER, or torchvision:NAME:FOLDER."""
    out: str
    """Folder of Parquet files to write, e.g. x.parquet or s3://bucket/x. The same command again goes on where it stopped."""
    pooling: Literal["cls", "average", "gem", "patches"] = "cls"
    """[CLS], the mean or generalized mean of the patches, or a row for every patch."""
    size: Pixels | None = None
    """Edge of the evaluation view, pixels. None: what the model was made for."""
    fp16: bool = False
    """Store half precision, and compute in it on a GPU."""
    shard: PositiveInt | None = None
    """Images of a file, the most that is lost by a crash. None: 4096, fewer of patches, more of many million images."""
    part: Part | None = None
    """i/n: write only the i-th of n parts, 1/n to n/n. Each is a job of its own; n may be another one in the next try."""


class FindOptions(Options):
    embedding: Positional[str]
    """What `dino embed` wrote."""
    index: Literal["flat", "ivfpq"] | None = None
    """Exact, or FAISS's approximate index, which is kept beside the embedding. None: exact, but in a search of more than a
    million images (2^20)."""
    rebuild: bool = False
    """Make the index anew."""
    html: str | None = None
    """Page of thumbnails to write."""
    json: str | None = None
    """Result file to write."""


class SearchOptions(FindOptions):
    images: Positional[tuple[str, ...]]
    """Image files or folders to find the like of."""
    k: PositiveInt = 10
    """Neighbors of each."""
    model: str | None = None
    """The model that made the embedding. None: where it was then."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


Cosine = Annotated[float, Rule(lambda value: -1 <= value <= 1, "a cosine lies between -1 and 1")]


class DuplicatesOptions(FindOptions):
    threshold: Cosine | None = None
    """Cosine from which the pixels of two images are compared. None: chosen from the cosines of all pairs."""


class OutliersOptions(FindOptions):
    k: PositiveInt = 10
    """Nearest others that an image is compared with."""
    top: PositiveInt = 20
    """Images to name, those least like any other first."""


class SelectOptions(Options):
    embedding: Positional[str]
    """What `dino embed` wrote."""
    keep: PositiveInt
    """Images to keep."""
    out: str
    """List to write, a .txt file that --data takes."""
    threshold: Cosine | None = None
    """Cosine from which two images are near-copies, of which one is kept. None: chosen from the cosines of all pairs."""
    seed: Seed = 0
    """Another one draws other images."""


class AppOptions(Options):
    model: Annotated[Positional[str], arg(metavar="[MODEL]")] = ""
    """A run directory (its best teacher; with :last the last), a release or a weight file. None: the newest run in runs/."""
    data: str | None = None
    """Images to pick from and to search: a folder, a list of files, scenes:NUMBER, or torchvision:NAME:FOLDER. None: what
    the run was trained on."""
    embedding: str | None = None
    """What `dino embed` wrote with this model. None: a button on the page embeds the data."""
    port: Annotated[int, Rule(lambda value: 0 <= value < 2**16, "a port lies between 0 and 65535")] | None = None
    """Port of the page. None: the first free one from 7860."""
    host: str = "127.0.0.1"
    """Address of the page: this machine alone, or another of its addresses, or 0.0.0.0 for all. The printed address holds
    a token, without which nobody can use the page; but what is sent over a network is not encrypted."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


class ReportOptions(Options):
    run: Positional[str]
    """A run directory."""


class DoctorOptions(Options):
    target: Annotated[Positional[str], arg(metavar="[RUN|IMAGES]")] = ""
    """A run directory, or images as --data takes them. Without one, this machine is examined."""


class ModelsOptions(Options):
    name: Annotated[Positional[str], arg(metavar="[NAME]")] = ""
    """Download this release ('vits16', 'vits16:full', 'vits16:linear'), timm:NAME or hf:ORG/NAME, and print where it lies."""
    offline: bool = False
    """Never download; DINO_OFFLINE=1 in the environment means the same for every command."""


ORG_NAME = Rule(
    re.compile(r"[\w.-]+/[\w.-]+").fullmatch, "write ORG/NAME: your name or organization on the hub, and a name for it"
)


class ExportOptions(Options):
    model: Positional[str]
    """A run directory (its best teacher; with :last the last), a release, a weight file, or timm's or HF's folder."""
    to: Literal["onnx", "torch-export", "safetensors", "hf", "timm", "reference", "reference-checkpoint"]
    """Format to write; 'timm' and 'hf' are folders, the others files. Each is opened again and compared with the model."""
    out: str | None = None
    """File or folder to write; a model card goes into it as README.md, or beside it. Not needed with --push."""
    push: Annotated[str, ORG_NAME] | None = None
    """ORG/NAME: upload it, with its card, to this repository of Hugging Face, which is created if there is none."""
    private: bool = False
    """With --push: only its owners see the repository."""
    num_heads: Few | None = None
    """Attention heads of a ViT of unusual width whose file does not say them."""
    offline: bool = False
    """Never download; DINO_OFFLINE=1 in the environment means the same."""


class RecipesOptions(Options):
    name: Annotated[Positional[str], arg(metavar="[NAME]")] = ""
    """Show one recipe as a TOML file to start from."""
