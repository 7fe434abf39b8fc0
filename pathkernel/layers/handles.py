"""Tensors made of parameters alone: how a gradient in them is a gradient in θ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from pathkernel.layers.factors import Dense, Factor, Outer

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
    places
        Which entry of the parameter each entry of the tensor is: what the same views make of 0, 1, 2, ….
    origin
        0, 1, 2, … in the parameter's shape.
    """

    name: str
    places: Tensor
    origin: Tensor

    @classmethod
    def of(cls, name: str, parameter: Tensor) -> View:
        """The parameter itself."""
        origin = torch.arange(parameter.numel()).reshape(parameter.shape)
        return cls(name, origin, origin)

    def viewed(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The same function of the places."""
        return function(self.places, *arguments, **options)

    def names(self) -> set[str]:
        """The parameter."""
        return {self.name}

    @property
    def where(self) -> slice | None:
        """The part of the parameter, where it is one piece, in its own order or transposed."""
        places = self.places
        if places.untyped_storage().data_ptr() != self.origin.untyped_storage().data_ptr():
            return None
        if not (places.is_contiguous() or self.transposed):
            return None
        return slice(int(places.storage_offset()), int(places.storage_offset()) + places.numel())

    @property
    def transposed(self) -> bool:
        """Whether rows and columns have changed places."""
        return self.places.dim() == 2 and not self.places.is_contiguous() and self.places.t().is_contiguous()

    def pull(self, gradients: Factor) -> Iterator[Contribution]:
        """Unchanged for the parameter itself or a part of it; otherwise entries are added where they belong."""
        where = self.where
        if where is not None and not self.transposed:
            yield self.name, where, gradients
        elif where is not None and isinstance(gradients, Outer):
            yield self.name, where, replace(gradients, transposed=not gradients.transposed)
        else:
            rows = gradients.rows()
            whole = rows.new_zeros(*rows.shape[:2], self.origin.numel())
            whole.index_add_(2, self.places.reshape(-1), rows)
            yield self.name, slice(0, self.origin.numel()), Dense(whole)


@dataclass(frozen=True)
class Composed(Handle):
    """What a function made of such tensors (weight normalisation, a merged adapter).

    Attributes
    ----------
    function
        Of the tensors in ``arguments``.
    arguments, sources
        Their values and what they are.
    shape
        Of the result.
    """

    function: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    sources: tuple[Handle, ...]
    shape: torch.Size

    def names(self) -> set[str]:
        """The parameters."""
        return set().union(*(source.names() for source in self.sources))

    def pull(self, gradients: Factor) -> Iterator[Contribution]:
        """Rows pulled back through the function."""
        rows = gradients.rows()
        n, k = rows.shape[:2]
        pull_back = vjp(self.function, *self.arguments)[1]
        pulled = vmap(pull_back)(rows.reshape(n * k, *self.shape))
        for source, gradient in zip(self.sources, pulled, strict=True):
            yield from source.pull(Dense(gradient.reshape(n, k, -1)))
