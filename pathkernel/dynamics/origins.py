"""`Origins`: which player made the samples that another one was trained on, when, and of what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathkernel.dynamics.clock import Clock
from pathkernel.recording.compiled import CompiledCall
from pathkernel.recording.forward import Hook, is_transformed
from pathkernel.recording.row_order import numbers_of
from pathkernel.trajectory.observer import StepObserver
from pathkernel.trajectory.step import Step

UNKNOWN = -1
"""Time of a sample that no recorded player made."""


@dataclass(frozen=True)
class Origins:
    """Where the samples of a source come from, one entry for each of its columns of the shares.

    Attributes
    ----------
    step
        (n,) int64: the step of the player itself that was trained on the sample, counted from 0.
    maker
        (n,) names of the players whose outputs they are; ``""`` where a sample is no output of a recorded player to the
        last bit, as after augmentation.
    made_at
        (n,) int64: how many steps the maker had taken when it made the sample; -1 where there is no maker.
    latents
        What the maker was given, samples first: a tensor (n, ...), or a tuple of tensors where it takes several. NaN
        (0 in integers) where there is no maker; None where there is none for any.
    """

    step: np.ndarray
    maker: np.ndarray
    made_at: np.ndarray
    latents: Tensor | tuple[Tensor, ...] | None = field(repr=False)

    def __len__(self) -> int:
        return len(self.step)

    @property
    def known(self) -> np.ndarray:
        """(n,) bool: samples that a recorded player made."""
        return self.made_at != UNKNOWN


@dataclass(frozen=True)
class _Pass:
    """A forward pass of a player: how many steps it had taken, and the tensors of n rows that it was given."""

    player: str
    taken: int
    given: tuple[Tensor, ...]


class MadeSamples:
    """Outputs of all players by their bits, so that they are known again where another player is given them.

    A row is known by a number of its bits (`pathkernel.recording.row_order.numbers_of`, modulo 2^64), through
    ``detach``, ``torch.cat`` and reshaping. Where two passes made the same row, the later one is its origin.

    Parameters
    ----------
    clock
        Says how many steps a player has taken.

    Notes
    -----
    Memory: for each sample that is made its latent, and some 200 bytes; the samples themselves are not kept here.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._passes: list[_Pass] = []
        self._rows: dict[int, tuple[int, int]] = {}
        self._handles: list[Any] = []

    def watch(self, player: str, first: nn.Module, last: nn.Module) -> None:
        """Take note of what a player makes from now on.

        Parameters
        ----------
        player
            Its name.
        first, last
            The modules that the loop calls first and last, whose arguments and outputs are the player's; mostly one.
            Of a compiled network the outer one: hooks within would be compiled with it, and change its rounding.
        """
        given: list[Any] = []

        def called(module: nn.Module, arguments: Any, named: Any) -> None:
            given[:] = [(arguments, named)]

        def returned(module: nn.Module, arguments: Any, outputs: Any) -> None:
            self._note(player, given, outputs)

        if first is last and first._compiled_call_impl is not None:
            self._handles.append(CompiledCall(first, called, returned))
            return
        self._handles += [
            first.register_forward_pre_hook(Hook(called), with_kwargs=True),
            last.register_forward_hook(Hook(returned)),
        ]

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _note(self, player: str, arguments: Any, outputs: Any) -> None:
        leaves = [] if is_transformed() else list(rows_of(outputs))  # tensors of a transformation have no bits to read
        if not leaves:
            return
        n = len(leaves[0])
        given = [leaf for leaf in rows_of(arguments) if len(leaf) == n]
        self._passes.append(_Pass(player, self.clock.taken(player), tuple(one.detach().clone() for one in given)))
        place = len(self._passes) - 1
        for leaf in leaves:
            self._rows |= {bits: (place, row) for row, bits in enumerate(_numbers(leaf))}

    def origins_of(self, player: str, rows: Tensor) -> list[tuple[_Pass, int] | None]:
        """The pass, and the row of it, that made each of some rows (n, ...) which a player was given."""
        found = [self._rows.get(bits) for bits in _numbers(rows)]
        passes = [None if at is None else (self._passes[at[0]], at[1]) for at in found]
        return [one if one is not None and one[0].player != player else None for one in passes]


def rows_of(tree: Any) -> Iterator[Tensor]:
    """Tensors in arguments, or in what a network returned, that have samples along their first axis."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.dim() > 0 and leaf.numel() > 0:
            yield leaf


def _numbers(rows: Tensor) -> list[int]:
    """A number for each row, of its bits alone: an image is found again where the other player flattens it."""
    numbers: list[int] = numbers_of(rows).tolist()
    return numbers


class PlayerObserver(StepObserver):
    """Observer of one player: asks of every step whose outputs its samples are, and advances the clock of the game.

    Parameters
    ----------
    made
        Outputs of all players, with the clock.
    player
        Whose steps.
    """

    name = "the clock of a game, and the origins of samples that other players made"
    needs_whole_run = False

    def __init__(self, made: MadeSamples, player: str) -> None:
        self.made, self.player = made, player
        self._found: dict[str, dict[int, tuple[int, tuple[_Pass, int] | None]]] = {}

    def begin(self, trajectory: Any, settings: tuple[Mapping[str, Any], ...]) -> None:
        """Begin where the record ends."""
        self.made.clock.begin(self.player, len(trajectory))

    def observe(self, step: Step) -> None:
        """Find the origins of the samples of a step that are not of the training data."""
        index = self.made.clock.taken(self.player)
        for batch in step.batches:
            if batch.source is None:
                continue
            own = self._found.setdefault(batch.source, {})
            rows = next(rows_of(batch.inputs), None)
            origins = [None] * len(batch.ids) if rows is None else self.made.origins_of(self.player, rows)
            own |= {int(column): (index, origin) for column, origin in zip(batch.ids, origins, strict=True)}
        self.made.clock.advance(self.player)

    @property
    def origins(self) -> dict[str, Origins]:
        """Origins of the samples of each source, in the order of its columns."""
        return {source: _origins(columns) for source, columns in self._found.items()}


def _origins(columns: Mapping[int, tuple[int, tuple[_Pass, int] | None]]) -> Origins:
    n = max(columns) + 1  # columns before the first are of a record that was gone on with
    step = np.full(n, UNKNOWN, dtype=np.int64)
    made_at = np.full(n, UNKNOWN, dtype=np.int64)
    maker = np.full(n, "", dtype=object)
    given: list[tuple[Tensor, ...] | None] = [None] * n
    for column, (index, origin) in columns.items():
        step[column] = index
        if origin is not None:
            one, row = origin
            made_at[column] = one.taken
            maker[column] = one.player
            given[column] = tuple(leaf[row] for leaf in one.given)
    return Origins(step, maker, made_at, _stacked(given))


def _stacked(given: Sequence[tuple[Tensor, ...] | None]) -> Tensor | tuple[Tensor, ...] | None:
    """Rows of all samples as tensors, samples first."""
    example = next((leaves for leaves in given if leaves), None)
    if example is None:
        return None
    unknown = tuple(torch.full_like(leaf, float("nan") if leaf.is_floating_point() else 0) for leaf in example)
    every = [leaves if leaves and _alike(leaves, example) else unknown for leaves in given]
    stacked = tuple(torch.stack(rows) for rows in zip(*every, strict=True))
    return stacked[0] if len(stacked) == 1 else stacked


def _alike(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """True for rows of one shape; two makers of one source may take different latents."""
    return [leaf.shape for leaf in one] == [leaf.shape for leaf in other]
