"""Engines by name, and the one that chooses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.errors import InputError
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.pytrees import count, memory_bytes, spread, take
from pathkernel.runtime.interrupts import defer_interrupts
from pathkernel.runtime.precision import EXACT_PRODUCTS
from pathkernel.tangent_kernel.cost.model import CostModel, choose
from pathkernel.tangent_kernel.engines.engine import Diagonal, Engine, Samples
from pathkernel.tangent_kernel.engines.jacobian import AutogradEngine, JacobianEngine
from pathkernel.tangent_kernel.engines.layerwise import LayerwiseEngine
from pathkernel.tangent_kernel.engines.products import ProductsEngine
from pathkernel.tangent_kernel.engines.proved import proved, refuse_abstract
from pathkernel.tangent_kernel.outputs import OutputSelection

WORTH_CHOOSING = 10_000_000
"""Numbers in the plain rows of a matrix below which its cost is not modelled: layer by layer takes milliseconds.
Chosen, not measured."""


PROBED = 8
"""Samples that are passed through the network to see what a tape covers. Chosen, not measured."""


class AutomaticEngine(LayerwiseEngine):
    """Layer by layer, as nearly always; a matrix that plain rows are predicted to be much faster for goes to them.

    As the layer-wise engine hands single parameters to the plain one, so does this one whole matrices.
    """

    name = "auto"

    def chosen(self, theta: Tensor, X: PyTree, context: PyTree, n: int, m: int | None) -> str:
        """The engine for an (n, m) matrix of such samples, m None for the symmetric one."""
        if (n, m) not in self.choices:
            self.choices[n, m] = self._choose(theta, X, context, n, m)
        return self.choices[n, m]

    def fix_choices(
        self,
        theta: Tensor,
        samples: Samples,
        sizes: Iterable[tuple[int, int | None]],
        fixed: Mapping[str, str],
    ) -> dict[str, str]:
        """Fix the engine for matrices of each size."""
        for n, m in sizes:
            known = fixed.get(_size(n, m))
            if known in ENGINES:
                self.choices[n, m] = known
        return {_size(n, m): self.chosen(theta, *samples, n, m) for n, m in sizes}

    def covers_none(self, theta: Tensor, X: PyTree) -> bool:
        """Test that no parameter is accounted for by a layer."""
        if count(X):
            self.tapes.record(theta, take(X, spread(count(X), PROBED)), self.function, rows=False)
        coverage = self.tapes.coverage
        return coverage is not None and coverage.plain.keys() >= set(self.function.layout.names)

    def _choose(self, theta: Tensor, X: PyTree, context: PyTree, n: int, m: int | None) -> str:
        if self.covers_none(theta, X):
            return "jacobian"
        if (n + (m or 0)) * self.function.layout.size < WORTH_CHOOSING:
            return "layerwise"
        model = CostModel(self, theta, X, context)
        return "layerwise" if model.layers_suffice(n, m) else choose(model, n, m)[0]

    @defer_interrupts(divisible=True)
    @EXACT_PRODUCTS
    def gram(
        self, theta: Tensor, X: PyTree, Y: PyTree | None, context_X: PyTree, context_Y: PyTree, preconditioner: Diagonal
    ) -> Tensor:
        """K(X, Y) by the engine chosen for its size."""
        if self.chosen(theta, X, context_X, count(X), None if Y is None else count(Y)) == "jacobian":
            plain = JacobianEngine(self.function, self.selection, self.memory, self.tensor_floats)
            return plain.gram(theta, X, Y, context_X, context_Y, preconditioner)
        return super().gram(theta, X, Y, context_X, context_Y, preconditioner)

    def diagonal(self, theta: Tensor, X: PyTree, context: PyTree, preconditioner: Diagonal) -> Tensor:
        """K(x, x), layer by layer if there is any."""
        if self.covers_none(theta, X):
            plain = JacobianEngine(self.function, self.selection, self.memory)
            return plain.diagonal(theta, X, context, preconditioner)
        return super().diagonal(theta, X, context, preconditioner)


def _size(n: int, m: int | None) -> str:
    return f"{n} symmetric" if m is None else f"{n} x {m}"


ENGINES: dict[str, type[Engine]] = {
    "auto": AutomaticEngine,
    "layerwise": LayerwiseEngine,
    "jacobian": JacobianEngine,
    "products": ProductsEngine,
    "autograd": AutogradEngine,
}


@runtime_checkable
class EngineValue(Protocol):
    """Value that makes an engine, given as ``engine=`` in place of a name."""

    def engine(self, function: ModelFunction, selection: OutputSelection, memory: int) -> Engine:
        """The engine for a network and a function of its outputs."""


def make_engine(
    engine: str | EngineValue | type[Engine],
    function: ModelFunction,
    selection: OutputSelection,
    memory: int | str,
    tensor_floats: bool = False,
) -> Engine:
    """The engine of that name or class, or the one that a value makes; others' are proved before use.

    ``tensor_floats`` is for those by name, which know of it; one without matrix products between gradients, as
    ``"products"``, computes all in float32.
    """
    if isinstance(engine, type) and issubclass(engine, Engine):
        refuse_abstract(engine)
        return proved(engine(function, selection, memory_bytes(memory)), engine.__name__)
    if not isinstance(engine, str | type) and isinstance(engine, EngineValue):
        return proved(engine.engine(function, selection, memory_bytes(memory)), repr(engine))
    if not isinstance(engine, str) or engine not in ENGINES:
        raise InputError(
            f"`engine={engine!r}` was given",
            f"Engines are {', '.join(map(repr, ENGINES))}, a subclass of `Engine`, or a value with a method `engine`",
            'Write `engine="auto"`',
        )
    return ENGINES[str(engine)](function, selection, memory_bytes(memory), tensor_floats)
