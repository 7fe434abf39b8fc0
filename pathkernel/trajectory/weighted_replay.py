"""A recorded run that is trained again, with a weight for the loss of each sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from pathkernel._typing import PyTree
from pathkernel.gradients.returned import map_outputs
from pathkernel.runtime.checksum import checksum
from pathkernel.runtime.precision import EXACT_PRODUCTS
from pathkernel.trajectory.retraining import Replay
from pathkernel.trajectory.run import Run
from pathkernel.trajectory.step import MicroBatch, Step


class WeightedReplay(Replay):
    """A replay in which the loss of each sample counts with a weight of its own.

    Attributes
    ----------
    weights
        (N,) by sample id; None for weights of one.
    """

    weights: Tensor | None = None

    def advance(self, step: Step, divisor: int) -> None:
        """Take a step from where the replay stands, with the gradients found there, and write nothing down.

        Parameters
        ----------
        step
            The step, of which batches and settings are read.
        divisor
            By what the loop divided the loss of each micro-batch.
        """
        with EXACT_PRODUCTS.lifted():
            self.differentiate(step, divisor)
            self.step_optimizer(step)

    def step_optimizer(self, step: Step) -> None:
        """Let the optimizer step with the gradients at hand."""
        self._stepping(step).step()

    def gradient_checksum(self) -> int:
        """CRC32C of the gradients at hand."""
        return checksum(self._gradients())

    def vector(self) -> Tensor:
        """θ where the replay stands, (P,)."""
        found = {name: parameter.detach() for name, parameter in self._parameters.items()}
        return self.run.layout.flatten(found, self.run.dtype)

    def _weighted(self, outputs: PyTree, batch: MicroBatch) -> PyTree:
        if self.weights is None or batch.source is not None:  # samples that are not of the data have no weight
            return outputs
        rows = self.weights[batch.ids]

        def weigh(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                own = rows.reshape(-1, *(1,) * (leaf.dim() - 1))
                leaf.register_hook(lambda slope: slope * own.to(slope))
            return leaf

        return map_outputs(weigh, outputs)


R = TypeVar("R", bound=WeightedReplay)


@dataclass(frozen=True, eq=False)
class Retraining:
    """A recorded run as it is trained again: its steps without their vectors, and where it begins.

    Attributes
    ----------
    run
        The run as it began.
    kind, constants
        Class of the optimizer, and the constants of its copy; see `pathkernel.trajectory.retraining.Replay`.
    state
        The optimizer's state before the first step, by parameter name; empty for a fresh one.
    steps
        Batches and settings, step by step.
    divisors
        By what the loop divided the loss of each micro-batch, step by step.
    """

    run: Run
    kind: type[Optimizer]
    constants: Mapping[str, Any] | None
    state: Mapping[str, Mapping[str, Any]]
    steps: tuple[Step, ...]
    divisors: tuple[int, ...] = ()

    def replay(self, made: type[R]) -> R:
        """A replay at θ_0, of a kind."""
        replay = made(self.run, self.kind, self.constants)
        replay.restore(self.run.initial, self.state)
        return replay

    def trained(self, weights: Tensor) -> Tensor:
        """θ_S under weights (N,), (P,), by the plain replay."""
        replay = self.replay(WeightedReplay)
        replay.weights = weights
        for step, divisor in zip(self.steps, self.divisors, strict=True):
            replay.advance(step, divisor)
        return replay.vector()
