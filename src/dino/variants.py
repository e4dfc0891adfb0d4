"""What the paper compares DINO with (Tables 2, 7, 14 and 15, Fig. 6): other targets, losses and teachers.

Each is one small object and one entry in `TARGETS`, `LOSSES` or `TEACHERS`, under the name that its option has. Plain
PyTorch, like `dino.method`. Letters: n images, v views (the g global ones first), k prototypes, d width of projections,
m negatives.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dino import distributed
from dino.machine import check_memory
from dino.method import (
    CENTERING,
    DINO,
    CrossEntropy,
    Loss,
    Metrics,
    MovingAverage,
    Network,
    Targets,
    move_parameters,
    pair_products,
    sharpen,
)

# --- targets -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sinkhorn(scores: Float[Tensor, "b k"], temp: float, iterations: int = 3) -> Float[Tensor, "b k"]:
    """Log-probabilities of targets that use all prototypes equally over the global batch (appendix D, from SwAV).

    Each iteration shares every prototype's weight among all samples of all ranks, then makes each sample sum to one.
    One iteration is the paper's "softmax over the batch". In the log domain, so that no temperature overflows.
    """
    logits = scores / temp
    for _ in range(iterations):
        logits = logits - _logsumexp_over_ranks(logits)
        logits = logits.log_softmax(dim=-1)
    return logits


def _logsumexp_over_ranks(logits: Float[Tensor, "b k"]) -> Float[Tensor, " k"]:
    """Over the samples of all ranks."""
    largest = distributed.max_(logits.amax(dim=0))
    return distributed.sum_((logits - largest).exp().sum(dim=0)).log() + largest


TARGETS: dict[str, Targets] = {
    "centering": CENTERING,
    "none": Targets(sharpen, moves_center=False),  # the center stays zero
    "softmax-batch": Targets(lambda scores, _, temp: sinkhorn(scores, temp, iterations=1), moves_center=False),
    "sinkhorn": Targets(lambda scores, _, temp: sinkhorn(scores, temp), moves_center=False),
}


# --- losses --------------------------------------------------------------------------------------------------------


def feature_spread(vectors: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Standard deviation of L2-normalized vectors times sqrt(d): 0 when all are the same, 1 when all over the sphere."""
    unit = F.normalize(vectors.detach().float(), dim=-1)
    return unit.std(dim=0).mean() * unit.shape[1] ** 0.5


def squared_distance(student: Float[Tensor, "v n d"], teacher: Float[Tensor, "g n d"]) -> Float[Tensor, ""]:
    """Mean of |s - t|^2 = 2 - 2 cos(s, t) over pairs of different views, both L2-normalized (BYOL's loss)."""
    v, n, g = len(student), student.shape[1], len(teacher)
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return 2 - 2 * pair_products(student, teacher) / (n * g * (v - 1))


def info_nce(
    student: Float[Tensor, "v n d"], teacher: Float[Tensor, "g n d"], negatives: Float[Tensor, "m d"], temp: float
) -> Float[Tensor, ""]:
    """Mean of -log softmax of the positive among the negatives over pairs of different views (MoCo's loss).

    The negatives' log-sum-exp is taken once per view; cosines over `temp` are the logits.
    """
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    against = (student @ negatives.T / temp).logsumexp(dim=-1)  # [v, n]
    positives = [(student * key).sum(dim=-1) / temp for key in teacher]
    return _mean_over_pairs([torch.logaddexp(positive, against) - positive for positive in positives])


def batch_info_nce(
    student: Float[Tensor, "v n d"], teacher: Float[Tensor, "g n d"], keys: Float[Tensor, "m g d"], temp: float
) -> Float[Tensor, ""]:
    """Mean of -log softmax of the positive among all keys of its view, over pairs of different views (MoCo-v3's loss).

    Args:
        keys: of all images of a step, those of `teacher` among them.
    """
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    against = [(student @ of_view.T / temp).logsumexp(dim=-1) for of_view in keys.unbind(dim=1)]
    losses = [each - (student * key).sum(dim=-1) / temp for each, key in zip(against, teacher, strict=True)]
    return _mean_over_pairs(losses)


def _mean_over_pairs(losses: list[Tensor]) -> Float[Tensor, ""]:
    """Mean over pairs of different views: losses [v, n] of all student views, for each teacher view in turn."""
    return torch.cat([part for q, loss in enumerate(losses) for part in (loss[:q], loss[q + 1 :])]).mean()


class SquaredDistance(nn.Module):
    """BYOL's loss on the heads' outputs as vectors. Metric: `target_spread` (`feature_spread` of the teacher's)."""

    def make_targets(self, scores: Tensor, center: Tensor, temp: float, targets: Targets) -> tuple[Tensor, Metrics]:
        return scores - center, {"target_spread": feature_spread(scores)}

    def forward(self, student_scores: Float[Tensor, "v n d"], targets: Float[Tensor, "g n d"]) -> Float[Tensor, ""]:
        return squared_distance(student_scores, targets)


class InfoNce(SquaredDistance):
    """MoCo's loss: the positive against a queue of the teacher's latest projections of all ranks, L2-normalized.

    Args:
        temp: of the softmax.
        size: negatives that the queue remembers; dim: width of the projections.
        batch_size: images of all ranks; None: every rank has as many.
    """

    values: Tensor
    oldest: Tensor

    def __init__(self, temp: float, size: int, dim: int, batch_size: int | None = None):
        super().__init__()
        self.temp, self.batch_size = temp, batch_size
        check_memory(4 * size * dim, f"a queue of {size} projections")
        self.register_buffer("values", F.normalize(torch.randn(size, dim), dim=-1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))
        self.negatives = self.values  # of this step

    def make_targets(self, scores: Tensor, center: Tensor, temp: float, targets: Targets) -> tuple[Tensor, Metrics]:
        self.negatives = self.values.clone()  # a step does not contrast with its own projections
        self.push(scores)
        return super().make_targets(scores, center, temp, targets)

    def forward(self, student_scores: Float[Tensor, "v n d"], targets: Float[Tensor, "g n d"]) -> Float[Tensor, ""]:
        return info_nce(student_scores, targets, self.negatives, self.temp)

    @torch.no_grad()
    def push(self, keys: Float[Tensor, "b d"]) -> None:
        """Replace the oldest by `keys` and those of the other ranks."""
        keys = F.normalize(distributed.concatenate(keys, self.batch_size), dim=-1)
        assert len(keys) <= len(self.values), "dino.run compares the queue with the batch"
        where = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.values)
        self.values[where] = keys.to(self.values.dtype)
        self.oldest.copy_((self.oldest + len(keys)) % len(self.values))


class BatchInfoNce(SquaredDistance):
    """MoCo-v3's loss: the positive against the teacher's projections of the same step's other images, on all ranks.

    Args:
        temp: of the softmax.
        batch_size: images of all ranks; None: every rank has as many.
    """

    def __init__(self, temp: float, batch_size: int | None = None):
        super().__init__()
        self.temp, self.batch_size = temp, batch_size
        self.keys = torch.empty(0)  # [images of all ranks, g, d] of this step, L2-normalized

    def make_targets(self, scores: Tensor, center: Tensor, temp: float, targets: Targets) -> tuple[Tensor, Metrics]:
        of_images = scores.unflatten(0, (2, -1)).transpose(0, 1)
        self.keys = F.normalize(distributed.concatenate(of_images, self.batch_size), dim=-1)
        return super().make_targets(scores, center, temp, targets)

    def forward(self, student_scores: Float[Tensor, "v n d"], targets: Float[Tensor, "g n d"]) -> Float[Tensor, ""]:
        return batch_info_nce(student_scores, targets, self.keys, self.temp)


# Name -> a loss, from the student's temperature, the size of the queue, the width of projections, and the batch.
LOSSES: dict[str, Callable[[float, int, int, int | None], Loss]] = {
    "cross-entropy": lambda temp, *_: CrossEntropy(temp),
    "mse": lambda *_: SquaredDistance(),
    "infonce": lambda temp, size, dim, batch: InfoNce(temp, size, dim, batch) if size else BatchInfoNce(temp, batch),
}


# --- teachers ------------------------------------------------------------------------------------------------------


class StudentCopy(nn.Module):
    """The teacher is what the student is now."""

    def forward(self, teacher: nn.Module, student: nn.Module, momentum: float, epoch_ends: bool) -> None:
        move_parameters(teacher, student, 1.0)


class PreviousEpoch(nn.Module):
    """The teacher is what the student was when the last epoch ended."""

    def forward(self, teacher: nn.Module, student: nn.Module, momentum: float, epoch_ends: bool) -> None:
        if epoch_ends:
            move_parameters(teacher, student, 1.0)


class PreviousIteration(nn.Module):
    """The teacher is what the student was one step ago."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.previous = copy.deepcopy(network).requires_grad_(False)

    def forward(self, teacher: nn.Module, student: nn.Module, momentum: float, epoch_ends: bool) -> None:
        move_parameters(teacher, self.previous, 1.0)
        move_parameters(self.previous, student, 1.0)


TEACHERS: dict[str, Callable[[Network], nn.Module]] = {
    "momentum": lambda _: MovingAverage(),
    "previous-epoch": lambda _: PreviousEpoch(),
    "previous-iteration": PreviousIteration,
    "student": lambda _: StudentCopy(),
}


def combine(
    student: Network,
    teacher: Network,
    targets: str = "centering",
    loss: str = "cross-entropy",
    follow: str = "momentum",
    student_temp: float = 0.1,
    center_momentum: float = 0.9,
    queue_size: int = 65536,
    batch_size: int | None = None,
) -> DINO:
    """A method from the names of its parts: keys of `TARGETS`, `LOSSES` and `TEACHERS`.

    Args:
        queue_size: negatives that "infonce" remembers; 0: those of the step.
        batch_size: images of all ranks; None: every rank has as many.
    """
    chosen = LOSSES[loss](student_temp, queue_size, teacher.head.out_dim, batch_size)
    method = DINO(student, teacher, center_momentum, TARGETS[targets], chosen)
    method.follow = TEACHERS[follow](method.teacher)  # built last: it may copy the teacher as it starts
    return method
