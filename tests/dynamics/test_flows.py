"""Flows: against closed forms and a dense oracle, the optimizers that discretise them, and how they end."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import dynamical
import numpy as np
import pytest
import scipy.special
import torch
from dynamical import EXACT, LOSS, MAPS, data, network, recorded
from torch import nn

import pathkernel as pk
from pathkernel import dynamics, reference
from pathkernel.errors import FlowError, InputError
from pathkernel.optimizers import leapfrog

ORDER = 0.2
"""How far measured orders may be from those of theory: the next term of their expansion at the steps in use."""
ROOT = Path(__file__).parents[2]


def linear() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A linear model whose loss is ½ θᵀHθ, with H and θ(0)."""
    model = nn.Linear(3, 1, bias=False).double()
    theta = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    model.weight.data.copy_(theta[None])
    X, _ = data()
    return model, 2 * X.T @ X / len(X), theta


# -- closed forms ------------------------------------------------------------------------------------------------------


def test_gradient_flow_of_least_squares_is_an_exponential() -> None:
    model, H, theta = linear()
    X, _ = data()
    flow = dynamics.gradient_flow(model, LOSS, (X, torch.zeros(8, 1)), 1.5, points=4)
    expected = torch.stack([torch.matrix_exp(-H * t) @ theta for t in flow.times])
    torch.testing.assert_close(flow.theta, expected, rtol=0, atol=1e-7)
    np.testing.assert_allclose(flow.losses, [0.5 * float(x @ H @ x) for x in expected], atol=1e-7)
    np.testing.assert_allclose(flow.outputs(X), (expected @ X.T)[:, :, None], atol=1e-7)


def test_momentum_flow_of_least_squares_is_a_damped_oscillation() -> None:
    model, H, theta = linear()
    flow = dynamics.momentum_flow(model, LOSS, (data()[0], torch.zeros(8, 1)), 2.0, friction=0.7, points=3)
    zero, identity = torch.zeros(3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    matrix = torch.cat([torch.cat([zero, identity], 1), torch.cat([-H, -0.7 * identity], 1)])
    expected = torch.matrix_exp(2.0 * matrix) @ torch.cat([theta, torch.zeros(3, dtype=torch.float64)])
    found = torch.cat([flow.theta[-1], flow.part("velocity")[-1]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_nesterov_flow_of_a_quadratic_is_a_bessel_function() -> None:
    model, H, theta = linear()
    flow = dynamics.nesterov_flow(model, LOSS, (data()[0], torch.zeros(8, 1)), 3.0, points=4)
    curvature, modes = torch.linalg.eigh(H)
    start = modes.T @ theta
    for t, found in zip(flow.times[1:], flow.theta[1:], strict=True):  # x(t) = 2 J₁(t√h) / (t√h) x(0)
        phase = t * curvature.sqrt()
        expected = modes @ (2 * torch.from_numpy(scipy.special.j1(phase.numpy())) / phase * start)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_nonlinear_flows_are_those_of_the_dense_oracle(rate: float) -> None:
    X, y = data()
    path = reference.flow(network(), LOSS, X, y, 0.4, 4, learning_rate=rate)
    flow = dynamics.gradient_flow if not rate else dynamics.modified_flow
    options: dict[str, Any] = {"lr": rate} if rate else {}
    found = flow(network(), LOSS, (X, y), 0.4, points=5, method="rk4", **options)
    torch.testing.assert_close(found.theta, path, rtol=0, atol=1e-4)  # torchdiffeq's rk4 is the 3/8 rule
    fine = flow(network(), LOSS, (X, y), 0.4, points=2, **options)
    finer = reference.flow(network(), LOSS, X, y, 0.4, 8, learning_rate=rate)
    ratio = (path[-1] - fine.theta[-1]).norm() / (finer[-1] - fine.theta[-1]).norm()
    assert 12 < ratio < 20  # the oracle's own error falls by 2⁴


def test_path_kernel_along_the_flow_of_a_linear_model_is_time_times_its_kernel() -> None:
    model, _, _ = linear()
    X, _ = data()
    flow = dynamics.gradient_flow(model, LOSS, (X, torch.zeros(8, 1)), 1.5, points=3)
    np.testing.assert_allclose(flow.path_kernel(X), 1.5 * (X @ X.T).numpy(), rtol=1e-12)
    np.testing.assert_allclose(flow.path_kernel(X[:2], X), 1.5 * (X[:2] @ X.T).numpy(), rtol=1e-12)
    assert isinstance(flow.kernel(), pk.PathKernel) and flow.kernel(outputs="full")(X).shape == (8, 8, 1, 1)


def test_the_kernel_along_the_flow_is_integrated_to_order_four() -> None:
    X, errors = data()[0], []
    truth = dynamics.gradient_flow(network(), LOSS, data(), 0.8, points=17).path_kernel(X)
    for points in (5, 9):
        flow = dynamics.gradient_flow(network(), LOSS, data(), 0.8, points=points)
        errors.append(np.abs(flow.path_kernel(X) - truth).max())
    assert math.log2(errors[0] / errors[1]) > 3.5
    trapezoid = dynamics.gradient_flow(network(), LOSS, data(), 0.8, points=8).path_kernel(X)
    assert np.abs(trapezoid - truth).max() > errors[1]  # an even number: order 2
    assert np.linalg.eigvalsh(trapezoid).min() > -1e-12


def test_the_flow_explains_its_outputs_as_domingos_says() -> None:
    X, y = data()
    flow = dynamics.gradient_flow(network(), LOSS, (X, y), 0.4, points=9)
    why, outputs = flow.explain(X[:3]), flow.outputs(X)
    np.testing.assert_allclose(why.output, outputs[-1, :3, 0], rtol=1e-12)
    np.testing.assert_allclose(why.reconstruction, why.output, atol=1e-4)  # of Simpson's rule
    assert why.shares.shape == (3, 8) and why.residual.max() == why.quadrature_error.max() < 1e-3
    # By hand, with the tangent kernel at each point.
    expected, weights = np.zeros((3, 8)), np.array([1, 4, 2, 4, 2, 4, 2, 4, 1]) * 0.05 / 3
    for theta, weight, z in zip(flow.theta, weights, outputs, strict=True):
        model = network()
        nn.utils.vector_to_parameters(theta, model.parameters())
        expected -= weight * pk.TangentKernel(model)(X[:3], X) * (2 * (z - y.numpy())[:, 0] / 8)
    np.testing.assert_allclose(why.shares, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(InputError, match=r"An explanation was asked of a momentum flow.*KernelMachine"):
        dynamics.momentum_flow(network(), LOSS, (X, y), 0.1, points=2).explain(X)


def test_several_outputs_are_explained_each() -> None:
    X, y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0]))  # in float32, as the model is
    flow = dynamics.gradient_flow(model, loss, (X, y), 1.0, points=9)
    why = flow.explain(X[:2])
    assert why.shares.shape == (6, 5) and why.relative_residual < 1e-5
    np.testing.assert_array_equal(why.output_index, [0, 1, 2, 0, 1, 2])
    np.testing.assert_allclose(why.output.reshape(2, 3), flow.outputs(X[:2])[-1], rtol=1e-12)


def test_a_network_that_trains_on_other_outputs_than_it_has_is_not_explained() -> None:
    X, y = data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(X.shape[1], 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double()
    flow = dynamics.gradient_flow(model, LOSS, (X, y), 0.2, points=3)
    with pytest.raises(InputError, match=r"others than in evaluation.*model\.eval\(\)"):
        flow.explain(X[:2])
    model.eval()
    why = dynamics.gradient_flow(model, LOSS, (X, y), 0.2, points=9).explain(X[:2])
    assert why.residual.max() < 1e-4


class Tied(nn.Module):
    """An embedding whose rows are the weights of the layer behind it, as in language models."""

    def __init__(self, padding: int | None, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=padding)
        self.out = nn.Linear(4, 7)
        if tied:
            self.out.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.embedding(tokens)).mean(dim=1))


@pytest.mark.parametrize(("padding", "tied"), [(0, True), (None, True), (0, False)])
def test_a_gradient_that_is_no_derivative_is_not_explained(padding: int | None, tied: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens, target = (torch.randint(0, 7, shape, generator=generator) for shape in ((6, 5), (6,)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Tied(padding, tied).double()
    flow = dynamics.gradient_flow(model, nn.CrossEntropyLoss(), (tokens, target), 0.2, points=5)
    if padding is not None and tied:
        with pytest.raises(InputError, match=r"is not its derivative.*Leave `padding_idx` out"):
            flow.explain(tokens[:2])
    else:
        assert flow.explain(tokens[:2]).residual.max() < 1e-5


# -- what optimizers discretise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAPS)
def test_optimizers_approach_their_flows(name: str) -> None:
    assert dynamical.map_order(name) == pytest.approx(MAPS[name][3], abs=ORDER)


def test_the_path_kernel_of_a_run_approaches_that_of_its_flow() -> None:
    assert dynamical.kernel_order() == pytest.approx(1, abs=ORDER)


def test_the_rule_of_momentum_keeps_a_ball_on_its_flow_when_the_rate_changes() -> None:
    steps = (0.04, 0.02, 0.01)
    by_rule = dynamical.changed_rate(True, steps)
    assert dynamical.order(steps, by_rule) == pytest.approx(1, abs=ORDER)
    (without,) = dynamical.changed_rate(False, steps[1:2])
    assert without > 5 * max(by_rule)


@pytest.mark.parametrize(("time_step", "friction"), [(0.5, 0.8), (0.01, 0.0), (1.0, 1.9)])
def test_the_body_of_a_heavy_ball_is_found_again(time_step: float, friction: float) -> None:
    found = dynamics.body_of(**_named(leapfrog(time_step, friction)))
    assert found == pytest.approx({"time_step": time_step, "friction": friction}, abs=1e-12)


def _named(settings: dict[str, float]) -> dict[str, float]:
    return {"lr": settings["lr"], "momentum": settings["momentum"]}


def test_a_changed_rate_keeps_the_friction() -> None:
    start = leapfrog(0.3, 0.8)
    changed = dynamics.momentum_at_rate(**start, new_lr=start["lr"] / 9)
    body = dynamics.body_of(changed["lr"], changed["momentum"])
    assert body["friction"] == pytest.approx(0.8) and changed["momentum"] > start["momentum"]
    assert changed["velocity_factor"] == pytest.approx(body["time_step"] / 0.3)
    assert changed["buffer_factor"] == pytest.approx(9 * changed["velocity_factor"])
    same = dynamics.momentum_at_rate(**start, new_lr=start["lr"])
    assert same == pytest.approx({**start, "velocity_factor": 1.0, "buffer_factor": 1.0})


@pytest.mark.parametrize("friction", [0.0, 1.0, None])
def test_energy_goes_from_loss_to_motion_to_friction(friction: float | None) -> None:
    flow = dynamics.nesterov_flow(network(), LOSS, data(), 2.0, friction=friction, points=5, method="dopri8")
    ledger = dynamics.energy_ledger(flow)
    assert ledger.residual < 1e-6
    assert ledger.kinetic[0] == ledger.dissipated[0] == 0 < ledger.kinetic[1:].min()
    assert (np.diff(ledger.dissipated) > 0).all() if friction != 0 else (ledger.dissipated == 0).all()


def test_settings_of_adaptive_methods_are_those_of_their_memories() -> None:
    assert dynamics.rmsprop_settings(0.1, 2.0) == pytest.approx({"lr": 0.1, "alpha": math.exp(-0.05)})
    settings = dynamics.adam_settings(0.01, (0.1, 10.0))
    assert settings["lr"] == 0.01 and settings["betas"] == pytest.approx((math.exp(-0.1), math.exp(-0.001)))


# -- beside a recorded run ---------------------------------------------------------------------------------------------


def test_distance_is_taken_at_equal_times() -> None:
    flow = dynamics.gradient_flow(network(), LOSS, data(), 0.3, **EXACT)
    trajectory = recorded(lambda p: torch.optim.SGD(p, lr=0.05), 8)
    beside = flow.distance(trajectory)
    np.testing.assert_allclose(beside.times, 0.05 * np.arange(7), atol=1e-12)  # two steps go beyond the flow's end
    exact = dynamics.gradient_flow(network(), LOSS, data(), times=beside.times, method="dopri8", rtol=1e-10, atol=1e-12)
    run = torch.stack([trajectory.vector(s) for s in range(7)])
    np.testing.assert_allclose(beside.distance, (run - exact.theta).norm(dim=1), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(beside.moved, (exact.theta - exact.theta[0]).norm(dim=1), rtol=1e-9, atol=1e-12)
    assert beside.relative == beside.distance.max() / beside.moved.max()
    model = network()
    model.load_state_dict(flow.parameters(-1))
    torch.testing.assert_close(dynamical.vector(model), exact.theta[-1], rtol=0, atol=1e-9)


def test_momentum_has_its_own_clock() -> None:
    settings = leapfrog(0.05, 1.0)
    flow = dynamics.momentum_flow(network(), LOSS, data(), 0.3, friction=1.0, points=3, method="dopri8")
    beside = flow.distance(recorded(lambda p: torch.optim.SGD(p, **settings), 6))
    np.testing.assert_allclose(beside.times, 0.05 * np.arange(7), atol=1e-9)
    assert 0 < beside.relative < 0.2
    nesterov = dynamics.nesterov_flow(network(), LOSS, data(), 0.3, points=2)
    assert nesterov.system.time_of_step({"lr": 0.04}) == pytest.approx(0.2)


def test_a_modified_flow_with_momentum_is_compared_with_its_own_run() -> None:
    rates, ends = (0.004, 0.002), []
    for rate in rates:
        flow = dynamics.modified_flow(network(), LOSS, data(), 0.2, lr=rate, momentum=0.5, points=2)
        trajectory = recorded(lambda p, h=rate: torch.optim.SGD(p, lr=h, momentum=0.5), round(0.1 / rate))
        beside = flow.distance(trajectory)
        assert beside.times[-1] == pytest.approx(0.2)
        lead = float((flow.theta[0] - trajectory.initial).norm())  # the flow starts uphill of a ball at rest
        assert beside.distance[-1] < beside.distance[0] == pytest.approx(lead)
        ends.append(beside.distance[-1])
    assert dynamical.order(rates, ends) == pytest.approx(2, abs=ORDER)


def test_what_cannot_be_compared_is_refused() -> None:
    flow = dynamics.gradient_flow(network(), LOSS, data(), 0.1, points=3)
    other = network()
    other[0].weight.data.mul_(2)
    with pk.KernelRecorder(other, torch.optim.SGD(other.parameters(), lr=0.1), LOSS, data=data()) as recorder:
        pass
    with pytest.raises(InputError, match=r"does not begin where the flow does.*model.load_state_dict"):
        flow.distance(recorder.trajectory)
    groups = lambda p: torch.optim.SGD([{"params": [w], "lr": 0.1 / (k + 1)} for k, w in enumerate(p)])  # noqa: E731
    with pytest.raises(InputError, match=r"step 0 have different rates.*one rate"):
        flow.distance(recorded(groups, 1))
    with pytest.raises(InputError, match=r"Times \[0.05 0.2 \] were asked.*with `time=`"):
        flow.at([0.05, 0.2])
    with pytest.raises(InputError, match=r"Times .*nan.* were asked"):
        flow.at([math.nan])
    assert flow.at([]).shape == (0, flow.theta.shape[1])
    for settings in ({"maximize": True}, {"momentum": 0.9, "dampening": 0.5}):
        with pytest.raises(InputError, match="Step 0 was taken with `maximize` or `dampening`"):
            flow.distance(recorded(lambda p, own=settings: torch.optim.SGD(p, lr=0.01, **own), 1))
    with pytest.raises(InputError, match=r"A distance from a Flow .*recorder\.trajectory"):
        flow.distance(flow)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="The flow keeps the points 0 to 2"):
        flow.parameters(3)
    with pytest.raises(InputError, match="The part 'velocity'"):
        flow.part("velocity")
    for other, name in ((flow, "gradient flow"), (None, "NoneType")):
        with pytest.raises(InputError, match=f"An energy ledger was asked of a {name}"):
            dynamics.energy_ledger(other)  # type: ignore[arg-type]


# -- options, and how flows end ----------------------------------------------------------------------------------------


RARER = [
    pytest.param(name, marks=pytest.mark.exhaustive) for name in ("heun2", "heun3", "rk4", "fehlberg2", "adaptive_heun")
]


@pytest.mark.parametrize("method", ["euler", "midpoint", "bosh3", *RARER])
def test_every_method_follows_the_flow(method: str) -> None:
    truth = dynamics.gradient_flow(network(), LOSS, data(), 0.2, **EXACT).theta[-1]
    options: dict[str, Any] = (
        {"step": 0.01} if method in pk.dynamics.integration.FIXED else {"rtol": 1e-5, "atol": 1e-7}
    )
    flow = dynamics.gradient_flow(network(), LOSS, data(), 0.2, method=method, points=3, **options)
    assert (flow.theta[-1] - truth).norm() < (2e-2 if method == "euler" else 1e-3)


def test_float32_is_followed_as_far_as_it_goes() -> None:
    options: dict[str, Any] = {"points": 2}
    single = dynamics.gradient_flow(network(), LOSS, data(), 0.3, dtype=torch.float32, **options)
    double = dynamics.gradient_flow(network(), LOSS, data(), 0.3, **options)
    assert single.theta.dtype == torch.float32 and single.solver.rtol == 1e-4
    torch.testing.assert_close(single.theta.double(), double.theta, rtol=0, atol=1e-3)


def test_euler_is_gradient_descent() -> None:
    flow = dynamics.gradient_flow(network(), LOSS, data(), 0.2, method="euler", step=0.05, points=2)
    steps = dynamical.descended(lambda p: torch.optim.SGD(p, lr=0.05), 4)
    torch.testing.assert_close(flow.theta[-1], steps, rtol=1e-12, atol=1e-12)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "magic"}, r"`method='magic'` was given.*method=\"dopri5\""),
    "step": ({"step": 0.1}, "the other methods choose theirs"),
    "times": ({"times": [0.1, 0.2]}, "Two or more points of time rise from 0"),
    "time": ({"time": -1.0}, "It lasts for a time above 0"),
    "points": ({"points": 1}, "2 points or more"),
    "time text": ({"time": "1"}, "It lasts for a time above 0"),
    "time infinite": ({"time": math.inf}, "It lasts for a time above 0"),
    "points half": ({"points": 2.5}, "2 points or more"),
    "times text": ({"times": "abc"}, "Points of time are numbers"),
    "times infinite": ({"times": [0, math.inf]}, "Two or more points of time rise from 0"),
    "rtol": ({"rtol": -1.0}, r"`rtol=-1\.0`"),
    "no error": ({"rtol": 0.0, "atol": 0.0}, "one of them above 0"),
    "max_steps": ({"max_steps": 1.5}, "a whole number from 1 on"),
    "dtype": ({"dtype": torch.int64}, "a floating type"),
    "dtype text": ({"dtype": "float32"}, "a floating type"),
    "block": ({"block": 0}, "one sample or more"),
    "reduction": ({"reduction": "none"}, 'Write `reduction="mean"`'),
    "option": ({"learning_rate": 1.0}, "`learning_rate=` was given to a flow"),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_without_sense_are_refused(name: str) -> None:
    options, said = WRONG[name]
    with pytest.raises(InputError, match=said):
        dynamics.gradient_flow(network(), LOSS, data(), **options)


def test_frictions_and_memories_without_sense_are_refused() -> None:
    with pytest.raises(InputError, match=r"`friction=-1` was given.*None stands for 3/t"):
        dynamics.momentum_flow(network(), LOSS, data(), friction=-1)
    with pytest.raises(InputError, match=r"`memory=0\.0` was given"):
        dynamics.rmsprop_flow(network(), LOSS, data(), memory=0.0)
    with pytest.raises(InputError, match=r"`memory=\(1.0, -1.0\)` was given"):
        dynamics.adam_flow(network(), LOSS, data(), memory=(1.0, -1.0))


BATCHES_WITHOUT_SENSE: dict[str, Any] = {
    "none": [],
    "empty": [[]],
    "floats": [[0.5]],
    "truth values": [[True, False]],
    "no lists": [0, 1],
    "texts": ["a"],
    "beyond": [[0, 99]],
    "negative": [[-1], [1]],
}


@pytest.mark.parametrize("name", BATCHES_WITHOUT_SENSE)
def test_batches_without_sense_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="`batches"):
        dynamics.modified_flow(network(), LOSS, data(), 0.1, lr=0.1, batches=BATCHES_WITHOUT_SENSE[name])


CALLS_WITHOUT_SENSE: dict[str, tuple[Any, str]] = {
    "leapfrog step": (lambda: leapfrog(0.0, 1.0), "A time step is above 0"),
    "leapfrog friction": (lambda: leapfrog(0.1, math.nan), "friction 0 or more"),
    "leapfrog product": (lambda: leapfrog(1.0, 3.0), "a time step of 0.6667 or less"),
    "body rate": (lambda: dynamics.body_of(-1.0, 0.5), "a rate above 0"),
    "body momentum": (lambda: dynamics.body_of(0.1, 1.5), "a momentum from 0 to 1"),
    "new rate": (lambda: dynamics.momentum_at_rate(0.1, 0.9, 0.0), "`new_lr=0.0`"),
    "step of Nesterov": (lambda: dynamics.nesterov_momentum(0), "counted from 1"),
    "half a step": (lambda: dynamics.nesterov_momentum(1.5), "counted from 1"),  # type: ignore[arg-type]
    "RMSprop step": (lambda: dynamics.rmsprop_settings(-0.1, 1.0), "A time step is above 0"),
    "RMSprop memory": (lambda: dynamics.rmsprop_settings(0.1, math.inf), "`memory=inf`"),
    "Adam memory": (lambda: dynamics.adam_settings(0.1, 1.0), "a pair"),  # type: ignore[arg-type]
    "Adam flow": (lambda: dynamics.adam_flow(network(), LOSS, data(), memory=1.0), "a pair"),  # type: ignore[arg-type]
    "eps": (lambda: dynamics.rmsprop_flow(network(), LOSS, data(), eps=-1.0), "ε is 0 or more"),
    "minimum": (lambda: dynamics.polyak_flow(network(), LOSS, data(), minimum=50.0), "no larger than any"),
    "loss": (lambda: dynamics.gradient_flow(network(), lambda z, y: 1.0, data()), "The loss returned a float"),
    "model": (lambda: dynamics.gradient_flow(len, LOSS, data()), "`model` is a builtin"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", CALLS_WITHOUT_SENSE)
def test_numbers_without_sense_are_refused(name: str) -> None:
    call, said = CALLS_WITHOUT_SENSE[name]
    with pytest.raises(InputError, match=said):
        call()


def test_momentum_without_friction_left_is_gradient_descent() -> None:
    body = dynamics.body_of(0.3, 0.0)
    assert leapfrog(**body) == pytest.approx({"lr": 0.3, "momentum": 0.0})
    assert leapfrog(**body)["momentum"] >= 0  # which torch demands


def test_a_loss_that_is_no_number_at_the_start_is_named() -> None:
    X, y = data()
    broken = X.clone()
    broken[0, 0] = math.nan
    with pytest.raises(InputError, match="The loss is nan at t = 0; the inputs hold NaN or infinity"):
        dynamics.gradient_flow(network(), LOSS, (broken, y))
    with pytest.raises(InputError, match="The loss is nan at t = 0; no input, target or parameter holds"):
        dynamics.gradient_flow(network(), lambda z, target: (z * math.nan).sum(), (X, y))


def test_advice_for_stiff_flows_names_kinks_and_young_averages() -> None:
    options: dict[str, Any] = {"points": 2, "max_steps": 1}
    with pytest.raises(FlowError, match=r"at kinks.*method=\"rk4\"") as caught:
        dynamics.gradient_flow(network(), LOSS, data(), 10.0, **options)
    assert "`eps=`" not in str(caught.value)
    with pytest.raises(FlowError, match="a larger `eps=`"):
        dynamics.adam_flow(network(), LOSS, data(), 10.0, **options)


def test_a_flow_that_diverges_keeps_what_was_computed() -> None:
    model, falling = network(), lambda z, target: -(z**4).sum()  # without bound in finite time, under any method
    said = r"gradient flow came to its end at t = .* it diverged.*`error.flow`"
    for options in ({"method": "bosh3", "rtol": 0.1, "atol": 0.1}, {"method": "rk4"}):
        with pytest.raises(FlowError, match=said) as caught:
            dynamics.gradient_flow(model, falling, data(), 2.0, points=1001, **options)
        flow = caught.value.flow
        assert 0 < flow.times[-1] < 2 and len(flow) > 2
        assert flow.losses[1] < flow.losses[0] and torch.isfinite(flow.theta).all()


def test_a_fixed_step_that_is_too_long_diverges() -> None:
    with pytest.raises(FlowError, match=r"it diverged.*smaller `step`") as caught:
        dynamics.gradient_flow(network(), LOSS, data(), 2000.0, method="euler", step=10.0, points=51)
    assert len(caught.value.flow) >= 2


def test_a_stiff_flow_stops_at_its_limit_of_steps() -> None:
    model, stiff = nn.Linear(1, 2, bias=False).double(), torch.tensor([1e6, 1.0])
    with pytest.raises(FlowError, match=r"more than 60 steps.*`max_steps=`") as caught:
        dynamics.gradient_flow(
            model,
            lambda z, target: (stiff * z.square()).sum() / 2,
            (torch.ones(1, 1), torch.zeros(1, 2)),
            1.0,
            points=1001,
            rtol=1e-5,
            max_steps=60,
        )
    flow = caught.value.flow
    assert 0 < flow.times[-1] < 1 and flow.losses[-1] < flow.losses[0]


def test_one_point_has_no_path_kernel() -> None:
    flow = dynamics.gradient_flow(network(), LOSS, data(), 0.1, points=2)
    alone = dynamics.Flow(flow.system, flow.times[:1], flow.states[:1], flow.solver)
    with pytest.raises(InputError, match="that has one point"):
        alone.path_kernel(data()[0])


def test_the_face_loads_nothing_and_older_names_stay() -> None:
    assert dynamics.Lion is pk.optimizers.Lion and dynamics.leapfrog is leapfrog
    code = "import sys, pathkernel.dynamics; assert not {'torch', 'torchdiffeq'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- Polyak's flow -----------------------------------------------------------------------------------------------------


def test_polyak_flow_makes_any_loss_fall_exponentially() -> None:
    flow = dynamics.polyak_flow(network(), LOSS, data(), 1.0, minimum=0.01, points=9)
    expected = 0.01 + (flow.losses[0] - 0.01) * np.exp(-flow.times)
    np.testing.assert_allclose(flow.losses, expected, rtol=0, atol=1e-6)


def test_polyak_flow_rests_where_the_loss_is_least() -> None:
    model, _, theta = linear()
    X, _ = data()
    at_least = dynamics.polyak_flow(model, LOSS, (X, (X @ theta)[:, None]), 1.0, points=3)
    assert torch.equal(at_least.theta, theta.expand(3, 3)) and not at_least.losses.any()


def test_polyak_flow_stops_at_a_stationary_point_above_the_least_value() -> None:
    error = dynamical.quartic_flow()
    assert "stationary point" in str(error) and "minimum=" in str(error) and "PolyakStep" in str(error)
    assert error.flow.times[-1] == pytest.approx(2.1276, abs=1e-4) == dynamical.QUARTIC_TIME
    assert float(error.flow.theta[-1]) == pytest.approx(3, abs=1e-3)
    np.testing.assert_allclose(error.flow.losses, error.flow.losses[0] * np.exp(-error.flow.times), rtol=1e-6)


def test_polyak_steps_get_across_it() -> None:
    path = dynamical.quartic_steps()
    assert len(path) - 1 <= 3000 and 0.38 <= path[-1] <= 0.43 and max(path) == path[0] == 4
