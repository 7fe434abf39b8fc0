"""Products with a Jacobian that is never formed: gradients added up, and derivatives along directions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pathkernel._typing import Float, PyTree
from pathkernel.gradients.forward_derivatives import push_forward
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.per_sample import leaf_parameters, pulled_back, values_of
from pathkernel.gradients.pytrees import blocks, count, take
from pathkernel.tangent_kernel.outputs import OutputSelection


class JacobianProducts(ABC):
    r"""The Jacobian J of h at one θ, (n, K, P), as two linear maps.

    Where the kernel is a sum over components, :math:`J_k J_k^\top`, each component c has a direction of its own; for
    ``"full"`` blocks all components share one.
    """

    holds: bool = False
    """True where something is kept from one product to the next."""

    sketched: int | None = None
    """Length of a direction where gradients are sketched, all components at once; None where it is P."""

    @abstractmethod
    def pull(self, weights: Tensor, components: slice) -> Float[Tensor, "K D P"]:
        """Gradients added up: Σ_i v_id ∇h_c(x_i) for c in ``components``, float64.

        ``weights`` is v, (n, D); for full blocks (n, K, D), and the result, (1, D, P), is over all components.
        """

    @abstractmethod
    def push(self, directions: Float[Tensor, "K D P"], components: slice) -> Tensor:
        """Derivatives along directions: Σ_c ⟨∇h_c(x_i), u_cd⟩, float64, (n, D); for full blocks (n, K, D)."""


class PlainJacobianProducts(JacobianProducts):
    """A reverse and a forward pass of the batch for each component and vector. Right for any model; memory O(P).

    Parameters
    ----------
    function, selection, theta
        Network, h and θ.
    X, context
        n samples and what h needs of each.
    block
        Samples per sweep.
    """

    def __init__(
        self,
        function: ModelFunction,
        selection: OutputSelection,
        theta: Float[Tensor, " P"],
        X: PyTree,
        context: PyTree,
        block: int = 256,
    ) -> None:
        self.function, self.selection, self.context = function, selection, context
        self.point, self.X = function.cast(theta), function.cast(X)
        self.full, self.pieces = selection.combine == "full", list(blocks(count(X), block))

    def _components(self, theta: Tensor, piece: slice) -> Tensor:
        """h of some samples, (n, K), as a function of θ."""
        outputs = self.function.batch(self.function.layout.unflatten(theta), take(self.X, piece))
        return values_of(self.selection.function, outputs, take(self.context, piece))

    def pull(self, weights: Tensor, components: slice) -> Tensor:
        """Gradients added up, by reverse passes."""
        chosen = [None] if self.full else list(range(components.start, components.stop))
        result = torch.zeros(
            len(chosen), weights.shape[-1], len(self.point), dtype=torch.float64, device=self.point.device
        )
        with self.function.evaluating(gradients=True), self.function.kept():
            for piece in self.pieces:
                leaves = leaf_parameters(self.function, self.point)
                outputs = self.function.batch(leaves, take(self.X, piece))
                values = values_of(self.selection.function, outputs, take(self.context, piece))
                for place, c in enumerate(chosen):
                    for d in range(weights.shape[-1]):
                        cotangent = torch.zeros_like(values)
                        cotangent[:, slice(None) if c is None else c] = weights[piece, ..., d].to(values)
                        gradients = pulled_back(leaves, values, cotangent, retain=True)
                        result[place, d] += self.function.layout.flatten(gradients)
        return result

    def push(self, directions: Tensor, components: slice) -> Tensor:
        """Derivatives along directions, by forward passes."""
        return torch.cat([self._pushed(directions, components, piece) for piece in self.pieces])

    def _pushed(self, directions: Tensor, components: slice, piece: slice) -> Tensor:
        function: Callable[[Tensor], Tensor] = partial(self._components, piece=piece)
        along = directions.to(self.point)
        with self.function.evaluating(), self.function.kept():
            if self.full:
                return torch.stack([push_forward(function, self.point, u).double() for u in along[0]], dim=-1)
            chosen = range(components.start, components.stop)
            return torch.stack(
                [
                    sum(push_forward(function, self.point, along[i, d])[:, c].double() for i, c in enumerate(chosen))  # type: ignore[misc]
                    for d in range(along.shape[1])
                ],
                dim=-1,
            )
