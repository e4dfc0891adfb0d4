"""Compiled networks give the same numbers, and are compiled once."""

from __future__ import annotations

import sys

import processes

# In a process of its own: shape checks (jaxtyping) are on in this one, and are not to be compiled.
SCRIPT = """
import copy
import torch
from torch._dynamo.utils import counters
from dino.engine.parallel import compile_networks
from dino.engine.step import TrainingStep
from dino.method import DINO, Network
from dino.models import Head, create

torch.manual_seed(0)
build = lambda rate: Network(create("vit_nano", patch_size=8, image_size=32, depth=2, drop_path=rate), Head(96, 64, 32, 16))
for rate, recompute in ((0.0, "nothing"), (0.3, "nothing"), (0.0, "elementwise"), (0.3, "blocks")):
    plain = DINO(build(rate), build(0.0))
    compiled = copy.deepcopy(plain)
    compiled.student.backbone.set_recompute(recompute)
    compile_networks(compiled, backend="eager")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    counters.clear()
    for step in range(3):
        groups = [torch.randn(8, 3, 32, 32), torch.randn(12, 3, 16, 16)]
        noise = [torch.rand(4, 2, 4), torch.rand(4, 3, 4)] if rate else None
        found = []
        for method in (plain, compiled):
            method.zero_grad()
            loss, _ = TrainingStep(method, None, torch.device("cpu")).compute_gradients(groups, 0.04, noise)
            found.append([loss, *(p.grad for p in method.student.parameters() if p.grad is not None)])
            method.update_teacher(0.9)
        for a, b in zip(*found, strict=True):
            assert (a - b).norm() <= 1e-4 * a.norm() + 1e-6, (step, a.norm(), (a - b).norm())
        graphs = graphs if step else counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs <= 2, counters["stats"]  # the student's and the teacher's
    assert not counters["graph_break"], counters["graph_break"]
print("alike")
"""


def test_compiled_once_with_the_same_gradients():
    done = processes.run([sys.executable, "-c", SCRIPT])
    assert done.stdout == "alike\n", done.stderr
