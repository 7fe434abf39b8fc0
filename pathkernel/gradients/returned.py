"""Results of a network: its outputs, sample by sample, and what else is among it (``returns=``, a loss)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.errors import InputError
from pathkernel.runtime.interrupts import result_or_error

Returns = str | int | Callable[[Any], Any] | None
"""A key or attribute, an index, a function of what the network returned; None for everything."""


def batch_outputs(outputs: PyTree, n: int) -> Tensor:
    """Everything that a module returned for n samples, (n, C): floating tensors side by side, flattened.

    An output of (n·T, …) holds T rows for each sample, and one that has lost the axis of a single sample
    (``squeeze()``) gets it back; that these are the samples' own is for `pathkernel.gradients.sample_wise` to see.

    Raises
    ------
    InputError
        When an output does not have the samples along its first axis, or is complex.
    """
    every = [leaf for leaf in output_leaves(outputs) if isinstance(leaf, Tensor)]
    if any(leaf.is_complex() for leaf in every):
        raise InputError(
            "The model returned complex numbers",
            "Tangent kernels are defined here for real outputs",
            "Return real and imaginary part as two outputs, `torch.view_as_real(z)`",
        )
    leaves = [leaf for leaf in every if leaf.is_floating_point()]
    if n == 1:
        leaves = [leaf if leaf.shape[:1] == (1,) else leaf.unsqueeze(0) for leaf in leaves]
    fits = [leaf.dim() > 0 and leaf.shape[0] % max(n, 1) == 0 and leaf.shape[0] >= n for leaf in leaves]
    if not leaves or not all(fits):
        raise InputError(
            f"For {n} samples the model returned "
            + (f"tensors of shapes {', '.join(str(tuple(leaf.shape)) for leaf in leaves)}" if leaves else "no outputs"),
            "Every output has the samples of the batch along its first axis, and at least one is floating point",
            "Return per-sample outputs, and compute what belongs to the whole batch inside the loss",
        )
    flat = [leaf.reshape(n, leaf.numel() // max(n, 1)) for leaf in leaves]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def output_leaves(outputs: PyTree) -> list[Any]:
    """Leaves of the nested tuples, lists, dicts and dataclasses that a module returned."""
    leaves = []
    for leaf in pytree.tree_leaves(outputs):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            leaves += output_leaves([getattr(leaf, each.name) for each in dataclasses.fields(leaf)])
        else:
            leaves.append(leaf)
    return leaves


def map_outputs(change: Callable[[Any], Any], outputs: PyTree) -> PyTree:
    """Result of a module with every leaf changed."""

    def changed(leaf: Any) -> Any:
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return change(leaf)
        again = copy.copy(leaf)
        for name in (each.name for each in dataclasses.fields(leaf)):
            object.__setattr__(again, name, map_outputs(change, getattr(leaf, name)))
        return again

    return pytree.tree_map(changed, outputs)


def check_returns(returns: Any) -> Returns:
    """Accept a ``returns=``.

    Raises
    ------
    InputError
        For anything but a key, an index, a function, or None.
    """
    if isinstance(returns, (str, int)) and not isinstance(returns, bool):
        return returns
    if returns is None or (callable(returns) and not isinstance(returns, type)):
        return returns
    raise InputError(
        f"`returns={returns!r}` was given",
        "It names what the network's outputs are among all that it returns: a key or attribute, an index, or a "
        "function of what it returned",
        'Write for example `returns="logits"`, `returns=0` or `returns=lambda returned: returned.logits`',
    )


def one_of_two(returns: Returns, outputs: Returns) -> Returns:
    """One argument under either of its names.

    Raises
    ------
    InputError
        Where both are given.
    """
    if returns is not None and outputs is not None:
        raise InputError(
            f"Both `returns={returns!r}` and `outputs={outputs!r}` were given",
            "They are two names of one argument, which says what the outputs are among all that the network returns",
            "Leave one of them out",
        )
    return outputs if returns is None else returns


def selected(returned: Any, returns: Returns) -> Any:
    """The outputs among what a network returned.

    Raises
    ------
    InputError
        Where there is no such part, naming those that there are.
    """
    if returns is None:
        return returned
    if not isinstance(returns, (str, int)):
        found = result_or_error(lambda: returns(returned), (Exception,))
        if isinstance(found, Exception):
            raise InputError(
                f"`returns=` failed on what the network returned, {_described(returned)} "
                f"({type(found).__name__}: {str(found)[:200]})",
                "A function given as `returns=` picks the outputs among all that the network returns",
                "Write for example `returns=lambda returned: returned.logits`",
            ) from found
        return found
    if isinstance(returned, Tensor):  # as networks do that return more in training, or with labels, alone
        return returned
    try:
        if isinstance(returns, str) and not isinstance(returned, Mapping):
            return getattr(returned, returns)
        return returned[returns]
    except (KeyError, IndexError, AttributeError, TypeError):
        raise InputError(
            f"`returns={returns!r}` was given, and the network returned {_described(returned)}",
            "It names a part of what the network returns",
            "Write one of these parts, or a function such as `returns=lambda returned: returned[0]`",
        ) from None


def returned_loss(returned: Any) -> Tensor | None:
    """The loss among what a network returned: under the name ``loss``, else the one number with a gradient; or None."""
    named = returned.get("loss") if isinstance(returned, Mapping) else getattr(returned, "loss", None)
    if isinstance(named, Tensor):
        return named
    numbers = [
        leaf
        for leaf in output_leaves(returned)
        if isinstance(leaf, Tensor) and leaf.dim() == 0 and leaf.is_floating_point()
    ]
    return numbers[0] if len(numbers) == 1 else None


def _described(returned: Any) -> str:
    if isinstance(returned, Mapping):
        return f"a {type(returned).__name__} with {', '.join(map(repr, list(returned)[:8]))}"
    if dataclasses.is_dataclass(returned):
        return f"a {type(returned).__name__} with {', '.join(each.name for each in dataclasses.fields(returned)[:8])}"
    if isinstance(returned, (tuple, list)):
        return f"a {type(returned).__name__} of {len(returned)}"
    return f"a {type(returned).__name__}"
