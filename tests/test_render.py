"""Rendered views against Pillow and torchvision, operation by operation and whole; both backends; odd images.

Differences are in levels (0 to 255): mean absolute, mean signed (bias) and largest. Pictures are drawn here; where the
environment variable DINO_DATA names a folder with imagenet_sample.zip, photographs from it are used as well.
"""

from __future__ import annotations

import io
import itertools
import os
import zipfile
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps

from dino.data.device_render import LARGEST, DeviceRenderer, Parameters, crop_batch
from dino.data.normalize import normalize
from dino.data.render import CpuRenderer, blur_kernels, crop
from dino.data.views import HUE, Views, draw_views
from dino.models.preprocessing import MEAN, STD
from dino.options.recipes import find_recipe

SIZE = 160
OPTIONS = find_recipe("vit_small_100ep").options.views
PILLOW = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    yield
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])


# ------------------------------------------------------------------------------------------------------ pictures


def draw_picture(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth colors, discs, thin lines and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [
        np.sin(2 * np.pi * (rng.uniform(-1.5, 1.5) * x + rng.uniform(-1.5, 1.5) * y + rng.uniform())) for _ in "rgb"
    ]
    picture = np.ascontiguousarray(127 + 90 * np.stack(waves, -1), np.float32)
    for _ in range(12):
        start, end = ((int(rng.integers(width)), int(rng.integers(height))) for _ in range(2))
        disc, line = (rng.integers(0, 256, 3).tolist() for _ in range(2))
        cv2.circle(picture, start, int(rng.integers(2, 5 + min(height, width) // 5)), disc, -1)
        cv2.line(picture, start, end, line, 1)
    return np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)


@cache
def photographs() -> list[np.ndarray]:
    archive = Path(os.environ.get("DINO_DATA", "")) / "imagenet_sample.zip"
    if "DINO_DATA" not in os.environ or not archive.exists():
        pytest.skip("DINO_DATA names no folder with imagenet_sample.zip")
    with zipfile.ZipFile(archive) as file:
        names = sorted(n for n in file.namelist() if n.endswith(".JPEG"))[::35]
        return [np.array(Image.open(io.BytesIO(file.read(name))).convert("RGB")) for name in names]


@cache
def sources(kind: str) -> list[np.ndarray]:
    if kind == "photographs":
        return photographs()
    return [draw_picture(h, w, seed) for seed, (h, w) in enumerate([(375, 500), (500, 333), (300, 310), (240, 400)])]


@cache
def squares(kind: str) -> list[np.ndarray]:
    """The sources at SIZE x SIZE, for operations after the crop."""
    return [np.array(Image.fromarray(s).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for s in sources(kind)]


either_source = pytest.mark.parametrize("kind", ["drawn", "photographs"])


# ---------------------------------------------------------------------------------------------------- parameters


def plain(num_images: int, sizes: tuple[int, ...], **changes) -> Views:
    """Views that change nothing, but for `changes` (broadcast to all images and views)."""
    n, v = num_images, len(sizes)
    values = {
        "box": ((0, 0, sizes[0], sizes[0]), np.int32),
        "flip": (False, bool),
        "jitter": (False, bool),
        "order": (range(4), np.int8),
        "factors": ((1, 1, 1, 0), np.float32),
        "gray": (False, bool),
        "sigma": (0, np.float32),
        "solarize": (False, bool),
    }
    arrays = {}
    for name, (value, kind) in values.items():
        value = np.asarray(changes.get(name, value), kind)
        width = (4,) if name in ("box", "order", "factors") else ()
        arrays[name] = np.broadcast_to(value, (n, v, *width)).copy()
    return Views(sizes=sizes, **arrays)


def factor(step: int, value: float) -> dict:
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[step] = value
    return {"jitter": True, "factors": factors}


def colored(backend: str, images: list[np.ndarray], views: Views) -> np.ndarray:
    """uint8 [n, s, s, 3] of one view each, no crop."""
    crops = torch.from_numpy(np.stack(images)[None].copy())
    if backend == "opencv":
        return CpuRenderer().color([crops], views)[0].numpy()[0]
    renderer = DeviceRenderer("cuda" if backend == "cuda" else "cpu")
    parameters = Parameters(views, blur_kernels(views.sigma), slice(0, 1), renderer.device)
    planes = crops.to(renderer.device).permute(0, 1, 4, 2, 3).float()
    return renderer.color(planes, parameters).cpu().numpy()[0]


def on_device(images: list[np.ndarray], views: Views, half: bool = False) -> list[torch.Tensor]:
    """Both halves of the device's rendering, on the CPU; with the GPU's half precision if asked for."""
    renderer = DeviceRenderer("cpu")
    renderer.dtype = torch.float16 if half else torch.float32
    return renderer.finish(renderer.prepare(images, views), views)


def with_pillow(image: np.ndarray, views: Views, i: int, view: int) -> np.ndarray:
    """One view as the reference makes it, from the same parameters."""
    top, left, height, width = views.box[i, view].tolist()
    size = views.sizes[view]
    picture = Image.fromarray(image).crop((left, top, left + width, top + height))
    # Rows first, as Pillow did before 13, which picks what is cheaper. It rounds and clips in between, so that the
    # order moves some pixels at sharp edges by several levels (0.25 on average, where Pillow 13 has it reversed).
    picture = picture.resize((size, height), Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC)
    if views.flip[i, view]:
        picture = TF.hflip(picture)
    if views.jitter[i, view]:
        for step in views.order[i, view]:
            picture = PILLOW[step](picture, float(views.factors[i, view, step]))
    if views.gray[i, view]:
        picture = TF.to_grayscale(picture, 3)
    if views.sigma[i, view] > 0:
        picture = picture.filter(ImageFilter.GaussianBlur(float(views.sigma[i, view])))
    if views.solarize[i, view]:
        picture = ImageOps.solarize(picture)
    return np.asarray(picture)


def check(ours: np.ndarray, theirs: np.ndarray, mean: float, largest: int, bias: float | None = None) -> None:
    difference = ours.astype(np.int64) - theirs
    assert np.abs(difference).mean() <= mean
    assert np.abs(difference).max() <= largest
    assert abs(difference.mean()) <= (mean if bias is None else bias)


backends = pytest.mark.parametrize(
    "backend",
    [
        "opencv",
        "torch",
        pytest.param(
            "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
        ),
    ],
)


# ------------------------------------------------------------------------------ one operation at a time, against Pillow


@either_source
@pytest.mark.parametrize("size", [224, 96])
def test_crop_and_resize(kind, size):
    for flip in (False, True):
        views = draw_views(OPTIONS, 0, 0, range(len(sources(kind))), np.array([s.shape[:2] for s in sources(kind)]))
        views = plain(len(sources(kind)), (size,) * 10, box=views.box, flip=flip)
        ours = torch.cat(crop(sources(kind), views))
        for i, image in enumerate(sources(kind)):
            for view in range(10):
                check(ours[view, i].numpy(), with_pillow(image, views, i, view), mean=0.02, largest=2)


@either_source
@backends
@pytest.mark.parametrize("value", [0.6, 0.8317, 0.97, 1.1703, 1.4])
@pytest.mark.parametrize("step", [0, 1])
def test_brightness_and_contrast(backend, kind, step, value):
    images = squares(kind)
    ours = colored(backend, images, plain(len(images), (SIZE,), **factor(step, value)))
    theirs = [np.asarray(PILLOW[step](Image.fromarray(image), value)) for image in images]
    check(ours, np.stack(theirs), mean=0.02, largest=1)


@either_source
@backends
def test_saturation(backend, kind):
    images, bias = squares(kind), []
    values = np.linspace(0.8, 1.2, 23)[1:-1] + 1e-3
    for value in values:
        ours = colored(backend, images, plain(len(images), (SIZE,), **factor(2, value)))
        theirs = np.stack([np.asarray(TF.adjust_saturation(Image.fromarray(image), value)) for image in images])
        # Pillow rounds the luma first and cuts the result: next to that OpenCV's is finer.
        check(ours, theirs, mean=0.25 if backend == "opencv" else 0.001, largest=1)
        bias.append((ours.astype(int) - theirs).mean())
    assert abs(np.mean(bias)) < 0.05


@either_source
@backends
@pytest.mark.parametrize("value", [-0.1, -0.042, 0.031, 0.1])
def test_hue(backend, kind, value):
    images = squares(kind)
    ours = colored(backend, images, plain(len(images), (SIZE,), **factor(HUE, value)))
    theirs = np.stack([np.asarray(TF.adjust_hue(Image.fromarray(image), value)) for image in images])
    # Pillow cuts hue and saturation down to bytes where OpenCV rounds.
    mean, largest, bias = (1.1, 14, 0.35) if backend == "opencv" else (0.005, 7, 0.003)
    check(ours, theirs, mean, largest, bias)
    assert np.percentile(np.abs(ours.astype(int) - theirs), 99) <= (9 if backend == "opencv" else 0)


@either_source
@backends
def test_gray(backend, kind):
    images = squares(kind)
    ours = colored(backend, images, plain(len(images), (SIZE,), gray=True))
    theirs = np.stack([np.asarray(TF.to_grayscale(Image.fromarray(image), 3)) for image in images])
    check(ours, theirs, mean=0.005, largest=1)


@either_source
@backends
def test_solarize(backend, kind):
    images = squares(kind)
    ours = colored(backend, images, plain(len(images), (SIZE,), solarize=True))
    theirs = np.stack([np.asarray(ImageOps.solarize(Image.fromarray(image))) for image in images])
    assert (ours == theirs).all()


@either_source
@backends
@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.52, 0.8, 1.13, 1.4, 1.5, 1.81, 2.0])
def test_blur(backend, kind, sigma):
    images = squares(kind)
    ours = colored(backend, images, plain(len(images), (SIZE,), sigma=sigma))
    blur = ImageFilter.GaussianBlur(sigma)
    theirs = np.stack([np.asarray(Image.fromarray(image).filter(blur)) for image in images])
    # Pillow rounds to bytes six times on the way, and repeats the edge anew for each of its three boxes.
    check(ours, theirs, mean=0.9, largest=25, bias=0.03)
    check(ours[:, 8:-8, 8:-8], theirs[:, 8:-8, 8:-8], mean=0.9, largest=3, bias=0.03)


@either_source
@backends
@pytest.mark.parametrize("factors", [(0.71, 1.33, 0.85, 0.05), (1.35, 0.65, 1.15, -0.06), (0.8, 0.72, 0.93, 0.08)])
def test_jitter_in_every_order(backend, kind, factors):
    images = squares(kind)[:2]
    for order in itertools.permutations(range(4)):
        views = plain(len(images), (SIZE,), jitter=True, factors=factors, order=order)
        theirs = np.stack([with_pillow(image, views, i, 0) for i, image in enumerate(images)])
        ours = colored(backend, images, views)
        # A mean luma that falls on the other side of a half moves the whole picture by a third of a level.
        mean, largest, bias = (1.5, 16, 0.8) if backend == "opencv" else (0.01, 9, 0.01)
        check(ours, theirs, mean, largest, bias)


# ------------------------------------------------------------------------------------------------ the whole pipeline


def drawn(kind: str, epoch: int = 0) -> tuple[list[np.ndarray], Views]:
    images = sources(kind)
    return images, draw_views(OPTIONS, 0, epoch, range(len(images)), np.array([i.shape[:2] for i in images]))


@either_source
@pytest.mark.parametrize(("renderer", "mean", "bias"), [(CpuRenderer().prepare, 0.9, 0.2), (on_device, 0.4, 0.05)])
def test_views_are_those_of_pillow_and_torchvision(kind, renderer, mean, bias):
    differences = []
    for epoch in range(4):
        images, views = drawn(kind, epoch)
        for group, out in zip(views.groups, renderer(images, views), strict=True):
            for view, (i, image) in itertools.product(range(group.start, group.stop), enumerate(images)):
                theirs = with_pillow(image, views, i, view).astype(int)
                differences.append((out[view - group.start, i].numpy() - theirs).ravel())
    difference = np.concatenate(differences)
    assert np.abs(difference).mean() < mean
    assert abs(difference.mean()) < bias
    assert np.percentile(np.abs(difference), 99.9) <= 12


@either_source
def test_backends_agree(kind):
    images, views = drawn(kind)
    for a, b in zip(CpuRenderer().prepare(images, views), on_device(images, views), strict=True):
        assert a.dtype == b.dtype == torch.uint8
        check(a.numpy(), b.numpy(), mean=0.8, largest=40, bias=0.2)


def test_backends_agree_exactly_on_what_both_do_exactly():
    images = squares("drawn")
    for changes in ({"solarize": True}, {"gray": True, "solarize": True}, {"sigma": 1.2}, {"gray": True, "sigma": 0.7}):
        a, b = (colored(backend, images, plain(len(images), (SIZE,), **changes)) for backend in ("opencv", "torch"))
        wrong = a != b  # at halves, one rounds up and the other to even; solarizing sends 127 and 128 to 127
        assert wrong.mean() < 0.01
        assert np.abs(a.astype(int) - b).max() <= 1


@pytest.mark.parametrize("renderer", [CpuRenderer().prepare, on_device, crop])
def test_shapes_and_batch_composition(renderer):
    images, views = drawn("drawn")
    whole = renderer(images, views)
    assert [tuple(group.shape) for group in whole] == [(2, 4, 224, 224, 3), (8, 4, 96, 96, 3)]
    assert all(group.is_contiguous() for group in whole)
    shapes = np.array([i.shape[:2] for i in images])
    for part in ([2], [3, 0]):
        some = draw_views(OPTIONS, 0, 0, part, shapes[part])
        for group, expected in zip(renderer([images[i] for i in part], some), whole, strict=True):
            assert torch.equal(group, expected[:, part])


@either_source
@pytest.mark.parametrize(("half", "mean", "largest"), [(False, 0.006, 2), (True, 0.12, 2)])
def test_a_device_cuts_as_a_worker_does(kind, half, mean, largest):
    """Up to the order of sums; in half precision a weight is a 2^-12 part off, at most an eighth of a level."""
    images, views = drawn(kind)
    boxes, flips = torch.from_numpy(views.box), torch.from_numpy(views.flip)
    canvas = (
        DeviceRenderer("cpu").prepare(images, views)[0].permute(0, 3, 1, 2).to(torch.float16 if half else torch.float32)
    )
    for group, theirs in zip(views.groups, crop(images, views), strict=True):
        ours = crop_batch(canvas, boxes[:, group], flips[:, group], theirs.shape[2], 5.0)
        check(ours.permute(0, 1, 3, 4, 2).numpy(), theirs.numpy(), mean, largest, bias=0.01)


def test_a_device_renders_whole_batches_in_half_precision():
    images, views = drawn("drawn")
    for ours, theirs in zip(on_device(images, views, half=True), on_device(images, views), strict=True):
        check(ours.numpy(), theirs.numpy(), mean=0.3, largest=40, bias=0.02)


def test_large_images_are_cut_by_the_worker():
    images = [draw_picture(h, w, 0) for h, w in [(300, 400), (100, LARGEST + 1), (LARGEST, 200), (1500, 1200)]]
    views = draw_views(OPTIONS, 0, 0, range(4), np.array([i.shape[:2] for i in images]))
    canvas, _, _, small, *cut = DeviceRenderer("cpu").prepare(images, views)
    assert canvas.shape == (2, LARGEST, 400, 3)
    assert small.tolist() == [0, 2]
    for groups, expected, of in zip(cut, crop(images, views), on_device(images, views), strict=True):
        assert torch.equal(groups, expected[:, [1, 3]])
        for i in range(4):
            alone = on_device([images[i]], views.of([i]))[0 if expected.shape[2] == 224 else 1]
            check(of[:, i].numpy(), alone[:, 0].numpy(), mean=0.001, largest=1)


def test_many_pages_are_cut_in_parts(monkeypatch):
    images, views = drawn("drawn")
    whole = on_device(images, views)
    monkeypatch.setattr("dino.data.device_render.MOST_NUMBERS", 2**22)
    assert all(torch.equal(a, b) for a, b in zip(whole, on_device(images, views), strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_the_device_is_not_waited_for():
    images, views = drawn("drawn")
    renderer, packed = DeviceRenderer("cuda"), [x.pin_memory() for x in DeviceRenderer("cpu").prepare(images, views)]
    expected = [normalize(group) for group in on_device(images, views)]
    renderer.finish(packed, views)  # chooses kernels
    try:
        torch.cuda.set_sync_debug_mode("error")
        ours = [normalize(group) for group in renderer.finish(packed, views)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(ours, expected, strict=True):
        assert (a.cpu() - b).abs().mean() < 0.01


# ------------------------------------------------------------------------------------------------------- properties


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    size=st.sampled_from([1, 2, 17, 32]),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_any_box_of_any_image_renders(shape, size, seed, data):
    height, width = shape
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    image.flags.writeable = False  # as Pillow's arrays can be
    changes = {
        "jitter": True,
        "factors": (rng.uniform(0, 2), rng.uniform(0, 2), rng.uniform(0, 2), rng.uniform(-0.5, 0.5)),
    }
    coin = rng.random(4) < 0.5
    views = plain(
        1,
        (size, size),
        box=(top, left, h, w),
        flip=coin[0],
        gray=coin[1],
        solarize=coin[2],
        sigma=rng.uniform(0.1, 3) * coin[3],
        order=rng.permutation(4),
        **changes,
    )
    (cropped,) = crop([image], views)
    resized = with_pillow(image, plain(1, (size,), box=(top, left, h, w), flip=coin[0]), 0, 0)
    check(cropped[0, 0].numpy(), resized, mean=0.4, largest=2)
    for renderer in (CpuRenderer().prepare, on_device):
        (out,) = renderer([image], views)
        assert out.shape == (2, 1, size, size, 3)
        assert torch.equal(out[0], out[1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (10, 10000), (10000, 10), (5, 4), (2000, 1500)])
def test_odd_images(shape):
    image = draw_picture(*shape, seed=1)
    views = draw_views(OPTIONS, 0, 0, range(3), np.tile(shape, (3, 1)))
    for a, b in zip(CpuRenderer().prepare([image] * 3, views), on_device([image] * 3, views), strict=True):
        check(a.numpy(), b.numpy(), mean=2, largest=40)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 40), seed=st.integers(0, 2**32), flip=st.booleans())
def test_identity_gives_the_plain_resize(size, seed, flip):
    image = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    for jitter in (False, True):  # factors of 1 and no shift of hue are no change either
        views = plain(1, (size,), jitter=jitter, flip=flip)
        for renderer in (CpuRenderer().prepare, on_device):
            (out,) = renderer([image], views)
            assert (out.numpy()[0, 0] == (image[:, ::-1] if flip else image)).all()


@settings(max_examples=60, deadline=None)
@given(sigma=st.floats(0.05, 8))
def test_the_blur_kernel_is_pillows(sigma):
    kernel = blur_kernels(np.array([0, sigma], np.float32))
    assert kernel.shape[1] % 2 == 1
    assert np.allclose(kernel.sum(1), 1, atol=1e-6)
    assert (kernel == kernel[:, ::-1]).all()
    assert (kernel >= 0).all()
    half = kernel.shape[1] // 2
    assert kernel[0, half] == 1
    # Its variance is that asked for; and so is Pillow's answer to a line, which is wide enough not to be rounded away.
    assert np.isclose((kernel[1] * np.arange(-half, half + 1) ** 2).sum(), sigma**2, rtol=1e-3)
    line = np.zeros((5, 2 * half + 81), np.uint8)
    line[:, half + 40] = 255
    answer = np.asarray(Image.fromarray(line).filter(ImageFilter.GaussianBlur(sigma)))[2, 40:-40]
    assert np.abs(answer - 255 * kernel[1]).max() <= 2.5


def test_normalize():
    views = torch.randint(0, 256, (2, 3, 16, 16, 3), dtype=torch.uint8)
    ours = normalize(views)
    assert ours.shape == (6, 3, 16, 16)
    assert ours.dtype == torch.float32
    for view, image in itertools.product(range(2), range(3)):
        expected = TF.normalize(TF.to_tensor(views[view, image].numpy()), list(MEAN), list(STD))
        torch.testing.assert_close(ours[view * 3 + image], expected, atol=1e-5, rtol=0)
