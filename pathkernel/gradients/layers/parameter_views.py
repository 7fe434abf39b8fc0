"""Tensors made of parameters alone: how a gradient in them is a gradient in θ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from pathkernel.gradients.layers.factor import Factor
from pathkernel.gradients.layers.factors import Dense

Contribution = tuple[str, slice, Factor]
"""Parameter, the part of it, and the gradients."""

_METHODS = (
    *("t", "transpose", "permute", "view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "expand"),
    *("expand_as", "chunk", "split", "unbind", "narrow", "select", "contiguous", "movedim", "repeat", "view_as"),
    *("swapaxes", "broadcast_to", "__getitem__"),
)
VIEWS = frozenset(
    {
        *(getattr(Tensor, name) for name in _METHODS),
        *(getattr(torch, name) for name in _METHODS if hasattr(torch, name)),
        *(vars(Tensor.__mro__[1])[name].__get__ for name in ("T", "mT")),
    }
)
"""Functions whose results hold entries of their first argument, moved and repeated but not changed."""


class Handle(ABC):
    """A tensor that depends on parameters and on nothing else."""

    @abstractmethod
    def names(self) -> set[str]:
        """The parameters."""

    @abstractmethod
    def pull(self, gradients: Factor) -> Iterator[Contribution]:
        """Gradients in the parameters, from gradients in this tensor."""


@dataclass(frozen=True)
class View(Handle):
    """Entries of one parameter; the parameter itself to begin with.

    Attributes
    ----------
    name
        The parameter.
    shape
        Of the parameter.
    moved
        `places` of a view; None for the parameter itself.
    parent
        That of which it is a view.
    """

    name: str
    shape: torch.Size
    moved: Tensor | None = None
    parent: View | None = None

    @property
    def whole(self) -> bool:
        """True of the parameter itself."""
        return self.moved is None

    @cached_property
    def origin(self) -> Tensor:
        """0, 1, 2, … in the parameter's shape; most passes take no views and never need it."""
        return torch.arange(self.shape.numel()).reshape(self.shape) if self.parent is None else self.parent.origin

    @property
    def places(self) -> Tensor:
        """Entry of the parameter that each entry of the tensor is: what the same views make of 0, 1, 2, …."""
        return self.origin if self.moved is None else self.moved

    def viewed(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Places of a view of the tensor."""
        return function(self.places, *arguments, **options)

    def at(self, places: Tensor) -> View:
        """A view of this."""
        return View(self.name, self.shape, places, self)

    def names(self) -> set[str]:
        """The parameter."""
        return {self.name}

    def repeated(self, axis: int) -> bool:
        """Test that the parts along an axis are the same entries."""
        places = self.places
        return places.stride(axis) == 0 or bool((places == places.narrow(axis, 0, 1)).all())

    @cached_property
    def where(self) -> slice | None:
        """The part of the parameter, where it is one piece, in its own order or transposed."""
        if self.whole:
            return slice(0, self.shape.numel())
        places = self.places
        if places.untyped_storage().data_ptr() == self.origin.untyped_storage().data_ptr():
            first = int(places.storage_offset()) if places.is_contiguous() or self.transposed else None
        else:  # picked: rows of a table in their own order
            flat = places.reshape(-1)
            first = int(flat[0]) if len(flat) and bool((flat.diff() == 1).all()) else None
        return None if first is None else slice(first, first + places.numel())

    @property
    def transposed(self) -> bool:
        """True where rows and columns have changed places."""
        places = self.moved
        return places is not None and places.dim() == 2 and not places.is_contiguous() and places.t().is_contiguous()

    def pull(self, gradients: Factor) -> Iterator[Contribution]:
        """Unchanged for the parameter itself or a part of it; otherwise entries are added where they belong."""
        where = self.where
        own = gradients.turned() if self.transposed else gradients
        if where is not None and own is not None:
            yield self.name, where, own
        else:
            rows = gradients.rows()
            whole = rows.new_zeros(*rows.shape[:2], self.shape.numel())
            whole.index_add_(2, self.places.reshape(-1).to(rows.device), rows)
            yield self.name, slice(0, self.shape.numel()), Dense(whole)


@dataclass(frozen=True)
class Composed(Handle):
    """Result of a function of such tensors (weight normalisation, a merged adapter).

    Attributes
    ----------
    function
        Of the tensors in ``arguments``.
    arguments, sources
        Their values and what they are.
    shape
        Of the result.
    rules
        Number of an argument → its gradients from those in the result, (n, K, *shape), where a rule says so; others are
        pulled back through the function row by row.
    """

    function: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    sources: tuple[Handle, ...]
    shape: torch.Size
    rules: Mapping[int, Callable[[Tensor], Factor]] = field(default_factory=dict)

    def names(self) -> set[str]:
        """The parameters."""
        return set().union(*(source.names() for source in self.sources))

    def pull(self, gradients: Factor) -> Iterator[Contribution]:
        """Rows pulled back through the function."""
        rows = gradients.rows()
        n, k = rows.shape[:2]
        others = [i for i in range(len(self.sources)) if i not in self.rules]
        for i, rule in self.rules.items():
            yield from self.sources[i].pull(rule(rows.reshape(n, k, *self.shape)))
        if not others:
            return

        def of_others(*values: Tensor) -> Tensor:
            filled = list(self.arguments)
            for i, value in zip(others, values, strict=True):
                filled[i] = value
            return self.function(*filled)

        pull_back = vjp(of_others, *(self.arguments[i] for i in others))[1]
        # Component by component, as in the proof of a tape.
        pulled = [vmap(pull_back)(own) for own in rows.reshape(n, k, *self.shape).unbind(1)]
        for i, parts in zip(others, zip(*pulled, strict=True), strict=True):
            yield from self.sources[i].pull(Dense(torch.stack([part.reshape(n, -1) for part in parts], dim=1)))
