"""Passes at several θ, by `vmap` or by the operations of one of them, compared with single passes before use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, PyTree
from pathkernel.gradients.contraction import pair_products
from pathkernel.gradients.factored import FactoredGradients
from pathkernel.gradients.forward_derivatives import load_transformations
from pathkernel.gradients.forward_state import hashable
from pathkernel.gradients.layers.coverage import ProvedTapes, distinct
from pathkernel.gradients.layers.factors import Piece
from pathkernel.gradients.layers.recorded_passes import Program, RecordedPasses, recorded_outputs
from pathkernel.gradients.layers.stacked_passes import Pattern, StackedPasses, stacked_outputs
from pathkernel.gradients.layers.stacked_pieces import Directions, StackedPieces
from pathkernel.gradients.layers.tape import FAILURES, Tape
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.gradients.per_sample import ROW_LIMIT
from pathkernel.gradients.pytrees import count, take
from pathkernel.runtime.interrupts import result_or_error

JITTER = 1e-2
"""Size of the noise on each θ of a proof, relative to its mean entry: no two of the passes are alike."""


def passes_at(
    function: ModelFunction, pattern: Pattern, thetas: Float[Tensor, "k P"], inputs: PyTree, shared: bool
) -> StackedPasses | RecordedPasses:
    """Passes at k points, by the operations on record or by `vmap`."""
    if pattern.program is not None:
        return RecordedPasses(function, pattern.program, thetas, inputs, shared)
    return StackedPasses(function, pattern, thetas, inputs, shared)


class ProvedStacks:
    """Records passes at several points of one network; what was not met before is compared with single passes first.

    Parameters
    ----------
    tapes
        Of single passes, which are proved by themselves.

    Notes
    -----
    The comparison, once for each kind of call and number of points and samples: every number of every piece, and of all
    outputs, on distinct samples at distinct θ, in as many components as are asked for. Where they differ by more than
    rounding, in float64; where that differs too, and where anything fails, passes are taken one by one.
    """

    def __init__(self, tapes: ProvedTapes) -> None:
        self.tapes = tapes
        self._proved: dict[Any, Pattern | None] = {}
        self._outputs: dict[Any, Pattern] = {}

    def record(
        self,
        thetas: Float[Tensor, "k P"],
        inputs: PyTree,
        shared: bool,
        components: int,
        function: ModelFunction,
    ) -> StackedPasses | RecordedPasses | None:
        """Passes at k points, see `StackedPasses`; None where they are to be taken one by one."""
        kind = self._kind(thetas, inputs, shared, function)
        key = kind, components
        if key not in self._proved:
            self._proved[key] = self._pattern(thetas, inputs, shared, components, function, recorded=True)
        pattern = self._proved[key]
        if pattern is not None and not _holds(pattern, function):
            self._proved[key] = pattern = self._pattern(thetas, inputs, shared, components, function, recorded=False)
        if pattern is None:
            return None
        self._outputs[kind] = pattern
        found = result_or_error(lambda: passes_at(function, pattern, thetas, inputs, shared), FAILURES)
        if isinstance(found, Exception):
            self._proved[key] = None
            return None
        return found

    def outputs(
        self, thetas: Float[Tensor, "k P"], inputs: PyTree, function: ModelFunction, together: bool = True
    ) -> Float[Tensor, "k n C"] | None:
        """Outputs of the same samples at k points, without a graph; None where gradients of such were not proved.

        Also where it takes `vmap`, unless passes may be ``together``.
        """
        pattern = self._outputs.get(self._kind(thetas, inputs, True, function))
        if pattern is None or not _holds(pattern, function) or not (together or pattern.program):
            return None
        found = result_or_error(lambda: outputs_at(function, pattern, thetas, inputs), FAILURES)
        return None if isinstance(found, Exception) else found

    def _kind(self, thetas: Tensor, inputs: PyTree, shared: bool, function: ModelFunction) -> Any:
        leaves, tree = pytree.tree_flatten(inputs)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        ran = hashable(function.state.modes), function.state.autocast
        return function.submodule, function.dtype, ran, len(thetas), shared, shapes, tree

    def _pattern(
        self,
        thetas: Tensor,
        inputs: PyTree,
        shared: bool,
        components: int,
        function: ModelFunction,
        recorded: bool,
    ) -> Pattern | None:
        """Pattern of a kind of pass whose stacks are the single passes; else None."""
        load_transformations()
        generator = torch.Generator().manual_seed(len(thetas))
        noise = torch.randn(thetas.shape, generator=generator, dtype=torch.float64).to(thetas.device)
        points = thetas + JITTER * thetas.abs().mean().clamp_min(JITTER) * noise
        # The samples of every point are others, so that those of one are not taken for those of another.
        single = [inputs] if shared else [take(inputs, s) for s in range(len(thetas))]
        drawn = [distinct(one, count(one), generator) for one in single]
        own = drawn[0] if shared else pytree.tree_map(lambda *leaves: torch.stack(leaves), *drawn)
        tape = self.tapes.record(points[0], drawn[0], function)
        pattern = Pattern.of(tape)
        del tape
        if pattern is None:
            return None
        asked = own, shared, components, generator
        program = self._program(pattern, points[-1], single[0], components, function, generator) if recorded else None
        if program is not None:
            written = replace(pattern, program=program)
            error = result_or_error(partial(_difference, function, written, points, *asked), FAILURES)
            if not isinstance(error, Exception) and error <= ROW_LIMIT.get(function.dtype, 0.0):
                return written
        for of in (function, function.converted(torch.float64)):
            error = result_or_error(partial(_difference, of, pattern, points.to(of.dtype), *asked), FAILURES)
            if isinstance(error, Exception):
                return None
            if error <= ROW_LIMIT.get(of.dtype, 0.0):
                return pattern
        return None

    @staticmethod
    def _program(
        pattern: Pattern,
        theta: Tensor,
        inputs: PyTree,
        components: int,
        function: ModelFunction,
        generator: torch.Generator,
    ) -> Program | None:
        """Operations of a pass, noted on other samples than it is proved with; None off the CPU, or of other passes.

        A device has its own queue: what it waits for are the kernels, which `vmap` makes fewer.
        """
        if theta.device.type != "cpu":
            return None
        others = distinct(inputs, count(inputs), generator)
        told = pattern.arrangements, pattern.roles, components
        found = result_or_error(lambda: Program(function, theta, others, *told), FAILURES)
        return None if isinstance(found, Exception) else found


def _holds(pattern: Pattern, function: ModelFunction) -> bool:
    """True where passes of a function are those of a pattern: no constant on record is another one now."""
    return pattern.program is None or pattern.program.holds(function)


def outputs_at(
    function: ModelFunction, pattern: Pattern, thetas: Float[Tensor, "k P"], inputs: PyTree
) -> Float[Tensor, "k n C"]:
    """Outputs of the same n samples at k points, without a graph."""
    if pattern.program is not None:
        return recorded_outputs(function, pattern.program, thetas, inputs)
    return stacked_outputs(function, thetas, inputs)


def _difference(
    function: ModelFunction,
    pattern: Pattern,
    thetas: Tensor,
    inputs: PyTree,
    shared: bool,
    components: int,
    generator: torch.Generator,
) -> float:
    """Largest difference of outputs and pieces of stacked passes from those of single ones, relative to the largest."""
    if function.dtype != pattern.results[0][1]:
        pattern = replace(pattern, results=tuple((shape, function.dtype) for shape, _ in pattern.results))
    stack = passes_at(function, pattern, thetas, inputs, shared)
    k, n, c = stack.outputs.shape
    weights = torch.randn(k, n, c, components, generator=generator, dtype=torch.float64).to(stack.outputs)
    with torch.enable_grad():
        found = stack.pieces(torch.einsum("knc,kncj->knj", stack.outputs, weights))
    plain = outputs_at(function, pattern, thetas, inputs) if shared else stack.outputs
    random = torch.randn(thetas.shape, generator=generator, dtype=torch.float64).to(thetas.device)
    found.meet(Directions(random))
    worst = 0.0
    for s in range(k):
        own = inputs if shared else take(inputs, s)
        tape = Tape(function, thetas[s], own, pattern.arrangements, {}, None, pattern.roles)
        with torch.enable_grad():
            expected = tape.pieces(torch.einsum("nc,ncj->nj", tape.outputs, weights[s]))
        pairs = [(stack.outputs[s], tape.outputs), (plain[s], tape.outputs)]
        at_point = found.at(s)
        if len(expected) != len(at_point):
            return float("inf")
        for one, other in zip(at_point, expected, strict=True):
            if (one.where, one.bias, _form(one)) != (other.where, other.bias, _form(other)):
                return float("inf")
            pairs += zip(one.factor.tensors, other.factor.tensors, strict=True)
        pairs += _results(found, s, function.layout)
        worst = max(worst, *(_relative(one.detach(), other.detach()) for one, other in pairs))
    return worst


def _results(found: StackedPieces, place: int, layout: ParameterLayout) -> Iterator[tuple[Tensor, Tensor]]:
    """Sums and inner products of stacked pieces at one point, each beside that of the pieces of this point alone."""
    pieces = found.at(place)
    if not pieces:
        return
    count = pieces[0].factor.samples * pieces[0].factor.components
    single = FactoredGradients(layout, count, pieces)
    total = found.total(place, layout.size)
    if total is not None:
        yield total, single.total()
    assert found.directions is not None
    direction = found.directions.rows[place]
    along = found.along(place, direction)
    if along is not None:
        yield along, single @ direction
    first = found.first_component()
    wanted = {piece.where.start for piece in pieces}
    for start in wanted:  # layer by layer, so that one without a batched product does not hide the others
        products = found.pairs(first, {start}, place)
        if products is None:
            continue
        one = [piece for piece in pieces if piece.where.start == start]
        others = [piece for piece in first.at(place) if piece.where.start == start]
        expected = sum(
            pair_products(a, b, full=a.factor.components > 1).reshape(count, -1) for a in one for b in others
        )
        yield products.T, torch.as_tensor(expected)


def _form(piece: Piece) -> tuple[Any, ...]:
    return type(piece.factor), piece.factor.transposed, *(tensor.shape for tensor in piece.factor.tensors)


def _relative(found: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().double().clamp_min(torch.finfo(torch.float64).tiny)
    error = ((found.double() - expected.double()).abs().max() / scale).item()
    return error if error == error else float("inf")
