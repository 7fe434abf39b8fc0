"""Average pooling that goes another way is the same to the last bit, and what cannot go it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pathkernel.gradients.layers.pooling import average_pooling
from pathkernel.gradients.layers.tape import Tape
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout

CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((3, 4, 8, 6), {"kernel_size": 2}),
    ((3, 4, 8, 6), {"kernel_size": (2, 3), "stride": (2, 3)}),
    ((2, 1, 9, 9), {"kernel_size": 3, "stride": 3, "ceil_mode": True, "count_include_pad": False}),
    ((2, 3, 7, 8), {"kernel_size": 2}),  # a line is left over
    ((2, 3, 7, 8), {"kernel_size": 2, "ceil_mode": True}),
    ((2, 3, 8, 8), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((2, 3, 8, 8), {"kernel_size": 2, "padding": 1}),
    ((2, 3, 8, 8), {"kernel_size": 2, "divisor_override": 3}),
    ((3, 8, 8), {"kernel_size": 2}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "settings"), CASES)
def test_values_and_signals_are_the_same_to_the_last_bit(
    shape: tuple[int, ...], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=dtype, generator=generator)
    found, expected = (x.clone().requires_grad_(True) for _ in range(2))
    ours, theirs = average_pooling(found, **settings), F.avg_pool2d(expected, **settings)
    assert torch.equal(ours, theirs)
    signal = torch.randn(theirs.shape, dtype=dtype, generator=generator)
    ours.backward(signal)
    theirs.backward(signal)
    assert found.grad is not None and expected.grad is not None and torch.equal(found.grad, expected.grad)


def test_it_is_differentiated_sample_by_sample_as_well() -> None:
    x = torch.randn(5, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def total(function: Any) -> Any:
        return torch.func.vmap(torch.func.grad(lambda sample: function(sample, 2).square().sum()))(x)

    torch.testing.assert_close(total(average_pooling), total(F.avg_pool2d))


def test_a_tape_goes_this_way() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    function = ModelFunction(model, ParameterLayout.of(dict(model.named_parameters())), {})
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    tape = Tape(function, theta, torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)))
    names, nodes = [], [tape.outputs.grad_fn]
    while nodes:
        node = nodes.pop()
        names.append(type(node).__name__)
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert "_WindowsBesideEachOtherBackward" in names and "AvgPool2DBackward0" not in names
