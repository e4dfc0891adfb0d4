"""Fine-tuning: groups and schedules against closed forms, exact resume, ranks, torchvision's folders, the command."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data.mixup import Mixup
from timm.scheduler.cosine_lr import CosineLRScheduler

import dino
import processes
from dino import cli, paper
from dino.data.torchvision_sets import TorchvisionSet, open_torchvision
from dino.eval import finetune
from dino.eval.finetune import FINETUNE_RECIPES, Classifier, FinetuneRecipe, Finetuning
from dino.eval.supervised import LabeledBatch
from dino.models import create
from dino.models.preprocessing import IMAGENET
from dino.options import replace
from dino.options.evaluate import FinetuneOptions
from dino.options.train import TrainOptions
from helpers import TINY, assert_same_bits, dino_command, draw_images, run_dino

CPU = torch.device("cpu")
FLAGS = ("--epochs", 4, "--batch-size", 32, "--lr", 0.01, "--checkpoint-minutes", 0)


def command(*arguments: object) -> int:
    """The command line in this process, which has loaded PyTorch already."""
    return cli.main([str(argument) for argument in ("eval", "finetune", *arguments)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("finetune")
    photos = draw_images(root / "photos", 80)
    dino.train(replace(TrainOptions(), TINY | {"epochs": 1}), data=str(photos), out=str(root / "run"))
    return root / "run", photos


def classifier(**options) -> Classifier:
    torch.manual_seed(0)
    return Classifier(create("vit_nano", 8, 16, width=24, depth=2, num_heads=2, **options), 3, 1.0, seed=0)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_groups():
    model = classifier()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = finetune.group_by_layer(model, 0.05, 0.5)
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    assert found["head.weight"] == (1, 0.05)
    assert found["head.bias"] == (1, 0)
    assert found["backbone.norm.weight"] == (1, 0)
    assert found["backbone.blocks.1.attn.qkv.weight"] == (0.5, 0.05)
    assert found["backbone.blocks.0.norm1.bias"] == (0.25, 0)
    assert found["backbone.patch_embed.proj.weight"] == (0.125, 0.05)
    assert found["backbone.pos_embed"] == found["backbone.cls_token"] == (0.125, 0)
    assert {group["lr_scale"] for group in finetune.group_by_layer(model, 0.05, 1.0)} == {1}
    convnet = Classifier(create("timm:resnet18", image_size=32), 3, 1.0, 0)
    scales = {group["lr_scale"] for group in finetune.group_by_layer(convnet, 0.05, 0.5)}
    assert scales == {0.5**i for i in range(10)}  # the classifier, eight blocks and the stem


def test_rates_are_those_of_deits_schedule():
    recipe = FinetuneRecipe(30, 5e-4, batch_size=1024, min_lr=1e-5)
    peak = 1e-3
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], peak)
    theirs = CosineLRScheduler(optimizer, 30, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    for epoch in range(30):
        theirs.step(epoch)
        assert finetune.compute_rate(epoch, recipe, 30) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


def test_small_sets_have_the_published_rate():
    assert FINETUNE_RECIPES["cifar10"].lr * FINETUNE_RECIPES["cifar10"].batch_size / 512 == pytest.approx(7.5e-6)
    rates = [finetune.compute_rate(epoch, FINETUNE_RECIPES["cifar10"], 1000) for epoch in range(1000)]
    assert max(rates[6:]) < 7.5e-6  # with DeiT's own least rate of 1e-5 it would rise to that
    assert rates[-1] == pytest.approx(1e-6, rel=1e-3)


def test_one_step_is_the_plain_one():
    """No mixing: label smoothing, AdamW and the two kinds of parameters as written out."""
    recipe = FinetuneRecipe(10, 1e-3, batch_size=8, warmup_epochs=0, mixup=0.0, cutmix=0.0, smoothing=0.1)
    ours, plain = classifier(), classifier()
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 3
    loss = Finetuning(ours, recipe, 5, 0, CPU, "fp32").step(0, LabeledBatch(images, labels, 8, []))
    plain.train()
    log_p = plain(images).log_softmax(dim=1)
    target = torch.nn.functional.one_hot(labels, 3) * 0.9 + 0.1 / 3
    expected = -(target * log_p).sum(dim=1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    rate = 1e-3 * 8 / 512
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        still = p.ndim == 1 or name.endswith(("pos_embed", "cls_token", "bias"))
        decayed = p.detach() * (1 if still else 1 - rate * 0.05)
        step = p.grad / (p.grad.abs() + 1e-8)  # AdamW's first step: both moments are the gradient's
        torch.testing.assert_close(q.detach(), decayed - rate * step, rtol=1e-5, atol=2e-7)


def test_mixing_is_one_draw_for_the_batch_and_does_not_look_at_ranks():
    recipe = FinetuneRecipe(10, 1e-3)
    tuning = Finetuning(classifier(), recipe, 5, 0, CPU, "fp32")
    images, labels = torch.randn(40, 3, 16, 16), torch.randint(0, 3, (40,))
    kinds = set()
    for step in range(12):
        whole, targets = tuning._mix(LabeledBatch(images, labels, 40, []), step)
        parts = [
            tuning._mix(LabeledBatch(images[rows], labels[rows], 40, []), step)
            for rows in (slice(0, 32), slice(32, 40))
        ]
        assert torch.equal(whole, torch.cat([part[0] for part in parts]))
        assert torch.equal(targets, torch.cat([part[1] for part in parts]))
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(40))
        # lambda is what the target says of an image whose neighbor has another label, the same for all
        partners = torch.cat([group.roll(1) for group in labels.split(16)])
        differ = labels != partners
        shares = targets[differ, labels[differ]]
        torch.testing.assert_close(shares, shares[:1].expand_as(shares))
        kinds.add(bool((whole == images).flatten(1).any(dim=1).all()))
    assert kinds == {True, False}  # CutMix leaves most pixels as they were, MixUp none


def test_targets_are_timms():
    """Label smoothing of mixed targets is timm's: 1 - s + s / c and s / c, mixed."""
    lam, smoothing, labels = 0.3, 0.1, torch.tensor([0, 2])
    mixed = torch.nn.functional.one_hot(labels, 3) * lam + torch.nn.functional.one_hot(labels.flip(0), 3) * (1 - lam)
    theirs = Mixup(mixup_alpha=1.0, label_smoothing=smoothing, num_classes=3)
    theirs._params_per_batch = lambda: (lam, False)
    _, target = theirs(torch.zeros(2, 3, 4, 4), labels)
    scores = torch.randn(2, 3)
    ours = torch.nn.functional.cross_entropy(scores, mixed, label_smoothing=smoothing)
    assert ours.item() == pytest.approx(-(target * scores.log_softmax(1)).sum(1).mean().item(), rel=1e-6)


def test_stochastic_depth_is_that_of_training():
    model = create("vit_nano", 8, 16, depth=4)
    assert model.set_drop_path(0.3)
    built = create("vit_nano", 8, 16, depth=4, drop_path=0.3)
    assert [b.drop_path.rate for b in model.blocks] == [b.drop_path.rate for b in built.blocks]


def test_the_strongest_augmentation_still_shows_something():
    image = Image.fromarray(np.full((20, 20, 3), 200, np.uint8))
    (policy,) = (
        part
        for part in finetune.build_augmentation(16, FINETUNE_RECIPES["imagenet"], IMAGENET).transforms
        if hasattr(part, "ops")
    )
    assert {op.magnitude for op in policy.ops} == {9}
    for op in policy.ops:
        op.prob, op.magnitude = 1.0, 12
        assert np.asarray(op(image)).any(), op.name


def test_recipes_and_what_replaces_them():
    for name in FINETUNE_RECIPES:
        assert finetune.resolve_recipe(FinetuneOptions(model="m", data="d", recipe=name)) == FINETUNE_RECIPES[name]
    assert set(paper.FIGURES["finetune"]["vit_small/16"]) == {f"{name}_top1" for name in FINETUNE_RECIPES}
    changed = finetune.resolve_recipe(FinetuneOptions(model="m", data="d", epochs=4, layer_decay=0.7))
    assert (changed.epochs, changed.warmup_epochs, changed.layer_decay) == (4, 2, 0.7)
    for wrong, answer in (({"lr": 0.0}, "above 0"), ({"erasing": 1.0}, r"\[0, 1\)"), ({"mixup": -1.0}, "give 0, or")):
        with pytest.raises(ValueError, match=answer):
            FinetuneOptions(model="m", data="d", **wrong)


# --- the command -----------------------------------------------------------------------------------------------------


def test_resumes_to_the_bit_after_a_kill(trained, tmp_path, capsys):
    run, photos = trained
    torch.set_num_threads(1)  # as in the process below
    flags = (run, "--data", photos, *FLAGS, "--json")  # with everything random switched on
    assert command(*flags, tmp_path / "whole.json") == 0
    assert "epoch 4/4" in capsys.readouterr().err
    process = dino_command("eval", "finetune", *flags, tmp_path / "killed.json")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with processes.start(process, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) as killed:
        assert any("epoch 1/" in line for line in killed.stderr)
        killed.send_signal(signal.SIGKILL)
    assert command(*flags, tmp_path / "killed.json") == 0
    assert "Resuming after step" in capsys.readouterr().err
    assert_same_bits(load_file(tmp_path / "killed.safetensors"), load_file(tmp_path / "whole.safetensors"))
    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "killed")]
    assert results[0]["figures"] == results[1]["figures"]
    assert results[0]["recipe"]["epochs"] == 4
    assert results[0]["model"]["sha256"] == results[1]["model"]["sha256"]  # of the model before, not the tuned copy
    assert command(*flags, tmp_path / "whole.json", "--layer-decay", 0.7) == 2
    assert "another layer_decay" in capsys.readouterr().err


def test_two_ranks_equal_one_and_it_learns(trained, tmp_path):
    run, photos = trained
    flags = ("--epochs", 8, "--batch-size", 24, "--lr", 0.06, "--drop-path", 0, "--erasing", 0, "--rand-augment", "")
    flags += ("--repeats", 1, "--head-scale", 1)
    results, weights = [], []
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.json"
        if ranks == 1:
            assert command(run, "--data", photos, *flags, "--json", file) == 0
        else:
            done = run_dino("eval", "finetune", run, "--data", photos, *flags, "--json", file, ranks=ranks)
            assert done.returncode == 0, done.stderr
        results.append(json.loads(file.read_text()))
        weights.append(load_file(tmp_path / f"{ranks}.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)
    assert results[0]["figures"] == results[1]["figures"]
    assert results[0]["figures"]["imagenet_top1"] > 80
    before = dino.load(run).state_dict()
    assert all(name.removeprefix("backbone.") in before for name in weights[0] if name.startswith("backbone."))
    assert not torch.equal(before["pos_embed"], weights[0]["backbone.pos_embed"])


def test_a_folder_of_torchvisions(trained, tmp_path):
    run, photos = trained
    root = tmp_path / "sets" / "stanford_cars"
    images = sorted(photos.rglob("*.jpg"))
    kind = [("fname", object), ("class", object)]
    for part, chosen in (("train", images[::2]), ("test", images[1::2])):
        (root / f"cars_{part}").mkdir(parents=True)
        for i, image in enumerate(chosen):
            (root / f"cars_{part}" / f"{i}.jpg").write_bytes(image.read_bytes())
        rows = [(f"{i}.jpg", 1 + int(image.parent.name[-1])) for i, image in enumerate(chosen)]
        (root / "devkit").mkdir(exist_ok=True)
        file = root / ("devkit/cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat")
        scipy.io.savemat(file, {"annotations": np.array(rows, dtype=kind)})
    names = np.array(["Fiat", "Opel", "Seat"], dtype=object)
    scipy.io.savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    spec = f"torchvision:StanfordCars:{tmp_path / 'sets'}"
    train, test = open_torchvision(spec)
    assert (len(train), len(test)) == (40, 40)
    assert train.classes == ("Fiat", "Opel", "Seat")
    assert train.labels.tolist() == [int(image.parent.name[-1]) for image in images[::2]]
    assert train.fingerprint != test.fingerprint
    np.testing.assert_array_equal(train.read(3), dino.data.decode.decode(images[6]))
    both = TorchvisionSet(
        "both", str(tmp_path), [*train.images.datasets, *test.images.datasets], "_samples"
    )  # as Flowers' train and val
    assert both.labels.tolist() == [*train.labels, *test.labels]
    np.testing.assert_array_equal(both.read(39), train.read(39))
    np.testing.assert_array_equal(both.read(41), test.read(1))
    flags = ("--recipe", "cars", "--epochs", 1, "--batch-size", 32, "--json", tmp_path / "r.json")
    assert command(run, "--data", spec, *flags) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["images"] == {"training images": 40, "test images": 40}
    assert "cars_top1" in result["figures"]
    assert math.isfinite(result["figures"]["cars_class_mean"])


def test_a_model_without_a_run_directory_needs_a_place(tmp_path):
    with pytest.raises(ValueError, match="give --json"):
        finetune.evaluate(create("vit_nano", 8, 16), FinetuneOptions(model="vit", data=str(tmp_path)), CPU)
    gray = create("vit_nano", 8, 16, in_channels=1)
    with pytest.raises(ValueError, match="1 channel"):
        finetune.evaluate(gray, FinetuneOptions(model="vit", data=str(tmp_path)), CPU)
