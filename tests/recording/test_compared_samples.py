"""Networks that return similarities of the samples of a batch, as contrastive learning has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import generator
from torch import Tensor, nn
from torch.nn import functional as F

import pathkernel as pk

RATE = 1e-4


class TwoTowers(nn.Module):
    """Similarities of embeddings under a learnt temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 4), nn.Linear(5, 4)
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, B): each image with each text."""
        return self.temperature.exp() * F.normalize(self.image(a), dim=1) @ F.normalize(self.text(b), dim=1).T


def symmetric_loss(z: Tensor) -> Tensor:
    own = torch.arange(len(z))
    return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2


def test_batches_are_taken_apart_as_a_whole() -> None:
    g = generator(0)
    A, B = torch.randn(12, 6, generator=g).double(), torch.randn(12, 5, generator=g).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TwoTowers().double()
    weight, bias = model.image.weight, model.image.bias
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    expected = np.zeros((4, 12))
    query = A[0]
    recorder = pk.KernelRecorder(model, optimizer, data=((A, B), torch.zeros(12)))
    with pytest.warns(pk.errors.CertificateWarning, match="for each pair of samples"), recorder:
        for ids in torch.arange(12).split(4):
            recorder.announce(ids)
            optimizer.zero_grad()
            z = model(A[ids], B[ids])
            slopes = torch.autograd.grad(symmetric_loss(z), z, retain_graph=True)[0]
            for row, i in enumerate(ids):  # the embedding of the query is linear in weight and bias
                w, b = torch.autograd.grad((z[row] * slopes[row]).sum(), (weight, bias), retain_graph=True)
                expected[:, i] += (-RATE * (w @ query + b)).numpy()
            symmetric_loss(z).backward()
            optimizer.step()
    why = pk.KernelMachine(recorder.trajectory).explain((A[:1], B[:1]), outputs="image")
    np.testing.assert_allclose(why.shares, expected, atol=1e-16)
    assert why.residual.max() < 1e-8 and why.split_error < 1e-10
    with pytest.raises(pk.errors.UnsupportedModelError, match=r'outputs="encoder"'):
        pk.KernelMachine(recorder.trajectory).explain((A[:3], B[:3]))
