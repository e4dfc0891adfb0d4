"""Few labels: the logistic regression against other solvers and its own optimality; the command."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import dino
from dino import cli
from dino.data.image_files import open_source
from dino.data.open import open_labeled_pair
from dino.eval import knn, lowshot
from dino.features import neighbors
from dino.features.extract import extract
from dino.options import replace
from dino.options.evaluate import LowshotOptions
from dino.options.train import TrainOptions
from helpers import TINY, draw_images, run_dino


def problem(n: int = 60, d: int = 7, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=draws, dtype=torch.float64)
    y = (x[:, :classes] + torch.randn(n, classes, generator=draws)).argmax(dim=1)
    return torch.nn.functional.normalize(x, dim=1), y


def plain(w: np.ndarray, x: np.ndarray, y: np.ndarray, c: float) -> float:
    """Sum of cross-entropies + |W|^2 / 2C, written out."""
    scores = x @ w.reshape(x.shape[1], -1)
    return float((np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(y)), y]).sum() + (w**2).sum() / (2 * c))


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_solution_against_scipy(c):
    x, y = problem()
    found = lowshot.fit_logistic(x.float(), y, 4, c)  # features come in single precision
    x32 = x.float().double().numpy()
    best = minimize(plain, np.zeros(28), (x32, y.numpy(), c), method="BFGS", options={"gtol": 1e-8})
    np.testing.assert_allclose(found.numpy().ravel(), best.x, atol=2e-4 * max(1, np.abs(best.x).max()))
    assert plain(found.numpy().ravel(), x32, y.numpy(), c) <= best.fun + 1e-8


@pytest.mark.parametrize("c", [0.1, 1e5])
def test_gradient_vanishes_at_the_solution_and_parts_change_nothing(c, monkeypatch):
    x, y = problem()
    x = torch.nn.functional.normalize(x + 5 * x[0], dim=1)  # nearly parallel, as features of one model are
    w = lowshot.fit_logistic(x, y, 4, c).requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(x @ w, y) + w.square().sum() / (2 * c * len(x))
    (expected,) = torch.autograd.grad(loss, w)
    assert expected.abs().max() < 1e-6
    penalty = 1 / (c * len(x))
    value, gradient = lowshot.objective(w.detach(), x, y, penalty)
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)
    monkeypatch.setattr(neighbors, "MOST_NUMBERS", 2 * 4 * 7)
    parts = lowshot.objective(w.detach(), x, y, penalty)
    torch.testing.assert_close(parts[0], value)
    torch.testing.assert_close(parts[1], gradient, atol=1e-12, rtol=0)


def test_fewer_images_than_numbers_and_a_start_from_another_c(monkeypatch):
    """The gradient vanishes there too; a start near the solution takes fewer steps, and threads are given back."""
    x, y = problem(12, 40)
    steps, objective = [], lowshot.objective

    def counting(*arguments):
        assert torch.get_num_threads() == 1
        steps.append(1)
        return objective(*arguments)

    monkeypatch.setattr(lowshot, "objective", counting)
    torch.set_num_threads(2)
    try:
        found = [lowshot.fit_logistic(x, y, 4, 1e4)]
        taken = len(steps)
        found.append(lowshot.fit_logistic(x, y, 4, 1e4, start=lowshot.fit_logistic(x, y, 4, 9e3)))
        assert torch.get_num_threads() == 2
        steps.clear()
        lowshot.fit_logistic(x, y, 4, 1e4, start=found[0])
        assert len(steps) < taken / 4
    finally:
        torch.set_num_threads(1)
    for w in found:
        loss, gradient = objective(w, x, y, 1 / (1e4 * len(x)))
        assert gradient.abs().max() < 1e-6
        assert loss == pytest.approx(plain(w.numpy().ravel(), x.numpy(), y.numpy(), 1e4) / len(x))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-3 * found[0].abs().max().item())


def test_one_image_a_class_in_closed_form():
    """Two opposite features: w = t x of class 0 and -t x of class 1 with t = 2 C sigmoid(-2 t), by symmetry."""
    c = 3.0
    w = lowshot.fit_logistic(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]), 2, c)
    t = w[0, 0].item()
    assert w[0, 1].item() == pytest.approx(-t)
    assert t == pytest.approx(2 * c / (1 + np.exp(2 * t)), abs=1e-5)


def test_cross_validation_picks_what_a_plain_loop_picks():
    x, y = problem(80, seed=3)
    fold = lowshot.deal_folds(y.numpy(), 5, seed=0)
    for label in range(4):  # every fold has its share of every class
        counts = np.bincount(fold[y.numpy() == label], minlength=5)
        assert counts.max() - counts.min() <= 1
    hits = {}
    for c in lowshot.CS:
        hits[c] = 0
        for part in range(5):
            inside, out = torch.from_numpy(fold != part), torch.from_numpy(fold == part)
            w = lowshot.fit_logistic(x[inside], y[inside], 4, c)
            hits[c] += int(((x[out] @ w).argmax(dim=1) == y[out]).sum())
    most = max(hits.values())
    assert lowshot.choose_c(x, y, 4, 5, 0) == min(c for c in hits if hits[c] == most)


def test_lists(photos, tmp_path):
    source = open_source(str(photos), "folders")
    names = [source.name(i) for i in (3, 5, 20)]
    file = tmp_path / "list.txt"
    file.write_text(f"# comment\n./{names[0]}\n{names[1].rpartition('/')[2]}\n\n{names[2]}\n")
    assert lowshot.read_list(source, str(file)).tolist() == [3, 5, 20]
    (photos / "class0" / "same.jpg").write_bytes((photos / names[0]).read_bytes())
    (photos / "class1" / "same.jpg").write_bytes((photos / names[0]).read_bytes())
    source = open_source(str(photos), "folders")
    for content, answer in (("same.jpg", "names two images"), ("no.jpg", "no training image"), ("#", "names no image")):
        file.write_text(content)
        with pytest.raises(ValueError, match=answer):
            lowshot.read_list(source, str(file))
    file.write_text("class1/same.jpg")
    assert len(lowshot.read_list(source, str(file))) == 1


def command(*arguments: object) -> int:
    """The command line in this process, which has loaded PyTorch already."""
    return cli.main([str(argument) for argument in ("eval", "lowshot", *arguments)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("lowshot")
    photos = draw_images(root / "photos", 60)
    dino.train(replace(TrainOptions(), TINY | {"epochs": 1}), data=str(photos), out=str(root / "run"))
    return root / "run", photos


def test_the_table_on_any_folder_with_one_and_two_ranks(trained, tmp_path):
    run, photos = trained
    results = []
    for ranks in (1, 2):
        flags = ("--data", photos, "--percent", 10, 50, 100, "--k", 5, "--json", tmp_path / f"{ranks}.json")
        if ranks == 1:
            assert command(run, *flags) == 0
        else:
            environment = os.environ | {"DINO_CACHE": str(tmp_path / "cache")}
            done = run_dino("eval", "lowshot", run, *flags, ranks=ranks, env=environment)
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("Written") == 1
        results.append(json.loads((tmp_path / f"{ranks}.json").read_text()))
    one, two = results
    assert one["figures"] == two["figures"]
    assert one["c"] == two["c"]
    shares = ("10%", "50%", "100%")
    assert one["figures"].keys() == {f"{what}_{share}_top1" for what in ("knn", "logistic") for share in shares}
    assert one["images"]["training images (10%)"] == 6
    # The k-NN of all labels is that of `dino eval knn`.
    bank, test = open_labeled_pair(str(photos), None)
    model = dino.load(run)
    x, q = extract(model, bank, 32), extract(model, test, 32)
    labels = [torch.from_numpy(source.labels)[f.indices] for source, f in ((bank, x), (test, q))]
    assert one["figures"]["knn_100%_top1"] == knn.classify(x.values, labels[0], q.values, labels[1], (5,))["knn5_top1"]


def test_a_list_in_place_of_drawn_shares(trained, tmp_path, capsys):
    run, photos = trained
    chosen = sorted(path.name for path in photos.rglob("*.jpg"))[:6]
    (tmp_path / "few.txt").write_text("\n".join(chosen))
    flags = ("--data", photos, "--val", photos, "--list", tmp_path / "few.txt", "--c", 10, "--k", 3)
    assert command(run, *flags) == 0
    result = json.loads((run / "eval" / "lowshot.json").read_text())
    assert result["figures"].keys() == {"knn_10%_top1", "logistic_10%_top1"}
    assert result["images"] == {"training images (10%)": 6, "test images": 60}
    assert result["c"] == {"10%": 10.0}
    assert command(run, "--data", photos, "--list", tmp_path / "none.txt") == 2
    assert "none.txt" in capsys.readouterr().err


def test_without_options_shares_and_neighbors_fit_the_folder(trained, capsys):
    """54 images of 3 classes: 1 % is no image of a class, and 10 % are fewer images than neighbors."""
    run, photos = trained
    assert command(run, "--data", photos) == 0
    result = json.loads((run / "eval" / "lowshot.json").read_text())
    assert result["images"] == {"training images (10%)": 6, "training images (100%)": 54, "test images": 6}
    assert "6-NN of raw 32x32 pixels" in result["floors"]["logistic_10%_top1"]
    assert "20-NN of raw 32x32 pixels" in result["floors"]["knn_100%_top1"]
    assert "To beat with 10%, on 6 test images and 6 of the bank" in capsys.readouterr().out
    assert command(run, "--data", photos, "--k", 20, "--percent", 1) == 2
    assert "k is 20, but 1% of the training images are 3; lower --k or take more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "answer"),
    [({"percent": (0.0,)}, "above 0"), ({"c": -1.0}, "above 0"), ({"folds": 1}, "at least 2")],
)
def test_impossible_options_are_one_sentence(options, answer):
    with pytest.raises(ValueError, match=answer):
        LowshotOptions(model="m", data="d", **options)
