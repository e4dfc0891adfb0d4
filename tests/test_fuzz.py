"""Damaged files and impossible values: a command works, or ends with one sentence of its own. The damage is seeded.

More of it, e.g. before a release: DINO_FUZZ=500 python -m pytest tests/test_fuzz.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import dino
from dino import cli
from dino.app.explorer import Explorer
from dino.options import flatten, replace
from dino.options.rules import Options, get_plain, get_types
from dino.options.train import TrainOptions
from helpers import TINY, draw_images

ROUNDS = int(os.environ.get("DINO_FUZZ", "10"))
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
            ("search", e, image, "--index", "ivfpq", "--json", tmp_path / "s.json"),
            ("duplicates", e),
            ("outliers", e, "--k", 3, "--html", tmp_path / "o.html"),
            ("embed", made / "run", made / "photos", "--out", e),
        ]
        command = commands[int(rng.integers(len(commands)))]
        print(what, command)
        run(capsys, *command)
        with contextlib.suppress(ValueError):
            Explorer(dino.load(made / "run"), None, None, str(e))


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_damaged_weight_file(made, tmp_path, capsys, seed):
    rng, formats = np.random.default_rng(seed), ("safetensors", "reference", "hf", "timm", "reference-checkpoint")
    kept = made / "weights"
    if not kept.exists():
        kept.mkdir()
        for to in formats:
            dino.export(made / "run", to, kept / f"{to}.{'safetensors' if to == 'safetensors' else 'pth'}")
        shutil.copytree(made / "run", kept / "bare", ignore=shutil.ignore_patterns("checkpoints"))  # nothing stands in
    for turn in range(3):
        shutil.copytree(kept, copy := tmp_path / f"{turn}")
        name = str(rng.choice([*(f"{to}.pth" for to in formats[1:]), "safetensors.safetensors", "bare"]))
        weak = {"hf.pth": "config.json", "timm.pth": "config.json", "bare": "config.json"} if rng.integers(2) else {}
        folder = copy / name if (copy / name).is_dir() else copy
        what = harm(folder, rng, weak.get(name, None if folder != copy else name))
        print(what, name)
        run(capsys, "export", copy / name, "--to", "safetensors", "--out", tmp_path / f"{turn}.safetensors")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"model": {"arch": ["vit_nano"]}}', "arch is ['vit_nano']; it must be text"),
        ('{"model": {"arch": null}}', "arch is None; it must be text"),
        ('{"model": {"arch": "vit_nano", "depth": 1000000000}}', "depth is 1000000000; it must lie between"),
        ('{"model": {"arch": "vit_nano", "width": -96}}', "width is -96; it must be at least 1"),
        ('{"model": {"arch": "vit_large", "width": 65536, "depth": 999, "num_heads": 1}}', " GB, but this machine has"),
        ('{"model": {"arch": "vit_large", "patch_size": 8, "image_size": 32}}', "does not fit this model"),
        ('{"model": {"arch": "vit_nano", "mood": 1}}', "it says mood, which is of another version"),
        ('{"model": ' + DEEP + "}", "holds damaged weights"),
        ("[]", "holds list and no configuration"),
    ],
)
def test_what_a_file_says_of_its_model_is_checked_before_the_model_is_built(
    saved_model, tmp_path, capsys, content, said
):
    shutil.copytree(saved_model, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(content)
    run(capsys, "export", tmp_path / "m", "--to", "safetensors", "--out", tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=re.escape(said)):
        dino.load(tmp_path / "m")


CHOSEN = {f"eval {name}": ["--data", "d"] for name in ("masks", "segment", "copydetect")} | {"select": ["--keep", "5"]}
WORDS = [
    "nan",
    "inf",
    "-inf",
    "1e308",
    "-1e308",
    "1e-320",
    "-1",
    "0",
    "9" * 25,
    "x",
    "",
    "None",
    "é\n\udcff",
    "9" * 5000,
]


def list_numbers_and_words(kind: type[Options], prefix: str = "") -> Iterator[str]:
    """Flags that take a number or one of several words."""
    for name, hint in get_types(kind).items():
        plain = get_plain(hint)
        if isinstance(plain, type) and issubclass(plain, Options):
            yield from list_numbers_and_words(plain, f"{name}.")
        elif plain not in (str, bool, tuple[str, ...]) and "Positional" not in repr(hint):
            yield f"{prefix}{name}"


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_impossible_values_of_every_option(command):
    """Each is refused in a short sentence that begins with its name, or is a number that a machine can count to."""
    kind, needed = cli.COMMANDS[command].options, list(CHOSEN.get(command, ()))
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and f"--{field.name}" not in needed:
            positional = "Positional" in repr(get_types(kind)[field.name])
            needed += ["m"] if positional else [f"--{field.name}", "onnx"]
    rng, own = np.random.default_rng(0), {"bench": ["seconds"], "submit": ["nodes", "gpus", "cpus", "hours"]}
    own["plan"] = ["seconds", "price"]
    after = ["train"] if command == "submit" else []  # the other options of these are those of `train`
    for name in own.get(command) or list_numbers_and_words(kind):
        for word in rng.choice(WORDS, min(ROUNDS // 6, len(WORDS)), replace=False) if command == "train" else WORDS:
            said, values = "", ()
            try:
                flag = f"--{name.replace('_', '-')}={word}"
                values = flatten(cli.parse([*command.split(), *needed, flag, *after])[1])[name]
            except ValueError as error:
                said = str(error)
            assert not said or (
                len(said) < 500 and re.match(rf"{name} is |[\w.]+ is \S+ but |--{name} is missing", said)
            ), said
            for value in values if isinstance(values, tuple) else (values,):
                assert not isinstance(value, int | float) or abs(value) <= 2**32 or name == "optim.lr"
