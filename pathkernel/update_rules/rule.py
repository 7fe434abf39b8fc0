r"""Optimizer steps as linear maps, and their adjoints.

Given what is *frozen* in a step (learning rate, step count, Adam's denominator …) every supported optimizer is linear
in the gradient and in its memory m:

.. math:: (\Delta, m^+) = \mathrm{step}(g, m)

A rule is that function, written like the published equation. Its adjoint, which the kernel machine carries backward
through training, is derived from it here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import vjp, vmap


@dataclass(frozen=True)
class Observation:
    """Observation of one parameter around one optimizer step.

    Attributes
    ----------
    before
        Its entry of ``optimizer.state`` before the step: numbers, copies of the tensors named in
        `UpdateRule.keep_before`, and True for every other tensor that existed.
    after
        Its entry after the step, live: copy what you keep.
    parameter, gradient, displacement
        θ_s, the gradient as the optimizer received it, and Δ_s, in the parameter's shape.
    device
        Type of the device on which the step was taken.

    Notes
    -----
    A rule with `UpdateRule.keep_after` finds the entries that it names there, in `UpdateRule.numbers_after` and in
    `UpdateRule.keep_before`, and True in ``before`` for every slot of linear memory, if there was one.
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
    keep_before
        Keys of tensors that `frozen` wants as they were before the step; they are copied.
    numbers_after
        Where `keep_after` is defined: keys of numbers that `frozen` wants as they are after the step.
    elementwise
        Whether each entry of the step depends on the same entry of gradient and memory only, so that the shape of a
        parameter does not matter and parameters with equal settings are treated as one vector.
    """

    name: ClassVar[str]
    stages: ClassVar[int] = 1
    keep_before: ClassVar[tuple[str, ...]] = ()
    numbers_after: ClassVar[tuple[str, ...]] = ()
    memory: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "frozen" in vars(cls) and "keep_after" not in vars(cls):
            cls.keep_after = UpdateRule.keep_after  # type: ignore[method-assign]  # what another `frozen` wants

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
        """Keys of tensors in a parameter's shape that `frozen` wants as they are after the step; None for anything.

        With None, `frozen` is called right after every step, with the live state. With keys, these tensors are copied,
        and `frozen` is called when the step is read: it may then take its time. A subclass with a `frozen` of its own
        has to say again what that wants.
        """
        return None

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
        displacement = torch.zeros_like(gradient)
        for term in self.displacement_sources(parameter, frozen, settings).values():
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
