"""Four ways of writing one sum, and the chord: all of them are the network."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from cases import BATCHES, QUERIES, SAMPLES, Recording, generator, make_inputs, make_model, record, smallest_budget
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import errors, reference
from pathkernel.kernel_machine.forms import AverageForm, ConstantForm, EnsembleForm

WITH_FACTORS = {"average": AverageForm, "ensemble": EnsembleForm, "constant": ConstantForm}
FORMS = ["folded", *WITH_FACTORS, "chord"]
RUNS = {
    "momentum": {"optimizer": "momentum"},
    "adamw": {"optimizer": "adamw", "model": "relu"},
    "adam_bce": {"optimizer": "adam", "loss": "bce"},
}


@functools.cache
def trained(name: str) -> Recording:
    return record(**RUNS[name])


def explain(run: Recording, form: str, **options) -> pk.Attributions:
    return pk.KernelMachine(run.trajectory, form=form, **options).explain(run.queries, outputs=0)


# -- every form is the network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RUNS)
def test_every_form_is_the_network(name: str, form: str) -> None:
    run = trained(name)
    machine = pk.KernelMachine(run.trajectory, form=form)
    with torch.no_grad():
        live = run.model(run.queries).numpy()
    np.testing.assert_allclose(machine.decision_function(run.queries).reshape(live.shape), live, rtol=0, atol=1e-12)
    why = machine.explain(run.queries, outputs=0)
    assert why.relative_residual <= 1e-10
    np.testing.assert_allclose(why.reconstruction, live[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", WITH_FACTORS)
@pytest.mark.parametrize("name", RUNS)
def test_the_factors_of_a_form_multiply_to_the_shares(name: str, form: str) -> None:
    run = trained(name)
    why, folded = explain(run, form), explain(run, "folded")
    assert isinstance(why.form, WITH_FACTORS[form])
    np.testing.assert_array_equal(why.shares, folded.shares)
    np.testing.assert_allclose(why.form.shares, why.shares, rtol=0, atol=1e-9)
    channels = sum(why.channels.values())
    np.testing.assert_allclose(why.form.shares.sum(axis=1) + channels, why.output, rtol=0, atol=1e-9)


def trajectory_of(model: nn.Module, optimizer: torch.optim.Optimizer, clipped: float | None = None) -> pk.Trajectory:
    """Train a classifier of three classes, on record."""
    loss = nn.CrossEntropyLoss()
    X, y = make_inputs(SAMPLES), torch.randint(3, (SAMPLES,), generator=generator(2))
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for ids in BATCHES:
            x, target = recorder.batch(list(ids))
            optimizer.zero_grad()
            loss(model(x), target).backward()
            if clipped is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clipped)
            optimizer.step()
    return recorder.trajectory


class Stopped(nn.Module):
    """Takes a part of the mean away, which is a constant to the training."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean = x.mean(dim=1, keepdim=True)
        return x - 0.7 * mean


@pytest.mark.parametrize("middle", [[], [nn.BatchNorm1d(6)]], ids=["", "batch_norm"])
def test_factors_of_a_network_that_stops_gradients_multiply_to_the_shares(middle: list[nn.Module]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), *middle, Stopped(), nn.Tanh(), nn.Linear(6, 3)).double()
    trajectory = trajectory_of(model, torch.optim.SGD(model.parameters(), lr=0.1))
    why = pk.KernelMachine(trajectory, form="average").explain(make_inputs(QUERIES, seed=3), outputs=0)
    np.testing.assert_allclose(why.form.shares, why.shares, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["folded", "chord"])
def test_forms_without_factors_have_none(form: str) -> None:
    assert explain(record(), form).form is None


@pytest.mark.parametrize("middle", [nn.BatchNorm1d(6), nn.Dropout(0.3)], ids=["batch_norm", "dropout"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_with_layers_that_have_a_state(form: str, middle: nn.Module) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6, bias=False), middle, nn.Tanh(), nn.Linear(6, 3)).double().train()
        trajectory = trajectory_of(model, torch.optim.Adam(model.parameters(), lr=0.02), clipped=0.5)
    model.eval()
    machine, queries = pk.KernelMachine(trajectory, form=form), make_inputs(QUERIES, seed=3)
    why = machine.explain(queries, outputs=1)
    assert why.relative_residual <= 1e-10
    np.testing.assert_allclose(machine.decision_function(queries), model(queries).detach(), rtol=0, atol=1e-12)
    if form in WITH_FACTORS:
        np.testing.assert_allclose(why.form.shares, why.shares, rtol=0, atol=1e-9)


# -- what each form promises ------------------------------------------------------------------------------------------


def slopes(run: Recording, s: int) -> np.ndarray:
    """∂L/∂z of the batch of step s, (B, C), by plain autograd."""
    ids = list(BATCHES[s])
    twin = make_model("tanh", 3)
    twin.load_state_dict(run.trajectory.parameters(s))
    z = twin(run.X[ids])
    return torch.autograd.grad(run.loss(z, run.y[ids]), z)[0].numpy()


def test_the_ensemble_has_one_machine_for_each_step_whose_coefficients_are_the_slopes() -> None:
    run = record(optimizer="sgd")
    form = explain(run, "ensemble").form
    assert [member.step for member in form.members] == list(range(len(BATCHES)))
    for s, member in enumerate(form.members):
        assert member.ids.tolist() == list(BATCHES[s])
        np.testing.assert_allclose(member.coefficients, -slopes(run, s), rtol=0, atol=1e-14)
        # Under plain gradient descent its kernel is η ⟨averaged query gradient, gradient of the sample's output⟩.
        start, end = run.trajectory.parameters(s), run.trajectory.parameters(s + 1)
        jacobians = reference.output_gradients(run.model, start, run.X[list(BATCHES[s])])
        for q, x in enumerate(run.queries):
            average = reference.discrete_gradient(run.model, start, end, x, 0)
            np.testing.assert_allclose(member.kernel[q], 0.1 * jacobians @ average, rtol=0, atol=1e-14)


def test_coefficients_of_the_ensemble_and_the_constant_form_do_not_depend_on_the_query() -> None:
    run = record(optimizer="nesterov")
    for form in ("ensemble", "constant"):
        machine = pk.KernelMachine(run.trajectory, form=form)
        one = machine.explain(run.queries[:2], outputs=0).form
        other = machine.explain(run.queries[2:], outputs=2).form
        if form == "constant":
            np.testing.assert_array_equal(one.coefficients, other.coefficients)
            continue
        for left, right in zip(one.members, other.members, strict=True):
            np.testing.assert_array_equal(left.coefficients, right.coefficients)
    average = pk.KernelMachine(run.trajectory, form="average")
    one, other = (average.explain(run.queries[[i]], outputs=0).form.coefficients for i in (0, 1))
    assert np.abs(one - other).max() > 1e-3


def test_the_average_is_the_mean_slope_with_the_kernel_as_weight() -> None:
    run = record(optimizer="sgd")
    average, ensemble = explain(run, "average").form, explain(run, "ensemble").form
    numerator, denominator = (np.zeros((QUERIES, SAMPLES, 3)) for _ in range(2))
    for member in ensemble.members:
        for b, i in enumerate(member.ids):
            numerator[:, i] += member.coefficients[b] * member.kernel[:, b]
            denominator[:, i] += member.kernel[:, b]
    np.testing.assert_allclose(average.numerator, numerator, rtol=0, atol=1e-13)
    np.testing.assert_allclose(average.denominator, denominator, rtol=0, atol=1e-13)
    np.testing.assert_allclose(average.coefficients, numerator / denominator, rtol=1e-9)


def test_the_average_is_finite_where_the_kernel_is_zero() -> None:
    # Samples that never took part have neither numerator nor denominator.
    run = record(optimizer="sgd", batches=((0, 1, 2), (1, 3)))
    form = explain(run, "average").form
    assert (form.denominator[:, 4:] == 0).all() and (form.coefficients[:, 4:] == 0).all()
    assert np.isfinite(form.coefficients).all() and np.isfinite(form.shares).all()
    # A denominator that cancels does not make the shares infinite: they are read from the numerator.
    cancelled = AverageForm(np.ones((1, 1, 2)), np.array([[[0.0, 2.0]]]))
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(cancelled.coefficients, [[[0.0, 0.5]]])
    np.testing.assert_array_equal(cancelled.shares, [[2.0]])


def test_the_constant_form_has_the_sign_of_cross_entropy() -> None:
    # p − y is negative for a sample's own class and positive for the others.
    run = record(optimizer="adam")
    form = explain(run, "constant").form
    own = np.eye(3)[run.y.numpy()]
    np.testing.assert_array_equal(form.coefficients, 2 * own - 1)
    total = np.zeros_like(form.kernel)
    for member in explain(run, "ensemble").form.members:
        np.add.at(total, (slice(None), member.ids), np.abs(member.coefficients) * member.kernel)
    np.testing.assert_allclose(form.kernel, total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", ["mse_mean", "mse_sum"])
def test_the_constant_form_refuses_a_slope_that_changes_its_sign(loss: str) -> None:
    batches = [(0, 1, 2)] * 12
    run = record(optimizer="momentum", loss=loss, batches=batches)
    with pytest.raises(errors.InputError) as caught:
        explain(run, "constant")
    error = caught.value
    assert error.found.startswith("The slope of the loss of sample ") and " changed its sign by step " in error.found
    assert '`form="constant"` needs losses whose slope in each output keeps its sign' in error.expected
    assert error.write == 'Write `form="average"` or `form="folded"`'
    for form in ("average", "folded"):
        assert explain(run, form).relative_residual <= 1e-10


def test_the_chord_is_the_average_gradient_on_the_straight_line() -> None:
    run = record(optimizer="sgd")
    trajectory = run.trajectory
    start, end = trajectory.parameters(0), trajectory.parameters(-1)
    expected = np.zeros((QUERIES, SAMPLES))
    averages = [
        reference.average_gradient(run.model, start, end, x, 0, reference.gauss_legendre(12)) for x in run.queries
    ]
    for s, ids in enumerate(BATCHES):
        x, y = run.X[list(ids)], run.y[list(ids)]
        rows = reference.sample_gradients(run.model, trajectory.parameters(s), run.loss, x, y)
        for q, average in enumerate(averages):
            np.add.at(expected[q], list(ids), (-0.1 * rows @ average).numpy())
    gauss = explain(run, "chord", quadrature=pk.GaussLegendre(4))
    np.testing.assert_allclose(gauss.shares, expected, rtol=0, atol=1e-13)
    discrete = explain(run, "chord")
    np.testing.assert_allclose(discrete.shares, expected, rtol=0, atol=1e-6)
    path = explain(run, "folded")
    assert 0 < np.abs(path.shares - expected).max() < 0.05 * np.abs(expected).max()


# -- how they are asked for -------------------------------------------------------------------------------------------


def test_repr_says_what_a_form_needs() -> None:
    run = record()
    properties = {
        "folded": "the loss derivative inside the kernel",
        "average": "they depend on the query and are ill-conditioned where K is small",
        "ensemble": "coefficients do not depend on the query",
        "constant": "needs losses whose slope keeps its sign",
        "chord": "gradients along the straight line from start to end",
    }
    for form, words in properties.items():
        text = repr(pk.KernelMachine(run.trajectory, form=form))
        assert f"form='{form}'" in text and words in text and "not symmetric" in text


def test_a_form_that_is_none_is_refused() -> None:
    with pytest.raises(errors.InputError) as caught:
        pk.KernelMachine(record().trajectory, form="dual")
    assert caught.value.found == "`form='dual'` was given"
    assert caught.value.expected == "Forms are 'folded', 'average', 'ensemble', 'constant', 'chord'"
    assert caught.value.write == 'Write `form="folded"`'


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_queries_make_the_whole(form: str) -> None:
    run = record(optimizer="adamw")
    least = smallest_budget(lambda memory: explain(run, form, memory=memory))
    whole, blocks = explain(run, form), explain(run, form, memory=least)
    np.testing.assert_allclose(blocks.shares, whole.shares, rtol=0, atol=1e-14)
    for name, value in whole.channels.items():
        np.testing.assert_allclose(blocks.channels[name], value, rtol=0, atol=1e-14)
    if form in WITH_FACTORS:
        np.testing.assert_allclose(blocks.form.shares, whole.form.shares, rtol=0, atol=1e-13)
    if form == "average":
        np.testing.assert_allclose(blocks.form.denominator, whole.form.denominator, rtol=0, atol=1e-13)
    if form == "constant":
        np.testing.assert_array_equal(blocks.form.coefficients, whole.form.coefficients)
    if form == "ensemble":
        for left, right in zip(blocks.form.members, whole.form.members, strict=True):
            assert left.step == right.step and left.kernel.shape == right.kernel.shape
            np.testing.assert_allclose(left.kernel, right.kernel, rtol=0, atol=1e-13)
