"""Near-duplicates: every number by plain arithmetic, what is found of what was planted, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control
from sklearn.metrics.pairwise import linear_kernel
from torch import nn

import pathkernel as pk
from pathkernel import errors, reference
from pathkernel.influence import identical_samples, near_duplicates
from pathkernel.influence.nearest_neighbours import agreed, discoveries


def samples(n: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 5))


def planted() -> np.ndarray:
    """60 samples: 3 and 50 a pair, 5, 51 and 52 a triple, 7, 53 and 54 identical."""
    X = samples()
    nearby = 1e-4 * samples(seed=1)
    X[50] = X[3] + nearby[0]
    X[51], X[52] = X[5] + nearby[1], X[5] + nearby[2]
    X[53] = X[54] = X[7]
    return X


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)


NETWORK = network()


def test_p_values_and_dimensions_by_plain_arithmetic() -> None:
    X = samples()
    X[50] = X[3] + 0.02
    kernel = pk.TangentKernel(NETWORK)
    K = torch.from_numpy(kernel(X))
    apart = [reference.neighbours_apart(K, k) for k in (1, 2, 3)]
    one = near_duplicates(kernel, X, copies=1)
    assert one.dimensions == pytest.approx([apart[0][1]], rel=1e-6)
    assert one.pairs.tolist() == [[3, 50]] and one.tested == 60 and not one.across
    assert one.p_value[0] == pytest.approx(max(apart[0][0][[3, 50]].tolist()), rel=1e-5)
    cosines = K / (K.diagonal()[:, None] * K.diagonal()).sqrt()
    assert one.cosine[0] == pytest.approx(float(cosines[3, 50]), rel=1e-9)
    nexts = [cosines[i].sort(descending=True).values[2] for i in (3, 50)]
    assert min(abs(one.next_cosine[0] - float(value)) for value in nexts) < 1e-9
    found = near_duplicates(kernel, X)
    plain = [d for _, d in apart]
    assert found.dimensions == pytest.approx([max(plain), max(plain[1:]), plain[2]], rel=1e-6)
    expected = 3 * max(float(r) ** (found.dimensions[0] / plain[0]) for r in apart[0][0][[3, 50]])
    assert found.p_value[0] == pytest.approx(expected, rel=1e-5) and found.threshold == found.p_value[0]


def test_what_was_planted_is_found_and_nothing_else() -> None:
    X, y = planted(), np.zeros(60, dtype=int)
    y[52], y[54] = 1, 2
    before = X.copy()
    found = near_duplicates(pk.TangentKernel(NETWORK), X, labels=y)
    np.testing.assert_array_equal(X, before)
    assert sorted(found.pairs.tolist()) == [[3, 50], [5, 51], [5, 52], [7, 53], [7, 54], [51, 52]]
    assert found.pairs[found.identical].tolist() == [[7, 53], [7, 54]]
    assert (np.diff(found.p_value) >= 0).all() and (found.cosine > 0.999999).all()
    assert np.isnan(found.next_cosine[:2]).all() and (found.next_cosine[2:] < 0.999).all()
    assert sorted(found.pairs[found.conflicts].tolist()) == [[5, 52], [7, 54], [51, 52]]
    assert [group.tolist() for group in found.groups] == [[3, 50], [5, 51, 52], [7, 53, 54]]
    assert found.redundant.tolist() == [50, 51, 52, 53, 54] and found.tested == 58
    frame = found.to_frame()
    assert frame[["sample", "other"]].to_numpy().tolist() == found.pairs.tolist()
    assert {"cosine", "next_cosine", "p_value", "identical", "label", "other_label"} < set(frame)
    assert repr(found).startswith(
        "NearDuplicates(6 pairs of training samples, 2 of them identical, 58 samples tested: 7"
    )
    # A triple stands apart as three, and as two it does not.
    assert [5, 51] not in near_duplicates(pk.TangentKernel(NETWORK), X, copies=1).pairs.tolist()


def test_nothing_is_found_where_nothing_was_planted() -> None:
    found = near_duplicates(linear_kernel, samples(200, seed=5))
    assert len(found) == 0 and found.threshold == 0 and found.groups == [] and found.redundant.tolist() == []
    assert repr(found) == "NearDuplicates(0 pairs of training samples, 0 of them identical, 200 samples tested)"
    assert near_duplicates(linear_kernel, samples(), labels=np.zeros(60)).conflicts.shape == (0,)


def test_between_training_samples_and_others() -> None:
    X, others = planted(), samples(110, seed=2)
    others[4], others[9] = X[20] + 1e-4, X[7]
    others[11] = X[3] + 1e-4  # of which training holds two
    y, other_labels = torch.zeros(60), torch.zeros(110)
    other_labels[4] = 1
    found = near_duplicates(pk.TangentKernel(NETWORK), X, others, labels=y, other_labels=other_labels)
    assert found.across and found.tested == 109
    assert sorted(found.pairs.tolist()) == [[3, 11], [7, 9], [20, 4], [50, 11]]
    assert found.pairs[found.identical].tolist() == [[7, 9]] and found.redundant.tolist() == [4, 9, 11]
    assert found.pairs[found.conflicts].tolist() == [[20, 4]]
    assert repr(found).startswith("NearDuplicates(4 pairs of a training sample and another")
    with pytest.raises(errors.InputError, match=r"`groups` was asked of pairs of training samples and others.*`pairs`"):
        _ = found.groups
    # All of them leaked: the dimension is that of the training samples.
    leaked = near_duplicates(pk.TangentKernel(NETWORK), X, X[20:35] + 1e-4, dimension=found.dimensions[0])
    assert leaked.redundant.tolist() == list(range(15)) and leaked.dimensions == (found.dimensions[0],) * 3
    same = near_duplicates(pk.TangentKernel(NETWORK), X, X[:4])
    assert same.pairs.tolist() == [[i, i] for i in range(4)] and same.tested == 0 and same.dimensions == ()


def test_most_samples_have_a_duplicate() -> None:
    """Half of the gaps are those of duplicates; the dimension comes from behind them."""
    X = samples(50, seed=3)
    found = near_duplicates(linear_kernel, np.concatenate([X, X + 1e-5 * samples(50, seed=4)]))
    assert len({tuple(pair) for pair in found.pairs.tolist()} & {(i, i + 50) for i in range(50)}) == 50


@pytest.mark.parametrize(
    "others", [None, np.concatenate([samples(110, seed=2), planted()[3:5]])], ids=["within", "across"]
)
def test_blocks_are_the_whole(others: Any) -> None:
    X = planted()
    whole, cut = (near_duplicates(linear_kernel, X, others, memory=size) for size in ("1GB", 8 * 4 * 60 * 7))
    np.testing.assert_array_equal(cut.pairs, whole.pairs)
    np.testing.assert_allclose(cut.p_value, whole.p_value, rtol=1e-6)
    np.testing.assert_allclose(cut.dimensions, whole.dimensions, rtol=1e-6)


def test_the_path_kernel_and_samples_in_single_precision() -> None:
    X, model = torch.from_numpy(planted()).float(), network(torch.float32)
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, torch.arange(60) % 2)) as recorder:
        for x, target in recorder.batches(batch_size=30):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    found = near_duplicates(pk.PathKernel(recorder.trajectory), X)
    assert sorted(found.pairs.tolist()) == [[3, 50], [5, 51], [5, 52], [7, 53], [7, 54], [51, 52]]
    assert 1e-9 < found.resolution < 1e-5  # rounding of float32 is no distance


def test_samples_without_a_gradient_are_near_to_none() -> None:
    X = samples()
    X[[8, 9]] = 0
    X[9, 0] = 1e-30  # whose square is no number of its own beside the others
    found = near_duplicates(lambda A, B=None: linear_kernel(np.where(abs(A) < 1e-9, 0, A), B), X)
    assert len(found) == 0


def test_hashes_that_agree_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identical_samples, "row_hashes", lambda leaves: np.zeros(len(leaves), np.int64))
    X = torch.from_numpy(planted())
    assert identical_samples.first_identical(X[:3]).tolist() == [0, 1, 2]
    assert identical_samples.first_identical_of(X[:3], X[1:3]).tolist() == [-1, -1]
    assert identical_samples.first_identical_of(X[:3], X[:1]).tolist() == [0]
    assert not identical_samples.same_rows((X, X), np.arange(2), X, np.arange(2)).any()


def test_samples_of_several_parts() -> None:
    tree = {"x": torch.from_numpy(planted()), "tokens": torch.zeros(60, 2, dtype=torch.int64)}
    tree["tokens"][54] = 1
    found = near_duplicates(lambda A, B=None: linear_kernel(*(each["x"] for each in (A, B or A))), tree)
    assert found.pairs[found.identical].tolist() == [[7, 53]]  # 54 has other tokens, which this kernel does not see
    assert [7, 54] in found.pairs.tolist()


def test_discoveries_are_those_of_benjamini_and_hochberg() -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        p = np.concatenate([generator.random(40), generator.random(10) ** 8])
        chosen, largest = discoveries(np.log(p), 0.05)
        np.testing.assert_array_equal(chosen, np.flatnonzero(false_discovery_control(p) <= 0.05))
        assert largest == pytest.approx(p[chosen].max())
    assert discoveries(np.log(generator.random(9) + 0.5), 0.05)[1] == 0


def test_groups_count_where_their_samples_agree() -> None:
    places = np.array([[1, 2], [0, 2], [0, 1], [4, 0], [3, 0]])  # 2 finds 0 and 1 beside it, who find each other
    log_p = np.array([-5.0, -4, -9, -1, -2])
    np.testing.assert_array_equal(agreed(log_p, np.array([1, 1, 2, 1, 1]), places), [-4, -4, 0, -1, -1])
    np.testing.assert_array_equal(agreed(log_p, np.array([2, 2, 2, 1, 2]), places), [-4, -4, -4, 0, 0])


def test_labels_in_a_column_are_those_in_a_row() -> None:
    X, y = planted(), np.arange(60) % 2
    others, theirs = np.vstack([samples(150, 5), X[:2]]), np.arange(152) % 2
    theirs[150:] = y[0], 1 - y[1]
    labels = {"labels": y[:, None].astype(float), "other_labels": theirs}
    found = near_duplicates(linear_kernel, X, others, dimension=6.0, **labels)
    twins = found.identical & (found.pairs[:, 1] >= 150)
    np.testing.assert_array_equal(found.conflicts[twins], [False, True])
    without = near_duplicates(linear_kernel, X, labels=np.full(60, np.nan))
    assert len(without) and not without.conflicts.any()


REFUSED: dict[str, Any] = {
    "what is no kernel": (lambda: near_duplicates(pk.TangentKernel, samples()), "`near_duplicates` was given .* as a"),
    "no copies": (lambda: near_duplicates(linear_kernel, samples(), copies=0), "`copies=0`.*`copies=3`"),
    "a rate of one": (lambda: near_duplicates(linear_kernel, samples(), false_discovery_rate=1), "between 0 and 1"),
    "no dimension": (lambda: near_duplicates(linear_kernel, samples(), dimension=0), "`dimension=0` was given"),
    "labels of others": (
        lambda: near_duplicates(linear_kernel, samples(), labels=np.zeros(3)),
        r"`labels` of shape \(3,\) were given for 60 samples.*one label for each",
    ),
    "labels alone": (
        lambda: near_duplicates(linear_kernel, samples(), samples(), labels=np.zeros(60)),
        "`labels` was given alone.*`near_duplicates",
    ),
    "the others' labels alone": (
        lambda: near_duplicates(linear_kernel, samples(), samples(), other_labels=np.zeros(60)),
        "`other_labels` was given alone",
    ),
    "two samples": (lambda: near_duplicates(linear_kernel, samples(2)), "was given 2 different samples.*Pass 3"),
    "few samples": (
        lambda: near_duplicates(linear_kernel, samples(9)),
        r"9 training samples are tested.*20 or more.*`dimension",
    ),
    "a kernel that tells nothing apart": (
        lambda: near_duplicates(lambda A, B=None: np.ones((len(A), len(A if B is None else B))), samples()),
        "kernel of type function more than half of 60 samples.*`dimension=`",
    ),
    "labels in other forms": (
        lambda: near_duplicates(
            linear_kernel, samples(), samples(), labels=np.zeros((60, 2)), other_labels=np.zeros(60)
        ),
        r"`labels` of shape \(60, 2\) float64 and `other_labels` of shape \(60,\).*the same shape",
    ),
    "labels by name and by number": (
        lambda: near_duplicates(linear_kernel, samples(), samples(), labels=np.zeros(60), other_labels=["a"] * 60),
        "`other_labels` of shape .* <U1.*both as numbers",
    ),
    "a sample that is not finite": (
        lambda: near_duplicates(
            lambda A, B=None: np.asarray(A) @ np.asarray(A if B is None else B).T,
            np.vstack([samples(), [[np.nan] * 5]]),
        ),
        "values that are not finite.*Look for samples with NaN",
    ),
    "conflicts without labels": (
        lambda: near_duplicates(linear_kernel, samples()).conflicts,
        "without labels.*labels=y",
    ),
    "rows of different numbers": (
        lambda: near_duplicates(linear_kernel, (torch.ones(3, 1), torch.ones(2, 1))),
        r"`near_duplicates` was given arrays of shape \(3, 1\), \(2, 1\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    call, said = REFUSED[name]
    with pytest.raises(errors.InputError, match=said):
        call()
