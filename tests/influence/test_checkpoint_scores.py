"""Scores from a checkpoint, against dense Jacobians and matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import generator, make_inputs, make_model
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from pathkernel.errors import InputError
from pathkernel.influence import checkpoint_scores
from pathkernel.influence.checkpoint_scores import influence_function_scores, tracin_scores, trak_scores

N, Q = 7, 3
CE = nn.CrossEntropyLoss()
Samples = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def drawn() -> tuple[nn.Module, Samples, Samples]:
    labels = torch.randint(3, (N + Q,), generator=generator(2))
    X = make_inputs(N + Q)
    return make_model("tanh"), (X[:N], labels[:N]), (X[N:], labels[N:])


def dense(model: nn.Module, X: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (n, C) and Jacobian (n, C, P)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    rows = jacrev(lambda p: functional_call(model, p, (X,)))(parameters)
    return model(X).detach(), torch.cat([rows[name].flatten(2) for name in parameters], dim=2)


def loss_gradients(model: nn.Module, samples: Samples) -> Tensor:
    z, J = dense(model, samples[0])
    slopes = z.softmax(1) - nn.functional.one_hot(samples[1], 3)
    return torch.einsum("nc,ncp->np", slopes, J)


def test_tracin(drawn: tuple[nn.Module, Samples, Samples]) -> None:
    model, samples, queries = drawn
    expected = 0.1 * loss_gradients(model, queries) @ loss_gradients(model, samples).T
    assert np.allclose(tracin_scores(model, CE, samples, queries, learning_rate=0.1), expected, rtol=1e-10)


@pytest.mark.parametrize("regularization", [None, 0.3])
def test_trak(drawn: tuple[nn.Module, Samples, Samples], regularization: float | None) -> None:
    model, samples, queries = drawn

    def margins(own: Samples) -> tuple[Tensor, Tensor]:
        z, J = dense(model, own[0])
        p = z.softmax(1).gather(1, own[1][:, None])[:, 0]
        log_p = torch.einsum("nc,ncp->np", nn.functional.one_hot(own[1], 3) - z.softmax(1), J)
        return p, log_p / (1 - p)[:, None]  # d log(p / (1 − p)) = d log p / (1 − p)

    (p, A), (_, B) = margins(samples), margins(queries)
    K = A @ A.T
    ridge = K.diagonal().mean() if regularization is None else regularization
    expected = (B @ A.T) @ torch.linalg.inv(K + ridge * torch.eye(N)) * (1 - p)
    found = trak_scores(model, samples, queries, regularization=regularization)
    assert np.allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("damping", [None, 0.05])
def test_influence_functions(drawn: tuple[nn.Module, Samples, Samples], damping: float | None) -> None:
    model, samples, queries = drawn
    z, J = dense(model, samples[0])
    p = z.softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    G = torch.einsum("ncp,ncd,ndr->pr", J, curvature, J) / N
    if damping is None:
        found = influence_function_scores(model, CE, samples, queries)
        damping = 0.1 * float(G.diagonal().mean())
        tolerance = 1.0  # the mean eigenvalue is an estimate
    else:
        found, tolerance = influence_function_scores(model, CE, samples, queries, damping=damping), 1e-3
    inverse = torch.linalg.inv(G + damping * torch.eye(len(G)))
    expected = (loss_gradients(model, queries) @ inverse @ loss_gradients(model, samples).T / N).numpy()
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99


def test_influence_functions_are_exact_where_the_model_is_linear() -> None:
    """Ridge-free least squares of the mean: removing a sample by −score is the derivative in its weight."""
    X, y = make_inputs(20), make_inputs(20, (1,), seed=5)
    with torch.random.fork_rng(devices=[]):
        model = nn.Linear(4, 1).double()
    ones = torch.cat([X, torch.ones(20, 1)], dim=1)

    def fitted(weights: Tensor) -> Tensor:
        A = ones.T @ (weights[:, None] * ones)
        return torch.linalg.solve(A, ones.T @ (weights[:, None] * y))[:, 0]

    theta = fitted(torch.ones(20, dtype=torch.float64))
    with torch.no_grad():
        model.weight.copy_(theta[None, :4])
        model.bias.copy_(theta[4:])
    query = (X[:2] + 0.3, y[:2])
    scores = influence_function_scores(model, nn.MSELoss(), (X, y), query, damping=1e-9)

    def minus_loss(weights: Tensor) -> Tensor:
        predicted = torch.cat([query[0], torch.ones(2, 1)], dim=1) @ fitted(weights)
        return -(predicted - query[1][:, 0]).square()

    expected = torch.func.jacrev(minus_loss)(torch.ones(20, dtype=torch.float64))
    assert np.linalg.norm(scores - expected.numpy()) <= 1e-3 * expected.norm()


def test_refusals(drawn: tuple[nn.Module, Samples, Samples], monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples, queries = drawn
    with pytest.raises(InputError, match="`regularization=0`"):
        trak_scores(model, samples, queries, regularization=0)
    with pytest.raises(InputError, match="`samples` is Tensor"):
        trak_scores(model, samples[0], queries)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="`learning_rate=nan`"):
        tracin_scores(model, CE, samples, queries, learning_rate=float("nan"))
    with pytest.raises(InputError, match="`damping=-1`"):
        influence_function_scores(model, CE, samples, queries, damping=-1)
    with pytest.raises(InputError, match="has no class"):
        influence_function_scores(model, CE, samples, (queries[0], queries[1] + 3))
    with pytest.raises(InputError, match="was given no samples"):
        influence_function_scores(model, CE, samples, (queries[0][:0], queries[1][:0]))
    monkeypatch.setattr(checkpoint_scores, "conjugate_gradients", lambda *_, **__: None)
    with pytest.raises(checkpoint_scores.PathKernelError, match="Conjugate gradients did not"):
        influence_function_scores(model, CE, samples, queries)


def test_types_of_class_labels_say_nothing(drawn: tuple[nn.Module, Samples, Samples]) -> None:
    model, (X, y), queries = drawn
    found = influence_function_scores(model, CE, (X, y.to(torch.uint8)), queries, damping=0.1)
    assert np.allclose(found, influence_function_scores(model, CE, (X, y), queries, damping=0.1), rtol=1e-3)


def test_influence_functions_of_a_query_that_is_nearly_right() -> None:
    """Its gradient is short beside another's, and its row no less accurate."""
    model, sizes, damping = nn.Linear(4, 1, bias=False).double(), torch.tensor([30.0, 1.0, 2.0, 3.0]).double(), 0.01
    X, X_query = sizes.diag(), torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 1]]).double()
    residuals = torch.tensor([[1.0], [1e-7]]).double()
    y, y_query = model(X).detach() - 1, model(X_query).detach() - residuals
    # ∇ℓ = 2 r x and G = 2/N Σ x xᵀ, a diagonal matrix.
    expected = (2 * residuals * X_query / (2 * sizes**2 / 4 + damping)) @ (2 * X).T / 4
    scores = influence_function_scores(model, nn.MSELoss(), (X, y), (X_query, y_query), damping=damping)
    assert np.allclose(scores, expected, rtol=1e-3, atol=0)
