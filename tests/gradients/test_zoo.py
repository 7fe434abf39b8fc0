"""Rows belong to their samples whatever a network does with them inside, and every network comes back as it was."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import cases
import networks
import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn
from zoo import COUPLED, COUPLED_IN_TRAINING, ZOO, Specimen, UnderTwoNames

import pathkernel as pk
from pathkernel import reference
from pathkernel.errors import PathKernelError

RIGHT = 1e-10
SIZES = [(name, n) for name, specimen in ZOO.items() for n in (*(specimen.lengths or (5,))[:1], 7)]
"""Every network at as many samples as a length inside it, and at another number."""

LOSS = nn.CrossEntropyLoss()


def trained(
    net: nn.Module, X: Tensor, batches: list[Tensor], *, audit_every: int = 1
) -> tuple[pk.Trajectory, list[float]]:
    """Steps of SGD on record, and their losses."""
    y, losses = torch.arange(len(X)) % 3, []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    with pk.KernelRecorder(net, optimizer, LOSS, data=(X, y), audit_every=audit_every) as recorder:
        for ids in batches:
            x, target = recorder.batch(ids)
            optimizer.zero_grad()
            value = LOSS(net(x), target)
            value.backward()
            optimizer.step()
            losses.append(value.item())
    return recorder.trajectory, losses


def batches_of(n: int, samples: int, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randperm(samples, generator=generator)[:n] for _ in range(steps)]


# -- whose rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_each_network_of_the_zoo_is_a_function_of_one_sample(name: str) -> None:
    net, X = ZOO[name].build(), ZOO[name].samples(7)
    together, order = net(X), torch.randperm(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(together, torch.cat([net(X[i : i + 1]) for i in range(7)]))
    torch.testing.assert_close(together[order], net(X[order]))


def trace_of_kernel(net: nn.Module, X: Tensor) -> np.ndarray:
    """Σ_c ⟨∇f_c(x), ∇f_c(x')⟩, by a loop of autograd."""
    return reference.tangent_kernel(net.eval(), dict(net.named_parameters()), X).diagonal(dim1=2, dim2=3).sum(2).numpy()


@pytest.mark.parametrize(("name", "n"), SIZES)
def test_kernels_are_those_of_plain_autograd(name: str, n: int) -> None:
    net, X = ZOO[name].build(), ZOO[name].samples(n)
    right, kernel = trace_of_kernel(net, X), pk.TangentKernel(net)
    np.testing.assert_allclose(kernel(X), right, rtol=RIGHT, atol=RIGHT * abs(right).max())
    assert not kernel.check(X) > 1e-8


@pytest.mark.parametrize(("name", "n"), SIZES)
def test_shares_are_those_of_plain_autograd(name: str, n: int) -> None:
    specimen = ZOO[name]
    net, X, queries = specimen.build(), specimen.samples(2 * n), specimen.samples(n, seed=5)
    start, batches = copy.deepcopy(net), batches_of(n, 2 * n, 2)
    trajectory, _ = trained(net, X, batches)
    nodes, rule = pk.GaussLegendre(3), reference.gauss_legendre(3)
    why = pk.KernelMachine(trajectory, quadrature=nodes).explain(queries, outputs=0)
    y, ids = torch.arange(2 * n) % 3, [batch.tolist() for batch in batches]
    right = reference.decompose(start, LOSS, X, y, ids, "sgd", queries[:2], 0, rule, lr=0.05, momentum=0.9)
    shares = right.shares.numpy()
    np.testing.assert_allclose(why.shares[:2], shares, rtol=RIGHT, atol=RIGHT * abs(shares).max())
    assert not why.split_error > 1e-8


@pytest.mark.parametrize("name", ZOO)
def test_no_engine_asked_for_by_name_returns_something_else(name: str) -> None:
    net, X = ZOO[name].build(), ZOO[name].samples(7)
    right = trace_of_kernel(net, X)
    for engine in ("layerwise", "jacobian", "products", "autograd"):
        found = pk.TangentKernel(net, engine=engine)(X)
        np.testing.assert_allclose(found, right, rtol=RIGHT, atol=RIGHT * abs(right).max(), err_msg=engine)


@pytest.mark.parametrize("name", COUPLED)
def test_what_is_no_function_of_one_sample_is_refused_before_training(name: str) -> None:
    net, X = COUPLED[name].build(), COUPLED[name].samples(7)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(PathKernelError):
        pk.TangentKernel(net)(X)
    with pytest.raises(PathKernelError):
        trained(net, X, batches_of(4, 7, 1))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# -- as it was ------------------------------------------------------------------------------------------------------


def _of_table(name: str) -> Specimen:
    make, kind = networks.NETWORKS[name]
    shapes = {"vectors": (6,), "sequences": (4, 6), "images": (2, 6, 6), "tokens": (8,)}
    return Specimen(make, kind, shape=shapes[kind])


EVERY = {
    **ZOO,
    **COUPLED_IN_TRAINING,
    **{f"networks: {name}": _of_table(name) for name in networks.NETWORKS},
    **{
        f"cases: {name}": Specimen(lambda case=case: case.make(3), shape=case.sample)
        for name, case in cases.MODELS.items()
    },
}
"""Every network of the tests."""


def belongings(net: nn.Module) -> dict[str, Any]:
    """Which objects every module of a network holds, and under which names."""
    found: dict[str, Any] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        own = vars(module)
        found[path] = (id(module), module.training, {name: id(value) for name, value in own.items()})
        for name, value in own.items():
            if isinstance(value, dict):  # parameters, buffers, modules and hooks
                found[f"{path} {name}"] = {key: id(entry) for key, entry in value.items()}
    return found


def surroundings() -> tuple[Any, ...]:
    """What belongs to the whole process."""
    flags = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    backends = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.flags, torch.is_anomaly_enabled()
    return (*flags, *backends, torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes())


def values(net: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in (*net.parameters(), *net.buffers())]


def gradients(net: nn.Module) -> list[int]:
    return [id(parameter.grad) for parameter in net.parameters()]


def unchanged(net: nn.Module, call: Callable[[], object]) -> None:
    """See that a call leaves the network, and whatever surrounds it, as it was."""
    before = belongings(net), gradients(net), surroundings(), values(net)
    call()
    assert belongings(net) == before[0]
    assert gradients(net) == before[1]
    assert surroundings() == before[2]
    assert all(torch.equal(a, b) for a, b in zip(values(net), before[3], strict=True))


def plain_losses(net: nn.Module, X: Tensor, batches: list[Tensor]) -> list[float]:
    """Losses of the same steps without a recorder."""
    y, optimizer, losses = torch.arange(len(X)) % 3, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), []
    for ids in batches:
        optimizer.zero_grad()
        value = LOSS(net(X[ids]), y[ids])
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


MODES = [pytest.param(True, id="training"), pytest.param(False, id="evaluation", marks=pytest.mark.slow)]


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("name", EVERY)
def test_every_network_under_two_names_comes_back_as_it_was(name: str, training: bool) -> None:
    specimen, n = EVERY[name], 5
    net = UnderTwoNames(specimen.build())
    X, batches = specimen.samples(2 * n), batches_of(n, 2 * n, 2)
    for mode in (not training, training):
        net.train(mode)
        if specimen.evaluation:
            net.net.eval()
        unchanged(net, lambda: pk.TangentKernel(net)(X[:3]))
    twin = copy.deepcopy(net)

    torch.manual_seed(0)
    before, expected = belongings(net), plain_losses(twin, X, batches)
    torch.manual_seed(0)
    trajectory, losses = trained(net, X, batches)
    assert belongings(net) == before
    assert losses == expected

    machine = pk.KernelMachine(trajectory, quadrature="left")
    unchanged(net, lambda: machine.explain(X[:2], outputs=0))
    unchanged(net, lambda: machine.decision_function(X[:2]))
    unchanged(net, lambda: pk.PathKernel(trajectory)(X[:2]))
    unchanged(net, lambda: pk.TangentKernel(net)(X[:2]))

    torch.manual_seed(1)
    expected = plain_losses(twin, X, batches)
    torch.manual_seed(1)
    assert plain_losses(net, X, batches) == expected


# -- two threads ----------------------------------------------------------------------------------------------------


@pytest.fixture
def switching() -> Any:
    """Threads that take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("asked", ["kernel", "path kernel", "machine"])
def test_two_threads_get_right_answers_and_leave_the_network_alone(asked: str, switching: None) -> None:
    net, X = zoo.two_layers().double(), torch.randn(20, zoo.WIDTH, dtype=torch.float64)
    trajectory, _ = trained(net, X, batches_of(5, 20, 2))
    kernel, path_kernel, machine = pk.TangentKernel(net), pk.PathKernel(trajectory), pk.KernelMachine(trajectory)
    ask: dict[str, Callable[[], np.ndarray]] = {
        "kernel": lambda: kernel(X),
        "path kernel": lambda: path_kernel(X),
        "machine": lambda: np.hstack([machine.explain(X[:3], outputs=0).shares, machine.decision_function(X[:3])]),
    }
    right, found, raised = ask[asked](), [], []

    def work() -> None:
        try:
            found.extend(ask[asked]() for _ in range(10))
        except Exception as error:
            raised.append(error)

    def at_once() -> None:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    unchanged(net, at_once)
    assert raised == []
    for answer in found:
        np.testing.assert_allclose(answer, right, rtol=RIGHT, atol=RIGHT * abs(right).max())
