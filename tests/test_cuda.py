"""On a GPU: networks, data and records stay on their device, and what holds on the CPU holds there."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.tangent_kernel.precision import multiplies_tensor_floats
from pathkernel.update_rules.table import RULES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.view(len(x), 4, 4))
        return self.head((h + self.attention(h, h, h, need_weights=False)[0]).mean(1))


NETWORKS: dict[str, Any] = {
    "mlp": lambda: nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    ),
    "batch norm": lambda: nn.Sequential(nn.Linear(16, 12, bias=False), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3)),
    "matrices": lambda: nn.Sequential(nn.Linear(16, 12, bias=False), nn.Tanh(), nn.Linear(12, 3, bias=False)),
    "dropout": lambda: nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 3)),
    "attention": Attention,
}
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
}
RULED: dict[str, Any] = {cls.__name__: lambda p, cls=cls: cls(p, lr=1e-2) for cls in RULES}
"""Every optimizer that has a rule."""
TRAINED_OTHERWISE = {"Muon"}
"""Optimizers that train another network on each device: torch's Newton–Schulz iteration is in bfloat16, of whose last
bits each device has its own, so that the weights differ by 1e-4 after eight steps."""
CE = nn.CrossEntropyLoss()


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(48, 16, generator=generator, dtype=dtype).to(GPU), (torch.arange(48) % 3).to(GPU)


def train(
    network: str,
    optimizer: str,
    dtype: torch.dtype = torch.float64,
    autocast: bool = False,
    device: torch.device = GPU,
    **options: Any,
) -> tuple[nn.Module, pk.Trajectory, Tensor]:
    torch.manual_seed(0)
    model = NETWORKS[network]().to(device, dtype)
    X, y = (part.to(device) for part in data(dtype))
    live = {**OPTIMIZERS, **RULED}[optimizer](model.parameters())
    with pk.KernelRecorder(model, live, CE, data=(X, y), audit_every=1, **options) as recorder:
        for _ in range(2):
            for x, target in recorder.batches(12):
                live.zero_grad()
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                    value = CE(model(x), target)
                value.backward()
                live.step()
    return model, recorder.trajectory, X


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_machine_is_the_network(network: str, optimizer: str) -> None:
    model, trajectory, X = train(network, optimizer)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    machine = pk.KernelMachine(trajectory)
    why = machine.explain(X[:5], outputs=1)
    assert why.relative_residual < 1e-9
    assert not why.split_error > 1e-8
    model.eval()
    with torch.no_grad():
        live = model(X[:5]).cpu().numpy()
    np.testing.assert_allclose(machine.decision_function(X[:5]), live, atol=1e-9)


@pytest.mark.parametrize("engine", ["auto", "jacobian"])
@pytest.mark.parametrize("optimizer", RULED)
def test_every_optimizer_as_the_network_that_it_trained_here(optimizer: str, engine: str) -> None:
    model, trajectory, X = train("matrices", optimizer)
    machine = pk.KernelMachine(trajectory, engine=engine)
    # Sums of 8 steps in float64, on the CPU 2e-13 at most: what is left are its roundings, whatever type the optimizer
    # itself rounds to on its way, which is on record.
    assert machine.explain(X[:3], outputs=1).relative_residual < 1e-9
    with torch.no_grad():
        live = model(X[:3]).cpu().numpy()
    np.testing.assert_allclose(machine.decision_function(X[:3]), live, atol=1e-9)


@pytest.mark.parametrize("optimizer", [name for name in RULED if name not in TRAINED_OTHERWISE])
def test_every_optimizer_as_on_the_cpu(optimizer: str) -> None:
    found = [train("matrices", optimizer, device=device) for device in (GPU, torch.device("cpu"))]
    machines = [pk.KernelMachine(trajectory) for _, trajectory, _ in found]
    shares, expected = (m.explain(X[:3], outputs=1).shares for m, (_, _, X) in zip(machines, found, strict=True))
    np.testing.assert_allclose(shares, expected, rtol=1e-6, atol=1e-8)
    predicted, expected = (m.decision_function(X[:3]) for m, (_, _, X) in zip(machines, found, strict=True))
    np.testing.assert_allclose(predicted, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("older", [True, False], ids=["allow_tf32", "set_float32_matmul_precision"])
def test_products_are_full_whatever_torch_was_told(older: bool) -> None:
    torch.manual_seed(0)
    model = NETWORKS["convolution"]().to(GPU)
    X, _ = data(torch.float32)
    expected = [pk.TangentKernel(model, engine=engine)(X) for engine in ("auto", "jacobian")]
    before = torch.get_float32_matmul_precision()
    try:
        if older:
            torch.backends.cuda.matmul.allow_tf32 = True
        else:
            torch.set_float32_matmul_precision("high")
        for engine, kernel in zip(("auto", "jacobian"), expected, strict=True):
            np.testing.assert_allclose(pk.TangentKernel(model, engine=engine)(X), kernel, rtol=1e-6)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not multiplies_tensor_floats(GPU), reason="needs products in TensorFloat-32")
@pytest.mark.parametrize("outputs", ["trace", "full"])
@pytest.mark.parametrize("engine", ["auto", "jacobian"])
def test_products_in_tensor_floats_where_they_are_asked_for(engine: str, outputs: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 3)).to(GPU)
    X, _ = data(torch.float32)
    before = torch.get_float32_matmul_precision()
    exact = pk.TangentKernel(model, engine=engine, outputs=outputs)(X)
    rounded = pk.TangentKernel(model, engine=engine, outputs=outputs, dtype="tf32")(X)
    # Factors keep ten bits behind the point; each is off by less than 2^-10, even where the rest is cut off, so that a
    # product of two is by less than 2^-9. Exact products of float32 are off by 1e-7.
    assert 1e-6 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 2**-9
    again = pk.TangentKernel(model, engine=engine, outputs=outputs)(X)
    assert np.linalg.norm(again - exact) / np.linalg.norm(exact) < 1e-6
    assert torch.get_float32_matmul_precision() == before


def waits_of_a_loop(epochs: int, recorded: bool, schedule: Any) -> Counter[str]:
    """How often a loop waits for the device, as torch counts for itself: by the lines that were running, inside out."""
    found: Counter[str] = Counter()

    def note(message: Any, *_: Any) -> None:
        # The first call that sets the mode says that it "does not yet detect all synchronizing operations".
        if "called a synchronizing" in str(message):
            lines = [f"{Path(one.filename).name}:{one.lineno}" for one in traceback.extract_stack()[:-1]]
            found[" < ".join(lines[:-9:-1])] += 1

    torch.manual_seed(0)
    model = NETWORKS["mlp"]().to(GPU)
    X, y = data(torch.float32)
    live = OPTIMIZERS["adamw"](model.parameters())
    recorder = pk.KernelRecorder(model, live, CE, data=(X, y), audit_every=0, schedule=schedule)
    with warnings.catch_warnings(), recorder if recorded else nullcontext():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(epochs):
                for ids in torch.arange(48, device=GPU).split(12):
                    if recorded:
                        recorder.announce(ids.cpu())
                    live.zero_grad()
                    CE(model(X[ids]), y[ids]).backward()
                    live.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


@pytest.mark.parametrize("schedule", [None, pk.Schedule(keyframes=64)], ids=["every step", "keyframes"])
def test_a_recorded_step_waits_at_most_twice(schedule: Any) -> None:
    def of_further_steps(recorded: bool) -> Counter[str]:
        few, many = (waits_of_a_loop(epochs, recorded, schedule) for epochs in (2, 4))
        many.subtract(few)
        return +many

    recorded, plain = of_further_steps(recorded=True), of_further_steps(recorded=False)
    assert recorded, "torch saw nothing that waits"
    steps = 4 * 2
    allowed = steps * (2 + 1) + plain.total()  # one is the `ids.cpu()` that ids on the device are announced by
    assert recorded.total() <= allowed, "\n".join(f"{n / steps:g} a step: {where}" for where, n in recorded.items())


@pytest.mark.parametrize("network", ["mlp", "convolution", "dropout"])
def test_in_float32(network: str) -> None:
    _, trajectory, X = train(network, "adamw", torch.float32)
    assert pk.KernelMachine(trajectory).explain(X[:5], outputs=1).relative_residual < 1e-4


def test_under_mixed_precision() -> None:
    _, trajectory, X = train("mlp", "adamw", torch.float32, autocast=True)
    assert pk.KernelMachine(trajectory).explain(X[:5], outputs=1).relative_residual < 5e-2


@pytest.mark.parametrize("engine", ["auto", "jacobian"])
def test_kernels_are_those_of_the_cpu(engine: str) -> None:
    model, trajectory, X = train("convolution", "sgd")
    on_cpu = copy.deepcopy(model).cpu()
    found = pk.TangentKernel(model, engine=engine)(X[:9], X[:7])
    np.testing.assert_allclose(found, pk.TangentKernel(on_cpu, engine=engine)(X[:9].cpu(), X[:7].cpu()), rtol=1e-9)
    K = pk.PathKernel(trajectory)(X[:9])
    np.testing.assert_allclose(K, K.T, rtol=1e-12)
    assert np.linalg.eigvalsh(K).min() > -1e-9 * abs(K).max()


@pytest.mark.parametrize("schedule", [None, pk.Schedule(keyframes=4)])
def test_stores_and_replays(schedule: Any, tmp_path: Path) -> None:
    options = {} if schedule is None else {"schedule": schedule}
    model, trajectory, X = train("dropout", "adamw", store=tmp_path / "run", **options)
    kept = pk.KernelMachine(trajectory).explain(X[:3], outputs=0)
    _, plain, _ = train("dropout", "adamw")
    again = pk.Trajectory.open(tmp_path / "run", model=model, loss=CE, data=data(torch.float64))
    opened = pk.KernelMachine(again).explain(X[:3], outputs=0)
    np.testing.assert_allclose(opened.shares, kept.shares, atol=1e-12)
    np.testing.assert_allclose(pk.KernelMachine(plain).explain(X[:3], outputs=0).shares, kept.shares, atol=1e-10)


def test_data_on_the_cpu_and_a_network_on_the_gpu() -> None:
    """As most loops do: batches are moved by the loop."""
    torch.manual_seed(0)
    model = NETWORKS["mlp"]().to(GPU, torch.float64)
    X, y = (part.cpu() for part in data(torch.float64))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with pk.KernelRecorder(model, optimizer, CE, data=(X, y), audit_every=1) as recorder:
        for x, target in recorder.batches(12):
            optimizer.zero_grad()
            CE(model(x.to(GPU)), target.to(GPU)).backward()
            optimizer.step()
    why = pk.KernelMachine(recorder.trajectory).explain(X[:5], outputs=1)
    assert why.relative_residual < 1e-9


def test_stability_draws_the_same_each_time_and_puts_the_generators_back() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        D, G = (nn.Linear(2, 2, dtype=torch.float64, device=GPU) for _ in range(2))
        losses = {
            "D": lambda D, G: D(G(torch.randn(6, 2, dtype=torch.float64, device=GPU))).square().mean(),
            "G": lambda D, G: -D(G(torch.randn(6, 2, dtype=torch.float64, device=GPU))).mean(),
        }
        before = torch.cuda.get_rng_state(GPU)
        first, second = (pk.dynamics.stability({"D": D, "G": G}, losses, 0.1) for _ in range(2))
        assert torch.equal(torch.cuda.get_rng_state(GPU), before)
    np.testing.assert_array_equal(first.map, second.map)
