"""Gradients of a function that has no rule: its own derivative, sample by sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.func import vjp, vmap
from torch.utils import _pytree as pytree

from pathkernel.layers.factors import Dense
from pathkernel.layers.handles import View
from pathkernel.layers.rules import NoRule

if TYPE_CHECKING:
    from pathkernel.layers.recording import Recording


def local_gradients(
    function: Any,
    leaves: list[Any],
    tree: Any,
    place: int,
    recording: Recording,
    use: int,
    signal: Tensor,
) -> Dense:
    """Gradients of one argument of a function, (n, K, size), by its derivative at each sample.

    The function is called with one sample at a time that keeps its sample axis; parameters that were expanded over
    the samples before are treated alike.
    """
    arrangement, n = recording.arrangement(use), recording.n
    axis = arrangement.axis
    if arrangement.merged:
        raise NoRule

    def batched(leaf: int) -> bool:
        handle = recording.handle(leaves[leaf])
        # A parameter that was repeated for every sample is that sample's own.
        places = handle.moved if isinstance(handle, View) else None
        own = handle is None or (places is not None and places.stride(axis) == 0 and n > 1)
        return leaf in arrangement.batched and own

    tensors = [i for i in range(len(leaves)) if i != place and batched(i)]
    repeated = batched(place)

    def one(value: Tensor, samples: tuple[Tensor, ...]) -> Tensor:
        filled = list(leaves)
        filled[place] = value
        for i, sample in zip(tensors, samples, strict=True):
            filled[i] = sample.unsqueeze(axis)
        args, kwargs = pytree.tree_unflatten(filled, tree)
        result: Tensor = function(*args, **kwargs)
        return result.squeeze(axis)

    def pull(value: Tensor, samples: tuple[Tensor, ...], cotangents: Tensor) -> Tensor:
        pull_back = vjp(lambda v: one(v, samples), value)[1]
        return vmap(lambda cotangent: pull_back(cotangent)[0])(cotangents)

    value = leaves[place].detach()
    samples = tuple(leaves[i].detach() for i in tensors)
    if repeated:
        value = value.narrow(axis, 0, 1)
    gradients = vmap(pull, in_dims=(None, axis, 0))(value, samples, signal)  # (n, K, *value)
    if gradients.shape[2:] != value.shape:
        raise NoRule  # an operation that vmap does not treat right
    if repeated:  # one sample's copy stands for all: put the gradient where that copy lies in the whole tensor
        whole = gradients.new_zeros(*signal.shape[:2], *leaves[place].shape)
        whole.narrow(2 + axis, 0, 1).copy_(gradients)
        gradients = whole
    return Dense(gradients.reshape(*signal.shape[:2], -1))
