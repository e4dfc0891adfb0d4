"""Many linear classifiers trained at once on the same features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dino import schedules
from dino.data.order import order_epoch
from dino.features.extract import Pooling
from dino.features.neighbors import split_rows
from dino.options.evaluate import LinearOptions
from dino.randomness import open_weights
from dino.terminal import Terminal

Columns = Mapping[Pooling, tuple[int, int]]  # first and last + 1 column of each pooling in the features


class Sweep:
    """Linear classifiers for each pooling, learning rate and decay, as one matrix per pooling.

    Each is trained as if it were alone, by SGD with momentum 0.9. Weights start from N(0, 0.01), the same for all
    classifiers of a pooling, and biases from 0.

    Args:
        rates: learning rates, for the batch size at hand; decays: factors of the L2 penalty, which includes the bias.
        sum_: sums over the ranks. Needed if each rank steps on its share of the batch only.
    """

    def __init__(
        self,
        columns: Columns,
        rates: Sequence[float],
        decays: Sequence[float],
        num_classes: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        sum_: Callable[[Tensor], Tensor] = lambda share: share,
    ):
        self.sum_ = sum_
        self.columns, self.num_classes = columns, num_classes
        self.points = [(rate, decay) for rate in rates for decay in decays]

        both = torch.tensor(self.points, dtype=dtype, device=device).T.repeat_interleave(num_classes, dim=1)
        self.rates, self.decays = both  # [classifiers * classes]
        self.weights: dict[Pooling, Tensor] = {}  # [columns + 1, classifiers * classes]; the last row is the bias
        for name, (first, last) in columns.items():
            draws = open_weights(seed)
            first_weights = torch.zeros(last - first + 1, num_classes)
            first_weights[:-1].normal_(0, 0.01, generator=draws)
            self.weights[name] = first_weights.to(device, dtype).repeat(1, len(self.points))
        self.momenta = {name: torch.zeros_like(w) for name, w in self.weights.items()}

    def scores(self, name: Pooling, features: Tensor) -> Tensor:
        """[n, classifiers, classes] of features [n, all columns]."""
        first, last = self.columns[name]
        w = self.weights[name]
        return torch.addmm(w[-1], features[:, first:last], w[:-1]).unflatten(1, (len(self.points), self.num_classes))

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, count: int, scale: float) -> Tensor:
        """One step of all classifiers on this rank's share of a batch of `count` images; the least of their mean losses.

        Args:
            scale: factor of the schedule on all learning rates.
        """
        best = features.new_full((), torch.inf)
        rows = torch.arange(len(labels), device=labels.device)
        for name, (first, last) in self.columns.items():
            log_p = self.scores(name, features).log_softmax(dim=-1)
            loss = self.sum_(-log_p[rows, :, labels].sum(dim=0) / count)
            best = torch.minimum(best, loss.nan_to_num(torch.inf).min())
            # The gradient of softmax cross-entropy in closed form needs no autograd graph.
            residual = log_p.exp_()
            residual[rows, :, labels] -= 1
            flat = residual.flatten(1) / count
            gradient = torch.cat([features[:, first:last].T @ flat, flat.sum(dim=0, keepdim=True)])
            w, momentum = self.weights[name], self.momenta[name]
            momentum.mul_(0.9).add_(self.sum_(gradient)).add_(self.decays * w)
            w.sub_(scale * self.rates * momentum)
        return best

    @torch.no_grad()
    def top1(self, name: Pooling, features: Tensor, labels: Tensor) -> list[float]:
        """Accuracy of each classifier of a pooling, percent."""
        device = self.rates.device
        hits = torch.zeros(len(self.points), device=device)
        for rows in split_rows(len(features), len(self.points) * self.num_classes):
            predicted = self.scores(name, features[rows].to(device)).argmax(dim=-1)
            hits += (predicted == labels[rows].to(device)[:, None]).sum(dim=0)
        return (100 * hits.cpu().double() / len(features)).tolist()

    def head(self, name: Pooling, point: int) -> dict[str, Tensor]:
        """One classifier as the weights of a linear layer: weight [classes, columns], bias [classes]."""
        chosen = self.weights[name].unflatten(1, (len(self.points), self.num_classes))[:, point].cpu()
        return {"weight": chosen[:-1].T.contiguous(), "bias": chosen[-1].clone()}


def train_sweep(
    sweep: Sweep, features: Tensor, labels: Tensor, options: LinearOptions, device: torch.device, say: str
) -> None:
    """Train all classifiers on features [n, d] in memory. Every rank does the same, to the bit.

    Args:
        say: what is trained, for the progress line.
    """
    batch = min(options.batch_size, len(features))
    terminal = Terminal()
    terminal.start(0, options.epochs)
    try:
        for epoch in range(options.epochs):
            order = torch.from_numpy(order_epoch(options.seed, epoch, len(features)))
            scale = schedules.cosine(epoch, options.epochs, 1.0, 0.0)
            loss = None
            for rows in order.split(batch):
                loss = sweep.step(features[rows].to(device), labels[rows].to(device), len(rows), scale)
            if terminal.live and loss is not None:
                terminal.update(epoch + 1, f"epoch {epoch + 1}/{options.epochs}", f"{say}, loss {loss.item():.4f}")
    finally:
        terminal.stop()
