"""Options of the evaluations. The text under a field is its help on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from tyro.conf import Positional

from dino.options import rules
from dino.options.rules import Options

Beta = Annotated[float, rules.Rule(lambda value: value == 0 or 0.001 <= value <= 1000, "give 0, or 0.001 to 1000")]
Percent = Annotated[float, rules.Rule(lambda value: 0 < value <= 100, "give shares above 0 and up to 100")]


class EvalOptions(Options):
    """What every evaluation takes."""

    model: Positional[rules.ModelName]
    """A run directory (its best teacher; with :last the last), a weight file, or a model's name (dino models)."""
    size: rules.Pixels | None = None
    """Edge of the evaluation view, pixels. None: what the protocol or the model was made for."""
    device: rules.Device = "auto"
    """Where to compute. Under torchrun the work is shared, with the same result."""
    json: rules.File | None = None
    """File for the result. None: eval/NAME.json (of the last eval/last/NAME.json) in a run's directory, else none."""


class LabeledOptions(EvalOptions):
    """For evaluations that classify."""

    data: rules.DataSpec
    """Labeled images: DATA/train/CLASS/image.jpg and DATA/val/CLASS/image.jpg; or DATA/CLASS/image.jpg, a tenth of
    which becomes the test set; or torchvision:NAME:FOLDER, a data set whose files are there already."""
    val: rules.DataSpec | None = None
    """Labeled test images, when they lie elsewhere."""


class KnnOptions(LabeledOptions, common=("data", "val", "k")):
    """Measure how often the images nearest to a test image vote for its class. Nothing is trained.

    dino eval knn runs/a --data labeled/
    dino eval knn runs/a --data labeled/train --val labeled/val --k 20
    """

    k: Annotated[tuple[rules.PositiveInt, ...], rules.NOT_EMPTY] = (10, 20, 100, 200)
    """Numbers of neighbors."""
    temp: Annotated[float, rules.between(0.02, 1000)] = 0.07  # below, the exponential is beyond float32
    """Temperature of the votes exp(cosine / temp)."""


class RankingOptions(EvalOptions):
    """For evaluations that rank a database by its likeness to queries."""

    protocol: Literal["fixed", "original"] = "fixed"
    """'original' repeats what the reference does otherwise, see docs/evaluations.md."""
    whiten: rules.DataSpec | None = None
    """Other images, a folder or list, to learn a PCA whitening of the features from. None: features as they are."""


class RetrievalOptions(RankingOptions):
    """Measure how well images of the same thing are found: class folders, or landmarks as of Oxford and Paris.

    dino eval retrieval runs/a --data labeled/
    dino eval retrieval runs/a --data rcaltech/
    """

    data: rules.Folder
    """Class folders, as for `dino eval knn`: an image is to be found by all others of its class, or one of test/ by those of
    train/. Or a folder DATA with one ground truth, DATA/gnd_roxford5k.pkl, DATA/gnd_rparis6k.pkl or any gnd_NAME.pkl or
    gnd_NAME.json of that form, and its images DATA/jpg/NAME.jpg; or such a file with jpg/ beside it."""
    val: rules.Folder | None = None
    """Class folders of queries, when they lie elsewhere."""
    scales: Literal[1, 3] | None = None
    """1, or 3 for the mean of the features at 1, 1/sqrt(2) and 1/2 of --size (that of the longer side). None: as
    published, 1 for Oxford (at 224 pixels), and 3 for Paris (at 512 pixels) and other ground truth; for class folders
    the evaluation view."""


class CopydetectOptions(RankingOptions):
    """Measure how well the model finds the originals of copies, as on Copydays.

    dino eval copydetect runs/a --originals originals/ --copies copies/
    dino eval copydetect runs/a --originals originals/ --copies copies/ --size 320
    """

    data: rules.Folder | None = None
    """Copydays: a folder DATA with DATA/original/ and at least one block of copies, DATA/strong/, DATA/jpegqual/N/ or
    DATA/crops/N/. A copy and its original begin with the same four characters."""
    originals: rules.DataSpec | None = None
    """Instead of --data: a folder of originals, with --copies."""
    copies: rules.DataSpec | None = None
    """A folder of copies, or of sub-folders with one kind of copies each. A copy has its original's name, or that name,
    '_' and anything: beach.jpg and beach_crop20.png are copies of beach.jpg."""
    distractors: rules.DataSpec | None = None
    """Other images, a folder or list, that the originals must be found among."""

    def contradictions(self) -> Iterator[str]:
        if (self.data is None) == (self.originals is None) or (self.originals is None) != (self.copies is None):
            yield "give either --data with the Copydays folder, or --originals and --copies."


class PairsOptions(EvalOptions):
    """For evaluations of images with masks."""

    data: rules.Folder | None = None
    """PASCAL VOC: a folder DATA with DATA/JPEGImages/, DATA/SegmentationObject/ (or DATA/SegmentationClass/) and
    DATA/ImageSets/Segmentation/val.txt."""
    images: rules.DataSpec | None = None
    """Instead of --data: a folder of images, with --masks."""
    masks: rules.Folder | None = None
    """A folder of masks of the same names and sizes: gray images whose bright half is the object, or palette images
    with an object to an index (0 is none, 255 is unknown)."""

    def contradictions(self) -> Iterator[str]:
        if (self.data is None) == (self.images is None) or (self.images is None) != (self.masks is None):
            yield "give either --data with the VOC folder, or --images and --masks."


class MasksOptions(PairsOptions, common=("data", "images", "masks")):
    """Measure how well the attention of the heads covers the objects of images.

    dino eval masks runs/a --images ecssd/images --masks ecssd/masks
    dino eval masks runs/a --images ecssd/images --masks ecssd/masks --mass 0.8
    """

    mass: rules.AttentionMass = 0.6
    """Share of a head's attention that its mask keeps."""


class SegmentOptions(PairsOptions, common=("data", "images", "masks", "val_images", "val_masks")):
    """Measure how well patches tell the classes of pixels, by k-NN and by a linear layer.

    dino eval segment runs/a --images ecssd/images --masks ecssd/masks
    dino eval segment runs/a --images ecssd/images --masks ecssd/masks --k 5
    """

    data: rules.Folder | None = None
    """PASCAL VOC: a folder DATA with DATA/JPEGImages/, DATA/SegmentationClass/ and DATA/ImageSets/Segmentation/train.txt
    and val.txt."""
    masks: rules.Folder | None = None
    """A folder of masks of the same names and sizes: gray or palette PNGs whose value is the class of the pixel. 0 is a
    class too, often the background; 255 is unknown, or the object where all masks hold only 0 and 255."""
    val_images: rules.DataSpec | None = None
    """Images to measure on, with --val-masks. None: a tenth, at most 1000, of the images."""
    val_masks: rules.Folder | None = None
    """Their masks."""
    k: rules.PositiveInt = 20
    """Number of neighbors of the k-NN."""
    patches: rules.PositiveInt = 50_000
    """Most patches of training images to learn from, drawn evenly from all images."""
    c: rules.PositiveFloat = 0.01
    """Inverse strength of the L2 penalty of the linear layer, sum of losses + |W|^2 / 2C."""
    seed: rules.Seed = 0
    """Seed of the drawn patches."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if (self.val_images is None) != (self.val_masks is None) or (
            self.data is not None and self.val_images is not None
        ):
            yield "give --val-images and --val-masks both or not at all, and only beside --images and --masks."


class TrainedOptions(LabeledOptions):
    """For evaluations that train."""

    seed: rules.Seed = 0
    """Of splits, orders, first weights and augmentations."""
    num_workers: rules.NoneOrFew | None = None
    """Processes that read images. None: the spare cores beside a GPU, none on a CPU."""
    checkpoint_minutes: rules.NonNegativeFloat = 10.0
    """Between checkpoints, which lie beside the result; the same command goes on after an interruption, to the bit."""


class LinearOptions(TrainedOptions, common=("data", "val", "mode", "pooling")):
    """Train a linear classifier on the frozen features and measure it.

    dino eval linear runs/a --data labeled/
    dino eval linear runs/a --data labeled/ --mode paper --epochs 100
    """

    mode: Literal["fast", "paper"] = "fast"
    """'fast': sweep on features of the evaluation view, kept on disk. 'paper': crops and flips, 100 epochs of forwards."""
    protocol: Literal["fixed", "original"] = "fixed"
    """'original' (paper mode): report the best epoch on the test images, as the reference does, not the last."""
    pooling: Annotated[tuple[Literal["cls", "average", "last4", "cls+average"], ...], rules.NOT_EMPTY] | None = None
    """Features to classify. None: in fast mode all that the model has, in paper mode the paper's for its size."""
    lr: Annotated[tuple[rules.PositiveFloat, ...], rules.NOT_EMPTY] | None = None
    """Learning rates per 256 images. None: seven from 0.001 to 1 in fast mode, 0.001 in paper mode."""
    weight_decay: Annotated[tuple[rules.NonNegativeFloat, ...], rules.NOT_EMPTY] | None = None
    """None: 0, 1e-5 and 1e-4 in fast mode, 0 in paper mode."""
    epochs: rules.PositiveInt = 100
    """Cosine decay to 0 over these, from epoch to epoch."""
    batch_size: rules.PositiveInt = 1024
    """Images per step, over all ranks."""
    held_out: Annotated[float, rules.Rule(lambda value: 0 < value < 1, "it is a share between 0 and 1")] = 0.1
    """Share of each class of the training images that chooses where there is more than one classifier."""

    def contradictions(self) -> Iterator[str]:
        if self.mode == "fast" and self.protocol == "original":
            yield "protocol 'original' differs from 'fixed' only in paper mode; add --mode paper."
        if self.mode == "paper" and len(self.pooling or ()) > 1:
            yield "paper mode classifies one pooling; give one, or use --mode fast."


class LowshotOptions(LabeledOptions, common=("data", "val", "percent", "list")):
    """Measure what a few labels are worth: logistic regression and k-NN on the frozen features.

    dino eval lowshot runs/a --data labeled/ --percent 10
    dino eval lowshot runs/a --data labeled/ --percent 10 50 --seed 1
    """

    percent: tuple[Percent, ...] | None = None
    """Shares of each class of the training images, drawn from the seed, at least one image of each; 100: all. None: the
    first two of 1, 10 and 100 that are an image or more of a class of mean size."""
    list: tuple[rules.File, ...] = ()
    """Files with a name of an image per line, e.g. ImageNet's published 1 % and 10 % lists, in place of drawn shares."""
    c: rules.PositiveFloat | None = None
    """Inverse strength of the L2 penalty, sum of losses + |W|^2 / 2C. None: chosen by cross-validation."""
    folds: Annotated[int, rules.at_least(2, "it must be at least 2"), rules.between(2, 1000)] = 5
    """Parts of the cross-validation."""
    k: rules.PositiveInt | None = None
    """Neighbors of the k-NN beside it. None: 20, or all images of a share that has fewer."""
    seed: rules.Seed = 0
    """Seed of the drawn shares."""

    def contradictions(self) -> Iterator[str]:
        if not self.list and self.percent == ():
            yield "percent is empty; give shares above 0 and up to 100."


class FinetuneOptions(TrainedOptions, common=("data", "val", "recipe", "epochs", "batch_size", "lr")):
    """Train the whole model on labels, and measure it.

    dino eval finetune runs/a --data labeled/ --epochs 10
    dino eval finetune runs/demo --data labeled/ --recipe cifar10 --batch-size 64
    """

    recipe: Literal["cifar10", "cifar100", "flowers", "cars", "inat18", "inat19", "imagenet"] = "imagenet"
    """Where what is not given comes from; docs/evaluations.md lists them with what is known of each."""
    epochs: rules.PositiveInt | None = None
    """Passes over the training images."""
    batch_size: rules.PositiveInt | None = None
    """Images per step, over all ranks."""
    lr: rules.PositiveFloat | None = None
    """Peak learning rate per 512 images."""
    min_lr: rules.NonNegativeFloat | None = None
    """Learning rate at the end of the cosine."""
    warmup_epochs: rules.NonNegativeInt | None = None
    """Epochs of linear warm-up from 0."""
    weight_decay: rules.NonNegativeFloat | None = None
    """Weight decay; not applied to biases and one-dimensional parameters."""
    layer_decay: rules.PositiveFloat | None = None
    """The learning rate of a block is this times that of the next one; 1: all alike."""
    drop_path: rules.BelowOne | None = None
    """Stochastic depth of the last block, of our own ViTs."""
    mixup: Beta | None = None
    """Parameter of the Beta distribution of MixUp; 0: no MixUp. With CutMix, each step takes one of them at random."""
    cutmix: Beta | None = None
    """The same of CutMix."""
    smoothing: rules.BelowOne | None = None
    """Label smoothing."""
    rand_augment: rules.Name | None = None
    """timm's name of an augmentation policy, '' for none."""
    erasing: rules.BelowOne | None = None
    """Probability of random erasing."""
    repeats: rules.PositiveInt | None = None
    """Copies of an image in a batch."""
    head_scale: rules.NonNegativeFloat | None = None
    """Factor on the new classifier's first weights."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward pass; auto: bf16 on GPUs that have it."""


class DavisOptions(EvalOptions):
    """Measure how well objects are followed through videos, as on DAVIS-2017.

    dino eval davis runs/a --data davis_dev/
    dino eval davis runs/a --data davis_dev/ --out masks/
    """

    data: rules.Folder
    """DAVIS-2017, or videos laid out like it: a folder DATA with DATA/JPEGImages/480p/VIDEO/00000.jpg and so on,
    DATA/Annotations/480p/VIDEO/00000.png and so on, and DATA/ImageSets/2017/val.txt with a VIDEO per line."""
    out: rules.Folder | None = None
    """Folder for the masks, OUT/VIDEO/00000.png; videos finished there are not computed again. None: davis.masks beside
    the result."""
    protocol: Literal["fixed", "original"] = "fixed"
    """'original' repeats what the reference does otherwise, see docs/evaluations.md."""
    queue: rules.NoneOrFew = 7
    """Frames before a frame that labels come from, besides the first."""
    neighborhood: rules.NoneOrFew = 12
    """Rows and columns of patches that a label can move between two frames."""
    top_k: rules.PositiveInt = 5
    """Most similar patches, from which labels are taken."""


class AllOptions(Options):
    """Make all evaluations that a folder allows, with their own defaults, and print one table.

    dino eval all runs/a --data labeled/
    dino eval all runs/a --data labeled/ --json figures.json
    """

    model: Positional[rules.ModelName]
    """A run directory (its best teacher; with :last the last), a weight file, or a model's name (dino models)."""
    data: rules.Folder
    """Class folders (k-NN, linear, low-shot, retrieval), or a folder with images/ and masks/ or VOC (masks, segment), the
    videos of DAVIS (davis), originals/ and copies/ or Copydays (copydetect), or gnd_NAME.pkl or .json (retrieval)."""
    val: rules.Folder | None = None
    """Class folders of test images, when they lie elsewhere."""
    device: rules.Device = "auto"
    """Where to compute. Under torchrun the work is shared, with the same result."""
    json: rules.File | None = None
    """File for all results. None: only each evaluation's own, in a run's directory."""


# Name -> what it measures, and its options. The code is in the module dino.eval.NAME.
EVALUATIONS: dict[str, tuple[str, type[EvalOptions]]] = {
    "knn": ("k-NN accuracy of a run's features", KnnOptions),
    "linear": ("linear classification of frozen features", LinearOptions),
    "lowshot": ("a few labels: logistic regression, k-NN", LowshotOptions),
    "finetune": ("train it on labels, end to end", FinetuneOptions),
    "retrieval": ("images of a class or a landmark, found by others", RetrievalOptions),
    "copydetect": ("find the originals of copies", CopydetectOptions),
    "masks": ("overlap of attention with objects", MasksOptions),
    "segment": ("classes of pixels: k-NN and linear on patches", SegmentOptions),
    "davis": ("objects followed through videos, J and F", DavisOptions),
}
