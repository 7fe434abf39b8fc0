"""Axis of the samples of a batch in the tensors of a network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Place = tuple[int, ...]
"""Number of a torch function among those that a pass calls; inside one that is decomposed, the outer number first.
Nothing that is found out about a pass changes it."""


@dataclass(frozen=True)
class Roles:
    """Calls whose results are of samples or of none otherwise than their arguments tell.

    Attributes
    ----------
    shared
        Results that have no part for each sample though some argument is no parameter: rows of a table of positions
        that ``arange`` names.
    spread
        Results of parameters alone that have one: a learned query that is repeated for every sample, and what a layer
        makes of it.
    """

    shared: frozenset[Place] = frozenset()
    spread: frozenset[Place] = frozenset()


NO_ROLES = Roles()
"""All results are what their arguments tell."""


@dataclass(frozen=True)
class Arrangement:
    """Place of the samples in a tensor.

    Attributes
    ----------
    axis
        The axis along which they lie.
    merged
        ``""``; or, where that axis holds positions too, which of both changes slowest: ``"samples"`` or
        ``"positions"``.
    batched
        Which arguments of the function hold one part for each sample along that axis, by their number; the others are
        the same for all samples, whatever their length.
    """

    axis: int = 0
    merged: str = ""
    batched: frozenset[int] = frozenset()

    def holds(self, tensor: Tensor, n: int) -> bool:
        """Test that there is a part for each of n samples."""
        length = tensor.shape[self.axis] if tensor.dim() > self.axis else 0
        return length > 0 and length % n == 0 if self.merged else length == n

    def front(self, tensor: Tensor, n: int) -> Tensor:
        """Samples on the first axis, positions next to them."""
        if self.merged == "samples":
            split = tensor.unflatten(self.axis, (n, -1))
            return split.movedim(self.axis, 0)
        if self.merged == "positions":
            split = tensor.unflatten(self.axis, (-1, n))
            return split.movedim(self.axis + 1, 0)
        return tensor.movedim(self.axis, 0) if self.axis else tensor


@dataclass(frozen=True)
class SamplesFirst:
    """Function of the tensors of a call that brings the samples to the front.

    Attributes
    ----------
    arrangement, n
        Where the n samples lie in the call's result.
    """

    arrangement: Arrangement
    n: int

    def __call__(self, tensor: Tensor) -> Tensor:
        """Samples on the first axis."""
        return self.arrangement.front(tensor, self.n)
