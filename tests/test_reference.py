"""The oracle checked by independent means: finite differences, `torch.optim`, closed forms, unrolled sums."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pathkernel import reference

EXACT = 1e-13  # the same float64 formula in another order of operations
FINITE_DIFFERENCE = 1e-8  # central differences with step 1e-5: truncation and rounding meet at about 1e-10
QUADRATURE = 1e-10  # Gauss–Legendre with 8 nodes on a smooth network
COMPLETE = 1e-12  # the discrete gradient, by construction

OPTIMIZERS = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.1, "weight_decay": 0.05}),
    ("sgd", {"lr": 0.05, "momentum": 0.9}),
    ("sgd", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    ("sgd", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    ("sgd", {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.1, "maximize": True}),
    ("adam", {"lr": 0.01}),
    ("adam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.05}),
    ("adamw", {"lr": 0.01}),
    ("adamw", {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.3}),
    ("rmsprop", {"lr": 0.003}),
    ("rmsprop", {"lr": 0.003, "alpha": 0.9, "centered": True, "momentum": 0.8, "weight_decay": 0.05}),
    ("adagrad", {"lr": 0.01}),
    ("adagrad", {"lr": 0.01, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "weight_decay": 0.05}),
]
TORCH = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
NAMES = [f"{name}-{'-'.join(k for k in h if k != 'lr') or 'plain'}" for name, h in OPTIMIZERS]


def mlp(activation: type[nn.Module] = nn.Tanh, outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, outputs)).double()


def samples(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(n: int) -> Tensor:
    return torch.arange(n) % 3


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def outputs_at(model: nn.Module, vector: Tensor, X: Tensor) -> Tensor:
    """f(X; θ) for θ as a vector, through `functional_call`, which the oracle does not use."""
    return torch.func.functional_call(model, reference.unflatten(model, vector), (X,)).flatten(1)


BATCHES = [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 0, 1], [2, 2, 5, 7], [3, 9], [6, 8, 4, 1]]


# --- Gradients and kernels -------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Integers in, a tied embedding, a frozen scale, and outputs of shape (tokens, vocabulary)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.scale = nn.Parameter(torch.tensor(1.5), requires_grad=False)
        self.head = nn.Linear(3, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.scale * self.embedding(x)))


@pytest.mark.parametrize(
    ("model", "X"), [(mlp(), samples(3)), (Tokens().double(), torch.tensor([[0, 1], [5, 2]]))], ids=["mlp", "tokens"]
)
def test_output_gradients_are_the_jacobian(model: nn.Module, X: Tensor) -> None:
    G = reference.output_gradients(model, values(model), X)
    theta = reference.flatten(model, values(model))
    J = torch.autograd.functional.jacobian(lambda v: outputs_at(model, v, X), theta)
    torch.testing.assert_close(G, J, rtol=0, atol=EXACT)

    step = 1e-5
    for p in range(len(theta)):
        e = torch.zeros_like(theta)
        e[p] = step
        difference = (outputs_at(model, theta + e, X) - outputs_at(model, theta - e, X)) / (2 * step)
        torch.testing.assert_close(G[:, :, p], difference.detach(), rtol=0, atol=FINITE_DIFFERENCE)


def test_parameters_are_tied_once_frozen_never_and_in_order() -> None:
    model = Tokens()
    assert reference.output_gradients(model, values(model), torch.tensor([[0, 1]])).shape == (1, 12, 18)
    vector = torch.arange(18.0, dtype=torch.float64)
    assert list(reference.unflatten(model, vector)) == ["embedding.weight"]
    assert torch.equal(reference.flatten(model, reference.unflatten(model, vector)), vector)


def test_callers_objects_stay_as_they_were() -> None:
    model = mlp().float()
    before = copy.deepcopy(model.state_dict())
    X = samples(4).float()
    assert reference.output_gradients(model, values(model), X).dtype == torch.float64
    reference.train(model, nn.CrossEntropyLoss(), X, labels(4), [[0, 1], [2, 3]], "adam")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())


def test_missing_parameters_are_named() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"lacks \['2.bias'\].*Write `dict\(model.named_parameters\(\)\)`"):
        reference.output_gradients(model, {k: v for k, v in values(model).items() if k != "2.bias"}, samples(2))


def test_tangent_kernel_is_symmetric_positive_semidefinite_and_rectangular() -> None:
    model, X, Y = mlp(), samples(6), samples(4, seed=2)
    K = reference.tangent_kernel(model, values(model), X)
    flat = K.permute(0, 2, 1, 3).reshape(18, 18)
    torch.testing.assert_close(flat, flat.T, rtol=0, atol=EXACT)
    assert torch.linalg.eigvalsh(flat).min() > -EXACT * flat.trace()
    rectangular = reference.tangent_kernel(model, values(model), X, Y)
    assert rectangular.shape == (6, 4, 3, 3)
    G, H = (reference.output_gradients(model, values(model), Z) for Z in (X, Y))
    torch.testing.assert_close(rectangular, torch.einsum("icp,jdp->ijcd", G, H), rtol=EXACT, atol=EXACT)


def test_path_kernel_is_the_weighted_sum_over_nodes() -> None:
    model, X, Y = mlp(), samples(5), samples(2, seed=2)
    nodes = reference.train(model, nn.CrossEntropyLoss(), X, labels(5), [[0, 1], [2, 3, 4]], "sgd", lr=1.0)
    weights = [0.5, 0.0, 2.0]
    K = reference.path_kernel(model, nodes, weights, X)
    torch.testing.assert_close(K, K.T, rtol=0, atol=EXACT)
    assert torch.linalg.eigvalsh(K).min() > -EXACT * K.trace()
    expected = sum(
        w * torch.einsum("ijcc->ij", reference.tangent_kernel(model, node, X, Y))
        for w, node in zip(weights, nodes, strict=True)
    )
    torch.testing.assert_close(reference.path_kernel(model, nodes, weights, X, Y), expected, rtol=EXACT, atol=EXACT)


# --- Quadrature ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_gauss_legendre_is_that_of_numpy(n: int) -> None:
    nodes, weights = reference.gauss_legendre(n)
    x, w = np.polynomial.legendre.leggauss(n)
    np.testing.assert_allclose(nodes, (1 + x) / 2, rtol=0, atol=EXACT)
    np.testing.assert_allclose(weights, w / 2, rtol=0, atol=EXACT)


def one_step(scale: float, seed: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """A step of the given length in a fixed direction from the first parameters of `mlp`, and its displacement."""
    model = mlp()
    theta = reference.flatten(model, values(model))
    direction = torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values(model), reference.unflatten(model, theta + scale * direction), scale * direction


@pytest.mark.parametrize(
    ("rule", "order"),
    [
        (reference.left, 2),
        (reference.midpoint, 3),
        (reference.trapezoid, 3),
        (reference.gauss_legendre(2), 5),
        (reference.gauss_legendre(3), 7),
    ],
    ids=["left", "midpoint", "trapezoid", "gauss2", "gauss3"],
)
def test_rules_have_their_order(rule: reference.quadrature.Rule, order: int) -> None:
    model, x = mlp(), samples(1)[0]

    def error(scale: float) -> float:
        total = 0.0
        for seed in range(12):  # the leading error term may happen to vanish in one direction, not in all
            start, end, displacement = one_step(scale, seed)
            before, after = (outputs_at(model, reference.flatten(model, p), x[None])[0, 1] for p in (start, end))
            q = reference.average_gradient(model, start, end, x, 1, rule)
            total += abs((after - before - q @ displacement).item())
        return total

    # short enough for the leading term to lead, long enough to stay above rounding (1e-16)
    assert math.log2(error(0.05) / error(0.025)) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_discrete_gradient_is_exact_and_the_smallest_correction(activation: type[nn.Module]) -> None:
    model, x = mlp(activation), samples(1)[0]
    start, end, displacement = one_step(0.5)
    q = reference.discrete_gradient(model, start, end, x, 2)
    before, after = (outputs_at(model, reference.flatten(model, p), x[None])[0, 2] for p in (start, end))
    assert (q @ displacement).item() == pytest.approx((after - before).item(), abs=EXACT)
    correction = q - reference.average_gradient(model, start, end, x, 2, reference.midpoint)
    along = (correction @ displacement) / (displacement @ displacement) * displacement
    torch.testing.assert_close(correction, along, rtol=0, atol=EXACT)


def test_discrete_gradient_without_displacement_is_the_gradient() -> None:
    model, x = mlp(), samples(1)
    q = reference.discrete_gradient(model, values(model), values(model), x[0], 1)
    torch.testing.assert_close(q, reference.output_gradients(model, values(model), x)[0, 1], rtol=0, atol=EXACT)


# --- Per-sample gradients --------------------------------------------------------------------------------------------

LOSSES = [
    (loss(reduction=reduction), target)
    for reduction in ("mean", "sum")
    for loss, target in [
        (nn.CrossEntropyLoss, labels(6)),
        (nn.MSELoss, samples(6, seed=5)[:, :3]),
        (nn.BCEWithLogitsLoss, (samples(6, seed=5)[:, :3] > 0).double()),
    ]
]


def batch_gradient(model: nn.Module, loss: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(X), y), list(model.parameters()))])


@pytest.mark.parametrize(("loss", "y"), LOSSES, ids=[f"{type(loss).__name__}-{loss.reduction}" for loss, _ in LOSSES])
def test_sample_gradients_agree_and_sum_to_that_of_the_batch(loss: nn.Module, y: Tensor) -> None:
    model, X = mlp(), samples(6)
    rows = reference.sample_gradients(model, values(model), loss, X, y)
    singly = reference.sample_gradients_from_losses(model, values(model), loss, X, y)
    torch.testing.assert_close(rows, singly, rtol=0, atol=EXACT)
    torch.testing.assert_close(rows.sum(0), batch_gradient(model, loss, X, y), rtol=0, atol=EXACT)


def test_sample_gradients_of_a_class_weighted_mean() -> None:
    model, X, y = mlp().float(), samples(6).float(), labels(6)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]))
    rows = reference.sample_gradients(model, values(model), loss, X, y)
    weights = loss.weight[y].double() / loss.weight[y].sum()
    unweighted = nn.CrossEntropyLoss(reduction="sum")
    singly = reference.sample_gradients_from_losses(model, values(model), unweighted, X, y)
    torch.testing.assert_close(rows, weights[:, None] * singly, rtol=0, atol=EXACT)


def test_reduction_of_a_plain_function_has_to_be_said() -> None:
    model, X, y = mlp(), samples(6), labels(6)
    arguments = (model, values(model), lambda z, t: nn.functional.cross_entropy(z, t), X, y)
    with pytest.raises(ValueError, match=r'reduction of the loss is None.*Write `reduction="mean"`'):
        reference.sample_gradients_from_losses(*arguments)
    torch.testing.assert_close(
        reference.sample_gradients_from_losses(*arguments, reduction="mean"),
        reference.sample_gradients(*arguments),
        rtol=0,
        atol=EXACT,
    )


# --- Optimizers ------------------------------------------------------------------------------------------------------


def train_with_torch(
    model: nn.Module, loss: nn.Module, X: Tensor, y: Tensor, optimizer: str, rates: list[float], **hyper: object
) -> tuple[list[Tensor], list[Tensor]]:
    """The path by `torch.optim`, and Adam's second moments on the way."""
    model = copy.deepcopy(model)
    opt = TORCH[optimizer](model.parameters(), **hyper)
    path = [reference.flatten(model, values(model))]
    moments = []
    for ids, rate in zip(BATCHES, rates, strict=True):
        opt.param_groups[0]["lr"] = rate
        opt.zero_grad()
        loss(model(X[ids]), y[ids]).backward()
        opt.step()
        path.append(reference.flatten(model, values(model)))
        if optimizer.startswith("adam"):
            moments.append(torch.cat([opt.state[p]["exp_avg_sq"].flatten() for p in model.parameters()]))
    return path, moments


@pytest.mark.parametrize("schedule", [False, True], ids=["constant", "schedule"])
@pytest.mark.parametrize(("optimizer", "hyper"), OPTIMIZERS, ids=NAMES)
def test_train_is_torch_optim(optimizer: str, hyper: dict[str, object], schedule: bool) -> None:
    model, loss, X, y = mlp(), nn.CrossEntropyLoss(), samples(10), labels(10)
    rates = [hyper["lr"] * (0.7**k if schedule else 1.0) for k in range(len(BATCHES))]
    expected, _ = train_with_torch(model, loss, X, y, optimizer, rates, **hyper)
    path = reference.train(model, loss, X, y, BATCHES, optimizer, **{**hyper, "lr": rates if schedule else rates[0]})
    assert len(path) == len(BATCHES) + 1
    for ours, theirs in zip(path, expected, strict=True):
        torch.testing.assert_close(reference.flatten(model, ours), theirs, rtol=0, atol=EXACT)


@pytest.mark.parametrize("optimizer", TORCH)
def test_defaults_are_those_of_torch_optim(optimizer: str) -> None:
    model, loss, X, y = mlp(), nn.CrossEntropyLoss(), samples(10), labels(10)
    rates = [TORCH[optimizer](model.parameters()).defaults["lr"]] * len(BATCHES)
    expected, _ = train_with_torch(model, loss, X, y, optimizer, rates)
    path = reference.train(model, loss, X, y, BATCHES, optimizer)
    torch.testing.assert_close(reference.flatten(model, path[-1]), expected[-1], rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    ("optimizer", "hyper", "message"),
    [
        ("lion", {}, r"Unknown optimizer 'lion'; expected one of \['adagrad'"),
        ("sgd", {"beta": 0.9}, r"Unknown hyperparameters \['beta'\] of 'sgd'; expected some of \['dampening'"),
        ("sgd", {"nesterov": True}, r"needs a momentum and no dampening. Write `momentum=0.9"),
        ("adam", {"lr": [0.1, 0.2]}, r"`lr` has 2 values for 6 batches"),
    ],
)
def test_train_refuses(optimizer: str, hyper: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference.train(mlp(), nn.CrossEntropyLoss(), samples(10), labels(10), BATCHES, optimizer, **hyper)


# --- The decomposition -----------------------------------------------------------------------------------------------


def run(activation: type[nn.Module], optimizer: str, rule: object, **hyper: object) -> reference.Decomposition:
    return reference.decompose(
        mlp(activation),
        nn.CrossEntropyLoss(),
        samples(10),
        labels(10),
        BATCHES,
        optimizer,
        samples(3, seed=2),
        [0, 2, 1],
        rule,
        **hyper,
    )


@pytest.mark.parametrize(("optimizer", "hyper"), OPTIMIZERS, ids=NAMES)
def test_decomposition_is_complete(optimizer: str, hyper: dict[str, object]) -> None:
    smooth = run(nn.Tanh, optimizer, reference.gauss_legendre(8), **hyper)
    kinked = run(nn.ReLU, optimizer, "discrete", **hyper)
    for result, tolerance in [(smooth, QUADRATURE), (kinked, COMPLETE)]:
        torch.testing.assert_close(
            result.initial + result.shares.sum(1) + result.weight_decay, result.final, rtol=0, atol=tolerance
        )
        assert result.residual.abs().max() < tolerance
        assert result.shares.shape == (3, 10)
        assert (result.final - result.initial).abs().max() > 1e-3
        decays = hyper.get("weight_decay", 0.01 if optimizer == "adamw" else 0.0) > 0
        assert (result.weight_decay.abs() > 0).all() if decays else (result.weight_decay == 0).all()


def test_gauss_legendre_stalls_at_a_kink_and_the_discrete_gradient_does_not() -> None:
    # without this, completeness on ReLU could be a run that never crossed a kink
    assert run(nn.ReLU, "sgd", reference.gauss_legendre(8), lr=0.1).residual.abs().max() > 1e-4
    assert run(nn.ReLU, "sgd", "discrete", lr=0.1).residual.abs().max() < COMPLETE


def test_end_points_are_those_of_the_network() -> None:
    result = run(nn.Tanh, "sgd", reference.left, lr=0.1)
    expected, _ = train_with_torch(
        mlp(), nn.CrossEntropyLoss(), samples(10), labels(10), "sgd", [0.1] * len(BATCHES), lr=0.1
    )
    for value, theta in [(result.initial, expected[0]), (result.final, expected[-1])]:
        outputs = outputs_at(mlp(), theta, samples(3, seed=2))
        torch.testing.assert_close(value, outputs[[0, 1, 2], [0, 2, 1]].detach(), rtol=0, atol=EXACT)


def test_one_output_for_all_queries() -> None:
    arguments = (mlp(), nn.CrossEntropyLoss(), samples(10), labels(10), BATCHES, "sgd", samples(3, seed=2))
    one = reference.decompose(*arguments, 1, reference.left)
    several = reference.decompose(*arguments, [1, 1, 1], reference.left)
    assert torch.equal(one.shares, several.shares)


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown rule 'simpson'.*Write `gauss_legendre\(8\)`"):
        run(nn.Tanh, "sgd", "simpson")


def unrolled(optimizer: str, weights_of: object, **hyper: object) -> tuple[Tensor, Tensor]:
    """Shares as the explicit double sum Σ_s Σ_{r≤s} q_s · A_{s,r} c_{r,i} g_{r,i}, A given as vectors (P,)."""
    model, loss, X, y, queries = mlp(), nn.CrossEntropyLoss(), samples(10), labels(10), samples(3, seed=2)
    path, moments = train_with_torch(model, loss, X, y, optimizer, [hyper["lr"]] * len(BATCHES), **hyper)
    points = [reference.unflatten(model, theta) for theta in path]
    shares, decay = torch.zeros(3, 10, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for s, r in itertools.product(range(len(BATCHES)), repeat=2):
        if r > s:
            continue
        A = weights_of(s, r, moments)
        for q, (x, c) in enumerate(zip(queries, [0, 2, 1], strict=True)):
            u = A * reference.average_gradient(model, points[s], points[s + 1], x, c, reference.gauss_legendre(8))
            for i in BATCHES[r]:  # an id that occurs twice is visited twice
                single = reference.sample_gradients_from_losses(model, points[r], loss, X[i : i + 1], y[i : i + 1])[0]
                shares[q, i] += u @ single / len(BATCHES[r])
            if optimizer == "sgd":
                decay[q] += u @ (hyper["weight_decay"] * path[r])
            elif r == s:
                decay[q] += -hyper["lr"] * hyper["weight_decay"] * (u / A) @ path[s]
    return shares, decay


def test_nesterov_shares_are_the_unrolled_sum() -> None:
    lr, mu = 0.05, 0.9
    hyper = {"lr": lr, "momentum": mu, "nesterov": True, "weight_decay": 0.05}
    expected, decay = unrolled("sgd", lambda s, r, _: -lr * ((1.0 if r == s else 0.0) + mu ** (s - r + 1)), **hyper)
    result = run(nn.Tanh, "sgd", reference.gauss_legendre(8), **hyper)
    torch.testing.assert_close(result.shares, expected, rtol=0, atol=EXACT)
    torch.testing.assert_close(result.weight_decay, decay, rtol=0, atol=EXACT)


def test_adamw_shares_are_the_unrolled_sum_with_the_denominators_of_torch() -> None:
    lr, (b1, b2), eps = 0.01, (0.8, 0.95), 1e-6
    hyper = {"lr": lr, "betas": (b1, b2), "eps": eps, "weight_decay": 0.3}

    def weights_of(s: int, r: int, moments: list[Tensor]) -> Tensor:
        D = (moments[s] / (1 - b2 ** (s + 1))).sqrt() + eps
        return -lr * (1 - b1) * b1 ** (s - r) / (1 - b1 ** (s + 1)) / D

    expected, decay = unrolled("adamw", weights_of, **hyper)
    result = run(nn.Tanh, "adamw", reference.gauss_legendre(8), **hyper)
    torch.testing.assert_close(result.shares, expected, rtol=0, atol=10 * EXACT)
    torch.testing.assert_close(result.weight_decay, decay, rtol=0, atol=10 * EXACT)


# --- The closed form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("n", [3, 10], ids=["regular", "singular"])
def test_closed_form_is_gradient_descent_of_a_linear_model(n: int, reduction: str) -> None:
    # 4 inputs and a bias: the kernel has rank 5, so it is regular for 3 samples and singular for 10
    torch.manual_seed(0)
    model, X, y, queries = nn.Linear(4, 2).double(), samples(n), samples(n, seed=5)[:, :2], samples(3, seed=2)
    lr, steps = {"mean": 0.1, "sum": 0.01}[reduction], 30
    path = reference.train(model, nn.MSELoss(reduction=reduction), X, y, [list(range(n))] * steps, "sgd", lr=lr)

    def kernel(Y: Tensor) -> Tensor:
        return reference.tangent_kernel(model, values(model), Y, X)[:, :, 0, 0]

    outputs = [torch.stack([outputs_at(model, reference.flatten(model, p), Z) for p in path]) for Z in (X, queries)]
    f0, f0_query = outputs[0][0], outputs[1][0]
    eta = 2 * lr / (n * 2) if reduction == "mean" else 2 * lr
    for Z, start, actual in [(X, f0, outputs[0]), (queries, f0_query, outputs[1])]:
        closed = reference.linear_least_squares_path(kernel(X), kernel(Z), y, f0, start, eta, steps)
        torch.testing.assert_close(closed, actual.detach(), rtol=0, atol=COMPLETE)
        one = reference.linear_least_squares_path(kernel(X), kernel(Z), y[:, 1], f0[:, 1], start[:, 1], eta, steps)
        torch.testing.assert_close(one, actual[..., 1].detach(), rtol=0, atol=COMPLETE)


def test_closed_form_is_the_formula_as_written() -> None:
    A = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    K, K_query, identity = A @ A.T, samples(3) @ A @ A.T, torch.eye(4, dtype=torch.float64)
    y, f0, f0_query, eta, t = samples(1)[0], samples(2)[1], samples(3)[:, 0], 1.5 / torch.linalg.norm(K, 2).item(), 7
    power = torch.linalg.matrix_power(identity - eta * K, t)
    expected = f0_query + K_query @ torch.linalg.solve(K, (identity - power) @ (y - f0))
    path = reference.linear_least_squares_path(K, K_query, y, f0, f0_query, eta, t)
    assert path.shape == (8, 3)
    torch.testing.assert_close(path[-1], expected, rtol=0, atol=COMPLETE)


def test_closed_form_is_the_sum_of_shares_for_one_linear_step_at_a_time() -> None:
    # plain descent on a linear model: share_i = −η Σ_t K(x, x_i) (f_t(x_i) − y_i), with both from the closed form
    torch.manual_seed(0)
    model, X, y, queries = nn.Linear(4, 1).double(), samples(6), samples(6, seed=5)[:, 0], samples(2, seed=2)
    lr, steps, loss = 0.05, 12, nn.MSELoss(reduction="sum")
    result = reference.decompose(
        model, loss, X, y[:, None], [list(range(6))] * steps, "sgd", queries, 0, reference.left, lr=lr
    )
    K, K_query = ((Z @ X.T + 1) for Z in (X, queries))
    f0 = model(X)[:, 0].detach()
    f = reference.linear_least_squares_path(K, K, y, f0, f0, 2 * lr, steps)
    expected = -2 * lr * K_query * (f[:-1] - y).sum(0)
    torch.testing.assert_close(result.shares, expected, rtol=0, atol=COMPLETE)
