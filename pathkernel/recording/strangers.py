"""Optimizers that a recorder was not given and that are about to move its network: noticed before they do."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from pathkernel.errors import RecordingError

WATCHES: weakref.WeakSet[StrangerWatch] = weakref.WeakSet()
"""Those that are on; torch's hooks on all optimizers of the process would keep a recorder alive that nobody names."""

NAMED = 6
"""Parameters that a message names."""


class StrangerWatch:
    """Refuses steps of other optimizers on the parameters of a network that is being recorded.

    Parameters
    ----------
    model
        The network.
    idle
        Tells whether a step of another optimizer would be refused: not within a step of the recorder's own, which may
        well be put together of those of others, and not where what is done has a name.
    """

    def __init__(self, model: nn.Module, idle: Callable[[], bool]) -> None:
        self._model, self._idle = model, idle
        self._known: list[Optimizer] = []
        self._hooks: set[int] = set()

    def start(self, optimizers: Sequence[Optimizer]) -> None:
        """Watch; these are the recorder's own."""
        self._known = list(optimizers)
        # Frameworks make second objects of an optimizer that share all it has, its hooks included.
        self._hooks = {id(one._optimizer_step_pre_hooks) for one in optimizers}
        WATCHES.add(self)
        _listen()

    def stop(self) -> None:
        """Watch no longer."""
        WATCHES.discard(self)
        self._known = []
        _listen()

    def see(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at an optimizer that is about to step.

        Raises
        ------
        RecordingError
            For one that is not the recorder's, with the parameters that it would move.
        """
        if id(optimizer._optimizer_step_pre_hooks) in self._hooks or not self._idle():
            return
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # torch passes the optimizer first
        own = {
            id(p)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad and (p.grad is not None or closure is not None)
        }
        if not own:
            return
        found = [name for name, p in self._model.named_parameters() if id(p) in own]
        if not found:
            return
        names = ", ".join(f"`{name}`" for name in found[:NAMED]) + (" …" if len(found) > NAMED else "")
        classes = [type(one).__name__.lower() for one in (*self._known, optimizer)]
        raise RecordingError(
            f"An optimizer that the recorder was not given, of the class {type(optimizer).__name__}, is about to move "
            f"{names} of the recorded network; it has not yet",
            "A recorder knows every optimizer that moves its network: only then has each displacement its gradient, "
            "and each gradient its samples",
            f"Write `KernelRecorder(model, [{', '.join(classes)}], ...)` with all of them, or "
            "`recorder.attach(optimizer)` for a copy that takes another one's place; step inside "
            '`with recorder.channel("name")` to book all that it does under one name; or write `recorder.close()` '
            "where recording is over",
        )


_handles: list[RemovableHandle] = []


def _listen() -> None:
    """Hook on to all optimizers of the process while somebody watches."""
    if WATCHES and not _handles:
        _handles.append(register_optimizer_step_pre_hook(_any_steps))
    elif not WATCHES and _handles:
        _handles.pop().remove()


def _any_steps(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for watch in list(WATCHES):
        watch.see(optimizer, args, kwargs)
