"""A student of a frozen teacher: targets, gradients, resuming, ranks, and that it learns what the teacher sees."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dino
from dino import weights
from dino.distillation import Distillation, TokenNetwork, renormalize
from dino.engine.log import read_metrics
from dino.models import Head
from dino.models.preprocessing import IMAGENET, Preprocessing
from helpers import TINY, as_flags, assert_same_bits, draw_images, final_state, run_dino, save_small_timm

OPEN = ("views.num_local", "head.out_dim", "head.bottleneck_dim", "head.prototypes", "method.loss", "method.targets")
STUDENT = {"epochs": 2, "batch_size": 8} | dict.fromkeys(OPEN)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("photos"), 24)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A ViT of another patch size, width and normalization than its students have."""
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 2, "img_size": 42}
    return save_small_timm(tmp_path_factory.mktemp("big") / "net", mean=0.5, **sizes)


def distill(big, photos, out, **changes):
    named = {name.replace("__", "."): value for name, value in changes.items()}
    options = TINY | STUDENT | {"method.teacher": f"frozen:{big}", "log.knn_every": 1} | named
    dino.train(data=photos, out=out, **{k: v for k, v in options.items() if k not in ("data.path", "out")})
    return out


def build(big, arch="vit_nano", **sizes):
    frozen = weights.load(big)
    networks = []
    for _ in range(2):
        torch.manual_seed(1)
        backbone = dino.create(arch, image_size=32, **sizes)
        networks.append(
            TokenNetwork(backbone, Head(backbone.embed_dim, 1, 32, frozen.embed_dim, num_layers=2, prototypes=False))
        )
    return Distillation(*networks, frozen)


def test_targets_are_the_teachers_tokens_on_the_students_grid(big):
    method, views = build(big, patch_size=8), torch.randn(6, 3, 32, 32)
    frozen = weights.load(big)
    seen = F.interpolate(renormalize(views, IMAGENET, frozen.preprocessing), (28, 28), mode="bicubic", antialias=True)
    expected = frozen.tokens(seen)[-1]
    first, _ = method.teacher_targets(views, 0.04)
    assert first.shape == (2, 3, 1 + 16, 48)
    torch.testing.assert_close(first.flatten(0, 1)[:, 0], expected[:, 0])  # the center starts at zero
    cells = expected[:, 1:].unflatten(1, (2, 2)).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    torch.testing.assert_close(first.flatten(0, 1)[:, 1:], cells)
    second, metrics = method.teacher_targets(views, 0.04, parts=3)
    torch.testing.assert_close(first[:, :, 0] - second[:, :, 0], (0.1 * expected[:, 0].mean(0)).expand(2, 3, -1))
    assert metrics["target_spread"] > 0


def test_the_loss_is_zero_where_the_student_agrees_and_moves_the_student_only(big):
    method, views = build(big, patch_size=8), torch.randn(4, 3, 32, 32)
    targets, _ = method.teacher_targets(views, 0.04)
    assert method.student_loss(3 * targets.flatten(0, 1), targets).item() == pytest.approx(0, abs=1e-6)
    assert method.student_loss(-targets.flatten(0, 1), targets).item() == pytest.approx(2, abs=1e-6)
    method.student_loss(method.student([views]), targets).backward()
    assert all(p.grad is not None for name, p in method.student.named_parameters() if "predictor" not in name)
    assert not any(p.requires_grad for p in method._frozen[0].parameters())
    assert not any("_frozen" in name for name in method.state_dict())
    assert next(method.double()._frozen[0].parameters()).dtype == torch.float64


def test_the_average_has_the_statistics_of_the_student(big):
    """Nothing else would give it any: only the frozen network and the student see the images."""
    method, views = build(big, "resnet_nano"), 3 + torch.randn(16, 3, 32, 32)
    for _ in range(60):  # the statistics of the student come near those of the images, too
        method.student([views])
        method.update_teacher(0.5)
    trained, average = method.student.backbone.eval(), method.teacher.backbone.eval()
    torch.testing.assert_close(average(views), trained(views), atol=0.02, rtol=0.02)
    counts = [value for name, value in method.teacher.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert set(map(int, counts)) == {60}


def test_views_are_normalized_as_each_network_wants():
    other = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    pixels = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET.mean, IMAGENET.std))
    found = renormalize((pixels - mean) / std, IMAGENET, other)
    torch.testing.assert_close(
        found * torch.tensor(other.std)[:, None, None] + torch.tensor(other.mean)[:, None, None], pixels
    )


@pytest.mark.parametrize("arch", ["vit_nano", "resnet_nano", "timm:convnext_atto"])
def test_any_student_of_any_teacher(arch, big, photos, tmp_path):
    own = (
        {}
        if arch == "vit_nano"
        else dict.fromkeys(("model__patch_size", "model__width", "model__depth", "model__num_heads"))
    )
    out = distill(big, photos, tmp_path / "run", model__arch=arch, epochs=20, optim__lr=0.02, **own)
    losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert dino.load(out).name.startswith(arch.removeprefix("timm:").split("_")[0]) or arch == "vit_nano"


def test_a_student_resumes_to_the_bit_and_knows_its_teacher(big, photos, tmp_path):
    whole, halves = distill(big, photos, tmp_path / "a"), distill(big, photos, tmp_path / "b", stop_after=3)
    dino.train(resume=halves, stop_after=None)
    assert_same_bits(final_state(whole), final_state(halves))
    again = distill(big, photos, tmp_path / "c", stop_after=3)
    tensors = torch.load(big / "pytorch_model.bin", weights_only=True)
    moved = big.parent / "moved"
    big.rename(moved)
    try:
        done = run_dino("train", "--resume", again)
        assert done.returncode == 2
        assert "there is no run, weight file or release" in done.stderr
        big.mkdir()
        (big / "config.json").write_text((moved / "config.json").read_text())
        torch.save({name: value + 1 for name, value in tensors.items()}, big / "pytorch_model.bin")
        done = run_dino("train", "--resume", again)
        assert done.returncode == 2
        assert "are not those that this run learned from" in done.stderr
    finally:
        for path in big.iterdir() if big.exists() else ():
            path.unlink()
        big.rmdir()
        moved.rename(big)


def test_two_ranks_equal_one(big, photos, tmp_path):
    options = TINY | STUDENT | {"method.teacher": f"frozen:{big}", "head.batch_norm": False}
    flags = as_flags({name: value for name, value in options.items() if value is not None})
    for ranks in (1, 2):
        done = run_dino("train", "--data", photos, "--out", tmp_path / f"r{ranks}", *flags, ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (final_state(tmp_path / f"r{ranks}") for ranks in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method__loss": "infonce"}, "method.loss is infonce, but a student of a frozen teacher has its own"),
        ({"views__num_local": 2}, "views.num_local is 2, but"),
        ({"head__bottleneck_dim": 8}, "as wide as the features of a frozen teacher"),
        ({"method__teacher": "frozen:"}, "choose momentum, previous-epoch"),
        ({"method__teacher": "momentum", "method__loss": "cosine"}, "which is for a frozen teacher"),
        ({"method__teacher": "frozen:nowhere"}, "there is no run, weight file or release 'nowhere'"),
    ],
)
def test_misuse_is_said(changes, words, big, photos, tmp_path):
    with pytest.raises(ValueError, match=words):
        distill(big, photos, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
