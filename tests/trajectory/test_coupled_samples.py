"""Samples of a batch that is run together: forward sweeps against rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.gradients.losses import coupled_rows
from pathkernel.gradients.pushed_shares import pushed_shares
from pathkernel.kernel_machine.forms import AverageForm
from pathkernel.runtime.allocations import Allocations
from pathkernel.trajectory.coupled_samples import ALWAYS_ROWS, CoupledSamples, SweepCosts
from pathkernel.trajectory.stage_gradients import Passes
from pathkernel.trajectory.step import Step

D = torch.float64


class Centred(nn.Module):
    """A layer that centres the batch in training, which no class of torch's says."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if self.training else x


class Tokens(nn.Module):
    """Tokens, one of which autograd gives no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 130, padding_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x.abs().mul(3).long().clamp_max(8)).mean(1)


class _Twice(torch.autograd.Function):
    """Doubles, and says backward so, but has no rule for differentiating forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x.roll(0, 0)  # of which a dual pass has no rule

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return 2 * gradients[0]


class _Mistaken(torch.autograd.Function):
    """Doubles, and takes other samples' tangents forward."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x.roll(0, 0)  # of which a dual pass has no rule

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return 2 * gradients[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return 2 * tangents[0].roll(1, 0)


class Applied(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def network(*middle: nn.Module) -> nn.Module:
    """More numbers in the rows of 64 samples than are formed without asking."""
    # Without a bias before normalisation, whose gradient is rounding, by the size of which Adam would divide.
    return nn.Sequential(
        nn.Linear(6, 130, bias=False), *middle, nn.Tanh(), nn.Linear(130, 130), nn.Tanh(), nn.Linear(130, 3)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: network(),
    "batch norm": lambda: network(nn.BatchNorm1d(130)),
    "batch norm and dropout": lambda: network(nn.BatchNorm1d(130), nn.Dropout(0.3)),
    "centred": lambda: nn.Sequential(network(Centred()), nn.BatchNorm1d(3, momentum=None)),
    "tokens": lambda: nn.Sequential(Tokens(), nn.BatchNorm1d(130), *list(network())[1:]),
    "no forward rule": lambda: network(nn.BatchNorm1d(130), Applied(_Twice)),
    "a mistaken forward rule": lambda: network(nn.BatchNorm1d(130), Applied(_Mistaken)),
}

COUPLED = ("batch norm", "batch norm and dropout", "centred")

ONLY_ROWS = ("tokens", "no forward rule", "a mistaken forward rule")

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def recorded(
    name: str = "batch norm",
    optimizer: str = "momentum",
    dtype: torch.dtype = D,
    clip: float = 0.0,
    mixed: bool = False,
) -> tuple[pk.Trajectory, Tensor]:
    torch.manual_seed(0)
    model = NETWORKS[name]().to(dtype)
    X, y = torch.randn(192, 6, dtype=dtype), torch.randint(3, (192,))
    made, loss = OPTIMIZERS[optimizer](model.parameters()), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, made, loss, data=(X, y)) as recorder:
        for ids in torch.arange(192).split(64):
            made.zero_grad()
            if mixed:
                pairs = torch.stack([ids, ids.roll(5)], dim=1)
                parts = torch.tensor([0.7, 0.3]).expand(64, 2)
                x = 0.7 * X[ids] + 0.3 * X[ids.roll(5)]
                recorder.announce(pairs, inputs=x, weights=parts)
                z = model(x)
                (0.7 * loss(z, y[ids]) + 0.3 * loss(z, y[ids.roll(5)])).backward()
            else:
                x, target = recorder.batch(ids)
                loss(model(x), target).backward()
            if clip:
                nn.utils.clip_grad_value_(model.parameters(), clip)
            made.step()
    return recorder.trajectory, X[:5]


def always_forward(self: SweepCosts, samples: int, directions: int, width: int) -> bool:
    return not self.refused


def explained(trajectory: pk.Trajectory, X: Tensor, **options: Any) -> tuple[pk.Attributions, SweepCosts | None]:
    machine = pk.KernelMachine(trajectory)
    why = machine.explain(X, outputs=0, **options)
    costs = list(machine._recorded.batches.sweeps.costs.values())
    return why, costs[0] if costs else None


def samples_of_step(trajectory: pk.Trajectory, width: int) -> tuple[CoupledSamples, Step]:
    machine, step = pk.KernelMachine(trajectory), next(iter(trajectory.steps()))
    batches = machine._recorded.batches
    passes = Passes(64, directions=1, width=width)
    (own,) = batches.by_sample(step, step.before, passes)
    assert isinstance(own, CoupledSamples)
    return own, step


# -- one batch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("width", [1, 3])
def test_a_forward_sweep_gives_the_products_of_all_rows(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SweepCosts, "forward_pays", always_forward)
    trajectory, _ = recorded(name)
    own, _ = samples_of_step(trajectory, width)
    directions = torch.randn(7, trajectory.layout.size, dtype=D)
    rows = coupled_rows(own.function, own.point, own.inputs, own.cotangents)
    expected = rows @ directions.T
    assert len(own) == 64
    torch.testing.assert_close(own.products(directions), expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    torch.testing.assert_close(own.total(), rows.sum(dim=0), rtol=1e-10, atol=1e-14)
    assert own.split_error() < 1e-12


@pytest.mark.parametrize("name", ONLY_ROWS)
def test_a_forward_sweep_that_is_not_the_rows_products_is_refused(name: str) -> None:
    trajectory, _ = recorded(name)
    machine, step = pk.KernelMachine(trajectory), next(iter(trajectory.steps()))
    batches = machine._recorded.batches
    (rows,) = batches.by_sample(step, step.before, Passes(64, directions=1))
    assert not isinstance(rows, CoupledSamples)
    (costs,) = batches.sweeps.costs.values()
    assert costs.refused and not costs.forward_pays(64, 1, 16)


def test_a_sweep_that_goes_wrong_later_is_seen_by_the_gradient_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, _ = recorded()
    monkeypatch.setattr(SweepCosts, "forward_pays", always_forward)
    own, _ = samples_of_step(trajectory, 4)
    directions = torch.randn(4, trajectory.layout.size, dtype=D)
    expected = own.products(directions)
    assert own.costs.proved == {4} and own.costs.used
    pushed = pushed_shares

    def broken(*arguments: Any) -> Tensor:
        found = pushed(*arguments)
        assert found is not None
        return found * 1.001

    monkeypatch.setattr("pathkernel.trajectory.coupled_samples.pushed_shares", broken)
    found = own.products(directions)
    assert own.costs.refused
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_sweeps_in_use_are_certified_along_the_directions_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, X = recorded()
    monkeypatch.setattr(SweepCosts, "forward_pays", always_forward)
    measured = CoupledSamples.split_error
    asked = []
    monkeypatch.setattr(CoupledSamples, "split_error", lambda own: asked.append(own) or measured(own))
    machine = pk.KernelMachine(trajectory)
    why = machine.explain(X, outputs=0)
    assert len(asked) == 1  # before the first sweep is used
    assert machine._recorded.certificate.batches == 2 and 0 < why.split_error < 1e-12


def test_a_sweep_in_use_that_is_found_wrong_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, X = recorded()
    expected = pk.KernelMachine(trajectory, engine="autograd").explain(X, outputs=0)
    monkeypatch.setattr(SweepCosts, "forward_pays", always_forward)
    along = CoupledSamples.pushed

    def broken(own: CoupledSamples, directions: Tensor, width: int) -> Tensor | None:
        found = along(own, directions, width)
        return found * 1.001 if found is not None and own.costs.used else found

    monkeypatch.setattr(CoupledSamples, "pushed", broken)
    why, costs = explained(trajectory, X)
    assert costs is not None and costs.refused
    np.testing.assert_allclose(why.shares, expected.shares, rtol=0, atol=1e-12)
    assert why.split_error < 1e-12


def test_the_cheaper_way_is_taken() -> None:
    costs = SweepCosts()
    assert costs.forward_pays(50, 8, 16)  # and measured
    costs.note_reverse(3.0)
    costs.note_reverse(2.0)
    assert costs.reverse == 2.0
    costs.note_forward(24.0, 8)
    assert costs.forward == {8: 3.0}
    assert costs.forward_pays(50, 8, 8) and costs.forward_pays(50, 33, 8) and not costs.forward_pays(50, 34, 8)
    assert costs.forward_pays(50, 3, 8) and not costs.forward_pays(4, 3, 8)  # by the width that is known
    costs.refused = True
    assert not costs.forward_pays(50, 1, 8)


def test_more_directions_than_were_tried_are_tried_where_they_might_pay() -> None:
    costs = SweepCosts(reverse=1.0)
    costs.note_forward(3.0, 3)
    assert costs.forward_pays(50, 50, 3) and not costs.forward_pays(50, 51, 3)
    assert costs.forward_pays(50, 80, 16) and not costs.forward_pays(50, 90, 16)
    costs.note_forward(16.0, 16)
    assert not costs.forward_pays(50, 80, 16)


def test_sweeps_are_timed_while_rows_are_formed() -> None:
    trajectory, _ = recorded()
    step, batches = next(iter(trajectory.steps())), pk.KernelMachine(trajectory)._recorded.batches
    (own,) = batches.by_sample(step, step.before, Passes(64, directions=1))
    assert isinstance(own, CoupledSamples)
    own.costs.reverse, own.costs.forward = 0.0, {1: 1.0}
    (rows,) = batches.by_sample(step, step.before, Passes(64, directions=1))
    assert not isinstance(rows, CoupledSamples) and own.costs.reverse == 0.0
    own.costs.reverse = math.nan
    own.costs.refused = True
    next(batches.by_sample(step, step.before, Passes(64, directions=1)))
    assert 0 < own.costs.reverse < 60


def test_many_directions_are_met_by_rows_once_that_is_known_to_take_less() -> None:
    trajectory, _ = recorded()
    own, _ = samples_of_step(trajectory, 2)
    own.costs.reverse = 0.0
    directions = torch.randn(5, trajectory.layout.size, dtype=D)
    own.costs.forward[2] = 1.0
    assert math.isfinite(own.costs.reverse)
    found = own.products(directions)
    assert not own.costs.used
    expected = coupled_rows(own.function, own.point, own.inputs, own.cotangents) @ directions.T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_a_reverse_sweep_that_was_held_up_is_measured_again() -> None:
    trajectory, _ = recorded()
    own, _ = samples_of_step(trajectory, 2)
    own.costs.reverse, own.costs.forward[2] = 1e6, 1e3
    assert own.costs.forward_pays(64, 5, 2)
    vars(own).pop("_total")  # as of another step
    own.total()
    assert own.costs.reverse < 60 and not own.costs.forward_pays(64, 5, 2)


# -- explanations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*COUPLED, *ONLY_ROWS])
def test_shares_are_those_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, X = recorded(name)
    expected = pk.KernelMachine(trajectory, engine="autograd").explain(X, outputs=0)
    monkeypatch.setattr(SweepCosts, "forward_pays", always_forward)
    why, costs = explained(trajectory, X)
    assert costs is not None and costs.used is (name not in ONLY_ROWS)
    assert why.engine == "autograd" and why.split_error < 1e-12
    np.testing.assert_allclose(why.shares, expected.shares, rtol=0, atol=1e-12)
    assert abs(why.residual).max() < 1e-12


@pytest.mark.parametrize(("optimizer", "clip", "mixed"), [("sgd", 0, False), ("adam", 1e-3, False), ("adam", 0, True)])
def test_whatever_happens_to_gradients_happens_to_pushed_ones(
    optimizer: str, clip: float, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory, X = recorded(optimizer=optimizer, clip=clip, mixed=mixed)
    expected = pk.KernelMachine(trajectory, engine="autograd").explain(X, outputs=0, by="step")
    monkeypatch.setattr(SweepCosts, "forward_pays", always_forward)
    why, costs = explained(trajectory, X, by="step")
    assert costs is not None and costs.used
    np.testing.assert_allclose(why.shares, expected.shares, rtol=0, atol=1e-12)
    np.testing.assert_allclose(why.steps, expected.steps, rtol=0, atol=1e-12)
    for channel, values in expected.channels.items():
        np.testing.assert_allclose(why.channels[channel], values, rtol=0, atol=1e-12)


def test_in_single_precision_they_agree_to_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, X = recorded(dtype=torch.float32)
    expected = pk.KernelMachine(trajectory, engine="autograd").explain(X, outputs=0)
    monkeypatch.setattr(SweepCosts, "forward_pays", always_forward)
    why, costs = explained(trajectory, X)
    assert costs is not None and costs.used and why.split_error < 1e-4
    np.testing.assert_allclose(why.shares, expected.shares, rtol=0, atol=1e-5 * abs(expected.shares).max())


def test_shares_of_modules_are_made_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, X = recorded()
    monkeypatch.setattr(SweepCosts, "forward_pays", always_forward)
    why, costs = explained(trajectory, X, by="module")
    assert costs is None
    np.testing.assert_allclose(sum(why.modules.values()), why.shares, rtol=0, atol=1e-12)


def test_few_numbers_are_always_met_by_rows() -> None:
    """The last bits of the shares of a small run do not depend on a clock."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    X, y = torch.randn(24, 4), torch.randint(3, (24,))
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.2), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for x, target in recorder.batches(8):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    assert 8 * recorder.trajectory.layout.size < ALWAYS_ROWS
    assert explained(recorder.trajectory, X[:2])[1] is None


# -- forms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["average", "ensemble"])
@pytest.mark.parametrize("name", ["plain", "batch norm", "tokens"])
def test_forms_are_made_of_the_sweeps_that_shares_are_made_of(name: str, form: str) -> None:
    """Where forward sweeps are the rows' products; else of both, as each is."""
    trajectory, X = recorded(name, "adam")
    machine = pk.KernelMachine(trajectory, form=form)
    why = machine.explain(X, outputs=0)
    (costs,) = machine._recorded.batches.sweeps.costs.values()
    assert costs.used is (name != "tokens") and costs.refused is (name == "tokens")
    expected = pk.KernelMachine(trajectory, engine="autograd").explain(X, outputs=0)
    np.testing.assert_allclose(why.shares, expected.shares, rtol=0, atol=1e-12)
    assert why.form is not None
    if name == "tokens":  # the derivative of the padding token, which autograd leaves out, is in the kernel alone
        return
    np.testing.assert_allclose(why.form.shares, why.shares, rtol=0, atol=1e-12)
    assert why.split_error < 1e-12


def test_a_form_whose_shares_are_split_by_module_is_the_same() -> None:
    trajectory, X = recorded("plain")
    machine = pk.KernelMachine(trajectory, form="average")
    whole, split = machine.explain(X, outputs=0), machine.explain(X, outputs=0, by="module")
    assert isinstance(whole.form, AverageForm) and isinstance(split.form, AverageForm)
    np.testing.assert_allclose(split.form.denominator, whole.form.denominator, rtol=0, atol=1e-12)
    np.testing.assert_allclose(sum(split.modules.values()), whole.shares, rtol=0, atol=1e-12)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_as_many_directions_are_pushed_at_once_as_the_budget_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, _ = recorded(dtype=torch.float32)
    X = torch.randn(24, 6)
    monkeypatch.setattr(SweepCosts, "forward_pays", always_forward)
    widths = []
    expected = None
    for memory in (1_000_000_000, 40_000_000, 32_000_000, 28_000_000):
        machine = pk.KernelMachine(trajectory, memory=memory)
        with Allocations() as allocations:
            why = machine.explain(X, outputs=0)
        assert allocations.peak - why.shares.nbytes <= memory
        costs = list(machine._recorded.batches.sweeps.costs.values())
        widths.append(max(costs[0].proved, default=0) if costs else 0)
        expected = why.shares if expected is None else expected
        np.testing.assert_allclose(why.shares, expected, rtol=0, atol=1e-5 * abs(expected).max())
    assert widths[0] == 16 and widths == sorted(widths, reverse=True) and widths[-1] < 16


def test_rows_are_made_once_for_all_queries_where_weights_lie_in_the_memory() -> None:
    """The weights of a step with momentum are its memory's cotangents: with a part of the rows, they fit at once."""
    trajectory, _ = recorded(dtype=torch.float32)
    X = torch.randn(160, 6, generator=torch.Generator().manual_seed(1))
    roomy, tight = (pk.KernelMachine(trajectory, memory=memory) for memory in (400_000_000, 48_000_000))
    expected = roomy.explain(X, outputs=0)
    with Allocations() as allocations:
        why = tight.explain(X, outputs=0)
    assert allocations.peak - why.shares.nbytes <= 48_000_000
    (plan,) = (plan for kind, plan in tight._plans._plans[1].items() if kind[0] == "backward")
    assert plan.queries == 160 and plan.cuts.batch.streamed
    np.testing.assert_allclose(why.shares, expected.shares, rtol=0, atol=1e-5 * abs(expected.shares).max())
    assert why.split_error < 1e-4
