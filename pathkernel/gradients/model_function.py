"""A module as a pure function of its parameters, and its per-sample gradients.

Everything downstream sees a network as ``z = f(θ, x)``, with θ a flat vector of P numbers (or the same numbers as
a dict by parameter name) and z the outputs of a batch, flattened to (B, C).

Arithmetic runs where the network's parameters are. θ, samples, contexts and buffers come from anywhere (a record on
disk, a loop that moves its batches itself) and are moved there where they enter a `ModelFunction`; random numbers are
drawn on the CPU and moved, so that they are the same everywhere. What was recorded in memory stays where it was, ids
are on the CPU, and results are handed out as arrays.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import random
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, Parameters, PyTree
from pathkernel.errors import InputError, check
from pathkernel.gradients.parameters import ParameterLayout, constants_of
from pathkernel.gradients.pytrees import arguments_of, blocks, cast_floating, count, moved, take
from pathkernel.gradients.returned import Returns, batch_outputs, selected
from pathkernel.gradients.structural_copy import StructuralCopy
from pathkernel.runtime.interrupts import attempt, deliver, held


@contextmanager
def module_mode(module: nn.Module, training: Mapping[str, bool] | bool) -> Iterator[None]:
    """Set train or eval mode submodule by submodule and put it back afterwards."""
    before = []
    for name, child in module.named_modules():
        wanted = training if isinstance(training, bool) else training[name]
        if child.training != wanted:
            before.append(child)
            child.training = wanted
    try:
        yield
    finally:
        for child in before:
            child.training = not child.training


Modes = bool | Mapping[str, bool]
"""Train mode of a whole module, or of each submodule by name."""


@dataclass(frozen=True)
class ForwardState:
    """How a forward pass ran, as far as its outputs depend on it.

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
    """

    modes: Modes = False
    generators: Mapping[str, Tensor] = field(default_factory=dict)
    autocast: tuple[str, torch.dtype] | None = None
    buffers: Mapping[str, Tensor] | None = None


EVALUATION = ForwardState()


def modes_of(module: nn.Module) -> Modes:
    """Train mode of the submodules, as one flag where all agree."""
    modes = {name: child.training for name, child in module.named_modules()}
    return modes[""] if len(set(modes.values())) == 1 else modes


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
    devices = [name for name in states if name != "cpu"]
    with torch.random.fork_rng(devices=devices):
        torch.random.set_rng_state(states["cpu"])
        for name in devices:
            torch.cuda.set_rng_state(states[name], name)
        yield


class _Switch:
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


def _tensor_float_settings() -> list[tuple[Any, str, Any]]:
    """Where torch keeps whether products are rounded to TensorFloat-32: object, attribute, and what says no.

    Of matrix products, convolutions and recurrent layers. The older names refuse once somebody has used the newer ones,
    and the other way round they refuse until these are put back.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    older = [(holder, "allow_tf32", False) for holder in (matmul, cudnn, cudnn)]
    try:
        for holder, name, _ in older:
            getattr(holder, name)
    except RuntimeError:
        newer: Any = cudnn
        return [(holder, "fp32_precision", "ieee") for holder in (matmul, newer.conv, newer.rnn)]
    return older


@contextmanager
def _without_tensor_floats() -> Iterator[None]:
    settings = _tensor_float_settings()
    before = [getattr(holder, name) for holder, name, _ in settings]
    try:
        for holder, name, no in settings:
            setattr(holder, name, no)
        yield
    finally:
        for (holder, name, _), value in zip(settings, before, strict=True):
            setattr(holder, name, value)


def takes_tensor_floats(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether passes of a loop round products to TensorFloat-32, as far as the settings now and the layers tell."""
    if dtype != torch.float32 or device_of(module).type != "cuda":
        return False
    matmul, convolution, recurrence = (
        getattr(holder, name) in (True, "tf32") for holder, name, _ in _tensor_float_settings()
    )
    kinds = ((_ConvNd,) if convolution else ()) + ((nn.RNNBase,) if recurrence else ())
    return matmul or any(isinstance(child, kinds) for child in module.modules())


@contextmanager
def _without_fallback_warnings() -> Iterator[None]:
    switches: Any = torch._C  # neither has a public name
    enabled = switches._debug_only_are_vmap_fallback_warnings_enabled()
    switches._debug_only_display_vmap_fallback_warnings(False)
    try:
        yield
    finally:
        switches._debug_only_display_vmap_fallback_warnings(enabled)


_QUIET_FALLBACKS = _Switch(_without_fallback_warnings)
"""`vmap` warns of operations that it treats one sample after the other, which is no fault of the user's."""

# Forward differentiation has no rule for fused attention, fused encoder layers and the recurrent layers of oneDNN and
# cuDNN, the last of which cannot be differentiated in evaluation at all.
_PLAIN_ATTENTION = _Switch(lambda: sdpa_kernel(SDPBackend.MATH))
_PLAIN_ENCODERS = _Switch(_without_fused_encoders)
_PLAIN_RECURRENCE = _Switch(_without_fused_recurrence)

# TensorFloat-32, which cuDNN takes for convolutions unless it is told not to, rounds to eleven bits: rows that are
# formed in two ways could not be compared.
_FULL_PRECISION = _Switch(_without_tensor_floats)
_RANDOM = threading.RLock()
"""Held by passes that draw random numbers: torch's generators belong to the process."""


def check_gradients_are_possible() -> None:
    """Refuse to compute where torch makes tensors that no gradient can be taken of."""
    check(
        not torch.is_inference_mode_enabled(),
        InputError,
        "A kernel or an explanation was asked for inside `torch.inference_mode()`",
        "Both are made of gradients, which tensors made in inference mode cannot have",
        "Ask outside of it; inside `torch.no_grad()` is all right",
    )


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: on the device of its first parameter, or of its first buffer."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        return tensor.device
    return torch.device("cpu")


class ModelFunction:
    """A module as z = f(θ, x), pure in θ.

    Parameters
    ----------
    module
        The network; its own parameter values are never read.
    layout
        Which parameters make up θ.
    constants
        Values of everything else that the module holds: parameters outside θ and buffers.
    dtype
        Floating type of the arithmetic; inputs and constants are converted to it.
    state
        How to run: by default in eval mode, since a kernel at fixed θ must be a function of its two samples alone.
    tap
        Name of the submodule whose output stands for f; the module's own output by default.
    returns
        What of the module's own output is f; see `pathkernel.gradients.returned`.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: ParameterLayout,
        constants: Parameters | None = None,
        dtype: torch.dtype = torch.float32,
        state: ForwardState = EVALUATION,
        tap: str | None = None,
        returns: Returns = None,
    ) -> None:
        check_gradients_are_possible()
        self.layout, self.dtype, self.state, self.tap, self.returns = layout, dtype, state, tap, returns
        self.structure = StructuralCopy(module)
        self.device = device_of(module)
        self.constants = self.cast({**constants_of(module, layout), **(constants or {})})
        self.recurrent = any(isinstance(child, (nn.RNNBase, nn.RNNCellBase)) for child in self.module.modules())
        self.row_routes: dict[Any, str] = {}
        self.sample_wise: set[Any] = set()
        self.lock, self._kept = threading.RLock(), False

    @property
    def module(self) -> nn.Module:
        """The copy of the module that passes run on."""
        return self.structure.module

    def replaced(
        self,
        *,
        constants: Parameters | None = None,
        state: ForwardState | None = None,
        tap: str | None = None,
    ) -> ModelFunction:
        """The same function with some constants, its way of running, or its output replaced."""
        other = copy.copy(self)  # what was found out about the module holds for all of them
        if constants:
            other.constants = {**self.constants, **self.cast(dict(constants))}
        other.state = self.state if state is None else state
        other.tap = self.tap if tap is None else tap
        return other

    def whole(self) -> ModelFunction:
        """The same function with all that the network returns."""
        other = copy.copy(self)
        other.returns = None
        return other

    def restricted(self, layout: ParameterLayout, theta: Parameters) -> ModelFunction:
        """The same function of some of its parameters; the others are constants, with their values in ``theta``."""
        other = copy.copy(self)
        rest = {name: value for name, value in theta.items() if name not in layout.slices}
        other.layout, other.constants = layout, {**self.constants, **self.cast(rest)}
        return other

    def converted(self, dtype: torch.dtype) -> ModelFunction:
        """The same function in another floating type."""
        other = copy.copy(self)
        other.dtype, other.constants, other.row_routes = dtype, cast_floating(dict(self.constants), dtype), {}
        return other

    @contextmanager
    def running(self, gradients: bool | None = None, *, as_trained: bool = False) -> Iterator[None]:
        """Evaluate inside, once where the pass draws random numbers, with kernels that can be differentiated.

        With or without autograd's graph; None leaves it as it is. ``as_trained`` leaves the choice of kernels to torch,
        as the loop did. Ctrl-C waits until the end, or for `pathkernel.runtime.interrupts.deliver`: settings of torch,
        and its random generators, have to be put back. One thread at a time.
        """
        check_gradients_are_possible()
        device, dtype = self.state.autocast or (self.device.type, None)
        with (
            held(),
            self.lock,
            _RANDOM if self.state.generators else nullcontext(),
            module_mode(self.module, self.state.modes),
            generators_at(self.state.generators),
            nullcontext() if as_trained else _PLAIN_ATTENTION,
            nullcontext() if as_trained else _PLAIN_ENCODERS,
            nullcontext() if as_trained or self.device.type != "cuda" else _FULL_PRECISION,
            _PLAIN_RECURRENCE if self.recurrent and not as_trained else nullcontext(),
            torch.autocast(device, dtype=dtype, enabled=dtype is not None),
            nullcontext() if gradients is None else torch.set_grad_enabled(gradients),
        ):
            yield

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Leave the parameters of the latest pass where the network uses them: checkpoints run parts of it again."""
        before, self._kept = self._kept, True
        try:
            yield
        finally:
            self._kept = before
            self.structure.clear()

    def cast(self, tree: PyTree) -> PyTree:
        """Samples, contexts or constants in the working floating type, on the network's device."""
        return cast_floating(tree, self.dtype, self.device)

    def parameters(self, vector: Float[Tensor, " P"]) -> dict[str, Tensor]:
        """θ as a dict in the working floating type, on the network's device."""
        return self.layout.unflatten(self.cast(vector))

    def call(self, parameters: Parameters, inputs: PyTree) -> Any:
        """The network's outputs for a batch; see `pathkernel.gradients.pytrees.arguments_of`."""
        structure, evaluation = self.structure, self.state.modes is False
        inputs = moved(inputs, self.device)
        if structure.writes_inputs is not False:  # they are the user's
            inputs = pytree.tree_map(lambda leaf: leaf.clone(), inputs)
        arguments = arguments_of(self.module.forward, inputs)
        # Layers in train mode write to their buffers, and some networks do so in evaluation.
        written = structure.written if evaluation and structure.written is not None else structure.buffers
        copies = {name: self.constants[name].clone() for name in written}
        tapped: list[Any] = []
        with self.lock:
            handle = None
            if self.tap is not None:
                tapping = self.module.get_submodule(self.tap)
                handle = tapping.register_forward_hook(lambda _, __, out: tapped.append(out))
            structure.fill({**self.constants, **copies, **parameters})
            try:
                returned = self.module(*arguments)
                if structure.writes_inputs is None:
                    structure.writes_inputs = any(leaf._version > 0 for leaf in pytree.tree_leaves(inputs))
                if evaluation and structure.written is None:
                    structure.written = tuple(name for name, value in copies.items() if value._version > 0)
            finally:
                if handle is not None:
                    handle.remove()
                if not self._kept:
                    structure.clear()
        return selected(returned, self.returns) if self.tap is None else tapped[-1]

    def batch(self, parameters: Parameters, inputs: PyTree) -> Tensor:
        """Outputs (B, C) of a batch, flattened sample by sample."""
        return batch_outputs(self.call(parameters, inputs), count(inputs))

    def single(self, parameters: Parameters, sample: PyTree) -> Tensor:
        """Outputs (C,) of one sample given without its batch axis."""
        return self.batch(parameters, pytree.tree_map(lambda leaf: leaf.unsqueeze(0), sample)).squeeze(0)

    def outputs(self, vector: Float[Tensor, " P"], inputs: PyTree, block: int = 4096) -> Tensor:
        """Outputs (n, C) at θ without gradients, in blocks of samples."""
        parameters = self.parameters(vector)
        inputs = self.cast(inputs)
        found = []
        with self.running(gradients=False):
            for piece in blocks(count(inputs), block):
                found.append(self.batch(parameters, take(inputs, piece)))
                deliver()
        return torch.cat(found)


REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError, AssertionError)
"""What torch raises in a call that a transformation does not cover."""

OutputFunctional = Callable[[Tensor, Any], Tensor]
"""h(z, context) of one sample's outputs z (C,): a scalar, or a vector (K,)."""


def values_of(functional: OutputFunctional, outputs: Tensor, context: PyTree) -> Tensor:
    """h of n samples, (n, K), from their outputs (n, C).

    Raises
    ------
    InputError
        When the outputs require gradients and h has none.
    """
    context = moved(context, outputs.device)
    found = attempt(lambda: vmap(functional)(outputs, context), REFUSALS)
    if isinstance(found, Exception):  # it asks for a number, as `z[z.argmax().item()]` does
        found = torch.stack([functional(outputs[i], take(context, i)) for i in range(len(outputs))])
    if outputs.requires_grad and not found.requires_grad:
        raise InputError(
            "`outputs=` is a function without a gradient in the network's outputs",
            "Kernels and shares are made of its gradients: `argmax`, comparisons and `detach()` have none",
            "Write a differentiable function of one sample's outputs, such as `lambda z: z[0] - z[1]`",
        )
    return found.reshape(len(outputs), -1)


def slopes_of(functional: OutputFunctional, outputs: Tensor, context: PyTree) -> Float[Tensor, "n K C"]:
    """∂h/∂z of n samples at their outputs (n, C)."""
    with torch.enable_grad():
        z = outputs.detach().requires_grad_(True)
        h = values_of(functional, z, context)
        rows = [torch.autograd.grad(h[:, k].sum(), z, retain_graph=True)[0] for k in range(h.shape[1])]
    return torch.stack(rows, dim=1)


def sample_gradients(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    inputs: PyTree,
    functional: OutputFunctional,
    context: PyTree,
    *,
    scalar: bool,
    route: str | None = None,
) -> dict[str, Tensor]:
    r"""Gradients of h(f(θ, x_i), context_i) in θ, sample by sample.

    Parameters
    ----------
    function
        The network.
    vector
        θ, (P,).
    inputs, context
        Samples and what h needs of each of them, (n, ...) leaves.
    functional
        h, see `OutputFunctional`.
    scalar
        Whether h is a scalar (one reverse sweep a sample) or a vector (K sweeps a sample).
    route
        ``"vmap"``: all samples at once by `torch.func`; ``"autograd"``: a loop of plain autograd over samples, slow,
        which covers whatever torch.func refuses; None: the first, where its rows are seen to be right.

    Returns
    -------
    dict of str to Tensor
        By parameter name, (n, *shape) for a scalar h, (n, K, *shape) otherwise, in the function's floating type.
        Memory is n·K·P numbers, and the caller chooses n.

    Notes
    -----
    With None, rows are compared with the network run forward once for each new number and shape of samples,
    :math:`\langle row_{ik}, v\rangle = \partial h_{ik}/\partial z_i \cdot (J v)_i` for a random v: `vmap` has been
    seen to be wrong (of PReLU, for as many samples as outputs).
    """
    inputs, context = function.cast(inputs), moved(context, function.device)
    arguments = vector, inputs, functional, context, scalar
    key = _route_key(function, inputs, functional, context, scalar)
    if route is None and function.row_routes.get(key) != "autograd":
        rows = attempt(lambda: _gradients_at_once(function, *arguments), REFUSALS)
        if not isinstance(rows, Exception):
            # Whether `vmap` is right may depend on the number of components, which is known only now.
            proved = (*key, 1 if scalar else next(iter(rows.values())).shape[1])
            if proved in function.row_routes or _are_own_rows(function, rows, *arguments):
                function.row_routes[proved] = "vmap"
                return rows
    elif route == "vmap":
        return _gradients_at_once(function, *arguments)
    function.row_routes[key] = "autograd"
    return _gradients_in_turn(function, *arguments)


def _route_key(
    function: ModelFunction, inputs: PyTree, functional: OutputFunctional, context: PyTree, scalar: bool
) -> tuple[Any, ...]:
    leaves = [leaf for leaf in pytree.tree_leaves((inputs, context)) if isinstance(leaf, Tensor)]
    shapes = ((leaf.shape, leaf.dtype) for leaf in leaves)
    return (function.layout.names, function.tap, scalar, _known_again(functional), *shapes)


def _known_again(functional: Any) -> Any:
    """What a function does as far as its code and the functions that it closes over say; equal for equal ones."""
    code = getattr(functional, "__code__", None)
    if code is None:
        return functional if isinstance(functional, Hashable) else object()
    cells = (cell.cell_contents for cell in functional.__closure__ or ())
    return (code, *(_known_again(held) for held in cells if callable(held)))


def _gradients_at_once(
    function: ModelFunction, vector: Tensor, inputs: PyTree, functional: OutputFunctional, context: PyTree, scalar: bool
) -> dict[str, Tensor]:
    def h(parameters: Parameters, sample: PyTree, sample_context: PyTree) -> Tensor:
        return functional(function.single(parameters, sample), sample_context)

    differentiate = grad(h) if scalar else jacrev(h)
    parameters = function.parameters(vector)
    if function.recurrent:  # its cells add to the hidden state in place, which vmap allows only with θ batched as well
        n = count(inputs)
        parameters = {name: value.expand(n, *value.shape) for name, value in parameters.items()}
    with function.running(), _QUIET_FALLBACKS:
        rows = vmap(differentiate, in_dims=(0 if function.recurrent else None, 0, 0))(parameters, inputs, context)
    return {name: gradient.detach() for name, gradient in rows.items()}


def _gradients_in_turn(
    function: ModelFunction, vector: Tensor, inputs: PyTree, functional: OutputFunctional, context: PyTree, scalar: bool
) -> dict[str, Tensor]:
    rows = []
    with function.running(gradients=True), function.kept():
        for i in range(count(inputs)):
            leaves = leaf_parameters(function, vector)
            z = function.batch(leaves, take(inputs, slice(i, i + 1)))
            h = values_of(functional, z, take(context, slice(i, i + 1)))[0]
            units = torch.eye(len(h), dtype=h.dtype, device=h.device)
            rows.append([pulled_back(leaves, h, unit, retain=k + 1 < len(h)) for k, unit in enumerate(units)])
            deliver()
    stacked = {name: torch.stack([torch.stack([g[name] for g in own]) for own in rows]) for name in leaves}
    return {name: value[:, 0] for name, value in stacked.items()} if scalar else stacked


def leaf_parameters(function: ModelFunction, vector: Float[Tensor, " P"]) -> dict[str, Tensor]:
    """θ as leaves of autograd's graph, by name."""
    return {name: value.detach().requires_grad_(True) for name, value in function.parameters(vector).items()}


def pulled_back(leaves: Parameters, outputs: Tensor, cotangent: Tensor, *, retain: bool) -> dict[str, Tensor]:
    """Jᵀ λ of a pass from the given leaves, by name; zeros for parameters that it does not use.

    By ``backward``, which checkpoints allow where they refuse `torch.autograd.grad`.
    """
    for leaf in leaves.values():
        leaf.grad = None
    if outputs.requires_grad:
        outputs.backward(cotangent, retain_graph=retain)
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


ROW_LIMIT = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Difference between ⟨row_i, v⟩ and λ_i · (J v)_i, relative to the largest, up to which a row belongs to its sample."""


def random_directions(size: int, count: int, seed: int = 0) -> Float[Tensor, "count P"]:
    """Directions in the space of θ, float64."""
    return torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _are_own_rows(
    function: ModelFunction,
    rows: Mapping[str, Tensor],
    vector: Tensor,
    inputs: PyTree,
    functional: OutputFunctional,
    context: PyTree,
    scalar: bool,
) -> bool:
    """Whether rows belong to their samples, by one pass forward; decided in float64 where rounding might have a say."""
    v = random_directions(function.layout.size, 1)
    error = _error_of_gradients(function, rows, v, vector, inputs, functional, context, scalar)
    if error <= ROW_LIMIT.get(function.dtype, 0.0) and not function.state.autocast:
        return True
    if error == math.inf:
        return False
    exact = function.converted(torch.float64).replaced(state=dataclasses.replace(function.state, autocast=None))
    arguments = vector.double(), cast_floating(inputs, torch.float64), functional, cast_floating(context, torch.float64)
    again = attempt(lambda: _gradients_at_once(exact, *arguments, scalar), REFUSALS)
    if isinstance(again, Exception):
        return False
    return _error_of_gradients(exact, again, v, *arguments, scalar) <= ROW_LIMIT[torch.float64]


def _error_of_gradients(
    function: ModelFunction,
    rows: Mapping[str, Tensor],
    v: Tensor,
    vector: Tensor,
    inputs: PyTree,
    functional: OutputFunctional,
    context: PyTree,
    scalar: bool,
) -> float:
    with function.running(gradients=False):
        weights = slopes_of(functional, function.batch(function.parameters(vector), inputs), context)
    flat = function.layout.flatten(rows)
    found = flat.reshape(len(flat), -1, flat.shape[-1]) @ v.T.to(flat)
    return error_of_rows(function, vector, inputs, v, found, weights)


SMALL_BATCH = 2**15
"""Numbers in the inputs of a batch, times directions, up to which derivatives along all directions are taken at once:
the time of small networks is that of calls, and large ones would take as many times the memory."""


def output_products(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    inputs: PyTree,
    directions: Float[Tensor, "D P"],
    push: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor] | None = None,
) -> Float[Tensor, "D n C"] | None:
    """∇z·v for all outputs of a batch, run as it is, and a few directions, float64; None where torch has no way.

    ``push`` is `push_forward` by default.
    """
    inputs, point = function.cast(inputs), function.cast(vector)

    def outputs(theta: Tensor) -> Tensor:
        return function.batch(function.layout.unflatten(theta), inputs)

    along = directions.to(point)
    load_transformations()

    def at_once() -> Tensor:
        with function.running(gradients=False), _QUIET_FALLBACKS:
            return vmap(lambda direction: jvp(outputs, (point,), (direction,))[1])(along).double()

    def one_by_one() -> Tensor:
        found = []
        # Random layers draw the same numbers every time; without any, all directions share one setting up.
        for some in along.split(1 if function.state.generators else len(along)):
            with function.running(gradients=False), function.kept():
                for direction in some:
                    found.append((push or push_forward)(outputs, point, direction).double())
                    deliver()
        return torch.stack(found)

    together = ("directions", function.tap, function.layout.names)
    small = sum(leaf.numel() for leaf in pytree.tree_leaves(inputs)) * len(along) <= SMALL_BATCH
    several = len(along) > 1 and small and not function.state.generators
    if several and push in (None, push_forward) and together not in function.row_routes:
        found = attempt(at_once, REFUSALS)
        if not isinstance(found, Exception):
            return found
        function.row_routes[together] = "one by one"
    found = attempt(one_by_one, REFUSALS)
    return None if isinstance(found, Exception) else found


def error_of_rows(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    inputs: PyTree,
    directions: Float[Tensor, "D P"],
    found: Float[Tensor, "n K D"],
    weights: Float[Tensor, "n K C"],
) -> float:
    r"""By how much rows differ from what belongs to their samples.

    .. math:: \max_{i,k,d} \lvert \langle row_{ik}, v_d\rangle - \lambda_{ik} \cdot (J v_d)_i \rvert
              \,/\, \max_{i,k,d} \lvert \lambda_{ik} \cdot (J v_d)_i \rvert ,

    with J v of the batch as it ran; infinite where torch has no way to J v.

    Parameters
    ----------
    function, vector, inputs
        The network, θ, and n samples.
    directions
        v.
    found
        ⟨row, v⟩.
    weights
        λ: the row of component k of sample i is :math:`J_i^\top \lambda_{ik}`.

    Notes
    -----
    J v by forward differentiation. Where that says something else than the rows, by two reverse sweeps of the batch:
    autograd's gradient need not be the derivative (it leaves out the row of an embedding's ``padding_idx``).
    """
    error, limit = math.inf, ROW_LIMIT.get(function.dtype, 0.0)
    for push in (push_forward, _push_by_reversing):
        pushed = output_products(function, vector, inputs, directions, push)
        if pushed is not None:
            expected = torch.einsum("nkc,dnc->nkd", weights.to(pushed), pushed)
            difference, scale = (found.to(pushed) - expected).abs().max().item(), expected.abs().max().item()
            if math.isfinite(difference) and math.isfinite(scale):
                error = min(error, difference / scale if scale > 0 else difference)
        if error <= limit:
            break
    return error


def gradients_along(
    function: ModelFunction,
    start: Float[Tensor, " P"],
    displacement: Float[Tensor, " P"],
    times: Float[Tensor, " n"],
    inputs: PyTree,
    functional: OutputFunctional,
    context: PyTree,
) -> tuple[Tensor, Tensor]:
    """Values (n,) and gradients (n, P) of a scalar h at θ + t_i Δ, every sample at a time t_i of its own."""
    inputs, context = function.cast(inputs), moved(context, function.device)
    times = times.to(function.device)
    start, displacement = function.cast(start), function.cast(displacement)

    def h(vector: Tensor, sample: PyTree, sample_context: PyTree) -> tuple[Tensor, Tensor]:
        value = functional(function.single(function.layout.unflatten(vector), sample), sample_context)
        return value, value

    def at(time: Tensor, sample: PyTree, sample_context: PyTree) -> tuple[Tensor, Tensor]:
        return grad(h, has_aux=True)(start + time * displacement, sample, sample_context)

    def together(moments: Tensor) -> tuple[Tensor, Tensor]:
        with function.running(), _QUIET_FALLBACKS:
            rows, values = vmap(at)(moments.to(function.dtype), inputs, context)
        return values.detach(), rows.detach()

    key = _route_key(function, inputs, functional, context, True)
    along = ("along", *key)
    if along not in function.row_routes:
        # Rows at one θ are compared with the network run forward; with a θ for each sample, with these.
        rows = function.layout.flatten(sample_gradients(function, start, inputs, functional, context, scalar=True))
        at_start = attempt(lambda: together(torch.zeros_like(times))[1], REFUSALS)
        apart = (at_start - rows).abs().max().item() if isinstance(at_start, Tensor) else math.inf
        right = apart <= ROW_LIMIT.get(function.dtype, 0.0) * max(rows.abs().max().item(), torch.finfo(rows.dtype).tiny)
        function.row_routes[along] = "vmap" if right else "autograd"
    if function.row_routes[along] == "vmap":
        return together(times)
    found = []
    for i, time in enumerate(times.tolist()):
        one = slice(i, i + 1)
        sample, own, theta = take(inputs, one), take(context, one), start + time * displacement
        gradient = sample_gradients(function, theta, sample, functional, own, scalar=True)
        value = values_of(functional, function.outputs(theta, sample), own)[0, 0]
        found.append((value, function.layout.flatten(gradient)[0]))
    return torch.stack([value for value, _ in found]), torch.stack([row for _, row in found])


def push_forward(function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor) -> Tensor:
    r"""Directional derivative of a function at a point.

    By forward differentiation; where an operation has no rule for it, by two reverse sweeps,
    :math:`J v = \partial_u \langle J^\top u, v\rangle`.
    """
    load_transformations()
    found = attempt(lambda: jvp(function, (point,), (direction,))[1], REFUSALS)
    return _push_by_reversing(function, point, direction) if isinstance(found, Exception) else found


def _push_by_reversing(function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor) -> Tensor:
    with torch.enable_grad():
        theta = point.detach().clone().requires_grad_(True)
        outputs = function(theta)
        u = torch.linspace(0.5, 1.5, outputs.numel(), dtype=outputs.dtype, device=outputs.device)
        u = u.reshape(outputs.shape).requires_grad_(True)
        (pulled,) = torch.autograd.grad(outputs, theta, u, create_graph=True)
        product = pulled @ direction
        (found,) = torch.autograd.grad(product, u)
    # Functions that are differentiable once drop out of the second sweep without a word: ⟨Jᵀu, v⟩ and ⟨u, J v⟩ differ.
    left, right = product.item(), (u * found).sum().item()
    scale, rounding = (u * found).abs().sum().item() + abs(left), math.sqrt(torch.finfo(outputs.dtype).eps)
    once = not abs(left - right) <= rounding * scale
    # Reentrant checkpoints hide the parameters that they use from `grad`, and not from `backward`.
    with torch.enable_grad():
        whole = point.detach().clone().requires_grad_(True)
        function(whole).backward(u.detach())
    hidden = whole.grad is not None and not (whole.grad - pulled).norm() <= rounding * whole.grad.norm()
    if once or hidden:
        raise NotImplementedError("a function in the network can be differentiated only once, or not by `grad`")
    return found.detach()


@functools.cache
def load_transformations() -> None:
    """Let torch build what its transformations need, once: some megabytes and tenths of a second at their first use.

    Without its warning about how it builds the decompositions of forward differentiation.
    """
    layer = torch.nn.functional.layer_norm
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
        point, directions = torch.zeros(3, 2), torch.ones(2, 3, 2)
        vmap(lambda v: jvp(lambda x: layer(x, (2,)), (point,), (v,))[1])(directions)
        vmap(grad(lambda x: layer(x, (2,)).sum()))(point)
