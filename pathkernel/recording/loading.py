"""Weights loaded into the network, and states into its optimizer, while a run is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pathkernel.errors import RecordingError
from pathkernel.recording.forward import Hook
from pathkernel.runtime.interrupts import defer_interrupts
from pathkernel.update_rules.rule import UpdateRule


class LoadWatch:
    """Is told when ``load_state_dict`` is called: of the network, of one of its submodules, of an optimizer.

    Parameters
    ----------
    model
        The network.
    before, after
        Called before weights are loaded and when they have been, once for a module with all below it.
    of_optimizer
        Called when an optimizer has been given another state.

    Attributes
    ----------
    parameters
        Whether weights were loaded since this was last reset: with ``assign=True`` the network has other Parameters.
    state
        Whether the optimizer was given another state since this was last reset.
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[], None],
        after: Callable[[], None],
        of_optimizer: Callable[[], None],
    ) -> None:
        self._model = model
        self._before, self._after, self._of_optimizer = before, after, of_optimizer
        self._handles: list[Any] = []
        self._loading: list[nn.Module] = []
        self.parameters = self.state = False

    def start(self, optimizers: Sequence[Optimizer]) -> None:
        """Put the hooks on the network and its optimizers."""
        self.stop()
        for module in self._model.modules():
            begins = module._register_load_state_dict_pre_hook(Hook(partial(self._begins, module)))
            self._handles += [begins, module.register_load_state_dict_post_hook(Hook(self._ended))]
        self._handles += [one.register_load_state_dict_post_hook(self._state_loaded) for one in optimizers]

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._loading = [], []

    def finish(self) -> None:
        """Let a load be over that an error ended: what it got to has been loaded."""
        if self._loading:
            self._loading = []
            self._after()

    def reset(self) -> None:
        """Forget what was loaded: a step has been taken since."""
        self.parameters = self.state = False

    def _begins(self, module: nn.Module, *_: Any) -> None:
        with defer_interrupts():
            if self._loading and not any(module is child for child in self._loading[0].modules()):
                self.finish()
            if not self._loading:
                self._before()
            self._loading.append(module)

    def _ended(self, module: nn.Module, *_: Any) -> None:
        with defer_interrupts():
            places = [place for place, other in enumerate(self._loading) if other is module]
            if not places:  # a class of its own that loads without telling
                return
            del self._loading[places[0] :]
            if not self._loading:
                self.parameters = True
                self._after()

    def _state_loaded(self, optimizer: Optimizer) -> None:
        with defer_interrupts():
            self.state = True
            self._of_optimizer()


def check_memory_is_told(rule: UpdateRule, index: int) -> None:
    """Refuse a loaded state where nobody can tell from the step after it what it added to the optimizer's memory.

    Raises
    ------
    RecordingError
        For rules that mix the entries of their memory, or have several slots of it.
    """
    if not rule.memory or (rule.elementwise and len(rule.memory) == 1):
        return
    raise RecordingError(
        f"`optimizer.load_state_dict(...)` was called before step {index} of {rule.name}",
        f"Its memory ({', '.join(f'`{key}`' for key in rule.memory)}) is then not what the recorded samples left, "
        "and a step of this optimizer does not tell what it was",
        "Load the weights alone, or make a new KernelRecorder after the state has been loaded, from which on it is the "
        'channel "memory"',
    )
