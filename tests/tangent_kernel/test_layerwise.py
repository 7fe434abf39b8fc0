"""The layer-wise engine: right on every kind of layer, in blocks as in one piece, within its budget."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from networks import NETWORKS, PLAIN, network
from tolerances import TOLERANCES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pathkernel as pk
from pathkernel import reference
from pathkernel.errors import InputError
from pathkernel.gradients import matmul as matrix_products
from pathkernel.gradients.contraction import pair_products, parts
from pathkernel.gradients.layers.coverage import ProvedTapes
from pathkernel.gradients.layers.factors import Lookup, Outer, Piece
from pathkernel.runtime.workspace import Workspace
from pathkernel.tangent_kernel.cost import model as cost_model
from pathkernel.tangent_kernel.cost.operations import Count
from pathkernel.tangent_kernel.engines import layerwise as layerwise_engine
from pathkernel.tangent_kernel.engines import tiles
from pathkernel.tangent_kernel.engines.blocking import Plan, Sizes
from pathkernel.tangent_kernel.engines.layerwise import LayerwiseEngine

DOUBLE, SINGLE = TOLERANCES[torch.float64], TOLERANCES[torch.float32]
ACCEPTED = 1e-8


def off(found: Any, expected: Any) -> float:
    """Largest difference, relative to the largest entry."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def kernels(model: nn.Module, outputs: Any, **options: Any) -> tuple[pk.TangentKernel, pk.TangentKernel]:
    return tuple(pk.TangentKernel(model, outputs=outputs, engine=e, **options) for e in ("layerwise", "jacobian"))


def squares(z: Tensor) -> Tensor:
    return z[:2] ** 2


@cache
def blocks_of(name: str) -> np.ndarray:
    """(n, n, C, C), entry by entry."""
    model, X = network(name)
    values = {key: p.detach() for key, p in model.named_parameters()}
    return reference.tangent_kernel(model, values, X).numpy()


REDUCTIONS = {
    "trace": lambda K: np.einsum("nmcc->nm", K),
    "mean": lambda K: np.einsum("nmcc->nm", K) / K.shape[-1],
    "full": lambda K: K,
    "sum": lambda K: K.sum(axis=(2, 3)),
    1: lambda K: K[:, :, 1, 1],
}


@pytest.mark.parametrize("outputs", REDUCTIONS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_equal_to_the_reference(name: str, outputs: Any) -> None:
    model, X = network(name)
    kernel = pk.TangentKernel(model, outputs=outputs, engine="layerwise")
    expected = REDUCTIONS[outputs](blocks_of(name))
    K = kernel(X)
    assert off(K, expected) < ACCEPTED
    assert off(kernel(X, X[:2]), expected[:, :2]) < ACCEPTED
    assert off(kernel(X[:1]), expected[:1, :1]) < ACCEPTED
    assert off(kernel.diagonal(X), expected[np.arange(5), np.arange(5)]) < ACCEPTED
    np.testing.assert_array_equal(K, K.transpose(1, 0, 3, 2) if outputs == "full" else K.T)
    assert set(kernel.engine.tapes.coverage.plain) == PLAIN.get(name, set())


@pytest.mark.parametrize("name", ["mlp", "convolutions", "tied"])
def test_equal_to_the_plain_engine_for_any_function_of_the_outputs(name: str) -> None:
    model, X = network(name)
    layerwise, plain = kernels(model, squares)
    assert off(layerwise(X), plain(X)) < ACCEPTED
    assert off(layerwise(X, X[:2]), plain(X, X[:2])) < ACCEPTED
    assert off(layerwise.diagonal(X), plain.diagonal(X)) < ACCEPTED


def test_losses() -> None:
    model, X = network("positions")
    y = torch.tensor([0, 2, 1, 1, 0])
    layerwise, plain = kernels(model, "loss", loss=nn.CrossEntropyLoss())
    assert off(layerwise((X, y)), plain((X, y))) < ACCEPTED
    assert off(layerwise((X, y), (X[:2], y[:2])), plain((X, y), (X[:2], y[:2]))) < ACCEPTED


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        *(("mlp", 3_000), ("mlp", 20_000), ("convolutions", 40_000)),
        *(("convolutions", 10**5), ("tied", 3 * 10**5), ("tied", 10**6)),
    ],
)
@pytest.mark.parametrize("outputs", ["trace", "full", "sum"])
def test_blocks_are_the_whole(name: str, outputs: str, memory: int) -> None:
    model, X = network(name)
    X = torch.cat([X, X.flip(1)])
    whole = pk.TangentKernel(model, outputs=outputs, engine="layerwise")
    parted = pk.TangentKernel(model, outputs=outputs, engine="layerwise", memory=memory)
    K = parted(X)
    assert off(K, whole(X)) < 1e-12
    assert off(parted(X, X[:4]), whole(X, X[:4])) < 1e-12
    assert off(parted.diagonal(X), whole.diagonal(X)) < 1e-12
    matrix = K.transpose(0, 2, 1, 3).reshape(len(X) * K.shape[2], -1) if outputs == "full" else K
    np.testing.assert_array_equal(matrix, matrix.T)
    eigenvalues = np.linalg.eigvalsh(matrix)
    assert eigenvalues[0] > -DOUBLE.psd * eigenvalues[-1]


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes the blocks that an accelerator gets, on the CPU."""

    def take() -> None:
        for module in (layerwise_engine, tiles, cost_model):
            monkeypatch.setattr(module, "is_away", lambda device: True)

    return take


@pytest.mark.parametrize(
    ("name", "memory"),
    [("mlp", "1GB"), ("mlp", 20_000), ("convolutions", "1GB"), ("convolutions", 10**5), ("tied", "1GB")],
)
@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_blocks_of_an_accelerator_are_the_whole(name: str, outputs: str, memory: Any, away: Callable[[], None]) -> None:
    model, X = network(name)
    kernel = pk.TangentKernel(model, outputs=outputs, engine="layerwise", memory=memory)
    away()
    K, expected = kernel(X), REDUCTIONS[outputs](blocks_of(name))
    assert off(K, expected) < ACCEPTED
    assert off(kernel(X, X[:2]), expected[:, :2]) < ACCEPTED
    np.testing.assert_array_equal(K, K.transpose(1, 0, 3, 2) if outputs == "full" else K.T)


@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_an_accelerator_is_given_fewer_operations(outputs: str, away: Callable[[], None]) -> None:
    model, X = network("mlp")
    X = X.repeat(60, 1)
    kernel = pk.TangentKernel(model, outputs=outputs, engine="layerwise")

    def fewest() -> tuple[int, np.ndarray]:
        """Operations of a call that proves nothing beside, as some of the first do."""
        counts = []
        for _ in range(3):
            with Count() as counted:
                found = kernel(X)
            counts.append(len(counted.operations))
        return min(counts), found

    here, expected = fewest()
    away()
    there, found = fewest()
    assert off(found, expected) < 1e-12
    assert there < 0.9 * here


def metrics(engine: LayerwiseEngine) -> dict[str, Tensor]:
    layout = engine.function.layout
    constant = torch.zeros(layout.size, dtype=torch.float64)
    for place, where in enumerate(layout.slices.values()):
        constant[where] = place + 0.5
    free = torch.rand(layout.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    some = torch.where(free > 0.5, free, 0.0)
    return {"number": torch.full_like(free, 3.0), "of each parameter": constant, "free": free, "zero in places": some}


@pytest.mark.parametrize("metric", ["number", "of each parameter", "free", "zero in places"])
@pytest.mark.parametrize("outputs", ["trace", "full"])
@pytest.mark.parametrize("name", ["mlp", "convolutions", "embedding", "tied", "spectral norm", "own function"])
def test_diagonal_metrics(name: str, outputs: str, metric: str) -> None:
    model, X = network(name)
    layerwise, plain = (kernel.engine for kernel in kernels(model, outputs))
    theta = pk.TangentKernel(model).theta
    d, context = metrics(layerwise)[metric], torch.zeros(len(X), 0)
    for Y, context_Y in ((None, None), (X[:2], context[:2])):
        found = layerwise.gram(theta, X, Y, context, context_Y, d)
        assert off(found, plain.gram(theta, X, Y, context, context_Y, d)) < ACCEPTED
    found = layerwise.diagonal(theta, X, context, d)
    assert off(found, plain.diagonal(theta, X, context, d)) < ACCEPTED


def test_no_parameter_is_covered() -> None:
    model, X = network("own function")
    chosen = dict.fromkeys(PLAIN["own function"])
    values = {name: p for name, p in model.named_parameters() if name in chosen}
    for outputs in ("trace", "full", squares):
        layerwise, plain = kernels(model, outputs, parameters=values)
        assert off(layerwise(X), plain(X)) < ACCEPTED
        assert off(layerwise.diagonal(X), plain.diagonal(X)) < ACCEPTED


class Passes:
    """How often and with how many samples a network is passed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.samples: list[int] = []
        record = ProvedTapes.record

        def counted(tapes: ProvedTapes, theta: Tensor, inputs: Any, function: Any = None, **options: Any) -> Any:
            self.samples.append(len(inputs))
            return record(tapes, theta, inputs, function, **options)

        monkeypatch.setattr(ProvedTapes, "record", counted)


def test_every_sample_passes_once_and_what_is_known_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, X = network("mlp")
    kernel, passes = pk.TangentKernel(model, engine="layerwise"), Passes(monkeypatch)
    kernel(X)
    passes.samples.clear()
    kernel(X)
    kernel(X, X[:2])
    assert passes.samples == [5, 5 + 2]  # rows and columns that are small pass together
    proofs = []
    monkeypatch.setattr("pathkernel.gradients.layers.coverage.prove", lambda *a: proofs.append(a))
    other = copy.copy(kernel.engine)
    other.gram(2 * kernel.theta, X, None, torch.zeros(len(X), 0), None, None)
    assert not proofs, "copies of an engine share what was proved"


def test_the_function_in_use_is_the_one_that_was_put_in() -> None:
    model, X = network("batch norm")
    kernel = pk.TangentKernel(model, engine="layerwise")
    before = kernel(X)
    buffers = {"1.running_var": torch.full((5,), 4.0, dtype=torch.float64)}
    engine = copy.copy(kernel.engine)
    engine.function = kernel.engine.function.with_(constants=buffers)
    found = engine.gram(kernel.theta, X, None, torch.zeros(len(X), 0), None, None)
    model.load_state_dict({**model.state_dict(), **buffers})
    assert off(found, pk.TangentKernel(model, engine="jacobian")(X)) < ACCEPTED
    assert off(found, before) > 0.1
    np.testing.assert_array_equal(kernel(X), before)


class Largest(TorchDispatchMode):
    """The largest tensor made inside, in numbers, and how many products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.products = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not function.is_view:
            self.numbers = max(self.numbers, result.numel())
        self.products += any(word in str(function) for word in ("mm", "linear", "convolution"))
        return result


def test_rows_of_all_samples_are_never_made() -> None:
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 3))
    X, parameters = torch.randn(64, 40), sum(p.numel() for p in model.parameters())
    kernel = pk.TangentKernel(model, engine="layerwise")
    kernel(X)
    with Largest() as largest:
        kernel(X)
    assert largest.numbers < 64 * parameters / 10


def test_frozen_and_unused_parameters_cost_nothing() -> None:
    def deep() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)), nn.Linear(8, 3))

    X = torch.randn(10, 8)

    def products(model: nn.Module) -> int:
        kernel = pk.TangentKernel(model, engine="layerwise")
        kernel(X)
        with Largest() as made:
            kernel(X)
        return made.products

    frozen, unused = deep(), deep()
    frozen[:6].requires_grad_(False)
    unused.register_parameter("unused", nn.Parameter(torch.randn(1000)))
    assert products(frozen) <= 7 + 1, "the pass itself, and the readings of the last layer"
    assert products(unused) == products(deep())
    assert off(pk.TangentKernel(unused)(X), pk.TangentKernel(deep())(X)) < 1e-6


def test_a_tape_goes_with_its_last_reference() -> None:
    model, X = network("convolutions")
    kernel = pk.TangentKernel(model, engine="layerwise")
    kernel(X)
    gc.disable()
    try:
        pieces, tape = kernel.engine.pieces(kernel.theta, X, torch.zeros(len(X), 0))
        output = weakref.ref(tape.calls[0].output)
        del pieces, tape
        assert output() is None, "passes would pile up until the garbage collector runs"
    finally:
        gc.enable()


def test_products_of_bfloat16_factors() -> None:
    model, X = network("mlp", torch.float32)
    exact = pk.TangentKernel(model, engine="layerwise")(X)
    rounded = pk.TangentKernel(model, engine="layerwise", dtype=torch.bfloat16)
    assert rounded.engine.function.dtype == torch.float32, "passes are float32"
    K = rounded(X)
    assert 1e-6 < off(K, exact) < 2e-2
    np.testing.assert_array_equal(K, K.T)
    plain = pk.TangentKernel(model, engine="jacobian", dtype=torch.bfloat16)
    assert 1e-6 < off(plain(X), exact) < 2e-2


def test_a_budget_that_holds_no_sample_is_refused_with_the_sizes() -> None:
    model, X = network("mlp")
    for engine in ("layerwise", "jacobian"):
        with pytest.raises(InputError, match=r"One sample takes .* MB .*budget is 1e-06 MB.*at least one sample.*MB"):
            pk.TangentKernel(model, engine=engine, memory=1)(X)


def test_float16_is_refused() -> None:
    model, _ = network("mlp", torch.float32)
    with pytest.raises(InputError, match=r"(?s)float16.*computed in float64.*Write `dtype=torch.float32`"):
        pk.TangentKernel(model, engine="layerwise", dtype=torch.float16)


# -- contraction ---------------------------------------------------------------------------------------------------


def outer(n: int, k: int, t: int, transposed: bool = False) -> Outer:
    generator = torch.Generator().manual_seed(n + 10 * k)
    signal = torch.randn(n, k, t, 3, generator=generator, dtype=torch.float64)
    return Outer(signal, torch.randn(n, t, 4, generator=generator, dtype=torch.float64), transposed)


def lookup(n: int, k: int, t: int) -> Lookup:
    return Lookup(outer(n, k, t).signal, torch.arange(n * t).reshape(n, t) % 3, 5)


@pytest.mark.parametrize("make", [outer, lookup])
@pytest.mark.parametrize("positions", [1, 3])
def test_pairs_of_positions_are_rows_contracted(make: Any, positions: int) -> None:
    left, right = make(4, 2, positions), make(5, 2, positions)
    rows, others = left.rows(), right.rows()
    one, two = Piece(slice(0, left.size), left), Piece(slice(0, left.size), right)
    full = torch.einsum("nkp,mjp->nkmj", rows, others)
    torch.testing.assert_close(pair_products(one, two, True), full)
    torch.testing.assert_close(pair_products(one, two, False, 2.0), 2 * torch.einsum("nkmk->nm", full))


def test_an_output_layer_against_any_other() -> None:
    unit = torch.eye(3, dtype=torch.float64)[None, :, None].expand(4, 3, 1, 3)
    head = Outer(unit, outer(4, 3, 1).activation, head=True)
    other = outer(5, 1, 1)
    found = pair_products(Piece(slice(0, 12), head), Piece(slice(0, 12), other), True)
    torch.testing.assert_close(found, torch.einsum("nkp,mjp->nkmj", head.rows(), other.rows()))


@pytest.mark.parametrize("factor", [outer(4, 2, 3), outer(4, 2, 3, True), lookup(4, 2, 3)], ids=["outer", "", "lookup"])
def test_parts_are_the_whole(factor: Any) -> None:
    found = [part.factor.rows() for _, part in parts(Piece(slice(0, factor.size), factor), 100)]
    assert len(found) > 1
    torch.testing.assert_close(torch.cat(found, dim=2), factor.rows())


def test_the_product_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.randn(7, 30), torch.randn(30, 5).T  # not contiguous
    expected = left.double() @ right.double().T
    torch.testing.assert_close(matrix_products.product(left, right).double(), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(matrix_products, "_has_onednn", lambda: False)
    torch.testing.assert_close(matrix_products.product(left, right).double(), expected, rtol=1e-5, atol=1e-5)


# -- memory --------------------------------------------------------------------------------------------------------


def test_plans_stay_within_the_budget() -> None:
    sizes = Sizes(components=10, passing=(1e6, 4e5), held=(1e4, 8e4))
    for memory in (64_000_000, 256_000_000, 4_000_000_000):
        for full, away in itertools.product((False, True), repeat=2):
            for n, m in ((256, None), (1000, 500)):
                plan = Plan.of(sizes, memory, n, m, full, away)
                held = (plan.left + (plan.right if plan.left < n or m else 0)) * (1e4 + plan.components * 8e4)
                assert held + plan.passing * (1e6 + plan.components * 4e5) + plan.scratch <= memory
                assert plan.passing >= Plan.of(sizes, memory, n, m, full).passing
    roomy = Plan.of(sizes, 4_000_000_000, 256, None, False)
    assert (roomy.components, roomy.left) == (10, 256)
    tight = Plan.of(sizes, 64_000_000, 256, None, False)
    assert tight.components < 10 and tight.left == 256, "a trace is cut up by components before samples"


def test_thousands_of_outputs_keep_to_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals of all outputs of the few samples that are measured would be 49 MB in one array."""
    monkeypatch.setattr("pathkernel.tangent_kernel.engines.auto.WORTH_CHOOSING", 0)
    parts = nn.Linear(4, 96), nn.Tanh(), nn.Linear(96, 20), nn.Flatten()
    model, X = nn.Sequential(*parts), torch.randn(4, 40, 4)
    made, empty = [], Workspace.empty

    def noted(workspace: Workspace, shape: tuple[int, ...], dtype: torch.dtype, *device: Any) -> Tensor:
        made.append(math.prod(shape) * dtype.itemsize)
        return empty(workspace, shape, dtype, *device)

    monkeypatch.setattr(Workspace, "empty", noted)
    found = pk.TangentKernel(model, memory="8MB")(X, X[:3])
    assert max(made) < 8e6
    rows = torch.cat([p.flatten(2) for p in torch.func.jacrev(lambda p: torch.func.functional_call(model, p, X))(
        {name: p.detach() for name, p in model.named_parameters()}).values()], dim=2).flatten(1)  # fmt: skip
    assert off(found, rows @ rows[:3].T) < 1e-4


PEAK = """
import ctypes, sys, torch
import pathkernel as pk
from torch import nn

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32),
    nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 10),
)
X = torch.randn(192, 1, 28, 28)
budget = 64_000_000
kernel = pk.TangentKernel(model, outputs=sys.argv[1], engine="layerwise", memory=budget)
kernel(X[:4])
ctypes.CDLL("libc.so.6").malloc_trim(0)
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")
before = status("VmRSS")
K = kernel(X)
print((status("VmHWM") - before - K.nbytes) / budget)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_measured_peak_is_within_the_budget(outputs: str) -> None:
    done = subprocess.run([sys.executable, "-c", PEAK, outputs], capture_output=True, text=True, check=True)
    assert 0.2 < float(done.stdout) < 1.1
