"""What the first call of a kernel takes: in a process, and of a network that it has not met.

    python benchmarks/first_call.py [--quick] [--json FILE] [--only NETWORK ...] [--repeat N]

One row for each network: seconds of `TangentKernel(model)(X, Y)`, the making of the kernel included. In a new process,
with the imports of the package; of a network not met before, in a process that has computed another kernel; of a new
kernel of the same network; and of the second call of one kernel, which proves nothing any more. Beside them what torch
loads for itself when an optimizer makes its first step and `torch.func` is first used: whichever comes first pays it.

Each process has one thread and its modules compiled, as an installed package has; the GPT has the first 10 of its 4160
outputs. Printed are medians over processes, in seconds of the processor. That 0.1 s of a small network is not reached
is printed, and no fault of a result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

NETWORKS = {"MLP": 64, "CNN": 64, "ResNet-BatchNorm": 8, "GPT": 8}
"""Samples on each side."""

TARGET = 0.1
"""Seconds of a first call on a small network."""
SMALL = ("MLP", "CNN")

LINE = "{:<18} {:>8} {:>8} {:>14} {:>14} {:>12} {:>12}"


def measured(name: str, samples: int, start: str, compiled: str) -> dict[str, float]:
    """What one process says; see benchmarks/_first_call.py."""
    environment = os.environ | {"PYTHONPYCACHEPREFIX": compiled, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, str(Path(__file__).with_name("_first_call.py")), name, str(samples), start]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}, {start}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def row_of(name: str, samples: int, repeat: int, compiled: str) -> dict[str, object]:
    """Medians over processes of both kinds, which take turns."""
    turns = [[measured(name, samples, start, compiled) for start in ("fresh", "warm")] for _ in range(repeat)]
    fresh, warm = ({key: statistics.median(own[i][key] for own in turns) for key in turns[0][i]} for i in range(2))
    return {
        "network": name,
        "samples": samples,
        "torch_seconds": fresh["torch"],
        "fresh_process_seconds": fresh["first"],
        "new_network_seconds": warm["first"],
        "new_kernel_seconds": warm["new_kernel"],
        "second_call_seconds": warm["second"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two small networks, once; the times mean little")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a list of flat objects")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, metavar="NETWORK", help=f"some of {', '.join(NETWORKS)}")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="processes of each kind")
    arguments = parser.parse_args()

    print(f"First calls of a kernel{' (quick)' if arguments.quick else ''}: seconds of the processor")
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    print(f"{versions}, {platform.machine()}, 1 thread, {time.strftime('%F')}")
    print(LINE.format("network", "samples", "torch", "fresh process", "new network", "new kernel", "second call"))
    names = arguments.only or (SMALL if arguments.quick else NETWORKS)
    rows = []
    with tempfile.TemporaryDirectory() as compiled:
        measured("MLP", 2, "fresh", compiled)  # compiles the modules
        for name in names:
            rows.append(row_of(name, NETWORKS[name], 1 if arguments.quick else arguments.repeat, compiled))
            times = [f"{value:.3f}" for key, value in rows[-1].items() if key.endswith("_seconds")]
            print(LINE.format(name, NETWORKS[name], *times), flush=True)
    for row in rows:
        late = [key for key in ("fresh_process_seconds", "new_network_seconds") if row[key] > TARGET]  # type: ignore[operator]
        if row["network"] in SMALL and late:
            print(f"{row['network']}: {' and '.join(late)} above {TARGET} s")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
