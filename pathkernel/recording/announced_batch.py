"""Batches as they are announced: their samples checked, and the passes that were made of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.errors import SampleIdError
from pathkernel.gradients.forward_state import ForwardState
from pathkernel.gradients.pytrees import count
from pathkernel.recording.forward_pass import ForwardPass, Shapes
from pathkernel.trajectory.step import MicroBatch

SHOWN = 80
"""Characters of what was announced that a message repeats; ids may be long words, or lists within lists."""


def checked_ids(ids: Tensor, samples: int | None, axes: int = 1) -> Tensor:
    """Sample ids, (B,) int64, or (B, k) of the k samples of each row.

    Raises
    ------
    SampleIdError
        Unless they are integers from 0, to ``samples`` − 1 where that is known, with so many axes.
    """
    ids = ids.cpu()  # one transfer, rather than one for each question below
    integral = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    low, high = ids.aminmax() if integral and ids.numel() else (0, 0)
    beyond = samples is not None and int(high) >= samples
    if not integral or ids.dim() != axes or ids.numel() == 0 or int(low) < 0 or beyond:
        raise SampleIdError(
            f"Sample ids {ids.tolist() if ids.numel() <= 8 else f'of shape {tuple(ids.shape)}'} "
            f"({str(ids.dtype).removeprefix('torch.')}) were announced"
            + (f", from {ids.min().item()} to {ids.max().item()}" if ids.numel() else ""),
            "Ids are a list of integers from 0" + ("" if samples is None else f" to {samples - 1}, the rows of `data`"),
            "Write `recorder.batch(ids)` with the positions of the batch's samples in `data`",
        )
    return ids.to(torch.int64).clone()


def _as_tensor(ids: Any) -> Tensor:
    """Ids as they were announced, whatever numbers they are."""
    try:
        made = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        made = None
    if made is None or made.is_meta:
        few = isinstance(ids, list) and len(ids) <= 8 and len(str(ids)) <= SHOWN
        shown = ids if few else f"as a {type(ids).__name__}"
        raise SampleIdError(
            f"Sample ids {shown}{'' if made is None else ' on the device meta'} were announced",
            "Ids are a list, an array or a tensor of integers from 0",
            "Write for example `recorder.batch([int(i) for i in ids])`",
        )
    return made


def checked_batch(samples: int | None, ids: Any, weights: Any, inputs: PyTree, targets: PyTree) -> MicroBatch:
    """A batch as `pathkernel.KernelRecorder.announce` takes it, of data with so many samples.

    Raises
    ------
    SampleIdError
        Unless ids are some of the data's, each with one weight, input and target where these are given.
    """
    ids = _as_tensor(ids)
    parts = None
    if ids.dim() == 2:
        ids, parts, weights = checked_ids(ids, samples, axes=2), _checked_parts(ids, weights), None
    else:
        ids = checked_ids(ids, samples)
    if weights is not None:
        weights = torch.as_tensor(weights).detach().clone()
        if weights.shape != ids.shape:
            raise SampleIdError(
                f"{len(ids)} ids came with weights of shape {tuple(weights.shape)}",
                "Every sample of a batch has one weight",
                "Write `recorder.announce(ids, weights=w)` with `len(w) == len(ids)`",
            )
    turned = [tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs) if _lies_across(leaf, len(ids))]
    if turned:
        raise SampleIdError(
            f"{len(ids)} ids came with inputs of shape {', '.join(map(str, turned))}, whose samples lie along the "
            "second axis",
            "Samples lie along the first axis of every input; torch's recurrent layers have those of their states "
            "along the second, whatever `batch_first` says",
            "Turn states around inside `forward`, where they come in and go out: "
            "`z, h = self.rnn(x, h.transpose(0, 1).contiguous()); return z, h.transpose(0, 1)`",
        )
    for name, given in (("inputs", inputs), ("targets", targets)):
        if given is not None and count(given) != len(ids):
            raise SampleIdError(
                f"{len(ids)} ids came with {count(given)} {name}",
                "Ids and samples of a batch correspond one to one",
                f"Write `recorder.announce(ids, {name}={name})` with one row for each id",
            )
    return MicroBatch(ids, weights, inputs, targets, parts=parts)


def _checked_parts(ids: Tensor, weights: Any) -> Tensor:
    """Parts of the rows that belong to each of several samples, (B, k) float64.

    Raises
    ------
    SampleIdError
        Unless they add up to 1 in each row.
    """
    given = None if weights is None else torch.as_tensor(weights).detach().double().cpu()
    if given is not None and given.dim() == 1 and len(given) == ids.shape[1]:
        given = given.expand(ids.shape)
    if given is None or given.shape != ids.shape or not bool(((given.sum(dim=1) - 1).abs() <= 1e-6).all()):
        found = "without weights" if given is None else f"with weights of shape {tuple(given.shape)}"
        if given is not None and given.shape == ids.shape:
            found = f"with weights that add up to {given.sum(dim=1).min():.3g} in a row"
        raise SampleIdError(
            f"Ids of shape {tuple(ids.shape)} were announced {found}",
            "Where several samples share a row, a part of it belongs to each: weights of the same shape, or one for "
            "each place, that add up to 1",
            "Write `recorder.announce(torch.stack([ids, ids[order]], 1), weights=[lam, 1 - lam])`",
        )
    return given.clone()


def _lies_across(leaf: Any, n: int) -> bool:
    """True for a state of a recurrent layer, of shape (layers, n, H)."""
    return isinstance(leaf, Tensor) and leaf.dim() >= 2 and leaf.shape[0] != n and leaf.shape[1] == n


@dataclass(frozen=True)
class Delivery:
    """How a batch came to the loop.

    Attributes
    ----------
    keep
        Whether what the network is given is kept; None where that is not said.
    handed_out
        Tensors that were handed out under the batch's ids.
    rows
        Tensors of the batch as its ids were taken, in whose order these are.
    """

    keep: bool | None = None
    handed_out: Sequence[Tensor] = ()
    rows: Sequence[Tensor] = ()


UNSAID = Delivery()
"""Delivery of a batch of which nothing is said but its ids."""


class AnnouncedBatch:
    """Samples that were announced, and the forward passes that were made of them.

    Parameters
    ----------
    batch
        As announced.
    state
        How a pass of it runs that is not seen: in the modes of that moment.
    delivery
        How it came.

    Attributes
    ----------
    passes
        Those whose gradients have arrived, in the order of the passes.
    waiting
        Those whose gradients may arrive yet; they live as long as their graphs.
    arrived
        Whether a gradient has arrived of a pass that was not seen.
    counted
        Whether its samples have ids for good, where they are of a source.
    ran
        How the last forward pass of it ran, and the shapes of its outputs; the pass itself lives as long as its graph.
    """

    def __init__(self, batch: MicroBatch, state: ForwardState, delivery: Delivery) -> None:
        self.batch, self.state, self.delivery = batch, state, delivery
        self.passes: list[ForwardPass] = []
        self.waiting: list[weakref.ref[ForwardPass]] = []
        self.arrived = False
        self.counted = False
        self.ran: tuple[ForwardState, Shapes] | None = None

    def drop(self) -> None:
        """Let go of what arrived."""
        for one in self.passes:
            one.forget()
        self.passes, self.arrived = [], False

    @property
    def unseen(self) -> MicroBatch:
        """The batch where no forward pass of it is known."""
        return replace(self.batch, state=self.state)

    @property
    def used(self) -> bool:
        """True where its gradient is, or may yet be, in that of the parameters."""
        return bool(self.passes) or self.arrived or any(one() is not None for one in self.waiting)
