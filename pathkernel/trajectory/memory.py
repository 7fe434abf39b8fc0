"""Steps kept in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor

from pathkernel.trajectory.step import Step
from pathkernel.trajectory.store import Store, padded

T = TypeVar("T")


class MemoryStore(Store):
    """The store contract in its plainest form: a list."""

    def __init__(self) -> None:
        self._steps: list[Step] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_steps": with_memory_of_their_own(self._steps)}

    def append(self, step: Step) -> None:
        """Put a step behind the others."""
        self._steps.append(step)

    def read(self, index: int) -> Step:
        """The step with this index."""
        return self._steps[index]

    def __len__(self) -> int:
        return len(self._steps)

    def extend(self, tail: Tensor, pad: Callable[[Tensor], Tensor]) -> None:
        """Lengthen every vector of every step."""
        self._steps = [padded(step, tail, pad) for step in self._steps]


def with_memory_of_their_own(things: T) -> T:
    """The same steps, vectors …, with tensors that are not cut from larger ones, which a pickle would hold whole each.

    What was one object in several places is one object again.
    """
    known: dict[int, Any] = {}

    def own(thing: Any) -> Any:
        if id(thing) not in known:
            known[id(thing)] = made(thing)
        return known[id(thing)]

    def made(thing: Any) -> Any:
        if isinstance(thing, Tensor):
            return thing.clone() if thing.untyped_storage().nbytes() > thing.numel() * thing.element_size() else thing
        if is_dataclass(thing) and not isinstance(thing, type):
            other = copy.copy(thing)
            vars(other).update({each.name: own(getattr(thing, each.name)) for each in fields(thing)})
            return other
        if type(thing) in (list, tuple):
            return type(thing)(own(part) for part in thing)
        return {key: own(part) for key, part in thing.items()} if isinstance(thing, Mapping) else thing

    return own(things)
