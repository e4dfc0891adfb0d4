"""The verdict on a run: a word for every case, the reason by its rule, and a command that works as printed."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

import dino
from dino import cli
from dino.data.image_files import open_source
from dino.engine.health import measure_margin
from dino.eval.floors import count_colors, read_views
from dino.eval.online import measure_color_agreement
from dino.features.extract import Features
from dino.names import find_release
from dino.options import auto, replace, toml
from dino.options.train import TrainOptions
from dino.report import verdict as rules
from dino.report.run import Run
from dino.report.verdict import RELEASED, Verdict, judge, warn
from helpers import TINY, as_flags, draw_images

IMAGES = 4000  # that the recorded runs say they had; 1000 steps an epoch
BETTER = {"untrained": 10.0, "middle": 39.0, "trained": 40.0}
FLAT = {"untrained": 25.0, "middle": 25.0, "trained": 26.0}
HEALTHY = {"teacher_entropy": 2.0, "kl": 2.0, "prototype_usage": 3.5, "teacher_temp": 0.04}
UNIFORM = HEALTHY | {"teacher_entropy": math.log(64), "kl": 0.0, "prototype_usage": math.log(64)}
DOMINATED = HEALTHY | {"teacher_entropy": 0.0, "kl": 0.0, "prototype_usage": 0.0}
SAME = HEALTHY | {"kl": 1.5}  # entropy of each target and of their mean are set equal


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("folder") / "images", 60)


def record(
    images: Path,
    knn: dict[str, float] | None,
    *,
    steps: int = 6000,
    count: int = IMAGES,
    signs: dict[str, float] = HEALTHY,
    pixels: float = 20.0,
    colors: float = 15.0,
    last: dict[str, float] | None = None,
    **changes: Any,
) -> Run:
    """A run that recorded these figures: 20-NN of 1,000 held-out images, and the signs of collapse while it trained."""
    folder = images.parent / "runs" / "a b"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = TINY | {"epochs": 6, "data.path": str(images), "data.val_fraction": 0.2} | changes
    options = auto.resolve(replace(TrainOptions(), wanted), count, 60, False, 0)
    (folder / "config.toml").write_text(tomli_w.dumps(toml.to_dict(options)))
    places = {"untrained": 0, "middle": steps // 2, "trained": steps}
    lines = [{"step": step} | signs for step in range(10, min(steps, 400) + 1, 10)]
    for name, value in (knn or {}).items():
        lines.append({"step": places[name], "effective_rank": 5.0, "knn_queries": 1000, "knn20_top1": value})
    if knn:
        lines[-len(knn)] |= {"pixels_knn20_top1": pixels, "colors_knn20_top1": colors}
    else:
        lines += [{"step": 0, "effective_rank": 5.0}, {"step": steps, "effective_rank": 9.0}]
    lines.append({"step": steps} | signs | (last or {}))
    lines = sorted(lines, key=lambda line: line["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Run.read(folder, count)


def follow(verdict: Verdict, images: Path) -> None:
    """Run the command as printed, for a step; of what downloads or serves only the parser."""
    words = shlex.split(verdict.reason.command if verdict.reason else "")
    assert words.pop(0) == "dino"
    _, options = cli.parse(words)
    if words[0] == "app":
        assert Path(vars(options)["model"], "config.toml").exists()
    elif getattr(options, "init", None):
        assert find_release(vars(options)["init"]) or vars(options)["init"] == RELEASED
    elif "--resume" not in words:  # there is no checkpoint to resume
        assert cli.main([*words, "--stop-after", "1"]) == 0


COLOR = {"color_agreement": 30.0, "color_agreement_chance": 1.0}
CASES: dict[str, tuple[dict[str, Any], str, str | None, str, str]] = {
    # what was recorded, and outcome, reason, a part of the headline, a part of the command
    "better": (
        {"knn": BETTER},
        *("better", None, "better than the untrained network, raw pixels and color histograms.", ""),
    ),
    "rising": ({"knn": BETTER | {"middle": 30.0}}, "better", "rising", "better than", "--epochs 12"),
    "paused": ({"knn": BETTER, "epochs": 8}, "better", "stopped", "better than", "--resume"),
    "by chance": (
        {"knn": {"untrained": 25.0, "trained": 28.0}},
        *("not", "unclear", "better than raw pixels and color histograms, not measurably better than the untrained network."),
        f"--init {RELEASED}",
    ),
    "below pixels": ({"knn": BETTER, "pixels": 50.0}, "not", "unclear", ", worse than raw pixels.", f"--init {RELEASED}"),
    "rising, below": ({"knn": FLAT | {"trained": 35.0}, "pixels": 50.0}, "not", "rising", "worse than", "--epochs 12"),
    "given up": ({"knn": FLAT, "init": "vits16"}, "not", "unclear", "not measurably", "--epochs 12"),
    "few steps": (
        {"knn": FLAT, "steps": 78, "count": 840, "batch_size": 32, "epochs": 3},
        *("not", "few steps", "", "--epochs 154"),
    ),
    "some steps": ({"knn": FLAT, "steps": 2000, "epochs": 2}, "not", "few steps", "", "--epochs 4"),
    "few images": ({"knn": FLAT, "steps": 132, "count": 90}, "not", "few images", "", f"--init {RELEASED}"),
    "stopped": ({"knn": FLAT, "steps": 2000}, "not", "stopped", "", "--resume"),
    "color": ({"knn": FLAT, "colors": 28.0, "last": COLOR}, "not", "color", "", "--views.gray-prob 0.5"),
    "color, gray": (
        {"knn": FLAT, "colors": 28.0, "last": COLOR, "views.gray_prob": 0.5},
        *("not", "color", "", "--views.gray-prob 0.8"),
    ),
    "beyond color": ({"knn": BETTER, "pixels": 50.0, "last": COLOR}, "not", "unclear", "", "--init"),
    "uniform": ({"knn": FLAT, "signs": UNIFORM}, "not", "collapse", "", "--method.teacher-temp 0.03"),
    "uniform, sharp": (
        {"knn": FLAT, "signs": UNIFORM, "method.teacher_temp_start": 0.03, "method.teacher_temp": 0.03},
        *("not", "collapse", "", "--head.out-dim 16"),
    ),
    "dominated": ({"knn": FLAT, "signs": DOMINATED}, "not", "collapse", "", "--method.targets sinkhorn"),
    "own teacher": (
        {"knn": FLAT, "signs": DOMINATED, "method.teacher": "student", "method.momentum": None},
        *("not", "collapse", "", "--method.teacher momentum"),
    ),
    "same": (
        {"knn": FLAT, "signs": SAME | {"prototype_usage": 2.0}, "method.targets": "sinkhorn"},
        *("not", "collapse", "", "--optim.lr 0.000125"),
    ),
    "without labels": ({"knn": None}, "unknown", "unclear", "without labels", "dino app"),
    "without labels, color": ({"knn": None, "last": COLOR}, "unknown", "color", "without labels", "--views.gray-prob"),
    "without labels, short": (
        {"knn": None, "steps": 20, "epochs": 1, "count": 900, "batch_size": 45},
        *("unknown", "few steps", "without labels", "--epochs 200"),
    ),
    "without labels, collapsed": (
        {"knn": None, "signs": UNIFORM},
        *("not", "collapse", "collapsed", "--method.teacher-temp"),
    ),
    "at once": (
        {"knn": {"untrained": 20.0}, "steps": 7},
        *("unknown", "stopped", "nothing to compare has been measured", "--resume"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_verdict_has_its_words_its_reason_and_a_command_that_works(case, images, monkeypatch):
    recorded, outcome, reason, headline, command = CASES[case]
    verdict = judge(record(images, **recorded))
    assert (verdict.outcome, verdict.reason and verdict.reason.name) == (outcome, reason)
    assert headline in verdict.headline
    assert verdict.lines[0] == f"Verdict: {verdict.headline}"
    assert any(line.startswith("Why: ") for line in verdict.lines) == (outcome == "not")
    if verdict.reason is not None:
        assert command in verdict.reason.command
        follow(verdict, images)


def test_a_margin_is_two_standard_errors_and_two_images_prove_nothing():
    assert measure_margin(50, 50, 10**6) == pytest.approx(200 * math.sqrt(0.5 / 10**6), rel=1e-3)
    assert measure_margin(26.2, 18.6, 500) < 26.2 - 18.6
    assert measure_margin(100, 50, 2) > 50
    assert measure_margin(100, 0, 0) >= 100


def test_colors_agree_with_themselves_and_by_chance_with_nothing(tmp_path):
    source = open_source(str(draw_images(tmp_path / "images", 60)))
    found = Features(torch.zeros(60, 1), np.arange(60), [])
    colors = count_colors(read_views(source, found.indices, 16))
    assert colors.values.norm(dim=1).numpy() == pytest.approx(1)
    same = measure_color_agreement(colors, colors)
    assert same["color_agreement"] == pytest.approx(100)
    assert same["color_agreement_chance"] == pytest.approx(100 * 6 / 59)
    noise = Features(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), np.arange(60), [])
    assert measure_color_agreement(noise, colors)["color_agreement"] == pytest.approx(100 * 6 / 59, abs=5)
    fewer = Features(colors.values[5:], np.arange(5, 60), [])  # others could not be read
    assert measure_color_agreement(fewer, colors)["color_agreement"] == pytest.approx(100)
    gray = Features(torch.full((60, 16, 16, 3), 90, dtype=torch.uint8), np.arange(60), [])
    assert measure_color_agreement(noise, count_colors(gray)) == {}
    assert measure_color_agreement(Features(noise.values[:9], np.arange(9), []), colors) == {}


@pytest.mark.slow
def test_a_short_run_says_so_before_it_starts_and_at_its_end(images, tmp_path, capsys):
    run = dino.train(data=str(images), out=str(tmp_path / "run"), **TINY | {"epochs": 4, "report": True})
    said = capsys.readouterr().err
    before, after = said.split("epoch 4/4  step 52 of 52  loss")
    assert "epoch 3/4" not in before, "epochs of a second have no line of their own"
    assert "Of photographs, 54 are few: starting from released weights is likely better" in before
    assert "Warning: 52 steps are few" in before
    assert "color histograms" in after
    assert "Verdict: " in after
    assert f"Next: dino train --init timm:vit_small_patch14_dinov2.lvd142m --data {images} --out {run}-2" in after
    page = (run / "report.html").read_text()
    assert '<div class="verdict not">' in page
    assert '<p class="figure">' not in page  # nothing large
    assert "54 images are too few" in page


def test_enough_steps_are_no_warning():
    assert warn(TrainOptions(), 1000) == []
    assert warn(TrainOptions(init="vits16"), 10) == []


@pytest.mark.slow
def test_a_student_that_is_its_own_teacher_collapses_and_is_told_so(images, tmp_path, capsys):
    changes = {"method.teacher": "student", "method.momentum": None, "method.targets": "none", "log.knn_every": 0}
    dino.train(data=str(images), out=str(tmp_path / "run"), **TINY | changes | {"epochs": 12})
    said = capsys.readouterr().err
    assert "Why: It collapsed by step" in said
    assert "--method.teacher momentum" in said


@pytest.mark.slow
def test_a_run_that_goes_by_color_is_told_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rules, "FEW_STEPS", 100)
    changes = {"epochs": 1, "views.jitter_prob": 0.0, "views.gray_prob": 0.0, "log.knn_every": 0}
    assert cli.main(["train", "--data", "scenes:600", "--out", str(tmp_path / "run"), *as_flags(TINY | changes)]) == 0
    said = capsys.readouterr().err
    assert "Why: It goes by color" in said
    assert "--views.gray-prob 0.5" in said
