"""Training of an estimator's network, recorded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pathkernel._typing import Loss, PyTree
from pathkernel.gradients.arguments import arguments_of
from pathkernel.gradients.losses import batch_loss
from pathkernel.gradients.pytrees import take
from pathkernel.recording.recorder import KernelRecorder


@dataclass(frozen=True)
class Stopping:
    """Rule by which training stops early.

    Attributes
    ----------
    held_out
        Ids of the samples that are not trained on.
    patience
        After how many epochs without a loss on them that is lower by more than ``tolerance``.
    tolerance
        Of the loss.
    """

    held_out: Tensor
    patience: int
    tolerance: float


@dataclass
class Course:
    """Course of a training.

    Attributes
    ----------
    loss_curve
        Mean loss of the batches of each epoch.
    validation_curve
        Loss of the samples that are held out after each epoch; empty where there are none.
    best
        How many steps had been taken when the loss on what is held out was lowest; None where nothing is.
    """

    loss_curve: list[float] = field(default_factory=list)
    validation_curve: list[float] = field(default_factory=list)
    best: int | None = None


@dataclass(frozen=True)
class Trainer:
    r"""Training of one network on samples in mini-batches.

    Attributes
    ----------
    network, optimizer
        What is trained, and by what.
    loss
        ``(output, target)``, of a batch or one number per sample.
    weights
        Weights of the samples, (N,), or None. Each batch's loss is the weighted mean
        :math:`\sum_i w_i \ell_i / \sum_i w_i`.
    batch_size
        Samples per batch.
    generator
        Source of the order of samples.
    after_epoch
        Called with the course so far; True ends training.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    weights: Tensor | None
    batch_size: int
    generator: torch.Generator
    after_epoch: Callable[[Course], bool] = lambda course: False

    def train(self, recorder: KernelRecorder, ids: Tensor, epochs: int, stopping: Stopping | None = None) -> Course:
        """Train for some epochs on samples of the recorder's data.

        Parameters
        ----------
        recorder
            Watches the optimizer, and has the data.
        ids
            Samples that are trained on.
        epochs
            At most so many.
        stopping
            When to stop before, or None.
        """
        course, data = Course(), recorder.trajectory.data
        lowest, waited, steps = math.inf, 0, 0
        for _ in range(epochs):
            total = 0.0
            self.network.train()
            for batch in ids[torch.randperm(len(ids), generator=self.generator)].split(self.batch_size):
                weights = self._coefficients(batch)
                total += self._step(*recorder.announce(batch, weights), weights) * len(batch)
                steps += 1
            course.loss_curve.append(total / len(ids))
            if stopping is not None:
                found = self._loss_of(*data[stopping.held_out], self._coefficients(stopping.held_out))
                course.validation_curve.append(found)
                waited = 0 if found < lowest - stopping.tolerance else waited + 1
                if found < lowest:
                    lowest, course.best = found, steps
            if self.after_epoch(course) or (stopping is not None and waited >= stopping.patience):
                break
        return course

    def train_once(self, recorder: KernelRecorder, inputs: PyTree, targets: Tensor, first: int) -> float:
        """Train for one epoch on samples that the recorder counts from ``first`` on, and keeps; their mean loss."""
        total = 0.0
        self.network.train()
        for batch in torch.randperm(len(targets), generator=self.generator).split(self.batch_size):
            weights = self._coefficients(batch)
            announced = recorder.announce(batch + first, weights, take(inputs, batch), targets[batch])
            total += self._step(*announced, weights) * len(batch)
        return total / len(targets)

    def _step(self, inputs: PyTree, targets: Tensor, weights: Tensor | None) -> float:
        self.optimizer.zero_grad()
        loss = batch_loss(self.loss, called(self.network, inputs), targets, weights, "mean")
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def _coefficients(self, ids: Tensor) -> Tensor | None:
        """What the loss of each sample of a batch is multiplied by; None for the mean."""
        return None if self.weights is None else self.weights[ids] / self.weights[ids].sum()

    @torch.no_grad()
    def _loss_of(self, inputs: PyTree, targets: Tensor, weights: Tensor | None) -> float:
        self.network.eval()
        return float(batch_loss(self.loss, called(self.network, inputs), targets, weights, "mean"))


def called(network: nn.Module, inputs: PyTree) -> Any:
    """What a network returns for samples, which are its arguments as `KernelRecorder` hands them over."""
    arguments, named = arguments_of(network.forward, inputs)
    return network(*arguments, **named)
