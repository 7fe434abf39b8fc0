"""Methods that take turns: every round runs each of them once, so that all meet the same moods of the machine."""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _plain import reference
from _worker import CLOCKS
from _workloads import Task, arrays_of

HERE = Path(__file__).parent
TIMEOUT = 1800.0


class Failure(RuntimeError):
    """A method did not do its task; the message says why."""


class Worker:
    """A method in a process of its own; see `_worker`."""

    def __init__(self, python: str, module: str, threads: int, clock: str) -> None:
        self.command = [python, str(HERE / "_worker.py"), module, str(threads), clock]
        self.threads, self.process = threads, None

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failure(self._end()) from None
        return self._answer()

    def _start(self) -> None:
        environment = os.environ | {
            **{name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")},
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "JAX_PLATFORMS": "cpu",
        }
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  as long as the process lives
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(self.command, text=True, env=environment, bufsize=1, **pipes)
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], TIMEOUT)[0]:
            self.process.kill()
            raise Failure(f"no answer within {TIMEOUT:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise Failure(self._end())
        return checked(json.loads(line))

    def _end(self) -> str:
        assert self.process is not None
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines()
        return f"ended with {code}: {said[-1][:200] if said else 'nothing said'}"

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            self.process.kill()


class Here:
    """A method in this very process: quicker to start, its memory less cleanly its own."""

    def __init__(self, module: str, clock: str) -> None:
        from _worker import Work

        self.work = Work(module, clock)

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        try:
            return getattr(self.work, do)(**request)
        except Exception as reason:
            raise Failure(f"{type(reason).__name__}: {reason}") from reason

    def close(self) -> None:
        self.work.release()


def checked(answer: dict[str, Any]) -> dict[str, Any]:
    if "failed" in answer:
        raise Failure(f"{answer['kind']}: {answer['failed']}")
    return answer


@dataclass
class Entry:
    """A method on a task: one row of the results.

    Attributes
    ----------
    scale
        What seconds and floor are multiplied by, where only part of the work was done (`note` says so).
    judged_by
        Another entry whose result this one's error is measured against, instead of the float64 reference.
    """

    workload: str
    method: str
    task: Task
    scale: float = 1.0
    note: str = ""
    judged_by: Entry | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    error: float | None = None
    failure: str | None = None
    result: np.ndarray | None = None

    @property
    def median(self) -> float | None:
        """Seconds of the whole task."""
        return None if self.failure or not self.seconds else self.scale * statistics.median(self.seconds)


def repetitions(first: float, most: int) -> int:
    """How often a call is worth repeating."""
    return most if first < 2 else min(most, 3) if first < 15 else 1 if first < 60 else 0


class Rounds:
    """Entries of one group of workloads, run in turns.

    Parameters
    ----------
    workers
        By method.
    folder
        For arrays and results on their way between processes.
    speed
        Called once a round: measures the machine.
    most, subset, pause
        Rounds; rows and columns that errors are measured on; seconds between two methods, so that threads that wait
        for work by spinning have gone to sleep.
    """

    def __init__(
        self,
        workers: dict[str, Any],
        folder: Path,
        speed: Callable[[], None],
        most: int,
        subset: int,
        pause: float = 0.25,
    ) -> None:
        self.workers, self.folder, self.speed = workers, folder, speed
        self.most, self.subset, self.pause = most, subset, pause
        self.tasks: dict[str, Path] = {}

    def run(self, entries: list[Entry], say: Callable[[str], None]) -> None:
        """Load, measure, repeat in turns, compare."""
        live = [entry for entry in entries if entry.failure is None and self._load(entry, say)]
        for entry in live:
            self._measure(entry, say)
        live = [entry for entry in live if entry.failure is None]
        rounds = {id(entry): repetitions(entry.measured["seconds"], self.most) for entry in live}
        for turn in range(max([0, *rounds.values()])):
            self.speed()
            for entry in live:
                if entry.failure is None and turn < rounds[id(entry)]:
                    time.sleep(self.pause)
                    with self._noted(entry):
                        entry.seconds.append(self.workers[entry.method].ask("time", slot=self._slot(entry))["seconds"])
        for entry in live:
            if not entry.seconds and entry.failure is None:
                entry.seconds = [entry.measured["seconds"]]
        self._compare(live, say)
        for worker in {id(self.workers[entry.method]): self.workers[entry.method] for entry in live}.values():
            with contextlib.suppress(Failure):
                worker.ask("release")

    def _slot(self, entry: Entry) -> str:
        return f"{entry.workload} {entry.method} {entry.task!r}"

    @contextlib.contextmanager
    def _noted(self, entry: Entry) -> Iterator[None]:
        """Book a failure with its entry."""
        try:
            yield
        except Failure as reason:
            entry.failure = str(reason)

    def arrays(self, task: Task) -> Path:
        """The file with a task's arrays, made once."""
        # Tasks that differ in nothing but how they are done share their data.
        alike = ("network", "outputs", "queries", "references", "width", "data", "steps", "batch")
        optimizer = task.optimizer if task.steps else ""
        key = " ".join(str(getattr(task, name)) for name in alike) + optimizer
        if key not in self.tasks:
            self.tasks[key] = self.folder / f"{len(self.tasks)}.npz"
            np.savez(self.tasks[key], **arrays_of(task))
        return self.tasks[key]

    def _load(self, entry: Entry, say: Callable[[str], None]) -> bool:
        say(f"loading {entry.workload}: {entry.method}")
        with self._noted(entry):
            loaded = self.workers[entry.method].ask(
                "load",
                slot=self._slot(entry),
                method=entry.method,
                task=entry.task.to_json(),
                arrays=str(self.arrays(entry.task)),
            )
            if loaded["predicted_seconds"] is not None:
                entry.extra["predicted_seconds"] = loaded["predicted_seconds"]
        return entry.failure is None

    def _measure(self, entry: Entry, say: Callable[[str], None]) -> None:
        say(f"measuring {entry.workload}: {entry.method}")
        time.sleep(self.pause)
        save = self.folder / "result.npy"
        rows, columns = (None, None) if entry.task.kind == "path gram" else self._chosen(entry.task)
        with self._noted(entry):
            entry.measured = self.workers[entry.method].ask(
                "measure",
                slot=self._slot(entry),
                save=str(save),
                shape=[entry.task.queries, entry.task.references or entry.task.queries],
                rows=None if rows is None else rows.tolist(),
                columns=None if columns is None else columns.tolist(),
            )
            entry.result = np.load(save) if entry.measured["saved"] else None

    def _chosen(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns that errors are measured on: some of everywhere, so that every tile is among them."""
        columns = task.references or task.queries
        if task.kind == "shares":
            return spread(task.queries, 4), np.arange(columns)
        few = 8 if task.kind == "path gram" else max(2, self.subset // 4) if task.outputs == "full" else self.subset
        return spread(task.queries, few), spread(columns, few)

    def _compare(self, entries: list[Entry], say: Callable[[str], None]) -> None:
        """Relative error, in the Frobenius norm, against the float64 result or another entry's."""
        known: dict[str, np.ndarray] = {}
        for entry in entries:
            if entry.failure is not None or entry.result is None or 0 < entry.task.part < entry.task.steps:
                continue  # of a part there is nothing to compare
            rows, columns = self._chosen(entry.task)
            if entry.judged_by is not None:
                if entry.judged_by.result is None:
                    continue
                expected, got, who = entry.judged_by.result, entry.result, f"method {entry.judged_by.method}, all"
            else:
                path = self.arrays(entry.task)
                key = f"{path} {entry.task.kind} {entry.task.quadrature}"
                if key not in known:
                    say(f"float64 reference of {entry.workload}")
                    known[key] = reference(entry.task, dict(np.load(path)), rows, columns)
                expected, got = known[key], entry.result
                got = got[np.ix_(rows, columns)] if entry.task.kind == "path gram" else got
                who = f"float64, {len(rows)} x {len(columns)} of them"
            entry.extra["error_against"] = who
            entry.error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def spread(n: int, few: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, few)).round().astype(int))


class Speed:
    """The machine: product speed (FLOP/s) and memory bandwidth (bytes/s), the best of what was seen by a clock."""

    def __init__(self, size: int, clock: str, device: str = "cpu") -> None:
        self.clock, self.device = CLOCKS[clock], device
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (torch.rand(size, size, generator=generator).to(device) for _ in range(2))
        self.out = torch.empty(size, size, device=device)
        self.block = torch.zeros(1 << 25 if size >= 2048 else 1 << 22, device=device)
        self.target = torch.empty_like(self.block)
        self.products, self.bandwidth = 0.0, 0.0

    def __call__(self) -> None:
        work = 2.0 * len(self.a) ** 3
        onednn = self.device == "cpu" and torch.backends.mkldnn.is_available()
        for product in (self._by_mkl, self._by_onednn) if onednn else (self._by_mkl,):
            self.products = max(self.products, *(work / self._duration(product) for _ in range(3)))
        moved = 2.0 * self.block.nbytes
        for move in (lambda: self.target.copy_(self.block), lambda: self.block.mul_(0.5)):
            self.bandwidth = max(self.bandwidth, *(moved / self._duration(move) for _ in range(3)))

    def _by_mkl(self) -> None:
        torch.mm(self.a, self.b, out=self.out)

    def _by_onednn(self) -> None:
        torch.ops.mkldnn._linear_pointwise(self.a, self.b, None, "none", [], "")

    def _duration(self, of: Callable[[], Any]) -> float:
        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        wait()
        start = self.clock()
        of()
        wait()
        return self.clock() - start
