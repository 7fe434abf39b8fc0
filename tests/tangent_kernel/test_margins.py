"""The kernel of margins log p/(1 − p): against plain autograd, on every engine, and which labels have one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import make_inputs, make_model, record
from tolerances import TOLERANCES
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import errors, reference

DOUBLE = TOLERANCES[torch.float64]
X = make_inputs(5)
LABELS = {3: torch.tensor([0, 2, 1, 1, 0]), 2: torch.tensor([0, 1, 1, 0, 1]), 1: torch.tensor([0.0, 1, 1, 0, 1])}


def rows(module: nn.Module, parameters: dict[str, Tensor], labels: Tensor) -> Tensor:
    of = [lambda z, y=y: reference.margin(z, y) for y in labels.reshape(-1).int().tolist()]
    return reference.value_gradients(module, parameters, X, of)


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=DOUBLE.rounding, atol=DOUBLE.rounding)


@pytest.mark.parametrize(
    ("outputs", "engine"), [(3, "auto"), (2, "auto"), (1, "auto"), (3, "jacobian"), (1, "products")]
)
def test_against_autograd(outputs: int, engine: str) -> None:
    module, y = make_model(outputs=outputs), LABELS[outputs]
    G = rows(module, dict(module.named_parameters()), y)
    kernel = pk.TangentKernel(module, outputs="margin", engine=engine)
    close(kernel((X, y)), G @ G.T)
    close(kernel((X[:2], y[:2]), (X, y)), G[:2] @ G.T)
    close(kernel.diagonal((X, y)), (G**2).sum(dim=1))
    close(kernel.matvec((X, y), np.ones(5)), G @ G.sum(dim=0))


def test_along_the_path() -> None:
    run, y = record(), LABELS[3]
    kernel = pk.PathKernel(run.trajectory, outputs="margin", quadrature="left", measure="uniform")
    path = [rows(run.start, run.trajectory.parameters(s), y) for s in range(len(run.trajectory))]
    close(kernel((X, y)), sum(G @ G.T for G in path))


def test_one_output_in_a_column_and_labels_of_any_kind() -> None:
    module, y = make_model(outputs=1), LABELS[1]
    kernel = pk.TangentKernel(module, outputs="margin")
    for labels in (y.numpy(), y.int(), y.bool(), y[:, None]):
        close(kernel((X, labels)), kernel((X, y)))


def test_a_certain_sample_keeps_its_margin() -> None:
    """p is 1 to rounding, and log p/(1 − p) is 800."""
    module = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[800.0], [0.0]]))
    kernel = pk.TangentKernel(module, outputs="margin")
    x = torch.ones(1, 1, dtype=torch.float64)
    assert kernel((x, [0])).tolist() == [[2.0]] and kernel((x, [1])).tolist() == [[2.0]]


def test_a_module_that_is_called_margin() -> None:
    """The word is the function of the label; a unit of the module is still asked for by name."""
    model = nn.Sequential()
    model.add_module("margin", make_model())
    optimizer, y = torch.optim.SGD(model.parameters(), lr=0.1), LABELS[3]
    with pk.KernelRecorder(model, optimizer, nn.CrossEntropyLoss(), data=(X, y)) as recorder:
        for x, target in recorder.batches(5):
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    machine = pk.KernelMachine(recorder.trajectory)
    assert machine.explain((X, y), outputs="margin").shares.shape == (5, 5)
    assert machine.explain(X, outputs=("margin", 0)).shares.shape == (5, 5)


REFUSED = {
    "labels beyond the outputs": (3, torch.tensor([0, 1, 2, 3, 0]), r"int64.*from 0 to 3.*integers from 0 to 2"),
    "ignored labels": (3, torch.tensor([0, 1, -100, 1, 0]), r"from -100 to 1.*integers from 0 to 2"),
    "targets of a regression": (3, X[:, :3], r"float64 and shape \(5, 3\).*regresses on have no margin"),
    "labels as floating-point numbers": (3, torch.tensor([0.0, 1, 2, 1, 0]), r"float64.*labels are integers"),
    "one output and other numbers": (1, X[:, 0], r"With one output, labels are 0 or 1"),
    "several labels": (1, torch.ones(5, 2), r"shape \(5, 2\).*labels are 0 or 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_targets_without_a_margin(name: str) -> None:
    outputs, y, said = REFUSED[name]
    with pytest.raises(errors.InputError, match=said):
        pk.TangentKernel(make_model(outputs=outputs), outputs="margin")((X, y))


def test_outputs_without_a_row_of_scores() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2))).double()
    with pytest.raises(errors.InputError, match=r"returns \(1, 3, 2\) for one sample.*in one row.*`outputs=lambda z"):
        pk.TangentKernel(module, outputs="margin")((X, LABELS[3]))
