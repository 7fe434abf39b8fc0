"""What `benchmarks/engines.py` refuses and says beside its targets, without timing anything."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("engines")


@pytest.mark.parametrize(
    ("device", "clock", "there", "expected"),
    [
        ("cpu", "cpu", False, None),
        ("cuda", "wall", True, None),
        ("cuda", "wall", False, "finds no such device; .* that is there, .*; leave `--device` out"),
        ("cuda", "cpu", True, "is no time of the processor; write `--clock wall`"),
    ],
)
def test_devices_that_cannot_be_timed_are_refused(
    device: str, clock: str, there: bool, expected: str | None, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    found = engines.refusal(argparse.Namespace(device=device, clock=clock))
    if expected is None:
        assert found is None
    else:
        with pytest.raises(ValueError, match=expected):
            raise ValueError(found)


def test_the_command_says_so_before_it_begins(
    engines: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["engines.py", "--device", "cuda"])
    with pytest.raises(SystemExit):
        engines.main()
    captured = capsys.readouterr()
    assert "finds no such device" in captured.err and not captured.out


def test_on_a_device_there_are_pathkernels_tangent_kernels(engines: Any) -> None:
    groups = {name: engines.on_device(entries, "cuda") for name, entries in engines.all_groups(quick=True).items()}
    assert not groups["shares SGD"]
    for entries in groups.values():
        for entry in entries:
            assert (entry.task.kind, entry.task.device) == ("gram", "cuda")
            assert entry.method.startswith("pathkernel")
    methods = ["pathkernel", "pathkernel-plain", "pathkernel-bfloat16", "pathkernel-tf32"]
    assert [entry.method for entry in groups["W1 trace"]] == methods
    here = engines.on_device(engines.all_groups(quick=True)["W1 trace"], "cpu")
    assert "pathkernel-tf32" not in [entry.method for entry in here]


def test_targets_of_a_checkpoint_stand_beside_their_floors(engines: Any) -> None:
    row = {"workload": "TracIn checkpoint", "method": "pathkernel", "seconds": 0.027, "floor_seconds": 0.0156}
    rows = [row | {"torch_seconds": 0.0246}]
    assert engines.bounds(rows) == []
    for method, seconds in {"captum": 2.0, "dattri": 5.4, "captum-default": 11.0}.items():
        rows.append({"workload": "TracIn checkpoint", "method": method, "seconds": seconds})
    captum, default, dattri = engines.bounds(rows)
    assert captum.endswith(
        "100 × captum is 0.02 s; the product floor 0.0156 s, torch's own parts 0.0246 s: below torch's own parts"
    )
    assert dattri.endswith("below the product floor and torch's own parts") and "is 0.0135 s" in dattri
    assert default.endswith("torch's own parts 0.0246 s")
