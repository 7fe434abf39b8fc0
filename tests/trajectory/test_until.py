"""The first part of a path is the run that stopped there: the machine of the checkpoint that was kept."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import generator, make_inputs
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import pathkernel as pk
from pathkernel.errors import InputError, ModelMismatchError, TrajectoryError

CE = nn.CrossEntropyLoss()
SAMPLES, STEPS = 12, 7
QUERIES = make_inputs(4, dtype=torch.float64, seed=8)
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
}


class Run:
    """Training with batch normalisation, a clamp between steps 3 and 4, and the checkpoints that a loop saves."""

    def __init__(self, optimizer: str = "momentum", averages: Callable[[nn.Module], Any] | None = None, **options: Any):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.data = make_inputs(SAMPLES, dtype=torch.float64), torch.randint(3, (SAMPLES,), generator=generator(2))
        self.average = None if averages is None else averages(self.model)
        named = None if self.average is None else {"ema": self.average}
        self.kept = [self._checkpoint()]
        optimizer_ = OPTIMIZERS[optimizer](self.model.parameters())
        recorder = pk.KernelRecorder(self.model, optimizer_, CE, data=self.data, averages=named, **options)
        with recorder:
            for step in range(STEPS):
                x, y = recorder.batch((torch.arange(5) + 2 * step) % SAMPLES)
                optimizer_.zero_grad()
                CE(self.model.train()(x), y).backward()
                optimizer_.step()
                if self.average is not None:
                    self.average.update_parameters(self.model)
                self.kept.append(self._checkpoint())
                if step == 3:
                    with recorder.channel("clamp"), torch.no_grad():
                        self.model[0].weight.clamp_(-0.3, 0.3)
        self.trajectory = recorder.trajectory

    def _checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        average = None if self.average is None else copy.deepcopy(self.average.state_dict())
        return copy.deepcopy(self.model.state_dict()), average

    def outputs(self, step: int, X: Tensor = QUERIES) -> np.ndarray:
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.kept[step][0])
        with torch.no_grad():
            return model.eval()(X).numpy()


def check_at(trajectory: pk.Trajectory, run: Run, step: int) -> None:
    """The machine says what the checkpoint says, and its certificate is rounding."""
    machine, expected = pk.KernelMachine(trajectory, at=step), run.outputs(step)
    np.testing.assert_allclose(machine.decision_function(QUERIES), expected, atol=1e-12)
    np.testing.assert_array_equal(machine.predict(QUERIES), expected.argmax(1))
    why = machine.explain(QUERIES, outputs=1)
    np.testing.assert_allclose(why.output, expected[:, 1], atol=1e-12)
    np.testing.assert_allclose(why.reconstruction, expected[:, 1], atol=1e-12)
    assert np.abs(why.residual).max() < 1e-12
    assert np.abs(why.shares).sum() > 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("level", [pk.Every(), pk.Keyframes(3)], ids=["every", "keyframes"])
def test_machine_of_a_checkpoint(optimizer: str, level: Any) -> None:
    """Every checkpoint of the run, the one before a change under a name among them."""
    run = Run(optimizer, schedule=level)
    for step in (4, 5):
        check_at(run.trajectory, run, step)


def test_end_is_the_state_of_the_checkpoint() -> None:
    """θ and every buffer, to the last bit."""
    run = Run()
    for step in range(STEPS + 1):
        first = run.trajectory.until(step)
        found = {**first.constants, **first.final_buffers, **first.parameters(-1)}
        assert len(first) == step
        assert found.keys() == run.kept[step][0].keys()
        for name, value in run.kept[step][0].items():
            assert torch.equal(found[name], value), (step, name)


@pytest.mark.parametrize("level", [pk.Every(), pk.Keyframes(3)], ids=["every", "keyframes"])
def test_from_disk(tmp_path: Path, level: Any) -> None:
    """A run that was opened again, and one whose network stands elsewhere now."""
    run = Run("adamw", store=tmp_path / "run", schedule=level)
    opened = pk.Trajectory.open(tmp_path / "run", model=run.model, loss=CE, data=run.data)
    run.model.load_state_dict(run.kept[2][0])
    check_at(opened, run, 5)
    with pytest.raises(ModelMismatchError):
        pk.KernelMachine(opened)


def test_shorter_run_has_the_same_shares() -> None:
    """Shares at a step are those of a run that stopped there."""
    run = Run()
    kernel = pk.PathKernel(run.trajectory.until(3))(QUERIES)
    shorter = pk.KernelMachine(run.trajectory, at=3).explain(QUERIES, outputs=0).shares
    model = copy.deepcopy(run.model)
    model.load_state_dict(run.kept[0][0])
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    with pk.KernelRecorder(model, optimizer, CE, data=run.data) as recorder:
        for step in range(3):
            x, y = recorder.batch((torch.arange(5) + 2 * step) % SAMPLES)
            optimizer.zero_grad()
            CE(model.train()(x), y).backward()
            optimizer.step()
    np.testing.assert_allclose(
        shorter, pk.KernelMachine(recorder.trajectory).explain(QUERIES, outputs=0).shares, atol=1e-13
    )
    np.testing.assert_allclose(kernel, pk.PathKernel(recorder.trajectory)(QUERIES), rtol=1e-12)


def test_replays_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block of keyframes only the steps before the end are trained again."""
    from pathkernel.trajectory.replay import Replay

    run, taken = Run(schedule=pk.Keyframes(6), audit_every=0), []
    take = Replay.take
    monkeypatch.setattr(Replay, "take", lambda self, step: (taken.append(step.index), take(self, step))[1])
    first = run.trajectory.until(2)
    assert torch.equal(first.parameters(-1)["0.weight"], run.kept[2][0]["0.weight"])
    assert max(taken, default=0) < 2


def ema(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))


def ema_with_buffers(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)


@pytest.mark.parametrize("average", [ema, ema_with_buffers, AveragedModel])
def test_average_at_a_step(average: Callable[[nn.Module], AveragedModel], tmp_path: Path) -> None:
    """The averaged network as it was then, its buffers copied or averaged."""
    run = Run(averages=average, store=tmp_path / "run")
    opened = pk.Trajectory.open(tmp_path / "run", model=run.model, loss=CE, data=run.data)
    for step in (2, 5):
        averaged = copy.deepcopy(run.average)
        averaged.load_state_dict(run.kept[step][1])
        with torch.no_grad():
            expected = averaged.eval()(QUERIES).numpy()
        for trajectory in (run.trajectory, opened):
            machine = pk.KernelMachine(trajectory, average="ema", at=step)
            np.testing.assert_allclose(machine.decision_function(QUERIES), expected, atol=1e-12)
            why = machine.explain(QUERIES, outputs=0)
            np.testing.assert_allclose(why.reconstruction, expected[:, 0], atol=1e-12)


def test_average_whose_counter_is_rounded() -> None:
    """Cut to a whole number from the very edge of one, it is off by what rounding decides; no evaluation reads it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    x, y = make_inputs(SAMPLES, dtype=torch.float32), torch.randint(3, (SAMPLES,), generator=generator(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    with pk.KernelRecorder(model, optimizer, CE, data=(x, y), averages={"ema": average}) as recorder:
        for step in range(30):
            recorder.announce((torch.arange(6) + step) % SAMPLES)
            model.zero_grad()
            CE(model(x[(torch.arange(6) + step) % SAMPLES]), y[(torch.arange(6) + step) % SAMPLES]).backward()
            optimizer.step()
            average.update_parameters(model)
            if step == 19:
                kept = copy.deepcopy(average)
    with torch.no_grad():
        expected = kept.eval()(QUERIES.float()).numpy()
    machine = pk.KernelMachine(recorder.trajectory, average="ema", at=20)
    np.testing.assert_allclose(machine.decision_function(QUERIES.float()), expected, atol=1e-5)


def test_average_with_keyframes() -> None:
    """Its moves and its machine are those of a record in full, to the last bit."""
    whole, replayed = Run("adamw", averages=ema), Run("adamw", averages=ema, schedule=pk.Keyframes(3))
    one, other = (run.trajectory.averages["ema"] for run in (whole, replayed))
    assert one.updates == other.updates
    assert all(torch.equal(value, other.last[name]) for name, value in one.last.items())
    shares = [
        pk.KernelMachine(run.trajectory, average="ema").explain(QUERIES, outputs=0).shares for run in (whole, replayed)
    ]
    np.testing.assert_array_equal(*shares)


def test_average_whose_buffers_are_found_anew() -> None:
    """After `update_bn` nobody knows what the statistics of an average would have been in mid-run."""
    run = Run(averages=ema)
    update_bn([run.data[0]], run.average)
    run.trajectory.averages["ema"].last = {
        name.removeprefix("module."): value for name, value in run.average.state_dict().items()
    }
    with pytest.raises(TrajectoryError, match=r"running_mean.*of the average 'ema' in mid-run.*at the end"):
        pk.KernelMachine(run.trajectory, average="ema", at=3).predict(QUERIES)
    check_at(run.trajectory, run, 3)


def test_thinned_path() -> None:
    """θ where it was kept, and an error that says where that is."""
    run = Run(schedule=pk.Every(3))
    assert torch.equal(run.trajectory.until(6).parameters(-1)["0.weight"], run.kept[6][0]["0.weight"])
    assert torch.equal(run.trajectory.until(7).parameters(-1)["0.weight"], run.kept[7][0]["0.weight"])
    assert pk.PathKernel(run.trajectory.until(3))(QUERIES).shape == (4, 4)
    with pytest.raises(InputError, match=r"at the steps 0, 3, 6, 7 only, as `Every\(3\)`.*`trajectory.until\(3\)`"):
        run.trajectory.until(5)
    with pytest.raises(TrajectoryError, match="every step"):
        pk.KernelMachine(run.trajectory, at=6)


def test_refusals() -> None:
    """Steps that there are not, an empty path, and a path of which nothing was kept."""
    run = Run()
    for step, write in ((-1, 0), (STEPS + 1, STEPS), (2.0, STEPS), (True, STEPS)):
        with pytest.raises(InputError, match=rf"until step {step} was.*0 to {STEPS}.*until\({write}\)"):
            run.trajectory.until(step)
    with pytest.raises(InputError, match="leave `until` and `at=` out"):
        pk.KernelMachine(run.trajectory, at=-1)
    with pytest.raises(TrajectoryError, match=r"no steps.*`at=1`.*the untrained one"):
        pk.KernelMachine(run.trajectory, at=0)
    for number in (np.bool_(True), torch.tensor(True), torch.tensor(2.0), torch.tensor([1, 2])):
        with pytest.raises(InputError, match="was asked for"):
            run.trajectory.until(number)
    first = run.trajectory.until(2)
    with pytest.raises(TrajectoryError, match="view of what has been recorded"):
        run.trajectory.store.__class__.__mro__[1].until(run.trajectory.store, 2).append(None)
    assert torch.equal(pickle.loads(pickle.dumps(first)).vector(-1), first.vector(-1))
    streamed = Run(schedule=pk.Nothing(), observers=[pk.StreamingGram(QUERIES)])
    with pytest.raises(TrajectoryError, match="streamed"):
        streamed.trajectory.until(2)


def test_steps_as_argmin_gives_them() -> None:
    """Whole numbers of numpy and tensors of one."""
    run = Run()
    for number in (np.int64(3), np.int32(3), torch.tensor(3)):
        assert len(run.trajectory.until(number)) == 3
        check_at(run.trajectory, run, number)


def test_forward_that_was_changed_since() -> None:
    """Another activation is noticed, although the weights may stand anywhere."""
    run = Run()
    run.model[2] = nn.ReLU()
    with pytest.raises(ModelMismatchError, match="at the start of the recording"):
        pk.KernelMachine(run.trajectory, at=3)


@pytest.mark.parametrize("level", [pk.Every(), pk.Keyframes(3)], ids=["every", "keyframes"])
def test_store_is_opened_with_the_checkpoint_that_was_kept(level: Any, tmp_path: Path) -> None:
    """In a later process, where only the best weights are left: ``Trajectory.open(at=step)``."""
    run = Run(schedule=level, store=tmp_path / "run")
    run.model.load_state_dict(run.kept[3][0])
    with pytest.raises(ModelMismatchError, match="at=step"):
        pk.Trajectory.open(tmp_path / "run", model=run.model, data=run.data)
    with pytest.raises(ModelMismatchError, match="other weights than after step 2"):
        pk.Trajectory.open(tmp_path / "run", model=run.model, data=run.data, at=2)
    opened = pk.Trajectory.open(tmp_path / "run", model=run.model, data=run.data, at=3)
    assert len(opened) == 3
    machine = pk.KernelMachine(opened)
    np.testing.assert_allclose(machine.decision_function(QUERIES), run.outputs(3), atol=1e-12)
    why = machine.explain(QUERIES, outputs=1)
    np.testing.assert_allclose(why.reconstruction, run.outputs(3)[:, 1], atol=1e-12)
