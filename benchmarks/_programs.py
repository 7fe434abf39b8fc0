"""Training programs that are there twice, plain and recorded: what both are, run and compared."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pathkernel as pk
from pathkernel.callbacks import recording as callbacks_recording

ROUNDING = 1e-6
"""Part of the largest eigenvalue by which a positive semi-definite matrix may have negative ones."""

Row = dict[str, Any]


# -- a program ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A training program, once plain and once recorded, in the folders `plain` and `recorded` of a place.

    Attributes
    ----------
    what
        In words.
    short
        Its first argument (epochs, steps) in a quick run.
    outputs
        Which output of each query is explained, as `KernelMachine.explain` takes it.
    part
        Name of a submodule that is explained in place of the network, where that compares the samples of a batch: it
        has no prediction, and no kernel, for a sample of its own.
    tolerance
        Largest residual and split error: what rounding in the network's arithmetic leaves.
    refused
        Name of what the recorder refuses before the first step; empty where it is to record.
    axes
        Along which samples lie in the inputs of the network, one after the other, where not along the first.
    rows
        From what the network returned to outputs with one row for each query; None where they have that already.
    length
        Its first argument in a whole run; None for its own default.
    returns
        What the outputs are among all that the network returns, where the program leaves that to be found.
    """

    what: str
    short: int
    outputs: Any = None
    tolerance: float = 1e-5
    refused: str = ""
    part: str = ""
    axes: tuple[int, ...] = ()
    rows: Callable[[Any], Tensor] | None = None
    length: int | None = None
    returns: Any = None

    def samples_first(self, queries: Any) -> Any:
        """Queries as a machine takes them."""
        if not self.axes:
            return queries
        every = queries if isinstance(queries, tuple) else (queries,)
        moved = tuple(
            pytree.tree_map(lambda leaf, axis=axis: leaf.movedim(axis, 0), one)
            for one, axis in zip(every, self.axes, strict=True)
        )
        return moved if isinstance(queries, tuple) else moved[0]


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
    spec = importlib.util.spec_from_file_location(f"{path.parts[-3]}_{path.parts[-2]}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


class Run:
    """One run of a program: its networks with samples to explain, how long it took, and its recorders.

    Attributes
    ----------
    folder
        Where it ran: what it wrote lies there.
    queries
        Its networks, with samples to explain.
    state
        Weights and buffers of all networks, after training: copies, as explaining may not change them.
    random_state
        Of torch, numpy and Python, after training.
    """

    def __init__(self, path: Path, length: tuple[int, ...], folder: Path) -> None:
        self.recorders: list[pk.KernelRecorder] = []
        self.returns: dict[int, Any] = {}
        self.folder = folder
        module = load(path)
        folder.mkdir()
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        with contextlib.ExitStack() as stack:
            for place in (pk, callbacks_recording):
                stack.enter_context(mock.patch.object(place, "KernelRecorder", self._recorder))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(contextlib.chdir(folder))
            start = time.perf_counter()
            self.queries: dict[nn.Module, Any] = module.main(*length)
            self.seconds = time.perf_counter() - start
        self.random_state = (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())
        values = [value for network in self.queries for value in network.state_dict().values()]
        self.state = [value.clone() for value in values if isinstance(value, Tensor)]

    def _recorder(self, model: nn.Module, *arguments: Any, **options: Any) -> pk.KernelRecorder:
        recorder = RECORDER(model, *arguments, **options)
        self.recorders.append(recorder)
        self.returns[id(recorder)] = options.get("returns")
        return recorder

    def networks(self) -> Iterator[tuple[pk.KernelRecorder, nn.Module, Any]]:
        """Each network as the program returned it, its last recorder, and samples to explain."""
        for network, queries in self.queries.items():
            same = (network, getattr(network, "_orig_mod", None))
            whole = [recorder for recorder in self.recorders if recorder.model in same]
            parts = [recorder for recorder in self.recorders if network in recorder.model.modules()]
            if whole or parts:
                yield (whole or parts)[-1], network, queries


RECORDER = pk.KernelRecorder


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- what the record says ----------------------------------------------------------------------------------------------


def kept_step(recorder: pk.KernelRecorder) -> int | None:
    """After how many steps the network had the weights that it has now; None where they are those of the end."""
    trajectory, network = recorder.trajectory, recorder.model
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
    kept = kept_step(recorder)
    machine = pk.KernelMachine(trajectory) if kept is None else pk.KernelMachine(trajectory, at=kept)
    path = trajectory if kept is None else trajectory.until(kept)
    outputs = outputs_of(network, queries, returns if program.returns is None else program.returns, program)
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
        "unexplained": float(np.abs(why.channels.get("unexplained", 0)).max() / scale),
        "steps": len(path),
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


def measure(program: Program, name: str, place: Path, length: tuple[int, ...], repeats: int, *, draws: bool) -> Row:
    """One program: run it plain and recorded, then ask the record.

    Parameters
    ----------
    program, name, place
        What it is, and its files `place/plain/name.py` and `place/recorded/name.py`.
    length
        Its arguments.
    repeats
        How often it is run.
    draws
        Whether training counts as the same only where it left the generators of random numbers as they were without
        the recorder, too.
    """
    plain, recorded = place / "plain" / f"{name}.py", place / "recorded" / f"{name}.py"
    row: Row = {"lines": changed_lines(plain, recorded), "recorded": False}
    row |= dict.fromkeys((*FIGURES, "unexplained", "steps", "samples", "channels", "seconds"), None)
    row |= {"error": "", "warning": ""}

    def step(doing: Callable[[], Row]) -> bool:
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always", pk.errors.CertificateWarning)
                row.update(doing())
        except Exception as error:
            row["error"] = first_line(error)
            return False
        ours = [warning for warning in warned if is_ours(warning)]
        if ours:
            row["warning"] = first_line(ours[0].message)
        return True

    with tempfile.TemporaryDirectory() as scratch:
        folders = (Path(scratch) / f"{number}" for number in range(1 + 2 * repeats))
        plain_runs: list[Run] = []
        runs: list[Run] = []

        def run_plain() -> Row:
            plain_runs.append(Run(plain, length, next(folders)))
            return {}

        def record() -> Row:
            expected = plain_runs[0]
            fast, slow = [expected.seconds], []
            for _ in range(repeats):
                runs.append(Run(recorded, length, next(folders)))
                slow.append(runs[-1].seconds)
                fast.append(Run(plain, length, next(folders)).seconds)
            same = all(same_bits(run.state, expected.state) for run in runs)
            if draws:
                same = same and all(run.random_state == expected.random_state for run in runs)
            figures = {"recorded": True, "bit_identical_training": same, "overhead": min(slow) / min(fast)}
            return figures | {"seconds": min(fast)}

        def explain() -> Row:
            run = runs[0]
            with contextlib.chdir(run.folder):  # stores may lie there
                found = [
                    examine(recorder, network, queries, run.returns[id(recorder)], program)
                    for recorder, network, queries in run.networks()
                ]
            if len(found) != len(run.queries):
                raise RuntimeError(f"{len(found)} of {len(run.queries)} networks of the program were recorded")
            return worst(found)

        if not step(run_plain):
            row["error"] = f"without the recorder: {row['error']}"
        elif step(record):
            step(explain)
    return row


def is_ours(warning: warnings.WarningMessage) -> bool:
    """Whether a warning comes from this library, or is raised in a program itself."""
    return warning.category.__module__.startswith("pathkernel") or any(
        folder in Path(warning.filename).parents for folder in (Path(pk.__file__).parent, Path(__file__).parent)
    )


def first_line(error: Exception | Warning) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:240]


def shown(value: Any, form: str = "") -> str:
    if value is None:
        return "–"
    return ("yes" if value else "NO") if isinstance(value, bool) else format(value, form)
