"""Gradients of functions without a rule: their own derivative, sample by sample."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
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

    def pull(value: Tensor, samples: tuple[Tensor, ...], cotangent: Tensor) -> Tensor:
        pulled: Tensor = vjp(lambda v: one(v, samples), value)[1](cotangent)[0]
        return pulled

    value = leaves[place].detach()
    samples = tuple(arrangement.front(leaves[i].detach(), n) for i in tensors)
    if place in own:
        value = value.narrow(axis, 0, 1)
    # Component by component, as in the proof: an operation may be right in one `vmap`, and wrong in two.
    gradients = [vmap(pull, in_dims=(None, 0, 0))(value, samples, own) for own in signal.unbind(1)]
    if any(gradient.shape[1:] != value.shape for gradient in gradients):
        raise NoRule  # an operation that vmap does not treat right
    return Dense(torch.stack([gradient.reshape(len(gradient), -1) for gradient in gradients], dim=1))
