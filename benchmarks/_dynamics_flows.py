"""Rows of `dynamics.py` about flows, steepest descent in a norm, finite steps and ledgers.

What is measured stands in `tests/dynamical.py`, which the tests share.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import dynamical
import matplotlib.pyplot as plt
import numpy as np
import torch
from _dynamics_rows import Row
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from pathkernel import dynamics, optimizers
from pathkernel.plotting.appearance import LOWERS, NEUTRAL, RAISES, TASK, styled

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
    flow = dynamics.gradient_flow(dynamical.network(), dynamical.LOSS, dynamical.data(), 0.4, points=33)
    why = flow.explain(dynamical.data()[0])
    yield Row("the flow as a kernel machine: largest residual, 33 points", why.residual.max(), 0, 1e-5)
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
    path = dynamical.quartic_steps()
    yield Row("Polyak: x at which steps of 0.01 enter [0.38, 0.43]", path[-1], 0.405, 0.025)
    yield Row("Polyak: steps of 0.01 until then (at most 3,000)", len(path) - 1, 1500, 1500)


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


# -- pictures of docs/explanation/optimizers_as_dynamics.md ------------------------------------------------------------

DIGITS, HIDDEN = 200, 16


def draw(folder: Path) -> None:
    """Write the pictures of the page about flows."""
    from pathkernel.plotting import EnergyDisplay, FlowDisplay, LossLedgerDisplay, RegularizationDisplay

    X, y = load_digits(return_X_y=True)
    data = torch.tensor(X[:DIGITS] / 16.0), torch.tensor(y[:DIGITS])
    loss = nn.CrossEntropyLoss()
    given: dict[str, Any] = {"samples": data, "loss": loss}
    flow = dynamics.gradient_flow(_classifier(), loss, data, 20.0)
    run = dynamical.recorded(lambda p: torch.optim.SGD(p, lr=1.0), 20, DIGITS, _classifier(), **given)
    rolling = dynamics.momentum_flow(_classifier(), loss, data, 15.0, friction=0.5)
    decayed = dynamical.recorded(
        lambda p: torch.optim.SGD(p, lr=0.5, weight_decay=1e-3), 40, DIGITS, _classifier(), **given
    )
    adam = dynamical.recorded(lambda p: torch.optim.AdamW(p, lr=0.01), 5, 40, _classifier(), **given)
    figures = {
        "flow": FlowDisplay.from_flow(flow, run).plot().figure_,
        "energy": EnergyDisplay(dynamics.energy_ledger(rolling)).plot().figure_,
        "orders": _orders(),
        "ledger": RegularizationDisplay(dynamics.regularization_ledger(decayed)).plot().figure_,
        "loss": LossLedgerDisplay(dynamics.loss_ledger(adam)).plot().figure_,
        "polyak": _polyak(),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"dynamics_{name}.png", dpi=110)
        plt.close(figure)


def _classifier() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10)).double()


def _orders() -> Figure:
    """Errors against the rate, with the slopes of theory."""
    with styled():
        figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained", sharey=True)
        names, rates = ("gradient flow", "first modified flow", "second modified flow"), np.array(dynamical.RATES)
        measures = ("one step", dynamical.local_errors, 2), ("a run", dynamical.global_errors, 1)
        for panel, (what, measure, first) in zip(panels, measures, strict=True):
            for terms, (name, color) in enumerate(zip(names, (RAISES, LOWERS, TASK), strict=True)):
                errors = measure(terms)
                panel.loglog(rates, errors, "o", color=color, label=f"{name}, order {first + terms}")
                panel.loglog(rates, errors[0] * (rates / rates[0]) ** (first + terms), color=color, linewidth=1)
            panel.set(xlabel="rate", title=f"Error of {what}")
            panel.grid(True, which="both")
            panel.legend(loc="lower right")
        panels[0].set(ylabel="distance in parameters", ylim=(1e-10, None))  # room for the legends
    return figure


def _polyak() -> Figure:
    """The quartic, the flow that stops in its dent, and the steps that get across."""
    flow, path = dynamical.quartic_flow(401).flow, np.array(dynamical.quartic_steps())
    height = lambda x: x * (x - 1) * (x - 3) ** 2 + 1.62276  # noqa: E731
    with styled():
        figure, (curve, course) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
        x = np.linspace(0, 4, 400)
        curve.plot(x, height(x), color=NEUTRAL)
        curve.plot(3, height(3), "s", color=RAISES, label="where the flow stops")
        curve.plot(path[-1], height(path[-1]), "o", color=LOWERS, label=f"after {len(path) - 1} steps")
        curve.set(xlabel="x", ylabel="f", title="A dent above the minimum")
        curve.legend(loc="upper left")
        course.plot(flow.times, flow.theta[:, 0], color=RAISES, label="flow")
        course.plot(0.01 * np.arange(len(path)), path, color=LOWERS, linewidth=0.8, label="steps of 0.01")
        course.set(xlabel="time", ylabel="x", title="Polyak's flow and Polyak's steps")
        course.legend(loc="upper right")
    return figure
