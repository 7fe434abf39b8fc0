"""Which samples are kept, and which labelled next: by plain arithmetic, and what that does for a network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import SAMPLES, make_inputs, make_model, record
from hypothesis import given
from hypothesis import strategies as st
from tolerances import TOLERANCES
from torch import nn

import pathkernel as pk
from pathkernel import errors, reference
from pathkernel.influence import active_learning, pruning
from pathkernel.influence.subset_selection import conditional_covariance, greedy_design, herding, normalised

DOUBLE = TOLERANCES[torch.float64]


def close(found: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=DOUBLE.rounding * max(1.0, np.abs(expected).max()))


def matrix(n: int, seed: int = 0, rank: int = 5) -> np.ndarray:
    phi = np.random.default_rng(seed).standard_normal((n, rank))
    return phi @ phi.T


# -- the greedy choices -----------------------------------------------------------------------------------------------


@given(st.integers(0, 20), st.integers(0, 9))
def test_herding_takes_what_brings_the_means_together(seed: int, count: int) -> None:
    K = matrix(9, seed)
    chosen, score = herding(K, count)
    expected: list[int] = []
    for k in range(count):
        others = [i for i in range(9) if i not in expected]
        # ⟨φ_i, mean of all − Σ of the chosen / (k + 1)⟩
        expected.append(max(others, key=lambda i: K[i].mean() - sum(K[i, j] for j in expected) / (k + 1)))
    assert chosen.tolist() == expected
    close(score, K.mean(axis=1) - K[:, chosen].sum(axis=1) / (count + 1))


@given(st.integers(0, 20), st.integers(0, 8), st.sampled_from(["total variance", "own variance"]))
def test_experimental_design_is_greedy_in_the_variances_by_plain_solves(seed: int, count: int, criterion: str) -> None:
    K, noise = matrix(8, seed), 0.3
    before = K.copy()
    chosen, variance = greedy_design(K, count, noise, criterion)
    np.testing.assert_array_equal(K, before)
    expected: list[int] = []
    for _ in range(count):
        others = [i for i in range(8) if i not in expected]
        now = reference.conditional_variances(torch.from_numpy(K), expected, noise)
        if criterion == "own variance":
            gain = {i: float(now[i]) for i in others}
        else:
            after = {
                i: reference.conditional_variances(torch.from_numpy(K), [*expected, i], noise).sum() for i in others
            }
            gain = {i: float(now.sum() - after[i]) for i in others}
        best = max(gain.values())
        place = len(expected)
        assert gain[int(chosen[place])] >= best - 1e-9 * max(1.0, K.max())  # of equals, rounding chooses
        expected.append(int(chosen[place]))
    close(variance, reference.conditional_variances(torch.from_numpy(K), expected, noise))


def test_what_is_known_already_is_conditioned_on() -> None:
    K, noise = matrix(8), 0.2
    left = conditional_covariance(K, 3, noise)
    close(left.diagonal(), reference.conditional_variances(torch.from_numpy(K), [0, 1, 2], noise)[3:])
    assert greedy_design(left, 1, noise, "own variance")[0][0] == np.argmax(left.diagonal())


def test_normalised_features_have_nearly_one_length() -> None:
    phi = np.random.default_rng(0).standard_normal((6, 4)) * np.array([[100.0], [1], [1], [1], [1], [0]])
    K = phi @ phi.T
    mean = K.diagonal().mean()
    close(normalised(K, 0.1), K / np.sqrt(np.outer(K.diagonal() + 0.1 * mean, K.diagonal() + 0.1 * mean)))
    assert (normalised(np.zeros((3, 3)), 0.1) == 0).all()


# -- a training set ---------------------------------------------------------------------------------------------------


def test_the_kept_samples_have_the_mean_gradient_of_all() -> None:
    run = record(optimizer="adamw")
    path = [run.trajectory.parameters(s) for s in range(len(run.trajectory))]
    rows = [
        torch.cat(
            [
                reference.sample_gradients(run.start, theta, run.loss, run.X[i : i + 1], run.y[i : i + 1])[0]
                for theta in path
            ]
        )
        for i in range(SAMPLES)
    ]
    g = torch.stack(rows).numpy()
    length = (g**2).sum(axis=1)
    g = g / np.sqrt(length + 10 ** (5 * 0.4 - 2) * length.mean())[:, None]
    expected: list[int] = []
    for k in range(4):
        direction = g.mean(axis=0) - g[expected].sum(axis=0) / (k + 1)
        expected.append(max((i for i in range(SAMPLES) if i not in expected), key=lambda i: g[i] @ direction))
    kept = pk.influence.prune(run.trajectory, 0.4, nodes=len(path))
    assert kept.ids.tolist() == expected
    others = [i for i in range(SAMPLES) if i not in expected]
    direction = g.mean(axis=0) - g[expected].sum(axis=0) / 5
    assert kept.left_out.tolist() == sorted(others, key=lambda i: g[i] @ direction)
    assert kept.weights.tolist() == [float(i in expected) for i in range(SAMPLES)]
    assert repr(kept) == "Coreset(4 of 10 training samples, by 'gradient_herding')"
    np.testing.assert_array_equal(pk.influence.prune(run.trajectory, 4, nodes=len(path)).ids, kept.ids)


@pytest.mark.parametrize("criterion", pruning.SCORES)
def test_scores_of_single_samples_keep_the_hardest(criterion: str) -> None:
    run = record()
    kept, quality = (
        pk.influence.prune(run.trajectory, 3, criterion=criterion),
        pk.label_quality(run.trajectory, nodes=10),
    )
    order = np.argsort(-quality.doubts[criterion], kind="stable")
    assert kept.ids.tolist() == order[:3].tolist()
    assert kept.left_out.tolist() == order[:2:-1].tolist()


def test_parts_are_pruned_alone_and_in_proportion() -> None:
    run = record()
    kept = pk.influence.prune(run.trajectory, 5, block=4)
    parts = pruning._parts(SAMPLES, 4, 0)
    assert [len(part) for part in parts] == [4, 3, 3] and sorted(np.concatenate(parts)) == list(range(SAMPLES))
    assert [len(set(part) & set(kept.ids)) for part in parts] == [2, 1, 2]
    assert sorted([*kept.ids, *kept.left_out]) == list(range(SAMPLES))
    kernel = pk.PathKernel(run.trajectory, outputs="loss", measure="uniform", quadrature="left", steps=10, leak="allow")
    K = normalised(kernel(run.trajectory.data[torch.from_numpy(parts[0])]), pruning.floor(0.5))
    assert set(parts[0][herding(K, 2)[0]]) <= set(kept.ids)


def test_matrices_are_kept_in_a_store(tmp_path: Any) -> None:
    run = record()
    plain = pk.influence.prune(run.trajectory, 5, block=5)
    for _ in range(2):
        again = pk.influence.prune(run.trajectory, 5, block=5, store=tmp_path / "kernel")
        assert again.ids.tolist() == plain.ids.tolist()
    assert {path.name for path in (tmp_path / "kernel").iterdir()} == {"part-0", "part-1"}


# -- candidates without labels ----------------------------------------------------------------------------------------


def test_design_by_plain_arithmetic() -> None:
    run, nodes = record(optimizer="momentum"), 6
    X = make_inputs(7, seed=5)
    found = pk.influence.label_next(run.trajectory, X, 3, nodes=nodes)
    labels = run.model(X).argmax(dim=1)
    np.testing.assert_array_equal(found.predictions, labels)
    inputs, targets = torch.cat([run.X, X]), torch.cat([run.y, labels])
    K = torch.zeros(SAMPLES + 7, SAMPLES + 7, dtype=torch.float64)
    for s in range(nodes):
        theta = run.trajectory.parameters(s)
        g = torch.cat(
            [
                reference.sample_gradients(run.start, theta, run.loss, inputs[i : i + 1], targets[i : i + 1])
                for i in range(len(inputs))
            ]
        )
        K += g @ g.T
    close(found.score, K.diagonal()[SAMPLES:])
    known, mu = list(range(SAMPLES)), 0.01 * float(K.diagonal().mean())
    for place in found.ids:
        left = {
            i: float(reference.conditional_variances(K, [*known, i], mu)[SAMPLES:].sum())
            for i in range(SAMPLES, SAMPLES + 7)
            if i not in known
        }
        assert min(left, key=lambda i: left[i]) == SAMPLES + place
        known.append(SAMPLES + int(place))


def test_uncertainty_of_single_candidates() -> None:
    run, X = record(), make_inputs(7, seed=5)
    p = run.model(X).detach().softmax(dim=1)
    largest = p.sort(dim=1, descending=True).values
    margin = pk.influence.label_next(run.trajectory, X, 3, criterion="margin")
    close(margin.score, largest[:, 1] - largest[:, 0])
    assert margin.ids.tolist() == (largest[:, 0] - largest[:, 1]).argsort()[:3].tolist()
    entropy = pk.influence.label_next(run.trajectory, X, 7, criterion="entropy")
    close(entropy.score, -(p * p.log()).sum(dim=1))
    assert entropy.ids.tolist() == entropy.score.argsort()[::-1].tolist()
    assert repr(margin).startswith("Acquisition(3 of 7 candidates, by 'margin': ")


def test_variance_is_that_of_a_gaussian_process_and_needs_no_classes() -> None:
    run, n = record(loss="mse_mean"), 14
    X = make_inputs(n, seed=5)
    found = pk.influence.label_next(run.trajectory, X, 5, nodes=6)
    assert found.criterion == "variance"
    close(found.predictions, run.model(X).detach())
    kernel = pk.PathKernel(run.trajectory, measure="uniform", quadrature="left", leak="allow")
    K = torch.from_numpy(kernel(torch.cat([run.X, X])))
    known, mu = list(range(SAMPLES)), 0.1 * float(K.diagonal().mean())
    for place in found.ids:
        left = reference.conditional_variances(K, known, mu)
        assert place == max((i for i in range(n) if SAMPLES + i not in known), key=lambda i: left[SAMPLES + i])
        known.append(SAMPLES + int(place))


def test_few_are_looked_at_where_there_are_many() -> None:
    run, X = record(), make_inputs(7, seed=5)
    found = pk.influence.label_next(run.trajectory, X, 2, block=3)
    assert set(found.ids) <= set(np.argsort(-found.score)[:3])
    assert sorted(pk.influence.label_next(run.trajectory, X, 7, block=3).ids) == list(range(7))


def test_a_batch_is_not_all_of_one_kind() -> None:
    """Candidates that come five times: margins take copies of one alone, the design takes others."""
    run = record()
    X = make_inputs(4, seed=5).repeat(5, 1)
    kinds = {
        criterion: len({int(i) % 4 for i in pk.influence.label_next(run.trajectory, X, 4, criterion=criterion).ids})
        for criterion in ("margin", "experimental_design")
    }
    assert kinds["margin"] == 1 and kinds["experimental_design"] >= 3


def test_one_output_and_targets_of_another_form() -> None:
    run = record(loss="bce")
    found = pk.influence.label_next(run.trajectory, run.queries, 2)
    np.testing.assert_array_equal(found.predictions, (run.model(run.queries)[:, 0] > 0).long())
    model, targets = make_model(), torch.full((6, 3), 1 / 3, dtype=torch.float64)
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(make_inputs(6), targets)) as recorder:
        for x, target in recorder.batches(3):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    with pytest.raises(errors.InputError, match=r"the shape \(3,\).*of one class.*`criterion=\"variance\"`"):
        pk.influence.label_next(recorder.trajectory, run.queries, 2)
    assert len(pk.influence.label_next(recorder.trajectory, run.queries, 2, criterion="variance")) == 2


REFUSED = {
    "no part": (lambda run: pruning.prune(run.trajectory, 0), r"`keep=0` was given for 10.*from 1 to 10.*`keep=0.5`"),
    "more than all": (lambda run: pruning.prune(run.trajectory, 11), "`keep=11` was given for 10 training samples"),
    "a truth value": (lambda run: pruning.prune(run.trajectory, True), "`keep=True` was given"),
    "a truth value of torch": (lambda run: pruning.prune(run.trajectory, torch.tensor(True)), r"`keep=tensor\(True\)`"),
    "a truth value of numpy": (
        lambda run: pruning.prune(run.trajectory, nodes=np.array(True)),
        r"`nodes=array\(True\)`",
    ),
    "not a number": (lambda run: pruning.prune(run.trajectory, float("nan")), "`keep=nan` was given"),
    "another criterion": (
        lambda run: pruning.prune(run.trajectory, criterion="random"),
        "'random'.*Criteria are 'gradient_herding'",
    ),
    "no samples at once": (lambda run: pruning.prune(run.trajectory, block=0), "`block=0`.*greater than 0"),
    "another way to choose": (
        lambda run: active_learning.label_next(run.trajectory, run.queries, 2, criterion="badge"),
        "'badge'.*Criteria are 'experimental_design'",
    ),
    "none": (lambda run: active_learning.label_next(run.trajectory, run.queries, 0), "`count=0`.*greater than 0"),
    "more than there are": (
        lambda run: active_learning.label_next(run.trajectory, run.queries, 5),
        "`count=5` was given for 4 candidates.*`count=4`",
    ),
    "no candidates": (
        lambda run: active_learning.label_next(run.trajectory, run.queries[:0], 1),
        "for 0 candidates.*Pass the samples",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    call, match = REFUSED[name]
    with pytest.raises(errors.InputError, match=match):
        call(record())


def test_margins_of_a_regression() -> None:
    run = record(loss="mse_mean")
    with pytest.raises(errors.InputError, match=r"targets are no classes.*`criterion=\"variance\"`"):
        pk.influence.label_next(run.trajectory, run.queries, 2, criterion="margin")
