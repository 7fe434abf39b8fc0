"""Networks that enter autocast in their own ``forward``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pathkernel as pk


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Inside(Decorated):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.body(x)


class Converted(Decorated):
    """Of whose types the outputs say nothing."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.body(x).float()


@pytest.mark.parametrize("optimizer_of", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("kind", [Decorated, Inside, Converted])
def test_they_are_explained_without_their_rounding(kind: type[Decorated], optimizer_of: type) -> None:
    torch.manual_seed(0)
    X, y = torch.randn(28, 4), torch.randint(3, (28,))
    model, loss = kind(), nn.CrossEntropyLoss()
    optimizer = optimizer_of(model.parameters(), lr=1e-2)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=1) as recorder:
        for _ in range(2):
            for inputs, targets in recorder.batches(batch_size=6, shuffle=True):
                optimizer.zero_grad()
                loss(model(inputs).float(), targets).backward()
                optimizer.step()
    machine = pk.KernelMachine(recorder.trajectory)
    why = machine.explain(X[:3])
    assert why.relative_residual < 1e-5
    assert why.split_error < 5e-2
    assert abs(why.quadrature_error).max() < 1e-2 * abs(why.output).max()
    with torch.no_grad():
        exact, rounded = model.body(X).numpy(), model(X).float().numpy()
    assert abs(machine(X) - exact).max() < 1e-5
    assert 0 < abs(machine(X) - rounded).max() < 2e-2
