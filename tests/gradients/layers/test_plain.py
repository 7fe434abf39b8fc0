"""Parameters that no layer accounts for are named with the reason, and once without being asked."""

from __future__ import annotations

import warnings

import networks
import pytest
import torch
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.errors import PlainGradientsWarning

Recorded = tuple[nn.Module, Tensor, pk.Trajectory]


def recorded(width: int = 5) -> Recorded:
    """A network with a parameter that only a function of its own meets, a few steps of its training, and samples."""
    torch.manual_seed(0)
    model, X, y = networks.OwnFunction(width), torch.randn(6, 6), torch.randn(6, 3)
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=1e-3), nn.MSELoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for x, target in recorder.batches(batch_size=3):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    return model, X, recorder.trajectory


@pytest.fixture(scope="module")
def small() -> Recorded:
    return recorded()


SUMMARY = "layer by layer: 4 of 5 parameters, 91.38% of θ"
PLAIN = "on the plain engine: scale, its gradients on the tape differ from autograd's"


def test_kernels_say_so_once_gradients_were_taken(small: Recorded) -> None:
    model, X, trajectory = small
    kernel = pk.TangentKernel(model)
    assert SUMMARY in kernel.describe(X)
    for described in (kernel, pk.PathKernel(trajectory)):
        described(X)
        assert SUMMARY in described.describe() and PLAIN in described.describe()
    assert "layer by layer" not in pk.TangentKernel(model, engine="jacobian").describe()


def test_a_machine_says_so(small: Recorded) -> None:
    _, _, trajectory = small
    told = pk.KernelMachine(trajectory).describe()
    assert SUMMARY in told and PLAIN in told and "exact for every recorded step" in told
    assert "rows, by engine 'jacobian'" in pk.KernelMachine(trajectory, engine="jacobian").describe()


def caught(call: object) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()  # type: ignore[operator]
    return [one for one in found if issubclass(one.category, PlainGradientsWarning)]


def test_a_considerable_part_is_worth_a_warning_once_for_each_model() -> None:
    model, X, trajectory = recorded(12_000)
    (found,) = caught(lambda: pk.TangentKernel(model)(X))
    assert found.filename == __file__, "the user's line"
    assert "9% of θ is not accounted for layer by layer: scale (" in str(found.message)
    assert "`describe()`" in str(found.message)
    assert not caught(lambda: pk.TangentKernel(model, outputs="full")(X[:2]))
    assert not caught(lambda: pk.KernelMachine(trajectory).explain(X[:1], outputs=0))


def test_a_machine_warns_of_a_model_that_no_kernel_was_asked_of() -> None:
    _, X, trajectory = recorded(12_000)
    machine = pk.KernelMachine(trajectory)
    (found,) = caught(lambda: machine.explain(X[:1], outputs=0))
    assert found.filename == __file__


def test_rows_that_were_asked_for_and_small_parts_are_nothing_to_warn_of() -> None:
    model, X, _ = recorded(12_000)
    assert not caught(lambda: pk.TangentKernel(model, engine="jacobian")(X[:2]))
    small, X, _ = recorded()
    assert not caught(lambda: pk.TangentKernel(small)(X))
