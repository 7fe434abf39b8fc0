"""The mission, system by system: what each must be, computed a second time by the plainest means there are.

A row is one optimizer, kernel or way of recording. The oracle writes the optimizer as published, once for the gradient
of the batch and once for every training sample's part of it, and integrates the network's gradient along each step by
plain autograd (`pathkernel.reference`); nothing in it comes from what is tested.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from cases import BATCHES, LOSSES, QUERIES, SAMPLES, generator, make_inputs, make_model
from scipy.linalg import expm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import WhiteKernel
from sklearn.kernel_ridge import KernelRidge
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from tolerances import ORDER, TOLERANCES
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import pathkernel as pk
from pathkernel import reference
from pathkernel.optimizers import (
    Heun,
    Momentum,
    NormalizedDescent,
    PolyakStep,
    RungeKutta4,
    ScalarRMSprop,
    SignDescent,
    leapfrog,
)

DOUBLE = TOLERANCES[torch.float64]
CASE = LOSSES["ce_mean"]
EXACT = {"rtol": 0, "atol": DOUBLE.shares}
NODES = 4
"""Of the Gauss–Legendre rule along a step, of machine and oracle."""

Batches = Sequence[Sequence[int]]


# -- one training run, and its oracle ---------------------------------------------------------------------------------


@dataclass
class Run:
    """A network before and after training in float64, its record, its data and some queries."""

    start: Any
    model: Any
    trajectory: pk.Trajectory
    X: Tensor
    y: Tensor
    loss: nn.Module
    batches: Batches = BATCHES

    @functools.cached_property
    def queries(self) -> Tensor:
        return make_inputs(QUERIES, seed=3)

    @functools.cached_property
    def path(self) -> list[dict[str, Tensor]]:
        """θ_0 … θ_S as recorded."""
        return [self.trajectory.parameters(s) for s in range(len(self.trajectory) + 1)]

    @functools.cached_property
    def why(self) -> pk.Attributions:
        machine = pk.KernelMachine(self.trajectory, quadrature=pk.GaussLegendre(NODES))
        return machine.explain(self.queries, outputs="all")

    def is_the_network(self) -> None:
        """Shares and channels add up to what the live network says, for every output of every query."""
        with torch.no_grad():
            says = self.model.eval()(self.queries).numpy()
        np.testing.assert_allclose(pk.KernelMachine(self.trajectory).decision_function(self.queries), says, **EXACT)
        np.testing.assert_allclose(self.why.reconstruction, says.ravel(), **EXACT)
        assert self.why.relative_residual <= DOUBLE.residual
        assert np.abs(self.why.shares).max() > 1e-4


def trained(
    make: Callable[[Any], Optimizer],
    *,
    batches: Batches = BATCHES,
    closure: bool = False,
    rule: pk.UpdateRule | None = None,
    model: Any = None,
    loss: nn.Module = CASE.loss,
    y: Tensor | None = None,
    after: Callable[[pk.KernelRecorder, Any], None] = lambda recorder, model: None,
    **options: Any,
) -> Run:
    """Train a tanh network (or another) over batches of ids, on record."""
    model = make_model("tanh", 3) if model is None else model
    X, y = make_inputs(SAMPLES), CASE.targets(SAMPLES) if y is None else y
    start, optimizer = copy.deepcopy(model), make(model.parameters())
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), rule=rule, **options) as recorder:
        for ids in batches:
            x, target = recorder.announce(list(ids))

            def evaluate(x: Tensor = x, target: Tensor = target) -> Tensor:
                optimizer.zero_grad()
                value = loss(model(x), target)
                value.backward()
                return value

            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
            after(recorder, model)
    return Run(start, model, recorder.trajectory, X, y, loss, batches)


class Pull:
    """Gradients of the batch of one step, (1 + N, P): of the whole, and the part of every training sample."""

    def __init__(self, run: Run, theta: Tensor, ids: Sequence[int]) -> None:
        self.run, self.theta, self.ids = run, theta, list(ids)

    def __call__(self, offset: Tensor | float = 0.0) -> Tensor:
        run, at = self.run, reference.unflatten(self.run.start, self.theta + offset)
        rows = reference.sample_gradients(run.start, at, run.loss, run.X[self.ids], run.y[self.ids])
        parts = torch.zeros(len(run.X), rows.shape[1], dtype=rows.dtype).index_add(0, torch.tensor(self.ids), rows)
        return torch.cat([parts.sum(0, keepdim=True), parts])

    @property
    def loss(self) -> float:
        output = torch.func.functional_call(
            self.run.start, reference.unflatten(self.run.start, self.theta), (self.run.X[self.ids],)
        )
        return float(self.run.loss(output, self.run.y[self.ids]))


Published = Callable[[Pull, Tensor, dict[str, Any], int], tuple[Tensor, Tensor]]
"""(gradients, memory (1 + N, P), other state, k = 1, 2, …) → displacement and memory, (1 + N, P) each."""


def displacements(run: Run, published: Published) -> tuple[list[Tensor], list[Tensor]]:
    """θ_0 … θ_S as published, and the displacement of each step, (1 + N, P)."""
    theta = reference.flatten(run.start, dict(run.start.named_parameters())).detach()
    memory, state = torch.zeros(1 + len(run.X), len(theta), dtype=theta.dtype), {}
    path, moved = [theta], []
    for k, ids in enumerate(run.batches, start=1):
        displacement, memory = published(Pull(run, theta, ids), memory, state, k)
        theta = theta + displacement[0]
        path.append(theta)
        moved.append(displacement[1:])
    return path, moved


def average(run: Run, s: int, x: Tensor, output: int, network: Any = None) -> Tensor:
    """A query's gradient averaged over step s."""
    rule = reference.gauss_legendre(NODES)
    network = run.start if network is None else network
    names = dict(network.named_parameters())
    first, last = ({n: p for n, p in run.path[i].items() if n in names} for i in (s, s + 1))
    return reference.average_gradient(network, first, last, x, output, rule)


def shares(run: Run, moved: list[Tensor], outputs: int = 3, network: Any = None) -> np.ndarray:
    """(queries × outputs, N): every sample's displacements, seen by the averaged gradients."""
    rows = []
    for x in run.queries:
        for output in range(outputs):
            parts = []
            for s, part in enumerate(moved):
                gradient = average(run, s, x, output, network)
                parts.append(part[:, : len(gradient)] @ gradient)
            rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows).numpy()


# -- optimizers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """An optimizer of the package or of torch, and the equations that it discretises."""

    make: Callable[[Any], Optimizer]
    published: Published
    closure: bool = False
    rule: Callable[[], pk.UpdateRule] | None = None


def euler(pull: Pull, m: Tensor, state: dict, k: int) -> tuple[Tensor, Tensor]:
    return -0.1 * pull(), m


def look_ahead(part: float) -> Published:
    """v⁺ = μv − η∇L(θ + part · μv); θ⁺ = θ + v⁺."""

    def step(pull: Pull, v: Tensor, state: dict, k: int) -> tuple[Tensor, Tensor]:
        v = 0.8 * v - 0.05 * pull(part * 0.8 * v[0])
        return v, v

    return step


def nesterov_of_torch(pull: Pull, m: Tensor, state: dict, k: int) -> tuple[Tensor, Tensor]:
    g = pull()
    m = 0.8 * m + g
    return -0.05 * (g + 0.8 * m), m


STEP, FRICTION = 0.25, 1.2


def body_with_friction(pull: Pull, last: Tensor, state: dict, k: int) -> tuple[Tensor, Tensor]:
    """(Δ − Δ₋)/γ² + λ (Δ + Δ₋)/(2γ) = −∇L, solved for the displacement Δ."""
    right = -pull() + last / STEP**2 - FRICTION * last / (2 * STEP)
    moved = right / (1 / STEP**2 + FRICTION / (2 * STEP))
    return moved, moved


def vector_rmsprop(pull: Pull, m: Tensor, state: dict, k: int) -> tuple[Tensor, Tensor]:
    g = pull()
    state["v"] = 0.9 * state.get("v", torch.zeros_like(g[0])) + 0.1 * g[0] ** 2
    return -0.01 * g / (state["v"].sqrt() + 1e-8), m


def scalar_rmsprop(pull: Pull, m: Tensor, state: dict, k: int) -> tuple[Tensor, Tensor]:
    g = pull()
    state["r"] = 0.9 * state.get("r", 0.0) + 0.1 * float(g[0] @ g[0])
    return -0.05 * g / (state["r"] ** 0.5 + 1e-8), m


def adam(pull: Pull, m: Tensor, state: dict, k: int) -> tuple[Tensor, Tensor]:
    g = pull()
    m = 0.9 * m + 0.1 * g
    state["v"] = 0.99 * state.get("v", torch.zeros_like(g[0])) + 0.01 * g[0] ** 2
    return -0.01 * (m / (1 - 0.9**k)) / ((state["v"] / (1 - 0.99**k)).sqrt() + 1e-8), m


def sign(pull: Pull, m: Tensor, state: dict, k: int) -> tuple[Tensor, Tensor]:
    g = pull()
    return -0.005 * g / g[0].abs(), m


def polyak(pull: Pull, m: Tensor, state: dict, k: int) -> tuple[Tensor, Tensor]:
    g = pull()
    return -0.1 * (pull.loss - 0.1) / float(g[0] @ g[0]) * g, m


def normalised(pull: Pull, m: Tensor, state: dict, k: int) -> tuple[Tensor, Tensor]:
    g = pull()
    return -0.05 * g / g[0].norm(), m


def heun(pull: Pull, m: Tensor, state: dict, k: int) -> tuple[Tensor, Tensor]:
    g = pull()
    return -0.1 / 2 * (g + pull(-0.1 * g[0])), m


def runge_kutta_4(pull: Pull, m: Tensor, state: dict, k: int) -> tuple[Tensor, Tensor]:
    one = pull()
    two = pull(-0.1 / 2 * one[0])
    three = pull(-0.1 / 2 * two[0])
    four = pull(-0.1 * three[0])
    return -0.1 / 6 * (one + 2 * two + 2 * three + four), m


class QuasiHyperbolic(torch.optim.Optimizer):
    """A user's own optimizer (Ma and Yarats 2019): m⁺ = βm + (1 − β)g; Δ = −η((1 − ν)g + νm⁺)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.2, "beta": 0.9, "nu": 0.7})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.mul_(group["beta"]).add_(p.grad, alpha=1 - group["beta"])
                p -= group["lr"] * ((1 - group["nu"]) * p.grad + group["nu"] * m)


class QuasiHyperbolicRule(pk.UpdateRule):
    name = "QuasiHyperbolic"
    memory = ("m",)

    def step(self, gradient, memory, frozen, settings):
        m = settings["beta"] * memory[0] + (1 - settings["beta"]) * gradient
        return -settings["lr"] * ((1 - settings["nu"]) * gradient + settings["nu"] * m), (m,)


def quasi_hyperbolic(pull: Pull, m: Tensor, state: dict, k: int) -> tuple[Tensor, Tensor]:
    g = pull()
    m = 0.9 * m + 0.1 * g
    return -0.2 * (0.3 * g + 0.7 * m), m


def momentum(part: float) -> System:
    return System(lambda p: Momentum(p, lr=0.05, momentum=0.8, look_ahead=part), look_ahead(part), True, Momentum.rule)


SYSTEMS = {
    "SGD is Euler": System(lambda p: torch.optim.SGD(p, lr=0.1), euler),
    "heavy ball": System(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8), look_ahead(0.0)),
    "leapfrog": System(
        lambda p: Momentum(p, **leapfrog(STEP, FRICTION), look_ahead=0.0), body_with_friction, True, Momentum.rule
    ),
    "Nesterov, as in torch": System(
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True), nesterov_of_torch
    ),
    "Nesterov, true look-ahead": momentum(1.0),
    "Nesterov, half of it": momentum(0.5),
    "RMSprop, vector": System(lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9), vector_rmsprop),
    "RMSprop, scalar": System(lambda p: ScalarRMSprop(p, lr=0.05, alpha=0.9), scalar_rmsprop, rule=ScalarRMSprop.rule),
    "Adam": System(lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99)), adam),
    "sign descent": System(lambda p: SignDescent(p, lr=0.005), sign, rule=SignDescent.rule),
    "Polyak's step": System(lambda p: PolyakStep(p, lr=0.1, minimum=0.1), polyak, True, PolyakStep.rule),
    "normalised descent": System(lambda p: NormalizedDescent(p, lr=0.05), normalised, rule=NormalizedDescent.rule),
    "Heun": System(lambda p: Heun(p, lr=0.1), heun, True, Heun.rule),
    "Runge-Kutta 4": System(lambda p: RungeKutta4(p, lr=0.1), runge_kutta_4, True, RungeKutta4.rule),
    "an optimizer of the user": System(QuasiHyperbolic, quasi_hyperbolic, rule=QuasiHyperbolicRule),
}


@functools.cache
def run_of(name: str) -> Run:
    system = SYSTEMS[name]
    return trained(system.make, closure=system.closure, rule=system.rule and system.rule())


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_optimizer_is_the_published_one_and_every_share_is_its_sample_s(name: str) -> None:
    run = run_of(name)
    path, moved = displacements(run, SYSTEMS[name].published)
    for recorded, point in zip(run.path, path, strict=True):
        np.testing.assert_allclose(reference.flatten(run.start, recorded), point, rtol=0, atol=DOUBLE.rounding)
    run.is_the_network()
    np.testing.assert_allclose(run.why.shares, shares(run, moved), **EXACT)


# -- everything else that the mission names ---------------------------------------------------------------------------


def gradient_flow() -> None:
    """Least squares by SGD on the whole batch: the error to θ(t) = θ* + exp(−tH)(θ_0 − θ*) is halved with the step."""
    errors, y = [], make_inputs(SAMPLES, (1,), seed=5)
    for steps in (64, 128):
        linear = nn.Linear(4, 1).double()
        with torch.no_grad():
            linear.weight.copy_(torch.tensor([[0.5, -1.0, 0.3, 0.2]]))
            linear.bias.fill_(0.1)
        run = trained(
            lambda p, steps=steps: torch.optim.SGD(p, lr=1.0 / steps),
            batches=(range(SAMPLES),) * steps,
            model=linear,
            loss=nn.MSELoss(),
            y=y,
            audit_every=0,
        )
        A = np.hstack([run.X.numpy(), np.ones((SAMPLES, 1))])
        hessian, pulled = 2 * A.T @ A / SAMPLES, 2 * A.T @ y.numpy()[:, 0] / SAMPLES
        best = np.linalg.solve(hessian, pulled)
        start = reference.flatten(run.start, run.path[0]).numpy()
        flow = best + expm(-hessian) @ (start - best)
        errors.append(np.linalg.norm(reference.flatten(run.start, run.path[-1]).numpy() - flow))
        machine = pk.KernelMachine(run.trajectory)
        says = machine.decision_function(run.queries)
        np.testing.assert_allclose(says, run.model(run.queries)[:, 0].detach(), **EXACT)
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), 1, atol=ORDER)


def langevin() -> None:
    """√(2ηT) ξ after each step, under a name: for a linear network the channel is the noise, seen by the query."""
    drawn: list[Tensor] = []

    def noise(recorder: pk.KernelRecorder, model: nn.Module) -> None:
        with recorder.channel("noise"), torch.no_grad():
            for p in model.parameters():
                drawn.append((2 * 0.1 * 0.05) ** 0.5 * torch.randn(p.shape, dtype=p.dtype, generator=source))
                p += drawn[-1]

    source, linear = generator(11), make_model("tanh", 3)[:1]
    run = trained(lambda p: torch.optim.SGD(p, lr=0.1), model=linear, y=torch.arange(SAMPLES) % 5, after=noise)
    theta = reference.flatten(run.start, run.path[0])
    for s, ids in enumerate(run.batches):
        kick = torch.cat([drawn[2 * s].flatten(), drawn[2 * s + 1]])
        theta = theta - 0.1 * Pull(run, theta, ids)()[0] + kick
    with torch.no_grad():
        np.testing.assert_allclose(theta, reference.flatten(run.start, dict(run.model.named_parameters())), **EXACT)
        seen = run.queries @ sum(drawn[::2]).T + sum(drawn[1::2])
    run.is_the_network()
    np.testing.assert_allclose(run.why.channels["noise"], seen.flatten(), **EXACT)


def oracle_kernel(run: Run, X: Tensor, Y: Tensor) -> np.ndarray:
    """∫ dt Σ_c ⟨∇f_c(x), ∇f_c(x')⟩ by the trapezoid at every step, entry by entry."""
    rate = 0.1
    weights = [rate / 2, *[rate] * (len(run.path) - 2), rate / 2]
    return reference.path_kernel(run.start, run.path, weights, X, Y).numpy()


def kernel_in_svc() -> None:
    run, labels = run_of("SGD is Euler"), CASE.targets(SAMPLES).numpy() % 2
    inside = SVC(kernel=pk.PathKernel(run.trajectory), C=10).fit(run.X.numpy(), labels)
    plain = SVC(kernel="precomputed", C=10).fit(oracle_kernel(run, run.X, run.X), labels)
    found = inside.decision_function(run.queries.numpy())
    np.testing.assert_allclose(found, plain.decision_function(oracle_kernel(run, run.queries, run.X)), rtol=1e-6)


def kernel_in_ridge() -> None:
    run, values = run_of("SGD is Euler"), make_inputs(SAMPLES, (1,), seed=5).numpy()[:, 0]
    ridge = make_pipeline(
        pk.PathKernelTransformer(pk.PathKernel(run.trajectory)), KernelRidge(kernel="precomputed", alpha=0.3)
    )
    dual = np.linalg.solve(oracle_kernel(run, run.X, run.X) + 0.3 * np.eye(SAMPLES), values)
    expected = oracle_kernel(run, run.queries, run.X) @ dual
    np.testing.assert_allclose(ridge.fit(run.X.numpy(), values).predict(run.queries.numpy()), expected, rtol=1e-9)


def kernel_in_gaussian_process() -> None:
    run, values = run_of("SGD is Euler"), make_inputs(SAMPLES, (1,), seed=5).numpy()[:, 0]
    covariance = pk.GaussianProcessKernel(pk.PathKernel(run.trajectory), scale_bounds="fixed")
    process = GaussianProcessRegressor(covariance + WhiteKernel(0.2, "fixed")).fit(run.X.numpy(), values)
    mean, deviation = process.predict(run.queries.numpy(), return_std=True)
    noisy = oracle_kernel(run, run.X, run.X) + 0.2 * np.eye(SAMPLES)
    cross, own = oracle_kernel(run, run.queries, run.X), np.diag(oracle_kernel(run, run.queries, run.queries))
    np.testing.assert_allclose(mean, cross @ np.linalg.solve(noisy, values), rtol=1e-8)
    variance = own + 0.2 - np.einsum("qn,nq->q", cross, np.linalg.solve(noisy, cross.T))
    np.testing.assert_allclose(deviation, variance**0.5, rtol=1e-8)


def coefficients_and_offset() -> None:
    """f(x) = Σ_i α_i(x) K_i(x) + β(x): α the mean slope of the loss under the kernel along the path, β = f(x; θ_0)."""
    run, output = run_of("SGD is Euler"), 1
    machine = pk.KernelMachine(run.trajectory, form="average", quadrature=pk.GaussLegendre(NODES))
    why = machine.explain(run.queries, outputs=output)
    above, below = np.zeros((QUERIES, SAMPLES, 3)), np.zeros((QUERIES, SAMPLES, 3))
    for s, ids in enumerate(run.batches):
        ids, at = list(ids), run.path[s]
        z = torch.func.functional_call(run.start, at, (run.X[ids],)).requires_grad_()
        (slopes,) = torch.autograd.grad(run.loss(z, run.y[ids]), z)
        rows = reference.output_gradients(run.start, at, run.X[ids])
        for q, x in enumerate(run.queries):
            kernel = 0.1 * (rows @ average(run, s, x, output)).numpy()
            np.add.at(above[q], ids, -slopes.numpy() * kernel)
            np.add.at(below[q], ids, kernel)
    np.testing.assert_allclose(why.form.coefficients, above / below, rtol=1e-8)
    np.testing.assert_allclose(why.form.denominator, below, **EXACT)
    with torch.no_grad():
        np.testing.assert_allclose(why.initial, run.start(run.queries)[:, output], **EXACT)
        says = run.model(run.queries)[:, output].numpy()
    np.testing.assert_allclose((why.form.coefficients * below).sum((1, 2)) + why.initial, says, **EXACT)


def retrieval() -> None:
    """The strongest helpers and opponents of a prediction, against a ranking of the oracle's shares."""
    run = run_of("Adam")
    expected = shares(run, displacements(run, adam)[1])
    top = run.why.top(3)
    order = np.argsort(expected, axis=1)
    np.testing.assert_array_equal(top.proponents, order[:, ::-1][:, :3])
    np.testing.assert_array_equal(top.opponents, order[:, :3])
    np.testing.assert_allclose(top.proponent_shares, np.sort(expected, axis=1)[:, ::-1][:, :3], **EXACT)


def soft_batches() -> None:
    """k batches of b, accumulated, are one batch of kb: the same path and the same shares."""
    whole = trained(lambda p: torch.optim.Adam(p, lr=0.01), batches=((0, 1, 2, 3, 4, 5), (6, 7, 8, 9, 0, 1)))
    model = make_model("tanh", 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with pk.KernelRecorder(model, optimizer, CASE.loss, data=(whole.X, whole.y)) as recorder:
        for batch in whole.batches:
            optimizer.zero_grad()
            for part in (batch[:2], batch[2:4], batch[4:]):
                x, target = recorder.announce(list(part))
                (CASE.loss(model(x), target) / 3).backward()
            optimizer.step()
    soft = Run(whole.start, model, recorder.trajectory, whole.X, whole.y, CASE.loss, whole.batches)
    for one, other in zip(soft.path, whole.path, strict=True):
        for name in one:
            np.testing.assert_allclose(one[name], other[name], **EXACT)
    soft.is_the_network()
    np.testing.assert_allclose(soft.why.shares, whole.why.shares, **EXACT)


def hidden_tensor() -> None:
    """Units behind the first activation, against the network cut off there."""
    run = run_of("heavy ball")
    why = pk.KernelMachine(run.trajectory, quadrature=pk.GaussLegendre(NODES)).explain(run.queries, outputs="1")
    with torch.no_grad():
        np.testing.assert_allclose(why.output, run.model[:2](run.queries).flatten(), **EXACT)
    moved = displacements(run, look_ahead(0.0))[1]
    np.testing.assert_allclose(why.shares, shares(run, moved, outputs=5, network=run.start[:2]), **EXACT)


def averaged(average: AveragedModel, model: nn.Module, weights: Callable[[int], np.ndarray]) -> None:
    """A linear network's average Σ_t w_t θ_t: the displacement of step s counts Σ_{t > s} w_t times."""
    run = trained(
        lambda p: torch.optim.SGD(p, lr=0.1),
        model=model,
        y=torch.arange(SAMPLES) % 5,
        averages={"mean": average},
        after=lambda recorder, model: average.update_parameters(model),
    )
    w = weights(len(run.batches))
    machine = pk.KernelMachine(run.trajectory, average="mean")
    why = machine.explain(run.queries, outputs="all")
    by_hand = {name: sum(float(a) * run.path[t + 1][name] for t, a in enumerate(w)) for name in run.path[0]}
    says = torch.func.functional_call(run.start, by_hand, (run.queries,)).numpy()
    np.testing.assert_allclose(machine.decision_function(run.queries), says, **EXACT)
    np.testing.assert_allclose(average(run.queries).detach(), says, **EXACT)
    moved = displacements(run, euler)[1]
    np.testing.assert_allclose(
        why.shares, shares(run, [float(w[s:].sum()) * part for s, part in enumerate(moved)], outputs=5), **EXACT
    )


def exponential_average() -> None:
    model = make_model("tanh", 3)[:1]
    averaged(
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7)),
        model,
        lambda steps: np.array([0.7 ** (steps - 1), *(0.3 * 0.7 ** np.arange(steps - 2, -1, -1))]),
    )


def stochastic_weight_average() -> None:
    model = make_model("tanh", 3)[:1]
    averaged(AveragedModel(model), model, lambda steps: np.full(steps, 1 / steps))


def ids_through_worker_processes() -> None:
    """Ids on record are those of the rows that the loop saw, and the shares those of the oracle under these ids."""
    model, seen = make_model("tanh", 3), []
    X, y = make_inputs(SAMPLES), CASE.targets(SAMPLES)
    start, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.1)
    dataset = pk.IndexedDataset(TensorDataset(X, y))
    loader = DataLoader(dataset, batch_size=3, shuffle=True, num_workers=2, generator=generator(0))
    with pk.KernelRecorder(model, optimizer, CASE.loss, data=(X, y)) as recorder:
        for x, target in recorder.track(loader):
            seen.append((x[:, None] == X).all(2).int().argmax(1).tolist())
            optimizer.zero_grad()
            CASE.loss(model(x), target).backward()
            optimizer.step()
    assert [torch.cat([batch.ids for batch in step.batches]).tolist() for step in recorder.trajectory.steps()] == seen
    order = [i for ids in seen for i in ids]
    assert sorted(order) == list(range(SAMPLES)) != order
    run = Run(start, model, recorder.trajectory, X, y, CASE.loss, seen)
    run.is_the_network()
    np.testing.assert_allclose(run.why.shares, shares(run, displacements(run, euler)[1]), **EXACT)


@pytest.mark.parametrize(
    "claim",
    [
        gradient_flow,
        langevin,
        kernel_in_svc,
        kernel_in_ridge,
        kernel_in_gaussian_process,
        coefficients_and_offset,
        retrieval,
        soft_batches,
        hidden_tensor,
        exponential_average,
        stochastic_weight_average,
        ids_through_worker_processes,
    ],
    ids=lambda claim: claim.__name__,
)
def test_the_mission(claim: Callable[[], None]) -> None:
    claim()
