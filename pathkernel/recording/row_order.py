"""Order in which the rows of a batch reached the network, where they are its own and were moved about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathkernel.errors import SampleIdError

SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers that have as many bytes as a number, by these."""


@dataclass(frozen=True)
class _Pair:
    """A tensor that the network was given, and the one whose rows these are, as one number for each row."""

    given: Tensor
    known: Tensor
    tells: bool

    @property
    def is_found(self) -> Tensor:
        return torch.isin(self.given, self.known)


def order_of(given: Sequence[Tensor], known: Sequence[Tensor], n: int) -> Tensor | None:
    """Places in a batch of the rows that the network was given.

    Parameters
    ----------
    given
        Tensors of n rows that the network was given.
    known
        Tensors of the batch as its ids were taken, some of n rows.
    n
        How many samples there are.

    Returns
    -------
    (n,) int64; None where rows are in their places, or are not the batch's own: augmented, scaled, of several samples.

    Raises
    ------
    SampleIdError
        Where rows were moved about, and it cannot be told which is which.
    """
    laid = [rows for one in known for rows in with_samples_first(one, n)]
    if all(any(_is_same(leaf, rows) for rows in laid) for leaf in given):
        return None
    pairs = [pair for leaf in given if leaf.numel() and (pair := _best(leaf, laid)) is not None]
    own = [pair for pair in pairs if bool(pair.is_found.all())]
    if len(own) < len(given):  # of labels alone, what is like another row's may be a label that was changed
        own = [pair for pair in own if pair.tells]
    if not own:
        _refuse_some(pairs)
        return None
    both = _Pair(_together([pair.given for pair in own]), _together([pair.known for pair in own]), True)
    if bool((both.given == both.known).all()) or not bool(both.is_found.all()):
        return None  # one argument is of these samples, and another one of others
    every = _together([numbers_of(rows.to(both.known.device)) for rows in laid])
    return _places(both, every)


def with_samples_first(tensor: Tensor, n: int) -> Iterator[Tensor]:
    """A tensor of a batch with its samples along the first axis, for each axis that they may lie along."""
    axes = [axis for axis, size in enumerate(tensor.shape) if size == n]
    for axis in axes[:1] if axes[:1] == [0] else axes:
        yield tensor.movedim(axis, 0)


def _is_same(leaf: Tensor, rows: Tensor) -> bool:
    """True where an argument is a tensor of the batch, in whatever shape and type."""
    if rows.numel() != leaf.numel():
        return False
    return torch.equal(rows.reshape(leaf.shape).to(device=leaf.device, dtype=leaf.dtype), leaf)


def _best(leaf: Tensor, laid: Sequence[Tensor]) -> _Pair | None:
    """The tensor of the batch that most rows of an argument are found in, by preference in their places."""
    best, most, numbers = None, (0, 0), numbers_of(leaf)
    for rows in laid:
        if rows.numel() == leaf.numel() and rows.is_complex() == leaf.is_complex():
            pair = _Pair(numbers, numbers_of(rows.to(device=leaf.device, dtype=leaf.dtype)), tells(leaf))
            found = int(pair.is_found.sum()), int((pair.given == pair.known).sum())
            if found > most:
                best, most = pair, found
    return best


def tells(leaf: Tensor) -> bool:
    """True where rows are hardly alike by chance: of numbers with a fraction."""
    return leaf.is_floating_point() and bool((leaf != leaf.round()).any())


def numbers_of(rows: Tensor) -> Tensor:
    """A number for each row that is the same where its bits are: (n,) int64, sums of products modulo 2^64."""
    rows = torch.view_as_real(rows) if rows.is_complex() else rows
    flat = rows.detach().reshape(len(rows), -1).contiguous()
    bits = flat.view(SAME_SIZE[flat.element_size()]).to(torch.int64)
    return (bits * _factors(bits.shape[1]).to(bits.device)).sum(dim=1)


def _factors(n: int) -> Tensor:
    """Odd numbers without a pattern."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randint(-(2**62), 2**62, (n,), generator=generator, device="cpu") * 2 + 1


def _together(numbers: Sequence[Tensor]) -> Tensor:
    return numbers_of(torch.stack(list(numbers), dim=1))


def _places(pair: _Pair, every: Tensor) -> Tensor:
    """Places of rows all of which are found; among rows that are alike in everything, one after the other.

    Raises
    ------
    SampleIdError
        Where they are alike in what the network was given alone.
    """
    in_order, places = pair.known.sort(stable=True)
    first = torch.searchsorted(in_order, pair.given)
    alike = torch.searchsorted(in_order, pair.given, right=True) - first
    groups = every[places]
    changed = torch.nn.functional.pad((groups[1:] != groups[:-1]).cumsum(0), (1, 0))
    if bool((changed[first] != changed[first + alike - 1]).any()):
        raise _moved_about("some of them are alike in what it was given, but not in the rest of the batch")
    return places[first + occurrences(pair.given) % alike].cpu()


def occurrences(numbers: Tensor) -> Tensor:
    """How often each number came before."""
    in_order, places = numbers.sort(stable=True)
    counted = torch.arange(len(numbers), device=numbers.device) - torch.searchsorted(in_order, in_order)
    return torch.empty_like(counted).index_copy_(0, places, counted)


def _refuse_some(pairs: Sequence[_Pair]) -> None:
    """Refuse rows of which some were moved about, while others are none of the batch's.

    Raises
    ------
    SampleIdError
        Where more rows lie in the places of others than in their own.
    """
    for pair in pairs:
        if pair.tells:
            moved = pair.is_found & (pair.given != pair.known)
            if len(pair.given[moved].unique()) > int((pair.given == pair.known).sum()) + 1:
                raise _moved_about("others are none of its rows")


def _moved_about(what: str) -> SampleIdError:
    return SampleIdError(
        f"The network was given rows of the batch in another order, and {what}",
        "Rows that lie in another order than in the batch that the loader gave are known again where each of them is "
        "one of its rows, and no other",
        "Leave the order of a batch to its loader (`shuffle=True`, a sampler), or announce the samples right before "
        "the pass in the order of its rows, `recorder.announce(ids[order], inputs=x)`",
    )
