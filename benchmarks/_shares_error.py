"""Does the error bar of the shares hold? `explain(verify="shares")` against shares by a far finer quadrature.

Part of `certificate.py`. The networks, optimizers and losses of `exactness.py`, and averages over their quadratures:

true_error          median over the queries of Σ_i |share_i − exact share_i| / |f_S − f_0|
shares_error        median over the queries of the bar that was measured for it
covered             share of the queries whose true error lies within their bar
worst               the largest true error ÷ bar
median_ratio        median of bar ÷ true error over the queries whose true error is above rounding; None without any
quadrature_error    median of the error along the step, for comparison
seconds             for `explain(verify="shares")`, the bar included
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from exactness import COMMON, NETWORKS, OPTIMIZERS, PROBLEMS, Loop, cases, plain, record, size_of
from sklearn.model_selection import train_test_split
from torch import Tensor

import pathkernel as pk
from pathkernel.quadrature import Part, Quadrature, QueryStep, StepAverage

ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-13}
"""True errors below are rounding, relative to |f_S − f_0| or Σ_i |share_i|; their ratio to the bar says nothing."""


@dataclass(frozen=True)
class Thirds(Quadrature):
    """A quadrature on a third and on two thirds of a step: no node in common with the same on the whole step."""

    rule: Quadrature
    arithmetic = torch.float64
    relative = True

    def average(self, step: QueryStep) -> StepAverage:
        """Both parts, weighted by their lengths."""
        middle = step.value(1 / 3)
        first = self.rule.average(Part(step, 0.0, 1 / 3, step.start_value, middle))
        second = self.rule.average(Part(step, 1 / 3, 1.0, middle, step.end_value))
        gradient = 1 / 3 * first.gradient + 2 / 3 * second.gradient
        return StepAverage(gradient, first.error + second.error, first.evaluations + second.evaluations)


def finest(quadrature: Quadrature) -> Quadrature:
    """What stands for exact: rounding for smooth networks, and far below the quadrature in question at kinks."""
    return Thirds(pk.Adaptive(1e-14)) if isinstance(quadrature, pk.Adaptive) else pk.GaussLegendre(64)


def runs(quick: bool) -> Iterator[tuple[str, str, str, torch.dtype, Quadrature]]:
    """(optimizer, network, problem, type, quadrature), each network with its own quadratures."""
    for optimizer, network, problem in cases(quick):
        for quadrature in NETWORKS[network].quadratures:
            if not isinstance(quadrature, pk.Adaptive) or optimizer in COMMON:
                yield optimizer, network, problem, torch.float64, quadrature
        if optimizer in ("sgd", "adam"):
            yield optimizer, network, problem, torch.float32, pk.DiscreteGradient()


def compared(
    names: tuple[str, str, str], dtype: torch.dtype, quadrature: Quadrature, quick: bool, seed: int = 0
) -> dict[str, object]:
    """One row: train, explain with the bar, explain by the finest rule."""
    optimizer, network, problem_name = names
    problem, size = PROBLEMS[problem_name], size_of(quadrature, network, quick)
    X, y = problem.load()
    X_train, X_test, y_train, _ = train_test_split(X, y, test_size=size.queries, random_state=seed)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.tensor(array, dtype=dtype if array.dtype.kind == "f" else torch.int64)

    torch.manual_seed(seed)
    model = NETWORKS[network].build(X.shape[1], problem.outputs).to(dtype)
    data, loop = (tensor(X_train), tensor(y_train)), Loop(plain)
    trajectory, _ = record(OPTIMIZERS[optimizer], model, problem.loss, data, size.steps, seed, loop)
    outputs = (X.shape[1] - 1) * problem.outputs if problem_name == "next_token" else None
    start = time.perf_counter()
    why = pk.KernelMachine(trajectory, quadrature=quadrature).explain(tensor(X_test), outputs, verify="shares")
    seconds = time.perf_counter() - start
    exact = pk.KernelMachine(trajectory, quadrature=finest(quadrature), dtype=torch.float64)
    # One output of each, or all: the class that one arithmetic predicts may be the other's second.
    shares = exact.explain(tensor(X_test), why.output_index if len(why.output_index) == len(X_test) else outputs).shares
    moved = np.abs(why.output - why.initial)
    true = np.abs(why.shares - shares).sum(axis=1) / moved
    counted = true > ROUNDING[dtype] * np.maximum(1.0, np.abs(shares).sum(axis=1) / moved)
    return {
        "network": network,
        "optimizer": optimizer,
        "loss": problem_name,
        "dtype": str(dtype).removeprefix("torch."),
        "quadrature": repr(quadrature),
        "queries": len(true),
        "covered": float((true <= why.shares_error).mean()),
        "median_ratio": float(np.median((why.shares_error / true)[counted])) if counted.any() else None,
        "shares_error": float(np.median(why.shares_error)),
        "true_error": float(np.median(true)),
        "quadrature_error": float(np.median(why.quadrature_error)),
        "seconds": seconds,
        "worst": float((true / why.shares_error).max()),
    }


def rows(quick: bool) -> list[dict[str, object]]:
    """All rows."""
    torch.set_num_threads(1)
    return [compared(names, dtype, quadrature, quick) for *names, dtype, quadrature in runs(quick)]
