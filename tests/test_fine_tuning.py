"""docs/fine-tuning.md on real images: every recipe runs as it stands, and learns, on scans of handwritten digits."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torchvision.datasets import ImageFolder

import dino

PAGE = Path(__file__).parent.parent / "docs" / "fine-tuning.md"
RECIPES = dict(
    re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """1,000 digits to learn from and 400 others, the ink of 300 as masks of ten classes, and a model trained on digits."""
    root, digits = tmp_path_factory.mktemp("digits"), load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images[:1400], digits.target[:1400], strict=True)):
        scan = cv2.resize((pixels * 15.9).astype(np.uint8), (32, 32), interpolation=cv2.INTER_CUBIC)
        kinds = [(f"labeled/{'train' if i < 1000 else 'test'}/{label}", "jpg", scan)]
        if i < 300:
            kinds += [
                ("ecssd/images", "png", scan),
                ("ecssd/masks", "png", np.uint8(label + 1) * (scan > 100).astype(np.uint8)),
            ]
        for folder, ending, values in kinds:
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / folder / f"{i:04d}.{ending}")
    sizes = {"model.arch": "vit_nano_hybrid", "model.width": 32, "model.depth": 2, "model.num_heads": 2}
    how = {"epochs": 6, "threads": 1, "report": False, "data.num_workers": 0, "log.knn_every": 0}
    dino.train(data=str(root / "labeled/train"), out=str(root / "runs/a"), **sizes | how)
    return root


@pytest.fixture
def run_recipe(workspace, monkeypatch):
    """What a recipe's Python leaves behind, by name."""
    monkeypatch.chdir(workspace)
    torch.manual_seed(0)

    def run(title: str) -> dict[str, Any]:
        known: dict[str, Any] = {"__name__": "__main__"}
        for block in re.findall(r"^```python\n(.*?)^```", RECIPES[title], re.MULTILINE | re.DOTALL):
            exec(compile(block, title, "exec"), known)
        return known

    return run


def classify_others(network: nn.Module, transform: Any) -> float:
    """Percent of the other digits that `network` names."""
    others = ImageFolder("labeled/test", transform)
    images, labels = zip(*others, strict=True)
    with torch.no_grad():
        scores = network.eval()(torch.stack(images))
    return 100 * float((scores.argmax(1) == torch.tensor(labels)).float().mean())


def weigh(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_linear_head(run_recipe):
    made = run_recipe("A linear head")
    assert torch.equal(weigh(made["model"]), weigh(dino.load("runs/a")))
    assert classify_others(nn.Sequential(made["model"], made["head"]), made["model"].transform) > 40


def test_all_of_the_network(run_recipe):
    made = run_recipe("All of the network, later layers faster")
    assert classify_others(made["network"], made["model"].transform) > 25
    moved = [
        (a - b).abs().mean() for a, b in zip(made["model"].parameters(), dino.load("runs/a").parameters(), strict=True)
    ]
    assert min(moved) > 0
    assert sum(moved[:10]) < 0.7 * sum(moved[-10:]), "of the first and the last layers"


@pytest.mark.filterwarnings("ignore:'pin_memory'")  # of transformers, where there is no GPU
def test_trainer(run_recipe):
    made = run_recipe("A model of Hugging Face's `Trainer`")
    model = made["model"]
    assert not torch.equal(weigh(model.backbone), weigh(dino.load("runs/a")))
    assert classify_others(nn.Sequential(model.backbone, model.head), model.backbone.transform) > 25


def test_detector(run_recipe):
    made = run_recipe("A detector")
    assert all(p.grad.abs().max() > 0 for p in made["backbone"].model.blocks.parameters())


def test_scikit_learn(run_recipe):
    made = run_recipe("scikit-learn")
    others = sorted(Path("labeled/test").glob("*/*.jpg"))
    assert made["pipeline"].score([str(path) for path in others], [path.parent.name for path in others]) > 0.7


def test_segments(run_recipe, workspace):
    (line,) = re.findall(r"^\$ dino (.*)", RECIPES["Segments from patches"], re.MULTILINE)
    words = shlex.split(line)
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    found = dino.evaluate(words[1], words[2], images=flags["--images"], masks=flags["--masks"], size=32).figures
    assert min(found["knn_miou"], found["linear_miou"]) > 2 * found["colors_miou"] > 0
