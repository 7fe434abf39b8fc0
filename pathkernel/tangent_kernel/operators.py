"""Kernels as linear operators: K v at sizes where K itself does not fit, for iterative solvers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from pathkernel._typing import Float
from pathkernel.gradients.pytrees import count
from pathkernel.runtime.interrupts import defer_interrupts
from pathkernel.runtime.precision import EXACT_PRODUCTS
from pathkernel.runtime.threads import one_at_a_time
from pathkernel.tangent_kernel.engines.engine import Diagonal, Engine, Samples, number_of_components


@runtime_checkable
class Term(Protocol):
    r"""One tangent kernel of a sum, :math:`w\, J(\theta)\, \mathrm{diag}(d)\, J(\theta)^\top`."""

    @property
    def theta(self) -> Tensor:
        """θ, (P,)."""

    @property
    def weight(self) -> float:
        """w."""

    @property
    def preconditioner(self) -> Diagonal:
        """d, (P,), or None for the identity."""


@dataclass(frozen=True)
class Point:
    """A tangent kernel by itself.

    Attributes
    ----------
    theta, weight, preconditioner
        As of `Term`.
    """

    theta: Tensor
    weight: float = 1.0
    preconditioner: Diagonal = None


class KernelProducts:
    r"""Products of one tangent kernel with vectors, :math:`J_X\, \mathrm{diag}(d)\, J_Y^\top V`.

    Parameters
    ----------
    engine
        Engine of the kernel.
    term
        θ, weight, and d.
    X, Y
        n rows and m columns; Y None stands for X.
    components
        K, numbers that h has.
    memory
        Bytes of activations and signals that may be kept between products.

    Notes
    -----
    Time of a product with D vectors: O((n + m) K D Σ_layers T p q) in matrix products, after passes over the samples
    that are made once where their activations and signals fit into ``memory``, and for every product otherwise.
    """

    def __init__(self, engine: Engine, term: Term, X: Samples, Y: Samples | None, components: int, memory: int) -> None:
        self.term, self.components, self.memory = term, components, engine.memory
        self.full, self.mean = engine.selection.combine == "full", engine.selection.combine == "mean"
        self.device = engine.function.device
        share = memory if Y is None else memory // 2
        self.rows = engine.jacobian(term.theta, X, share)
        self.columns = self.rows if Y is None else engine.jacobian(term.theta, Y, share)
        self.preconditioner = None if term.preconditioner is None else term.preconditioner.double()
        # A sketch has M inside; path kernels, which have one, refuse operators of sketches.
        assert self.rows.sketched is None or self.preconditioner is None

    @property
    def holds(self) -> bool:
        """True where activations and signals, or features, are kept from one product to the next."""
        return self.rows.holds

    def __call__(self, V: Tensor, transposed: bool = False) -> Tensor:
        """K V, or Kᵀ V, float64: V (m, D) → (n, D), for full blocks (m, K, D) → (n, K, D)."""
        total: Tensor | None = None
        V = V.to(self.device)
        left, right = (self.columns, self.rows) if transposed else (self.rows, self.columns)
        # Directions are numbers of P × components × vectors in float64 and once more in the working precision.
        at_once = max(1, self.memory // (48 * (self.rows.sketched or len(self.term.theta))))
        for c in self._components_at_once(at_once):
            results = []
            width = max(1, at_once // (1 if self.full else c.stop - c.start))
            for vectors in V.split(width, dim=-1):
                directions = right.pull(vectors, c)
                if self.preconditioner is not None:
                    directions = directions * self.preconditioner
                results.append(left.push(directions, c))
            own = torch.cat(results, dim=-1)
            total = own if total is None else total.add_(own)
        assert total is not None
        return total * (self.term.weight / (self.components if self.mean else 1))

    def _components_at_once(self, at_once: int) -> list[slice]:
        together = self.full or self.rows.sketched is not None
        step = self.components if together else min(self.components, at_once)
        return [slice(c, min(self.components, c + step)) for c in range(0, self.components, step)]


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
        return {name: value for name, value in vars(self).items() if name != "lock"} | {"_kept": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
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
