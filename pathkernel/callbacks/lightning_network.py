"""The network of a Lightning module that is recorded, and those of its optimizers that train it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pathkernel.errors import InputError, RecordingError, quoted
from pathkernel.recording.watched import Watch, watched_parts


@dataclass(frozen=True)
class Network:
    """A network in training.

    Attributes
    ----------
    model
        It.
    watch
        Names of its parts that are called one after the other; None where it is called itself.
    optimizers
        Those that move it.
    """

    model: nn.Module
    watch: tuple[str, ...] | None
    optimizers: tuple[Optimizer, ...]

    @property
    def first(self) -> nn.Module:
        """The module that is called first in a forward pass."""
        return self.model.get_submodule(self.watch[0]) if self.watch else self.model


def network_of(module: nn.Module, optimizers: Sequence[Any], watch: Watch) -> Network:
    """The network that is recorded, as far as the trainer knows it.

    Parameters
    ----------
    module
        The Lightning module.
    optimizers
        The trainer's.
    watch
        As the user gave it: a part of the module, by name or itself, or several that are called one after the other.

    Raises
    ------
    InputError
        Where it cannot be told which part of the module is called.
    RecordingError
        Where no optimizer moves it.
    """
    known = [one for one in optimizers if isinstance(one, Optimizer)]
    if watch is None:
        watch = None if has_forward(module) else _only_part(module, known)
    names = watched_parts(module, watch) if watch is not None and watch is not module else ()
    own = {id(p) for name in names for p in module.get_submodule(name).parameters()}
    own = own if names else {id(p) for p in module.parameters()}
    mine = tuple(one for one in known if held(one) & own)
    if not mine:
        raise RecordingError(
            f"No optimizer of the trainer holds a parameter of {' and '.join(map(quoted, names)) or 'the module'}",
            "What is recorded are the steps of `torch.optim` optimizers that `configure_optimizers` returned",
            "Return the optimizer from `configure_optimizers`, or watch a part that is trained, "
            '`LightningRecorder(watch="net")`',
        )
    if not names:
        return Network(module, None, mine)
    moved = {p for one in mine for p in held(one)}
    if len(names) == 1 and moved <= own:
        return Network(module.get_submodule(names[0]), None, mine)
    if len(mine) == len(known):
        return Network(module, names, mine)
    return Network(_parts_alone(module, names, moved), names, mine)


def _parts_alone(module: nn.Module, names: Sequence[str], moved: set[int]) -> nn.Module:
    """The parts of a module that some of its optimizers move: others move the rest."""
    alone = nn.Module()
    for name, child in module.named_children():
        watched = any(one == name or one.startswith(f"{name}.") for one in names)
        if watched or any(id(p) in moved for p in child.parameters()):
            alone.add_module(name, child)
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) in moved:
            alone.register_parameter(name, parameter)
    return alone


def _only_part(module: nn.Module, optimizers: Sequence[Optimizer]) -> str:
    """The only part of a module without ``forward`` that can be called and is trained.

    Raises
    ------
    InputError
        Where there are several, or none.
    """
    names = trained_parts(module, optimizers)
    if len(names) == 1:
        return names[0]
    several = f"watch=({', '.join(map(repr, names[:2]))})" if len(names) > 1 else 'watch=("encoder", "head")'
    raise InputError(
        f"The {type(module).__name__} has no `forward`, and {len(names)} parts that are trained and can be called"
        + (f": {', '.join(map(quoted, names[:8]))}" if names else ""),
        "The part that `training_step` calls is watched; it is found by itself where there is one",
        f'Write `LightningRecorder(watch="{names[0] if names else "net"}")` for one of them, which takes the '
        f"optimizers that hold its parameters; or `LightningRecorder({several})` for parts that are called one after "
        "the other, each with what the one before returned",
    )


def trained_parts(module: nn.Module, optimizers: Sequence[Optimizer]) -> list[str]:
    """Names of the children of a module that can be called and have parameters in an optimizer."""
    trained = {p for one in optimizers for p in held(one)}
    return [
        name
        for name, child in module.named_children()
        if has_forward(child) and any(id(p) in trained for p in child.parameters())
    ]


def has_forward(module: nn.Module) -> bool:
    """True where somebody wrote a ``forward``: the one that Lightning's own class has hands on to nothing."""
    if "forward" in vars(module):
        return True
    return type(module).forward is not nn.Module.forward and type(module).forward.__qualname__ != (
        "LightningModule.forward"
    )


def held(optimizer: Optimizer) -> set[int]:
    """Identities of the parameters of an optimizer."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def refuse_what_is_not_seen(trainer: Any, module: nn.Module) -> None:
    """Refuse a fit whose passes a recorder does not see as the module's code has them.

    These are strategies that train in several processes, or wrap the module for these, and a module whose training step
    is compiled as a whole.

    Raises
    ------
    RecordingError
        With the name of the strategy, or of the module.
    """
    if getattr(module, "_compiler_ctx", None) is not None:
        raise RecordingError(
            f"The {type(module).__name__} is compiled with its `training_step`",
            "A recorder sees the forward passes of a network: compiled code of a whole step has none",
            "Compile the network alone, `self.net.compile()` or `self.net = torch.compile(self.net)` in the module, "
            "and give `fit` the module itself",
        )
    strategy = trainer.strategy
    parallel = any(kind.__name__ in ("ParallelStrategy", "XLAStrategy") for kind in type(strategy).__mro__)
    if parallel or getattr(trainer, "world_size", 1) > 1:
        raise RecordingError(
            f"The trainer has the strategy {type(strategy).__name__}, for {getattr(trainer, 'world_size', 1)} "
            f"process{'es' * (getattr(trainer, 'world_size', 1) != 1)}",
            "A recorder sees the passes of one process, on one device",
            'Write `Trainer(devices=1, strategy="auto")`',
        )


def without_empty_closure(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Hook before a step that takes the closure of Lightning's manual optimization out of it.

    ``optimizer.step()`` without a closure reaches the optimizer with one that does nothing but call the hooks
    ``on_before_optimizer_step``. These are called here: a step with a closure looks as if its passes were within.
    """
    closure = kwargs.get("closure")
    own = closure.args[-1] if isinstance(closure, partial) and closure.args else None
    if closure is None or getattr(own, "__name__", "") != "do_nothing_closure":
        return None
    with torch.enable_grad():  # as the optimizer would call it
        closure()
    return args, {**kwargs, "closure": None}
