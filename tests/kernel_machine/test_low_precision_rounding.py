"""How much of an explanation may be rounding, where passes ran in few bits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import pathkernel as pk
from pathkernel.errors import CertificateWarning, TrajectoryError
from pathkernel.kernel_machine.completeness import check_unexplained


def check(part: float, *types: torch.dtype, allowed: float = 0.01) -> None:
    """Of outputs that moved by 1."""
    channels = {"initial": torch.zeros(4), "rounding": torch.full((4,), part)}
    recorded: Any = SimpleNamespace(rounded_to=frozenset(types))
    check_unexplained(SimpleNamespace(channels=channels), torch.ones(4), recorded, allowed)  # type: ignore[arg-type]


def test_in_float32_a_tenth_is_no_rounding() -> None:
    check(0.09)
    with pytest.raises(TrajectoryError, match=r"70.0% of what moved .* 10% is more than rounding.* `KernelRecorder"):
        check(0.7)


def test_in_few_bits_it_is_up_to_all_that_moved_the_outputs() -> None:
    with pytest.warns(CertificateWarning, match=r"70.0% of what moved .* rounding of the passes .*why.channels"):
        check(0.7, torch.bfloat16)
    with pytest.raises(
        TrajectoryError, match=r"467.0% .* the rounding of bfloat16, .* beyond 100%.*`bias=False` .*unexplained=9.0\)"
    ):
        check(4.67, torch.bfloat16)
    check(4.67, torch.bfloat16, allowed=9.0)


@pytest.mark.parametrize("seed", range(4))
def test_networks_of_few_samples_under_adam(seed: int) -> None:
    """Entries of the gradient in which samples cancel are rounding, and Adam steps along them at full rate."""
    torch.manual_seed(seed)
    X, y = torch.randn(28, 4), torch.randint(3, (28,))
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-2), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=1) as recorder:
        for _ in range(2):
            for inputs, targets in recorder.batches(batch_size=6, shuffle=True):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    outputs = model(inputs)
                loss(outputs.float(), targets).backward()
                optimizer.step()
    why = pk.KernelMachine(recorder.trajectory).explain(X[:3])
    assert why.relative_residual < 1e-5


def test_passes_without_slopes_on_record_are_judged_as_before() -> None:
    """Small gradients of wrong samples are let through step by step there."""
    torch.manual_seed(0)
    X, y = torch.randn(12, 4), torch.randint(3, (12,))
    model = nn.Linear(4, 3)
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for inputs, targets in recorder.batches(batch_size=6):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = model(inputs)
            loss(outputs.float(), targets).backward()
            optimizer.step()
    machine = pk.KernelMachine(recorder.trajectory)
    machine.explain(X[:3])
    assert machine._recorded.rounded_to == {torch.bfloat16}
    machine._recorded._every_captured = False
    assert not machine._recorded.rounded_to
