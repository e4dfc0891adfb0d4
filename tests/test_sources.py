"""Sources: which files are images, in which order, with which labels; the recorded names; splitting."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino.data import listing
from dino.data.decode import BadImage
from dino.data.image_files import Files, open_source
from dino.data.open import record_files
from dino.data.sources import Source, Subset, hold_out


def make(root: Path, *names: str) -> Path:
    """Small images at root / name, gray value = their position."""
    for position, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (position, position, position)).save(path, "PNG")
    return root


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def message(spec: str | Path, labels: str = "auto") -> str:
    """The error for a bad spec or labels: one sentence."""
    with pytest.raises(ValueError, match=r"\A[^\n]+[.?]\Z") as caught:
        open_source(str(spec), labels)
    return str(caught.value)


# ---- folders


def test_folder_is_searched_at_any_depth_and_sorted(tmp_path: Path) -> None:
    make(tmp_path, "b.PNG", "a b/ü 1.Jpg", "a/z.tiff", "a/deep/er/x.webp", "Z.jpeg", "a.gif", "c.bmp")
    make(tmp_path, ".hidden.png", "._b.png", ".git/x.png", "a/.cache/x.png", "a/._z.tiff")
    (tmp_path / "Thumbs.db").touch()
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink("gone.png", tmp_path / "broken.png")
    os.symlink("self.png", tmp_path / "self.png")
    os.symlink("b.PNG", tmp_path / "link.png")
    source = open_source(str(tmp_path))
    expected = ["Z.jpeg", "a b/ü 1.Jpg", "a.gif", "a/deep/er/x.webp", "a/z.tiff", "b.PNG", "c.bmp", "link.png"]
    assert names(source) == expected
    assert len(source) == 8
    assert source.read(5).tolist() == np.zeros((3, 4, 3)).tolist()
    assert source.read(0)[0, 0, 0] == 4
    assert source.name(-1) == "link.png"
    with pytest.raises(IndexError):
        source.name(8)


def test_undecodable_names(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path / "folder") + b"\xff\xfe/caf\xe9 \xf0.png"
    os.mkdir(os.path.dirname(raw))
    make(tmp_path, "plain.png", 'quote"\\ \n.png')
    os.rename(os.fsencode(tmp_path / "plain.png"), raw)
    record = tmp_path.parent / "undecodable.jsonl"
    first, again = (open_source(str(tmp_path), record=record, trust=True) for _ in range(2))
    assert names(first) == names(again) == [os.fsdecode(b"folder\xff\xfe/caf\xe9 \xf0.png"), 'quote"\\ \n.png']
    assert again.read(0).shape == again.read(1).shape == (3, 4, 3)
    assert open_source(str(tmp_path), "folders").classes == (os.fsdecode(b"folder\xff\xfe"),)


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    root = make(tmp_path / "root", "real/x.png", "b/y.png")
    make(tmp_path / "elsewhere", "deep/z.png")
    os.symlink(root, root / "real/up")  # circles
    os.symlink("..", root / "b/circle")
    os.symlink(root / "real", root / "a")  # a second way to a folder, earlier in the alphabet
    os.symlink(tmp_path / "elsewhere", root / "outside")
    os.symlink(tmp_path / "elsewhere/deep", root / "z")
    os.symlink("loop", root / "loop")
    for index in range(20):  # of many names of one folder, the first counts, whatever order the disk gives them in
        os.symlink(tmp_path / "elsewhere/deep", root / f"s{index:02d}")
        os.symlink(tmp_path / "elsewhere", root / f"o{19 - index:02d}")
    assert names(open_source(str(root))) == ["b/y.png", "o00/deep/z.png", "real/x.png"]


def test_links_lead_neither_to_the_system_nor_above_the_folder(tmp_path: Path, capsys) -> None:
    root = make(tmp_path / "up/root", "x.png", "a/y.png")
    make(tmp_path / "up", "mine.png")
    make(tmp_path / "elsewhere", "z.png")
    for name, target in {"proc": "/proc/self", "sys": "/sys", "all": "/", "a/up": "../..", "here": "."}.items():
        os.symlink(target, root / name)
    os.symlink(tmp_path / "elsewhere", root / "b")
    assert names(open_source(str(root))) == ["a/y.png", "b/z.png", "x.png"]
    said = capsys.readouterr().err
    assert said == (
        f"{root}: 4 other files left out (4 links to the system or to a folder above); images in linked folders: 1, "
        "first b/z.png.\n"
    )


def test_what_is_left_out_is_counted_in_one_line(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "mix", "a.JFIF", "b.jpe", "c.png")
    assert names(open_source(str(root))) == ["a.JFIF", "b.jpe", "c.png"]
    assert capsys.readouterr().err == ""  # nothing was left out
    for name in (*(f"{i}.HEIC" for i in range(30)), *(f"{i}.avif" for i in range(5)), "a.nef", "c.json", "d.json", "e"):
        (root / name).touch()
    os.symlink("gone.png", root / "gone.png")
    monkeypatch.setattr(listing, "_SUFFIXES", (b".png", b".jpe", b".jfif"))  # as without pillow-heif and libavif
    assert len(open_source(str(root))) == 3
    assert capsys.readouterr().err == (
        f"{root}: 40 other files left out (30 .heic, 5 .avif, 1 .nef, 2 .json, 1 broken links or special files, ...; HEIC is "
        "read after: pip install 'dino-vision[heif]'; AVIF is read after: pip install -U pillow; "
        "export camera raw as JPEG).\n"
    )
    open_source(str(root))
    assert capsys.readouterr().err == ""  # said once: a command may open the same folder again
    for path in root.iterdir():
        if path.suffix in (".JFIF", ".jpe", ".png"):
            path.unlink()
    assert "only 30 .heic, 5 .avif, 1 .nef, 2 .json, 1 without a suffix; HEIC is read after" in message(root)


def test_thumbnails_of_file_servers_and_deleted_files_are_not_data(tmp_path: Path) -> None:
    folders = ("@eaDir/x.png", "a/@eaDir/x.png", "#recycle", "$RECYCLE.BIN", "__MACOSX/a", ".@__thumb", "@Recycle")
    root = make(tmp_path, "x.png", "a/y.png", *(f"{folder}/z.png" for folder in folders))
    assert names(open_source(str(root))) == ["a/y.png", "x.png"]


def test_the_run_folder_is_not_data(tmp_path: Path) -> None:
    make(tmp_path, "x.png", "runs/a/attention.png", "runs/b/y.png")
    assert names(open_source(str(tmp_path), record=tmp_path / "runs/a/files.jsonl")) == ["runs/b/y.png", "x.png"]
    assert len(open_source(str(tmp_path), record=tmp_path / "files.jsonl")) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_closed_folders_are_left_out(tmp_path: Path) -> None:
    make(tmp_path, "x.png", "closed/y.png")
    (tmp_path / "closed").chmod(0)
    try:
        assert names(open_source(str(tmp_path))) == ["x.png"]
        (tmp_path / "x.png").unlink()
        assert "'closed' may not be read" in message(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)


# ---- labels


def test_labels_of_folders(tmp_path: Path) -> None:
    classes = make(tmp_path / "classes", "dog/1.png", "cat/1.png", "cat/sub/2.png", "dog/2.png")
    source = open_source(str(classes))
    assert source.classes == ("cat", "dog")
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 0, 1, 1]
    unlabeled = open_source(str(classes), "none")
    assert (unlabeled.classes, unlabeled.labels) == ((), None)
    assert unlabeled.fingerprint != source.fingerprint == open_source(str(classes), "folders").fingerprint

    make(tmp_path / "mixed", "cat/1.png", "cat/2.png", "cat/4.png", "dog/1.png", "loose.png")
    assert open_source(str(tmp_path / "mixed")).labels is None
    forced = open_source(str(tmp_path / "mixed"), "folders")
    assert forced.labels is not None
    assert forced.labels.tolist() == [0, 0, 0, 1, -1]
    make(tmp_path / "albums", *(f"day {day}/x.png" for day in range(5)))  # one image each: no classes
    assert open_source(str(tmp_path / "albums")).labels is None
    assert open_source(str(make(tmp_path / "one", "cat/1.png", "cat/2.png"))).labels is None
    make(tmp_path / "flat", "1.png")
    assert "lies in a sub-folder that names its class" in message(tmp_path / "flat", "folders")


CSV_ROWS = "a/x.png,10\ndata/c.png,9\ngone.png,9\n"  # relative to the images' folder, to the CSV, missing


@pytest.mark.parametrize(
    "text",
    [
        CSV_ROWS,
        "path,label\r\n\r\n" + CSV_ROWS,
        "\ufeffid,Label,Path\n1,10,a/x.png\n2,9,data/c.png\n3,9,gone.png",
        "FILENAME , class\n" + CSV_ROWS,
    ],
)
def test_labels_from_a_csv(tmp_path: Path, text: str) -> None:
    root = make(tmp_path / "data", "b.png", "a/x.png", "c.png")
    table = tmp_path / "labels.csv"
    table.write_text(text, encoding="utf-8")
    source = open_source(str(root), str(table))
    assert source.classes == ("9", "10")  # numbers in numerical order
    assert source.labels is not None
    assert source.labels.tolist() == [1, -1, 0]
    table.write_text(f"{root}/b.png,'a',ignored\n./a/../c.png, b \n{root}/a/x.png,-1\n")
    source = open_source(str(root), str(table))
    assert source.labels is not None
    assert (source.classes, source.labels.tolist()) == (("'a'", "b"), [-1, 0, 1])
    table.write_text("b.png,u\ndata/b.png,v\nc.png,v\n")  # relative to the images' folder comes first
    source = open_source(str(root), str(table))
    assert source.labels is not None
    assert (source.classes, source.labels.tolist()) == (("u", "v"), [-1, 0, 1])
    table.write_text("b.png,v\nc.png,u\n")
    assert open_source(str(root), str(table)).fingerprint != source.fingerprint


def test_bad_labels(tmp_path: Path) -> None:
    root = make(tmp_path / "data", "b.png")
    table = tmp_path / "labels.csv"
    assert "did you mean 'folders'" in message(root, "folder")
    assert f"did you mean '{root}'" in message(root, str(tmp_path / "dota"))
    assert "this is a folder" in message(root, str(root))
    table.write_text("path,label\nelse/where.png,3\n")
    assert "'else/where.png', the images are e.g. 'b.png'" in message(root, str(table))
    table.write_text("b.png\n")
    assert "no column of labels" in message(root, str(table))
    table.write_text("path,color\nb.png,red\n")
    assert "no column of labels" in message(root, str(table))
    table.write_text("name;label\nb.png;1\n")
    assert "'name;label'" in message(root, str(table))
    table.write_text("path,label\nb.png,1\n", encoding="utf-16")
    assert "UTF-8" in message(root, str(table))
    table.write_text('"' + "x" * 200_000 + '"\n')
    assert "not a valid CSV" in message(root, str(table))
    table.write_text("")
    assert "no column of labels" in message(root, str(table))


# ---- lists


def test_text_list(tmp_path: Path, capsys) -> None:
    make(tmp_path / "data", "b.png", "a 1.png", "#c.png")
    table = tmp_path / "data" / "list.TXT"
    away = make(tmp_path / "away", "x.png") / "x.png"
    table.write_text(f"# mine\n\nb.png\r\n  a 1.png  \ngone.png\n{away}\n./#c.png\n../away/x.png\nx/../b.png\n.//b.png")
    source = open_source(str(table))
    assert names(source) == ["b.png", "a 1.png", "gone.png", str(away), "#c.png"]  # in the list's order, each once
    assert [int(source.read(index).max()) for index in (0, 1, 3, 4)] == [0, 1, 0, 2]
    said = "repeated entries left out: 3; missing images: 1 of 5 looked for, first gone.png"
    assert capsys.readouterr().err == f"{table}: {said}.\n"
    with pytest.raises(BadImage, match="no such file"):
        source.read(2)
    assert source.labels is None


def test_csv_list(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.png", "dog/2.png", "cat/3.png", "dog/4.png")
    (tmp_path / "all.csv").write_text("path,label\ndog/2.png,zebra\ncat/1.png,\ncat/3.png,ape\n")
    source = open_source(str(tmp_path / "all.csv"))
    assert names(source) == ["dog/2.png", "cat/1.png", "cat/3.png"]
    assert source.labels is not None
    assert (source.classes, source.labels.tolist()) == (("ape", "zebra"), [1, -1, 0])
    assert open_source(str(tmp_path / "all.csv"), "folders").classes == ("cat", "dog")
    (tmp_path / "bare.csv").write_text("dog/2.png\ncat/1.png\ncat/3.png\ndog/4.png\n")
    assert open_source(str(tmp_path / "bare.csv")).classes == ("cat", "dog")
    assert open_source(str(tmp_path / "bare.csv"), str(tmp_path / "all.csv")).classes == ("ape", "zebra")


def test_bad_lists(tmp_path: Path) -> None:
    table = tmp_path / "list.txt"
    table.write_text("# nothing\n")
    assert "names no image" in message(table)
    table.write_text("".join(f"gone{i}.png\n" for i in range(200)))
    assert "None of the 200 images" in message(table)
    table.write_text("gone.png\n", encoding="utf-16")
    assert "UTF-8" in message(table)


# ---- bad specs


def test_bad_specs(tmp_path: Path) -> None:
    root = make(tmp_path, "imagenet/train/x.png")
    assert f"did you mean '{tmp_path}/imagenet'" in message(tmp_path / "imagnet" / "train")
    assert f"'{tmp_path}/imagenet' exists, so check" in message(tmp_path / "imagenet" / "zzz")
    assert "give the folder that holds it" in message(root / "imagenet/train/x.png")
    for name in ("data.zip", "data.tar", "DATA.TAR.GZ"):
        (tmp_path / name).touch()
        assert "is an archive; unpack it" in message(tmp_path / name)
    (tmp_path / "x.parquet").touch()
    os.mkfifo(tmp_path / "list.txt")
    assert "neither a folder nor a list" in message(tmp_path / "x.parquet")
    assert "neither a folder nor a list" in message(tmp_path / "list.txt")
    for spec in ("", "a\0b"):
        assert "is no path" in message(spec)
    for spec in ("scenes", "no-such-folder"):
        assert "does not exist" in message(spec)
    (tmp_path / "empty/er").mkdir(parents=True)
    assert "holds no files" in message(tmp_path / "empty")
    for index in range(3):
        (tmp_path / "empty/er" / f"{index}.NPY").touch()
    (tmp_path / "empty" / "README").touch()
    os.symlink("gone.jpg", tmp_path / "empty/x.jpg")
    text = message(tmp_path / "empty")
    assert "only 3 .npy, 1 " in text
    assert "1 without a suffix" in text
    assert "1 broken links or special files" in text


# ---- the recorded names


def test_a_resumed_run_takes_the_names_that_were_recorded(tmp_path: Path) -> None:
    root = make(tmp_path / "data", "a/1.png", "a/2.png", "b/3.png", "b/4.png")
    record = tmp_path / "run" / "files.jsonl"
    record.parent.mkdir()
    first = open_source(str(root), record=record, trust=True)  # there is none yet
    assert not record.exists()  # which is written when all checks have passed
    record_files(Subset(first, [1, 2]), record.parent)
    assert [path.name for path in record.parent.iterdir()] == ["files.jsonl"]  # no temporary file stays
    header = json.loads(record.read_text().split("\n")[0])
    assert (header["root"], header["number"]) == (str(root), 4)

    make(root, "a/5.png", "c/d/6.png")
    (root / "b/3.png").rename(root / "b/7.png")
    kept = open_source(str(root), record=record, trust=True)
    assert (names(kept), kept.fingerprint) == (names(first), first.fingerprint)
    with pytest.raises(BadImage):
        kept.read(2)
    changed = open_source(str(root), record=record)
    assert names(changed) == ["a/1.png", "a/2.png", "a/5.png", "b/4.png", "b/7.png", "c/d/6.png"]
    assert changed.fingerprint != first.fingerprint


def test_the_record_of_a_list(tmp_path: Path) -> None:
    make(tmp_path, "1.png", "2.png")
    table, record = tmp_path / "list.csv", tmp_path / "files.jsonl"
    table.write_text("1.png,x\n2.png,y\n")
    record_files(open_source(str(table)), tmp_path)
    table.write_text("2.png,y\n")
    kept = open_source(str(table), record=record, trust=True)
    assert kept.labels is not None
    assert (names(kept), kept.labels.tolist()) == (["1.png", "2.png"], [-1, 0])
    assert names(open_source(str(table), record=record)) == ["2.png"]


def test_a_record_holds_for_the_same_images_elsewhere_and_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    root, other = make(tmp_path / "data", "1.png", "2.png"), make(tmp_path / "other", "1.png", "3.png")
    record = tmp_path / "files.jsonl"
    record_files(open_source(str(root)), tmp_path)
    with pytest.raises(
        ValueError, match=r"the images it was started with, those of .*data, but 2.png is not in .*other"
    ):
        open_source(str(other), record=record, trust=True)
    make(other, "2.png")
    assert names(open_source(str(other), record=record, trust=True)) == ["1.png", "2.png"]
    good = record.read_bytes()
    first, second, _ = good.split(b"\n")
    header = json.loads(first)
    bad = [b"", b"\n", b"{}\n[]", b"[]\n[]", good[:-9], good[:20], good.replace(b"2.png", b"5.png"), b"\xff" * 50]
    bad += [
        b"[" * 99999 + b"\n",
        first + b"\n[1, 2]\n",
        first + b'\n"ab"\n',
        first + b'\n{"1.png": 0, "2.png": 0, "3": 1}',
        json.dumps(header | {"version": 0}).encode() + b"\n" + second + b"\n",
    ]
    for content in bad:
        record.write_bytes(content)
        assert names(open_source(str(root), record=record, trust=True)) == ["1.png", "2.png"], content[:60]


LEAVES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=6
)
TREES = st.sets(
    st.tuples(st.sampled_from(["", "a/", "a/b/", "c c/", ".h/"]), LEAVES, st.sampled_from([".png", ".JPG", ".x"]))
)


@settings(max_examples=40, deadline=None)
@given(TREES)
def test_a_folder_and_its_record_hold_every_visible_image(tmp_path_factory, tree) -> None:
    root = tmp_path_factory.mktemp("tree")
    run = tmp_path_factory.mktemp("run")
    for folder, leaf, suffix in tree:
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / (leaf + suffix)).touch()
    (root / "always.png").touch()
    found = {folder + leaf + suffix for folder, leaf, suffix in tree if suffix != ".x" and leaf[0] != "."}
    expected = sorted({name for name in found if not name.startswith(".")} | {"always.png"}, key=os.fsencode)
    fresh = open_source(str(root))
    record_files(fresh, run)
    again = open_source(str(root), record=run / "files.jsonl", trust=True)
    assert names(fresh) == names(again) == expected
    assert fresh.fingerprint == again.fingerprint


# ---- subsets and splits


def test_subset_and_pickling(tmp_path: Path) -> None:
    root = make(tmp_path, "a/1.png", "a/2.png", "b/3.png", "b/4.png")
    source = open_source(str(root))
    part = Subset(source, [3, 0])
    assert part.labels is not None
    assert (names(part), part.labels.tolist(), part.classes) == (["b/4.png", "a/1.png"], [1, 0], ("a", "b"))
    assert part.read(0)[0, 0].tolist() == [3, 3, 3]
    assert part.fingerprint != Subset(source, [0, 3]).fingerprint != source.fingerprint
    nested = Subset(part, [1])
    assert names(nested) == ["a/1.png"]
    again = pickle.loads(pickle.dumps(nested))
    assert (names(again), again.fingerprint) == (["a/1.png"], nested.fingerprint)
    assert again.read(0).shape == (3, 4, 3)
    assert Subset(open_source(str(root), "none"), [1]).labels is None
    with pytest.raises(AssertionError):
        Subset(source, [4])


class Numbers:
    """A source of n numbers, as small as a source can be."""

    classes = ()
    fingerprint = "numbers"

    def __init__(self, num: int):
        self.num, self.labels = num, np.arange(num)

    def __len__(self) -> int:
        return self.num

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> np.ndarray:
        return np.full((1, 1, 3), index, np.uint8)


@given(st.integers(1, 300), st.floats(0, 1, exclude_max=True), st.integers(0, 400), st.integers(-(2**70), 2**70))
def test_a_split_is_a_partition(num: int, fraction: float, maximum: int, seed: int) -> None:
    train, held_out = hold_out(Numbers(num), fraction, maximum, seed)
    wanted = min(maximum, round(fraction * num), num - 1)
    assert (0 if held_out is None else len(held_out)) == wanted
    both = [*names(train), *(names(held_out) if held_out else [])]
    assert sorted(both, key=int) == [str(index) for index in range(num)]
    for part in (train, held_out):
        if part is not None:
            assert part.labels is not None
            assert [str(label) for label in part.labels] == names(part) == sorted(names(part), key=int)
    again = hold_out(Numbers(num), fraction, maximum, seed)
    assert again[0].fingerprint == train.fingerprint


def test_a_split_stays_the_same_and_depends_on_the_seed() -> None:
    _, held_out = hold_out(Numbers(100), 0.1, 1000, seed=0)
    assert held_out is not None
    assert names(held_out) == ["9", "12", "13", "18", "20", "36", "39", "67", "74", "82"]
    assert all(
        names(held_out) != names(other)
        for seed in (1, 2, 2**64 - 1)
        if (other := hold_out(Numbers(100), 0.1, 99, seed)[1])
    )
    counts = np.zeros(20)
    for seed in range(2000):  # every image is held out equally often
        other = hold_out(Numbers(20), 0.25, 99, seed)[1]
        assert other is not None
        assert other.labels is not None
        counts[other.labels] += 1
    assert np.abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_a_million_names_take_two_arrays(tmp_path: Path) -> None:
    lines = [f"n{index // 1300:08d}/image_{index:08d}.jpg" for index in range(100_000)]
    make(tmp_path, lines[0])
    (tmp_path / "list.txt").write_text("\n".join(lines))
    source = open_source(str(tmp_path / "list.txt"), "none")
    assert isinstance(source, Files)
    assert source.name(99_999) == lines[-1]
    assert len(pickle.dumps(source)) < 100_000 * (len(lines[0]) + 1 + 8) + 2000
