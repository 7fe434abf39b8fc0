"""Products of one tangent kernel with vectors, the matrix never formed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pathkernel.tangent_kernel.engines.engine import Diagonal, Engine, Samples


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
