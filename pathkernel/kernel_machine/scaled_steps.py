r"""Steps that only scale the gradient, u = a q: pieces of the queries' gradients meet those of the batch.

.. math:: \mathrm{share}_i = \sum_s a_s \langle q_s, g_{s,i}\rangle

No step needs P numbers a query; products of consecutive steps that were run together are taken together as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pathkernel._typing import Float
from pathkernel.gradients.factored import FactoredGradients
from pathkernel.gradients.inner_products import contracted, paired_names
from pathkernel.gradients.layers.stacked_pieces import StackedPieces
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.kernel_machine.accumulator import Accumulator
from pathkernel.kernel_machine.adjoint import StepAdjoint
from pathkernel.kernel_machine.step_contributions import Contributions, StepGradients
from pathkernel.trajectory.coupled_samples import CoupledSamples
from pathkernel.trajectory.stage_gradients import ROUNDING
from pathkernel.trajectory.step import Step


class ScaledSteps:
    """Contracts the steps of one backward sweep that only scale the gradient.

    Parameters
    ----------
    layout
        Where each parameter lies in θ.
    accumulator
        Of the sweep.
    scratch
        Bytes for inner products of pairs.
    """

    def __init__(self, layout: ParameterLayout, accumulator: Accumulator, scratch: int) -> None:
        self.layout, self.accumulator, self.scratch = layout, accumulator, scratch
        self._paired: tuple[StackedPieces, StackedPieces, set[str]] | None = None
        self._rests: list[_Rest] = []

    def rates(
        self,
        adjoint: StepAdjoint,
        step: Step,
        q: FactoredGradients,
        parts: Iterable[FactoredGradients | CoupledSamples],
    ) -> dict[str, float]:
        """The rate of each parameter that is only scaled, where pieces are best met in pairs; often all or none."""
        formed = [part for part in parts if isinstance(part, FactoredGradients)]
        rates: dict[str, float] = {}
        for name in step.active:
            linear = adjoint.linear(name)
            if linear is None or linear.rate is None:
                return {}
            rates[name] = linear.rate
        # A weight goes with its bias, also where one of the two stays as it is (frozen, or without a gradient).
        rates |= {name: 0.0 for name in self.layout.names if name not in step.active}
        return {name: rates[name] for name in self._paired_names(q, formed) if name in rates}

    def _paired_names(self, q: FactoredGradients, formed: list[FactoredGradients]) -> set[str]:
        """`paired_names`, found once for steps that were run together: their pieces have one form."""
        if q.stack is None or len(formed) != 1 or formed[0].stack is None:
            return paired_names(q, formed)
        own, other = q.stack[0], formed[0].stack[0]
        if self._paired is None or self._paired[0] is not own or self._paired[1] is not other:
            self._paired = own, other, paired_names(q, formed)
        return self._paired[2]

    def contract(
        self, step: Step, q: FactoredGradients, rates: dict[str, float], received: StepGradients, total: Contributions
    ) -> None:
        """Add the products of a step whose batches are held at once."""
        begin = 0
        scale = self.scale(rates)
        for part in received.stage.parts:
            assert isinstance(part, FactoredGradients)
            self.contract_part(q, rates, scale, received, total, begin, part)
            begin += len(part)
        self.contract_channels(step, q, scale, received, total)

    def scale(self, rates: dict[str, float]) -> float | Tensor:
        """Rates of all entries of θ, zero where there is none, (P,); one number where they are all the same."""
        different = set(rates.values())
        if len(different) == 1 and len(rates) == len(self.layout.names):
            return different.pop()
        scale = torch.zeros(self.layout.size, dtype=torch.float64, device=self.accumulator.quadrature_error.device)
        for name, rate in rates.items():
            scale[self.layout.slices[name]] = rate
        return scale

    def contract_part(
        self,
        q: FactoredGradients,
        rates: dict[str, float],
        scale: float | Tensor,
        received: StepGradients,
        total: Contributions,
        begin: int,
        part: FactoredGradients,
    ) -> None:
        """Add the products with some of the samples, the first of which has the place ``begin``."""
        factor = received.stage.factor
        assert isinstance(factor, float | int)
        products = contracted(q, part, rates, self.scratch)
        if q.multiples is not None and q.direction is not None:
            if q.stack is not None and part.stack is not None and q.stack[0].directions is not None:
                part.stack[0].meet(q.stack[0].directions)
            along = (part @ q.direction) * scale if isinstance(scale, float) else part @ (scale * q.direction)
            products.addr_(q.multiples, along)
        total.add_rows(begin, products.T, factor)

    # -- what came from elsewhere than samples -----------------------------------------------------------------

    def contract_channels(
        self, step: Step, q: FactoredGradients, scale: float | Tensor, received: StepGradients, total: Contributions
    ) -> None:
        """Add the products with what came to the gradient under a name; rounding is gathered over some steps."""
        names, vectors = list(received.names), list(received.vectors)
        places = list(range(len(received.owners), len(received.owners) + len(names)))
        if q.stack is not None and ROUNDING in names:
            place = names.index(ROUNDING)
            self._gather(q, vectors[place], scale, step.before)
            del names[place], vectors[place], places[place]
        for place, products in zip(places, self._products(q, vectors, scale), strict=True):
            total.add_rows(place, products[None])

    @staticmethod
    def _products(q: FactoredGradients, vectors: list[Tensor], scale: float | Tensor) -> Iterable[Tensor]:
        """u · v of each vector, (Q,)."""
        if not vectors:
            return ()
        matrix = torch.stack(vectors, dim=1)
        found = (q @ matrix) * scale if isinstance(scale, float) else q @ (matrix * scale[:, None])
        return found.unbind(dim=1)

    def _gather(self, q: FactoredGradients, vector: Tensor, scale: float | Tensor, theta: Tensor) -> None:
        """Gather what rounding left of the gradients of steps that were run together, until the last of them."""
        assert q.stack is not None
        if self._rests and self._rests[-1].stack is not q.stack[0]:
            self.settle()
        self._rests.append(_Rest(q, vector, scale, theta, q.stack[0]))
        if q.stack[1] + 1 == len(q.stack[0]):
            self.settle()

    def settle(self) -> None:
        """Add the products with what rounding left, as far as it was gathered.

        Below the rounding of θ itself, the sum of a few is met with the gradients of the last of these steps: they are
        others there by as much as these steps change them, which is a trifle of a rounding.
        """
        rests, self._rests = self._rests, []
        if not rests:
            return
        last, channels = rests[-1], self.accumulator.channels
        together = torch.zeros_like(last.vector)
        for rest in rests:
            together.add_(rest.vector * rest.scale if isinstance(rest.scale, Tensor) else rest.vector, alpha=rest.rate)
        epsilon = torch.finfo(last.theta.dtype).eps
        if bool(together.norm() <= len(rests) * epsilon * last.theta.double().norm()):
            channels[ROUNDING] += last.q @ together
            return
        for rest in rests:
            for products in self._products(rest.q, [rest.vector], rest.scale):
                channels[ROUNDING] += products


@dataclass(frozen=True)
class _Rest:
    """What rounding left of the gradient of a step, and what it meets.

    Attributes
    ----------
    q
        Weights of the queries.
    vector
        The rest, (P,).
    scale
        The rate of the step, of each entry or of all.
    theta
        θ before the step.
    stack
        Which steps were run together.
    """

    q: FactoredGradients
    vector: Float[Tensor, " P"]
    scale: float | Tensor
    theta: Float[Tensor, " P"]
    stack: StackedPieces

    @property
    def rate(self) -> float:
        """The rate where it is one number; 1 beside one that is not."""
        return 1.0 if isinstance(self.scale, Tensor) else self.scale
