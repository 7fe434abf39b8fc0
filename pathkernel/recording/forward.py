"""How forward passes of training ran: modes, random generators and mixed precision, seen by hooks on the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from pathkernel.functional import ForwardState, generator_states
from pathkernel.recording.modules import WatchedModules


class Hook:
    """A recorder's hook on a network, which does nothing on copies of it: they are not being recorded.

    Parameters
    ----------
    call
        What is called.
    """

    of_training: ClassVar[bool] = True
    """Tells `pathkernel.structural_copy` to leave it out."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> None:
        """Call it."""
        if self.call is not None:
            self.call(*arguments)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()  # the whole record would come along


class ForwardWatcher:
    """Tells how the first forward passes with gradients after each announced batch ran.

    Parameters
    ----------
    model
        The network in training.
    report
        Called with the `ForwardState` of each such pass.
    modules
        Its submodules.
    passes
        How many to tell of: the stages of a step.

    Notes
    -----
    The states of the random generators are kept only where the pass drew random numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        report: Callable[[ForwardState], None],
        modules: WatchedModules,
        passes: int = 1,
    ) -> None:
        self.model, self.report, self.modules, self.passes = model, report, modules, passes
        self.device = next(model.parameters()).device
        self._waiting = 0
        self._before: ForwardState | None = None
        self._handles: list[Any] = []

    def start(self) -> None:
        """Put the hooks on."""
        self._handles = [
            self.model.register_forward_pre_hook(Hook(self._enter)),
            self.model.register_forward_hook(Hook(self._leave)),
        ]

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._waiting, self._before = [], 0, None

    def expect(self) -> None:
        """A batch was announced: report the next passes."""
        self._waiting, self._before = self.passes, None

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._waiting and torch.is_grad_enabled():
            kind = self.device.type
            autocast = (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
            self._before = ForwardState(
                self.modules.modes(), generator_states(self.device), autocast, self.modules.changed_buffers()
            )

    def _leave(self, module: nn.Module, arguments: tuple[Any, ...], outputs: Any) -> None:
        if self._before is None:
            return
        state, self._before, self._waiting = self._before, None, self._waiting - 1
        after = generator_states(self.device)
        drew = any(not torch.equal(found, state.generators[name]) for name, found in after.items())
        self.report(state if drew else ForwardState(state.modes, {}, state.autocast, state.buffers))
