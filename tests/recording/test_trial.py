"""What cannot be explained is refused at the first step, before the optimizer has moved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import pathkernel as pk
from pathkernel import errors

CE = nn.CrossEntropyLoss()


class Network(nn.Module):
    """A small network around a function of itself and its input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.inner, self.outer = function, nn.Linear(6, 8), nn.Linear(8, 3)
        self.cache: list[Tensor] = []
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def cached(self, x):
    """Keeps what it saw in training, as a network with a cache of keys and values does."""
    h = torch.tanh(self.inner(x))
    if self.training:
        self.cache.append(h.detach())
        h = h + torch.stack(self.cache).sum(0)
    return self.outer(h)


def training_only(self, x):
    if not torch.is_grad_enabled():
        raise AttributeError("no targets")
    return self.outer(torch.tanh(self.inner(x)))


def of_one_size(self, x):
    return self.outer(torch.tanh(self.inner(x)).view(8, 8))


def train(model: nn.Module, **options: Any) -> pk.Trajectory:
    X, y = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, CE, data=(X, y), **options) as recorder:
        for x, target in recorder.batches(8):
            optimizer.zero_grad()
            CE(model(x), target).backward()
            optimizer.step()
    return recorder.trajectory


@pytest.mark.parametrize("function", [cached, training_only, of_one_size], ids=lambda f: f.__name__)
def test_networks_that_do_not_run_again_are_refused_before_they_are_trained(function: Any) -> None:
    model = Network(function)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(errors.RecordingError) as caught:
        train(model)
    assert caught.value.expected and caught.value.write
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def cell(self, x):
    h = torch.zeros(len(x), 8)
    for part in x.view(len(x), 3, 2).unbind(1):
        h = self.gru(part, h)
    return self.outer(h)


def checkpointed(self, x):
    return self.outer(checkpoint(self.inner, x, use_reentrant=False).tanh())


def packed(self, x):
    lengths = (x[:, 0] > 0).long() + 2
    one = pack_padded_sequence(x.view(len(x), 3, 2), lengths, batch_first=True, enforce_sorted=False)
    return self.outer(self.lstm(one)[1][0][0])


def masked(self, x):
    h = self.embed(x.view(len(x), 3, 2))
    mask = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
    return self.outer(self.attention(h, h, h, attn_mask=mask, need_weights=False)[0].mean(1))


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        (cell, {"gru": nn.GRUCell(2, 8)}),
        (checkpointed, {}),
        (packed, {"lstm": nn.LSTM(2, 8, batch_first=True)}),
        (masked, {"embed": nn.Linear(2, 8), "attention": nn.MultiheadAttention(8, 2, batch_first=True)}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_networks_that_are_hard_to_run_again_are_explained(function: Any, parts: dict[str, nn.Module]) -> None:
    model = Network(function, **parts)
    for unused in {"inner"} - ({"inner"} if function in (checkpointed,) else set()):
        delattr(model, unused)
    why = pk.KernelMachine(train(model)).explain(torch.randn(3, 6), outputs=1)
    assert why.relative_residual < 1e-5


def test_a_trial_leaves_training_as_it_is() -> None:
    trained = []
    for options in ({"audit_every": 0}, {}):
        torch.manual_seed(3)
        model = Network(lambda self, x: self.outer(self.drop(self.norm(torch.tanh(self.inner(x))))))
        model.norm, model.drop = nn.BatchNorm1d(8), nn.Dropout(0.3)
        train(model, **options)
        trained.append((copy.deepcopy(model.state_dict()), torch.rand(3)))
    (one, after), (other, also_after) = trained
    assert all(torch.equal(one[name], other[name]) for name in one) and torch.equal(after, also_after)


def test_who_wants_no_checks_gets_none() -> None:
    trajectory = train(Network(cached), audit_every=0)
    with pytest.raises(Exception, match=r".+"):
        pk.KernelMachine(trajectory).explain(torch.randn(2, 6), outputs=0)
