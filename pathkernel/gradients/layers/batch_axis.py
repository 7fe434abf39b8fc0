"""Axis of the samples of a batch in the tensors of a network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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

    def front(self, tensor: Tensor, n: int) -> Tensor:
        """Samples on the first axis, positions next to them."""
        if self.merged == "samples":
            split = tensor.unflatten(self.axis, (n, -1))
            return split.movedim(self.axis, 0)
        if self.merged == "positions":
            split = tensor.unflatten(self.axis, (-1, n))
            return split.movedim(self.axis + 1, 0)
        return tensor.movedim(self.axis, 0) if self.axis else tensor
