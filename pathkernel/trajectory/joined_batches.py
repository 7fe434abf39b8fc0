"""Small passes that ran alike, one after another, as one batch: 40 passes of one sample cost as much as one of 40."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.gradients.arguments import same_arguments
from pathkernel.trajectory.step import MicroBatch

SMALL = 16
"""Samples of a pass up to which it is joined with others: larger ones keep the processor busy. Chosen, not measured."""

MOST = 256
"""Samples of joined passes: together they take no more memory than an ordinary batch. Chosen, not measured."""


def joined_batches(
    batches: Sequence[MicroBatch], may: Callable[[Sequence[MicroBatch]], bool]
) -> tuple[MicroBatch, ...]:
    """Micro-batches of a step, with runs of small ones that ran alike as one each; their rows keep their order.

    Parameters
    ----------
    batches
        Of one step.
    may
        Asked of each run of batches: whether the network gives the same for all of them together.
    """
    found: list[MicroBatch] = []
    for run in runs_of(batches):
        found += [_joined(run)] if len(run) > 1 and may(run) else run
    return tuple(found)


def runs_of(batches: Sequence[MicroBatch]) -> list[list[MicroBatch]]:
    """Micro-batches of a step in runs that ran alike; large ones by themselves."""
    runs: list[list[MicroBatch]] = []
    for batch in batches:
        last = runs[-1] if runs else []
        size = sum(len(one.ids) for one in last) + len(batch.ids)
        if last and size <= MOST and _is_plain(last[0]) and _is_plain(batch) and _alike(last[0], batch):
            last.append(batch)
        else:
            runs.append([batch])
    return runs


def _is_plain(batch: MicroBatch) -> bool:
    """True for a small pass that drew nothing, and all of whose cotangents are on record."""
    return (
        len(batch.ids) <= SMALL
        and batch.cotangents is not None
        and batch.loss_slope is None
        and not batch.state.generators
        and not batch.later
        and all(
            isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((batch.inputs, batch.targets)) if leaf is not None
        )
    )


def _alike(one: MicroBatch, other: MicroBatch) -> bool:
    """True where two passes ran in the same state, of samples of the same kind."""
    assert one.cotangents is not None
    a, b = one.state, other.state
    return (
        other.cotangents is not None
        and (one.channel, one.source) == (other.channel, other.source)
        and (one.parts is None) == (other.parts is None)
        and one.ids.shape[1:] == other.ids.shape[1:]
        and one.cotangents.shape[1:] == other.cotangents.shape[1:]
        and one.cotangents.dtype == other.cotangents.dtype
        and _shapes(one.inputs) == _shapes(other.inputs)
        and (a.modes is b.modes or a.modes == b.modes)
        and a.autocast == b.autocast
        and a.buffers is b.buffers
        and same_arguments(a.arguments, b.arguments)
    )


def _shapes(inputs: PyTree) -> Any:
    """Structure, shapes and types of samples without their first axis."""
    leaves, tree = pytree.tree_flatten(inputs)
    return [
        (leaf.shape[1:], leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves
    ], tree


def _joined(run: Sequence[MicroBatch]) -> MicroBatch:
    first = run[0]
    return replace(
        first,
        ids=torch.cat([one.ids for one in run]),
        weights=None,  # all of λ is on record: the loss is not evaluated again
        inputs=_concatenated([one.inputs for one in run]),
        targets=None if first.inputs is None else _concatenated([one.targets for one in run]),
        cotangents=torch.cat([one.cotangents for one in run if one.cotangents is not None]),
        parts=None if first.parts is None else torch.cat([one.parts for one in run if one.parts is not None]),
    )


def _concatenated(trees: Sequence[PyTree]) -> PyTree:
    """Samples of several passes along the first axis; None where one of them has none."""
    if any(tree is None for tree in trees):
        return None
    leaves = [pytree.tree_flatten(tree) for tree in trees]
    spec = leaves[0][1]
    columns = zip(*(own for own, _ in leaves), strict=True)
    return pytree.tree_unflatten([torch.cat(column) for column in columns], spec)
