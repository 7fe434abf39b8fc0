"""The parameters in training as the optimizer holds them at this moment, as flat vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pathkernel.parameters import ParameterLayout
from pathkernel.update_rules.rule import UpdateRule


def plain(value: Any) -> Any:
    """A hyper-parameter as numbers: schedulers change tensors in place."""
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, (tuple, list)):
        return tuple(plain(v) for v in value)
    return value


class LiveParameters:
    """Reads values, gradients, settings and memory of the parameters on record.

    Parameters
    ----------
    named
        The parameters on record, by name.
    optimizer
        Whose groups, gradients and state are read.
    """

    def __init__(self, named: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
        self.named, self.optimizer = named, optimizer

    @property
    def layout(self) -> ParameterLayout:
        """Where each of them lies in θ."""
        return ParameterLayout.of(self.named)

    def vector(self) -> Tensor:
        """θ, (P,), a copy."""
        return torch.cat([p.detach().reshape(-1) for p in self.named.values()])

    def gradients(self) -> dict[str, Tensor]:
        """Gradients that the optimizer uses, by name: parameters that it does not hold may keep theirs for ever."""
        held = self.groups()
        return {n: p.grad.detach() for n, p in self.named.items() if p.grad is not None and n in held}

    def gradient(self) -> Tensor:
        """The same, (P,), zero where there is none."""
        return self.padded(self.gradients())

    def padded(self, tensors: dict[str, Tensor]) -> Tensor:
        """Some parameters' tensors as a vector (P,), zero elsewhere."""
        rows = [tensors.get(name, torch.zeros_like(p.detach())) for name, p in self.named.items()]
        return torch.cat([row.reshape(-1) for row in rows])

    def groups(self) -> dict[str, int]:
        """Parameter name → index of its parameter group."""
        index = {id(p): g for g, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        return {name: index[id(p)] for name, p in self.named.items() if id(p) in index}

    def settings(self) -> tuple[dict[str, Any], ...]:
        """All numbers and flags of every parameter group."""
        groups = self.optimizer.param_groups
        return tuple({key: plain(value) for key, value in group.items() if key != "params"} for group in groups)

    def strangers(self) -> list[nn.Parameter]:
        """Parameters that the optimizer holds and the record does not."""
        known = {id(p) for p in self.named.values()}
        return [p for group in self.optimizer.param_groups for p in group["params"] if id(p) not in known]

    def memory(self, rule: UpdateRule) -> dict[str, tuple[Tensor, ...]]:
        """The optimizer's linear memory, for parameters that already have some."""
        memory = {}
        for name, p in self.named.items():
            state = self.optimizer.state.get(p, {})
            held = tuple(state.get(key) for key in rule.memory)
            if any(isinstance(m, Tensor) for m in held):
                memory[name] = tuple(torch.zeros_like(p) if m is None else m.detach().clone() for m in held)
        return memory

    def states(self, rule: UpdateRule) -> dict[str, dict[str, Any]]:
        """The optimizer's state as it is before a step; see `pathkernel.update_rules.rule.Observation.before`."""

        def keep(key: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                kept = key in rule.keep_before
                return value.detach().clone() if kept else (True if value.numel() > 1 else value.item())
            holds_tensors = isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value)
            return True if holds_tensors else plain(value)

        state = self.optimizer.state
        return {
            name: {key: keep(key, value) for key, value in state[p].items()}
            for name, p in self.named.items()
            if p in state
        }
