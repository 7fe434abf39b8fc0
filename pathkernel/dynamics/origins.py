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
        last bit, as after augmentation, and where it is one of several (`ambiguous`).
    made_at
        (n,) int64: how many steps the maker had taken when it made the sample; -1 where there is no maker.
    latents
        What the maker was given, samples first: a tensor (n, ...), or a tuple of tensors where it takes several. NaN
        (0 in integers) where there is no maker; None where there is none for any.
    ambiguous
        (n,) bool: samples whose bits were made of several latents, or at several times, as those of a generator that
        collapsed or saturates; also those whose arguments were made by different passes. They have no maker.
    """

    step: np.ndarray
    maker: np.ndarray
    made_at: np.ndarray
    latents: Tensor | tuple[Tensor, ...] | None = field(repr=False)
    ambiguous: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=bool), repr=False)

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

    def row(self, place: int) -> list[Tensor]:
        """Origin of one of its samples."""
        return [leaf[place] for leaf in self.given]


_Origin = tuple[_Pass, int]
"""A pass, and the row of it."""


def _same(one: _Origin, other: _Origin) -> bool:
    """True where two rows were made at one time and of the same latent, and it does not matter which is meant."""
    (first, row), (second, place) = one, other
    if first is second and row == place:
        return True
    of_one, of_other = first.row(row), second.row(place)
    return (
        (first.player, first.taken) == (second.player, second.taken)
        and bool(of_one)
        and len(of_one) == len(of_other)
        and all(map(torch.equal, of_one, of_other))
    )


class _Ambiguous:
    """Mark in place of an origin where there are several."""


AMBIGUOUS = _Ambiguous()
_Found = _Origin | _Ambiguous | None


class MadeSamples:
    """Outputs of all players by their bits, so that they are known again where another player is given them.

    A row is known by a number of its bits (`pathkernel.recording.row_order.numbers_of`, modulo 2^64), through
    ``detach``, ``torch.cat`` and reshaping. Rows that were made more than once have an origin where all of them are of
    one latent and one time, as those of a pass that is run again; otherwise they are ambiguous.

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
        self._rows: dict[str, dict[int, _Found]] = {}
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
        made = _Pass(player, self.clock.taken(player), tuple(one.detach().clone() for one in given))
        known = self._rows.setdefault(player, {})
        for leaf in leaves:
            for row, bits in enumerate(_numbers(leaf)):
                known[bits] = _one_of([known.get(bits), (made, row)])

    def origins_of(self, player: str, inputs: Any, n: int) -> list[_Found]:
        """Origins of n samples that a player was given, by all of their tensors.

        Parameters
        ----------
        player
            Who was given them; its own outputs do not count.
        inputs
            Its arguments, of which tensors of n rows are looked at: whole numbers, such as labels, only where there is
            nothing else, since many samples have the same.
        n
            How many samples.
        """
        leaves = [leaf for leaf in rows_of(inputs) if len(leaf) == n]
        drawn = [leaf for leaf in leaves if leaf.is_floating_point() or leaf.is_complex()]
        numbers = [_numbers(leaf) for leaf in drawn or leaves]
        others = [rows for name, rows in self._rows.items() if name != player]
        return [_of_sample([[known.get(bits[row]) for known in others] for bits in numbers]) for row in range(n)]


def _of_sample(by_argument: Sequence[Sequence[_Found]]) -> _Found:
    """The origin of a sample by those of its arguments: one that is known alone says of which of several another is."""
    found = [_one_of(candidates) for candidates in by_argument]
    return _one_of([one for one in found if one is not AMBIGUOUS] if any(map(_is_known, found)) else found)


def _is_known(found: _Found) -> bool:
    return found is not None and found is not AMBIGUOUS


def _one_of(candidates: Sequence[_Found]) -> _Found:
    """The last of the origins that there are if all are the same, ambiguous if not, None where there is none."""
    found: _Origin | None = None
    for one in candidates:
        if one is None:
            continue
        if isinstance(one, _Ambiguous) or (found is not None and not _same(found, one)):
            return AMBIGUOUS
        found = one
    return found


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
        self._found: dict[str, dict[int, tuple[int, _Found]]] = {}

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
            origins = self.made.origins_of(self.player, batch.inputs, len(batch.ids))
            own |= {int(column): (index, origin) for column, origin in zip(batch.ids, origins, strict=True)}
        self.made.clock.advance(self.player)

    @property
    def origins(self) -> dict[str, Origins]:
        """Origins of the samples of each source, in the order of its columns."""
        return {source: _origins(columns) for source, columns in self._found.items()}


def _origins(columns: Mapping[int, tuple[int, _Found]]) -> Origins:
    n = max(columns) + 1  # columns before the first are of a record that was gone on with
    step = np.full(n, UNKNOWN, dtype=np.int64)
    made_at = np.full(n, UNKNOWN, dtype=np.int64)
    maker = np.full(n, "", dtype=object)
    ambiguous = np.zeros(n, dtype=bool)
    given: list[tuple[Tensor, ...] | None] = [None] * n
    for column, (index, origin) in columns.items():
        step[column] = index
        if isinstance(origin, _Ambiguous):
            ambiguous[column] = True
        elif origin is not None:
            one, row = origin
            made_at[column] = one.taken
            maker[column] = one.player
            given[column] = tuple(one.row(row))
    return Origins(step, maker, made_at, _stacked(given), ambiguous)


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
