"""The parameters in training as the optimizer holds them at this moment, as flat vectors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.recording.equality import alike, equal_joined
from pathkernel.recording.slabs import Slabs
from pathkernel.runtime.checksum import crc32c, digest, finished, joined, row_major
from pathkernel.update_rules.rule import UpdateRule, kept_after

EMPTY: Mapping[str, Any] = {}

SIMPLE = (bool, int, float, str, type(None))
"""Types of which a hyper-parameter is plain as it is."""


def plain(value: Any) -> Any:
    """A hyper-parameter as numbers: schedulers change tensors in place."""
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, (tuple, list)):
        return tuple(plain(v) for v in value)
    return value


class Groups(Protocol):
    """An optimizer as far as it is read here; also several of them as one."""

    @property
    def param_groups(self) -> Any:
        """Parameter groups, a list of dicts."""

    @property
    def state(self) -> Any:
        """State, by parameter."""


class FlatViews:
    """Flat views of tensors, made again only where a tensor lies elsewhere in memory than before."""

    def __init__(self) -> None:
        self._places: list[int] = []
        self._views: list[Tensor] = []
        self._bytes: list[np.ndarray] | None = None

    def of(self, tensors: Collection[Tensor]) -> list[Tensor]:
        """Each tensor as a vector: a view, or a copy where it is not contiguous."""
        places = [tensor.data_ptr() if tensor.is_contiguous() else 0 for tensor in tensors]
        if places != self._places or 0 in places:
            # Views hold the memory that they see, so that nothing else can come to lie in the same place.
            self._places, self._views = places, [tensor.detach().reshape(-1) for tensor in tensors]
            self._bytes = None
        return self._views

    def digest(self, tensors: Collection[Tensor]) -> int | Tensor:
        """Digest of the tensors, one after another, as `pathkernel.runtime.checksum.digest` gives it."""
        views = self.of(tensors)
        if self._bytes is None:
            if not all(view.is_cpu for view in views):
                return digest(views)
            self._bytes = [row_major(view) for view in views]
        return joined([crc32c(one) for one in self._bytes])


class LiveParameters:
    """Reads values, gradients, settings and memory of the parameters on record.

    Which parameters the optimizer holds is looked up by `strangers`, which every step asks for first, and `gradients`.

    Parameters
    ----------
    named
        The parameters on record, by name.
    optimizer
        Whose groups, gradients and state are read.

    Attributes
    ----------
    layout
        Where each of them lies in θ.
    groups
        Parameter name → index of its parameter group.
    """

    def __init__(self, named: dict[str, nn.Parameter], optimizer: Groups) -> None:
        self.named = named
        self._optimizer = optimizer
        self._slabs, self._values = Slabs(), FlatViews()
        self._kept: dict[str, FlatViews] = {}
        self._members: list[list[int]] | None = None
        self._settings: tuple[dict[str, Any], ...] = ()
        self._active: frozenset[str] = frozenset()
        self._absent: list[bool] | None = None
        self._look()

    def add(self, new: dict[str, nn.Parameter]) -> None:
        """Take further parameters on record."""
        self.named.update(new)
        self._members = None
        self._look()

    # -- values and gradients --------------------------------------------------------------------------------------

    def vector(self) -> Tensor:
        """θ, (P,), a copy."""
        return self._joined(self._values.of(self.named.values()))

    def is_at(self, point: Tensor) -> bool:
        """True where θ is a given vector."""
        return equal_joined(self._values.of(self.named.values()), point)

    def seems_at(self, point: Tensor) -> Tensor:
        """Test that θ is a given vector: a truth value that is not read yet."""
        return alike(self._values.of(self.named.values()), point)

    def checksum(self) -> int:
        """Checksum of θ."""
        (found,) = finished([self.digest()])
        return found

    def digest(self) -> int | Tensor:
        """Checksum of θ; off the CPU not read yet, see `pathkernel.runtime.checksum.digest`."""
        return self._values.digest(self.named.values())

    def gradients(self) -> dict[str, Tensor]:
        """Gradients that the optimizer uses, by name: parameters that it does not hold may keep theirs for ever."""
        self._look()
        return {name: g.detach() for name, g in zip(self.named, self._gradients(), strict=True) if g is not None}

    def gradient(self) -> Tensor:
        """The gradient, (P,), a copy; zero where there is none."""
        return self._padded(self._gradients())

    def gradient_is_finite(self) -> int | Tensor:
        """1 where no gradient holds NaN or infinity, as far as its sum tells, which may overflow without any.

        0 otherwise. Off the CPU it is not read yet: (1,), int64.
        """
        sums = [g.sum() for g in self._gradients() if g is not None]
        if all(one.is_cpu for one in sums):
            return int(math.isfinite(sum([one.item() for one in sums])))
        return torch.stack([one.double() for one in sums]).sum().isfinite().long().reshape(1)

    def gradient_checksum(self) -> int:
        """Checksum of the gradient, zero where there is none."""
        (found,) = finished([self.gradient_digest()])
        return found

    def gradient_digest(self) -> int | Tensor:
        """Checksum of the gradient, zero where there is none; off the CPU not read yet."""
        rows = zip(self._gradients(), self.named.values(), strict=True)
        return digest([torch.zeros_like(p) if gradient is None else gradient for gradient, p in rows])

    def active(self) -> frozenset[str]:
        """Names of the parameters that have a gradient; the same set for as long as they are the same."""
        absent = [g is None for g in self._gradients()]
        if absent != self._absent:
            self._active = frozenset(name for name, without in zip(self.named, absent, strict=True) if not without)
            self._absent = absent
        return self._active

    def padded(self, tensors: dict[str, Tensor]) -> Tensor:
        """Some parameters' tensors as a vector (P,), zero elsewhere."""
        return self._padded([tensors.get(name) for name in self.named])

    def _gradients(self) -> list[Tensor | None]:
        if len(self.groups) == len(self.named):
            return [p.grad for p in self.named.values()]
        return [p.grad if name in self.groups else None for name, p in self.named.items()]

    def _padded(self, tensors: list[Tensor | None]) -> Tensor:
        parameters = self.named.values()
        return self._joined(
            [
                (torch.zeros_like(p) if tensor is None else tensor).detach().reshape(-1)
                for tensor, p in zip(tensors, parameters, strict=True)
            ]
        )

    def _joined(self, rows: list[Tensor]) -> Tensor:
        """One vector of many, in memory that is there for the record."""
        if len({row.dtype for row in rows}) > 1:
            return torch.cat(rows)
        return torch.cat(rows, out=self._slabs.empty(self.layout.size, rows[0]))

    # -- the optimizer ---------------------------------------------------------------------------------------------

    def strangers(self) -> list[nn.Parameter]:
        """Parameters that the optimizer holds and the record does not."""
        self._look()
        return self._strangers

    @property
    def optimizer(self) -> Groups:
        """The optimizer; another one may take its place."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Groups) -> None:
        self._optimizer, self._members = optimizer, None

    @property
    def members(self) -> object:
        """Stands for who holds which parameters: the same object for as long as that stays as it is."""
        self._look()
        return self._members

    def _look(self) -> None:
        members = [[id(p) for p in group["params"]] for group in self.optimizer.param_groups]
        if members == self._members:
            return
        self._members = members
        self._holding = [p for group in self.optimizer.param_groups for p in group["params"]]  # so that ids stay theirs
        index = {p: g for g, ids in enumerate(members) for p in ids}
        self.groups = {name: index[id(p)] for name, p in self.named.items() if id(p) in index}
        self.layout = ParameterLayout.of(self.named)
        known = {id(p) for p in self.named.values()}
        self._strangers = [p for p in self._holding if id(p) not in known]
        self._absent = None

    def settings(self) -> tuple[dict[str, Any], ...]:
        """All numbers and flags of every parameter group; the same tuple for as long as they stay as they are."""
        groups = self.optimizer.param_groups
        found = tuple(
            {key: value if type(value) in SIMPLE else plain(value) for key, value in group.items() if key != "params"}
            for group in groups
        )
        if found != self._settings:
            self._settings = found
        return self._settings

    def kept_keys(self, rule: UpdateRule) -> tuple[str, ...] | None:
        """Keys of the state's tensors that a rule keeps after a step, or None where it looks at the live state."""
        wanted = [kept_after(rule, group) for group in self.optimizer.param_groups]
        if None in wanted or len({p.dtype for p in self.named.values()}) > 1:
            return None  # a common vector would have another type than some state tensors
        return tuple(dict.fromkeys(key for keys in wanted for key in keys))  # type: ignore[union-attr]

    def fresh(self, rule: UpdateRule) -> frozenset[str]:
        """Parameters without linear memory, whether they have a gradient or not: with a closure none has one yet."""
        if not rule.memory:
            return frozenset()
        states = zip(self.named, self._states(), strict=True)
        return frozenset(name for name, state in states if _lacks(state, rule.memory))

    def state_vectors(self, keys: tuple[str, ...]) -> dict[str, Tensor]:
        """Tensors of the optimizer's state as vectors (P,), copies, zero where a parameter has none."""
        states = self._states() if keys else []
        vectors = {}
        for key in keys:
            tensors = [state[key] for state in states if state.get(key) is not None]
            if len(tensors) < len(states):
                vectors[key] = self._padded([state.get(key) for state in states])
            else:
                vectors[key] = self._joined(self._kept.setdefault(key, FlatViews()).of(tensors))
        return vectors

    def state_numbers(self, keys: tuple[str, ...], active: frozenset[str]) -> dict[str, Tensor]:
        """Numbers of the optimizer's state, one for each active parameter, copies."""
        if not keys or not active:
            return {}
        states = [state for name, state in zip(self.named, self._states(), strict=True) if name in active]
        return {key: _numbers([state[key] for state in states]) for key in keys}

    def _states(self) -> list[Mapping[str, Any]]:
        """The optimizer's state, parameter by parameter."""
        state = self.optimizer.state
        return [state.get(p, EMPTY) for p in self.named.values()]

    def memory(self, rule: UpdateRule) -> dict[str, tuple[Tensor, ...]]:
        """The optimizer's linear memory, for parameters that already have some."""
        memory = {}
        settings = self.settings()
        for name, p in self.named.items():
            state = self.optimizer.state.get(p, {})
            keys = rule.of(settings[self.groups[name]]).memory if name in self.groups else rule.memory
            held = tuple(state.get(key) for key in keys)
            if any(isinstance(m, Tensor) for m in held):
                held += (None,) * (len(rule.memory) - len(held))
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


def _lacks(state: Mapping[str, Any], keys: tuple[str, ...]) -> bool:
    """True where some entry is missing or None."""
    return any(state.get(key) is None for key in keys)


def _numbers(values: list[Any]) -> Tensor:
    """Numbers, or tensors of one number each, as a vector in their own type."""
    if isinstance(values[0], Tensor):
        return torch.stack(values)
    return torch.tensor(values, dtype=torch.float64)
