"""Rows of `dynamics.py` about flows, steepest descent in a norm, finite steps and ledgers.

What is measured stands in `tests/dynamical.py`, which the tests share.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import dynamical
import numpy as np
import torch
from _dynamics_rows import Row

from pathkernel import dynamics, optimizers

ORDER = 0.2
"""How far a measured order may be from the theoretical one."""
STEPS = "finite steps: order of the error of"


def rows(quick: bool) -> Iterator[Row]:
    """Every number of the flows; ``quick`` for fewer noisy directions."""
    for group in GROUPS.values():
        yield from group(quick)


def finite_steps(quick: bool) -> Iterator[Row]:
    """Modified flows, of one term more each."""
    for terms, name in enumerate(("gradient flow", "first modified flow", "second modified flow")):
        yield Row(f"{STEPS} one step, {name}", dynamical.local_order(terms), 2 + terms, ORDER)
        yield Row(f"{STEPS} a run, {name}", dynamical.global_order(terms), 1 + terms, ORDER)
    for terms, name in enumerate(("momentum in the time γ/(1 − β)", "the same, modified")):
        yield Row(f"{STEPS} a run, {name}", dynamical.global_order(terms, 0.5), 1 + terms, ORDER)
    for ordering, name in (("given", "in its order"), ("mean", "mean over all orders")):
        plain, modified = dynamical.epoch_order(ordering, plain=True), dynamical.epoch_order(ordering)
        yield Row(f"{STEPS} an epoch of mini-batches, {name}, gradient flow", plain, 2, ORDER)
        yield Row(f"{STEPS} an epoch of mini-batches, {name}, modified", modified, 3, ORDER)


def discrete_maps(quick: bool) -> Iterator[Row]:
    """Optimizers approach their flows; so do their path kernels."""
    for name, (_, _, _, expected) in dynamical.MAPS.items():
        yield Row(f"steps to flow: order in the step, {name}", dynamical.map_order(name), expected, ORDER)
    steps = np.array([0.04, 0.02, 0.01])
    by_rule, without = dynamical.changed_rate(True), dynamical.changed_rate(False)
    yield Row("steps to flow: heavy ball whose rate changes, by the β-rule", dynamical.order(steps, by_rule), 1, ORDER)
    yield Row("steps to flow: the same with β as it was (does not approach)", dynamical.order(steps, without), 0, ORDER)
    yield Row("steps to flow: order in the step, path kernel under SGD", dynamical.kernel_order(), 1, ORDER)
    for name, friction in (("momentum", 1.0), ("Nesterov, 3/t", None)):
        flow = dynamics.nesterov_flow(
            dynamical.network(), dynamical.LOSS, dynamical.data(), 4.0, friction=friction, points=17
        )
        yield Row(f"energy: L + ½‖v‖² + ∫λ‖v‖² less L(0), {name}", dynamics.energy_ledger(flow).residual, 0, 1e-6)


def norms(quick: bool) -> Iterator[Row]:
    """dL/dt = −‖∇L‖_*."""
    for norm in ("l2", "linf", "l1", "spectral"):
        yield Row(f"norms: dL/dt against −‖∇L‖_*, {norm}", dynamical.slope_error(norm), 0, 1e-6)


def ledgers(quick: bool) -> Iterator[Row]:
    """Remainders, and exact sums."""
    for kind in dynamical.RUNS:
        loss, outputs = dynamical.remainder_orders(kind)
        yield Row(f"regularization ledger: order of the remainder, loss, {kind}", loss, 2, ORDER)
        yield Row(f"regularization ledger: order of the remainder, outputs, {kind}", outputs, 2, ORDER)
    for name, make in {
        "SGD, momentum, decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5, weight_decay=0.01),
        "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
        "spectral descent": lambda p: optimizers.SpectralDescent(p, lr=0.02),
    }.items():
        ledger = dynamics.loss_ledger(dynamical.recorded(make, 3, size=4))
        yield Row(f"loss ledger: its sums less the measured change, {name}", ledger.residual, 0, 1e-10)


def polyak(quick: bool) -> Iterator[Row]:
    """L(t) = L(0) e^{−t}, and where that ends."""
    flow = dynamics.polyak_flow(dynamical.network(), dynamical.LOSS, dynamical.data(), 1.0)
    off = np.abs(flow.losses / flow.losses[0] - np.exp(-flow.times)).max()
    yield Row("Polyak: largest difference of L(t)/L(0) from e^{−t}", float(off), 0, 1e-6)
    error = dynamical.quartic_flow()
    yield Row("Polyak: x where the flow of x(x−1)(x−3)² + 1.62276 from 4 stops", float(error.flow.theta[-1]), 3, 1e-3)
    yield Row("Polyak: time at which it stops", float(error.flow.times[-1]), 2.1276, 1e-4)
    count, x = dynamical.quartic_steps()
    yield Row("Polyak: x at which steps of 0.01 enter [0.38, 0.43]", x, 0.405, 0.025)
    yield Row("Polyak: steps of 0.01 until then (at most 3,000)", count, 1500, 1500)


def noise(quick: bool) -> Iterator[Row]:
    """Stationary variances, each within four standard errors."""
    count = 500 if quick else 4000
    sigma, curvature, friction = 0.5, 1.5, 2.0
    expected = sigma**2 / (2 * curvature)
    found, error = dynamical.variance(dynamics.langevin, count, curvature, sigma, time=30.0, step=0.01, points=21)
    yield Row("noise: Ornstein–Uhlenbeck variance σ²/(2h)", found, expected, 4 * error * expected)
    found, error = dynamical.variance(
        dynamics.kramers, count, curvature, sigma, friction=friction, time=60.0, step=0.1, points=21
    )
    expected /= friction
    yield Row("noise: Kramers variance σ²/(2λh)", found, expected, 4 * error * expected)


GROUPS = {
    "finite-steps": finite_steps,
    "maps": discrete_maps,
    "norms": norms,
    "ledgers": ledgers,
    "polyak": polyak,
    "noise": noise,
}
