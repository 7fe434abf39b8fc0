"""Targets that a loss takes, found out before gradients are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.errors import InputError, PathKernelError
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.runtime.interrupts import result_or_error

TAKES = (
    "Pass class indices (int64, from 0 to C - 1) for `CrossEntropyLoss`, and numbers of the outputs' shape for "
    "`MSELoss`; what another loss takes, its documentation says"
)


def described(targets: PyTree, *, ranges: bool = True) -> str:
    """Types, shapes and ranges of targets."""
    return " and ".join(
        f"of type {str(leaf.dtype).removeprefix('torch.')} and shape {tuple(leaf.shape)}"
        + (f" from {leaf.min().item():g} to {leaf.max().item():g}" if ranges and leaf.numel() else "")
        for leaf in pytree.tree_leaves(targets)
    )


def check_targets(value: Callable[[], Any], loss: Any, outputs: tuple[int, ...], targets: PyTree) -> None:
    """Refuse targets that a loss fails on.

    Parameters
    ----------
    value
        Computes the loss of some outputs and all of these targets.
    loss
        As the user gave it.
    outputs
        Shape of one sample's outputs, (C,) for a row of them.
    targets
        Of n samples.

    Raises
    ------
    InputError
        With types, shapes and ranges of the targets, and what the loss says.
    """
    # Asked first: on a GPU a class that there is not ends the process's use of it, rather than in an error.
    wrong = _wrong_classes(loss, outputs, targets)
    if wrong is None:
        if _surely_taken(loss, outputs, targets):
            return
        with generators_untouched():
            found = result_or_error(value, (Exception,))
        if isinstance(found, PathKernelError):
            raise found
        if not isinstance(found, Exception):
            return
        wrong = f"fails: {(str(found).strip() or type(found).__name__).splitlines()[0]}"
    name = type(loss).__name__ if isinstance(loss, nn.Module) else getattr(loss, "__name__", "the loss")
    raise InputError(
        f"`{name}` was given targets {described(targets)}, and {wrong}",
        f"Targets are as in training, one for each sample, here for outputs of shape {outputs}",
        TAKES,
    )


def _of_classes(loss: Any, outputs: tuple[int, ...], targets: PyTree) -> bool:
    """Test for class indices of a loss of torch's for classes, one for each row of outputs."""
    whole = isinstance(targets, Tensor) and not targets.is_floating_point() and targets.dim() == 1
    return whole and len(outputs) == 1 and isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss))


def _wrong_classes(loss: Any, outputs: tuple[int, ...], targets: PyTree) -> str | None:
    """What is wrong with class indices; None for other targets, and for good ones."""
    if not _of_classes(loss, outputs, targets) or not targets.numel():
        return None
    outside = ((targets < 0) | (targets >= outputs[0])) & (targets != loss.ignore_index)
    return f"has no class {int(targets[outside][0])}" if bool(outside.any()) else None


def _surely_taken(loss: Any, outputs: tuple[int, ...], targets: PyTree) -> bool:
    """Test for targets that need no call of the loss: it costs more than a kernel of a few samples."""
    if _of_classes(loss, outputs, targets):
        return bool(targets.dtype == torch.int64)
    alike = isinstance(targets, Tensor) and targets.is_floating_point() and tuple(targets.shape[1:]) == outputs
    return alike and isinstance(loss, nn.MSELoss)


def check_as_in_training(targets: PyTree, example: PyTree | None, asker: str) -> None:
    """Refuse targets of another form than the training samples' have: sizes that differ may be broadcast silently.

    Parameters
    ----------
    targets
        Of n samples.
    example
        Of one training sample, as a batch of one; None where there is none on record.
    asker
        Name for messages.

    Raises
    ------
    InputError
        With both shapes. Probabilities of classes in the place of class indices are another form that losses take.
    """
    if example is None:
        return
    leaves, structure = pytree.tree_flatten(targets)
    own, expected = pytree.tree_flatten(example)
    soft = [a.is_floating_point() and not b.is_floating_point() for a, b in zip(leaves, own, strict=False)]
    shapes = [leaf.shape[1:] for leaf in leaves], [leaf.shape[1:] for leaf in own]
    same = structure == expected and all(a == b or s for a, b, s in zip(*shapes, soft, strict=True))
    if not same:
        raise InputError(
            f"`{asker}` was given targets {described(targets)}",
            f"Those of the training samples are {described(example, ranges=False)} for one sample",
            "Pass targets of the same form as in training, with one row for each sample",
        )
