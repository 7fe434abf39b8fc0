"""Networks that are compiled, or that keep checkpoints of their activations: trained as without, explained exactly."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import generator, make_inputs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import pathkernel as pk
from pathkernel.errors import RecordingError

CE = nn.CrossEntropyLoss()
SAMPLES = 12
T = torch.float64


class Net(nn.Module):
    def __init__(self, body: Callable[[Net, Tensor], Tensor], drop: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inp, self.out = nn.Linear(4, 6, dtype=T), nn.Linear(6, 3, dtype=T)
        self.mid = nn.Sequential(nn.Tanh(), nn.Dropout(drop), nn.Linear(6, 6, dtype=T), nn.Tanh())
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self, x) * 1.5)


def plain(net: Net, x: Tensor) -> Tensor:
    return net.mid(net.inp(x))


def data() -> tuple[Tensor, Tensor]:
    return make_inputs(SAMPLES, dtype=T), torch.randint(3, (SAMPLES,), generator=generator(2))


def train(model: nn.Module, call: Callable[..., Any], record: bool, **options: Any) -> pk.Trajectory | None:
    """Two epochs of the same loop, recorded or not."""
    torch.manual_seed(3)
    X, y = data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    watched = call if isinstance(call, nn.Module) else model
    recorder = pk.KernelRecorder(watched, optimizer, CE, data=(X, y), **options) if record else None
    if recorder is not None:
        recorder.start()
    try:
        for ids in torch.arange(4 * SAMPLES).remainder(SAMPLES).split(8):
            if recorder is not None:
                recorder.announce(ids)
            optimizer.zero_grad()
            CE(call(X[ids]), y[ids]).backward()
            optimizer.step()
    finally:
        trajectory = None if recorder is None else recorder.close()
    return trajectory


def check(make: Callable[[], tuple[nn.Module, Callable[..., Any]]], **options: Any) -> pk.Trajectory:
    """The same bits as without a recorder, and an exact machine with rows that were checked."""
    torch._dynamo.reset()
    alone, call = make()
    train(alone, call, record=False)
    torch._dynamo.reset()
    model, call = make()
    trajectory = train(model, call, record=True, **options)
    assert trajectory is not None
    for one, other in zip(alone.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    X = make_inputs(3, dtype=T, seed=8)
    why = pk.KernelMachine(trajectory).explain(X, outputs=0)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(X)[:, 0].numpy()
    np.testing.assert_allclose(why.reconstruction, expected, atol=1e-10)
    assert why.split_error < 1e-10
    return trajectory


# -- torch.compile ------------------------------------------------------------------------------------------------


def compiled(backend: str, in_place: bool, drop: float = 0.3) -> tuple[nn.Module, Callable[..., Any]]:
    model = Net(plain, drop)
    if in_place:
        model.compile(backend=backend)
        return model, model
    return model, torch.compile(model, backend=backend)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_with_dropout(backend: str, in_place: bool) -> None:
    check(lambda: compiled(backend, in_place))


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_by_inductor(in_place: bool) -> None:
    """With torch's random numbers, dropout too; without them it is refused before the first step."""
    check(lambda: compiled("inductor", in_place, drop=0.0))
    model, call = compiled("inductor", in_place)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RecordingError, match=r"inductor, and its forward pass drew.*fallback_random = True"):
        train(model, call, record=True, audit_every=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch._inductor.config.patch(fallback_random=True):
        check(lambda: compiled("inductor", in_place))


def test_compiled_in_place_after_recording_began() -> None:
    """The hooks make way for a call that is watched from outside, and are off afterwards."""
    model = Net(plain, drop=0.0)
    X, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, CE, data=(X, y)) as recorder:
        for step, ids in enumerate(torch.arange(SAMPLES).split(4)):
            if step == 1:
                model.compile(backend="eager")
            x, target = recorder.announce(ids)
            optimizer.zero_grad()
            CE(model(x), target).backward()
            optimizer.step()
    assert all(batch.captured for step in recorder.trajectory.steps() for batch in step.batches)
    assert not model._forward_hooks and model._compiled_call_impl.__name__ != "watched"
    assert copy.deepcopy(model)._compiled_call_impl is None
    assert pk.KernelMachine(recorder.trajectory).explain(X[:2]).relative_residual < 1e-10


def test_parts_that_are_compiled_are_read_uncompiled() -> None:
    """Passes of the library would fill the compiler's cache, and the loop's own would then run uncompiled."""
    passes: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        passes.append(1)
        return graph.forward

    def make() -> tuple[nn.Module, nn.Module]:
        model = Net(plain)
        model.mid = torch.compile(model.mid, backend=backend)
        return model, model

    check(make, audit_every=1)
    passes.clear()
    torch._dynamo.reset()
    model, _ = make()
    trajectory = train(model, model, record=True, audit_every=1)
    why = pk.KernelMachine(trajectory).explain(data()[0][:2])
    assert len(passes) == 1  # in the loop
    assert why.relative_residual < 1e-10


# -- gradient checkpoints -----------------------------------------------------------------------------------------


def one(net: Net, x: Tensor, reentrant: bool) -> Tensor:
    return checkpoint(net.mid, net.inp(x), use_reentrant=reentrant)


def sequential(net: Net, x: Tensor, reentrant: bool) -> Tensor:
    return checkpoint_sequential(net.mid, 2, net.inp(x), use_reentrant=reentrant)


@pytest.mark.parametrize("level", [pk.Every(), pk.Keyframes(3)], ids=["every", "keyframes"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("body", [one, sequential])
def test_checkpointed(body: Callable[..., Tensor], reentrant: bool, level: Any) -> None:
    """Dropout inside a checkpoint draws what it drew in training; rows come from the fast engine."""

    def make() -> tuple[nn.Module, nn.Module]:
        model = Net(lambda net, x: body(net, x, reentrant))
        return model, model

    trajectory = check(make, schedule=level)
    assert pk.KernelMachine(trajectory).explain(data()[0][:1]).engine == "layerwise"


def whole(net: Net, x: Tensor) -> Tensor:
    return checkpoint(lambda z: net.mid(net.inp(z)), x, use_reentrant=True)


@pytest.mark.parametrize("in_the_loop", [True, False])
def test_reentrant_checkpoint_of_the_inputs(in_the_loop: bool) -> None:
    """Its inputs need `requires_grad`, or torch leaves what is inside untrained: recorded as it is, either way."""
    model = Net(whole)
    call = (lambda x: model(x.clone().requires_grad_(True))) if in_the_loop else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if in_the_loop else "default")
        if not in_the_loop:
            warnings.filterwarnings("ignore", "None of the inputs")
        trajectory = train(model, call, record=True, audit_every=1)
    assert ("inp.weight" in trajectory.store.read(0).active) is in_the_loop
    why = pk.KernelMachine(trajectory).explain(data()[0][:2], outputs=0)
    assert why.relative_residual < 1e-10 and why.split_error < 1e-10


def test_training_keeps_its_checkpoints() -> None:
    """Only passes of the library pass through; afterwards torch's own functions are in place."""
    runs: list[bool] = []
    model = Net(plain, drop=0.0)
    home = id(model)

    def body(net: Net, x: Tensor) -> Tensor:
        def inner(z: Tensor) -> Tensor:
            runs.append(id(net) == home)
            return net.mid(z)

        return checkpoint(inner, net.inp(x), use_reentrant=False)

    model.body = body
    trajectory = train(model, model, record=True)
    assert sum(runs) == 2 * len(trajectory)  # forward, and once more in each backward pass
    names = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
    pk.KernelMachine(trajectory).explain(data()[0][:1])
    assert sum(runs) == 2 * len(trajectory)
    module = torch.utils.checkpoint
    assert [getattr(module, name).__module__ for name in names] == ["torch.utils.checkpoint"] * 2
