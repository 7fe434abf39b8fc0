"""Records of several optimizers: observers, path kernels and forms of the sum, stores, going on after a break."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from several import (
    BATCH,
    CE,
    QUERIES,
    X,
    Y,
    adafactor_and_sgd,
    at_other_rates,
    body_and_head,
    complete,
    muon_and_adamw,
    network,
    three,
    train,
    two_rates,
)
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import pathkernel as pk
from pathkernel import errors
from pathkernel.update_rules.adam import AdamW as AdamWRule
from pathkernel.update_rules.joint import JointRule
from pathkernel.update_rules.sgd import SGD as UpdateRuleOfSGD

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")  # of one that does not step at first


# -- streaming and path kernels ---------------------------------------------------------------------------------------


def test_observers_and_path_kernels_work() -> None:
    plain = lambda model: [SGD(model[0].parameters(), lr=0.1), SGD(model[1:].parameters(), lr=0.02)]  # noqa: E731
    shares, gram = pk.StreamingShares(QUERIES, outputs=0), pk.StreamingGram(QUERIES)
    _, trajectory = train(plain, observers=[shares, gram])
    assert trajectory is not None
    np.testing.assert_allclose(shares.result.shares, complete(trajectory).shares, atol=1e-12)
    np.testing.assert_allclose(gram.result, pk.PathKernel(trajectory)(QUERIES), rtol=1e-9)
    _, adaptive = train(three, epochs=1)
    assert adaptive is not None
    kernel = pk.PathKernel(adaptive, preconditioner="optimizer")(QUERIES)
    assert np.linalg.eigvalsh(kernel).min() >= -1e-12 * np.abs(kernel).max()
    _, matrices = train(muon_and_adamw, epochs=1)
    with pytest.raises(errors.InputError, match="Muon and AdamW"):
        pk.PathKernel(matrices, preconditioner="optimizer")


def test_streamed_shares_refuse_an_optimizer_with_memory() -> None:
    with pytest.raises(errors.TrajectoryError, match="SGD and AdamW"):
        train(body_and_head, observers=[pk.StreamingShares(QUERIES)])


@pytest.mark.parametrize("form", ["average", "ensemble", "chord"])
def test_the_other_forms_have_the_same_sum(form: str) -> None:
    _, trajectory = train(body_and_head, epochs=1)
    assert trajectory is not None
    other = pk.KernelMachine(trajectory, form=form).explain(QUERIES, outputs=0)
    np.testing.assert_allclose(other.reconstruction, complete(trajectory).reconstruction, atol=1e-10)


# -- stores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [muon_and_adamw, two_rates, adafactor_and_sgd])
def test_a_store_gives_the_same_explanation(make: Callable[[Any], Any], tmp_path: Any) -> None:
    model, trajectory = train(make, at_other_rates, store=tmp_path / "run")
    again = pk.Trajectory.open(tmp_path / "run", model=model, loss=CE, data=(X, Y))
    assert type(again.rule) is type(trajectory.rule)
    _, in_memory = train(make, at_other_rates)
    assert trajectory is not None
    assert in_memory is not None
    one, other = (pk.KernelMachine(t).explain(QUERIES, outputs=0) for t in (in_memory, again))
    np.testing.assert_array_equal(one.shares, other.shares)
    for name, values in one.channels.items():
        np.testing.assert_array_equal(values, other.channels[name])


class Halved(UpdateRuleOfSGD):
    """SGD's rule under the name of a user's class."""


def test_a_rule_of_the_users_own_has_to_be_passed_again(tmp_path: Any) -> None:
    model, _ = train(body_and_head, epochs=1, rule=[Halved(), None], store=tmp_path / "run")
    opened = {"model": model, "loss": CE, "data": (X, Y)}
    with pytest.raises(errors.StoreError, match="SGD and AdamW"):
        pk.Trajectory.open(tmp_path / "run", **opened)
    with pytest.raises(errors.StoreError, match="SGD and AdamW"):
        pk.Trajectory.open(tmp_path / "run", **opened, rule=JointRule([UpdateRuleOfSGD(), AdamWRule()]))
    complete(pk.Trajectory.open(tmp_path / "run", **opened, rule=JointRule([Halved(), AdamWRule()])))


def test_a_recording_of_several_goes_on_from_a_checkpoint(tmp_path: Any) -> None:
    """Another process: model and optimizers from a checkpoint, then the same batches as without a break."""

    def steps(recorder: pk.KernelRecorder, model: nn.Module, optimizers: Sequence[Optimizer], ids: Tensor) -> None:
        for batch in ids.split(BATCH):
            x, y = recorder.announce(batch)
            model.zero_grad()
            CE(model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()

    model = network()
    optimizers = muon_and_adamw(model)
    with pk.KernelRecorder(model, optimizers, CE, data=(X, Y), store=tmp_path / "run") as recorder:
        steps(recorder, model, optimizers, torch.arange(16))
        recorder.flush()
        saved = copy.deepcopy([model.state_dict(), *(one.state_dict() for one in optimizers)])
        steps(recorder, model, optimizers, torch.arange(16, 24))
    model = network(seed=5)
    optimizers = muon_and_adamw(model)
    for one, state in zip((model, *optimizers), saved, strict=True):
        one.load_state_dict(state)
    with pk.KernelRecorder(model, optimizers, CE, data=(X, Y), store=tmp_path / "run") as recorder:
        steps(recorder, model, optimizers, torch.arange(16, 24))
    assert len(recorder.trajectory) == 3
    complete(recorder.trajectory)
    complete(pk.Trajectory.open(tmp_path / "run", model=model, loss=CE, data=(X, Y)))
