"""DINO: self-distillation with no labels (Caron et al. 2021), in the order and the words of the paper's Algorithm 1.

    gs, gt: student and teacher networks        C: centre [K]        tps, tpt: temperatures        l, m: momenta
    gt.params = gs.params
    for x in loader:
        x1, x2 = augment(x), augment(x)           `dino.data` (with multi-crop: 2 global and several local views)
        s1, s2 = gs(x1), gs(x2)                   `Network.forward`: one backbone pass per resolution
        t1, t2 = gt(x1), gt(x2)
        loss = H(t1, s2)/2 + H(t2, s1)/2          `DINO.forward`: `Centre`, `sharpen`, `cross_entropy`
        loss.backward(); update(gs)               the engine: autograd and an optimiser
        gt.params = l*gt.params + (1-l)*gs.params `DINO.update_teacher`
        C = m*C + (1-m)*cat([t1, t2]).mean(dim=0) `Centre.update` (used before it is updated)

Plain PyTorch: neither options nor data are known here. Letters: n images, v views (the g global ones first),
k prototypes.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino import distributed

Targets = Literal["centring", "none"]


class Network(nn.Module):
    """g = h o f: a backbone and a projection head (section 3.1)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, groups: list[Tensor]) -> Float[Tensor, "vn k"]:
        """Prototype scores of view-major groups of equal resolution: one backbone pass each, one head pass for all."""
        return self.head(torch.cat([self.backbone(group) for group in groups]))


def _at_least_float32(scores: Tensor) -> Tensor:
    """Softmaxes over thousands of prototypes are taken in float32 whatever the networks compute in."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


class Centre(nn.Module):
    """Centring (Eq. 4): a moving mean of the teacher's outputs, over all ranks, subtracted from them."""

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
    scores: Float[Tensor, "gn k"], centre: Float[Tensor, " k"], temp: float
) -> tuple[Float[Tensor, "gn k"], Float[Tensor, " gn"]]:
    """The teacher's distribution softmax((scores - centre) / temp) and its entropy in nats (Eq. 1, section 3.1)."""
    logits = (_at_least_float32(scores) - centre) / temp
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
    total = targets.sum(dim=0)
    matched = ((total - targets) * x[:g]).sum()
    normaliser = (g - 1) * lse[:g].sum()
    if v > g:
        matched = matched + (total * x[g:].sum(dim=0)).sum()
        normaliser = normaliser + g * lse[g:].sum()
    pairs = g * (v - 1)
    return (normaliser - matched) / (n * pairs)


class Step(NamedTuple):
    """What one step computes; all but the loss detached, on the device, in nats where they are entropies."""

    loss: Float[Tensor, ""]
    entropy: Float[Tensor, ""]  # mean entropy of the teacher's targets; KL = loss - entropy (section 5.3)
    usage: Float[Tensor, ""]  # entropy of the mean target: ln K when all prototypes are used alike
    centre_norm: Float[Tensor, ""]


class DINO(nn.Module):
    """Student, teacher and centre.

    The teacher is a copy of the student that gets no gradients; it has no stochastic depth (`teacher_backbone` is the
    backbone built without it) and stays in training mode as in the reference.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network,
        out_dim: int,
        student_temp: float = 0.1,
        centre_momentum: float = 0.9,
        targets: Targets = "centring",
    ):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.centre = Centre(out_dim, centre_momentum)
        self.student_temp, self.targets = student_temp, targets
        teacher.load_state_dict(student.state_dict())
        teacher.requires_grad_(False)

    def forward(self, groups: list[Tensor], teacher_temp: float) -> Step:
        """The loss of one batch.

        Args:
            groups: views of equal resolution, view-major [v_r * n, c, s, s]; the first group is the 2 global views.
            teacher_temp: temperature of the teacher at this epoch.
        """
        with torch.no_grad():
            teacher_scores = self.teacher(groups[:1])
            probs, entropy = sharpen(teacher_scores, self.centre.value, teacher_temp)
        student_scores = self.student(groups)
        targets = probs.unflatten(0, (2, -1))
        n = targets.shape[1]
        loss = cross_entropy(student_scores.unflatten(0, (-1, n)), targets, self.student_temp)
        if self.targets == "centring":
            self.centre.update(teacher_scores)
        mean_target = probs.mean(dim=0)
        return Step(
            loss=loss,
            entropy=entropy.mean(),
            usage=torch.special.entr(mean_target).sum(),
            centre_norm=self.centre.value.norm(),
        )

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Exponential moving average of the student's parameters (not its buffers), after the student's step."""
        teacher, student = [[p.data for p in net.parameters()] for net in (self.teacher, self.student)]
        torch._foreach_lerp_(teacher, student, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]

    def cancel_last_layer_gradients(self) -> None:
        """Keep the prototypes where they are for this step; called after clipping, as in the reference."""
        for name, parameter in self.student.named_parameters():
            if "last_layer" in name:
                parameter.grad = None
