"""Gradients of functions without a rule: their own derivative, sample by sample."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor
from torch.func import vjp, vmap
from torch.utils import _pytree as pytree

from pathkernel.gradients.layers.batch_axis import Arrangement
from pathkernel.gradients.layers.factors import Dense
from pathkernel.gradients.layers.rules import NoRule


def local_gradients(
    function: Any,
    leaves: list[Any],
    tree: Any,
    place: int,
    own: Collection[int],
    arrangement: Arrangement,
    n: int,
    signal: Tensor,
) -> Dense:
    """Gradients of one argument of a function, (n, K, size), by its derivative at each sample.

    The function is called with one sample at a time that keeps its sample axis.

    Parameters
    ----------
    function, leaves, tree
        The function, and its arguments as a flattened tree.
    place
        Number of the argument.
    own
        Numbers of the arguments that hold a part for each sample. Where the argument itself is one of them, its parts
        are all the same, and the gradients are those of one part.
    arrangement, n
        Where the n samples are in the result, and in those arguments.
    signal
        (n, K, *result).
    """
    axis, merged = arrangement.axis, bool(arrangement.merged)
    if merged and place in own:
        raise NoRule
    tensors = [i for i in sorted(own) if i != place]

    def one(value: Tensor, samples: tuple[Tensor, ...]) -> Tensor:
        filled = list(leaves)
        filled[place] = value
        for i, sample in zip(tensors, samples, strict=True):
            filled[i] = sample if merged else sample.unsqueeze(axis)
        args, kwargs = pytree.tree_unflatten(filled, tree)
        result: Tensor = function(*args, **kwargs)
        return result if merged else result.squeeze(axis)

    def pull(value: Tensor, samples: tuple[Tensor, ...], cotangents: Tensor) -> Tensor:
        pull_back = vjp(lambda v: one(v, samples), value)[1]
        return vmap(lambda cotangent: pull_back(cotangent)[0])(cotangents)

    value = leaves[place].detach()
    samples = tuple(arrangement.front(leaves[i].detach(), n) for i in tensors)
    if place in own:
        value = value.narrow(axis, 0, 1)
    gradients = vmap(pull, in_dims=(None, 0, 0))(value, samples, signal)  # (n, K, *value)
    if gradients.shape[2:] != value.shape:
        raise NoRule  # an operation that vmap does not treat right
    return Dense(gradients.reshape(*signal.shape[:2], -1))
