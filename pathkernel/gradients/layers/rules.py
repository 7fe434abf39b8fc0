r"""Rules for the gradients of layers: one function for each torch function that takes parameters.

A rule has the signature of its function and says, for each argument that may be a parameter, how the gradient of every
sample follows from the back-propagated signal δ (n, K, \*output): ``{"weight": signal -> Factor}``. The bias of a layer
whose gradient is the sum of the weight's own signals is given as `SumOfSignals`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pathkernel.gradients.layers.factors import Dense, Factor, Lookup, Outer

Gradient = Callable[[Tensor], Factor]
"""Function of the signals of all samples, (n, K, *output): the gradients of one argument."""

Rule = Callable[..., Mapping[str, Gradient]]


@dataclass(frozen=True)
class SumOfSignals:
    """Gradient of a bias that is added at every position: the sum of its layer's signals.

    Attributes
    ----------
    channels_second
        Whether signals are (n, K, channels, *space) rather than (n, K, *positions, channels).
    """

    channels_second: bool = False

    def __call__(self, signal: Tensor) -> Dense:
        """Sum over positions."""
        n, k = signal.shape[:2]
        if self.channels_second:
            return Dense(signal.reshape(n, k, signal.shape[2], -1).sum(dim=3))
        return Dense(signal.reshape(n, k, -1, signal.shape[-1]).sum(dim=2))


RULES: dict[Any, Rule] = {}
"""torch function (or module class) → rule."""


class NoRule(Exception):
    """A known function was called in a way that its rule does not cover."""


def layer_rule(*functions: Any) -> Callable[[Rule], Rule]:
    r"""Register the rule of a function, or of a module class, for the layer-wise engine.

    Parameters
    ----------
    functions
        torch functions as they are called (``torch.nn.functional.linear``), or module classes.

    Notes
    -----
    The rule of a function is called as ``rule(samples, *args, **kwargs)`` with the function's own arguments; the rule
    of a module class as ``rule(samples, module, *inputs)``, its keys being the names of the module's parameters.
    ``samples`` brings a tensor's sample axis to the front: call it, inside the returned functions, on every tensor
    that holds all samples. Every rule is compared with autograd on each network before it is used.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> from pathkernel.gradients.layers.factors import Dense
    >>> class Scale(torch.nn.Module):
    ...     def __init__(self, width):
    ...         super().__init__()
    ...         self.gain = torch.nn.Parameter(torch.ones(width))
    ...     def forward(self, x):
    ...         return x * self.gain
    >>> @pk.layer_rule(Scale)
    ... def scale(samples, module, x):
    ...     return {"gain": lambda signal: Dense(signal * samples(x).unsqueeze(1))}
    """

    def register(rule: Rule) -> Rule:
        for function in functions:
            RULES[function] = rule
        return rule

    return register


Samples = Callable[[Tensor], Tensor]


@layer_rule(F.linear)
def linear(samples: Samples, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> dict[str, Gradient]:
    """y = x Wᵀ + b at every position."""

    def gradient(signal: Tensor) -> Outer:
        x = samples(input)
        n, k = signal.shape[:2]
        return Outer(signal.reshape(n, k, -1, weight.shape[0]), x.reshape(n, -1, weight.shape[1]))

    return {"weight": gradient, "bias": SumOfSignals()}


@layer_rule(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def matmul(samples: Samples, input: Tensor, other: Tensor) -> dict[str, Gradient]:
    """y = x W, or y = W x with positions last."""

    def left(signal: Tensor) -> Outer:
        n, k = signal.shape[:2]
        delta, x = signal.transpose(-1, -2), samples(other).transpose(-1, -2)
        return Outer(delta.reshape(n, k, -1, input.shape[0]), x.reshape(n, -1, input.shape[1]))

    if other.dim() == 2:
        return {"other": _right(samples, input, other)}
    if input.dim() != 2:
        raise NoRule
    return {"input": left}


def _right(samples: Samples, input: Tensor, other: Tensor) -> Gradient:
    """Gradient of W in y = x W at every position."""

    def gradient(signal: Tensor) -> Outer:
        n, k = signal.shape[:2]
        x = samples(input)
        return Outer(signal.reshape(n, k, -1, other.shape[1]), x.reshape(n, -1, other.shape[0]), transposed=True)

    return gradient


@layer_rule(torch.mm, Tensor.mm)
def mm(samples: Samples, input: Tensor, mat2: Tensor) -> dict[str, Gradient]:
    """y = x W."""
    return {"mat2": _right(samples, input, mat2)}


@layer_rule(torch.addmm, Tensor.addmm)
def addmm(
    samples: Samples, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> dict[str, Gradient]:
    """y = b + x W, the linear layer of GPT-2's code."""
    if input.dim() != 1 or beta != 1 or alpha != 1:
        raise NoRule
    return {"input": SumOfSignals(), "mat2": _right(samples, mat1, mat2)}


@layer_rule(F.embedding)
def embedding(
    samples: Samples,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> dict[str, Gradient]:
    """y_t = W[index_t]; the row of ``padding_idx`` gets no gradient."""
    if max_norm is not None or scale_grad_by_freq:
        raise NoRule

    def gradient(signal: Tensor) -> Lookup:
        n, k = signal.shape[:2]
        indices = samples(input).reshape(n, -1)
        signal = signal.reshape(n, k, -1, weight.shape[1])
        if padding_idx is not None:
            signal = signal * (indices != padding_idx % len(weight))[:, None, :, None]
        return Lookup(signal, indices, weight.shape[0])

    return {"weight": gradient}


@layer_rule(F.embedding_bag)
def embedding_bag(
    samples: Samples,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> dict[str, Gradient]:
    """y = Σ_t c_t W[index_t], with given c or one over the number of indices; ``padding_idx`` is none of them."""
    if input.dim() != 2 or max_norm is not None or scale_grad_by_freq or mode not in ("sum", "mean"):
        raise NoRule

    def gradient(signal: Tensor) -> Lookup:
        indices = samples(input)
        read = torch.ones_like(indices, dtype=signal.dtype)
        if padding_idx is not None:
            read = (indices != padding_idx % len(weight)).to(signal.dtype)
        if mode == "mean":
            read = read / read.sum(dim=1, keepdim=True).clamp_min(1)
        if per_sample_weights is not None:
            read = read * samples(per_sample_weights)
        return Lookup(signal.unsqueeze(2) * read[:, None, :, None], indices, weight.shape[0])

    return {"weight": gradient}


def _affine(normalized: Callable[[], Tensor], shape: torch.Size, channels_second: bool) -> dict[str, Gradient]:
    """Scale and shift after a normalisation: y = x̂ ∘ w + b."""

    def reduce(values: Tensor) -> Dense:
        n, k = values.shape[:2]
        if channels_second:  # (n, K, channels, *space)
            return Dense(values.flatten(3).sum(dim=3) if values.dim() > 3 else values)
        return Dense(values.reshape(n, k, -1, shape.numel()).sum(dim=2))

    def weight(signal: Tensor) -> Dense:
        x = normalized().unsqueeze(1)
        if channels_second and signal.dim() > 3:  # products and sums in one pass
            return Dense(torch.linalg.vecdot(signal.flatten(3), x.flatten(3)))
        return reduce(signal * x)

    return {"weight": weight, "bias": reduce}


@layer_rule(F.layer_norm)
def layer_norm(
    samples: Samples, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> dict[str, Gradient]:
    """Over the last axes."""
    return _affine(lambda: samples(F.layer_norm(input, normalized_shape, None, None, eps)), _shape(weight, bias), False)


@layer_rule(F.rms_norm)
def rms_norm(
    samples: Samples, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> dict[str, Gradient]:
    """Over the last axes, without centring."""
    return _affine(lambda: samples(F.rms_norm(input, normalized_shape, None, eps)), _shape(weight), False)


@layer_rule(F.group_norm)
def group_norm(
    samples: Samples, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> dict[str, Gradient]:
    """Over groups of channels."""
    return _affine(lambda: F.group_norm(input, num_groups, None, None, eps), _shape(weight, bias), True)


@layer_rule(F.batch_norm)
def batch_norm(
    samples: Samples,
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[str, Gradient]:
    """Normalisation by running statistics; in train mode the samples of a batch are coupled."""
    if training or running_mean is None:
        raise NoRule
    normalized = lambda: F.batch_norm(input, running_mean, running_var, None, None, False, 0.0, eps)  # noqa: E731
    return _affine(normalized, _shape(weight, bias), True)


@layer_rule(F.prelu)
def prelu(samples: Samples, input: Tensor, weight: Tensor) -> dict[str, Gradient]:
    """y = max(x, 0) + w ∘ min(x, 0), w one number or one for each channel."""

    def gradient(signal: Tensor) -> Dense:
        n, k = signal.shape[:2]
        values = signal * samples(input).clamp_max(0).unsqueeze(1)
        if weight.numel() == 1:
            return Dense(values.reshape(n, k, -1).sum(dim=2, keepdim=True))
        return Dense(values.reshape(n, k, values.shape[2], -1).sum(dim=3))

    return {"weight": gradient}


@layer_rule(F.conv1d, F.conv2d, F.conv3d)
def convolution(
    samples: Samples,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> dict[str, Gradient]:
    """A linear layer on the patches of the input, at every position of the output."""
    space = weight.dim() - 2
    stride, dilation = _each(stride, space), _each(dilation, space)

    def gradient(signal: Tensor) -> Factor:
        patches = _patches(_padded(input, padding, weight, dilation), weight.shape[2:], stride, dilation)
        delta = signal.flatten(3).transpose(2, 3)
        return _grouped(delta, patches, groups)

    return {"weight": gradient, "bias": SumOfSignals(channels_second=True)}


@layer_rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def transposed_convolution(
    samples: Samples,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> dict[str, Gradient]:
    """A convolution read backwards: input and signal change places."""
    space = weight.dim() - 2
    stride, dilation = _each(stride, space), _each(dilation, space)
    if groups != 1:
        raise NoRule

    def gradient(signal: Tensor) -> Outer:
        n, k = signal.shape[:2]
        padded = _padded(signal.flatten(0, 1), padding, weight, dilation)
        patches = _patches(padded, weight.shape[2:], stride, dilation, input.shape[2:])
        return Outer(patches.reshape(n, k, *patches.shape[1:]), input.flatten(2).transpose(1, 2), transposed=True)

    return {"weight": gradient, "bias": SumOfSignals(channels_second=True)}


def _grouped(delta: Tensor, patches: Tensor, groups: int) -> Factor:
    """Gradients of a weight (out, in / groups · taps), from δ (n, K, T, out) and patches (n, T, in · taps)."""
    if groups == 1:
        return Outer(delta, patches)
    n, k, t, out = delta.shape
    delta = delta.reshape(n, k, t, groups, out // groups)
    return Dense(torch.einsum("nktgo,ntgi->nkgoi", delta, patches.reshape(n, t, groups, -1)).reshape(n, k, -1))


def _each(value: Any, space: int) -> tuple[int, ...]:
    return (value,) * space if isinstance(value, int) else tuple(value) * (space if len(value) == 1 else 1)


def _padded(input: Tensor, padding: Any, weight: Tensor, dilation: tuple[int, ...]) -> Tensor:
    space = weight.dim() - 2
    if padding == "valid":
        return input
    if padding == "same":
        totals = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in _each(padding, space)]
    flat = [p for side in reversed(sides) for p in side]
    return F.pad(input, flat) if any(flat) else input


def _patches(
    input: Tensor,
    kernel: torch.Size,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    positions: torch.Size | None = None,
) -> Tensor:
    """Patches that the kernel sees at each of its positions, (n, T, channels · taps)."""
    n, channels = input.shape[:2]
    size, step = input.shape[2:], input.stride()
    if positions is None:
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        positions = torch.Size((s - span - 1) // st + 1 for s, span, st in zip(size, spans, stride, strict=True))
    windows = input.as_strided(
        (n, channels, *kernel, *positions),
        (
            step[0],
            step[1],
            *(s * d for s, d in zip(step[2:], dilation, strict=True)),
            *(s * st for s, st in zip(step[2:], stride, strict=True)),
        ),
    )
    # Positions last: whole lines of the input are copied, ten times as fast as taps one by one.
    return windows.reshape(n, channels * kernel.numel(), positions.numel()).transpose(1, 2)


def _shape(*arguments: Tensor | None) -> torch.Size:
    return next(argument.shape for argument in arguments if argument is not None)
