"""Where a network stands on its path, when a framework has led it back to its best checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pathkernel as pk
from pathkernel.callbacks.kept_weights import is_at_end, steps_of_weights
from pathkernel.callbacks.recording import FrameworkRecording
from pathkernel.errors import ModelMismatchError, TrajectoryError

torch.manual_seed(0)
X, Y = torch.randn(20, 4), torch.randint(3, (20,))
CE = nn.CrossEntropyLoss()


def trained(schedule: Any = None) -> tuple[FrameworkRecording, nn.Module, list[dict[str, Any]]]:
    """A network that was trained for four steps, and its weights after each of them."""
    model, kept = nn.Linear(4, 3), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    recording = FrameworkRecording("Callback", {"loss": CE, "data": (X, Y), "schedule": schedule})
    recorder = recording.start(model, [optimizer])
    for x, y in recorder.batches(5):
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        CE(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return recording, model, kept


@pytest.mark.parametrize("schedule", [None, pk.Keyframes(2)])
def test_weights_are_found_on_the_path(schedule: Any) -> None:
    recording, model, kept = trained(schedule)
    recording.close()
    path = recording.trajectory
    assert steps_of_weights(path) is None and is_at_end(path)
    for steps in (3, 1):
        model.load_state_dict(kept[steps])
        assert steps_of_weights(path) == steps and not is_at_end(path)
    model.load_state_dict(kept[0])
    assert steps_of_weights(path) is None and not is_at_end(path)  # nobody has a share in the untrained network


def test_the_machine_is_that_of_the_weights_that_the_network_has() -> None:
    recording, model, kept = trained()
    recording.close()
    end = recording.machine(X)
    model.load_state_dict(kept[2])
    assert abs(recording.machine(X) - model(X).detach().numpy()).max() <= 1e-6
    assert abs(recording.machine(X) - end).max() > 1e-3
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(ModelMismatchError, match="differs by up to"):
        _ = recording.machine


def test_the_machine_of_the_end_is_not_handed_out_for_other_weights() -> None:
    recording, model, _ = trained()
    recording.close()
    assert recording.machine is recording.machine
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(ModelMismatchError, match="differs by up to"):
        _ = recording.machine


def test_weights_that_were_loaded_while_it_is_recorded() -> None:
    recording, model, kept = trained()
    model.load_state_dict(kept[2])
    recording.close()
    assert is_at_end(recording.trajectory)
    assert steps_of_weights(recording.trajectory) == 2
    assert "loaded" not in recording.machine.explain(X[:2]).channels


def test_a_record_of_too_little_says_so() -> None:
    recording, _, _ = trained(pk.WeightsOnly())
    with pytest.raises(TrajectoryError, match="KernelMachine"):
        _ = recording.machine
