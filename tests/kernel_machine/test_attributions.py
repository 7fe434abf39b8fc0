"""The result object: an account that adds up, rankings, sums by class, a table."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pathkernel.kernel_machine.attributions import Attributions

QUERIES, SAMPLES = 3, 8


def attributions(seed: int = 0, left_over: float = 0.0, split_error: float = float("nan")) -> Attributions:
    generator = np.random.default_rng(seed)
    shares = generator.normal(size=(QUERIES, SAMPLES))
    channels = {name: generator.normal(size=QUERIES) for name in ("initial", "weight_decay")}
    return Attributions(
        shares=shares,
        channels=channels,
        output=shares.sum(axis=1) + channels["initial"] + channels["weight_decay"] + left_over,
        query_index=np.arange(QUERIES),
        output_index=np.array([2, 0, -1]),
        quadrature_error=np.array([1e-3, 1e-2, 1e-1]),
        split_error=split_error,
    )


def test_the_account_adds_up() -> None:
    why = attributions()
    np.testing.assert_allclose(why.reconstruction, why.output, rtol=1e-14)
    np.testing.assert_array_equal(why.initial, why.channels["initial"])
    assert np.abs(why.left_over).max() < 1e-14
    assert why.residual.max() < 1e-12 and why.relative_residual < 1e-13


def test_what_is_left_over_is_relative_to_what_moved() -> None:
    why = attributions(left_over=0.25)
    moved = why.output - why.initial
    np.testing.assert_allclose(why.left_over, 0.25)
    np.testing.assert_allclose(why.residual, 0.25 / np.abs(moved))
    assert why.relative_residual == pytest.approx(0.25 * np.sqrt(QUERIES) / np.linalg.norm(moved))


def test_an_output_that_did_not_move() -> None:
    zero = np.zeros(1)
    still = Attributions(np.zeros((1, 2)), {"initial": zero + 3}, zero + 3, zero, zero, zero)
    assert still.residual == 0 and still.relative_residual == 0
    off = Attributions(np.ones((1, 2)), {"initial": zero + 3}, zero + 3, zero, zero, zero)
    assert off.residual > 1e100 and off.relative_residual > 1e100


@given(seed=st.integers(0, 100), k=st.integers(1, SAMPLES))
def test_rankings(seed: int, k: int) -> None:
    why = attributions(seed)
    ranking = why.top(k)
    for q in range(QUERIES):
        in_order = np.sort(why.shares[q])
        np.testing.assert_array_equal(ranking.opponent_shares[q], in_order[:k])
        np.testing.assert_array_equal(ranking.proponent_shares[q], in_order[::-1][:k])
        np.testing.assert_array_equal(why.shares[q, ranking.proponents[q]], ranking.proponent_shares[q])
        np.testing.assert_array_equal(why.shares[q, ranking.opponents[q]], ranking.opponent_shares[q])


def test_a_ranking_can_be_read() -> None:
    shares = np.array([[0.5, -2.0, 1.25]])
    zero = np.zeros(1)
    text = repr(Attributions(shares, {"initial": zero}, zero, zero, zero, zero).top(2))
    assert text == "query 0\n  raised by  2 (+1.25), 0 (+0.5)\n  lowered by 1 (-2), 0 (+0.5)"


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 1, 2, 2, 0], list("aabbbcca"), [True] * 3 + [False] * 5])
def test_sums_by_class_add_up(labels: list) -> None:
    why = attributions()
    sums = why.by_class(np.array(labels))
    assert len(sums) == len(set(labels))
    np.testing.assert_allclose(sum(sums.values()), why.shares.sum(axis=1))
    for label, total in sums.items():
        members = [i for i, y in enumerate(labels) if y == label]
        np.testing.assert_allclose(total, why.shares[:, members].sum(axis=1))


def test_labels_may_come_as_tensors_or_lists() -> None:
    labels = [0, 0, 1, 1, 1, 2, 2, 0]
    expected = attributions().by_class(np.array(labels))
    forms: list[Any] = [labels, torch.tensor(labels)]
    for given_labels in forms:
        found = attributions().by_class(given_labels)
        assert list(found) == list(expected)
        np.testing.assert_array_equal(list(found.values()), list(expected.values()))


def test_a_table_with_a_row_for_each_pair() -> None:
    pytest.importorskip("pandas")
    why = attributions()
    frame = why.to_frame()
    assert list(frame.columns) == ["query", "sample", "output", "training_sample", "share"]
    assert len(frame) == QUERIES * SAMPLES
    np.testing.assert_array_equal(frame.pivot(index="query", columns="training_sample", values="share"), why.shares)
    assert frame[frame["query"] == 2]["output"].unique().tolist() == [-1]


def test_repr_shows_the_certificate() -> None:
    text = repr(attributions(left_over=0.25))
    assert text.startswith("Attributions(3 queries × 8 training samples, channels: initial, weight_decay; residual ")
    assert text.endswith("quadrature error 1.0e-02 (median), split error not checked)")
    assert repr(attributions(split_error=2e-16)).endswith("split error 2.0e-16)")
    verified = replace(attributions(), shares_error=np.array([1e-2, 2e-2, 3e-1]))
    assert "quadrature error 1.0e-02, shares error 2.0e-02 (median), split error" in repr(verified)


def test_it_can_be_stored() -> None:
    why = attributions()
    again = pickle.loads(pickle.dumps(why))
    np.testing.assert_array_equal(again.shares, why.shares)
    assert repr(again) == repr(why)
