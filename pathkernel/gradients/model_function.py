"""A module as a pure function of its parameters.

Everything downstream sees a network as ``z = f(θ, x)``, with θ a flat vector of P numbers (or the same numbers as
a dict by parameter name) and z the outputs of a batch, flattened to (B, C).

Arithmetic runs where the network's parameters are. θ, samples, contexts and buffers come from anywhere (a record on
disk, a loop that moves its batches itself) and are moved there where they enter a `ModelFunction`; random numbers are
drawn on the CPU and moved, so that they are the same everywhere. What was recorded in memory stays where it was, ids
are on the CPU, and results are handed out as arrays.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, Parameters, PyTree
from pathkernel.gradients.arguments import arguments_of, call_of, keyed, places_of, shared_arguments
from pathkernel.gradients.batch_axes import BatchAxes, BatchAxis
from pathkernel.gradients.checkpoints import PASS_THROUGH
from pathkernel.gradients.forward_state import (
    EVALUATION,
    PLAIN_ATTENTION,
    PLAIN_CALLS,
    PLAIN_ENCODERS,
    PLAIN_RECURRENCE,
    RANDOM,
    ForwardState,
    check_gradients_are_possible,
    device_of,
    generators_at,
    module_mode,
)
from pathkernel.gradients.parameters import ParameterLayout, constants_of
from pathkernel.gradients.pytrees import blocks, cast_floating, count, moved, take
from pathkernel.gradients.returned import Returns, batch_outputs, map_outputs, selected
from pathkernel.gradients.structural_copy import StructuralCopy
from pathkernel.runtime.interrupts import defer_interrupts, deliver_interrupt
from pathkernel.runtime.precision import EXACT_PRODUCTS


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
    submodule
        Name of the submodule whose output stands for f; the module's own output by default.
    returns
        What of the module's own output is f; see `pathkernel.gradients.returned`.
    watch
        Names of the submodules that are called in place of the module, each with what the one before returned.
    batch_axis
        Where samples lie in what the module takes and returns; see `pathkernel.gradients.batch_axes`.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: ParameterLayout,
        constants: Parameters | None = None,
        dtype: torch.dtype = torch.float32,
        state: ForwardState = EVALUATION,
        submodule: str | None = None,
        returns: Returns = None,
        watch: tuple[str, ...] = (),
        batch_axis: BatchAxis = 0,
    ) -> None:
        check_gradients_are_possible()
        self.layout, self.dtype, self.returns, self.watch = layout, dtype, returns, watch
        self.state, self.submodule = state, submodule
        self.structure = StructuralCopy(module)
        self.device = device_of(module)
        self.axes = BatchAxes.of(batch_axis, self.called[0].forward)
        self.constants = self.cast({**constants_of(module, layout), **(constants or {})})
        self.recurrent = any(isinstance(child, (nn.RNNBase, nn.RNNCellBase)) for child in self.module.modules())
        self.compiled = any(hasattr(child, "_orig_mod") for child in self.module.modules())
        self.row_routes: dict[Any, str] = {}
        self.sample_wise: set[Any] = set()
        self.proofs: dict[Any, Any] = {}
        self.lock, self._kept = threading.RLock(), False

    @property
    def module(self) -> nn.Module:
        """The copy of the module that passes run on."""
        return self.structure.module

    @property
    def called(self) -> list[nn.Module]:
        """Modules of the copy that are called, one after the other."""
        return [self.module.get_submodule(name) for name in self.watch or ("",)]

    def with_(
        self,
        *,
        constants: Parameters | None = None,
        state: ForwardState | None = None,
        submodule: str | None = None,
    ) -> ModelFunction:
        """Copy with other constants, another way of running, or the output of a submodule."""
        other = copy.copy(self)  # what was found out about the module holds for all of them
        if constants:
            other.constants = {**self.constants, **self.cast(dict(constants))}
        other.state = self.state if state is None else state
        other.submodule = self.submodule if submodule is None else submodule
        return other

    def whole(self) -> ModelFunction:
        """Function of all that the network returns."""
        other = copy.copy(self)
        other.returns = None
        return other

    def restricted(self, layout: ParameterLayout, theta: Parameters) -> ModelFunction:
        """Function of some of the parameters; the others are constants, with their values in ``theta``."""
        other = copy.copy(self)
        rest = {name: value for name, value in theta.items() if name not in layout.slices}
        other.layout, other.constants = layout, {**self.constants, **self.cast(rest)}
        return other

    def converted(self, dtype: torch.dtype) -> ModelFunction:
        """Function in another floating type."""
        other = copy.copy(self)
        other.dtype, other.constants, other.row_routes = dtype, cast_floating(dict(self.constants), dtype), {}
        other.proofs = {}
        return other

    @contextmanager
    def evaluating(
        self, gradients: bool | None = None, *, as_trained: bool = False, fused_attention: bool = False
    ) -> Iterator[None]:
        """Evaluate inside, once where the pass draws random numbers, with kernels that can be differentiated.

        With or without autograd's graph; None leaves it as it is. ``as_trained`` leaves the choice of kernels to torch,
        as the loop did; ``fused_attention`` does so for attention alone, where a pass is differentiated backward, once,
        and draws no random numbers. Ctrl-C waits until the end, or for the next pass: settings of torch, and its random
        generators, have to be put back. One thread at a time.
        """
        check_gradients_are_possible()
        device, dtype = self.state.autocast or (self.device.type, None)
        with (
            defer_interrupts(divisible=True),
            self.lock,
            RANDOM if self.state.generators else nullcontext(),
            PASS_THROUGH,
            PLAIN_CALLS if self.compiled and not as_trained else nullcontext(),
            module_mode(self.module, self.state.modes),
            generators_at(self.state.generators),
            nullcontext() if as_trained or (fused_attention and not self.state.generators) else PLAIN_ATTENTION,
            nullcontext() if as_trained else PLAIN_ENCODERS,
            EXACT_PRODUCTS.lifted() if as_trained else EXACT_PRODUCTS,
            PLAIN_RECURRENCE if self.recurrent and not as_trained else nullcontext(),
            torch.autocast(device, dtype=dtype, enabled=dtype is not None),
            nullcontext() if gradients is None else torch.set_grad_enabled(gradients),
        ):
            yield

    @contextmanager
    def without_graph(self) -> Iterator[None]:
        """Compute inside with what a pass left, without adding to autograd's graph; Ctrl-C as in `evaluating`."""
        with defer_interrupts(divisible=True), torch.no_grad():
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
        """The network's outputs for a batch, samples first; see `pathkernel.gradients.arguments.call_of`."""
        deliver_interrupt()  # whatever is a loop of passes need not think of it
        structure, evaluation = self.structure, self.state.modes is False
        inputs = moved(inputs, self.device)
        if structure.writes_inputs is not False:  # they are the user's
            inputs = pytree.tree_map(lambda leaf: leaf.clone(), inputs)
        # Layers in train mode write to their buffers, and some networks do so in evaluation.
        written = structure.written if evaluation and structure.written is not None else structure.buffers
        copies = {name: self.constants[name].clone() for name in written}
        found: list[Any] = []
        with self.lock:
            handle = None
            if self.submodule is not None:
                inner = self.module.get_submodule(self.submodule)
                handle = inner.register_forward_hook(lambda _, __, out: found.append(out))
            structure.fill({**self.constants, **copies, **parameters})
            try:
                returned, n, steps = self._run(inputs)
                if structure.writes_inputs is None:
                    structure.writes_inputs = any(leaf._version > 0 for leaf in pytree.tree_leaves(inputs))
                if evaluation and structure.written is None:
                    structure.written = tuple(name for name, value in copies.items() if value._version > 0)
            finally:
                if handle is not None:
                    handle.remove()
                if not self._kept:
                    structure.clear()
        outputs = selected(returned, self.returns) if self.submodule is None else found[-1]
        first = partial(self.axes.output_first, n=n, steps=steps)
        return map_outputs(first, outputs) if self.axes.outputs else outputs

    def _run(self, inputs: PyTree) -> tuple[Any, int, Collection[int]]:
        """The network's own return value, and `BatchAxes.steps_of` of what it was given."""
        first, *others = self.called
        n, steps = 0, frozenset[int]()
        shared = shared_arguments(self.state.arguments, self.dtype, self.device) if self.state.arguments else {}
        if shared or not self.axes.are_first:
            arguments, named = call_of(first.forward, inputs, shared)
        else:
            arguments, named = arguments_of(first.forward, inputs)
        if not self.axes.are_first:
            places = keyed(places_of(first.forward), arguments, {})
            moved_in = [v if key in shared else self.axes.inward(key, v) for key, v in places.items()]
            arguments = tuple(moved_in)
            named = {key: v if key in shared else self.axes.inward(key, v) for key, v in named.items()}
            n, steps = self.axes.steps_of(dict(zip([*places, *named], [*arguments, *named.values()], strict=True)))
        returned = first(*arguments, **named)
        for part in others:
            returned = part(returned)
        return returned, n, steps

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
        with self.evaluating(gradients=False):
            for piece in blocks(count(inputs), block):
                found.append(self.batch(parameters, take(inputs, piece)))
        return torch.cat(found)
