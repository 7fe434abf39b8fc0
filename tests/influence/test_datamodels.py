"""Datamodels: the formula in dense arithmetic, every solver, and what it is for, networks that are trained again."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import SAMPLES, Recording, record
from tolerances import TOLERANCES
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import errors, reference
from pathkernel.influence import datamodels as module

DOUBLE = TOLERANCES[torch.float64]
LABELS = torch.tensor([1, 0, 2, 1])
LEFT = {"quadrature": "left", "measure": "uniform"}


@pytest.fixture(scope="module")
def run() -> Recording:
    return record(optimizer="adam")


def close(found: Any, expected: Any, tolerance: float = DOUBLE.rounding) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1e-3, np.abs(expected).max()))


def margins(labels: Tensor) -> list[Any]:
    return [lambda z, y=y: reference.margin(z, y) for y in labels.tolist()]


def outputs_at(run: Recording, s: int, X: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.func.functional_call(run.start, run.trajectory.parameters(s), (X,))


def test_margins_by_the_formula(run: Recording) -> None:
    kernel = pk.PathKernel(run.trajectory, outputs="margin", **LEFT)
    found = pk.datamodel(kernel, run.X, run.y, (run.queries, LABELS))
    ridge = pk.datamodel(kernel, run.X, run.y, (run.queries, LABELS), regularization="mean_diagonal")
    path = range(len(run.trajectory))
    K, K_query, r, h = 0.0, 0.0, 0.0, 0.0
    for s in path:
        theta = run.trajectory.parameters(s)
        G = reference.value_gradients(run.start, theta, run.X, margins(run.y))
        G_query = reference.value_gradients(run.start, theta, run.queries, margins(LABELS))
        K, K_query = K + G @ G.T, K_query + G_query @ G.T
        p = outputs_at(run, s, run.X).softmax(1)[torch.arange(SAMPLES), run.y]
        r, h = r + (1 - p) / len(path), h + p * (1 - p) / len(path)
    identity = torch.eye(SAMPLES, dtype=torch.float64)
    mean = K.diagonal().mean()
    close(ridge.scores, K_query @ torch.linalg.inv(K + mean * identity) * r)
    close(ridge.residuals, r)
    close(ridge.regularization, mean)
    # λ times what training did to the margins is K r, by least squares.
    start, end = (
        torch.stack([m(z) for m, z in zip(margins(run.y), outputs_at(run, s, run.X), strict=True)]) for s in (0, -1)
    )
    time = torch.linalg.lstsq((end - start)[:, None], (K @ r)[:, None]).solution[0, 0]
    assert found.rule == "training_time"
    close(found.regularization, time)
    close(found.scores, K_query @ torch.linalg.inv(h[:, None] * K + time * identity) * r)
    z = run.model(run.queries).detach()
    close(found.output, torch.stack([m(one) for m, one in zip(margins(LABELS), z, strict=True)]))


@pytest.mark.parametrize(
    ("loss", "of_class"),
    [
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)), [1.0, 4.0, 0.5]),
        (nn.CrossEntropyLoss(), [1.0, 1.0, 1.0]),
        (nn.CrossEntropyLoss(label_smoothing=0.2), [1.0, 1.0, 1.0]),  # no function of the margin
    ],
)
def test_class_weights_of_the_loss_weight_the_residuals(loss: nn.Module, of_class: list[float]) -> None:
    start = record(optimizer="adam")
    model, X, y = copy.deepcopy(start.start), start.X, start.y
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for _ in range(3):
            for x, target in recorder.batches(batch_size=4, shuffle=False):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    run = replace(start, trajectory=recorder.trajectory, model=model)
    kernel = pk.PathKernel(run.trajectory, outputs="margin", **LEFT)
    found = pk.datamodel(kernel, run.X, run.y, (run.queries, LABELS), regularization=0.3)
    w = torch.tensor(of_class, dtype=torch.float64)[run.y]
    w, path = w / w.mean(), range(len(run.trajectory))
    K, K_query, r = 0.0, 0.0, 0.0
    for s in path:
        theta = run.trajectory.parameters(s)
        G = reference.value_gradients(run.start, theta, run.X, margins(run.y))
        K_query = K_query + reference.value_gradients(run.start, theta, run.queries, margins(LABELS)) @ G.T
        K = K + G @ G.T
        r = r + w * (1 - outputs_at(run, s, run.X).softmax(1)[torch.arange(SAMPLES), run.y]) / len(path)
    close(found.residuals, r)
    close(found.scores, K_query @ torch.linalg.inv(K + 0.3 * torch.eye(SAMPLES, dtype=torch.float64)) * r)


def test_the_path_begins_before_the_first_point_of_a_kernel() -> None:
    """Statistics of BatchNorm at the first step, also where the kernel's first point lies later."""
    generator = torch.Generator().manual_seed(0)
    X, y = 5 + 3 * torch.randn(24, 4, generator=generator, dtype=torch.float64), torch.arange(24) % 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, nn.CrossEntropyLoss(), data=(X, y)) as recorder:
        for x, target in recorder.batches(batch_size=4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    trajectory = recorder.trajectory
    kernel = pk.PathKernel(trajectory, outputs="margin", measure="uniform", steps=1)
    first = next(iter(trajectory.steps()))
    assert not torch.equal(first.buffers["0.running_mean"], kernel.nodes[0].buffers["0.running_mean"])

    def margins_with(state: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            z = torch.func.functional_call(model.eval(), state, (X,))
        return torch.stack([m(one) for m, one in zip(margins(y), z, strict=True)])

    start = margins_with({**trajectory.parameters(0), **first.buffers})
    end = margins_with({**trajectory.parameters(-1), **trajectory.final_buffers})
    found = pk.datamodel(kernel, X, y, (X[:2], y[:2]))
    pushed, moved = torch.as_tensor(kernel((X, y))) @ torch.as_tensor(found.residuals), end - start
    assert found.rule == "training_time"
    close(found.regularization, pushed @ moved / (moved @ moved))


@pytest.mark.parametrize("outputs", ["trace", 1])
def test_outputs_by_the_formula(outputs: Any, run: Recording) -> None:
    kernel = pk.PathKernel(run.trajectory, outputs=outputs, **LEFT)
    found = pk.datamodel(kernel, run.X, run.y, run.queries, outputs=1)
    K, K_query = (torch.as_tensor(kernel(X, run.X)) for X in (run.X, run.queries))
    path = range(len(run.trajectory))
    one_hot = nn.functional.one_hot(run.y, 3)
    R = sum(one_hot - outputs_at(run, s, run.X).softmax(1) for s in path) / len(path)
    A = K_query @ torch.linalg.inv(K + K.diagonal().mean() * torch.eye(SAMPLES, dtype=torch.float64))
    close(found.residuals, R)
    close(found.scores, A * R[:, 1])
    # The predicted class where nothing is asked, and classes of their own.
    predicted = run.model(run.queries).argmax(1)
    if outputs == "trace":
        close(pk.datamodel(kernel, run.X, run.y, run.queries).scores, A * R.T[predicted])
        close(pk.datamodel(kernel, run.X, run.y, run.queries, outputs=LABELS).scores, A * R.T[LABELS])


def test_a_regression() -> None:
    run = record(loss="mse_mean")
    found = pk.datamodel(pk.PathKernel(run.trajectory, **LEFT), run.X, run.y, run.queries, outputs=-1)
    path = range(len(run.trajectory))
    close(found.residuals, sum(run.y - outputs_at(run, s, run.X) for s in path) / len(path))
    close(found.output, run.model(run.queries)[:, 1].detach())


def test_the_kernel_at_the_end_alone(run: Recording) -> None:
    asked = pk.TangentKernel(run.model, outputs="margin"), run.X, run.y, (run.queries, LABELS)
    found = pk.datamodel(*asked)
    G = reference.value_gradients(run.model, dict(run.model.named_parameters()), run.X, margins(run.y))
    assert found.rule == "mean_diagonal" and found.regularizations["training_time"] is None
    close(found.regularization, (G**2).sum(1).mean())
    assert found.scores.shape == (4, SAMPLES)
    close(pk.datamodel(*asked, solver="features", dim=8192).scores, found.scores, 0.1)  # 1/√dim


@pytest.mark.parametrize("rule", ["training_time", "mean_diagonal"])
def test_solvers_agree(rule: str, run: Recording) -> None:
    kernel = pk.PathKernel(run.trajectory, outputs="margin", **LEFT)
    asked = kernel, run.X, run.y, (run.queries, LABELS)
    by_gram = pk.datamodel(*asked, solver="gram", regularization=rule)
    close(pk.datamodel(*asked, solver="conjugate_gradients", regularization=rule).scores, by_gram.scores, 1e-6)
    assert pk.datamodel(*asked, memory=1000).solver == "conjugate_gradients"
    by_features = pk.datamodel(*asked, solver="features", dim=2048, regularization=rule)
    close(by_features.scores, by_gram.scores, 0.2)  # 1/√dim, on kernels of a few samples
    assert by_features.regularization == pytest.approx(by_gram.regularization, rel=0.1)


@pytest.mark.parametrize("solver", ["gram", "features"])
def test_generalized_cross_validation(solver: str, run: Recording) -> None:
    kernel = pk.PathKernel(run.trajectory, outputs="margin", **LEFT)
    rule = "generalized_cross_validation"
    found = pk.datamodel(kernel, run.X, run.y, (run.queries, LABELS), solver=solver, dim=512, regularization=rule)
    K, identity = kernel((run.X, run.y)), np.eye(SAMPLES)
    if solver == "features":
        phi = kernel.features((run.X, run.y), 512)
        K = np.asarray(phi @ phi.T)
    ridges = K.diagonal().mean() * 10 ** np.arange(-4, 3.1, 0.125)
    left = [identity - K @ np.linalg.inv(K + ridge * identity) for ridge in ridges]
    errors_of = [((own @ found.residuals) ** 2).sum() / np.trace(own) ** 2 for own in left]
    expected = ridges[int(np.argmin(errors_of))]
    assert found.regularization == found.regularizations[rule] == pytest.approx(expected)
    close(found.regularizations["mean_diagonal"], K.diagonal().mean())


def test_leaving_out_groups(run: Recording) -> None:
    kernel = pk.PathKernel(run.trajectory, outputs="margin", **LEFT)
    found = pk.datamodel(kernel, run.X, run.y, (run.queries, LABELS))
    close(found.without([2, 5]), found.output - found.scores[:, 2] - found.scores[:, 5])
    close(found.without([]), found.output)
    together = found.without([[2, 5], torch.tensor([1])])
    close(together, np.stack([found.without([2, 5]), found.without(np.array([1]))]))
    assert found.to_frame()["score"].tolist() == found.scores.ravel().tolist()
    assert found.top(2).proponents[0, 0] == found.scores[0].argmax()
    assert "4 queries × 10 training samples" in repr(found) and "gram" in repr(found)


def test_it_predicts_networks_that_are_trained_again() -> None:
    """A linear network on two clusters: without half of the samples, the margins of queries move as predicted."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    y = (X @ torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64) > 0).long()
    queries = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    labels = (queries[:, 0] > queries[:, 1]).long()

    def trained(ids: Tensor, recorder: Any = None) -> nn.Module:
        model = nn.Linear(3, 2).double()
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        if recorder is None:
            for _ in range(60):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(X[ids]), y[ids]).backward()
                optimizer.step()
            return model
        with pk.KernelRecorder(model, optimizer, nn.CrossEntropyLoss(), data=(X, y)) as watching:
            for _ in range(60):
                x, target = watching.announce(ids)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), target).backward()
                optimizer.step()
        recorder.append(watching.trajectory)
        return model

    def margin(model: nn.Module) -> Tensor:
        z = model(queries).detach()
        own = z[torch.arange(8), labels]
        return own - z[torch.arange(8), 1 - labels]

    paths: list[Any] = []
    trained(torch.arange(40), paths)
    kernel = pk.PathKernel(paths[0], outputs="margin", measure="uniform", steps=15)
    model = pk.datamodel(kernel, X, y, (queries, labels))
    groups = [torch.randperm(40, generator=generator)[:20] for _ in range(24)]
    predicted = model.without(groups)
    kept = [torch.ones(40, dtype=torch.bool).index_fill(0, group, False).nonzero()[:, 0] for group in groups]
    truth = np.stack([margin(trained(ids)) for ids in kept])
    correlations = [np.corrcoef(predicted[:, q], truth[:, q])[0, 1] for q in range(8)]
    assert np.mean(correlations) > 0.8


def asked(run: Recording, outputs: Any = "margin", X_query: Any = None, **options: Any) -> Any:
    kernel = pk.PathKernel(run.trajectory, outputs=outputs, **LEFT)
    X_query = (run.queries, LABELS) if X_query is None else X_query
    return pk.datamodel(kernel, run.X, run.y, X_query, **options)


REFUSED = {
    "another rule": (lambda run: asked(run, regularization="best"), "'best'.*'mean_diagonal'"),
    "no regularization": (lambda run: asked(run, regularization=0.0), "`regularization=0.0`.*a number above 0"),
    "another solver": (lambda run: asked(run, solver="lu"), "`solver='lu'`.*'conjugate_gradients'"),
    "a kernel of losses": (lambda run: asked(run, "loss"), "PathKernel of 'loss'.*outputs=\"margin\""),
    "outputs at one point": (
        lambda run: pk.datamodel(pk.TangentKernel(run.model), run.X, run.y, run.queries),
        "a TangentKernel of 'trace'.*along a path in outputs",
    ),
    "an output that there is none of": (
        lambda run: pk.datamodel(pk.PathKernel(run.trajectory), run.X, run.y, run.queries, outputs=3),
        "`outputs=3` was given for 4 queries of a network with 3 outputs",
    ),
    "another output than the kernel's": (
        lambda run: pk.datamodel(pk.PathKernel(run.trajectory, outputs=1), run.X, run.y, run.queries, outputs=0),
        "a kernel of 'output 1'",
    ),
    "an output by a word": (
        lambda run: pk.datamodel(pk.PathKernel(run.trajectory), run.X, run.y, run.queries, outputs="all"),
        "`outputs='all'` was given",
    ),
    "the output of a margin": (
        lambda run: pk.datamodel(
            pk.PathKernel(run.trajectory, outputs="margin"), run.X, run.y, (run.queries, LABELS), outputs=0
        ),
        "`outputs=0` was given with a kernel of margins",
    ),
    "queries without labels": (lambda run: asked(run, X_query=run.queries), "kernel of margins was given a Tensor"),
    "cross-validation of products": (
        lambda run: asked(run, solver="conjugate_gradients", regularization="generalized_cross_validation"),
        "needs the eigenvalues of K",
    ),
    "a kernel that is zero": (lambda run: module._chosen("mean_diagonal", 0.0, None, None), "The kernel is zero"),
    "the time of no path": (
        lambda run: pk.datamodel(
            pk.TangentKernel(run.model, outputs="margin"),
            *(run.X, run.y, (run.queries, LABELS)),
            regularization="training_time",
        ),
        "no time of training is known.*along a path",
    ),
    "an id that there is none of": (lambda run: asked(run).without([0, 10]), "integers from 0 to 9"),
    "an id twice": (lambda run: asked(run).without([1, 1]), "different sample ids"),
    "ids beside groups": (lambda run: asked(run).without([[1], 2]), "different sample ids"),
    "half a rank": (lambda run: asked(run).top(1.5), r"`top\(1.5\)` was asked"),
    "ids that are no integers": (lambda run: asked(run).without([0.5]), "different sample ids"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, run: Recording) -> None:
    call, said = REFUSED[name]
    with pytest.raises(errors.InputError, match=said):
        call(run)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # scipy divides by what is left
def test_conjugate_gradients_that_do_not_converge(run: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESIDUAL", 0.0)
    kernel = pk.PathKernel(run.trajectory, outputs="margin", steps=1, **LEFT)
    with pytest.raises(errors.PathKernelError, match=r"did not come to .*condition number.*larger `regularization`"):
        pk.datamodel(kernel, run.X, run.y, (run.queries[:1], LABELS[:1]), solver="conjugate_gradients")
