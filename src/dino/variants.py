"""What the paper compares DINO with, each a small function (Tables 2, 7, 14 and 15): other targets, other losses.

Plain PyTorch, like `dino.method`, which calls these. Letters: n images, v views (the g global ones first), k
prototypes, d width of projections, m negatives.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dino import distributed


@torch.no_grad()
def sinkhorn(scores: Float[Tensor, "b k"], temp: float, iterations: int = 3) -> Float[Tensor, "b k"]:
    """Log-probabilities of targets that use all prototypes alike over the global batch (appendix D, from SwAV).

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
    terms = []
    for q, key in enumerate(teacher):
        positive = (student * key).sum(dim=-1) / temp
        loss = torch.logaddexp(positive, against) - positive
        terms += [loss[:q], loss[q + 1 :]]
    return torch.cat(terms).mean()


class Negatives(nn.Module):
    """A queue of the teacher's latest projections of all ranks, L2-normalized: what MoCo contrasts with."""

    values: Tensor
    oldest: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("values", F.normalize(torch.randn(size, dim), dim=-1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, keys: Float[Tensor, "b d"]) -> None:
        """Replace the oldest by `keys` and those of the other ranks."""
        keys = F.normalize(distributed.concatenate(keys), dim=-1)
        assert len(keys) <= len(self.values), "dino.run.check compares the queue with the batch"
        where = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.values)
        self.values[where] = keys.to(self.values.dtype)
        self.oldest.copy_((self.oldest + len(keys)) % len(self.values))


def pair_products(student: Float[Tensor, "v n d"], teacher: Float[Tensor, "g n d"]) -> Float[Tensor, ""]:
    """Sum of <teacher view q, student view v> over all images and all pairs of different views q != v."""
    g, total = len(teacher), teacher.sum(dim=0)
    matched = ((total - teacher) * student[:g]).sum()
    return matched + (total * student[g:].sum(dim=0)).sum() if len(student) > g else matched


@torch.no_grad()
def feature_spread(vectors: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Standard deviation of L2-normalized vectors times sqrt(d): 0 when all are the same, 1 when all over the sphere."""
    unit = F.normalize(vectors.float(), dim=-1)
    return unit.std(dim=0).mean() * unit.shape[1] ** 0.5
