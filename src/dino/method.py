"""DINO: self-distillation with no labels (Caron et al. 2021), in the order and the words of the paper's Algorithm 1.

    gs, gt: student and teacher networks        C: center [K]        tps, tpt: temperatures        l, m: momenta
    gt.params = gs.params
    for x in loader:
        x1, x2 = augment(x), augment(x)           `dino.data` (with multi-crop: 2 global and several local views)
        s1, s2 = gs(x1), gs(x2)                   `Network.forward`: one backbone pass per resolution
        t1, t2 = gt(x1), gt(x2)
        loss = H(t1, s2)/2 + H(t2, s1)/2          `DINO.teach`: `Center`, `sharpen`; `DINO.learn`: `cross_entropy`
        loss.backward(); update(gs)               the engine: autograd and an optimizer
        gt.params = l*gt.params + (1-l)*gs.params `DINO.update_teacher`
        C = m*C + (1-m)*cat([t1, t2]).mean(dim=0) `Center.update` (used before it is updated)

Plain PyTorch: neither options nor data are known here. Letters: n images, v views (the g global ones first),
k prototypes.
"""

import copy
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino import distributed, variants
from dino.models import Head
from dino.variants import feature_spread, pair_products

Teacher = Literal["momentum", "previous-epoch", "previous-iteration", "student"]
Targets = Literal["centering", "softmax-batch", "sinkhorn", "none"]
Loss = Literal["cross-entropy", "mse", "infonce"]


class Network(nn.Module):
    """g = h o f: a backbone and a projection head (section 3.1)."""

    def __init__(self, backbone: nn.Module, head: Head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, groups: list[Tensor], draws: list[Tensor] | None = None) -> Float[Tensor, "vn k"]:
        """Prototype scores of view-major groups of equal resolution: one backbone pass each, one head pass for all.

        Args:
            draws: by which stochastic depth chooses, per group (see `VisionTransformer.forward`).
        """
        arguments = zip(groups) if draws is None else zip(groups, draws, strict=True)
        return self.head(torch.cat([self.backbone(*of_group) for of_group in arguments]))


def _at_least_float32(scores: Tensor) -> Tensor:
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
        total = distributed.sum_(_at_least_float32(teacher_scores).sum(dim=0))
        mean = total / (len(teacher_scores) * distributed.world_size())
        self.value.lerp_(mean, 1 - self.momentum)


def sharpen(
    scores: Float[Tensor, "gn k"], center: Float[Tensor, " k"], temp: float
) -> tuple[Float[Tensor, "gn k"], Float[Tensor, " gn"]]:
    """The teacher's distribution softmax((scores - center) / temp) and its entropy in nats (Eq. 1, section 3.1)."""
    logits = (_at_least_float32(scores) - center) / temp
    log_probs = logits.log_softmax(dim=-1)
    probs = log_probs.exp()
    return probs, -(probs * log_probs).sum(dim=-1)


def cross_entropy(
    student_scores: Float[Tensor, "v n k"], targets: Float[Tensor, "g n k"], student_temp: float
) -> Float[Tensor, ""]:
    """Mean of H(target q, student v) over all pairs of different views (Eq. 3).

    The sum over pairs needs one log-sum-exp per view, not one log-softmax per pair: with x = scores / temp,
    sum over q != v of -<t_q, log_softmax(x_v)> = (number of q != v) lse(x_v) - <sum over q != v of t_q, x_v>.
    """
    v, n, g = len(student_scores), student_scores.shape[1], len(targets)
    x = _at_least_float32(student_scores) / student_temp
    lse = x.logsumexp(dim=-1).sum(dim=1)  # [v]
    normalizer = (g - 1) * lse[:g].sum() + g * lse[g:].sum()
    return (normalizer - pair_products(x, targets)) / (n * g * (v - 1))


class Taught(NamedTuple):
    """What the teacher makes of one batch, on the device."""

    targets: Float[Tensor, "g n k"]  # distributions over prototypes, or vectors for losses on those
    negatives: Float[Tensor, "m k"] | None  # "infonce" only
    signs: dict[str, Float[Tensor, ""]]  # what to log and watch; see `DINO.teach`

    def of(self, images: slice) -> "Taught":
        return self._replace(targets=self.targets[:, images])


class Step(NamedTuple):
    """What one step computes, on the device."""

    loss: Float[Tensor, ""]
    signs: dict[str, Float[Tensor, ""]]


class DINO(nn.Module):
    """Student, teacher and center.

    The teacher is a copy of the student that gets no gradients; it is built without stochastic depth or predictor and
    stays in training mode as in the reference. `teacher_is`, `targets` and `loss` are the paper's variants; with
    "mse" and "infonce" the head's outputs are compared as vectors.

    Args:
        queue_size: how many negatives "infonce" remembers.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        teacher_is: Teacher = "momentum",
        targets: Targets = "centering",
        loss: Loss = "cross-entropy",
        queue_size: int = 65536,
    ):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.out_dim = teacher.head.out_dim
        self.center = Center(self.out_dim, center_momentum)
        self.student_temp, self.teacher_is, self.targets, self.loss = student_temp, teacher_is, targets, loss
        teacher.load_state_dict({k: v for k, v in student.state_dict().items() if ".predictor." not in k})
        teacher.requires_grad_(False)
        if teacher_is == "previous-iteration":
            self.previous = copy.deepcopy(teacher)
        if loss == "infonce":
            self.negatives = variants.Negatives(queue_size, self.out_dim)

    def forward(self, groups: list[Tensor], teacher_temp: float) -> Step:
        """The loss of one batch, and what `teach` says of it.

        Args:
            groups: views of equal resolution, view-major [v_r * n, c, s, s]; the first group is the 2 global views.
            teacher_temp: temperature of the teacher at this epoch.
        """
        taught = self.teach(groups[0], teacher_temp)
        return Step(self.learn(self.student(groups), taught), taught.signs)

    @torch.no_grad()
    def teach(self, global_views: Float[Tensor, "gn c s s"], temp: float, parts: int = 1) -> Taught:
        """Targets for the student; moves the center (or the queue) on, once they are made.

        The signs, in nats: `teacher_entropy` (mean entropy of the targets; KL = loss - entropy, section 5.3),
        `prototype_usage` (entropy of the mean target: ln K when all prototypes are used alike) and `center_norm`; for
        losses on vectors `target_spread` (`dino.variants.spread`).

        Args:
            parts: how many passes to make of it; the same targets in less memory.
        """
        scores = torch.cat([_at_least_float32(self.teacher([views])) for views in global_views.chunk(parts)])
        negatives = None
        if self.loss == "cross-entropy":
            targets, entropy = self._distribution(scores, temp)
            usage = torch.special.entr(targets.mean(dim=0)).sum()
            signs = {"teacher_entropy": entropy.mean(), "prototype_usage": usage}
        else:
            targets, signs = scores - self.center.value, {"target_spread": feature_spread(scores)}
        if self.loss == "infonce":
            negatives = self.negatives.values.clone()
            self.negatives.push(scores)
        if self.targets == "centering":
            self.center.update(scores)
            signs["center_norm"] = self.center.value.norm()
        return Taught(targets.unflatten(0, (2, -1)), negatives, signs)

    def learn(self, student_scores: Float[Tensor, "vn k"], taught: Taught) -> Float[Tensor, ""]:
        """The loss of view-major scores of the images that were `taught`; gradients flow to the student only."""
        scores = _at_least_float32(student_scores).unflatten(0, (-1, taught.targets.shape[1]))  # [v, n, k]
        if self.loss == "cross-entropy":
            return cross_entropy(scores, taught.targets, self.student_temp)
        if self.loss == "mse":
            return variants.squared_distance(scores, taught.targets)
        assert taught.negatives is not None
        return variants.info_nce(scores, taught.targets, taught.negatives, self.student_temp)

    def _distribution(self, scores: Float[Tensor, "gn k"], temp: float) -> tuple[Tensor, Tensor]:
        """Targets [gn, k] and their entropies [gn]."""
        if self.targets in ("centering", "none"):  # without centering the center stays zero
            return sharpen(scores, self.center.value, temp)
        log_probs = variants.sinkhorn(scores, temp, iterations=3 if self.targets == "sinkhorn" else 1)
        probs = log_probs.exp()
        return probs, -(probs * log_probs).sum(dim=-1)

    @torch.no_grad()
    def update_teacher(self, momentum: float, epoch_ends: bool = False) -> None:
        """After the student's step: exponential moving average of its parameters (not its buffers), or Fig. 6's others.

        "previous-iteration" and "previous-epoch" teachers are what the student was then; "student" is what it is now.
        """
        if self.teacher_is == "momentum":
            self._move(self.teacher, self.student, 1 - momentum)
        elif self.teacher_is == "previous-iteration":
            self._move(self.teacher, self.previous, 1.0)
            self._move(self.previous, self.student, 1.0)
        elif self.teacher_is == "student" or epoch_ends:
            self._move(self.teacher, self.student, 1.0)

    @staticmethod
    def _move(network: nn.Module, towards: nn.Module, share: float) -> None:
        """Parameters of `network` a `share` of the way to those of the same name."""
        there = dict(towards.named_parameters())
        pairs = [(p.data, there[name].data) for name, p in network.named_parameters()]
        own, others = ([pair[i] for pair in pairs] for i in (0, 1))
        torch._foreach_lerp_(own, others, share)  # pyright: ignore[reportPrivateImportUsage]

    def cancel_last_layer_gradients(self) -> None:
        """Keep the prototypes where they are for this step; called after clipping, as in the reference."""
        for name, parameter in self.student.named_parameters():
            if "last_layer" in name:
                parameter.grad = None
