r"""Features of a path kernel: a vector φ(x) of chosen dimension for every sample, added up over the nodes of the path.

.. math:: \varphi(x) = \sum_s \sqrt{\omega_s}\, S_s\, \nabla f(x; \theta_s), \qquad E[\varphi(x) \cdot \varphi(x')] =
          K(x, x')

with an independent random map S_s at every node, so that what different nodes have in common is zero in expectation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathkernel._typing import Float, PyTree
from pathkernel.path_kernel.nodes import PathNode
from pathkernel.tangent_kernel.engines.projection import ProjectionEngine
from pathkernel.tangent_kernel.measured_error import MeasuredError
from pathkernel.tangent_kernel.outputs import OutputSelection
from pathkernel.tangent_kernel.tangent_kernel import learn_structure, split_samples
from pathkernel.trajectory.trajectory import Trajectory


class Features(np.ndarray):
    """An array φ (n, dim) float64 with φφᵀ ≈ K, or (n, C, dim) for ``outputs="full"``; any numpy array otherwise.

    Attributes
    ----------
    error
        How far φφᵀ is from the kernel's own matrix, measured on training samples; None of arrays made from this one.
    """

    error: MeasuredError | None

    @classmethod
    def of(cls, values: np.ndarray, error: MeasuredError | None) -> Features:
        """An array with its error."""
        features = values.view(cls)
        features.error = error
        return features

    def __array_finalize__(self, made_from: Any) -> None:
        self.error = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Features.of, (np.asarray(self), self.error)

    def __deepcopy__(self, memo: dict[int, Any] | None) -> Features:
        return Features.of(np.array(self), self.error)


def features_of(
    nodes: Iterable[tuple[ProjectionEngine, PathNode]], X: PyTree, context: PyTree
) -> Float[Tensor, "n ... dim"]:
    """Σ_s √ω_s φ_s(X), float64."""
    total: Tensor | None = None
    for engine, node in nodes:
        own = engine.features(node.theta, X, context, node.preconditioner) * node.weight**0.5
        total = own if total is None else total.add_(own)
    assert total is not None
    return total


def samples_of_path(
    trajectory: Trajectory, X: PyTree, selection: OutputSelection, dtype: torch.dtype, asker: str
) -> tuple[PyTree, PyTree]:
    """Inputs, shaped and typed as in training, and the context of the output function."""
    if selection.with_targets:
        inputs, targets = split_samples(X, selection, dtype, asker)
        inputs = trajectory.queries(inputs, asker)
        learn_structure(selection, trajectory.function(dtype), trajectory.initial, inputs, targets)
        return inputs, targets
    return split_samples(trajectory.queries(X, asker), selection, dtype, asker)
