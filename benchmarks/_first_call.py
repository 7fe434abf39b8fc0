"""One process of benchmarks/first_call.py: a kernel of one network, and what its calls take, as JSON.

python benchmarks/_first_call.py NETWORK SAMPLES fresh|warm
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable

import torch
from _real_networks import WORKLOADS
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

OUTPUTS = 10


class FirstOutputs(nn.Module):
    """The first few of all outputs, in place of thousands."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(1)[:, :OUTPUTS]


def mlp() -> nn.Module:
    layers = nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, OUTPUTS)
    return nn.Sequential(*layers)


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, OUTPUTS))


def network(name: str, samples: int) -> tuple[nn.Module, Tensor]:
    """A network in evaluation mode, and samples for it."""
    if name in WORKLOADS:
        workload = WORKLOADS[name]
        model, X = workload.make()[0], workload.data()[0][:samples]
        return (FirstOutputs(model) if name == "GPT" else model).eval(), X
    return (mlp(), torch.randn(samples, 64)) if name == "MLP" else (cnn(), torch.randn(samples, 1, 8, 8))


def load_torch(small: nn.Module, X: Tensor) -> None:
    """What torch loads when it is first used: by an optimizer's step, and by the transformations of torch.func."""
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(X).sum().backward()
    optimizer.step()
    norm = nn.LayerNorm(2)
    point, directions = torch.zeros(3, 2), torch.ones(2, 3, 2)
    vmap(lambda v: jvp(norm, (point,), (v,))[1])(directions)
    vmap(grad(lambda x: norm(x).sum()))(point)
    gc.collect()  # of torch's own objects, which else comes in the middle of whatever is next


def seconds(work: Callable[[], object]) -> float:
    """Processor time: others may use the machine."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    name, samples, start = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    found = {"torch": seconds(lambda: load_torch(small, torch.randn(5, 3)))}
    model, X = network(name, samples)
    model(X).sum().backward()

    def of_a_new_kernel() -> object:
        import pathkernel as pk  # is part of a first call

        kernels.append(pk.TangentKernel(model))
        return kernels[-1](X, X[:])  # rows and columns, as of a test and a training set

    kernels: list[Callable[[Tensor, Tensor], object]] = []
    if start == "warm":
        import pathkernel as pk

        pk.TangentKernel(small)(torch.randn(5, 3), torch.randn(5, 3))
        gc.collect()
    found["first"] = seconds(of_a_new_kernel)
    found["second"] = seconds(lambda: kernels[-1](X, X[:]))
    found["new_kernel"] = seconds(of_a_new_kernel)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
