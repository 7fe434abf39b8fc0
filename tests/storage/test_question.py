"""A stored answer is given to the question that it is the answer to, and to no other."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from cases import generator, make_inputs
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.errors import InputError, StoreError
from pathkernel.quadrature import Adaptive, FixedQuadrature, GaussLegendre, LeftEndpoint, Midpoint, Quadrature
from pathkernel.storage import question
from pathkernel.storage.question import described, differences, numbers
from pathkernel.storage.resumable import _Tile
from pathkernel.tangent_kernel.engines.jacobian import JacobianEngine
from pathkernel.tangent_kernel.engines.projection import Projection
from pathkernel.tangent_kernel.output_probes import OutputProbes

CE = nn.CrossEntropyLoss()
N = 12


class Ensemble(nn.Module):
    """Three outputs, and modules of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.head(self.second(self.first(x).tanh()).tanh())


@functools.cache
def trained(decay: float = 0.5, loss: Any = CE, rate: float = 0.3, samples: int = N) -> pk.Trajectory:
    """The same path for every decay of the average."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Ensemble()
    X, y = make_inputs(samples, dtype=torch.float32), torch.randint(3, (samples,), generator=generator(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay))
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), averages={"ema": ema}) as recorder:
        for ids in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [1, 3, 5, 7]):
            x, target = recorder.batch(ids)
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
            ema.update_parameters(model)
    return recorder.trajectory


QUERIES = make_inputs(5, dtype=torch.float32, seed=3)
TARGETS = torch.tensor([0, 1, 2, 0, 1])


def quadrature_of(time: float) -> Quadrature:
    """Values of classes of one name."""

    class Mine(FixedQuadrature):
        @property
        def nodes(self) -> tuple[tuple[float, float], ...]:
            return ((time, 1.0),)

    return Mine()


def margin(c: int) -> Callable[[Tensor], Tensor]:
    def f(z: Tensor) -> Tensor:
        return z[c] - z.mean()

    return f


class Weighted:
    """A function with values of its own."""

    def __init__(self, *weights: float) -> None:
        self.weights = torch.tensor(weights)

    def __call__(self, z: Tensor) -> Tensor:
        return z @ self.weights.to(z)


def unit(z: Tensor, number: int) -> Tensor:
    return z[number]


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "output 0": lambda z: z[0],
    "outputs 1 and 2": lambda z: z[1] - z[2],
    "closure over 0": margin(0),
    "closure over 1": margin(1),
    "object": Weighted(1.0, 2.0, 0.0),
    "object with other values": Weighted(1.0, 2.0, 1e-4),
    "partial": functools.partial(unit, number=1),
    "other partial": functools.partial(unit, number=2),
    "all moves": lambda z: z[0] + z[1],
    "one is held, with the same values": lambda z: z[0] + z[1].detach(),
    "largest": lambda z: z.max(),
    "probability": lambda z: z.softmax(0)[0],
    "its logarithm": lambda z: z.log_softmax(0)[0],
}

Question = tuple[dict[str, Any], dict[str, Any]]
EXPLANATIONS: dict[str, Question] = {
    **{name: ({}, {"outputs": f}) for name, f in FUNCTIONS.items()},
    "predicted": ({}, {}),
    "index 2": ({}, {"outputs": 2}),
    "index of each": ({}, {"outputs": [0, 1, 2, 1, 0]}),
    "all": ({}, {"outputs": "all"}),
    "loss": ({}, {"outputs": "loss"}),
    "loss at other targets": ({}, {"outputs": "loss", "targets": [0, 1, 2, 0, 2]}),
    "module": ({}, {"outputs": "first"}),
    "module unit": ({}, {"outputs": ("first", 3)}),
    "other module unit": ({}, {"outputs": ("second", 3)}),
    "other unit": ({}, {"outputs": ("second", 2)}),
    "module function": ({}, {"outputs": ("second", lambda z: z[0] * z[1])}),
    "other module function": ({}, {"outputs": ("second", lambda z: z[0] * z[2])}),
    "by module": ({}, {"by": "module"}),
    "by step": ({}, {"by": "step"}),
    "chord": ({"form": "chord"}, {}),
    "averaged": ({"weights": "ema"}, {}),
    "averaged otherwise": ({"weights": "ema", "decay": 0.8}, {}),
    "rows": ({"engine": "jacobian"}, {}),
    "layer by layer": ({"engine": "layerwise"}, {}),
    "float64": ({"dtype": torch.float64}, {}),
    "left": ({"quadrature": LeftEndpoint()}, {}),
    "two nodes": ({"quadrature": GaussLegendre(2)}, {}),
    "three nodes": ({"quadrature": GaussLegendre(3)}, {}),
    "adaptive": ({"quadrature": Adaptive(1e-6)}, {}),
    "adaptive, finer": ({"quadrature": Adaptive(1e-7)}, {}),
    "adaptive, not so deep": ({"quadrature": Adaptive(1e-6, max_depth=3)}, {}),
    "adaptive, fewer": ({"quadrature": Adaptive(1e-6, max_intervals=2)}, {}),
    "midpoint": ({"quadrature": Midpoint()}, {}),
    "own quadrature": ({"quadrature": quadrature_of(0.3)}, {}),
    "own quadrature of the same name": ({"quadrature": quadrature_of(0.7)}, {}),
}


def explain(name: str, store: Path | None, **more: Any) -> np.ndarray:
    options, asked = EXPLANATIONS[name]
    asked, trajectory = dict(asked), trained(options.get("decay", 0.5))
    targets = torch.tensor(asked.pop("targets", TARGETS.tolist()))
    machine = pk.KernelMachine(
        trajectory, **{"unexplained": 1.0, **{k: v for k, v in options.items() if k != "decay"}, **more}
    )
    X = (QUERIES, targets) if asked.get("outputs") == "loss" else QUERIES
    return machine.explain(X, **asked, store=store).shares


@pytest.mark.parametrize("name", EXPLANATIONS)
def test_an_explanation_is_kept_for_its_own_question(name: str, tmp_path: Path) -> None:
    kept = explain(name, tmp_path / "why")
    assert np.array_equal(kept, explain(name, None))
    with mock.patch.object(pk.KernelMachine, "_backward", side_effect=AssertionError("it is there already")):
        assert np.array_equal(explain(name, tmp_path / "why", memory="2GB", unexplained=0.9), kept)
    assert not alike(explain, EXPLANATIONS, name)


class Asked(Exception):
    """Carries what a store would be compared with."""


@functools.cache
def identity(ask: Callable[..., Any], name: str) -> Any:
    def seen(path: Any, identity: Any, *others: Any) -> None:
        raise Asked(identity)

    stores = dict.fromkeys(("resumable_blocks", "resumable_gram"), seen)
    with mock.patch.multiple("pathkernel.storage.resumable", **stores), pytest.raises(Asked) as caught:
        ask(name, Path("nowhere"))
    return caught.value.args[0]


def alike(ask: Callable[..., Any], names: Any, name: str) -> list[str]:
    """Other questions that would be given the answer to this one."""
    own = identity(ask, name)
    assert not differences(own, own, "a question")
    return [other for other in names if other != name and not differences(own, identity(ask, other), "a question")]


def sign_of(sign: float) -> Any:
    """Engines of one name and without values."""

    class Signed:
        def engine(self, function: Any, selection: Any, memory: int) -> Any:
            return Rows(sign).engine(function, selection, memory)

    return Signed()


@dataclass(frozen=True)
class Rows:
    """An engine as a user writes one."""

    scale: float

    def engine(self, function: Any, selection: Any, memory: int) -> Any:
        scale = self.scale

        class Scaled(JacobianEngine):
            exact = False  # or it is compared with autograd, and refused

            def gram(self, *arguments: Any) -> Tensor:
                return super().gram(*arguments) * scale

        return Scaled(function, selection, memory)


KERNELS: dict[str, dict[str, Any]] = {
    **{name: {"outputs": f} for name, f in FUNCTIONS.items() if name != "output 0"},
    "trace": {},
    "mean": {"outputs": "mean"},
    "sum": {"outputs": "sum"},
    "index": {"outputs": 0},
    "other index": {"outputs": 1},
    "full": {"outputs": "full"},
    "loss": {"outputs": "loss"},
    "loss at other targets": {"outputs": "loss", "targets": [0, 1, 2, 0, 2]},
    "vector": {"outputs": lambda z: z[:2]},
    "other vector": {"outputs": lambda z: z[1:]},
    "random outputs": {"outputs": OutputProbes(1, seed=0)},
    "other random outputs": {"outputs": OutputProbes(1, seed=1)},
    "two random outputs": {"outputs": OutputProbes(2, seed=0)},
    "length": {"measure": "arc_length"},
    "uniform": {"measure": "uniform"},
    "preconditioned": {"preconditioner": "optimizer"},
    "left": {"quadrature": "left"},
    "two nodes": {"quadrature": GaussLegendre(2)},
    "three nodes": {"quadrature": GaussLegendre(3)},
    "own quadrature": {"quadrature": quadrature_of(0.3)},
    "own quadrature of the same name": {"quadrature": quadrature_of(0.7)},
    "two steps": {"steps": 2},
    "three steps": {"steps": 3},
    "tolerance": {"tolerance": 0.1},
    "rows": {"engine": "jacobian"},
    "layer by layer": {"engine": "layerwise"},
    "products": {"engine": "products"},
    "sketch": {"engine": Projection(64)},
    "other sketch": {"engine": Projection(64, seed=1)},
    "wider sketch": {"engine": Projection(65)},
    "sparse sketch": {"engine": Projection(64, "sparse")},
    "own engine": {"engine": Rows(1.0)},
    "own engine with other values": {"engine": Rows(2.0)},
    "own engine without values": {"engine": sign_of(3.0)},
    "own engine of the same name": {"engine": sign_of(-1.0)},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "against others": {"Y": QUERIES[:3]},
    "against as many": {"Y": QUERIES.clone()},
}


def gram(name: str, store: Path | None, **more: Any) -> np.ndarray:
    options = {**KERNELS[name], **more}
    targets, Y = torch.tensor(options.pop("targets", TARGETS.tolist())), options.pop("Y", None)
    kernel = pk.PathKernel(trained(), **options)
    return kernel((QUERIES, targets) if options.get("outputs") == "loss" else QUERIES, Y, store=store)


@pytest.mark.parametrize("name", KERNELS)
def test_a_matrix_is_kept_for_its_own_question(name: str, tmp_path: Path) -> None:
    kept = gram(name, tmp_path / "gram")
    assert np.allclose(kept, gram(name, None), rtol=1e-12)
    with mock.patch.object(_Tile, "_write", side_effect=AssertionError("it is there already")):
        assert np.array_equal(gram(name, tmp_path / "gram", memory="2GB"), kept)
    assert not alike(gram, KERNELS, name)


def test_a_function_that_changes_between_two_calls(tmp_path: Path) -> None:
    f = Weighted(1.0, 0.0, 0.0)
    machine, kernel = pk.KernelMachine(trained()), pk.PathKernel(trained(), outputs=f)
    machine.explain(QUERIES, outputs=f, store=tmp_path / "why")
    kernel(QUERIES, store=tmp_path / "gram")
    f.weights[2] = -0.5
    for ask in (
        lambda: machine.explain(QUERIES, outputs=f, store=tmp_path / "why"),
        lambda: kernel(QUERIES, store=tmp_path / "gram"),
    ):
        with pytest.raises(StoreError, match=r"gives other numbers \(.*function\)\. .*Give another path"):
            ask()


def test_samples_in_another_order_or_place_are_other_samples(tmp_path: Path) -> None:
    kernel = pk.PathKernel(trained())
    kernel(QUERIES, store=tmp_path / "gram")
    with pytest.raises(StoreError, match="rows is"):
        kernel(QUERIES.flip(0), store=tmp_path / "gram")


def test_another_path_with_the_same_ends_is_another(tmp_path: Path) -> None:
    plain = trained()
    pk.PathKernel(plain, steps=1)(QUERIES, store=tmp_path / "gram")
    other = trained(rate=0.31)
    with pytest.raises(StoreError, match="trajectory is"):
        pk.PathKernel(other, steps=1)(QUERIES, store=tmp_path / "gram")


def test_another_budget_goes_on(tmp_path: Path) -> None:
    """Blocks were as large as the budget let them be, and those of another budget were taken for damage."""
    queries = make_inputs(150, dtype=torch.float32, seed=4)
    expected = pk.KernelMachine(trained()).explain(queries)
    for memory in ("1GB", "60kB", "200kB"):
        why = pk.KernelMachine(trained(), memory=memory).explain(queries, store=tmp_path / "why")
        assert np.allclose(why.shares, expected.shares, rtol=1e-4, atol=1e-6) and why.relative_residual < 1e-4


CHILD = """
import sys
sys.path[:0] = {tests!r}
import torch
torch.set_num_threads({threads})
import test_question as t
from pathlib import Path
t.pk.KernelMachine._backward = t._Tile._write = None
print(float(t.explain("closure over 1", Path({path!r}) / "why").sum()))
print(float(t.gram("closure over 1", Path({path!r}) / "gram").sum()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_another_process_finds_the_answer(threads: int, tmp_path: Path) -> None:
    sums = [explain("closure over 1", tmp_path / "why").sum(), gram("closure over 1", tmp_path / "gram").sum()]
    folders = [str(folder) for folder in Path(__file__).parents[:2]]
    code = CHILD.format(tests=folders, threads=threads, path=str(tmp_path))
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=True)
    assert [float(line) for line in child.stdout.split()] == sums


# -- what cannot be told from others --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda z: z[0] * (1 + torch.rand(())), r"two answers for the same outputs.*same every time.*leave `store`"),
        (lambda z: z[7], r"`outputs=` fails on the outputs of a query \(IndexError.*one sample's outputs.*lambda z"),
    ],
    ids=["random", "failing"],
)
def test_functions_without_identity_are_refused(outputs: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        pk.KernelMachine(trained()).explain(QUERIES, outputs=outputs, store=tmp_path / "why")
    with pytest.raises(InputError, match=message):
        question.behaviour(lambda z, _: outputs(z), points(), QUERIES, torch.zeros(5, 0))
    assert not (tmp_path / "why").exists()


def points() -> list[tuple[Any, Tensor]]:
    trajectory = trained()
    return [(trajectory.function(), trajectory.final)]


@dataclass(frozen=True)
class Held(Rows):
    """Holds what no file can."""

    hook: Any = None


def test_settings_that_cannot_be_said_are_refused(tmp_path: Path) -> None:
    kernel = pk.PathKernel(trained(), engine=Held(1.0, hook=lambda rows: rows))
    with pytest.raises(InputError, match=r"`engine=Held.*cannot be told from others.*leave `store` out"):
        kernel(QUERIES, store=tmp_path / "gram")
    assert kernel(QUERIES).shape == (5, 5)
    assert not (tmp_path / "gram").exists()


def test_settings_in_words() -> None:
    class Slotted:
        __slots__ = ("a", "b")

        def __init__(self, a: Any) -> None:
            self.a = a

    held = {"x": [1, 2.5, "three", None, np.float32(4), torch.ones(2), np.ones(2), {5, 6}, torch.float32]}
    assert described(held, "it") == described({"x": list(held["x"])}, "it")
    others: list[Any] = [{"x": [1]}, {"y": [1]}, {"x": (1,)}, {"x": ["1"]}]
    others += [Slotted(1), Slotted(2), Adaptive(), Adaptive(max_depth=2)]
    texts = {described(other, "it") for other in [held, *others]}
    assert len(texts) == len(others) + 1
    assert described(list(range(100_000)), "it") != described(list(range(100_001)), "it")
    assert len(described(list(range(100_000)), "it")) < 200
    for opaque in (len, lambda: 0, object(), np.random.default_rng(0), [Slotted], functools.partial(len)):
        with pytest.raises(InputError, match=r"`it=.*functions and other objects.*Give `it` a class"):
            described(opaque, "it")
    own: list[Any] = []
    own.append(own)
    with pytest.raises(InputError, match="cannot be told"):
        described(own, "it")


def test_numbers_within_rounding() -> None:
    row = torch.tensor([1.0, -2.0, torch.nan])
    kept = {"it": numbers([row], 1e-3), "text": "same"}
    assert not differences(kept, {"it": numbers([row + 1e-3], 1e-3), "text": "same"}, "a test")
    assert differences(kept, {"it": numbers([row + 1e-2], 1e-3), "text": "same"}, "a test") == [
        "a test: what is asked gives other numbers (it)"
    ]
    for other in ([row, row], [row.nan_to_num()], [row[:2]], []):
        assert differences(kept, {"it": numbers(other, 1e-3), "text": "same"}, "a test")
    assert differences({"it": "text", "text": "same"}, kept, "a test")
    many = torch.arange(100_000.0)
    assert differences({"it": numbers([many], 1e-6)}, {"it": numbers([many.flip(0)], 1e-6)}, "a test")
    assert len(str(numbers([many], 1e-6))) < 1000
