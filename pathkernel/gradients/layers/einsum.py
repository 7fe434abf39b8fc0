"""The rule of `torch.einsum` with one weight: an outer product wherever the weight's labels allow it."""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_uppercase

import torch
from torch import Tensor

from pathkernel.gradients.layers.batch_axis import SamplesFirst
from pathkernel.gradients.layers.factors import Dense, Factor, Outer
from pathkernel.gradients.layers.rules import Gradient, NoRule, layer_rule

_SAMPLE, _COMPONENT = "α", "β"


@layer_rule(torch.einsum)
def einsum(samples: Callable[[Tensor], Tensor], equation: str, first: Tensor, second: Tensor) -> dict[str, Gradient]:
    r"""y_out = Σ first_a second_b.

    The gradient of a weight with labels w is :math:`\sum \delta_{out}\, x_{other}` over all labels that are not the
    weight's: with labels p of it in the output alone, q in the other operand alone, and t in both of these and not in
    the weight, :math:`\sum_t \delta_{tp}\, x_{tq}`.
    """
    if not isinstance(samples, SamplesFirst):
        raise NoRule
    a, b, out = _labels(equation, first, second)
    return {"first": _gradient(samples, a, b, second, out), "second": _gradient(samples, b, a, first, out)}


def _labels(equation: str, first: Tensor, second: Tensor) -> tuple[str, str, str]:
    """Labels of both operands and of the result, an ellipsis written out."""
    if not isinstance(equation, str) or not isinstance(first, Tensor) or equation.count(",") != 1:
        raise NoRule
    operands, arrow, out = equation.replace(" ", "").partition("->")
    if not arrow:
        raise NoRule
    given = operands.split(",")
    more = [tensor.dim() - len(own) + 3 for own, tensor in zip(given, (first, second), strict=True)]
    hidden = max([0, *(n for n, own in zip(more, given, strict=True) if "..." in own)])
    letters = [letter for letter in ascii_uppercase if letter not in equation][:hidden]
    a, b = (own.replace("...", "".join(letters[hidden - n :])) for n, own in zip(more, given, strict=True))
    out = out.replace("...", "".join(letters))
    if any(len(set(own)) < len(own) or "." in own for own in (a, b, out)):
        raise NoRule
    return a, b, out


def _gradient(samples: SamplesFirst, own: str, other: str, tensor: Tensor, out: str) -> Gradient:
    def gradient(signal: Tensor) -> Factor:
        sample = out[samples.arrangement.axis]
        if sample in own or sample not in other:
            raise NoRule
        if samples.arrangement.merged:  # what is left of the axis are positions
            left, right, x = out, other, samples(tensor)
        else:
            left, right = out.replace(sample, ""), other.replace(sample, "")
            x = tensor.movedim(other.index(sample), 0)
        x = x.conj()  # of real numbers, themselves
        if not set(own) <= {*left, *right}:
            raise NoRule
        p = "".join(label for label in own if label not in right)
        q = "".join(label for label in own if label not in left)
        if not p or not q or own not in (p + q, q + p):
            n, k = signal.shape[:2]
            found = _summed(signal, _SAMPLE + _COMPONENT + left, x, _SAMPLE + right, _SAMPLE + _COMPONENT + own)
            return Dense(found.reshape(n, k, -1))
        t = "".join(label for label in left if label in right)
        x = x.sum([1 + i for i, label in enumerate(right) if label not in t + q]) if {*right} - {*t, *q} else x
        delta = _arranged(signal, left, t, p)
        return Outer(delta, _arranged(x, "".join(label for label in right if label in t + q), t, q), own != p + q)

    return gradient


def _summed(one: Tensor, one_labels: str, two: Tensor, two_labels: str, out: str) -> Tensor:
    """`torch.einsum` with any characters for labels."""
    numbers = {label: i for i, label in enumerate(dict.fromkeys(one_labels + two_labels))}
    sub = [[numbers[label] for label in own] for own in (one_labels, two_labels, out)]
    return torch.einsum(one, sub[0], two, sub[1], sub[2])


def _arranged(tensor: Tensor, labels: str, positions: str, entries: str) -> Tensor:
    """(…, *labels) as (…, positions, entries)."""
    before = tensor.dim() - len(labels)
    order = [before + labels.index(label) for label in positions + entries]
    moved = tensor.permute(*range(before), *order)
    return moved.reshape(*moved.shape[:before], moved.shape[before : before + len(positions)].numel(), -1)
