"""Passes at several θ as one against passes one by one; what is not proved is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from networks import NETWORKS, network
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathkernel.gradients.factored import FactoredGradients
from pathkernel.gradients.gradient_source import GradientSource
from pathkernel.gradients.layers import proved_stacks
from pathkernel.gradients.layers.coverage import ProvedTapes
from pathkernel.gradients.layers.proved_stacks import ProvedStacks
from pathkernel.gradients.layers.recorded_passes import RecordedPasses
from pathkernel.gradients.layers.stacked_passes import StackedPasses
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout

POINTS = 3

ONE_BY_ONE = {
    "functional": "a sum of parameters and samples, which has no rule",
    "tied": "a table of positions that is added to all samples",
    "class token": "a parameter that is repeated for every sample",
    "weight norm": "a tensor that is computed from parameters",
    "spectral norm": "a tensor that is computed from parameters",
    "merged adapter": "a tensor that is computed from parameters",
    "own function": "a parameter that no rule covers",
}
"""Networks of the table that `vmap` does not take together, and why; recurrent ones have no rule in it."""

NEVER = ("tied", "class token", "own function")
"""Those whose passes are not taken together in any way."""


@pytest.fixture
def by_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operations are noted."""
    monkeypatch.setattr(ProvedStacks, "_program", staticmethod(lambda *asked: None))


def function_of(module: nn.Module) -> tuple[ModelFunction, Tensor]:
    """The network, and θ at a few points, no two alike."""
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    layout = ParameterLayout.of(parameters)
    theta = layout.flatten(parameters)
    noise = torch.randn(POINTS, layout.size, dtype=theta.dtype, generator=torch.Generator().manual_seed(2))
    return ModelFunction(module, layout, dtype=theta.dtype), theta + 0.1 * noise


def samples_at_points(inputs: Any) -> Any:
    """Other samples at each point."""
    return pytree.tree_map(lambda leaf: torch.stack([leaf.roll(s, 0) for s in range(POINTS)]), inputs)


def rows_of(pieces: Any, function: ModelFunction, count: int) -> Tensor:
    rows = torch.empty(count, function.layout.size, dtype=torch.float64)
    return FactoredGradients(function.layout, count, tuple(pieces)).rows(rows)


def assert_single(stack: Any, function: ModelFunction, thetas: Tensor, single: list[Any]) -> None:
    """Outputs and rows of all points, in two components, are those of each by itself."""
    tapes = ProvedTapes(function)
    weights = torch.randn(*stack.outputs.shape, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = stack.pieces(torch.einsum("knc,kncj->knj", stack.outputs, weights))
    for s, own in enumerate(single):
        tape = tapes.record(thetas[s], own)
        torch.testing.assert_close(stack.outputs[s], tape.outputs, rtol=1e-10, atol=1e-12)
        expected = tape.pieces(torch.einsum("nc,ncj->nj", tape.outputs, weights[s]))
        count = 2 * tape.n
        one, other = rows_of(found.at(s), function, count), rows_of(expected, function, count)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("name", NETWORKS)
def test_passes_at_several_points_are_those_of_each(name: str) -> None:
    module, inputs = network(name)
    function, thetas = function_of(module)
    assert_together(function, thetas, inputs, None if name in NEVER else RecordedPasses)


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.usefixtures("by_vmap")
@pytest.mark.parametrize("name", NETWORKS)
def test_passes_that_vmap_takes_together_are_those_of_each(name: str) -> None:
    module, inputs = network(name)
    function, thetas = function_of(module)
    refused = name in ONE_BY_ONE or function.recurrent
    assert_together(function, thetas, inputs, None if refused else StackedPasses)


def assert_together(function: ModelFunction, thetas: Tensor, inputs: Any, kind: type | None) -> None:
    """Passes are made in that way, or one by one, and are those of each point."""
    for shared, own in ((True, inputs), (False, samples_at_points(inputs))):
        stack = ProvedStacks(ProvedTapes(function)).record(thetas, own, shared, 2, function)
        if kind is None:
            assert stack is None
            return
        assert isinstance(stack, kind)
        single = [inputs if shared else pytree.tree_map(lambda leaf, s=s: leaf[s], own) for s in range(POINTS)]
        assert_single(stack, function, thetas, single)


def test_values_are_had_once_gradients_were_proved() -> None:
    module, inputs = network("mlp")
    function, thetas = function_of(module)
    source = GradientSource(function, "auto", 0)
    asked = thetas, inputs, lambda z, c: z[0] * c, torch.arange(len(inputs)) + 1.0
    assert source.values_at_points(*asked, function) is None
    gradients = source.gradients_at_points(*asked, None, function)
    values = source.values_at_points(*asked, function)
    assert gradients is not None and values is not None
    for s, theta in enumerate(thetas):
        outputs = function.outputs(theta, inputs)
        torch.testing.assert_close(values[s, :, 0], outputs[:, 0] * asked[3])
        expected = source.gradients(theta, *asked[1:], None, function)
        v = torch.ones(function.layout.size, dtype=torch.float64)
        torch.testing.assert_close(gradients[s] @ v, expected @ v)


class _Turned(torch.autograd.Function):
    """x²; under `vmap` the points are turned round, in what is read forward and in what comes back."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(context: Any, inputs: Any, output: Tensor) -> None:
        context.save_for_backward(*inputs)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return 2 * context.saved_tensors[0] * gradient

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return _Turned.apply(x.movedim(in_dims[0], 0).roll(1, 0)), 0


class Turned(nn.Module):
    """A network that `vmap` evaluates wrongly, without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5, dtype=torch.float64), nn.Linear(5, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_Turned.apply(self.first(x)))


@pytest.mark.usefixtures("by_vmap")
def test_what_is_wrong_at_several_points_is_taken_one_by_one() -> None:
    module, inputs = Turned(), network("mlp")[1]
    function, thetas = function_of(module)
    tapes = ProvedTapes(function)
    assert not tapes.record(thetas[0], inputs).plain  # one by one nothing is wrong with it
    stacks = ProvedStacks(tapes)
    for shared, own in ((True, inputs), (False, samples_at_points(inputs))):
        assert stacks.record(thetas, own, shared, 1, function) is None
    assert stacks.outputs(thetas, inputs, function) is None


class Branching(nn.Module):
    """A network that looks at its values, which `vmap` refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return z if z.sum() > 0 else 2 * z


def test_what_cannot_be_taken_together_is_refused_once(monkeypatch: pytest.MonkeyPatch) -> None:
    function, thetas = function_of(Branching())
    inputs = network("mlp")[1]
    stacks, tried = ProvedStacks(ProvedTapes(function)), []
    proof = stacks._pattern
    monkeypatch.setattr(stacks, "_pattern", lambda *asked, **told: tried.append(1) or proof(*asked, **told))
    for _ in range(3):
        assert stacks.record(thetas, inputs, True, 1, function) is None
    assert len(tried) == 1


class Outside(nn.Module):
    """A network part of which is computed where torch does not see it: noted, it would be that of other samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * torch.from_numpy(np.abs(x.detach().numpy()).sum(axis=1, keepdims=True))


class Noisy(nn.Module):
    """A network that draws random numbers in evaluation, and takes none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + 0.0 * torch.rand_like(x))


@pytest.mark.parametrize("module", [Branching(), Outside(), Noisy()], ids=["values", "outside", "random"])
def test_what_is_not_the_same_on_other_samples_is_not_noted(module: nn.Module) -> None:
    function, thetas = function_of(module)
    inputs = network("mlp")[1]
    for shared, own in ((True, inputs), (False, samples_at_points(inputs))):
        stack = ProvedStacks(ProvedTapes(function)).record(thetas, own, shared, 1, function)
        assert not isinstance(stack, RecordedPasses)


class Chosen(nn.Module):
    """A network that is another one for samples whose first number is large, seen past torch's operations."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layer = way, nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        large = x[:, 0] > 100.0
        if self.way == "list":
            found = any(row[0] > 100.0 for row in x.tolist())
        elif self.way == "numpy":
            found = bool((np.asarray(x)[:, 0] > 100.0).any())
        elif self.way == "written":
            table = torch.zeros_like(x)
            table[:] = x
            found = bool((table.numpy()[:, 0] > 100.0).any())
        elif self.way == "split":  # which reads the places in memory, and has no operation of its own
            found = len(torch.tensor_split(x[0], large.sum().reshape(1))[0]) > 0
        elif self.way == "columns":  # a shape tells what the values are
            found = x[:, (x > 100.0).any(0)].shape[1] > 0
        else:
            found = len(large.nonzero()) > 0
        z = self.layer(x)
        return torch.where(large.unsqueeze(1), 2 * z, z) if found else z


@pytest.mark.parametrize("way", ["list", "numpy", "written", "split", "columns", "nonzero"])
def test_what_no_sample_of_the_proof_shows_is_not_on_record(way: str) -> None:
    """Samples that come after the proof are run as they are."""
    module, inputs = Chosen(way), network("mlp")[1]
    function, thetas = function_of(module)
    later = inputs.clone()
    later[2, 0] = 200.0
    source = GradientSource(function, "auto", 0)
    for shared, samples in ((True, (inputs, later)), (False, (samples_at_points(inputs), samples_at_points(later)))):
        for own in samples:
            weights = torch.ones(POINTS, len(inputs), 3, dtype=torch.float64)
            if shared:
                asked = own, lambda z, _: z.sum(), torch.zeros(len(own), 0), None, function
                found = source.gradients_at_points(thetas, *asked)
            else:
                found = source.pulled_back_at_points(thetas, own, weights, function)
            for s, theta in enumerate(thetas if found is not None else ()):
                x = own if shared else own[s]
                expected = source.gradients(theta, x, lambda z, _: z.sum(), torch.zeros(len(x), 0), None, function)
                torch.testing.assert_close(found[s].total(), expected.total())


def test_operations_on_record_hold_no_sample() -> None:
    module, inputs = network("mlp")
    function, thetas = function_of(module)
    stack = ProvedStacks(ProvedTapes(function)).record(thetas, inputs, True, 2, function)
    assert isinstance(stack, RecordedPasses)
    stored = [tensor for piece in stack.program.forms for tensor in piece.factor.tensors]
    assert stored and all(tensor.untyped_storage().nbytes() <= tensor.element_size() for tensor in stored)


@pytest.mark.parametrize("in_place", [False, True], ids=["replaced", "in place"])
def test_operations_on_record_are_those_under_their_constants(in_place: bool) -> None:
    """Running statistics are constants of a pass: under others it is another one."""
    module, inputs = network("batch norm")
    function, thetas = function_of(module)
    stacks = ProvedStacks(ProvedTapes(function))
    assert isinstance(stacks.record(thetas, inputs, True, 2, function), RecordedPasses)
    changed = {name: 1.5 * value for name, value in function.constants.items() if name.endswith("running_var")}
    assert changed
    other = function
    if in_place:
        for name, value in changed.items():
            function.constants[name].copy_(value)
    else:
        other = function.with_(constants=changed)
    assert stacks.outputs(thetas, inputs, other) is None  # until it is proved of these
    again = stacks.record(thetas, inputs, True, 2, other)
    assert isinstance(again, StackedPasses)
    for s, theta in enumerate(thetas):
        torch.testing.assert_close(again.outputs[s], other.outputs(theta, inputs))


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the outputs of all proofs."""
    found: list[tuple[int, ...]] = []
    difference = proved_stacks._difference

    def noted(function: Any, pattern: Any, thetas: Tensor, inputs: Any, shared: bool, *rest: Any) -> float:
        rows = inputs if shared else inputs[0]
        assert len(rows.unique(dim=0)) == len(rows) and len(thetas.unique(dim=0)) == len(thetas)
        found.append((len(thetas), len(rows)))
        return difference(function, pattern, thetas, inputs, shared, *rest)

    monkeypatch.setattr(proved_stacks, "_difference", noted)
    yield found


def test_the_proof_is_at_the_sizes_in_use_and_of_distinct_samples(compared: list[tuple[int, ...]]) -> None:
    function, thetas = function_of(network("mlp")[0])
    same = network("mlp")[1][:1].expand(4, -1)  # all alike: none tells another's row from its own
    stacks = ProvedStacks(ProvedTapes(function))
    for points in (3, 2):
        for n in (4, 3):
            for _ in range(2):
                assert stacks.record(thetas[:points].clone(), same[:n], True, 1, function) is not None
    assert compared == [(3, 4), (3, 3), (2, 4), (2, 3)]
