"""What is judged: pathkernel itself, by its public names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _workloads import Task, loaded, loss_of, network, optimizer_of
from torch import nn

import pathkernel as pk

Arrays = dict[str, np.ndarray]
Call = tuple[Callable[[], Any], Callable[[Any], np.ndarray]]
"""What is timed, and how its result becomes an (n, m) or (n, m, C, C) array."""


class NotAvailable(RuntimeError):
    """This version of pathkernel has no such option."""


def options(of: Any, **wanted: Any) -> dict[str, Any]:
    """Keyword arguments, those at their defaults left out; refused where this version does not have them."""
    known = inspect.signature(of).parameters
    asked = {name: value for name, value in wanted.items() if value is not None}
    missing = [name for name in asked if name not in known]
    if missing:
        raise NotAvailable(f"{of.__name__} has no {', '.join(f'`{name}=`' for name in missing)}")
    return asked


def recorded(task: Task, arrays: Arrays) -> pk.Trajectory:
    """The training run of the arrays under a recorder; it must come out the same to the last bit."""
    key = (task.optimizer, task.steps, task.batch, task.width, len(arrays["X"]))
    if key not in _trajectories:
        _trajectories[key] = _record(task, arrays)
    return _trajectories[key]


_trajectories: dict[tuple[Any, ...], pk.Trajectory] = {}


def _record(task: Task, arrays: Arrays) -> pk.Trajectory:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = network(task)
    optimizer, loss = optimizer_of(model, task), nn.CrossEntropyLoss()
    data = torch.from_numpy(arrays["X"]), torch.from_numpy(arrays["y"])
    with pk.KernelRecorder(model, optimizer, loss, data=data) as recorder:
        for ids in torch.from_numpy(arrays["ids"]):
            x, y = recorder.batch(ids)
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    end = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    if not np.array_equal(end, arrays["path"][-1]):
        raise RuntimeError("training under the recorder ended elsewhere than training without it")
    return recorder.trajectory


def tangent_kernel(task: Task, arrays: Arrays, engine: str, dtype: torch.dtype | str | None = None) -> pk.TangentKernel:
    loss = nn.CrossEntropyLoss() if task.network == "mlp" else loss_of
    return pk.TangentKernel(
        loaded(task, arrays).to(task.device),
        dtype=dtype,
        outputs=task.outputs,
        engine=engine,
        memory=task.memory,
        loss=loss if task.outputs == "loss" else None,
    )


def samples(task: Task, arrays: Arrays) -> tuple[Any, Any]:
    """Rows and columns as a kernel takes them."""

    def of(x: str, y: str) -> Any:
        inputs, targets = (torch.from_numpy(arrays[key]).to(task.device) for key in (x, y))
        return (inputs, targets) if task.outputs == "loss" else inputs

    return of("Xq", "yq"), of("X", "y") if "X" in arrays else None


def gram(task: Task, arrays: Arrays, engine: str, dtype: torch.dtype | str | None = None) -> Call:
    kernel, (queries, references) = tangent_kernel(task, arrays, engine, dtype), samples(task, arrays)

    def run() -> np.ndarray:
        return kernel(queries, references)

    # An engine keeps memory for its next call, which would not be seen there.
    if getattr(kernel.engine, "workspace", None) is not None:
        run.forget = kernel.engine.workspace.clear  # type: ignore[attr-defined]
    return run, np.asarray


def path_gram(task: Task, arrays: Arrays, engine: str) -> Call:
    """The path kernel of all its steps or, `tolerance` given, of as many as that takes; made anew at every call."""
    trajectory, (queries, references) = recorded(task, arrays), samples(task, arrays)
    chosen = options(pk.PathKernel, engine=engine, memory=task.memory, tolerance=task.tolerance or None)
    return lambda: pk.PathKernel(trajectory, outputs=task.outputs, **chosen)(queries, references), np.asarray


def shares(task: Task, arrays: Arrays, engine: str) -> Call:
    trajectory = recorded(task, arrays)
    chosen = options(pk.KernelMachine, quadrature=task.quadrature, memory=task.memory, engine=engine)
    machine, queries = pk.KernelMachine(trajectory, **chosen), torch.from_numpy(arrays["Xq"])
    return lambda: machine.explain(queries).shares, np.asarray


KINDS = {"gram": gram, "path gram": path_gram, "shares": shares}


def library(task: Task, arrays: Arrays, engine: str) -> Call:
    return KINDS[task.kind](task, arrays, engine)


ENGINES = {"pathkernel": "auto", "pathkernel-plain": "jacobian"}
METHODS = {method: functools.partial(library, engine=engine) for method, engine in ENGINES.items()}
METHODS["pathkernel-bfloat16"] = functools.partial(gram, engine="auto", dtype=torch.bfloat16)
METHODS["pathkernel-tf32"] = functools.partial(gram, engine="auto", dtype="tf32")


# ----------------------------------------------------------------------------------------------- the cost model


def predicted_seconds(task: Task, arrays: Arrays, method: str) -> float | None:
    """What pathkernel's own cost model says of a kernel matrix before it is computed; None where it says nothing.

    The one place that knows how the model is asked.
    """
    if method not in ENGINES or task.kind == "shares" or task.tolerance:  # whose nodes are not known yet
        return None
    kernel, (queries, _) = tangent_kernel(task, arrays, ENGINES[method]), samples(task, arrays)
    if not hasattr(kernel, "cost"):
        return None
    few = tuple(part[:4] for part in queries) if task.outputs == "loss" else queries[:4]
    n, m = task.queries, task.references or None
    # Which engine "auto" takes has no public name but in the text of `explain`.
    automatic = method == "pathkernel"
    engine = kernel.engine.chosen(kernel.theta, *kernel._samples(few), n, m) if automatic else kernel.engine.name
    seconds = sum(row.seconds for row in kernel.cost(few, n, m) if row.engine == engine)
    return (task.steps + 1 if task.kind == "path gram" else 1) * seconds
