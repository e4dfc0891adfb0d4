"""A step in parts and with recomputed activations has the same gradients; `--fit` keeps to what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dino import distributed
from dino.engine import fit
from dino.engine.log import read_metrics
from dino.engine.step import Split, slice_views
from dino.engine.train import Trainer
from dino.models import Recompute
from dino.options.rules import parse_bytes
from dino.options.train import TrainOptions
from helpers import draw_images, run_dino, tiny_flags
from training import VARIANTS, build_trainer


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


def views(subject: Trainer) -> list[torch.Tensor]:
    o, torch_seed = subject.options.views, 3
    torch.manual_seed(torch_seed)
    dtype = next(subject.method.parameters()).dtype
    return [torch.randn(v * 6, 3, s, s, dtype=dtype) for v, s in ((2, o.global_size), (o.num_local, o.local_size)) if v]


def state_and_gradients(subject: Trainer, split: Split) -> tuple[float, dict[str, torch.Tensor]]:
    subject.training_step.set_split(split)
    subject.training_step.optimizer.zero_grad()
    loss, metrics = subject.training_step.compute_gradients(views(subject), 0.05, subject.draw_noise(0))
    found = {f"grad {n}": p.grad for n, p in subject.method.student.named_parameters() if p.grad is not None}
    return loss.item(), found | {f"after {n}": b.clone() for n, b in subject.method.named_buffers()} | metrics


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "split",
    [Split(2), Split(4, "elementwise"), Split(6, "blocks"), Split(1, "elementwise"), Split(1, "blocks")],
    ids=str,
)
def test_gradients_are_those_of_the_whole_step(name, split, images, tmp_path):
    """In float64 to rounding: loss, every gradient, and the center or queue moved once."""
    results = []
    for way in (Split(), split):
        subject = build_trainer(images, tmp_path, **VARIANTS[name])
        subject.method.double()
        results.append(state_and_gradients(subject, way))
    (loss, whole), (split_loss, parts) = results
    assert split_loss == pytest.approx(loss, rel=1e-12)
    assert whole.keys() == parts.keys()
    assert any(key.startswith("grad") for key in whole)
    for key in whole:
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-9, atol=1e-12, msg=key)


def test_views_of_one_size_are_still_global_and_local(images, tmp_path):
    """The teacher sees the 2 global views alone: the loss is Eq. 3 over its pairs with the other views."""
    subject = build_trainer(
        images, tmp_path, views__global_size=32, views__local_size=32, views__num_local=3, model__drop_path=0.0
    )
    groups = subject.render_views(subject.batches[0])
    assert [tuple(group.shape) for group in groups] == [(2 * 6, 3, 32, 32), (3 * 6, 3, 32, 32)]

    with torch.no_grad():
        targets = (subject.method.teacher(groups[:1]) / 0.05).softmax(-1).chunk(2)  # the center is still zero
        scores = (torch.cat([subject.method.student([group]) for group in groups]) / 0.1).log_softmax(-1).chunk(5)
    pairs = [-(t * s).sum(-1).mean() for i, t in enumerate(targets) for j, s in enumerate(scores) if i != j]
    loss, _ = subject.training_step.compute_gradients(groups, 0.05)
    torch.testing.assert_close(loss, torch.stack(pairs).mean())


def test_recomputed_blocks_drop_the_same_samples(images, tmp_path):
    """Stochastic depth draws once: the backward pass repeats what the forward pass dropped."""
    found = []
    for recompute in ("nothing", "elementwise", "blocks"):
        subject = build_trainer(images, tmp_path, model__drop_path=0.5, model__depth=4)
        subject.training_step.set_split(Split(1, recompute))
        groups = views(subject)
        torch.manual_seed(0)
        subject.training_step.compute_gradients(groups, 0.05)
        found.append([p.grad for p in subject.method.student.parameters() if p.grad is not None])
    for a, b, c in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_recomputed_activations_have_the_same_gradients_under_autocast(images, tmp_path):
    """Autocast casts each weight once for all views, and the backward pass casts it again."""
    found = []
    for recompute in ("nothing", "elementwise", "blocks"):
        subject = build_trainer(images, tmp_path, precision="bf16", model__depth=2)
        found.append(state_and_gradients(subject, Split(1, recompute)))
    for loss, tensors in found[1:]:
        assert loss == found[0][0]
        for key, value in tensors.items():
            torch.testing.assert_close(value, found[0][1][key], rtol=1e-2, atol=1e-4, msg=key)


FIXED = ("model.patch_size", "model.width", "model.depth", "model.num_heads")


def test_a_timm_backbone_recomputes_too(images, tmp_path):
    results = []
    for recompute in ("nothing", "blocks"):
        changes: dict[str, Any] = {"model.arch": "timm:vit_tiny_patch16_224", "views.local_size": 16}
        subject = build_trainer(images, tmp_path, **changes, **dict.fromkeys(FIXED))
        results.append(state_and_gradients(subject, Split(1, recompute)))
    (loss, whole), (again, parts) = results
    assert again == pytest.approx(loss, rel=1e-5)
    for key in (key for key in whole if key.startswith("grad")):
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-3, atol=1e-5, msg=key)


def test_what_timm_cannot_recompute_is_refused(images, tmp_path):
    changes: dict[str, Any] = {
        "model.arch": "timm:vit_tiny_patch16_224",
        "views.local_size": 16,
        "recompute": "elementwise",
    }
    with pytest.raises(
        ValueError, match="which timm:vit_tiny_patch16_224 does not offer; use --recompute nothing or blocks"
    ):
        build_trainer(images, tmp_path, **changes, **dict.fromkeys(FIXED))


def test_elementwise_repeats_no_matrix_product(images, tmp_path):
    subject, flops = build_trainer(images, tmp_path, model__depth=4), {}
    for recompute in subject.method.student.backbone.recomputable:
        with FlopCounterMode(display=False) as counter:
            state_and_gradients(subject, Split(1, recompute))
        flops[recompute] = counter.get_total_flops()
    assert flops["nothing"] == flops["elementwise"] < flops["blocks"]


def test_batch_norm_keeps_a_step_whole(images, tmp_path):
    with pytest.raises(ValueError, match="accumulate is 2, but this model has BatchNorm"):
        build_trainer(images, tmp_path, accumulate=2, head__batch_norm=True)


@given(st.integers(1, 200), st.integers(1, 200))
def test_parts_cover_every_image_once_and_evenly(images, parts):
    found = distributed.split(images, parts)
    assert [i for part in found for i in range(images)[part]] == list(range(images))
    sizes = [part.stop - part.start for part in found]
    assert len(found) == min(images, parts)
    assert max(sizes) - min(sizes) <= 1


def test_views_of_a_part_stay_view_major():
    group = torch.arange(2 * 5).float()[:, None, None, None].expand(10, 3, 2, 2)  # view v of image i is 5 v + i
    (part,) = slice_views([group], slice(1, 3), 5)
    assert part[:, 0, 0, 0].tolist() == [1, 2, 6, 7]


@pytest.mark.parametrize(("text", "size"), [("8GB", 8e9), ("1.5 gb", 1.5e9), ("500MB", 5e8), ("2GiB", 2**31)])
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["8", "GB", "-1GB", "0GB", "much"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match=f"fit is {text}; write an amount of memory such as 8GB"):
        TrainOptions(fit=text)


def test_peak_counts_what_is_alive_at_once():
    kilo = lambda: torch.zeros(256)  # noqa: E731

    def work() -> None:
        a = kilo()
        for _ in range(5):
            b = kilo() + a  # two new ones, and `a` and the last `b` beside them
        a.add_(b)
        b.view(16, 16)

    assert fit.measure_peak(work) == 4 * 1024


def test_peak_sees_what_recomputing_saves(images, tmp_path):
    subject = build_trainer(images, tmp_path, model__depth=12)
    found = [
        fit.measure_peak(lambda s=split: state_and_gradients(subject, s))
        for split in (Split(), Split(1, "elementwise"), Split(1, "blocks"))
    ]
    assert found[1] < 0.8 * found[0]
    assert found[2] < 0.6 * found[0]


def test_the_fastest_way_that_fits_is_chosen():
    lines: dict[Recompute, tuple[float, float]] = {
        "nothing": (0.0, 100.0),
        "elementwise": (0.0, 80.0),
        "blocks": (0.0, 20.0),
    }
    ways = [
        fit.choose_split(limit, 16, 50.0, lines, parts_allowed=True)[0] for limit in (2000, 1500, 1000, 410, 150, 80)
    ]
    assert ways == [
        *(Split(), Split(1, "elementwise"), Split(2)),
        *(Split(1, "blocks"), Split(4, "blocks"), Split(16, "blocks")),
    ]
    assert fit.choose_split(500, 16, 50.0, lines, parts_allowed=False)[0] == Split(1, "blocks")
    for limit in (2000, 1000, 410, 150, 80):
        assert fit.choose_split(limit, 16, 50.0, lines, parts_allowed=True)[1] <= limit
    with pytest.raises(ValueError, match="even in the smallest parts a step needs about"):
        fit.choose_split(60, 16, 50.0, lines, parts_allowed=True)


def test_fit_leaves_the_run_as_it_was(images, tmp_path):
    """The trial moves neither center nor weights, and what it chooses is less than the whole step."""
    subject = build_trainer(images, tmp_path, model__depth=8)
    before = {k: v.clone() for k, v in subject.method.state_dict().items()}
    _, whole = fit.fit_memory(subject.training_step, subject.options, 6, 10**12)
    assert subject.training_step.split == Split()
    for key, value in subject.method.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, msg=key)
    assert all(p.grad is None for p in subject.method.student.parameters())
    assert whole > sum(p.numel() * 4 for p in subject.method.parameters())


def test_parts_on_two_ranks_equal_the_whole_on_one(photos, tmp_path):
    flags = tiny_flags(epochs=2, log__every=1, model__drop_path=0.2)
    for name, ranks, more in (("whole", 1, []), ("parts", 2, ["--accumulate", 2, "--recompute", "elementwise"])):
        done = run_dino("train", "--data", photos, "--out", tmp_path / name, *flags, *more, ranks=ranks)
        assert done.returncode == 0, done.stderr
    a, b = ([x for x in read_metrics(tmp_path / n / "metrics.jsonl") if "loss" in x] for n in ("whole", "parts"))
    assert len(a) == len(b) >= 10
    for x, y in zip(a, b, strict=True):
        for key in ("loss", "grad_norm", "teacher_entropy", "center_norm"):
            assert y[key] == pytest.approx(x[key], rel=1e-4), key


def test_fit_from_the_command_line(photos, tmp_path):
    flags = ["--data", photos, "--out", tmp_path / "run", *tiny_flags(epochs=1)]
    for size, said in (("lots", "fit is lots"), ("10MB", "more than --fit allows")):
        done = run_dino("train", *flags, "--fit", size)
        assert done.returncode == 2
        assert said in done.stderr
        assert not (tmp_path / "run").exists()
    done = run_dino("train", *flags, "--fit", "50GB")
    assert done.returncode == 0
    assert "Fits: each step in one part, about" in done.stderr
