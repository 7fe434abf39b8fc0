"""Contract of update rules, checked: a rule is what its optimizer does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pathkernel.errors import PathKernelError
from pathkernel.kernel_machine.kernel_machine import KernelMachine
from pathkernel.quadrature import GaussLegendre
from pathkernel.recording.recorder import KernelRecorder
from pathkernel.trajectory.batch_gradients import RecordedGradients
from pathkernel.trajectory.step import Step
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.rule import Frozen, Memory, Settings, UpdateRule, adjoint

ARITHMETIC = 1e-10
"""How far two float64 evaluations of one linear map may be apart, relative to the size of what they add up."""

STEP = {torch.float64: 1e-12, torch.float32: 3e-6}
"""How far a rule's step may be from the optimizer's, relative to the parameter's largest entry of it, besides the
rounding of θ + Δ."""

RESIDUAL = {torch.float64: 1e-6, torch.float32: 1e-4}
"""What may be left over of how far the outputs moved: the quadrature's error in float64, rounding of θ in float32."""


class UpdateRuleError(PathKernelError, AssertionError):
    """An update rule does not keep its contract."""


def check_update_rule(
    rule: UpdateRule,
    make_optimizer: Callable[[Any], Optimizer | Sequence[Optimizer]],
    *,
    steps: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    closure: bool = False,
) -> None:
    r"""Check that an update rule is what its optimizer does.

    A small tanh network is trained with the optimizer, on record. Then, for every step and every parameter:

    1. ``step`` is linear, its adjoint satisfies :math:`\langle q, \Delta\rangle + \langle \mu^+, m^+\rangle =
       \langle u, g\rangle + \langle \mu, m\rangle`, and an ``elementwise`` rule does not see the parameter's shape;
    2. ``step``, the sources and the memory carried from step to step give the displacement that was recorded;

    and over the whole run

    3. the network's outputs are the sum of shares and channels.

    Parameters
    ----------
    rule
        The rule; a `pathkernel.update_rules.joint.JointRule` for several optimizers, with one part for each.
    make_optimizer
        Makes the optimizer, or a list of several, from an iterable of parameters; it may leave some of them out.
    steps
        Steps to train, at least 2, so that memory is carried.
    seed
        Of network, samples and probes.
    dtype
        Floating type of the network: float64 checks formulas, float32 checks rounding besides.
    closure
        Train by ``optimizer.step(closure)``, as is done in any case for rules with several ``stages``.

    Raises
    ------
    UpdateRuleError
        An `AssertionError` that says at which step, for which parameter, and by how much.

    Examples
    --------
    >>> import torch
    >>> from pathkernel.testing import check_update_rule
    >>> from pathkernel.update_rules.sgd import SGD
    >>> check_update_rule(SGD(), lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    """
    trajectory, inputs = _train(rule, make_optimizer, steps, seed, dtype, closure or rule.stages > 1)
    generator = torch.Generator().manual_seed(seed + 1)
    for step, name, shape, frozen, settings in _moves(trajectory):
        where = f"At step {step.index}, for `{name}`,"
        _check_adjoint(rule, frozen, settings, shape, generator, where)
        if rule.elementwise:
            _check_elementwise(rule, frozen, settings, shape, generator, where)
    _check_steps(rule, trajectory)
    _check_completeness(rule, trajectory, inputs)


def _train(
    rule: UpdateRule,
    make_optimizer: Callable[[Any], Optimizer | Sequence[Optimizer]],
    steps: int,
    seed: int,
    dtype: torch.dtype,
    by_closure: bool,
) -> tuple[Trajectory, Tensor]:
    """A recorded training run, and inputs to query."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, dtype=torch.float64, generator=generator))
    inputs, targets = (torch.randn(12, n, dtype=torch.float64, generator=generator).to(dtype) for n in (3, 2))
    made, loss = make_optimizer(model.parameters()), nn.MSELoss()
    optimizers = [made] if isinstance(made, Optimizer) else list(made)
    with KernelRecorder(model, optimizers, loss, data=(inputs, targets), rule=rule) as recorder:
        for s in range(steps):
            x, y = recorder.announce(torch.arange(4 * s, 4 * s + 5) % 12)

            def closure(x: Any = x, y: Any = y) -> Tensor:
                model.zero_grad()  # of parameters that the optimizer does not have, too
                value = loss(model(x), y)
                value.backward()
                return value

            if not by_closure:
                closure()
            for optimizer in optimizers:
                if by_closure:
                    optimizer.step(closure)  # type: ignore[arg-type]
                else:
                    optimizer.step()
    return recorder.trajectory, inputs


def _moves(trajectory: Trajectory) -> Iterator[tuple[Step, str, torch.Size, Frozen, Settings]]:
    """Every parameter that moved in every step, with what its rule sees, in float64."""
    layout = trajectory.layout
    for step in trajectory.steps():
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            if name in step.active:
                frozen = {
                    key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
                    for key, value in step.frozen[name].items()
                }
                yield step, name, shape, frozen, step.hyperparameters_of(name)


# -- linear, with the right adjoint ----------------------------------------------------------------------------------


def _packed(rule: UpdateRule, gradients: tuple[Tensor, ...]) -> Any:
    """The gradients as `UpdateRule.step` takes them."""
    return gradients if rule.stages > 1 else gradients[0]


def _normal(count: int, shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count))


def _check_adjoint(
    rule: UpdateRule, frozen: Frozen, settings: Settings, shape: torch.Size, generator: torch.Generator, where: str
) -> None:
    slots = len(rule.memory)
    one, other = (_normal(rule.stages + slots, shape, generator) for _ in range(2))

    def apply(point: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        delta, memory = rule.step(_packed(rule, point[: rule.stages]), point[rule.stages :], frozen, settings)
        return delta, *memory

    # The coefficients do not add up to 1, so that a constant term shows as well.
    mixed = apply(tuple(2 * a - 3 * b for a, b in zip(one, other, strict=True)))
    terms = [(2 * a, -3 * b) for a, b in zip(apply(one), apply(other), strict=True)]
    for key, found, (a, b) in zip(("Δ", *rule.memory), mixed, terms, strict=True):
        error, scale = (found - (a + b)).abs().max().item(), max(a.abs().max().item(), b.abs().max().item())
        if not error <= ARITHMETIC * scale:
            raise UpdateRuleError(
                f"{where} `{type(rule).__name__}.step` is not linear: {key} is off by {error:.1e} where terms are of "
                f"size {scale:.1e}",
                "Given what is frozen, a step is linear in gradient and memory, without a constant term",
                "Move what depends on the gradient into `frozen`, and what is added to the step into "
                "`displacement_sources`",
            )
    delta_weight, *memory_weight = _normal(1 + slots, shape, generator)
    pulled, carried = adjoint(rule, frozen, settings, delta_weight[None], tuple(w[None] for w in memory_weight))
    back = (*(pulled if isinstance(pulled, tuple) else (pulled,)), *carried)
    forward = [(w * v).sum().item() for w, v in zip((delta_weight, *memory_weight), apply(one), strict=True)]
    backward = [(w[0] * v).sum().item() for w, v in zip(back, one, strict=True)]
    error, scale = abs(sum(forward) - sum(backward)), sum(map(abs, (*forward, *backward)))
    if not error <= ARITHMETIC * scale:
        raise UpdateRuleError(
            f"{where} the adjoint of `{type(rule).__name__}.step` fails the inner-product test by {error:.1e}, where "
            f"terms are of size {scale:.1e}",
            "⟨q, Δ⟩ + ⟨μ⁺, m⁺⟩ = ⟨u, g⟩ + ⟨μ, m⟩ holds when a step is built from differentiable tensor operations",
            "Leave out `detach`, `no_grad`, `item` and in-place operations on the way from gradient and memory to Δ",
        )


def _check_elementwise(
    rule: UpdateRule, frozen: Frozen, settings: Settings, shape: torch.Size, generator: torch.Generator, where: str
) -> None:
    point = _normal(rule.stages + len(rule.memory), shape, generator)
    vectors = {key: value.reshape(-1) if isinstance(value, Tensor) else value for key, value in frozen.items()}

    def apply(values: tuple[Tensor, ...], kept: Frozen) -> Tensor:
        return rule.step(_packed(rule, values[: rule.stages]), values[rule.stages :], kept, settings)[0].reshape(-1)

    odd = [key for key, value in frozen.items() if isinstance(value, Tensor) and value.shape != shape]
    expected = apply(point, frozen)
    error = torch.inf if odd else (apply(tuple(v.reshape(-1) for v in point), vectors) - expected).abs().max().item()
    if not error <= ARITHMETIC * expected.abs().max().item():
        found = f"frozen {', '.join(f'`{key}`' for key in odd)} of another shape" if odd else f"Δ off by {error:.1e}"
        raise UpdateRuleError(
            f"{where} `{type(rule).__name__}` calls itself elementwise, but as one vector the parameter has {found}",
            "Elementwise rules see parameters of equal settings joined into one vector, with their frozen tensors",
            "Set `elementwise = False` in the rule, or freeze tensors in the parameter's shape and numbers otherwise",
        )


# -- the step that was taken -----------------------------------------------------------------------------------------


def _check_steps(rule: UpdateRule, trajectory: Trajectory) -> None:
    """Carry the memory from step to step and compare every displacement with the recorded one."""
    layout = trajectory.layout
    memory: dict[str, Memory] = {
        name: tuple(torch.zeros(shape, dtype=torch.float64) for _ in rule.memory)
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    }
    for name, held in trajectory.initial_memory.items():
        memory[name] = tuple(slot.double() for slot in held)
    for step, name, shape, frozen, settings in _moves(trajectory):
        where = layout.slices[name]
        theta = step.before[where].double().reshape(shape)
        sources = sum(rule.gradient_sources(theta, frozen, settings).values())
        gradients = tuple(g[where].reshape(shape) + sources for g in _gradients(rule, trajectory, step))
        delta, memory[name] = rule.step(_packed(rule, gradients), memory[name], frozen, settings)
        delta = delta + sum(rule.displacement_sources(theta, frozen, settings).values())
        recorded = step.after[where].double().reshape(shape) - theta
        error, size = (delta - recorded).abs().max().item(), recorded.abs().max().item()
        rounding = torch.finfo(trajectory.dtype).eps * (theta.abs().max().item() + size)
        excess = (error - rounding) / max(STEP[trajectory.dtype] * size, torch.finfo(torch.float64).tiny)
        if not excess <= 1:
            relative = f"{error / size:.1e} of it" if size else "where it did not move"
            raise UpdateRuleError(
                f"At step {step.index}, `{name}` was moved by up to {size:.3g}, and `{type(rule).__name__}` is off by "
                f"{error:.1e}, {relative}",
                "Step, sources and carried memory together are what the optimizer did, to rounding",
                "Compare `step` with the optimizer's source term by term; in `frozen`, copy what the optimizer "
                "changes in place, and name what is needed as it was before the step in `observes` "
                "(`keep_before`)",
            )


def _gradients(rule: UpdateRule, trajectory: Trajectory, step: Step) -> tuple[Tensor, ...]:
    """The gradients of a step, (P,) float64 each: the one on record, or recomputed at every stage."""
    if rule.stages == 1:
        return (step.gradient.double(),)
    recomputed = RecordedGradients(trajectory, trajectory.function(), 2**28).stages(step, rows=False)
    return tuple(stage.samples + sum(stage.channels.values(), torch.zeros(())) for stage in recomputed)


# -- completeness ------------------------------------------------------------------------------------------------------


def _check_completeness(rule: UpdateRule, trajectory: Trajectory, inputs: Tensor) -> None:
    why = KernelMachine(trajectory, quadrature=GaussLegendre(4)).explain(inputs[:4], outputs=0)
    left, rounding = np.abs(why.left_over).max(), 4 * len(trajectory) * torch.finfo(trajectory.dtype).eps
    moved, size = np.abs(why.output - why.initial).max(), np.abs(why.output).max()
    if not left <= RESIDUAL[trajectory.dtype] * moved + rounding * size:
        raise UpdateRuleError(
            f"Under `{type(rule).__name__}`, shares and channels miss outputs that moved by {moved:.2g} in "
            f"{len(trajectory)} steps by up to {left:.1e}, {left / moved:.1e} of it",
            f"At most {RESIDUAL[trajectory.dtype]:.0e} of it is left over, as every single step came out right",
            "Check that `stage_offsets` says where the gradients were taken, and that the steps are small: a query's "
            "gradient is averaged over each by 4 points",
        )
