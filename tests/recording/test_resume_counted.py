"""Going on after a break where samples are counted as they come: the same ids as without the break."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from several import BATCH, CE, QUERIES, X, Y, network
from torch import Tensor
from torch.optim import AdamW

import pathkernel as pk

STEPS, CHECKPOINT, END = 7, 3, 5


class Run:
    """A stream of batches, counted by `track` or by a source, that stops behind its checkpoint, or goes on from one."""

    def __init__(self, path: Path, counted: str, end: int = STEPS, checkpoint: Any = None) -> None:
        self.model, self.counted, self.first = network(), counted, 0
        optimizer = AdamW(self.model.parameters(), lr=1e-2)
        if checkpoint is not None:
            weights, state, self.first = checkpoint
            self.model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        self.recorder = pk.KernelRecorder(self.model, optimizer, task="classification", store=path)
        with self.recorder:
            for k, (x, y) in enumerate(self.batches(end), self.first + 1):
                self.model.zero_grad()
                if counted == "source":
                    with self.recorder.source("stream"):
                        CE(self.model(x), y).backward()
                else:
                    CE(self.model(x), y).backward()
                optimizer.step()
                if k == CHECKPOINT:
                    self.checkpoint = copy.deepcopy((self.model.state_dict(), optimizer.state_dict(), k))
            self.recorder.flush()
            shutil.copytree(path, f"{path}-killed")  # what is on disk where the process dies here
        self.trajectory = self.recorder.trajectory

    def batches(self, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        drawn = [torch.arange(k, k + BATCH) for k in range(self.first, end)]
        stream = ((X[ids], Y[ids]) for ids in drawn)
        return stream if self.counted == "source" else iter(self.recorder.track(stream))

    def ids(self) -> list[list[int]]:
        return [batch.ids.tolist() for step in self.trajectory.steps() for batch in step.batches]


@pytest.mark.parametrize("counted", ["track", "source"])
@pytest.mark.parametrize("killed", [False, True])
def test_counting_goes_on_from_the_checkpoint(counted: str, killed: bool, tmp_path: Path) -> None:
    """Steps behind it are cut off, and their samples come again under the same ids."""
    whole = Run(tmp_path / "whole", counted)
    checkpoint = Run(tmp_path / "run", counted, END).checkpoint
    path = tmp_path / ("run-killed" if killed else "run")
    shutil.rmtree(tmp_path / ("run" if killed else "run-killed"))
    resumed = Run(path, counted, STEPS, checkpoint)
    assert resumed.ids() == whole.ids() == [[*range(BATCH * k, BATCH * (k + 1))] for k in range(STEPS)]
    opened = pk.Trajectory.open(path, model=resumed.model)
    expected = pk.KernelMachine(whole.trajectory).explain(QUERIES, outputs=0)
    assert expected.shares.shape == (len(QUERIES), STEPS * BATCH)
    for trajectory in (resumed.trajectory, opened):
        why = pk.KernelMachine(trajectory).explain(QUERIES, outputs=0)
        np.testing.assert_array_equal(why.shares, expected.shares)
        assert why.sources == expected.sources


def test_a_killed_record_of_sources_alone_has_no_other_columns(tmp_path: Path) -> None:
    """Their ids are no ids of training samples."""
    run = Run(tmp_path / "run", "source")
    opened = pk.Trajectory.open(tmp_path / "run-killed", model=run.model)
    why = pk.KernelMachine(opened).explain(QUERIES, outputs=0)
    assert why.sources == {"stream": slice(0, STEPS * BATCH)}
    np.testing.assert_array_equal(why.shares, pk.KernelMachine(run.trajectory).explain(QUERIES, outputs=0).shares)
