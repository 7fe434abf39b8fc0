"""Tapes that have been proved to be right for the calls that they hold."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pathkernel._typing import Float, PyTree
from pathkernel.functional import ModelFunction
from pathkernel.interrupts import attempt
from pathkernel.layers.coverage import Coverage, prove, uncovered
from pathkernel.layers.tape import FAILURES, Tape
from pathkernel.workspace import Workspace


class ProvedTapes:
    """Records tapes of one network; a sequence of calls not met before is proved first.

    Parameters
    ----------
    function
        The network.
    workspace
        Memory for the signals of its tapes.

    Notes
    -----
    Cost of a proof: five passes of a few samples in float64, once.
    """

    def __init__(self, function: ModelFunction, workspace: Workspace | None = None) -> None:
        self.function, self.workspace = function, workspace
        self.proved: dict[Any, Coverage] = {}
        self._latest: Coverage | None = None

    def record(
        self, theta: Float[Tensor, " P"], inputs: PyTree, function: ModelFunction | None = None
    ) -> Tape:
        """A forward pass of n samples at θ.

        Parameters
        ----------
        theta, inputs
            θ, (P,), and samples.
        function
            The same network with other buffers or run in another way.
        """
        function = function or self.function
        latest = self._latest
        if latest is not None and latest.plain.keys() >= set(function.layout.names):
            return Tape(function, theta, inputs, (), latest.plain, self.workspace)
        known = (latest.arrangements, latest.plain) if latest else ((), {})
        tape = attempt(lambda: Tape(function, theta, inputs, *known, self.workspace), FAILURES)
        if isinstance(tape, Exception):
            coverage = self.proved.setdefault(None, uncovered(function, tape))
        else:
            signature = tape.signature
            coverage = self.proved.get(signature) or prove(function, theta, inputs)
            self.proved[signature] = coverage
            if coverage is latest:
                return tape
        self._latest = coverage
        return Tape(function, theta, inputs, coverage.arrangements, coverage.plain, self.workspace)

    @property
    def coverage(self) -> Coverage | None:
        """Of the latest tape."""
        return self._latest
