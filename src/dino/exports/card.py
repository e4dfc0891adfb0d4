"""The model card beside an export: the model, its training and data, and its evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dino.data.normalize import MEAN, STD
from dino.engine.checkpoint import Checkpoints, read_checkpoint
from dino.engine.log import read_metrics
from dino.version import __version__
from dino.weights import releases

USE = {
    "hf": """\
import transformers

processor = transformers.AutoImageProcessor.from_pretrained("{out}")
model = transformers.AutoModel.from_pretrained("{out}", add_pooling_layer=False)
tokens = model(**processor(image, return_tensors="pt"), interpolate_pos_encoding=True).last_hidden_state
features = tokens[:, 0]""",
    "timm": """\
import timm

model = timm.create_model("local-dir:{out}", pretrained=True).eval()
features = model(images)""",
    "onnx": """\
import onnxruntime

session = onnxruntime.InferenceSession("{out}")
features, tokens = session.run(None, {{"images": images}})""",
    "torch-export": """\
import torch

model = torch.export.load("{out}").module()
features, tokens = model(images)""",
}
LIBRARIES = {"hf": "transformers", "timm": "timm"}
OURS = """\
import dino

model = dino.load("{out}")
features, tokens = model(images), model.tokens(images)[-1]"""
INPUT = f"Images are float32 [n, channels, height, width], RGB from 0 to 1 less {MEAN}, divided by {STD}."


def render_card(name: str, to: str, out: Path, facts: dict[str, str], digest: str) -> str:
    """The Markdown text.

    Args:
        name: what was exported: a run directory, a release, a file.
        to: the format of `out`.
        facts: about the model and the check, by name.
        digest: SHA-256 of the model's weights; only evaluations of these weights are listed.
    """
    release = releases.find_release(name) if not Path(name).exists() else None
    head = [
        "---",
        f"library_name: {LIBRARIES.get(to, 'dino')}",
        "tags: [dino, self-supervised]",
        "pipeline_tag: image-feature-extraction",
    ]
    figures: list[tuple[str, ...]] = []
    training = []
    if release:
        head.append(f"license: {releases.LICENSE.lower()}")
        published = releases.RELEASES[release[0]]
        facts = facts | {"trained by": f"the authors of the paper ({release[0]}, license {releases.LICENSE})"}
        pairs = (("k-NN", published.knn), ("linear", published.linear))
        figures = [("published", f"{k}, ImageNet top-1", f"{v:.1f}", "") for k, v in pairs if v is not None]
    elif (Path(name) / "config.toml").is_file():
        trained, figures = _describe_run(Path(name), digest)
        facts = facts | trained
        options = (Path(name) / "config.toml").read_text()
        training = ["## Training options", f"```toml\n{options.strip()}\n```"]
    table = [("figure of", "what", "value", "data fingerprint"), ("---",) * 4, *figures]
    parts = [
        "\n".join([*head, "---"]),
        f"# {Path(name).name}",
        f"Trained without labels by DINO (Caron et al. 2021), written as `{to}` by dino {__version__}.",
        _format_table([("", ""), ("---", "---"), *facts.items(), ("SHA-256 of the weights", f"`{digest}`")]),
        "## Use",
        f"```python\n{USE.get(to, OURS).format(out=out.name)}\n```",
        INPUT,
        *(["## Figures", _format_table(table)] if figures else []),
        *training,
    ]
    return "\n\n".join(parts) + "\n"


def _describe_run(folder: Path, digest: str) -> tuple[dict[str, str], list[tuple[str, ...]]]:
    """Facts of a run's data and training, and figures of its training and evaluations."""
    facts: dict[str, str] = {}
    if (latest := Checkpoints(folder / "checkpoints").latest()) is not None:
        facts["fingerprint of the training data"] = f"`{read_checkpoint(latest)['data']}`"
    last: dict[str, Any] = {}
    for line in read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []:
        last |= line
    facts |= {"steps": f"{last['step']:,}", "epochs": f"{last['epoch']:g}"} if last.keys() >= {"step", "epoch"} else {}
    measured = ("loss", "feature_std", "effective_rank", "knn", "jaccard")
    figures: list[tuple[str, ...]] = [
        ("training", name, f"{value:.4g}", "") for name, value in last.items() if name.startswith(measured)
    ]
    for path in sorted((folder / "eval").glob("*.json")):
        found = json.loads(path.read_text())
        if found.get("model", {}).get("sha256") == digest:
            data = ", ".join(f"{part} `{value[:12]}`" for part, value in found["data"].items())
            figures += [(found["evaluation"], name, f"{value:.4g}", data) for name, value in found["figures"].items()]
    return facts, figures


def _format_table(rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
