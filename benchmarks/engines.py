"""How fast are the engines, how far from the floor, and how much faster than other libraries?

    python benchmarks/engines.py [--quick] [--peers] [--json FILE] [--only NAME …] [--methods NAME …] [--threads N]
                                 [--clock wall|cpu] [--device cpu|cuda]

Each row is one method on one workload. All methods of a workload take turns, each in a process of its own.

seconds        median over the rounds (of pathkernel: what the user's call takes, its float64 result included)
floor_seconds  what the structured method must do at least, layer by layer, at the speed of a float32 matrix product
               and of memory, both measured in the same rounds; benchmarks/_floors.py has the formulas
torch_seconds  of tangent kernels: what torch itself takes for the parts, forward pass, signals, rows and half of the
               products, without anything around them, in the same rounds (`torch-floor`, benchmarks/_torch_floor.py)
peak_mb        resident memory beyond what was there before the call, at its highest; the result is part of it
error          relative, Frobenius, against a plain float64 computation on rows and columns spread over the whole
               (`error_against` says how many)

Methods: `pathkernel` is engine="auto", `pathkernel-plain` engine="jacobian", `pathkernel-bfloat16` rounds the factors
of products, `pathkernel-tf32` rounds them to TensorFloat-32 and is there with `--device cuda` alone, `tutorial`
torch.func's own tutorial, `rows` vmap(grad) into a buffer and one product. `--peers` installs other libraries into
environments of their own and runs them too. Workloads: W1 an MLP 64-256-256-10, W2 a small CNN, W3 a causal
transformer; one TracIn checkpoint; path Gram matrices and shares of a network trained on digits; memory budgets;
scaling. Where others work on the same machine, `--threads 1 --clock cpu` counts the time of each process on the
processor alone: threads that wait for each other there say nothing of an engine. `--device cuda` times pathkernel's
tangent kernels on a GPU, with its products and memory as the floor; peak_mb is of the GPU's memory then.

Exit status 1 if a result of pathkernel is not as exact as it should be. Speed is reported, not enforced.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _floors import count, gram_products, parameters_of, spared
from _peers import ENVIRONMENTS
from _peers import METHODS as PEER_METHODS
from _rounds import Entry, Here, Rounds, Speed, Worker
from _targets import TORCH_FLOOR, all_targets, bounds, find, scaling, wrong
from _worker import CLOCKS
from _workloads import OUTPUTS, Task

MODULES = {
    "pathkernel": "_library",
    TORCH_FLOOR: "_torch_floor",
    "pathkernel-plain": "_library",
    "pathkernel-bfloat16": "_library",
    "pathkernel-tf32": "_library",
    "tutorial": "_plain",
    "rows": "_plain",
}
OWN = tuple(MODULES)
METHODS = (*OWN, *(method for methods in PEER_METHODS.values() for method in methods))
NEURAL_TANGENTS = PEER_METHODS["jax"]
OUTPUT_PEERS = ("nngeometry", "asdfghjkl", "backpack", *NEURAL_TANGENTS)
LOSS_PEERS = (
    "asdfghjkl",
    "backpack",
    "opacus",
    "dattri",
    "dattri-batches",
    "captum",
    "captum-default",
    *NEURAL_TANGENTS,
)

SMALL = {"queries": 12, "references": 40, "steps": 5, "batch": 8}
"""Of paths, for --quick."""

Groups = dict[str, list[Entry]]


def kernel_groups(quick: bool) -> Groups:
    """Tangent kernels at one θ."""
    tasks = {
        "W1 trace": Task(queries=16 if quick else 1024),
        "W1 full": Task(outputs="full", queries=12 if quick else 256),
        "W2 trace": Task(network="cnn", queries=6 if quick else 256),
        "W2 full": Task(network="cnn", outputs="full", queries=3 if quick else 256),
        "W3 loss": Task(network="transformer", outputs="loss", queries=3 if quick else 128),
    }
    tasks["TracIn checkpoint"] = Task(
        outputs="loss", data="digits", **SMALL if quick else {"queries": 360, "references": 1437, "steps": 500}
    )
    peers = {name: LOSS_PEERS if task.outputs == "loss" else OUTPUT_PEERS for name, task in tasks.items()}
    return {name: [Entry(name, m, task) for m in (*OWN, *peers[name])] for name, task in tasks.items()}


def path_groups(quick: bool) -> Groups:
    """Along a recorded path on digits."""
    task = Task(data="digits", **SMALL if quick else {"queries": 1797, "references": 1437, "steps": 500})
    path = replace(task, kind="path gram")
    every = Entry("path Gram, every step", "pathkernel", path)
    few = Entry("path Gram, tolerance 1e-3", "pathkernel", replace(path, tolerance=1e-3), judged_by=every)
    nodes = task.steps + 1
    one_of_all = Entry(every.workload, "rows", replace(path, part=1), nodes, f"1 of {nodes} nodes, scaled")
    single = Entry("path Gram, one tangent kernel", "pathkernel", task)
    return {
        "path Gram": [single, every, few, one_of_all],
        **{f"shares {optimizer}": share_entries(optimizer, quick) for optimizer in ("SGD", "AdamW")},
    }


def share_entries(optimizer: str, quick: bool) -> list[Entry]:
    """Shares of test samples in the logit of their predicted class."""
    sizes = SMALL if quick else {"queries": 360, "references": 1437, "steps": 500}
    entries = []
    for quadrature in ("discrete_gradient", "midpoint"):
        name = f"shares {optimizer}, {quadrature.replace('_', ' ')}"
        task = Task(kind="shares", outputs="logit", data="digits", optimizer=optimizer, quadrature=quadrature, **sizes)
        entries.append(Entry(name, "pathkernel", task))
        part = min(20, task.steps)
        note = f"{part} of {task.steps} steps, scaled"
        entries.append(Entry(name, "rows", replace(task, part=part), task.steps / part, note))
        if quadrature == "discrete_gradient":
            short = replace(task, steps=part)
            note = f"a path of {part} instead of {task.steps} steps, scaled"
            entries.append(Entry(name, "pathkernel-plain", short, task.steps / part, note))
    return entries


def memory_group(quick: bool) -> list[Entry]:
    """The same kernels under budgets."""
    tasks = {
        "W1 trace": Task(queries=16 if quick else 1024),
        "W1 full": Task(outputs="full", queries=12 if quick else 256),
        "W2 trace": Task(network="cnn", queries=6 if quick else 256),
    }
    entries = []
    for name, task in tasks.items():
        for budget in (64,) if quick else (64, 128, 256, 1024):
            entry = Entry(f"memory {name}, {budget} MB", "pathkernel", replace(task, memory=f"{budget}MB"))
            samples = OUTPUTS * task.queries * parameters_of(task)
            entry.extra = {"budget_mb": float(budget), "rows_mb": 4e-6 * samples}
            entries.append(entry)
    return entries


def scaling_group(quick: bool) -> list[Entry]:
    """One size at a time: samples N, parameters P (by the width), steps S."""
    samples, widths, steps = (256, 512, 1024, 2048), (128, 256, 512, 1024), (62, 125, 250, 500)
    if quick:
        samples, widths, steps = (16, 32), (16, 32), (2, 4)
    n, m = (16, 16) if quick else (512, 256)
    tasks = [("N", float(k), Task(queries=k)) for k in samples]
    tasks += [("P", float(parameters_of(Task(width=w))), Task(queries=n, width=w)) for w in widths]
    path = Task(kind="path gram", data="digits", queries=m, references=m, batch=8 if quick else 64)
    tasks += [("S", float(s), replace(path, steps=s)) for s in steps]
    entries = []
    for what, size, task in tasks:
        entries.append(Entry(f"scaling {what} = {size:g}", "pathkernel", task, extra={"scaling": what, "size": size}))
    return entries


def all_groups(quick: bool) -> Groups:
    groups = kernel_groups(quick) | path_groups(quick)
    return groups | {"memory": memory_group(quick), "scaling": scaling_group(quick)}


# ------------------------------------------------------------------------------------------------------- running


def refusal(arguments: argparse.Namespace) -> str | None:
    """What is wrong with a device that was asked for: what was found, what was expected, what to write; or None."""
    if arguments.device == "cpu":
        return None
    if not torch.cuda.is_available():
        found = f"`--device {arguments.device}` was given, and torch {torch.__version__} finds no such device"
        expected = "kernels are timed on a device that is there, by a torch that was built for it"
        return f"{found}; {expected}; leave `--device` out, or install torch for this GPU"
    if arguments.clock != "wall":
        found = f"`--device {arguments.device} --clock {arguments.clock}` was given"
        return f"{found}; what a GPU takes is no time of the processor; write `--clock wall`, or leave it out"
    return None


def on_device(entries: list[Entry], device: str) -> list[Entry]:
    """Kernels by pathkernel, on a device. Others run on the CPU, and a path that was trained there is another one."""
    if device == "cpu":
        return [entry for entry in entries if entry.method != "pathkernel-tf32"]
    kept = [entry for entry in entries if entry.method.startswith("pathkernel") and entry.task.kind == "gram"]
    for entry in kept:
        entry.task = replace(entry.task, device=device)
    return kept


def workers_of(arguments: argparse.Namespace, threads: int) -> dict[str, Any]:
    """By method: here in this process for --quick, else processes of their own; peers where they are installed."""
    if arguments.quick:
        here = {module: Here(module, arguments.clock) for module in dict.fromkeys(MODULES.values())}
        workers: dict[str, Any] = {method: here[module] for method, module in MODULES.items()}
    else:
        workers = {
            method: Worker(sys.executable, module, threads, arguments.clock) for method, module in MODULES.items()
        }
    for environment in ENVIRONMENTS if arguments.peers else ():
        failed = environment.make(lambda text: print(text, flush=True))
        print(f"peers in {environment.folder}: {environment.versions()}")
        for package, reason in failed.items():
            print(f"  {package} could not be installed: {reason}")
        for method in PEER_METHODS[environment.name]:
            workers[method] = Worker(str(environment.python), environment.module, threads, arguments.clock)
    return workers


def row_of(entry: Entry, speed: Speed, threads: int) -> dict[str, Any]:
    """One flat row of the results."""
    work, moved = count(entry.task)
    share = 1.0 if entry.task.part else entry.scale
    row = {
        "workload": entry.workload,
        "method": entry.method,
        "seconds": entry.median,
        "floor_seconds": share * (work / speed.products + moved / speed.bandwidth),
        "peak_mb": entry.measured.get("peak_mb"),
        "error": entry.error,
        "status": entry.failure or "ok",
        "note": entry.note,
        "kind": entry.task.kind,
        "steps": entry.task.steps,
        "repetitions": max(1, len(entry.seconds)),
        "result_mb": entry.measured.get("result_mb"),
        "gflop": share * work / 1e9,
        "gigabytes": share * moved / 1e9,
        "torch_seconds": None,
        "product_gflops": speed.products / 1e9,
        "bandwidth_gbs": speed.bandwidth / 1e9,
        "threads": threads,
        "device": entry.task.device,
        "error_against": "",
    }
    if entry.task.kind == "gram":
        row["floor_products_seconds"] = gram_products(entry.task) / speed.products  # without the passes
        row["floor_spared_seconds"] = spared(entry.task) / speed.products  # what the floor has too many
    return row | entry.extra


LINE = "{:<34} {:<28} {:>9} {:>9} {:>8} {:>8} {:>9} {:>9}  {}"


def over(seconds: float | None, floor: float | None) -> float | None:
    """How many times a floor; None where either is not known."""
    return None if seconds is None or floor is None else seconds / floor


def print_row(row: dict[str, Any]) -> None:
    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    ratios = (over(row["seconds"], row[floor]) for floor in ("floor_seconds", "torch_seconds"))
    remark = row["note"] if row["status"] == "ok" else row["status"]
    numbers = shown(row["seconds"], ".4g"), f"{row['floor_seconds']:.4g}", *(shown(ratio, ".3g") for ratio in ratios)
    rest = shown(row["peak_mb"], ".0f"), shown(row["error"], ".1e")
    print(LINE.format(row["workload"], row["method"], *numbers, *rest, remark), flush=True)


def chosen(name: str, beginnings: list[str]) -> bool:
    return any(name.lower().startswith(beginning.lower()) for beginning in beginnings)


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K  {text}", end="\r", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in one process")
    parser.add_argument("--peers", action="store_true", help="install other libraries, outside the project; run them")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a list of flat objects")
    parser.add_argument("--only", metavar="NAME", nargs="+", default=[""], help="groups whose names begin so")
    parser.add_argument("--methods", metavar="NAME", nargs="+", default=METHODS, choices=METHODS, help="only these")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of every method")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what seconds are; cpu: of each process")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where pathkernel's kernels are")
    parser.add_argument("--repeat", type=int, default=7, metavar="N", help="rounds, of methods that are quick")
    arguments = parser.parse_args()

    if (problem := refusal(arguments)) is not None:
        parser.error(problem)
    torch.set_num_threads(arguments.threads)
    print(f"Engines: how fast, how exact{' (quick)' if arguments.quick else ''}")
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    device = "" if arguments.device == "cpu" else f", {torch.cuda.get_device_name()}"
    clock = f"{arguments.threads} threads, {arguments.clock} time"
    print(f"{versions}, {platform.machine()}{device}, {clock}, {time.strftime('%F')}")
    groups = {name: entries for name, entries in all_groups(arguments.quick).items() if chosen(name, arguments.only)}
    groups = {name: on_device(entries, arguments.device) for name, entries in groups.items()}
    workers = workers_of(arguments, arguments.threads)
    rows: list[dict[str, Any]] = []
    print(
        LINE.format("workload", "method", "seconds", "floor", "× floor", "× torch", "peak MB", "error", ""), flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            for entries in groups.values():
                wanted = [e for e in entries if e.method in workers and e.method in arguments.methods]
                rows += run_group(wanted, workers, Path(folder), arguments) if wanted else []
        finally:
            for worker in workers.values():
                worker.close()
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return verdict(rows, arguments.quick)


def run_group(
    entries: list[Entry], workers: dict[str, Any], folder: Path, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    start = time.perf_counter()
    speed = Speed(512 if arguments.quick else 2048, arguments.clock, arguments.device)
    speed()
    settings = {"most": 0, "subset": 4, "pause": 0.0} if arguments.quick else {"most": arguments.repeat, "subset": 48}
    Rounds(workers, folder, speed, **settings).run(entries, progress)
    progress("")
    rows = [row_of(entry, speed, arguments.threads) | {"clock": arguments.clock} for entry in entries]
    for row in rows:
        torch_floor = find(rows, row["workload"], TORCH_FLOOR)
        row["torch_seconds"] = None if torch_floor is None else torch_floor["seconds"]
        print_row(row)
    speeds = f"products {speed.products / 1e9:.0f} GFLOP/s, memory {speed.bandwidth / 1e9:.0f} GB/s"
    print(f"  {speeds}; took {time.perf_counter() - start:.0f} s", flush=True)
    return rows


def verdict(rows: list[dict[str, Any]], quick: bool) -> int:
    """Print targets and errors; the exit status."""
    print()
    for line in scaling(rows):
        print(line)
    if quick:
        print("(sizes this small say nothing of speed)")
    targets = [target for target in all_targets(rows) if target.value is not None]
    for target in targets:
        print(target)
    for line in bounds(rows):
        print(line)
    print(f"targets met: {sum(bool(target.met) for target in targets)} of {len(targets)} measured")
    faults = wrong(rows)
    print(f"errors of pathkernel within their limits: {'ok' if not faults else 'NO'}")
    for fault in faults:
        print(f"  {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
