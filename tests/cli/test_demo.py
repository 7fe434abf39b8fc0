"""The main job: what it prints is what it measured, and the command line around it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from pathkernel.cli import demo
from pathkernel.cli import main as cli
from pathkernel.errors import InputError

KEYS = {
    "network.accuracy",
    "machine.agreement",
    "machine.residual",
    "machine.quadrature_error",
    "path.error",
    "svc_path.accuracy",
    "svc_path.agreement",
    "kernel_ridge_path.accuracy",
    "svc_tangent.accuracy",
    "svc_rbf.accuracy",
    "seconds.total",
}


@pytest.fixture
def shorter(monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", 3)
    monkeypatch.setattr(demo, "HIDDEN", 16)
    monkeypatch.setattr(demo, "PROBE", 40)


def test_a_shorter_job_from_the_command_line(shorter, tmp_path, capsys):
    arguments = ["demo", "--quiet", "--tolerance", "2e-2", "--seed", "3"]
    assert cli.main([*arguments, "--json", str(tmp_path / "n.json"), "--output", str(tmp_path / "out")]) == 0
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers.keys() >= KEYS
    assert numbers["machine.agreement"] == 1.0
    assert numbers["machine.residual"] <= 1e-5
    assert 1 <= numbers["path.nodes"] <= 70 and numbers["path.steps"] == 69
    assert 0 < numbers["path.error_deviation"] < numbers["path.error"] <= 2e-2
    printed = capsys.readouterr().out
    assert f"{numbers['svc_path.accuracy']:.2%}" in printed
    assert f"{numbers['path.nodes']} nodes at a measured error of {numbers['path.error']:.1e}" in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= demo.EXPLAINED + 3
    assert not list(tmp_path.glob(".n.json.*"))


def test_the_same_seed_measures_the_same(shorter):
    first, second = (demo.run(seed=1, tolerance=0.05, progress=False).numbers for _ in range(2))
    same = {key for key in first if not key.startswith("seconds.")}
    assert {key: first[key] for key in same} == {key: second[key] for key in same}


def test_mistakes_are_explained_first():
    outputs = np.array([[3.0, 0, 0], [0, 1.0, 0.9], [0, 0, 2.0], [2.5, 0, 0]])
    predicted = outputs.argmax(axis=1)
    assert demo.chosen_digits(predicted, outputs, np.array([0, 2, 2, 0]))[0] == 1
    assert demo.chosen_digits(predicted, outputs, predicted)[0] == 1, "the least certain one stands for a mistake"


def test_refusals_end_with_code_2_and_three_parts(monkeypatch, capsys):
    def refuse(*_, **__):
        raise InputError("This was found", "That was expected", "Write the other")

    monkeypatch.setattr(demo, "run", refuse)
    assert cli.main(["demo"]) == 2
    assert "This was found. That was expected. Write the other." in capsys.readouterr().err


def test_json_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "numbers.json"
    target.write_text("before")
    with pytest.raises(TypeError):
        cli.write_json(target, {"unwritable": object()})
    assert target.read_text() == "before" and list(tmp_path.iterdir()) == [target]


def test_help_does_not_wait_for_torch():
    code = "import sys, pathkernel.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_the_whole_job_reproduces_the_network():
    numbers = demo.run(seed=0, tolerance=1e-2, progress=False).numbers
    assert numbers["network.accuracy"] >= 0.96
    assert numbers["machine.agreement"] == 1.0
    assert numbers["machine.residual"] <= 1e-5
