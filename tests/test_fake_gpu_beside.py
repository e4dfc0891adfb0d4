"""What else runs on a GPU: evaluations, pictures, and what looks at a trainer; with fake tensors, as test_fake_gpu.py.

Unlike a step these may ask the GPU for numbers, so what is asked is answered. Tensors on the wrong device are errors.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.ops import aten
from torch.utils._python_dispatch import TorchDispatchMode

from dino import bench
from dino.data.scenes import Scenes
from dino.engine import fit, init
from dino.engine.train import Trainer
from dino.eval import copydetect, finetune, knn, linear, lowshot, masks, online, propagation, segment
from dino.eval.supervised import LabeledBatch
from dino.eval.sweep import Sweep
from dino.features.cache import LabeledFeatures
from dino.features.extract import POOLINGS, extract_batches
from dino.look.patches import fit_axes, match_mutual
from dino.models import create
from fake_gpu import GPU, Pictures, report, reported, with_trainer, without_backward


class Answers(TorchDispatchMode):
    """What is asked of the GPU is answered, by ones and by as many rows as there may be: evaluations may ask."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func is aten.nonzero.default:
            return torch.zeros(args[0].numel(), args[0].ndim, dtype=torch.int64, device=args[0].device)
        if (
            func is aten.index.Tensor
            and args[0].device.type == "cpu"
            and any(i is not None and i.is_cuda for i in args[1])
        ):
            raise RuntimeError("a tensor on the CPU is indexed by one on the GPU")  # fake tensors let it pass
        return func(*args, **(kwargs or {}))


def numpy(tensor: Tensor, plain: Any = Tensor.numpy) -> np.ndarray:
    if not isinstance(tensor, FakeTensor):
        return plain(tensor)
    if tensor.is_cuda:
        raise TypeError("NumPy cannot have what is on the GPU")
    return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def on_gpu(*shape: int) -> Tensor:
    return torch.rand(*shape, device=GPU)


def labels(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64, device=GPU)


def views(count: int) -> LabeledBatch:
    return LabeledBatch(on_gpu(count, 3, 32, 32), labels(count), 40, [])


def sweeping(model: Any) -> None:
    test = LabeledFeatures(
        torch.rand(9, model.embed_dim), torch.zeros(9, dtype=torch.int64), np.arange(9)
    )  # on the CPU
    sweep = Sweep({"cls": (0, model.embed_dim)}, [0.1], [0.0, 0.1], 3, 0, GPU)
    training = linear.FrozenTraining(model, "cls", sweep, 2, 1, test)
    training.step(0, views(5))
    assert len(training.history) == 1  # the test images are classified at the end of an epoch, here of one step
    training.load_state_dict(training.state_dict())
    assert {value.device.type for value in sweep.head("cls", 1).values()} == {"cpu"}


def finetuning(model: Any, precision: str) -> None:
    tuned = finetune.Classifier(model, 5, 1.0, 0)
    without_backward(tuned)
    trainee = finetune.Finetuning(tuned, finetune.FINETUNE_RECIPES["imagenet"], 10, 0, GPU, precision)
    assert {trainee.step(0, views(count)).device for count in (40, 0)} == {GPU}  # a rank may have no images
    trainee.load_state_dict(trainee.state_dict())


def following(model: Any) -> None:
    view, image = (32, 48), np.zeros((40, 60, 3), np.uint8)
    frames = (propagation.extract_frame(model, image, view, original=True) for _ in range(3))
    first = propagation.soften(image[..., 0], model.grid(*view), 2).to(GPU)
    found = [propagation.harden(each, view, (40, 60)) for each in propagation.follow(frames, first, 2, 1, 3)]
    assert [mask.shape for mask in found] == [(40, 60)] * 2


def segmenting(model: Any) -> None:
    features, _, grid = segment.describe(model, np.zeros((40, 60, 3), np.uint8), 32)
    for build in (segment.build_knn, segment.build_linear):
        classify = build(on_gpu(9, features.shape[1]), labels(9), 3, 2)
        assert segment.enlarge_to_classes(classify(features.to(GPU)), grid, (40, 60)).is_cuda


def reading(model: Any) -> None:
    for pooling in POOLINGS:
        found = [*extract_batches(model, Pictures(), 32, range(6), 4, pooling=pooling, fp16=True)]
        assert {(part.values.device.type, part.values.dtype) for part in found} == {("cpu", torch.float32)}


EVALUATIONS: dict[str, Any] = {
    "k-NN": lambda model: knn.classify(on_gpu(40, 8), labels(40), on_gpu(5, 8), labels(5), (10,)),
    "linear": sweeping,
    "logistic": lambda model: lowshot.fit_logistic(on_gpu(9, 8), labels(9), 3, 1.0),
    "fine-tuning": lambda model: finetuning(model, "fp32"),
    "fine-tuning in bf16": lambda model: finetuning(model, "bf16"),
    "copies": lambda model: copydetect.rank_originals(on_gpu(5, 8), on_gpu(3, 8), labels(5)),
    "masks": lambda model: masks.measure_overlap(
        model, np.zeros((32, 48, 3), np.uint8), np.zeros((2, 32, 48), bool), 0.6
    ),
    "scenes": lambda model: online.measure_scene_masks(model, Scenes(3), 32, GPU),
    "videos": following,
    "classes of pixels": segmenting,
    "features": reading,
    "matches": lambda model: match_mutual(on_gpu(9, 8), on_gpu(7, 8)),
    "colors": lambda model: fit_axes([on_gpu(9, 8)]).colors(on_gpu(7, 8)),
}


TRAINERS: dict[str, Any] = {
    "fit": lambda trainer, batch: fit.fit_memory(trainer.training_step, trainer.options, 6, 10**12),
    "center": lambda trainer, batch: init.estimate_center(trainer, trainer.batches),
    "bench": lambda trainer, batch: bench.measure_parts(trainer, batch),
}
PLANTED: dict[str, tuple[str, Any]] = {
    "labels left on the CPU": (
        "indexed",
        lambda model: knn.classify(on_gpu(40, 8), labels(40).cpu(), on_gpu(5, 8), labels(5)),
    ),
    "NumPy of the GPU's": ("NumPy", lambda model: on_gpu(3).numpy()),
}


def with_model(work: Any) -> str:
    plain, nn.init.trunc_normal_ = nn.init.trunc_normal_, lambda tensor, **_: tensor  # draws until it likes the numbers
    try:
        model = create("vit_nano", patch_size=8, image_size=32).eval().requires_grad_(False)
        with FakeTensorMode(allow_non_fake_inputs=True), Answers():
            work(model.to(GPU))
    finally:
        nn.init.trunc_normal_ = plain
    return ""


def beside_steps(work: Any) -> str:
    def answered(trainer: Trainer, batch: Any) -> str:
        with Answers():
            work(trainer, batch)
        return ""

    return with_trainer({}, answered)


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return reported(__file__)


@pytest.mark.parametrize("case", [*EVALUATIONS, *TRAINERS])
def test_everything_is_on_its_device(found, case):
    assert found[case] == ""


@pytest.mark.parametrize("case", PLANTED)
def test_what_is_planted_is_found(found, case):
    assert PLANTED[case][0] in found[case]


if __name__ == "__main__":
    Tensor.numpy = numpy  # pyright: ignore
    torch.cuda.synchronize = lambda: None  # pyright: ignore
    torch.cuda.memory_allocated = lambda _: 0  # pyright: ignore
    cases = {name: functools.partial(with_model, work) for name, work in EVALUATIONS.items()}
    cases |= {name: functools.partial(beside_steps, work) for name, work in TRAINERS.items()}
    report(cases | {name: functools.partial(with_model, work) for name, (_, work) in PLANTED.items()})
