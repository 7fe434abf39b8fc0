"""Tapes that have been proved to be right for the calls and the samples that they hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, PyTree
from pathkernel.functional import ROW_LIMIT, ModelFunction, error_of_rows, random_directions
from pathkernel.interrupts import attempt
from pathkernel.layers.coverage import Coverage, prove, uncovered
from pathkernel.layers.tape import FAILURES, Tape
from pathkernel.workspace import Workspace


class ProvedTapes:
    r"""Records tapes of one network; a sequence of calls, or samples, not met before are proved first.

    Parameters
    ----------
    function
        The network.
    workspace
        Memory for the signals of its tapes.

    Notes
    -----
    Two proofs. A sequence of calls with samples of a shape: parameter by parameter on a few samples in float64
    (`pathkernel.layers.coverage`), some five passes, once. The same with another number of samples: the rows of all of
    them against the batch run forward as it is, :math:`\langle row_i, v\rangle = \lambda_i \cdot (J v)_i` for random
    λ and v, two passes, once; where the network calls a function that may rearrange its samples, every time.
    """

    def __init__(self, function: ModelFunction, workspace: Workspace | None = None) -> None:
        self.function, self.workspace = function, workspace
        self.proved: dict[Any, Coverage] = {}
        self._met: set[Any] = set()
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
            self._latest = self.proved.setdefault(None, uncovered(function, tape))
            return Tape(function, theta, inputs, (), self._latest.plain, self.workspace)
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        calls = (tape.signature, function.tap, *((leaf.shape[1:], leaf.dtype) for leaf in leaves))
        coverage = self.proved.get(calls) or prove(function, theta, inputs, tape.lengths)
        if coverage is not latest:
            tape = Tape(function, theta, inputs, coverage.arrangements, coverage.plain, self.workspace)
        met = (calls, tape.n, tuple(tape.shapes))
        if (met not in self._met or tape.rearranges) and len(coverage.plain) < len(function.layout.names):
            if _are_own_rows(tape, theta, inputs):
                self._met.add(met)
            else:
                reason = f"rows of {tape.n} samples are not the samples' own: the network mixes or rearranges them"
                coverage = Coverage((), dict.fromkeys(function.layout.names, reason), 0.0)
                tape = Tape(function, theta, inputs, (), coverage.plain, self.workspace)
        self.proved[calls] = self._latest = coverage
        return tape

    def forget(self, n: int) -> None:
        """Compare the rows of n samples once more when they are met next, as those of a new number of samples are."""
        self._met = {met for met in self._met if met[1] != n}

    @property
    def coverage(self) -> Coverage | None:
        """Of the latest tape."""
        return self._latest


def _are_own_rows(tape: Tape, theta: Tensor, inputs: PyTree) -> bool:
    """Whether the rows of a tape are those of its samples; decided in float64 where rounding might have a say."""
    limit = ROW_LIMIT.get(tape.function.dtype, 0.0) if tape.function.state.autocast is None else 0.0
    error = _error(tape, theta, inputs)
    if error <= limit or error == float("inf"):
        return error <= limit
    function = tape.function.converted(torch.float64)
    again = attempt(lambda: Tape(function, theta.double(), inputs, tape.arrangements, tape.plain), FAILURES)
    return not isinstance(again, Exception) and _error(again, theta.double(), inputs) <= ROW_LIMIT[torch.float64]


def _error(tape: Tape, theta: Tensor, inputs: PyTree) -> float:
    function = tape.function
    generator = torch.Generator().manual_seed(tape.n)
    v = random_directions(function.layout.size, 1)
    for name in tape.plain:
        v[:, function.layout.slices[name]] = 0
    weights = torch.randn(tape.outputs.shape, generator=generator, dtype=torch.float64)
    own = weights.to(tape.outputs)

    def rows() -> Tensor:
        with torch.enable_grad():
            pieces = tape.pieces((tape.outputs * own).sum(dim=1, keepdim=True))
        found = torch.zeros(tape.n, dtype=torch.float64, device=function.device)
        for piece in pieces:
            found += piece.products(function.cast(v))[:, 0, 0].double()
        return found

    found = attempt(rows, FAILURES)
    if isinstance(found, Exception):
        return float("inf")
    inputs = function.cast(inputs)
    return error_of_rows(function, theta, inputs, v, found[:, None, None], weights.unsqueeze(1))
