"""Kernels and explanations are computed in full float32, and torch's settings stay the user's."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.gradients import matmul
from pathkernel.runtime import precision
from pathkernel.runtime.precision import EXACT_PRODUCTS
from pathkernel.tangent_kernel import precision as asked
from pathkernel.tangent_kernel.cost import hardware

MATMUL: Any = torch.backends.mkldnn.matmul
CE = nn.CrossEntropyLoss()
seen_in_passes: set[str] = set()


@pytest.fixture(params=["high", "medium"])
def reduced(request: pytest.FixtureRequest) -> Iterator[str]:
    """What a user lets torch do to the factors of products; on processors without bfloat16 it chooses other kernels."""
    torch.set_float32_matmul_precision(request.param)
    try:
        yield MATMUL.fp32_precision
    finally:
        torch.set_float32_matmul_precision("highest")


class Watched(nn.Module):
    """Network that notes under which setting each pass runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen_in_passes.add(MATMUL.fp32_precision)
        return self.last(torch.tanh(self.first(x)))


def recorded(**options: Any) -> tuple[nn.Module, pk.Trajectory, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, X, y = Watched(), torch.randn(8, 4), torch.arange(8) % 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pk.KernelRecorder(model, optimizer, CE, data=(X, y), audit_every=0, **options) as recorder:
        for x, target in recorder.batches(4):
            optimizer.zero_grad()
            CE(model(x), target).backward()
            optimizer.step()
    return model, recorder.trajectory, X


def test_kernels_and_machines_compute_in_full_precision(reduced: str) -> None:
    assert reduced != "ieee"
    seen_in_passes.clear()
    model, trajectory, X = recorded()
    assert reduced in seen_in_passes  # the loop's own passes
    kernels = [pk.TangentKernel(model, engine=engine) for engine in ("auto", "jacobian")]
    machine = pk.KernelMachine(trajectory)
    seen_in_passes.clear()
    for kernel in kernels:
        kernel(X[:3])
    machine.explain(X[:2], outputs=0)
    machine.decision_function(X[:2])
    assert seen_in_passes == {"ieee"}
    assert MATMUL.fp32_precision == reduced


def test_products_between_passes_are_full_as_well(reduced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    product = torch.Tensor.__matmul__

    def watched(left: Tensor, right: Tensor) -> Tensor:
        seen.add(MATMUL.fp32_precision)
        return product(left, right)

    _, trajectory, X = recorded()
    machine = pk.KernelMachine(trajectory)
    expected = machine.explain(X[:2], outputs=0).shares
    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    np.testing.assert_array_equal(machine.explain(X[:2], outputs=0).shares, expected)
    assert seen == {"ieee"}


def test_steps_are_trained_again_as_the_loop_trained_them(reduced: str) -> None:
    _, trajectory, _ = recorded(schedule=pk.Schedule(keyframes=8))
    with EXACT_PRODUCTS:
        seen_in_passes.clear()
        trajectory.store.read(len(trajectory) - 1)
        assert seen_in_passes == {reduced}
        assert MATMUL.fp32_precision == "ieee"


def test_what_the_user_lets_a_gpu_do_is_known_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    before = EXACT_PRODUCTS.tensor_floats()
    assert before[1:] == (True, True)  # cuDNN does it unless it is told not to
    torch.set_float32_matmul_precision("high")
    try:
        with EXACT_PRODUCTS:
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
            assert EXACT_PRODUCTS.tensor_floats() == (True, True, True)
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    assert EXACT_PRODUCTS.tensor_floats() == before


@pytest.mark.parametrize("asked", ["highest", "high", "medium"])
def test_all_of_torchs_settings_come_back_with_a_gpu(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    torch.set_float32_matmul_precision(asked)
    try:
        before = settings()
        with EXACT_PRODUCTS:
            assert settings() == ["ieee", "ieee", False, False, "highest"]
            with EXACT_PRODUCTS.lifted():
                assert settings() == before
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def settings() -> list[Any]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    on_gpu = matmul.fp32_precision, matmul.allow_tf32, cudnn.allow_tf32
    return [MATMUL.fp32_precision, *on_gpu, torch.get_float32_matmul_precision()]


def test_settings_come_back_after_an_error_and_when_the_last_thread_leaves(reduced: str) -> None:
    with pytest.raises(ZeroDivisionError), EXACT_PRODUCTS:
        _ = 1 / 0
    assert MATMUL.fp32_precision == reduced
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with EXACT_PRODUCTS:
            inside.set()
            leave.wait(10)

    with EXACT_PRODUCTS:
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
    assert MATMUL.fp32_precision == "ieee"
    with EXACT_PRODUCTS.lifted(), EXACT_PRODUCTS.lifted():
        assert MATMUL.fp32_precision == reduced
    leave.set()
    thread.join()
    assert MATMUL.fp32_precision == reduced


class Switch:
    """Stands for torch's switch of products on a GPU."""

    allow_tf32 = False


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Switch:
    found = Switch()
    monkeypatch.setattr(precision, "_gpu_settings", lambda: [(found, "allow_tf32", False)])
    return found


def test_products_in_tensor_floats_for_as_long_as_they_are_started(switch: Switch) -> None:
    with EXACT_PRODUCTS:
        with EXACT_PRODUCTS, EXACT_PRODUCTS.tensor_floats_in_products():
            assert switch.allow_tf32
        assert not switch.allow_tf32
        with pytest.raises(KeyError), EXACT_PRODUCTS.tensor_floats_in_products():
            raise KeyError
        assert not switch.allow_tf32


def test_no_tensor_floats_while_another_thread_computes_in_full_precision(switch: Switch) -> None:
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with EXACT_PRODUCTS:
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    with EXACT_PRODUCTS:
        with EXACT_PRODUCTS.tensor_floats_in_products():
            assert not switch.allow_tf32
        done.set()
        thread.join()
        with EXACT_PRODUCTS.tensor_floats_in_products():
            assert switch.allow_tf32


def test_the_switch_is_the_users_while_training_is_run_again(switch: Switch) -> None:
    with EXACT_PRODUCTS, EXACT_PRODUCTS.lifted():
        switch.allow_tf32 = True  # as the loop had it
        with EXACT_PRODUCTS.tensor_floats_in_products():
            pass
        assert switch.allow_tf32


def test_tensor_floats_are_measured_as_they_are_multiplied(switch: Switch, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[bool] = set()
    monkeypatch.setattr(matmul, "_takes_tensor_floats", lambda factor: True)
    monkeypatch.setattr(matmul, "_has_onednn", lambda: False)
    monkeypatch.setattr(hardware, "_seconds", lambda work, *_: (work(), 1.0)[1])
    products = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda *own: (seen.add(switch.allow_tf32), products(*own))[1])
    for tensor_floats, expected in ((False, {False}), (True, {True, False})):  # of many small products none is rounded
        seen.clear()
        hardware._measured.__wrapped__(torch.float32, 1, hardware.CPU, tensor_floats)
        assert seen == expected


@pytest.mark.parametrize("made", ["products", pk.Projection(dim=8)])
def test_what_multiplies_no_gradients_does_not_say_that_it_rounds_them(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asked, "multiplies_tensor_floats", lambda device: True)
    kernel = pk.TangentKernel(nn.Linear(4, 3), engine=made, dtype="tf32")
    assert "products in float32" in kernel.describe() and "products in float32" in kernel.describe(torch.randn(3, 4))
    assert not kernel.engine.tensor_floats


@pytest.mark.parametrize("outputs", ["trace", "full"])
@pytest.mark.parametrize("engine", ["layerwise", "jacobian"])
def test_products_of_gradients_are_all_that_tensor_floats_are_for(
    engine: str, outputs: str, switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU stands for a GPU that has them: the factors that `product` is given under the switch are noted."""
    rounded: list[torch.Size] = []
    monkeypatch.setattr(matmul, "_takes_tensor_floats", lambda factor: rounded.append(factor.shape) is None)
    monkeypatch.setattr(matmul, "_has_onednn", lambda: False)
    monkeypatch.setattr(asked, "multiplies_tensor_floats", lambda device: True)
    model, X = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(8, 4)
    exact = pk.TangentKernel(model, engine=engine, outputs=outputs)(X)
    assert not rounded
    kernel = pk.TangentKernel(model.double(), engine=engine, outputs=outputs, dtype="tf32")
    np.testing.assert_allclose(kernel(X), exact, rtol=1e-4, atol=1e-5)
    assert rounded and all(shape[0] % len(X) == 0 for shape in rounded)
    assert kernel.function.dtype == torch.float32
    assert "passes in float32, products in TensorFloat-32" in kernel.describe()
    assert pickle.loads(pickle.dumps(kernel)).engine.tensor_floats
