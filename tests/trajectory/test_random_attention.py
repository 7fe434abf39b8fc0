"""Attention with dropout and a mask that is a function of parameters, as T5 has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pathkernel as pk


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts, self.out = nn.Linear(4, 12), nn.Linear(4, 3)
        self.bias = nn.Embedding(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.parts(x).chunk(3, dim=-1))
        places = torch.arange(T)
        bias = self.bias(places[:, None] - places + T).permute(2, 0, 1)[None]
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=0.2 if self.training else 0.0)
        return self.out(z.transpose(1, 2).flatten(2)).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_recorded_and_explained(dtype: torch.dtype) -> None:
    """The gradient of the mask is that of another draw wherever the call is run again by itself."""
    torch.manual_seed(0)
    X, y = torch.randn(12, 3, 4, dtype=dtype), torch.randint(3, (12,))
    model, loss = Biased().to(dtype), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=1) as recorder:
        for x, target in recorder.batches(4):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    why = pk.KernelMachine(recorder.trajectory).explain(X[:3])
    # Adam makes steps of gradients that are small for a while: 3.3e-14 were seen, by ways that round otherwise.
    rounding = 300 * torch.finfo(dtype).eps
    assert why.relative_residual < rounding
    assert why.split_error < rounding
