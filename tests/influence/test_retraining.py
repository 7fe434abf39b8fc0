"""Many retrainings: in blocks, in processes, and in a store that is gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import generator, record
from torch import Tensor

from pathkernel import errors
from pathkernel.influence import retraining
from pathkernel.influence.retraining import retrain


@pytest.fixture(scope="module")
def trajectory() -> Any:
    return record(optimizer="adamw").trajectory


def some_weights(rows: int, seed: int = 0) -> Tensor:
    weights = torch.rand(rows, 10, dtype=torch.float64, generator=generator(seed))
    weights[0] = 1
    return weights


def test_blocks_are_the_whole(trajectory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = some_weights(11)
    whole = trajectory.retrain(weights)
    assert torch.equal(retrain(trajectory, weights), whole)
    monkeypatch.setattr(retraining, "BLOCK", 4)
    assert torch.allclose(retrain(trajectory, weights), whole, rtol=1e-11, atol=0)
    assert torch.equal(retrain(trajectory, weights, engine="plain"), trajectory.retrain(weights, engine="plain"))
    assert retrain(trajectory, weights[:0]).shape == (0, trajectory.layout.size)


def test_a_store_is_gone_on_with(trajectory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retraining, "BLOCK", 4)
    weights, asked = some_weights(10), []
    plain = retraining.retrained

    def killed(run: Any, rows: Tensor, *others: Any) -> Tensor:
        asked.append(len(rows))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return plain(run, rows, *others)

    monkeypatch.setattr(retraining, "retrained", killed)
    with pytest.raises(KeyboardInterrupt):
        retrain(trajectory, weights, store=tmp_path / "runs", engine="plain")
    found = retrain(trajectory, weights, store=tmp_path / "runs", engine="plain")
    assert asked == [4, 4, 4, 2]  # the first block was not trained again
    assert torch.equal(found, trajectory.retrain(weights, engine="plain"))
    assert torch.equal(retrain(trajectory, weights, store=tmp_path / "runs", engine="plain"), found)
    assert len(asked) == 4
    with pytest.raises(errors.StoreError, match="another computation"):
        retrain(trajectory, some_weights(10, seed=1), store=tmp_path / "runs", engine="plain")


def test_float32_comes_back_from_a_store_to_the_last_bit(tmp_path: Path) -> None:
    trajectory = record(dtype=torch.float32).trajectory
    weights = some_weights(3)
    assert torch.equal(retrain(trajectory, weights, store=tmp_path / "runs"), trajectory.retrain(weights))


@pytest.mark.exhaustive  # two processes load torch
def test_processes_give_the_same_bits(trajectory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retraining, "BLOCK", 3)
    weights = some_weights(6)
    assert torch.equal(retrain(trajectory, weights, jobs=2), trajectory.retrain(weights, engine="plain"))


def test_a_process_proves_the_run_first(trajectory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retraining, "_proved", set())
    run, final, threads = retraining.prepared(trajectory), trajectory.final, torch.get_num_threads()
    rows = some_weights(2)
    found = retraining._in_process(run, rows, final, "plain", threads)
    assert torch.equal(found, trajectory.retrain(rows)) and len(retraining._proved) == 1
    with pytest.raises(errors.TrajectoryError, match="in another process"):
        retraining._in_process(run, rows, final + 1, "plain", threads)


def test_refusals(trajectory: Any) -> None:
    with pytest.raises(errors.InputError, match="`jobs=0`"):
        retrain(trajectory, some_weights(1), jobs=0)
    with pytest.raises(errors.InputError, match="Engines are"):
        retrain(trajectory, some_weights(1), engine="fast")


def test_an_optimizer_that_is_no_class(trajectory: Any) -> None:
    with pytest.raises(errors.InputError, match=r"`optimizer` is a SGD.*the class.*without making one"):
        trajectory.retrain(some_weights(1), optimizer=torch.optim.SGD([torch.zeros(1)]))


def test_a_store_that_is_no_folder(trajectory: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.StoreError, match=r"file` is a file.*a folder of its own"):
        retrain(trajectory, some_weights(1), store=tmp_path / "file")
    with pytest.raises(errors.InputError, match="`store` is a int"):
        retrain(trajectory, some_weights(1), store=3)  # type: ignore[arg-type]
