"""Averaged networks explained exactly: every share is the same filter of the path that made the average."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from cases import generator, make_inputs, make_model
from tolerances import TOLERANCES
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import pathkernel as pk
from pathkernel import errors, reference

CE = nn.CrossEntropyLoss()
SAMPLES = 12
BATCHES = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9, 10, 11), (2, 9), (5, 0, 1, 7), (3, 4, 11))
DECAY = 0.7


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return make_inputs(SAMPLES, dtype=dtype), torch.randint(3, (SAMPLES,), generator=generator(2))


def queries(dtype: torch.dtype = torch.float64) -> Tensor:
    return make_inputs(3, dtype=dtype, seed=8)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Any,
    update: Callable[[int], None],
    after: Callable[[int, pk.KernelRecorder], None] = lambda k, recorder: None,
    dtype: torch.dtype = torch.float64,
) -> pk.Trajectory:
    averages = average if isinstance(average, dict) and "0.weight" not in average else {"ema": average}
    with pk.KernelRecorder(model, optimizer, CE, data=data(dtype), averages=averages, audit_every=1) as recorder:
        for k, ids in enumerate(BATCHES):
            x, y = recorder.batch(list(ids))
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
            after(k, recorder)
            update(k)
    return recorder.trajectory


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


def complete(trajectory: pk.Trajectory, averaged: nn.Module, weights: str = "ema") -> pk.Attributions:
    """Explain output 0, once nothing is left over and the machine says what the live average says."""
    dtype = trajectory.dtype
    machine, X = pk.KernelMachine(trajectory, weights=weights), queries(dtype)
    why = machine.explain(X, outputs=0)
    tolerance = 1e-10 if dtype == torch.float64 else TOLERANCES[torch.float32].residual
    assert why.relative_residual <= tolerance
    averaged.eval()
    with torch.no_grad():
        live = averaged(X).double().numpy()
    np.testing.assert_allclose(why.output, live[:, 0], atol=tolerance)
    np.testing.assert_allclose(why.reconstruction, live[:, 0], atol=tolerance)
    np.testing.assert_allclose(machine.decision_function(X), live, atol=tolerance)
    np.testing.assert_array_equal(machine.predict(X), live.argmax(axis=1))
    assert np.abs(why.channels["rounding"]).max() <= tolerance * np.abs(why.output - why.initial).max()
    return why


# -- what AveragedModel does ------------------------------------------------------------------------------------------

WAYS = {
    "ema": get_ema_multi_avg_fn(DECAY),
    "swa": None,
}


@pytest.mark.parametrize("start", [0, 3], ids=["from the start", "late"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_averaged_model(dtype: torch.dtype, way: str, start: int) -> None:
    model = make_model(dtype=dtype)
    averaged = AveragedModel(model, multi_avg_fn=WAYS[way])
    run = train(
        model,
        adamw(model),
        averaged,
        lambda k: averaged.update_parameters(model) if k >= start else None,
        dtype=dtype,
    )
    taken = [a for a, _ in run.averages["ema"].updates]
    if way == "swa":
        expected = [1 / (k - start + 1) if k >= start else 0.0 for k in range(len(BATCHES))]
    else:
        expected = [0.0] * start + [1.0] + [1 - DECAY] * (len(BATCHES) - start - 1)
    np.testing.assert_allclose(taken, expected, rtol=1e-9 if dtype == torch.float64 else 1e-4)
    complete(run, averaged)


def test_one_average_beside_another_and_the_last_weights() -> None:
    model = make_model()
    ema, swa = AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY)), AveragedModel(model)

    def update(k: int) -> None:
        ema.update_parameters(model)
        if k >= 2:
            swa.update_parameters(model)

    run = train(model, adamw(model), {"ema": ema, "swa": swa}, update)
    one, two = complete(run, ema, "ema"), complete(run, swa, "swa")
    last = pk.KernelMachine(run).explain(queries(), outputs=0)
    np.testing.assert_allclose(last.output, model(queries())[:, 0].detach(), rtol=1e-12)
    assert len({why.shares[0, 0] for why in (one, two, last)}) == 3


# -- against a plain computation --------------------------------------------------------------------------------------


def oracle(run: pk.Trajectory, rate: float, averaged: list[dict[str, Tensor]], filters: np.ndarray) -> np.ndarray:
    """Shares (Q, N) of output 0 of the average under plain gradient descent.

    Move t of the average, from ``averaged[t]`` to ``averaged[t + 1]``, is Σ_s filters[t, s] Δ_s, and every Δ_s is the
    sum of what its samples did.
    """
    X, y = data()
    shares = torch.zeros(len(queries()), SAMPLES, dtype=torch.float64)
    steps = []
    for s, ids in enumerate(BATCHES):
        rows = reference.sample_gradients(run.model, run.parameters(s), CE, X[list(ids)], y[list(ids)])
        size = (SAMPLES, rows.shape[1])
        steps.append(torch.zeros(size, dtype=torch.float64).index_add(0, torch.tensor(ids), -rate * rows))
    for t in range(len(filters)):
        moved = sum(filters[t, s] * steps[s] for s in range(len(BATCHES)))
        for q, x in enumerate(queries()):
            ends = averaged[t], averaged[t + 1]
            shares[q] += moved @ reference.discrete_gradient(run.model, *ends, x, 0)
    return shares.numpy()


def test_shares_of_an_exponential_average_are_those_of_a_plain_computation() -> None:
    model = make_model()
    averaged, seen = copy.deepcopy(model), []
    seen.append({name: p.detach().clone() for name, p in averaged.named_parameters()})

    def update(k: int) -> None:
        with torch.no_grad():
            for mean, p in zip(averaged.parameters(), model.parameters(), strict=True):
                mean.mul_(DECAY).add_(p, alpha=1 - DECAY)
        seen.append({name: p.detach().clone() for name, p in averaged.named_parameters()})

    run = train(model, torch.optim.SGD(model.parameters(), lr=0.1), averaged, update)
    # Θ_t = θ_0 + Σ_{s ≤ t} (1 − β^{t − s + 1}) Δ_s: a move of Θ is the difference of two of these.
    t, s = np.arange(len(BATCHES))[:, None], np.arange(len(BATCHES))[None]
    filters = np.where(s <= t, (1 - DECAY) * DECAY ** np.maximum(t - s, 0), 0.0)
    why = complete(run, averaged)
    np.testing.assert_allclose(why.shares, oracle(run, 0.1, seen, filters), rtol=0, atol=1e-12)


def test_shares_of_an_equal_average_are_those_of_a_plain_computation() -> None:
    model = make_model()
    averaged, seen = AveragedModel(model), []
    seen.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def update(k: int) -> None:
        if k >= 2:
            averaged.update_parameters(model)
            seen.append({name: p.detach().clone() for name, p in averaged.module.named_parameters()})

    run = train(model, torch.optim.SGD(model.parameters(), lr=0.1), averaged, update)
    # The average of θ_3 … θ_{m}: Δ_s is in all of those after it.
    count = len(BATCHES) - 2
    means = np.array(
        [[np.mean([k + 1 > s for k in range(2, 3 + m)]) for s in range(len(BATCHES))] for m in range(count)]
    )
    filters = np.diff(np.vstack([np.zeros(len(BATCHES)), means]), axis=0)
    why = complete(run, averaged)
    np.testing.assert_allclose(why.shares, oracle(run, 0.1, seen, filters), rtol=0, atol=1e-12)


# -- averages that the loop keeps itself ------------------------------------------------------------------------------


def ema_of(average: Mapping[str, Tensor], model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            average[name].lerp_(p, 1 - DECAY)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_dict_of_tensors(dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = train(model, adamw(model), average, lambda k: ema_of(average, model), dtype=dtype)
    live = copy.deepcopy(model)
    live.load_state_dict(average)
    complete(run, live)


def test_an_average_that_began_elsewhere() -> None:
    model = make_model()
    averaged = make_model(seed=5)
    run = train(model, adamw(model), averaged, lambda k: ema_of(dict(averaged.named_parameters()), model))
    why = complete(run, averaged)
    # What it kept of where it began is no sample's doing, nor is the way from there to the untrained network.
    np.testing.assert_allclose(why.channels["initial"], make_model(seed=5)(queries())[:, 0].detach(), rtol=1e-12)
    assert np.abs(why.channels["average"]).max() > 0


def test_an_average_with_a_rate_of_its_own_every_time() -> None:
    model, rates = make_model(), [0.5, 0.0, 0.9, 0.1, 1.0, 0.3]
    average = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update(k: int) -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name].lerp_(p, rates[k])

    run = train(model, adamw(model), average, update)
    np.testing.assert_allclose([a for a, _ in run.averages["ema"].updates], rates, atol=1e-12)
    live = copy.deepcopy(model)
    live.load_state_dict(average)
    complete(run, live)


def test_changes_outside_the_optimizer_reach_the_average_or_not() -> None:
    for first in ("average", "change"):
        model = make_model()
        average = {name: p.detach().clone() for name, p in model.named_parameters()}

        def after(k: int, recorder: pk.KernelRecorder, model=model, average=average, first=first) -> None:
            if first == "average":
                ema_of(average, model)
            with recorder.channel("shrink"), torch.no_grad():
                model[2].weight.mul_(0.8)

        def update(k: int, model=model, average=average, first=first) -> None:
            if first == "change":
                ema_of(average, model)

        run = train(model, adamw(model), average, update, after)
        assert [changed for _, changed in run.averages["ema"].updates] == [first == "change"] * len(BATCHES)
        live = copy.deepcopy(model)
        live.load_state_dict(average)
        why = complete(run, live)
        assert np.abs(why.channels["shrink"]).max() > 1e-3


# -- buffers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_buffers", [False, True])
def test_buffers_of_the_average_are_its_own(use_buffers: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)
        model = nn.Sequential(*layers).double().train()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=use_buffers)
    run = train(model, adamw(model), averaged, lambda k: averaged.update_parameters(model))
    model.eval()
    copied = torch.equal(averaged.module[1].running_mean, model[1].running_mean)
    assert copied != use_buffers  # else they are averaged as the parameters are
    complete(run, averaged)
    last = pk.KernelMachine(run)
    np.testing.assert_allclose(last.decision_function(queries()), model(queries()).detach(), rtol=1e-9)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_an_average_that_did_not_move_towards_the_weights_is_refused() -> None:
    model = make_model()
    average = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update(k: int) -> None:
        ema_of(average, model)
        if k == 2:
            average["0.weight"].mul_(1.1)

    with pytest.raises(errors.RecordingError) as caught:
        train(model, adamw(model), average, update)
    error = caught.value
    assert error.found.startswith("After step 2 the average 'ema' did not move towards the weights: ")
    assert error.found.endswith("% of its change is something else")
    assert "Θ + a (θ − Θ) with one number a for all parameters" in error.expected
    assert "Update it right after `optimizer.step()`" in error.write


def test_an_average_updated_twice_in_a_step_is_one_update() -> None:
    # Θ + a (θ − Θ) twice over is the same with 1 − (1 − a)².
    model = make_model()
    average = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update(k: int) -> None:
        ema_of(average, model)
        ema_of(average, model)

    run = train(model, adamw(model), average, update)
    np.testing.assert_allclose([a for a, _ in run.averages["ema"].updates], 1 - DECAY**2, rtol=1e-9)
    live = copy.deepcopy(model)
    live.load_state_dict(average)
    complete(run, live)


def test_an_average_that_lacks_parameters_is_refused() -> None:
    model = make_model()
    average = {name: p.detach().clone() for name, p in model.named_parameters() if name != "2.bias"}
    with pytest.raises(errors.RecordingError) as caught:
        pk.KernelRecorder(model, adamw(model), CE, data=data(), averages={"mine": average})
    assert caught.value.found == "The average 'mine' lacks `2.bias`"
    assert "the trained model's parameter names" in caught.value.expected
    assert "Pass an `AveragedModel`, a copy of the model, or a dict of tensors" in caught.value.write


def test_an_average_that_is_not_on_record_is_refused() -> None:
    model = make_model()
    averaged = AveragedModel(model)
    run = train(model, adamw(model), averaged, lambda k: averaged.update_parameters(model))
    with pytest.raises(errors.InputError) as caught:
        pk.KernelMachine(run, average="emma")
    assert caught.value.found == "`average='emma'` was given"
    assert caught.value.expected == "Averages on record are 'ema'"
    assert 'averages={"ema": averaged_model}' in caught.value.write
    with pytest.raises(errors.InputError) as caught:
        pk.KernelMachine(run, average="ema", form="chord")
    assert caught.value.found == '`form="chord"` was asked of an averaged network'
    assert "The chord joins the untrained network to the last weights" in caught.value.expected
    assert "Leave out `form` or `average`" in caught.value.write
    plain = make_model()
    optimizer = adamw(plain)
    with pk.KernelRecorder(plain, optimizer, CE, data=data()) as recorder:
        x, y = recorder.batch([0])
        CE(plain(x), y).backward()
        optimizer.step()
    with pytest.raises(errors.InputError, match="Averages on record are none"):
        pk.KernelMachine(recorder.trajectory, weights="ema")


@pytest.mark.parametrize("form", ["average", "ensemble", "constant"])
def test_other_forms_of_an_averaged_network(form: str) -> None:
    model = make_model()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    run = train(model, adamw(model), averaged, lambda k: averaged.update_parameters(model))
    why = pk.KernelMachine(run, weights="ema", form=form).explain(queries(), outputs=0)
    np.testing.assert_allclose(why.form.shares, why.shares, rtol=0, atol=1e-12)
    assert f"form='{form}', average='ema'" in repr(pk.KernelMachine(run, average="ema", form=form))
