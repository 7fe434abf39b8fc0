"""Recorders that are open: forked children, worker processes, slow loops, checkpoints, another recorder beside them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from script_processes import run_script
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.errors import ModelMismatchError, StoreError
from pathkernel.recording.open_recorders import OPEN
from pathkernel.storage.disk import DiskStore
from pathkernel.storage.format import Lock

CE = nn.CrossEntropyLoss()
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(32) % 3
HANGS = 20


class Samples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


class Run:
    def __init__(self, store: Any = None, optimizer: type = torch.optim.SGD, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 3))
        self.optimizer = optimizer(self.model.parameters(), lr=0.01)
        self.recorder = self.another(store, **options)

    def another(self, store: Any = None, **options: Any) -> pk.KernelRecorder:
        return pk.KernelRecorder(self.model, self.optimizer, CE, data=(X, Y), store=store, **options)

    def take(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        CE(self.model(x), y).backward()
        self.optimizer.step()

    def epoch(self, recorder: pk.KernelRecorder | None = None) -> None:
        for x, y in (recorder or self.recorder).batches(8):
            self.take(x, y)

    def hooks(self) -> int:
        modules = [hook for m in self.model.modules() for hook in (m._forward_hooks, m._forward_pre_hooks)]
        steps = [self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks]
        return sum(map(len, [*steps, *modules]))


def in_child(work: Callable[[], Any]) -> int:
    """How a forked child ended: 0 where it did what it should, 14 where it hung."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(HANGS)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


@contextlib.contextmanager
def a_while() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("flush_every", [1, 3, 16])
def test_a_forked_child_trains_on_and_leaves_the_store_to_its_parent(tmp_path: Path, flush_every: int) -> None:
    run = Run(DiskStore(tmp_path / "run", flush_every=flush_every))

    def child() -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(30):
                run.epoch()
            assert run.recorder.flush() == 4
            assert len(list(run.recorder.trajectory.steps())) == 4  # those of before, some of which were not on disk
            with pytest.raises(StoreError, match="being written by another recorder"):
                Run(tmp_path / "run").recorder.start()
            run.recorder.close()
        assert sum("was forked from process" in str(warning.message) for warning in said) == 1
        assert run.hooks() == 0
        with pytest.raises(StoreError, match="of which this one was forked"):
            run.recorder.start()
        beside = run.another(tmp_path / "beside")
        with beside:
            run.epoch(beside)
        assert len(beside.trajectory) == 4

    with run.recorder:
        run.epoch()
        assert in_child(child) == 0
        with pytest.raises(StoreError, match="being written by another recorder"):
            Lock(tmp_path / "run").acquire()  # the child did not give up its parent's lock
        run.epoch()
    opened = pk.Trajectory.open(tmp_path / "run", model=run.model, loss=CE, data=(X, Y))
    again = Run()
    with again.recorder:
        again.epoch()
        again.epoch()
    assert len(opened) == 8
    assert torch.equal(opened.final, again.recorder.trajectory.final)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_that_outlives_its_parents_recording_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    reading, writing = os.pipe()
    with run.recorder:
        run.epoch()
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            signal.alarm(HANGS)
            os.read(reading, 1)  # until the parent is through
            os._exit(0)
    with Lock(tmp_path / "run"):
        pass
    os.close(writing)
    os.close(reading)
    os.waitpid(pid, 0)


def test_persistent_workers_do_not_keep_the_lock(tmp_path: Path) -> None:
    run, loader = Run(), None
    for _ in range(2):
        with (
            a_while(),
            pk.KernelRecorder(run.model, run.optimizer, CE, data=Samples(), store=tmp_path / "run") as recorder,
        ):
            loader = loader or torch.utils.data.DataLoader(
                pk.IndexedDataset(Samples()), batch_size=8, num_workers=1, persistent_workers=True
            )
            for x, y in recorder.track(loader):
                run.take(x, y)
    assert len(recorder.trajectory) == 8


KILLED = """
import sys, time, torch
sys.path[:0] = {paths!r}
from test_open_recorders import *
torch.set_num_threads(1)
run = Run({path!r}, optimizer=torch.optim.{optimizer})
with run.recorder:
    for step in range(1000):
        run.take(*run.recorder.batch(torch.arange(8) + step % 20))
        with run.recorder.channel("clamp"), torch.no_grad():
            run.model[0].weight.clamp_(-0.3, 0.3)
        if step == 20:
            {flush}
            torch.save((run.model.state_dict(), run.optimizer.state_dict()), {path!r} + ".pt")
        print(step, time.time(), flush=True)
        if step >= 20 + {more}:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep({pause})
"""


def killed(path: Path, pause: float = 0.0, flush: str = "pass", more: int = 2, optimizer: str = "Adam") -> list[float]:
    """Run it until it is killed; when steps were taken."""
    here = Path(__file__).resolve()
    script, said = path.with_suffix(".py"), path.with_suffix(".txt")
    script.write_text(
        KILLED.format(
            paths=[str(folder) for folder in (here.parents[2], here.parents[1], here.parent)],
            path=str(path), flush=flush, more=more, pause=pause, optimizer=optimizer,
        )
    )  # fmt: skip
    assert run_script(script, (), path.parent, said, seconds=120) == -signal.SIGKILL, said.read_text()
    return [float(line.split()[1]) for line in said.read_text().splitlines() if line[:1].isdigit()]


def restored(path: Path, store: Any, optimizer: str = "Adam") -> Run:
    run = Run(store, getattr(torch.optim, optimizer))
    weights, state = torch.load(path.with_suffix(".pt"))
    run.model.load_state_dict(weights)
    run.optimizer.load_state_dict(state)
    return run


def test_no_more_than_the_last_second_of_a_slow_loop_is_lost(tmp_path: Path) -> None:
    taken = killed(tmp_path / "run", pause=0.1, more=9)  # 30 steps: the second block is not full
    store = DiskStore.open(tmp_path / "run")
    lost = taken[len(store) :]
    assert not lost or taken[-1] - lost[0] <= 1.2  # the last has just been taken; a busy machine writes later
    assert len(store) > 16 and not store.verify()


def test_slow_steps_are_written_while_no_other_comes(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.recorder:
        run.epoch()
        deadline = time.monotonic() + HANGS
        while len(DiskStore.open(tmp_path / "run")) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(DiskStore.open(tmp_path / "run")) == 4
        run.epoch()
        assert [step.index for step in run.recorder.trajectory.steps()] == list(range(8))
    assert not DiskStore.open(tmp_path / "run").verify()


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_after_flush_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path, optimizer: str) -> None:
    killed(tmp_path / "run", flush="assert run.recorder.flush() == 21", optimizer=optimizer)
    assert len(DiskStore.open(tmp_path / "run")) == 21
    run = restored(tmp_path / "run", tmp_path / "run", optimizer)
    with run.recorder:  # the clamp after the last step is there, too
        assert len(run.recorder.trajectory) == 21
        run.epoch()
    opened = pk.Trajectory.open(tmp_path / "run", model=run.model, loss=CE, data=(X, Y))
    assert len(opened) == 25 and not opened.store.verify()


@pytest.mark.parametrize(
    ("optimizer", "said"), [("Adam", "is {} steps? newer than the {} steps"), ("SGD", "nowhere on the path of {1} st")]
)
def test_a_checkpoint_newer_than_what_is_on_disk(tmp_path: Path, optimizer: str, said: str) -> None:
    killed(tmp_path / "run", optimizer=optimizer)
    kept = len(DiskStore.open(tmp_path / "run"))
    assert kept < 21  # a block of 16, if that was written in time
    said = said.format(21 - kept, kept)
    run = restored(tmp_path / "run", tmp_path / "run", optimizer)
    with pytest.raises(ModelMismatchError, match=said + r".*`store=`.*recorder\.flush\(\)"):
        run.recorder.start()
    beside = run.another(tmp_path / "beside")
    with beside:
        run.epoch(beside)
    assert len(beside.trajectory) == 4


def test_steps_after_flush_take_its_end_away(tmp_path: Path) -> None:
    run = Run(DiskStore(tmp_path / "run", flush_every=2))
    with run.recorder:
        run.epoch()
        assert run.recorder.flush() == 4
        at_flush = DiskStore.open(tmp_path / "run")
        assert at_flush.header is not None and at_flush.header.end is not None
        assert at_flush.end_values() is not None
        run.epoch()
        run.recorder.trajectory.store.flush()
        later = DiskStore.open(tmp_path / "run")
        assert len(later) == 8 and later.header is not None and later.header.end is None
        assert at_flush.refresh() == 8 and at_flush.end_values() is None
        assert run.recorder.flush() == run.recorder.flush() == 8
    assert [path.name for path in (tmp_path / "run").glob("end-*")] != []
    assert len(list((tmp_path / "run").glob("end-*"))) == 1


@pytest.mark.parametrize("schedule", [None, pk.Schedule(keyframes=3), pk.Schedule(every=3)])
@pytest.mark.parametrize("on_disk", [False, True])
def test_flush_says_how_many_steps_there_are(tmp_path: Path, schedule: Any, on_disk: bool) -> None:
    run = Run(tmp_path / "run" if on_disk else None, schedule=schedule)
    assert run.recorder.flush() == 0
    with run.recorder:
        run.epoch()
        steps = run.recorder.flush()
        assert steps == (2 if schedule == pk.Schedule(every=3) else 4)
        assert not on_disk or len(DiskStore.open(tmp_path / "run")) == steps
    assert run.recorder.flush() == steps


def clipped(weight: Tensor, step: int) -> None:
    weight.data.view(-1)[600:].clamp_(-0.3, 0.3)


def single(weight: Tensor, step: int) -> None:
    if step == 6:
        weight.data.view(-1)[-1] += 1e-3


@pytest.mark.parametrize("edit", [clipped, single])
def test_changes_through_data_between_keyframes_are_seen(edit: Callable[[Tensor, int], None]) -> None:
    def train(recorder: pk.KernelRecorder, run: Run) -> pk.Trajectory:
        with recorder:
            for step in range(14):
                run.take(*recorder.batch(torch.arange(8) + step))
                edit(run.model[0].weight, step)
        return recorder.trajectory

    run, whole = Run(schedule=pk.Schedule(keyframes=8)), Run()
    with pytest.warns(UserWarning, match="changed outside the optimizer before step") as said:
        found = train(run.recorder, run)
    assert len(said) == 1
    expected = train(whole.recorder, whole)
    for one, other in zip(found.steps(), expected.steps(), strict=True):
        assert torch.equal(one.before, other.before) and torch.equal(one.gradient, other.gradient)
        assert len(one.changes) == len(other.changes)
    assert (pk.PathKernel(found)(X[:3]) == pk.PathKernel(expected)(X[:3])).all()


@pytest.mark.parametrize("everywhere", [False, True])
def test_changes_of_gradients_through_data_between_keyframes_are_seen(everywhere: bool) -> None:
    def train(recorder: pk.KernelRecorder, run: Run) -> pk.Trajectory:
        with recorder:
            for step in range(14):
                x, y = recorder.batch(torch.arange(8) + step)
                self_made = everywhere and step == 1
                run.optimizer.zero_grad()
                CE(run.model(x), y).backward()
                if self_made:  # which has every parameter watched from then on
                    run.model[0].bias.grad.mul_(1.0)
                if step % 7 == 3:
                    run.model[0].weight.grad.data.view(-1)[700] *= 0.5
                run.optimizer.step()
        return recorder.trajectory

    run, whole = Run(schedule=pk.Schedule(keyframes=8), audit_every=0), Run(audit_every=0)
    with pytest.warns(UserWarning, match="do not give its gradient again"):
        found = train(run.recorder, run)
    for one, other in zip(found.steps(), train(whole.recorder, whole).steps(), strict=True):
        assert torch.equal(one.before, other.before) and torch.equal(one.gradient, other.gradient)


def test_a_cell_that_is_run_twice(tmp_path: Path) -> None:
    run = Run()
    first = run.another(tmp_path / "run")
    first.start()
    run.epoch(first)
    second = run.another(tmp_path / "run")
    with pytest.warns(RuntimeWarning, match=r"started .* \(4 steps, in `.*run`\).*`recorder.close\(\)`") as said:
        second.start()
    assert len(said) == 1 and f"{Path(__file__).name}:" in str(said[0].message)
    run.epoch(second)
    second.close()
    assert len(second.trajectory) == 8 and run.hooks() == 0 and first not in OPEN and second not in OPEN


def test_a_cell_that_makes_everything_anew_on_the_same_path(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.recorder.start()
    run.epoch()
    again = Run(tmp_path / "run")
    refused = pytest.raises(StoreError, match="a finished recording of 4")
    with pytest.warns(RuntimeWarning, match="was still open"), refused:
        again.recorder.start()
    assert run.hooks() == again.hooks() == 0
    assert len(pk.Trajectory.open(tmp_path / "run", model=run.model, loss=CE, data=(X, Y))) == 4


def test_another_recorder_within_the_block_of_the_first(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.recorder:
        run.epoch()
        with pytest.raises(StoreError, match=r"KernelRecorder that was started \d\d:\d\d:\d\d at .*\(4 steps, in"):
            Run(tmp_path / "run").recorder.start()
        run.epoch()
    assert len(run.recorder.trajectory) == 8 and run.hooks() == 0
    with run.another(tmp_path / "run") as third:
        run.epoch(third)
    assert len(third.trajectory) == 12


def test_an_early_end_leaves_no_hooks() -> None:
    run = Run()
    with pytest.raises(KeyError), run.recorder:
        for x, y in run.recorder.batches(8):
            run.take(x, y)
            raise KeyError
    assert run.hooks() == 0 and len(run.recorder.trajectory) == 1
    with run.recorder:
        next(run.recorder.batches(8))  # left half-way
        run.epoch()
    assert run.hooks() == 0 and len(run.recorder.trajectory) == 5
