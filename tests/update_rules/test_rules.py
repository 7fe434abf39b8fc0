"""Update rules: linear, with the right adjoint, and the very step that `torch.optim` takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from cases import OPTIMIZERS, generator, record
from tolerances import TOLERANCES
from torch import Tensor

import pathkernel as pk
from pathkernel import reference
from pathkernel.trajectory.step import Step
from pathkernel.update_rules.rule import UpdateRule, adjoint
from pathkernel.update_rules.sgd import SGD
from pathkernel.update_rules.table import RULES, rule_of

DOUBLE = TOLERANCES[torch.float64]
NAME = "0.weight"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


class Whitening(UpdateRule):
    """Δ = −η m⁺ R with m⁺ = 0.9 m + g and a frozen matrix R: not elementwise."""

    name, memory, elementwise = "Whitening", ("buffer",), False

    def step(self, gradient, memory, frozen, settings):
        buffer = 0.9 * memory[0] + gradient
        return -float(settings["lr"]) * buffer @ frozen["R"], (buffer,)


Setup = tuple[UpdateRule, Mapping[str, Any], Mapping[str, Any], torch.Size]


def setups() -> dict[str, Setup]:
    """A rule, what one of its steps froze, and its settings: the first and a later step of every optimizer."""
    found: dict[str, Setup] = {}
    for name in OPTIMIZERS:
        trajectory = record(optimizer=name).trajectory
        shape = dict(zip(trajectory.layout.names, trajectory.layout.shapes, strict=True))[NAME]
        steps = list(trajectory.steps())
        for index in (0, 3):
            step = steps[index]
            found[f"{name}-{index}"] = trajectory.rule, step.frozen[NAME], step.hyperparameters_of(NAME), shape
    shape = torch.Size((5, 4))
    found["not_elementwise"] = Whitening(), {"R": normal(4, 4)}, {"lr": 0.3}, shape
    return found


SETUPS = setups()


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(-2).sum(dim=-1)


@pytest.mark.parametrize("name", SETUPS)
def test_the_adjoint_by_inner_products(name: str) -> None:
    # ⟨q, Δ⟩ + ⟨μ⁺, m⁺⟩ = ⟨u, g⟩ + ⟨μ, m⟩ for all g, m, q, μ⁺: which also says that the step is linear, with no
    # constant term.
    rule, frozen, settings, shape = SETUPS[name]
    queries, slots = 3, len(rule.memory)
    q, gradient = normal(queries, *shape, seed=1), normal(*shape, seed=2)
    weights = tuple(normal(queries, *shape, seed=3 + i) for i in range(slots))
    memory = tuple(normal(*shape, seed=6 + i) for i in range(slots))
    delta, after = rule.step(gradient, memory, frozen, settings)
    (u,), before = adjoint(rule, frozen, settings, q, weights)
    assert u.shape == q.shape and len(before) == slots
    left = inner(q, delta) + sum(inner(w, m) for w, m in zip(weights, after, strict=True))
    right = inner(u, gradient) + sum(inner(w, m) for w, m in zip(before, memory, strict=True))
    torch.testing.assert_close(left, right, rtol=DOUBLE.rounding, atol=DOUBLE.rounding)


@pytest.mark.parametrize("name", [name for name, setup in SETUPS.items() if setup[0].elementwise])
def test_an_elementwise_rule_is_elementwise(name: str) -> None:
    # Parameters with equal settings are stepped as one vector: shape and neighbours must not matter.
    rule, frozen, settings, shape = SETUPS[name]
    gradient, memory = normal(*shape), tuple(normal(*shape, seed=1 + i) for i in range(len(rule.memory)))
    delta, after = rule.step(gradient, memory, frozen, settings)
    for i in (0, 7, shape.numel() - 1):
        one = {k: v.flatten()[i : i + 1] if isinstance(v, Tensor) else v for k, v in frozen.items()}
        held = tuple(m.flatten()[i : i + 1] for m in memory)
        found, left = rule.step(gradient.flatten()[i : i + 1], held, one, settings)
        assert torch.equal(found, delta.flatten()[i : i + 1])
        assert all(torch.equal(a, b.flatten()[i : i + 1]) for a, b in zip(left, after, strict=True))


def displaced(rule: UpdateRule, step: Step, name: str, where: slice, memory: tuple[Tensor, ...]):
    """Δ and memory of one parameter as the rule has it: gradient, sources and all."""
    frozen, settings = step.frozen[name], step.hyperparameters_of(name)
    parameter = step.before[where]
    received = step.gradient[where] + sum(rule.gradient_sources(parameter, frozen, settings).values())
    if frozen and any(isinstance(v, Tensor) for v in frozen.values()):
        frozen = {k: v.reshape(-1) if isinstance(v, Tensor) else v for k, v in frozen.items()}
    delta, memory = rule.step(received, memory, frozen, settings)
    return delta + sum(rule.displacement_sources(parameter, frozen, settings).values()), memory


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_is_that_of_torch(name: str, dtype: torch.dtype) -> None:
    run = record(optimizer=name, dtype=dtype)
    rule, layout = run.trajectory.rule, run.trajectory.layout
    sizes = {parameter: where.stop - where.start for parameter, where in layout.slices.items()}
    memory = {p: tuple(torch.zeros(size, dtype=dtype) for _ in rule.memory) for p, size in sizes.items()}
    for step in run.trajectory.steps():
        for parameter, where in layout.slices.items():
            delta, memory[parameter] = displaced(rule, step, parameter, where, memory[parameter])
            expected = step.after[where] - step.before[where]
            rounding = 1e-14 if dtype == torch.float64 else 3e-7  # of θ + Δ, which is of order 1
            torch.testing.assert_close(delta, expected, rtol=0, atol=rounding)
    for parameter in layout.slices:
        held = run.optimizer.state[run.model.get_parameter(parameter)]
        for key, slot in zip(rule.memory, memory[parameter], strict=True):
            if held.get(key) is not None:
                torch.testing.assert_close(slot, held[key].reshape(-1), rtol=1e-5, atol=1e-7)
    assert torch.equal(run.trajectory.final, torch.nn.utils.parameters_to_vector(run.model.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_preconditioner_is_what_a_step_does_to_the_gradient(name: str) -> None:
    rule, frozen, settings, shape = SETUPS[f"{name}-3"]
    zero = tuple(torch.zeros(shape, dtype=torch.float64) for _ in rule.memory)
    gradient = normal(*shape)
    delta, _ = rule.step(gradient, zero, frozen, settings)
    D = rule.preconditioner(shape, frozen, settings, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(-float(settings["lr"]) * D * gradient, delta, rtol=DOUBLE.rounding, atol=0)


def test_a_rule_is_found_by_the_class_of_the_optimizer() -> None:
    for case in OPTIMIZERS.values():
        assert type(rule_of(case([torch.nn.Parameter(torch.zeros(1))]))) is RULES[case.make]


class ByHand(torch.optim.Optimizer):
    """An optimizer that torch does not have: Δ = −η diag(1, 2, 3, …) g, and nothing else."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    ramp = torch.arange(1.0, p.numel() + 1, dtype=p.dtype).reshape(p.shape)
                    p.sub_(group["lr"] * ramp * p.grad)


class Ramp(UpdateRule):
    """The rule of `ByHand`: what an entry does depends on its place, so that parameters must not be joined."""

    name, elementwise = "ByHand", False

    def step(self, gradient, memory, frozen, settings):
        ramp = torch.arange(1.0, gradient.numel() + 1, dtype=gradient.dtype).reshape(gradient.shape)
        return -float(settings["lr"]) * ramp * gradient, memory


def test_a_rule_of_the_users_own() -> None:
    base = record()
    model = base.start
    optimizer = ByHand(model.parameters(), lr=0.02)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pk.KernelRecorder(model, optimizer, base.loss, data=(base.X, base.y), rule=Ramp()) as recorder:
        for x, y in recorder.batches(batch_size=5):
            optimizer.zero_grad()
            base.loss(model(x), y).backward()
            optimizer.step()
    why = pk.KernelMachine(recorder.trajectory).explain(base.queries, outputs=0)
    assert why.relative_residual < DOUBLE.residual
    # The first step by hand: share_i = −η ⟨∇f, ramp · g_i⟩.
    first = pk.KernelMachine(recorder.trajectory, quadrature="left").explain(base.queries, outputs=0, by="step")
    ramp = torch.cat([torch.arange(1.0, p.numel() + 1, dtype=torch.float64) for p in start.values()])
    rows = reference.sample_gradients(model, start, base.loss, base.X[:5], base.y[:5])
    f = reference.output_gradients(model, start, base.queries)[:, 0]
    expected = -0.02 * f @ (ramp * rows.sum(dim=0))
    torch.testing.assert_close(torch.as_tensor(first.steps)[:, 0], expected, rtol=DOUBLE.shares, atol=1e-12)


def test_plain_descent_leaves_its_memory_alone() -> None:
    settings = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "nesterov": False}
    buffer = normal(3)
    _, (after,) = SGD().step(normal(3, seed=1), (buffer,), {"first": True}, settings)
    assert torch.equal(after, buffer)
