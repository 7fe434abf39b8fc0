r"""Memory that a computation over n samples takes, from its allocations with few samples.

Every allocation is taken to be affine in n. Then so is what is held after each of them, and the peak is the largest of
as many lines,

.. math:: \mathrm{peak}(n) = \max_j (A_j + B_j n) ,

whichever of them is the highest with few samples.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pathkernel.runtime.workspace import MEASURED

_SCALED = torch.ops.aten.mul.Scalar

FEW = (2, 3)
"""Samples with which a computation is tried out."""

TRIED = 3
"""Samples of a single trial; rows of two in float32 would be as large as a vector of P numbers in float64."""

VECTOR = 1 << 20
"""Bytes from which on a vector of θ is told from what samples take by its size alone. Chosen: below it neither takes
much, and something else may happen to be as large."""


class Allocations(TorchDispatchMode):
    """Tensors allocated and freed inside, in bytes; what operations need beside their results is not seen.

    Attributes
    ----------
    changes
        Bytes of each allocation, and minus the bytes of each that was freed, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[int] = []
        self._held: dict[int, int] = {}

    def __enter__(self) -> Allocations:
        self._token = MEASURED.set(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        MEASURED.reset(self._token)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is compiled, and what torch would do about it is import its compiler: more than a second.
        return False

    @property
    def held(self) -> int:
        """Bytes that are still there."""
        return sum(self.changes)

    @property
    def peak(self) -> int:
        """The most that was there at once."""
        return int(np.cumsum([0, *self.changes]).max())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _SCALED and args[0]._is_zerotensor():
            # The tangent of what has none, in `x.add_(y, alpha=2)`: below a mode, torch reads memory that it has not.
            args = torch.zeros(args[0].shape, dtype=args[0].dtype, device=args[0].device), *args[1:]
        result = func(*args, **(kwargs or {}))
        if _allocates(func):
            for leaf in (result,) if isinstance(result, Tensor) else pytree.tree_leaves(result):
                if isinstance(leaf, Tensor) and _address(leaf) not in self._held:
                    self._note(leaf, args)
        return result

    def _note(self, tensor: Tensor, given: Sequence[Any]) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if any(isinstance(other, Tensor) and _address(other) == address for other in given):
            return
        size = storage.nbytes()
        self._held[address] = size
        self.changes.append(size)
        weakref.finalize(storage, self._freed, address).atexit = False

    def _freed(self, address: int) -> None:
        self.changes.append(-self._held.pop(address))


@functools.cache
def _allocates(function: Any) -> bool:
    """True where the results of an operation may lie in memory of their own."""
    return not (function.is_view or function._schema.is_mutable)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Footprint:
    """Bytes that a computation over n samples takes, as lines in n.

    Attributes
    ----------
    constant, slope
        A and B of what is there after each allocation; those of what is still there at the end come last.
    """

    constant: np.ndarray
    slope: np.ndarray

    def peak(self, n: float) -> float:
        """The most that n samples take at once."""
        return float((self.constant + self.slope * n).max())

    def held(self, n: float) -> float:
        """Memory that is still there while the result is."""
        return float(self.constant[-1] + self.slope[-1] * n)

    @property
    def at_the_end(self) -> Footprint:
        """Memory that is still there while the result is."""
        return Footprint(self.constant[-1:], self.slope[-1:])

    def plus(self, constant: float, slope: float = 0.0) -> Footprint:
        """The same with so many bytes more, and so many more for each sample."""
        return Footprint(self.constant + constant, self.slope + slope)

    def times(self, factor: float) -> Footprint:
        """So many times as much."""
        return Footprint(factor * self.constant, factor * self.slope)

    def most(self, memory: float, limit: int) -> int:
        """Samples, up to a limit, whose peak fits into so many bytes; 0 where none does."""
        if (self.constant + self.slope * limit <= memory).all():
            return limit
        rising = self.slope > 0
        if not rising.any() or self.constant[~rising].max(initial=0.0) > memory:
            return 0
        return int(min(limit, max(0.0, ((memory - self.constant[rising]) / self.slope[rising]).min())))


def allocated(computation: Callable[[int], Any], n: int) -> np.ndarray:
    """Bytes of each allocation of ``computation(n)``, and minus those of each that it frees before its result."""
    with Allocations() as allocations:
        result = computation(n)
        changes = np.array([0, *allocations.changes], dtype=float)
        del result
    return changes


def proportional(allocations: Callable[[int], np.ndarray], vector: float) -> Footprint:
    """A footprint from a single trial, whose lines are nowhere below what `footprint_of` says of more samples.

    All that is not as large as a vector of P numbers is taken to grow in proportion to the number of samples.

    Parameters
    ----------
    allocations
        What `allocated` says of so many samples.
    vector
        Bytes of a vector of P numbers in float64.
    """
    changes = allocations(TRIED)
    same = np.isin(np.abs(changes), (vector, vector / 2)) & (vector >= VECTOR)
    constant, growing = (np.where(own, changes, 0.0).cumsum() for own in (same, ~same))
    return Footprint(constant, growing / TRIED)


def footprint(computation: Callable[[int], Any], few: tuple[int, int] = FEW) -> Footprint:
    """The footprint of ``computation(n)``, which is run with few samples and with a few more."""
    return footprint_of(lambda n: allocated(computation, n), few)


def footprint_of(allocations: Callable[[int], np.ndarray], few: tuple[int, int] = FEW) -> Footprint:
    """The footprint of a computation, from what `allocated` says of few samples and of a few more."""
    one, two = changes = [allocations(n) for n in few]
    if len(one) == len(two) and (np.sign(one) == np.sign(two)).all():
        slopes = (two - one) / (few[1] - few[0])
        slope, constant = slopes.cumsum(), (one - few[0] * slopes).cumsum()
    else:  # another course of things with more samples: two points of one line, and what samples held
        peaks, held = (np.array([f(c.cumsum()) for c in changes]) for f in (np.max, lambda sums: sums[-1]))
        slope = np.array([max(0.0, (pair[1] - pair[0]) / (few[1] - few[0])) for pair in (peaks, held)])
        slope[0] = max(slope)
        constant = np.maximum(0.0, np.array([peaks[1], held[1]]) - few[1] * slope)
    return Footprint(constant, slope)
