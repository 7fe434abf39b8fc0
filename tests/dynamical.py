"""What tests and `benchmarks/dynamics.py` measure of flows: orders, slopes, variances, each on a network of 21 numbers.

A network of 4 tanh units on 8 samples is smooth, and small enough for flows to be followed to rounding in a moment.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import pathkernel as pk
from pathkernel import dynamics, optimizers

EXACT: dict[str, Any] = {"method": "dopri8", "rtol": 1e-10, "atol": 1e-12, "points": 2}
"""Options of a flow that stands for the truth."""
LOSS = nn.MSELoss()
BATCHES = ((0, 1, 2), (3, 4), (5, 6, 7))
"""Three mini-batches, of different sizes."""


def data() -> tuple[Tensor, Tensor]:
    """Eight samples of a smooth function."""
    X = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return X, 2 * torch.sin(X[:, :1]) + X[:, 1:2]


def network() -> nn.Module:
    """The same network in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def vector(model: nn.Module) -> Tensor:
    """θ."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


Before = Callable[[Optimizer, int, Callable[[], Tensor]], None]


def descended(make: Callable[[Any], Optimizer], steps: int, before: Before | None = None, ids: Any = None) -> Tensor:
    """θ after so many steps of an optimizer on all samples, or on the batches in turn."""
    model, (X, y) = network(), data()
    optimizer, batches = make(model.parameters()), [slice(None)] if ids is None else [list(batch) for batch in ids]
    for k in range(steps):
        rows = batches[k % len(batches)]

        def closure(rows: Any = rows) -> Tensor:
            optimizer.zero_grad()
            value = LOSS(model(X[rows]), y[rows])
            value.backward()
            return value

        if before is not None:
            before(optimizer, k, closure)
        optimizer.step(closure)
    return vector(model)


def recorded(
    make: Callable[[Any], Optimizer],
    steps: int,
    size: int = 8,
    model: nn.Module | None = None,
    samples: tuple[Tensor, Tensor] | None = None,
    loss: nn.Module = LOSS,
    before: Callable[[nn.Module], Any] = lambda model: None,
    **options: Any,
) -> pk.Trajectory:
    """A recorded run of so many passes over the samples, with something done before each step of the optimizer."""
    model = network() if model is None else model
    optimizer = make(model.parameters())
    with pk.KernelRecorder(model, optimizer, loss, data=samples or data(), **options) as recorder:
        for _ in range(steps):
            for x, target in recorder.batches(batch_size=size):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                before(model)
                optimizer.step()
    return recorder.trajectory


def order(sizes: Sequence[float], errors: Sequence[float]) -> float:
    """The slope of log error over log size."""
    return float(np.polyfit(np.log(sizes), np.log(np.abs(errors)), 1)[0])


# -- finite steps ------------------------------------------------------------------------------------------------------


RATES = (0.02, 0.01, 0.005)


def local_errors(terms: int) -> list[float]:
    """Errors of one step of gradient descent at three rates against a modified flow of so many terms."""
    errors = []
    for rate in RATES:
        flow = dynamics.modified_flow(network(), LOSS, data(), rate, lr=rate, order=terms, **EXACT)
        errors.append(float((descended(lambda p, r=rate: torch.optim.SGD(p, lr=r), 1) - flow.theta[-1]).norm()))
    return errors


def global_errors(terms: int, momentum: float = 0.0) -> list[float]:
    """Errors of runs of length 0.2 against a modified flow, in the time γ/(1 − β) of a step."""
    errors = []
    for rate in np.array(RATES) * (1 - momentum) ** 2:
        steps = round(0.2 * (1 - momentum) / rate)
        flow = dynamics.modified_flow(network(), LOSS, data(), 0.2, lr=rate, order=terms, momentum=momentum, **EXACT)
        end = descended(lambda p, r=rate: torch.optim.SGD(p, lr=r, momentum=momentum), steps)
        errors.append(float((end - flow.theta[-1]).norm()))
    return errors


def local_order(terms: int) -> float:
    """Order of `local_errors` in the rate."""
    return order(RATES, local_errors(terms))


def global_order(terms: int, momentum: float = 0.0) -> float:
    """Order of `global_errors` in the rate."""
    return order(RATES, global_errors(terms, momentum))


def epoch_order(ordering: str, plain: bool = False) -> float:
    """Order of the error of one epoch of three mini-batches, in their order or in the mean over all orders."""
    errors = []
    for rate in RATES:
        orders = list(itertools.permutations(BATCHES)) if ordering == "mean" else [BATCHES]
        ends = [descended(lambda p, r=rate: torch.optim.SGD(p, lr=r), 3, ids=batches) for batches in orders]
        # A rate of 0 leaves the mean of the losses alone, in the same clock.
        flow = dynamics.modified_flow(
            network(), LOSS, data(), 3 * rate, lr=1e-12 if plain else rate, batches=BATCHES, ordering=ordering, **EXACT
        )
        errors.append(float((torch.stack(ends).mean(dim=0) - flow.theta[-1]).norm()))
    return order(RATES, errors)


# -- from steps to flows -----------------------------------------------------------------------------------------------


def _warm(optimizer: Optimizer, k: int, closure: Callable[[], Tensor]) -> None:
    """RMSprop's average begins with g²."""
    if k == 0:
        closure()
        for p in optimizer.param_groups[0]["params"]:
            optimizer.state[p] = {"step": torch.tensor(0.0), "square_avg": p.grad.square()}


def _nesterov(optimizer: Optimizer, k: int, closure: Callable[[], Tensor]) -> None:
    """Momentum under which friction is 3/t."""
    optimizer.param_groups[0]["momentum"] = dynamics.nesterov_momentum(k + 1)


def _gradient(**options: Any) -> Any:
    return dynamics.gradient_flow(network(), LOSS, data(), 0.4, **options)


def _momentum(**options: Any) -> Any:
    return dynamics.momentum_flow(network(), LOSS, data(), 0.8, friction=1.0, **options)


EPS = 0.3
"""Of adaptive methods: with a smaller one, rates change as fast as signs of entries that pass through 0."""

MAPS: dict[str, tuple[Any, Callable[[Any, float], Optimizer], Before | None, int]] = {
    "SGD": (_gradient, lambda p, h: torch.optim.SGD(p, lr=h), None, 1),
    "Heun": (_gradient, lambda p, h: optimizers.Heun(p, lr=h), None, 2),
    "RungeKutta4": (_gradient, lambda p, h: optimizers.RungeKutta4(p, lr=h), None, 4),
    "heavy ball": (_momentum, lambda p, h: torch.optim.SGD(p, **optimizers.leapfrog(h, 1.0)), None, 1),
    "Nesterov, constant friction": (
        lambda **o: dynamics.nesterov_flow(network(), LOSS, data(), 0.8, friction=1.0, **o),
        lambda p, h: optimizers.Momentum(p, **optimizers.leapfrog(h, 1.0), look_ahead=1.0),
        None,
        1,
    ),
    "Nesterov": (
        lambda **o: dynamics.nesterov_flow(network(), LOSS, data(), 0.8, **o),
        lambda p, h: optimizers.Momentum(p, lr=h * h, look_ahead=1.0),
        _nesterov,
        1,
    ),
    "RMSprop": (
        lambda **o: dynamics.rmsprop_flow(network(), LOSS, data(), 0.4, memory=0.3, eps=EPS, **o),
        lambda p, h: torch.optim.RMSprop(p, **dynamics.rmsprop_settings(h, 0.3), eps=EPS),
        _warm,
        1,
    ),
    "Adam": (
        lambda **o: dynamics.adam_flow(network(), LOSS, data(), 0.4, memory=(0.1, 0.5), eps=EPS, **o),
        lambda p, h: torch.optim.Adam(p, **dynamics.adam_settings(h, (0.1, 0.5)), eps=EPS),
        None,
        1,
    ),
}
"""Of each optimizer: its flow, how it is made for a time step, what is done before each step, and its order."""


def map_order(name: str) -> float:
    """Order at which an optimizer's end approaches that of its flow as its time step goes to 0."""
    follow, make, before, _ = MAPS[name]
    flow = follow(**EXACT)
    time, errors, steps = flow.times[-1], [], np.array([0.04, 0.02, 0.01])
    for step in steps:
        end = descended(lambda p, h=step: make(p, h), round(time / step), before)
        errors.append(float((end - flow.theta[-1]).norm()))
    return order(steps, errors)


def changed_rate(by_rule: bool, steps: Sequence[float] = (0.04, 0.02, 0.01)) -> list[float]:
    """Distances of a heavy ball from its flow whose rate becomes a quarter halfway, at some time steps."""
    time, errors = 0.8, []
    flow = _momentum(**EXACT)
    for step in steps:
        start = optimizers.leapfrog(step, 1.0)
        changed = dynamics.momentum_at_rate(**start, new_lr=start["lr"] / 4)
        later = dynamics.body_of(changed["lr"], changed["momentum"])["time_step"]
        first = round(time / 2 / step)
        second = round((time - first * step) / later)

        def before(optimizer: Optimizer, k: int, closure: Any, first: int = first, changed: Any = changed) -> None:
            if k == first:
                optimizer.param_groups[0]["lr"] = changed["lr"]
                if by_rule:
                    optimizer.param_groups[0]["momentum"] = changed["momentum"]
                    for state in optimizer.state.values():
                        state["momentum_buffer"].mul_(changed["buffer_factor"])

        end = descended(lambda p, s=start: torch.optim.SGD(p, **s), first + second, before)
        reached = flow.at([min(time, first * step + second * later)])[0]
        errors.append(float((end - reached).norm()))
    return errors


def kernel_order() -> float:
    """Order at which the path kernel of a run approaches that of gradient flow."""
    X, _ = data()
    K = dynamics.gradient_flow(network(), LOSS, data(), 0.4, points=17).path_kernel(X)
    rates, errors = (0.04, 0.02, 0.01), []
    for rate in rates:
        trajectory = recorded(lambda p, r=rate: torch.optim.SGD(p, lr=r), round(0.4 / rate))
        errors.append(float(np.abs(pk.PathKernel(trajectory)(X) - K).max()))
    return order(rates, errors)


# -- norms, ledgers, noise ---------------------------------------------------------------------------------------------


def slope_error(norm: str) -> float:
    """Relative difference of the slope of L along the flow of steepest descent from −‖∇L‖_*."""
    step = 1e-4
    options = {"method": "rk4", "times": [0.0, step, 2 * step]}
    flow = dynamics.steepest_flow(network(), LOSS, data(), norm=norm, **options)
    slope, expected = (flow.losses[2] - flow.losses[0]) / (2 * step), flow.system.slope(flow.theta[1])
    return abs(slope - expected) / abs(expected)


RUNS: dict[str, Callable[[float], pk.Trajectory]] = {
    "plain": lambda h: recorded(lambda p: torch.optim.SGD(p, lr=h), round(0.24 / h)),
    "heavy ball": lambda h: recorded(lambda p: torch.optim.SGD(p, lr=h / 4, momentum=0.5), round(0.8 / h)),
    "mini-batches": lambda h: recorded(lambda p: torch.optim.SGD(p, lr=h / 2), round(0.24 / h), size=4),
}
"""Runs of length 0.24, or 0.4 in the time of a heavy ball, at a rate that goes with h."""


def remainder_orders(kind: str) -> tuple[float, float]:
    """Orders of the remainder of a regularization ledger: of the loss, and of outputs."""
    rates, loss, outputs = (0.04, 0.02, 0.01), [], []
    for rate in rates:
        ledger = dynamics.regularization_ledger(RUNS[kind](rate), data()[0][:4])
        loss.append(float(ledger.loss.remainder))
        outputs.append(float(np.linalg.norm(ledger.outputs.remainder)))
    return order(rates, loss), order(rates, outputs)


class Quartic(nn.Module):
    """f(x) = x(x − 1)(x − 3)² + 1.62276 as a network of one number; its least value is about 0, near x = 0.4."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(4.0, dtype=torch.float64))

    def forward(self, X: Tensor) -> Tensor:
        x = self.x
        return (x * (x - 1) * (x - 3) ** 2 + 1.62276).expand(len(X), 1)


ONE = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)


def output_itself(output: Tensor, target: Tensor) -> Tensor:
    """The network's output as the loss."""
    return output.mean()


def quartic_flow(points: int = 9) -> pk.errors.FlowError:
    """How Polyak's flow of the quartic from 4 ends."""
    try:
        dynamics.polyak_flow(Quartic(), output_itself, ONE, 4.0, points=points)
    except pk.errors.FlowError as error:
        return error
    raise AssertionError("the flow went through a stationary point")


QUARTIC_TIME = math.log((4 * 3 + 1.62276) / 1.62276)
"""When it gets to x = 3: L(t) = L(0) e^{−t}."""


def quartic_steps(limit: int = 3000) -> list[float]:
    """x under Polyak steps of 0.01 from 4 until it is in [0.38, 0.43], or for so many steps."""
    model = Quartic()
    optimizer = optimizers.PolyakStep(model.parameters(), lr=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = output_itself(model(ONE[0]), ONE[1])
        value.backward()
        return value

    path = [model.x.item()]
    while len(path) <= limit and not 0.38 <= path[-1] <= 0.43:
        optimizer.step(closure)
        path.append(model.x.item())
    return path


def variance(
    flow_of: Callable[..., Any], count: int, curvature: float, noise: float, **options: Any
) -> tuple[float, float]:
    """Variance of θ in a quadratic well at points of time far apart, and its standard error, over its own size.

    The well has the same curvature in each of ``count`` directions, which are as many independent samples.
    """
    model = nn.Linear(1, count, bias=False).double()
    nn.init.zeros_(model.weight)
    well = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, count, dtype=torch.float64)
    flow = flow_of(
        model,
        lambda z, t: curvature / 2 * (z - t).square().sum(),
        well,
        noise=noise,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    settled = flow.theta[len(flow) // 4 :]
    return float(settled.square().mean()), math.sqrt(2 / settled.numel())
