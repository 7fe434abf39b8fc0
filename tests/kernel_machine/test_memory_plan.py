"""A kernel machine within a memory budget: as many numbers as before, no more memory than was allowed, or a refusal."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from cases import make_inputs
from tolerances import TOLERANCES
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.errors import InputError
from pathkernel.gradients.pytrees import memory_bytes
from pathkernel.kernel_machine.backward_sweep import Cuts
from pathkernel.kernel_machine.sweep_plan import Plan
from pathkernel.runtime.allocations import Allocations, Footprint, footprint
from pathkernel.trajectory.stage_gradients import Passes

DOUBLE = TOLERANCES[torch.float64]


# -- what a few samples tell about many ------------------------------------------------------------------------------


def layers(n: int) -> tuple[Tensor, Tensor]:
    """Small activations beside large vectors of parameters, and the other way round further on."""
    x, weight = torch.randn(n, 300), torch.randn(300, 2000, requires_grad=True)
    hidden = (x @ weight).relu().repeat(1, 3)
    return torch.autograd.grad(hidden.sum(), weight)[0], hidden.detach()


@pytest.mark.parametrize("n", [1, 5, 700])
def test_the_peak_of_many_samples_follows_from_few(n: int) -> None:
    found = footprint(layers)
    with Allocations() as allocations:
        kept = layers(n)
        assert found.held(n) == allocations.held == sum(tensor.nbytes for tensor in kept)
    assert found.peak(n) == allocations.peak
    assert found.most(found.peak(n), 10_000) == n
    assert found.most(found.peak(n) + found.slope.max(), n) == n
    assert found.most(found.peak(1) / 2, n) == 0


def test_a_computation_that_goes_another_way_with_more_samples() -> None:
    found = footprint(lambda n: [torch.zeros(1000, dtype=torch.float64) for _ in range(n)])
    assert found.peak(100) == pytest.approx(800_000) == found.held(100)


def test_views_and_results_in_place_are_no_memory_and_what_is_freed_is_none_any_more() -> None:
    given = torch.zeros(100)
    with Allocations() as allocations:
        view = given.view(10, 10)[2:].T
        view.add_(1)
        assert allocations.peak == 0
        one = view + 1
        other = one.reshape(-1)
        del one, other
        assert (allocations.held, allocations.peak) == (0, 2 * 320)
    assert Footprint(np.array([1.0]), np.array([2.0])).plus(1, 1).times(2).peak(3) == 2 * (2 + 9)


# -- the same numbers, however a sweep is cut --------------------------------------------------------------------------


class Tokens(nn.Module):
    """An embedding and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)).mean(1))


def dense(*extra: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *extra, nn.ReLU(), nn.Linear(6, 3))


def convolution(*extra: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), *extra, nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "dense": (dense, make_inputs),
    "convolution": (convolution, lambda n: make_inputs(n, (1, 5, 5))),
    "attention": (Tokens, lambda n: torch.arange(6 * n).reshape(n, 6) * 7 % 11),
    "batch norm": (lambda: dense(nn.BatchNorm1d(6)), make_inputs),
    "dropout": (lambda: dense(nn.Dropout(0.3)), make_inputs),
}
OPTIMIZERS = {
    "sgd": lambda own: torch.optim.SGD(own, 0.05),
    "momentum": lambda own: torch.optim.SGD(own, 0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda own: torch.optim.AdamW(own, 0.01),
    "adafactor": lambda own: torch.optim.Adafactor(own, 0.01),
}


def trained(network: str, optimizer: str, *, accumulated: int = 1, clip: float | None = None) -> pk.Trajectory:
    make, inputs = NETWORKS[network]
    torch.manual_seed(0)
    model, X, y = make().double(), inputs(24), torch.arange(24) % 3
    opt, loss = OPTIMIZERS[optimizer](model.parameters()), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, opt, loss, data=(X, y), audit_every=0) as recorder:
        for place, (x, target) in enumerate(recorder.batches(batch_size=8)):
            loss(model(x), target).backward()
            if (place + 1) % accumulated == 0:
                if clip is not None:
                    nn.utils.clip_grad_value_(model.parameters(), clip)
                opt.step()
                opt.zero_grad()
    return recorder.trajectory


PLANS = {
    "blocks of queries": Plan(2, None, Cuts()),
    "rows of queries": Plan(5, 2, Cuts(roomy=False)),
    "passes of a batch": Plan(5, None, Cuts(Passes(3), roomy=False)),
    "few columns": Plan(5, None, Cuts(columns=7, scratch=1, roomy=False)),
    "streamed": Plan(5, None, Cuts(Passes(3, streamed=True), roomy=False)),
    "everything": Plan(3, 1, Cuts(Passes(1, streamed=True), 5, 1, roomy=False)),
}


def close(found: Any, expected: Any, tolerance: float = DOUBLE.shares) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1e-3, np.abs(expected).max(initial=0)))


def assert_cut_is_whole(
    monkeypatch, plan: Plan, trajectory: pk.Trajectory, X: Tensor, *, form: str = "folded", **asked: Any
) -> None:
    whole = pk.KernelMachine(trajectory, form=form).explain(X, **asked)
    monkeypatch.setattr("pathkernel.kernel_machine.kernel_machine.plan_backward", lambda *_: plan)
    cut = pk.KernelMachine(trajectory, form=form).explain(X, **asked)
    close(cut.shares, whole.shares)
    assert cut.channels.keys() == whole.channels.keys() and cut.modules.keys() == whole.modules.keys()
    for name, value in whole.channels.items():
        close(cut.channels[name] + 1, value + 1)
    for name, value in whole.modules.items():
        close(cut.modules[name], value)
    if whole.steps is not None:
        close(cut.steps, whole.steps)
    close(cut.quadrature_error + 1, whole.quadrature_error + 1)
    assert cut.gradients_per_step == pytest.approx(whole.gradients_per_step)
    if whole.form is not None:
        close(cut.form.shares, whole.form.shares)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_sweep_that_is_cut_is_the_whole_one(monkeypatch, plan: str, network: str, optimizer: str) -> None:
    trajectory, X = trained(network, optimizer), NETWORKS[network][1](5)
    assert_cut_is_whole(monkeypatch, PLANS[plan], trajectory, X, outputs="all")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("optimizer", ["momentum", "adafactor"])
@pytest.mark.parametrize("by", ["module", "step"])
def test_so_are_its_parts(monkeypatch, plan: str, optimizer: str, by: str) -> None:
    assert_cut_is_whole(monkeypatch, PLANS[plan], trained("dense", optimizer), make_inputs(5), by=by)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("clip", [None, 0.02])
def test_so_are_batches_of_which_several_make_a_step(monkeypatch, plan: str, clip: float | None) -> None:
    trajectory = trained("dense", "adamw", accumulated=3, clip=clip)
    assert_cut_is_whole(monkeypatch, PLANS[plan], trajectory, make_inputs(5))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("form", ["average", "ensemble", "constant", "chord"])
def test_so_are_other_forms(monkeypatch, plan: str, form: str) -> None:
    assert_cut_is_whole(monkeypatch, PLANS[plan], trained("dense", "adamw"), make_inputs(5), form=form, outputs=0)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_predictions_in_passes_are_those_of_all_at_once(monkeypatch, network: str, optimizer: str) -> None:
    trajectory, X = trained(network, optimizer), NETWORKS[network][1](5)
    whole = pk.KernelMachine(trajectory).decision_function(X)
    monkeypatch.setattr("pathkernel.kernel_machine.kernel_machine.plan_forward", lambda *_: (2, Passes(3)))
    close(pk.KernelMachine(trajectory).decision_function(X), whole)


# -- kept, or refused ------------------------------------------------------------------------------------------------


def wide(optimizer: str, *extra: nn.Module) -> tuple[pk.Trajectory, Tensor]:
    """A run in which parameters, queries and samples all take their part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 100), *extra, nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 4))
    X, y = torch.randn(60, 20), torch.arange(60) % 4
    opt, loss = OPTIMIZERS[optimizer](model.parameters()), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, opt, loss, data=(X, y), audit_every=0) as recorder:
        for x, target in recorder.batches(batch_size=30):
            opt.zero_grad()
            loss(model(x), target).backward()
            opt.step()
    return recorder.trajectory, torch.randn(10, 20)


def smallest(ask: Callable[[int | str], Any]) -> str:
    """The budget that a refusal names."""
    with pytest.raises(InputError) as refused:
        ask(1)
    assert "kept, not exceeded in silence" in refused.value.expected
    named = re.fullmatch(r'Write `memory="([0-9.]+MB)"` or more', refused.value.write)
    assert named is not None
    return named[1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("asked", ["one", "all", "module", "predictions", "jacobian", "float64", "coupled", "adaptive"])
def test_the_budget_that_is_named_suffices_and_tensors_stay_within_it(optimizer: str, asked: str) -> None:
    if asked == "adaptive" and optimizer != "momentum":
        pytest.skip("takes its time")
    trajectory, X = wide(optimizer, *([nn.BatchNorm1d(100)] if asked == "coupled" else []))
    X = X[:2] if asked == "adaptive" else X

    def ask(memory: int | str) -> Any:
        engine, dtype = ("jacobian" if asked == "jacobian" else "auto"), torch.float64 if asked == "float64" else None
        quadrature = pk.Adaptive(1e-3) if asked == "adaptive" else "auto"
        machine = pk.KernelMachine(trajectory, memory=memory, engine=engine, dtype=dtype, quadrature=quadrature)
        with Allocations() as allocations:
            if asked == "predictions":
                found = machine.decision_function(X)
                return found, allocations.peak
            found = machine.explain(X, "all" if asked == "all" else 0, "module" if asked == "module" else None)
            return found.shares, allocations.peak - found.shares.nbytes * (1 + len(found.modules))

    least = smallest(ask)
    expected, _ = ask("1GB")
    for memory in (least, 2 * memory_bytes(least), 10 * memory_bytes(least)):
        found, peak = ask(memory)
        assert peak <= memory_bytes(memory)
        close(found, expected, TOLERANCES[torch.float32].shares)
    with pytest.raises(InputError, match=re.escape(f'Write `memory="{least}"`')):
        ask(memory_bytes(least) * 9 // 10)


def test_the_passes_of_a_batch_hold_no_vector_of_all_parameters_each() -> None:
    trajectory, _ = wide("sgd")
    recorded, step = pk.KernelMachine(trajectory)._recorded, next(iter(trajectory.steps()))
    recorded.stages(step, rows=True, passes=Passes(1))  # proves how gradients are taken
    with Allocations() as allocations:
        stages = recorded.stages(step, rows=True, passes=Passes(1))
    assert len(stages[0].parts) == 30
    assert allocations.peak < 15 * 8 * trajectory.layout.size


PEAK = """
import ctypes, sys, torch
import pathkernel as pk
from pathkernel.gradients.pytrees import memory_bytes
from torch import nn

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

network, optimizer, budget, asked = sys.argv[1:]
torch.manual_seed(0)
torch.set_num_threads(1)
if network == "conv":
    norm = [nn.BatchNorm2d(32)] if asked == "coupled" else []
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), *norm, nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10),
    )
    X = torch.randn(128, 3, 16, 16)
elif network == "dense":
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    X = torch.randn(400, 64)
else:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    class Pooled(nn.Module):
        def forward(self, x):
            return x.mean(1)
    model = nn.Sequential(nn.Embedding(500, 64), layer, Pooled(), nn.Linear(64, 10))
    X = torch.randint(500, (128, 16))
y, loss = torch.arange(len(X)) % 10, nn.CrossEntropyLoss()
make = {"sgd": lambda p: torch.optim.SGD(p, 0.01), "adam": lambda p: torch.optim.Adam(p),
        "adafactor": lambda p: torch.optim.Adafactor(p)}
opt = make[optimizer](model.parameters())
with pk.KernelRecorder(model, opt, loss, data=(X, y), audit_every=0) as recorder:
    for x, target in recorder.batches(len(X) // 2):
        opt.zero_grad()
        loss(model(x), target).backward()
        opt.step()
machine = pk.KernelMachine(recorder.trajectory, memory=budget, dtype=torch.float64 if asked == "float64" else None)
ctypes.CDLL("libc.so.6").malloc_trim(0)
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")
before = status("VmRSS")
if asked == "predictions":
    result = machine.decision_function(X).nbytes
else:
    result = machine.explain(X[:60], "all" if asked == "all" else None).shares.nbytes
print((status("VmHWM") - before - result) / memory_bytes(budget))
"""


USUALLY = [
    ("dense", "sgd", "200MB", "all"),
    ("conv", "adam", "60MB", "coupled"),
    ("attention", "adam", "50MB", "one"),
]
"""One of each network: a process takes five to twenty seconds."""

PROCESSES = [
    *product(["dense"], ["sgd", "adam"], ["30MB", "50MB", "200MB"], ["one", "all"]),
    *product(["conv"], ["adam"], ["60MB", "200MB"], ["one", "predictions", "coupled"]),
    *product(["attention"], ["sgd", "adam"], ["50MB"], ["one", "predictions"]),
    ("dense", "adafactor", "300MB", "one"),
    ("dense", "adam", "50MB", "float64"),
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("network", "optimizer", "budget", "asked"),
    [row if row in USUALLY else pytest.param(*row, marks=pytest.mark.exhaustive) for row in PROCESSES],
)
def test_the_process_grows_by_no_more_than_its_budget(network: str, optimizer: str, budget: str, asked: str) -> None:
    command = [sys.executable, "-c", PEAK, network, optimizer, budget, asked]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        assert "kept, not exceeded in silence" in done.stderr, done.stderr
    else:
        assert float(done.stdout) <= 1.1
