"""What a recording meets around its loop: forked children, worker processes, checkpoints that are newer than what is on
disk, weights changed behind its back, and recorders that nobody closed. Whatever waits for ever is ended by an alarm.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _faults_killed import forked
from _faults_moments import in_time
from _faults_table import FAILED, LOST, SURVIVED, WRONG, Bench, Fault, Outcome, first_sentence
from _faults_training import Training, bits, reference
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.errors import ModelMismatchError, PathKernelError
from pathkernel.storage.disk import DiskStore
from pathkernel.trajectory.schedule import Schedule

STEPS = 24
PATIENCE = 20


def child_of(work: Callable[[], Any]) -> int:
    """Run something in a forked child that an alarm ends; how it ended, 0 where it returned."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(PATIENCE)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def forks(bench: Bench) -> Iterator[Outcome]:
    """A fork in the middle of a recording; the child trains on, reads, flushes or closes, and so does its parent."""
    whole = reference("momentum", STEPS)
    for kind in ["train", "read", "close", "flush", "die"] * bench.count(1, 12):
        path, training, at = bench.place(), Training("momentum"), bench.random.randrange(1, STEPS)
        flush_every = bench.random.choice([1, 4, 16])
        recorder = training.recorder(DiskStore(path, flush_every=flush_every))

        def child(kind: str, training: Training, recorder: pk.KernelRecorder, at: int) -> None:
            warnings.simplefilter("ignore")
            if kind == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "read":
                assert [bits(step) for step in recorder.trajectory.steps()] == whole.steps[:at]
            if kind == "flush":
                recorder.flush()
            for _ in training.train(recorder, training.step + 40) if kind == "train" else ():
                pass
            recorder.close()

        with recorder:
            for _ in training.train(recorder, at):
                pass
            status = child_of(partial(child, kind, training, recorder, at))
            for _ in training.train(recorder, STEPS):
                pass
        wrong = whole.wrong(training.opened(path))
        if wrong or len(recorder.trajectory) != STEPS:
            yield Outcome(WRONG, f"the parent's record: {wrong[:3]}")
        elif status != (signal.SIGKILL if kind == "die" else 0):
            yield Outcome(FAILED, f"the child ({kind}) {'hangs' if status == signal.SIGALRM else f'left: {status}'}")
        else:
            yield Outcome(SURVIVED, "the child goes on unrecorded; its parent's record is whole")


class Samples(torch.utils.data.Dataset):
    """The samples of a training run, for worker processes."""

    def __init__(self, training: Training) -> None:
        self.X, self.y = training.X, training.y

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.X[index], self.y[index]


def workers(bench: Bench) -> Iterator[Outcome]:
    """Worker processes of a loader that outlive the recording during which they were started."""
    for ends in ["by itself", "break", "error"] * bench.count(1, 5):
        path, training, loader = bench.place(), Training("momentum"), None
        data = Samples(training)
        for part in range(2):
            try:
                with (
                    in_time(),
                    pk.KernelRecorder(
                        training.model, training.optimizer, training.loss, data=data, store=path, audit_every=0
                    ) as recorder,
                ):
                    loader = loader or torch.utils.data.DataLoader(
                        pk.IndexedDataset(data), batch_size=8, num_workers=2, persistent_workers=True
                    )
                    for x, y in recorder.track(loader):
                        training.take(x, y)
                        if part == 0 and ends == "break":
                            break
                        if part == 0 and ends == "error":
                            raise KeyError(ends)
            except KeyError:
                pass
            except (PathKernelError, TimeoutError) as error:
                yield Outcome(FAILED, first_sentence(error))
                break
        else:
            taken = 16 if ends == "by itself" else 9
            opened = pk.Trajectory.open(path, model=training.model, loss=training.loss, data=data)
            lost = taken - len(opened)
            yield Outcome(LOST if lost else SURVIVED, "recording goes on while the workers live", lost)


def until_killed(path: Path, folder: Path, optimizer: str, at: int, more: int, flush: bool, pause: float) -> None:
    """Train, save a checkpoint, train on, and be killed."""
    torch.set_num_threads(1)
    training = Training(optimizer)
    with training.recorder(path) as recorder:
        for step in training.train(recorder, at + more):
            time.sleep(pause)
            if step == at:
                if flush:
                    recorder.flush()
                torch.save(training.checkpoint(), folder / "checkpoint.pt")
        os.kill(os.getpid(), signal.SIGKILL)


def newer_checkpoints(bench: Bench) -> Iterator[Outcome]:
    """A checkpoint, then kill -9: after `recorder.flush()` the run goes on, and without it the refusal says how."""
    for flush in [True, False] * bench.count(2, 20):
        optimizer = bench.random.choice(["momentum", "adamw"])
        path, folder, at = bench.place(), bench.place(), bench.random.randrange(1, STEPS // 2)
        folder.mkdir()
        # A clamp comes after every seventh step, and so after the last one on disk.
        process = forked(until_killed, path, folder, optimizer, at, bench.random.randrange(0, 4), flush, 0.0)
        process.join(60)
        training = Training(optimizer)
        if process.exitcode != -signal.SIGKILL or not (folder / "checkpoint.pt").exists():
            process.kill()
            yield Outcome(FAILED, f"the process left with {process.exitcode}")
            continue
        training.restore(torch.load(folder / "checkpoint.pt"))
        kept = len(DiskStore.open(path))
        try:
            with training.recorder(path) as recorder:
                for _ in training.train(recorder, STEPS):
                    pass
        except ModelMismatchError as error:
            told = not flush and "recorder.flush()" in str(error) and "another path" in str(error)
            yield Outcome(SURVIVED if told else FAILED, "a refusal that names flush and the way on", at - kept)
            continue
        wrong = reference(optimizer, STEPS).wrong(training.opened(path))
        good = not wrong and len(recorder.trajectory) == STEPS
        yield Outcome(SURVIVED if good else WRONG, "after flush, the run goes on to the same record")


def slow_loops(bench: Bench) -> Iterator[Outcome]:
    """kill -9 of a loop with few steps a second: no more than the last second is lost."""
    for pause in [0.1, 0.4] * bench.count(1, 8):
        path, folder = bench.place(), bench.place()
        folder.mkdir()
        steps = round(2 / pause) + bench.random.randrange(4)
        process = forked(until_killed, path, folder, "momentum", 1, steps - 1, False, pause)
        process.join(60)
        kept = len(DiskStore.open(path)) if (path / "zarr.json").exists() else 0
        lost = steps - kept
        # One step may end while its block is written.
        yield Outcome(LOST if lost > 1 / pause + 1 else SURVIVED, "at most the last second is lost", lost)


def hidden_changes(bench: Bench) -> Iterator[Outcome]:
    """Weights that are changed through ``.data`` during a recording with keyframes, where torch does not count it."""

    def clipped(weight: Tensor, step: int) -> None:
        weight.data.view(-1)[600:].clamp_(-0.2, 0.2)

    def once(weight: Tensor, step: int) -> None:
        if step == 5:
            weight.data.view(-1)[700] += 0.01

    def now_and_then(weight: Tensor, step: int) -> None:
        if step % 7 == 3:
            weight.data[-1].mul_(0.99)

    def gradient(weight: Tensor, step: int) -> None:
        if weight.grad is not None and step % 7 == 3:
            weight.grad.data.view(-1)[500:].mul_(0.5)

    for change in [clipped, once, now_and_then, gradient] * bench.count(1, 6):
        path = bench.random.choice([None, bench.place()])
        torch.manual_seed(bench.random.randrange(1000))
        model = nn.Sequential(nn.Linear(8, 200), nn.Tanh(), nn.Linear(200, 4))
        optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
        X, y = torch.randn(32, 8), torch.randint(4, (32,))
        points = []
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with pk.KernelRecorder(
                model, optimizer, loss, data=(X, y), store=path, audit_every=0, schedule=Schedule(keyframes=8)
            ) as recorder:
                for step in range(STEPS):
                    x, target = recorder.batch(torch.arange(8) + 8 * (step % 4))
                    optimizer.zero_grad()
                    loss(model(x), target).backward()
                    points.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
                    if change is gradient:
                        gradient(model[0].weight, step)
                    optimizer.step()
                    if change is not gradient:
                        change(model[0].weight, step)
        words = "do not give its gradient" if change is gradient else "outside the optimizer"
        told = sum(words in str(warning.message) for warning in said)
        try:
            trajectory = recorder.trajectory
            same = all(torch.equal(step.before, point) for step, point in zip(trajectory.steps(), points, strict=True))
            pk.PathKernel(trajectory)(X[:2])
        except PathKernelError as error:
            yield Outcome(LOST, first_sentence(error))
            continue
        good = Outcome(SURVIVED if told == 1 else FAILED, "one warning; what changed is stored; every step is read")
        yield good if same else Outcome(WRONG, f"{change.__name__}: other steps")


def left_open(bench: Bench) -> Iterator[Outcome]:
    """Recorders that were started and not closed, loops that were left half-way, and the same cell run again."""

    def cell(training: Training, path: Path | None, until: int) -> pk.KernelRecorder:
        recorder = training.recorder(path)
        recorder.start()
        for _ in training.train(recorder, until):
            pass
        return recorder

    whole = reference("adamw", STEPS)
    for kind in ["cell", "error", "half-way"] * bench.count(1, 8):
        path, training = bench.random.choice([None, bench.place()]), Training("adamw")
        with in_time(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                first: Any = None
                if kind == "cell":
                    first = cell(training, path, STEPS // 2)
                elif kind == "half-way":
                    first = training.recorder(path)
                    first.start()
                    for step in training.train(first, STEPS):
                        if step == STEPS // 2:
                            break
                    next(first.batches(4))
                else:
                    try:
                        with training.recorder(path) as first:
                            for step in training.train(first, STEPS):
                                if step == STEPS // 2:
                                    raise KeyError(kind)
                    except KeyError:
                        pass
                if kind == "half-way":
                    training.step = STEPS // 2
                second = cell(training, path, STEPS)
                second.close()
            except (PathKernelError, TimeoutError) as error:
                yield Outcome(FAILED, f"{kind}: {first_sentence(error)}")
                continue
        hooks = [training.optimizer._optimizer_step_pre_hooks, training.optimizer._optimizer_step_post_hooks]
        hooks += [hook for m in training.model.modules() for hook in (m._forward_hooks, m._forward_pre_hooks)]
        named = any("that was started" in str(warning.message) for warning in said)
        found = [bits(step) for step in first.trajectory.steps()][: STEPS // 2]
        found += [] if path is not None else [bits(step) for step in second.trajectory.steps()]
        if any(map(len, hooks)):
            yield Outcome(FAILED, f"{kind}: hooks are left behind")
        elif path is not None and whole.wrong(training.opened(path)):
            yield Outcome(WRONG, f"{kind}: another record")
        elif found[: STEPS // 2] != whole.steps[: STEPS // 2]:
            yield Outcome(WRONG, f"{kind}: the first record is another one")
        else:
            told = named or kind == "error"
            yield Outcome(SURVIVED if told else FAILED, "the old recorder is closed and named; nothing is lost")


FAULTS = [
    Fault("a fork while recording", "none", forks),
    Fault("persistent workers", "none", workers),
    Fault("a checkpoint newer than what is on disk", "after flush: none", newer_checkpoints),
    Fault("kill -9 of a slow loop", "1 s of steps", slow_loops),
    Fault("edits through .data between keyframes", "none", hidden_changes),
    Fault("a recorder that was left open", "none", left_open),
]
