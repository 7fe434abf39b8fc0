"""The submodules of the model in training: modes, buffers, generators; listed again only where one was replaced."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathkernel.gradients.forward_state import Modes
from pathkernel.runtime.transfers import numbers


class WatchedModules:
    """Tells in which mode the submodules are, and which buffers have changed.

    Parameters
    ----------
    model
        The network in training.
    constants
        Its buffers, by name, as they were when recording began.
    """

    def __init__(self, model: nn.Module, constants: Mapping[str, Tensor]) -> None:
        self.model, self.constants = model, constants
        self._named: dict[str, nn.Module] = {}
        self._listed: list[nn.Module] = []
        self._children: list[int] | None = None
        self._buffers: dict[str, Tensor] = {}
        self._held: list[int] | None = None
        self._changed: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}

    def resume(self, constants: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> None:
        """Go on from buffers as they were when recording began, and as they were seen last."""
        self.constants = constants
        self._changed = dict(changed) if not isinstance(changed, dict) else changed

    def modes(self) -> Modes:
        """Train mode of the submodules, as one flag where all agree."""
        self._list_modules()
        flags = [module.training for module in self._listed]
        if all(flags) or not any(flags):
            return flags[0]
        return dict(zip(self._named, flags, strict=True))

    def changed_buffers(self) -> dict[str, Tensor]:
        """Buffers that have changed since recording began; the same dict for as long as they stay as they are.

        Some are made by a forward pass, such as masks and tables of positions: they have changed, too.
        """
        live = self._list_buffers()
        if not live:
            return self._changed
        known = {name: self._changed.get(name, self.constants.get(name)) for name in live}
        new = self._changed_since(live, known)
        if new:
            self._changed = {
                name: buffer.detach().clone() if name in new else self._changed[name]
                for name, buffer in live.items()
                if name in self._changed or name in new
            }
        return self._changed

    def _changed_since(self, live: Mapping[str, Tensor], known: Mapping[str, Tensor | None]) -> set[str]:
        """Names of buffers that are not what was known of them.

        Off the CPU the buffers of a module that wrote on one of them since they were last looked at count as changed
        without being read (torch counts the batches of a BatchNorm, but not what its kernel writes on the averages).
        All others are compared in one transfer: torch does not count what is written through ``.data``.
        """
        new, compared = set(), {}
        versions = self._versions
        wrote = {_owner(name) for name, seen in versions.items() if name in live and _version(live[name]) != seen}
        for name, value in known.items():
            buffer = live[name]
            if value is None or buffer.shape != value.shape:
                new.add(name)
            elif buffer.is_cpu:
                new |= set() if torch.equal(buffer, value) else {name}
            elif _owner(name) in wrote:
                new.add(name)
            else:
                compared[name] = (buffer == value).all()
        same = numbers(list(compared.values()))
        self._versions = {name: _version(buffer) for name, buffer in live.items() if not buffer.is_cpu}
        return new | {name for name, alike in zip(compared, same, strict=True) if not alike}

    def other_generators(self) -> dict[str, Any]:
        """States of random generators that no record holds: Python's, numpy's, and those in attributes of modules."""
        self._list_modules()
        states = {"Python's `random`": random.getstate(), "`numpy.random`": _state_of(np.random)}
        for name, module in self._named.items():
            for key, value in vars(module).items():
                place = f"`{name}.{key}`" if name else f"`{key}`"
                if isinstance(value, torch.Generator):
                    states[place] = value.get_state().numpy().tobytes()
                elif isinstance(value, random.Random):
                    states[place] = value.getstate()
                elif isinstance(value, (np.random.Generator, np.random.RandomState)):
                    states[place] = _state_of(value)
        return states

    # Lists hold what they name, so that no other object can have taken its identity.

    def _list_modules(self) -> None:
        children = [id(child) for module in self._listed for child in module._modules.values()]
        if children != self._children:
            self._named = dict(self.model.named_modules())
            self._listed = list(self._named.values())
            self._children = [id(child) for module in self._listed for child in module._modules.values()]
            self._held = None

    def _list_buffers(self) -> dict[str, Tensor]:
        self._list_modules()
        held = [id(buffer) for module in self._listed for buffer in module._buffers.values()]
        if held != self._held:
            self._buffers, self._held = dict(self.model.named_buffers()), held
            self._versions = {}
        return self._buffers


def _state_of(generator: Any) -> dict[str, Any]:
    """State of one of numpy's generators, or of ``numpy.random`` itself, as values that ``==`` compares."""
    if isinstance(generator, np.random.Generator):
        state = generator.bit_generator.state  # what the generator says of itself in a pickle is None
    else:
        state = generator.get_state(legacy=False)
    return _with_bytes(state)


def _with_bytes(state: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts with their arrays as bytes: read twice in every pass, where printing them takes a millisecond."""
    return {
        key: _with_bytes(value)
        if isinstance(value, Mapping)
        else value.tobytes()
        if isinstance(value, np.ndarray)
        else value
        for key, value in state.items()
    }


def _version(buffer: Tensor) -> int:
    """How often torch knows a buffer to have been written on; −1 where it does not count."""
    return -1 if buffer.is_inference() else buffer._version


def _owner(name: str) -> str:
    """Name of the module that has a buffer."""
    return name.rpartition(".")[0]
