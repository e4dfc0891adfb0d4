"""Objects followed through videos: the reference's labels, J and F counted by hand, and clips that cannot be used."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dino
from dino import paper
from dino.cli import main
from dino.eval import davis, evaluate, propagation
from dino.options.evaluate import DavisOptions
from drawing import draw_video
from helpers import run_dino

CPU = torch.device("cpu")
SECONDS = {"deadline": None, "max_examples": 40}


@pytest.fixture(scope="module")
def model(saved_model):
    return dino.load(saved_model)


# --- propagation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [12, 3])
def test_labels_match_the_reference(golden, monkeypatch, tile):
    monkeypatch.setattr(propagation, "TILE", tile)
    g = golden("label_propagation")
    first = F.one_hot(torch.from_numpy(g["first_labels"]), g["soft_labels"].shape[1]).float()
    found = list(propagation.follow(torch.from_numpy(g["features"]), first, *map(int, g["params"])))
    np.testing.assert_allclose(torch.stack(found).permute(0, 3, 1, 2), g["soft_labels"], rtol=0, atol=1e-5)


@settings(**SECONDS)
@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.integers(0, 21), st.integers(1, 9), st.integers(0, 99)
)
def test_labels_by_hand(height, width, sources, radius, top_k, seed):
    """Whole numbers on few directions: ties abound, and all that tie with the last count."""
    rng = np.random.default_rng(seed)
    features = np.eye(4)[rng.integers(0, 4, (1 + sources, height, width))]
    labels = rng.random((sources, height, width, 2))
    found = propagation.propagate(
        torch.from_numpy(features[0]), torch.from_numpy(features[1:]), torch.from_numpy(labels), radius, top_k
    ).numpy()
    for y, x in itertools.islice(itertools.product(range(height), range(width)), seed % 7, None, 7):
        near = [
            (float(features[0, y, x] @ features[1 + s, v, u]), labels[s, v, u])
            for s, v, u in itertools.product(range(sources), range(height), range(width))
            if abs(v - y) <= radius and abs(u - x) <= radius
        ]
        least = sorted((likeness for likeness, _ in near), reverse=True)[:top_k][-1]
        kept = [(math.exp(likeness / 0.1), label) for likeness, label in near if likeness >= least]
        expected = sum(weight * label for weight, label in kept) / sum(weight for weight, _ in kept)
        np.testing.assert_allclose(found[y, x], expected, atol=1e-12)


def test_a_tile_sees_no_more_the_larger_the_frame():
    most = propagation.TILE**2 * (propagation.TILE + 2 * 12) ** 2
    pairs = 0
    for _, _, visible in propagation.find_neighborhoods(200, 300, 12):
        assert visible.numel() <= most
        pairs += int(visible.sum())
    along = [sum(min(n - 1, i + 12) - max(0, i - 12) + 1 for i in range(n)) for n in (200, 300)]
    assert pairs == along[0] * along[1]


def test_frames_are_looked_at_as_the_reference_does():
    assert propagation.fit_view(480, 854, 480, 16) == (480, 832)
    assert propagation.fit_view(1080, 1920, 480, 8) == (480, 832)
    assert propagation.fit_view(910, 480, 480, 16) == (896, 480)
    assert propagation.fit_view(480, 480, 480, 8) == (480, 448)  # 64 divides the side that is no shorter
    assert propagation.fit_view(480, 854, 102, 6) == (102, 180)  # smaller views keep their shape


def test_protocols_differ_in_the_deviation_of_red_alone(model):
    image = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
    for original, red in ((False, 0.229), (True, 0.228)):
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        pixels = (pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([red, 0.224, 0.225])[
            :, None, None
        ]
        expected = model.tokens(pixels)[-1][0, 1:].detach().view(5, 7, -1)
        found = propagation.extract_frame(model, image, (40, 56), original)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_masks_from_labels():
    labels = torch.zeros(2, 3, 3)
    labels[..., 0], labels[0, 0] = 0.9, torch.tensor([0.6, 0.0, 0.4])
    # The second object's 0.4 is its most, the background's 0.6 its least; the first object is nowhere.
    found = propagation.harden(labels, (8, 12), (16, 24))
    assert found.shape == (16, 24)
    assert found.dtype == np.uint8
    assert found[0, 0] == 2
    assert found[-1, -1] == 0
    assert set(np.unique(found)) == {0, 2}
    labels[:] = torch.tensor([0.0, 1.0, 0.0])  # an object that fills the frame: nothing to stretch
    assert (propagation.harden(labels, (8, 12), (16, 24)) == 1).all()
    labels[..., 0], labels[0, 0, 2] = 0.5, 0.25  # two that are the same everywhere: the first of them
    assert (propagation.harden(labels, (8, 12), (16, 24)) == 0).all()


# --- measures -------------------------------------------------------------------------------------------------------


def plain_region(a: np.ndarray, b: np.ndarray) -> float:
    pairs = list(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True))
    either = sum(x or y for x, y in pairs)
    return sum(x and y for x, y in pairs) / either if either else 1.0


def plain_contour(mask: np.ndarray) -> list[tuple[int, int]]:
    height, width = mask.shape
    return [
        (y, x)
        for y, x in itertools.product(range(height), range(width))
        if any(
            mask[y + v, x + u] != mask[y, x] for v, u in ((0, 1), (1, 0), (1, 1)) if y + v < height and x + u < width
        )
    ]


def plain_boundary(a: np.ndarray, b: np.ndarray) -> float:
    radius = math.ceil(0.008 * math.sqrt(a.shape[0] ** 2 + a.shape[1] ** 2))
    one, two = plain_contour(a), plain_contour(b)
    if not one or not two:
        return float(one == two)
    apart = ((np.array(one)[:, None] - np.array(two)) ** 2).sum(-1)
    precision, recall = (apart.min(axis=1) <= radius**2).mean(), (apart.min(axis=0) <= radius**2).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def plain_statistics(values: list[float]) -> list[float]:
    n = len(values)
    # Positions 1, 1 + (n - 1) / 4, ... rounded, halves up; a quarter holds both of its ends.
    ends = [math.floor(1 + (n - 1) * quarter / 4 + 0.5) - 1 for quarter in range(5)]
    first, last = values[ends[0] : ends[1] + 1], values[ends[3] : ends[4] + 1]
    mean = lambda x: sum(x) / len(x)  # noqa: E731
    return [mean(values), mean([v > 0.5 for v in values]), mean(first) - mean(last)]


@pytest.mark.slow
@settings(**SECONDS)
@given(st.integers(2, 60), st.integers(2, 160), st.sampled_from([0.0, 0.02, 0.4, 1.0]), st.integers(0, 999))
def test_measures_by_hand(height, width, density, seed):
    rng = np.random.default_rng(seed)
    masks = np.zeros((2, height, width), bool)
    for mask in masks:
        if rng.random() < 0.8:
            top, left = rng.integers(0, height), rng.integers(0, width)
            mask[top : top + rng.integers(1, height), left : left + rng.integers(1, width)] = True
        mask[rng.random(mask.shape) < density * rng.random()] ^= True
    assert davis.region(*masks) == pytest.approx(plain_region(*masks), abs=1e-12)
    assert davis.boundary(*masks) == pytest.approx(plain_boundary(*masks), abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=300))
def test_statistics_by_hand(values):
    assert list(davis.summarize(np.array(values)).values()) == pytest.approx(plain_statistics(values), abs=1e-12)


def test_an_object_that_is_nowhere():
    nothing, something = np.zeros((9, 9), bool), np.eye(9) > 0
    assert (davis.region(nothing, nothing), davis.boundary(nothing, nothing)) == (1, 1)
    assert (davis.region(nothing, something), davis.boundary(nothing, something)) == (0, 0)
    assert (davis.region(something, nothing), davis.boundary(something, nothing)) == (0, 0)


# --- whole videos ---------------------------------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path) -> Path:
    for i, name in enumerate(("apart", "alone", "third")):
        draw_video(tmp_path / "clips", name, objects=2 - i % 2, seed=i)
    return tmp_path / "clips"


def masks_of(folder: Path, name: str) -> list[np.ndarray]:
    found = []
    for path in sorted((folder / name).glob("*.png")):
        with Image.open(path) as image:
            assert image.mode == "P"
            assert image.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
            found.append(np.array(image))
    return found


def test_command_line_on_drawn_clips(saved_model, clips, tmp_path):
    command = ("eval", "davis", saved_model, "--data", clips, "--neighborhood", 4)
    results = []
    for ranks in (1, 2):
        done = run_dino(*command, "--json", tmp_path / f"{ranks}.json", ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Written") == done.stdout.count("Masks: ") == 1
        results.append(json.loads((tmp_path / f"{ranks}.json").read_text()))
    assert results[0] == results[1]
    assert results[0]["images"] == {"videos": 3, "frames": 21, "objects": 5}
    found, floors = [], []
    for name, objects in (("apart", 2), ("alone", 1), ("third", 2)):
        masks, truth = masks_of(tmp_path / "1.masks", name), masks_of(clips / "Annotations" / "480p", name)
        np.testing.assert_array_equal(masks, masks_of(tmp_path / "2.masks", name))
        np.testing.assert_array_equal(masks[0] > 0, (truth[0] > 0) & (truth[0] < 255))
        for k in range(1, objects + 1):
            pairs = [(masks[i] == k, truth[i] == k) for i in range(1, 6)]  # the first is given, the last left out
            found.append([plain_statistics([f(*pair) for pair in pairs]) for f in (plain_region, plain_boundary)])
            floors.append(plain_statistics([plain_region(truth[0] == k, truth[i] == k) for i in range(1, 6)])[0])
    figures = 100 * np.mean(found, axis=0)
    expected = dict(zip(("mean", "recall", "decay"), figures[0], strict=True))
    assert {w: results[0]["figures"][f"j_{w}"] for w in expected} == pytest.approx(expected)
    expected = dict(zip(("mean", "recall", "decay"), figures[1], strict=True))
    assert {w: results[0]["figures"][f"f_{w}"] for w in expected} == pytest.approx(expected)
    assert results[0]["figures"]["jf_mean"] == pytest.approx(figures[:, 0].mean())
    assert results[0]["objects"]["apart"][1]["f"]["mean"] == pytest.approx(found[1][1][0])
    assert results[0]["figures"]["j_mean"] > 100 * np.mean(floors) + 10  # it follows them


def test_finished_videos_are_not_computed_again(saved_model, clips, tmp_path):
    def run(**options):
        out = tmp_path / "out"
        found = evaluate.evaluate("davis", str(saved_model), data=str(clips), out=str(out), device="cpu", **options)
        return found.figures, {p.parent.name: p.stat().st_mtime_ns for p in sorted(out.glob("*/00003.png"))}

    def changed(before, after):
        return {name for name in after if before[name] != after[name]}

    figures, first = run()
    (tmp_path / "out" / "alone" / "figures.json").unlink()  # as if interrupted in this one
    again, second = run()
    assert again == figures
    assert changed(first, second) == {"alone"}
    os.utime(clips / "Annotations" / "480p" / "third" / "00000.png", (1, 1))
    assert changed(second, third := run()[1]) == {"third"}
    assert changed(third, run(protocol="original")[1]) == {"apart", "alone", "third"}


def test_the_paper_stands_beside_the_whole_validation_set(model, tmp_path):
    for i in range(30):
        draw_video(tmp_path / "davis", f"v{i}", objects=2, count=3)
    draw = tmp_path / "davis" / "Annotations" / "480p" / "v7" / "00000.png"
    with Image.open(draw) as image:
        indices = np.array(image)
    indices[:8, :8] = 3  # the sixty-first object
    picture = Image.fromarray(indices)
    picture.putpalette(davis.PALETTE)
    picture.save(draw)
    options = DavisOptions(model="-", data=str(tmp_path / "davis"), out=str(tmp_path / "out"), queue=1)
    found = davis.evaluate(model, options, CPU)
    assert found.counts == {"videos": 30, "frames": 90, "objects": 61}
    for theirs in paper.FIGURES["davis"].values():
        assert theirs.keys() < found.figures.keys()
    assert "paper (vit_small/16)" in evaluate.format_table(
        "m", found, paper.FIGURES["davis"]["vit_small/16"], "vit_small/16"
    )


# --- what cannot be used --------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def smaller(path: Path) -> None:
    with Image.open(path) as image:
        reduced = image.resize((64, 48))
    reduced.save(path)


def blank(path: Path) -> None:
    picture = Image.fromarray(np.zeros((96, 128), np.uint8))
    picture.putpalette(davis.PALETTE)
    picture.save(path)


def renumber(folder: Path) -> None:
    for i in range(7):
        (folder / f"{i:05d}.jpg").rename(folder / f"{6 + i}.jpg")


FRAMES, TRUTH = Path("JPEGImages", "480p", "apart"), Path("Annotations", "480p", "apart")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda d: shutil.rmtree(d / "ImageSets"), "is not laid out as DAVIS-2017"),
        (lambda d: (d / davis.LIST).write_text("\n"), "names no video"),
        (lambda d: shutil.rmtree(d / FRAMES), "apart is missing, a video that"),
        (lambda d: shutil.rmtree(d / TRUTH), "7 of the 7 files that the frames of apart names are missing"),
        (lambda d: (d / TRUTH / "00000.png").unlink(), "1 of the 7 files that the frames of apart name"),
        (lambda d: (d / FRAMES / "00003.jpg").unlink(), "by name 00002.jpg is followed by 00004.jpg"),
        (lambda d: renumber(d / FRAMES), "by name 12.jpg is followed by 6.jpg"),
        (lambda d: (d / FRAMES / "00006.jpg").rename(d / FRAMES / "last.jpg"), "last.jpg of video apart is not named"),
        (lambda d: [(d / FRAMES / f"0000{i}.jpg").unlink() for i in range(1, 7)], "video apart has 1 frame; all but"),
        (
            lambda d: smaller(d / TRUTH / "00002.png"),
            "annotation apart/00002.png is 64 x 48 pixels and the first frame",
        ),
        (lambda d: smaller(d / FRAMES / "00002.jpg"), "frame apart/00002.jpg is 64 x 48 pixels and the first frame"),
        (lambda d: blank(d / TRUTH / "00000.png"), "apart/00000.png of the first frame holds no object"),
        (lambda d: (d / FRAMES / "00002.jpg").write_bytes(b"GIF"), "00002.jpg cannot be read as an image"),
        (lambda d: cut(d / FRAMES / "00002.jpg"), "frame apart/00002.jpg cannot be read"),
        (lambda d: cut(d / TRUTH / "00000.png"), "frame apart/00000: its mask 00000.png cannot be read"),
    ],
)
def test_unusable_videos_are_named(saved_model, clips, tmp_path, capsys, spoil, complaint):
    spoil(clips)
    arguments = ["eval", "davis", str(saved_model), "--data", str(clips), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ((), "give --out FOLDER"),
        (("--out", "out", "--size", "7"), "smaller than one patch of 8"),
        (("--out", "taken/out"), "masks cannot be written to"),
    ],
)
def test_unusable_options_are_said(saved_model, clips, tmp_path, monkeypatch, capsys, flags, complaint):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("")
    assert main(["eval", "davis", str(saved_model), "--data", str(clips), *flags]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("queue", -1, "cannot be negative"),
        ("neighborhood", -1, "cannot be negative"),
        ("top_k", 0, "must be at least 1"),
    ],
)
def test_options_out_of_range(name, value, rule):
    with pytest.raises(ValueError, match=f"^{name} is {value}; it {rule}"):
        DavisOptions(model="-", data="-", **{name: value})
