"""Steps taken once more, on copies of parameters and optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pathkernel._typing import PyTree
from pathkernel.errors import TrajectoryError
from pathkernel.gradients.losses import RETURNED, batch_loss
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.pytrees import moved
from pathkernel.gradients.returned import returned_loss
from pathkernel.runtime.checksum import checksum
from pathkernel.runtime.pickling import check_picklable
from pathkernel.runtime.precision import EXACT_PRODUCTS
from pathkernel.trajectory.run import Run
from pathkernel.trajectory.samples import samples_of
from pathkernel.trajectory.step import MicroBatch, Step
from pathkernel.update_rules.rule import Observation


class HoldsState(Protocol):
    """An optimizer, or several as one."""

    @property
    def state(self) -> Any:
        """State by parameter."""


def state_of(optimizer: HoldsState, named: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """A copy of the optimizer's state by parameter name."""
    return {name: _copied(dict(optimizer.state[p])) for name, p in named.items() if p in optimizer.state}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(v) for key, v in value.items()}
    return type(value)(_copied(v) for v in value) if isinstance(value, (list, tuple)) else value


class Replay:
    """Takes recorded steps once more, on copies of parameters and optimizer.

    Parameters
    ----------
    run
        Whose steps; its model, data and loss are used, none is changed.
    optimizer
        The optimizer of the run, or another one of its class; or the class.
    constants
        Where the class is given: the `constants` of the replay that recorded.

    Attributes
    ----------
    received
        Checksum of the gradient that was computed last.
    """

    def __init__(
        self,
        run: Run,
        optimizer: Optimizer | type[Optimizer],
        constants: Mapping[str, Any] | None = None,
    ) -> None:
        self.run = run
        if isinstance(optimizer, type):
            known = constants or {"groups": [], "made_of": {"defaults": {}}}
            self.kind, self.groups, self._made_of = optimizer, known["groups"], known["made_of"]
        else:
            # What a copy is made of besides groups and state, as `copy.deepcopy` and `pickle` do it.
            self.kind, self.groups = type(optimizer), optimizer.param_groups
            self._made_of = optimizer.__getstate__()
        self._parameters: dict[str, nn.Parameter] = {}
        self._optimizer: Optimizer | None = None
        self._network: ModelFunction | None = None
        self._at = run.initial
        self.received = 0

    @property
    def constants(self) -> dict[str, Any]:
        """Parts of the optimizer's copy that no step tells: settings that are tensors, and its own values."""
        return {
            "groups": [{key: v for key, v in g.items() if isinstance(v, Tensor)} for g in self.groups],
            "made_of": {key: v for key, v in self._made_of.items() if key not in ("state", "param_groups")},
        }

    def __getstate__(self) -> dict[str, Any]:
        constants = self.constants
        check_picklable(optimizer=(self.kind, constants))
        return {"run": self.run, "kind": self.kind, **constants}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.run = state["trajectory" if "trajectory" in state else "run"]  # the path, in earlier versions
        self.kind = state["kind"]
        self.groups, self._made_of = state["groups"], state["made_of"]
        self._parameters, self._optimizer, self._network, self.received = {}, None, None, 0
        self._at = torch.empty(0)

    # -- where it stands ----------------------------------------------------------------------------------------

    def restore(self, theta: Tensor, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go to a point of the run: θ, (P,), and the optimizer's state by parameter name."""
        self._parameters = {
            name: nn.Parameter(value.clone()) for name, value in self.run.layout.unflatten(theta).items()
        }
        self._at, self._network = theta, self.run.function()
        optimizer = self.kind.__new__(self.kind)
        copies = {self._parameters[name]: _copied(dict(own)) for name, own in state.items()}
        optimizer.__setstate__({**self._made_of, "state": defaultdict(dict, copies), "param_groups": []})
        self._optimizer = optimizer

    # -- one step -----------------------------------------------------------------------------------------------

    def take(self, step: Step) -> Step:
        """The step in full, from where the replay stands; it stands at the step's end afterwards.

        Parameters
        ----------
        step
            An abridged step. Its gradient is used where it is on record, and computed otherwise.
        """
        with EXACT_PRODUCTS.lifted():  # optimizers multiply matrices, too
            return self._take(step)

    def _take(self, step: Step) -> Step:
        if step.changes:
            self._move(step.changes[-1][1])
        self._prepare(step)
        if step.gradient.numel():
            gradient = step.gradient
            self._receive(gradient, step)
        else:
            self.differentiate(step, 1 if step.replay is None else step.replay.divisor)
            self.received = checksum(self._gradients())  # before the optimizer may write on them
            gradient = self.gradient()
        return self.finish(step, gradient)

    def differentiate(self, step: Step, divisor: int) -> None:
        """Forward and backward passes of a step's micro-batches at θ, as the loop ran them."""
        self._prepare(step)
        for batch in step.batches:
            self._backward(step, batch, divisor, last=batch is step.batches[-1])
        for name in step.active:
            if self._parameters[name].grad is None:  # a gradient of zeros, from before
                self._parameters[name].grad = torch.zeros_like(self._parameters[name])

    def finish(self, step: Step, gradient: Tensor) -> Step:
        """Let the optimizer step, and write the step down in full."""
        rule, layout, optimizer = self.run.rule, self.run.layout, self._stepping(step)
        before = self._at
        states = {name: self._state_before(name) for name in step.active}
        optimizer.step()
        after = layout.flatten({name: p.detach() for name, p in self._parameters.items()}, before.dtype)
        at, received, moved = (layout.unflatten(v) for v in (before, gradient, after - before))
        frozen = {
            name: rule.frozen(
                Observation(
                    before=states[name],
                    after=optimizer.state[self._parameters[name]],
                    parameter=at[name],
                    gradient=received[name],
                    displacement=moved[name],
                ),
                step.hyperparameters_of(name),
            )
            for name in layout.names
            if name in step.active
        }
        self._at = after
        return replace(step, before=before, after=after, gradient=gradient, frozen=frozen, replay=None)

    def gradient(self) -> Tensor:
        """The gradients at hand, (P,), zero where there is none."""
        return torch.cat([row.detach().reshape(-1) for row in self._gradients()])

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters.values()]

    def vector(self) -> Tensor:
        """θ where the replay stands, (P,)."""
        return self._at

    def state(self) -> dict[str, dict[str, Any]]:
        """A copy of the optimizer's state where the replay stands, by parameter name."""
        assert self._optimizer is not None
        return state_of(self._optimizer, self._parameters)

    def checksum(self) -> int:
        """CRC32C of θ where the replay stands."""
        return checksum(self._parameters.values())

    def _move(self, theta: Tensor) -> None:
        """A change that was made outside the optimizer."""
        for name, value in self.run.layout.unflatten(theta).items():
            self._parameters[name].detach().copy_(value)
        self._at = theta

    def _prepare(self, step: Step) -> None:
        for name, p in self._parameters.items():
            p.grad = None
            p.requires_grad_(name in step.active)

    def _receive(self, gradient: Tensor, step: Step) -> None:
        for name, value in self.run.layout.unflatten(gradient).items():
            if name in step.active:
                self._parameters[name].grad = value.clone()

    def _backward(self, step: Step, batch: MicroBatch, divisor: int, last: bool) -> None:
        objective, state = self.run.objective, batch.state
        buffers = step.buffers if state.buffers is None else state.buffers
        assert self._network is not None
        function = self._network.with_(constants=buffers, state=state)
        inputs, targets = samples_of(batch, self.run.data)
        # As trained: `ModelFunction.evaluating` otherwise chooses other kernels than the loop had.
        with function.evaluating(gradients=True, as_trained=True), function.kept():
            roots, slopes = self._roots(function, batch, inputs, targets)
            evaluated = batch.cotangents is None and objective.loss != RETURNED
            # A loop adds its regularisers to each divided loss, or once.
            for regularizer in objective.regularizers.values() if divisor > 1 or last else ():
                value = regularizer(dict(self._parameters))
                if evaluated:  # as the loop adds it, which rounds otherwise
                    roots = [roots[0] + value]
                elif value.requires_grad:
                    roots, slopes = [*roots, value / divisor], [*slopes, torch.ones_like(value)]
            if evaluated and divisor > 1:
                roots = [roots[0] / divisor]
            with torch.autocast(state.autocast[0] if state.autocast else function.device.type, enabled=False):
                torch.autograd.backward(roots, slopes)

    def _roots(
        self, function: ModelFunction, batch: MicroBatch, inputs: PyTree, targets: PyTree
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors that a backward pass of a micro-batch begins with, and the slopes there."""
        objective, parameters = self.run.objective, dict(self._parameters)
        if batch.cotangents is not None:
            outputs = function.batch(parameters, inputs)
            return [outputs], [batch.cotangents.to(outputs)]
        if objective.loss == RETURNED and batch.loss_slope is not None:
            value = returned_loss(function.whole().call(parameters, inputs))
            if value is None:
                raise TrajectoryError(
                    "The network returned no loss when a step was trained again",
                    'With `loss="returned"` it returns one: under the name `loss`, or as the only number without axes',
                    "Give the recorder the loss as a function of outputs and targets",
                )
            return [value], [batch.loss_slope.to(value)]
        loss = objective.function("A replay of steps")
        outputs = self._weighted(function.call(parameters, inputs), batch)
        value = batch_loss(loss, outputs, moved(targets, function.device), batch.weights, objective.reduction)
        return [value], [torch.ones_like(value)]

    def _weighted(self, outputs: PyTree, batch: MicroBatch) -> PyTree:
        """Outputs of a micro-batch whose slopes count as often as its samples do: here, once."""
        return outputs

    def _stepping(self, step: Step) -> Optimizer:
        """The optimizer with the groups and settings of a step."""
        assert self._optimizer is not None
        groups: list[dict[str, Any]] = []
        for index, settings in enumerate(step.hyperparameters):
            known = self.groups[index] if index < len(self.groups) else {}
            own = {key: _like(known.get(key), value) for key, value in settings.items()}
            if own.get("fused") or own.get("capturable"):
                self._count_on_device([name for name, group in step.groups.items() if group == index])
            groups.append({**own, "params": [self._parameters[n] for n, g in step.groups.items() if g == index]})
        self._optimizer.param_groups = groups
        return self._optimizer

    def _count_on_device(self, names: Iterable[str]) -> None:
        """Put the numbers of steps beside the parameters, where such optimizers need them: a store reads to the CPU."""
        assert self._optimizer is not None
        for parameter in (self._parameters[name] for name in names):
            state = self._optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device)

    def _state_before(self, name: str) -> dict[str, Any]:
        """Optimizer's state as `pathkernel.update_rules.rule.Observation.before` has it."""
        assert self._optimizer is not None
        seen: dict[str, Any] = {}
        for key, value in self._optimizer.state.get(self._parameters[name], {}).items():
            if not isinstance(value, Tensor):
                seen[key] = value
            elif key in self.run.rule.keep_before:
                seen[key] = value.detach().clone()
            else:
                seen[key] = True if value.numel() > 1 else value.item()
        return seen


def _like(known: Any, value: Any) -> Any:
    """A setting as the optimizer held it: a learning rate may be a tensor."""
    return torch.tensor(value, dtype=known.dtype, device=known.device) if isinstance(known, Tensor) else value
