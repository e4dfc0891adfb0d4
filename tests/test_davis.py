"""Objects followed through videos: the reference's soft labels, J and F by hand, and clips we draw."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import ranks_agree
from dino.cli import main
from dino.engine.memory import peak
from dino.eval import davis, propagation
from dino.eval.options import DavisOptions

PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0] + [7] * (3 * 253)


def unit(seed: int, *shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_soft_labels_are_the_references(golden):
    """Each frame from the first and the last 7, for 11 frames: within 1e-5."""
    expected = golden("label_propagation")
    queue, radius, topk = expected["params"].tolist()
    features = F.normalize(torch.from_numpy(expected["features"]), dim=-1)
    first = F.one_hot(torch.from_numpy(expected["first_labels"]), expected["soft_labels"].shape[1]).float()
    recent: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=queue)
    for target, soft in zip(features[1:], expected["soft_labels"], strict=True):
        sources, labels = (torch.stack([x[k] for x in ((features[0], first), *recent)], dim=2) for k in (0, 1))
        found = propagation.propagate(target, sources, labels, radius, topk)
        recent.append((target, found))
        np.testing.assert_allclose(found.permute(2, 0, 1), soft, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 7), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99)
)
def test_propagation_is_a_masked_affinity_over_all_pairs(h, w, m, radius, topk, seed):
    target, sources, labels = unit(seed, h, w, 5), unit(seed + 1, h, w, m, 5), torch.rand(h, w, m, 3)
    found = propagation.propagate(target, sources, labels, radius, topk)
    for i in range(h):
        for j in range(w):
            near = [
                (float((target[i, j] @ sources[y, x, k] / 0.1).exp()), labels[y, x, k])
                for y in range(h)
                for k in range(m)
                for x in range(w)
                if abs(y - i) <= radius and abs(x - j) <= radius
            ]
            best = sorted(near, key=lambda pair: -pair[0])[:topk]
            plain = sum(a * label for a, label in best) / sum(a for a, _ in best)
            torch.testing.assert_close(found[i, j], plain, rtol=1e-4, atol=1e-5)


def test_memory_does_not_grow_with_the_frame():
    held = []
    for h, w in ((48, 48), (60, 120)):
        target, sources, labels = unit(0, h, w, 4), unit(1, h, w, 3, 4), torch.rand(h, w, 3, 2)
        held.append(peak(lambda t=target, s=sources, k=labels: propagation.propagate(t, s, k, 2, 5)) - h * w * 2 * 4)
    assert held[1] == pytest.approx(held[0], rel=0.1)
    assert held[1] < 0.02 * 4 * 3 * (60 * 120) ** 2


def test_harden_stretches_each_class_and_takes_the_largest():
    soft = torch.zeros(2, 2, 3)
    soft[..., 0], soft[0, 0, 1] = (
        0.5,
        0.1,
    )  # 0 is the same everywhere, 1 is small but highest for its class, 2 is nowhere
    assert propagation.harden(soft, 2)[0, 0] == 1
    assert set(np.unique(propagation.harden(soft, 2))) <= {0, 1}


def plain_boundary(mask: np.ndarray) -> set[tuple[int, int]]:
    h, w = mask.shape
    edge = set()
    for y in range(h):
        for x in range(w):
            steps = [(0, 1), (1, 0), (1, 1)] if y < h - 1 and x < w - 1 else [(0, 1)] if x < w - 1 else [(1, 0)]
            if (y, x) != (h - 1, w - 1) and any(mask[y, x] != mask[y + a, x + b] for a, b in steps):
                edge.add((y, x))
    return edge


def plain_contour(found: np.ndarray, truth: np.ndarray) -> float:
    reach = np.ceil(0.008 * np.hypot(*found.shape))
    ours, theirs = plain_boundary(found), plain_boundary(truth)
    if not ours or not theirs:
        return float(bool(ours) == bool(theirs))
    hit = lambda a, b: sum(any(np.hypot(y - v, x - u) <= reach for v, u in b) for y, x in a) / len(a)  # noqa: E731
    precision, recall = hit(ours, theirs), hit(theirs, ours)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 40), st.integers(150, 200), st.integers(0, 999))
def test_region_and_contour_against_their_definitions(height, width, seed):
    rng = np.random.default_rng(seed)
    masks = np.zeros((2, height, width), bool)
    for mask in masks:
        for _ in range(rng.integers(0, 3)):
            y, x = rng.integers(height), rng.integers(width)
            mask[y : y + rng.integers(1, 12), x : x + rng.integers(1, 30)] = True
    assert propagation.contour(*masks) == pytest.approx(plain_contour(*masks))
    both, any_ = (masks[0] & masks[1]).sum(), (masks[0] | masks[1]).sum()
    assert propagation.region(*masks) == pytest.approx(both / any_ if any_ else 1)


def test_statistics_of_an_object():
    values = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    mean, recall, decay = propagation.mean_recall_decay(values)
    assert (mean, recall) == (pytest.approx(0.6), pytest.approx(5 / 9))
    assert decay == pytest.approx(np.mean([1.0, 0.9, 0.8]) - np.mean([0.4, 0.3, 0.2]))  # quarters share their ends


@pytest.mark.parametrize(
    ("shape", "patch", "expected"),
    [
        ((480, 854), 16, (480, 832)),
        ((480, 854), 8, (480, 832)),
        ((1920, 1080), 16, (832, 480)),
        ((48, 96), 6, (480, 960)),
    ],
)
def test_frames_keep_their_shape_up_to_64_pixels(shape, patch, expected):
    assert davis.frame_size(*shape, 480, patch) == expected


def test_the_original_protocol_has_the_misprint_in_red():
    shown = []
    model: Any = SimpleNamespace(
        in_channels=3, grid=lambda h, w: (1, 1), tokens=lambda x: shown.append(x.clone()) or [torch.ones(1, 2, 3)]
    )
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    for protocol in ("fixed", "original"):
        davis.patches(model, image, protocol, torch.device("cpu"))
    torch.testing.assert_close(shown[1][:, 0], shown[0][:, 0] * 0.229 / 0.228)
    torch.testing.assert_close(shown[1][:, 1:], shown[0][:, 1:])


@pytest.fixture
def videos(tmp_path) -> Path:
    """Two clips of 7 frames: one with a square, one with a square and a bar, on noise."""
    root, rng = tmp_path / "davis", np.random.default_rng(0)
    for name, objects in (("one", 1), ("two", 2)):
        background = rng.integers(0, 90, (64, 80, 3))
        for i in range(7):
            outlined = np.zeros((64, 80), np.uint8)
            outlined[10:34, 4 + 3 * i : 28 + 3 * i] = 1
            if objects == 2:
                outlined[44:60, 10:70] = 2
            pixels = np.where(
                outlined[..., None] == 0, background, np.array([[0] * 3, [250, 60, 60], [60, 60, 250]])[outlined]
            )
            for kind, ending in (("JPEGImages", "jpg"), ("Annotations", "png")):
                (root / kind / "480p" / name).mkdir(parents=True, exist_ok=True)
                image = Image.fromarray((pixels if kind == "JPEGImages" else outlined).astype(np.uint8))
                if kind == "Annotations":
                    image.putpalette(PALETTE)
                image.save(root / kind / "480p" / name / f"{i:05d}.{ending}")
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("one\ntwo\n")
    return root


def test_objects_are_followed_written_and_judged(videos, saved_model, tmp_path):
    out = tmp_path / "masks"
    result = ranks_agree("eval", "davis", saved_model, "--data", videos, "--out", out, "--size", 64)
    assert result["images"] == {"videos": 2, "objects": 3}
    figures = result["figures"]
    assert figures["jf_mean"] == pytest.approx((figures["j_mean"] + figures["f_mean"]) / 2)
    assert figures["j_mean"] > 60  # colour alone nearly finds them
    j = []
    for name, objects in (("one", 1), ("two", 2)):
        truth, found = ([], [])
        for i in range(7):
            path = out / name / f"{i:05d}.png"
            with Image.open(path) as image, Image.open(videos / "Annotations" / "480p" / name / path.name) as given:
                assert image.mode == "P"
                assert (image.getpalette() or [])[:9] == PALETTE[:9]
                found.append(np.array(image))
                truth.append(np.array(given))
        np.testing.assert_array_equal(found[0], truth[0])
        for k in range(1, objects + 1):
            overlaps = [
                ((f == k) & (t == k)).sum() / ((f == k) | (t == k)).sum() for f, t in zip(found, truth, strict=True)
            ]
            j.append(np.mean(overlaps[1:-1]))  # the first is given, the last is not judged
    assert figures["j_mean"] == pytest.approx(100 * np.mean(j))


def test_finished_videos_are_not_done_again_unless_something_changed(videos, saved_model, tmp_path, capsys):
    flags = ["eval", "davis", str(saved_model), "--data", str(videos), "--out", str(tmp_path / "m"), "--size", "64"]
    assert main(flags) == 0
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "m").rglob("*.png")}
    (tmp_path / "m" / "two.json").write_text(json.dumps({"stamp": "another"}))
    assert main(flags) == 0
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "m").rglob("*.png")}
    assert [p.parent.name for p in times if times[p] != after[p]] == ["two"] * 7
    first = capsys.readouterr().out
    assert first[: len(first) // 2] == first[len(first) // 2 :]
    assert main([*flags, "--radius", "1"]) == 0
    assert all(p.stat().st_mtime_ns != after[p] for p in after)


def test_kind_to_what_does_not_fit(videos, saved_model, tmp_path, capsys):
    flags = ["eval", "davis", str(saved_model), "--out", str(tmp_path / "m"), "--size", "64", "--data"]
    frames, outlines = (videos / kind / "480p" / "one" for kind in ("JPEGImages", "Annotations"))

    def said(*words: str, data: Path = videos) -> None:
        assert main([*flags, str(data)]) == 2
        heard = capsys.readouterr().err
        assert all(word in heard for word in words), heard
        assert heard.count("\n") == 1

    said("not laid out as DAVIS-2017", "ImageSets/2017/val.txt", data=tmp_path)
    Image.fromarray(np.zeros((30, 80), np.uint8)).save(outlines / "00003.png")
    said("00003.png is 80 x 30 pixels and its frame 80 x 64")
    (outlines / "00003.png").unlink()
    said("1 of the 7 files", "00003.png")
    Image.fromarray(np.zeros((64, 80), np.uint8)).save(outlines / "00003.png")
    (frames / "00002.jpg").write_bytes(b"no image")
    said("frame 2 of one cannot be used")
    (frames / "00002.jpg").unlink()
    said("not in order: by name 3 follows 1")
    for path in sorted(frames.glob("*.jpg")):
        path.rename(frames / f"{int(path.stem) + 8}.jpg")  # 8, 9, 11 ...
    said("not in order", "leading zeros")
    for path in list(frames.glob("*.jpg"))[1:]:
        path.unlink()
    said("holds 1 frames")
    (videos / "ImageSets" / "2017" / "val.txt").write_text("two\n")
    first = videos / "Annotations" / "480p" / "two" / "00000.png"
    Image.fromarray(np.zeros((64, 80), np.uint8)).save(first)
    said("outlines no object to follow")


@pytest.mark.parametrize(("name", "value"), [("queue", -1), ("radius", 0), ("topk", 0)])
def test_impossible_options(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        DavisOptions(model="m", data="d", **{name: value})
