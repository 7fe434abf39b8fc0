"""The error bar of the shares: it holds the true error where the error along the step is blind, and warnings."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from cases import MODELS, OPTIMIZERS, Recording, make_inputs, make_model, record
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pathkernel as pk
from pathkernel import reference
from pathkernel.errors import CertificateWarning, InputError, StoreError
from pathkernel.kernel_machine import averaging_error

RULES = [
    pk.DiscreteGradient(),
    pk.LeftEndpoint(),
    pk.Trapezoid(),
    pk.Midpoint(),
    pk.GaussLegendre(2),
    pk.Adaptive(1e-4),
]
LOOSE = 10.0
"""How much larger than the true error the bar may be, in the median over the queries."""

ROUNDING = 1e-13
"""A true error below is none of the quadrature's."""


def moved(why: pk.Attributions) -> np.ndarray:
    return np.abs(why.output - why.initial)


def true_error(why: pk.Attributions, exact: np.ndarray) -> np.ndarray:
    return np.abs(why.shares - exact).sum(axis=1) / moved(why)


def covers(why: pk.Attributions, exact: np.ndarray, loose: float = LOOSE) -> None:
    error = true_error(why, exact)
    assert (error <= why.shares_error).all(), (error, why.shares_error)
    if (counted := error > ROUNDING).any():
        assert np.median(why.shares_error[counted] / error[counted]) <= loose


def oracle(run: Recording, optimizer: str, output: int, nodes: int = 64) -> np.ndarray:
    """Shares by plain autograd, every sample's own momentum carried forward, many nodes a step."""
    rule = reference.gauss_legendre(nodes)
    name = OPTIMIZERS[optimizer].oracle
    found = reference.decompose(
        run.start, run.loss, run.X, run.y, run.batches, name, run.queries, output, rule, **run.settings
    )
    return found.shares.numpy()


# -- the bar holds the true error ---------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "momentum_dampening_decay", "nesterov", "adam_decay", "adamw"])
@pytest.mark.parametrize("model", ["tanh", "relu", "conv_group_norm"])
def test_it_holds_the_error_against_plain_autograd(model: str, optimizer: str) -> None:
    run = record(model, optimizer=optimizer)
    exact = oracle(run, optimizer, 1)
    for rule in (pk.DiscreteGradient(), pk.LeftEndpoint()):
        why = pk.KernelMachine(run.trajectory, quadrature=rule).explain(run.queries, outputs=1, verify="shares")
        assert why.shares_error is not None and why.shares_error.shape == (len(run.queries),)
        covers(why, exact)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("model", ["tanh", "relu"])
def test_it_holds_the_error_of_every_rule(model: str, rule: pk.DiscreteGradient) -> None:
    run = record(model, optimizer="adam")
    if isinstance(rule, pk.Adaptive):  # many nodes are far less exact at a kink than bisection
        exact = pk.KernelMachine(run.trajectory, quadrature=pk.Adaptive(1e-12)).explain(run.queries, outputs=0).shares
    else:
        exact = oracle(run, "adam", 0)
    why = pk.KernelMachine(run.trajectory, quadrature=rule).explain(run.queries, outputs=0, verify="shares")
    covers(why, exact)


def test_the_error_along_the_step_does_not() -> None:
    """Why there is a second number: Adam's steps point where single samples' gradients do not."""
    run = record("tanh", optimizer="adam")
    why = pk.KernelMachine(run.trajectory).explain(run.queries, outputs=0, verify="shares")
    assert (true_error(why, oracle(run, "adam", 0)) > why.quadrature_error).any()


def test_where_nothing_is_left_to_find_it_is_rounding() -> None:
    run = record("tanh", optimizer="momentum")
    why = pk.KernelMachine(run.trajectory, quadrature=pk.GaussLegendre(8)).explain(run.queries, verify="shares")
    assert (why.shares_error > 0).all() and (why.shares_error < 1e-12).all()


# -- what no rule can see along the step ----------------------------------------------------------------------------


class Across(nn.Module):
    """Two weights of which only `a` moves; the gradient in `b` follows a course of `a` that f itself does not show.

    Training samples are (1, ±1, 0), and the query (0, 0, 1).
    """

    def __init__(self, course: Any) -> None:
        super().__init__()
        self.course, self.a, self.b = course, nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        u, v, q = x[:, :1], x[:, 1:2], x[:, 2:]
        return u * self.a + v * self.b + q * (self.a + self.b * self.course(self.a))


COURSES = {
    "sine 40": lambda a: torch.sin(40 * a) ** 2,
    "sine 23": lambda a: torch.sin(23 * a) ** 2,
    "cosine 61": lambda a: torch.cos(61 * a),
    "square": lambda a: 3 * a**2,
    "step": lambda a: (a > 0.31).to(a.dtype),
    "bump": lambda a: torch.exp(-((a - 0.4) ** 2) / 0.005),
}
X_ACROSS = torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0]], dtype=torch.float64)
Q_ACROSS = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
RATE, STEPS = 0.35, 3


def across(course: Any) -> pk.Trajectory:
    net, loss, y = Across(course).double(), nn.MSELoss(), torch.ones(2, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    with pk.KernelRecorder(net, optimizer, loss, data=(X_ACROSS, y)) as recorder:
        for _ in range(STEPS):
            x, target = recorder.batch([0, 1])
            optimizer.zero_grad()
            loss(net(x), target).backward()
            optimizer.step()
    return recorder.trajectory


def shares_across(course: Any, nodes: int = 20_000) -> np.ndarray:
    """By hand: both samples pull `a` alike and `b` against each other."""
    shares, a = np.zeros(2), torch.zeros(1, dtype=torch.float64)
    for _ in range(STEPS):
        slope = a.item() - 1
        times = (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes
        after = a - 2 * RATE * slope
        in_b = course(a + times * (after - a)).mean().item()
        shares += [-RATE * slope * (1 + in_b), -RATE * slope * (1 - in_b)]
        a = after
    return shares


@pytest.mark.parametrize("rule", ["auto", "left", "trapezoid", "adaptive", "gauss_legendre", pk.GaussLegendre(7)])
@pytest.mark.parametrize("course", COURSES)
def test_an_error_across_the_step_is_found(course: str, rule: Any) -> None:
    why = pk.KernelMachine(across(COURSES[course]), quadrature=rule).explain(Q_ACROSS, verify="shares")
    assert why.quadrature_error < 1e-12, "f is linear along each step, so no rule misses anything of it"
    error = true_error(why, shares_across(COURSES[course])[None])
    assert error <= why.shares_error + 1e-7  # of the sum by hand
    assert why.shares_error <= max(30 * error, 1e-7)


class OneKink(nn.Module):
    """f = w · relu(a − at), whose training moves `a` over the kink."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at, self.a, self.w = at, nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        u, q = x[:, :1], x[:, 1:]
        return u * (self.a + 0.3 * self.w) + q * self.w * torch.relu(self.a - self.at)


@pytest.mark.filterwarnings("ignore:The median quadrature error")
@pytest.mark.parametrize(
    "at", [1e-4, 0.11, 0.999, *(pytest.param(at, marks=pytest.mark.exhaustive) for at in (1e-3, 0.02, 0.5, 0.93))]
)
def test_a_single_kink_is_found_wherever_it_is(at: float) -> None:
    """Also beside the ends of the step, where no rule of few nodes has one."""
    net, loss = OneKink(0.0).double(), nn.MSELoss()
    X = torch.tensor([[1.0, 0.0], [0.5, 0.0]], dtype=torch.float64)
    y = torch.tensor([[2.0], [1.0]], dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    with pk.KernelRecorder(net, optimizer, loss, data=(X, y)) as recorder:
        x, target = recorder.batch([0, 1])
        loss(net(x), target).backward()
        net.at = at * 0.3 * -net.a.grad.item()  # a part of the way that the step will take
        optimizer.step()
    query = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    exact = pk.KernelMachine(recorder.trajectory, quadrature=pk.Adaptive(1e-13)).explain(query).shares
    for rule in (pk.DiscreteGradient(), pk.Midpoint(), pk.GaussLegendre(4)):
        why = pk.KernelMachine(recorder.trajectory, quadrature=rule).explain(query, verify="shares")
        assert true_error(why, exact) <= why.shares_error


# -- long runs, of which some steps are checked --------------------------------------------------------------------


AS_IT_IS = averaging_error.PIECES_VERIFIED
"""Pieces that are checked of a long run; fewer, of a run that is shorter in proportion, are harder to estimate from."""


@pytest.mark.parametrize(
    ("model", "optimizer", "pieces"),
    [
        ("relu", "sgd", AS_IT_IS // 2),
        *(pytest.param(*run, AS_IT_IS, marks=pytest.mark.exhaustive) for run in (("relu", "sgd"), ("tanh", "adam"))),
    ],
)
def test_of_a_long_run_some_steps_stand_for_all(
    monkeypatch: pytest.MonkeyPatch, model: str, optimizer: str, pieces: int
) -> None:
    monkeypatch.setattr(averaging_error, "PIECES_VERIFIED", pieces)
    batches = tuple((k % 10, (3 * k + 1) % 10) for k in range(5 * pieces // 2))
    run = record(model, optimizer=optimizer, batches=batches)
    X = make_inputs(16, MODELS[model].sample, seed=11)
    exact = pk.KernelMachine(run.trajectory, quadrature=pk.GaussLegendre(16)).explain(X, outputs=0).shares
    why = pk.KernelMachine(run.trajectory).explain(X, outputs=0, verify="shares")
    error = true_error(why, exact)
    assert (error <= why.shares_error).mean() >= 0.9  # an estimate from some of the steps
    assert np.median(why.shares_error / error) <= LOOSE


# -- with everything that an explanation can be asked for ----------------------------------------------------------


def test_without_it_nothing_is_measured() -> None:
    run = record()
    plain = pk.KernelMachine(run.trajectory).explain(run.queries)
    assert plain.shares_error is None and "shares error" not in repr(plain)
    why = pk.KernelMachine(run.trajectory).explain(run.queries, verify="shares")
    np.testing.assert_array_equal(why.shares, plain.shares)
    np.testing.assert_array_equal(why.quadrature_error, plain.quadrature_error)
    assert why.gradients_per_step == plain.gradients_per_step
    assert "shares error" in repr(why)


def test_it_is_the_same_every_time_and_draws_nothing_of_the_users() -> None:
    run = record("relu")
    machine = pk.KernelMachine(run.trajectory)
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = machine.explain(run.queries, verify="shares")
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])
    np.testing.assert_array_equal(first.shares_error, machine.explain(run.queries, verify="shares").shares_error)


def test_blocks_of_queries_give_bars_of_the_same_size() -> None:
    run = record("relu", optimizer="adam")
    X = make_inputs(24, seed=5)
    whole = pk.KernelMachine(run.trajectory).explain(X, outputs="all", verify="shares")
    size = 24 * 3 * run.trajectory.layout.size * 8
    machine = pk.KernelMachine(run.trajectory)
    machine.memory = 20 * size // 4  # a few blocks
    parts = machine.explain(X, outputs="all", verify="shares")
    np.testing.assert_allclose(parts.shares, whole.shares, rtol=1e-10, atol=1e-14)
    exact = pk.KernelMachine(run.trajectory, quadrature=pk.GaussLegendre(64)).explain(X, outputs="all").shares
    for why in (whole, parts):
        covers(why, exact)


@pytest.mark.parametrize("outputs", [None, 1, "all", "loss", lambda z: z[0] * z[1], ("0", 2), ("1", lambda h: h.sum())])
def test_every_kind_of_output(outputs: Any) -> None:
    run = record("tanh", optimizer="momentum")
    X = (run.queries, torch.tensor([0, 2, 1, 1])) if outputs == "loss" else run.queries
    why = pk.KernelMachine(run.trajectory).explain(X, outputs, verify="shares")
    exact = pk.KernelMachine(run.trajectory, quadrature=pk.GaussLegendre(16)).explain(X, outputs)
    error = true_error(why, exact.shares)
    assert (error <= why.shares_error).all()


@pytest.mark.parametrize("form", ["folded", "average", "ensemble", "constant", "chord"])
def test_every_form(form: str) -> None:
    run = record("relu")
    why = pk.KernelMachine(run.trajectory, form=form).explain(run.queries, outputs=0, verify="shares")
    exact = pk.KernelMachine(run.trajectory, form=form, quadrature=pk.GaussLegendre(64)).explain(run.queries, outputs=0)
    covers(why, exact.shares)


@pytest.mark.parametrize("by", ["module", "step"])
def test_split_by_module_or_step(by: str) -> None:
    run = record("relu", optimizer="adamw")
    machine = pk.KernelMachine(run.trajectory)
    split = machine.explain(run.queries, by=by, verify="shares")
    np.testing.assert_allclose(split.shares_error, machine.explain(run.queries, verify="shares").shares_error)


def test_an_averaged_network() -> None:
    model, loss = make_model("relu"), nn.CrossEntropyLoss()
    X, y = make_inputs(10), torch.arange(10) % 3
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.6))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), averages={"ema": average}) as recorder:
        for k in range(6):
            x, target = recorder.batch([k, k + 1, (3 * k + 5) % 10])
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
            average.update_parameters(model)
            with recorder.channel("noise"), torch.no_grad():
                model[0].weight.add_(0.01)
    queries = make_inputs(5, seed=3)
    why, exact = (
        pk.KernelMachine(recorder.trajectory, weights="ema", quadrature=rule).explain(queries, 0, verify=verify)
        for rule, verify in ((pk.DiscreteGradient(), "shares"), (pk.GaussLegendre(64), None))
    )
    covers(why, exact.shares)


def test_running_statistics_and_changes_beside_the_optimizer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    X, y, loss = make_inputs(12), torch.arange(12) % 3, nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for k in range(5):
            x, target = recorder.batch([k, k + 1, k + 3, k + 6])
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
            with recorder.channel("noise"), torch.no_grad():
                model[3].weight.add_(0.02)
    queries = make_inputs(6, seed=3)
    why, exact = (
        pk.KernelMachine(recorder.trajectory, quadrature=rule).explain(queries, "all", verify=verify)
        for rule, verify in ((pk.DiscreteGradient(), "shares"), (pk.GaussLegendre(64), None))
    )
    covers(why, exact.shares)


def test_it_is_kept_in_a_store_and_belongs_to_the_question(tmp_path: Any) -> None:
    run = record("relu", optimizer="adam")
    machine = pk.KernelMachine(run.trajectory)
    plain = machine.explain(run.queries, store=tmp_path / "plain")
    assert plain.shares_error is None
    why = machine.explain(run.queries, store=tmp_path / "verified", verify="shares")
    again = machine.explain(run.queries, store=tmp_path / "verified", verify="shares")
    np.testing.assert_array_equal(again.shares_error, why.shares_error)
    np.testing.assert_array_equal(why.shares_error, machine.explain(run.queries, verify="shares").shares_error)
    with pytest.raises(StoreError):
        machine.explain(run.queries, store=tmp_path / "plain", verify="shares")


@pytest.mark.parametrize("verify", ["share", True, 3])
def test_what_can_be_verified(verify: Any) -> None:
    run = record()
    with pytest.raises(InputError, match=r"verify=.* was given") as caught:
        pk.KernelMachine(run.trajectory).explain(run.queries, verify=verify)
    assert 'verify="shares"' in caught.value.write


def test_in_a_table_in_the_units_of_the_output() -> None:
    pytest.importorskip("pandas")
    run = record("relu")
    machine = pk.KernelMachine(run.trajectory)
    assert "share_error" not in machine.explain(run.queries).to_frame()
    why = machine.explain(run.queries, verify="shares")
    column = why.to_frame()["share_error"].to_numpy().reshape(why.shares.shape)
    np.testing.assert_allclose(column, np.broadcast_to((why.shares_error * moved(why))[:, None], why.shares.shape))


# -- warnings ------------------------------------------------------------------------------------------------------


class Rounded(nn.Module):
    """A straight-through estimator: rounding whose gradient is that of the identity."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (torch.round(4 * x) / 4 - x).detach()


class Signs(nn.Module):
    """Another: signs with the gradient of tanh."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        return h + (torch.sign(h) - h).detach()


class _Reversed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Reversal(nn.Module):
    """Gradient reversal of domain-adversarial training: the identity, and back the other way."""

    def forward(self, x: Tensor) -> Tensor:
        return _Reversed.apply(x)


def trained(layer: nn.Module, rate: float = 0.3, steps: int = 8) -> tuple[pk.Trajectory, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), layer, nn.Linear(16, 2)).double()
    X, y, loss = make_inputs(32), torch.arange(32) % 2, nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=0) as recorder:
        for k in range(steps):
            x, target = recorder.batch(range(8 * (k % 4), 8 * (k % 4) + 8))
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    return recorder.trajectory, X[:8]


@pytest.mark.parametrize("layer", [Signs(), Rounded(), Reversal()], ids=lambda layer: type(layer).__name__)
def test_a_gradient_that_is_no_derivative_is_warned_of(layer: nn.Module) -> None:
    trajectory, X = trained(layer)
    machine = pk.KernelMachine(trajectory)
    with pytest.warns(CertificateWarning, match="median quadrature error of 8 explained outputs") as caught:
        why = machine.explain(X, outputs=0, verify="shares")
    assert len(caught) == 1, "once for each call"
    assert caught[0].filename == __file__, "pointing at the user's line"
    assert "straight-through" in caught[0].message.expected and "verify" in caught[0].message.write
    # No finer rule meets the change of f, and the bar says so.
    assert np.median(why.shares_error) > 0.3


@pytest.mark.filterwarnings("ignore:The median quadrature error")
def test_adaptive_that_stops_short_is_warned_of() -> None:
    trajectory, X = trained(Signs(), steps=1)  # where bisection goes as deep as it may at every query
    machine = pk.KernelMachine(trajectory, quadrature=pk.Adaptive(1e-6))
    with pytest.warns(CertificateWarning, match="`Adaptive` stopped above its tolerance for .* of 4"):
        machine.explain(X[:4], outputs=0)
    trajectory, X = trained(nn.ReLU(), steps=4)
    shallow = pk.KernelMachine(trajectory, quadrature=pk.Adaptive(1e-9, max_depth=2))
    with pytest.warns(CertificateWarning, match="stopped above its tolerance"):
        shallow.explain(X, outputs=0)


def test_steps_that_are_long_are_warned_of() -> None:
    trajectory, X = trained(nn.Tanh(), rate=12.0)
    with pytest.warns(CertificateWarning, match="median quadrature error"):
        pk.KernelMachine(trajectory).explain(X, outputs=0)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("model", MODELS)
def test_ordinary_networks_give_no_warning(model: str, optimizer: str) -> None:
    run = record(model, optimizer=optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CertificateWarning)
        for rule in ("auto", "adaptive"):
            pk.KernelMachine(run.trajectory, quadrature=rule).explain(run.queries, outputs=0)
