"""The part of the network that the loop calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from pathkernel.errors import InputError, RecordingError, quoted
from pathkernel.recording.live import LiveParameters

Watch = str | nn.Module | Sequence[str | nn.Module] | None
"""Name of a submodule, the submodule, or several that are called one after the other; None for the network itself."""


def watched_parts(model: nn.Module, watch: Watch) -> tuple[str, ...]:
    """Names of the submodules that the loop calls; none where it calls the network itself.

    Raises
    ------
    InputError
        For what is no submodule, and for a network that cannot be called.
    """
    if watch is None or watch is model:
        if not _has_forward(model):
            callable_parts = [name for name, child in model.named_children() if _has_forward(child)]
            raise InputError(
                f"The {type(model).__name__} has no `forward`, so the loop calls parts of it",
                "The module that the loop calls is watched",
                "Write `KernelRecorder(..., watch=name)` with the name of the submodule that the loop calls, or a "
                "tuple of names that it calls one after the other; there are "
                f"{', '.join(map(quoted, callable_parts[:8]))}",
            )
        return ()
    given = [watch] if isinstance(watch, (str, nn.Module)) else list(watch)
    return tuple(_name_of(model, part) for part in given)


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _name_of(model: nn.Module, part: Any) -> str:
    modules = dict(model.named_modules())
    names = [name for name, child in modules.items() if name and (name == part or child is part)]
    if not names or not _has_forward(modules[names[0]]):
        shown = repr(part) if isinstance(part, str) else f"a {type(part).__name__}"
        raise InputError(
            f"`watch=` names {shown}, which is no part of the {type(model).__name__} that can be called",
            f"Its submodules are {', '.join(repr(name) for name in list(modules)[1:21])}"
            f"{' …' if len(modules) > 21 else ''}",
            'Write for example `watch="net"`, or `watch=("encoder", "head")` for parts that are called one after the '
            "other",
        )
    return names[0]


def check_others_are_at_rest(model: nn.Module, parts: Sequence[str], live: LiveParameters) -> None:
    """Refuse gradients of parameters that are in the optimizer and in no watched part.

    Raises
    ------
    RecordingError
        With their names.
    """
    if not parts:
        return
    own = {id(p) for name in parts for p in model.get_submodule(name).parameters()}
    gradients = live.gradients()
    found = [n for n, p in live.named.items() if id(p) not in own and n in gradients and bool(gradients[n].any())]
    if found:
        raise RecordingError(
            f"The parameters {', '.join(map(quoted, found[:5]))} have gradients, and are in no part that is watched "
            f"({', '.join(map(quoted, parts))})",
            "The network is the composition of the watched parts: nothing else has a gradient",
            "Watch the module that calls them, too, or all parts that are called one after the other: "
            '`watch=("encoder", "head")`',
        )
