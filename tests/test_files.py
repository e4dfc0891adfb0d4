"""What is written is whole or absent, with the umask's mode; a full disk is one sentence, and what was there before stays."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dino
from dino import files, weights
from dino.cli import main
from helpers import draw_images

pytest.importorskip("pyarrow")
IMAGES = 90


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> Path:
    """A labeled folder; one image of each class is noise, whose pictures are large."""
    folder = draw_images(tmp_path_factory.mktemp("album"), IMAGES)
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 255, (96, 96, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"class{i}" / "noise.png")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Frames of noise."""
    folder = tmp_path_factory.mktemp("clip")
    for i in range(12):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def embedded(album, saved_model, tmp_path_factory) -> Path:
    return dino.embed(saved_model, album, tmp_path_factory.mktemp("embedded") / "e.parquet", device="cpu").path


@contextlib.contextmanager
def full_disk(limit: int = 4000) -> Iterator[None]:
    """No file may become longer than `limit` bytes, as the operating system's own limit."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    "command",
    [
        "embed {model} {album} --out e",
        "attention {model} {image} --out a",
        "pca {model} {image} --out a",
        "match {model} {image} {image} --out m.png",
        "video {model} {clip} --out v.mp4",
        "figure tsne {model} --data {album} --out t.png",
        "figure neighbors {model} --data {album} --out n.html",
        "search {embedded} {album} --json r.json",
        "search {embedded} {image} --html r.html",
        "search {embedded} {image} --index ivfpq --rebuild",
        "duplicates {embedded} --threshold -1 --html r.html",
        "eval knn {model} --data {album} --k 5 --json r.json",
        "export {model} --to safetensors --out x.safetensors",
        "export {model} --to reference --out x.pth",
    ],
)
def test_a_full_disk_is_one_sentence(command, album, clip, embedded, saved_model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = {"model": saved_model, "album": album, "embedded": embedded, "image": album / "class0" / "noise.png"}
    words = command.format(clip=clip, **named).split()
    out = embedded.with_suffix(".ivfpq.faiss") if "ivfpq" in words else Path(words[-1])
    if kept := out.suffix and words[0] != "export":
        out.write_bytes(b"the old result")
    with full_disk(400 if words[0] in ("eval", "match", "pca", "attention") else 4000):
        code = main(words)
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2, complaint
    assert "cannot be written (" in complaint
    assert "free some space" in complaint
    if kept:
        assert out.read_bytes() == b"the old result"
    assert not list(tmp_path.rglob(".*.tmp"))


def test_an_error_that_is_not_about_the_file_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"), files.replacing(tmp_path / "x"):
        raise RuntimeError("CUDA error: out of memory")
    with pytest.raises(files.WriteError, match="x cannot be written"), files.replacing(tmp_path / "no" / "x"):
        pass
    assert not list(tmp_path.iterdir())


def test_modes_are_the_umasks(saved_model, tmp_path):
    """Also of files that a library makes for their owner alone; and a name may have 255 bytes."""
    before = os.umask(0o027)
    try:
        weights.save(tmp_path, dino.load(saved_model), {})
        dino.export(str(saved_model), "safetensors", str(tmp_path / "x.safetensors"))
        for name in ("n" * 255, "é" * 127):
            with files.replacing(tmp_path / name) as temporary:
                save_file({"a": torch.zeros(3)}, temporary)
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode)[-3:] for path in tmp_path.iterdir() if path.is_file()} == dict.fromkeys(
        ["teacher.safetensors", "config.json", "x.safetensors", "x.safetensors.md", "n" * 255, "é" * 127], "640"
    )


@pytest.mark.parametrize(
    "command", ["attention {model} {name}", "pca {model} {name}", "pca {model} {image} --out {long}",
        "match {model} {image} {image} --out {long}.png", "embed {model} {album} --out {long}", "outliers {long}",
        "export {model} --to safetensors --out {long}.safetensors", "search {embedded} {image} --json {long}.json"],
)  # fmt: skip
def test_a_name_that_is_too_long_is_one_sentence(command, album, embedded, saved_model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = {"model": saved_model, "album": album, "embedded": embedded, "image": album / "class0" / "noise.png"}
    Image.open(named["image"]).save(name := "n" * 251 + ".png")
    assert main(command.format(name=name, long="o" * 300, **named).split()) == 2
    (complaint,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dino: ")]
    assert "File name too long" in complaint
