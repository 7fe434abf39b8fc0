"""Steps trained again from keyframes, against copies of the weights that the loop itself made, and the full record."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pathkernel as pk
from pathkernel import errors
from pathkernel.recording.keyframes import GradientWatch, is_tried
from pathkernel.recording.live import LiveParameters
from pathkernel.runtime.checksum import _sums, checksum
from pathkernel.trajectory.memory import MemoryStore
from pathkernel.trajectory.replay import Replay, ReplayStore
from pathkernel.trajectory.schedule import RunSize, Schedule
from tests.cases import OPTIMIZERS, generator, make_inputs

CE = nn.CrossEntropyLoss()
STEPS, EVERY = 11, 4


@dataclass
class Run:
    """A finished run and the weights that the loop copied after every step."""

    model: nn.Module
    trajectory: pk.Trajectory
    points: list[torch.Tensor]
    warnings: list[str]

    @property
    def inner(self) -> list[Any]:
        store = self.trajectory.store
        assert isinstance(store, ReplayStore) and isinstance(store.inner, MemoryStore)
        return store.inner._steps


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def model_of(dropout: bool = False, norm: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.ReLU(), *([nn.Dropout(0.4)] * dropout)]
        return nn.Sequential(*layers, nn.Linear(8, 3))


def train(
    schedule: Schedule | None,
    optimizer: str = "adamw",
    *,
    dropout: bool = False,
    norm: bool = False,
    parts: int = 1,
    divided: bool = True,
    clip: float | None = None,
    closure: bool = False,
    autocast: bool = False,
    augment: bool = False,
    edit: Any = None,
    between: Any = None,
    steps: int = STEPS,
    make_optimizer: Any = None,
    **options: Any,
) -> Run:
    """A float32 training run whose loop does one more thing than the plain one."""
    model = model_of(dropout, norm)
    X, y = make_inputs(20, dtype=torch.float32), torch.randint(3, (20,), generator=generator(2))
    opt = (make_optimizer or OPTIMIZERS[optimizer])(model.parameters())
    order, points = generator(3), []
    torch.manual_seed(4)

    def passes() -> torch.Tensor:
        opt.zero_grad()
        for _ in range(parts):
            ids = torch.randint(20, (5,), generator=order)
            noisy = X[ids] + 0.1 * torch.randn(5, 4, generator=order) if augment else None
            x, target = recorder.batch(ids, inputs=noisy)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                value = CE(model(x), target)
            (value / parts if divided else value).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if edit is not None:
            edit(len(points), model, recorder)
        return value

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pk.KernelRecorder(model, opt, CE, data=(X, y), schedule=schedule, **options) as recorder:
            for step in range(steps):
                if closure:
                    opt.step(passes)
                else:
                    passes()
                    opt.step()
                points.append(flat(model))
                if between is not None:
                    between(step, model, recorder)
    model.eval()
    return Run(model, recorder.trajectory, points, [str(w.message) for w in caught])


def assert_same_steps(run: Run, full: Run) -> None:
    """Every number of every step to the last bit."""
    assert len(run.trajectory) == len(full.trajectory)
    for step, expected in zip(run.trajectory.steps(), full.trajectory.steps(), strict=True):
        for name in ("before", "after", "gradient"):
            assert torch.equal(getattr(step, name), getattr(expected, name)), (step.index, name)
        assert step.active == expected.active and step.groups == expected.groups
        assert step.hyperparameters == expected.hyperparameters
        assert [name for name, _ in step.changes] == [name for name, _ in expected.changes]
        assert dict(step.frozen).keys() == dict(expected.frozen).keys()
        for name, values in expected.frozen.items():
            for key, value in values.items():
                found = step.frozen[name][key]
                same = torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
                assert same, (step.index, name, key)


REPLAYED = {
    "plain": {},
    "dropout": {"dropout": True},
    "batch_norm": {"norm": True},
    "accumulation": {"parts": 3},
    "accumulation_undivided": {"parts": 2, "divided": False},
    "closure": {"closure": True},
    "autocast": {"autocast": True},
    "augmented": {"augment": True},
}


@pytest.mark.parametrize("name", REPLAYED)
def test_every_step_comes_out_again_to_the_last_bit(name: str) -> None:
    run, full = (train(schedule, **REPLAYED[name]) for schedule in (Schedule(keyframes=EVERY), None))
    assert not run.warnings and all(step.replay for step in run.inner)
    for step, point in zip(run.trajectory.steps(), run.points, strict=True):
        assert torch.equal(step.after, point)
    assert_same_steps(run, full)


@pytest.mark.parametrize(
    "optimizer", [*OPTIMIZERS, "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop"]
)
def test_every_optimizer(optimizer: str) -> None:
    make = None if optimizer in OPTIMIZERS else getattr(torch.optim, optimizer)
    run, full = (train(schedule, optimizer, make_optimizer=make) for schedule in (Schedule(keyframes=EVERY), None))
    assert not run.warnings
    assert_same_steps(run, full)


def test_shares_predictions_and_kernels_are_those_of_the_full_record() -> None:
    run, full = (train(schedule, dropout=True) for schedule in (Schedule(keyframes=EVERY), None))
    X = make_inputs(3, dtype=torch.float32, seed=9)
    one, other = (pk.KernelMachine(r.trajectory).explain(X, outputs=0) for r in (run, full))
    np.testing.assert_array_equal(one.shares, other.shares)
    assert one.relative_residual < 1e-5
    machines = [pk.KernelMachine(r.trajectory).decision_function(X) for r in (run, full)]
    np.testing.assert_array_equal(*machines)
    np.testing.assert_array_equal(*[pk.PathKernel(r.trajectory)(X) for r in (run, full)])


def test_neighbours_share_one_tensor_also_across_keyframes() -> None:
    run = train(Schedule(keyframes=EVERY))
    steps = list(run.trajectory.steps())
    assert all(one.after is other.before for one, other in pairwise(steps))
    backwards = list(run.trajectory.segments(reverse=True))
    assert all(one.start is other.end for one, other in pairwise(backwards))
    assert len(run.trajectory.store._blocks) <= 2  # type: ignore[attr-defined]


def test_a_sweep_backward_replays_each_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(Schedule(keyframes=EVERY))
    taken: list[int] = []
    take = Replay.take
    monkeypatch.setattr(Replay, "take", lambda self, step: (taken.append(step.index), take(self, step))[1])
    list(run.trajectory.segments(reverse=True))
    assert sorted(taken) == list(range(STEPS))


def test_between_keyframes_no_vector_is_kept() -> None:
    run = train(Schedule(keyframes=EVERY))
    size = run.trajectory.layout.size
    for step in run.inner:
        assert step.after.numel() == step.gradient.numel() == 0
        assert step.before.numel() == (size if step.index % EVERY == 0 else 0)
        assert step.before.untyped_storage().nbytes() < 2**20 or step.index % EVERY == 0
    stated = Schedule(keyframes=EVERY).bytes_per_step(RunSize(size, STEPS, batch_size=5))
    tensors = [v for s in run.inner for own in s.frozen.values() for v in own.values() if isinstance(v, torch.Tensor)]
    measured = sum(t.nbytes for t in tensors) + sum(s.before.nbytes + s.batches[0].ids.nbytes for s in run.inner)
    assert measured + 32 * STEPS == pytest.approx(stated * STEPS, rel=0.15)  # three keyframes for eleven steps


# -- what a replay cannot know ---------------------------------------------------------------------------------------


def test_clipped_gradients_are_stored_with_one_warning() -> None:
    run, full = (train(schedule, clip=0.05) for schedule in (Schedule(keyframes=EVERY), None))
    assert len(run.warnings) == 1 and "do not give its gradient again to the last bit" in run.warnings[0]
    assert all(step.replay and step.gradient.numel() for step in run.inner)
    assert_same_steps(run, full)


def test_an_edit_of_one_step_is_stored_for_that_step() -> None:
    def clip_once(step: int, model: nn.Module, recorder: pk.KernelRecorder) -> None:
        if step == 6:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    run, full = (train(schedule, edit=clip_once) for schedule in (Schedule(keyframes=EVERY), None))
    assert [step.index for step in run.inner if step.gradient.numel()] == [6]
    assert_same_steps(run, full)


def test_named_noise_on_gradients() -> None:
    def noise(step: int, model: nn.Module, recorder: pk.KernelRecorder) -> None:
        if step >= 5:
            with recorder.channel("noise"):
                model[0].weight.grad += 0.01

    run, full = (train(schedule, edit=noise) for schedule in (Schedule(keyframes=EVERY), None))
    assert_same_steps(run, full)
    step = run.trajectory.store.read(7)
    assert torch.equal(step.gradient_changes["noise"], full.trajectory.store.read(7).gradient_changes["noise"])


@pytest.mark.parametrize("through_data", [False, True], ids=["in_place", "data"])
def test_changes_outside_the_optimizer(through_data: bool) -> None:
    def shrink(step: int, model: nn.Module, recorder: pk.KernelRecorder) -> None:
        if step in (2, 3, 6, STEPS - 1):
            with recorder.channel("shrink"), torch.no_grad():
                (model[0].weight.data if through_data else model[0].weight).mul_(0.9)
        if step == 8:
            model[2].bias.data[1] += 1e-3

    run, full = (train(schedule, between=shrink) for schedule in (Schedule(keyframes=EVERY), None))
    assert_same_steps(run, full)
    assert [name for name, _ in run.trajectory.tail] == ["shrink"]
    for one, other in zip(run.trajectory.segments(), full.trajectory.segments(), strict=True):
        assert one.channel == other.channel and torch.equal(one.end, other.end)


def test_a_skipped_step_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model, X, y = model_of(), make_inputs(20, dtype=torch.float32), torch.randint(3, (20,), generator=generator(2))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, opt, CE, data=(X, y), schedule=Schedule(keyframes=EVERY)) as recorder:
        for step in range(6):
            x, target = recorder.batch([step, step + 1])
            opt.zero_grad()
            CE(model(x), target).backward()
            if step != 3:
                opt.step()
    assert [s.batches[0].ids.tolist()[0] for s in recorder.trajectory.steps()] == [0, 1, 2, 4, 5]
    assert torch.equal(recorder.trajectory.store.read(4).after, flat(model))


class Restless(torch.optim.SGD):
    """SGD that steps by a little more each time, and forgets how much when it is copied."""

    def step(self, closure: Any = None) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p -= group["lr"] * (1 + 0.1 * self.calls) * p.grad


def test_an_optimizer_that_steps_otherwise_is_stored_in_full_with_one_warning() -> None:
    def make(parameters: Any) -> Restless:
        optimizer = Restless(parameters, lr=0.1)
        optimizer.calls = 1
        return optimizer

    run, full = (
        train(schedule, make_optimizer=make, rule="elementwise") for schedule in (Schedule(keyframes=EVERY), None)
    )
    assert len(run.warnings) == 1 and "Step 0 of elementwise convention does not come out again" in run.warnings[0]
    assert not any(step.replay for step in run.inner)
    for step, point in zip(run.trajectory.steps(), full.points, strict=True):
        assert torch.equal(step.after, point)


def test_recording_goes_on_after_a_break() -> None:
    model, X, y = model_of(), make_inputs(20, dtype=torch.float32), torch.randint(3, (20,), generator=generator(2))
    opt = torch.optim.AdamW(model.parameters())
    recorder = pk.KernelRecorder(model, opt, CE, data=(X, y), schedule=Schedule(keyframes=EVERY))
    points = []
    for _ in range(3):
        with recorder:
            for step in range(3):
                x, target = recorder.batch([step, 2 * step + 1])
                opt.zero_grad()
                CE(model(x), target).backward()
                opt.step()
                points.append(flat(model))
        with torch.no_grad():
            model[0].bias += 0.01
        points[-1] = points[-1], flat(model)
    steps = list(recorder.trajectory.steps())
    assert [step.index for step in recorder.trajectory.store.inner._steps if step.before.numel()] == [0, 3, 6]
    for step, following in zip(steps[2::3], steps[3::3], strict=False):
        end, moved = points[step.index]
        assert torch.equal(step.after, end) and torch.equal(following.before, moved)


# -- every step is trained once for all that is computed ---------------------------------------------------------------

LONG = 7 * EVERY  # more blocks than a store keeps

COMPUTATIONS: dict[str, Any] = {
    "explain": lambda run, X: pk.KernelMachine(run).explain(X),
    "explain by module": lambda run, X: pk.KernelMachine(run).explain(X, by="module"),
    "explain, adaptive": lambda run, X: pk.KernelMachine(run, quadrature="adaptive").explain(X),
    "ensemble": lambda run, X: pk.KernelMachine(run, form="ensemble").explain(X),
    "decision function": lambda run, X: pk.KernelMachine(run).decision_function(X),
    "path kernel": lambda run, X: pk.PathKernel(run)(X),
    "preconditioned path kernel": lambda run, X: pk.PathKernel(run, preconditioner="optimizer")(X),
    "path kernel by length": lambda run, X: pk.PathKernel(run, measure="arc_length")(X),
    "path kernel by length, Gauss": lambda run, X: pk.PathKernel(
        run, measure="arc_length", quadrature=pk.GaussLegendre(2), outputs="full"
    )(X),
}


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("what", COMPUTATIONS)
def test_each_step_is_trained_once(what: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(Schedule(keyframes=EVERY), optimizer, steps=LONG)
    taken, take = [], Replay.take
    monkeypatch.setattr(Replay, "take", lambda self, step: taken.append(step.index) or take(self, step))
    COMPUTATIONS[what](run.trajectory, make_inputs(3, dtype=torch.float32))
    assert sorted(taken) == list(range(LONG))


@pytest.mark.parametrize("steps", [None, 5])
@pytest.mark.parametrize("quadrature", ["left", "trapezoid", "midpoint"])
def test_nodes_that_are_found_along_the_way_are_those_of_the_full_record(quadrature: str, steps: int | None) -> None:
    X, options = make_inputs(3, dtype=torch.float32), {"measure": "arc_length", "quadrature": quadrature}
    run, full = (train(each, "adamw", steps=LONG).trajectory for each in (Schedule(keyframes=EVERY), None))
    kernel, expected = (pk.PathKernel(each, steps=steps, **options) for each in (run, full))
    found = kernel(X)
    np.testing.assert_array_equal(found, expected(X))
    np.testing.assert_array_equal(kernel(X), found)  # with nodes that are known
    np.testing.assert_array_equal(pk.PathKernel(run, steps=steps, **options).diagonal(X), expected.diagonal(X))
    told = [[(node.position, node.time, node.weight, node.number) for node in k.nodes] for k in (kernel, expected)]
    assert told[0] == told[1]
    fresh = pk.PathKernel(run, steps=steps, **options)
    assert repr(fresh) == repr(kernel)


def test_a_kernel_by_length_is_of_the_path_at_the_time_it_was_made() -> None:
    kernels: list[pk.PathKernel] = []

    def between(step: int, model: nn.Module, recorder: Any) -> None:
        if step == 2 * EVERY - 1:
            kernels.append(pk.PathKernel(recorder.trajectory, measure="arc_length"))

    X = make_inputs(3, dtype=torch.float32)
    train(Schedule(keyframes=EVERY), "adamw", steps=LONG, between=between)
    short = train(None, "adamw", steps=2 * EVERY).trajectory
    np.testing.assert_array_equal(kernels[0](X), pk.PathKernel(short, measure="arc_length")(X))


@pytest.mark.parametrize("what", ["explain", "decision function"])
@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_memory_that_was_edited_at_a_keyframe_is_followed(what: str, factor: float) -> None:
    """The same as of a full record, in which memory is carried from step to step."""

    def run(schedule: Schedule | None) -> Run:
        kept: list[torch.optim.Optimizer] = []

        def make(parameters: Any) -> torch.optim.Optimizer:
            kept.append(torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
            return kept[0]

        def between(step: int, model: nn.Module, recorder: Any) -> None:
            if step + 1 in (EVERY, 5 * EVERY):
                for state in kept[0].state.values():
                    state["momentum_buffer"].mul_(factor)

        return train(schedule, make_optimizer=make, between=between, steps=LONG)

    X = make_inputs(3, dtype=torch.float32)
    runs = [run(schedule) for schedule in (Schedule(keyframes=EVERY), None)]
    found, expected = (COMPUTATIONS[what](one.trajectory, X) for one in runs)
    if what == "decision function":
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        return
    np.testing.assert_allclose(found.shares, expected.shares, rtol=1e-4, atol=1e-6)
    assert found.channels.keys() == expected.channels.keys() and "unexplained" not in found.channels


# -- a replay that differs is an error, never a number ---------------------------------------------------------------


def broken(run: Run, index: int, **changes: Any) -> None:
    store = run.trajectory.store.inner  # type: ignore[attr-defined]
    store._steps[index] = replace(store._steps[index], **changes)


@pytest.mark.parametrize("index", [0, 5, STEPS - 1])
def test_the_first_step_that_differs_is_named(index: int) -> None:
    run = train(Schedule(keyframes=EVERY))
    batch = run.inner[index].batches[0]
    broken(run, index, batches=(replace(batch, cotangents=1.01 * batch.cotangents),))
    with pytest.raises(errors.TrajectoryError, match=f"Step {index} came out differently") as caught:
        run.trajectory.store.read(STEPS - 1 if index == STEPS - 1 else index)
    assert "rounding depends on the number of threads" in caught.value.expected
    assert "Schedule(every=1)" in caught.value.write


def test_one_bit_of_a_keyframe_is_seen() -> None:
    for what in ("before", "state"):
        run = train(Schedule(keyframes=EVERY))
        keyframe = run.inner[EVERY]
        if what == "before":
            theta = keyframe.before.clone()
            theta[3] = torch.nextafter(theta[3], torch.tensor(9.0))
            broken(run, EVERY, before=theta)
            first = EVERY - 1  # the block before ends there
        else:
            moment = keyframe.frozen["0.weight"]["exp_avg"]
            moment[0, 0] *= 1.01
            first = EVERY
        with pytest.raises(errors.TrajectoryError, match=f"Step {first} came out differently"):
            list(run.trajectory.steps())


def test_a_gradient_is_compared_where_theta_does_not_tell() -> None:
    """Steps so small that θ stays where it is, whatever the gradient."""
    run = train(Schedule(keyframes=EVERY), make_optimizer=lambda p: torch.optim.SGD(p, lr=1e-30))
    where = run.inner[6].batches[0].ids[0]
    sample = run.trajectory.data._inputs[where]
    sample[0] = torch.nextafter(sample[0], torch.tensor(9.0))
    assert run.points[0].equal(run.points[-1])
    with pytest.raises(errors.TrajectoryError, match=r"Step \d+ came out differently"):
        run.trajectory.store.read(6)


def test_other_data_or_threads_are_not_replayed() -> None:
    run = train(Schedule(keyframes=EVERY))
    run.trajectory.data._inputs[:] += 1e-3
    with pytest.raises(errors.TrajectoryError, match="Step 0 came out differently"):
        run.trajectory.store.read(2)
    run.trajectory.store.threads = 7  # type: ignore[attr-defined]
    with pytest.raises(errors.TrajectoryError, match=r"recorded with 7 threads, now 1") as caught:
        run.trajectory.store.read(2)
    assert "torch.set_num_threads(7)" in caught.value.write


def test_what_only_a_full_record_can_follow_is_refused() -> None:
    model = model_of()
    X, y = make_inputs(20, dtype=torch.float32), torch.zeros(20).long()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    opt = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(errors.RecordingError, match="`averages` were given, and `schedule=Every"):
        pk.KernelRecorder(model, opt, CE, data=(X, y), schedule=Schedule(every=2), averages={"swa": averaged})
    model[2].requires_grad_(False)
    with pk.KernelRecorder(model, opt, CE, data=(X, y), schedule=Schedule(keyframes=2), audit_every=0) as recorder:
        x, target = recorder.batch([1, 2])
        CE(model(x), target).backward()
        opt.step()
        opt.add_param_group({"params": list(model[2].parameters())})
        recorder.batch([1, 2])
        with pytest.raises(errors.RecordingError, match="27 parameters joined the optimizer during a recording"):
            opt.step()
    assert len(recorder.trajectory) == 1
    assert torch.equal(recorder.trajectory.store.read(0).after, flat(model[0]))


# -- checksums -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_checksum_sees_every_bit_and_no_layout(dtype: torch.dtype) -> None:
    rows = [torch.randn(n, generator=generator(n)).to(dtype) for n in (1, 3, 8, 17)]
    expected = checksum(rows)
    assert 0 <= expected < 2**32 and checksum([row.clone() for row in rows]) == expected
    one = torch.cat(rows)
    assert checksum(one.split([len(row) for row in rows])) == expected  # other offsets in memory
    signed = {8: torch.int64, 4: torch.int32, 2: torch.int16}[one.element_size()]
    for row in rows:
        for entry in range(len(row)):
            for bit in range(8 * row.element_size() - 1):
                bits = row.view(signed)
                bits[entry] ^= 1 << bit
                assert checksum(rows) != expected
                bits[entry] ^= 1 << bit
    assert checksum([rows[1], rows[0], *rows[2:]]) != expected
    turned = torch.arange(6.0).reshape(2, 3).to(dtype)
    assert checksum([turned.t()]) == checksum([turned.t().contiguous()]) != checksum([turned])
    assert checksum([]) == 0


def test_a_checksum_on_another_device() -> None:
    """Two sums of each tensor, for which no more has to be copied; seen here through what they are made of."""
    flat = torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32).view(torch.float32)
    assert _sums(flat).tolist() == [1 + 3 + (2 + 4 << 32), 5]
    assert _sums(flat[1:]).tolist() == [2 + 4 + (3 + 5 << 32), 0]  # not where eight bytes begin


# -- whether gradients were touched ----------------------------------------------------------------------------------


class Watched:
    """A network of two branches whose gradients are watched."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2)
        self.model = nn.ModuleList([self.one, self.two])
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.watch = GradientWatch(LiveParameters(dict(self.model.named_parameters()), optimizer))
        self.watch.listen()

    def backward(self, *branches: nn.Module) -> None:
        x = torch.randn(4, 3)
        torch.stack([branch(x).square().sum() for branch in branches]).sum().backward()

    def stepped(self) -> bool:
        touched = self.watch.touched(self.watch.live.gradient_checksum())
        self.watch.listen()
        return touched


def test_gradients_that_arrived_are_not_touched() -> None:
    watched = Watched()
    for to_none in (True, False, True):
        watched.backward(watched.one, watched.two)
        watched.backward(watched.two, watched.one)  # further micro-batches
        assert not watched.stepped() and len(watched.watch._handles) == 1
        watched.model.zero_grad(set_to_none=to_none)


@pytest.mark.parametrize("how", ["in_place", "through_data", "another", "put_there", "from_before"])
def test_gradients_that_were_touched(how: str) -> None:
    watched = Watched()
    watched.backward(watched.one, watched.two)
    assert not watched.stepped()
    watched.one.zero_grad() if how == "from_before" else watched.model.zero_grad()
    watched.backward(*([watched.one] if how in ("put_there", "from_before") else [watched.one, watched.two]))
    if how == "in_place":
        nn.utils.clip_grad_norm_(watched.model.parameters(), 1e-3)
    elif how == "through_data":
        watched.two.weight.grad.data[-1, -1] *= 0.5
    elif how == "another":
        watched.two.bias.grad = watched.two.bias.grad.clone()
    elif how == "put_there":
        watched.two.bias.grad = torch.ones(2)
    assert watched.stepped()
    watched.model.zero_grad()
    watched.backward(watched.one, watched.two)
    assert not watched.stepped()


def test_a_pass_without_the_parameter_that_is_watched() -> None:
    watched = Watched()
    watched.backward(watched.two)
    assert watched.stepped()  # nobody can tell; from now on every parameter is watched
    for branches in ([watched.two], [watched.one], [watched.one, watched.two]):
        watched.model.zero_grad()
        watched.backward(*branches)
        assert not watched.stepped()


def test_hooks_of_others_that_write_on_gradients() -> None:
    def halve(p: torch.Tensor) -> None:
        p.grad.mul_(0.5)

    watched = Watched()
    watched.watch.stop()
    watched.two.weight.register_post_accumulate_grad_hook(lambda p: None)
    watched.watch.listen()
    assert len(watched.watch._handles) == 4
    watched.two.weight.register_post_accumulate_grad_hook(halve)  # which comes after the one that watches
    watched.backward(watched.one, watched.two)
    assert watched.stepped()


# -- notes -----------------------------------------------------------------------------------------------------------


def test_notes_are_plain_numbers() -> None:
    run = train(Schedule(keyframes=EVERY), parts=3)
    notes = [step.replay for step in run.inner]
    assert [n.keyframe for n in notes] == [EVERY * (i // EVERY) for i in range(STEPS)]
    assert {n.divisor for n in notes} == {1}  # the slopes of each part's loss are on record as they were
    assert all(isinstance(value, int) for step in run.inner for value in vars(step.replay).values())


def test_steps_of_a_known_kind_are_tried_out_now_and_then() -> None:
    assert [s for s in range(300) if is_tried(s, None)] == [0, 1, 4, 16, 64, 256]
    assert [s for s in range(10) if is_tried(s, 3)] == [0, 3, 6, 9] and not any(is_tried(s, 0) for s in range(10))
