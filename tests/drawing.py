"""Pictures, clips and folders that tests draw."""

from __future__ import annotations

import io
import os
import pickle
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw

from dino.data.decode import ORIENTATION
from dino.data.device_render import LARGEST
from dino.eval import davis
from helpers import draw_images


def draw_video(root: Path, name: str, objects: int = 2, count: int = 7, seed: int = 0) -> None:
    """Colored squares that wander over gray noise."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(90, 110, (96, 128, 3))
    for i in range(count):
        pixels, indices = ground + rng.integers(-5, 5, ground.shape), np.zeros((96, 128), np.uint8)
        for k in range(1, objects + 1):
            box = slice(45 * k - 40, 45 * k - 8), slice(8 + 6 * i, 48 + 6 * i)
            pixels[box], indices[box] = 40 * rng.random(3) + np.array([[250, 20, 20], [20, 20, 250]])[k % 2] * 0.8, k
        indices[0, :2] = 255  # unknown
        for kind, suffix, picture in (
            ("JPEGImages", "jpg", Image.fromarray(pixels.clip(0, 255).astype(np.uint8))),
            ("Annotations", "png", Image.fromarray(indices)),
        ):
            if kind == "Annotations":
                picture.putpalette(davis.PALETTE)
            path = root / kind / "480p" / name / f"{i:05d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    names = root / "ImageSets" / "2017" / "val.txt"
    names.parent.mkdir(parents=True, exist_ok=True)
    with names.open("a") as file:
        file.write(f"{name}\n")


def draw_square(path: Path, height: int = 40, width: int = 56, at: tuple[int, int] = (8, 16), seed: int = 0) -> Path:
    """A patterned square on noise that is the same for a seed."""
    pixels = np.random.default_rng(seed).integers(0, 60, (height, width, 3), np.uint8)
    top, left = at
    pixels[top : top + 16, left : left + 16] += np.random.default_rng(99).integers(0, 190, (16, 16, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def encode_clip(path: Path, times: list[float], height: int = 48, width: int = 64) -> Path:
    """A clip in which a bright square moves to the right by 8 pixels a frame; and a tone, if the format takes sound."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream({".mp4": "libx264", ".gif": "gif", ".mkv": "mpeg4"}[path.suffix], rate=100)
        stream.width, stream.height = width, height
        stream.pix_fmt = "rgb8" if path.suffix == ".gif" else "yuv420p"
        sound = container.add_stream("aac", rate=8000, layout="mono") if path.suffix == ".mp4" else None
        for i, seconds in enumerate(times):
            pixels = np.full((height, width, 3), 30, np.uint8)
            pixels[16:32, 8 * i : 8 * i + 16] = 220
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(seconds * 100), Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.sample_rate = 8000
            container.mux(sound.encode(tone))
            container.mux(sound.encode())
    return path


def lay_out_landmarks(folder: Path, changes: dict | None = None, box=(0, 0, 40, 40)) -> Path:
    """24 drawn images of three colors, the first of each color a query: its even fellows easy, its odd ones hard."""
    drawn = sorted(draw_images(folder / "drawn").rglob("*.jpg"))
    (folder / "jpg").mkdir()
    names = [f"{path.parent.name}-{path.stem}" for path in drawn]
    for path, name in zip(drawn, names, strict=True):
        os.rename(path, folder / "jpg" / f"{name}.jpg")
    queries, database = names[::8], [name for i, name in enumerate(names) if i % 8]
    fellows = [[i for i, name in enumerate(database) if name[:6] == query[:6]] for query in queries]
    gnd = [{"bbx": list(box), "easy": f[1::2], "hard": f[2::2], "junk": f[:1]} for f in fellows]
    content = {"imlist": database, "qimlist": queries, "gnd": gnd} | (changes or {})
    (folder / "gnd_tiny.pkl").write_bytes(pickle.dumps(content))
    return folder


def draw_picture(width: int = 61, height: int = 45, mode: str = "RGB") -> Image.Image:
    image = Image.radial_gradient("L").resize((width, height)).convert("RGB")
    ImageDraw.Draw(image).ellipse((5, 9, 30, 33), fill=(200, 40, 90))
    return image.convert(mode)


def encode_picture(image: Image.Image, kind: str = "JPEG", **how) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return stream.getvalue()


def encode_turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode_picture(draw_picture(), exif=exif)


def without_tables(data: bytes) -> bytes:
    """A header in order, and nothing that can be decoded: its quantization tables are gone."""
    while (at := data.find(b"\xff\xdb")) >= 0:
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4]) :]
    return data


TO_DEVICE = {
    "baseline": encode_picture(draw_picture()),
    "progressive": encode_picture(draw_picture(), progressive=True),
    "all colors": encode_picture(draw_picture(), subsampling=0, quality=95),
    "4:2:2": encode_picture(draw_picture(), subsampling=1),
    "gray": encode_picture(draw_picture(mode="L")),
    "upright": encode_turned(1),
    "edge": encode_picture(draw_picture(LARGEST, 20)),
    "a pixel": encode_picture(draw_picture(1, 1)),
}


def as_bytes(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())
