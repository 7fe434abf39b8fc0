"""Processes that are ended in the middle: kill -9 and Ctrl-C, of recordings, Gram matrices and attributions.

The processes are forked from one that has imported everything already, so that hundreds of them take minutes.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _faults_fuzz import limited
from _faults_table import FAILED, LOST, SURVIVED, WRONG, Bench, Fault, Outcome, first_sentence
from _faults_training import Checkpoints, Training, bits, reference

import pathkernel as pk
from pathkernel.errors import PathKernelError
from pathkernel.storage.disk import DiskStore
from pathkernel.storage.format import Group
from pathkernel.storage.question import identity_of
from pathkernel.storage.resumable import resumable_blocks
from pathkernel.storage.step_writer import QUEUE

STEPS = 160
RUNS = [("momentum", 1), ("adamw", 16), ("momentum", 16), ("adamw", 1)]
IMPORTED = [
    "torch._dynamo",  # by the first optimizer
    *(f"pathkernel.{name}" for name in ("path_kernel", "kernel_machine", "computations", "update_rules.table")),
    *(f"pathkernel.recording.{name}" for name in ("recorder", "resume")),
    "_faults_killed",
    "_faults_disk",
    "_faults_hostile",
]
BEGUN, ACKNOWLEDGED, FINISHED = 0, 1, 2


class Told:
    """Three numbers that a process leaves behind even when it is killed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            path.write_bytes(bytes(24))
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 24)

    def __getitem__(self, place: int) -> int:
        return int(struct.unpack_from("<q", self._memory, 8 * place)[0])

    def __setitem__(self, place: int, value: int) -> None:
        struct.pack_into("<q", self._memory, 8 * place, value)


def forked(target: Callable[..., None], *arguments: Any) -> Any:
    """A process that runs a function of this module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    process = context.Process(target=interruptible, args=(target, *arguments), daemon=True)
    process.start()
    return process


def interruptible(target: Callable[..., None], *arguments: Any) -> None:
    """Run it with Ctrl-C in force: a shell that puts this program in the background leaves it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    target(*arguments)


def ended(process: Any, told: Told, delay: float, number: int) -> None:
    """Send a signal a while after the process began its work; not if it is through before."""
    while not told[BEGUN] and process.is_alive():
        time.sleep(0.0005)
    process.join(delay)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join(60)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError("the process hangs")


# -- recordings -------------------------------------------------------------------------------------------------------


def record(optimizer: str, path: Path, flush_every: int, checkpoints: Path, told_at: Path) -> None:
    """Train, or go on with the training, on record."""
    torch.set_num_threads(1)
    told, kept = Told(told_at), Checkpoints(checkpoints)
    told[BEGUN] = 1
    try:
        training, recorder = kept.goes_on(optimizer, path, flush_every=flush_every)
        told[ACKNOWLEDGED] = training.step
        with recorder:
            for step in training.train(recorder, STEPS):
                told[ACKNOWLEDGED] = step
                if step % 8 == 0:
                    kept.save(training)
    except KeyboardInterrupt:
        return
    told[FINISHED] = 1


def recordings(signal_number: int, bench: Bench, trials: int) -> Iterator[Outcome]:
    """Recordings that are ended, started again, ended … until they are through, and then once more from the start."""
    counted, life = 0, 0.1
    while counted < trials:
        left = bench.random.randint(2, 9)  # so many times; then it may finish
        optimizer, flush_every = RUNS[bench.random.randrange(len(RUNS))]
        folder = bench.place()
        path, told = folder / "run", None
        folder.mkdir()
        while True:
            told = Told(folder / f"{counted}-{bench.random.getrandbits(32)}")
            process = forked(record, optimizer, path, flush_every, folder / "checkpoints", told.path)
            began = time.perf_counter()
            try:
                ended(process, told, bench.random.uniform(0, life) if left else 60.0, signal_number)
            except TimeoutError as error:
                yield Outcome(FAILED, str(error))
                break
            if told[FINISHED]:
                life = 0.5 * (life + 0.5 * (time.perf_counter() - began))  # half a training, as fast as it is today
            elif process.exitcode not in (0, -signal_number):
                yield Outcome(FAILED, f"the process left with {process.exitcode}")
                break
            try:
                outcome = examined(path, optimizer, flush_every, told, signal_number)
            except Exception as error:
                outcome = Outcome(FAILED, first_sentence(error))
            if not told[FINISHED] or outcome.verdict != SURVIVED:
                counted, left = counted + 1, left - 1
                yield outcome
            if told[FINISHED] or outcome.verdict != SURVIVED:
                break


def examined(path: Path, optimizer: str, flush_every: int, told: Told, signal_number: int) -> Outcome:
    """Whether a store has all that it must, and nothing else."""
    training, whole = Training(optimizer), reference(optimizer, STEPS)
    if told[FINISHED]:
        training.model.load_state_dict(whole.weights)
    if not (path / "zarr.json").exists():
        lost = told[ACKNOWLEDGED]
        return Outcome(LOST if lost else SURVIVED, "no store yet: recording begins anew", lost)
    bound = 0 if flush_every == 1 or signal_number == signal.SIGINT else (QUEUE + 2) * flush_every
    store = DiskStore.open(path)
    lost = max(0, told[ACKNOWLEDGED] - len(store))
    wrong = [i for i in range(len(store)) if bits(store.read(i)) != whole.steps[i]]
    if told[FINISHED]:
        wrong += whole.wrong(training.opened(path))
        lost = STEPS - len(store)
    if wrong or store.verify():
        return Outcome(WRONG, f"wrong: {wrong[:3]}, {store.verify()[:1]}")
    if lost > bound:
        return Outcome(LOST, f"{lost} steps lost, flush_every={flush_every}", lost)
    return Outcome(SURVIVED, "every committed step bit-exact; goes on from a checkpoint", lost)


# -- long computations ------------------------------------------------------------------------------------------------


def compute(kind: str, run: Path, path: Path, told_at: Path) -> None:
    """A Gram matrix or an attribution with a store; its result is left beside it."""
    torch.set_num_threads(1)
    told = Told(told_at)
    training = Training("adamw")
    training.model.load_state_dict(reference_weights(run))
    trajectory = training.opened(run)
    told[BEGUN] = 1
    try:
        np.save(path.with_suffix(".npy"), computed(kind, trajectory, path))
    except KeyboardInterrupt:
        return
    told[FINISHED] = 1


def computed(kind: str, trajectory: pk.Trajectory, path: Path | None) -> np.ndarray:
    X = torch.randn(16, 8, generator=torch.Generator().manual_seed(5))
    if kind == "gram":
        return pk.PathKernel(trajectory)(X, store=path)
    machine = pk.KernelMachine(trajectory)
    return resumable_blocks(
        path,
        identity_of(trajectory),
        [8] * 8,  # four outputs of two samples
        lambda block: {"shares": np.asarray(machine.explain(X[2 * block : 2 * block + 2], outputs="all").shares)},
    )["shares"]


def reference_weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run.with_suffix(".pt"))


def computations(kind: str, signal_number: int, bench: Bench, trials: int) -> Iterator[Outcome]:
    """Computations that are ended and started again until they are through."""
    run = bench.place()
    training = Training("adamw")
    trajectory = training.recorded(run, STEPS if kind == "gram" else STEPS // 5)
    torch.save(training.model.state_dict(), run.with_suffix(".pt"))
    whole, counted, life = computed(kind, trajectory, bench.place()), 0, 0.05
    while counted < trials:
        path, done, left = bench.place(), 0, bench.random.randint(2, 9)
        while True:
            told = Told(path.with_suffix(f".{bench.random.getrandbits(32)}"))
            process = forked(compute, kind, run, path, told.path)
            began = time.perf_counter()
            try:
                ended(process, told, bench.random.uniform(0, life) if left else 60.0, signal_number)
                if told[FINISHED]:
                    life = 0.5 * (life + 0.5 * (time.perf_counter() - began))
                    same = np.load(path.with_suffix(".npy")).tobytes() == whole.tobytes()
                    if not same:
                        yield Outcome(WRONG, "another result than of an uninterrupted computation")
                    break
                if process.exitcode not in (0, -signal_number):
                    yield Outcome(FAILED, f"the process left with {process.exitcode}")
                    break
                before, done = done, finished_parts(kind, path)
            except (PathKernelError, TimeoutError) as error:
                yield Outcome(FAILED, first_sentence(error))
                break
            counted, left = counted + 1, left - 1
            if done < before:
                yield Outcome(LOST, f"{before} parts were on disk, and {done} are", before - done)
                break
            yield Outcome(SURVIVED, "what is finished stays; the same call goes on to the same bits")


def short_of_memory(run: Path, path: Path, extra: int) -> None:
    """A Gram matrix by a process that may take only so many more bytes."""
    torch.set_num_threads(1)
    training = Training("adamw")
    training.model.load_state_dict(reference_weights(run))
    kernel, X = large_kernel(training.opened(run))
    warnings.simplefilter("ignore")  # of progress bars, which get no thread
    left = path.with_suffix(".error").open("w")
    limited(extra)
    try:
        kernel(X, store=path)
        left.write("nothing: it was enough")
    except (MemoryError, RuntimeError, OSError) as error:
        left.write(type(error).__name__)
    left.close()


def large_kernel(trajectory: pk.Trajectory) -> tuple[pk.PathKernel, torch.Tensor]:
    X = torch.randn(1200, 8, generator=torch.Generator().manual_seed(5))
    return pk.PathKernel(trajectory, steps=4), X


def out_of_memory(bench: Bench) -> Iterator[Outcome]:
    """A process that gets no more memory; then the same call with enough of it."""
    run = bench.place()
    training = Training("adamw")
    kernel, X = large_kernel(training.recorded(run, 20))
    torch.save(training.model.state_dict(), run.with_suffix(".pt"))
    whole = kernel(X, store=bench.place())
    for _ in range(bench.count(1, 12)):
        path = bench.place()
        process = forked(short_of_memory, run, path, bench.random.randrange(2**20, 2**26))
        process.join(120)
        gets = path.with_suffix(".error").read_text() or f"the process dies ({process.exitcode})"
        same = kernel(X, store=path).tobytes() == whole.tobytes()
        yield Outcome(SURVIVED if same else WRONG, f"{gets}; the same call goes on with more memory")


def finished_parts(kind: str, path: Path) -> int:
    """How much of a computation is on disk: terms of the sum, or blocks of queries."""
    if not (path / "zarr.json").exists():
        return 0
    group = Group.open(path)
    if kind == "explain":
        return len(group.attributes().get("blocks", {}))
    record = group.array("progress") if "progress" in group.arrays() else None
    return int(record.read((0, 0, 0))[0, 0, 0]) if record is not None and record.has((0, 0, 0)) else 0


def signals(kind: str, number: int, quick: int, full: int) -> Callable[[Bench], Iterator[Outcome]]:
    def trials(bench: Bench) -> Iterator[Outcome]:
        many = bench.count(quick, full)
        return recordings(number, bench, many) if kind == "recording" else computations(kind, number, bench, many)

    return trials


IN_HAND = "the sum or block in hand"
FAULTS = [
    Fault(
        "kill -9 while recording",
        f"flush_every=1: none; 16: {(QUEUE + 2) * 16} steps",
        signals("recording", signal.SIGKILL, 4, 240),
    ),
    Fault("Ctrl-C while recording", "none", signals("recording", signal.SIGINT, 3, 80)),
    Fault("kill -9 during a Gram matrix", IN_HAND, signals("gram", signal.SIGKILL, 3, 60)),
    Fault("Ctrl-C during a Gram matrix", IN_HAND, signals("gram", signal.SIGINT, 2, 30)),
    Fault("out of memory during a Gram matrix", IN_HAND, out_of_memory),
    Fault("kill -9 during an attribution", IN_HAND, signals("explain", signal.SIGKILL, 2, 40)),
]
