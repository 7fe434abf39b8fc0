"""Would compiling the network make its passes faster?

    python benchmarks/compilation.py [--quick] [--json FILE] [--threads N]

One row for each network of benchmarks/engines.py: the time of a forward and a backward pass as it is and compiled by
`torch.compile`, their ratio (above 1: compiling costs), the seconds of compilation, and how far the compiled gradient
is from the other. Both take turns. It is what docs/explanation/layers.md says about compilation; no engine compiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _workloads import Task, arrays_of, loaded
from torch import Tensor

NETWORKS = {
    "W1, an MLP": Task(queries=1024),
    "W2, a CNN": Task(network="cnn", queries=64),
    "W3, a transformer": Task(network="transformer", outputs="loss", queries=32),
}
LINE = "{:<20} {:>10} {:>12} {:>8} {:>14} {:>10}"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def row_of(name: str, task: Task, quick: bool) -> dict[str, Any]:
    """Eager and compiled passes of one network, taking turns."""
    arrays = arrays_of(task)
    model = loaded(task, arrays)
    X, parameters = torch.from_numpy(arrays["Xq"]), list(model.parameters())

    def gradients(network: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(network(X).square().mean(), parameters))

    # Without its code generator, --quick needs no compiler of C++.
    compiled = torch.compile(model, backend="aot_eager" if quick else "inductor")
    beginning = seconds(lambda: gradients(compiled))
    turns = range(2 if quick else 21)
    times = [(seconds(lambda: gradients(model)), seconds(lambda: gradients(compiled))) for _ in turns]
    eager, other = (statistics.median(column) for column in zip(*times, strict=True))
    expected, found = (torch.cat([g.reshape(-1) for g in gradients(network)]) for network in (model, compiled))
    return {
        "network": name,
        "samples": task.queries,
        "milliseconds_eager": 1e3 * eager,
        "milliseconds_compiled": 1e3 * other,
        "ratio": other / eager,
        "seconds_of_compilation": beginning,
        "error": float((found - expected).norm() / expected.norm()),
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two samples, no code generated; the times mean nothing")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a list of flat objects")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of torch")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    print(f"Forward and backward passes, as they are and compiled{' (quick)' if arguments.quick else ''}")
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    print(f"{versions}, {platform.machine()}, {arguments.threads} threads, {time.strftime('%F')}")
    print(LINE.format("network", "eager ms", "compiled ms", "ratio", "compilation s", "error"))
    rows = []
    for name, task in NETWORKS.items():
        own = Task(**{**task.to_json(), "queries": 2}) if arguments.quick else task
        row = row_of(name, own, arguments.quick)
        rows.append(row)
        times = f"{row['milliseconds_eager']:.2f}", f"{row['milliseconds_compiled']:.2f}", f"{row['ratio']:.2f}"
        print(LINE.format(name, *times, f"{row['seconds_of_compilation']:.1f}", f"{row['error']:.1e}"), flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
