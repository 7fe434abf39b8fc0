"""What happens inside a network, explained as its outputs are: units of a module, and shares module by module."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cases import SAMPLES, Recording, generator, make_inputs, record
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import errors


def inside(run: Recording, name: str, X: Tensor) -> np.ndarray:
    """What a module of the live network puts out, (n, units), caught by cutting the network off behind it."""
    parts = [part for key, part in run.model.named_children()][: int(name) + 1]
    with torch.no_grad():
        return nn.Sequential(*parts)(X).flatten(1).numpy()


@pytest.fixture(scope="module")
def run() -> Recording:
    return record(optimizer="adamw")


@pytest.mark.parametrize("name", ["0", "1", "2"])
def test_every_unit_of_a_module(run: Recording, name: str) -> None:
    machine, X = pk.KernelMachine(run.trajectory), run.queries
    why, live = machine.explain(X, outputs=name), inside(run, name, X)
    n, units = live.shape
    assert why.shares.shape == (n * units, SAMPLES)
    assert why.samples.tolist() == np.repeat(np.arange(n), units).tolist()
    assert why.outputs.tolist() == np.tile(np.arange(units), n).tolist()
    np.testing.assert_allclose(why.output.reshape(n, units), live, rtol=0, atol=1e-14)
    assert why.relative_residual <= 1e-10
    np.testing.assert_allclose(why.reconstruction, why.output, rtol=0, atol=1e-12)


def test_the_last_module_is_the_network(run: Recording) -> None:
    machine = pk.KernelMachine(run.trajectory)
    unit, whole = machine.explain(run.queries, outputs=("2", 1)), machine.explain(run.queries, outputs=1)
    np.testing.assert_allclose(unit.shares, whole.shares, rtol=0, atol=1e-14)
    np.testing.assert_allclose(unit.output, whole.output, rtol=0, atol=1e-14)


def test_units_of_the_first_layer_are_moved_by_their_own_weights(run: Recording) -> None:
    # Before the first activation, unit j is x·w_j + b_j: its shares are the displacements of w_j and b_j alone.
    machine, X = pk.KernelMachine(run.trajectory), run.queries
    why = machine.explain(X, outputs=("0", 3))
    end, start = run.trajectory.parameters(-1), run.trajectory.parameters(0)
    moved = X @ (end["0.weight"] - start["0.weight"])[3] + (end["0.bias"] - start["0.bias"])[3]
    np.testing.assert_allclose(why.output - why.initial, moved, rtol=0, atol=1e-13)
    np.testing.assert_allclose(why.quadrature_error, 0, atol=1e-10)  # linear in the parameters
    # Linear in x too: shares of a sum of queries are sums of shares, without the bias's.
    both = machine.explain(torch.stack([X[0] + X[1], X[0], X[1], torch.zeros(4)]), outputs=("0", 3)).shares
    np.testing.assert_allclose(both[0] + both[3], both[1] + both[2], rtol=0, atol=1e-13)


@pytest.mark.parametrize("index", [0, -1, [1, 0, 3, 4]], ids=str)
def test_one_unit(run: Recording, index) -> None:
    machine, X = pk.KernelMachine(run.trajectory), run.queries
    why, live = machine.explain(X, outputs=("1", index)), inside(run, "1", X)
    every = machine.explain(X, outputs="1")
    chosen = np.broadcast_to(index, len(X)) % live.shape[1]
    rows = np.arange(len(X)) * live.shape[1] + chosen
    np.testing.assert_allclose(why.output, live[np.arange(len(X)), chosen], rtol=0, atol=1e-14)
    # The correction of the discrete gradient is each query's own, so that one unit alone has the same shares.
    np.testing.assert_allclose(why.shares, every.shares[rows], rtol=0, atol=1e-13)


def test_a_function_of_a_module(run: Recording) -> None:
    machine, X = pk.KernelMachine(run.trajectory), run.queries
    why = machine.explain(X, outputs=("1", lambda h: h.square().sum()))
    np.testing.assert_allclose(why.output, (inside(run, "1", X) ** 2).sum(axis=1), rtol=1e-13)
    assert why.shares.shape == (len(X), SAMPLES) and why.relative_residual <= 1e-10
    # A linear function of the units is the same function of their shares.
    weights = torch.arange(5, dtype=torch.float64)
    fixed = pk.KernelMachine(run.trajectory, quadrature=pk.GaussLegendre(2))
    one, units = fixed.explain(X, outputs=("1", lambda h: h @ weights)), fixed.explain(X, outputs="1")
    folded = np.einsum("quN,u->qN", units.shares.reshape(len(X), 5, SAMPLES), weights.numpy())
    np.testing.assert_allclose(one.shares, folded, rtol=0, atol=1e-13)


def test_modules_after_a_tapped_one_have_no_part_in_it(run: Recording) -> None:
    # With fixed nodes: the discrete gradient spreads what it corrects over all parameters.
    machine = pk.KernelMachine(run.trajectory, quadrature=pk.GaussLegendre(4))
    why = machine.explain(run.queries, outputs="1", by="module")
    assert set(why.modules) == {"0", "2"}
    assert (why.modules["2"] == 0).all()
    np.testing.assert_allclose(why.modules["0"], why.shares, rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", ["folded", "average", "ensemble", "constant"])
def test_modules_add_up_to_the_whole(run: Recording, form: str) -> None:
    why = pk.KernelMachine(run.trajectory, form=form).explain(run.queries, outputs="all", by="module")
    assert set(why.modules) == {"0", "2"}
    np.testing.assert_allclose(sum(why.modules.values()), why.shares, rtol=0, atol=1e-14)
    # The last layer's part in the outputs is what moves them when nothing else is differentiated: not nothing.
    assert all(np.abs(part).max() > 1e-3 for part in why.modules.values())


def test_the_part_of_a_module_is_that_of_its_own_displacement() -> None:
    # Without memory or decay, module m's part is Σ_s q_s[m] · Δ_s[m].
    run = record(optimizer="sgd")
    why = pk.KernelMachine(run.trajectory, quadrature=pk.GaussLegendre(8)).explain(run.queries, outputs=1, by="module")
    nodes, weights = np.polynomial.legendre.leggauss(8)
    expected = {name: np.zeros(len(run.queries)) for name in ("0", "2")}
    for s in range(len(run.trajectory)):
        start, end = run.trajectory.parameters(s), run.trajectory.parameters(s + 1)
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            twin = copy.deepcopy(run.model)
            twin.load_state_dict({k: start[k] + float(node) * (end[k] - start[k]) for k in start})
            for q in range(len(run.queries)):
                gradients = torch.autograd.grad(twin(run.queries[[q]])[0, 1], list(twin.parameters()))
                for key, gradient in zip(start, gradients, strict=True):
                    moved = float((gradient * (end[key] - start[key])).sum())
                    expected[key.split(".")[0]][q] += weight * moved
    for name, part in expected.items():
        np.testing.assert_allclose(why.modules[name].sum(axis=1), part, rtol=0, atol=1e-13)


class Nested(nn.Module):
    """A block with a parameter of its own beside its submodules, and token ids for inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.block = nn.ModuleDict({"inner": nn.Linear(4, 4), "outer": nn.Linear(4, 3)})
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.block["inner"](self.embedding(tokens))) * self.scale
        return self.block["outer"](h.mean(dim=1))


def test_modules_of_any_depth_by_their_dotted_names() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Nested().double()
    tokens = torch.randint(6, (SAMPLES, 3), generator=generator(1))
    y, loss = torch.randint(3, (SAMPLES,), generator=generator(2)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pk.KernelRecorder(model, optimizer, loss, data=(tokens, y)) as recorder:
        for x, target in recorder.batches(4):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    machine = pk.KernelMachine(recorder.trajectory, quadrature=pk.GaussLegendre(6))
    why = machine.explain(tokens[:2], outputs="block.inner", by="module")
    live = model.block["inner"](model.embedding(tokens[:2])).detach().reshape(2, 12)
    np.testing.assert_allclose(why.output.reshape(2, 12), live, rtol=0, atol=1e-14)
    assert why.relative_residual <= 1e-10
    assert set(why.modules) == {"", "embedding", "block.inner", "block.outer"}
    assert (why.modules["block.outer"] == 0).all() and (why.modules[""] == 0).all()
    whole = machine.explain(tokens[:2], outputs=0, by="module")
    np.testing.assert_allclose(sum(whole.modules.values()), whole.shares, rtol=0, atol=1e-14)
    assert all(np.abs(part).max() > 0 for part in whole.modules.values())


def test_running_statistics_before_a_tapped_module_are_in_its_channels() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double().train()
    X, y, loss = make_inputs(SAMPLES), torch.randint(3, (SAMPLES,), generator=generator(2)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for x, target in recorder.batches(5):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    model.eval()
    machine = pk.KernelMachine(recorder.trajectory)
    for name, live in (("0", model[0](X[:2])), ("1", model[:2](X[:2]))):
        why = machine.explain(X[:2], outputs=name)
        np.testing.assert_allclose(why.output.reshape(2, 5), live.detach(), rtol=0, atol=1e-13)
        assert why.relative_residual <= 1e-10
        assert np.abs(why.channels["buffers"]).max() > 1e-3 if name == "1" else (why.channels["buffers"] == 0).all()


@pytest.mark.parametrize("outputs", ["3", ("relu", 0), ""], ids=repr)
def test_a_module_that_is_not_there_is_refused(run: Recording, outputs) -> None:
    with pytest.raises(errors.InputError) as caught:
        pk.KernelMachine(run.trajectory).explain(run.queries, outputs=outputs)
    name = outputs if isinstance(outputs, str) else outputs[0]
    assert caught.value.found == f"`outputs` names the module {name!r}"
    assert caught.value.expected == "The network's modules are '0', '1', '2'"
    assert 'machine.explain(X, outputs=("0", 3))` for unit 3 of module "0"' in caught.value.write


def test_a_unit_that_is_not_there_is_refused(run: Recording) -> None:
    with pytest.raises(errors.InputError, match="`outputs=5` was given for 4 samples of a network with 5 outputs"):
        pk.KernelMachine(run.trajectory).explain(run.queries, outputs=("1", 5))
