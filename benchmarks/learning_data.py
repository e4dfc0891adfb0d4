"""Make the image sets of `learning.py` from the archives of a folder.

    python benchmarks/learning_data.py ARCHIVES OUT

ARCHIVES holds any of cifar10.tar.xz (cifar10/{train,test}/CLASS/NAME.jpg), caltech20.zip (caltech20/images/CLASS/NAME.jpg,
train.txt, test.txt), grocery_retrieval_dev.zip (jpg/NAME.jpg, gnd.json) and ecssd_dev.zip (images/, masks/). Each becomes
class folders in OUT, as `dino` reads them, and OUT/sets.toml names all sets. A set that is there already is left alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

import harness
from dino import files

VAL = 100  # test images of a class that a CIFAR-10 run is watched with; the final figures are of all


def write_image(folder: Path, label: str, name: str, content: bytes) -> None:
    """An image of class `label`; "" puts it beside the class folders: an image without a label."""
    (folder / label).mkdir(parents=True, exist_ok=True)
    (folder / label / name).write_bytes(content)


def make_cifar10(archive: Path, out: Path) -> None:
    """Training sets of the first 500 and the first 100 images of each class."""
    parts = {"train": {"train-5000": 500, "train-1000": 100}, "test": {"test": 10**9, "val": VAL}}
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.isfile() or not member.name.endswith(".jpg"):
                continue
            _, split, label, name = member.name.split("/")
            content = tar.extractfile(member)
            assert content is not None
            image = content.read()
            for part, count in parts[split].items():
                if int(Path(name).stem) < count:  # numbered from 0 in each class
                    write_image(out / part, label, name, image)


def make_caltech20(archive: Path, out: Path) -> None:
    """The archive's own split into training and test images."""
    with zipfile.ZipFile(archive) as images:
        for split in ("train", "test"):
            for line in images.read(f"caltech20/{split}.txt").decode().split():
                label, name = line.split("/")
                write_image(out / split, label, name, images.read(f"caltech20/images/{line}"))


def make_grocery(archive: Path, out: Path) -> None:
    """Database and queries by product. The distractors have no label: trained on, left out of the k-NN."""
    with zipfile.ZipFile(archive) as images:
        truth = json.loads(images.read("grocery_retrieval_dev/gnd.json"))
        for split, names, labels in (("train", "imlist", "imclass"), ("test", "qimlist", "qclass")):
            for name, label in zip(truth[names], truth[labels], strict=True):
                content = images.read(f"grocery_retrieval_dev/jpg/{name}.jpg")
                write_image(out / split, label or "", f"{name}.jpg", content)


def make_ecssd(archive: Path, out: Path) -> None:
    """Images and their masks, without labels."""
    with zipfile.ZipFile(archive) as images:
        for name in images.namelist():
            kind = Path(name).parent.name
            if kind in ("images", "masks") and not name.endswith("/"):
                write_image(out, kind, Path(name).name, images.read(name))


# archive -> folder, what makes it, and its sets with paths relative to the folder
ARCHIVES: dict[str, tuple[str, Callable[[Path, Path], None], dict[str, dict[str, str]]]] = {
    "cifar10.tar.xz": (
        "cifar10",
        make_cifar10,
        {f"cifar10-{n}": {"train": f"train-{n}", "val": "val", "test": "test"} for n in (5000, 1000)},
    ),
    "caltech20.zip": ("caltech20", make_caltech20, {"caltech20": {"train": "train", "val": "test"}}),
    "grocery_retrieval_dev.zip": (
        "grocery",
        make_grocery,
        {"grocery": {"train": "train", "val": "test", "labels": "folders"}},
    ),
    "ecssd_dev.zip": ("ecssd", make_ecssd, {"ecssd": {"train": "images", "images": "images", "masks": "masks"}}),
}
BUILT_IN = {"scenes": {"train": "scenes:4000"}}


def prepare(archives: Path, out: Path) -> dict[str, Any]:
    """Make what is missing, and return all sets with absolute paths.

    Raises:
        ValueError: the folder holds none of the archives.
    """
    if not any((archives / name).is_file() for name in ARCHIVES):
        raise ValueError(f"{archives} holds none of {', '.join(ARCHIVES)}; name the folder of the archives.")
    out.mkdir(parents=True, exist_ok=True)
    sets: dict[str, Any] = {}
    for name, (folder, make, described) in ARCHIVES.items():
        made = out.resolve() / folder
        if not (archives / name).is_file() and not made.is_dir():
            print(f"{name}: not in {archives}, left out")
            continue
        if not made.is_dir():
            part = made.with_name(f"{folder}.part")  # renamed when it is whole
            shutil.rmtree(part, ignore_errors=True)
            make(archives / name, part)
            part.rename(made)
        for key, paths in described.items():
            sets[key] = {what: text if what == "labels" else str(made / text) for what, text in paths.items()}
            print(f"{key}: {sets[key]}")
    return sets | BUILT_IN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    sets = prepare(options.archives, options.out)
    with files.replacing(options.out / "sets.toml") as temporary:
        temporary.write_text(tomli_w.dumps(sets), encoding="utf-8")


if __name__ == "__main__":
    harness.run(main)
