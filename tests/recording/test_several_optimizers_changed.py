"""Several optimizers, of which one is given another state or parameters, and passes with other weights in between."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from several import BATCH, CE, QUERIES, SAMPLES, X, Y, body_and_head, complete, muon_and_adamw, network, three
from torch.func import functional_call
from torch.optim import SGD, Adam

import pathkernel as pk
from pathkernel import errors


@pytest.mark.parametrize("between", [False, True])
def test_a_state_that_is_loaded_has_its_channel(between: bool) -> None:
    """Before a step, or when the first optimizer has taken it: what the loaded memory adds is "loaded"."""
    model = network()
    optimizers = body_and_head(model)
    with pk.KernelRecorder(model, optimizers, CE, data=(X, Y)) as recorder:
        for k, ids in enumerate(torch.arange(2 * SAMPLES).remainder(SAMPLES).split(BATCH)):
            recorder.announce(ids)
            model.zero_grad()
            CE(model(X[ids]), Y[ids]).backward()
            if k == 1:
                states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
            if k == 4 and not between:
                for optimizer, state in zip(optimizers, states, strict=True):
                    optimizer.load_state_dict(state)
            optimizers[0].step()
            if k == 4 and between:
                optimizers[1].load_state_dict(states[1])
            optimizers[1].step()
    why = pk.KernelMachine(recorder.trajectory).explain(QUERIES, outputs=0)
    assert np.abs(why.channels["loaded"]).max() > 1e-5
    assert "unexplained" not in why.channels
    with torch.no_grad():
        np.testing.assert_allclose(why.reconstruction, model(QUERIES)[:, 0].numpy(), atol=1e-12)


def test_a_state_that_nobody_can_tell_is_refused() -> None:
    """Of a matrix method, at the step after it was loaded, before anything moves."""
    model = network()
    optimizers = muon_and_adamw(model)
    with pk.KernelRecorder(model, optimizers, CE, data=(X, Y)) as recorder:
        for k, ids in enumerate(torch.arange(2 * BATCH).split(BATCH)):
            recorder.announce(ids)
            model.zero_grad()
            CE(model(X[ids]), Y[ids]).backward()
            if k == 1:
                optimizers[0].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
                before = [p.clone() for p in model.parameters()]
                with pytest.raises(errors.RecordingError, match=r"load_state_dict.* before step 1 of Muon and AdamW"):
                    optimizers[0].step()
                assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
                break
            for optimizer in optimizers:
                optimizer.step()


def test_a_parameter_that_a_second_optimizer_is_given_later_is_refused() -> None:
    """Before anything moves, as it is when recording begins."""
    model = network()
    body, head = SGD(model[:3].parameters(), lr=0.1), Adam(model[3].parameters(), lr=0.01)
    with pk.KernelRecorder(model, [body, head], CE, data=(X, Y)) as recorder:
        for k, ids in enumerate(torch.arange(2 * BATCH).split(BATCH)):
            recorder.announce(ids)
            model.zero_grad()
            CE(model(X[ids]), Y[ids]).backward()
            if k == 0:
                body.step()
                head.step()
        body.add_param_group({"params": [model[3].bias], "lr": 0.05})
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(errors.RecordingError, match=r"shape \(3,\) is held by two of the optimizers, SGD and Adam"):
            body.step()
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert len(recorder.trajectory) == 1


def test_passes_with_other_weights_end_no_step() -> None:
    """A target network by `functional_call`, while one of three optimizers has not stepped."""
    model = network()
    optimizers = three(model)
    with pk.KernelRecorder(model, optimizers, CE, data=(X, Y), audit_every=1) as recorder:
        for ids in torch.arange(2 * SAMPLES).remainder(SAMPLES).split(BATCH):
            recorder.announce(ids)
            model.zero_grad()
            CE(model(X[ids]), Y[ids]).backward()
            optimizers[0].step()
            optimizers[1].step()
            functional_call(model, {name: 0.9 * p.detach() for name, p in model.named_parameters()}, (X,))
    assert len(recorder.trajectory) == 2 * SAMPLES // BATCH
    complete(recorder.trajectory)
