"""Do the quadratures converge at the order that theory gives them? Halve the step, watch the residual.

    python benchmarks/orders.py [--quick] [--json FILE] [--seed N]

A smooth network is trained by full-batch gradient descent for the same total time with step sizes h, h/2 and h/4, in
float64. The residual of its kernel machine, ‖Σ shares + f_0 − f_S‖ / ‖f_S − f_0‖, is then the quadrature's error alone,
and `order` is log₂ of the ratio between one step size and the next.

Exit status 1 if an order at the smallest step is not what theory says. To add a quadrature, add an entry to ORDERS.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time

import torch
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.quadrature import Quadrature

ORDERS: dict[Quadrature, int] = {
    pk.LeftEndpoint(): 1,
    pk.Trapezoid(): 2,
    pk.Midpoint(): 2,
    pk.GaussLegendre(1): 2,
    pk.GaussLegendre(2): 4,
    pk.GaussLegendre(3): 6,
}
TOLERANCE = 0.25  # of a measured order: the next term of the error expansion is still a few percent at these steps
STEP_SIZES, TOTAL_TIME = (0.1, 0.05, 0.025), 1.0
# Orders show where h times the curvature of the loss is small and yet a step is long enough for GaussLegendre(3) to
# stay above rounding error. Small inputs make the one, large targets the other.
INPUT_SCALE, TARGET_SCALE = 0.3, 10.0


def data(seed: int, samples: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standardised diabetes data, then scaled: training inputs and targets, test inputs."""
    X, y = load_diabetes(return_X_y=True)
    X = INPUT_SCALE * (X - X.mean(axis=0)) / X.std(axis=0)
    y = (TARGET_SCALE * (y - y.mean()) / y.std())[:, None]
    parts = train_test_split(X, y, train_size=samples, test_size=queries, random_state=seed)
    X_train, X_test, y_train, _ = (torch.tensor(part) for part in parts)
    return X_train, y_train, X_test


def record(X: Tensor, y: Tensor, step_size: float, seed: int) -> pk.Trajectory:
    """Gradient descent on all samples at once from the same initial network."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(X.shape[1], 16), nn.Tanh(), nn.Linear(16, 1)).double()
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=step_size), nn.MSELoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for _ in range(round(TOTAL_TIME / step_size)):
            for x, target in recorder.batches(batch_size=len(X)):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    return recorder.trajectory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a list of flat objects")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of data split and initial network")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # the network is so small that threads would only wait for each other
    samples, queries = (32, 8) if arguments.quick else (200, 50)
    X, y, X_test = data(arguments.seed, samples, queries)
    trajectories = [record(X, y, h, arguments.seed) for h in STEP_SIZES]

    print(f"Convergence orders, total time {TOTAL_TIME}, {samples} samples, {queries} queries, seed {arguments.seed}")
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    print(f"{versions}, {platform.machine()}, one thread, {time.strftime('%F')}\n")
    print(f"{'quadrature':<20} {'step_size':>9} {'residual':>10} {'order':>6} {'theory':>7}", flush=True)
    rows, passed = [], True
    for quadrature, theory in ORDERS.items():
        before = order = None
        for h, trajectory in zip(STEP_SIZES, trajectories, strict=True):
            residual = pk.KernelMachine(trajectory, quadrature=quadrature).explain(X_test).relative_residual
            order = None if before is None else math.log2(before / residual)
            rows.append({"quadrature": repr(quadrature), "step_size": h, "residual": residual, "order": order})
            shown = "–" if order is None else f"{order:.2f}"
            print(f"{quadrature!r:<20} {h:>9g} {residual:>10.2e} {shown:>6} {theory:>7}", flush=True)
            before = residual
        passed &= order is not None and abs(order - theory) <= TOLERANCE
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    print(f"\norders at the smallest step within {TOLERANCE} of theory: {'ok' if passed else 'NO'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
