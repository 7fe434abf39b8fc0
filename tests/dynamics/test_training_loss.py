"""The training loss as a function of θ: its derivatives, what is proved before blocks are used, and what stays."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from dynamical import data, network
from tolerances import TOLERANCES
from torch import Tensor, nn

from pathkernel import reference
from pathkernel.dynamics import gradient_flow
from pathkernel.dynamics.training_loss import TrainingLoss
from pathkernel.errors import InputError

DOUBLE = TOLERANCES[torch.float64]
WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 2.0]))


def classes(model: nn.Module, loss: nn.Module, block: int = 4096) -> TrainingLoss:
    X = torch.randn(10, 3, generator=torch.Generator().manual_seed(2))
    return TrainingLoss.of(model, loss, (X, torch.arange(10) % 3), block=block)


def classifier(*middle: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 3))


def test_derivatives_are_those_of_the_dense_oracle() -> None:
    model, (X, y) = network(), data()
    loss = TrainingLoss.of(model, nn.MSELoss(), (X, y))
    theta = loss.initial + 0.1
    g, H = reference.gradient_and_hessian(model, theta, nn.MSELoss(), X, y)
    v = torch.linspace(-1, 1, len(theta), dtype=torch.float64)
    value, gradient = loss.value_and_gradient(theta)
    torch.testing.assert_close(gradient, g, rtol=DOUBLE.rounding, atol=DOUBLE.rounding)
    torch.testing.assert_close(loss.gradient(theta), g, rtol=DOUBLE.rounding, atol=DOUBLE.rounding)
    assert float(value) == pytest.approx(float(loss.value(theta)), rel=DOUBLE.rounding)
    again, product = loss.products(theta, v)
    torch.testing.assert_close(again, g, rtol=DOUBLE.rounding, atol=DOUBLE.rounding)
    torch.testing.assert_close(product, H @ v, rtol=DOUBLE.gradient, atol=DOUBLE.gradient)
    # T(v, v) = d/dε of ∇(v·H v) is what H v changes by along v.
    step = 1e-5
    ahead, behind = (reference.gradient_and_hessian(model, theta + s * v, nn.MSELoss(), X, y)[1] for s in (step, -step))
    product, third = loss.third_products(theta, v)
    torch.testing.assert_close(product, H @ v, rtol=DOUBLE.gradient, atol=DOUBLE.gradient)
    torch.testing.assert_close(third, (ahead - behind) @ v / (2 * step), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_blocks_add_up_to_the_whole(reduction: str) -> None:
    loss = nn.CrossEntropyLoss(reduction=reduction)
    whole, cut = classes(classifier(), loss), classes(classifier(), loss, block=4)
    assert len(cut.parts) == 3 and len(whole.parts) == 1
    v = torch.ones_like(whole.initial)
    for one, other in zip(whole.products(whole.initial, v), cut.products(whole.initial, v), strict=True):
        torch.testing.assert_close(one, other, rtol=DOUBLE.gradient, atol=DOUBLE.gradient)


def hinged(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that couples samples, by a term that is 0 where outputs are small."""
    return nn.functional.cross_entropy(outputs, targets) + (outputs.mean().abs() - 0.2).clamp_min(0)


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (classifier(), WEIGHTED),
        (classifier(), hinged),
        (classifier(nn.BatchNorm1d(4)), nn.CrossEntropyLoss()),
    ],
    ids=["class weights", "a term of the whole batch", "BatchNorm in training"],
)
def test_samples_that_are_coupled_go_through_at_once(model: nn.Module, loss: nn.Module) -> None:
    at_once, asked = classes(model, loss), classes(model, loss, block=4)
    assert asked.parts == at_once.parts == [(slice(0, 10), 1.0)]
    torch.testing.assert_close(asked.gradient(asked.initial), at_once.gradient(asked.initial))


def test_batch_norm_in_evaluation_is_cut() -> None:
    assert len(classes(classifier(nn.BatchNorm1d(4)).eval(), nn.CrossEntropyLoss(), block=4).parts) == 3


def test_it_is_the_loss_of_the_model_as_it_stands_in_float64() -> None:
    X, y = torch.randn(10, 3, generator=torch.Generator().manual_seed(2)), torch.arange(10) % 3
    model = classifier(nn.BatchNorm1d(4))
    loss = TrainingLoss.of(model, WEIGHTED, (X, y))
    assert loss.initial.dtype == torch.float64
    double = copy.deepcopy(model).double()
    expected = nn.functional.cross_entropy(double(X.double()), y, weight=WEIGHTED.weight.double())
    assert float(loss.value(loss.initial)) == pytest.approx(expected.item(), rel=DOUBLE.rounding)
    assert WEIGHTED.weight.dtype == torch.float32


def test_a_flow_leaves_everything_as_it_was() -> None:
    model = classifier(nn.BatchNorm1d(4))
    model[1].eval()
    X, y = torch.randn(10, 3, generator=torch.Generator().manual_seed(2)), torch.arange(10) % 3
    before = copy.deepcopy(model.state_dict()), [child.training for child in model.modules()], X.clone()
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    model.get_parameter("0.weight").grad = torch.ones(4, 3)
    gradient_flow(model, WEIGHTED, (X, y), 0.1, points=3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name]), name
    assert [child.training for child in model.modules()] == before[1]
    assert torch.equal(X, before[2]) and torch.equal(model[0].weight.grad, torch.ones(4, 3))
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])


def test_a_loss_of_one_number_per_sample_is_reduced_as_asked() -> None:
    per_sample = nn.CrossEntropyLoss(reduction="none")
    X, y = torch.randn(10, 3), torch.arange(10) % 3
    mean, total = (TrainingLoss.of(classifier(), per_sample, (X, y), reduction=kind) for kind in ("mean", "sum"))
    torch.testing.assert_close(10 * mean.gradient(mean.initial), total.gradient(mean.initial))


class Weighted(nn.Module):
    """A loss with a parameter of its own, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.scale * nn.functional.mse_loss(outputs, targets)


def test_a_loss_with_parameters_of_its_own_is_taken_as_it_stands() -> None:
    own, (X, y) = Weighted(), data()
    loss, plain = (TrainingLoss.of(network(), one, (X, y)) for one in (own, nn.MSELoss()))
    scale = own.scale.detach().double()
    torch.testing.assert_close(loss.gradient(loss.initial), scale * plain.gradient(plain.initial))
    assert own.scale.dtype == torch.float32 and own.scale.requires_grad and own.scale.grad is None


def test_no_more_than_a_block_goes_through_at_once() -> None:
    seen: list[int] = []
    model = network()
    model.register_forward_hook(lambda module, inputs, outputs: seen.append(len(inputs[0])))
    loss = TrainingLoss.of(model, nn.MSELoss(), data(), block=3)
    loss.check_evaluation(loss.initial)
    assert max(seen) == 3


def test_token_ids_stay_integers_and_unused_parameters_have_no_gradient() -> None:
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(4, 1))
    model.unused = nn.Parameter(torch.ones(3))
    ids = torch.tensor([[0, 1], [2, 3], [1, 1]])
    loss = TrainingLoss.of(model, nn.MSELoss(), (ids, torch.ones(3, 1)))
    gradient = loss.function.layout.unflatten(loss.gradient(loss.initial))
    assert gradient["0.weight"][4].abs().sum() == gradient["unused"].abs().sum() == 0 < gradient["2.weight"].abs().sum()


def test_what_has_no_flow_is_refused() -> None:
    X, y = data()
    with pytest.raises(InputError, match=r"no parameter that requires gradients.*model.requires_grad_\(True\)"):
        gradient_flow(nn.Sequential(nn.Tanh()), nn.MSELoss(), (X, y))
    with pytest.raises(InputError, match=r"draws random numbers.*model.eval\(\)"):
        gradient_flow(nn.Sequential(nn.Linear(3, 20), nn.Dropout(), nn.Linear(20, 1)), nn.MSELoss(), (X, y))
    with pytest.raises(InputError, match=r"the network fails in `Linear\(in_features=3.*samples of shape \(n, …, 3\)"):
        gradient_flow(network(), nn.MSELoss(), (X[:, :2], y))
    with pytest.raises(InputError, match="an instance of a module, or a function"):
        gradient_flow(network(), nn.MSELoss, (X, y))
