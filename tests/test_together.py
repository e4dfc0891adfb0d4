"""Several sources as one: their images in order, classes by name, weights, and a run that resumes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import dino
from dino import cli
from dino.data.open import open_images
from dino.data.order import Order
from dino.data.specs import get_name, make_absolute
from dino.options import toml
from helpers import TINY, assert_same_bits, draw_images, final_state, pack_images, run_dino, tiny_flags


@pytest.fixture
def places(tmp_path):
    """A folder of three classes, tar files of two of them and a new one, and a folder without labels."""
    draw_images(tmp_path / "a", 12)
    other = draw_images(tmp_path / "other", 9, seed=1)
    (other / "class1").rename(other / "class9")
    pack_images(other, tmp_path / "b")
    shutil.copytree(draw_images(tmp_path / "c", 6, classes=1, seed=2) / "class0", tmp_path / "plain")
    return tmp_path


def test_images_classes_and_names(places):
    whole = open_images(f"{places / 'a'}\n{places / 'b'}\n{places / 'plain'}")
    parts = [open_images(places / name) for name in ("a", "b", "plain")]
    assert len(whole) == 27
    assert whole.classes == ("class0", "class1", "class2", "class9")
    found = [whole.classes[label] if label >= 0 else None for label in whole.labels]
    assert found[:12] == [f"class{i // 4}" for i in range(12)]
    assert found[12:21] == ["class0"] * 3 + ["class2"] * 3 + ["class9"] * 3
    assert found[21:] == [None] * 6
    assert [whole.name(i) for i in (0, 12, 21)] == ["a/class0/000.jpg", "b/0000.tar/class0/000.jpg", "plain/000.jpg"]
    for i, (part, position) in {0: (0, 0), 11: (0, 11), 12: (1, 0), 26: (2, 5)}.items():
        np.testing.assert_array_equal(whole.read(i), parts[part].read(position))
        assert whole.read_bytes(i) == parts[part].read_bytes(position)


def test_a_list_file_names_sources(places, monkeypatch):
    (places / "list.txt").write_text("# all of it\na\nb/*.tar\nscenes:5\n")
    whole = open_images(places / "list.txt")
    assert [len(source) for source in whole.sources] == [12, 9, 5]
    monkeypatch.chdir(places)
    assert make_absolute("a\nb/*.tar\nscenes:5") == f"{places}/a\n{places}/b/*.tar\nscenes:5"
    assert get_name("a\nb/*.tar") == "a+b"


def test_two_of_one_name_differ(places):
    draw_images(places / "deep/a", 6)
    whole = open_images(f"{places / 'a'}\n{places / 'deep/a'}")
    assert len({whole.name(i) for i in range(len(whole))}) == 18


def test_blocks_are_those_of_the_parts(places):
    whole = open_images(f"{places / 'a'}\n{places / 'b'}")
    assert whole.bounds.tolist() == [0, 12, 15, 18, 21]
    positions, _ = Order(whole, 0, most=0, window=6).visit(0, 0, 21)
    assert sorted(positions.tolist()) == [*range(21)]


def test_a_run_with_weights_resumes_to_the_bit_where_the_folder_has_grown(places, tmp_path, monkeypatch):
    data, changes = [places / "a", places / "b"], TINY | {"data.weights": (1.0, 3.0)}
    dino.train(data=data, out=tmp_path / "whole", **changes)
    dino.train(data=data, out=tmp_path / "halves", **changes, stop_after=4)
    draw_images(places / "a", 20, seed=3)
    assert toml.read_recorded(tmp_path / "halves").data.path == "\n".join(map(str, data))
    monkeypatch.chdir(tmp_path)
    draw_images(places / "a", 12)
    dino.train(resume="halves", stop_after=None)
    assert_same_bits(final_state(tmp_path / "whole"), final_state(tmp_path / "halves"))


def test_the_command_line_takes_data_several_times(places):
    flags = tiny_flags(epochs=1)
    done = run_dino("train", "--data", places / "a", *flags, f"--data={places / 'b'}", "--out", places / "run")
    assert done.returncode == 0, done.stderr
    assert toml.read_recorded(places / "run").data.path == f"{places / 'a'}\n{places / 'b'}"
    assert (places / "run/files-0.jsonl").exists()


def test_what_is_said_is_a_line_and_a_command(places):
    flags = [*tiny_flags(epochs=1), "--data.weights", "1", "2"]
    done = run_dino("train", "--data", places / "a", "--data", places / "b", *flags, "--out", places / "run")
    assert f"{places / 'a'}, {places / 'b'}: 19 images, 4 classes" in done.stderr
    (advice,) = [line for line in done.stderr.splitlines() if line.startswith("Of photographs")]
    assert advice.endswith(f"--data {places / 'a'} --data {places / 'b'} --data.weights 1 2")


def test_images_within_a_run_are_not_overwritten(places, capsys):
    flags = [*tiny_flags(epochs=1), "--out", str(places / "run")]
    assert cli.main(["train", "--data", str(places / "a"), *flags]) == 0
    several = ["--data", str(places / "a"), "--data", str(places / "run")]
    assert cli.main(["train", *several, *flags, "--overwrite"]) == 2
    assert "is part of the run that --overwrite would delete" in capsys.readouterr().err


def test_weights_must_be_as_many_as_sources(places, capsys):
    command = ["train", "--data", str(places / "a"), "--data.weights", "1", "2", "--out", str(places / "run")]
    assert cli.main(command) == 2
    assert "data.weights gives 2 numbers for 1 sources" in capsys.readouterr().err


def test_one_that_is_missing_is_named(places, capsys):
    command = ["train", "--data", str(places / "a"), "--data", str(places / "nosuch"), "--out", str(places / "run")]
    assert cli.main(command) == 2
    assert "nosuch' does not exist" in capsys.readouterr().err
