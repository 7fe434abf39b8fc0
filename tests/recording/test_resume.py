"""A run that is cut off and started again from a checkpoint records what an uninterrupted one does, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LOSSES, SAMPLES, make_inputs
from stores import same_trajectories
from torch import nn

import pathkernel as pk
from pathkernel.errors import ModelMismatchError, StoreError
from pathkernel.storage.disk import DiskStore

CE = nn.CrossEntropyLoss()
MAKE = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.01),
}


class Run:
    """A training run with dropout, batch normalisation, a clamp and an average, and its checkpoints."""

    def __init__(self, optimizer: str = "momentum") -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.optimizer = MAKE[optimizer](list(self.model.parameters()))
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        self.ema = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=average)
        self.X, self.y = make_inputs(SAMPLES, dtype=torch.float32), LOSSES["ce_mean"].targets(SAMPLES)
        self.step = 0

    def checkpoint(self) -> dict[str, Any]:
        states = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "ema")}
        return torch_copy({**states, "step": self.step, "generator": torch.get_rng_state()})

    def restore(self, checkpoint: dict[str, Any]) -> None:
        for name in ("model", "optimizer", "ema"):
            getattr(self, name).load_state_dict(torch_copy(checkpoint[name]))
        self.step = checkpoint["step"]
        torch.set_rng_state(checkpoint["generator"])

    def train(self, until: int, store: Any, at: int | None = None, stop: int | None = None) -> Any:
        """Train up to a step; returns trajectory and the checkpoint of step ``at``, or is interrupted at ``stop``."""
        recorder = pk.KernelRecorder(
            self.model, self.optimizer, CE, data=(self.X, self.y), averages={"ema": self.ema}, store=store,
            audit_every=0,
        )  # fmt: skip
        kept = None
        with recorder:
            while self.step < until:
                if self.step == stop:
                    raise KeyboardInterrupt
                if self.step == at:
                    kept = self.checkpoint()
                x, target = recorder.batch([self.step % SAMPLES, 1, 2, 5])
                self.optimizer.zero_grad()
                CE(self.model(x), target).backward()
                self.optimizer.step()
                with recorder.channel("clamp"), torch.no_grad():
                    if self.step % 2:
                        self.model[0].weight.clamp_(-0.3, 0.3)
                self.ema.update_parameters(self.model)
                self.step += 1
        return recorder.trajectory, kept


def torch_copy(value: Any) -> Any:
    import copy

    return copy.deepcopy(value)


@pytest.mark.parametrize("optimizer", MAKE)
@pytest.mark.parametrize(("at", "end"), [(5, 14), (8, 9), (9, 9), (1, 14)])
def test_resumed_equals_uninterrupted(tmp_path: Path, optimizer: str, at: int, end: int) -> None:
    whole, _ = Run(optimizer).train(20, None)
    first = Run(optimizer)
    _, checkpoint = first.train(end, DiskStore(tmp_path / "run", flush_every=4), at=min(at, end - 1))
    if at == end:
        checkpoint = first.checkpoint()
    second = Run(optimizer)
    second.restore(checkpoint)
    resumed, _ = second.train(20, tmp_path / "run")
    same_trajectories(whole, resumed)
    opened = pk.Trajectory.open(tmp_path / "run", model=second.model, loss=CE, data=(second.X, second.y))
    same_trajectories(whole, opened)
    assert not opened.store.verify()


class Plain(Run):
    """With a schedule: an average where every step is known, and one clamp, after which θ is kept in full."""

    def train(self, until: int, store: Any, schedule: Any, at: int | None = None, flush: bool = False) -> Any:  # type: ignore[override]
        """Train up to a step; returns trajectory and the checkpoint of step ``at``."""
        averages = {"ema": self.ema} if isinstance(schedule, pk.Keyframes) else None
        recorder = pk.KernelRecorder(
            self.model, self.optimizer, CE, data=(self.X, self.y), averages=averages, store=store, schedule=schedule,
            audit_every=0,
        )  # fmt: skip
        kept = None
        with recorder:
            while self.step < until:
                if flush and self.step == 5:
                    recorder.flush()
                if self.step == at:
                    kept = self.checkpoint()
                x, target = recorder.batch([self.step % SAMPLES, 1, 2, 5])
                self.optimizer.zero_grad()
                CE(self.model(x), target).backward()
                self.optimizer.step()
                self.ema.update_parameters(self.model)
                self.step += 1
                if self.step == 7:
                    with recorder.channel("clamp"), torch.no_grad():
                        self.model[0].weight.clamp_(-0.3, 0.3)
        return recorder.trajectory, kept


LEVELS = {"keyframes": pk.Keyframes(4), "thinned": pk.Every(3), "weights": pk.WeightsOnly()}


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("at", "end"), [(5, 9), (6, 7), (9, 9), (7, 10)])
def test_levels_of_record_go_on(tmp_path: Path, level: str, optimizer: str, at: int, end: int) -> None:
    """Steps as they are read are those of an uninterrupted run, bit for bit."""
    schedule, flush = LEVELS[level], level == "thinned"
    if level == "thinned" and at in (6, 7):
        pytest.skip("θ was not kept there")
    whole, _ = Plain(optimizer).train(12, None, schedule, flush=flush)
    first = Plain(optimizer)
    store = DiskStore(tmp_path / "run", flush_every=4)
    _, checkpoint = first.train(end, store, schedule, at=at, flush=flush)
    checkpoint = first.checkpoint() if at == end else checkpoint
    second = Plain(optimizer)
    second.restore(checkpoint)
    resumed, _ = second.train(12, tmp_path / "run", schedule)
    opened = pk.Trajectory.open(tmp_path / "run", model=second.model, loss=CE, data=(second.X, second.y))
    for found in (resumed, opened):
        assert torch.equal(whole.final, found.final)
        if level == "thinned" and at == end:
            continue  # the stretch that was open ended there
        same_trajectories(whole, found)
    if level == "keyframes" and optimizer == "momentum":  # Adam divides rounding by itself before batch normalisation
        machine = pk.KernelMachine(opened)
        assert machine.explain(make_inputs(2, dtype=torch.float32), outputs=0).relative_residual < 1e-4


@pytest.mark.parametrize("level", ["keyframes", "weights"])
def test_levels_of_record_go_on_where_a_process_died(tmp_path: Path, level: str) -> None:
    """What is on disk in mid-run, without an end."""
    whole, _ = Plain("adam").train(12, None, LEVELS[level])
    first = Plain("adam")
    store = DiskStore(tmp_path / "run", flush_every=5)
    append = store.append

    def copied(step: Any) -> None:
        append(step)
        if step.index == 9:
            store.flush()
            shutil.copytree(tmp_path / "run", tmp_path / "copy")

    store.append = copied  # type: ignore[method-assign]
    first.train(12, store, LEVELS[level], at=6)
    _, checkpoint = Plain("adam").train(7, None, LEVELS[level], at=6)
    second = Plain("adam")
    second.restore(checkpoint)
    resumed, _ = second.train(12, tmp_path / "copy", LEVELS[level])
    same_trajectories(whole, resumed)


@pytest.mark.parametrize("at", [5, 8])
def test_keyframes_go_on_where_the_optimizer_remembers_nothing(tmp_path: Path, at: int) -> None:
    """SGD without momentum has no state, and its retraining an empty one for each parameter."""
    whole, _ = Plain("sgd").train(12, None, pk.Keyframes(4))
    first = Plain("sgd")
    first.train(at, tmp_path / "run", pk.Keyframes(4))
    checkpoint = first.checkpoint()
    second = Plain("sgd")
    second.restore(checkpoint)
    resumed, _ = second.train(12, tmp_path / "run", pk.Keyframes(4))
    same_trajectories(whole, resumed)


def test_keyframes_go_on_with_the_whole_optimizer(tmp_path: Path) -> None:
    """Its state is trained again up to the checkpoint, and compared to the last bit."""
    first = Plain("adam")
    _, checkpoint = first.train(8, tmp_path / "run", pk.Keyframes(4), at=6)
    state = next(iter(checkpoint["optimizer"]["state"].values()))
    state["exp_avg_sq"][0] *= 1 + 1e-6
    second = Plain("adam")
    second.restore(checkpoint)
    with pytest.raises(ModelMismatchError, match="after step 6, and the optimizer's state is not"):
        second.train(12, tmp_path / "run", pk.Keyframes(4))
    with pytest.raises(StoreError, match=r"with `Keyframes\(4\)`, and `schedule=Every\(\)` was given"):
        second.train(12, tmp_path / "run", None)


def test_interrupted_by_the_keyboard(tmp_path: Path) -> None:
    whole, _ = Run().train(20, None)
    first = Run()
    with pytest.raises(KeyboardInterrupt):
        first.train(20, tmp_path / "run", stop=11)
    checkpoint, second = first.checkpoint(), Run()
    second.restore(checkpoint)
    same_trajectories(whole, second.train(20, tmp_path / "run")[0])


def test_started_again_from_the_beginning(tmp_path: Path) -> None:
    whole, _ = Run().train(12, None)
    first = Run()
    with pytest.raises(KeyboardInterrupt):
        first.train(12, tmp_path / "run", stop=5)
    stored = DiskStore.open(tmp_path / "run")._there
    stored.blocks.group.set_attributes(stored.header.ended(None).to_json())  # as where it was killed
    same_trajectories(whole, Run().train(12, tmp_path / "run")[0])


def test_interrupted_in_the_first_step(tmp_path: Path) -> None:
    whole, _ = Run().train(12, None)
    first = Run()
    recorder = pk.KernelRecorder(
        first.model, first.optimizer, CE, data=(first.X, first.y), averages={"ema": first.ema}, store=tmp_path / "run"
    )
    with pytest.raises(KeyboardInterrupt), recorder:
        first.model(recorder.batch([0, 1, 2, 5])[0])
        raise KeyboardInterrupt
    same_trajectories(whole, Run().train(12, tmp_path / "run")[0])


SCRIPT = """
import sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from test_resume import Run, DiskStore
import pathkernel as pk
run, store = Run(), DiskStore({path!r}, flush_every={flush_every})
append = store.append
def telling(step):
    append(step)
    torch.save(run.checkpoint(), {path!r} + ".tmp") if step.index == 6 else None
    print(step.index, flush=True)
store.append = telling
run.train(10**6, store)
"""


@pytest.mark.parametrize("flush_every", [1, 4])
def test_killed(tmp_path: Path, flush_every: int) -> None:
    path = tmp_path / "run"
    tests = Path(__file__).resolve().parents[1]
    script = SCRIPT.format(
        paths=[str(tests.parent), str(tests), str(tests / "recording")], path=str(path), flush_every=flush_every
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    told = -1
    assert process.stdout is not None
    for line in process.stdout:
        told = int(line)
        if told == 41:
            os.kill(process.pid, signal.SIGKILL)
            break
    for line in process.stdout:
        told = int(line)
    process.wait()
    store = DiskStore.open(path)
    assert not store.verify()
    assert len(store) >= (told + 1 if flush_every == 1 else told + 1 - 6 * flush_every)
    assert store.header is not None and store.header.end is None
    whole, checkpoint = Run().train(len(store) + 5, None, at=7)
    again = Run()
    again.restore(checkpoint)
    same_trajectories(whole, again.train(len(store) + 5, path)[0])


def test_two_recorders_on_one_store(tmp_path: Path) -> None:
    first = Run()
    recorder = pk.KernelRecorder(first.model, first.optimizer, CE, data=(first.X, first.y), store=tmp_path / "run")
    second = Run()
    with recorder, pytest.raises(StoreError, match=r"being written by another recorder \(process \d+ on"):
        second.train(3, tmp_path / "run")
    # A lock file that a dead process left behind locks nothing.
    assert (tmp_path / "run" / "lock").exists()
    third = Run()
    third.train(3, tmp_path / "other")
    assert len(recorder.trajectory) == 0


def test_weights_that_are_nowhere_on_the_path(tmp_path: Path) -> None:
    run = Run()
    _, checkpoint = run.train(9, tmp_path / "run", at=6)
    other = Run()
    other.restore(checkpoint)
    with torch.no_grad():
        other.model[0].weight[0, 0] += 1e-3
    with pytest.raises(ModelMismatchError, match="nowhere on the path of 9 steps"):
        other.train(12, tmp_path / "run")
    forgotten = Run()
    forgotten.model.load_state_dict(checkpoint["model"])
    forgotten.ema.load_state_dict(checkpoint["ema"])
    with pytest.raises(ModelMismatchError, match="after step 6, and the optimizer's state is not"):
        forgotten.train(12, tmp_path / "run")
    with pytest.raises(StoreError, match="a finished recording of 9 steps, and the weights are those of its start"):
        Run().train(12, tmp_path / "run")
    different = Run("adam")
    with pytest.raises(StoreError, match="under the update rule 'SGD'"):
        different.train(12, tmp_path / "run")
    assert len(DiskStore.open(tmp_path / "run")) == 9  # refusing changes nothing


def test_other_parameters_in_training(tmp_path: Path) -> None:
    run = Run()
    _, checkpoint = run.train(9, tmp_path / "run", at=6)
    other = Run()
    other.restore(checkpoint)
    other.optimizer = torch.optim.SGD(other.model[3].parameters(), lr=0.05)
    for p in other.model[0].parameters():
        p.requires_grad_(False)
    with pytest.raises(ModelMismatchError, match=r"the record of 6 parameters, and 4 are trained now"):
        other.train(12, tmp_path / "run")


def test_another_loss_or_reduction(tmp_path: Path) -> None:
    run = Run()
    run.train(3, tmp_path / "run")
    again = Run()
    recorder = pk.KernelRecorder(
        again.model, again.optimizer, nn.CrossEntropyLoss(label_smoothing=0.1), data=(again.X, again.y + 0),
        store=tmp_path / "run", reduction="sum",
    )  # fmt: skip
    with pytest.raises(ModelMismatchError, match=r"label_smoothing. is 0.1, not 0.0.*reduction.*averages"):
        recorder.start()


def test_reader_while_writing(tmp_path: Path) -> None:
    run = Run()
    recorder = pk.KernelRecorder(
        run.model, run.optimizer, CE, data=(run.X, run.y), store=DiskStore(tmp_path / "run", flush_every=2)
    )
    seen = []
    with recorder:
        for s in range(12):
            x, target = recorder.batch([s % SAMPLES, 1, 2, 5])
            run.optimizer.zero_grad()
            CE(run.model(x), target).backward()
            run.optimizer.step()
            reader = DiskStore.open(tmp_path / "run")
            seen.append(len(reader))
            assert not reader.verify()
    time.sleep(0)
    assert seen == sorted(seen) and reader.refresh() == 12
