"""What explaining costs on networks that nobody tuned for, in units of their training.

    python benchmarks/real_networks.py [--quick] [--json FILE] [--seed N] [--only NETWORK ...] [--tasks TASK ...]
                                       [--threads N] [--memory SIZE] [--steps N] [--repeat N] [--device NAME]

A GPT (4 × 128, 64 tokens of 65, tied, positions without a batch axis, AdamW, batches of 16) and a ResNet with BatchNorm
in train mode (16 × 16, SGD with momentum, batches of 50) are trained for a few steps, and recorded. Then plain training
of the same steps and each task take turns in one process; a task is a call on a new `KernelMachine`, its planning and
its proofs included. Printed are medians: seconds, times training, the growth of the process, and the error: of outputs
(the residual, or how far a prediction is off), relative to the largest output. Beside them the split error, the
quadrature error, and, where the samples of a batch are coupled, what meeting them with the queries took a step, beside
the less of B reverse sweeps and Q forward sweeps, as they were measured on the way.

It ends with status 1 where a sum is not the network, or rows are not their samples'; that a figure of time is not
reached is printed, and no fault of a result. On a machine that others use, the time of the processor says more. With
``--device cuda`` network, data and record lie on a GPU, for which each measurement waits to the end; the targets are
those of the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _real_networks import WORKLOADS, Workload
from torch import Tensor

import pathkernel as pk
from pathkernel.runtime.precision import EXACT_PRODUCTS
from pathkernel.trajectory import recomputed_batches
from pathkernel.trajectory.coupled_samples import CoupledSamples

TASKS = {"explain 8": 8, "explain 100": 100, "decision_function 8": 8}

TARGETS = {
    ("GPT", "explain 8"): 2.5,
    ("GPT", "explain 100"): 12.0,
    ("GPT", "decision_function 8"): 2.0,
    ("ResNet-BatchNorm", "explain 8"): 8.0,
    ("ResNet-BatchNorm", "explain 100"): 35.0,
    ("ResNet-BatchNorm", "decision_function 8"): 2.0,
}
"""Times training."""

ERROR_LIMIT = 1e-4
"""Of sums and of rows, in float32."""


class Run:
    """A network's data, its plain training, and a record of it."""

    def __init__(self, workload: Workload, steps: int, seed: int, memory: str = "1GB", device: str = "cpu") -> None:
        self.workload, self.seed, self.memory, self.device = workload, seed, memory, device
        torch.manual_seed(seed)
        self.X, self.y = (part.to(device) for part in workload.data())
        passes = -(-steps * workload.batch // len(self.X))
        ids = torch.cat([torch.randperm(len(self.X)) for _ in range(passes)])[: steps * workload.batch]
        self.batches = ids.split(workload.batch)
        self.trajectory, self.model = self._recorded()

    def _made(self) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(self.seed)
        model, optimizer = self.workload.make()
        return model.to(self.device), optimizer  # parameters stay the same objects

    def train(self) -> None:
        """Plain training of the same steps."""
        model, optimizer = self._made()
        for ids in self.batches:
            optimizer.zero_grad()
            self.workload.loss(model(self.X[ids]), self.y[ids]).backward()
            optimizer.step()

    def _recorded(self) -> tuple[pk.Trajectory, torch.nn.Module]:
        model, optimizer = self._made()
        with pk.KernelRecorder(model, optimizer, self.workload.loss, (self.X, self.y), audit_every=0) as recorder:
            for ids in self.batches:
                x, target = recorder.batch(ids)
                optimizer.zero_grad()
                self.workload.loss(model(x), target).backward()
                optimizer.step()
        return recorder.trajectory, model.eval()

    def do(self, task: str) -> dict[str, float]:
        """A task on a new machine, and what its result is worth."""
        machine, X = pk.KernelMachine(self.trajectory, memory=self.memory), self.X[: TASKS[task]]
        if task.startswith("explain"):
            with CoupledPart(machine) as part:
                why = machine.explain(X, outputs=self.workload.outputs)
            scale = np.abs(why.output).max()
            return {
                "error": float(np.abs(why.left_over).max() / scale),
                "split_error": why.split_error,
                "quadrature_error": float(np.median(why.quadrature_error)),
                **part.figures(len(self.batches), self.workload.batch, len(X)),
            }
        found = machine.decision_function(X)
        with torch.no_grad(), EXACT_PRODUCTS:  # cuDNN rounds the factors of convolutions to TensorFloat-32 by itself
            expected = self.model(X).double().flatten(1).cpu().numpy()
        return {"error": float(np.abs(found.reshape(expected.shape) - expected).max() / np.abs(expected).max())}


class CoupledPart:
    """Seconds that coupled samples take to be met with queries, and the sweeps that were measured meanwhile."""

    def __init__(self, machine: pk.KernelMachine) -> None:
        self.machine, self.seconds = machine, 0.0

    def __enter__(self) -> CoupledPart:
        self._products, self._rows = CoupledSamples.products, recomputed_batches.coupled_row_blocks

        def products(samples: CoupledSamples, directions: Tensor) -> Tensor:
            began = time.perf_counter()
            found = self._products(samples, directions)
            self.seconds += time.perf_counter() - began
            return found

        def rows(*arguments: Any) -> Any:
            began = time.perf_counter()
            for block in self._rows(*arguments):
                self.seconds += time.perf_counter() - began
                yield block
                began = time.perf_counter()

        CoupledSamples.products, recomputed_batches.coupled_row_blocks = products, rows
        return self

    def __exit__(self, *error: object) -> None:
        CoupledSamples.products, recomputed_batches.coupled_row_blocks = self._products, self._rows

    def figures(self, steps: int, samples: int, queries: int) -> dict[str, float]:
        """A step's seconds, and those of the less of all reverse and all forward sweeps."""
        costs = [one for one in self.machine._recorded.batches.sweeps.costs.values() if one.forward]
        if not costs:
            return {}
        reverse, forward = samples * costs[0].reverse, queries * min(costs[0].forward.values())
        return {"coupled_seconds": self.seconds / steps, "reverse_sweeps": reverse, "forward_sweeps": forward}


def peak(name: str = "VmHWM") -> float:
    """The most memory of the process, or what it has now (``"VmRSS"``), in MB; NaN where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), math.nan)


def forget_peak() -> None:
    """Let the high-water mark of the process start anew, where the system does that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def settle(device: str) -> None:
    """Wait until a GPU has done all that it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    name: str, tasks: list[str], steps: int, repeat: int, seed: int, memory: str, device: str
) -> list[dict[str, Any]]:
    """Rows of one network: training and the tasks in turns."""
    run = Run(WORKLOADS[name], steps, seed, memory, device)
    run.train()  # torch chooses its kernels
    settle(device)
    found: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {task: [] for task in ("training", *tasks)}
    processor: dict[str, list[float]] = {task: [] for task in seconds}
    grown: dict[str, float] = {}
    for _ in range(repeat):
        for task in seconds:
            forget_peak()
            before, began, used = peak("VmRSS"), time.perf_counter(), time.process_time()
            if task == "training":
                run.train()
            else:
                found[task] = run.do(task)
            settle(device)
            seconds[task].append(time.perf_counter() - began)
            processor[task].append(time.process_time() - used)
            grown[task] = max(grown.get(task, 0.0), peak() - before)
    medians = {task: statistics.median(own) for task, own in seconds.items()}
    shared = {"network": name, "optimizer": WORKLOADS[name].optimizer, "device": device}
    return [
        {
            **shared,
            "task": task,
            "seconds": medians[task],
            "training_seconds": medians["training"],
            "ratio": statistics.median(
                own / plain for own, plain in zip(seconds[task], seconds["training"], strict=True)
            ),
            "processor_ratio": statistics.median(processor[task]) / statistics.median(processor["training"]),
            "peak_mb": grown[task],
            **found[task],
        }
        for task in tasks
    ]


def report(row: dict[str, Any]) -> bool:
    """Print a row; False where its result is wrong."""
    target = TARGETS[row["network"], row["task"]]
    met = "met" if row["ratio"] <= target else "NOT met"
    print(
        f"{row['network']:<17} {row['optimizer']:<9} {row['task']:<20} {row['seconds']:8.2f} s {row['ratio']:6.2f} × "
        f"training (target {target:g}: {met}; {row['processor_ratio']:.2f} × in time of the processor), "
        f"{row['peak_mb']:5.0f} MB, error {row['error']:.1e}, split {row.get('split_error', math.nan):.1e}, "
        f"quadrature {row.get('quadrature_error', math.nan):.1e}",
        flush=True,
    )
    if "coupled_seconds" in row:
        floor = min(row["reverse_sweeps"], row["forward_sweeps"])
        print(
            f"{'':<17} coupled samples: {1e3 * row['coupled_seconds']:.0f} ms a step; all reverse sweeps "
            f"{1e3 * row['reverse_sweeps']:.0f} ms, all forward sweeps {1e3 * row['forward_sweeps']:.0f} ms: "
            f"{row['coupled_seconds'] / floor:.2f} × the less of them"
        )
    return row["error"] <= ERROR_LIMIT and not row.get("split_error", 0.0) > ERROR_LIMIT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 steps once, in place of 40 steps three times")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a list of flat objects")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of data, weights and batches")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NETWORK")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="by default as many as torch takes")
    parser.add_argument("--memory", default="1GB", metavar="SIZE", help="of each machine; too little takes two sweeps")
    parser.add_argument("--steps", type=int, default=0, metavar="N")
    parser.add_argument("--repeat", type=int, default=0, metavar="N")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="for example cuda")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    steps = arguments.steps or (12 if arguments.quick else 40)
    repeat = arguments.repeat or (1 if arguments.quick else 3)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if torch.device(arguments.device).type == "cuda":
        machine += f", {torch.cuda.get_device_name(arguments.device)}"
    print(f"torch {torch.__version__}, {machine}, {time.strftime('%F')}; {steps} steps, {repeat} rounds")
    rows, right = [], True
    for name in arguments.only:
        for row in measure(name, arguments.tasks, steps, repeat, arguments.seed, arguments.memory, arguments.device):
            right = report(row) and right
            rows.append(row)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
