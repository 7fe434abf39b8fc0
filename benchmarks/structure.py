"""How large is the package, and how many of its files does one idea lead through?

    python benchmarks/structure.py [--package DIR] [--quick] [--json FILE]

Counts what a reader meets: modules at the top, circles of imports (imports for types alone count), classes, functions,
lines, files and classes that are too long, `isinstance` tests of gradients in factored form, docstrings that begin with
a pronoun or a preposition; and, under a profiler, the package's files that are entered by three walks: a kernel matrix,
an explanation, one recorded step. With `--package` the first part is of another checkout; the walks are of the package
that Python imports (`PYTHONPATH`).

A run of 12 steps with keyframes is counted too: how many steps each computation trains again. Exit status 1 where a
step is trained more than once.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import pathkernel as pk

BARE = {
    *("what", "whether", "see", "of", "those", "that", "by", "for", "which", "this", "it", "they", "who", "these"),
    *("its", "their", "in", "to", "from", "at", "with", "on"),
}
"""Words with which no docstring should begin: they leave out what it is about."""
FACTORS = re.compile(r"isinstance\([^)]*\b(?:Dense|Outer|Lookup|Factor)\b")
STEPS, KEYFRAMES = 12, 4


def imports(files: dict[str, Path]) -> dict[str, set[str]]:
    """Which modules of the package each of them imports, wherever and whatever for."""
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found[name] |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & files.keys()
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & files.keys()
    return found


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Modules that import each other, each set once."""

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for other in edges[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    reach = {name: reached(name) for name in edges}
    found: list[set[str]] = []
    for name in edges:
        mutual = {other for other in reach[name] if name in reach[other]}
        if len(mutual) > 1 and mutual not in found:
            found.append(mutual)
    return found


def counts(root: Path) -> dict[str, float]:
    """Static figures of a checkout."""
    package = root / "pathkernel"
    paths = sorted(package.rglob("*.py"))
    names = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    trees = [ast.parse(path.read_text("utf-8")) for path in paths]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    documented = [ast.get_docstring(node) for node in [*trees, *classes, *functions]]
    lines = [len(path.read_text("utf-8").splitlines()) for path in paths]
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for node in classes]
    met = circles(imports(names))
    text = "\n".join(path.read_text("utf-8") for path in paths)
    return {
        "loose modules": len([path for path in package.glob("*.py") if path.name != "__init__.py"]),
        "circles of imports": len(met),
        "modules in circles": sum(map(len, met)),
        "classes": len(classes),
        "functions": len(functions),
        "lines": sum(lines),
        "files over 450 lines": sum(number > 450 for number in lines),
        "classes over 400 lines": sum(number > 400 for number in lengths),
        "isinstance on factors": len(FACTORS.findall(text)),
        "docstrings": len([text for text in documented if text]),
        "docstrings with a bare beginning": sum(
            bool(text) and text.split()[0].strip("`.,:").lower() in BARE for text in documented
        ),
    }


def entered(call: Callable[[], Any]) -> int:
    """Files of the package that a call enters."""
    found: set[str] = set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            found.add(frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    package = str(Path(pk.__file__).parent)
    return len([name for name in found if name.startswith(package)])


def recorded(schedule: Any = None) -> tuple[pk.KernelRecorder, torch.Tensor, Callable[[], None]]:
    """A small network, its queries, and one step of its training."""
    torch.manual_seed(0)
    X, y = torch.randn(12, 4), torch.randn(12, 2)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss()
    recorder = pk.KernelRecorder(model, optimizer, loss, data=(X, y), schedule=schedule, audit_every=0)

    def step() -> None:
        x, target = recorder.batch(torch.arange(6))
        optimizer.zero_grad()
        loss(model(x), target).backward()
        optimizer.step()

    return recorder, X, step


def walks() -> dict[str, float]:
    """Files that are entered once the first call has proved what it needs."""
    recorder, X, step = recorded()
    with recorder:
        step()
        one_step = entered(step)
    kernel, machine = pk.PathKernel(recorder.trajectory), pk.KernelMachine(recorder.trajectory)
    kernel(X[:6], X[:4])
    machine.explain(X[:2])
    return {
        "files entered by kernel(X, Y)": entered(lambda: kernel(X[:6], X[:4])),
        "files entered by machine.explain(X)": entered(lambda: machine.explain(X[:2])),
        "files entered by one recorded step": one_step,
    }


def trained_again() -> dict[str, float]:
    """Steps of a run with keyframes that computations train again, and how many it has."""
    tasks: dict[str, Callable[[pk.Trajectory, torch.Tensor], Any]] = {
        "explain": lambda trajectory, X: pk.KernelMachine(trajectory).explain(X[:2]),
        "decision_function": lambda trajectory, X: pk.KernelMachine(trajectory).decision_function(X[:2]),
        "path kernel": lambda trajectory, X: pk.PathKernel(trajectory)(X[:6]),
    }
    found: dict[str, float] = {"steps of a run with keyframes": STEPS}
    for name, task in tasks.items():
        recorder, X, step = recorded(pk.Schedule(keyframes=KEYFRAMES))
        with recorder:
            for _ in range(STEPS):
                step()
        replay, again = recorder.trajectory.store.replay, 0
        take = replay.take

        def counted(record: Any, take: Any = take) -> Any:
            nonlocal again
            again += 1
            return take(record)

        replay.take = counted
        task(recorder.trajectory, X)
        found[f"steps trained again by {name}"] = again
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=Path(pk.__file__).parents[1], metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="the same: it takes seconds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    again = trained_again()
    figures = {**counts(arguments.package), **walks(), **again}
    rows = [{"figure": name, "value": value} for name, value in figures.items()]
    for row in rows:
        print(f"{row['figure']:40} {row['value']:8}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return int(max(value for name, value in again.items() if "trained" in name) > STEPS)


if __name__ == "__main__":
    sys.exit(main())
