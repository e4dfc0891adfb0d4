"""Copy detection: the reference's average precision, which copy belongs to which original, and both layouts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dino.cli import main
from dino.eval import copydetect
from dino.eval.ranking import average_precision
from dino.features import neighbors
from dino.options.evaluate import CopydetectOptions
from helpers import GOLDEN, draw_images, ranks_agree


def test_average_precision_is_the_references():
    rows = json.loads((GOLDEN / "copydetection_ap.json").read_text())
    assert len(rows) == 20
    for ranks, total, expected in rows:
        assert average_precision(np.array(ranks, int), total) == pytest.approx(expected, abs=1e-5)


def test_positions_against_a_plain_sort_and_ties_count_against_us(monkeypatch):
    torch.manual_seed(0)
    copies, originals, others = (F.normalize(torch.randn(n, 4), dim=1) for n in (30, 10, 50))
    owners, database = torch.randint(0, 10, (30,)), torch.cat([originals, others])
    order = np.argsort(-(copies @ database.T).numpy(), axis=1)
    expected = [int(np.flatnonzero(order[i] == owners[i].item())[0]) for i in range(30)]
    assert copydetect.rank_originals(copies, database, owners).tolist() == expected
    monkeypatch.setattr(neighbors, "MOST_NUMBERS", 7 * 60)
    assert copydetect.rank_originals(copies, database, owners).tolist() == expected
    same = torch.ones(5, 1)
    assert copydetect.rank_originals(same, same.repeat(2, 1), torch.arange(5)).tolist() == [9] * 5


def test_original_looks_at_twenty_ranks_and_fixed_at_all():
    found, blocks = np.array([0, 19, 20]), ["strong", "a", "b"]
    fixed = copydetect.score_ranks(found, blocks, None)
    assert list(fixed) == ["strong_map", "a_map", "b_map"]
    assert fixed == pytest.approx({"strong_map": 100, "a_map": 100 / 40, "b_map": 100 / 42})
    assert copydetect.score_ranks(found, blocks, copydetect.TOP) == pytest.approx(fixed | {"b_map": 0})


def test_names_say_whose_copy_it_is():
    stems = {"beach": 0, "beach_2": 1, "town": 2}
    names = {"beach.jpg": 0, "a/beach_crop20.png": 0, "beach_2_blur.jpg": 1, "beach_20.jpg": 0, "beaches.jpg": None}
    assert {name: copydetect.find_original(name, stems) for name in names} == names


def edit(source: Path, to: Path, box: tuple[int, int, int, int] | None = None, **save: int) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as image:
        image.crop(box).save(to, **save)


@pytest.fixture
def drawn(tmp_path) -> list[Path]:
    return sorted(draw_images(tmp_path / "drawn", 12).rglob("*.jpg"))


@pytest.fixture
def copydays(tmp_path, drawn) -> Path:
    root = tmp_path / "copydays"
    for i, path in enumerate(drawn):
        edit(path, root / "original" / f"{2000 + i}00.jpg", quality=95)
        edit(path, root / "jpegqual" / "20" / f"{2000 + i}00.jpg", quality=20)
        edit(path, root / "crops" / "50" / f"{2000 + i}00.jpg", box=(5, 5, 35, 35), quality=90)
        edit(path, root / "strong" / f"{2000 + i}{i % 3 + 1:02d}.jpg", box=(8, 0, 24, 24), quality=5)
    return root


def test_command_line_on_copydays(saved_model, copydays, tmp_path):
    draw_images(tmp_path / "others", 40, seed=1)
    command = ("eval", "copydetect", saved_model, "--data", copydays, "--distractors", tmp_path / "others")
    fixed = ranks_agree(*command)
    figures = fixed["figures"]
    assert list(figures) == ["strong_map", "crops/50_map", "jpegqual/20_map"]
    assert figures["jpegqual/20_map"] > 95 > figures["strong_map"] > 100 / 2 / 52
    assert fixed["images"] == {"originals": 12, "copies": 36, "distractors": 40}
    assert "at 40 x 40 pixels, average precision on the whole ranking" in fixed["protocol"]
    more = ["--protocol", "original", "--whiten", tmp_path / "drawn", "--json", tmp_path / "original.json"]
    assert main([*map(str, [*command, *more])]) == 0
    original = json.loads((tmp_path / "original.json").read_text())
    assert original["data"].keys() == {"originals", "copies", "distractors", "whitening"}
    assert original["protocol"].endswith(
        "whitened by a PCA of 12 other images, average precision on the first 20 ranks"
    )


def test_folder_pair(saved_model, drawn, tmp_path, capsys):
    for path in drawn:
        edit(path, tmp_path / "copies" / "light" / f"{path.stem}.png")
        edit(path, tmp_path / "copies" / "hard" / f"{path.stem}_cut.jpg", box=(0, 0, 20, 20))
    pair = ["--originals", str(tmp_path / "drawn"), "--copies", str(tmp_path / "copies")]
    assert main(["eval", "copydetect", str(saved_model), *pair]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("12 originals, 24 copies")
    assert lines[3].split() == ["light_map", "100.00"]
    for path in drawn:
        edit(path, tmp_path / "flat" / path.name)
    assert main(["eval", "copydetect", str(saved_model), *pair[:3], str(tmp_path / "flat")]) == 0
    assert "copies_map" in capsys.readouterr().out


def test_bad_input_is_refused(saved_model, copydays, drawn, tmp_path, capsys):
    def said(*arguments) -> str:
        assert main(["eval", "copydetect", str(saved_model), *map(str, arguments)]) == 2
        return capsys.readouterr().err

    with pytest.raises(ValueError, match="either --data with the Copydays folder, or --originals and --copies"):
        CopydetectOptions(model="", originals="photos")
    assert "not laid out as Copydays; expected are DATA/original/" in said("--data", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no files" in said("--data", copydays, "--distractors", tmp_path / "empty")
    assert "holds no files" in said("--originals", tmp_path / "empty", "--copies", tmp_path / "drawn")
    assert "no multiple of" in (one := said("--data", copydays, "--size", 33)) or "not a multiple" in one
    (copydays / "crops" / "50" / "300000.jpg").write_bytes(b"")
    assert "the copy crops/50/300000.jpg of" in said("--data", copydays)
    (copydays / "crops" / "50" / "300000.jpg").rename(copydays / "crops" / "50" / "200099.jpg")
    assert "1 of the 37 images (copies) cannot be read, first crops/50/200099.jpg (empty file)" in said(
        "--data", copydays
    )
    edit(drawn[0], copydays / "original" / "200001.jpg")
    assert "200000.jpg and 200001.jpg are both '2000'" in said("--data", copydays)
