"""Calls of the network in training: what in them is of the samples, and what all samples share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.errors import InputError
from pathkernel.gradients.arguments import Key, arguments_of, keyed, places_of, same_arguments
from pathkernel.gradients.batch_axes import BatchAxes, axis_in


@dataclass(frozen=True, eq=False)
class SeenCall:
    """The arguments of a forward pass, as the loop gave them.

    Attributes
    ----------
    arguments
        By their keys, without graphs; they share memory with the loop's, or are copies.
    by_name
        Keys of those that were given by name.
    versions
        How often each tensor had been written on, in the order of the leaves.
    copied
        Whether they are copies.
    """

    arguments: Mapping[Key, Any]
    by_name: frozenset[Key]
    versions: tuple[int, ...]
    copied: bool

    @classmethod
    def of(cls, places: Sequence[Key], arguments: tuple[Any, ...], named: Mapping[str, Any], copied: bool) -> SeenCall:
        """A call that is about to be made; see `pathkernel.gradients.arguments.places_of`."""

        def held(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            versions.append(leaf._version)
            return leaf.detach().clone() if copied else leaf.detach()

        versions: list[int] = []
        every = keyed(places, arguments, named)
        for key, value in every.items():  # most are tensors, and torch's own way through a tree takes longer
            every[key] = held(value) if isinstance(value, Tensor) else pytree.tree_map(held, value)
        return cls(every, frozenset(named), tuple(versions), copied)

    @property
    def is_intact(self) -> bool:
        """True where nothing was written on the arguments since."""
        leaves = (leaf for leaf in pytree.tree_leaves(dict(self.arguments)) if isinstance(leaf, Tensor))
        return self.copied or self.versions == tuple(leaf._version for leaf in leaves)


class CallReader:
    """Takes calls apart: what is of the samples, samples first, and what they share.

    An argument is of the samples if it stands for one of the inputs in the data, or if its tensors have one row for
    each sample along the axis of the samples; all others (None, flags, numbers, text, tensors of another length) are
    shared. A tensor that was seen to be shared once, by several samples, is shared ever after.

    Parameters
    ----------
    forward
        The method that takes the arguments.
    axes
        Where samples lie in them.
    example
        The inputs of a sample of the data, as a batch of one; None where there are none.
    """

    def __init__(self, forward: Callable[..., Any], axes: BatchAxes, example: PyTree) -> None:
        self.forward, self.axes, self.example = forward, axes, example
        self.places = places_of(forward)
        self.in_data: tuple[Key, ...] = ()
        if example is not None:
            arguments, named = arguments_of(forward, example)
            self.in_data = tuple(keyed(self.places, arguments, named))
        self._keys, self._shared_keys = frozenset(self.in_data), set[Key]()
        self._shared: Mapping[Key, Any] = {}

    def read(self, call: SeenCall, n: int) -> tuple[dict[Key, Any], Mapping[Key, Any]]:
        """Arguments that are of n samples, samples first, by their keys; and those that they share.

        Raises
        ------
        InputError
            For an argument that holds both.
        """
        if call.arguments.keys() == self._keys:
            samples = {key: self._first(key, value) for key, value in call.arguments.items()}
            self._shared = self._shared and {}
            return samples, self._shared
        samples, shared = {}, {}
        for key, value in call.arguments.items():
            if key in self.in_data or self._is_of_samples(key, value, n):
                samples[key] = self._first(key, value)
            else:
                shared[key] = value
        if n > 1:  # of tensors alone: a state may be None before the first batch
            self._shared_keys |= {
                key for key, own in shared.items() if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(own))
            }
        if not same_arguments(shared, self._shared):
            if not call.copied and not call.is_intact:
                raise changed_since()
            self._shared = {key: pytree.tree_map(_copied, value) for key, value in shared.items()}
        return samples, self._shared

    def _is_of_samples(self, key: Key, value: Any, n: int) -> bool:
        if self.axes.of_argument(key) is None or key in self._shared_keys:
            return False
        leaves = pytree.tree_leaves(value)
        found = [isinstance(leaf, Tensor) and self.rows(key, leaf) == n for leaf in leaves]
        if any(found) and not all(found):
            others = [
                f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
                for leaf, own in zip(leaves, found, strict=True)
                if not own
            ]
            raise InputError(
                f"The argument {shown(key)} of the network holds tensors of {n} samples, and with them {others[0]}",
                "An argument is of the samples, with one row for each in every tensor of it, or is shared by all",
                "Hand what the samples share to `forward` as an argument of its own, or say where samples lie with "
                "`KernelRecorder(..., batch_axis=...)`",
            )
        return bool(leaves) and all(found)

    def rows(self, key: Key, leaf: Tensor) -> int:
        """Length of a tensor along the axis of the samples."""
        return leaf.shape[axis_in(leaf, self.axes.of_argument(key) or 0)] if leaf.dim() else 0

    def _first(self, key: Key, value: Any) -> Any:
        return self.axes.outward(key, value)

    def inputs(self, samples: Mapping[Key, Any], call: SeenCall) -> PyTree:
        """Arguments of samples in the form in which inputs are kept: as in the data, or else as they were given.

        Alone, a tuple of those given by place, or a dict of those given by name.
        """
        if self.example is not None and samples.keys() == self._keys:
            if isinstance(self.example, dict) and not arguments_of(self.forward, self.example)[0]:
                return {key: samples[key] for key in self.example}
            values = tuple(samples[key] for key in self.in_data)
            return values if isinstance(self.example, (tuple, list)) else values[0]
        free = [key for key in self.places if key not in self._shared]
        in_order = all(key == (free[i] if i < len(free) else key) for i, key in enumerate(samples))
        if in_order and not call.by_name & samples.keys():
            values = tuple(samples.values())
            alone = len(values) == 1 and not isinstance(values[0], (tuple, list))
            return values[0] if alone and arguments_of(self.forward, values[0])[0] else values
        if not all(isinstance(key, str) for key in samples):
            raise InputError(
                f"The network was given samples as the arguments {', '.join(map(shown, samples))}",
                "Samples are handed over by place, or by names that `forward` has",
                "Write `forward` with a named parameter for each of its inputs",
            )
        return dict(samples)


def shown(key: Key) -> str:
    """An argument, for messages."""
    return f"`{key}`" if isinstance(key, str) else f"number {key + 1}"


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def changed_since() -> InputError:
    """The refusal of arguments that the loop wrote on before they could be kept."""
    return InputError(
        "Arguments of the network were written on between the forward pass and the step",
        "What the network was given is kept when the step comes, unless it is copied in the forward pass",
        "Write `recorder.track(loader, keep=True)`, or `KernelRecorder(..., keep=True)`, which copies it there",
    )


def differing(seen: Mapping[Key, Any], expected: Mapping[Key, Any], dtype: torch.dtype) -> str:
    """First argument of the samples in which two batches differ beyond rounding, in words; empty where none does."""
    if missing := expected.keys() - seen.keys():
        return f"the argument {shown(min(missing, key=str))} was not given"
    for key, value in expected.items():
        own, other = pytree.tree_leaves(seen[key]), pytree.tree_leaves(value)
        if len(own) != len(other):
            return f"the argument {shown(key)} holds {len(own)} tensors, not {len(other)}"
        for found, data in zip(own, other, strict=True):
            if not _agree(found, data, dtype):
                return f"the argument {shown(key)}" + (
                    f" has the shape {tuple(found.shape)}, not {tuple(data.shape)}"
                    if found.numel() != data.numel()
                    else " holds other numbers"
                )
    return ""


def identical(seen: Mapping[Key, Any], expected: Mapping[Key, Any], dtype: torch.dtype) -> bool:
    """Test that two batches are the same to the last bit, once floating-point numbers have the network's type."""
    if seen.keys() != expected.keys():
        return False
    for key, value in expected.items():
        own, other = pytree.tree_leaves(seen[key]), pytree.tree_leaves(value)
        if len(own) != len(other) or not all(_identical(*pair, dtype) for pair in zip(own, other, strict=True)):
            return False
    return True


def _identical(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    if one.is_floating_point() != other.is_floating_point() or one.shape != other.shape:
        return False
    if one.is_floating_point():
        one, other = one.to(dtype), other.to(device=one.device, dtype=dtype)
        return bool(((one == other) | (one.isnan() & other.isnan())).all())
    return one.dtype == other.dtype and torch.equal(one, other.to(one.device))


def _agree(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Comparison within the rounding of the coarser type; arrangement in rows does not matter, nor does the kind."""
    if one.numel() != other.numel():
        return False
    types = {leaf.dtype for leaf in (one, other) if leaf.is_floating_point()} | {dtype}
    rounding = 8 * max(torch.finfo(kind).eps for kind in types)
    found, expected = one.double().reshape(-1), other.to(one.device).double().reshape(-1)
    difference = (found - expected).abs()
    return bool((~(difference > rounding * expected.abs().clamp_min(torch.finfo(dtype).tiny))).all())
