"""Collapse detection on numbers."""

from __future__ import annotations

import math

from dino.engine.log import MetricsLog
from dino.engine.monitor import CollapseMonitor

LIMIT = math.log(1024)


def signs(entropy, kl, usage):
    return {"teacher_entropy": entropy, "kl": kl, "prototype_usage": usage, "teacher_temp": 0.04}


def drive(monitor: CollapseMonitor, steps, entropy, kl, usage):
    said = [monitor.look(step, signs(entropy, kl, usage)) for step in steps]
    return [text for text in said if text]


def test_names_the_collapse_of_vectors_to_one_point():
    monitor = CollapseMonitor(1)
    said = [text for step in range(10, 400, 10) if (text := monitor.look(step, {"target_spread": 0.001}))]
    assert len(said) == 1
    assert "one point" in said[0]
    assert CollapseMonitor(1).look(100, {"target_spread": 0.3}) is None


def test_names_the_uniform_collapse_once_and_what_to_change():
    said = drive(CollapseMonitor(1024), range(10, 400, 10), LIMIT - 1e-4, 1e-4, LIMIT)
    assert len(said) == 1
    assert "uniform" in said[0]
    assert "--method.teacher-temp" in said[0]


def test_names_the_dominated_collapse():
    said = drive(CollapseMonitor(1024), range(10, 400, 10), 1e-4, 1e-4, 1e-3)
    assert len(said) == 1
    assert "one prototype" in said[0]
    assert "centering" in said[0]


def test_names_targets_that_are_the_same_for_all_images_and_wander():
    """As a student that is its own teacher does: the entropy swings, and never differs from the mean target's."""
    monitor = CollapseMonitor(1024)
    said = []
    for step, entropy in zip(range(10, 400, 10), [LIMIT, 0.2, 5.6, 4.2, 1.4, 3.1] * 7, strict=False):
        said += [monitor.look(step, signs(entropy, 1.5, entropy + 1e-6))]
    assert [bool(text) for text in said[:6]] == [False] * 5 + [True]
    assert "all images have the same target" in str(said[5])
    assert not any(said[6:])
    assert drive(CollapseMonitor(1024, images=2), range(10, 400, 10), 3.0, 1.5, 3.0) == []


def test_speaks_within_200_steps():
    monitor = CollapseMonitor(1024)
    steps = [s for s in range(10, 400, 10) if monitor.look(s, signs(1e-4, 1e-4, 1e-3))]
    assert steps
    assert steps[0] <= 200


def test_healthy_signs_are_silent():
    for entropy, kl, usage in (
        (2.0, 3.0, 6.5),  # a usual run
        (0.02, 4.0, 6.0),  # very sharp targets, still different from image to image
        (LIMIT - 0.005, 0.6, LIMIT),  # the first steps: near uniform, because little tells the images apart yet
        (6.0, 0.01, LIMIT),  # the student follows closely, the targets are not uniform
    ):
        assert drive(CollapseMonitor(1024), range(10, 1000, 10), entropy, kl, usage) == []


def test_a_passing_dip_is_silent_and_state_survives_a_resume():
    monitor = CollapseMonitor(1024)
    assert drive(monitor, range(10, 50, 10), 1e-4, 1e-4, 1e-3) == []
    again = CollapseMonitor(1024)
    again.load_state_dict(monitor.state_dict())
    assert again.look(70, signs(1e-4, 1e-4, 1e-3))
    assert again.look(80, signs(3.0, 1.0, 5.0)) is None
    assert again.look(90, signs(1e-4, 1e-4, 1e-3)) is None


def test_metrics_are_json_whatever_the_numbers(tmp_path):
    """A step that fp16's scaler leaves out has an infinite gradient norm, and JSON no such number."""
    metrics = MetricsLog(tmp_path, 0)
    metrics.write(3, {"loss": 5.0, "grad_norm": math.inf, "kl": math.nan})
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "loss": 5.0}\n'
