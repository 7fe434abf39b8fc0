"""Smallest loops whose inputs were refused, broke, or were not noticed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import pathkernel as pk
from pathkernel.errors import InputError

torch.manual_seed(0)
N = 24
X, Y, CE = torch.randn(N, 6), torch.randint(4, (N,)), nn.CrossEntropyLoss()


def net():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


class Rows(Dataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.item(i)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, a, b):
        return self.net(a + b)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.scale = net(), nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.net(x) * self.scale


def record(model, loss=CE, data=(X, Y)):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pk.KernelRecorder(model, optimizer, loss, data=data) as recorder:
        for x, t in recorder.batches(8):
            optimizer.zero_grad()
            loss(model(*x) if isinstance(x, (list, tuple)) else model(x), t).backward()
            optimizer.step()
    return pk.KernelMachine(recorder.trajectory)


def is_right(why):
    return max(*why.residual, why.split_error) <= 1e-5


def test_scalar_parameter():
    assert is_right(record(Scaled()).explain(X[:2]))


def test_two_inputs_from_a_dataset():
    machine = record(Two(), data=Rows(lambda i: ((X[i], X[i]), Y[i])))
    why, alone = machine.explain((X[:2], X[:2]), outputs=1), machine.explain([X[:2], X[:2]], outputs=1)
    assert is_right(why) and torch.equal(torch.as_tensor(why.shares), torch.as_tensor(alone.shares))


def test_dict_dataset():
    data = Rows(lambda i: {"x": X[i], "labels": Y[i]})
    with pytest.raises(InputError, match="the keys 'x', 'labels'"):
        record(net(), data=data)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pk.KernelRecorder(model, optimizer, CE, data=data) as recorder:
        for batch in recorder.track(DataLoader(data, batch_size=8)):
            optimizer.zero_grad()
            CE(model(batch["x"]), batch["labels"]).backward()
            optimizer.step()
    assert is_right(pk.KernelMachine(recorder.trajectory).explain(X[:2], outputs=1))


def test_sequence_loss():
    """The loss of a sample is given its outputs as the network returned them, (1, T, V)."""
    S = torch.randint(9, (N, 5))
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9))

    def loss(z, t):
        return F.cross_entropy(z.flatten(0, 1), t.flatten())

    why = record(model, loss, (S, S)).explain((S[:2], S[:2]), outputs="loss")
    expected = torch.stack([loss(model(S[i : i + 1]), S[i : i + 1]) for i in range(2)])
    assert is_right(why)
    assert torch.allclose(torch.as_tensor(why.output).float(), expected, atol=1e-6)
