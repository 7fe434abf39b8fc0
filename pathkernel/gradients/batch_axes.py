"""Axes along which a network takes its samples and returns them, where these are not the first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.errors import InputError
from pathkernel.gradients.arguments import Key, places_of

BatchAxis = int | tuple[int | None, ...] | Mapping[Key, int | None]
"""One axis for all arguments and outputs; axes by the place of an argument; or by its name, and ``"outputs"``."""

OUTPUTS = "outputs"
"""Stands for what the network returns."""


@dataclass(frozen=True)
class BatchAxes:
    """Axes of a network's arguments and outputs that samples lie along.

    Outside the network's own call samples are always first. A tensor that has no such axis has them first inside, too.

    Attributes
    ----------
    argument
        Of arguments that are not named.
    outputs
        Of what the network returns.
    named
        Of arguments by their key; None for one that all samples share.
    """

    argument: int = 0
    outputs: int = 0
    named: Mapping[Key, int | None] = field(default_factory=dict)

    @classmethod
    def of(cls, batch_axis: BatchAxis, forward: Callable[..., Any]) -> BatchAxes:
        """The axes of a network with this ``forward``."""
        if isinstance(batch_axis, int):
            return cls(batch_axis, batch_axis)
        places = places_of(forward)
        if isinstance(batch_axis, tuple):
            keys = [places[i] if i < len(places) else i for i in range(len(batch_axis))]
            first = next((axis for axis in batch_axis if axis is not None), 0)
            return cls(0, first, dict(zip(keys, batch_axis, strict=True)))
        named = {
            places[key] if isinstance(key, int) and key < len(places) else key: axis for key, axis in batch_axis.items()
        }
        return cls(0, named.pop(OUTPUTS, 0) or 0, named)

    @property
    def are_first(self) -> bool:
        """True where samples are first everywhere."""
        return not (self.argument or self.outputs or any(self.named.values()))

    def of_argument(self, key: Key) -> int | None:
        """The axis of an argument; None where all samples share it."""
        return self.named.get(key, self.argument)

    def inward(self, key: Key, value: PyTree) -> PyTree:
        """An argument with samples first, as the network takes it."""
        axis = self.of_argument(key)
        return pytree.tree_map(lambda leaf: leaf.movedim(0, axis_in(leaf, axis or 0)), value) if axis else value

    def outward(self, key: Key, value: PyTree) -> PyTree:
        """An argument as the network takes it, with samples first."""
        axis = self.of_argument(key)
        return pytree.tree_map(lambda leaf: leaf.movedim(axis_in(leaf, axis or 0), 0), value) if axis else value

    def output_first(self, leaf: Any, n: int = 0, steps: Collection[int] = ()) -> Any:
        """A part of what the network returned, with samples first.

        Parameters
        ----------
        leaf
            As the network returned it. With samples along axis 1 it may be flattened: (T·n, …) for (T, n, …).
        n, steps
            How many samples the network was given, and how many steps of time, see `steps_of`.
        """
        if not self.outputs or not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        if self.outputs == 1 and n and leaf.shape[0] % n == 0 and leaf.shape[0] // n in steps:
            # A table (T, n) for T steps is none of T / n of them, whatever other argument is that long.
            as_usual = leaf.dim() > 1 and leaf.shape[1] == n and (leaf.dim() > 2 or leaf.shape[0] in steps)
            leaf = leaf if as_usual else leaf.unflatten(0, (-1, n))
        return leaf.movedim(axis_in(leaf, self.outputs), 0)

    def steps_of(self, arguments: Mapping[Key, Any]) -> tuple[int, frozenset[int]]:
        """Number of samples, and lengths of the axis before theirs, in arguments whose samples lie along axis 1."""
        leaves = [
            leaf
            for key, value in arguments.items()
            if self.of_argument(key) == 1
            for leaf in pytree.tree_leaves(value)
            if isinstance(leaf, Tensor) and leaf.dim() > 1
        ]
        return (leaves[0].shape[1] if leaves else 0), frozenset(leaf.shape[0] for leaf in leaves)


def axis_in(leaf: Tensor, axis: int) -> int:
    """The axis of the samples in a tensor."""
    return axis if leaf.dim() > axis else 0


def check_batch_axis(batch_axis: Any) -> BatchAxis:
    """Accept a ``batch_axis=``.

    Raises
    ------
    InputError
        For anything but an axis, axes by place, or axes by name.
    """

    def is_axis(axis: Any) -> bool:
        return isinstance(axis, int) and not isinstance(axis, bool) and axis >= 0

    if is_axis(batch_axis):
        return batch_axis
    axes: list[Any] | None = None
    if isinstance(batch_axis, (tuple, list)):
        axes = list(batch_axis)
    elif isinstance(batch_axis, Mapping) and all(isinstance(key, (str, int)) for key in batch_axis):
        axes = list(batch_axis.values())
    if axes and all(axis is None or is_axis(axis) for axis in axes):
        return dict(batch_axis) if isinstance(batch_axis, Mapping) else tuple(axes)
    raise InputError(
        f"`batch_axis={batch_axis!r}` was given",
        "It is the axis of the samples in what the network takes and returns, counted from 0: one for all, a tuple by "
        'the place of an argument, or a dict by its name, with "outputs" for what is returned and None for an argument '
        "that all samples share",
        'Write for example `batch_axis=1`, or `batch_axis={"x": 1, "positions": None, "outputs": 1}`',
    )


def batch_axis_to_json(batch_axis: BatchAxis) -> Any:
    """The form of a ``batch_axis=`` in the header of a store."""
    if isinstance(batch_axis, Mapping):
        return [[key, axis] for key, axis in batch_axis.items()]
    return batch_axis if isinstance(batch_axis, int) else {"places": list(batch_axis)}


def batch_axis_of_json(content: Any) -> BatchAxis:
    """The reverse of `batch_axis_to_json`."""
    if isinstance(content, list):
        return check_batch_axis(dict(content))
    return check_batch_axis(tuple(content["places"]) if isinstance(content, dict) else content)
