"""Passes whose numbers nothing but torch's kernels can read.

Operations that are noted once and repeated on other samples must not depend on what the samples are. `Tensor.item` is
an operation itself, and seen; but numpy, `Tensor.tolist` and some functions of torch (`torch.tensor_split`, recurrent
layers of packed sequences) read memory, and choose by it which operations there are. No comparison finds out what they
choose on samples that come later. So they are given tensors without memory, which they refuse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pathkernel.gradients.layers.rules import NoRule


class _Hidden(Tensor):
    """A tensor whose numbers are those of another one, which only kernels see."""

    own: Tensor

    @staticmethod
    def __new__(cls, own: Tensor) -> _Hidden:
        make: Any = Tensor._make_wrapper_subclass
        layout = {"strides": own.stride(), "storage_offset": own.storage_offset(), "layout": own.layout}
        found: _Hidden = make(cls, own.shape, dtype=own.dtype, device=own.device, **layout)
        found.own = own
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _with_hidden(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        raise NoRule("a pass that looks at its values")


class HiddenValues(TorchDispatchMode):
    """Inside, what operations return has no memory that anybody else could read; who tries gets an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _with_hidden(func, args, kwargs or {})


def hidden(tree: Any) -> Any:
    """Tensors without memory that stand for others."""
    return pytree.tree_map_only(Tensor, _Hidden, tree)


def _with_hidden(function: Any, arguments: Any, named: Any) -> Any:
    """What an operation returns, of the numbers of the tensors that it is given."""
    known: dict[int, _Hidden] = {}

    def shown(argument: Any) -> Any:
        if isinstance(argument, _Hidden):
            known[id(argument.own)] = argument
            return argument.own
        if isinstance(argument, (list, tuple)) and any(isinstance(own, Tensor) for own in argument):
            return [shown(own) for own in argument]
        return argument

    schema = function._schema
    arguments, named = [shown(own) for own in arguments], {key: shown(own) for key, own in named.items()}
    if known and schema.is_mutable:
        for place, argument in enumerate(schema.arguments):
            written = arguments[place] if place < len(arguments) else named.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and id(written) not in known:
                raise NoRule("a pass that writes its values to where they could be read")
    # Of constants, what may be written on later. Indices stay: the places of parameters are reckoned with them.
    new = not any(returned.alias_info for returned in schema.returns)

    def covered(leaf: Any) -> Any:
        if leaf is None:
            return leaf
        if not isinstance(leaf, Tensor):
            raise NoRule("a pass that looks at its values")
        if id(leaf) in known:
            return known[id(leaf)]
        indices = not (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool)
        return _Hidden(leaf) if known or (new and not indices) else leaf

    found = function(*arguments, **named)
    return covered(found) if isinstance(found, Tensor) else pytree.tree_map(covered, found)
