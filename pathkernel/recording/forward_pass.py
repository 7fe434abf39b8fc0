"""A forward pass in training, and what backward passes bring to its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pathkernel.errors import InputError
from pathkernel.gradients.forward_state import ForwardState
from pathkernel.gradients.returned import batch_outputs
from pathkernel.recording.calls import SeenCall

Shapes = list[tuple[torch.Size, torch.dtype, torch.device]]
"""Shape, type and device of each output."""


class ForwardPass:
    r"""A forward pass of the network in training, and :math:`\lambda = \partial L / \partial z` of its outputs.

    Parameters
    ----------
    state
        How it ran.
    leaves
        Its outputs, of which shapes and types are kept; no graph is held.
    checksum
        That of θ; None where nobody will ask.
    drew_from
        Random generators that it drew from and that no record holds, where somebody will ask.
    call
        What the network was given.
    first
        Puts the samples first in an output.

    Attributes
    ----------
    owner
        The announced batch that it is of, see `pathkernel.recording.micro_batches`; None as long as there is none.
    outputs
        A copy of its outputs, where somebody will ask; else None.
    """

    def __init__(
        self,
        state: ForwardState,
        leaves: list[Tensor],
        checksum: int | None = None,
        drew_from: tuple[str, ...] = (),
        call: SeenCall | None = None,
        first: Callable[[Tensor], Tensor] = lambda leaf: leaf,
    ) -> None:
        self.state, self.checksum, self.drew_from, self.call, self._first = state, checksum, drew_from, call, first
        self.shapes: Shapes = [(first(leaf).shape, leaf.dtype, leaf.device) for leaf in leaves]
        self.owner: Any = None
        self.outputs = None if checksum is None else [first(leaf.detach()).clone() for leaf in leaves]
        self._arrived: dict[str | None, dict[int | None, Tensor]] = {}

    @property
    def channels(self) -> tuple[str | None, ...]:
        """Names under which backward passes ran that brought something; None for no name."""
        return tuple(self._arrived)

    def add(self, channel: str | None, place: int | None, cotangent: Tensor) -> None:
        """Add what one backward pass brought to an output; the place None stands for the returned loss."""
        cotangent = cotangent if place is None else self._first(cotangent)
        arrived = self._arrived.setdefault(channel, {})
        before = arrived.get(place)
        arrived[place] = cotangent if before is None else before + cotangent

    def forget(self) -> None:
        """Drop what arrived, which has been taken or cleared: a graph that is kept may bring more."""
        self._arrived = {}

    def loss_slope(self, channel: str | None) -> Tensor | None:
        """Derivative of what was differentiated in the loss that the network returned; None where none arrived."""
        arrived = self._arrived[channel].get(None)
        return None if arrived is None else arrived.double().cpu()

    def cotangents(self, channel: str | None, n: int) -> Tensor | None:
        """λ, (n, C), zero for outputs that nothing depended on; None where none has arrived.

        Raises
        ------
        InputError
            When the outputs are not those of n samples.
        """
        arrived = {place: value for place, value in self._arrived[channel].items() if place is not None}
        if not arrived:
            return None
        if len(self.shapes) == 1 and len(self.shapes[0][0]) == 2 and self.shapes[0][0][0] == n:
            return arrived[0]
        given = [
            arrived[k] if k in arrived else torch.zeros(shape, dtype=dtype, device=device)
            for k, (shape, dtype, device) in enumerate(self.shapes)
        ]
        return batch_outputs(given, n)


def zero_outputs(shapes: Shapes, n: int) -> Tensor | None:
    """λ = 0, (n, C); None where the outputs are not those of n samples."""
    zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in shapes]
    try:
        return batch_outputs(zeros, n)
    except InputError:
        return None


class BackwardPass:
    """A backward pass that is under way: the cotangents that it has brought so far.

    Attributes
    ----------
    accumulates
        Whether gradients are added to the parameters' own: those of `torch.autograd.grad` are not.
    """

    def __init__(self) -> None:
        self.accumulates = False
        self.brought: list[tuple[ForwardPass, int | None, Tensor]] = []
