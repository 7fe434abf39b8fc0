r"""Costs of a kernel matrix on each engine, layer by layer, before it is computed.

Floating-point operations and bytes follow from the shapes on a tape of a few samples; seconds from those and four
numbers measured on the machine at hand. For a layer with T positions, q readings, p signals and K components:

======  ===========================================================================
pairs   :math:`2 \cdot \text{pairs} \cdot T^2 (q + K p)`, nothing formed
rows    :math:`2 n K T p q` to form them, then :math:`2 \cdot \text{pairs} \cdot K p q`
plain   rows of all parameters by `torch.func`: those, and K sweeps for each sample
======  ===========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.gradients.layers.factors import Piece
from pathkernel.gradients.pytrees import blocks, count, take
from pathkernel.tangent_kernel.cost.hardware import machine
from pathkernel.tangent_kernel.cost.operations import Operation, Totals, counted, operations_at
from pathkernel.tangent_kernel.engines.blocking import BLOCKS, TILE, Plan, Sizes, is_away
from pathkernel.tangent_kernel.engines.layerwise import LayerwiseEngine
from pathkernel.tangent_kernel.engines.tiles import Form, Metric

ENGINES = ("layerwise", "jacobian", "products")

FEW = (2, 4)
"""Samples passed through the network, to see what grows with their number."""

FEW_COMPONENTS = (2, 4)
"""Components of these passes, to see what grows with theirs. Up to the second, all of them are counted. Chosen."""

EFFICIENCY = {
    "passes": 0.55,
    "products": 0.8,
    "tiles": 1.0,
    "positions": 0.5,
    "forming": 0.7,
    "rows": 0.8,
    "result": 0.5,
    "plain passes": 0.35,
    "plain rows": 0.1,
}
"""Share of the machine's rates that each kind of work reached, measured on networks of linear, convolutional and
attention layers: the one place where the model is fitted to anything.

By which script is not on record, nor on which machine. The rates are measured anew wherever `machine` runs; shares that
are wrong elsewhere make "auto" take a slower engine, and `benchmarks/engines.py` times both ("pathkernel-plain").
"""

RECORDING = 10.0
"""The processor's calls' worth of Python for each operation on a tape or under `torch.func`. Provenance as of
`EFFICIENCY`."""

JVP = 1.5
"""A forward-mode sweep for each component, in units of the forward and backward passes of a tape. Provenance as of
`EFFICIENCY`."""

MARGIN = 2.0
"""Factor by which plain rows must be predicted to be faster: predictions are good to about as much, and rows take more
memory. Chosen."""


@dataclass(frozen=True)
class CostRow:
    """One line of the table.

    Attributes
    ----------
    engine
        ``"layerwise"``, ``"jacobian"`` or ``"products"``.
    layer
        Parameters, or ``"passes"`` for forward and backward passes.
    way
        How: ``"passes"``, ``"pairs"``, ``"rows"``, ``"plain"``.
    flops, bytes, peak_bytes, seconds
        Floating-point operations, bytes moved, bytes held at once, predicted time.
    reason
        Why in this way.
    """

    engine: str
    layer: str
    way: str
    flops: float
    bytes: float
    peak_bytes: float
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Shape:
    """Shape of the gradients of one layer: n samples × K components of Σ_t δ_t a_tᵀ.

    Attributes
    ----------
    layer
        Names of its parameters.
    piece
        Of a few samples.
    positions, outputs, inputs
        T, p, q; for rows that are there already T = q = 1.
    kind
        ``"outer"``, ``"head"`` (δ is the identity), ``"lookup"`` or ``"dense"``.
    """

    layer: str
    piece: Piece
    positions: int
    outputs: int
    inputs: int
    kind: str

    @classmethod
    def of(cls, piece: Piece, slices: Mapping[str, slice]) -> Shape:
        """Shape of a piece of a tape."""
        parts = [piece.where] if piece.bias is None else [piece.where, piece.bias]
        layer = " + ".join(
            name for name, where in slices.items() if any(p.start < where.stop and where.start < p.stop for p in parts)
        )
        factor = piece.factor
        kind = "head" if factor.head else factor.form
        return cls(layer, piece, factor.positions, factor.width, factor.comparing, kind)

    @property
    def size(self) -> int:
        """Parameters."""
        return self.piece.factor.size + (0 if self.piece.bias is None else self.outputs)

    @property
    def forming(self) -> float:
        """Floating-point operations of the rows of one sample and one component."""
        return 2.0 * self.positions * self.outputs * self.inputs if self.kind in ("outer", "head") else 0.0


@dataclass(frozen=True)
class Work:
    """Size of the task: a matrix of n rows and m columns, or half of n × n.

    Attributes
    ----------
    n, m
        Rows and columns.
    symmetric
        Whether columns are the rows.
    away
        Whether what symmetry would spare is computed as well; see `blocking.is_away`.
    """

    n: int
    m: int
    symmetric: bool
    away: bool = False

    @property
    def samples(self) -> int:
        """Rows and columns, those that are both once."""
        return self.n if self.symmetric else self.n + self.m

    def pairs(self, tile: int | None = None) -> float:
        """Pairs of samples that are computed: tiles of rows, of a symmetric matrix from the diagonal on."""
        if not self.symmetric or (self.away and tile is None):
            return float(self.n * self.m)
        return float(sum((b.stop - b.start) * (self.n - b.start) for b in blocks(self.n, tile or TILE)))

    def component_pairs(self, k: int, full: bool) -> float:
        """Pairs of gradients whose inner products are computed; of full blocks on the diagonal, half."""
        if not full:
            return self.pairs() * k
        if not self.symmetric or self.away:
            return float(self.n * self.m * k * k)
        sizes = [b.stop - b.start for b in blocks(self.n, BLOCKS)]
        own = sum(size**2 for size in sizes)
        return own * k * (k + 1) / 2 + (self.n**2 - own) / 2 * k * k

    def passed(self, left: int, right: int) -> int:
        """Samples passed through the network if ``left`` rows are held at a time: columns again for each of them."""
        if self.symmetric:
            return sum(self.n - b.start for b in blocks(self.n, left))
        return sum(b.stop - b.start + self.m for b in blocks(self.n, left))


class CostModel:
    """Costs of one kernel on every engine.

    Parameters
    ----------
    engine
        Its layer-wise engine, whose tapes give the shapes.
    theta, X, context
        θ and a few samples, at least one.

    Notes
    -----
    Takes a few short passes of a few samples, and the proof of the tape where it was not made before.
    """

    def __init__(self, engine: LayerwiseEngine, theta: Tensor, X: PyTree, context: PyTree) -> None:
        self.engine, self.theta = engine, theta
        index = torch.arange(max(FEW)) % count(X)
        self.X, self.context = take(X, index), take(context, index)
        pieces = self._pieces(FEW[0], slice(0, FEW_COMPONENTS[1]))
        self._counted: dict[int, list[list[Operation]]] = {}
        self.shapes = [Shape.of(piece, engine.function.layout.slices) for piece in pieces]
        self.components = engine.sizes(theta, self.X, self.context, self._form(Work(1, 1, False))).components
        coverage = engine.tapes.coverage
        self.plain: dict[str, str] = dict(coverage.plain) if coverage is not None else {}
        self.item = engine.function.dtype.itemsize
        function = engine.function
        self.arithmetic = machine(function.dtype, function.device)
        self.products = machine(engine.products, function.device, engine.tensor_floats)
        self.recording = RECORDING * machine(function.dtype).call  # Python runs on the processor
        self.away = is_away(function.device)

    def _form(self, work: Work) -> Form:
        return Form((work.n, work.m), self.engine.full, Metric(None), self.engine.products, self.engine.workspace)

    def _pieces(self, samples: int, components: slice) -> list[Piece]:
        X, context = (take(own, slice(0, samples)) for own in (self.X, self.context))
        joint, engine = not self.engine.full, self.engine
        return engine.of_one_form(lambda: engine.pieces(self.theta, X, context, components, joint=joint, used=False)[0])

    def _totals(self, n: int, components: int, batched: bool = False) -> Totals:
        """Operations of a forward pass of n samples and of the sweeps back for some components."""
        fewer, few = FEW_COMPONENTS
        if components <= few:
            if components not in self._counted:
                self._counted[components] = counted(lambda n: self._pieces(n, slice(0, components)), FEW)
            return Totals.of(operations_at(n, self._counted[components], FEW), self.arithmetic, batched)
        one, two = (self._totals(n, k, batched) for k in FEW_COMPONENTS)
        return one.towards(two, (components - fewer) / (few - fewer))

    def rows(self, engine: str, n: int, m: int | None = None) -> list[CostRow]:
        """The table of one engine for an (n, m) matrix; m None for the symmetric (n, n)."""
        work = Work(n, n if m is None else m, m is None, self.away)
        makers: dict[str, Callable[[Work], Iterable[CostRow]]] = {
            "layerwise": self._layerwise,
            "jacobian": self._jacobian,
            "products": self._products,
        }
        size = 8.0 * work.n * work.m * (self.components**2 if self.engine.full else 1)
        moved = (4 if work.symmetric else 2) * size
        result = CostRow(
            engine, "result", "float64", 0.0, moved, size, moved / self.arithmetic.bandwidth / EFFICIENCY["result"]
        )
        return [*makers[engine](work), result]

    def seconds(self, engine: str, n: int, m: int | None = None) -> float:
        """Predicted time."""
        return sum(row.seconds for row in self.rows(engine, n, m))

    def layers_suffice(self, n: int, m: int | None = None) -> bool:
        """Test that plain rows cannot be `MARGIN` times as fast, whatever the passes cost, which are not counted then.

        Where both ways make the same passes, those for plain rows are predicted to take more than their part: products
        are batched, and reach a lower share of the rates. So the rest decides, which follows from shapes alone. False
        says nothing.
        """
        work, names = Work(n, n if m is None else m, m is None, self.away), self.engine.function.layout.slices
        _, plan = self._plan(work)
        block, swept = self._block(work, names)
        largest, few = min(plan.passing, plan.left), min(block, work.n)
        fewer = plan.components == self.components and work.passed(plan.left, plan.right) <= swept and largest >= few
        slower = EFFICIENCY["plain passes"] <= EFFICIENCY["passes"]
        if self.plain or not (fewer and slower and self.arithmetic.batched <= MARGIN * self.arithmetic.products):
            return False
        layers = sum(row.seconds for row in self._contractions(work, plan))
        return layers <= MARGIN * sum(row.seconds for row in self._plain_rows("", work, names, block, swept))

    # -- layer by layer --------------------------------------------------------------------------------------

    def _layerwise(self, work: Work) -> Iterator[CostRow]:
        if self.shapes:
            yield from self._by_layers(work)
        if self.plain:
            yield from self._by_torch_func("layerwise", work, self.plain)

    def _by_layers(self, work: Work) -> Iterator[CostRow]:
        sizes, plan = self._plan(work)
        yield self._passes(work, sizes, plan)
        yield from self._contractions(work, plan)

    def _plan(self, work: Work) -> tuple[Sizes, Plan]:
        form, columns = self._form(work), None if work.symmetric else work.m
        sizes = self.engine.sizes(self.theta, self.X, self.context, form)
        return sizes, Plan.of(sizes, self.engine.memory, work.n, columns, form.full, self.away)

    def _contractions(self, work: Work, plan: Plan) -> Iterator[CostRow]:
        form = self._form(work)
        held = plan.left + (plan.right if plan.left < work.n or not work.symmetric else 0)
        for shape in self.shapes:
            if form.by_pairs(shape.piece, plan.components):
                yield self._pairs(shape, work, plan, held)
            else:
                yield self._rows(shape, work, plan, held, form)

    def _passes(self, work: Work, sizes: Sizes, plan: Plan) -> CostRow:
        """Forward, and backward for each component, as often as blocks of samples and of components need them."""
        swept, chunks = work.passed(plan.left, plan.right), -(-self.components // plan.components)
        largest = min(plan.passing, plan.left)
        own = self._totals(largest, plan.components)
        times = swept * chunks / largest
        seconds = times * own.seconds / EFFICIENCY["passes"]
        seconds += max(1.0, times) * own.calls * self.recording
        peak = largest * (sizes.passing[0] + plan.components * sizes.passing[1])
        reason = f"{swept} samples × {chunks} groups of components, {largest} at a time"
        return CostRow("layerwise", "passes", "passes", times * own.flops, times * own.bytes, peak, seconds, reason)

    def _pairs(self, shape: Shape, work: Work, plan: Plan, held: int) -> CostRow:
        """All pairs of positions."""
        full, k = self.engine.full, self.components
        t, p, q = shape.positions, shape.outputs, shape.inputs
        if shape.piece.factor.joint is not None:  # one signal stands for those of all components
            k = 1
        products = work.component_pairs(k, full)
        readings = work.n * work.m / 2 if full and work.symmetric else work.pairs()
        flops = 2 * readings * t * t * (q if shape.kind != "lookup" else 1)
        if shape.kind != "head":
            flops += 2 * products * t * t * p
        tiles = t * t * (products if full else readings)
        moved = self.item * tiles * (3 if t == 1 else 4)
        peak = held * t * (q + k * p) * self.item
        seconds = flops / self.products.products / EFFICIENCY["products"]
        seconds += moved / self.arithmetic.bandwidth / EFFICIENCY["tiles" if t == 1 else "positions"]
        reason = f"T = {t}: pairs of positions cost less than rows of {p} × {q}"
        return CostRow("layerwise", shape.layer, "pairs", flops, moved, peak, seconds, reason)

    def _rows(self, shape: Shape, work: Work, plan: Plan, held: int, form: Form) -> CostRow:
        """Rows of this layer, kept or formed part by part whenever they are contracted."""
        kept, k = form.by_kept_rows(shape.piece, plan.components), self.components
        groups = -(-work.n // (plan.tile if self.away else BLOCKS)) if form.full else -(-work.n // plan.left)
        formed = work.passed(plan.left, plan.right) * (1 if kept else max(1.0, groups / 2))
        forming = formed * k * shape.forming
        pairs = work.component_pairs(k, form.full)
        products = 2 * pairs * shape.size
        moved = self.item * shape.size * (3 * k * formed + 2 * pairs / TILE)
        seconds = forming / self.arithmetic.batched / EFFICIENCY["forming"]
        seconds += products / self.products.products / EFFICIENCY["products"]
        seconds += moved / self.arithmetic.bandwidth / EFFICIENCY["rows"]
        peak = self.item * k * held * (shape.size if kept else shape.positions * (shape.outputs + shape.inputs))
        reason = f"T = {shape.positions}: rows of {shape.size} cost less than pairs of positions"
        if shape.kind == "dense":
            reason = "small, or without a better form"
        way = "dense" if shape.kind == "dense" else "rows"
        return CostRow("layerwise", shape.layer, way, forming + products, moved, peak, seconds, reason)

    # -- by torch.func ---------------------------------------------------------------------------------------

    def _jacobian(self, work: Work) -> Iterator[CostRow]:
        return self._by_torch_func("jacobian", work, self.engine.function.layout.slices)

    def _by_torch_func(self, engine: str, work: Work, names: Iterable[str]) -> Iterator[CostRow]:
        """Rows of some of the parameters."""
        block, swept = self._block(work, names)
        own = self._totals(min(block, work.n), self.components, batched=True)
        times = swept / min(block, work.n)
        flops, moved = times * own.flops, times * own.bytes
        seconds = times * (own.seconds / EFFICIENCY["plain passes"] + own.calls * self.recording)
        reason = f"{swept} samples, {min(block, work.n)} at a time"
        yield CostRow(engine, "passes of torch.func", "passes", flops, moved, 0.0, seconds, reason)
        yield from self._plain_rows(engine, work, names, block, swept)

    def _sizes(self, names: Iterable[str]) -> dict[str, int]:
        slices = self.engine.function.layout.slices
        return {name: slices[name].stop - slices[name].start for name in names}

    def _block(self, work: Work, names: Iterable[str]) -> tuple[int, int]:
        """Samples whose rows are held at once, while those behind them pass, and how many pass in all."""
        block = max(1, self.engine.memory // (4 * self.components * sum(self._sizes(names).values()) * self.item))
        return block, work.passed(block, block)

    def _plain_rows(self, engine: str, work: Work, names: Iterable[str], block: int, swept: int) -> Iterator[CostRow]:
        shapes, k = self._positions(), self.components
        pairs = work.pairs(block) * (k * k if self.engine.full else k)
        for name, size in self._sizes(names).items():
            forming, products = 2.0 * swept * k * size * shapes.get(name, 1), 2 * pairs * size
            moved = self.item * size * k * swept * 6.0
            seconds = forming / self.arithmetic.batched / EFFICIENCY["forming"]
            seconds += products / self.products.products / EFFICIENCY["products"]
            seconds += moved / self.arithmetic.bandwidth / EFFICIENCY["plain rows"]
            peak = 4.0 * min(block, work.n) * k * size * self.item
            reason = self.plain.get(name, "rows by torch.func")
            yield CostRow(engine, name, "plain", forming + products, moved, peak, seconds, reason)

    def _positions(self) -> dict[str, int]:
        """T of the layer of each parameter."""
        return {name: shape.positions for shape in self.shapes for name in shape.layer.split(" + ")}

    def _products(self, work: Work) -> Iterator[CostRow]:
        """One column: a vjp of one sample, and for each component a jvp of all."""
        own = self._totals(work.n, self.components)
        sweeps = work.m * JVP
        flops, moved = sweeps * own.flops, sweeps * own.bytes
        seconds = sweeps * (own.seconds / EFFICIENCY["passes"] + own.calls * self.recording)
        yield CostRow("products", "passes", "jvp ∘ vjp", flops, moved, own.result, seconds, "one column at a time")


def choose(model: CostModel, n: int, m: int | None = None) -> tuple[str, str]:
    """The engine for an (n, m) matrix, and why."""
    names = set(model.engine.function.layout.names)
    if names <= model.plain.keys():
        return "jacobian", "no parameter is covered by a layer"
    layers, plain = (model.seconds(engine, n, m) for engine in ("layerwise", "jacobian"))
    if plain < layers / MARGIN:
        return "jacobian", f"{plain:.2g} s in place of {layers:.2g} s layer by layer"
    return "layerwise", f"{layers:.2g} s, and {plain:.2g} s by plain rows"
