"""Schedules against the reference's arrays."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dino.schedules import cosine, linear_then_constant, warmup_cosine


def test_match_reference(golden):
    expected, total, per_epoch = golden("schedules"), 20 * 50, 50
    steps = range(total)
    lr = [warmup_cosine(s, total, 0.0005 * 1024 / 256, 1e-6, 3 * per_epoch) for s in steps]
    np.testing.assert_allclose(lr, expected["lr"], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose([cosine(s, total, 0.04, 0.4) for s in steps], expected["wd"], rtol=1e-6)
    np.testing.assert_allclose([cosine(s, total, 0.996, 1.0) for s in steps], expected["momentum"], rtol=1e-6)


def test_teacher_temp_reaches_its_end_at_the_last_warm_up_epoch():
    values = [linear_then_constant(e, 0.04, 0.07, 30) for e in range(40)]
    np.testing.assert_allclose(values[:30], np.linspace(0.04, 0.07, 30), rtol=1e-12)
    assert values[29:] == [0.07] * 11
    assert [linear_then_constant(e, 0.04, 0.07, 0) for e in range(3)] == [0.07] * 3


@given(st.integers(1, 500), st.data(), st.floats(1e-6, 1), st.floats(1e-9, 1))
def test_warmup_cosine_stays_between_its_ends(total, data, peak, end):
    warmup = data.draw(st.integers(0, total - 1))
    step = data.draw(st.integers(0, total - 1))
    value = warmup_cosine(step, total, peak, end, warmup)
    assert -1e-12 <= value <= max(peak, end) + 1e-12
    if step == warmup:
        assert np.isclose(value, peak)
