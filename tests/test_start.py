"""Training that starts from weights: what learns, how fast, and that the better of before and after is kept."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import dino
from dino import weights
from dino.engine import init, optim
from dino.engine.best import BestTeacher
from dino.engine.health import linear_cka
from dino.engine.log import read_metrics
from dino.options import auto, replace
from dino.options.train import TrainOptions
from dino.report.run import Run
from dino.report.verdict import advise_start, judge
from dino.weights.runs import WEIGHTS
from helpers import TINY, assert_same_bits, draw_images, final_state, run_dino, save_small_timm, tiny_flags


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("photos"), 24)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A small trained network without heads, of timm."""
    sizes = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 28}
    return save_small_timm(tmp_path_factory.mktemp("start") / "net", **sizes)


def continue_from(start, photos, out, **changes):
    """Train for a few steps from `start`; its weights before, and of the student after."""
    views = {"views.global_size": 28, "views.local_size": 14, "model.patch_size": None, "model.arch": None}
    sizes = {"model.width": None, "model.depth": None, "model.num_heads": None}
    named = {name.replace("__", "."): value for name, value in changes.items()}
    options = TINY | views | sizes | {"init": str(start), "epochs": 2, "batch_size": 8} | named
    dino.train(data=photos, out=out, **{k: v for k, v in options.items() if k not in ("data.path", "out")})
    before = weights.read(start).backbone()
    return before, {name.removeprefix("student.backbone."): value for name, value in final_state(out).items()}


@pytest.mark.parametrize(
    ("rule", "learns"),
    [
        ("attention-proj", lambda name: ".attn.proj." in name),
        ("norms", lambda name: ".norm" in name and "ls" not in name),
        ("last:1", lambda name: "blocks.2." in name or name.startswith("model.norm.")),
        ("all", lambda name: True),
    ],
)
def test_only_what_was_asked_for_learns(rule, learns, start, photos, tmp_path):
    before, after = continue_from(start, photos, tmp_path / "run", start__train=rule, start__frozen_epochs=0)
    for name, value in before.items():
        assert torch.equal(after[name], value) != learns(name), name


def test_the_backbone_waits_for_its_heads(start, photos, tmp_path):
    before, after = continue_from(start, photos, tmp_path / "run", start__frozen_epochs=2)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    heads = {name: value for name, value in final_state(tmp_path / "run").items() if "student.head.mlp" in name}
    assert all(value.abs().sum() > 0 for name, value in heads.items() if name.endswith("bias"))  # which start at zero


@pytest.mark.parametrize("matrices", [False, True])
def test_rates_fall_from_block_to_block(matrices):
    network = torch.nn.ModuleDict(
        {"backbone": dino.create("vit_nano", image_size=32, patch_size=8), "head": torch.nn.Linear(96, 4)}
    )
    names = {parameter: name for name, parameter in network.named_parameters()}
    groups = optim.group_parameters(network, matrices, layer_decay=0.5)
    scales = {names[p]: group["scale"] for group in groups for p in group["params"]}
    assert scales.keys() == set(names.values())
    expected = {
        "head.weight": 1,
        "backbone.norm.bias": 1,
        "backbone.blocks.3.attn.qkv.weight": 0.5,
        "backbone.blocks.0.attn.qkv.bias": 0.5**4,
        "backbone.pos_embed": 0.5**5,
    }
    assert {name: scales[name] for name in expected} == expected
    for optimizer in (torch.optim.AdamW(groups), torch.optim.SGD(groups, lr=1.0)):
        optim.set_rates(optimizer, 0.25, 0.1)
        for group in optimizer.param_groups:
            assert group["lr"] == 0.25 * group["scale"]
            decays = all(p.ndim > 1 and not names[p].endswith("bias") for p in group["params"])
            assert (group["weight_decay"] > 0) == decays


@pytest.mark.parametrize(
    "name", ["resnet10t", "convnext_atto", "mobilenetv3_small_050", "vit_base_patch16_siglip_224(depth=2)"]
)
def test_layers_are_those_of_timm(name):
    network = torch.nn.ModuleDict(
        {"backbone": dino.create(f"timm:{name}", image_size=64), "head": torch.nn.Linear(2, 2)}
    )
    below = optim.number_layers(network)
    assert below.keys() == {name for name, _ in network.named_parameters()}
    assert below["head.weight"] == 0
    first = next(name for name in below if name.startswith("backbone.model"))
    assert below[first] == max(below.values()) >= 3
    assert all(depth == 0 for name, depth in below.items() if "attn_pool" in name or "conv_head" in name)


def test_a_step_of_muon_is_the_same_in_one_group_or_several(photos, start, tmp_path):
    """With a decay of 1 the groups of before; a checkpoint without their names still loads."""
    network = dino.create("vit_nano", image_size=32, patch_size=8)
    states = []
    for split in (False, True):
        copy = dino.create("vit_nano", image_size=32, patch_size=8)
        copy.load_state_dict(network.state_dict())
        groups = optim.group_parameters(copy, matrices_apart=True)
        if not split:
            groups = [{key: value for key, value in group.items() if key not in ("kind", "scale")} for group in groups]
        optimizer = optim.Muon(groups, 0.1)
        optim.set_rates(optimizer, 0.01, 0.1)
        generator = torch.Generator().manual_seed(0)
        for parameter in copy.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        states.append(copy.state_dict())
    assert_same_bits(*states)


def test_what_starts_from_weights_is_chosen_for_it():
    options = replace(TrainOptions(), {"init": "somewhere", "model.arch": "vit_small"})
    chosen, fresh = (
        auto.resolve(o, 5000, 224, on_gpu=True, cores=2) for o in (options, replace(options, {"init": None}))
    )
    assert (chosen.optim.name, chosen.optim.layer_decay, fresh.optim.layer_decay) == ("adamw", 0.8, 1.0)
    assert chosen.optim.lr < fresh.optim.lr
    assert chosen.start.frozen_epochs == pytest.approx(0.05 * chosen.epochs)
    assert chosen.method.loss == "cross-entropy"


@pytest.mark.parametrize("images", [5000, 50_000])
def test_a_head_without_prototypes_is_continued_by_the_loss_that_it_is_for(images):
    """As the automatic choice trains few images: an architecture that is not the one for this device, too."""
    options = replace(TrainOptions(), {"init": "somewhere", "model.arch": "timm:resnet18", "head.prototypes": False})
    chosen = auto.resolve(options, images, 32, on_gpu=False, cores=0)
    assert (chosen.method.loss, chosen.method.targets) == ("infonce", "none")
    on_gpu = auto.resolve(options, images, 32, on_gpu=True, cores=0)
    assert (on_gpu.method.loss, on_gpu.optim.name) == ("infonce", "muon" if images < 20_000 else "adamw")


def test_the_start_is_kept_where_training_hurts(start, tmp_path, capsys):
    """Views that change every hue teach a network to ignore color, which is all that tells these classes apart: the run ends
    early, and the model is bit for bit that of the start."""
    out, photos = tmp_path / "run", tmp_path / "colors"  # which a fresh network tells apart
    for i in range(120):
        rng = np.random.default_rng(i)
        pixels = rng.integers(0, 100, (40, 40, 3), dtype=np.uint8) + rng.integers(0, 100, dtype=np.uint8)
        pixels[..., i % 3] += 40
        (photos / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(photos / f"{i % 3}" / f"{i}.png")
    hurt = {
        "optim__lr": 30.0,
        "optim__warmup_epochs": 0,
        "start__frozen_epochs": 0,
        "method__momentum": 0.9,
        "epochs": 20,
    }
    hues = {"views__hue": 0.5, "views__jitter_prob": 1.0, "views__gray_prob": 0.5}
    continue_from(start, photos, out, **hurt, **hues, log__knn_every=1, data__val_fraction=0.5, report=True)
    said = capsys.readouterr()
    assert "every check found less than the weights that the run started from; they are kept." in said.out + said.err
    assert "Verdict:" in said.out + said.err
    metrics = read_metrics(out / "metrics.jsonl")
    assert max(line["step"] for line in metrics) < 20 * (60 // 8)
    before = weights.read(start).backbone()
    assert_same_bits(before, weights.read(out, only_backbone=True).backbone())
    assert weights.read(out, only_backbone=True).best.step == 0
    run = Run.read(out, 60)
    assert run.kept == 0
    assert judge(run).reason.name in ("collapse", "hurts")
    assert "before" in (out / "report.html").read_text()
    drift = [line["cka_start"] for line in metrics if "cka_start" in line]
    assert drift[0] == pytest.approx(1, abs=1e-3)
    assert drift[-1] < 0.9


def test_worse_for_a_quarter_of_the_run_is_for_long():
    network, best = torch.nn.Linear(1, 1), BestTeacher(starts_trained=True)
    found, few = [], []
    for step, score in enumerate([50.0, 49.0, 51.0, 40.0, 45.0, 48.0, 49.0]):
        best.consider(step, {"knn20_top1": score}, network)
        found.append(best.is_worse_for_long(total=12))
        few.append(best.is_worse_for_long(total=4))
    assert found == [False, False, False, False, False, False, True]
    assert few == [False, False, False, False, False, True, True], "of three checks"
    assert best.found.step == 2
    again = BestTeacher(starts_trained=True)
    again.load_state_dict(best.state_dict())
    assert again.is_worse_for_long(12)


def test_a_run_from_weights_resumes_to_the_bit(start, photos, tmp_path):
    changes = {"start__frozen_epochs": 1, "optim__layer_decay": 0.5, "log__knn_every": 1}
    continue_from(start, photos, tmp_path / "whole", **changes)
    continue_from(start, photos, tmp_path / "halves", **changes, stop_after=3)
    dino.train(resume=tmp_path / "halves", stop_after=None)
    assert_same_bits(final_state(tmp_path / "whole"), final_state(tmp_path / "halves"))
    drift = [
        [line["cka_start"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "cka_start" in line]
        for name in ("whole", "halves")
    ]
    assert drift[0] == drift[1]
    assert len(drift[0]) > 1


def test_views_are_whole_patches_and_positions_are_resized_as_timm_does(start, tmp_path):
    found = weights.read(start)
    for asked, sizes in ((None, (28, 14)), (84, (84, 42)), (224, (224, 98))):
        adopted = init.adopt(replace(TrainOptions(), {"init": str(start), "views.global_size": asked}), found)
        assert (adopted.views.global_size, adopted.views.local_size) == sizes
    large = dataclasses.replace(found, arguments=found.arguments | {"image_size": 518})
    assert init.adopt(TrainOptions(init="x"), large).views.global_size == 224  # DINOv2's own 518 are slow
    other = dino.create(found.arguments["arch"], image_size=56)
    state = other.resize_positions(found.backbone())
    theirs = timm.create_model(f"local-dir:{start}", pretrained=True, img_size=56, num_classes=0)
    assert torch.equal(state["model.pos_embed"], theirs.pos_embed)
    chosen = auto.resolve(adopted, 5000, 300, on_gpu=False, cores=1)
    assert (chosen.views.num_local, chosen.batch_size) == (2, 64)


def test_what_is_saved_has_its_channels_in_order(start, tmp_path):
    """safetensors, and so the Trainer of transformers, refuses others; a step changes nothing of that."""
    from safetensors.torch import load_file, save_file

    model = dino.load(start)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert_same_bits(load_file(tmp_path / "a.safetensors"), dict(model.state_dict()))


def test_cka_knows_rotations_and_scales():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    assert linear_cka(x, torch.randn(50, 6, generator=torch.Generator().manual_seed(2))) < 0.3
    assert linear_cka(x, x[:, :3]) < 1


def test_the_preprocessing_of_the_start_is_that_of_the_run(start, photos, tmp_path):
    config = json.loads((start / "config.json").read_text())
    mean = [0.5, 0.4, 0.3]
    config["pretrained_cfg"] |= {"mean": mean, "crop_pct": 0.9, "interpolation": "bilinear"}
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    (other / "pytorch_model.bin").write_bytes((start / "pytorch_model.bin").read_bytes())
    continue_from(other, photos, tmp_path / "run", stop_after=1)
    for name in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000001.pt"):
        found = dino.load(name).preprocessing
        assert found.mean == tuple(mean)
        assert (found.crop, found.interpolation) == (0.9, "bilinear")
    assert (tmp_path / "run" / WEIGHTS).is_file()


def test_the_command_line_says_what_is_trained_and_what_is_fresh(start, photos, tmp_path):
    flags = [*tiny_flags(), "--data", str(photos), "--out", str(tmp_path / "a")]
    done = run_dino("train", *flags, "--start.train", "norms")
    assert done.returncode == 2
    assert "start.* is of training that starts from weights" in done.stderr
    done = run_dino("train", *flags, "--init", start, "--start.train", "last:0")
    assert done.returncode == 2
    assert "choose all, attention-proj, norms, or last:N" in done.stderr
    few = advise_start(TrainOptions(), 4000)
    assert few == ""  # drawn scenes are no photographs
    advice = advise_start(replace(TrainOptions(), {"data.path": "my photos"}), 4000)
    assert advice.endswith("dino train --init timm:vit_small_patch14_dinov2.lvd142m --data 'my photos'")
