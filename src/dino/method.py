"""DINO: self-distillation with no labels (Caron et al. 2021), in the order and the words of the paper's Algorithm 1.

    gs, gt: student and teacher networks        C: center [K]        tps, tpt: temperatures        l, m: momenta
    gt.params = gs.params
    for x in loader:
        x1, x2 = augment(x), augment(x)           `dino.data` (with multi-crop: 2 global and several local views)
        s1, s2 = gs(x1), gs(x2)                   `Network.forward`: one backbone pass per resolution
        t1, t2 = gt(x1), gt(x2)
        loss = H(t1, s2)/2 + H(t2, s1)/2          `Center`, `sharpen`, `cross_entropy`: see `DINO`
        loss.backward(); update(gs)               `dino.engine.step`, which calls these methods in this order
        gt.params = l*gt.params + (1-l)*gs.params `DINO.update_teacher`: `MovingAverage`
        C = m*C + (1-m)*cat([t1, t2]).mean(dim=0) `Center.update` (used before it is updated)

Plain PyTorch: neither options nor data are known here. What the paper compares DINO with is in `dino.variants`.
Letters: n images, v views (the g global ones first), k prototypes.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino import distributed
from dino.models import Head

Metrics = dict[str, Tensor]  # scalars on the device, to log and to watch


class Network(nn.Module):
    """g = h o f: a backbone and a projection head (section 3.1)."""

    def __init__(self, backbone: nn.Module, head: Head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, groups: list[Tensor], drop_path_noise: list[Tensor] | None = None) -> Float[Tensor, "vn k"]:
        """Prototype scores of view-major groups of equal resolution: one backbone pass each, one head pass for all.

        Args:
            drop_path_noise: for stochastic depth, per group (see `VisionTransformer.forward`).
        """
        arguments = zip(groups) if drop_path_noise is None else zip(groups, drop_path_noise, strict=True)
        return self.head(torch.cat([self.backbone(*of_group) for of_group in arguments]))


def at_least_float32(scores: Tensor) -> Tensor:
    """Softmaxes over thousands of prototypes are taken in float32 whatever the networks compute in."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


class Center(nn.Module):
    """Centering (Eq. 4): a moving mean of the teacher's outputs, over all ranks, subtracted from them."""

    value: Tensor

    def __init__(self, out_dim: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(out_dim))

    @torch.no_grad()
    def update(self, teacher_scores: Float[Tensor, "gn k"]) -> None:
        scores = at_least_float32(teacher_scores)
        # With their number, because ranks may have different numbers of images.
        total = distributed.sum_(torch.cat([scores.sum(dim=0), scores.new_full((1,), len(scores))]))
        self.value.lerp_(total[:-1] / total[-1], 1 - self.momentum)


def sharpen(scores: Float[Tensor, "gn k"], center: Float[Tensor, " k"], temp: float) -> Float[Tensor, "gn k"]:
    """Logarithm of the teacher's distribution softmax((scores - center) / temp) (Eq. 1, section 3.1)."""
    return ((at_least_float32(scores) - center) / temp).log_softmax(dim=-1)


def pair_products(student: Float[Tensor, "v n d"], teacher: Float[Tensor, "g n d"]) -> Float[Tensor, ""]:
    """Sum of <teacher view q, student view v> over all images and all pairs of different views q != v."""
    g, total = len(teacher), teacher.sum(dim=0)
    matched = ((total - teacher) * student[:g]).sum()
    return matched + (total * student[g:].sum(dim=0)).sum() if len(student) > g else matched


def cross_entropy(
    student_scores: Float[Tensor, "v n k"], targets: Float[Tensor, "g n k"], student_temp: float
) -> Float[Tensor, ""]:
    """Mean of H(target q, student v) over all pairs of different views (Eq. 3).

    The sum over pairs needs one log-sum-exp per view, not one log-softmax per pair: with x = scores / temp,
    sum over q != v of -<t_q, log_softmax(x_v)> = (number of q != v) lse(x_v) - <sum over q != v of t_q, x_v>.
    """
    v, n, g = len(student_scores), student_scores.shape[1], len(targets)
    x = at_least_float32(student_scores) / student_temp
    lse = x.logsumexp(dim=-1).sum(dim=1)  # [v]
    normalizer = (g - 1) * lse[:g].sum() + g * lse[g:].sum()
    return (normalizer - pair_products(x, targets)) / (n * g * (v - 1))


class Targets(NamedTuple):
    """How the teacher's scores become distributions over prototypes."""

    log_probs: Callable[[Tensor, Tensor, float], Tensor]  # of scores [b, k], center [k] and temperature
    moves_center: bool


CENTERING = Targets(sharpen, moves_center=True)


@runtime_checkable
class Loss(Protocol):
    """What the student minimizes."""

    def make_targets(self, scores: Tensor, center: Tensor, temp: float, targets: Targets) -> tuple[Tensor, Metrics]:
        """Targets [gn, k] from the teacher's scores [gn, k], and what to log of them; once a step."""
        ...

    def __call__(self, student_scores: Tensor, targets: Tensor) -> Tensor:
        """The loss of scores [v, n, k] against targets [g, n, k]."""
        ...


class CrossEntropy(nn.Module):
    """DINO's loss: cross-entropy of distributions over prototypes.

    Metrics, in nats: `teacher_entropy` (mean entropy of the targets; KL = loss - entropy, section 5.3) and
    `prototype_usage` (entropy of the mean target: ln K when all prototypes are used equally).
    """

    def __init__(self, student_temp: float = 0.1):
        super().__init__()
        self.student_temp = student_temp

    def make_targets(self, scores: Tensor, center: Tensor, temp: float, targets: Targets) -> tuple[Tensor, Metrics]:
        log_probs = targets.log_probs(scores, center, temp)
        probs = log_probs.exp()
        entropy = -(probs * log_probs).sum(dim=-1).mean()
        usage = torch.special.entr(probs.mean(dim=0)).sum()
        return probs, {"teacher_entropy": entropy, "prototype_usage": usage}

    def forward(self, student_scores: Float[Tensor, "v n k"], targets: Float[Tensor, "g n k"]) -> Float[Tensor, ""]:
        return cross_entropy(student_scores, targets, self.student_temp)


def move_parameters(network: nn.Module, towards: nn.Module, share: float) -> None:
    """Parameters of `network` a `share` of the way to those of the same name; buffers stay."""
    there = dict(towards.named_parameters())
    pairs = [(p.data, there[name].data) for name, p in network.named_parameters()]
    own, others = ([distributed.get_local(pair[i]) for pair in pairs] for i in (0, 1))
    torch._foreach_lerp_(own, others, share)  # pyright: ignore[reportPrivateImportUsage]


class MovingAverage(nn.Module):
    """The momentum teacher: an exponential moving average of the student's parameters."""

    def forward(self, teacher: nn.Module, student: nn.Module, momentum: float, epoch_ends: bool) -> None:
        move_parameters(teacher, student, 1 - momentum)


class DINO(nn.Module):
    """Student, teacher and center.

    The teacher is a copy of the student that gets no gradients; it is built without stochastic depth or predictor and
    stays in training mode as in the reference. The defaults are the paper's method; `dino.variants` has the others.

    Args:
        targets: how the teacher's scores become distributions.
        loss: what the student minimizes.
        follow: how the teacher follows the student, called with (teacher, student, momentum, epoch_ends).
    """

    def __init__(
        self,
        student: Network,
        teacher: Network,
        center_momentum: float = 0.9,
        targets: Targets = CENTERING,
        loss: Loss | None = None,
        follow: nn.Module | None = None,
    ):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.out_dim = teacher.head.out_dim
        self.center = Center(self.out_dim, center_momentum)
        self.targets = targets
        self.loss: Loss = CrossEntropy() if loss is None else loss
        self.follow = MovingAverage() if follow is None else follow
        teacher.load_state_dict({k: v for k, v in student.state_dict().items() if ".predictor." not in k})
        teacher.requires_grad_(False)

    @torch.no_grad()
    def teacher_targets(
        self, global_views: Float[Tensor, "gn c s s"], temp: float, parts: int = 1
    ) -> tuple[Float[Tensor, "g n k"], Metrics]:
        """Targets for the student, and metrics of them; then moves the center.

        Args:
            temp: temperature of the teacher at this step.
            parts: number of passes that the batch is computed in; the same targets in less memory.
        """
        scores = torch.cat([at_least_float32(self.teacher([views])) for views in global_views.chunk(parts)])
        targets, metrics = self.loss.make_targets(scores, self.center.value, temp, self.targets)
        if self.targets.moves_center:
            self.center.update(scores)
            metrics["center_norm"] = self.center.value.norm()
        return targets.unflatten(0, (2, -1)), metrics

    def student_loss(self, student_scores: Float[Tensor, "vn k"], targets: Float[Tensor, "g n k"]) -> Float[Tensor, ""]:
        """The loss of view-major scores of the images of `targets`; gradients flow to the student only."""
        return self.loss(at_least_float32(student_scores).unflatten(0, (-1, targets.shape[1])), targets)

    @torch.no_grad()
    def update_teacher(self, momentum: float, epoch_ends: bool = False) -> None:
        """Let the teacher follow the student, after the student's step."""
        self.follow(self.teacher, self.student, momentum, epoch_ends)

    def cancel_last_layer_gradients(self) -> None:
        """Keep the prototypes where they are for this step; called after clipping, as in the reference."""
        for name, parameter in self.student.named_parameters():
            if "last_layer" in name:
                parameter.grad = None
