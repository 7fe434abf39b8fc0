"""Rows of `recording/test_refusals.py` for how the network is called, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pathkernel as pk
from pathkernel import errors
from pathkernel.gradients.sample_wise import ComparedSamples

CE = nn.CrossEntropyLoss()
N, B = 8, 4
X, Y = torch.arange(4.0 * N).reshape(N, 4) / 32, torch.arange(N) % 3

Row = tuple[Callable[[], Any], type[Exception], tuple[str, str, str]]


class Net(nn.Module):
    """Takes whatever the loop hands over, by place and by name."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.run = nn.Linear(4, 3), nn.Linear(3, 3), run

    def forward(self, *x: Any, **named: Any) -> Tensor:
        return self.run(self.first, *x, **named)


def in_a_source(model: nn.Module) -> None:
    with recorder(model) as recording, recording.source("generated"):
        model()


def of_data_in_another_order() -> None:
    data, model = TensorDataset(X + 1 / 3, Y), nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, data=(X.roll(3, 0) + 1 / 3, Y.roll(3)), keep=True) as recording:
        for x, y in recording.track(DataLoader(data, batch_size=B)):
            CE(model(x), y).backward()
            optimizer.step()


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Container(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.spare = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(4, 3)


def recorder(model: nn.Module, data: Any = (X, Y), **options: Any) -> pk.KernelRecorder:
    return pk.KernelRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1), CE, data=data, **options)


def step(model: nn.Module, call: Callable[..., Tensor], before_step: Any = None, **options: Any) -> pk.Trajectory:
    with recorder(model, **options) as recording:
        recording.announce(torch.arange(B))
        CE(call(model, X[:B].clone()), Y[:B]).backward()
        if before_step is not None:
            before_step()
        recording.optimizer.step()
    return recording.trajectory


def overwritten(extra: Tensor, **options: Any) -> None:
    model = Net(lambda first, x, y: first(x) + y.mean())
    step(model, lambda net, x: net(x, extra), lambda: extra.add_(1), **options)


def in_order(keys: Mapping[str, Tensor]) -> Any:
    trajectory = step(Named(), lambda net, x: net(x=x), data=({"x": X}, Y))
    return pk.KernelMachine(trajectory).explain(dict(keys), outputs=0)


CALLS: dict[str, Row] = {
    "an axis that is none": (
        lambda: recorder(Container().first, batch_axis="first"),
        errors.InputError,
        ("`batch_axis='first'`", "counted from 0", "batch_axis=1"),
    ),
    "outputs under two names": (
        lambda: recorder(Container().first, returns=0, outputs=1),
        errors.InputError,
        ("`returns=0` and `outputs=1`", "two names of one argument", "Leave one"),
    ),
    "an argument of samples and of all": (
        lambda: step(Net(lambda f, x, d: f(x) * d["by"]), lambda net, x: net(x, {"rows": Y[:B], "by": 2.0})),
        errors.InputError,
        ("number 2 of the network holds tensors of 4 samples", "or is shared by all", "batch_axis=..."),
    ),
    "samples by place and by name": (
        lambda: step(Net(lambda f, x, y: f(x) + y[:, None]), lambda net, x: net(x, y=Y[:B])),
        errors.InputError,
        ("the arguments number 1, `y`", "by names that `forward` has", "named parameter"),
    ),
    "shared, and overwritten": (
        lambda: overwritten(torch.ones(3)),
        errors.InputError,
        ("written on between the forward pass and the step", "copied in the forward pass", "keep=True"),
    ),
    "of samples, and overwritten": (
        lambda: overwritten(torch.ones(B)),
        errors.InputError,
        ("written on between the forward pass and the step", "copied in the forward pass", "keep=True"),
    ),
    "something in between two parts": (
        lambda: step(Container(), lambda net, x: net.second(2 * net.first(x)), watch=("first", "second")),
        errors.InputError,
        ("'second' of the network was given something else than what 'first'", "one after the other", "watch=name"),
    ),
    "a network that cannot be called": (
        lambda: recorder(Container()),
        errors.InputError,
        ("The Container has no `forward`", "is watched", "watch=name"),
    ),
    "a part that there is not": (
        lambda: recorder(Container(), watch="third"),
        errors.InputError,
        ("`watch=` names 'third'", "'first', 'second', 'spare'", 'watch="net"'),
    ),
    "gradients outside the watched part": (
        lambda: step(Container(), lambda net, x: net.first(x) + net.spare(x), watch="first"),
        errors.RecordingError,
        ("spare.weight", "nothing else has a gradient", "watch="),
    ),
    "inputs that are scaled in the loop": (
        lambda: step(Container().first, lambda net, x: net(x / 255)),
        errors.SampleIdError,
        ("the argument `input` holds other numbers", "has not moved", "keep=True"),
    ),
    "a batch without tensors": (
        lambda: next(recorder(Container().first, None).track([["a", "b"]])),
        errors.SampleIdError,
        ("a list without any tensor", "first axis", "track(loader, ids=...)"),
    ),
    "ids in no field": (
        lambda: next(recorder(Container().first).track(DataLoader(TensorDataset(X)), ids="index")),
        errors.SampleIdError,
        ("`ids='index'`", "a key, a place, or a function", 'ids="index"'),
    ),
    "a batch that carries no ids": (
        lambda: recorder(Container().first).take_ids((X, Y)),
        errors.SampleIdError,
        ("`take_ids` was given a tuple", "pathkernel.indexed(loader)", "recorder.take_ids(batch)"),
    ),
    "observers of samples that are counted": (
        lambda: recorder(Container().first, None, observers=[pk.StreamingShares(X)]),
        errors.RecordingError,
        ("StreamingShares was given", "how many samples", "data=number_of_samples"),
    ),
    "similarities of a batch": (
        lambda: pk.TangentKernel(Net(lambda net, x: net(x) @ net(x).T))(X),
        ComparedSamples,
        ("For one sample the network returned 1 numbers", "similarities", 'outputs="encoder"'),
    ),
    "rows that several samples share, without weights": (
        lambda: recorder(Container().first).announce([[0, 1], [1, 2]]),
        errors.SampleIdError,
        ("of shape (2, 2) were announced without weights", "add up to 1", "weights=[lam, 1 - lam]"),
    ),
    "a source without a name": (
        lambda: recorder(Container().first).source("").__enter__(),
        errors.InputError,
        ("`recorder.source('')`", "has a name", 'recorder.source("generated")'),
    ),
    "a pass of a source without a tensor": (
        lambda: in_a_source(Net(lambda net: net(X))),
        errors.SampleIdError,
        ("was given no tensor", "counted by the first tensor", "recorder.announce(ids)"),
    ),
    "no argument of the announced samples": (
        lambda: step(Container().first, lambda net, x: net(x[:3]).repeat(2, 1)[:B], data=None),
        errors.SampleIdError,
        ("no tensor with 4 rows (shapes: (3, 4))", "one row for each sample", "batch_axis=1"),
    ),
    "data in another order than the loader's": (
        of_data_in_another_order,
        errors.SampleIdError,
        ("holds in other places than under the announced ids", "places in `data`", "the dataset of the loader"),
    ),
    "queries with a name that there was not": (
        lambda: in_order({"x": X, "mask": X}),
        errors.InputError,
        ("the keys 'x', 'mask'", "they had 'x'", "Leave out 'mask'"),
    ),
}
