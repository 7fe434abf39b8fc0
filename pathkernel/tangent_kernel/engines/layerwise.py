"""The layer-wise engine: activations × back-propagated signals, contracted without forming a Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, PyTree
from pathkernel.gradients.forward_derivatives import REFUSALS
from pathkernel.gradients.layers.coverage import ProvedTapes
from pathkernel.gradients.layers.factors import Piece
from pathkernel.gradients.layers.plain import lines_on, warn_of_rows
from pathkernel.gradients.layers.tape import NotElementwise, Tape
from pathkernel.gradients.matmul import tensor_float_products
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.gradients.per_sample import values_of
from pathkernel.gradients.pytrees import alike, blocks, count, joined_samples, spread, take
from pathkernel.runtime.interrupts import defer_interrupts, result_or_error
from pathkernel.runtime.precision import EXACT_PRODUCTS
from pathkernel.runtime.workspace import Workspace, keep_freed_memory
from pathkernel.tangent_kernel.engines.blocking import Plan, Sizes, cuts, is_away
from pathkernel.tangent_kernel.engines.engine import Diagonal, Engine, Samples, check_budget
from pathkernel.tangent_kernel.engines.jacobian import JacobianEngine
from pathkernel.tangent_kernel.engines.jacobian_products import JacobianProducts
from pathkernel.tangent_kernel.engines.layer_products import DividedJacobianProducts, LayerJacobianProducts
from pathkernel.tangent_kernel.engines.tiles import (
    Form,
    Group,
    Metric,
    contract,
    mirror,
    own_products,
)
from pathkernel.tangent_kernel.outputs import OutputSelection

T = TypeVar("T")

FEW = 4
"""Samples of the passes in which is measured what one takes. Chosen, not measured."""

FEW_COMPONENTS = 4
"""Components of the same passes: all that a network has may be thousands, and each takes a sweep and memory of its own.
Chosen, not measured."""

KEPT = 0.75
"""Part of the budget up to which memory is kept from one matrix to the next; passes through the network need the rest.
Chosen, not measured."""


class LayerwiseEngine(Engine):
    r"""Layer by layer, :math:`(A A^\top) \odot (\Delta \Delta^\top)` or rows of one layer at a time, as is cheaper.

    Time O(n K · backward + Σ_layers n² (q + K p)) in place of n² K P; memory: activations and signals of the samples
    in hand, within the budget, never n × P. Parameters that the layers do not account for (`coverage`) go to the plain
    engine, parameter by parameter.
    """

    name = "layerwise"
    workspace: Workspace

    def __init__(
        self, function: ModelFunction, selection: OutputSelection, memory: int, tensor_floats: bool = False
    ) -> None:
        super().__init__(function, selection, memory, tensor_floats)
        keep_freed_memory()
        self.workspace = Workspace(int(KEPT * memory))
        self.tapes = ProvedTapes(self.function, self.workspace)
        self._sizes: dict[Any, Sizes] = {}
        self._plain_components: dict[Any, int] = {}
        self._elementwise = True

    @classmethod
    def of(cls, engine: Engine) -> LayerwiseEngine:
        """The engine itself where it goes layer by layer, else one for the same kernel."""
        if isinstance(engine, cls):
            return engine
        return cls(engine.function, engine.selection, engine.memory, engine.tensor_floats)

    @property
    def full(self) -> bool:
        """True for blocks of all pairs of components."""
        return self.selection.combine == "full"

    # -- gradients of some samples ---------------------------------------------------------------------------

    def pieces(
        self,
        theta: Tensor,
        X: PyTree,
        context: PyTree,
        components: slice = slice(None),
        *,
        joint: bool = False,
        used: bool = True,
    ) -> tuple[list[Piece], Tape]:
        """Gradients of h, or of some of its components, in factored form, and the tape they come from.

        ``joint``: with what sums over the components are made of, where that was proved (`Outer.joint`). Without the
        proof of their rows where they are not ``used`` but looked at.
        """
        tape = self.tapes.record(theta, X, self.function, rows=used)
        if tape.plain:
            warn_of_rows(self.function, tape.plain)
        with torch.enable_grad():
            if self.selection.identity:
                chosen = slice(*components.indices(tape.outputs.shape[1]))
                coverage = self.tapes.coverage if joint and self._elementwise else None
                before_head = None if coverage is None else coverage.before_head
                return tape.pieces(tape.outputs[:, chosen], chosen, before_head), tape
            return tape.pieces(self._values(tape, context)[:, components]), tape

    def of_one_form(self, computation: Callable[[], T]) -> T:
        """A computation from joint `pieces`; all of it once more, without `Outer.joint`, where that does not hold."""
        try:
            return computation()
        except NotElementwise:  # pieces of other samples may be of that form already
            self._elementwise = False
            return computation()

    def _values(self, tape: Tape, context: PyTree) -> Float[Tensor, "n K"]:
        """h."""
        if self.selection.identity:
            return tape.outputs
        return values_of(self.selection.function, tape.outputs, context)

    def sizes(self, theta: Tensor, X: PyTree, context: PyTree, form: Form) -> Sizes:
        """Bytes that a sample takes, from passes of a few; once for each shape of samples."""
        leaves = [leaf for leaf in pytree.tree_leaves((X, context)) if isinstance(leaf, Tensor)]
        key = (*((leaf.shape[1:], leaf.dtype) for leaf in leaves), form.metric.preconditioner is None, form.alike)
        if key not in self._sizes:
            few = spread(count(X), FEW)
            self._sizes[key] = self._measured(theta, take(X, few), take(context, few), form)
        return self._sizes[key]

    def _measured(self, theta: Tensor, X: PyTree, context: PyTree, form: Form) -> Sizes:
        pieces, tape = self.pieces(theta, X, context, slice(0, FEW_COMPONENTS), used=False)
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        def watched() -> None:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                self.tapes.repeat(theta, X, self.function)

        # Transformations inside the network refuse hooks: its results are counted alone.
        result_or_error(watched, REFUSALS)
        item, n = self.function.dtype.itemsize, count(X)
        graph = max(0, sum(saved.values()) - self.function.layout.size * item)
        graph += 2 * item * sum(shape.numel() for shape in tape.shapes)
        k = self._values(tape, context).shape[1]
        signals, others, kept_signals, kept_others, rows = 0.0, 0, 0.0, 0, 0.0
        for piece in pieces:
            times = k / piece.factor.components  # as many as were measured
            of_components, alike = times * piece.factor.numbers[0], piece.factor.numbers[1]
            signals, others = signals + of_components, others + alike
            if not form.by_pairs(piece, k) and form.by_kept_rows(piece, k):
                rows += times * piece.factor.row_numbers
            else:
                kept_signals, kept_others = kept_signals + of_components, kept_others + alike
        each = item / n
        return Sizes(
            components=k,
            passing=(graph / n + others * each, (2 * signals + rows) * each / k),
            held=(kept_others * each, (kept_signals + rows) * each / k),
        )

    def _form(self, preconditioner: Diagonal, n: int, m: int) -> Form:
        return Form((n, m), self.full, Metric(preconditioner), self.products, self.workspace)

    # -- the contract ----------------------------------------------------------------------------------------

    @defer_interrupts(divisible=True)
    @EXACT_PRODUCTS
    def gram(
        self, theta: Tensor, X: PyTree, Y: PyTree | None, context_X: PyTree, context_Y: PyTree, preconditioner: Diagonal
    ) -> Tensor:
        """K(X, Y); with Y None only entries on and above the diagonal are computed."""
        return self.of_one_form(lambda: self._gram(theta, X, Y, context_X, context_Y, preconditioner))

    def _gram(
        self, theta: Tensor, X: PyTree, Y: PyTree | None, context_X: PyTree, context_Y: PyTree, preconditioner: Diagonal
    ) -> Tensor:
        n, m = count(X), count(X if Y is None else Y)
        same_shapes = Y is None or alike((X, context_X), (Y, context_Y))
        form = replace(self._form(preconditioner, n, m), alike=same_shapes)
        sizes = self.sizes(theta, X, context_X, form)
        check_budget(sizes.least(self.full), self.memory, "activations and signals")
        plan = Plan.of(sizes, self.memory, n, None if Y is None else m, self.full, is_away(self.function.device))
        left = Side(self, theta, X, context_X, form, plan)
        right = left if Y is None else Side(self, theta, Y, context_Y, form, plan)
        k = sizes.components if self.full else 1
        result = self.workspace.empty((k, n, k, m), torch.float64, self.function.device)
        together = right is not left and plan.holds(n + m) and not self.full and same_shapes
        for components in blocks(sizes.components, plan.components):
            if together:
                _contract_together(left, right, components, result)
                continue
            for block in blocks(n, plan.left):
                _contract_block(left, None if Y is None else right, block, components, result)
        if Y is None:
            mirror(result, [tile for block in blocks(n, plan.left) for tile in cuts(block, plan.tile)])
        if self.selection.combine == "mean":
            result /= sizes.components
        found = result.permute(1, 3, 0, 2) if self.full else result[0, :, 0]
        rest = self.uncovered(theta)
        if rest is not None:
            engine, own, where = rest
            weights = None if preconditioner is None else preconditioner[where]
            found += engine.gram(own, X, Y, context_X, context_Y, weights)
        return found

    @defer_interrupts(divisible=True)
    @EXACT_PRODUCTS
    def diagonal(self, theta: Tensor, X: PyTree, context: PyTree, preconditioner: Diagonal) -> Tensor:
        """K(x, x), sample by sample."""
        return self.outputs_and_diagonals(theta, X, context, [preconditioner])[1][0]

    @defer_interrupts(divisible=True)
    @EXACT_PRODUCTS
    def outputs_and_diagonals(
        self, theta: Tensor, X: PyTree, context: PyTree, preconditioners: Sequence[Diagonal], *, squares: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """The network's outputs, (n, C), and K(x, x) under several preconditioners, from one pass over the samples.

        ``squares`` as of `tiles.own_products`.
        """
        forms = [self._form(preconditioner, 1, 1) for preconditioner in preconditioners]
        sizes = [self.sizes(theta, X, context, form) for form in forms]
        check_budget(max(own.least(True) for own in sizes), self.memory, "activations and signals")
        k = sizes[0].components
        passing = min(Plan.of(own, self.memory, count(X), None, True).passing for own in sizes)
        outputs, found = [], []
        for block in blocks(count(X), passing):
            n, (pieces, tape) = block.stop - block.start, self.pieces(theta, take(X, block), take(context, block))
            outputs.append(tape.outputs.detach())
            totals = []
            for form in forms:
                total = torch.zeros((n, *(k,) * 2 * self.full), dtype=torch.float64, device=self.function.device)
                for piece in pieces:
                    total += own_products(piece, form, self.memory // (16 * n), squares=squares)
                totals.append(total / k if self.selection.combine == "mean" else total)
            found.append(totals)
        results = [torch.cat(of_blocks) for of_blocks in zip(*found, strict=True)]
        rest = self.uncovered(theta)
        if rest is not None:
            engine, own, where = rest
            for result, d in zip(results, preconditioners, strict=True):
                result += engine.diagonal(own, X, context, None if d is None else d[where])
        return torch.cat(outputs), results

    def jacobian(self, theta: Tensor, samples: Samples, memory: int) -> JacobianProducts:
        """Activations and signals of the layers, and passes of the batch for what these do not cover."""

        def pieces(X: PyTree, context: PyTree, components: slice) -> list[Piece]:
            return self.pieces(theta, X, context, components)[0]

        layers = LayerJacobianProducts(self.function, pieces, samples, self.full, self.memory, memory)
        rest = self.uncovered(theta)
        if rest is None:
            return layers
        engine, own, where = rest
        return DividedJacobianProducts(layers, engine.jacobian(own, samples, 0), where)

    def describe(self) -> list[str]:
        """Lines on what the layers account for, and each parameter that they do not, with the reason."""
        coverage = self.tapes.coverage
        return [] if coverage is None else lines_on(coverage.plain, self.function.layout)

    def uncovered(self, theta: Tensor) -> tuple[JacobianEngine, Tensor, Tensor] | None:
        """The plain engine for the parameters that the tape does not cover, their values, and where they are."""
        coverage, layout = self.tapes.coverage, self.function.layout
        names = [name for name in layout.names if coverage is not None and name in coverage.plain]
        if not names:
            return None
        values = layout.unflatten(theta)
        own = ParameterLayout.of({name: values[name] for name in names})
        function = self.function.restricted(own, values)
        where = torch.cat([torch.arange(layout.slices[name].start, layout.slices[name].stop) for name in names])
        engine = JacobianEngine(function, self.selection, self.memory, self.tensor_floats)
        engine.products, engine.known = self.products, self._plain_components
        return engine, theta[where], where


def _contract_block(left: Side, right: Side | None, block: slice, components: slice, result: Tensor) -> None:
    """Some rows of a kernel matrix; from the diagonal on where there is no other side."""
    held = left.groups(block, components)
    if right is None:
        for place, (i, one) in enumerate(held):
            for j, two in held[place:]:
                left.contract(one, two, result[:, i, :, j], components, same=i == j)
    for other in cuts(slice(block.stop if right is None else 0, result.shape[3]), left.plan.right):
        _contract_columns(left, held, right or left, other, components, result)


def _contract_together(left: Side, right: Side, components: slice, result: Tensor) -> None:
    """A kernel matrix whose rows and columns go through the network in one pass: small ones take the time of calls."""
    n, m = left.form.pairs
    X, context = joined_samples((left.X, left.context), (right.X, right.context))
    pieces = left.engine.pieces(left.theta, X, context, components, joint=True)[0]

    def group(own: slice) -> Group:
        size = own.stop - own.start
        return Group.joined(size, iter([(slice(0, size), [piece.take(own) for piece in pieces])]), left.form)

    one, two = group(slice(0, n)), group(slice(n, n + m))
    left.contract(one, two, result, components, same=False)


def _contract_columns(
    left: Side, held: list[tuple[slice, Group]], right: Side, other: slice, components: slice, result: Tensor
) -> None:
    for j, two in right.groups(other, components):
        for i, one in held:
            left.contract(one, two, result[:, i, :, j], components, same=False)


@dataclass(frozen=True)
class Side:
    """Rows or columns of a kernel matrix.

    Attributes
    ----------
    engine, theta
        Engine and θ.
    X, context
        Samples, and what h needs of each.
    form, plan
        How gradients are contracted, and how many at once.
    """

    engine: LayerwiseEngine
    theta: Tensor
    X: PyTree
    context: PyTree
    form: Form
    plan: Plan

    def groups(self, block: slice, components: slice) -> list[tuple[slice, Group]]:
        """Gradients of some samples, tile by tile, and where they are."""
        every = slice(None) if self.form.full else components
        return [
            (tile, Group.joined(tile.stop - tile.start, self._passes(tile, every), self.form))
            for tile in cuts(block, self.plan.tile)
        ]

    def _passes(self, tile: slice, components: slice) -> Iterator[tuple[slice, list[Piece]]]:
        for own in cuts(tile, self.plan.passing):
            inputs, context = take(self.X, own), take(self.context, own)
            place = slice(own.start - tile.start, own.stop - tile.start)
            yield place, self.engine.pieces(self.theta, inputs, context, components, joint=not self.form.full)[0]

    def contract(self, one: Group, two: Group, result: Tensor, components: slice, *, same: bool) -> None:
        """Inner products of a group of this side with one of the other."""
        first = components.start == 0
        with tensor_float_products(self.engine.tensor_floats):
            contract(one, two, result, self.form, same=same, first=first, scratch=self.plan.scratch)
