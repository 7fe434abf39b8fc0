"""Judges of attributions, against scipy and scikit-learn column by column, and in the forms of dattri and captum."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import roc_auc_score

from pathkernel import analysis
from pathkernel.analysis import evaluation_interfaces as interfaces
from pathkernel.analysis.evaluation import correlation
from pathkernel.errors import InputError

Q, N, R = 4, 12, 15


@pytest.fixture
def drawn() -> Any:
    """Scores, subsets, and outputs that follow both with noise and ties."""
    generator = np.random.default_rng(0)
    scores = (8 * generator.normal(size=(Q, N))).round() / 8  # sums without rounding: ties stay ties
    subsets = analysis.random_subsets(N, 0.4, R, generator)
    outputs = (subsets @ scores.T + generator.normal(size=(R, Q))).round(0)
    return scores, subsets, outputs


def test_subsets_have_one_size_and_are_not_all_the_same() -> None:
    subsets = analysis.random_subsets(20, 0.25, 8, np.random.default_rng(1))
    assert set(subsets.sum(axis=1)) == {15.0} and set(subsets.ravel()) == {0.0, 1.0}
    assert len({tuple(row) for row in subsets}) == 8
    assert (analysis.random_subsets(20, 0.999, 2, np.random.default_rng(1)) == 1).sum() == 2
    assert (analysis.random_subsets(20, 0.001, 2, np.random.default_rng(1)) == 0).sum() == 2  # one at least


def test_lds_is_spearman_of_sums(drawn: Any) -> None:
    scores, subsets, outputs = drawn
    found = analysis.linear_datamodeling_score(scores, subsets, outputs)
    for q in range(Q):
        sums = [scores[q, row == 1].sum() for row in subsets]
        assert found[q] == pytest.approx(spearmanr(sums, outputs[:, q]).statistic, abs=1e-12)


def test_lds_averages_seeds_and_knows_a_perfect_score(drawn: Any) -> None:
    scores, subsets, outputs = drawn
    several = np.stack([outputs + 1, outputs - 1])
    plain = analysis.linear_datamodeling_score(scores, subsets, outputs)
    assert np.allclose(analysis.linear_datamodeling_score(scores, subsets, several), plain)
    exact = np.exp(subsets @ scores.T)  # monotone: ranks alone count
    assert np.allclose(analysis.linear_datamodeling_score(scores, subsets, exact), 1)
    assert np.allclose(analysis.linear_datamodeling_score(-scores, subsets, exact), -1)


def test_equal_numbers_have_no_correlation() -> None:
    found = correlation(np.ones((4, 1)), np.arange(4.0)[:, None])
    assert np.isnan(found).all()


@pytest.mark.parametrize("method", ["spearman", "pearson"])
def test_leave_one_out(method: Any) -> None:
    generator = np.random.default_rng(2)
    scores, changes = generator.normal(size=(Q, N)), generator.normal(size=(5, Q))
    removed = np.array([3, 0, 7, 11, 5])
    found = analysis.leave_one_out_correlation(scores, removed, changes, method)
    for q in range(Q):
        judge = spearmanr if method == "spearman" else pearsonr
        assert found[q] == pytest.approx(judge(-scores[q, removed], changes[:, q]).statistic, abs=1e-12)
    assert np.allclose(analysis.leave_one_out_correlation(scores, removed, -scores[:, removed].T, method), 1)


def test_top_removals_leave_out_the_strongest() -> None:
    scores = np.array([[0.1, 3.0, -1.0, 2.0], [1.0, 1.0, 0.0, -5.0]])
    weights = analysis.top_removals(scores, [0, 1, 3])
    assert weights.shape == (2, 3, 4)
    assert [np.flatnonzero(row == 0).tolist() for row in weights[0]] == [[], [1], [0, 1, 3]]
    assert [np.flatnonzero(row == 0).tolist() for row in weights[1]] == [[], [0], [0, 1, 2]]  # the first of equals


def test_query_loss_difference_and_brittleness() -> None:
    assert analysis.query_loss_difference([1.0, 2.0], [[1.5, 3.0], [2.0, 2.5]]).tolist() == [0.25, 1.25]
    smallest, flipped = analysis.brittleness([0, 1, 1], [[0, 2, 0], [1, 1, 1], [0, 1, 1]], [5, 10, 20])
    assert smallest.tolist() == [10, np.inf, 5]
    assert flipped.tolist() == [1 / 3, 2 / 3, 2 / 3]  # a removal that flipped counts for larger ones


def test_wrong_labels() -> None:
    generator = np.random.default_rng(3)
    suspicion, flipped = generator.normal(size=50).round(1), generator.random(50) < 0.3
    assert analysis.mislabel_auc(suspicion, flipped) == pytest.approx(roc_auc_score(flipped, suspicion))
    pairs = [np.sign(a - b) for a in suspicion[flipped] for b in suspicion[~flipped]]  # the definition
    assert analysis.mislabel_auc(suspicion, flipped) == pytest.approx((np.mean(pairs) + 1) / 2)
    top = np.argsort(-suspicion, kind="stable")[: flipped.sum()]
    assert analysis.mislabel_precision(suspicion, flipped) == pytest.approx(flipped[top].mean())
    assert analysis.mislabel_precision(flipped, flipped) == 1
    assert analysis.mislabel_precision(suspicion, flipped, 50) == pytest.approx(flipped.mean())


def test_metasmoothness_of_known_functions() -> None:
    start = [0.0, 0.0, 0.0]
    assert analysis.metasmoothness(start, [1, -2, 3], [2, -4, 6]) == 1  # a line
    assert analysis.metasmoothness(start, [1, -2, 3], start) == -1  # there and back
    half = analysis.metasmoothness(start, [1, 1, 2], [2, 0, 2])
    assert half == pytest.approx((1 - 1 + 0) / 4)  # weighted by what the first step did
    several = analysis.metasmoothness(np.zeros((2, 1)), [[1.0], [1.0]], [[2.0], [0.0]])
    assert several == 0


# -- in the forms of others -----------------------------------------------------------------------------------------


def documented_lds(score: torch.Tensor, truth: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    """LDS as dattri's documentation has it: scores (N, Q); outputs (R, Q) and ids (R, size)."""
    outputs, ids = truth
    sums = torch.stack([score[own].sum(dim=0) for own in ids])
    return [float(spearmanr(sums[:, q], outputs[:, q]).statistic) for q in range(outputs.shape[1])]


def test_what_dattri_takes(drawn: Any) -> None:
    scores, subsets, outputs = drawn
    arguments = interfaces.dattri_lds(scores, subsets, outputs)
    assert np.allclose(documented_lds(*arguments), analysis.linear_datamodeling_score(scores, subsets, outputs))
    removed, changes = np.array([1, 5, 2]), outputs[:3]
    score, (truth, ids) = interfaces.dattri_loo_corr(scores, removed, changes)
    found = [float(pearsonr(score[:, q], truth[:, q]).statistic) for q in range(Q)]
    expected = analysis.leave_one_out_correlation(scores, removed, changes, "pearson")
    assert np.allclose(found, expected) and ids.tolist() == removed.tolist()
    suspicion, wrong = interfaces.dattri_mislabel([0.1, 0.9, 0.5], [0, 1, 0])
    assert suspicion.shape == wrong.shape and wrong.dtype == torch.bool


def test_dattri_itself_where_it_is_installed(drawn: Any) -> None:
    metric = pytest.importorskip("dattri.metric")
    scores, subsets, outputs = drawn
    found = metric.lds(*interfaces.dattri_lds(scores, subsets, outputs))[0].numpy()
    assert np.allclose(found, analysis.linear_datamodeling_score(scores, subsets, outputs))
    removed, changes = np.array([1, 5, 2]), outputs[:3]
    found = metric.loo_corr(*interfaces.dattri_loo_corr(scores, removed, changes))[0].numpy()
    assert np.allclose(found, analysis.leave_one_out_correlation(scores, removed, changes, "pearson"))
    suspicion, flipped = np.arange(9.0) % 4 + 0.1 * np.arange(9), np.arange(9) % 4 > 1
    found, _ = metric.mislabel_detection_auc(*interfaces.dattri_mislabel(suspicion, flipped))
    assert float(found) == pytest.approx(analysis.mislabel_auc(suspicion, flipped))


def test_captums_interface() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 0.5]], dtype=torch.float64)
    ours = interfaces.InfluenceInterface(lambda x, y: scores[x], self_scores=lambda: [1.0, 2.0, 3.0])
    batch = (torch.tensor([0, 1]), torch.zeros(2))
    assert torch.equal(ours.influence(batch), scores)
    assert torch.equal(ours.influence((torch.tensor([1]), None)), scores[1:])
    assert torch.equal(ours.influence(iter([batch, batch])), torch.cat([scores, scores]))
    best, worst = ours.influence(batch, k=2), ours.influence(batch, k=1, proponents=False)
    assert best.indices.tolist() == [[1, 2], [0, 2]] and best.influence_scores.tolist() == [[2, 1], [3, 0.5]]
    assert worst.indices.tolist() == [[0], [1]]
    assert ours.influence(batch, aggregate=True).tolist() == [[3, 1, 1.5]]
    assert ours.self_influence().tolist() == [1, 2, 3] and ours.get_name() == "InfluenceInterface"


def test_captums_signature_where_it_is_installed() -> None:
    influence = pytest.importorskip("captum.influence")
    theirs, ours = influence.TracInCP.influence, interfaces.InfluenceInterface.influence
    assert list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters)
    fields = influence._core.tracincp.KMostInfluentialResults._fields
    assert fields == interfaces.KMostInfluentialResults._fields


# -- refusals -------------------------------------------------------------------------------------------------------

RNG, FLIPS = np.random.default_rng(0), [[0, 2], [1, 1]]
REFUSED: dict[str, Any] = {
    "a part": (lambda: analysis.random_subsets(5, 1.0, 2, np.random.default_rng()), "`removed=1.0`"),
    "shapes": (lambda: analysis.linear_datamodeling_score(np.ones((2, 3)), np.ones((4, 3)), np.ones((4, 3))), "shapes"),
    "few": (lambda: analysis.linear_datamodeling_score(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 2))), "2 subsets"),
    "one axis": (lambda: analysis.linear_datamodeling_score(np.ones(3), np.ones((4, 3)), np.ones((4, 3))), "two axes"),
    "nan": (lambda: analysis.mislabel_auc([0.1, np.nan], [0, 1]), "NaN or infinity"),
    "method": (lambda: correlation(np.ones((3, 1)), np.ones((3, 1)), "kendall"), "Correlations are"),  # type: ignore
    "ids": (lambda: analysis.leave_one_out_correlation(np.ones((1, 3)), [0, 1, 3], np.ones((3, 1))), "from 0 to 2"),
    "sizes": (lambda: analysis.top_removals(np.ones((1, 3)), [4]), "Sizes are whole numbers"),
    "all right": (lambda: analysis.mislabel_auc([0.1, 0.2], [0, 0]), "wrong and right ones"),
    "inspected": (lambda: analysis.mislabel_precision([0.1, 0.2], [0, 1], 3), "Between 1 and all 2"),
    "still": (lambda: analysis.metasmoothness([1.0], [1.0], [2.0]), "are the same"),
    "other sizes": (lambda: interfaces.dattri_lds([[1.0, 2.0]], [[1, 1], [1, 0]], [[1.0], [2.0]]), "2 sizes"),
    "no queries": (lambda: interfaces.InfluenceInterface(lambda x: x).influence(), "without inputs"),
    "self": (lambda: interfaces.InfluenceInterface(lambda x: x).self_influence(), "self_scores"),
    "a part that is text": (lambda: analysis.random_subsets(5, "half", 2, RNG), "`removed='half'`"),
    "no samples": (lambda: analysis.random_subsets(0, 0.5, 2, RNG), "`samples=0`"),
    "one sample": (lambda: analysis.random_subsets(1, 0.5, 2, RNG), "Subsets of one sample"),
    "half a subset": (lambda: analysis.random_subsets(5, 0.5, 1.5, RNG), "`count=1.5`"),
    "a seed": (lambda: analysis.random_subsets(5, 0.5, 2, 0), r"`generator` is a int.*default_rng"),
    "other columns": (lambda: correlation(np.ones((3, 2)), np.ones((3, 1))), r"shape \(3, 2\), and `true` \(3, 1\)"),
    "a correlation of nan": (lambda: correlation([[np.nan], [1.0]], [[0.0], [1.0]]), "`predicted` holds NaN"),
    "ids in rows": (lambda: analysis.leave_one_out_correlation(np.ones((1, 3)), [[0, 1, 2]], np.ones((3, 1))), "ids"),
    "labels with nan": (lambda: analysis.brittleness([np.nan, 1.0], FLIPS, [1, 2]), "`labels` is of type float64"),
    "labels that are scores": (lambda: analysis.brittleness([0.3, 0.9], FLIPS, [1, 2]), "may be no class"),
    "names and numbers": (lambda: analysis.brittleness(["a", "b"], FLIPS, [1, 2]), "both are names"),
    "sizes below 0": (lambda: analysis.brittleness([0, 1], FLIPS, [-1, 2]), "whole numbers from 0 upwards"),
    "sizes with nan": (lambda: analysis.brittleness([0, 1], FLIPS, [np.nan, 2]), "whole numbers from 0 upwards"),
    "dattri of others": (lambda: interfaces.dattri_lds(np.ones((2, 3)), np.ones((2, 4)), np.ones((2, 2))), "shapes"),
    "dattri of no ids": (lambda: interfaces.dattri_loo_corr(np.ones((1, 3)), [3], np.ones((1, 1))), "from 0 to 2"),
    "dattri of marks": (lambda: interfaces.dattri_mislabel([0.1, 0.2], [0, 3]), "true and false"),
    "captum of an array": (lambda: interfaces.InfluenceInterface(np.ones((1, 2))), "`scores` is a ndarray"),
    "captum of no batch": (lambda: interfaces.InfluenceInterface(lambda x: x).influence(3), "holds no batches"),
    "captum of no samples": (
        lambda: interfaces.InfluenceInterface(lambda x: x).influence((np.ones((1, 2)),), k=-1),
        "`k=-1` was given for 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e200], ids=str)
def test_the_size_of_scores_says_nothing(scale: float) -> None:
    """Squares of small scores are 0, and those of large ones infinite."""
    generator = np.random.default_rng(0)
    predicted, true = generator.normal(size=(6, 2)), generator.normal(size=(6, 2))
    found = correlation(scale * predicted, true, "pearson")
    np.testing.assert_allclose(found, correlation(predicted, true, "pearson"), rtol=1e-11)


def test_equal_scores_predict_nothing_to_rounding() -> None:
    """Sums of equal scores over subsets of one size differ by their rounding, which is no order."""
    rng = np.random.default_rng(0)
    subsets, outputs = analysis.random_subsets(20, 0.3, 15, rng), rng.normal(size=(15, 1))
    assert np.ptp(subsets @ np.full(20, 0.1)) > 0
    assert np.isnan(analysis.linear_datamodeling_score(np.full((1, 20), 0.1), subsets, outputs)).all()
    removed, changes = np.arange(10), rng.normal(size=(10, 1))
    assert np.isnan(analysis.leave_one_out_correlation(np.full((1, 20), 0.1), removed, changes, "pearson")).all()


@pytest.mark.parametrize(
    "scores", ["text", [[1.0], [1.0, 2.0]], 1j * np.ones((1, 3))], ids=["text", "ragged", "complex"]
)
def test_what_is_no_array_of_real_numbers_is_refused(scores: Any) -> None:
    with pytest.raises(InputError, match=r"`scores` is .* no array of real numbers"):
        analysis.linear_datamodeling_score(scores, np.eye(3), np.ones((3, 1)))
    with pytest.raises(InputError, match="other things than true and false"):
        analysis.mislabel_auc([0.1, 0.2, 0.3], [0, 2, 5])
