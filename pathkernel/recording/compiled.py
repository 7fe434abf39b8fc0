"""Networks that `torch.compile` compiled: how their calls are watched, and what the compiler draws of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from pathkernel.errors import RecordingError
from pathkernel.trajectory.step import MicroBatch


class CompiledCall:
    """Calls before and after the compiled call of a module that was compiled in place, ``model.compile()``.

    The module's hooks would be compiled with it, and between graphs that hooks break, rounding is another one.

    Parameters
    ----------
    module
        The module.
    enter
        Called before it with the module and its arguments, those without and those with names.
    leave
        Called after it with the module, its arguments and what it returned.
    """

    def __init__(self, module: nn.Module, enter: Callable[..., None], leave: Callable[..., None]) -> None:
        self._module = module
        self._compiled = compiled = module._compiled_call_impl
        assert compiled is not None

        @functools.wraps(compiled)
        def watched(*arguments: Any, **named: Any) -> Any:
            enter(module, arguments, named)
            returned = compiled(*arguments, **named)
            leave(module, arguments, returned)
            return returned

        self._watched = module._compiled_call_impl = watched  # copies and pickles of a module leave it out

    def remove(self) -> None:
        """Call the module as before, unless it was compiled anew since."""
        if self._module._compiled_call_impl is self._watched:
            self._module._compiled_call_impl = self._compiled


def check_random_numbers(outer: nn.Module, batches: Sequence[MicroBatch]) -> None:
    """Refuse passes that drew random numbers of a compiler's own, which nobody else draws again.

    Parameters
    ----------
    outer
        The module that the loop calls.
    batches
        Those of the step that is about to be taken.

    Raises
    ------
    RecordingError
        Where the compiler of some module does not take torch's random numbers.
    """
    if not any(batch.state.generators for batch in batches):
        return
    for name, settings in _compilers(outer):
        if settings.get("fallback_random") is False:
            raise RecordingError(
                f"{f'`{name}`' if name else f'The watched {type(outer).__name__}'} is compiled by inductor, and its "
                "forward pass drew random numbers, as dropout does",
                "Inductor draws numbers of its own, in an order that no other pass of the network has, so that the "
                "step could not be explained; the optimizer has not moved",
                "Set `torch._inductor.config.fallback_random = True` before the first call of the compiled network, or "
                'write `torch.compile(model, options={"fallback_random": True})`',
            )


def _compilers(outer: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Modules that are compiled with settings of their compiler, by name; other backends have none."""
    for name, module in outer.named_modules():
        for compiled in (module if hasattr(module, "_orig_mod") else None, module._compiled_call_impl):
            ask = getattr(compiled, "get_compiler_config", None)
            settings = None if ask is None else ask()
            if settings:
                yield name, settings
