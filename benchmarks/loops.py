"""Do loops that people have record as they stand? Training programs in the manner of public ones, one row each.

    python benchmarks/loops.py [--quick] [--json FILE] [--only NAME ...]

Every program is there twice: as it was, in `loops/plain`, and with the recorder's lines, in `loops/recorded`. A row
says what these lines are and whether the record is right:

lines                   added or changed in the recorded program (`git diff -w`); not counted are imports, and what
                        `main` returns to this benchmark
recorded                whether the loop ran to its end under the recorder
residual                largest of |output − Σ shares − Σ channels|, relative to the largest output that was explained
split_error             how far rows of gradients are from passes of the batches as they ran; None where not measured
agreement               part of the queries of which the machine predicts what the network does
bit_identical_training  whether weights and buffers end with the same bits as without the recorder
overhead                seconds with the recorder, relative to those without; these programs take a second or less, of
                        which the trial of the first step and the audits take most
explain_ok              whether shares and channels are finite and add up to the outputs, within the tolerance
path_kernel_ok          whether the path kernel of the queries is finite, symmetric, and positive semi-definite; None
                        for a network that has none, since it compares the samples of a batch with each other
error, warning          first lines of what went wrong, and of what the certificate doubts; the benchmark goes on

A program that cannot be recorded is to be refused by name before its first step. Exit status 1 where a loop was not
recorded, explained or refused as it should be, or where its training was changed by it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from _loops_programs import PROGRAMS, Program
from torch import Tensor, nn

import pathkernel as pk

PLACE = Path(__file__).resolve().parent / "loops"
LINES_LIMIT = 3
ROUNDING = 1e-6
"""Part of the largest eigenvalue by which a positive semi-definite matrix may have negative ones."""

Row = dict[str, Any]


# -- the lines ---------------------------------------------------------------------------------------------------------


def changed_lines(plain: Path, recorded: Path) -> int:
    """Lines of the recorded program that the plain one has not, and those that it has lost without a new one."""
    command = ["git", "diff", "-w", "--no-index", "--no-color", "--unified=0", str(plain), str(recorded)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode > 1:
        raise RuntimeError(done.stderr)
    hunks = re.split(r"^@@ .*$", done.stdout, flags=re.MULTILINE)[1:]
    return sum(max(len(_code(hunk, "+")), len(_code(hunk, "-"))) for hunk in hunks)


def _code(hunk: str, sign: str) -> list[str]:
    """Lines of one side that are the program's own."""
    lines = [line[1:].strip() for line in hunk.splitlines() if line.startswith(sign)]
    return [line for line in lines if line and not line.startswith(("import ", "from ", "return {"))]


# -- running a program -------------------------------------------------------------------------------------------------


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loops_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


class Run:
    """One run of a program: its networks with samples to explain, how long it took, and its recorders."""

    def __init__(self, module: ModuleType, length: tuple[int, ...]) -> None:
        self.recorders: list[pk.KernelRecorder] = []
        self.returns: dict[int, Any] = {}
        with mock.patch.object(pk, "KernelRecorder", self._recorder), contextlib.redirect_stdout(io.StringIO()):
            start = time.perf_counter()
            self.queries: dict[nn.Module, Any] = module.main(*length)
            self.seconds = time.perf_counter() - start

    def _recorder(self, model: nn.Module, *arguments: Any, **options: Any) -> pk.KernelRecorder:
        recorder = RECORDER(model, *arguments, **options)
        self.recorders.append(recorder)
        self.returns[id(recorder)] = options.get("returns")
        return recorder

    @property
    def state(self) -> list[Tensor]:
        """Weights and buffers of all networks."""
        return [value for network in self.queries for value in network.state_dict().values()]

    def networks(self) -> Iterator[tuple[pk.KernelRecorder, nn.Module, Any]]:
        """Each recorder, its network as the program returned it, and samples to explain."""
        for recorder in self.recorders:
            for network, queries in self.queries.items():
                if recorder.model in (network, getattr(network, "_orig_mod", None)):
                    yield recorder, network, queries


RECORDER = pk.KernelRecorder


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- what the record says ----------------------------------------------------------------------------------------------


def kept_step(trajectory: pk.Trajectory, network: nn.Module) -> int | None:
    """After how many steps the network had the weights that it has now; None where they are those of the end."""
    wanted = {name.removeprefix("_orig_mod."): p.detach() for name, p in network.named_parameters()}

    def are_at(step: int) -> bool:
        found = trajectory.parameters(step)
        return all(torch.equal(value, wanted[name]) for name, value in found.items())

    if are_at(len(trajectory)):
        return None
    return max((step for step in range(len(trajectory)) if are_at(step)), default=None)


def outputs_of(network: nn.Module, queries: Any, returns: Any, program: Program) -> np.ndarray:
    """What the network itself says, (n, C)."""
    found: list[Any] = []
    part = network.get_submodule(program.part) if program.part else network
    handle = part.register_forward_hook(lambda module, arguments, returned: found.append(returned))
    network.eval()
    with torch.no_grad():
        if isinstance(queries, dict):
            network(**queries)
        else:
            network(*queries) if isinstance(queries, tuple) else network(queries)
    handle.remove()
    returned = found[-1]
    if isinstance(returns, str):
        returned = returned[returns] if isinstance(returned, dict) else getattr(returned, returns)
    elif returns is not None:
        returned = returned[returns] if isinstance(returns, int) else returns(returned)
    parts = returned if isinstance(returned, tuple) else (returned,)
    if program.rows is not None:
        parts = tuple(program.rows(part) for part in parts)
    return torch.cat([part.flatten(1) if part.dim() > 1 else part[:, None] for part in parts], dim=1).double().numpy()


def agreement_of(
    machine: pk.KernelMachine, why: pk.Attributions, queries: Any, outputs: np.ndarray, program: Program
) -> float:
    """Part of the queries of which the machine says what the network does: the class, or all outputs."""
    if machine.is_classifier:
        classes = outputs.argmax(axis=1) if outputs.shape[1] > 1 else outputs[:, 0] > 0
        return float((machine.predict(queries) == classes).mean())
    if program.part:
        found, outputs = why.reconstruction[:, None], outputs[:, [program.outputs]]
    else:
        found = machine.decision_function(queries).reshape(outputs.shape)
    return float((np.abs(found - outputs).max(axis=1) <= 10 * program.tolerance * np.abs(outputs).max()).mean())


def is_kernel_matrix(K: np.ndarray) -> bool:
    """True where a matrix is finite, symmetric, and positive semi-definite to rounding."""
    if not (np.isfinite(K).all() and np.array_equal(K, K.T) and K.any()):
        return False
    eigenvalues = np.linalg.eigvalsh(K)
    return bool(eigenvalues[0] >= -ROUNDING * eigenvalues[-1])


def examine(recorder: pk.KernelRecorder, network: nn.Module, queries: Any, returns: Any, program: Program) -> Row:
    """Explain a few samples, and compare with the network."""
    trajectory = recorder.trajectory
    kept = kept_step(trajectory, network)
    machine = pk.KernelMachine(trajectory) if kept is None else pk.KernelMachine(trajectory, at=kept)
    path = trajectory if kept is None else trajectory.until(kept)
    outputs = outputs_of(network, queries, returns, program)
    queries = program.samples_first(queries)
    asked = (program.part, program.outputs) if program.part else program.outputs
    why = machine.explain(queries, outputs=asked)
    scale = np.abs(why.output).max()
    residual = float(np.abs(why.left_over).max() / scale)
    finite = all(np.isfinite(part).all() for part in (why.shares, *why.channels.values()))
    return {
        "residual": residual,
        "split_error": None if np.isnan(why.split_error) else why.split_error,
        "explain_ok": bool(finite and why.shares.any() and residual <= program.tolerance),
        "agreement": agreement_of(machine, why, queries, outputs, program),
        "path_kernel_ok": None if program.part else is_kernel_matrix(pk.PathKernel(path)(queries)),
        "samples": why.shares.shape[1],
        "channels": ", ".join(why.channels),
    }


def worst(rows: list[Row]) -> Row:
    """Of several networks of one program."""
    joined: Row = {}
    for key in rows[0]:
        values = [row[key] for row in rows if row[key] is not None]
        if key in ("explain_ok", "path_kernel_ok"):
            joined[key] = all(values)
        elif key == "channels":
            joined[key] = "; ".join(values)
        else:
            joined[key] = (min if key == "agreement" else max)(values, default=None)
    return joined


# -- one row -----------------------------------------------------------------------------------------------------------

FIGURES = ("residual", "split_error", "agreement", "bit_identical_training", "overhead", "explain_ok", "path_kernel_ok")


def measure(name: str, quick: bool, repeats: int) -> Row:
    """One program: run it plain and recorded, then ask the record."""
    program = PROGRAMS[name]
    plain, recorded = PLACE / "plain" / f"{name}.py", PLACE / "recorded" / f"{name}.py"
    length = (program.short,) if quick else ()
    row: Row = {"loop": name, "what": program.what, "lines": changed_lines(plain, recorded), "recorded": False}
    row |= dict.fromkeys((*FIGURES, "samples", "channels", "seconds"), None) | {"error": "", "warning": ""}

    def step(doing: Callable[[], Row]) -> bool:
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always", pk.errors.CertificateWarning)
                row.update(doing())
        except Exception as error:
            row["error"] = first_line(error)
            return False
        if warned:
            row["warning"] = first_line(warned[0].message)
        return True

    expected = Run(load(plain), length)
    runs: list[Run] = []

    def record() -> Row:
        fast, slow = [expected.seconds], []
        for _ in range(repeats):
            runs.append(Run(load(recorded), length))
            slow.append(runs[-1].seconds)
            fast.append(Run(load(plain), length).seconds)
        same = all(same_bits(run.state, expected.state) for run in runs)
        figures = {"recorded": True, "bit_identical_training": same, "overhead": min(slow) / min(fast)}
        return figures | {"seconds": min(fast)}

    def explain() -> Row:
        run = runs[0]
        found = [
            examine(recorder, network, queries, run.returns[id(recorder)], program)
            for recorder, network, queries in run.networks()
        ]
        if len(found) != len(run.queries):
            raise RuntimeError(f"{len(found)} of {len(run.queries)} networks of the program were recorded")
        return worst(found)

    if step(record):
        step(explain)
    return row


def first_line(error: Exception | Warning) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:240]


# -- judgement ---------------------------------------------------------------------------------------------------------


def verdict(row: Row) -> str:
    """What a row lacks; empty where nothing."""
    program = PROGRAMS[row["loop"]]
    if program.refused:
        refused = not row["recorded"] and program.refused in row["error"] and "Error: " in row["error"]
        return "" if refused else "not refused by name"
    if not row["recorded"]:
        return "not recorded"
    lacks = [
        ("other bits", row["bit_identical_training"]),
        ("not explained", row["explain_ok"]),
        ("residual", row["residual"] is None or row["residual"] <= program.tolerance),
        ("split error", row["split_error"] is None or row["split_error"] <= program.tolerance),
        ("agreement", row["agreement"] is None or row["agreement"] == 1),
        ("path kernel", row["path_kernel_ok"] or bool(program.part and row["explain_ok"])),
    ]
    return ", ".join(what for what, good in lacks if not good)


LINE = "{:<27} {:>5} {:>8} {:>9} {:>9} {:>6} {:>5} {:>8} {:>9} {:>6}  {}"


def shown(value: Any, form: str = "") -> str:
    if value is None:
        return "–"
    return ("yes" if value else "NO") if isinstance(value, bool) else format(value, form)


def print_row(row: Row) -> None:
    print(
        LINE.format(
            row["loop"],
            row["lines"],
            shown(row["recorded"]),
            shown(row["residual"], ".1e"),
            shown(row["split_error"], ".1e"),
            shown(row["agreement"], ".2f"),
            shown(row["bit_identical_training"]),
            shown(row["overhead"], ".2f"),
            shown(row["explain_ok"]),
            shown(row["path_kernel_ok"]),
            "; ".join(filter(None, (verdict(row), row["error"], row["warning"])))[:160],
        ),
        flush=True,
    )


def within_targets(rows: list[Row]) -> bool:
    """Print each target with what was measured."""
    lacking = [row["loop"] for row in rows if verdict(row)]
    long = [f"{row['loop']} {row['lines']}" for row in rows if row["lines"] > LINES_LIMIT]
    recorded = [row for row in rows if row["recorded"]]
    ratios = [row["overhead"] for row in recorded]
    print()
    print(
        f"recorded, explained and bit-identical, or refused by name: target all {len(rows)}; measured "
        f"{len(rows) - len(lacking)}{': not ' + ', '.join(lacking) if lacking else ''}"
    )
    print(
        f"lines: target ≤ {LINES_LIMIT} each; measured {len(rows) - len(long)} of {len(rows)}"
        f"{': not ' + ', '.join(long) if long else ''}"
    )
    for figure, limit in (("residual", 1e-5), ("split_error", 1e-5)):
        for low in (False, True):
            own = [row for row in recorded if (PROGRAMS[row["loop"]].tolerance > limit) is low]
            values = [(row[figure], row["loop"]) for row in own if row[figure] is not None]
            if values:
                bound = max(PROGRAMS[row["loop"]].tolerance for row in own)
                value, loop = max(values)
                name = f"{figure.replace('_', ' ')} in {'bfloat16' if low else 'float32'}"
                print(f"{name}: target ≤ {bound:g}; measured at worst {value:.1e} ({loop})")
    if ratios:
        more = [(row["overhead"] - 1) * row["seconds"] for row in recorded]
        print(
            f"overhead: median {np.median(ratios):.2f}, at worst {max(ratios):.2f}; in seconds, median "
            f"{np.median(more):.2f}, at worst {max(more):.2f}"
        )
    return not lacking


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, and each program once")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a list of flat objects")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(PROGRAMS), help="some of the programs")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # these networks are so small that threads would only wait for each other
    print(f"Loops as they stand{' (quick)' if arguments.quick else ''}")
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    print(f"{versions}, {platform.machine()}, one thread, {time.strftime('%F')}")
    print(
        LINE.format(
            "loop", "lines", "recorded", "residual", "split", "agree", "bits", "overhead", "explained", "kernel", ""
        )
    )
    rows = []
    for name in arguments.only or PROGRAMS:
        rows.append(measure(name, arguments.quick, 1 if arguments.quick else 3))
        print_row(rows[-1])
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return 0 if within_targets(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
