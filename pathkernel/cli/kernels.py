"""Commands that compute: gram and explain, resumable; plan, before anybody trains."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from pathkernel._typing import PyTree
from pathkernel.cli.objects import opened, samples
from pathkernel.cli.stores import Result, _npz_file
from pathkernel.errors import check_number
from pathkernel.kernel_machine.kernel_machine import KernelMachine
from pathkernel.path_kernel.path_kernel import PathKernel
from pathkernel.recording.cost_table import format_plan, plan_table
from pathkernel.trajectory.trajectory import Trajectory


def gram(arguments: argparse.Namespace) -> Result:
    """The Gram matrix of a path kernel, kept in ``--store`` while it grows."""
    trajectory = opened(arguments)
    try:
        outputs = int(arguments.outputs)
    except (TypeError, ValueError):
        outputs = arguments.outputs
    kernel = PathKernel(
        trajectory,
        outputs=outputs,
        measure=arguments.measure,
        preconditioner=arguments.preconditioner,
        steps=arguments.steps,
        tolerance=arguments.tolerance,
        memory=arguments.memory,
        progress=not arguments.quiet,
    )
    everything = _everything(trajectory)
    (X,) = samples(arguments.queries, ("X",)) if arguments.queries is not None else (everything,)
    K = kernel(X, None if arguments.queries is None else everything, store=arguments.store)
    if arguments.output is not None:
        _npz_file(arguments.output, {"K": K})
    numbers = {
        "shape": list(K.shape),
        "nodes": len(kernel.nodes),
        "norm": float(np.linalg.norm(K)),
        "output": str(arguments.output) if arguments.output else None,
        "store": str(arguments.store) if arguments.store else None,
    }
    return 0, numbers, f"{kernel!r}\nK {K.shape}, Frobenius norm {numbers['norm']:.6g}"


def explain(arguments: argparse.Namespace) -> Result:
    """Explain outputs by the training samples that moved them; kept in ``--store`` while it grows."""
    check_number("--top", arguments.top, positive=True, whole=True, example=5)
    trajectory = opened(arguments)
    machine = KernelMachine(trajectory, memory=arguments.memory, progress=not arguments.quiet)
    (X,) = samples(arguments.queries, ("X",))
    why = machine.explain(X, outputs=arguments.output_index, store=arguments.store)
    rows: list[dict[str, Any]] = []
    lines = []
    for q in range(len(why.output)):
        order = np.argsort(-np.abs(why.shares[q]))[: arguments.top]
        top = [{"sample": int(i), "share": float(why.shares[q, i])} for i in order]
        rows.append(
            {
                "query": int(why.query_index[q]),
                "output": int(why.output_index[q]),
                "value": float(why.output[q]),
                "residual": float(why.residual[q]),
                "quadrature_error": float(why.quadrature_error[q]),
                "channels": {name: float(value[q]) for name, value in why.channels.items()},
                "top": top,
            }
        )
        named = ", ".join(f"{one['sample']} ({one['share']:+.3g})" for one in top)
        lines.append(f"query {rows[-1]['query']}, output {rows[-1]['output']} = {why.output[q]:.4g}: {named}")
    if arguments.output is not None:
        arrays = {"shares": why.shares, "output": why.output, **{f"channel.{k}": v for k, v in why.channels.items()}}
        _npz_file(arguments.output, arrays)
    largest = max(abs(row["residual"]) for row in rows)
    return 0, {"queries": rows}, "\n".join([*lines, f"largest residual {largest:.2g}"])


def _everything(trajectory: Trajectory) -> PyTree:
    """The inputs of all training samples."""
    return trajectory.data.everything()[0]


def plan(arguments: argparse.Namespace) -> Result:
    """Table of the levels of record: use and cost of each."""
    rows = plan_table(
        arguments.size,
        arguments.steps,
        optimizer=arguments.optimizer,
        batch_size=arguments.batch_size,
        bytes_per_number=arguments.bytes,
    )
    return 0, {"levels": [row.to_json() for row in rows]}, format_plan(rows)
