r"""The projection engine: per-sample gradients sketched to a fixed number of dimensions, layer by layer.

.. math:: \varphi(x) = \sum_{\text{layers } l} S_l\, g_l(x), \qquad E[\varphi(x) \cdot \varphi(x')] = K(x, x')

for independent random maps S_l. One seed fixes them all: one kernel object is one function, symmetric and positive
semi-definite. The relative error falls like :math:`1 / \sqrt{\mathrm{dim}}`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pathkernel._typing import Float, PyTree
from pathkernel.errors import InputError
from pathkernel.gradients.layers.factor import Factor
from pathkernel.gradients.layers.factors import Dense, Lookup, Outer, Piece
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.pytrees import blocks, count, take
from pathkernel.runtime.interrupts import defer_interrupts
from pathkernel.runtime.lazy import imported
from pathkernel.runtime.precision import EXACT_PRODUCTS
from pathkernel.tangent_kernel.engines.engine import Diagonal, Engine, Node, Samples, number_of_components
from pathkernel.tangent_kernel.engines.jacobian_products import JacobianProducts
from pathkernel.tangent_kernel.engines.layerwise import LayerwiseEngine
from pathkernel.tangent_kernel.outputs import OutputSelection

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

KINDS = ("tensor", "sparse", "rademacher", "gaussian")
NONZEROS = 4
"""Nonzeros in each column of a sparse map: more lower the variance, and take as many times longer.

Chosen, not measured; what a map leaves is measured with every result (`Features.error`).
"""
COLUMNS = 8192
"""Entries of a parameter that are drawn for at once; fixed, so that draws do not depend on the memory budget."""


@dataclass(frozen=True)
class Projection:
    r"""A random map of gradients to fewer dimensions, for ``engine=`` and `pathkernel.PathKernel.features`.

    Parameters
    ----------
    dim
        Dimensions of φ.
    kind
        ``"tensor"`` (default): gradients that are outer products δ aᵀ are never formed, sparse maps of δ and of a are
        convolved (TensorSketch), and whatever is formed anyway goes through ``"sparse"``. ``"sparse"``: 4 entries ±½
        in each column (SJLT). ``"rademacher"`` and ``"gaussian"``: dense, to compare with; time dim · K · P a sample.
    seed
        Fixes the map.

    References
    ----------
    Pham & Pagh 2013 (TensorSketch); Kane & Nelson 2014 (sparse Johnson–Lindenstrauss transforms); Achlioptas 2003.
    """

    dim: int = 1024
    kind: str = "tensor"
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.dim, int) and self.dim >= 1 and isinstance(self.seed, int) and self.seed >= 0):
            raise InputError(
                f"`{self!r}` was given",
                "`dim` is an integer from 1 upwards, `seed` one from 0 upwards",
                "Write for example `Projection(dim=1024)`",
            )
        if self.kind not in KINDS:
            raise InputError(
                f"`Projection(kind={self.kind!r})` was given",
                f"Kinds are {', '.join(map(repr, KINDS))}",
                'Write `Projection(dim=1024, kind="tensor")`',
            )

    def engine(self, function: ModelFunction, selection: OutputSelection, memory: int) -> ProjectionEngine:
        """The engine of kernels under this map."""
        return ProjectionEngine(function, selection, memory, self)

    def apply(self, factor: Factor, key: tuple[int, ...]) -> Float[Tensor, "n K dim"]:
        """S g of each gradient, float64; ``key`` says which S."""
        if self.convolves(factor):
            return self._convolved(factor, key)
        draw = self._sparse if self.kind in ("tensor", "sparse") else self._dense
        shape = factor.samples, factor.components, self.dim
        total = torch.zeros(shape, dtype=torch.float64, device=factor.device)
        for number, part in enumerate(_parts(factor)):
            generator = np.random.default_rng([self.seed, *key, number])
            rows = part.rows()
            total += draw(rows.reshape(-1, rows.shape[2]), generator).reshape(total.shape)
        return total

    def convolves(self, factor: Factor) -> bool:
        """Test that sketches of δ and a are convolved: where that costs less than forming the gradients."""
        if self.kind != "tensor" or factor.formed:
            return False
        p, q, t = factor.width, factor.reading_size, factor.positions
        if isinstance(factor, Lookup) or t == 1:
            return True
        # Two transforms forward and one back, dim log₂ dim each, against a sparse map of p q entries.
        transforms = 3 * self.dim * max(1, (self.dim - 1).bit_length())
        return t * (NONZEROS * (p + q) + transforms) <= NONZEROS * p * q

    def _convolved(self, factor: Factor, key: tuple[int, ...]) -> Tensor:
        """Σ_t (S₁ δ_t) ∗ (S₂ a_t): circular convolution, a product in the frequencies."""
        generator = np.random.default_rng([self.seed, *key])
        n, k, t, p = factor.signals.shape
        signal = self._sparse(factor.signals.reshape(-1, p), generator)
        if isinstance(factor, Lookup):
            table = self._sparse_map(factor.vocabulary, generator).tocsc()
            read = table[:, factor.indices.reshape(-1).cpu().numpy()].toarray().T.copy()
            activation = torch.from_numpy(read).to(signal.device)
        else:
            activation = self._sparse(factor.readings.reshape(n * t, -1), generator)
        frequencies = torch.fft.rfft(signal).reshape(n, k, t, -1) * torch.fft.rfft(activation).reshape(n, 1, t, -1)
        return torch.fft.irfft(frequencies.sum(dim=2), n=self.dim).double()

    def _sparse(self, rows: Float[Tensor, "n size"], generator: np.random.Generator) -> Float[Tensor, "n dim"]:
        matrix = self._sparse_map(rows.shape[1], generator)
        columns = rows.to(torch.promote_types(rows.dtype, torch.float32)).T.contiguous().cpu().numpy()
        return torch.from_numpy((matrix.astype(columns.dtype) @ columns).T).to(rows.device)

    def _sparse_map(self, size: int, generator: np.random.Generator) -> csr_matrix:
        """(dim, size), in each column one entry ±1/√nonzeros in each of a few equal ranges of rows."""
        sparse = imported("scipy.sparse")  # which kernels without a map need not load
        nonzeros = min(NONZEROS, self.dim)
        edges = np.linspace(0, self.dim, nonzeros + 1).astype(int)
        rows = generator.integers(edges[:-1], edges[1:], (size, nonzeros))
        signs = generator.choice([-1.0, 1.0], (size, nonzeros)) / nonzeros**0.5
        columns = np.repeat(np.arange(size), nonzeros)
        entries = signs.reshape(-1).astype(np.float32), (rows.reshape(-1), columns)
        matrix: csr_matrix = sparse.csr_matrix(entries, (self.dim, size))
        return matrix

    def _dense(self, rows: Float[Tensor, "n size"], generator: np.random.Generator) -> Float[Tensor, "n dim"]:
        shape = rows.shape[1], self.dim
        if self.kind == "gaussian":
            drawn = generator.standard_normal(shape, dtype=np.float32)
        else:
            drawn = 2 * generator.integers(0, 2, shape, dtype=np.int8).astype(np.float32) - 1
        return rows @ torch.from_numpy(drawn).to(rows) / self.dim**0.5


class ProjectionEngine(Engine):
    """Kernels of sketched gradients.

    Parameters
    ----------
    function, selection, memory
        As of every engine.
    projection
        The map.
    number
        Which of the maps that the seed fixes: nodes of a path have one each.

    Notes
    -----
    Time O(n K · backward + n Σ_layers (K p + q + dim log dim)) where gradients are outer products, O(n K P) otherwise,
    and O(n m dim) for a matrix; memory O(n · dim) beside a block of samples within the budget.
    """

    name = "projection"
    exact = False

    def __init__(
        self,
        function: ModelFunction,
        selection: OutputSelection,
        memory: int,
        projection: Projection,
        number: int = 0,
    ) -> None:
        super().__init__(function, selection, memory)
        self.projection = projection
        self.number = number
        self.layers = LayerwiseEngine(function, selection, memory)

    @defer_interrupts(divisible=True)
    @EXACT_PRODUCTS
    def features(
        self, theta: Tensor, X: PyTree, context: PyTree, preconditioner: Diagonal
    ) -> Float[Tensor, "n ... dim"]:
        """φ(x), float64 (n, dim); (n, K, dim) for full blocks."""
        layers = copy.copy(self.layers)
        layers.function = self.function
        layers.selection = self.selection
        first = slice(0, min(2, count(X)))
        pieces, tape = layers.pieces(theta, take(X, first), take(context, first))
        activations = sum(shape.numel() for shape in tape.shapes) * 4
        held = sum(self._numbers(piece.factor) for piece in pieces) + activations + self.projection.dim
        size = max(1, self.memory * (first.stop or 1) // (8 * held))
        cuts = ((take(X, block), take(context, block)) for block in blocks(count(X), size))
        features = torch.cat([self._block(layers, theta, *own, preconditioner) for own in cuts])
        return features if self.selection.combine == "full" else features.squeeze(1)

    def _numbers(self, factor: Factor) -> int:
        """Numbers that a factor and its sketch take."""
        own = factor.numbers[0]
        if factor.formed:
            return 2 * own
        convolved = 4 * factor.positions * self.projection.dim
        each = convolved if self.projection.convolves(factor) else 3 * max(COLUMNS, factor.reading_size)
        return own + factor.samples * factor.components * each

    def _block(
        self, layers: LayerwiseEngine, theta: Tensor, X: PyTree, context: PyTree, preconditioner: Diagonal
    ) -> Tensor:
        pieces, tape = layers.pieces(theta, X, context)
        full = self.selection.combine == "full"
        k = pieces[0].factor.components if pieces else tape.outputs.shape[1]
        total = torch.zeros(
            tape.n, k if full else 1, self.projection.dim, dtype=torch.float64, device=tape.outputs.device
        )
        for piece in pieces:
            for where, factor in _weighted(piece, preconditioner):
                total += self.projection.apply(factor if full else factor.stacked(), (self.number, where))
        rest = layers.uncovered(theta)
        if rest is not None:
            engine, own, left_out = rest
            rows = engine.rows(own, X, context)
            factor = Dense(rows if preconditioner is None else rows * preconditioner[left_out].sqrt().to(rows))
            key = self.number, self.function.layout.size
            total += self.projection.apply(factor if full else factor.stacked(), key)
        return total / k**0.5 if self.selection.combine == "mean" else total

    def gram(
        self, theta: Tensor, X: PyTree, Y: PyTree | None, context_X: PyTree, context_Y: PyTree, preconditioner: Diagonal
    ) -> Tensor:
        """φ(X) φ(Y)ᵀ."""
        left = self.features(theta, X, context_X, preconditioner)
        return products(left, left if Y is None else self.features(theta, Y, context_Y, preconditioner))

    def diagonal(self, theta: Tensor, X: PyTree, context: PyTree, preconditioner: Diagonal) -> Tensor:
        """|φ(x)|²."""
        features = self.features(theta, X, context, preconditioner)
        if self.selection.combine == "full":
            return torch.einsum("nkd,njd->nkj", features, features)
        return (features**2).sum(dim=1)

    def jacobian(self, theta: Tensor, samples: Samples, memory: int) -> FeatureProducts:
        """φ in place of gradients."""
        return FeatureProducts(self, theta, samples, memory)

    def at(self, node: Node, selection: OutputSelection | None = None) -> ProjectionEngine:
        """Engine at a node of a path, with a random map of its own."""
        engine = copy.copy(self)
        there = super().at(node, selection)
        engine.function = there.function
        engine.selection = there.selection
        engine.number = node.number
        return engine


class FeatureProducts(JacobianProducts):
    """Sketched gradients in place of gradients: φ in ``dim`` dimensions in place of P.

    Parameters
    ----------
    engine, theta
        The engine of sketches, and θ.
    samples
        n samples and what h needs of each.
    memory
        Bytes that may be held between products.
    """

    def __init__(self, engine: ProjectionEngine, theta: Tensor, samples: Samples, memory: int) -> None:
        self.engine = engine
        self.theta = theta
        self.samples = samples
        self.sketched = engine.projection.dim
        self.holds = count(samples[0]) * self.sketched * 8 <= memory
        self._held: Tensor | None = None

    def _features(self) -> Tensor:
        if self._held is not None:
            return self._held
        features = self.engine.features(self.theta, *self.samples, None)
        if self.engine.selection.combine == "mean":  # φ has the mean in it already, and is asked for the sum
            components = number_of_components(self.engine, self.theta, *self.samples)
            features = features * features.new_tensor(components).sqrt()
        self._held = features if self.holds else None
        return features

    def pull(self, weights: Tensor, components: slice) -> Tensor:
        """Σ_i v_id φ(x_i), (1, D, dim): a sketch is of all components at once."""
        features = self._features()
        return (weights.flatten(0, -2).T @ features.flatten(0, -2)).unsqueeze(0)

    def push(self, directions: Tensor, components: slice) -> Tensor:
        """φ(x_i) · u_d."""
        return self._features() @ directions[0].T


def products(left: Float[Tensor, "n ... dim"], right: Float[Tensor, "m ... dim"]) -> Float[Tensor, "n m ..."]:
    """φφᵀ, or blocks of it; exactly symmetric for ``left is right``."""
    if left.dim() == 3:
        found = torch.einsum("nkd,mjd->nmkj", left, right)
        return (found + found.permute(1, 0, 3, 2)) / 2 if left is right else found
    found = left @ right.T
    return (found + found.T) / 2 if left is right else found


def _weighted(piece: Piece, preconditioner: Diagonal) -> Iterator[tuple[int, Factor]]:
    """√d G, weight and bias as one sum of outer products where d is constant on each; each with its place in θ."""
    factor = piece.factor
    bias = piece.bias
    weights = [
        torch.ones(1) if preconditioner is None else preconditioner[where].unique()
        for where in (piece.where, *(() if bias is None else (bias,)))
    ]
    if preconditioner is not None and any(len(own) > 1 for own in weights):
        for where, part in piece.separated():
            rows = part.rows()
            yield where.start, Dense(rows * preconditioner[where].sqrt().to(rows))
        return
    roots = [float(own[0]) ** 0.5 for own in weights]
    if bias is None:
        yield piece.where.start, factor if preconditioner is None else factor.scaled(roots[0])
        return
    assert isinstance(factor, Outer)
    ones = torch.full_like(factor.activation[..., :1], roots[1])
    activation = torch.cat([factor.activation * roots[0], ones], dim=2)
    yield piece.where.start, replace(factor, activation=activation, head=False)


def _parts(factor: Factor) -> Iterator[Factor]:
    """A factor in parts of at most so many columns, or of one row of outer products."""
    for own in blocks(factor.width, COLUMNS // factor.reading_size):
        yield factor.with_signals(factor.signals[:, :, :, own])
