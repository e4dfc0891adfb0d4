"""Schedules: pure functions step -> value, so that any step can be asked for at any time and a resume needs no state.

All are the reference's, to the iteration: the warm-up reaches its peak at its last step, and a cosine stops one step
short of its final value (it would be reached at step ``total``, which is never run).
"""

from __future__ import annotations

import math


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `total`."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total))


def warmup_cosine(step: int, total: int, peak: float, end: float, warmup: int) -> float:
    """Linear from 0 to `peak` over the first `warmup` steps, then a cosine to `end`."""
    if step < warmup:
        return peak * step / (warmup - 1) if warmup > 1 else 0.0
    return cosine(step - warmup, total - warmup, peak, end)


def linear_then_constant(epoch: int, start: float, end: float, epochs: int) -> float:
    """`epochs` evenly spaced values from `start` to `end` inclusive, then `end`: the teacher temperature."""
    if epoch >= epochs:
        return end
    return start + (end - start) * epoch / (epochs - 1) if epochs > 1 else start
