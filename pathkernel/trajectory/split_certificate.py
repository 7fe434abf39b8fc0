"""Certificate that the rows of a batch belong to its samples, measured by running batches forward."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, PyTree
from pathkernel.gradients.forward_state import hashable
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.per_sample import ROW_LIMIT, error_of_rows
from pathkernel.trajectory.step import MicroBatch, Step
from pathkernel.trajectory.trajectory import Trajectory

DIRECTIONS = 3
"""Random directions in which the rows of a batch are compared with the batch run forward."""

AUTOCAST_LIMIT = 5e-2
"""Difference of rows under automatic mixed precision that is rounding: forward and backward passes round apart."""


class EngineReplaced(Exception):
    """Rows of a batch were seen not to be its samples': everything is to be computed again, with other rows."""


@dataclass
class SplitCertificate:
    r"""Measure of how well the rows of a run's batches belong to their samples, measured on some of them.

    .. math:: \max_i \lvert \langle row_i, v\rangle - \lambda_i \cdot (J v)_i \rvert
              \,/\, \max_i \lvert \lambda_i \cdot (J v)_i \rvert

    Where shares are made by forward sweeps (`pathkernel.trajectory.coupled_samples`), i runs over a few distinct
    samples and the sum over all others.

    Attributes
    ----------
    error
        The worst of three random directions v (of those in use, once shares are made by forward sweeps) and of all
        batches measured; NaN where torch has no way to J v.
    batches
        How many were measured.
    limit
        Up to which it is rounding, in the arithmetic of the batches.
    engines
        How rows were formed: ``"layerwise"``, ``"jacobian"``, ``"autograd"``.
    steps, told
        Gradients that were compared with those of their samples, and in how many of these a wrong sample would have
        been seen: not where clipping leaves signs alone, or where all came under the name of a channel.
    """

    error: float = math.nan
    batches: int = 0
    limit: float = 0.0
    engines: set[str] = field(default_factory=set)
    steps: int = 0
    told: int = 0

    def compared(self, told: bool) -> None:
        """Add a gradient."""
        self.steps += 1
        self.told += told

    @property
    def samples_checked(self) -> float:
        """Part of the gradients in which a wrong sample would have been seen; NaN where none was compared."""
        return self.told / self.steps if self.steps else math.nan

    def note(self, error: float, limit: float) -> None:
        """Add a batch."""
        self.limit = max(self.limit, limit)
        if math.isfinite(error):
            self.error = error if math.isnan(self.error) else max(self.error, error)
            self.batches += 1


class SplitCheck:
    """Rows of some batches, held against the batches run forward.

    Parameters
    ----------
    trajectory
        The record.
    coupled
        Whether rows are formed by reverse sweeps of whole batches from the beginning.

    Attributes
    ----------
    coupled
        The same, now: it becomes true when other rows were seen not to be their samples'.
    certificate
        What was measured.
    """

    def __init__(self, trajectory: Trajectory, coupled: bool) -> None:
        self.trajectory = trajectory
        self.coupled = coupled
        self.certificate = SplitCertificate()
        self._measured: set[Any] = set()

    def is_due(self, step: Step, batch: MicroBatch, inputs: PyTree) -> bool:
        """True where the rows of a batch are compared with the batch run forward.

        At steps 0, 16, 256, … and the last, and wherever samples of another shape or number, or another mode, come
        first; once for each batch, however often the record is passed.
        """
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        kind = hashable(batch.state.modes), self.coupled, *((leaf.shape, leaf.dtype) for leaf in leaves)
        power = step.index > 1 and step.index & (step.index - 1) == 0 and step.index.bit_length() % 4 == 1
        due = step.index == 0 or power or step.index == len(self.trajectory) - 1 or kind not in self._measured
        if not due or (key := (step.index, batch.source, tuple(batch.ids.reshape(-1).tolist()))) in self._measured:
            return False
        self._measured |= {key, kind}
        return True

    def measure(
        self,
        function: ModelFunction,
        point: Tensor,
        inputs: PyTree,
        cotangents: Tensor,
        directions: Float[Tensor, "D P"],
        found: Float[Tensor, "n D"],
        low: bool,
    ) -> None:
        """Compare ⟨row, v⟩ for directions v with the same samples run forward, in few bits (``low``) or not.

        Raises
        ------
        EngineReplaced
            When rows are not their samples'; they come from reverse sweeps of whole batches then.
        """
        error = error_of_rows(function, point, inputs, directions, found.unsqueeze(1), cotangents.unsqueeze(1))
        limit = AUTOCAST_LIMIT if low else row_limit(function)
        if error > limit and not self.coupled:
            raise self.replaced()
        self.certificate.note(error, limit)

    def certify(self, error: float, limit: float) -> None:
        """Add what was measured of forward sweeps whose shares are used.

        Raises
        ------
        EngineReplaced
            When they are seen not to be the rows' products.
        """
        if not error <= limit:
            raise self.anew()
        self.certificate.note(error, limit)

    def replaced(self) -> EngineReplaced:
        """Form rows by reverse sweeps of whole batches from now on, which are right for every network."""
        self.coupled = True
        return self.anew()

    def anew(self) -> EngineReplaced:
        """Forget what was measured: everything is to be computed again."""
        self.certificate = SplitCertificate()
        self._measured = set()
        return EngineReplaced()


def row_limit(function: ModelFunction) -> float:
    """Difference of rows, relative to the largest, that is rounding in the arithmetic of a network."""
    return ROW_LIMIT[torch.promote_types(function.dtype, torch.float32)]
