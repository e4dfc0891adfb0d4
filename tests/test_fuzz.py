"""Damaged files and impossible values: a command works, or ends with one sentence of its own. The damage is seeded.

More of it, e.g. before a release: DINO_FUZZ=500 python -m pytest tests/test_fuzz.py
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import dino
from dino import cli
from dino.options import replace
from dino.options.train import TrainOptions
from helpers import TINY, draw_images

ROUNDS = int(os.environ.get("DINO_FUZZ", "12"))
DEEP = "[" * 3000 + "]" * 3000
VALUES = [
    "-1",
    "0",
    "1e999",
    "nan",
    "[]",
    "{}",
    "null",
    "true",
    '"x"',
    '""',
    "9" * 400,
    '"\\u0000"',
    DEEP,
    "[[1]]",
    "1.5",
]

Random = np.random.Generator


def cut(content: bytes, rng: Random) -> bytes:
    return content[: int(rng.integers(len(content) + 1))]


def flip(content: bytes, rng: Random) -> bytes:
    out = bytearray(content)
    for position in rng.integers(len(out), size=int(rng.choice([1, 10, 100]))):
        out[position] ^= 1 << int(rng.integers(8))
    return bytes(out)


def flip_start(content: bytes, rng: Random) -> bytes:
    """Where the headers of binary files lie."""
    return flip(content[:400], rng) + content[400:]


def put_value(content: bytes, rng: Random) -> bytes:
    """Another value somewhere in TOML or JSON, also in the header of a safetensors file."""
    places = list(
        re.finditer(rb"""(?<=[=:])[ ]*(-?[\d.e+-]+|\\?"[^"\n]*"|true|false|null|\[[^\]\n]*\])""", content[:5000])
    )
    if not places:
        return flip(content, rng)
    place = places[int(rng.integers(len(places)))]
    return content[: place.start()] + b" " + str(rng.choice(VALUES)).encode() + content[place.end() :]


def put_other(content: bytes, rng: Random) -> bytes:
    """The whole content is something else."""
    return [b"", b"\0" * 1000, b"null", b"[1, 2]", DEEP.encode(), b"{}\n{}", b"\xff\xfe x = 1"][int(rng.integers(7))]


DAMAGES = (cut, flip, flip_start, put_value, put_value, put_other)


def harm(folder: Path, rng: Random, name: str | None = None) -> str:
    """Damage one file in `folder`; returns what was done."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size and p.name != ".lock")
    file = folder / name if name else files[int(rng.integers(len(files)))]
    act = [*DAMAGES, None, None][int(rng.integers(len(DAMAGES) + 2))]
    if act is not None:
        file.write_bytes(act(file.read_bytes(), rng))
        return f"{act.__name__} {file.name}"
    if rng.integers(2):
        file.unlink()
        return f"delete {file.name}"
    other = files[int(rng.integers(len(files)))]
    file.write_bytes(other.read_bytes())
    return f"{other.name} as {file.name}"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
    """A command ends well, or with one sentence that the program means."""
    code = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert code in (0, 1, 2)
    if code:
        assert said.splitlines()[-1].startswith("dino: ")
    assert "(add --debug" not in said
    assert "weights_only" not in said
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a run of two epochs, evaluated, and an embedding by it, which no longer needs the images' decoder."""
    folder = tmp_path_factory.mktemp("fuzz")
    photos = draw_images(folder / "photos")
    (photos / "class0" / "broken.jpg").write_bytes(b"no image")
    options = replace(TrainOptions(), TINY | {"epochs": 2, "data.max_bad_fraction": 1.0})
    dino.train(options, data=photos, out=folder / "run")
    assert cli.main(["eval", "knn", str(folder / "run"), "--data", str(photos), "--k", "1", "--device", "cpu"]) == 0
    dino.embed(folder / "run", photos, folder / "e")
    return folder


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_damaged_run(made, tmp_path, capsys, seed):
    rng, photos, image = np.random.default_rng(seed), made / "photos", made / "photos" / "class0" / "000.jpg"
    commands: list[Callable[[Path], tuple[object, ...]]] = [
        lambda r: ("report", r),
        lambda r: ("train", "--resume", r, "--log.every", 1),
        lambda r: ("train", "--data", photos, "--init", r, "--out", tmp_path / "new", "--stop-after", 1, "--no-report"),
        lambda r: ("eval", "knn", r, "--data", photos, "--k", 1),
        lambda r: (
            "export",
            r,
            "--to",
            ("safetensors", "reference-checkpoint")[seed % 2],
            "--out",
            tmp_path / "a.safetensors",
        ),
        lambda r: ("embed", r, photos, "--out", tmp_path / "e"),
        lambda r: ("attention", r, image, "--out", tmp_path / "pictures"),
        lambda r: ("search", made / "e", image, "--model", r),
    ]
    for turn in range(3):
        run_copy = tmp_path / f"run{turn}"
        shutil.copytree(made / "run", run_copy)
        what = harm(run_copy, rng)
        command = commands[int(rng.integers(len(commands)))](run_copy)
        print(what, command)
        run(capsys, *command)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_damaged_embedding(made, tmp_path, capsys, seed):
    import pyarrow.parquet as pq

    rng, image = np.random.default_rng(seed), made / "photos" / "class0" / "000.jpg"
    for turn in range(3):
        shutil.copytree(made / "e", e := tmp_path / f"e{turn}")
        if rng.integers(2):  # its metadata
            file = next(e.glob("*.parquet"))
            table = pq.read_table(file)
            text = put_value(table.schema.metadata[b"dino"], rng)
            pq.write_table(table.replace_schema_metadata({b"dino": text}), file)
            what = text[:1000]
        else:
            what = harm(e, rng)
        commands = [
            ("search", e, image, "--k", 2),
            ("search", e, image, "--index", "hnsw", "--json", tmp_path / "s.json"),
            ("duplicates", e),
            ("outliers", e, "--k", 3, "--html", tmp_path / "o.html"),
            ("embed", made / "run", made / "photos", "--out", e),
        ]
        command = commands[int(rng.integers(len(commands)))]
        print(what, command)
        run(capsys, *command)
