"""How exactly does the kernel machine reproduce the network? Real trainings, one row each.

    python benchmarks/exactness.py [--quick] [--json FILE] [--seed N]

Every row trains a network under `KernelRecorder`, explains test samples by their training samples, and compares the sum
Σ shares + Σ channels with what the network itself says:

residual            ‖left over‖ / ‖f_S − f_0‖ over all queries
quadrature_error    median over the queries of what the rule missed before any correction: the error bar of the shares
gradients_per_step  of each query
agreement           share of the queries on which `KernelMachine.predict` equals the network's prediction (classifiers)
seconds             for `explain`, without training

Exit status 1 if a limit is exceeded. To add a case, add an entry to one of the tables OPTIMIZERS, NETWORKS, PROBLEMS.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn, optim

import pathkernel as pk
from pathkernel.quadrature import Quadrature

# A recorded step is θ + Δ rounded to the parameters' type, and that rounding belongs to no sample. It is the machine
# epsilon (1.2e-7 and 2.2e-16), magnified by ‖θ‖ / ‖Δ‖ where training moved little. The limits allow factors of 80 and
# 4500, the second for adaptive bisection too, which stops at 16 roundings of f in each interval.
RESIDUAL_LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}
AGREEMENT_LIMIT = 1.0  # a reconstruction that is right to rounding names the same class for every sample
BATCH_SIZE = 32


@dataclass(frozen=True)
class Recipe:
    """How to train: an optimizer over parameters and, if there is one, a schedule for `steps` steps."""

    optimizer: Callable[..., optim.Optimizer]
    schedule: Callable[[optim.Optimizer, int], optim.lr_scheduler.LRScheduler] | None = None
    note: str = ""


@dataclass(frozen=True)
class Network:
    """A network for some numbers of inputs and outputs, and the quadratures that suit it."""

    build: Callable[[int, int], nn.Module]
    quadratures: tuple[Quadrature, ...]


@dataclass(frozen=True)
class Problem:
    """Data (features, targets), the number of outputs, and the loss to train with."""

    load: Callable[[], tuple[np.ndarray, np.ndarray]]
    outputs: int
    loss: nn.Module


@dataclass(frozen=True)
class Size:
    """How long to train and how much to explain."""

    steps: int
    queries: int


def cosine(optimizer: optim.Optimizer, steps: int) -> optim.lr_scheduler.LRScheduler:
    return optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


OPTIMIZERS = {
    "sgd": Recipe(lambda p: optim.SGD(p, lr=0.1), note="lr 0.1"),
    "momentum": Recipe(
        lambda p: optim.SGD(p, lr=0.03, momentum=0.9, weight_decay=1e-2), note="lr 0.03, μ 0.9, coupled decay 1e-2"
    ),
    "nesterov": Recipe(
        lambda p: optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True), cosine, note="lr 0.03 → 0 by cosine, μ 0.9"
    ),
    "adam": Recipe(lambda p: optim.Adam(p, lr=3e-3, weight_decay=1e-2), note="lr 3e-3, coupled decay 1e-2"),
    "adamw": Recipe(lambda p: optim.AdamW(p, lr=3e-3, weight_decay=1e-2), note="lr 3e-3, decoupled decay 1e-2"),
}

NETWORKS = {
    "mlp_tanh": Network(
        lambda inputs, outputs: nn.Sequential(
            nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, outputs)
        ),
        (pk.GaussLegendre(4), pk.DiscreteGradient()),
    ),
    "mlp_relu": Network(
        lambda inputs, outputs: nn.Sequential(
            nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, outputs)
        ),
        # The tolerance is relative to |f| in each interval, the residual to the change of f over all of training: where
        # that change is a tenth of |f| and a step takes ten intervals, 1e-14 here is 1e-12 there.
        (pk.DiscreteGradient(), pk.Adaptive(1e-14)),
    ),
}


def digits() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    return X / 16, y


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_breast_cancer(return_X_y=True)
    return (X - X.mean(axis=0)) / X.std(axis=0), y[:, None].astype(float)


def diabetes() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_diabetes(return_X_y=True)
    return (X - X.mean(axis=0)) / X.std(axis=0), ((y - y.mean()) / y.std())[:, None]


PROBLEMS = {
    "cross_entropy": Problem(digits, 10, nn.CrossEntropyLoss()),
    "bce": Problem(breast_cancer, 1, nn.BCEWithLogitsLoss()),
    "mse": Problem(diabetes, 1, nn.MSELoss()),
}

DTYPES = (torch.float32, torch.float64)


def size_of(quadrature: Quadrature, quick: bool) -> Size:
    """Adaptive bisection takes a hundred gradients a step and more, so it gets fewer steps and queries."""
    if isinstance(quadrature, pk.Adaptive):
        return Size(steps=2, queries=4) if quick else Size(steps=4, queries=6)
    return Size(steps=12, queries=10) if quick else Size(steps=40, queries=30)


def cases(quick: bool) -> Iterator[tuple[str, str, str]]:
    """(optimizer, network, problem): all of them, or, for the impatient, the problems in turn."""
    problems = list(PROBLEMS)
    for j, network in enumerate(NETWORKS):
        for k, problem in enumerate(problems):
            for i, optimizer in enumerate(OPTIMIZERS):
                if not quick or (i + j) % len(problems) == k:
                    yield optimizer, network, problem


def record(
    recipe: Recipe, model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], steps: int, seed: int
) -> pk.Trajectory:
    """An ordinary training loop on random mini-batches, watched."""
    optimizer = recipe.optimizer(model.parameters())
    schedule = recipe.schedule(optimizer, steps) if recipe.schedule is not None else None
    generator = torch.Generator().manual_seed(seed)
    with pk.KernelRecorder(model, optimizer, loss, data=data) as recorder:
        for _ in range(steps):
            x, y = recorder.batch(torch.randperm(len(data[0]), generator=generator)[:BATCH_SIZE])
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
    return recorder.trajectory


def network_predictions(model: nn.Module, X: Tensor) -> np.ndarray:
    """Classes as the live network gives them."""
    with torch.no_grad():
        outputs = model(X)
    return (outputs.argmax(dim=1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0).long()).numpy()


def measure(
    names: tuple[str, str, str], dtype: torch.dtype, quadrature: Quadrature, size: Size, seed: int
) -> dict[str, object]:
    """One row: train, explain, compare."""
    recipe, network, problem = OPTIMIZERS[names[0]], NETWORKS[names[1]], PROBLEMS[names[2]]
    X, y = problem.load()
    X_train, X_test, y_train, _ = train_test_split(X, y, test_size=size.queries, random_state=seed)
    data = torch.tensor(X_train, dtype=dtype), torch.tensor(y_train)
    if data[1].is_floating_point():
        data = data[0], data[1].to(dtype)
    queries = torch.tensor(X_test, dtype=dtype)

    torch.manual_seed(seed)
    model = network.build(X.shape[1], problem.outputs).to(dtype)
    trajectory = record(recipe, model, problem.loss, data, size.steps, seed)
    machine = pk.KernelMachine(trajectory, quadrature=quadrature)
    start = time.perf_counter()
    why = machine.explain(queries)
    seconds = time.perf_counter() - start
    agreement = None
    if machine.is_classifier:
        agreement = float((machine.predict(queries) == network_predictions(model, queries)).mean())
    return {
        "optimizer": names[0],
        "network": names[1],
        "loss": names[2],
        "dtype": str(dtype).removeprefix("torch."),
        "quadrature": repr(quadrature),
        "residual": why.relative_residual,
        "quadrature_error": float(np.median(why.quadrature_error)),
        "gradients_per_step": why.gradients_per_step,
        "seconds": seconds,
        "agreement": agreement,
        "steps": size.steps,
        "queries": size.queries,
    }


LINE = "{:<9} {:<9} {:<13} {:<8} {:<27} {:>5} {:>7} {:>9} {:>10} {:>10} {:>9} {:>7}"


def print_header(quick: bool, seed: int) -> None:
    print(f"Exactness of the kernel machine{' (quick)' if quick else ''}, seed {seed}")
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    print(f"{versions}, {platform.machine()}, one thread, {time.strftime('%F')}")
    for name, recipe in OPTIMIZERS.items():
        print(f"  {name:<9} {recipe.note}")
    others, adaptive = size_of(pk.DiscreteGradient(), quick), size_of(pk.Adaptive(), quick)
    print(f"Mini-batches of {BATCH_SIZE}; {others.steps} steps and {others.queries} test samples for a row,")
    print(f"{adaptive.steps} steps and {adaptive.queries} test samples under `Adaptive`, which works in float64.\n")
    columns = ("optimizer", "network", "loss", "dtype", "quadrature", "steps", "queries")
    print(LINE.format(*columns, "residual", "quad.error", "grads/step", "agreement", "seconds"), flush=True)


def print_row(row: dict[str, object]) -> None:
    agreement = "–" if row["agreement"] is None else f"{row['agreement']:.3f}"
    numbers = f"{row['residual']:.1e}", f"{row['quadrature_error']:.1e}", f"{row['gradients_per_step']:.1f}"
    names = [row[key] for key in ("optimizer", "network", "loss", "dtype", "quadrature", "steps", "queries")]
    print(LINE.format(*names, *numbers, agreement, f"{row['seconds']:.2f}"), flush=True)


def within_limits(rows: list[dict[str, object]]) -> bool:
    """Print the worst of each against its limit."""
    passed = True
    print()
    for dtype, limit in RESIDUAL_LIMIT.items():
        judged = [row for row in rows if row["dtype"] == str(dtype).removeprefix("torch.")]
        if not judged:
            continue
        # `not (≤)` rather than `>`: a residual that is not a number fails too.
        worst = max(judged, key=lambda row: np.nan_to_num(row["residual"], nan=np.inf))
        good = worst["residual"] <= limit
        where = ", ".join(str(worst[key]) for key in ("optimizer", "network", "loss", "quadrature"))
        verdict = "ok" if good else "EXCEEDED"
        print(f"worst residual in {worst['dtype']}: {worst['residual']:.1e} ({where}); limit {limit:.0e}: {verdict}")
        passed &= good
    agreements = [row["agreement"] for row in rows if row["agreement"] is not None]
    if agreements:
        good = min(agreements) >= AGREEMENT_LIMIT
        verdict = "ok" if good else "EXCEEDED"
        print(f"worst agreement: {min(agreements):.3f}; limit {AGREEMENT_LIMIT}: {verdict}")
        passed &= good
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each network and optimizer on one problem only")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a list of flat objects")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of data split, initial network and batches")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # these networks are so small that threads would only wait for each other
    print_header(arguments.quick, arguments.seed)
    rows = []
    for names, dtype in itertools.product(cases(arguments.quick), DTYPES):
        for quadrature in NETWORKS[names[1]].quadratures:
            rows.append(measure(names, dtype, quadrature, size_of(quadrature, arguments.quick), arguments.seed))
            print_row(rows[-1])
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return 0 if within_limits(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
