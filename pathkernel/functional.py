"""A module as a pure function of its parameters, and its per-sample gradients.

Everything downstream sees a network as ``z = f(θ, x)``, with θ a flat vector of P numbers (or the same numbers as
a dict by parameter name) and z the outputs of a batch, flattened to (B, C).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, Parameters, PyTree
from pathkernel.errors import InputError
from pathkernel.interrupts import deliver, held
from pathkernel.parameters import ParameterLayout
from pathkernel.pytrees import arguments_of, blocks, cast_floating, count, take


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


def batch_outputs(outputs: PyTree) -> Tensor:
    """Everything that a module returned for a batch, (B, C): floating tensors side by side, flattened.

    Raises
    ------
    InputError
        When an output does not have the samples along its first axis.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    sizes = {leaf.shape[:1] for leaf in leaves}
    if len(sizes) != 1 or sizes == {torch.Size()}:
        raise InputError(
            f"The model returned tensors of shapes {', '.join(str(tuple(leaf.shape)) for leaf in leaves)}",
            "Every output has the samples of the batch along its first axis",
            "Return per-sample outputs, and compute what belongs to the whole batch inside the loss",
        )
    flat = [leaf.reshape(leaf.shape[0], -1) for leaf in leaves]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def _aliases(module: nn.Module) -> dict[str, str]:
    """Other names of shared parameters and buffers, and the name by which each is given."""
    given = {id(value): name for name, value in _named_tensors(module, remove_duplicate=True)}
    every = _named_tensors(module, remove_duplicate=False)
    return {name: given[id(value)] for name, value in every if given[id(value)] != name}


def _named_tensors(module: nn.Module, *, remove_duplicate: bool) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=remove_duplicate)
    yield from module.named_buffers(remove_duplicate=remove_duplicate)


@contextmanager
def _differentiable_kernels(recurrent: bool) -> Iterator[None]:
    """Leave out fused encoder layers and oneDNN's recurrent layers: forward differentiation has no rule for them."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    flags = torch.backends.mkldnn.set_flags(_enabled=False) if recurrent else None
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        if flags is not None:
            torch.backends.mkldnn.set_flags(_enabled=flags[0])


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
    """

    def __init__(
        self,
        module: nn.Module,
        layout: ParameterLayout,
        constants: Parameters,
        dtype: torch.dtype = torch.float32,
        state: ForwardState = EVALUATION,
        tap: str | None = None,
    ) -> None:
        self.module, self.layout, self.dtype, self.state, self.tap = module, layout, dtype, state, tap
        self.constants = cast_floating(dict(constants), dtype)
        self.recurrent = any(isinstance(child, nn.RNNBase) for child in module.modules())
        self.aliases = _aliases(module)

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
            other.constants = {**self.constants, **cast_floating(dict(constants), self.dtype)}
        other.state = self.state if state is None else state
        other.tap = self.tap if tap is None else tap
        return other

    def converted(self, dtype: torch.dtype) -> ModelFunction:
        """The same function in another floating type."""
        return ModelFunction(self.module, self.layout, self.constants, dtype, self.state, self.tap)

    @contextmanager
    def running(self, gradients: bool | None = None) -> Iterator[None]:
        """Evaluate inside, once where the pass draws random numbers, with kernels that can be differentiated.

        With or without autograd's graph; None leaves it as it is. Ctrl-C waits until the end, or for
        `pathkernel.interrupts.deliver`: the module is the user's, and holds θ.
        """
        device, dtype = self.state.autocast or ("cpu", None)
        with (
            held(),
            module_mode(self.module, self.state.modes),
            generators_at(self.state.generators),
            sdpa_kernel(SDPBackend.MATH),
            _differentiable_kernels(self.recurrent),
            torch.autocast(device, dtype=dtype, enabled=dtype is not None),
            nullcontext() if gradients is None else torch.set_grad_enabled(gradients),
        ):
            yield

    def parameters(self, vector: Float[Tensor, " P"]) -> dict[str, Tensor]:
        """θ as a dict in the working floating type."""
        return self.layout.unflatten(vector.to(self.dtype))

    def call(self, parameters: Parameters, inputs: PyTree) -> Any:
        """What the module returns for a batch; see `pathkernel.pytrees.arguments_of`."""
        arguments = arguments_of(self.module.forward, inputs)
        constants = self.constants
        if self.state.modes is not False:  # layers in train mode write to their buffers
            constants = {name: value.clone() for name, value in constants.items()}
        values = {**constants, **parameters}
        # torch looks for shared weights in each call, which takes as long as a small network.
        values |= {name: values[own] for name, own in self.aliases.items()}
        if self.tap is None:
            return functional_call(self.module, values, arguments, tie_weights=False)
        tapped: list[Any] = []
        handle = self.module.get_submodule(self.tap).register_forward_hook(lambda _, __, out: tapped.append(out))
        try:
            functional_call(self.module, values, arguments, tie_weights=False)
        finally:
            handle.remove()
        return tapped[-1]

    def batch(self, parameters: Parameters, inputs: PyTree) -> Tensor:
        """Outputs (B, C) of a batch, flattened sample by sample."""
        return batch_outputs(self.call(parameters, inputs))

    def single(self, parameters: Parameters, sample: PyTree) -> Tensor:
        """Outputs (C,) of one sample given without its batch axis."""
        return self.batch(parameters, pytree.tree_map(lambda leaf: leaf.unsqueeze(0), sample)).squeeze(0)

    def outputs(self, vector: Float[Tensor, " P"], inputs: PyTree, block: int = 4096) -> Tensor:
        """Outputs (n, C) at θ without gradients, in blocks of samples."""
        parameters = self.parameters(vector)
        inputs = cast_floating(inputs, self.dtype)
        found = []
        with self.running(gradients=False):
            for piece in blocks(count(inputs), block):
                found.append(self.batch(parameters, take(inputs, piece)))
                deliver()
        return torch.cat(found)


OutputFunctional = Callable[[Tensor, Any], Tensor]
"""h(z, context) of one sample's outputs z (C,): a scalar, or a vector (K,)."""


def sample_gradients(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    inputs: PyTree,
    functional: OutputFunctional,
    context: PyTree,
    *,
    scalar: bool,
) -> dict[str, Tensor]:
    """Gradients of h(f(θ, x_i), context_i) in θ, sample by sample.

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

    Returns
    -------
    dict of str to Tensor
        By parameter name, (n, *shape) for a scalar h, (n, K, *shape) otherwise, in the function's floating type.
        Memory is n·K·P numbers, and the caller chooses n.
    """
    inputs = cast_floating(inputs, function.dtype)

    def h(parameters: Parameters, sample: PyTree, sample_context: PyTree) -> Tensor:
        return functional(function.single(parameters, sample), sample_context)

    differentiate = grad(h) if scalar else jacrev(h)
    parameters = function.parameters(vector)
    if function.recurrent:  # its cells add to the hidden state in place, which vmap allows only with θ batched as well
        n = count(inputs)
        parameters = {name: value.expand(n, *value.shape) for name, value in parameters.items()}
    with function.running():
        rows = vmap(differentiate, in_dims=(0 if function.recurrent else None, 0, 0))(parameters, inputs, context)
    return {name: gradient.detach() for name, gradient in rows.items()}


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
    inputs = cast_floating(inputs, function.dtype)
    start, displacement = start.to(function.dtype), displacement.to(function.dtype)

    def h(vector: Tensor, sample: PyTree, sample_context: PyTree) -> tuple[Tensor, Tensor]:
        value = functional(function.single(function.layout.unflatten(vector), sample), sample_context)
        return value, value

    def at(time: Tensor, sample: PyTree, sample_context: PyTree) -> tuple[Tensor, Tensor]:
        return grad(h, has_aux=True)(start + time * displacement, sample, sample_context)

    with function.running():
        rows, values = vmap(at)(times.to(function.dtype), inputs, context)
    return values.detach(), rows.detach()


def push_forward(function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor) -> Tensor:
    """Directional derivative of a function at a point, by forward differentiation."""
    with warnings.catch_warnings():
        # torch builds its own decompositions with torch.jit.script, which it deprecates, on the first call.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
        return jvp(function, (point,), (direction,))[1]


