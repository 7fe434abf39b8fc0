"""Tests that a network's outputs have a kernel: differentiable, and a function of one sample at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, PyTree
from pathkernel.errors import UnsupportedModelError, check_instance
from pathkernel.gradients.forward_derivatives import REFUSALS
from pathkernel.gradients.forward_state import generator_states, generators_untouched
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.pytrees import count, spread, take
from pathkernel.gradients.returned import batch_outputs
from pathkernel.runtime.interrupts import result_or_error

SAMPLES = 3
"""Samples that are passed through the network together, one by one, and together again."""

MANY = 1024
"""Most samples that are passed through it together, and in two halves: some networks serve only the first so many."""

NUMBERS = 2**18
"""Most numbers in the inputs of these."""


def check_is_module(model: nn.Module) -> None:
    """Refuse what is no network: a file of weights, a dictionary of them, a class, a function.

    Raises
    ------
    InputError
        With what it is.
    """
    check_instance(
        "model",
        model,
        nn.Module,
        "A network is an instance of `torch.nn.Module` that holds its weights",
        "Make the network, fill it by `model.load_state_dict(torch.load(path))` where its weights are in a file, and "
        "pass `model`",
    )


def check_module(module: nn.Module) -> None:
    """Refuse what has no tangent kernel whatever its inputs are.

    Raises
    ------
    InputError
        For what is no network.
    UnsupportedModelError
        Naming the parameter or the layer.
    """
    check_is_module(module)
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if isinstance(value, (UninitializedParameter, UninitializedBuffer)):
            raise UnsupportedModelError(
                f"Parameter `{name}` has no shape yet",
                "All parameters are laid out before anything is computed",
                "Run one batch through the lazy modules first",
            )
        if value.is_meta:
            raise UnsupportedModelError(
                f"Parameter `{name}` is on the device `meta`, and has no values",
                "The network has its numbers",
                'Write `model.to_empty(device="cpu")` and load its weights first',
            )
    for name, parameter in module.named_parameters():
        if parameter.is_complex():
            raise UnsupportedModelError(
                f"Parameter `{name}` is complex",
                "Tangent kernels are defined here for real parameters",
                "Store real and imaginary part as two real parameters",
            )
    for name, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"The module `{name or type(child).__name__}` is scripted",
                "Passes run on copies of a module's structure, and a scripted one has none",
                "Pass the module that was given to `torch.jit.script`",
            )
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) and (child.max_norm or child.scale_grad_by_freq):
            what = "max_norm" if child.max_norm else "scale_grad_by_freq"
            raise UnsupportedModelError(
                f"The embedding `{name}` was made with `{what}={getattr(child, what)}`",
                "A forward pass does not change weights, and a sample's gradient does not depend on the others': "
                "`max_norm` does the first, `scale_grad_by_freq` the second",
                f"Make it without `{what}`",
            )


def check_sample_wise(function: ModelFunction, theta: Float[Tensor, " P"], inputs: PyTree) -> None:
    """Refuse a network whose outputs are no function of one sample.

    Three samples are passed through it together, one by one, and together again; all must agree to rounding. Once for
    each shape of samples. Random generators are left as they are.

    Parameters
    ----------
    function
        The network in evaluation mode.
    theta
        θ, near which it is evaluated.
    inputs
        Samples, of which three are used.

    Raises
    ------
    UnsupportedModelError
        For a network that draws random numbers, keeps a state, lets samples depend on each other (batch statistics),
        or loses the axis of a single sample; or that reads parameters which it keeps where no copy can replace them.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    key = (function.submodule, *((leaf.shape[1:], leaf.dtype) for leaf in leaves))
    if key in function.sample_wise or count(inputs) == 0:
        return
    # At a generic point near θ: a head that begins with zeros hides everything.
    noise = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(theta)
    theta = theta + 1e-2 * theta.abs().mean().clamp_min(1e-2) * noise
    _check(function, theta, function.cast(take(inputs, spread(count(inputs), SAMPLES))))
    each = sum(leaf[0].numel() for leaf in leaves)
    many = take(inputs, spread(count(inputs), min(MANY, NUMBERS // max(1, each))))
    _check_halves(function, theta, function.cast(many))
    function.sample_wise.add(key)


def _check(function: ModelFunction, theta: Tensor, few: PyTree) -> None:
    parameters, n = function.parameters(theta), count(few)
    device = function.device
    with generators_untouched(), function.evaluating(gradients=False):
        before = generator_states(device)
        live = function.structure.read_live(lambda: function.batch(parameters, few))
        drew = any(not torch.equal(state, before[name]) for name, state in generator_states(device).items())
        together = function.batch(parameters, few)
        alone = [result_or_error(lambda i=i: _alone(function, theta, few, i), REFUSALS) for i in range(n)]  # type: ignore[misc]
        again = function.batch(parameters, few)
    if live:
        raise UnsupportedModelError(
            f"A forward pass reads {', '.join(f'`{name}`' for name in live[:3])} in a way that no copy of the module "
            "has",
            "Passes run with other weights on a copy of the module, which must not reach the module itself",
            "Let `forward` reach its parameters through `self`, not through a tuple, a global name or another object",
        )
    if drew or not _agree(together, again, function.dtype):
        raise UnsupportedModelError(
            "The network draws random numbers in evaluation, so its output is no function of the sample"
            if drew
            else "The network's outputs for the same samples differ from one pass to the next in evaluation",
            "A kernel is made of a function of one sample: the same outputs for the same sample, every time",
            "Draw random numbers in training mode only (`if self.training:`), and return the mean in evaluation"
            if drew
            else "Let a state that it carries from one pass to the next, as the hidden one of a recurrent network, be "
            "an input and an output, `logits, h = model(x, h)`, announced with `recorder.announce(ids, inputs=(x, h))`;"
            " draw random numbers in training mode only (`if self.training:`)",
        )
    for i, own in enumerate(alone):
        if isinstance(own, Exception):
            raise UnsupportedModelError(
                f"In evaluation the network runs {n} samples together, but not one alone ({type(own).__name__}: "
                f"{str(own)[:200]})",
                "A kernel is made of a function of one sample, which is given as a batch of one",
                "Let `forward` take batches of any size; batch statistics need `track_running_stats=True`",
            ) from own
        if n > 1 and own.shape[1] * n == together.shape[1]:  # numbers for each pair of samples, as similarities
            raise ComparedSamples(
                f"For one sample the network returned {own.shape[1]} numbers, and {together.shape[1]} for each of {n}",
                "A kernel is made of a function of one sample; similarities are one of the batch",
                "Return the embeddings and compare them inside the loss; or ask for a part of the network that takes "
                'samples one by one, `machine.explain(X, outputs="encoder")` with the name of a submodule',
            )
        if own.shape[1:] != together.shape[1:]:
            raise UnsupportedModelError(
                f"For one sample the network returned {own.shape[1]} numbers, and {together.shape[1]} for each of {n}",
                "Every sample has the same outputs, along the first axis, whether alone or not",
                "Leave the axis of the samples out of `squeeze()`: `squeeze(1)`, or `flatten(1)`",
            )
        if not _agree(together[i : i + 1], own, function.dtype, together):
            raise _dependent(_difference(together[i : i + 1], own, together))


def _check_halves(function: ModelFunction, theta: Tensor, inputs: PyTree) -> None:
    n = count(inputs)
    if n <= SAMPLES:
        return
    parameters, middle = function.parameters(theta), n // 2
    with generators_untouched(), function.evaluating(gradients=False):
        whole = function.batch(parameters, inputs)
        halves = [function.batch(parameters, take(inputs, piece)) for piece in (slice(0, middle), slice(middle, n))]
    apart = torch.cat(halves)
    if not _agree(apart, whole, function.dtype):
        raise _dependent(_difference(apart, whole, whole))


class ComparedSamples(UnsupportedModelError):
    """Refusal of a network that compares the samples of a batch with each other, where one sample is asked for."""


def _dependent(difference: float) -> UnsupportedModelError:
    return UnsupportedModelError(
        "In evaluation the network's output for a sample depends on the samples that it is passed together with (by "
        f"{difference:.1e} of the largest output)",
        "A kernel is made of a function of one sample; batch statistics, a capacity, and outputs with the samples on "
        "another axis than the first, make it one of the batch",
        "Let the network use running statistics in evaluation (`track_running_stats=True`), and return the samples "
        "along the first axis",
    )


def _alone(function: ModelFunction, theta: Tensor, few: PyTree, i: int) -> Tensor:
    return batch_outputs(function.call(function.parameters(theta), take(few, slice(i, i + 1))), 1)


def _difference(one: Tensor, other: Tensor, scale: Tensor) -> float:
    largest = scale.abs().max().item() if scale.numel() else 0.0
    difference = (one - other).abs().max().item() if one.numel() else 0.0
    return difference / largest if largest > 0 else difference


def _agree(one: Tensor, other: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> bool:
    """Comparison to half the digits of the coarser type, its own or its parameters'; infinity is for others to see."""
    rounding = max(torch.finfo(each).eps for each in (dtype, one.dtype))
    difference: Any = _difference(one.double(), other.double(), (one if scale is None else scale).double())
    return not math.isfinite(difference) or difference <= math.sqrt(rounding)
