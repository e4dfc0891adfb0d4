"""The model card beside an export: the model, its training and data, and its evaluations."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from dino.engine.log import read_metrics
from dino.html import ENVIRONMENT
from dino.models import Backbone
from dino.names import RELEASES, find_release
from dino.version import __version__
from dino.weights import releases, runs
from dino.weights.checkpoints import CheckpointError, read_newest


def render_card(
    name: str, to: str, out: Path, facts: dict[str, str], digest: str, model: Backbone, step: int | None, repo: str = ""
) -> str:
    """The Markdown text.

    Args:
        name: what was exported: a run directory, a release, a file.
        to: the format of `out`.
        facts: about the model and the check, by name.
        digest: SHA-256 of the model's weights; only evaluations of these weights are listed.
        model: what was exported.
        step: of its run, after which it was taken. None: the last.
        repo: ORG/NAME on the hub where it is read. With it, options that hold paths of this machine are left out.
    """
    path = Path(runs.split_name(name)[0]).expanduser()
    release = find_release(name) if not path.exists() else None
    license = options = None
    figures: list[tuple[str, ...]] = []
    if release:
        license, published = releases.LICENSE, RELEASES[release[0]]
        facts = facts | {"trained by": f"the authors of the paper ({release[0]}, license {license})"}
        pairs = (("k-NN", published.knn), ("linear", published.linear))
        figures = [("published", f"{k}, ImageNet top-1", f"{v:.1f}", "") for k, v in pairs if v is not None]
    elif (path / "config.toml").is_file():
        trained, figures = _describe_run(path, digest, step)
        facts = facts | trained
        options = (path / "config.toml").read_text()
        if repo:
            options = re.sub(r"""^\w+ = ["'](\w+:)*[/~\\].*\n""", "", options, flags=re.MULTILINE)
    said = {"name": path.name, "to": to, "out": out.name, "repo": repo, "license": license, "version": __version__}
    said |= {"facts": facts, "digest": digest, "edge": model.view_size, "wanted": model.preprocessing}
    return ENVIRONMENT.get_template("card.md.jinja").render(said, figures=figures, options=options)


def _describe_run(folder: Path, digest: str, step: int | None) -> tuple[dict[str, str], list[tuple[str, ...]]]:
    """Facts of a run's data and training, and figures of its training and evaluations."""
    facts: dict[str, str] = {}
    with contextlib.suppress(CheckpointError):
        if (found := read_newest(folder / "checkpoints")) is not None:
            facts["fingerprint of the training data"] = f"`{found.state['data']}`"
    last: dict[str, Any] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        if step is None or line["step"] <= step:
            last |= line
    facts |= {"steps": f"{last['step']:,}", "epochs": f"{last['epoch']:g}"} if last.keys() >= {"step", "epoch"} else {}
    measured = ("loss", "feature_std", "effective_rank", "knn", "jaccard")
    figures: list[tuple[str, ...]] = [
        ("training", name, f"{value:.4g}", "") for name, value in last.items() if name.startswith(measured)
    ]
    for path in sorted([*(folder / "eval").glob("*.json"), *(folder / "eval" / "last").glob("*.json")]):
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):  # a damaged one
            found = json.loads(path.read_text())
            if found["model"]["sha256"] == digest:
                data = ", ".join(f"{part} `{value[:12]}`" for part, value in found["data"].items())
                figures += [(found["evaluation"], name, f"{v:.4g}", data) for name, v in found["figures"].items()]
    return facts, figures
