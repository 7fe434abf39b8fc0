"""One method at work: loads tasks, runs them once on request, watches the clock and the memory.

As a script it is a process of its own, in whichever environment the method needs, and speaks JSON lines: requests on
standard input, answers on what was standard output (libraries that print are sent to standard error).

    python _worker.py MODULE THREADS CLOCK
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""``"cpu"``: time of this process on the processor, all its threads together; with one thread the fair one where others
work on the same machine."""

SLOW, QUICK = 30.0, 0.5
"""Seconds: a slow call is not repeated for its memory, a quick one runs once untimed before it is timed."""


class Work:
    """Tasks loaded by name, each a callable, with the methods of one module."""

    def __init__(self, module: str, clock: str) -> None:
        self.clock = CLOCKS[clock]
        self.module = importlib.import_module(module)
        self.calls: dict[str, Any] = {}
        self.devices: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def load(self, slot: str, method: str, task: dict[str, Any], arrays: str) -> dict[str, Any]:
        """Prepare a task: build the network, record the path; nothing that is timed."""
        import numpy as np
        from _workloads import Task

        data = dict(np.load(arrays))
        self.calls[slot] = self.module.METHODS[method](Task(**task), data)
        self.devices[slot] = Task(**task).device
        predict = getattr(self.module, "predicted_seconds", None)
        return {"predicted_seconds": None if predict is None else predict(Task(**task), data, method)}

    def measure(
        self, slot: str, save: str, shape: list[int], rows: list[int] | None, columns: list[int] | None
    ) -> dict[str, Any]:
        """One call for its result, of which some rows and columns are saved, and another for its memory.

        What has no result (floors) saves none.
        """
        import numpy as np

        run, canonical = self.calls[slot]
        watch = watched if self.devices[slot] == "cpu" else watched_on_gpu
        seconds, peak, result = watch(run, self.clock)
        if seconds < SLOW:
            del result  # as a user who keeps one result at a time
            getattr(run, "forget", lambda: None)()
            seconds, peak, result = watch(run, self.clock)
        self.seconds[slot] = seconds
        if canonical is None:
            return {"seconds": seconds, "peak_mb": None, "result_mb": None, "saved": False}
        array = np.asarray(canonical(result), dtype=np.float64)
        whole = {"result_mb": array.nbytes / 1e6}
        if array.shape[:2] != tuple(shape):
            raise ValueError(f"its result has shape {array.shape}, for {shape[0]} x {shape[1]} samples")
        if rows is not None and columns is not None:
            array = array[np.ix_(rows, columns)]
        np.save(save, array)
        return {"seconds": seconds, "peak_mb": peak, "saved": True, **whole}

    def time(self, slot: str) -> dict[str, Any]:
        """One repetition."""
        run = self.calls[slot][0]
        if self.seconds[slot] < QUICK:
            run()
        start = self.clock()
        run()
        return {"seconds": self.clock() - start}

    def release(self) -> dict[str, Any]:
        self.calls.clear()
        gc.collect()
        return {}


def watched(run: Any, clock: Callable[[], float]) -> tuple[float, float, Any]:
    """Seconds, extra resident memory at its highest in MB, and the result."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, or the next call finds it there
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, start = resident("VmRSS"), clock()
    result = run()
    seconds = clock() - start
    return seconds, (resident("VmHWM") - before) / 1e6, result


def watched_on_gpu(run: Any, clock: Callable[[], float]) -> tuple[float, float, Any]:
    """The same of a GPU: extra memory that its tensors take there at once. Results are on the CPU, so it has ended."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), clock()
    result = run()
    seconds = clock() - start
    return seconds, (torch.cuda.max_memory_allocated() - before) / 1e6, result


def resident(which: str) -> float:
    """Resident memory of this process, now or at its highest, in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith(which))
    return 1024.0 * float(line.split()[1])


def limit_memory(part: float) -> None:
    """Fail here, with a message, rather than have the system end something."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        limit = int(1024 * part * float(line.split()[1]))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def serve(module: str, threads: int, clock: str) -> None:
    limit_memory(0.85)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):  # the only way to tell XLA
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    work = Work(module, clock)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(work, request.pop("do"))(**request)
        except Exception as reason:
            kind = type(reason).__name__
            answer = {"failed": str(reason)[:300].replace("\n", " "), "kind": kind}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
