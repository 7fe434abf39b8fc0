"""Operators of kernels, for which scipy's sparse algebra is loaded when the first one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pathkernel.runtime.lazy import imported
from pathkernel.tangent_kernel.engines.engine import Engine, Samples
from pathkernel.tangent_kernel.kernel_products import Term

if TYPE_CHECKING:
    from pathkernel.tangent_kernel.operators import KernelOperator


def kernel_operator(
    terms: Sequence[Term], engine_at: Callable[[Term], Engine], X: Samples, Y: Samples | None, lock: Any
) -> KernelOperator:
    """`pathkernel.tangent_kernel.operators.KernelOperator` of these."""
    imported("scipy.sparse.linalg")  # which no kernel matrix needs
    from pathkernel.tangent_kernel.operators import KernelOperator

    return KernelOperator(terms, engine_at, X, Y, lock=lock)
