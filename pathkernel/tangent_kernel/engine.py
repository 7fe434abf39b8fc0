"""The contract of an engine: a way to compute tangent kernels at one θ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.functional import ModelFunction
from pathkernel.tangent_kernel.outputs import OutputSelection


class Engine(ABC):
    r"""Contracts per-sample gradients at one θ.

    .. math:: K(x, x') = \langle M \nabla h(x), \nabla h(x') \rangle,\qquad M = \mathrm{diag}(d) \succeq 0

    Parameters
    ----------
    function
        The network.
    selection
        h, and how its components are combined.
    memory
        Bytes that the engine may hold at once, beside inputs and result.
    """

    name: ClassVar[str]

    def __init__(self, function: ModelFunction, selection: OutputSelection, memory: int) -> None:
        self.function, self.selection, self.memory = function, selection, memory

    @abstractmethod
    def gram(
        self, theta: Tensor, X: PyTree, Y: PyTree | None, context_X: PyTree, context_Y: PyTree, diagonal: Tensor | None
    ) -> Tensor:
        """K(X, Y) at θ, float64, (n, m) or (n, m, K, K); exactly symmetric for Y None.

        ``diagonal`` is d, (P,), or None for the identity; ``context`` is what h needs of each sample.
        """

    @abstractmethod
    def diagonal(self, theta: Tensor, X: PyTree, context: PyTree, diagonal: Tensor | None) -> Tensor:
        """K(x, x) for every sample, float64, (n,) or (n, K, K)."""
