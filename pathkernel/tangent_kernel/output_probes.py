r"""Random combinations of the outputs: one gradient a sample in place of C.

For signs r with :math:`E[r r^\top] = I`, the kernel of :math:`h = r \cdot f` is the trace kernel in expectation
(Hutchinson's estimator).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathkernel._typing import Float
from pathkernel.errors import InputError
from pathkernel.tangent_kernel.outputs import OutputSelection


@dataclass(frozen=True, eq=False)
class Combinations:
    """Combinations of the outputs; a single one is a number.

    Attributes
    ----------
    signs
        Their coefficients, (C, k).
    """

    signs: Tensor

    def __call__(self, z: Tensor, _: Any) -> Tensor:
        """zᵀ r."""
        return (z * self.signs[:, 0].to(z)).sum() if self.signs.shape[1] == 1 else z @ self.signs.to(z)


@dataclass(frozen=True)
class OutputProbes:
    r"""Random ±1 combinations of the outputs, drawn afresh at every node of a path: unbiased for the trace kernel.

    .. math:: \frac1k \sum_{j=1}^k \nabla (r_j \cdot f)(x) \cdot \nabla (r_j \cdot f)(x')

    Errors average out over the nodes of a path. The signs of neighbouring nodes are rows of a Hadamard matrix (the
    smallest with C columns or more) in random order, its columns with random signs: over such a stretch of nodes the
    combinations are orthogonal, and a kernel that does not move has no error at all.

    Parameters
    ----------
    count
        k, combinations at each node.
    seed
        Fixes all of them: one kernel object is one function.

    References
    ----------
    Hutchinson 1989, "A stochastic estimator of the trace".
    """

    count: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.count, int) and self.count >= 1 and isinstance(self.seed, int) and self.seed >= 0):
            raise InputError(
                f"`{self!r}` was given",
                "`count` is an integer from 1 upwards, `seed` one from 0 upwards",
                "Write for example `OutputProbes(1)`",
            )

    def signs(self, number: int, outputs: int) -> Float[Tensor, "outputs count"]:
        """r of the node with this number."""
        order = 1 << max(0, outputs - 1).bit_length()
        columns, drawn = np.arange(outputs), []
        for row in range(number * self.count, (number + 1) * self.count):
            generator = np.random.default_rng([self.seed, row // order])
            flips = generator.choice([-1.0, 1.0], outputs)
            own = generator.permutation(order)[row % order]
            # Entry (i, j) of Sylvester's Hadamard matrix is −1 to the number of binary digits that i and j share.
            shared = own & columns
            parity = np.zeros(outputs, dtype=np.int64)
            while shared.any():
                parity, shared = parity ^ (shared & 1), shared >> 1
            drawn.append(flips * (1 - 2 * parity))
        return torch.from_numpy(np.stack(drawn, axis=1))

    def selection(self, number: int, outputs: int) -> OutputSelection:
        """The function of the outputs at the node with this number."""
        signs = self.signs(number, outputs) / self.count**0.5
        name = f"{self.count} random combination{'s' * (self.count > 1)} of the outputs"
        return OutputSelection(name, Combinations(signs), self.count == 1)
