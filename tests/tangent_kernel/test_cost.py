"""The cost model: against counts by hand, against itself at other sizes, and in what it chooses and says."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import make_inputs, make_model
from torch import nn

import pathkernel as pk
from pathkernel.tangent_kernel.cost.hardware import Machine, machine
from pathkernel.tangent_kernel.cost.model import CostModel, CostRow, Work, choose
from pathkernel.tangent_kernel.cost.operations import Count, counted, operations_at
from pathkernel.tangent_kernel.engines import auto as choice
from pathkernel.tangent_kernel.engines import layerwise

PAGE = Path(__file__).parents[2] / "docs/how_to/large_kernels.md"
CALM = Machine(products=1e11, batched=1e10, bandwidth=4e10, call=2e-6)


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same machine in every run."""
    monkeypatch.setattr("pathkernel.tangent_kernel.cost.model.machine", lambda *_: CALM)


def mlp(width: int = 32, depth: int = 1) -> nn.Module:
    inner = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), *inner, nn.Linear(width, 4))


TOKENS = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(), nn.Linear(32, 3))
"""Of 32 positions each."""


def model_of(module: nn.Module, X: torch.Tensor, **options) -> CostModel:
    kernel = pk.TangentKernel(module, engine="layerwise", **options)
    return CostModel(kernel.engine, kernel.theta, X, torch.zeros(len(X), 0))


def total(rows: list[CostRow], key: str) -> float:
    return sum(getattr(row, key) for row in rows)


@pytest.mark.parametrize("outputs", ["trace", "full", "sum"])
def test_products_of_layers_counted_by_hand(outputs: str) -> None:
    n, m = 300, 200
    rows = {row.layer: row for row in model_of(mlp(), torch.randn(5, 16), outputs=outputs).rows("layerwise", n, m)}
    k, signals = {"trace": (4, 4), "full": (4, 16), "sum": (1, 1)}[outputs]
    assert [rows[f"{i}.weight + {i}.bias"].way for i in (0, 2)] == ["pairs", "pairs"]
    before_head = signals if outputs == "full" else 1  # for a trace, one signal stands for those of all components
    assert rows["2.weight + 2.bias"].flops == pytest.approx(2 * n * m * (32 + before_head * 32), rel=0.15)
    assert rows["0.weight + 0.bias"].flops == pytest.approx(2 * n * m * (16 + signals * 32), rel=0.15)
    head = 32 if outputs != "sum" else 32 + 4  # the output layer's signals are known where h is the outputs
    assert rows["4.weight + 4.bias"].flops == pytest.approx(2 * n * m * head, rel=0.2)
    forward = 2 * (16 * 32 + 32 * 32 + 32 * 4)
    backward = 2 * 32 * 32 if outputs != "sum" else 2 * (32 * 32 + 32 * 4)
    assert rows["passes"].flops == pytest.approx((n + m) * (forward + k * backward), rel=0.2)
    assert rows["result"].peak_bytes == 8 * n * m * (16 if outputs == "full" else 1)


def test_the_way_taken_follows_the_positions() -> None:
    tokens = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2), nn.Flatten())
    for positions, way in ((1, "pairs"), (64, "rows")):
        rows = model_of(tokens, torch.randn(4, positions, 8), outputs="sum").rows("layerwise", 200)
        (first,) = [row for row in rows if row.layer.startswith("0.weight")]
        assert first.way == way and f"T = {positions}" in first.reason


def test_flops_and_bytes_of_single_operations() -> None:
    with Count() as count:
        torch.randn(6, 5) @ torch.randn(5, 7)
    (product,) = [o for o in count.operations if o.name == "mm"]
    assert (product.flops, product.bytes, product.result) == (2 * 6 * 5 * 7, 4 * (30 + 35 + 42), 4 * 42)
    weight = torch.randn(5, 7)
    (product,) = [o for o in operations_at(1000, counted(lambda n: torch.ones(n, 5) @ weight)) if o.name == "mm"]
    assert (product.flops, product.bytes) == (2 * 1000 * 5 * 7, 4 * (5000 + 35 + 7000))


def test_half_of_a_symmetric_matrix() -> None:
    assert Work(1000, 1000, False).pairs(100) == 1_000_000
    assert Work(1000, 1000, True).pairs(100) == 550_000
    assert Work(250, 250, True).pairs(100) == 250 * 100 + 150 * 100 + 50 * 50


def test_growth_in_samples_parameters_and_depth() -> None:
    """Time of large problems: quadratic in n, linear in the number of layers, linear in the width for pairs."""
    big = model_of(mlp(256, 2), torch.randn(4, 16), memory="1TB")
    layers = lambda rows: sum(row.seconds for row in rows if row.way in ("pairs", "rows"))  # noqa: E731
    assert layers(big.rows("layerwise", 20_000)) / layers(big.rows("layerwise", 10_000)) == pytest.approx(4, rel=0.03)
    assert big.seconds("jacobian", 20_000) > 3.5 * big.seconds("jacobian", 10_000)
    deeper = model_of(mlp(256, 4), torch.randn(4, 16))
    assert layers(deeper.rows("layerwise", 4096)) / layers(big.rows("layerwise", 4096)) == pytest.approx(5 / 3, rel=0.2)
    wider = model_of(mlp(512, 2), torch.randn(4, 16), memory="1TB")
    assert layers(wider.rows("layerwise", 4096)) / layers(big.rows("layerwise", 4096)) == pytest.approx(2, rel=0.2)
    plain = wider.seconds("jacobian", 4096) / big.seconds("jacobian", 4096)
    assert plain == pytest.approx(4, rel=0.3)


def test_a_smaller_budget_passes_samples_more_often() -> None:
    X = torch.randn(4, 16)
    passes = [
        next(row for row in model_of(mlp(), X, memory=memory).rows("layerwise", 2000) if row.way == "passes")
        for memory in ("1GB", "1MB")
    ]
    assert passes[1].flops > 2 * passes[0].flops
    assert passes[1].peak_bytes < passes[0].peak_bytes and passes[1].peak_bytes < 1.1e6


class Hidden(torch.autograd.Function):
    """x · w where no layer sees it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, weight = ctx.saved_tensors
        return gradient @ weight.T, x.T @ gradient

    @staticmethod
    def jvp(ctx, x_tangent: torch.Tensor, weight_tangent: torch.Tensor) -> torch.Tensor:
        x, weight = ctx.saved_tensors
        return x_tangent @ weight + x @ weight_tangent


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Hidden.apply(x, self.weight)


def test_layer_by_layer_is_chosen_unless_no_layer_is_known() -> None:
    assert choose(model_of(mlp(256), torch.randn(4, 16)), 1000)[0] == "layerwise"

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, X = Bare().double(), make_inputs(5, (16,))
    bare = model_of(module, X)
    assert choose(bare, 5) == ("jacobian", "no parameter is covered by a layer")
    kernel = pk.TangentKernel(module)
    assert "on the plain engine: weight, " in kernel.explain(X)
    expected = 3 * X @ X.T  # each of three outputs is x · w
    torch.testing.assert_close(torch.as_tensor(kernel(X)), expected)
    torch.testing.assert_close(torch.as_tensor(kernel.diagonal(X)), expected.diagonal())
    torch.testing.assert_close(torch.as_tensor(kernel.operator(X) @ torch.eye(5).numpy()), expected)


@pytest.mark.parametrize("batched", [1e8, 1e10, 1.9e11, 4e11])
@pytest.mark.parametrize("memory", ["4MB", "1GB"])
@pytest.mark.parametrize("outputs", ["trace", "full", "sum"])
def test_layers_suffice_only_where_they_are_chosen(
    outputs: str, memory: str, batched: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = replace(CALM, batched=batched)
    monkeypatch.setattr("pathkernel.tangent_kernel.cost.model.machine", lambda *_: machine)
    said = []
    for module, X in ((mlp(256), torch.randn(4, 16)), (TOKENS, torch.randn(4, 32, 8))):
        model = model_of(module, X, outputs=outputs, memory=memory)
        for n, m in ((3, None), (4, 4), (50, 20), (400, None)):
            said.append(model.layers_suffice(n, m))
            assert not said[-1] or choose(model, n, m)[0] == "layerwise"
    assert any(said) == (batched < 4e11)


def test_nothing_is_counted_where_layers_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathkernel.tangent_kernel.cost.model.counted", lambda *_: pytest.fail("counted"))
    monkeypatch.setattr(choice, "WORTH_CHOOSING", 0)
    pk.TangentKernel(mlp())(torch.randn(6, 16), torch.randn(5, 16))


@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_many_outputs_are_predicted_from_a_few(outputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 outputs no pass is made for more than four, and what is said of them is what passes for all say."""
    module, X = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 40)), torch.randn(4, 16)
    asked = []
    passed = layerwise.LayerwiseEngine.pieces

    def noted(self: Any, theta: Any, x: Any, context: Any, components: slice = slice(None), **options: Any) -> Any:
        asked.append(len(range(40)[components]))
        return passed(self, theta, x, context, components, **options)

    monkeypatch.setattr(layerwise.LayerwiseEngine, "pieces", noted)
    found = [model_of(module, X, outputs=outputs).rows(engine, 30, 20) for engine in ("layerwise", "jacobian")]
    assert max(asked) == 4
    monkeypatch.setattr("pathkernel.tangent_kernel.cost.model.FEW_COMPONENTS", (2, 40))
    monkeypatch.setattr(layerwise, "FEW_COMPONENTS", 40)
    expected = [model_of(module, X, outputs=outputs).rows(engine, 30, 20) for engine in ("layerwise", "jacobian")]
    assert max(asked) == 40
    for row, other in zip(chain(*found), chain(*expected), strict=True):
        assert (row.layer, row.way) == (other.layer, other.way)
        assert row.peak_bytes == pytest.approx(other.peak_bytes)
        assert row.flops == pytest.approx(other.flops, rel=1e-2)
        # A part of the outputs is cut out of all of them, a call more for each sweep; cotangents of all are longer.
        assert (row.bytes, row.seconds) == pytest.approx((other.bytes, other.seconds), rel=0.25)


def test_automatic_engines_do_as_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    module, X = make_model(), make_inputs(6)
    expected, asked = pk.TangentKernel(module, engine="jacobian")(X), []
    monkeypatch.setattr(choice, "WORTH_CHOOSING", 0)
    monkeypatch.setattr(CostModel, "layers_suffice", lambda *_: False)
    for engine in ("layerwise", "jacobian"):
        monkeypatch.setattr(choice, "choose", lambda *a, engine=engine: (asked.append(a[1:]), (engine, ""))[1])
        kernel = pk.TangentKernel(module)
        for _ in range(2):
            torch.testing.assert_close(torch.as_tensor(kernel(X)), torch.as_tensor(expected))
        kernel(X, X[:2])
    assert asked == [(6, None), (6, 2)] * 2  # once for each size


def test_the_table() -> None:
    module = mlp()
    module[0].bias.requires_grad_(False)
    kernel = pk.TangentKernel(module, ["*.weight", "4.bias"], memory="64MB")
    text = kernel.explain(torch.randn(5, 16), n=100_000)
    assert "100000 × 100000 (upper half) by engine 'layerwise', chosen: " in text
    assert re.search(r"predicted: layerwise \S+ m?s, jacobian \S+ m?s, products \S+ m?s\n", text)
    assert "passes in float32, products in float32, sums in float32, matrix in float64\n" in text
    assert re.search(r"\n2\.weight +pairs +\d", text) and re.search(r"\ntotal +\d", text)
    assert "left out: 0.bias (frozen)" in text and "left out: 2.bias (not among `parameters`)" in text
    asked = pk.TangentKernel(module, engine="jacobian", dtype=torch.float64).explain(torch.randn(5, 16))
    assert "5 × 5 (upper half) by engine 'jacobian', as asked; cheapest would be 'layerwise': " in asked
    assert "products in float64" in asked


def test_rows_for_the_benchmark() -> None:
    rows = pk.TangentKernel(mlp()).cost(torch.randn(5, 16), 300, 200)
    assert {row.engine for row in rows} == {"layerwise", "jacobian", "products"}
    assert all(row.seconds >= 0 and row.flops >= 0 and row.peak_bytes >= 0 for row in rows)
    layers, products = (
        total([row for row in rows if row.engine == name], "seconds") for name in ("layerwise", "products")
    )
    assert products > 10 * layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_machine_is_measured_once(dtype: torch.dtype) -> None:
    found = machine(dtype)
    assert found is machine(dtype)
    assert 1e8 < found.batched < 1e14 and 1e8 < found.products < 1e14
    assert 1e8 < found.bandwidth < 1e13 and 1e-8 < found.call < 1e-3


@pytest.mark.parametrize("engine", ["layerwise", "jacobian"])
def test_tensor_floats_are_rated_at_their_own_speed(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def rated(dtype: torch.dtype, device: Any = None, tensor_floats: bool = False) -> Machine:
        return replace(CALM, products=8e11) if tensor_floats else CALM

    monkeypatch.setattr("pathkernel.tangent_kernel.cost.model.machine", rated)
    monkeypatch.setattr("pathkernel.tangent_kernel.precision.multiplies_tensor_floats", lambda device: True)
    exact, rounded = (model_of(mlp(), torch.randn(5, 16), dtype=dtype) for dtype in (torch.float32, "tf32"))
    assert rounded.seconds(engine, 2000) < 0.9 * exact.seconds(engine, 2000)


def test_the_page_runs_as_printed() -> None:
    names: dict[str, object] = {}
    with torch.random.fork_rng(devices=[]):
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL):
            exec(block, names)
