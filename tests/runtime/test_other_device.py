"""Off the CPU: everything stays on the device of the network, what comes out is what the CPU says, and few steps wait.

The device is that of `accelerator`, which needs no hardware; `test_cuda.py` says the same on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerator import DEVICE, Accelerator, OnDevice, accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pathkernel as pk
from pathkernel.recording.announced_batch import checked_ids
from pathkernel.update_rules.table import RULES

SAMPLES = 12
FEW_AND_MANY = 3, 6
"""Steps of two runs, whose difference is what a step takes."""
CE = nn.CrossEntropyLoss()
CERTIFICATE = {"trajectory/gradient_fit.py": 1, "trajectory/discrepancies.py": 1}
"""What explaining a step reads to certify it, apart from what it reads to explain it."""


def made(cls: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: cls(parameters, lr=0.01)


OPTIMIZERS = {cls.__name__.lower(): made(cls) for cls in RULES} | {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "foreach adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
}
X = torch.randn(SAMPLES, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(SAMPLES) % 3
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "matrices": lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2, padding=1), nn.GroupNorm(1, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(18, 3),
    ),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)),
}  # fmt: skip


@pytest.fixture
def away() -> Iterator[Accelerator]:
    with accelerator() as mode:
        yield mode


def train(
    device: Any, optimizer: str = "adamw", network: str = "mlp", steps: int = 4, data_on: Any = None, **options: Any
) -> tuple[nn.Module, pk.Trajectory]:
    """A recorded run on a device, of which the loop moves the batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETWORKS["matrices" if optimizer == "muon" else network]().double().to(device)
        live = OPTIMIZERS[optimizer](model.parameters())
        data = tuple(part.to(data_on or device) for part in (X, Y))
        with pk.KernelRecorder(model, live, CE, data=data, **{"audit_every": 0, **options}) as recorder:
            for ids in torch.arange(3 * steps).remainder(SAMPLES).split(3):
                x, y = recorder.batch(ids)
                live.zero_grad()
                CE(model(x.to(device)), y.to(device)).backward()
                live.step()
    return model, recorder.trajectory


def agree(found: Any, expected: Any) -> None:
    """Fail unless two results are the same arithmetic, which sums of parts may round in another order."""
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13)


# -- the device itself -------------------------------------------------------------------------------------------------


def test_the_device_refuses_mixtures_and_counts_what_waits(away: Accelerator) -> None:
    x = torch.arange(3.0, device=DEVICE)
    assert isinstance(x, OnDevice)
    assert isinstance(torch.tensor([1.0], device=DEVICE), OnDevice)
    with pytest.raises(RuntimeError, match="on the same device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.zeros(3).add_(x)
    assert away.waits == {"the loop": 1}  # for the list of numbers that was sent there
    assert torch.ones(3).to(DEVICE, non_blocking=True).to(DEVICE).sum().item() == x[torch.arange(3)].sum().item()
    assert away.waits == {"the loop": 4}
    away.waits.clear()
    assert x.sum().item() == 3.0
    assert x.cpu().tolist() == [0.0, 1.0, 2.0]
    assert x[x > 0].shape == (2,)
    assert torch.equal(x, x)
    assert sum(away.waits.values()) == 4


# -- what comes out is what the CPU says -------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_explanations_and_predictions_of_every_optimizer(optimizer: str) -> None:
    _, trajectory = train("cpu", optimizer)
    expected = pk.KernelMachine(trajectory).explain(X[:3], outputs=1)
    with accelerator():
        _, trajectory = train(DEVICE, optimizer)
        assert isinstance(trajectory.initial, OnDevice)
        machine = pk.KernelMachine(trajectory)
        why = machine.explain(X[:3].to(DEVICE), outputs=1)
        predicted = machine.decision_function(X[:3])
    agree(why.shares, expected.shares)
    agree(why.residual, expected.residual)
    agree(predicted[:, 1], expected.output)


@pytest.mark.parametrize(
    ("network", "engine"),
    [("convolution", "auto"), ("dropout", "jacobian"), ("batch norm", "auto")],
)
def test_engines_on_networks(network: str, engine: str) -> None:
    model, trajectory = train("cpu", "momentum", network, steps=3)
    shares = pk.KernelMachine(trajectory, engine=engine).explain(X[:2], outputs=1).shares
    kernel = pk.TangentKernel(model, engine=engine)(X[:3])
    with accelerator():
        model, trajectory = train(DEVICE, "momentum", network, steps=3)
        agree(pk.KernelMachine(trajectory, engine=engine).explain(X[:2].to(DEVICE), outputs=1).shares, shares)
        agree(pk.TangentKernel(model, engine=engine)(X[:3]), kernel)


ASKED: dict[str, Callable[[nn.Module, pk.Trajectory, Tensor], Any]] = {
    "path kernel": lambda model, run, x: pk.PathKernel(run)(x),
    "features": lambda model, run, x: pk.PathKernel(run).features(x, 8),
    "full": lambda model, run, x: pk.TangentKernel(model, outputs="full")(x),
    "products": lambda model, run, x: pk.TangentKernel(model, engine="products")(x),
    "diagonal": lambda model, run, x: pk.TangentKernel(model).diagonal(x),
    "matvec": lambda model, run, x: pk.TangentKernel(model).matvec(x, np.ones(len(x))),
    "steps": lambda model, run, x: pk.KernelMachine(run).explain(x, outputs=1, by="step").steps,
    "modules": lambda model, run, x: pk.KernelMachine(run).explain(x, outputs=1, by="module").shares,
    "average": lambda model, run, x: pk.KernelMachine(run, form="average").explain(x, outputs=1).shares,
    "ensemble": lambda model, run, x: pk.KernelMachine(run, form="ensemble").explain(x, outputs=1).shares,
    "adaptive": lambda model, run, x: pk.KernelMachine(run, quadrature=pk.Adaptive(1e-6)).explain(x, outputs=1).shares,
    "gauss": lambda model, run, x: pk.KernelMachine(run, quadrature=pk.GaussLegendre(2)).explain(x).shares,
}


@pytest.mark.parametrize("asked", ASKED)
def test_everything_else_that_may_be_asked(asked: str) -> None:
    expected = ASKED[asked](*train("cpu", steps=2), X[:3])
    with accelerator():
        agree(ASKED[asked](*train(DEVICE, steps=2), X[:3].to(DEVICE)), expected)


@cache
def shares_on_the_cpu() -> np.ndarray:
    _, trajectory = train("cpu")
    return pk.KernelMachine(trajectory).explain(X[:3], outputs=0).shares


LEVELS: dict[str, dict[str, Any]] = {
    "keyframes": {"schedule": pk.Schedule(keyframes=2)},
    "audited": {"audit_every": 1},
}


@pytest.mark.parametrize("level", LEVELS)
def test_data_on_the_cpu_and_records_on_disk(level: str, away: Accelerator, tmp_path: Path) -> None:
    model, trajectory = train(DEVICE, data_on="cpu", store=tmp_path / "run", **LEVELS[level])
    assert isinstance(trajectory.store.read(1).before, OnDevice)
    opened = pk.Trajectory.open(tmp_path / "run", model=model, loss=CE, data=(X, Y))
    agree(pk.KernelMachine(opened).explain(X[:3].to(DEVICE), outputs=0).shares, shares_on_the_cpu())


def test_loaders_are_handed_out_as_they_are(away: Accelerator) -> None:
    model = NETWORKS["mlp"]().double().to(DEVICE)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    loader = DataLoader(pk.IndexedDataset(TensorDataset(X, Y)), batch_size=4)
    with pk.KernelRecorder(model, optimizer, CE, data=TensorDataset(X, Y), audit_every=1) as recorder:
        for x, y in recorder.track(loader):
            assert x.device.type == y.device.type == "cpu"
            optimizer.zero_grad()
            CE(model(x.to(DEVICE)), y.to(DEVICE)).backward()
            optimizer.step()
    assert pk.KernelMachine(recorder.trajectory).explain(X[:3], outputs=0).relative_residual < 1e-9


@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_matrices_come_into_memory_that_is_used_again(outputs: str, away: Accelerator) -> None:
    model, rows = NETWORKS["mlp"]().double(), X.repeat(40, 1)
    expected = pk.TangentKernel(model, outputs=outputs)(rows)
    kernel = pk.TangentKernel(model.to(DEVICE), outputs=outputs)
    found = kernel(rows.to(DEVICE))
    assert found.nbytes <= kernel.engine.workspace.used
    agree(found, expected)
    del found
    assert kernel.engine.workspace.kept


# -- few steps wait ----------------------------------------------------------------------------------------------------


def waits_a_step(mode: Accelerator, run: Callable[[int], Any]) -> dict[str, float]:
    """How often each further step of a loop waits for the device, by the file that does."""
    counts: list[Counter[str]] = []
    for steps in FEW_AND_MANY:
        mode.waits = Counter()
        run(steps)
        counts.append(mode.waits)
    few, many = counts
    further = FEW_AND_MANY[1] - FEW_AND_MANY[0]
    return {name: (many[name] - few[name]) / further for name in many if many[name] != few[name]}


@pytest.mark.parametrize("network", ["mlp", "convolution", "batch norm"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
def test_recording_waits_at_most_twice_a_step(network: str, on_disk: bool, away: Accelerator, tmp_path: Path) -> None:
    def record(steps: int) -> None:
        train(DEVICE, network=network, steps=steps, store=tmp_path / str(steps) if on_disk else None)

    found = waits_a_step(away, record)
    assert 0 < sum(found.values()) <= 2, found


def test_ids_on_the_device_are_read_in_one_transfer(away: Accelerator) -> None:
    ids = torch.arange(3).to(DEVICE, non_blocking=True)
    assert checked_ids(ids, SAMPLES).tolist() == [0, 1, 2]
    assert away.waits == {"recording/announced_batch.py": 1}


def test_keyframes_wait_twice_a_step(away: Accelerator) -> None:
    keyframes = pk.Schedule(keyframes=64)
    found = waits_a_step(away, lambda steps: train(DEVICE, "momentum", steps=steps, schedule=keyframes))
    assert 0 < sum(found.values()) <= 2, found


def test_each_of_several_optimizers_waits_once_and_their_step_once_more(away: Accelerator) -> None:
    def record(steps: int) -> None:
        model = NETWORKS["mlp"]().double().to(DEVICE)
        first = torch.optim.SGD(model[0].parameters(), lr=0.1)
        last = torch.optim.AdamW(model[2].parameters(), lr=0.01)
        data = X.to(DEVICE), Y.to(DEVICE)
        with pk.KernelRecorder(model, [first, last], CE, data=data, audit_every=0) as recorder:
            for ids in torch.arange(3 * steps).remainder(SAMPLES).split(3):
                x, y = recorder.batch(ids)
                model.zero_grad()
                CE(model(x), y).backward()
                first.step()
                last.step()

    found = waits_a_step(away, record)
    assert 0 < sum(found.values()) <= 3, found


@pytest.mark.parametrize(
    ("optimizer", "quadrature"),
    [("sgd", pk.Trapezoid()), ("momentum", pk.DiscreteGradient()), ("adamw", pk.DiscreteGradient())],
)
def test_explaining_waits_at_most_twice_a_step(optimizer: str, quadrature: Any, away: Accelerator) -> None:
    runs = {steps: train(DEVICE, optimizer, steps=steps)[1] for steps in FEW_AND_MANY}

    def explain(steps: int) -> None:
        pk.KernelMachine(runs[steps], quadrature=quadrature).explain(X[:3].to(DEVICE), outputs=0)

    found = waits_a_step(away, explain)
    assert {name: found.pop(name) for name in CERTIFICATE} == CERTIFICATE
    assert sum(found.values()) <= 2, found


def test_kernels_along_the_path_wait_once_a_node(away: Accelerator) -> None:
    runs = {steps: train(DEVICE, steps=steps)[1] for steps in FEW_AND_MANY}
    found = waits_a_step(away, lambda steps: pk.PathKernel(runs[steps])(X[:3]))
    # Once a node: whether the signals before the output layer have the form at this θ that spares products.
    assert found == {"gradients/layers/tape.py": 1.0}
