"""The method against the reference: its loss, its center, and two whole training runs of 30 steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import processes
from dino import distributed
from dino.engine import optim, sharding
from dino.engine.step import Rates, TrainingStep
from dino.method import CENTERING, DINO, Center, CrossEntropy, Network, cross_entropy, sharpen
from dino.models import Head, VisionTransformer
from dino.options.train import OptimOptions
from dino.schedules import cosine, linear_then_constant, warmup_cosine
from helpers import golden_images, load_golden_weights


def plain_loss(student, targets, temp):
    """Equation 3 as written: every pair of different views, one log-softmax each."""
    terms = [
        -(targets[q] * (student[v] / temp).log_softmax(-1)).sum(-1).mean()
        for q in range(len(targets))
        for v in range(len(student))
        if v != q
    ]
    return sum(terms) / len(terms)


def test_loss_center_and_gradient_match_reference(golden):
    expected, center = golden("loss"), Center(256, momentum=0.9)
    for i in range(6):
        temp = linear_then_constant(min(i, 4), 0.04, 0.07, 2)
        assert temp == pytest.approx(float(expected["teacher_temp"][i]) if expected["teacher_temp"].size > 5 else temp)
        student = (3 * golden_images(100 + i, 24, 256)).requires_grad_()
        teacher = 3 * golden_images(200 + i, 8, 256)
        probs = sharpen(teacher, center.value, temp).exp()
        loss = cross_entropy(student.unflatten(0, (6, 4)), probs.unflatten(0, (2, 4)), 0.1)
        center.update(teacher)
        loss.backward()
        assert loss.item() == pytest.approx(float(expected["loss"][i]), rel=1e-6)
        assert center.value.norm().item() == pytest.approx(float(expected["center_norm"][i]), rel=1e-6)
        assert student.grad.norm().item() == pytest.approx(float(expected["student_grad_norm"][i]), rel=1e-6)
    np.testing.assert_allclose(center.value.numpy(), expected["center_last"].ravel(), rtol=1e-5, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 7), st.integers(1, 4), st.integers(2, 40), st.floats(0.05, 1), st.integers(0, 10_000))
def test_one_log_sum_exp_per_view_is_the_sum_over_pairs(views, images, k, temp, seed):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    student, targets = make(views, images, k).requires_grad_(), (3 * make(2, images, k)).softmax(-1)
    ours, plain = cross_entropy(student, targets, temp), plain_loss(student, targets, temp)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-11)
    ours_grad, plain_grad = (torch.autograd.grad(x, student)[0] for x in (ours, plain))
    torch.testing.assert_close(ours_grad, plain_grad, rtol=1e-10, atol=1e-13)


def test_entropy_and_kl_add_up_to_the_loss():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3, 20), torch.randn(6, 20)
    probs, metrics = CrossEntropy().make_targets(teacher, torch.zeros(20), 0.5, CENTERING)
    targets = probs.unflatten(0, (2, 3))
    kl = [
        (targets[q] * (targets[q].log() - (student[v] / 0.1).log_softmax(-1))).sum(-1).mean()
        for q in range(2)
        for v in range(5)
        if v != q
    ]
    expected = metrics["teacher_entropy"] + sum(kl) / len(kl)
    torch.testing.assert_close(cross_entropy(student, targets, 0.1), expected)


def make_trace_model(prototypes: int = 512) -> DINO:
    def network() -> Network:
        backbone = VisionTransformer(image_size=64, patch_size=8, dim=96, depth=3, num_heads=3)
        return Network(backbone, Head(96, prototypes, hidden_dim=128, bottleneck_dim=64))

    student = network()
    load_golden_weights(student)
    return DINO(student, network())


def make_step(method: DINO, name: Any = "adamw") -> TrainingStep:
    return TrainingStep(method, optim.create_optimizer(OptimOptions(name=name), method.student), torch.device("cpu"))


TRACES = {"adamw": 2e-3, "sgd": 0.1}


def train_trace(name: str, sharded: bool = False) -> dict[str, Any]:
    """The 30 steps of a golden trace, by the step that trains; on several ranks each has its share of the images."""
    total, per_epoch, lr = 30, 10, TRACES[name]
    method = make_trace_model()
    if sharded:
        sharding.shard(method, torch.device("cpu"), "all")
    train = make_step(method, name)
    share = distributed.split(8, distributed.world_size())[distributed.rank()]
    found: dict[str, Any] = {"loss": [], "grad_norm": [], "center_norm": []}
    for step in range(total):
        groups = [
            torch.cat([golden_images(1000 * step + c, 8, 3, 64, 64)[share] for c in range(2)]),
            torch.cat([golden_images(1000 * step + 10 + c, 8, 3, 32, 32)[share] for c in range(4)]),
        ]
        rates = Rates(
            warmup_cosine(step, total, lr, 1e-6, per_epoch),
            cosine(step, total, 0.04, 0.4),
            cosine(step, total, 0.99, 1.0),
            linear_then_constant(step // per_epoch, 0.04, 0.07, 2),
            freeze_last_layer=step < per_epoch,
        )
        metrics = train(groups, rates)
        metrics["loss"] = distributed.sum_(metrics["loss"]) / distributed.world_size()
        for key, values in found.items():
            values.append(metrics[key].item())
    for key, network in (("student", method.student), ("teacher", method.teacher)):
        norms = [distributed.gather_whole(value).norm().item() for value in network.state_dict().values()]
        found[f"{key}_param_norms"] = norms
    with torch.no_grad():
        images = golden_images(77, 4, 3, 64, 64)
        if not sharded:  # such a network gathers its parameters only when it is called as a whole
            found["teacher_cls"] = method.teacher.backbone(images).numpy()
    return found


def assert_is_the_trace(expected: Any, found: dict[str, Any]) -> None:
    for key, values in found.items():
        atol = {"teacher_cls": 1e-4}.get(key, 1e-6 if "norms" in key else 0)
        np.testing.assert_allclose(values, expected[key], rtol=1e-4, atol=atol, err_msg=key)


@pytest.mark.parametrize("name", TRACES)
def test_thirty_steps_match_reference(golden, name):
    """Loss, gradient norm and center of every step, and all parameters at the end, within 1e-4."""
    assert_is_the_trace(golden(f"trace_{name}_norm1"), train_trace(name))


@pytest.mark.slow
def test_thirty_steps_of_sharded_networks_match_reference(golden, tmp_path):
    done = processes.run([sys.executable, __file__, str(tmp_path)], ranks=2)
    assert done.returncode == 0, done.stderr
    for name in TRACES:
        assert_is_the_trace(golden(f"trace_{name}_norm1"), json.loads((tmp_path / f"{name}.json").read_text()))


def test_gradients_against_float64():
    """The float32 gradient of every parameter agrees with the float64 one."""
    method = make_trace_model(64)
    groups = [torch.randn(6, 3, 64, 64), torch.randn(9, 3, 32, 32)]
    grads = {}
    for dtype in (torch.float64, torch.float32):
        method.to(dtype).zero_grad()
        method.center.value.zero_()  # the forward pass of the other precision moved it
        make_step(method).compute_gradients([g.to(dtype) for g in groups], 0.04)
        grads[dtype] = {n: p.grad.double() for n, p in method.student.named_parameters() if p.grad is not None}
    assert len(grads[torch.float32]) == sum(p.requires_grad for p in method.student.parameters())
    for name, exact in grads[torch.float64].items():
        error = (grads[torch.float32][name] - exact).norm() / exact.norm().clamp(min=1e-9)
        assert error < 1e-4, (name, error)


def test_teacher_gets_no_gradient_and_starts_as_the_student():
    method = make_trace_model(64)
    make_step(method).compute_gradients([torch.randn(4, 3, 64, 64)], 0.04)
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    shared = {p.data_ptr() for p in method.student.parameters()} & {p.data_ptr() for p in method.teacher.parameters()}
    assert not shared
    for a, b in zip(method.student.parameters(), method.teacher.parameters(), strict=True):
        assert torch.equal(a, b)


def test_update_teacher_is_the_moving_average():
    method = make_trace_model(64)
    before = [p.clone() for p in method.teacher.parameters()]
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(1.0)
    method.update_teacher(0.75)
    for old, new, student in zip(before, method.teacher.parameters(), method.student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * student)


def test_weight_decay_reaches_matrices_only():
    method = make_trace_model(64)
    decayed, plain = (group["params"] for group in optim.group_parameters(method.student))
    names = {id(p): n for n, p in method.student.named_parameters()}
    assert {names[id(p)] for p in decayed} >= {"backbone.cls_token", "backbone.pos_embed", "head.last_layer.weight_v"}
    assert all(p.ndim > 1 for p in decayed)
    assert all(p.ndim == 1 for p in plain)


def test_clipping_is_per_parameter():
    a, b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4))
    a.grad, b.grad = torch.full((3,), 10.0), torch.full((4,), 0.1)
    total = optim.clip_per_parameter_([a, b], 3.0)
    assert a.grad.norm().item() == pytest.approx(3.0, rel=1e-5)
    assert torch.equal(b.grad, torch.full((4,), 0.1))
    assert total.item() == pytest.approx((300 + 0.04) ** 0.5, rel=1e-6)


def test_lars_against_its_formula():
    torch.manual_seed(0)
    w, bias = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(4))
    optimizer = optim.LARS([{"params": [w, bias]}], lr=0.5, weight_decay=0.1)
    w64, b64, mw, mb = w.detach().double(), bias.detach().double(), torch.zeros(4, 3).double(), torch.zeros(4).double()
    for _ in range(3):
        w.grad, bias.grad = torch.randn(4, 3), torch.randn(4)
        g = w.grad.double() + 0.1 * w64
        mw = 0.9 * mw + g * 0.001 * w64.norm() / g.norm()
        mb = 0.9 * mb + bias.grad.double()
        w64, b64 = w64 - 0.5 * mw, b64 - 0.5 * mb
        optimizer.step()
    torch.testing.assert_close(w.detach().double(), w64, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias.detach().double(), b64, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (16, 16)])
def test_muon_moves_along_all_directions_alike(shape):
    """Singular values of about one, the singular vectors of the momentum, and AdamW's steps for all else."""
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    found, expected = optim.orthogonalize(matrix), torch.linalg.svd(matrix, full_matrices=False)
    assert (torch.linalg.svdvals(found) - 1).abs().max() < 0.35
    assert (found * (expected.U @ expected.Vh)).sum() / min(shape) > 0.8


def test_muon_against_its_formula():
    head = Head(12, 7, hidden_dim=10, bottleneck_dim=6)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), head)
    groups = optim.group_parameters(net, matrices_apart=True)
    assert [p.shape for p in groups[0]["params"]] == [(5, 3, 3, 3), (10, 12), (10, 10), (6, 10)]
    assert [p.shape for p in groups[1]["params"]] == [(7, 6)]  # the prototypes
    optimizer, kernel, bias = optim.Muon(groups, 0.0), net[0].weight, net[0].bias
    reference = torch.nn.Parameter(bias.detach().clone())
    adamw = torch.optim.AdamW([reference], lr=0.1, weight_decay=0.0)
    optim.set_rates(optimizer, lr=0.1, weight_decay=0.5)
    w, momentum = kernel.detach().clone(), torch.zeros_like(kernel)
    for _ in range(3):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        reference.grad, grad = bias.grad.clone(), kernel.grad.clone()
        momentum = 0.95 * momentum + 0.05 * grad
        update = optim.orthogonalize((0.05 * grad + 0.95 * momentum).flatten(1)).view_as(w)
        w = w * (1 - 0.1 * 0.5) - 2 * 0.1 * 27**0.5 * update
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(kernel.detach(), w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias, reference)
    again = optim.Muon(optim.group_parameters(net, matrices_apart=True), 0.0)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[kernel]["momentum"], optimizer.state[kernel]["momentum"])


def test_shapes_in_signatures_are_checked_while_testing():
    """The test run checks every call against its annotations; users do not pay for that."""
    with pytest.raises(jaxtyping.TypeCheckError):
        sharpen(torch.zeros(3, 4), torch.zeros(5), 0.1)


if __name__ == "__main__":
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for name in TRACES:
        found = train_trace(name, sharded=True)
        if dist.get_rank() == 0:
            Path(sys.argv[1], f"{name}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
