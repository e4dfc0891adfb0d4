"""Linear classification: the sweep against separate trainings, the two modes through the command line, resume, ranks."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import dino
from dino import cli
from dino.data.image_files import open_source
from dino.eval import linear
from dino.eval.supervised import LabeledBatches, compute_accuracies, draw_per_class
from dino.eval.sweep import Sweep
from dino.features.extract import POOLINGS, extract, select_labels
from dino.models import create
from dino.options import replace
from dino.options.evaluate import LinearOptions
from dino.options.train import TrainOptions
from helpers import TINY, assert_same_bits, draw_images, run_dino

CPU = torch.device("cpu")


def command(*arguments: object) -> int:
    """The command line in this process, which has loaded PyTorch already."""
    return cli.main([str(argument) for argument in ("eval", "linear", *arguments)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("linear")
    photos = draw_images(root / "photos", 60)
    options = replace(TrainOptions(), TINY | {"epochs": 1, "report": False, "model.depth": 4})
    dino.train(options, data=str(photos), out=str(root / "run"))
    return root / "run", photos


# --- the sweep -------------------------------------------------------------------------------------------------------


def test_sweep_equals_separate_trainings():
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(40, 12, generator=draws, dtype=torch.float64)
    y = torch.randint(0, 5, (40,), generator=draws)
    columns = {"cls": (8, 12), "last4": (0, 12)}
    rates, decays = [0.05, 0.7], [0.0, 0.01]
    sweep = Sweep(columns, rates, decays, 5, seed=3, device=CPU, dtype=torch.float64)
    alone = {}
    for name, (a, b) in columns.items():
        for point, (rate, decay) in enumerate(sweep.points):
            layer = nn.Linear(b - a, 5, dtype=torch.float64)
            layer.load_state_dict(sweep.head(name, point))
            optimizer = torch.optim.SGD(layer.parameters(), rate, momentum=0.9, weight_decay=decay)
            alone[name, point] = layer, optimizer
            assert not layer.bias.any()
            assert 0.005 < layer.weight.std() < 0.02
    for step, rows in enumerate(torch.arange(40).split(16)):  # the last batch is smaller
        scale = 1 - step / 4
        losses = []
        for (name, point), (layer, optimizer) in alone.items():
            optimizer.param_groups[0]["lr"] = scale * sweep.points[point][0]
            loss = nn.functional.cross_entropy(layer(x[rows, slice(*columns[name])]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sweep.step(x[rows], y[rows], len(rows), scale).item() == pytest.approx(min(losses))
    for (name, point), (layer, _) in alone.items():
        found = sweep.head(name, point)
        torch.testing.assert_close(found["weight"], layer.weight.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(found["bias"], layer.bias.detach(), rtol=0, atol=1e-12)
        right = (layer(x[:, slice(*columns[name])]).argmax(1) == y).double().mean().item()
        assert sweep.top1(name, x, y)[point] == pytest.approx(100 * right)


def test_a_classifier_that_diverges_spoils_no_other():
    draws = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 6, generator=draws), torch.randint(0, 3, (32,), generator=draws)
    both = Sweep({"cls": (0, 6)}, [0.1, 3e38], [0.0], 3, 0, CPU)
    one = Sweep({"cls": (0, 6)}, [0.1], [0.0], 3, 0, CPU)
    for _ in range(12):
        both.step(x, y, 32, 1.0)
        one.step(x, y, 32, 1.0)
    assert not both.head("cls", 1)["weight"].isfinite().all()
    torch.testing.assert_close(both.head("cls", 0), one.head("cls", 0))


def test_narrow_poolings_are_columns_of_the_widest(photos):
    source = open_source(str(photos), "folders")
    model = create("vit_nano", 8, 32, depth=4).eval()
    wide = extract(model, source, 32, pooling="last4+average").values
    for name, (a, b) in linear.COLUMNS["last4+average"].items():
        d = model.embed_dim
        torch.testing.assert_close(wide[:, a * d : b * d], extract(model, source, 32, pooling=name).values)
    assert linear.find_widest_pooling(model) == "last4+average"


def test_the_papers_pooling_of_a_model():
    assert linear.find_paper_pooling(create("vit_nano", 8, 32, depth=4).eval()) == "last4"
    assert linear.find_paper_pooling(create("vit_base", 16, 32, depth=4).eval()) == "cls+average"
    assert linear.find_paper_pooling(create("vit_nano", 8, 32, depth=2).eval()) == "cls"
    assert linear.find_paper_pooling(create("timm:resnet18", image_size=32).eval()) == "cls"


# --- batches, splits, accuracies -------------------------------------------------------------------------------------


def test_batches_cover_each_epoch_and_ranks_share_them(photos):
    source = open_source(str(photos), "folders")

    def batches(rank, ranks, **options):
        made = LabeledBatches(source, lambda image: torch.rand(3, 4, 4), 4, 10, seed=5, **options)
        made.rank, made.ranks = rank, ranks
        return made

    one = batches(0, 1)
    assert one.steps_per_epoch == 3
    seen = [index for step in range(3) for index, _ in one.samples(step)[0]]
    assert sorted(seen) == list(range(24))
    assert one.samples(2)[1] == 4
    for step in (0, 2, 7):
        whole, parts = one[step], [batches(rank, 3, group=3)[step] for rank in range(3)]
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        assert {part.total for part in parts} == {whole.total}
    repeated = batches(0, 1, repeats=3).samples(0)[0]
    assert len({index for index, _ in repeated}) == 4
    assert len(set(repeated)) == 10
    assert all(a[0] != b[0] for a, b in itertools.pairwise(repeated))
    assert batches(0, 1, drop_last=True).steps_per_epoch == 2


def test_an_unreadable_image_has_a_stand_in(photos):
    first = sorted(photos.rglob("*.jpg"))[0]
    first.write_bytes(b"")
    source = open_source(str(photos), "folders")
    batch = LabeledBatches(source, lambda image: torch.zeros(3, 4, 4), 4, 24, seed=0)[0]
    assert len(batch.images) == 24
    assert [name for name, _ in batch.bad] == [source.name(0)]


def test_shares_of_classes_nest_and_leave_none_out():
    labels = torch.tensor([0] * 100 + [1] * 10 + [2]).numpy()
    small, large = draw_per_class(labels, 0.1, 4), draw_per_class(labels, 0.3, 4)
    assert [int((labels[small] == c).sum()) for c in range(3)] == [10, 1, 1]
    assert [int((labels[large] == c).sum()) for c in range(3)] == [30, 3, 1]
    assert set(small) <= set(large)
    assert (draw_per_class(labels, 0.1, 5) != small).any()
    assert 110 not in draw_per_class(labels, 0.1, 4, least=0)


def test_accuracies_against_a_count():
    scores = torch.tensor([[3.0, 2, 1, 0, -1, -2], [3, 2, 1, 0, -1, -2], [0, 9, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0]])
    found = compute_accuracies(scores, torch.tensor([0, 4, 1, 5]))
    assert found == pytest.approx({"top1": 50, "top5": 75, "class_mean": 50})
    assert "top5" not in compute_accuracies(scores[:, :3], torch.tensor([0, 0, 0, 1]))


# --- the command -----------------------------------------------------------------------------------------------------


def test_fast_mode(trained, tmp_path, capsys):
    run, photos = trained
    torch.set_num_threads(1)  # as torchrun's ranks
    flags = ("--data", photos, "--epochs", 15, "--batch-size", 16, "--lr", 0.1, 1, "--weight-decay", 0)
    assert command(run, *flags) == 0
    result = json.loads((run / "eval" / "linear.json").read_text())
    assert len(result["grid"]) == 4 * 2
    assert "last4, decay 0" in capsys.readouterr().out
    best = max(result["grid"], key=lambda entry: entry["held_out_top1"])
    # The saved head gives the reported figure.
    file = run / "eval" / "linear.safetensors"
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"pooling": best["pooling"], "classes": "class0\nclass1\nclass2"}
    head, model = load_file(file), dino.load(run)
    _, test = linear.open_labeled_pair(str(photos), None)
    found = extract(model, test, 32, pooling=best["pooling"])
    predicted = (found.values @ head["weight"].T + head["bias"]).argmax(dim=1)
    top1 = 100 * (predicted == select_labels(test, found, "test")).double().mean().item()
    assert result["figures"]["linear_top1"] == pytest.approx(top1)
    two = run_dino("eval", "linear", run, *flags, "--json", tmp_path / "two.json", ranks=2)
    assert two.returncode == 0, two.stderr
    assert json.loads((tmp_path / "two.json").read_text())["figures"] == result["figures"]
    assert_same_bits(load_file(tmp_path / "two.safetensors"), head)


PAPER_FLAGS = ("--mode", "paper", "--epochs", 4, "--batch-size", 16, "--lr", 1, "--checkpoint-minutes", 0)


def test_paper_mode_resumes_to_the_bit_and_two_ranks_agree(trained, tmp_path, capsys, monkeypatch):
    run, photos = trained
    flags = (run, "--data", photos, *PAPER_FLAGS, "--json")
    assert command(*flags, tmp_path / "whole.json") == 0
    assert "epoch 4/4" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        step = linear.FrozenTraining.step

        def stopped(self, number, batch):
            if number == 6:
                raise KeyboardInterrupt
            return step(self, number, batch)

        patch.setattr(linear.FrozenTraining, "step", stopped)
        assert command(*flags, tmp_path / "stopped.json") == 130
    assert not (tmp_path / "stopped.json").exists()
    assert command(*flags, tmp_path / "stopped.json") == 0
    assert "Resuming after step 6 of 16" in capsys.readouterr().err
    assert_same_bits(load_file(tmp_path / "stopped.safetensors"), load_file(tmp_path / "whole.safetensors"))
    result = json.loads((tmp_path / "whole.json").read_text())
    assert json.loads((tmp_path / "stopped.json").read_text())["figures"] == result["figures"]
    assert len(result["epochs"]) == 4
    two = run_dino("eval", "linear", *flags, tmp_path / "two.json", ranks=2)
    assert two.returncode == 0, two.stderr
    assert json.loads((tmp_path / "two.json").read_text())["figures"] == result["figures"]
    for name, value in load_file(tmp_path / "two.safetensors").items():
        torch.testing.assert_close(value, load_file(tmp_path / "whole.safetensors")[name], rtol=1e-4, atol=1e-6)
    assert command(*flags, tmp_path / "whole.json", "--seed", 3) == 2
    assert "another seed" in capsys.readouterr().err


def test_paper_mode_is_the_plain_protocol(trained, tmp_path):
    """Against autograd, torch.optim.SGD and a cosine of PyTorch's on the same crops."""
    run, photos = trained
    options = LinearOptions(
        model=str(run),
        data=str(photos),
        mode="paper",
        epochs=3,
        batch_size=20,
        lr=(0.5,),
        json=str(tmp_path / "r.json"),
    )
    model = dino.load(run)
    found = linear.evaluate(model, options, CPU)
    train_on = linear.open_labeled_pair(str(photos), None)[0]
    batches = LabeledBatches(train_on, linear.build_crops(32), 32, 20, 0)
    layer = nn.Linear(4 * model.embed_dim, 3)
    layer.load_state_dict(Sweep({"last4": (0, 128)}, [1.0], [0.0], 3, 0, CPU).head("last4", 0))
    optimizer = torch.optim.SGD(layer.parameters(), 0.5 * 20 / 256, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3, eta_min=0)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for epoch in range(3):
        for step in range(3):
            batch = batches[3 * epoch + step]
            features = POOLINGS["last4"](model, (batch.images / 255 - mean) / std)
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(features), batch.labels).backward()
            optimizer.step()
        schedule.step()
    head = load_file(tmp_path / "r.safetensors")
    torch.testing.assert_close(head["weight"], layer.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head["bias"], layer.bias.detach(), rtol=1e-4, atol=1e-6)
    assert 0 <= found.figures["linear_top1"] <= 100


def test_original_protocol_reports_the_best_epoch_on_the_test_images(trained, tmp_path):
    run, photos = trained
    flags = ("--data", photos, "--mode", "paper", "--epochs", 6, "--batch-size", 16, "--lr", 0.01, 1)
    assert command(run, *flags, "--protocol", "original", "--json", tmp_path / "r.json") == 0
    result = json.loads((tmp_path / "r.json").read_text())
    history = torch.tensor(result["epochs"])
    assert history.shape == (6, 2)
    assert result["figures"]["linear_top1"] == pytest.approx(history.max().item())
    assert result["figures"]["linear_last_epoch_top1"] in history[-1].tolist()
    assert result["images"]["training images"] == 54  # none are held out to choose
    assert command(run, *flags, "--json", tmp_path / "d.json") == 0
    assert json.loads((tmp_path / "d.json").read_text())["images"]["training images"] == 48


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"protocol": "original"}, "add --mode paper"),
        ({"lr": (0.0,)}, "must be above 0"),
        ({"held_out": 1.0}, "between 0 and 1"),
        ({"mode": "paper", "pooling": ("cls", "last4")}, "give one"),
        ({"epochs": 0}, "at least 1"),
    ],
)
def test_impossible_options_are_one_sentence(options, answer):
    with pytest.raises(ValueError, match=answer):
        LinearOptions(model="m", data="d", **options)


def folder_of(root, *names, images=12):
    for name in names:
        (root / name).mkdir(parents=True)
    for i, image in enumerate(sorted(draw_images(root.parent / "drawn", images).rglob("*.jpg"))):
        image.rename(root / names[i % len(names)] / image.name)
    return root


@pytest.mark.parametrize(
    ("names", "images", "answer"),
    [
        (["."], 12, "write CLASS/image.jpg there"),
        (["cat"], 12, "one class only, 'cat'"),
        (["cat", "dog"], 4, "too few images to set some aside"),
        (["train/cat", "train/dog", "val/cat", "val/fox"], 12, "differ in their classes, for example 'dog'"),
        (["train/cat", "train/dog", "val/cat"], 12, "differ in their classes, for example 'dog'"),
        (["train/cat", "train/dog", "val"], 12, "write CLASS/image.jpg there"),
    ],
)
def test_folders_that_are_not_as_they_should_be(trained, tmp_path, capsys, names, images, answer):
    assert command(trained[0], "--data", folder_of(tmp_path / "data", *names, images=images)) == 2
    said = capsys.readouterr().err
    assert answer in said
    assert said.count("dino: ") == 1
    assert said.count("\n") <= 2  # and which folders were understood


def test_an_empty_split(trained, tmp_path, capsys):
    data = folder_of(tmp_path / "data", "train/cat", "train/dog")
    (data / "val" / "cat").mkdir(parents=True)
    assert command(trained[0], "--data", data) == 2
    assert "holds no files; give a folder of images" in capsys.readouterr().err


def test_what_cannot_be_read_or_has_no_class_is_said(trained, tmp_path, capsys):
    data = folder_of(tmp_path / "data", ".", "cat", "dog", images=60)
    images = sorted(data.glob("*/*.jpg"))
    for image in images[::2]:
        image.write_bytes(b"")
    paper = ("--mode", "paper", "--epochs", 4, "--pooling", "cls", "--json", tmp_path / "r.json")
    for flags in ((), paper):
        assert command(trained[0], "--data", data, "--epochs", 1, *flags) == 0
        said = capsys.readouterr()
        assert "20 images of " in said.err
        assert "training images could not be read, first: " in said.out
    for image in images:
        image.write_bytes(b"")
    for flags in ((), (*paper[:-1], tmp_path / "s.json")):
        assert command(trained[0], "--data", data, "--epochs", 1, *flags) == 2
        assert "can be read; check the data folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (("--held-out", "0.001"), "raise it"),
        (("--data", "torchvision:MNIST:/x"), "CIFAR10"),
        (("--data", "torchvision:CIFAR10:/x"), "nothing is downloaded"),
    ],
)
def test_bad_input_is_one_sentence(trained, capsys, flags, answer):
    run, photos = trained
    assert command(run, *(() if "--data" in flags else ("--data", photos)), *flags) == 2
    assert answer in capsys.readouterr().err


def test_a_shallow_model_has_no_four_layers(tmp_path, photos, capsys):
    run = dino.train(replace(TrainOptions(), TINY | {"epochs": 1}), data=str(photos), out=str(tmp_path / "run"))
    assert command(run, "--data", photos, "--epochs", 1, "--pooling", "last4") == 2
    assert "needs four layers" in capsys.readouterr().err
