"""`dino plan`: what it says of the images and of the run, and the file that it leaves."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from dino import cli
from dino.engine.estimate import DEVICES, count_step
from dino.options import flatten
from helpers import draw_images, tiny_flags


@pytest.fixture
def photos(tmp_path):
    """23 images, one of them damaged, and a copy of another that was made brighter."""
    folder = draw_images(tmp_path / "photos")
    first, second = sorted(folder.glob("*/*"))[:2]
    second.write_bytes(b"no image")
    rng = np.random.default_rng(0)
    scene = Image.fromarray(rng.integers(0, 200, (8, 8, 3), dtype=np.uint8)).resize((96, 64), Image.Resampling.BICUBIC)
    scene.save(first.with_name("scene.png"))
    scene.point(lambda value: value + 20).save(first.with_name("scene-brighter.png"))
    return folder


def test_a_plan_says_what_is_there_and_train_takes_it(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "photos", *tiny_flags(epochs=2)]
    assert cli.main(["plan", *flags, "--seconds", "1", "--price", "3.6e6"]) == 0
    said = capsys.readouterr().out
    names = {line.split("  ")[0].strip() for line in said.splitlines()}
    assert {"number", "classes", "formats", "shorter side", "near-copies", "model", "time", "memory"} <= names
    assert re.search(r"cannot be read +1 of .*, first class0/00\d\.", said), said
    assert re.search(r"near-copies +1 of", said), said
    assert re.search(r"deviation of colors +0\.\d\d, 0\.\d\d", said), said
    assert re.search(r"classes +3, of \d to \d images", said), said
    time, cost = (re.search(rf"{word} +([\d.]+) ?(\w*)", said) for word in ("time", "an hour"))
    seconds = float(time[1]) * {"seconds": 1, "minutes": 60}[time[2]]
    assert float(cost[1]) / 1000 == pytest.approx(seconds, rel=0.3, abs=0.5), "3.6e6 an hour is 1000 a second"
    assert "dino train plan.toml" in said
    planned, given = (flatten(cli.parse(["train", *rest])[1]) for rest in (["plan.toml"], flags))
    assert planned | {"data.path": "photos"} == planned | {
        name: value for name, value in given.items() if value is not None
    }, "what was given is in it"
    assert planned["optim.lr"] is not None, "and what was chosen"
    assert not [path for path in tmp_path.iterdir() if path.name not in ("photos", "plan.toml")]
    assert cli.main(["train", "plan.toml", "--out", "run"]) == 0
    assert (tmp_path / "run/report.html").exists() == (given["report"] is not False)


@pytest.mark.parametrize("words", [["--minutes", "0.2"], ["--hours", "0.004", "--gpu", "cpu"]])
def test_a_plan_of_so_much_time(photos, tmp_path, capsys, monkeypatch, words):
    """As for a folder without any other option, which a CPU has half an hour for."""
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "photos", *tiny_flags(epochs=2)[2:]]
    assert cli.main(["plan", *flags, "--seconds", "1", *words]) == 0
    said = capsys.readouterr().out
    assert re.search(r"time +\d+ (seconds|minutes) \(", said), said
    planned = cli.parse(["train", "plan.toml"])[1]
    assert planned.epochs > 2
    assert planned.budget is None, "the epochs were chosen"
    assert not [path for path in tmp_path.iterdir() if path.name not in ("photos", "plan.toml")]


def test_a_plan_for_a_gpu_that_is_not_here(photos, tmp_path, capsys, monkeypatch):
    """Twice the images a step take twice the arithmetic; a budget of time is kept at the usual rate."""
    monkeypatch.chdir(tmp_path)
    net = ["--model.arch", "vit_base", "--model.depth", "2", "--views.num-local", "1"]
    for batch, words in ((4, ["--epochs", "10"]), (8, ["--minutes", "0.3"])):
        flags = ["plan", "--data", "photos", *net, "--batch-size", f"{batch}", *words, "--gpu", "a100"]
        assert cli.main([*flags, "--toml", f"{batch}.toml"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"10 epochs of 23 images, 50 steps of 4\b", said), said
    assert re.findall(r"\n time +(\S+ \S+)", said)[-1] == "18 seconds"
    smaller = re.findall(r"A step computes only (\d+) % with --model.arch vit_small, but", said)
    assert [15 < int(share) < 35 for share in smaller] == [True, True], said  # half as wide, and a head alike
    half, whole = (count_step(cli.parse(["train", f"{batch}.toml"])[1]) for batch in (4, 8))
    assert whole.flops == pytest.approx(2 * half.flops)
    assert half.memory < whole.memory < 2 * half.memory, "the parameters stay"
    for words, number in (([], 1), (["--hours", "12"], 2)):  # without a time, and with more of it than the run needs
        flags = ["plan", "--data", "photos", *net, "--batch-size", "8", *words, "--gpu", "a100", "--price", "2"]
        assert cli.main(flags) == 0
        said = capsys.readouterr().out
        assert "length                   800 epochs" in said, said
        assert ("epochs fit into that time; 800 are enough" in said) == (number == 2)
        assert "cost, at 2 an hour" in said
        path = tmp_path / ("plan.toml" if number == 1 else "plan-2.toml")
        assert cli.parse(["train", str(path)])[1].epochs == 800
    monkeypatch.setitem(DEVICES, "t4", DEVICES["t4"]._replace(memory=2e8))
    flags = ["plan", "--data", "photos", *net, "--batch-size", "8", "--epochs", "9000"]
    assert cli.main([*flags, "--gpu", "t4", "--toml", "t4.toml"]) == 0
    said = capsys.readouterr().out
    assert "train with --fit 0.18GB" in said
    assert "epochs are more than a run is known to gain from" in said
    assert cli.main([*flags, "--gpu", "mps", "--toml", "mps.toml"]) == 0
    devices = [cli.parse(["train", f"{name}.toml"])[1].device for name in ("t4", "mps")]
    assert devices == ["auto", "mps"], "Apple's is taken only by name"


def test_misuse_of_plan_is_said_before_anything_is_measured(photos, tmp_path, capsys):
    (tmp_path / "plan.toml").touch()
    for toml, words in (("plan.toml", "exists; choose another name"), ("none/plan.toml", "there is no folder")):
        assert cli.main(["plan", "--data", str(photos), "--toml", str(tmp_path / toml)]) == 2
        assert words in capsys.readouterr().err
    shutil.rmtree(photos)
    assert cli.main(["plan", "--data", str(photos), "--toml", str(tmp_path / "new.toml")]) == 2
    assert "does not exist" in capsys.readouterr().err
