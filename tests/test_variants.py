"""The paper's alternatives against plain float64 versions of their mathematics, and two ranks against one."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import processes
from dino import distributed, variants
from dino.data.loader import ViewBatches
from dino.data.render import CpuRenderer
from dino.data.scenes import Scenes
from dino.engine import sharding
from dino.engine.optim import create_optimizer
from dino.engine.step import Rates, TrainingStep
from dino.method import DINO, Network
from dino.models import Head, VisionTransformer, create
from dino.options import replace
from dino.options.train import OptimOptions, TrainOptions, ViewOptions

VARIANTS = {
    "dino": {},
    "softmax-batch": {"targets": "softmax-batch"},
    "sinkhorn": {"targets": "sinkhorn"},
    "none": {"targets": "none"},
    "mse": {"loss": "mse"},
    "byol": {"loss": "mse", "targets": "none", "predictor": True, "prototypes": False},
    "mocov2": {"loss": "infonce", "targets": "none", "queue_size": 48, "prototypes": False},
    "mocov3": {"loss": "infonce", "targets": "none", "queue_size": 0, "prototypes": False},
    "predictor": {"predictor": True},
    "swav": {"targets": "sinkhorn", "follow": "student"},
    "previous-iteration": {"follow": "previous-iteration"},
    "previous-epoch": {"follow": "previous-epoch"},
}


def double(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(name: str = "dino", dtype: torch.dtype = torch.float64) -> DINO:
    """A small method of variant `name`, the same in every process."""
    changes = dict(VARIANTS[name])
    predictor, prototypes = changes.pop("predictor", False), changes.pop("prototypes", True)
    torch.manual_seed(0)

    def network(predictor: bool) -> Network:
        backbone = VisionTransformer(image_size=16, patch_size=8, dim=24, depth=2, num_heads=2)
        head = Head(24, 32, hidden_dim=24, bottleneck_dim=12, prototypes=prototypes, predictor=predictor)
        return Network(backbone, head)

    method = variants.combine(network(predictor), network(False), **changes, batch_size=8).to(dtype)
    # Fresh linear layers are so small that all outputs are alike; larger ones make every term of a loss matter.
    with torch.no_grad():
        for network_ in (method.student, method.teacher):
            for index, parameter in enumerate(network_.parameters()):
                if parameter.requires_grad or network_ is method.teacher:
                    parameter.add_(0.2 * double(index, *parameter.shape).to(dtype))
    return method


def make_step(method: DINO) -> TrainingStep:
    optimizer = torch.optim.SGD(method.student.parameters(), 0.1)
    return TrainingStep(method, optimizer, torch.device("cpu"), clip_grad=0.0)


def views(step: int, images: int = 8) -> list[torch.Tensor]:
    """Two global and three local views, view-major."""
    return [double(10 * step + 1, 2, images, 3, 16, 16), double(10 * step + 2, 3, images, 3, 8, 8)]


def pairs(v: int, g: int = 2) -> list[tuple[int, int]]:
    return [(q, s) for q in range(g) for s in range(v) if s != q]


# ----------------------------------------------------------------------------------------------------- targets


def paper_sinkhorn(x: torch.Tensor, temp: float, iterations: int) -> torch.Tensor:
    """Appendix D: shares per prototype, then per sample, of exp(x / temp)."""
    x = (x / temp).exp()
    for _ in range(iterations):
        x = x / x.sum(dim=0, keepdim=True)
        x = x / x.sum(dim=1, keepdim=True)
    return x


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(2, 20), st.floats(0.05, 1), st.sampled_from([1, 3]), st.integers(0, 999))
def test_sinkhorn_is_the_papers(samples, k, temp, iterations, seed):
    scores = double(seed, samples, k)
    ours = variants.sinkhorn(scores, temp, iterations).exp()
    torch.testing.assert_close(ours, paper_sinkhorn(scores, temp, iterations), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.sum(dim=1), torch.ones(samples, dtype=torch.float64))


def test_one_iteration_is_softmax_over_the_batch():
    scores = double(0, 6, 5)
    expected = (scores / 0.1).softmax(dim=0)
    expected = expected / expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(variants.sinkhorn(scores, 0.1, 1).exp(), expected)


def test_sinkhorn_uses_prototypes_alike_and_survives_any_temperature():
    probs = variants.sinkhorn(double(1, 400, 8), 0.05, 50).exp()
    torch.testing.assert_close(probs.sum(dim=0), torch.full((8,), 50.0, dtype=torch.float64), rtol=0.02, atol=0)
    assert variants.sinkhorn(1000 * torch.randn(9, 4), 1e-3).isfinite().all()


# ------------------------------------------------------------------------------------------------------ losses


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 999))
def test_squared_distance_is_the_mean_over_pairs(v, n, seed):
    student, teacher = double(seed, v, n, 7).requires_grad_(), double(seed + 1, 2, n, 7)
    unit_s, unit_t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    plain = torch.stack([(unit_t[q] - unit_s[s]).pow(2).sum(-1).mean() for q, s in pairs(v)]).mean()
    ours = variants.squared_distance(student, teacher)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (ours, plain)))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.floats(0.05, 1), st.integers(0, 999))
def test_info_nce_is_a_cross_entropy_over_positive_and_negatives(v, n, temp, seed):
    student, teacher = double(seed, v, n, 7).requires_grad_(), double(seed + 1, 2, n, 7)
    negatives = F.normalize(double(seed + 2, 11, 7), dim=-1)
    terms = []
    for q, s in pairs(v):
        a, b = F.normalize(student[s], dim=-1), F.normalize(teacher[q], dim=-1)
        logits = torch.cat([(a * b).sum(-1, keepdim=True), a @ negatives.T], dim=1) / temp
        terms.append(F.cross_entropy(logits, torch.zeros(n, dtype=torch.long)))
    plain, ours = torch.stack(terms).mean(), variants.info_nce(student, teacher, negatives, temp)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (ours, plain)))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.floats(0.05, 1), st.integers(0, 999))
def test_info_nce_of_a_step_is_a_cross_entropy_over_its_images(v, n, temp, seed):
    student, teacher = double(seed, v, n, 7).requires_grad_(), double(seed + 1, 2, n, 7)
    loss = variants.BatchInfoNce(temp)
    targets, _ = loss.make_targets(teacher.flatten(0, 1), torch.zeros(7), temp, variants.TARGETS["none"])
    terms = []
    for q, s in pairs(v):
        logits = F.normalize(student[s], dim=-1) @ F.normalize(teacher[q], dim=-1).T / temp
        terms.append(F.cross_entropy(logits, torch.arange(n)))
    plain, ours = torch.stack(terms).mean(), loss(student, targets.unflatten(0, (2, -1)))
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (ours, plain)))
    # Some of the images, as where a step is computed in parts, still have all the others against them.
    some = loss(student[:, :1], targets.unflatten(0, (2, -1))[:, :1])
    first = [
        F.cross_entropy(
            F.normalize(student[s, :1], dim=-1) @ F.normalize(teacher[q], dim=-1).T / temp,
            torch.zeros(1, dtype=torch.long),
        )
        for q, s in pairs(v)
    ]
    torch.testing.assert_close(some, torch.stack(first).mean())


def test_negatives_replace_the_oldest_and_wrap():
    torch.manual_seed(0)
    queue = variants.InfoNce(0.1, 5, 4)
    start = queue.values.clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(5))
    keys = torch.randn(9, 4)
    for part in keys.split(3):
        queue.push(part)
    unit = F.normalize(keys, dim=1)
    # Nine pushed into five places: 5..8 are in, in the ring's order; none of the start is left.
    torch.testing.assert_close(queue.values, unit[[5, 6, 7, 8, 4]])


def test_spread_is_0_for_a_point_and_1_for_the_sphere():
    assert variants.feature_spread(torch.ones(10, 8)).item() == pytest.approx(0, abs=1e-6)
    assert variants.feature_spread(double(0, 4000, 16)).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ["mse", "byol", "mocov2", "sinkhorn", "softmax-batch", "none", "predictor"])
def test_the_loss_of_a_step_is_its_formula_in_float64(name):
    """The whole forward pass against the networks' outputs put through the plain formulas."""
    method, groups = build(name), [g.flatten(0, 1) for g in views(0)]
    teacher, student = method.teacher(groups[:1]), method.student(groups).unflatten(0, (5, 8))
    negatives = method.loss.values.clone() if name == "mocov2" else None
    temp = 0.2
    if name in ("mse", "byol"):
        s, t = F.normalize(student, dim=-1), F.normalize(teacher.unflatten(0, (2, 8)), dim=-1)
        expected = torch.stack([(t[q] - s[v]).pow(2).sum(-1).mean() for q, v in pairs(5)]).mean()
    elif negatives is not None:
        s, t = F.normalize(student, dim=-1), F.normalize(teacher.unflatten(0, (2, 8)), dim=-1)
        logits = [torch.cat([(s[v] * t[q]).sum(-1, keepdim=True), s[v] @ negatives.T], 1) / 0.1 for q, v in pairs(5)]
        expected = -torch.stack([x.log_softmax(-1)[:, 0].mean() for x in logits]).mean()
    else:
        rounds = {"sinkhorn": 3, "softmax-batch": 1}.get(name)
        probs = paper_sinkhorn(teacher, temp, rounds) if rounds else (teacher / temp).softmax(-1)
        probs = probs.unflatten(0, (2, 8))
        terms = [-(probs[q] * (student[v] / 0.1).log_softmax(-1)).sum(-1).mean() for q, v in pairs(5)]
        expected = torch.stack(terms).mean()
    loss, metrics = make_step(method).compute_gradients(groups, temp)
    torch.testing.assert_close(loss, expected.detach())
    assert all(value.isfinite() for value in metrics.values())


def test_centering_moves_the_targets_of_mse_too():
    method, groups = build("mse"), [g.flatten(0, 1) for g in views(0)]
    make_step(method).compute_gradients(groups, 0.1)
    center = method.center.value.clone()
    torch.testing.assert_close(center, 0.1 * method.teacher(groups[:1]).mean(dim=0))
    s = F.normalize(method.student(groups).unflatten(0, (5, 8)), dim=-1)
    t = F.normalize((method.teacher(groups[:1]) - center).unflatten(0, (2, 8)), dim=-1)
    expected = torch.stack([(t[q] - s[v]).pow(2).sum(-1).mean() for q, v in pairs(5)]).mean()
    torch.testing.assert_close(make_step(method).compute_gradients(groups, 0.1)[0], expected.detach())


# ---------------------------------------------------------------------------------------------------- teachers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("swav", [1, 2, 3, 4, 5, 6]),
        ("previous-iteration", [0, 1, 2, 3, 4, 5]),
        ("previous-epoch", [0, 0, 3, 3, 3, 6]),
    ],
)
def test_the_teacher_is_the_student_of_then(name, expected):
    """The student's parameters are set to the number of steps done; epochs have three steps."""
    method = build(name)
    for network in (method.student, method.teacher, method.follow):
        for p in network.parameters():
            p.data.zero_()
    found = []
    for step in range(1, 7):
        for p in method.student.parameters():
            p.data.fill_(step)
        method.update_teacher(0.5, epoch_ends=step % 3 == 0)
        found.append({p.data.unique().item() for p in method.teacher.parameters()})
    assert found == [{float(x)} for x in expected]


def test_a_predictor_is_the_students_alone():
    method = build("byol")
    assert any("predictor" in name for name, _ in method.student.named_parameters())
    assert not any("predictor" in name for name, _ in method.teacher.named_parameters())
    fresh = DINO(*(Network(torch.nn.Identity(), Head(8, 16, 8, 4, predictor=p)) for p in (True, False)))
    for name, p in fresh.teacher.named_parameters():
        assert torch.equal(p, dict(fresh.student.named_parameters())[name])


# -------------------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("bottleneck", [True, False])
def test_head_against_plain_float64(layers, activation, bottleneck):
    torch.manual_seed(0)
    head = Head(6, 9, 7, 5, layers, activation=activation, bottleneck=bottleneck).double()
    x = expected = double(0, 4, 6)
    linear = [m for m in head.mlp.modules() if isinstance(m, torch.nn.Linear)]
    for i, layer in enumerate(linear):
        expected = expected @ layer.weight.T + layer.bias
        if i < layers - 1 or not bottleneck:
            expected = getattr(F, activation)(expected)
    if bottleneck:
        expected = expected / expected.norm(dim=1, keepdim=True)
    v = head.last_layer.weight_v
    torch.testing.assert_close(head(x), expected @ (v / v.norm(dim=1, keepdim=True)).T)
    assert len(linear) == layers


def test_head_depth_one_is_prototypes_on_features_and_prototypes_can_be_left_out():
    x = double(1, 3, 6)
    alone = Head(6, 9, 7, 5, num_layers=0, bottleneck=False).double()
    v = alone.last_layer.weight_v
    torch.testing.assert_close(alone(x), x @ (v / v.norm(dim=1, keepdim=True)).T)
    projection = Head(6, 9, 7, 5, prototypes=False).double()
    assert projection(x).shape == (3, 5)
    assert projection.out_dim == 5
    torch.testing.assert_close(projection(x), projection.mlp(x))


# ---------------------------------------------------------------------------------- the ranges the paper covers


@pytest.mark.parametrize("heads", [6, 8, 12, 16])
@pytest.mark.parametrize(("patch", "sizes"), [(16, (224, 96)), (8, (224, 96)), (5, (225, 95))])
def test_vit_small_of_every_patch_size_and_number_of_heads(heads, patch, sizes):
    with torch.device("meta"):
        model = create("vit_small", patch_size=patch, image_size=sizes[0], num_heads=heads)
        for size in sizes:
            assert model(torch.zeros(1, 3, size, size)).shape == (1, 384)
            assert model.attention(torch.zeros(1, 3, size, size)).shape[1] == heads


@pytest.mark.parametrize("k", [1024, 65536, 262144])
def test_any_number_of_prototypes(k):
    with torch.device("meta"):
        assert Head(384, k)(torch.zeros(4, 384)).shape == (4, k)


@pytest.mark.parametrize(("batch", "ranks"), [(8, 1), (4096, 64)])
def test_batches_from_8_to_4096_are_shared_evenly(batch, ranks):
    source = Scenes(5000, size=8)
    options = replace(ViewOptions(), {"global_size": 8, "local_size": 8, "num_local": 2})
    items = [ViewBatches(source, options, CpuRenderer(), batch, 0, rank, ranks).indices(0)[0] for rank in range(ranks)]
    assert {len(part) for part in items} == {batch // ranks}
    assert len({int(i) for part in items for i in part}) == batch


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method.loss": "mse", "method.targets": "sinkhorn"}, "compares vectors"),
        ({"method.loss": "infonce", "method.targets": "centering"}, "use none"),
        ({"head.prototypes": False, "method.loss": "cross-entropy"}, "needs them"),
        ({"method.teacher": "student", "method.momentum": 0.9}, "leave one out"),
        ({"head.bottleneck": False, "head.predictor": True}, "no place for a predictor"),
        ({"head.num_layers": 0}, "at least 1"),
        ({"method.queue_size": -1}, "cannot be negative"),
    ],
)
def test_what_makes_no_sense_together_is_refused_with_a_reason(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(TrainOptions(), changes)


# ------------------------------------------------------------------------------------------------- distributed


def train(name: str, rank: int, ranks: int, shard: str = "none", optimizer: str | None = None) -> list[float]:
    """Four steps on this rank's share of each batch, plain gradient descent without `optimizer`; all numbers of the end."""
    method = build(name)
    if shard != "none":
        sharding.shard(method, torch.device("cpu"), shard)
    step_of = make_step(method)
    if optimizer is not None:
        step_of.optimizer = create_optimizer(replace(OptimOptions(), {"name": optimizer}), method.student)
        step_of.clip_grad = 0.3
    if shard == "none":
        step_of.distribute()
    share = distributed.split(8, ranks)[rank]
    step_of.weight = (share.stop - share.start) * ranks / 8
    numbers: list[float] = []
    for step in range(4):
        groups = [g[:, share].flatten(0, 1) for g in views(step)]
        rates = Rates(0.1 if optimizer is None else 0.01, 0.1, 0.9, 0.1, epoch_ends=step % 2 == 1)
        metrics = step_of(groups, rates._replace(freeze_last_layer=optimizer is not None and step == 0))
        numbers.append(metrics["grad_norm"].item())
    for network in (method.student, method.teacher):
        numbers += [distributed.gather_whole(value).norm().item() for value in network.parameters()]
    return [*numbers, method.center.value.norm().item()]


CASES: list[tuple[str, str | None]] = [
    *((name, None) for name in VARIANTS),
    *(("dino", optimizer) for optimizer in ("adamw", "sgd", "lars", "muon")),
]


@functools.cache
def train_alone() -> list[list[float]]:
    return [train(name, 0, 1, optimizer=optimizer) for name, optimizer in CASES]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "shard"), [(2, "none"), (3, "none"), (2, "all"), (3, "all"), (4, "machine")])
def test_ranks_equal_one(tmp_path, ranks, shard):
    """Every variant and optimizer: the batch on real processes, in unequal parts on three, gives the parameters of one.

    Networks are whole on each rank, or spread over all, or over the two of each of two "machines".
    """
    done = processes.run([sys.executable, __file__, str(tmp_path), shard], ranks=ranks)
    assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "numbers.json").read_text())
    for case, numbers, alone in zip(CASES, together, train_alone(), strict=True):
        # Moments that begin near zero enlarge rounding.
        rel = 1e-9 if case[1] is None else 1e-8
        assert numbers == pytest.approx(alone, rel=rel, abs=1e-11), case


if __name__ == "__main__":
    import faulthandler

    import torch.distributed as dist

    faulthandler.enable()  # says where, if a library ends this process
    if sys.argv[2] == "machine":
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    dist.init_process_group("gloo")
    found = [train(name, dist.get_rank(), dist.get_world_size(), sys.argv[2], optimizer) for name, optimizer in CASES]
    if dist.get_rank() == 0:
        (Path(sys.argv[1]) / "numbers.json").write_text(json.dumps(found))
    dist.destroy_process_group()
