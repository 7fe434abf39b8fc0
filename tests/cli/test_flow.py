"""``pathkernel flow``: numbers and a picture of each built-in flow."""

from __future__ import annotations

import json

import pytest
import torch

from pathkernel.cli import flow as command
from pathkernel.cli import main as cli


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(command, "SAMPLES", 20)
    monkeypatch.setattr(command, "HIDDEN", 3)
    monkeypatch.setattr(command, "COMPARED", 6)


RARER = [pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("nesterov", "rmsprop", "adam")]


@pytest.mark.parametrize("kind", ["gradient", "momentum", *RARER])
def test_each_optimizer_stays_near_its_flow(kind: str, small, tmp_path, capsys) -> None:
    own = command.KINDS[kind]
    time = (20 if kind == "nesterov" else 4) * own.step  # whose first steps are several times those of its flow
    picture, numbers = tmp_path / "flow.png", tmp_path / "n.json"
    state = torch.get_rng_state()
    arguments = ["flow", kind, "--time", str(time), "--output", str(picture), "--json", str(numbers)]
    assert cli.main(arguments) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and torch.equal(torch.get_rng_state(), state)
    found, printed = json.loads(numbers.read_text()), capsys.readouterr().out
    assert found["loss.flow"] < found["loss.start"] and found["loss.run"] < found["loss.start"]
    assert 0 < found["distance.relative"] < 0.5
    assert f"{found['loss.run']:.4f} after the steps" in printed and str(picture) in printed
    assert ("kernel.difference" in found) == (kind == "gradient")
    assert ("energy.residual" in found) == (kind in ("momentum", "nesterov"))
    if kind == "gradient":
        assert 0 < found["kernel.difference"] < 0.2


def test_a_step_longer_than_the_flow_is_refused(capsys) -> None:
    assert cli.main(["flow", "--time", "1", "--step", "2"]) == 2
    assert "no longer than the flow" in capsys.readouterr().err
