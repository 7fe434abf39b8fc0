"""Kernels as linear operators: K v at sizes where K itself does not fit, for iterative solvers.

Imported where an operator is asked for: scipy.sparse takes its time to load, and a kernel matrix needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator

from pathkernel._typing import Float
from pathkernel.gradients.pytrees import count
from pathkernel.runtime.interrupts import defer_interrupts
from pathkernel.runtime.precision import EXACT_PRODUCTS
from pathkernel.runtime.threads import one_at_a_time
from pathkernel.tangent_kernel.engines.engine import Engine, Samples, number_of_components
from pathkernel.tangent_kernel.kernel_products import KernelProducts, Term


class KernelOperator(LinearOperator):
    r"""A sum of tangent kernels, :math:`\sum_s w_s J_s\, \mathrm{diag}(d_s) J_s^\top`, as a scipy operator.

    What `scipy.sparse.linalg.cg`, ``eigsh``, ``lobpcg`` and ``svds`` take: shape (n, m), or (n K, m K) for full
    blocks; float64; products with one vector or several at once. Of the samples with themselves it is symmetric and
    positive semi-definite (to the rounding of the kernel's floating type).

    Parameters
    ----------
    terms
        Points of the path with their weights.
    engine_at
        The engine for a term.
    X, Y
        n rows and m columns; Y None stands for X.
    memory
        Bytes of activations and signals that may be kept between products, over all terms.
    lock
        Of the kernel that it is of; see `pathkernel.runtime.threads.one_at_a_time`.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> from scipy.sparse.linalg import eigsh
    >>> K = pk.TangentKernel(torch.nn.Linear(2, 1)).operator(torch.eye(2))
    >>> eigsh(K, k=1, return_eigenvectors=False).round(4).tolist()  # of [[2, 1], [1, 2]]
    [3.0]
    """

    def __init__(
        self,
        terms: Sequence[Term],
        engine_at: Callable[[Term], Engine],
        X: Samples,
        Y: Samples | None = None,
        memory: int | None = None,
        lock: Any = None,
    ) -> None:
        self.terms, self.engine_at, self.X, self.Y = terms, engine_at, X, Y
        engine = engine_at(terms[0])
        self.lock = engine.function.lock if lock is None else lock
        self.memory = (engine.memory if memory is None else memory) // len(terms)
        self.components = number_of_components(engine, terms[0].theta, *X)
        self.inner = self.components if engine.selection.combine == "full" else 0
        n, m = count(X[0]), count(X[0] if Y is None else Y[0])
        super().__init__(np.float64, (n * max(1, self.inner), m * max(1, self.inner)))
        self._kept: dict[int, KernelProducts] = {}

    def __getstate__(self) -> dict[str, Any]:
        # scipy keeps the module of the arrays it is for in some versions, which no process can send to another.
        kept = {k: v for k, v in vars(self).items() if k != "lock" and not isinstance(v, ModuleType)}
        return kept | {"_kept": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__init__(state["dtype"], state["shape"])
        self.__dict__.update(state)
        self.lock = self.engine_at(self.terms[0]).function.lock

    def _products(self, index: int) -> KernelProducts:
        """Products of one term; kept where they hold activations and signals."""
        if index in self._kept:
            return self._kept[index]
        term = self.terms[index]
        made = KernelProducts(self.engine_at(term), term, self.X, self.Y, self.components, self.memory)
        if made.holds:
            self._kept[index] = made
        return made

    @one_at_a_time
    @defer_interrupts(divisible=True)
    @EXACT_PRODUCTS
    def apply(self, V: Float[np.ndarray, "columns D"], transposed: bool = False) -> Float[np.ndarray, "rows D"]:
        """K V, or Kᵀ V."""
        vectors = torch.tensor(np.asarray(V), dtype=torch.float64)
        if self.inner:
            vectors = vectors.reshape(-1, self.inner, vectors.shape[1])
        products = [self._products(index)(vectors, transposed) for index in range(len(self.terms))]
        return torch.stack(products).sum(dim=0).flatten(0, -2).cpu().numpy()

    def _matmat(self, V: np.ndarray) -> np.ndarray:
        return self.apply(V)

    def _rmatmat(self, V: np.ndarray) -> np.ndarray:
        return self.apply(V, transposed=self.Y is not None)

    def _matvec(self, v: np.ndarray) -> np.ndarray:
        return self.apply(np.asarray(v).reshape(-1, 1)).reshape(-1)

    def _rmatvec(self, v: np.ndarray) -> np.ndarray:
        return self._rmatmat(np.asarray(v).reshape(-1, 1)).reshape(-1)
