"""An engine that somebody else wrote, compared with plain autograd before its numbers are used."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.errors import InputError
from pathkernel.gradients.pytrees import count, take
from pathkernel.tangent_kernel.engines.engine import Diagonal, Engine, Node, Samples, number_of_components
from pathkernel.tangent_kernel.engines.jacobian import AutogradEngine
from pathkernel.tangent_kernel.engines.jacobian_products import JacobianProducts, PlainJacobianProducts
from pathkernel.tangent_kernel.outputs import OutputSelection

COMPARED = 3
"""Samples on each side of a matrix whose entries are compared: the first, one from the middle, the last."""

ATTRIBUTES = ("choices", "function", "memory", "products", "selection", "tensor_floats")
"""What `Engine.__init__` puts on every engine."""


def proved(engine: Any, made_by: str) -> Engine:
    """The engine, with a proof before its use unless it is one of the package.

    Parameters
    ----------
    engine
        What a class or a value made.
    made_by
        That class or value, for messages.

    Raises
    ------
    InputError
        For what is no whole engine.
    """
    if type(engine).__module__.partition(".")[0] == "pathkernel":
        return engine
    if not isinstance(engine, Engine):
        raise InputError(
            f"`engine={made_by}` made a {type(engine).__name__}",
            "Kernels are computed by an `Engine`",
            "Return an instance of a subclass of `pathkernel.tangent_kernel.engines.Engine`",
        )
    missing = [name for name in ATTRIBUTES if not hasattr(engine, name)]
    if missing:
        raise InputError(
            f"Engine {type(engine).__name__} has no {', '.join(f'`{name}`' for name in missing)}",
            "`Engine.__init__` puts them on every engine",
            "Call `super().__init__(function, selection, memory)` first in its `__init__`",
        )
    if not isinstance(getattr(engine, "name", None), str):
        raise InputError(
            f"Engine {type(engine).__name__} has no `name`",
            "An engine says what it is called, in results and messages",
            f'Write `name = "{type(engine).__name__.lower()}"` in the class',
        )
    return ProvedEngine(engine)


def refuse_abstract(engine: type[Engine]) -> None:
    """Refuse a class that lacks methods of the contract.

    Raises
    ------
    InputError
        Naming them.
    """
    missing = sorted(getattr(engine, "__abstractmethods__", ())) if inspect.isabstract(engine) else []
    if missing:
        raise InputError(
            f"`engine={engine.__name__}` has no {' and no '.join(f'`{name}`' for name in missing)}",
            "An engine has both methods `gram` and `diagonal`",
            "Define them in the class, as `pathkernel.tangent_kernel.engines.Engine` describes them",
        )


class ProvedEngine(Engine):
    r"""Another engine, each of whose ways to a result is compared with autograd the first time that it is taken.

    Of matrices and diagonals a few entries are compared, of the Jacobian's products those with random vectors. Results
    are copied, so that an engine may return memory that it uses again.

    Parameters
    ----------
    given
        The engine. Where it is not `exact`, the form of its results alone is checked.
    """

    def __init__(self, given: Engine) -> None:
        self.given, self.name, self.exact = given, given.name, given.exact  # type: ignore[misc]
        self.function, self.selection = given.function, given.selection
        self.products, self.memory, self.choices = given.products, given.memory, given.choices
        self.tensor_floats = given.tensor_floats
        self._known: set[tuple[Any, ...]] = set()
        self._at: tuple[bool, bool] = (False, False)

    def gram(
        self, theta: Tensor, X: PyTree, Y: PyTree | None, context_X: PyTree, context_Y: PyTree, preconditioner: Diagonal
    ) -> Tensor:
        """K(X, Y) as the engine gives it, once some entries were compared."""
        found = self.given.gram(theta, X, Y, context_X, context_Y, preconditioner)
        columns, context = (X, context_X) if Y is None else (Y, context_Y)
        result = self._checked(found, "gram", (count(X), count(columns)), symmetric=Y is None)
        if self._is_due("gram", Y is None, preconditioner is None):
            rows, of = _spread(count(X)), _spread(count(columns))
            left = self._rows(theta, take(X, rows), take(context_X, rows), preconditioner)
            right = self._rows(theta, take(columns, of), take(context, of), preconditioner)
            self._compare("gram", result[rows][:, of], self._reference.contract(left, right), _norm(left, right))
        return result

    def diagonal(self, theta: Tensor, X: PyTree, context: PyTree, preconditioner: Diagonal) -> Tensor:
        """K(x, x) as the engine gives it, once some entries were compared."""
        result = self._checked(self.given.diagonal(theta, X, context, preconditioner), "diagonal", (count(X),))
        if self._is_due("diagonal", preconditioner is None):
            chosen = _spread(count(X))
            rows = self._rows(theta, take(X, chosen), take(context, chosen), preconditioner)
            places = range(len(chosen))
            expected = self._reference.contract(rows, rows)[places, places]
            self._compare("diagonal", result[chosen], expected, _norm(rows, rows))
        return result

    def jacobian(self, theta: Tensor, samples: Samples, memory: int) -> JacobianProducts:
        """J as the engine gives it, once its products with random vectors were compared."""
        found = self.given.jacobian(theta, samples, memory)
        if type(self.given).jacobian is Engine.jacobian or found.sketched is not None or not self._is_due("jacobian"):
            return found
        n, full = count(samples[0]), self.selection.combine == "full"
        k = number_of_components(self, theta, *samples)
        generator = torch.Generator().manual_seed(n)
        shapes = ((n, k, 1), (1, 1, len(theta))) if full else ((n, 1), (k, 1, len(theta)))
        u, v = (torch.randn(s, dtype=torch.float64, generator=generator).to(self.function.device) for s in shapes)
        plain = PlainJacobianProducts(self.function, self.selection, theta, *samples)
        pulled, expected = found.pull(u, slice(0, k)), plain.pull(u, slice(0, k))
        self._compare("jacobian", pulled, expected, expected.abs().max().item())
        # ⟨u, J v⟩ = ⟨Jᵀ u, v⟩ says that the other product belongs to the same J.
        pushed, size = (u * found.push(v, slice(0, k))).sum(), expected.norm().item() * v.norm().item()
        self._compare("jacobian", pushed, (expected * v).sum(), size)
        return found

    def at(self, node: Node, selection: OutputSelection | None = None) -> Engine:
        """The engine at a node; what it is compared with gets there without it."""
        given = self.given.at(node, selection)
        if not node.buffers and selection is None:
            return self
        if selection is not None and getattr(given, "selection", None) is not selection:
            raise InputError(
                f"`at` of engine {self.name!r} returned an engine with other outputs than it was given",
                "Random outputs are drawn afresh at every node of a path",
                "Return an engine whose `selection` is the one that `at` is given, as `Engine.at` does",
            )
        engine = copy.copy(self)
        engine.given = given
        engine._at = (bool(node.buffers), selection is not None)
        if node.buffers:
            engine.function = self.function.with_(constants=node.buffers)
        if selection is not None:
            engine.selection = selection
        return engine

    def fix_choices(
        self, theta: Tensor, samples: Samples, sizes: Iterable[tuple[int, int | None]], fixed: Mapping[str, str]
    ) -> dict[str, str]:
        """Choices of the engine itself."""
        return self.given.fix_choices(theta, samples, sizes, fixed)

    def _is_due(self, *way: Any) -> bool:
        key = (*way, *self._at)
        due = self.exact and key not in self._known
        self._known.add(key)
        return due

    @property
    def _reference(self) -> AutogradEngine:
        return AutogradEngine(self.function, self.selection, sys.maxsize)

    def _rows(self, theta: Tensor, X: PyTree, context: PyTree, preconditioner: Diagonal) -> Tensor:
        """√M ∇h, (n, K, P), by plain autograd."""
        rows = self._reference.rows(theta, X, context)
        return rows if preconditioner is None else rows * preconditioner.sqrt().to(rows)

    def _checked(self, found: Any, method: str, samples: tuple[int, ...], symmetric: bool = False) -> Tensor:
        """A copy of a result that has the form of the contract."""
        full = self.selection.combine == "full"
        right = isinstance(found, Tensor) and found.dtype == torch.float64
        right = right and found.shape[: len(samples)] == samples and found.dim() == len(samples) + 2 * full
        if not right:
            form = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            wanted = f"({', '.join(map(str, samples))}{', K, K' * full}{',' * (len(samples) == 1 and not full)})"
            raise InputError(
                f"`{method}` of engine {self.name!r} returned {form}",
                f"It returns a tensor of torch.float64 {wanted} here",
                "Return numbers in float64, one row for each sample of X and one column for each of Y",
            )
        if symmetric and not torch.equal(
            found.nan_to_num(), (found.permute(1, 0, 3, 2) if full else found.T).nan_to_num()
        ):
            raise InputError(
                f"`gram` of engine {self.name!r} returned a matrix that is not symmetric for Y None",
                "K(X, X) is exactly symmetric, not to rounding",
                "Return `(K + K.T) / 2` where Y is None",
            )
        return found.clone()

    def _compare(self, method: str, found: Tensor, expected: Tensor, scale: float) -> None:
        tolerance = torch.finfo(self.products).eps ** 0.5  # half of the digits: more than rounding, less than a mistake
        off = found.shape != expected.shape or not (found - expected).abs().max().item() <= tolerance * scale
        if not off or not expected.isfinite().all():
            return
        by = "of another shape" if found.shape != expected.shape else "off by "
        by += f"{(found - expected).abs().max().item() / (scale or 1.0):.2g} of its size" if by == "off by " else ""
        raise InputError(
            f"What `{method}` of engine {self.name!r} returned is {by}, compared with plain autograd",
            "An engine with `exact = True` gives the kernel of the network in evaluation mode to rounding, with the "
            "preconditioner, buffers and outputs that it is asked for",
            f'Mend `{method}`, write `exact = False` in the class if it approximates, or write `engine="auto"`',
        )


def _spread(n: int) -> list[int]:
    """The first, a middle and the last of n samples."""
    return sorted({0, n // 2, n - 1})


def _norm(left: Tensor, right: Tensor) -> float:
    """The largest that an inner product of two rows can be."""
    return left.flatten(1).norm(dim=1).max().item() * right.flatten(1).norm(dim=1).max().item()
