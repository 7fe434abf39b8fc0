"""Displacements that a machine keeps: later predictions say the same to the last bit, without training once more."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from cases import make_inputs, record

import pathkernel as pk
from pathkernel.kernel_machine import forward_sweep


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps that forward sweeps have trained once more so far."""
    steps: list[int] = []
    real = forward_sweep._displacements

    def counted(*arguments):
        steps.append(arguments[2].index)
        return real(*arguments)

    monkeypatch.setattr(forward_sweep, "_displacements", counted)
    return steps


@pytest.mark.parametrize("form", ["folded", "chord"])
def test_a_kept_table_changes_no_bit_and_trains_no_step(form: str, trained: list[int]) -> None:
    trajectory = record(optimizer="adamw").trajectory
    X = make_inputs(5, seed=7)
    plain, keeping = pk.KernelMachine(trajectory, form=form), pk.KernelMachine(trajectory, form=form, keep=True)
    keeping(X[:2])
    steps = len(trained)
    found = keeping(X)
    assert steps == len(trajectory) == len(trained)
    assert np.array_equal(found, plain(X)) and len(trained) == 2 * steps
    assert np.array_equal(pickle.loads(pickle.dumps(keeping))(X), found) and len(trained) == 3 * steps


def test_a_table_beyond_the_budget_is_not_kept(trained: list[int]) -> None:
    trajectory = record().trajectory
    machine = pk.KernelMachine(trajectory, keep=True)
    machine._kept.memory = 8 * trajectory.layout.size * (len(trajectory) - 1)
    X = make_inputs(3, seed=7)
    first, second = machine(X), machine(X)
    assert np.array_equal(first, second) and len(trained) == 2 * len(trajectory) and not machine._kept._table
