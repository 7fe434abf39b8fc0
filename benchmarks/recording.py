"""What recording costs: training time with and without it, taken in turns in one process.

    python benchmarks/recording.py [--quick] [--json FILE] [--threads N] [--pairs N] [--device NAME]

One row for each network, optimizer and level of record:

ratio                median over pairs of (recorded / plain), with beginning and end; before the plain run has its turn,
                     all steps so far are written, and the time that this takes is counted, too
ratio_of_steps       the same for the median step alone
milliseconds_plain   of a plain step
milliseconds_per_step, kilobytes_per_step
target               of the ratio, where there is one

Networks: an MLP of 85,002 parameters with batches of 64, whose steps take about a millisecond, the worst case; and a
CNN of a million. Which of a pair comes first is turned every time. Exit status 1 if a target is missed, 0 with --quick.
With ``--device cuda`` networks and data lie on a GPU, which is waited for at the end of every turn; the targets are
those of the CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.storage.disk import DiskStore
from pathkernel.trajectory.schedule import Schedule

LOSS = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Workload:
    """A network and its data; how many steps a run has, and after how many the other of a pair has its turn."""

    model: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    batch_size: int
    steps: int
    turn: int
    device: str = "cpu"


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )  # fmt: skip


def cnn() -> nn.Module:
    def block(channels: int, width: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]

    pool = nn.MaxPool2d(2)
    features = [*block(3, 64), pool, *block(64, 128), pool, *block(128, 256), pool, *block(256, 256)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(256 * 16, 10))


def vectors() -> tuple[Tensor, Tensor]:
    return torch.randn(4096, 64), torch.randint(10, (4096,))


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(512, 3, 32, 32), torch.randint(10, (512,))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
}


@dataclass(frozen=True)
class Level:
    """What is kept of each step, and where."""

    disk: bool
    schedule: Schedule


LEVELS = {
    "every step on disk": Level(True, Schedule()),
    "keyframes + replay on disk": Level(True, Schedule(keyframes=32)),
    "every step in memory": Level(False, Schedule()),
    "keyframes + replay in memory": Level(False, Schedule(keyframes=32)),
}
MLP, CNN = "MLP, 85k parameters", "CNN, 1M parameters"
TARGETS = {
    **{(MLP, optimizer, "every step on disk"): 1.25 for optimizer in OPTIMIZERS},
    **{(CNN, optimizer, "every step on disk"): 1.05 for optimizer in OPTIMIZERS},
    **{(network, optimizer, "keyframes + replay on disk"): 1.02 for network in (MLP, CNN) for optimizer in OPTIMIZERS},
}


class Run:
    """A training run that is taken some steps at a time, recorded or not."""

    def __init__(self, workload: Workload, optimizer: str, level: Level | None, path: Path) -> None:
        torch.manual_seed(0)
        self.workload, self.path = workload, path
        self.X, self.y = (part.to(workload.device) for part in workload.data())
        self.model = workload.model().to(workload.device)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.seconds: list[float] = []
        self.waited: list[float] = []
        self.recorder: pk.KernelRecorder | None = None
        if level is not None:
            self.recorder = pk.KernelRecorder(
                self.model,
                self.optimizer,
                LOSS,
                data=(self.X, self.y),
                store=DiskStore(path) if level.disk else None,
                schedule=level.schedule,
                audit_every=0,
            )
        self.batches = self._batches()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            if self.recorder is not None:
                yield from self.recorder.batches(self.workload.batch_size, shuffle=True, generator=generator)
            else:
                for ids in torch.randperm(len(self.X), generator=generator).split(self.workload.batch_size):
                    yield self.X[ids], self.y[ids]

    def begin(self) -> float:
        start = time.perf_counter()
        if self.recorder is not None:
            self.recorder.start()
        return time.perf_counter() - start

    def take(self, steps: int) -> None:
        for _ in range(steps):
            start = time.perf_counter()
            x, y = next(self.batches)
            self.optimizer.zero_grad()
            LOSS(self.model(x), y).backward()
            self.optimizer.step()
            self.seconds.append(time.perf_counter() - start)
        if torch.device(self.workload.device).type == "cuda":  # what it has been given is still under way
            start = time.perf_counter()
            torch.cuda.synchronize(self.workload.device)
            self.seconds[-1] += time.perf_counter() - start
        start = time.perf_counter()
        if self.recorder is not None:
            self.recorder.trajectory.store.flush()
        self.waited.append(time.perf_counter() - start)

    def end(self) -> float:
        start = time.perf_counter()
        if self.recorder is not None:
            self.recorder.close()
        return time.perf_counter() - start


def pair(workload: Workload, optimizer: str, level: Level, folder: Path, turned: bool) -> dict[str, float]:
    """A plain and a recorded run, taken in turns."""
    path = Path(tempfile.mkdtemp(dir=folder)) / "run"
    plain, recorded = Run(workload, optimizer, None, path), Run(workload, optimizer, level, path)
    order = [recorded, plain] if turned else [plain, recorded]
    extra = recorded.begin()
    for at in range(0, workload.steps, workload.turn):
        for run in order if at // workload.turn % 2 else order[::-1]:
            run.take(workload.turn)
    extra += recorded.end()
    alike = all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), recorded.model.parameters(), strict=True))
    assert alike, "recording changed the training"
    first = workload.turn  # in which memory is touched for the first time
    extra += sum(recorded.waited[1:])
    return {
        "ratio": (sum(recorded.seconds[first:]) + extra) / sum(plain.seconds[first:]),
        "ratio_of_steps": statistics.median(recorded.seconds[first:]) / statistics.median(plain.seconds[first:]),
        "milliseconds_plain": 1e3 * statistics.median(plain.seconds[first:]),
        "milliseconds_per_step": 1e3 * statistics.median(recorded.seconds[first:]),
        "kilobytes_per_step": stored_bytes(recorded, path) / workload.steps / 1e3,
    }


def stored_bytes(run: Run, path: Path) -> float:
    """On disk; 0 for a record in memory."""
    size = sum(place.stat().st_size for place in path.rglob("*") if place.is_file())
    for place in sorted(path.rglob("*"), reverse=True):  # at once: pairs should not fill the disk
        place.unlink() if place.is_file() else place.rmdir()
    return float(size)


LINE = "{:<20} {:<13} {:<29} {:>7} {:>13} {:>10} {:>12} {:>9} {:>7}  {}"


def print_row(row: dict[str, Any]) -> None:
    judged = row["target"] is not None and row["pairs"] > 1
    verdict = ("ok" if row["ratio"] <= row["target"] else "MISSED") if judged else ""
    print(
        LINE.format(
            row["model"], row["optimizer"], row["level"], f"{row['ratio']:.3f}", f"{row['ratio_of_steps']:.3f}",
            f"{row['milliseconds_plain']:.3f}", f"{row['milliseconds_per_step']:.3f}",
            f"{row['kilobytes_per_step']:.1f}", row["target"] or "–", verdict,
        ),
        flush=True,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps, one pair each; the ratios mean nothing")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a list of flat objects")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of torch")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="plain and recorded runs, for the medians")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="for example cuda")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.deterministic = True  # plain and recorded runs are compared to the last bit
    quick = arguments.quick
    workloads = {
        MLP: Workload(mlp, vectors, 64, *((40, 10) if quick else (3200, 320)), arguments.device),
        CNN: Workload(cnn, images, 16, *((6, 2) if quick else (256, 64)), arguments.device),
    }
    print(f"Cost of recording{' (quick)' if quick else ''}, {1 if quick else arguments.pairs} pairs each")
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    where = f"{platform.machine()}, {arguments.threads} threads, {arguments.device}"
    print(f"{versions}, {where}, {time.strftime('%F')}")
    columns = ("model", "optimizer", "level", "ratio", "of steps", "plain ms", "recorded ms", "kB/step", "target", "")
    print(LINE.format(*columns))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, workload in workloads.items():
            for optimizer in OPTIMIZERS:
                for level, value in LEVELS.items():
                    rows.append(measured(name, workload, optimizer, level, value, folder, arguments))
                    print_row(rows[-1])
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    missed = [row for row in rows if row["target"] is not None and row["ratio"] > row["target"]]
    print(f"\ntargets met: {sum(row['target'] is not None for row in rows) - len(missed)} of {len(TARGETS)}")
    return 1 if missed and not quick else 0


def measured(
    name: str, workload: Workload, optimizer: str, level: str, value: Level, folder: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The row of one case."""
    pairs = [
        pair(workload, optimizer, value, Path(folder), turned=bool(i % 2))
        for i in range(1 if arguments.quick else arguments.pairs)
    ]
    return {
        "model": name,
        "optimizer": optimizer,
        "level": level,
        **{key: statistics.median(one[key] for one in pairs) for key in pairs[0]},
        "target": TARGETS.get((name, optimizer, level)),
        "pairs": len(pairs),
        "threads": arguments.threads,
        "device": arguments.device,
    }


if __name__ == "__main__":
    sys.exit(main())
