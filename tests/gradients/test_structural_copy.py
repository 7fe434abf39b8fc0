"""Passes run on a copy: the user's module keeps its objects, its modes, its state; and no copy reaches into it."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.errors import UnsupportedModelError
from pathkernel.gradients.structural_copy import StructuralCopy


def rows(model: nn.Module, X: Tensor) -> np.ndarray:
    """The kernel of the trace by a loop of autograd over samples."""
    parameters, found = list(model.parameters()), []
    for x in X:
        own = []
        for z in model(x[None]).reshape(-1):
            each = torch.autograd.grad(z, parameters, retain_graph=True, allow_unused=True)
            pairs = zip(parameters, each, strict=True)
            own.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs]))
        found.append(torch.stack(own))
    jacobian = torch.stack(found)
    return torch.einsum("icp,jcp->ij", jacobian, jacobian).numpy()


class Named(nn.Module):
    """Each layer has two names, as `self.net = nn.Sequential(self.l1, …)` gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 2)
        self.net = nn.Sequential(self.one, nn.Tanh(), self.two)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Repeated(nn.Module):
    """One layer three times in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)] * 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class OneActivation(nn.Module):
    """One PReLU used twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.first = nn.Linear(4, 5), nn.Linear(5, 2), nn.PReLU()
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.two(self.first(self.one(x))))


class TwoOwners(nn.Module):
    """One parameter, registered by two modules and by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.again = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.two(torch.tanh(self.one(x)))) @ self.again


class InLists(nn.Module):
    """Parameters that are also kept in a list, a dict and a plain attribute, and modules in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.ones(3))
        self.layer = nn.Linear(3, 3)
        self.kept, self.table, self.plain = [self.weight], {"scale": self.scale}, [self.layer]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.plain[0](x @ self.kept[0] * self.table["scale"]))


class Closures(nn.Module):
    """Functions that refer to the module: a lambda, a bound method, a partial, a default argument, a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale, self.shift = (nn.Parameter(torch.rand(n)) for n in (4, 3, 3))
        self.layer = nn.Linear(4, 3)
        self.weigh = lambda x: x * self.weight
        self.scaled = self._scaled
        self.shifted = functools.partial(self._shifted, factor=2.0)
        self.head = lambda x, layer=self.layer: layer(x)
        self.layer.register_forward_hook(lambda module, inputs, output: output + self.shift)

    def _scaled(self, x: Tensor) -> Tensor:
        return x * self.scale

    def _shifted(self, x: Tensor, factor: float) -> Tensor:
        return x + factor * self.shift

    def forward(self, x: Tensor) -> Tensor:
        return self.shifted(self.scaled(torch.tanh(self.head(self.weigh(x)))))


class Counting(nn.Module):
    """Counts its passes, and keeps what it saw last."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.passes, self.seen, self.cache = nn.Linear(4, 2), 0, [], torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.seen.append(len(x))
        self.cache += 1
        return self.layer(x)


class WithLock(nn.Linear):
    """Holds what cannot be copied and matters to nobody."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.lock, self.generator = threading.Lock(), torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return super().forward(x)


NETWORKS = {
    kind.__name__: kind for kind in (Named, Repeated, OneActivation, TwoOwners, InLists, Closures, Counting, WithLock)
}


def state(model: nn.Module) -> list[Any]:
    """Everything that must be the very same object afterwards."""
    objects = [id(child) for child in model.modules()]
    for child in model.modules():
        objects += [(key, id(value)) for key, value in (*child._parameters.items(), *child._buffers.items())]
        objects += [child.training, tuple(vars(child)), len(child._forward_hooks), len(child._forward_pre_hooks)]
    return [*objects, *(p.requires_grad for p in model.parameters()), *(id(p.grad) for p in model.parameters())]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("engine", ["auto", "jacobian", "products", "autograd"])
def test_kernels_are_right_and_leave_the_module_as_it_was(name: str, engine: str, training: bool) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().double().train(training)
    X = torch.randn(5, 4, dtype=torch.float64)
    before, values = state(model), [p.detach().clone() for p in model.parameters()]
    numbers = torch.get_rng_state()
    K = pk.TangentKernel(model, engine=engine)(X)
    assert state(model) == before
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    assert torch.equal(torch.get_rng_state(), numbers)
    expected = rows(model, X)
    np.testing.assert_allclose(K, expected, rtol=1e-10, atol=1e-12 * abs(expected).max())


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "WithLock"])
def test_training_goes_on_as_without_a_recorder(name: str) -> None:
    def train(recorded: bool) -> tuple[list[float], nn.Module]:
        torch.manual_seed(0)
        model, losses = NETWORKS[name](), []
        X = torch.randn(12, 4)
        y = torch.randint(2, (12,))
        optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.3), nn.CrossEntropyLoss()

        def step(x: Tensor, target: Tensor) -> None:
            optimizer.zero_grad()
            value = loss(model(x), target)
            losses.append(value.item())
            value.backward()
            optimizer.step()

        if not recorded:
            for _ in range(3):
                for ids in torch.arange(12).split(4):
                    step(X[ids], y[ids])
            return losses, model
        before = state(model)[:-1]
        with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=1) as recorder:
            for _ in range(3):
                for x, target in recorder.batches(4):
                    step(x, target)
        why = pk.KernelMachine(recorder.trajectory).explain(X[:3], outputs=0)
        assert why.residual.max() < 1e-4 and why.split_error < 1e-5
        pk.PathKernel(recorder.trajectory)(X[:3])
        assert [type(p) for p in model.parameters()] == [nn.Parameter] * len(list(model.parameters()))
        assert len(before) == len(state(model)[:-1])
        return losses, model

    plain, one = train(False)
    seen, other = train(True)
    assert plain == seen and plain[:3] != plain[3:6]  # the weights move
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    if isinstance(one, Counting) and isinstance(other, Counting):
        assert (one.passes, one.seen) == (other.passes, other.seen) and torch.equal(one.cache, other.cache)


def test_what_cannot_be_copied_is_named() -> None:
    class Holding(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.file = open(__file__)  # noqa: SIM115

    model = Holding()
    with pytest.raises(UnsupportedModelError, match="attribute `file` of the model"):
        pk.TangentKernel(model)
    model.file.close()


def test_scripted_modules_are_refused_by_name() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 2)))
    with pytest.raises(UnsupportedModelError, match="`0` is scripted"):
        pk.TangentKernel(model)


def test_a_parameter_that_no_copy_can_replace_is_named() -> None:
    class InTuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(4, 2)), nn.Linear(2, 2)
            self.pair = (self.weight, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x @ self.pair[0])

    with pytest.raises(UnsupportedModelError, match="reads `weight` in a way that no copy"):
        pk.TangentKernel(InTuple())(torch.randn(3, 4))


def test_a_module_that_is_not_registered_is_a_constant() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.hidden = nn.Linear(4, 3), [nn.Linear(3, 2)]

        def forward(self, x: Tensor) -> Tensor:
            return self.hidden[0](torch.tanh(self.layer(x)))

    model = Hidden().double()
    model.hidden[0].double()
    X = torch.randn(3, 4, dtype=torch.float64)
    kernel = pk.TangentKernel(model)
    expected = rows(model, X)
    np.testing.assert_allclose(kernel(X), expected, rtol=1e-10)
    with torch.no_grad():
        model.hidden[0].weight.mul_(2)  # a kernel keeps copies
    np.testing.assert_allclose(kernel(X), expected, rtol=1e-10)


def test_hooks_of_a_recorder_are_not_copied() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    X, y = torch.randn(8, 4), torch.randn(8, 2)
    with pk.KernelRecorder(model, optimizer, nn.MSELoss(), data=(X, y)) as recorder:
        for x, target in recorder.batches(4):
            optimizer.zero_grad()
            nn.MSELoss()(model(x), target).backward()
            optimizer.step()
        assert model._forward_hooks and not StructuralCopy(model).module._forward_hooks


@pytest.mark.parametrize("ask", ["kernel", "path kernel", "machine", "explain", "operator"])
def test_two_threads(ask: str) -> None:
    import sys

    torch.manual_seed(0)
    X = torch.randn(24, 4)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-2), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, (X[:, 0] > 0).long())) as recorder:
        for x, target in recorder.batches(8):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    trajectory, tangent = recorder.trajectory, pk.TangentKernel(model)
    machine, operator = pk.KernelMachine(trajectory), tangent.operator(X)
    calls = {
        "kernel": lambda: tangent(X),
        "path kernel": lambda: pk.PathKernel(trajectory)(X),  # another object in each thread
        "machine": lambda: machine.decision_function(X),
        "explain": lambda: machine.explain(X[:4]).shares,
        "operator": lambda: operator.matvec(np.ones(24)),
    }
    call, start = calls[ask], [p.detach().clone() for p in model.parameters()]
    expected, found = call(), []
    attention = torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()

    def work() -> None:
        for _ in range(4):
            found.append(call())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(found) == 8
    for one in found:
        np.testing.assert_array_equal(one, expected)
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True))
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()) == attention
