"""Parameters that step alike, taken together, against one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.kernel_machine import adjoint
from pathkernel.kernel_machine.adjoint import Linear, Stepped, linear
from pathkernel.trajectory.alike import JOINED, stepping_alike
from pathkernel.trajectory.discrepancies import Discrepancies
from pathkernel.update_rules.adam import Adam

LOSS = nn.CrossEntropyLoss()


def trained(optimizer: str, steps: int = 6, decay: float = 0.1) -> pk.Trajectory:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 3))
    weights = [own for own in model.parameters() if own.dim() > 1]
    others = [own for own in model.parameters() if own.dim() == 1]
    groups = [{"params": weights, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    made = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}.get(optimizer)
    own = made(groups, lr=0.01) if made else torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    X, y = torch.randn(12, 5), torch.randint(3, (12,))
    with pk.KernelRecorder(model, own, LOSS, (X, y), audit_every=0) as recorder:
        for step in range(steps):
            x, target = recorder.batch(torch.arange(4) + 4 * (step % 3))
            own.zero_grad()
            LOSS(model(x), target).backward()
            own.step()
    return recorder.trajectory


def shapes_of(trajectory: pk.Trajectory) -> dict[str, torch.Size]:
    return dict(zip(trajectory.layout.names, trajectory.layout.shapes, strict=True))


def test_those_of_one_group_that_lie_end_to_end_are_taken_together() -> None:
    trajectory = trained("momentum")
    shapes = shapes_of(trajectory)
    found = stepping_alike(next(iter(trajectory.steps())), shapes)
    assert [name for names in found for name in names] == list(shapes)
    assert ("0.weight", "0.bias") in found  # the next weight alone has more entries than are joined
    assert all(sum(shapes[name].numel() for name in names) <= JOINED for names in found if len(names) > 1)
    apart = stepping_alike(next(iter(trained("adamw").steps())), shapes)
    assert all(len(names) == 1 for names in apart)  # weights and biases are of two groups


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw"])
def test_differences_from_the_rule_are_those_of_each_parameter(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory = trained(optimizer)
    together = Discrepancies(trajectory)
    together.meet(trajectory.steps())
    monkeypatch.setattr(Discrepancies, "_alike", lambda *_: False)
    each = Discrepancies(trajectory)
    each.meet(trajectory.steps())
    assert together.rounding == pytest.approx(each.rounding, rel=1e-12)
    assert not together and not each


def coefficients(rule: Adam, monkeypatch: pytest.MonkeyPatch | None = None) -> Linear:
    torch.manual_seed(1)
    frozen = {"denominator": torch.rand(200) + 0.5, "t": 3.0, "decay": 0.0}
    settings: dict[str, Any] = {"betas": (0.9, 0.999), "lr": 0.1, "maximize": False}
    if monkeypatch is not None:
        monkeypatch.setattr(adjoint, "_stand_for_all", lambda *_: False)
    return linear({"": Stepped(rule, frozen, settings, torch.Size([200]))})[""]


class Shaped(Adam):
    """A rule that asks its gradient for its length: one entry does not stand for all."""

    def step(self, gradient: Tensor, memory: Any, frozen: Any, settings: Any) -> Any:
        delta, after = super().step(gradient, memory, frozen, settings)
        return delta * len(gradient), after


class Written(Adam):
    """A rule that writes on a copy of its gradient: it refuses one of another length."""

    def step(self, gradient: Tensor, memory: Any, frozen: Any, settings: Any) -> Any:
        delta, after = super().step(gradient, memory, frozen, settings)
        return gradient.clone().copy_(delta), after


@pytest.mark.parametrize("rule", [Adam, Shaped, Written])
def test_inputs_of_one_entry_give_the_coefficients_of_whole_ones(
    rule: type[Adam], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, plain = coefficients(rule()), coefficients(rule(), monkeypatch)
    for mine, whole in zip((*found.gradients, *found.memory), (*plain.gradients, *plain.memory), strict=True):
        for own, other in zip(mine, whole, strict=True):
            assert torch.equal(torch.as_tensor(own), torch.as_tensor(other))
    assert found.ratio == plain.ratio
