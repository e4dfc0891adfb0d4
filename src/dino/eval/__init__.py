"""Evaluations: `evaluate(model, options) -> dict[str, float]`."""
