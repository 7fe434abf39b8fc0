"""Sources of gradients in factored form: tapes of the network, and rows for what these do not cover."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, PyTree
from pathkernel.errors import check_choice
from pathkernel.gradients.factored import FactoredGradients, accumulation_dtype
from pathkernel.gradients.layers.coverage import ProvedTapes
from pathkernel.gradients.layers.factors import Piece
from pathkernel.gradients.layers.plain import warn_of_rows
from pathkernel.gradients.layers.proofs import TapeProofs
from pathkernel.gradients.layers.proved_stacks import ProvedStacks
from pathkernel.gradients.layers.recorded_passes import RecordedPasses
from pathkernel.gradients.layers.stacked_passes import StackedPasses
from pathkernel.gradients.layers.tape import FAILURES, Tape
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.gradients.per_sample import OutputFunctional, sample_gradients, values_of
from pathkernel.gradients.pytrees import blocks, count, take
from pathkernel.runtime.allocations import Allocations
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.runtime.workspace import Workspace

ROWS = 250_000_000
"""Bytes in which rows are formed at once. A smaller budget is kept by whoever asks for fewer samples. Chosen, not
measured."""

BY_ROWS = ("jacobian", "autograd")
"""Engines that form rows of all parameters."""

ENGINES = ("auto", "layerwise", "jacobian", "autograd")
"""Ways to take gradients, as a user names them."""


def check_engine(engine: str) -> str:
    """Accept one of `ENGINES`.

    Raises
    ------
    InputError
        For any other, with those that there are.
    """
    check_choice("engine", engine, ENGINES, "Engines")
    return engine


class GradientSource:
    """Gradients of functionals of a network's outputs, sample by sample and factored.

    Parameters
    ----------
    function
        The network.
    engine
        ``"auto"`` and ``"layerwise"``: from activations and back-propagated signals, parameters that these do not
        account for as rows; ``"jacobian"``: all as rows, by `torch.func`; ``"autograd"``: all as rows, by a loop of
        plain autograd over samples.
    memory
        Bytes of freed signals that are kept for the next ones.
    proofs
        What is proved, by default what is proved of the network whoever asked for it.
    """

    def __init__(self, function: ModelFunction, engine: str, memory: int, proofs: TapeProofs | None = None) -> None:
        self.function, self.engine = function, engine
        self.workspace = Workspace(memory)
        self.tapes = ProvedTapes(function, self.workspace, proofs)
        self.stacks = ProvedStacks(self.tapes)

    def gradients(
        self,
        theta: Float[Tensor, " P"],
        inputs: PyTree,
        functional: OutputFunctional,
        context: PyTree,
        components: int | None,
        function: ModelFunction | None = None,
    ) -> FactoredGradients:
        """∇h of K components (None: of a scalar) for n samples at θ.

        ``function`` is the same network with other buffers or run in another way.
        """
        function = function or self.function
        if self.engine in BY_ROWS:
            rows = self._rows(function, function.layout.names, theta, inputs, functional, context, components)
            return FactoredGradients.of_rows(rows, function.layout)
        tape = self.tapes.record(theta, inputs, function)
        pieces = tape_pieces(tape, functional, context)
        if self.plain:
            rows = self._rows(function, self.plain, theta, inputs, functional, context, components)
            pieces += FactoredGradients.of_rows(rows, function.layout).pieces
        return FactoredGradients(function.layout, tape.n * (components or 1), pieces)

    def pulled_back(
        self,
        theta: Float[Tensor, " P"],
        inputs: PyTree,
        cotangents: Callable[[PyTree], Tensor],
        function: ModelFunction,
    ) -> FactoredGradients:
        """J_iᵀ λ_i of n samples, with λ (n, C) made of what the network returned for all of them."""
        if self.engine in BY_ROWS:
            with function.evaluating(gradients=False):
                weights = cotangents(function.call(function.parameters(theta), function.cast(inputs)))
            return self.gradients(theta, inputs, weighted_sum, weights, None, function)
        tape = self.tapes.record(theta, inputs, function)
        weights = cotangents(tape.returned)
        with torch.enable_grad():
            weighted = (tape.outputs * weights).sum(dim=1, keepdim=True)
        pieces = accumulated(tape.pieces(weighted))
        if self.plain:
            rows = self._rows(function, self.plain, theta, inputs, weighted_sum, weights, None)
            pieces += FactoredGradients.of_rows(rows, function.layout).pieces
        return FactoredGradients(function.layout, tape.n, pieces)

    def gradients_at_points(
        self,
        thetas: Float[Tensor, "k P"],
        inputs: PyTree,
        functional: OutputFunctional,
        context: PyTree,
        components: int | None,
        function: ModelFunction,
    ) -> list[FactoredGradients] | None:
        """`gradients` of the same samples at several θ, in one pass; None where these are to be taken one by one."""
        stack = self._stacked(thetas, inputs, True, components or 1, function)
        if stack is None:
            return None
        with torch.enable_grad():
            h = values_at_points(functional, stack.outputs, context)
        return self._of_stack(stack, h)

    def pulled_back_at_points(
        self,
        thetas: Float[Tensor, "k P"],
        inputs: PyTree,
        cotangents: Float[Tensor, "k n C"],
        function: ModelFunction,
    ) -> list[FactoredGradients] | None:
        """`pulled_back` of batches (k, n, ...) of equal size, each at a θ of its own; None as above."""
        stack = self._stacked(thetas, inputs, False, 1, function)
        if stack is None or stack.outputs.shape != cotangents.shape:
            return None
        with torch.enable_grad():
            weighted = (stack.outputs * function.cast(cotangents)).sum(dim=2, keepdim=True)
        return self._of_stack(stack, weighted)

    def values_at_points(
        self,
        thetas: Float[Tensor, "k P"],
        inputs: PyTree,
        functional: OutputFunctional,
        context: PyTree,
        function: ModelFunction,
        *,
        together: bool = True,
    ) -> Tensor | None:
        """h of the same samples at several θ, (k, n, K); None where nothing was proved of such passes.

        Also where they would be made as one, which is not to be where they are not to go ``together``.
        """
        outputs = None if self.engine in BY_ROWS else self.stacks.outputs(thetas, inputs, function, together)
        return None if outputs is None else values_at_points(functional, outputs, context)

    def _stacked(
        self, thetas: Tensor, inputs: PyTree, shared: bool, components: int, function: ModelFunction
    ) -> StackedPasses | RecordedPasses | None:
        if self.engine in BY_ROWS:
            return None
        return self.stacks.record(thetas, inputs, shared, components, function)

    def _of_stack(
        self, stack: StackedPasses | RecordedPasses, components: Float[Tensor, "k n K"]
    ) -> list[FactoredGradients] | None:
        found = result_or_error(lambda: stack.pieces(components), FAILURES)
        if isinstance(found, Exception):
            return None
        layout, functions = self.function.layout, components.shape[1] * components.shape[2]
        stacked = found.to(accumulation_dtype(components.dtype))
        return [FactoredGradients(layout, functions, stacked.at(s), stack=(stacked, s)) for s in range(len(components))]

    def prove(
        self,
        theta: Float[Tensor, " P"],
        inputs: PyTree,
        function: ModelFunction,
        *,
        measured: bool = False,
        trial: bool = False,
    ) -> None:
        """Prove now how gradients are taken from such samples, which else happens with the first of them.

        ``measured`` notes the bytes that it takes, where it was not proved before. In a ``trial`` the rows of so many
        samples are not compared: they are those of another number than will be used.
        """
        if self.engine in BY_ROWS:
            return
        proofs = self.tapes.proofs
        known = proofs.made
        with (
            Allocations() if measured else nullcontext() as allocations,
            self.tapes.trying() if trial else nullcontext(),
        ):
            self.tapes.record(theta, inputs, function)
        if allocations is not None and proofs.made > known:
            proofs.bytes = float(np.fmax(proofs.bytes, allocations.peak))

    def proof_bytes(self, theta: Float[Tensor, " P"], inputs: PyTree, function: ModelFunction) -> float:
        """Bytes of the proof of such samples; it is made once more where nobody measured it."""
        if self.engine in BY_ROWS:
            return 0.0
        if math.isnan(self.tapes.proofs.bytes):
            again = GradientSource(self.function, self.engine, 0, TapeProofs())
            again.prove(theta, inputs, function, measured=True)
            self.tapes.proofs.bytes = again.tapes.proofs.bytes
        return self.tapes.proofs.bytes

    def warn(self) -> None:
        """Warn once for each module where a considerable part of θ is formed as rows that nobody asked for."""
        if self.engine not in BY_ROWS and self.tapes.coverage is not None:
            warn_of_rows(self.function, self.tapes.coverage.plain)

    @property
    def plain(self) -> tuple[str, ...]:
        """Parameters whose gradients were last formed as rows, in the order of θ."""
        if self.engine in BY_ROWS:
            return self.function.layout.names
        coverage = self.tapes.coverage
        return tuple(name for name in self.function.layout.names if coverage is not None and name in coverage.plain)

    @property
    def engines(self) -> set[str]:
        """Engines by which gradients were formed so far."""
        routes = set(self.function.row_routes.values()) & {"vmap", "autograd"}
        by_rows = {"autograd"} if self.engine == "autograd" else {{"vmap": "jacobian"}.get(r, r) for r in routes}
        plain = self.plain
        return by_rows if len(plain) == len(self.function.layout.names) else {"layerwise", *(by_rows if plain else ())}

    def _rows(
        self,
        function: ModelFunction,
        names: Iterable[str],
        theta: Tensor,
        inputs: PyTree,
        functional: OutputFunctional,
        context: PyTree,
        components: int | None,
    ) -> dict[str, Tensor]:
        """Gradients (n·K, size) of some parameters by `torch.func`, in blocks of samples."""
        values = function.layout.unflatten(theta)
        own = ParameterLayout.of({name: values[name] for name in names})
        part, route = function.restricted(own, values), "autograd" if self.engine == "autograd" else None
        k, point = components or 1, own.flatten(values)
        n, dtype = count(inputs), accumulation_dtype(function.dtype)
        rows = {
            name: torch.empty(n * k, where.stop - where.start, dtype=dtype, device=function.device)
            for name, where in own.slices.items()
        }
        per_sample = 4 * k * own.size * torch.finfo(function.dtype).bits // 8
        for piece in blocks(n, ROWS // per_sample):
            found = sample_gradients(
                part,
                point,
                take(inputs, piece),
                functional,
                take(context, piece),
                scalar=components is None,
                route=route,
            )
            for name, gradient in found.items():
                target = rows[name][piece.start * k : piece.stop * k]
                target.copy_(gradient.reshape(target.shape))
        return rows


def weighted_sum(outputs: Tensor, weights: Tensor) -> Tensor:
    """z·λ, whose gradient is Jᵀ λ."""
    dtype = torch.promote_types(outputs.dtype, weights.dtype)  # some networks return another type than they compute in
    return outputs.to(dtype) @ weights.to(dtype)


def values_at_points(
    functional: OutputFunctional, outputs: Float[Tensor, "k n C"], context: PyTree
) -> Float[Tensor, "k n K"]:
    """h of n samples at k points, from their outputs."""
    k, n = outputs.shape[:2]
    repeat = lambda leaf: leaf.expand(k, *leaf.shape).flatten(0, 1) if isinstance(leaf, Tensor) else leaf  # noqa: E731
    return values_of(functional, outputs.flatten(0, 1), pytree.tree_map(repeat, context)).reshape(k, n, -1)


def tape_pieces(tape: Tape, functional: OutputFunctional, context: PyTree) -> tuple[Piece, ...]:
    """Pieces of ∇h on a tape, in a type of at least float32."""
    with torch.enable_grad():
        h = values_of(functional, tape.outputs, context)
    return accumulated(tape.pieces(h))


def accumulated(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Pieces in the type in which their products are formed."""
    return tuple(piece.to(accumulation_dtype(piece.factor.dtype)) for piece in pieces)
