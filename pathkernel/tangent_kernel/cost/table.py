"""The table that says how a kernel is computed, at what cost, and why."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.gradients.layers.plain import lines_on
from pathkernel.tangent_kernel.cost.model import ENGINES, CostModel, CostRow, choose
from pathkernel.tangent_kernel.engines.engine import Engine
from pathkernel.tangent_kernel.engines.layerwise import LayerwiseEngine


def cost_model(engine: Engine, theta: Tensor, X: PyTree, context: PyTree) -> CostModel:
    """The cost model of the kernel that an engine computes."""
    return CostModel(LayerwiseEngine.of(engine), theta, X, context)


def cost_rows(engine: Engine, theta: Tensor, X: PyTree, context: PyTree, n: int, m: int | None = None) -> list[CostRow]:
    """Costs of an (n, m) matrix on every engine, m None for the symmetric (n, n)."""
    model = cost_model(engine, theta, X, context)
    return [row for name in ENGINES for row in model.rows(name, n, m)]


def describe(
    engine: Engine,
    theta: Tensor,
    X: PyTree,
    context: PyTree,
    n: int,
    m: int | None = None,
    left_out: Mapping[str, str] | None = None,
) -> str:
    """Description of how an (n, m) matrix is computed, as text: the choice and its reason, and the cost of every layer.

    Parameters
    ----------
    engine, theta
        Of the kernel.
    X, context
        Samples, of which the first few are passed through the network, and what h needs of each.
    n, m
        Rows and columns; m None for the symmetric (n, n).
    left_out
        Parameters of the model that are no part of θ, and why.
    """
    model = cost_model(engine, theta, X, context)
    best, reason = choose(model, n, m)
    taken = best if engine.name == "auto" else engine.name
    chosen = f"chosen: {reason}" if engine.name == "auto" else f"as asked; cheapest would be {best!r}: {reason}"
    shown = taken if taken in ENGINES else best
    rows = model.rows(shown, n, m)
    totals = {name: model.seconds(name, n, m) for name in ENGINES}
    lines = [
        f"{n} × {n if m is None else m}{' (upper half)' if m is None else ''} by engine {taken!r}, {chosen}",
        "predicted: " + ", ".join(f"{name} {_time(seconds)}" for name, seconds in totals.items()),
        precision(engine),
        "",
        _table(rows),
    ]
    lines += lines_on(model.plain, engine.function.layout)
    lines += [f"left out: {', '.join(names)} ({why})" for why, names in _grouped(left_out or {}).items()]
    return "\n".join(lines)


def precision(engine: Engine) -> str:
    """Floating types in which an engine computes."""
    passes, products = (str(dtype).removeprefix("torch.") for dtype in (engine.function.dtype, engine.products))
    products = "TensorFloat-32" if engine.tensor_floats else products
    return f"passes in {passes}, products in {products}, sums in {passes}, matrix in float64"


def _table(rows: list[CostRow]) -> str:
    header = ("layer", "way", "GFLOP", "MB moved", "MB held", "time", "why")
    body = [
        (
            row.layer,
            row.way,
            f"{row.flops / 1e9:.3g}",
            f"{row.bytes / 1e6:.3g}",
            f"{row.peak_bytes / 1e6:.3g}",
            _time(row.seconds),
            row.reason,
        )
        for row in rows
    ]
    total = ("total", "", f"{sum(r.flops for r in rows) / 1e9:.3g}", f"{sum(r.bytes for r in rows) / 1e6:.3g}", "",
             _time(sum(r.seconds for r in rows)), "")  # fmt: skip
    lines = [header, *body, total]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    right = range(2, 6)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 1 else f"{seconds * 1e3:.2g} ms"


def _grouped(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault(why, []).append(name)
    return groups
