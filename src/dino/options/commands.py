"""Options of commands that use a model. The text under a field is its help on the command line."""

from __future__ import annotations

from typing import Annotated, Literal

from tyro.conf import Positional

from dino.options import rules
from dino.options.rules import Options


class InferenceOptions(Options):
    """For commands that look at images with a trained model."""

    model: Positional[rules.ModelName]
    """A run directory (its best teacher; with :last the last), a release (see `dino models`) or a weight file."""
    device: rules.Device = "auto"
    """Where to compute: 'auto' is an NVIDIA GPU if there is one; 'mps' is Apple's, taken only by name."""


class LookOptions(InferenceOptions):
    size: rules.Pixels | None = None
    """Edge the image's shorter side is resized to, pixels. None: twice what the model was trained at."""
    stride: rules.Pixels | None = None
    """Pixels from a patch to the next, for finer maps of overlapping patches, e.g. 8 of 16. None: side by side."""


class PcaOptions(LookOptions):
    """Write pictures in which the features of patches are colors.

    dino pca runs/a photos/ --out colors/
    dino pca runs/a a.jpg b.jpg --size 64
    """

    images: Positional[tuple[str, ...]]
    """Image files or folders."""
    out: rules.Folder = "pca"
    """Folder to write the pictures to."""


class AttentionOptions(PcaOptions):
    """Write pictures of where each head of the model looks.

    dino attention runs/a photos/
    dino attention runs/a a.jpg b.jpg --panel --out maps/
    """

    out: rules.Folder = "attention"
    """Folder to write the pictures to."""
    mass: rules.AttentionMass = 0.6
    """Share of the attention that the mask keeps."""
    panel: bool = False
    """Write also all images, cut to squares, into one panel.png: a row each, a column for each head."""


class MatchOptions(LookOptions):
    """Draw lines between the patches of two images that are most alike.

    dino match runs/a a.jpg b.jpg
    dino match runs/a a.jpg b.jpg --lines 20 --out pairs.png
    """

    a: Positional[str]
    """An image."""
    b: Positional[str]
    """Another image."""
    out: rules.File = "match.png"
    """Picture to write."""
    lines: rules.NonNegativeInt = 50
    """Most pairs to draw, those that are most alike."""


class VideoOptions(LookOptions):
    """Write a video of where the model looks in each frame of a clip.

    dino video runs/a walk.mp4
    dino video runs/a walk.mp4 --show pca --out colors.mp4
    """

    clip: Positional[str]
    """A video (mp4, mov, webm, gif, ...), or a folder of frames named in their order."""
    show: Literal["attention", "mask", "pca"] = "attention"
    """A map of the attention, the picture where most of it lies, or the features of patches as colors."""
    head: rules.NoneOrFew | None = None
    """Whose attention. None: the mean of all heads."""
    mass: rules.AttentionMass = 0.6
    """Share of the attention that the mask keeps."""
    alone: bool = False
    """Leave out the clip itself, which is shown on the left."""
    fps: Annotated[float, rules.between(0.1, 1000)] = 24.0
    """Frames per second of a folder of frames; videos say their own."""
    out: rules.File | None = None
    """Video to write, an .mp4. None: CLIP-SHOW.mp4 in the working directory."""


class TsneOptions(InferenceOptions):
    """Draw a map of classes, in which images with similar features lie close together (t-SNE).

    dino figure tsne runs/a --data labeled/
    dino figure tsne runs/a --data scenes:200 --out map.svg
    """

    data: rules.DataSpec
    """Labeled images: a folder of classes, a folder with train/ and val/, of which val/ is used, scenes:NUMBER, or
    torchvision:NAME:FOLDER, of which the test images are used."""
    size: rules.Pixels | None = None
    """Edge of the evaluation view, pixels. None: what the model was made for."""
    show: Literal["points", "images", "means"] = "points"
    """A point for each image, in its class's color; some images themselves; or each class's mean (the paper's Fig. 11)."""
    out: rules.File = "tsne.png"
    """Figure to write: .png, .svg or .pdf."""


class NeighborsOptions(InferenceOptions):
    """Write a page of test images and the training images nearest to them: where k-NN is right, and where it is wrong.

    dino figure neighbors runs/a --data labeled/
    dino figure neighbors runs/a --data labeled/ --k 5 --out nearest.html
    """

    data: rules.DataSpec
    """Labeled images: a folder with train/ and val/, a folder of classes (a tenth of it becomes the queries),
    scenes:NUMBER, or torchvision:NAME:FOLDER."""
    val: rules.DataSpec | None = None
    """Labeled queries, when they lie elsewhere."""
    size: rules.Pixels | None = None
    """Edge of the evaluation view, pixels. None: what the model was made for."""
    k: rules.PositiveInt = 20
    """Neighbors that vote."""
    rows: rules.Few = 12
    """Most queries to show of those that are right, and of those that are wrong."""
    out: rules.File = "neighbors.html"
    """Page to write."""


class EmbedOptions(InferenceOptions):
    """Write the features of all images of a folder as Parquet files.

    dino embed runs/a photos/ --out x.parquet
    dino embed runs/a photos/ --out patches.parquet --pooling patches
    """

    data: Positional[rules.DataSpec]
    """Images: a folder, a list of files (.txt, .csv), tar files, scenes:NUMBER, or torchvision:NAME:FOLDER."""
    out: rules.Folder
    """Folder of Parquet files to write, e.g. x.parquet or s3://bucket/x. The same command again goes on where it stopped."""
    pooling: Literal["cls", "average", "gem", "patches"] = "cls"
    """[CLS], the mean or generalized mean of the patches, or a row for every patch."""
    size: rules.Pixels | None = None
    """Edge of the evaluation view, pixels. None: what the model was made for."""
    fp16: bool = False
    """Store half precision, and compute in it on a GPU."""
    shard: rules.PositiveInt | None = None
    """Images of a file, the most that is lost by a crash. None: 4096, fewer of patches, more of many million images."""
    part: rules.Part | None = None
    """i/n: write only the i-th of n parts, 1/n to n/n. Each is a job of its own; n may be another one in the next try."""


class FindOptions(Options):
    embedding: Positional[rules.Embedding]
    """What `dino embed` wrote."""
    index: Literal["flat", "ivfpq"] | None = None
    """Exact, or FAISS's approximate index, which is kept beside the embedding. None: exact, but in a search of more than a
    million images (2^20)."""
    rebuild: bool = False
    """Make the index anew."""
    html: rules.File | None = None
    """Page of thumbnails to write."""
    json: rules.File | None = None
    """Result file to write."""


class SearchOptions(FindOptions):
    """Find the images that are most like yours.

    dino search x.parquet a.jpg
    dino search x.parquet a.jpg b.jpg --k 5 --html found.html
    """

    images: Positional[tuple[str, ...]]
    """Image files or folders to find the like of."""
    k: rules.PositiveInt = 10
    """Neighbors of each."""
    model: rules.ModelName | None = None
    """The model that made the embedding. None: where it was then."""
    device: rules.Device = "auto"
    """Where to compute: 'auto' is an NVIDIA GPU if there is one; 'mps' is Apple's, taken only by name."""


Cosine = Annotated[float, rules.Rule(lambda value: -1 <= value <= 1, "a cosine lies between -1 and 1")]


class DuplicatesOptions(FindOptions):
    """Find near-copies, in groups, and which of each group to keep.

    dino duplicates x.parquet
    dino duplicates x.parquet --html copies.html
    """

    threshold: Cosine | None = None
    """Cosine from which the pixels of two images are compared. None: chosen from the cosines of all pairs."""


class OutliersOptions(FindOptions):
    """Find the images that are least like all others.

    dino outliers x.parquet
    dino outliers x.parquet --top 5 --html odd.html
    """

    k: rules.PositiveInt = 10
    """Nearest others that an image is compared with."""
    top: rules.PositiveInt = 20
    """Images to name, those least like any other first."""


class SelectOptions(Options):
    """Choose fewer images to train on: no near-copies, and some of every kind.

    dino select x.parquet --keep 10 --out chosen.txt
    dino select x.parquet --keep 5 --seed 1 --out few.txt
    """

    embedding: Positional[rules.Embedding]
    """What `dino embed` wrote."""
    keep: rules.PositiveInt
    """Images to keep."""
    out: rules.File
    """List to write, a .txt file that --data takes."""
    threshold: Cosine | None = None
    """Cosine from which two images are near-copies, of which one is kept. None: chosen from the cosines of all pairs."""
    seed: rules.Seed = 0
    """Another one draws other images."""


class AppOptions(Options):
    """Open a page in the browser, to explore what a model sees.

    dino app
    dino app runs/a --data photos/
    """

    model: Positional[rules.ModelName] = ""
    """A run directory (its best teacher; with :last the last), a release or a weight file. None: the newest run in runs/."""
    data: rules.DataSpec | None = None
    """Images to pick from and to search: a folder, a list of files, scenes:NUMBER, or torchvision:NAME:FOLDER. None: what
    the run was trained on."""
    embedding: rules.Folder | None = None
    """What `dino embed` wrote with this model. None: a button on the page embeds the data."""
    lists: rules.Folder = "lists"
    """Folder for the lists of images that the page writes."""
    port: Annotated[int, rules.Rule(lambda value: 0 <= value < 2**16, "a port lies between 0 and 65535")] | None = None
    """Port of the page. None: the first free one from 7860."""
    share_with: Annotated[str, rules.Metavar("nobody|everyone|ADDRESS")] = "nobody"
    """Who can reach the page: 'nobody' but this machine, 'everyone' in its networks, or those of one of its addresses. The
    printed address holds a token, without which nobody can use the page; what is sent over a network is not encrypted."""
    browser: bool = True
    """Open the page in your browser at once; never over SSH, or without a display."""
    device: rules.Device = "auto"
    """Where to compute: 'auto' is an NVIDIA GPU if there is one; 'mps' is Apple's, taken only by name."""


class ReportOptions(Options):
    """Write the page report.html of a run again.

    dino report runs/a
    dino report runs/demo
    """

    run: Positional[rules.RunName]
    """A run directory, or the address that a run was given as --out."""


class DoctorOptions(Options):
    """Say what is wrong with this machine, with images or with a run, and what helps. The exit code is 1 if something is.

    dino doctor
    dino doctor photos/
    dino doctor runs/a
    """

    target: Positional[rules.DataSpec] = ""
    """A run directory, or images as --data takes them. Without one, this machine is examined."""


class ModelsOptions(Options):
    """List weights to start from, or download some and print where they lie.

    dino models
    dino models vits16
    """

    name: Positional[str] = ""
    """Download this release ('vits16', 'vits16:full', 'vits16:linear'), timm:NAME or hf:ORG/NAME, and print where it lies."""
    offline: bool = False
    """Never download; DINO_OFFLINE=1 in the environment means the same for every command."""


ORG_NAME = rules.matching(r"[\w.-]+/[\w.-]+", "write ORG/NAME: your name or organization on the hub, and a name for it")


class ExportOptions(Options):
    """Write a model for other libraries and runtimes.

    dino export runs/a --to timm --out mine/
    dino export runs/a --to safetensors --out mine.safetensors
    """

    model: Positional[rules.ModelName]
    """A run directory (its best teacher; with :last the last), a release, a weight file, or timm's or HF's folder."""
    to: Literal["onnx", "torch-export", "safetensors", "hf", "timm", "reference", "reference-checkpoint"]
    """Format to write; 'timm' and 'hf' are folders, the others files. Each is opened again and compared with the model."""
    out: rules.File | None = None
    """File or folder to write; a model card goes into it as README.md, or beside it. Not needed with --push."""
    push: Annotated[str, rules.Metavar("ORG/NAME"), ORG_NAME] | None = None
    """ORG/NAME: upload it, with its card, to this repository of Hugging Face, which is created if there is none."""
    private: bool = False
    """With --push: only its owners see the repository."""
    num_heads: rules.Few | None = None
    """Attention heads of a ViT of unusual width whose file does not say them."""
    offline: bool = False
    """Never download; DINO_OFFLINE=1 in the environment means the same."""


class CompletionOptions(Options):
    """Print a script with which a shell completes commands, options, choices and recipes at Tab.

    dino completion bash
    dino completion fish

    bash and zsh: add the line `eval "$(dino completion bash)"` (or zsh) to ~/.bashrc or ~/.zshrc. fish: write the script to
    ~/.config/fish/completions/dino.fish.
    """

    shell: Positional[Literal["bash", "zsh", "fish"]]
    """The shell that you use."""


class RecipesOptions(Options):
    """List the named configurations, or show one as a file to start from.

    dino recipes
    dino recipes vit_small_100ep
    """

    name: Positional[str] = ""
    """Show one recipe as a TOML file to start from."""
