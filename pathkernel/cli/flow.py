"""The command ``pathkernel flow``: an optimizer on handwritten digits beside the flow that it discretises."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer

from pathkernel.cli.places import check_picture
from pathkernel.cli.stores import Result
from pathkernel.dynamics.adaptive_flows import adam_flow, adam_settings, rmsprop_flow, rmsprop_settings
from pathkernel.dynamics.flow import Flow
from pathkernel.dynamics.gradient_flows import gradient_flow
from pathkernel.dynamics.momentum_flows import energy_ledger, momentum_flow, nesterov_flow, nesterov_momentum
from pathkernel.errors import InputError
from pathkernel.optimizers.momentum import Momentum, leapfrog
from pathkernel.path_kernel.path_kernel import PathKernel
from pathkernel.recording.recorder import KernelRecorder
from pathkernel.runtime.extras import require_extra
from pathkernel.trajectory.trajectory import Trajectory

SAMPLES, HIDDEN, COMPARED = 200, 16, 40
FRICTION, MEMORY, EPS = 0.5, (0.05, 0.5), 1e-3
LOSS = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Kind:
    """A flow and its discrete map.

    Attributes
    ----------
    follow
        ``(model, data, time)`` to the flow.
    make
        ``(parameters, time step)`` to the optimizer.
    time, step
        How long, and the time step, where nothing is said.
    prepare
        What is done before step k: ``(optimizer, k, closure)``.
    """

    follow: Callable[[nn.Module, Any, float], Flow]
    make: Callable[[Any, float], Optimizer]
    time: float
    step: float
    prepare: Callable[[Optimizer, int, Callable[[], Tensor]], None] = lambda optimizer, k, closure: None


def _momentum_of_step(optimizer: Optimizer, k: int, closure: Callable[[], Tensor]) -> None:
    """Nesterov's momentum, under which friction is 3/t."""
    optimizer.param_groups[0]["momentum"] = nesterov_momentum(k + 1)


def _warm_average(optimizer: Optimizer, k: int, closure: Callable[[], Tensor]) -> None:
    """RMSprop's average begins with g², as that of its flow does."""
    if k == 0:
        closure()
        for p in optimizer.param_groups[0]["params"]:
            optimizer.state[p] = {"step": torch.tensor(0.0), "square_avg": p.grad.square()}


KINDS = {
    "gradient": Kind(
        lambda model, data, time: gradient_flow(model, LOSS, data, time),
        lambda p, step: torch.optim.SGD(p, lr=step),
        time=20.0,
        step=0.5,
    ),
    "momentum": Kind(
        lambda model, data, time: momentum_flow(model, LOSS, data, time, friction=FRICTION),
        lambda p, step: Momentum(p, **leapfrog(step, FRICTION), look_ahead=0.0),  # the heavy ball
        time=15.0,
        step=0.5,
    ),
    "nesterov": Kind(
        lambda model, data, time: nesterov_flow(model, LOSS, data, time),
        lambda p, step: Momentum(p, lr=step**2, look_ahead=1.0),
        time=15.0,
        step=0.5,
        prepare=_momentum_of_step,
    ),
    "rmsprop": Kind(
        lambda model, data, time: rmsprop_flow(model, LOSS, data, time, memory=MEMORY[1], eps=EPS),
        lambda p, step: torch.optim.RMSprop(p, **rmsprop_settings(step, MEMORY[1]), eps=EPS),
        time=0.3,
        step=0.01,
        prepare=_warm_average,
    ),
    "adam": Kind(
        lambda model, data, time: adam_flow(model, LOSS, data, time, memory=MEMORY, eps=EPS),
        lambda p, step: torch.optim.Adam(p, **adam_settings(step, MEMORY), eps=EPS),
        time=0.3,
        step=0.01,
    ),
}


def flow(arguments: argparse.Namespace) -> Result:
    """Follow a flow, record its optimizer beside it, and draw both."""
    kind = KINDS[arguments.kind]
    time = kind.time if arguments.time is None else arguments.time
    step = kind.step if arguments.step is None else arguments.step
    if not 0 < step <= time:
        raise InputError(
            f"`--step {step}` was given for a flow of `--time {time}`",
            "The time step is above 0, and no longer than the flow",
            "Write for example `pathkernel flow gradient --time 20 --step 0.5`",
        )
    check_picture(arguments.output, "--output")
    require_extra("plot", "`pathkernel flow`", "matplotlib")
    from pathkernel.plotting.appearance import write_figure  # drawing takes its time to load
    from pathkernel.plotting.flow import FlowDisplay

    X, y = load_digits(return_X_y=True)
    data = torch.tensor(X[:SAMPLES] / 16.0), torch.tensor(y[:SAMPLES])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        model = nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10)).double()
    followed = kind.follow(model, data, time)
    trajectory = recorded(model, kind, data, round(time / step), step)
    numbers = measured(followed, trajectory, data[0][:COMPARED])
    write_figure(FlowDisplay.from_flow(followed, trajectory).plot().figure_, arguments.output)
    settings = {"kind": arguments.kind, "time": time, "step": step, "seed": arguments.seed}
    return 0, {**settings, **numbers, "picture": str(arguments.output)}, text(settings, numbers, arguments.output)


def recorded(model: nn.Module, kind: Kind, data: tuple[Tensor, Tensor], steps: int, step: float) -> Trajectory:
    """A run of the optimizer on all samples."""
    optimizer, every = kind.make(model.parameters(), step), torch.arange(len(data[0]))
    with KernelRecorder(model, optimizer, LOSS, data=data) as recorder:
        for k in range(steps):
            x, target = recorder.announce(every)

            def closure(x: Tensor = x, target: Tensor = target) -> Any:
                optimizer.zero_grad()
                value = LOSS(model(x), target)
                value.backward()
                return value

            kind.prepare(optimizer, k, closure)
            optimizer.step(closure)
    return recorder.trajectory


def measured(followed: Flow, trajectory: Trajectory, X: Tensor) -> dict[str, float]:
    """Losses at both ends, and how far run and flow are apart: their ways, and for gradient flow their path kernels."""
    beside = followed.distance(trajectory)
    end = trajectory.final.to(followed.theta)
    numbers = {
        "loss.start": float(followed.losses[0]),
        "loss.flow": float(followed.losses[-1]),
        "loss.run": float(followed.system.loss.value(end)),
        "distance.end": float(beside.distance[-1]),
        "distance.relative": beside.relative,
    }
    if followed.system.parts == ("theta",):  # its rate is the flow's time, by which both kernels are integrated
        K, own = followed.path_kernel(X), PathKernel(trajectory)(X)
        numbers["kernel.difference"] = float(np.linalg.norm(own - K) / np.linalg.norm(K))
    if "dissipated" in followed.system.parts:
        numbers["energy.residual"] = energy_ledger(followed).residual
    return numbers


def text(settings: dict[str, Any], numbers: dict[str, float], output: Path) -> str:
    """The printed result."""
    steps = round(settings["time"] / settings["step"])
    lines = [
        f"{settings['kind']} flow for a time of {settings['time']:g}, beside {steps} steps of {settings['step']:g}",
        f"training loss: {numbers['loss.start']:.4f} at the start, {numbers['loss.flow']:.4f} at the end of the flow, "
        f"{numbers['loss.run']:.4f} after the steps",
        f"largest distance between the two: {numbers['distance.relative']:.2%} of the way",
    ]
    if "kernel.difference" in numbers:
        lines.append(f"path kernel of the steps against that of the flow: {numbers['kernel.difference']:.2%} apart")
    if "energy.residual" in numbers:
        lines.append(f"energy: loss, motion and friction add up to {numbers['energy.residual']:.1e}")
    return "\n".join([*lines, f"picture: {output}"])
