"""A module as a pure function of its parameters, and its per-sample gradients.

Everything downstream sees a network as ``z = f(θ, x)``, with θ a flat vector of P numbers (or the same numbers as
a dict by parameter name) and z the outputs of a batch, flattened to (B, C).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, Parameters, PyTree
from pathkernel.errors import InputError


@dataclass(frozen=True)
class ParameterLayout:
    """Where each parameter lies in the flat vector θ.

    Parameters
    ----------
    names
        Parameter names as in ``module.named_parameters()``; a tied parameter appears once.
    shapes
        Their shapes, in the same order.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, parameters: Parameters) -> ParameterLayout:
        """Lay out the given parameters in their order."""
        return cls(tuple(parameters), tuple(p.shape for p in parameters.values()))

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The range of each parameter in θ."""
        ranges, offset = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            ranges[name] = slice(offset, offset + shape.numel())
            offset += shape.numel()
        return ranges

    @cached_property
    def size(self) -> int:
        """P, the length of θ."""
        return sum(shape.numel() for shape in self.shapes)

    def flatten(self, tensors: Parameters, dtype: torch.dtype | None = None) -> Tensor:
        """Copy tensors with shapes (..., *shape) into one (..., P); any leading axes are kept."""
        rows = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            tensor = tensors[name]
            leading = tensor.shape[: tensor.dim() - len(shape)]
            rows.append(tensor.reshape(*leading, -1).to(dtype or tensor.dtype))
        return torch.cat(rows, dim=-1)

    def unflatten(self, vector: Float[Tensor, "*leading P"]) -> dict[str, Tensor]:
        """Views of (..., P) with shapes (..., *shape), by name."""
        leading = vector.shape[:-1]
        return {
            name: vector[..., where].reshape(*leading, *shape)
            for (name, where), shape in zip(self.slices.items(), self.shapes, strict=True)
        }


def as_tensors(tree: PyTree, dtype: torch.dtype) -> PyTree:
    """Tensors for arrays: floating numpy arrays take the model's type, tensors are left as they are."""

    def convert(leaf: Any) -> Tensor:
        if isinstance(leaf, Tensor):
            return leaf.detach()
        array = np.asarray(leaf)
        if array.dtype.kind == "f":
            return torch.as_tensor(array, dtype=dtype)
        if array.dtype.kind in "iub":
            return torch.as_tensor(array.astype(np.int64) if array.dtype.kind != "b" else array)
        raise InputError(
            f"Samples of type {array.dtype} were given",
            "Samples are numbers: floating point, integers or booleans",
            "Encode text as token ids and categories as integers first",
        )

    def is_array_like(node: Any) -> bool:
        # A list of numbers (or of rows of numbers) is one array; a list of tensors is a tree.
        return isinstance(node, list) and not any(isinstance(v, (Tensor, np.ndarray)) for v in node)

    return pytree.tree_map(convert, tree, is_leaf=is_array_like)


def take(tree: PyTree, index: Any) -> PyTree:
    """Index the first axis of every leaf."""
    return pytree.tree_map(lambda leaf: leaf[index], tree)


def count(tree: PyTree) -> int:
    """The number of samples along the first axis."""
    return len(pytree.tree_leaves(tree)[0])


def cast_floating(tree: PyTree, dtype: torch.dtype) -> PyTree:
    """Convert the floating leaves; integers (token ids, masks) stay as they are."""
    return pytree.tree_map(lambda leaf: leaf.to(dtype) if torch.is_floating_point(leaf) else leaf, tree)


def blocks(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(n)``."""
    for start in range(0, n, max(1, size)):
        yield slice(start, min(n, start + max(1, size)))


@contextmanager
def module_mode(module: nn.Module, training: Mapping[str, bool] | bool) -> Iterator[None]:
    """Set train or eval mode submodule by submodule and put it back afterwards."""
    before = {name: child.training for name, child in module.named_modules()}
    try:
        for name, child in module.named_modules():
            child.training = training if isinstance(training, bool) else training[name]
        yield
    finally:
        for name, child in module.named_modules():
            child.training = before[name]


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

    Notes
    -----
    The module runs in eval mode: a kernel at fixed θ must be a function of its two samples alone.
    """

    def __init__(
        self, module: nn.Module, layout: ParameterLayout, constants: Parameters, dtype: torch.dtype = torch.float32
    ) -> None:
        self.module, self.layout, self.dtype = module, layout, dtype
        self.constants = cast_floating(dict(constants), dtype)
        self.recurrent = any(isinstance(child, nn.RNNBase) for child in module.modules())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Evaluate inside: eval mode, and the kernels that every kind of differentiation supports."""
        with module_mode(self.module, False), sdpa_kernel(SDPBackend.MATH), _differentiable_kernels(self.recurrent):
            yield

    def parameters(self, vector: Float[Tensor, " P"]) -> dict[str, Tensor]:
        """θ as a dict in the working floating type."""
        return self.layout.unflatten(vector.to(self.dtype))

    def call(self, parameters: Parameters, inputs: PyTree) -> Tensor:
        """What the module returns for a batch; a tuple of inputs is spread over its arguments."""
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        return functional_call(self.module, {**self.constants, **parameters}, arguments)

    def batch(self, parameters: Parameters, inputs: PyTree) -> Tensor:
        """Outputs (B, C) of a batch, flattened sample by sample."""
        outputs = self.call(parameters, inputs)
        return outputs.reshape(outputs.shape[0], -1)

    def single(self, parameters: Parameters, sample: PyTree) -> Tensor:
        """Outputs (C,) of one sample given without its batch axis."""
        return self.batch(parameters, pytree.tree_map(lambda leaf: leaf.unsqueeze(0), sample)).squeeze(0)

    def outputs(self, vector: Float[Tensor, " P"], inputs: PyTree, block: int = 4096) -> Tensor:
        """Outputs (n, C) at θ without gradients, in blocks of samples."""
        parameters = self.parameters(vector)
        inputs = cast_floating(inputs, self.dtype)
        with torch.no_grad(), self.running():
            return torch.cat([self.batch(parameters, take(inputs, b)) for b in blocks(count(inputs), block)])


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


def memory_bytes(memory: int | str) -> int:
    """Bytes of a budget given as a number or as text such as ``"512MB"`` or ``"2 GiB"``."""
    if isinstance(memory, int) and memory > 0:
        return memory
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    text = str(memory).strip().lower()
    for unit, size in units.items():
        if text.endswith(unit):
            try:
                if (budget := int(float(text[: -len(unit)]) * size)) > 0:
                    return budget
            except ValueError:
                pass
            break
    raise InputError(
        f"`memory={memory!r}` was given",
        "It must be a positive number of bytes, or text with one of the units kB, MB, GB, KiB, MiB, GiB",
        'Write for example `memory="512MB"`',
    )


def named_trainable(module: nn.Module, also: Sequence[nn.Parameter] = ()) -> dict[str, nn.Parameter]:
    """Parameters that can move: those that require gradients, and those named in ``also``, tied ones once."""
    wanted = {id(p) for p in also}
    return {name: p for name, p in module.named_parameters() if p.requires_grad or id(p) in wanted}


def constants_of(module: nn.Module, layout: ParameterLayout) -> dict[str, Tensor]:
    """Copies of all parameters outside the layout and of all buffers."""
    rest = {n: p.detach().clone() for n, p in module.named_parameters() if n not in layout.slices}
    return {**rest, **{n: b.detach().clone() for n, b in module.named_buffers()}}
