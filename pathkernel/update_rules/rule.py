r"""Optimizer steps as linear maps, and their adjoints.

Given what is *frozen* in a step (learning rate, step count, Adam's denominator …) every supported optimizer is linear
in the gradient and in its memory m:

.. math:: (\Delta, m^+) = \mathrm{step}(g, m)

A rule is that function, written like the published equation. Its adjoint, which the kernel machine carries backward
through training, is derived from it here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import vjp, vmap

from pathkernel.errors import RecordingError


@dataclass(frozen=True)
class Observation:
    """Observation of one parameter around one optimizer step.

    Attributes
    ----------
    before
        Its entry of ``optimizer.state`` before the step: numbers, copies of the tensors named in
        `Observes.before`, and True for every other tensor that existed.
    after
        Its entry after the step, live: copy what you keep.
    parameter, gradient, displacement
        θ_s, the gradient as the optimizer received it, and Δ_s, in the parameter's shape.
    device
        Type of the device on which the step was taken.

    Notes
    -----
    A rule that says what it reads after a step finds that alone, what it reads before, and True in ``before`` for every
    slot of linear memory, if there was one.
    """

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    parameter: Tensor
    gradient: Tensor
    displacement: Tensor
    device: str = "cpu"


Frozen = Mapping[str, Any]
Settings = Mapping[str, Any]
Memory = tuple[Tensor, ...]


@dataclass(frozen=True)
class Observes:
    """Declaration of what `UpdateRule.frozen` reads of the optimizer's state around a step.

    Attributes
    ----------
    before
        Keys of tensors as they were before the step; they are copied.
    after
        Keys of tensors in a parameter's shape as they are after the step, or a function of a group's settings that
        gives them. They are copied, and `UpdateRule.frozen` is called when the step is read: it may take its time. With
        None for anything, it is called right after every step, with the live state.
    numbers
        Keys of numbers as they are after the step.

    Examples
    --------
    >>> from pathkernel.update_rules.rule import Observes
    >>> adam = Observes(after=("exp_avg_sq",), numbers=("step",))
    """

    before: tuple[str, ...] = ()
    after: tuple[str, ...] | Callable[[Settings], tuple[str, ...]] | None = ()
    numbers: tuple[str, ...] = ()


class _OfDeclaration:
    """Older name of a part of `UpdateRule.observes`, which an older rule sets to a tuple of its own."""

    def __init__(self, part: str) -> None:
        self.part = part

    def __get__(self, rule: UpdateRule | None, kind: type[UpdateRule]) -> tuple[str, ...]:
        return () if kind.observes is None else getattr(kind.observes, self.part)


OLDER = ("keep_before", "keep_after", "numbers_after")
"""Names by which a rule says, one by one, what `UpdateRule.observes` says at once."""


class UpdateRule(ABC):
    """How one optimizer turns gradients into displacement, parameter by parameter.

    Subclass it for an optimizer of your own and pass ``rule=YourRule()`` to `KernelRecorder`.

    Attributes
    ----------
    name
        What the optimizer is called.
    stages
        Gradients that one step takes of the same batch: 1, or more for Heun's and Runge–Kutta steps.
    memory
        Keys of ``optimizer.state[parameter]`` that hold linear memory (momentum buffers, first moments).
    observes
        What `frozen` reads of the optimizer's state, a `pathkernel.update_rules.rule.Observes`. A class with a `frozen`
        of its own says so again; where it does not, that is called right after every step, with the live state.
    keep_before, numbers_after
        Older names of ``observes.before`` and ``observes.numbers``.
    elementwise
        Whether each entry of the step depends on the same entry of gradient and memory only, so that the shape of a
        parameter does not matter and parameters with equal settings are treated as one vector.
    """

    name: str
    stages: int = 1
    observes: ClassVar[Observes | None] = None
    keep_before: Any = _OfDeclaration("before")
    numbers_after: Any = _OfDeclaration("numbers")
    memory: tuple[str, ...] = ()
    elementwise: bool = True

    @abstractmethod
    def step(self, gradient: Any, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """(Δ, m⁺) of one parameter: linear in ``gradient`` and ``memory``.

        Parameters
        ----------
        gradient
            Gradient of the parameter, in its shape; a tuple of ``stages`` gradients where there are several.
        memory
            One tensor of that shape for each entry of ``memory``.
        frozen
            What `frozen` returned for this parameter in this step.
        settings
            The numbers and flags of its parameter group in this step.
        """

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """Tensors and numbers held fixed in a step that `step` and the sources need besides ``settings``."""
        return {}

    def keep_after(self, settings: Settings) -> tuple[str, ...] | None:
        """Older name of ``observes.after``: keys of tensors as they are after the step, None for anything."""
        by = declaring_class(type(self))
        after = None if by is None or by.observes is None else by.observes.after
        return after(settings) if callable(after) else after

    def of(self, settings: Settings) -> UpdateRule:
        """The rule of the parameters under these settings: itself, unless it is put together of several."""
        return self

    def keeps_memory(self, settings: Settings) -> bool:
        """True where gradients go into the optimizer's memory under these settings."""
        return bool(self.memory)

    def gradient_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Named terms that the optimizer adds to the gradient, such as coupled weight decay."""
        return {}

    def displacement_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Named terms that the optimizer adds to the displacement, such as decoupled weight decay."""
        return {}

    def sourced(self, gradient: Tensor, parameter: Tensor, frozen: Frozen, settings: Settings) -> tuple[Tensor, Tensor]:
        """The gradient with all that the optimizer adds to it, and all that it adds to the displacement."""
        for term in self.gradient_sources(parameter, frozen, settings).values():
            gradient = gradient + term
        terms = [*self.displacement_sources(parameter, frozen, settings).values()]
        if len(terms) == 1 and terms[0].shape == gradient.shape and terms[0].dtype == gradient.dtype:
            return gradient, terms[0]
        displacement = torch.zeros_like(gradient)
        for term in terms:
            displacement = displacement + term
        return gradient, displacement

    def stage_offsets(self, frozen: Frozen, settings: Settings) -> tuple[Tensor | None, ...]:
        """Where each of the step's gradients was taken, relative to θ_s: None for θ_s itself.

        Look-ahead methods take theirs elsewhere; multi-stage methods take several.
        """
        return (None,) * self.stages

    def refusal(self, settings: Settings) -> str | None:
        """Why a parameter group with these settings cannot be recorded, or None."""
        return None

    def preconditioner(self, shape: torch.Size, frozen: Frozen, settings: Settings, like: Tensor) -> Tensor:
        """−∂Δ/∂g / learning rate of one parameter, elementwise: the D_s of an adaptive method."""
        memory = tuple(torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in self.memory)
        one = torch.ones(shape, dtype=like.dtype, device=like.device)
        gradient = one if self.stages == 1 else (one,) * self.stages
        # At rate 1 rather than divided by the rate: a warm-up may pass through 0.
        return -self.step(gradient, memory, frozen, {**settings, "lr": 1.0})[0]


def declaring_class(kind: type[UpdateRule]) -> type[UpdateRule] | None:
    """The class that says what `UpdateRule.frozen` reads after a step; None where the one with `frozen` does not."""
    for one in kind.__mro__:
        own = vars(one)
        if one is UpdateRule or not issubclass(one, UpdateRule):
            continue
        if own.get("observes") is not None or "keep_after" in own:
            return one
        if "frozen" in own:
            return None
    return None


def kept_after(rule: UpdateRule, settings: Settings) -> tuple[str, ...] | None:
    """Keys of tensors to keep after a step under these settings; None where `frozen` is called with the live state."""
    return None if declaring_class(type(rule)) is None else rule.keep_after(settings)


def check_declaration(rule: UpdateRule) -> None:
    """Refuse a rule that does not say as `Observes` does what its `frozen` reads.

    Raises
    ------
    RecordingError
        With the class and what it says.
    """
    for kind in type(rule).__mro__:
        own, where = vars(kind), f"`{kind.__name__}.observes`"
        if kind is UpdateRule or (said := own.get("observes")) is None:
            continue
        older = [name for name in OLDER if name in own]
        if older:
            raise RecordingError(
                f"`{kind.__name__}` has `observes` and {' and '.join(f'`{name}`' for name in older)}",
                "What `frozen` reads of the optimizer's state is said once",
                "Put it all into `observes = Observes(before=..., after=..., numbers=...)`",
            )
        if not isinstance(said, Observes):
            raise RecordingError(
                f"{where} is a {type(said).__name__}",
                "What `frozen` reads of the optimizer's state is said by an `Observes`",
                'Write for example `observes = Observes(after=("exp_avg_sq",), numbers=("step",))`',
            )
        for part in ("before", "after", "numbers"):
            keys = getattr(said, part)
            free = part == "after" and (keys is None or callable(keys))
            if not free and not (isinstance(keys, tuple) and all(isinstance(key, str) for key in keys)):
                raise RecordingError(
                    f"{where} has `{part}={keys!r}`",
                    "Keys of the optimizer's state are a tuple of texts",
                    f"Write `{part}=({keys!r},)`" if isinstance(keys, str) else f'Write for example `{part}=("step",)`',
                )


class Declared(dict[str, Any]):
    """The state that a rule has said it reads; what it has not is named.

    Parameters
    ----------
    state
        By key.
    rule
        The rule.
    part
        Of which part of the declaration: ``"before"`` or ``"after"``.
    """

    def __init__(self, state: Mapping[str, Any], rule: UpdateRule, part: str) -> None:
        super().__init__(state)
        self.rule, self.part = rule, part

    def __missing__(self, key: str) -> Any:
        number = " or `numbers`" if self.part == "after" else ""
        raise RecordingError(
            f"`{type(self.rule).__name__}.frozen` reads {key!r} of the optimizer's state {self.part} a step",
            f"The rule has said that it reads {', '.join(map(repr, self)) or 'nothing'} there",
            f"Add {key!r} to `{self.part}`{number} of its `observes = Observes(...)`",
        )


def adjoint(
    rule: UpdateRule, frozen: Frozen, settings: Settings, displacement_weight: Tensor, memory_weight: Memory
) -> tuple[tuple[Tensor, ...], Memory]:
    r"""Pull the weights of Δ and m⁺ back to weights of the gradient and of m.

    .. math:: \langle q, \Delta\rangle + \langle \mu^+, m^+\rangle = \langle u, g\rangle + \langle \mu, m\rangle

    Parameters
    ----------
    rule, frozen, settings
        The step of one parameter of some shape.
    displacement_weight
        q, (Q, *shape).
    memory_weight
        μ⁺, one (Q, *shape) for each memory slot.

    Returns
    -------
    u, one (Q, *shape) for each gradient of the step, and μ, one for each memory slot.
    """
    shape, like = displacement_weight.shape[1:], displacement_weight
    zero = torch.zeros(shape, dtype=like.dtype, device=like.device)
    gradient = zero if rule.stages == 1 else (zero,) * rule.stages
    pull_back = vjp(lambda g, m: rule.step(g, m, frozen, settings), gradient, (zero,) * len(rule.memory))[1]
    weight, memory = vmap(pull_back)((displacement_weight, memory_weight))
    return ((weight,) if rule.stages == 1 else weight), memory
