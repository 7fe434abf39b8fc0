"""State of a forward pass: modes, buffers and random generators, and settings of torch that a pass changes."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd

from pathkernel.errors import InputError
from pathkernel.runtime.precision import EXACT_PRODUCTS


@contextmanager
def module_mode(module: nn.Module, training: Mapping[str, bool] | bool) -> Iterator[None]:
    """Set train or eval mode submodule by submodule and put it back afterwards."""
    before = []
    for name, child in module.named_modules():
        wanted = training if isinstance(training, bool) else training[name]
        if child.training != wanted:
            before.append(child)
            _set_mode(child, wanted)
    try:
        yield
    finally:
        for child in before:
            _set_mode(child, not child.training)


def _set_mode(module: nn.Module, training: bool) -> None:
    """Set the mode of one module; without the way to it of `nn.Module`, which first asks if it is a parameter."""
    if type(module).__setattr__ is nn.Module.__setattr__:
        object.__setattr__(module, "training", training)
    else:
        module.training = training


Modes = bool | Mapping[str, bool]
"""Train mode of a whole module, or of each submodule by name."""


def hashable(modes: Modes) -> Any:
    """The modes of a pass as a key."""
    return modes if isinstance(modes, bool) else tuple(modes.items())


@dataclass(frozen=True)
class ForwardState:
    """State in which a forward pass ran, as far as its outputs depend on it.

    Attributes
    ----------
    modes
        Train or eval mode of the submodules.
    generators
        States of the random generators right before the pass, by device; empty where it drew no random numbers.
    autocast
        (device type, floating type) of automatic mixed precision, or None.
    buffers
        Buffers that had changed since recording began, as the pass found them; None where that is not known.
    arguments
        What the network was given that is of no sample (None, flags, numbers, tensors that all samples share), by name,
        or by place where it has none. The very same mapping as of the pass before where nothing has changed.
    """

    modes: Modes = False
    generators: Mapping[str, Tensor] = field(default_factory=dict)
    autocast: tuple[str, torch.dtype] | None = None
    buffers: Mapping[str, Tensor] | None = None
    arguments: Mapping[str | int, Any] = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({"arguments": {}, **state})  # pickled before there was the field


EVALUATION = ForwardState()


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """States of torch's random generators on the CPU and on a device."""
    states = {"cpu": torch.random.get_rng_state()}
    if device.type == "cuda":
        states[str(device)] = torch.cuda.get_rng_state(device)
    return states


@contextmanager
def generators_untouched() -> Iterator[None]:
    """Leave the random generators of Python, numpy and torch as they are."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def generators_at(states: Mapping[str, Tensor]) -> Iterator[None]:
    """Draw random numbers from the given states inside, and leave torch's generators as they were."""
    if not states:
        yield
        return
    with torch.random.fork_rng(devices=[name for name in states if name != "cpu"]):
        set_generators(states)
        yield


def set_generators(states: Mapping[str, Tensor]) -> None:
    """Set torch's random generators to the states of `generator_states`."""
    for name, state in states.items():
        if name == "cpu":
            torch.random.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, name)


class Switch:
    """A setting of the whole process that is changed while anybody needs it, and put back when nobody does any more.

    Context managers that put back what they found are not enough: with two threads, the second one finds what the first
    one set, and puts that back after the first one has left.

    Parameters
    ----------
    change
        Makes a context manager that changes the setting.
    """

    def __init__(self, change: Callable[[], Any]) -> None:
        self._change, self._lock, self._inside = change, threading.Lock(), 0
        self._manager: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._manager = self._change()
                self._manager.__enter__()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                manager, self._manager = self._manager, None
                manager.__exit__(None, None, None)


@contextmanager
def _without_fused_encoders() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _without_fused_recurrence() -> Iterator[None]:
    flags, cudnn = torch.backends.mkldnn.set_flags(_enabled=False), torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False  # whose `flags` would set its precision as well
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=flags[0])
        torch.backends.cudnn.enabled = cudnn


def takes_tensor_floats(module: nn.Module, dtype: torch.dtype) -> bool:
    """Test that a loop's passes round products to TensorFloat-32, as far as present settings and layers tell."""
    if dtype != torch.float32 or device_of(module).type != "cuda":
        return False
    matmul, convolution, recurrence = EXACT_PRODUCTS.tensor_floats()
    kinds = ((_ConvNd,) if convolution else ()) + ((nn.RNNBase,) if recurrence else ())
    return matmul or any(isinstance(child, kinds) for child in module.modules())


@contextmanager
def _without_fallback_warnings() -> Iterator[None]:
    switches: Any = torch._C  # none has a public name
    enabled = switches._debug_only_are_vmap_fallback_warnings_enabled()
    switches._debug_only_display_vmap_fallback_warnings(False)
    # The one that `torch.func` asks cannot be read; it is on unless somebody called the same private name.
    switches._functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        switches._functorch._set_vmap_fallback_warning_enabled(True)
        switches._debug_only_display_vmap_fallback_warnings(enabled)


QUIET_FALLBACKS = Switch(_without_fallback_warnings)
"""`vmap` warns of operations that it treats one sample after the other, which is no fault of the user's."""

PLAIN_CALLS = Switch(lambda: torch.compiler.set_stance("force_eager"))
"""Compiled parts of a network would be compiled again for every kind of pass, up to a limit that the loop shares."""

# Forward differentiation has no rule for fused attention, fused encoder layers and the recurrent layers of oneDNN and
# cuDNN, the last of which cannot be differentiated in evaluation at all.
PLAIN_ATTENTION = Switch(lambda: sdpa_kernel(SDPBackend.MATH))
PLAIN_ENCODERS = Switch(_without_fused_encoders)
PLAIN_RECURRENCE = Switch(_without_fused_recurrence)

RANDOM = threading.RLock()
"""Lock of passes that draw random numbers: torch's generators belong to the process."""


def check_gradients_are_possible() -> None:
    """Refuse to compute where torch makes tensors that no gradient can be taken of."""
    if torch.is_inference_mode_enabled():
        raise InputError(
            "A kernel or an explanation was asked for inside `torch.inference_mode()`",
            "Both are made of gradients, which tensors made in inference mode cannot have",
            "Ask outside of it; inside `torch.no_grad()` is all right",
        )


def device_of(module: nn.Module) -> torch.device:
    """Device on which a module computes: that of its first parameter, or of its first buffer."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        return tensor.device
    return torch.device("cpu")
