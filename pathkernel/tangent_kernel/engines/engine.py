"""The contract of an engine: a way to compute tangent kernels at one θ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.errors import InputError, check
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.tangent_kernel.outputs import OutputSelection


class Engine(ABC):
    r"""Contracts per-sample gradients at one θ.

    .. math:: K(x, x') = \langle M \nabla h(x), \nabla h(x') \rangle,\qquad M = \mathrm{diag}(d) \succeq 0

    Parameters
    ----------
    function
        The network. In bfloat16 only the factors of matrix products between gradients are rounded to it: passes
        through the network are float32 then.
    selection
        h, and how its components are combined.
    memory
        Bytes that the engine may hold at once, beside inputs and result.
    """

    name: ClassVar[str]

    def __init__(self, function: ModelFunction, selection: OutputSelection, memory: int) -> None:
        check(
            function.dtype in (torch.float64, torch.float32, torch.bfloat16),
            InputError,
            f"`dtype={function.dtype}` was given",
            "Kernels are computed in float64, in float32, or in float32 with matrix products of bfloat16 factors",
            "Write `dtype=torch.float32`",
        )
        self.products, self.selection, self.memory = function.dtype, selection, memory
        # Gradients rounded to 8 bits on their way back would be of no use; their inner products average errors out.
        self.function = function.converted(torch.float32) if function.dtype == torch.bfloat16 else function

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


def check_budget(needed: float, memory: int, of: str) -> None:
    """Refuse a budget that does not hold the least that a computation can do with, before it begins.

    Raises
    ------
    InputError
        With both sizes.
    """
    check(
        needed <= memory,
        InputError,
        f"One sample takes {needed / 1e6:.3g} MB ({of}), and the budget is {memory / 1e6:.3g} MB",
        "A budget has to hold at least one sample; it is kept, not exceeded in silence",
        f'Write `memory="{max(1, round(4 * needed / 1e6))}MB"` or more',
    )
