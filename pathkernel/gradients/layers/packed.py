"""Sequences of different lengths, packed for a recurrent layer: which sample is which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pathkernel.gradients.layers.recurrent import RECURRENT

_FUNCTIONS: Any = torch._VF  # which has no types


@dataclass(frozen=True)
class Pack:
    """Samples that were packed.

    Attributes
    ----------
    data
        What was made of them, (steps of all samples, width).
    order
        The sample that each sequence is, longest first; None where they came in that order.
    lengths
        Their lengths, in that order.
    longest
        Steps of the sequences before they were packed.
    """

    data: Tensor
    order: Tensor | None
    lengths: Tensor
    longest: int


class Packs:
    """Packed sequences of a pass, by the tensors that hold them."""

    def __init__(self) -> None:
        self._picked: dict[int, tuple[Tensor, Tensor]] = {}
        self._packs: dict[int, Pack] = {}

    def note(self, function: Any, args: Any, result: Any) -> None:
        """Note what put samples in order of their lengths, and what packed them."""
        if function in (torch.index_select, Tensor.index_select) and len(args) == 3:
            self._picked[id(result)] = result, args[2]
        elif function is _FUNCTIONS._pack_padded_sequence and len(args) == 3:
            input, lengths, batch_first = args
            order = self._picked.get(id(input), (None, None))[1]
            self._packs[id(result[0])] = Pack(result[0], order, lengths, input.shape[1 if batch_first else 0])

    def unrolled(self, function: Any, args: Any) -> Callable[..., Any] | None:
        """A recurrent layer of packed sequences step by step, each sample at its own place; None for other calls."""
        pack = self._packs.get(id(args[0])) if function in RECURRENT and args else None
        if pack is None or len(args) < 2 or not isinstance(args[1], Tensor):
            return None

        def run(data: Tensor, sizes: Tensor, hidden: Any, *options: Any) -> tuple[Tensor, ...]:
            forth = pack.order if pack.order is not None else torch.arange(len(pack.lengths), device=data.device)
            back = forth.argsort()
            padded, _ = _FUNCTIONS._pad_packed_sequence(data, sizes, False, 0.0, pack.longest)
            at_home = lambda state: state.index_select(1, back)  # noqa: E731
            begin = tuple(map(at_home, hidden)) if isinstance(hidden, (tuple, list)) else at_home(hidden)
            lengths = pack.lengths.to(data.device)[back]
            alive = torch.arange(pack.longest, device=data.device).unsqueeze(1) < lengths
            outputs, *ends = RECURRENT[function](padded.index_select(1, back), begin, *options, False, alive=alive)
            packed = _FUNCTIONS._pack_padded_sequence(outputs.index_select(1, forth), pack.lengths, False)[0]
            self._packs[id(packed)] = Pack(packed, pack.order, pack.lengths, pack.longest)
            return (packed, *(end.index_select(1, forth) for end in ends))

        return run
