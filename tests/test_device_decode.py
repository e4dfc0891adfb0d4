"""JPEG files that a device decodes: the same pixels, the same views, the same run, and the same word on broken ones.

TorchCodec decodes on the CPU as well, so all but nvJPEG itself is tested here; that is in test_cuda.py.
"""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest
import torch

import dino
from dino.data import device_decode
from dino.data.decode import BadImage, decode
from dino.data.device_decode import Jpeg, Undecodable, check_device, decode_jpegs
from dino.data.device_render import LARGEST, DeviceRenderer
from dino.data.image_files import open_source
from dino.data.loader import ViewBatches, iterate
from dino.data.sources import Source, Subset
from dino.engine.log import read_metrics, read_quarantine
from dino.engine.train import Trainer
from dino.errors import TrainingError
from dino.options import flatten, replace, toml
from dino.options.auto import resolve
from dino.options.resume import check_resumable
from dino.options.train import TrainOptions
from dino.terminal import Terminal
from drawing import TO_DEVICE, as_bytes, draw_picture, encode_picture, encode_turned, without_tables
from helpers import TINY, draw_images, run_dino, tiny_flags
from training import SMALL_VIEWS

CPU = torch.device("cpu")
VIEWS = SMALL_VIEWS
read = functools.partial(device_decode.read_jpeg, largest=LARGEST)


BY_WORKERS = {
    "turned": encode_turned(6),
    "print": encode_picture(draw_picture(mode="CMYK")),
    "stored as RGB": encode_picture(draw_picture(), keep_rgb=True),
    "another format": encode_picture(draw_picture(), "PNG"),
    "large": encode_picture(draw_picture(LARGEST + 1, 20)),
    "with a tail": encode_picture(draw_picture()) + b"\0\0",
}
BROKEN = {
    "empty": b"",
    "text": b"hello",
    "cut off": encode_picture(draw_picture())[:400],
    "cut in the header": encode_picture(draw_picture())[:30],
    "cut, with an end": encode_picture(draw_picture())[:100] + b"\xff\xd9",
}


def folder_of(folder, files: dict[str, bytes]) -> Source:
    folder.mkdir()
    for name, data in files.items():
        (folder / f"{name.replace(':', '')}.jpg").write_bytes(data)
    return open_source(str(folder))


@pytest.mark.parametrize("name", TO_DEVICE)
def test_a_device_makes_the_pixels_that_we_do(tmp_path, name):
    source = folder_of(tmp_path / "photos", {name: TO_DEVICE[name]})
    jpeg, expected = read(source, 0), source.read(0)
    assert isinstance(jpeg, Jpeg)
    assert jpeg == (TO_DEVICE[name], expected.shape)
    (found,) = decode_jpegs([as_bytes(jpeg.data)], [jpeg.shape[:2]], CPU)
    difference = (found.permute(1, 2, 0).int() - torch.from_numpy(expected).int()).abs()
    assert difference.max() <= 1  # both are libjpeg, perhaps of another year
    assert difference.float().mean() < 0.05


@pytest.mark.parametrize("name", BY_WORKERS)
def test_workers_decode_what_a_device_might_see_otherwise(tmp_path, name):
    source = folder_of(tmp_path / "photos", {name: BY_WORKERS[name]})
    found = read(source, 0)
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, source.read(0))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_by_the_worker(tmp_path, name):
    source = folder_of(tmp_path / "photos", {name: BROKEN[name]})
    with pytest.raises(BadImage) as expected:
        source.read(0)
    with pytest.raises(BadImage, match=f"^{expected.value.reason}$".replace("(", r"\(").replace(")", r"\)")):
        read(source, 0)


def test_parts_of_a_source_and_sources_without_files(tmp_path):
    source = folder_of(tmp_path / "photos", {str(i): encode_picture(draw_picture(20 + i, 30)) for i in range(6)})
    part = Subset(Subset(source, [5, 3, 1]), [2, 0])
    assert [read(part, i).shape for i in (0, 1)] == [(30, 21, 3), (30, 25, 3)]

    class Drawn:
        def read(self, index: int) -> np.ndarray:
            return np.full((4, 5, 3), index, np.uint8)

    assert np.array_equal(read(Drawn(), 7), Drawn().read(7))  # pyright: ignore[reportArgumentType]


def batches(source: Source, on_device: bool, batch_size: int = 5) -> ViewBatches:
    return ViewBatches(source, VIEWS, DeviceRenderer("cpu", decode=on_device), batch_size, 3)


@pytest.mark.parametrize("files", [TO_DEVICE, BY_WORKERS, BY_WORKERS | TO_DEVICE], ids=["device", "workers", "both"])
def test_views_are_those_of_pixels(tmp_path, files):
    """Bytes, pages and crops of one batch come together in the order of its images."""
    source, renderer = folder_of(tmp_path / "photos", files), DeviceRenderer("cpu")
    given = [read(source, i) for i in range(len(source))]
    assert sum(isinstance(image, Jpeg) for image in given) == len(files.keys() & TO_DEVICE.keys())
    for workers in (0, 2):
        pairs = (iterate(batches(source, way), 0, 4, workers, False) for way in (False, True))
        for plain, ahead in zip(*pairs, strict=True):
            assert plain.views is not None
            assert ahead.views is not None
            for a, b in zip(
                renderer.finish(plain.prepared, plain.views), renderer.finish(ahead.prepared, ahead.views), strict=True
            ):
                assert a.shape == b.shape
                assert (a.int() - b.int()).abs().float().mean() < 0.1


def test_a_file_that_the_device_cannot_decode_is_an_error_of_the_batch(tmp_path):
    broken = without_tables(TO_DEVICE["baseline"])
    with pytest.raises(BadImage):
        decode(broken)
    source = folder_of(tmp_path / "photos", TO_DEVICE | {"broken": broken})
    ahead = batches(source, True, len(source))
    batch = ahead[0]
    assert batch.views is not None
    assert not batch.bad  # its header is in order
    with pytest.raises(Undecodable):
        DeviceRenderer("cpu").finish(batch.prepared, batch.views)
    assert [name for name, _ in ahead.decode_batch(0).bad] == ["broken.jpg"]
    with pytest.raises(Undecodable, match="headers"):
        decode_jpegs([as_bytes(TO_DEVICE["baseline"])], [(45, 60)], CPU)


def trained(source: Source, folder, on_device: bool, **changes) -> Trainer:
    """A run of the real trainer with the GPU's way of rendering, here on the CPU."""
    folder.mkdir()
    asked = replace(TrainOptions(), TINY | {"log.every": 1} | changes)
    options = resolve(asked, len(source), 50, on_gpu=False, cores=0)
    views = ViewBatches(source, options.views, DeviceRenderer("cpu", decode=on_device), 4, options.seed)
    trainer = Trainer(options, folder, source, views, CPU, Terminal(False))
    trainer.fit()
    return trainer


def test_a_run_is_the_same_whoever_decodes_broken_files_included(tmp_path):
    draw_images(tmp_path / "photos", 24)
    for name in ("class0/003.jpg", "class2/005.jpg"):
        path = tmp_path / "photos" / name
        path.write_bytes(without_tables(path.read_bytes()))
    (tmp_path / "photos" / "class1" / "004.jpg").write_bytes(b"text")
    source, runs = open_source(str(tmp_path / "photos")), []
    for on_device in (False, True):
        folder = tmp_path / f"run{on_device}"
        trainer = trained(source, folder, on_device, **{"data.max_bad_fraction": 0.5})
        losses = [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
        bad = {line["image"]: line["reason"] for line in read_quarantine(folder / "quarantine.jsonl")}
        runs.append((trainer.method.state_dict(), losses, bad))
    assert runs[0][2] == runs[1][2]
    assert len(runs[0][2]) == 3
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-6)
    for a, b in zip(runs[0][0].values(), runs[1][0].values(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_of_nothing_but_broken_files_ends_the_run(tmp_path):
    broken = without_tables(TO_DEVICE["baseline"])
    source = folder_of(tmp_path / "photos", {str(i): broken for i in range(8)})
    with pytest.raises(TrainingError, match="8 of 8 images could not be read"):
        trained(source, tmp_path / "run", True)


def test_a_device_is_asked_whether_it_decodes(monkeypatch):
    with pytest.raises(ValueError, match=r"the device is the CPU; use --data\.decode workers"):
        check_device(CPU)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"cannot decode on it .*use --data\.decode workers"):
            check_device(torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ValueError, match=r"pip install 'dino-vision\[gpu\]'"):
        check_device(torch.device("cuda"))


def test_refused_on_a_cpu_before_anything_is_written(photos, tmp_path):
    done = run_dino("train", "--data", photos, "--out", tmp_path / "run", *tiny_flags(data__decode="device"))
    assert done.returncode == 2
    assert "the device is the CPU; use --data.decode workers" in done.stderr
    assert not (tmp_path / "run").exists()


def test_who_decodes_may_change_on_resume(photos, tmp_path):
    run = dino.train(replace(TrainOptions(), TINY), data=str(photos), out=str(tmp_path / "run"), stop_after=3)
    recorded = toml.read_recorded(str(run))
    check_resumable(flatten(recorded), replace(recorded, {"data.decode": "device"}))
