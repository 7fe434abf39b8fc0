"""The kernel machine is the network: against the forward oracle, in closed form, and by its own certificate."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    BATCHES,
    IN_ORACLE,
    LOSSES,
    MODELS,
    OPTIMIZERS,
    SAMPLES,
    SMOOTH,
    Recording,
    make_inputs,
    record,
    smallest_budget,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.preprocessing import StandardScaler
from tolerances import TOLERANCES
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import reference
from pathkernel.errors import InputError, TrajectoryError
from pathkernel.kernel_machine.attributions import Attributions
from pathkernel.update_rules.adam import Adam
from pathkernel.update_rules.rule import UpdateRule

DOUBLE = TOLERANCES[torch.float64]
QUADRATURES = {
    "left": (pk.LeftEndpoint(), reference.left),
    "trapezoid": (pk.Trapezoid(), reference.trapezoid),
    "midpoint": (pk.Midpoint(), reference.midpoint),
    "gauss_legendre": (pk.GaussLegendre(3), reference.gauss_legendre(3)),
    "discrete_gradient": (pk.DiscreteGradient(), "discrete"),
}


def outputs(run: Recording, X: Tensor) -> np.ndarray:
    with torch.no_grad():
        return run.model(X).double().numpy()


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Equal to a part of the largest entry: entries that cancel to nothing are judged by the scale of the rest."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1e-3, np.abs(expected).max(initial=0)))


def decomposed(run: Recording, optimizer: str, rule, output: int = 0) -> reference.Decomposition:
    case = OPTIMIZERS[optimizer]
    assert case.oracle is not None
    return reference.decompose(
        run.start, run.loss, run.X, run.y, run.batches, case.oracle, run.queries, output, rule, **run.settings
    )


def assert_same_account(why: Attributions, oracle: reference.Decomposition, tolerance: float) -> None:
    close(why.shares, oracle.shares, tolerance)
    close(why.initial, oracle.initial, tolerance)
    close(why.channels.get("weight_decay", np.zeros(len(why.output))), oracle.weight_decay, tolerance)
    close(why.output, oracle.final, tolerance)
    assert set(why.channels) <= {"initial", "weight_decay", "rounding"}
    close(why.channels["rounding"], np.zeros(len(why.output)), tolerance)


# -- against the oracle, which carries every sample's own momentum forward --------------------------------------------


@pytest.mark.parametrize("optimizer", IN_ORACLE)
@pytest.mark.parametrize("quadrature", ["gauss_legendre", "discrete_gradient"])
def test_shares_and_channels_are_those_of_the_oracle(optimizer: str, quadrature: str) -> None:
    run = record(optimizer=optimizer)
    mine, theirs = QUADRATURES[quadrature]
    why = pk.KernelMachine(run.trajectory, quadrature=mine).explain(run.queries, outputs=0)
    assert_same_account(why, decomposed(run, optimizer, theirs), DOUBLE.shares)
    assert ("weight_decay" in why.channels) == bool(run.optimizer.param_groups[0]["weight_decay"])


@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_every_quadrature_is_that_of_the_oracle(quadrature: str) -> None:
    run = record(optimizer="momentum_dampening_decay")
    mine, theirs = QUADRATURES[quadrature]
    why = pk.KernelMachine(run.trajectory, quadrature=mine).explain(run.queries, outputs=2)
    oracle = decomposed(run, "momentum_dampening_decay", theirs, output=2)
    assert_same_account(why, oracle, DOUBLE.shares)
    np.testing.assert_allclose(why.left_over, oracle.residual, atol=DOUBLE.shares)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_models_and_losses_against_the_oracle(model: str, loss: str) -> None:
    run = record(model, loss, "nesterov_decay")
    why = pk.KernelMachine(run.trajectory).explain(run.queries[:2], outputs=-1)
    run.queries = run.queries[:2]
    oracle = decomposed(run, "nesterov_decay", "discrete", output=LOSSES[loss].outputs - 1)
    assert_same_account(why, oracle, DOUBLE.shares)


def test_a_float32_run_agrees_with_the_oracle_in_float64() -> None:
    run = record(optimizer="momentum", dtype=torch.float32)
    why = pk.KernelMachine(run.trajectory).explain(run.queries, outputs=0)
    oracle = decomposed(run, "momentum", "discrete")
    close(why.shares, oracle.shares, TOLERANCES[torch.float32].shares)


# -- completeness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_is_left_over_for_any_optimizer(optimizer: str, dtype: torch.dtype) -> None:
    tanh, relu = record("tanh", optimizer=optimizer, dtype=dtype), record("relu", optimizer=optimizer, dtype=dtype)
    smooth = pk.KernelMachine(tanh.trajectory, quadrature=pk.GaussLegendre(4)).explain(tanh.queries, outputs=1)
    kinked = pk.KernelMachine(relu.trajectory, quadrature=pk.DiscreteGradient()).explain(relu.queries, outputs=1)
    assert smooth.relative_residual <= TOLERANCES[dtype].residual
    assert kinked.relative_residual <= TOLERANCES[dtype].residual
    assert smooth.quadrature_error.max() < 1e3 * TOLERANCES[dtype].residual


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", SMOOTH)
def test_nothing_is_left_over_on_smooth_networks(model: str, loss: str) -> None:
    run = record(model, loss, "adamw")
    why = pk.KernelMachine(run.trajectory, quadrature=pk.GaussLegendre(6)).explain(run.queries, outputs=0)
    assert why.relative_residual <= DOUBLE.residual


def test_bisection_finds_every_kink() -> None:
    run = record("relu", optimizer="momentum")
    gauss = pk.KernelMachine(run.trajectory, quadrature=pk.GaussLegendre(4)).explain(run.queries, outputs=0)
    adaptive = pk.KernelMachine(run.trajectory, quadrature=pk.Adaptive(1e-12)).explain(run.queries, outputs=0)
    exact = pk.KernelMachine(run.trajectory, quadrature="discrete_gradient").explain(run.queries, outputs=0)
    assert gauss.relative_residual > 1e-6, "no kink was crossed: the test says nothing"
    # The tolerance holds for each accepted interval relative to |f|, the residual for their sum relative to its change.
    assert adaptive.relative_residual <= 1e2 * DOUBLE.residual
    assert adaptive.quadrature_error.max() <= 1e3 * DOUBLE.residual
    assert exact.relative_residual <= DOUBLE.residual
    assert exact.quadrature_error.max() > 1e-6, "complete by construction, but its error bar knows of the kinks"
    assert adaptive.gradients_per_step > 4
    # Both are complete; how they split it agrees to the size of the corrections, which is what the error bar says.
    moved = np.abs(exact.output - exact.initial)
    difference = np.abs(exact.shares - adaptive.shares).max(axis=1)
    assert (difference <= 3 * exact.quadrature_error * moved + 1e-12).all()


class PlainDescent(UpdateRule):
    """−lr·g, whatever the optimizer did."""

    name = "wrong"

    def step(self, gradient, memory, frozen, settings):
        return -float(settings["lr"]) * gradient, memory


class UncorrectedAdam(Adam):
    """Adam that forgets the bias correction of its first moment."""

    def step(self, gradient, memory, frozen, settings):
        return super().step(gradient, memory, {**frozen, "t": 10_000.0}, settings)


class UndampenedFirstStep(pk.UpdateRule):
    """Heavy ball whose first buffer is dampened like all others."""

    name, memory = "wrong", ("momentum_buffer",)

    def step(self, gradient, memory, frozen, settings):
        buffer = settings["momentum"] * memory[0] + (1 - settings["dampening"]) * gradient
        return -float(settings["lr"]) * buffer, (buffer,)

    def gradient_sources(self, parameter, frozen, settings):
        return {"weight_decay": settings["weight_decay"] * parameter}


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [
        ("adam", PlainDescent()),
        ("momentum", PlainDescent()),
        ("sgd_decay", PlainDescent()),  # forgets weight decay
        ("adam", UncorrectedAdam()),
        ("momentum_dampening_decay", UndampenedFirstStep()),
    ],
)
def test_the_certificate_fails_under_a_wrong_rule(optimizer: str, rule: UpdateRule) -> None:
    run = record("relu", optimizer=optimizer, rule=rule)
    machine = pk.KernelMachine(run.trajectory)
    for ask in (machine.explain, machine.decision_function):
        with pytest.raises(TrajectoryError, match=rf"is unexplained; .* otherwise than {rule.name} does"):
            ask(run.queries)
    why = pk.KernelMachine(run.trajectory, unexplained=np.inf).explain(run.queries, outputs=0)
    # What the rule leaves has no name, and is not left over.
    assert np.linalg.norm(why.channels["unexplained"]) > 1e-2 * np.linalg.norm(why.output - why.initial)
    assert why.relative_residual < DOUBLE.residual


def test_the_certificate_fails_when_a_step_is_lost() -> None:
    run = record("relu", optimizer="momentum")
    steps = run.trajectory.store._steps
    del steps[2]
    why = pk.KernelMachine(run.trajectory, unexplained=np.inf).explain(run.queries, outputs=0)
    # The gap is bridged as a change that nothing explains, and its momentum has no name either from then on.
    (gap,) = (segment for segment in run.trajectory.segments() if segment.step is None)
    after, before = (run.trajectory.function().outputs(theta, run.queries)[:, 0] for theta in (gap.end, gap.start))
    assert np.abs(why.channels["unexplained"] - (after - before).numpy()).max() > 1e-3
    assert why.relative_residual < DOUBLE.residual


# -- a run that is known in closed form -------------------------------------------------------------------------------


def test_a_linear_model_under_gradient_descent_in_closed_form() -> None:
    n, c, lr, steps = 6, 2, 0.1, 12
    X, y, queries = make_inputs(n), make_inputs(n, (c,), seed=5), make_inputs(3, seed=6)
    model, loss = nn.Linear(4, c).double(), nn.MSELoss()
    with torch.no_grad():
        model.weight.copy_(make_inputs(c, (4,), seed=7))
        model.bias.zero_()
        f0, f0_query = model(X), model(queries)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for _ in range(steps):
            for x, target in recorder.batches(batch_size=n):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()

    K, K_query = X @ X.T + 1, queries @ X.T + 1
    eta = 2 * lr / (n * c)
    path = reference.linear_least_squares_path(K, K_query, y, f0, f0_query, eta, steps)
    machine = pk.KernelMachine(recorder.trajectory, quadrature="left")  # f is linear in θ: one node is exact
    close(machine.decision_function(queries), path[-1], DOUBLE.rounding)
    # share_i(x) = −η Σ_t K(x, x_i) (f_t(x_i) − y_i)
    on_training = reference.linear_least_squares_path(K, K, y, f0, f0, eta, steps)
    residuals = (on_training[:-1] - y).sum(dim=0)
    for output in range(c):
        why = machine.explain(queries, outputs=output)
        close(why.shares, -eta * K_query * residuals[:, output], 10 * DOUBLE.rounding)


# -- what the network says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "quadrature"),
    [*((loss, "auto") for loss in LOSSES), ("ce_mean", pk.GaussLegendre(5)), ("bce", pk.Adaptive(1e-13))],
)
def test_the_decision_function_is_the_network(loss: str, quadrature) -> None:
    run = record("tanh", loss, "adam_decay")
    found = pk.KernelMachine(run.trajectory, quadrature=quadrature).decision_function(run.queries)
    expected = outputs(run, run.queries)
    assert found.shape == ((len(run.queries),) if loss == "bce" else expected.shape)
    close(found.reshape(expected.shape), expected, 10 * DOUBLE.residual)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_both_sweeps_say_the_same(optimizer: str) -> None:
    run = record("relu", optimizer=optimizer)
    machine = pk.KernelMachine(run.trajectory, quadrature="midpoint")  # inexact: the sweeps must miss the same
    forward = machine.decision_function(run.queries)
    backward = machine.explain(run.queries, outputs="all").reconstruction.reshape(forward.shape)
    close(forward, backward, DOUBLE.rounding)


def test_a_step_whose_gradients_were_all_cleared() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with pk.KernelRecorder(model, optimizer, nn.CrossEntropyLoss(), data=(x, y)) as recorder:
        for inputs, targets in recorder.batches(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            if len(recorder.trajectory) == 2:
                optimizer.zero_grad()
            optimizer.step()
    machine = pk.KernelMachine(recorder.trajectory)
    why = machine.explain(x, outputs=1)
    expected = model(x).detach().numpy()
    close(machine.decision_function(x), expected, 1e-6)
    close(why.shares.sum(1) + why.channels["initial"], expected[:, 1], 1e-6)
    assert not why.shares[:, 4:6].any()


def test_a_classifier_predicts_the_class_of_the_network() -> None:
    run = record("relu", optimizer="adam", dtype=torch.float32)
    machine = pk.KernelMachine(run.trajectory)
    z = outputs(run, run.X)
    assert machine.is_classifier
    np.testing.assert_array_equal(machine.predict(run.X), z.argmax(axis=1))
    np.testing.assert_allclose(machine.predict_proba(run.X), torch.from_numpy(z).softmax(1), atol=1e-5)
    np.testing.assert_array_equal(machine.predict(run.X.numpy()), z.argmax(axis=1))


def train_on(model: nn.Module, optimizer, loss, data, epochs: int = 2) -> pk.Trajectory:
    with pk.KernelRecorder(model, optimizer, loss, data=data) as recorder:
        for _ in range(epochs):
            for x, y in recorder.batches(batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0)):
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()
    return recorder.trajectory


def test_regression_on_diabetes() -> None:
    X, y = load_diabetes(return_X_y=True)
    X, y = StandardScaler().fit_transform(X[:60]), (y[:60, None] - y.mean()) / y.std()
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    machine = pk.KernelMachine(train_on(model, optimizer, nn.MSELoss(), (X[:48], y[:48])))
    with torch.no_grad():
        expected = model(torch.as_tensor(X[48:], dtype=torch.float32))[:, 0].numpy()
    assert not machine.is_classifier
    assert machine.predict(X[48:]).shape == (12,)
    np.testing.assert_allclose(machine.predict(X[48:]), expected, atol=1e-5)
    why = machine.explain(X[48:])  # of a regressor, every output
    assert why.shares.shape == (12, 48)
    assert why.relative_residual < TOLERANCES[torch.float32].residual


def test_binary_classification_on_breast_cancer() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    X, y = StandardScaler().fit_transform(X[:80]), y[:80, None].astype(np.float64)
    model = nn.Sequential(nn.Linear(30, 6), nn.ReLU(), nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    machine = pk.KernelMachine(train_on(model, optimizer, nn.BCEWithLogitsLoss(), (X[:64], y[:64])))
    with torch.no_grad():
        z = model(torch.as_tensor(X[64:], dtype=torch.float32))[:, 0]
    np.testing.assert_array_equal(machine.predict(X[64:]), (z > 0).numpy())
    probabilities = machine.predict_proba(X[64:])
    np.testing.assert_allclose(probabilities[:, 1], z.sigmoid(), atol=1e-5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    why = machine.explain(X[64:])
    np.testing.assert_allclose(why.output, z, atol=1e-5)
    assert why.relative_residual < TOLERANCES[torch.float32].residual


def test_log_probabilities_are_read_as_such() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(dim=1)).double()
    data = make_inputs(SAMPLES), LOSSES["ce_mean"].targets(SAMPLES)
    trajectory = train_on(model, torch.optim.SGD(model.parameters(), lr=0.5), nn.NLLLoss(), data)
    machine = pk.KernelMachine(trajectory)
    with torch.no_grad():
        expected = model(data[0]).exp()
    np.testing.assert_allclose(machine.predict_proba(data[0]), expected, atol=DOUBLE.shares)


class LossOfProbabilities(nn.Module):
    """A loss of a network that returns probabilities; it says so."""

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.nll_loss(output.log(), target)

    def probabilities(self, outputs: torch.Tensor) -> torch.Tensor:
        """The outputs themselves."""
        return outputs


def test_a_loss_may_say_itself_what_probabilities_are() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=1)).double()
    data = make_inputs(SAMPLES), LOSSES["ce_mean"].targets(SAMPLES)
    trajectory = train_on(model, torch.optim.SGD(model.parameters(), lr=0.5), LossOfProbabilities(), data)
    with torch.no_grad():
        expected = model(data[0])
    np.testing.assert_allclose(pk.KernelMachine(trajectory).predict_proba(data[0]), expected, atol=DOUBLE.shares)


# -- which outputs ----------------------------------------------------------------------------------------------------


def test_outputs_can_be_chosen_in_many_ways() -> None:
    run = record(optimizer="momentum")
    machine, z = pk.KernelMachine(run.trajectory, quadrature=pk.GaussLegendre(4)), outputs(run, run.queries)
    everything = machine.explain(run.queries, outputs="all")
    n, c = z.shape
    assert everything.shares.shape == (n * c, SAMPLES)
    close(everything.output, z.ravel(), DOUBLE.rounding)
    np.testing.assert_array_equal(everything.samples, np.repeat(np.arange(n), c))
    np.testing.assert_array_equal(everything.outputs, np.tile(np.arange(c), n))
    cube = everything.shares.reshape(n, c, SAMPLES)

    predicted = machine.explain(run.queries)
    np.testing.assert_array_equal(predicted.outputs, z.argmax(axis=1))
    close(predicted.shares, cube[np.arange(n), z.argmax(axis=1)], DOUBLE.rounding)

    close(machine.explain(run.queries, outputs=2).shares, cube[:, 2], DOUBLE.rounding)
    close(machine.explain(run.queries, outputs=-1).shares, cube[:, 2], DOUBLE.rounding)
    mixed = machine.explain(run.queries, outputs=[0, 2, 1, 1])
    close(mixed.shares, cube[np.arange(4), [0, 2, 1, 1]], DOUBLE.rounding)

    # With fixed nodes shares are linear in the function that is explained: a margin is a difference.
    margin = machine.explain(run.queries, outputs=lambda z: z[0] - z[1])
    close(margin.output, z[:, 0] - z[:, 1], DOUBLE.rounding)
    close(margin.shares, cube[:, 0] - cube[:, 1], DOUBLE.rounding)
    assert (margin.outputs == -1).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_a_query_can_be_explained(loss: str) -> None:
    run = record("tanh", loss, "adam")
    targets = LOSSES[loss].targets(len(run.queries), seed=9)
    machine = pk.KernelMachine(run.trajectory)
    why = machine.explain((run.queries, targets), outputs="loss")
    expected = [run.loss(run.model(x[None]), t[None]).item() for x, t in zip(run.queries, targets, strict=True)]
    close(why.output, expected, DOUBLE.rounding)
    assert why.relative_residual < DOUBLE.residual
    as_arrays = machine.explain((run.queries.numpy(), targets.numpy()), outputs="loss")
    close(as_arrays.shares, why.shares, DOUBLE.rounding)


# -- how it is split, and in which pieces it is computed --------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["nesterov_decay", "adamw"])
def test_modules_and_steps_add_up_to_the_whole(optimizer: str) -> None:
    run = record("layer_norm", optimizer=optimizer)
    machine = pk.KernelMachine(run.trajectory)
    whole = machine.explain(run.queries, outputs="all")
    by_module = machine.explain(run.queries, outputs="all", by="module")
    assert list(by_module.modules) == ["0", "1", "3"]
    close(sum(by_module.modules.values()), whole.shares, DOUBLE.rounding)
    by_step = machine.explain(run.queries, outputs="all", by="step")
    assert by_step.steps is not None
    assert by_step.steps.shape == (len(whole.output), len(BATCHES))
    close(by_step.steps.sum(axis=1), whole.shares.sum(axis=1), DOUBLE.rounding)
    assert not whole.modules and whole.steps is None


def test_a_step_without_memory_is_its_own_kernel_machine() -> None:
    run = record(optimizer="sgd")
    why = pk.KernelMachine(run.trajectory, quadrature="left").explain(run.queries, outputs=0, by="step")
    for s, ids in enumerate(BATCHES):
        parameters = run.trajectory.parameters(s)
        rows = reference.sample_gradients(run.start, parameters, run.loss, run.X[list(ids)], run.y[list(ids)])
        gradients = reference.output_gradients(run.start, parameters, run.queries)[:, 0]
        close(np.asarray(why.steps)[:, s], -0.1 * gradients @ rows.sum(dim=0), DOUBLE.rounding)


def test_blocks_of_queries_make_the_whole() -> None:
    run = record("relu", optimizer="adamw")
    large = pk.KernelMachine(run.trajectory)

    def budget(quadrature: str = "auto", **asked: Any) -> int:
        return smallest_budget(
            lambda m: pk.KernelMachine(run.trajectory, quadrature=quadrature, memory=m).explain(run.queries, **asked)
        )

    for by in ("module", "step"):
        small = pk.KernelMachine(run.trajectory, memory=budget(outputs="all", by=by))
        whole, blocks = (m.explain(run.queries, outputs="all", by=by) for m in (large, small))
        close(blocks.shares, whole.shares, DOUBLE.rounding)
        close(blocks.output, whole.output, DOUBLE.rounding)
        close(blocks.quadrature_error, whole.quadrature_error, DOUBLE.shares)
        assert blocks.gradients_per_step == pytest.approx(whole.gradients_per_step)
        assert list(blocks.channels) == list(whole.channels)
        for name in whole.modules:
            close(blocks.modules[name], whole.modules[name], DOUBLE.rounding)
    outputs = large.decision_function(run.queries)
    least = smallest_budget(lambda m: pk.KernelMachine(run.trajectory, memory=m).decision_function(run.queries))
    small = pk.KernelMachine(run.trajectory, memory=least)
    close(small.decision_function(run.queries), outputs, DOUBLE.rounding)
    whole, blocks = (
        pk.KernelMachine(run.trajectory, quadrature="adaptive", memory=m).explain(run.queries[2:], outputs=0)
        for m in ("1GB", budget("adaptive", outputs=0))
    )
    close(blocks.shares, whole.shares, DOUBLE.shares)


def test_a_budget_that_holds_no_query_is_refused_before_it_begins() -> None:
    run = record("relu", optimizer="adamw")
    with pytest.raises(InputError, match=r"take 0\.\d+ MB .* the budget is 0\.001 MB.*Write `memory="):
        pk.KernelMachine(run.trajectory, memory=1000).explain(run.queries)


def test_one_query_alone_is_the_same_query_among_others() -> None:
    run = record("relu", optimizer="adam")
    machine = pk.KernelMachine(run.trajectory)
    together = machine.explain(run.queries, outputs=0)
    for q in range(len(run.queries)):
        close(machine.explain(run.queries[q : q + 1], outputs=0).shares[0], together.shares[q], DOUBLE.rounding)


@settings(max_examples=5)
@given(order=st.permutations(range(SAMPLES)))
def test_training_samples_in_another_order_have_the_same_shares(order: list[int]) -> None:
    base = record(optimizer="momentum_dampening_decay")
    place = {sample: position for position, sample in enumerate(order)}
    batches = [[place[i] for i in ids] for ids in BATCHES]
    permuted = record(
        optimizer="momentum_dampening_decay", batches=batches, data=(base.X[list(order)], base.y[list(order)])
    )
    found = pk.KernelMachine(permuted.trajectory).explain(base.queries, outputs=0)
    expected = pk.KernelMachine(base.trajectory).explain(base.queries, outputs=0)
    close(found.shares, expected.shares[:, list(order)], DOUBLE.rounding)


def test_samples_that_never_took_part_have_no_share() -> None:
    run = record(batches=((0, 1), (1, 2)))
    why = pk.KernelMachine(run.trajectory).explain(run.queries, outputs=0)
    assert (why.shares[:, 3:] == 0).all()
    assert (why.shares[:, :3] != 0).any(axis=0).all()


def test_arithmetic_in_float64_of_a_float32_run() -> None:
    run = record(optimizer="sgd", dtype=torch.float32)
    machine = pk.KernelMachine(run.trajectory, quadrature=pk.GaussLegendre(4), dtype=torch.float64)
    why = machine.explain(run.queries, outputs=0)
    # The optimizer itself rounded to float32; the account of what it did is closed to that.
    assert why.relative_residual < TOLERANCES[torch.float32].residual
    exact = copy.deepcopy(run.model).double()
    with torch.no_grad():
        close(why.output, exact(run.queries.double())[:, 0], DOUBLE.rounding)


def test_repr_names_the_run_and_the_quadrature() -> None:
    machine = pk.KernelMachine(record(optimizer="adam").trajectory, quadrature="trapezoid")
    run = "KernelMachine(Trajectory(6 steps of Adam, P = 43, N = 10, float64), quadrature=Trapezoid(), form='folded'"
    assert repr(machine).startswith(run) and "not a kernel for scikit-learn" in repr(machine)


def test_a_device_that_stands_around_the_call() -> None:
    """`torch.device("meta")`, or a default device, is for the tensors of the loop: numbers are the same."""
    torch.manual_seed(0)
    X, y, loss = torch.randn(8, 4), torch.randint(3, (8,)), torch.nn.CrossEntropyLoss()
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with torch.device("meta"), pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=1) as recorder:
        for x, target in recorder.batches(4, shuffle=True):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    expected = pk.KernelMachine(recorder.trajectory).explain(X[:2], outputs=0).shares
    with torch.device("meta"):
        machine, kernel = pk.KernelMachine(recorder.trajectory), pk.PathKernel(recorder.trajectory)
        np.testing.assert_array_equal(machine.explain(X[:2], outputs=0).shares, expected)
        assert kernel(X[:2]).shape == (2, 2) and machine.predict(X).shape == (8,)
