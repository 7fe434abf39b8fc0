"""Gradient checkpoints: on reading, what they would compute again is kept.

`torch.utils.checkpoint` saves memory in training: what lies inside runs once more in the backward pass. A pass that is
looked at from other sides (`torch.func`, forward differentiation, hooks on layers) cannot be run so, and what runs
inside `backward` would do so with other weights. So within a pass of the library's own, checkpoints only call the
function that they were given: the same numbers, for more memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint as torch_checkpoint

from pathkernel.gradients.forward_state import Switch

_READING = threading.local()
"""How deep this thread is in passes of the library; other threads may be training."""


class _Reentrant(torch_checkpoint.CheckpointFunction):
    """Stand-in for `torch.utils.checkpoint.CheckpointFunction`, which differentiates inside ``backward``."""

    @classmethod
    def apply(cls, function: Any, preserve: bool, *arguments: Any) -> Any:
        """Call the function.

        Where none of its inputs has a graph, torch gives the parameters inside no gradient in training, and warns of
        it: they have not moved then, which the record tells.
        """
        if not getattr(_READING, "depth", 0):
            return torch_checkpoint_function.apply(function, preserve, *arguments)
        return function(*arguments)


def _without_reentrance(*arguments: Any, **named: Any) -> Iterator[Any]:
    """Take the place of the generator around a function that is not run again: nothing before, nothing after."""
    if getattr(_READING, "depth", 0):
        yield
    else:
        yield from torch_checkpoint_generator(*arguments, **named)


torch_checkpoint_function = torch_checkpoint.CheckpointFunction
torch_checkpoint_generator = torch_checkpoint._checkpoint_without_reentrant_generator


@contextmanager
def _passing_through() -> Iterator[None]:
    names = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
    before = [getattr(torch_checkpoint, name) for name in names]
    for name, own in zip(names, (_Reentrant, _without_reentrance), strict=True):
        setattr(torch_checkpoint, name, own)
    try:
        yield
    finally:
        for name, one in zip(names, before, strict=True):
            setattr(torch_checkpoint, name, one)


_SWITCH = Switch(_passing_through)


class _PassThrough:
    """Checkpoints of this thread call their functions and nothing else."""

    def __enter__(self) -> None:
        _SWITCH.__enter__()
        _READING.depth = getattr(_READING, "depth", 0) + 1

    def __exit__(self, *error: object) -> None:
        _READING.depth -= 1
        _SWITCH.__exit__(*error)


PASS_THROUGH = _PassThrough()
