"""Arguments of a network's ``forward``: those that are of samples, and those that all samples share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree

Key = str | int
"""Name of an argument; its place where it has none, as behind ``*inputs``."""

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def places_of(function: Callable[..., Any]) -> list[Key]:
    """Keys of the parameters that a function takes by their place."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []
    named = [p for p in parameters if p.kind in POSITIONAL]
    return [p.name if p.kind is POSITIONAL[1] else place for place, p in enumerate(named)]


def keyed(places: Sequence[Key], arguments: tuple[Any, ...], named: Mapping[str, Any]) -> dict[Key, Any]:
    """Arguments of a call by their keys, in the order of the call; see `places_of`."""
    keys: list[Key] = [places[i] if i < len(places) else i for i in range(len(arguments))]
    found = dict(zip(keys, arguments, strict=True))
    found.update(named.items())
    return found


def arguments_of(function: Callable[..., Any], inputs: PyTree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Samples as the arguments of a network's ``forward``, by place and by name.

    A tuple is spread over them, and so is a list where ``forward`` cannot do with one argument. A dict whose keys are
    names of parameters of ``forward`` is handed over by name; any other is one argument.
    """
    if isinstance(inputs, tuple):
        return inputs, {}
    if isinstance(inputs, list) and not _takes(function, inputs) and _takes(function, *inputs):
        return tuple(inputs), {}
    if isinstance(inputs, dict) and _are_names(function, inputs):
        return (), inputs
    return (inputs,), {}


def _are_names(function: Callable[..., Any], inputs: Mapping[Any, Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = inspect.Parameter
    explicit = {p.name for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    if any(p.kind is kinds.VAR_KEYWORD for p in parameters) and all(isinstance(key, str) for key in inputs):
        return _takes(function, **inputs) and (bool(inputs.keys() & explicit) or not _takes(function, inputs))
    return bool(inputs) and inputs.keys() <= explicit


def _takes(function: Callable[..., Any], *arguments: Any, **named: Any) -> bool:
    try:
        inspect.signature(function).bind(*arguments, **named)
    except (TypeError, ValueError):
        return False
    return True


def call_of(
    function: Callable[..., Any], inputs: PyTree, shared: Mapping[Key, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Samples and what they share as the arguments of a network's ``forward``.

    What is shared stands where it stood in the loop's call; samples without names take the places that are left.
    """
    arguments, named = arguments_of(function, inputs)
    shared = {key: value for key, value in shared.items() if key not in named}
    if not shared:
        return arguments, named
    places = places_of(function)
    every = dict(shared)
    every.update(named.items())
    place = 0
    for value in arguments:
        while (key := places[place] if place < len(places) else place) in every:
            place += 1
        every[key] = value
    # Places without a name come behind all that have one; those before them are taken by place, too.
    length = 1 + max((key for key in every if isinstance(key, int)), default=-1)
    by_place = [every.pop(places[i] if i < len(places) else i) for i in range(length)]
    return tuple(by_place), {str(key): value for key, value in every.items()}


def shared_arguments(shared: Mapping[Key, Any], dtype: torch.dtype, device: torch.device) -> Mapping[Key, Any]:
    """Arguments that samples share, with tensors on a device, and in a floating type where that is the finer one."""
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(dict(shared))):
        return shared

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(
            device=device, dtype=torch.promote_types(leaf.dtype, dtype) if leaf.is_floating_point() else None
        )

    return {key: pytree.tree_map(cast, own) for key, own in shared.items()}


def same_arguments(one: Mapping[Key, Any], other: Mapping[Key, Any]) -> bool:
    """Test that two calls share the same: equal numbers of the same types."""
    return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())


def _same(one: Any, other: Any) -> bool:
    (leaves, tree), (others, other_tree) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return tree == other_tree and all(map(_same_leaf, leaves, others))


def _same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if one is other:
        return True
    plain = (bool, int, float, str, torch.dtype)
    return type(one) is type(other) and isinstance(one, plain) and one == other
