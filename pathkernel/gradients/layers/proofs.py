"""What was proved of the tapes of one network: kept with it, whoever asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pathkernel.gradients.layers.batch_axis import NO_ROLES, Arrangement, Roles
from pathkernel.gradients.model_function import ModelFunction


@dataclass(frozen=True)
class Coverage:
    """Result of the proof for one sequence of calls.

    Attributes
    ----------
    arrangements
        Place of the samples in the result of each call.
    plain
        Parameters that the tape does not cover, and why.
    largest
        Largest relative difference among those that it does.
    roles
        Results that are of samples or of none otherwise than their arguments tell.
    before_head
        `Tape.elementwise_before_head`.
    """

    arrangements: tuple[Arrangement, ...]
    plain: Mapping[str, str]
    largest: float
    roles: Roles = NO_ROLES
    before_head: int | None = None

    @property
    def known(self) -> tuple[tuple[Arrangement, ...], Mapping[str, str], Roles]:
        """Knowledge that a tape is given."""
        return self.arrangements, self.plain, self.roles


@dataclass
class TapeProofs:
    """Proofs of the tapes of one network, of the output of the same submodule and of the same parameters.

    What covers every parameter is known of all modes of the network; samples that are mixed in train mode, as by
    BatchNorm, need not be in evaluation mode, so that what leaves some out is known of the modes in which it was seen.

    Attributes
    ----------
    coverages
        By sequence of calls and shape of samples, and by modes where a parameter is left out.
    met
        Numbers of samples whose rows were seen to be their own, by sequence of calls, modes, and shapes of results.
    made
        How many comparisons with autograd were made.
    bytes
        The most that a proof took, as far as that was measured.
    """

    coverages: dict[Any, Coverage] = field(default_factory=dict)
    met: set[Any] = field(default_factory=set)
    made: int = 0
    bytes: float = math.nan
    _latest: dict[Any, Coverage] = field(default_factory=dict)

    @classmethod
    def of(cls, function: ModelFunction) -> TapeProofs:
        """Proofs that all functions of a network share, whatever state and constants they run with."""
        found: TapeProofs = function.proofs.setdefault((function.submodule, function.layout.names), cls())
        return found

    def latest(self, modes: Any) -> Coverage | None:
        """The coverage that was noted last in some modes, or in any, of every parameter; None before the first."""
        return self._latest.get(modes) or self._latest.get(None)

    def find(self, calls: Any, modes: Any) -> Coverage | None:
        """The coverage of a sequence of calls in some modes; None where it is still to be proved."""
        return self.coverages.get((calls, modes)) or self.coverages.get(calls)

    def note(self, calls: Any, modes: Any, coverage: Coverage) -> None:
        """Add the coverage of a sequence of calls."""
        self.coverages[(calls, modes) if coverage.plain else calls] = self._latest[modes] = coverage
        if not coverage.plain:
            self._latest[None] = coverage
